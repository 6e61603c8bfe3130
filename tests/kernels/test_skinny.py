"""Products of a few rows against their definitions: every row count, ranges of columns, sizes that fill no block."""

from functools import partial
from itertools import product

import pytest
import torch

from memphi.model.adapters import AdapterTokens
from memphi.model.kernels import coded, narrow, skinny
from memphi.model.kernels.gate import gate
from memphi.model.kernels.launch import is_interpreted
from memphi.model.quant import packed
from memphi.model.rows import Row
from tests.checkpoints import tiny_model

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest number: sums are in another order, and rounded once (2**-11 of a number in fp16, 2**-8 in bf16)."""


def numbers(*shape, device, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(got, expected, products=1):
    """products: how many of them follow each other."""
    assert got.isfinite().all()
    assert (got - expected).abs().max() <= products * TOLERANCE[got.dtype] * expected.abs().max()


@pytest.fixture
def _number_by_number(monkeypatch):
    """Up to VECTOR_ROWS rows, as on a card without tensor cores."""
    monkeypatch.setattr(skinny, "vector_rows", lambda device: skinny.VECTOR_ROWS)


@pytest.mark.usefixtures("_number_by_number")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 256), (37, 1100), (70, 300)])
def test_a_product_of_a_range_of_columns(device, rows, n_out, n_in, dtype):
    if is_interpreted() and dtype is torch.bfloat16 and rows > skinny.VECTOR_ROWS:
        pytest.skip("the interpreter's matrix product takes bf16 for integers")
    wide = numbers(n_out, n_in + 48, device=device, dtype=dtype)
    operand = numbers(rows, n_in + 48, device=device, dtype=dtype, seed=1)
    x, weight = operand[:, 16 : n_in + 16], wide[:, 16 : n_in + 16]
    out, expected = (torch.full((rows, n_out), torch.nan, device=device, dtype=dtype) for _ in range(2))
    skinny.multiply(x, weight, out)
    skinny.plain_multiply(x, weight, expected)
    assert_close(out, expected)


@pytest.mark.usefixtures("_number_by_number")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16])
@pytest.mark.parametrize(("size", "n_in"), [(64, 256), (37, 1100)])
def test_a_product_through_a_gate(device, rows, size, n_in, dtype):
    """What the product and the gate behind it give."""
    if is_interpreted() and dtype is torch.bfloat16 and rows > skinny.VECTOR_ROWS:
        pytest.skip("the interpreter's matrix product takes bf16 for integers")
    x = numbers(rows, n_in, device=device, dtype=dtype) / n_in**0.5
    weight = numbers(2 * size, n_in, device=device, dtype=dtype, seed=1)
    both, expected = (torch.empty(rows, width, device=device, dtype=dtype) for width in (2 * size, size))
    wide = torch.full((rows, size + 9), torch.nan, device=device, dtype=dtype)
    skinny.multiply(x, weight, both)
    gate(both, expected)
    skinny.multiply(x, weight, wide[:, 4:-5], gated=True)
    assert_close(wide[:, 4:-5], expected, products=2)
    assert wide[:, :4].isnan().all()
    assert wide[:, -5:].isnan().all()


def test_a_gate_stands_beside_what_it_lets_through(device, monkeypatch):
    """Also where a program has one output, as sizes may come out."""
    monkeypatch.setattr(skinny, "choose_block", lambda *_: (1, 64, 4))
    test_a_product_through_a_gate(device, 3, 37, 100, torch.float32)


@pytest.mark.parametrize("rows", range(1, skinny.VECTOR_ROWS + 1))
@pytest.mark.parametrize(("n_out", "n_in"), [(5120, 3072), (3072, 3648), (16384, 3328), (3072, 8192), (7, 5)])
def test_a_thread_keeps_few_sums(rows, n_out, n_in):
    block_out, block_in, warps = skinny.choose_block(rows, n_out, n_in)
    assert rows == 1 or rows * block_out * block_in <= skinny.SUMS * 32 * warps
    assert block_out >= 1
    assert warps <= 8


STEPS = {
    "text": [Row(3)],
    "one vision row": [Row(1, adapter="vision")],
    "all speech": [Row(4, adapter="speech"), Row(5, adapter="speech")],
    "sorted": [Row(2), Row(3, adapter="speech"), Row(2, adapter="vision")],
    "in turn": [Row(2, adapter="speech"), Row(2, adapter="vision"), Row(2, adapter="speech"), Row(5)],
}


@pytest.mark.parametrize("name", STEPS)
@torch.inference_mode()
def test_the_language_model_computes_the_same_by_kernels(device, name):
    rows = STEPS[name]
    ids = torch.arange(sum(row.tokens for row in rows), device=device)
    plain, packed = tiny_model().to(device), tiny_model()
    packed.keep_adapters(packed=True, merge=None)
    packed.use_kernels(True)
    assert len(ids) <= skinny.most_rows(device)
    got = packed.to(device)(ids, rows, logits_at=range(len(ids)))
    assert_close(got, plain(ids, rows, logits_at=range(len(ids))), products=9)


def mlp_of(scheme, device, is_packed):
    """A layer's MLP under a scheme: as it is defined, or packed and through the kernels."""
    model = tiny_model()
    model.quantise(scheme)
    if is_packed:
        model.keep_adapters(packed=True, merge=None)
        model.use_kernels(True)
    return model.to(device).language.layers[0].mlp


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 8, 20, 70])
@torch.inference_mode()
def test_masks_of_a_step_reach_the_kernels(device, rows, scheme):
    """What a captured step has: adapters that are in use, and masks of the rows that use them."""
    plain, linear = (mlp_of(scheme, device, is_packed).down for is_packed in (False, True))
    x = numbers(rows, 72, device=device, dtype=torch.float32)
    for used in map(AdapterTokens, adapter_sets(rows, device)):
        assert_close(linear(x, used), plain(x, used))


@pytest.mark.parametrize(
    ("scheme", "rows"), [("bf16", 70), ("int8", 300), *product(["int4", "fp8"], [70, narrow.MOST_ROWS + 70, 1200])]
)
@torch.inference_mode()
def test_spans_of_a_step_reach_the_kernels(device, rows, scheme):
    """What a step of prompts has: adapters whose tokens stand side by side, and masks made of that."""
    plain, linear = (mlp_of(scheme, device, is_packed).gate_up for is_packed in (False, True))
    x, half = numbers(rows, linear.in_features, device=device, dtype=torch.float32), rows // 2
    for spans in ({"vision": slice(3, half), "speech": slice(half, rows - 1)}, {"speech": slice(0, 9)}):
        used = AdapterTokens(spans)
        used.make_masks(rows, device)
        assert_close(linear(x, used), plain(x, AdapterTokens(spans)))


@pytest.mark.parametrize(
    ("rows", "ends", "of_a", "of_b"),
    [(70, (20,), 1, 1), (70, (20, 70), 1, 1), (600, (20,), 0, 0), (600, (20, 600), 1, 1), (1200, (600, 1200), 0, 1)],
)
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
@torch.inference_mode()
def test_many_rows_told_apart_are_left_to_torch(device, monkeypatch, scheme, rows, ends, of_a, of_b):
    """What A makes of one adapter's, and in blocks of each one's; what B adds to a product in e4m3, of one alone."""
    linear = mlp_of(scheme, device, is_packed=True).gate_up
    used = AdapterTokens(dict(zip(("vision", "speech"), map(slice, (0, *ends), ends), strict=False)))
    used.make_masks(rows, device)
    launched = {"narrow": 0, "add_to": 0, "write_share": 0}

    def count(name, run, *arguments):
        launched[name] += 1
        run(*arguments)

    monkeypatch.setattr(narrow, "narrow", partial(count, "narrow", narrow.narrow))
    for name in ("add_to", "write_share"):
        monkeypatch.setattr(packed, name, partial(count, name, getattr(packed, name)))
    linear(numbers(rows, linear.in_features, device=device, dtype=torch.float32), used)
    is_added, is_beside = scheme == "fp8" and rows > coded.MOST_ROWS, rows <= packed.MOST_BESIDE
    assert launched["narrow"] == (of_b if scheme == "fp8" else of_a)
    assert launched["add_to"] == (of_b if is_added and not is_beside else 0)
    assert launched["write_share"] == (of_b if is_added and is_beside else 0)


def test_a_mask_of_every_kind_of_tokens(device):
    index = torch.tensor([0, 3], device=device)
    mask = torch.tensor([True, False, False, True], device=device)
    used = AdapterTokens({"all": None, "span": slice(1, 3), "index": index, "mask": mask})
    assert [used.mask(name) for name in used] == [None, slice(1, 3), index, mask]
    used.make_masks(4, device)
    assert used.mask("all") is None
    assert used.mask("span").tolist() == [False, True, True, False]
    assert used.mask("index").tolist() == mask.tolist()
    assert used.mask("mask") is mask


def adapter_sets(rows, device):
    vision = torch.arange(rows, device=device) % 3 == 0
    return {"vision": vision}, {"speech": ~vision}, {"vision": vision, "speech": ~vision}, {"vision": None}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("scheme", "rows"), [*product(["bf16", "int8"], [1, 3, 4, 16, 17]), ("int4", 2), ("int4", 17), ("fp8", 2)]
)
@torch.inference_mode()
def test_a_linear_through_its_gate(device, rows, scheme, is_packed):
    """Whether few rows go through at once or others by way of both halves."""
    model = tiny_model()
    model.quantise(scheme)
    model.keep_adapters(packed=is_packed, merge=None)
    model.use_kernels(True)
    linear = model.to(device).language.layers[0].mlp.gate_up
    operand = numbers(rows, linear.width, device=device, dtype=torch.float32)
    for used in map(AdapterTokens, adapter_sets(rows, device) if is_packed else [{}]):
        both = torch.full((rows, linear.out_features), torch.nan, device=device)
        out, expected = (torch.full((rows, linear.out_features // 2), torch.nan, device=device) for _ in range(2))
        gate(linear.apply_to(operand, used, torch.empty_like(both)), expected)
        linear.apply_gated(operand, used, both, out)
        assert_close(out, expected, products=2)
        most = {"bf16": skinny.most_rows(operand.device), "int8": coded.vector_rows(operand.device)}.get(scheme, 0)
        assert both.isnan().all() == (rows <= most)
