"""Train ckgen from scratch: on toy shapes that it draws itself, or on a folder of your pictures.

    python train_tiny.py --scale 2 --steps 4         toy shapes, minutes on a CPU
    python train_tiny.py --data DIR                  your pictures, one folder per class
    torchrun --nproc-per-node=8 train_tiny.py ...    several GPUs

There are three stages. Each writes a file into the run's folder, whole or not at all:

    tokenizer.pt     the VQ tokenizer, given or trained (again from the start, if stopped)
    codes-*.u16      the codes of the training images; * is a checksum of tokenizer.pt
    checkpoint.pt    the transformer, at most once a minute; ckgen.py draws images from it

The same command goes on with a run that was stopped. All random draws of step t come from a
generator seeded with (seed, stage, t), so the weights are those of a run that was not stopped, bit
for bit on a CPU. A run keeps the recipe that it began with: after a change of this file, start a
new run, with another --out. study/evaluate.py says how good a run is.
"""
# SPDX-License-Identifier: MIT

import argparse
import atexit
import contextlib
import functools
import math
import os
import re
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ckgen
from ckgen import (Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, training_draws,
                   training_loss)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Image.MAX_IMAGE_PIXELS = 500_000_000  # pillow refuses what has twice as many, a gigapixel
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
STOPPED = "stopped; the same command goes on from the last file that was written"

# 1. Recipes --------------------------------------------------------------------------------------
#
# tiny is ours. With a VQGAN, S and L have the paper's width, layers, heads, batch, learning rate,
# epochs and drops (Sec. 4.1; warm-up and S's first drop as released). Without one they train for
# `iters` steps, in which warm-up and drops keep their share. Ours for all, beside what the README's
# last table names: pillow crops the images, one in twenty is held out, batches are drawn with
# replacement, and the first learning rate is not 0.

VALUES = {  #          tiny, S, L
    "width":           (128, 512, 1024),     # D
    "layers":          (4, 12, 20),
    "heads":           (4, 16, 16),          # H
    "image_size":      (32, 64, 64),         # pixels; 256 with a VQGAN
    "codes":           (256, 1024, 1024),    # V of a tokenizer that is trained here
    "iters":           (900, 6000, 12000),
    "tokenizer_iters": (5 / 3, 1, 0.5),      # tokenizer's steps for each of these
    "tokenizer_batch": (16, 32, 32),
    "batch_size":      (16, 128, 64),
    "lr":              (2e-3, 3e-4, 15e-5),  # AdamW's, of the transformer (ours: learns faster)
    "vqgan_lr":        (2e-3, 1e-4, 5e-5),   # with a VQGAN: for S and L the paper's
    "muon":            (5.0, 0.0, 0.0),      # Muon's lr / AdamW's (ours: learns faster); 0: none
    "replace_codes":   (0.0, 0.1, 0.1),      # the share that is replaced in z_up; 0.1 as released
    "epochs":          (0, 110, 206),        # L: 200 + 5 + 1: the last five in a fifth of the steps
    "drops":           ((), ((100, 10 ** -0.5), (105, 0.1)), ((200, 0.2),)),  # epoch, lr / first lr
    "last_batches":    ((), (), (205, 5)),   # after this epoch, a step takes so many batches
}
RECIPES = {name: dict(zip(VALUES, values))
           for name, values in zip(("tiny", "S", "L"), zip(*VALUES.values()))}
# What tiny changes for pictures. S and L, untried on them, change nothing.
PICTURES = {"codes": 1024, "iters": 3600, "tokenizer_iters": 1.3, "batch_size": 64}
RATIOS = {"2": 2, "3": 3, "4": 4, "sqrt2": 2 ** 0.5, "1": 1}


def epochs_after(run, step):
    """The epoch reached after a step. The recipe's epochs are stretched over the run's steps."""
    return (step + 1) / run.iters * run.epochs


def lr_factor(run, step):
    """The learning rate's factor. For tiny, it rises for 20 steps and falls linearly to zero. For
    S and L, it rises for an epoch and falls by the drops of Sec. 4.1."""
    if not run.epochs:
        return min(1, (step + 1) / 20) * (1 - step / run.iters)
    epoch = epochs_after(run, step)
    return min(1, epoch, *(factor for start, factor in run.drops if epoch > start))


def images_of_step(run, step):
    """How many images a step takes: a batch, but five batches in L's last epochs (Sec. 4.1)."""
    start, batches = run.last_batches or (math.inf, 1)
    return run.batch_size * (batches if epochs_after(run, step) > start else 1)


def seeded(run, stage, step):
    """The generator of all draws of a step of the tokenizer (stage 1) or the transformer (2)."""
    return torch.Generator().manual_seed(((run.seed * 16 + stage) * 1_000_000_007 + step) % 2 ** 64)


# 2. The transformer's training (Sec. 3.1, 4.1) ----------------------------------------------------

def train_transformer(run, images, tokenizer, codes):
    """Train on codes (images, views, L) until checkpoint.pt holds run.iters steps. Views are crops
    and mirror images, see Images. run: recipe and options, see make_run and train."""
    device, path = run.device, f"{run.out}/checkpoint.pt"
    codebook = tokenizer.codebook()                                         # (V, C)
    model = make_model(run, tokenizer).to(device)
    optimizers = make_optimizers(model, run)
    first, log = 0, []
    if os.path.exists(path):
        state = resume(path, model, optimizers, tokenizer)
        first, log = state["step"], state["log"]
    parallel = DistributedDataParallel(model) if WORLD > 1 else model
    layout_of = functools.cache(lambda P: Layout(run.sizes, P, device))
    at_once = images_that_fit(run, model)
    autocast = torch.autocast("cuda", run.dtype, enabled=run.dtype == torch.bfloat16)
    every = max(1, min(100, run.iters // 100))  # steps for each row of the log
    held_out = held_out_arguments(run, images, tokenizer, every)
    total = 0  # of the losses since the last row of the log
    next_save = time.monotonic() + 60
    bar = tqdm(range(first, run.iters), "transformer", initial=first, total=run.iters, unit="step",
               disable=RANK > 0)
    for step in bar:
        # Draw a batch, and what varies with it: see training_draws.
        generator = seeded(run, 2, step)
        x, y = draw_batch(images, codes, images_of_step(run, step), generator)
        y, noisy, P = training_draws(x, y, model.config, run.replace_codes, generator)
        layout = layout_of(P)

        # Of several processes, each takes its share: (B, L), (B,), (B, L).
        x, y, noisy = (tensor[RANK::WORLD].to(device) for tensor in (x, y, noisy))

        # Forward and backward, in parts if the memory holds no more at once.
        model.zero_grad()
        for part in torch.arange(len(x), device=device).split(at_once):
            with autocast:
                losses = training_loss(parallel, codebook, x[part], y[part], layout, noisy[part])
            losses = losses * (len(part) / len(x))
            losses[0].backward()  # the mean over all tokens; the others are those of each map
            total = total + losses.detach()

        # Update.
        lr = run.lr * lr_factor(run, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["times"]
            optimizer.step()

        # Log. Held-out images keep class and codes, and P is fixed, so their loss is often lower.
        if (step + 1) % every and step + 1 < run.iters:
            continue
        means = (total / (step % every + 1)).tolist()
        total = 0
        with autocast:
            of_held_out = held_out_loss(model, *held_out)[0].item() if held_out else math.nan
        log.append([step + 1, lr, of_held_out, *means])
        bar.set_postfix(loss=f"{means[0]:.4f}", held_out=f"{of_held_out:.4f}")
        if not math.isfinite(means[0]):
            raise ValueError(f"the loss is {means[0]} at step {step + 1}: try a smaller --lr")

        # Save, at a row of the log. Files and pictures take a twentieth of the time at most.
        start = time.monotonic()
        if start > next_save and step + 1 < run.iters:
            save(path, run, model, optimizers, tokenizer, step + 1, log)
            end = time.monotonic()
            next_save = end + max(60, 20 * (end - start))
    if first < run.iters or run.redraw:
        save(path, run, model, optimizers, tokenizer, run.iters, log)


def make_model(run, tokenizer):
    """A model for the codes of this tokenizer: that of --init, or one with random weights."""
    torch.manual_seed(run.seed)
    model = Checkerboard(Config(run.sizes, len(run.classes), *tokenizer.codebook().shape, run.width,
                                run.layers, run.heads))
    if run.init and not os.path.exists(f"{run.out}/checkpoint.pt"):
        start_from(model, tokenizer, run.init)
    return model


def held_out_arguments(run, images, tokenizer, every):
    """What held_out_loss takes beside the model, or None if no image is held out. 32 images, or as
    many as cost a twentieth of the time: a forward pass is a third of a step."""
    if images.train == len(images.labels):
        return None
    pictures, labels = images.held_out(max(32, every * run.batch_size * 3 // 20 // WORLD))
    layout = Layout(run.sizes, run.defaults["steps"], run.device)
    return tokenizer.codebook(), encode(tokenizer, pictures, run.sizes), labels, layout


def save(path, run, model, optimizers, tokenizer, step, log):
    """Write pictures, log.csv and checkpoint.pt. Of several processes, the first does."""
    if RANK > 0:
        return
    draw_pictures(run, model, tokenizer)
    columns = ",".join(["step,lr,held_out,loss", *(f"loss_{n}x{n}" for n in run.sizes)])
    with ckgen.write_whole(f"{run.out}/log.csv") as file:
        np.savetxt(file, log, "%.7g", ",", header=columns, comments="")
    save_checkpoint(path, run, model, optimizers, tokenizer, step, log)


def save_checkpoint(path, run, model, optimizers, tokenizer, step, log):
    """Write all that drawing images and going on need."""
    state = {"model": model.state_dict(), "config": asdict(model.config), "step": step, "log": log,
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "classes": run.classes, "defaults": run.defaults, "options": run.options,
             "tokenizer": tokenizer.state_dict(), "tokenizer_config": asdict(tokenizer.config)}
    with ckgen.write_whole(path) as file:
        torch.save(state, file)


def resume(path, model, optimizers, tokenizer):
    """Load model and optimizers from a checkpoint. Returns all that it holds. Raises ValueError if
    it was trained with another tokenizer."""
    state = ckgen.read(path)
    with ckgen.file_errors(path):
        if not torch.equal(state["tokenizer"]["codebook_weight"], tokenizer.codebook_weight.cpu()):
            raise ValueError("tokenizer.pt has another codebook")
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
    return state


def draw_batch(images, codes, B, generator):
    """Codes (B, L) of images, drawn with replacement, each in a random view; and their labels (B,).
    The argument `codes` holds all images and views."""
    numbers = torch.randint(len(codes), (B,), generator=generator)
    views = torch.randint(codes.shape[1], (B,), generator=generator)
    x = codes[numbers.numpy(), views.numpy()].astype(np.int64)
    return torch.from_numpy(x), images.labels[numbers]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): each matrix moves by about the orthogonal matrix nearest to its momentum.
    Five Newton-Schulz iterations find it, with his coefficients. They are in float32: those of
    torch.optim.Muon are in bfloat16, which takes 25 times as long on a CPU without AVX-512."""

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        """Move all matrices, given their gradients."""
        group = self.param_groups[0]
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)  # Nesterov's
            rows, columns = p.shape
            x = update.T if rows > columns else update
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
                x = torch.addmm(x, b, x, beta=3.4445)
            x = x.T if rows > columns else x
            p.sub_(x, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model, run):
    """AdamW (Sec. 4.1); betas, and no decay of vectors, as released. For tiny, Muon moves the
    matrices of attention, feed-forward and Eq. 1 (ours), but not tables, head and AdaLN."""
    hidden = re.compile(r"layers\.\d+\.(attention|feed_forward)|combine_inputs|src_latents|mlp")
    decayed = {"params": [], "times": 1, "weight_decay": 0.01}  # times: see the loop
    vectors = decayed | {"params": [], "weight_decay": 0.0}
    muon = {"params": [], "times": run.muon}
    for name, p in model.named_parameters():
        if run.muon and p.ndim == 2 and hidden.search(name):
            muon["params"].append(p)
        else:
            (decayed if p.ndim > 1 else vectors)["params"].append(p)
    optimizers = [torch.optim.AdamW([decayed, vectors], betas=(0.9, 0.95), fused=True)]
    if run.muon:
        optimizers.append(Muon([muon]))
    return optimizers


def start_from(model, tokenizer, path):
    """Start from a trained model, also of another scale ratio (footnote 2) or of other classes.
    Tables of another shape keep their own start (as released): those of positions, of RoPE, of
    classes. Raises ValueError if the rest differs."""
    source, its_tokenizer, *_ = ckgen.load(path)
    if not torch.equal(its_tokenizer.codebook_weight, tokenizer.codebook_weight.cpu()):
        raise ValueError(f"--init {path}: its tokenizer has another codebook")
    own = model.state_dict()
    source = source.state_dict()
    for name in ("class_embeddings.weight", "embed_positions.weight", "rope"):
        if own[name].shape != source[name].shape:
            source[name] = own[name]
    with ckgen.file_errors(path):
        model.load_state_dict(source)


def images_that_fit(run, model):
    """How many images a forward and backward takes at once: a batch, or as many as a CUDA card
    holds (all cards alike). Bytes of a token are counted; a weight's are 16, with its moments."""
    batch, config = run.batch_size // WORLD, model.config
    if run.device.type != "cuda":
        return batch
    token = run.dtype.itemsize * (36 * config.layers * config.width + 9 * config.codes)
    weights = 16 * sum(p.numel() for p in model.parameters())
    room = 0.8 * torch.cuda.mem_get_info(run.device)[1] - weights
    return max(1, min(batch, int(room / token / (1 + config.length))))


@torch.no_grad()
def held_out_loss(model, codebook, codes, labels, layout):
    """Mean cross-entropy over images of codes (n, L), as loss_by_scale returns it."""
    parts = zip(codes.split(64), labels.to(codes.device).split(64))
    total = sum(len(x) * training_loss(model, codebook, x, y, layout, x) for x, y in parts)
    return (total / len(codes)).cpu()


def draw_pictures(run, model, tokenizer):
    """samples.png: a row of eight for each class, or for 16 at most. progress.gif (Fig. 1): the
    first eight drawn, after every step. pyramid.png: each map of these by itself (Sec. 3.3)."""
    every = math.ceil(len(run.classes) / 16)
    labels = torch.arange(0, len(run.classes), every, device=run.device).repeat(8)
    options = dict(run.defaults)
    layout = Layout(run.sizes, options.pop("steps"), run.device)
    codes = ckgen.generate(model, tokenizer, labels, layout, run.seed, **options)
    pictures = ckgen.decode_scale(tokenizer, codes, layout)
    samples = ckgen.contact_sheet(pictures, run.classes[::every])
    first = codes[:8]
    frames = [ckgen.picture_grid([frame]) for frame in
              ckgen.progress_frames(tokenizer, tokenizer.codebook()[first], layout)]
    scales = [ckgen.decode_scale(tokenizer, first, layout, k) for k in range(len(run.sizes))]
    pyramid = ckgen.picture_grid(scales, [f"{n}x{n}" for n in run.sizes])
    for name, picture in (("samples.png", samples), ("pyramid.png", pyramid)):
        with ckgen.write_whole(f"{run.out}/{name}") as file:
            picture.save(file, "PNG")
    with ckgen.write_whole(f"{run.out}/progress.gif") as file:
        ckgen.save_gif(frames, file)


# 3. The tokenizer (Sec. 4.1), and the codes of all images -----------------------------------------

def start_tokenizer(run):
    """The tokenizer to begin with: the run's own, a given one, or one of random weights."""
    path = f"{run.out}/tokenizer.pt"
    given = path if os.path.exists(path) else run.tokenizer or run.init
    torch.manual_seed(run.seed)
    if given:
        return ckgen.load_tokenizer(given, run.device)
    return Tokenizer(TokenizerConfig(run.codes)).to(run.device)


def make_tokenizer(run, images, tokenizer):
    """tokenizer.pt: trained on the images; or given; or given, with a new codebook (Sec. 4.1)."""
    path = f"{run.out}/tokenizer.pt"
    if RANK == 0 and not os.path.exists(path):
        if run.codes:  # None: the codebook of a given tokenizer stays, see fill_options
            tokenizer.config = replace(tokenizer.config, codes=run.codes)
            train_codebook = refit_codebook if run.tokenizer else train_tokenizer
            train_codebook(run, images, tokenizer)
        state = {"tokenizer": tokenizer.state_dict(), "options": run.options,
                 "tokenizer_config": asdict(tokenizer.config)}
        with ckgen.write_whole(path) as file:
            torch.save(state, file)
    if WORLD > 1:
        torch.distributed.barrier()  # wait for the first process
    return ckgen.load_tokenizer(path, run.device)


def train_tokenizer(run, images, tokenizer):
    """Ours; the paper takes LlamaGen's. The loss is the squared error, at full size and at the size
    of a random map, as each map is encoded by itself. The first steps train a plain autoencoder,
    so that the codebook starts at good latents."""
    iters = max(1, round(run.tokenizer_iters * run.iters))
    plain = iters * 15 // 100  # so many steps have no codebook
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=0)
    bar = tqdm(range(iters), "tokenizer", unit="step")
    for step in bar:
        g = seeded(run, 1, step)
        pictures = images.batch(run.tokenizer_batch, g)[0].to(run.device)   # (B, 3, h, h)
        n = run.sizes[torch.randint(len(run.sizes), (), generator=g)]
        smaller = tokenizer.resize(pictures, n)
        if step == plain:
            start_codebook(tokenizer, tokenizer.encode(pictures), g)
        # In the codebook all cells count alike: `cells` is that of the finest map. If all maps did,
        # the finest would lose 0.14 dB, and the 1x1 map gain 0.11 dB (CIFAR-10).
        cells = len(pictures) * run.sizes[-1] ** 2
        loss = 0
        for weight, target in ((1.0, pictures), (0.25, smaller)):
            latents = tokenizer.encode(target)                              # (B, C, n, n)
            commitment = 0
            if step >= plain:
                nearest = update_codebook(tokenizer, latents, g, cells)
                commitment = (latents - nearest).square().sum(1).mean()
                latents = latents + (nearest - latents).detach()  # a straight-through gradient
            error = F.mse_loss(tokenizer.decode(latents), target)
            loss = loss + weight * (error + 0.05 * commitment)
        # The rate rises for 30 steps, stays, and falls to zero in the second half.
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 2 - 2 * step / iters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def refit_codebook(run, images, tokenizer):
    """A new codebook for a given tokenizer, which stays as it is (Sec. 4.1). It follows the latents
    of pictures of any size by moving averages (ours; the paper minimises an L2 loss). As released,
    all maps count alike."""
    for step in tqdm(range(max(1, images.train // 32)), "codebook", unit="step"):  # an epoch
        g = seeded(run, 1, step)
        pictures = images.batch(32, g)[0].to(run.device)                    # (B, 3, h, h)
        if step == 0:
            start_codebook(tokenizer, tokenizer.encode(pictures), g)
        n = 1 + torch.randint(run.sizes[-1], (), generator=g).item()
        latents = tokenizer.encode(tokenizer.resize(pictures, n))           # (B, C, n, n)
        update_codebook(tokenizer, latents, g, len(pictures) * n * n)


def start_codebook(tokenizer, latents, generator):
    """Start the codebook at some of these latents (B, C, n, n), each with 1/V: its share of use."""
    V = tokenizer.config.codes
    rows = latents.detach().movedim(1, -1).flatten(0, 2)                    # (B*n*n, C)
    pick = torch.randint(len(rows), (V,), generator=generator).to(rows.device)
    tokenizer.codebook_weight = rows[pick] / V


@torch.no_grad()
def update_codebook(tokenizer, latents, generator, cells, decay=0.99):
    """Move each code vector to the moving average of the latents (B, C, n, n) nearest to it.
    Returns the code vectors nearest to the latents, before the move, (B, C, n, n).
    codebook_weight holds moving sums, divided by `cells`: their lengths are about the shares of the
    codes among all cells. A code of less than 0.05/V starts again at a latent, with 0.5/V."""
    codes = tokenizer.quantize(latents)                                     # (B, n, n)
    sums = tokenizer.codebook_weight                                        # (V, C)
    nearest = tokenizer.codebook()[codes].movedim(-1, 1)
    rows = latents.movedim(1, -1).flatten(0, 2)                             # (B*n*n, C)
    sums.mul_(decay).index_add_(0, codes.flatten(), rows, alpha=(1 - decay) / cells)
    least = 0.05 / len(sums)
    unused = (sums.norm(dim=-1) < least).nonzero().flatten()[:len(rows)]
    pick = torch.randperm(len(rows), generator=generator)[:len(unused)]
    sums[unused] = 10 * least * rows[pick.to(rows.device)]
    return nearest


def code_images(run, images, tokenizer):
    """The codes of all views of all training images, (images, views, L), uint16: a file of plain
    numbers. At ratio 2, ImageNet's take 9 GB of memory in each process."""
    checksum = zlib.crc32(Path(run.out, "tokenizer.pt").read_bytes())
    path = f"{run.out}/codes-{checksum:08x}.u16"
    if RANK == 0 and not os.path.exists(path):
        append_codes(f"{path}.tmp", run, images, tokenizer)
        os.replace(f"{path}.tmp", path)
    if WORLD > 1:
        torch.distributed.barrier()  # wait for the first process
    with ckgen.file_errors(path):
        return np.fromfile(path, np.uint16).reshape(
            images.train, len(images.views), Config(run.sizes, 1).length)


def append_codes(path, run, images, tokenizer):
    """Write the codes of all images to a file, or those that it lacks, as its length tells."""
    bytes_of_one = 2 * len(images.views) * Config(run.sizes, 1).length
    with open(path, "ab") as file:
        first = file.tell() // bytes_of_one
        file.truncate(first * bytes_of_one)
        for start in tqdm(range(first, images.train, 32), "coding images"):
            pictures = images.read(range(start, min(start + 32, images.train)))
            coded = [encode(tokenizer, crop(pictures, images.size, view), run.sizes)
                     for view in images.views]                              # (32, L) each
            file.write(torch.stack(coded, 1).cpu().numpy().astype(np.uint16).tobytes())


def encode(tokenizer, pictures, sizes):
    """Pictures (n, 3, h, h), uint8, to the codes (n, L) of their pyramids."""
    device = tokenizer.codebook_weight.device
    return torch.cat([tokenizer.encode_pyramid(as_input(part).to(device), sizes)
                      for part in pictures.split(64)])


# 4. Images ----------------------------------------------------------------------------------------

class Images:
    """Toy shapes, or the pictures of a folder with one folder per class. Numbers 0 ... train-1 are
    trained on; the rest is held out; all are read when needed. Toy shapes have one view. Pictures
    have two if size < 64, whole and mirrored; else ten crops of a larger side (Sec. 4.1). views:
    these, as numbers for `crop`. Raises ValueError or OSError."""

    def __init__(self, folder, size):
        self.size, self.damaged, self.paths = size, set(), None
        if folder is None:
            self.classes, self.views, self.side, self.train = list(SHAPES), [4], size, 24000
            self.labels = torch.arange(26000) % len(SHAPES)
            self.found, identity = "toy shapes", f"{[*SHAPES]} {COLOURS}"
        else:
            pictures, others = find_pictures(folder)
            names, self.train = hold_out(pictures)
            classes, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
            self.found = (f"{len(names):,} pictures in {len(classes)} class folders, beside "
                          f"{others:,} other files")
            if not names:
                raise ValueError(f"--data {folder}: needs a folder of pictures for each class, "
                                 f"or one for all; found {self.found}")
            self.paths = [os.path.join(folder, name) for name in names]
            self.labels = torch.from_numpy(labels)
            self.classes = class_names(folder, classes.tolist())
            self.views, self.side = [4, 9], size
            if size >= 64:
                self.views, self.side = range(10), round(size * 281 / 256)  # 281: as released
            identity = "\n".join(f"{name} {pictures[name]}" for name in names)
        self.fingerprint = zlib.crc32(os.fsencode(identity))

    def read(self, numbers):
        """Pictures (k, 3, side, side), uint8."""
        if self.paths is None:
            pictures = [np.array(draw_shape(number, self.side)) for number in numbers]
        else:
            with ThreadPoolExecutor() as pool:
                pictures = list(pool.map(self.read_one, numbers))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def read_one(self, number):
        """A file as (side, side, 3); for a damaged one, a training picture of its class."""
        for other in self.alike(number):
            path = self.paths[other]
            try:
                return np.array(read_picture(path, self.side))
            except ValueError as error:
                if path not in self.damaged:
                    tqdm.write(f"{error}; another is taken", sys.stderr)
                self.damaged.add(path)
        raise ValueError(f"--data: {path} is damaged, and so is all that could replace it")

    def alike(self, number):
        """This number, then those of all training pictures of its class."""
        yield number
        yield from (self.labels[:self.train] == self.labels[number]).nonzero().flatten().tolist()

    def batch(self, k, generator):
        """k training images (k, 3, size, size) in [-1, 1], drawn with replacement and in one view,
        and their labels (k,)."""
        numbers = torch.randint(self.train, (k,), generator=generator)
        view = torch.randint(len(self.views), (), generator=generator).item()
        pictures = crop(self.read(numbers.tolist()), self.size, self.views[view])
        return as_input(pictures), self.labels[numbers]

    def held_out(self, n=2000):
        """The first n held-out images (n, 3, size, size), uint8, and their labels (n,)."""
        numbers = range(self.train, len(self.labels))[:n]
        return crop(self.read(numbers), self.size), self.labels[self.train:][:n]


def find_pictures(folder):
    """The pictures below each class folder at any depth, as torchvision's ImageFolder finds them,
    {name: bytes}, and the number of other files. What is hidden is left out."""
    kinds, pictures, others = Image.registered_extensions(), {}, 0

    def fail(error):
        raise error

    for place, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        place = Path(place)
        if place.resolve() in map(Path.resolve, place.parents):  # links may lead in circles
            inner.clear()
            continue
        # The pictures in a run's folder are our own.
        inner[:] = [name for name in inner if not
                    (name.startswith(".") or (place / name / "tokenizer.pt").exists())]
        for file in map(place.joinpath, names):
            relative = file.relative_to(folder)
            readable = kinds.get(file.suffix.lower()) in Image.OPEN and file.name[0] != "."
            if len(relative.parts) > 1 and readable and file.is_file():
                pictures[relative.as_posix()] = file.stat().st_size
            else:
                others += 1
    return pictures, others


def class_names(folder, classes):
    """The names of classes by a words.txt above the folder: n01443537 is goldfish."""
    path = f"{folder}/../words.txt"
    if not os.path.isfile(path):
        return classes
    with open(path, encoding="utf8", errors="replace") as file:
        words = dict(re.findall(r"(.+?)\t(.+)", file.read()))
    names = [words.get(name, name).split(",")[0] for name in classes]
    return [word if names.count(word) == 1 else name for word, name in zip(names, classes)]


def hold_out(names):
    """The names of all files in an order of their own, those to train on first; and how many those
    are. One in twenty is held out, 2000 at most, but never the last of a class. As names decide, a
    file that is removed moves one other at most."""
    checksums = {name: zlib.crc32(os.fsencode(name)) for name in sorted(names)}
    names = sorted(checksums, key=checksums.get)
    last = {*{name.split("/")[0]: name for name in names}.values()}  # of each class
    twentieth = [name for name in names if checksums[name] < 2 ** 32 // 20 and name not in last]
    held_out = dict.fromkeys(twentieth[:2000])  # a set that keeps its order
    train = [name for name in names if name not in held_out]
    return [*train, *held_out], len(train)


def crop(pictures, size, view=4):
    """A view of pictures: 0-3 are the corners, 4 is the centre, 5-9 are the same mirrored."""
    rest = pictures.shape[-1] - size
    y, x = [(0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2)][view % 5]
    pictures = pictures[..., y:y + size, x:x + size]
    return pictures.flip(-1) if view >= 5 else pictures


def as_input(images):
    """uint8 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def open_picture(path, side):
    """A decoded picture, turned as its EXIF says; a large JPEG at a smaller size, but of this side
    at least. Raises ValueError if it is damaged: then pillow raises nearly anything."""
    with ckgen.file_errors(path, Exception), Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))
        # Some EXIF can't be read, and some can't be written again, which exif_transpose does.
        with contextlib.suppress(SyntaxError, ValueError, LookupError, struct.error):
            image.getexif()
        for key in ("exif", "Raw profile type exif"):
            image.info.pop(key, None)
        return ImageOps.exif_transpose(image)


def read_picture(path, side):
    """Whatever pillow opens, as an RGB image of this side: cut to a square, on white where it is
    transparent. Values of 16 or 32 bits are scaled to 8. Raises ValueError or OSError."""
    image = open_picture(path, side)
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        is_16_bit = image.mode.startswith("I") and values.max() < 65536
        values *= 255 / (65535 if is_16_bit else max(values.max(), 1e-9))
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def disc(radius, x=0.0):
    """A circle around (x, 0), as 40 corners x + iy."""
    return x + radius * np.exp(2j * np.pi * np.arange(40) / 40)


def box(x, y):
    """A rectangle of 2x times 2y around the origin."""
    return x * np.array([-1, 1, 1, -1]) + y * np.array([-1j, -1j, 1j, 1j])


# Polygons to fill, then polygons to cut out. Corners are complex numbers, about 1 long; y is down.
SHAPES = {
    "circle": ([disc(0.85)], []),
    "ring": ([disc(0.9)], [disc(0.4)]),
    "square": ([box(0.75, 0.75)], []),
    "triangle": ([np.array([-1j, 0.92 + 0.6j, -0.92 + 0.6j])], []),
    "star": ([-1j * np.exp(1j * np.pi * np.arange(10) / 5) * np.tile([1, 0.42], 5)], []),
    "cross": ([box(0.9, 0.3), box(0.3, 0.9)], []),
    "heart": ([np.array([-0.85, -0.85j, 0.85, 0.85j]) + 0.05j,
               disc(0.6, -0.42) - 0.38j, disc(0.6, 0.42) - 0.38j], []),
    "crescent": ([disc(0.9)], [disc(0.68, 0.42)]),
}
COLOURS = [(70, 50, 230), (220, 30, 20), (240, 80, 160),    # blue, red, pink, green, cyan, yellow:
           (110, 190, 110), (20, 220, 250), (250, 240, 40)]  # each lighter, for the colour-blind
GROUNDS = [(16, 18, 40), (58, 26, 30), (56, 58, 62)]                         # all dark


def draw_shape(number, size):
    """Toy image of this number: the shapes in turn, in a random colour on a random dark ground, a
    little shifted, turned and scaled. It is drawn four times as large, then averaged."""
    rng = np.random.default_rng(number)
    fill, cut = list(SHAPES.values())[number % len(SHAPES)]
    colour, ground = COLOURS[rng.integers(6)], GROUNDS[rng.integers(3)]
    radius = rng.uniform(0.3, 0.4)
    turn = rng.uniform(-0.2, 0.2)
    x, y = 0.5 + rng.uniform(-0.07, 0.07, 2)
    side = 4 * size
    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    for paint, polygons in ((colour, fill), (ground, cut)):
        for polygon in polygons:
            corners = side * (x + 1j * y + radius * np.exp(1j * turn) * polygon)
            pen.polygon(corners.view(float).tolist(), paint)  # x, y, x, y, ...
    return image.reduce(4)


# 5. Command line ----------------------------------------------------------------------------------

OPTIONS = ("config", "scale", "data", "tokenizer", "codes", "init", "image_size", "iters",
           "batch_size", "lr", "seed")  # with the recipe, they fix the weights of a run


def stored_options(folder):
    """The options of the run in a folder, or None."""
    for path in (f"{folder}/checkpoint.pt", f"{folder}/tokenizer.pt"):
        if os.path.exists(path):
            state = ckgen.read(path)
            with ckgen.file_errors(path):
                return dict(state["options"])


def fill_options(args, dtype):
    """The options of a run: those of the run in args.out, else of the command line and the recipe.
    Raises ValueError if the two contradict each other."""
    given = {key: getattr(args, key) for key in OPTIONS if getattr(args, key) is not None}
    options = stored_options(args.out)
    if options:
        for key, value in given.items():
            may_move = key == "data" and options["data"]  # see open_images
            if value != options[key] and not may_move:
                raise ValueError(f"{args.out} holds a run with --{key.replace('_', '-')} "
                                 f"{options[key]}; remove it, or name another --out")
        return options | given
    config = given.get("config", "S" if dtype == torch.bfloat16 else "tiny")
    options = dict.fromkeys(OPTIONS) | RECIPES[config] | {"config": config, "scale": "2", "seed": 0}
    if config == "tiny" and args.data:
        options |= PICTURES
    if given.keys() >= {"init", "codes"}:
        raise ValueError("--codes: a model of --init needs the codebook that it was trained with")
    source = args.tokenizer or args.init
    if source:
        options["codes"] = None  # its own
        if ckgen.load_tokenizer(source).config.channels:  # a VQGAN: the paper's recipe, see train
            options |= {"image_size": 256, "iters": None, "lr": options["vqgan_lr"]}
        else:
            options["image_size"] = ckgen.read(source)["options"]["image_size"]
    return options | given


def make_run(options, out, P, device, dtype):
    """All that the stages need to know of a run: recipe, options, device, how to draw pictures."""
    run = argparse.Namespace(**RECIPES[options["config"]] | options, options=options, device=device,
                             dtype=dtype, out=out, redraw=P is not None)
    run.defaults = {"steps": P or 4, "cfg": 1.5, "temperature": 1.0}
    if not run.data:  # more guidance mixes the colours of toy shapes
        run.defaults |= {"cfg": 0.5, "temperature": 0.5}
    elif run.config == "tiny":  # a sweep on CIFAR-10 by study/evaluate.py
        run.defaults |= {"cfg": 0.5, "temperature": 0.9}
    return run


def open_images(run):
    """The images of a run. Raises ValueError if they are not those that it began with."""
    images = Images(run.data, run.image_size)
    run.classes = images.classes
    if run.options.setdefault("pictures", images.fingerprint) != images.fingerprint:
        raise ValueError(f"--data {run.data}: not the files that {run.out} began with")
    return images


def lock(folder):
    """Keep other processes out of a folder as long as the file that this returns is open."""
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "w")
    try:
        if fcntl and RANK == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process is at work in it") from None
    except OSError:
        pass  # some network drives have no locks
    return file


def name_of(data):
    """What to call the images of --data: tiny-imagenet-200 if it is tiny-imagenet-200/train."""
    *_, above, name = os.path.abspath(data or "toy").split(os.sep)
    return above if name == "train" else name


def train(args):
    """Train what the command line asks for, or go on with it. Raises ValueError or OSError."""
    init = "-init" if args.init else ""
    args.out = args.out or f"runs/{name_of(args.data)}-{args.scale or 2}x{init}"
    with lock(args.out):
        device, dtype = ckgen.find_device(args.device)
        run = make_run(fill_options(args, dtype), args.out, args.steps, device, dtype)
        if WORLD > 1:
            torch.distributed.init_process_group(timeout=timedelta(days=7))  # coding takes long
            atexit.register(torch.distributed.destroy_process_group)
        images = open_images(run)
        if run.iters is None:  # the paper's epochs, footnote 2's 30, or, for tiny, one
            epochs = 30 if run.init else run.epochs or 1
            run.iters = run.options["iters"] = max(1, epochs * images.train // run.batch_size)
        tokenizer = start_tokenizer(run)
        stride = tokenizer.config.stride
        if run.image_size % stride or run.batch_size % WORLD:
            raise ValueError(f"--image-size needs a multiple of {stride}, --batch-size of {WORLD}")
        run.sizes = ckgen.scale_sizes(run.image_size // stride, RATIOS[run.scale])
        if run.init:
            make_model(run, tokenizer)  # here, so that what does not fit is said before the work
        if RANK == 0:
            maps = " ".join(f"{n}x{n}" for n in run.sizes)
            print(f"{images.found}\n{run.out}: {images.train} images to train on, config "
                  f"{run.config}, {run.iters} steps, maps {maps}")
        tokenizer = make_tokenizer(run, images, tokenizer)
        codes = code_images(run, images, tokenizer)
        train_transformer(run, images, tokenizer, codes)
        if RANK == 0:
            print(f"{run.out}: samples.png, progress.gif (images after every step), pyramid.png "
                  f"(each map by itself), log.csv\n"
                  f"next: python ckgen.py {run.out}/checkpoint.pt --steps 8\n"
                  f"      python study/evaluate.py {run.out}/checkpoint.pt")


def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.stopped = STOPPED
    add, within = parser.add_argument, ckgen.within
    add("--scale", choices=RATIOS, help="ratio between the sides of maps; 1: one map (default: 2)")
    add("--steps", type=within(int, 1), metavar="P", help="steps for each map when drawing "
        "(default: 4); training draws P at random. A finished run draws its pictures again")
    add("--data", type=os.path.abspath, metavar="DIR",
        help="your pictures, a folder per class (default: toy shapes)")
    add("--out", metavar="DIR", help="the run's folder (default: runs/<data>-<scale>x[-init])")
    add("--config", choices=RECIPES, help="size of the model (default: S on a GPU that has "
        "bfloat16, else tiny)")
    add("--tokenizer", type=os.path.abspath, metavar="FILE", help="a trained tokenizer: of another "
        "run, or LlamaGen's vq_ds16_c2i.pt for 256-pixel pictures (default: that of --init, or "
        "train a small one)")
    add("--codes", type=within(int, 2, 65535), metavar="V", help="number of codes (default: 1024, "
        "tiny on toy shapes 256); with --tokenizer: train a new codebook for it (paper: 4096)")
    add("--init", type=os.path.abspath, metavar="CHECKPOINT",
        help="start from a trained model, also of another --scale")
    add("--image-size", type=within(int, 4, 1024), metavar="PIXELS",
        help="(default: 32 for tiny, 64 for S and L; that of a given tokenizer, 256 of a VQGAN)")
    add("--iters", type=within(int, 1), help="steps of training; the tokenizer's are in proportion "
        "(default: tiny 900, on pictures 3600; S 6000, L 12000; those with a VQGAN: the paper's)")
    add("--batch-size", type=within(int, 1), help="(default: tiny 16, on pictures 64; S 128, L 64)")
    add("--lr", type=within(float, 1e-9, 1), help="AdamW's learning rate; Muon's follows in "
        "proportion (default: tiny 2e-3; S 3e-4, L 1.5e-4, with a VQGAN the paper's)")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), help="same seed, same weights (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.run(train, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
