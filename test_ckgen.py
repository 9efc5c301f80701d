"""What must stay true of ckgen, stated as properties. Run: python -m pytest -q test_ckgen.py"""

import argparse
import contextlib
import csv
import inspect
import itertools
import math
import os
import re
import socket
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ckgen
import train_tiny
from ckgen import Checkerboard, Config, Layout, Tokenizer, TokenizerConfig

torch.set_num_threads(1)  # fastest at these sizes
HERE = os.path.dirname(os.path.abspath(__file__))
RATIOS = list(ckgen.SCALE_RATIOS)

# ------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize("name, index", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_an_index(monkeypatch, name, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    assert ckgen.pick_device(name) == torch.device("cuda", index)
    assert chosen == [index]


# ------------------------------------------------------------------------------------------------
# Scan order (Sec. 3.2, Algorithm 1, Fig. 3)

FIGURE_3 = """
     1  33   9  41   3  35  11  43
    49  17  57  25  51  19  59  27
    13  45   5  37  15  47   7  39
    61  29  53  21  63  31  55  23
     4  36  12  44   2  34  10  42
    52  20  60  28  50  18  58  26
    16  48   8  40  14  46   6  38
    64  32  56  24  62  30  54  22"""


def closed_form_rank(x, y, bits):
    """The rank of a cell by its coordinates' bits, most significant first."""
    rank = 0
    for level in range(bits):
        x_bit, y_bit = (x >> bits - 1 - level) & 1, (y >> bits - 1 - level) & 1
        rank += (2 * (x_bit ^ y_bit) + y_bit) * 4**level
    return rank


def test_order_is_figure_3():
    rank = {cell: i + 1 for i, cell in enumerate(ckgen.progressive_checkerboard(8))}
    table = [[rank[x, y] for x in range(8)] for y in range(8)]
    assert table == [
        [int(number) for number in row.split()] for row in FIGURE_3.strip().split("\n")
    ]


@pytest.mark.parametrize("size", range(1, 34))
def test_order_has_every_cell_once_and_the_closed_form(size):
    order = ckgen.progressive_checkerboard(size)
    bits = (size - 1).bit_length()
    cells = list(itertools.product(range(size), repeat=2))
    assert sorted(order) == cells
    assert order == sorted(cells, key=lambda cell: closed_form_rank(*cell, bits))


@pytest.mark.parametrize("size", range(1, 34))
def test_every_prefix_is_balanced_at_every_level(size):
    x, y = np.array(ckgen.progressive_checkerboard(size)).T
    side = 1 << (size - 1).bit_length()
    while side >= 1:
        whole = size // side  # quadtree cells wholly inside
        inside = (x // side < whole) & (y // side < whole)
        node = (y // side * whole + x // side)[inside]
        counts = np.zeros((size * size, whole * whole), int)  # of each node, as the prefix grows
        counts[np.flatnonzero(inside), node] = 1
        spread = np.ptp(counts.cumsum(0), axis=1) if whole else np.zeros(1)
        assert spread.max() <= 1, f"side {side}: unbalanced after cell {spread.argmax()}"
        side //= 2


def test_order_is_a_fresh_list_and_refuses_bad_sizes():
    ckgen.progressive_checkerboard(4).clear()
    assert len(ckgen.progressive_checkerboard(4)) == 16
    for size in (0, -3, 2.5, "8"):
        with pytest.raises(ValueError, match=re.escape(repr(size))):
            ckgen.progressive_checkerboard(size)


def test_order_and_blocks_work_pasted_into_an_empty_file():
    for function, arguments in (
        (ckgen.progressive_checkerboard, (6,)),
        (ckgen.split_blocks, ([1, 2, 3], 2)),
    ):
        names = {}
        exec(inspect.getsource(function), names)
        assert names[function.__name__](*arguments) == function(*arguments)


# ------------------------------------------------------------------------------------------------
# Blocks, scales, layout (Sec. 3.1, 3.2, Fig. 2, Fig. 4b)


def test_blocks_are_P_near_equal_segments():
    for size, steps in itertools.product(range(1, 34), (1, 2, 3, 4, 5, 7, 8, 16, 64, 2000)):
        order = ckgen.progressive_checkerboard(size)
        blocks = ckgen.split_blocks(order, steps)
        sizes = [len(block) for block in blocks]
        assert sum(blocks, []) == order
        assert len(blocks) == min(steps, size * size), (size, steps)
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1, (
            size,
            steps,
            sizes,
        )
    with pytest.raises(ValueError, match="0"):
        ckgen.split_blocks([1], 0)


def test_scales_are_figure_4b():
    assert {ratio: ckgen.scale_sizes(16, ratio) for ratio in RATIOS} == {
        "sqrt2": (1, 2, 3, 4, 6, 8, 11, 16),
        "2": (1, 2, 4, 8, 16),
        "3": (1, 2, 5, 16),
        "4": (1, 4, 16),
        "1": (16,),
    }
    for ratio, steps in (("2", 4), ("4", 8)):  # Table 1: 17 steps in all
        assert len(Layout.make(ckgen.scale_sizes(16, ratio), steps).steps) == 17
    with pytest.raises(ValueError, match="5"):
        ckgen.scale_sizes(16, "5")


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_layout_reads_the_block_before(ratio, steps):
    sizes = ckgen.scale_sizes(8, ratio)
    layout = Layout.make(sizes, steps)
    L = sum(n * n for n in sizes)
    assert sorted(layout.here[1:].tolist()) == list(range(L))
    assert [step.start for step in layout.steps] == [1] + [step.end for step in layout.steps[:-1]]
    previous = None
    for number, step in enumerate(layout.steps, 1):
        here, before = layout.here[step.start : step.end], layout.before[step.start : step.end]
        at = ckgen.scale_slices(sizes)[step.scale]
        assert (layout.block[step.start : step.end] == number).all()
        assert all(at.start <= location < at.stop for location in here.tolist())
        if previous is None or previous[0] != step.scale:
            assert (before == ckgen.EMPTY).all()
        else:
            assert before.tolist() == previous[1][: len(before)]
        previous = step.scale, here.tolist()


def test_mask_is_full_within_a_block_and_causal_between():
    layout = Layout.make((1, 2, 4), 2)
    for i, j in itertools.product(range(22), repeat=2):
        assert layout.mask()[i, j] == (layout.block[j] <= layout.block[i]), (i, j)
    assert layout.block.tolist() == [0] + [1] + [2] * 2 + [3] * 2 + [4] * 8 + [5] * 8


# ------------------------------------------------------------------------------------------------
# Model (Sec. 3.1, 3.4, Eq. 1)


def small_model(sizes, randomize=True, **options):
    """A small model, by default with all parameters random: nothing hides behind a zero."""
    torch.manual_seed(0)
    model = Checkerboard(
        Config(sizes, classes=3, codes=17, width=32, layers=3, heads=2, ffn=48, **options)
    )
    if randomize:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_pyramid(sizes, B=2, V=17):
    """Codes (B, L), labels (B,) and a codebook (V, C)."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(V, (B, sum(n * n for n in sizes)), generator=generator)
    return codes, torch.arange(B) % 3, F.normalize(torch.randn(V, 8, generator=generator), dim=-1)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("steps", [1, 3, 4])
@torch.no_grad()
def test_no_leak_from_later_blocks(ratio, steps):
    """Changing a code changes no logit of its own block or an earlier one, bit for bit."""
    sizes = ckgen.scale_sizes(5, ratio)
    layout, model = Layout.make(sizes, steps), small_model(sizes)
    codes, labels, codebook = random_pyramid(sizes)
    logits = model(codebook[codes], labels, layout)
    for step, token in [
        (step, token) for step in layout.steps for token in (step.start, step.end - 1)
    ]:
        changed, location = codes.clone(), layout.here[token]
        changed[:, location] = (changed[:, location] + 1) % 17
        difference = (model(codebook[changed], labels, layout) - logits).abs().amax((0, 2))  # (L,)
        assert not difference[
            : step.end - 1
        ].any(), f"{step} leaks into {difference.nonzero().flatten()}"
        if token == step.start and step is not layout.steps[-1]:
            assert difference[step.end - 1 :].any(), f"{step} reaches nothing"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gradient_to_later_codes_is_zero(ratio, steps):
    sizes = ckgen.scale_sizes(4, ratio)
    layout, model = Layout.make(sizes, steps), small_model(sizes)
    codes, labels, codebook = random_pyramid(sizes)
    latents = codebook[codes].requires_grad_()
    logits = model(latents, labels, layout)
    for step in layout.steps:
        loss = F.cross_entropy(
            logits[:, step.start - 1 : step.end - 1].flatten(0, 1),
            codes[:, layout.here[step.start : step.end]].flatten(),
        )
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        later = layout.here[step.start :]
        assert not gradient[:, later].any(), f"{step}: {gradient[:, later].abs().amax((0, 2))}"
        earlier = layout.here[1 : step.start]
        assert step is layout.steps[0] or gradient[:, earlier].any(), step


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mixing_layers", [0, 2, 3])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
@torch.no_grad()
def test_parallel_equals_cached(ratio, mixing_layers, cfg, monkeypatch):
    """One pass over the sampled codes gives the sampler's own logits, step by step."""
    sizes = ckgen.scale_sizes(5, ratio)
    layout, model = Layout.make(sizes, 3), small_model(sizes, mixing_layers=mixing_layers)
    _, labels, codebook = random_pyramid(sizes)
    seen = []
    draw = ckgen.draw
    monkeypatch.setattr(
        ckgen, "draw", lambda logits, *rest: (seen.append(logits), draw(logits, *rest))[1]
    )
    codes, entropy = ckgen.sample(
        model, codebook, labels, layout, cfg, cfg_start=2, return_entropy=True
    )
    cond = model(codebook[codes], labels, layout)
    uncond = model(codebook[codes], torch.full_like(labels, 3), layout)
    for t, step in enumerate(layout.steps):
        at = slice(step.start - 1, step.end - 1)
        expected = cond[:, at] + (cfg * (cond[:, at] - uncond[:, at]) if t >= 2 else 0)
        torch.testing.assert_close(seen[t], expected, rtol=1e-4, atol=1e-4)
        p = expected.softmax(-1)
        torch.testing.assert_close(
            entropy[:, layout.here[step.start : step.end]],
            -(p * p.log()).sum(-1),
            rtol=1e-3,
            atol=1e-3,
        )
    assert len(seen) == len(layout.steps)


def test_no_labels_give_no_codes():
    layout, model = Layout.make((1, 2), 4), small_model((1, 2))
    _, labels, codebook = random_pyramid((1, 2))
    assert ckgen.sample(model, codebook, labels[:0], layout, 1.5).shape == (0, 5)


def test_guidance_starts_at_its_step():
    sizes = (1, 2, 4, 8)
    layout, model = Layout.make(sizes, 4), small_model(sizes)
    labels, codebook = torch.arange(3), random_pyramid(sizes)[2]

    def draw(cfg, **options):
        return ckgen.sample(
            model,
            codebook,
            labels,
            layout,
            cfg,
            generator=torch.Generator().manual_seed(5),
            **options,
        )[:, layout.here[1:]]

    unguided, guided = draw(0.0), draw(2.0)  # the default start is step 5: from 4x4 on
    assert layout.steps[5].scale == 2
    begin = layout.steps[5].start - 1
    assert torch.equal(guided[:, :begin], unguided[:, :begin])
    assert not torch.equal(guided[:, begin:], unguided[:, begin:])
    assert torch.equal(draw(2.0, cfg_start=len(layout.steps)), unguided)


def test_temperature_zero_is_argmax_and_draws_follow_the_softmax():
    logits = torch.tensor([[[0.0, 1.0, -1.0]]])
    assert ckgen.draw(logits, 0).item() == 1
    draws = ckgen.draw(logits.expand(1, 20000, 3), 0.5, torch.Generator().manual_seed(0))
    shares = torch.bincount(draws.flatten(), minlength=3) / 20000
    torch.testing.assert_close(shares, (logits[0, 0] / 0.5).softmax(-1), atol=0.015, rtol=0)


def test_initialisation():
    sizes = (1, 2, 4, 8)
    model, layout = small_model(sizes, randomize=False), Layout.make(sizes, 4)
    codes, labels, codebook = random_pyramid(sizes)
    loss, by_scale = ckgen.loss_by_scale(model(codebook[codes], labels, layout), codes, layout)
    assert abs(loss.item() / math.log(17) - 1) < 0.02, loss
    for layer in model.layers:
        for norm in (layer.attn_norm, layer.ffn_norm):  # AdaLN starts as the plain norm
            shift, scale = norm.modulation(torch.randn(2, 32))
            assert not shift.any() and (scale == 1).all()
        for name, matrix in layer.named_parameters():
            if matrix.ndim == 2 and "shift_scale" not in name:
                assert 0.015 < matrix.std() < 0.025, (name, matrix.std())
    x = torch.randn(1, 2, 1 + 85, 16)
    ropes = model.rotary(layout)
    assert len(ropes) == 3 and torch.equal(ropes[2][:, 0], ropes[2][:, 1])
    queries = ropes[2][:, 0, 0, 0]  # RoPE starts as a rotation
    torch.testing.assert_close(ckgen.rotate(x, queries).norm(dim=-1), x.norm(dim=-1))
    assert len(torch.unique(queries[:, 1:], dim=1)[0]) == 85  # and tells all cells apart


def test_loss_is_the_flat_mean():
    sizes = (1, 2, 4)
    layout = Layout.make(sizes, 2)
    codes = random_pyramid(sizes)[0]
    logits = torch.randn(2, 21, 17)
    loss, by_scale = ckgen.loss_by_scale(logits, codes, layout)
    expected = F.cross_entropy(logits.flatten(0, 1), codes[:, layout.here[1:]].flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, (by_scale * torch.tensor([1.0, 4.0, 16.0])).sum() / 21)


@torch.no_grad()
def test_replaced_codes_touch_only_z_up():
    """With noise everywhere in a scale, its own logits stay and those of the next scale change."""
    sizes = (1, 2, 4)
    layout, model = Layout.make(sizes, 2), small_model(sizes)
    codes, labels, codebook = random_pyramid(sizes)
    noisy = codes.clone()
    at = ckgen.scale_slices(sizes)
    noisy[:, at[1]] = (noisy[:, at[1]] + 5) % 17
    clean = model(codebook[codes], labels, layout)
    changed = (model(codebook[codes], labels, layout, codebook[noisy]) - clean).abs().amax((0, 2))
    assert not changed[: at[2].start].any() and changed[at[2]].all(), changed


@torch.no_grad()
def test_z_up_comes_from_the_scale_before_and_has_unit_length():
    sizes = (1, 3, 4)
    latents = F.normalize(torch.randn(2, 26, 8), dim=-1)
    z_up = ckgen.upsample_pyramid(latents, sizes)
    at = ckgen.scale_slices(sizes)
    assert not z_up[:, at[0]].any()
    torch.testing.assert_close(z_up[:, at[1]], latents[:, :1].expand(-1, 9, -1))
    torch.testing.assert_close(z_up[:, at[2]], ckgen.upsample(latents[:, at[1]], 4))
    torch.testing.assert_close(z_up[:, 1:].norm(dim=-1), torch.ones(2, 25))


# ------------------------------------------------------------------------------------------------
# Fast paths equal the readable ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_through_a_linear_layer(dtype):
    """W x^T for few rows on a CPU, x W^T else: the same numbers and shapes, and gradients go on."""
    torch.manual_seed(0)
    layer = ckgen.Linear(48, 32).to(dtype)
    few = ckgen.FEW_ROWS[dtype]
    for batch, rows in [(1, 1), (1, few.start), (2, few.stop // 4), (1, few.stop - 1), (2, 300)]:
        x = torch.randn(batch, rows, 48).to(dtype)
        expected = F.linear(x, layer.weight)
        assert layer(x).requires_grad and torch.equal(layer(x), expected)
        with torch.no_grad():
            assert layer(x).shape == expected.shape
            assert layer(x).is_contiguous() == (batch * rows not in few)
            torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_bfloat16_stays_close_to_float32():
    sizes = (1, 2, 4, 8)
    layout, model = Layout.make(sizes, 4), small_model(sizes)
    codes, labels, codebook = random_pyramid(sizes)
    logits = model(codebook[codes], labels, layout)
    model, codebook = model.bfloat16(), codebook.bfloat16()
    rough = model(codebook[codes], labels, layout)
    assert rough.dtype == torch.float32
    error = (rough - logits).square().mean().sqrt() / logits.std()
    assert 0 < error < 0.05, error  # bfloat16 keeps 8 bits: 0.004 for one rounding
    codes, entropy = ckgen.sample(model, codebook, labels, layout, 1.5, return_entropy=True)
    assert codes.shape == (2, 85) and entropy.dtype == torch.float32
    assert 0 <= codes.min() and codes.max() < 17 and entropy.isfinite().all()


class Watch(TorchDispatchMode):
    """Raises where PyTorch would make the host wait for the GPU, or send it data. On the meta
    device tensors have no data, so that whatever needs their values, like .item(), raises too."""

    WAITING = ("multinomial", "nonzero", "masked_select", "_local_scalar_dense", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert function.overloadpacket.__name__ not in self.WAITING, function
        for tensor in tree_leaves((args, kwargs, out)):
            if torch.is_tensor(tensor):
                assert tensor.device.type == "meta", f"{function} between host and device"
                assert "index" not in str(function) or tensor.dtype != torch.bool, function
        return out


@pytest.mark.parametrize("cfg", [0.0, 1.5, torch.tensor(1.5, device="meta")])
def test_sampling_never_waits_for_the_gpu(cfg):
    sizes = (1, 2, 4, 8)
    layout, model = Layout.make(sizes, 4, "meta"), small_model(sizes).to("meta")
    _, labels, codebook = random_pyramid(sizes)
    labels, codebook = labels.to("meta"), codebook.to("meta")
    temperature = cfg / 2 if torch.is_tensor(cfg) else 0.7
    with Watch():
        codes = ckgen.sample(model, codebook, labels, layout, cfg, 5, temperature)
        assert codes.shape == (2, 85)
        for waits in (
            lambda: torch.multinomial(codebook.abs(), 1),
            lambda: codes[:, torch.tensor([0])],
            lambda: codes.index_put_((codes > 3,), codes[0, 0]),
        ):  # what it catches, beyond what the meta device refuses
            with pytest.raises(AssertionError):
                waits()


class RecordedGraph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph does, for the CPU: captures the operations on the way, and replays
    them on the very same tensors. A value that went in as a constant stays what it was."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def register_generator_state(self, generator):
        self.generator = generator

    def __enter__(self):
        self.before = self.generator.get_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.generator.set_state(self.before)  # capturing a CUDA graph draws nothing

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, captured in self.calls:
            for old, new in zip(captured, tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # not a view and not in place


@pytest.fixture(params=["recorded", "cuda"])
def graph_device(request, monkeypatch):
    """CUDA where there is one, and the CPU with RecordedGraph in the place of CUDA's."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        return "cuda"

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_graph_equals_eager(graph_device, guided, dtype):
    """Other labels, guidance, temperature and seed need no new graph, and draw what `sample` does;
    so do weights that were changed in place."""
    sizes = (1, 2, 4)
    layout, model = Layout.make(sizes, 4, graph_device), small_model(sizes).to(graph_device, dtype)
    codebook = random_pyramid(sizes)[2].to(graph_device, dtype)
    generator = torch.Generator(graph_device)
    graph = ckgen.SamplerGraph(model, codebook, layout, 3, generator, guided, cfg_start=2)
    drawn = []
    for labels, cfg, temperature, seed in (
        ([0, 1, 2], 1.5, 1.0, 0),
        ([2, 2, 0], 1.5, 1.0, 0),
        ([2, 2, 0], 0.5, 1.0, 0),
        ([2, 2, 0], 0.5, 0.25, 0),
        ([2, 2, 0], 0.5, 0.25, 1),
        ([2, 2, 0], 0.5, 0.0, 1),
        ([0, 1, 2], 0.5, 0.0, 1),
    ):
        cfg, labels = cfg if guided else 0.0, torch.tensor(labels, device=graph_device)
        model.class_embed.weight[0] += 1
        again = torch.Generator(graph_device).manual_seed(seed)
        expected = ckgen.sample(model, codebook, labels, layout, cfg, 2, temperature, again)
        generator.manual_seed(seed)
        drawn.append(graph(labels, cfg, temperature))
        assert torch.equal(drawn[-1], expected), (drawn[-1] != expected).nonzero()
        after = [g.get_state() for g in (generator, again)]
        assert torch.equal(*after), "the generators stand at different places"
    assert sum(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2)) <= 1 - guided
    with pytest.raises(ValueError, match="captured for 3 labels"):
        graph(labels[:1], 0.0)
    if not guided:
        with pytest.raises(ValueError, match="got 3 labels, cfg 1"):
            graph(labels, 1.0)


@torch.no_grad()
def test_graph_keeps_what_it_reads(graph_device, monkeypatch):
    """A CUDA graph reads addresses: a table freed after the capture would be read all the same."""

    def record_nothing(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

    monkeypatch.setattr(RecordedGraph, "__torch_dispatch__", record_nothing)
    layout, model = Layout.make((1, 2), 4, graph_device), small_model((1, 2)).to(graph_device)
    codebook = random_pyramid((1, 2))[2].to(graph_device)
    read = [weakref.ref(x) for x in (codebook, layout.here, layout.before, model)]
    graph = ckgen.SamplerGraph(model, codebook, layout, 3, torch.Generator(graph_device))
    del layout, model, codebook
    assert all(reference() is not None for reference in read)
    read.append(weakref.ref(graph.graph))
    del graph
    assert not any(reference() is not None for reference in read), "freed at once, not by gc"


def test_generated_by_graph_equals_eager(graph_device):
    sizes = (1, 2)
    tokenizer = Tokenizer(TokenizerConfig(codes=17, width=8)).to(graph_device)
    layout, model = Layout.make(sizes, 4, graph_device), small_model(sizes).to(graph_device)
    labels = torch.arange(64 * 2 + 5, device=graph_device) % 3
    for cfg in (0.0, 1.5):
        eager, graph = (
            torch.cat(list(ckgen.generate(model, tokenizer, labels, layout, 0, cfg, graph=graph)))
            for graph in (False, True)
        )
        assert len(eager) == len(labels) and torch.equal(eager, graph)


def test_a_random_P_never_recompiles():
    """The layout's tables are tensors: torch.compile sees the same code for every P."""
    sizes = (1, 2, 4)
    model = small_model(sizes)
    codes, labels, codebook = random_pyramid(sizes)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(codebook[codes], labels, Layout.make(sizes, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for steps in (2, 4, 1):
            layout = Layout.make(sizes, steps)
            expected = model(codebook[codes], labels, layout)
            assert torch.equal(compiled(codebook[codes], labels, layout), expected), steps


# ------------------------------------------------------------------------------------------------
# Tokenizer and pictures (Sec. 3.3, Fig. 1)


@torch.no_grad()
def test_every_scale_is_encoded_from_the_image_by_itself():
    torch.manual_seed(0)
    tokenizer, sizes = Tokenizer(TokenizerConfig(codes=32)), (1, 2, 4)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode_pyramid(images, sizes)
    for n, at in zip(sizes, ckgen.scale_slices(sizes)):
        alone = F.interpolate(images, (4 * n, 4 * n), mode="bilinear")
        assert torch.equal(codes[:, at], tokenizer.quantize(tokenizer.encode(alone)).flatten(1))
        assert tokenizer.decode_codes(codes[:, at]).shape == (3, 3, 4 * n, 4 * n)
    latents = tokenizer.encode(images)  # nearest = smallest distance
    distances = torch.cdist(latents.permute(0, 2, 3, 1).flatten(1, 2), tokenizer.codebook()[None])
    assert torch.equal(distances.argmin(-1).view(3, 4, 4), tokenizer.quantize(latents))
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(3, 4, 4))


@torch.no_grad()
def test_progress_frames_show_only_what_was_sampled():
    torch.manual_seed(0)
    tokenizer, layout = Tokenizer(TokenizerConfig(codes=32)), Layout.make((1, 2, 4), 4)
    codes = torch.randint(32, (2, 21))
    frames = ckgen.progress_frames(tokenizer, codes, layout)
    assert len(frames) == len(layout.steps) == 9
    assert np.array_equal(frames[-1], ckgen.decode_scale(tokenizer, codes, layout.sizes))
    for frame, (scale, start, end) in zip(frames, layout.steps):
        shown = (frame != 128).any(-1).mean()
        n = layout.sizes[scale]
        assert abs(shown - (end - (1, 2, 6)[scale]) / n**2) < 0.02, (scale, start, shown)
        later = codes.clone()
        later[:, layout.here[end:]] = 0
        assert np.array_equal(
            frame,
            ckgen.progress_frames(tokenizer, later, layout)[
                layout.steps.index((scale, start, end))
            ],
        )


# ------------------------------------------------------------------------------------------------
# Released models


def released_shapes(
    D=32, H=2, V=24, classes=5, layers=3, ffn=48, mixing=2, L=21, ch=32, levels=2, z=64
):
    """Keys and shapes of a small model in the author's format."""
    shapes = {
        "empty_token_emb": [D],
        "empty_token_pos": [D],
        "llama.norm.weight": [D],
        "llama.rotary_emb.mixing_coeffs": [mixing, H],
        "llama.rotary_emb.position_embeddings.parametrizations.weight.original": [
            L + 2,
            2 * D // H,
        ],
        "class_embeddings.weight": [classes + 1, D],
        "embed_positions.weight": [L, D],
    }
    for i in range(layers):
        layer = f"llama.layers.{i}."
        shapes |= {
            layer + "attention.wqkv.weight": [3 * D, D],
            layer + "attention.wo.weight": [D, D],
            layer + "feed_forward.w1.weight": [ffn, D],
            layer + "feed_forward.w2.weight": [D, ffn],
            layer + "feed_forward.w3.weight": [ffn, D],
            layer + "attention_norm.weight": [D],
            layer + "ffn_norm.weight": [D],
        }
        for part in ("input", "post_attention"):
            shapes |= {
                f"{layer}{part}_modulation.adaLN_modulation.1.weight": [2 * D, D],
                f"{layer}{part}_modulation.adaLN_modulation.1.bias": [2 * D],
            }
    for name, o, i in (
        ("embed_codevecs_mlp.net.0", 64, 8),
        ("embed_codevecs_mlp.net.2", 64, 64),
        ("embed_codevecs_mlp.net.4", D, 64),
        ("src_latents_proj", D, D),
        ("combine_inputs", D, 4 * D),
        ("lm_head", V, D),
    ):
        shapes |= {name + ".weight": [o, i], name + ".bias": [o]}
    convolutions = [
        ("encoder.conv_in", ch, 3, 3),
        ("encoder.conv_out", z, ch, 3),
        ("decoder.conv_in", ch, z, 3),
        ("decoder.conv_out", 3, ch, 3),
        ("quant_conv", 8, z, 1),
        ("post_quant_conv", z, 8, 1),
        ("encoder.conv_blocks.0.downsample.conv", ch, ch, 3),
        ("decoder.conv_blocks.0.upsample.conv", ch, ch, 3),
    ]
    norms = ["encoder.norm_out", "decoder.norm_out"]
    residual = [
        f"{side}.conv_blocks.{i}.res.{j}"
        for side, count in (("encoder", 1), ("decoder", 2))
        for i in range(levels)
        for j in range(count)
    ]
    for block in residual + [f"{side}.mid.{i}" for side in ("encoder", "decoder") for i in (0, 2)]:
        convolutions += [(f"{block}.conv{i}", ch, ch, 3) for i in (1, 2)]
        norms += [f"{block}.norm{i}" for i in (1, 2)]
    for block in (
        "encoder.conv_blocks.1.attn.0",
        "decoder.conv_blocks.0.attn.0",
        "decoder.conv_blocks.0.attn.1",
        "encoder.mid.1",
        "decoder.mid.1",
    ):
        convolutions += [(f"{block}.{name}", ch, ch, 1) for name in ("q", "k", "v", "proj_out")]
        norms += [f"{block}.norm"]
    for name, o, i, k in convolutions:
        shapes |= {f"autoenc.{name}.weight": [o, i, k, k], f"autoenc.{name}.bias": [o]}
    for name in norms:
        shapes |= {f"autoenc.{name}.weight": [ch], f"autoenc.{name}.bias": [ch]}
    return shapes | {
        "autoenc.quantize.embedding.parametrizations.weight.original": [V, 8],
        "autoenc.quantize.initialized": [],
        "autoenc.cluster_usage_train": [V],
    }


def released_file(path, **changes):
    """Write a random model in the author's format, as the author's program would."""
    tensors = {key: torch.randn(shape) for key, shape in released_shapes().items()} | changes
    args = argparse.Namespace(batch_size=64)
    torch.save(
        {
            "model": {k: v for k, v in tensors.items() if v is not None},
            "model_ema": None,
            "args": args,
        },
        path,
    )
    return tensors


def test_released_tensors_land_in_their_places(tmp_path):
    theirs = released_file(tmp_path / "checkpoint-last.pth")
    model, tokenizer, classes, defaults = ckgen.load(tmp_path / "checkpoint-last.pth")
    assert model.config == Config((1, 2, 4), 5, 24, 8, 32, 3, 2, 48, 2)
    assert tokenizer.config == TokenizerConfig(24, 8, 2, 64, (32, 32), 1)
    assert classes == ["0", "1", "2", "3", "4"] and defaults["cfg"] == 1.5
    places = {
        "llama.layers.1.attention.wqkv.weight": model.layers[1].attn.qkv.weight,
        "llama.layers.1.attention.wo.weight": model.layers[1].attn.out.weight,
        "llama.layers.2.feed_forward.w1.weight": model.layers[2].ffn.gate.weight,
        "llama.layers.2.feed_forward.w3.weight": model.layers[2].ffn.up.weight,
        "llama.layers.2.feed_forward.w2.weight": model.layers[2].ffn.down.weight,
        "llama.layers.0.attention_norm.weight": model.layers[0].attn_norm.norm.weight,
        "llama.layers.0.ffn_norm.weight": model.layers[0].ffn_norm.norm.weight,
        "llama.layers.0.input_modulation.adaLN_modulation.1.bias": model.layers[
            0
        ].attn_norm.shift_scale.bias,
        "llama.layers.0.post_attention_modulation.adaLN_modulation.1.bias": model.layers[
            0
        ].ffn_norm.shift_scale.bias,
        "llama.rotary_emb.mixing_coeffs": model.rope_mix,
        "llama.norm.weight": model.norm.weight,
        "llama.rotary_emb.position_embeddings.parametrizations.weight.original": model.rope,
        "embed_positions.weight": model.pos_embed,
        "class_embeddings.weight": model.class_embed.weight,
        "empty_token_emb": model.empty_code,
        "empty_token_pos": model.empty_pos,
        "embed_codevecs_mlp.net.2.weight": model.unfold[2].weight,
        "src_latents_proj.bias": model.up_proj.bias,
        "combine_inputs.weight": model.combine.weight,
        "lm_head.weight": model.head.weight,
        "autoenc.quantize.embedding.parametrizations.weight.original": tokenizer.codebook_weight,
        "autoenc.quant_conv.weight": tokenizer.to_latent.weight,
        "autoenc.post_quant_conv.bias": tokenizer.from_latent.bias,
        "autoenc.encoder.mid.1.proj_out.weight": tokenizer.encoder.mid[1].out.weight,
        "autoenc.encoder.conv_blocks.0.downsample.conv.weight": tokenizer.encoder.levels[
            0
        ].resample.conv.weight,
        "autoenc.decoder.conv_blocks.0.attn.1.q.weight": tokenizer.decoder.levels[0]
        .attn[1]
        .q.weight,
        "autoenc.decoder.conv_blocks.1.res.1.conv2.weight": tokenizer.decoder.levels[1]
        .res[1]
        .conv2.weight,
    }
    for key, place in places.items():
        assert torch.equal(theirs[key], place), key
    ours = sum(
        tensor.numel() for part in (model, tokenizer) for tensor in part.state_dict().values()
    )
    assert (
        ours == sum(tensor.numel() for tensor in theirs.values()) - 24 - 1
    )  # but for two statistics


def test_older_released_files_lack_a_projection(tmp_path):
    released_file(
        tmp_path / "old.pth", **{"src_latents_proj.weight": None, "src_latents_proj.bias": None}
    )
    model = ckgen.load(tmp_path / "old.pth").model
    assert torch.equal(model.up_proj.weight, torch.eye(32)) and not model.up_proj.bias.any()


@pytest.mark.parametrize("layout", ["state_dict", "model", None])
def test_tokenizer_files_in_three_layouts(tmp_path, layout):
    tensors = {
        key.removeprefix("autoenc."): torch.randn(shape)
        for key, shape in released_shapes().items()
        if key.startswith("autoenc.")
    }
    if layout == "model":  # as in LlamaGen's file
        tensors["quantize.embedding.weight"] = tensors.pop(
            "quantize.embedding.parametrizations.weight.original"
        )
        tensors["quantize.codebook_used"] = torch.zeros(7)
    torch.save({layout: tensors} if layout else tensors, tmp_path / "tokenizer.pt")
    tokenizer = ckgen.load_tokenizer(tmp_path / "tokenizer.pt")
    assert torch.equal(tokenizer.decoder.conv_out.weight, tensors["decoder.conv_out.weight"])
    codes = tokenizer.encode_pyramid(torch.rand(2, 3, 8, 8) * 2 - 1, (2, 4))
    assert codes.shape == (2, 20) and tokenizer.decode_codes(codes[:, 4:]).shape == (2, 3, 8, 8)


GOLDEN = os.environ.get("CKGEN_GOLDEN")


@pytest.mark.skipif(
    not GOLDEN,
    reason="CKGEN_GOLDEN names no folder with checkpoint-last.pth, autoenc/checkpoint.pth "
    "and expected.npz: a model in the author's released format, what the author's code says of it",
)
def test_released_model_number_for_number(tmp_path):
    expected = {
        key: torch.from_numpy(value) for key, value in np.load(f"{GOLDEN}/expected.npz").items()
    }
    model, tokenizer, *_ = ckgen.load(f"{GOLDEN}/checkpoint-last.pth")
    sizes, labels = model.config.sizes, expected["labels"]
    assert list(sizes) == expected["scale_sizes"].tolist()
    alone = ckgen.load_tokenizer(f"{GOLDEN}/autoenc/checkpoint.pth")
    assert all(
        torch.equal(a, b)
        for a, b in zip(tokenizer.state_dict().values(), alone.state_dict().values())
    )

    def pyramid(key):
        return torch.cat([expected[f"{key}_s{n}"].flatten(1) for n in sizes], 1)

    with torch.no_grad():
        codes = tokenizer.encode_pyramid(expected["images"], sizes)
        assert torch.equal(codes, pyramid("q_inds").long())
        for n, at in zip(sizes, ckgen.scale_slices(sizes)):
            torch.testing.assert_close(
                tokenizer.decode(expected[f"zq_s{n}"]), expected[f"dec_s{n}"], atol=1e-3, rtol=0
            )
        codebook = tokenizer.codebook()
        for P in (1, 2, 4, 8):
            layout = Layout.make(sizes, P)
            logits = model(codebook[codes], labels, layout)
            torch.testing.assert_close(logits, expected[f"tf_logits_P{P}"], atol=1e-3, rtol=0)
            loss, by_scale = ckgen.loss_by_scale(logits, codes, layout)
            torch.testing.assert_close(loss, expected[f"tf_loss_P{P}"].float(), atol=1e-4, rtol=0)
            torch.testing.assert_close(
                by_scale, expected[f"tf_loss_by_scale_P{P}"].float(), atol=1e-4, rtol=0
            )
    for (name, cfg), P in itertools.product({"cfg0": 0.0, "cfg1p5": 1.5}.items(), (4, 8)):
        drawn, entropy = ckgen.sample(
            model, codebook, labels, Layout.make(sizes, P), cfg, temperature=0, return_entropy=True
        )
        assert torch.equal(drawn, pyramid(f"am_{name}_P{P}_tokens").long())
        torch.testing.assert_close(entropy, pyramid(f"am_{name}_P{P}_entropy"), atol=1e-3, rtol=0)
        ckgen.main(
            [
                f"{GOLDEN}/checkpoint-last.pth",
                "--class",
                str(labels[0].item()),
                "--n",
                "1",
                "--steps",
                str(P),
                "--cfg",
                str(cfg),
                "--temperature",
                "0",
                "--out",
                str(tmp_path / "one.png"),
                "--device",
                "cpu",
            ]
        )
        picture = np.asarray(Image.open(tmp_path / "one.png")).astype(int).transpose(2, 0, 1)
        assert abs(picture - expected[f"am_{name}_P{P}_image_u8"][0].numpy()).max() <= 1


def test_bad_released_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    released_file(tmp_path / "ok.pth")
    torch.save({"model": {"lm_head.weight": torch.zeros(3, 3)}}, tmp_path / "bare.pth")
    released_file(tmp_path / "missing.pth", **{"lm_head.bias": None, "llama.norm.weight": None})
    released_file(tmp_path / "shape.pth", **{"combine_inputs.weight": torch.zeros(32, 96)})
    for arguments, complaint in (
        (["missing.pth"], "llama.norm.weight is missing, not (32,); lm_head.bias is missing"),
        (["shape.pth"], "combine_inputs.weight is (32, 96), not (32, 128)"),
        (["bare.pth"], "is missing"),
        (["ok.pth", "--class", "5"], "--class 5"),
        (["ok.pth", "--class", "dog"], "--class dog"),
    ):
        refuse(ckgen.main, arguments, complaint, tmp_path, capfd)


# ------------------------------------------------------------------------------------------------
# Training


def make_batch(codes, labels, layouts, classes, step, recipe=train_tiny.RECIPES["tiny"], V=17):
    """The Batch that training draws at a step from codes (n, L)."""
    data = train_tiny.Data(None, labels, None, None, list(range(classes)))
    return train_tiny.draw_batch(
        codes[:, None].numpy().astype(np.uint16),
        torch.arange(len(codes)),
        data,
        layouts,
        V,
        recipe,
        len(codes),
        train_tiny.seeded(0, 2, step),
    )


def test_overfits_a_handful_of_images_and_gives_them_back():
    images, labels = train_tiny.draw_shapes(4, 16, seed=0)
    torch.manual_seed(0)
    sizes, tokenizer = (1, 2, 4), Tokenizer(TokenizerConfig(codes=64))
    codes = tokenizer.encode_pyramid(train_tiny.as_input(images), sizes)
    codebook = tokenizer.codebook()
    model = Checkerboard(Config(sizes, classes=4, codes=64, width=64, layers=2, heads=4, ffn=96))
    optimizers = train_tiny.make_optimizers(model, train_tiny.RECIPES["tiny"])
    layouts = train_tiny.training_layouts(sizes, "cpu")
    for step in range(240):
        for optimizer, rate in zip(optimizers, (3e-3, 0.02)):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / 240)
        model.zero_grad()
        train_tiny.backward(model, codebook, make_batch(codes, labels, layouts, 4, step), 1)
        for optimizer in optimizers:
            optimizer.step()
    for steps in (1, 2, 4):
        layout = Layout.make(sizes, steps)
        loss = ckgen.loss_by_scale(model(codebook[codes], labels, layout), codes, layout)[0].item()
        drawn = ckgen.sample(model, codebook, labels, layout, temperature=0)
        assert loss < 0.05 and torch.equal(drawn, codes), (steps, loss, (drawn != codes).sum())
        assert torch.equal(
            tokenizer.decode_codes(drawn[:, 5:]), tokenizer.decode_codes(codes[:, 5:])
        )


def test_a_batch_draws_P_drops_labels_and_replaces_codes():
    """Every power of two up to the side of the map is drawn, and a tenth of labels and codes."""
    codes, labels, _ = random_pyramid((1, 2, 4), B=64)
    layouts = train_tiny.training_layouts((1, 2, 4), "cpu")
    batches = [
        make_batch(codes, labels, layouts, 3, step, train_tiny.RECIPES["S"]) for step in range(60)
    ]
    assert {len(batch.layout.steps) for batch in batches} == {3, 1 + 2 + 2, 1 + 4 + 4}
    dropped = torch.stack([batch.labels == 3 for batch in batches]).float().mean().item()
    assert abs(dropped - 0.1) < 0.02, dropped
    replaced = torch.stack([batch.noisy != batch.codes for batch in batches]).float().mean().item()
    assert abs(replaced - 0.1 * 16 / 17) < 0.01, replaced
    rows = {tuple(row) for row in codes.tolist()}
    assert all(
        tuple(row) in rows for batch in batches for row in batch.codes.tolist()
    )  # never replaced
    tiny = make_batch(codes, labels, layouts, 3, 0)
    assert torch.equal(tiny.noisy, tiny.codes)


def test_accumulated_gradients_equal_those_of_one_batch():
    sizes = (1, 2, 4)
    codes, labels, codebook = random_pyramid(sizes, B=12)
    model, layouts = small_model(sizes), train_tiny.training_layouts(sizes, "cpu")
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        losses = train_tiny.backward(
            model, codebook, make_batch(codes, labels, layouts, 3, 0), parts
        )
        gradients.append([parameter.grad.clone() for parameter in model.parameters()] + [losses])
    for whole, parts in zip(*gradients):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_learning_rates_of_the_paper():
    """Sec. 4.1, in epochs of ten steps."""

    def rates(name, steps):
        recipe = train_tiny.RECIPES[name]
        return [
            round(recipe.lr * train_tiny.learning_rate(recipe, step, 10 * recipe.epochs), 9)
            for step in steps
        ]

    assert rates("S", (0, 9, 999, 1000, 1049, 1050, 1099)) == [
        1e-5,
        1e-4,
        1e-4,
        3.1623e-5,
        3.1623e-5,
        1e-5,
        1e-5,
    ]
    assert rates("L", (0, 9, 1999, 2000, 2059)) == [5e-6, 5e-5, 5e-5, 1e-5, 1e-5]
    parts = [
        train_tiny.accumulated(train_tiny.RECIPES["L"], step, 2060)
        for step in (0, 2049, 2050, 2059)
    ]
    assert parts == [1, 1, 5, 5]  # 64 images, then 320


def test_codebook_follows_its_latents_and_revives_unused_codes():
    torch.manual_seed(0)
    generator, tokenizer = torch.Generator().manual_seed(0), Tokenizer(TokenizerConfig(codes=16))
    centres = F.normalize(torch.randn(8, 8), dim=-1)
    near = F.normalize(centres + 0.2 * torch.randn(8, 8), dim=-1)
    tokenizer.codebook_weight.copy_(torch.cat([near, -centres]))  # eight good codes, eight lost
    for _ in range(600):
        latents = F.normalize(centres.repeat(8, 1) + 0.02 * torch.randn(64, 8), dim=-1)
        codes = (latents @ tokenizer.codebook().T).argmax(-1)
        train_tiny.update_codebook(tokenizer, latents, codes, generator)
    closest = (tokenizer.codebook() @ centres.T).amax(-1)
    assert closest.min() > 0.99, closest
    assert (centres @ tokenizer.codebook().T).amax(-1).min() > 0.99
    train_tiny.start_codebook(tokenizer, latents, generator)  # k-means finds them as well
    assert (latents @ tokenizer.codebook().T).amax(-1).mean() > 0.99


@pytest.fixture
def miniature(monkeypatch):
    """train_tiny.main at a size that takes a second, on 64 toy images."""
    draw = train_tiny.draw_shapes
    recipe = replace(
        train_tiny.RECIPES["tiny"],
        width=32,
        layers=2,
        heads=2,
        ffn=48,
        image_size=16,
        tokenizer_iters=12,
        tokenizer_codes=16,
        iters=12,
        batch_size=4,
    )
    monkeypatch.setitem(train_tiny.RECIPES, "tiny", recipe)
    monkeypatch.setattr(
        train_tiny,
        "toy_data",
        lambda size: train_tiny.Data(*draw(64, size, 0), *draw(16, size, 1), train_tiny.SHAPES),
    )
    return lambda *arguments: train_tiny.main(["--device", "cpu", *map(str, arguments)])


def weights(folder):
    state = ckgen.read_checkpoint(os.path.join(folder, "checkpoint.pt"))
    return {
        f"{part}.{key}": value
        for part in ("tokenizer", "transformer")
        for key, value in state[part].items()
    }


@pytest.mark.parametrize("stop", [3, 9, 13, 19, 23])
def test_resume_equals_uninterrupted(miniature, tmp_path, monkeypatch, capsys, stop):
    """Stopped at any step of either stage, just after a checkpoint or later, a run ends with
    the same weights, the same pictures and the same log."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    miniature("--out", whole)
    steps, watch = itertools.count(), train_tiny.Run.watch

    def interrupt(run, stage, step, iters, loss, bar):
        if (count := next(steps)) == stop:
            raise KeyboardInterrupt
        return watch(run, stage, step, iters, loss, bar) or count % 4 == 0

    monkeypatch.setattr(train_tiny.Run, "watch", interrupt)
    with pytest.raises(SystemExit) as stopped:
        miniature("--out", broken)
    assert stopped.value.code == 130
    monkeypatch.setattr(train_tiny.Run, "watch", watch)
    miniature("--out", broken)
    assert "going on" in capsys.readouterr().out
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[key]), key
    for name in ("samples.png", "progress.gif", "pyramid.png", "codes.npy"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    rows = [
        [
            {key: row[key] for key in row if key != "tokens_per_s"}
            for row in csv.DictReader(open(run / "log.csv"))
        ]
        for run in (whole, broken)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 12


def test_same_seed_same_weights_and_another_seed_others(miniature, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        miniature("--out", tmp_path / name, "--seed", seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_used_folders(miniature, tmp_path, capsys):
    out = tmp_path / "run"
    miniature("--out", out)
    before = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    miniature("--out", out)  # finished: says where the pictures are
    said = capsys.readouterr().out
    assert "finished" in said and str(out / "samples.png") in said
    with pytest.raises(SystemExit) as refused:
        miniature("--out", out, "--seed", 7)
    assert refused.value.code == 2 and "--seed 0, not 7" in capsys.readouterr().err
    assert (out / "checkpoint.pt").read_bytes() == before
    miniature("--out", out, "--seed", 7, "--overwrite")
    assert ckgen.read_checkpoint(out / "checkpoint.pt")["options"]["seed"] == 7


def test_a_loss_that_is_no_number_stops_the_run(miniature, tmp_path, monkeypatch):
    loss = train_tiny.training_loss
    monkeypatch.setattr(
        train_tiny, "training_loss", lambda *rest: [x * float("nan") for x in loss(*rest)]
    )
    with pytest.raises(SystemExit) as stopped:
        miniature("--out", tmp_path / "run")
    assert re.search(
        r"transformer is nan at step 0.*checkpoint\.pt, has 12 steps of the tokenizer",
        stopped.value.code,
    )
    assert "transformer" not in ckgen.read_checkpoint(tmp_path / "run" / "checkpoint.pt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError):
        ckgen.write_whole(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------
# Pictures of one's own


def test_reads_whatever_pillow_opens(tmp_path):
    colour = Image.new("RGB", (40, 20), (200, 30, 60))
    colour.paste((0, 0, 250), (0, 0, 20, 20))  # left half blue
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned right by 90 degrees
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    files = {
        "l.png": Image.new("L", (9, 9), 77),
        "p.gif": colour.convert("P"),
        "rgba.png": clear,
        "i16.png": Image.fromarray(np.full((8, 8), 77 * 257, np.uint16)),
        "cmyk.jpg": colour.convert("CMYK"),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    colour.save(tmp_path / "turned.png", exif=turned)
    read = {name: train_tiny.read_image(tmp_path / name, 8) for name in [*files, "turned.png"]}
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.uint8 for image in read.values())
    assert (
        (read["l.png"] == 77).all()
        and (read["i16.png"] == 77).all()
        and (read["rgba.png"] == 255).all()
    )
    assert (
        read["p.gif"][2, :, 0].min() > 200 and read["p.gif"][0, :, 7].min() > 150
    )  # blue left, red right
    assert (
        read["turned.png"][2, 0].min() > 200 and read["turned.png"][0, 7].min() > 150
    )  # blue on top


def test_ten_crops():
    images = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(2, 3, 6, 6)
    data = train_tiny.Data(images, torch.zeros(2), torch.zeros(0, 3, 4, 4), torch.zeros(0), ["a"])
    crops = [data.crop(data.images, view) for view in range(data.views)]
    assert len(crops) == 10 and all(crop.shape == (2, 3, 4, 4) for crop in crops)
    assert [crop[0, 0, 0, 0].item() for crop in crops[:5]] == [
        0,
        2,
        12,
        14,
        7,
    ]  # corners, then centre
    assert all(
        torch.equal(plain.flip(-1), mirrored) for plain, mirrored in zip(crops[:5], crops[5:])
    )
    toy = train_tiny.Data(images, torch.zeros(2), images[:0], torch.zeros(0), ["a"])
    assert toy.views == 1 and torch.equal(toy.crop(images, 0), images)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 3 classes with 40 pictures each."""
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (20, 24), (i, 5 * i, 60 * len(name))).save(
                tmp_path / f"pictures/{name}/{i}.png"
            )
    return tmp_path / "pictures"


def test_folder_data(pictures, capsys):
    (pictures / "ant" / ".hidden").write_text("no picture")
    (pictures / "bee" / "broken.png").write_bytes(b"\x89PNG broken")
    data = train_tiny.folder_data(str(pictures), 8)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.images.shape == (114, 3, 9, 9) and data.held_out.shape == (6, 3, 8, 8)
    assert torch.bincount(data.held_out_labels).tolist() == [2, 2, 2]
    assert "broken.png" in capsys.readouterr().err
    (pictures / "cat" / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 122"):
        train_tiny.folder_data(str(pictures), 8)


# ------------------------------------------------------------------------------------------------
# ImageNet's path: a given tokenizer, coding from files, several processes


@pytest.fixture
def vqgan(tmp_path):
    """A random tokenizer of the VQGAN form, stride 2, 24 codes, in the author's format."""
    torch.manual_seed(0)
    tensors = {
        key.removeprefix("autoenc."): 0.2 * torch.randn(shape)
        for key, shape in released_shapes().items()
        if key.startswith("autoenc.")
    }
    torch.save({"state_dict": tensors}, tmp_path / "vqgan.pt")
    return tmp_path / "vqgan.pt"


def test_pictures_from_files_equal_pictures_in_memory(pictures, monkeypatch):
    (pictures / "bee" / "broken.png").write_bytes(b"no picture")
    memory = train_tiny.folder_data(str(pictures), 8)
    monkeypatch.setattr(train_tiny, "IN_MEMORY", 0)
    files = train_tiny.folder_data(str(pictures), 8)
    assert isinstance(files.images, train_tiny.Pictures) and files.views == memory.views == 10
    read = files.images[torch.arange(len(files.images))]
    bad = [path.endswith("broken.png") for path in files.images.paths]
    assert sum(bad) == 1 and files.images.bad == {bad.index(True)}
    assert torch.equal(read[~torch.tensor(bad)], memory.images)
    assert torch.equal(files.held_out, memory.held_out)


def test_coding_goes_on_where_it_stopped(miniature, vqgan, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "IN_MEMORY", 0)
    (pictures / "bee" / "broken.png").write_bytes(b"no picture")
    out, chunks, code_chunk = tmp_path / "run", [], train_tiny.code_chunk
    arguments = [
        "--data",
        pictures,
        "--tokenizer",
        vqgan,
        "--image-size",
        8,
        "--iters",
        2,
        "--out",
        out,
    ]
    monkeypatch.setattr(
        train_tiny, "code_chunk", lambda *rest: chunks.append(rest[2]) or code_chunk(*rest)
    )
    miniature(*arguments)
    assert chunks[0] == slice(0, 32) and chunks[-1].stop == 115
    whole = (out / "codes.npy").read_bytes()
    codes = np.load(out / "codes.npy")
    unreadable = (codes == train_tiny.UNREADABLE).all((1, 2))
    assert codes.shape == (115, 10, 21) and unreadable.sum() == 1 and codes[~unreadable].max() < 24
    os.remove(out / "codes.npy")
    row = 2 * 10 * 21
    (out / "codes.npy.tmp").write_bytes(
        whole[: len(whole) - 115 * row + 40 * row + 7]
    )  # stopped within row 40
    chunks.clear()
    miniature(*arguments)
    assert chunks[0].start == 40 and (out / "codes.npy").read_bytes() == whole
    os.remove(out / "codes.npy")
    monkeypatch.setattr(train_tiny.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(SystemExit) as refused:
        miniature(*arguments)
    assert refused.value.code == 2


def test_refitted_codebook(miniature, vqgan, pictures, tmp_path):
    out = tmp_path / "run"
    miniature(
        "--data",
        pictures,
        "--tokenizer",
        vqgan,
        "--refit-codebook",
        16,
        "--image-size",
        8,
        "--iters",
        2,
        "--out",
        out,
    )
    given, refitted = ckgen.load_tokenizer(vqgan), ckgen.load(out / "checkpoint.pt").tokenizer
    assert refitted.config == replace(given.config, codes=16)
    for key, value in given.state_dict().items():  # everything but the codebook is frozen
        assert key == "codebook_weight" or torch.equal(value, refitted.state_dict()[key]), key
    images = train_tiny.as_input(train_tiny.folder_data(str(pictures), 8).held_out)

    def error(tokenizer):
        latents = tokenizer.encode(images)
        nearest = tokenizer.codebook()[tokenizer.quantize(latents)].permute(0, 3, 1, 2)
        return (latents - nearest).square().sum(1).mean().item()

    assert error(refitted) < 0.5 * error(given), (error(refitted), error(given))


def test_a_model_starts_from_one_of_another_ratio(tmp_path, checkpoint):
    source = ckgen.load(checkpoint).model  # sizes 1, 2, 4
    model = Checkerboard(replace(source.config, sizes=(1, 4)))
    before = model.pos_embed.clone()
    train_tiny.start_from(source, model)
    assert torch.equal(model.pos_embed[0], source.pos_embed[0])
    assert torch.equal(model.pos_embed[1:], source.pos_embed[5:])
    assert torch.equal(model.rope[1:], source.rope[5:])  # with the rows of class and EMPTY
    assert torch.equal(model.layers[0].attn.qkv.weight, source.layers[0].attn.qkv.weight)
    assert not torch.equal(model.pos_embed, before)
    with pytest.raises(ValueError, match="do not fit"):
        train_tiny.start_from(source, Checkerboard(replace(source.config, width=64)))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def gradients_of_one_step(sizes=(1, 2, 4)):
    """The model, and the gradients of one batch with P fixed and no label dropped."""
    codes, labels, codebook = random_pyramid(sizes, B=8)
    batch = train_tiny.Batch(codes, codes, labels, Layout.make(sizes, 2))
    model = small_model(sizes)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if train_tiny.WORLD > 1 else model
    train_tiny.backward(parallel, codebook, batch, 2)
    return [parameter.grad for parameter in model.parameters()]


def test_two_processes_average_to_the_gradients_of_one(tmp_path):
    program = (
        "import argparse, sys, torch, train_tiny, test_ckgen\n"
        "train_tiny.start_processes(argparse.Namespace(device='cpu'))\n"
        "torch.save(test_ckgen.gradients_of_one_step(), sys.argv[1] + str(train_tiny.RANK))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "PYTHONPATH": HERE,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "gradients")],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    alone = gradients_of_one_step()
    for rank in range(2):
        for one, averaged in zip(
            alone, torch.load(tmp_path / f"gradients{rank}", weights_only=True)
        ):
            torch.testing.assert_close(averaged, one, rtol=1e-4, atol=1e-5)


def test_two_processes_train_and_one_writes(tmp_path, pictures):
    out = tmp_path / "run"
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port",
            free_port(),
            os.path.join(HERE, "train_tiny.py"),
            "--config",
            "tiny",
            "--device",
            "cpu",
            "--data",
            pictures,
            "--image-size",
            "16",
            "--iters",
            "4",
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("all that sampling needs") == 1
    assert sorted(os.listdir(out)) == sorted(train_tiny.Run.FILES)
    assert ckgen.read_checkpoint(out / "checkpoint.pt")["done"]["transformer"] == 4


# ------------------------------------------------------------------------------------------------
# The commands


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


def test_the_two_commands(tmp_path, pictures):
    out = tmp_path / "run"
    trained = run(
        os.path.join(HERE, "train_tiny.py"),
        "--scale",
        2,
        "--steps",
        4,
        "--config",
        "tiny",
        "--device",
        "cpu",
        "--data",
        pictures,
        "--iters",
        10,
        "--out",
        out,
    )
    assert trained.returncode == 0, trained.stderr
    for name in train_tiny.Run.FILES:
        assert name == "codes.npy" or str(out / name) in trained.stdout, trained.stdout
    sampled = run(
        os.path.join(HERE, "ckgen.py"),
        out / "checkpoint.pt",
        "--class",
        "bee",
        0,
        "--n",
        3,
        "--steps",
        8,
        "--cfg",
        1.5,
        "--out",
        tmp_path / "all.npz",
    )
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (3, 32, 32, 3)


def test_evaluation(miniature, tmp_path, monkeypatch, capsys):
    classifier = train_tiny.train_classifier
    monkeypatch.setattr(
        train_tiny, "train_classifier", lambda data, device: classifier(data, device, iters=60)
    )
    miniature("--out", tmp_path / "run")
    capsys.readouterr()
    miniature("--evaluate", tmp_path / "run" / "checkpoint.pt")
    said = capsys.readouterr().out
    assert re.search(r"tokenizer: \d+\.\d dB on 16 held-out images, \d+ of 16 codes", said), said
    for P in (1, 2, 4, 8):
        assert len(re.search(rf"P = {P} +(.*)", said)[1].split()) == 4, said  # 1x1, 2x2, 4x4, all
    assert re.search(
        r"1000 samples : class accuracy \d\.\d+, Frechet distance \d+\.\d+, two colours", said
    ), said
    assert re.search(r"16 held-out: class accuracy", said), said


def test_frechet_distance_and_two_colours():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 4, generator=generator)
    assert abs(train_tiny.frechet_distance(a, a)) < 1e-6
    b = 2 * torch.randn(20000, 4, generator=generator) + 3  # |3|^2 * 4 + (2 - 1)^2 * 4
    assert abs(train_tiny.frechet_distance(a, b) - 40) < 0.5
    images = train_tiny.draw_shapes(64, 32, seed=3)[0]
    assert train_tiny.two_colours(images) == 0
    halves = torch.cat([images[:32, :, :, :16], images[32:, :, :, 16:]], -1)  # other images' halves
    assert train_tiny.two_colours(halves) > 0.5


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of an untrained miniature."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    recipe = replace(train_tiny.RECIPES["tiny"], width=32, layers=1, heads=2, ffn=48, image_size=16)
    options = {"scale": "2", "seed": 0, "data": None, "image_size": 16}
    data = train_tiny.Data(
        *train_tiny.draw_shapes(3, 16, 0), *train_tiny.draw_shapes(3, 16, 1), ["star", "7", "ring"]
    )
    state = train_tiny.new_state(recipe, options, data, 4)
    state["transformer"] = Checkerboard(Config(**state["transformer_config"])).state_dict()
    state["tokenizer"] = Tokenizer(TokenizerConfig(**state["tokenizer_config"])).state_dict()
    torch.save(state, path)
    return path


def test_sampling_by_command(checkpoint, tmp_path, capsys):
    def ask(name, *arguments):
        ckgen.main(
            [
                str(checkpoint),
                "--out",
                str(tmp_path / name),
                "--device",
                "cpu",
                *map(str, arguments),
            ]
        )
        return tmp_path / name

    one = Image.open(ask("one.png", "--class", "star", "--n", 1))
    assert one.size == (16, 16)  # the image itself
    assert (ask("again.png", "--class", 0, "--n", 1)).read_bytes() == (
        tmp_path / "one.png"
    ).read_bytes()
    assert (
        ask("other.png", "--class", 0, "--n", 1, "--seed", 1).read_bytes()
        != (tmp_path / "one.png").read_bytes()
    )
    gif = Image.open(ask("steps.gif", "--steps", 2, "--n", 4))
    assert gif.n_frames <= 5 and gif.format == "GIF"
    assert np.load(ask("all.npz"))["arr_0"].shape == (24, 16, 16, 3)  # 8 of each class
    assert np.load(ask("two.npz", "--n", 2))["arr_0"].shape == (2, 16, 16, 3)
    ask("grid.png", "--class", "star", "ring", "--n", 5)
    assert "5 images of 2 classes" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [
        "again.png",
        "all.npz",
        "grid.png",
        "one.png",
        "other.png",
        "steps.gif",
        "two.npz",
    ]


def test_class_names_come_before_numbers():
    assert ckgen.pick_classes(["7", "2", "7"], ["star", "7", "ring"]) == [1, 2]
    assert ckgen.pick_classes([], ["star", "7", "ring"]) == [0, 1, 2]


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing.pt"], "no such file"),
        (["."], "a folder"),
        (["evil.pt"], "refused"),
        (["text.pt"], "damaged"),
        (["short.pt"], "damaged"),
        (["empty.pt"], "damaged"),
        (["foreign.pt"], "not a checkpoint of ckgen"),
        (["early.pt"], "not come to the transformer"),
        (["ok.pt", "--class", "dog"], "star, 7, ring"),
        (["ok.pt", "--class", "3"], "(0 to 2)"),
        (["ok.pt", "--n", "0"], "'0' is not a whole number from 1"),
        (["ok.pt", "--steps", "0"], "'0'"),
        (["ok.pt", "--steps", "2.5"], "'2.5'"),
        (["ok.pt", "--cfg", "-1"], "'-1'"),
        (["ok.pt", "--cfg", "nan"], "nan"),
        (["ok.pt", "--temperature", "-0.1"], "-0.1"),
        (["ok.pt", "--temperature", "inf"], "inf"),
        (["ok.pt", "--seed", "-1"], "-1"),
        (["ok.pt", "--device", "toaster"], "toaster"),
        (["ok.pt", "--out", "x.jpg"], "x.jpg"),
        (["ok.pt", "--out", "no/x.png"], "no folder no that"),
    ],
)
def test_bad_input_to_the_sampler(checkpoint, tmp_path, monkeypatch, capfd, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    good = checkpoint.read_bytes()
    state = ckgen.read_checkpoint(checkpoint)
    (tmp_path / "ok.pt").write_bytes(good)
    (tmp_path / "short.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"this is no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    torch.save(
        {key: value for key, value in state.items() if key != "transformer"}, tmp_path / "early.pt"
    )
    torch.save({"format": ckgen.FORMAT, "transformer": Evil()}, tmp_path / "evil.pt")
    refuse(ckgen.main, arguments, complaint, tmp_path, capfd)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--steps", "0"], "'0'"),
        (["--iters", "0"], "'0'"),
        (["--batch-size", "-2"], "'-2'"),
        (["--lr", "0"], "'0'"),
        (["--lr", "nan"], "nan"),
        (["--scale", "5"], "5"),
        (["--config", "XL"], "XL"),
        (["--image-size", "30"], "30"),
        (["--seed", "x"], "'x'"),
        (["--dtype", "bfloat16"], "--dtype: for --bench alone"),
        (["--bench", "--evaluate", "x.pt"], "--bench: takes neither"),
        (["--bench", "--dtype", "float16"], "float16"),
        (["--device", "toaster"], "toaster"),
        (["--data", "missing"], "no such folder"),
        (["--data", "empty"], "no class folders"),
        (["--data", "hollow"], "no picture in its class folder b"),
        (["--out", "hollow"], "not empty"),
        (["--data", ""], "empty"),
        (["--out", "hollow/a/1.png/x"], "no folder that"),
        (["--evaluate", "missing.pt"], "no such file"),
    ],
)
def test_bad_input_to_training(tmp_path, monkeypatch, capfd, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "hollow/a", "hollow/b"):
        os.makedirs(folder)
    Image.new("RGB", (8, 8)).save("hollow/a/1.png")
    device = [] if "--device" in arguments else ["--device", "cpu"]
    refuse(train_tiny.main, arguments + device, complaint, tmp_path, capfd)


def refuse(main, arguments, complaint, folder, capfd):
    """main must exit with 2 after one line that holds the complaint, and write nothing."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    said = capfd.readouterr()
    line = said.err.strip().split("\n")[-1]
    assert refused.value.code == 2 and "error: " in line and complaint in line, said.err
    assert "Traceback" not in said.err and "executed" not in said.out
    assert sorted(folder.rglob("*")) == before


def test_bench_prints_a_row_for_each_measurement(monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "timed", lambda run, device: [run() is None or 0.5])
    monkeypatch.setattr(train_tiny, "count_flops", lambda run: 1e6)
    train_tiny.main(["--bench", "--config", "tiny", "--device", "cpu", "--dtype", "bfloat16"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert [(row[1], row[3].strip(",")) for row in rows] == [
        (what, batch) for batch in ("1", "8", "64") for what in ("codes", "images")
    ] + [("train", "16")], rows
    monkeypatch.setattr(train_tiny, "BENCH_LIMIT", 0.0)
    train_tiny.main(["--bench", "--config", "tiny", "--device", "cpu"])
    assert capsys.readouterr().out.count("left out: takes at least") == 7


@torch.no_grad()
def test_bench_draws_by_graph_too(graph_device):
    model, tokenizer = train_tiny.bench_model("tiny", "2", torch.device(graph_device))
    run = train_tiny.bench_sampler(model, tokenizer, 4, 2, decoded=True, graph=True)
    assert run().shape == (2, 3, 32, 32)


def test_bench_counts_operations():
    """2 for each weight and token, twice that with guidance, 3 times for training; attention, the
    weights that AdaLN reads once an image and the MLP on both of its inputs add a little."""
    device = torch.device("meta")
    model, tokenizer = train_tiny.bench_model("tiny", "2", device)
    weights = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "shift_scale" not in name
    )
    flops = train_tiny.count_flops(train_tiny.bench_sampler(model, tokenizer, 4, 3, False))
    assert 0.9 < flops / (3 * 2 * 2 * weights * 85) < 1.2, flops
    decoded = train_tiny.count_flops(train_tiny.bench_sampler(model, tokenizer, 4, 3, True))
    assert decoded > flops


def test_explains_itself(capsys):
    ckgen.main([])
    said = capsys.readouterr().out
    assert FIGURE_3.strip("\n").split("\n")[0].split() == said.split("\n")[3].split()
    assert "##" in said and "Fig. 2" in said
