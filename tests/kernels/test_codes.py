"""Codes in 8 bits made and read in a kernel are those of the definition, to the bit."""

from __future__ import annotations

import pytest
import torch

from memphi.model.kept import dequantise, quantise
from memphi.model.kernels import codes
from memphi.model.kernels.launch import Tile, constexpr, jit, tl
from tests.kernels.samples import normal

GROUPS, WIDTH = 32, 64


@jit
def _there_and_back(
    x: Tile, made: Tile, scales: Tile, back: Tile, groups: constexpr, width: constexpr, limit: constexpr
):
    lines = tl.arange(0, groups)
    at = lines[:, None] * width + tl.arange(0, width)[None, :]
    found, factors = codes.encode(tl.load(x + at), limit)
    tl.store(made + at, found)
    words = codes.join(factors, factors)
    first, second = codes.split(words)
    tl.store(scales + lines, first)
    tl.store(back + at, codes.decode(found, second, back, limit))


@jit
def _in_pieces(words: Tile, out: Tile, lines: constexpr, width: constexpr, limit: constexpr, assembler: constexpr):
    at = tl.arange(0, lines)[:, None] * width + tl.arange(0, width)[None, :]
    w = tl.load(words + at)
    like = tl.zeros([lines, width], out.dtype.element_ty)
    pieces = (
        codes.piece(w, 0, like, limit, assembler),
        codes.piece(w, 1, like, limit, assembler),
        codes.piece(w, 2, like, limit, assembler),
        codes.piece(w, 3, like, limit, assembler),
    )
    pieces = codes.part(codes.joined(pieces, limit), limit)
    whole = tl.arange(0, lines)[:, None] * (4 * width) + tl.arange(0, 4 * width)[None, :]
    tl.store(out + whole, codes.joined(pieces, limit))


def every_code(code):
    """All of a format that stand for a number, [codes]."""
    found = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(code)
    return found[found.float().isfinite()]


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_words_are_read_as_the_codes_in_them(device, code, dtype):
    """In the order in which they stand; on a GPU by the assembler for the format."""
    some = every_code(code)
    kept = some[torch.arange(16 * 64) * 7 % len(some)].view(16, 64).to(device)
    out, words = torch.empty(16, 64, dtype=dtype, device=device), kept.view(torch.uint8).view(torch.int32)
    assembler, limit = codes.widening(kept, out), codes.code_limit(kept)
    _in_pieces[(1,)](words, out, lines=16, width=16, limit=limit, assembler=assembler)
    assert torch.equal(out, kept.to(dtype))


@pytest.mark.parametrize(("limit", "dtype"), codes.WIDENINGS)
def test_the_assembler_makes_every_code_what_it_stands_for(limit, dtype):
    """As a card would, which is not here: each instruction on words whose halves hold a code in both of their bytes."""
    some = every_code(torch.int8 if limit == 127 else torch.float8_e4m3fn)
    both = some.view(torch.uint8).long() * 0x01010101
    found = executed(codes.WIDENINGS[limit, dtype], both)
    for half in (found & 0xFFFF, found >> 16):
        assert torch.equal(as_numbers(half, dtype), some.double())


def executed(assembler, both):
    """What some instructions leave in $0, of words as int64."""
    registers = {"both": both}

    def read(name):
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for instruction in filter(None, map(str.strip, assembler.split(";"))):
        operation, *operands = instruction.replace(",", " ").split()
        target, *sources = operands
        name = operation.split(".")[0]
        a, *rest = map(read, sources)
        if name == "mov":
            found = a
        elif name == "shr":
            found = a >> rest[0]
        elif name == "and":
            found = a & rest[0]
        elif name == "lop3":
            assert rest[2] == 0xEA  # The one that `a & b | c` has.
            found = (a & rest[0]) | rest[1]
        else:
            dtype = torch.bfloat16 if "bf16x2" in operation else torch.float16
            halves = [computed(name, dtype, [(each >> by) & 0xFFFF for each in (a, *rest)]) for by in (0, 16)]
            found = halves[0] | (halves[1] << 16)
        registers[target] = found
    return registers["$0"]


def computed(name, dtype, halves):
    """The bits of a result in 16 bits: exact, and rounded once."""
    a, b, *c = (as_numbers(half, dtype) for half in halves)
    exact = {"fma": lambda: a * b + c[0], "sub": lambda: a - b, "mul": lambda: a * b}[name]()
    return exact.to(dtype).view(torch.int16).long() & 0xFFFF


def as_numbers(bits, dtype):
    """In fp64, which has all of them."""
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(dtype).double()


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_codes_are_those_of_the_definition(device, code, dtype, size):
    x = (normal(GROUPS, WIDTH, dtype=torch.float32, device=device, seed=1) ** 3 * size).to(dtype)
    x[3], x[5, 1:] = 0, 0
    expected, expected_scales = quantise(x, code)
    made, scales = torch.empty_like(expected), torch.empty(GROUPS, device=device)
    back = torch.empty_like(x)
    limit = codes.code_limit(made)
    _there_and_back[(1,)](x, codes.as_bytes(made), scales, back, groups=GROUPS, width=WIDTH, limit=limit)
    assert torch.equal(scales, expected_scales.float())
    assert torch.equal(made.float(), expected.float())
    assert torch.equal(back, dequantise(expected, expected_scales, dtype))


def test_a_word_holds_a_keys_and_a_values_scale():
    scales = torch.randn(3, 4, 2, 2).to(torch.bfloat16)
    words = codes.as_words(scales)
    assert words.shape == (3, 4, 2)
    assert torch.equal((words << 16).view(torch.float32), scales[..., 0].float())
    assert torch.equal((words & -65536).view(torch.float32), scales[..., 1].float())
