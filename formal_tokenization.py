"""Tokenization as an inverse homomorphism (arXiv 2412.03160): a language in characters and in ids.

Every id stands for some bytes, and detokenization h writes them in a row: h(uv) = h(u) h(v), a
homomorphism. So the id sequences that spell a language L, E(L) = {t: h(t) in L}, are regular where
L is regular, and context-free where it is context-free: reading tokens takes nothing away. A
tokenizer tau returns one of the many spellings of a text, the *proper* one.

The theorems are code here, each beside something for which it fails. Then one small GPT learns a
bracket language in four spellings: characters; BPE; random tokens of the same vocabulary
(extended); and ids that change their meaning with the position (scramble), which have no h.

Read on: `lift`, `proper_moves` (the theorems), `Code` (the spellings), `train_arm`, `judge`.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import common
import data
import grammar_mask as gm
from model import GPT, GPTConfig, generate

ARMS = "char", "bpe", "extended", "scramble"
TRIALS = 40  # random languages and vocabularies for each theorem
GREETINGS = "Hello, World! Grüß dich, Welt! Привет, мир! 你好，世界！ こんにちは 🌍 नमस्ते"
SMOKE = dict(steps=6, batch_size=8, n_embd=16, warmup=2, samples=8, jobs=1)


@dataclass
class Args(common.TrainFlags):
    """token languages"""

    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": {}}
    limits: ClassVar[dict] = common.TrainFlags.limits | {"samples": (2,), "n_embd": (4,)}
    unused: ClassVar[set] = {"eval_every"}

    steps: int = 250
    batch_size: int = 64
    lr: float = 3e-3
    n_embd: int = 64  # width; two layers of four heads
    samples: int = 200  # strings of each kind to measure on
    tokenizer: list[str] = common.default_list()  # measure these: tiktoken names, tokenizer.json


# ----------------- tokenizers
# A vocabulary is a list: the bytes of every id.


def spell(vocab, ids):
    """h: the bytes of ids, in a row; an id for unknown letters has none."""
    return b"".join([vocab[i] or b"" for i in ids])


def merged(vocab, parts):
    """The parts of a text after all merges of neighbours, that with the lowest id first."""
    rank, parts = {piece: i for i, piece in enumerate(vocab)}, list(parts)
    while len(parts) > 1:
        merges = [rank.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        i = merges.index(min(merges))
        if merges[i] == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bpe(vocab, text):
    """tau of plain BPE: the proper ids of some bytes."""
    return [vocab.index(part) for part in merged(vocab, [bytes([b]) for b in text])]


def pretokenized(vocab, text):
    """tau of BPE behind a regular expression that cuts a text into words, as real ones do."""
    words = re.findall(rb" +(?![^ ])| ?[^ ]+| +", text)
    return sum([bpe(vocab, word) for word in words], [])


def learn_bpe(texts, alphabet, merges):
    """A vocabulary: an alphabet, then again and again the commonest pair of neighbours."""
    vocab = [bytes([b]) for b in alphabet]
    words = [[bytes([b]) for b in text] for text in texts]
    for _ in range(merges):
        pairs = Counter(itertools.chain(*map(itertools.pairwise, words)))
        vocab.append(b"".join(max(sorted(pairs), key=pairs.get)))
        words = [merged(vocab, word) for word in words]
    return vocab


def random_vocabulary(rng, alphabet, merges):
    """A vocabulary of merges drawn at random."""
    vocab = [bytes([b]) for b in alphabet]
    for _ in range(merges):
        vocab.append(spell(vocab, rng.integers(0, len(vocab), 2)))
    return list(dict.fromkeys(vocab))


def count_spellings(text, pieces):
    """How many id sequences spell text[:j], for j = 0, 1, ..., len(text)."""
    counts, longest = [1], max(map(len, pieces))
    for j in range(1, len(text) + 1):
        starts = [i for i in range(max(0, j - longest), j) if text[i:j] in pieces]
        counts.append(sum([counts[i] for i in starts]))
    return counts


def random_spelling(vocab, text, rng):
    """One of the id sequences that spell a text, all equally likely: backward through counts."""
    pieces = {*vocab}
    counts = count_spellings(text, pieces)
    ids, j = [], len(text)
    while j:
        pick = rng.random() * counts[j]
        for i in [i for i in range(j) if text[i:j] in pieces]:
            pick -= counts[i]
            if pick < 0:
                break
        ids.append(vocab.index(text[i:j]))
        j = i
    return ids[::-1]


def inspect(name, sample):
    """What holds for a tokenizer, on a sample text: a dictionary."""
    tok = data.get_tokenizer(name, sample)
    vocab = gm.vocabulary(tok)
    real = [i for i, piece in enumerate(vocab) if piece]
    drawn = np.random.default_rng(0).choice(real, (2000, 2)).tolist()
    pairs = [*itertools.pairwise(tok.encode(GREETINGS)), *drawn]
    torn = strange = 0
    for a, b in pairs:
        torn += tok.decode([a, b]) != tok.decode([a]) + tok.decode([b])
        strange += tok.decode([a, b]) != spell(vocab, [a, b]).decode(errors="replace")
    text = sample[:2000].encode()
    spellings = count_spellings(text, {vocab[i] for i in real})[-1]
    return {
        "tokenizer": name,
        "ids": f"{len(vocab)}, of which {len(real)} spell something",
        "pairs whose text is not the two texts": f"{torn} of {len(pairs)}",
        "pairs whose text is not that of h": f"{strange} of {len(pairs)}",
        "h(tau(text)) is the text": spell(vocab, tok.encode(sample)) == sample.encode(),
        "spellings": f"2 ** {math.log2(max(1, spellings)) / len(text):.2f} a byte",
    }


# ---- T1, T3: regular languages
# An automaton is a table of states (states, symbols), and which of them accept. It begins in state
# 0; the last state, which is written -1, is dead: no text goes on from it.


def automaton(pattern, alphabet):
    """The automaton of a regular expression over the bytes of an alphabet."""
    engine = gm.Engine(gm.parse_regex(pattern), [bytes([b]) for b in alphabet])
    order, table = [engine.start], []
    for config in order:  # grows
        row = [engine.read(config, [b]) for b in alphabet]
        order += [after for after in dict.fromkeys(row) if after and after not in order]
        table.append([order.index(after) if after else -1 for after in row])
    accepting = [config.accepts for config in order]
    return np.array([*table, [-1] * len(alphabet)]), np.array([*accepting, False])


def lift(table, alphabet, vocab):
    """The automaton over ids: the same states; from q an id leads to where its bytes lead."""
    columns = []
    for piece in vocab:
        q = np.arange(len(table))
        for b in piece:
            q = table[q, alphabet.index(b)]
        columns.append(q)
    return np.stack(columns, axis=1)


def states_needed(table, accepting):
    """How many states the smallest automaton that does the same has, without a dead one."""
    kind = accepting.astype(int)  # the same number: not told apart yet
    for _ in table:  # told apart by where the symbols lead
        seen = np.column_stack((kind, kind[table]))
        kind = np.unique(seen, axis=0, return_inverse=True)[1].ravel()
    return len({*kind} - {kind[-1]})


def states_along(table, ids):
    """The states that ids lead through, from the first one on."""
    states = [0]
    for t in ids:
        states.append(table[states[-1]][t])
    return states


def sequences(n_symbols, longest):
    """All sequences of at most `longest` symbols."""
    return [t for n in range(longest + 1) for t in itertools.product(range(n_symbols), repeat=n)]


def proper_moves(table, accepting, tau, vocab):
    """The ids that may come next in a proper sequence of the language of a lifted automaton.

    Plain BPE is 2-local: a sequence is proper if its ids and all pairs of neighbours are. So a
    state is (q, last id; V at the start). Returns two tables, bool (Q, V + 1, V): the moves that
    pairs allow, and those after which a proper text can still end.
    """
    V = len(vocab)
    pairs = np.zeros((V + 1, V), bool)
    for a, b in itertools.product(range(V), repeat=2):
        pairs[a, b] = tau(vocab[a] + vocab[b]) == [a, b]
        pairs[V, b] = tau(vocab[b]) == [b]
    moves = pairs & (table >= 0)[:, None]
    alive = np.repeat(accepting[:, None], V + 1, 1)  # backward from where a text may end
    while True:
        live = moves & alive[table, np.arange(V)][:, None]
        if (alive >= live.any(2)).all():
            return moves, live
        alive = alive | live.any(2)


def dead_ends(table, accepting, moves):
    """How many states (q, last id) can be reached where no text ends and no id may come next."""
    reached, stuck = [(0, moves.shape[2])], 0
    for q, last in reached:  # grows
        ahead = [(table[q, t], t) for t in np.flatnonzero(moves[q, last])]
        reached += [one for one in ahead if one not in reached]
        stuck += not ahead and not accepting[q]
    return stuck


def random_regex(rng, letters, depth=3):
    """A random regular expression."""
    if depth == 0:
        return str(rng.choice(letters))
    x, y = random_regex(rng, letters, depth - 1), random_regex(rng, letters, depth - 1)
    return str(rng.choice([f"{x}{y}", f"(?:{x}|{y})", f"{x}(?:{y})*"]))


def check_languages(seed, tokenize):
    """Errors of the automata of random languages, on all short id sequences; dead ends."""
    rng = np.random.default_rng([seed, 6])
    found = dict.fromkeys(["wrong", "states_more", "proper_wrong", "dead_ends", "by_pairs"], 0)
    for trial in range(TRIALS):
        pattern = "[ab ]*" if trial % 2 else random_regex(rng, ["a", "b", " "])  # or all texts
        vocab = random_vocabulary(rng, b"ab ", 5)
        tau = partial(tokenize, vocab)
        table, accepting = automaton(pattern, b"ab ")
        lifted = lift(table, b"ab ", vocab)
        before, after = states_needed(table, accepting), states_needed(lifted, accepting)
        found["states_more"] += abs(after - before)
        moves, live = proper_moves(lifted, accepting, tau, vocab)
        found["by_pairs"] += dead_ends(lifted, accepting, moves)
        found["dead_ends"] += dead_ends(lifted, accepting, live)
        for ids in sequences(len(vocab), 3):
            states, text = states_along(lifted, ids), spell(vocab, ids)
            truth = re.fullmatch(pattern.encode(), text) is not None
            found["wrong"] += accepting[states[-1]] != truth
            steps = zip(states, [len(vocab), *ids], ids)
            proper = accepting[states[-1]] and all([live[step] for step in steps])
            found["proper_wrong"] += proper != (truth and tau(text) == [*ids])
    return found


def check_scrambled():
    """T1's control: (ab)* takes two states; how do the best two do if ids depend on position?

    In the mean over all 20 codes in which a and b change places at three of six positions.
    """
    taken, errors = [], []
    for cells in itertools.product((-1, 0, 1), repeat=4):
        table = cells[:2], cells[2:], (-1, -1)
        taken.append({t for t in sequences(2, 6) if states_along(table, t)[-1] == 0})
    for swapped in itertools.combinations(range(6), 3):
        ids = [int((i % 2 == 1) != (i in swapped)) for i in range(6)]  # ababab, as it is spelled
        code = {tuple(ids[:n]) for n in (0, 2, 4, 6)}
        errors.append(min([len(code ^ found) for found in taken]))
    return {"wrong": np.mean(errors), "states_more": 0}


# ------------ the toy's world

BRACKETS = "()[]"
DEPTH, LONGEST = 6, 40  # in training
DYCK = 'root ::= ("(" root ")" | "[" root "]")*'
CROSSED = 'root ::= ("(" root "]" | "[" root ")")*'


def balanced(rng, n, deepest):
    """A balanced string of n brackets of two kinds; opening or closing is equally likely."""
    out, inside = "", []
    for left in range(n, 0, -1):
        may_open = len(inside) < min(deepest, left - 1)
        if may_open and (not inside or rng.random() < 0.5):
            inside.append(rng.integers(2))
            out += "(["[inside[-1]]
        else:
            out += ")]"[inside.pop()]
    return out


def depth_of(s):
    """The deepest nesting of a string of brackets."""
    return int(np.cumsum([1 if c in "([" else -1 for c in s]).max())


def strings(rng, n, beyond=False):
    """n strings of 8 to 40 brackets, at most 6 deep, as in training; or longer and deeper ones."""
    low, high, deepest = (LONGEST + 2, 2 * LONGEST, 2 * DEPTH) if beyond else (8, LONGEST, DEPTH)
    out = []
    while len(out) < n:
        s = balanced(rng, 2 * int(rng.integers(low // 2, high // 2 + 1)), deepest)
        if not beyond or depth_of(s) > DEPTH:
            out.append(s)
    return out


def is_balanced(s):
    """Whether a string is in the language: by cutting out pairs."""
    while "()" in s or "[]" in s:
        s = s.replace("()", "").replace("[]", "")
    return not s


def twin(rng, s):
    """The same string with the kind of one closing bracket changed: not in the language."""
    i = rng.choice([i for i, c in enumerate(s) if c in ")]"])
    return s[:i] + {")": "]", "]": ")"}[s[i]] + s[i + 1 :]


class Code:
    """How an arm spells strings. vocab: the bytes of every id; then `bos` and `eos`."""

    def __init__(self, arm, seed):
        rng = np.random.default_rng([seed, 1])
        self.arm, self.vocab = arm, [c.encode() for c in BRACKETS]
        if arm in ("bpe", "extended"):
            self.vocab = learn_bpe([s.encode() for s in strings(rng, 200)], BRACKETS.encode(), 48)
        self.bos, self.eos = len(self.vocab), len(self.vocab) + 1
        self.swaps = np.stack([rng.permutation(4) for _ in range(2 * LONGEST)])  # by position

    def encode(self, s, rng, arm=""):
        """The ids of a string between bos and eos, as this arm spells it, or another one."""
        ids = bpe(self.vocab, s.encode())
        if (arm or self.arm) == "extended":
            ids = random_spelling(self.vocab, s.encode(), rng)
        elif self.arm == "scramble":
            ids = [int(swap[i]) for swap, i in zip(self.swaps, ids)]
        return [self.bos, *ids, self.eos]


def collate(rows, eos):
    """{idx, targets}: tensors (B, T) of lists of ids; targets behind the end are -100."""
    idx = pad_sequence([torch.tensor(row[:-1]) for row in rows], True, eos)
    targets = pad_sequence([torch.tensor(row[1:]) for row in rows], True, -100)
    return {"idx": idx, "targets": targets}


def train_arm(args, env, log, arm, seed):
    """Trains a GPT on strings as an arm spells them, and measures it."""
    code = Code(arm, seed)
    torch.manual_seed(seed)
    shape = len(code.vocab) + 2, 2 * LONGEST + 2, 2, 4, args.n_embd
    model = GPT(GPTConfig(*shape, learned_pos=True))

    def batch(step):
        rng = np.random.default_rng([seed, 2, step])
        rows = [code.encode(s, rng) for s in strings(rng, args.batch_size)]
        return collate(rows[env.rank :: env.world], code.eos)

    common.train(model, batch, args, env, log)
    return measure(model, code, args.samples, seed)


@torch.no_grad()
def log_p(model, code, texts, rng, arm):
    """The log-probability of each string as an arm spells it."""
    batch = collate([code.encode(s, rng, arm) for s in texts], code.eos)
    batch = {name: x.to(model.wte.weight.device) for name, x in batch.items()}
    return -model.token_loss(**batch).sum(1).cpu().numpy()


def above_twin(model, code, texts, rng, arm=""):
    """Which strings are likelier than their twin: bool (n,); four draws of a random spelling."""
    twins = [twin(rng, s) for s in texts]
    gap = np.zeros(len(texts))
    for _ in range(4 if "extended" in (arm, code.arm) else 1):
        gap += log_p(model, code, texts, rng, arm) - log_p(model, code, twins, rng, arm)
    return gap > 0


def measure(model, code, n, seed):
    """What a trained arm can do: tell strings from their twins, and write strings."""
    texts = strings(np.random.default_rng([seed, 3]), n)
    rng = np.random.default_rng([seed, 5])
    both = texts + strings(rng, n, beyond=True)
    right, depth = above_twin(model, code, both, rng), np.array([depth_of(s) for s in both])
    groups = [right[depth == d] for d in range(1, 2 * DEPTH + 1)]
    found = {"in_range": right[:n].mean(), "beyond": right[n:].mean()}
    found["by_depth"] = [part.mean() if len(part) > 4 else math.nan for part in groups]
    if code.arm != "scramble":  # which has no text for an id
        for name, grammar in ("valid", DYCK), ("valid_crossed", CROSSED), ("valid_free", None):
            found[name] = valid_share(model, code, n, seed, grammar)
    if code.arm in ("bpe", "extended"):
        other = "extended" if code.arm == "bpe" else "bpe"
        found["other_spelling"] = above_twin(model, code, texts, rng, other).mean()
        found["lost"] = found["in_range"] - found["other_spelling"]
    return found


def valid_share(model, code, n, seed, grammar):
    """The share of n samples in the language, under the masks of a grammar or free."""
    options = {"stop": [code.eos, code.bos], "seed": seed, "samples": n}
    if grammar:
        engine = gm.Engine(grammar, [*code.vocab, None, None], code.eos)
        options["process"] = gm.Masker(engine, LONGEST + 8)
    rows = generate(model, [[code.bos]], LONGEST + 8, **options)
    ended = [row[:-1] for row in rows if row[-1] == code.eos]
    return sum([is_balanced(spell(code.vocab, row).decode()) for row in ended]) / n


# ---------- claims and figure


def judge(run, checks, found):
    """The claims, each beside what must fail the same criterion."""
    says = "regular languages: the automaton over bytes, lifted to ids, errs nowhere"
    rule = "arm.wrong == 0 and arm.states_more == 0"
    controls = {"scrambled ids": checks["scrambled"]}
    run.claim("T1", says, "theorem", rule, arm=checks["lifted"], controls=controls)
    says = "plain BPE: the proper sequences of a regular language have an automaton of pairs"
    rule = "arm.proper_wrong == 0 and arm.dead_ends == 0"
    by_pairs = [row | {"dead_ends": row["by_pairs"]} for row in checks["lifted"]]
    controls = {"without looking ahead": by_pairs, "pre-tokenized": checks["words"]}
    run.claim("T3", says, "-", rule, arm=checks["lifted"], controls=controls)
    says = "BPE learns the language as characters do (valid strings above their twins)"
    rule = "abs(base.in_range - arm.in_range) <= .05 and min(base.in_range, arm.in_range) >= .95"
    both = {"base": found["char"], "arm": found["bpe"]}
    controls = {"scramble": found["scramble"]}
    run.claim("L1", says, "power is unaffected", rule, **both, controls=controls)
    says = "under the masks of its grammar every sample is valid (share)"
    free = [row | {"valid": row["valid_free"]} for row in found["bpe"]]
    crossed = [row | {"valid": row["valid_crossed"]} for row in found["bpe"]]
    controls = {"no mask": free, "another grammar's": crossed}
    run.claim("L2", says, "-", "arm.valid == 1", arm=found["bpe"], controls=controls)
    says = "what can be represented need not be learnt (accuracy lost on the other spelling)"
    controls = {"trained on random": found["extended"]}
    run.claim("L4", says, "-", "arm.lost >= .1", arm=found["bpe"], controls=controls)


def draw(path, found):
    """Two panels: by depth, on the other spelling."""
    depths, bars = {}, {}
    for arm, rows in found.items():
        depths[arm] = range(1, 2 * DEPTH + 1), [row["by_depth"] for row in rows]
        if "lost" in rows[0]:
            bars[f"trained on {arm}"] = [[r["in_range"], r["other_spelling"]] for r in rows]
    by_depth = {"title": "Valid string above its twin", "xlabel": f"depth (trained: to {DEPTH})"}
    other = {"title": "... spelled otherwise", "names": ["own spelling", "the other"]}
    items = [by_depth | {"lines": depths}, other | {"bars": bars}]
    common.panels(path, [item | {"ylabel": "accuracy", "ylim": (0.4, 1.2)} for item in items])


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    idle = common.changed_flags(args, "steps batch_size lr n_embd samples resume".split())
    return [
        (args.tokenizer and idle, f"{idle}: no effect with --tokenizer"),
        (args.n_embd % 4, f"--n-embd {args.n_embd} is no multiple of the 4 heads"),
        (args.batch_size % env.world, f"--batch-size {args.batch_size}: {env.world} processes"),
    ]


def main(argv=None):
    """The theorems, then the toy; or --tokenizer. Returns what it writes to result.json."""
    run = common.Run(Args, argv, "2412.03160", check)
    if run.args.tokenizer:
        sample = "".join(itertools.islice(data.load_text(), 20))[:20000]
        with common.bad_input("--tokenizer"):
            rows = [inspect(name, sample) for name in run.args.tokenizer]
        for key in rows[0]:
            print(f"{key:42s}", *[f"{row[key]!s:32}" for row in rows])
        return run.finish(rows)
    found = run.each(train_arm, ARMS)
    if found is None:
        return None
    checks = {"scrambled": [check_scrambled() for _ in run.args.seeds]}
    for name, tau in ("lifted", bpe), ("words", pretokenized):
        checks[name] = [check_languages(seed, tau) for seed in run.args.seeds]
    judge(run, checks, found)
    draw(run.out / "formal_tokenization.png", found)
    return run.finish({"theorems": checks, "arms": found})


if __name__ == "__main__":
    common.cli(main)
