"""Tests of latent_clip.py: values by hand, brute force against the fast path, peers if installed."""

import json
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
from safetensors.torch import load_file, save_file

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
        b8 = lc.CLIP(lc.B8)
        b32, b16 = (lc.CLIP(replace(lc.B8, side=224, patch=p, channels=3)) for p in (32, 16))
        vae = lc.VAE(**lc.SD)
    assert count(b8) == 149_126_145 and count(b8.visual) == 85_698_048
    assert len(b8.state_dict()) == 302 and b8.logit_scale.shape == ()
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
    ours = lc.VAE((8, 16, 16, 16), 2, 4)
    ours.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior, (mean, logvar) = theirs.encode(x).latent_dist, ours.moments(x)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------- open_clip, tokens, pictures


@torch.no_grad()
def test_clip_is_that_of_open_clip():
    model = pytest.importorskip("open_clip.model")
    vision = dict(layers=2, width=24, head_width=6, patch_size=8, image_size=32)
    text = dict(context_length=9, vocab_size=27, width=24, heads=4, layers=2)
    theirs = model.CLIP(8, model.CLIPVisionCfg(**vision), model.CLIPTextCfg(**text)).eval()
    ours = lc.CLIP(sizes(channels=3, side=32, patch=8))
    ours.load_state_dict(theirs.state_dict())
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
    found = lc.reno(itself, lambda z: -0.1 * z[:, 0], start, 5, lr=5.0, clip=9.0, reg=0.0)
    assert (20 - found[1:, 0, 0]).tolist() == pytest.approx([0.95, 2.305, 4.0245, 6.072], abs=1e-3)


def test_reno_of_a_batch_is_reno_of_each():
    torch.manual_seed(0)
    W, text, noise = torch.randn(12, 12) / 3, torch.randn(5, 12), torch.randn(5, 12)

    def generate(e):
        return torch.tanh(e @ W)

    def cosine(text, z):
        return F.cosine_similarity(z, text)

    latents = lc.reno(generate, partial(cosine, text), noise, 12, 1.0)
    for i in range(5):
        row = slice(i, i + 1)
        alone = lc.reno(generate, partial(cosine, text[row]), noise[row], 12, 1.0)
        assert (alone - latents[:, row]).abs().max() < 1e-5
    rewards = torch.stack([cosine(text, z) for z in latents])
    assert (rewards.diff(dim=0) >= 0).all() and (rewards[-1] > rewards[0]).all()
    torch.testing.assert_close(latents[0], generate(noise))

    def worse(z):  # the first evaluation counts
        return cosine(text, z) if torch.equal(z, generate(noise)) else z[:, 0] * 0 - 9

    torch.testing.assert_close(lc.reno(generate, worse, noise, 4)[-1], generate(noise))


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


def small_lab(flow):
    latent = tiny().requires_grad_(False)
    pixel = tiny(channels=3, side=32, patch=8).requires_grad_(False)
    vae = lc.VAE().requires_grad_(False)
    return lc.Lab(vae, flow, {"latent": latent, "pixel": pixel}, torch.device("cpu"))


def test_latent_reward_never_decodes_and_pixel_reward_always():
    calls = []
    lab = small_lab(types.SimpleNamespace(generate=lambda words, noise: noise))
    lab.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    texts, noise = ["a red circle", "a blue ring"], torch.randn(2, 4, 8, 8)
    args = lc.Args(iters=5, noise_lr=0.6)
    torch.testing.assert_close(lab.climb("latent", texts, noise, args)[0], noise)
    assert not calls
    lab.climb("pixel", texts, noise, args)
    assert len(calls) == 5


def test_the_reward_with_and_without_guidance(monkeypatch):
    """Away from a colour it is cos(z, prompt) - cos(z, the mean of that colour's shapes)."""
    lab, rewards = small_lab(types.SimpleNamespace(generate=itself)), []
    monkeypatch.setattr(lc, "reno", lambda generate, reward, *_: rewards.append(reward))
    texts, z = ["a warm circle", "a warm ring"], torch.randn(2, 4, 8, 8)
    lab.climb("latent", texts, z, lc.Args())
    lab.climb("latent", texts, z, lc.Args(), away="red")
    lab.climb("pixel", texts, z, lc.Args())
    with torch.no_grad():
        image = lab.clips["latent"].encode_image(z)
        plain = (image * lab.text("latent", texts)).sum(1)
        red = lab.text("latent", [f"a red {shape}" for shape in lc.SHAPES]).mean(0)
        torch.testing.assert_close(rewards[0](z), plain)
        torch.testing.assert_close(rewards[1](z), plain - image @ red / red.norm())
        pixels = lab.clips["pixel"].encode_image(lab.vae.decode(z))
        torch.testing.assert_close(rewards[2](z), (pixels * lab.text("pixel", texts)).sum(1))


def test_what_guidance_is_asked_for():
    """Red in any cell counts, whatever its shape; the shape counts in any colour."""
    image = torch.full((5, 3, 32, 32), lc.DARK)
    one = torch.tensor([8.0])
    for i, shape in enumerate(lc.SHAPES):  # the right shape in blue; for the first two a red square
        cover = lc.coverage(shape, one, one, torch.tensor([5.0]))
        image[i, :, :16, :16] += cover * (lc.RGB[5][:, None, None] - lc.DARK)
    cover = lc.coverage("square", one, one, torch.tensor([5.0]))
    image[:2, :, 16:, 16:] += cover * (lc.RGB[0][:, None, None] - lc.DARK)

    class Lab:
        vae = types.SimpleNamespace(images=lambda z: image)
        asked = []

        def climb(self, arm, texts, noise, args, away):
            self.asked.append((arm, texts, away))
            return torch.zeros(2, 5, 4, 8, 8)

    found = lc.guard(Lab(), lc.Args(), torch.zeros(5, 4, 8, 8))
    texts = [f"a warm {shape}" for shape in lc.SHAPES]
    assert Lab.asked == [(arm, texts, away) for arm, away in lc.GUIDES.values()]
    assert list(found) == ["first noise", *lc.GUIDES]
    for row in found.values():
        assert row["red"].item() == pytest.approx(0.4) and row["shape"].item() == 1


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
    flow = lc.Flow(1.0)
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
    flow.scale = 0.5  # what comes out is raw
    found = flow.generate(None, half, start=0.34)
    torch.testing.assert_close(found, 2 * target, atol=1e-4, rtol=1e-4)


def test_flow_matching_by_hand():
    flow, x1, noise = lc.Flow(1.0), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    flow.velocity = lambda x, t, words: x1 - noise + 2
    t = torch.tensor([0.5, 0.75])
    assert flow(None, x1, noise, t).item() == pytest.approx(4 * (0.25 + 0.0625) / 2)


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
    """Random weights in diffusers' format of a small VAE, a tokenizer, some pictures."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    torch.manual_seed(0)
    save_file(lc.VAE((8, 8, 8, 8), 1, 4).state_dict(), folder / "vae.safetensors")
    clip_tokenizer(folder / "tokenizer.json")
    (folder / "pairs").mkdir()
    for i in range(30):
        pixels = rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / f"{i:02}.png")
        (folder / "pairs" / f"{i:02}.txt").write_text(["cat", "dog"][i % 2] + "\n")
    flags = ["--preset", "smoke", "--model", f"{folder}/vae.safetensors"]
    flags += ["--tokenizer", f"{folder}/tokenizer.json", "--dataset", f"{folder}/pairs"]
    return folder, flags


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lc, "SD", {"widths": (8, 8, 8, 8), "layers": 1, "groups": 4})


def test_a_clip_is_trained_on_pictures(stand_ins, small, tmp_path, monkeypatch):
    folder, flags = stand_ins
    seen = []

    def look(clip, args, env, log, seed, rows, tokens, inputs):
        seen.append((clip, rows, tokens, inputs))

    monkeypatch.setattr(lc, "train_clip", look)
    result = lc.main([*flags, "--out", str(tmp_path)])
    ((clip, rows, tokens, latents),) = seen
    assert rows.tolist() == [i for i in range(30) if i % 10 != 9]
    vae = lc.VAE(**lc.SD)
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    x = torch.stack([lc.open_picture(folder / "pairs" / f"{i:02}.png", 64) for i in range(30)])
    with torch.no_grad():
        z = vae.moments(x / 127.5 - 1)[0]
    torch.testing.assert_close(latents.float(), z, rtol=1e-3, atol=1e-3)
    tok = data.get_tokenizer(f"{folder}/tokenizer.json")
    words = lc.clip_tokens(tok.encode_batch(["cat", "dog"]), tok.n_vocab - 1, 9)
    assert torch.equal(tokens, words.repeat(15, 1))
    assert result["metrics"]["real"] == [{"found": 1, "among": 3}]  # three dogs are held out


@torch.no_grad()
def test_captions_are_found(stand_ins, small, tmp_path, monkeypatch):
    folder, flags = stand_ins
    models = []
    monkeypatch.setattr(lc, "train_clip", lambda clip, *rest: models.append((clip, *rest)))
    (tmp_path / "pairs").mkdir()
    for file in (folder / "pairs").iterdir():
        (tmp_path / "pairs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pairs" / "19.txt").write_text("cat")  # held out are a dog, a cat, a dog
    flags = [*flags[:-1], f"{tmp_path}/pairs"]
    found = lc.main([*flags, "--out", str(tmp_path / "out")])["metrics"]["real"][0]
    ((clip, *_, tokens, latents),) = models
    image, text = clip.encode_image(latents[9::10].float()), clip.encode_text(tokens[9::10])
    best = (image @ text.T).argmax(1)
    right = sum("dcd"[int(best[i])] == "dcd"[i] for i in range(3))
    assert found == {"found": pytest.approx(right / 3), "among": 3}


TRAIN = """import sys
sys.path.insert(0, {root!r})
import latent_clip as lc
lc.SD = {{"widths": (8, 8, 8, 8), "layers": 1, "groups": 4}}
if __name__ == "__main__":
    lc.main(sys.argv[1:])
"""


def test_two_ranks_train_on_all_pairs(stand_ins, small, tmp_path):
    """Each reads its own pictures; the loss is that of the pairs of both."""
    folder, flags = stand_ins
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(root=str(Path(lc.__file__).parent)))
    flags = [*flags, "--log-every", "1", "--steps", "4", "--batch-size", "12", "--warmup", "0"]
    flags += ["--out", str(tmp_path / "two")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, str(script), *flags], check=True, capture_output=True, timeout=120)
    rows = common.read_log(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["metrics"]["real"][0]["among"] == 1
    # the first loss, of the first weights, by hand
    tok = data.get_tokenizer(f"{folder}/tokenizer.json")
    torch.manual_seed(0)
    clip = lc.CLIP(replace(lc.TOY, vocab=tok.n_vocab))
    vae = lc.VAE(**lc.SD)
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    picks = []
    for rank in range(2):
        own = np.setdiff1d(np.arange(30)[rank::2], np.arange(30)[rank::2][9::10])
        picks += [*np.random.default_rng([0, 5, 0]).choice(own, 6)]
    images = [lc.open_picture(folder / "pairs" / f"{i:02}.png", 64) for i in picks]
    z = vae.latents(torch.stack(images))[0].half().float()
    ids = torch.tensor([int(i) % 2 for i in picks])
    words = lc.clip_tokens(tok.encode_batch(["cat", "dog"]), tok.n_vocab - 1, 9)
    assert rows[0]["loss"] == pytest.approx(clip(words[ids], z, ids).item(), rel=1e-4)


@pytest.mark.parametrize(
    "change, match",
    [
        ("--dataset EMPTY", "has 0 pictures: too few"),
        ("--dataset ODD", "b.txt"),
        ("--dataset CORRUPT", "cannot identify image file.*0.png"),
        ("--dataset /no/such", "/no/such"),
        ("--model /no/such.safetensors", "--model /no/such.safetensors can't be read"),
        ("--model CUT", "CUT can't be read .*needed: a Stable Diffusion VAE"),
        ("--model OTHER", "OTHER can't be read .*needed: a Stable Diffusion VAE"),
        ("--tokenizer /no/such.json", "no tokenizer.json"),
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
    (tmp_path / "CUT").write_bytes((folder / "vae.safetensors").read_bytes()[:-10])
    save_file(lc.VAE((8, 8), 1, 4).state_dict(), tmp_path / "OTHER")
    change = re.sub("EMPTY|ODD|CORRUPT|CUT|OTHER", lambda m: str(tmp_path / m[0]), change)
    with pytest.raises(SystemExit) as stop:
        lc.main([*flags, "--out", str(tmp_path / "out"), *change.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])


@pytest.mark.parametrize("flag", ["--model x", "--tokenizer x", "--dataset x"])
def test_flags_without_effect_are_refused(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lc.main(["--preset", "smoke", "--out", str(tmp_path), *flag.split()])
    assert stop.value.code == 2 and "need one another" in capsys.readouterr().err
