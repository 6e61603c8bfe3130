"""Bytes of checkpoint files into tensors that exist already, on any device.

Knows how bytes travel: in pieces, through one buffer. Knows neither names nor shapes of the model; the loader says what
goes where, and `headers` says where it lies.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from queue import SimpleQueue

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


READERS = 4
"""Threads that read: what comes from the system's page cache comes as fast as one core copies it."""
_BUFFER_BYTES = 32 * 2**20
_PIECE_BYTES = _BUFFER_BYTES // READERS
_RUN_BYTES = 16 * 2**20
"""What a thread reads of a file before others have their turn, about."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file, and where they go."""

    stored: StoredTensor
    start: int
    """In the file."""
    block: Tensor

    @property
    def n_bytes(self) -> int:
        return self.block.numel() * ITEM_BYTES[self.stored.kind]


def make_buffer(device: torch.device) -> Tensor:
    """What bytes for a device travel through: 32 MiB of the host's memory, pinned for a GPU."""
    return torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def fill_tensors(
    pairs: Iterable[tuple[StoredTensor, Tensor]],
    device: torch.device,
    progress: Progress | None,
    buffer: Tensor | None = None,
) -> None:
    """Fill each tensor from its file; they lie on `device`, and may be views and of another float dtype.

    buffer, from `make_buffer`, is for whoever calls this often. Host memory: one such buffer, however large a tensor
    is, and up to 64 MiB more while pieces change their dtype. Files are read, not mapped, so a file that shrinks under
    us is an error and not a dead process. Raises CheckpointError for a file that cannot be read to the end.
    """
    work = sorted(pairs, key=lambda pair: (pair[0].file, pair[0].start))
    free = SimpleQueue[Tensor]()
    buffer = make_buffer(device) if buffer is None else buffer
    for part in buffer[: READERS * _PIECE_BYTES].split(_PIECE_BYTES):
        free.put(part)
    done, total = 0, sum(stored.end - stored.start for stored, _ in work)
    pool = ThreadPoolExecutor(READERS, "memphi-reader")
    try:
        inference = torch.is_inference_mode_enabled()  # Which is a thread's own.
        for count in [pool.submit(_read_run, run, free, inference) for run in _runs(work)]:
            done += count.result()
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _runs(work: Iterable[tuple[StoredTensor, Tensor]]) -> Iterator[list[_Piece]]:
    """Pieces that follow each other in a file."""
    run, size = list[_Piece](), 0
    for stored, target in work:
        start = stored.start
        for block in blocks(target, _PIECE_BYTES // ITEM_BYTES[stored.kind]):
            if run and (size >= _RUN_BYTES or run[0].stored.file != stored.file):
                yield run
                run, size = [], 0
            run.append(_Piece(stored, start, block))
            start += run[-1].n_bytes
            size += run[-1].n_bytes
    if run:
        yield run


def _read_run(run: list[_Piece], free: "SimpleQueue[Tensor]", inference: bool) -> int:
    """Read pieces through a part of the buffer that nobody uses; returns their bytes."""
    path, buffer = run[0].stored.file, free.get()
    try:
        with path.open("rb", buffering=0) as file, torch.inference_mode(inference), torch.no_grad():
            for piece in run:
                _fill(file, piece, buffer)
    except OSError as wrong:
        raise CheckpointError(f"{path} cannot be read: {wrong.strerror or wrong}") from None
    finally:
        free.put(buffer)
    return sum(piece.n_bytes for piece in run)


def _fill(file: FileIO, piece: _Piece, buffer: Tensor) -> None:
    kind, block, read = piece.stored.kind, piece.block, buffer[: piece.n_bytes]
    file.seek(piece.start)
    _read_exactly(file, memoryview(read.numpy()), piece.stored)  # type: ignore[arg-type]  # numpy arrays are buffers
    block.copy_(read.view(DTYPES[kind]).view(block.shape))


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
