"""train_tiny: train ckgen from nothing, on pictures it draws itself or on yours, with one command.

    python train_tiny.py --scale 2 --steps 4          # toy shapes; minutes on a CPU
    python train_tiny.py --data DIR                   # your pictures, one folder per class
    python train_tiny.py --evaluate runs/tiny-2x-toy/checkpoint.pt
    python train_tiny.py --bench                      # speed, with random weights

Four stages: read or draw the images; train a small VQ tokenizer on them (Sec. 3.3); code every
image once; train the transformer on the codes (Sec. 3.1). Everything goes to runs/<name>/. Stop it
whenever you like: the same command goes on from the last checkpoint and ends with the same weights.

Every random draw of step t comes from a generator seeded with (--seed, stage, t). So a checkpoint
needs no state of any generator, and a run that was stopped is the run that was not.

SPDX-License-Identifier: MIT
"""

import argparse
import csv
import io
import math
import os
import shlex
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ckgen
from ckgen import Checkerboard, Config, Layout, Tokenizer, TokenizerConfig

CHECKPOINT_SECONDS = 60
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
IN_MEMORY = 500_000_000  # bytes of pictures; more are read from their files when they are needed

# ------------------------------------------------------------------------------------------------
# 1. Recipes.


@dataclass(frozen=True)
class Recipe:
    """How to train one size of model. The paper's S and L are those of Sec. 4.1."""
    width: int
    layers: int
    heads: int
    ffn: int
    image_size: int
    tokenizer_codes: int
    tokenizer_iters: int
    tokenizer_batch: int
    iters: int
    batch_size: int
    lr: float                   # of AdamW
    epochs: int = 0             # length of the run on an image folder with a given tokenizer
    drops: tuple = ()           # (epoch, factor on lr from there on), after one epoch of warm-up
    accumulate: tuple = ()      # (epoch, batches that make one step from there on)
    muon_lr: float = 0.0        # of Muon, on hidden matrices; 0: AdamW on everything
    replace_codes: float = 0.0  # share of codes replaced at random before they are upsampled
    cfg: float = 1.5            # guidance of the run's own pictures
    temperature: float = 1.0    # and their temperature


# tiny departs from the paper's AdamW: in the few minutes of its run Muon gets much further.
RECIPES = {
    "tiny": Recipe(width=128, layers=4, heads=4, ffn=384, image_size=32, tokenizer_codes=256,
                   tokenizer_iters=1500, tokenizer_batch=16, iters=1150, batch_size=16, lr=6e-3,
                   muon_lr=0.03, cfg=0.5, temperature=0.5),
    "S": Recipe(width=512, layers=12, heads=16, ffn=1536, image_size=64, tokenizer_codes=1024,
                tokenizer_iters=6000, tokenizer_batch=32, iters=6000, batch_size=128, lr=1e-4,
                epochs=110, drops=((100, 10 ** -0.5), (105, 0.1)), replace_codes=0.1),
    "L": Recipe(width=1024, layers=20, heads=16, ffn=3072, image_size=64, tokenizer_codes=1024,
                tokenizer_iters=6000, tokenizer_batch=32, iters=12000, batch_size=64, lr=5e-5,
                epochs=206, drops=((200, 0.2),), accumulate=(205, 5), replace_codes=0.1),
}


def learning_rate(recipe, step, iters):
    """The factor on the learning rate at a step.

    tiny: 20 steps of warm-up, then linearly down to zero. S and L (Sec. 4.1): one epoch of warm-up,
    then constant, with drops near the end. A run of another length keeps the proportions.
    """
    if not recipe.epochs:
        return min(1.0, (step + 1) / 20) * (1 - step / iters)
    epoch = (step + 1) * recipe.epochs / iters
    return min(1.0, epoch) * min((f for start, f in recipe.drops if epoch > start), default=1.0)


def accumulated(recipe, step, iters):
    """How many batches make one step. L's last five epochs have five, 320 images (Sec. 4.1), and so
    take the steps of one: 206 epochs' worth of steps for 210."""
    start, batches = recipe.accumulate or (0, 1)
    return batches if (step + 1) * recipe.epochs / iters > start else 1


def seeded(seed, stage, step):
    """A generator for all random draws of one step."""
    return torch.Generator().manual_seed((seed * 16 + stage) * 1_000_000_007 + step)


# ------------------------------------------------------------------------------------------------
# 2. Data.


@dataclass
class Data:
    """Images to train on, images held out, and the names of their classes.

    Toy shapes are trained on as they are. Pictures of one's own are kept a little larger than the S
    pixels of the model, and trained on as ten crops (Sec. 4.1).
    """
    images: torch.Tensor           # (n, 3, S, S) or larger, uint8; or Pictures
    labels: torch.Tensor           # (n,)
    held_out: torch.Tensor         # (m, 3, S, S), uint8; m may be 0
    held_out_labels: torch.Tensor  # (m,)
    classes: list
    fingerprint: int = 0           # of the names of all files, so that a run notices other data

    @property
    def views(self):
        """How many crops there are of an image: 1 or 10."""
        return 10 if self.images.shape[-1] > self.held_out.shape[-1] else 1

    def crop(self, images, view=4):
        """Crops (k, 3, S, S) of some of the images: views 0 to 3 are the corners, 4 is the centre,
        5 to 9 are the same five mirrored."""
        S = self.held_out.shape[-1]
        rest = images.shape[-1] - S
        y, x = ((0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2))[view % 5]
        images = images[..., y:y + S, x:x + S]
        return images.flip(-1) if view >= 5 else images


SHAPES = ["circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent"]
COLOURS = torch.tensor([[225, 35, 40], [250, 225, 60], [40, 180, 60],        # red, yellow, green,
                        [90, 240, 250], [50, 70, 235], [240, 90, 220]])      # cyan, blue, magenta
GROUNDS = torch.tensor([[16, 18, 40], [58, 26, 30], [56, 58, 62]])           # all dark


def box(x, y, half_width, half_height):
    """Distance to a rectangle around the origin: negative inside."""
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def distance(shape, x, y):
    """Distance to the edge of a shape of radius about 1: negative inside. y points down."""
    r = (x * x + y * y).sqrt()
    if shape == "circle":
        return r - 0.85
    if shape == "ring":
        return (r - 0.65).abs() - 0.25
    if shape == "square":
        return box(x, y, 0.75, 0.75)
    if shape == "triangle":
        return torch.maximum(y - 0.6, (x.abs() * 3 ** 0.5 - y) / 2 - 0.5)
    if shape == "star":      # fold the five points into one: a line from tip to notch
        angle = (torch.atan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
        notch_x, notch_y = 0.42 * math.sin(math.pi / 5), 0.42 * math.cos(math.pi / 5)
        across, along = r * angle.sin().abs(), r * angle.cos()
        return (across * (1 - notch_y) + (along - 1) * notch_x) / math.hypot(1 - notch_y, notch_x)
    if shape == "cross":
        return torch.minimum(box(x, y, 0.9, 0.3), box(x, y, 0.3, 0.9))
    if shape == "heart":     # a square on its corner, a circle on each of its two upper sides
        lobe = ((x.abs() - 0.425) ** 2 + (y + 0.375) ** 2).sqrt() - 0.601
        return torch.minimum((x.abs() + (y - 0.05).abs() - 0.85) / 2 ** 0.5, lobe)
    if shape == "crescent":
        return torch.maximum(r - 0.9, 0.68 - ((x - 0.42) ** 2 + y ** 2).sqrt())
    raise ValueError(f"unknown shape {shape!r}")


def draw_shapes(n, size, seed):
    """n toy images (n, 3, size, size), uint8, and labels: the shapes in turn, each in one of six
    colours on one of two dark grounds, a little shifted and turned."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    labels = torch.arange(n) % len(SHAPES)
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    ground = (colour + torch.randint(2, (n,), generator=generator)) % len(GROUNDS)
    radius, turn = uniform(0.3, 0.4), uniform(-0.2, 0.2)
    place = (torch.arange(size) + 0.5) / size - 0.5
    x, y = place[None, None, :] - uniform(-0.07, 0.07), place[None, :, None] - uniform(-0.07, 0.07)
    x, y = ((x * turn.cos() + y * turn.sin()) / radius, (y * turn.cos() - x * turn.sin()) / radius)
    cover = torch.empty(n, 1, size, size)  # how much of a pixel the shape covers
    for label, shape in enumerate(SHAPES):
        at = slice(label, None, len(SHAPES))
        cover[at, 0] = (0.5 - distance(shape, x[at], y[at]) * radius[at] * size).clamp(0, 1)
    colour, ground = COLOURS[colour][..., None, None], GROUNDS[ground][..., None, None]
    return (colour * cover + ground * (1 - cover)).round().byte(), labels


def toy_data(image_size, n=24000, held_out=2000):
    """The embedded data set; the same for every seed."""
    return Data(*draw_shapes(n, image_size, 0), *draw_shapes(held_out, image_size, 1), SHAPES)


def read_image(path, size):
    """Any picture that pillow opens as (3, size, size) uint8: turned as its EXIF says, transparency
    on white, the centre cut to a square. Raises OSError and others when it cannot be read."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))            # lets JPEG decode at a smaller size
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16 bits of grey
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pictures:
    """Picture files that act like a tensor (n, 3, side, side), read when they are asked for. One
    that cannot be read is named and comes out all zero; more than 1 % of such raise ValueError."""

    def __init__(self, paths, side):
        self.paths, self.shape, self.bad = paths, (len(paths), 3, side, side), set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, some):
        """The pictures of a slice or of a tensor of indices, (k, 3, side, side) uint8."""
        numbers = range(len(self))[some] if isinstance(some, slice) else some.tolist()
        with ThreadPoolExecutor() as pool:  # pillow lets threads decode side by side
            pictures = list(pool.map(self.read, numbers))
        return torch.stack([torch.zeros(self.shape[1:], dtype=torch.uint8), *pictures])[1:]

    def read(self, number):
        """One picture (3, side, side), uint8."""
        path = self.paths[number]
        try:
            return read_image(path, self.shape[-1])
        except Exception as error:  # a damaged file can raise nearly anything
            if number not in self.bad:
                self.bad.add(number)
                tqdm.write(f"skipped {path}: {' '.join(str(error).split())}", sys.stderr)
            if len(self.bad) > 0.01 * len(self):
                raise ValueError(f"--data: {len(self.bad)} of {len(self)} files cannot be read, "
                                 f"more than 1 %; the last is {path}") from None
            return torch.zeros(self.shape[1:], dtype=torch.uint8)


def find_pictures(folder):
    """The files of a folder with one folder per class, hidden ones passed over: paths, labels,
    class names; shuffled, the same way each time. Raises ValueError if the folder will not do."""
    if not os.path.isdir(folder):
        raise ValueError(f"--data {folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder)
                     if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"--data {folder}: no class folders; put pictures into {folder}/<class>/")
    if odd := [name for name in classes if not name.isprintable()]:
        raise ValueError(f"--data {folder}: class folder {odd[0]!r}: its name cannot be printed")
    files = [(os.path.join(folder, name, file), label) for label, name in enumerate(classes)
             for file in sorted(os.listdir(os.path.join(folder, name))) if not file.startswith(".")]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[i][0] for i in order], torch.tensor([files[i][1] for i in order]), classes


def folder_data(folder, image_size):
    """The pictures of a folder; 5 % of each class, 2000 at most in all, are held out. Raises
    ValueError for a folder that will not do.

    A picture is kept at 281/256 of the image size, as the paper's ten crops of 256 pixels have it:
    in memory, if all of them take less than IN_MEMORY bytes, else in its file.
    """
    paths, labels, classes = find_pictures(folder)
    side = max(image_size + 1, round(image_size * 281 / 256))
    pictures, good = Pictures(paths, side), torch.ones(len(paths), dtype=torch.bool)
    fits = len(paths) * 3 * side ** 2 < IN_MEMORY
    if fits:
        chunks = tqdm(range(0, len(paths), 64), desc="reading images", unit="batch")
        pictures_read = [pictures[start:start + 64] for start in chunks]
        good[list(pictures.bad)] = False
    for label, name in enumerate(classes):
        if not (labels[good] == label).any():
            raise ValueError(f"--data {folder}: no picture in its class folder {name}")
    out, share = torch.zeros(len(paths), dtype=torch.bool), min(0.05, 2000 / len(paths))
    for label in range(len(classes)):
        members = (good & (labels == label)).nonzero().flatten()
        out[members[:int(share * len(members))]] = True
    keep = good & ~out
    if fits:
        images = torch.cat(pictures_read)
        pictures, held_out = images[keep], images[out]
    else:
        held_out = pictures[out.nonzero().flatten()]
        pictures = Pictures([paths[i] for i in keep.nonzero().flatten().tolist()], side)
    edge = (side - image_size) // 2
    held_out = held_out[..., edge:edge + image_size, edge:edge + image_size]
    fingerprint = zlib.crc32("\n".join(os.path.relpath(path, folder) for path in paths).encode())
    return Data(pictures, labels[keep], held_out, labels[out], classes, fingerprint)


def as_input(images, device="cpu"):
    """uint8 images to floats in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def as_images(pictures):
    """A numpy array (n, h, w, 3) to a tensor (n, 3, h, w)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------
# 3. The tokenizer's training (Sec. 3.3).


def kmeans(points, k, generator, rounds=10):
    """k unit vectors (k, C) at the centres of unit points (n, C)."""
    points = points.repeat(-(-k // len(points)), 1)  # there may be fewer points than centres
    centres = points[torch.randperm(len(points), generator=generator)[:k]]
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=k) == 0
        lost = torch.randperm(len(points), generator=generator)[:int(empty.sum())]
        sums[empty] = points[lost]
        centres = F.normalize(sums, dim=-1)
    return centres


@torch.no_grad()
def start_codebook(tokenizer, latents, generator):
    """Set the codebook to the centres of latents (n, C)."""
    centres = kmeans(latents.cpu(), tokenizer.config.codes, generator)
    tokenizer.codebook_weight.copy_(centres)


@torch.no_grad()
def update_codebook(tokenizer, latents, codes, generator, decay=0.99):
    """Move each code to the moving average of the latents (n, C) whose codes (n,) it is.

    The weight holds moving sums; Tokenizer.codebook() makes unit vectors of them. Their length
    tells how much a code is used: one that falls out of use starts again where a latent is.
    """
    sums = tokenizer.codebook_weight                                        # (V, C)
    sums.mul_(decay).index_add_(0, codes, latents, alpha=1 - decay)
    unused = (sums.norm(dim=-1) < 0.05).nonzero().flatten()[:len(latents)]
    found = torch.randperm(len(latents), generator=generator)[:len(unused)].to(latents.device)
    sums[unused] = 0.5 * latents[found]


def as_rows(maps):
    """(B, C, n, n) to (B*n*n, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def tokenizer_loss(tokenizer, images, quantized, generator):
    """Squared error of the reconstruction plus, when quantised, a small one of the latents against
    their codes (the commitment). As it goes, the codebook follows the latents."""
    latents = tokenizer.encode(images)                                      # (B, C, n, n)
    if not quantized:
        return F.mse_loss(tokenizer.decode(latents), images)
    codes = tokenizer.quantize(latents)                                     # (B, n, n)
    nearest = tokenizer.codebook()[codes].permute(0, 3, 1, 2)               # (B, C, n, n)
    update_codebook(tokenizer, as_rows(latents.detach()), codes.flatten(), generator)
    straight_through = latents + (nearest - latents).detach()
    commitment = (latents - nearest).square().sum(1).mean()
    return F.mse_loss(tokenizer.decode(straight_through), images) + 0.05 * commitment


def train_tokenizer(run, data, recipe, device):
    """Train the tokenizer of a run, from its last checkpoint on.

    Each step takes a batch at full size, and again at one random scale, since every scale is
    encoded by itself. The first 15 % train a plain autoencoder, where the codebook then starts.
    """
    iters, seed = recipe.tokenizer_iters, run.state["options"]["seed"]
    sizes = run.state["transformer_config"]["sizes"]
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(**run.state["tokenizer_config"])).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0)
    first, plain = run.resume("tokenizer", tokenizer, [optimizer]), int(0.15 * iters)
    for step in (bar := run.bar("tokenizer", first, iters)):
        generator = seeded(seed, 1, step)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 2 * (1 - step / iters))
        if step == plain:
            some = torch.randperm(len(data.images), generator=generator)[:256]
            images = as_input(data.crop(data.images[some]), device)
            with torch.no_grad():
                latents = [as_rows(tokenizer.encode(tokenizer.resize(images, n))) for n in sizes]
            start_codebook(tokenizer, torch.cat(latents), generator)
        some = torch.randint(len(data.images), (recipe.tokenizer_batch,), generator=generator)
        view = torch.randint(data.views, (), generator=generator).item()
        images = as_input(data.crop(data.images[some], view), device)
        n = sizes[torch.randint(len(sizes), (), generator=generator)]
        smaller = tokenizer.resize(images, n)
        loss = (tokenizer_loss(tokenizer, images, step >= plain, generator)
                + 0.25 * tokenizer_loss(tokenizer, smaller, step >= plain, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.watch("tokenizer", step, iters, loss, bar):
            run.save("tokenizer", step + 1, iters, tokenizer, [optimizer])
    return tokenizer.eval()


def refit_codebook(run, data, given, device):
    """Train nothing but a new codebook of a given tokenizer, for one epoch of batches of 32, each
    at a random size from one cell to all (Sec. 3.3, 4.1). It starts from encoded latents and moves
    to the mean of the latents of each code, which is where their L2 distance to it is least."""
    config = TokenizerConfig(**run.state["tokenizer_config"])
    tokenizer = Tokenizer(config).to(device).eval()
    tokenizer.load_state_dict(given.state_dict() | {"codebook_weight": tokenizer.codebook_weight})
    first, iters = run.resume("tokenizer", tokenizer, []), max(1, len(data.images) // 32)
    for step in (bar := run.bar("codebook", first, iters)):
        generator = seeded(run.state["options"]["seed"], 1, step)
        some = torch.randint(len(data.images), (32,), generator=generator)
        view = torch.randint(data.views, (), generator=generator).item()
        images = as_input(data.crop(data.images[some], view), device)
        n = torch.randint(images.shape[-1] // config.stride, (), generator=generator).item() + 1
        with torch.no_grad():
            if step == 0:
                start_codebook(tokenizer, as_rows(tokenizer.encode(images)), generator)
            latents = tokenizer.encode(tokenizer.resize(images, n))         # (32, C, n, n)
            codes = tokenizer.quantize(latents)
            nearest = tokenizer.codebook()[codes].permute(0, 3, 1, 2)
            update_codebook(tokenizer, as_rows(latents), codes.flatten(), generator)
        if run.watch("codebook", step, iters, (latents - nearest).square().sum(1).mean(), bar):
            run.save("tokenizer", step + 1, iters, tokenizer, [])
    return tokenizer


def make_tokenizer(run, data, given, recipe, device):
    """The tokenizer of a run: trained on its images, given, or given with a refitted codebook."""
    if given is None:
        return train_tokenizer(run, data, recipe, device)
    if run.state["options"]["refit_codebook"]:
        return refit_codebook(run, data, given, device)
    if "tokenizer" not in run.state:
        run.save("tokenizer", 0, 0, given, [])
    return given


def held_out_codes(tokenizer, data, sizes, device, most=None):
    """Codes (m, L) and labels (m,) of held-out images, at most so many of them."""
    codes = [torch.zeros(0, sum(n * n for n in sizes), dtype=torch.long)]
    for batch in data.held_out[:most].split(128) if len(data.held_out) else ():
        codes.append(tokenizer.encode_pyramid(as_input(batch, device), sizes).cpu())
    return torch.cat(codes), data.held_out_labels[:most]


UNREADABLE = 65535  # the codes of a picture that could not be read


def code_images(run, tokenizer, data, device):
    """Make codes.npy of a run: the codes (n, views, L) of all crops of its images, uint16.

    Written in chunks to codes.npy.tmp, whose length tells where to go on. Raises ValueError when
    the disk has no room for it.
    """
    path, sizes = run.path("codes.npy"), run.state["transformer_config"]["sizes"]
    shape = (len(data.images), data.views, sum(n * n for n in sizes))
    if os.path.exists(path):
        return
    header, row = io.BytesIO(), 2 * shape[1] * shape[2]
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<u2", "fortran_order": False, "shape": shape})
    with open(f"{path}.tmp", "ab") as file:
        if file.tell() < header.tell():
            file.truncate(0)
            file.write(header.getvalue())
        first = (file.tell() - header.tell()) // row
        file.truncate(header.tell() + first * row)
        need, free = (shape[0] - first) * row / 1e9, shutil.disk_usage(run.folder).free / 1e9
        if need > 0.1:
            tqdm.write(f"{path}: {need:.1f} GB to write, {free:.1f} GB free", sys.stderr)
        if need > free:
            raise ValueError(f"{path}: takes {need:.1f} GB more, the disk has {free:.1f} GB")
        bar = tqdm(total=shape[0], initial=first, desc="coding images", unit="image")
        for start in range(first, shape[0], 32):
            some = slice(start, min(start + 32, shape[0]))
            file.write(code_chunk(tokenizer, data, some, sizes, device).tobytes())
            bar.update(some.stop - some.start)
        bar.close()
    os.replace(f"{path}.tmp", path)


def read_codes(path):
    """The array that code_images wrote, left on disk. Raises ValueError when it is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError):
        raise ValueError(f"{path}: damaged; remove it, and the command makes it anew") from None


def code_chunk(tokenizer, data, some, sizes, device):
    """The codes (k, views, L) of a slice of the images."""
    images = data.images[some]
    codes = [tokenizer.encode_pyramid(as_input(data.crop(images, view), device), sizes).cpu()
             for view in range(data.views)]
    codes = torch.stack(codes, 1).numpy().astype("<u2")
    for number in getattr(data.images, "bad", ()):
        if some.start <= number < some.stop:
            codes[number - some.start] = UNREADABLE
    return codes


# ------------------------------------------------------------------------------------------------
# 4. A run: its folder, its checkpoint, its log.


class Run:
    """A folder and the state that its checkpoint holds; see `new_state`."""
    FILES = ("checkpoint.pt", "codes.npy", "log.csv", "samples.png", "progress.gif", "pyramid.png")

    def __init__(self, folder, state):
        self.folder, self.state = folder, state
        self.saved = time.monotonic()

    def path(self, name):
        """The path of one of FILES."""
        return os.path.join(self.folder, name)

    def write(self):
        """Write checkpoint.pt and log.csv; of several processes, only the first does."""
        if RANK:
            return
        text = io.StringIO(newline="")
        rows = self.state["log"]
        table = csv.DictWriter(text, list(rows[0]) if rows else ["step"])
        table.writeheader(), table.writerows(rows)
        ckgen.write_whole(self.path("log.csv"), lambda file: file.write(text.getvalue().encode()))
        ckgen.write_whole(self.path("checkpoint.pt"), lambda file: torch.save(self.state, file))
        self.saved = time.monotonic()

    def save(self, stage, step, iters, module, optimizers):
        """Take over the weights of a stage, "tokenizer" or "transformer", after a number of steps,
        and write."""
        self.state[stage] = module.state_dict()
        self.state["done"][stage] = step
        self.state["optimizers"] = {} if step == iters else \
            {stage: [optimizer.state_dict() for optimizer in optimizers]}
        self.write()

    def resume(self, stage, module, optimizers):
        """Put back what the last checkpoint holds of a stage; returns the first step to do."""
        if stage in self.state:
            ckgen.fill(module, self.state[stage], self.path("checkpoint.pt"))
        for optimizer, saved in zip(optimizers, self.state["optimizers"].get(stage, [])):
            optimizer.load_state_dict(saved)
        return self.state["done"].get(stage, 0)

    def progress(self):
        """How far the last checkpoint is, in words."""
        return " and ".join(f"{count} steps of the {stage}"
                            for stage, count in self.state["done"].items()) or "nothing yet"

    def bar(self, stage, first, iters):
        """A progress bar over the steps still to do."""
        return tqdm(range(first, iters), desc=stage, unit="step", initial=first, total=iters,
                    disable=RANK > 0)

    def watch(self, stage, step, iters, loss, bar):
        """Show the loss every 10 steps, and stop when it is not a number. True when a checkpoint is
        due: a minute has passed, or this was the last step."""
        due = step + 1 == iters or time.monotonic() - self.saved > CHECKPOINT_SECONDS
        if due or step % 10 == 0:
            if not math.isfinite(value := loss.item()):
                raise FloatingPointError(
                    f"the loss of the {stage} is {value} at step {step}; the last good checkpoint, "
                    f"{self.path('checkpoint.pt')}, has {self.progress()}")
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        return due


# ------------------------------------------------------------------------------------------------
# 5. The transformer's training (Sec. 3.1, 4.1).


def replace_codes(codes, share, vocabulary, generator):
    """Codes with this share of them replaced by random ones. Only z_up is made of them: the model
    learns not to trust the scale before blindly, while within a scale it reads the true codes."""
    replaced = torch.rand(codes.shape, generator=generator) < share
    return torch.where(replaced, torch.randint(vocabulary, codes.shape, generator=generator), codes)


def training_layouts(sizes, device):
    """The layouts among which training draws: P = 1, 2, 4 ... up to the side of the finest map."""
    return [Layout.make(sizes, 2 ** i, device) for i in range(sizes[-1].bit_length())]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): momentum, then each matrix moves along the orthogonal matrix nearest to
    it, found by five Newton-Schulz iterations. They are in float32: torch.optim.Muon's bfloat16
    takes 25 times as long on a CPU without AVX-512."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move all matrices, given their gradients."""
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
            rows, columns = p.shape
            x = update.T if rows > columns else update
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
                x = torch.addmm(x, b, x, beta=3.4445)
            x = x.T if rows > columns else x
            p.sub_(x, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, recipe):
    """AdamW as in Sec. 4.1, weight decay 0.01 on matrices; for tiny, Muon on the hidden ones."""
    # Muon is made for matrices that map hidden features to hidden features. Embeddings, the head,
    # the rotary table and AdaLN's layers (which see one vector an image) are not such.
    def takes_muon(name, p):
        hidden = name.startswith("layers") and "shift_scale" not in name
        return recipe.muon_lr and p.ndim == 2 and (
            hidden or name.startswith(("combine", "up_proj", "unfold")))

    rest = [p for name, p in model.named_parameters() if not takes_muon(name, p)]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)]
    if recipe.muon_lr:
        matrices = [p for name, p in model.named_parameters() if takes_muon(name, p)]
        optimizers.append(Muon(matrices, lr=recipe.muon_lr))
    return optimizers


def autocast(device):
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def held_out_loss(model, codebook, codes, labels, layout):
    """Mean cross entropy over images with codes (n, L): a list, of all tokens, then by scale."""
    sums = torch.zeros(1 + len(layout.sizes), device=codebook.device)
    for batch, label in zip(codes.split(128), labels.split(128)):
        batch, label = batch.to(codebook.device), label.to(codebook.device)
        with autocast(codebook.device):
            logits = model(codebook[batch], label, layout)
            loss, by_scale = ckgen.loss_by_scale(logits, batch, layout)
        sums += len(batch) * torch.cat([loss[None], by_scale])
    return (sums / len(codes)).tolist()


class Batch(NamedTuple):
    """What one step learns from; see `draw_batch`."""
    codes: torch.Tensor   # (B, L)
    noisy: torch.Tensor   # (B, L), codes of which z_up is made
    labels: torch.Tensor  # (B,)
    layout: Layout

    def to(self, device):
        """The batch, on the CPU so far, on a device. It goes to CUDA as one pinned array in one
        copy, for which the host does not wait."""
        rows, L = torch.cat([self.codes, self.noisy, self.labels[:, None]], 1), self.codes.shape[1]
        on_cuda = device.type == "cuda"
        rows = (rows.pin_memory() if on_cuda else rows).to(device, non_blocking=on_cuda)
        codes, noisy, labels = rows.split([L, L, 1], 1)                     # rows are (B, 2L + 1)
        return Batch(codes, noisy, labels[:, 0], self.layout)


def draw_batch(codes, usable, data, layouts, vocabulary, recipe, batch_size, generator):
    """All random draws of one step (Sec. 3.1): images and their views, one P for all scales and the
    whole batch, a tenth of the labels dropped for classifier-free guidance, replaced codes."""
    some = usable[torch.randint(len(usable), (batch_size,), generator=generator)]
    view = torch.randint(codes.shape[1], (batch_size,), generator=generator)
    batch = torch.from_numpy(codes[some.numpy(), view.numpy()].astype(np.int64))
    dropped = torch.rand(batch_size, generator=generator) < 0.1
    labels = torch.where(dropped, len(data.classes), data.labels[some])
    layout = layouts[torch.randint(len(layouts), (), generator=generator)]
    noisy = replace_codes(batch, recipe.replace_codes, vocabulary, generator)
    return Batch(batch, noisy, labels, layout)


def training_loss(model, codebook, batch):
    """Loss of a Batch, and of each of its scales."""
    codes, noisy, labels, layout = batch.to(codebook.device)
    with autocast(codebook.device):
        logits = model(codebook[codes], labels, layout, codebook[noisy])
        return ckgen.loss_by_scale(logits, codes, layout)


def backward(model, codebook, batch, parts):
    """Gradients of the mean loss of a Batch, taken in equal parts one after the other (gradient
    accumulation). Each of several processes takes its own share of every part; DistributedData-
    Parallel averages. Returns 1 and the losses of this process, all and by scale: (2 + scales,)."""
    losses = 0
    for part in range(parts):
        mine = slice(part * WORLD + RANK, None, parts * WORLD)
        share = Batch(*(x[mine] for x in batch[:3]), batch.layout)
        loss, by_scale = training_loss(model, codebook, share)
        (loss / parts).backward()
        losses = losses + torch.cat([loss.detach()[None], by_scale.detach()]) / parts
    return torch.cat([torch.ones_like(losses[:1]), losses])


def train_step(model, optimizers, codebook, batch, parts=1):
    """One step of training on a Batch; returns what `backward` does."""
    model.zero_grad()
    losses = backward(model, codebook, batch, parts)
    for optimizer in optimizers:
        optimizer.step()
    return losses


class Log:
    """The rows of log.csv: a hundred over the run, ten of them with the held-out loss."""

    def __init__(self, run, model, tokenizer, data, recipe):
        self.run, self.model, self.recipe, self.codebook = run, model, recipe, tokenizer.codebook()
        sizes, device = model.config.sizes, self.codebook.device
        self.layout = Layout.make(sizes, run.state["defaults"]["steps"], device)
        self.codes, self.labels = held_out_codes(tokenizer, data, sizes, device, most=256)
        self.restart_clock()

    def restart_clock(self):
        """Time from here, so that speed counts nothing but training."""
        self.clock, self.tokens = time.perf_counter(), 0

    def add(self, step, losses, tokens, factor):
        """Take the losses of a step, (2 + scales,): 1, the loss, each scale's. Their sums since the
        last row lie in the run's state, so that a run that was stopped logs the same."""
        state, iters = self.run.state, self.recipe.iters
        state["window"] = state["window"].to(losses.device) + losses
        self.tokens += tokens
        if (step + 1) % max(1, iters // 100) and step + 1 < iters:
            return
        count, *means = state["window"].tolist()  # waits for the GPU: now the clock tells the truth
        names = ["loss"] + [f"loss_{n}x{n}" for n in self.model.config.sizes]
        row = {"step": step + 1} | {name: round(x / count, 4) for name, x in zip(names, means)}
        speed = round(self.tokens / (time.perf_counter() - self.clock))
        row |= {"held_out": "", "lr": f"{self.recipe.lr * factor:.3g}", "tokens_per_s": speed}
        if (step + 1) % max(1, iters // 10) == 0 and len(self.codes) and RANK == 0:
            loss = held_out_loss(self.model, self.codebook, self.codes, self.labels, self.layout)[0]
            row["held_out"] = round(loss, 4)
        state["log"].append(row)
        state["window"] = torch.zeros_like(losses)
        self.restart_clock()


def start_from(source, model):
    """Start a model from another's weights (footnote 2: a 4x model from a 2x model's). What belongs
    to a location is taken from the scales of the same size; a scale that is new keeps its start.
    Raises ValueError when anything else does not fit."""
    there, here = (dict(zip(m.config.sizes, ckgen.scale_slices(m.config.sizes)))
                   for m in (source, model))
    weights = source.state_dict()
    for name in ("pos_embed", "rope"):
        table = model.state_dict()[name].cpu().clone()
        if table.shape[1] == weights[name].shape[1]:
            for n in here.keys() & there.keys():
                table[here[n]] = weights[name][there[n]]
            if name == "rope":
                table[-2:] = weights[name][-2:]  # the class and EMPTY
        weights[name] = table
    ckgen.fill(model, weights, "--init")


def train_model(run, data, codes, tokenizer, source, recipe, device):
    """Train the transformer of a run on codes (n, views, L), from its last checkpoint on. source is
    the model of --init to start from, or None."""
    iters, seed = recipe.iters, run.state["options"]["seed"]
    torch.manual_seed(seed)
    model = Checkerboard(Config(**run.state["transformer_config"])).to(device)
    if source is not None:
        start_from(source, model)
    optimizers, codebook = make_optimizers(model, recipe), tokenizer.codebook()
    first = run.resume("transformer", model, optimizers)
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    layouts = training_layouts(model.config.sizes, device)
    usable = torch.from_numpy(np.flatnonzero(codes[:, 0, 0] != UNREADABLE))
    log = Log(run, model, tokenizer, data, recipe)
    for step in (bar := run.bar("transformer", first, iters)):
        factor, parts = learning_rate(recipe, step, iters), accumulated(recipe, step, iters)
        for optimizer, rate in zip(optimizers, (recipe.lr, recipe.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        batch = draw_batch(codes, usable, data, layouts, len(codebook), recipe,
                           recipe.batch_size * parts, seeded(seed, 2, step))
        losses = train_step(parallel, optimizers, codebook, batch, parts)
        due = run.watch("transformer", step, iters, losses[1], bar)
        log.add(step, losses, batch.codes.numel(), factor)
        if due:
            run.save("transformer", step + 1, iters, model, optimizers)
            if step + 1 < iters:  # so that one can watch; the last ones are drawn by `train`
                draw_samples(run, model, tokenizer)
            log.restart_clock()
    return model.eval()


# ------------------------------------------------------------------------------------------------
# 6. Pictures.


def sample_codes(run, model, tokenizer, labels, **guidance):
    """Codes for these labels, with the run's own steps, guidance and temperature unless given."""
    defaults = {**run.state["defaults"], **guidance}
    layout = Layout.make(model.config.sizes, defaults.pop("steps"), labels.device)
    batches = ckgen.generate(model, tokenizer, labels, layout, run.state["options"]["seed"],
                             **defaults)
    return torch.cat(list(batches)), layout


def spread_classes(count, most=16):
    """At most this many class numbers, spread evenly over all of them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def draw_samples(run, model, tokenizer):
    """samples.png: a row of eight for each class; by the first process only."""
    if RANK:
        return
    shown, device = spread_classes(len(run.state["classes"])), tokenizer.codebook_weight.device
    labels = torch.tensor(shown, device=device).repeat_interleave(8)
    codes, layout = sample_codes(run, model, tokenizer, labels)
    pictures = ckgen.decode_scale(tokenizer, codes, layout.sizes)
    names = [run.state["classes"][c] for c in shown]
    grid = ckgen.picture_grid(np.split(pictures, len(shown)), names)
    ckgen.write_whole(run.path("samples.png"), lambda file: grid.save(file, "PNG"))


def draw_steps(run, model, tokenizer):
    """progress.gif (Fig. 1): one image of each class after every step. pyramid.png: the same images
    once finished, every scale as a picture by itself (Sec. 3.3). By the first process only."""
    if RANK:
        return
    shown, device = spread_classes(len(run.state["classes"]), 8), tokenizer.codebook_weight.device
    codes, layout = sample_codes(run, model, tokenizer, torch.tensor(shown, device=device))
    frames = ckgen.progress_frames(tokenizer, codes, layout)
    grids = [ckgen.picture_grid([frame]) for frame in frames]
    ckgen.write_whole(run.path("progress.gif"), lambda file: ckgen.save_gif(grids, file))
    rows, size = [], frames[-1].shape[2:0:-1]
    for scale in range(len(layout.sizes)):
        pictures = map(Image.fromarray, ckgen.decode_scale(tokenizer, codes, layout.sizes, scale))
        rows.append(np.stack([p.resize(size, Image.Resampling.NEAREST) for p in pictures]))
    grid = ckgen.picture_grid(rows, [f"{n}x{n}" for n in layout.sizes])
    ckgen.write_whole(run.path("pyramid.png"), lambda file: grid.save(file, "PNG"))


# ------------------------------------------------------------------------------------------------
# 7. Evaluation.


class Classifier(nn.Module):
    """A small convolutional network; its last features serve the Frechet distance."""

    def __init__(self, classes):
        super().__init__()
        widths, layers = (3, 32, 64, 128), []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images):
        return self.head(self.features(images))


def train_classifier(data, device, iters=1000):
    """Train a Classifier on real images."""
    torch.manual_seed(0)
    classifier = Classifier(len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=iters)
    for _ in tqdm(range(iters), desc="classifier", unit="step"):
        some = torch.randint(len(data.images), (64,))
        view = torch.randint(data.views, ()).item()
        logits = classifier(as_input(data.crop(data.images[some], view), device))
        loss = F.cross_entropy(logits, data.labels[some].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def frechet_distance(a, b):
    """Frechet distance [8] between two sets of features, (n, d) and (m, d); n and m at least 2,
    else it is not a number."""
    if min(len(a), len(b)) < 2:
        return math.nan
    a, b = a.double(), b.double()
    product = a.T.cov() @ b.T.cov()  # the trace of its root: the sum of its eigenvalues' roots
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
            - 2 * root).item()


def two_colours(images):
    """Share of toy images (n, 3, S, S), uint8, in which a second of the six shape colours covers
    more than a tenth of what the first covers. A pixel counts for a colour at most 60 from it."""
    far = torch.cdist(images.flatten(2).transpose(1, 2).float(), COLOURS.float())   # (n, S*S, 6)
    covers = F.one_hot(far.argmin(-1), len(COLOURS)) * (far.amin(-1, keepdim=True) < 60)
    most = covers.sum(1).sort(-1, descending=True).values                           # (n, 6)
    return (most[:, 1] > 0.1 * most[:, 0]).double().mean().item()


@torch.no_grad()
def image_features(classifier, images):
    """A classifier's features (n, 128) of images (n, 3, S, S), uint8."""
    device = classifier.head.weight.device
    return torch.cat([classifier.features(as_input(batch, device)).cpu()
                      for batch in images.split(256)])


@torch.no_grad()
def quality(classifier, images, labels, reference):
    """Class accuracy of images (n, 3, S, S), uint8, and Frechet distance to reference features."""
    features = image_features(classifier, images)
    right = classifier.head(features.to(classifier.head.weight.device)).argmax(-1).cpu() == labels
    return right.double().mean().item(), frechet_distance(features, reference)


def print_losses(model, tokenizer, data, steps, device):
    """Print the tokenizer's error and the transformer's loss on the held-out images."""
    sizes, codebook = model.config.sizes, tokenizer.codebook()
    codes, labels = held_out_codes(tokenizer, data, sizes, device)
    seen = as_images(ckgen.decode_scale(tokenizer, codes.to(device), sizes))
    error = (seen.float() - data.held_out.float()).square().mean().item()
    print(f"tokenizer: {10 * math.log10(255 ** 2 / error):.1f} dB on {len(codes)} held-out images, "
          f"{len(codes.unique())} of {len(codebook)} codes in use by them")
    print("held-out NLL, nats a token" + "".join(f"{f'{n}x{n}':>9}" for n in sizes) + "      all")
    for P in sorted({1, 2, 4, 8, steps}):
        layout = Layout.make(sizes, P, device)
        nll, *by_scale = held_out_loss(model, codebook, codes, labels, layout)
        print(f"  P = {P:<3d}                 " + "".join(f"{x:9.3f}" for x in [*by_scale, nll]))


def print_quality(run, model, tokenizer, data, steps, device):
    """Print what a classifier trained on the real images says of samples, and of real images."""
    classifier = train_classifier(data, device)
    n = -(-1000 // len(data.classes)) * len(data.classes)  # 1000 or a little more, as many of each
    labels = torch.arange(n) % len(data.classes)
    codes, layout = sample_codes(run, model, tokenizer, labels.to(device), steps=steps)
    samples = as_images(ckgen.decode_scale(tokenizer, codes, layout.sizes))
    some = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:10000]
    reference = image_features(classifier, data.crop(data.images[some]))
    defaults = run.state["defaults"]
    print(f"P = {steps}, {len(layout.steps)} steps, cfg {defaults['cfg']:g}, temperature "
          f"{defaults['temperature']:g}; Frechet distance to {len(reference)} training images")
    for name, images, truth in (("samples", samples, labels),
                                ("held-out", data.held_out[:n], data.held_out_labels[:n])):
        accuracy, frechet = quality(classifier, images, truth, reference)
        mixed = f", two colours {two_colours(images):.1%}" if data.classes == SHAPES else ""
        print(f"  {len(images):4d} {name:8s}: class accuracy {accuracy:.3f}, "
              f"Frechet distance {frechet:.2f}{mixed}")


def evaluate(args):
    """Print what the README quotes of a checkpoint. Raises ValueError for bad input."""
    device = ckgen.pick_device(args.device)
    run = Run(os.path.dirname(args.evaluate), ckgen.read_checkpoint(args.evaluate))
    model, tokenizer, classes, defaults = ckgen.from_own(args.evaluate, run.state)
    model.to(device).eval(), tokenizer.to(device).eval()
    source, steps = args.data or run.state["options"]["data"], args.steps or defaults["steps"]
    data = load_data(source, run.state["options"]["image_size"])
    if data.classes != classes:
        raise ValueError(f"--data {source}: its class folders are not the checkpoint's classes")
    if not len(data.held_out):
        raise ValueError(f"--data {source}: none held out: that takes 20 pictures in a class")
    print_losses(model, tokenizer, data, steps, device)
    print_quality(run, model, tokenizer, data, steps, device)


# ------------------------------------------------------------------------------------------------
# 8. Benchmark.

BENCH_LIMIT = 10.0  # seconds: what cannot take less on a device is left out
PAPER_TOKENIZER = TokenizerConfig(codes=4096, stride=16, width=256,
                                  channels=(128, 128, 256, 256, 512))  # LlamaGen's, refitted


class Speed(NamedTuple):
    """What a device can do. Its work at these speeds is the floor, an estimate: smaller arrays can
    be copied faster, from a cache, and smaller matrices are multiplied more slowly."""
    device: torch.device
    copy: float    # bytes read and written in a second
    matmul: float  # floating-point operations in a second


def timed(run, device, least=3, seconds=2.0):
    """Seconds that each of several runs took, sorted; two runs before them warm up."""
    times = []
    while len(times) < 2 + least or sum(times[2:]) < seconds:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])


def measure_speed(device, dtype):
    """The Speed of a device: of copying a large array, and of a product of two large matrices."""
    values, n = (2 ** 28, 8192) if device.type == "cuda" else (2 ** 25, 2048)
    a = torch.zeros(values, device=device)
    b, matrix = torch.empty_like(a), torch.randn(n, n, device=device).to(dtype)
    copy, matmul = (np.median(timed(run, device)) for run in (lambda: b.copy_(a),
                                                              lambda: matrix @ matrix))
    return Speed(device, 2 * a.nbytes / copy, 2 * n ** 3 / matmul)


def peak_memory(device):
    """Bytes held at most: on CUDA by tensors since the peak was reset, else by the process so far,
    where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(file.read().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        return math.nan


def measure(what, make, items, unit, flops, nbytes, speed):
    """Print a row of the table. make() is a function that makes so many items, which takes flops
    operations and reading nbytes at least."""
    device, floor = speed.device, max(flops / speed.matmul, nbytes / speed.copy)
    if floor > BENCH_LIMIT:
        return print(f"{what:33s} left out: takes at least {floor:.0f} s")
    if device.type == "cuda":
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(device)
    try:
        times = timed(make(), device)
    except RuntimeError as error:  # out of memory, no compiler
        return print(f"{what:33s} failed: {str(error).strip().splitlines()[0]}")
    median = np.median(times)
    print(f"{what:33s}{1e3 * median:9.1f}{1e3 * times[0]:9.1f}{1e3 * times[-1]:9.1f}"
          f"{items / median:11.1f} {unit}{peak_memory(device) / 1e9:7.2f}{1e3 * floor:9.1f}"
          f"{median / floor:7.1f}{flops / median / speed.matmul:7.0%}", flush=True)


def count_flops(run):
    """Floating-point operations of matrix products and convolutions in run()."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def bench_model(name, scale, device, dtype=torch.float32):
    """A model and a tokenizer with random weights: tiny as on the toy shapes; S and L in the
    paper's geometry, 256 pixels and 1000 classes."""
    recipe, tokenizer = RECIPES[name], TokenizerConfig() if name == "tiny" else PAPER_TOKENIZER
    grid, classes = (8, len(SHAPES)) if name == "tiny" else (16, 1000)
    config = Config(ckgen.scale_sizes(grid, scale), classes, tokenizer.codes, tokenizer.code_dim,
                    recipe.width, recipe.layers, recipe.heads, recipe.ffn)
    with torch.device(device):
        model, tokenizer = Checkerboard(config).to(dtype), Tokenizer(tokenizer).to(dtype)
    return model.eval(), tokenizer.to(memory_format=torch.channels_last).eval()


def bench_sampler(model, tokenizer, steps, batch, decoded, graph=False):
    """A function that draws a batch with guidance, as codes or decoded to images."""
    device, sizes = tokenizer.codebook_weight.device, model.config.sizes
    codebook, layout = tokenizer.codebook(), Layout.make(sizes, steps, device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    draw = ckgen.SamplerGraph(model, codebook, layout, batch, torch.Generator(device)) if graph \
        else lambda labels, cfg: ckgen.sample(model, codebook, labels, layout, cfg)

    def run():
        codes = draw(labels, 1.5)
        return tokenizer.decode_codes(codes[:, ckgen.scale_slices(sizes)[-1]]) if decoded else codes

    return run


def bench_sampling(name, scale, steps, dtype, speed):
    """Rows for sampling: latency at batch 1, throughput at 8 and 64."""
    meta = bench_model(name, scale, torch.device("meta"))
    flops = [count_flops(bench_sampler(*meta, steps, 1, decoded)) for decoded in (False, True)]
    model, tokenizer = bench_model(name, scale, speed.device, dtype)
    weights = sum(module.weight.nbytes for key, module in model.named_modules()
                  if isinstance(module, nn.Linear) and "shift_scale" not in key)
    passes = len(Layout.make(model.config.sizes, steps).steps)
    for batch in (1, 8, 64):
        for graph in (False, True) if speed.device.type == "cuda" else (False,):
            for decoded in (False, True):
                what = (f"{name:5s}{'images' if decoded else 'codes':7s}batch {batch:3d}, "
                        f"{'graph' if graph else 'eager'}")
                measure(what, partial(bench_sampler, model, tokenizer, steps, batch, decoded,
                                      graph),
                        batch, "img/s", batch * flops[decoded], weights * passes, speed)


def bench_trainer(name, scale, device, compiled=False):
    """A function that takes a step of training, from reading its batch to the optimizers."""
    model, tokenizer = bench_model(name, scale, device)
    recipe, layouts = RECIPES[name], training_layouts(model.config.sizes, device)
    optimizers, codebook = make_optimizers(model, recipe), tokenizer.codebook()
    codes = np.zeros((1000, 1, model.config.length), np.uint16)
    labels, usable, numbers = torch.zeros(1000, dtype=torch.long), torch.arange(1000), count()
    data = Data(codes, labels, codes, labels, list(range(model.config.classes)))
    model = torch.compile(model) if compiled else model

    def run():
        batch = draw_batch(codes, usable, data, layouts, len(codebook), recipe, recipe.batch_size,
                           seeded(0, 2, next(numbers)))
        return train_step(model, optimizers, codebook, batch)

    if compiled:
        start = time.perf_counter()
        run()
        print(f"{name:5s}torch.compile's first step takes {time.perf_counter() - start:.0f} s")
    return run


def bench_training(name, scale, speed):
    """Rows for a step of training at the recipe's batch size; on CUDA through torch.compile, too.
    (On a CPU that needs a C++ compiler and a minute or two, which tiny's run does not win back.)"""
    recipe, (model, tokenizer) = RECIPES[name], bench_model(name, scale, torch.device("meta"))
    B, L = recipe.batch_size, model.config.length
    layout = Layout.make(model.config.sizes, 4, "meta")
    codes = torch.zeros(B, L, dtype=torch.long, device="meta")
    latents = tokenizer.codebook()[codes]
    flops = count_flops(lambda: model(latents, codes[:, 0], layout).sum().backward())
    for compiled in (False, True) if speed.device.type == "cuda" else (False,):
        what = f"{name:5s}train  batch {B:3d}{', compiled' if compiled else ''}"
        measure(what, partial(bench_trainer, name, scale, speed.device, compiled), B * L, "tok/s",
                flops, 0, speed)


def bench(args):
    """Print how fast this device samples and trains tiny, S and L (or --config) with random
    weights, beside the floor that its copies and matrix products set."""
    device = ckgen.pick_device(args.device)
    dtype, steps = ckgen.pick_dtype(args.dtype, device), args.steps or 4
    train_dtype = ckgen.pick_dtype(None, device)  # see `autocast`
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; sampling in {dtype}, training in {train_dtype}\n"
          f"ratio {args.scale}, P = {steps}, guidance from the sixth step on; images: decoder "
          f"included")
    speed = measure_speed(device, dtype)
    train_speed = speed if train_dtype == dtype else measure_speed(device, train_dtype)
    print(f"copies {speed.copy / 1e9:.0f} GB/s; matrix products {speed.matmul / 1e12:.2f} TFLOP/s "
          f"in {dtype}, {train_speed.matmul / 1e12:.2f} in {train_dtype}\n"
          f"{'ms: median, least and most':>60s}{'':17s}peak GB  floor ms  ratio  FLOP/s used")
    for config in [args.config] if args.config else RECIPES:
        bench_sampling(config, args.scale, steps, dtype, speed)
        bench_training(config, args.scale, train_speed)


# ------------------------------------------------------------------------------------------------
# 9. Command line.


def load_data(source, image_size):
    """The toy set, or the pictures of a folder."""
    return folder_data(source, image_size) if source else toy_data(image_size)


def read_recipe(args, device, tokenizer):
    """The recipe of a run, and its options: what a run that goes on must not change. tokenizer is
    the given one or None. Raises ValueError for options that do not fit together."""
    config = args.config or ("S" if device.type == "cuda" else "tiny")
    recipe, stride = RECIPES[config], TokenizerConfig.stride
    if tokenizer:
        stride = tokenizer.config.stride
        recipe = replace(recipe, image_size=256, tokenizer_codes=tokenizer.config.codes)
    given = {key: getattr(args, key) for key in ("image_size", "iters", "batch_size", "lr")
             if getattr(args, key) is not None}
    if args.lr:
        given["muon_lr"] = recipe.muon_lr * args.lr / recipe.lr
    if args.iters:
        given["tokenizer_iters"] = max(1, recipe.tokenizer_iters * args.iters // recipe.iters)
    recipe = replace(recipe, **given, tokenizer_codes=args.refit_codebook or recipe.tokenizer_codes)
    if recipe.image_size % stride:
        raise ValueError(f"--image-size {recipe.image_size}: must be a multiple of {stride}, the "
                         f"tokenizer's stride")
    if tokenizer and not args.data or args.refit_codebook and not tokenizer:
        raise ValueError("--tokenizer needs --data, and --refit-codebook needs --tokenizer")
    if recipe.batch_size % WORLD:
        raise ValueError(f"--batch-size {recipe.batch_size}: must be a multiple of the {WORLD} "
                         f"processes")
    paths = {key: os.path.abspath(value) if (value := getattr(args, key)) else None
             for key in ("data", "tokenizer", "init")}
    options = {"config": config, "scale": args.scale, "seed": args.seed, **paths,
               "refit_codebook": args.refit_codebook}
    return recipe, options | {key: getattr(recipe, key)
                              for key in ("image_size", "iters", "batch_size", "lr")}


def new_state(recipe, options, data, steps, tokenizer=None):
    """What the checkpoint of a run holds before its first step. tokenizer: a given one or None."""
    tokenizer = replace(tokenizer.config if tokenizer else TokenizerConfig(),
                        codes=recipe.tokenizer_codes)
    sizes = ckgen.scale_sizes(recipe.image_size // tokenizer.stride, options["scale"])
    model = Config(sizes, len(data.classes), tokenizer.codes, tokenizer.code_dim, recipe.width,
                   recipe.layers, recipe.heads, recipe.ffn)
    return {"format": ckgen.FORMAT, "options": options,
            "classes": data.classes, "fingerprint": data.fingerprint,
            "tokenizer_config": asdict(tokenizer), "transformer_config": asdict(model),
            "defaults": {"steps": steps, "cfg": recipe.cfg, "temperature": recipe.temperature},
            "iters": recipe.iters, "done": {}, "optimizers": {},
            "log": [], "window": torch.zeros(2 + len(sizes))}


def find_state(folder, options, overwrite):
    """The state of the run in a folder, None to start afresh. Raises ValueError when the folder
    holds something else, or a run with other options."""
    path = os.path.join(folder, "checkpoint.pt")
    nearest = os.path.abspath(folder)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {folder}: {nearest} is no folder that can be written to")
    if overwrite:
        return None
    if not os.path.exists(path):
        if os.path.isdir(folder) and any(not file.endswith(".tmp") for file in os.listdir(folder)):
            raise ValueError(f"--out {folder}: not empty, and holds no run of this program")
        return None
    state = ckgen.read_checkpoint(path)
    for name, value in options.items():
        there = state["options"].get(name)
        if there != value:
            raise ValueError(f"{folder} holds a run with --{name.replace('_', '-')} {there}, not "
                             f"{value}; name another folder with --out, or --overwrite it")
    return state


def start_processes(args):
    """The device of this process; under torchrun, join the others. Only the first one speaks."""
    if WORLD == 1:
        return ckgen.pick_device(args.device)
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    device = ckgen.pick_device(gpu if args.device in (None, "cuda") else args.device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=timedelta(days=7))  # coding ImageNet takes long
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def start_run(folder, state, recipe, options, data, steps, tokenizer):
    """The Run of a folder: a new one where state is None, else the one that was begun. Raises
    ValueError when the pictures are not those it was begun with."""
    if state is None:
        run = Run(folder, new_state(recipe, options, data, steps or 4, tokenizer))
        os.makedirs(folder, exist_ok=True)
        run.write()  # in place of a run that was there before, whose other files then go
        for path in map(run.path, {*Run.FILES, "codes.npy.tmp"} - {"checkpoint.pt", "log.csv"}):
            if os.path.exists(path):
                os.remove(path)
        describe(run, data)
        return run
    if (data.classes, data.fingerprint) != (state["classes"], state["fingerprint"]):
        raise ValueError(f"--data {options['data']}: not the files that the run in {folder} was "
                         f"begun with; name another folder with --out, or --overwrite it")
    state["defaults"]["steps"] = steps or state["defaults"]["steps"]
    run = Run(folder, state)
    print(f"{folder}: going on after {run.progress()}")
    describe(run, data)
    return run


def describe(run, data):
    """Say what a run is about to learn from."""
    state, maps = run.state, " ".join(f"{n}x{n}" for n in run.state["transformer_config"]["sizes"])
    print(f"{run.folder}: {len(data.images)} images of {len(data.classes)} classes and "
          f"{len(data.held_out)} held out; config {state['options']['config']}, "
          f"{state['iters']} steps on maps {maps}")


def train(args):
    """Train what the command line asks for, or go on with it. Raises ValueError for bad input."""
    device = start_processes(args)
    given = ckgen.load_tokenizer(args.tokenizer).to(device).eval() if args.tokenizer else None
    recipe, options = read_recipe(args, device, given)
    source = os.path.basename(options["data"] or "toy")
    folder = args.out or os.path.join("runs", f"{options['config']}-{args.scale}x-{source}")
    state = find_state(folder, options, args.overwrite)
    if (state and state["done"].get("transformer") == state["iters"]
            and all(os.path.exists(os.path.join(folder, file)) for file in Run.FILES)):
        print(f"{folder} is finished already; its pictures have P = {state['defaults']['steps']}:")
        return tell(folder)
    begun = state is not None and "transformer" in state  # then --init is needed no more
    init = ckgen.load(args.init).model if args.init and not begun else None
    data = load_data(options["data"], recipe.image_size)
    if given and not args.iters and recipe.epochs:
        epochs = 30 if args.init else recipe.epochs
        recipe = replace(recipe, iters=max(1, epochs * len(data.images) // recipe.batch_size))
    if RANK == 0:  # the first process makes the tokenizer and the codes, the others wait and read
        run = start_run(folder, state, recipe, options, data, args.steps, given)
        tokenizer = make_tokenizer(run, data, given, recipe, device)
        code_images(run, tokenizer, data, device)
    if WORLD > 1:
        torch.distributed.barrier()
    if RANK > 0:
        run = Run(folder, ckgen.read_checkpoint(os.path.join(folder, "checkpoint.pt")))
        tokenizer = Tokenizer(TokenizerConfig(**run.state["tokenizer_config"])).to(device).eval()
        run.resume("tokenizer", tokenizer, [])
    codes = read_codes(run.path("codes.npy"))
    model = train_model(run, data, codes, tokenizer, init, recipe, device)
    draw_samples(run, model, tokenizer)
    draw_steps(run, model, tokenizer)
    tell(folder)


def tell(folder):
    """Say what lies in the folder of a finished run."""
    path, quoted = os.path.join(folder, ""), shlex.quote(os.path.join(folder, "checkpoint.pt"))
    print(f"{path}samples.png     a row of samples for each class\n"
          f"{path}progress.gif    one image of each class after every step (Fig. 1)\n"
          f"{path}pyramid.png     the same images, each scale a picture by itself\n"
          f"{path}log.csv         losses, learning rate, speed\n"
          f"{path}checkpoint.pt   all that sampling needs; next:\n"
          f"    python ckgen.py {quoted} --n 16 --steps 8 --out more.png\n"
          f"    python train_tiny.py --evaluate {quoted}")


def parse_arguments(arguments):
    """The parser and what it reads off the command line."""
    parser = argparse.ArgumentParser(
        description="Train checkerboard image generation from nothing: a tokenizer, then a "
                    "transformer, on toy shapes or on your pictures. The same command continues a "
                    "run that was stopped.",
        epilog="example: python train_tiny.py --scale 2 --steps 4")
    add, number, name = parser.add_argument, ckgen.number, ckgen.name
    add("--scale", choices=ckgen.SCALE_RATIOS, default="2",
        help="ratio between the scales of the pyramid; 1: a single scale (default: 2)")
    add("--steps", type=number(int, 1, 10 ** 6), metavar="P", help="steps per scale for the "
        "pictures and the held-out loss (default: 4); training draws P at random")
    add("--config", choices=RECIPES, help="size of the model (default: S on CUDA, else tiny)")
    add("--data", type=name, metavar="DIR",
        help="your pictures, a folder per class (default: toy shapes)")
    add("--tokenizer", type=name, metavar="FILE", help="a trained tokenizer, for 256-pixel "
        "pictures, such as LlamaGen's vq_ds16_c2i.pt (default: train a small one)")
    add("--refit-codebook", type=number(int, 2, 65535), metavar="CODES",
        help="first train a new codebook for it, for one epoch (4096 in the paper)")
    add("--init", type=name, metavar="CHECKPOINT", help="start from a trained model's weights, "
        "also of another scale ratio (the paper's 4x model starts from its 2x model)")
    add("--image-size", type=number(int, 4, 1024), metavar="PIXELS",
        help="side of the images (default: 32 for tiny, 64 for S and L; 256 with --tokenizer)")
    add("--out", type=name, metavar="DIR",
        help="the run's folder (default: runs/<config>-<scale>x-<data>)")
    add("--iters", type=number(int, 1, 10 ** 9), help="steps of the transformer's training; the "
        "tokenizer's follow in proportion (default: " + as_list("iters") + "; with --tokenizer, "
        "S and L the paper's epochs)")
    add("--batch-size", type=number(int, 1, 10 ** 5), help="images in a step of the transformer's "
        "training (default: " + as_list("batch_size") + ")")
    add("--lr", type=number(float, 1e-9, 1), help="AdamW's learning rate; tiny's Muon follows in "
        "proportion (default: " + as_list("lr") + ")")
    add("--seed", type=number(int, 0, 10 ** 9), default=0,
        help="same seed, same machine: same weights")
    add("--device", type=name, help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--overwrite", action="store_true", help="start afresh in a used folder")
    add("--evaluate", type=name, metavar="CHECKPOINT", help="print how good a checkpoint is")
    add("--bench", action="store_true", help="print how fast this machine samples and trains")
    add("--dtype", choices=["float32", "bfloat16"], help="sampling's in --bench (see ckgen.py)")
    return parser, parser.parse_args(arguments)


def as_list(field):
    """A field of all recipes, for the help."""
    return ", ".join(f"{name} {getattr(recipe, field):g}" for name, recipe in RECIPES.items())


def main(arguments=None):
    """The command line of this file."""
    parser, args = parse_arguments(arguments)
    resumed = "" if args.bench or args.evaluate else \
        "the same command goes on from the last checkpoint"
    try:
        if args.dtype and not args.bench:
            raise ValueError("--dtype: for --bench alone; training is in float32, on CUDA with "
                             "bfloat16 where that is safe")
        if args.bench and (args.evaluate or args.data):
            raise ValueError("--bench: takes neither --evaluate nor --data; its weights are random")
        (bench if args.bench else evaluate if args.evaluate else train)(args)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}")
    except OSError as error:
        sys.exit(f"stopped: {error}" + (resumed and f"; with that mended, {resumed}"))
    except KeyboardInterrupt:
        print("\nstopped" + (resumed and f"; {resumed}"), file=sys.stderr)
        sys.exit(130)
    finally:
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
