"""Products with a matrix in few bits against their definitions: every row count, adapters beside, odd sizes."""

from functools import partial

import pytest
import torch

from memphi.model.kernels import coded, dequantise, eight_bits, four_bits, parts, rounding, shares
from memphi.model.kernels.coded import Columns
from memphi.model.kernels.gate import plain_gate
from memphi.model.quant import swap
from memphi.model.quant.weights import WEIGHTS
from tests.kernels.test_skinny import TOLERANCE, numbers

SCHEMES = pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 16, 17, 64]


def stored(scheme, n_out, n_in, device):
    weight = WEIGHTS[scheme](n_out, n_in).to(device)
    swap.store(weight, "w", 0, numbers(n_out, n_in, device=device, dtype=torch.float32) / n_in**0.5)
    return weight


def products(scheme):
    """The kernel's product and its definition."""
    module = four_bits if scheme == "int4" else eight_bits
    return partial(summed, module), module.plain_multiply


def summed(module, x, codes, scale, out, *rest, **options):
    """A module's product, whose parts are summed."""
    parts.sum_up(module.multiply(x, codes, scale, out, *rest, **options), out)


@pytest.fixture
def _number_by_number(monkeypatch):
    """Up to VECTOR_ROWS rows, as on a card without tensor cores."""
    for module in (coded, eight_bits, four_bits):
        monkeypatch.setattr(module, "vector_rows", lambda device: coded.VECTOR_ROWS)


def assert_near(got, expected, scheme):
    """A rounding of x to e4m3 that lies between two may fall to either."""
    assert got.isfinite().all()
    allowed = TOLERANCE[got.dtype] + (2e-3 if scheme == "fp8" else 0)
    assert (got - expected).abs().max() <= allowed * expected.abs().max()


@SCHEMES
@pytest.mark.usefixtures("_number_by_number")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 256), (9, 1100), (70, 304)])
def test_a_product(device, scheme, rows, n_out, n_in, dtype):
    weight = stored(scheme, n_out, n_in, device)
    x = numbers(rows, n_in + 48, device=device, dtype=dtype, seed=1)[:, 16 : n_in + 16]
    out, expected = (torch.full((rows, n_out), torch.nan, device=device, dtype=dtype) for _ in range(2))
    multiply, plain_multiply = products(scheme)
    multiply(x, *weight.buffers(), out)
    plain_multiply(x, *weight.buffers(), expected)
    assert_near(out, expected, scheme)


@SCHEMES
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("ranks", [0, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_card_with_tensor_cores(device, scheme, rows, ranks, dtype):
    """Two are multiplied on those; rows may be in bytes already, then they are not looked at."""
    weight = stored(scheme, 40, 192, device)
    operand = numbers(rows, 352, device=device, dtype=dtype, seed=1)
    columns = made_columns(40, ranks, 5, apart(operand, ranks, 5), device) if ranks else None
    weight.kernels = True
    x, made = operand[:, 160:], weight.room_for_bytes(rows, operand)
    assert (made is None) == (rows == 1 or scheme == "int4" or (scheme == "int8" and dtype is torch.float32))
    out, expected = (torch.full((rows, 40), torch.nan, device=device, dtype=dtype) for _ in range(2))
    _, plain_multiply = products(scheme)
    plain_multiply(x, *weight.buffers(), expected, columns)
    if made is not None:
        rounding.make_bytes(x, made)
        x = torch.full_like(operand, torch.nan)[:, 160:]
    parts.sum_up(weight.multiply_few(x, out, columns, made), out)
    assert_near(out, expected, scheme)


@pytest.mark.usefixtures("_number_by_number")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("ranks", [0, 12])
def test_a_product_through_a_gate(device, scheme, rows, ranks, dtype):
    """As the product and then its gate, which are rounded as they arise."""
    weight = stored(scheme, 74, 304, device)
    operand = numbers(rows, 340, device=device, dtype=dtype, seed=1)
    columns = made_columns(74, ranks, 5, apart(operand[:, 304:], ranks, 5), device) if ranks else None
    both = torch.full((rows, 74), torch.nan, device=device, dtype=dtype)
    out, expected = (torch.full((rows, 37), torch.nan, device=device, dtype=dtype) for _ in range(2))
    multiply, _ = products(scheme)
    multiply(operand[:, :304], *weight.buffers(), both, columns)
    plain_gate(both, expected)
    multiply(operand[:, :304], *weight.buffers(), out, columns, gated=True)
    assert_near(out, expected, scheme)


@SCHEMES
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_of_clips_whose_channels_lie_apart(device, scheme, clips, rows):
    """[clips, channels, time] turned is, of one clip, no copy, and its numbers are far from one another."""
    weight = stored(scheme, 64, 256, device)
    x = numbers(clips, 256, rows, device=device, dtype=torch.float32, seed=1).transpose(1, 2)
    expected = weight(x.contiguous())
    weight.kernels = True
    assert_near(weight(x), expected, scheme)


def made_columns(n_out, ranks, border, t, device):
    """Columns of one adapter, or of two, as a range of a wider matrix."""
    codes = numbers(n_out, 150, device=device, dtype=torch.float32, seed=2).mul_(40).clamp_(-127, 127).to(torch.int8)
    scale = numbers(2, n_out, device=device, dtype=torch.float32, seed=3).abs_().div_(40).bfloat16()
    return Columns(codes[:, 16 : 16 + ranks], scale[: 1 if border == ranks else 2], t)


def apart(operand, ranks, border, gap=0):
    """t of one adapter, or of two that lie apart in an operand."""
    first, second = operand[:, 16 : 16 + border], operand[:, 16 + border + gap : 16 + ranks + gap]
    return (first,) if border == ranks else (first, second)


@SCHEMES
@pytest.mark.usefixtures("_number_by_number")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 70])
@pytest.mark.parametrize(("ranks", "border", "gap"), [(6, 6, 0), (100, 100, 0), (9, 4, 3), (100, 37, 0), (128, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_beside_it(device, scheme, rows, ranks, border, gap, dtype):
    n_out, n_in = 40, 192
    weight = stored(scheme, n_out, n_in, device)
    operand = numbers(rows, n_in + 160, device=device, dtype=dtype, seed=1)
    columns = made_columns(n_out, ranks, border, apart(operand, ranks, border, gap), device)
    out, expected = (torch.full((rows, n_out + 3), torch.nan, device=device, dtype=dtype)[:, :n_out] for _ in range(2))
    multiply, plain_multiply = products(scheme)
    multiply(operand[:, 160:], *weight.buffers(), out, columns)
    plain_multiply(operand[:, 160:], *weight.buffers(), expected, columns)
    assert_near(out, expected, scheme)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("used", ["all", "none", "spans", "one"])
@pytest.mark.parametrize(("ranks", "border", "gap"), [(6, 6, 0), (100, 37, 0), (128, 64, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_added_to_many_rows(device, rows, used, ranks, border, gap, dtype):
    """What stands in t is zeros for rows that do not use it, and not read where nobody does."""
    n_out, last = 70, rows // 3
    operand = numbers(rows, ranks + gap + 20, device=device, dtype=dtype)
    columns = made_columns(n_out, ranks, border, apart(operand, ranks, border, gap), device)
    masks = [torch.full((rows,), used == "spans", device=device) for _ in columns.t]
    masks[0][last:], masks[-1][:last] = False, False
    masks = [None if used == "all" or (used == "one" and mask is masks[0]) else mask for mask in masks]
    nan = [torch.nan if mask is not None and not mask.any() else 0 for mask in masks]
    y = numbers(rows, n_out + 3, device=device, dtype=dtype, seed=1)
    expected = y.clone()
    for t, mask in zip(columns.t, masks, strict=True):
        t.mul_(1 if mask is None else mask[:, None])
    share, expected_share = (torch.full((rows, n_out), torch.nan, device=device, dtype=dtype) for _ in range(2))
    shares.plain_add_to(expected[:, :n_out], columns)
    shares.plain_write_share(expected_share, columns)
    for t, value in zip(columns.t, nan, strict=True):
        t.add_(value)
    shares.add_to(y[:, :n_out], columns, masks)
    shares.write_share(share, columns, masks)
    assert_near(y, expected, "int8")
    assert torch.equal(y[:, n_out:], expected[:, n_out:])
    if expected_share.any():
        assert_near(share, expected_share, "int8")
    else:
        assert torch.equal(share, expected_share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "border", "gap"), [(6, 6, 0), (100, 37, 0), (128, 64, 8)])
def test_columns_made_wide_again(device, ranks, border, gap, dtype):
    """Those of two adapters on both sides of what stands between them."""
    operand = numbers(1, ranks + gap + 20, device=device, dtype=dtype)
    columns = made_columns(40, ranks, border, apart(operand, ranks, border, gap), device)
    out, expected = (torch.full((9, ranks + gap + 2), torch.nan, device=device, dtype=dtype) for _ in range(2))
    dequantise.write_columns(columns, 5, out)
    dequantise.plain_write_columns(columns, 5, expected)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6, equal_nan=True)
    assert out.isnan().sum(1).tolist() == [gap + 2] * 9
    for (codes, scale, _), start in zip(columns.parts, (0, border + gap), strict=False):
        wide = codes[5:14].float() * scale[5:14].float()[:, None]
        torch.testing.assert_close(expected[:, start : start + codes.shape[1]].float(), wide, rtol=2**-7, atol=1e-6)


@SCHEMES
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_in_parts(device, scheme, parts, dtype, monkeypatch):
    """Of blocks that do not divide evenly, so that the last gets fewer; adapters are added once."""
    module = four_bits if scheme == "int4" else eight_bits
    block = 16 if scheme == "int4" else 64
    monkeypatch.setattr(module, "choose_tile", lambda *_: (32, block, 2, 4))
    monkeypatch.setattr(module, "choose_parts", lambda *_: parts)
    n_out, n_in, rows = 70, 688, 9
    weight, x = stored(scheme, n_out, n_in, device), numbers(rows, n_in, device=device, dtype=dtype)
    operand = numbers(rows, 40, device=device, dtype=dtype, seed=2)
    columns = made_columns(n_out, 12, 5, apart(operand, 12, 5, gap=2), device)
    out, expected = (torch.full((rows, n_out + 5), torch.nan, device=device, dtype=dtype)[:, :n_out] for _ in range(2))
    summed(module, x, *weight.buffers(), out, columns)
    module.plain_multiply(x, *weight.buffers(), expected, columns)
    assert_near(out, expected, scheme)


def test_parts_are_summed_one_after_another(device):
    found = numbers(3, 5, 1100, device=device, dtype=torch.float32)
    out, expected = (torch.full((5, 1100), torch.nan, device=device, dtype=torch.bfloat16) for _ in range(2))
    parts.sum_parts(found, out)
    parts.plain_sum_parts(found, expected)
    assert torch.equal(out, expected)


def test_so_many_parts_that_a_card_is_busy(device, monkeypatch):
    monkeypatch.setattr(coded, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(four_bits, "multiprocessors", lambda device: 132)
    assert [coded.choose_parts(blocks, 8192, device) for blocks in (24, 48, 80, 132, 133, 500)] == [10, 5, 3, 2, 1, 1]
    assert [coded.choose_parts(48, inputs, device) for inputs in (100, 768, 3072, 3840, 8192)] == [1, 1, 4, 5, 5]
    assert [four_bits.choose_parts(blocks, device) for blocks in (24, 40, 128, 500)] == [5, 3, 1, 1]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_out", "n_in"), [(5, 256), (3, 4200), (2, 72)])
def test_codes_made_wide_again(device, scheme, n_out, n_in, dtype):
    weight = stored(scheme, n_out, n_in, device)
    out = torch.full((n_out, n_in), torch.nan, device=device, dtype=dtype)
    (four_bits if scheme == "int4" else dequantise).dequantise(*weight.buffers(), out)
    torch.testing.assert_close(out, weight.dequantise(0, n_out, dtype), rtol=2**-7, atol=1e-6)


def test_rows_of_an_embedding(device):
    weight = stored("int8", 30, 96, device)
    ids = torch.tensor([3, 0, 29, 3], device=device)
    out = torch.full((4, 96), torch.nan, device=device, dtype=torch.bfloat16)
    dequantise.look_up(weight.codes, weight.scale, ids, out)
    assert torch.equal(out, weight.look_up(ids, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_e4m3(device, dtype):
    """Codes as torch has them, but for numbers between two, of which there are few."""
    x = numbers(6, 1100, device=device, dtype=dtype) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.0, 1e-3], device=device)[
        :, None
    ].to(dtype)
    x[5, 7] = 10
    codes = [torch.zeros(6, 1100, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
    scales = [torch.zeros(6, device=device) for _ in range(2)]
    rounding.round_rows(x[:, :1000], codes[0][:, :1000], scales[0])
    rounding.plain_round_rows(x[:, :1000], codes[1][:, :1000], scales[1])
    torch.testing.assert_close(*scales)
    ours, theirs = (each.float() for each in codes)
    torch.testing.assert_close(ours, theirs, rtol=2**-3, atol=2**-9)
    assert (ours != theirs).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_two_bytes(device, dtype):
    """As the definition has them, but for numbers between two; and no further from x than half the least byte."""
    x = numbers(5, 1100, device=device, dtype=dtype)[:, :1000] * torch.tensor([1e-3, 1, 50, 1e3, 0], device=device)[
        :, None
    ].to(dtype)
    halves = [torch.full((2, 5, 1000), 77, dtype=torch.int8, device=device) for _ in range(2)]
    scales = [torch.zeros(5, device=device) for _ in range(2)]
    rounding.split_rows(x, halves[0], scales[0])
    rounding.plain_split_rows(x, halves[1], scales[1])
    torch.testing.assert_close(*scales)
    ours, theirs = (256 * each[0].float() + each[1].float() for each in halves)
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 1e-2
    assert ((ours * scales[0][:, None] - x.float()).abs() <= 0.51 * scales[0][:, None]).all()
    assert ours.abs().amax(1).tolist() == [127 * 256] * 4 + [0]


@pytest.mark.parametrize("rows", [5, 17, 70])
@pytest.mark.parametrize("ranks", [0, 12])
def test_rows_of_bytes_on_a_card_that_multiplies_e4m3(device, rows, ranks, monkeypatch):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this card knows no e4m3")
    monkeypatch.setattr(eight_bits, "capability", lambda device: (8, 9))
    weight = stored("fp8", 70, 688, device)
    operand = numbers(rows, 720, device=device, dtype=torch.bfloat16)
    columns = made_columns(70, ranks, 5, apart(operand[:, 688:], ranks, 5), device) if ranks else None
    out, expected = (torch.full((rows, 70), torch.nan, device=device, dtype=torch.bfloat16) for _ in range(2))
    summed(eight_bits, operand[:, :688], *weight.buffers(), out, columns)
    eight_bits.plain_multiply(operand[:, :688], *weight.buffers(), expected, columns)
    assert_near(out, expected, "fp8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_at_every_place_of_a_word(device, dtype):
    codes = torch.arange(-128, 128, device=device).to(torch.int8)
    matrix = codes[:, None].repeat(1, 8)
    for place in range(8):
        x, out = torch.zeros(2, 8, device=device, dtype=dtype), torch.zeros(2, 256, device=device, dtype=dtype)
        x[0, place], x[1, place] = 1, -0.5
        summed(eight_bits, x, matrix, torch.ones(256, device=device), out)
        assert torch.equal(out, torch.stack((codes.to(dtype), codes.to(dtype) * -0.5)))


@pytest.mark.parametrize(("n_in", "first"), [(302, 0), (304, 2), (304, 1)])
def test_rows_that_are_no_words(device, n_in, first):
    """They are multiplied number by number."""
    weight = stored("int8", 20, n_in, device)
    x = numbers(3, 308, device=device, dtype=torch.bfloat16)[:, first : first + n_in]
    assert not eight_bits._has_words(x, None)
    out, expected = (torch.full((3, 20), torch.nan, device=device, dtype=x.dtype) for _ in range(2))
    summed(eight_bits, x, *weight.buffers(), out)
    eight_bits.plain_multiply(x, *weight.buffers(), expected)
    assert_near(out, expected, "int8")


@pytest.mark.parametrize("on", [(8, 6), (8, 9)], ids=str)
def test_every_number_of_e4m3(device, on, monkeypatch):
    """All bytes are what torch takes them for, and are their own nearest numbers; by bits, and as cards have it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < on:
        pytest.skip("this card knows no e4m3")
    monkeypatch.setattr(eight_bits, "capability", lambda device: on)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[((codes & 127) != 127) & (codes != 128)].view(1, -1)  # All but those that are no number, and -0.
    values = codes.view(torch.float8_e4m3fn).float()
    again, scale = torch.zeros_like(codes), torch.zeros(1, device=device)
    rounding.round_rows(values, again.view(torch.float8_e4m3fn), scale)
    assert scale.item() == 1
    assert torch.equal(again, codes)
    x = torch.zeros(1, codes.shape[1], device=device)
    x[0, 0] = 1
    matrix, out = codes.t().repeat(1, codes.shape[1]).contiguous(), torch.zeros(1, codes.shape[1], device=device)
    summed(eight_bits, x, matrix.view(torch.float8_e4m3fn), torch.ones(codes.shape[1], device=device), out)
    torch.testing.assert_close(out, values)


def test_sums_of_bytes_fit_in_32_bits(device):
    """Of wider matrices rows are not made bytes."""
    assert 128 * 127 * eight_bits.MOST_INPUTS < 2**31
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    for n_in, fits in ((eight_bits.MOST_INPUTS, True), (eight_bits.MOST_INPUTS + 1, False)):
        codes = torch.empty(1, n_in, dtype=torch.int8, device=device)
        assert (eight_bits.room_for_bytes(8, codes, like) is not None) == fits
