"""Text in, token windows out; tokenizers; readers of users' files.

- sources: `stdlib` (CPython's library: text on every machine), `file:PATH`, a `datasets` id
- tokenizers: `byte`, `bpe:N` (trained on the spot), any of tiktoken, a `tokenizer.json`
- every tenth document is held out, so that no document is on both sides
"""

import csv
import glob
import hashlib
import json
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import index
from pathlib import Path

import numpy as np
from tqdm import tqdm


def read_text(path):
    """The text of a file, without a byte order mark. What is no UTF-8 becomes U+FFFD."""
    return Path(path).read_text("utf-8-sig", errors="replace")


def read_rows(path, **needed):
    """The objects of a JSON-lines file, each with `needed` fields: read_rows(path, text=str).

    Raises ValueError naming the file, the line and what it needs.
    """
    rows = []
    for i, line in enumerate(read_text(path).split("\n"), 1):  # a string may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = all(isinstance(row[key], kind) for key, kind in needed.items())
        except (ValueError, LookupError, TypeError, RecursionError):
            good = False
        if not good:
            wanted = [f"{key!r}, {kind.__name__}" for key, kind in needed.items()]
            raise ValueError(f"{path}, line {i}: needs JSON with {' and '.join(wanted)}")
        rows.append(row)
    return rows


def read_table(path, columns=()):
    """The rows of a CSV or .tsv file as dictionaries, with `columns`, or a ValueError."""
    delimiter = "\t" if str(path).endswith(".tsv") else ","
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter=delimiter)
        try:
            header = next(reader, [])
            rows = [dict(zip(header, row, strict=True)) for row in reader if row]
        except (ValueError, csv.Error) as error:
            needs = "needs as many cells as the header has, in UTF-8"
            raise ValueError(f"{path}, line {reader.line_num}: {needs} ({error})") from None
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    return rows


def printable(text):
    """Text for a terminal: control characters, which could drive it, become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def whole_characters(words, decode):
    """Pairs (text, i) of words i, lists of ids; a character of several comes with the last."""
    held = []
    for i, word in enumerate(words):
        held += word
        text = decode(held)
        torn = text.endswith("\ufffd") and not text.endswith("\ufffd" * 4)  # it has up to 4 bytes
        if not torn or i == len(words) - 1:
            yield text, i
            held = []


def load_text(name="stdlib", split="train"):
    """Iterates over the documents of a split: every tenth is `heldout`, the rest `train`.

    name  `stdlib` | `file:PATH`, a text, a .jsonl file with "text" fields, a folder of texts
          | `ORG/NAME` or `ORG/NAME:CONFIG`, an id for `datasets`, streamed
    Raises ValueError for a source without text, OSError for one that can't be opened.
    """
    ours = {"train": range(9), "heldout": [9]}[split]
    if name == "stdlib":
        documents = map(read_text, sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")))
    elif name.startswith("file:") and name.endswith(".jsonl"):
        rows = read_rows(files_of(name)[0], text=str)
        documents = (row["text"].encode("utf-8", "replace").decode() for row in rows)
    elif name.startswith("file:"):
        documents = map(read_text, files_of(name))
    elif "/" in name:
        documents = (row["text"] or "" for row in hub_rows(name, "text"))
    else:
        raise ValueError(f"text {name!r}, allowed: stdlib, file:PATH, a data set's ORG/NAME")
    documents = filter(str.strip, documents)  # Empty documents are left out.
    first = list(islice(documents, 10))
    if not first:
        raise ValueError(f"text source {name!r} is empty")
    if len(first) < 10:  # None would be held out: cut the text into a hundred pieces.
        text = "".join(first)
        size = -(-len(text) // 100)
        first = [text[i : i + size] for i in range(0, len(text), size)]
    return (text for i, text in enumerate(chain(first, documents)) if i % 10 in ours)


def is_local(name):
    """Whether a text source lies on this machine, whole; others are streamed."""
    return name == "stdlib" or name.startswith("file:")


def files_of(name):
    """The files of a source `file:PATH`: PATH, or what a folder holds but hidden files."""
    path = Path(name.removeprefix("file:")).expanduser()
    if not path.is_dir():
        return [path]
    inside = glob.iglob(f"{glob.escape(str(path))}/**", recursive=True)
    return sorted(p for p in map(Path, inside) if p.is_file())


def hub_rows(name, *columns):
    """The rows of a data set of the hub, streamed, as dictionaries with `columns`."""
    import datasets

    path, _, config = name.partition(":")
    instead = "without a network give file:PATH, or an HF_HOME that holds it"
    with explained(f"data set {name!r} can't be read", instead):
        rows = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        first = next(rows)
    if missing := {*columns} - {*first}:
        raise ValueError(f"data set {name!r} has no column {', '.join(missing)}")
    return chain([first], rows)


@contextmanager
def explained(what, instead):
    """Turns any error inside into an OSError of one line: hub clients have their own kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{what} ({reason}); {instead}") from error


@dataclass
class Tokenizer:
    """A tokenizer of any kind. A text is text: `encode` makes no control ids of it."""

    name: str
    backend: object  # a `tokenizers.Tokenizer` or `tiktoken.Encoding`
    encode_batch: Callable  # list of texts -> list of lists of ids
    decode: Callable  # list of ids -> text; control tokens are shown by name
    n_vocab: int  # largest id + 1
    eos: int  # stands between documents
    stops: list  # ids that end a document or a turn, `eos` among them
    bos: int | None = None
    opens: bool = False  # the model expects a text to open with `bos`
    template: str | None = None  # of chats, in jinja's language

    def encode(self, text, bos=False):
        """The ids of a text; with `bos`, opened as the model expects it."""
        ids = self.encode_batch([text])[0]
        return [self.bos, *ids] if bos and self.opens else ids

    def chat(self, messages, prefill=""):
        """Ids of messages [{"role": ..., "content": ...}] and the answer's begin, `prefill`.

        The template's special tokens become control ids, those in messages stay text.
        Raises ValueError if there is no chat template, or it refuses the messages.
        """
        if not self.template:
            raise ValueError(f"{self.name} has no chat template: it is a base model")
        variables = {"messages": messages, "eos_token": self.backend.id_to_token(self.eos)}
        if self.bos is not None:
            variables["bos_token"] = self.backend.id_to_token(self.bos)
        try:
            text = render(self.template, variables) + prefill
        except Exception as error:  # A template is a program: it may raise anything.
            raise ValueError(f"the chat template of {self.name}: {error}") from error
        added = self.backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        ids = []
        # A message that spells a special token is cut out and encoded as text.
        # The others stay where they are: cutting there could change their tokens.
        for content in [*(message["content"] for message in messages), prefill]:
            if any(token in content for token in special):
                before, found, text = text.partition(content.strip())
                if not found:
                    raise ValueError("the template changes a message with a control token")
                ids += self.with_control_ids(before) + self.encode(found)
        return ids + self.with_control_ids(text)

    def with_control_ids(self, text):
        """The ids of a text whose special tokens are those tokens."""
        self.backend.encode_special_tokens = False
        ids = self.backend.encode(text, add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        return ids


def render(template, variables):
    """The text of a chat template, as transformers renders it, in jinja's sandbox.

    A template is a program from outside: it has two seconds and a million characters.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message, *_):
        raise ValueError(message)

    options = {"trim_blocks": True, "lstrip_blocks": True}
    options["extensions"] = ["jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(**options)
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    env.globals |= {"add_generation_prompt": True, "tools": None, "documents": None}
    env.intercepted_binops = frozenset("*")
    env.binop_table["*"] = lambda a, b: index(a) * index(b)  # never "a" * 10**10
    # {% generation %} marks what to train on: here an assignment that does nothing.
    template = re.sub(r"(\{%-?\s*)(end)?generation\b", r"\1set generation = 1", template)
    if threading.current_thread() is threading.main_thread():  # no other has signals
        signal.signal(signal.SIGALRM, partial(refuse, "it takes over two seconds"))
        signal.alarm(2)
    text = ""
    try:
        for piece in env.from_string(template).generate(variables):
            text += piece
            if len(text) > 10**6:
                refuse("it writes more than a million characters")
    finally:
        signal.alarm(0)
    return text


def get_tokenizer(name, text=None):
    """A Tokenizer by name.

    name  `byte` | `bpe:N`, N ids in all, trained on `text` | one of tiktoken (`gpt2`, ...)
          | a folder with a tokenizer.json, such a file, or the hub id of one
    """
    if name == "byte":
        return from_tiktoken(name, bpe_of(BYTES))
    if name.startswith("bpe:"):
        if not name[4:].isdecimal() or not 257 <= int(name[4:]) <= 2**20 or text is None:
            raise ValueError(f"{name}, allowed: bpe:257 to bpe:{2**20}, trained on a text")
        return from_tiktoken(name, train_bpe(text, int(name[4:])))
    if "/" in name or os.path.exists(name):
        return from_folder(name)
    import tiktoken

    instead = "allowed: byte, bpe:N, a tokenizer.json, tiktoken's (in TIKTOKEN_CACHE_DIR)"
    with explained(f"unknown tokenizer {name!r}, or no network", instead):
        return from_tiktoken(name, tiktoken.get_encoding(name))


def from_tiktoken(name, enc):
    """A tiktoken Encoding as a Tokenizer."""
    encode_batch, eos = enc.encode_ordinary_batch, enc.eot_token
    return Tokenizer(name, enc, encode_batch, enc.decode, enc.n_vocab, eos, [eos])


def from_folder(name, config=None):
    """The Tokenizer of a tokenizer.json: a file, a folder that has one, or a hub id.

    Special ids and the chat template come from the files beside it, or else, for the ids,
    from `config`, the model's.
    """
    from tokenizers import Tokenizer as Backend

    path = Path(name, "tokenizer.json") if os.path.isdir(name) else Path(name)
    read = Backend.from_file if path.exists() else Backend.from_pretrained
    try:
        backend = read(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(f"no tokenizer.json to be read at {name} ({error})") from error
    own = read_json(path.with_name("tokenizer_config.json"))

    def ids(role):  # The tokenizer's own file has them by name, the model's by number.
        named = own.get(f"{role}_token")
        if isinstance(named, dict):
            named = named["content"]
        numbered = (config or {}).get(f"{role}_token_id")
        numbered = numbered if isinstance(numbered, list) else [numbered]
        found = [backend.token_to_id(named or ""), *numbered]
        return [i for i in dict.fromkeys(found) if i is not None]

    usual = [backend.token_to_id(token) for token in ("<eos>", "</s>", "<|endoftext|>")]
    stops = ids("eos") or [i for i in usual if i is not None][:1]
    template, file = own.get("chat_template"), path.with_name("chat_template.jinja")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if file.exists():
        template = read_text(file)
    return from_backend(Path(name).name, backend, [*ids("bos"), None][0], stops, template)


def read_json(path):
    """What a JSON file holds; an empty dictionary if there is no file."""
    return json.loads(path.read_text("utf-8-sig")) if path.exists() else {}


def from_backend(name, backend, bos, stops, template):
    """A `tokenizers.Tokenizer` as a Tokenizer. ValueError if no id ends a text."""
    if not stops:
        raise ValueError(f"{name} has no end-of-text token")
    backend.no_truncation()  # A tokenizer.json may ask for truncation and padding.
    backend.no_padding()
    backend.encode_special_tokens = True  # Special tokens in a text are text.
    n_vocab = max(backend.get_vocab().values()) + 1  # The ids may have gaps.

    def encode_batch(texts):
        return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

    decode = partial(backend.decode, skip_special_tokens=False)
    opens = bos is not None and backend.encode("x").ids[:1] == [bos]
    special = stops[0], stops, bos, opens
    return Tokenizer(name, backend, encode_batch, decode, n_vocab, *special, template)


# GPT-2's words are contractions; letters, digits or other marks with at most one space
# before them; and white space.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([b]) for b in range(256)]


def train_bpe(text, n):
    """Byte-pair encoding of `n` ids (256 bytes, n - 257 merges, an end) as a tiktoken Encoding.

    The most frequent pair of neighbours in the words becomes an id, again and again. Of equally
    frequent pairs it is the one with the smallest ids.
    """
    import regex
    from tokenizers import Tokenizer, models, trainers

    letters = [b.decode("latin-1") for b in BYTES]  # in a word, one for each byte
    words = (word.encode().decode("latin-1") for word in regex.findall(WORDS, text))
    options = {"initial_alphabet": letters, "show_progress": False}
    model = Tokenizer(models.BPE())
    model.train_from_iterator(words, trainers.BpeTrainer(vocab_size=n - 1, **options))
    ids = model.get_vocab()
    if len(ids) < n - 1:
        less = f"give more text, or a smaller bpe:N than {n}"
        raise ValueError(f"the text has pairs for {len(ids) + 1} ids only: {less}")
    return bpe_of([token.encode("latin-1") for token in sorted(ids, key=ids.get)])


def bpe_of(tokens):
    """The tiktoken Encoding of tokens (bytes), in the order of their merges."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    end = {"<|endoftext|>": len(tokens)}
    name = f"bpe:{len(tokens) + 1}"
    return tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=end)


def token_file(name, split, tok, folder, limit=None):
    """The tokens of a split as a memory-mapped array (N,), each document behind `tok.eos`.

    A file in `folder` is used again if source, split, tokenizer and limit (in tokens) agree.
    """
    dtype = np.dtype(np.uint16 if tok.n_vocab <= 2**16 else np.uint32)
    source = sys.version
    if name.startswith("file:"):
        source = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files_of(name)]
    # Two bpe:N of different texts have one name, but differ in what they make of a text.
    probe = tok.encode("The quick brown fox: def f(x): return 0x1F")
    key = repr((name, source, split, limit, tok.name, tok.n_vocab, probe))
    path = Path(folder) / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        documents = tqdm(load_text(name, split), f"tokenize {split}", unit=" documents")
        most = (limit or sys.maxsize) * dtype.itemsize
        with open(aside, "wb") as f:
            while f.tell() < most and (batch := list(islice(documents, 256))):
                for ids in tok.encode_batch(batch):
                    np.array([tok.eos, *ids], dtype).tofile(f)
        os.replace(aside, path)
    if not path.stat().st_size:
        raise ValueError(f"text source {name!r} has no {split} text")
    return np.memmap(path, dtype=dtype, mode="r")[:limit]


def windows(tokens, rng, n, length):
    """`n` windows of `length` consecutive tokens at random offsets, int64 (n, length)."""
    if len(tokens) < length:
        less = "give more text or a shorter window"
        raise ValueError(f"the text has {len(tokens)} tokens, one window needs {length}: {less}")
    starts = rng.integers(0, len(tokens) - length + 1, size=n)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
