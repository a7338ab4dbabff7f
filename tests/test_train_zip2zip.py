"""train_zip2zip.py: the model's invariants, the transported model against its definition, the script end to end."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import legacy as common
import train_zip2zip as z2z
from lzw_tokenizer import LZW
from model import GPT, GPTConfig

torch.set_num_threads(1)
WORDS = [[1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 1, 2, 3, 4], [7, 7, 7, 7, 7, 2, 3, 7, 7, 1, 2, 8, 1, 2, 8]]


def tiny(arm="zip", M=3, trained=True, **flags):
    """A small Zip over 10 ids, its encoder and LoRA moved away from zero."""
    args = z2z.Args(enc_dim=8, lora_r=2, **flags)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(10, 64, 2, 2, 16, norm="rms", tie=True))
    model = z2z.Zip(z2z.add_lora(gpt, 2, 4), LZW(10, 100, M, [0], "avoid"), args, arm)
    for p in model.parameters() if trained else ():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def scores(model, windows, b=0):
    batch = z2z.pack(model.lzw, windows)
    vin, vout = model.encode_all(batch["rows"])
    return model.logits(model.hidden(batch["idx"], vin)[b], vout[b], batch["count"][b]), batch


def test_without_rows_it_is_the_base_model_bit_for_bit():
    model, idx = tiny(M=1, trained=False), torch.tensor(WORDS)
    torch.manual_seed(0)
    plain = GPT(model.config)
    batch = z2z.pack(model.lzw, WORDS)
    assert batch["idx"].tolist() == [w[:-1] for w in WORDS] and batch["rows"].shape[1] == 0
    assert torch.equal(model.hidden(batch["idx"], torch.zeros(2, 0, 16)), plain.hidden(idx[:, :-1]))
    loss = plain.loss(idx[:, :-1], idx[:, 1:])
    assert torch.allclose(model(**batch), loss, atol=1e-6)


def test_a_fresh_row_is_the_last_embedding_in_and_the_first_out():
    model = tiny(trained=False)
    vin, vout = model.encode(torch.tensor([[1, 2, -1], [3, 4, 5]]))
    E = model.gpt.wte.weight
    assert torch.equal(vin, E[[2, 5]]) and torch.equal(vout, E[[1, 3]])


def test_a_row_does_not_depend_on_the_others_or_on_padding():
    for flags in {}, {"encoder": "attn"}, {"encoder": "avg"}, {"untie": True}, {"residual": "none"}:
        model = tiny(**flags)
        one, many = model.encode(torch.tensor([[1, 2, -1]])), model.encode(torch.tensor([[3, 4, 5], [1, 2, -1]]))
        assert all(torch.allclose(a[0], b[1], atol=1e-6) for a, b in zip(one, many))


def test_rows_that_do_not_exist_yet_have_no_probability_and_every_target_has_some():
    model = tiny()
    for b in 0, 1:
        logits, batch = scores(model, WORDS, b)
        p = logits.softmax(-1)[:, 10:]
        hidden = torch.arange(p.shape[1]) >= batch["count"][b][:, None]
        assert (p[hidden] == 0).all() and (p[~hidden] > 0).all()
        real = batch["targets"][b] >= 0
        assert logits[real].gather(1, batch["targets"][b][real][:, None]).isfinite().all()


def test_renaming_rows_leaves_the_loss_unchanged():
    model = tiny(row_mask="window")
    batch = z2z.pack(model.lzw, WORDS[:1])
    K = batch["rows"].shape[1]
    order = torch.randperm(K)
    name = torch.cat((torch.arange(10), 10 + order.argsort()))
    twin = batch | {"rows": batch["rows"][:, order], "idx": name[batch["idx"]], "targets": name[batch["targets"]]}
    assert torch.allclose(model(**batch), model(**twin), atol=1e-5)


def test_only_lora_and_encoder_learn():
    model = tiny()
    model(**z2z.pack(model.lzw, WORDS)).backward()
    learns = {
        name.split(".")[0] if "encoder" in name else name.split(".")[-1]
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert learns == {"encoder", "A", "B"}


def test_cached_generation_is_the_full_forward_pass_and_batches_change_nothing():
    model = tiny()
    prompts = [WORDS[0], WORDS[1][:9], [4]]
    together = z2z.generate(model, prompts, 12)
    assert together == [z2z.generate(model, [p], 12)[0] for p in prompts]
    for prompt, (codes, base) in zip(prompts, together):
        decoder = z2z.Decoder(model.lzw)
        start = model.lzw.encode(prompt)
        assert [a for c in start + codes for a in decoder.push(c)[0]] == prompt + base
        for t in range(len(codes)):  # greedy, each step from scratch, with the codebook of that moment
            decoder, stream = z2z.Decoder(model.lzw), start + codes[:t]
            for c in stream:
                decoder.push(c)
            rows = torch.from_numpy(decoder.book.array(-1))[None]
            vin, vout = model.encode_all(rows)
            h = model.hidden(torch.tensor([stream]), vin)[0, -1:]
            assert model.logits(h, vout[0], torch.tensor([rows.shape[1]])).argmax().item() == codes[t]


def test_a_replayed_text_comes_out_and_the_row_cache_fills():
    model, store = tiny(), {}
    prompt, rest = WORDS[0], WORDS[0][3:] + WORDS[1]
    codes = model.lzw.encode_behind(prompt, rest)
    assert z2z.generate(model, [prompt], 99, replay=[codes], store=store) == [(codes, rest)]
    assert codes[0] >= 10 and len(codes) < len(model.lzw.encode(rest))  # the prompt's rows serve
    assert store and all(
        torch.allclose(v, torch.stack(model.encode(torch.tensor([k + (-1,) * (3 - len(k))])))[:, 0], atol=1e-6)
        for k, v in store.items()
    )


@pytest.mark.parametrize("kwkwk", ["classic", "avoid"])
def test_the_transported_model_keeps_the_likelihood_and_its_probabilities_add_up_to_one(kwkwk):
    rng, apart = np.random.default_rng(0), 0
    for V, M, N in itertools.product((3, 4), (1, 2, 3, 4), (0, 2, 50)):
        lzw = LZW(V, N, M, [0], kwkwk)
        table = torch.tensor(rng.dirichlet(np.ones(V), size=V)).log()  # a bigram model; its end is the id 0
        ids = [0, *rng.integers(1, V, 25).tolist(), 0]
        logp = table[ids[:-1]]
        nll = -logp[torch.arange(len(ids) - 1), ids[1:]].sum()
        assert abs(z2z.transported(lzw, logp, ids).sum() - nll) < 1e-10
        for t in range(1, len(ids) - 1):
            mass, alone = z2z.transported_mass(lzw, table.__getitem__, ids[:t])
            assert abs(mass - 1) < 1e-12
            apart += abs(alone - 1) > 1e-3
    assert apart > 100  # the probabilities of the base ids alone do not add up to one


def test_the_loss_is_the_sum_of_its_parts_over_micro_batches_and_ranks(monkeypatch):
    model = tiny("ae", ae=0.5)
    whole = z2z.pack(model.lzw, [*WORDS, WORDS[0][:6]])
    denom = (whole["targets"] >= 0).sum()
    parts = [model(**z2z.pack(model.lzw, part), denom=denom) for part in (WORDS[:1], WORDS[1:], [WORDS[0][:6]])]
    assert torch.allclose(model(**whole), sum(parts), atol=1e-6)
    grads = []
    for size in z2z.SCORES, 1:  # 1: the scores of one window at a time, made again in the backward pass
        monkeypatch.setattr(z2z, "SCORES", size)
        grads.append(torch.autograd.grad(model(**whole), [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_extensions_hold_what_lzw_would_have_merged():
    lzw = LZW(10, 100, 3)
    codes, book = lzw.encode([1, 2, 1, 3, 1, 2, 4], book=True)  # 1 2 1 3 10 4: rows 12 21 13 31 124
    assert codes == [1, 2, 1, 3, 10, 4]
    assert lzw.extensions(codes, book) == [[], [], [2], [], [], []]
    banned = z2z.pack(lzw, [[1, 2, 1, 3, 1, 2, 4]], canonical=True)["banned"][0]
    assert banned[2].nonzero()[:, 0].tolist() == [2, 11]  # 2 and the row (2, 1) can't follow that 1
    assert not banned.gather(1, torch.tensor(codes[1:])[:, None]).any()


def test_prompt_lookup_counts_passes():
    assert z2z.prompt_lookup_steps([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 7) == 1
    assert z2z.prompt_lookup_steps([1, 2, 3, 4, 5, 6, 7, 8], 4) == 4


def test_a_checkpoint_of_other_codes_is_refused_and_the_same_gives_the_same(tmp_path):
    model, other = tiny(), tiny(trained=False)
    common.save_checkpoint(tmp_path / "a.pt", {"model": model.state_dict()})
    other.load_state_dict(common.load_checkpoint(tmp_path / "a.pt")["model"])
    assert torch.equal(scores(model, WORDS)[0], scores(other, WORDS)[0])
    for change in {"max_len": 2}, {"max_codes": 7}, {"vocab_size": 11}, {"disabled": [1]}, {"kwkwk": "classic"}:
        same = {"vocab_size": 10, "max_codes": 100, "max_len": 3, "disabled": [0], "kwkwk": "avoid"}
        other.lzw = LZW(**(same | change))
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .* there, .* here"):
            other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="another arm"):
        tiny("cont", M=1).load_state_dict(model.state_dict())
    assert not any("wte" in name for name in model.state_dict())  # the base model is not saved


def test_the_synthetic_language():
    world = z2z.Synth(z2z.Args(), 0)
    a, b = world.windows("train", 3, 2), world.windows("train", 3, 2)
    assert np.array_equal(a, b) and a.shape == (2, 257) and (a[:, 0] == 0).all() and a.max() < world.n_vocab
    text = "".join(world.text[i] for i in a[0][1:])
    assert world.n_bytes(a[0]) == len(text.encode()) and not set(world.names(a[0])) & set(world.names(a[1]))
    h, t, other = world.head[3], world.tail[5], world.verbs[0]
    assert world.names([h, t, other, h, t, t, other, t, h, t, h, t, t]) == [(h, t, t), (h, t)]


def test_smoke_ends_with_claims_and_resumes_to_the_same(tmp_path):
    first = z2z.main(["--preset", "smoke", "--arms", "cont", "zip", "ae", "canon", "--out", str(tmp_path)])
    assert {"C1", "C2", "C5", "C6"} <= {c["id"] for c in first["claims"]}
    base = first["metrics"]["base"][0]
    assert (
        abs(base["oracle"] - base["plain"]) < 1e-4 > base["mass"]
        and 0 <= first["metrics"]["ae"][0]["rows_recovered"] <= 1
    )
    assert (tmp_path / "zip2zip.png").exists() and json.loads((tmp_path / "result.json").read_text()) == first
    again = z2z.main(["--preset", "smoke", "--arms", "cont", "zip", "ae", "canon", "--out", str(tmp_path), "--resume"])
    assert all(
        math.isclose(again["metrics"][a][0]["bpb"], first["metrics"][a][0]["bpb"]) for a in ("cont", "zip", "ae")
    )


def test_a_real_checkpoint_and_its_budget(tmp_path, capsys):
    """A random Llama in the real files, text from a folder: the whole path of --model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import pretrained

    vocab = {"<|end|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tok.add_special_tokens(["<|end|>"])
    shape = dict(norm="rms", gated=True, act="silu", qkv_bias=False, attn_bias=False, mlp_bias=False)
    pretrained.save(
        GPT(GPTConfig(257, 128, 2, 2, 16, d_mlp=32, **shape)), pretrained.wrap("t", tok, None, [0], None), tmp_path
    )
    (tmp_path / "text.txt").write_text("A text of 123 and 123 again.\n" * 400)
    flags = f"--preset real --model {tmp_path} --dataset file:{tmp_path}/text.txt --out {tmp_path}/out --minutes 0.01"
    flags = [*flags.split(), *"--block-size 64 --samples 2 --enc-dim 8".split()]
    result = z2z.main(flags)
    assert [c["id"] for c in result["claims"]] == [
        "C1",
        "C2",
        "C5",
    ] and "steps an arm in 0.01 minutes" in capsys.readouterr().out
    args = common.parse(z2z.Args, flags)
    world = z2z.make_world(args, common.setup(args), 0)
    assert world.special == [0] and [tok.decode([i]) for i in world.digits] == list("0123456789")
    saved = common.load_checkpoint(tmp_path / "out" / "zip-s0.pt")["model"]
    assert saved["_extra_state"]["disabled"] == sorted([0, *world.digits])
    again = z2z.main([*flags, "--resume"])
    assert again["metrics"]["zip"][0]["bpb"] == result["metrics"]["zip"][0]["bpb"]


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--arms cont zap", "allowed: all"), ("--arms rand", "lacks cont or zip"), ("--max-len 0", "max_len is 0"),
        ("--max-codes -1", "max_codes is -1"), ("--enc-dim 7", "multiple"), ("--kwkwk never", "avoid"),
        ("--model no-such-model", "no-such-model"), ("--lora-r 0", "from 1"), ("--device toaster", "which has"),
        ("--samples 0", "1 and more"), ("--resume", "n_embd is 40 there"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    common.save_checkpoint(tmp_path / "base-s0.pt", {"config": asdict(GPTConfig(8, 8, 1, 1, 40))})
    with pytest.raises(SystemExit) as stop:
        z2z.main(["--preset", "smoke", "--out", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and match in error
    assert common.read_jsonl(tmp_path / "metrics.jsonl") == []
