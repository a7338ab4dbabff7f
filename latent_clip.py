"""Latent-CLIP (arXiv 2503.08455): a CLIP that reads the latents of a VAE: rewards without decoding.

Latent diffusion makes a latent z and decodes it to pixels at the very end. A CLIP that judges
pixels must decode z each time it is asked, and back-propagate through the decoder. Latent-CLIP is
an ordinary CLIP whose ViT reads z itself: 4 channels, an eighth of the side. The paper trains two
on 2.7B pairs of latent and text. Zero-shot ImageNet equals that of pixel CLIPs of their size; as a
reward for ReNO, which climbs in the noise of a frozen generator, images are as good at 21 % less
time; as a guard it halves the rate of inappropriate images. A Latent-CLIP is tied to its VAE.

The toy: coloured shapes with captions. A VAE, a pixel CLIP and a Latent-CLIP that are trained
alike, a generator of latents by flow matching, all from scratch. A judge without any learnt part
reads the pictures. Controls: shuffled captions, an untrained CLIP, another VAE's latents (channels
rotated), a concept that has nothing to do with the prompt.

Two conventions cause most bugs: the ViT reads RAW latents (what a diffusion model works on,
divided by the VAE's scale), and channels come first. What the toy can't show: that parity survives
real pictures and captions, or what a decoder of 2.5 TFLOP costs.

Read on: `info_nce`, `CLIP`, `VAE`, `reno` (the method), `pictures` and `see` (the world and its
judge), `run_seed` (the experiment), `judge` (the claims).
"""

import math
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import common
import data

PAPER = dict(steps=415_039, batch_size=81_920, lr=1e-3, warmup=3000, clip=0.0, images=10**9)
PAPER |= dict(noise_lr=5.0, vae="madebyollin/sdxl-vae-fp16-fix")
PAPER |= dict(tokenizer="openai/clip-vit-large-patch14")
SMOKE = dict(images=160, steps=2, batch_size=8, samples=12, iters=2, log_every=1, jobs=1)


@dataclass
class Args(common.TrainFlags):
    """Latent-CLIP"""

    presets: ClassVar[dict] = {
        "smoke": SMOKE | dict(gates=False),
        "toy": {},
        "b8": PAPER,
        "b4plus": PAPER,
        "paper": PAPER,
    }
    limits: ClassVar[dict] = common.TrainFlags.limits | {
        **dict.fromkeys(("images", "samples"), (8,)),
        "iters": (1,),
        "noise_lr": (0,),
        "vae_scale": (1e-6,),
    }
    unused: ClassVar[set] = {"micro_batch", "shard", "eval_every"}  # InfoNCE needs the whole batch

    steps: int = 400  # of each CLIP; the VAE and the generator have their own (paper: 415,039)
    batch_size: int = 128  # pairs in a step, over all ranks (paper: 81,920)
    lr: float = 2e-3  # peak learning rate (paper: 1e-3)
    min_lr: float = 0.0  # where the cosine ends, as a share of --lr
    weight_decay: float = 0.2  # of matrices, embeddings, convolutions (OpenCLIP's)
    images: int = 24000  # pictures of the toy; at most so many of --dataset (paper: 2.7B)
    samples: int = 144  # prompts of ReNO and of guidance; ten pictures for each to be named
    iters: int = 50  # evaluations of ReNO (paper: 50)
    noise_lr: float = 1.2  # ReNO's step (paper: 5, in 64 times as many dimensions)
    gates: bool = True  # stop if VAE, judge or generator are too bad for the claims to mean much
    dataset: str = ""  # real pairs: a folder of pictures, a .txt caption beside each
    vae: str = ""  # VAE weights: a file, or ORG/NAME[:FILE] on the hub
    vae_scale: float = 0.13025  # what diffusion multiplies raw latents by (SD 1.x: .18215)
    tokenizer: str = ""  # CLIP's tokenizer.json: a file, a folder or a hub id
    init: str = ""  # weights of a Latent-CLIP; with --dataset they are measured, not trained
    prompt: list[str] = common.default_list()  # ReNO on these by --init, --vae, --generator; stop
    generator: str = ""  # one-step SDXL of `diffusers` for --prompt (paper: stabilityai/sdxl-turbo)
    concept: list[str] = common.default_list()  # what --prompt is guided away from


# ---------------------------------------------------------------------------------------- InfoNCE


class Gather(torch.autograd.Function):
    """The rows of all ranks, in order. Backward: the gradients of all ranks, summed, own rows."""

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


def info_nce(image, text, scale, ids=None):
    """This rank's share of the contrastive loss over the global batch, in nats.

    L = 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)]; the mean over ranks is the loss.
    image, text  (b, E) normalised features, the same b on every rank; `scale` multiplies cosines
    ids          (b,) numbers of captions: two pictures of one caption are no negatives of each
                 other (which matters in the toy only)
    """
    images, texts, numbers = image, text, ids  # of all ranks
    first = 0  # the first of this rank's rows among them
    if dist.is_initialized() and dist.get_world_size() > 1:
        images, texts = Gather.apply(image), Gather.apply(text)
        numbers = None if ids is None else Gather.apply(ids)
        first = dist.get_rank() * len(image)
    if len(images) < 2:
        raise ValueError("InfoNCE needs at least 2 pairs")
    labels = torch.arange(len(image), device=image.device) + first
    loss = 0
    for rows, columns in (image, texts), (text, images):
        logits = scale * rows @ columns.T
        if ids is not None:
            same = ids[:, None] == numbers
            same[labels - first, labels] = False
            logits = logits.masked_fill(same, -torch.inf)
        loss = loss + F.cross_entropy(logits, labels) / 2
    return loss


# ------------------------------------------------------------------------------------------- CLIP


@dataclass
class CLIPConfig:
    """Sizes of a CLIP; `side` and `patch` in the pixels of its own input."""

    side: int = 8
    patch: int = 2
    channels: int = 4
    width: int = 96
    layers: int = 4
    heads: int = 4
    embed: int = 64
    vocab: int = 27
    context: int = 9
    text_width: int = 96
    text_heads: int = 4
    text_layers: int = 2


BASE = dict(side=64, width=768, layers=12, heads=12, vocab=49408, context=77, text_layers=12)
TOY = CLIPConfig()
PIXEL = replace(TOY, side=32, patch=8, channels=3)  # as many patches, the same trunk
B8 = CLIPConfig(patch=8, embed=512, text_width=512, text_heads=8, **BASE)
B4PLUS = CLIPConfig(patch=4, embed=640, text_width=640, text_heads=10, **BASE)
CONFIGS = {"smoke": TOY, "toy": TOY, "b8": B8, "b4plus": B4PLUS, "paper": B8}


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
        self.transformer = transformer(c.width, c.layers, c.heads, False)
        self.ln_post = nn.LayerNorm(c.width)
        self.proj = nn.Parameter(std * torch.randn(c.width, c.embed))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((first, x), 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Two towers into one space, with OpenCLIP's names. Latent-CLIP is this with 4 channels."""

    def __init__(self, config):
        super().__init__()
        w = config.text_width
        self.config = config
        self.visual = ViT(config)
        self.token_embedding = nn.Embedding(config.vocab, w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, w))
        self.transformer = transformer(w, config.text_layers, config.text_heads, True)
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
        """Normalised features (B, E) of raw latents, or of pixels in [-1, 1].

        Latents of twice the side are pooled to fit, as the authors do.
        """
        c = self.config
        if x.dim() != 4 or x.shape[1] != c.channels:
            needed = f"channels-first (B, {c.channels}, H, W)"
            raise ValueError(f"latents must be {needed}, not {tuple(x.shape)}")
        if x.shape[2] == 2 * c.side:
            x = F.avg_pool2d(x, 2)
        if x.shape[2:] != (c.side, c.side):
            reads = f"this model reads {c.side} x {c.side} or twice that"
            raise ValueError(f"input of {tuple(x.shape[2:])}, {reads}")
        return F.normalize(self.visual(x), dim=-1)

    def encode_text(self, tokens):
        """Normalised features (B, E) of ids (B, T): read at the end of text, the largest id.

        What stands behind the last end of text of the batch is left out. This is exact: attention
        is causal, and nothing is read there.
        """
        end = tokens.argmax(1)
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        return F.normalize(x[torch.arange(len(x)), end] @ self.text_projection, dim=-1)

    def forward(self, idx, images, ids=None, denom=None):
        """The loss of pairs: token ids `idx` (b, T), images or latents, numbers of captions."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(100))
        image, text = self.encode_image(images), self.encode_text(idx)
        return info_nce(image, text, self.logit_scale.exp(), ids)


def clip_tokens(tok, context, texts):
    """CLIP's ids (n, context): start, text, end (the two largest ids), zeros.

    A long text is cut and keeps its end. An end that is written in a text is text.
    """
    end = tok.n_vocab - 1
    out = torch.zeros(len(texts), context, dtype=torch.long)
    for row, ids in zip(out, tok.encode_batch(list(texts))):
        ids = [end - 1, *ids[: context - 2], end]
        row[: len(ids)] = torch.tensor(ids)
    return out


def clip_optimizer(clip, args):
    """AdamW as OpenCLIP sets it up: no decay of gains, biases and the logit scale."""
    decayed, plain = [], []
    for name, p in clip.named_parameters():
        gain_or_bias = "ln_" in name or "bias" in name or p.ndim < 2
        (plain if gain_or_bias else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# -------------------------------------------------------------------------------------------- VAE


@dataclass
class VAEConfig:
    """Sizes of an AutoencoderKL; the side shrinks by f = 2 ** (len(widths) - 1)."""

    widths: tuple = (16, 32, 32)
    layers: int = 1
    groups: int = 8
    latent: int = 4


SD = VAEConfig((128, 256, 512, 512), 2, 32)  # of Stable Diffusion 1, 2, XL


class ResBlock(nn.Module):
    """Two convolutions beside an identity, or a 1x1 convolution where the width changes."""

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


class Resample(nn.Module):
    """Halves the side (padded on the right and below only) or doubles it (nearest)."""

    def __init__(self, width, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, 2 if down else 1, 0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2))


class Half(nn.Module):
    """The encoder (3 -> 2 x latent channels) or the decoder (latent -> 3): stages and a middle."""

    def __init__(self, c, down):
        super().__init__()
        side = "down" if down else "up"
        widths = c.widths if down else c.widths[::-1]
        layers = c.layers if down else c.layers + 1
        self.conv_in = nn.Conv2d(3 if down else c.latent, widths[0], 3, padding=1)
        stages, before = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            blocks = [ResBlock(before, width, c.groups)]
            blocks += [ResBlock(width, width, c.groups) for _ in range(layers - 1)]
            stages.append(nn.ModuleDict({"resnets": nn.ModuleList(blocks)}))
            if i + 1 < len(widths):
                stages[i][f"{side}samplers"] = nn.ModuleList([Resample(width, down)])
            before = width
        self.add_module(f"{side}_blocks", stages)
        width = c.widths[-1]
        resnets = nn.ModuleList([ResBlock(width, width, c.groups) for _ in range(2)])
        attentions = nn.ModuleList([PixelAttention(width, c.groups)])
        self.mid_block = nn.ModuleDict({"resnets": resnets, "attentions": attentions})
        self.conv_norm_out = nn.GroupNorm(c.groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent if down else 3, 3, padding=1)
        middle = [resnets[0], attentions[0], resnets[1]]
        outer = []
        for stage in stages:
            for parts in stage.values():
                outer += parts
        self.order = outer + middle if down else middle + outer

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.order:
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL with diffusers' names: images (B, 3, H, W) <-> raw latents (B, 4, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        self.f = 2 ** (len(config.widths) - 1)
        self.encoder = Half(config, True)
        self.decoder = Half(config, False)
        self.quant_conv = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)
        self.post_quant_conv = nn.Conv2d(config.latent, config.latent, 1)
        self.blocks = [*self.encoder.order, *self.decoder.order]

    def moments(self, x):
        """Mean and log-variance of the raw latents of images in [-1, 1]."""
        if x.shape[2] % self.f or x.shape[3] % self.f:
            needed = f"both sides must be multiples of {self.f}"
            raise ValueError(f"image of {x.shape[2]} x {x.shape[3]}: {needed}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Images of raw latents, in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, idx, noise, denom=None):
        """The training loss of images `idx`: L1 for edges, squares for colours, 1e-4 KL.

        L1 alone is slow to see colours: most of a picture is background, and so is the median.
        """
        mean, logvar = self.moments(idx)
        image = self.decode(mean + (0.5 * logvar).exp() * noise)
        return F.l1_loss(image, idx) + F.mse_loss(image, idx) + 1e-4 * kl(mean, logvar).mean()


def kl(mean, logvar):
    """KL(N(mean, e^logvar) || N(0, 1)) of every element, in nats."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


# ------------------------------------------------------------------------------------------- ReNO


def norm_loss(noise):
    """Negative log-density of the norm n of noise (B, ...): n^2 / 2 - (d - 1) ln n, in fp32.

    It is least at n = sqrt(d - 1), where the norm of Gaussian noise lies.
    """
    n = noise.float().flatten(1).norm(dim=1)
    return 0.5 * n**2 - (noise[0].numel() - 1) * n.log()


def reno(generate, reward, noise, iters=50, lr=5.0, clip=0.1, reg=0.01, momentum=0.9):
    """Reward-based noise optimisation (ReNO) of a batch, exactly as each row alone would go.

    generate(noise) -> latents and reward(latents) -> (B,) are frozen. SGD with Nesterov momentum
    on reg * norm_loss - reward; gradients are clipped row by row; no step follows the last
    evaluation. Returns the best latents (iters, B, ...) so far at every evaluation, the first
    included, and their rewards (iters, B).
    """
    velocity = torch.zeros_like(noise)
    latents, rewards = [], []
    for i in range(iters):
        noise = noise.detach().requires_grad_()
        z = generate(noise)
        value = reward(z)
        if not value.isfinite().all():
            needed = "models in bf16 or fp32, not fp16"
            raise ValueError(f"the reward is not finite at evaluation {i}, needed: {needed}")
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


def latent_reward(clip, scale, text, z):
    """Cosine of diffusion latents z with text features (B, E): raw again, and never decoded."""
    return (clip.encode_image(z / scale) * text).sum(1)


def pixel_reward(clip, vae, scale, text, z):
    """The same by a CLIP that reads pixels: decodes, and back-propagates through the decoder."""
    return (clip.encode_image(vae.decode(z / scale)) * text).sum(1)


def away(prompt, concept):
    """Text features whose reward is cos(z, prompt) - cos(z, mean of the concept's texts)."""
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
YX = torch.arange(32) + 0.5
PLURALS = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
WORDS = ["<pad>", "<start>", *"a and two three warm cool".split()]
WORDS += [*SIZES, *COLOURS, *SHAPES, *PLURALS, "<end>"]
MIX = {"one": 0.45, "pair": 0.3, "count": 0.15, "tone": 0.1}  # kinds of pictures
CLASSES = [f"a {size} {c} {s}" for size in SIZES for s in SHAPES for c in COLOURS]  # 60
# (shape, colour): five of thirty pairs, each shape once, that neither CLIP is trained on
HELD = torch.tensor([[(i + j) % 6 == 0 for j in range(6)] for i in range(5)])


def to_pixels(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def toy_tokens(texts):
    """Ids (n, 9) of captions: start, words, end (the largest id), padding."""
    out = torch.zeros(len(texts), TOY.context, dtype=torch.long)
    for row, text in zip(out, texts):
        ids = [1, *map(WORDS.index, text.split()), len(WORDS) - 1]
        row[: len(ids)] = torch.tensor(ids)
    return out


def coverage(shape, x, y, r):
    """Share of each pixel that a shape covers: centres and radii (n,) -> (n, 32, 32)."""
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
    """n pictures of up to three objects; where there is no object, shape and colour are -1."""

    images: torch.Tensor  # (n, 3, 32, 32) uint8
    texts: list  # captions
    shape: torch.Tensor  # (n, 3)
    colour: torch.Tensor  # (n, 3)
    big: torch.Tensor  # (n, 3)

    def label(self):
        """The number in CLASSES of the first object of each picture."""
        return (self.big[:, 0] * 5 + self.shape[:, 0]) * 6 + self.colour[:, 0]

    def objects(self):
        """The (colour, shape) of each picture's objects, in order: what the judge should see."""
        rows = zip(self.colour.tolist(), self.shape.tolist())
        return [sorted((c, s) for c, s in zip(*row) if s >= 0) for row in rows]

    def held_out(self):
        """Whether a picture holds one of the pairs that the CLIPs never see."""
        return (HELD[self.shape, self.colour] & (self.shape >= 0)).any(1)


def pictures(n, key, mix=MIX):
    """Draws n pictures with captions: objects in the four cells of a picture, at most one each."""
    rng = np.random.default_rng(key)
    kind = rng.choice(list(mix), n, p=list(mix.values()))
    count = np.select([kind == "pair", kind == "count"], [2, rng.integers(2, 4, n)], 1)
    shape, colour, big = (rng.integers(k, size=(n, 3)) for k in (5, 6, 2))
    cell = rng.random((n, 4)).argsort(1)[:, :3]
    shape[kind == "count"] = shape[kind == "count", :1]
    colour[kind == "count"] = colour[kind == "count", :1]
    twins = (kind == "pair") & (shape[:, 0] == shape[:, 1]) & (colour[:, 0] == colour[:, 1])
    shape[twins, 1] = (shape[twins, 1] + 1) % 5
    tone = 3 * rng.integers(2, size=n) + rng.choice(3, n, p=[0.5, 0.25, 0.25])
    colour[kind == "tone", 0] = tone[kind == "tone"]  # half of `warm` is red, of `cool` green
    texts = [caption(*part, rng) for part in zip(kind, count, shape, colour, big)]
    radius = np.where(big, rng.uniform(5.3, 6.3, (n, 3)), rng.uniform(4.1, 5.1, (n, 3)))
    x = 8 + 16 * (cell % 2) + rng.uniform(-1.5, 1.5, (n, 3))
    y = 8 + 16 * (cell // 2) + rng.uniform(-1.5, 1.5, (n, 3))
    paint = RGB.numpy()[colour] + rng.uniform(-12, 12, (n, 3, 3))
    absent = np.arange(3) >= count[:, None]
    shape[absent] = colour[absent] = -1
    x, y, radius, paint = (torch.from_numpy(v).float() for v in (x, y, radius, paint))
    shape, colour, big = (torch.from_numpy(v) for v in (shape, colour, big))
    images = torch.from_numpy(rng.standard_normal((n, 3, 32, 32), np.float32)) * 2 + DARK
    for k in range(3):
        for i, name in enumerate(SHAPES):
            rows = shape[:, k] == i
            cover = coverage(name, x[rows, k], y[rows, k], radius[rows, k])[:, None]
            images[rows] += cover * (paint[rows, k][..., None, None] - DARK)
    images = images.round().clamp(0, 255).byte()
    return Pictures(images, texts, shape, colour, big)


def draw_prompts(n, key):
    """n captions of pairs that the CLIPs have seen, and the objects that each asks for."""
    drawn = pictures(3 * n, key, {"one": 0.4, "count": 0.3, "pair": 0.3})
    rows = (~drawn.held_out()).nonzero()[:n, 0].tolist()
    objects = drawn.objects()
    return [drawn.texts[i] for i in rows], [objects[i] for i in rows]


def caption(kind, count, shape, colour, big, rng):
    """A sentence about the objects of one picture; the size of a single one is named at times."""
    first, second = (f"{COLOURS[c]} {SHAPES[s]}" for c, s in zip(colour[:2], shape[:2]))
    if kind == "count":
        return f"{('two', 'three')[count - 2]} {COLOURS[colour[0]]} {PLURALS[shape[0]]}"
    if kind == "pair":
        return f"a {first} and a {second}"
    if kind == "tone":
        return f"a {('warm', 'cool')[colour[0] // 3]} {SHAPES[shape[0]]}"
    return f"a {SIZES[big[0]]} {first}" if rng.random() < 0.7 else f"a {first}"


def colour_masks(images):
    """Which pixels have which colour: (n, 6, 32, 32) of 0 and 1, for images in [0, 255].

    A pixel has the colour whose line from the background it is nearest to, from the half on.
    """
    delta = images.float().permute(0, 2, 3, 1) - DARK
    line = RGB - DARK
    along = delta @ (line / line.square().sum(1, keepdim=True)).T  # 0 background, 1 colour
    off = (delta[..., None, :] - along[..., None] * line).norm(dim=-1)
    best = off.argmin(-1, keepdim=True)
    there = (along.gather(3, best) > 0.5).float()
    return torch.zeros_like(along).scatter_(3, best, there).permute(0, 3, 1, 2)


def components(masks):
    """8-connected parts of at least 8 pixels in masks (m, 32, 32): whose they are, and (k, 32, 32).

    Every pixel has a number; the largest one spreads through its component.
    """
    wider = masks * torch.arange(1, 1025.0).view(32, 32)
    number = torch.zeros_like(wider)
    while not torch.equal(wider, number):
        number = wider
        wider = F.max_pool2d(number[:, None], 3, 1, 1)[:, 0] * masks
    flat = number.flatten(1).long()
    sizes = torch.zeros(len(flat), 1025, dtype=torch.long)
    sizes.scatter_add_(1, flat, torch.ones_like(flat))
    sizes[:, 0] = 0
    which, value = (sizes >= 8).nonzero(as_tuple=True)
    return which, number[which] == value[:, None, None]


def see(images):
    """The judge: for each of the images the (colour, shape) of its objects, in order.

    Nothing in it is learnt. A shape is the one whose outline of the same area and centre overlaps
    most with what is there; -1 below an overlap (intersection over union) of .5.
    """
    masks = colour_masks(images)
    image, colour = (masks.sum((2, 3)) >= 8).nonzero(as_tuple=True)
    which, parts = components(masks[image, colour])
    area = parts.sum((1, 2))
    x = (parts * YX).sum((1, 2)) / area
    y = (parts * YX[:, None]).sum((1, 2)) / area
    overlap = []
    for name, unit in zip(SHAPES, AREAS):
        ideal = coverage(name, x, y, (area / unit).sqrt()) > 0.5
        overlap.append((ideal & parts).sum((1, 2)) / (ideal | parts).sum((1, 2)))
    sure, shape = torch.stack(overlap).max(0)
    shape[sure < 0.5] = -1
    objects = [[] for _ in images]
    for n, c, s in zip(image[which].tolist(), colour[which].tolist(), shape.tolist()):
        objects[n].append((c, s))
    return [sorted(found) for found in objects]


# ----------------------------------------------------------------------------------- the training

EULER = 8  # steps of the generator
TOGETHER = 72  # prompts that ReNO climbs for at a time


class Flow(nn.Module):
    """The toy's generator of scaled latents by flow matching: a transformer on four quarters.

    It tells the velocity of the path x_t = (1 - t) noise + t x_1. Time and caption shift the input
    of every block; a caption is the sum of vectors, one for each word at each place.
    """

    def __init__(self, width=144, layers=4, heads=4):
        super().__init__()
        self.words = nn.EmbeddingBag(len(WORDS) * TOY.context, 2 * width, mode="sum")
        self.time = nn.Linear(32, 2 * width)
        hidden, shifts = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, layers * width)
        self.shift = nn.Sequential(nn.SiLU(), hidden, nn.SiLU(), shifts)
        self.into = nn.Linear(64, width)  # a quarter: 4 channels of 4 x 4
        self.position = nn.Parameter(0.02 * torch.randn(4, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 64)

    def velocity(self, x, t, words):
        """dx/dt (B, 4, 8, 8) at times t (B,), under token ids (B, 9)."""
        angle = t[:, None] * 1.3 ** torch.arange(16, device=t.device)
        place = len(WORDS) * torch.arange(TOY.context, device=t.device)
        about = self.time(torch.cat((angle.sin(), angle.cos()), 1)) + self.words(words + place)
        shifts = self.shift(about)[:, None].chunk(len(self.blocks), 2)
        h = self.into(F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)) + self.position
        for block, shift in zip(self.blocks, shifts):
            h = block(h + shift)
        out = self.out(self.norm(h)).transpose(1, 2)
        return F.pixel_shuffle(out.unflatten(2, (2, 2)), 4)

    def forward(self, idx, x1, noise, t, denom=None):
        """Flow matching, weighted by (1 - t)^2: the squared error of x_1 as told from x_t."""
        at = column(t, x1)
        wrong = self.velocity((1 - at) * noise + at * x1, t, idx) - (x1 - noise)
        return ((1 - at) * wrong).square().mean()

    def generate(self, words, x, steps=EULER, start=0.0):
        """Scaled latents from x at time `start` (noise at 0) by Euler's rule.

        What goes where is settled early, so the times are (i / steps)^2.
        """
        times = [start + (1 - start) * (i / steps) ** 2 for i in range(steps + 1)]
        for now, then in zip(times, times[1:]):
            x = x + (then - now) * self.velocity(x, x.new_full((len(x),), now), words)
        return x


@dataclass
class Lab:
    """The frozen models of a seed, and where they compute."""

    vae: VAE
    scale: float  # what makes latents of spread 1: the toy's .13025
    flow: Flow
    clips: dict  # latent, pixel, shuffled, untrained
    env: common.Env

    @torch.no_grad()
    def text(self, arm, texts):
        """Text features (n, E) of a CLIP."""
        return self.clips[arm].encode_text(toy_tokens(texts).to(self.env.device))

    @torch.no_grad()
    def pixels(self, z):
        """Scaled latents as the judge wants them, in [0, 255]."""
        return pixels_of(self.vae, z / self.scale).cpu()

    def generator(self, texts):
        """From noise to scaled latents, under prompts."""
        return partial(self.flow.generate, toy_tokens(texts).to(self.env.device))

    def reward(self, arm, text):
        """Of scaled latents: by the pixel CLIP, which decodes, or by one that reads latents."""
        if arm == "pixel":
            return partial(pixel_reward, self.clips[arm], self.vae, self.scale, text)
        return partial(latent_reward, self.clips[arm], self.scale, text)


def pixels_of(vae, z):
    """Raw latents as images in [0, 255]."""
    return ((vae.decode(z) + 1) * 127.5).clamp(0, 255)


@torch.no_grad()
def latents_of(vae, images, env):
    """Means and standard deviations of the raw latents (n, 4, 8, 8) of uint8 images."""
    means, deviations = [], []
    for part in images.split(512):
        mean, logvar = vae.moments(to_pixels(part.to(env.device)))
        means.append(mean.cpu())
        deviations.append((0.5 * logvar).exp().cpu())
    return torch.cat(means), torch.cat(deviations)


def train_vae(args, env, log, seed, train, test):
    """A VAE, trained until it is good enough, but two rounds at most; and how good it is."""
    torch.manual_seed(seed)
    vae = VAE(VAEConfig())
    nn.init.constant_(vae.quant_conv.bias[4:], -5.0)  # little noise at first
    size = max(2, args.batch_size // 8)  # many small steps: it learns from every pixel
    flags = replace(args, lr=5e-3, batch_size=size, steps=args.steps * 3 // 2)

    def batch(round, step):
        rng = np.random.default_rng([seed, 4, round, step])
        rows = rng.integers(len(train.images), size=size)
        noise = torch.from_numpy(rng.standard_normal((len(rows), 4, 8, 8), np.float32))
        return {"idx": to_pixels(train.images[rows]), "noise": noise}

    for round in range(2):
        stage = log.stage(f"vae{round}")
        common.train(vae.requires_grad_(True), partial(batch, round), flags, env, stage)
        quality = vae_quality(vae.requires_grad_(False), test, env)
        if quality["psnr"] >= 26 and quality["decoded"] >= 0.95:
            break
    return vae, quality


def vae_quality(vae, test, env):
    """How often the judge is right on pictures as drawn and as decoded, and the error in dB."""
    real = test.images[:500].float()
    z, _ = latents_of(vae, test.images[:500], env)
    decoded = pixels_of(vae, z.to(env.device)).cpu()
    error = ((decoded - real) / 255).square().mean((1, 2, 3))
    found = {"psnr": (-10 * error.log10()).mean().item()}
    for name, images in ("drawn", real), ("decoded", decoded):
        pairs = zip(see(images), test.objects())
        found[name] = np.mean([seen == there for seen, there in pairs])
    return found


def new_clip(arm, seed):
    """A CLIP of the toy, not trained yet."""
    torch.manual_seed(seed)
    return CLIP(PIXEL if arm == "pixel" else TOY)


def train_clip(args, env, log, arm, seed, train, latents, deviations):
    """A CLIP on pictures without a held-out pair; all arms have equal batches and trunks.

    Latents are drawn anew each time from what the VAE says of a picture, as in the authors' code.
    """
    rows = (~train.held_out()).nonzero()[:, 0].numpy()
    tokens = toy_tokens(train.texts)
    numbers = {text: i for i, text in enumerate(dict.fromkeys(train.texts))}
    ids = torch.tensor([numbers[text] for text in train.texts])
    of = np.arange(len(latents))
    if arm == "shuffled":  # each picture has the caption of another
        of[rows] = np.random.default_rng([seed, 3]).permutation(rows)

    def batch(step):
        rng = np.random.default_rng([seed, 5, step])
        picks = rng.choice(rows, args.batch_size)
        seen = to_pixels(train.images[picks])
        if arm != "pixel":
            noise = torch.from_numpy(rng.standard_normal((len(picks), 4, 8, 8), np.float32))
            seen = latents[picks] + deviations[picks] * noise
        return {"idx": tokens[of[picks]], "images": seen, "ids": ids[of[picks]]}

    clip = new_clip(arm, seed)
    common.train(clip, batch, args, env, log.stage(arm), make_optimizer=clip_optimizer)
    return clip.requires_grad_(False)


def train_flow(args, env, log, seed, train, latents, scale):
    """The generator, on all pictures; six times as many steps, larger ones."""
    words = toy_tokens(train.texts)

    def batch(step):
        rng = np.random.default_rng([seed, 6, step])
        rows = rng.integers(len(latents), size=args.batch_size)
        noise = torch.from_numpy(rng.standard_normal((len(rows), 4, 8, 8), np.float32))
        t = torch.from_numpy(rng.random(len(rows), np.float32) ** 2)
        return {"idx": words[rows], "x1": scale * latents[rows], "noise": noise, "t": t}

    torch.manual_seed(seed)
    flow = Flow()
    flags = replace(args, steps=6 * args.steps, lr=2 * args.lr, weight_decay=0.01)
    common.train(flow, batch, flags, env, log.stage("flow"))
    return flow.requires_grad_(False)


# ----------------------------------------------------------------------------------- the measures


def rotated(z, seed):
    """Latents (B, 4, H, W) as another VAE could have them: channels turned by a random rotation."""
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0]
    return torch.einsum("ij,bjhw->bihw", q.to(z), z)


@torch.no_grad()
def named(lab, arm, x, test):
    """Share of pictures x named rightly among 60: of pairs that the CLIP saw, and of new ones."""
    right = (lab.clips[arm].encode_image(x) @ lab.text(arm, CLASSES).T).argmax(1).cpu()
    right = (right == test.label()).float()
    new = test.held_out()
    return {"right": right[~new].mean().item(), "right_new": right[new].mean().item()}


@torch.no_grad()
def zero_shot(lab, test, latents, noise):
    """Naming real and generated pictures, by every CLIP; latents as they should not be given."""
    z = latents.to(lab.env.device)
    found = {
        "pixel": named(lab, "pixel", to_pixels(test.images).to(z), test),
        "latent": named(lab, "latent", z, test),
        "shuffled": named(lab, "shuffled", z, test),
        "scaled": named(lab, "latent", z * lab.scale, test),
        "sdxl_scaled": named(lab, "latent", z * lab.scale * 0.13025, test),
    }
    # generated: a real latent at 66 % noise, denoised under the name of its class, as in the paper
    names = [CLASSES[i] for i in test.label()]
    start = 0.66 * noise + 0.34 * z * lab.scale
    made = lab.generator(names)(start, start=0.34) / lab.scale
    found["made_pixel"] = named(lab, "pixel", lab.vae.decode(made), test)
    found["made_latent"] = named(lab, "latent", made, test)
    found["made_shuffled"] = named(lab, "shuffled", made, test)
    turned = [named(lab, "latent", rotated(made, i), test) for i in range(3)]
    found["made_rotated"] = common.mean(turned)
    return found


def climb(lab, args, texts, noise, arm, toward):
    """ReNO of many prompts, a batch at a time: the best latents (iters, n, 4, 8, 8)."""
    found = []
    for i in range(0, len(texts), TOGETHER):
        part = slice(i, i + TOGETHER)
        generate, reward = lab.generator(texts[part]), lab.reward(arm, toward[part])
        found.append(reno(generate, reward, noise[part], args.iters, args.noise_lr)[0])
    return torch.cat(found, 1)


REWARDS = "latent", "pixel", "shuffled", "untrained"


def optimise(lab, args, texts, asked, noise):
    """ReNO by each reward; the judge says which prompts are fulfilled, at some evaluations.

    A prompt is fulfilled if the judge sees the objects that it names, and no other.
    """
    at = sorted({*range(0, args.iters, max(1, args.iters // 10)), args.iters - 1})
    found, shown = {"at": at}, {}
    for arm in REWARDS:
        best = climb(lab, args, texts, noise, arm, lab.text(arm, texts))
        verdicts = []
        for z in best[at]:
            pairs = zip(see(lab.pixels(z)), asked)
            verdicts.append([seen == wanted for seen, wanted in pairs])
        verdicts = np.array(verdicts, float)
        gain, low, _ = common.interval(verdicts[-1] - verdicts[0])
        found[arm] = {"gain": gain, "low": low, "share": verdicts.mean(1)}
        shown |= {"first noise": lab.pixels(best[0, :6]), f"by {arm}": lab.pixels(best[-1, :6])}
    return found, shown


def guard(lab, args, noise):
    """`a warm S` is red half the time: ReNO away from `a red S`. Shares of red, and of the shape S.

    Controls: away from blue, which no warm thing is, and the prompt as the only reward.
    """
    shapes = [i % 5 for i in range(len(noise))]
    texts = [f"a warm {SHAPES[s]}" for s in shapes]
    found, shown = {}, {}
    for name, colour in ("not red", "red"), ("not blue", "blue"), ("prompt alone", ""):
        toward = lab.text("latent", texts)
        if colour:
            toward = away(toward, lab.text("latent", [f"a {colour} {s}" for s in SHAPES]))
        best = climb(lab, args, texts, noise, "latent", toward)
        for when, z in ("first noise", best[0]), (name, best[-1]):
            red, right = 0, 0
            for objects, asked in zip(see(lab.pixels(z)), shapes):
                red += any(c == 0 for c, _ in objects)
                right += any(s == asked for _, s in objects)
            found[when] = {"red": red / len(shapes), "shape": right / len(shapes)}
            shown[when] = lab.pixels(z[:5])
    return found, shown


def cost(lab, args, texts, noise, reno_found):
    """Seconds of an evaluation of a batch, and until the same share of the prompts is fulfilled.

    The rewards take turns; the last decoding is included. `again` is the pixel reward once more.
    The share is the one that both have reached when .8 of the smaller gain is made.
    """
    seconds = {"latent": [], "pixel": [], "again": []}
    for _ in range(5 if args.gates else 1):
        for name, taken in seconds.items():
            arm = "latent" if name == "latent" else "pixel"
            reward = lab.reward(arm, lab.text(arm, texts))
            began = time.perf_counter()
            latents, _ = reno(lab.generator(texts), reward, noise, 4, args.noise_lr)
            lab.pixels(latents[-1])  # on the CPU: nothing is left to wait for
            taken.append((time.perf_counter() - began) / 4)
    shares = {arm: reno_found[arm]["share"] for arm in ("latent", "pixel")}
    shares["again"] = shares["pixel"]
    level = 0.2 * shares["pixel"][0] + 0.8 * min(share[-1] for share in shares.values())
    found = {}
    for name, taken in seconds.items():
        evaluation = np.median(taken)
        share = np.maximum.accumulate(shares[name])
        needed = 1 + np.interp(level, share, reno_found["at"])
        found[name] = {"evaluation": evaluation, "reach": needed * evaluation}
    return found


def gate(args, passed, says):
    """Ends a run whose parts are too bad for its claims to mean anything, unless --no-gates."""
    if args.gates and not passed:
        raise SystemExit(f"error: {says}; train for longer, or --no-gates goes on")


def run_seed(args, env, log, arm, seed):
    """The experiment: trains VAE, CLIPs and generator, then asks all questions of them."""
    train = pictures(args.images, [seed, 0])
    test = pictures(10 * args.samples, [seed, 1], {"one": 1.0})
    vae, quality = train_vae(args, env, log, seed, train, test)
    passed = quality["psnr"] >= 26 and min(quality["drawn"], quality["decoded"]) >= 0.95
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in quality.items())
    says = f"seed {seed}: the judge must read .95 of pictures rightly, at 26 dB; VAE: {numbers}"
    gate(args, passed, says)
    latents, deviations = latents_of(vae, train.images, env)
    scale = 1 / latents[:1024].std().item()
    clips = {"untrained": new_clip("untrained", seed).requires_grad_(False).to(env.device)}
    for name in "latent", "pixel", "shuffled":
        clips[name] = train_clip(args, env, log, name, seed, train, latents, deviations)
    flow = train_flow(args, env, log, seed, train, latents, scale)
    lab = Lab(vae, scale, flow, clips, env)

    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(11 * args.samples, 4, 8, 8, generator=rng).to(env.device)
    few, many = noise[: args.samples], noise[args.samples :]
    found = {"quality": quality}
    found["named"] = zero_shot(lab, test, latents_of(vae, test.images, env)[0], many)
    texts, asked = draw_prompts(args.samples, [seed, 2])
    found["reno"], climbed = optimise(lab, args, texts, asked, few)
    first = found["reno"]["latent"]["share"][0]
    says = f"seed {seed}: the generator fulfils {first:.2f} of the prompts, needed: .3 to .85"
    gate(args, 0.3 <= first <= 0.85, says)
    found["time"] = cost(lab, args, texts[:TOGETHER], few[:TOGETHER], found["reno"])
    found["guard"], guarded = guard(lab, args, few)
    if seed == args.seeds[0]:
        grids = {"climbed": climbed, "texts": texts[:6], "guarded": guarded}
        common.save_checkpoint(log.path.with_suffix(".grids"), grids)
    return found


# ------------------------------------------------------------------------------- claims and figure


def judge(run, found):
    """The paper's claims, each beside controls that must fail the same criterion."""

    def rows(part, name):
        return [row[part][name] for row in found]

    parity = "min(arm.right, base.right) >= .6 and arm.right >= base.right - .05"
    run.claim(
        "T1",
        "parity on real pictures that were held out: share named rightly among 60",
        "ImageNet: B/4-plus 73.5, pixel B/16 73.5",
        parity,
        base=rows("named", "pixel"),
        arm=rows("named", "latent"),
        controls={"captions shuffled": rows("named", "shuffled")},
    )
    run.claim(
        "T2",
        "parity on generated pictures, whose latents are read as they come, never decoded",
        "generated ImageNet: 84.6, pixel 85.1",
        parity,
        base=rows("named", "made_pixel"),
        arm=rows("named", "made_latent"),
        controls={
            "channels rotated": rows("named", "made_rotated"),
            "captions shuffled": rows("named", "made_shuffled"),
        },
    )
    run.claim(
        "T3",
        "ReNO by latents fulfils as many more prompts as by pixels (gain; its interval's low end)",
        "GenEval .54 -> .62, both",
        "arm.low > 0 and arm.gain >= .8 * base.gain",
        base=rows("reno", "pixel"),
        arm=rows("reno", "latent"),
        controls={name: rows("reno", name) for name in ("shuffled", "untrained")},
    )
    run.claim(
        "T4",
        "it is cheaper: seconds of an evaluation, and until the same share of prompts is fulfilled",
        "11.59 -> 9.11 s, -21 %",
        "arm.evaluation <= .6 * base.evaluation and arm.reach <= .9 * base.reach",
        base=rows("time", "pixel"),
        arm=rows("time", "latent"),
        controls={"pixels again": rows("time", "again")},
    )
    run.claim(
        "T5",
        "guided away from red, `a warm S` comes out red less often and stays an S",
        "I2P .32 -> .16, pixel .19",
        "base.red >= .2 and arm.red <= .6 * base.red and arm.shape >= base.shape - .05",
        base=rows("guard", "first noise"),
        arm=rows("guard", "not red"),
        controls={
            "away from blue": rows("guard", "not blue"),
            "the prompt alone": rows("guard", "prompt alone"),
        },
    )


def draw(path, found, grids):
    """Prompts fulfilled over time, what guidance does, and pictures of one seed to both."""
    at = np.array(found[0]["reno"]["at"]) + 1
    curves, bars = {}, {}
    for arm in REWARDS:
        clock = "pixel" if arm == "pixel" else "latent"
        seconds = np.mean([row["time"][clock]["evaluation"] for row in found])
        curves[arm] = at * seconds, [row["reno"][arm]["share"] for row in found]
    states = "first noise", "not red", "not blue", "prompt alone"
    for measure in "red", "shape":
        bars[measure] = [[row["guard"][s][measure] for s in states] for row in found]
    with common.figure(path, 2, 2) as (left, right, below, corner):
        share = {"ylabel": "share", "ylim": (0, 1.1)}
        title = "ReNO: prompts fulfilled, by the judge"
        common.draw_panel(
            left, curves, title=title, xlabel=f"seconds for {TOGETHER} prompts", **share
        )
        title = "`a warm S`, guided away from a colour"
        common.draw_panel(right, bars=bars, names=states, title=title, **share)
        for ax, name in (below, "climbed"), (corner, "guarded"):
            tiles = []
            for row in grids[name].values():
                tiles.append(torch.cat([F.pad(x, (1, 1, 1, 1), value=110) for x in row], 2))
            ax.imshow(torch.cat(tiles, 1).permute(1, 2, 0).byte().numpy())
            ax.set_yticks(range(17, 34 * len(tiles), 34), list(grids[name]))
            ax.set_xticks([])
            ax.spines[:].set_visible(False)
        names = [text.replace(" ", "\n") for text in grids["texts"]]
        below.set_xticks(range(17, 34 * len(names), 34), names, fontsize=6)


# -------------------------------------------------------------------- real pictures, real weights


def read_weights(name, default):
    """{tensor name: tensor} of a .safetensors or .pt file, or of ORG/NAME[:FILE] on the hub."""
    path = Path(name)
    if not path.is_file():
        data.import_or_explain("huggingface_hub")
        from huggingface_hub import hf_hub_download

        with data.explained(f"{name!r} can't be read", "allowed: a file, ORG/NAME:FILE"):
            path = Path(hf_hub_download(*f"{name}:{default}".split(":")[:2]))
    if path.suffix == ".safetensors":
        data.import_or_explain("safetensors")
        from safetensors.torch import load_file

        with data.explained(f"{path} can't be read", "allowed: a whole safetensors file"):
            return load_file(path)
    # training states hold NumPy numbers; NumPy 1 had another name for their constructor
    scalar = np._core.multiarray.scalar
    numbers = [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
    known = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *numbers]
    with torch.serialization.safe_globals(known):
        state = common.load_checkpoint(path)
    return state.get("state_dict") or state.get("model") or state


def fill(model, state, name):
    """The model with the weights of a state dict, frozen; ValueError naming what does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit: {str(error)[:600]}") from None
    return model.eval().requires_grad_(False)


def load_vae(name, config):
    """An AutoencoderKL with weights by diffusers' names."""
    return fill(VAE(config), read_weights(name, "diffusion_pytorch_model.safetensors"), name)


def load_clip(name, config):
    """A CLIP with Latent-CLIP's or OpenCLIP's weights; the VAE that a released file holds stays."""
    state = {}
    for key, value in read_weights(name, "checkpoints/epoch_34.pt").items():
        key = key.removeprefix("module.").replace("visual.latent_vit.", "visual.")
        if not key.startswith(("visual.vae_", "attn_mask")):
            state[key] = value
    return fill(CLIP(config), state, name)


def open_picture(path, side):
    """A picture as uint8 (3, side, side): shortest side resized, bicubic, the centre cropped.

    Turned as its EXIF data say; transparency goes onto white; 16-bit grey is scaled to 8.
    """
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is no readable picture ({error})") from None
    image = image.resize([max(side, round(s * side / min(image.size))) for s in image.size], 3)
    left, top = ((s - side) // 2 for s in image.size)
    image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def caption_files(folder, n):
    """The first n pictures of a folder; each has a caption beside it, a .txt file of its name."""
    kinds = ".jpg", ".jpeg", ".png", ".webp"
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in kinds)[:n]
    alone = [path.name for path in files if not path.with_suffix(".txt").exists()]
    if alone:
        raise ValueError(f"{folder}: without a .txt file: {', '.join(alone[:4])}")
    if len(files) < 8:
        raise ValueError(f"{folder} has {len(files)} pictures, needed: at least 8")
    return files


def latent_cache(folder, files, side, vae, args, env):
    """Raw latents (n, 4, S, S) of pictures, memory-mapped; encoded once for a VAE and files.

    ValueError unless they are as raw latents at --vae-scale must be.
    """
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters())
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    path = folder / f"latents-{zlib.crc32(weights + repr((stats, side)).encode()):08x}.npy"
    if not path.exists() and env.rank == 0:
        aside = path.with_suffix(".tmp")
        shape = len(files), 4, side // vae.f, side // vae.f
        latents = np.lib.format.open_memmap(aside, "w+", np.float16, shape)
        for i in range(0, len(files), 64):
            x = torch.stack([open_picture(f, side) for f in files[i : i + 64]])
            with torch.no_grad(), env.autocast():
                z = vae.moments(to_pixels(x.to(env.device)))[0].float().cpu()
            if not z.isfinite().all():
                raise ValueError("latents are not finite: is this VAE meant for fp16?")
            latents[i : i + 64] = z.numpy()
        latents.flush()
        aside.rename(path)
    latents = np.load(path, mmap_mode="r")
    spread = latents[:512].astype(np.float32).std() * args.vae_scale
    if not 0.4 < spread < 2.5:
        promise = f"raw latents at --vae-scale {args.vae_scale:.4g} would have"
        raise ValueError(
            f"latents of {args.dataset} have {spread:.3g} times the spread that {promise}"
        )
    return latents


def train_real(args, env, log, arm, seed):
    """--dataset: encodes, trains a Latent-CLIP on all ranks, and finds held-out captions."""
    config = CONFIGS[args.preset]
    with common.bad_input(), common.rank_zero_first(env):
        tok = data.get_tokenizer(args.tokenizer)
        config = replace(config, vocab=tok.n_vocab)
        vae = load_vae(args.vae, SD).to(env.device)
        files = caption_files(args.dataset, args.images)
        latents = latent_cache(Path(args.out), files, config.side * vae.f, vae, args, env)
        torch.manual_seed(seed)
        clip = load_clip(args.init, config) if args.init else CLIP(config)
        texts = [data.read_text(path.with_suffix(".txt")).strip() for path in files]
    n = len(files) - max(2, min(1000, len(files) // 10))

    def batch(step):  # drawn with replacement, as in the authors' code
        rows = np.random.default_rng([seed, step]).integers(n, size=args.batch_size)
        rows = rows[env.rank :: env.world]
        idx = clip_tokens(tok, config.context, [texts[i] for i in rows])
        z = torch.from_numpy(latents[rows].astype(np.float32))
        return {"idx": idx, "images": z}

    clip.to(env.device)
    if not args.init:
        common.train(clip, batch, args, env, log, make_optimizer=clip_optimizer)
    with torch.no_grad(), env.autocast():
        z = torch.from_numpy(latents[n:].astype(np.float32)).to(env.device)
        idx = clip_tokens(tok, config.context, texts[n:]).to(env.device)
        text = torch.cat([clip.encode_text(part) for part in idx.split(64)])
        same = (idx[:, None] == idx).all(2)  # pictures of one caption are equally right
        found = {"chance": same.float().mean().item()}
        for name, x in ("found", z), ("found_rotated", rotated(z, 0)):
            image = torch.cat([clip.encode_image(part) for part in x.split(64)])
            best = (image @ text.T).argmax(1, keepdim=True)
            found[name] = same.gather(1, best).float().mean().item()
    return found


SIGMA = 14.614641  # SDXL's noise at its noisiest step, sqrt(1 / prod(1 - beta) - 1)


def one_step(unet, noise):
    """SDXL-Turbo's single step from noise to diffusion latents; unet(x, t) predicts the noise."""
    x = SIGMA * noise
    return x - SIGMA * unet(x / (SIGMA**2 + 1) ** 0.5, 999)


def optimise_real(args, env):
    """--prompt: ReNO by Latent-CLIP on a one-step SDXL; N-before.png and N-after.png of each."""
    from PIL import Image

    with common.bad_input():
        tok, config = data.get_tokenizer(args.tokenizer), CONFIGS[args.preset]
        clip = load_clip(args.init, replace(config, vocab=tok.n_vocab)).to(env.device)
        vae = load_vae(args.vae, SD).to(env.device)
        data.import_or_explain("diffusers")
        from diffusers import StableDiffusionXLPipeline

        with data.explained(f"{args.generator!r} can't be read", "allowed: a folder, a hub id"):
            pipe = StableDiffusionXLPipeline.from_pretrained(args.generator, torch_dtype=env.dtype)
    pipe.to(env.device).unet.requires_grad_(False)
    times = torch.tensor([[512, 512, 0, 0, 512, 512]], device=env.device)
    rng = torch.Generator().manual_seed(args.seeds[0])
    for number, prompt in enumerate(args.prompt):
        texts = clip_tokens(tok, config.context, [prompt, *args.concept]).to(env.device)
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
            toward = clip.encode_text(texts)
        if args.concept:
            toward = away(toward[:1], toward[1:])
        more = {"text_embeds": pooled, "time_ids": times}

        def unet(x, t, states=states, more=more):
            x = x.to(env.dtype)
            return pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=more)[0].float()

        noise = torch.randn(1, 4, config.side, config.side, generator=rng).to(env.device)
        reward = partial(latent_reward, clip, args.vae_scale, toward)
        latents, rewards = reno(partial(one_step, unet), reward, noise, args.iters, args.noise_lr)
        for name, z in ("before", latents[0]), ("after", latents[-1]):
            with torch.no_grad():
                image = pixels_of(vae, z / args.vae_scale)[0].byte().permute(1, 2, 0)
            Image.fromarray(image.cpu().numpy()).save(Path(args.out) / f"{number}-{name}.png")
        first, last = rewards[0].item(), rewards[-1].item()
        print(f"{data.printable(prompt)}: reward {first:.4f} -> {last:.4f}")


# ------------------------------------------------------------------------------------------- main


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    share, rest = divmod(args.batch_size, env.world)
    rules = [
        (
            share < 2 or rest,
            f"--batch-size {args.batch_size}, needed: two or more for each process",
        ),
        (env.world > 1 and not args.dataset, "torchrun is for --dataset"),
        (args.dataset and args.prompt, "--dataset or --prompt, not both"),
        (args.prompt and len(args.seeds) > 1, "--prompt takes one of --seeds"),
    ]
    needs = {"vae": "dataset prompt", "tokenizer": "dataset prompt", "init": "dataset prompt"}
    needs |= {"generator": "prompt", "concept": "prompt"}
    for flag, modes in needs.items():
        useless = getattr(args, flag) and not any(getattr(args, mode) for mode in modes.split())
        rules.append((useless, f"--{flag} needs --{modes.replace(' ', ' or --')}"))
    for mode, flags in {
        "dataset": "vae tokenizer",
        "prompt": "vae tokenizer init generator",
    }.items():
        for flag in flags.split():
            missing = getattr(args, mode) and not getattr(args, flag)
            rules.append((missing, f"--{mode} needs --{flag}"))
    return rules


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    run = common.Run(Args, argv, "2503.08455", check)
    args = run.args
    if args.prompt:
        return optimise_real(args, run.env)
    found = run.each(train_real if args.dataset else run_seed, ["real" if args.dataset else "toy"])
    if found is None:
        return None
    if args.dataset:
        rows = found["real"]
        run.claim(
            "R1",
            "the caption of a held-out picture is found among theirs",
            "not measured",
            "arm.found >= max(.1, 10 * arm.chance)",
            arm=rows,
            controls={"channels rotated": [r | {"found": r["found_rotated"]} for r in rows]},
        )
        return run.finish(found)
    judge(run, found["toy"])
    grids = common.load_checkpoint(run.out / f"toy-s{args.seeds[0]}.grids")
    draw(run.out / "latent_clip.png", found["toy"], grids)
    return run.finish(found)


if __name__ == "__main__":
    common.cli(main)
