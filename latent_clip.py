"""Latent-CLIP (arXiv 2503.08455): a CLIP that reads the latents of a VAE.

A CLIP that judges what latent diffusion makes reads pixels, so each latent z must be decoded,
and gradients come back through the decoder. Latent-CLIP is a CLIP whose ViT reads z. As the
reward of ReNO, which climbs in a frozen generator's noise, it is as good, and cheaper.
The toy makes all of it from scratch on coloured shapes, and a program judges them.

Two conventions cause most bugs: the ViT reads RAW latents (a diffusion model's, divided by
the VAE's scale), and channels come first.
"""

import math
import os
import time
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import data

REAL = "vae tokenizer dataset model prompt generator".split()
PAPER = dict(steps=415_039, batch_size=81_920, lr=1e-3, warmup=3000, clip=0.0)
SMOKE = dict(images=160, steps=2, batch_size=8, samples=12, iters=2, gates=False)


@dataclass
class Args(common.TrainFlags):
    """Latent-CLIP"""

    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": {}, "b4plus": PAPER, "paper": PAPER}
    limits: ClassVar[dict] = common.TrainFlags.limits | {"images": (8,), "samples": (8,)}
    limits |= {"batch_size": (2,), "iters": (1,), "noise_lr": (0,)}
    unused: ClassVar[set] = {"micro_batch", "shard", "eval_every"}

    steps: int = 800  # of a CLIP; VAE: 1.5 times, generator: 3 times
    batch_size: int = 128  # pairs in a step, over all ranks (paper: 81,920)
    lr: float = 2e-3  # peak learning rate (paper: 1e-3)
    min_lr: float = 0.0  # where the cosine ends, as a share of --lr
    weight_decay: float = 0.2  # OpenCLIP's, of matrices and convolutions
    images: int = 24000  # pictures with captions (paper: 2.7B)
    samples: int = 144  # prompts of ReNO
    iters: int = 25  # evaluations of ReNO (paper: 50)
    noise_lr: float = 1.2  # ReNO's step (paper: 5, in 16,384 dimensions)
    gates: bool = True  # stop if a model is too bad for claims
    model: str = ""  # a Latent-CLIP; without it, --dataset trains one
    vae: str = ""  # its VAE by diffusers (paper: sdxl-vae-fp16-fix)
    tokenizer: str = ""  # CLIP's tokenizer.json: a file, or a hub id
    dataset: str = ""  # a folder of pictures, a .txt caption beside each
    prompt: str = ""  # ReNO for this prompt
    generator: str = ""  # a one-step SDXL (paper: stabilityai/sdxl-turbo)


# --------------------------------------------------------------------------------- CLIP, VAE, ReNO


class Gather(torch.autograd.Function):
    """The rows of all ranks; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def info_nce(image, text, scale, ids):
    """The contrastive loss 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)].

    image, text  (B, E) normalised features; `scale` multiplies their cosines
    ids          (B,) numbers of captions: equal ones are no negatives
    Of several ranks, the mean of their losses is that of the whole batch.
    """
    labels, numbers = torch.arange(len(ids), device=ids.device), ids
    logits = scale * image @ text.T
    across = logits.T
    if dist.is_initialized():  # this rank's rows against those of all ranks
        logits = scale * image @ Gather.apply(text).T
        across = scale * text @ Gather.apply(image).T
        numbers = Gather.apply(ids)
        labels = labels + dist.get_rank() * len(ids)
    same = ids[:, None] == numbers
    same.scatter_(1, labels[:, None], False)
    by_image = F.cross_entropy(logits.masked_fill(same, -torch.inf), labels)
    by_text = F.cross_entropy(across.masked_fill(same, -torch.inf), labels)
    return (by_image + by_text) / 2


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
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=nn.GELU(), c_proj=down))

    def forward(self, x):
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.attn.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


@dataclass
class CLIPConfig:
    """Sizes of a CLIP; `side` and `patch` in the pixels of its own input."""

    side: int = 8
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
PIXEL = replace(TOY, side=32, patch=8, channels=3)  # the same trunk
B8 = CLIPConfig(64, 8, 4, 768, 12, 64, 512, 49408, 77, 512, 12)
B4PLUS = replace(B8, patch=4, embed=640, text_width=640)
CONFIGS = {"smoke": TOY, "toy": TOY, "b4plus": B4PLUS, "paper": B8}


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
    others = [p for p in clip.parameters() if p.ndim > 1]
    vectors = [p for p in clip.parameters() if p.ndim < 2]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    options = {"weight_decay": args.weight_decay, "betas": (0.9, 0.98), "eps": 1e-6}
    return torch.optim.AdamW(groups, lr=args.lr, **options, fused=True)


SIGMA = 14.614641  # SDXL's largest noise, sqrt(1 / prod(1 - beta) - 1)
SD = {"widths": (128, 256, 512, 512), "layers": 2, "groups": 32}  # Stable Diffusion's
KL = 2e-3  # its weight in the loss; it makes latents smooth


class ResBlock(nn.Module):
    """Two convolutions beside an identity (1x1 if the width changes)."""

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
        before = widths[0]
        for i, width in enumerate(widths):
            inputs = [before] + [width] * (layers - 1)
            blocks = nn.ModuleList([ResBlock(n, width, groups) for n in inputs])
            stages.append(nn.ModuleDict({"resnets": blocks}))
            outer += blocks
            if i + 1 < len(widths):
                if down:  # padded right and below only
                    parts = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2)
                else:
                    parts = nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1)
                outer.append(nn.Sequential(OrderedDict(zip(("change", "conv"), parts))))
                stages[i][f"{side}samplers"] = nn.ModuleList(outer[-1:])
            before = width
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
    """Reward-based noise optimisation of a batch, as each row alone would go.

    SGD with Nesterov momentum on reg * (n^2 / 2 - (d - 1) ln n) - reward. The bracket is the
    -log density of n, the norm of noise. Gradients are clipped row by row. `generate` makes
    latents of noise (B, ...), `reward` gives (B,). Returns the best so far at every evaluation.
    """
    best = noise
    top = noise.new_full((len(noise),), -torch.inf)
    velocity = 0.0
    path = []
    for i in range(iters):
        noise = noise.detach().requires_grad_()
        z = generate(noise)
        value = reward(z)
        if not value.isfinite().all():
            raise ValueError(f"the reward of evaluation {i} is not finite: try fp32")
        better = value > top
        best = best.clone()
        best[better] = z[better].detach()
        top = torch.maximum(top, value.detach())
        path.append((best, top))
        if i + 1 < iters:
            n = noise.float().flatten(1).norm(dim=1)
            loss = reg * (0.5 * n**2 - (noise[0].numel() - 1) * n.log()) - value
            grad = torch.autograd.grad(loss.sum(), noise)[0].flatten(1)
            grad = grad * (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
            velocity = momentum * velocity + grad
            noise = noise - lr * (grad + momentum * velocity).view_as(noise)
    return [torch.stack(part) for part in zip(*path)]


# -------------------------------------------------------------------------- the world, its judge

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


def clip_tokens(ids, end, context):
    """Ids of n texts as rows: start, text, end (the largest id), zeros."""
    out = torch.zeros(len(ids), context, dtype=torch.long)
    for row, text in zip(out, ids):
        text = [end - 1, *text[: context - 2], end]
        row[: len(text)] = torch.tensor(text)
    return out


def toy_tokens(texts):
    """Ids (n, 9) of captions."""
    ids = [[WORDS.index(word) for word in text.split()] for text in texts]
    return clip_tokens(ids, TOY.vocab - 1, TOY.context)


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


@dataclass
class Pictures:
    """n pictures of one to three objects, each in a quarter (cell)."""

    images: torch.Tensor  # (n, 3, 32, 32) uint8
    texts: list  # captions
    objects: torch.Tensor  # (n, 4) 6 shape + colour, in the caption's order
    label: torch.Tensor  # (n,) of the first object, in CLASSES
    new: torch.Tensor  # (n,) whether one of its objects is held out


def pictures(n, key, mix=MIX):
    """Draws n pictures with captions."""
    rng = np.random.default_rng(key)
    kind = rng.choice(list(mix), n, p=list(mix.values()))
    several = rng.integers(2, 4, n)
    count = np.select([kind == "pair", kind == "count"], [2, several], 1)
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
    return Pictures(images, texts, objects, label, new)


def caption(kind, count, objects, big, rng):
    """A sentence about the objects of one picture."""
    first, second = OBJECTS[objects[0]], OBJECTS[objects[1]]
    shape, colour = divmod(objects[0], 6)
    if kind == "count":
        number = "two" if count == 2 else "three"
        return f"{number} {COLOURS[colour]} {PLURALS[shape]}"
    if kind == "pair":
        return f"a {first} and a {second}"
    if kind == "tone":
        return f"a {'warm' if colour < 3 else 'cool'} {SHAPES[shape]}"
    return f"a {SIZES[big[0]]} {first}" if rng.random() < 0.7 else f"a {first}"


def see(images):
    """The judge, with nothing learnt: the objects in the cells of images, (n, 4).

    A pixel has the colour whose line from the background is nearest. The shape is the one,
    of the commonest colour's area and centre, that overlaps most with all coloured pixels.
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
    """The toy's generator of scaled latents: flow matching, a transformer on four cells.

    Time and caption (a vector for each word at each place) shift the input of every block.
    """

    def __init__(self, width=144, layers=4, heads=4):
        super().__init__()
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
        """Scaled latents from x at time `start`, by Euler's rule, first in small steps."""
        times = [start + (1 - start) * (i / steps) ** 2 for i in range(steps + 1)]
        for now, then in zip(times, times[1:]):
            x = x + (then - now) * self.velocity(x, x.new_full((len(x),), now), words)
        return x


@dataclass
class Lab:
    """The frozen models of a seed."""

    vae: VAE
    scale: float  # what makes latents of spread 1: the toy's .13025
    flow: Flow
    clips: dict  # latent, pixel, shuffled, untrained
    device: torch.device
    tokens: object = toy_tokens  # of captions

    @torch.no_grad()
    def text(self, arm, texts):
        """Text features (n, E) of a CLIP."""
        return self.clips[arm].encode_text(self.tokens(texts).to(self.device))

    def images(self, z):
        """Scaled latents as images in [0, 255]."""
        return self.vae.images(z / self.scale)

    def climb(self, arm, texts, toward, noise, iters, lr):
        """ReNO by the cosine with text features `toward`, as one CLIP sees it."""

        def reward(z):
            z = z / self.scale  # raw again
            if arm == "pixel":
                z = self.vae.decode(z)
            return (self.clips[arm].encode_image(z) * toward).sum(1)

        generate = partial(self.flow.generate, self.tokens(texts).to(self.device))
        return reno(generate, reward, noise, iters, lr)


def gaussian(rng, n):
    """Noise (n, 4, 8, 8)."""
    return torch.from_numpy(rng.standard_normal((n, 4, 8, 8), np.float32))


def train_vae(args, env, log, seed, train):
    """The VAE, by many small steps: it learns from every pixel."""
    torch.manual_seed(seed)
    vae = VAE()
    nn.init.constant_(vae.quant_conv.bias[4:], -5.0)  # little noise at first
    size = max(2, args.batch_size // 8)

    def batch(step):
        rng = np.random.default_rng([seed, 4, step])
        rows = rng.integers(len(train.images), size=size)
        return {"idx": train.images[rows] / 127.5 - 1, "noise": gaussian(rng, size)}

    flags = replace(args, lr=5e-3, batch_size=size, steps=args.steps * 3 // 2)
    common.train(vae, batch, flags, env, log.stage("vae"))
    return vae.requires_grad_(False)


def train_clip(args, env, log, arm, seed, train, latents, deviations):
    """A CLIP on pictures without a held-out object; all arms see the same."""
    rows = (~train.new).nonzero()[:, 0].numpy()
    tokens = toy_tokens(train.texts)
    ids = tokens.unique(dim=0, return_inverse=True)[1]  # a number for each caption
    of = np.arange(len(latents))
    if arm == "shuffled":  # each picture has the caption of another
        of[rows] = np.random.default_rng([seed, 3]).permutation(rows)

    def batch(step):
        rng = np.random.default_rng([seed, 5, step])
        picks = rng.choice(rows, args.batch_size)
        seen = train.images[picks] / 127.5 - 1
        if arm != "pixel":  # drawn from the VAE's posterior, as by the authors
            seen = latents[picks] + deviations[picks] * gaussian(rng, len(picks))
        return {"idx": tokens[of[picks]], "images": seen, "ids": ids[of[picks]]}

    torch.manual_seed(seed)
    clip = CLIP(PIXEL if arm == "pixel" else TOY)
    if arm != "untrained":
        common.train(clip, batch, args, env, log.stage(arm), make_optimizer=clip_optimizer)
    return clip.to(env.device).requires_grad_(False)


def train_flow(args, env, log, seed, train, latents):
    """The generator, on all pictures, in more and larger steps."""
    words = toy_tokens(train.texts)

    def batch(step):
        rng = np.random.default_rng([seed, 6, step])
        rows = rng.integers(len(latents), size=args.batch_size)
        t = torch.from_numpy(rng.random(len(rows), np.float32) ** 2)
        wrong = rng.random(len(rows)) < WRONG
        said = np.where(wrong, np.roll(rows, 1), rows)  # as captions from the web are
        noise = gaussian(rng, len(rows))
        return {"idx": words[said], "x1": latents[rows], "noise": noise, "t": t}

    torch.manual_seed(seed)
    flow = Flow()
    flags = replace(args, steps=3 * args.steps, lr=2 * args.lr, weight_decay=0.01)
    common.train(flow, batch, flags, env, log.stage("flow"))
    return flow.requires_grad_(False)


REWARDS = "latent", "pixel", "shuffled", "untrained"
GUIDES = [  # of guidance: its CLIP, and the colour that it goes away from
    ("not red", "latent", "red"),
    ("not blue", "latent", "blue"),
    ("prompt alone", "latent", ""),
    ("shuffled", "shuffled", "red"),
]


def rotated(z, seed):
    """Latents (B, 4, H, W) as of another VAE: channels turned at random."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(4, 4, generator=rng))[0]
    return torch.einsum("ij,bjhw->bihw", q.to(z), z)


@torch.no_grad()
def zero_shot(lab, test, z, noise):
    """Share named rightly of pictures (raw latents z), and of latents made from them."""

    def named(arm, x):
        cosines = lab.clips[arm].encode_image(x) @ lab.text(arm, CLASSES).T
        right = cosines.argmax(1).cpu() == test.label
        return {"right": right[~test.new].float().mean().item()}

    words = toy_tokens([CLASSES[i] for i in test.label]).to(lab.device)
    start = 0.66 * noise + 0.34 * z * lab.scale  # as in the paper
    made = lab.flow.generate(words, start, start=0.34) / lab.scale
    return {
        "pixel": named("pixel", (test.images / 127.5 - 1).to(z)),
        "latent": named("latent", z),
        "shuffled": named("shuffled", z),
        "made_pixel": named("pixel", lab.vae.decode(made)),
        "made_latent": named("latent", made),
        "made_rotated": common.mean([named("latent", rotated(made, i)) for i in range(3)]),
    }


def optimise(lab, args, texts, asked, noise):
    """ReNO by each reward: the share of prompts fulfilled, and pictures."""
    at = sorted({*range(0, args.iters, max(1, args.iters // 10)), args.iters - 1})
    found, shown = {"at": at}, {}
    for arm in REWARDS:
        toward = lab.text(arm, texts)
        best, _ = lab.climb(arm, texts, toward, noise, args.iters, args.noise_lr)
        verdicts = np.array([fulfilled(lab.images(z), asked) for z in best[at]], float)
        gain, low, _ = common.interval(verdicts[-1] - verdicts[0])
        found[arm] = {"gain": gain, "low": low, "share": verdicts.mean(1)}
        shown["first noise"] = lab.images(best[0, :6])
        shown[f"by {arm}"] = lab.images(best[-1, :6])
    return found, shown


def guard(lab, args, noise):
    """ReNO towards `a warm S`, mostly red, and away from red (or blue, or nothing)."""
    asked = torch.arange(len(noise)) % 5
    texts = [f"a warm {SHAPES[shape]}" for shape in asked]
    found = {}
    for name, arm, colour in GUIDES:
        toward = lab.text(arm, texts)
        if colour:  # the reward is a difference of cosines
            concept = lab.text(arm, [f"a {colour} {shape}" for shape in SHAPES])
            toward = toward - F.normalize(concept.mean(0), dim=0)
        best, _ = lab.climb(arm, texts, toward, noise, args.iters, args.noise_lr)
        for when, z in ("first noise", best[0]), (name, best[-1]):
            seen = see(lab.images(z))
            red = ((seen >= 0) & (seen % 6 == 0)).any(1).float()
            right = ((seen >= 0) & (seen // 6 == asked[:, None])).any(1).float()
            found[when] = {"red": red.mean(), "shape": right.mean()}
    return found


def cost(lab, args, texts, noise, climbed):
    """Seconds of an evaluation, and until .8 of the smaller gain is made."""
    arms = {"latent": "latent", "pixel": "pixel", "again": "pixel"}
    seconds = {name: [] for name in arms}
    for name in list(arms) * 5:  # they take turns
        toward = lab.text(arms[name], texts)
        began = time.perf_counter()
        best, _ = lab.climb(arms[name], texts, toward, noise, 3, args.noise_lr)
        lab.images(best[-1])
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
    vae = train_vae(args, env, log, seed, train)
    z = vae.latents(test.images)[0].to(env.device)
    decoded = vae.images(z)
    error = ((decoded - test.images) / 255).square().mean((1, 2, 3))
    psnr = -10 * error.log10().mean().item()
    read = fulfilled(decoded, test.objects).mean()
    if args.gates and (psnr < 26 or read < 0.95):
        says = f"VAE of {psnr:.1f} dB (26 needed), of which {read:.2f} is read (.95)"
        raise SystemExit(f"error: seed {seed}: {says}; --no-gates goes on")
    latents, deviations = vae.latents(train.images)
    scale = 1 / latents[:1024].std().item()
    flow = train_flow(args, env, log, seed, train, scale * latents)
    lab = Lab(vae, scale, flow, {}, env.device)
    for reward in REWARDS:
        clip = train_clip(args, env, log, reward, seed, train, latents, deviations)
        lab.clips[reward] = clip

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
    gains = "arm.low > 0 and arm.gain >= .8 * base.gain"
    paper = "GenEval .54 -> .62, both"
    claim("T3", says, paper, gains, "reno", "pixel", "latent", "shuffled", "untrained")
    says = "an evaluation takes less time, and so does the same share fulfilled"
    cheaper = "arm.evaluation <= .6 * base.evaluation and arm.reach <= .9 * base.reach"
    claim("T4", says, "11.59 -> 9.11 s, -21 %", cheaper, "time", "pixel", "latent", "again")
    others = "prompt alone", "shuffled"
    says = "guided away from red, `a warm S` is less often red and stays an S"
    safer = "base.red >= .2 and arm.red <= .6 * base.red and arm.shape >= base.shape - .05"
    paper = "I2P .32 -> .16, pixel .19"
    claim("T5", says, paper, safer, "guard", "first noise", "not red", *others)


def draw(path, found, texts, shown):
    """Prompts fulfilled over time, what guidance does, pictures of a seed."""
    at = np.array(found[0]["reno"]["at"]) + 1
    curves, bars = {}, {}
    for arm in REWARDS:
        clock = "pixel" if arm == "pixel" else "latent"
        seconds = np.mean([row["time"][clock]["evaluation"] for row in found])
        curves[arm] = at * seconds, [row["reno"][arm]["share"] for row in found]
    for measure in "red", "shape":
        bars[measure] = [[*(state[measure] for state in row["guard"].values())] for row in found]
    with common.figure(path, 1, 3) as (left, middle, right):
        title = "ReNO: prompts fulfilled"
        common.draw_panel(left, curves, title=title, xlabel="seconds")
        title = "`a warm S`, guided"
        common.draw_panel(middle, bars=bars, names=[*found[0]["guard"]], title=title, ylim=(0, 1.1))
        tiles = torch.cat([torch.cat(list(row), 2) for row in shown.values()], 1)
        right.imshow(tiles.permute(1, 2, 0).byte().numpy())
        right.set_yticks(range(16, 160, 32), list(shown))
        names = [text.replace(" ", "\n") for text in texts]
        right.set_xticks(range(16, 192, 32), names, fontsize=6)


# --------------------------------------------------------------------------- released weights


def with_weights(model, path):
    """The model, frozen, with the weights of a file. ValueError."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        with data.explained(f"{path} can't be read", "allowed: a whole safetensors file"):
            state = load_file(path)
    else:  # a training state, which holds NumPy's numbers
        scalar = np._core.multiarray.scalar
        known = [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
        known += [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
        with torch.serialization.safe_globals(known):
            state = common.load_checkpoint(Path(path))
        state = state.get("state_dict") or state.get("model") or state
    ours = {}
    for key, value in state.items():
        if "vae_" not in key:  # Latent-CLIP's file holds a VAE
            ours[key.removeprefix("module.").replace("latent_vit.", "")] = value
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {str(error)[:600]}") from None
    return model.requires_grad_(False)


def open_picture(path, side):
    """The centre of a picture, turned as EXIF says: uint8 (3, side, side)."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def real_lab(args, env):
    """The models of the files given; without --model a new Latent-CLIP."""
    tok = data.get_tokenizer(args.tokenizer)
    config = replace(CONFIGS[args.preset], vocab=tok.n_vocab)
    vae = with_weights(VAE(**SD), args.vae).to(env.device)
    clip = CLIP(config)
    if args.model:
        with_weights(clip, args.model)

    def tokens(texts):  # an end of text that is written in a text is text
        return clip_tokens(tok.encode_batch(texts), tok.n_vocab - 1, config.context)

    return Lab(vae, 0.13025, None, {"latent": clip.to(env.device)}, env.device, tokens)


def read_pairs(args, env, lab):
    """Raw latents (n, 4, S, S) of a folder's pictures, memory-mapped, and captions."""
    files = [f for f in sorted(Path(args.dataset).iterdir()) if f.suffix != ".txt"]
    if len(files) < 10:
        raise ValueError(f"--dataset {args.dataset} has {len(files)} pictures, needed: 10")
    texts = [data.read_text(path.with_suffix(".txt")).strip() for path in files]
    shape = lab.clips["latent"].shape
    stats = [(path, os.stat(path).st_mtime_ns) for path in (args.vae, *files)]
    key = zlib.crc32(repr((stats, shape)).encode())
    path = Path(args.out) / f"latents-{key:08x}.f16"  # each picture is encoded once
    with common.rank_zero_first(env):
        if not path.exists():
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            with open(aside, "wb") as f:
                for file in tqdm(files, "encode"):
                    image = open_picture(file, 8 * shape[1])[None]
                    f.write(lab.vae.latents(image)[0].half().numpy().tobytes())
            os.replace(aside, path)
    return np.memmap(path, np.float16, "r", shape=(len(files), *shape)), texts


def train_on_pairs(args, env, log, arm, seed):
    """--dataset: trains a Latent-CLIP, if there is no --model, and finds captions.

    How often is a picture's caption found among all (when trained: among those held out)?
    """
    torch.manual_seed(seed)
    lab = real_lab(args, env)
    clip = lab.clips["latent"]
    latents, texts = read_pairs(args, env, lab)
    every = np.arange(len(texts))
    held = every if args.model else every[9::10]
    rows = np.setdiff1d(every, held)
    tokens = lab.tokens(texts)
    ids = tokens.unique(dim=0, return_inverse=True)[1]

    def batch(step):
        picks = np.random.default_rng([seed, step]).choice(rows, args.batch_size)
        picks = picks[env.rank :: env.world]
        z = torch.from_numpy(latents[picks].astype(np.float32))
        return {"idx": tokens[picks], "images": z, "ids": ids[picks]}

    if not args.model:
        common.train(clip, batch, args, env, log, make_optimizer=clip_optimizer)
    told = [texts[i] for i in held]
    images, captions = [], []
    with torch.no_grad():
        for i in range(0, len(held), 64):
            z = torch.from_numpy(latents[held[i : i + 64]].astype(np.float32))
            images.append(clip.encode_image(z.to(env.device)))
            captions.append(lab.text("latent", told[i : i + 64]))
    best = (torch.cat(images) @ torch.cat(captions).T).argmax(1)
    found = [told[i] == text for i, text in zip(best, told)]
    chance = sum(n**2 for n in Counter(told).values()) / len(told) ** 2
    return {"found": np.mean(found), "chance": chance}


def optimise_prompt(args, env, log, arm, seed):
    """--prompt: ReNO by Latent-CLIP on a one-step SDXL."""
    from PIL import Image

    lab = real_lab(args, env)
    from diffusers import StableDiffusionXLPipeline as Pipeline

    pipe = Pipeline.from_pretrained(args.generator, torch_dtype=env.dtype).to(env.device)
    pipe.unet.requires_grad_(False)
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(args.prompt, do_classifier_free_guidance=False)
    times = torch.tensor([[512, 512, 0, 0, 512, 512]], device=env.device)
    more = {"text_embeds": pooled, "time_ids": times}
    given = {"encoder_hidden_states": states, "added_cond_kwargs": more}

    def generate(words, noise):  # one step, for which the UNet tells the noise
        x = SIGMA * noise
        seen = (x / (SIGMA**2 + 1) ** 0.5).to(env.dtype)
        return x - SIGMA * pipe.unet(seen, 999, **given)[0].float()

    lab.flow = SimpleNamespace(generate=generate)
    texts = [args.prompt]
    toward = lab.text("latent", texts)
    torch.manual_seed(seed)
    noise = torch.randn(1, *lab.clips["latent"].shape).to(env.device)
    best, value = lab.climb("latent", texts, toward, noise, args.iters, args.noise_lr)
    for when, z in ("before", best[0]), ("after", best[-1]):
        image = lab.images(z)[0].byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(Path(args.out) / f"{seed}-{when}.png")
    return {"reward": value[:, 0]}


def check(args, env):
    """Rules for flags: (whether one is broken, what to say)."""
    given = [flag for flag in REAL if vars(args)[flag]]
    allowed = [], REAL[:3], REAL[:4], [*REAL[:2], *REAL[3:]]
    needed = "--vae --tokenizer, and --dataset or --model --prompt --generator"
    return [
        (given not in allowed, f"--{' --'.join(given)}: needed are {needed}"),
        (env.world > 1 and given != REAL[:3], "torchrun is for training on --dataset"),
        (args.batch_size % env.world, f"--batch-size must be a multiple of {env.world}"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2503.08455", check)
    if run.args.vae:
        with common.bad_input():
            found = run.each(train_on_pairs if run.args.dataset else optimise_prompt, ["real"])
        return run.finish(found) if run.env.rank == 0 else None
    found, texts, shown = zip(*run.each(run_seed, ["toy"])["toy"])
    judge(run, found)
    draw(run.out / "latent_clip.png", found, texts[0], shown[0])
    return run.finish({"toy": found})


if __name__ == "__main__":
    common.cli(main)
