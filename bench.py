"""Our speed beside what people would use instead: one process, equal inputs, equal results.

    python bench.py [mask train] [--device cuda]        # a table, and out/bench.json

Each comparison checks first that both sides give the same. Then they are timed in turns, in random
order, and a row shows the median of their ratios with its quartiles: a busy machine shifts both
sides alike. A peer is written here as plainly as people write it, or is an installed library; one
that is missing is left out by name.
"""

import argparse
import gc
import importlib.util
import json
import random
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import grammar_mask as gm
import model as gpt
import pretrained
from model import GPT, GPTConfig

# ------------------------------------------------------------------------------------------ timing


def seconds(f, device, repeat=1):
    """The time of one call of f."""
    began = time.perf_counter()
    for _ in range(repeat):
        f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeat


def row(what, ours, peers, device, same=None, rounds=15):
    """Compares `ours` with every peer {name: function of no arguments}: a list of table rows.

    same  same(our result, the peer's) -> bool, or None where there is nothing to compare
    """
    contenders = {"ours": ours} | peers
    results = {name: f() for name, f in contenders.items()}
    for name in peers:
        if same is not None and not same(results["ours"], results[name]):
            raise AssertionError(f"{what}: {name} gives something else")
    once = {name: seconds(f, device) for name, f in contenders.items()}
    affordable = int(20 / sum(once.values()))  # rounds in 20 seconds
    rounds = min(rounds, max(5, affordable))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            repeat = 1 + int(0.02 / once[name])  # 20 ms a turn
            times[name].append(seconds(contenders[name], device, repeat))
    return [ratio_row(what, name, times["ours"], times[name]) for name in peers]


def ratio_row(what, peer, ours, theirs, scale=1e3):
    """A row of the table from the seconds of two sides, turn by turn; shown in ms (1e3)."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    times = {"ours_ms": scale * np.median(ours), "peer_ms": scale * np.median(theirs)}
    return {"what": what, "peer": peer} | times | {"ratio": ratio, "quartiles": [low, high]}


def close(a, b, atol=1e-4):
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(a, b, atol=atol, rtol=1e-3)


def installed(*packages):
    """Whether packages can be imported; says so if one can't."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            print(f"{package} is left out: {error}")
            return False
    return True


def packaged(model):
    """The path of a model that comes as a package; None, with a word, if it is missing."""
    try:
        return pretrained.find(model)
    except ImportError as error:
        print(f"{model} is left out: {error}")
        return None


# ------------------------------------------------------------------------------------- hapax: mask


def set_of_pairs(x):
    """The mask of Hapax by a set of the pairs seen so far, a row at a time."""
    out = np.zeros((len(x), x.shape[1] - 1), bool)
    for i, tokens in enumerate(x.tolist()):
        seen = set()
        for t, pair in enumerate(zip(tokens, tokens[1:])):
            out[i, t] = pair in seen
            seen.add(pair)
    return out


def stable_argsort(x):
    """The same by a stable argsort of the pairs in torch."""
    pair = torch.from_numpy(x[:, :-1] * 2**18 + x[:, 1:])
    order = pair.argsort(dim=1, stable=True)
    value = pair.gather(1, order)
    again = F.pad(value[:, 1:] == value[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter_(1, order, again).numpy()


def mask(device):
    """The mask of Hapax on one thread, against a Python set and a stable argsort."""
    import train_hapax

    torch.set_num_threads(1)
    text = "".join(data.load_text())
    ids = np.array(data.get_tokenizer("bpe:4096", text).encode(text))
    rows = []
    for B, T in (64, 2048), (16, 128):
        x = data.windows(ids, np.random.default_rng(0), B, T + 1)
        peers = {
            "Python set": partial(set_of_pairs, x),
            "stable argsort": partial(stable_argsort, x),
        }
        ours = partial(train_hapax.repeated, x)
        rows += row(f"mask, {B} x {T}", ours, peers, device, np.array_equal, 9)
    return rows


# ------------------------------------------------------------------------------------------- train


class PlainBlock(nn.Module):
    """A block as people write it after reading nanoGPT, with rotary positions."""

    def __init__(self, C, H):
        super().__init__()
        self.H, self.ln1, self.ln2 = H, nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def turn(self, x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln1(x)).view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln2(x))))


class PlainGPT(nn.Module):
    """The peer: fused qkv, scaled_dot_product_attention, cross-entropy on all logits."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.ln = nn.Embedding(c.vocab_size, c.n_embd), nn.LayerNorm(c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        slow = 10000 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.arange(c.block_size)[:, None] / slow
        self.register_buffer("cos", torch.cat((angle, angle), 1).cos())
        self.register_buffer("sin", torch.cat((angle, angle), 1).sin())

    def forward(self, idx, targets):
        x, T = self.wte(idx), idx.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.ln(x)).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def plain_copy(ours):
    """A plain GPT with our weights, so that both compute the same loss."""
    state = ours.state_dict()
    names = {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "c_attn", "attn.proj": "c_proj"}
    names |= {"mlp.up": "c_fc", "mlp.down": "c_out", "final": "ln"}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    plain = PlainGPT(ours.config).to(ours.wte.weight.device)
    plain.load_state_dict(state, strict=False)
    return plain


def training_step(model, idx, env):
    """A function that does one step (forward, loss, backward, clip, AdamW) and returns the loss."""
    opt = common.optimizer(model, SimpleNamespace(lr=1e-4, weight_decay=0.1))

    def step():
        with env.autocast():
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product on this machine, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def train(device):
    """A training step of 6 x 384, context 256, vocabulary 4096, batch 16, against a plain GPT."""
    c = GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_embd=384)
    idx = torch.randint(4096, (16, 257), device=device)
    matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    # 2 FLOPs a weight forward, 4 backward; attention's 12 L C T are halved, as it is causal
    flops = 16 * 256 * (6 * matrices + 6 * c.n_layer * c.n_embd * 256)
    rows = []
    for dtype in torch.float32, torch.bfloat16:
        peak = matmul_peak(device, dtype)
        for compiled in False, True:
            torch.manual_seed(0)
            ours = GPT(c).to(device)
            plain = plain_copy(ours)
            if compiled:
                for block in [*ours.blocks, *plain.blocks]:
                    block.compile()
            env = common.Env(device, dtype)
            what = f"train, {str(dtype)[6:]}, {'compiled' if compiled else 'eager'}"
            peer = {"plain GPT": training_step(plain, idx, env)}
            found = row(what, training_step(ours, idx, env), peer, device, close)
            found[0]["tokens_per_s"] = 16 * 256e3 / found[0]["ours_ms"]
            found[0]["share_of_peak"] = flops * 1e3 / found[0]["ours_ms"] / peak
            rows += found
    return rows


# ---------------------------------------------------------------------------------------- generate


def generate(device):
    """SmolLM2-135M, fp32: 64 greedy tokens after 16 prompts of 8 to 128; loading it from GGUF."""
    if not installed("transformers"):
        return []
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = "smollm2-135m-instruct"
    path = packaged(name)
    if path is None:
        return []
    read = {"gguf_file": path.name, "dtype": torch.float32}
    model, tokenizer = pretrained.load(name, device, "fp32")
    peer = AutoModelForCausalLM.from_pretrained(path.parent, **read).to(device)
    text = tokenizer.encode(next(data.load_text()))
    rng = random.Random(0)
    starts = rng.sample(range(len(text) - 128), 16)
    prompts = [text[i : i + rng.randint(8, 128)] for i in starts]
    idx, real = gpt.padded(prompts, device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 64}

    def theirs():
        out = peer.generate(idx, attention_mask=real.long(), **options)
        return out[:, idx.shape[1] :].tolist()

    ours = partial(gpt.generate, model, prompts, 64, 0.0)
    rows = row("generate, 16 x 64", ours, {"transformers": theirs}, device, list.__eq__, 3)
    load = partial(pretrained.load, name, device, "fp32")
    peers = {"transformers": partial(AutoModelForCausalLM.from_pretrained, path.parent, **read)}
    return rows + row("load from GGUF", load, peers, device, None, 2)


# ---------------------------------------------------------------------------------------- patching


def put(column, value, x):
    """x (B, T, C) with `value` (B, C) in one column."""
    x = x.clone()
    x[:, column] = value
    return x


def add(vector, x):
    """x (B, T, C) with a vector added in the last column."""
    return torch.cat((x[:, :-1], x[:, -1:] + vector), 1)


@torch.no_grad()
def forward_per_patch(model, idx, interventions):
    """The last position under each intervention, a whole forward pass for each: (B, V, C)."""
    out = []
    for functions in interventions:
        sites = {f"blocks.{j}.resid_post" if j >= 0 else "embed": f for j, f in functions.items()}
        with model.patch(sites):
            out.append(model.hidden(idx)[:, -1])
    return torch.stack(out, 1)


def patching(device):
    """Patches at every layer of 12 x 384, 2 prompts of 100 tokens, in one pass: `model.sweep`.

    The peer is the loop that hook libraries run, without their own overhead, on the same model; for
    the last position also such a library itself.
    """
    torch.manual_seed(0)
    c = GPTConfig(vocab_size=4096, block_size=128, n_layer=12, n_head=6, n_embd=384)
    model = GPT(c).to(device).eval()
    idx = torch.randint(4096, (2, 100), device=device)
    z = torch.randn(13, 2, 384, device=device)
    tail, layers = 8, range(-1, 12)
    hold = [{i: partial(put, -tail, z[i + 1]) for i in range(j, 12)} for j in layers]
    jobs = {
        "last position, 13 layers": (1, [{j: partial(put, -1, z[j + 1])} for j in layers]),
        "a word held, 13 layers": (tail, hold),
        "steering, 12 layers x 4": (
            1,
            [{j: partial(add, s * z[j, 0])} for j in range(12) for s in (-1.0, 1.0, 2.0, 4.0)],
        ),
    }
    rows = []
    for what, (width, interventions) in jobs.items():

        def ours(width=width, interventions=interventions):
            return gpt.sweep(model, idx, interventions, width)[:, :, -1]

        peers = {"forward per patch": partial(forward_per_patch, model, idx, interventions)}
        if what.startswith("last"):
            if installed("nnsight"):
                peers["nnsight"] = partial(with_nnsight, model, idx, z)
        rows += row(f"patch, {what}", ours, peers, device, close, 5)
    return rows


@torch.no_grad()
def with_nnsight(model, idx, z):
    """The last position, patched behind every block, a trace of our model for each."""
    from nnsight import NNsight

    wrapped, out = NNsight(model), []
    for j in range(-1, model.config.n_layer):
        with wrapped.trace(idx):
            site = wrapped.blocks[j].resid_post if j >= 0 else wrapped.embed
            site.output[:, -1] = z[j + 1]
            h = wrapped.final.output[:, -1].save()
        out.append(h)
    return torch.stack(out, 1)


# --------------------------------------------------------------------------------------------- lzw


def of_each(function, parts):
    """What a function gives for each part; the Rust package gives more things beside it."""
    results = [function(part) for part in parts]
    return [result[0] if isinstance(result, tuple) else result for result in results]


def lzw(device):
    """The LZW tokenizer of zip2zip on one thread, against the paper's own package in Rust."""
    if not installed("zip2zip_compression"):
        return []
    from zip2zip_compression import LZWCompressor

    from lzw_tokenizer import LZW

    text = "".join(data.load_text())[:200_000]
    code = data.get_tokenizer("bpe:4096", text).encode(text)[:40_000]
    noise = np.random.default_rng(0).integers(1, 50, 40_000).tolist()
    V, rows = 32011, []  # as many as Phi-3.5's tokenizer has
    for name, ids, W, M in (
        ("code", code, 1024, 3),
        ("code", code, 2048, 4),
        ("noise", noise, 1024, 3),
    ):
        ours, rust = LZW(V, W, M, [0]), LZWCompressor(V, W, M, 0, [0])
        parts = [ids[i : i + W] for i in range(0, len(ids), W)]
        codes = [ours.encode(part) for part in parts]
        for what, work in ("encode", parts), ("decode", codes):
            mine, theirs = getattr(ours, what), getattr(rust, what)
            peer = {"zip2zip-compression": partial(of_each, theirs, work)}
            what = f"{what} {name}, {W} ids, M={M}"
            rows += row(what, partial(of_each, mine, work), peer, device, list.__eq__, 9)
    return rows


# -------------------------------------------------------------------------------------------- grpo


def grpo(device):
    """The toy of countdown_rl.py: rollouts, a step of GRPO, and heads switched off."""
    import countdown_rl as script

    args = script.Args(**script.Args.presets["toy"])
    world = script.Toy(args, 0)
    model = script.ToyGPT(args, world, 0).to(device)
    rng = random.Random(0)
    problems = world.train[:: len(world.train) // args.prompts][: args.prompts]
    prompts = [world.prompt(*problem, rng) for problem in problems]
    size = f"{len(prompts)} x {args.group} x {world.max_new}"
    rows = []
    if installed("transformers"):
        peer = llama_copy(model)
        idx = torch.tensor(prompts, device=device)
        assert close(peer(idx).logits, model(idx))
        options = dict(do_sample=True, top_k=0, num_return_sequences=args.group)
        options |= dict(pad_token_id=0, max_new_tokens=world.max_new)
        options |= dict(attention_mask=torch.ones_like(idx))
        for what, stops in ("rollouts", []), ("rollouts that end by chance", world.stops):
            theirs = partial(peer.generate, idx, eos_token_id=stops or None, **options)
            ours = partial(gpt.generate, model, prompts, world.max_new, stop=stops)
            ours = partial(ours, samples=args.group)
            rows += row(f"{what}, {size}", ours, {"transformers": theirs}, device, None, 5)
        if installed("trl"):
            theirs = trl_step(args, world, prompts, peer, device)
            ours = partial(grpo_step, script, args, world, model, prompts, device)
            rows += row(f"GRPO step, {size}", ours, {"trl": theirs}, device, None, 5)
    traces = [(p, *world.written(*p, rng)) for p in world.train[::4]]
    traces = script.find_traces(world, traces, rng)
    traces.sort(key=lambda trace: len(trace.ids))
    prefixes = [trace.ids for trace in traces]
    prefixes += sorted([trace.ids[: trace.wrong + 1] for trace in traces], key=len)
    heads = [[(layer, head)] for layer in range(args.n_layer) for head in range(args.n_head)]
    neurons = [(args.n_layer - 1, 0)]
    with torch.no_grad():
        ours = partial(script.switch_off, model, world, traces, neurons, heads)
        theirs = partial(heads_one_by_one, model, world, prefixes, heads)
        peers = {"as the paper's code": theirs}
        what = f"heads off, {len(heads)} x {len(prefixes)}"
        return rows + row(what, ours, peers, device, same_verdicts, 3)


def llama_copy(model):
    """A Llama-shaped GPT as transformers' Llama, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    shape = {theirs: getattr(c, ours) for ours, theirs in pretrained.SIZES["llama"].items()}
    shape |= {"hidden_act": c.act, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie}
    state = {}
    for name, p in model.named_parameters():
        names = pretrained.names_of(pretrained.NAMES["llama"], name)
        rows = pretrained.rows_of(c, p, len(names))
        state |= dict(zip(names, p.detach().split(rows)))
    peer = LlamaForCausalLM(LlamaConfig(**shape, rope_theta=c.rope_base))
    peer.load_state_dict(state)
    return peer.to(p.device).eval()


def grpo_step(script, args, world, model, prompts, device):
    """Rollouts, random rewards, and an update."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    responses = gpt.generate(model, prompts, world.max_new, stop=world.stops, samples=args.group)
    documents = [prompt for prompt in prompts for _ in range(args.group)]
    batch = script.collate([script.counted(*both) for both in zip(documents, responses)])
    batch["advantage"] = script.advantages(torch.rand(len(responses)), args.group)
    part = script.minibatch(batch, args, 0, 0)
    common.backward(script.Objective(model, args), part, args, common.Env(device, torch.float32))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()


def trl_step(args, world, prompts, peer, device):
    """The same by TRL: a function that trains `peer` for a step."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {word.replace("\n", "<nl>"): i for word, i in world.id.items()}
    backend = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<bos>"
    )
    options = dict(max_steps=1, learning_rate=1e-5, beta=0.0, bf16=False, report_to=[])
    options |= dict(per_device_train_batch_size=args.group * len(prompts), disable_tqdm=True)
    options |= dict(num_generations=args.group, max_completion_length=world.max_new)
    options |= dict(save_strategy="no", logging_strategy="no", use_cpu=device.type == "cpu")
    texts = datasets.Dataset.from_dict({"prompt": [world.decode(prompt) for prompt in prompts]})

    def noise(completions, **_):
        return [random.random() for _ in completions]

    config = GRPOConfig(output_dir=tempfile.mkdtemp(), **options)
    trainer = GRPOTrainer(
        peer, reward_funcs=noise, args=config, train_dataset=texts, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train


@torch.no_grad()
def heads_one_by_one(model, world, prefixes, heads):
    """As the paper's code: a set of heads and four prefixes a pass, every head's output in full."""
    c = model.config
    found = []
    for ((layer, head),) in heads:
        kept = {}

        def keep(z, kept=kept):
            kept["z"] = z

        def without(_, kept=kept, layer=layer, head=head):
            proj = model.blocks[layer].attn.proj.weight.T.view(c.n_head, -1, c.n_embd)
            each = torch.einsum("bthd,hdc->bthc", kept["z"], proj)
            each[:, :, head] = 0
            return each.sum(2)

        said = []
        for i in range(0, len(prefixes), 4):
            idx, mask = gpt.padded(prefixes[i : i + 4], model.wte.weight.device)
            with model.patch({f"blocks.{layer}.attn.z": keep, f"blocks.{layer}.attn.out": without}):
                said += model(idx, mask=mask)[:, -1].argmax(-1).tolist()
        valid = [token in world.valid for token in said]
        right, wrong = np.mean(np.reshape(valid, (2, -1)), 1)
        found.append({"says_valid": right, "false_accepts": wrong})
    return found


def same_verdicts(ours, theirs):
    """Whether as many attempts, right and wrong, are called valid, with each set of heads off."""
    return all(a[key] == b[key] for a, b in zip(ours, theirs) for key in b)


# --------------------------------------------------------------------------------------------- sae


def dense_step(sae, x):
    """The loss of a TopK SAE (batch: of a crosscoder) as people write it, and its gradients."""
    sae.zero_grad()
    pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    if sae.batch:
        code = pre.relu() * (pre >= pre.flatten().topk(sae.k * len(x)).values[-1])
    else:
        values, latents = pre.topk(sae.k)
        code = torch.zeros_like(pre).scatter(1, latents, values.relu())
    (x - code @ sae.W_dec - sae.b_dec).square().sum().backward()
    return torch.cat([sae.W_enc.grad, sae.W_dec.grad])


def sparse_step(sae, x):
    """The same by our sparse backward."""
    sae.zero_grad()
    sae.silent.zero_()
    sae(None, x, 1.0).backward()
    return torch.cat([sae.W_enc.grad, sae.W_dec.grad])


def lens_step(peer, batch):
    """The same by sae-lens."""
    peer.zero_grad()
    loss = peer.training_forward_pass(batch).loss * len(batch.sae_in)  # a mean over rows
    loss.backward()
    return torch.cat([peer.W_enc.grad.T, peer.W_dec.grad])


def lens_peer(sae, x):
    """A TopK SAE of sae-lens with our weights, and its batch."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    m, d = sae.W_enc.shape
    shape = dict(d_in=d, d_sae=m, k=sae.k, decoder_init_norm=1.0)
    shape |= dict(rescale_acts_by_decoder_norm=False, device=str(x.device))
    peer = TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
    with torch.no_grad():
        peer.W_enc.copy_(sae.W_enc.T)
        peer.W_dec.copy_(sae.W_dec)
    return peer, TrainStepInput(x, {}, torch.zeros(m, dtype=torch.bool, device=x.device), 0, False)


def integrated_gradients(sae, sentences, w):
    """Attribution by ten gradients a sentence, one sentence at a time, as the paper's code does."""
    total = torch.zeros(len(sae.W_enc), device=w.device)
    for sentence in sentences:
        f = sae.encode(sentence)
        rest = sentence - sae.decode(f)
        for step in range(10):
            part = (f * step / 10).requires_grad_()
            logit = ((sae.decode(part) + step / 10 * rest).sum(0) * w).sum()
            total += (torch.autograd.grad(logit, part)[0] / 10 * f).sum(0)
    return total


def sae(device):
    """A TopK step (256 wide, 4096 latents, k 32, 2048 rows); attribution in closed form."""
    from sae import SAE, attribution

    torch.manual_seed(0)
    code = SAE(256, 4096, 32).to(device)
    x = torch.randn(2048, 256, device=device)
    x /= x.square().sum(1).mean().sqrt()
    peers = {"dense": partial(dense_step, code, x)}
    if installed("sae_lens"):
        peers["sae-lens"] = partial(lens_step, *lens_peer(code, x))
    rows = row("sae: TopK step", partial(sparse_step, code, x), peers, device, close)
    code.requires_grad_(False)
    w = torch.randn(256, device=device)

    sums = partial(close, atol=1e-3)  # of thousands of terms

    def closed():
        return attribution(code.encode(x), None, code.decoder(), w)

    peers = {"integrated": partial(integrated_gradients, code, x.view(64, 32, 256), w)}
    return rows + row("sae: attribution, 64 x 32", closed, peers, device, sums, 5)


# -------------------------------------------------------------------------------------- crosscoder


def released_attribution(base, ft, code, layer, idx, targets):
    """What the released code does: every position encoded, gradients of the whole network."""
    from crosscoder import FT, attribution, log_p

    site, kept = f"blocks.{layer}.resid_post", []
    with torch.no_grad():
        h_base = base.capture(idx, [site])[site]
    ft.requires_grad_(True)
    with ft.patch({site: kept.append}):
        logits = ft(idx)
    kept[0].retain_grad()
    log_p(logits[:, -1], targets).sum().backward()
    ft.zero_grad()
    ft.requires_grad_(False)
    with torch.no_grad():
        f = code.encode(torch.cat((h_base, kept[0]), 2))
        return attribution(f, code.decoder(FT), kept[0].grad)[:, -1]


def crosscoder(device):
    """Attribution on 64 prompts of 128 tokens, 4 blocks of 64, 1,024 latents; a training step."""
    from crosscoder import attribute
    from sae import SAE

    torch.manual_seed(0)
    shape = dict(norm="rms", gated=True, act="silu", d_mlp=128)
    models = [GPT(GPTConfig(64, 160, 4, 4, 64, **shape)).to(device).eval() for _ in range(2)]
    for each in models:
        each.requires_grad_(False)
    code = SAE(64, 1024, 16, streams=2, batch=True).to(device)
    code.threshold.fill_(0.5)
    prompts, wait = torch.randint(64, (64, 128)).tolist(), [3, 4]
    idx = torch.tensor(prompts, device=device)

    def ours():
        with torch.no_grad():
            return attribute(models, code, 2, prompts, wait)[0]

    peers = {"released": partial(released_attribution, *models, code, 2, idx, wait)}
    rows = row("crosscoder: attribution", ours, peers, device, close, 9)
    x = torch.randn(2048, 128, device=device)
    peers = {"dense": partial(dense_step, code, x)}
    return rows + row("crosscoder: step", partial(sparse_step, code, x), peers, device, close, 9)


# -------------------------------------------------------------------------------------------- clip


def open_clip_models():
    """open_clip's module of models without the rest of the package, which wants torchvision.

    None if it is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        print("open_clip is left out: pip install --no-deps open_clip_torch ftfy wcwidth")
        return None
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    names = "torchvision", "torchvision.ops", "torchvision.ops.misc"
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Identity
    stubs |= {"open_clip": package, "transformers": None}  # its own towers are enough
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("open_clip.model")
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(before)


def clip_gradient(model, z, tokens):
    """The contrastive loss of pairs by open_clip, and its gradient."""
    model.zero_grad(set_to_none=True)
    image, text, scale = model(z, tokens)
    logits = scale * image @ text.T
    labels = torch.arange(len(z), device=z.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.detach()


def clip(device):
    """Latent-CLIP: a training step and a VAE beside the libraries', ReNO by latents and pixels."""
    import latent_clip as lc

    torch.manual_seed(0)
    sizes = dict(side=64, patch=8, width=384, layers=4, head=64, embed=256, vocab=49408, context=77)
    ours = lc.CLIP(lc.CLIPConfig(**sizes, text_width=256, text_layers=4)).to(device)
    z, tokens = torch.randn(16, 4, 64, 64, device=device), torch.zeros(16, 77).long()
    for line, n in zip(tokens, torch.randint(8, 22, (16,))):  # captions of some ten words
        line[:n] = torch.randint(1, 40000, (n,))
        line[n] = 49407
    tokens, ids = tokens.to(device), torch.arange(16, device=device)

    def step():
        ours.zero_grad(set_to_none=True)
        loss = ours(tokens, z, ids)
        loss.backward()
        return loss.detach()

    rows = []
    models = open_clip_models()
    if models:
        vision = dict(layers=4, width=384, head_width=64, patch_size=8, image_size=64)
        text = dict(context_length=77, vocab_size=49408, width=256, heads=4, layers=4)
        theirs = models.CLIP(256, models.CLIPVisionCfg(**vision), models.CLIPTextCfg(**text))
        theirs.visual.conv1 = nn.Conv2d(4, 384, 8, 8, bias=False)
        theirs.to(device).load_state_dict(ours.state_dict())
        peer = {"open_clip": partial(clip_gradient, theirs, z, tokens)}
        rows += row("CLIP, training step of 16 pairs", step, peer, device, close)
    if installed("diffusers"):
        rows += vae_rows(lc, device)
    models = [lc.VAE(), lc.Flow(), lc.CLIP(lc.TOY), lc.CLIP(lc.PIXEL)]
    for model in models:
        model.to(device).requires_grad_(False)
    clips = {"latent": models[2], "pixel": models[3]}
    lab = lc.Lab(models[0], 1.0, models[1], clips, device)
    noise, words = torch.randn(32, 4, 8, 8, device=device), ["a red circle"] * 32
    climbs = {}
    for arm in clips:
        climbs[arm] = partial(lab.climb, arm, words, lab.text(arm, words), noise, 2, 1.2)
    peer = {"by pixels": climbs["pixel"]}
    return rows + row("ReNO by latents, 32 prompts", climbs["latent"], peer, device, None, 9)


def vae_rows(lc, device):
    """Our AutoencoderKL there and back, beside diffusers' of the same weights."""
    from diffusers import AutoencoderKL

    widths = 32, 64, 128, 128
    vae = lc.VAE(widths, 2, 32).to(device).requires_grad_(False)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4}
    kinds |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4}
    theirs = AutoencoderKL(block_out_channels=widths, layers_per_block=2, **kinds)
    theirs.to(device).requires_grad_(False).load_state_dict(vae.state_dict())
    x = torch.rand(1, 3, 128, 128, device=device)

    def ours():
        return vae.decode(vae.moments(x)[0])

    def peer():
        return theirs.decode(theirs.encode(x).latent_dist.mean).sample

    return row("VAE there and back, 128 pixels", ours, {"diffusers": peer}, device, close)


# ------------------------------------------------------------------------------------------- masks

JSON_LARK = r"""
start: WS? value WS?
value: object | array | STRING | NUMBER | "true" | "false" | "null"
object: "{" WS? (pair ("," WS? pair)*)? "}"
pair: STRING WS? ":" WS? value WS?
array: "[" WS? (value WS? ("," WS? value WS?)*)? "]"
STRING: /"([^"\\\x00-\x1f\x7f]|\\(["\\\/bfnrt]|u[0-9a-fA-F]{4}))*"/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/
WS: /[ \t\n\r]+/
"""
LISP = r"""
root   ::= item (space item)*
item   ::= atom | string | "(" (item (space item)*)? ")"
atom   ::= [A-Za-z\u00C0-\u00FF+*/<>=!?-] [A-Za-z\u00C0-\u00FF0-9+*/<>=!?-]*
string ::= "\"" ([^"\\] | "\\" ["\\nt])* "\""
space  ::= [ \n]+
"""
LISP_LARK = r"""
start: item (SPACE item)*
item: ATOM | STRING | "(" (item (SPACE item)*)? ")"
ATOM: /[A-Za-z\u00C0-\u00FF+*\/<>=!?\-][A-Za-z\u00C0-\u00FF0-9+*\/<>=!?\-]*/
STRING: /"([^"\\]|\\["\\nt])*"/
SPACE: /[ \n]+/
"""
LISP_TEXTS = [
    '(define (square x) (* x x)) (print "hello world")',
    r'(café (naïve "say \"hi\"") über) list->vector',
    '(let ((x y) (z "你好, Welt")) (set! x (+ y z)))',
    '((lambda (f) (f f)) (if (eq? a b) "The fox" "Привет"))',
]
QUERY = r"""
root  ::= "SELECT " names " FROM " name (" WHERE " test)? ";"
names ::= "*" | name (", " name)*
test  ::= part ((" AND " | " OR ") part)*
part  ::= name (" = " | " < " | " <> ") value | "(" test ")"
value ::= [0-9]+ ("." [0-9]+)? | "'" ([^'] | "''")* "'" | name
name  ::= [A-Za-z_] [A-Za-z0-9_]*
"""
QUERY_LARK = r"""
start: "SELECT " names " FROM " NAME (" WHERE " test)? ";"
names: "*" | NAME (", " NAME)*
test: part ((" AND " | " OR ") part)*
part: NAME (" = " | " < " | " <> ") value | "(" test ")"
value: NUMBER | STRING | NAME
NUMBER: /[0-9]+(\.[0-9]+)?/
STRING: /'([^']|'')*'/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
"""
QUERY_TEXTS = [
    "SELECT id, user_name FROM orders WHERE created_at < 20240131 AND Total <> 17.25;",
    "SELECT * FROM cities WHERE name = 'été à Paris' OR (id < 99 AND (x1 = y2));",
    "SELECT Total FROM _t WHERE owner <> 'O''Brien' AND (id = 0.125 OR id = other_id);",
    "SELECT a, b, c FROM people WHERE ((a = '你好') OR b < 1000000);",
]


def json_value(rng, depth=0):
    """A random JSON value inside `depth` others, with escapes and other alphabets."""
    kind = rng.random()
    if depth < 4 and kind < 0.45:
        keys = ["".join(rng.choices("abcdefgh_ é", k=rng.randint(1, 8))) for _ in range(4)]
        return {key: json_value(rng, depth + 1) for key in keys[: rng.randint(0, 4)]}
    if depth < 4 and kind < 0.7:
        return [json_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    words = rng.choices(["the", 'say "quick"', "brown", "fox", "你好", "\n"], k=5)
    numbers = rng.randint(-99, 9999), rng.random() * 1e3
    return rng.choice([None, True, False, *numbers, " ".join(words)])


class LLGuidance:
    """A text under llguidance's masks: mask() fills `bits`."""

    def __init__(self, lark, tokenizer):
        from llguidance import LLMatcher, numpy

        self.matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark))
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())
        self.bits = numpy.allocate_token_bitmask(1, tokenizer.vocab_size)[0]
        self.fill, self.advance = numpy.fill_next_token_bitmask, self.matcher.consume_token

    def mask(self):
        self.fill(self.matcher, self.bits[None])


class XGrammar:
    """The same under XGrammar's."""

    def __init__(self, compiled, n_vocab):
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled)
        self.words = xgrammar.allocate_token_bitmask(1, n_vocab)
        self.bits, self.advance = self.words.numpy()[0], self.matcher.accept_token

    def mask(self):
        if not self.matcher.fill_next_token_bitmask(self.words):
            self.bits[:] = -1  # everything is allowed


def mask_engines(grammar, lark, enc, vocab):
    """{name: function that begins a text} of us and the peers, over a tiktoken encoding."""
    engines = {"ours": partial(gm.Constraint, gm.Engine(grammar, vocab, enc.eot_token))}
    if installed("llguidance"):
        from llguidance.tiktoken import lltokenizer_from_encoding

        engines["llguidance"] = partial(LLGuidance, lark, lltokenizer_from_encoding(enc))
    if installed("xgrammar"):
        import xgrammar

        options = {"vocab_type": xgrammar.VocabType.RAW, "vocab_size": len(vocab)}
        pieces = [piece or b"<special>" for piece in vocab]
        info = xgrammar.TokenizerInfo(pieces, stop_token_ids=[enc.eot_token], **options)
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        engines["xgrammar"] = partial(XGrammar, compiler.compile_grammar(grammar), len(vocab))
        if grammar == gm.JSON:
            its_own = compiler.compile_builtin_json_grammar()
            engines["xgrammar's own"] = partial(XGrammar, its_own, len(vocab))
    return engines


def differing_bits(engines, streams, vocab):
    """{peer: bits in which its masks differ from ours} along streams of ids."""
    wrong = {name: 0 for name in engines if name not in ("ours", "xgrammar's own")}
    real = [i for i, piece in enumerate(vocab) if piece]
    for ids in streams:
        ours = engines["ours"]()
        texts = {name: engines[name]() for name in wrong}
        for id in ids:
            mask = ours.mask()[real]
            for name, text in texts.items():
                text.mask()
                theirs = np.unpackbits(text.bits.view(np.uint8), bitorder="little")[real] > 0
                if theirs.sum() == 1:  # llguidance spells what is forced in one way only
                    forced = vocab[real[int(theirs.argmax())]]
                    for i in np.flatnonzero(mask & ~theirs):
                        theirs[i] = forced.startswith(vocab[real[i]])
                wrong[name] += int((theirs != mask).sum())
                text.advance(id)
            ours.advance(id)
    return wrong


def replay(begin, streams):
    """Seconds of mask + advance for every id, a list for each stream; of this thread alone."""
    times = []
    gc.collect()
    gc.freeze()  # a full collection in between would be counted as somebody's mask
    for ids in streams:
        text, times_of_text = begin(), []
        for id in ids:
            began = time.thread_time()
            text.mask()
            text.advance(id)
            times_of_text.append(time.thread_time() - began)
        times.append(times_of_text)
    gc.unfreeze()
    return times


def compare_masks(what, engines, warm, streams):
    """A row for each peer: mask + advance of 1,000 ids, after the streams `warm`."""
    rows, times = [], {}
    for name, begin in engines.items():
        some = 12 if name.startswith("xgrammar") else len(streams)  # which takes long on JSON
        replay(begin, warm[:some])
        times[name] = replay(begin, streams[:some])
        every = np.concatenate(times[name])
        print(f"  {name:15s} mean {1e3 * every.mean():.4f} ms, worst {1e3 * every.max():.2f} ms")
        if name != "ours":
            ours = np.concatenate(times["ours"][:some])  # the same texts
            rows.append(ratio_row(what, name, [ours.mean()], [every.mean()], 1e6))
    return rows


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "role": {"enum": ["student", "teacher", "parent"]},
        "friends": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
}


def schema_samples(device, n=100, longest=64):
    """n objects by SmolLM2-135M under a schema, all valid; the peer is the model without masks."""
    name = "smollm2-135m-instruct"
    if not installed("jsonschema") or packaged(name) is None:
        return []
    from jsonschema import validate

    model, tokenizer = pretrained.load(name, device, "fp32")
    vocab = gm.vocabulary(tokenizer)
    masker = gm.Masker(gm.Engine(gm.json_schema(PERSON), vocab, tokenizer.stops), longest)
    question = "Describe a person in JSON with name, age, role and friends."
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    times = {}
    for name, process in ("masks", masker), ("no masks", None):
        options = {"stop": tokenizer.stops, "seed": 0, "process": process, "samples": n}
        began = time.perf_counter()
        out = gpt.generate(model, [prompt], longest, **options)
        times[name] = (time.perf_counter() - began) / sum(map(len, out))
        if process:
            for ids in out:
                validate(json.loads(tokenizer.decode(ids[:-1])), PERSON)  # raises if it is not
    what = f"{n} samples under a schema, a token"
    return [ratio_row(what, "no masks", [times["masks"]], [times["no masks"]])]


def masks(device):
    """Token masks on the same streams, ms for 1,000 tokens. All masks are compared, bit by bit.

    JSON over cl100k on unseen documents, after 20 others; two more grammars over o200k from the
    first mask on, four short texts.
    """
    if not installed("tiktoken"):
        return []
    import tiktoken

    torch.set_num_threads(1)
    rng, rows = random.Random(0), []
    documents = []
    for i in range(120):
        document = json.dumps(json_value(rng), ensure_ascii=i % 2 == 0, indent=i % 3 or None)
        documents.append(document)
    jobs = {
        "masks, JSON": (gm.JSON, JSON_LARK, documents, "cl100k_base", 20),
        "masks, Lisp, cold": (LISP, LISP_LARK, LISP_TEXTS, "o200k_base", 0),
        "masks, query, cold": (QUERY, QUERY_LARK, QUERY_TEXTS, "o200k_base", 0),
    }
    for what, (grammar, lark, texts, name, warm) in jobs.items():
        try:
            enc = tiktoken.get_encoding(name)
        except Exception as error:  # no network: the libraries have exceptions of their own
            print(f"{what} is left out: {name} can't be had ({type(error).__name__})")
            continue
        vocab = gm.vocabulary(enc)
        engines = mask_engines(grammar, lark, enc, vocab)
        streams = [enc.encode(text) for text in texts]
        print(f"{what}, {len(vocab):,} ids, {sum(map(len, streams[warm:]))} tokens")
        rows += compare_masks(what, engines, streams[:warm], streams[warm:])
        wrong = differing_bits(engines, [ids[:60] for ids in streams[:20]], vocab)
        print(f"  bits that differ: {wrong}")
        if any(wrong.values()):
            raise AssertionError(f"{what}: masks differ, {wrong}")
    return rows + schema_samples(device)


# -------------------------------------------------------------------------------------------- main

SECTIONS = {
    "mask": mask,
    "train": train,
    "generate": generate,
    "patching": patching,
    "masks": masks,
    "lzw": lzw,
    "sae": sae,
    "crosscoder": crosscoder,
    "grpo": grpo,
    "clip": clip,
}


def main(argv=None):
    """Runs the sections named (default all), prints the table, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = ", ".join(SECTIONS)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {names} [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--out", default="out/bench.json", help="[out/bench.json]")
    args = parser.parse_args(argv)
    with common.bad_input():
        unknown = sorted(set(args.sections) - set(SECTIONS))
        if unknown:
            raise ValueError(f"no section {', '.join(unknown)}, allowed: {names}")
        device = common.find_device(args.device)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32, where results are compared
    threads = torch.get_num_threads()
    rows = []
    for name in args.sections:
        torch.set_num_threads(threads)
        for found in SECTIONS[name](device):
            line = "{what:32s} {ours_ms:9.2f} ms   {peer:18s} {peer_ms:9.2f} ms   {ratio:6.2f}x"
            line = line.format(**found) + "  [{:.2f}, {:.2f}]".format(*found["quartiles"])
            if "share_of_peak" in found:
                line += "  {tokens_per_s:,.0f} tok/s, {share_of_peak:.0%} of peak".format(**found)
            print(line, flush=True)
            rows.append(found)
        common.write_text(args.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    common.cli(main)
