"""One GPT, written by hand, for every paper in this project.

Notable features:
- one config for the families the papers study: GPT-2, GPT-NeoX/Pythia, Llama, Mistral, Qwen, Gemma, Phi-3, Cohere/Aya
- named *sites* (residual stream, attention patterns, per-head outputs, MLP activations) to read with `capture` and
  rewrite with `patch`: forward hooks on empty submodules, so they work in training, under a cache and in `generate`
- a loss that unembeds only the positions that count, in slices, so that (batch x time, vocabulary) is never held whole
- a preallocated key/value cache, and `generate` for prompts of any lengths at once

Read `GPT.forward` first, then `Block`, `Attention`, `MLP`. Switches stand beside the line they change.

Shapes: B batch, T new positions, S positions visible as keys, H heads, D head_dim, C n_embd, V vocab_size.
"""

import copy
import difflib
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------ config


@dataclass
class GPTConfig:
    """Shape of a model. The first five are nanoGPT's; the defaults after them are a plain rotary, pre-LayerNorm GPT."""

    vocab_size: int = 50304
    block_size: int = 1024  # longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # grouped-query attention: fewer key/value heads; None = n_head
    head_dim: int | None = None  # None = n_embd / n_head
    d_mlp: int | None = None  # None = 4 n_embd
    # norms and wiring
    norm: str = "layer"  # "layer" (LayerNorm) or "rms" (RMSNorm)
    norm_eps: float = 1e-5
    norm_bias: bool = True  # LayerNorm with a bias; Cohere has none
    post_norm: bool = False  # Gemma 2/3: a second norm on what attention and MLP add to the stream
    parallel: str = ""  # "two_norms" (NeoX) | "one_norm" (Cohere): attention and MLP read the same stream
    # positions
    learned_pos: bool = False  # GPT-2: a learned vector per position instead of rotary
    rotary_pct: float = 1.0  # share of each head that rotates (Pythia 0.25)
    rope_base: float = 10000.0
    rope_base_local: float | None = None  # Gemma 3: another base in the layers with a window
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear", "factor": ...}; not with rope_base_local
    # attention
    qkv_bias: bool = True
    attn_bias: bool = True  # bias of the output projection
    qk_norm: bool = False  # RMSNorm of every query and key head (Qwen3, Gemma 3)
    attn_scale: float | None = None  # None = 1 / sqrt(head_dim)
    attn_softcap: float | None = None  # Gemma 2: scores -> cap * tanh(scores / cap)
    windows: list | None = None  # per layer: how many positions back it sees, itself included; 0 = all
    smear_keys: bool = False  # each key mixes with the one before it: induction in one layer (2209.11895, appendix)
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
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: give head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.windows is not None and len(self.windows) != self.n_layer:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.n_layer} layers")
        switches = {"norm": ("layer", "rms"), "parallel": ("", "two_norms", "one_norm"), "act": tuple(ACT)}
        for name, allowed in switches.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: {', '.join(map(repr, allowed))}")


ACT = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def make_norm(config, dim):
    """The config's norm over the last `dim` entries."""
    if config.norm == "rms":
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.norm_bias)


# --------------------------------------------------------------------------------------------------------- positions


def rope(config, positions, local=False):
    """Cosines and sines of the rotary angles at `positions` (B|1, T): two tensors (B|1, 1, T, R/2), R rotating dims."""
    dim = int(config.rotary_pct * config.head_dim)
    base = config.rope_base_local if local and config.rope_base_local else config.rope_base
    freq = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    scaling = None if local and config.rope_base_local else config.rope_scaling
    if scaling and scaling["rope_type"] == "linear":
        freq = freq / scaling["factor"]
    elif scaling and scaling["rope_type"] == "llama3":  # slow dims are stretched, fast ones kept, a ramp between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    elif scaling:
        raise ValueError(f"rope_type {scaling['rope_type']!r}, allowed: linear, llama3")
    angle = positions[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates the first R entries of the last dim of x (B, H, T, D), entry j paired with j + R/2."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), dim=-1)


# ------------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `length` tokens.

    `model(idx, cache=cache)` appends to it. `n` columns are in use; `real` (B, S) tells tokens from padding and `pos`
    (B, S) holds their positions. `keep` drops or repeats rows: finished prompts leave, one prefill serves many samples.
    """

    def __init__(self, config, batch, length, device=None, dtype=None):
        shape = config.n_layer, batch, config.n_kv_head, length, config.head_dim
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.last_key = self.k[:, :, :, :1].clone()  # for smear_keys: the newest key before smearing
        self.real = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.pos = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.n, self.padded = 0, False

    def open(self, mask, size):
        """Opens `size` columns, real tokens where `mask` (B, size) says so (None: all); returns positions (B, size)."""
        start, self.n = self.n, self.n + size
        if self.n > self.real.shape[1]:
            raise ValueError(f"the cache holds {self.real.shape[1]} tokens, {self.n} are needed")
        self.padded = self.padded or mask is not None and not bool(mask.all())
        self.real[:, start : self.n] = True if mask is None else mask
        self.pos[:, start : self.n] = (self.real[:, : self.n].cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.pos[:, start : self.n]

    def append(self, layer, k, v):
        """Stores (B, H, T, D) keys and values of one layer in the newest columns; returns all so far, (B, H, S, D)."""
        start = self.n - k.shape[2]
        self.k[layer, :, :, start : self.n], self.v[layer, :, :, start : self.n] = k, v
        return self.k[layer, :, :, : self.n], self.v[layer, :, :, : self.n]

    def part(self, rows, first):
        """The cache of the batch rows in a slice, its columns counted from `first`; what it takes in is kept here."""
        view = copy.copy(self)
        view.k, view.v, view.last_key = self.k[:, rows, :, first:], self.v[:, rows, :, first:], self.last_key[:, rows]
        view.real, view.pos = self.real[rows, first:], self.pos[rows, first:]
        return view

    def keep(self, rows):
        """Selects batch rows (indices, repeats allowed), in place; returns the cache."""
        self.k, self.v, self.last_key = self.k[:, rows], self.v[:, rows], self.last_key[:, rows]
        self.real, self.pos = self.real[rows], self.pos[rows]
        return self


def visible(q_pos, k_pos, window=0, real=None, docs=None):
    """Which keys each query may attend to, bool (B|1, 1, T, S), from positions (B|1, T) and (B|1, S).

    `window`: at most so many positions back (0: all). `real` (B, S): padding is hidden from all but itself, so that no
    row of the softmax is empty. `docs` (B, S): only keys of the query's own document.
    """
    see = k_pos[:, None, :] <= q_pos[:, :, None]
    if window:
        see = see & (k_pos[:, None, :] > q_pos[:, :, None] - window)
    if docs is not None:
        see = see & (docs[:, None, :] == docs[:, :, None])
    if real is not None:
        T, S = q_pos.shape[1], k_pos.shape[1]
        see = see & real[:, None, :] | torch.eye(S, dtype=torch.bool, device=real.device)[S - T :]
    return see[:, None]


# ------------------------------------------------------------------------------------------------------------- model


class Linear(nn.Linear):
    """nn.Linear; for the few rows of a decoding step W stands on the left, in blocks, a fifth faster on a CPU."""

    def forward(self, x):
        n, (N, K) = x.numel() // x.shape[-1], self.weight.shape
        if self.bias is not None or not 1 < n <= 32 or not x.is_cpu:
            return super().forward(x)
        W = self.weight.view(-1, N if N % 2048 else 2048, K)
        return torch.bmm(W, x.reshape(n, K).t().expand(len(W), K, n)).view(N, n).t().reshape(*x.shape[:-1], N)


class Attention(nn.Module):
    """Causal multi-head attention. Sites: `pattern` (B, H, T, S), `z` (B, T, H, D), `out` (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, dim = config.n_head, config.head_dim
        self.qkv = Linear(config.n_embd, (heads + 2 * config.n_kv_head) * dim, bias=config.qkv_bias)
        self.proj = Linear(heads * dim, config.n_embd, bias=config.attn_bias)
        self.q_norm, self.k_norm = (make_norm(config, dim) if config.qk_norm else nn.Identity() for _ in range(2))
        self.post_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        self.smear = nn.Parameter(torch.zeros(config.n_kv_head, 1, 1)) if config.smear_keys else None
        self.pattern, self.z, self.out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x, rotary, see, joined, cache):
        c, (B, T, _) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k, v = qkv.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=1)  # (B, heads, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.smear is not None:
            first = cache.last_key[self.layer] if cache is not None else torch.zeros_like(k[:, :, :1])
            before = torch.cat((first, k[:, :, :-1]), dim=2)
            if cache is not None:
                cache.last_key[self.layer] = k[:, :, -1:]
            keep = torch.sigmoid(self.smear)
            k = keep * k + (1 - keep) * (before if joined is None else before * joined)
        if not c.learned_pos:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if c.attn_softcap or self.pattern._forward_hooks:
            z = self.attend(q, k, v, see)
        else:
            if T == 1:  # the queries that share a key as rows of one product
                q = q.reshape(B, c.n_kv_head, -1, c.head_dim)
            gqa, causal = q.shape[1] != k.shape[1], see is None and T > 1
            z = F.scaled_dot_product_attention(q, k, v, see, is_causal=causal, scale=c.attn_scale, enable_gqa=gqa)
            z = z.reshape(B, c.n_head, T, c.head_dim)
        z = self.z(z.transpose(1, 2))
        return self.out(self.post_norm(self.proj(z.reshape(B, T, -1))))

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
    """Two layers, plain or gated (gate and up in one matrix). Sites: `act` (B, T, d_mlp), `out` (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up = Linear(config.n_embd, config.d_mlp * (2 if config.gated else 1), bias=config.mlp_bias)
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
    """One layer: attention and MLP, each reading a norm of the residual stream and adding to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel
        self.norm1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config, config.n_embd) if config.parallel != "one_norm" else nn.Identity()
        self.mlp = MLP(config)
        self.resid_pre, self.resid_post = nn.Identity(), nn.Identity()

    def forward(self, x, rotary, see, joined, cache):
        h = self.norm1(x := self.resid_pre(x))
        a = self.attn(h, rotary, see, joined, cache)
        if self.parallel:
            x = x + a + self.mlp(h if self.parallel == "one_norm" else self.norm2(x))
        else:
            x = x + a
            x = x + self.mlp(self.norm2(x))
        return self.resid_post(x)


class GPT(nn.Module):
    """A decoder-only language model. `model(idx)` gives logits, `model.loss(idx, targets)` the training loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.learned_pos else None
        self.embed = nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final = make_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal of std sqrt(2 / 5C), smaller where a block adds to the stream, whose size then keeps with depth."""
        std = math.sqrt(2 / (5 * self.config.n_embd))
        proj_std = self.config.proj_std or std / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0, proj_std if name.endswith(("attn.proj.weight", "mlp.down.weight")) else std)
            elif name.endswith("bias"):
                p.zero_()

    def forward(self, idx, targets=None, weights=None, denom=None, mask=None, docs=None, cache=None):
        """Logits (B, T, V) of token ids `idx` (B, T) int64; with `targets`, the loss (see `loss`).

        mask   (B, T) bool, True at real tokens, for left- or right-padded batches; positions count real tokens only
        docs   (B, T) document numbers of a packed batch: attention stays inside a document
        cache  a `KVCache` to continue; `idx` and `mask` are then the new tokens only
        """
        h = self.hidden(idx, mask, docs, cache)
        if targets is None:
            return self.unembed(h)
        return weighted_cross_entropy(self, h, targets, weights, denom)

    def hidden(self, idx, mask=None, docs=None, cache=None):
        """The normed residual stream (B, T, C) that the unembedding reads."""
        c, T = self.config, idx.shape[1]
        start = 0 if cache is None else cache.n
        if start + T > c.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {c.block_size}")
        real = mask
        if cache is not None:
            q_pos = cache.open(mask, T)
            k_pos, real = cache.pos[:, : cache.n], cache.real[:, : cache.n] if cache.padded else None
        elif mask is not None:
            q_pos = k_pos = (mask.cumsum(1) - 1).clamp(min=0)
        else:
            q_pos = k_pos = torch.arange(T, device=idx.device)[None]
        if real is None:
            q_pos, k_pos = q_pos[:1], k_pos[:1]  # the same for every row
        # what each layer may see; None is plain causal attention, which needs no mask
        S, windows = start + T, c.windows or [0] * c.n_layer
        plain = real is None and docs is None and (start == 0 or T == 1)
        see = {w: None if plain and not 0 < w < S else visible(q_pos, k_pos, w, real, docs) for w in set(windows)}
        rotary = {w: None if c.learned_pos else rope(c, q_pos, local=w > 0) for w in set(windows)}
        joined = self.joined(mask, docs) if c.smear_keys else None

        x = self.wte(idx)
        if c.embed_scale != 1.0:
            x = x * torch.tensor(c.embed_scale, dtype=x.dtype)
        if c.learned_pos:
            x = x + self.wpe(q_pos)
        x = self.embed(x)
        for window, block in zip(windows, self.blocks):
            x = block(x, rotary[window], see[window], joined, cache)
        return self.final(x)

    @staticmethod
    def joined(mask, docs):
        """(B, 1, T, 1): 1 where a token's predecessor is real and of the same document; None if that is everywhere."""
        if mask is None and docs is None:
            return None
        ok = torch.ones_like(mask if docs is None else docs, dtype=torch.bool)
        if mask is not None:
            ok[:, 1:] &= mask[:, :-1]
        if docs is not None:
            ok[:, 1:] &= docs[:, 1:] == docs[:, :-1]
        return ok[:, None, :, None]

    def unembed(self, h):
        """Logits of normed residual vectors h (..., C), with the config's scale and soft-cap."""
        logits, cap = self.head(h), self.config.logit_softcap
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, idx, targets, weights=None, denom=None, **kwargs):
        """Mean cross-entropy in nats over the positions that count: sum(weights * loss) / denom.

        targets  (B, T) token ids; -100 counts nothing
        weights  (B, T), default 1; positions of weight 0 never reach the unembedding
        denom    default sum(weights), at least 1; give the sum over all micro-batches and ranks to accumulate exactly
        """
        return self(idx, targets, weights, denom, **kwargs)

    @torch.no_grad()
    def token_loss(self, idx, targets, **kwargs):
        """Cross-entropy (B, T) of every target in nats, without gradient; 0 where the target is -100."""
        h = self.hidden(idx, **kwargs)
        rows = (F.cross_entropy(self.unembed(row).float(), t, reduction="none") for row, t in zip(h, targets))
        return torch.stack(list(rows))

    # ------------------------------------------------------------------------------------------------------- sites

    def site(self, name):
        """The submodule whose output is the site `name`; KeyError naming the nearest ones if there is none."""
        names = ["embed", "final"] + [f"blocks.{i}.{s}" for i in range(self.config.n_layer) for s in SITES]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:6]
            raise KeyError(f"no site {name!r} in a model of {self.config.n_layer} layers; near: {', '.join(near)}")
        return self.get_submodule(name)

    @contextmanager
    def patch(self, functions):
        """Inside `with model.patch({site: fn}):` forward passes go on with `fn(tensor)` in place of the tensor."""
        modules = [self.site(name) for name in functions]
        hook = lambda fn: lambda _, __, out: fn(out)
        handles = [m.register_forward_hook(hook(fn)) for m, fn in zip(modules, functions.values())]
        try:
            with self.eager():  # compiled code does not look for hooks
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def eager(self):
        """A context in which blocks that were compiled run uncompiled: for hooks, and for inputs of many shapes."""
        compiled = any(block._compiled_call_impl for block in self.blocks)
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def capture(self, idx, sites, mask=None, **kwargs):
        """Runs the model up to the unembedding; returns {site: tensor}. Patches in force show in what is captured."""
        acts = {}
        with self.patch({name: lambda x, name=name: acts.__setitem__(name, x) for name in sites}):
            self.hidden(idx, mask, **kwargs)
        return acts


SITES = "resid_pre", "attn.pattern", "attn.z", "attn.out", "mlp.act", "mlp.out", "resid_post"

# -------------------------------------------------------------------------------------------------------------- loss


def weighted_cross_entropy(model, h, targets, weights=None, denom=None):
    """sum(weights * cross-entropy) / denom of hidden states h (B, T, C); rows without weight are dropped first."""
    counts = targets != -100 if weights is None else (targets != -100) & (weights > 0)
    rows = counts.flatten().nonzero().squeeze(1)  # the gather: what has no weight is never unembedded
    h, targets = h.flatten(0, 1)[rows], targets.flatten()[rows]
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights.flatten()[rows].float()
    denom = weights.sum().clamp(min=1.0) if denom is None else denom
    return SlicedCrossEntropy.apply(
        h, model.head.weight, targets, weights / denom, model.config, torch.is_grad_enabled()
    )


class SlicedCrossEntropy(torch.autograd.Function):
    """sum_i w_i * -log softmax(f(h_i W^T))[y_i], a slice of rows at a time, gradients taken on the way.

    The gradient of cross-entropy with respect to the logits is softmax - onehot: known once the logits are. So each
    slice of logits is turned into its gradient in place and multiplied out while it is still in the processor's cache,
    and nothing of size V outlives its slice. Used by `loss`; differentiable once.
    """

    @staticmethod
    def forward(ctx, h, W, targets, w, config, train):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        total = torch.zeros((), device=h.device)
        grad_h = torch.empty_like(h) if train else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if train else None
        with torch.autocast(device, enabled=False):
            low = W.to(dtype)
            step = max(64, (2**27 if device == "cuda" else 2**21) // W.shape[0])  # rows of logits at once
            for i in range(0, len(h), step):
                part, y, wi = h[i : i + step].to(dtype), targets[i : i + step, None], w[i : i + step, None]
                logits = (part @ low.T).float().mul_(config.logit_scale)
                if config.logit_softcap:
                    logits = torch.tanh(logits.div_(config.logit_softcap)).mul_(config.logit_softcap)
                capped = logits.clone() if config.logit_softcap and train else None
                lse = logits.logsumexp(1, keepdim=True)
                total += ((lse - logits.gather(1, y)) * wi).sum()
                if train:
                    grad = logits.sub_(lse).exp_().scatter_add_(1, y, -torch.ones_like(lse))
                    grad.mul_(wi * config.logit_scale)
                    if capped is not None:  # d cap*tanh(x/cap) / dx = 1 - (capped/cap)^2
                        grad.mul_(1 - (capped / config.logit_softcap) ** 2)
                    grad = grad.to(dtype)
                    grad_h[i : i + step] = grad @ low
                    grad_W += grad.T @ part
        ctx.save_for_backward(grad_h, grad_W)
        ctx.dtype = W.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_h, grad_W = ctx.saved_tensors
        return grad_h * upstream, (grad_W * upstream).to(ctx.dtype), None, None, None, None


# ---------------------------------------------------------------------------------------------------------- generate


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), seed=None, process=None):
    """Continues every prompt; returns the new ids of each, a list of lists.

    prompts      list of non-empty id lists of any lengths
    temperature  0 is greedy: the same ids as one prompt at a time, or without a cache
    top_k/top_p  sample among the k likeliest tokens / the fewest that hold this much probability
    stop         ids that end a row; the stopping id is the row's last. Finished rows leave the batch
    process      process(logits, alive, out) -> logits (B, V) float32, called before each sampling: masks, penalties.
                 alive: the number of the prompt behind each row; out: the new ids so far of every prompt, to be read
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    device, longest = model.wte.weight.device, max(map(len, prompts))
    if longest + max_new_tokens > model.config.block_size:
        limit = f"block_size {model.config.block_size}"
        raise ValueError(f"{longest} prompt + {max_new_tokens} new tokens do not fit {limit}")
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device, model.wte.weight.dtype)
    idx, out = None, [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the prompt behind each row of the batch
    for step in range(max_new_tokens):
        with model.eager():  # the cache grows: compiled blocks would be compiled again and again
            h = model.hidden(idx, cache=cache)[:, -1] if step else prefill(model, prompts, cache)
        logits = model.unembed(h).float()
        idx = sample(process(logits, alive, out) if process else logits, temperature, top_k, top_p, rng)
        done = torch.isin(idx, stops)[:, 0].tolist()
        for row, token in zip(alive, idx[:, 0].tolist()):
            out[row].append(token)
        if all(done):
            break
        if any(done):
            rows = [i for i, finished in enumerate(done) if not finished]
            alive, idx = [alive[i] for i in rows], idx[rows]
            cache.keep(rows)
    return out


def prefill(model, prompts, cache):
    """Takes prompts into the cache, those of like length together: little is spent on padding.

    Returns the hidden states (B, C) that unembed to the next tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest, h, start, device = len(prompts[order[0]]), [], 0, cache.k.device
    enough = 2048 if device.type == "cuda" else 128  # tokens that keep the device busy: smaller groups gain nothing
    for end in range(1, len(order) + 1):
        T = len(prompts[order[start]])
        if end == len(order) or len(prompts[order[end]]) < 0.8 * T and (end - start) * T >= enough:
            rows = (prompts[i] for i in order[start:end])
            idx = torch.tensor([[-1] * (T - len(p)) + list(p) for p in rows], device=device)
            part = cache.part(slice(start, end), longest - T)  # padded on the left, so that all rows end together
            h.append(model.hidden(idx.clamp(min=0), idx >= 0, cache=part)[:, -1])
            start = end
    cache.n, cache.padded, h = longest, len(prompts[order[-1]]) < longest, torch.cat(h)
    if not cache.padded:
        return h
    back = sorted(range(len(order)), key=lambda i: order[i])  # rows in the order of the prompts again
    cache.keep(back)
    return h[back]


def sample(logits, temperature=1.0, top_k=None, top_p=None, rng=None):
    """One token id for each row of logits (B, V), as (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        out = p.cumsum(-1) - p >= top_p  # the mass before it is enough
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=rng)
