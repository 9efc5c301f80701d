"""Studies on the toy set: the tables and pictures of the README that compare models.

    python figures/study.py coarse     coarse to fine against plain: figures/coarse.csv, coarse.png

That trains nine models, which takes about an hour on 2 CPU cores. They are kept in runs/study: the
same command goes on where it was stopped, and measures again what is trained.
"""

import argparse
import csv
import io
import os
import sys
import time

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HOME)

import numpy as np
import torch

import ckgen
import train_tiny

CPU = torch.device("cpu")
SEEDS = (0, 1, 2)  # of sampling: 1000 images each


class Judge:
    """What is needed to judge models of toy images: held-out images, a classifier, and the features
    of real images."""

    def __init__(self):
        self.images = train_tiny.Images(None, 32)
        self.held_out, self.labels = self.images.held_out()
        self.classifier = train_tiny.train_classifier(self.images, CPU)
        self.reference = train_tiny.features(self.classifier, self.images.read(range(10000)))

    def samples(self, model, tokenizer, layout, **options):
        """Class accuracy, Frechet distance, share of two colours, ms an image: means over SEEDS."""
        wanted, rows = torch.arange(1000) % len(self.images.classes), []
        for seed in SEEDS:
            start = time.monotonic()
            codes = ckgen.generate(model, tokenizer, wanted, layout, seed, **options)
            seconds = time.monotonic() - start
            pictures = train_tiny.decode(tokenizer, codes, layout)
            scores = train_tiny.accuracy_and_distance(self.classifier, self.reference, pictures,
                                                      wanted)
            rows.append([*scores, train_tiny.two_colours(pictures), seconds])
        accuracy, distance, mixed, milliseconds = np.mean(rows, 0)
        return {"accuracy": accuracy, "distance": distance, "two colours": mixed,
                "ms an image": milliseconds}

    def nats(self, model, tokenizer, layout):
        """Held-out nats a token of all tokens, by stages, and of the finest map."""
        codes = tokenizer.encode_pyramid(train_tiny.as_input(self.held_out), layout.sizes)
        losses = train_tiny.held_out_loss(model, tokenizer.codebook(), codes, self.labels, layout)
        fine = losses[1, 0].item() if model.config.clusters else 0
        return {"nats": losses[:, 0].sum().item(), "of them fine": fine,
                "nats finest map": losses[:, -1].sum().item()}


def trained(name, *options):
    """(model, tokenizer, class names, defaults) with these options of train_tiny.py."""
    folder = os.path.join(HOME, "runs", "study", name)
    train_tiny.main(["--config", "tiny", "--device", "cpu", "--out", folder, *options])
    return ckgen.load(os.path.join(folder, "checkpoint.pt"))


def write_csv(name, rows):
    """Write figures/name from dictionaries with the same keys, and print it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: x if isinstance(x, int) else f"{x:.4g}" for key, x in row.items()})
    ckgen.write_whole(os.path.join(HOME, "figures", name),
                      lambda file: file.write(text.getvalue().encode()))
    print(text.getvalue(), end="")


def coarse():
    """Plain and coarse to fine on the same codes, in as many steps."""
    judge, rows, layout = Judge(), [], ckgen.Layout((1, 2, 4, 8), 4)
    for V, K in ((256, 0), (256, 64), (1024, 0), (1024, 64), (1024, 256), (4096, 0), (4096, 64),
                 (4096, 256), (4096, 1024)):
        options = ["--codes", str(V)] + (["--coarse", str(K)] if K else [])
        model, tokenizer, *_ = trained(f"coarse-{V}-{K}", *options)
        rows.append({"V": V, "K": K} | judge.nats(model, tokenizer, layout)
                    | judge.samples(model, tokenizer, layout, cfg=0.5, temperature=0.5))
        if V == 1024 and K == 0:
            redundancy(judge.held_out, tokenizer, layout)
    write_csv("coarse.csv", rows)


def redundancy(images, tokenizer, layout):
    """figures/coarse.png: held-out pictures whose codes are replaced by random ones of the same
    cluster, by the clusters' centroids, by any codes; and how far all of them move, in dB."""
    codebook, shown, names = tokenizer.codebook(), [images], ["real"]
    codes = tokenizer.encode_pyramid(train_tiny.as_input(images), layout.sizes)
    codes = codes[:, layout.scales[-1]]                                     # (n, N*N)

    def show(name, latents):
        with torch.no_grad():
            decoded = [ckgen.to_uint8(tokenizer.decode(ckgen.as_map(part)))
                       for part in latents.split(64)]
        shown.append(torch.from_numpy(np.concatenate(decoded)).permute(0, 3, 1, 2))
        names.append(f"{name} {train_tiny.decibels(shown[-1], images):.1f} dB")

    show("decoded,", codebook[codes])
    torch.manual_seed(0)
    for K in (256, 64, 1):
        cluster, centroids = ckgen.cluster_codebook(codebook, K)
        same = (cluster[:, None] == cluster).float()                        # (V, V)
        others = torch.multinomial(same, 1000, replacement=True)            # (V, 1000)
        others = others[codes, torch.randint(1000, codes.shape)]
        show(f"same of {K}," if K > 1 else "any code,", codebook[others])
        if K > 1:
            show(f"centroid of {K},", centroids[cluster][codes])
    print(*names, sep="\n")
    rows = [pictures[:8].permute(0, 2, 3, 1).numpy() for pictures in shown]
    grid = ckgen.picture_grid(rows, names)
    ckgen.write_whole(os.path.join(HOME, "figures", "coarse.png"),
                      lambda file: grid.save(file, "PNG"))


STUDIES = {"coarse": coarse}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    STUDIES[parser.parse_args().study]()
