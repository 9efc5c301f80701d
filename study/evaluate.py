"""How good a model of train_tiny.py is, judged on held-out images and by a small classifier.

    python study/evaluate.py runs/toy-2x/checkpoint.pt
    python study/evaluate.py runs/cifar10-2x/checkpoint.pt --cfg 0 0.5 1 --temperature 0.8 1

prints the tokenizer's PSNR, and the loss on held-out images for several P; with 20 classes at most
also the bits that a held-out picture takes, and how often the model finds its class by likelihood.

Then a judge, a small classifier, says how many of 2000 samples it takes for their class, and how
far their features lie from those of training images through the tokenizer (Frechet distance; Heusel
et al. 2017). It says the same of held-out images, and of these through the tokenizer: the floor
that samples can reach. Its training takes 3 minutes of two cores on pictures. It is kept in a file;
distances of different judges cannot be compared, and those of few held-out pictures say little. Of
toy shapes it also counts those in which a second colour covers a tenth of what the first does.
"""

import argparse
import math
import os
import sys
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import ckgen
import train_tiny
from ckgen import Layout
from train_tiny import as_input, crop, encode, held_out_loss

SAMPLES = 2000


def make_judge(classes):
    """A small convolutional classifier. What its last layer reads serves the Frechet distance."""
    layers = []
    for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def train_judge(images, tokenizer, iters):
    """Train a judge on as many training images as fit into 600 MB. Of a batch, half are real and
    half decoded; all are mirrored or not, if the images may be, and shifted alike."""
    torch.manual_seed(0)
    device = tokenizer.codebook_weight.device
    some = range(min(200_000 * 32 ** 2 // images.size ** 2, images.train))
    real = crop(images.read(some), images.size)
    decoded = reconstruct(tokenizer, real)
    judge = make_judge(len(images.classes)).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=iters)
    for _ in tqdm(range(iters), "judge", unit="step"):
        numbers = torch.randint(len(some), (64,))
        pictures = torch.cat([real[numbers[:32]], decoded[numbers[32:]]])
        view = images.views[torch.randint(len(images.views), ())]
        pictures = crop(pictures, images.size, view)
        dy, dx = torch.randint(5, (2,)).tolist()
        pictures = F.pad(as_input(pictures).to(device), (2, 2, 2, 2), "reflect")
        pictures = pictures[..., dy:dy + images.size, dx:dx + images.size]
        loss = F.cross_entropy(judge(pictures), images.labels[numbers].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge


def judge_of(path, images, tokenizer, iters=None):
    """The judge in a file, or a new one, which is written there: 500 steps for toy shapes, which
    are easy, else 3300. Raises ValueError if that in the file was trained on something else."""
    codebook = tokenizer.codebook_weight
    checksum = zlib.crc32(codebook.cpu().numpy().tobytes())
    belongs = [images.fingerprint, images.size, checksum]
    if not os.path.exists(path):
        with ckgen.write_whole(path) as file:
            judge = train_judge(images, tokenizer, iters or (3300 if images.paths else 500))
            torch.save({"judge": judge.state_dict(), "belongs": belongs}, file)
    state = ckgen.read(path)
    with ckgen.file_errors(path):
        if state["belongs"] != belongs:
            raise ValueError("the judge of other images or of another tokenizer")
        judge = ckgen.build(make_judge, len(images.classes), state["judge"])
    return judge.to(codebook.device)


@torch.no_grad()
def features(judge, images):
    """A judge's features (n, 128), on the CPU, of images (n, 3, h, h), uint8."""
    device = judge[-1].weight.device
    return torch.cat([judge[:-1](as_input(part).to(device)).cpu() for part in images.split(256)])


def frechet_distance(a, b):
    """Frechet distance between two sets of features, (n, d) and (m, d)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # trace of the root
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root).item()


def spread(f, labels):
    """Variance of features f (n, d) within their classes, summed over these."""
    return sum(f[labels == k].var(0).sum() for k in labels.unique())


def two_colours(images):
    """Share of toy images (n, 3, h, h), uint8, in which a second of the six colours covers more
    than a tenth of what the first covers. A pixel has a colour if it is at most 60 from it."""
    colours = torch.tensor(train_tiny.COLOURS).float()
    far = torch.cdist(images.flatten(2).mT.float(), colours)                        # (n, h*h, 6)
    covers = F.one_hot(far.argmin(-1), len(colours)) * (far.amin(-1, keepdim=True) < 60)
    most = covers.sum(1).sort(-1, descending=True).values                           # (n, 6)
    return (most[:, 1] > 0.1 * most[:, 0]).double().mean().item()


def decode(tokenizer, codes, layout):
    """Codes (n, L) to images (n, 3, h, h), uint8, on the CPU."""
    return torch.from_numpy(ckgen.decode_scale(tokenizer, codes, layout)).permute(0, 3, 1, 2)


def reconstruct(tokenizer, images):
    """Images (n, 3, h, h), uint8, through the tokenizer."""
    n = images.shape[-1] // tokenizer.config.stride
    return decode(tokenizer, encode(tokenizer, images, (n,)), Layout((n,), 1))


class Scores:
    """Compares pictures with up to 10,000 training images through the tokenizer."""

    def __init__(self, judge, images, tokenizer):
        some = range(min(10000, images.train))
        pictures = reconstruct(tokenizer, crop(images.read(some), images.size))
        self.judge, self.toy = judge, images.paths is None
        self.reference = features(judge, pictures)
        self.spread = spread(self.reference, images.labels[some])

    def __call__(self, pictures, labels):
        """Scores of pictures (n, 3, h, h), uint8, of these classes. accuracy: what share the judge
        takes for them. spread: over that of training images."""
        f = features(self.judge, pictures)
        right = self.judge[-1](f.to(self.judge[-1].weight.device)).argmax(-1).cpu() == labels
        found = {"accuracy": right.double().mean().item(),
                 "distance": frechet_distance(f, self.reference),
                 "spread": (spread(f, labels) / self.spread).item()}
        if self.toy:
            found["two colours"] = two_colours(pictures)
        return found


@torch.no_grad()
def log_likelihoods(model, codebook, codes, layout, classes):
    """log p(picture | class), in nats, (n, classes), of pictures of codes (n, L)."""
    columns = []
    for label in tqdm(range(classes), "likelihoods", unit="class", leave=False):
        parts = []
        for x in codes.split(64):
            logits = model(codebook[x], torch.full_like(x[:, 0], label), layout)
            nats = F.cross_entropy(logits.mT, x[:, layout.cell[1:]], reduction="none")
            parts.append(-nats.sum(1))
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1).cpu()


def images_of(path, data=None):
    """The options and the images of a run, of whose checkpoint this is the path. data: where its
    pictures are now. Raises ValueError or OSError."""
    options = ckgen.read(path).get("options")
    if not options:
        raise ValueError(f"{path}: not a checkpoint of train_tiny.py")
    images = train_tiny.Images(data or options["data"], options["image_size"])
    if images.fingerprint != options["pictures"]:
        raise ValueError(f"{data or images.found}: not the files that {path} was trained on")
    if len(images.labels) - images.train < 2:
        raise ValueError("--data: too few pictures: less than two are held out")
    return options, images


def evaluate(args):
    """Print all that the header says. Raises ValueError or OSError."""
    device, _ = ckgen.find_device(args.device)
    model, tokenizer, classes, defaults = ckgen.load(args.checkpoint, device)
    options, images = images_of(args.checkpoint, args.data)
    P = args.steps or defaults["steps"]
    real, labels = images.held_out()
    sizes, V = model.config.sizes, tokenizer.config.codes
    layout = Layout(sizes, P, device)

    # Tokenizer and losses.
    codes, codebook = encode(tokenizer, real, sizes), tokenizer.codebook()
    decoded = decode(tokenizer, codes, layout)
    error = (decoded.float() - real).square().mean().item()
    print(f"tokenizer: PSNR {10 * math.log10(255 ** 2 / error):.1f} dB on {len(real)} held-out "
          f"images, {len(codes.unique())} of {V} codes in use\nheld-out loss in nats a token:")
    print(" " * 9, "all maps", *(f"{n}x{n}".rjust(8) for n in sizes))
    for other in sorted({1, 2, 3, 4, 8, 16, P}):
        losses = held_out_loss(model, codebook, codes, labels, Layout(sizes, other, device))
        print(f"  P = {other:<4d}", *(f"{loss:8.3f}" for loss in losses))

    # Likelihoods.
    if len(classes) <= 20:
        log_p = log_likelihoods(model, codebook, codes, layout, len(classes))
        right = (log_p.argmax(1) == labels).double().mean()
        bits = -log_p[range(len(labels)), labels].mean() / math.log(2)
        print(f"P = {P}: {bits:.1f} bits a held-out picture; class accuracy by likelihood "
              f"{right:.3f}")

    # Samples and floors.
    folder = os.path.dirname(args.checkpoint)
    judge = judge_of(args.judge or os.path.join(folder, "judge.pt"), images, tokenizer)
    scores = Scores(judge, images, tokenizer)

    def say(name, pictures, truth):
        found = scores(pictures, truth)
        mixed = f"; two colours {found['two colours']:.1%}" if scores.toy else ""
        print(f"  {len(pictures)} {name}: class accuracy {found['accuracy']:.3f}, "
              f"Frechet distance {found['distance']:.2f}{mixed}")

    print(f"by the judge, beside {len(scores.reference)} training images through the tokenizer:")
    say("held out, not decoded", real, labels)
    say("held out, decoded", decoded, labels)
    wanted = torch.arange(SAMPLES) % len(classes)
    for cfg in args.cfg or [defaults["cfg"]]:
        for temperature in args.temperature or [defaults["temperature"]]:
            codes = ckgen.generate(model, tokenizer, wanted.to(device), layout, options["seed"],
                                   cfg=cfg, temperature=temperature)
            say(f"samples, w = {cfg:g}, T = {temperature:g}, {len(layout.steps)} steps",
                decode(tokenizer, codes, layout), wanted)


def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="of a finished run, or of one on its way")
    add("--steps", type=ckgen.within(int, 1), metavar="P",
        help="steps for each map when drawing (default: the checkpoint's)")
    add("--cfg", type=ckgen.within(float, 0, 1000), metavar="W", nargs="+",
        help="guidance; several values are tried one after the other")
    add("--temperature", type=ckgen.within(float, 0, 100), metavar="T", nargs="+",
        help="the same (default of both: the checkpoint's)")
    add("--judge", metavar="FILE", help="trained if it is not there (default: judge.pt beside the "
        "checkpoint). Runs with one tokenizer can be compared by one judge")
    add("--data", metavar="DIR", help="where its pictures are now (default: where they were)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.run(evaluate, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
