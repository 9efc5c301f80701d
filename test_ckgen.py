"""What must stay true of ckgen, stated as properties. Run: python -m pytest -q test_ckgen.py

CUDA is tested without a card too: see Card. CKGEN_GOLDEN names a folder with a model in the
author's released format, and with the numbers that the author's code computes with it.
"""

import argparse
import functools
import gc
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import bfloat16, equal, float32
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map

import ckgen
import train_tiny
from ckgen import (Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, loss_by_scale,
                   progressive_checkerboard, sample, scale_sizes)

torch.set_num_threads(1)  # fastest at these sizes
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


# Scan order, scales, layout, model, sampler, tokenizer --------------------------------------------

def test_every_prefix_is_balanced_at_every_level():
    for size in range(1, 34):
        order = progressive_checkerboard(size)
        assert sorted(order) == [*product(range(size), repeat=2)], size
        for level in range(size.bit_length()):
            x, y = np.array(order).T >> level
            whole = size >> level  # so many quadrants of this level lie inside, in each direction
            quadrant = (y * whole + x)[(x < whole) & (y < whole)]
            counts = np.cumsum(quadrant[:, None] == range(whole ** 2), 0)
            assert np.ptp(counts, axis=1).max() <= 1, (size, level)


def test_scale_sizes_gives_the_table_of_its_docstring():
    text = scale_sizes.__doc__.replace("sqrt 2", "1.41421356")
    rows = re.findall(r"([\d.]+) +((?:\d+ )+ *\d+ +\d+, \d+)", text)
    assert len(rows) == 5
    for ratio, row in rows:
        sizes = scale_sizes(16, float(ratio))
        numbers = [*sizes, Config(sizes, 1).length, *(len(Layout(sizes, P).steps) for P in (4, 8))]
        assert [*map(int, row.replace(",", "").split())] == numbers, ratio


@ratios
def test_each_block_reads_the_block_before_it_in_its_scale(ratio):
    """Blocks are near equal, the larger ones first."""
    for P in (1, 2, 3, 5, 8, 100):
        layout = Layout(scale_sizes(8, ratio), P)
        for (old, first, last), (scale, start, end) in zip(layout.steps, layout.steps[1:]):
            read = layout.before[start:end]
            if scale == old:
                assert last - first - (end - start) in (0, 1), (P, start)
                assert equal(read, layout.cell[first:first + end - start]), (P, start)
            else:
                assert read.eq(ckgen.EMPTY).all(), (P, start)


@ratios
def test_no_token_learns_of_its_own_block_or_a_later_one(ratio):
    """With other codes, the same logits, bit for bit; and all later tokens learn of them."""
    for P in (1, 3, 4):
        model, layout, codes, labels, codebook = example(scale_sizes(5, ratio), P)
        logits = model(codebook[codes], labels, layout)
        for _, start, end in layout.steps:
            others = codebook[codes].index_fill(1, layout.cell[start:], 0)
            changed = (model(others, labels, layout) != logits).any(-1)
            assert not changed[:, :end - 1].any() and changed[:, end - 1:].all(), (P, start)


def guided_logits(model, codebook, codes, labels, layout, cfg, cfg_start):
    """The logits (B, L, V) of one pass over all codes, guided from that step on."""
    logits, without_class = (model(codebook[codes], y, layout) for y in (labels, labels * 0 + 3))
    start = layout.steps[cfg_start][1] - 1
    logits[:, start:] += cfg * (logits - without_class)[:, start:]
    return logits


def sample_with_entropies(model, codebook, labels, layout, cfg, cfg_start=5):
    """The likeliest codes, and the entropies (B, L) of what they were chosen by (Sec. 4.5)."""
    entropies = torch.zeros(len(labels), model.config.length)

    def choose(logits, cell):
        entropies[:, cell] = torch.distributions.Categorical(logits=logits).entropy()
        return logits.argmax(-1)

    return sample(model, codebook, labels, layout, cfg, cfg_start, choose=choose), entropies


@ratios
def test_one_pass_over_the_drawn_codes_gives_what_cached_sampling_saw(ratio):
    """Without and with guidance, from its step on; with RoPE mixing in no, some, or all layers."""
    for cfg, mixing_layers in product((0, 1.5), (0, 2, 3)):
        model, layout, _, labels, codebook = example(scale_sizes(5, ratio),
                                                     mixing_layers=mixing_layers)
        ckgen.for_sampling(model, float32)
        codes, entropies = sample_with_entropies(model, codebook, labels, layout, cfg, 2)
        cell = layout.cell[1:]
        logits = guided_logits(model, codebook, codes, labels, layout, cfg, 2)
        assert equal(logits.argmax(-1), codes[:, cell]), (cfg, mixing_layers)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        close(entropies[:, cell], entropy, 1e-4)
        assert equal(codes, sample(model, codebook, labels, layout, cfg, 2, temperature=0))


def test_guidance_has_an_effect_however_few_steps_there_are():
    """If there are no more than cfg_start, half of them are guided."""
    for sizes, P, cfg_start, first in (((4,), 1, 5, 0), ((4,), 4, 5, 2), (SIZES, 1, 5, 1),
                                       (SIZES, 1, 2, 2), (SIZES, 4, 5, 5)):
        model, layout, _, labels, codebook = example(sizes, P)
        plain, guided = (sample(model, codebook, labels, layout, cfg, cfg_start, temperature=0)
                         for cfg in (0, 100))
        assert ckgen.guided_from(cfg_start, layout) == first
        before = layout.cell[1:layout.steps[first][1]]
        assert equal(plain[:, before], guided[:, before]) and not equal(plain, guided), (sizes, P)


def test_draws_follow_the_softmax_and_temperature_0_is_argmax(monkeypatch):
    logits, zero = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0])
    for temperature in (0, 0.5):
        drawn = ckgen.draw(logits.expand(1, 20000, 3), temperature, torch.Generator())
        shares = drawn[0].bincount(minlength=3) / 20000
        close(shares, (logits / max(temperature, 1e-9)).softmax(0), 0.015)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda e, generator: e.copy_(zero))
    assert ckgen.draw(torch.tensor([-50.0, 0.0, -1.0]), 1) == 1  # some devices draw exact zeros


def test_z_up_has_unit_length_and_replaced_codes_reach_only_z_up():
    model, layout, codes, labels, codebook = example((1, 3, 4))
    latents, others = codebook[codes], codebook[codes.flip(0)]
    z_up = ckgen.upsample(latents, layout, 2)
    close(z_up.norm(dim=-1), torch.ones(2, 16))
    close(z_up[:, [0, 3, 12, 15]], latents[:, [1, 3, 7, 9]])  # the corners
    logits = model(latents, labels, layout, others)
    changed = (logits != model(latents, labels, layout)).any(-1)
    assert not changed[:, 0].any() and changed[:, 1:].all(), changed
    assert (logits != model(others, labels, layout)).any(), "they reach all"


def test_RoPE_starts_as_a_rotation_that_tells_cells_apart_and_AdaLN_as_a_plain_norm():
    layout, model = Layout(SIZES, 3), Checkerboard(Config(SIZES, 3, width=32, heads=2))
    x, (rope, _) = torch.randn(2, 2, 22, 16), model.ropes(layout)[2]  # not a mixing layer
    close(ckgen.rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert len(rope[0, 1:].unique(dim=0)) == 21
    for i, modulation in enumerate(model.layers[1].modulation(torch.randn(2, 32))):
        assert (modulation == i % 2).all(), i  # shift, scale, shift, scale


def test_the_loss_starts_at_log_V_and_is_the_mean_over_all_tokens():
    _, layout, codes, labels, codebook = example()
    model = Checkerboard(Config(SIZES, 3, 17, 8, 32, 3, 2, 48))
    losses = loss_by_scale(model(codebook[codes], labels, layout), codes, layout)
    close(losses, torch.full((4,), math.log(17)))
    p = torch.rand(2, 21, 17).softmax(-1)
    loss, *_ = loss_by_scale(p.log(), codes, layout)
    close(loss, -p.gather(-1, codes[:, layout.cell[1:], None]).log().mean())


def random_tokenizer(codes=32):
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(codes))


def test_every_scale_is_encoded_from_the_image_by_itself():
    tokenizer, images = random_tokenizer(), torch.rand(3, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode_pyramid(images, SIZES)
    for n, at in zip(SIZES, Layout(SIZES, 4).scales):
        latents = tokenizer.encode(F.interpolate(images, 4 * n, mode="bilinear")).flatten(2).mT
        assert equal(codes[:, at], torch.cdist(latents, tokenizer.codebook()[None]).argmin(-1)), n


def test_progress_frames_show_only_what_was_drawn():
    tokenizer, layout, codes = random_tokenizer(), Layout(SIZES, 4), example()[2]
    latents = tokenizer.codebook()[codes]
    frames = ckgen.progress_frames(tokenizer, latents, layout)
    assert np.array_equal(frames[-1], ckgen.decode_scale(tokenizer, codes, layout))
    for t, (scale, _, end) in enumerate(layout.steps):
        drawn = (end - 1 - layout.scales[scale].start) / SIZES[scale] ** 2
        assert abs((frames[t] != 128).any(-1).mean() - drawn) < 0.02, t
        later = latents.index_fill(1, layout.cell[end:], 0)
        same = ckgen.progress_frames(tokenizer, later, layout)[t]
        assert np.array_equal(frames[t], same), t


# The author's released files ----------------------------------------------------------------------

THEIR_NAMES = {r"^(layers|norm)": r"llama.\1", r"modulation\.": "modulation.adaLN_modulation.",
               "vecs_mlp": "vecs_mlp.net", "^rope_mix": "llama.rotary_emb.mixing_coeffs",
               "^rope$": "llama.rotary_emb.position_embeddings.parametrizations.weight.original",
               r"^(encoder|decoder|quant_conv|post_quant_conv|codebook)": r"autoenc.\1",
               r"(encoder.*)resample\.1": r"\1downsample.conv", r"resample\.1": "upsample.conv",
               "codebook_weight": "quantize.embedding.parametrizations.weight.original"}


def released_model(sizes=SIZES):
    """Random modules, and their tensors under the names of the author's files."""
    torch.manual_seed(0)
    parts = [Checkerboard(Config(sizes, 5, 24, 8, 32, 3, 2, 48, 2)),
             Tokenizer(TokenizerConfig(24, 8, 2, 64, (32, 32), 1))]
    tensors = {"autoenc.cluster_usage_train": torch.zeros(24)}  # a statistic of training
    for name, value in [*parts[0].state_dict().items(), *parts[1].state_dict().items()]:
        for ours, theirs in THEIR_NAMES.items():
            name = re.sub(ours, theirs, name)
        tensors[name] = value.normal_(std=0.2)
    return parts, tensors


@pytest.mark.parametrize("sizes, P, cfg", [(SIZES, 4, 1.5), ((1, 4, 16), 8, 1.7)])
def test_released_tensors_land_in_their_places(sizes, P, cfg, tmp_path):
    """The defaults are the paper's, for ratio 2 and for ratio 4."""
    parts, theirs = released_model(sizes)
    torch.save({"model": theirs, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    *loaded, classes, defaults = ckgen.load(tmp_path / "a.pth")
    for own, part in zip(parts, loaded):
        assert part.config == own.config and not differences(part.state_dict(), own.state_dict())
    assert len(classes) == 5 and defaults == {"steps": P, "cfg": cfg, "temperature": 1.0}


@pytest.mark.skipif("CKGEN_GOLDEN" not in os.environ, reason="needs CKGEN_GOLDEN")
def test_released_model_number_for_number():
    folder = Path(os.environ["CKGEN_GOLDEN"])
    golden = {name: torch.from_numpy(x) for name, x in np.load(folder / "expected.npz").items()}
    model, tokenizer, *_ = ckgen.load(folder / "checkpoint-last.pth")
    sizes, labels, codebook = model.config.sizes, golden["labels"], tokenizer.codebook()

    def pyramid(name):
        return torch.cat([golden[f"{name}_s{n}"].flatten(1) for n in sizes], 1)

    codes = tokenizer.encode_pyramid(golden["images"], sizes)
    assert equal(codes, pyramid("q_inds"))
    for P in (1, 2, 4, 8):
        logits = model(codebook[codes], labels, Layout(sizes, P))
        close(logits, golden[f"tf_logits_P{P}"], 1e-3)
        loss, *by_scale = loss_by_scale(logits, codes, Layout(sizes, P))
        close(loss, golden[f"tf_loss_P{P}"], 1e-4)
        close(torch.stack(by_scale), golden[f"tf_loss_by_scale_P{P}"], 1e-4)
    for (guidance, cfg), P in product((("cfg0", 0), ("cfg1p5", 1.5)), (4, 8)):
        layout, name = Layout(sizes, P), f"am_{guidance}_P{P}"
        drawn, entropies = sample_with_entropies(model, codebook, labels, layout, cfg)
        assert equal(drawn, pyramid(f"{name}_tokens")), name
        close(entropies, pyramid(f"{name}_entropy"), 1e-3)
        pictures = torch.from_numpy(ckgen.decode_scale(tokenizer, drawn, layout)).movedim(-1, 1)
        close(pictures.float(), golden[f"{name}_image_u8"].float(), 1)


# Training, on pictures and on toy shapes ----------------------------------------------------------

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
        patch.setattr(train_tiny, "PICTURES", dict(codes=16, batch_size=8, iters=12))
        yield


def run(main, *arguments):
    """A command on the CPU. Returns the exit code."""
    try:
        main([*map(str, arguments), "--device", "cpu"])
    except SystemExit as stopped:
        return stopped.code
    finally:
        gc.collect()  # an exception holds the folder's lock


train = functools.partial(run, train_tiny.main)


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
    """Drive train_transformer with codes (n, L) of 1x1, 2x2, 4x4. Returns the trained model."""
    classes, path = ["a", "b", "c"], out / "checkpoint.pt"
    path.unlink(missing_ok=True)
    options = dict(sizes=SIZES, device=torch.device("cpu"), dtype=float32, out=out, seed=0,
                   init=None, classes=classes, options={}, defaults={"steps": 4}, heads=2,
                   redraw=False)
    labels = torch.arange(len(codes)) % 3
    images = argparse.Namespace(labels=labels, train=len(codes))
    train_tiny.train_transformer(argparse.Namespace(**PAPER["tiny"] | options | changes), images,
                                 random_tokenizer(64), codes[:, None].numpy().astype("u2"))
    state = ckgen.read(path)
    return ckgen.build(Checkerboard, Config(**state["config"]), state["model"])


def test_overfits_a_handful_of_images_and_gives_them_back(tmp_path):
    """With any P. It knows them without their class too."""
    tokenizer = random_tokenizer(64)
    images = train_tiny.as_input(train_tiny.Images(None, 16).read(range(3)))
    codes, codebook = tokenizer.encode_pyramid(images, SIZES), tokenizer.codebook()
    model = train_on(codes, tmp_path, iters=200, width=64)
    for P in (1, 2, 3, 4, 16):
        drawn = sample(model, codebook, torch.arange(3), Layout(SIZES, P), temperature=0)
        assert equal(drawn, codes), (P, drawn != codes)
    logits = model(codebook[codes], torch.full((3,), 3), Layout(SIZES, 4))
    loss, *_ = loss_by_scale(logits, codes, Layout(SIZES, 4))
    assert loss < 0.5, loss


def test_a_batch_draws_P_drops_labels_and_replaces_codes(tmp_path, monkeypatch):
    """Every P up to N*N occurs, half of them powers of two up to N, the others with log-uniform
    shares. A tenth of the labels is dropped, and a tenth of the codes replaced in z_up alone."""
    seen = []
    monkeypatch.setattr(Checkerboard, "forward", lambda self, x, y, layout, noisy: seen.append(
        (len(layout.steps), y == 3, (x != noisy).any(-1), x == x[:, :1]))
        or self.lm_head.bias.expand(16, 21, -1))
    codes = torch.arange(64)[:, None].expand(-1, 21)  # one code in all cells of an image
    train_on(codes, tmp_path, iters=600, muon=0.0, replace_codes=0.1, width=32)
    steps, *rates = zip(*seen)
    shares = [np.mean([n in (3, 5, 9) for n in steps]), *(torch.stack(x).mean(dtype=float)
                                                          for x in rates)]
    expected = [0.5 + 0.5 * math.log(2 * 3 / 2 * 5 / 4, 17), 0.1, 0.1 * 63 / 64, 1]
    assert {*steps} == {3, 5, 7, *range(9, 22)}  # 1 + min(P, 4) + P
    assert np.allclose(shares, expected, 0.07), (shares, expected)


def test_five_batches_or_four_parts_give_the_weights_of_one_batch(tmp_path, monkeypatch):
    """But for rounding. Batches are accumulated after an epoch: here of one step."""
    weights, sgd = [], functools.partial(torch.optim.SGD, lr=0)  # AdamW multiplies the rounding
    monkeypatch.setattr(train_tiny, "make_optimizers", lambda model, run: [sgd(model.parameters())])
    for batch, last_batches, at_once in ((20, (), 20), (20, (), 6), (4, (0, 5), 2)):
        monkeypatch.setattr(train_tiny, "images_that_fit", lambda *rest: at_once)
        model = train_on(example(B=16)[2], tmp_path, iters=4, epochs=4, lr=2.0, width=32,
                         batch_size=batch, last_batches=last_batches)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    close(torch.stack(weights[1:]), weights[0].expand(2, -1))
    assert not equal(*weights[:2]), "they were not computed in parts"


def test_codebook_follows_its_latents_and_revives_unused_codes():
    tokenizer, centres = random_tokenizer(16), F.normalize(torch.randn(8, 8))
    tokenizer.codebook_weight = torch.cat([centres + 0.1 * torch.randn(8, 8), -centres])  # 8 lost
    for _ in range(600):
        latents = F.normalize(centres.repeat(8, 1) + 0.02 * torch.randn(64, 8))
        latents = latents.T.view(1, 8, 8, 8)
        train_tiny.update_codebook(tokenizer, latents, torch.Generator(), 64)
    alike = tokenizer.codebook() @ centres.T                                # (16, 8)
    assert min(alike.amax(1).min(), alike.amax(0).min()) > 0.99, alike
    two = random_tokenizer(2)
    for size in [1, 2] * 300:  # maps of one code each: in a refit they count alike
        latents = two.codebook()[size - 1].view(1, 8, 1, 1).expand(-1, -1, size, size)
        train_tiny.update_codebook(two, latents, torch.Generator(), size * size)
    close(two.codebook_weight.norm(dim=-1), torch.full((2,), 0.5), 0.01)


@pytest.mark.parametrize("name, number", [
    ("seeded", 8), ("crop", 14), ("seeded", 14), ("seeded", 23), ("write_log", 1)])
def test_a_stopped_run_goes_on_to_the_same_files(name, number, finished, tmp_path, monkeypatch):
    """Bit for bit. It is stopped at this call of a function: while the tokenizer is trained, images
    are coded, the transformer is trained, after a checkpoint, before one."""
    original, calls = getattr(train_tiny, name), []

    def stop(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train_tiny, name, stop)
    monkeypatch.setattr(train_tiny, "time",  # a checkpoint after each third step
                        argparse.Namespace(monotonic=lambda: 25 * len(calls)))
    assert train("--out", tmp_path) == 130
    assert (tmp_path / "checkpoint.pt").exists() == (number == 23)
    train("--out", tmp_path)
    assert not differences(contents(finished), contents(tmp_path))


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = contents(finished)
    train("--out", finished)
    for option in ("--seed 7", "--scale 4", "--iters 13", "--lr 0.01"):
        assert train("--out", finished, *option.split()) == 2, option
        assert option.split()[0] in capsys.readouterr().err
    with train_tiny.lock(finished):
        assert train("--out", finished) == 2
    assert "another process" in capsys.readouterr().err
    assert not differences(before, contents(finished))


def test_steps_draw_the_pictures_of_a_finished_run_again(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    train("--out", run, "--steps", 2)
    changed = {name for name, content in contents(run).items()
               if differences(content, contents(finished)[name])}
    assert changed == {"samples.png", "progress.gif", "pyramid.png"}


def test_a_run_is_named_after_its_data(monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "lock", lambda folder: open(f"{folder}/none"))
    for data, name in (("a/birds/train", "birds"), ("a/train/b/", "b"), ("cats", "cats")):
        assert train("--data", data) == 2 and f"runs/{name}-2x/none" in capsys.readouterr().err


def test_the_log_shows_the_loss_on_held_out_images(finished):
    log = np.genfromtxt(finished / "log.csv", delimiter=",", names=True)
    model, tokenizer, *_ = ckgen.load(finished / "checkpoint.pt")
    images = train_tiny.Images(None, 16)  # of which 0-63 are trained on
    codes = train_tiny.encode(tokenizer, images.read(range(64, 80)), SIZES)
    loss = train_tiny.held_out_loss(model, tokenizer.codebook(), codes, images.labels[64:],
                                    Layout(SIZES, 4))
    assert len(log) == 12 and abs(log["held_out"][-1] - loss[0]) < 1e-5, log["held_out"]


def test_seeds_of_63_bits(tmp_path):
    small, large = (train_tiny.seeded(argparse.Namespace(seed=seed), 2, 7)
                    for seed in (5, 2 ** 63 - 1))
    assert small.initial_seed() == 82_000_000_581 != large.initial_seed()
    assert train("--out", tmp_path, "--seed", 2 ** 63 - 1, "--iters", 1) is None
    assert train("--out", tmp_path, "--seed", 2 ** 63) == 2


# Machines that people have ------------------------------------------------------------------------

def test_windows_renames_no_mapped_file(finished, tmp_path, monkeypatch):
    original = os.replace

    def replace(source, target):
        assert os.path.abspath(source) not in Path("/proc/self/maps").read_text(), source
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    train("--out", tmp_path / "run")
    assert not differences(contents(finished), contents(tmp_path / "run"))


# What raises an error of this number; the exit code; the complaint.
FAULTS = [*[("fcntl.flock", error, None, "") for error in (38, 37, 95)],
          ("fcntl.flock", 11, 2, "another process is at work"),
          ("fcntl.flock", 13, 2, "another process is at work"),
          ("mmap.mmap", 19, 2, r"codes-\w+.u16: cannot be mapped into memory"),
          ("os.replace", 13, 2, "Permission denied"),  # on Windows, if it is open elsewhere
          ("torch.save", 28, 2, "No space left on device")]


@pytest.mark.parametrize("function, error, code, complaint", FAULTS)
def test_faults_of_drives(function, error, code, complaint, tmp_path, monkeypatch, capsys):
    """Drives without locks do not matter. All else is said in one line, and leaves nothing half."""
    def fail(*args, **options):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(function, fail)
    assert train("--out", tmp_path, "--iters", 1) == code
    if code:
        last = capsys.readouterr().err.split("\n")[-2]
        assert re.search(f"py: error: .*{complaint}", last), last
        assert not [path for path in tmp_path.rglob("*.tmp") if "codes" not in path.name]


def test_main_in_a_thread_and_through_closed_or_narrow_pipes(finished, tmp_path):
    words = [f"{finished}/checkpoint.pt", *"--n 1 --device cpu --out".split()]
    thread = threading.Thread(target=ckgen.main, args=([*words, f"{tmp_path}/thread.png"],))
    thread.start()
    thread.join()
    python = f"{sys.executable} {ckgen.__file__}"
    for line, code in ((f"{python} | true", 141), (f"{python} >&-", 0), ("PYTHONIOENCODING=ascii "
                        f"{python} {' '.join(words)} {tmp_path}/\u00e9.png 2>&-", 0)):
        ran = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
        assert ran.returncode == code and not ran.stderr, (line, ran)
    assert {path.name for path in tmp_path.iterdir()} == {"thread.png", "\u00e9.png"}


def test_memory_that_is_lacking_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        ckgen.Parser(prog="x").run(torch.empty, 2 ** 60)
    said = capsys.readouterr().err
    assert said.startswith("x: error: not enough memory; ") and said[:-1].isprintable(), said


def test_init_takes_weights_and_tokenizer_of_a_model_of_another_scale(finished, tmp_path):
    source = finished / "checkpoint.pt"
    train("--out", tmp_path, "--init", source, "--scale", 4, "--iters", 1, "--lr", 1e-9)
    old, new = (ckgen.read(path) for path in (source, tmp_path / "checkpoint.pt"))
    changed = {name for name, value in old["model"].items()
               if value.shape != new["model"][name].shape
               or not torch.allclose(value, new["model"][name], atol=1e-6)}
    assert changed == {"embed_positions.weight", "rope"}
    assert not differences(old["tokenizer"], new["tokenizer"])


def test_init_takes_other_classes_and_refuses_another_size_before_the_work(
        finished, pictures, tmp_path, capsys):
    small, own = ckgen.read(finished / "checkpoint.pt"), tmp_path / "own"
    small["config"]["layers"] = 1
    small["model"] = {name: x for name, x in small["model"].items() if "layers.1." not in name}
    torch.save(small, tmp_path / "small.pt")
    assert train("--out", own, "--init", finished / "checkpoint.pt", "--codes", 16) == 2
    assert train("--out", own, "--init", tmp_path / "small.pt") == 2
    assert "its model has another size" in capsys.readouterr().err and not [*own.glob("*.pt")]
    train("--out", own, "--init", finished / "checkpoint.pt", "--data", pictures, "--iters", 1)
    old, new = (ckgen.read(run / "checkpoint.pt")["model"] for run in (finished, own))
    changed = {name for name, value in old.items() if value.shape != new[name].shape}
    assert changed == {"class_embeddings.weight"} and len(new["class_embeddings.weight"]) == 3


def test_runs_can_share_a_small_tokenizer(finished, pictures, tmp_path):
    """It keeps its image size and the recipe's steps, with other pictures too."""
    source = finished / "tokenizer.pt"
    for name, options in (("toy", ["--scale", 4, "--iters", 1]), ("own", ["--data", pictures])):
        train("--out", tmp_path / name, "--tokenizer", source, *options)
        old, new = (ckgen.read(path) for path in (source, tmp_path / name / "checkpoint.pt"))
        assert new["options"]["image_size"] == 16, new["options"]
        assert new["options"]["iters"] == (1 if name == "toy" else 12)
        assert not differences(old["tokenizer"], new["tokenizer"])


def test_a_run_does_not_go_on_with_another_tokenizer(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    state = ckgen.read(run / "tokenizer.pt")
    state["tokenizer"]["codebook_weight"] += 1
    torch.save(state, run / "tokenizer.pt")
    assert train("--out", run) == 2 and "another codebook" in capsys.readouterr().err


def test_codes_belong_to_their_tokenizer(finished, tmp_path):
    train("--out", tmp_path, "--seed", 1)
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    train("--out", tmp_path)
    assert not differences(*(ckgen.read(run / "checkpoint.pt") for run in (tmp_path, finished)))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError), ckgen.write_whole(tmp_path / "file") as file:
        file.write(b"new" + None)
    assert (tmp_path / "file").read_text() == "old" and len([*tmp_path.iterdir()]) == 1


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 classes with 60 pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(120):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        picture = Image.fromarray(np.random.default_rng(i).integers(1, 256, (3, 4, 3), "u1"))
        picture.resize((20, 24)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_reads_whatever_pillow_opens(tmp_path, monkeypatch):
    """77 to the left of 255, in many ways. Some EXIF cannot be written again: it is only read."""
    values, turned = np.repeat([[77, 255]], 4, 1).repeat(8, 0), Image.Exif()
    turned[0x0112] = 8  # to be shown turned left by 90 degrees
    grey, clear = Image.fromarray(values.astype("u1")), Image.new("L", (8, 8), 77)
    grey.rotate(-90).save(tmp_path / "turned.png", exif=turned)
    clear.putalpha(grey.point(lambda value: 255 * (value == 77)))  # transparent: white
    clear.save(tmp_path / "clear.png")
    grey.save(tmp_path / "exif.png", exif=b"no EXIF")
    for name, array in (("16.png", values.astype("u2") * 257),
                        ("32.tif", values.astype("i4") << 22),
                        ("float.tif", values.astype("f4") / 255)):
        Image.fromarray(array).save(tmp_path / name)
    monkeypatch.delattr(Image.Exif, "tobytes")
    for path in tmp_path.iterdir():
        read = np.array(train_tiny.read_picture(path, 8), int)
        assert abs(read[:, [0, 7]] - [[77], [255]]).max() <= 1, (path, read[0])


def test_a_fault_of_the_disk_is_not_hidden_by_the_turning_of_a_picture(tmp_path, monkeypatch):
    """Not even if the pixels can be read the second time: it would come out unturned."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    original, faults = ImageFile.ImageFile.load, [OSError(5, "Input/output error")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: throw(faults.pop()) if faults
                        else original(image))
    with pytest.raises(OSError, match="Input/output"):
        train_tiny.read_picture(tmp_path / "a.png", 8)


def throw(error):
    raise error


def make_files(folder, *names):
    """Write pictures, and other files where the name says so."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpeg", ".gif"):
            Image.new("RGB", (12, 12)).save(path, "PNG")
        else:
            path.write_text("n01443537\tgoldfish, Carassius auratus\n")


def test_finds_what_ImageFolder_finds(tmp_path):
    """In the layout of Tiny ImageNet: at any depth, any extension that pillow opens, through links;
    no folder twice, nothing hidden, no text."""
    data = tmp_path / "tiny" / "train"
    make_files(data, "n01443537/images/0.JPEG", "n01443537/n01443537_boxes.txt", "n2/1.Png",
               "n2/.hidden.png", "n2/.git/2.png", "n2/Thumbs.db", "stray.png", "empty/a.txt")
    make_files(tmp_path, "elsewhere/deep/3.gif", "tiny/words.txt")
    make_files(data, "runs/train-2x/samples.png", "runs/train-2x/.lock")  # a run of ours
    os.symlink(tmp_path / "elsewhere", data / "n3")
    os.symlink(data, data / "n2" / "loop")
    os.symlink(data / "n01443537", data / "n2" / "other")
    os.symlink(data / "n2", data / "twice")
    os.mkfifo(data / "n2" / "fifo.png")  # a program that opens it waits for ever
    images = train_tiny.Images(data, 8)
    found = {(os.path.relpath(path, data), images.classes[label])
             for path, label in zip(images.paths, images.labels)}
    assert found == {("n01443537/images/0.JPEG", "goldfish"), ("n2/1.Png", "n2"),
                     ("n3/deep/3.gif", "n3")}
    assert images.found.endswith("3 class folders; left out: 9 other files, "
                                 "folders without: empty, runs, twice")
    for path in (data / "empty", tmp_path / "elsewhere" / "deep"):
        with pytest.raises(ValueError, match=r"needs a folder of pictures .* found 0 pictures"):
            train_tiny.Images(path, 8)


def test_each_picture_is_held_out_by_its_name_alone():
    """One in twenty, 2000 at most; of each class one is always trained on."""
    names = [f"{i % 40}/{i}.png" for i in range(4000)] + ["alone/1.png"]
    order, train = train_tiny.hold_out(names)
    held_out = {*order[train:]}
    assert sorted(order) == sorted(names) and 100 < len(held_out) < 300, len(held_out)
    for removed in (names[7], order[-1]):
        fewer, train = train_tiny.hold_out([name for name in names if name != removed])
        assert {*fewer[train:]} == held_out - {removed}
    assert all(train_tiny.hold_out([f"{i}/a", f"{i}/b"])[1] > 0 for i in range(500))
    assert train_tiny.hold_out([f"a/{i}" for i in range(60000)])[1] == 58000


def test_a_damaged_picture_is_named_and_the_next_of_its_class_is_taken(pictures, capsys, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))

    def chunk(content):
        return struct.pack(f">I{len(content)}sI", len(content) - 4, content, zlib.crc32(content))

    huge = b"IHDR" + struct.pack(">II5B", 40000, 30000, 8, 0, 0, 0, 0)  # 1.2 gigapixels
    (folder / "a" / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(huge) + chunk(b"IDAT"))
    (folder / "b" / "bad.png").write_bytes(b"\x89PNG broken")
    (folder / "b" / "empty.png").touch()
    images, clean = train_tiny.Images(folder, 8), train_tiny.Images(pictures, 8)
    good = {os.path.relpath(path, pictures): clean.read([i]) for i, path in enumerate(clean.paths)}
    names = [os.path.relpath(path, folder) for path in images.paths]
    for i, name in enumerate(names):
        following = [other for other in [*names[i + 1:images.train], *names[:i]]
                     if other in good and other[0] == name[0]]
        expected = name if name in good else following[0]
        assert equal(images.read([i]), good[expected]), (name, expected)
    said = capsys.readouterr().err
    assert sorted(re.findall(r"(\w+).png': damaged", said)) == ["bad", "empty", "huge"], said
    assert "exceeds limit of 1000000000 pixels" in said, said
    (folder / "b" / "fourth.png").touch()
    for again in range(2):  # the next start does not forget what the first one saw
        assert train("--data", folder, "--out", tmp_path / "run", "--iters", 1) == 2, again
        assert "over 1 % of the files are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("fault, times, code", [
    (OSError(5, "Input/output error"), 1, None), (MemoryError(), 1, None),
    (OSError(24, "Too many open files"), 99, 2)])
def test_a_fault_of_the_machine_leaves_no_wrong_code(fault, times, code, pictures, tmp_path,
                                                     monkeypatch, capsys):
    """Reading is tried once more; then the run stops, and the next start goes on."""
    options = ["--data", pictures, "--config", "tiny", "--iters", 1, "--out"]
    train(*options, tmp_path / "whole")
    original, opened = Image.open, []

    def failing(path):
        opened.append(path)
        if 60 <= len(opened) < 60 + times:
            raise type(fault)(*fault.args)
        return original(path)

    monkeypatch.setattr(Image, "open", failing)
    assert train(*options, tmp_path / "run") == code
    if code:
        assert "py: error: [Errno 24] Too many" in capsys.readouterr().err.split("\n")[-2]
        monkeypatch.setattr(Image, "open", original)
        train(*options, tmp_path / "run")
    codes, whole = (next((tmp_path / run).glob("codes-*.u16")) for run in ("run", "whole"))
    assert codes.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("size, scale, sizes, views", [
    (16, 2, SIZES, [4, 9]), (64, 4, (1, 4, 16), range(10))])
def test_training_sees_all_views_of_the_training_pictures_alone(size, scale, sizes, views, pictures,
                                                                tmp_path, monkeypatch):
    """Small pictures are taken whole, as they are and mirrored; of larger ones ten crops."""
    train("--data", pictures, "--config", "tiny", "--iters", 1, "--image-size", size, "--scale",
          scale, "--out", tmp_path)
    images = train_tiny.Images(pictures, size)
    tokenizer = ckgen.load_tokenizer(tmp_path / "tokenizer.pt")
    codes = np.fromfile(*tmp_path.glob("codes-*.u16"), np.uint16)
    codes = codes.reshape(images.train, len(views), -1)
    for number, view in enumerate(views):
        crops = train_tiny.crop(images.read(range(images.train)), size, view)
        assert np.array_equal(codes[:, number], train_tiny.encode(tokenizer, crops, sizes)), view
    run = argparse.Namespace(seed=0, classes="ab", replace_codes=0.0, sizes=SIZES)
    view = np.arange(10, dtype="u2")[None, :, None].repeat(21, 2)
    x, *_ = train_tiny.draw_batch(run, images, view, 16, 0, 500)
    assert {*x[:, 0].tolist()} == {*range(10)}
    drawn = []
    monkeypatch.setattr(images, "read", lambda numbers: drawn.extend(numbers)
                        or torch.zeros(len(numbers), 3, images.side, images.side))
    images.batch(2000, torch.Generator())
    assert {*drawn} == {*range(images.train)}


def test_codes_belong_to_the_files(pictures, tmp_path, capsys):
    """A folder may move. Files that change are coded anew, but not once there is a checkpoint."""
    moved, out = tmp_path / "moved", tmp_path / "run"
    options = ["--out", out, "--iters", 1]
    train("--data", pictures, *options)
    shutil.copytree(pictures, moved)
    assert train("--data", moved, *options) is None
    Image.new("RGB", (9, 9)).save(moved / "a" / "0.png")
    assert train("--data", moved, *options) == 2
    assert f"not the files that {out} began with" in capsys.readouterr().err
    (out / "checkpoint.pt").unlink()
    tokenizer = (out / "tokenizer.pt").read_bytes()
    assert train("--data", moved, *options) is None
    assert capsys.readouterr().out.count("the codes are made again") == 1
    assert tokenizer == (out / "tokenizer.pt").read_bytes() and len([*out.glob("codes-*.u16")]) == 2


def test_ten_crops():
    images = torch.arange(36).view(1, 1, 6, 6)
    crops = torch.cat([train_tiny.crop(images, 4, view) for view in range(10)])[:, 0]
    assert crops[:5, 0, 0].tolist() == [0, 2, 12, 14, 7]  # the corners, then the centre
    assert crops[:5, 3, 3].tolist() == [21, 23, 33, 35, 28]
    assert equal(crops[5:], crops[:5].flip(-1))


def test_toy_shapes_are_eight_classes_in_six_colours_always_the_same():
    images = train_tiny.Images(None, 32)
    shapes = images.read(range(64))
    assert equal(shapes, images.read(range(64))) and len(images.classes) == 8
    pixels = {(*pixel,) for pixel in shapes.movedim(1, -1).flatten(0, 2).tolist()}
    assert pixels > {*train_tiny.COLOURS}
    luminance = (np.array(train_tiny.COLOURS) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * luminance ** (1 / 3) - 16  # CIE L*
    assert np.diff(lightness).min() > 10, lightness


def test_a_refit_changes_the_codebook_alone_of_tokenizers_in_three_layouts(pictures, tmp_path):
    path, out = tmp_path / "vqgan.pt", tmp_path / "run"
    tensors = {name.removeprefix("autoenc."): value for name, value in released_model()[1].items()
               if name.startswith("autoenc.")}
    llamagen = {name.replace("parametrizations.weight.original", "weight"): value
                for name, value in tensors.items()}
    for state in ({"state_dict": tensors}, tensors, {"model": llamagen}):
        torch.save(state, path)
        given = ckgen.load_tokenizer(path)
    train(*f"--data {pictures} --tokenizer {path} --codes 12 --image-size 8 --iters 2 "
          f"--out {out}".split())
    new = ckgen.load_tokenizer(out / "checkpoint.pt")
    assert len(differences(given.state_dict(), new.state_dict())) == 1
    latents = given.encode(train_tiny.as_input(train_tiny.Images(pictures, 8).read(range(20))))
    far, near = (torch.cdist(latents.flatten(2).mT, tokenizer.codebook()[None]).amin(-1).mean()
                 for tokenizer in (given, new))
    assert near < 0.7 * far and len(new.codebook()) == 12, (near, far)


# The commands, and bad input ----------------------------------------------------------------------

def command(words):
    """Run Python. Returns what it wrote to stdout."""
    ran = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True,
                         cwd=Path(__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_two_commands_and_two_processes(pictures, tmp_path):
    """Two processes train the weights of one, and one of them writes."""
    for run, launcher in (("one", ""), ("two", "-m torch.distributed.run --standalone "
                                               "--nproc-per-node=2")):
        said = command(f"{launcher} train_tiny.py --scale 2 --steps 4 --config tiny --iters 4 "
                       f"--image-size 16 --device cpu --data {pictures} --out {tmp_path}/{run}")
        assert said.count("maps 1x1 2x2 4x4") == said.count("samples.png") == 1, said
    one, two = (contents(tmp_path / run) for run in ("one", "two"))
    assert one.keys() == two.keys() > {"samples.png", "progress.gif", "pyramid.png", "log.csv"}
    for name, weight in one["checkpoint.pt"]["model"].items():
        close(weight, two["checkpoint.pt"]["model"][name], 1e-3)
    said = command(f"ckgen.py {tmp_path}/two/checkpoint.pt --class b 0 --n 3 --steps 8 "
                   f"--cfg 1.5 --device cpu --out {tmp_path}/all.npz")
    assert "all.npz: 3 images, 13 steps each" in said


def test_sampling_by_command(finished, tmp_path):
    def draw(options, name="one.png"):
        out = tmp_path / name
        ckgen.main(f"{finished}/checkpoint.pt --device cpu --out {out} {options}".split())
        return np.load(out)["arr_0"] if name == "a.npz" else Image.open(out)

    one = draw("--class star --n 1", "a.npz")[0]
    assert np.array_equal(one, draw("--class 4 --n 1"))  # the image itself, without a border
    assert not np.array_equal(one, draw("--class 4 --n 1 --seed 1"))
    assert draw("", "a.npz").shape == (64, 16, 16, 3)  # eight of each class
    everything = np.load(tmp_path / "a.npz")
    assert everything["labels"].tolist() == [*range(8)] * 8
    settings = {key: everything[key].item() for key in everything if key not in ("arr_0", "labels")}
    assert settings == {"steps": 4, "cfg": 0.5, "cfg_start": 5, "temperature": 0.5, "seed": 0}
    draw("--class none star 8 --n 4", "a.npz")
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == [8, 4, 8, 8]
    assert draw("--n 4 --steps 2 --dtype bfloat16", "a.gif").n_frames == 5


def test_a_checkpoint_without_checksums_is_valid(finished, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(ckgen.read(finished / "checkpoint.pt"), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not differences(ckgen.read(tmp_path / "a.pt"), ckgen.read(finished / "checkpoint.pt"))


FIGURE_3 = """
     1  33   9  41   3  35  11  43
    49  17  57  25  51  19  59  27
    13  45   5  37  15  47   7  39
    61  29  53  21  63  31  55  23
     4  36  12  44   2  34  10  42
    52  20  60  28  50  18  58  26
    16  48   8  40  14  46   6  38
    64  32  56  24  62  30  54  22
"""
STEPS = """
   step 6: draws [5, 15, 7, 13], reads [-1, -1, -1, -1]
   step 7: draws [10, 20, 12, 18], reads [5, 15, 7, 13]
"""


def test_explains_itself(capsys):
    ckgen.main([])
    said = capsys.readouterr().out
    assert FIGURE_3 in said and STEPS in said, said
    assert "first of step 7 predicts the code of cell 10" in said and "pos[5]" in said
    assert said.count("##") == Layout(SIZES, 4).mask.sum() + 1  # and the sentence above


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


# What is done, with the state or the bytes of a checkpoint; the command; the complaint.
BAD_INPUT = """
data = data[:1000] | ckgen bad.pt | bad.pt: damaged
data = data.replace(state["model"]["norm.weight"].numpy(), bytes(128)) | ckgen bad.pt | checksum
state["defaults"] = Evil() | ckgen ok.pt | ok.pt: damaged
state["model"]["norm.weight"] *= math.nan | ckgen ok.pt | not a finite number
state["config"]["sizes"] = (1, 10 ** 6) | ckgen ok.pt | ok.pt: damaged
del state["classes"] | ckgen ok.pt | ok.pt: damaged
del state["tokenizer"] | ckgen ok.pt | ok.pt: damaged
| ckgen missing.pt | missing.pt
| ckgen ok.pt --class dog | --class dog: not among circle, ring
| ckgen ok.pt --cfg nan | nan
| ckgen ok.pt --out no/x.png | no/x.png
| ckgen ok.pt --out a.jpg | a.jpg: not a .png, .gif or .npz file
| ckgen ok.pt --out old.png | old.png: not a .png, .gif or .npz file
| ckgen ok.pt --out LONG.png | File name too long
| ckgen ok.pt --n 6000 --out a.gif | at most 65,535 pixels a side
| ckgen ok.pt --n 999999999 --out a.npz | not enough memory
| train --image-size 30 | multiple of 4
| train --data hollow | hollow: needs a folder of pictures for each class; found 0 pictures in 0
data = b"" | ckgen bad.pt | no checkpoint, but a file that starts with b''
data = b"version https://git-lfs.github.com/spec/v1" | ckgen bad.pt | starts with b'version https
data = b"<!DOCTYPE html><html>Not found" | ckgen bad.pt | no checkpoint, but a file that starts with
data = tokenizer | ckgen bad.pt | not a checkpoint with a model to draw from
| ckgen --class star ok.pt --out a.png | options need a CHECKPOINT
| ckgen --n 4 | options need a CHECKPOINT
data = data[:1000] | train --init bad.pt | bad.pt: damaged
state["options"]["pictures"] = 1 | train --out old | not the files
del state["options"] | train --out old | checkpoint.pt: damaged, or not for this program
| train --data= | No such file or directory: ''"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().split("\n"))
def test_bad_input_gets_one_line_and_writes_nothing(line, finished, tmp_path, monkeypatch, capfd):
    fault, words, complaint = line.replace("LONG", "x" * 250).split("| ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(ckgen, "generate")  # it is said before the sampling
    for folder in ("hollow/a", "hollow/b", "old", "old.png"):
        os.makedirs(folder)
    Path("hollow/a/1.txt").touch()
    data, state = (finished / "checkpoint.pt").read_bytes(), ckgen.read(finished / "checkpoint.pt")
    tokenizer = (finished / "tokenizer.pt").read_bytes()
    names = globals() | {"data": data, "state": state, "tokenizer": tokenizer}
    exec(fault, names)
    Path("bad.pt").write_bytes(names["data"])
    torch.save(state, "ok.pt")
    shutil.copy("ok.pt", "old/checkpoint.pt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.*")}
    program, *arguments = words.split()
    with pytest.raises(SystemExit) as stopped:
        {"ckgen": ckgen, "train": train_tiny}[program].main(["--device", "cpu", *arguments])
    said = capfd.readouterr()
    assert stopped.value.code == 2 and "executed" not in said.out
    assert said.err[:-1].isprintable() and "error: " in said.err, said.err  # one line
    assert complaint in said.err, said.err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.*")}


# CUDA without a card ------------------------------------------------------------------------------

def real(x):
    """Ones in the place of a fake tensor."""
    with unset_fake_temporarily():
        return torch.ones(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x


class Card(TorchDispatchMode):
    """The tensors of the CPU are real. Those of CUDA are fake: they have a device, a type and a
    shape, and where torch refuses to compute with them, so does this. They are 1 on the CPU."""
    memory, native = 80 * 2 ** 30, True  # bytes; whether it has bfloat16

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
        return tree_map(lambda x: real(x) if torch.is_tensor(x) and x.is_cpu else x,
                        function(*args, **kwargs))


def fake_apply(module, convert):
    """nn.Module._apply, which cannot turn a real parameter into a fake one."""
    state = {name: convert(x) for name, x in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


def fake_gradients(module):
    """zero_grad. Backward does nothing: autograd's threads would look for the card."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)


def fake_generator(device="cpu"):
    """A CUDA generator is None, which only fake tensors take."""
    if torch.device(device).type == "cpu":
        return torch._C.Generator()
    return argparse.Namespace(manual_seed=lambda seed: None)


@pytest.fixture
def card(monkeypatch):
    """Make torch believe in a card. Yields it; card.current are the devices that were set."""
    if torch.cuda.is_available():
        pytest.skip("for a machine without a card")
    try:
        with FakeTensorMode():
            torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError):
        pytest.skip("this torch cannot make fake CUDA tensors")
    card, save, outside = Card(), torch.save, unset_fake_temporarily()
    card.current = []
    with FakeTensorMode(allow_non_fake_inputs=True), card:
        for owner, name, stub in (
                (FakeTensorMode, "avoid_device_init", True),
                (torch._C, "_cuda_setDevice", card.current.append),
                (torch.cuda, "_lazy_init", lambda: None),
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "is_bf16_supported",
                 lambda including_emulation=True: including_emulation or card.native),
                (torch.cuda, "mem_get_info", lambda device: (0, card.memory)),
                (torch, "load", outside(torch.load)), (torch, "Generator", fake_generator),
                (torch, "save", lambda state, file: outside(save)(tree_map(real, state), file)),
                (torch.Tensor, "backward", lambda loss: None),
                (torch.nn.Module, "zero_grad", fake_gradients),
                (torch.nn.Module, "_apply", fake_apply)):
            monkeypatch.setattr(owner, name, stub, raising=False)
        yield card


def test_a_cuda_device_has_an_index_and_bfloat16_only_if_native(card, monkeypatch):
    for name, rank, index in ((None, 3, 3), ("cuda", 3, 3), ("cuda:1", 3, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))  # by torchrun
        for card.native, dtype in ((True, bfloat16), (False, float32)):
            assert ckgen.find_device(name) == (torch.device("cuda", index), dtype), name
            assert card.current.pop() == index, name


@pytest.mark.parametrize("native", [True, False])
def test_the_commands_on_a_card(card, native, tmp_path, monkeypatch, capsys):
    """Training and sampling: all modules work on the card, in bfloat16 if it is native."""
    card.native, dtype, dtypes = native, bfloat16 if native else float32, set()

    def watch(module, inputs, output):
        devices = {str(x.device) for x in tree_leaves((inputs, output)) if torch.is_tensor(x)}
        assert devices <= {"cuda:0"}, (type(module), devices)
        if isinstance(module, (ckgen.FeedForward, ckgen.ResidualBlock)):
            dtypes.add(output.dtype)

    monkeypatch.chdir(tmp_path)
    with torch.nn.modules.module.register_module_forward_hook(watch):
        train_tiny.main("--out run --iters 2 --steps 1".split())
        assert f"config {'S' if native else 'tiny'}, " in capsys.readouterr().out
        assert dtypes == {float32, dtype}  # the pictures on the way are drawn in float32
        dtypes.clear()
        ckgen.main("run/checkpoint.pt --cfg 1.5 --out a.gif".split())
        assert dtypes == {dtype}
        model, *_ = ckgen.load("run/checkpoint.pt", "cuda:0", dtype)
        assert model.norm.weight.dtype == model.lm_head.weight.dtype == float32


def test_a_small_card_takes_fewer_images_at_once(card):
    run = argparse.Namespace(**PAPER["L"], device=torch.device("cuda", 0), dtype=bfloat16)
    config, parts = Config(scale_sizes(16, 2), 1000, 4096), []
    for card.memory in (2 ** 37, 2 ** 35, 2 ** 34, 2 ** 33, 0):
        parts.append(train_tiny.images_that_fit(run, config))
    assert parts == sorted({*parts})[::-1] and parts[0] == 64 and parts[-1] == 1, parts
