"""One GPT, written by hand, for every paper in this project.

- one config for the families that the papers study, from GPT-2 to Gemma 3
- named *sites* (residual stream, attention patterns, per-head outputs, MLP activations) to read
  with `capture` and rewrite with `patch`, in training, under a cache and in `generate`
- a loss that never holds all logits; `generate` with a key/value cache; `sweep`, many patches of
  the same prompts in one pass

Read `GPT.hidden` first, then `Block`, `Attention`, `MLP`. Switches stand beside what they change.
Shapes: B batch, T new positions, S key positions, H heads, D head_dim, C n_embd, V vocab_size.
"""

import copy
import difflib
import math
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """Shape of a model. The first five are nanoGPT's; all defaults make a plain rotary GPT."""

    vocab_size: int = 50304
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # fewer key/value heads (grouped queries); None = n_head
    head_dim: int | None = None  # None = n_embd / n_head
    d_mlp: int | None = None  # None = 4 n_embd
    # norms and wiring
    norm: str = "layer"  # "layer" (LayerNorm) or "rms" (RMSNorm)
    norm_eps: float = 1e-5
    norm_bias: bool = True  # LayerNorm with a bias; Cohere has none
    pre_norm: bool = True  # off: OLMo 2, whose only norms are the post norms
    post_norm: bool = False  # Gemma 2/3: a norm on what attention and MLP add to the stream
    parallel: str = ""  # attention and MLP side by side: "two_norms" (NeoX), "one_norm" (Cohere)
    # positions
    learned_pos: bool = False  # GPT-2: a learned vector per position instead of rotary
    rotary_pct: float = 1.0  # share of each head that rotates (Pythia 0.25)
    rope_base: float = 10000.0
    rope_base_local: float | None = None  # Gemma 3: another base in the layers with a window
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear", "factor": ...}
    # attention
    qkv_bias: bool = True
    attn_bias: bool = True  # bias of the output projection
    qk_norm: str = ""  # norm of queries and keys: "head" (Qwen3, Gemma 3), "all" heads (OLMo 2)
    attn_scale: float | None = None  # None = 1 / sqrt(head_dim)
    attn_softcap: float | None = None  # Gemma 2: scores -> cap * tanh(scores / cap)
    windows: list | None = None  # per layer: how many positions it sees, itself included; 0 = all
    smear_keys: bool = False  # a key mixes with the one before: induction in one layer (2209.11895)
    # MLP
    act: str = "gelu"  # "gelu" | "gelu_tanh" | "silu"
    gated: bool = False  # act(gate) * up instead of act(up)
    mlp_bias: bool = True
    # embedding and unembedding
    tie: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    # initialisation: normal, std sqrt(2 / 5C); the two output projections of a block have their own
    proj_std: float | None = None  # None = sqrt(2 / 5C) / sqrt(2 n_layer)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_mlp = self.d_mlp or 4 * self.n_embd
        self.windows = self.windows or [0] * self.n_layer
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        kinds = {"norm": ("layer", "rms"), "parallel": ("", "two_norms", "one_norm")}
        kinds |= {"qk_norm": ("", "head", "all"), "act": tuple(ACT)}
        for name, allowed in kinds.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}, allowed: {allowed}")
        if not self.learned_pos and int(self.rotary_pct * self.head_dim) % 2:
            what = f"head_dim {self.head_dim}, rotary_pct {self.rotary_pct}"
            raise ValueError(f"{what}: needed is an even number of rotating dims")
        if len(self.windows) != self.n_layer:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.n_layer} layers")


ACT = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}


def make_norm(config, dim):
    """The config's norm over the last `dim` entries."""
    if config.norm == "rms":
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.norm_bias)


def rope(config, positions, local=False):
    """Cosines and sines of the rotary angles at `positions` (B|1, T): two (B|1, 1, T, R/2)."""
    base, scaling = config.rope_base, config.rope_scaling
    if local and config.rope_base_local:
        base, scaling = config.rope_base_local, None
    dim = int(config.rotary_pct * config.head_dim)
    freq = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    if scaling and scaling["rope_type"] == "linear":
        freq = freq / scaling["factor"]
    elif scaling:  # "llama3": slow dims are stretched, fast ones kept
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = positions[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates the first R entries of the last dim of x (B, H, T, D), entry j with j + R/2."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `length` tokens.

    `model(idx, cache=cache)` appends to it: `n` columns are in use, `real` (B, S) tells tokens from
    padding.
    """

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = 2, config.n_layer, batch, config.n_kv_head, length, config.head_dim
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.last_key = self.kv[0, :, :, :, :1].clone()  # for smear_keys: the newest, not smeared
        self.real = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.n = 0
        self.has_padding = False
        self.frozen = False  # then what is appended is not kept

    def open(self, mask, size):
        """Opens `size` columns; returns which of all are real (B, S), None if none is padding."""
        start, self.n = self.n, self.n + size
        if self.n > self.real.shape[1]:
            raise ValueError(f"the cache holds {self.real.shape[1]} tokens, {self.n} are needed")
        if mask is not None and not mask.all():
            self.real[:, start : self.n] = mask
            self.has_padding = True
        return self.real[:, : self.n] if self.has_padding else None

    def append(self, layer, k, v):
        """Takes keys and values (B, H, T, D) of a layer; returns all so far, (2, B, H, S, D)."""
        if self.frozen:
            k = torch.cat((self.kv[0, layer, :, :, : self.n], k), 2)
            v = torch.cat((self.kv[1, layer, :, :, : self.n], v), 2)
            return k, v
        start = self.n - k.shape[2]
        self.kv[0, layer, :, :, start : self.n] = k
        self.kv[1, layer, :, :, start : self.n] = v
        return self.kv[:, layer, :, :, : self.n]

    def part(self, rows, first):
        """The cache of a slice of rows, its columns counted from `first`; writes go to this one."""
        self.real[rows, :first] = False
        view = copy.copy(self)
        view.kv, view.last_key = self.kv[:, :, rows, :, first:], self.last_key[:, rows]
        view.real = self.real[rows, first:]
        return view

    def keep(self, rows):
        """Selects batch rows: finished ones leave, or one prompt is repeated for many samples."""
        self.kv = self.kv[:, :, rows]
        self.last_key, self.real = self.last_key[:, rows], self.real[rows]


def visible(q_pos, k_pos, window=0, real=None):
    """Which keys a query may attend to, bool (B|1, 1, T, S), by positions (B|1, T) and (B|1, S).

    `window`: how many positions a query sees, itself included (0: all). `real` (B, S): padding is
    hidden from all but itself, so that no row of the softmax is empty.
    """
    see = k_pos[:, None, :] <= q_pos[:, :, None]
    if window:
        see = see & (k_pos[:, None, :] > q_pos[:, :, None] - window)
    if real is not None:
        _, T, S = see.shape
        itself = torch.eye(S, dtype=torch.bool, device=see.device)[S - T :]
        see = (see & real[:, None, :]) | itself
    return see[:, None]


class Linear(nn.Linear):
    """nn.Linear; for the few rows of a decoding step W stands on the left: faster on a CPU."""

    def forward(self, x):
        n_out, n_in = self.weight.shape
        rows = x.numel() // n_in
        if self.bias is not None or not 1 < rows <= 32 or not x.is_cpu:
            return super().forward(x)
        # one product for each 2048 rows of W: as many fit into the CPU's cache
        W = self.weight.view(-1, n_out if n_out % 2048 else 2048, n_in)
        columns = x.reshape(rows, n_in).t().expand(len(W), n_in, rows)
        return torch.bmm(W, columns).view(n_out, rows).t().reshape(*x.shape[:-1], n_out)


class Attention(nn.Module):
    """Causal attention. Sites: `pattern` (B, H, T, S), `z` (B, T, H, D), `out` (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads, dim = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = Linear(config.n_embd, (heads + 2 * kv_heads) * dim, bias=config.qkv_bias)
        self.proj = Linear(heads * dim, config.n_embd, bias=config.attn_bias)
        if config.qk_norm:
            together = config.qk_norm == "all"
            self.q_norm = make_norm(config, heads * dim if together else dim)
            self.k_norm = make_norm(config, kv_heads * dim if together else dim)
        self.post_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        if config.smear_keys:
            self.smear = nn.Parameter(torch.zeros(kv_heads, 1, 1))
        self.pattern, self.z, self.out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x, rotary, see, mask, cache):
        c, (B, T, _) = self.config, x.shape
        sizes = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        q, k, v = self.qkv(x).split(sizes, dim=-1)
        if c.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.smear_keys:
            k = self.smeared(k, mask, cache)
        if not c.learned_pos:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if c.attn_softcap or self.pattern._forward_hooks:
            z = self.attend(q, k, v, see)
        else:
            if T == 1:  # one new token: the heads that share a key become rows of one product
                q = q.reshape(B, c.n_kv_head, -1, c.head_dim)
            gqa, causal = q.shape[1] != k.shape[1], see is None and T > 1
            how = {"is_causal": causal, "scale": c.attn_scale, "enable_gqa": gqa}
            z = F.scaled_dot_product_attention(q, k, v, see, **how)
            z = z.reshape(B, c.n_head, T, c.head_dim)
        z = self.z(z.transpose(1, 2))
        return self.out(self.post_norm(self.proj(z.reshape(B, T, -1))))

    def smeared(self, k, mask, cache):
        """Keys (B, H, T, D), each mixed with the one before it; padding counts as zero."""
        if mask is not None:
            k = k * mask[:, None, :, None]
        before = F.pad(k, (0, 0, 1, -1))  # one position later
        if cache is not None:
            before[:, :, :1] = cache.last_key[self.layer]
            cache.last_key[self.layer] = k[:, :, -1:]
        keep = torch.sigmoid(self.smear)
        return keep * k + (1 - keep) * before

    def attend(self, q, k, v, see):
        """The same attention written out: for its pattern, and for soft-capped scores."""
        c, T = self.config, q.shape[2]
        k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))
        score = q @ k.transpose(-2, -1) * (c.attn_scale or c.head_dim**-0.5)
        if c.attn_softcap:
            score = c.attn_softcap * torch.tanh(score / c.attn_softcap)
        if see is None:
            see = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - T)
        score = score.masked_fill(~see, -torch.inf)
        return self.pattern(F.softmax(score, dim=-1, dtype=torch.float32).to(v.dtype)) @ v


class MLP(nn.Module):
    """Two layers, plain or gated. Sites: `act` (B, T, d_mlp), `out` (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = 2 * config.d_mlp if config.gated else config.d_mlp  # gate and up in one product
        self.up = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.down = Linear(config.d_mlp, config.n_embd, bias=config.mlp_bias)
        self.post_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        self.act, self.out = nn.Identity(), nn.Identity()

    def forward(self, x):
        h, act = self.up(x), ACT[self.config.act]
        if self.config.gated:
            gate, up = h.chunk(2, dim=-1)
            h = act(gate) * up
        else:
            h = act(h)
        return self.out(self.post_norm(self.down(self.act(h))))


class Block(nn.Module):
    """One layer: attention and MLP, each reading the residual stream and adding to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel
        two_norms = config.pre_norm and config.parallel != "one_norm"
        self.norm1 = make_norm(config, config.n_embd) if config.pre_norm else nn.Identity()
        self.norm2 = make_norm(config, config.n_embd) if two_norms else nn.Identity()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.resid_pre, self.resid_post = nn.Identity(), nn.Identity()

    def forward(self, x, rotary, see, mask, cache):
        x = self.resid_pre(x)
        h = self.norm1(x)
        a = self.attn(h, rotary, see, mask, cache)
        if self.parallel:
            x = x + a + self.mlp(h if self.parallel == "one_norm" else self.norm2(x))
        else:
            x = x + a
            x = x + self.mlp(self.norm2(x))
        return self.resid_post(x)


class GPT(nn.Module):
    """A decoder-only language model: `model(idx)` gives logits, `model.loss` the loss."""

    def __init__(self, config, init=True):
        super().__init__()
        self.config = config
        # `init_weights` or a checkpoint fills the embeddings
        empty = partial(nn.Embedding.from_pretrained, freeze=False)
        self.wte = empty(torch.empty(config.vocab_size, config.n_embd))
        if config.learned_pos:
            self.wpe = empty(torch.empty(config.block_size, config.n_embd))
        self.embed = nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final = make_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.head.weight = self.wte.weight
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal of std sqrt(2 / 5C); smaller where a block adds to the stream."""
        std = math.sqrt(2 / (5 * self.config.n_embd))
        proj_std = self.config.proj_std or std / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                p.normal_(0, proj_std)
            elif p.dim() == 2:
                p.normal_(0, std)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx, targets=None, weights=None, denom=None, mask=None, cache=None):
        """Logits (B, T, V) of token ids `idx` (B, T) int64; with `targets`, the loss.

        targets  (B, T) token ids; -100 counts nothing
        weights  (B, T), default 1; only positions of positive weight reach the unembedding
        denom    default sum(weights), at least 1; over all micro-batches and ranks, to accumulate
        mask     (B, T) bool, True at real tokens, for left- or right-padded batches; positions
                 count real tokens only
        cache    a `KVCache` to continue; `idx` and `mask` are then the new tokens only
        """
        h = self.hidden(idx, mask, cache)
        if targets is None:
            return self.unembed(h)
        if weights is None:
            weights = torch.ones(targets.shape, device=h.device)
        counts = (targets != -100) & (weights > 0)
        targets, weights = targets[counts], weights[counts].float()
        if denom is None:
            denom = weights.sum().clamp(min=1.0)
        W, train = self.head.weight, torch.is_grad_enabled()
        return SlicedCrossEntropy.apply(h[counts], W, targets, weights / denom, self.config, train)

    def loss(self, idx, targets, weights=None, denom=None, **kwargs):
        """Mean cross-entropy in nats over the positions that count: sum(weights * loss) / denom."""
        return self(idx, targets, weights, denom, **kwargs)

    def hidden(self, idx, mask=None, cache=None, first=0, x=None):
        """The normed residual stream (B, T, C) that the unembedding reads.

        x  the stream that enters block `first`, to go on from there; default the embedding
        """
        c, T = self.config, idx.shape[1]
        start = 0 if cache is None else cache.n
        if start + T > c.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {c.block_size}")
        real = mask if cache is None else cache.open(mask, T)
        if real is None:
            pos = torch.arange(start + T, device=idx.device)[None]
        else:
            pos = (real.cumsum(1) - 1).clamp(min=0)  # counts real tokens only
        # by kind of layer: what it may see (None is plain causal attention), and its rotary angles
        see, rotary = {}, {}
        for window in set(c.windows):
            # no mask is needed without padding, for a text from its start or for one new token,
            # if the window cuts nothing off
            cuts = 0 < window < start + T
            plain = real is None and (start == 0 or T == 1) and not cuts
            see[window] = None if plain else visible(pos[:, start:], pos, window, real)
            rotary[window] = None if c.learned_pos else rope(c, pos[:, start:], local=window > 0)

        if x is None:
            x = self.wte(idx)
            if c.embed_scale != 1.0:
                x = x * torch.tensor(c.embed_scale, dtype=x.dtype)  # Gemma rounds it to the dtype
            if c.learned_pos:
                x = x + self.wpe(pos[:, start:])
            x = self.embed(x)
        for window, block in list(zip(c.windows, self.blocks))[first:]:
            x = block(x, rotary[window], see[window], mask, cache)
        return self.final(x)

    def unembed(self, h):
        """Logits of normed residual vectors h (..., C), with the config's scale and soft-cap."""
        logits, cap = self.head(h), self.config.logit_softcap
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def token_loss(self, idx, targets, **kwargs):
        """Cross-entropy (B, T) of every target in nats, no gradient; 0 where the target is -100."""
        h = self.hidden(idx, **kwargs)
        rows = []
        for row, target in zip(h, targets):  # one at a time: the logits may be large
            rows.append(F.cross_entropy(self.unembed(row).float(), target, reduction="none"))
        return torch.stack(rows)

    def site(self, name):
        """The submodule whose output is the site `name`; KeyError that lists the nearest."""
        L, names = self.config.n_layer, ["embed", "final"]
        inner = "resid_pre attn.pattern attn.z attn.out mlp.act mlp.out resid_post".split()
        for i in range(L):
            names += [f"blocks.{i}.{site}" for site in inner]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:6]
            raise KeyError(f"no site {name!r} in a model of {L} layers; near: {', '.join(near)}")
        return self.get_submodule(name)

    @contextmanager
    def patch(self, functions):
        """Inside `with model.patch({site: fn}):` passes go on with `fn(tensor)` for the tensor."""
        with ExitStack() as stack:
            for name, fn in functions.items():
                hook = self.site(name).register_forward_hook(lambda m, args, x, fn=fn: fn(x))
                stack.enter_context(hook)
            stack.enter_context(self.eager())  # compiled code does not look for hooks
            yield self

    def eager(self):
        """A context in which nothing runs compiled."""
        if "torch._dynamo" in sys.modules:  # not imported: then nothing has been compiled
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def capture(self, idx, sites, mask=None, **kwargs):
        """{site: tensor} of a pass up to the unembedding, as patches that are on leave them."""
        acts = {}
        with self.patch({name: partial(acts.__setitem__, name) for name in sites}):
            self.hidden(idx, mask, **kwargs)
        return acts


class SlicedCrossEntropy(torch.autograd.Function):
    """sum_i w_i * -log softmax(f(h_i W^T))[y_i], by slices of rows, gradients taken on the way.

    The gradient of cross-entropy with respect to the logits is softmax - onehot: known once the
    logits are. So each slice of logits is turned into its gradient in place and multiplied out, and
    nothing of size V outlives its slice. Differentiable once.
    """

    @staticmethod
    def forward(ctx, h, W, targets, w, config, train):
        device, scale, cap = h.device.type, config.logit_scale, config.logit_softcap
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        low, total = W.to(dtype), torch.zeros((), device=h.device)
        grad_h, grad_W = [], torch.zeros_like(W, dtype=torch.float32) if train else None
        size = max(64, (2**27 if device == "cuda" else 2**24) // W.shape[0])  # rows at once
        slices = zip(h.to(dtype).split(size), targets[:, None].split(size), w[:, None].split(size))
        with torch.autocast(device, enabled=False):
            for part, y, wi in slices:
                logits = part @ low.T
                if scale != 1.0:
                    logits = logits.float() * scale
                if cap:
                    logits = cap * torch.tanh(logits.float() / cap)
                logp = F.log_softmax(logits, 1, dtype=torch.float32)
                total -= (logp.gather(1, y) * wi).sum()
                if train:
                    grad = logp.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=logp.dtype))
                    if cap:  # d cap*tanh(x/cap) / dx = 1 - (capped/cap)^2
                        grad.mul_(1 - (logits / cap) ** 2)
                    grad = grad.mul_(scale).to(dtype)
                    grad_h.append((grad @ low) * wi)
                    grad_W += grad.T @ (part * wi).to(dtype)
        ctx.save_for_backward(torch.cat(grad_h).to(h.dtype) if train else None, grad_W)
        ctx.dtype = W.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_h, grad_W = ctx.saved_tensors
        return grad_h * upstream, (grad_W * upstream).to(ctx.dtype), None, None, None, None


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop=(),
    seed=None,
    process=None,
    samples=1,
):
    """Continues every prompt `samples` times; returns the new ids of each, prompt by prompt.

    prompts      list of non-empty id lists of any lengths; each is read once, whatever `samples` is
    temperature  0 is greedy: the same ids as one prompt at a time, or without a cache
    top_k/top_p  sample among the k likeliest tokens / the fewest that hold this much probability
    stop         ids that end a row; the stopping id is the row's last
    process      process(logits, alive, out) -> logits (B, V) float32, before each sampling: masks,
                 penalties. out: the new ids of every row so far; alive: the rows in the batch
    Raises ValueError for what it can't do, and for logits that leave no choice.
    """
    c, device, dtype = model.config, model.wte.weight.device, model.wte.weight.dtype
    if not prompts or not all(map(len, prompts)):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    length = max(map(len, prompts)) + max_new_tokens
    if length > c.block_size:
        raise ValueError(f"prompt and answer of {length} do not fit block_size {c.block_size}")
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}, allowed: 0 and more")
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    out = [[] for _ in range(len(prompts) * samples)]
    alive = list(range(len(out)))  # the row of `out` behind each row of the batch
    # dropping rows copies the cache, so not for each (1.4 times as slow); but a `process` is to
    # see only the rows that go on
    share = 1 if process else 7 / 8
    with model.eager():  # the cache grows: compiled blocks would be compiled again and again
        cache = KVCache(c, len(prompts), length, device, dtype)
        h = prefill(model, prompts, cache)
        if samples > 1:
            h = h.repeat_interleave(samples, 0)
            cache.keep(torch.arange(len(prompts), device=device).repeat_interleave(samples))
        for step in range(max_new_tokens):
            logits = model.unembed(h).float()
            if process:
                logits = process(logits, alive, out)
            idx = sample(logits, temperature, top_k, top_p, rng)
            for row, token in zip(alive, idx[:, 0].tolist()):
                if not out[row] or out[row][-1] not in stop:
                    out[row].append(token)
            going = [i for i, row in enumerate(alive) if out[row][-1] not in stop]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(alive) * share:
                alive = [alive[i] for i in going]
                idx = idx[going]
                cache.keep(torch.tensor(going, device=device))
            h = model.hidden(idx, cache=cache)[:, -1]
    return out


def prefill(model, prompts, cache):
    """Takes prompts into the cache, those of like length together: little is spent on padding.

    Returns the hidden states (B, C) that unembed to the next tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first
    longest, device = len(prompts[order[0]]), cache.kv.device
    enough = 2048 if device.type == "cuda" else 128  # tokens that keep the device busy
    h, start = [], 0
    for end in range(1, len(order) + 1):
        T = len(prompts[order[start]])
        shorter = end < len(order) and len(prompts[order[end]]) < 0.8 * T
        if end == len(order) or shorter and (end - start) * T >= enough:
            idx, mask = padded([prompts[i] for i in order[start:end]], device)
            part = cache.part(slice(start, end), longest - T)  # all prompts end in one column
            h.append(model.hidden(idx, mask, part)[:, -1])
            start = end
    cache.n = longest
    cache.has_padding = len(prompts[order[-1]]) < longest
    if not cache.has_padding:  # all of one length: they are in order
        return torch.cat(h)
    back = torch.tensor(order, device=device).argsort()
    cache.keep(back)  # rows in the order of the prompts again
    return torch.cat(h)[back]


def padded(prompts, device):
    """Id lists as one tensor (B, T), padded on the left, and its mask of real tokens."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    idx = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    length = torch.tensor([len(row) for row in rows])
    mask = torch.arange(idx.shape[1]) >= idx.shape[1] - length[:, None]
    return idx.to(device), mask.to(device)


def sample(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """One token id for each row of logits (B, V), as (B, 1). ValueError if a row has no best."""
    best, idx = logits.max(-1, keepdim=True)
    if not best.isfinite().all():
        raise ValueError("generate: no token is allowed, or the logits are not finite")
    if temperature < 1e-5:  # greedy
        return idx
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        drop = p.cumsum(-1) - p >= top_p  # the mass before it is enough
        drop = drop.scatter(-1, order, drop)  # back in the order of the ids
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=rng)


def residuals(model, idx, mask=None, tail=1, cache=None):
    """The residual stream of the last `tail` columns, (L + 1, B, tail, C): embedding and blocks."""
    sites = ["embed"] + [f"blocks.{i}.resid_post" for i in range(model.config.n_layer)]
    acts = model.capture(idx, sites, mask, cache=cache)
    return torch.stack([acts[site][:, -tail:] for site in sites])


@torch.no_grad()
def sweep(model, idx, interventions, tail=1, mask=None):
    """Many interventions on the same prompts in one pass, exact: the `final` site under each.

    A patch after block j at column p changes nothing before p and nothing below j. So the prompts
    run once; then the last `tail` columns (p is the first of them) go through the blocks again, as
    one bundle per intervention. A bundle joins behind the block where its patches begin, and
    attends to the keys of the one prefix and to itself, to no other bundle.

    idx            (B, T) token ids; `mask` (B, T) for padding on the left: the last `tail` columns
                   must be real
    interventions  V dictionaries {layer: fn}; fn(x) -> x rewrites the last columns (B, tail, C)
                   that leave block `layer` (-1: the embedding): at one layer, or held at several
    Returns (B, V, tail, C), normed as `model.unembed` wants it.
    """
    c, (B, T) = model.config, idx.shape
    if c.smear_keys or not 0 < tail < T:
        allowed = f"1 to {T - 1}, in a model without smeared keys"
        raise ValueError(f"a sweep over {tail} of {T} columns, allowed: {allowed}")
    layers = set().union(*interventions)
    if not layers <= set(range(-1, c.n_layer)):
        raise ValueError(f"interventions at {sorted(layers)}, allowed: -1 to {c.n_layer - 1}")
    cache = KVCache(c, B, T, idx.device, model.wte.weight.dtype)
    clean = residuals(model, idx, mask, tail, cache)
    cache.n, cache.frozen = T - tail, True
    bundles = {}  # (B, tail, C) of every intervention that has begun
    for layer in range(-1, c.n_layer):
        if bundles:
            x = torch.stack(list(bundles.values()), 1)
            with model.eager():
                x = block_of_bundles(model, layer, x, cache)
            bundles = dict(zip(bundles, x.unbind(1)))
        for v, functions in enumerate(interventions):
            if layer == min(functions, default=c.n_layer - 1):
                bundles[v] = clean[layer + 1].clone()
            if layer in functions:
                bundles[v] = functions[layer](bundles[v])
    return model.final(torch.stack([bundles[v] for v in range(len(interventions))], 1))


def block_of_bundles(model, layer, x, cache):
    """One block for bundles x (B, V, tail, C), each on top of the cache's prefix."""
    c, n, (V, tail) = model.config, cache.n, x.shape[1:3]
    real = F.pad(cache.real[:, :n], (0, V * tail), value=True)
    prefix = (real[:, : n + tail].cumsum(1) - 1).clamp(min=0)
    pos = prefix[:, n:].repeat(1, V)  # (B, V * tail)
    see = visible(pos, torch.cat((prefix[:, :n], pos), 1), c.windows[layer], real)
    bundle = torch.arange(V, device=x.device).repeat_interleave(tail)
    see[..., n:] &= bundle[:, None] == bundle  # no other bundle
    rotary = None if c.learned_pos else rope(c, pos, local=c.windows[layer] > 0)
    out = model.blocks[layer](x.flatten(1, 2), rotary, see, None, cache)
    return out.unflatten(1, (V, tail))
