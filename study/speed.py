"""How fast this machine trains, draws and decodes, beside the least time that it could take.

    python study/speed.py                 tiny, S and L, with random weights
    python study/speed.py --config S      one of them

Each time stands beside a floor: the time in which this device moves the bytes of all layers'
weights once for each step, or computes as many products in large matrices, whichever is longer.
torch counts no products of attention on a CPU, a tenth of all for tiny and S. On a CUDA GPU a
second way to draw is measured, SamplerGraph: `sample` as one CUDA graph. No card has run it yet.
"""

import argparse
import copy
import functools

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import evaluate  # makes ckgen and train_tiny importable
import ckgen
import train_tiny
from ckgen import Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, sample, training_loss

VQGAN = TokenizerConfig(4096, 8, 16, 256, (128, 128, 256, 256, 512))  # the paper's


class SamplerGraph:
    """`sample`, with its options, as one CUDA graph on the current device: it launches thousands of
    kernels at once, and draws the same. Everything except the labels is fixed at capture."""

    def __init__(self, model, codebook, layout, batch, generator, **options):
        self.reads = model, codebook, layout  # the graph holds nothing but addresses
        self.labels = torch.zeros(batch, dtype=torch.long, device=codebook.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run sets the libraries up
            sample(model, codebook, self.labels, layout, **options)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph, stream=stream):
            options["generator"] = generator
            self.codes = sample(model, codebook, self.labels, layout, **options)

    def __call__(self, labels):
        """Codes (batch, L) for labels (batch,)."""
        self.labels.copy_(labels)
        self.graph.replay()
        return self.codes.clone()


def timed(work):
    """The median time of work(), in seconds, after a first call to warm up."""
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=2).median  # it waits for the GPU


def bench(args):
    """Measure this device, then one configuration or all."""
    device, dtype = ckgen.find_device(args.device)
    source, n = torch.zeros(2 ** 25, device=device), 8192 if device.type == "cuda" else 2048
    copied, matrix = torch.empty_like(source), torch.randn(n, n, device=device).to(dtype)
    bandwidth = 2 * source.nbytes / timed(lambda: copied.copy_(source))
    speed = 2 * n ** 3 / timed(lambda: matrix @ matrix)
    print(f"{device}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads: "
          f"moves {bandwidth / 1e9:.0f} GB/s, multiplies {speed / 1e12:.2f} TFLOP/s")

    def measure(what, images, work, counted, read=0):
        with FlopCounterMode(display=False) as counter:
            counted()
        floor = max(read / bandwidth, counter.get_total_flops() / speed)
        seconds = timed(work)
        print(f"{what} {images:3d} images: {1e3 * seconds:9.1f} ms, {images / seconds:8.1f} "
              f"images/s, {seconds / floor:5.1f} times the floor")

    for name in [args.config] if args.config else train_tiny.RECIPES:
        bench_config(name, device, dtype, measure)


def bench_config(name, device, dtype, measure):
    """Measure one configuration at ratio 2 with P = 4: tiny as on the toy shapes, S and L as in the
    paper. On a CPU, S and L draw a single image."""
    grid, tokenizer = (8, TokenizerConfig()) if name == "tiny" else (16, VQGAN)
    run = argparse.Namespace(**train_tiny.RECIPES[name])
    sizes = ckgen.scale_sizes(grid, 2)
    config = Config(sizes, 1000, tokenizer.codes, 8, run.width, run.layers, run.heads)
    model, tokenizer = Checkerboard(config).to(device), Tokenizer(tokenizer).to(device, dtype)
    layout, codebook = Layout(sizes, 4, device), tokenizer.codebook().float()
    drawing = ckgen.for_sampling(copy.deepcopy(model), dtype)
    optimizers = train_tiny.make_optimizers(model, run)
    read = sum(p.nbytes for p in drawing.layers.parameters() if p.ndim == 2) * len(layout.steps)
    small = name == "tiny" or device.type == "cuda"

    # What is measured, of the codes x (batch, L) of the loop below.
    def train():
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            loss = training_loss(model, codebook, x, x[:, 0], layout, x)
        model.zero_grad()
        loss[0].backward()
        for optimizer in optimizers:
            optimizer.step()

    def draw():
        return sample(drawing, codebook, x[:, 0], layout, cfg=1.5)

    for batch in (1, 8, 64) if small else (1,):
        x = torch.zeros(batch, config.length, dtype=torch.long, device=device)
        measure(f"{name:5s}draw  ", batch, draw, draw, read)
        if device.type == "cuda":
            graph = SamplerGraph(drawing, codebook, layout, batch, torch.Generator(device), cfg=1.5)
            measure(f"{name:5s}graph ", batch, lambda: graph(x[:, 0]), draw, read)
        decode = functools.partial(tokenizer.decode_codes, x[:, layout.scales[-1]])
        measure(f"{name:5s}decode", batch, decode, decode)
    if small:
        x = torch.zeros(run.batch_size, config.length, dtype=torch.long, device=device)
        measure(f"{name:5s}train ", run.batch_size, train, train)


def main(arguments=None):
    """The command line of this file."""
    parser = ckgen.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", choices=train_tiny.RECIPES, help="(default: all)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.run(bench, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
