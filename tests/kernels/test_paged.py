"""Attention over pages equals its definition, whatever the rows' lengths, and reads nothing that no row owns."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memphi.config import LanguageConfig
from memphi.model.kernels.division import Division, Tiling, choose_tiling, divide, make_division, plain_divide
from memphi.model.kernels.gate import gate
from memphi.model.kernels.paged import attend, attend_new, plain_attend, plain_attend_new
from memphi.model.rotary import rotate
from tests.checkpoints import tiny_config
from tests.kernels.samples import (
    DTYPES,
    FEW,
    SEEDS,
    assert_coded_alike,
    assert_near,
    coded,
    decoded,
    normal,
    strided,
    unwritten,
)

NOWHERE = 10**9
"""A page so far away that reading it fails."""
TILINGS = (None, Tiling(8, 16, 16, 3, 4, None, early=True, parts=64), Tiling(2, 32, 32, 5, 4, 128, early=False))


@dataclass
class Scene:
    """Rows over a pool of which only what they hold is numbers."""

    config: LanguageConfig
    division: Division
    pool: torch.Tensor  # [pages, layers, 2, page_tokens, kv_heads, head_dim]
    table: torch.Tensor
    qkv: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]

    @property
    def layer(self):
        return self.pool[:, 1, 0], self.pool[:, 1, 1]

    @property
    def query(self):
        return self.qkv[:, : self.config.hidden_size].unflatten(1, (-1, self.config.head_dim))

    def out(self):
        tokens, width = len(self.qkv), self.config.hidden_size
        out = strided(unwritten(tokens, width, dtype=self.qkv.dtype, device=self.qkv.device))
        return out.unflatten(1, (-1, self.config.head_dim))


def make_scene(lengths, new_tokens, dtype, device, seed, fresh, kv_heads=2, group=3, page_tokens=16, tiling=None):
    head_dim = 16
    heads = kv_heads * group
    config = tiny_config(hidden_size=heads * head_dim, heads=heads, kv_heads=kv_heads).language
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_tokens) for length in lengths]
    numbers = (1 + torch.randperm(sum(counts) + 2, generator=generator)).tolist()
    pool = torch.full((len(numbers) + 1, 2, 2, page_tokens, kv_heads, head_dim), float("nan"))
    table = torch.full((len(lengths), max(counts) + 2), NOWHERE, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        kept = max(length - new_tokens, 0) if fresh else length
        for i in range(count):
            table[row, i] = page = numbers.pop()
            places = min(page_tokens, max(kept - i * page_tokens, 0))
            pool[page, :, :, :places] = torch.randn(2, 2, places, kv_heads, head_dim, generator=generator)
    tiling = tiling or choose_tiling(len(lengths), new_tokens, dtype, device, fresh=fresh)
    division = make_division(config, len(lengths), new_tokens, tiling, device)
    division.lengths.copy_(torch.tensor(lengths))
    tokens = len(lengths) * new_tokens
    halves = (normal(tokens, 1, config.rotary_dim // 2, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))
    qkv = strided(normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device, seed=seed + 3))
    cos, sin = (half.repeat(1, 1, 2) for half in halves)
    return Scene(config, division, pool.to(device, dtype), table.to(device), qkv, (cos, sin))


@st.composite
def lengths_and_new(draw, new=(1, 1, 1, 2, 5, 8), most_rows=9, most_tokens=300):
    """Rows of all kinds and how many new tokens each has; some rows fill up the batch."""
    new_tokens = draw(st.sampled_from(new))
    length = st.one_of(st.just(0), st.integers(new_tokens, new_tokens + 40), st.integers(new_tokens, most_tokens))
    return draw(st.lists(length, min_size=1, max_size=most_rows).filter(any)), new_tokens


def assert_found(scene, found, expected):
    """Weights are rounded before they meet the values, and the result after: three roundings against values near 1."""
    steps = 32 if scene.qkv.dtype == torch.float32 else 3
    assert_near(found, expected, steps=steps, scale=1.0)
    assert not scene.division.arrived.any()


def in_fp32(scene, query):
    """What the definition says of a scene's numbers when it rounds nothing."""
    expected = unwritten(*query.shape, dtype=torch.float32, device=query.device)
    plain_attend(query.float(), *(part.float() for part in scene.layer), scene.table, scene.division, expected)
    return expected


@FEW
@given(rows=lengths_and_new(), dtype=DTYPES, seed=SEEDS, tiling=st.sampled_from(TILINGS), kv_heads=st.integers(1, 3))
@example(rows=([1], 1), dtype=torch.float32, seed=0, tiling=None, kv_heads=1)
def test_attend_equals_its_definition(device, rows, dtype, seed, tiling, kv_heads):
    tiling = tiling and replace(tiling, early=False)
    scene = make_scene(*rows, dtype, device, seed, fresh=False, kv_heads=kv_heads, tiling=tiling)
    found = scene.out()
    divide(scene.division)
    attend(scene.query, *scene.layer, scene.table, scene.division, found)
    assert_found(scene, found, in_fp32(scene, scene.query))


@FEW
@given(
    rows=lengths_and_new(new=(1,)),
    dtype=DTYPES,
    seed=SEEDS,
    tiling=st.sampled_from(TILINGS),
    group=st.integers(1, 3),
)
@example(rows=([1], 1), dtype=torch.float32, seed=0, tiling=None, group=3)
@example(rows=([0, 16, 17, 32], 1), dtype=torch.bfloat16, seed=0, tiling=None, group=3)
def test_attend_new_equals_its_definition(device, rows, dtype, seed, tiling, group):
    page_tokens = 16 if seed % 2 else 4
    scene = make_scene(*rows, dtype, device, seed, fresh=True, group=group, page_tokens=page_tokens, tiling=tiling)
    plain = replace(scene, pool=scene.pool.clone())
    expected, found = scene.out(), scene.out()
    plain_attend_new(plain.qkv, *plain.rotary, *plain.layer, plain.table, plain.division, expected)
    divide(scene.division)
    attend_new(scene.qkv, *scene.rotary, *scene.layer, scene.table, scene.division, found)
    assert torch.equal(scene.pool.isnan(), plain.pool.isnan())
    steps = 2 if dtype == torch.float32 else 0  # Only fp32 products may be fused with their sum, on a GPU.
    assert_near(scene.pool.nan_to_num(), plain.pool.nan_to_num(), steps=steps, scale=4.0)
    exact = in_fp32(plain, rotate(plain.query, *plain.rotary))
    assert_found(scene, found, exact)
    assert_near(expected, exact, steps=32 if dtype == torch.float32 else 4, scale=1.0)


@pytest.mark.parametrize("code", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_in_parts_is_summed_and_rounded_once(device, dtype, code):
    """What is kept and what comes out are those of the sum."""
    scene = make_scene([0, 16, 33, 1], 1, dtype, device, 0, fresh=True)
    parts = strided(normal(3 * 4, scene.qkv.shape[1], dtype=torch.float32, device=device, seed=5)).unflatten(0, (3, 4))
    pools, outs = [], []
    for qkv in ((parts[0] + parts[1] + parts[2]).to(dtype), parts):
        numbers, scales = coded(scene.pool, code) if code else (scene.pool.clone(), None)
        layer = numbers[:, 1, 0], numbers[:, 1, 1]
        divide(scene.division)
        outs.append(scene.out())
        where = scene.table, scene.division, outs[-1], None if scales is None else scales[:, 1]
        attend_new(qkv, *scene.rotary, *layer, *where)
        pools.append(numbers.float().nan_to_num())
    assert torch.equal(*pools)
    assert torch.equal(*outs)
    expected = scene.out()
    numbers, scales = coded(scene.pool, code) if code else (scene.pool.clone(), None)
    where = scene.table, scene.division, expected, None if scales is None else scales[:, 1]
    plain_attend_new(parts, *scene.rotary, numbers[:, 1, 0], numbers[:, 1, 1], *where)
    assert_near(outs[0], expected, steps=64 if dtype == torch.float32 else 8, scale=1.0)


@FEW
@given(
    rows=lengths_and_new(),
    dtype=DTYPES,
    seed=SEEDS,
    tiling=st.sampled_from(TILINGS),
    code=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    fresh=st.booleans(),
)
@example(rows=([1], 1), dtype=torch.float32, seed=0, tiling=None, code=torch.int8, fresh=True)
@example(rows=([0, 16, 33, 32], 1), dtype=torch.bfloat16, seed=0, tiling=None, code=torch.float8_e4m3fn, fresh=True)
def test_attention_over_codes_equals_its_definition(device, rows, dtype, seed, tiling, code, fresh):
    """What a row's pages stand for is seen, and its new token as it is kept."""
    fresh = fresh and rows[1] == 1
    tiling = tiling and replace(tiling, early=tiling.early and fresh)
    page_tokens = 32 if seed % 2 else 4
    scene = make_scene(*rows, dtype, device, seed, fresh=fresh, page_tokens=page_tokens, tiling=tiling)
    kept, plain = coded(scene.pool, code), coded(scene.pool, code)
    expected, found, query = scene.out(), scene.out(), scene.query
    divide(scene.division)
    for (codes, scales), out, new, run in (
        (plain, expected, plain_attend_new, plain_attend),
        (kept, found, attend_new, attend),
    ):
        where = (codes[:, 1, 0], codes[:, 1, 1], scene.table, scene.division, out, scales[:, 1])
        if fresh:
            new(scene.qkv, *scene.rotary, *where)
        else:
            run(query, *where)
    assert_coded_alike(kept, plain, dtype)
    exact = in_fp32(replace(scene, pool=decoded(*kept, dtype)), rotate(query, *scene.rotary) if fresh else query)
    assert_found(scene, found, exact)
    assert_near(expected, exact, steps=32 if dtype == torch.float32 else 4, scale=1.0)


@FEW
@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 200_000)), min_size=1, max_size=40),
    tiling=st.sampled_from(TILINGS[1:]),
)
def test_a_division_covers_every_key_once(device, lengths, tiling):
    config = tiny_config().language
    by_kernel, plain = (make_division(config, len(lengths), 1, tiling, device) for _ in range(2))
    for division, run in ((by_kernel, divide), (plain, plain_divide)):
        division.lengths.copy_(torch.tensor(lengths))
        run(division)
    assert torch.equal(by_kernel.units[:, 0], plain.units[:, 0])
    live = plain.units[plain.units[:, 0] >= 0, :6]
    assert torch.equal(by_kernel.units[: len(live), :6], live)
    for row, length in enumerate(lengths):
        parts = live[live[:, 0] == row]
        assert parts[:, 1].tolist() == [0, *parts[:-1, 2].tolist()]
        assert parts[-1, 2] == length
        assert (parts[:, 5] == length).all()
        assert len(parts) == parts[0, 4]
    assert (live[:, 2] - live[:, 1]).max() <= tiling.unit_tokens * max(
        1, -(-sum(lengths) // (len(by_kernel.units) - len(lengths)) // tiling.unit_tokens) + 1
    )


def replayable(step, device):
    """A function that does a step again: by a graph where there is a GPU."""
    step()
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("early", [False, True])
def test_a_graph_follows_what_its_tensors_say(device, early):
    """Captured once, a kernel launched before the last has ended where the card can, and replayed over other rows."""
    tiling = replace(choose_tiling(4, 1, torch.bfloat16, device, fresh=True), early=early)
    held = make_scene([200] * 4, 1, torch.bfloat16, device, 0, fresh=True, tiling=tiling)
    pre_gate, out = torch.zeros(4, 2 * held.qkv.shape[1], dtype=torch.bfloat16, device=device), held.out()

    def step():
        divide(held.division)
        held.qkv.fill_(float("nan"))  # As torch launches: after everything before, and before everything after.
        gate(pre_gate, held.qkv)
        attend_new(held.qkv, *held.rotary, *held.layer, held.table, held.division, out)

    replay = replayable(step, device)
    for seed, lengths in enumerate(([200, 1, 65, 0], [5] * 4, [0, 17, 130, 64])):
        scene = make_scene(lengths, 1, torch.bfloat16, device, seed, fresh=True, tiling=tiling)
        held.pool[: len(scene.pool)] = scene.pool
        held.table[:, : scene.table.shape[1]] = scene.table
        held.division.lengths.copy_(scene.division.lengths)
        pre_gate.copy_(normal(*pre_gate.shape, dtype=torch.bfloat16, device=device, seed=seed))
        replay()
        plain_attend_new(held.qkv, *held.rotary, *scene.layer, scene.table, scene.division, scene.out())
        assert torch.equal(held.pool[: len(scene.pool)].nan_to_num(), scene.pool.nan_to_num())
        exact = in_fp32(scene, rotate(held.query, *held.rotary))
        assert_found(held, out, exact)
