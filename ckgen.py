"""ckgen: checkerboard image generation in one file.

Implements David Eigen, "Progressive Checkerboards for Autoregressive Multiscale Image Generation"
(arXiv:2602.03811): scan order, model, training step, sampling.

An image becomes a pyramid of small maps of codes, say 1x1, 2x2, ... NxN. A transformer draws the
maps from coarse to fine. Each map takes P steps, or one step a cell if it has fewer than P cells.
Step i draws all cells of block b_i at once, each without knowing the others. Near cells depend on
each other most, so the cells of a block are spread evenly over the map.

    python ckgen.py                                                  explain the order and the mask
    python train_tiny.py                                             train tokenizer and model
    python ckgen.py runs/toy-2x/checkpoint.pt --class star --n 16    draw images

From paper to code:

    Sec. 3.2, Alg. 1, Fig. 3   scan order                     progressive_checkerboard
    Sec. 4.3, Fig. 4b          scales                         scale_sizes
    Sec. 3.1, 3.2, Fig. 2      blocks, steps, mask            Layout
    Sec. 3.3                   codes, code vectors, latents   Tokenizer
    Sec. 3.4                   learned RoPE, RoPE mixing      rope_table, rotate, Checkerboard.ropes
    Sec. 3.1, 3.3              AdaLN, transformer             Layer, Checkerboard.transform
    Sec. 3.1, 3.3, Eq. 1       z_up, inputs                   upsample, Checkerboard.inputs
    Sec. 3.1, 4.1              training step, loss            training_draws, training_loss
    Sec. 3.1, 4.1              sampling, guidance             sample
    Fig. 1                     the map after each step        progress_frames

Letters:

    B  images of a batch      V  codes                n  a map (a scale) has n x n cells
    L  cells of a pyramid     C  code dimension       N  the finest map has N x N cells
    T  tokens of one pass     D  width                H  attention heads
    P  steps for each map     d  width of a head, D / H

Data flows one way: image -> pyramid of codes -> tokens in layout order -> logits -> codes -> image.

    name      in the paper       shape          what it is
    latents                      (B, C, n, n)   what the encoder gives, of unit length
    codes                        (B, L)         for each cell, the number 0 ... V-1 of a code vector
    z         z_s                (B, L, C)      the code vectors of these codes, of unit length
    z_up      z^up_{s-1}         (B, L, C)      z of the next coarser map, enlarged
    cell      b_s^i              (1+L,)         layout.cell: the cell that a token predicts
    before    b_s^{i-1}          (1+L,)         layout.before: the cell of b_{i-1} that it reads
    pos       pos[.]             (L, D)         learned, one for each cell: embed_positions
    alpha     alpha_{lh}         (H,)           how much of a key's RoPE is that of its own cell

In pyramid order, the maps follow one another, each row by row: codes, z and z_up have it, and a
slice of them is a map. In layout order, blocks follow one another as they are drawn: tokens and
logits have it, and a slice of them is a block. The class token comes first, so a sequence is 1 + L
long. Reading x[:, layout.cell[1:]] leads from pyramid order to layout order; writing to it,
x[:, layout.cell[1:]] = y, leads back.

"As released" marks what the author's code and models do where the paper leaves it open or differs:
github.com/deigen/checkerboardgen, commit f5052bd. "Ours" marks what is chosen here. Most parameters
have their released names (w1, ...).

Guidance is logits = cond + cfg (cond - uncond), as released. These are logits with the class and
without; cfg = 0 is none. Where others write uncond + g (cond - uncond), g is 1 + cfg.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import fnmatch
import functools
import math
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

# 1. Scan order and scales (Sec. 3.2, Algorithm 1; Fig. 4b) ----------------------------------------

def progressive_checkerboard(size):
    """Algorithm 1: all cells (x, y) of a size x size grid in scan order.

    The order is balanced: after any number of cells, the four quadrants of the grid hold equally
    many of them, to within one, and so do the quadrants of each quadrant, and so on. Any order of
    the four would do for that; this one visits diagonal ones first, so that the first half of the
    cells is a checkerboard, not stripes.

    A size that is not a power of two takes the order of the next power of two, without the cells
    outside the grid. Then balance is sure only within quadrants that lie wholly inside. Raises
    ValueError if size < 1. The function stands alone, to be copied.
    """
    if size < 1:
        raise ValueError(f"the size of a grid is 1 or more, not {size}")

    def scan(side, x, y):
        if side == 1:
            return [(x, y)]
        d = side // 2
        quadrants = [scan(d, x, y), scan(d, x + d, y + d),         # top left, bottom right
                     scan(d, x + d, y), scan(d, x, y + d)]         # top right, bottom left
        return [cell for turn in zip(*quadrants) for cell in turn]  # round robin

    power_of_two = 1 << (size - 1).bit_length()
    return [(x, y) for x, y in scan(power_of_two, 0, 0) if x < size and y < size]


def scale_sizes(grid, ratio):
    """Sides of the maps, coarse to fine (Fig. 4b). For the 16x16 grid of a 256-pixel image:

        ratio    sides                   L      steps with P = 4, P = 8
        sqrt 2   1 2 3 4 6 8 11 16       507    29, 53
        2        1 2 4 8 16              341    17, 29
        3        1 2 5 16                286    13, 21
        4        1 4 16                  273    9, 17
        1        16                      256    4, 8   (the single-scale baseline)

    Ratio 2 takes 17 steps with P = 4, not 5 * 4, as the 1x1 map has one cell and so takes one step.
    """
    sizes = [grid]
    while ratio > 1 and sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] / ratio))
    # Fractions are rounded at the end, as released. A set, because 1.41 and 1 both become 1.
    return tuple(sorted({round(n) for n in sizes}))


# 2. Layout: the token sequence (Sec. 3.1, Fig. 2) -------------------------------------------------
#
# A cell is an index 0 ... L-1 into the pyramid. EMPTY and CLASS stand where a cell would. They are
# negative, so as indices they pick the last two rows of the RoPE table, which are theirs.

EMPTY = -1  # for the block before the first block of a map
CLASS = -2  # for the class token


class Layout:
    """The sequence of tokens for maps of these sizes, each split into P blocks.

    Mask, inputs, loss and sampling all read this one table, so training and sampling agree.

    Token 0 is the class token, a block by itself. Then come the blocks of the first map, those of
    the second, and so on. A step draws one block. Token j of block b_i predicts the j-th cell of
    b_i, and reads the j-th cell of b_{i-1} (Eq. 1; that it is the j-th is as released). For a 4x4
    map alone and P = 4, step 1 draws cells 0 10 2 8; step 2 draws 5 15 7 13 and reads 0 10 2 8.

    If n is a power of two, the cell that is read is a neighbour for P = 2 or 4, if only diagonally,
    and one to three cells away for P = 8. Other n or P may put it far away. No token reads the last
    block of a map: the next map learns of it by z_up.

    If P does not divide n * n, blocks differ in size by one (ours; as released, all are equal but a
    short last one). Larger blocks come first, so each token finds a cell to read.
    """

    def __init__(self, sizes, P, device="cpu"):
        self.sizes = tuple(sizes)
        self.scales = []  # one slice of the pyramid for each map; no class token in it
        self.steps = []   # (scale, start, end): this step draws tokens start ... end-1
        blocks = [torch.tensor([CLASS])]
        blocks_before = [torch.tensor([CLASS])]
        start = 1
        for scale, n in enumerate(sizes):
            first = start - 1  # this map's first cell; the class token is no cell
            self.scales.append(slice(first, first + n * n))
            order = torch.tensor([first + y * n + x for x, y in progressive_checkerboard(n)])
            before = torch.full((n * n,), EMPTY)
            for block in order.tensor_split(min(P, n * n)):  # sizes differ by one, larger first
                self.steps.append((scale, start, start + len(block)))
                blocks.append(block)
                blocks_before.append(before[:len(block)])
                before = block
                start += len(block)
        self.cell = torch.cat(blocks).to(device)           # (1+L,) the cell that a token predicts
        self.before = torch.cat(blocks_before).to(device)  # (1+L,) the cell that it reads

        # mask[q, k] (1+L, 1+L): token q sees token k, if k's block is not later than q's. Tokens of
        # one block see each other: no input of a block holds a code of that block, so nothing
        # leaks. All see the class token; it sees itself alone.
        numbers = [torch.full_like(block, i) for i, block in enumerate(blocks)]
        number = torch.cat(numbers).to(device)             # (1+L,) of its block
        self.mask = number[:, None] >= number


# 3. Tokenizer (Sec. 3.3): images to codes and back ------------------------------------------------

@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a Tokenizer: a small one (ours), or LlamaGen's VQGAN if `channels` are given."""
    codes: int = 256       # V
    code_dim: int = 8      # C
    stride: int = 4        # pixels per cell, in both directions
    width: int = 64        # channels of the encoder's output
    channels: tuple = ()   # VQGAN, fine to coarse: LlamaGen's are 128, 128, 256, 256, 512
    res_blocks: int = 2    # VQGAN: residual blocks for each resolution


class Tokenizer(nn.Module):
    """A vector-quantised autoencoder of images (B, 3, h, w) in [-1, 1]. Latents and code vectors
    have unit length, as released. Each map is encoded from the image by itself, so each can be
    decoded to a picture."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        make_halves = vqgan_halves if config.channels else small_halves  # both: Appendix A
        self.encoder, self.decoder = make_halves(config)
        self.quant_conv = nn.Conv2d(config.width, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.width, 1)
        # Not a parameter: train_tiny.py moves each code vector to the mean of its latents, as
        # k-means does (ours), with no learning rate. The paper minimises an L2 loss (Sec. 4.1).
        self.register_buffer("codebook_weight", torch.randn(config.codes, config.code_dim))

    def codebook(self):
        """The code vectors (V, C), of unit length."""
        return F.normalize(self.codebook_weight, dim=-1)

    def encode(self, images):
        """Images to latents (B, C, n, n), not yet quantised."""
        features = self.encoder(images.to(self.quant_conv.weight.dtype))
        return F.normalize(self.quant_conv(features).float(), dim=1)

    def quantize(self, latents):
        """Latents (B, C, n, n) to the codes (B, n, n) of the nearest code vectors. Among unit
        vectors, the nearest has the largest dot product."""
        return torch.einsum("bchw,vc->bhwv", latents, self.codebook()).argmax(-1)

    def decode(self, latents):
        """Latents or code vectors (B, C, n, n) to images (B, 3, n * stride, n * stride)."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def resize(self, images, n):
        """Images of the size that encodes to an n x n map. No antialiasing: as released."""
        side = n * self.config.stride
        return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def encode_pyramid(self, images, sizes):
        """Images to the codes (B, L) of their pyramid."""
        maps = [self.quantize(self.encode(self.resize(images, n))) for n in sizes]
        return torch.cat([codes.flatten(1) for codes in maps], 1)

    @torch.no_grad()
    def decode_codes(self, codes):
        """Codes of one map (B, n*n) to images."""
        return self.decode(as_map(self.codebook()[codes]))


def as_map(rows):
    """(B, n*n, C) to (B, C, n, n)."""
    n = math.isqrt(rows.shape[1])
    return rows.transpose(1, 2).unflatten(2, (n, n))


# 4. Transformer (Sec. 3.1, 3.3, 3.4) --------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Sizes of a Checkerboard. The defaults are those of model tiny in train_tiny.py, with 1.3M
    parameters. Model S has width 512, 12 layers, 16 heads: 58M for ImageNet. Model L has 1024, 20,
    16: 368M as released (the paper says 343M)."""
    sizes: tuple            # sides of the maps, coarse to fine
    classes: int
    codes: int = 256        # V
    code_dim: int = 8       # C
    width: int = 128        # D
    layers: int = 4
    heads: int = 4          # H
    ffn: int = 0            # width of the feed-forward layers; 0: three times D, as released
    mixing_layers: int = 2  # the first layers, whose keys mix RoPE (2: as released)

    @property
    def length(self):
        """L, the number of cells."""
        return sum(n * n for n in self.sizes)


def rope_table(sizes, head_width):
    """The learned RoPE's initial values (Sec. 3.4), (L + 2, 2 d): a row for each cell, then one for
    CLASS and one for EMPTY.

    RoPE rotates elements e and e + d/2 of a head, as a pair, by an angle of the cell. So the
    product of a query and a key depends on place only by the offset between their cells. Of the
    d/2 pairs, 7/8 are for space, half of them for x and half for y, and 1/8 are for the scale.

    Pair i of the k pairs for x rotates by x N^(-2i/k). For i = 0 this is x itself: on the finest
    map, a radian from one cell to the next, which tells neighbours apart. The last pair rotates a
    hundred times less (N = 16, d = 32), so place hardly matters to it. Pairs for y do the same.
    Pair i of the k pairs for the scale rotates by ((m + 1) pi/2) 10^(-i/k) on map m = 0, 1, ...:
    for i = 0, a quarter turn from one map to the next. These formulas are as released. So is the
    table: it has an angle for each of the d elements, and CLASS and EMPTY start with angle 0.

    Two things are ours. x and y are those of the cell's centre, in cells of the finest map, so a
    place has nearly the same x and y in all maps. The two elements of a pair start with the same
    angle, so RoPE starts as a true rotation; in the author's code they start with different ones.
    """
    N = sizes[-1]
    pairs = head_width // 2
    scale_pairs = max(1, pairs // 8)
    x_pairs = (pairs - scale_pairs + 1) // 2
    y_pairs = pairs - scale_pairs - x_pairs

    def angles_of(position, count, base):
        return position[..., None] * base ** -(torch.arange(count) / count)

    rows = []
    for m, n in enumerate(sizes):
        centre = (torch.arange(n) + 0.5) * N / n                         # (n,), in cells of N x N
        y, x = torch.meshgrid(centre, centre, indexing="ij")             # (n, n)
        turn = torch.full((n, n), (m + 1) * math.pi / 2)
        angles = [angles_of(x, x_pairs, N * N), angles_of(y, y_pairs, N * N),
                  angles_of(turn, scale_pairs, 10)]
        rows.append(torch.cat(angles, -1).flatten(0, 1))                 # (n*n, d/2)
    angles = torch.cat([*rows, torch.zeros(2, pairs)])                   # (L+2, d/2)
    angles = torch.cat([angles, angles], 1)                              # (L+2, d): i and i + d/2
    # A row is stored as cos, sin, cos, sin, ... (as released).
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1)      # (L+2, 2d)


def rotate(x, rope):
    """RoPE: rotate x (B, H, T, d) by rope (2, T, d) or (2, H, T, d), cosines and sines."""
    cos, sin = rope.to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    rotated_half = torch.cat([-x2, x1], -1)
    return x * cos + rotated_half * sin


class Attention(nn.Module):
    """Multi-head self-attention with RoPE."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, q_rope, k_rope, mask, cache, start):
        """x (B, T, D) to the same. x and the ropes hold tokens start ... start+T-1. mask (T, T)
        says which token sees which; None: all see all. cache (2, B, H, 1+L, d), in sampling only,
        stores the keys and values of these tokens, and gives those of tokens 0 ... start+T-1."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate(q, q_rope)                                               # (B, H, T, d)
        k = rotate(k, k_rope)
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k, v = cache[:, :, :, :end]                                     # (B, H, end, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)         # (B, H, T, d)
        return self.wo(y.transpose(1, 2).flatten(2))                        # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU, as released: (B, T, D) to (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        hidden = config.ffn or 3 * config.width
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after AdaLN: RMSNorm, then a factor and a shift that depend
    on the class. As released, RMSNorm keeps a gain of its own, and no gate scales what is added to
    x (DiT has one)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.attention_norm = nn.RMSNorm(D, eps=1e-6)
        self.input_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(D, eps=1e-6)
        self.post_attention_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.feed_forward = FeedForward(config)

    def modulation(self, class_token):
        """The class token (B, 1, D) to two shifts and two factors, (B, 1, D) each."""
        shift1, factor1 = self.input_modulation(class_token).chunk(2, -1)
        shift2, factor2 = self.post_attention_modulation(class_token).chunk(2, -1)
        return shift1, factor1, shift2, factor2

    def forward(self, x, modulation, q_rope, k_rope, mask, cache, start):
        shift1, factor1, shift2, factor2 = modulation
        h = self.attention_norm(x) * factor1 + shift1
        x = x + self.attention(h, q_rope, k_rope, mask, cache, start)
        h = self.ffn_norm(x) * factor2 + shift2
        return x + self.feed_forward(h)


# 5. The model (Sec. 3.1, Fig. 2) ------------------------------------------------------------------

def upsample(z, layout, scale):
    """z_up of one map (Sec. 3.1), (B, n*n, C): the next coarser map of z (B, L, C), enlarged,
    bilinearly as released. That takes means, and a mean of unit vectors may be shorter. So it is
    normalised, as released: it goes through the same MLP as code vectors. The first map has no
    coarser one, so its z_up is zero, as released."""
    if scale == 0:
        return torch.zeros_like(z[:, layout.scales[0]])
    n = layout.sizes[scale]
    coarser = as_map(z[:, layout.scales[scale - 1]])
    up = F.interpolate(coarser, (n, n), mode="bilinear", align_corners=False)
    return F.normalize(up, dim=1).flatten(2).transpose(1, 2)


class Checkerboard(nn.Module):
    """The multiscale blockwise checkerboard autoregressor."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, L, C = config.width, config.length, config.code_dim
        self.class_embeddings = nn.Embedding(config.classes + 1, D)      # the last row: no class
        self.embed_positions = nn.Embedding(L, D)                        # pos[.] of Eq. 1
        self.empty_token_pos = nn.Parameter(torch.zeros(D))              # pos[b_0]
        self.empty_token_emb = nn.Parameter(torch.zeros(D))              # MLP(z[b_0])
        self.embed_codevecs_mlp = nn.Sequential(  # of z and z_up (Sec. 3.3); 64 as released
            nn.Linear(C, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, D))
        self.src_latents_proj = nn.Linear(D, D)                          # on z_up only, as released
        self.combine_inputs = nn.Linear(4 * D, D)                        # W_proj; bias as released
        self.rope = nn.Parameter(rope_table(config.sizes, D // config.heads))
        self.rope_mix = nn.Parameter(torch.zeros(config.mixing_layers, config.heads))  # alpha'
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(D, eps=1e-6)                              # no AdaLN, as released
        self.lm_head = nn.Linear(D, config.codes)
        self.init_weights()

    def init_weights(self):
        """Set what differs from torch's defaults. The layers' matrices and lm_head start as
        released. AdaLN starts as a plain RMSNorm (ours): factors are 1 and shifts 0."""
        for layer in self.layers:
            for p in layer.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)
            for modulation in (layer.input_modulation, layer.post_attention_modulation):
                nn.init.zeros_(modulation[1].weight)
                nn.init.zeros_(modulation[1].bias)                       # the shift
                nn.init.ones_(modulation[1].bias[self.config.width:])    # the factor
        # All codes are equally likely at first: the loss starts at log V, 8.32 for V = 4096.
        nn.init.zeros_(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)

    def ropes(self, layout):
        """(q_rope, k_rope) of each layer, (2, 1+L, d) or (2, H, 1+L, d): cosines and sines.

        A query is rotated by the cell that its token predicts, and so is a key after the mixing
        layers (Sec. 3.4). In these, a key's rope is a weighted mean of the ropes of two cells, the
        predicted one and the one read: alpha rope(b_i) + (1 - alpha) rope(b_{i-1}), not normalised
        again, as released. So a query can find the code that the key's token reads, where that code
        lies. Each head has its alpha, from 0 to 1, starting at 1/2. The paper sees no gain: FID
        5.46 with two mixing layers, as here and as released, and 5.32 with none (Table 2).
        """
        table = self.rope.unflatten(1, (-1, 2)).movedim(-1, 0)           # (2, L+2, d)
        # Training moves cosines and sines freely: cos^2 + sin^2 is made 1 again, as released.
        table = F.normalize(table, dim=0)
        here = table[:, layout.cell]                                     # (2, 1+L, d)
        there = table[:, layout.before]
        ropes = [(here, here)] * self.config.layers
        for i, alpha in enumerate(self.rope_mix.sigmoid()):              # (H,), footnote 1
            alpha = alpha[:, None, None]
            ropes[i] = (here, alpha * here[:, None] + (1 - alpha) * there[:, None])
        return ropes

    def embed_class(self, labels):
        """Labels (B,) to the class token (B, 1, D), and the shifts and factors of each layer.
        Labels are 0 ... classes-1, or `classes` for none."""
        class_token = self.class_embeddings(labels)[:, None]             # (B, 1, D)
        return class_token, [layer.modulation(class_token) for layer in self.layers]

    def inputs(self, z, z_up, layout, start, end):
        """Eq. 1: the input tokens start ... end-1, (B, T, D), from z and z_up (B, L, C). Each has
        four parts, in the released order (the paper's, 2 4 1 3, only permutes W_proj's columns):

            1  pos[b_i]                 where the predicted cell lies
            2  Linear(MLP(z_up[b_i]))   what the coarser map shows there (Linear as released)
            3  pos[b_{i-1}]             where the cell of the previous block lies
            4  MLP(z[b_{i-1}])          its code vector, so that this map's own codes are known

        In the first block of a map, learned constants stand for parts 3 and 4 (Sec. 3.1).
        """
        cell = layout.cell[start:end]                                    # (T,)
        before = layout.before[start:end]
        pos = self.embed_positions.weight                                # (L, D)
        pos_here = pos[cell].expand(len(z), -1, -1)                      # (B, T, D)
        up = self.src_latents_proj(self.embed_codevecs_mlp(z_up[:, cell]))

        # In a first block, before is EMPTY, which is -1. Indexing with it reads the last cell;
        # that does no harm, as torch.where replaces what was read.
        first_block = (before == EMPTY)[:, None]                         # (T, 1)
        pos_before = torch.where(first_block, self.empty_token_pos, pos[before])
        pos_before = pos_before.expand(len(z), -1, -1)                   # (B, T, D)
        z_before = self.embed_codevecs_mlp(z[:, before])
        z_before = torch.where(first_block, self.empty_token_emb, z_before)
        return self.combine_inputs(torch.cat([pos_here, up, pos_before, z_before], -1))

    def transform(self, x, modulations, ropes, mask=None, caches=None, start=0):
        """Tokens start ... start+T-1, (B, T, D), through all layers to logits (B, T, V)."""
        end = start + x.shape[1]
        for i, layer in enumerate(self.layers):
            q_rope, k_rope = ropes[i]
            q_rope = q_rope[..., start:end, :]
            k_rope = k_rope[..., start:end, :]
            cache = None if caches is None else caches[i]
            x = layer(x, modulations[i], q_rope, k_rope, mask, cache, start)
        x = x.to(self.norm.weight.dtype)  # float32 when sampling, see for_sampling
        return self.lm_head(self.norm(x)).float()

    def forward(self, z, labels, layout, noisy_z=None):
        """Training: from the true z (B, L, C), all tokens in one pass, to logits (B, L, V) in
        layout order. z_up is made of noisy_z, if given; see training_draws."""
        source = z if noisy_z is None else noisy_z
        z_up = torch.cat([upsample(source, layout, k) for k in range(len(layout.sizes))], 1)
        class_token, modulations = self.embed_class(labels)
        tokens = self.inputs(z, z_up, layout, 1, len(layout.cell))
        x = torch.cat([class_token, tokens], 1)                          # (B, 1+L, D)
        logits = self.transform(x, modulations, self.ropes(layout), layout.mask)
        return logits[:, 1:]  # the class token predicts nothing


# 6. The training step (Sec. 3.1, 4.1) -------------------------------------------------------------
#
# train_tiny.py repeats this step, but codes the images once, before training. It makes the draws on
# the CPU, so that a seed gives the same ones everywhere, and then moves them to the device.
#
#     codes = tokenizer.encode_pyramid(images, sizes)
#     labels, noisy, P = training_draws(codes, labels, model.config, 0.1, generator)
#     losses = training_loss(model, tokenizer.codebook(), codes, labels, Layout(sizes, P), noisy)
#     optimizer.zero_grad()
#     losses[0].backward()  # the mean over all tokens
#     optimizer.step()

def training_draws(codes, labels, config, replace, generator):
    """What a training step draws at random, on the CPU: labels (B,), noisy codes (B, L), P."""
    # A tenth of the images loses its class (as released): guidance also needs logits without one.
    dropped = torch.rand(len(labels), generator=generator) < 0.1
    labels = labels.masked_fill(dropped, config.classes)

    # While sampling, coarser maps hold mistakes. To prepare for them, z_up is made of noisy codes:
    # a share `replace` of them, 0.1, is random (as released; the paper is silent). All else sees
    # the true codes.
    replaced = torch.rand(codes.shape, generator=generator) < replace
    random_codes = torch.randint(config.codes, codes.shape, generator=generator)
    noisy = torch.where(replaced, random_codes, codes)

    # P is random, so that any P works in sampling (Sec. 3.1). Ours: one P for a batch. Half of the
    # time it is a power of 2 up to N, else log-uniform in 1 ... N * N. N * N is one cell a step.
    N = config.sizes[-1]
    u, v = torch.rand(2, generator=generator).tolist()
    P = 2 ** int(v * N.bit_length()) if u < 0.5 else int((N * N + 1) ** v)
    return labels, noisy, P


def training_loss(model, codebook, codes, labels, layout, noisy):
    """The losses of loss_by_scale, by one pass over all tokens. Targets and inputs are made of the
    true codes (B, L), but z_up of the noisy ones (B, L)."""
    logits = model(codebook[codes], labels, layout, codebook[noisy])     # (B, L, V)
    return loss_by_scale(logits, codes, layout)


def loss_by_scale(logits, codes, layout):
    """Cross-entropy in nats, (1 + scales,): first the mean over all tokens, which is minimised
    (Sec. 3.1), then the mean of each map. All tokens count alike, so at ratio 2 the finest map has
    three quarters of the weight. logits (B, L, V) in layout order, codes (B, L)."""
    targets = codes[:, layout.cell[1:]]                                  # (B, L) in layout order
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(targets).mean(0)                             # (L,) in layout order
    # The tokens of a map fill the same slice as its cells, in another order.
    return torch.stack([losses.mean(), *(losses[at].mean() for at in layout.scales)])


# 7. Sampling (Sec. 3.1, 4.1) ----------------------------------------------------------------------

def draw(logits, temperature, generator=None):
    """Codes (B, T) from softmax(logits / temperature), for logits (B, T, V). Temperature 0 takes
    the likeliest.

    This is the Gumbel-max trick: minus the log of exponential noise is Gumbel noise. It draws from
    the same distribution as torch.multinomial (Sec. 3.1), whose check of its input would make the
    CPU wait for the GPU.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator)
    noise = noise.clamp(min=2 ** -25)  # some devices draw zeros, which would win against any logits
    return (logits - temperature * noise.log()).argmax(-1)


@torch.no_grad()
def sample(model, codebook, labels, layout, cfg=0.0, cfg_start=5, temperature=1.0, generator=None,
           choose=None):
    """Draw the codes (B, L) of one image for each label (B,), with one forward pass for each step.
    codebook (V, C): tokenizer.codebook().

    The first cfg_start steps are not guided, so that the global structure that they settle stays
    diverse (Sec. 4.1; Sec. 4.3 guides all). Five steps are the 1x1 and 2x2 maps of ratio 2 with
    P >= 4. If there are no steps after these, the second half of all is guided (ours).

    choose(guided logits (B, T, V), cell (T,), temperature, generator), if given, draws the codes
    (B, T) instead of `draw`: to measure the entropies of Sec. 4.5, or to keep codes that are known.

    Cached keys and values never change: a token sees no later block, its input reads only cells
    already drawn, its RoPE depends on cells alone, and its AdaLN on the class. A key that depends
    on a later block or on the number of the step would break this.
    """
    B, L = len(labels), model.config.length
    H, d = model.config.heads, model.config.width // model.config.heads
    if cfg > 0:  # labels, tokens and caches hold the batch twice: with its classes, and without
        labels = torch.cat([labels, torch.full_like(labels, model.config.classes)])
    if cfg_start >= len(layout.steps):  # otherwise no step would be guided
        cfg_start = len(layout.steps) // 2
    class_token, modulations = model.embed_class(labels)
    ropes = model.ropes(layout)
    codebook = codebook.to(class_token.dtype)
    caches = class_token.new_empty(len(model.layers), 2, len(labels), H, 1 + L, d)
    codes = torch.zeros(B, L, dtype=torch.long, device=labels.device)
    z = codebook.new_zeros(B, L, codebook.shape[1])
    z_up = torch.zeros_like(z)
    for t, (scale, start, end) in enumerate(layout.steps):
        # Forward. z_up is the same in all steps of a map; making it again is cheap.
        cell = layout.cell[start:end]                                       # (T,)
        z_up[:, layout.scales[scale]] = upsample(z, layout, scale)
        x = model.inputs(z, z_up, layout, start, end)                       # (B, T, D)
        if cfg > 0:  # before cfg_start too: later steps attend to the unconditional half's cache
            x = torch.cat([x, x])                                           # (2B, T, D)
        if t == 0:
            # The class token comes along. As in training, it must not see the first block: a mask.
            x = torch.cat([class_token, x], 1)
            mask = layout.mask[:end, :end]
            logits = model.transform(x, modulations, ropes, mask, caches)[:, 1:]
        else:
            # A block sees itself and all that is cached: no mask.
            logits = model.transform(x, modulations, ropes, None, caches, start)

        # Guide.
        if cfg > 0:
            cond, uncond = logits.chunk(2)                                  # (B, T, V) each
            w = cfg if t >= cfg_start else 0
            logits = cond + w * (cond - uncond)

        # Draw.
        if choose:
            drawn = choose(logits, cell, temperature, generator)            # (B, T)
        else:
            drawn = draw(logits, temperature, generator)
        codes[:, cell] = drawn
        z[:, cell] = codebook[drawn]
    return codes


# 8. Pictures (Fig. 1) -----------------------------------------------------------------------------

def to_uint8(images):
    """Images (B, 3, h, w) in [-1, 1] to a numpy array (B, h, w, 3) of 0 ... 255."""
    values = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return values.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def progress_frames(tokenizer, z, layout):
    """A list of images (B, h, w, 3), uint8: z (B, L, C) after each step (Fig. 1). The decoder sees
    z_up in cells not drawn yet (ours), and nothing of later steps. After decoding, these cells are
    painted grey."""
    side = layout.sizes[-1] * tokenizer.config.stride
    frames = []
    for scale, _, end in layout.steps:
        n = layout.sizes[scale]
        at = layout.scales[scale]
        drawn = torch.zeros(z.shape[1], dtype=torch.bool, device=z.device)
        drawn[layout.cell[1:end]] = True
        up = upsample(z, layout, scale)                                     # (B, n*n, C)
        seen = torch.where(drawn[at, None], z[:, at], up)
        image = torch.cat([tokenizer.decode(part) for part in as_map(seen).split(16)])
        image = F.interpolate(image, (side, side))
        shown = F.interpolate(drawn[at].float().view(1, 1, n, n), (side, side))
        frames.append(to_uint8(image * shown))                              # 0 is grey
    return frames


# A reader of the paper can stop here. The rest: encoders, files, command line, machines.

# Appendix A. Encoders and decoders: a small pair, and LlamaGen's VQGAN [36], the paper's ----------

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, c_in, h, w) to (B, c_out, h, w)."""

    def __init__(self, c_in, c_out, norm=nn.Identity):  # nn.Identity ignores its arguments
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


def small_halves(config):
    """A small encoder, (B, 3, h, w) to (B, width, n, n), and a decoder back (ours). The encoder
    sees one cell at a time, so equal patches get equal codes. The decoder sees a neighbourhood."""
    stride, width = config.stride, config.width
    pixels = 3 * stride ** 2
    blocks = [ResidualBlock(width, width) for _ in range(3)]
    return (nn.Sequential(nn.PixelUnshuffle(stride), nn.Conv2d(pixels, width, 1), nn.SiLU()),
            nn.Sequential(*blocks, nn.Conv2d(width, pixels, 1), nn.PixelShuffle(stride)))


group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all cells of a map: (B, C, h, w) to the same."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)                         # (B, h*w, C)
        return x + self.proj_out(y.transpose(1, 2).view_as(x))


class Resolution(nn.Module):
    """Residual blocks at one resolution, with attention at the coarsest. Then it is changed."""

    def __init__(self, c_in, c_out, blocks, attention, resample):
        super().__init__()
        self.res = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(blocks):
            self.res.append(ResidualBlock(c_out if i else c_in, c_out, group_norm))
            self.attn.append(AttentionBlock(c_out) if attention else nn.Identity())
        self.resample = resample

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.resample(x)


def vqgan_half(c_in, channels, c_out, blocks, resample, is_decoder):
    """The VQGAN's encoder, or its decoder, which is the mirror image. channels: of each resolution
    in turn. Attention is at the coarsest, and in the middle part beside it."""
    coarsest = 0 if is_decoder else len(channels) - 1
    levels = []
    for i, c in enumerate(channels):
        change = resample(c) if i < len(channels) - 1 else nn.Identity()
        levels.append(Resolution(channels[max(0, i - 1)], c, blocks, i == coarsest, change))
    c = channels[coarsest]
    mid = (ResidualBlock(c, c, group_norm), AttentionBlock(c), ResidualBlock(c, c, group_norm))
    parts = [("conv_blocks", nn.Sequential(*levels)), ("mid", nn.Sequential(*mid))]
    return nn.Sequential(OrderedDict([
        ("conv_in", nn.Conv2d(c_in, channels[0], 3, padding=1)),
        *(reversed(parts) if is_decoder else parts),
        ("norm_out", group_norm(channels[-1])),
        ("swish", nn.SiLU()),
        ("conv_out", nn.Conv2d(channels[-1], c_out, 3, padding=1))]))


def vqgan_halves(config):
    """The VQGAN's encoder and decoder. The latter has one more block for each resolution."""
    def halve(c):  # as released: zeros at the right and at the bottom only
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))

    def double(c):
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))

    channels, blocks, width = config.channels, config.res_blocks, config.width
    return (vqgan_half(3, channels, width, blocks, halve, is_decoder=False),
            vqgan_half(width, channels[::-1], 3, blocks + 1, double, is_decoder=True))


# Appendix B. Files --------------------------------------------------------------------------------
#
# A file is a dictionary of tensors and plain values. Reading it runs no code from it.

def read(path):
    """The dictionary in a file of torch.save. Raises OSError or ValueError, as `load` does."""
    with open(path, "rb") as file, file_errors(path):
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():  # torch does not look
            raise ValueError("a checksum is wrong")
        file.seek(0)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the author's files hold one
            return dict(torch.load(file, map_location="cpu", weights_only=True))


def build(kind, config, weights):
    """A module of this kind with these weights. On "meta", its initial ones take no memory."""
    with torch.device("meta"):
        module = kind(config)
    module.load_state_dict(weights, assign=True)
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError("a weight is not a finite number")
    return module.eval()


def for_sampling(model, dtype):
    """The model in this type. The final norm and lm_head stay in float32, as guidance would
    multiply their rounding errors."""
    model.to(dtype)
    model.norm.float()
    model.lm_head.float()
    return model


def load(path, device="cpu", dtype=torch.float32):
    """(model, tokenizer, class names, defaults) of a checkpoint, ours or the author's. defaults are
    steps (P), cfg and temperature."""
    state = read(path)
    if "lm_head.weight" not in state.get("model", ()):
        raise ValueError(f"{path}: not a checkpoint with a model to draw from; a tokenizer?")
    with file_errors(path):
        if "options" in state:  # written by train_tiny.py
            config, weights = Config(**state["config"]), state["model"]
            classes, defaults = state["classes"], state["defaults"]
        else:
            weights, _ = our_names(state["model"])
            config = released_config(weights)
            classes = [str(number) for number in range(config.classes)]
            defaults = {"steps": 4, "cfg": 1.5, "temperature": 1.0}  # of Table 1
            if config.sizes == scale_sizes(config.sizes[-1], 4):
                defaults |= {"steps": 8, "cfg": 1.7}
        model = build(Checkerboard, config, weights)
    model = for_sampling(model.to(device), dtype)
    return model, load_tokenizer(path, device, dtype, state), classes, defaults


def load_tokenizer(path, device="cpu", dtype=torch.float32, state=None):
    """The tokenizer in a file: a checkpoint, the author's or LlamaGen's tokenizer. state: what
    `read` gives of it. The codebook stays float32."""
    state = state or read(path)
    with file_errors(path):
        if "tokenizer_config" in state:
            config, weights = TokenizerConfig(**state["tokenizer_config"]), state["tokenizer"]
        else:
            _, weights = our_names(state.get("state_dict", state.get("model", state)))
            config = released_tokenizer_config(weights)
        tokenizer = build(Tokenizer, config, weights)
    codebook = tokenizer.codebook_weight.float()
    # channels_last is faster on CPUs, and was wrong on MPS before torch 2.14
    order = torch.channels_last if str(device) == "cpu" else torch.preserve_format
    tokenizer = tokenizer.to(device, dtype, memory_format=order)
    tokenizer.codebook_weight = codebook.to(device)
    return tokenizer


# Released files: names become ours, and shapes give the sizes.
RENAME = {"autoenc.": "", "llama.": "", "embed_codevecs_mlp.net": "embed_codevecs_mlp",
          "adaLN_modulation.": "", "downsample.conv": "resample.1", "upsample.conv": "resample.1",
          "rotary_emb.mixing_coeffs": "rope_mix",
          "rotary_emb.position_embeddings.parametrizations.weight.original": "rope",
          "quantize.embedding.parametrizations.weight.original": "codebook_weight",
          "quantize.embedding.weight": "codebook_weight"}  # LlamaGen's


def our_names(tensors):
    """The tensors of a released file under our names: the transformer's, and the tokenizer's."""
    model, tokenizer = {}, {}
    for key, value in tensors.items():
        for theirs, ours in RENAME.items():
            key = key.replace(theirs, ours)
        if key.startswith(("encoder", "decoder", "quant_conv", "post_quant_conv", "codebook")):
            tokenizer[key] = value
        elif not key.startswith(("quantize.", "cluster_usage")):  # these count training's codes
            model[key] = value
    return model, tokenizer


def released_config(tensors):
    """The Config of a released transformer. A file does not say the sides of the maps, but how many
    cells they have in all. Different pyramids, below, have different numbers."""
    length, width = tensors["embed_positions.weight"].shape
    pyramids = [scale_sizes(2 ** i, ratio) for i in range(10) for ratio in (2, 4, 3, 2 ** 0.5, 1)]
    return Config(
        sizes=next(sizes for sizes in pyramids if sum(n * n for n in sizes) == length),
        classes=len(tensors["class_embeddings.weight"]) - 1,
        codes=len(tensors["lm_head.weight"]),
        code_dim=tensors["embed_codevecs_mlp.0.weight"].shape[1],
        width=width,
        layers=len(fnmatch.filter(tensors, "*.attention.wqkv.weight")),
        heads=2 * width // tensors["rope"].shape[1],
        ffn=len(tensors["layers.0.feed_forward.w1.weight"]),
        mixing_layers=len(tensors["rope_mix"]))


def released_tokenizer_config(tensors):
    """The TokenizerConfig of a released tokenizer."""
    blocks = sorted(fnmatch.filter(tensors, "encoder.conv_blocks.*.conv1.bias"))
    channels = tuple(len(tensors[key]) for key in blocks if ".res.0." in key)
    codes, code_dim = tensors["codebook_weight"].shape
    width = len(tensors["encoder.conv_out.weight"])
    return TokenizerConfig(codes, code_dim, 2 ** (len(channels) - 1), width, channels,
                           len(blocks) // len(channels))


# Appendix C. Many images, and the command line ----------------------------------------------------

def generate(model, tokenizer, labels, layout, seed=0, **options):
    """`sample`, with its options, for any number of labels (n,), 64 at a time: codes (n, L). With
    guidance in bfloat16, the cache of model L takes 3.6 GB of a GPU (computed)."""
    options["generator"] = torch.Generator(labels.device).manual_seed(seed)
    codebook = tokenizer.codebook()
    parts = tqdm(labels.split(64), "sampling", unit="batch", leave=False)
    return torch.cat([sample(model, codebook, part, layout, **options) for part in parts])


def decode_scale(tokenizer, codes, layout, scale=-1):
    """Pictures (B, h, w, 3), uint8, of one map of the pyramids of codes (B, L)."""
    codes = codes[:, layout.scales[scale]]
    side = layout.sizes[scale] * tokenizer.config.stride
    pictures = np.empty((len(codes), side, side, 3), np.uint8)  # all at once: 10 GB for 50,000
    for start in range(0, len(codes), 16):
        part = codes[start:start + 16]
        pictures[start:start + 16] = to_uint8(tokenizer.decode_codes(part))
    return pictures


def picture_grid(rows, names=()):
    """A PIL image of rows of pictures, [(k, n, n, 3) uint8, ...], each with its name beside it. All
    get the size of the last row's, and small ones are enlarged to nearly 96 pixels."""
    size = rows[-1].shape[1] * max(1, 96 // rows[-1].shape[1])
    gap = size + 4
    margin = 9 * max(map(len, names), default=0)
    grid = Image.new("RGB", (margin + max(map(len, rows)) * gap, len(rows) * gap), "white")
    pen = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            picture = Image.fromarray(picture).resize((size, size), Image.NEAREST)
            grid.paste(picture, (margin + j * gap + 2, i * gap + 2))
    for i, name in enumerate(names):
        pen.text((4, (i + 0.5) * gap), name, "black", anchor="lm", font_size=14)
    return grid


def contact_sheet(pictures, names):
    """A PIL image of pictures (n, h, w, 3), uint8, of these classes in turn: a row for each class
    with its name; of a single class, rows of eight; a single picture as it is."""
    if len(pictures) == 1:
        return Image.fromarray(pictures[0])
    if len(names) == 1:
        return picture_grid(np.split(pictures, range(8, len(pictures), 8)))
    return picture_grid([pictures[i::len(names)] for i in range(len(names))], names)


def save_gif(frames, file):
    """Write PIL images as an endless animation that rests on the last one."""
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[250] * (len(frames) - 1) + [2000])


def class_numbers(names, classes):
    """The numbers of classes of these names or numbers; `none` comes last. Raises ValueError."""
    known = [*classes, "none", *map(str, range(len(classes) + 1))]
    for name in names:
        if name not in known:
            few = [*classes[:20], *["..."] * (len(classes) > 20)]
            raise ValueError(f"--class {name}: not among {', '.join(few)}, none, or a number up to "
                             f"{len(classes)}")
    return [known.index(name) % (len(classes) + 1) for name in names]


def sample_to_file(args):
    """Draw what the command line asks for, and write it. Raises ValueError or OSError."""
    kind = os.path.splitext(args.out)[1].lower()
    if kind not in (".png", ".gif", ".npz") or os.path.isdir(args.out):
        raise ValueError(f"--out {args.out}: not a .png, .gif or .npz file")
    device, dtype = find_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else dtype
    model, tokenizer, classes, options = load(args.checkpoint, device, dtype)
    options |= {key: getattr(args, key) for key in options if getattr(args, key) is not None}
    P = options.pop("steps")
    layout = Layout(model.config.sizes, P, device)
    options |= {"cfg_start": args.cfg_start, "seed": args.seed}

    # Without --class: n classes, or 16, evenly chosen, as neighbours in ImageNet are alike.
    names = args.classes or classes[::math.ceil(len(classes) / (args.n or 16))]
    numbers = class_numbers(names, classes)[:args.n]
    names = [[*classes, "none"][number] for number in numbers]
    n = args.n or 8 * len(numbers)
    side = max(96, model.config.sizes[-1] * tokenizer.config.stride) + 4  # see picture_grid
    if kind == ".gif" and n * side > 65535:  # pixels
        raise ValueError(f"--out: a .gif takes {65535 // side} images at most")
    labels = torch.tensor(numbers, device=device)[torch.arange(n) % len(numbers)]

    with write_whole(args.out) as file:
        codes = generate(model, tokenizer, labels, layout, **options)
        if kind == ".gif":
            frames = progress_frames(tokenizer, tokenizer.codebook()[codes], layout)
            save_gif([contact_sheet(pictures, names) for pictures in frames], file)
        else:
            pictures = decode_scale(tokenizer, codes, layout)
            if kind == ".npz":
                np.savez(file, arr_0=pictures, labels=labels.cpu(), steps=P, **options)
            else:
                contact_sheet(pictures, names).save(file, "PNG")
    print(f"{args.out}: {n} images, {len(layout.steps)} steps each, {options}")


def explain():
    """Print the scan order (Fig. 3), a small layout and its mask (Fig. 2), and a token (Eq. 1)."""
    print("Scan order of an 8x8 grid (Fig. 3). With P = 8, step 1 draws numbers 1-8, and so on.\n")
    order = progressive_checkerboard(8)
    for y in range(8):
        print("  ", *(f"{order.index((x, y)) + 1:3d}" for x in range(8)))
    layout = Layout((1, 2, 4), P=4)
    print("\nTokens of a pyramid with maps 1x1, 2x2, 4x4, P = 4 (Fig. 2). Cells are numbered map\n"
          "after map, row by row. -1: this map has no block before.\n")
    for t, (_, start, end) in enumerate(layout.steps, 1):
        cells, before = layout.cell[start:end].tolist(), layout.before[start:end].tolist()
        print(f"   step {t}: draws {cells}, reads {before}")
    token = layout.steps[6][1]
    cell, before = layout.cell[token], layout.before[token]
    print(f"\nOne token (Eq. 1): the first of step 7 predicts the code of cell {cell}. Its input\n"
          f"is W_proj of pos[{cell}], z_up[{cell}], pos[{before}] and the code of cell {before}.\n"
          "\nMask: a row attends to columns marked ##: the class token, then step after step.\n")
    for row in layout.mask.tolist():
        print("  ", "".join("##" if allowed else " ." for allowed in row))
    print("\nNext: python train_tiny.py --scale 2 --steps 4")


def main(arguments=None):
    """The command line of this file."""
    parser = Parser(description="Draw images from a checkpoint. Without one: explain the scan "
                                "order, the layout and the mask (Fig. 2 and 3 of the paper). The "
                                "defaults of P, W and T are the checkpoint's.",
                    epilog="example: python ckgen.py runs/toy-2x/checkpoint.pt --class star ring")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="written by train_tiny.py, or released by the author")
    add("--class", dest="classes", nargs="+", default=[], metavar="NAME",
        help="by name or number, in turn; none: no class (default: as many as --n, or 16)")
    add("--n", type=within(int, 1, 10 ** 6), help="number of images (default: 8 of each class)")
    add("--steps", type=within(int, 1), metavar="P", help="steps for each map")
    add("--cfg", type=within(float, 0, 1000), metavar="W",
        help="guidance: logits = cond + W (cond - uncond); 0 is off")
    add("--cfg-start", type=within(int, 0), default=5, metavar="STEP",
        help="steps at the start without guidance; half of all, if there are no more (default: 5)")
    add("--temperature", type=within(float, 0, 100), metavar="T",
        help="divides the logits; 0 takes the likeliest codes")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), default=0,
        help="same seed, same images (with the same --n, --device and --dtype)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="(default: bfloat16 on a GPU that has it)")
    add("--out", default="samples.png", help="default: samples.png. A .png is a grid, or the image "
        "itself with --n 1; a .gif shows the steps; an .npz holds arr_0, labels and settings")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.checkpoint:
        parser.run(sample_to_file, args)
    elif arguments:
        parser.error("options need a CHECKPOINT; it must stand before --class")
    else:
        parser.run(explain)


# Appendix D. What devices, disks and terminals do -------------------------------------------------

def find_device(name=None):
    """The torch.device of this name, and the type to compute in: bfloat16 on a GPU that has it.
    Default: the GPU; of several, under torchrun, that of this process. Raises ValueError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # torch refuses to set a device without an index
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # such as a torch without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type != "cuda":
        return device, torch.float32
    torch.cuda.set_device(device)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def write_whole(path):
    """A file to write, whole or not at all: it has another name until all is written."""
    part = f"{path}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


# What reading damaged or foreign files, and building a model from them, was seen to raise.
DAMAGED = (ArithmeticError, AssertionError, EOFError, LookupError, OSError, RuntimeError,
           StopIteration, TypeError, ValueError, pickle.UnpicklingError, struct.error,
           zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def file_errors(path, kinds=DAMAGED):
    """What a damaged file raises inside, of these kinds, becomes a ValueError of one line that
    names the file. Faults of the machine stay what they are: lack of memory, or an error with a
    number. But number 22 comes from looking for something behind the end of a damaged file."""
    try:
        yield
    except kinds as error:
        if lacks_memory(error) or getattr(error, "errno", None) not in (None, 22):
            raise
        reason = " ".join(str(error).split()).split(". ")[0][:300] or repr(error)
        raise ValueError(f"{path}: damaged, or not for this program: {reason}") from None


def lacks_memory(error):
    """Whether an error, of Python or of torch, says that memory ran out."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line of printable text."""
    stopped = "stopped"

    def error(self, message):
        text = "".join(c if c.isprintable() else "?" for c in message)
        self.exit(2, f"{self.prog}: error: {text}\n")

    def run(self, work, *args):
        """work(*args). Bad input ends in one line and exit code 2, Ctrl-C in 130."""
        sys.stderr = sys.stderr or open(os.devnull, "w")  # it may be closed
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # so that it can print any path
        try:
            work(*args)
            print(end="", flush=True)
            return
        except KeyboardInterrupt:
            self.exit(130, f"\n{self.stopped}\n")
        except BrokenPipeError:  # who reads our output has seen enough
            sys.stdout = open(os.devnull, "w")
            self.exit(141)
        except (ValueError, OSError) as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            message = f"not enough memory; take fewer images or a smaller model ({error})"
            if "inline_container" in str(error):  # of torch.save
                message = "a file was not written: the disk may be full"
            elif not lacks_memory(error):
                raise  # a mistake in the program
        self.error(message)  # here, after progress bars are closed


def within(kind, low, high=10 ** 9):
    """An argparse type: a number of this kind from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number


if __name__ == "__main__":
    main()
