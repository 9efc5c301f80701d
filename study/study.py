"""The paper's claims, seen on toy shapes or on your pictures: trains small models, measures them,
draws the figures.

    python study/study.py                          toy shapes, all claims: 3 hours of one CPU core
    python study/study.py steps                    one of the claims
    python study/study.py --data cifar10/train     pictures: idea, classes, steps and entropy
    python study/study.py --quick                  hardly any training: a test of this file

Models are kept in runs/study-toy or runs/study-cifar10, measurements in study/study.csv or
study/cifar10.csv: the same command goes on where it was stopped. Remove both to begin anew. A row
of a csv is about 2000 images, drawn at temperature 1. All models have the tokenizer of the first.
On toy shapes each model is trained from two seeds, and bars in plots show both; on pictures once.
"""

import argparse
import csv
import functools
import itertools
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
SCALES = {"1": "one map", "4": "ratio 4", "2": "ratio 2", "3": "ratio 3", "sqrt2": "ratio sqrt 2"}
STEPS = (1, 2, 4, 8, 16, 32, 64)  # P; the last map has 64 cells
GUIDANCE = (0.0, 0.5, 1.0)  # w


class Model(NamedTuple):
    """What sets a model apart. mixing: how many of its four layers mix RoPE."""
    scale: str
    order: str = "checkerboard"
    mixing: int = 2
    seed: int = 0

    def __str__(self):
        return "-".join(map(str, self))  # its folder


FIRST = Model("2")  # whose tokenizer all models have
KEY = (*Model._fields, "P", "cfg", "cfg_start")  # columns that tell rows of study.csv apart


def summary(values):
    """Their mean, the least, and the most."""
    return np.mean(values), min(values), max(values)


class Study:
    """Trains and measures models, and keeps both. data: a folder of pictures, or None. options:
    more of train_tiny.py, for all models."""

    def __init__(self, quick=False, data=None, kind="study", iters=None, options=()):
        name = train_tiny.name_of(data)
        self.data, self.images, self.options = data, train_tiny.Images(data, 32), options
        self.folder, self.figures = f"{HOME}/runs/{kind}-{name}", f"{HOME}/study"
        self.prefix, self.csv = (f"{name}-", f"{name}.csv") if data else ("", "study.csv")
        self.scales, self.seeds, self.most = [*SCALES], (0, 1), 64
        if data:
            self.scales, self.seeds, self.most = ["1", "4", "2"], (0,), 40
        recipe = train_tiny.PICTURES if data else train_tiny.RECIPES["tiny"]
        self.iters, self.n = iters or recipe["iters"], 2000
        self.judge_iters = None
        if quick:
            self.folder = self.figures = f"{HOME}/runs/quick-{kind}-{name}"
            self.iters, self.n, self.seeds, self.judge_iters = 20, 64, (0,), 20
        self.locked = train_tiny.lock(self.folder)
        self.device, _ = ckgen.find_device()
        self.held_out, self.labels = self.images.held_out(self.n)
        self.rows = {}
        if os.path.exists(f"{self.figures}/{self.csv}"):
            with open(f"{self.figures}/{self.csv}", newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("images") != str(self.images.fingerprint):
                        raise ValueError(f"{self.csv} holds rows of other images: remove it")
                    self.rows[tuple(row[name] for name in KEY)] = row

    @functools.cache
    def load(self, model):
        """(network, tokenizer) of a Model, which train_tiny.py trains. It has no options for order
        and mixing."""
        out = f"{self.folder}/{model}"
        options = ["--config", "tiny", "--device", str(self.device), "--iters", str(self.iters),
                   "--scale", model.scale, "--seed", str(model.seed), "--out", out, *self.options]
        if self.data:
            options += ["--data", self.data]
        if model != FIRST:
            self.load(FIRST)
            options += ["--tokenizer", f"{self.folder}/{FIRST}/tokenizer.pt"]
        config = functools.partial(ckgen.Config, mixing_layers=model.mixing)
        with mock.patch.object(ckgen, "progressive_checkerboard", ORDERS[model.order]):
            with mock.patch.object(train_tiny, "Config", config):
                train_tiny.main(options)
        return ckgen.load(f"{out}/checkpoint.pt", self.device)[:2]

    def layout(self, model, P):
        """The Layout of a Model."""
        with mock.patch.object(ckgen, "progressive_checkerboard", ORDERS[model.order]):
            sizes = ckgen.scale_sizes(8, train_tiny.RATIOS[model.scale])
            return ckgen.Layout(sizes, P, self.device)

    @functools.cached_property
    def scores(self):
        """What scores pictures."""
        path, tokenizer = f"{self.folder}/judge.pt", self.load(FIRST)[1]
        judge = evaluate.judge_of(path, self.images, tokenizer, self.judge_iters)
        return evaluate.Scores(judge, self.images, tokenizer)

    def samples(self, network, tokenizer, layout, **options):
        """The scores of samples of all classes in turn."""
        labels = torch.arange(self.n) % len(self.images.classes)
        codes = ckgen.generate(network, tokenizer, labels.to(self.device), layout, **options)
        return self.scores(evaluate.decode(tokenizer, codes, layout), labels)

    def measure(self, quantity, model, P, cfg=0.0, cfg_start=0):
        """A number of the csv file."""
        key = tuple(map(str, (*model, P, cfg, cfg_start)))
        if key not in self.rows:
            (network, tokenizer), layout = self.load(model), self.layout(model, P)
            codes = train_tiny.encode(tokenizer, self.held_out, layout.sizes)
            nats = train_tiny.held_out_loss(network, tokenizer.codebook(), codes, self.labels,
                                            layout)
            scores = self.samples(network, tokenizer, layout, cfg=cfg, cfg_start=cfg_start)
            self.keep(key, {"steps": len(layout.steps), "nats": nats[0], "last map": nats[-1]}
                      | scores)
        return float(self.rows[key][quantity])

    def floor(self, quantity):
        """A score of held-out images through the tokenizer, which samples can reach."""
        key = ("decoded", *[""] * 6)
        if key not in self.rows:
            decoded = evaluate.reconstruct(self.load(FIRST)[1], self.held_out)
            self.keep(key, self.scores(decoded, self.labels))
        return float(self.rows[key][quantity])

    def of_seeds(self, quantity, model, P, **guidance):
        """The summary of all training seeds."""
        return summary([self.measure(quantity, model._replace(seed=seed), P, **guidance)
                        for seed in self.seeds])

    def keep(self, key, numbers):
        """Add a row to the csv file."""
        of_images = {"images": str(self.images.fingerprint)}
        self.rows[key] = dict(zip(KEY, key)) | numbers | of_images
        self.write_csv(self.csv, [*self.rows.values()])

    def write_csv(self, name, rows):
        """Write rows, dictionaries of texts and numbers, beside the figures."""
        columns = max(rows, key=len)
        with ckgen.write_whole(f"{self.figures}/{name}") as file:
            for row in [dict(zip(columns, columns)), *rows]:
                cells = [row.get(column, "") for column in columns]
                cells = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
                file.write(",".join(cells).encode() + b"\n")

    def save(self, name, image):
        """Write a figure. WebP takes half of the bytes of PNG, without a loss."""
        with ckgen.write_whole(f"{self.figures}/{self.prefix}{name}") as file:
            image.save(file, "WEBP", lossless=True, quality=100, method=6)

    def draw(self, model, P, labels, **options):
        """Samples (n, h, w, 3) of a Model."""
        (network, tokenizer), layout = self.load(model), self.layout(model, P)
        codes = ckgen.generate(network, tokenizer, labels.to(self.device), layout, **options)
        return ckgen.decode_scale(tokenizer, codes, layout)


# Figures ------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")  # Okabe and Ito's


def labelled(rows, names, titles=()):
    """A picture_grid with names at its left and titles above. READMEs show it 830 pixels wide."""
    grid = ckgen.picture_grid(rows)
    gap, font = grid.height / len(rows), grid.width / 40
    longest = max(len(line) for name in names for line in name.split("\n"))
    left, top = round((longest + 2) * font / 2), round(2 * font) if titles else 0
    image = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    image.paste(grid, (left, top))
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        pen.text((font / 2, top + (i + 0.5) * gap), name, "black", anchor="lm", font_size=font)
    for j, text in enumerate(titles):
        pen.text((left + (j + 0.5) * gap, top / 2), text, "black", anchor="mm", font_size=font)
    return image


def board(n, before, now, side):
    """A PIL image of the n x n cells of a map: those that were drawn before, and those now."""
    image = Image.new("RGB", (side, side), "white")
    pen, cell = ImageDraw.Draw(image), side / n
    for number in range(n * n):
        y, x = divmod(number, n)
        colour = COLOURS[0] if number in before else "#e4e4e4"
        if number in now:
            colour = COLOURS[1]
        pen.rectangle([x * cell, y * cell, (x + 1) * cell - 2, (y + 1) * cell - 2], colour)
    return image


def axis(values, log, start, end):
    """Ticks around values, and a function from a value to its pixel, start ... end."""
    low, high = min(values), max(values)
    gaps = [digit * 10.0 ** power for digit in (1, 2, 5) for power in range(-2, 4)]
    gap = min(gap for gap in gaps if high - low <= 8 * gap)
    to_unit = math.log2 if log else lambda value: value / gap
    first = math.floor(to_unit(low))
    last = max(math.ceil(to_unit(high)), first + 1)
    ticks = [2.0 ** unit if log else gap * unit for unit in range(first, last + 1)]
    return ticks, lambda value: start + (end - start) * (to_unit(value) - first) / (last - first)


def plot(title, lines, log_y=False):
    """A line plot as an array, two of which are as wide as a README. lines: {name: [(x, y, least,
    most), ...]}. Prints them."""
    image = Image.new("RGB", (1660, 1200), "white")  # twice as large, then averaged
    pen = ImageDraw.Draw(image)
    write = functools.partial(pen.text, fill="black", anchor="mm", font_size=52)
    points = np.array([point for line in lines.values() for point in line])
    x_ticks, to_x = axis(points[:, 0], True, 170, 1280)
    y_ticks, to_y = axis(points[:, 1:].flatten(), log_y, 1020, 130)
    write((830, 45), title)
    write((725, 1155), "total steps")
    for tick in x_ticks:
        write((to_x(tick), 1070), f"{tick:g}")
    for tick in y_ticks:
        write((150, to_y(tick)), f"{tick:g}", anchor="rm")
        pen.line([(170, to_y(tick)), (1280, to_y(tick))], "#dddddd", 3)
    below, lowest = 0, 1080 - 60 * len(lines)
    # Labels stand at the ends of lines, or as near as others leave room.
    for name in sorted(lines, key=lambda name: to_y(lines[name][-1][1])):
        line, colour = lines[name], COLOURS[[*lines].index(name)]
        print(f"{title}, {name}:", *(f"{x:g}: {y:.3f} ({a:.3f}-{b:.3f})" for x, y, a, b in line))
        pen.line([(to_x(x), to_y(y)) for x, y, *_ in line], colour, 8)
        for x, y, least, most in line:
            pen.line([(to_x(x), to_y(least)), (to_x(x), to_y(most))], colour, 5)
            pen.circle((to_x(x), to_y(y)), 14, colour)
        middle = min(max(to_y(line[-1][1]), below + 30), lowest)
        write((1310, middle), name, fill=colour, anchor="lm")
        below, lowest = middle + 30, lowest + 60
    return np.array(image.reduce(2))


# Claims -------------------------------------------------------------------------------------------

def scan(study):
    """Sec. 3.2: the orders, on 16x16 cells in 16 steps."""
    orders = {name: np.array([16 * y + x for x, y in order(16)]) for name, order in ORDERS.items()}
    frames = []
    for step in range(16):
        frame = Image.new("RGB", (840, 280), "white")
        pen = ImageDraw.Draw(frame)
        for i, (name, cells) in enumerate(orders.items()):
            now, before = cells[16 * step:16 * step + 16], cells[:16 * step]
            frame.paste(board(16, before, now, 196), (210 * i + 7, 40))
            pen.text((210 * i + 105, 20), name, "black", anchor="mm", font_size=20)
        pen.text((420, 260), f"step {step + 1} of 16", "black", anchor="mm", font_size=20)
        frames.append(frame)
    with ckgen.write_whole(f"{study.figures}/scan.gif") as file:
        ckgen.save_gif(frames, file)


def progress(study):
    """Fig. 1: eight images and the cells that were drawn, after every step of ratio 2, P = 4."""
    (network, tokenizer), layout = study.load(FIRST), study.layout(FIRST, 4)
    labels = torch.arange(8, device=study.device)
    codes = ckgen.generate(network, tokenizer, labels, layout, cfg=0.5, temperature=0.5)
    pictures = ckgen.progress_frames(tokenizer, tokenizer.codebook()[codes], layout)
    frames = []
    for t, (scale, start, end) in enumerate(layout.steps):
        n, first = layout.sizes[scale], layout.scales[scale].start
        blocks = [number for number, (k, *_) in enumerate(layout.steps) if k == scale]
        cells = (layout.cell[layout.steps[blocks[0]][1]:end] - first).tolist()
        now = (layout.cell[start:end] - first).tolist()
        frame = Image.new("RGB", (832, 284), "white")
        frame.paste(board(n, cells, now, 216), (0, 4))
        pen = ImageDraw.Draw(frame)
        said = (f"step {t + 1} of {len(layout.steps)}\n"
                f"map {n}x{n}, block {blocks.index(t) + 1} of {len(blocks)}")
        pen.multiline_text((0, 228), said, "black", font_size=22)
        for i, picture in enumerate(pictures[t]):
            picture = Image.fromarray(picture).resize((138, 138), Image.Resampling.NEAREST)
            frame.paste(picture, (260 + 143 * (i % 4), 143 * (i // 4)))
        frames.append(frame)
    with ckgen.write_whole(f"{study.figures}/{study.prefix}progress.gif") as file:
        ckgen.save_gif(frames, file)


def idea(study):
    """Samples with more and more steps, and with maps before."""
    rows, names, labels = [], [], torch.arange(8) % len(study.images.classes)
    for scale, P in (("1", 1), ("1", 4), ("1", 64), ("4", 4), ("2", 4)):
        steps = len(study.layout(Model(scale), P).steps)
        distance = study.measure("distance", Model(scale), P)
        rows.append(study.draw(Model(scale), P, labels))
        names.append(f"{SCALES[scale]}\n{steps} step{'s' * (steps > 1)}\ndistance {distance:.1f}")
    study.save("idea.webp", labelled(rows, names, [study.images.classes[k] for k in labels]))


def classes(study):
    """Eight samples of each class, or of 12 at most, and as many held-out pictures decoded."""
    names = study.images.classes
    few = torch.arange(len(names))[::math.ceil(len(names) / 12)]
    options = ckgen.load(f"{study.folder}/{FIRST}/checkpoint.pt")[3]
    drawn = study.draw(FIRST, options.pop("steps"), few.repeat_interleave(8), **options)
    rows = []
    for label, samples in zip(few, np.split(drawn, len(few))):
        real = study.held_out[study.labels == label][:8]
        decoded = evaluate.reconstruct(study.load(FIRST)[1], real).permute(0, 2, 3, 1)
        rows.append(np.concatenate([samples, np.full_like(samples[:1], 255), decoded]))
    study.save("classes.webp", labelled(rows, [names[label] for label in few]))


def steps(study):
    """Fig. 5 and its protocol: guidance at all scales is swept, and the best distance counts. The
    accuracy is that at w = 0.5, as guidance raises it."""
    quantities = ("last map", "all maps", "distance", "accuracy")
    lines = {quantity: {SCALES[scale]: [] for scale in study.scales} for quantity in quantities}
    for scale, P in itertools.product(study.scales, STEPS):
        layout = study.layout(Model(scale), P)
        if len(layout.steps) > study.most:
            continue
        found = {quantity: [] for quantity in quantities}
        for seed in study.seeds:
            measure = functools.partial(study.measure, model=Model(scale, seed=seed), P=P)
            found["last map"].append(measure("last map"))
            found["all maps"].append(measure("nats") * len(layout.cell[1:]))
            found["distance"].append(min(measure("distance", cfg=cfg) for cfg in GUIDANCE))
            found["accuracy"].append(measure("accuracy", cfg=0.5))
        for quantity in quantities:
            lines[quantity][SCALES[scale]].append((len(layout.steps), *summary(found[quantity])))

    distance = f"Frechet distance, best w (held out: {study.floor('distance'):.2f})"
    accuracy = f"accuracy, w = 0.5 (held out: {study.floor('accuracy'):.2f})"
    above = [plot("nats a token of the last map", lines["last map"]),
             plot("nats a picture, all maps", lines["all maps"])]
    below = [plot(distance, lines["distance"], log_y=True), plot(accuracy, lines["accuracy"])]
    study.save("steps.webp", Image.fromarray(np.vstack([np.hstack(above), np.hstack(below)])))


def entropy(study):
    """Fig. 7: entropies of the cells of the last map. Fig. 6: their mean at each step, of the 16
    cells in the middle, as those at the border are easier."""
    rows, names = [], []
    for scale in ("1", "2"):
        (network, tokenizer), layout = study.load(Model(scale)), study.layout(Model(scale), 4)
        labels = torch.arange(study.n, device=study.device) % len(study.images.classes)
        torch.manual_seed(0)
        nats = torch.zeros(study.n, len(layout.cell) - 1, device=study.device)

        def choose(logits, cell, temperature, generator, nats=nats):
            nats[:, cell] = torch.special.entr(logits.softmax(-1)).sum(-1)  # of -p log p
            return ckgen.draw(logits, temperature, generator)

        codes = ckgen.sample(network, tokenizer.codebook(), labels, layout, choose=choose)
        maps = ckgen.as_map(nats[:, layout.scales[-1], None]).cpu()         # (n, 1, 8, 8)
        middle = torch.zeros(8, 8, dtype=torch.bool)
        middle[2:6, 2:6] = True
        means = []
        for _, start, end in layout.steps[-4:]:
            cells = layout.cell[start:end].cpu() - layout.scales[-1].start
            means.append(maps.flatten(1)[:, cells[middle.flatten()[cells]]].mean().item())
        print(f"{SCALES[scale]}: nats at the last 4 steps, the middle of the last map:",
              *(f"{mean:.3f}" for mean in means))
        darkest = math.log(tokenizer.config.codes)
        grey = (1 - 2 * maps[:8] / darkest).expand(-1, 3, -1, -1)
        rows += [ckgen.to_uint8(grey), ckgen.decode_scale(tokenizer, codes[:8], layout)]
        names += [f"{SCALES[scale]}\nwhite: 0 nats\nblack: {darkest:.1f}", "sample"]
    study.save("entropy.webp", labelled(rows, names))


def say(study, name, model, **guidance):
    """Print the mean, least and most of what is measured, with P = 4."""
    for quantity in ("nats", "accuracy", "distance", "spread", "two colours"):
        numbers = study.of_seeds(quantity, model, 4, **guidance)
        print(f"{name}: {quantity}", "{:.3f} ({:.3f}-{:.3f})".format(*numbers))


def mixing(study):
    """Table 2: RoPE mixing in no layer, the first two, all four, at ratio 4."""
    for layers in (0, 2, 4):
        say(study, f"RoPE mixing in {layers} layers", Model("4", mixing=layers))


def guidance(study):
    """Sec. 4.1: guidance from step 0 or from step 5, at ratio 2."""
    for start in (0, 5):
        say(study, f"w = 1 from step {start}", FIRST, cfg=1.0, cfg_start=start)


def order(study):
    """Sec. 3.2: what the scan order is worth, on one map without guidance."""
    plots = []
    for quantity, log_y in (("nats", False), ("distance", True)):
        lines = {name: [(P, *study.of_seeds(quantity, Model("1", name), P)) for P in STEPS]
                 for name in ORDERS}
        plots.append(plot(f"toy shapes, one map: {quantity}", lines, log_y))
    study.save("order.webp", Image.fromarray(np.hstack(plots)))


CLAIMS = {claim.__name__: claim for claim in (scan, progress, idea, classes, steps, entropy, mixing,
                                              guidance, order)}


def do(args):
    """Do one claim or all."""
    every = ["idea", "classes", "steps", "entropy"]  # of pictures
    if not args.data:
        every = [claim for claim in CLAIMS if claim not in ("idea", "classes")]
    if args.claim not in (None, *every):
        raise ValueError(f"{args.claim}: not {'of pictures' if args.data else 'of toy shapes'}")
    study = Study(args.quick, args.data)
    for claim in [args.claim] if args.claim else every:
        CLAIMS[claim](study)


def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", nargs="?", choices=CLAIMS, help="(default: all)")
    parser.add_argument("--data", metavar="DIR", help="a folder of pictures for each class")
    parser.add_argument("--quick", action="store_true", help="hardly any training, in runs/quick-*")
    parser.stopped = train_tiny.STOPPED
    parser.run(do, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
