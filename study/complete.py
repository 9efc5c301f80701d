"""Complete a picture of which a part is known, or draw it anew from its coarse maps.

    python study/complete.py runs/toy-2x/checkpoint.pt --keep left 2x2
    python study/complete.py runs/toy-2x/checkpoint.pt my.png --class star --keep top

draws what is missing of held-out pictures, or of files: known codes are not drawn. This alone fails
for half a picture, as the 1x1 map, which decides what the picture shows, is drawn before them. So
several candidates are drawn, and one is kept, with chances in proportion to the probability that
they give to the known codes: sampling-importance resampling, exact for many candidates only. If
coarse maps are kept, one is enough. Of toy shapes it says how often two colours mix.

The first row shows the pictures decoded: a tokenizer cannot show what is unlike the pictures that
it was trained on. A cell is known if all its pixels are. That is exact for the small tokenizer,
whose encoder sees one cell at a time, and an approximation for a VQGAN.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate  # makes ckgen and train_tiny importable
import ckgen
import train_tiny
from ckgen import Layout

HALVES = ("left", "bottom", "right", "top")  # each a quarter turn of the one before


def sample_around(model, codebook, labels, layout, known, **options):
    """`sample` around known codes (B, L), which are -1 where nothing is known. Returns the codes
    (B, L), and log_p (B,), the sum of the known codes' log-probabilities, guided, at this
    temperature, each given all codes of the steps before."""
    log_p = torch.zeros(len(labels), device=labels.device)

    def choose(logits, cell, temperature, generator):
        given = known[:, cell]                                              # (B, T)
        log_p.sub_(F.cross_entropy(logits.mT / temperature, given, ignore_index=-1,
                                   reduction="none").sum(1))
        return torch.where(given < 0, ckgen.draw(logits, temperature, generator), given)

    return ckgen.sample(model, codebook, labels, layout, choose=choose, **options), log_p


def complete(model, codebook, label, layout, known, candidates, generator=None, **options):
    """Draw a picture of class label, a tensor (1,), around known codes (L,): codes (L,). options
    are those of `sample`."""
    codes, log_p = sample_around(model, codebook, label.repeat(candidates), layout,
                                 known.repeat(candidates, 1), generator=generator, **options)
    chosen = ckgen.draw(log_p[None], 1, generator)                          # (1,)
    return codes[chosen][0]


def known_codes(codes, pixels, layout):
    """Codes (B, L) with -1 in all cells of which a pixel is not known. pixels (h, h), bool."""
    unknown = [F.adaptive_max_pool2d(1 - pixels[None].float(), n).flatten() for n in layout.sizes]
    return codes.masked_fill(torch.cat(unknown).to(codes.device) > 0, -1)


def half(name, size):
    """The pixels (size, size), bool, of one of HALVES."""
    columns = torch.arange(size) < size // 2
    return columns.expand(size, size).rot90(HALVES.index(name))


def complete_all(args):
    """Complete what the command line asks for. Raises ValueError or OSError."""
    if args.label != "none" and not args.pictures:
        raise ValueError("--class is that of picture files; held-out pictures have their own")
    if not args.out.lower().endswith(".png") or args.out in args.pictures:
        raise ValueError(f"--out {args.out}: not a .png, or one of the pictures")
    device, _ = ckgen.find_device(args.device)
    # In float32: in bfloat16 the tokenizer would find other codes than those of the training.
    model, tokenizer, classes, options = ckgen.load(args.checkpoint, device)
    options |= {key: getattr(args, key) for key in options if getattr(args, key) is not None}
    P = options.pop("steps")
    layout = Layout(model.config.sizes, P, device)
    size = layout.sizes[-1] * tokenizer.config.stride
    maps = [f"{n}x{n}" for n in layout.sizes[:-1]]
    for keep in args.keep:
        if keep not in (*HALVES, *maps):
            raise ValueError(f"--keep {keep}: not among {', '.join((*HALVES, *maps))}")

    # The pictures (n, 3, size, size), uint8, and their classes (n,).
    if args.pictures:
        labels = torch.tensor(ckgen.class_numbers([args.label], classes) * len(args.pictures))
        read = [np.array(train_tiny.read_picture(path, size)) for path in args.pictures]
        pictures = torch.from_numpy(np.stack(read)).movedim(-1, 1)
    else:
        _, images = evaluate.images_of(args.checkpoint, args.data)
        pictures, labels = images.held_out(args.n)
    toy = not args.pictures and images.paths is None

    with ckgen.write_whole(args.out) as file:
        codebook, codes = tokenizer.codebook(), train_tiny.encode(tokenizer, pictures, layout.sizes)
        whole = ckgen.decode_scale(tokenizer, codes, layout)
        rows, names = [whole], ["decoded"]
        for keep in args.keep:
            # A row shows what is known of them.
            if keep in HALVES:
                pixels = half(keep, size)
                known = known_codes(codes, pixels, layout)
                rows.append(np.where(pixels[..., None], whole, np.uint8(128)))
            else:
                scale = maps.index(keep)
                known = codes.clone()
                known[:, layout.scales[scale].stop:] = -1
                rows.append(ckgen.decode_scale(tokenizer, codes, layout, scale))
            names.append(f"kept: {keep}")

            # Then a row for each number of candidates.
            for candidates in args.candidates or ([1, 64] if keep in HALVES else [1]):
                generator = torch.Generator(device).manual_seed(args.seed)
                bar = tqdm(range(len(labels)), f"{candidates} candidates", leave=False)
                completed = [complete(model, codebook, labels[i:i + 1].to(device), layout, known[i],
                                      candidates, generator, **options) for i in bar]
                rows.append(ckgen.decode_scale(tokenizer, torch.stack(completed), layout))
                names.append(f"{candidates} candidate{'s' * (candidates > 1)}")
                if toy:
                    mixed = evaluate.two_colours(torch.from_numpy(rows[-1]).movedim(-1, 1))
                    print(f"{keep}, {names[-1]}: two colours in {mixed:.1%} of {args.n} pictures")
        ckgen.picture_grid([row[:8] for row in rows], names).save(file, "PNG")
    print(f"{args.out}: {', '.join(names)}; P = {P}, {options}")


def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, within = parser.add_argument, ckgen.within
    add("checkpoint", help="of a finished run, or of one on its way")
    add("pictures", nargs="*", default=[], help="files (default: held-out pictures of the run)")
    add("--class", dest="label", default="none", metavar="NAME",
        help="of the files (default: none)")
    add("--data", metavar="DIR", help="where the run's pictures are now")
    add("--n", type=within(int, 1, 2000), default=8,
        help="how many held-out pictures (default: 8); the output shows eight at most")
    add("--keep", nargs="+", default=["left"], metavar="PART",
        help="left, right, top or bottom, or a map, as 2x2, to enlarge (default: left)")
    add("--candidates", type=within(int, 1, 10000), nargs="+", metavar="K",
        help="drawn side by side, one is kept (default: a row with 1, one with 64; to enlarge, 1)")
    add("--steps", type=within(int, 1), metavar="P", help="steps for each map")
    add("--cfg", type=within(float, 0, 1000), metavar="W", help="guidance; 0 is off")
    add("--temperature", type=within(float, 1e-3, 100), metavar="T",
        help="divides the logits (default of all three: the checkpoint's)")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), default=0, help="(default: 0)")
    add("--out", default="completed.png", help="a .png (default: completed.png)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.run(complete_all, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
