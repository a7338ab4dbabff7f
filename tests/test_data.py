"""data.py: sources split by document, tokenizers, token files."""

import json
from collections import Counter

import numpy as np
import pytest
import regex

import data


def naive_bpe(text, n):
    """The merges of byte-pair encoding, counting all pairs anew for each."""
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(data.WORDS, text))
    vocab = [bytes([b]) for b in range(256)]
    while len(vocab) < n - 1:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda p: (-pairs[p], vocab.index(p[0]), vocab.index(p[1])))
        vocab.append(best[0] + best[1])
        merged = Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                out.append(b"".join(word[i : i + step]))
                i += step
            merged[tuple(out)] += count
        words = merged
    return vocab


def test_bpe_equals_the_naive_trainer():
    text = "the theme of the thesis: aaaa aaa banana bandana; naïve café 日本 " * 3 + "def f(x):\n    return x\n"
    enc = data.train_bpe(text, 300)
    assert [enc.decode_single_token_bytes(i) for i in range(299)] == naive_bpe(text, 300)
    assert enc.n_vocab == 300 and enc.eot_token == 299


@pytest.mark.parametrize("name", ["byte", "bpe:280"])
def test_tokenizers_round_trip(name):
    tok = data.get_tokenizer(name, "to be or not to be, that is the question " * 5)
    for text in "", "to be", "Füße 日本 🙂\n\t<|endoftext|>", " ".join(map(chr, range(1, 600))):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(0 <= i < tok.n_vocab for i in ids) and tok.eos not in ids
    assert tok.encode_batch(["a", "bc"]) == [tok.encode("a"), tok.encode("bc")]


def test_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tok = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(["<|endoftext|>"])
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = data.get_tokenizer(str(tmp_path))
    assert ours.encode("b a") == [1, 0] and ours.eos == 3 and ours.n_vocab == 4


@pytest.mark.parametrize(
    "name, match", [("bpe:12", "257"), ("bpe:x", "257"), ("nope", "allowed: byte"), ("/no/where", "tokenizer.json")]
)
def test_tokenizer_errors(name, match, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=match):
        data.get_tokenizer(name, "some text")
    with pytest.raises(ValueError, match="ids only"):
        data.get_tokenizer("bpe:400", "ab ab")


def test_documents_are_on_one_side(tmp_path):
    train, heldout = (list(data.load_text("stdlib", split)) for split in ("train", "heldout"))
    assert len(train) > 8 * len(heldout) > 0 and not set(train) & set(heldout)
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"text {i}")
    assert list(data.load_text(f"file:{tmp_path}", "heldout")) == ["text 9", "text 19"]
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(11)))
    assert list(data.load_text(f"file:{lines}", "heldout")) == ["9"]
    whole = tmp_path / "long.md"
    whole.write_text("".join(f"line {i}\n" for i in range(1000)))
    parts = [list(data.load_text(f"file:{whole}", split)) for split in ("train", "heldout")]
    assert [len(p) for p in parts] == [90, 10] and sorted("".join(sum(parts, []))) == sorted(whole.read_text())


def test_source_errors(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for name, kind, match in [
        ("nope", ValueError, "allowed: stdlib"),
        (f"file:{tmp_path / 'absent'}", OSError, "absent"),
        (f"file:{tmp_path / 'empty.txt'}", ValueError, "empty"),
    ]:
        with pytest.raises(kind, match=match):
            data.load_text(name)


def test_token_file(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": "ab" * i}) + "\n" for i in range(11)))
    name, tok, folder = f"file:{source}", data.get_tokenizer("byte"), tmp_path / "tokens"
    ids = data.token_file(name, "train", tok, folder, quiet=True)
    assert ids.dtype == np.uint16 and (ids == tok.eos).sum() == 10 and ids[0] == tok.eos
    assert tok.decode(ids.tolist()) == "ab" * (sum(range(11)) - 9)
    stamp = next(folder.iterdir()).stat().st_mtime_ns
    data.token_file(name, "train", tok, folder, quiet=True)
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [stamp]  # made once
    assert len(data.token_file(name, "train", tok, folder, limit=7, quiet=True)) == 7
    big = data.Tokenizer("big", tok.encode, tok.decode, 2**16 + 1, 2**16, tok.encode_batch)
    assert data.token_file(name, "train", big, folder, quiet=True).dtype == np.uint32
    source.write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ValueError, match="no heldout text"):
        data.token_file(name, "heldout", tok, folder, quiet=True)


def test_windows():
    tokens, rng = np.arange(50, dtype=np.uint16), np.random.default_rng(0)
    x = data.windows(tokens, rng, 500, 8)
    assert x.dtype == np.int64 and (np.diff(x, axis=1) == 1).all() and x.min() == 0 and x.max() == 49
    with pytest.raises(ValueError, match="50 tokens, one window needs 51"):
        data.windows(tokens, rng, 1, 51)
