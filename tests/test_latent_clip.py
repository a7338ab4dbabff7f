"""Tests of latent_clip.py: values by hand, brute force against the fast path, peers if installed."""

import json
import re
import sys
import textwrap
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
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


# ------------------------------------------------------------------------------------------- CLIP


def count(model):
    return sum(p.numel() for p in model.parameters())


B8 = lc.CLIPConfig(64, 8, 4, 768, 12, 64, 512, 49408, 77, 512, 12)  # the paper's
SD = {"widths": (128, 256, 512, 512), "layers": 2, "groups": 32}  # Stable Diffusion's


def test_sizes_of_the_released_models():
    with torch.device("meta"):
        b8 = lc.CLIP(B8)
        b32, b16 = (lc.CLIP(replace(B8, side=224, patch=p, channels=3)) for p in (32, 16))
        vae = lc.VAE(**SD)
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


# ------------------------------------------------------------------------------ open_clip, tokens


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


def test_tokens_of_captions():
    ids = lc.toy_tokens(["a red circle", "a red circle and a green cross"])
    word = {name: i for i, name in enumerate(lc.WORDS)}
    start, end = len(lc.WORDS), len(lc.WORDS) + 1
    assert ids[0].tolist() == [start, word["a"], word["red"], word["circle"], end, 0, 0, 0, 0]
    assert ids.shape == (2, 9) and ids.argmax(1).tolist() == [4, 8]


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


def test_batches_of_a_clip(monkeypatch):
    """Only `rows` are seen, with their captions; latents are means plus noise of given spread."""
    args, seen = lc.Args(batch_size=200), []
    monkeypatch.setattr(common, "train", lambda clip, batch, *_, **more: seen.append(batch(0)))
    rows = np.array([1, 3])
    tokens = torch.tensor([[9, 9], [1, 2], [8, 8], [3, 4]])
    means = torch.arange(4.0)[:, None, None, None].expand(4, 4, 8, 8)
    lc.train_clip(None, args, None, None, 0, rows, tokens, means)
    lc.train_clip(None, args, None, None, 0, rows, tokens, means, torch.full_like(means, 0.1))
    plain, drawn = seen
    picks = plain["images"][:, 0, 0, 0]
    assert set(picks.tolist()) == {1, 3} and torch.equal(plain["idx"], tokens[picks.long()])
    assert ((plain["ids"][:, None] == plain["ids"]) == (picks[:, None] == picks)).all()
    assert (drawn["images"] - plain["images"]).std().item() == pytest.approx(0.1, rel=0.05)


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


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    env = common.Env(torch.device("cpu"), torch.float32, rank=0, world=2)
    monkeypatch.setattr(common, "setup", lambda args: env)
    with pytest.raises(SystemExit) as stop:
        lc.main(["--preset", "smoke", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, match",
    [
        ("--batch-size 1", "batch-size 1, allowed: 2"),
        ("--images 7", "images 7, allowed: 8"),
        ("--iters 0", "iters 0, allowed: 1"),
        ("--micro-batch 4", "micro-batch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lc.main(["--preset", "smoke", "--out", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and re.search(match, error[0])


# --------------------------------------------------------------------- the docs' program, full size


class Pipe:
    """What the program needs of a diffusers pipeline; the UNet leaves .2 of the noise."""

    device = torch.device("cpu")
    vae = lc.VAE()

    @classmethod
    def from_pretrained(cls, name):
        pipe = cls()
        pipe.unet = torch.nn.Linear(1, 1)
        pipe.unet.forward = pipe.predict
        return pipe

    def to(self, device):
        return self

    def encode_prompt(self, prompt, do_classifier_free_guidance):
        assert prompt == "a red cube"
        return torch.zeros(1, 77, 8), None, torch.zeros(1, 8), None

    def predict(self, x, t, encoder_hidden_states, added_cond_kwargs):
        assert t == 999 and set(added_cond_kwargs) == {"text_embeds", "time_ids"}
        assert x.std().item() == pytest.approx(1, abs=0.05)  # what the UNet reads has spread 1
        return ((x * 214.58**0.5 - 0.2 * x) / 14.614641,)

    def tokenizer(self, prompt, truncation, max_length, return_tensors):
        return types.SimpleNamespace(input_ids=torch.tensor([[25, 3, 4, 26]]))


def test_the_docs_program_for_released_weights(tmp_path, monkeypatch):
    from PIL import Image

    page = Path(lc.__file__).with_name("docs") / "latent_clip.md"
    program = textwrap.dedent(re.search(r"    import sys\n(?:    .*\n|\n)+", page.read_text())[0])
    assert program.count("requires_grad_(False)") == 3
    config = replace(lc.TOY, side=64, patch=8, context=77)
    weights = {"module.vae_model.x": torch.zeros(1)}  # to be left out
    torch.manual_seed(0)
    for name, value in lc.CLIP(config).state_dict().items():
        weights["module." + name.replace("visual.", "visual.latent_vit.")] = value
    save_file(weights, tmp_path / "latent_clip.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lc, "CLIPConfig", lambda *sizes: config)  # small in place of B/8
    monkeypatch.setattr(lc, "VAE", lambda widths, layers, groups: type(Pipe.vae)())
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionXLPipeline = Pipe
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setattr(sys, "argv", ["prompt.py", "a red cube"])
    names = {}
    exec(program, names)
    first, last = (names["reward"](z).item() for z in (names["best"][0], names["best"][-1]))
    assert last > first + 0.01  # the reward has been climbed
    pictures = [Image.open(f"{when}.png") for when in ("before", "after")]
    assert pictures[0].size == (256, 256) and pictures[0].tobytes() != pictures[1].tobytes()
