"""Coarse to fine: the second paper, complete in this file.

Guo, Zhang, Shieh, "Improving Autoregressive Image Generation through Coarse-to-Fine Token
Prediction" (arXiv:2503.16194). Codes whose vectors lie close decode alike. So k-means puts the V
codes into K clusters, the coarse labels. Stage 1 samples the clusters of all cells, as ckgen.py
samples codes, and sees centroids instead of code vectors. Stage 2, as large a model, then samples
all codes in one pass, each within its cluster. As a code has one cluster,

    log p(codes) = log p(clusters) + log p(codes | clusters),

and both are trained on true clusters: their losses add up. If K = V, stage 2 has nothing to choose.

    python study/coarse.py train runs/toy-2x --clusters 64    both stages, on that run's codes
    python study/coarse.py compare                            with plain models, an hour

`train` takes tokenizer, codes and recipe from the folder of a run of train_tiny.py. It writes
coarse-K.pt and, at the end, samples in coarse-K.png beside that run's own; the same command
continues. It trains in one process, and whole batches at once: a small card may lack the memory.
"""

import argparse
import functools
import math
import os
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from study import DEVICE, FIRST, Study, four_digits  # makes ckgen and train_tiny importable
import ckgen
import train_tiny
from ckgen import Checkerboard, Config, Layout, loss_by_scale

# 1. Clusters --------------------------------------------------------------------------------------

def cluster_codebook(codebook, K, seed=0, rounds=100):
    """k-means of a codebook (V, C): the cluster (V,) of each code, and the K clusters' centroids
    (K, C), of unit length like the codes. No cluster is empty. Raises ValueError if K > V."""
    if K > len(codebook):
        raise ValueError(f"{K} clusters need more than {len(codebook)} codes")
    generator = torch.Generator().manual_seed(seed)
    centroids = codebook[torch.randperm(len(codebook), generator=generator)[:K]]
    for _ in range(rounds):
        nearness, cluster = (codebook @ centroids.T).max(-1)             # (V,)
        for k in range(K):
            count = cluster.bincount(minlength=K)
            if count[k] == 0:  # take the code farthest from its centroid that is not alone there
                alone = count[cluster] == 1
                cluster[nearness.masked_fill(alone, math.inf).argmin()] = k
        sums = torch.zeros_like(centroids).index_add_(0, cluster, codebook)
        centroids = F.normalize(sums, dim=-1)
    return cluster, centroids


# 2. The two stages --------------------------------------------------------------------------------

class CoarseToFine(nn.Module):
    """Both stages, two Checkerboards: config.codes is V, clusters is K."""

    def __init__(self, config, clusters):
        super().__init__()
        self.config = config
        self.coarse = Checkerboard(replace(config, codes=clusters))
        self.fine = Checkerboard(config)
        self.register_buffer("cluster", torch.zeros(config.codes, dtype=torch.long))        # (V,)
        self.register_buffer("centroids", torch.zeros(clusters, config.code_dim))           # (K, C)

    def forward(self, codes, labels, layout, noisy):
        """Training on codes (B, L). z_up is made of `noisy` codes. Returns the losses of each
        stage, (2, 1 + scales), as loss_by_scale does."""
        clusters = self.cluster[codes]
        z = self.centroids[clusters]
        noisy_z = self.centroids[self.cluster[noisy]]
        coarse_logits = self.coarse(z, labels, layout, noisy_z)          # (B, L, K)
        fine_logits = self.refine(clusters, labels, layout)              # (B, L, V)
        return torch.stack([loss_by_scale(coarse_logits, clusters, layout),
                            loss_by_scale(fine_logits, codes, layout)])

    def refine(self, clusters, labels, layout):
        """Stage 2: logits (B, L, V) in layout order, given all clusters (B, L). Tokens are as in
        stage 1, but z_up holds the centroid of the cell itself, and there is no mask."""
        class_token, modulations = self.fine.embed_class(labels)
        z = self.centroids[clusters].to(class_token.dtype)               # (B, L, C)
        tokens = self.fine.inputs(z, z, layout, 1, len(layout.cell))
        x = torch.cat([class_token, tokens], 1)                          # (B, 1+L, D)
        logits = self.fine.transform(x, modulations, self.fine.ropes(layout))[:, 1:]
        outside = self.cluster != clusters[:, layout.cell[1:], None]     # (B, L, V)
        return logits.masked_fill(outside, -math.inf)

    @torch.no_grad()
    def sample(self, labels, layout, cfg=0.0, temperature=1.0, fine_temperature=None,
               generator=None, **options):
        """Draw codes (B, L) for labels (B,), guided in both stages. fine_temperature is that of
        stage 2, by default that of stage 1. options: cfg_start."""
        if fine_temperature is None:
            fine_temperature = temperature
        clusters = ckgen.sample(self.coarse, self.centroids, labels, layout, cfg=cfg,
                                temperature=temperature, generator=generator, **options)
        logits = self.refine(clusters, labels, layout)
        if cfg > 0:
            uncond = self.refine(clusters, torch.full_like(labels, self.config.classes), layout)
            guided = logits + cfg * (logits - uncond)                    # -inf - -inf is nan
            logits = torch.where(logits.isinf(), logits, guided)
        codes = torch.empty_like(clusters)
        codes[:, layout.cell[1:]] = ckgen.draw(logits, fine_temperature, generator)
        return codes


# 3. Training --------------------------------------------------------------------------------------

def train(folder, K, device=None):
    """Train both stages with K clusters on the codes of the run in a folder, or go on with it.
    Returns (model, tokenizer). Raises ValueError or OSError."""
    options = train_tiny.stored_options(folder)
    if not options:
        raise ValueError(f"{folder}: holds no run of train_tiny.py")
    with train_tiny.lock(folder):
        device, dtype = ckgen.find_device(device)
        path = f"{folder}/coarse-{K}.pt"
        tokenizer = ckgen.load_tokenizer(f"{folder}/tokenizer.pt", device)
        run = train_tiny.make_run(options, folder, None, device, dtype)
        side = run.image_size // tokenizer.config.stride
        run.sizes = ckgen.scale_sizes(side, train_tiny.SCALES[run.scale])
        images = train_tiny.open_images(run)
        codes = train_tiny.code_images(run, images, tokenizer)
        torch.manual_seed(run.seed)
        model = CoarseToFine(train_tiny.model_config(run, tokenizer), K)
        codebook = tokenizer.codebook().cpu()                            # (V, C)
        model.cluster, model.centroids = cluster_codebook(codebook, K, run.seed)
        model.to(device)
        optimizers = train_tiny.make_optimizers(model, run)
        first = 0
        if os.path.exists(path):
            state = train_tiny.resume(path, model, optimizers, tokenizer)
            first = state["step"]
            if state["options"] != run.options:
                raise ValueError(f"{path}: of another run; remove it")
        train_stages(run, path, model, optimizers, tokenizer, images, codes, first)
        draw(run, path.replace(".pt", ".png"), model, tokenizer)
    return model, tokenizer


def train_stages(run, path, model, optimizers, tokenizer, images, codes, first):
    """Train from a first step on, and write the file of this path about once a minute."""
    layout_of, saved = functools.cache(lambda P: Layout(run.sizes, P, run.device)), time.monotonic()
    bar = tqdm(range(first, run.iters), "both stages", initial=first, total=run.iters, unit="step")
    for step in bar:
        x, y, noisy, P = train_tiny.draw_batch(run, images, codes, model.config.codes, step)
        with torch.autocast("cuda", run.dtype, enabled=run.dtype == torch.bfloat16):
            losses = model(x, y, layout_of(P), noisy)[:, 0]
        model.zero_grad()
        losses.sum().backward()
        train_tiny.set_learning_rates(run, optimizers, step)
        for optimizer in optimizers:
            optimizer.step()

        last = step + 1 == run.iters
        if (step + 1) % 10 == 0 or last:
            coarse, fine = losses.tolist()
            bar.set_postfix(clusters=f"{coarse:.3f}", codes=f"{fine:.3f}")
            if not math.isfinite(coarse + fine):
                raise ValueError(f"the loss is {coarse + fine} at step {step + 1}")
        if last or time.monotonic() - saved > 60:
            train_tiny.save_checkpoint(path, run, model, optimizers, tokenizer, step + 1, [])
            saved = time.monotonic()


def draw(run, path, model, tokenizer):
    """Write eight samples of each class, or of 16 classes, to a file of this path."""
    every = math.ceil(len(run.classes) / 16)
    labels = torch.arange(0, len(run.classes), every, device=run.device).repeat(8)
    options = dict(run.defaults)
    layout = Layout(run.sizes, options.pop("steps"), run.device)
    codes = generate(model, tokenizer, labels, layout, run.seed, **options)
    pictures = ckgen.decode_scale(tokenizer, codes, layout)
    with ckgen.write_whole(path) as file:
        ckgen.arrange(pictures, run.classes[::every]).save(file, "PNG")
    print(f"{path}: {len(labels)} images, {len(layout.steps)} steps each and one of refinement")


def generate(model, tokenizer, labels, layout, seed=0, **options):
    """Sample for any number of labels (n,) with the options of `sample`: codes (n, L)."""
    options["generator"] = torch.Generator(labels.device).manual_seed(seed)
    parts = tqdm(labels.split(64), "sampling", unit="batch", leave=False)
    return torch.cat([model.sample(part, layout, **options) for part in parts])


@torch.no_grad()
def held_out_loss(model, codebook, codes, labels, layout):
    """Mean cross-entropy over images of codes (n, L): the sum of both stages, of all tokens, then
    of each scale; then of all tokens that of stage 2."""
    parts = zip(codes.split(64), labels.to(codes.device).split(64))
    total = sum(len(x) * model(x, y, layout, x) for x, y in parts)       # (2, 1 + scales)
    losses = total.cpu() / len(codes)
    return torch.cat([losses.sum(0), losses[1, :1]])


# 4. Against plain models --------------------------------------------------------------------------

def compare(args):
    """Coarse to fine against plain, on the same 1024 codes, in as many steps of training and of
    sampling, at several temperatures. Writes coarse.csv, or of pictures cifar10-coarse.csv."""
    # Pictures take half of their recipe's steps, since two stages cost as much as two models.
    iters = train_tiny.PICTURES["iters"] // 2 if args.data else None
    study = Study(args.quick, args.data, "coarse", iters, ["--codes", "1024"])
    layout, labels = study.layout(FIRST, 4), torch.arange(1000, device=DEVICE)
    labels %= len(study.images.classes)
    network, tokenizer = study.load(FIRST)
    codes = train_tiny.encode(tokenizer, study.held_out, layout.sizes)
    codebook = tokenizer.codebook()
    rows = []
    for K in (0, 256) if args.data else (0, 64, 256):
        sampler, loss = ckgen.generate, train_tiny.held_out_loss
        if K:
            network, tokenizer = train(f"{study.folder}/{FIRST}", K, DEVICE)
            sampler, loss = generate, held_out_loss
        nats = loss(network, codebook, codes, study.labels, layout)
        start = time.monotonic()
        sampler(network, tokenizer, labels, layout, cfg=0.5)
        seconds = time.monotonic() - start  # for 1000 images, so milliseconds for one
        for T in (0.5, 0.8, 1.0, 1.1):
            for fine in (T, T / 2) if K else (T,):
                options = {"temperature": T} | ({"fine_temperature": fine} if K else {})
                scores = study.samples(network, tokenizer, layout, sampler, cfg=0.5, **options)
                rows.append(four_digits({
                    "K": K, "T": T, "fine T": fine, "nats": nats[0],
                    "of them fine": nats[-1] if K else 0,
                    "nats finest map": nats[len(layout.sizes)], "ms an image": seconds} | scores))
                study.write_csv(f"{study.prefix}coarse.csv", rows)


# 5. Command line ----------------------------------------------------------------------------------

def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add = commands.add_parser("train", help="train both stages on a run's codes").add_argument
    add("run", help="folder of a run of train_tiny.py, whose images are coded")
    add("--clusters", type=ckgen.within(int, 1), metavar="K", required=True, help="how many")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add = commands.add_parser("compare", help="compare with plain models").add_argument
    add("--data", metavar="DIR", help="pictures, as in study.py (default: toy shapes)")
    add("--quick", action="store_true", help="hardly any training, in runs/quick-*")
    args = parser.parse_args(arguments)
    if args.command == "train":
        parser.run(train, args.run, args.clusters, args.device)
    else:
        parser.run(compare, args)


if __name__ == "__main__":
    main()
