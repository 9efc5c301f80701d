"""What must stay true of ckgen, stated as properties. Run: python -m pytest -q test_ckgen.py

The first half holds what the paper says; then come runs, pictures, commands and machines. CUDA is
tested without a card too: see Card. CKGEN_GOLDEN names a folder with a model in the author's
released format, and with the numbers that his code computes with it."""

import gc
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import pairwise, product
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import bfloat16, equal, float32
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_leaves_with_path, tree_map

import ckgen
import train_tiny
from ckgen import (EMPTY, Checkerboard, Config, Layout, Tokenizer, TokenizerConfig, as_map,
                   decode_scale, draw, load, load_tokenizer, loss_by_scale, progress_frames,
                   progressive_checkerboard, read, sample, scale_sizes, upsample)
from train_tiny import as_input, crop, encode, hold_out, lr_factor, update_codebook

torch.set_num_threads(1)  # fastest at these sizes
SIZES = (1, 2, 4)
parametrize = pytest.mark.parametrize
ratios = parametrize("ratio", [2, 3, 4, 2 ** 0.5, 1])


def close(a, b, atol=1e-5):
    """Tensors, arrays or numbers are equal, but for rounding."""
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    torch.testing.assert_close(a, b.expand_as(a), rtol=0, atol=atol)


def differences(a, b):
    """The names of what differs, if only in a bit, between two trees of tensors and values."""
    return [path for (path, x), y in zip(tree_leaves_with_path(a), tree_leaves(b), strict=True)
            if not (equal(x, y) if torch.is_tensor(x) else x == y)]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def example(sizes=SIZES, P=3, B=2, **options):
    """A small model, all its parameters random (nothing hides behind a zero), a layout, codes
    (B, L), labels (B,) and a codebook (17, 8)."""
    torch.manual_seed(0)
    model = Checkerboard(Config(sizes, 3, 17, 8, 32, 3, 2, 48, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes = torch.randint(17, (B, model.config.length))
    return model, Layout(sizes, P), codes, torch.arange(B), F.normalize(torch.randn(17, 8))


# Scan order, scales, layout (Sec. 3.1, 3.2) -------------------------------------------------------

def test_every_prefix_of_the_scan_order_is_balanced_at_every_level():
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
        assert row.replace(",", "").split() == [str(number) for number in numbers]


@ratios
@parametrize("P", [1, 2, 3, 5, 8, 100])
def test_each_block_reads_the_block_before_it_in_its_scale(ratio, P):
    """Blocks are near equal, the larger ones first."""
    layout = Layout(scale_sizes(8, ratio), P)
    for (old, first, last), (scale, start, end) in pairwise(layout.steps):
        read = layout.before[start:end]
        if scale == old:
            assert last - first - (end - start) in (0, 1)
            assert equal(read, layout.cell[first:first + end - start])
        else:
            assert read.eq(EMPTY).all()


# Mask (Fig. 2): no token learns what it must predict ----------------------------------------------

@ratios
@parametrize("P", [1, 3, 4])
def test_no_token_learns_of_its_own_block_or_a_later_one(ratio, P):
    """With other codes, the same logits, bit for bit; and all later tokens learn of them."""
    model, layout, codes, labels, codebook = example(scale_sizes(5, ratio), P)
    z = codebook[codes]
    logits = model(z, labels, layout)
    for _, start, end in layout.steps:
        others = z.index_fill(1, layout.cell[start:], 0)
        changed = (model(others, labels, layout) != logits).any(-1)
        assert not changed[:, :end - 1].any()
        assert changed[:, end - 1:].all()


# Sampling (Sec. 4.1): step by step with a cache equals one pass over all tokens -------------------

def one_pass(model, codebook, codes, labels, layout, cfg):
    """The logits (B, L, V) of all cells of the pyramid, guided from step 2 on."""
    logits, without_class = (model(codebook[codes], y, layout) for y in (labels, labels * 0 + 3))
    start = layout.steps[2][1] - 1
    logits[:, start:] += cfg * (logits - without_class)[:, start:]
    return logits[:, layout.cell[1:].argsort()]


def sample_with_entropies(model, codebook, labels, layout, cfg, **options):
    """The likeliest codes (B, L), and the entropies of what they were chosen by (Sec. 4.5)."""
    entropies = torch.zeros(len(labels), model.config.length)

    def choose(logits, cell, temperature, generator):
        entropies[:, cell] = Categorical(logits=logits).entropy()
        return logits.argmax(-1)

    return sample(model, codebook, labels, layout, cfg, choose=choose, **options), entropies


@ratios
@parametrize("cfg", [0, 1.5])
@parametrize("mixing_layers", [0, 2, 3])
def test_one_pass_over_the_drawn_codes_gives_what_cached_sampling_saw(ratio, cfg, mixing_layers):
    """RoPE is mixed in no, in some, or in all layers."""
    model, layout, _, labels, codebook = example(scale_sizes(5, ratio), mixing_layers=mixing_layers)
    codes, entropies = sample_with_entropies(model, codebook, labels, layout, cfg, cfg_start=2)
    plain = sample(model, codebook, labels, layout, cfg, cfg_start=2, temperature=0)
    assert equal(codes, plain)
    logits = one_pass(model, codebook, codes, labels, layout, cfg)
    assert equal(codes, logits.argmax(-1))
    close(entropies, Categorical(logits=logits).entropy(), 1e-4)


@parametrize("sizes, P, cfg_start, first", [
    ((4,), 1, 5, 0), ((4,), 4, 5, 2), (SIZES, 1, 5, 1), (SIZES, 1, 2, 2), (SIZES, 4, 5, 5)])
def test_guidance_begins_at_cfg_start_or_after_half_of_fewer_steps(sizes, P, cfg_start, first):
    model, layout, _, labels, codebook = example(sizes, P)
    plain, guided = (sample(model, codebook, labels, layout, cfg, cfg_start, temperature=0)
                     for cfg in (0, 100))
    _, start, end = layout.steps[first]
    changed = (plain != guided)[:, layout.cell[1:end]].any(0)
    assert not changed[:start - 1].any()
    assert changed[start - 1:].any()


def test_draws_follow_the_softmax_and_temperature_0_is_argmax(monkeypatch):
    logits = torch.tensor([0.0, 1.0, -1.0])
    for temperature in (0, 0.5):
        drawn = draw(logits.expand(1, 20000, 3), temperature, torch.Generator())
        shares = drawn[0].bincount(minlength=3) / 20000
        close(shares, (logits / max(temperature, 1e-9)).softmax(0), 0.015)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, generator: noise.zero_())
    assert draw(logits, 1) == 1  # some devices draw exact zeros


# Inputs, RoPE, loss (Eq. 1, Sec. 3.3, 3.4) --------------------------------------------------------

def test_z_up_has_unit_length_and_replaced_codes_reach_only_z_up():
    model, layout, codes, labels, codebook = example((1, 3, 4))
    z, others = codebook[codes], codebook[codes.flip(0)]
    z_up = upsample(z, layout, 2)
    close(z_up.norm(dim=-1), 1)
    close(z_up[:, [0, 3, 12, 15]], z[:, [1, 3, 7, 9]])  # the corners
    logits = model(z, labels, layout, others)
    changed = (logits != model(z, labels, layout)).any(-1)
    assert not changed[:, 0].any() and changed[:, 1:].all()
    assert not equal(logits, model(others, labels, layout))


def test_RoPE_starts_as_a_rotation_that_tells_cells_apart_and_AdaLN_as_a_plain_norm():
    layout, model = Layout(SIZES, 3), Checkerboard(Config(SIZES, 3, width=32, heads=2))
    x, (rope, _) = torch.randn(2, 2, 22, 16), model.ropes(layout)[2]  # not a mixing layer
    close(ckgen.rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert len(rope[0, 1:].unique(dim=0)) == 21
    shift1, factor1, shift2, factor2 = model.layers[1].modulation(torch.randn(2, 32))
    close(torch.cat([shift1, shift2]), 0)
    close(torch.cat([factor1, factor2]), 1)


def test_the_loss_starts_at_log_V_and_is_the_mean_over_all_tokens():
    _, layout, codes, labels, codebook = example()
    model = Checkerboard(Config(SIZES, 3, 17, 8, 32, 3, 2, 48))
    close(loss_by_scale(model(codebook[codes], labels, layout), codes, layout), math.log(17))
    log_p = torch.randn(2, 21, 17).log_softmax(-1)
    loss, *_ = loss_by_scale(log_p, codes, layout)
    close(loss, -log_p.gather(-1, codes[:, layout.cell[1:], None]).mean())


# Tokenizer and pictures (Sec. 3.3, Fig. 1) --------------------------------------------------------

def random_tokenizer(codes=32):
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(codes))


def test_every_scale_is_encoded_from_the_image_by_itself():
    tokenizer, images = random_tokenizer(), torch.rand(3, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode_pyramid(images, SIZES)
    for n, at in zip(SIZES, Layout(SIZES, 4).scales):
        latents = tokenizer.encode(F.interpolate(images, 4 * n, mode="bilinear")).flatten(2).mT
        assert equal(codes[:, at], torch.cdist(latents, tokenizer.codebook()[None]).argmin(-1))


def test_progress_frames_show_only_what_was_drawn():
    tokenizer, layout, codes = random_tokenizer(), Layout(SIZES, 4), example()[2]
    z = tokenizer.codebook()[codes]
    frames = progress_frames(tokenizer, z, layout)
    assert np.array_equal(frames[-1], decode_scale(tokenizer, codes, layout))
    for t, (scale, _, end) in enumerate(layout.steps):
        share = (end - 1 - layout.scales[scale].start) / SIZES[scale] ** 2
        close((frames[t] != 128).any(-1).mean(), share, 0.02)
        later = z.index_fill(1, layout.cell[end:], 0)
        assert np.array_equal(frames[t], progress_frames(tokenizer, later, layout)[t])


# The author's released files ----------------------------------------------------------------------

THEIR_NAMES = {r"^(layers|norm)": r"llama.\1", r"modulation\.": "modulation.adaLN_modulation.",
               "vecs_mlp": "vecs_mlp.net", "^rope_mix": "llama.rotary_emb.mixing_coeffs",
               "^rope$": "llama.rotary_emb.position_embeddings.parametrizations.weight.original",
               r"^(encoder|decoder|quant_conv|post_quant_conv|codebook)": r"autoenc.\1",
               r"(encoder.*)resample\.1": r"\1downsample.conv", r"resample\.1": "upsample.conv",
               "codebook_weight": "quantize.embedding.parametrizations.weight.original"}


def released_model(sizes):
    """Random modules, and their tensors under the names of the author's files."""
    torch.manual_seed(0)
    parts = [Checkerboard(Config(sizes, 5, 24, 8, 32, 3, 2, 48, 2)),
             Tokenizer(TokenizerConfig(24, 8, 2, 64, (32, 32), 1))]
    tensors = {"autoenc.cluster_usage_train": torch.zeros(24)}  # a statistic of training
    for part in parts:
        for name, value in part.state_dict().items():
            for ours, theirs in THEIR_NAMES.items():
                name = re.sub(ours, theirs, name)
            tensors[name] = value.normal_(std=0.2)
    return parts, tensors


@parametrize("sizes, P, cfg", [(SIZES, 4, 1.5), ((1, 4, 16), 8, 1.7)])
def test_released_tensors_land_in_their_places(sizes, P, cfg):
    """The defaults are the paper's, for ratio 2 and for ratio 4."""
    parts, theirs = released_model(sizes)
    torch.save({"model": theirs, "args": Namespace(lr=1)}, "a.pth")
    *loaded, classes, defaults = load("a.pth")
    for own, part in zip(parts, loaded):
        assert part.config == own.config and not differences(part.state_dict(), own.state_dict())
    assert len(classes) == 5 and defaults == {"steps": P, "cfg": cfg, "temperature": 1.0}


@pytest.mark.skipif("CKGEN_GOLDEN" not in os.environ, reason="needs CKGEN_GOLDEN")
def test_released_model_number_for_number():
    folder = Path(os.environ["CKGEN_GOLDEN"])
    golden = {name: torch.from_numpy(x) for name, x in np.load(folder / "expected.npz").items()}
    model, tokenizer, *_ = load(folder / "checkpoint-last.pth")
    sizes, labels, codebook = model.config.sizes, golden["labels"], tokenizer.codebook()

    def pyramid(name):
        return torch.cat([golden[f"{name}_s{n}"].flatten(1) for n in sizes], 1)

    codes = tokenizer.encode_pyramid(golden["images"], sizes)
    assert equal(codes, pyramid("q_inds"))
    for P in (1, 2, 4, 8):
        layout = Layout(sizes, P)
        logits = model(codebook[codes], labels, layout)
        losses = torch.hstack([golden[f"tf_loss_P{P}"], golden[f"tf_loss_by_scale_P{P}"]])
        close(logits, golden[f"tf_logits_P{P}"], 1e-3)
        close(loss_by_scale(logits, codes, layout), losses, 1e-4)
    for cfg, P in product((0, 1.5), (4, 8)):
        layout, name = Layout(sizes, P), f"am_cfg{cfg}_P{P}".replace(".", "p")
        drawn, entropies = sample_with_entropies(model, codebook, labels, layout, cfg)
        assert equal(drawn, pyramid(f"{name}_tokens"))
        close(entropies, pyramid(f"{name}_entropy"), 1e-3)
        close(decode_scale(tokenizer, drawn, layout), golden[f"{name}_image_u8"].movedim(1, -1), 1)


# The recipe of training (Sec. 3.1, 4.1) -----------------------------------------------------------

PAPER = dict(train_tiny.RECIPES)


def train_on(codes, **changes):
    """Train on codes (n, views, L) of 1x1, 2x2, 4x4. Returns the trained model."""
    Path("checkpoint.pt").unlink(missing_ok=True)
    options = dict(sizes=SIZES, device=torch.device("cpu"), dtype=float32, out=".", seed=0,
                   init=None, classes=["a", "b", "c"], options={}, defaults={"steps": 4}, heads=2)
    images = Namespace(labels=torch.arange(len(codes)) % 3, train=len(codes))
    train_tiny.train_transformer(Namespace(**PAPER["tiny"] | options | changes), images,
                                 random_tokenizer(64), codes.numpy().astype("u2"))
    return load("checkpoint.pt")[0]


def test_overfits_a_handful_of_images_and_gives_them_back():
    """With any P. It knows them without their class too."""
    tokenizer = random_tokenizer(64)
    images = as_input(train_tiny.Images(None, 16).read(range(3)))
    codes, codebook = tokenizer.encode_pyramid(images, SIZES), tokenizer.codebook()
    model = train_on(codes[:, None], iters=200, width=64)
    for P in (1, 2, 3, 16, 4):
        layout = Layout(SIZES, P)
        assert equal(sample(model, codebook, torch.arange(3), layout, temperature=0), codes), P
    logits = model(codebook[codes], torch.full((3,), 3), layout)
    assert loss_by_scale(logits, codes, layout)[0] < 0.5


def test_a_batch_draws_P_and_views_drops_labels_and_replaces_codes(monkeypatch):
    """Every P up to N*N occurs, half of them powers of two up to N, the others with log-uniform
    shares. A tenth of the labels is dropped, and a tenth of the codes replaced in z_up alone."""
    steps, views, dropped, replaced = [], [], [], []

    def forward(model, z, labels, layout, noisy_z):
        assert equal(z, z[:, :1].expand_as(z))
        steps.append(len(layout.steps))
        views.append(z[:, 0])
        dropped.append(labels == 3)
        replaced.append((z != noisy_z).any(-1))
        return model.lm_head.bias.expand(16, 21, -1)

    monkeypatch.setattr(Checkerboard, "forward", forward)
    codes = torch.arange(10)[:, None].expand(64, -1, 21)  # one code in all cells of a view
    train_on(codes, iters=600, muon=0.0, replace_codes=0.1, width=32)
    assert {*steps} == {3, 5, 7, *range(9, 22)}  # 1 + min(P, 4) + P
    power_of_two = np.mean([n in (3, 5, 9) for n in steps])
    close(power_of_two, 0.5 + 0.5 * math.log(2 * 3 / 2 * 5 / 4, 17), 0.03)
    assert len(torch.cat(views).unique(dim=0)) == 10
    close(torch.cat(dropped).float().mean(), 0.1, 0.007)
    close(torch.cat(replaced).float().mean(), 0.1 * 63 / 64, 0.007)


def test_five_batches_or_four_parts_give_the_weights_of_one_batch(monkeypatch):
    """But for rounding. Batches are accumulated after an epoch: here of one step."""
    weights = []
    monkeypatch.setattr(train_tiny, "make_optimizers", lambda model, run: [
        torch.optim.SGD([{"params": model.parameters(), "times": 1}])])  # AdamW multiplies rounding
    for batch, last_batches, at_once in ((20, (), 20), (20, (), 6), (4, (0, 5), 2)):
        monkeypatch.setattr(train_tiny, "images_that_fit", lambda *rest: at_once)
        model = train_on(example(B=16)[2][:, None], iters=4, epochs=4, lr=2.0, width=32,
                         batch_size=batch, last_batches=last_batches)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    whole, in_parts, in_batches = weights
    close(in_parts, whole)
    close(in_batches, whole)
    assert not equal(in_parts, whole), "they were not computed in parts"


@parametrize("name, factors", [("tiny", [0.05, 0.5, 0.053, 0]), ("S", [0.053, 1, 0.316, 0.1]),
                               ("L", [0.1, 1, 1, 0.2])])
def test_learning_rates_warm_up_and_fall(name, factors):
    """At the first step, in the middle, towards the end, and at the last step."""
    run = Namespace(**PAPER[name] | {"iters": 2060})
    close([lr_factor(run, step) for step in (0, 1029, 1950, 2059)], factors, 0.001)


def test_Muon_moves_a_matrix_along_the_orthogonal_matrix_nearest_to_its_gradient():
    p = torch.zeros(16, 4)
    p.grad = torch.randn(16, 4)
    muon = train_tiny.Muon([p])
    muon.param_groups[0]["lr"] = 1.0
    muon.step()
    u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
    close(-u.T @ p @ vh.T, 2 * torch.eye(4), 0.7)  # 2: the root of 16 / 4


def test_the_codebook_follows_its_latents_and_revives_unused_codes():
    tokenizer, centres = random_tokenizer(16), F.normalize(torch.randn(8, 8))
    tokenizer.codebook_weight = torch.cat([centres + 0.1 * torch.randn(8, 8), -centres])  # 8 lost
    for _ in range(600):
        latents = F.normalize(centres.repeat(8, 1) + 0.02 * torch.randn(64, 8))
        update_codebook(tokenizer, as_map(latents[None]), torch.Generator(), 64)
    alike = tokenizer.codebook() @ centres.T                                # (16, 8)
    assert min(alike.amax(1).min(), alike.amax(0).min()) > 0.99


# Whole runs: stopped, continued, repeated ---------------------------------------------------------

class Few(train_tiny.Images):
    """64 toy shapes to train on, 16 held out."""

    def __init__(self, folder, size):
        super().__init__(folder, size)
        if folder is None:
            self.labels, self.train = self.labels[:80], 64


@pytest.fixture(scope="session", autouse=True)
def miniature():
    """Two configurations at a size that takes a second."""
    small = dict(width=32, layers=2, heads=2, image_size=16, codes=16, batch_size=4,
                 tokenizer_iters=1, tokenizer_batch=4, iters=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "Images", Few)
        for name in ("tiny", "S"):
            patch.setitem(train_tiny.RECIPES, name, PAPER[name] | small)
        patch.setattr(train_tiny, "PICTURES", dict(codes=16, batch_size=8, iters=12))
        yield


def run(main, *words):
    """A command on the CPU. Returns the exit code."""
    try:
        main([*words, "--device", "cpu"])
    except SystemExit as stopped:
        return stopped.code
    finally:
        gc.collect()  # an exception holds the folder's lock


def train(command):
    return run(train_tiny.main, *command.split())


@pytest.fixture
def refused(capfd):
    """Check that a command ends with exit code 2, and a last line that holds the complaint."""
    def check(command, complaint, main=train_tiny.main):
        assert run(main, *command.split()) == 2
        said = capfd.readouterr()
        last = re.split("[\r\n]", said.err)[-2]
        assert last.isprintable() and "error: " in last and complaint in last
        return said
    return check


@pytest.fixture(scope="session")
def finished(tmp_path_factory, miniature):
    """The folder of a finished run, read only."""
    folder = tmp_path_factory.mktemp("finished")
    train(f"--out {folder}")
    return folder


def contents(folder):
    """A run's files: checkpoints as read, of the others the bytes."""
    return {path.name: read(path) if path.suffix == ".pt" else path.read_bytes()
            for path in sorted(Path(folder).glob("[!.]*"))}


def failing(function, call, fault, times=1):
    """The function, but from this call on it fails so many times."""
    effects = [DEFAULT] * (call - 1) + [fault] * times + [DEFAULT] * 9999
    return Mock(wraps=function, side_effect=effects)


@parametrize("name, call", [
    ("seeded", 8), ("crop", 14), ("seeded", 14), ("seeded", 23), ("save_checkpoint", 1)])
def test_a_stopped_run_goes_on_to_the_same_files(name, call, finished, monkeypatch):
    """Bit for bit. It stops while the tokenizer is trained, while images are coded, while the
    transformer is trained, after a checkpoint, before one."""
    stopping = failing(getattr(train_tiny, name), call, KeyboardInterrupt)
    clock = Namespace(monotonic=lambda: 25 * stopping.call_count)
    monkeypatch.setattr(train_tiny, name, stopping)
    monkeypatch.setattr(train_tiny, "time", clock)  # a checkpoint after each third step
    assert train("--out run") == 130
    assert os.path.exists("run/checkpoint.pt") == (call == 23)
    train("--out run")
    assert not differences(contents(finished), contents("run"))


def test_a_finished_run_stays_as_it_is_but_other_steps_draw_its_pictures_again(finished, refused):
    shutil.copytree(finished, "run")
    before = times_of_change()
    train("--out run")
    assert before == times_of_change()
    with train_tiny.lock("run"):
        refused("--out run", "another process")
    assert not differences(contents("run"), contents(finished))
    train("--out run --steps 2")
    changed = {path[-1].key for path in differences(contents("run"), contents(finished))}
    assert changed == {"samples.png", "progress.gif", "pyramid.png", "steps"}


def test_the_log_shows_the_loss_on_held_out_images(finished):
    log = np.genfromtxt(finished / "log.csv", delimiter=",", names=True)
    model, tokenizer, *_ = load(finished / "checkpoint.pt")
    images = train_tiny.Images(None, 16)  # of which 0-63 are trained on
    codes, layout = encode(tokenizer, images.read(range(64, 80)), SIZES), Layout(SIZES, 4)
    logits = model(tokenizer.codebook()[codes], images.labels[64:], layout)
    close(log["held_out"][11], loss_by_scale(logits, codes, layout)[0])


@parametrize("option", ["init", "tokenizer"])
def test_a_released_file_is_trained_further_at_256_pixels_for_the_papers_epochs(option, pictures):
    torch.save({"model": released_model(SIZES)[1]}, "a.pth")
    given = {"out": "run", "data": str(pictures), option: "a.pth"}
    args = Namespace(**dict.fromkeys(train_tiny.OPTIONS) | given)
    options = train_tiny.fill_options(args, bfloat16)
    assert options["image_size"] == 256 and options["iters"] is options["codes"] is None
    assert options["config"] == "S" and options["lr"] == 1e-4


def test_init_takes_all_but_tables_of_another_shape(finished, pictures):
    """For another ratio of scales, and for other classes."""
    for out, options, anew in (("a", "--scale 4", {"embed_positions.weight", "rope"}),
                               ("b", f"--data {pictures}", {"class_embeddings.weight"})):
        train(f"--out {out} --init {finished}/checkpoint.pt --iters 1 --lr 1e-9 {options}")
        old, new = (read(f"{run}/checkpoint.pt") for run in (finished, out))
        shared = {name for name, value in old["model"].items()
                  if value.shape == new["model"][name].shape}
        for name in shared:
            close(old["model"][name], new["model"][name], 1e-6)
        assert old["model"].keys() - shared == anew
        assert not differences(old["tokenizer"], new["tokenizer"])


def test_runs_can_share_a_small_tokenizer(finished, pictures):
    """It keeps its image size and the recipe's steps, with other pictures too."""
    source = finished / "tokenizer.pt"
    for options, iters in (("--scale 4 --iters 1", 1), (f"--data {pictures}", 12)):
        train(f"--out {iters} --tokenizer {source} {options}")
        state = read(f"{iters}/checkpoint.pt")
        assert state["options"]["image_size"] == 16 and state["options"]["iters"] == iters
        assert not differences(state["tokenizer"], read(source)["tokenizer"])


def test_codes_and_checkpoint_belong_to_their_tokenizer(finished, refused):
    assert train(f"--out run --seed {2 ** 63 - 1}") is None
    shutil.copy(finished / "tokenizer.pt", "run")
    refused("--out run", "another codebook")
    os.remove("run/checkpoint.pt")
    train("--out run")
    assert not differences(read("run/checkpoint.pt"), read(finished / "checkpoint.pt"))


# Pictures from a folder ---------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 2 classes with 60 pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(120):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        picture = Image.fromarray(np.random.default_rng(i).integers(1, 256, (3, 4, 3), "u1"))
        picture.resize((20, 24)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_reads_whatever_pillow_opens(monkeypatch):
    """77 to the left of 255, in many ways. Some EXIF cannot be written again: it is only read."""
    values, turned = np.repeat([[77, 255]], 4, 1).repeat(8, 0), Image.Exif()
    turned[0x0112] = 8  # to be shown turned left by 90 degrees
    grey, clear = Image.fromarray(values.astype("u1")), Image.new("L", (8, 8), 77)
    grey.rotate(-90).save("turned.png", exif=turned)
    clear.putalpha(grey.point(lambda value: 255 * (value == 77)))  # transparent: white
    clear.save("clear.png")
    grey.convert("P").save("palette.gif")
    grey.save("exif.png", exif=b"no EXIF")
    Image.fromarray(values.astype("u2") * 257).save("16.png")
    Image.fromarray(values.astype("i4") << 22).save("32.tif")
    Image.fromarray(values.astype("f4") / 255).save("float.tif")
    monkeypatch.delattr(Image.Exif, "tobytes")
    for path in os.listdir():
        shown = np.array(train_tiny.read_picture(path, 8), int)
        assert abs(shown[:, [0, 7]] - [[77], [255]]).max() <= 1, path


def test_a_fault_of_the_disk_is_not_hidden_by_the_turning_of_a_picture(monkeypatch):
    """Not even if the pixels can be read the second time: it would come out unturned."""
    Image.new("RGB", (8, 8)).save("a.png")
    load_pixels = Mock(side_effect=[OSError(5, "Input/output error"), None, None])
    monkeypatch.setattr(ImageFile.ImageFile, "load", load_pixels)
    with pytest.raises(OSError, match="Input/output"):
        train_tiny.read_picture("a.png", 8)


def test_finds_what_ImageFolder_finds():
    """In the layout of Tiny ImageNet: at any depth, any extension that pillow opens, through links,
    but not in circles; nothing hidden, no text."""
    for name in ("n01443537/images/0.JPEG", "n01443537/n01443537_boxes.txt", "n2/1.Png",
                 "n2/.hidden.png", "n2/.git/2.png", "n2/Thumbs.db", "stray.png", "empty/a.txt",
                 "runs/toy-2x/samples.png", "runs/toy-2x/tokenizer.pt", "../elsewhere/deep/3.gif"):
        path = Path("train", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    os.symlink("../elsewhere", "train/n3")
    os.symlink("..", "train/n2/loop")
    os.symlink("../..", "train/n2/wider-loop")
    os.mkfifo("train/n2/fifo.png")  # a program that opens it waits for ever
    images = train_tiny.Images("train", 8)
    found = {path: images.classes[label] for path, label in zip(images.paths, images.labels)}
    assert found == {"train/n01443537/images/0.JPEG": "goldfish", "train/n2/1.Png": "n2",
                     "train/n3/deep/3.gif": "n3"}
    assert images.found == "3 pictures in 3 class folders, beside 6 other files"
    assert train_tiny.name_of("a/birds/train") == "birds" == train_tiny.name_of("train/birds/")
    for folder in ("train/empty", "elsewhere/deep"):
        with pytest.raises(ValueError, match="needs a folder of pictures .* found 0 pictures"):
            train_tiny.Images(folder, 8)


def test_each_picture_is_held_out_by_its_name_alone():
    """One in twenty, 2000 at most; of each class one is always trained on."""
    names = [f"{i % 40}/{i}.png" for i in range(4000)]
    order, train = hold_out(names)
    held_out = {*order[train:]}
    assert sorted(order) == sorted(names) and 100 < len(held_out) < 300
    for removed in (names[7], order[-1]):
        fewer, train = hold_out([name for name in names if name != removed])
        assert {*fewer[train:]} == held_out - {removed}
    assert hold_out([f"{i}/a" for i in range(500)])[1] == 500
    assert hold_out([f"a/{i}" for i in range(60000)])[1] == 58000


def test_a_damaged_picture_is_named_and_another_of_its_class_is_taken(pictures, refused, capfd):
    shutil.copytree(pictures, "data")
    Path("data/a/bad-size.ppm").write_bytes(b"P5 40000 30000 255\n")  # 1.2 gigapixels
    Path("data/b/bad-data.png").write_bytes(b"\x89PNG broken")
    Path("data/b/bad-48.png").touch()
    images = train_tiny.Images("data", 8)
    good = ["bad" not in path for path in images.paths]
    for i, label in enumerate(images.labels):
        taken = next(j for j in [i, *range(images.train)] if good[j] and images.labels[j] == label)
        picture = train_tiny.read_picture(images.paths[taken], 8)
        assert np.array_equal(images.read([i])[0].movedim(0, -1), picture), images.paths[i]
    said = capfd.readouterr().err
    assert sorted(re.findall(r"bad-(\w+).*: damaged", said)) == ["48", "data", "size"]
    assert "exceeds limit of 1000000000 pixels" in said
    for number in range(1, 120, 2):
        Path(f"data/b/{number}.png").write_bytes(b"")
    refused("--data data --out run --iters 1", "damaged, and so is all that could replace it")


@parametrize("fault", [OSError(24, "Too many files"), MemoryError("allocate memory")])
def test_a_fault_of_the_machine_leaves_no_wrong_code(fault, pictures, monkeypatch, refused):
    """The run stops, and the next start goes on."""
    command = f"--data {pictures} --iters 1 --out"
    train(f"{command} whole")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing(Image.open, 60, fault, 99))
        refused(f"{command} run", str(fault))
    train(f"{command} run")
    codes, whole = (next(Path(run).glob("codes-*.u16")) for run in ("run", "whole"))
    assert codes.read_bytes() == whole.read_bytes()
    Path("run/checkpoint.pt").unlink()
    codes.write_bytes(2 * codes.read_bytes())  # as if of more views
    refused(f"{command} run", codes.name)


@parametrize("size, scale, views", [(16, 2, [4, 9]), (64, 4, range(10))])
def test_the_codes_are_those_of_all_views(size, scale, views, pictures):
    """Small pictures are taken whole, as they are and mirrored; of larger ones ten crops."""
    train(f"--data {pictures} --iters 1 --batch-size 1 --image-size {size} --scale {scale} "
          "--out run")
    images = train_tiny.Images(pictures, size)
    whole = images.read(range(images.train))
    tokenizer, sizes = load_tokenizer("run/tokenizer.pt"), scale_sizes(size // 4, scale)
    expected = [encode(tokenizer, crop(whole, size, view), sizes) for view in views]
    codes = np.fromfile(*Path("run").glob("codes-*.u16"), np.uint16)
    assert np.array_equal(codes, torch.stack(expected, 1).flatten())


def test_the_tokenizer_sees_all_training_pictures_and_no_others(pictures):
    images = train_tiny.Images(pictures, 64)
    images.read = Mock(return_value=torch.zeros(2000, 3, 70, 70))
    images.batch(2000, torch.Generator())
    assert {*images.read.call_args.args[0]} == {*range(images.train)}


def test_a_run_belongs_to_its_files(pictures, refused):
    """A folder may move. Files must not change."""
    train(f"--out run --iters 1 --data {pictures}")
    shutil.copytree(pictures, "moved")
    command = "--out run --iters 1 --data moved"
    assert train(command) is None
    Image.new("RGB", (9, 9)).save("moved/a/0.png")
    refused(command, "not the files that run began with")


def test_ten_crops():
    images = torch.arange(36).view(1, 1, 6, 6)
    crops = torch.cat([crop(images, 4, view) for view in range(10)])[:, 0]
    assert crops[:5, 0, 0].tolist() == [0, 2, 12, 14, 7]  # the corners, then the centre
    assert crops[:5, 3, 3].tolist() == [21, 23, 33, 35, 28]
    assert equal(crops[5:], crops[:5].flip(-1))


def test_toy_shapes_are_eight_classes_in_six_colours_always_the_same():
    images = train_tiny.Images(None, 32)
    shapes = images.read(range(64))
    assert equal(shapes, images.read(range(64))) and len(images.classes) == 8
    pixels = {(*pixel,) for pixel in shapes.movedim(1, -1).flatten(0, 2).tolist()}
    assert pixels > {*train_tiny.COLOURS}


def test_a_refit_changes_the_codebook_alone_of_tokenizers_in_three_layouts(pictures):
    _, released = released_model(SIZES)
    tensors = {name.removeprefix("autoenc."): value for name, value in released.items()
               if name.startswith("autoenc.")}
    llamagen = {name.replace("parametrizations.weight.original", "weight"): value
                for name, value in tensors.items()}
    for state in ({"state_dict": tensors}, tensors, {"model": llamagen}):
        torch.save(state, "vqgan.pt")
        given = load_tokenizer("vqgan.pt")
    train(f"--data {pictures} --tokenizer vqgan.pt --codes 12 --image-size 8 --iters 2 --out run")
    new = load_tokenizer("run/checkpoint.pt")
    assert len(differences(given.state_dict(), new.state_dict())) == 1
    latents = given.encode(as_input(train_tiny.Images(pictures, 8).read(range(20))))
    far, near = (torch.cdist(latents.flatten(2).mT, tokenizer.codebook()[None]).amin(-1).mean()
                 for tokenizer in (given, new))
    assert near < 0.7 * far and len(new.codebook()) == 12


# The commands, and bad input ----------------------------------------------------------------------

def test_the_two_commands_and_two_processes(pictures, monkeypatch):
    """Two processes train the weights of one, and one of them writes."""
    def command(words):
        return subprocess.check_output([sys.executable, *words.split()], text=True)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two_processes = "-m torch.distributed.run --standalone --nproc-per-node=2"
    for out, launcher in (("one", ""), ("two", two_processes)):
        said = command(f"{launcher} {train_tiny.__file__} --scale 2 --steps 4 --config tiny "
                       f"--iters 4 --image-size 16 --device cpu --data {pictures} --out {out}")
        assert said.count("maps 1x1 2x2 4x4") == said.count("samples.png") == 1
    one, two = contents("one"), contents("two")
    assert one.keys() == two.keys() > {"samples.png", "progress.gif", "pyramid.png", "log.csv"}
    for name, weight in one["checkpoint.pt"]["model"].items():
        close(weight, two["checkpoint.pt"]["model"][name], 1e-3)
    said = command(f"{ckgen.__file__} two/checkpoint.pt --class b 0 --n 3 --steps 8 "
                   "--cfg 1.5 --device cpu --out all.npz")
    assert "all.npz: 3 images, 13 steps each" in said


def test_sampling_by_command(finished):
    def draw_pictures(options, out="one.png"):
        ckgen.main(f"{finished}/checkpoint.pt --device cpu --out {out} {options}".split())
        return np.load(out) if out == "a.npz" else Image.open(out)

    one = draw_pictures("--class star --n 1", "a.npz")["arr_0"][0]
    assert np.array_equal(one, draw_pictures("--class 4 --n 1"))  # the image itself, no border
    assert not np.array_equal(one, draw_pictures("--class 4 --n 1 --seed 1"))
    everything = dict(draw_pictures("", "a.npz"))
    assert everything.pop("arr_0").shape == (64, 16, 16, 3)  # eight of each class
    assert everything.pop("labels").tolist() == [*range(8)] * 8
    assert everything == {"steps": 4, "cfg": 0.5, "cfg_start": 5, "temperature": 0.5, "seed": 0}
    assert draw_pictures("--class none 4 8 --n 4", "a.npz")["labels"].tolist() == [8, 4, 8, 8]
    assert draw_pictures("--n 4 --steps 2 --dtype bfloat16", "a.gif").n_frames == 5


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


def test_explains_itself(capsys):
    ckgen.main([])
    said = capsys.readouterr().out
    assert "step 6: draws [5, 15, 7, 13], reads [-1, -1, -1, -1]" in said
    assert FIGURE_3 in said and "step 7: draws [10, 20, 12, 18], reads [5, 15, 7, 13]" in said
    assert "first of step 7 predicts the code of cell 10" in said and "pos[5]" in said
    assert said.count("##") == Layout(SIZES, 4).mask.sum() + 1  # and the sentence above


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


@pytest.fixture
def bad_files(finished):
    """Files and folders in the test's own folder, named after what is wrong with them."""
    data, state = (finished / "checkpoint.pt").read_bytes(), read(finished / "checkpoint.pt")
    model, config, norm = state["model"], state["config"], state["model"]["norm.weight"]
    Path("half.pt").write_bytes(data[:1000])
    Path("empty.pt").touch()
    Path("altered.pt").write_bytes(data.replace(norm.numpy(), bytes(128)))
    shutil.copy(finished / "tokenizer.pt", "tokenizer.pt")
    os.mkdir("folder.png")
    one_layer = {name: value for name, value in model.items() if "layers.1." not in name}
    changes = {"good": {}, "evil": {"defaults": Evil()}, "no-options": {"options": None},
               "nan": {"model": model | {"norm.weight": norm * math.nan}},
               "small": {"config": config | {"layers": 1}, "model": one_layer}}
    for name, change in changes.items():
        os.mkdir(name)
        torch.save(state | change, f"{name}/checkpoint.pt")


BAD_INPUT = {
    "ckgen half.pt": "half.pt: damaged",
    "ckgen empty.pt": "empty.pt: damaged",
    "ckgen altered.pt": "checksum",
    "ckgen evil/checkpoint.pt": "checkpoint.pt: damaged",
    "ckgen nan/checkpoint.pt": "not a finite number",
    "ckgen tokenizer.pt": "not a checkpoint with a model to draw from",
    "ckgen good/checkpoint.pt --class dog": "--class dog: not among circle, ring",
    "ckgen good/checkpoint.pt --cfg nan": "nan is not from 0",
    "ckgen good/checkpoint.pt --out no/x.png": "no/x.png",
    "ckgen good/checkpoint.pt --out a.jpg": "a.jpg: not a .png, .gif or .npz file",
    "ckgen good/checkpoint.pt --out folder.png": "folder.png: not a .png, .gif or .npz file",
    "ckgen good/checkpoint.pt --n 6000 --out a.gif": "a .gif takes 655 images at most",
    "ckgen --class star good/checkpoint.pt --out a.png": "options need a CHECKPOINT",
    "train_tiny --image-size 30": "multiple of 4",
    "train_tiny --data good": "for each class, or one for all; found 0 pictures in 0 class folders",
    "train_tiny --init small/checkpoint.pt": "not for this program: Error(s) in loading",
    "train_tiny --init good/checkpoint.pt --codes 16": "--codes: a model of --init needs",
    "train_tiny --out no-options": "checkpoint.pt: damaged, or not for this program",
    "train_tiny --out good --seed 7": "--seed 0",
}


def times_of_change():
    return {path: path.stat().st_mtime_ns for path in Path().rglob("[!.]*.*")}


@parametrize("words, complaint", BAD_INPUT.items())
def test_bad_input_gets_one_line_and_writes_nothing(
        words, complaint, bad_files, monkeypatch, refused):
    monkeypatch.delattr(ckgen, "generate")  # it is said before the sampling
    before = times_of_change()
    program, options = words.split(" ", 1)
    said = refused(options, complaint, sys.modules[program].main)
    assert said.err.count("\n") == 1 and "executed" not in said.out
    assert before == times_of_change()


def test_a_mistake_of_ours_is_not_told_as_a_damaged_file(finished, monkeypatch):
    monkeypatch.setattr(ckgen, "build", Mock(side_effect=AttributeError("a mistake")))
    with pytest.raises(AttributeError, match="^a mistake$"):
        load(finished / "checkpoint.pt")


# Machines that people have ------------------------------------------------------------------------

@parametrize("error", [38, 37, 95])
def test_drives_without_locks_do_not_matter(error, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(error, "no locks")))
    assert train("--out run --iters 1") is None


@parametrize("function, fault, complaint", [
    ("fcntl.flock", OSError(11, "locked"), "another process is at work"),
    ("fcntl.flock", OSError(13, "locked"), "another process is at work"),
    ("os.replace", OSError(13, "it is open"), "it is open"),  # Windows
    ("torch.save", OSError(28, "No space left"), "No space left"),
    ("torch.save", RuntimeError("[fail at inline_container.cc:672]"), "the disk may be full"),
    ("train_tiny.train_transformer", lambda *rest: torch.empty(2 ** 60), "not enough memory")])
def test_faults_are_said_in_one_line_and_leave_nothing_half(
        function, fault, complaint, monkeypatch, refused):
    monkeypatch.setattr(function, Mock(side_effect=fault))
    refused("--out run --iters 1", complaint)
    assert not [*Path("run").glob("*.tmp")]


def test_a_write_that_fails_leaves_the_old_file():
    Path("file").write_text("old")
    with pytest.raises(TypeError), ckgen.write_whole("file") as file:
        file.write(b"new" + None)
    assert Path("file").read_text() == "old" and os.listdir() == ["file"]


def test_closed_or_narrow_pipes(finished):
    words = f"{finished}/checkpoint.pt --n 1 --device cpu --out"
    python = f"{sys.executable} {ckgen.__file__}"
    for line, code in {f"{python} | true": 141, f"{python} >&-": 0,
                       f"PYTHONIOENCODING=ascii {python} {words} \u00e9.png 2>&-": 0}.items():
        ran = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
        assert ran.returncode == code and not ran.stderr
    assert os.listdir() == ["\u00e9.png"]


# CUDA without a card ------------------------------------------------------------------------------

def real(x):
    """Ones on the CPU in the place of a fake tensor."""
    with unset_fake_temporarily():
        return torch.ones(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x


class Card(TorchDispatchMode):
    """The tensors of the CPU are real. Those of CUDA are fake: they have a device, a type and a
    shape, and where torch refuses to compute with them, so does this. They are 1 on the CPU."""
    memory, native = 80e9, True  # bytes; whether it has bfloat16

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
    return Namespace(manual_seed=lambda seed: None)


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
                (torch.cuda, "_lazy_init", lambda: None), (torch, "Generator", fake_generator),
                (torch.cuda, "is_available", lambda: True), (torch, "load", outside(torch.load)),
                (torch.cuda, "is_bf16_supported",
                 lambda including_emulation=True: including_emulation or card.native),
                (torch.cuda, "mem_get_info", lambda device: (0, card.memory)),
                (torch, "save", lambda state, file: outside(save)(tree_map(real, state), file)),
                (torch.Tensor, "backward", lambda loss: None),
                (torch.nn.Module, "zero_grad", fake_gradients),
                (torch.nn.Module, "_apply", fake_apply)):
            monkeypatch.setattr(owner, name, stub, raising=False)
        yield card


def test_a_cuda_device_has_an_index_and_bfloat16_only_if_native(card, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")  # by torchrun
    for name, index in ((None, 3), ("cuda", 3), ("cuda:1", 1)):
        for card.native, dtype in ((True, bfloat16), (False, float32)):
            assert ckgen.find_device(name) == (torch.device("cuda", index), dtype)
            assert card.current.pop() == index


@parametrize("native, config, dtype", [(True, "S", bfloat16), (False, "tiny", float32)])
def test_the_commands_on_a_card(native, config, dtype, card, capsys):
    """Training and sampling: all modules work on the card, in bfloat16 if it is native."""
    card.native, dtypes = native, set()

    def watch(module, inputs, output):
        devices = {str(x.device) for x in tree_leaves((inputs, output)) if torch.is_tensor(x)}
        assert devices <= {"cuda:0"}, module
        if isinstance(module, (ckgen.FeedForward, ckgen.ResidualBlock)):
            dtypes.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(watch):
        train_tiny.main("--out run --iters 2 --steps 1".split())
        assert f"config {config}, " in capsys.readouterr().out
        assert dtypes == {float32, dtype}  # the pictures on the way are drawn in float32
        dtypes.clear()
        ckgen.main("run/checkpoint.pt --cfg 1.5 --out a.gif".split())
        assert dtypes == {dtype}
        model, *_ = load("run/checkpoint.pt", "cuda:0", dtype)
        assert model.norm.weight.dtype == model.lm_head.weight.dtype == float32


def test_a_small_card_takes_fewer_images_at_once(card):
    run = Namespace(**PAPER["L"], device=torch.device("cuda", 0), dtype=bfloat16)
    with torch.device("meta"):
        L = Checkerboard(Config(scale_sizes(16, 2), 1000, 4096, 8, 1024, 20, 16, 3072))
    fit = [train_tiny.images_that_fit(run, L) for card.memory in (140e9, 40e9, 20e9, 10e9, 0)]
    assert 64 == fit[0] > fit[1] > fit[2] > fit[3] > fit[4] == 1
