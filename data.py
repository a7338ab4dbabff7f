"""Text in, token windows out: text sources, tokenizers, token files, readers of users' files.

- sources: `stdlib` (CPython's library: real text on every machine), `file:PATH`, a `datasets` id
- tokenizers: `byte`, `bpe:N` (trained on the spot), any tiktoken name, a `tokenizer.json`
- every tenth document is held out, so that no document is on both sides
"""

import csv
import hashlib
import heapq
import importlib
import json
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm


def read_text(path):
    """The text of a file, without a byte order mark; bytes that are no UTF-8 become U+FFFD."""
    return Path(path).read_text("utf-8-sig", errors="replace")


def read_rows(path, **needed):
    """The objects of a JSON-lines file, each with the `needed` fields: read_rows(path, text=str).

    Raises ValueError naming the file, the line and what it needs.
    """
    rows = []
    for i, line in enumerate(read_text(path).split("\n"), 1):  # U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {i}: no JSON ({error})") from None
        for field, kind in needed.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                what = f"an object with {field!r}, {kind.__name__}"
                raise ValueError(f"{path}, line {i}: needs {what}")
            if kind is str:
                row[field] = row[field].encode("utf-8", "replace").decode()  # no half emojis
        rows.append(row)
    return rows


def read_table(path, columns=()):
    """The rows of a CSV or .tsv file as dictionaries; ValueError unless it has `columns`."""
    delimiter = "\t" if str(path).endswith(".tsv") else ","
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter=delimiter, restkey="")
        try:
            header = reader.fieldnames or []
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    for i, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise ValueError(f"{path}, row {i}: needs {len(header)} cells, as the header has")
    return rows


def printable(text):
    """Text for a terminal: control characters, which could drive it, are shown as U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def load_text(name="stdlib", split="train"):
    """Iterates over the documents of a split: every tenth document is `heldout`, the rest `train`.

    name  `stdlib` | `file:PATH` (a text file, a .jsonl file with "text" fields, a folder of text
          files) | `ORG/NAME` or `ORG/NAME:CONFIG`, a data set id for `datasets`, streamed
    Raises ValueError for a source without text, OSError for one that can't be opened.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r}, allowed: train, heldout")
    if name == "stdlib":
        documents = map(read_text, sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[!_]*.py")))
    elif name.startswith("file:") and name.endswith(".jsonl"):
        documents = (row["text"] for row in read_rows(path_of(name), text=str))
    elif name.startswith("file:"):
        documents = map(read_text, files_of(path_of(name)))
    elif "/" in name:
        documents = stream(name)
    else:
        allowed = "stdlib, file:PATH, or a data set id such as ORG/NAME"
        raise ValueError(f"unknown text source {name!r}, allowed: {allowed}")
    documents = filter(str.strip, documents)  # Empty documents are left out.
    first = list(islice(documents, 10))
    if not first:
        raise ValueError(f"text source {name!r} is empty")
    if len(first) < 10:  # None would be held out: the text is cut into a hundred pieces.
        text = "".join(first)
        size = -(-len(text) // 100)
        first = [text[i : i + size] for i in range(0, len(text), size)]
    heldout = split == "heldout"
    every = enumerate(chain(first, documents))
    return (text for i, text in every if (i % 10 == 9) == heldout)


def is_local(name):
    """Whether a text source lies on this machine, whole; others are streamed."""
    return name == "stdlib" or name.startswith("file:")


def path_of(name):
    """The path in a text source `file:PATH`."""
    return Path(name.removeprefix("file:")).expanduser()


def files_of(path):
    """The files of a folder, without hidden ones, in order; of a file, itself."""
    if not path.is_dir():
        return [path]
    inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
    return [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]


def stream(name):
    """Documents of a hub data set, streamed: its column `text`."""
    datasets = import_or_explain("datasets")
    path, _, config = name.partition(":")
    instead = "without a network give file:PATH, or point HF_HOME at a cache that holds it"
    with explained(f"data set {name!r} can't be read", instead):
        rows = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        first = next(rows)
    if not isinstance(first.get("text"), str):
        raise ValueError(f"data set {name!r} has no column of texts named 'text'")
    return (row["text"] or "" for row in chain([first], rows))


@contextmanager
def explained(what, instead):
    """Whatever goes wrong inside becomes one line's OSError: hub clients raise their own kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{what} ({reason}); {instead}") from error


def import_or_explain(package):
    """An optional package; an ImportError says how to install one that is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"this needs the package {package}: pip install {package}") from None


@dataclass
class Tokenizer:
    """A tokenizer of any kind. A text is text: `encode` makes no control ids of it."""

    name: str
    encode_batch: Callable  # list of texts -> list of lists of ids
    decode: Callable  # list of ids -> text; control tokens of a checkpoint are shown by name
    n_vocab: int  # largest id + 1
    eos: int  # stands between documents
    bos: int | None = None
    opens: bool = False  # the model expects a text to open with `bos`
    stops: list = ()  # ids that end a document or a turn; the first, or the only one, is `eos`
    template: str | None = None  # of chats, in jinja's language
    backend: object = None  # a `tokenizers.Tokenizer` or `tiktoken.Encoding`; None for bytes

    def __post_init__(self):
        self.stops = list(self.stops) or [self.eos]

    def encode(self, text, bos=False):
        """The ids of a text; with `bos` opened as the model expects it (Llama, Gemma: by bos)."""
        ids = self.encode_batch([text])[0]
        return [self.bos, *ids] if bos and self.opens else ids

    def chat(self, messages, prefill=""):
        """Ids of messages [{"role": ..., "content": ...}], ending in the assistant's `prefill`.

        The template's special tokens become control ids, those that somebody wrote stay text.
        Raises ValueError if there is no chat template, or it refuses the messages.
        """
        if not self.template:
            raise ValueError(f"{self.name} has no chat template: it is a base model")
        ids = {"bos_token": self.bos, "eos_token": self.eos}
        special = {role: self.backend.id_to_token(i) for role, i in ids.items() if i is not None}
        try:
            text = render(self.template, messages=messages, **special) + prefill
        except Exception as error:  # A template is a program: it may raise anything.
            raise ValueError(f"the chat template of {self.name}: {error}") from error
        added = self.backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        ids = []
        # A message that spells a special token is cut out of the rendered text and encoded as
        # text. Every other message stays where it is: cutting there could change its tokens.
        for content in [*(message["content"] for message in messages), prefill]:
            if isinstance(content, str) and any(token in content for token in special):
                before, found, text = text.partition(content.strip())
                if not found:
                    raise ValueError("a message holds a control token, which the template changes")
                ids += self.with_control_ids(before) + self.encode(found)
        return ids + self.with_control_ids(text)

    def with_control_ids(self, text):
        """The ids of a text whose special tokens are those tokens."""
        self.backend.encode_special_tokens = False
        ids = self.backend.encode(text, add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        return ids


def render(template, **variables):
    """The text of a chat template, as transformers renders it, in jinja's sandbox.

    Raises an error for one that takes over two seconds or writes over a million characters.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)

    def give_up(number, frame):
        raise TimeoutError("it takes over two seconds")

    def times(a, b):
        for text, n in (a, b), (b, a):
            if hasattr(text, "__len__") and len(text) * n > 10**6:
                raise ValueError(f"it repeats a text {n} times")
        return a * b

    options = {"trim_blocks": True, "lstrip_blocks": True}
    env = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"], **options)
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    env.intercepted_binops = frozenset("*")
    env.binop_table["*"] = times
    # {% generation %} marks what to train on. Here it becomes an assignment that does nothing.
    template = re.sub(r"(\{%-?\s*)(end)?generation\b", r"\1set generation = 1", template)
    variables |= {"add_generation_prompt": True, "tools": None, "documents": None}
    text = ""
    if threading.current_thread() is threading.main_thread():  # No other can have a signal.
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(2)
    try:
        for piece in env.from_string(template).generate(variables):
            text += piece
            if len(text) > 10**6:
                raise ValueError("it writes more than a million characters")
    finally:
        signal.alarm(0)
    return text


def get_tokenizer(name, text=None) -> Tokenizer:
    """A tokenizer by name.

    name  `byte` | `bpe:N`, N ids in all, trained on `text` (a string) | a tiktoken name (`gpt2`,
          `cl100k_base`, ...) | a folder with a tokenizer.json, such a file, or the hub id of one
    """
    if name == "byte":
        return Tokenizer(name, encode_bytes, decode_bytes, n_vocab=257, eos=256)
    if name.startswith("bpe:"):
        if text is None:
            raise ValueError(f"tokenizer {name!r} is trained on a text, and there is none here")
        if not name[4:].isdecimal() or not 257 <= int(name[4:]) <= 2**20:
            allowed = f"bpe:257 (bytes and an end) to bpe:{2**20}"
            raise ValueError(f"tokenizer {name!r}, allowed: {allowed}")
        return from_tiktoken(name, train_bpe(text, int(name[4:])))
    if "/" in name or os.path.exists(name):
        return from_folder(name)
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["byte", "bpe:N", *tiktoken.list_encoding_names()])
        raise ValueError(f"unknown tokenizer {name!r}, allowed: {known}, a tokenizer.json")
    instead = "without a network use bpe:N or byte, or point TIKTOKEN_CACHE_DIR at its folder"
    with explained(f"the vocabulary of {name!r} can't be downloaded", instead):
        return from_tiktoken(name, tiktoken.get_encoding(name))


def encode_bytes(texts):
    """The UTF-8 bytes of each text."""
    return [list(text.encode()) for text in texts]


def decode_bytes(ids):
    """The text of some bytes; the end of text, 256, has none."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def from_tiktoken(name, enc):
    """A tiktoken Encoding as a Tokenizer."""
    encode_batch = enc.encode_ordinary_batch
    return Tokenizer(name, encode_batch, enc.decode, enc.n_vocab, enc.eot_token, backend=enc)


def from_folder(name, config=None):
    """The Tokenizer of a tokenizer.json: a file, a folder that has one, or a hub id.

    Special ids and the chat template come from the files beside it; `config` is the model's, whose
    ids of special tokens count where the tokenizer's own files are silent.
    """
    backends = import_or_explain("tokenizers").Tokenizer
    path = Path(name, "tokenizer.json") if os.path.isdir(name) else Path(name)
    folder = path.parent
    read = backends.from_file if path.exists() else backends.from_pretrained
    try:
        backend = read(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise ValueError(f"no tokenizer.json that can be read at {name!r} ({error})") from error
    own = read_json(folder / "tokenizer_config.json", {})
    config = config or {}

    def ids(role):  # The tokenizer's own file has them by name, the model's by number.
        named = own.get(f"{role}_token")
        if isinstance(named, dict):
            named = named["content"]
        numbered = config.get(f"{role}_token_id")
        found = [backend.token_to_id(named)] if named else []
        found += numbered if isinstance(numbered, list) else [numbered]
        return [i for i in dict.fromkeys(found) if i is not None]

    usual = [backend.token_to_id(token) for token in ("<eos>", "</s>", "<|endoftext|>")]
    stops = ids("eos") or [i for i in usual if i is not None][:1]
    template, file = own.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if file.exists():
        template = read_text(file)
    return from_backend(Path(name).name, backend, next(iter(ids("bos")), None), stops, template)


def read_json(path, default=None):
    """The object in a JSON file; `default` if there is no file. ValueError if it is malformed."""
    if default is not None and not path.exists():
        return default
    try:
        return dict(json.loads(path.read_text("utf-8-sig")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a JSON object ({error})") from error


def from_backend(name, backend, bos, stops, template):
    """A `tokenizers.Tokenizer` as a Tokenizer. ValueError if it has no id that ends a text."""
    backend.no_truncation()  # A tokenizer.json may ask for truncation and padding.
    backend.no_padding()
    backend.encode_special_tokens = True  # Special tokens in a text are text.
    n_vocab = max(backend.get_vocab().values()) + 1  # The ids may have gaps.
    if not stops:
        raise ValueError(f"{name} has no end-of-text token")

    def encode_batch(texts):
        return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

    decode = partial(backend.decode, skip_special_tokens=False)
    opens = bos is not None and backend.encode("x").ids[:1] == [bos]
    more = {"bos": bos, "opens": opens, "stops": stops, "template": template, "backend": backend}
    return Tokenizer(name, encode_batch, decode, n_vocab, stops[0], **more)


# GPT-2's words are contractions, then letters, digits or other marks with at most one space before
# them, and white space.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(text, n):
    """Byte-pair encoding with `n` ids (256 bytes, n - 257 merges, an end), a tiktoken Encoding.

    The most frequent pair of neighbours becomes a new id, again and again; ties go to the pair of
    the smallest ids. Only the words that hold the merged pair are touched, and a heap with stale
    entries finds the next pair.
    """
    import regex

    counts = Counter(regex.findall(WORDS, text))
    freq = list(counts.values())
    words = [word.encode().decode("latin-1") for word in counts]  # one character for each id
    pairs = Counter()  # pair -> how often
    where = defaultdict(set)  # pair -> indices of the words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += freq[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < n - 1:
        if not heap:
            less = f"give more text, or a smaller bpe:N than {n}"
            raise ValueError(f"the text has pairs for {len(vocab) + 1} ids only: {less}")
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # This entry is stale: the count has changed since it was pushed.
        new = chr(len(vocab))
        vocab.append(vocab[ord(pair[0])] + vocab[ord(pair[1])])
        changed = set()
        for i in where.pop(pair):
            old = words[i]
            word = words[i] = old.replace("".join(pair), new)
            for p in zip(old, old[1:]):
                pairs[p] -= freq[i]
            for p in zip(word, word[1:]):
                pairs[p] += freq[i]
                where[p].add(i)
            changed.update(zip(old, old[1:]), zip(word, word[1:]))
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    return bpe_of(vocab)


def bpe_of(tokens):
    """The tiktoken Encoding of `train_bpe`'s tokens (bytes), in the order of their merges."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    end = {"<|endoftext|>": len(tokens)}
    name = f"bpe:{len(tokens) + 1}"
    return tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=end)


def token_file(name, split, tok, folder, limit=None, quiet=False):
    """All tokens of a source and split as one memory-mapped array (N,), documents behind `tok.eos`.

    Tokenized once, into `folder`; a file there is used again if source, split, tokenizer and limit
    (in tokens) agree. Raises ValueError if there is no text.
    """
    dtype = np.uint16 if tok.n_vocab <= 2**16 else np.uint32
    source = sys.version
    if name.startswith("file:"):
        source = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files_of(path_of(name))]
    # Two bpe:N of different texts have one name. What they make of a sentence tells them apart.
    probe = tok.encode("The quick brown fox: def f(x): return 0x1F")
    key = repr((name, source, split, limit, tok.name, tok.n_vocab, probe))
    path = Path(folder) / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.bin"
    if not path.exists():
        documents = load_text(name, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        bar = tqdm(desc=f"tokenize {split}", unit="tok", unit_scale=True, disable=quiet)
        left = limit or sys.maxsize
        with open(aside, "wb") as f, bar:
            while left and (batch := list(islice(documents, 256))):
                ids = []
                for document in tok.encode_batch(batch):
                    ids += [tok.eos, *document]
                ids = ids[:left]
                np.array(ids, dtype).tofile(f)
                left -= len(ids)
                bar.update(len(ids))
        os.replace(aside, path)
    if not path.stat().st_size:
        raise ValueError(f"text source {name!r} has no {split} text")
    return np.memmap(path, dtype=dtype, mode="r")


def windows(tokens, rng, n, length):
    """`n` windows of `length` consecutive tokens at random offsets, int64 (n, length)."""
    if len(tokens) < length:
        less = "give more text or a shorter window"
        raise ValueError(f"the text has {len(tokens)} tokens, one window needs {length}: {less}")
    starts = rng.integers(0, len(tokens) - length + 1, size=n)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
