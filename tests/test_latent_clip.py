"""Tests of latent_clip.py: values from the spec by hand, brute force against the fast path, peers where installed."""

import importlib.util
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import bench
import legacy as common
import data
import latent_clip as lc

CPU = common.Env(torch.device("cpu"), torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ InfoNCE


def test_info_nce_by_hand():
    eye = torch.eye(2)
    assert lc.info_nce(eye, eye, 1.0).item() == pytest.approx(0.3132617, abs=1e-6)
    image, text = torch.tensor([[6.0, 2.0], [1.0, 8.0]]), eye  # logits [[6, 2], [1, 8]]
    assert lc.info_nce(image, text, 1.0).item() == pytest.approx(0.0070631, abs=1e-6)  # rows .0095307, columns .0045955
    with pytest.raises(ValueError, match="at least 2 pairs"):
        lc.info_nce(eye[:1], eye[:1], 1.0)


def test_info_nce_permutation_and_repeated_captions():
    image, text = (F.normalize(torch.randn(6, 5, generator=generator(s)), dim=1) for s in (0, 1))
    order, loss = torch.randperm(6, generator=generator(2)), lc.info_nce(image, text, 7.0)
    torch.testing.assert_close(lc.info_nce(image[order], text[order], 7.0), loss)
    torch.testing.assert_close(lc.info_nce(image, text, 7.0, torch.arange(6)), loss)
    ids = torch.tensor([0, 1, 0, 2, 3, 4])
    expected = 0.0
    for logits in 7 * image @ text.T, 7 * text @ image.T:
        for i in range(6):
            kept = [j for j in range(6) if j == i or ids[j] != ids[i]]
            expected -= logits[i][kept].log_softmax(0)[kept.index(i)] / 12
    torch.testing.assert_close(lc.info_nce(image, text, 7.0, ids), expected)


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
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        grads = manager.dict()
        mp.spawn(nce_rank, (str(tmp_path), grads), nprocs=2)
        split = torch.cat([grads[0], grads[1]], 1)
    image, text = (torch.randn(8, 3, dtype=torch.float64, generator=generator(s)).requires_grad_() for s in (0, 1))
    features, ids = [F.normalize(x, dim=1) for x in (image, text)], torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
    lc.info_nce(*features, 10.0, ids).backward()
    assert (split - torch.stack((image.grad, text.grad))).abs().max() < 1e-12
    cut = [F.normalize(x.detach(), dim=1) for x in (image, text)]  # the other rank's features without gradient
    a = image.detach()[:4].requires_grad_()
    logits = 10 * F.normalize(a, dim=1) @ cut[1].T, 10 * cut[1][:4] @ torch.cat((F.normalize(a, dim=1), cut[0][4:])).T
    (sum(F.cross_entropy(l, torch.arange(4)) for l in logits) / 4).backward()
    assert (a.grad - image.grad[:4]).abs().max() > 1e-3  # what the test must tell apart


# --------------------------------------------------------------------------------------------------------------- CLIP


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_the_released_models():
    with torch.device("meta"):
        b8, b4 = lc.CLIP(lc.CONFIGS["b8"]), lc.CLIP(lc.CONFIGS["b4plus"])
        base = {**lc.BASE, "side": 224}
        b32 = lc.CLIP(lc.CLIPConfig(patch=32, channels=3, embed=512, text_width=512, text_heads=8, **base))
        b16 = lc.CLIP(lc.CLIPConfig(patch=16, channels=3, embed=512, text_width=512, text_heads=8, **base))
        vae = lc.VAE(lc.SD)
    assert count(b8) == 149_126_145 and count(b8.visual) == 85_698_048 and len(b8.state_dict()) == 302
    assert count(b4) == 176_959_873 and count(b4.visual) == 85_796_352
    assert count(b32) == 151_277_313 and count(b16) == 149_620_737
    assert count(vae) == 83_653_863 and len(vae.state_dict()) == 248
    assert count(vae.encoder) == 34_163_592 and len(vae.encoder.state_dict()) == 106
    assert count(vae.decoder) == 49_490_179 and len(vae.decoder.state_dict()) == 138
    assert count(lc.VAE(lc.VAEConfig())) == 242_327
    assert b8.logit_scale.shape == () and vae.quant_conv.weight.shape == (8, 8, 1, 1)


def tiny(channels=4, **more):
    torch.manual_seed(0)
    return lc.CLIP(lc.CLIPConfig(channels=channels, width=24, layers=2, text_width=24, embed=8, **more)).eval()


@torch.no_grad()
def test_trimmed_text_is_exact():
    clip = tiny()
    tokens = lc.toy_tokens(["a red circle", "two blue rings", "there is a big green cross in the top left"])
    for rows in tokens, tokens[:2]:
        assert lc.trim(rows).shape[1] < 16
        assert (clip.encode_text(lc.trim(rows)) - clip.encode_text(rows)).abs().max() < 1e-5
    other = tokens.clone()
    other[0, 6:] = 3  # whatever stands after the end
    assert (clip.encode_text(other) - clip.encode_text(tokens)).abs().max() < 1e-5


@torch.no_grad()
def test_latents_that_do_not_fit():
    clip, z = tiny(), torch.randn(2, 4, 8, 8, generator=generator())
    with pytest.raises(ValueError, match=r"channels-first \(B, 4, H, W\)"):
        clip.encode_image(z.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="8 x 8"):
        clip.encode_image(torch.zeros(1, 4, 12, 12))
    torch.testing.assert_close(
        clip.encode_image(z.repeat_interleave(2, 2).repeat_interleave(2, 3)), clip.encode_image(z)
    )
    torch.testing.assert_close(clip.encode_image(z).norm(dim=1), torch.ones(2))


def test_logit_scale_is_clamped_and_decay_is_openclips():
    clip = tiny()
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    clip(lc.toy_tokens(["a red circle", "a blue ring"]), torch.randn(2, 4, 8, 8)).backward()
    assert clip.logit_scale.item() == pytest.approx(4.605170)
    decay, plain = lc.clip_optimizer(clip, lc.Args()).param_groups
    names = {id(p): n for n, p in clip.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    assert decay["weight_decay"] == 0.2 and plain["weight_decay"] == 0 and plain["betas"] == (0.9, 0.98)
    assert {"visual.conv1.weight", "visual.proj", "token_embedding.weight", "positional_embedding"} <= decayed
    assert not any(n.endswith("bias") or "ln_" in n or n == "logit_scale" for n in decayed)
    assert len(decayed) + len(plain["params"]) == len(names)


def test_class_weights_average_templates():
    clip, templates = tiny(), ("{}", "there is {}")
    names = ["a red circle", "a blue ring"]
    w = lc.class_weights(clip, lc.toy_tokens, names, templates)
    with torch.no_grad():
        both = clip.encode_text(lc.toy_tokens([t.format(names[1]) for t in templates])).sum(0)
    torch.testing.assert_close(w[1], both / both.norm())


def test_positions_are_resized():
    positions = torch.randn(50, 6, generator=generator())
    new = lc.resize_positions(positions, 65)
    grid = F.interpolate(positions[1:].view(1, 7, 7, 6).permute(0, 3, 1, 2), (8, 8), mode="bicubic", antialias=True)
    assert torch.equal(new[0], positions[0])
    torch.testing.assert_close(new[1:], grid.permute(0, 2, 3, 1).reshape(64, 6))
    torch.testing.assert_close(lc.resize_positions(positions, 50), positions)


# ---------------------------------------------------------------------------------------------------------------- VAE


def test_resampling_by_hand():
    down, up = lc.Resample(1, True), lc.Resample(1, False)
    with torch.no_grad():
        down.conv.weight.fill_(1.0), down.conv.bias.zero_()
        up.conv.weight.zero_(), up.conv.bias.zero_()
        up.conv.weight[0, 0, 1, 1] = 1.0
        assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]  # symmetric padding: [[4, 6], [6, 9]]
        x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
        assert up(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@torch.no_grad()
def test_vae_shapes_and_kl():
    vae = lc.VAE(lc.VAEConfig())
    mean, logvar = vae.moments(torch.zeros(2, 3, 32, 32))
    assert mean.shape == logvar.shape == (2, 4, 8, 8) and vae.decode(mean).shape == (2, 3, 32, 32)
    sd = lc.VAE(lc.VAEConfig((8, 8, 8, 8), 2, 4))
    assert sd.moments(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="image of 30 x 32"):
        vae.moments(torch.zeros(1, 3, 30, 32))
    assert lc.kl(torch.ones(4), torch.zeros(4)).sum() == 2.0


# -------------------------------------------------------------------------------------------------------- real weights


def save(path, state):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return str(path)


def test_clip_weights_round_trip_by_every_name(tmp_path):
    clip = tiny()
    state = clip.state_dict()
    path = save(tmp_path / "a.safetensors", state)
    for k, v in lc.load_clip(path, clip.config).state_dict().items():
        assert torch.equal(v, state[k])
    theirs = {"module." + k.replace("visual.", "visual.latent_vit."): v for k, v in state.items()}
    theirs["module.visual.vae_encoder.conv_in.weight"] = torch.zeros(3)
    training = {"epoch": 34, "loss": np.float64(1.5), "n": np.int64(3), "state_dict": theirs}
    torch.save(training, tmp_path / "epoch_34.pt")  # with NumPy numbers in it
    again = lc.load_clip(str(tmp_path / "epoch_34.pt"), clip.config)
    assert torch.equal(again.visual.proj, clip.visual.proj) and not any(p.requires_grad for p in again.parameters())
    del state["visual.proj"]
    with pytest.raises(ValueError, match="visual.proj is missing"):
        lc.load_clip(save(tmp_path / "b.safetensors", state), clip.config)
    with pytest.raises(ValueError, match="token_embedding.weight is"):
        lc.load_clip(path, tiny(vocab=50).config)


def test_a_pixel_clip_starts_a_latent_one(tmp_path):
    pixel, config = tiny(channels=3, side=28, patch=4), tiny().config
    clip = lc.load_clip(save(tmp_path / "p.safetensors", pixel.state_dict()), config)
    assert clip.visual.conv1.weight.shape[1] == 4 and clip.visual.positional_embedding.shape[0] == 17
    assert torch.equal(clip.visual.proj, pixel.visual.proj)


def test_old_names_of_the_vae(tmp_path):
    config = lc.VAEConfig((8, 8), 1, 4)
    state = lc.VAE(config).state_dict()
    old, names = {}, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for k, v in state.items():
        new = next((k.replace(a, b) for a, b in names.items() if f".{a}." in k), k)
        old[new] = v[:, :, None, None] if new != k and v.dim() == 2 else v
    assert sum("query" in k for k in old) == 4
    for k, v in lc.load_vae(save(tmp_path / "v.safetensors", old), config).state_dict().items():
        assert torch.equal(v, state[k])


def test_damaged_weights(tmp_path):
    path = save(tmp_path / "v.safetensors", lc.VAE(lc.VAEConfig((8, 8), 1, 4)).state_dict())
    (tmp_path / "cut.safetensors").write_bytes(open(path, "rb").read()[:-10])
    with pytest.raises(OSError, match="allowed: a whole safetensors"):
        lc.load_vae(str(tmp_path / "cut.safetensors"))
    with pytest.raises(ValueError, match="does not fit: .* missing"):
        lc.load_vae(path)
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="x.pt"):
        lc.load_clip(str(tmp_path / "x.pt"), tiny().config)


# --------------------------------------------------------------------------------------------------------------- peers


@torch.no_grad()
def test_vae_is_that_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    sizes |= dict(block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4, latent_channels=4)
    theirs = diffusers.AutoencoderKL(**sizes).eval()
    theirs.save_pretrained(tmp_path)
    ours = lc.load_vae(str(tmp_path / "diffusion_pytorch_model.safetensors"), lc.VAEConfig((8, 16, 16, 16), 2, 4))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    dist, (mean, logvar) = theirs.encode(x).latent_dist, ours.moments(x)
    torch.testing.assert_close(mean, dist.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, dist.logvar, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clip_is_that_of_open_clip(tmp_path):
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    model, ours = bench.open_clip_model(), tiny()
    vision = model.CLIPVisionCfg(layers=2, width=24, head_width=6, patch_size=8, image_size=32)
    theirs = model.CLIP(
        8, vision, model.CLIPTextCfg(context_length=16, vocab_size=39, width=24, heads=4, layers=2)
    ).eval()
    config = lc.replace(ours.config, channels=3, side=32, patch=8)
    ours = lc.load_clip(save(tmp_path / "open_clip_model.safetensors", theirs.state_dict()), config)
    x, tokens = torch.randn(3, 3, 32, 32), lc.toy_tokens(["a red circle", "two blue rings", "a warm cross"])
    for a, b in (ours.encode_image(x), theirs.encode_image(x)), (ours.encode_text(tokens), theirs.encode_text(tokens)):
        torch.testing.assert_close(a, F.normalize(b, dim=-1), atol=1e-5, rtol=1e-4)


def clip_tokenizer(path):
    """A tokenizer.json in CLIP's manner: byte BPE with </w>, the two special tokens last."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec, merges = importlib.util.find_spec("open_clip"), []
    if spec:
        import gzip
        from pathlib import Path

        lines = gzip.open(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in alphabet] + [chr(256 + n) for n in range(256 - len(alphabet))]
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tok = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tok.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    parts = [
        pre_tokenizers.Split(split, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    tok.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tok.save(str(path))
    return str(path), bool(merges)


def test_tokens_of_captions(tmp_path):
    path, real = clip_tokenizer(tmp_path / "tokenizer.json")
    tok = data.get_tokenizer(path)
    ids = lc.clip_tokens(tok, ["a photo of a cat", "A red dog  and a green cat", "word " * 100])
    start, end = tok.n_vocab - 2, tok.n_vocab - 1
    assert ids.shape == (3, 77) and (ids[:, 0] == start).all() and ids[2, 76] == end and (ids[2] == end).sum() == 1
    assert ids[:, 1:].argmax(1).tolist()[2] == 75 and (ids[0, ids[0].argmax() + 1 :] == 0).all()
    if real:
        assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert ids[1, :9].tolist() == [49406, 320, 736, 1929, 537, 320, 1901, 2368, 49407]


# --------------------------------------------------------------------------------------------------------------- cache


def pairs(n):
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    return list(zip(images, [f"a {c} circle" for c in np.resize(lc.COLOURS, n)]))


def test_cache_resumes_and_refuses_other_latents(tmp_path):
    torch.manual_seed(0)
    vae = lc.VAE(lc.VAEConfig((8, 8), 1, 4)).eval()
    x = lc.to_pixels(torch.stack([image for image, _ in pairs(150)]))
    with torch.no_grad():
        z = vae.moments(x)[0]
    scale = 1 / z.std().item()
    run = lambda folder, n: lc.encode(folder, iter(pairs(n)), 1000, lc.toy_tokens, vae, scale, CPU)
    run(tmp_path / "a", 150)
    latents, tokens, s = lc.open_cache(tmp_path / "a", vae)
    assert latents.shape == (150, 4, 4, 4) and tokens.shape == (150, 16) and s == scale
    torch.testing.assert_close(torch.from_numpy(latents.astype(np.float32)), z, atol=2e-3, rtol=2e-3)
    run(tmp_path / "b", 64)
    with open(tmp_path / "b" / "latents.f16", "ab") as f:
        f.write(b"half a batch")
    run(tmp_path / "b", 150)
    for name in "latents.f16", "tokens.u16":
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    lc.encode(tmp_path / "b", iter(pairs(150)[70:]), 1000, lc.toy_tokens, vae, scale, CPU, "another source")
    assert len(lc.open_cache(tmp_path / "b", vae)[0]) == 80  # begun anew

    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    for change, match in (
        ({"scaled": True}, "scaled"),
        ({"vae": 1}, "of another VAE"),
        ({"scale": scale / 7.7}, "the spread"),
    ):
        (tmp_path / "a" / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=match):
            lc.open_cache(tmp_path / "a", vae)
    with pytest.raises(ValueError, match="no pictures"):
        run(tmp_path / "c", 0)
    with torch.no_grad():
        vae.quant_conv.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        run(tmp_path / "d", 3)


# ---------------------------------------------------------------------------------------------------------------- ReNO


def test_regulariser_by_hand():
    for d, n, slope in (16384, 128.0, 7.8125e-5), (256, 20.0, 0.0725), (256, 255**0.5, 0.0):
        noise = torch.zeros(1, d, dtype=torch.float32)
        noise[0, 0] = n
        noise.requires_grad_()
        (0.01 * lc.norm_loss(noise)).sum().backward()
        assert noise.grad[0, 0].item() == pytest.approx(slope, abs=2e-7)


def test_momentum_by_hand():
    """Constant gradient .1, lr 5, momentum .9, Nesterov: positions -.95, -2.305, -4.0245, -6.072."""
    found = lc.reno(lambda e: e, lambda z: -0.1 * z[:, 0], torch.full((1, 1), 20.0), 5, lr=5.0, clip=9.0, reg=0.0)
    assert (20 - found.norms[1:, 0]).tolist() == pytest.approx([0.95, 2.305, 4.0245, 6.072], abs=1e-3)
    assert found.best.item() == pytest.approx(20 - 6.072, abs=1e-3)


def test_reno_of_a_batch_is_reno_of_each():
    torch.manual_seed(0)
    W, text = torch.randn(12, 12) / 3, torch.randn(5, 12)
    noise = torch.randn(5, 12)
    generate = lambda e: torch.tanh(e @ W)
    reward = lambda text: lambda z: F.cosine_similarity(z, text)
    together = lc.reno(generate, reward(text), noise, 12, 1.0)
    for i in range(5):
        alone = lc.reno(generate, reward(text[i : i + 1]), noise[i : i + 1], 12, 1.0)
        assert (alone.best - together.best[i]).abs().max() < 1e-5 and (
            alone.rewards - together.rewards[:, i : i + 1]
        ).abs().max() < 1e-5
    assert (together.rewards.diff(dim=0) >= 0).all() and torch.equal(together.rewards[-1], together.reward)
    torch.testing.assert_close(together.latents[0], generate(noise))
    assert (together.reward > together.rewards[0]).all()
    worse = lc.reno(
        generate, lambda z: reward(text)(z) if torch.equal(z, generate(noise)) else z[:, 0] * 0 - 9, noise, 4
    )
    torch.testing.assert_close(worse.best, generate(noise))  # the first evaluation counts
    torch.testing.assert_close(lc.reno(generate, reward(text), noise, 6, climb=False).rewards[0], together.rewards[0])


def test_reno_is_sgd_of_torch():
    """Against torch.optim.SGD and clip_grad_norm_, one row."""
    torch.manual_seed(1)
    W, noise, lr = torch.randn(9, 9), torch.randn(1, 9), 0.7
    reward = lambda z: (z @ W).sin().sum(1)
    found = lc.reno(lambda e: e, reward, noise, 7, lr)
    p = noise.clone().requires_grad_()
    sgd, norms = torch.optim.SGD([p], lr, 0.9, nesterov=True), []
    for _ in range(7):
        norms.append(p.norm().item())
        sgd.zero_grad()
        (0.01 * lc.norm_loss(p) - reward(p)).sum().backward()
        torch.nn.utils.clip_grad_norm_([p], 0.1)
        sgd.step()
    assert found.norms[:, 0].tolist() == pytest.approx(norms, abs=1e-4)


def test_latent_reward_never_decodes_and_pixel_reward_always():
    calls, vae = [], lc.VAE(lc.VAEConfig()).requires_grad_(False)
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    latent, pixel = tiny().requires_grad_(False), tiny(channels=3, side=32, patch=8).requires_grad_(False)
    text, noise = F.normalize(torch.randn(2, 8), dim=1), torch.randn(2, 4, 8, 8)
    found = lc.reno(lambda e: e, lc.latent_reward(latent, 0.5, text), noise, 5)
    with torch.no_grad():
        vae.decode(found.best / 0.5)
        torch.testing.assert_close(found.rewards[0], (latent.encode_image(noise / 0.5) * text).sum(1))
    assert len(calls) == 1
    lc.reno(lambda e: e, lc.pixel_reward(pixel, vae, 0.5, text), noise, 5)
    assert len(calls) == 1 + 5


def test_not_finite_rewards_stop():
    with pytest.raises(ValueError, match="not finite at evaluation 0"):
        lc.reno(lambda e: e, lambda z: z[:, 0] * math.nan, torch.zeros(1, 2))


def test_safety_by_hand():
    image, prompt = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    concept = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    reward = lambda z: (z * lc.away(prompt, concept)).sum(1)
    torch.testing.assert_close(reward(image), torch.tensor([0.6 - 0.8, 0.8 - 0.0]))
    both = torch.stack(((image * prompt).sum(1), image @ concept[0]), 1)
    torch.testing.assert_close(lc.classifier(reward)(image), (100 * both).log_softmax(1)[:, 0])


def test_one_step_of_turbo():
    assert lc.SIGMA == pytest.approx(14.614641, abs=1e-4)
    x0, noise = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 4, 8, 8, generator=generator(1))
    seen = []

    def unet(x, t):  # knows the noise of x_T = x0 + sigma * noise'
        seen.append((x, t))
        return noise - x0 / lc.SIGMA

    torch.testing.assert_close(lc.one_step(unet)(noise), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[0][0], noise * lc.SIGMA / math.sqrt(lc.SIGMA**2 + 1))
    assert seen[0][1] == 999


# ----------------------------------------------------------------------------------------------------------------- toy


def test_areas_and_determinism():
    at = torch.tensor([16.0])
    areas = {s: lc.coverage(s, at, at, torch.tensor([6.0])).sum().item() for s in lc.SHAPES}
    for shape, area in {"circle": 112.8, "square": 117.6, "ring": 81.1, "cross": 79.3}.items():
        assert areas[shape] == pytest.approx(area, rel=0.015)
    a, b, c = lc.pictures(40, 7), lc.pictures(40, 7), lc.pictures(40, 8)
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and not torch.equal(a[0], c[0])


@pytest.fixture(scope="module")
def world():
    return lc.World(lc.Args(images=400), 3)


def test_held_out_pairs_are_never_seen(world):
    assert lc.HELD.sum() == 10 and lc.HELD.any(0).all() and lc.HELD.any(1).all() and not lc.HELD.all(1).any()
    held = {f"{lc.COLOURS[c]} {lc.SHAPES[s]}" for s, c in lc.HELD.nonzero().tolist()}
    held |= {f"{lc.COLOURS[c]} {lc.PLURAL[lc.SHAPES[s]]}" for s, c in lc.HELD.nonzero().tolist()}
    for row in world.rows:
        assert not any(re.search(rf"\b{pair}\b", world.texts[row]) for pair in held)
        assert not any(lc.HELD[s, c] for s, c in zip(world.shape[row], world.colour[row]) if s >= 0)
    assert 0.4 < len(world.rows) / 400 < 0.75 and len(world.test) > 15


def test_captions_tell_the_truth(world):
    words = {w for t in world.texts for w in t.split()}
    assert words <= set(lc.WORDS) and max(len(t.split()) for t in world.plain) <= lc.FLOW.context
    tokens = lc.toy_tokens(world.texts)
    assert (tokens.max(1).values == len(lc.WORDS) - 1).all() and len(lc.WORDS) == lc.CLIPConfig().vocab
    objects = lc.see(world.images)
    for text, seen in zip(world.plain, objects):
        if " left of " in text or " above " in text:
            first, second = re.split(" left of | above ", text)
            places = [
                [o for o in seen if part == f"a {lc.COLOURS[o[0]]} {lc.SHAPES[o[1]]}"] for part in (first, second)
            ]
            axis = 2 if " left of " in text else 3
            assert any(a[axis] < b[axis] for a in places[0] for b in places[1])
        if text.split()[0] in ("two", "three"):
            assert len(seen) == ["two", "three"].index(text.split()[0]) + 2 and len({o[:2] for o in seen}) == 1


def test_the_judge(world):
    objects = lc.see(world.images)
    truth = [sorted((c, s) for c, s in zip(*p) if s >= 0) for p in zip(world.colour.tolist(), world.shape.tolist())]
    assert np.mean([sorted(o[:2] for o in seen) == t for seen, t in zip(objects, truth)]) >= 0.98
    empty = torch.full((1, 3, 32, 32), lc.DARK)
    assert lc.see(empty) == [[]]
    cover = [lc.coverage("square", torch.tensor([x]), torch.tensor([16.0]), torch.tensor([5.0])) for x in (11.5, 20.5)]
    for share, c in zip(cover, (0, 5)):  # touching, of two colours
        empty += share[:, None] * (lc.RGB[c][None, :, None, None] - empty)
    assert [o[:2] for o in lc.see(empty)[0]] == [(0, 1), (5, 1)]


def test_what_fulfils_a_prompt():
    red_circle, blue_ring = (0, 0, 8.0, 8.0), (5, 4, 24.0, 8.0)
    ask = lambda kind, wants, how=None: ("", kind, wants, how)
    assert lc.fulfils(ask("single", [(3, 0)]), [red_circle]) and not lc.fulfils(ask("colours", [(3, 0)]), [red_circle])
    assert lc.fulfils(ask("two", [(1, 0), (1, 4)]), [red_circle, blue_ring])
    assert not lc.fulfils(ask("attribution", [(5, 0), (0, 4)]), [red_circle, blue_ring])
    assert lc.fulfils(ask("attribution", [(0, 0), (5, 4)]), [red_circle, blue_ring])
    assert lc.fulfils(ask("position", [(0, 0), (5, 4)], "left of"), [red_circle, blue_ring])
    assert not lc.fulfils(ask("position", [(5, 4), (0, 0)], "left of"), [red_circle, blue_ring])
    assert not lc.fulfils(ask("position", [(0, 0), (5, 4)], "above"), [red_circle, blue_ring])
    assert lc.fulfils(ask("counting", [(0, 0)], 2), [red_circle] * 2)
    assert not lc.fulfils(ask("counting", [(0, 0)], 2), [red_circle] * 3)
    prompts = lc.make_prompts(60, np.random.default_rng(0))
    assert {p[1] for p in prompts} == set(lc.KINDS) and {w for p in prompts for w in p[0].split()} <= set(lc.WORDS)


def test_euler_follows_a_straight_path():
    flow = lc.Flow(lc.FLOW)
    target, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []

    def velocity(x, t, words):  # of the path to one target
        times.append(t[0].item())
        return (target - x) / (1 - t)[:, None, None, None]

    flow.velocity = velocity
    for steps in 1, 3:
        torch.testing.assert_close(flow.generate(noise, None, steps), target, atol=1e-4, rtol=1e-4)
    assert times == pytest.approx([0, 0, 1 / 9, 4 / 9])
    torch.testing.assert_close(flow.generate(0.66 * noise + 0.34 * target, None, 4, 0.34), target, atol=1e-4, rtol=1e-4)


def test_interval_of_the_bootstrap():
    mean, low, high = common.interval([1, 0] * 50)
    assert mean == 0.5 and low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)


# -------------------------------------------------------------------------------------------------------------- script


def test_smoke_writes_what_is_promised(tmp_path):
    result = lc.main(["--preset", "smoke", "--threads", "1", "--out", str(tmp_path), "--seeds", "3"])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [c["id"] for c in result["claims"]] == ["T0", "T1", "T2", "T3", "T4", "T5"]
    for c in result["claims"]:
        assert c["measured"] and c["control"] and isinstance(c["holds"], bool) and isinstance(c["control_fails"], bool)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["run"] for r in rows} == {f"{arm}-s3" for arm in ("vae", "flow", "latent", "pixel", "shuffled")}
    assert all({"run", "step", "seconds", "tokens_per_s"} <= r.keys() for r in rows)
    assert (tmp_path / "latent_clip.png").stat().st_size > 10000
    losses = {r["run"]: r["loss"] for r in rows if r["step"] == 0}
    assert losses["latent-s3"] != losses["shuffled-s3"]
    for arm in "vae", "flow", "latent":
        saved = common.load_checkpoint(tmp_path / f"{arm}-s3.pt")
        assert saved["step"] == 2


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Random weights and pictures in the real formats: a small VAE, a tokenizer, a folder of images with captions."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    torch.manual_seed(0)
    vae = lc.VAE(lc.VAEConfig((8, 8, 8, 8), 1, 4)).eval()
    save(folder / "vae.safetensors", vae.state_dict())
    clip_tokenizer(folder / "tokenizer.json")
    (folder / "pairs").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)).save(folder / "pairs" / f"{i:02}.png")
        (folder / "pairs" / f"{i:02}.txt").write_text(["cat", "dog"][i % 2] + "\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    with torch.no_grad():
        x = torch.stack([image for image, _ in lc.real_pairs(str(folder / "pairs"), 64)])
        scale = 1 / vae.moments(lc.to_pixels(x))[0].std().item()
    flags = [
        "--preset",
        "smoke",
        "--threads",
        "1",
        "--dataset",
        f"{folder}/pairs",
        "--vae",
        f"{folder}/vae.safetensors",
    ]
    return folder, [*flags, "--tokenizer", f"{folder}/tokenizer.json", "--vae-scale", str(scale)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lc, "SD", lc.VAEConfig((8, 8, 8, 8), 1, 4))
    monkeypatch.setattr(lc.load_vae, "__defaults__", (lc.SD,))


def test_real_pairs_end_to_end(stand_ins, small, tmp_path):
    folder, flags = stand_ins
    result = lc.main([*flags, "--out", str(tmp_path), "--classes", str(folder / "classes.txt")])
    assert [c["id"] for c in result["claims"]] == ["R1"] and result["metrics"]["zero-shot"]["n"] == 3
    assert (tmp_path / "latents" / "latents.f16").stat().st_size == 30 * 4 * 8 * 8 * 2
    clip = tmp_path / "latent.pt"  # and what was trained can be measured again
    again = lc.main([*flags, "--out", str(tmp_path / "b"), "--init", str(clip), "--steps", "0"])
    assert again["claims"][0]["measured"] == result["claims"][0]["measured"]


@pytest.mark.parametrize(
    "change, match",
    [
        ("--dataset EMPTY", "no images"),
        ("--dataset ODD", "without a partner: b"),
        ("--dataset CORRUPT", "a.png is no readable image"),
        ("--vae /no/such.safetensors", "no_such|can't be read"),
        ("--vae-scale 0.001", "times the spread"),
        ("--tokenizer /no/such.json", "no tokenizer.json"),
        ("--init VAE", "does not fit"),
        ("--arch b16", "b4plus"),
        ("--images some", "images"),
        ("--device cuda:77", "which has"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(change, match, stand_ins, small, tmp_path, capsys):
    folder, flags = stand_ins
    for name in "EMPTY", "ODD", "CORRUPT":
        (tmp_path / name).mkdir()
    (tmp_path / "ODD" / "b.png").write_bytes(b"")
    (tmp_path / "CORRUPT" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "CORRUPT" / "a.txt").write_text("a")
    change = re.sub("EMPTY|ODD|CORRUPT", lambda m: str(tmp_path / m[0]), change).replace(
        "VAE", f"{folder}/vae.safetensors"
    )
    with pytest.raises(SystemExit) as stop:
        lc.main([*flags, "--out", str(tmp_path / "out"), *change.split()])
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ") and re.search(match, error[-1])
