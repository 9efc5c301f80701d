"""The paper's claims, seen on toy shapes: trains small models, measures them, draws the figures.

    python study/study.py            all claims, two training seeds: some hours of 2 CPU cores
    python study/study.py order      one of: scan, idea, steps, entropy, mixing, guidance, order
    python study/study.py --quick    all claims, hardly trained: a test of this file, 3 minutes

Models are kept in runs/study, measurements in study/study.csv: the same command goes on where it
was stopped, and what is there is not done again. Remove both to begin anew. A row of study.csv is
the mean of three times 1000 images, drawn at temperature 1. All models have the tokenizer of the
first, the README's default run. Bars in plots show both training seeds; in entropy.png, quartiles.
"""

import argparse
import csv
import functools
import io
import math
import os
import random
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw

import evaluate  # makes ckgen and train_tiny importable
import ckgen
import train_tiny

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEVICE, _ = ckgen.find_device()


def raster(size):
    """All cells (x, y), row by row."""
    return [(x, y) for y in range(size) for x in range(size)]


def shuffled(size):
    """All cells in a random order, always the same."""
    cells = raster(size)
    random.Random(0).shuffle(cells)
    return cells


def halton(size):
    """All cells in the order of Halton-MaskGIT (Besnier et al. 2025): that in which the points of a
    Halton sequence, of bases 2 and 3, first fall into them."""
    def mirrored(number, base):
        """The digits of a number, mirrored at the point: 6 is 110 in base 2, so 0.011 is 0.375."""
        return (number % base + mirrored(number // base, base)) / base if number else 0.0

    points = range(1, 100 * size * size)
    return [*dict.fromkeys((int(size * mirrored(i, 2)), int(size * mirrored(i, 3)))
                           for i in points)]


ORDERS = {"checkerboard": ckgen.progressive_checkerboard, "Halton": halton, "random": shuffled,
          "raster": raster}
SCALES = {"1": "one map", "4": "ratio 4", "3": "ratio 3", "2": "ratio 2", "sqrt2": "ratio sqrt 2"}
STEPS = (1, 2, 4, 8, 16, 32, 64)  # P; the last map has 64 cells


class Model(NamedTuple):
    """What sets a model apart. mixing: how many of its four layers mix RoPE."""
    scale: str
    order: str = "checkerboard"
    mixing: int = 2
    seed: int = 0


FIRST = Model("2")  # whose tokenizer all models have
KEY = (*Model._fields, "P", "cfg", "cfg_start")  # columns that tell rows of study.csv apart


def summary(values):
    """Their mean, the least, and the most."""
    return np.mean(values), min(values), max(values)


def four_digits(numbers):
    """A dictionary of numbers as text."""
    return {name: f"{number:.4g}" for name, number in numbers.items()}


class Study:
    """Trains and measures models, and keeps both."""

    def __init__(self, quick):
        self.folder, self.figures = f"{HOME}/runs/study", f"{HOME}/study"
        self.iters, self.n, self.seeds, self.sampling = 1150, 1000, (0, 1), (0, 1, 2)
        if quick:
            self.folder = self.figures = f"{HOME}/runs/quick"
            self.iters, self.n, self.seeds, self.sampling = 20, 64, (0,), (0,)
        self.locked = train_tiny.lock(self.folder)
        self.images = train_tiny.Images(None, 32)
        pictures, labels = self.images.held_out()
        self.held_out, self.labels = pictures[:2 * self.n], labels[:2 * self.n]
        self.rows = {}
        if os.path.exists(f"{self.figures}/study.csv"):
            with open(f"{self.figures}/study.csv", newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("images") != str(self.images.fingerprint):
                        raise ValueError("study.csv holds rows of other toy shapes: remove it")
                    self.rows[tuple(row[name] for name in KEY)] = row

    # Models

    def train(self, name, *options):
        """(network, tokenizer) that train_tiny.py trains with these options."""
        out = f"{self.folder}/{name}"
        train_tiny.main(["--config", "tiny", "--device", str(DEVICE), "--iters", str(self.iters),
                         "--out", out, *options])
        return ckgen.load(f"{out}/checkpoint.pt", DEVICE)[:2]

    @functools.cache
    def load(self, model):
        """(network, tokenizer) of a Model. train_tiny.py has no options for order and mixing."""
        options = ["--scale", model.scale, "--seed", str(model.seed)]
        if model != FIRST:
            self.load(FIRST)
            options += ["--tokenizer", f"{self.folder}/{'-'.join(map(str, FIRST))}/tokenizer.pt"]
        config = functools.partial(ckgen.Config, mixing_layers=model.mixing)
        with mock.patch.object(ckgen, "progressive_checkerboard", ORDERS[model.order]):
            with mock.patch.object(train_tiny, "Config", config):
                return self.train("-".join(map(str, model)), *options)

    @functools.cache
    def layout(self, model, P):
        """The Layout of a Model."""
        with mock.patch.object(ckgen, "progressive_checkerboard", ORDERS[model.order]):
            sizes = ckgen.scale_sizes(8, train_tiny.SCALES[model.scale])
            return ckgen.Layout(sizes, P, DEVICE)

    # Measurements

    @functools.cached_property
    def classifier(self):
        """What judges pictures."""
        return evaluate.train_classifier(self.images, DEVICE, self.iters)

    @functools.cached_property
    def reference(self):
        """Features of 10,000 training images."""
        return evaluate.features(self.classifier, self.images.read(range(10000)))

    def judge(self, pictures, labels):
        """Accuracy, Frechet distance, two colours, and spread: the variance of features within the
        classes over that of real images."""
        def spread(features, labels):
            return sum(features[labels == k].var(0).sum().item() for k in range(8))

        f = evaluate.features(self.classifier, pictures)
        accuracy, distance = evaluate.accuracy_and_distance(self.classifier, self.reference, f,
                                                            labels)
        inner = spread(f, labels)
        real = spread(self.reference, self.images.labels[:10000])
        return {"accuracy": accuracy, "distance": distance,
                "two colours": evaluate.two_colours(pictures), "spread": inner / real}

    def samples(self, network, tokenizer, layout, generate=ckgen.generate, **options):
        """The mean judgement of samples from each sampling seed."""
        labels, found = torch.arange(self.n) % 8, []
        for seed in self.sampling:
            codes = generate(network, tokenizer, labels.to(DEVICE), layout, seed, **options)
            found.append(self.judge(evaluate.decode(tokenizer, codes, layout), labels))
        return {name: np.mean([scores[name] for scores in found]) for name in found[0]}

    @functools.cache
    def losses(self, network, tokenizer, layout):
        """Held-out nats a token, as train_tiny.held_out_loss returns them."""
        codes = train_tiny.encode(tokenizer, self.held_out, layout.sizes)
        return train_tiny.held_out_loss(network, tokenizer.codebook(), codes, self.labels, layout)

    def measure(self, quantity, model, P, cfg=0.0, cfg_start=0):
        """A number of study.csv."""
        key = tuple(map(str, (*model, P, cfg, cfg_start)))
        if key not in self.rows:
            network, layout = self.load(model), self.layout(model, P)
            all_tokens, *_, last_map = self.losses(*network, layout).tolist()
            scores = self.samples(*network, layout, cfg=cfg, cfg_start=cfg_start)
            self.keep(key, {"steps": len(layout.steps), "nats": all_tokens, "last map": last_map}
                      | scores)
        return float(self.rows[key][quantity])

    def floors(self, quantity):
        """The same of held-out images, as they are and through the tokenizer."""
        keys = [(name, *[""] * 6) for name in ("real images", "decoded")]
        if keys[0] not in self.rows:
            tokenizer, layout = self.load(FIRST)[1], self.layout(FIRST, 1)
            real, labels = self.held_out[:self.n], self.labels[:self.n]
            codes = train_tiny.encode(tokenizer, real, layout.sizes)
            for key, pictures in zip(keys, (real, evaluate.decode(tokenizer, codes, layout))):
                self.keep(key, self.judge(pictures, labels))
        return [float(self.rows[key][quantity]) for key in keys]

    def of_seeds(self, quantity, model, P, **guidance):
        """The summary of all training seeds."""
        return summary([self.measure(quantity, model._replace(seed=seed), P, **guidance)
                        for seed in self.seeds])

    # Files

    def keep(self, key, numbers):
        """Add a row to study.csv."""
        of_images = {"images": str(self.images.fingerprint)}
        self.rows[key] = dict(zip(KEY, key)) | four_digits(numbers) | of_images
        self.write_csv("study.csv", [*self.rows.values()])

    def write_csv(self, name, rows):
        """Write rows beside the figures."""
        with ckgen.write_whole(f"{self.figures}/{name}") as file:
            text = io.TextIOWrapper(file, newline="")
            writer = csv.DictWriter(text, max(rows, key=len), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            text.detach()

    def save(self, name, image):
        """Write a figure."""
        with ckgen.write_whole(f"{self.figures}/{name}") as file:
            image.save(file, "PNG")

    def save_plots(self, name, *rows):
        """Write a figure of rows of plots."""
        self.save(name, Image.fromarray(np.vstack([np.hstack(row) for row in rows])))

    def save_samples(self, name, settings):
        """Write a figure of samples: a row for each (text, Model, P), the same classes."""
        rows, names = [], []
        for text, model, P in settings:
            (network, tokenizer), layout = self.load(model), self.layout(model, P)
            codes = ckgen.generate(network, tokenizer, torch.arange(8, device=DEVICE), layout)
            rows.append(ckgen.decode_scale(tokenizer, codes, layout))
            names.append(f"{text}, steps: {len(layout.steps)}")
        self.save(name, ckgen.picture_grid(rows, names))


# Plots --------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")  # Okabe and Ito's


def axis(values, log, start, end):
    """Ticks around values, and a function from a value to its pixel, start ... end."""
    low, high = min(values), max(values)
    gap = next((gap for gap in (0.1, 0.2, 0.5, 1, 2, 5, 10) if high - low <= 8 * gap), 20)
    to_unit = math.log2 if log else lambda value: value / gap
    first = math.floor(to_unit(low))
    last = max(math.ceil(to_unit(high)), first + 1)
    ticks = [2.0 ** unit if log else gap * unit for unit in range(first, last + 1)]
    return ticks, lambda value: start + (end - start) * (to_unit(value) - first) / (last - first)


def plot(title, x_name, lines, log_x=True, log_y=False):
    """A line plot as a PIL image; prints its numbers. lines: {name: [(x, y, least, most), ...]}."""
    image = Image.new("RGB", (1360, 1000), "white")  # twice as large, then averaged
    pen = ImageDraw.Draw(image)
    write = functools.partial(pen.text, fill="black", anchor="mm", font_size=34)
    points = np.array([point for line in lines.values() for point in line])
    x_ticks, to_x = axis(points[:, 0], log_x, 130, 1300)
    y_ticks, to_y = axis(points[:, 1:].flatten(), log_y, 880, 150)
    write((680, 30), title)
    write((680, 970), x_name)
    for tick in x_ticks:
        write((to_x(tick), 915), f"{tick:g}")
    for tick in y_ticks:
        write((115, to_y(tick)), f"{tick:g}", anchor="rm")
        pen.line([(130, to_y(tick)), (1300, to_y(tick))], "#dddddd", 2)
    for i, (name, line) in enumerate(lines.items()):
        print(f"{title}, {name}:", *(f"{x:g}: {y:.3f} ({a:.3f}-{b:.3f})" for x, y, a, b in line))
        colour, sides, left = COLOURS[i], 3 + i, 130 + i * 1200 / len(lines)
        pen.regular_polygon((left + 15, 95, 15), sides, fill=colour)
        write((left + 40, 95), name, fill=colour, anchor="lm")
        pen.line([(to_x(x), to_y(y)) for x, y, *_ in line], colour, 6)
        for x, y, least, most in line:
            pen.line([(to_x(x), to_y(least)), (to_x(x), to_y(most))], colour, 4)
            pen.regular_polygon((to_x(x), to_y(y), 15), sides, fill=colour)
    return image.reduce(2)


def title(study, quantity):
    """What a plot shows, with what it is for real images."""
    if quantity == "last map":
        return "held-out nats a token of the last map"
    return "{} (real images {:.2f}, decoded {:.2f})".format(quantity, *study.floors(quantity))


# Claims -------------------------------------------------------------------------------------------

def scan(study):
    """Sec. 3.2: the orders, on 16x16 cells in 16 steps."""
    blocks = [np.array_split(order(16), 16) for order in ORDERS.values()]
    boards = np.full((len(blocks), 1, 16, 16, 3), 235, np.uint8)
    frames = []
    for step in range(16):
        boards[(boards == (213, 94, 0)).all(-1)] = (0, 114, 178)  # what was drawn before
        for board, cells in zip(boards, blocks):
            x, y = cells[step].T
            board[0, y, x] = (213, 94, 0)
        frames.append(ckgen.picture_grid([*boards], [*ORDERS]))
    with ckgen.write_whole(f"{study.figures}/scan.gif") as file:
        ckgen.save_gif(frames, file)


def idea(study):
    """Samples with more and more steps, and with maps before."""
    settings = ("1", 1), ("1", 4), ("1", 8), ("1", 64), ("4", 4), ("2", 4)
    study.save_samples("idea.png", [(SCALES[scale], Model(scale), P) for scale, P in settings])


def steps(study):
    """Fig. 5 and its protocol: guidance at all scales is swept. The best distance counts, and the
    accuracies of all settings whose distance is within 2 % of it."""
    found = {name: [] for name in SCALES.values()}
    for scale, name in SCALES.items():
        for P in STEPS:
            total = len(study.layout(Model(scale), P).steps)
            if total > 64:
                continue
            distances, accuracies = [], []
            for seed in study.seeds:
                swept = [[study.measure(quantity, Model(scale, seed=seed), P, cfg)
                          for quantity in ("distance", "accuracy")] for cfg in (0.0, 0.5, 1.0)]
                best = min(swept)[0]
                distances.append(best)
                accuracies += [accuracy for distance, accuracy in swept if distance <= 1.02 * best]
            found[name].append((P, total, summary(distances), summary(accuracies)))
    plots = []
    for x, x_name in enumerate(("steps per scale", "total steps")):
        for y, quantity in ((2, "distance"), (3, "accuracy")):
            lines = {name: [(row[x], *row[y]) for row in rows] for name, rows in found.items()}
            plots.append(plot(title(study, quantity), x_name, lines, log_y=y == 2))
    study.save_plots("steps.png", plots[::2], plots[1::2])


def entropy(study):
    """Fig. 6: entropies at each step, mean and quartiles. Fig. 7: of each cell of the last map."""
    plots, rows, names = [], [], []
    for P in (4, 8):
        lines = {}
        for scale in ("2", "4", "1"):
            (network, tokenizer), layout = study.load(Model(scale)), study.layout(Model(scale), P)
            labels = torch.arange(study.n, device=DEVICE) % 8
            torch.manual_seed(0)
            codes, nats = ckgen.sample(network, tokenizer.codebook(), labels, layout,
                                       return_entropy=True)
            nats = nats.cpu()
            of_steps = [nats[:, layout.cell[start:end].cpu()] for _, start, end in layout.steps]
            lines[SCALES[scale]] = [(t, values.mean().item(), *np.quantile(values, (0.25, 0.75)))
                                    for t, values in enumerate(of_steps, 1)]
            if P == 4:
                maps = ckgen.as_map(nats[:8, layout.scales[-1], None])  # (8, 1, 8, 8)
                grey = (1 - maps / 2).expand(-1, 3, -1, -1)     # white: 0 nats, black: 4
                rows += [ckgen.to_uint8(grey), ckgen.decode_scale(tokenizer, codes[:8], layout)]
                names += [f"{SCALES[scale]}, entropy", "sample"]
        plots.append(plot(f"nats, mean and quartiles, P = {P}", "step", lines, log_x=False))
    study.save_plots("entropy.png", plots)
    study.save("entropy_maps.png", ckgen.picture_grid(rows, names))


def mixing(study):
    """Table 2: RoPE mixing in no layer, the first two, all four, at ratio 4 with P = 4."""
    for layers in (0, 2, 4):
        print(f"RoPE mixing in {layers} layers:")
        for quantity in ("nats", "distance", "accuracy"):
            numbers = study.of_seeds(quantity, Model("4", mixing=layers), 4)
            print(" ", quantity, *(f"{number:.3f}" for number in numbers))
    for seed in study.seeds:
        network, _ = study.load(Model("4", mixing=4, seed=seed))
        print("alpha of all layers and heads:", network.rope_mix.sigmoid().tolist())


def guidance(study):
    """Sec. 4.1: guidance from step 0 or from step 5, at ratio 2 with P = 4."""
    plots = []
    for quantity in ("spread", "accuracy", "distance"):
        lines = {}
        for start in (0, 5):
            lines[f"guided from step {start}"] = [
                (cfg, *study.of_seeds(quantity, Model("2"), 4, cfg=cfg, cfg_start=start))
                for cfg in (0.25, 0.5, 1.0, 2.0, 4.0)]
        plots.append(plot(title(study, quantity), "guidance w", lines))
    study.save_plots("guidance.png", plots)


def order(study):
    """Sec. 3.2: what the scan order is worth."""
    plots = []
    for scale in ("1", "4"):
        for quantity in ("last map", "distance"):
            lines = {}
            for name in ORDERS:
                lines[name] = [(P, *study.of_seeds(quantity, Model(scale, name), P)) for P in STEPS]
            text = f"{SCALES[scale]}: {title(study, quantity)}"
            plots.append(plot(text, "steps per scale", lines, log_y=quantity == "distance"))
    study.save_plots("order.png", plots[:2], plots[2:])
    study.save_samples("order_samples.png", [(name, Model("1", name), 8) for name in ORDERS])


CLAIMS = {claim.__name__: claim for claim in (scan, idea, steps, entropy, mixing, guidance, order)}


def main(args):
    """Do one claim or all."""
    print(__doc__)
    study = Study(args.quick)
    for claim in [args.claim] if args.claim else CLAIMS:
        CLAIMS[claim](study)


if __name__ == "__main__":
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", nargs="?", choices=CLAIMS, help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="hardly any training, in runs/quick")
    parser.run(main, parser.parse_args())
