"""lzw_tokenizer.py: hand-computed codes, brute force, properties of random inputs, errors, the program."""

import random

import numpy as np
import pytest
import torch

import data
import lzw_tokenizer
from lzw_tokenizer import LZW, Codebook, Decoder, Encoder, ZipTokenizer


def naive(x, V, N, M, disabled, avoid):
    """The encoder as the paper tells it, with tuples: (codes, rows in order)."""
    rows, out, match, fresh = {}, [], [], None
    code = lambda ids: ids[0] if len(ids) == 1 else rows[tuple(ids)]
    for a in x:
        if a in disabled:
            out += [code(match), a] if match else [a]
            match, fresh = [], None
            continue
        match.append(a)
        word = tuple(match)
        if len(word) > 1 and (word not in rows or rows[word] == fresh):
            made = word not in rows and len(rows) < N
            if made:
                rows[word] = V + len(rows)
            fresh = rows[word] if made and avoid else None
            out.append(code(match[:-1]))
            match = [a]
        if len(match) == M:
            out.append(code(match))
            match, fresh = [], None
    return out + ([code(match)] if match else []), list(rows)


def cases(n, seed=0):
    """Random (LZW, input) of small sizes."""
    rng = random.Random(seed)
    for _ in range(n):
        V = rng.randint(1, 5)
        disabled = rng.sample(range(V), rng.choice([0, 0, 1]))
        lzw = LZW(V, rng.choice([0, 1, 2, 5, 100]), rng.randint(1, 5), disabled, rng.choice(["classic", "avoid"]))
        yield lzw, [rng.randrange(V) for _ in range(rng.randint(0, 40))], rng


@pytest.mark.parametrize(
    "ids, M, N, disabled, kwkwk, codes, rows, counts",
    [
        ([1, 2, 1, 2, 1, 2, 1], 3, 100, [0], "classic", [1, 2, 10, 12], [(1, 2), (2, 1), (1, 2, 1)], [0, 1, 2, 3]),
        ([1, 2, 1, 2, 1, 2, 1], 3, 100, [0], "avoid", [1, 2, 10, 10, 1], None, None),
        ([1] * 7, 3, 100, [0], "classic", [1, 10, 11, 1], [(1, 1), (1, 1, 1)], [0, 1, 2, 2]),
        ([1] * 7, 2, 100, [0], "classic", [1, 10, 10, 10], [(1, 1)], [0, 1, 1, 1]),
        ([1] * 7, 1, 100, [0], "classic", [1] * 7, [], [0] * 7),
        ([1] * 7, 3, 100, [0], "avoid", [1, 1, 10, 10, 1], None, None),
        ([1, 2, 3] * 3, 3, 100, [0], "classic", [1, 2, 3, 10, 12, 11],
         [(1, 2), (2, 3), (3, 1), (1, 2, 3), (3, 1, 2)], None),
        ([1, 2, 9, 1, 2, 9, 1, 2], 3, 100, [0, 9], "classic", [1, 2, 9, 10, 9, 10], [(1, 2)], [0, 1, 1, 1, 1, 1]),
        ([1, 2, 1, 2, 3, 1, 2, 3], 3, 2, [0], "classic", [1, 2, 10, 3, 10, 3], [(1, 2), (2, 1)], None),
        ([1, 2, 1, 2, 3], 3, 0, [0], "classic", [1, 2, 1, 2, 3], [], None),
        ([1, 2, 1, 2, 2, 1, 2, 2], 3, 100, [0], "classic", [1, 2, 10, 11, 2, 2],
         [(1, 2), (2, 1), (1, 2, 2), (2, 1, 2), (2, 2)], None),
        ([], 3, 100, [], "classic", [], [], []),
    ],
)  # fmt: skip
def test_hand_computed_codes(ids, M, N, disabled, kwkwk, codes, rows, counts):
    lzw = LZW(10, N, M, disabled, kwkwk)
    got, book = lzw.encode(ids, book=True)
    assert got == codes and lzw.decode(codes) == ids
    assert rows is None or list(book.to_dict().values()) == rows
    assert counts is None or lzw.counts(codes, book).tolist() == counts


def test_hand_computed_codes_of_longer_rows():
    lzw = LZW(27, 100, 5)
    assert lzw.encode([1, 2, 3, 4, 5] * 3) == [1, 2, 3, 4, 5, 27, 29, 31, 28, 30]
    assert lzw.encode([1] * 12) == [1, 27, 28, 29, 27]


def test_a_stream_that_spells_out_what_lzw_would_merge_makes_the_encoders_rows():
    lzw = LZW(10, 100, 3, [0])
    decoder = Decoder(lzw)
    text = sum((decoder.push(c)[0] for c in [1, 2, 10, 2, 12]), [])
    assert text == [1, 2, 1, 2, 2, 1, 2, 2] == lzw.decode([1, 2, 10, 2, 12])
    assert list(decoder.book.to_dict().values()) == [(1, 2), (2, 1), (1, 2, 2), (2, 1, 2), (2, 2)]


def test_against_brute_force():
    for lzw, x, _ in cases(3000):
        codes, book = lzw.encode(x, book=True)
        expected, rows = naive(x, lzw.vocab_size, lzw.max_codes, lzw.max_len, lzw.disabled, lzw.kwkwk == "avoid")
        assert codes == expected and len(codes) <= len(x)
        array = book.array(-1)
        assert [tuple(a for a in row if a >= 0) for row in array.tolist()] == rows == list(book.to_dict().values())
        assert book.lengths.tolist() == [len(row) for row in rows]
        assert all(2 <= len(row) <= lzw.max_len and (len(row) == 2 or row[:-1] in rows) for row in rows)


def test_round_trips_streams_and_counts():
    for lzw, x, rng in cases(2000, seed=1):
        codes, book = lzw.encode(x, book=True)
        assert lzw.decode(codes) == x and lzw._decode(codes) == x  # the fast path takes its own codes
        encoder, decoder, counts, text = Encoder(lzw), Decoder(lzw), [], []
        assert [c for a in x for c in encoder.push(a)] + encoder.flush() == codes
        for code in codes:
            base, new = decoder.push(code)
            text += base
            counts.append(len(decoder.book))
        assert text == x and counts == lzw.counts(codes, book).tolist() and list(decoder.book.table) == list(book.table)
        n = rng.randint(0, len(x))
        assert list(lzw.encode(x[:n], book=True)[1].table) == list(book.table)[: len(lzw.encode(x[:n], book=True)[1])]
        windows = lzw.split(x, size := rng.randint(1, 6))
        assert sum(map(lzw.decode, windows), []) == x and all(len(w) <= size for w in windows)
        assert all(len(w) == size for w in windows[:-1]) and [lzw.encode(lzw.decode(w)) for w in windows] == windows


def test_any_stream_of_known_codes_decodes_as_it_was_meant():
    for lzw, _, rng in cases(1500, seed=2):
        decoder, codes, text = Decoder(lzw), [], []
        for _ in range(12):
            codes.append(rng.randrange(lzw.vocab_size + len(decoder.book)))
            text += decoder.push(codes[-1])[0]
        encoder = Encoder(lzw)
        for a in text:
            encoder.push(a)
        assert lzw.decode(codes) == text and list(encoder.book.table) == list(decoder.book.table)


def test_avoid_never_needs_a_row_before_it_is_known():
    classic = 0
    for lzw, x, _ in cases(1500, seed=3):
        codes, book = lzw.encode(x, book=True)
        late = (np.array(codes[1:]) - lzw.vocab_size >= lzw.counts(codes, book)[:-1]).sum()
        assert lzw.kwkwk == "classic" or late == 0
        classic += late
    assert classic > 0


def test_a_copy_goes_its_own_way():
    a = Decoder(LZW(10))
    a.push(1)
    b = a.copy()
    a.push(2)
    assert len(a.book) == 1 and len(b.book) == 0 and b.push(3)[1] == [(1, 3)]


def test_batches_and_containers():
    lzw = LZW(10, 100, 3)
    sequences = [[1, 2, 1, 2, 1], [3], [4, 4, 4, 4]]
    for workers in 1, 2:
        codes, mask, rows, n = lzw.encode_batch(sequences, pad=9, workers=workers)
        assert [row[m].tolist() for row, m in zip(codes, mask)] == [lzw.encode(s) for s in sequences]
        assert codes[1].tolist() == [9, 9, 9, 3] and n.tolist() == [3, 0, 2] and rows.shape == (3, 3, 3)
        assert rows[0].tolist() == [[1, 2, 9], [2, 1, 9], [1, 2, 1]]
    assert lzw.encode_batch(sequences, side="right")[1][1].tolist() == [True, False, False, False]
    array, tensor = np.array(sequences[0]), torch.tensor(sequences[0])
    assert isinstance(lzw.encode(array), np.ndarray) and torch.is_tensor(lzw.encode(tensor))
    assert lzw.decode(lzw.encode(tensor)).tolist() == lzw.decode(lzw.encode(array)).tolist() == sequences[0]
    assert lzw.encode(range(3)) == [0, 1, 2] and Codebook(10, 3).array().shape == (0, 3)


def test_codes_behind_a_prompt_go_on_with_its_rows():
    rng = np.random.default_rng(2)
    for n in range(300):
        lzw = LZW(4, int(rng.choice([0, 2, 50])), 1 + n % 4, [0], ("classic", "avoid")[n % 2])
        prompt, rest = (rng.integers(0, 4, 20).tolist() for _ in range(2))
        assert lzw.decode(lzw.encode(prompt) + lzw.encode_behind(prompt, rest)) == prompt + rest
    assert LZW(9, 9).encode_behind([1, 2, 3, 4], [1, 2, 3, 4]) == [9, 11]  # rows 12, 23, 34 of the prompt


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: LZW(10).encode([1, 10]), "id 1 is 10, allowed: 0 to 9"),
        (lambda: LZW(10).encode([-1]), "id 0 is -1"),
        (lambda: LZW(10).encode([1, True]), "id 1 is True, a bool"),
        (lambda: LZW(10).encode([1, 2.0]), "id 1 is 2.0, a float"),
        (lambda: LZW(10).encode(np.array([1.0])), "float64"),
        (lambda: LZW(10).decode([1, 12]), "code 1: code 12 is not defined, the next code is 10"),
        (lambda: LZW(10).decode([10]), "not defined"),
        (lambda: LZW(10).decode([1, 1111111]), "allowed: 0 to 1033"),
        (lambda: LZW(10, kwkwk="avoid").decode([1, 10]), "not defined"),
        (lambda: LZW(0), "vocab_size is 0"),
        (lambda: LZW(10, -1), "max_codes is -1"),
        (lambda: LZW(10, 5, 0), "max_len is 0"),
        (lambda: LZW(10, disabled=[10]), "disabled id 10, allowed: 0 to 9"),
        (lambda: LZW(10, kwkwk="never"), "classic, avoid"),
        (lambda: LZW(2**31 - 5).encode(np.array([1], np.int32)), "do not fit int32"),
        (lambda: LZW(10).split([1], 0), "1 and up"),
        (lambda: LZW(10).encode_batch([[1]], side="top"), "left, right"),
        (lambda: Codebook(10, 3).expand(10), "next code is 10"),
    ],
)
def test_errors_name_what_is_wrong(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_program(tmp_path, capsys, monkeypatch):
    text = "to be or not to be, to be or not to be: 2026, 2026\n"
    (tmp_path / "a.txt").write_text(text)
    lzw_tokenizer.main([str(tmp_path / "a.txt"), "--do", "encode"])
    codes = capsys.readouterr().out
    (tmp_path / "codes.txt").write_text(codes)
    assert len(codes.split()) < len(text)
    lzw_tokenizer.main([str(tmp_path / "codes.txt"), "--do", "decode"])
    assert capsys.readouterr().out == text
    found = lzw_tokenizer.main([str(tmp_path / "a.txt"), "--disable-digits"])
    out = capsys.readouterr().out
    assert "\x1b[" in out and "M=3" in out and found[1]["ratio"] == 1 and found[3]["ratio"] < 0.8
    tok = ZipTokenizer(data.get_tokenizer("byte"), disabled=[256])
    assert tok.decode(tok.encode(text)) == text
    (tmp_path / "codes.txt").write_text("1 two")
    for flags in ["/no/such/file"], [str(tmp_path / "codes.txt"), "--do", "decode"], ["x", "--max-len", "no"]:
        with pytest.raises(SystemExit) as stop:
            lzw_tokenizer.main(flags)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
