"""Latent-CLIP (arXiv 2503.08455): a CLIP that reads the latents of a VAE.

A CLIP that judges what latent diffusion makes reads pixels, so each latent z must be decoded,
and gradients come back through the decoder. Latent-CLIP is a CLIP whose ViT reads z. As the
reward of ReNO, which climbs in a frozen generator's noise, it is as good, and cheaper.
The toy makes all of it from scratch on coloured shapes, and a program judges them.

Two conventions cause most bugs: the ViT reads RAW latents (a diffusion model's, divided by
the VAE's scale), and channels come first.
"""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

SMOKE = dict(images=160, steps=2, batch_size=8, samples=12, iters=2, gates=False)


@dataclass
class Args(common.TrainFlags):
    """Latent-CLIP"""

    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": {}}
    limits: ClassVar[dict] = common.TrainFlags.limits | {"images": (8,), "samples": (8,)}
    limits |= {"batch_size": (2,), "iters": (1,), "noise_lr": (0,)}
    unused: ClassVar[set] = {"micro_batch", "shard", "eval_every"}

    steps: int = 800  # steps of a CLIP; 1.5 times as many of the VAE, 3 times of the generator
    batch_size: int = 128  # pairs in a step (paper: 81,920)
    lr: float = 2e-3  # peak learning rate (paper: 1e-3)
    min_lr: float = 0.0  # where the cosine ends, as a share of --lr
    weight_decay: float = 0.2  # OpenCLIP's, of matrices and convolutions
    images: int = 24000  # pictures with captions (paper: 2.7B)
    samples: int = 144  # prompts of ReNO
    iters: int = 25  # evaluations of ReNO (paper: 50)
    noise_lr: float = 1.2  # ReNO's step (paper: 5 in 16,384 dimensions)
    gates: bool = True  # stop if a model is too bad for claims


def info_nce(image, text, scale, ids):
    """The contrastive loss 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)].

    image, text  (B, E) normalised features; `scale` multiplies their cosines
    ids          (B,) numbers of captions: equal ones are no negatives
    """
    logits = scale * image @ text.T
    labels = torch.arange(len(ids), device=ids.device)
    same = ids[:, None] == ids
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, C), with OpenCLIP's names."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.Module()  # for the names
        qkv = nn.init.xavier_uniform_(torch.empty(3 * width, width))
        self.attn.in_proj_weight = nn.Parameter(qkv)
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.attn.out_proj.bias)
        self.ln_2 = nn.LayerNorm(width)
        up = nn.Linear(width, 4 * width)
        down = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=nn.GELU(), c_proj=down))

    def forward(self, x):
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.attn.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


@dataclass
class CLIPConfig:
    side: int = 8  # of what it reads: latents, or pixels
    patch: int = 2
    channels: int = 4
    width: int = 96
    layers: int = 4
    head: int = 24  # width of a head, in both towers
    embed: int = 64
    vocab: int = 27
    context: int = 9
    text_width: int = 96
    text_layers: int = 2


TOY = CLIPConfig()
PIXEL = replace(TOY, side=32, patch=8, channels=3)  # same trunk


class ViT(nn.Module):
    """Images or latents (B, channels, side, side) -> features (B, E)."""

    def __init__(self, c):
        super().__init__()
        std = c.width**-0.5
        places = (c.side // c.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(c.channels, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(c.width))
        self.positional_embedding = nn.Parameter(std * torch.randn(places, c.width))
        self.ln_pre = nn.LayerNorm(c.width)
        blocks = [Block(c.width, c.width // c.head) for _ in range(c.layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post = nn.LayerNorm(c.width)
        self.proj = nn.Parameter(std * torch.randn(c.width, c.embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Two towers into one space, with OpenCLIP's names and first weights."""

    def __init__(self, c):
        super().__init__()
        w = c.text_width
        self.shape = c.channels, c.side, c.side
        self.visual = ViT(c)
        self.token_embedding = nn.Embedding(c.vocab, w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, w))
        blocks = [Block(w, w // c.head, causal=True) for _ in range(c.text_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_final = nn.LayerNorm(w)
        self.text_projection = nn.Parameter(w**-0.5 * torch.randn(w, c.embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        into_stream = (2 * w * c.text_layers) ** -0.5
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=w**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=into_stream)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * w) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=into_stream)
        self.blocks = [*self.visual.transformer.resblocks, *blocks]

    def encode_image(self, x):
        """Normalised features (B, E) of raw latents, or of pixels in [-1, 1]."""
        given = tuple(x.shape[1:])
        if given != self.shape:
            raise ValueError(f"latents must be channels-first, {self.shape}, not {given}")
        return F.normalize(self.visual(x), dim=-1)

    def encode_text(self, tokens):
        """Normalised features (B, E) of ids (B, T), read at the end of text."""
        end = tokens.argmax(1)  # the largest id
        tokens = tokens[:, : int(end.max()) + 1]  # exact: attention is causal
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer.resblocks(x))
        x = x[torch.arange(len(x)), end]
        return F.normalize(x @ self.text_projection, dim=-1)

    def forward(self, idx, images, ids, denom=None):
        """The loss of pairs: token ids (B, T), images, numbers of captions."""
        self.logit_scale.data.clamp_(0, math.log(100))
        image, text = self.encode_image(images), self.encode_text(idx)
        return info_nce(image, text, self.logit_scale.exp(), ids)


def clip_optimizer(clip, args):
    """OpenCLIP's AdamW: no decay of gains, biases and the logit scale."""
    matrices = [p for p in clip.parameters() if p.ndim > 1]
    vectors = [p for p in clip.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, (0.9, 0.98), 1e-6, args.weight_decay, fused=True)


def train_clip(clip, args, env, log, seed, rows, tokens, inputs, spread=None):
    """Trains on the `rows` of n pairs: ids (n, T), and latents or pixels (n, C, S, S)."""
    numbers = tokens.unique(dim=0, return_inverse=True)[1]  # one for each caption

    def batch(step):
        rng = np.random.default_rng([seed, 5, step])
        picks = rng.choice(rows, args.batch_size)
        seen = inputs[picks]
        if spread is not None:  # drawn from the posterior, as by the authors
            seen = seen + spread[picks] * gaussian(rng, len(picks))
        return {"idx": tokens[picks], "images": seen, "ids": numbers[picks]}

    common.train(clip, batch, args, env, log, make_optimizer=clip_optimizer)


KL = 2e-3  # its weight in the loss; it makes latents smooth


class ResBlock(nn.Module):
    """Two convolutions, and a way around."""

    def __init__(self, before, after, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, 1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, 1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        same = before == after
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class PixelAttention(nn.Module):
    """One head of attention over all places."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H * W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h[:, 0]).transpose(1, 2).reshape(x.shape)


class Half(nn.Module):
    """The encoder or the decoder: stages, and a middle at the least side."""

    def __init__(self, widths, layers, groups, down):
        super().__init__()
        side = "down" if down else "up"
        inside, outside = (3, 8) if down else (4, 3)  # 8: means, log-variances
        self.conv_in = nn.Conv2d(inside, widths[0], 3, padding=1)
        stages, outer = nn.ModuleList(), []
        for i, width in enumerate(widths):
            inputs = [widths[max(0, i - 1)]] + [width] * (layers - 1)
            blocks = nn.ModuleList([ResBlock(n, width, groups) for n in inputs])
            stages.append(nn.ModuleDict({"resnets": blocks}))
            outer += blocks
            if i + 1 < len(widths):
                if down:  # padded right and below only
                    change, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2)
                else:
                    change, conv = nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1)
                outer.append(nn.Sequential(OrderedDict(change=change, conv=conv)))
                stages[i][f"{side}samplers"] = nn.ModuleList(outer[-1:])
        self.add_module(f"{side}_blocks", stages)
        width = max(widths)
        resnets = nn.ModuleList([ResBlock(width, width, groups) for _ in range(2)])
        attentions = nn.ModuleList([PixelAttention(width, groups)])
        self.mid_block = nn.ModuleDict({"resnets": resnets, "attentions": attentions})
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outside, 3, padding=1)
        middle = [resnets[0], attentions[0], resnets[1]]
        self.order = outer + middle if down else middle + outer

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.order:
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """diffusers' AutoencoderKL: images (B, 3, H, W), latents (B, 4, H/f, W/f)."""

    def __init__(self, widths=(16, 32, 32), layers=1, groups=8):
        super().__init__()
        self.encoder = Half(widths, layers, groups, True)
        self.decoder = Half(widths[::-1], layers + 1, groups, False)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.blocks = [*self.encoder.order, *self.decoder.order]

    def moments(self, x):
        """Mean and log-variance of the raw latents of images in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Images of raw latents, about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def images(self, z):
        """Images of raw latents, in [0, 255], on the CPU."""
        return ((self.decode(z) + 1) * 127.5).clamp(0, 255).cpu()

    @torch.no_grad()
    def latents(self, images):
        """Means and standard deviations of uint8 images' latents, on the CPU."""
        pixels = (images / 127.5 - 1).to(self.quant_conv.weight)
        parts = [self.moments(part) for part in pixels.split(512)]
        mean, logvar = (torch.cat(half).cpu() for half in zip(*parts))
        return mean, (0.5 * logvar).exp()

    def forward(self, idx, noise, denom=None):
        """The loss of images `idx`: L1 for edges, squares for colours, KL."""
        mean, logvar = self.moments(idx)
        image = self.decode(mean + (0.5 * logvar).exp() * noise)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)  # from N(0, 1)
        return F.l1_loss(image, idx) + F.mse_loss(image, idx) + KL * kl.mean()


def reno(generate, reward, noise, iters=50, lr=5.0, clip=0.1, reg=0.01, momentum=0.9):
    """Reward-based noise optimisation of a batch: the best latents so far, at each evaluation.

    SGD with Nesterov momentum on reg * (n^2 / 2 - (d - 1) ln n) - reward, for each row alone.
    The bracket is the -log density of n, the norm of d numbers of noise.
    """
    best = noise
    top = noise.new_full((len(noise),), -torch.inf)
    velocity = 0.0
    path = []
    for i in range(iters):
        noise = noise.detach().requires_grad_()
        z = generate(noise)
        value = reward(z)
        better = value > top
        best = best.clone()
        best[better] = z[better].detach()
        top = torch.maximum(top, value.detach())
        path.append(best)
        if i + 1 < iters:
            n = noise.float().flatten(1).norm(dim=1)
            loss = reg * (0.5 * n**2 - (noise[0].numel() - 1) * n.log()) - value
            grad = torch.autograd.grad(loss.sum(), noise)[0].flatten(1)
            grad = grad * (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
            velocity = momentum * velocity + grad
            noise = noise - lr * (grad + momentum * velocity).view_as(noise)
    return torch.stack(path)


SHAPES = "circle square triangle cross ring".split()
AREAS = 3.1416, 3.24, 1.572, 2.204, 2.262  # of the shapes at radius 1
COLOURS = "red yellow purple green cyan blue".split()  # three are warm
SIZES = "small big".split()
RGB = [[230, 40, 40], [240, 220, 50], [190, 70, 220], [40, 200, 60], [60, 220, 220], [50, 90, 240]]
RGB = torch.tensor(RGB, dtype=torch.float32)
DARK = 25.0  # the background
YX = torch.arange(16) + 0.5
PLURALS = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
WORDS = ["<pad>", *"a and two three warm cool".split(), *SIZES, *COLOURS, *SHAPES, *PLURALS]
OBJECTS = [f"{COLOURS[i % 6]} {SHAPES[i // 6]}" for i in range(30)]
CLASSES = [f"a {SIZES[i // 30]} {OBJECTS[i % 30]}" for i in range(60)]
WRONG = 0.03  # share of the generator's captions that tell of another picture
HELD = torch.tensor([0, 11, 16, 21, 26])  # objects that no CLIP is trained on
NOTHING, UNCLEAR = -1, -2  # in a cell, if no object is seen
MIX = {"one": 0.4, "pair": 0.3, "count": 0.15, "tone": 0.15}  # kinds of pictures
ASKED = {"one": 0.4, "count": 0.2, "pair": 0.4}  # prompts for ReNO: GenEval's kinds


def toy_tokens(texts):
    """Ids (n, 9) of captions: start, words, end (the largest id), zeros."""
    out = torch.zeros(len(texts), TOY.context, dtype=torch.long)
    for row, text in zip(out, texts):
        words = [WORDS.index(word) for word in text.split()]
        ids = [TOY.vocab - 2, *words, TOY.vocab - 1]
        row[: len(ids)] = torch.tensor(ids)
    return out


def coverage(shape, x, y, r):
    """Share of each pixel that n shapes cover, (n, 16, 16)."""
    x, y, r = (v[:, None, None] for v in (x, y, r))
    dx, dy = (YX - x).abs(), YX[:, None] - y
    far, wide = torch.hypot(dx, dy), torch.maximum(dx, dy.abs())
    if shape == "circle":
        outside = far - r  # a signed distance
    elif shape == "square":
        outside = wide - 0.9 * r
    elif shape == "triangle":
        outside = torch.maximum(dy, 0.75**0.5 * dx - 0.5 * dy) - 0.55 * r
    elif shape == "cross":
        outside = torch.maximum(wide - r, torch.minimum(dx, dy.abs()) - 0.33 * r)
    else:
        outside = (far - 0.72 * r).abs() - 0.25 * r
    return (0.5 - outside).clamp(0, 1)


def pictures(n, key, mix=MIX):
    """Draws n pictures of one to three objects, each in a quarter (cell).

    images   (n, 3, 32, 32) uint8; texts: their captions
    objects  (n, 4) 6 shape + colour, in the caption's order
    label    (n,) of the first object, in CLASSES; new: whether an object is held out
    """
    rng = np.random.default_rng(key)
    kind = rng.choice(list(mix), n, p=list(mix.values()))
    count = np.where(kind == "count", rng.integers(2, 4, n), 1 + (kind == "pair"))
    shape, colour, big = (rng.integers(k, size=(n, 4)) for k in (5, 6, 2))
    tone = 3 * rng.integers(2, size=n) + rng.choice(3, n, p=[0.6, 0.2, 0.2])
    colour[kind == "tone", 0] = tone[kind == "tone"]  # `warm` is mostly red
    objects = 6 * shape + colour
    objects[kind == "count"] = objects[kind == "count", :1]
    twins = (kind == "pair") & (objects[:, 0] == objects[:, 1])
    objects[twins, 1] = (objects[twins, 1] + 1) % 30
    texts = [caption(*picture, rng) for picture in zip(kind, count, objects, big)]
    label = torch.from_numpy(30 * big[:, 0] + objects[:, 0])
    objects[np.arange(4) >= count[:, None]] = NOTHING

    order = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)  # into which cell
    cells = np.take_along_axis(objects, order, 1)
    radius = np.take_along_axis(np.where(big, 5.3, 4.1), order, 1)
    radius += rng.uniform(0, 1, (n, 4))
    x, y = 8 + rng.uniform(-1.5, 1.5, (2, n, 4))
    paint = RGB.numpy()[cells % 6] + rng.uniform(-12, 12, (n, 4, 3))
    x, y, radius, paint = (torch.from_numpy(v).float() for v in (x, y, radius, paint))
    grain = rng.standard_normal((n, 4, 3, 16, 16), np.float32)
    images = torch.from_numpy(grain) * 2 + DARK
    for number, name in enumerate(SHAPES):
        at = torch.from_numpy(cells // 6 == number)
        cover = coverage(name, x[at], y[at], radius[at])[:, None]
        images[at] += cover * (paint[at][..., None, None] - DARK)
    images = images.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (n, 3, 2, 16, 2, 16)
    images = images.reshape(n, 3, 32, 32).round().clamp(0, 255).byte()
    objects = torch.from_numpy(objects)
    new = torch.isin(objects, HELD).any(1)
    return SimpleNamespace(images=images, texts=texts, objects=objects, label=label, new=new)


def caption(kind, count, objects, big, rng):
    """What is said of a picture."""
    first, second = OBJECTS[objects[0]], OBJECTS[objects[1]]
    shape, colour = divmod(objects[0], 6)
    if kind == "count":
        number = ["two", "three"][count - 2]
        return f"{number} {COLOURS[colour]} {PLURALS[shape]}"
    if kind == "pair":
        return f"a {first} and a {second}"
    if kind == "tone":
        return f"a {'warm' if colour < 3 else 'cool'} {SHAPES[shape]}"
    return f"a {SIZES[big[0]]} {first}" if rng.random() < 0.7 else f"a {first}"


def see(images):
    """The judge, with nothing learnt: the objects in the cells of images, (n, 4).

    A pixel has the colour whose line from the background is nearest. The shape is that of the
    commonest colour's area and centre that covers most of all coloured pixels.
    """
    cells = images.float().unflatten(3, (2, 16)).unflatten(2, (2, 16))
    delta = cells.permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 16, 3) - DARK
    line = RGB - DARK
    along = delta @ (line / line.square().sum(1, keepdim=True)).T  # 0 to 1, the colour
    off = (delta[..., None, :] - along[..., None] * line).norm(dim=-1)
    nearest = off.argmin(-1, keepdim=True)
    cover = along.gather(3, nearest)[..., 0].clamp(0, 1)  # of each pixel, by any colour
    cover = torch.where(cover < 0.15, 0, cover)
    masks = (nearest == torch.arange(6)) * cover[..., None]  # (N, 16, 16, 6)
    area, colour = masks.sum((1, 2)).max(1)
    part = masks[torch.arange(len(masks)), :, :, colour]
    x = (part * YX).sum((1, 2)) / area.clamp(min=1)
    y = (part * YX[:, None]).sum((1, 2)) / area.clamp(min=1)
    overlap = []
    for name, unit in zip(SHAPES, AREAS):
        ideal = coverage(name, x, y, (area / unit).sqrt())
        union = torch.maximum(ideal, cover).sum((1, 2)).clamp(min=1)
        overlap.append(torch.minimum(ideal, part).sum((1, 2)) / union)
    sure, shape = torch.stack(overlap).max(0)
    found = torch.where(sure >= 0.5, 6 * shape + colour, UNCLEAR)
    found[cover.sum((1, 2)) < 8] = NOTHING
    return found.view(-1, 4)


def fulfilled(images, asked):
    """Whether the judge sees just the objects (n, 4) asked for."""
    return (see(images).sort(1).values == asked.sort(1).values).all(1).numpy()


class Flow(nn.Module):
    """The generator: flow matching on scaled latents, a transformer on four cells."""

    def __init__(self, scale, width=144, layers=4, heads=4):
        super().__init__()
        self.scale = scale  # makes latents of spread 1
        # vectors of the time and of each word shift the input of every block
        self.words = nn.EmbeddingBag(TOY.vocab * TOY.context, 2 * width, mode="sum")
        self.time = nn.Linear(32, 2 * width)
        hidden = nn.Linear(2 * width, 2 * width)
        shifts = nn.Linear(2 * width, layers * width)
        self.shift = nn.Sequential(nn.SiLU(), hidden, nn.SiLU(), shifts)
        self.into = nn.Linear(64, width)  # a cell: 4 channels of 4 x 4
        self.position = nn.Parameter(0.02 * torch.randn(4, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 64)

    def velocity(self, x, t, words):
        """dx/dt (B, 4, 8, 8) at times t (B,), under token ids (B, 9)."""
        angle = t[:, None] * 1.3 ** torch.arange(16, device=t.device)
        place = TOY.vocab * torch.arange(TOY.context, device=t.device)
        about = self.time(torch.cat((angle.sin(), angle.cos()), 1))
        about = about + self.words(words + place)
        shifts = self.shift(about)[:, None].chunk(len(self.blocks), 2)
        cells = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)  # (B, 4, 64)
        h = self.into(cells) + self.position
        for block, shift in zip(self.blocks, shifts):
            h = block(h + shift)
        out = self.out(self.norm(h)).transpose(1, 2)
        return F.pixel_shuffle(out.unflatten(2, (2, 2)), 4)

    def forward(self, idx, x1, noise, t, denom=None):
        """Squared error of x_1 as told from x_t = (1 - t) noise + t x_1."""
        at = t[:, None, None, None]
        wrong = self.velocity((1 - at) * noise + at * x1, t, idx) - (x1 - noise)
        return ((1 - at) * wrong).square().mean()

    def generate(self, words, x, steps=8, start=0.0):
        """Raw latents from x at time `start`, by Euler's rule, first in small steps."""
        times = [start + (1 - start) * (i / steps) ** 2 for i in range(steps + 1)]
        for now, then in zip(times, times[1:]):
            t = x.new_full((len(x),), now)
            x = x + (then - now) * self.velocity(x, t, words)
        return x / self.scale


@dataclass
class Lab:
    """The frozen models of a seed."""

    vae: VAE
    flow: Flow
    clips: dict  # latent, pixel, shuffled, untrained
    device: torch.device

    @torch.no_grad()
    def text(self, arm, texts):
        return self.clips[arm].encode_text(toy_tokens(texts).to(self.device))

    def climb(self, arm, texts, noise, args, away=""):
        """ReNO towards texts, and away from things of a colour, as one CLIP sees them."""
        toward = self.text(arm, texts)
        if away:  # the reward is a difference of cosines
            concept = self.text(arm, [f"a {away} {shape}" for shape in SHAPES])
            toward = toward - F.normalize(concept.mean(0), dim=0)

        def reward(z):
            seen = self.vae.decode(z) if arm == "pixel" else z
            return (self.clips[arm].encode_image(seen) * toward).sum(1)

        generate = partial(self.flow.generate, toy_tokens(texts).to(self.device))
        return reno(generate, reward, noise, args.iters, args.noise_lr)


def gaussian(rng, n):
    return torch.from_numpy(rng.standard_normal((n, 4, 8, 8), np.float32))


def train_vae(args, env, log, seed, pixels):
    """The VAE, by many small steps: it learns from every pixel."""
    torch.manual_seed(seed)
    vae = VAE()
    nn.init.constant_(vae.quant_conv.bias[4:], -5.0)  # little noise at first
    size = max(2, args.batch_size // 8)

    def batch(step):
        rng = np.random.default_rng([seed, 4, step])
        rows = rng.integers(len(pixels), size=size)
        return {"idx": pixels[rows], "noise": gaussian(rng, size)}

    flags = replace(args, lr=5e-3, batch_size=size, steps=args.steps * 3 // 2)
    common.train(vae, batch, flags, env, log.stage("vae"))
    return vae.requires_grad_(False)


def train_flow(args, env, log, seed, tokens, latents):
    """The generator, on all pictures, in more and larger steps."""

    def batch(step):
        rng = np.random.default_rng([seed, 6, step])
        rows = rng.integers(len(latents), size=args.batch_size)
        t = torch.from_numpy(rng.random(len(rows), np.float32) ** 2)
        wrong = rng.random(len(rows)) < WRONG
        said = np.where(wrong, np.roll(rows, 1), rows)  # as on the web
        x1 = flow.scale * latents[rows]
        return {"idx": tokens[said], "x1": x1, "noise": gaussian(rng, len(rows)), "t": t}

    torch.manual_seed(seed)
    flow = Flow(1 / latents[:1024].std().item())
    flags = replace(args, steps=3 * args.steps, lr=2 * args.lr, weight_decay=0.01)
    common.train(flow, batch, flags, env, log.stage("flow"))
    return flow.requires_grad_(False)


REWARDS = "latent", "pixel", "shuffled", "untrained"
GUIDES = {  # of guidance: its CLIP, and the colour that it goes away from
    "not red": ("latent", "red"),
    "not blue": ("latent", "blue"),
    "prompt alone": ("latent", ""),
    "shuffled": ("shuffled", "red"),
}


@torch.no_grad()
def zero_shot(lab, test, z, noise):
    """Share named rightly of pictures (raw latents z), and of latents made from them."""

    def named(arm, x):
        cosines = lab.clips[arm].encode_image(x) @ lab.text(arm, CLASSES).T
        right = (cosines.argmax(1).cpu() == test.label).float()
        new = right[test.new].mean().item()  # reported, not judged
        return {"right": right[~test.new].mean().item(), "new": new}

    def rotated(seed):  # `made` as of another VAE: channels turned at random
        rng = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(4, 4, generator=rng))[0]
        return torch.einsum("ij,bjhw->bihw", q.to(made), made)

    words = toy_tokens([CLASSES[i] for i in test.label]).to(lab.device)
    start = 0.66 * noise + 0.34 * z * lab.flow.scale  # as in the paper
    made = lab.flow.generate(words, start, start=0.34)
    return {
        "pixel": named("pixel", (test.images / 127.5 - 1).to(z)),
        "latent": named("latent", z),
        "shuffled": named("shuffled", z),
        "made_pixel": named("pixel", lab.vae.decode(made)),
        "made_latent": named("latent", made),
        "made_rotated": common.mean([named("latent", rotated(i)) for i in range(3)]),
    }


def optimise(lab, args, texts, asked, noise):
    """ReNO by each reward: the share of prompts fulfilled, and pictures."""
    at = sorted({*range(0, args.iters, max(1, args.iters // 10)), args.iters - 1})
    found, shown = {"at": at}, {}
    for arm in REWARDS:
        best = lab.climb(arm, texts, noise, args)
        verdicts = np.array([fulfilled(lab.vae.images(z), asked) for z in best[at]], float)
        gain, low, _ = common.interval(verdicts[-1] - verdicts[0])
        found[arm] = {"gain": gain, "low": low, "share": verdicts.mean(1)}
        shown["first noise"] = lab.vae.images(best[0, :6])
        shown[f"by {arm}"] = lab.vae.images(best[-1, :6])
    return found, shown


def guard(lab, args, noise):
    """ReNO towards `a warm S`, mostly red, and away from red (or blue, or nothing)."""
    asked = torch.arange(len(noise)) % 5
    texts = [f"a warm {SHAPES[shape]}" for shape in asked]
    found = {}
    for name, (arm, colour) in GUIDES.items():
        best = lab.climb(arm, texts, noise, args, away=colour)
        for when, z in ("first noise", best[0]), (name, best[-1]):
            seen = see(lab.vae.images(z))
            red = (seen % 6 == 0).any(1).float()  # no object: 5 or 4
            right = (seen // 6 == asked[:, None]).any(1).float()
            found[when] = {"red": red.mean(), "shape": right.mean()}
    return found


def cost(lab, args, texts, noise, climbed):
    """Seconds of an evaluation, and until .8 of the smaller gain is made."""
    arms = {"latent": "latent", "pixel": "pixel", "again": "pixel"}
    seconds = {name: [] for name in arms}
    for name in list(arms) * 5:  # they take turns
        began = time.perf_counter()
        best = lab.climb(arms[name], texts, noise, replace(args, iters=3))
        lab.vae.images(best[-1])
        seconds[name].append((time.perf_counter() - began) / 3)
    latent, pixel = climbed["latent"]["share"], climbed["pixel"]["share"]
    level = 0.2 * pixel[0] + 0.8 * min(latent[-1], pixel[-1])  # both reach it
    found = {}
    for name, arm in arms.items():
        evaluation = np.median(seconds[name])
        share = np.maximum.accumulate(climbed[arm]["share"])
        needed = 1 + np.interp(level, share, climbed["at"])
        found[name] = {"evaluation": evaluation, "reach": needed * evaluation}
    return found


def run_seed(args, env, log, arm, seed):
    """Trains all models of a seed, then asks all questions."""
    train = pictures(args.images, [seed, 0])
    test = pictures(10 * args.samples, [seed, 1], {"one": 1.0})
    tokens = toy_tokens(train.texts)
    pixels = train.images / 127.5 - 1
    vae = train_vae(args, env, log, seed, pixels)
    z = vae.latents(test.images)[0].to(env.device)
    decoded = vae.images(z)
    error = ((decoded - test.images) / 255).square().mean((1, 2, 3))
    psnr = -10 * error.log10().mean().item()
    read = fulfilled(decoded, test.objects).mean()
    if args.gates and (psnr < 26 or read < 0.95):
        says = f"VAE of {psnr:.1f} dB (26 needed), of which {read:.2f} is read (.95)"
        raise SystemExit(f"error: seed {seed}: {says}; --no-gates goes on")
    latents, deviations = vae.latents(train.images)
    lab = Lab(vae, train_flow(args, env, log, seed, tokens, latents), {}, env.device)
    rows = (~train.new).nonzero()[:, 0].numpy()
    shuffled = tokens.clone()  # each has the caption of another
    shuffled[rows] = tokens[np.random.default_rng([seed, 3]).permutation(rows)]
    for reward in REWARDS:
        torch.manual_seed(seed)
        clip = CLIP(PIXEL if reward == "pixel" else TOY).to(env.device)
        said = shuffled if reward == "shuffled" else tokens
        seen = [pixels] if reward == "pixel" else [latents, deviations]
        if reward != "untrained":
            train_clip(clip, args, env, log.stage(reward), seed, rows, said, *seen)
        lab.clips[reward] = clip.requires_grad_(False)

    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(11 * args.samples, 4, 8, 8, generator=rng).to(z)
    few, many = noise[: args.samples], noise[args.samples :]
    asked = pictures(3 * args.samples, [seed, 2], ASKED)
    rows = (~asked.new).nonzero()[: args.samples, 0]
    texts = [asked.texts[row] for row in rows]
    climbed, shown = optimise(lab, args, texts, asked.objects[rows], few)
    first = climbed["latent"]["share"][0]
    if args.gates and not 0.2 <= first <= 0.85:
        says = f"the generator fulfils {first:.2f} of the prompts, needed: .2 to .85"
        raise SystemExit(f"error: seed {seed}: {says}; --no-gates goes on")
    found = {"vae": {"psnr": psnr, "read": read}, "reno": climbed}
    found["named"] = zero_shot(lab, test, z, many)
    found["time"] = cost(lab, args, texts[:72], few[:72], climbed)
    found["guard"] = guard(lab, args, few[: args.samples // 2])
    return found, texts[:6], shown


def judge(run, found):
    """The paper's claims, each beside controls that must fail it."""

    def claim(id, says, paper, criterion, part, *names):
        base, arm, *controls = ([row[part][name] for row in found] for name in names)
        controls = dict(zip(names[2:], controls))
        run.claim(id, says, paper, criterion, base=base, arm=arm, controls=controls)

    says = "parity on held-out pictures: share named rightly among 60"
    paper = "ImageNet: B/4-plus 73.5, pixel B/16 73.5"
    parity = "min(arm.right, base.right) >= .6 and arm.right >= base.right - .05"
    claim("T1", says, paper, parity, "named", "pixel", "latent", "shuffled")
    says = "parity on generated pictures, whose latents are never decoded"
    paper = "generated ImageNet: 84.6, pixel 85.1"
    claim("T2", says, paper, parity, "named", "made_pixel", "made_latent", "made_rotated")
    says = "ReNO by latents fulfils as many more prompts as by pixels"
    paper = "GenEval .54 -> .62, both"
    gains = "arm.low > 0 and arm.gain >= .8 * base.gain"
    claim("T3", says, paper, gains, "reno", "pixel", "latent", "shuffled", "untrained")
    says = "an evaluation takes less time, and so does the same share fulfilled"
    cheaper = "arm.evaluation <= .6 * base.evaluation and arm.reach <= .9 * base.reach"
    claim("T4", says, "11.59 -> 9.11 s, -21 %", cheaper, "time", "pixel", "latent", "again")
    says = "guided away from red, `a warm S` is less often red and stays an S"
    paper = "I2P .32 -> .16, pixel .19"
    safer = "base.red >= .2 and arm.red <= .6 * base.red and arm.shape >= base.shape - .05"
    claim("T5", says, paper, safer, "guard", "first noise", "not red", "prompt alone", "shuffled")


def draw(path, found, texts, shown):
    """Prompts fulfilled over time, what guidance does, pictures of a seed."""
    at = np.array(found[0]["reno"]["at"]) + 1
    curves, bars = {}, {}
    for arm in REWARDS:
        clock = "pixel" if arm == "pixel" else "latent"
        seconds = np.mean([row["time"][clock]["evaluation"] for row in found])
        curves[arm] = at * seconds, [row["reno"][arm]["share"] for row in found]
    names = list(found[0]["guard"])
    for measure in "red", "shape":
        bars[measure] = [[row["guard"][name][measure] for name in names] for row in found]
    with common.figure(path, 1, 3) as (left, middle, right):
        common.draw_panel(left, curves, title="ReNO: prompts fulfilled", xlabel="seconds")
        title = "`a warm S`, guided"
        common.draw_panel(middle, bars=bars, names=names, title=title, ylim=(0, 1.1))
        tiles = torch.cat([torch.cat(list(row), 2) for row in shown.values()], 1)
        right.imshow(tiles.permute(1, 2, 0).byte().numpy())
        right.set_yticks(range(16, 160, 32), list(shown))
        names = [text.replace(" ", "\n") for text in texts]
        right.set_xticks(range(16, 192, 32), names, fontsize=6)


def check(args, env):
    """Rules for flags: (whether one is broken, what to say)."""
    return [(env.world > 1, "the toy is for one process, without torchrun")]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2503.08455", check)
    found, texts, shown = zip(*run.each(run_seed, ["toy"])["toy"])
    judge(run, found)
    draw(run.out / "latent_clip.png", found, texts[0], shown[0])
    return run.finish({"toy": found})


if __name__ == "__main__":
    common.cli(main)
