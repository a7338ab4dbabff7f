"""A real checkpoint in the real format, for tests: a tiny Llama of random weights with a byte-level BPE of its own."""

import json
from pathlib import Path

import torch

import pretrained
from model import GPT, GPTConfig


def tiny_llama(folder, lines, vocab_size, seed=0, **shape):
    """Writes it to `folder`, its tokenizer trained on `lines`, and returns the folder; `shape` is of the GPTConfig."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    torch.manual_seed(seed)
    plain = dict(
        norm="rms", act="silu", gated=True, qkv_bias=False, attn_bias=False, mlp_bias=False
    )
    model = GPT(GPTConfig(tok.get_vocab_size(), **plain, **shape))
    c, tensors = model.config, {}
    for name, p in model.named_parameters():
        names = pretrained.names_of(pretrained.NAMES["llama"], name)
        parts = p.detach().split(pretrained.rows_of(c, p, len(names)))
        for one, part in zip(names, parts):
            tensors[one] = part.contiguous()
    hf = {theirs: getattr(c, ours) for ours, theirs in pretrained.SIZES["llama"].items()}
    hf |= {"model_type": "llama", "hidden_act": c.act, "tie_word_embeddings": c.tie}
    hf |= {"rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base, "eos_token_id": [0]}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer.json").write_text(tok.to_str())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder
