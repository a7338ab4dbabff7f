"""zip2zip (arXiv 2506.01084): a language model whose vocabulary grows with the text in front of it.

LZW (lzw_tokenizer.py) merges what repeats in a text into new ids of at most M base ids each,
*hypertokens* or rows. A small hyper-encoder makes the input embedding and the output row of each
from the embeddings of its base ids: so the model reads and writes ids that nobody has trained. The
base weights are frozen; LoRA and the hyper-encoder learn from the loss of the next compressed id.

The toy: a GPT learns a made-up language whose documents have names of their own. LoRA arms go on
from it with the same windows: `cont` reads plain ids, `zip` compressed ones, `digits` is zip that
never merges digits; in `rand` a row is a fixed random vector, in `avg` the mean of its base ids'
embeddings. A real model goes on as `cont` and `zip`.

Read on: `Zip`, `pack`, `generate`, `transported` (theory), `train_arm`, `judge`.
"""

import copy
import functools
import itertools
import math
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import pretrained
from lzw_tokenizer import LZW, Decoder, paint
from model import GPT, GPTConfig, KVCache, padded, sample

ARMS = "cont", "zip", "rand", "avg", "digits"  # what goes on from the toy's base model


@dataclass
class Args(common.TrainFlags):
    """zip2zip"""

    presets: ClassVar[dict] = {
        "smoke": dict(pretrain_steps=6, steps=4, warmup=2, eval_every=2, save_every=3, jobs=1)
        | dict(enc_dim=16, block_size=64, samples=4, batch_size=4),
        "toy": {},
        "real": dict(model="smollm2-135m-instruct", block_size=512, batch_size=2, steps=40)
        | dict(warmup=6, lr=1.5e-3, lora_r=16, enc_dim=192, samples=16, eval_every=20)
        | dict(save_every=20),
        "paper": dict(model="microsoft/Phi-3.5-mini-instruct", dataset="epfl-dlab/zip2zip-1B")
        | dict(block_size=4096, max_codes=2048, max_len=4, lora_r=32, enc_dim=3072, enc_heads=32)
        | dict(enc_layers=2, steps=8000, batch_size=16, micro_batch=1, lr=3e-4, min_lr=1 / 30)
        | dict(warmup=800, weight_decay=0.01),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys("max_len max_codes enc_layers enc_dim enc_heads".split(), (1,)),
        **dict.fromkeys("lora_r samples pretrain_steps".split(), (1,)),
        "block_size": (32,),
    }
    unused: ClassVar[set] = {"shard"}  # every process holds the frozen base model
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"prompt", "samples"}

    steps: int = 200
    batch_size: int = 8
    lr: float = 3e-3
    warmup: int = 10
    eval_every: int = 50
    model: str = ""  # a real model to adapt (paper: Phi-3.5-mini); none: the toy
    dataset: str = "stdlib"  # text for --model: stdlib, file:PATH, a `datasets` id
    prompt: str = ""  # text, or `heldout`: what the trained zip in --out writes; then stop
    max_len: int = 3  # M, base ids of a row (paper: 3 or 4)
    max_codes: int = 1024  # N, rows of a sequence (paper: the window)
    enc_layers: int = 1  # layers of the hyper-encoder (paper: 2)
    enc_dim: int = 64  # its width (paper: the model's)
    enc_heads: int = 2  # its heads (paper: 32)
    lora_r: int = 8  # rank of LoRA; its scale is 2 (paper: rank 32, scale 1)
    pretrain_steps: int = 350  # steps of the toy's base model
    samples: int = 24  # held-out windows, and prompts, of each measure
    block_size: int = 256  # window in base ids (paper: what fills 1024 or 2048 codes)


# -------------------------------------------------------------------------------------- the method


class LoRA(nn.Module):
    """A frozen linear layer plus 2 B A x; B is zero at first, so that nothing changes."""

    def __init__(self, linear, r):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype))
        return self.linear(x) + 2 * F.linear(low, self.B.to(x.dtype))


def add_lora(gpt, r):
    """Freezes a GPT and puts LoRA around every linear layer of its blocks, in place."""
    gpt.requires_grad_(False)
    for block in gpt.blocks:
        for part in block.attn, block.mlp:
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LoRA(layer, r))
    return gpt


class HyperEncoder(nn.Module):
    """Embeddings (R, M, C), real (R, M) of rows to what they add on the ways in and out, (R, C)."""

    def __init__(self, C, M, args):
        super().__init__()
        d = args.enc_dim
        self.inp = nn.Linear(C, d)
        self.pos = nn.Parameter(0.02 * torch.randn(M, d))
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(d, args.enc_heads, 4 * d, **options)
        self.layers = nn.TransformerEncoder(layer, args.enc_layers, enable_nested_tensor=False)
        self.norm = nn.RMSNorm(d)
        self.heads = nn.ModuleList(nn.Linear(d, C, bias=False) for _ in range(2))
        for head in self.heads:  # nothing is added at first
            nn.init.zeros_(head.weight)

    def forward(self, e, real):
        x = self.layers(self.inp(e) + self.pos, src_key_padding_mask=~real)
        x = masked_mean(self.norm(x), real)
        return [head(x) for head in self.heads]


def masked_mean(x, real):
    """The mean (R, C) over the real places of x (R, M, C)."""
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class Zip(nn.Module):
    """A GPT that reads and writes compressed ids: z < V is the base id z, V + k the row k.

    Batches are `pack`'s. Without rows it is the plain model with LoRA.
    """

    def __init__(self, gpt, lzw, args, arm):
        super().__init__()
        self.gpt, self.lzw = gpt, lzw
        self.config, self.arm = gpt.config, arm
        C = gpt.config.n_embd
        self.size_in = gpt.wte.weight.float().square().mean().sqrt().item()  # .14 in SmolLM2
        self.size_out = gpt.head.weight.float().square().mean().sqrt().item()
        self.encoder = None
        if arm in ("zip", "digits"):
            self.encoder = HyperEncoder(C, lzw.max_len, args)
        if arm == "rand":  # a fixed vector of an embedding's size for each row
            draw = torch.Generator().manual_seed(1)
            self.register_buffer("fixed", torch.randn(lzw.max_codes, C, generator=draw))

    @property
    def blocks(self):
        return self.gpt.blocks

    def state_dict(self):
        """What learns: LoRA and the encoder. The base model is not saved with every arm."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state):
        super().load_state_dict(super().state_dict() | state)

    def encode(self, rows, k=None):
        """Vectors of rows (R, M) of base ids, -1 on the right: way in and way out, both (R, C).

        k (R,): the rows' numbers, on which only those of `rand` depend.
        """
        if self.arm == "rand":
            fixed = self.fixed[k]
            return fixed * self.size_in * self.config.embed_scale, fixed * self.size_out
        real, ids = rows >= 0, rows.clamp(min=0)
        e, w = F.embedding(ids, self.gpt.wte.weight), F.embedding(ids, self.gpt.head.weight)
        if self.encoder is None:
            vin, vout = masked_mean(e, real), masked_mean(w, real)
        else:
            last = real.sum(1) - 1
            more_in, more_out = self.encoder(e.float() / self.size_in, real)
            vin = e[torch.arange(len(rows)), last] + self.size_in * more_in
            vout = w[:, 0] + self.size_out * more_out
        return vin * self.config.embed_scale, vout

    def encode_all(self, rows, shuffle=False):
        """The same for a batch (B, K, M), every distinct row once: two tensors (B, K, C).

        shuffle: the control that gives each row the vectors of another row of its sequence.
        """
        B, K, M = rows.shape
        if K == 0:
            return torch.zeros(2, B, 0, self.config.n_embd, device=rows.device)
        if self.arm == "rand":
            return [v.expand(B, K, -1) for v in self.encode(rows, torch.arange(K))]
        exists = rows[..., 0] >= 0
        distinct, where = torch.unique(rows[exists], dim=0, return_inverse=True)
        if shuffle:
            parts = where.split(exists.sum(1).tolist())
            where = torch.cat([part.roll(1 + len(part) // 2) for part in parts])
        out = []
        for vectors in self.encode(distinct):
            full = vectors.new_zeros(B, K, vectors.shape[-1])
            full[exists] = vectors[where]
            out.append(full)
        return out

    def hidden(self, idx, vin, mask=None, cache=None):
        """The normed residual stream (B, T, C) over compressed ids; `vin` (B, K, C) of the rows."""
        if vin.shape[1] == 0:
            return self.gpt.hidden(idx, mask, cache)
        is_row = idx >= self.config.vocab_size
        row = (idx - self.config.vocab_size).clamp(min=0)

        def put(x):
            own = vin.gather(1, row[..., None].expand(-1, -1, vin.shape[-1]))
            return torch.where(is_row[..., None], own.to(x.dtype), x)

        with self.gpt.patch({"embed": put}):
            return self.gpt.hidden(idx.masked_fill(is_row, 0), mask, cache)

    def logits(self, h, vout, known):
        """Scores (B, T, V + K) of h (B, T, C), vout (B, K, C); rows from `known` (B, T) on -inf."""
        scores, c = self.gpt.unembed(h).float(), self.config
        own = (h @ vout.transpose(1, 2).to(h.dtype)).float() * c.logit_scale
        if c.logit_softcap:
            own = c.logit_softcap * torch.tanh(own / c.logit_softcap)
        row = torch.arange(own.shape[-1], device=h.device)
        return torch.cat((scores, own.masked_fill(row >= known[..., None], -torch.inf)), -1)

    def forward(self, idx, targets, count, rows, denom=1, shuffle=False):
        """-log p of the targets, their sum / denom: the loss of ordinary next-id training."""
        vin, vout = self.encode_all(rows, shuffle)
        scores = self.logits(self.hidden(idx, vin), vout, count)
        scores, targets = scores.flatten(0, 1), targets.flatten()
        return F.cross_entropy(scores, targets, reduction="sum") / denom


def pack(lzw, windows):
    """Windows of base ids to a batch for `Zip`, padded on the right: a dictionary of tensors.

    idx, targets  (B, T) codes, and the code behind each (-100: none)
    count         (B, T) how many rows are known after each code
    rows          (B, K, M) base ids of all rows of a window, -1 where there is none
    """
    batch = {"idx": [], "targets": [], "count": [], "rows": []}
    for window in windows:
        decoder = Decoder(lzw)
        codes = lzw.encode_known([int(a) for a in window], decoder)
        batch["idx"].append(torch.tensor(codes[:-1]))
        batch["targets"].append(torch.tensor(codes[1:]))
        batch["count"].append(torch.tensor(decoder.counts[:-1]))
        batch["rows"].append(as_tensor(decoder.rows, lzw.max_len))
    fill = {"idx": 0, "targets": -100, "count": 0, "rows": -1}
    for name, parts in batch.items():
        batch[name] = nn.utils.rnn.pad_sequence(parts, True, fill[name])
    return batch


def as_tensor(words, M):
    """Rows, tuples of base ids, as a tensor (R, M) with -1 on the right."""
    padded = [word + (-1,) * (M - len(word)) for word in words]
    return torch.tensor(padded, dtype=torch.long).view(-1, M)


# -------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model, prompts, n, temperature=0.0, seed=0):
    """Continues every prompt (a list of base ids) by n codes; the rows grow with the text.

    Returns a list of n words for each prompt: a code's base ids, two or more if it is a row.
    """
    lzw, c = model.lzw, model.config
    device, dtype = model.gpt.wte.weight.device, model.gpt.wte.weight.dtype
    decoders = [Decoder(lzw) for _ in prompts]
    codes = [lzw.encode_known(prompt, decoder) for prompt, decoder in zip(prompts, decoders)]
    most = max(len(decoder.rows) for decoder in decoders) + n * lzw.max_len
    most = min(lzw.max_codes, most) if lzw.max_len > 1 else 0
    vectors = torch.zeros(2, len(prompts), most, c.n_embd, device=device, dtype=dtype)
    cache = KVCache(c, len(prompts), max(map(len, codes)) + n, device, dtype)
    rng = torch.Generator(device).manual_seed(seed)
    installed = [0] * len(prompts)
    new = [[] for _ in prompts]
    idx, mask = padded(codes, device)
    with model.gpt.eager():
        for _ in range(n):
            install(model, decoders, installed, vectors)
            known = torch.tensor(installed, device=device)[:, None]
            h = model.hidden(idx, vectors[0], mask, cache)[:, -1:]
            idx = sample(model.logits(h, vectors[1], known)[:, 0], temperature, rng=rng)
            for decoder, out, code in zip(decoders, new, idx[:, 0].tolist()):
                out.append(decoder.push(code)[0])
            mask = None
    return new


def install(model, decoders, installed, vectors):
    """Puts the vectors of rows that are new to the decoders where the model finds them."""
    places, words = [], []
    for b, decoder in enumerate(decoders):
        for k in range(installed[b], len(decoder.rows)):
            places.append((b, k))
            words.append(decoder.rows[k])
        installed[b] = len(decoder.rows)
    if not words:
        return
    b, k = torch.tensor(places, device=vectors.device).T
    rows = as_tensor(words, model.lzw.max_len).to(vectors.device)
    vectors[:, b, k] = torch.stack(model.encode(rows, k)).to(vectors.dtype)


# -------------------------------------------------------------------------------------- the theory


def transported(lzw, logp, ids):
    """-log p of every code but the first under the *transported* base model (theorem 2.1), exact.

    logp (n, V): the base model's log-probabilities of the id after ids[:1], ids[:2], ..., ids

        p(z_t) = P(its base ids) * P(the next id doesn't extend z_t) / P(.. doesn't extend z_t-1)

    Where it extends z_t, LZW would have gone on. Returns (n_codes - 1, 2): as here, and without the
    two factors.
    """
    decoder, out = Decoder(lzw), []
    place = before = 0
    for code in lzw.encode(ids):
        word, _ = decoder.push(code)
        extends = [key % lzw.vocab_size for key in decoder.table if key // lzw.vocab_size == code]
        own = sum(logp[place - 1 + j, a].item() for j, a in enumerate(word))
        place += len(word)
        after = math.log1p(-logp[place - 1, extends].exp().sum().item())
        out.append((before - after - own, -own))
        before = after
    return torch.tensor(out[1:], dtype=torch.float64)


def total_probability(lzw, predict, ids):
    """What the transported p of all codes that may follow base ids add up to: 1; (2,), as above.

    predict: base ids (R, T) -> log-probabilities (R, T, V) of the id after each place
    """
    codes, decoder = lzw.encode(ids), Decoder(lzw)
    for code in codes:
        word, _ = decoder.push(code)
    words = [*((a,) for a in range(lzw.vocab_size)), *decoder.rows, (*word, word[0])]
    texts = [[*ids, *word] for word in dict.fromkeys(words)]
    texts = [text for text in texts if lzw.encode(text)[:-1] == codes]  # as LZW would cut them
    longest = max(map(len, texts))
    logp = predict(torch.tensor([text + [0] * (longest - len(text)) for text in texts]))
    return sum(torch.exp(-transported(lzw, row, text)[-1]) for row, text in zip(logp, texts))


@torch.no_grad()
def theory(gpt, lzw, world, n, device):
    """Theorem 2.1 on held-out windows: bits per byte lost, and (mass) |1 - the sum of all p|."""

    def predict(idx):
        return gpt(idx.to(device)).double().log_softmax(-1).cpu()

    lost = size = 0
    off = []
    for window in world.windows("heldout", 0, n):
        ids = [*window[:-1].tolist(), world.special[0]]
        logp = predict(torch.tensor([ids]))[0]
        plain = -logp[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        lost += abs(transported(lzw, logp, ids)[:, 0].sum().item() - plain)
        size += n_bytes(world, ids[1:])
        off.append((total_probability(lzw, predict, ids[: len(ids) // 3]) - 1).abs())
    mass, alone = torch.stack(off).amax(0).tolist()
    return {"lost": lost / size / math.log(2), "mass": mass, "mass_alone": alone}


# -------------------------------------------------------------------------------------- the worlds

VERBS = "sees likes helps finds calls pays meets thanks"
NOUNS = "house river garden market road bridge school tower boat"
OTHERS = " is| near| the| of| and| with| number| again|.|\n"


class Synth:
    """A language of 188 ids: documents with six names of syllables (new ones in each), numbers.

    Names come as often as 1 / rank. Now and then a number of eight random digits is said twice. A
    window is a document; id 0 ends the one before.
    """

    def __init__(self, args, seed):
        syllables = [c + v for c in "bcdfghklmnprstz" for v in "aeiou"]
        parts = [[""], syllables, [f" {s}" for s in syllables]]
        parts += [[f" {word}" for word in words.split()] for words in (VERBS, NOUNS)]
        parts += [OTHERS.split("|"), [f" {digit}" for digit in range(10)]]
        self.text = list(itertools.chain(*parts))
        ids = iter(range(len(self.text)))
        groups = [list(itertools.islice(ids, len(part))) for part in parts]
        _, self.tail, self.head, self.verbs, self.nouns, rest, self.digits = groups
        self.word = {self.text[i].strip() or "\n": i for i in rest}
        self.n_vocab, self.special = len(self.text), [0]
        self.length, self.seed = args.block_size, seed

    def sentence(self, rng, names, liked):
        """The ids of a sentence; 70 % are of the two forms that this document likes."""
        w = self.word
        if rng.random() < 0.15:
            number = rng.choices(self.digits, k=8)
            return [w["number"], *number, w["again"], *number]
        a, b = rng.choices(names, [1 / rank for rank in range(1, 7)], k=2)
        verb, noun = rng.choice(self.verbs), rng.choice(self.nouns)
        forms = [
            [*a, verb, *b],
            [*a, w["is"], w["near"], w["the"], noun, w["of"], *b],
            [w["the"], noun, w["of"], *a, w["and"], *b],
            [*a, verb, w["the"], noun, w["with"], *b],
        ]
        return forms[rng.choice(liked) if rng.random() < 0.7 else rng.randrange(4)]

    def document(self, rng):
        """Ids of one window: a document's beginning."""
        names = []
        for _ in range(6):
            names.append([rng.choice(self.head), *rng.choices(self.tail, k=rng.randint(1, 3))])
        liked, ids = rng.sample(range(4), 2), [0]
        while len(ids) <= self.length:
            ids += [*self.sentence(rng, names, liked), self.word["."]]
            if rng.random() < 0.2:
                ids.append(self.word["\n"])
        return ids[: self.length + 1]

    def windows(self, split, step, n):
        """n windows (n, length + 1): documents of this step, or of the held-out ones."""
        rng = random.Random(f"{self.seed} {split} {step}")
        return np.array([self.document(rng) for _ in range(n)])

    def decode(self, ids):
        return "".join(self.text[i] for i in ids)

    def names(self, ids):
        """The names in a list of ids, tuples, but for those at its ends, which may be cut."""
        kinds = ["h" if a in self.head else "t" if a in self.tail else " " for a in ids]
        found = re.finditer("(?<=.)ht+(?=[ h])", "".join(kinds))
        return [tuple(ids[m.start() : m.end()]) for m in found]


class Text:
    """Windows of a real text in a real model's ids."""

    def __init__(self, args, tok, seed):
        self.tok, self.length, self.seed = tok, args.block_size, seed
        needed = args.steps * args.batch_size * (args.block_size + 1)
        limit = None if data.is_local(args.dataset) else needed
        folder, self.tokens = Path(args.out) / "tokens", {}
        for split in "train", "heldout":
            self.tokens[split] = data.token_file(args.dataset, split, tok, folder, limit)
            self.windows(split, 0, 1)  # a ValueError if the text is too short
        added = tok.backend.get_added_tokens_decoder().items()
        self.special = [i for i, token in added if token.special]
        texts = [tok.decode([i]) for i in range(tok.n_vocab)]
        self.digits = [i for i, text in enumerate(texts) if any(map(str.isdigit, text))]

    def windows(self, split, step, n):
        rng = np.random.default_rng([self.seed, split == "heldout", step])
        return data.windows(self.tokens[split], rng, n, self.length + 1)

    def decode(self, ids):
        return self.tok.decode([int(i) for i in ids])


# --------------------------------------------------------------------------- training and measures


load_real = functools.cache(pretrained.load)  # once a process, for all arms


def start(args, env, seed, trained=True):
    """Where all arms start, and the world: a real model, or the toy's from `train_base`."""
    if args.model:
        gpt, tok = load_real(args.model, env.device, env.dtype)
        return gpt, Text(args, tok, seed)
    world = Synth(args, seed)
    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=4, n_embd=96, norm="rms", tie=True)
    shape["smear_keys"] = True  # names are copied sooner
    gpt = GPT(GPTConfig(world.n_vocab, 2 * args.block_size, **shape)).to(env.device)
    if trained:
        saved = common.load_checkpoint(Path(args.out) / f"base-s{seed}.pt")
        gpt.load_state_dict(saved["model"])
    return gpt, world


def train_base(args, env, log, arm, seed):
    """Trains the toy's base model on plain ids, and measures it, or the real one."""
    gpt, world = start(args, env, seed, trained=False)

    def batch(step):
        x = world.windows("train", step, args.batch_size)[env.rank :: env.world]
        x = torch.from_numpy(x)
        return {"idx": x[:, :-1], "targets": x[:, 1:]}

    found = {}
    if not args.model:
        own = replace(args, steps=args.pretrain_steps, lr=4e-3)
        common.train(gpt, batch, own, env, log)
        lzw = build(args, gpt, world, "zip").lzw
        found = theory(gpt.eval(), lzw, world, min(4, args.samples), env.device)
    return found | bits_per_byte(build(args, gpt, world, "cont").eval(), world, args.samples, env)


def build(args, base, world, arm):
    """The model of an arm around the base model, whose frozen weights all arms share."""
    disabled = list(world.special)
    if args.model or arm == "digits":
        disabled += world.digits
    M = 1 if arm == "cont" else args.max_len
    lzw = LZW(base.config.vocab_size, args.max_codes, M, disabled)
    torch.manual_seed(world.seed)  # LoRA starts the same in all
    shared = {id(p): p for p in base.parameters()}
    gpt = add_lora(copy.deepcopy(base, shared), args.lora_r)
    return Zip(gpt, lzw, args, arm).to(base.wte.weight.device)


def train_arm(args, env, log, arm, seed):
    """Goes on from the base model in one arm, on the windows of all arms; measures it."""
    gpt, world = start(args, env, seed)
    model = build(args, gpt, world, arm)

    def batch(step):
        windows = world.windows("train", 10**6 + step, args.batch_size)[env.rank :: env.world]
        return pack(model.lzw, windows)

    def evaluate(step):
        return {"bpb": bits_per_byte(model, world, max(2, args.samples // 4), env)["bpb"]}

    common.train(model, batch, args, env, log, evaluate)
    model.eval()
    found = bits_per_byte(model, world, args.samples, env)
    with env.autocast():
        found |= measure_generation(model, world, args)
    if arm == "zip":
        control = bits_per_byte(model, world, args.samples, env, shuffle=True)
        found["bpb_shuffled"] = control["bpb"]
    return found


def n_bytes(world, ids):
    """How many bytes of text some base ids are."""
    return len(world.decode(ids).encode())


@torch.no_grad()
def bits_per_byte(model, world, n, env, shuffle=False):
    """Held-out windows, every byte scored: bits per byte, ids per base id, share of hypertokens.

    mixed_ids_per_byte is a control: what LZW saves by chance, if the ids come in random order.
    """
    windows, sums = world.windows("heldout", 0, n), Counter()
    for part in np.array_split(windows, max(1, n // 4)):
        batch = {name: value.to(env.device) for name, value in pack(model.lzw, part).items()}
        with env.autocast():
            sums["nats"] += model(**batch, shuffle=shuffle).item()
        sums["ids"] += (batch["targets"] >= 0).sum().item()
        sums["rows"] += (batch["targets"] >= model.config.vocab_size).sum().item()
    windows = windows[:, 1:]
    for mixed in np.random.default_rng(0).permuted(windows, axis=1).tolist():
        sums["mixed"] += len(model.lzw.encode_known(mixed, Decoder(model.lzw)))
    size = sum(n_bytes(world, window) for window in windows)
    return {
        "bpb": sums["nats"] / size / math.log(2),
        "ids_per_base": sums["ids"] / windows.size,
        "ids_per_byte": sums["ids"] / size,
        "row_share": sums["rows"] / sums["ids"],
        "mixed_ids_per_byte": sums["mixed"] / size,
    }


def measure_generation(model, world, args):
    """Free generation from held-out prompts: are hypertokens used, names and numbers copied?"""
    quarter = args.block_size // 4
    prompts = world.windows("heldout", 1, args.samples)[:, : 2 * quarter].tolist()
    began = time.perf_counter()
    texts = generate(model, prompts, quarter, temperature=0.8, seed=world.seed)
    seconds = time.perf_counter() - began
    written = [list(itertools.chain(*text)) for text in texts]
    rows = sum(len(word) > 1 for word in itertools.chain(*texts))
    found = {
        "gen_row_share": rows / (len(texts) * quarter),
        "gen_ids_per_base": len(texts) * quarter / sum(map(len, written)),
        "gen_ms_per_byte": 1e3 * seconds / sum(n_bytes(world, ids) for ids in written),
    }
    return found if args.model else found | measure_copying(model, world, prompts, written)


def measure_copying(model, world, prompts, written):
    """In the toy: shares of written names that the prompt has, of digits said right again."""
    copied = []
    for prompt, ids in zip(prompts, written):
        known = world.names(prompt)
        copied += [name in known for name in world.names(ids)]
    rng, w = random.Random(world.seed), world.word
    numbers = [rng.choices(world.digits, k=8) for _ in prompts]
    asked = []
    for prompt, number in zip(prompts, numbers):
        asked.append([*prompt[:-12], w["."], w["number"], *number, w["again"]])
    right = []
    for text, number in zip(generate(model, asked, 8), numbers):
        right += [a == b for a, b in zip(itertools.chain(*text), number)]
    names = float(np.mean(copied)) if copied else 0.0
    return {"names_copied": names, "digits_copied": float(np.mean(right))}


# ------------------------------------------------------------------------- claims, figure and main


def judge(run, found):
    """The paper's claims, each beside the controls that must fail the same criterion."""
    zipped, plain = found["zip"], []
    for cont, base in zip(found["cont"], found["base"]):
        plain.append(cont | {"best": min(cont["bpb"], base["bpb"])})
    shuffled = [row | {"bpb": row["bpb_shuffled"]} for row in zipped]
    mixed = [row | {"ids_per_byte": row["mixed_ids_per_byte"]} for row in zipped]
    toy = not run.args.model

    says = "little cost: bits per byte beside the better of base model and LoRA on plain ids"
    cost, controls = "arm.bpb <= 1.2 * base.best", {"rows shuffled": shuffled}
    if toy:
        controls["mean of embeddings"] = found["avg"]
    run.claim("C2", says, "1.08 to 1.15 times", cost, base=plain, arm=zipped, controls=controls)
    if toy:
        says = "the encoder does it: at most half the cost that fixed random rows have"
        half = "arm.bpb - base.best <= .5 * (base.rand - base.best)"
        both = [row | {"rand": rand["bpb"]} for row, rand in zip(plain, found["rand"])]
        controls = {"rows shuffled": shuffled}
        run.claim("C3", says, "-", half, base=both, arm=zipped, controls=controls)

        says = "hypertokens are written, and names copied as well as by cont"
        written = "arm.gen_row_share >= .1 and arm.gen_ids_per_base <= .9"
        written += " and arm.names_copied >= base.names_copied - .05"
        paper, controls = "ids .77 to .92 of base ids", {"random rows": found["rand"]}
        run.claim("C4", says, paper, written, base=plain, arm=zipped, controls=controls)

    says = "fewer ids, so fewer passes, per byte of the same text"
    fewer, controls = "arm.ids_per_byte <= .85 * base.ids_per_byte", {"ids in random order": mixed}
    run.claim("C5", says, "-15 to -40 %", fewer, base=plain, arm=zipped, controls=controls)
    if toy:
        says = "the transported base model (theorem 2.1): no bit lost, probabilities add up to 1"
        exact, base = "arm.lost <= 1e-4 and arm.mass <= 1e-4", found["base"]
        controls = {"without the factors": [row | {"mass": row["mass_alone"]} for row in base]}
        run.claim("C6", says, "0", exact, arm=base, controls=controls)

        says = "numbers are copied as well as by cont if digits are never merged"
        copied = "arm.digits_copied >= base.digits_copied - .1"
        paper, controls = "GSM8K .36 -> .61 (a later model)", {"digits merged": zipped}
        run.claim("C7", says, paper, copied, base=plain, arm=found["digits"], controls=controls)


def show(run):
    """Prints what the trained model writes behind --prompt, rows in colour; and its cost."""
    args, env = run.args, run.env
    seed, n = args.seeds[0], args.block_size // 4
    path = run.out / f"zip-s{seed}.pt"
    with common.bad_input("--prompt"):
        if not path.exists():
            raise ValueError(f"there is no {path} yet: train without --prompt first")
        saved = common.load_checkpoint(path)
        common.check_flags(saved["flags"], args, path)
        base, world = start(args, env, seed)
        ids = world.windows("heldout", 3, 1)[0][: args.block_size // 2].tolist()
        if args.prompt != "heldout":
            ids = world.tok.encode(args.prompt, bos=True)
        if len(ids) + n > base.config.block_size:
            raise ValueError(f"{len(ids)} ids, allowed: {base.config.block_size - n}")
    plain, zipped = (build(args, base, world, arm).eval() for arm in ("cont", "zip"))
    zipped.load_state_dict(saved["model"])
    print(data.printable(world.decode(ids)), end="")
    for name, model in ("zip2zip", zipped), ("the base model", plain):
        began = time.perf_counter()
        (text,) = generate(model, [ids], n)
        seconds = time.perf_counter() - began
        print(f"\n--- {name}:")
        for word in text:
            print(paint(world.decode(word), len(word)), end="")
        size = sum(map(len, text))
        passes = f"{n} passes for {size} base ids: {n / size:.2f} each"
        print(f"\n{passes}, {1e3 * seconds / size:.1f} ms")


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    width = args.enc_dim % args.enc_heads
    text = args.dataset != "stdlib" or args.prompt not in ("", "heldout")
    needs = "--dataset, and a --prompt other than `heldout`, need --model: the toy has its own text"
    return [
        (width, f"--enc-dim {args.enc_dim} is no multiple of --enc-heads {args.enc_heads}"),
        (text and not args.model, needs),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2506.01084", check)
    args = run.args
    if args.prompt:
        return show(run)
    with common.bad_input(), common.rank_zero_first(run.env):
        start(args, run.env, args.seeds[0], trained=False)  # tokenizes a real text
    base = run.each(train_base, ["base"])
    found = run.each(train_arm, ["cont", "zip"] if args.model else ARMS)
    if found is None:
        return None
    found = base | found
    judge(run, found)
    points = {}
    for arm, rows in found.items():
        points[arm] = [row["ids_per_base"] for row in rows], [row["bpb"] for row in rows]
    axes = dict(xlabel="ids per base id", ylabel="bits per byte")
    panel = dict(title="Held-out text, a point a seed", points=points, **axes)
    common.panels(run.out / "zip2zip.png", [panel])
    for name in "cont", "zip":
        speed = np.mean([row["gen_ms_per_byte"] for row in found[name]])
        print(f"{name} writes a byte in {speed:.2f} ms ({args.samples} texts at once)")
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
