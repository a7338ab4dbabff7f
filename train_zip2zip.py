"""zip2zip (arXiv 2506.01084): a language model whose vocabulary grows with the text before it.

LZW (lzw_tokenizer.py) merges what repeats in a text into new ids, *rows*, of up to M base ids. A
hyper-encoder makes a row's input embedding and output vector from the embeddings of its base ids:
so the model reads and writes ids that nobody has trained. Encoder and LoRA learn from the loss.

The arms: `cont` reads plain ids, `zip` compressed ones; in the toy also `digits`, where digits are
never merged, `rand` with random vectors, `avg` with mean ones.
"""

import copy
import itertools
import math
import random
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import common
import data
import pretrained
from lzw_tokenizer import LZW, Decoder, paint
from model import GPT, GPTConfig, KVCache, padded, sample


@dataclass
class Args(common.TrainFlags):
    """zip2zip"""

    presets: ClassVar[dict] = {
        "smoke": dict(pretrain_steps=6, steps=4, warmup=2, save_every=3, jobs=1)
        | dict(enc_dim=16, block_size=64, samples=4, batch_size=4),
        "toy": {},
        "real": dict(model="smollm2-135m-instruct", block_size=512, batch_size=2, steps=40)
        | dict(warmup=6, lr=1.5e-3, lora_r=16, enc_dim=192, samples=16, save_every=20),
        "paper": dict(model="microsoft/Phi-3.5-mini-instruct", dataset="epfl-dlab/zip2zip-1B")
        | dict(block_size=4096, max_codes=2048, max_len=4, lora_r=32, enc_dim=3072, enc_heads=32)
        | dict(enc_layers=2, steps=8000, batch_size=16, micro_batch=1, lr=3e-4, min_lr=1 / 30)
        | dict(warmup=800, weight_decay=0.01),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {"block_size": (32,), "samples": (1,)}
    limits |= dict.fromkeys("max_len max_codes enc_layers enc_dim enc_heads lora_r".split(), (1,))
    limits |= {"pretrain_steps": (1,)}
    unused: ClassVar[set] = {"shard", "eval_every"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"prompt", "samples"}

    steps: int = 200
    batch_size: int = 8
    lr: float = 3e-3
    warmup: int = 10
    model: str = ""  # a real model to adapt (paper: Phi-3.5-mini); none: the toy
    dataset: str = "stdlib"  # text for --model: stdlib, file:PATH, a `datasets` id
    prompt: str = ""  # a text, or `heldout`, that the model trained in --out continues
    max_len: int = 3  # M, base ids of a row (paper: 3 or 4)
    max_codes: int = 1024  # N, rows of a sequence (paper: the window)
    enc_layers: int = 1  # layers of the hyper-encoder (paper: 2)
    enc_dim: int = 64  # width of the hyper-encoder (paper: the model's)
    enc_heads: int = 2  # heads of the hyper-encoder (paper: 32)
    lora_r: int = 8  # rank of LoRA; its scale is 2 (paper: rank 32, scale 1)
    pretrain_steps: int = 350  # steps of the toy's base model
    samples: int = 24  # held-out windows, and prompts, of each measure
    block_size: int = 256  # window in base ids (paper: 1024 or 2048 codes)


class LoRA(nn.Module):
    """A frozen linear layer plus 2 B A x; B is zero at first."""

    def __init__(self, linear, r):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype))
        return self.linear(x) + 2 * F.linear(low, self.B.to(x.dtype))


def add_lora(gpt, r):
    """Freezes a GPT and puts LoRA around the linear layers of its blocks."""
    gpt.requires_grad_(False)
    for block in gpt.blocks:
        for part in block.attn, block.mlp:
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LoRA(layer, r))
    return gpt


class HyperEncoder(nn.Module):
    """What rows of embeddings e (R, M, C) add on the ways in and out, (R, C)."""

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
        x = (self.norm(x) * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return [head(x) for head in self.heads]


class Zip(nn.Module):
    """A GPT with compressed ids: z < V is the base id z, V + k the row k."""

    def __init__(self, gpt, lzw, args, arm):
        super().__init__()
        self.gpt, self.blocks = gpt, gpt.blocks  # compiled by common.train
        self.config, C = gpt.config, gpt.config.n_embd
        self.lzw, self.arm = lzw, arm
        self.size_in = gpt.wte.weight.float().square().mean().sqrt().item()
        self.size_out = gpt.head.weight.float().square().mean().sqrt().item()
        if arm in ("zip", "digits"):
            self.encoder = HyperEncoder(C, lzw.max_len, args)
        if arm == "rand":  # a fixed vector of an embedding's size for each row
            draw = torch.Generator().manual_seed(1)
            self.register_buffer("fixed", torch.randn(lzw.max_codes, C, generator=draw))

    def state_dict(self):
        """What learns: LoRA and the encoder."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state):
        super().load_state_dict(super().state_dict() | state)

    def encode(self, rows, k=None):
        """Vectors (R, C), in and out, of rows (R, M); k: their numbers."""
        real, ids = rows >= 0, rows.clamp(min=0)
        e = F.embedding(ids, self.gpt.wte.weight)
        w = F.embedding(ids, self.gpt.head.weight)
        length = real.sum(1, keepdim=True)
        if self.arm == "rand":
            vin, vout = self.fixed[k] * self.size_in, self.fixed[k] * self.size_out
        elif self.arm in ("avg", "cont") or len(rows) == 0:
            vin, vout = [(x * real[..., None]).sum(1) / length for x in (e, w)]
        else:
            more_in, more_out = self.encoder(e.float() / self.size_in, real)
            vin = e[torch.arange(len(rows)), length[:, 0] - 1] + self.size_in * more_in
            vout = w[:, 0] + self.size_out * more_out
        return vin * self.config.embed_scale, vout

    def encode_all(self, rows, shuffle=False):
        """The same for a batch (B, K, M); shuffle: a row gets another's vectors."""
        B, K, _ = rows.shape
        if self.arm == "rand":
            return [v.expand(B, K, -1) for v in self.encode(rows[0], torch.arange(K))]
        exists = rows[..., 0] >= 0
        distinct, where = torch.unique(rows[exists], dim=0, return_inverse=True)
        if shuffle:
            parts = where.split(exists.sum(1).tolist())
            where = torch.cat([part.roll(1 + len(part) // 2) for part in parts])
        index = torch.zeros_like(rows[..., 0])
        index[exists] = where
        return [vectors[index] for vectors in self.encode(distinct)]

    def hidden(self, idx, vin, mask=None, cache=None):
        """The normed residual stream (B, T, C) over compressed ids; vin (B, K, C)."""
        if vin.shape[1] == 0:
            return self.gpt.hidden(idx, mask, cache)
        row = (idx - self.config.vocab_size)[..., None]
        own = vin.gather(1, row.clamp(min=0).expand(-1, -1, vin.shape[-1]))
        own = own.to(self.gpt.wte.weight.dtype)
        with self.gpt.patch({"embed": partial(torch.where, row >= 0, own)}):
            return self.gpt.hidden(idx.masked_fill(row[..., 0] >= 0, 0), mask, cache)

    def logits(self, h, vout, known):
        """Scores (B, T, V + K); rows from `known` (B, T) on don't exist yet: -inf."""
        scores, c = self.gpt.unembed(h).float(), self.config
        own = (h @ vout.transpose(1, 2).to(h.dtype)).float() * c.logit_scale
        if c.logit_softcap:
            own = c.logit_softcap * torch.tanh(own / c.logit_softcap)
        row = torch.arange(own.shape[-1], device=h.device)
        return torch.cat((scores, own.masked_fill(row >= known[..., None], -torch.inf)), -1)

    def forward(self, idx, targets, known, rows, denom=1, shuffle=False):
        """The ordinary loss of the next id: the sum of -log p / denom."""
        vin, vout = self.encode_all(rows, shuffle)
        scores = self.logits(self.hidden(idx, vin), vout, known).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), reduction="sum") / denom


def pack(lzw, windows):
    """A batch for `Zip` of windows of ids, padded on the right.

    idx, targets  (B, T) codes, and the code behind each (-100: none)
    known         (B, T) how many rows there are after each code
    rows          (B, K, M) base ids of all rows of a window, -1 where there is none
    """
    parts = []
    for window in windows:
        decoder = Decoder(lzw)
        codes = torch.tensor(lzw.encode_known([int(a) for a in window], decoder))
        known = torch.tensor(decoder.counts)
        parts.append((codes[:-1], codes[1:], known[:-1], as_tensor(decoder.rows, lzw.max_len)))
    idx, targets, known, rows = zip(*parts)
    return {
        "idx": pad_sequence(idx, True),
        "targets": pad_sequence(targets, True, -100),
        "known": pad_sequence(known, True),
        "rows": pad_sequence(rows, True, -1),
    }


def as_tensor(words, M):
    """Rows, tuples of base ids, as a tensor (R, M) with -1 on the right."""
    filled = [word + (-1,) * (M - len(word)) for word in words]
    return torch.tensor(filled, dtype=torch.long).view(-1, M)


@torch.inference_mode()
def generate(model, prompts, n, temperature=0.0, seed=0):
    """Continues prompts by n codes; returns for each a list of words, the base ids of a code."""
    lzw, c = model.lzw, model.config
    device, dtype = model.gpt.wte.weight.device, model.gpt.wte.weight.dtype
    decoders = [Decoder(lzw) for _ in prompts]
    codes = [lzw.encode_known(prompt, decoder) for prompt, decoder in zip(prompts, decoders)]
    most = min(lzw.max_codes, n * lzw.max_len + max(len(d.rows) for d in decoders))  # rows
    vectors = torch.zeros(2, len(prompts), most, c.n_embd, device=device, dtype=dtype)
    cache = KVCache(c, len(prompts), max(map(len, codes)) + n, device, dtype)
    rng = torch.Generator(device).manual_seed(seed)
    idx, mask = padded(codes, device)
    n_rows = [0] * len(prompts)
    texts = [[] for _ in prompts]
    with model.gpt.eager():
        for _ in range(n):
            new = []  # rows since the last step
            for b, decoder in enumerate(decoders):
                new += [(b, k) for k in range(n_rows[b], len(decoder.rows))]
                n_rows[b] = len(decoder.rows)
            if new:
                rows = as_tensor([decoders[b].rows[k] for b, k in new], lzw.max_len).to(device)
                b, k = torch.tensor(new, device=device).T
                vectors[:, b, k] = torch.stack(model.encode(rows, k)).to(dtype)
            h = model.hidden(idx, vectors[0], mask, cache)[:, -1:]
            known = torch.tensor(n_rows, device=device)[:, None]
            idx = sample(model.logits(h, vectors[1], known)[:, 0], temperature, rng=rng)
            for decoder, text, code in zip(decoders, texts, idx[:, 0].tolist()):
                text.append(decoder.push(code)[0])
            mask = None
    return texts


def transported(lzw, logp, ids):
    """-log p of every code but the first under the *transported* base model (theorem 2.1).

    logp (n, V): the base model's log p of the id after ids[:1], ids[:2], ..., ids

        p(code) = P(its base ids) * P(no id follows with which LZW would have gone on)
                  / the latter of the code before

    Returns (n_codes - 1, 2): as here, and without the two factors.
    """
    decoder, out, V = Decoder(lzw), [], lzw.vocab_size
    place = before = 0
    for code in lzw.encode(ids):
        word, _ = decoder.push(code)
        extends = [key % V for key in decoder.table if key // V == code]  # with which LZW goes on
        own = sum(logp[place - 1 + j, a].item() for j, a in enumerate(word))
        place += len(word)
        after = math.log1p(-logp[place - 1, extends].exp().sum().item())
        out.append((before - after - own, -own))
        before = after
    return torch.tensor(out[1:], dtype=torch.float64)


def total_probability(lzw, predict, ids):
    """What p of all codes that may follow base ids adds up to: 1; (2,), as above."""
    codes, decoder = lzw.encode(ids), Decoder(lzw)
    for code in codes:
        word, _ = decoder.push(code)
    words = [*((a,) for a in range(lzw.vocab_size)), *decoder.rows, (*word, word[0])]
    texts = [[*ids, *word] for word in dict.fromkeys(words)]
    texts = [text for text in texts if lzw.encode(text)[:-1] == codes]  # cut so by LZW
    longest = max(map(len, texts))
    logp = predict(torch.tensor([text + [0] * (longest - len(text)) for text in texts]))
    return sum(torch.exp(-transported(lzw, row, text)[-1]) for row, text in zip(logp, texts))


@torch.no_grad()
def theory(gpt, lzw, world, n, device):
    """On held-out windows: bits per byte lost, and how far all p are from 1."""

    def predict(idx):  # (R, T) -> log-probabilities (R, T, V) of the next id
        return gpt(idx.to(device)).double().log_softmax(-1).cpu()

    lost = size = 0
    off = []
    for window in world.windows("heldout", 0, n):
        ids = [*window[:-1].tolist(), world.stops[0]]
        logp = predict(torch.tensor([ids]))[0]
        plain = -logp[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        lost += abs(transported(lzw, logp, ids)[:, 0].sum().item() - plain)
        size += len(world.decode(ids[1:]).encode())
        off.append((total_probability(lzw, predict, ids[: len(ids) // 3]) - 1).abs())
    mass, alone = torch.stack(off).amax(0).tolist()
    return {"lost": lost / size / math.log(2), "mass": mass, "mass_alone": alone}


WORDS = """ sees likes helps finds calls pays meets thanks
house river garden market road bridge school tower boat is near the of and with number again"""


class Synth:
    """A language of 188 ids: documents with six names each, and numbers.

    Names come as often as 1 / rank; numbers are said twice.
    Id 0 opens a document.
    """

    def __init__(self, args, seed):
        tails = ["".join(pair) for pair in itertools.product("bcdfghklmnprstz", "aeiou")]
        spaced = [f" {text}" for text in tails + WORDS.split()]
        digits = [f" {digit}" for digit in range(10)]
        self.text = ["", *tails, *spaced, ".", "\n", *digits]  # of ids 0 to 187, in parts:
        self.tail, self.head = range(1, 76), range(76, 151)
        self.verbs, self.nouns = range(151, 159), range(159, 168)
        self.word = {self.text[i].strip(" "): i for i in range(168, 178)}
        self.stops, self.digits = [0], range(178, 188)
        self.length, self.seed = args.block_size, seed

    def sentence(self, rng, names, liked):
        """A sentence's ids; 70 % are of the two forms that a document likes."""
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
        """Windows (n, length + 1): documents of this step, or held-out ones."""
        rng = random.Random(f"{self.seed} {split} {step}")
        return np.array([self.document(rng) for _ in range(n)])

    def decode(self, ids):
        return "".join(self.text[i] for i in ids)

    def names(self, ids):
        """The names in ids; those at the ends may be cut, and don't count."""
        kinds = dict.fromkeys(self.head, "h") | dict.fromkeys(self.tail, "t")
        letters = "".join(kinds.get(a, " ") for a in ids)
        found = re.finditer("(?<=.)ht+(?=[ h])", letters)
        return [tuple(ids[m.start() : m.end()]) for m in found]


class Text:
    """Windows of a real text in a real model's ids."""

    def __init__(self, args, tok, seed):
        self.tok, self.length, self.seed = tok, args.block_size, seed
        needed = args.steps * args.batch_size * (args.block_size + 1)
        limit = None if data.is_local(args.dataset) else needed
        folder, self.tokens = f"{args.out}/tokens", {}
        for split in "train", "heldout":
            self.tokens[split] = data.token_file(args.dataset, split, tok, folder, limit)
            self.windows(split, 0, 1)  # a ValueError if the text is too short
        self.stops = tok.stops
        self.digits = [i for i in range(tok.n_vocab) if any(map(str.isdigit, tok.decode([i])))]

    def windows(self, split, step, n):
        rng = np.random.default_rng([self.seed, split == "heldout", step])
        return data.windows(self.tokens[split], rng, n, self.length + 1)

    def decode(self, ids):
        return self.tok.decode([int(i) for i in ids])


def start(args, env, seed, trained=True):
    """The model where all arms start, and its world."""
    if args.model:
        gpt, tok = pretrained.load(args.model, env.device, env.dtype)
        if args.block_size > gpt.config.block_size:
            raise ValueError(f"--block-size {args.block_size}, allowed: {gpt.config.block_size}")
        return gpt, Text(args, tok, seed)
    world = Synth(args, seed)
    torch.manual_seed(seed)
    # smear_keys: names are copied sooner
    shape = dict(n_layer=3, n_head=4, n_embd=96, norm="rms", tie=True, smear_keys=True)
    gpt = GPT(GPTConfig(len(world.text), 2 * args.block_size, **shape)).to(env.device)
    if trained:
        gpt.load_state_dict(common.load_checkpoint(f"{args.out}/base-s{seed}.pt")["model"])
    return gpt, world


def train_base(args, env, log, arm, seed):
    """Trains the toy's base model on plain ids, and tests the theorem on it."""
    gpt, world = start(args, env, seed, trained=False)

    def batch(step):
        x = world.windows("train", step, args.batch_size)[env.rank :: env.world]
        x = torch.from_numpy(x)
        return {"idx": x[:, :-1], "targets": x[:, 1:]}

    own = replace(args, steps=args.pretrain_steps, lr=4e-3)
    common.train(gpt, batch, own, env, log)
    lzw = build(args, gpt, world, "zip").lzw
    return theory(gpt.eval(), lzw, world, min(4, args.samples), env.device)


def build(args, base, world, arm):
    """The model of an arm around the base model, whose weights it shares."""
    disabled = list(world.stops)
    if args.model or arm == "digits":
        disabled += world.digits
    rows = 0 if arm == "cont" else args.max_codes
    lzw = LZW(base.config.vocab_size, rows, args.max_len, disabled)
    torch.manual_seed(world.seed)  # LoRA starts the same in all
    shared = {id(p): p for p in base.parameters()}  # what deepcopy does not copy
    gpt = add_lora(copy.deepcopy(base, shared), args.lora_r)
    return Zip(gpt, lzw, args, arm).to(base.wte.weight.device)


def train_arm(args, env, log, arm, seed):
    """Goes on from the base model in one arm, and measures it."""
    gpt, world = start(args, env, seed)
    model = build(args, gpt, world, arm)

    def batch(step):
        windows = world.windows("train", 10**6 + step, args.batch_size)  # none of the base model's
        return pack(model.lzw, windows[env.rank :: env.world])

    before = bits_per_byte(model.eval(), world, args, env)["bpb"]  # of `cont`: the base model
    common.train(model.train(), batch, args, env, log)
    found = {"bpb_before": before} | bits_per_byte(model.eval(), world, args, env)
    if arm == "zip":
        found["bpb_shuffled"] = bits_per_byte(model, world, args, env, shuffle=True)["bpb"]
    with env.autocast():
        return found | measure_generation(model, world, args)


@torch.no_grad()
def bits_per_byte(model, world, args, env, shuffle=False):
    """On held-out windows: bits per byte, and ids per base id and per byte."""
    windows = world.windows("heldout", 0, args.samples)
    nats = ids = mixed_ids = 0
    for part in np.array_split(windows, max(1, args.samples // 4)):
        batch = {name: value.to(env.device) for name, value in pack(model.lzw, part).items()}
        with env.autocast():
            nats += model(**batch, shuffle=shuffle).item()
        ids += (batch["targets"] >= 0).sum().item()
    windows = windows[:, 1:]  # next, a control: in random order
    for mixed in np.random.default_rng(0).permuted(windows, axis=1).tolist():
        mixed_ids += len(model.lzw.encode_known(mixed, Decoder(model.lzw)))
    size = sum(len(world.decode(window).encode()) for window in windows)
    return {
        "bpb": nats / size / math.log(2),
        "ids_per_base": ids / windows.size,
        "ids_per_byte": ids / size,
        "mixed_ids_per_byte": mixed_ids / size,
    }


def measure_generation(model, world, args):
    """Writes on from prompts: are rows used, names and numbers copied?"""
    n = args.block_size // 4
    prompts = world.windows("heldout", 1, args.samples)[:, : 2 * n].tolist()
    texts = generate(model, prompts, n, temperature=0.8, seed=world.seed)
    words = list(itertools.chain(*texts))
    written = [list(itertools.chain(*text)) for text in texts]
    found = {
        "gen_row_share": sum(len(word) > 1 for word in words) / len(words),
        "gen_ids_per_base": len(words) / sum(map(len, words)),
    }
    return found if args.model else found | measure_copying(model, world, prompts, written)


def measure_copying(model, world, prompts, written):
    """Shares of written names that are the prompt's, and of digits said right."""
    copied = []
    for prompt, ids in zip(prompts, written):
        known = world.names(prompt)
        copied += [name in known for name in world.names(ids)]
    rng, w = random.Random(world.seed), world.word
    numbers = [rng.choices(world.digits, k=8) for _ in prompts]
    asked = []
    for prompt, number in zip(prompts, numbers):
        asked.append([*prompt[:-12], w["."], w["number"], *number, w["again"]])  # about as long
    right = []
    for text, number in zip(generate(model, asked, 8), numbers):
        right += [a == b for a, b in zip(itertools.chain(*text), number)]
    shares = {"names_copied": copied, "digits_copied": right}
    return {name: sum(share) / max(1, len(share)) for name, share in shares.items()}


def judge(run, found):
    """The paper's claims, each with controls that must fail its criterion."""
    zipped = found["zip"]
    plain = [row | {"best": min(row["bpb"], row["bpb_before"])} for row in found["cont"]]
    shuffled = [row | {"bpb": row["bpb_shuffled"]} for row in zipped]
    controls = {"rows shuffled": shuffled}
    if not run.args.model:
        controls["mean of embeddings"] = found["avg"]
    says = "little cost: bits per byte beside the better of base model and cont"
    rule, paper = "arm.bpb <= 1.2 * base.best", "1.08 to 1.15 times"
    run.claim("C2", says, paper, rule, base=plain, arm=zipped, controls=controls)
    says = "fewer ids, so fewer passes, per byte of the same text"
    rule = "arm.ids_per_byte <= .85 * base.ids_per_byte"
    mixed = [row | {"ids_per_byte": row["mixed_ids_per_byte"]} for row in zipped]
    controls = {"ids in random order": mixed}
    run.claim("C5", says, "-15 to -40 %", rule, base=plain, arm=zipped, controls=controls)
    if run.args.model:
        return
    says = "the encoder does it: at most half the cost of random rows"
    rule = "arm.bpb - base.best <= .5 * (base.rand - base.best)"
    both = [row | {"rand": rand["bpb"]} for row, rand in zip(plain, found["rand"])]
    run.claim("C3", says, "-", rule, base=both, arm=zipped, controls={"rows shuffled": shuffled})
    says = "hypertokens are written, and names copied as well as by cont"
    rule = "arm.gen_row_share >= .1 and arm.gen_ids_per_base <= .9"
    rule += " and arm.names_copied >= base.names_copied - .05"
    paper, controls = "ids .77 to .92 of base ids", {"random rows": found["rand"]}
    run.claim("C4", says, paper, rule, base=plain, arm=zipped, controls=controls)
    says = "transported base model (theorem 2.1): no bit lost, all p add up to 1"
    rule, base = "arm.lost <= 1e-4 and arm.mass <= 1e-4", found["base"]
    controls = {"without the factors": [row | {"mass": row["mass_alone"]} for row in base]}
    run.claim("C6", says, "0", rule, arm=base, controls=controls)
    says = "numbers are copied as well as by cont if digits are never merged"
    rule = "arm.digits_copied >= base.digits_copied - .1"
    paper, controls = "GSM8K .36 -> .61 (a later model)", {"digits merged": zipped}
    run.claim("C7", says, paper, rule, base=plain, arm=found["digits"], controls=controls)


def show(run):
    """Prints what the model writes behind --prompt, in colour."""
    args, seed = run.args, run.args.seeds[0]
    n, path = args.block_size // 4, run.out / f"zip-s{seed}.pt"
    saved = common.load_checkpoint(path)
    common.check_flags(saved["flags"], args, path)
    base, world = start(args, run.env, seed)
    ids = world.windows("heldout", 3, 1)[0][: 2 * n].tolist()
    if args.prompt != "heldout":
        ids = world.tok.encode(args.prompt, bos=True)
    print(data.printable(world.decode(ids)))
    plain = build(args, base, world, "cont").eval()
    zipped = build(args, base, world, "zip").eval()
    zipped.load_state_dict(saved["model"])
    for name, model in ("zip2zip", zipped), ("the base model", plain):
        (text,) = generate(model, [ids], n)
        size = sum(map(len, text))
        print(f"--- {name}: {n} passes for {size} base ids, {n / size:.2f} each")
        pieces = data.whole_characters(text, world.decode)
        print("".join(paint(piece, len(text[i])) for piece, i in pieces))


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    idle = common.changed_flags(args, ["pretrain_steps"])
    real = args.dataset != "stdlib" or args.prompt not in ("", "heldout")
    return [
        (args.enc_dim % args.enc_heads, f"--enc-dim is no multiple of {args.enc_heads} heads"),
        (real and not args.model, "--dataset and a --prompt but `heldout` need --model"),
        (idle and args.model, f"{idle}: no effect with --model"),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2506.01084", check)
    args = run.args
    if args.prompt:
        with common.bad_input("--prompt"):
            return show(run)
    with common.bad_input(), common.rank_zero_first(run.env):
        start(args, run.env, args.seeds[0], trained=False)  # tokenizes a real text
    base = {} if args.model else run.each(train_base, ["base"])
    arms = "cont zip" if args.model else "cont zip rand avg digits"
    found = run.each(train_arm, arms.split())
    if found is None:
        return None
    points = {}
    for arm, rows in found.items():
        points[arm] = [row["ids_per_base"] for row in rows], [row["bpb"] for row in rows]
    panel = {"points": points, "title": "Held-out text, a point a seed"}
    panel |= {"xlabel": "ids per base id", "ylabel": "bits per byte"}
    common.panels(run.out / "zip2zip.png", [panel])
    found |= base
    judge(run, found)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
