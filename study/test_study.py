"""What must hold of the laboratory. Run: python -m pytest -q study/test_study.py"""

import functools
import math
import re
import shutil
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import equal
from torch.distributions import Categorical

import coarse
import complete
import evaluate  # makes what follows importable
import speed
import study
import ckgen
import test_ckgen
import train_tiny
from ckgen import Checkerboard, Config, Layout, loss_by_scale, sample
from test_ckgen import SIZES, close, contents, differences, example, failing, one_pass
from test_ckgen import card, finished, miniature, pictures  # fixtures


def run(module, words):
    """The command of a module, on the CPU. Returns the exit code."""
    return test_ckgen.run(module.main, *words.split())


@pytest.fixture(scope="session")
def coarse_to_fine(tmp_path_factory, finished):
    """The folder of a finished run of both stages, read only."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("study") / "run")
    run(coarse, f"train {folder} --clusters 4")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """A judge that is hardly trained, and few samples."""
    hardly = functools.partial(evaluate.judge_of, iters=10)
    monkeypatch.setattr(evaluate, "judge_of", hardly)
    monkeypatch.setattr(evaluate, "SAMPLES", 64)


def test_commands_and_code_of_the_readme(finished, tmp_path, monkeypatch, capsys):
    """Every command of ours has options that exist; Python blocks run, and the first of them has
    the scan order of ckgen.py."""
    with open(f"{study.HOME}/README.md", encoding="utf8") as file:
        text = file.read()
    commands = re.findall(r"python3? ((?:study/)?(\w+)\.py[^`|\n]*)", text.replace("\\\n", ""))
    ran, modules = [], {"ckgen": ckgen, "train_tiny": train_tiny}
    monkeypatch.setattr(ckgen.Parser, "run", lambda *args: ran.append(args))
    for command, name in commands:
        module = modules.get(name) or globals().get(name)
        if module:  # not another project's
            module.main(command.removesuffix(" ...").split()[1:])
    assert len(ran) > 12, commands
    shutil.copytree(finished, tmp_path / "runs" / "toy-2x")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.split("\n")[-2] in train_tiny.SHAPES
    for size in range(1, 20):
        ours = ckgen.progressive_checkerboard(size)
        assert names["progressive_checkerboard"](size) == ours, size
    assert [len(block) for block in names["blocks"]] == [16] * 16


def test_orders_visit_all_cells_and_part_neighbours_differently():
    """Pairs of neighbours that are drawn in one step, on 16x16 cells with P = 4, 8, 16."""
    found = {}
    for name, order in study.ORDERS.items():
        assert all(sorted(order(size)) == sorted(study.raster(size)) for size in range(1, 20)), name
        for P in (4, 8, 16):
            block = np.zeros((16, 16), int)
            for number, cells in enumerate(np.array_split(order(16), P)):
                block[*cells.T] = number
            pairs = (np.diff(block, axis=0) == 0).sum() + (np.diff(block, axis=1) == 0).sum()
            found.setdefault(name, []).append(pairs)
    random = found.pop("random")
    assert np.allclose(random, [118, 59, 28], atol=20), random  # 480 (256 / P - 1) / 255
    assert found == {"checkerboard": [0] * 3, "Halton": [71, 19, 4], "raster": [432, 368, 240]}


def test_frechet_distance_is_that_of_two_gaussians():
    a = torch.randn(20000, 4, generator=torch.Generator())
    distance = evaluate.frechet_distance(a, 2 * a.flip(0) + 3)
    assert abs(distance - 40) < 0.5, distance  # 3^2 * 4 + (2 - 1)^2 * 4


def test_two_colours_are_those_of_mixed_shapes():
    shapes = train_tiny.Images(None, 32).read(range(64))
    halves = torch.cat([shapes[:32, ..., :16], shapes[32:, ..., 16:]], -1)
    assert evaluate.two_colours(shapes) == 0 and 0.5 < evaluate.two_colours(halves) < 1


def test_evaluation_by_command(finished, quick, tmp_path, capsys):
    """The loss of all tokens is that of the maps, weighted by their cells."""
    swept = f"--cfg 0 1 --temperature 0.5 1 --judge {tmp_path}/judge.pt"
    run(evaluate, f"{finished}/checkpoint.pt {swept}")
    said = capsys.readouterr().out
    assert re.search(r"\d+\.\d dB on 16 held-out images, \d+ of 16 codes", said), said
    rows = np.array([row.split() for row in re.findall(r"P = \d+ (.*)", said)], float)
    assert len(rows) == 6 and abs(rows @ [-21, 1, 4, 16]).max() < 0.05, said
    judged = r"  \d+ (.+): class accuracy [01]\.\d+, Frechet distance \d+\.\d+; two colours"
    names = [name.split(",")[0] for name in re.findall(judged, said)]
    assert names == ["held out"] * 2 + ["samples"] * 4, said
    bits, = re.findall(r"P = 4: ([\d.]+) bits .* accuracy by likelihood [01]\.\d+", said)
    assert abs(float(bits) * math.log(2) - 21 * rows[3, 0]) < 0.1, said


def test_bad_input_gets_one_line(finished, coarse_to_fine, pictures, tmp_path, capfd):
    plain, both = finished / "checkpoint.pt", coarse_to_fine / "coarse-4" / "checkpoint.pt"
    shutil.copytree(coarse_to_fine, tmp_path / "run")
    shutil.copytree(coarse_to_fine / "coarse-4", tmp_path / "run" / "coarse-5")
    train_on = f"train {tmp_path}/run --clusters"
    (tmp_path / "half.png").write_bytes((finished / "samples.png").read_bytes()[:1000])
    for module, words, complaint in (
            (evaluate, f"{tmp_path}/missing.pt", "missing.pt"),
            (evaluate, f"{finished}/tokenizer.pt", "tokenizer.pt: not a checkpoint"),
            (evaluate, f"{both}", "coarse-4/checkpoint.pt: not a checkpoint"),
            (evaluate, f"{plain} --data {pictures}", "not the files that"),
            (complete, f"{plain} --keep 4x4", "--keep 4x4: not among left, bottom, right, top"),
            (complete, f"{plain} x.png --class dog", "--class dog: not among circle, ring"),
            (complete, f"{plain} --out {tmp_path}/a.gif", "a.gif: not a .png"),
            (complete, f"{plain} x.png --out x.png", "x.png: not a .png, or one of the pictures"),
            (complete, f"{plain} {tmp_path}/x.png", "x.png"),
            (complete, f"{plain} {tmp_path}/half.png", "half.png: damaged"),
            (complete, f"{plain} --class star", "held-out pictures have their own"),
            (coarse, f"train {tmp_path}/none --clusters 4", "none: holds no run of train_tiny.py"),
            (coarse, f"{train_on} 17", "17 clusters need more than 16 codes"),
            (coarse, f"{train_on} 5", "coarse-5/checkpoint.pt: damaged, or not for")):
        assert run(module, words) == 2, words
        said = capfd.readouterr().err.split("\n")[-2]  # progress bars stand above
        assert "error: " in said and complaint in said, (words, said)
    assert not (tmp_path / "none").exists()


@torch.no_grad()
@pytest.mark.parametrize("ratio", [2, 3, 1])
@pytest.mark.parametrize("share, cfg", [(0, 1.5), (0.5, 0), (0.5, 1.5), (1, 1.5)])
def test_known_codes_are_taken_and_have_the_probability_of_one_pass(ratio, share, cfg):
    """If none is known, the draws are those of `sample` alone."""
    model, layout, codes, labels, codebook = example(ckgen.scale_sizes(5, ratio))
    known, options = codes.where(torch.rand(codes.shape) < share, -1), {"cfg_start": 2}
    options |= {"temperature": 0.7, "generator": torch.Generator()}
    options["cfg"] = cfg
    drawn, log_p = complete.sample_around(model, codebook, labels, layout, known, **options)
    given = known >= 0
    assert equal(drawn[given], known[given])
    logits = one_pass(model, codebook, drawn, labels, layout, cfg) / 0.7
    close(log_p, (Categorical(logits=logits).log_prob(drawn) * given).sum(1), 1e-3)
    if share == 0:
        options["generator"] = torch.Generator()
        assert equal(drawn, sample(model, codebook, labels, layout, **options))


def test_completions_follow_the_probability_given_what_is_known():
    """Here it can be computed: of 2^5 pictures of 1x1 and 2x2 cells with two codes."""
    torch.manual_seed(0)
    model, layout = Checkerboard(Config((1, 2), 1, 2, 8, 32, 2, 2, 48)), Layout((1, 2), 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    codebook = F.normalize(torch.randn(2, 8), dim=-1)
    pictures = torch.cartesian_prod(*[torch.arange(2)] * 5)
    log_p = evaluate.log_likelihoods(model, codebook, pictures, layout, 1)[:, 0]
    close(log_p.exp().sum(), torch.ones(()))
    known = torch.tensor([-1, -1, -1, 1, 1])
    p = log_p.exp() * (pictures[:, 3:] == 1).all(1)
    p = p / p.sum() @ pictures.float()                          # of code 1 in each cell
    drawn = [complete.complete(model, codebook, torch.tensor([0]), layout, known, candidates)
             for candidates in [1] * 300 + [64] * 300]
    one, many = torch.stack(drawn).float().view(2, 300, 5).mean(1)
    assert abs(many - p).max() < 0.1 and abs(one - p).max() > 0.2, (one, many, p)


def test_a_cell_is_known_if_all_its_pixels_are():
    layout = Layout((1, 2, 3), 4)
    pixels = torch.ones(12, 12, dtype=torch.bool)
    pixels[11, 5] = False
    codes = torch.arange(14)[None]
    known = complete.known_codes(codes, pixels, layout)
    assert known.tolist() == [[-1, 1, 2, -1, 4, 5, 6, 7, 8, 9, 10, 11, -1, 13]]


def test_completion_by_command(finished, pictures, tmp_path, capsys):
    """Of held-out pictures and of files. A picture takes 100 pixels."""
    files = " ".join(str(path) for path in sorted(pictures.rglob("*.png"))[:3])
    for words, rows, columns in (("--keep right 2x2 --n 5", 6, 5),
                                 ("--keep 2x2 --candidates 4 --cfg 0 --temperature 0.7", 3, 8),
                                 (f"{files} --class star --candidates 1 2 3 --steps 2", 5, 3)):
        run(complete, f"{finished}/checkpoint.pt {words} --out {tmp_path}/a.png")
        assert "a.png: decoded, kept: " in capsys.readouterr().out
        width, height = Image.open(tmp_path / "a.png").size
        assert height == 100 * rows and width // 100 - columns in (0, 1), (words, width)


def test_clusters_are_the_same_for_a_seed_and_never_empty():
    codebook = F.normalize(torch.randn(40, 8, generator=torch.Generator()), dim=-1)
    codebook[30:] = codebook[0]  # eleven codes are the same
    for K in (1, 7, 39, 40):
        cluster, centroids = coarse.cluster_codebook(codebook, K, seed=5)
        assert equal(cluster, coarse.cluster_codebook(codebook, K, seed=5)[0]), K
        assert cluster.bincount(minlength=K).min() > 0 and len(centroids) == K, cluster
        means = torch.stack([codebook[cluster == k].mean(0) for k in range(K)])
        close(centroids, F.normalize(means, dim=-1))


@torch.no_grad()
def test_refinement_draws_within_the_cluster_and_with_K_equal_V_nothing_new():
    """Training sees one distribution over all codes, whose loss is the sum of both stages'."""
    _, layout, codes, labels, codebook = example()
    none, cell = labels * 0 + 3, layout.cell[1:]
    for K in (5, 17):
        model = coarse.CoarseToFine(Config(SIZES, 3, 17, 8, 32, 3, 2, 48), codebook, K)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        clusters = model.cluster[codes]
        fine = model.refine(clusters, labels, layout)
        inside = model.cluster == clusters[:, cell, None]
        p = fine.softmax(-1)
        assert not p[~inside].any()
        close((p * inside).sum(-1), torch.ones(2, 21))
        log_p = model(codebook[codes], labels, layout, codebook[codes.flip(0)])
        close(log_p.exp().sum(-1), torch.ones(2, 21))
        z, noisy_z = model.centroids[clusters], model.centroids[clusters.flip(0)]
        first = loss_by_scale(model.coarse(z, labels, layout, noisy_z), clusters, layout)
        second = loss_by_scale(fine, codes, layout)
        close(loss_by_scale(log_p, codes, layout), first + second, 1e-4)
        assert K < 17 or second.eq(0).all()
        for cfg in (0, 1.5):
            options = dict(cfg=cfg, cfg_start=2, temperature=0)
            drawn = coarse.sample_both(model, None, labels, layout, **options)
            expected = sample(model.coarse, model.centroids, labels, layout, **options)
            assert equal(model.cluster[drawn], expected), (K, cfg)
            cond, uncond = (model.refine(expected, y, layout).clamp(-1e6) for y in (labels, none))
            guided = cond + cfg * (cond - uncond)
            assert equal(drawn[:, cell], guided.argmax(-1)), (K, cfg)
            options["temperature"] = 1e-9  # is argmax too, but for the second stage
            hotter = coarse.sample_both(model, None, labels, layout, **options, fine=1e10)
            assert equal(model.cluster[hotter], expected), (K, cfg)
            assert equal(hotter, drawn) == (K == 17), (K, cfg)


def test_both_stages_stopped_go_on_to_the_same_files(finished, coarse_to_fine, tmp_path,
                                                     monkeypatch):
    """Bit for bit: stopped at the eighth step, after the checkpoint of the sixth."""
    shutil.copytree(finished, tmp_path / "run")
    stopping = failing(train_tiny.draw_batch, 8, KeyboardInterrupt)
    monkeypatch.setattr(train_tiny, "draw_batch", stopping)
    monkeypatch.setattr(train_tiny, "time", Mock(monotonic=lambda: 25 * stopping.call_count))
    command, both = f"train {tmp_path}/run --clusters 4", tmp_path / "run" / "coarse-4"
    assert run(coarse, command) == 130 and ckgen.read(both / "checkpoint.pt")["step"] == 6
    run(coarse, command)
    assert not differences(contents(coarse_to_fine / "coarse-4"), contents(both))


@torch.no_grad()
def test_graph_draws_what_sample_draws(monkeypatch):
    """For other labels, seeds and weights than those of its capture too. Without a card, a replay
    is the captured call again: of the same tensors, into the same tensor."""
    device, captured = "cuda" if torch.cuda.is_available() else "cpu", Mock(wraps=sample)
    if device == "cpu":
        monkeypatch.setattr(torch, "cuda", MagicMock())
        monkeypatch.setattr(speed, "sample", captured)
        torch.cuda.CUDAGraph().replay = lambda: graph.codes.copy_(
            sample(*captured.call_args.args, **captured.call_args.kwargs))
    with torch.device(device):
        model, _, _, labels, codebook = example(B=3)
    layout, generator = Layout(SIZES, 4, device), torch.Generator(device)
    graph = speed.SamplerGraph(model, codebook, layout, 3, generator, cfg=0.5, cfg_start=2)
    drawn, expected = [], []
    for label, seed in ((0, 0), (2, 0), (2, 1)):
        labels[0] = label
        model.class_embeddings.weight[2] *= -1
        generator.manual_seed(seed)
        drawn.append(graph(labels))
        generator.manual_seed(seed)
        expected.append(sample(model, codebook, labels, layout, 0.5, 2, 1, generator))
    assert equal(torch.stack(drawn), torch.stack(expected)), (drawn, expected)


def test_speed_measures_drawing_decoding_and_training(monkeypatch, capsys):
    monkeypatch.setattr(speed, "timed", lambda work: (work(), 0.5)[1])
    run(speed, "--config tiny")
    rows = re.findall(r"(\w+) +(\d+) images: +500.0 ms, +([\d.]+)", capsys.readouterr().out)
    wanted = [(what, str(n), f"{2 * n:.1f}") for n in (1, 8, 64) for what in ("draw", "decode")]
    assert rows == wanted + [("train", "4", "8.0")], rows


def test_the_laboratory_on_a_card(card, quick, tmp_path, capsys):
    for module, words in ((train_tiny, f"--config tiny --iters 2 --out {tmp_path}"),
                          (evaluate, f"{tmp_path}/checkpoint.pt"),
                          (complete, f"{tmp_path}/checkpoint.pt --n 1 --out {tmp_path}/a.png"),
                          (coarse, f"train {tmp_path} --clusters 4")):
        module.main(words.split())
    assert "64 samples, w = 0.5, T = 0.5, 9 steps" in capsys.readouterr().out
    assert (tmp_path / "coarse-4" / "samples.png").exists()
