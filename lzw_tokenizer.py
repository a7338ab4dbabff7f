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
"""

import argparse
import json
import random
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import common
import data

WINDOW = 1024  # base ids that share a dictionary in the table: what the paper's models read at once


@dataclass
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
        self.disabled = frozenset(checked_ids(self.disabled, self.vocab_size, "disabled id"))

    def encode(self, ids):
        """The codes of base ids (a list, array or tensor), a list; ValueError for an id above V."""
        ids = checked_ids(ids, self.vocab_size, "id")
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
        codes, start = [], 0
        while start < len(ids):
            code, end = ids[start], start + 1
            while end < len(ids) and code * self.vocab_size + ids[end] in decoder.table:
                code = decoder.table[code * self.vocab_size + ids[end]]
                end += 1
            decoder.push(code)
            codes.append(code)
            start = end
        return codes

    def decode(self, codes):
        """The base ids of codes, a list; ValueError for a code that isn't defined when it comes."""
        codes = checked_ids(codes, self.vocab_size + self.max_codes, "code")
        ids = self.decode_canonical(codes)
        if ids is None:
            ids, decoder = [], Decoder(self)
            for code in codes:
                ids += decoder.push(code)[0]
        return ids

    def decode_canonical(self, codes):
        """Base ids of codes as `encode` gives them: all but the first of a stretch complete a row.

        None for other codes: one comes before its row, or LZW would have used a row that was there.
        """
        V, M, N = self.vocab_size, self.max_len, self.max_codes
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


def checked_ids(ids, end, what):
    """Ids as a list; ValueError that names the first that is not from 0 to end - 1."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if ids and (min(ids) < 0 or max(ids) >= end):
        place = [0 <= a < end for a in ids].index(False)
        raise ValueError(f"{what} {place} is {ids[place]}, allowed: 0 to {end - 1}")
    return ids


class Decoder:
    """The decoder one code at a time, for any stream: a model may spell out what LZW would merge.

    Its rows after some codes are those of an encoder that has read their base ids.
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
        known, begun = len(self.rows), 0
        if code == self.lzw.vocab_size + known and self.depth:
            self.read(self.expand(self.match)[0])  # it begins like the match, and completes the row
            begun = 1
        word = self.expand(code)
        for a in word[begun:]:
            self.read(a)
        self.counts.append(len(self.rows))
        return word, self.rows[known:]

    def read(self, a):
        """Takes one base id, as the encoder would."""
        if a in self.lzw.disabled:
            self.depth = 0
            return
        key = self.match * self.lzw.vocab_size + a if self.depth else None
        if key in self.table:
            self.match, self.depth = self.table[key], self.depth + 1
        else:
            if self.depth and len(self.rows) < self.lzw.max_codes:
                self.table[key] = self.lzw.vocab_size + len(self.rows)
                self.rows.append((*self.expand(self.match), a))
            self.match, self.depth = a, 1
        if self.depth == self.lzw.max_len:
            self.depth = 0


def to_ids(tok, raw):
    """Ids of any bytes: the tokenizer's if they give these bytes back, else 256 behind its own."""
    with suppress(UnicodeDecodeError):
        ids = tok.encode(raw.decode("utf-8"))
        if tok.decode(ids).encode() == raw:
            return ids
    return [tok.n_vocab + byte for byte in raw]


def to_bytes(tok, ids):
    """The bytes of what `to_ids` gives, or of a part of it."""
    if ids and ids[0] >= tok.n_vocab:
        return bytes(i - tok.n_vocab for i in ids)
    return tok.decode(list(ids)).encode()


def codec(tok, args):
    """The LZW for the ids of `to_ids`, which never merges ends of text."""
    return LZW(tok.n_vocab + 256, args.max_codes, args.max_len, [tok.eos])


def write_codes(raw, tok, args):
    """Writes a line of settings as JSON, and the codes of some bytes."""
    lzw = codec(tok, args)
    codes = lzw.encode(to_ids(tok, raw))
    head = asdict(lzw) | {"tokenizer": args.tokenizer[0], "crc32": zlib.crc32(raw)}
    if tok.name.startswith("bpe:"):  # trained on these very bytes: its tokens travel along
        bytes_of = tok.backend.decode_single_token_bytes
        head["tokens"] = [bytes_of(i).hex() for i in range(tok.n_vocab - 1)]
    first = json.dumps(head, default=list)  # the disabled ids are a set
    common.write_text(args.encode, first + "\n" + " ".join(map(str, codes)) + "\n")
    print(f"{len(raw):,} bytes are {len(codes):,} codes in {args.encode}")


def read_codes(path, to):
    """Writes the bytes that a file of codes stands for; ValueError if it isn't right."""
    try:
        first, rest = Path(path).read_text("utf-8").split("\n", 1)
        head = json.loads(first)
        name, crc = head.pop("tokenizer", None), head.pop("crc32", None)
        tokens = head.pop("tokens", None)
        if tokens is None:
            tok = data.get_tokenizer(name)
        else:
            backend = data.bpe_of([bytes.fromhex(token) for token in tokens])
            tok = data.from_tiktoken(name, backend)
        raw = to_bytes(tok, LZW(**head).decode([int(word) for word in rest.split()]))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is not what --encode writes ({error})") from None
    if zlib.crc32(raw) != crc:
        raise ValueError(f"{path} is damaged, or {name} is another tokenizer than it was")
    Path(to).write_bytes(raw)


def show(raw, tok, args):
    """Prints a text, every use of a row in the colour of its length."""
    decoder = Decoder(codec(tok, args))
    words = [decoder.push(code)[0] for code in decoder.lzw.encode(to_ids(tok, raw))]

    def decode(ids):
        return to_bytes(tok, ids).decode(errors="replace")

    for text, i in data.whole_characters(words, decode):
        print(paint(text, len(words[i])), end="")
    print()


def paint(text, length):
    """A text, coloured if it is a row: yellow for two base ids, then green, cyan, magenta, red."""
    colour = {2: 43, 3: 42, 4: 46, 5: 45}.get(length, 41)
    text = data.printable(text)
    return text if length == 1 else f"\x1b[30;{colour}m{text}\x1b[0m"


def savings(args):
    """Prints what LZW saves in windows, and (the control) on their ids in random order."""
    texts = {file: Path(file).read_bytes() for file in args.files}
    joined = b"".join(texts.values()).decode(errors="replace")
    found = {}
    print(f"{'file':24s}{'tokenizer':20s}{'ids':>11s}{'codes':>11s}{'saved':>9s}{'shuffled':>11s}")
    for name in args.tokenizer:
        tok = data.get_tokenizer(name, joined)
        lzw = codec(tok, args)
        for file, raw in texts.items():
            ids, codes, shuffled = to_ids(tok, raw), 0, 0
            for start in range(0, len(ids), WINDOW):
                window = ids[start : start + WINDOW]
                codes += len(lzw.encode(window))
                shuffled += len(lzw.encode(random.Random(start).sample(window, len(window))))
            saved = 1 - codes / len(ids) if ids else 0.0
            control = 1 - shuffled / len(ids) if ids else 0.0
            found[file, name] = {"saved": saved, "shuffled": control}
            numbers = f"{len(ids):11,}{codes:11,}{saved:9.1%}{control:11.1%}"
            print(f"{Path(file).name[:23]:24s}{name[-19:]:20s}{numbers}", flush=True)
    for what in "saved", "shuffled":
        held = sum(row[what] >= 0.15 for row in found.values())
        print(f"C1 {what}: 15 % or more (paper: 15 to 40 %) in {held} of {len(found)}")
    return found


def main(argv=None):
    """The table of savings, or what --show, --encode or --decode asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = common.fail
    parser.add_argument("files", nargs="+", help="any files; a file of codes for --decode")
    parser.add_argument("--tokenizer", nargs="+", default=["byte"], help="byte, bpe:N, gpt2, ...")
    parser.add_argument("--max-len", type=int, default=3, help="base ids of a row [3]")
    parser.add_argument("--max-codes", type=int, default=1024, help="rows of a dictionary [1024]")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--show", action="store_true", help="the text in colour")
    action.add_argument("--encode", metavar="CODES", help="write the codes of the file there")
    action.add_argument("--decode", metavar="FILE", help="write the bytes of a file of codes there")
    args = parser.parse_args(argv)
    with common.bad_input():
        if not (args.show or args.encode or args.decode):
            return savings(args)
        if len(args.files + args.tokenizer) > 2:
            raise ValueError("--show, --encode and --decode take one file and one tokenizer")
        if args.decode:
            return read_codes(args.files[0], args.decode)
        raw = Path(args.files[0]).read_bytes()
        tok = data.get_tokenizer(args.tokenizer[0], raw.decode(errors="replace"))
        if args.show:
            return show(raw, tok, args)
        return write_codes(raw, tok, args)


if __name__ == "__main__":
    common.cli(main)
