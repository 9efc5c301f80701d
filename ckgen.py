"""ckgen: checkerboard image generation in one readable file.

Follows David Eigen, "Progressive Checkerboards for Autoregressive Multiscale Image Generation"
(arXiv:2602.03811), in the paper's order. An image becomes a pyramid of small maps of codes
(1x1, 2x2, ... NxN). A transformer draws the maps coarse to fine, and each map in a few steps: step
i draws block b_i, a set of cells spread evenly over the whole map, all of them at once.

    Sec. 3.2, Alg. 1, Fig. 3   scan order                     progressive_checkerboard
    Sec. 3.2                   blocks b_1 ... b_P             split_blocks
    Sec. 4.3, Fig. 4b          scales                         scale_sizes
    Sec. 3.1, Fig. 2           sequence, steps, mask          Layout
    Sec. 3.3                   codes and latents              Tokenizer
    Sec. 3.1                   z_up                           upsample, upsample_pyramid
    Sec. 3.4                   learned RoPE, RoPE mixing      rope_table, rotate, .rotary
    Sec. 3.3                   class token, AdaLN             AdaLN, Checkerboard.conditioning
    Sec. 3.3                   MLP that unfolds latents       Checkerboard.unfold
    Sec. 3.1                   transformer                    Attention, FeedForward, Layer
    Sec. 3.1, Eq. 1            inputs                         Checkerboard.inputs
    Sec. 3.1                   training pass, loss            Checkerboard.forward, loss_by_scale
    Sec. 3.1, 4.1, 4.5         sampling, guidance, entropy    sample, draw, entropy
    Fig. 1                     pictures of the steps          progress_frames

Data flows one way: image -> pyramid of codes -> tokens in layout order -> logits -> codes -> image.

Letters in the shape comments:
    B batch   L tokens of the pyramid, 1 + L with the class token in front   T tokens of one call
    D width   H heads   d = D/H head width   V codes   C code dimension   P steps per scale
    N side of the finest map   n side of a map

Guidance is the paper's: logits = cond + w (cond - uncond). So w = 0 is off, and w is one less than
the scale that much of the literature calls "cfg".

    python ckgen.py                                            prints Fig. 2 and Fig. 3 as text
    python ckgen.py runs/tiny-2x-toy/checkpoint.pt --class star --n 16 --out stars.png

SPDX-License-Identifier: MIT
"""

import argparse
import math
import os
import pickle
import re
import sys
import zipfile
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. Scan order (Sec. 3.2, Algorithm 1). Needs no imports: copy it.


def progressive_checkerboard(size):
    """The progressive checkerboard scan order of a size x size grid (Sec. 3.2, Algorithm 1).

    Returns a new list of all cells [(x, y), ...], x the column and y the row, each 0 ... size-1.
    Any prefix of it is balanced: at every level of the quadtree, the quadrants hold equally many of
    its cells, give or take one. A size that is no power of two takes the order of the next one,
    restricted to the grid; then this holds among the quadrants that lie wholly inside the grid.
    Raises ValueError when size is not a positive integer.

    The order has a closed form: it sorts cells by this key, for powers of two their rank. Write x
    and y in binary; the pair of bits number l, counting from the most significant, l = 0, adds
    (2 * (xbit ^ ybit) + ybit) * 4**l.
    """
    if size != int(size) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")

    def scan(side, x, y):
        if side == 1:
            return [(x, y)]
        half = side // 2
        quadrants = [scan(half, x, y), scan(half, x + half, y + half),  # top left, bottom right
                     scan(half, x + half, y), scan(half, x, y + half)]  # top right, bottom left
        return [cell for turn in zip(*quadrants) for cell in turn]      # round robin

    power_of_two = 1 << (int(size) - 1).bit_length()
    return [(x, y) for x, y in scan(power_of_two, 0, 0) if x < size and y < size]


# ------------------------------------------------------------------------------------------------
# 2. Blocks and scales (Sec. 3.2, Fig. 4b). split_blocks needs no imports either.


def split_blocks(order, steps):
    """Split a scan order into blocks b_1 ... b_P of contiguous cells (Sec. 3.2).

    Returns min(steps, len(order)) lists that concatenate to `order`. Their sizes differ by at most
    one, larger ones first, so that token j of block i always finds a token j in block i - 1. Raises
    ValueError when steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps per scale must be 1 or more, got {steps}")
    if not order:
        return []
    blocks = min(steps, len(order))
    size, larger = divmod(len(order), blocks)  # the first `larger` blocks hold one cell more
    starts = [i * size + min(i, larger) for i in range(blocks + 1)]
    return [order[a:b] for a, b in zip(starts, starts[1:])]


SCALE_RATIOS = {"2": 2.0, "3": 3.0, "4": 4.0, "sqrt2": 2 ** 0.5, "1": None}  # "1": a single scale


def scale_sizes(grid, ratio):
    """Sides of the maps, coarse to fine (Fig. 4b): scale_sizes(16, "4") == (1, 4, 16).

    grid is the side of the finest map, ratio a key of SCALE_RATIOS. Divides by the ratio down to 1
    in real numbers, then rounds half to even. Raises ValueError for another ratio or a grid < 1.
    """
    if grid < 1 or ratio not in SCALE_RATIOS:
        raise ValueError(f"need a grid of 1 or more and a ratio among {', '.join(SCALE_RATIOS)}, "
                         f"got grid {grid}, ratio {ratio}")
    sizes = [float(grid)]
    while SCALE_RATIOS[ratio] and sizes[-1] > 1:
        sizes.append(max(1.0, sizes[-1] / SCALE_RATIOS[ratio]))
    return tuple(sorted({round(n) for n in sizes}))


# ------------------------------------------------------------------------------------------------
# 3. Layout (Fig. 2). Everything about the sequence is fixed by the sizes and P, so it is a table.
#
# A location is an index into the flat pyramid: the maps row by row, coarse to fine, 0 ... L-1. Two
# more locations stand for what is no cell of it; as indices they are the last rows of the rotary
# table, which has L + 2.

EMPTY = -1  # "the block before" of a scale's first block: there is none
CLASS = -2  # the class token


class Step(NamedTuple):
    """One sampling step: block b_i of a scale, at tokens start ... end-1 of the sequence."""
    scale: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The sequence of 1 + L tokens, class token first. Training and sampling read this table."""
    sizes: tuple          # side n of each scale's map, coarse to fine
    here: torch.Tensor    # (1+L,) location b_i that a token predicts (CLASS for the class token)
    before: torch.Tensor  # (1+L,) location b_{i-1} that it reads (EMPTY in a scale's first block,
    #                       CLASS for the class token)
    block: torch.Tensor   # (1+L,) number of the block, counted through all scales; class token 0
    steps: tuple          # (Step, ...) in the order of sampling, not counting the class token

    @staticmethod
    def make(sizes, steps_per_scale, device="cpu"):
        """The layout of a pyramid with maps of these sizes, each split into P blocks (Sec. 3.1)."""
        here, before, block, steps, offset = [CLASS], [CLASS], [0], [], 0
        for scale, n in enumerate(sizes):
            previous = None
            for cells in split_blocks(progressive_checkerboard(n), steps_per_scale):
                locations = [offset + y * n + x for x, y in cells]
                steps.append(Step(scale, len(here), len(here) + len(cells)))
                here += locations
                before += previous[:len(cells)] if previous else [EMPTY] * len(cells)
                block += [len(steps)] * len(cells)
                previous = locations
            offset += n * n
        tables = (torch.tensor(table, device=device) for table in (here, before, block))
        return Layout(tuple(sizes), *tables, tuple(steps))

    def mask(self):
        """Blockwise causal mask (1+L, 1+L), True where the row's token may attend to the column's:
        to all of its own block and of every earlier one, over all scales (Sec. 3.1, Fig. 2)."""
        return self.block[:, None] >= self.block[None, :]


def scale_slices(sizes):
    """Where each scale lies in the flat pyramid: [slice, ...], coarse to fine."""
    ends = accumulate(n * n for n in sizes)
    return [slice(end - n * n, end) for n, end in zip(sizes, ends)]


# ------------------------------------------------------------------------------------------------
# 4. Tokenizer (Sec. 3.3): images to codes and back.
#
# Two encoder and decoder pairs: a small one that trains in a minute on a CPU, and LlamaGen's VQGAN
# [36, 4], which the paper uses and released weights need.


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a Tokenizer. It has the VQGAN form when channels are given, else the small one."""
    codes: int = 256        # V, entries of the codebook
    code_dim: int = 8       # C
    stride: int = 4         # pixels per cell of the map
    width: int = 64         # channels between encoder and latents (VQGAN's z_channels)
    channels: tuple = ()    # VQGAN: channels of each level; each next level halves the side
    res_blocks: int = 2     # VQGAN: residual blocks in a level of the encoder


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3; the small form has no norm."""

    def __init__(self, before, after, norm=lambda width: nn.GroupNorm(32, width, eps=1e-6)):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def small_pair(config):
    """The small encoder and decoder. The encoder sees one cell at a time: equal patches get equal
    codes wherever they are, and codes that depend on little are easy to predict. The decoder sees a
    neighbourhood."""
    pixels, width = 3 * config.stride ** 2, config.width
    blocks = [ResidualBlock(width, width, norm=lambda _: nn.Identity()) for _ in range(3)]
    return (nn.Sequential(nn.PixelUnshuffle(config.stride), nn.Conv2d(pixels, width, 1), nn.SiLU()),
            nn.Sequential(*blocks, nn.Conv2d(width, pixels, 1), nn.PixelShuffle(config.stride)))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all places of a map, one head."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)                         # (B, h*w, C)
        return x + self.out(y.transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """Halve the side of a map."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one column right, one row below


class Upsample(nn.Module):
    """Double the side of a map."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Level(nn.Module):
    """One resolution: residual blocks, each with attention or not, and a change of resolution."""

    def __init__(self, before, after, blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(after if i else before, after)
                                 for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(after) if attention else nn.Identity()
                                  for _ in range(blocks))
        self.resample = resample

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


class VQGANEncoder(nn.Module):
    """Images (B, 3, h, w) to (B, width, h/stride, w/stride); attention at the coarsest level."""

    def __init__(self, config):
        super().__init__()
        *finer, last = widths = config.channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.Sequential(
            *(Level(before, after, config.res_blocks, False, Downsample(after))
              for before, after in zip(widths[:1] + widths, finer)),
            Level(widths[-2], last, config.res_blocks, True, nn.Identity()))
        self.mid = nn.Sequential(ResidualBlock(last, last), AttentionBlock(last),
                                 ResidualBlock(last, last))
        self.norm_out = nn.GroupNorm(32, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, config.width, 3, padding=1)

    def forward(self, images):
        x = self.mid(self.levels(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANDecoder(nn.Module):
    """The encoder's mirror image, with one residual block more in each level."""

    def __init__(self, config):
        super().__init__()
        first, *finer = widths = config.channels[::-1]
        blocks = config.res_blocks + 1
        self.conv_in = nn.Conv2d(config.width, first, 3, padding=1)
        self.mid = nn.Sequential(ResidualBlock(first, first), AttentionBlock(first),
                                 ResidualBlock(first, first))
        self.levels = nn.Sequential(
            Level(first, first, blocks, True, Upsample(first)),
            *(Level(before, after, blocks, False, Upsample(after))
              for before, after in zip(widths, finer[:-1])),
            Level(widths[-2], widths[-1], blocks, False, nn.Identity()))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.levels(self.mid(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


def as_map(rows):
    """(B, n*n, C), a map row by row, to (B, C, n, n)."""
    n = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).unflatten(2, (n, n))


class Tokenizer(nn.Module):
    """A vector-quantised autoencoder with an l2-normalised codebook (Sec. 3.3).

    Each scale is encoded separately from the RGB image, so each scale decodes to a picture by
    itself. Images are (B, 3, h, w) in [-1, 1]; latents (B, C, n, n) have unit length over C.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = (VQGANEncoder(config), VQGANDecoder(config)) \
            if config.channels else small_pair(config)
        self.to_latent = nn.Conv2d(config.width, config.code_dim, 1)
        self.from_latent = nn.Conv2d(config.code_dim, config.width, 1)
        self.register_buffer("codebook_weight", torch.randn(config.codes, config.code_dim))

    def codebook(self):
        """The unit code vectors (V, C)."""
        return F.normalize(self.codebook_weight, dim=-1)

    def encode(self, images):
        """Images (B, 3, h, w) to latents (B, C, h/stride, w/stride), not yet quantised."""
        return F.normalize(self.to_latent(self.encoder(images)), dim=1)

    def quantize(self, latents):
        """Nearest codes (B, n, n) of unit latents (B, C, n, n): nearest = largest dot product."""
        return torch.einsum("bchw,vc->bhwv", latents, self.codebook()).argmax(-1)

    def decode(self, latents):
        """Latents (B, C, n, n) to images (B, 3, n*stride, n*stride)."""
        return self.decoder(self.from_latent(F.normalize(latents, dim=1)))

    def resize(self, images, n):
        """Images made small enough for an n x n map. Bilinear without antialiasing, as released."""
        side = n * self.config.stride
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def encode_pyramid(self, images, sizes):
        """Images (B, 3, h, w) to the codes (B, L) of the flat pyramid with maps of these sizes."""
        maps = [self.quantize(self.encode(self.resize(images, n))) for n in sizes]
        return torch.cat([codes.flatten(1) for codes in maps], 1)

    @torch.no_grad()
    def decode_codes(self, codes):
        """The codes of one map (B, n*n), row by row, to images in [-1, 1]."""
        latents = self.codebook()[codes]                                    # (B, n*n, C)
        return self.decode(as_map(latents)).clamp(-1, 1)


def upsample(latents, n):
    """z_up (Sec. 3.1): latents (B, m*m, C) of a map upsampled to (B, n*n, C), of unit length."""
    up = F.interpolate(as_map(latents), (n, n), mode="bilinear", align_corners=False)
    return F.normalize(up, dim=1).flatten(2).transpose(1, 2)


def upsample_pyramid(latents, sizes):
    """z_up of every scale: (B, L, C) from the latents (B, L, C); zero for the first scale."""
    at = scale_slices(sizes)
    coarser = [upsample(latents[:, at[k]], sizes[k + 1]) for k in range(len(sizes) - 1)]
    return torch.cat([torch.zeros_like(latents[:, at[0]]), *coarser], 1)


# ------------------------------------------------------------------------------------------------
# 5. Transformer (Sec. 3.1, 3.3, 3.4).


@dataclass(frozen=True)
class Config:
    """Sizes of a Checkerboard model. S: width 512, layers 12, heads 16, ffn 1536."""
    sizes: tuple             # sides of the maps, coarse to fine
    classes: int
    codes: int = 256         # V
    code_dim: int = 8        # C
    width: int = 128         # D
    layers: int = 4
    heads: int = 4           # H
    ffn: int = 384           # width of the feed-forward layer
    mixing_layers: int = 2   # layers whose keys mix RoPEs, counted from the first (Sec. 3.4)
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of twice the {self.heads} heads")

    @property
    def length(self):
        """L, the number of cells in the pyramid."""
        return sum(n * n for n in self.sizes)


def rotate(x, rope):
    """Apply rotary embeddings (Sec. 3.4) to x (..., T, d): rope (2, ..., T, d) holds cos and sin.

    Element i is paired with i + d/2: of angles a and b, they turn (u, v) into (u cos a - v sin a,
    v cos b + u sin b). The minus lies in rope, in the first half of sin. The two angles of a pair
    agree when training starts, and are free to part (as released): then it is no rotation any more.
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_table(sizes, head_width):
    """Where the rotary table starts (Sec. 3.4): (L + 2, 2d), rows of d interleaved (cos, sin).

    7/8 of the angles turn with the place in the image, half with x, half with y, in cells of the
    finest map, at frequencies from 1 down to almost 1 / N**2 of a radian a cell; 1/8 turn with the
    scale, by a quarter turn a scale or less. The rows of the class and of the empty location have
    angle zero.
    """
    N, pairs = sizes[-1], head_width // 2
    scale_pairs = max(1, pairs // 8)
    x_pairs = (pairs - scale_pairs + 1) // 2
    y_pairs = pairs - scale_pairs - x_pairs

    def frequencies(count, base):
        return base ** -(torch.arange(count) / max(1, count))

    rows = []
    for k, n in enumerate(sizes):
        centre = (torch.arange(n)[:, None] + 0.5) * N / n                   # (n, 1)
        x = (centre * frequencies(x_pairs, N * N)).expand(n, n, -1)         # (n, n, d/2 * 7/16)
        y = (centre * frequencies(y_pairs, N * N))[:, None].expand(n, n, -1)
        scale = ((k + 1) * torch.pi / 2 * frequencies(scale_pairs, 10)).expand(n, n, -1)
        rows.append(torch.cat([x, y, scale], -1).flatten(0, 1))             # (n*n, d/2)
    angles = torch.cat([*rows, torch.zeros(2, pairs)])                      # (L+2, d/2)
    angles = torch.cat([angles, angles], 1)              # element i and i + d/2: one true rotation
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1)


class AdaLN(nn.Module):
    """RMS norm, then scale and shift from the class embedding [20]: norm(x) * scale + shift.

    The norm keeps its own learned gain, although scale could take it over: as released.
    """

    def __init__(self, width, eps):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)
        self.shift_scale = nn.Linear(width, 2 * width)

    def modulation(self, class_embedding):
        """(B, D) to shift and scale, (B, 1, D) each."""
        return self.shift_scale(F.silu(class_embedding))[:, None].chunk(2, -1)

    def forward(self, x, shift, scale):
        return torch.addcmul(shift, self.norm(x), scale)


FEW_ROWS = {torch.float32: range(4, 65), torch.bfloat16: range(2, 257)}


class Linear(nn.Linear):
    """x W^T without bias, for x (B, T, D).

    The B*T rows of a sampling step are few. On a CPU they go through W x^T: equal up to rounding,
    transposed in memory, and up to twice as fast for the numbers of rows in FEW_ROWS (measured on a
    Xeon with AMX).
    """

    def __init__(self, before, after):
        super().__init__(before, after, bias=False)

    def forward(self, x):
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            rows = x.flatten(0, -2)
            if len(rows) in FEW_ROWS.get(x.dtype, ()):
                return (self.weight @ rows.T).T.unflatten(0, x.shape[:-1])
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention with rotary queries and keys and, when sampling, a KV cache."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x, rope, mask=None, cache=None, start=0):
        """x (B, T, D): tokens start ... start+T-1, to (B, T, D). mask (T, start+T) or None: all see
        all. rope (2, 2, 1, H or 1, T, d), see Conditioning.

        cache is (2, B, H, 1+L, d): keys and values of earlier tokens, to which these are added.
        Without one, start is 0.
        """
        # contiguous: so rotation, cache and attention are faster by more than the copy takes (CPU)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        (q, k), v = rotate(qkv[:2], rope), qkv[2]                           # (B, H, T, d)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            k, v = cache[:, :, :, :end]                                     # (B, H, end, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)         # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2))                       # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Conditioning(NamedTuple):
    """What is constant for an image in one layer: AdaLN's (shift, scale) twice, and the RoPE."""
    attn_mod: tuple       # (B, 1, D) each
    ffn_mod: tuple        # (B, 1, D) each
    rope: torch.Tensor    # (2, 2, 1, H or 1, 1+L, d): cos, sin; of queries, keys; batch; heads; ...


class Layer(nn.Module):
    """x + attention(AdaLN(x)), then x + feed-forward(AdaLN(x))."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = AdaLN(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.ffn_norm = AdaLN(config.width, config.norm_eps)
        self.ffn = FeedForward(config.width, config.ffn)

    def forward(self, x, given, mask=None, cache=None, start=0):
        """x (B, T, D): tokens start ... start+T-1; given is this layer's Conditioning."""
        rope = given.rope[..., start:start + x.shape[1], :]
        x = x + self.attn(self.attn_norm(x, *given.attn_mod), rope, mask, cache, start)
        return x + self.ffn(self.ffn_norm(x, *given.ffn_mod))


# ------------------------------------------------------------------------------------------------
# 6. Model and loss (Sec. 3.1, Eq. 1).


class Checkerboard(nn.Module):
    """The multiscale blockwise checkerboard autoregressor (Sec. 3.1, Fig. 2)."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        self.class_embed = nn.Embedding(config.classes + 1, D)              # last row: no class
        self.pos_embed = nn.Parameter(torch.empty(config.length, D))        # pos[.]
        self.empty_pos = nn.Parameter(torch.empty(D))                       # pos[b_s^0]
        self.empty_code = nn.Parameter(torch.empty(D))                      # z_s[b_s^0]
        self.unfold = nn.Sequential(nn.Linear(config.code_dim, 64), nn.SiLU(),  # Sec. 3.3
                                    nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, D))
        self.up_proj = nn.Linear(D, D)
        self.combine = nn.Linear(4 * D, D)                                  # W_proj of Eq. 1
        self.rope = nn.Parameter(torch.empty(config.length + 2, 2 * D // config.heads))
        self.rope_mix = nn.Parameter(torch.empty(config.mixing_layers, config.heads))  # alpha'
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(D, config.norm_eps)
        self.head = nn.Linear(D, config.codes)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """All initialisation. What is not named here keeps torch's default."""
        for matrix in self.layers.parameters():
            if matrix.ndim == 2:
                nn.init.normal_(matrix, std=0.02)
        for layer in self.layers:               # AdaLN starts as the plain norm: shift 0, scale 1
            for adaln in (layer.attn_norm, layer.ffn_norm):
                nn.init.zeros_(adaln.shift_scale.weight)
                shift, scale = adaln.shift_scale.bias.chunk(2)
                nn.init.zeros_(shift), nn.init.ones_(scale)
        nn.init.normal_(self.class_embed.weight)
        nn.init.normal_(self.pos_embed)
        nn.init.zeros_(self.empty_pos), nn.init.zeros_(self.empty_code)
        nn.init.zeros_(self.rope_mix)           # alpha = sigmoid(0) = 1/2
        nn.init.zeros_(self.head.weight)        # so the loss starts at log V
        nn.init.zeros_(self.head.bias)
        self.rope.copy_(rope_table(self.config.sizes, self.config.width // self.config.heads))

    def rotary(self, layout):
        """Each layer's RoPE (Sec. 3.4), (2, 2, 1, H or 1, 1+L, d): cos and sin of queries and keys.

        Queries use the location that a token predicts. Keys do too, but in the mixing layers they
        use alpha * rope(b_i) + (1 - alpha) * rope(b_{i-1}), with an alpha for every head. The
        mixture is not made unit again; in a scale's first block rope(b_{i-1}) is the EMPTY row.
        """
        cos, sin = F.normalize(self.rope.unflatten(1, (-1, 2)), dim=-1).unbind(-1)  # (L+2, d)
        first, second = sin.chunk(2, -1)
        table = torch.stack([cos, torch.cat([-first, second], -1)])[:, None]        # (2, 1, L+2, d)
        here, before = table[:, :, layout.here], table[:, :, layout.before]  # (2, 1, 1+L, d)
        alpha = self.rope_mix.sigmoid()[:, None, :, None, None]             # (mixing, 1, H, 1, 1)
        mixed = alpha * here + (1 - alpha) * before                         # (mixing, 2, H, 1+L, d)
        ropes = [torch.stack([here.expand_as(keys), keys], 1)[:, :, None]
                 for keys in (*mixed, here)]
        return ropes[:-1] + ropes[-1:] * (len(self.layers) - len(mixed))

    def conditioning(self, labels, layout):
        """The class token (B, 1, D) and a Conditioning for each layer; all constant for an image.

        labels are (B,) integers 0 ... classes, where `classes` itself means no class.
        """
        e = self.class_embed(labels)                                        # (B, D)
        return e[:, None], [
            Conditioning(layer.attn_norm.modulation(e), layer.ffn_norm.modulation(e), rope)
            for layer, rope in zip(self.layers, self.rotary(layout))]

    def inputs(self, latents, z_up, layout, start, end):
        """Eq. 1: the input tokens start ... end-1 of the sequence (start > 0), (B, T, D).

        latents and z_up are (B, L, C), flat pyramids. Only the rows that these tokens read need to
        be filled: z_up at b_i, latents at b_{i-1}. Where there is no b_{i-1}, the index EMPTY = -1
        picks some row, and `where` puts the learned constants in its place.
        """
        here, before = layout.here[start:end], layout.before[start:end]
        empty = (before == EMPTY)[:, None]                                  # (T, 1)
        pos = self.pos_embed[here]                                          # (T, D)
        pos_before = torch.where(empty, self.empty_pos, self.pos_embed[before])
        up = self.up_proj(self.unfold(z_up[:, here]))                       # (B, T, D)
        code_before = torch.where(empty, self.empty_code, self.unfold(latents[:, before]))
        B = len(latents)
        return self.combine(torch.cat([pos.expand(B, -1, -1), up,
                                       pos_before.expand(B, -1, -1), code_before], -1))

    def transform(self, x, given, mask=None, caches=None, start=0):
        """Tokens start ... start+T-1 through all layers: (B, T, D) to float32 logits (B, T, V)."""
        for i, layer in enumerate(self.layers):
            x = layer(x, given[i], mask, None if caches is None else caches[i], start)
        return self.head(self.norm(x)).float()

    def forward(self, latents, labels, layout, noisy=None):
        """Teacher forcing (Sec. 3.1): one parallel pass over the true latents (B, L, C).

        Returns logits (B, L, V) in the order of layout.here[1:]. noisy (B, L, C), when given, is
        upsampled in place of latents (see `replace_codes` in train_tiny.py).
        """
        z_up = upsample_pyramid(latents if noisy is None else noisy, layout.sizes)
        class_token, given = self.conditioning(labels, layout)
        tokens = self.inputs(latents, z_up, layout, 1, len(layout.here))
        x = torch.cat([class_token, tokens], 1)                             # (B, 1+L, D)
        return self.transform(x, given, layout.mask())[:, 1:]


def loss_by_scale(logits, codes, layout):
    """Cross entropy in nats: the flat mean over all locations (Sec. 3.1), and each scale's mean.

    logits (B, L, V) in layout order, codes (B, L) the flat pyramid. Returns a scalar and (scales,).
    """
    targets = codes[:, layout.here[1:]]                                     # (B, L) in layout order
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(0)     # (L,)
    # the tokens of a scale fill the slice that its cells fill in the pyramid, in another order
    return losses.mean(), torch.stack([losses[at].mean() for at in scale_slices(layout.sizes)])


# ------------------------------------------------------------------------------------------------
# 7. Sampler (Sec. 3.1, 4.1, 4.5).


def draw(logits, temperature, generator=None):
    """Draw codes (B, T), each from its own softmax(logits / temperature). logits are (B, T, V),
    float32; temperature is 0 or more, a number or a tensor without dimensions.

    The exponential race: with E ~ Exp(1) for every code, argmax of p / E is a draw from p. Taken as
    argmax of logits - temperature * log E it needs no sum over p, and temperature 0 is no special
    case. Unlike torch.multinomial, it never waits for the GPU.
    """
    race = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - temperature * race.clamp(min=1e-30).log()).argmax(-1)  # not log 0


def entropy(logits):
    """Entropies (B, T), in nats, of softmax(logits) (Sec. 4.5); logits are (B, T, V)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def sample(model, codebook, labels, layout, cfg=0.0, cfg_start=5, temperature=1.0, generator=None,
           return_entropy=False):
    """Draw the codes of one image for each label, block after block: one forward pass a step.

    codebook (V, C) unit vectors; labels (B,) in 0 ... classes-1. Guidance (Sec. 4.1) is
    cond + cfg * (cond - uncond), cfg 0 or more, off for the first cfg_start steps: 5 are, at ratio
    2 and P = 4 or more, the 1x1 and 2x2 maps. Locations of a block are drawn independently. Returns
    the flat pyramid of codes (B, L), on request with their entropies (B, L), guided but at
    temperature 1. Nothing here waits for the GPU, so that a SamplerGraph can hold all of it; for
    its sake cfg and temperature may be tensors without dimensions, and a tensor always guides.
    """
    B, L, device = len(labels), model.config.length, labels.device
    guided = torch.is_tensor(cfg) or cfg > 0
    if guided:  # the batch twice over: with the class, and without
        labels = torch.cat([labels, torch.full_like(labels, model.config.classes)])
    class_token, given = model.conditioning(labels, layout)
    H, d = model.config.heads, model.config.width // model.config.heads
    caches = class_token.new_empty(len(model.layers), 2, len(labels), H, 1 + L, d)
    codes = torch.zeros(B, L, dtype=torch.long, device=device)
    entropies, at = torch.zeros(B, L, device=device), scale_slices(layout.sizes)
    latents, z_up = (codebook.new_zeros(B, L, codebook.shape[1]) for _ in range(2))
    for t, (scale, start, end) in enumerate(layout.steps):
        if scale > 0 and scale != layout.steps[t - 1].scale:  # the scale before is now complete
            z_up[:, at[scale]] = upsample(latents[:, at[scale - 1]], layout.sizes[scale])
        x = model.inputs(latents, z_up, layout, start, end).repeat(1 + guided, 1, 1)
        if t == 0:  # the class token rides along with the first block, which alone needs the mask
            x = torch.cat([class_token, x], 1)
            logits = model.transform(x, given, layout.mask()[:end, :end], caches)[:, 1:]
        else:       # every token sees all that is cached and all of its own block: no mask
            logits = model.transform(x, given, None, caches, start)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = cond + cfg * (cond - uncond) if t >= cfg_start else cond
        drawn = draw(logits, temperature, generator)                        # (B, T)
        here = layout.here[start:end]
        codes[:, here], latents[:, here] = drawn, codebook[drawn]
        if return_entropy:
            entropies[:, here] = entropy(logits)
    return (codes, entropies) if return_entropy else codes


class SamplerGraph:
    """`sample` as one CUDA graph: the thousands of small kernels of its steps, launched at once.

    It is captured for one batch size, layout and cfg_start, with guidance or without; labels, the
    guidance weight and the temperature are its inputs. With the same state of the generator (a CUDA
    one, seeded by the caller) it draws what `sample` draws. Weights that change in place count.
    """

    def __init__(self, model, codebook, layout, batch, generator, guided=True, cfg_start=5):
        self.reads = model, codebook, layout  # where the graph reads, these must stay
        self.guided, self.labels = guided, codebook.new_zeros(batch, dtype=torch.long)
        self.cfg, self.temperature = codebook.new_ones(2, dtype=torch.float32)

        def run(generator):
            return sample(model, codebook, self.labels, layout, self.cfg if guided else 0.0,
                          cfg_start, self.temperature, generator)

        side = torch.cuda.Stream(codebook.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run, not captured, lets the libraries set up
            run(torch.Generator(codebook.device))
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)  # torch 2.14 does so by itself
        with torch.cuda.graph(self.graph, stream=side):
            self.codes = run(generator)

    def __call__(self, labels, cfg=0.0, temperature=1.0):
        """Codes (batch, L) for labels (batch,). Raises ValueError for what was not captured."""
        if len(labels) != len(self.labels) or cfg > 0 and not self.guided:
            raise ValueError(f"captured for {len(self.labels)} labels, guidance {self.guided}; got "
                             f"{len(labels)} labels, cfg {cfg:g}")
        self.labels.copy_(labels)
        self.cfg.fill_(cfg), self.temperature.fill_(temperature)
        self.graph.replay()
        return self.codes.clone()  # the next call writes over self.codes


BATCH = 64  # images sampled or decoded at a time


def generate(model, tokenizer, labels, layout, seed=0, cfg=0.0, cfg_start=5, temperature=1.0,
             graph=None):
    """Sample for any number of labels (n,), which lie on the model's device, with a progress bar:
    yields codes (B, L), batch by batch.

    graph: whether full batches replay a CUDA graph (True: on CUDA only). By default they do on CUDA
    when there are more than four; capturing should take as long as about two.
    """
    generator, codebook = torch.Generator(labels.device).manual_seed(seed), tokenizer.codebook()
    if graph is None:
        graph = labels.is_cuda and len(labels) > 4 * BATCH
    replay = graph and SamplerGraph(model, codebook, layout, BATCH, generator, cfg > 0, cfg_start)
    with tqdm(total=len(labels), desc="sampling", unit="image", leave=False) as bar:
        for batch in labels.split(BATCH):
            if replay and len(batch) == BATCH:
                yield replay(batch, cfg, temperature)
            else:
                yield sample(model, codebook, batch, layout, cfg, cfg_start, temperature, generator)
            bar.update(len(batch))


# ------------------------------------------------------------------------------------------------
# 8. Pictures (Fig. 1).


def to_uint8(images):
    """Images (B, 3, h, w) in [-1, 1] to a numpy array (B, h, w, 3) of 0 ... 255."""
    values = ((images.float() + 1) / 2).clamp(0, 1).mul(255).round().byte()
    return values.permute(0, 2, 3, 1).cpu().numpy()


def decode_scale(tokenizer, codes, sizes, scale=-1):
    """The pictures (B, n*stride, n*stride, 3), uint8, of one scale of pyramids of codes (B, L)."""
    at = scale_slices(sizes)[scale]
    return np.concatenate([to_uint8(tokenizer.decode_codes(batch))
                           for batch in codes[:, at].split(BATCH)])


@torch.no_grad()
def progress_frames(tokenizer, codes, layout):
    """What is known after each step (Fig. 1): [uint8 (B, h, w, 3), ...], one for each step.

    Cells not sampled yet are grey. The decoder sees z_up in their place, so no frame shows anything
    of what comes later. Codes never change once drawn: the finished pyramid is all this needs.
    """
    latents = tokenizer.codebook()[codes]                                   # (B, L, C)
    z_up, at = upsample_pyramid(latents, layout.sizes), scale_slices(layout.sizes)
    side, frames = layout.sizes[-1] * tokenizer.config.stride, []
    for scale, _, end in layout.steps:
        n, cells = layout.sizes[scale], at[scale]
        drawn = torch.zeros(codes.shape[1], dtype=torch.bool, device=codes.device)
        drawn[layout.here[1:end]] = True
        known = torch.where(drawn[cells, None], latents[:, cells], z_up[:, cells])
        picture = F.interpolate(tokenizer.decode(as_map(known)).clamp(-1, 1), (side, side))
        shown = F.interpolate(drawn[cells].float().view(1, 1, n, n), (side, side))
        frames.append(to_uint8(picture * shown))                            # 0 is grey
    return frames


def picture_grid(rows, names=()):
    """One PIL image of rows of pictures, [(k, h, w, 3) uint8, ...], with a name beside each row.

    Small pictures are enlarged by a whole factor, pixel by pixel, so that they can be looked at.
    """
    height, width = rows[0].shape[1:3]
    zoom, gap, columns = max(1, 96 // height), 4, max(len(row) for row in rows)
    height, width = height * zoom, width * zoom
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((int(pen.textlength(name, font_size=14)) + gap for name in names), default=0)
    size = margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap
    grid = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            picture = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (margin + gap + x * (width + gap), gap + y * (height + gap)))
    for y, name in enumerate(names):
        ImageDraw.Draw(grid).text((gap, gap + y * (height + gap) + height // 2), name, "black",
                                  anchor="lm", font_size=14)
    return grid


def save_npz(pictures, shape, file):
    """Write batches of pictures as an .npz with the one array arr_0 of this shape, uint8. numpy's
    savez would hold all of them in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for batch in pictures:
                array.write(batch.tobytes())


def save_gif(frames, file):
    """Write PIL images as an endless GIF, the last one held longer."""
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[250] * (len(frames) - 1) + [2000])


def write_whole(path, save):
    """Write a file whole or not at all: save(open file) under a temporary name, then rename."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if "inline_container" in str(error):  # torch.save's word for a full disk
            raise OSError(f"cannot write {path}: disk full?") from None
        raise


# ------------------------------------------------------------------------------------------------
# 9. Checkpoints.

FORMAT = "ckgen 1"
ENTRIES = {"options": dict, "classes": list, "fingerprint": int, "tokenizer_config": dict,
           "transformer_config": dict, "defaults": dict, "iters": int, "done": dict,
           "optimizers": dict, "log": list, "window": torch.Tensor}


class Checkpoint(NamedTuple):
    """All that sampling needs."""
    model: Checkerboard
    tokenizer: Tokenizer
    classes: list    # names
    defaults: dict   # steps, cfg, temperature: how the run draws its own pictures


def read_file(path):
    """What a file written by torch.save holds. Raises ValueError, in one line, for any other file.

    weights_only=True: torch unpickles tensors and plain values, here also the argparse.Namespace of
    the author's files, and refuses all else, so that no file can run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; name the checkpoint in it") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: no checkpoint, or one that holds more than tensors and "
                         f"plain values and could run code") from None
    except Exception:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: damaged or no checkpoint; truncated, perhaps") from None


def read_checkpoint(path):
    """The dictionary in a file of ours. Raises ValueError, in one line, for any other file."""
    return check_own(path, read_file(path))


def check_own(path, state):
    """What a file holds, if it is a dictionary of ours. Raises ValueError, in one line, if not."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of ckgen (no format entry {FORMAT!r})")
    for key, kind in ENTRIES.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{path}: damaged: its entry {key!r} is no {kind.__name__}")
    return state


def load(path, device="cpu", dtype=torch.float32):
    """Load a Checkpoint for sampling: one of ours, or one that the paper's author released, with
    all weights in this dtype. Raises ValueError, in one line, when the file is neither.
    """
    state = read_file(path)
    tensors = state.get("model") if isinstance(state, dict) else None
    released = isinstance(tensors, dict) and count(tensors, r"(llama|lm_head)\..*") > 0
    if released:
        checkpoint = from_released(path, tensors)
    else:
        checkpoint = from_own(path, check_own(path, state))
    # channels_last makes convolutions faster (Xeon with AMX: 1.1 times in float32, 1.8 in bfloat16)
    tokenizer = checkpoint.tokenizer.to(device, dtype, memory_format=torch.channels_last)
    return checkpoint._replace(model=checkpoint.model.to(device, dtype).eval(),
                               tokenizer=tokenizer.eval())


def from_own(path, state):
    """The Checkpoint in a dictionary that train_tiny.py wrote. Raises ValueError, in one line, when
    it holds none."""
    if "transformer" not in state:
        raise ValueError(f"{path}: its training has not come to the transformer yet; the command "
                         f"that started it continues it")
    try:
        model = Checkerboard(Config(**state["transformer_config"]))
        tokenizer = Tokenizer(TokenizerConfig(**state["tokenizer_config"]))
        fill(model, state["transformer"], path)
        fill(tokenizer, state["tokenizer"], path)
        return Checkpoint(model, tokenizer, state["classes"], state["defaults"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from None


def fill(module, tensors, path, names=()):
    """Load a state dict whose keys are ours, or what the patterns `names` make of ours. Raises
    ValueError naming the first three keys that do not fit."""
    theirs = {}
    for key in (own := module.state_dict()):
        theirs[key] = key
        for ours, other in names:
            theirs[key] = re.sub(ours, other, theirs[key])
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    wrong = [f"{theirs[key]} is {'missing' if theirs[key] not in shapes else shapes[theirs[key]]}, "
             f"not {tuple(value.shape)}" for key, value in own.items()
             if shapes.get(theirs[key]) != value.shape]
    wrong += [f"{key} is unknown" for key in sorted(shapes.keys() - theirs.values())]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of its tensors do not fit: {'; '.join(wrong[:3])}")
    module.load_state_dict({key: tensors[theirs[key]] for key in own})


# The author's released files (github.com/deigen/checkerboardgen) and LlamaGen's tokenizer: our
# names, as patterns, and theirs.

RELEASED_NAMES = [
    (r"^norm\.", "llama.norm."), (r"^layers\.", "llama.layers."),
    (r"attn_norm\.norm\.", "attention_norm."), (r"ffn_norm\.norm\.", "ffn_norm."),
    (r"attn_norm\.shift_scale", "input_modulation.adaLN_modulation.1"),
    (r"ffn_norm\.shift_scale", "post_attention_modulation.adaLN_modulation.1"),
    (r"attn\.qkv", "attention.wqkv"), (r"attn\.out", "attention.wo"),
    (r"ffn\.gate", "feed_forward.w1"), (r"ffn\.down", "feed_forward.w2"),
    (r"ffn\.up", "feed_forward.w3"), (r"^rope_mix$", "llama.rotary_emb.mixing_coeffs"),
    (r"^rope$", "llama.rotary_emb.position_embeddings.parametrizations.weight.original"),
    (r"^class_embed\.", "class_embeddings."), (r"^pos_embed$", "embed_positions.weight"),
    (r"^empty_code$", "empty_token_emb"), (r"^empty_pos$", "empty_token_pos"),
    (r"^unfold", "embed_codevecs_mlp.net"), (r"^up_proj", "src_latents_proj"),
    (r"^combine", "combine_inputs"), (r"^head", "lm_head")]
RELEASED_TOKENIZER_NAMES = [
    (r"\.levels\.", ".conv_blocks."), (r"^(encoder.*\.)resample", r"\1downsample"),
    (r"^(decoder.*\.)resample", r"\1upsample"), (r"shortcut", "nin_shortcut"),
    (r"\.out\.", ".proj_out."), (r"^to_latent", "quant_conv"), (r"^from_latent", "post_quant_conv"),
    (r"^codebook_weight$", "quantize.embedding.parametrizations.weight.original")]
STATISTICS = ("quantize.initialized", "cluster_usage_train", "quantize.codebook_used")  # unused


def count(keys, pattern):
    """How many keys a pattern matches."""
    return sum(re.fullmatch(pattern, str(key)) is not None for key in keys)


def read_sizes(path, tensors, read):
    """read(): sizes off the tensors of a released file. Raises ValueError when one is not there."""
    if odd := [key for key, value in tensors.items() if not torch.is_tensor(value)]:
        raise ValueError(f"{path}: its entry {odd[0]!r} is no tensor")
    try:
        return read()
    except KeyError as error:
        raise ValueError(f"{path}: its tensor {error} is missing") from None
    except (IndexError, ValueError, StopIteration, ZeroDivisionError):
        raise ValueError(f"{path}: the shapes of its tensors are those of no model") from None


def from_released(path, tensors):
    """The Checkpoint in the author's state dict. All sizes are read off the tensors."""
    own = {key: value for key, value in tensors.items() if not key.startswith("autoenc.")}

    def sizes():
        length, width = own["embed_positions.weight"].shape
        table = own["llama.rotary_emb.position_embeddings.parametrizations.weight.original"]
        pyramids = [scale_sizes(2 ** i, ratio) for i in range(10) for ratio in SCALE_RATIOS]
        return Config(
            sizes=next(sizes for sizes in pyramids if sum(n * n for n in sizes) == length),
            classes=len(own["class_embeddings.weight"]) - 1, codes=len(own["lm_head.weight"]),
            code_dim=own["embed_codevecs_mlp.net.0.weight"].shape[1], width=width,
            layers=count(own, r"llama\.layers\.\d+\.attention\.wqkv\.weight"),
            heads=2 * width // table.shape[1],
            ffn=len(own["llama.layers.0.feed_forward.w1.weight"]),
            mixing_layers=len(own["llama.rotary_emb.mixing_coeffs"]))

    model = Checkerboard(read_sizes(path, own, sizes))
    if "src_latents_proj.weight" not in own:  # older files: the identity
        own |= {"src_latents_proj.weight": torch.eye(model.config.width),
                "src_latents_proj.bias": torch.zeros(model.config.width)}
    fill(model, own, path, RELEASED_NAMES)
    tokenizer = released_tokenizer(path, {key.removeprefix("autoenc."): value
                                          for key, value in tensors.items() if key not in own})
    return Checkpoint(model, tokenizer, [str(i) for i in range(model.config.classes)],
                      {"steps": 4, "cfg": 1.5, "temperature": 1.0})


def released_tokenizer(path, tensors):
    """A Tokenizer of the VQGAN form from the author's or LlamaGen's state dict."""
    own = {key: value for key, value in tensors.items() if key not in STATISTICS}
    codebook = "quantize.embedding.parametrizations.weight.original"
    if "quantize.embedding.weight" in own:  # LlamaGen's
        own[codebook] = own.pop("quantize.embedding.weight")

    def sizes():
        levels = count(own, r"encoder\.conv_blocks\.\d+\.res\.0\.conv1\.weight")
        codes, code_dim = own[codebook].shape
        return TokenizerConfig(
            codes, code_dim, stride=2 ** (levels - 1), width=len(own["encoder.conv_out.weight"]),
            channels=tuple(len(own[f"encoder.conv_blocks.{i}.res.0.conv1.bias"])
                           for i in range(levels)),
            res_blocks=count(own, r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight"))

    tokenizer = Tokenizer(read_sizes(path, own, sizes))
    fill(tokenizer, own, path, RELEASED_TOKENIZER_NAMES)
    return tokenizer


def load_tokenizer(path):
    """The Tokenizer in LlamaGen's vq_ds16_c2i.pt or in the author's autoencoder file: the tensors
    lie under "state_dict", under "model" or bare. Raises ValueError for any other file."""
    tensors = read_file(path)
    for key in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: no tokenizer: no state dict in it")
    return released_tokenizer(path, tensors)


# ------------------------------------------------------------------------------------------------
# 10. Command line.


def number(kind, low, high):
    """An argparse type: a number of this kind (int or float) from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value
    return parse


def name(text):
    """An argparse type: anything but the empty string, which an unset shell variable leaves."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def pick_device(name=None):
    """torch.device by name (cpu, cuda, cuda:1, mps), by default cuda where there is one; a CUDA
    device has an index and becomes the current one.

    Raises ValueError when the name is unknown or this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # what a CPU build of torch raises for cuda
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: not to be had here; known are cpu, cuda, cuda:1, mps")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device refuses one without an index
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """torch.dtype by name, "float32" or "bfloat16"; for None, bfloat16 on CUDA, else float32."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def pick_classes(wanted, classes):
    """Class numbers for names or numbers, all for none. Raises ValueError for an unknown one."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}  # a name comes first
    for name in wanted:
        if name not in numbers:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise ValueError(f"--class {name}: unknown; known: {known} (0 to {len(classes) - 1})")
    return list(dict.fromkeys(numbers[name] for name in wanted)) or list(range(len(classes)))


def explain():
    """Print the scan order (Fig. 3), the layout of a small pyramid and its mask (Fig. 2)."""
    rank = {cell: i + 1 for i, cell in enumerate(progressive_checkerboard(8))}
    print("Scan order of an 8x8 grid (Sec. 3.2, Fig. 3): cell 1 is sampled first. With P = 8\n"
          "steps, step 1 takes cells 1-8, step 2 cells 9-16, and so on.\n")
    for y in range(8):
        print("  ", *(f"{rank[x, y]:3d}" for x in range(8)))

    sizes, P = (1, 2, 4), 4
    layout = Layout.make(sizes, P)
    print(f"\nLayout of a pyramid with maps of side {sizes}, P = {P} steps per scale (Sec. 3.1,\n"
          "Fig. 2). A cell is written x,y. A token predicts the code of its own cell from the map\n"
          "before, upsampled, and from the code of a cell in the block before (- for none).\n")
    corner = {n: at.start for n, at in zip(sizes, scale_slices(sizes))}

    def cells(locations, n):
        places = [(location - corner[n]) for location in locations.tolist() if location >= 0]
        return " ".join(f"{place % n},{place // n}" for place in places) or "-"

    print("   step  scale  predicts             reads")
    for t, (scale, start, end) in enumerate(layout.steps, 1):
        n = sizes[scale]
        print(f"   {t:4d}  {n}x{n}    {cells(layout.here[start:end], n):19s}  "
              f"{cells(layout.before[start:end], n)}")

    print("\nIts blockwise causal mask (Sec. 3.1, Fig. 2): a row's token attends to the columns\n"
          "marked ##. The class token comes first.\n")
    for row in layout.mask().tolist():
        print("  ", "".join("##" if allowed else " ." for allowed in row))
    print("\nNext: python train_tiny.py --scale 2 --steps 4; then python ckgen.py CHECKPOINT")


def parse_arguments(arguments):
    """The parser and what it reads off the command line."""
    parser = argparse.ArgumentParser(
        description="Sample images from a checkpoint. Without arguments: explain the scan order, "
                    "the layout and the mask (Fig. 2 and 3 of the paper) as text.",
        epilog="example: python ckgen.py runs/tiny-2x-toy/checkpoint.pt --class star ring --n 16")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=name, help="a checkpoint.pt written by train_tiny.py")
    add("--class", dest="classes", nargs="+", default=[], metavar="NAME",
        help="classes by name or number, which take turns (default: all)")
    add("--n", type=number(int, 1, 10 ** 7), help="images in all (default: 8 of each class)")
    add("--steps", type=number(int, 1, 10 ** 6), metavar="P", help="steps per scale, any number, "
        "whatever the training used: fewer is faster (default: the checkpoint's)")
    add("--cfg", type=number(float, 0, 1000), metavar="W", help="guidance, logits = cond + W (cond "
        "- uncond): 0 is off, W is the usual cfg scale minus 1 (default: the checkpoint's)")
    add("--cfg-start", type=number(int, 0, 10 ** 6), default=5, metavar="STEP",
        help="first steps without guidance, counted over all scales (default: 5)")
    add("--temperature", type=number(float, 0, 100), metavar="T", help="divides the logits; 0 "
        "takes the likeliest code (default: the checkpoint's)")
    add("--seed", type=number(int, 0, 10 ** 9), default=0,
        help="same seed, same machine, same --dtype: same images")
    add("--device", type=name, help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="of weights and activations (default: "
        "bfloat16 on CUDA, else float32); with S and L it is faster on CPUs that have AMX, too")
    add("--eager", action="store_true", help="launch kernel by kernel on CUDA, where more than 256 "
        "images otherwise replay a CUDA graph")
    add("--out", default="samples.png", help=".png: a grid, or the image itself for --n 1; .gif: "
        "the steps; .npz: uint8 NHWC under arr_0 (default: samples.png)")
    return parser, parser.parse_args(arguments)


def arrange(pictures, names):
    """One PIL image of the pictures (n, h, w, 3) of classes that took turns: a row for each class;
    rows of eight for a single class; the picture itself when there is but one."""
    if len(pictures) == 1:
        return Image.fromarray(pictures[0])
    if len(names) == 1:
        return picture_grid(np.split(pictures, range(8, len(pictures), 8)))
    return picture_grid([pictures[i::len(names)] for i in range(len(names))], names)


def sample_to_file(args):
    """Sample what the command line asks for and write it. Raises ValueError for bad input."""
    extension = os.path.splitext(args.out)[1].lower()
    folder = os.path.dirname(args.out) or "."
    if extension not in (".png", ".gif", ".npz"):
        raise ValueError(f"--out {args.out}: the name must end in .png, .gif or .npz")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {args.out}: there is no folder {folder} that can be written to")
    if os.path.isdir(args.out):
        raise ValueError(f"--out {args.out}: is a folder")
    device = pick_device(args.device)
    model, tokenizer, names, preset = load(args.checkpoint, device, pick_dtype(args.dtype, device))
    classes = pick_classes(args.classes, names)
    n = args.n or 8 * len(classes)
    classes = classes[:n]
    steps, cfg, temperature = (preset[key] if getattr(args, key) is None else getattr(args, key)
                               for key in ("steps", "cfg", "temperature"))
    layout = Layout.make(model.config.sizes, steps, device)
    labels = torch.tensor([classes[i % len(classes)] for i in range(n)], device=device)
    batches = generate(model, tokenizer, labels, layout, args.seed, cfg, args.cfg_start,
                       temperature, graph=False if args.eager else None)

    if extension == ".npz":
        side = layout.sizes[-1] * tokenizer.config.stride
        pictures = (decode_scale(tokenizer, codes, layout.sizes) for codes in batches)
        write_whole(args.out, lambda file: save_npz(pictures, (n, side, side, 3), file))
    else:
        codes, rows = torch.cat(list(batches)), [names[c] for c in classes]
        if extension == ".gif":
            frames = progress_frames(tokenizer, codes, layout)
            images = [arrange(frame, rows) for frame in frames]
            write_whole(args.out, lambda file: save_gif(images, file))
        else:
            image = arrange(decode_scale(tokenizer, codes, layout.sizes), rows)
            write_whole(args.out, lambda file: image.save(file, "PNG"))
    if cfg > 0 and args.cfg_start >= len(layout.steps):
        print(f"note: there are {len(layout.steps)} steps, so guidance from --cfg-start "
              f"{args.cfg_start} on never begins")
    print(f"wrote {args.out}: {n} images of {len(classes)} classes, {len(layout.steps)} steps each "
          f"({steps} per scale), cfg {cfg:g}, temperature {temperature:g}, seed {args.seed}")


def main(arguments=None):
    """The command line of this file."""
    parser, args = parse_arguments(arguments)
    if args.checkpoint is None:
        return explain()
    try:
        sample_to_file(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; nothing written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
