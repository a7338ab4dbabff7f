"""A real checkpoint in the real format, for tests: a tiny Llama of random weights with a byte-level BPE of its own."""

import torch

import data
import pretrained
from model import GPT, GPTConfig


def tiny_llama(folder, lines, vocab_size, seed=0, **shape):
    """Writes it to `folder`, its tokenizer trained on `lines`, and returns the folder; `shape` is of the GPTConfig."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    torch.manual_seed(seed)
    plain = dict(
        norm="rms", act="silu", gated=True, qkv_bias=False, attn_bias=False, mlp_bias=False
    )
    model = GPT(GPTConfig(tok.get_vocab_size(), **plain, **shape))
    pretrained.save(model, data.from_backend("t", tok, None, [0], None), folder)
    return folder
