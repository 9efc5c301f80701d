"""train_tiny: train ckgen from nothing, on pictures it draws itself or on yours, with one command.

    python train_tiny.py --scale 2 --steps 4          # toy shapes; minutes on a CPU
    python train_tiny.py --data DIR                   # your pictures, one folder per class
    python train_tiny.py --evaluate runs/tiny-2x-toy/checkpoint.pt

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
import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import ckgen
from ckgen import Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, at_least

CHECKPOINT_SECONDS = 60

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
    drops: tuple = ()           # (share of the run, factor on lr from there on), after a warm-up
    muon_lr: float = 0.0        # of Muon, on hidden matrices; 0: AdamW on everything
    replace_codes: float = 0.0  # share of codes replaced at random before they are upsampled
    cfg: float = 1.5            # guidance of the run's own pictures
    temperature: float = 1.0    # and their temperature


# tiny departs from the paper's AdamW: in the few minutes of its run Muon gets much further.
RECIPES = {
    "tiny": Recipe(width=128, layers=4, heads=4, ffn=384, image_size=32, tokenizer_codes=256,
                   tokenizer_iters=1600, tokenizer_batch=16, iters=1300, batch_size=16, lr=6e-3,
                   muon_lr=0.03, cfg=0.5, temperature=0.6),
    "S": Recipe(width=512, layers=12, heads=16, ffn=1536, image_size=64, tokenizer_codes=1024,
                tokenizer_iters=6000, tokenizer_batch=32, iters=6000, batch_size=128, lr=1e-4,
                drops=((100 / 110, 10 ** -0.5), (105 / 110, 0.1)), replace_codes=0.1),
    "L": Recipe(width=1024, layers=20, heads=16, ffn=3072, image_size=64, tokenizer_codes=1024,
                tokenizer_iters=6000, tokenizer_batch=32, iters=12000, batch_size=64, lr=5e-5,
                drops=((200 / 210, 0.2),), replace_codes=0.1),
}


def learning_rate(recipe, step, iters):
    """The factor on the learning rate at a step.

    tiny: 20 steps of warm-up, then linearly down to zero. S and L (Sec. 4.1): a warm-up of a
    hundredth of the run (one epoch in the author's code), then constant with drops near the end, S
    100 + 5 + 5 epochs, L 200 + 10. The paper halves L's last ten once more by a larger batch.
    """
    if not recipe.drops:
        return min(1.0, (step + 1) / 20) * (1 - step / iters)
    reached = [factor for share, factor in recipe.drops if step >= share * iters]
    return min(1.0, (step + 1) / max(1, iters // 100)) * min(reached, default=1.0)


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
    images: torch.Tensor           # (n, 3, S, S) or larger, uint8
    labels: torch.Tensor           # (n,)
    held_out: torch.Tensor         # (m, 3, S, S), uint8; m may be 0
    held_out_labels: torch.Tensor  # (m,)
    classes: list

    @property
    def views(self):
        """How many crops there are of an image: 1 or 10."""
        return 10 if self.images.shape[-1] > self.held_out.shape[-1] else 1

    def crop(self, some, view=4):
        """Crops (k, 3, S, S) of images[some]: views 0 to 3 are the corners, 4 is the centre, 5 to 9
        are the same five mirrored."""
        images, S = self.images[some], self.held_out.shape[-1]
        rest = images.shape[-1] - S
        y, x = ((0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2))[view % 5]
        images = images[..., y:y + S, x:x + S]
        return images.flip(-1) if view >= 5 else images


SHAPES = ["circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent"]
COLOURS = torch.tensor([[235, 45, 45], [250, 225, 60], [60, 200, 70],        # red, yellow, green,
                        [60, 215, 235], [70, 95, 245], [230, 75, 215]])      # cyan, blue, magenta
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


def folder_data(folder, image_size):
    """The pictures of a folder with one folder per class; 5 % of each class, 2000 at most in all,
    are held out. Raises ValueError for a folder that will not do. Hidden files are passed over.

    A picture is kept at 281/256 of the image size, as the paper's ten crops of 256 pixels have it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--data {folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder)
                     if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"--data {folder}: no class folders; put pictures into {folder}/<class>/")
    files = [(os.path.join(folder, name, file), label) for label, name in enumerate(classes)
             for file in sorted(os.listdir(os.path.join(folder, name))) if not file.startswith(".")]
    images, labels, bad, side = [], [], [], max(image_size + 1, round(image_size * 281 / 256))
    for path, label in tqdm(files, desc="reading images", unit="img"):
        try:
            images.append(read_image(path, side))
            labels.append(label)
        except Exception as error:  # a damaged file can raise nearly anything
            tqdm.write(f"skipped {path}: {' '.join(str(error).split())}", sys.stderr)
            bad.append(path)
    if bare := sorted(set(range(len(classes))) - set(labels)):
        raise ValueError(f"--data {folder}: no picture in its class folder {classes[bare[0]]}")
    if len(bad) > 0.01 * len(files):
        raise ValueError(f"--data {folder}: {len(bad)} of {len(files)} files cannot be read, more "
                         f"than 1 %; the first is {bad[0]}")
    images, labels = torch.stack(images), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    out, share = torch.zeros(len(labels), dtype=torch.bool), min(0.05, 2000 / len(labels))
    for label in range(len(classes)):
        members = (labels == label).nonzero().flatten()
        out[members[:int(share * len(members))]] = True
    edge = (side - image_size) // 2
    held_out = images[out][..., edge:edge + image_size, edge:edge + image_size]
    return Data(images[~out], labels[~out], held_out, labels[out], classes)


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
    nearest = tokenizer.codebook().detach()[codes].permute(0, 3, 1, 2)      # (B, C, n, n)
    update_codebook(tokenizer, as_rows(latents.detach()), codes.flatten(), generator)
    straight_through = latents + (nearest - latents).detach()
    commitment = (latents - nearest).square().sum(1).mean()
    return F.mse_loss(tokenizer.decode(straight_through), images) + 0.05 * commitment


def train_tokenizer(run, data, recipe, sizes, device):
    """Train the tokenizer of a run, from its last checkpoint on.

    Each step takes a batch at full size, and again at one random scale, since every scale is
    encoded by itself. The first 15 % train a plain autoencoder, where the codebook then starts.
    """
    iters, seed = recipe.tokenizer_iters, run.state["options"]["seed"]
    torch.manual_seed(seed)
    tokenizer = Tokenizer(TokenizerConfig(**run.state["tokenizer_config"])).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0)
    first, plain = run.resume("tokenizer", tokenizer, [optimizer]), int(0.15 * iters)
    for step in (bar := run.bar("tokenizer", first, iters)):
        generator = seeded(seed, 1, step)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 2 * (1 - step / iters))
        if step == plain:
            some = torch.randperm(len(data.images), generator=generator)[:256]
            images = as_input(data.crop(some), device)
            with torch.no_grad():
                latents = [as_rows(tokenizer.encode(tokenizer.resize(images, n))) for n in sizes]
            start_codebook(tokenizer, torch.cat(latents), generator)
        some = torch.randint(len(data.images), (recipe.tokenizer_batch,), generator=generator)
        view = torch.randint(data.views, (), generator=generator).item()
        images = as_input(data.crop(some, view), device)
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


def held_out_codes(tokenizer, data, sizes, device, most=None):
    """Codes (m, L) and labels (m,) of held-out images, at most so many of them."""
    codes = [torch.zeros(0, sum(n * n for n in sizes), dtype=torch.long)]
    for batch in data.held_out[:most].split(128) if len(data.held_out) else ():
        codes.append(tokenizer.encode_pyramid(as_input(batch, device), sizes).cpu())
    return torch.cat(codes), data.held_out_labels[:most]


def code_images(run, tokenizer, data, sizes, device):
    """codes.npy of a run: the codes (n, views, L) of all crops of its images, uint16."""
    path = run.path("codes.npy")
    if not os.path.exists(path):
        codes = np.zeros((len(data.images), data.views, sum(n * n for n in sizes)), np.uint16)
        for start in tqdm(range(0, len(codes), 128), desc="coding images", unit="batch"):
            some = slice(start, start + 128)
            for view in range(data.views):
                batch = as_input(data.crop(some, view), device)
                codes[some, view] = tokenizer.encode_pyramid(batch, sizes).cpu()
        ckgen.write_whole(path, lambda file: np.save(file, codes))
    return np.load(path, mmap_mode="r")


# ------------------------------------------------------------------------------------------------
# 4. A run: its folder, its checkpoint, its log.


class Run:
    """A folder and the state that its checkpoint holds; see `new_state`."""
    FILES = ("checkpoint.pt", "codes.npy", "log.csv", "samples.png", "progress.gif", "pyramid.png")

    def __init__(self, folder, state):
        self.folder, self.state = folder, state
        self.started = self.saved = time.monotonic()

    def path(self, name):
        """The path of one of FILES."""
        return os.path.join(self.folder, name)

    def write(self):
        """Write checkpoint.pt and log.csv."""
        ckgen.write_whole(self.path("checkpoint.pt"), lambda file: torch.save(self.state, file))
        text = io.StringIO(newline="")
        rows = self.state["log"]
        table = csv.DictWriter(text, list(rows[0]) if rows else ["step"])
        table.writeheader(), table.writerows(rows)
        ckgen.write_whole(self.path("log.csv"), lambda file: file.write(text.getvalue().encode()))
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
            module.load_state_dict(self.state[stage])
        for optimizer, saved in zip(optimizers, self.state["optimizers"].get(stage, [])):
            optimizer.load_state_dict(saved)
        return self.state["done"].get(stage, 0)

    def progress(self):
        """How far the last checkpoint is, in words."""
        return " and ".join(f"{count} steps of the {stage}"
                            for stage, count in self.state["done"].items()) or "nothing yet"

    def bar(self, stage, first, iters):
        """A progress bar over the steps still to do."""
        return tqdm(range(first, iters), desc=stage, unit="step", initial=first, total=iters)

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
        optimizers.append(torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0))
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


def training_loss(model, codebook, codes, labels, layouts, share, generator):
    """Loss of one batch with codes (B, L), and of each scale (Sec. 3.1). P is drawn, one for all
    scales and the whole batch; a tenth of the labels is dropped, for classifier-free guidance."""
    device, classes = codebook.device, model.config.classes
    layout = layouts[torch.randint(len(layouts), (), generator=generator)]
    dropped = torch.rand(len(labels), generator=generator) < 0.1
    labels = torch.where(dropped, classes, labels).to(device)
    noisy = None
    if share:
        noisy = codebook[replace_codes(codes, share, len(codebook), generator).to(device)]
    codes = codes.to(device)
    with autocast(device):
        logits = model(codebook[codes], labels, layout, noisy)
        return ckgen.loss_by_scale(logits, codes, layout)


def draw_batch(codes, labels, batch_size, generator):
    """Random codes (B, L), each of a random view of its image, and their labels (B,)."""
    some = torch.randint(len(codes), (batch_size,), generator=generator)
    view = torch.randint(codes.shape[1], (batch_size,), generator=generator)
    return torch.from_numpy(codes[some.numpy(), view.numpy()].astype(np.int64)), labels[some]


def log_row(step, window, sizes, held_out, lr, speed):
    """A row of log.csv; window holds a count of steps, then their summed losses: all, by scale."""
    count, *sums = window.tolist()
    names = ["loss"] + [f"loss_{n}x{n}" for n in sizes]
    losses = {name: round(total / count, 4) for name, total in zip(names, sums)}
    return {"step": step, **losses, "held_out": held_out and round(held_out, 4), "lr": f"{lr:.3g}",
            "tokens_per_s": round(speed)}


def train_model(run, data, codes, tokenizer, recipe, device):
    """Train the transformer of a run on codes (n, views, L), from its last checkpoint on."""
    iters, seed, rows = recipe.iters, run.state["options"]["seed"], run.state["log"]
    torch.manual_seed(seed)
    model = Checkerboard(Config(**run.state["transformer_config"])).to(device)
    codebook, layouts = tokenizer.codebook().detach(), training_layouts(model.config.sizes, device)
    optimizers = make_optimizers(model, recipe)
    first = run.resume("transformer", model, optimizers)
    fixed = Layout.make(model.config.sizes, run.state["defaults"]["steps"], device)
    unseen, unseen_labels = held_out_codes(tokenizer, data, model.config.sizes, device, most=256)
    window = run.state["window"].to(device)   # losses since the last row of the log: count and sums
    clock, clock_step = time.perf_counter(), first
    for step in (bar := run.bar("transformer", first, iters)):
        generator = seeded(seed, 2, step)
        factor = learning_rate(recipe, step, iters)
        for optimizer, rate in zip(optimizers, (recipe.lr, recipe.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        batch, labels = draw_batch(codes, data.labels, recipe.batch_size, generator)
        loss, by_scale = training_loss(model, codebook, batch, labels, layouts,
                                       recipe.replace_codes, generator)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        window += torch.cat([torch.ones_like(loss)[None], loss.detach()[None], by_scale.detach()])
        due = run.watch("transformer", step, iters, loss, bar)
        if (step + 1) % max(1, iters // 100) == 0 or step + 1 == iters:
            window = window.cpu()  # waits for the GPU, so that the clock tells the truth
            speed = (step + 1 - clock_step) * batch.numel() / (time.perf_counter() - clock)
            held_out = ""
            if (step + 1) % max(1, iters // 10) == 0 and len(unseen):
                held_out = held_out_loss(model, codebook, unseen, unseen_labels, fixed)[0]
            rows.append(log_row(step + 1, window, model.config.sizes, held_out,
                                recipe.lr * factor, speed))
            window = torch.zeros_like(window).to(device)
            clock, clock_step = time.perf_counter(), step + 1
        if due:
            run.state["window"] = window.cpu()
            run.save("transformer", step + 1, iters, model, optimizers)
            if step + 1 < iters:  # so that one can watch; the last ones are drawn by `train`
                draw_samples(run, model, tokenizer)
            clock, clock_step = time.perf_counter(), step + 1
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
    """samples.png: a row of eight for each class."""
    shown, device = spread_classes(len(run.state["classes"])), tokenizer.codebook_weight.device
    labels = torch.tensor(shown, device=device).repeat_interleave(8)
    codes, layout = sample_codes(run, model, tokenizer, labels)
    pictures = ckgen.decode_scale(tokenizer, codes, layout.sizes)
    names = [run.state["classes"][c] for c in shown]
    grid = ckgen.picture_grid(np.split(pictures, len(shown)), names)
    ckgen.write_whole(run.path("samples.png"), lambda file: grid.save(file, "PNG"))


def draw_steps(run, model, tokenizer):
    """progress.gif (Fig. 1): one image of each class after every step. pyramid.png: the same images
    once finished, every scale as a picture by itself (Sec. 3.3)."""
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
        logits = classifier(as_input(data.crop(some, view), device))
        loss = F.cross_entropy(logits, data.labels[some].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def frechet_distance(a, b):
    """Frechet distance [8] between two sets of features, (n, d) and (m, d)."""
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
    sizes, codebook = model.config.sizes, tokenizer.codebook().detach()
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
    reference = image_features(classifier, data.crop(some))
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
    model, tokenizer, classes, defaults = ckgen.load(args.evaluate, device)
    run = Run(os.path.dirname(args.evaluate), ckgen.read_checkpoint(args.evaluate))
    source, steps = args.data or run.state["options"]["data"], args.steps or defaults["steps"]
    data = load_data(source, run.state["options"]["image_size"])
    if data.classes != classes:
        raise ValueError(f"--data {source}: its class folders are not the checkpoint's classes")
    if not len(data.held_out):
        raise ValueError(f"--data {source}: none held out: that takes 20 pictures in a class")
    print_losses(model, tokenizer, data, steps, device)
    print_quality(run, model, tokenizer, data, steps, device)


# ------------------------------------------------------------------------------------------------
# 8. Command line.


def load_data(source, image_size):
    """The toy set, or the pictures of a folder."""
    return toy_data(image_size) if source == "toy" else folder_data(source, image_size)


def read_recipe(args, device):
    """The recipe of a run, and its options: what a run that goes on must not change. Raises
    ValueError when the image size will not do."""
    config = args.config or ("S" if device.type == "cuda" else "tiny")
    recipe, stride = RECIPES[config], TokenizerConfig.stride
    given = {key: getattr(args, key) for key in ("image_size", "iters", "batch_size", "lr")
             if getattr(args, key) is not None}
    if args.lr:
        given["muon_lr"] = recipe.muon_lr * args.lr / recipe.lr
    if args.iters:
        given["tokenizer_iters"] = max(1, recipe.tokenizer_iters * args.iters // recipe.iters)
    recipe = replace(recipe, **given)
    if recipe.image_size % stride:
        raise ValueError(f"--image-size {recipe.image_size}: must be a multiple of {stride}, the "
                         f"tokenizer's stride")
    options = {"config": config, "scale": args.scale, "seed": args.seed,
               "data": os.path.abspath(args.data) if args.data else "toy"}
    return recipe, options | {key: getattr(recipe, key)
                              for key in ("image_size", "iters", "batch_size", "lr")}


def new_state(recipe, options, data, steps):
    """What the checkpoint of a run holds before its first step."""
    tokenizer = TokenizerConfig(codes=recipe.tokenizer_codes)
    sizes = ckgen.scale_sizes(recipe.image_size // tokenizer.stride, options["scale"])
    model = Config(sizes, len(data.classes), tokenizer.codes, tokenizer.code_dim, recipe.width,
                   recipe.layers, recipe.heads, recipe.ffn)
    return {"format": ckgen.FORMAT, "options": options,
            "classes": data.classes, "images": len(data.images),
            "tokenizer_config": asdict(tokenizer), "transformer_config": asdict(model),
            "defaults": {"steps": steps, "cfg": recipe.cfg, "temperature": recipe.temperature},
            "done": {}, "optimizers": {}, "log": [], "window": torch.zeros(2 + len(sizes))}


def find_state(folder, options, overwrite):
    """The state of the run in a folder, None to start afresh. Raises ValueError when the folder
    holds something else, or a run with other options."""
    path = os.path.join(folder, "checkpoint.pt")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--out {folder}: not a folder")
    if overwrite:
        return None
    if not os.path.exists(path):
        if os.path.isdir(folder) and any(not name.endswith(".tmp") for name in os.listdir(folder)):
            raise ValueError(f"--out {folder}: not empty, and holds no run of this program")
        return None
    state = ckgen.read_checkpoint(path)
    for name, value in options.items():
        there = state["options"].get(name)
        if there != value:
            raise ValueError(f"{folder} holds a run with --{name.replace('_', '-')} {there}, not "
                             f"{value}; name another folder with --out, or --overwrite it")
    return state


def start_run(folder, state, recipe, options, data, steps):
    """The Run of a folder: a new one where state is None, else the one that was begun. Raises
    ValueError when the pictures are not those it was begun with."""
    if state is None:
        run = Run(folder, new_state(recipe, options, data, steps or 4))
        os.makedirs(folder, exist_ok=True)
        for name in filter(os.path.exists, map(run.path, Run.FILES)):
            os.remove(name)
        run.write()
        return run
    if (data.classes, len(data.images)) != (state["classes"], state["images"]):
        raise ValueError(f"--data {options['data']}: {len(data.images)} pictures to train on of "
                         f"{len(data.classes)} classes; the run in {folder} was begun with "
                         f"{state['images']} of {len(state['classes'])}, or other names")
    state["defaults"]["steps"] = steps or state["defaults"]["steps"]
    run = Run(folder, state)
    print(f"{folder}: going on after {run.progress()}")
    return run


def train(args):
    """Train what the command line asks for, or go on with it. Raises ValueError for bad input."""
    device = ckgen.pick_device(args.device)
    recipe, options = read_recipe(args, device)
    name = f"{options['config']}-{args.scale}x-{os.path.basename(options['data'])}"
    folder = args.out or os.path.join("runs", name)
    state = find_state(folder, options, args.overwrite)
    if (state and state["done"].get("transformer") == recipe.iters
            and all(os.path.exists(os.path.join(folder, name)) for name in Run.FILES)):
        print(f"{folder} is finished already:")
        return tell(folder)
    data = load_data(options["data"], recipe.image_size)
    run = start_run(folder, state, recipe, options, data, args.steps)
    sizes = tuple(run.state["transformer_config"]["sizes"])
    maps = " ".join(f"{n}x{n}" for n in sizes)
    print(f"{folder}: {len(data.images)} images of {len(data.classes)} classes and "
          f"{len(data.held_out)} held out; maps {maps}; {options['config']} on {device}")

    tokenizer = train_tokenizer(run, data, recipe, sizes, device)
    codes = code_images(run, tokenizer, data, sizes, device)
    model = train_model(run, data, codes, tokenizer, recipe, device)
    draw_samples(run, model, tokenizer)
    draw_steps(run, model, tokenizer)
    tell(folder)


def tell(folder):
    """Say what lies in the folder of a finished run."""
    path = os.path.join(folder, "")
    print(f"{path}samples.png     a row of samples for each class\n"
          f"{path}progress.gif    one image of each class after every step (Fig. 1)\n"
          f"{path}pyramid.png     the same images, each scale a picture by itself\n"
          f"{path}log.csv         losses, learning rate, speed\n"
          f"{path}checkpoint.pt   all that sampling needs; next:\n"
          f"    python ckgen.py {path}checkpoint.pt --n 16 --steps 8 --out more.png\n"
          f"    python train_tiny.py --evaluate {path}checkpoint.pt")


def parse_arguments(arguments):
    """The parser and what it reads off the command line."""
    parser = argparse.ArgumentParser(
        description="Train checkerboard image generation from nothing: a tokenizer, then a "
                    "transformer, on toy shapes or on your pictures. The same command continues a "
                    "run that was stopped.",
        epilog="example: python train_tiny.py --scale 2 --steps 4")
    add = parser.add_argument
    add("--scale", choices=ckgen.SCALE_RATIOS, default="2",
        help="ratio between the scales of the pyramid; 1: a single scale (default: 2)")
    add("--steps", type=at_least(int, 1), metavar="P", help="steps per scale for the pictures and "
        "the held-out loss (default: 4); training draws P at random")
    add("--config", choices=RECIPES, help="size of the model (default: S on CUDA, else tiny)")
    add("--data", metavar="DIR", help="your pictures, a folder per class (default: toy shapes)")
    add("--image-size", type=at_least(int, 4), metavar="PIXELS",
        help="side of the images (default: 32 for tiny, 64 for S and L)")
    add("--out", metavar="DIR", help="the run's folder (default: runs/<config>-<scale>x-<data>)")
    add("--iters", type=at_least(int, 1), help="steps of the transformer's training; the "
        "tokenizer's follow in proportion (default: " + as_list("iters") + ")")
    add("--batch-size", type=at_least(int, 1), help="images in a step of the transformer's "
        "training (default: " + as_list("batch_size") + ")")
    add("--lr", type=at_least(float, 1e-9), help="AdamW's learning rate; tiny's Muon follows in "
        "proportion (default: " + as_list("lr") + ")")
    add("--seed", type=at_least(int, 0), default=0, help="same seed, same machine: same weights")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--overwrite", action="store_true", help="start afresh in a used folder")
    add("--evaluate", metavar="CHECKPOINT", help="print how good a checkpoint is; trains nothing")
    return parser, parser.parse_args(arguments)


def as_list(field):
    """A field of all recipes, for the help."""
    return ", ".join(f"{name} {getattr(recipe, field):g}" for name, recipe in RECIPES.items())


def main(arguments=None):
    """The command line of this file."""
    parser, args = parse_arguments(arguments)
    try:
        evaluate(args) if args.evaluate else train(args)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}")
    except OSError as error:
        sys.exit(f"stopped: {error}; with that mended, the same command goes on from the last "
                 f"checkpoint")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
