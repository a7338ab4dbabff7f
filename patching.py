"""Separating tongue from thought (arXiv 2411.08745): language and concept can be patched apart.

`Français: "eau" - English: "` goes on with `water`. Where is *what* to say, and where *in which
language*? Put the residual stream of another prompt, the source, into this one, the target:

1. The last token, after one block. Between early blocks (no change) and late ones (all that the
   source would say) comes the target's concept in the source's language: language is fixed first.
2. The last token of the word, from one block on. The concept changes, the language stays.
3. The same with a concept's mean over five languages: a latent is a sum, concept + language.

`--model gemma-3-270m` is a real model, the toy a GPT that learns invented words.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import data
import pretrained
from model import GPT, GPTConfig, generate, padded, residuals, sweep


@dataclass
class Args(common.TrainFlags):
    """patching"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=6, n_embd=16, n_layer=3, local=1, warmup=2, pairs=4, jobs=1),
        "toy": {},
        "paper": dict(model="meta-llama/Llama-2-7b-hf", quads=["de-it:fr-es"], pairs=200),
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | dict(pairs=(2,), shots=(0, 50), local=(0,))
    limits |= dict.fromkeys("k prompts n_layer n_embd".split(), (1,))
    unused: ClassVar[set] = {"shard", "eval_every"}
    may_change: ClassVar[set] = common.TrainFlags.may_change | {"quads", "pairs", "k", "prompts"}

    model: str = ""  # gemma-3-270m, a hub id, a folder; else the toy
    words: str = ""  # CSV for --model: a column a language, synonyms joined by |
    quads: list[str] = common.default_list()  # source:target, as de-it:fr-es [six]
    pairs: int = 20  # pairs of concepts for each of --quads (paper: 200)
    shots: int = 0  # examples in a prompt [toy: 3, --model: 5] (paper: 5)
    k: int = 5  # source languages in a mean latent (paper: 5)
    prompts: int = 16  # prompts in a batch of patched runs
    steps: int = 4500
    batch_size: int = 12
    lr: float = 4e-3
    weight_decay: float = 0.3
    local: int = 2  # first blocks that see only the previous token
    n_layer: int = 6  # the toy's blocks (paper: 32)
    n_embd: int = 64  # the toy's width (paper: 4096)


# ------- the method


@torch.no_grad()
def latents(model, prompts, size):
    """The residual stream of each prompt's last token, (L + 1, B, C)."""
    parts = []
    for start in range(0, len(prompts), size):
        idx, mask = padded(prompts[start : start + size], model.wte.weight.device)
        parts.append(residuals(model, idx, mask)[:, :, 0])
    return torch.cat(parts, 1)


def put(x, value):
    """Columns x (B, tail, C), the first replaced by value (B, C)."""
    return torch.cat((value[:, None].to(x), x[:, 1:]), 1)


def swap(z):
    """Experiment 1: latents z (L + 1, B, C), each after its block; -1: the embedding."""
    return [{j - 1: partial(put, value=z[j])} for j in range(len(z))]


def hold(z):
    """Experiments 2 and 3: the latents after one block and all later ones."""
    every = [(j - 1, partial(put, value=z[j])) for j in range(len(z))]
    return [dict(every[j:]) for j in range(len(z))]


@torch.no_grad()
def patched(model, prompts, answers, tail, patch, z, size):
    """What is said under each patch: {name: P(answer) (B, L + 1, A)}.

    answers  for each prompt A sets of words; a word is a tuple of tokens, all of one length
    tail     the patched column, counted from the end: 1 is the last token
    patch    swap or hold, which puts z: {name: latents (L + 1, B, C)}
    """
    rows = {}  # (prompt, tokens forced) -> [(answer, token read), ...]
    for b, options in enumerate(answers):
        for a, words in enumerate(options):
            for word in words:
                rows.setdefault((b, word[:-1]), []).append((a, word[-1]))
    keys = sorted(rows)
    extra = len(keys[0][1])
    p = torch.zeros(len(prompts), sum(map(len, z.values())), len(answers[0]))
    for start in range(0, len(keys), size):
        some = keys[start : start + size]
        longer = [[*prompts[b], *forced] for b, forced in some]
        idx, mask = padded(longer, model.wte.weight.device)
        which = [b for b, _ in some]
        interventions = []
        for values in z.values():
            interventions += patch(values[:, which])
        h = sweep(model, idx, interventions, tail + extra, mask)
        for row, (b, forced) in zip(h[:, :, -extra - 1 :], some):
            logp = model.unembed(row).float().log_softmax(-1)  # (patches, 1 + extra, V)
            before = sum(logp[:, i, token] for i, token in enumerate(forced))
            for a, token in rows[b, forced]:
                p[b, :, a] += (before + logp[:, -1, token]).exp().cpu()
    return {name: part.numpy() for name, part in zip(z, p.chunk(len(z), 1))}


def switch_layers(p):
    """After which block the source's language, and its concept, are first likelier.

    p  (L + 1, 4), columns as `wanted` in `last_token`; row 0: the embedding, -1. Never: L
    """
    own, mixed, source, reverse = np.asarray(p).T
    language, concept = mixed + source > own + reverse, source + reverse > own + mixed
    found = []
    for won in language, concept:
        found.append(int(won.argmax()) - 1 if won.any() else len(won) - 1)
    return tuple(found)


# --- words and prompts

CODES = "en fr de es it nl pt fi tr et hi ja ko ru zh".split()
NAMES = "English Français Deutsch Español Italiano Nederlands Português Suomi Türkçe Eesti"
NAMES += " हिन्दी 日本語 한국어 Русский 中文"
LABELS = dict(zip(CODES, NAMES.split()))  # what prompts call a language
CONCEPTS = Path(__file__).with_name("concepts.csv")
REAL_QUADS = "fr-en:es-de es-en:nl-de it-en:fr-de nl-en:it-de it-de:nl-en es-de:fr-en".split()


def read_words(path):
    """{language: [the synonyms of each concept]} of a CSV file."""
    rows = data.read_table(path)
    if not rows:
        raise ValueError(f"{path} has no words")
    codes = [code for code in rows[0] if code != "category"]
    unknown = [code for code in codes if code not in LABELS]
    if unknown:
        raise ValueError(f"{path}: languages {unknown}, allowed: {', '.join(LABELS)}")
    words = {code: [] for code in codes}
    for i, row in enumerate(rows, 1):
        for code in codes:
            synonyms = [" ".join(word.split()) for word in row[code].split("|")]
            if not all(synonyms):
                raise ValueError(f"{path}, row {i}: a word is missing in column {code!r}")
            words[code].append(synonyms)
    return words


@dataclass
class World:
    """Words of several languages, and how prompts are made of them."""

    tok: object  # its `encode` makes ids of a text
    labels: dict  # language -> how prompts call it
    words: dict  # language -> [the synonyms of each concept]; prompts use the first
    held: dict = field(default_factory=dict)  # the toy: (from, to) -> concepts held out
    facts: list = ()  # the toy: three attributes of each concept

    def query(self, pair, row):
        """A line up to the last letter of the word to translate."""
        return f'{self.labels[pair[0]]}: "{self.words[pair[0]][row][0]}'

    def ask(self, pair, define=False):
        """What stands between that and the answer."""
        mark = "=" if define else "-"
        return f'" {mark} {self.labels[pair[1]]}: "'

    def said(self, code, row, define=False):
        """The answer: a word, or the attributes of a concept."""
        if define:
            return " ".join(f"{fact}.{code}" for fact in self.facts[row])
        return self.words[code][row][0]

    def line(self, pair, row, define=False):
        answer = self.said(pair[1], row, define)
        return self.query(pair, row) + self.ask(pair, define) + answer + '"\n'

    def tested(self, pair):
        """The concepts that experiments ask for in a pair of languages."""
        return self.held.get(pair) or list(range(len(self.words[pair[0]])))

    def known(self, pair):
        """The concepts that may be examples: not those held out."""
        held = self.held.get(pair, ())
        return [row for row in range(len(self.words[pair[0]])) if row not in held]

    def texts(self, rng, pair, rows, shots, define=False):
        """Prompts up to the query's last letter, each with its own examples."""
        texts = []
        for row in rows:
            others = [other for other in self.known(pair) if other != row]
            examples = ""
            for other in rng.choice(others, shots, replace=False):
                examples += self.line(pair, other, define)
            texts.append(examples + self.query(pair, row))
        return texts

    def ids(self, texts, rest=""):
        """Ids of prompts; columns of the word's last token and the rest."""
        prompts, columns = [], set()
        for text in texts:
            front = self.tok.encode(text, bos=True)
            whole = self.tok.encode(text + rest, bos=True)
            columns.add(len(whole) - len(front) + 1)
            if whole[: len(front)] != front or len(columns) > 1:
                word = text.rpartition('"')[2]
                raise ValueError(f"the tokenizer merges the end of {word!r} with what follows it")
            prompts.append(whole)
        return prompts, columns.pop()

    def answer(self, code, row, first=True):
        """A set for `patched`: first tokens of synonyms; of the toy's word the first, or all."""
        if self.facts:
            syllables = self.tok.encode(self.words[code][row][0])
            return {tuple(syllables[:1] if first else syllables)}
        words = self.words[code][row]
        words = words + [" " + word for word in words]
        return {(pretrained.first_token(self.tok, word),) for word in words}


def draw_pairs(world, rng, sources, targets, wanted, n, first=True):
    """n source and n target concepts, and the answers looked for in each pair.

    wanted  [(0 or 1: the source's or the target's concept, its language), ...]
    Where two answers share a word, the pair is skipped.
    """
    every = list(product(sources, targets))
    s, t, answers = [], [], []
    for i in rng.permutation(len(every)):
        pair = every[i]
        found = [world.answer(code, pair[whose], first) for whose, code in wanted]
        if pair[0] != pair[1] and not any(a & b for a, b in combinations(found, 2)):
            s.append(pair[0])
            t.append(pair[1])
            answers.append(found)
        if len(s) == n:
            return s, t, answers
    what = "pairs of concepts whose answers differ"
    raise ValueError(f"there are {len(s)} {what}, asked for: {n}")


# ---------- the toy

TOY = "b d f g k l m n p".split()  # languages: how syllables begin
VOWELS = "aeiouy", "aeiou"  # of both syllables
TOY_WORDS = len(VOWELS[0]) * len(VOWELS[1])  # in each language
TOY_QUADS = "b-d:f-k d-f:g-l f-g:k-m g-k:l-n k-l:m-p l-m:p-d".split()


class ToyTokenizer:
    """Marks, languages, attributes and syllables are one token each."""

    def __init__(self):
        names = ["<pad>", "<bos>", '"\n', ': "', '" - ', '" = ']
        for code in TOY:
            names.append(code.upper())
            names += [code + vowel for vowel in VOWELS[0]]
            for kind in "xyz":
                names += [f"{kind}{i}.{code}" for i in range(6)]
        self.number = {name: i for i, name in enumerate(names)}

    def encode(self, text, bos=False):
        parts = re.findall(r'"\n|: "|" - |" = |[xyz]\d\.\w|[A-Z]|[a-z][aeiouy]', text)
        start = ["<bos>"] if bos else []
        return [self.number[part] for part in start + parts]


def make_toy(seed):
    """Words, attributes, a quarter of the concepts held out of each pair."""
    rng = np.random.default_rng([seed, 1])
    words, held = {}, {}
    for i, code in enumerate(TOY):
        spelt = [code + a + code + b for a, b in product(*VOWELS)]
        words[code] = [[spelt[place]] for place in rng.permutation(TOY_WORDS)]
        for j, other in enumerate(TOY):
            if i != j:
                held[code, other] = [row for row in range(TOY_WORDS) if (row - i - j) % 4 == 0]
    facts = [(f"x{i}", f"y{j}", f"z{k}") for i, j, k in product(range(6), repeat=3)]
    facts = [facts[place] for place in rng.choice(len(facts), TOY_WORDS, replace=False)]
    return World(ToyTokenizer(), {code: code.upper() for code in TOY}, words, held, facts)


def document(world, rng):
    """Ids of a document of 3 to 5 lines, and which of them count in the loss.

    Most translate, some define (`B: "bube" = D: "x1.d y4.d z0.d"`), and some go on with the
    attributes right after the word.
    """
    kind = rng.choice(["translate", "define", "go on"], p=[0.6, 0.2, 0.2])
    a, b = rng.choice(TOY, 2)
    ids, counts = world.tok.encode("", bos=True), [0.0]
    for row in rng.choice(world.known((a, b)), rng.integers(3, 6), replace=False):
        query = world.query((a, b), row)
        if kind == "go on":
            line = query + world.said(a, row, define=True) + '"\n'
        else:
            line = world.line((a, b), row, kind == "define")
            query += world.ask((a, b), kind == "define")
        new, n = world.tok.encode(line), len(world.tok.encode(query))
        ids += new
        counts += [0.0] * n + [1.0] * (len(new) - n)
    return ids, counts


def batch(world, step, seed, args, env):
    """This rank's share of the documents of one step."""
    rng = np.random.default_rng([seed, 2, step])
    documents = [document(world, rng) for _ in range(args.batch_size)]
    idx = pad_sequence([torch.tensor(ids) for ids, _ in documents], True)
    counts = pad_sequence([torch.tensor(counts) for _, counts in documents], True)
    rows = slice(env.rank, None, env.world)
    return {"idx": idx[rows, :-1], "targets": idx[rows, 1:], "weights": counts[rows, 1:]}


def accuracy(model, world, seed, shots, n=400):
    """Share of n held-out translations that are right."""
    rng = np.random.default_rng([seed, 3])
    pairs = list(world.held)
    prompts, right = [], []
    for i in rng.integers(len(pairs), size=n):
        row = rng.choice(world.held[pairs[i]])
        texts = world.texts(rng, pairs[i], [row], shots)
        prompts += world.ids(texts, world.ask(pairs[i]))[0]
        right.append(world.tok.encode(world.said(pairs[i][1], row)))
    said = generate(model, prompts, 2, temperature=0)  # a word has two syllables
    return float(np.mean([a == b for a, b in zip(said, right)]))


# ---- experiments, claims and figure


def last_token(model, world, args, quad, seed):
    """Experiment 1: the source's last token in place of the target's. P (n, L + 1, 4)."""
    source, target = quad
    rng = np.random.default_rng([seed, 4])
    wanted = [(1, target[1]), (1, source[1]), (0, source[1]), (0, target[1])]
    rows = world.tested(source), world.tested(target)
    s, t, answers = draw_pairs(world, rng, *rows, wanted, args.pairs)
    of_source, _ = world.ids(world.texts(rng, source, s, args.shots), world.ask(source))
    of_target, _ = world.ids(world.texts(rng, target, t, args.shots), world.ask(target))
    z = latents(model, of_source, args.prompts)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
    noise = noise * z.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    z = {"source": z, "noise": noise}
    return patched(model, of_target, answers, 1, swap, z, args.prompts)


def word_token(model, world, args, quad, seed):
    """Experiments 2 and 3, and definitions: latents held at the target's word.

    Returns {experiment: {name: P (n, L + 1, 2) of the source's and target's concept}}.
    """
    source, target = quad
    code = target[1]
    rng = np.random.default_rng([seed, 5])
    # In the toy no text translates the source's word into this language.
    rows = world.tested((source[0], code)), world.tested(target)
    s, t, answers = draw_pairs(world, rng, *rows, [(0, code), (1, code)], args.pairs, False)
    strangers = []  # k concepts beside each s and t
    for pair in zip(s, t):
        others = [row for row in range(len(world.words[code])) if row not in pair]
        strangers.append(rng.choice(others, args.k, replace=False))

    def of(pair, rows):
        """Latents of the last tokens of concepts' words, (L + 1, n, C)."""
        prompts, _ = world.ids(world.texts(rng, pair, rows, args.shots))
        return latents(model, prompts, args.prompts)

    rest = [lang for lang in world.words if lang not in target]
    ring = zip(rest, rest[1:] + rest[:1])
    pairs = [source, *[pair for pair in ring if pair[0] != source[0]]]  # each input once
    singles = [of(pair, s) for pair in pairs[: args.k]]
    others = [of(pair, rows) for pair, rows in zip(pairs, zip(*strangers))]
    z = {f"single {i + 1}": single for i, single in enumerate(singles)}
    z["mean"] = torch.stack(singles).mean(0)
    z["mean of concepts"] = torch.stack([singles[0], *others[1:]]).mean(0)
    z["unrelated"] = others[0]
    prompts, tail = world.ids(world.texts(rng, target, t, args.shots), world.ask(target))
    found = {"translate": patched(model, prompts, answers, tail, hold, z, args.prompts)}
    if world.facts:
        texts = world.texts(rng, target, t, args.shots, define=True)
        prompts, tail = world.ids(texts, world.ask(target, define=True))
        answers = []
        for pair in zip(s, t):
            said = [world.tok.encode(world.said(code, row, define=True)) for row in pair]
            answers.append([{tuple(ids)} for ids in said])
        z = {name: z[name] for name in ("single 1", "mean", "mean of concepts", "unrelated")}
        found["define"] = patched(model, prompts, answers, tail, hold, z, args.prompts)
    return found


def study(model, world, args, quads, log, seed):
    """Curves by layer, numbers of the claims."""
    lists = {"last": {}, "translate": {}, "define": {}}  # {experiment: {what is put: [P]}}
    for text, quad in tqdm(quads.items(), log.run, leave=False):
        with common.bad_input(f"--quads {text}"):
            done = {"last": last_token(model, world, args, quad, seed)}
            done |= word_token(model, world, args, quad, seed)
        for experiment, arrays in done.items():
            for name, p in arrays.items():
                lists[experiment].setdefault(name, []).append(p)
    curves, parts = {}, {}
    for experiment, by_name in lists.items():
        parts[experiment] = {name: np.concatenate(p) for name, p in by_name.items()}
        curves[experiment] = {name: p.mean(0) for name, p in parts[experiment].items()}
    for layer, row in enumerate(curves["last"]["source"], -1):
        log(0 if args.model else args.steps, layer=layer, said=row.tolist())
    return {"curves": curves, "rows": measures(curves, parts["translate"])}


def measures(curves, translate):
    """What the claims compare: {what is put: {measure: number}}.

    Means and definitions are read where the single sources do best.
    """
    # After the last block a patch comes too late.
    rows = {"base": {"p": curves["translate"]["mean"][-1, 1]}}
    for name, p in curves["last"].items():
        language, concept = switch_layers(p)
        rows[name] = {"mixed": p[:, 1].max(), "language": language, "concept": concept}
    rows["last token"] = {"p": curves["last"]["source"][:, 3].max()}
    singles = [p[:, :, 0] for name, p in translate.items() if name.startswith("single")]
    one = np.mean(singles, 0)  # (n, L + 1)
    curves["translate"]["one source"] = one.mean(0)[:, None]
    best = 1 + int(one.mean(0)[1:].argmax())
    rows["one source"] = {"p": one[:, best].mean()}
    for name, p in translate.items():
        gain, low, high = common.interval(p[:, best, 0] - one[:, best])
        rows[name] = {"p": p[:, 1:, 0].mean(0).max(), "gain": gain, "low": low, "high": high}
    for name, p in curves["define"].items():
        rows[name] |= {"source": p[best, 0], "overwritten": p[best, 1]}
        rows["no patch"] = {"source": p[-1, 0], "overwritten": p[-1, 1]}
    return rows


def run_seed(quads, real, args, env, log, arm, seed):
    """Everything on `real`, a (model, world), or on a toy trained here."""
    if real:
        log.rewind(0)
        return study(*real, args, quads, log, seed)
    world = make_toy(seed)
    torch.manual_seed(seed)
    windows = [2] * args.local + [0] * (args.n_layer - args.local)  # tokens seen; 0: all
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    shape = len(world.tok.number), 256, args.n_layer, 4, args.n_embd
    model = GPT(GPTConfig(*shape, windows=windows, **plain))
    documents = partial(batch, world, seed=seed, args=args, env=env)
    common.train(model, documents, args, env, log)
    held_out = accuracy(model.eval(), world, seed, args.shots)
    return study(model, world, args, quads, log, seed) | {"held_out": held_out}


def judge(run, found):
    """The claims, and controls that must fail the same criterion."""
    rows = {name: [result["rows"][name] for result in found] for name in found[0]["rows"]}
    noise = {"noise of equal norm": rows["noise"]}
    says = "at the last token the language is fixed before the concept"
    paper = ".62, switches at 13 and 16 of 32"
    test = "arm.mixed >= .3 and arm.language < arm.concept"
    run.claim("T1", says, paper, test, arm=rows["source"], controls=noise)
    unrelated = {"unrelated concept": rows["unrelated"]}
    last = {"last token": rows["last token"]}
    says = "held at the word, the source's concept is said in the target's language"
    rule = "base.p >= .2 and arm.p >= .5 * base.p"
    both = dict(base=rows["base"], arm=rows["single 1"])
    run.claim("T2", says, ".35 of .75", rule, **both, controls=unrelated | last)
    mixed = {"mean of concepts": rows["mean of concepts"]}
    says = f"the mean over {run.args.k} languages does as well as one source (low: of its gain)"
    rule = "base.p >= .2 and arm.low >= -.02"
    both = dict(base=rows["one source"], arm=rows["mean"])
    run.claim("T3", says, ".45 against .35", rule, **both, controls=mixed)
    if "no patch" in rows:
        none = {"no patch": rows["no patch"]}
        says = "a mean latent is read out as a definition (P of its three attributes)"
        paper = "as good as the word itself"
        rule = "arm.source >= .6 and arm.overwritten <= .2"
        run.claim("T4", says, paper, rule, arm=rows["mean"], controls=unrelated | none)


def draw(path, found, title):
    """A panel for each experiment: probabilities by the block patched."""

    def curve(experiment, name, column=0):
        lines = [result["curves"][experiment][name][:, column] for result in found]
        return range(-1, len(lines[0]) - 1), lines

    names = "target's concept and language", "target's concept, source's language"
    names += "source's concept and language", "source's concept, target's language"
    last = {name: curve("last", "source", i) for i, name in enumerate(names)}
    names = "one source", "mean", "mean of concepts", "unrelated"
    word = {name: curve("translate", name) for name in names}
    levels = {"unpatched target": np.mean([result["rows"]["base"]["p"] for result in found])}
    items = [
        dict(title=f"{title}: last token, after one block", lines=last),
        dict(title="Held at the word: the source's concept", lines=word, levels=levels),
    ]
    if found[0]["curves"]["define"]:
        said = {"source's": curve("define", "mean"), "overwritten": curve("define", "mean", 1)}
        said["source's, unrelated latent"] = curve("define", "unrelated")
        items.append(dict(title="Mean latent: its definition", lines=said))
    for item in items:
        item |= dict(xlabel="block", ylabel="probability", ylim=(0, 1.05))
    common.panels(path, items)


def parse_quads(texts, words):
    """{text: (source pair, target pair)} of texts like de-it:fr-es."""
    quads = {}
    for text in texts:
        codes = tuple(re.split("[-:]", text))
        if len(codes) != 4 or len({*codes} & {*words}) < 4:
            needed = f"four different languages, as de-it:fr-es, of {', '.join(words)}"
            raise ValueError(f"--quads {text}, needed: {needed}")
        quads[text] = codes[:2], codes[2:]
    return quads


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    toy = {*common.TrainFlags.__annotations__, "resume", "local", "n_layer", "n_embd"}
    idle = common.changed_flags(args, toy if args.model else ["words"])
    return [
        (idle, f"{idle}: no effect {'with' if args.model else 'without'} --model"),
        (args.model and env.world > 1, "--model runs in one process"),
        (args.local > args.n_layer, f"--local {args.local}, allowed: 0 to {args.n_layer}"),
        (args.pairs > 30 and not args.model, "--pairs, allowed: 2 to 30 in the toy"),
        (args.n_embd % 8, f"--n-embd {args.n_embd}, allowed: multiples of 8"),
        (args.batch_size % env.world, f"--batch-size is no multiple of {env.world} processes"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2411.08745", check)
    args = run.args
    args.shots = args.shots or (5 if args.model else 3)
    real = None
    with common.bad_input():
        path = args.words or CONCEPTS
        world = World(None, LABELS, read_words(path)) if args.model else make_toy(0)
        words = world.words
        n = min(len(world.known(pair)) for pair in product(words, words))
        if n <= args.shots:
            raise ValueError(f"{n} words, needed: more than --shots {args.shots}")
        most = min(n, len(words)) - 2
        if args.k > most:
            raise ValueError(f"--k {args.k}, allowed: 1 to {most}")
        quads = parse_quads(args.quads or (REAL_QUADS if args.model else TOY_QUADS), words)
    if args.model:
        with common.bad_input("--model"):
            model, tok = pretrained.load(args.model, run.env.device, args.dtype)
        world.tok, real = tok, (model.eval(), world)
    name = Path(args.model).name or "toy"
    found = run.each(partial(run_seed, quads, real), [name])
    if found is None:
        return None
    judge(run, found[name])
    draw(run.out / "patching.png", found[name], name)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
