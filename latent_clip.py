"""Latent-CLIP (arXiv 2503.08455): a CLIP that reads the latents of a VAE, so that a reward needs no decoding.

Latent diffusion makes a latent z and decodes it to pixels at the very end. A CLIP that judges pixels must decode z each
time it is asked, and back-propagate through the decoder. Latent-CLIP is an ordinary CLIP whose ViT reads z: 4 channels,
an eighth of the side. The paper trains two on 2.7B (latent, text) pairs: zero-shot ImageNet equals that of pixel CLIPs
of their size; as a reward for ReNO (below) images are as good and cost 21 % less time; as a guard it halves the rate of
inappropriate images. A Latent-CLIP is tied to its VAE.

  InfoNCE    L = 1/2 [CE(s I T', diag) + CE(s T I', diag)], exact across ranks: features are gathered with gradient
  zero-shot  class = mean over templates of normalised text features; an image is of the class of largest cosine
  ReNO       climbs R(G(noise, prompt)) in the *noise* of a frozen few-step generator G, kept at norm ~ sqrt(d - 1)
  safety     ReNO with R = cos(z, prompt) - cos(z, concept), or the log-probability of prompt against concept

The toy: coloured shapes with captions; a VAE, a pixel CLIP and a Latent-CLIP trained alike, a generator of latents by
flow matching, all from scratch. A third of the (shape, colour) pairs is held out from both CLIPs. A judge without any
learnt part reads the pictures. Controls: shuffled captions, an untrained ViT, another VAE's latents (channels rotated),
a concept that has nothing to do with the prompt, the pixel pipeline against itself.

Two conventions cause most bugs: the ViT reads RAW latents (diffusion latents divided by the VAE's scale, .13025), and
channels come first. Tags: [P] the paper, [C] the authors' code, [I] our choice where both are silent.
What the toy can't show: that parity survives real pictures and captions, or what a decoder of 2.5 TFLOP costs.
Read on: `info_nce`, `CLIP`, `VAE`, `reno` (method) -> `pictures`, `see` (the judge) -> `train_toy` -> `Lab` -> `judge`.
"""

import functools
import itertools
import json
import math
import textwrap
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import legacy as common
import data


@dataclass
class Args(common.TrainFlags):
    """Latent-CLIP"""

    presets: ClassVar[dict] = {
        "smoke": dict(images=160, vae_steps=2, steps=2, flow_steps=2, batch_size=8, prompts=6, iters=2, log_every=1,
                      jobs=1, threads=1),
        "toy": dict(min_lr=0.0),
    } | {name: dict(
        arch=arch, steps=415_039, batch_size=81_920, lr=1e-3, warmup=3000, min_lr=0.0, clip=0.0, images=10**9,
        noise_lr=5.0, iters=50, vae="madebyollin/sdxl-vae-fp16-fix", tokenizer="openai/clip-vit-large-patch14",
    ) for name, arch in (("b8", "b8"), ("b4plus", "b4plus"), ("paper", "b8"))}  # fmt: skip
    limits: ClassVar[dict] = {flag: (1,) for flag in ("vae_steps", "flow_steps", "euler", "iters", "prompts")}
    limits |= {"steps": (0,), "images": (2,), "vae_scale": (1e-6,), "noise_lr": (0,)}
    steps: int = 500
    """of each CLIP (paper: 34e9 samples / 81,920)"""
    batch_size: int = 64
    """pairs in a step, over all ranks (paper: 81,920)"""
    lr: float = 2e-3
    """peak learning rate (paper: 1e-3)"""
    weight_decay: float = 0.2
    """of matrices, embeddings, convolutions (OpenCLIP's)"""
    arch: Literal["toy", "b8", "b4plus"] = "toy"
    """Latent-CLIP's sizes, for real data"""
    dataset: str = ""
    """real pairs: a folder of images beside .txt captions, a `datasets` id (paper: LAION-2B, COYO); none: the toy"""
    images: int = 12000
    """images of the toy; at most so many of --dataset"""
    vae: str = ""
    """VAE weights: a file, or ORG/NAME[:FILE] on the hub (paper: madebyollin/sdxl-vae-fp16-fix)"""
    vae_scale: float = 0.13025
    """what diffusion multiplies raw latents by (SD 1.x: .18215)"""
    tokenizer: str = ""
    """CLIP's tokenizer.json: a file, a folder or a hub id"""
    init: str = ""
    """weights of a Latent-CLIP or a pixel OpenCLIP: a file, ORG/NAME:FILE; --steps 0 only measures them"""
    classes: str = ""
    """file of class names, one a line: zero-shot on held-out images whose caption is one of them"""
    prompt: list[str] = field(default_factory=list)
    """ReNO on these with --generator, --vae, --init, then stop"""
    generator: str = ""
    """a one-step SDXL for --prompt, through `diffusers` (paper: stabilityai/sdxl-turbo)"""
    concept: list[str] = field(default_factory=list)
    """what --prompt is guided away from"""
    iters: int = 30
    """evaluations of ReNO (paper: 50)"""
    noise_lr: float = 2.0
    """ReNO's step (paper: 5, in 64 times as many dimensions; by their norms that would be .6)"""
    euler: int = 4
    """steps of the toy's generator"""
    prompts: int = 48
    """of the toy: six kinds alike"""
    vae_steps: int = 700
    """of the toy's VAE"""
    flow_steps: int = 1200
    """of the toy's generator"""


# ----------------------------------------------------------------------------------------------------------- InfoNCE


class Gather(torch.autograd.Function):
    """Rows of all ranks, in order; the gradients that the ranks have of them are summed, each takes its own slice."""

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
    """This rank's share of the contrastive loss over the global batch, nats; the mean over ranks is the loss.

    image, text  (b, E) normalised features, the same b on every rank; `scale` multiplies cosines
    ids          (b,) caption numbers: pairs of one caption are no negatives of each other (matters in the toy only)
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    gather = Gather.apply if world > 1 else lambda x: x
    if world * len(image) < 2:
        raise ValueError("InfoNCE needs at least 2 pairs")
    labels = torch.arange(len(image), device=image.device) + rank * len(image)
    logits = scale * image @ gather(text).T, scale * text @ gather(image).T
    if ids is not None:
        same = ids[:, None] == gather(ids)
        same[labels - labels[0], labels] = False
        logits = [l.masked_fill(same, -torch.inf) for l in logits]
    return sum(F.cross_entropy(l.float(), labels) for l in logits) / 2


# -------------------------------------------------------------------------------------------------------------- CLIP


@dataclass
class CLIPConfig:
    """Sizes of a CLIP; `side` and `patch` in the input's own pixels."""

    side: int = 8
    patch: int = 2
    channels: int = 4
    width: int = 96
    layers: int = 4
    heads: int = 4
    embed: int = 64
    vocab: int = 39
    context: int = 16
    text_width: int = 96
    text_heads: int = 4
    text_layers: int = 2


BASE = dict(side=64, width=768, layers=12, heads=12, vocab=49408, context=77, text_layers=12)
CONFIGS = {
    "toy": CLIPConfig(),
    "b8": CLIPConfig(patch=8, embed=512, text_width=512, text_heads=8, **BASE),
    "b4plus": CLIPConfig(patch=4, embed=640, text_width=640, text_heads=10, **BASE),
}


class Attention(nn.Module):
    """Multi-head self-attention (B, T, C), by OpenCLIP's names."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.out_proj = heads, nn.Linear(width, width)
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.causal = causal
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        fc, proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=fc, gelu=nn.GELU(), c_proj=proj))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), self.causal)
        return x + self.mlp(self.ln_2(x))


def transformer(width, layers, heads, causal):
    """A stack of blocks, by OpenCLIP's name."""
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)))))


class ViT(nn.Module):
    """Images or latents (B, channels, side, side) -> features (B, E)."""

    def __init__(self, c):
        super().__init__()
        init = lambda *shape: nn.Parameter(c.width**-0.5 * torch.randn(shape))
        self.class_embedding, self.positional_embedding = init(c.width), init((c.side // c.patch) ** 2 + 1, c.width)
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.transformer, self.proj = transformer(c.width, c.layers, c.heads, False), init(c.width, c.embed)
        self.conv1 = nn.Conv2d(c.channels, c.width, c.patch, c.patch, bias=False)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Two towers into one space. State dict by OpenCLIP's names; Latent-CLIP is this with 4 input channels [C]."""

    def __init__(self, config):
        super().__init__()
        self.config, w = config, config.text_width
        self.transformer = transformer(w, config.text_layers, config.text_heads, True)
        self.token_embedding, self.ln_final = nn.Embedding(config.vocab, w), nn.LayerNorm(w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, w))
        self.text_projection = nn.Parameter(w**-0.5 * torch.randn(w, config.embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=w**-0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * w) ** -0.5)
            for into_stream in block.attn.out_proj, block.mlp.c_proj:
                nn.init.normal_(into_stream.weight, std=w**-0.5 * (2 * config.text_layers) ** -0.5)
        self.visual = ViT(config)
        self.blocks = [*self.visual.transformer.resblocks, *self.transformer.resblocks]  # what --compile, --shard take

    def encode_image(self, x):
        """Normalised features (B, E) of raw latents, or of pixels in [-1, 1]; twice the side is pooled to fit [C]."""
        c = self.config
        if x.dim() != 4 or x.shape[1] != c.channels:
            raise ValueError(f"latents must be channels-first (B, {c.channels}, H, W), not {tuple(x.shape)}")
        if x.shape[2] == 2 * c.side:
            x = F.avg_pool2d(x, 2)
        if x.shape[2:] != (c.side, c.side):
            raise ValueError(f"input of {tuple(x.shape[2:])}, this model reads {c.side} x {c.side} or twice that")
        return F.normalize(self.visual(x), dim=-1)

    def encode_text(self, tokens):
        """Normalised features (B, E) of token ids (B, T <= context): read at the end of text, the largest id."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection, dim=-1)

    def forward(self, idx, images, ids=None, denom=None):
        """The loss of pairs: tokens `idx` (b, T), images or latents, caption numbers `ids`."""
        with torch.no_grad():  # as after each optimizer step [C]
            self.logit_scale.clamp_(0, math.log(100))
        return info_nce(self.encode_image(images), self.encode_text(idx), self.logit_scale.exp(), ids)


def trim(tokens):
    """Tokens up to the batch's last end of text. Exact: attention is causal, and features are read there."""
    return tokens[:, : int(tokens.argmax(1).max()) + 1]


def clip_tokens(tok, texts, context=77):
    """CLIP's ids (n, context): start, text, end (the two largest ids), zeros; a long text is cut, its end kept."""
    end, out = tok.n_vocab - 1, torch.zeros(len(texts), context, dtype=torch.long)
    for row, ids in zip(out, tok.encode_batch(list(texts))):
        ids = [end - 1, *ids[: context - 2], end]
        row[: len(ids)] = torch.tensor(ids)
    return out


@torch.no_grad()
def class_weights(clip, tokens_of, names, templates=("{}",)):
    """(classes, E): normalised mean over templates of normalised text features."""
    device = clip.logit_scale.device
    rows = [clip.encode_text(trim(tokens_of([t.format(n) for t in templates])).to(device)).mean(0) for n in names]
    return F.normalize(torch.stack(rows), dim=-1)


def clip_optimizer(clip, args):
    """AdamW as OpenCLIP sets it up: no decay of gains, biases and the logit scale."""
    decays = lambda name, p: p.ndim >= 2 and not any(part in name for part in ("ln_", "bias", "logit_scale"))
    params = {k: [p for n, p in clip.named_parameters() if decays(n, p) == k] for k in (True, False)}
    groups = [{"params": part, "weight_decay": k * args.weight_decay} for k, part in params.items()]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


# --------------------------------------------------------------------------------------------------------------- VAE


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

    def __init__(self, i, o, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, i, 1e-6), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, o, 1e-6), nn.Conv2d(o, o, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PixelAttention(nn.Module):
    """One head of attention over all places."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm, self.to_out = nn.GroupNorm(groups, width, 1e-6), nn.ModuleList([nn.Linear(width, width)])
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Halves (padded on the right and below only) or doubles (nearest) the side."""

    def __init__(self, width, down):
        super().__init__()
        self.down, self.conv = down, nn.Conv2d(width, width, 3, 2 if down else 1, 0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Half(nn.Module):
    """The encoder (3 -> 2 x 4 channels) or the decoder (4 -> 3): stages of one resolution each, and a middle."""

    def __init__(self, c, down):
        super().__init__()
        w, layers, side = (c.widths, c.layers, "down") if down else (c.widths[::-1], c.layers + 1, "up")
        several = lambda *modules: nn.ModuleList(modules)
        stages = several()
        for i, o in zip((w[0], *w), w):
            stage = {"resnets": several(*(ResBlock(o if n else i, o, c.groups) for n in range(layers)))}
            if len(stages) < len(w) - 1:
                stage[side + "samplers"] = several(Resample(o, down))
            stages.append(nn.ModuleDict(stage))
        first, last = (ResBlock(c.widths[-1], c.widths[-1], c.groups) for _ in range(2))
        attention = several(PixelAttention(c.widths[-1], c.groups))
        self.mid_block = nn.ModuleDict({"resnets": several(first, last), "attentions": attention})
        self.conv_in = nn.Conv2d(3 if down else c.latent, w[0], 3, padding=1)
        self.add_module(side + "_blocks", stages)
        self.conv_norm_out = nn.GroupNorm(c.groups, w[-1], 1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * c.latent if down else 3, 3, padding=1)
        stages = [part for stage in stages for parts in stage.values() for part in parts]
        self.order = [*stages, first, *attention, last] if down else [first, *attention, last, *stages]

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.order:
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL by diffusers' names: images (B, 3, H, W) in [-1, 1] <-> raw latents (B, 4, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.f = config, 2 ** (len(config.widths) - 1)
        self.encoder, self.decoder = Half(config, True), Half(config, False)
        self.quant_conv = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)
        self.post_quant_conv = nn.Conv2d(config.latent, config.latent, 1)
        self.blocks = [*self.encoder.order, *self.decoder.order]

    def moments(self, x):
        """Mean and log-variance (clamped to [-30, 20]) of the latents of x."""
        if x.shape[2] % self.f or x.shape[3] % self.f:
            raise ValueError(f"image of {x.shape[2]} x {x.shape[3]}: both sides must be multiples of {self.f}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Images of raw latents, in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, idx, noise, denom=None):
        """Training loss of images `idx` [I]: L1 for edges + squared error for colours + 1e-4 KL, means over elements.

        L1 alone is slow to see colours: pictures are mostly background, and the median of a pixel is dark.
        """
        mean, logvar = self.moments(idx)
        image = self.decode(mean + (0.5 * logvar).exp() * noise)
        return F.l1_loss(image, idx) + F.mse_loss(image, idx) + 1e-4 * kl(mean, logvar).mean()


def kl(mean, logvar):
    """KL(N(mean, e^logvar) || N(0, 1)) of every element, nats."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


# ------------------------------------------------------------------------------------------------------ real weights


def read_weights(name, default):
    """{tensor name: tensor} of a .safetensors or .pt file, or of ORG/NAME[:FILE] on the hub (`default` is its file)."""
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
    scalar = np._core.multiarray.scalar  # training states hold NumPy numbers; NumPy 1 had another name for them
    numbers = [type(np.dtype(k)) for k in ("f4", "f8", "i8")]
    with torch.serialization.safe_globals([scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *numbers]):
        state = common.load_checkpoint(path)
    return state.get("state_dict") or state.get("model") or state


def put(model, state, what):
    """A model with the weights of a state dict, frozen; ValueError naming what is missing, misshapen or left over."""
    ours = model.state_dict()
    odd = [f"{k} is missing" for k in ours if k not in state] + [f"{k} has no place" for k in state if k not in ours]
    same = lambda k: state.get(k, ours[k]).shape == ours[k].shape
    odd += [f"{k} is {tuple(state[k].shape)}, not {tuple(ours[k].shape)}" for k in ours if not same(k)]
    if odd:
        raise ValueError(f"{what} does not fit: {'; '.join(odd[:6])}{f' and {len(odd) - 6} more' if odd[6:] else ''}")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)


def load_vae(name, config=SD):
    """A VAE with weights by diffusers' names; the older names of its attention are understood."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {}
    for key, value in read_weights(name, "diffusion_pytorch_model.safetensors").items():
        if ".attentions." in key:
            key, value = ".".join(old.get(part, part) for part in key.split(".")), value.squeeze()
        state[key] = value
    return put(VAE(config), state, name)


def load_clip(name, config):
    """A CLIP with Latent-CLIP's or OpenCLIP's weights.

    Of a pixel CLIP everything is taken but the patch embedding; its positions are resized to the new grid [C].
    """
    state, clip = {}, CLIP(config)
    for key, value in read_weights(name, "open_clip_model.safetensors").items():
        key = key.removeprefix("module.").replace("visual.latent_vit.", "visual.")
        if not key.startswith(("visual.vae_", "attn_mask")):
            state[key] = value
    conv, place, ours = "visual.conv1.weight", "visual.positional_embedding", clip.state_dict()
    if conv in state and state[conv].shape != ours[conv].shape:
        state |= {conv: ours[conv], place: resize_positions(state[place].float(), len(ours[place]))}
    return put(clip, state, name)


def resize_positions(positions, n):
    """Learned positions (1 + side^2, C) for n = 1 + side'^2: the class token's stays, the grid is resized, bicubic."""
    side, new = math.isqrt(len(positions) - 1), math.isqrt(n - 1)
    grid = F.interpolate(positions[1:].T.reshape(1, -1, side, side), (new, new), mode="bicubic", antialias=True)
    return torch.cat((positions[:1], grid.flatten(2)[0].T))


# ------------------------------------------------------------------------------------------------------ latent cache


def fingerprint(vae):
    """A number that tells one VAE's weights from another's."""
    return zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for p in vae.parameters()))


def encode(folder, pairs, n, tokens_of, vae, scale, env, source=""):
    """Writes raw latents (posterior means) and tokens of n (uint8 image (3, S, S), caption); goes on where it stopped.

    folder/latents.f16 (n, 4, S/f, S/f) and tokens.u16 (n, context) are plain arrays; meta.json says of what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "meta.json"
    meta = {"source": source, "vae": fingerprint(vae), "scale": scale, "scaled": False, "done": 0}
    if path.exists() and {**json.loads(path.read_text()), "done": 0}.items() >= meta.items():
        meta = json.loads(path.read_text())
    files, pairs = [folder / "latents.f16", folder / "tokens.u16"], itertools.islice(pairs, meta["done"], n)
    for file, key in zip(files, ("shape", "context")):  # what a killed run left half done is cut off
        with open(file, "ab") as f:
            f.truncate(2 * meta["done"] * math.prod(meta.get(key, [0])))
    while part := list(itertools.islice(pairs, 64)):
        x = torch.stack([image for image, _ in part]).to(env.device)
        with torch.no_grad(), env.autocast():
            z = vae.moments(to_pixels(x))[0].float()
        if not z.isfinite().all():
            raise ValueError(
                f"latents are not finite in {env.dtype}: SDXL's own VAE overflows in fp16, needed: fp32, bf16"
            )
        arrays = z.cpu().numpy().astype(np.float16), tokens_of([text for _, text in part]).numpy().astype(np.uint16)
        for file, array in zip(files, arrays):
            with open(file, "ab") as f:
                f.write(array.tobytes())
        meta |= {"done": meta["done"] + len(part), "shape": arrays[0].shape[1:], "context": arrays[1].shape[1:]}
        common.write_text(path, json.dumps(meta))
    if not meta["done"]:
        raise ValueError("there are no pictures to encode")


def open_cache(folder, vae):
    """(latents, tokens, scale), the first two memory-mapped; ValueError if they are of another VAE or not raw."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta["scaled"] or meta["vae"] != fingerprint(vae):
        raise ValueError(
            f"latents in {folder} are {'scaled' if meta['scaled'] else 'of another VAE'}; CLIP reads raw ones"
        )
    of = lambda name, dtype, key: np.memmap(folder / name, dtype, "r", shape=(meta["done"], *meta[key]))
    latents, tokens = of("latents.f16", np.float16, "shape"), of("tokens.u16", np.uint16, "context")
    spread = latents[:512].astype(np.float32).std() * meta["scale"]
    if not 0.4 < spread < 2.5:
        promise = f"raw ones at --vae-scale {meta['scale']:.4g} would have: scaled already, or of another VAE?"
        raise ValueError(f"latents in {folder} have {spread:.3g} times the spread that {promise}")
    return latents, tokens, meta["scale"]


# -------------------------------------------------------------------------------------------------------------- ReNO


class Climb(NamedTuple):
    """What ReNO found for a batch of prompts."""

    best: torch.Tensor  # (B, ...) latents of the largest reward
    reward: torch.Tensor  # (B,)
    latents: torch.Tensor  # (iters, B, ...) best so far at every evaluation
    rewards: torch.Tensor  # (iters, B) of these
    norms: torch.Tensor  # (iters, B) of the noise


def norm_loss(noise):
    """Negative log-density of the norm n of noise (B, ...), fp32: n^2 / 2 - (d - 1) ln n, least at sqrt(d - 1)."""
    n = noise.float().flatten(1).norm(dim=1)
    return 0.5 * n**2 - (noise[0].numel() - 1) * n.log()


def reno(generate, reward, noise, iters=50, lr=5.0, clip=0.1, reg=0.01, momentum=0.9, climb=True):
    """Reward-based noise optimisation of a batch, exactly as each row alone would go.

    generate(noise) -> latents, reward(latents) -> (B,), both frozen. SGD with Nesterov momentum on reg * norm_loss -
    reward, gradients clipped row by row; no step after the last evaluation. The best latents are those of the largest
    reward over all evaluations, the first included. climb=False: fresh noise every time instead, best of `iters`.
    """
    rows = lambda v, like: v.view(-1, *[1] * (like.dim() - 1))
    velocity, best, trace = torch.zeros_like(noise), None, []
    for i in range(iters):
        noise = noise.detach().requires_grad_(climb)
        z = generate(noise)
        value = reward(z)
        if not value.isfinite().all():
            raise ValueError(f"the reward is not finite at evaluation {i}: needed: models in bf16 or fp32, not fp16")
        new = z.detach(), value.detach()
        better = new[1] > best[1] if best else new[1] == new[1]
        best = [torch.where(rows(better, a), a, b) for a, b in zip(new, best or new)]
        trace.append((*best, noise.detach().float().flatten(1).norm(dim=1)))
        if not climb:
            noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(i)).to(noise)
        elif i + 1 < iters:
            grad = torch.autograd.grad((reg * norm_loss(noise) - value).sum(), noise)[0]
            grad = grad * rows((clip / (grad.flatten(1).norm(dim=1) + 1e-6)).clamp(max=1), grad)
            velocity = momentum * velocity + grad
            noise = noise - lr * (grad + momentum * velocity)
    return Climb(*best, *map(torch.stack, zip(*trace)))


def latent_reward(clip, scale, text):
    """Cosine of diffusion latents with text features (B, E): divided by the VAE's scale, never decoded."""
    return lambda z: (clip.encode_image(z / scale) * text).sum(1)


def pixel_reward(clip, vae, scale, text):
    """The same by a CLIP that reads pixels: decodes, and back-propagates through the decoder."""
    return lambda z: (clip.encode_image(vae.decode(z / scale)) * text).sum(1)


def away(prompt, concept):
    """Safety [I]: text features whose reward is cos(z, prompt) - cos(z, concept)."""
    return prompt - F.normalize(concept.mean(0, keepdim=True), dim=-1)


def classifier(reward):
    """The other form: log softmax(100 [cos(z, prompt), cos(z, concept)])_0 of such a difference."""
    return lambda z: F.logsigmoid(100 * reward(z))


BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # SDXL's noise schedule
SIGMA = float((1 / (1 - BETAS).prod() - 1) ** 0.5)  # 14.61, at its noisiest step


def one_step(unet):
    """SDXL-Turbo's single step: unet(input, t) predicts the noise -> a generator from noise to diffusion latents."""
    return lambda noise: SIGMA * noise - SIGMA * unet(SIGMA * noise / (SIGMA**2 + 1) ** 0.5, 999)


# ----------------------------------------------------------------------------------------------------- the toy's world

SHAPES = "circle square triangle cross ring".split()
COLOURS = "red yellow purple green cyan blue".split()  # three warm ones, three cool ones
RGB = torch.tensor([[230, 40, 40], [240, 220, 50], [190, 70, 220], [40, 200, 60], [60, 220, 220], [50, 90, 240.0]])
DARK, YX = 25.0, torch.arange(32) + 0.5
PLURAL = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
WORDS = "an image of there is a and left above in the top bottom right small big two three warm cool".split()
WORDS = ["<pad>", "<start>", *WORDS, *COLOURS, *SHAPES, *PLURAL.values(), "<end>"]
NUMBER = {w: i for i, w in enumerate(WORDS)}
HELD = torch.tensor([[(i + j) % 6 in (0, 3) for j in range(6)] for i in range(5)])  # (shape, colour): 10 of 30
TEMPLATES = "{}", "an image of {}", "there is {}"


def to_pixels(images):
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def toy_tokens(texts, context=16):
    """Ids (n, context) of captions: start, words, end (the largest id), padding."""
    out = torch.zeros(len(texts), context, dtype=torch.long)
    for row, text in zip(out, texts):
        row[: len(text.split()) + 2] = torch.tensor([1, *(NUMBER[w] for w in text.split()), len(WORDS) - 1])
    return out


def coverage(shape, x, y, r):
    """Share of each pixel that a shape covers: (n,) centres and radii -> (n, 32, 32), from signed distances."""
    x, y, r = (v[:, None, None] for v in (x, y, r))
    dx, dy = YX - x, YX[:, None] - y
    ax, ay, far = dx.abs(), dy.abs(), torch.hypot(dx, dy)
    sdf = {
        "circle": lambda: far - r,
        "square": lambda: torch.maximum(ax, ay) - 0.9 * r,
        "triangle": lambda: torch.maximum(dy, 0.75**0.5 * ax - 0.5 * dy) - 0.55 * r,
        "cross": lambda: torch.maximum(torch.maximum(ax, ay) - r, torch.minimum(ax, ay) - 0.33 * r),
        "ring": lambda: (far - 0.72 * r).abs() - 0.25 * r,
    }[shape]()
    return (0.5 - sdf).clamp(0, 1)


def caption(kind, cells, shape, colour, big, rng):
    """A sentence about the objects of one picture, in cells 0..3 (row by row)."""
    a, *b = (f"a {COLOURS[c]} {SHAPES[s]}" for c, s in zip(colour[: len(cells)], shape))
    if kind == "count":
        return f"{['two', 'three'][len(cells) - 2]} {COLOURS[colour[0]]} {PLURAL[SHAPES[shape[0]]]}"
    if kind == "tone":
        return f"a {['warm', 'cool'][colour[0] // 3]} {SHAPES[shape[0]]}"
    if kind == "pair":
        for relation, side in ("left of", [c % 2 for c in cells]), ("above", [c // 2 for c in cells]):
            if side[0] != side[1] and rng.random() < 0.4:
                return f"{a} {relation} {b[0]}" if side[0] < side[1] else f"{b[0]} {relation} {a}"
        return f"{a} and {b[0]}"
    size = f"a {['small', 'big'][big[0]]}{a[1:]}" if rng.random() < 0.4 else a
    where = f" in the {['top', 'bottom'][cells[0] // 2]} {['left', 'right'][cells[0] % 2]}"
    return size + where * (rng.random() < 0.4)


def pictures(n, seed):
    """n pictures: images (n, 3, 32, 32) uint8, captions, shape and colour (n, 3) of up to three objects (else -1)."""
    rng = np.random.default_rng([seed, 1])
    kinds = rng.choice(["single", "pair", "count", "tone"], n, p=[0.4, 0.35, 0.15, 0.1])
    count = np.where(kinds == "pair", 2, np.where(kinds == "count", rng.integers(2, 4, n), 1))
    shape, colour, big = (rng.integers(k, size=(n, 3)) for k in (5, 6, 2))
    cells, same, tone = rng.random((n, 4)).argsort(1)[:, :3], kinds == "count", kinds == "tone"
    shape[same], colour[same] = shape[same, :1], colour[same, :1]
    shape[:, 1] += (kinds == "pair") & (shape[:, 0] == shape[:, 1]) & (colour[:, 0] == colour[:, 1])
    shape %= 5
    tones = 3 * rng.integers(2, size=n) + rng.choice(3, n, p=[0.5, 0.25, 0.25])
    colour[tone, 0] = tones[tone]  # half of `warm` is red, of `cool` green
    parts = zip(kinds, cells.tolist(), count, shape, colour, big)
    texts = [caption(k, c[:m], s, h, b, rng) for k, c, m, s, h, b in parts]
    radius = np.where(big, rng.uniform(5.8, 6.6, big.shape), rng.uniform(4.2, 4.8, big.shape))
    x, y = (8 + 16 * c + rng.uniform(-1.5, 1.5, c.shape) for c in (cells % 2, cells // 2))
    x, y, radius = (torch.from_numpy(a).float() for a in (x, y, radius))
    paint = RGB[torch.from_numpy(colour)] + torch.from_numpy(rng.uniform(-12, 12, (n, 3, 3))).float()
    images = torch.full((n, 3, 32, 32), DARK)
    for k, (s, name) in itertools.product(range(3), enumerate(SHAPES)):
        rows = torch.from_numpy((count > k) & (shape[:, k] == s))
        cover = coverage(name, x[rows, k], y[rows, k], radius[rows, k])[:, None]
        images[rows] += cover * (paint[rows, k][..., None, None] - images[rows])
    images += 2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    shape[np.arange(3) >= count[:, None]] = colour[np.arange(3) >= count[:, None]] = -1
    return images.round_().clamp_(0, 255).byte(), texts, torch.from_numpy(shape), torch.from_numpy(colour)


def see(images):
    """The judge: for images (n, 3, 32, 32) in [0, 255], a list of (colour, shape or -1, x, y) of every object.

    Nothing in it is learnt. A pixel has the colour whose line from the background it is nearest to, if it lies beyond
    the half; objects are 8-connected components of 8 pixels and more; a shape is the one whose outline of the same area
    and centre overlaps most, none below IoU .5.
    """
    delta, line = images.float().permute(0, 2, 3, 1) - DARK, RGB - DARK
    along = delta @ (line / (line**2).sum(1, keepdim=True)).T  # (n, 32, 32, 6): 0 is the background, 1 the colour
    best = (delta[..., None, :] - along[..., None] * line).norm(dim=-1).argmin(-1, keepdim=True)
    masks = torch.zeros(along.shape).scatter_(3, best, (along.gather(3, best) > 0.5).float()).permute(0, 3, 1, 2)
    image, colour = (masks.sum((2, 3)) >= 8).nonzero(as_tuple=True)
    masks, label, wider = masks[image, colour], None, masks[image, colour] * torch.arange(1, 1025.0).view(32, 32)
    while label is None or not torch.equal(wider, label):  # the largest number spreads through a component
        label = wider
        wider = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * masks
    flat = label.flatten(1).long()
    sizes = torch.zeros(len(flat), 1025, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    sizes[:, 0] = 0
    which, number = (sizes >= 8).nonzero(as_tuple=True)
    parts, objects = label[which] == number[:, None, None], [[] for _ in images]
    area = parts.sum((1, 2))
    x, y = (parts * YX).sum((1, 2)) / area, (parts * YX[:, None]).sum((1, 2)) / area
    units = zip(SHAPES, (3.1416, 3.24, 1.572, 2.204, 2.262))  # area at radius 1
    ideal = torch.stack([coverage(name, x, y, (area / unit).sqrt()) > 0.5 for name, unit in units])
    sure, shape = ((ideal & parts).sum((2, 3)) / (ideal | parts).sum((2, 3))).max(0)
    shape[sure < 0.5] = -1
    for n, *found in zip(*(v.tolist() for v in (image[which], colour[which], shape, x, y))):
        objects[n].append(tuple(found))
    return objects


KINDS = "single", "colours", "two", "counting", "position", "attribution"


def make_prompts(n, rng):
    """n prompts of the toy's GenEval, six kinds in turn: (text, kind, [(colour, shape), ...], number or relation)."""
    out = []
    for kind in itertools.islice(itertools.cycle(KINDS), n):
        (c, d), (s, t), k = rng.integers(6, size=2), rng.choice(5, 2, replace=False), int(rng.integers(2, 4))
        relation = ["left of", "above"][k - 2] if kind == "position" else "and"
        if kind == "counting":
            out.append((f"{['two', 'three'][k - 2]} {COLOURS[c]} {PLURAL[SHAPES[s]]}", kind, [(c, s)], k))
        elif kind in ("single", "colours"):
            out.append((f"a {COLOURS[c]} {SHAPES[s]}", kind, [(c, s)], 1))
        else:
            text = f"a {COLOURS[c]} {SHAPES[s]} {relation} a {COLOURS[d]} {SHAPES[t]}"
            out.append((text, kind, [(c, s), (d, t)], relation))
    return out


def fulfils(prompt, objects):
    """Whether the objects that the judge saw are what a prompt asks for; as in GenEval, colours count in some kinds."""
    _, kind, wants, how = prompt
    coloured = kind in ("colours", "counting", "attribution")
    hits = [[o for o in objects if o[1] == s and (o[0] == c or not coloured)] for c, s in wants]
    if kind == "counting":
        return len(hits[0]) == how
    if kind == "position":
        axis = 2 if how == "left of" else 3
        return any(a[axis] < b[axis] for a in hits[0] for b in hits[1])
    return all(hits)


# ------------------------------------------------------------------------------------------------------------ training


class Flow(nn.Module):
    """The toy's generator: a transformer on the 4 quarters of a scaled latent, the velocity of the path
    x_t = (1 - t) noise + t x_1. Time and caption (each word at its place has a vector; their sum) shift every block."""

    def __init__(self, config):
        super().__init__()
        w, self.config = config.text_width, config
        self.words = nn.EmbeddingBag(config.vocab * config.context, 2 * w, mode="sum")
        self.time = nn.Linear(32, 2 * w)
        hidden, shifts = nn.Linear(2 * w, 2 * w), nn.Linear(2 * w, w * config.text_layers)
        self.shift = nn.Sequential(nn.SiLU(), hidden, nn.SiLU(), shifts)
        self.position = nn.Parameter(0.02 * torch.randn(4, w))
        self.into, self.norm, self.out = nn.Linear(64, w), nn.LayerNorm(w), nn.Linear(w, 64)
        self.blocks = nn.ModuleList(Block(w, config.text_heads) for _ in range(config.text_layers))

    def velocity(self, x, t, words):
        """dx/dt (B, 4, 8, 8) at times t (B,), under token ids (B, context)."""
        angle = t[:, None] * 1.3 ** torch.arange(16, device=t.device)
        slots = words + self.config.vocab * torch.arange(words.shape[1], device=t.device)
        about = self.time(torch.cat((angle.sin(), angle.cos()), 1)) + self.words(slots)
        x = self.into(F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)) + self.position
        for block, shift in zip(self.blocks, self.shift(about)[:, None].chunk(len(self.blocks), 2)):
            x = block(x + shift)
        return F.pixel_shuffle(self.out(self.norm(x)).transpose(1, 2).unflatten(2, (2, 2)), 4)

    def forward(self, idx, x1, noise, t, denom=None):
        """Flow matching, weighted by (1 - t)^2: the squared error of x_1 as told from x_t."""
        at = t[:, None, None, None]
        return ((1 - at) * (self.velocity((1 - at) * noise + at * x1, t, idx) - x1 + noise)).square().mean()

    def generate(self, x, words, steps, start=0.0):
        """Scaled latents from x at time `start` (noise at 0), by Euler's rule; what goes where is settled early, so the
        times are (i / steps)^2."""
        times = [start + (1 - start) * (i / steps) ** 2 for i in range(steps + 1)]
        for t, then in zip(times, times[1:]):
            x = x + (then - t) * self.velocity(x, x.new_full((len(x),), t), words)
        return x


FLOW = CLIPConfig(context=10, text_width=192, text_layers=4)
PIXEL = replace(CONFIGS["toy"], side=32, patch=8, channels=3)  # as many patches, the same trunk
ARMS = "latent", "pixel", "shuffled"


class World:
    """A seed's pictures: n to train on, n / 8 to test. CLIPs train on `rows`: those without a held-out pair."""

    def __init__(self, args, seed):
        self.n, rng, path = args.images, np.random.default_rng([seed, 2]), Path(args.out) / f"pictures-s{seed}.pt"
        drawn = common.load_checkpoint(path) if path.exists() else ()
        if not drawn or len(drawn[1]) != self.n + self.n // 8:
            drawn = pictures(self.n + self.n // 8, 1000 + seed)
            common.save_checkpoint(path, drawn)
        self.images, self.plain, self.shape, self.colour = drawn
        self.texts = [TEMPLATES[k].format(t) for k, t in zip(rng.integers(3, size=len(self.plain)), self.plain)]
        held = (HELD[self.shape, self.colour] & (self.shape >= 0)).any(1)
        self.rows = np.flatnonzero(~held[: self.n])
        self.test = self.n + np.flatnonzero(self.shape[self.n :, 1] < 0)  # of one object: for zero-shot
        numbers = {t: i for i, t in enumerate(dict.fromkeys(self.plain))}
        self.ids = torch.tensor([numbers[t] for t in self.plain])


def toy_model(args, seed, arm, trained=True):
    """A model of the toy: vae, flow, or a CLIP: pixel, latent, shuffled, random (never trained)."""
    torch.manual_seed(seed)
    kinds = {"vae": lambda: VAE(VAEConfig()), "flow": lambda: Flow(FLOW), "pixel": lambda: CLIP(PIXEL)}
    model = kinds.get(arm, lambda: CLIP(CONFIGS["toy"]))()
    if trained and arm != "random":
        put(model, common.load_checkpoint(Path(args.out) / f"{arm}-s{seed}.pt")["model"], arm)
    return model.eval().requires_grad_(not trained)


def train_toy(args, seed, arm):
    """Trains one model of the toy; the VAE then fills the latent cache that the others read."""
    env, world, folder = common.setup(args), World(args, seed), Path(args.out) / f"latents-s{seed}"
    model, size, flags = toy_model(args, seed, arm, False), args.batch_size, args
    if arm == "vae":
        size = max(2, size // 4)
        flags = replace(args, steps=args.vae_steps, lr=5e-3)
        nn.init.constant_(model.quant_conv.bias[4:], -5.0)  # little noise at first
    else:
        latents, tokens, scale = open_cache(folder, toy_model(args, seed, "vae"))
        latents, words = torch.from_numpy(latents.astype(np.float32)), toy_tokens(world.plain)[:, : FLOW.context]
        tokens, order = torch.from_numpy(tokens.astype(np.int64)), np.arange(len(latents))
    if arm == "flow":
        flags = replace(args, steps=args.flow_steps, weight_decay=0.01)
    if arm == "shuffled":  # each picture gets the caption of another
        order[world.rows] = np.random.default_rng([seed, 3]).permutation(world.rows)

    def batch(step):
        rng = np.random.default_rng([seed, 4, step])
        rows = rng.choice(world.rows, size) if arm in ARMS else rng.integers(world.n, size=size)
        noise = torch.from_numpy(rng.standard_normal((size, 4, 8, 8), np.float32))
        if arm == "vae":
            return {"idx": to_pixels(world.images[rows]), "noise": noise, "denom": 1.0}
        if arm == "flow":
            t = torch.from_numpy(rng.random(size, np.float32) ** 2)
            return {"idx": words[rows], "x1": latents[rows] * scale, "noise": noise, "t": t, "denom": 1.0}
        seen, said = to_pixels(world.images[rows]) if arm == "pixel" else latents[rows], order[rows]
        return {"idx": trim(tokens[said]), "images": seen, "ids": world.ids[said], "denom": 1.0}

    log = common.Log(args.out, f"{arm}-s{seed}", env)
    common.train(model, batch, flags, env, log, make_optimizer=clip_optimizer if arm in ARMS else None)
    if arm == "vae":
        with torch.no_grad():
            scale = 1 / model.moments(to_pixels(world.images[:1024]).to(env.device))[0].std().item()
        encode(folder, zip(world.images, world.texts), len(world.images), toy_tokens, model, scale, env)


# ----------------------------------------------------------------------------------------------------------- measures


class Lab:
    """The frozen models of a seed, and what is asked of them."""

    def __init__(self, args, seed):
        self.args, self.seed, self.env = args, seed, common.setup(args)
        self.clip = functools.cache(lambda arm: toy_model(args, seed, arm).to(self.env.device))
        self.vae, self.flow = (toy_model(args, seed, arm).to(self.env.device) for arm in ("vae", "flow"))
        self.cache, _, self.scale = open_cache(Path(args.out) / f"latents-s{seed}", self.vae)

    def noise(self, n, key):
        """(n, 4, 8, 8) from a generator of its own."""
        g = torch.Generator().manual_seed(100 * self.seed + key)
        return torch.randn(n, 4, 8, 8, generator=g).to(self.env.device)

    @torch.no_grad()
    def text(self, arm, texts):
        """Text features (n, E) of a CLIP."""
        return self.clip(arm).encode_text(trim(toy_tokens(texts)).to(self.env.device))

    @torch.no_grad()
    def pixels(self, z):
        """Scaled latents as the judge wants them, in [0, 255]."""
        return ((self.vae.decode(z / self.scale) + 1) * 127.5).clamp(0, 255).cpu()

    def generator(self, texts, steps=0, start=0.0):
        """noise -> scaled latents under prompts."""
        words = toy_tokens(texts)[:, : FLOW.context].to(self.env.device)
        return lambda noise: self.flow.generate(noise, words, steps or self.args.euler, start)

    def reward(self, arm, text):
        """By the pixel CLIP, which decodes, or by one that reads latents."""
        if arm == "pixel":
            return pixel_reward(self.clip(arm), self.vae, self.scale, text)
        return latent_reward(self.clip(arm), self.scale, text)

    def climb(self, texts, noise, reward_of, **more):
        """ReNO on prompts, 32 at a time; reward_of(texts) -> a reward."""
        more = dict(iters=self.args.iters, lr=self.args.noise_lr) | more
        parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        found = [reno(self.generator(t), reward_of(t), e, **more) for t, e in zip(parts, noise.split(32))]
        return Climb(*(torch.cat(t, dim) for t, dim in zip(zip(*found), (0, 0, 1, 1, 1))))


def rotated(z, seed):
    """Latents as of another VAE: the same content (B, 4, H, W), its channels turned by a random rotation."""
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0].to(z)
    return torch.einsum("ij,bjhw->bihw", q, z)


@torch.no_grad()
def zero_shot(args, seed):
    """Accuracy among 30 classes, seen and held out, on real and generated pictures; how good judge and VAE are."""
    lab, w, names = Lab(args, seed), World(args, seed), [f"a {c} {s}" for s in SHAPES for c in COLOURS]
    test, z = w.test, torch.from_numpy(lab.cache[w.test].astype(np.float32)).to(lab.env.device)
    weights = {arm: class_weights(lab.clip(arm), toy_tokens, names, TEMPLATES) for arm in ARMS}
    labels, out = (w.shape[test, 0] * 6 + w.colour[test, 0]).to(lab.env.device), {}
    held = HELD.flatten().to(labels.device)

    def score(key, arm, x, labels=labels):
        right = (lab.clip(arm).encode_image(x) @ weights[arm].T).argmax(1) == labels
        for name, part in ("seen", ~held[labels]), ("held", held[labels]):
            out[f"{key}/{name}"] = right[part].float().mean().nan_to_num().item()

    score("real/pixel", "pixel", to_pixels(w.images[test]).to(z))
    score("real/latent", "latent", z)
    score("real/shuffled", "shuffled", z)
    score("latents not divided by the scale", "latent", z * lab.scale)
    rows = torch.cat([(labels == c).nonzero()[:20, 0] for c in range(30)])
    made = []
    for part in rows.split(64):  # a real latent at 66 % noise, denoised under the name of its class
        x = 0.66 * lab.noise(len(part), 2) + 0.34 * z[part] * lab.scale
        made.append(lab.generator([names[c] for c in labels[part]], 4, 0.34)(x) / lab.scale)
    made, y = torch.cat(made), labels[rows]
    score("generated/pixel", "pixel", lab.vae.decode(made), y)
    score("generated/latent", "latent", made, y)
    score("generated/shuffled", "shuffled", made, y)
    score("generated, decoded and encoded", "latent", lab.vae.moments(lab.vae.decode(made))[0], y)
    for i in range(3):
        score(f"rotated {i}", "latent", rotated(made, i), y)
    real, back, other = w.images[test].float(), lab.pixels(z * lab.scale), lab.pixels(rotated(z, 0) * lab.scale)
    truth = list(zip(w.colour[test, 0].tolist(), w.shape[test, 0].tolist()))
    for name, images in ("judge on real", real), ("judge on decoded", back), ("judge on rotated", other):
        out[name] = float(np.mean([[o[:2] for o in objects] == [t] for objects, t in zip(see(images), truth)]))
    return out | {"psnr": (-10 * ((back - real) / 255).pow(2).mean((1, 2, 3)).log10()).mean().item()}


RENO = "latent", "pixel", "shuffled", "random", "best of n"
SAFETY = "latent", "clf", "pixel", "irrelevant"


def optimise(args, seed, arm):
    """ReNO with one reward on the toy's prompts: the judge's verdicts along the way, and what both CLIPs say."""
    lab, prompts = Lab(args, seed), make_prompts(args.prompts, np.random.default_rng([seed, 5]))
    texts, reward_of = [p[0] for p in prompts], lambda clip: lambda texts: lab.reward(clip, lab.text(clip, texts))
    clip = "latent" if arm == "best of n" else arm
    found = lab.climb(texts, lab.noise(len(texts), 3), reward_of(clip), climb=arm != "best of n")
    at = sorted({*range(0, args.iters, max(1, args.iters // 8)), args.iters - 1})
    verdicts = [[fulfils(p, o) for p, o in zip(prompts, see(lab.pixels(found.latents[i])))] for i in at]
    with torch.no_grad():
        said = lambda clip, z: reward_of(clip)(texts)(z).mean().item()
        gains = {f"gain by {c}": said(c, found.best) - said(c, found.latents[0]) for c in ("latent", "pixel")}
    show = [texts[:6], *map(lab.pixels, (found.latents[0, :6], found.best[:6]))]  # one of each kind
    return {"at": at, "verdicts": verdicts, "kinds": [p[1] for p in prompts], **gains}, show


def guard(args, seed, arm):
    """`a warm S` is red half the time: ReNO away from `a red S`. Shares before and after, by the judge."""
    lab, shapes = Lab(args, seed), [s for s in range(5) for _ in range(max(1, args.prompts // 6))]
    texts, clip = [f"a warm {SHAPES[s]}" for s in shapes], "pixel" if arm == "pixel" else "latent"
    concept = lab.text(clip, [f"a {'blue' if arm == 'irrelevant' else 'red'} {s}" for s in SHAPES])
    plain = lambda texts: lab.reward(clip, away(lab.text(clip, texts), concept))
    reward_of = (lambda texts: classifier(plain(texts))) if arm == "clf" else plain
    found = lab.climb(texts, lab.noise(len(texts), 4), reward_of)
    out, share = {}, lambda f, seen: float(np.mean([any(f(o, s) for o in objects) for objects, s in zip(seen, shapes)]))
    for when, z in ("before", found.latents[0]), ("after", found.best):
        seen = [[o for o in objects if o[1] >= 0] for objects in see(lab.pixels(z))]
        out[when] = {"red": share(lambda o, s: o[0] == 0, seen), "warm": share(lambda o, s: o[0] < 3, seen),
                     "shape": share(lambda o, s: o[1] == s, seen), "valid": share(lambda o, s: True, seen)}  # fmt: skip
    some = slice(0, None, len(texts) // 5)  # one of each shape
    return out, [texts[some], *map(lab.pixels, (found.latents[0, some], found.best[some]))]


def cost(args, seed):
    """Wall clock of ReNO with either reward, the last decode included: in turns, medians of ratios; and in FLOPs."""
    lab, smoke = Lab(args, seed), args.preset == "smoke"
    texts, noise = [p[0] for p in make_prompts(32, np.random.default_rng([seed, 6]))], lab.noise(32, 5)
    rewards = {arm: lab.reward(arm, lab.text(arm, texts)) for arm in ("latent", "pixel")}
    sync = torch.cuda.synchronize if lab.env.device.type == "cuda" else lambda: None

    def seconds(arm, k, iters):
        sync()
        began = time.perf_counter()
        lab.pixels(reno(lab.generator(texts, k), rewards[arm], noise, iters, args.noise_lr).best)
        sync()
        return time.perf_counter() - began

    def cuts(k, rounds, iters):
        turns = [[seconds(arm, k, iters) for arm in ("pixel", "latent", "pixel")] for _ in range(rounds)]
        return [float(np.median([1 - t[i] / t[0] for t in turns])) for i in (1, 2)] + np.median(turns, 0).tolist()

    def flops(f, x):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            f(x)
        return counter.get_total_flops() / 32e6

    of = {"generator": lab.generator(texts, 1), "decoder": lab.vae.decode, "reward": lab.clip("latent").encode_image}
    parts = {name: flops(f, noise) for name, f in of.items()}
    by_flops = lambda k: parts["decoder"] / (k * parts["generator"] + parts["decoder"] + parts["reward"])
    rounds, iters, ks = (1, 2, (1,)) if smoke else (5, 4, (1, 2, 4, 8))
    cut, itself, pixel, latent, _ = cuts(args.euler, rounds, iters)
    out = {"cut": cut, "itself": itself, "by FLOPs": by_flops(args.euler), "MFLOP": parts}
    out["ms an iteration"] = {"pixel": 1e3 * pixel / iters, "latent": 1e3 * latent / iters}
    return out | {"by steps": {str(k): [cuts(k, 1, 2)[0], by_flops(k)] for k in ks}}


# -------------------------------------------------------------------------------------------------------- the verdict
# fmt: off


def judge(run, zero, climbs, safe, costs):
    """T0-T5: means over seeds (T3: bootstrap over their prompts), each beside controls that must fail the criterion."""
    m = lambda key: float(np.mean([z[key] for z in zero]))
    pair = lambda kind: {"latent": m(f"{kind}/latent/held"), "pixel": m(f"{kind}/pixel/held")}
    seen = {"drawn": m("judge on real"), "decoded": m("judge on decoded"), "PSNR": m("psnr")}
    run.claim("T0", "the toy can show it: the judge reads pictures rightly, as drawn and as decoded", "not measured",
              seen, {"channels rotated, decoded": m("judge on rotated")}, "drawn >= .98, decoded >= .95, PSNR >= 26 dB",
              seen["drawn"] >= 0.98 and seen["decoded"] >= 0.95 and seen["PSNR"] >= 26, m("judge on rotated") < 0.95)
    test = lambda latent, pixel: min(latent, pixel) >= 0.6 and latent - pixel >= -0.05
    real, made, shuffled = pair("real"), pair("generated"), m("real/shuffled/held")
    run.claim("T1", "parity on real pictures: zero-shot among 30 classes, of pairs that neither CLIP ever saw",
              "ImageNet: B/4-plus 73.5, pixel B/16 73.5", real, {"captions shuffled": shuffled},
              "both >= .6, latent - pixel >= -.05; control <= .1", test(**real), shuffled <= 0.1)
    turned = float(np.mean([m(f"rotated {i}/held") for i in range(3)]))
    run.claim("T2", "parity on generated pictures, latents read as they come, never decoded",
              "generated ImageNet: 84.6, pixel 85.1", made | {"re-encoded": m("generated, decoded and encoded/held")},
              {"channels rotated (another VAE)": turned},
              "both >= .6, latent - pixel >= -.05; control: drops by >= .3",
              test(**made), made["latent"] - turned >= 0.3)

    base = np.concatenate([r["verdicts"][0] for r in climbs["latent"]]).astype(float)
    gain = {a: common.interval(np.concatenate([r["verdicts"][-1] for r in climbs[a]]) - base) for a in climbs}
    named = lambda a: dict(zip((a, f"{a} from", f"{a} to"), gain[a]))
    run.claim("T3", "ReNO by latent reward: share of prompts fulfilled, by the judge; gain over the first noise",
              "GenEval .54 -> .62, as with pixels",
              {"base": base.mean()} | named("latent") | {"pixel": gain["pixel"][0]},
              named("shuffled") | named("random"),
              "95 % interval above 0, gain >= .8 of pixel's; controls: 0 inside",
              gain["latent"][1] > 0 and gain["latent"][0] >= 0.8 * gain["pixel"][0],
              all(gain[a][1] <= 0 <= gain[a][2] for a in ("shuffled", "random")))

    c = lambda key: float(np.mean([x[key] for x in costs]))
    run.claim("T4", "the whole pipeline is cheaper: wall clock at equal prompts, batch and steps, last decode included",
              "11.59 -> 9.11 s, -21 %", {"cut": c("cut"), "by FLOPs": c("by FLOPs")},
              {"pixel against itself": c("itself")}, "cut >= .21; control within .05 of 0",
              c("cut") >= 0.21, abs(c("itself")) < 0.05)

    s = lambda arm, when, key: float(np.mean([x[when][key] for x in safe[arm]]))
    lost = lambda arm, key: s(arm, "before", key) - s(arm, "after", key)
    run.claim("T5", "guided away from red, `a warm S` comes out red less often and stays an S",
              "I2P .32 -> .16, pixel .19",
              {"before": s("latent", "before", "red"), "after": s("latent", "after", "red"),
               "by pixel reward": s("pixel", "after", "red"),
               "shape lost": lost("latent", "shape"), "valid lost": lost("latent", "valid")},
              {"away from blue": s("irrelevant", "after", "red")},
              "falls by >= 40 %, shape lost <= .05, valid lost <= .03; control within .1",
              lost("latent", "red") >= 0.4 * s("latent", "before", "red") > 0 and lost("latent", "shape") <= 0.05
              and lost("latent", "valid") <= 0.03, abs(lost("irrelevant", "red")) <= 0.1)


BLUE, RED, GREY, GOLD = "#4477aa", "#ee6677", "#bbbbbb", "#ccbb44"


def draw(path, zero, climbs, safe, costs, pictures):
    """Bars, curves, and pictures {title: ({row: images}, column titles)}."""
    mean = lambda rows, key: float(np.mean([r[key] for r in rows]))
    with common.figure(path, 2, 3, (4.4, 3.0)) as (shot, curves, guarded, *mosaics, cut):
        def bars(ax, title, names, series):
            for i, (label, values, colour) in enumerate(series):
                x = np.arange(len(names)) + 0.8 * (i + 0.5) / len(series) - 0.4
                ax.bar(x, values, 0.8 / len(series), color=colour, label=label)
            ax.set(title=title, ylim=(0, 1.25), xticks=range(len(names)), xticklabels=names)
            ax.legend(fontsize=7, ncols=len(series), loc="upper center")

        keys = [(kind, part) for kind in ("real", "generated") for part in ("seen", "held")]
        arms = ("pixel", RED), ("latent", BLUE), ("shuffled", GREY)
        bars(shot, "Zero-shot accuracy, 30 classes", [f"{kind}\n{part}" for kind, part in keys],
             [(a, [mean(zero, f"{k}/{a}/{p}") for k, p in keys], c) for a, c in arms])
        for (arm, seeds), c in zip(climbs.items(), (BLUE, RED, GREY, GOLD, "#228833")):
            curves.plot(seeds[0]["at"], np.mean([np.mean(r["verdicts"], 1) for r in seeds], 0), color=c, label=arm)
        curves.set(title="ReNO: prompts fulfilled, by the judge", xlabel="evaluation", ylabel="share", ylim=(0, 1))
        states = [[x["before"] for x in safe["latent"]], *([x["after"] for x in safe[arm]] for arm in SAFETY)]
        shares = ("red", RED), ("warm", GOLD), ("shape", BLUE), ("valid", GREY)
        bars(guarded, "`a warm S`, guided away from red", ["before", *SAFETY],
             [(k, [mean(x, k) for x in states], c) for k, c in shares])
        for ax, (title, (rows, names)) in zip(mosaics, pictures.items()):
            tiles = [[F.pad(image, (1, 1, 1, 1), value=110) for image in row] for row in rows.values()]
            ax.imshow(torch.cat([torch.cat(row, 2) for row in tiles], 1).permute(1, 2, 0).byte().numpy())
            ax.set(title=title, xticks=range(17, 34 * len(names), 34), yticks=range(17, 34 * len(rows), 34))
            ax.set_xticklabels(["\n".join(textwrap.wrap(n, 12)) for n in names], fontsize=6)
            ax.set_yticklabels(rows, fontsize=7)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
        steps = list(costs[0]["by steps"])
        for i, style, label in (0, "o-", "measured"), (1, "k:", "by FLOPs"):
            cut.plot(steps, np.mean([[c["by steps"][k][i] for k in steps] for c in costs], 0), style, label=label)
        cut.set(title="Time saved by not decoding", xlabel="steps of the generator", ylabel="share", ylim=(0, 0.8))
        for ax in cut, curves:
            ax.legend(fontsize=7)


# ---------------------------------------------------------------------------------------------------------- real data


def real_pairs(name, side):
    """(uint8 image (3, side, side), caption) of a folder of images beside .txt files, or of a `datasets` id (streamed).

    Resized to the shortest side, bicubic, and cropped to the centre. A column of class labels serves as captions.
    """
    from PIL import Image

    if Path(name).is_dir():
        files = sorted(p for p in Path(name).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        odd = sorted({p.stem for p in files} ^ {p.stem for p in Path(name).glob("*.txt")})
        if odd or not files:
            raise ValueError(f"{name}: without a partner: {', '.join(odd[:4])}" if odd else f"{name} has no images")
        rows = ((path, path.with_suffix(".txt").read_text("utf-8").strip()) for path in files)
    else:
        data.import_or_explain("datasets")
        import datasets

        path, _, config = name.partition(":")
        with data.explained(f"data set {name!r} can't be read", "allowed: a folder of images, an id"):
            source = datasets.load_dataset(path, config or None, split="train", streaming=True)
            first = next(iter(source))
        image = next((k for k in first if hasattr(first[k], "convert")), None)
        text = next((k for k in first if isinstance(first[k], str)), "label" if "label" in first else None)
        if image is None or text is None:
            raise ValueError(f"data set {name!r} has no image and caption among its columns {', '.join(first)}")
        names = getattr((source.features or {}).get("label"), "names", None)
        rows = ((row[image], row[text] if isinstance(row[text], str) else names[row[text]]) for row in source)
    for image, text in rows:
        try:
            image = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
        except OSError as error:
            raise ValueError(f"{image} is no readable image ({error})") from None
        image = image.resize([max(side, round(s * side / min(image.size))) for s in image.size], Image.BICUBIC)
        x, y = ((s - side) // 2 for s in image.size)
        yield torch.from_numpy(np.array(image.crop((x, y, x + side, y + side)))).permute(2, 0, 1), text


def real(args, env, run):
    """--dataset: encodes, trains a Latent-CLIP on all ranks of torchrun, measures it on held-out pairs."""
    with common.bad_input():
        tok, folder = data.get_tokenizer(args.tokenizer), Path(args.out) / "latents"
        config, vae = replace(CONFIGS[args.arch], vocab=tok.n_vocab), load_vae(args.vae).to(env.device)
        torch.manual_seed(args.seeds[0])
        clip = load_clip(args.init, config) if args.init else CLIP(config)
        tokens_of = lambda texts: clip_tokens(tok, texts, config.context)
        with common.rank_zero_first(env):
            if env.rank == 0:
                pairs = real_pairs(args.dataset, config.side * vae.f)
                source = repr((args.dataset, args.images, args.tokenizer, config.side, config.context))
                encode(folder, pairs, args.images, tokens_of, vae, args.vae_scale, env, source)
        latents, tokens, _ = open_cache(folder, vae)
        names = Path(args.classes).read_text("utf-8").splitlines() if args.classes else []
        n = len(latents) - max(2, min(1000, len(latents) // 10))
        if n < 2:
            raise ValueError(f"{len(latents)} pairs in {args.dataset}, needed: at least 4")

    def batch(step):  # with replacement [C]
        rows = np.random.default_rng([args.seeds[0], step]).integers(n, size=args.batch_size)[env.rank :: env.world]
        z = torch.from_numpy(latents[rows].astype(np.float32))
        return {"idx": trim(torch.from_numpy(tokens[rows].astype(np.int64))), "images": z, "denom": 1.0}

    log = common.Log(args.out, "latent", env)
    common.train(clip.requires_grad_(True), batch, args, env, log, make_optimizer=clip_optimizer)
    if env.rank:
        return None
    idx, z = (torch.from_numpy(a[n:].astype(k)).to(env.device) for a, k in ((tokens, np.int64), (latents, np.float32)))
    with torch.no_grad(), env.autocast():
        read = lambda z: torch.cat([clip.encode_image(part) for part in z.split(64)])
        image, other = read(z), read(rotated(z, 0))
        text = torch.cat([clip.encode_text(trim(part)) for part in idx.split(64)])
    same = (idx[:, None] == idx).all(2)  # pictures of one caption are equally right
    found, turned = (same.gather(1, (i @ text.T).argmax(1)[:, None]).float().mean().item() for i in (image, other))
    bar = max(0.1, 10 * same.float().mean().item())
    run.claim("R1", f"the caption of a held-out picture is found among {len(idx)}", "not measured", {"first": found},
              {"channels rotated (another VAE)": turned}, ">= .1 and >= 10 x chance", found >= bar, turned < bar)
    if names:
        templates = "a photo of a {}.", "a picture of a {}.", "{}"  # OpenCLIP's 80 are one to four points better
        top = (image @ class_weights(clip, tokens_of, names, templates).T).topk(min(5, len(names))).indices
        rows, label = (idx[:, None] == tokens_of(names).to(idx)).all(2).nonzero().unbind(1)
        hit = (top[rows] == label[:, None]).float()
        run.metrics["zero-shot"] = {"n": len(rows), "top1": hit[:, 0].mean().item(), "top5": hit.sum(1).mean().item()}
        print("zero-shot:", run.metrics["zero-shot"])
    return run.finish([log])


def sdxl(name, env):
    """Of a diffusers pipeline: prompt -> generator, `one_step` with the prompt encoded once."""
    data.import_or_explain("diffusers")
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(name, torch_dtype=env.dtype).to(env.device)
    pipe.unet.requires_grad_(False)
    ids = torch.tensor([[512, 512, 0, 0, 512, 512]], device=env.device)

    def of(prompt):
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt(prompt, device=env.device, do_classifier_free_guidance=False)
        more = {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        return one_step(lambda x, t: pipe.unet(x.to(env.dtype), t, **more).sample.float())

    return of


def optimise_real(args, env):
    """--prompt: ReNO by Latent-CLIP on a one-step SDXL; N-before.png and N-after.png of the N-th prompt."""
    from PIL import Image

    with common.bad_input():
        tok, rng = data.get_tokenizer(args.tokenizer), torch.Generator().manual_seed(args.seeds[0])
        clip, vae = load_clip(args.init, CONFIGS[args.arch]).to(env.device), load_vae(args.vae).to(env.device)
        generator = sdxl(args.generator, env)
    text_of = lambda texts: clip.encode_text(clip_tokens(tok, texts).to(env.device))
    for number, prompt in enumerate(args.prompt):
        text = away(text_of([prompt]), text_of(args.concept)) if args.concept else text_of([prompt])
        reward = latent_reward(clip, args.vae_scale, text)
        noise = torch.randn(1, 4, 64, 64, generator=rng).to(env.device)
        found = reno(generator(prompt), reward, noise, args.iters, args.noise_lr)
        for name, z in ("before", found.latents[0]), ("after", found.best):
            with torch.no_grad():
                image = ((vae.decode(z / args.vae_scale)[0] + 1) * 127.5).clamp(0, 255).byte()
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(Path(args.out) / f"{number}-{name}.png")
        print(f"{prompt}: reward {found.rewards[0].item():.4f} -> {found.reward.item():.4f}")


# fmt: on
# --------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    """The paper end to end; returns what it writes to result.json."""
    args = common.parse(Args, argv)
    out = Path(args.out)
    with common.bad_input():
        env = common.setup(args)
        run = common.Run(args, env, "latent_clip", "2503.08455")
        if not args.steps and not args.init:
            raise ValueError("--steps 0, allowed: 1 and more; 0 with --init only")
        if args.batch_size < 2 * env.world or args.batch_size % env.world:
            raise ValueError(f"--batch-size {args.batch_size}, allowed: two and more for each of {env.world} ranks")
        if args.micro_batch or args.shard:
            raise ValueError("--micro-batch, --shard: not here; InfoNCE needs the whole batch, and whole models")
        if env.world > 1 and not args.dataset:
            raise ValueError("torchrun is for --dataset; all else runs in one process")
        if len(args.seeds) > 1 and (args.prompt or args.dataset):
            raise ValueError(f"--seeds {args.seeds}: one at a time with --dataset or --prompt")
        out.mkdir(parents=True, exist_ok=True)
    if args.prompt or args.dataset:
        return optimise_real(args, env) if args.prompt else real(args, env, run)

    def everywhere(function, arms):
        """{arm: [result of each seed]}"""
        tasks = [(args, seed, arm) for arm in arms for seed in args.seeds]
        found = iter(common.side_by_side(function, tasks, common.job_count(args, env)))
        return {arm: [next(found) for _ in args.seeds] for arm in arms}

    everywhere(train_toy, ["vae"])
    everywhere(train_toy, ["flow", *ARMS])
    climbs, safe = everywhere(optimise, RENO), everywhere(guard, SAFETY)
    zero, costs = ([measure(args, seed) for seed in args.seeds] for measure in (zero_shot, cost))
    (texts, first, latent), (warm, before, after) = climbs["latent"][0][1], safe["latent"][0][1]
    rows = {"first noise": first, "by pixels": climbs["pixel"][0][1][2], "by latents": latent}
    pictures = {
        "ReNO, before and after": (rows, texts),
        "Away from red": ({"first noise": before, "by latents": after}, warm),
    }
    climbs, safe = ({arm: [numbers for numbers, _ in seeds] for arm, seeds in d.items()} for d in (climbs, safe))
    run.metrics = {"zero-shot": zero, "reno": climbs, "safety": safe, "cost": costs}
    judge(run, zero, climbs, safe, costs)
    draw(out / "latent_clip.png", zero, climbs, safe, costs, pictures)
    return run.finish([common.Log(out, f"{arm}-s{s}") for s in args.seeds for arm in ("vae", "flow", *ARMS)])


if __name__ == "__main__":
    main()
