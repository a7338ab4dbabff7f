"""lzw_tokenizer.py: codes by hand, brute force, random inputs, any bytes, errors, the program."""

import json
import random
import re
import sys

import numpy as np
import pytest
import torch

import data
import lzw_tokenizer
from lzw_tokenizer import LZW, Decoder, to_bytes, to_ids


def naive(x, V, N, M, disabled):
    """The encoder as the paper tells it, with tuples: (codes, rows in order)."""
    rows, out, match = {}, [], []

    def code(ids):
        return ids[0] if len(ids) == 1 else rows[tuple(ids)]

    for a in x:
        if a in disabled:
            out += [code(match), a] if match else [a]
            match = []
            continue
        match.append(a)
        word = tuple(match)
        if len(word) > 1 and word not in rows:
            if len(rows) < N:
                rows[word] = V + len(rows)
            out.append(code(match[:-1]))
            match = [a]
        if len(match) == M:
            out.append(code(match))
            match = []
    return out + ([code(match)] if match else []), list(rows)


def read(lzw, codes):
    """The base ids of codes, the rows, and how many of them are known after each code."""
    decoder, ids, counts = Decoder(lzw), [], []
    for code in codes:
        ids += decoder.push(code)[0]
        counts.append(len(decoder.rows))
    return ids, decoder.rows, counts


def cases(n, seed=0):
    """Random (LZW, input) of small sizes."""
    rng = random.Random(seed)
    for _ in range(n):
        V = rng.randint(1, 5)
        disabled = rng.sample(range(V), rng.choice([0, 0, 1]))
        lzw = LZW(V, rng.choice([0, 1, 2, 5, 100]), rng.randint(1, 5), disabled)
        yield lzw, [rng.randrange(V) for _ in range(rng.randint(0, 40))], rng


@pytest.mark.parametrize(
    "ids, M, N, disabled, codes, rows, counts",
    [
        ([1, 2, 1, 2, 1, 2, 1], 3, 100, [0], [1, 2, 10, 12], [(1, 2), (2, 1), (1, 2, 1)], [0, 1, 2, 3]),
        ([1] * 7, 3, 100, [0], [1, 10, 11, 1], [(1, 1), (1, 1, 1)], [0, 1, 2, 2]),
        ([1] * 7, 2, 100, [0], [1, 10, 10, 10], [(1, 1)], [0, 1, 1, 1]),
        ([1] * 7, 1, 100, [0], [1] * 7, [], [0] * 7),
        ([1, 2, 3] * 3, 3, 100, [0], [1, 2, 3, 10, 12, 11], [(1, 2), (2, 3), (3, 1), (1, 2, 3), (3, 1, 2)], None),
        ([1, 2, 9, 1, 2, 9, 1, 2], 3, 100, [0, 9], [1, 2, 9, 10, 9, 10], [(1, 2)], [0, 1, 1, 1, 1, 1]),
        ([1, 2, 1, 2, 3, 1, 2, 3], 3, 2, [0], [1, 2, 10, 3, 10, 3], [(1, 2), (2, 1)], None),
        ([1, 2, 1, 2, 3], 3, 0, [0], [1, 2, 1, 2, 3], [], None),
        ([1, 2, 1, 2, 2, 1, 2, 2], 3, 100, [0], [1, 2, 10, 11, 2, 2],
         [(1, 2), (2, 1), (1, 2, 2), (2, 1, 2), (2, 2)], None),
        ([], 3, 100, [], [], [], []),
    ],
)  # fmt: skip
def test_hand_computed_codes(ids, M, N, disabled, codes, rows, counts):
    lzw = LZW(10, N, M, disabled)
    assert lzw.encode(ids) == codes and lzw.decode(codes) == ids
    assert read(lzw, codes)[:2] == (ids, rows)
    assert counts is None or read(lzw, codes)[2] == counts


def test_hand_computed_codes_of_longer_rows():
    lzw = LZW(27, 100, 5)
    assert lzw.encode([1, 2, 3, 4, 5] * 3) == [1, 2, 3, 4, 5, 27, 29, 31, 28, 30]
    assert lzw.encode([1] * 12) == [1, 27, 28, 29, 27]


def test_a_stream_that_spells_out_what_lzw_would_merge_makes_the_encoders_rows():
    lzw = LZW(10, 100, 3, [0])
    ids, rows, _ = read(lzw, [1, 2, 10, 2, 12])
    assert ids == [1, 2, 1, 2, 2, 1, 2, 2] == lzw.decode([1, 2, 10, 2, 12])
    assert rows == [(1, 2), (2, 1), (1, 2, 2), (2, 1, 2), (2, 2)]


def test_against_brute_force():
    for lzw, x, _ in cases(3000):
        codes = lzw.encode(x)
        expected, rows = naive(x, lzw.vocab_size, lzw.max_codes, lzw.max_len, lzw.disabled)
        assert codes == expected and len(codes) <= len(x)
        assert read(lzw, codes)[:2] == (x, rows)
        assert all(2 <= len(row) <= lzw.max_len for row in rows)
        assert all(len(row) == 2 or row[:-1] in rows for row in rows)


def test_round_trips_and_rows_of_a_beginning():
    for lzw, x, rng in cases(2000, seed=1):
        codes = lzw.encode(x)
        assert lzw.decode(codes) == x and lzw.decode_canonical(codes) == x  # the fast path takes it
        start = x[: rng.randint(0, len(x))]
        rows = read(lzw, lzw.encode(start))[1]
        assert rows == read(lzw, codes)[1][: len(rows)]


def test_any_stream_of_known_codes_decodes_as_it_was_meant():
    other = 0
    for lzw, _, rng in cases(1500, seed=2):
        decoder, codes, ids = Decoder(lzw), [], []
        for _ in range(12):
            codes.append(rng.randrange(lzw.vocab_size + len(decoder.rows)))
            ids += decoder.push(codes[-1])[0]
        assert lzw.decode(codes) == ids
        spelled = read(lzw, ids)[1]  # the rows of an encoder that has read these ids
        assert decoder.rows == spelled
        other += lzw.encode(ids) != codes
    assert other > 100


def test_codes_for_a_model_are_known_before_they_come():
    early = 0
    for lzw, x, _ in cases(1500, seed=3):
        codes = lzw.encode_known(x, decoder := Decoder(lzw))
        ids, rows, counts = read(lzw, codes)
        assert ids == x == lzw.decode(codes) and rows == decoder.rows
        known = [0, *counts]
        assert all(code - lzw.vocab_size < n for code, n in zip(codes, known))
        usual = lzw.encode(x)
        early += any(c - lzw.vocab_size >= n for c, n in zip(usual, [0, *read(lzw, usual)[2]]))
    assert early > 0  # what `encode` gives does need rows too early
    assert LZW(10).encode_known([1] * 7, Decoder(LZW(10))) == [1, 1, 10, 11]


def test_codes_behind_a_prompt_use_its_rows():
    rng = np.random.default_rng(2)
    for n in range(300):
        lzw = LZW(4, int(rng.choice([0, 2, 50])), 1 + n % 4, [0])
        prompt, rest = (rng.integers(0, 4, 20).tolist() for _ in range(2))
        decoder = Decoder(lzw)
        codes = lzw.encode_known(prompt, decoder) + lzw.encode_known(rest, decoder)
        assert lzw.decode(codes) == prompt + rest
    lzw = LZW(9, 9)
    lzw.encode_known([1, 2, 3, 4], decoder := Decoder(lzw))  # rows 12, 23, 34
    assert lzw.encode_known([1, 2, 3, 4], decoder) == [9, 11]


def test_containers():
    lzw, x = LZW(10, 100, 3), [1, 2, 1, 2, 1]
    for same in x, np.array(x), torch.tensor(x), tuple(x), np.array(x, np.uint8):
        codes = lzw.encode(same)
        assert codes == [1, 2, 10, 1] and lzw.decode(codes) == x
        assert all(type(code) is int for code in codes)
    assert lzw.encode(range(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: LZW(10).encode([1, 10]), "id 1 is 10, allowed: 0 to 9"),
        (lambda: LZW(10).encode([-1]), "id 0 is -1"),
        (lambda: LZW(10).encode([2**40]), "id 0 is 1099511627776"),
        (lambda: LZW(10).decode([1, 12]), "code 12 is not defined, the next code is 10"),
        (lambda: LZW(10).decode([10]), "not defined"),
        (lambda: LZW(10).decode([1, 1111111]), "code 1 is 1111111, allowed: 0 to 1033"),
        (lambda: LZW(0), "vocab_size is 0"),
        (lambda: LZW(10, -1), "max_codes is -1"),
        (lambda: LZW(10, 5, 0), "max_len is 0"),
        (lambda: LZW(10, True), "max_codes is True"),
        (lambda: LZW(10, disabled=[10]), "disabled id 0 is 10, allowed: 0 to 9"),
        (lambda: Decoder(LZW(10)).push(-1), "code -1 is not defined"),
    ],
)
def test_errors_name_what_is_wrong(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---------------------------------------------------------------------------------- any bytes

TEXT = "def f(x):\r\n\treturn x + 2026  # sehr schön, <|endoftext|>\n" * 20
FILES = {
    "empty": b"",
    "one byte": b"\n",
    "a byte that is no UTF-8": b"\xff",
    "CRLF and a control token": TEXT.encode(),
    "BOM": b"\xef\xbb\xbf" + TEXT.encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "bad bytes in a text": b"good line\nbad \xc3\x28 line\r\nna\xc3\xafve \xf0\x9f\x99\x82\xed\xa0\x80",
    "old Mac lines, NUL": b"a\rb\rc\0\0\n\n\n",
    "noise": random.Random(0).randbytes(3000),
    "a letter that NFC changes": "e\u0301 \u2126 \u1e9b\u0323\nplain\n".encode(),
}


def tokenizers(folder):
    """A tokenizer of every kind: exact ones, and one that puts a blank first and changes letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|endoftext|>", *letters])}, []))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    level.decoder = decoders.ByteLevel()
    piece = Tokenizer(
        models.BPE({"<unk>": 0, "\u2581": 1, "a": 2, "b": 3, "\n": 4}, [], unk_token="<unk>")
    )
    piece.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    piece.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["byte", "bpe:280"]
    for name, tok in ("level", level), ("piece", piece):
        tok.add_special_tokens(["<|endoftext|>"])
        tok.save(str(folder / f"{name}.json"))
        names.append(str(folder / f"{name}.json"))
    return {name: data.get_tokenizer(name, TEXT) for name in names}


def test_any_bytes_come_back_from_any_tokenizer(tmp_path):
    for name, tok in tokenizers(tmp_path).items():
        for what, raw in FILES.items():
            lzw = LZW(tok.n_vocab + 256, 50, 4, [tok.eos])
            ids = to_ids(tok, raw)
            back = to_bytes(tok, lzw.decode(lzw.encode(ids)))
            assert back == raw, (name, what)
    plain = data.get_tokenizer("byte")
    assert to_ids(plain, b"ab\n") == [97, 98, 10]
    assert to_ids(plain, b"a\xff\n") == [257 + 97, 257 + 255, 257 + 10]


def test_a_megabyte_comes_back(tmp_path):
    raw = ("".join(data.load_text())[:999_990] + "\r\n").encode() + b"\xfe\xff"
    (tmp_path / "a").write_bytes(raw)
    lzw_tokenizer.main([str(tmp_path / "a"), "--encode", str(tmp_path / "z")])
    lzw_tokenizer.main([str(tmp_path / "z"), "--decode", str(tmp_path / "b")])
    assert (tmp_path / "b").read_bytes() == raw


# ------------------------------------------------------------------------------------ program


@pytest.mark.parametrize("flags", ["", "--max-len 5", "--max-codes 7"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:270", "level", "piece"])
def test_settings_travel_with_the_codes(tokenizer, flags, tmp_path):
    tokenizers(tmp_path)
    name = str(tmp_path / f"{tokenizer}.json") if tokenizer in ("level", "piece") else tokenizer
    for raw in FILES["BOM"], FILES["bad bytes in a text"] * 9:
        (tmp_path / "a").write_bytes(raw)
        lzw_tokenizer.main(
            [
                str(tmp_path / "a"),
                "--tokenizer",
                name,
                *flags.split(),
                "--encode",
                str(tmp_path / "z"),
            ]
        )
        lzw_tokenizer.main([str(tmp_path / "z"), "--decode", str(tmp_path / "b")])
        assert (tmp_path / "b").read_bytes() == raw


def test_the_table_and_its_control(tmp_path, capsys):
    (tmp_path / "poem.txt").write_text("to be or not to be, to be or not to be: 2026, 2026\n" * 9)
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(2000))
    (tmp_path / "empty").write_bytes(b"")
    files = [str(tmp_path / name) for name in ("poem.txt", "noise", "empty")]
    found = lzw_tokenizer.main([*files, "--tokenizer", "byte", "bpe:262"])
    out = capsys.readouterr().out
    assert (
        len(found) == 6
        and found[files[0], "byte"]["saved"] > 0.5 > found[files[0], "byte"]["shuffled"]
    )
    assert abs(found[files[1], "byte"]["saved"]) < 0.1 and found[files[2], "byte"]["saved"] == 0
    held = sum(row["saved"] >= 0.15 for row in found.values())
    assert f"{held} of 6" in out and "poem.txt" in out


def test_a_text_in_colour(tmp_path, capsys):
    (tmp_path / "a").write_text("abab\x1b[2J")
    lzw_tokenizer.main([str(tmp_path / "a"), "--show"])
    out = capsys.readouterr().out
    assert out.startswith("ab\x1b[30;43mab\x1b[0m") and "\x1b[2J" not in out


def test_characters_are_whole_in_colour(tmp_path, capsys):
    (tmp_path / "a").write_text("üb€r 🌍🌍 ü", "utf-8")
    for flags in [], ["--tokenizer", "bpe:258"], ["--max-len", "5"]:
        lzw_tokenizer.main([str(tmp_path / "a"), "--show", *flags])
        out = capsys.readouterr().out
        assert re.sub("\x1b.*?m", "", out) == "üb€r 🌍🌍 ü\n"
    (tmp_path / "a").write_bytes(b"\xff\xfe\x80" * 5 + b"\xc3")  # no text
    lzw_tokenizer.main([str(tmp_path / "a"), "--show"])
    assert re.sub("\x1b.*?m", "", capsys.readouterr().out) == "\ufffd" * 16 + "\n"
    (tmp_path / "a").write_bytes(b"")
    lzw_tokenizer.main([str(tmp_path / "a"), "--show"])
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    "flags, match",
    [
        ("/no/such/file", "/no/such/file"),
        ("TEXT --decode OUT", "is not what --encode writes"),
        ("DAMAGED --decode OUT", "damaged"),
        ("OTHER --decode OUT", "not what --encode writes"),
        ("DEEP --decode OUT", "is not what --encode writes"),
        ("LIST --decode OUT", "is not what --encode writes"),
        ("TEXT --encode OUT --show", "not allowed with"),
        ("TEXT CODES --show", "one file"),
        ("TEXT --tokenizer byte bpe:300 --show", "one tokenizer"),
        ("TEXT --max-len no", "--max-len"),
        ("TEXT --max-len 0", "max_len is 0"),
        ("TEXT --max-codes -2", "max_codes is -2"),
        ("TEXT --tokenizer word", "unknown tokenizer 'word'"),
        ("EMPTY --tokenizer bpe:300", "give more text"),
        ("TEXT --encode /no/such/folder/codes", "/no/such/folder"),
        ("", "files"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "TEXT").write_text("abc abc\n")
    (tmp_path / "DEEP").write_text("[" * 100_000 + "\n1\n")
    (tmp_path / "LIST").write_text("[1]\n1 2\n")
    lzw_tokenizer.main([str(tmp_path / "TEXT"), "--encode", str(tmp_path / "CODES")])
    head, codes = (tmp_path / "CODES").read_text().split("\n", 1)
    (tmp_path / "DAMAGED").write_text(head + "\n98 " + codes)
    (tmp_path / "OTHER").write_text(
        json.dumps(json.loads(head) | {"vocab_size": 999}) + "\n" + codes
    )
    capsys.readouterr()
    words = [str(tmp_path / word) if word.isupper() else word for word in flags.split()]
    with pytest.raises(SystemExit) as stop:
        lzw_tokenizer.main(words)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert error[0].startswith("error: ") and match in error[0]


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    import subprocess

    (tmp_path / "a").write_text("a line of text\n" * 20000)
    command = f"{sys.executable} lzw_tokenizer.py {tmp_path}/a --show | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert done.stderr == b"" and b"a line of text" in done.stdout
