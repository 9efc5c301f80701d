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
from ckgen import Checkerboard, Config, Layout, Tokenizer, TokenizerConfig

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
    rank = 0
    for level in range(6):
        x, y = cell[0] >> level & 1, cell[1] >> level & 1
        rank = 4 * rank + 2 * (x ^ y) + y
    return rank


def test_order_is_figure_3():
    order = ckgen.progressive_checkerboard(8)
    assert [order.index((i % 8, i // 8)) + 1 for i in range(64)] == [*map(int, FIGURE_3.split())]


def test_order_has_every_cell_once_and_a_closed_form_also_pasted_alone():
    names = {}
    exec(inspect.getsource(ckgen.progressive_checkerboard), names)
    order = names["progressive_checkerboard"]
    for size in range(1, 34):
        assert order(size) == sorted(product(range(size), repeat=2), key=closed_form_rank), size
    with pytest.raises(ValueError, match="not 0"):
        order(0)


def test_every_prefix_is_balanced_at_every_level():
    for size in range(1, 34):
        for level in range(size.bit_length()):
            x, y = np.array(ckgen.progressive_checkerboard(size)).T >> level
            whole = size >> level  # so many quadrants of this level lie inside, in each direction
            quadrant = (y * whole + x)[(x < whole) & (y < whole)]
            counts = np.cumsum(quadrant[:, None] == np.arange(whole ** 2), 0)
            assert np.ptp(counts, axis=1).max() <= 1, f"size {size}, level {level}: {counts}"


def test_scale_sizes_gives_the_table_of_its_docstring():
    rows = re.findall(r"(sqrt 2|\d) +((?:\d+ )+) *(\d+) +(\d+), (\d+)", ckgen.scale_sizes.__doc__)
    assert len(rows) == 5
    for ratio, sides, *numbers in rows:
        sizes = ckgen.scale_sizes(16, 2 ** 0.5 if ratio == "sqrt 2" else int(ratio))
        steps = [str(len(Layout(sizes, P).steps)) for P in (4, 8)]
        assert " ".join(map(str, sizes)) == sides.strip(), ratio
        assert [str(Config(sizes, 1).length), *steps] == numbers, ratio


@ratios
def test_layout_splits_the_order_into_blocks_that_read_the_block_before(ratio):
    """Blocks are near equal, larger ones first. A token sees its own block and those before."""
    sizes = ckgen.scale_sizes(8, ratio)
    for P in (1, 2, 3, 5, 8, 100):
        layout, blocks, before = Layout(sizes, P), [[ckgen.CLASS]], [ckgen.CLASS]
        for n, at in zip(sizes, layout.scales):
            order = [at.start + y * n + x for x, y in ckgen.progressive_checkerboard(n)]
            previous = [ckgen.EMPTY] * n * n
            for block in np.array_split(order, min(P, n * n)):
                before += previous[:len(block)]
                previous = block.tolist()
                blocks.append(previous)
        assert [layout.cell[start:end].tolist() for _, start, end in layout.steps] == blocks[1:]
        assert layout.cell.tolist() == sum(blocks, []) and layout.before.tolist() == before
        number = np.repeat(range(len(blocks)), [*map(len, blocks)])
        assert np.array_equal(layout.mask, number[:, None] >= number), P


# ------------------------------------------------------------------------------------------------
# Model and sampler (Sec. 3.1, 3.4, 4.1, 4.5, Eq. 1)

@ratios
def test_no_token_learns_of_its_own_block_or_a_later_one(ratio):
    """Neither by gradient nor by value: with other codes, the same logits, bit for bit."""
    for P in (1, 3, 4):
        model, layout, codes, labels, codebook = example(ckgen.scale_sizes(5, ratio), P)
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
        model, layout, _, labels, codebook = example(ckgen.scale_sizes(5, ratio),
                                                     mixing_layers=mixing_layers)
        codes, entropies = ckgen.sample(model, codebook, labels, layout, cfg, 2, temperature=0,
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
        plain, guided = (ckgen.sample(model, codebook, labels, layout, cfg, **options,
                                      generator=torch.Generator().manual_seed(5)) for cfg in (0, 2))
        alike, start = (plain == guided)[:, layout.cell[1:]], layout.steps[step][1] - 1
        assert alike[:, :start].all() and not alike[:, start:].all(), (step, alike)


def test_draws_follow_the_softmax_and_temperature_0_is_argmax(monkeypatch):
    logits, zero = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0])
    for temperature, share in ((0, logits == 1), (0.5, (logits / 0.5).softmax(0))):
        drawn = ckgen.draw(logits.expand(1, 20000, 3), temperature, torch.Generator())
        close(drawn[0].bincount(minlength=3) / 20000, share.float(), 0.015)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda e, generator: e.copy_(zero))
    drawn = ckgen.draw(torch.tensor([[[-50.0, 0.0, -1.0]]]), 1)  # some devices draw exact zeros
    assert drawn.item() == 1, "an impossible code wins"


@torch.no_grad()
def test_z_up_has_unit_length_and_replaced_codes_reach_only_z_up(monkeypatch):
    model, layout, codes, labels, codebook = example((1, 3, 4))
    inputs, seen, latents = Checkerboard.inputs, [], codebook[codes]
    monkeypatch.setattr(Checkerboard, "inputs",
                        lambda *args: seen.append(args[2]) or inputs(*args))
    logits = model(latents, labels, layout)
    z_up = seen[0]
    close(z_up.norm(dim=-1), (torch.arange(26) > 0).float().expand(2, 26))
    close(z_up[:, 1:10], latents[:, :1].expand(2, 9, 8))
    close(z_up[:, [10, 13, 22, 25]], latents[:, [1, 3, 7, 9]])  # the corners
    latents[:, 1:10] = latents[:, 1:10].flip(-1)
    changed = model(codebook[codes], labels, layout, latents) != logits
    assert not changed[:, :10].any() and changed[:, 10:].any(-1).all(), changed


def test_the_loss_is_a_flat_mean_from_log_V_AdaLN_a_plain_norm_and_RoPE_a_rotation():
    """At the start; and RoPE tells all cells apart."""
    _, layout, codes, labels, codebook = example()
    model = Checkerboard(Config(SIZES, 3, 17, 8, 32, 3, 2, 48))
    loss, _ = ckgen.loss_by_scale(model(codebook[codes], labels, layout), codes, layout)
    assert abs(loss / math.log(17) - 1) < 0.02, loss
    modulation = torch.stack(model.layers[1].modulation(torch.randn(2, 32)))
    close(modulation[:, 0, 0, 0], torch.tensor([0, 1, 0, 1]), 0)
    assert (modulation == modulation[..., :1]).all()
    x, (rope, k_rope) = torch.randn(2, 2, 22, 16), model.ropes(layout)[2]  # not a mixing layer
    close(ckgen.rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert equal(rope, k_rope) and len(rope[0, 1:].unique(dim=0)) == 21
    p = torch.rand(2, 21, 17).softmax(-1)
    loss, by_scale = ckgen.loss_by_scale(p.log(), codes, layout)
    losses = -p.gather(-1, codes[:, layout.cell[1:], None]).log()
    close(loss, losses.mean())
    close(by_scale, torch.stack([losses[:, at].mean() for at in layout.scales]))


@torch.no_grad()
def test_bfloat16_stays_close_to_float32_and_finds_the_same_codes(finished):
    model, layout, codes, labels, codebook = example()
    logits = model(codebook[codes], labels, layout)
    ckgen.for_sampling(model, torch.bfloat16)
    kept = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"norm", "lm_head"}
    error = (model(codebook[codes].bfloat16(), labels, layout) - logits).std() / logits.std()
    assert 0 < error < 0.05, error  # 0.004 for one rounding
    exact, rough = (ckgen.load(finished / "checkpoint.pt", dtype=dtype)[1]
                    for dtype in (torch.float32, torch.bfloat16))
    latents = rough.encode(torch.rand(2, 3, 16, 16))
    assert rough.quant_conv.weight.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert equal(rough.codebook(), exact.codebook())
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
            assert ckgen.sample(model, codebook, labels, layout, cfg, 5, 0.7).shape == (2, 21)
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.no_grad()
def test_graph_draws_what_sample_draws(device, monkeypatch):
    """For other labels, seeds and weights than those of its capture too."""
    if device == "cpu":
        stream, nothing = argparse.Namespace(wait_stream=id), contextlib.nullcontext
        stubs = dict(CUDAGraph=RecordedGraph, graph=lambda graph, stream: graph, stream=nothing,
                     Stream=lambda: stream, current_stream=lambda: stream, device=nothing)
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model, *_, codebook = example()
    model, codebook, layout = model.to(device), codebook.to(device), Layout(SIZES, 4, device)
    generator, options = torch.Generator(device), {"cfg": 0.5, "cfg_start": 2, "temperature": 0.7}
    graph = ckgen.SamplerGraph(model, codebook, layout, 3, generator, **options)
    drawn = []
    for labels, seed in (([0, 1, 2], 0), ([2, 2, 0], 0), ([2, 2, 0], 1), ([2, 2, 0], 1)):
        labels = torch.tensor(labels, device=device)
        model.class_embeddings.weight[2] *= -1
        drawn.append(ckgen.sample(model, codebook, labels, layout, **options,
                                  generator=generator.manual_seed(seed)))
        generator.manual_seed(seed)
        assert equal(graph(labels), drawn[-1]), (labels, seed)
        assert not any(equal(x, drawn[-1]) for x in drawn[:-1])


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
        shown = (frames[t] != 128).any(-1).mean()
        assert abs(shown - drawn) < 0.02, (t, shown, drawn)
        later = codes.index_fill(1, layout.cell[end:], 0)
        assert np.array_equal(frames[t], ckgen.progress_frames(tokenizer, later, layout)[t]), t


# ------------------------------------------------------------------------------------------------
# The author's released files

RELEASED = """
empty_token_{emb,pos} 32
llama.norm.weight 32
llama.rotary_emb.mixing_coeffs 2 2
llama.rotary_emb.position_embeddings.parametrizations.weight.original 23 32
class_embeddings.weight 6 32
embed_positions.weight 21 32
embed_codevecs_mlp.net.0.+ 64 8
embed_codevecs_mlp.net.2.+ 64 64
embed_codevecs_mlp.net.4.+ 32 64
src_latents_proj.+ 32 32
combine_inputs.+ 32 128
lm_head.+ 24 32
llama.layers.{0,1,2}.attention.wqkv.weight 96 32
llama.layers.{0,1,2}.attention.wo.weight 32 32
llama.layers.{0,1,2}.feed_forward.w{1,3}.weight 48 32
llama.layers.{0,1,2}.feed_forward.w2.weight 32 48
llama.layers.{0,1,2}.{attention,ffn}_norm.weight 32
llama.layers.{0,1,2}.{input,post_attention}_modulation.adaLN_modulation.1.+ 64 32
autoenc.encoder.conv_in.+ 32 3 3 3
autoenc.encoder.conv_blocks.{0,1}.res.0.conv{1,2}.+ 32 32 3 3
autoenc.encoder.conv_blocks.{0,1}.res.0.norm{1,2}.+ 32
autoenc.encoder.conv_blocks.1.attn.0.{q,k,v,proj_out}.+ 32 32 1 1
autoenc.encoder.conv_blocks.1.attn.0.norm.+ 32
autoenc.encoder.conv_blocks.0.downsample.conv.+ 32 32 3 3
autoenc.encoder.conv_out.+ 64 32 3 3
autoenc.decoder.conv_in.+ 32 64 3 3
autoenc.decoder.conv_blocks.{0,1}.res.{0,1}.conv{1,2}.+ 32 32 3 3
autoenc.decoder.conv_blocks.{0,1}.res.{0,1}.norm{1,2}.+ 32
autoenc.decoder.conv_blocks.0.attn.{0,1}.{q,k,v,proj_out}.+ 32 32 1 1
autoenc.decoder.conv_blocks.0.attn.{0,1}.norm.+ 32
autoenc.decoder.conv_blocks.0.upsample.conv.+ 32 32 3 3
autoenc.decoder.conv_out.+ 3 32 3 3
autoenc.{encoder,decoder}.mid.{0,2}.conv{1,2}.+ 32 32 3 3
autoenc.{encoder,decoder}.mid.{0,2}.norm{1,2}.+ 32
autoenc.{encoder,decoder}.mid.1.{q,k,v,proj_out}.+ 32 32 1 1
autoenc.{encoder,decoder}.mid.1.norm.+ 32
autoenc.{encoder,decoder}.norm_out.+ 32
autoenc.quant_conv.+ 8 64 1 1
autoenc.post_quant_conv.+ 64 8 1 1
autoenc.quantize.embedding.parametrizations.weight.original 24 8
autoenc.quantize.initialized
autoenc.cluster_usage_train 24"""  # key and shape; + is weight and bias

def released_tensors(prefix=""):
    """A small model in the author's format, random."""
    tensors, g = {}, torch.Generator().manual_seed(0)
    for line in RELEASED.replace("+", "{weight,bias}").strip().split("\n"):
        key, *shape = line.split()
        parts = re.split(r"\{(.*?)\}", key)  # each second one is a list of alternatives
        for name in map("".join, product(*(part.split(",") for part in parts))):
            size = [*map(int, shape)][:1 if name.endswith("bias") else None]
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = 0.2 * torch.randn(size, generator=g)
    return tensors


OUR_NAMES = {"llama.": "", "autoenc.": "", "adaLN_modulation.": "", "mlp.net": "mlp",
             "downsample.conv": "resample.1", "upsample.conv": "resample.1",
             "rotary_emb.mixing_coeffs": "rope_mix",
             "rotary_emb.position_embeddings.parametrizations.weight.original": "rope",
             "quantize.embedding.parametrizations.weight.original": "codebook_weight"}


def test_released_tensors_land_in_their_places(tmp_path):
    theirs, path = released_tensors(), tmp_path / "released.pth"
    state = {"model": theirs, "model_ema": None, "args": argparse.Namespace(lr=1)}
    torch.save(state, path)
    model, tokenizer, *_ = ckgen.load(path)
    assert model.config == Config(SIZES, 5, 24, 8, 32, 3, 2, 48, 2)
    assert tokenizer.config == TokenizerConfig(24, 8, 2, 64, (32, 32), 1)
    ours = model.state_dict() | tokenizer.state_dict()
    for key, value in theirs.items():
        for old, new in OUR_NAMES.items():
            key = key.replace(old, new)
        assert key in ("quantize.initialized", "cluster_usage_train") or equal(ours[key], value)
    assert len(ours) == len(theirs) - 2
    del theirs["src_latents_proj.weight"], theirs["src_latents_proj.bias"]
    torch.save(state, path)  # older files have none
    assert equal(ckgen.load(path)[0].src_latents_proj(torch.eye(32)), torch.eye(32))


@pytest.mark.parametrize("layout", ["state_dict", "model", None])
def test_tokenizer_files_in_three_layouts(tmp_path, layout):
    tensors, path = released_tensors("autoenc."), tmp_path / "tokenizer.pt"
    codebook = tensors.pop("quantize.embedding.parametrizations.weight.original")
    name = "weight" if layout == "model" else "parametrizations.weight.original"  # as LlamaGen's
    tensors[f"quantize.embedding.{name}"] = codebook
    torch.save({layout: tensors} if layout else tensors, path)
    tokenizer = ckgen.load_tokenizer(path)
    codes = tokenizer.encode_pyramid(torch.rand(2, 3, 8, 8), (2, 4))
    assert tokenizer.decode_codes(codes[:, 4:]).shape == (2, 3, 8, 8)
    assert equal(tokenizer.codebook_weight, codebook)


GOLDEN = os.environ.get("CKGEN_GOLDEN")


@pytest.mark.skipif(not GOLDEN, reason="needs CKGEN_GOLDEN")
@torch.no_grad()
def test_released_model_number_for_number(tmp_path):
    path, out = f"{GOLDEN}/checkpoint-last.pth", tmp_path / "one.png"
    golden = {key: torch.from_numpy(x) for key, x in np.load(f"{GOLDEN}/expected.npz").items()}
    model, tokenizer, *_ = ckgen.load(path)
    sizes, labels, codebook = model.config.sizes, golden["labels"], tokenizer.codebook()
    alone = ckgen.load_tokenizer(f"{GOLDEN}/autoenc/checkpoint.pth")
    assert not differences(alone.state_dict(), tokenizer.state_dict())

    def pyramid(key):
        return torch.cat([golden[f"{key}_s{n}"].flatten(1) for n in sizes], 1)

    codes = tokenizer.encode_pyramid(golden["images"], sizes)
    close(codes, pyramid("q_inds"), 0)
    for n in sizes:
        close(tokenizer.decode(golden[f"zq_s{n}"]), golden[f"dec_s{n}"], 1e-3)
    for P in (1, 2, 4, 8):
        layout = Layout(sizes, P)
        logits = model(codebook[codes], labels, layout)
        loss, by_scale = ckgen.loss_by_scale(logits, codes, layout)
        close(logits, golden[f"tf_logits_P{P}"], 1e-3)
        close(loss, golden[f"tf_loss_P{P}"], 1e-4)
        close(by_scale, golden[f"tf_loss_by_scale_P{P}"], 1e-4)
    for (name, cfg), P in product((("cfg0", 0), ("cfg1p5", 1.5)), (4, 8)):
        drawn, entropies = ckgen.sample(model, codebook, labels, Layout(sizes, P), cfg,
                                        temperature=0, return_entropy=True)
        close(drawn, pyramid(f"am_{name}_P{P}_tokens"), 0)
        close(entropies, pyramid(f"am_{name}_P{P}_entropy"), 1e-3)
        ckgen.main(f"{path} --class {labels[0]} --n 1 --steps {P} --cfg {cfg} --temperature 0 "
                   f"--device cpu --out {out}".split())
        picture = torch.from_numpy(np.array(Image.open(out), int)).permute(2, 0, 1)
        close(picture, golden[f"am_{name}_P{P}_image_u8"][0].long(), 1)


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
    model = Checkerboard(Config(SIZES, 3, 64, 8, 64, 2, 4, 96))
    state = train_on(codes, tmp_path, iters=200, width=64, layers=2, ffn=96)
    model.load_state_dict(state["model"])
    for P in (1, 2, 3, 4, 16):
        drawn = ckgen.sample(model, tokenizer.codebook(), torch.arange(3), Layout(SIZES, P),
                             temperature=0)
        assert equal(drawn, codes), (P, drawn != codes)


def test_a_batch_draws_P_drops_labels_and_replaces_codes(tmp_path, monkeypatch):
    """Every P up to N*N occurs, half of them powers of two up to N, the others with log-uniform
    shares. A tenth of the labels is dropped, and a tenth of the codes replaced in z_up alone."""
    seen = []
    monkeypatch.setattr(Checkerboard, "forward", lambda self, *inputs: seen.append(inputs)
                        or self.lm_head.bias.expand(16, 21, -1))
    codes = torch.arange(64)[:, None].expand(-1, 21)  # one code in all cells of an image
    train_on(codes, tmp_path, iters=600, muon=0.0, replace_codes=0.1, width=32, heads=2, ffn=48)
    latents, labels, layouts, noisy = zip(*seen)
    P = [sum(scale == 2 for scale, *_ in layout.steps) for layout in layouts]
    assert {*P} == {*range(1, 17)}
    share = np.mean([p in (1, 2, 4) for p in P])
    assert abs(share - 0.5 - 0.5 * math.log(2 * 3 / 2 * 5 / 4, 17)) < 0.05, share
    latents, noisy = torch.stack(latents), torch.stack(noisy)               # (600, 16, L, C)
    assert equal(latents, latents[:, :, :1].expand_as(latents)), "the true codes were replaced"
    close((torch.stack(labels) == 3).float().mean(), torch.tensor(0.1), 0.01)
    close((latents != noisy).any(-1).float().mean(), torch.tensor(0.1 * 63 / 64), 0.003)


def test_a_batch_in_parts_gives_the_same_weights_and_L_ends_with_five_batches(
        tmp_path, monkeypatch):
    forward, sizes, weights = Checkerboard.forward, [], []
    monkeypatch.setattr(Checkerboard, "forward",
                        lambda *inputs: sizes.append(len(inputs[1])) or forward(*inputs))
    sgd = functools.partial(torch.optim.SGD, lr=0.0)  # AdamW would multiply the rounding
    monkeypatch.setattr(train_tiny, "make_optimizers", lambda model, run: [sgd(model.parameters())])
    for parts in (1, 2, 4):
        monkeypatch.setattr(train_tiny, "parts_that_fit", lambda *rest: parts)
        state = train_on(example(B=16)[2], tmp_path, iters=4, lr=2.0, epochs=4, batch_size=4,
                         accumulate_from=3)
        assert sizes == [4 // parts] * (3 + 5) * parts, (parts, sizes)
        sizes.clear()
        os.remove(tmp_path / "checkpoint.pt")
        weights.append(torch.cat([x.flatten() for x in state["model"].values()]))
        close(weights[-1], weights[0])
    assert state["model"]["lm_head.weight"].abs().max() > 0.01, "nothing was learned"


def test_learning_rates_of_the_paper():
    """Sec. 4.1, in epochs of ten steps. tiny warms up, then falls linearly."""
    for name, iters, rates in (
            ("S", 1100, {0: 1e-5, 9: 1e-4, 999: 1e-4, 1000: 3.1623e-5, 1049: 3.1623e-5, 1050: 1e-5}),
            ("L", 2060, {0: 5e-6, 9: 5e-5, 1999: 5e-5, 2000: 1e-5, 2059: 1e-5}),
            ("tiny", 1000, {0: 3e-4, 100: 5.4e-3, 500: 3e-3, 999: 6e-6})):
        run = argparse.Namespace(**PAPER[name] | {"iters": iters})
        for step, rate in rates.items():
            assert abs(run.lr * train_tiny.lr_factor(run, step) - rate) < 1e-9, (name, step)


@pytest.mark.parametrize("name, kinds", [("S", ["AdamW"]), ("tiny", ["AdamW", "Muon"])])
def test_every_parameter_learns_and_vectors_do_not_decay(name, kinds):
    model, layout, codes, labels, codebook = example()
    ckgen.loss_by_scale(model(codebook[codes], labels, layout), codes, layout)[0].backward()
    before = tree_map(torch.clone, model.state_dict())
    optimizers = train_tiny.make_optimizers(model, argparse.Namespace(**PAPER[name]))
    for optimizer in optimizers:
        optimizer.step()
    assert len(differences(before, model.state_dict())) == len(before)
    for group in optimizers[0].param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.01}
    assert [type(optimizer).__name__ for optimizer in optimizers] == kinds


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_moves_along_the_orthogonal_factor(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    train_tiny.Muon([p], lr=1.0).step()
    moved = p.detach() / max(1, shape[0] / shape[1]) ** 0.5
    u, values, v = torch.linalg.svd(p.grad, full_matrices=False)
    values = torch.linalg.svdvals(moved)
    assert 0.6 < values.min() and values.max() < 1.3, values
    assert F.cosine_similarity(moved.flatten(), -(u @ v).flatten(), 0) > 0.97
    if hasattr(torch.optim, "Muon"):  # which computes in bfloat16
        theirs = torch.nn.Parameter(torch.zeros(shape))
        theirs.grad = p.grad
        torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0).step()
        assert (p - theirs).norm() < 0.03 * p.norm(), p - theirs


def test_codebook_follows_its_latents_and_revives_unused_codes():
    tokenizer, g = random_tokenizer(16), torch.Generator()
    centres = F.normalize(torch.randn(8, 8))
    tokenizer.codebook_weight = torch.cat([centres + 0.1 * torch.randn(8, 8), -centres])  # 8 lost
    for _ in range(600):
        latents = F.normalize(centres.repeat(8, 1) + 0.02 * torch.randn(64, 8))
        codes = (latents @ tokenizer.codebook().T).argmax(-1)
        train_tiny.update_codebook(tokenizer, latents, codes, g)
    alike = tokenizer.codebook() @ centres.T                                # (16, 8)
    assert alike.amax(1).min() > 0.99 and alike.amax(0).min() > 0.99, alike


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
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(120):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(1, 256, (3, 4, 3), np.uint8)).resize((20, 24))
        picture.save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_reads_whatever_pillow_opens(tmp_path):
    """Halves of 77 and 255, whatever the type; halves of blue and red."""
    values, clear = np.full((8, 8), 77.0), np.full((8, 8, 4), 255, "u1")
    values[:, 4:] = 255
    clear[:, :, :3], clear[:, 4:, 3] = 77, 0  # to the right transparent: white
    for name, image in (("a.png", values.astype("u1")), ("b.png", (values * 257).astype("u2")),
                        ("c.tif", (values * 2 ** 22).astype("i4")), ("d.png", clear),
                        ("e.tif", (values / 255).astype("f4"))):
        Image.fromarray(image).save(tmp_path / name)
        read = np.array(train_tiny.read_picture(tmp_path / name, 8), int)
        assert abs(read[:, [0, 7]] - [[77], [255]]).max() <= 1, (name, read[0])
    colour, turned = Image.new("RGB", (40, 20), (200, 30, 60)), Image.Exif()
    colour.paste((0, 0, 250), (0, 0, 20, 20))
    turned[0x0112] = 8  # to be shown turned left by 90 degrees
    for name, image in (("f.gif", colour.convert("P")), ("g.jpg", colour.convert("CMYK")),
                        ("h.png", colour.rotate(-90, expand=True))):
        image.save(tmp_path / name, exif=turned if name == "h.png" else b"")
        read = np.array(train_tiny.read_picture(tmp_path / name, 8))
        assert read[:, 0, 2].min() > 200 and read[:, 7, 0].min() > 150, (name, read[0])


def test_unreadable_pictures_are_named_and_black(pictures, capsys, tmp_path):
    (tmp_path / "a").symlink_to(pictures / "a")
    folder = tmp_path / "b"
    folder.mkdir()
    for path in pictures.glob("b/*"):
        (folder / path.name).symlink_to(path)
    (folder / ".hidden").write_text("not a picture")
    os.mkfifo(folder / "fifo.png")  # a program that opens it waits for ever
    (folder / "bad.png").write_bytes(b"\x89PNG broken")
    images = train_tiny.Images(tmp_path, 8)
    read = images.read(range(len(images.paths)))
    black = [path for path, x in zip(images.paths, read) if not x.any()]
    assert black == [str(folder / "bad.png")] and "bad.png" in capsys.readouterr().err
    assert len(read) == 121 and images.classes == ["a", "b"]
    (folder / "worse.png").write_text("")
    with pytest.raises(ValueError, match="1 %"):
        train_tiny.Images(tmp_path, 8).read(range(122))


def test_ten_crops():
    images = torch.arange(36).view(1, 1, 6, 6)
    crops = torch.stack([train_tiny.crop(images, 4, view)[0, 0] for view in range(10)])
    assert crops[:5, 0, 0].tolist() == [0, 2, 12, 14, 7]  # the corners, then the centre
    assert (crops == crops[:, :1, :1] + images[0, 0, :4, :4]).all((1, 2)).tolist()[:5] == [True] * 5
    assert equal(crops[5:], crops[:5].flip(-1))


def test_toy_shapes_are_eight_classes_in_six_colours_always_the_same():
    images = train_tiny.Images(None, 32)
    shapes = images.read(range(64))
    pixels = {(*pixel,) for pixel in shapes.movedim(1, -1).flatten(0, 2).tolist()}
    assert equal(shapes, images.read(range(64))) and len(images.classes) == 8
    assert pixels > {*train_tiny.COLOURS, *train_tiny.GROUNDS}
    for image, label in zip(shapes.amax(1) > 150, images.labels):
        y, x = image.nonzero().float().mean(0).round().long()  # the centre of gravity
        assert image[y, x] == (images.classes[label] != "ring"), images.classes[label]
    halves = torch.cat([shapes[:32, ..., :16], shapes[32:, ..., 16:]], -1)
    assert train_tiny.two_colours(shapes) == 0 and 0.5 < train_tiny.two_colours(halves) < 1


def test_frechet_distance():
    a = torch.randn(20000, 4, generator=torch.Generator())
    assert abs(train_tiny.frechet_distance(a, a)) < 1e-6
    distance = train_tiny.frechet_distance(a, 2 * a.flip(0) + 3)
    assert abs(distance - 40) < 0.5, distance  # 3^2 * 4 + (2 - 1)^2 * 4


def test_a_refit_changes_the_codebook_alone(pictures, tmp_path):
    path = tmp_path / "vqgan.pt"
    torch.save(released_tensors("autoenc."), path)
    train("--data", pictures, "--tokenizer", path, "--out", tmp_path / "run",
          *"--refit-codebook 12 --image-size 8 --iters 2".split())
    given, refitted = map(ckgen.load_tokenizer, (path, tmp_path / "run" / "checkpoint.pt"))
    assert len(differences(given.state_dict(), refitted.state_dict())) == 1
    latents = given.encode(train_tiny.as_input(train_tiny.Images(pictures, 8).held_out()[0]))
    far = [1 - torch.einsum("bchw,vc->bhwv", latents, tokenizer.codebook()).amax(-1).mean()
           for tokenizer in (given, refitted)]
    assert far[1] < 0.5 * far[0] and len(refitted.codebook()) == 12, far


# ------------------------------------------------------------------------------------------------
# The commands

def command(*words):
    """Run Python. Returns what it wrote to stdout."""
    ran = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


TRAIN = (f"{HERE}/train_tiny.py --scale 2 --steps 4 --config tiny --device cpu --iters 4 "
         "--image-size 16 --data").split()


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """The folder of a run on pictures, by the command."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    said = command(*TRAIN, pictures, "--out", folder)
    for name in ("samples.png", "progress.gif", "pyramid.png", "log.csv", "checkpoint.pt"):
        assert str(folder / name) in said and (folder / name).exists(), said
    return folder


def test_the_two_commands(trained, tmp_path):
    out = tmp_path / "all.npz"
    said = command(f"{HERE}/ckgen.py", trained / "checkpoint.pt", "--out", out,
                   *"--class b 0 --n 3 --steps 8 --cfg 1.5 --device cpu".split())
    assert "all.npz: 3 images, 13 steps each" in said
    assert np.load(out)["arr_0"].shape == (3, 16, 16, 3)


def test_two_processes_train_the_weights_of_one_and_one_writes(trained, pictures, tmp_path):
    said = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN,
                   pictures, "--out", tmp_path)
    assert said.count("maps 1x1 2x2 4x4") == said.count("a row of samples") == 1, said
    one, two = contents(trained), contents(tmp_path)
    assert one.keys() == two.keys()
    tree_map(functools.partial(close, atol=1e-3), one["checkpoint.pt"]["model"],
             two["checkpoint.pt"]["model"])


def test_sampling_by_command(finished, tmp_path):
    state = ckgen.read(finished / "checkpoint.pt")
    torch.save(state | {"classes": [*"76543210"]}, tmp_path / "named.pt")

    def draw(options, name="one.png", path=finished / "checkpoint.pt"):
        out = tmp_path / name
        ckgen.main(f"{path} --device cpu --out {out} {options}".split())
        return np.load(out)["arr_0"] if name == "a.npz" else Image.open(out)

    one = draw("--class circle --n 1", "a.npz")[0]
    assert np.array_equal(one, draw("--class 0 --n 1"))  # the image itself, without a border
    assert np.array_equal(one, draw("--class 7 --n 1", path=tmp_path / "named.pt"))
    assert not np.array_equal(one, draw("--class 0 --n 1 --seed 1"))
    assert draw("", "a.npz").shape == (64, 16, 16, 3)  # eight of each class
    assert draw("--n 4 --steps 2", "a.gif").n_frames == 5


def test_evaluation(finished, monkeypatch, capsys):
    quick = functools.partial(train_tiny.train_classifier, iters=30)
    monkeypatch.setattr(train_tiny, "train_classifier", quick)
    train("--evaluate", finished / "checkpoint.pt")
    said = capsys.readouterr().out
    assert re.search(r"tokenizer: \d+\.\d dB on 16 held-out images, \d+ of 16 codes", said), said
    rows = np.array([row.split() for row in re.findall(r"P = \d+ (.*)", said)], float)
    assert rows.shape == (6, 4) and abs(rows @ [1, 4, 16, -21]).max() < 0.05, said
    assert len(re.findall(r"accuracy [01]\.\d+, Frechet distance \d+\.\d+, two colours \d",
                          said)) == 2, said


@pytest.mark.parametrize("seconds, ending", [(0.5, "times the floor"), (1e9, "left out")])
def test_bench_prints_a_row_for_each_measurement(seconds, ending, monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "timed", lambda work, device: [work(), seconds][1])
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
    assert (layout.cell[start], layout.before[start]) == (10, 5)
    assert re.search(r"first of step 7 predicts the code of cell 10(.|\n)*pos\[5\]", said), said
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
    torch.save({"model": released_tensors()}, "theirs.pt")

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}

    def check(main, arguments, complaint):
        before = files()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capfd.readouterr()
        assert stopped.value.code == 2 and "executed" not in said.out
        assert said.err[:-1].isprintable() and "error: " in said.err, said.err  # one line
        assert complaint in said.err, said.err
        assert files() == before

    return check


BAD_FILES = """
data = data[:len(data) // 2]
data = data[:-30]
data = b""
data = b"this is not a checkpoint"
data = data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1:]
state["defaults"] = Evil()
state["model"]["norm.weight"] *= nan
state["tokenizer"]["codebook_weight"] *= nan
del state["model"]["lm_head.bias"]
state["model"]["more"] = torch.zeros(1)
state["model"]["norm.weight"] = torch.ones(33)
state["model"]["lm_head.weight"] = torch.ones(16, 32).to_sparse()
state["model"]["lm_head.weight"] = torch.ones(16, 32, device="meta")
state["model"]["lm_head.weight"] = torch.ones(16, 32).long()
state["model"]["lm_head.weight"] = "a word"
state["config"]["heads"] = 0
state["config"]["sizes"] = ()
state["config"]["sizes"] = (1, 10 ** 6)
state["config"]["width"] = "wide"
state["config"]["depth"] = 3
state["classes"] = []
state["classes"] = [0, 1, 2, 3, 4, 5, 6, 7]
state["classes"] = [[]] * 8
state["defaults"]["cfg"] = -0.4
state["defaults"]["temperature"] = -0.1
state["defaults"]["cfg"] = nan
state["defaults"]["temperature"] = inf
state["defaults"]["steps"] = 0
state["defaults"]["steps"] = 2.5
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
    refused(ckgen.main, ["ok.pt", "--device", "cpu"], "ok.pt: damaged, or not for this program")


BAD_COMMANDS = """
ckgen  missing.pt            | missing.pt
ckgen  .                     | directory
ckgen  ok.pt --class dog     | dog: not a number, nor among circle, ring
ckgen  ok.pt --class 8       | --class 8
ckgen  ok.pt --n 0           | --n: 0
ckgen  ok.pt --steps 0       | --steps: 0
ckgen  ok.pt --steps 2.5     | 2.5
ckgen  ok.pt --cfg -1        | --cfg
ckgen  ok.pt --cfg nan       | nan
ckgen  ok.pt --temperature -0.1 | temperature
ckgen  ok.pt --temperature inf | inf
ckgen  ok.pt --seed -1       | --seed
ckgen  ok.pt --device toaster | toaster
ckgen  ok.pt --dtype float16 | float16
ckgen  ok.pt --out x         | --out x
ckgen  ok.pt --out x.jpg     | x.jpg
ckgen  ok.pt --out no/x.png  | no/x.png
ckgen  ok.pt --sed 3 4       | 4
train  --steps 0             | --steps: 0
train  --iters 0             | --iters: 0
train  --batch-size -2       | --batch-size
train  --lr 0                | --lr
train  --lr nan              | nan
train  --scale 5             | 5
train  --config XL           | XL
train  --image-size 30       | multiple of 4
train  --seed x              | x
train  --device toaster      | toaster
train  --data missing        | missing
train  --data empty          | empty: needs folders
train  --data hollow         | hollow: needs folders
train  --tokenizer ok.pt     | --tokenizer needs --data
train  --refit-codebook 16   | --refit-codebook needs
train  --data hollow/a --tokenizer no.pt | hollow/a
train  --evaluate missing.pt | missing.pt
train  --evaluate text.pt    | text.pt
train  --evaluate theirs.pt  | theirs.pt: not a checkpoint of this program
train  --evaluate ok.pt --data full | other classes
train  --out ok.pt/run       | ok.pt
train  --out old --data full | not the files"""


@pytest.mark.parametrize("line", BAD_COMMANDS.strip().split("\n"))
def test_bad_command_lines(line, refused):
    words, complaint = (part.split() for part in line.split("|"))
    main = ckgen.main if words[0] == "ckgen" else train_tiny.main
    device = [] if "--device" in words else ["--device", "cpu"]
    refused(main, words[1:] + device, " ".join(complaint))


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
    card, save, outside = Card(), torch.save, unset_fake_temporarily()
    card.current = []
    library = ctypes.CDLL(f"{os.path.dirname(torch.__file__)}/lib/libc10.so")
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[14]  # autograd asks for CUDA's guard: the meta device's, idle
    for owner, name, stub in (
            (torch._C, "_cuda_setDevice", card.current.append),
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
    for gigabytes, card.native, config in ((80, True, "S"), (24, True, "S"), (16, True, "tiny"),
                                           (8, True, "tiny"), (80, False, "tiny")):
        card.free = gigabytes * 2 ** 30
        with pytest.raises(TypeError):
            train_tiny.main(["--out", str(tmp_path)])
        assert capsys.readouterr().out.startswith(f"Card: config {config} "), gigabytes
    parts = []
    for card.free in (2 ** 37, 2 ** 35, 2 ** 34, 2 ** 33, 0):
        parts.append(train_tiny.parts_that_fit(PAPER["L"], 64, 341, torch.device("cuda", 0),
                                               torch.bfloat16))
    assert parts[0] == 1 and parts[-1] == 64 and parts == sorted({*parts}), parts
    assert not any(64 % n for n in parts), parts


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
        for name in ("a.png", "a.gif", "a.npz"):
            ckgen.main(["run/checkpoint.pt", "--cfg", "1.5", "--out", name])
        assert seen == {("FeedForward", dtype), ("ResidualBlock", dtype), (dtype,) * 3}
    assert card.current == [0] * 5


def test_sampling_takes_smaller_batches_when_memory_is_short(card):
    model, layout = example()[0].to("cuda:0"), Layout(SIZES, 1, "cuda:0")
    tokenizer = random_tokenizer(17).to("cuda:0")
    image = 2 * 3 * 2 * 21 * 32 * 4  # two caches of three layers, keys and values, float32
    for card.free, n, lengths in ((2 ** 40, 70, [64, 6]), (40 * image, 45, [20, 20, 5]),
                                  (0, 2, [1, 1])):
        labels = torch.zeros(n, dtype=torch.long, device="cuda:0")
        drawn = [*ckgen.generate(model, tokenizer, labels, layout, cfg=1.5)]
        assert [len(codes) for codes in drawn if codes.is_cuda] == lengths
