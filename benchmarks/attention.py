"""How long a layer's attention over prompts takes, by each of torch's kernels, at the official sizes.

Whole rows: variable-length flash, cuDNN row by row, cuDNN with equal rows as a batch; and how long the first call for
a length takes, when cuDNN makes a kernel ready. Chunks over a past: all in one launch or row by row, their keys copied
out of pages in either case, and what that copying takes; and block by block of the past, for cuDNN has no mask for a
chunk over its past, but what it makes of each block can be joined. Crops: flash and cuDNN. Every way is compared with
flash attention row by row first, then timed under a CUDA graph. cuDNN of copies is for
TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1, which takes no views. Usage: python -m benchmarks.attention --out FILE
[--only chunks,crops]. Without a GPU small sizes are tried, by the kernels of a CPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.document import write_document
from benchmarks.launches import LARGEST_ERROR, error_of, measure
from benchmarks.scenes import PAGE_TOKENS
from memphi import official
from memphi.config import LanguageConfig, ModelConfig, VisionConfig
from memphi.model.attention.blocks import attend_blocks
from memphi.model.attention.sdpa import ANY_LENGTH, SdpaAttention, cudnn_block, varlen
from memphi.model.kept import Kept
from memphi.model.rows import Packing, Row, pack

Way = Callable[[], Tensor]
Sides = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""

ENGINE_TOKENS = 8192
"""Of a step at most; so a batch of prompts is measured as the engine divides it, too."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of (new tokens, past)."""

    config: LanguageConfig
    dtype: torch.dtype
    whole: tuple[tuple[int, int], ...]
    """(rows, tokens of each)"""
    chunks: tuple[tuple[int, int], ...]
    """(new tokens, past) of one row"""
    together: tuple[tuple[int, int], ...]
    """The same of several rows in one step."""
    vision: VisionConfig
    crops: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """One step of rows in a layer: their products, and pages that hold all their keys and values."""

    rows: tuple[Row, ...]
    packing: Packing
    query: Tensor  # [tokens, heads, head_dim], as all three a view of the qkv product
    key: Tensor
    value: Tensor
    keys: Kept
    values: Kept
    tables: tuple[Tensor, ...]
    """The pages of each row."""
    bounds: Tensor
    """[rows + 1] int32: each row's first token, then their number."""

    @property
    def lengths(self) -> list[int]:
        return [row.tokens for row in self.rows]

    @property
    def operations(self) -> int:
        """Of both products, for the keys that each query sees."""
        seen = sum(row.tokens * row.past + row.tokens * (row.tokens + 1) // 2 for row in self.rows)
        return 4 * seen * self.query[0].numel()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, separated by commas")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = official_sizes() if device.type == "cuda" else small_sizes()
    figures = list[dict[str, Any]]()
    with torch.inference_mode():
        for figure in measure_all(sizes, options.only.split(","), device):
            figures.append(figure)
            write_document(options.out, device, options.commit, {"figures": figures})
    return 0 if all(figure["relative_error"] < LARGEST_ERROR for figure in figures) else 1


def official_sizes() -> Sizes:
    config = ModelConfig.from_folder(official.folder())
    return Sizes(
        config=config.language,
        dtype=torch.bfloat16,
        whole=(
            *((1, tokens) for tokens in (256, 512, 1024, 1713, 2048, 3072, 4096, 6144, 8192, 13704, 16384)),
            *((ENGINE_TOKENS // tokens, tokens) for tokens in (256, 512, 1024, 2048, 4096)),
            *((4, 1713), (8, 1713)),
        ),
        chunks=(
            *((512, past) for past in (2048, 8192, 32768)),
            *((2048, 8192), (4096, 4096), (4096, 12288)),
            *((8192, past) for past in (8192, 24576, 57344, 122880)),
        ),
        together=((373, 1340), (512, 2048), (512, 8192), (64, 4096)),
        vision=config.vision,
        crops=(1, 7, 14, 28, 56),
    )


def small_sizes() -> Sizes:
    from tests.checkpoints import tiny_config

    config = tiny_config()
    chunks = ((8, 20), (8, 24))
    return Sizes(config.language, torch.float32, ((1, 20), (2, 16)), chunks, ((3, 40), (20, 5)), config.vision, (2,))


def measure_all(sizes: Sizes, parts: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from PARTS[part](sizes, device)


def measure_whole(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    for rows, tokens in sizes.whole:
        scene = make_scene(((tokens, 0),) * rows, sizes.config, sizes.dtype, device)
        yield measure_ways(f"{rows} x {tokens}", scene.operations, whole_ways(scene), device)


def measure_chunks(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    for new, past in sizes.chunks:
        scene = make_scene(((new, past),), sizes.config, sizes.dtype, device)
        yield measure_ways(f"{new} over {past}", scene.operations, chunk_ways(scene) | block_ways(scene), device)


def measure_together(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    scene = make_scene(sizes.together, sizes.config, sizes.dtype, device)
    name = " + ".join(f"{new} over {past}" for new, past in sizes.together)
    yield measure_ways(name, scene.operations, chunk_ways(scene), device)


def measure_crops(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    for crops in sizes.crops:
        sides = make_crops(crops, sizes, device)
        operations = 4 * sides[0].numel() * sides[0].shape[2]
        yield measure_ways(f"{crops} crops", operations, crop_ways(sides), device)


PARTS = {"whole": measure_whole, "chunks": measure_chunks, "together": measure_together, "crops": measure_crops}


def make_scene(
    shape: Sequence[tuple[int, int]], config: LanguageConfig, dtype: torch.dtype, device: torch.device
) -> Scene:
    counts = [-(-(new + past) // PAGE_TOKENS) for new, past in shape]
    numbers = iter(torch.randperm(sum(counts)).tolist())
    pages = [tuple(next(numbers) for _ in range(count)) for count in counts]
    rows = tuple(Row(*row, pages=own) for row, own in zip(shape, pages, strict=True))
    packing = pack(rows, device, page_tokens=PAGE_TOKENS)
    make = partial(torch.randn, device=device, dtype=dtype)
    parts = make(len(packing.positions), config.heads + 2 * config.kv_heads, config.head_dim)
    query, key, value = parts.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
    # Two layers, so that a page's tokens lie apart from the next one's as they do in the pool.
    pool = make(sum(counts), 2, 2, PAGE_TOKENS, config.kv_heads, config.head_dim)
    assert packing.paging is not None
    keys, values = Kept(pool[:, 1, 0]), Kept(pool[:, 1, 1])
    packing.paging.write(keys, key)
    packing.paging.write(values, value)
    tables = tuple(torch.tensor(own, device=device) for own in pages)
    bounds = torch.tensor([0, *accumulate(row.tokens for row in rows)], dtype=torch.int32, device=device)
    return Scene(rows, packing, query, key, value, keys, values, tables, bounds)


def make_crops(crops: int, sizes: Sizes, device: torch.device) -> Sides:
    """Queries, keys and values of whole crops, [crops, heads, patches, head_dim], as the tower's linears leave them."""
    config = sizes.vision
    shape = crops, config.patches**2, config.heads, config.head_dim
    query, key, value = (torch.randn(shape, device=device, dtype=sizes.dtype).transpose(1, 2) for _ in range(3))
    return query, key, value


# --- ways ------------------------------------------------------------------------------------------------------------


def whole_ways(scene: Scene) -> dict[str, Way]:
    """As memphi chooses; and each kernel by itself. The first of all ways is what the others must equal."""
    ways: dict[str, Way] = {
        "flash row by row": partial(row_by_row, scene, ANY_LENGTH),
        "as chosen": partial(chosen, scene),
    }
    if scene.query.is_cuda:
        ways |= {
            "varlen flash": partial(varlen_flash, scene),
            "cuDNN row by row": partial(row_by_row, scene, [SDPBackend.CUDNN_ATTENTION]),
            "cuDNN row by row, of copies": partial(row_by_row, scene, [SDPBackend.CUDNN_ATTENTION], copied=True),
            "cuDNN as a batch": partial(as_batch, scene, SDPBackend.CUDNN_ATTENTION),
            "flash as a batch": partial(as_batch, scene, SDPBackend.FLASH_ATTENTION),
        }
    return ways


def chunk_ways(scene: Scene) -> dict[str, Way]:
    return {
        "row by row": partial(chunk_by_chunk, scene),
        "as chosen": partial(chosen, scene),
        "copying alone": partial(copy_all, scene),
    }


def block_ways(scene: Scene) -> dict[str, Way]:
    """Blocks of few lengths, where some end where the chunk begins."""
    (row,) = scene.rows
    chunks, rest = divmod(row.past, row.tokens)
    if rest:
        return {}
    sizes = (many for many in (1, 2, 4) if many <= chunks)
    return {f"blocks of {many} chunks": partial(block_by_block, scene, many * row.tokens) for many in sizes}


def crop_ways(sides: Sides) -> dict[str, Way]:
    ways: dict[str, Way] = {"as chosen": partial(full, sides, ANY_LENGTH)}
    if sides[0].is_cuda:
        ways["cuDNN"] = partial(full, sides, [SDPBackend.CUDNN_ATTENTION])
        ways["cuDNN, crop by crop"] = partial(one_by_one, sides)
    return ways


def chosen(scene: Scene) -> Tensor:
    out = torch.empty_like(scene.query)
    SdpaAttention().paged(scene.query, scene.key, scene.value, scene.keys, scene.values, scene.packing, out)
    return out


def varlen_flash(scene: Scene) -> Tensor:
    bounds, lengths = (scene.bounds, scene.bounds), (scene.lengths, scene.lengths)
    return varlen(scene.query, scene.key, scene.value, bounds, lengths)


def row_by_row(scene: Scene, backends: list[SDPBackend], copied: bool = False) -> Tensor:
    parts = (scene.query, scene.key, scene.value)
    sides = [(part.contiguous() if copied else part)[None].split(scene.lengths, dim=1) for part in parts]
    with sdpa_kernel(backends):
        return torch.cat([causal(*row)[0] for row in zip(*sides, strict=True)])


def as_batch(scene: Scene, backend: SDPBackend) -> Tensor:
    """Rows of equal length."""
    parts = (part.unflatten(0, (len(scene.rows), -1)) for part in (scene.query, scene.key, scene.value))
    with sdpa_kernel(backend):
        return causal(*parts).flatten(0, 1)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def chunk_by_chunk(scene: Scene) -> Tensor:
    """Each row by itself, with torch's mask type for a chunk over its past."""
    outputs = []
    rows = zip(scene.rows, scene.tables, scene.query.split(scene.lengths), strict=True)
    for row, pages, query in rows:
        key, value = (
            kept.read(pages, query.dtype).flatten(0, 1)[: row.past + row.tokens] for kept in (scene.keys, scene.values)
        )
        q, k, v = (part[None].transpose(1, 2) for part in (query, key, value))
        mask = causal_lower_right(len(query), len(key))
        with sdpa_kernel(ANY_LENGTH):
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def block_by_block(scene: Scene, block_tokens: int) -> Tensor:
    """One row, its past in blocks of so many tokens."""
    assert scene.packing.paging is not None
    (rows,) = scene.packing.paging.continued
    key, value = (rows.gather(kept, scene.query.dtype) for kept in (scene.keys, scene.values))
    return attend_blocks(scene.query, key, value, attend, (block_tokens,)).to(scene.query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """As blocks are attended to; a CPU's kernel wants as many heads of keys as of queries."""
    if query.is_cuda:
        return cudnn_block(query, key, value, is_causal)
    q, k, v = (part[None].transpose(1, 2) for part in (query, key, value))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    return out[0].transpose(0, 1), weight.reshape(q.shape[1], -1, 1).transpose(0, 1)


def full(sides: Sides, backends: list[SDPBackend]) -> Tensor:
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(*sides)


def one_by_one(sides: Sides) -> Tensor:
    """One kernel serves any number of crops."""
    crops = zip(*(side.split(1) for side in sides), strict=True)
    return torch.cat([full(crop, [SDPBackend.CUDNN_ATTENTION]) for crop in crops])


def copy_all(scene: Scene) -> Tensor:
    """What attention over pasts copies out of the pages first."""
    assert scene.packing.paging is not None
    copies = [
        rows.gather(kept, scene.query.dtype)
        for rows in scene.packing.paging.continued
        for kept in (scene.keys, scene.values)
    ]
    return torch.cat(copies) if len(copies) > 2 else copies[0]


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_ways(name: str, operations: int, ways: Mapping[str, Way], device: torch.device) -> dict[str, Any]:
    firsts, errors = {}, {}
    expected: Tensor | None = None
    for way, run in ways.items():
        started = time.perf_counter()
        found = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        firsts[way] = time.perf_counter() - started
        expected = found if expected is None else expected
        if found.shape == expected.shape:
            errors[way] = error_of([found], [expected])
    print(f"{name}: error {max(errors.values()):.1e}", flush=True)
    seconds = {way: measure([partial(discard, run)], device) for way, run in ways.items()}
    for way, taken in seconds.items():
        rate = operations / taken / 1e12
        print(f"    {way:28} {taken * 1e6:9.1f} us {rate:6.0f} TFLOP/s, first {firsts[way] * 1e3:.1f} ms", flush=True)
    return {
        "rows": name,
        "operations": operations,
        "relative_error": max(errors.values()),
        "microseconds": {way: round(taken * 1e6, 1) for way, taken in seconds.items()},
        "first_call_milliseconds": {way: round(taken * 1e3, 2) for way, taken in firsts.items()},
    }


def discard(run: Way) -> None:
    run()


if __name__ == "__main__":
    sys.exit(main())
