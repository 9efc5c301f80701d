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

`train` takes tokenizer, codes and recipe from the folder of a run of train_tiny.py. In it, it makes
a folder coarse-K with the files of a run: the same command goes on with it.
"""

import argparse
import functools
import math
import os
from dataclasses import replace
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

from study import FIRST, Study  # makes ckgen and train_tiny importable
import ckgen
import train_tiny
from ckgen import Checkerboard, sample


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


class CoarseToFine(nn.Module):
    """Both stages, two Checkerboards, for a codebook (V, C) and K clusters."""

    def __init__(self, config, codebook, K, seed=0):
        super().__init__()
        self.config = config
        self.coarse = Checkerboard(replace(config, codes=K))
        self.fine = Checkerboard(config)
        cluster, centroids = cluster_codebook(codebook, K, seed)
        self.register_buffer("codebook", codebook)                       # (V, C)
        self.register_buffer("cluster", cluster)                         # (V,)
        self.register_buffer("centroids", centroids)                     # (K, C)
        self.register_buffer("evenly", -cluster.bincount()[cluster].log())  # (V,): -log of sizes

    def forward(self, z, labels, layout, noisy_z=None):
        """Training, as of a Checkerboard: logits (B, L, V) in layout order. All codes of a cluster
        have its probability together: those of the true cluster share it as stage 2 says, others
        evenly. So their cross-entropy is the sum of both stages' losses."""
        clusters = self.cluster_of(z)
        noisy = clusters if noisy_z is None else self.cluster_of(noisy_z)
        z, noisy_z = self.centroids[clusters], self.centroids[noisy]
        coarse = self.coarse(z, labels, layout, noisy_z).log_softmax(-1)  # (B, L, K)
        fine = self.refine(clusters, labels, layout)                     # (B, L, V)
        within = torch.where(fine.isinf(), self.evenly, fine.log_softmax(-1))
        return coarse[..., self.cluster] + within

    def cluster_of(self, z):
        """The clusters (B, L) of the codes whose vectors are z (B, L, C)."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would take a neighbour
            return self.cluster[(z @ self.codebook.T).argmax(-1)]

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
def sample_both(model, codebook, labels, layout, cfg=0.0, temperature=1.0, fine=1.0, generator=None,
                **options):
    """`sample` of both stages: codes (B, L) for labels (B,), guided in both. The temperature of
    stage 2 is `fine` times that of stage 1."""
    clusters = sample(model.coarse, model.centroids, labels, layout, cfg, temperature=temperature,
                      generator=generator, **options)
    logits = model.refine(clusters, labels, layout)
    if cfg > 0:
        uncond = model.refine(clusters, torch.full_like(labels, model.config.classes), layout)
        guided = logits + cfg * (logits - uncond)                        # -inf - -inf is nan
        logits = torch.where(logits.isinf(), logits, guided)
    codes = torch.empty_like(clusters)
    codes[:, layout.cell[1:]] = ckgen.draw(logits, fine * temperature, generator)
    return codes


def train(folder, K, device=None):
    """Train both stages with K clusters on the codes of the run in a folder, or go on with it, in
    its folder coarse-K. Returns (model, tokenizer). Raises ValueError or OSError."""
    options = train_tiny.stored_options(folder)
    if not options:
        raise ValueError(f"{folder}: holds no run of train_tiny.py")
    device, dtype = ckgen.find_device(device)
    plain, tokenizer, *_ = ckgen.load(f"{folder}/checkpoint.pt", device)
    run = train_tiny.make_run(options, folder, None, device, dtype)
    run.sizes = plain.config.sizes
    images = train_tiny.open_images(run)
    torch.manual_seed(run.seed)
    model = CoarseToFine(plain.config, tokenizer.codebook().cpu(), K, run.seed)
    with train_tiny.lock(folder):
        codes = train_tiny.code_images(run, images, tokenizer)
        run.out = f"{folder}/coarse-{K}"
        os.makedirs(run.out, exist_ok=True)
        with mock.patch.object(train_tiny, "make_model", lambda *_: model):
            with mock.patch.object(ckgen, "sample", sample_both):
                train_tiny.train_transformer(run, images, tokenizer, codes)
    print(f"{run.out}: samples.png, progress.gif, pyramid.png, log.csv")
    return model, tokenizer


def compare(args):
    """Coarse to fine against plain, on the same 1024 codes, in as many steps of training and of
    sampling, at several temperatures. Writes coarse.csv, or of pictures cifar10-coarse.csv."""
    # Pictures take half of their recipe's steps, since two stages cost as much as two models.
    iters = train_tiny.PICTURES["iters"] // 2 if args.data else None
    study = Study(args.quick, args.data, "coarse", iters, ["--codes", "1024"])
    layout = study.layout(FIRST, 4)
    network, tokenizer = study.load(FIRST)
    codes = train_tiny.encode(tokenizer, study.held_out, layout.sizes)
    rows = []
    for K in (0, 256) if args.data else (0, 64, 256):  # 0: plain
        loss = functools.partial(train_tiny.held_out_loss, labels=study.labels, layout=layout)
        if K:
            network, tokenizer = train(f"{study.folder}/{FIRST}", K, study.device)
        nats = first = loss(network, tokenizer.codebook(), codes)
        if K:
            first = loss(network.coarse, network.centroids, network.cluster[codes])
        with mock.patch.object(ckgen, "sample", sample_both if K else sample):
            for T in (0.5, 0.8, 1.0, 1.1):
                for options in ({"fine": 1.0}, {"fine": 0.5}) if K else ({},):
                    scores = study.samples(network, tokenizer, layout, cfg=0.5, temperature=T,
                                           **options)
                    row = {"K": K, "T": T, "fine T": T * options.get("fine", 1), "nats": nats[0],
                           "of them fine": nats[0] - first[0], "nats finest map": nats[-1]}
                    rows.append(row | scores)
                    study.write_csv(f"{study.prefix}coarse.csv", rows)


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
    parser.stopped = train_tiny.STOPPED
    args = parser.parse_args(arguments)
    if args.command == "train":
        parser.run(train, args.run, args.clusters, args.device)
    else:
        parser.run(compare, args)


if __name__ == "__main__":
    main()