"""train_zip2zip.py: the model's invariants, the transported model by its definition, the script end to end."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch

import common
import train_zip2zip as z2z
from lzw_tokenizer import LZW, Decoder
from model import GPT, GPTConfig

torch.set_num_threads(1)
WORDS = [
    [1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 1, 2, 3, 4],
    [7, 7, 7, 7, 7, 2, 3, 7, 7, 1, 2, 8, 1, 2, 8],
]


def tiny(arm="zip", M=3, trained=True, **config):
    """A small Zip over 10 ids, its encoder and LoRA moved away from zero."""
    args = z2z.Args(enc_dim=8, lora_r=2)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(10, 64, 2, 2, 16, norm="rms", **({"tie": True} | config)))
    model = z2z.Zip(z2z.add_lora(gpt, 2), LZW(10, 100, M, [0]), args, arm)
    for p in model.parameters() if trained else ():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def scores(model, windows, shuffle=False):
    batch = z2z.pack(model.lzw, windows)
    vin, vout = model.encode_all(batch["rows"], shuffle)
    return model.logits(model.hidden(batch["idx"], vin), vout, batch["known"]), batch


# -------------------------------------------------------------------------------------- model


def test_a_batch_by_hand():
    batch = z2z.pack(LZW(10, 100, 3, [0]), [[0, 1, 2, 1, 2, 1, 2, 3], [0, 1, 1]])
    # rows 10 = (1, 2), 11 = (2, 1), 12 = (1, 2, 1); 13 comes with the last code, too late
    assert batch["idx"].tolist() == [[0, 1, 2, 10, 10], [0, 1, 0, 0, 0]]
    assert batch["targets"].tolist() == [[1, 2, 10, 10, 3], [1, 1, -100, -100, -100]]
    assert batch["known"].tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 0]]
    assert batch["rows"][0].tolist() == [[1, 2, -1], [2, 1, -1], [1, 2, 1], [1, 2, 3]]
    assert batch["rows"][1, 0].tolist() == [1, 1, -1] and (batch["rows"][1, 1:] == -1).all()


def test_without_rows_it_is_the_base_model_bit_for_bit():
    model, idx = tiny("cont", M=1, trained=False), torch.tensor(WORDS)
    torch.manual_seed(0)
    plain = GPT(model.config)
    batch = z2z.pack(model.lzw, WORDS)
    assert batch["idx"].tolist() == [w[:-1] for w in WORDS] and batch["rows"].shape[1] == 0
    assert torch.equal(model.hidden(batch["idx"], torch.zeros(2, 0, 16)), plain.hidden(idx[:, :-1]))
    mean = plain.loss(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(model(**batch, denom=batch["targets"].numel()), mean)


def test_a_fresh_row_is_the_last_embedding_in_and_the_first_out():
    for tie in True, False:
        model = tiny(trained=False, tie=tie)
        vin, vout = model.encode(torch.tensor([[1, 2, -1], [3, 4, 5]]))
        assert torch.equal(vin, model.gpt.wte.weight[[2, 5]])
        assert torch.equal(vout, model.gpt.head.weight[[1, 3]])


def test_rows_change_in_units_of_the_embeddings():
    """Twice the embeddings: twice the rows, so that one learning rate serves any model."""
    model = tiny()
    rows = torch.tensor([[1, 2, -1], [3, 4, 5]])
    before = torch.stack(model.encode(rows))
    with torch.no_grad():
        model.gpt.wte.weight *= 2
    model.size_in, model.size_out = 2 * model.size_in, 2 * model.size_out
    torch.testing.assert_close(torch.stack(model.encode(rows)), 2 * before)
    rms = model.gpt.wte.weight.square().mean().sqrt().item()
    assert model.size_in == pytest.approx(rms)


@pytest.mark.parametrize("arm", ["zip", "avg"])
def test_a_row_does_not_depend_on_the_others_or_on_padding(arm):
    model = tiny(arm)
    for gradient in True, False:
        with torch.set_grad_enabled(gradient):
            one = model.encode(torch.tensor([[1, 2, -1]]))
            many = model.encode(torch.tensor([[3, 4, 5], [1, 2, -1]]))
        for a, b in zip(one, many):
            torch.testing.assert_close(a[0], b[1])


def test_the_controls_have_other_rows():
    avg, E = tiny("avg"), tiny("avg").gpt.wte.weight
    torch.testing.assert_close(avg.encode(torch.tensor([[1, 2, -1]]))[0][0], (E[1] + E[2]) / 2)
    rand = tiny("rand")
    vin, _ = rand.encode_all(torch.zeros(2, 90, 3, dtype=torch.long))
    assert torch.equal(vin[0], vin[1])
    assert vin.square().mean().sqrt().item() == pytest.approx(rand.size_in, rel=0.1)
    model = tiny()
    rows = z2z.pack(model.lzw, WORDS)["rows"]
    own, other = model.encode_all(rows)[0], model.encode_all(rows, shuffle=True)[0]
    for b in 0, 1:
        k = (rows[b, :, 0] >= 0).sum()
        assert not torch.isclose(own[b, :k], other[b, :k]).all(1).any()
        everyone = {tuple(v) for v in own[b, :k].tolist()}
        assert {tuple(v) for v in other[b, :k].tolist()} == everyone


def test_rows_that_do_not_exist_yet_have_no_probability_and_every_target_has_some():
    logits, batch = scores(tiny(), WORDS)
    p = logits.softmax(-1)[..., 10:]
    hidden = torch.arange(p.shape[-1]) >= batch["known"][..., None]
    assert (p[hidden] == 0).all() and (p[~hidden] > 0).all()
    real = batch["targets"] >= 0
    assert logits[real].gather(1, batch["targets"][real][:, None]).isfinite().all()
    assert (batch["targets"] >= 10).any()


def test_renaming_rows_leaves_the_loss_unchanged():
    model = tiny()
    batch = z2z.pack(model.lzw, WORDS[:1])
    K = batch["rows"].shape[1]
    batch["known"] = torch.full_like(batch["known"], K)  # else the names say when a row exists
    order = torch.randperm(K)
    name = torch.cat((torch.arange(10), 10 + order.argsort()))
    twin = batch | {"rows": batch["rows"][:, order], "idx": name[batch["idx"]]}
    twin["targets"] = name[batch["targets"]]
    torch.testing.assert_close(model(**batch), model(**twin))


def test_only_lora_and_encoder_learn_and_only_they_are_saved():
    model = tiny()
    model(**z2z.pack(model.lzw, WORDS)).backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0 if "encoder" in name else -1] for name in learns} == {
        "encoder",
        "A",
        "B",
    }
    assert learns == set(model.state_dict())
    other = tiny(trained=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(scores(model, WORDS)[0], scores(other, WORDS)[0])
    with pytest.raises(RuntimeError, match="encoder"):
        tiny("cont", M=1).load_state_dict(model.state_dict())


def test_parts_of_a_batch_add_up():
    model = tiny()
    whole = z2z.pack(model.lzw, [*WORDS, WORDS[0][:6]])
    denom = (whole["targets"] >= 0).sum()
    parts = [WORDS[:1], WORDS[1:], [WORDS[0][:6]]]
    losses = [model(**z2z.pack(model.lzw, part), denom=denom) for part in parts]
    torch.testing.assert_close(model(**whole, denom=denom), sum(losses))


def test_soft_caps_and_scales_count_for_rows_too():
    model = tiny(logit_softcap=3.0, logit_scale=2.0, embed_scale=4.0)
    model.arm = "avg"  # the mean of embeddings: of a row of one id, its own vectors
    vin, vout = model.encode(torch.tensor([[5, -1, -1]]))
    torch.testing.assert_close(vin[0], 4 * model.gpt.wte.weight[5])
    h = torch.randn(1, 3, 16)
    logits = model.logits(h, vout[None], torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(logits[..., 10], logits[..., 5])


# --------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("arm", ["zip", "rand", "cont"])
def test_cached_generation_is_the_full_forward_pass_and_batches_change_nothing(arm):
    model = tiny(arm, M=1 if arm == "cont" else 3)
    prompts = [WORDS[0], WORDS[1][:9], [4]]
    together = z2z.generate(model, prompts, 12)
    assert together == [z2z.generate(model, [p], 12)[0] for p in prompts]
    for prompt, text in zip(prompts, together):
        stream = model.lzw.encode_known(prompt, Decoder(model.lzw))
        for word in text:  # greedy, each step from scratch, with the rows of that moment
            decoder = Decoder(model.lzw)
            for z in stream:
                decoder.push(z)
            code = word[0] if len(word) == 1 else 10 + decoder.rows.index(word)
            vin, vout = model.encode_all(z2z.as_tensor(decoder.rows, 3)[None])
            h = model.hidden(torch.tensor([stream]), vin)
            known = torch.full((1, len(stream)), len(decoder.rows))
            logits = model.logits(h, vout, known)[0, -1]
            assert logits[code] >= logits.max() - 1e-4
            stream.append(code)


def test_rows_are_written_and_sampling_has_a_seed():
    model = tiny()
    a, b, c = (z2z.generate(model, WORDS, 20, 1.0, seed=s) for s in (0, 0, 1))
    assert a == b != c and any(len(word) > 1 for text in a for word in text)
    assert all(len(text) == 20 for text in a)


# ------------------------------------------------------------------------------------- theory


def random_model(V, rng):
    """A model of the next id from the last two: predict(idx) -> log p (R, T, V)."""
    table = torch.from_numpy(rng.dirichlet(np.ones(V), (V + 1, V)))

    def predict(idx):
        before = torch.cat((torch.full_like(idx[:, :1], V), idx[:, :-1]), 1)
        return table[before, idx].log()

    return predict


def test_the_transported_model_loses_nothing():
    rng = np.random.default_rng(0)
    for _ in range(60):
        V = int(rng.integers(3, 6))
        lzw = LZW(V, int(rng.choice([0, 2, 5, 100])), int(rng.integers(1, 5)), [0])
        predict = random_model(V, rng)
        ids = [0, *rng.integers(1, V, 25).tolist(), 0]
        logp = predict(torch.tensor([ids]))[0]
        plain = -sum(logp[t, a].item() for t, a in enumerate(ids[1:]))
        both = z2z.transported(lzw, logp, ids)
        assert len(both) == len(lzw.encode(ids)) - 1
        assert both[:, 0].sum().item() == pytest.approx(plain, abs=1e-9)


def test_the_transported_model_is_a_distribution_and_without_factors_it_is_none():
    rng, off = np.random.default_rng(1), 0
    for _ in range(40):
        V = int(rng.integers(3, 6))
        lzw = LZW(V, int(rng.choice([2, 5, 100])), int(rng.integers(2, 5)), [0])
        predict = random_model(V, rng)
        ids = [0, *rng.integers(1, V, 20).tolist()]
        total, alone = z2z.total_probability(lzw, predict, ids).tolist()
        assert total == pytest.approx(1, abs=1e-9)
        off += abs(alone - 1) > 0.01
    assert off > 20


def test_the_transported_probability_is_that_of_all_texts_cut_so():
    """By brute force: P(code) is the mass of all texts whose canonical codes go on with it."""
    rng = np.random.default_rng(2)
    V, n = 3, 5
    lzw, predict = LZW(V, 100, 3, [0]), random_model(V, rng)
    ids = [0, 1, 2, 1, 2, 2, 1]
    codes, mass, begun = lzw.encode(ids), {}, 0.0
    for tail in itertools.product(range(V), repeat=n):
        text = [*ids, *tail]
        logp = predict(torch.tensor([text]))[0]
        p = math.exp(sum(logp[len(ids) - 1 + j, a].item() for j, a in enumerate(tail)))
        z = lzw.encode(text)
        if z[: len(codes)] == codes:  # else the last code of `ids` has grown
            mass[z[len(codes)]] = mass.get(z[len(codes)], 0) + p
            begun += p
    for code, p in mass.items():
        decoder = Decoder(lzw)
        for z in codes:
            decoder.push(z)
        word, _ = decoder.push(code)
        text = [*ids, *word]
        if lzw.encode(text) != [*codes, code]:
            continue
        nats = z2z.transported(lzw, predict(torch.tensor([text]))[0], text)[-1, 0].item()
        assert math.exp(-nats) == pytest.approx(p / begun, abs=1e-9)
    assert len(mass) > 3


# ------------------------------------------------------------------------------------- worlds


def test_the_synthetic_language():
    world = z2z.Synth(z2z.Args(), 0)
    a, b = world.windows("train", 3, 2), world.windows("train", 3, 2)
    assert np.array_equal(a, b) and a.shape == (2, 257) and (a[:, 0] == 0).all()
    assert len(world.text) == 188 and a.max() < 188
    assert world.decode(a[0]) == world.decode(a[0][1:])  # the id 0 is no text
    words = {text.strip() for text in world.decode(a.ravel()).split()}
    assert {"is", "again."} & words and world.decode([world.word["is"], world.word["."]]) == " is."
    assert world.decode([world.verbs[-1], world.nouns[0], world.nouns[-1]]) == " thanks house boat"
    assert world.decode([world.head[0], world.tail[-1], world.word["\n"]]) == " bazu\n"
    assert not set(world.names(a[0])) & set(world.names(a[1]))
    h, t, other = world.head[3], world.tail[5], world.verbs[0]
    ids = [h, t, other, h, t, t, other, t, h, t, h, t, t]
    assert world.names(ids) == [(h, t, t), (h, t)]
    assert re.match(r"( |[a-z])", world.decode(a[0])) and world.decode(world.digits) == "".join(
        f" {d}" for d in range(10)
    )


# ------------------------------------------------------------------------------------- script


def test_smoke_ends_with_claims_resumes_to_the_same_and_writes(tmp_path, capsys):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    first = z2z.main(flags)
    assert [c["id"] for c in first["claims"]] == ["C2", "C5", "C3", "C4", "C6", "C7"]
    assert first == json.loads((tmp_path / "result.json").read_text())
    base = first["metrics"]["base"][0]
    assert base["lost"] < 1e-6 and base["mass"] < 1e-6 < base["mass_alone"]
    arms = {arm: rows[0] for arm, rows in first["metrics"].items()}
    assert (
        arms["cont"]["ids_per_base"]
        == 1
        > arms["digits"]["ids_per_base"]
        >= arms["zip"]["ids_per_base"]
    )
    assert arms["cont"]["gen_row_share"] == 0 < arms["zip"]["gen_row_share"]
    assert arms["zip"]["mixed_ids_per_byte"] > arms["zip"]["ids_per_byte"]
    assert (tmp_path / "zip2zip.png").stat().st_size > 10000
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {f"{arm}-s3" for arm in arms}
    again = z2z.main([*flags, "--resume"])
    for arm in set(arms) - {"base"}:
        assert again["metrics"][arm][0]["bpb"] == pytest.approx(arms[arm]["bpb"], abs=1e-6)
    capsys.readouterr()
    assert z2z.main([*flags, "--prompt", "heldout"]) is None
    out = capsys.readouterr().out
    assert "--- zip2zip" in out and "--- the base model" in out
    assert "16 passes for 16 base ids, 1.00 each" in out
    with pytest.raises(SystemExit):
        z2z.main([*flags, "--prompt", "heldout", "--max-len", "2"])
    assert "--max-len is 3 there, 2 here" in capsys.readouterr().err


def test_a_real_model(tmp_path, capsys, monkeypatch):
    """A random Llama and text from a file: the whole path of --model but for reading its weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import data

    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tok.add_special_tokens(["<|end|>"])
    gpt = GPT(GPTConfig(257, 128, 2, 2, 16, d_mlp=32, norm="rms", gated=True, act="silu"))
    both = gpt, data.from_backend("t", tok, None, [0], None)
    monkeypatch.setattr(z2z.pretrained, "load", lambda name, device, dtype: both)
    (tmp_path / "text.txt").write_text("A text of 123 and 123 again.\n" * 400)
    flags = f"--preset real --model {tmp_path}/m --dataset file:{tmp_path}/text.txt --out {tmp_path}/out"
    flags = [*flags.split(), *"--steps 3 --block-size 64 --samples 2 --enc-dim 8".split()]
    result = z2z.main(flags)
    assert [c["id"] for c in result["claims"]] == ["C2", "C5"]
    assert (
        z2z.main([*flags, "--resume"])["metrics"]["zip"][0]["bpb"]
        == result["metrics"]["zip"][0]["bpb"]
    )
    env = common.Env(torch.device("cpu"), torch.float32)
    _, world = z2z.start(common.parse(z2z.Args, flags), env, 0)
    assert world.stops == [0] and [tok.decode([i]) for i in world.digits] == list("0123456789")
    with pytest.raises(SystemExit):
        z2z.main([*flags, "--block-size", "512"])
    assert "--block-size 512, allowed: 128" in capsys.readouterr().err
    z2z.main([*flags, "--prompt", "A text of\x1b[2J 12"])
    out = capsys.readouterr().out
    assert "A text of" in out and "\x1b[2J" not in out


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--max-len 0", "--max-len 0"),
        ("--max-codes 0", "--max-codes 0, allowed: 1 and more"),
        ("--enc-dim 7", "multiple"),
        ("--model no-such-model", "no-such-model"),
        ("--lora-r 0", "1 and more"),
        ("--device toaster", "which has"),
        ("--samples 0", "1 and more"),
        ("--enc-layers 0", "--enc-layers 0, allowed: 1"),
        ("--pretrain-steps 0", "--pretrain-steps 0, allowed: 1"),
        ("--model x --pretrain-steps 5", "--pretrain-steps: no effect with --model"),
        ("--prompt heldout --seeds 7", "zip-s7.pt is no checkpoint of this program"),
        ("--prompt heldout", "zip-s0.pt"),
        ("--prompt hello", "heldout"),
        ("--dataset file:README.md", "need --model"),
        ("--resume", "--lora-r is 40 there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    state = {"model": {}, "optimizer": {}, "step": 0, "flags": {"lora_r": 40}}
    torch.save(state, tmp_path / "base-s0.pt")
    torch.save([1, 2], tmp_path / "zip-s7.pt")
    with pytest.raises(SystemExit) as stop:
        z2z.main(["--preset", "smoke", "--out", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and match in error
    assert not (tmp_path / "metrics.jsonl").exists()


def test_shapes_of_the_presets():
    assert random.Random("0 train 3").random() == random.Random("0 train 3").random()
    for name, preset in z2z.Args.presets.items():
        args = z2z.Args(**preset)
        assert not any(wrong for wrong, _ in z2z.check(args, common.Env("cpu", torch.float32))), (
            name
        )
