"""Every kernel compiles for every card that memphi names, and fits it."""

import pytest
import torch

from memphi import official
from memphi.config import ModelConfig

pytest.importorskip("triton")

from memphi.memory.costs import PREFILL_LINE_TOKENS
from memphi.model.kernels import choice, division, gate, norm, paged, rotary, rounding
from memphi.model.kernels.division import SOME_ROWS
from memphi.model.kernels.launch import E4M3_CAPABILITY
from memphi.model.rotary import rotary_frequencies
from memphi.model.rows import LINE_TOKENS
from tests.kernels.ahead import REGISTERS, SHARED_BYTES, compiled_for

CONFIG = ModelConfig.from_folder(official.folder()).language
CPU = torch.device("cpu")
PAGES, PAGE_TOKENS = 4, 16
ADDRESS_BYTES = 8
"""Triton 3.7.1 leaves one address of attention's on the stack, with registers to spare."""
SLOW_STACK_BYTES = 512
"""Where a thread's numbers may lie outside its registers at all: see `test_every_kernel_fits`."""


def launch_simple(dtype, rows=4):
    """All kernels but attention, at full size."""
    x, weight = torch.empty(rows, CONFIG.hidden_size, dtype=dtype), torch.empty(CONFIG.hidden_size, dtype=dtype)
    norm.add_norm(x, x, weight, 1e-5, x)
    norm.add_norm(x, None, weight, 1e-5, x)
    wide = torch.empty(rows, 2 * CONFIG.intermediate_size, dtype=dtype)
    gate.gate(wide, wide[:, : CONFIG.intermediate_size])
    numbers, long = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    cos, sin = (torch.empty(rows, 1, CONFIG.rotary_dim, dtype=dtype) for _ in range(2))
    rotary.tabulate(numbers, long, rotary_frequencies(CONFIG, CPU), 1.2, cos, sin)
    logits, pieces = torch.empty(rows, CONFIG.vocab_size, dtype=dtype), choice.pieces_of(CONFIG.vocab_size)
    best, places = (torch.empty(rows, pieces, dtype=dtype) for dtype in (torch.float32, torch.int32))
    choice.choose(logits, torch.empty(CONFIG.vocab_size, dtype=torch.bool), numbers.int(), best, places, numbers)
    rotary.rotate_and_keep(qkv_of(rows, dtype), cos, sin, *layer(dtype), numbers, numbers)


def launch_attention(dtype, rows, new_tokens=1, fresh=True, code=None):
    tiling = division.choose_tiling(rows, new_tokens, dtype, CPU, fresh=fresh)
    divided = division.make_division(CONFIG, rows, new_tokens, tiling, CPU)
    division.divide(divided)
    tokens = rows * new_tokens
    table, out = torch.empty(rows, PAGES, dtype=torch.int32), query_of(tokens, dtype)
    if fresh:
        cos, sin = (torch.empty(tokens, 1, CONFIG.rotary_dim, dtype=dtype) for _ in range(2))
        paged.attend_new(qkv_of(tokens, dtype), cos, sin, *layer(code or dtype), table, divided, out, scales_of(code))
    else:
        paged.attend(query_of(tokens, dtype), *layer(code or dtype), table, divided, out, scales_of(code))


def layer(dtype):
    pool = torch.empty(PAGES, 2, 2, PAGE_TOKENS, CONFIG.kv_heads, CONFIG.head_dim, dtype=dtype)
    return pool[:, 1, 0], pool[:, 1, 1]


def scales_of(code):
    """Of codes, if any."""
    return torch.empty(PAGES, 2, PAGE_TOKENS, CONFIG.kv_heads, 2, dtype=torch.bfloat16)[:, 1] if code else None


def qkv_of(tokens, dtype):
    return torch.empty(tokens, (CONFIG.heads + 2 * CONFIG.kv_heads) * CONFIG.head_dim, dtype=dtype)


def query_of(tokens, dtype):
    return torch.empty(tokens, CONFIG.heads, CONFIG.head_dim, dtype=dtype)


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
def test_every_kernel_fits(capability):
    """Nothing spills on tensor cores; where blocks are multiplied number by number, on a 7.5, a little may.

    What `tabulate` keeps there is for angles beyond 1e5, whose cosines need many digits of pi.
    """
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    with compiled_for(capability) as compiled:
        launch_simple(dtype)
        for rows in (1, SOME_ROWS, SOME_ROWS + 1):
            launch_attention(dtype, rows)
        for new_tokens in (1, LINE_TOKENS, PREFILL_LINE_TOKENS):
            launch_attention(dtype, rows=64, new_tokens=new_tokens, fresh=False)
    assert {made.name for made in compiled} == {
        *("_add_norm", "_gate", "_tabulate", "_rotate_and_keep", "_find", "_choose", "_divide", "_attend")
    }
    for made in compiled:
        assert_fits(made, capability, SLOW_STACK_BYTES if capability == (7, 5) else 0)
        assert made.is_dependent == (capability >= (9, 0) and made.name not in ("_divide", "_tabulate"))


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
@pytest.mark.parametrize("room", [rounding.room_in_e4m3, rounding.room_in_two_bytes])
def test_what_leaves_rows_in_bytes_fits(capability, room):
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    x, weight = torch.empty(4, CONFIG.hidden_size, dtype=dtype), torch.empty(CONFIG.hidden_size, dtype=dtype)
    wide = torch.empty(4, 2 * CONFIG.intermediate_size, dtype=dtype)
    with compiled_for(capability) as compiled:
        norm.add_norm(x, x, weight, 1e-5, x, room(4, CONFIG.hidden_size, x))
        gate.gate(wide, wide[:, : CONFIG.intermediate_size], room(4, CONFIG.intermediate_size, x))
    for made in compiled:
        assert_fits(made, capability, 0)


def test_drafts_and_other_numbers_fit():
    """Speculation's eight new tokens a row, and the formats that no card prefers: what they need is known."""
    with compiled_for((9, 0)) as compiled:
        launch_attention(torch.bfloat16, rows=64, new_tokens=8, fresh=False)
        launch_attention(torch.float16, rows=1)
        for code in (torch.int8, torch.float8_e4m3fn):
            launch_attention(torch.float16, rows=64, code=code)
    for made in compiled:
        assert_fits(made, (9, 0), 0)
    with compiled_for((8, 6)) as compiled:
        launch_simple(torch.float32)
        launch_attention(torch.float32, rows=64)
    for made in compiled:
        assert_fits(made, (8, 6), 0)


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_keys_and_values_in_8_bits_fit(capability, code):
    if code == torch.float8_e4m3fn and capability < E4M3_CAPABILITY:
        pytest.skip("such cards are told to take int8")
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    numbers = torch.empty(4, dtype=torch.int64)
    cos, sin = (torch.empty(4, 1, CONFIG.rotary_dim, dtype=dtype) for _ in range(2))
    with compiled_for(capability) as compiled:
        for rows in (1, SOME_ROWS, SOME_ROWS + 1):
            launch_attention(dtype, rows, code=code)
        rotary.rotate_and_keep(*(qkv_of(4, dtype), cos, sin, *layer(code), numbers, numbers, scales_of(code)))
    for made in compiled:
        assert_fits(made, capability, SLOW_STACK_BYTES if capability == (7, 5) else 0)


def assert_fits(made, capability, stack_bytes):
    assert made.shared_bytes <= SHARED_BYTES[capability], made
    assert made.registers * made.threads <= REGISTERS, made
    known = {"_tabulate": 64, "_attend": ADDRESS_BYTES}
    assert made.stack_bytes <= max(stack_bytes, known.get(made.name, 0)), made
