"""The tokenizer of zip2zip (arXiv 2506.01084): LZW over token ids, a dictionary for every text.

A tokenizer's vocabulary is fixed, but a text repeats itself. LZW reads base ids below V, emits the
longest match that it has in its table, and stores the match and the id behind it as a new row, of
the code V, V+1, ... So the codes become fewer as the text goes on, and the decoder rebuilds the
same table from the codes alone. Limits (section 3 of the paper): rows of at most M base ids, at
most N rows, and *disabled* ids (end of text, digits) that are never part of a row.

    python lzw_tokenizer.py FILES... --tokenizer byte gpt2    ids saved, by file and tokenizer
    python lzw_tokenizer.py FILE --show                       the text, every use of a row in colour
    python lzw_tokenizer.py FILE --encode CODES               any bytes; the settings travel along
    python lzw_tokenizer.py CODES --decode FILE               the same bytes again

A pair (code, next id) is one integer, code * V + id, in one dictionary: a trie without nodes. Its
order of insertion is the order of the rows, so they cost nothing in the loop over the ids.
"""

import argparse
import json
import random
import zlib
from array import array
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

import common
import data

WINDOW = 1024  # base ids that share a dictionary in the table: what the paper's models read at once
# ----------------------------------------------------------------------------------- the codec


@dataclass(frozen=True)
class LZW:
    """Encoder and decoder for a base vocabulary: `decode` gives back what `encode` was given."""

    vocab_size: int  # V: base ids are 0 to V - 1, rows have the codes V to V + N - 1
    max_codes: int = 1024  # N: rows of a sequence; when all are used the table stays as it is
    max_len: int = 3  # M: base ids of a row; 1 compresses nothing
    disabled: frozenset = frozenset()  # base ids that are never part of a row

    def __post_init__(self):
        for name, least in ("vocab_size", 1), ("max_codes", 0), ("max_len", 1):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, allowed: whole numbers from {least}")
        object.__setattr__(self, "disabled", frozenset(map(int, self.disabled)))
        for i in self.disabled:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"disabled id {i}, allowed: 0 to {self.vocab_size - 1}")

    def encode(self, ids):
        """The codes of base ids (a list, range, array or tensor), as a list.

        Raises ValueError naming the place of an id that is no whole number from 0 to V - 1.
        """
        ids = check(ids, self.vocab_size, "id")
        if self.max_len == 1 or self.max_codes == 0:
            return ids
        table, codes = {}, []  # table: parent * V + last id -> the code of a row
        for part, closing in self.stretches(ids):  # they share a table
            self.match_longest(part, table, codes)
            codes += closing
        return codes

    def stretches(self, ids):
        """Pairs (ids without disabled ones, [the disabled id behind them] or []), in order."""
        if self.disabled.isdisjoint(ids):
            return [(ids, [])]
        cuts = [i for i, a in enumerate(ids) if a in self.disabled]
        ends = pairwise([-1, *cuts, len(ids)])
        return [(ids[start + 1 : end], ids[end : end + 1]) for start, end in ends]

    def match_longest(self, ids, table, codes):
        """The loop over base ids without disabled ones: adds rows to `table`, codes to `codes`."""
        V, M, end = self.vocab_size, self.max_len, self.vocab_size + self.max_codes
        new = V + len(table)  # the code of the next row
        ids = iter(ids)
        for code in ids:  # a match begins ...
            left = M
            for a in ids:  # ... and grows, until (match, a) is no row; both loops draw from `ids`
                key = code * V + a
                if key in table:
                    code = table[key]
                    left -= 1
                    if left == 1:  # M ids: emitted at once, and no row is made here
                        break
                else:
                    if new < end:
                        table[key] = new
                        new += 1
                    codes.append(code)
                    code, left = a, M
            codes.append(code)

    def encode_known(self, ids, decoder):
        """Codes for a model: each is the longest row that `decoder`, which reads them, has by then.

        `encode` may use a row that the decoder learns from that very code: no model can choose it.
        """
        codes, at, table = [], 0, decoder.table
        while at < len(ids):
            code, end = ids[at], at + 1
            while end < len(ids) and code * self.vocab_size + ids[end] in table:
                code = table[code * self.vocab_size + ids[end]]
                end += 1
            decoder.push(code)
            codes.append(code)
            at = end
        return codes

    def decode(self, codes):
        """The base ids of codes, a list; ValueError for a code that isn't defined when it comes."""
        codes = check(codes, self.vocab_size + self.max_codes, "code")
        ids = self.decode_canonical(codes)
        if ids is not None:
            return ids
        ids, decoder = [], Decoder(self)
        for code in codes:
            ids += decoder.push(code)[0]
        return ids

    def decode_canonical(self, codes):
        """Base ids of codes as `encode` gives them: all but the first of a stretch complete a row.

        None for other codes: one comes before its row, or LZW would have used a row that was there.
        """
        V, M, N = self.vocab_size, self.max_len, self.max_codes
        if M == 1:
            return None if codes and max(codes) >= V else codes
        rows, ids = [], []  # rows beyond N get no code: what a full table has turned away
        for part, closing in self.stretches(codes):
            before = ()  # the match before, if it can grow
            for code in part:
                if code < V:
                    word = first = (code,)
                elif code - V < len(rows):
                    word = rows[code - V]
                    first = word[:1]
                elif before and code - V == len(rows):  # the row that this code completes
                    first = before[:1]
                    word = before + first
                else:
                    return None
                if before:
                    rows.append(before + first)
                ids += word
                before = word if len(word) < M else ()
            ids += closing
        known = set(rows[:N])
        canonical = len(known) == len(rows[:N]) and known.isdisjoint(rows[N:])
        return ids if canonical else None


def check(ids, end, what):
    """A list of ids as plain numbers; ValueError that names what is none from 0 to end - 1."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    try:
        numbers = array("I", ids)
        if not ids or np.frombuffer(numbers, np.uint32).max() < end:
            return numbers.tolist()
    except (TypeError, OverflowError):
        pass
    for place, a in enumerate(ids):
        if not isinstance(a, int) or not 0 <= a < end:
            raise ValueError(f"{what} {place} is {a!r}, allowed: whole numbers 0 to {end - 1}")


class Decoder:
    """The decoder one code at a time, for any stream: a model may spell out what LZW would merge.

    Its rows after some codes are those of an encoder that has read their base ids. For the codes
    of `LZW.encode` it is the textbook decoder.
    """

    def __init__(self, lzw):
        self.lzw = lzw
        self.table = {}  # parent * V + last id -> the row's code
        self.rows = []  # the base ids of the codes V, V + 1, ...
        self.counts = []  # how many rows there were after each code
        self.match = None  # the code that an encoder would be matching now
        self.depth = 0  # its base ids; 0: none

    def expand(self, code):
        """The base ids of a code, a tuple; ValueError if there is no such code."""
        new = self.lzw.vocab_size + len(self.rows)
        if not 0 <= code < new:
            raise ValueError(f"code {code} is not defined, the next code is {new}")
        return (code,) if code < self.lzw.vocab_size else self.rows[code - self.lzw.vocab_size]

    def push(self, code):
        """Takes one code; returns (its base ids, the new rows), a tuple and a list of tuples."""
        V, known = self.lzw.vocab_size, len(self.rows)
        word = None
        if code == V + known and self.depth and known < self.lzw.max_codes:
            match = self.expand(self.match)
            if self.match * V + match[0] not in self.table:
                word = (*match, match[0])  # the row that this code completes
        if word is None:
            word = self.expand(code)
        for a in word:
            self.read(a)
        self.counts.append(len(self.rows))
        return word, self.rows[known:]

    def read(self, a):
        """Takes one base id, as the encoder would."""
        key = self.match * self.lzw.vocab_size + a if self.depth else None
        if a in self.lzw.disabled:
            self.depth = 0
            return
        if key in self.table:
            self.match, self.depth = self.table[key], self.depth + 1
        else:
            if self.depth and len(self.rows) < self.lzw.max_codes:
                self.table[key] = self.lzw.vocab_size + len(self.rows)
                self.rows.append((*self.expand(self.match), a))
            self.match, self.depth = a, 1
        if self.depth == self.lzw.max_len:
            self.depth = 0


# ------------------------------------------------------------------------------- bytes and ids


def to_ids(tokenizer, raw):
    """Ids of any bytes: the tokenizer's, if it gives exactly these bytes back.

    Else (no UTF-8, letters that it changes) every byte goes as one of 256 ids behind its own.
    """
    try:
        ids = tokenizer.encode(raw.decode("utf-8"))
        if tokenizer.decode(ids).encode() == raw:
            return ids
    except UnicodeDecodeError:
        pass
    return [tokenizer.n_vocab + byte for byte in raw]


def to_bytes(tokenizer, ids):
    """The bytes of what `to_ids` gives, or of a part of it."""
    V = tokenizer.n_vocab
    if ids and ids[0] >= V:
        return bytes(i - V for i in ids)
    return tokenizer.decode(list(ids)).encode()


def codec(tokenizer, args):
    """The LZW for the ids of `to_ids`, which never merges ends of text."""
    return LZW(tokenizer.n_vocab + 256, args.max_codes, args.max_len, [tokenizer.eos])


# ------------------------------------------------------------------------------------ programs


def write_codes(path, raw, tokenizer, args):
    """Writes a line of settings as JSON, and the codes of some bytes."""
    lzw = codec(tokenizer, args)
    codes = lzw.encode(to_ids(tokenizer, raw))
    head = asdict(lzw) | {"disabled": sorted(lzw.disabled), "tokenizer": args.tokenizer[0]}
    if tokenizer.name.startswith("bpe:"):  # trained on these very bytes: its tokens travel along
        token = tokenizer.backend.decode_single_token_bytes
        head["tokens"] = [token(i).hex() for i in range(tokenizer.n_vocab - 1)]
    head["crc32"] = zlib.crc32(raw)
    common.write_text(path, json.dumps(head) + "\n" + " ".join(map(str, codes)) + "\n")
    print(f"{len(raw):,} bytes are {len(codes):,} codes in {path}")


def read_codes(path):
    """The bytes that `write_codes` has written as codes; ValueError if the file isn't right."""
    try:
        first, rest = Path(path).read_text("utf-8").split("\n", 1)
        head = json.loads(first)
        name, crc, tokens = (head.pop(key, None) for key in ("tokenizer", "crc32", "tokens"))
        lzw, codes = LZW(**head), [int(word) for word in rest.split()]
        if tokens is None:
            tokenizer = data.get_tokenizer(name)
        else:
            tokens = [bytes.fromhex(token) for token in tokens]
            tokenizer = data.from_tiktoken(name, data.bpe_of(tokens))
        if tokenizer.n_vocab + 256 != lzw.vocab_size:
            raise ValueError(f"{name} is another tokenizer than it was")
        raw = to_bytes(tokenizer, lzw.decode(codes))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what --encode writes ({error})") from None
    if zlib.crc32(raw) != crc:
        raise ValueError(f"{path} is damaged, or {name} is another tokenizer than it was")
    return raw


def show(raw, tokenizer, args):
    """Prints a text, every use of a row in the colour of its length."""
    lzw = codec(tokenizer, args)
    decoder = Decoder(lzw)
    for code in lzw.encode(to_ids(tokenizer, raw)):
        word, _ = decoder.push(code)
        print(paint(to_bytes(tokenizer, word).decode(errors="replace"), len(word)), end="")
    print()


def paint(text, length):
    """A text, coloured if it is a row: yellow for two base ids, then green, cyan, magenta, red."""
    colour = {2: 43, 3: 42, 4: 46, 5: 45}.get(length, 41)
    text = data.printable(text)
    return text if length == 1 else f"\x1b[30;{colour}m{text}\x1b[0m"


def table(texts, args):
    """Prints what LZW saves in windows, by file and tokenizer; returns it. texts {file: bytes}.

    The control is the same ids of each window in random order, where only their frequencies help.
    """
    text = b"".join(texts.values()).decode(errors="replace")
    found = {}
    print(f"{'file':24s}{'tokenizer':20s}{'ids':>11s}{'codes':>11s}{'saved':>9s}{'shuffled':>11s}")
    for name in args.tokenizer:
        tokenizer = data.get_tokenizer(name, text)
        lzw = codec(tokenizer, args)
        for file, raw in texts.items():
            ids, codes, shuffled = to_ids(tokenizer, raw), 0, 0
            for start in range(0, len(ids), WINDOW):
                window = ids[start : start + WINDOW]
                codes += len(lzw.encode(window))
                shuffled += len(lzw.encode(random.Random(start).sample(window, len(window))))
            saved, control = (1 - n / len(ids) if ids else 0.0 for n in (codes, shuffled))
            found[file, name] = {"saved": saved, "shuffled": control}
            numbers = f"{len(ids):11,}{codes:11,}{saved:9.1%}{control:11.1%}"
            print(f"{Path(file).name[:23]:24s}{name[-19:]:20s}{numbers}", flush=True)
    held = sum(row["saved"] >= 0.15 for row in found.values())
    control = sum(row["shuffled"] >= 0.15 for row in found.values())
    print(f"C1 at least 15 % fewer ids (paper: 15 to 40 %): {held} of {len(found)}", end="")
    print(f"; of the same ids in random order: {control}")
    return found


def main(argv=None):
    """The table of ids saved, or what --show, --encode or --decode asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = common.fail
    add = parser.add_argument
    names = "byte, bpe:N, a tiktoken name, a tokenizer.json [byte]"
    add("files", nargs="+", help="any files; a file of codes for --decode")
    add("--tokenizer", nargs="+", default=["byte"], help=names)
    add("--max-len", type=int, default=3, help="base ids of a row [3]")
    add("--max-codes", type=int, default=1024, help="rows of a dictionary [1024]")
    add("--show", action="store_true", help="the text in colour")
    add("--encode", metavar="CODES", help="write the codes of the file there")
    add("--decode", metavar="FILE", help="write the bytes of a file of codes there")
    args = parser.parse_args(argv)
    actions = [name for name in ("show", "encode", "decode") if getattr(args, name)]
    with common.bad_input():
        if len(actions) > 1 or actions and len(args.files + args.tokenizer) > 2:
            raise ValueError("--show, --encode and --decode: one of them, one file, one tokenizer")
        if args.decode:
            if (args.tokenizer, args.max_len, args.max_codes) != (["byte"], 3, 1024):
                raise ValueError("--decode takes its settings from the codes: no other flag")
            Path(args.decode).write_bytes(read_codes(args.files[0]))
            return None
        LZW(1, args.max_codes, args.max_len)  # whether they are allowed, before any work
        texts = {file: Path(file).read_bytes() for file in args.files}
        if not actions:
            return table(texts, args)
        raw = texts[args.files[0]]
        tokenizer = data.get_tokenizer(args.tokenizer[0], raw.decode(errors="replace"))
        if args.show:
            return show(raw, tokenizer, args)
        return write_codes(args.encode, raw, tokenizer, args)


if __name__ == "__main__":
    common.cli(main)
