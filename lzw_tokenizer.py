"""The tokenizer of zip2zip (arXiv 2506.01084): LZW over token ids, with a dictionary for every text.

A tokenizer's vocabulary is fixed, but a text repeats itself. LZW reads base ids below V, emits the longest match it has
in its table, and stores match + next id as a new row, whose id is V, V+1, ... So the codes get shorter as the text goes
on, and the decoder rebuilds the same table from the codes alone: nothing but the ids is sent. Limits (paper, sec. 3):
rows of at most M base ids, at most N rows, and *disabled* ids (end of text, digits) that are never merged.

A row can be used by the encoder one code before the decoder can know it ("KwKwK": the code means the last match and its
own first id). `classic` allows that; `avoid` doesn't: then a model that reads codes can score every code it may need.

    python lzw_tokenizer.py README.md                              the codes of a text in colour, and what they save
    python lzw_tokenizer.py README.md --do encode > codes.txt      ... --do decode codes.txt gives the text back

A pair (code, next id) is one integer key code * V + id of one dict: a trie without nodes; its insertion order is the
order of the rows, so the table of all rows follows by NumPy afterwards, at no cost in the loop over the ids.
"""

import argparse
import copy
import marshal
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

import data
from legacy import bad_input, fail

KWKWK = "classic", "avoid"


class Codebook:
    """The rows of one sequence. `table` maps parent * V + last id to a row's code; rows are in order of creation."""

    def __init__(self, vocab_size, max_len):
        self.vocab_size, self.max_len, self.table, self.words = vocab_size, max_len, {}, []

    def __len__(self):
        return len(self.table)

    def expand(self, code):
        """The base ids of a code, a tuple; ValueError if there is no such code."""
        V = self.vocab_size
        if 0 <= code < V:
            return (code,)
        if not V <= code < V + len(self):
            raise ValueError(f"code {code} is not defined, the next code is {V + len(self)}")
        for key in list(self.table)[len(self.words) :] if len(self.words) < len(self) else ():
            parent, last = divmod(key, V)  # words are made when they are first asked for
            self.words.append((parent, last) if parent < V else (*self.words[parent - V], last))
        return self.words[code - V]

    def array(self, pad=0):
        """All rows, int64 (rows, max_len), padded with `pad` on the right; their lengths are then `lengths` (rows,)."""
        V, n = self.vocab_size, len(self)
        parent, last = divmod(np.fromiter(self.table, np.int64, n), V)
        rows, lengths = np.full((n, self.max_len), pad, np.int64), np.where(parent < V, 2, 0)
        short = lengths == 2
        if n:
            rows[short, 0], rows[short, 1] = parent[short], last[short]
        for m in range(3, self.max_len + 1):  # rows of m ids: a row of m - 1 and one more
            here = np.flatnonzero(lengths == 0)
            here = here[lengths[parent[here] - V] == m - 1]
            rows[here, : m - 1], rows[here, m - 1] = rows[parent[here] - V, : m - 1], last[here]
            lengths[here] = m
        self.lengths = lengths
        return rows

    def to_dict(self):
        """{code: tuple of base ids}."""
        return {self.vocab_size + i: self.expand(self.vocab_size + i) for i in range(len(self))}


class LZW:
    """Encoder and decoder for a base vocabulary: `encode(ids)`, `decode(codes)`, both exact inverses.

    vocab_size  V: base ids are 0 .. V-1, rows have the codes V .. V+N-1
    max_codes   N: rows of a sequence; when all are used the table stays as it is
    max_len     M: base ids of a row; 1 compresses nothing
    disabled    base ids that are never part of a row
    kwkwk       `classic`, or `avoid`: never emit a row right after the code that made it
    """

    def __init__(self, vocab_size, max_codes=1024, max_len=3, disabled=(), kwkwk="classic"):
        for name, value, least in ("vocab_size", vocab_size, 1), ("max_codes", max_codes, 0), ("max_len", max_len, 1):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, allowed: whole numbers from {least}")
        if kwkwk not in KWKWK:
            raise ValueError(f"kwkwk is {kwkwk!r}, allowed: {', '.join(KWKWK)}")
        if odd := [i for i in disabled if not 0 <= i < vocab_size]:
            raise ValueError(f"disabled id {odd[0]}, allowed: 0 to {vocab_size - 1}")
        self.vocab_size, self.max_codes, self.max_len = vocab_size, max_codes, max_len
        self.disabled, self.kwkwk = frozenset(map(int, disabled)), kwkwk

    def config(self):
        """Everything two sides must agree on, as plain values."""
        names = "vocab_size", "max_codes", "max_len", "kwkwk"
        return {name: getattr(self, name) for name in names} | {"disabled": sorted(self.disabled)}

    def encode(self, ids, book=False):
        """Codes of base ids: a list for a list or range, an array for an array or tensor; `book`: (codes, Codebook).

        Raises ValueError naming the place of an id that is no whole number from 0 to V-1.
        """
        checked, back = self.check(ids, self.vocab_size, "id")
        codebook, codes = Codebook(self.vocab_size, self.max_len), []
        if self.max_len == 1 or self.max_codes == 0:
            codes = list(checked)
        else:
            for part, closing in self.stretches(checked):  # they share a table
                self._encode(part, codebook.table, codes)
                codes += closing
        return (back(codes), codebook) if book else back(codes)

    def stretches(self, ids):
        """Pairs (ids without disabled ones, [the disabled id behind them] or []): no row crosses a disabled id."""
        if self.disabled.isdisjoint(ids):
            return [(ids, [])]
        cuts = [i for i, a in enumerate(ids) if a in self.disabled]
        return [(ids[start + 1 : end], ids[end : end + 1]) for start, end in pairwise([-1, *cuts, len(ids)])]

    def _encode(self, ids, table, out):
        """The loop over base ids without disabled ones: adds rows to `table` and codes to `out`."""
        V, M, end, avoid = self.vocab_size, self.max_len, self.vocab_size + self.max_codes, self.kwkwk == "avoid"
        new, fresh = V + len(table), -1  # the next row's code; the row just made, which `avoid` forbids to this match
        ids = iter(ids)
        for code in ids:  # a match begins ...
            left = M
            for a in ids:  # ... and grows, until (match, a) is no row: both loops draw from one iterator
                key = code * V + a
                if key not in table:
                    fresh = new
                    if new < end:
                        table[key] = new
                        new += 1
                elif avoid and table[key] == fresh:
                    fresh = -1
                else:
                    code = table[key]
                    left -= 1
                    if left == 1:  # M ids: emitted at once, and no row is made here
                        break
                    continue
                out.append(code)
                code, left = a, M
            out.append(code)
            fresh = -1

    def encode_behind(self, prompt, ids):
        """Codes of base ids for a decoder that has read a prompt, lists: each the longest row known at that moment."""
        decoder, codes, at = Decoder(self), [], 0
        for code in self.encode(prompt):
            decoder.push(code)
        while at < len(ids):
            code, end, table = ids[at], at + 1, decoder.book.table
            while end < min(len(ids), at + self.max_len) and (key := code * self.vocab_size + ids[end]) in table:
                code, end = table[key], end + 1
            decoder.push(code)
            codes.append(code)
            at = end
        return codes

    def decode(self, codes, strict=True):
        """Base ids of codes, of the same kind of container. Any sequence of known codes has a meaning (see `Decoder`).

        A code that isn't defined when it comes is a ValueError that names it; with strict=False decoding ends there.
        """
        checked, back = self.check(codes, self.vocab_size + self.max_codes, "code")
        out = self._decode(checked)
        if out is None:  # not what `encode` gives: the decoder that follows the encoder, id by id, knows what it means
            decoder, out = Decoder(self), []
            for t, code in enumerate(checked):
                try:
                    out += decoder.push(code)[0]
                except ValueError as error:
                    if strict:
                        raise ValueError(f"code {t}: {error}") from None
                    break
        return back(out)

    def _decode(self, codes):
        """Base ids of a canonical stream, every code but the first of a stretch a row: (match before + first id here).

        None if the stream isn't canonical: a code comes before its row, or LZW would have used a row that was there.
        """
        V, M, N, avoid = self.vocab_size, self.max_len, self.max_codes, self.kwkwk == "avoid"
        rows, out = [], []  # rows beyond N get no code, they are what a full table has turned away
        if M == 1:
            return None if codes and max(codes) >= V else codes
        for part, closing in self.stretches(codes):
            before, fresh = (), None  # the match before, if it can grow; the row that `avoid` forbids to this code
            for code in part:
                if code < V:
                    word = first = (code,)
                elif code - V < len(rows):
                    word = rows[code - V]
                    first = word[:1]
                elif before and code - V == len(rows) and not avoid:  # KwKwK
                    first = before[:1]
                    word = before + first
                else:
                    return None
                if before:
                    row = before + first
                    if avoid and row == fresh:
                        fresh = None
                    else:
                        rows.append(row)
                        fresh = row
                else:
                    fresh = None
                out += word
                before = word if len(word) < M else ()
            out += closing
        known = set(rows[:N])
        return out if len(known) == len(rows[:N]) and known.isdisjoint(rows[N:]) else None

    def counts(self, codes, book):
        """How many rows are known after reading each code of a canonical stream, int64 (n,), vectorised.

        The row k may be predicted at position t iff k < counts[t]. A row is made between two codes unless the first is
        full (M ids) or one is disabled; under `avoid` the same pair twice in a row makes one row, not two.
        """
        codes = np.asarray(codes, dtype=np.int64)
        if len(codes) < 2:
            return np.zeros(len(codes), np.int64)
        V, rows = self.vocab_size, book.array()
        lengths, first = np.ones(len(codes), np.int64), codes.copy()
        hyper = codes >= V
        lengths[hyper], first[hyper] = book.lengths[codes[hyper] - V], rows[codes[hyper] - V, 0]
        closed = np.isin(codes, list(self.disabled))
        made = (lengths[:-1] < self.max_len) & ~closed[:-1] & ~closed[1:]
        key = codes[:-1] * V + first[1:]
        made[1:] &= (key[1:] != key[:-1]) | (self.kwkwk == "classic")
        return np.minimum(self.max_codes, np.concatenate(([0], made.cumsum())))

    def extensions(self, codes, book):
        """For each code of a canonical stream: the base ids that can't follow it, as LZW would merge them with it."""
        counts, children = self.counts(codes, book), {}
        for k, key in enumerate(book.table):
            parent, last = divmod(key, self.vocab_size)
            children.setdefault(parent, []).append((k, last))
        if self.kwkwk == "avoid":  # the row that the code before has just made is not used yet
            counts = np.concatenate(([0], counts[:-1]))
        return [[a for k, a in children.get(z, ()) if k < n] for z, n in zip(codes, counts)]

    def encode_batch(self, sequences, pad=0, side="left", workers=1):
        """Many sequences: codes (B, T) padded, mask (B, T) True at codes, rows (B, K, M) padded, how many (B,)."""
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}, allowed: left, right")
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                done = list(pool.map(self._encode_row, sequences, chunksize=-(-len(sequences) // workers)))
        else:
            done = [self._encode_row(ids) for ids in sequences]
        T, K = (max((len(part[i]) for part in done), default=0) for i in (0, 1))
        codes, mask = np.full((len(done), T), pad, np.int64), np.zeros((len(done), T), bool)
        rows = np.full((len(done), K, self.max_len), pad, np.int64)
        for b, (own, table) in enumerate(done):
            here = slice(T - len(own), T) if side == "left" else slice(0, len(own))
            codes[b, here], mask[b, here] = own, True
            book = Codebook(self.vocab_size, self.max_len)
            book.table = table
            rows[b, : len(book)] = book.array(pad)
        return codes, mask, rows, np.array([len(table) for _, table in done])

    def _encode_row(self, ids):
        codes, book = self.encode(ids.tolist() if hasattr(ids, "tolist") else ids, book=True)
        return codes, book.table

    def split(self, ids, max_codes_out):
        """Cuts base ids into windows of at most so many codes, each with a table of its own; no id is lost.

        Returns the codes of each window, a list of lists.
        """
        if max_codes_out < 1:
            raise ValueError(f"windows of {max_codes_out} codes, allowed: 1 and up")
        ids, _ = self.check(ids, self.vocab_size, "id")
        windows, start = [], 0
        while start < len(ids):
            codes, book = self.encode(ids[start : start + max_codes_out * self.max_len], book=True)
            windows.append(codes[:max_codes_out])
            start += sum(len(book.expand(c)) for c in windows[-1])
        return windows

    def check(self, ids, end, what):
        """(ids as a list of int, function that puts a list into the container of ids); ValueError naming the place."""
        back = list
        if hasattr(ids, "tolist"):
            if ids.ndim != 1 or (len(ids) and "int" not in str(ids.dtype)):
                raise ValueError(
                    f"{what}s of shape {tuple(ids.shape)} and type {ids.dtype}, allowed: whole numbers (n,)"
                )
            size = ids.dtype.itemsize * 8 - ("u" not in str(ids.dtype))
            if what == "id" and self.vocab_size + self.max_codes > 2**size:
                raise ValueError(
                    f"codes up to {self.vocab_size + self.max_codes - 1} do not fit {ids.dtype}: give int64"
                )
            like = ids
            back = lambda out: np.array(out, like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(out)
            ids = ids.tolist()
        ids = list(ids)
        if not within(ids, end):
            t, odd = next((t, a) for t, a in enumerate(ids) if type(a) is not int or not 0 <= a < end)
            kind, whole = ("", "") if type(odd) is int else (f", a {type(odd).__name__}", "whole numbers ")
            raise ValueError(f"{what} {t} is {odd!r}{kind}, allowed: {whole}0 to {end - 1}")
        return ids, back


def within(ids, end):
    """Whether a list holds nothing but `int` (no bool) from 0 to end - 1: half the time of min, max and set(map(type)).

    `marshal` writes each int as the letter i and four bytes; so one array holds the kinds and the values of all.
    """
    try:
        raw = np.frombuffer(marshal.dumps(ids, 2), np.uint8)[5:]  # behind the head of the list
    except ValueError:  # something that marshal doesn't write
        return False
    if len(raw) != 5 * len(ids):
        return False
    raw = raw.reshape(-1, 5)  # as unsigned numbers, negative ones are large
    return bool((raw[:, 0] == ord("i")).all() and (raw[:, 1:].copy().view("<u4") < end).all())


class Encoder:
    """The encoder one id at a time: `push(id)` gives the codes that it settles (0 to 2), `flush()` the rest.

    `book` is the codebook so far. `copy()` is independent of the original (for beams).
    """

    def __init__(self, lzw):
        self.lzw, self.book = lzw, Codebook(lzw.vocab_size, lzw.max_len)
        self.match, self.depth, self.fresh = -1, 0, -1  # the current match, its base ids, the row `avoid` forbids

    def push(self, a):
        """Takes one base id; returns the list of codes that are now settled."""
        lzw, table = self.lzw, self.book.table
        if a in lzw.disabled:
            return [*self.flush(), a]
        if self.depth == 0:
            self.match, self.depth, out = a, 1, []
        else:
            key = self.match * lzw.vocab_size + a
            longer = table.get(key)
            if longer is not None and longer != self.fresh:
                self.match, self.depth, out = longer, self.depth + 1, []
            else:
                self.fresh, out = -1, [self.match]
                if longer is None and len(table) < lzw.max_codes:
                    table[key] = new = lzw.vocab_size + len(table)
                    self.fresh = new if lzw.kwkwk == "avoid" else -1
                self.match, self.depth = a, 1
        return out + self.flush() if self.depth == lzw.max_len else out

    def flush(self):
        """Ends the current match; returns its code in a list, or an empty list."""
        out = [self.match] if self.depth else []
        self.match, self.depth, self.fresh = -1, 0, -1
        return out

    def copy(self):
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin.book = copy.copy(self.book)
        twin.book.table, twin.book.words = self.book.table.copy(), self.book.words.copy()
        return twin


class Decoder:
    """The decoder one code at a time, for any stream: a model may spell out what LZW would have merged.

    The codebook after reading z_0 .. z_t is that of an `Encoder` fed with their base ids. For the codes of `encode`
    this is the textbook decoder.
    """

    def __init__(self, lzw):
        self.lzw, self.encoder = lzw, Encoder(lzw)

    @property
    def book(self):
        return self.encoder.book

    def push(self, code):
        """Takes one code; returns (its base ids, the rows that are new, tuples of base ids)."""
        lzw, encoder, known = self.lzw, self.encoder, len(self.book)
        if code == lzw.vocab_size + known and encoder.depth and lzw.kwkwk == "classic" and known < lzw.max_codes:
            match = self.book.expand(encoder.match)
            word = (*match, match[0])  # KwKwK
            if encoder.match * lzw.vocab_size + match[0] in self.book.table:
                raise ValueError(f"code {code} is not defined, the next code is {lzw.vocab_size + known}")
        else:
            word = self.book.expand(code)
        for a in word:
            encoder.push(a)
        return list(word), [self.book.expand(lzw.vocab_size + k) for k in range(known, len(self.book))]

    def copy(self):
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin.encoder = self.encoder.copy()
        return twin


# --------------------------------------------------------------------------------------------------------------- text


class ZipTokenizer:
    """Text to codes and back, for anything with encode(text) -> ids and decode(ids) -> text."""

    def __init__(self, base, **lzw):
        self.base, self.lzw = base, LZW(base.n_vocab, **lzw)

    def encode(self, text):
        return self.lzw.encode(self.base.encode(text))

    def decode(self, codes):
        return self.base.decode(self.lzw.decode(codes))

    def color(self, text):
        """The text with every row's use in a colour: yellow for two base ids, then green, cyan, magenta, red."""
        codes, book = self.lzw.encode(self.base.encode(text), book=True)
        pieces = [(self.base.decode(list(word)), len(word)) for word in map(book.expand, codes)]
        colors = {2: 43, 3: 42, 4: 46, 5: 45}
        return "".join(p if n == 1 else f"\x1b[30;{colors.get(n, 41)}m{p}\x1b[0m" for p, n in pieces)


def stats(lzw, ids, n_bytes, window=0):
    """What compression does to base ids, cut into windows (0: none): a dict of shares, see `main`."""
    parts = [ids[i : i + window] for i in range(0, len(ids), window)] if window else [ids]
    codes, rows, hyper, used = 0, 0, 0, 0
    for part in parts:
        own, book = lzw.encode(part, book=True)
        above = [c for c in own if c >= lzw.vocab_size]
        codes, rows, hyper, used = codes + len(own), rows + len(book), hyper + len(above), used + len(set(above))
    return {
        "ids": len(ids), "codes": codes, "ratio": codes / max(1, len(ids)), "bytes per id": n_bytes / max(1, len(ids)),
        "bytes per code": n_bytes / max(1, codes), "hyper share": hyper / max(1, codes), "reuse": used / max(1, rows),
    }  # fmt: skip


def digit_ids(tok):
    """Ids of a tokenizer whose text has a digit: merging them harms arithmetic."""
    return [i for i in range(tok.n_vocab) if any(c.isdigit() for c in tok.decode([i]))]


def main(argv=None):
    """Encodes, decodes, colours or counts a file."""
    parser = argparse.ArgumentParser(usage="python lzw_tokenizer.py FILE [flags]", description=__doc__.split("\n\n")[0])
    parser.error = fail
    parser.add_argument("file", help="text, or codes for --do decode; - is standard input")
    parser.add_argument("--do", default="color", choices=("color", "stats", "encode", "decode"), help="[color]")
    parser.add_argument(
        "--tokenizer", default="byte", help="byte, a tiktoken name, a folder with tokenizer.json [byte]"
    )
    parser.add_argument("--max-len", type=int, default=3, help="base ids of a row [3]")
    parser.add_argument("--max-codes", type=int, default=1024, help="rows [1024]")
    parser.add_argument("--window", type=int, default=0, help="stats: base ids that share a codebook; 0 is all [0]")
    parser.add_argument("--disable-digits", action="store_true", help="never merge digits")
    parser.add_argument("--kwkwk", default="classic", choices=KWKWK, help="[classic]")
    args = parser.parse_args(argv)
    with bad_input():
        if args.window < 0:
            raise ValueError(f"--window {args.window}, allowed: 0 and up")
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text("utf-8", errors="replace")
        base = data.get_tokenizer(args.tokenizer, text)
        disabled = [base.eos, *(digit_ids(base) if args.disable_digits else ())]
        settings = {"max_codes": args.max_codes, "max_len": args.max_len, "disabled": disabled, "kwkwk": args.kwkwk}
        tok = ZipTokenizer(base, **settings)
        if args.do == "decode":
            if odd := [w for w in text.split() if not w.isdecimal()]:
                raise ValueError(f"{args.file} has {odd[0]!r}, allowed: whole numbers, as --do encode prints them")
            print(tok.decode([int(word) for word in text.split()]), end="")
            return None
    if args.do == "encode":
        print(*tok.encode(text))
        return None
    if args.do == "color":
        print(tok.color(text))
    ids, n_bytes, found = base.encode(text), len(text.encode()), {}
    for m in (1, 2, 3, 4, 5):
        found[m] = stats(LZW(base.n_vocab, args.max_codes, m, disabled, args.kwkwk), ids, n_bytes, args.window)
        print(f"M={m}  " + "  ".join(f"{k} {v:.3f}" if v < 100 else f"{k} {v}" for k, v in found[m].items()))
    return found


if __name__ == "__main__":
    main()
