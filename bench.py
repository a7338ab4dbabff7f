"""Our speed beside what people would use instead: one process, equal inputs, equal results.

    python bench.py [mask train] [--device cuda]        # a table, and out/bench.json

Each comparison checks first that both sides give the same, unless chance is in it. Then they are
timed in turns, in random order, and a row shows the median of their ratios with its quartiles: a
busy machine shifts both sides alike. A peer is written here as plainly as people write it, or is an
installed library; one that is missing is left out by name.
"""

import argparse
import gc
import json
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import countdown_rl as rl
import crosscoder as cross
import data
import grammar_mask as gm
import latent_clip as lc
import model as gpt
import pretrained
import sae as sparse
from lzw_tokenizer import LZW
from model import GPT, GPTConfig
from train_hapax import repeated

TABLE = []  # the rows of all sections
close = partial(torch.allclose, atol=1e-4, rtol=1e-3)  # equal but for rounding


def seconds(f, repeat=1):
    """The time of one call of f."""
    began = time.perf_counter()
    for _ in range(repeat):
        f()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeat


def compare(what, ours, peers, same=None):
    """A row for each peer {name: function}, where `same` finds its result equal to ours."""
    contenders = {"ours": ours} | peers
    results = {name: f() for name, f in contenders.items()}
    for name in peers:
        if same is not None and not same(results["ours"], results[name]):
            raise AssertionError(f"{what}: {name} gives something else")
    once = {name: seconds(f) for name, f in contenders.items()}
    affordable = int(20 / sum(once.values()))  # rounds in 20 seconds
    times = {name: [] for name in contenders}
    for _ in range(min(15, max(3, affordable))):
        for name in random.sample(list(contenders), len(contenders)):
            repeat = 1 + int(0.02 / once[name])  # 20 ms a turn
            times[name].append(seconds(contenders[name], repeat))
    for name in peers:
        add_row(what, name, times["ours"], times[name])


def add_row(what, peer, ours, theirs):
    """Prints and keeps a row of the table, from the seconds of two sides turn by turn."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    ours, theirs = 1e3 * np.median(ours), 1e3 * np.median(theirs)
    times = f"{ours:10.3f} ms   {peer:18s} {theirs:10.3f} ms"
    print(f"{what:32s} {times} {ratio:7.2f}x  [{low:.2f}, {high:.2f}]", flush=True)
    found = {"what": what, "peer": peer, "ours_ms": ours, "peer_ms": theirs, "ratio": ratio}
    TABLE.append(found | {"quartiles": [low, high]})


def installed(package):
    """Whether a package can be imported; says so if it can't."""
    try:
        __import__(package)
        return True
    except ImportError as error:
        print(f"{package} is left out: {error}")
        return False


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
    torch.set_num_threads(1)
    text = "".join(data.load_text())
    ids = np.array(data.get_tokenizer("bpe:4096", text).encode(text))
    x = data.windows(ids, np.random.default_rng(0), 64, 2049)
    peers = {"Python set": partial(set_of_pairs, x), "stable argsort": partial(stable_argsort, x)}
    compare("mask, 64 x 2048", partial(repeated, x), peers, np.array_equal)


class PlainBlock(nn.Module):
    """A block as people write it after reading nanoGPT, with rotary positions."""

    def __init__(self, C, H):
        super().__init__()
        self.H, self.norm1, self.norm2 = H, nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(C, 4 * C), "down": nn.Linear(4 * C, C)})

    def turn(self, x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(B, T, 3, self.H, C // self.H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.down(F.gelu(self.mlp.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """The peer: fused qkv, scaled_dot_product_attention, cross-entropy on all logits."""

    def __init__(self, c):
        super().__init__()
        self.wte, self.final = nn.Embedding(c.vocab_size, c.n_embd), nn.LayerNorm(c.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        slow = 10000 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.arange(c.block_size)[:, None] / slow
        self.register_buffer("cos", torch.cat((angle, angle), 1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), 1).sin(), persistent=False)

    def forward(self, idx, targets):
        x, T = self.wte(idx), idx.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.final(x)).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def training_step(model, opt, idx, env):
    """Forward, loss, backward, clip, AdamW; returns the loss."""
    with env.autocast():
        loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return loss.detach()


def train(device):
    """A training step of 6 x 384, context 256, vocabulary 4096, batch 16, against a plain GPT."""
    c = GPTConfig(vocab_size=4096, block_size=256, n_layer=6, n_head=6, n_embd=384)
    idx = torch.randint(4096, (16, 257), device=device)
    for dtype in torch.float32, torch.bfloat16:
        for how in "eager", "compiled":
            models = [GPT(c).to(device), PlainGPT(c).to(device)]
            models[1].load_state_dict(models[0].state_dict())
            steps = []
            for model in models:
                if how == "compiled":
                    for block in model.blocks:
                        block.compile()
                opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
                steps.append(partial(training_step, model, opt, idx, common.Env(device, dtype)))
            compare(f"train, {str(dtype)[6:]}, {how}", steps[0], {"plain GPT": steps[1]}, close)


def generate(device):
    """SmolLM2-135M, fp32: 64 greedy tokens after 16 prompts of 8 to 128; loading it from GGUF."""
    from transformers import AutoModelForCausalLM

    path = pretrained.find("smollm2-135m-instruct")
    load = partial(pretrained.load, path, device, "fp32")
    options = {"gguf_file": path.name, "dtype": torch.float32}
    load_theirs = partial(AutoModelForCausalLM.from_pretrained, path.parent, **options)
    model, tokenizer = load()
    peer = load_theirs().to(device)
    text = tokenizer.encode(next(data.load_text()))
    rng = random.Random(0)
    starts = rng.sample(range(len(text) - 128), 16)
    prompts = [text[i : i + rng.randint(8, 128)] for i in starts]
    idx, real = gpt.padded(prompts, device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 64}
    theirs = partial(peer.generate, idx, attention_mask=real.long(), **options)
    ours, peers = partial(gpt.generate, model, prompts, 64, 0.0), {"transformers": theirs}
    compare("generate, 16 x 64", ours, peers, lambda new, out: new == out[:, -64:].tolist())
    compare("load from GGUF", load, {"transformers": load_theirs})


def put(value, x):
    """x (B, T, C) with `value` (B, C) in the last column."""
    return torch.cat((x[:, :-1], value[:, None]), 1)


def forward_per_patch(model, idx, patches):
    """The last position, patched behind every block, a whole forward pass for each."""
    out = []
    for site, value in patches.items():
        with model.patch({site: partial(put, value)}):
            out.append(model.hidden(idx)[:, -1:])
    return torch.stack(out, 1)


def with_nnsight(model, idx, patches):
    """The same by a trace of nnsight for each."""
    from nnsight import NNsight

    wrapped, out = NNsight(model), []
    for site, value in patches.items():
        with wrapped.trace(idx):
            wrapped.get(site).output[:, -1] = value
            h = wrapped.final.output[:, -1:].save()
        out.append(h)
    return torch.stack(out, 1)


@torch.no_grad()
def patching(device):
    """The last position patched at every layer of 12 x 384, 2 prompts of 100 tokens."""
    c = GPTConfig(vocab_size=4096, block_size=128, n_layer=12, n_head=6, n_embd=384)
    model = GPT(c).to(device).eval()
    idx = torch.randint(4096, (2, 100), device=device)
    z = torch.randn(13, 2, 384, device=device)
    sites = ["embed", *[f"blocks.{layer}.resid_post" for layer in range(12)]]
    peers = {"forward per patch": partial(forward_per_patch, model, idx, dict(zip(sites, z)))}
    if installed("nnsight"):
        peers["nnsight"] = partial(with_nnsight, model, idx, dict(zip(sites, z)))
    interventions = [{j - 1: partial(put, value)} for j, value in enumerate(z)]
    ours = partial(gpt.sweep, model, idx, interventions)
    compare("patch, last position, 13 layers", ours, peers, close)


def lzw(device):
    """The LZW tokenizer of zip2zip on one thread, against the paper's own package in Rust."""
    from zip2zip_compression import LZWCompressor

    text = "".join(data.load_text())[:200_000]
    ids = data.get_tokenizer("bpe:4096", text).encode(text)[:40_000]
    parts = [ids[i : i + 1024] for i in range(0, len(ids), 1024)]
    # as many ids as Phi-3.5's tokenizer has, windows of 1,024 ids, hypertokens of up to 3
    codec, rust = LZW(32011, 1024, 3, [0]), LZWCompressor(32011, 1024, 3, 0, [0])
    peers = {"zip2zip-compression": lambda: [rust.encode(part)[0] for part in parts]}
    compare("LZW, 1,024 ids", lambda: [codec.encode(part) for part in parts], peers, list.__eq__)


def grpo(device):
    """The toy of countdown_rl.py: heads switched off, rollouts, and a step of GRPO."""
    args = rl.Args(**rl.Args.presets["toy"], samples=100)
    world = rl.Toy(args, 0)
    model = rl.ToyGPT(args, world, 0).to(device)
    rng = random.Random(0)
    problems = rng.sample(world.train, args.prompts)
    prompts = [world.prompt(*problem, rng) for problem in problems]
    env = common.Env(device, torch.float32)
    traces, _ = rl.halves(model, world, args, env, rng)
    prefixes = [trace.ids for trace in traces] + [t.ids[: t.wrong + 1] for t in traces]
    heads = [[(layer, head)] for layer in range(args.n_layer) for head in range(args.n_head)]
    neurons = [(args.n_layer - 1, 0)]
    ours = partial(torch.no_grad()(rl.switch_off), model, world, traces, neurons, heads)

    def same(found, rates):
        return np.allclose([(row["says_valid"], row["false_accepts"]) for row in found], rates)

    peers = {"one set at a time": partial(heads_one_by_one, model, world.valid, prefixes, heads)}
    compare(f"heads off, {len(heads)} x {len(prefixes)}", ours, peers, same)
    peer = llama_copy(model)
    idx = torch.tensor(prompts, device=device)
    if not close(model(idx), peer(idx).logits):
        raise AssertionError("rollouts: the logits of transformers' Llama differ")
    options = {"max_new_tokens": world.max_new, "num_return_sequences": args.group}
    options |= {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(idx)
    peers = {"transformers": partial(peer.generate, idx, **options)}
    ours = partial(gpt.generate, model, prompts, world.max_new, samples=args.group)
    size = f"{len(prompts)} x {args.group} x {world.max_new}"
    compare(f"rollouts, {size}", ours, peers)
    ours = partial(grpo_step, model, world, problems, args, env)
    compare(f"GRPO step, {size}", ours, {"trl": trl_step(args, world, prompts, peer, device)})


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


def grpo_step(model, world, problems, args, env):
    """Rollouts, random rewards, and an update."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    found = rl.respond(model, world, problems, random.Random(0), env, args.group)
    batch = rl.collate([rl.counted(prompt, response) for _, prompt, response in found])
    batch["advantage"] = rl.advantages(torch.rand(len(found)), args.group)
    part = rl.minibatch(batch, args, 0, 0)
    common.backward(rl.Objective(model, args), part, args, env)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()


def trl_step(args, world, prompts, peer, device):
    """The same by TRL: a function that trains `peer` for a step."""
    import datasets
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    words = {word.replace("\n", "<nl>"): i for word, i in world.id.items()}
    backend = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<bos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    texts = datasets.Dataset.from_dict({"prompt": [world.decode(prompt) for prompt in prompts]})
    options = dict(max_steps=1, learning_rate=1e-5, bf16=False, use_cpu=device.type == "cpu")
    options |= dict(per_device_train_batch_size=args.group * len(prompts), disable_tqdm=True)
    options |= dict(num_generations=args.group, max_completion_length=world.max_new)
    options |= dict(save_strategy="no", logging_strategy="no", gradient_checkpointing=False)
    config = GRPOConfig("out/trl", **options)
    parts = {"args": config, "train_dataset": texts, "processing_class": tokenizer}
    parts["reward_funcs"] = lambda prompts, **_: torch.rand(len(prompts)).tolist()
    trainer = GRPOTrainer(peer, **parts)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train


@torch.no_grad()
def heads_one_by_one(model, valid, prefixes, heads):
    """As the paper's code does it: a set of heads and four prefixes a pass."""
    found = []
    for off in heads:
        said = []
        with model.patch(common.heads_off(off, model)):
            for i in range(0, len(prefixes), 4):
                idx, mask = gpt.padded(prefixes[i : i + 4], model.wte.weight.device)
                said += model(idx, mask=mask)[:, -1].argmax(-1).tolist()
        found.append([token in valid for token in said])
    return np.reshape(found, (len(heads), 2, -1)).mean(2)  # of right attempts, of wrong ones


def gradient(model, loss, *inputs):
    """Computes a loss and its gradients; returns the loss."""
    model.zero_grad()
    found = loss(*inputs)
    found.backward()
    return found.detach()


def dense_loss(sae, x):
    """The loss of a TopK SAE (batch: of a crosscoder) as people write it."""
    pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    if sae.batch:
        code = pre.relu() * (pre >= pre.flatten().topk(sae.k * len(x)).values[-1])
    else:
        values, latents = pre.topk(sae.k)
        code = torch.zeros_like(pre).scatter(1, latents, values.relu())
    return (x - code @ sae.W_dec - sae.b_dec).square().sum()


def sparse_loss(sae, x):
    """The same by our sparse code."""
    sae.silent.zero_()
    return sae(None, x, 1.0)


def sae_lens_copy(sae, x):
    """A TopK SAE of sae-lens with our weights, and its loss of a batch x."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    m, d = sae.W_enc.shape
    options = dict(decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False, device=str(x.device))
    peer = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=sae.k, **options))
    peer.W_enc.data.copy_(sae.W_enc.T)
    peer.W_dec.data.copy_(sae.W_dec)
    batch = TrainStepInput(x, {}, torch.zeros(m, dtype=torch.bool, device=x.device), 0, False)
    return peer, lambda: peer.training_forward_pass(batch).loss * len(x)  # a mean over rows


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
    code = sparse.SAE(256, 4096, 32).to(device)
    x = torch.randn(2048, 256, device=device)
    peers = {"dense": partial(gradient, code, dense_loss, code, x)}
    if installed("sae_lens"):
        peers["sae-lens"] = partial(gradient, *sae_lens_copy(code, x))
    compare("sae: TopK step", partial(gradient, code, sparse_loss, code, x), peers, close)
    code.requires_grad_(False)
    w = torch.randn(256, device=device)
    peers = {"integrated": partial(integrated_gradients, code, x.view(64, 32, 256), w)}
    D, sums = code.decoder(), partial(close, atol=1e-3)  # sums of thousands of terms
    ours = partial(sparse.attribution, y=None, D=D, w=w)
    compare("sae: attribution", lambda: ours(code.encode(x)), peers, sums)


def released_attribution(base, ft, code, layer, idx, targets):
    """What the released code does: every position encoded, gradients of the whole network."""
    site, kept = f"blocks.{layer}.resid_post", []
    with torch.no_grad():
        h_base = base.capture(idx, [site])[site]
    ft.requires_grad_(True)
    with ft.patch({site: kept.append}):
        logits = ft(idx)
    kept[0].retain_grad()
    cross.log_p(logits[:, -1], targets).sum().backward()
    ft.zero_grad()
    ft.requires_grad_(False)
    with torch.no_grad():
        f = code.encode(torch.cat((h_base, kept[0]), 2))
        return cross.attribution(f, code.decoder(cross.FT), kept[0].grad)[:, -1]


def crosscoder(device):
    """Attribution on 64 prompts of 128 tokens, 4 blocks of 64, 1,024 latents; a training step."""
    config = GPTConfig(64, 160, 4, 4, 64, norm="rms", gated=True, act="silu", d_mlp=128)
    models = [GPT(config).to(device).eval().requires_grad_(False) for _ in range(2)]
    code = sparse.SAE(64, 1024, 16, streams=2, batch=True).to(device)
    code.threshold.fill_(0.5)
    idx, wait = torch.randint(64, (64, 128), device=device), [3, 4]
    ours = partial(torch.no_grad()(cross.attribute), models, code, 2, idx.tolist(), wait)
    peers = {"released": partial(released_attribution, *models, code, 2, idx, wait)}
    compare("crosscoder: attribution", lambda: ours()[0], peers, close)
    x = torch.randn(2048, 128, device=device)
    peers = {"dense": partial(gradient, code, dense_loss, code, x)}
    compare("crosscoder: step", partial(gradient, code, sparse_loss, code, x), peers, close)


def clip(device):
    """The contrastive loss of 16 pairs and its gradient, beside open_clip of the same weights."""
    from open_clip import ClipLoss
    from open_clip import model as models

    sizes = dict(side=64, patch=8, width=384, layers=4, head=64, embed=256, vocab=49408, context=77)
    clip = lc.CLIP(lc.CLIPConfig(**sizes, text_width=256, text_layers=4)).to(device)
    vision = models.CLIPVisionCfg(4, 384, patch_size=8, image_size=64)
    peer = models.CLIP(256, vision, models.CLIPTextCfg(width=256, heads=4, layers=4))
    peer.visual.conv1 = nn.Conv2d(4, 384, 8, 8, bias=False)  # latents have four channels
    peer.to(device).load_state_dict(clip.state_dict())
    z, pairs = torch.randn(16, 4, 64, 64, device=device), torch.arange(16, device=device)
    tokens = torch.randint(1, 40000, (16, 77), device=device)
    tokens[:, 21], tokens[:, 22:] = 49407, 0  # captions of some ten words
    ours = partial(gradient, clip, clip, tokens, z, pairs)
    peers = {"open_clip": partial(gradient, peer, lambda: ClipLoss()(*peer(z, tokens)))}
    compare("CLIP, training step of 16 pairs", ours, peers, close)


LISP = r"""
root   ::= item (space item)*
item   ::= atom | string | "(" (item (space item)*)? ")"
atom   ::= [A-Za-z\u00C0-\u00FF+*/<>=!?-] [A-Za-z\u00C0-\u00FF0-9+*/<>=!?-]*
string ::= "\"" ([^"\\] | "\\" ["\\nt])* "\""
space  ::= [ \n]+
"""
LISP_TEXTS = [
    '(define (square x) (* x x)) (print "hello world")',
    r'(café (naïve "say \"hi\"") über) list->vector',
    '(let ((x y) (z "你好, Welt")) (set! x (+ y z)))',
    '((lambda (f) (f f)) (if (eq? a b) "The fox" "Привет"))',
]
QUERY = r"""
root   ::= "SELECT " names " FROM " name (" WHERE " test)? ";"
names  ::= "*" | name (", " name)*
test   ::= part ((" AND " | " OR ") part)*
part   ::= name (" = " | " < " | " <> ") value | "(" test ")"
value  ::= number | string | name
number ::= [0-9]+ ("." [0-9]+)?
string ::= "'" ([^'] | "''")* "'"
name   ::= [A-Za-z_] [A-Za-z0-9_]*
"""
QUERY_TEXTS = [
    "SELECT id, user_name FROM orders WHERE created_at < 20240131 AND Total <> 17.25;",
    "SELECT * FROM cities WHERE name = 'été à Paris' OR (id < 99 AND (x1 = y2));",
    "SELECT Total FROM _t WHERE owner <> 'O''Brien' AND (id = 0.125 OR id = other_id);",
    "SELECT a, b, c FROM people WHERE ((a = '你好') OR b < 1000000);",
]


def in_lark(grammar, terminals):
    """A grammar of ours in llguidance's notation, where the names of terminals are capitals."""

    def rewritten(token):
        if token.lastgroup == "class":
            return "/" + token[0].replace("/", r"\/") + "/"
        return token[0].upper() if token[0] in terminals else token[0]

    return gm.TOKEN.sub(rewritten, grammar).replace("::=", ":").replace("root", "start")


never_empty = gm.JSON.replace("]*\n", "]+\n").replace(" ws", " ws?")  # llguidance likes it so
JSON_LARK = in_lark(never_empty, ["string", "number", "integer", "ws"])
LISP_LARK = in_lark(LISP, ["atom", "string", "space"])
QUERY_LARK = in_lark(QUERY, ["number", "string", "name"])


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


def with_llguidance(lark, tokenizer):
    """Begins a text: mask() fills `bits` with what may come next, advance(id) takes it."""
    from llguidance import LLMatcher, numpy

    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark))
    words = numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
    mask = partial(numpy.fill_next_token_bitmask, matcher, words)
    return SimpleNamespace(mask=mask, advance=matcher.consume_token, bits=words[0])


def with_xgrammar(compiled):
    """The same by XGrammar."""
    import xgrammar

    matcher = xgrammar.GrammarMatcher(compiled)
    words = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
    mask = partial(matcher.fill_next_token_bitmask, words)
    return SimpleNamespace(mask=mask, advance=matcher.accept_token, bits=words.numpy()[0])


def mask_engines(grammar, lark, enc, vocab):
    """{name: function that begins a text} of us and the peers, over a tiktoken encoding."""
    engines = {"ours": partial(gm.Constraint, gm.Engine(grammar, vocab, enc.eot_token))}
    if installed("llguidance"):
        from llguidance.tiktoken import lltokenizer_from_encoding

        engines["llguidance"] = partial(with_llguidance, lark, lltokenizer_from_encoding(enc))
    if installed("xgrammar"):
        import xgrammar

        pieces = [piece or b"<special>" for piece in vocab]
        info = xgrammar.TokenizerInfo(pieces, stop_token_ids=[enc.eot_token])
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        engines["xgrammar"] = partial(with_xgrammar, compiler.compile_grammar(grammar))
        if grammar == gm.JSON:
            its_own = compiler.compile_builtin_json_grammar()
            engines["xgrammar's own"] = partial(with_xgrammar, its_own)
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
    """Seconds of mask + advance for every id of the streams; of this thread alone."""
    times = []
    for ids in streams:
        text = begin()
        for id in ids:
            began = time.thread_time()
            text.mask()
            text.advance(id)
            times.append(time.thread_time() - began)
    return np.array(times)


def compare_masks(what, engines, warm, streams):
    """A row for each peer: mask + advance of 1,000 ids, after the streams `warm`."""
    for name, begin in engines.items():
        replay(begin, warm)
        some = 12 if name.startswith("xgrammar") else len(streams)  # which takes long on JSON
        times = 1e3 * replay(begin, streams[:some])
        print(f"  {name:15s} mean {times.mean():.4f} ms, worst {times.max():.2f} ms")
        if name == "ours":
            ours = times
        else:
            add_row(what, name, [ours[: len(times)].mean()], [times.mean()])  # of the same ids


def masks(device):
    """Token masks on the same streams, ms for 1,000 tokens; all masks are compared, bit by bit."""
    import tiktoken

    gc.freeze()  # a full collection in between would be counted as somebody's mask
    rng = random.Random(0)
    documents = []
    for i in range(120):
        document = json.dumps(json_value(rng), ensure_ascii=i % 2 == 0, indent=i % 3 or None)
        documents.append(document)
    for what, grammar, lark, texts, name, warm in (
        ("masks, JSON", gm.JSON, JSON_LARK, documents, "cl100k_base", 20),  # after 20 others
        ("masks, Lisp, cold", LISP, LISP_LARK, LISP_TEXTS, "o200k_base", 0),
        ("masks, query, cold", QUERY, QUERY_LARK, QUERY_TEXTS, "o200k_base", 0),
    ):
        enc = tiktoken.get_encoding(name)
        vocab = gm.vocabulary(enc)
        engines = mask_engines(grammar, lark, enc, vocab)
        streams = [enc.encode(text) for text in texts]
        print(f"{what}, {len(vocab):,} ids, {sum(map(len, streams[warm:]))} tokens")
        compare_masks(what, engines, streams[:warm], streams[warm:])
        wrong = differing_bits(engines, [ids[:60] for ids in streams[:20]], vocab)
        print(f"  bits that differ: {wrong}")
        if any(wrong.values()):
            raise AssertionError(f"{what}: masks differ, {wrong}")


SECTIONS = mask, train, generate, patching, masks, lzw, sae, crosscoder, grpo, clip


def main(argv=None):
    """Runs the sections named (default all), prints the table, writes it as JSON."""
    sections = {section.__name__: section for section in SECTIONS}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(sections)} [all]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(sections):
        common.fail(f"no section {' '.join(unknown)}, allowed: {' '.join(sections)}")
    with common.bad_input():
        device = common.find_device(args.device)
        Path("out").mkdir(exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32, where results are compared
    threads = torch.get_num_threads()
    for name in args.sections or sections:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        try:
            sections[name](device)
        except (ImportError, OSError) as error:  # OSError: tiktoken without a network
            print(f"{name}: {error}; what needs it is left out")
        common.write_text("out/bench.json", json.dumps(TABLE, indent=1) + "\n")


if __name__ == "__main__":
    common.cli(main)
