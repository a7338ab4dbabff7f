"""Tests of latent_clip.py: values by hand, brute force against the fast path, peers if installed."""

import json
import math
import re
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import common
import data
import latent_clip as lc


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- InfoNCE


def test_info_nce_by_hand():
    eye, ids = torch.eye(2), torch.arange(2)
    assert lc.info_nce(eye, eye, 1.0, ids).item() == pytest.approx(0.3132617, abs=1e-6)
    image = torch.tensor([[6.0, 2.0], [1.0, 8.0]])  # logits: rows .0095307, columns .0045955
    assert lc.info_nce(image, eye, 1.0, ids).item() == pytest.approx(0.0070631, abs=1e-6)


def test_info_nce_permutation_and_repeated_captions():
    image, text = (F.normalize(torch.randn(6, 5, generator=generator(s)), dim=1) for s in (0, 1))
    order, ids = torch.randperm(6, generator=generator(2)), torch.tensor([0, 1, 0, 2, 3, 4])
    loss = lc.info_nce(image, text, 7.0, ids)
    torch.testing.assert_close(lc.info_nce(image[order], text[order], 7.0, ids[order]), loss)
    expected = 0.0
    for logits in 7 * image @ text.T, 7 * text @ image.T:
        for i in range(6):
            kept = [j for j in range(6) if j == i or ids[j] != ids[i]]
            expected -= logits[i][kept].log_softmax(0)[kept.index(i)] / 12
    torch.testing.assert_close(loss, expected)


def nce_rank(rank, folder, grads):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    image, text = (torch.randn(8, 3, dtype=torch.float64, generator=generator(s)) for s in (0, 1))
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
    own = slice(4 * rank, 4 * rank + 4)
    a, b = image[own].clone().requires_grad_(), text[own].clone().requires_grad_()
    lc.info_nce(F.normalize(a, dim=1), F.normalize(b, dim=1), 10.0, ids[own]).backward()
    grads[rank] = torch.stack((a.grad, b.grad)) / 2  # as DDP averages
    dist.destroy_process_group()


def test_info_nce_of_two_ranks_is_that_of_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        grads = manager.dict()
        mp.spawn(nce_rank, (str(tmp_path), grads), nprocs=2)
        split = torch.cat([grads[0], grads[1]], 1)
    pair = [torch.randn(8, 3, dtype=torch.float64, generator=generator(s)) for s in (0, 1)]
    image, text = (x.requires_grad_() for x in pair)
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
    lc.info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), 10.0, ids).backward()
    assert (split - torch.stack((image.grad, text.grad))).abs().max() < 1e-12
    # what the test must tell apart: the other rank's features without gradient
    cut = [F.normalize(x.detach(), dim=1) for x in (image, text)]
    a = image.detach()[:4].requires_grad_()
    own = F.normalize(a, dim=1)
    logits = 10 * own @ cut[1].T, 10 * cut[1][:4] @ torch.cat((own, cut[0][4:])).T
    (sum(F.cross_entropy(l, torch.arange(4)) for l in logits) / 4).backward()
    assert (a.grad - image.grad[:4]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- CLIP


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_the_released_models():
    with torch.device("meta"):
        b8, b4 = lc.CLIP(lc.CONFIGS["paper"]), lc.CLIP(lc.CONFIGS["b4plus"])
        b32, b16 = (lc.CLIP(replace(lc.B8, side=224, patch=p, channels=3)) for p in (32, 16))
        vae = lc.VAE(**lc.SD)
    assert count(b8) == 149_126_145 and count(b8.visual) == 85_698_048
    assert len(b8.state_dict()) == 302 and b8.logit_scale.shape == ()
    assert count(b4) == 176_959_873 and count(b4.visual) == 85_796_352
    assert count(b32) == 151_277_313 and count(b16) == 149_620_737
    assert count(vae) == 83_653_863 and len(vae.state_dict()) == 248
    assert count(vae.encoder) == 34_163_592 and len(vae.encoder.state_dict()) == 106
    assert count(vae.decoder) == 49_490_179 and len(vae.decoder.state_dict()) == 138
    assert count(lc.VAE()) == 242_327


def sizes(**more):
    small = dict(width=24, layers=2, text_width=24, embed=8, head=6)
    return lc.CLIPConfig(**small | more)


def tiny(**more):
    torch.manual_seed(0)
    return lc.CLIP(sizes(**more)).eval()


@torch.no_grad()
def test_text_is_trimmed_exactly():
    clip = tiny()
    tokens = lc.toy_tokens(["a red circle", "two blue rings", "a big green cross"])
    x = clip.token_embedding(tokens) + clip.positional_embedding  # all positions
    x = clip.ln_final(clip.transformer.resblocks(x))[torch.arange(3), tokens.argmax(1)]
    whole = F.normalize(x @ clip.text_projection, dim=-1)
    for rows in slice(0, 3), slice(0, 2), slice(1, 2):
        assert (clip.encode_text(tokens[rows]) - whole[rows]).abs().max() < 1e-5
    tokens[0, 6:] = 3  # whatever stands after the end
    assert (clip.encode_text(tokens) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_latents_that_do_not_fit():
    clip, z = tiny(), torch.randn(2, 4, 8, 8, generator=generator())
    with pytest.raises(ValueError, match=r"channels-first, \(4, 8, 8\), not \(8, 8, 4\)"):
        clip.encode_image(z.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"\(4, 8, 8\), not \(4, 12, 12\)"):
        clip.encode_image(torch.zeros(1, 4, 12, 12))
    torch.testing.assert_close(clip.encode_image(z).norm(dim=1), torch.ones(2))


def test_logit_scale_is_clamped_and_decay_is_openclips():
    clip = tiny()
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    clip(
        lc.toy_tokens(["a red circle", "a blue ring"]), torch.randn(2, 4, 8, 8), torch.arange(2)
    ).backward()
    assert clip.logit_scale.item() == pytest.approx(4.605170)
    decay, plain = lc.clip_optimizer(clip, lc.Args()).param_groups
    names = {id(p): n for n, p in clip.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decay["weight_decay"] == 0.2 and plain["weight_decay"] == 0
    assert plain["betas"] == (0.9, 0.98)
    embeddings = {"token_embedding.weight", "positional_embedding"}
    assert {"visual.conv1.weight", "visual.proj"} | embeddings <= decayed
    assert not any(n.endswith("bias") or "ln_" in n or n == "logit_scale" for n in decayed)
    assert len(decayed) + len(plain["params"]) == len(names)


# -------------------------------------------------------------------------------------------- VAE


@torch.no_grad()
def test_resampling_by_hand():
    down = lc.Half((1, 1), 1, 1, True).down_blocks[0].downsamplers[0]
    up = lc.Half((1, 1), 1, 1, False).up_blocks[0].upsamplers[0]
    down.conv.weight.fill_(1.0), down.conv.bias.zero_()
    up.conv.weight.zero_(), up.conv.bias.zero_()
    up.conv.weight[0, 0, 1, 1] = 1.0
    # padding on all sides would give [[4, 6], [6, 9]]
    assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert up(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@torch.no_grad()
def test_vae_shapes():
    vae = lc.VAE()
    mean, logvar = vae.moments(torch.zeros(2, 3, 32, 32))
    assert mean.shape == logvar.shape == (2, 4, 8, 8) and vae.decode(mean).shape == (2, 3, 32, 32)
    sd = lc.VAE((8, 8, 8, 8), 2, 4)
    assert sd.moments(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 8, 8)


def test_vae_loss_by_hand(monkeypatch):
    vae, image = lc.VAE(), torch.full((1, 3, 32, 32), 0.5)
    ones = torch.ones(1, 4, 8, 8)  # a mean of 1 and a log-variance of 0: half a nat each
    monkeypatch.setattr(vae, "moments", lambda x: (ones, 0 * ones))
    monkeypatch.setattr(vae, "decode", lambda z: (z - 3).mean() + 0 * image)
    loss = vae(image, 2 * ones)  # decoded to 0: an error of .5
    assert loss.item() == pytest.approx(0.5 + 0.25 + lc.KL * 0.5)


@torch.no_grad()
def test_vae_is_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    types = {"down_block_types": ["DownEncoderBlock2D"] * 4}
    types |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4}
    sizes = dict(block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4)
    theirs = diffusers.AutoencoderKL(**types, **sizes).eval()
    theirs.save_pretrained(tmp_path)
    path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    ours = lc.with_weights(lc.VAE((8, 16, 16, 16), 2, 4), path)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior, (mean, logvar) = theirs.encode(x).latent_dist, ours.moments(x)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------- real weights, tokens


def save(path, state):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return str(path)


def test_clip_weights_by_every_name(tmp_path):
    clip = tiny()
    state = clip.state_dict()
    path = save(tmp_path / "a.safetensors", state)
    for k, v in lc.with_weights(lc.CLIP(sizes()), path).state_dict().items():
        assert torch.equal(v, state[k])
    theirs = {"module." + k.replace("visual.", "visual.latent_vit."): v for k, v in state.items()}
    theirs["module.visual.vae_encoder.conv_in.weight"] = torch.zeros(3)
    training = {"epoch": 34, "loss": np.float64(1.5), "n": np.int64(3), "state_dict": theirs}
    torch.save(training, tmp_path / "epoch_34.pt")  # with NumPy numbers in it
    again = lc.with_weights(lc.CLIP(sizes()), str(tmp_path / "epoch_34.pt"))
    assert torch.equal(again.visual.proj, clip.visual.proj)
    assert not any(p.requires_grad for p in again.parameters())
    torch.save({"model": state, "step": 3}, tmp_path / "ours.pt")  # a checkpoint of our own
    again = lc.with_weights(lc.CLIP(sizes()), str(tmp_path / "ours.pt"))
    assert torch.equal(again.visual.proj, clip.visual.proj)
    del state["visual.proj"]
    with pytest.raises(ValueError, match="visual.proj"):
        lc.with_weights(lc.CLIP(sizes()), save(tmp_path / "b.safetensors", state))
    with pytest.raises(ValueError, match="token_embedding.weight"):
        lc.with_weights(lc.CLIP(sizes(vocab=50)), path)


def test_damaged_weights(tmp_path):
    path = save(tmp_path / "v.safetensors", lc.VAE((8, 8), 1, 4).state_dict())
    (tmp_path / "cut.safetensors").write_bytes(open(path, "rb").read()[:-10])
    with pytest.raises(OSError, match="allowed: a whole safetensors"):
        lc.with_weights(lc.VAE(), str(tmp_path / "cut.safetensors"))
    with pytest.raises(ValueError, match="(?s)does not fit: .*Missing"):
        lc.with_weights(lc.VAE(), path)
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="x.pt"):
        lc.with_weights(lc.CLIP(sizes()), str(tmp_path / "x.pt"))


@torch.no_grad()
def test_clip_is_that_of_open_clip(tmp_path):
    model = pytest.importorskip("open_clip.model")
    vision = dict(layers=2, width=24, head_width=6, patch_size=8, image_size=32)
    text = dict(context_length=9, vocab_size=27, width=24, heads=4, layers=2)
    theirs = model.CLIP(8, model.CLIPVisionCfg(**vision), model.CLIPTextCfg(**text)).eval()
    config = sizes(channels=3, side=32, patch=8)
    ours = lc.with_weights(
        lc.CLIP(config), save(tmp_path / "open_clip.safetensors", theirs.state_dict())
    )
    x = torch.randn(3, 3, 32, 32)
    tokens = lc.toy_tokens(["a red circle", "two blue rings", "a warm cross"])
    for a, b in (
        (ours.encode_image(x), theirs.encode_image(x)),
        (ours.encode_text(tokens), theirs.encode_text(tokens)),
    ):
        torch.testing.assert_close(a, F.normalize(b, dim=-1), atol=1e-5, rtol=1e-4)


def clip_tokenizer(path):
    """A tokenizer.json in CLIP's manner: byte BPE with </w>, the two special tokens last."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in alphabet] + [chr(256 + n) for n in range(256 - len(alphabet))]
    words = [*letters, *(c + "</w>" for c in letters), "ca", "cat</w>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    tok = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tok.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    parts = [
        pre_tokenizers.Split(split, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    tok.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tok.save(str(path))
    return str(path)


def test_tokens_of_captions(tmp_path):
    tok = data.get_tokenizer(clip_tokenizer(tmp_path / "tokenizer.json"))
    start, end = tok.n_vocab - 2, tok.n_vocab - 1
    texts = ["A  cat", "word " * 100, "a cat <|endoftext|> cat", ""]
    ids = lc.clip_tokens(tok.encode_batch(texts), end, 77)
    letter = tok.backend.token_to_id("a</w>")
    cat = tok.backend.token_to_id("cat</w>")
    assert ids[0, :5].tolist() == [start, letter, cat, end, 0] and ids[0, 5:].sum() == 0
    assert ids[1, 76] == end and (ids[1] == end).sum() == 1  # cut, and the end kept
    assert (ids[2] == end).sum() == 1 and ids[2].argmax() > 10  # written in the caption: text
    assert ids[2, ids[2].argmax() - 1] == cat
    assert ids[3, :2].tolist() == [start, end]


def test_pictures_of_every_kind(tmp_path):
    from PIL import Image

    grey = np.full((4, 4), 0x8080, np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (lc.open_picture(tmp_path / "grey.png", 4) == 128).all()
    clear = np.zeros((4, 4, 4), np.uint8)  # black, and fully transparent on the left
    clear[:, 2:, 3] = 255
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    seen = lc.open_picture(tmp_path / "clear.png", 4)
    assert (seen[:, :, :2] == 255).all() and (seen[:, :, 2:] == 0).all()
    turned = np.zeros((8, 8, 3), np.uint8)
    turned[0] = 255  # the first row is white; the camera lay on its side
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    seen = lc.open_picture(tmp_path / "turned.png", 8)
    assert (seen[:, :, -1] == 255).all() and (seen[:, :, :-1] == 0).all()
    Image.fromarray(np.zeros((20, 60, 3), np.uint8)).save(tmp_path / "wide.jpg")
    assert lc.open_picture(tmp_path / "wide.jpg", 16).shape == (3, 16, 16)


# ------------------------------------------------------------------------------------------- ReNO


def norm_loss(noise):
    """n^2 / 2 - (d - 1) ln n of one row of noise."""
    n = noise.norm()
    return 0.5 * n**2 - (noise.numel() - 1) * n.log()


def test_regulariser_by_hand():
    for d, n, slope in (16384, 128.0, 7.8125e-5), (256, 20.0, 0.0725), (256, 255**0.5, 0.0):
        noise = torch.zeros(1, d)
        noise[0, 0] = n  # without a reward, one step of SGD tells the slope
        moved = []

        def generate(e, moved=moved):
            moved.append(e.detach().clone())
            return e

        lc.reno(generate, lambda z: 0 * z[:, 0], noise, 2, lr=100.0, momentum=0.0)
        assert (moved[0] - moved[1])[0, 0].item() / 100 == pytest.approx(slope, abs=2e-6)


def itself(x):
    return x


def test_momentum_by_hand():
    """Constant gradient .1, lr 5, momentum .9, Nesterov: -.95, -2.305, -4.0245, -6.072."""
    start = torch.full((1, 1), 20.0)
    found = lc.reno(itself, lambda z: -0.1 * z[:, 0], start, 5, lr=5.0, clip=9.0, reg=0.0)[0]
    assert (20 - found[1:, 0, 0]).tolist() == pytest.approx([0.95, 2.305, 4.0245, 6.072], abs=1e-3)


def test_reno_of_a_batch_is_reno_of_each():
    torch.manual_seed(0)
    W, text, noise = torch.randn(12, 12) / 3, torch.randn(5, 12), torch.randn(5, 12)

    def generate(e):
        return torch.tanh(e @ W)

    def cosine(text, z):
        return F.cosine_similarity(z, text)

    latents, rewards = lc.reno(generate, partial(cosine, text), noise, 12, 1.0)
    for i in range(5):
        row = slice(i, i + 1)
        alone = lc.reno(generate, partial(cosine, text[row]), noise[row], 12, 1.0)
        assert (alone[0] - latents[:, row]).abs().max() < 1e-5
        assert (alone[1] - rewards[:, row]).abs().max() < 1e-5
    assert (rewards.diff(dim=0) >= 0).all() and (rewards[-1] > rewards[0]).all()
    torch.testing.assert_close(latents[0], generate(noise))
    torch.testing.assert_close(rewards, torch.stack([cosine(text, z) for z in latents]))

    def worse(z):  # the first evaluation counts
        return cosine(text, z) if torch.equal(z, generate(noise)) else z[:, 0] * 0 - 9

    torch.testing.assert_close(lc.reno(generate, worse, noise, 4)[0][-1], generate(noise))


def test_reno_is_sgd_of_torch():
    """Against torch.optim.SGD and clip_grad_norm_, one row."""
    torch.manual_seed(1)
    W, noise, lr = torch.randn(9, 9), torch.randn(1, 9), 0.7
    path = []

    def generate(e):
        path.append(e.detach().clone())
        return e

    def reward(z):
        return (z @ W).sin().sum(1)

    lc.reno(generate, reward, noise, 7, lr)
    p = noise.clone().requires_grad_()
    sgd = torch.optim.SGD([p], lr, 0.9, nesterov=True)
    for seen in path:
        torch.testing.assert_close(seen, p.detach(), atol=1e-5, rtol=1e-5)
        sgd.zero_grad()
        (0.01 * norm_loss(p) - reward(p)).sum().backward()
        torch.nn.utils.clip_grad_norm_([p], 0.1)
        sgd.step()


def test_latent_reward_never_decodes_and_pixel_reward_always():
    calls, vae = [], lc.VAE().requires_grad_(False)
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    latent = tiny().requires_grad_(False)
    pixel = tiny(channels=3, side=32, patch=8).requires_grad_(False)
    flow = types.SimpleNamespace(generate=lambda words, noise: noise)
    lab = lc.Lab(vae, 0.5, flow, {"latent": latent, "pixel": pixel}, torch.device("cpu"))
    texts, noise = ["a red circle", "a blue ring"], torch.randn(2, 4, 8, 8)
    toward = F.normalize(torch.randn(2, 8), dim=1)
    found = lab.climb("latent", texts, toward, noise, 5, 0.6)
    assert not calls
    with torch.no_grad():
        expected = (latent.encode_image(noise / 0.5) * toward).sum(1)
        torch.testing.assert_close(found[1][0], expected)
    lab.climb("pixel", texts, toward, noise, 5, 0.6)
    assert len(calls) == 5


def test_not_finite_rewards_stop():
    with pytest.raises(ValueError, match="evaluation 0 is not finite"):
        lc.reno(itself, lambda z: z[:, 0] * math.nan, torch.zeros(1, 2))


def test_guidance_by_hand():
    """Away from a concept the reward is cos(z, prompt) - cos(z, concept)."""

    class Lab:
        def __init__(self):
            self.towards = []

        def text(self, arm, texts):
            prompts, reds, blues = [[1.0, 0.0]] * len(texts), [[0.0, 1.0]] * 5, [[0.6, 0.8]] * 5
            kind = texts[0].split()[1]
            return torch.tensor({"warm": prompts, "red": reds, "blue": blues}[kind])

        def climb(self, arm, texts, toward, noise, iters, lr):
            self.towards.append(toward[0])
            return torch.zeros(2, len(noise), 4, 8, 8), None

        def images(self, z):
            return torch.full((len(z), 3, 32, 32), lc.DARK)

    lab = Lab()
    found = lc.guard(lab, lc.Args(), torch.zeros(6, 4, 8, 8))
    image = torch.tensor([0.6, 0.8])
    rewards = [(image * toward).sum().item() for toward in lab.towards]
    assert rewards == pytest.approx([0.6 - 0.8, 0.6 - 1.0, 0.6, 0.6 - 0.8])
    assert list(found) == ["first noise", *(name for name, _, _ in lc.GUIDES)]


def test_sigma_of_turbo():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert ((1 / (1 - beta).prod() - 1) ** 0.5).item() == pytest.approx(lc.SIGMA, abs=1e-5)


# -------------------------------------------------------------------------------------------- toy


def test_areas_and_determinism():
    at, six = torch.tensor([8.0]), torch.tensor([6.0])
    areas = {s: lc.coverage(s, at, at, six).sum().item() for s in lc.SHAPES}
    for shape, area in {"circle": 112.8, "square": 117.6, "ring": 81.1, "cross": 79.3}.items():
        assert areas[shape] == pytest.approx(area, rel=0.015)
    for shape, unit in zip(lc.SHAPES, lc.AREAS):
        assert areas[shape] == pytest.approx(36 * unit, rel=0.03)
    a, b, c = lc.pictures(40, [7]), lc.pictures(40, [7]), lc.pictures(40, [8])
    assert torch.equal(a.images, b.images) and a.texts == b.texts
    assert not torch.equal(a.images, c.images)


@pytest.fixture(scope="module")
def world():
    return lc.pictures(600, [3])


def things(world):
    """Each picture's (colour, shape) pairs, in the order of the caption."""
    rows = [[n for n in row if n >= 0] for row in world.objects.tolist()]
    return [[(lc.COLOURS[n % 6], lc.SHAPES[n // 6]) for n in row] for row in rows]


def test_held_out_objects(world):
    held = {(lc.COLOURS[n % 6], lc.SHAPES[n // 6]) for n in lc.HELD.tolist()}
    assert len(held) == len({s for _, s in held}) == len({c for c, _ in held}) == 5
    for objects, out in zip(things(world), world.new):
        assert out == any(thing in held for thing in objects)


def test_captions_tell_the_truth(world):
    tokens = lc.toy_tokens(world.texts)
    assert (tokens.max(1).values == lc.TOY.vocab - 1).all()
    assert (len(lc.WORDS) + 2, tokens.shape[1]) == (lc.TOY.vocab, lc.TOY.context)
    for text, names, label in zip(world.texts, things(world), world.label):
        words = text.split()
        number = {"two": 2, "three": 3}.get(words[0], 2 if " and " in text else 1)
        assert len(names) == number
        if words[1] in ("warm", "cool"):
            assert words[2] == names[0][1]
            assert (names[0][0] in lc.COLOURS[:3]) == (words[1] == "warm")
        elif number == 1:
            assert lc.CLASSES[label].endswith(" ".join(names[0]))
            assert words[1] not in lc.SIZES or lc.CLASSES[label] == text
        elif " and " in text:
            assert [tuple(part.split()[1:]) for part in text.split(" and ")] == names
            assert names[0] != names[1]
        else:
            assert len(set(names)) == 1 and words[1] == names[0][0]
    assert len(set(lc.CLASSES)) == 60


def test_the_judge(world):
    assert lc.fulfilled(world.images, world.objects).mean() >= 0.98
    turned = world.objects.roll(1, 0)
    assert lc.fulfilled(world.images, turned).mean() < 0.1
    image = torch.full((1, 3, 32, 32), lc.DARK)
    assert lc.see(image).tolist() == [[lc.NOTHING] * 4]
    # a red square in the second cell, a blue one in the third; the fourth is half red, half blue
    share = lc.coverage("square", *(torch.tensor([v]) for v in (8.0, 8.0, 5.0)))
    red, blue = lc.RGB[0][None, :, None, None], lc.RGB[5][None, :, None, None]
    halves = torch.where(torch.arange(16) < 8, red, blue)
    for y, x, colour in (0, 16, red), (16, 0, blue), (16, 16, halves):
        image[..., y : y + 16, x : x + 16] += share * (colour - lc.DARK)
    assert lc.see(image).tolist() == [[lc.NOTHING, 6, 11, lc.UNCLEAR]]


def test_pictures_of_a_kind():
    counted = lc.pictures(50, [1], {"count": 1.0})
    assert all(text.startswith(("two", "three")) for text in counted.texts)
    warm = [text.startswith("a warm") for text in lc.pictures(400, [1], {"tone": 1.0}).texts]
    red = (lc.pictures(400, [1], {"tone": 1.0}).objects[:, 0] % 6 == 0).numpy()
    assert 0.5 < red[warm].mean() < 0.7 and not red[~np.array(warm)].any()


def test_euler_follows_a_straight_path():
    flow = lc.Flow()
    target, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []

    def velocity(x, t, words):  # of the path to one target
        times.append(t[0].item())
        return (target - x) / (1 - t)[:, None, None, None]

    flow.velocity = velocity
    for steps in 1, 3:
        found = flow.generate(None, noise, steps)
        torch.testing.assert_close(found, target, atol=1e-4, rtol=1e-4)
    assert times == pytest.approx([0, 0, 1 / 9, 4 / 9])
    half = 0.66 * noise + 0.34 * target
    found = flow.generate(None, half, start=0.34)
    torch.testing.assert_close(found, target, atol=1e-4, rtol=1e-4)


def test_flow_matching_by_hand():
    flow, x1, noise = lc.Flow(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    flow.velocity = lambda x, t, words: x1 - noise + 2
    t = torch.tensor([0.5, 0.75])
    assert flow(None, x1, noise, t).item() == pytest.approx(4 * (0.25 + 0.0625) / 2)


def test_rotation_keeps_the_content():
    z = torch.randn(2, 4, 8, 8, generator=generator())
    turned = lc.rotated(z, 0)
    torch.testing.assert_close(turned.norm(dim=1), z.norm(dim=1))
    assert (turned - z).abs().max() > 0.1


# ----------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path), "--seeds", "3"]
    result = lc.main(flags)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T1", "T2", "T3", "T4", "T5"]
    assert all(c["measured"] and c["control"] for c in result["claims"])
    rows = common.read_log(tmp_path / "metrics.jsonl")
    stages = {"vae", "flow", "latent", "pixel", "shuffled"}
    assert {r["run"] for r in rows} == {f"toy-s3-{stage}" for stage in stages}
    assert (tmp_path / "latent_clip.png").stat().st_size > 10000
    losses = {r["run"]: r["loss"] for r in rows if r["step"] == 0}
    assert losses["toy-s3-latent"] != losses["toy-s3-shuffled"]
    again = lc.main([*flags, "--resume"])  # nothing is trained again
    measured = [c["measured"] for c in result["claims"] if c["id"] != "T4"]
    assert measured == [c["measured"] for c in again["claims"] if c["id"] != "T4"]


def test_gates_stop_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: seed 3: VAE of"):
        lc.main(["--preset", "smoke", "--gates", "--out", str(tmp_path), "--seeds", "3"])


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Random weights in the real formats: a small VAE and CLIP, a tokenizer, some pictures."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    torch.manual_seed(0)
    vae = lc.VAE((8, 8, 8, 8), 1, 4)
    save(folder / "vae.safetensors", vae.state_dict())
    n_vocab = data.get_tokenizer(clip_tokenizer(folder / "tokenizer.json")).n_vocab
    clip = lc.CLIP(replace(lc.TOY, vocab=n_vocab))
    save(folder / "clip.safetensors", clip.state_dict())
    (folder / "pairs").mkdir()
    for i in range(30):
        pixels = rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / f"{i:02}.png")
        (folder / "pairs" / f"{i:02}.txt").write_text(["cat", "dog"][i % 2] + "\n")
    flags = ["--preset", "smoke", "--model", f"{folder}/clip.safetensors"]
    flags += ["--vae", f"{folder}/vae.safetensors", "--tokenizer", f"{folder}/tokenizer.json"]
    return folder, flags


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lc, "SD", {"widths": (8, 8, 8, 8), "layers": 1, "groups": 4})


def test_captions_of_pictures_are_found(stand_ins, small, tmp_path):
    folder, flags = stand_ins
    result = lc.main([*flags, "--dataset", f"{folder}/pairs", "--out", str(tmp_path)])
    files = sorted((folder / "pairs").glob("*.png"))
    x = torch.stack([lc.open_picture(path, 64) for path in files]) / 127.5 - 1
    tok = data.get_tokenizer(f"{folder}/tokenizer.json")
    clip = lc.CLIP(replace(lc.TOY, vocab=tok.n_vocab))
    lc.with_weights(clip, f"{folder}/clip.safetensors")
    vae = lc.with_weights(lc.VAE(**lc.SD), f"{folder}/vae.safetensors")
    words = lc.clip_tokens(tok.encode_batch(["cat", "dog"]), tok.n_vocab - 1, 9)
    best = (clip.encode_image(vae.moments(x)[0]) @ clip.encode_text(words).T).argmax(1)
    right = (best == torch.arange(30) % 2).float().mean().item()
    found = result["metrics"]["real"][0]
    assert found["found"] == pytest.approx(right)
    assert found["chance"] == pytest.approx(0.5)


TRAIN = """import sys
sys.path.insert(0, {root!r})
import latent_clip as lc
lc.SD = {{"widths": (8, 8, 8, 8), "layers": 1, "groups": 4}}
if __name__ == "__main__":
    lc.main(sys.argv[1:])
"""


def test_a_clip_is_trained_on_pictures_by_one_rank_or_two(stand_ins, small, tmp_path):
    folder, flags = stand_ins
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(root=str(Path(lc.__file__).parent)))
    flags = [*flags[:2], *flags[4:], "--dataset", f"{folder}/pairs", "--log-every", "1"]
    flags += ["--steps", "4", "--batch-size", "12", "--warmup", "0", "--jobs", "1", "--out"]
    result = lc.main([*flags, f"{tmp_path}/one"])
    assert result["metrics"]["real"] == [{"found": 1, "chance": 1}]  # three dogs are held out
    (cache,) = (tmp_path / "one").glob("latents-*.f16")
    files = sorted((folder / "pairs").glob("*.png"))
    z = np.memmap(cache, np.float16, "r", shape=(30, 4, 8, 8))
    vae = lc.with_weights(lc.VAE(**lc.SD), f"{folder}/vae.safetensors")
    expected = vae.latents(lc.open_picture(files[7], 64)[None])[0][0]
    torch.testing.assert_close(
        torch.from_numpy(z[7].astype(np.float32)), expected, rtol=1e-3, atol=1e-3
    )
    written = cache.stat().st_mtime_ns
    lc.main([*flags, f"{tmp_path}/one"])
    assert cache.stat().st_mtime_ns == written  # encoded once
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(script), *flags, f"{tmp_path}/two"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    one, two = (common.read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)


class Pipe:
    """What --prompt needs of a diffusers pipeline: a UNet that takes away what it is given."""

    dtype, wanted = torch.float32, []

    def __init__(self):
        self.unet = torch.nn.Linear(1, 1)
        self.unet.forward = self.predict

    @classmethod
    def from_pretrained(cls, name, torch_dtype):
        cls.dtype = torch_dtype
        return cls()

    def to(self, device):
        return self

    def encode_prompt(self, prompt, do_classifier_free_guidance):
        self.wanted.append(prompt)
        return torch.zeros(1, 77, 8), None, torch.zeros(1, 8), None

    def predict(self, x, t, encoder_hidden_states, added_cond_kwargs):
        assert t == 999 and added_cond_kwargs["time_ids"].tolist() == [[512, 512, 0, 0, 512, 512]]
        return (x - x / lc.SIGMA,)


def test_a_prompt_with_a_generator(stand_ins, small, tmp_path, monkeypatch):
    from PIL import Image

    folder, flags = stand_ins
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionXLPipeline = Pipe
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    flags = [*flags, "--out", str(tmp_path), "--iters", "4", "--noise-lr", "1.2"]
    flags += ["--generator", "turbo", "--prompt", "a cat", "--seeds", "0", "1"]
    found = lc.main(flags)["metrics"]["real"]
    assert Pipe.wanted == ["a cat"] * 2 and len(found) == 2
    for seed, row in enumerate(found):
        assert row["reward"][-1] > row["reward"][0]  # the reward has been climbed
        pictures = [Image.open(tmp_path / f"{seed}-{when}.png") for when in ("before", "after")]
        assert pictures[0].size == (64, 64) and pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.parametrize(
    "change, match",
    [
        ("--dataset EMPTY", "has 0 pictures, needed: 10"),
        ("--dataset ODD", "b.txt"),
        ("--dataset CORRUPT", "cannot identify image file.*0.png"),
        ("--dataset /no/such", "/no/such"),
        ("--dataset CORRUPT --vae /no/such.safetensors", "can't be read"),
        ("--dataset CORRUPT --tokenizer /no/such.json", "no tokenizer.json"),
        ("--dataset CORRUPT --model VAE", "does not fit"),
        ("", "needed are --vae"),
        ("--dataset CORRUPT --prompt x", "needed are --vae"),
        ("--dataset CORRUPT --generator x", "needed are --vae"),
        ("--prompt x", "needed are --vae"),
        ("--batch-size 1", "batch-size 1, allowed: 2"),
        ("--micro-batch 4", "micro-batch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(change, match, stand_ins, small, tmp_path, capsys):
    from PIL import Image

    folder, flags = stand_ins
    for name in "EMPTY", "ODD", "CORRUPT":
        (tmp_path / name).mkdir()
    for i in range(10):
        Image.new("RGB", (9, 9)).save(tmp_path / "ODD" / f"{'abcdefghij'[i]}.png")
        (tmp_path / "CORRUPT" / f"{i}.png").write_bytes(b"not a picture")
        (tmp_path / "CORRUPT" / f"{i}.txt").write_text("a")
    (tmp_path / "ODD" / "a.txt").write_text("a")
    change = re.sub("EMPTY|ODD|CORRUPT", lambda m: str(tmp_path / m[0]), change)
    change = change.replace("VAE", f"{folder}/vae.safetensors")
    with pytest.raises(SystemExit) as stop:
        lc.main([*flags, "--out", str(tmp_path / "out"), *change.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])


@pytest.mark.parametrize("flag", ["--vae x", "--tokenizer x", "--dataset x", "--prompt x"])
def test_flags_without_effect_are_refused(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lc.main(["--preset", "smoke", "--out", str(tmp_path), *flag.split()])
    assert stop.value.code == 2 and ": needed are --vae" in capsys.readouterr().err
