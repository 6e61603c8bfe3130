"""A matrix as each scheme stores it, what that stands for, and the product with it: the definitions.

    int8   codes [out, in] int8, scale [out] bf16                      w = code * scale
    int4   codes [out, groups, group / 2], two a byte, affine [out, groups, 2] bf16, scale and shift
                                                                       w = (code - 8) * scale + shift
    fp8    codes [out, in] e4m3, scale [out] fp32                      w = code * scale, x rounded likewise, by rows

A product is x W^T with the W that codes stand for, rounded once to x's dtype, a block of outputs after another, so that
no more than a block of W is ever there. Every output is stored by itself, so a matrix can be quantised piece by piece.
Where memphi's own kernels are used, few rows are multiplied by the codes as they are, and blocks are made by a kernel.
Adapters' A and B are Int8Weights beside any scheme.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from memphi.config import group_size
from memphi.memory.costs import DEQUANTISED_NUMBERS
from memphi.model.kernels import coded, dequantise, eight_bits, four_bits, rounding
from memphi.model.kernels.coded import Columns
from memphi.model.kernels.launch import E4M3_CAPABILITY, capability, is_available
from memphi.model.kernels.parts import sum_up
from memphi.model.kernels.rounding import Bytes, make_bytes, room_in_e4m3
from memphi.model.quant.calibration import LEAST_SCALE, Affine, choose_codes, half_quadratic, weighted_line
from memphi.model.quant.gptq import gptq, importance

EVEN_ROWS = 256
"""A block has a multiple of so many rows where it has that many: others lie across what a card's fast kernels want."""
CODES_A_WORD = 8
"""In int4."""


class QuantisedWeight(nn.Module):
    """A matrix [out, in] in few bits; in the place of a linear's `weight`."""

    kernels = False
    """Whether products go through memphi's own kernels, where the device has them."""
    gated = False
    """Whether those of few rows open their gates at once; on an H200 ones by e4m3 took longer so."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    def store(self, first: int, rows: Tensor, squares: Tensor | None = None) -> None:
        """Quantise rows [n, in], which are the outputs from `first` on.

        squares [in]: of example inputs, all together; what has a scale for a whole output does not heed them.
        """
        raise NotImplementedError

    def store_calibrated(self, matrix: Tensor, hessian: Tensor) -> None:
        """Quantise all outputs so that products with example inputs lose little, by those inputs' Hessian [in, in]."""
        raise NotImplementedError

    def dequantise(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """What outputs from one to before another stand for: [last - first, in]."""
        with torch.device(next(self.buffers()).device):
            out = torch.empty((last - first, self.in_features), dtype=dtype)
        self.dequantise_into(first, out)
        return out

    def dequantise_into(self, first: int, out: Tensor) -> None:
        """The same of outputs from `first` on, into out [n, in], whose rows may lie apart."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: [..., in] -> [..., out]."""
        flat = x.reshape(-1, self.in_features)
        if flat.stride(1) != 1:  # As of one clip whose channels lie apart, where reshaping copies nothing.
            flat = flat.contiguous()
        out = flat.new_empty(len(flat), self.out_features)
        self.multiply(flat, out)
        return out.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor, out: Tensor, most_numbers: int | None = None, in_bytes: Bytes | None = None) -> None:
        """The same of x [rows, in] into out [rows, out]; numbers of a row lie side by side.

        No more numbers of a block than most_numbers are there at once; None: than DEQUANTISED_NUMBERS. in_bytes: the
        same x, in what `room_for_bytes` gave.
        """
        if not len(x):
            return
        if self.is_for_few(x):
            sum_up(self.multiply_few(x, out, None, in_bytes), out)
        else:
            self.multiply_many(x, out, most_numbers, in_bytes)

    def room_for_bytes(self, rows: int, like: Tensor) -> Bytes | None:
        """Room for so many x of like's dtype in bytes, where products take them so; None where they do not."""
        return None

    def bytes_of(self, x: Tensor) -> Bytes | None:
        """x [rows, in] in bytes, where products take it so."""
        made = self.room_for_bytes(len(x), x)
        if made is not None:
            make_bytes(x, made)
        return made

    def is_for_few(self, x: Tensor) -> bool:
        """Whether rows like these are for `multiply_few`."""
        return self.kernels and len(x) <= self.most_rows(x)

    def most_rows(self, x: Tensor) -> int:
        """The most rows like these that `multiply_few` is for."""
        return coded.most_rows(x.device)

    def multiply_few(self, x: Tensor, out: Tensor, columns: Columns | None, in_bytes: Bytes | None = None) -> Tensor:
        """`multiply` by a kernel that reads the codes as they are, and what adapters' columns beside the matrix add.

        Returns it in parts [parts, rows, out], which `sum_up` or somebody else sums: out alone, or others in fp32.
        """
        raise NotImplementedError

    def gates(self, x: Tensor) -> bool:
        """Whether rows like these are for `multiply_gated`."""
        return self.gated and self.is_for_few(x) and len(x) <= coded.vector_rows(x.device)

    def multiply_gated(self, x: Tensor, out: Tensor, columns: Columns | None) -> None:
        """As `multiply_few`, what comes of it through `gate` at once: into out [rows, out / 2]."""
        raise NotImplementedError

    def multiply_many(
        self, x: Tensor, out: Tensor, most_numbers: int | None = None, in_bytes: Bytes | None = None
    ) -> None:
        """x W^T of any number of rows."""
        self.plain_multiply(x, out, most_numbers)

    def makes_blocks(self, x: Tensor) -> bool:
        """Whether `multiply_many` does so by blocks, as `multiply_by_blocks`, where others may stand beside them."""
        return True

    def plain_multiply(self, x: Tensor, out: Tensor, most_numbers: int | None = None) -> None:
        """The definition of `multiply_many`."""
        everything = slice(0, self.in_features)
        multiply_by_blocks([(self.write_block, everything)], [(x, everything, slice(0, len(x)))], out, most_numbers)

    def write_block(self, first: int, out: Tensor) -> None:
        """As `dequantise_into`, by the fastest there is."""
        self.dequantise_into(first, out)


class Int8Weight(QuantisedWeight):
    """Symmetric, a scale for each output."""

    gated = True
    codes: Tensor
    scale: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.bfloat16))

    def store(self, first: int, rows: Tensor, squares: Tensor | None = None) -> None:
        scale = (_largest(rows) / 127).clamp(min=LEAST_SCALE).bfloat16()
        self.scale[first : first + len(rows)] = scale
        self.codes[first : first + len(rows)] = (rows / scale.float()[:, None]).round_().clamp_(-127, 127)

    def dequantise_into(self, first: int, out: Tensor) -> None:
        last = first + len(out)
        dequantise.plain_dequantise(self.codes[first:last], self.scale[first:last], out)

    def write_block(self, first: int, out: Tensor) -> None:
        if not (self.kernels and is_available(self.codes.device)):
            super().write_block(first, out)
            return
        last = first + len(out)
        dequantise.dequantise(self.codes[first:last], self.scale[first:last], out)

    def most_rows(self, x: Tensor) -> int:
        return coded.most_rows(x.device, eight_bits.MOST_ROWS)

    def room_for_bytes(self, rows: int, like: Tensor) -> Bytes | None:
        is_for_few = self.kernels and rows <= self.most_rows(like)
        return eight_bits.room_for_bytes(rows, self.codes, like) if is_for_few else None

    def multiply_few(self, x: Tensor, out: Tensor, columns: Columns | None, in_bytes: Bytes | None = None) -> Tensor:
        return eight_bits.multiply(x, self.codes, self.scale, out, columns, in_bytes)

    def multiply_gated(self, x: Tensor, out: Tensor, columns: Columns | None) -> None:
        eight_bits.multiply(x, self.codes, self.scale, out, columns, gated=True)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, for an embedding: ids [...] -> [..., in]."""
        return (self.codes[ids] * self.scale[ids][..., None].float()).to(dtype)

    def look_up_into(self, ids: Tensor, out: Tensor) -> None:
        """The same of ids [rows] into out [rows, in]."""
        if self.kernels and is_available(self.codes.device):
            dequantise.look_up(self.codes, self.scale, ids, out)
        else:
            out.copy_(self.look_up(ids, out.dtype))


class Int4Weight(QuantisedWeight):
    """Asymmetric, scale and shift for each group of inputs; a last group that is not full repeats what it has.

    Four bytes are a word, in which eight inputs an eighth of a group apart stand, the first in the lowest bits.
    """

    gated = True
    codes: Tensor
    affine: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        self.group = group_size(in_features)
        groups = -(-in_features // self.group)
        self.register_buffer("codes", torch.empty(out_features, groups, self.group // 2, dtype=torch.uint8))
        self.register_buffer("affine", torch.empty(out_features, groups, 2, dtype=torch.bfloat16))

    def store(self, first: int, rows: Tensor, squares: Tensor | None = None) -> None:
        groups = self._filled(rows.float()).unflatten(1, (-1, self.group))
        scale, shift = half_quadratic(groups) if squares is None else self._weighted_lines(groups, squares)
        self._keep(first, choose_codes(groups, scale, shift), torch.cat((scale, shift), -1))

    def store_calibrated(self, matrix: Tensor, hessian: Tensor) -> None:
        columns = zip(matrix.split(self.group, 1), importance(hessian.diagonal()).split(self.group), strict=True)
        lines = [weighted_line(part.float(), each) for part, each in columns]

        def rounded(column: Tensor, number: int) -> Tensor:
            scale, shift = (part[:, 0] for part in lines[number // self.group])
            return choose_codes(column, scale, shift).mul_(scale).add_(shift)

        meant = gptq(matrix, hessian, rounded)
        scale, shift = (torch.stack(part, 1) for part in zip(*lines, strict=True))  # [out, groups, 1]
        for first, last in blocks(*matrix.shape):
            groups = self._filled(meant[first:last]).unflatten(1, (-1, self.group))
            codes = choose_codes(groups, scale[first:last], shift[first:last])
            self._keep(first, codes, torch.cat((scale[first:last], shift[first:last]), -1))

    def _weighted_lines(self, groups: Tensor, squares: Tensor) -> Affine:
        """For groups [n, groups, group], scale and shift [n, groups, 1] each."""
        counts = self._filled(importance(squares)[None]).view(-1, self.group)
        scale, shift = weighted_line(groups.transpose(0, 1), counts)
        return scale.transpose(0, 1), shift.transpose(0, 1)

    def _keep(self, first: int, codes: Tensor, affine: Tensor) -> None:
        """Keep codes from -8 to 7 [n, groups, group], scale and shift [n, groups, 2] of outputs from `first` on."""
        words = self.codes[first : first + len(codes)].zero_().view(torch.int32)
        for number, part in enumerate((codes + 8).to(torch.uint8).chunk(CODES_A_WORD, -1)):
            words |= (part.int() << 4 * number).to(words.device)
        self.affine[first : first + len(codes)] = affine

    def dequantise_into(self, first: int, out: Tensor) -> None:
        last = first + len(out)
        codes: Tensor = self.unpacked(first, last).unflatten(1, (-1, self.group))
        scale, shift = self.affine[first:last].float().split(1, -1)
        out.copy_(codes.float().sub_(8).mul_(scale).add_(shift).flatten(1)[:, : self.in_features])

    def write_block(self, first: int, out: Tensor) -> None:
        if not (self.kernels and is_available(self.codes.device)):
            super().write_block(first, out)
            return
        last = first + len(out)
        four_bits.dequantise(self.codes[first:last], self.affine[first:last], out)

    def multiply_few(self, x: Tensor, out: Tensor, columns: Columns | None, in_bytes: Bytes | None = None) -> Tensor:
        return four_bits.multiply(x, self.codes, self.affine, out, columns)

    def multiply_gated(self, x: Tensor, out: Tensor, columns: Columns | None) -> None:
        four_bits.multiply(x, self.codes, self.affine, out, columns, gated=True)

    def unpacked(self, first: int, last: int) -> Tensor:
        """The codes of outputs from one to before another, 0 to 15: [last - first, groups * group] uint8."""
        words = self.codes[first:last].view(torch.int32)
        parts = [(words >> 4 * number & 15).to(torch.uint8) for number in range(CODES_A_WORD)]
        return torch.cat(parts, -1).flatten(1)

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows of whole groups."""
        over = self.in_features % self.group
        if not over:
            return rows
        places = torch.arange(self.group, device=rows.device) % over + self.in_features - over
        return torch.cat((rows[:, : self.in_features - over], rows[:, places]), 1)


class Fp8Weight(QuantisedWeight):
    """e4m3, a scale for each output; x is rounded to e4m3 too, with a scale for each row."""

    codes: Tensor
    scale: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        self.register_buffer("codes", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))

    def store(self, first: int, rows: Tensor, squares: Tensor | None = None) -> None:
        part = slice(first, first + len(rows))
        self.codes[part], self.scale[part] = _to_fp8(rows)

    def store_calibrated(self, matrix: Tensor, hessian: Tensor) -> None:
        for first, last in blocks(*matrix.shape):
            self.store(first, matrix[first:last])  # For the scales.
        meant = gptq(matrix, hessian, lambda column, _: self._nearest(column, self.scale).float().mul_(self.scale))
        for first, last in blocks(*matrix.shape):
            self.codes[first:last] = self._nearest(meant[first:last], self.scale[first:last, None])

    def _nearest(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Codes under scales that are given."""
        return (numbers / scale).clamp_(-rounding.LARGEST, rounding.LARGEST).to(torch.float8_e4m3fn)

    def dequantise_into(self, first: int, out: Tensor) -> None:
        last = first + len(out)
        out.copy_(self.codes[first:last].float().mul_(self.scale[first:last, None]))

    def multiply_few(self, x: Tensor, out: Tensor, columns: Columns | None, in_bytes: Bytes | None = None) -> Tensor:
        return eight_bits.multiply(x, self.codes, self.scale, out, columns, in_bytes)

    def makes_blocks(self, x: Tensor) -> bool:
        return False  # x is rounded before.

    def multiply_many(
        self, x: Tensor, out: Tensor, most_numbers: int | None = None, in_bytes: Bytes | None = None
    ) -> None:
        if not self._has_products(len(x), x):
            self.plain_multiply(x, out)
            return
        made = in_bytes or self._rounded(x)
        # With fast accumulation a product is up to a fifth quicker, and 0.2 to 0.3 % beside it, where rounding x and W
        # to e4m3 is 3 to 4 %.
        factors = made.codes, self.codes.t(), made.scale[:, None], self.scale[None, :]
        torch._scaled_mm(*factors, out_dtype=x.dtype, use_fast_accum=True, out=out)

    def room_for_bytes(self, rows: int, like: Tensor) -> Bytes | None:
        if not (self.kernels and is_available(like.device)):
            return None
        if rows <= self.most_rows(like):
            return eight_bits.room_for_bytes(rows, self.codes, like)
        return room_in_e4m3(rows, self.in_features, like) if self._has_products(rows, like) else None

    def plain_multiply(self, x: Tensor, out: Tensor, most_numbers: int | None = None) -> None:
        for first, last in blocks(*x.shape):
            codes, scale = _to_fp8(x[first:last])
            rounded = codes.float().mul_(scale[:, None]).to(x.dtype)
            super().plain_multiply(rounded, out[first:last])

    def _rounded(self, x: Tensor) -> Bytes:
        """x in e4m3, by the fastest there is."""
        if not (self.kernels and is_available(x.device)):
            return Bytes(*round_rows(x))
        made = room_in_e4m3(len(x), self.in_features, x)
        make_bytes(x, made)
        return made

    def _has_products(self, rows: int, like: Tensor) -> bool:
        """Whether the card's units take such rows, and a matrix of this size; a lone scale is taken for all rows'."""
        is_even = self.in_features % 16 == 0 and self.out_features % 16 == 0
        return like.dtype is torch.bfloat16 and rows > 1 and is_even and has_fp8_products(like.device)


WEIGHTS: dict[str, type[QuantisedWeight]] = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}


def multiply_by_blocks(
    writers: Sequence[tuple[Callable[[int, Tensor], None], slice]],
    products: Sequence[tuple[Tensor, slice, slice]],
    out: Tensor,
    most_numbers: int | None,
) -> None:
    """Products with matrices side by side, a block of their outputs after another, in out's dtype.

    writers: what writes some outputs of each, as `write_block`, and its columns among those of all; products: each x
    [rows, columns], the columns that it is multiplied by, and its rows of out [rows, out].
    """
    width = max(at.stop for _, at in writers)
    for first, last in blocks(out.shape[1], width, most_numbers):
        block = out.new_empty(last - first, width)
        for write, at in writers:
            write(first, block[:, at])
        for x, at, rows in products:
            torch.mm(x, block[:, at].t(), out=out[rows, first:last])
        del block  # Or the next one would come beside it.


def blocks(rows: int, columns: int, most_numbers: int | None = None) -> Iterator[tuple[int, int]]:
    """Rows from one to before another: about as many in each block, whole EVEN_ROWS where so many numbers hold those.

    None: DEQUANTISED_NUMBERS.
    """
    most = max((most_numbers or DEQUANTISED_NUMBERS) // columns, 1)
    if rows and most >= EVEN_ROWS:
        evens = -(-rows // EVEN_ROWS)
        count = -(-evens // (most // EVEN_ROWS))
        most = -(-evens // count) * EVEN_ROWS
    for first in range(0, rows, most):
        yield first, min(first + most, rows)


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 by e4m3 with a scale for each row (Ada and Hopper)."""
    return device.type == "cuda" and capability(device) >= E4M3_CAPABILITY


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] in e4m3, and a scale for each row [rows]; a block of rows after another."""
    codes, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    for first, last in blocks(*x.shape):
        codes[first:last], scale[first:last] = _to_fp8(x[first:last])
    return codes, scale


def _to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty_like(rows, dtype=torch.float8_e4m3fn), rows.new_empty(len(rows), dtype=torch.float32)
    rounding.plain_round_rows(rows, codes, scale)
    return codes, scale


def _largest(rows: Tensor) -> Tensor:
    """The largest size of a number in each row, in fp32: [rows, in] -> [rows]."""
    return cast(Tensor, torch.linalg.vector_norm(rows, float("inf"), dim=1).float())
