"""Latent-CLIP (arXiv 2503.08455): a CLIP that reads the latents of a VAE: rewards without decoding.

Latent diffusion makes a latent z and decodes it to pixels at the very end. A CLIP that judges
pixels must decode z each time, and back-propagate through the decoder. Latent-CLIP is a CLIP
whose ViT reads z itself. In the paper it names pictures as well as pixel CLIPs do; as a reward
for ReNO, which climbs in the noise of a frozen generator, pictures are as good at 21 % less
time; as a guard it halves the rate of inappropriate pictures. The toy makes all of it from
scratch on coloured shapes; a judge without any learnt part reads what comes out.

Two conventions cause most bugs: the ViT reads RAW latents (a diffusion model's, divided by the
VAE's scale), and channels come first.

Read on: `info_nce`, `CLIP`, `VAE`, `reno` (the method), `pictures` and `see` (the world and its
judge), `run_seed` (the experiment), `judge` (the claims).
"""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

SMOKE = dict(images=160, steps=2, batch_size=8, samples=12, iters=2, gates=False)


@dataclass
class Args(common.TrainFlags):
    """Latent-CLIP"""

    # b4plus and paper (B/8) are the sizes of the released models, for --model
    presets: ClassVar[dict] = {"smoke": SMOKE, "toy": {}, "b4plus": {}, "paper": {}}
    limits: ClassVar[dict] = common.TrainFlags.limits | {"images": (8,), "samples": (8,)}
    limits |= {"batch_size": (2,), "iters": (1,), "noise_lr": (0,), "vae_scale": (1e-6,)}
    unused: ClassVar[set] = {"micro_batch", "shard", "eval_every"}

    steps: int = 400  # of each CLIP; VAE: 1.5 times, generator: 6 times (paper: 415,039)
    batch_size: int = 128  # pairs in a step (paper: 81,920)
    lr: float = 2e-3  # peak learning rate (paper: 1e-3)
    min_lr: float = 0.0  # where the cosine ends, as a share of --lr
    weight_decay: float = 0.2  # of matrices, embeddings, convolutions (OpenCLIP's)
    images: int = 24000  # pictures with captions (paper: 2.7B)
    samples: int = 144  # prompts of ReNO; guidance: half as many
    iters: int = 50  # evaluations of ReNO (paper: 50)
    noise_lr: float = 0.6  # ReNO's step (paper: 5, with noise 8 times as long)
    gates: bool = True  # stop if a model is too bad for the claims to mean much
    model: str = ""  # file of a released Latent-CLIP, for --dataset or --prompt
    vae: str = ""  # file of its VAE by diffusers (paper: sdxl-vae-fp16-fix)
    vae_scale: float = 0.13025  # diffusion multiplies raw latents by it
    tokenizer: str = ""  # CLIP's tokenizer.json: a file, a folder or a hub id
    dataset: str = ""  # a folder of pictures, a .txt caption beside each
    prompt: str = ""  # ReNO for this prompt
    generator: str = ""  # a one-step SDXL, for --prompt (paper: stabilityai/sdxl-turbo)


# ---------------------------------------------------------------------------------------- InfoNCE


def info_nce(image, text, scale, ids):
    """The contrastive loss: 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)], in nats.

    image, text  (B, E) normalised features; `scale` multiplies their cosines
    ids          (B,) numbers of captions: two pictures of one caption are no negatives
    """
    if len(image) < 2:
        raise ValueError("InfoNCE needs at least 2 pairs")
    labels = torch.arange(len(image), device=image.device)
    logits = scale * image @ text.T
    same = ids[:, None] == ids
    logits = logits.masked_fill(same & (labels[:, None] != labels), -torch.inf)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# ------------------------------------------------------------------------------------------- CLIP


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


BASE = dict(side=64, width=768, layers=12, head=64, vocab=49408, context=77, text_layers=12)
TOY = CLIPConfig()
PIXEL = replace(TOY, side=32, patch=8, channels=3)  # as many patches, the same trunk
B8 = CLIPConfig(patch=8, embed=512, text_width=512, **BASE)
B4PLUS = CLIPConfig(patch=4, embed=640, text_width=640, **BASE)
CONFIGS = {"smoke": TOY, "toy": TOY, "b4plus": B4PLUS, "paper": B8}


class Attention(nn.Module):
    """Multi-head self-attention (B, T, C), with OpenCLIP's names."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block with exact GELU."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.causal = causal
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=nn.GELU(), c_proj=down))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), self.causal)
        return x + self.mlp(self.ln_2(x))


def transformer(width, layers, heads, causal):
    """A stack of blocks, with OpenCLIP's name."""
    blocks = nn.Sequential(*[Block(width, heads, causal) for _ in range(layers)])
    return nn.Sequential(OrderedDict(resblocks=blocks))


class ViT(nn.Module):
    """Images or latents (B, channels, side, side) -> features (B, E)."""

    def __init__(self, c):
        super().__init__()
        std, places = c.width**-0.5, (c.side // c.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(c.channels, c.width, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(c.width))
        self.positional_embedding = nn.Parameter(std * torch.randn(places, c.width))
        self.ln_pre = nn.LayerNorm(c.width)
        self.transformer = transformer(c.width, c.layers, c.width // c.head, False)
        self.ln_post = nn.LayerNorm(c.width)
        self.proj = nn.Parameter(std * torch.randn(c.width, c.embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Two towers into one space, with OpenCLIP's names."""

    def __init__(self, config):
        super().__init__()
        w = config.text_width
        self.config = config
        self.visual = ViT(config)
        self.token_embedding = nn.Embedding(config.vocab, w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, w))
        self.transformer = transformer(w, config.text_layers, w // config.head, True)
        self.ln_final = nn.LayerNorm(w)
        self.text_projection = nn.Parameter(w**-0.5 * torch.randn(w, config.embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            into_stream = (2 * w * config.text_layers) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=w**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=into_stream)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * w) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=into_stream)
        self.blocks = [*self.visual.transformer.resblocks, *self.transformer.resblocks]

    def encode_image(self, x):
        """Normalised features (B, E) of raw latents, or of pixels in [-1, 1]."""
        c = self.config
        shape = c.channels, c.side, c.side
        if x.shape[1:] != shape:
            needed = f"channels-first (B, {c.channels}, {c.side}, {c.side})"
            raise ValueError(f"latents must be {needed}, not {tuple(x.shape)}")
        return F.normalize(self.visual(x), dim=-1)

    def encode_text(self, tokens):
        """Normalised features (B, E) of ids (B, T), read at the end of text."""
        end = tokens.argmax(1)  # the largest id
        tokens = tokens[:, : int(end.max()) + 1]  # exact: attention is causal
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        return F.normalize(x[torch.arange(len(x)), end] @ self.text_projection, dim=-1)

    def forward(self, idx, images, ids, denom=None):
        """The loss of pairs: token ids (B, T), images or latents, caption numbers."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(100))
        image, text = self.encode_image(images), self.encode_text(idx)
        return info_nce(image, text, self.logit_scale.exp(), ids)


def clip_optimizer(clip, args):
    """OpenCLIP's AdamW: no decay of gains, biases and the logit scale."""
    groups = [{"params": [], "weight_decay": w} for w in (args.weight_decay, 0.0)]
    for name, p in clip.named_parameters():
        gain_or_bias = "ln_" in name or "bias" in name or p.ndim < 2
        groups[gain_or_bias]["params"].append(p)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# -------------------------------------------------------------------------------------------- VAE


@dataclass
class VAEConfig:
    """Sizes of an AutoencoderKL; the side shrinks by f = 2 ** (len(widths) - 1)."""

    widths: tuple = (16, 32, 32)
    layers: int = 1
    groups: int = 8
    latent: int = 4


KL = 2e-3  # its weight in the loss: latents are smooth, what the decoder ignores is little
SD = VAEConfig((128, 256, 512, 512), 2, 32)  # of Stable Diffusion 1, 2, XL


class ResBlock(nn.Module):
    """Two convolutions beside an identity (1x1 if the width changes)."""

    def __init__(self, before, after, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, 1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, 1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

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
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H * W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


def resample(width, down):
    """Halves the side (padded right and below only) or doubles it."""
    if down:
        parts = {"pad": nn.ZeroPad2d((0, 1, 0, 1)), "conv": nn.Conv2d(width, width, 3, 2)}
    else:
        parts = {"up": nn.Upsample(scale_factor=2), "conv": nn.Conv2d(width, width, 3, padding=1)}
    return nn.Sequential(OrderedDict(parts))


class Half(nn.Module):
    """The encoder or the decoder: stages and a middle."""

    def __init__(self, c, down):
        super().__init__()
        side = "down" if down else "up"
        widths = c.widths if down else c.widths[::-1]
        layers = c.layers if down else c.layers + 1
        self.conv_in = nn.Conv2d(3 if down else c.latent, widths[0], 3, padding=1)
        stages, outer, before = nn.ModuleList(), [], widths[0]
        for i, width in enumerate(widths):
            inputs = [before] + [width] * (layers - 1)
            blocks = nn.ModuleList([ResBlock(n, width, c.groups) for n in inputs])
            stages.append(nn.ModuleDict({"resnets": blocks}))
            outer += blocks
            if i + 1 < len(widths):
                outer.append(resample(width, down))
                stages[i][f"{side}samplers"] = nn.ModuleList(outer[-1:])
            before = width
        self.add_module(f"{side}_blocks", stages)
        width = c.widths[-1]
        resnets = nn.ModuleList([ResBlock(width, width, c.groups) for _ in range(2)])
        attentions = nn.ModuleList([PixelAttention(width, c.groups)])
        self.mid_block = nn.ModuleDict({"resnets": resnets, "attentions": attentions})
        self.conv_norm_out = nn.GroupNorm(c.groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent if down else 3, 3, padding=1)
        middle = [resnets[0], attentions[0], resnets[1]]
        self.order = outer + middle if down else middle + outer

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.order:
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """diffusers' AutoencoderKL: images (B, 3, H, W) <-> raw latents (B, 4, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        self.encoder = Half(config, True)
        self.decoder = Half(config, False)
        self.quant_conv = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)
        self.post_quant_conv = nn.Conv2d(config.latent, config.latent, 1)
        self.blocks = [*self.encoder.order, *self.decoder.order]

    def moments(self, x):
        """Mean and log-variance of the raw latents of images in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Images of raw latents, in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, idx, noise, denom=None):
        """The loss of images `idx`: L1 for edges, squares for colours, and KL."""
        mean, logvar = self.moments(idx)
        image = self.decode(mean + (0.5 * logvar).exp() * noise)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)  # from N(0, 1), of every element
        return F.l1_loss(image, idx) + F.mse_loss(image, idx) + KL * kl.mean()


# ------------------------------------------------------------------------------------------- ReNO


def norm_loss(noise):
    """-log density of the norm n of noise (B, ...): n^2 / 2 - (d - 1) ln n.

    It is least at n = sqrt(d - 1), where the norm of Gaussian noise lies.
    """
    n = noise.float().flatten(1).norm(dim=1)
    return 0.5 * n**2 - (noise[0].numel() - 1) * n.log()


def reno(generate, reward, noise, iters=50, lr=5.0, clip=0.1, reg=0.01, momentum=0.9):
    """Reward-based noise optimisation of a batch, exactly as each row alone would go.

    SGD with Nesterov momentum on reg * norm_loss - reward; gradients clipped row by row.
    generate  noise (B, ...) -> latents; reward: latents -> (B,); both frozen
    Returns the best latents so far at every evaluation (iters, B, ...), their rewards.
    """
    velocity = torch.zeros_like(noise)
    latents, rewards = [], []
    for i in range(iters):
        noise = noise.detach().requires_grad_()
        z = generate(noise)
        value = reward(z)
        if not value.isfinite().all():
            raise ValueError(f"the reward is not finite at evaluation {i}: try fp32")
        best, best_value = z.detach(), value.detach()
        if i:
            better = best_value > rewards[-1]
            best = torch.where(column(better, best), best, latents[-1])
            best_value = torch.maximum(best_value, rewards[-1])
        latents.append(best)
        rewards.append(best_value)
        if i + 1 < iters:
            (grad,) = torch.autograd.grad((reg * norm_loss(noise) - value).sum(), noise)
            shrink = (clip / (grad.flatten(1).norm(dim=1) + 1e-6)).clamp(max=1)
            grad = grad * column(shrink, grad)
            velocity = momentum * velocity + grad
            noise = noise - lr * (grad + momentum * velocity)
    return torch.stack(latents), torch.stack(rewards)


def column(v, like):
    """(B,) as (B, 1, 1, ...), to be broadcast over `like`."""
    return v.view(-1, *[1] * (like.dim() - 1))


def cosine_reward(clip, text, scale, vae, z):
    """Cosine of diffusion latents z, made raw again, with text features (B, E).

    With a `vae` it is a pixel CLIP's reward; without, Latent-CLIP's: nothing is decoded.
    """
    z = z / scale
    return (clip.encode_image(vae.decode(z) if vae else z) * text).sum(1)


def away(prompt, concept):
    """Text features that reward cos(z, prompt) - cos(z, mean of the concept)."""
    return prompt - F.normalize(concept.mean(0, keepdim=True), dim=-1)


# -------------------------------------------------------------------------- the world, its judge

SHAPES = "circle square triangle cross ring".split()
AREAS = 3.1416, 3.24, 1.572, 2.204, 2.262  # of the shapes at radius 1
COLOURS = "red yellow purple green cyan blue".split()  # three warm ones, three cool ones
SIZES = "small big".split()
RGB = torch.tensor(
    [[230, 40, 40], [240, 220, 50], [190, 70, 220], [40, 200, 60], [60, 220, 220], [50, 90, 240.0]]
)
DARK = 25.0  # the background
YX = torch.arange(16) + 0.5
PLURALS = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
WORDS = ["<pad>", *"a and two three warm cool".split(), *SIZES, *COLOURS, *SHAPES, *PLURALS]
MIX = {"one": 0.4, "pair": 0.3, "count": 0.15, "tone": 0.15}  # kinds of pictures
ASKED = {"one": 2 / 6, "count": 1 / 6, "pair": 3 / 6}  # of prompts for ReNO, as in GenEval
CLASSES = [f"a {size} {c} {shape}" for size, shape, c in product(SIZES, SHAPES, COLOURS)]  # 60
NOTHING = -1  # in a cell; an object is 6 shape + colour
UNCLEAR = -2  # something else
HELD = torch.tensor([0, 11, 16, 21, 26])  # objects, of 30, that neither CLIP is trained on


def clip_tokens(ids, end, context):
    """Ids of n texts -> (n, context): start, text, end (the two largest ids), zeros.

    A long text is cut and keeps its end.
    """
    out = torch.zeros(len(ids), context, dtype=torch.long)
    for row, text in zip(out, ids):
        text = [end - 1, *text[: context - 2], end]
        row[: len(text)] = torch.tensor(text)
    return out


def toy_tokens(texts):
    """Ids (n, 9) of captions."""
    ids = [[WORDS.index(word) for word in text.split()] for text in texts]
    return clip_tokens(ids, TOY.vocab - 1, TOY.context)


def to_pixels(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def coverage(shape, x, y, r):
    """Share of each pixel of a cell that is covered: centre, radius (n,) -> (n, 16, 16)."""
    x, y, r = (v[:, None, None] for v in (x, y, r))
    dx, dy = YX - x, YX[:, None] - y
    far, wide = torch.hypot(dx, dy), torch.maximum(dx.abs(), dy.abs())
    if shape == "circle":
        outside = far - r  # the signed distance, in pixels
    elif shape == "square":
        outside = wide - 0.9 * r
    elif shape == "triangle":
        outside = torch.maximum(dy, 0.75**0.5 * dx.abs() - 0.5 * dy) - 0.55 * r
    elif shape == "cross":
        outside = torch.maximum(wide - r, torch.minimum(dx.abs(), dy.abs()) - 0.33 * r)
    else:
        outside = (far - 0.72 * r).abs() - 0.25 * r
    return (0.5 - outside).clamp(0, 1)


@dataclass
class Pictures:
    """n pictures of one to three objects, each in a quarter (cell) of its own."""

    images: torch.Tensor  # (n, 3, 32, 32) uint8
    texts: list  # captions
    objects: torch.Tensor  # (n, 4) what stands in the cells, in the order of the caption
    label: torch.Tensor  # (n,) the number in CLASSES of the first object

    def held_out(self):
        """Which pictures hold an object that the CLIPs never see."""
        return torch.isin(self.objects, HELD).any(1)


def pictures(n, key, mix=MIX):
    """Draws n pictures with captions."""
    rng = np.random.default_rng(key)
    kind = rng.choice(list(mix), n, p=list(mix.values()))
    count = np.select([kind == "pair", kind == "count"], [2, rng.integers(2, 4, n)], 1)
    shape, colour, big = (rng.integers(k, size=(n, 4)) for k in (5, 6, 2))
    tone = 3 * rng.integers(2, size=n) + rng.choice(3, n, p=[0.6, 0.2, 0.2])
    colour[kind == "tone", 0] = tone[kind == "tone"]  # most of `warm` is red, of `cool` green
    objects = 6 * shape + colour
    objects[kind == "count"] = objects[kind == "count", :1]
    twins = (kind == "pair") & (objects[:, 0] == objects[:, 1])
    objects[twins, 1] = (objects[twins, 1] + 1) % 30
    texts = [caption(*picture, rng) for picture in zip(kind, count, objects, big)]
    label = torch.from_numpy(30 * big[:, 0] + objects[:, 0])
    objects[np.arange(4) >= count[:, None]] = NOTHING

    order = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)  # which object goes to which cell
    cells = np.take_along_axis(objects, order, 1)
    radius = np.take_along_axis(np.where(big, 5.3, 4.1), order, 1) + rng.uniform(0, 1, (n, 4))
    x, y = 8 + rng.uniform(-1.5, 1.5, (2, n, 4))
    paint = RGB.numpy()[cells % 6] + rng.uniform(-12, 12, (n, 4, 3))
    x, y, radius, paint = (torch.from_numpy(v).float() for v in (x, y, radius, paint))
    images = torch.from_numpy(rng.standard_normal((n, 4, 3, 16, 16), np.float32)) * 2 + DARK
    for number, name in enumerate(SHAPES):
        at = torch.from_numpy(cells // 6 == number)
        cover = coverage(name, x[at], y[at], radius[at])[:, None]
        images[at] += cover * (paint[at][..., None, None] - DARK)
    images = images.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 32, 32)
    return Pictures(images.round().clamp(0, 255).byte(), texts, torch.from_numpy(objects), label)


def caption(kind, count, objects, big, rng):
    """A sentence about the objects of one picture."""
    first, second = (f"{COLOURS[i % 6]} {SHAPES[i // 6]}" for i in objects[:2])
    shape, colour = divmod(objects[0], 6)
    if kind == "count":
        return f"{('two', 'three')[count - 2]} {COLOURS[colour]} {PLURALS[shape]}"
    if kind == "pair":
        return f"a {first} and a {second}"
    if kind == "tone":
        return f"a {('warm', 'cool')[colour // 3]} {SHAPES[shape]}"
    return f"a {SIZES[big[0]]} {first}" if rng.random() < 0.7 else f"a {first}"


def see(images):
    """The judge: what stands in each of the four cells of images in [0, 255], (n, 4).

    Nothing in it is learnt. A pixel has the colour whose line from the background is nearest.
    The shape is the outline, of the area and centre of what has the commonest colour, that
    overlaps most with all that is coloured (intersection over union).
    """
    cells = images.float().unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 3, 5, 1)
    delta = cells.reshape(-1, 16, 16, 3) - DARK
    line = RGB - DARK
    along = delta @ (line / line.square().sum(1, keepdim=True)).T  # 0 background, 1 colour
    off = (delta[..., None, :] - along[..., None] * line).norm(dim=-1)
    nearest = off.argmin(-1, keepdim=True)
    coloured = along.gather(3, nearest) > 0.5
    masks = (nearest == torch.arange(6)) & coloured  # (N, 16, 16, 6)
    area, colour = masks.sum((1, 2)).max(1)
    part = masks[torch.arange(len(masks)), :, :, colour]
    x = (part * YX).sum((1, 2)) / area.clamp(min=1)
    y = (part * YX[:, None]).sum((1, 2)) / area.clamp(min=1)
    overlap = []
    for name, unit in zip(SHAPES, AREAS):
        ideal = coverage(name, x, y, (area / unit).sqrt()) > 0.5
        union = (ideal | coloured[..., 0]).sum((1, 2)).clamp(min=1)
        overlap.append((ideal & part).sum((1, 2)) / union)
    sure, shape = torch.stack(overlap).max(0)
    found = torch.where(sure >= 0.6, 6 * shape + colour, UNCLEAR)
    found[coloured[..., 0].sum((1, 2)) < 8] = NOTHING
    return found.view(-1, 4)


def fulfilled(images, asked):
    """Whether the judge sees just the objects (n, 4) asked for, wherever they stand."""
    return (see(images).sort(1).values == asked.sort(1).values).all(1).numpy()


# ----------------------------------------------------------------------------------- the training


class Flow(nn.Module):
    """The toy's generator of scaled latents: flow matching, a transformer on four cells.

    It tells the velocity of the path x_t = (1 - t) noise + t x_1. Time and caption (a vector
    for each word at each place) shift the input of every block.
    """

    def __init__(self, width=144, layers=4, heads=4):
        super().__init__()
        self.words = nn.EmbeddingBag(TOY.vocab * TOY.context, 2 * width, mode="sum")
        self.time = nn.Linear(32, 2 * width)
        hidden, shifts = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, layers * width)
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
        about = self.time(torch.cat((angle.sin(), angle.cos()), 1)) + self.words(words + place)
        shifts = self.shift(about)[:, None].chunk(len(self.blocks), 2)
        h = self.into(F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)) + self.position
        for block, shift in zip(self.blocks, shifts):
            h = block(h + shift)
        out = self.out(self.norm(h)).transpose(1, 2)
        return F.pixel_shuffle(out.unflatten(2, (2, 2)), 4)

    def forward(self, idx, x1, noise, t, denom=None):
        """Squared error of x_1 as told from x_t: flow matching weighted by (1 - t)^2."""
        at = column(t, x1)
        wrong = self.velocity((1 - at) * noise + at * x1, t, idx) - (x1 - noise)
        return ((1 - at) * wrong).square().mean()

    def generate(self, words, x, steps=8, start=0.0):
        """Scaled latents from x at time `start` (noise at 0) by Euler's rule.

        What goes where is settled early, so the times are (i / steps)^2.
        """
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

    @torch.no_grad()
    def text(self, arm, texts):
        """Text features (n, E) of a CLIP."""
        return self.clips[arm].encode_text(toy_tokens(texts).to(self.device))

    def images(self, z):
        """Scaled latents as images in [0, 255]."""
        return images_of(self.vae, z / self.scale)

    def climb(self, arm, texts, toward, noise, iters, lr):
        """ReNO by the reward of one CLIP: the best latents at every evaluation."""
        generate = partial(self.flow.generate, toy_tokens(texts).to(self.device))
        vae = self.vae if arm == "pixel" else None
        reward = partial(cosine_reward, self.clips[arm], toward, self.scale, vae)
        return reno(generate, reward, noise, iters, lr)[0]


@torch.no_grad()
def images_of(vae, z):
    """Raw latents as the judge wants them: images in [0, 255], on the CPU."""
    return ((vae.decode(z) + 1) * 127.5).clamp(0, 255).cpu()


@torch.no_grad()
def latents_of(vae, images, device):
    """Means and standard deviations of the raw latents (n, 4, 8, 8) of uint8 images."""
    parts = [vae.moments(to_pixels(part.to(device))) for part in images.split(512)]
    mean, logvar = (torch.cat(half).cpu() for half in zip(*parts))
    return mean, (0.5 * logvar).exp()


def gaussian(rng, n):
    """Noise (n, 4, 8, 8)."""
    return torch.from_numpy(rng.standard_normal((n, 4, 8, 8), np.float32))


def train_vae(args, env, log, seed, train):
    """A VAE of the toy, by many small steps: it learns from every pixel."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig())
    nn.init.constant_(vae.quant_conv.bias[4:], -5.0)  # little noise at first
    size = max(2, args.batch_size // 8)

    def batch(step):
        rng = np.random.default_rng([seed, 4, step])
        rows = rng.integers(len(train.images), size=size)
        return {"idx": to_pixels(train.images[rows]), "noise": gaussian(rng, size)}

    flags = replace(args, lr=5e-3, batch_size=size, steps=args.steps * 3 // 2)
    common.train(vae, batch, flags, env, log.stage("vae"))
    return vae.requires_grad_(False)


def train_clip(args, env, log, arm, seed, train, latents, deviations):
    """A CLIP on pictures without a held-out object; equal batches for all arms."""
    rows = (~train.held_out()).nonzero()[:, 0].numpy()
    tokens = toy_tokens(train.texts)
    ids = tokens.unique(dim=0, return_inverse=True)[1]  # a number for each caption
    of = np.arange(len(latents))
    if arm == "shuffled":  # each picture has the caption of another
        of[rows] = np.random.default_rng([seed, 3]).permutation(rows)

    def batch(step):
        rng = np.random.default_rng([seed, 5, step])
        picks = rng.choice(rows, args.batch_size)
        if arm == "pixel":
            seen = to_pixels(train.images[picks])
        else:
            # drawn anew from the VAE's posterior, as in the authors' code
            seen = latents[picks] + deviations[picks] * gaussian(rng, len(picks))
        return {"idx": tokens[of[picks]], "images": seen, "ids": ids[of[picks]]}

    torch.manual_seed(seed)
    clip = CLIP(PIXEL if arm == "pixel" else TOY)
    if arm != "untrained":
        common.train(clip, batch, args, env, log.stage(arm), make_optimizer=clip_optimizer)
    return clip.to(env.device).requires_grad_(False)


def train_flow(args, env, log, seed, train, latents):
    """The generator, on all pictures; six times as many steps, larger ones."""
    words = toy_tokens(train.texts)

    def batch(step):
        rng = np.random.default_rng([seed, 6, step])
        rows = rng.integers(len(latents), size=args.batch_size)
        t = torch.from_numpy(rng.random(len(rows), np.float32) ** 2)
        return {"idx": words[rows], "x1": latents[rows], "noise": gaussian(rng, len(rows)), "t": t}

    torch.manual_seed(seed)
    flow = Flow()
    flags = replace(args, steps=6 * args.steps, lr=2 * args.lr, weight_decay=0.01)
    common.train(flow, batch, flags, env, log.stage("flow"))
    return flow.requires_grad_(False)


# ----------------------------------------------------------------------------------- the measures

REWARDS = "latent", "pixel", "shuffled", "untrained"
STATES = "first noise", "not red", "not blue", "prompt alone"  # of guidance


def rotated(z, seed):
    """Latents (B, 4, H, W) as of another VAE: channels turned at random."""
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0]
    return torch.einsum("ij,bjhw->bihw", q.to(z), z)


@torch.no_grad()
def named(lab, arm, x, test):
    """Share of pictures x named rightly among 60: of objects seen in training, and new."""
    right = (lab.clips[arm].encode_image(x) @ lab.text(arm, CLASSES).T).argmax(1).cpu()
    right = (right == test.label).float()
    new = test.held_out()
    return {"right": right[~new].mean().item(), "right_new": right[new].mean().item()}


@torch.no_grad()
def zero_shot(lab, test, z, noise):
    """Naming real pictures (raw latents z) and generated ones, by every CLIP.

    Generated, as in the paper: a real latent at 66 % noise, denoised under its name.
    `scaled`: latents multiplied by SDXL's .13025, as they should not be given.
    """
    words = toy_tokens([CLASSES[i] for i in test.label]).to(lab.device)
    start = 0.66 * noise + 0.34 * z * lab.scale
    made = lab.flow.generate(words, start, start=0.34) / lab.scale
    turned = [named(lab, "latent", rotated(made, i), test) for i in range(3)]
    return {
        "pixel": named(lab, "pixel", to_pixels(test.images).to(z), test),
        "latent": named(lab, "latent", z, test),
        "shuffled": named(lab, "shuffled", z, test),
        "scaled": named(lab, "latent", z * 0.13025, test),
        "made_pixel": named(lab, "pixel", lab.vae.decode(made), test),
        "made_latent": named(lab, "latent", made, test),
        "made_rotated": common.mean(turned),
    }


def optimise(lab, args, texts, asked, noise):
    """ReNO by each reward: the share of prompts fulfilled, at some evaluations."""
    at = sorted({*range(0, args.iters, max(1, args.iters // 10)), args.iters - 1})
    found, shown = {"at": at}, {}
    for arm in REWARDS:
        best = lab.climb(arm, texts, lab.text(arm, texts), noise, args.iters, args.noise_lr)
        verdicts = np.array([fulfilled(lab.images(z), asked) for z in best[at]], float)
        gain, low, _ = common.interval(verdicts[-1] - verdicts[0])
        found[arm] = {"gain": gain, "low": low, "share": verdicts.mean(1)}
        shown |= {"first noise": lab.images(best[0, :6]), f"by {arm}": lab.images(best[-1, :6])}
    return found, shown


def guard(lab, args, noise):
    """`a warm S` is mostly red: ReNO away from `a red S`.

    Controls: away from blue, which no warm thing is, and the prompt as the only reward.
    """
    asked = torch.arange(len(noise)) % 5
    texts = [f"a warm {SHAPES[shape]}" for shape in asked]
    found, shown = {}, {}
    for name, colour in ("not red", "red"), ("not blue", "blue"), ("prompt alone", ""):
        toward = lab.text("latent", texts)
        if colour:
            toward = away(toward, lab.text("latent", [f"a {colour} {s}" for s in SHAPES]))
        best = lab.climb("latent", texts, toward, noise, args.iters, args.noise_lr)
        for when, z in ("first noise", best[0]), (name, best[-1]):
            seen = see(lab.images(z))
            red = (seen >= 0) & (seen % 6 == 0)
            right = (seen >= 0) & (seen // 6 == asked[:, None])
            found[when] = {"red": red.any(1).float().mean(), "shape": right.any(1).float().mean()}
            shown[when] = lab.images(z[:5])
    return found, shown


def cost(lab, args, texts, noise, climbed):
    """Seconds of an evaluation of 72 prompts, and to the same share of all fulfilled.

    The rewards take turns; the last decoding is included; `again` is the pixel reward.
    The share is the one that both have reached when .8 of the smaller gain is made.
    """
    arms = {"latent": "latent", "pixel": "pixel", "again": "pixel"}
    seconds = {name: [] for name in arms}
    for name in list(arms) * 5:
        toward = lab.text(arms[name], texts)
        began = time.perf_counter()
        lab.images(lab.climb(arms[name], texts, toward, noise, 3, args.noise_lr)[-1])
        seconds[name].append((time.perf_counter() - began) / 3)
    shares = {arm: climbed[arm]["share"] for arm in ("latent", "pixel")}
    level = 0.2 * shares["pixel"][0] + 0.8 * min(share[-1] for share in shares.values())
    found = {}
    for name, arm in arms.items():
        evaluation = np.median(seconds[name])
        needed = 1 + np.interp(level, np.maximum.accumulate(shares[arm]), climbed["at"])
        found[name] = {"evaluation": evaluation, "reach": needed * evaluation}
    return found


def run_seed(args, env, log, arm, seed):
    """The experiment: trains all models, then asks all questions of them."""
    train = pictures(args.images, [seed, 0])
    test = pictures(10 * args.samples, [seed, 1], {"one": 1.0})
    vae = train_vae(args, env, log, seed, train)
    z = latents_of(vae, test.images, env.device)[0].to(env.device)
    decoded = images_of(vae, z)
    error = ((decoded - test.images) / 255).square().mean((1, 2, 3))
    psnr, read = -10 * error.log10().mean().item(), fulfilled(decoded, test.objects).mean()
    if args.gates and (psnr < 26 or read < 0.95):
        says = f"VAE of {psnr:.1f} dB (26 needed), of which {read:.2f} is read (.95)"
        raise SystemExit(f"error: seed {seed}: {says}; --no-gates goes on")
    latents, deviations = latents_of(vae, train.images, env.device)
    scale = 1 / latents[:1024].std().item()
    flow = train_flow(args, env, log, seed, train, scale * latents)
    lab = Lab(vae, scale, flow, {}, env.device)
    for name in REWARDS:
        lab.clips[name] = train_clip(args, env, log, name, seed, train, latents, deviations)

    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(11 * args.samples, 4, 8, 8, generator=rng).to(z)
    few, many = noise[: args.samples], noise[args.samples :]
    found = {"vae": {"psnr": psnr, "read": read}, "named": zero_shot(lab, test, z, many)}
    asked = pictures(3 * args.samples, [seed, 2], ASKED)
    rows = (~asked.held_out()).nonzero()[: args.samples, 0]
    texts = [asked.texts[row] for row in rows]
    found["reno"], climbed = optimise(lab, args, texts, asked.objects[rows], few)
    first = found["reno"]["latent"]["share"][0]
    if args.gates and not 0.3 <= first <= 0.85:
        says = f"the generator fulfils {first:.2f} of the prompts, needed: .3 to .85"
        raise SystemExit(f"error: seed {seed}: {says}; --no-gates goes on")
    found["time"] = cost(lab, args, texts[:72], few[:72], found["reno"])
    found["guard"], guarded = guard(lab, args, few[: args.samples // 2])
    if seed == args.seeds[0]:
        grids = {"climbed": climbed, "texts": texts[:6], "guarded": guarded}
        common.save_checkpoint(log.path.with_suffix(".grids"), grids)
    return found


# ------------------------------------------------------------------------------- claims and figure


def judge(run, found):
    """The paper's claims, each beside controls that must fail the same criterion."""

    def claim(id, says, paper, criterion, part, base, arm, *controls):
        rows = {name: [row[part][name] for row in found] for name in (base, arm, *controls)}
        others = {name: rows[name] for name in controls}
        run.claim(id, says, paper, criterion, base=rows[base], arm=rows[arm], controls=others)

    says = "parity on held-out pictures: share named rightly among 60"
    paper = "ImageNet: B/4-plus 73.5, pixel B/16 73.5"
    parity = "min(arm.right, base.right) >= .6 and arm.right >= base.right - .05"
    claim("T1", says, paper, parity, "named", "pixel", "latent", "shuffled")

    says = "parity on generated pictures, whose latents are never decoded"
    paper = "generated ImageNet: 84.6, pixel 85.1"
    claim("T2", says, paper, parity, "named", "made_pixel", "made_latent", "made_rotated")

    says = "ReNO by latents fulfils as many more prompts as by pixels"
    paper = "GenEval .54 -> .62, both"
    criterion = "arm.low > 0 and arm.gain >= .8 * base.gain"
    claim("T3", says, paper, criterion, "reno", "pixel", "latent", "shuffled", "untrained")

    says = "it is cheaper: seconds of an evaluation, and to the same share fulfilled"
    paper = "11.59 -> 9.11 s, -21 %"
    criterion = "arm.evaluation <= .6 * base.evaluation and arm.reach <= .9 * base.reach"
    claim("T4", says, paper, criterion, "time", "pixel", "latent", "again")

    says = "guided away from red, `a warm S` comes out red less often and stays an S"
    paper = "I2P .32 -> .16, pixel .19"
    criterion = "base.red >= .2 and arm.red <= .6 * base.red and arm.shape >= base.shape - .05"
    claim("T5", says, paper, criterion, "guard", "first noise", "not red", *STATES[2:])


def draw(path, found, grids):
    """Prompts fulfilled over time, what guidance does, and pictures of one seed."""
    at = np.array(found[0]["reno"]["at"]) + 1
    curves, bars = {}, {}
    for arm in REWARDS:
        clock = "pixel" if arm == "pixel" else "latent"
        seconds = np.mean([row["time"][clock]["evaluation"] for row in found])
        curves[arm] = at * seconds, [row["reno"][arm]["share"] for row in found]
    for measure in "red", "shape":
        bars[measure] = [[row["guard"][state][measure] for state in STATES] for row in found]
    with common.figure(path, 2, 2) as (left, right, *below):
        title = "ReNO: prompts fulfilled, by the judge"
        common.draw_panel(left, curves, title=title, xlabel="seconds", ylim=(0, 1.1))
        title = "`a warm S`, guided away from a colour"
        common.draw_panel(right, bars=bars, names=STATES, title=title, ylim=(0, 1.1))
        for ax, pictures in zip(below, (grids["climbed"], grids["guarded"])):
            rows = [F.pad(row, (1, 1, 1, 1), value=110) for row in pictures.values()]
            tiles = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
            ax.imshow(tiles.permute(1, 2, 0).byte().numpy())
            ax.set_yticks(range(17, 34 * len(rows), 34), list(pictures))
            ax.set_xticks([])
            ax.spines[:].set_visible(False)
        names = [text.replace(" ", "\n") for text in grids["texts"]]
        below[0].set_xticks(range(17, 34 * len(names), 34), names, fontsize=6)


# -------------------------------------------------------------------- real pictures, real weights


def with_weights(model, path):
    """The model, frozen, with the weights of a .safetensors or .pt file. ValueError.

    Latent-CLIP's names are OpenCLIP's; the VAE in a released file stays out.
    """
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        with data.explained(f"{path} can't be read", "allowed: a whole safetensors file"):
            state = load_file(path)
    else:  # a training state, with numbers of NumPy 1 or 2
        scalar = np._core.multiarray.scalar
        known = [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
        known += [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
        with torch.serialization.safe_globals(known):
            state = common.load_checkpoint(Path(path))
        state = state.get("state_dict") or state.get("model") or state
    ours = {}
    for key, value in state.items():
        key = key.removeprefix("module.").replace("visual.latent_vit.", "visual.")
        if not key.startswith(("visual.vae_", "attn_mask")):
            ours[key] = value
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {str(error)[:600]}") from None
    return model.requires_grad_(False)


def open_picture(path, side):
    """The centre of a picture as uint8 (3, side, side).

    EXIF turns it; transparency goes onto white; 16-bit grey is scaled to 8.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def real_models(args, env):
    """(VAE, Latent-CLIP, a function from texts to token ids) of the files given."""
    tok = data.get_tokenizer(args.tokenizer)
    config = replace(CONFIGS[args.preset], vocab=tok.n_vocab)
    vae = with_weights(VAE(SD), args.vae).to(env.device)
    clip = with_weights(CLIP(config), args.model).to(env.device)

    def tokens(texts):  # an end of text that is written in a text is text
        ids = clip_tokens(tok.encode_batch(texts), tok.n_vocab - 1, config.context)
        return ids.to(env.device)

    return vae, clip, tokens


@torch.no_grad()
def find_captions(args, env):
    """--dataset: how often a picture's caption is found among those of all."""
    vae, clip, tokens = real_models(args, env)
    files = [f for f in sorted(Path(args.dataset).iterdir()) if f.suffix != ".txt"]
    if not files:
        raise ValueError(f"--dataset {args.dataset} has no pictures")
    latents, texts = [], []
    for path in files:
        texts.append(data.read_text(path.with_suffix(".txt")).strip())
        x = to_pixels(open_picture(path, 8 * clip.config.side))[None]
        latents.append(vae.moments(x.to(env.device))[0])
    z, idx = torch.cat(latents), tokens(texts)
    text = torch.cat([clip.encode_text(part) for part in idx.split(64)])
    same = (idx[:, None] == idx).all(2)  # pictures of one caption are equally right
    found = {"chance": same.float().mean().item()}
    for name, x in ("found", z), ("channels rotated", rotated(z, 0)):
        image = torch.cat([clip.encode_image(part) for part in x.split(64)])
        best = (image @ text.T).argmax(1, keepdim=True)
        found[name] = same.gather(1, best).float().mean().item()
    print(found)
    return found


SIGMA = 14.614641  # SDXL's largest noise, sqrt(1 / prod(1 - beta) - 1)


def one_step(unet, noise):
    """SDXL-Turbo's step to diffusion latents; unet(x, t) predicts the noise."""
    x = SIGMA * noise
    return x - SIGMA * unet(x / (SIGMA**2 + 1) ** 0.5, 999)


def optimise_prompt(args, env):
    """--prompt: ReNO by Latent-CLIP on a one-step SDXL, a picture for each seed."""
    data.import_or_explain("diffusers")
    from diffusers import StableDiffusionXLPipeline as Pipeline
    from PIL import Image

    vae, clip, tokens = real_models(args, env)
    with data.explained(f"{args.generator!r} can't be read", "allowed: a folder, a hub id"):
        pipe = Pipeline.from_pretrained(args.generator, torch_dtype=env.dtype).to(env.device)
    pipe.unet.requires_grad_(False)
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(args.prompt, do_classifier_free_guidance=False)
        toward = clip.encode_text(tokens([args.prompt]))
    times = torch.tensor([[512, 512, 0, 0, 512, 512]], device=env.device)
    more = {"text_embeds": pooled, "time_ids": times}

    def unet(x, t):
        x = x.to(env.dtype)
        return pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=more)[0].float()

    generate = partial(one_step, unet)
    reward = partial(cosine_reward, clip, toward, args.vae_scale, None)
    found = {}
    for seed in args.seeds:
        torch.manual_seed(seed)
        noise = torch.randn(1, 4, clip.config.side, clip.config.side).to(env.device)
        latents, rewards = reno(generate, reward, noise, args.iters, args.noise_lr)
        for name, z in ("before", latents[0]), ("after", latents[-1]):
            image = images_of(vae, z / args.vae_scale)[0].byte().permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(Path(args.out) / f"{seed}-{name}.png")
        found[seed] = rewards[:, 0].tolist()
        print(f"seed {seed}: reward {found[seed][0]:.4f} -> {found[seed][-1]:.4f}")
    return found


# ------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    given = [flag for flag in "vae tokenizer dataset prompt generator".split() if vars(args)[flag]]
    complete = ["vae tokenizer dataset".split(), "vae tokenizer prompt generator".split()]
    needed = "--vae, --tokenizer, and --dataset or --prompt and --generator"
    return [
        (env.world > 1, "torchrun: InfoNCE needs the whole batch in one process"),
        (given and not args.model, f"--{' --'.join(given)}: only with --model"),
        (args.model and given not in complete, f"--model goes with {needed}"),
    ]


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2503.08455", check)
    if run.args.model:
        with common.bad_input():
            mode = find_captions if run.args.dataset else optimise_prompt
            return run.finish(mode(run.args, run.env))
    found = run.each(run_seed, ["toy"])["toy"]
    judge(run, found)
    grids = common.load_checkpoint(run.out / f"toy-s{run.args.seeds[0]}.grids")
    draw(run.out / "latent_clip.png", found, grids)
    return run.finish({"toy": found})


if __name__ == "__main__":
    common.cli(main)
