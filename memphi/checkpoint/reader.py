"""Bytes of checkpoint files into tensors that exist already, on any device.

Knows how bytes travel: in pieces, through one buffer. Knows neither names nor shapes of the model; the loader says what
goes where, and `headers` says where it lies.
"""

from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from itertools import groupby

import torch
from torch import Tensor

from memphi.checkpoint.headers import ITEM_BYTES, StoredTensor
from memphi.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


def kinds_for(dtype: torch.dtype) -> tuple[str, ...]:
    """The kinds that may be read into a tensor: any wide float into one, codes only as they are."""
    if dtype.itemsize == 1:
        return tuple(kind for kind, own in DTYPES.items() if own is dtype)
    return tuple(kind for kind, own in DTYPES.items() if own.itemsize > 1)


_PIECE_BYTES = 32 * 2**20


def make_buffer(device: torch.device) -> Tensor:
    """What bytes for a device travel through: 32 MiB of the host's memory, pinned for a GPU."""
    return torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def fill_tensors(
    pairs: Iterable[tuple[StoredTensor, Tensor]],
    device: torch.device,
    progress: Progress | None,
    buffer: Tensor | None = None,
) -> None:
    """Fill each tensor from its file; they lie on `device`, and may be views and of another float dtype.

    buffer, from `make_buffer`, is for whoever calls this often. Host memory: one such buffer, however large a tensor
    is, and up to 64 MiB more while a piece changes its dtype. Files are read, not mapped, so a file that shrinks under
    us is an error and not a dead process. Raises CheckpointError for a file that cannot be read to the end.
    """
    work = sorted(pairs, key=lambda pair: (pair[0].file, pair[0].start))
    buffer = make_buffer(device) if buffer is None else buffer
    done, total = 0, sum(stored.end - stored.start for stored, _ in work)
    for path, group in groupby(work, key=lambda pair: pair[0].file):
        try:
            with path.open("rb", buffering=0) as file:
                for stored, target in group:
                    for count in _fill(file, stored, target, buffer):
                        done += count
                        if progress:
                            progress(done, total)
        except OSError as wrong:
            raise CheckpointError(f"{path} cannot be read: {wrong.strerror or wrong}") from None


def _fill(file: FileIO, stored: StoredTensor, target: Tensor, buffer: Tensor) -> Iterator[int]:
    """Copy one tensor piece by piece; yields each piece's bytes."""
    item_bytes = ITEM_BYTES[stored.kind]
    file.seek(stored.start)
    for block in blocks(target, _PIECE_BYTES // item_bytes):
        piece = buffer[: block.numel() * item_bytes]
        _read_exactly(file, memoryview(piece.numpy()), stored)  # type: ignore[arg-type]  # numpy arrays are buffers
        block.copy_(piece.view(DTYPES[stored.kind]).view(block.shape))
        yield len(piece)


def blocks(tensor: Tensor, most_numbers: int) -> Iterator[Tensor]:
    """Views of a tensor, one after another, of so many numbers at most; of one with strides, rows or parts of a row."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(most_numbers)
    elif rows := most_numbers // tensor[0].numel():
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from blocks(row, most_numbers)


def _read_exactly(file: FileIO, into: memoryview, stored: StoredTensor) -> None:
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise CheckpointError(
                f"{stored.file} ends within tensor {stored.name!r}; expected {stored.end} bytes or more"
            )
        done += count
