"""What must stay true of ckgen, stated as properties. Run: python -m pytest -q test_ckgen.py

CUDA is tested without a card too: see Card. CKGEN_GOLDEN names a folder with a model in the
author's released format, and with the numbers that the author's code computes with it.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import equal
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map

import ckgen
import train_tiny
from ckgen import (Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, loss_by_scale,
                   progressive_checkerboard, sample, scale_sizes)

torch.set_num_threads(1)  # fastest at these sizes
HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = (1, 2, 4)
ratios = pytest.mark.parametrize("ratio", [2, 3, 4, 2 ** 0.5, 1])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


def differences(a, b):
    """The names of what differs, if only in a bit, between two trees of tensors and values."""
    return [path for (path, x), y in zip(tree_leaves_with_path(a), tree_leaves(b), strict=True)
            if not (equal(x, y) if torch.is_tensor(x) else x == y)]


def example(sizes=SIZES, P=3, B=2, **options):
    """A small model, all its parameters random (nothing hides behind a zero), a layout, codes
    (B, L), labels (B,) and a codebook (17, 8)."""
    torch.manual_seed(0)
    model = Checkerboard(Config(sizes, 3, 17, 8, 32, 3, 2, 48, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes = torch.randint(17, (B, model.config.length))
    return model, Layout(sizes, P), codes, torch.arange(B), F.normalize(torch.randn(17, 8))


# ------------------------------------------------------------------------------------------------
# Scan order, scales, layout (Sec. 3.1, 3.2, Algorithm 1, Fig. 2, 3, 4b)

FIGURE_3 = """
     1  33   9  41   3  35  11  43
    49  17  57  25  51  19  59  27
    13  45   5  37  15  47   7  39
    61  29  53  21  63  31  55  23
     4  36  12  44   2  34  10  42
    52  20  60  28  50  18  58  26
    16  48   8  40  14  46   6  38
    64  32  56  24  62  30  54  22"""


def closed_form_rank(cell):
    """Orders cells by the bits of their coordinates, the last bit first."""
    bits = [(cell[0] >> level & 1, cell[1] >> level & 1) for level in range(6)]
    return [2 * (x ^ y) + y for x, y in bits]


def test_order_has_every_cell_once_and_a_closed_form_also_pasted_alone():
    names = {}
    exec(inspect.getsource(ckgen.progressive_checkerboard), names)
    for size in range(1, 34):
        cells = sorted(product(range(size), repeat=2), key=closed_form_rank)
        assert names["progressive_checkerboard"](size) == cells, size
    with pytest.raises(ValueError, match="not 0"):
        progressive_checkerboard(0)


def test_every_prefix_is_balanced_at_every_level():
    for size in range(1, 34):
        for level in range(size.bit_length()):
            x, y = np.array(progressive_checkerboard(size)).T >> level
            whole = size >> level  # so many quadrants of this level lie inside, in each direction
            quadrant = (y * whole + x)[(x < whole) & (y < whole)]
            counts = np.cumsum(quadrant[:, None] == range(whole ** 2), 0)
            assert np.ptp(counts, axis=1).max() <= 1, (size, level)


def test_scale_sizes_gives_the_table_of_its_docstring():
    text = ckgen.scale_sizes.__doc__.replace("sqrt 2", "1.41421356")
    rows = re.findall(r"([\d.]+) +((?:\d+ )+ *\d+ +\d+, \d+)", text)
    assert len(rows) == 5
    for ratio, row in rows:
        sizes = scale_sizes(16, float(ratio))
        numbers = [*sizes, Config(sizes, 1).length, *(len(Layout(sizes, P).steps) for P in (4, 8))]
        assert [*map(int, re.findall(r"\d+", row))] == numbers, ratio


@ratios
def test_layout_splits_the_order_into_blocks_that_read_the_block_before(ratio):
    """Blocks are near equal, larger ones first. A token sees its own block and those before."""
    sizes = scale_sizes(8, ratio)
    for P in (1, 2, 3, 5, 8, 100):
        layout, blocks, before = Layout(sizes, P), [[ckgen.CLASS]], [ckgen.CLASS]
        for n, at in zip(sizes, layout.scales):
            order = [at.start + y * n + x for x, y in progressive_checkerboard(n)]
            previous = [ckgen.EMPTY] * n * n
            for block in np.array_split(order, min(P, n * n)):
                before += previous[:len(block)]
                previous = [*block]
                blocks.append(previous)
        assert [start for _, start, _ in layout.steps] == [*np.cumsum([*map(len, blocks)])[:-1]]
        assert layout.cell.tolist() == sum(blocks, []) and layout.before.tolist() == before
        number = np.repeat(range(len(blocks)), [*map(len, blocks)])
        assert np.array_equal(layout.mask, number[:, None] >= number), P


# ------------------------------------------------------------------------------------------------
# Model and sampler (Sec. 3.1, 3.4, 4.1, 4.5, Eq. 1)

@ratios
def test_no_token_learns_of_its_own_block_or_a_later_one(ratio):
    """Neither by gradient nor by value: with other codes, the same logits, bit for bit."""
    for P in (1, 3, 4):
        model, layout, codes, labels, codebook = example(scale_sizes(5, ratio), P)
        latents = codebook[codes].requires_grad_()
        logits = model(latents, labels, layout)
        for _, start, end in layout.steps:
            part, later = logits[:, start - 1:end - 1], layout.cell[start:]
            gradient, = torch.autograd.grad(part.sum(), latents, retain_graph=True)
            assert not gradient[:, later].any(), (P, start, gradient)
            assert start == 1 or gradient.any(), "it reads nothing"
            again = model(latents.detach().index_fill(1, later, 0), labels, layout)
            assert equal(again[:, start - 1:end - 1], part), (P, start)


@ratios
@torch.no_grad()
def test_one_pass_over_the_drawn_codes_gives_what_cached_sampling_saw(ratio):
    """With and without guidance, with RoPE mixing in no layer, in some, in all."""
    for cfg, mixing_layers in product((0, 1.5), (0, 2, 3)):
        model, layout, _, labels, codebook = example(scale_sizes(5, ratio),
                                                     mixing_layers=mixing_layers)
        codes, entropies = sample(model, codebook, labels, layout, cfg, 2, temperature=0,
                                        return_entropy=True)
        logits = model(codebook[codes], labels, layout)
        without_class = model(codebook[codes], labels * 0 + 3, layout)
        start, cell = layout.steps[2][1] - 1, layout.cell[1:]
        logits[:, start:] += cfg * (logits - without_class)[:, start:]
        assert equal(logits.argmax(-1), codes[:, cell]), (cfg, mixing_layers)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        close(entropies[:, cell], entropy, 1e-4)


def test_guidance_starts_at_its_step():
    model, layout, _, labels, codebook = example((1, 2, 4, 8), 4)
    for step, options in ((5, {}), (0, {"cfg_start": 0}), (7, {"cfg_start": 7})):
        plain, guided = (sample(model, codebook, labels, layout, cfg, temperature=0,
                                      **options) for cfg in (0, 2))
        changed = (plain != guided)[:, layout.cell[1:]].any(0)
        assert layout.steps[step][1] <= changed.nonzero()[0] + 1 < layout.steps[step][2], changed


def test_draws_follow_the_softmax_and_temperature_0_is_argmax(monkeypatch):
    logits, zero = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0])
    for temperature in (0, 0.5):
        drawn = ckgen.draw(logits.expand(1, 20000, 3), temperature, torch.Generator())
        shares = drawn[0].bincount(minlength=3) / 20000
        close(shares, (logits / max(temperature, 1e-9)).softmax(0), 0.015)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda e, generator: e.copy_(zero))
    drawn = ckgen.draw(torch.tensor([-50.0, 0.0, -1.0]), 1)  # some devices draw exact zeros
    assert drawn == 1, "an impossible code wins"


@torch.no_grad()
def test_z_up_has_unit_length_and_replaced_codes_reach_only_z_up(monkeypatch):
    model, layout, codes, labels, codebook = example((1, 3, 4))
    inputs, seen, latents = Checkerboard.inputs, [], codebook[codes]
    monkeypatch.setattr(Checkerboard, "inputs", lambda *args: seen.append(args) or inputs(*args))
    changed = model(latents, labels, layout) != model(latents, labels, layout, latents.flip(0))
    assert not changed[:, 0].any() and changed[:, 1:].any(-1).all(), changed
    (_, read, z_up, *_), (_, read_too, replaced, *_) = seen
    assert equal(read, read_too) and equal(z_up, replaced.flip(0)) and not z_up[:, 0].any()
    close(z_up[:, 1:].norm(dim=-1), torch.ones(2, 25))
    corners = [0] * 9 + [1, 3, 7, 9]
    close(z_up[:, [*range(1, 10), 10, 13, 22, 25]], latents[:, corners])


def test_the_loss_starts_at_log_V_AdaLN_as_a_plain_norm_and_RoPE_as_a_rotation():
    """Which tells all cells apart. The loss is the flat mean over all tokens."""
    _, layout, codes, labels, codebook = example()
    model = Checkerboard(Config(SIZES, 3, 17, 8, 32, 3, 2, 48))
    p = torch.rand(2, 21, 17).softmax(-1)
    loss, _ = loss_by_scale(model(codebook[codes], labels, layout), codes, layout)
    close(loss, torch.tensor(math.log(17)), 0.05)
    loss, by_scale = loss_by_scale(p.log(), codes, layout)
    close(loss, -p.gather(-1, codes[:, layout.cell[1:], None]).log().mean())
    close(loss, by_scale @ torch.tensor([1.0, 4.0, 16.0]) / 21)
    for i, modulation in enumerate(model.layers[1].modulation(torch.randn(2, 32))):
        assert (modulation == i % 2).all()  # shift, scale, shift, scale
    x, (rope, k_rope) = torch.randn(2, 2, 22, 16), model.ropes(layout)[2]  # not a mixing layer
    close(ckgen.rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert equal(rope, k_rope) and len(rope[0, 1:].unique(dim=0)) == 21


@torch.no_grad()
def test_bfloat16_stays_close_to_float32_and_finds_the_same_codes(finished):
    model, layout, codes, labels, codebook = example()
    logits = model(codebook[codes], labels, layout)
    ckgen.for_sampling(model, torch.bfloat16)
    kept = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    error = (model(codebook[codes].bfloat16(), labels, layout) - logits).std() / logits.std()
    assert 0 < error < 0.05 and kept == {"norm", "lm_head"}, error  # 0.004 for one rounding
    exact, rough = (ckgen.load(finished / "checkpoint.pt", dtype=dtype)[1]
                    for dtype in (torch.float32, torch.bfloat16))
    latents = rough.encode(torch.rand(2, 3, 16, 16))
    assert rough.quant_conv.weight.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert equal(rough.quantize(latents), exact.quantize(latents))


class Watch(TorchDispatchMode):
    """Raises where torch would make the host wait for the GPU, or send it data. On the meta
    device tensors have no data, so that whatever needs their values, like .item(), raises too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), str(function)
        assert not re.search("multinomial|nonzero|masked_select|unique", name), name
        for x in tree_leaves((args, kwargs, out)):
            if torch.is_tensor(x):
                assert x.is_meta and (x.dtype != torch.bool or "index" not in name), name
        return out


def test_sampling_never_waits_for_the_gpu():
    model, _, *tensors = example()
    _, labels, codebook = (x.to("meta") for x in tensors)
    model, layout = model.to("meta"), Layout(SIZES, 4, "meta")
    with Watch():
        for cfg in (0, 1.5):
            assert sample(model, codebook, labels, layout, cfg, 5, 0.7).shape == (2, 21)
        with pytest.raises(AssertionError):
            codebook[torch.tensor([0])]


class RecordedGraph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph does, for the CPU: captures the operations on the way, and replays
    them on the very same tensors. A value that went in as a constant stays what it was."""

    def register_generator_state(self, generator):
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs or {}, function(*args, **(kwargs or {}))))
        return self.calls[-1][3]

    def replay(self):
        for function, args, kwargs, captured in self.calls:
            for old, new in zip(tree_leaves(captured), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # neither a view nor in place


@torch.no_grad()
def test_graph_draws_what_sample_draws(monkeypatch):
    """For other labels, seeds and weights than those of its capture too."""
    device, nothing = "cuda", contextlib.nullcontext
    if not torch.cuda.is_available():
        device, stream = "cpu", argparse.Namespace(wait_stream=id)
        stubs = dict(CUDAGraph=RecordedGraph, graph=lambda graph, stream: graph, stream=nothing,
                     Stream=lambda: stream, current_stream=lambda: stream, device=nothing)
        for name in stubs:
            monkeypatch.setattr(torch.cuda, name, stubs[name])
    model, _, _, labels, codebook = (x if isinstance(x, Layout) else x.to(device)
                                     for x in example(B=3))
    layout, generator, drawn = Layout(SIZES, 4, device), torch.Generator(device), []
    graph = ckgen.SamplerGraph(model, codebook, layout, 3, generator, cfg=0.5, cfg_start=2)
    for label, seed in ((0, 0), (2, 0), (2, 1), (2, 1)):
        labels[0] = label
        model.class_embeddings.weight[2] *= -1
        generator.manual_seed(seed)
        drawn.append(graph(labels).tolist())
        generator.manual_seed(seed)
        expected = sample(model, codebook, labels, layout, 0.5, 2, 1, generator)
        assert drawn[-1] == expected.tolist() and drawn.count(drawn[-1]) == 1, (label, seed)


# ------------------------------------------------------------------------------------------------
# Tokenizer and pictures (Sec. 3.3, Fig. 1)

def random_tokenizer(codes=32):
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(codes))


@torch.no_grad()
def test_every_scale_is_encoded_from_the_image_by_itself():
    tokenizer, images = random_tokenizer(), torch.rand(3, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode_pyramid(images, SIZES)
    for n, at in zip(SIZES, Layout(SIZES, 4).scales):
        alone = F.interpolate(images, 4 * n, mode="bilinear")
        latents = tokenizer.encode(alone).flatten(2).mT                     # (B, n*n, C)
        close(latents.norm(dim=-1), torch.ones(3, n * n))
        assert equal(codes[:, at], torch.cdist(latents, tokenizer.codebook()[None]).argmin(-1)), n


def test_progress_frames_show_only_what_was_drawn():
    tokenizer, layout, codes = random_tokenizer(), Layout(SIZES, 4), example()[2]
    frames = ckgen.progress_frames(tokenizer, codes, layout)
    assert np.array_equal(frames[-1], ckgen.decode_scale(tokenizer, codes, layout))
    for t, (scale, _, end) in enumerate(layout.steps):
        drawn = (end - 1 - layout.scales[scale].start) / SIZES[scale] ** 2
        assert abs((frames[t] != 128).any(-1).mean() - drawn) < 0.02, t
        later = codes.index_fill(1, layout.cell[end:], 0)
        assert np.array_equal(frames[t], ckgen.progress_frames(tokenizer, later, layout)[t]), t


# ------------------------------------------------------------------------------------------------
# The author's released files

THEIR_NAMES = {r"^(layers|norm)": r"llama.\1", r"modulation\.": "modulation.adaLN_modulation.",
               "vecs_mlp": "vecs_mlp.net", "^rope_mix": "llama.rotary_emb.mixing_coeffs",
               "^rope$": "llama.rotary_emb.position_embeddings.parametrizations.weight.original",
               r"^(encoder|decoder|quant_conv|post_quant_conv|codebook)": r"autoenc.\1",
               r"(encoder.*)resample\.1": r"\1downsample.conv", r"resample\.1": "upsample.conv",
               "codebook_weight": "quantize.embedding.parametrizations.weight.original"}


def released_model():
    """Random modules, and their tensors under the names of the author's files."""
    torch.manual_seed(0)
    parts = [Checkerboard(Config(SIZES, 5, 24, 8, 32, 3, 2, 48, 2)),
             Tokenizer(TokenizerConfig(24, 8, 2, 64, (32, 32), 1))]
    tensors = {"autoenc.cluster_usage_train": torch.zeros(24)}  # a statistic of training
    for part in parts:
        for name, value in part.state_dict().items():
            for ours, theirs in THEIR_NAMES.items():
                name = re.sub(ours, theirs, name)
            tensors[name] = value.normal_(std=0.2)
    return parts, tensors


def test_released_tensors_land_in_their_places(tmp_path):
    parts, theirs = released_model()
    state = {"model": theirs, "model_ema": None, "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "a.pth")
    for own, part in zip(parts, ckgen.load(tmp_path / "a.pth")):
        assert part.config == own.config and not differences(part.state_dict(), own.state_dict())
    del theirs["src_latents_proj.weight"], theirs["src_latents_proj.bias"]
    torch.save(state, tmp_path / "b.pth")  # older files have none
    project = ckgen.load(tmp_path / "b.pth")[0].src_latents_proj
    assert equal(project(torch.eye(32)), torch.eye(32))


GOLDEN = os.environ.get("CKGEN_GOLDEN")


@pytest.mark.skipif(not GOLDEN, reason="needs CKGEN_GOLDEN")
@torch.no_grad()
def test_released_model_number_for_number(tmp_path):
    path, out = f"{GOLDEN}/checkpoint-last.pth", tmp_path / "two.npz"
    golden = np.load(f"{GOLDEN}/expected.npz")
    model, tokenizer, *_ = ckgen.load(path)
    sizes, labels = model.config.sizes, torch.from_numpy(golden["labels"])
    alone = ckgen.load_tokenizer(f"{GOLDEN}/autoenc/checkpoint.pth")
    assert not differences(alone.state_dict(), tokenizer.state_dict())

    def check(key, ours, atol):
        maps = [golden[name].reshape(2, -1) for name in golden if name.startswith(f"{key}_s")]
        theirs = np.concatenate(maps, 1) if maps else golden[key]
        assert np.abs(ours.numpy() - theirs.astype(float)).max() <= atol, key

    codes = tokenizer.encode_pyramid(torch.from_numpy(golden["images"]), sizes)
    check("q_inds", codes, 0)
    for n in sizes:
        check(f"dec_s{n}", tokenizer.decode(torch.from_numpy(golden[f"zq_s{n}"])), 1e-3)
    codebook = tokenizer.codebook()
    for P in (1, 2, 4, 8):
        logits = model(codebook[codes], labels, Layout(sizes, P))
        loss, by_scale = loss_by_scale(logits, codes, Layout(sizes, P))
        check(f"tf_logits_P{P}", logits, 1e-3)
        check(f"tf_loss_P{P}", loss, 1e-4)
        check(f"tf_loss_by_scale_P{P}", by_scale, 1e-4)
    for (name, cfg), P in product((("cfg0", 0), ("cfg1p5", 1.5)), (4, 8)):
        drawn, entropies = sample(model, codebook, labels, Layout(sizes, P), cfg,
                                        temperature=0, return_entropy=True)
        check(f"am_{name}_P{P}_tokens", drawn, 0)
        check(f"am_{name}_P{P}_entropy", entropies, 1e-3)
        ckgen.main(f"{path} --class {labels[0]} {labels[1]} --n 2 --steps {P} --cfg {cfg} "
                   f"--temperature 0 --device cpu --out {out}".split())
        pictures = torch.from_numpy(np.load(out)["arr_0"]).permute(0, 3, 1, 2)
        check(f"am_{name}_P{P}_image_u8", pictures, 1)


# ------------------------------------------------------------------------------------------------
# Training

PAPER = dict(train_tiny.RECIPES)


class Few(train_tiny.Images):
    """64 toy shapes to train on, 16 held out."""

    def __init__(self, folder, size):
        super().__init__(folder, size)
        if folder is None:
            self.labels, self.train = self.labels[:80], 64


@pytest.fixture(scope="session", autouse=True)
def miniature():
    """Two configurations at a size that takes a second."""
    small = dict(width=32, layers=2, heads=2, ffn=48, image_size=16, codes=16, batch_size=4,
                 tokenizer_iters=12, tokenizer_batch=4, iters=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "Images", Few)
        for name in ("tiny", "S"):
            patch.setitem(train_tiny.RECIPES, name, PAPER[name] | small)
        yield


def train(*arguments):
    """train_tiny.main on the CPU. Returns the exit code."""
    try:
        train_tiny.main(["--device", "cpu", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code
    finally:
        gc.collect()  # an exception holds the folder's lock


@pytest.fixture(scope="session")
def finished(tmp_path_factory, miniature):
    """The folder of a finished run, read only."""
    folder = tmp_path_factory.mktemp("finished")
    train("--out", folder)
    return folder


def contents(folder):
    """A run's files: checkpoints as read, of the others the bytes."""
    return {path.name: ckgen.read(path) if path.suffix == ".pt" else path.read_bytes()
            for path in sorted(folder.glob("*.*")) if path.name != ".lock"}


def train_on(codes, out, **changes):
    """Drive train_transformer with codes (n, L) of 1x1, 2x2, 4x4. Returns the checkpoint."""
    classes = ["a", "b", "c"]
    options = dict(sizes=SIZES, device=torch.device("cpu"), dtype=torch.float32, out=out, seed=0,
                   init=None, classes=classes, options={}, defaults={"steps": 4})
    images = argparse.Namespace(classes=classes, labels=torch.arange(len(codes)) % 3)
    train_tiny.train_transformer(argparse.Namespace(**PAPER["tiny"] | options | changes), images,
                                 random_tokenizer(64), codes[:, None].numpy().astype("u2") + 1)
    return ckgen.read(out / "checkpoint.pt")


def test_overfits_a_handful_of_images_and_gives_them_back(tmp_path):
    tokenizer = random_tokenizer(64)
    images = train_tiny.as_input(train_tiny.Images(None, 16).read(range(3)))
    codes = tokenizer.encode_pyramid(images, SIZES)
    state = train_on(codes, tmp_path, iters=200, width=64)
    model = Checkerboard(Config(**state["config"]))
    model.load_state_dict(state["model"])
    for P in (1, 2, 3, 4, 16):
        drawn = sample(model, tokenizer.codebook(), torch.arange(3), Layout(SIZES, P),
                             temperature=0)
        assert equal(drawn, codes), (P, drawn != codes)


def test_a_batch_draws_P_drops_labels_and_replaces_codes(tmp_path, monkeypatch):
    """Every P up to N*N occurs, half of them powers of two up to N, the others with log-uniform
    shares. A tenth of the labels is dropped, and a tenth of the codes replaced in z_up alone."""
    seen = []
    monkeypatch.setattr(Checkerboard, "forward", lambda self, x, y, layout, noisy: seen.append(
        (len(layout.steps), y == 3, (x != noisy).any(-1), x == x[:, :1]))
        or self.lm_head.bias.expand(16, 21, -1))
    codes = torch.arange(64)[:, None].expand(-1, 21)  # one code in all cells of an image
    train_on(codes, tmp_path, iters=600, muon=0.0, replace_codes=0.1, width=32, heads=2)
    steps, *rates = zip(*seen)
    shares = [np.mean([n in (3, 5, 9) for n in steps]), *(torch.stack(x).mean(dtype=float)
                                                          for x in rates)]
    expected = [0.5 + 0.5 * math.log(2 * 3 / 2 * 5 / 4, 17), 0.1, 0.1 * 63 / 64, 1]
    assert {*steps} == {3, 5, 7, *range(9, 22)}  # 1 + min(P, 4) + P
    assert np.allclose(shares, expected, 0.07), (shares, expected)


def test_five_batches_or_four_parts_give_the_weights_of_one_batch(tmp_path, monkeypatch):
    """But for rounding. Batches are accumulated after an epoch: here of one step."""
    forward, sizes, weights = Checkerboard.forward, [], []
    monkeypatch.setattr(Checkerboard, "forward",
                        lambda *inputs: sizes.append(len(inputs[1])) or forward(*inputs))
    sgd = functools.partial(torch.optim.SGD, lr=0.0)  # AdamW would multiply the rounding
    monkeypatch.setattr(train_tiny, "make_optimizers", lambda model, run: [sgd(model.parameters())])
    for batch, after, parts, expected in ((4, 3, 1, [4] * 8), (20, 9, 1, [20] * 4),
                                          (20, 9, 4, [5] * 16), (4, 0, 2, [2] * 40)):
        monkeypatch.setattr(train_tiny, "parts_that_fit", lambda *rest: parts)
        state = train_on(example(B=16)[2], tmp_path, iters=4, epochs=4, lr=2.0, width=32, heads=2,
                         batch_size=batch, accumulate_from=after)
        os.remove(tmp_path / "checkpoint.pt")
        assert sizes == expected, (parts, sizes)
        sizes.clear()
        weights.append(torch.cat([x.flatten() for x in state["model"].values()]))
    close(torch.stack(weights[2:]), weights[1].expand(2, -1))
    assert state["model"]["lm_head.weight"].abs().max() > 0.01, "nothing was learned"


def test_learning_rates_of_the_paper():
    """Sec. 4.1, in epochs of ten steps. tiny warms up, then falls linearly."""
    for name, iters, rates in (
            ("S", 1100, {0: 1e-5, 9: 1e-4, 999: 1e-4, 1000: 3.1623e-5, 1050: 1e-5}),
            ("L", 2060, {0: 5e-6, 9: 5e-5, 1999: 5e-5, 2000: 1e-5, 2059: 1e-5}),
            ("tiny", 1000, {0: 3e-4, 100: 5.4e-3, 500: 3e-3, 999: 6e-6})):
        run = argparse.Namespace(**PAPER[name] | {"iters": iters})
        for step, rate in rates.items():
            assert abs(run.lr * train_tiny.lr_factor(run, step) - rate) < 1e-9, (name, step)


@pytest.mark.parametrize("name", ["S", "tiny"])
def test_every_parameter_learns_and_vectors_do_not_decay(name):
    model, layout, codes, labels, codebook = example()
    loss_by_scale(model(codebook[codes], labels, layout), codes, layout)[0].backward()
    before = tree_map(torch.clone, model.state_dict())
    optimizers = train_tiny.make_optimizers(model, argparse.Namespace(**PAPER[name]))
    for optimizer in optimizers:
        optimizer.step()
    assert len(differences(before, model.state_dict())) == len(before)
    decay = {(group["weight_decay"], p.ndim > 1) for group in optimizers[0].param_groups
             for p in group["params"]}
    assert decay == {(0.01, True), (0, False)} and len(optimizers) == 1 + (name == "tiny")


def test_muon_moves_along_the_orthogonal_factor():
    torch.manual_seed(0)
    for gradient in (torch.randn(16, 40), torch.randn(40, 10)):
        ours, theirs = (torch.nn.Parameter(0 * gradient) for _ in range(2))
        ours.grad = theirs.grad = gradient
        train_tiny.Muon([ours], lr=1.0).step()
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        values = -u.T @ ours @ v.T / max(1, len(u) / len(v)) ** 0.5
        close(values, values.diag().diag())
        assert 0.6 < values.diag().min() and values.max() < 1.3, values
        if hasattr(torch.optim, "Muon"):  # which computes in bfloat16
            torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0).step()
            close(theirs, ours, 0.03)


def test_codebook_follows_its_latents_and_revives_unused_codes():
    tokenizer, centres = random_tokenizer(16), F.normalize(torch.randn(8, 8))
    tokenizer.codebook_weight = torch.cat([centres + 0.1 * torch.randn(8, 8), -centres])  # 8 lost
    for _ in range(600):
        latents = F.normalize(centres.repeat(8, 1) + 0.02 * torch.randn(64, 8))
        codes = (latents @ tokenizer.codebook().T).argmax(-1)
        train_tiny.update_codebook(tokenizer, latents, codes, torch.Generator())
    alike = tokenizer.codebook() @ centres.T                                # (16, 8)
    assert min(alike.amax(1).min(), alike.amax(0).min()) > 0.99, alike


@pytest.mark.parametrize("owner, name, number", [
    (train_tiny, "seeded", 8), (Tokenizer, "encode_pyramid", 2), (train_tiny, "seeded", 14),
    (train_tiny, "seeded", 23), (train_tiny, "write_log", 1)],
    ids=["tokenizer", "coding", "transformer", "after a checkpoint", "before a checkpoint"])
def test_a_stopped_run_goes_on_to_the_same_files(owner, name, number, finished, tmp_path,
                                                 monkeypatch, capsys):
    """Bit for bit. It is stopped at a function's call of this number."""
    original, calls = getattr(owner, name), []

    def stop(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, stop)
    monkeypatch.setattr(train_tiny, "time",  # a checkpoint after each third step
                        argparse.Namespace(monotonic=lambda: 25 * len(calls)))
    assert train("--out", tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists() == (number == 23)
    train("--out", tmp_path)
    assert not differences(contents(finished), contents(tmp_path))


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = contents(finished)
    train("--out", finished)
    assert str(finished / "samples.png") in capsys.readouterr().out
    for option in ("--seed 7", "--scale 4", "--iters 13", "--lr 0.01", "--batch-size 8"):
        assert train("--out", finished, *option.split()) == 2, option
        assert option.split()[0] in capsys.readouterr().err
    with train_tiny.lock(finished):
        assert train("--out", finished) == 2
    assert "another process" in capsys.readouterr().err
    assert not differences(before, contents(finished))


def test_codes_belong_to_their_tokenizer_and_have_their_shape(finished, tmp_path, capsys):
    for seed in (1, 0):
        train("--out", tmp_path, "--seed", seed)
        if seed:
            for path in tmp_path.glob("*.pt"):
                path.unlink()
    path, = (tmp_path / path.name for path in finished.glob("codes-*.npy"))
    assert not differences(*(ckgen.read(run / "checkpoint.pt") for run in (tmp_path, finished)))
    for codes in (np.load(path)[:50], np.load(path).astype("f2")):
        np.save(path, codes)
        assert train("--out", tmp_path) == 2 and f"{path}: damaged" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError):
        ckgen.write_whole(tmp_path / "file", lambda file: file.write(b"new") + file.write(None))
    assert (tmp_path / "file").read_text() == "old"


# ------------------------------------------------------------------------------------------------
# Pictures of one's own, and toy shapes

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 classes with 60 pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(120):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        picture = Image.fromarray(np.random.default_rng(i).integers(1, 256, (3, 4, 3), "u1"))
        picture.resize((20, 24)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_reads_whatever_pillow_opens(tmp_path):
    """77 to the left of 255, in many ways."""
    values, clear, turned = np.full((8, 8), 77), np.full((8, 8, 4), 77, "u1"), Image.Exif()
    values[:, 4:] = 255
    clear[:, :4, 3] = 255
    clear[:, 4:, 3] = 0  # transparent: white
    turned[0x0112] = 8   # to be shown turned left by 90 degrees
    grey = Image.fromarray(values.astype("u1"))
    images = {"grey.png": grey, "palette.gif": grey.convert("P"), "cmyk.tif": grey.convert("CMYK"),
              "alpha.png": clear, "16.png": (values * 257).astype("u2"),
              "int32.tif": (values * 2 ** 22).astype("i4"), "f.tif": (values / 255).astype("f4")}
    for name, image in images.items():
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(tmp_path / name)
    grey.rotate(-90).save(tmp_path / "turned.png", exif=turned)
    for path in tmp_path.iterdir():
        read = np.array(train_tiny.read_picture(path, 8), int)
        assert abs(read[:, [0, 7]] - [[77], [255]]).max() <= 1, (path, read[0])


def test_unreadable_pictures_are_named_and_black(pictures, capsys, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / "b" / ".hidden").write_text("not a picture")
    os.mkfifo(folder / "b" / "fifo.png")  # a program that opens it waits for ever
    (folder / "b" / "bad.png").write_bytes(b"\x89PNG broken")
    images = train_tiny.Images(folder, 8)
    assert len(images.paths) == 121 and images.classes == ["a", "b"]
    black = [path for i, path in enumerate(images.paths) if not images.read([i]).any()]
    assert black == [str(folder / "b" / "bad.png")] and "bad.png" in capsys.readouterr().err
    (folder / "b" / "worse.png").write_text("")
    with pytest.raises(ValueError, match="1 %"):
        train_tiny.Images(folder, 8).read(range(122))


def test_ten_crops():
    images = torch.arange(36).view(1, 1, 6, 6)
    crops = torch.cat([train_tiny.crop(images, 4, view) for view in range(10)])[:, 0]
    first = torch.tensor([0, 2, 12, 14, 7])[:, None, None]  # the corners, then the centre
    assert equal(crops[:5], first + images[0, 0, :4, :4]) and equal(crops[5:], crops[:5].flip(-1))


def test_toy_shapes_are_eight_classes_in_six_colours_always_the_same():
    images = train_tiny.Images(None, 32)
    shapes = images.read(range(64))
    pixels = {(*pixel,) for pixel in shapes.movedim(1, -1).flatten(0, 2).tolist()}
    assert equal(shapes, images.read(range(64))) and pixels > {*train_tiny.COLOURS}
    centre = shapes.amax(1)[:, 15:17, 15:17].amin((1, 2)) > 150
    shares = {name: centre[k::8].float().mean() for k, name in enumerate(images.classes)}
    assert len(shares) == 8 and shares["ring"] < 0.5 < shares["circle"], shares
    halves = torch.cat([shapes[:32, ..., :16], shapes[32:, ..., 16:]], -1)
    assert train_tiny.two_colours(shapes) == 0 and 0.5 < train_tiny.two_colours(halves) < 1


def test_frechet_distance():
    a = torch.randn(20000, 4, generator=torch.Generator())
    assert abs(train_tiny.frechet_distance(a, a)) < 1e-6
    distance = train_tiny.frechet_distance(a, 2 * a.flip(0) + 3)
    assert abs(distance - 40) < 0.5, distance  # 3^2 * 4 + (2 - 1)^2 * 4


@pytest.mark.parametrize("layout", ["state_dict", "model", None])
def test_a_refit_changes_the_codebook_alone_of_tokenizers_in_three_layouts(layout, pictures,
                                                                           tmp_path):
    path, out, tensors = tmp_path / "vqgan.pt", tmp_path / "run", {}
    for name, value in released_model()[1].items():
        if layout == "model":  # as LlamaGen's
            name = name.replace("parametrizations.weight.original", "weight")
        if name.startswith("autoenc."):
            tensors[name.removeprefix("autoenc.")] = value
    torch.save({layout: tensors} if layout else tensors, path)
    train(*f"--data {pictures} --tokenizer {path} --refit-codebook 12 --image-size 8 --iters 2 "
          f"--out {out}".split())
    given, new = ckgen.load_tokenizer(path), ckgen.load_tokenizer(out / "checkpoint.pt")
    assert len(differences(given.state_dict(), new.state_dict())) == 1
    latents = given.encode(train_tiny.as_input(train_tiny.Images(pictures, 8).read(range(20))))
    far, near = (torch.cdist(latents.flatten(2).mT, tokenizer.codebook()[None]).amin(-1).mean()
                 for tokenizer in (given, new))
    assert near < 0.7 * far and len(new.codebook()) == 12, (near, far)


# ------------------------------------------------------------------------------------------------
# The commands

def command(*words):
    """Run Python. Returns what it wrote to stdout."""
    ran = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_two_commands_and_two_processes(pictures, tmp_path):
    """Two processes train the weights of one, and one of them writes."""
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "all.npz"
    options = (f"{HERE}/train_tiny.py --scale 2 --steps 4 --config tiny --device cpu --iters 4 "
               f"--image-size 16 --data {pictures} --out").split()
    for folder, launcher in ((one, ""), (two, "-m torch.distributed.run --standalone "
                                              "--nproc-per-node=2")):
        said = command(*launcher.split(), *options, folder)
        assert said.count("maps 1x1 2x2 4x4") == 1, said
        for name in ("samples.png", "progress.gif", "pyramid.png", "log.csv"):
            assert said.count(str(folder / name)) == 1 and (folder / name).exists(), said
    one, two = contents(one), contents(two)
    assert one.keys() == two.keys()
    tree_map(functools.partial(close, atol=1e-3), one["checkpoint.pt"]["model"],
             two["checkpoint.pt"]["model"])
    said = command(f"{HERE}/ckgen.py", folder / "checkpoint.pt", "--out", out,
                   *"--class b 0 --n 3 --steps 8 --cfg 1.5 --device cpu".split())
    assert "all.npz: 3 images, 13 steps each" in said
    assert np.load(out)["arr_0"].shape == (3, 16, 16, 3)


def test_sampling_by_command(finished, tmp_path):
    def draw(options, name="one.png"):
        out = tmp_path / name
        ckgen.main(f"{finished}/checkpoint.pt --device cpu --out {out} {options}".split())
        return np.load(out)["arr_0"] if name == "a.npz" else Image.open(out)

    one = draw("--class star --n 1", "a.npz")[0]
    assert np.array_equal(one, draw("--class 4 --n 1"))  # the image itself, without a border
    assert not np.array_equal(one, draw("--class 4 --n 1 --seed 1"))
    assert draw("", "a.npz").shape == (64, 16, 16, 3)  # eight of each class
    assert draw("--n 4 --steps 2", "a.gif").n_frames == 5


def test_evaluation(finished, monkeypatch, capsys):
    quick = functools.partial(train_tiny.train_classifier, iters=30)
    monkeypatch.setattr(train_tiny, "train_classifier", quick)
    train("--evaluate", finished / "checkpoint.pt")
    said = capsys.readouterr().out
    assert re.search(r"tokenizer: \d+\.\d dB on 16 held-out images, \d+ of 16 codes", said), said
    rows = np.array([row.split() for row in re.findall(r"P = \d+ (.*)", said)], float)
    assert rows.shape == (6, 4) and abs(rows @ [-21, 1, 4, 16]).max() < 0.05, said
    assert len(re.findall(r"accuracy [01]\.\d+, Frechet distance \d+\.\d+, two colours \d",
                          said)) == 2, said


@pytest.mark.parametrize("seconds, ending", [(0.5, "times the floor"), (1e9, "left out")])
def test_bench_prints_a_row_for_each_measurement(seconds, ending, monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "timed", lambda work: [work(), seconds][1])
    train("--bench", "--config", "tiny")
    said = capsys.readouterr().out
    rows = re.findall(rf"tiny +(\w+ +\d+) images.*{ending}", said)
    assert " ".join(" ".join(rows).split()) == (
        "train 4 draw 1 draw 8 draw 64 decode 1 decode 8 decode 64"), said


def test_explains_itself(capsys):
    ckgen.main([])
    said, layout = capsys.readouterr().out, Layout(SIZES, 4)
    assert re.findall(r"\d+", said[said.index("\n\n"):])[:64] == FIGURE_3.split()
    start = layout.steps[6][1]
    assert "first of step 7 predicts the code of cell 10" in said and "pos[5]" in said
    assert (layout.cell[start], layout.before[start]) == (10, 5)
    assert said.count("##") == layout.mask.sum() + 1, said  # and the sentence above


# ------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written

class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


@pytest.fixture
def refused(finished, tmp_path, monkeypatch, capfd):
    """A function: main must exit with 2 after one line that holds the complaint, and write
    nothing. The current folder holds what the tables below name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "hollow/a", "hollow/b", "full/a", "old"):
        os.makedirs(folder)
    for folder in ("hollow", "full"):
        Image.new("RGB", (8, 8)).save(f"{folder}/a/1.png")
    state = ckgen.read(finished / "checkpoint.pt")
    torch.save(state, "ok.pt")
    state["options"]["data"] = str(tmp_path / "full")
    torch.save(state, "old/checkpoint.pt")
    torch.save({"model": released_model()[1]}, "theirs.pt")

    def check(main, arguments, complaint):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.*")}
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])])
        said = capfd.readouterr()
        assert stopped.value.code == 2 and "executed" not in said.out
        assert said.err[:-1].isprintable() and "error: " in said.err, said.err  # one line
        assert complaint in said.err, said.err
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.*")}

    return check


BAD_FILES = """
data = data[:len(data) // 2]
data = b""
data = b"this is not a checkpoint"
data = data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1:]
state["defaults"] = Evil()
state["model"]["norm.weight"] *= nan
state["tokenizer"]["codebook_weight"] *= nan
del state["model"]["lm_head.bias"]
state["model"]["more"] = torch.zeros(1)
state["model"]["lm_head.weight"] = torch.ones(16, 32).to_sparse()
state["model"]["lm_head.weight"] = torch.ones(16, 32, device="meta")
state["config"]["heads"] = 0
state["config"]["sizes"] = ()
state["config"]["sizes"] = (1, 10 ** 6)
state["config"]["width"] = "wide"
state["classes"] = []
state["classes"] = [0, 1, 2, 3, 4, 5, 6, 7]
state["defaults"]["cfg"] = -0.4
state["defaults"]["temperature"] = -0.1
state["defaults"]["cfg"] = nan
state["defaults"]["temperature"] = inf
state["defaults"]["steps"] = 0
del state["tokenizer"]
del state["model"], state["config"]
state["tokenizer_config"]["codes"] = 17
state["tokenizer_config"]["stride"] = 0"""


@pytest.mark.parametrize("fault", BAD_FILES.strip().split("\n"))
def test_bad_checkpoints(fault, refused):
    path = Path("ok.pt")
    names = vars(math) | {"data": path.read_bytes(), "state": ckgen.read(path), "torch": torch,
                          "Evil": Evil}
    exec(fault, names)
    torch.save(names["state"], path)
    if fault.startswith("data"):
        path.write_bytes(names["data"])
    refused(ckgen.main, ["ok.pt"], "ok.pt: damaged, or not for this program")


BAD_COMMANDS = """
ckgen missing.pt | missing.pt
ckgen full | directory
ckgen ok.pt --class dog | --class dog: not a number, nor among circle, ring
ckgen ok.pt --class 8 | --class 8
ckgen ok.pt --n 0 | --n: 0
ckgen ok.pt --steps 2.5 | 2.5
ckgen ok.pt --cfg -1 | --cfg
ckgen ok.pt --cfg nan | nan
ckgen ok.pt --temperature inf | inf
ckgen ok.pt --device toaster | toaster
ckgen ok.pt --dtype float16 | float16
ckgen ok.pt --out x | --out x
ckgen ok.pt --out no/x.png | no/x.png
train --steps 0 | --steps: 0
train --iters 0 | --iters: 0
train --lr nan | nan
train --scale 5 | 5
train --config XL | XL
train --image-size 30 | multiple of 4
train --device toaster | toaster
train --data missing | missing
train --data empty | empty: needs folders
train --data hollow | hollow: needs folders
train --tokenizer ok.pt | --tokenizer needs --data
train --refit-codebook 16 | --refit-codebook needs
train --evaluate missing.pt | missing.pt
train --evaluate theirs.pt | theirs.pt: not a checkpoint of this program
train --evaluate ok.pt --data full | other classes
train --out ok.pt/run | ok.pt
train --out old --data full | not the files"""


@pytest.mark.parametrize("line", BAD_COMMANDS.strip().split("\n"))
def test_bad_command_lines(line, refused):
    words, complaint = (part.split() for part in line.split("|"))
    main = ckgen.main if words[0] == "ckgen" else train_tiny.main
    refused(main, words[1:], " ".join(complaint))


# ------------------------------------------------------------------------------------------------
# CUDA without a card

def real(x):
    """Ones in the place of a fake tensor."""
    with unset_fake_temporarily():
        return torch.ones(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x


class Card(TorchDispatchMode):
    """CUDA without a card. The tensors of the CPU are real. Those of CUDA are fake: they have a
    device, a type and a shape, and where torch would refuse to compute with them, so does this.
    What comes back to the CPU is 1."""
    fake, free, native = FakeTensorMode(), 80 * 2 ** 30, True  # memory; whether it has bfloat16

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if not any(isinstance(x, FakeTensor) or getattr(x, "type", None) == "cuda"
                   for x in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        assert kwargs.get("generator") is None, f"{function}: a generator of the CPU"
        if name == "_local_scalar_dense":
            return 1
        if name in ("nonzero", "_unique2"):  # their shapes depend on values
            found = args[0].new_ones((1, args[0].ndim), dtype=torch.long)
            return found if name == "nonzero" else (found, found, found)
        args, kwargs = tree_map(lambda x: self.fake.from_tensor(x) if torch.is_tensor(x)
                                and not isinstance(x, FakeTensor) else x, (args, kwargs))
        return tree_map(lambda x: real(x) if torch.is_tensor(x) and x.is_cpu else x,
                        function(*args, **kwargs))


def fake_backward(loss):
    """Give a gradient to every parameter that the loss depends on."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += {before for before, _ in node.next_functions} - {*nodes, None}
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)


def fake_apply(module, convert):
    """nn.Module._apply, which cannot turn a real parameter into a fake one."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, x in table.items():
                if x is not None:
                    table[name] = torch.nn.Parameter(convert(x.detach()), x.requires_grad)
    return module


def fake_generator(device="cpu"):
    """A CUDA generator is known by its device."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch._C.Generator()
    return argparse.Namespace(manual_seed=lambda seed: device)


def fake_exponential(e, generator):
    assert generator == e.device, f"{e.device}, but the generator is {generator}"
    return e


@pytest.fixture
def card(monkeypatch):
    """Make torch believe in a card. Yields it; card.current are the devices that were set."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet") or torch.cuda.is_available():
        pytest.skip("for a machine without a card, and a torch that can make fake CUDA tensors")
    card, save, outside = Card(), torch.save, unset_fake_temporarily()
    card.current = []
    library = ctypes.CDLL(f"{os.path.dirname(torch.__file__)}/lib/libc10.so")
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]
    guards[1] = guards[14]  # autograd asks for CUDA's guard and gets the meta device's: it is idle
    for owner, name, stub in (
            (torch._C, "_cuda_setDevice", card.current.append),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported",
             lambda including_emulation=True: including_emulation or card.native),
            (torch.cuda, "mem_get_info", lambda device: (card.free, card.free)),
            (torch.cuda, "get_device_name", lambda device: "Card"),
            (torch, "load", outside(torch.load)), (torch, "Generator", fake_generator),
            (torch, "save", lambda state, file: outside(save)(tree_map(real, state), file)),
            (torch.Tensor, "backward", fake_backward), (torch.nn.Module, "_apply", fake_apply),
            (torch.Tensor, "exponential_", fake_exponential)):
        monkeypatch.setattr(owner, name, stub, raising=False)
    with card.fake, card:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes by here
        yield card
        torch._C._set_only_lift_cpu_tensors(False)
    guards[1] = before


def test_a_cuda_device_has_an_index_and_bfloat16_only_if_native(card, monkeypatch):
    for name, rank, index in ((None, 0, 0), ("cuda", 0, 0), ("cuda:1", 0, 1), (None, 3, 3),
                              ("cuda", 3, 3), ("cuda:0", 3, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))  # by torchrun
        for card.native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            assert ckgen.find_device(name) == (torch.device("cuda", index), dtype), (name, rank)
            assert card.current.pop() == index, (name, rank)


def test_config_and_parts_of_a_batch_fit_the_card(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "RECIPES", PAPER)
    monkeypatch.setattr(train_tiny, "Images", None)  # it stops there
    for card.free, card.native, config in ((2 ** 36, True, "S"), (3 * 2 ** 33, True, "S"),
                                           (2 ** 33, True, "tiny"), (2 ** 36, False, "tiny")):
        with pytest.raises(TypeError):
            train_tiny.main(["--out", str(tmp_path)])
        assert capsys.readouterr().out.startswith(f"Card: config {config} "), card.free
    parts, device = [], torch.device("cuda", 0)
    for card.free in (2 ** 37, 2 ** 35, 2 ** 34, 2 ** 33, 0):
        parts.append(train_tiny.parts_that_fit(PAPER["L"], 64, 341, device, torch.bfloat16))
    assert parts == sorted({*parts}) and parts[0] == 1 and not any(64 % n for n in parts), parts


@pytest.mark.parametrize("native", [True, False])
def test_the_commands_on_a_card(card, native, tmp_path, monkeypatch, capsys):
    """Training with the default device and config, evaluation, sampling: all modules work on the
    card, in bfloat16 where it is native, and all parameters get a gradient."""
    card.native, dtype = native, torch.bfloat16 if native else torch.float32
    attention, seen, float32 = F.scaled_dot_product_attention, set(), torch.float32
    quick = functools.partial(train_tiny.train_classifier, iters=2)

    def watch(module, inputs, output):
        devices = {str(x.device) for x in tree_leaves((inputs, output)) if torch.is_tensor(x)}
        assert devices <= {"cuda:0"}, (type(module), devices)
        if isinstance(module, (Checkerboard, ckgen.FeedForward, ckgen.ResidualBlock)):
            seen.add((type(module).__name__, output.dtype))

    def attend(q, k, v, **options):
        seen.add((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, **options)

    def check(optimizer, *_):
        for group in optimizer.param_groups:
            assert all(p.is_cuda and p.grad is not None for p in group["params"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_tiny, "train_classifier", quick)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with (torch.nn.modules.module.register_module_forward_hook(watch),
          register_optimizer_step_pre_hook(check)):
        train_tiny.main("--out run --iters 2 --steps 1".split())
        assert f"Card: config {'S' if native else 'tiny'} " in capsys.readouterr().out
        assert seen == {("Checkerboard", float32), ("FeedForward", float32), ("FeedForward", dtype),
                        (float32,) * 3, (dtype,) * 3, ("ResidualBlock", float32)}
        train_tiny.main("--evaluate run/checkpoint.pt".split())
        assert "samples: class accuracy" in capsys.readouterr().out
        seen.clear()
        ckgen.main("run/checkpoint.pt --cfg 1.5 --out a.gif".split())
        assert seen == {("FeedForward", dtype), ("ResidualBlock", dtype), (dtype,) * 3}
    assert card.current == [0] * 3


def test_sampling_takes_smaller_batches_when_memory_is_short(card):
    model, layout = example()[0].to("cuda:0"), Layout(SIZES, 1, "cuda:0")
    tokenizer, labels = random_tokenizer(17).to("cuda:0"), torch.zeros(70).long().to("cuda:0")
    image = 2 * 3 * 2 * 21 * 32 * 4  # two caches of three layers, keys and values, float32
    for card.free, n, lengths in ((2 ** 40, 70, [64, 6]), (40 * image, 45, [20, 20, 5]),
                                  (0, 2, [1, 1])):
        drawn = ckgen.generate(model, tokenizer, labels[:n], layout, cfg=1.5)
        assert [len(codes) for codes in drawn if codes.is_cuda] == lengths
