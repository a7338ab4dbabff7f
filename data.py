"""Text in, token windows out: text sources, tokenizers, memory-mapped token files.

- sources: `stdlib` (the sources of CPython's own library: real text on every machine), `file:PATH`, any `datasets` id
- tokenizers: `byte`, `bpe:N` (trained on the spot), any tiktoken name, a `tokenizer.json`
- every tenth document is held out, so that no file is on both sides
"""

import hashlib
import heapq
import json
import os
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------ text sources


def load_text(name="stdlib", split="train") -> Iterator[str]:
    """The documents of one split, in a fixed order: every tenth document is `heldout`, the rest `train`.

    name  `stdlib` | `file:PATH` (a text file, a .jsonl file with a "text" field, or a folder of text files) |
          `ORG/NAME` or `ORG/NAME:CONFIG`, a data set id for `datasets`, streamed
    Raises ValueError for a source without text, OSError for one that can't be opened.
    """
    if name == "stdlib":
        documents = read_files(Path(sysconfig.get_paths()["stdlib"]).glob("[!_]*.py"))
    elif name.startswith("file:"):
        documents = read_path(Path(name[5:]).expanduser())
    elif "/" in name:
        documents = stream(name)
    else:
        raise ValueError(f"unknown text source {name!r}, allowed: stdlib, file:PATH, or a data set id such as ORG/NAME")
    return (text for i, text in enumerate(documents) if (i % 10 == 9) == (split == "heldout"))


def read_files(paths):
    """The text of each file, sorted by path; bytes that are not UTF-8 are replaced."""
    return (path.read_text("utf-8", errors="replace") for path in sorted(paths))


def read_path(path):
    """Documents of a local path: a folder's files, a .jsonl file's records, or a text file in a hundred pieces."""
    if path.is_dir():
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        files = [p for p in path.rglob("*") if p.is_file() and not hidden(p)]
        if not files:
            raise ValueError(f"{path} has no files")
        return read_files(files)
    text = path.read_text("utf-8", errors="replace")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    lines = text.splitlines(keepends=True)
    size = -(-len(lines) // 100)
    return ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]


def stream(name):
    """Documents of a hub data set, streamed: its `text` column, or its only column of strings."""
    import_or_explain("datasets")
    import datasets

    path, _, config = name.partition(":")
    instead = "without a network give --dataset file:PATH, or point HF_HOME at a cache that holds it"
    with explained(f"data set {name!r} can't be read", instead):
        rows = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        first = next(rows)
    columns = [c for c in first if isinstance(first[c], str)]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise ValueError(
            f"data set {name!r} has no column 'text'; its columns of strings: {', '.join(columns) or 'none'}"
        )

    def documents():
        yield first[column]
        yield from (row[column] for row in rows)

    return documents()


@contextmanager
def explained(what, instead):
    """Whatever goes wrong inside becomes an OSError of one line; each hub client has exceptions of its own."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{what} ({reason}); {instead}") from error


def import_or_explain(package):
    """Raises an ImportError that says how to install an optional package."""
    try:
        __import__(package)
    except ImportError:
        raise ImportError(f"this needs the package {package}: pip install {package}") from None


# -------------------------------------------------------------------------------------------------------- tokenizers


@dataclass
class Tokenizer:
    """What a script needs of a tokenizer. `eos` is the id between documents; specials in a text are plain text."""

    name: str
    encode: Callable  # str -> list of ids
    decode: Callable  # list of ids -> str
    n_vocab: int
    eos: int
    encode_batch: Callable  # list of str -> list of lists of ids, on several threads where the library can


def get_tokenizer(name, text=None) -> Tokenizer:
    """A tokenizer by name.

    name  `byte` | `bpe:N`, N ids in all, trained on `text` (a string) | a tiktoken name (`gpt2`, `cl100k_base`, ...) |
          a folder with a tokenizer.json, such a file, or the hub id of one
    """
    if name == "byte":
        encode = lambda text: list(text.encode())
        decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
        return Tokenizer(name, encode, decode, 257, 256, lambda texts: [encode(t) for t in texts])
    if name.startswith("bpe:"):
        if not name[4:].isdigit() or not 257 <= int(name[4:]) <= 2**20:
            raise ValueError(
                f"tokenizer {name!r}: bpe:N takes a whole number N of ids, 257 (bytes and an end) to {2**20}"
            )
        return from_tiktoken(name, train_bpe(text, int(name[4:])))
    if "/" in name or os.path.exists(name):
        return from_json(name)
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"unknown tokenizer {name!r}, allowed: byte, bpe:N, {known}, or a folder with tokenizer.json")
    try:
        return from_tiktoken(name, tiktoken.get_encoding(name))
    except Exception as error:  # requests' own exceptions, when the vocabulary can't be downloaded
        raise OSError(
            f"the vocabulary of {name!r} can't be downloaded ({type(error).__name__}); without a network use bpe:N or "
            "byte, or point TIKTOKEN_CACHE_DIR at a folder that holds it"
        ) from error


def from_tiktoken(name, enc):
    """A tiktoken Encoding as a Tokenizer."""
    return Tokenizer(name, enc.encode_ordinary, enc.decode, enc.n_vocab, enc.eot_token, enc.encode_ordinary_batch)


def from_json(name):
    """The Tokenizer of a tokenizer.json: a file, a folder that has one, or a hub id."""
    import_or_explain("tokenizers")
    import tokenizers

    path = Path(name) / "tokenizer.json" if os.path.isdir(name) else Path(name)
    try:
        tok = tokenizers.Tokenizer.from_file(str(path)) if path.exists() else tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        raise OSError(f"no tokenizer.json at {name!r} ({error}); give a folder or file, or HF_HOME with it") from error
    ends = [i for i, t in tok.get_added_tokens_decoder().items() if t.special and "end" in t.content.lower()]
    ends += [i for i in map(tok.token_to_id, ("</s>", "<eos>")) if i is not None]
    if not ends:
        raise ValueError(f"{name}: no end-of-text token among the special tokens")
    encode_batch = lambda texts: [e.ids for e in tok.encode_batch(texts, add_special_tokens=False)]
    return Tokenizer(name, lambda t: encode_batch([t])[0], tok.decode, tok.get_vocab_size(), ends[0], encode_batch)


# GPT-2's words: contractions, then letters, digits or other marks with at most one space before them, white space
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(text, n):
    """Byte-pair encoding with `n` ids (256 bytes, n - 257 merges, an end of text), as a tiktoken Encoding.

    The most frequent pair of neighbours becomes a new id, again and again; ties go to the pair of the smallest ids.
    Only the words that hold the merged pair are touched, and a heap with stale entries finds the next pair.
    """
    import regex
    import tiktoken

    counts = Counter(regex.findall(WORDS, text))
    words, freq = [list(w.encode()) for w in counts], list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> how often, pair -> indices of the words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += freq[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < n - 1:
        if not heap:
            raise ValueError(
                f"the text has pairs for {len(vocab) + 1} ids only: give more text, or a smaller bpe:N than {n}"
            )
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # stale: the count has changed since it was pushed
        new, changed = len(vocab), set()
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
        for i in where.pop(pair):
            old, word, j = words[i], [], 0
            while j < len(old):
                if tuple(old[j : j + 2]) == pair:
                    word.append(new)
                    j += 2
                else:
                    word.append(old[j])
                    j += 1
            for p in zip(old, old[1:]):
                pairs[p] -= freq[i]
                changed.add(p)
            for p in zip(word, word[1:]):
                pairs[p] += freq[i]
                where[p].add(i)
                changed.add(p)
            words[i] = word
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    ranks = {token: rank for rank, token in enumerate(vocab)}
    return tiktoken.Encoding(f"bpe:{n}", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": n - 1})


# ------------------------------------------------------------------------------------------------------------ tokens


def token_file(name, split, tok, folder, limit=None, quiet=False):
    """All tokens of a source and split as one memory-mapped array (N,), every document opened by `tok.eos`.

    Tokenized once, into `folder`; a file there is used again if source, split, tokenizer and limit (tokens) agree.
    Raises ValueError if there is no text.
    """
    dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32
    probe = tok.encode("The quick brown fox: def f(x): return 0x1F")  # a trained bpe:N differs from text to text
    source = [
        (str(p), p.stat().st_mtime) for p in [Path(name[5:]).expanduser()] if name.startswith("file:") and p.exists()
    ]
    key = repr((name, source, split, limit, tok.name, tok.n_vocab, probe, sys.version if name == "stdlib" else ""))
    path = Path(folder) / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.bin"
    if not path.exists():
        documents, total = load_text(name, split), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with (
            open(partial, "wb") as f,
            tqdm(desc=f"tokenize {split}", unit="tok", unit_scale=True, disable=quiet) as bar,
        ):
            while (batch := list(islice(documents, 256))) and (limit is None or total < limit):
                ids = np.concatenate([np.array([tok.eos, *ids], dtype=dtype) for ids in tok.encode_batch(batch)])
                ids = ids if limit is None else ids[: limit - total]
                ids.tofile(f)
                total += len(ids)
                bar.update(len(ids))
        os.replace(partial, path)
    if not path.stat().st_size:
        raise ValueError(f"text source {name!r} has no {split} text")
    return np.memmap(path, dtype=dtype, mode="r")


def windows(tokens, rng, n, length):
    """`n` windows of `length` consecutive tokens at random offsets, int64 (n, length)."""
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, one window needs {length}: give more text or a shorter window"
        )
    starts = rng.integers(0, len(tokens) - length + 1, size=n)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
