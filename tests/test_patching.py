"""Concepts and languages patched apart: hand-computed values, the sweep against the plain loop, the script."""

import json
import re

import numpy as np
import pytest
import torch

import common
import patching
import pretrained
from model import GPT, GPTConfig

WORDS = "eau water chat cat maison house pain bread livre book".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real checkpoint in the real format: a tiny Llama of random weights, byte-level BPE of the built-in words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    table = patching.builtin_words()[0]
    tok.train_from_iterator((f'{w}": "{w}" - ' for rows in table.values() for row in rows for w in row), trainer)
    shape = dict(n_layer=3, n_head=2, n_embd=32, norm="rms", act="silu", gated=True)
    plain = dict(qkv_bias=False, attn_bias=False, mlp_bias=False, block_size=1024)
    config = GPTConfig(vocab_size=tok.get_vocab_size(), **shape, **plain)
    pretrained.save(GPT(config), pretrained.wrap("t", tok, None, [0], None), path)
    return path


def test_real_path(folder, tmp_path):
    flags = ["--pairs", "6", "--prompts", "4", "--k", "2", "--shots", "2", "--quads", "fr-en:es-fr", "de-it:fr-es"]
    result = patching.main(["--model", str(folder), "--out", str(tmp_path), *flags])
    assert result == json.loads((tmp_path / "result.json").read_text())
