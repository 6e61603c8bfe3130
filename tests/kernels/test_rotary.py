"""Tables of cosines and sines, and queries and keys turned by them, equal their definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from memphi import official
from memphi.config import ModelConfig
from memphi.model.kept import Kept
from memphi.model.kernels.rotary import (
    plain_rotate_and_keep,
    plain_tabulate,
    rotate_and_keep,
    tabulate,
)
from memphi.model.rotary import rotary_frequencies, rotary_table
from memphi.model.rows import Row, pack
from tests.kernels.samples import (
    CODES,
    DTYPES,
    FEW,
    SEEDS,
    assert_coded_alike,
    assert_near,
    coded,
    normal,
    strided,
    unwritten,
)

CONFIG = ModelConfig.from_folder(official.folder()).language
PLACES = st.lists(st.tuples(st.integers(0, CONFIG.max_tokens - 1), st.booleans()), min_size=1, max_size=9)


def place(places, device):
    positions, long = zip(*places, strict=True)
    return torch.tensor(positions, device=device), torch.tensor(long, device=device)


@FEW
@given(places=PLACES, dtype=DTYPES)
def test_tables_equal_their_definition_and_the_models(device, places, dtype):
    positions, long = place(places, device)
    frequencies = rotary_frequencies(CONFIG, device)
    expected = rotary_table(CONFIG, positions, long, dtype)
    plain, made = (tuple(unwritten(*e.shape, dtype=dtype, device=device) for e in expected) for _ in range(2))
    plain_tabulate(positions, long, frequencies, CONFIG.rope_scale, *plain)
    tabulate(positions, long, frequencies, CONFIG.rope_scale, *made)
    for defined, by_kernel, by_model in zip(plain, made, expected, strict=True):
        assert torch.equal(defined, by_model)
        # The angles are the same number for number; cosines of two libraries differ by fp32's last steps.
        assert_near(by_kernel, defined, steps=4 if dtype == torch.float32 else 1, scale=1.0)


def rows_of(draw, page_tokens):
    """Rows of a step with pages of their own, out of order."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4))
    counts = [-(-(past + new) // page_tokens) for past, new in lengths]
    numbers = iter(draw(st.permutations(range(1, sum(counts) + 1))))
    return [
        Row(new, past, pages=tuple(next(numbers) for _ in range(count)))
        for (past, new), count in zip(lengths, counts, strict=True)
    ]


@FEW
@given(data=st.data(), dtype=DTYPES, seed=SEEDS, kv_heads=st.integers(1, 3), group=st.integers(1, 3), code=CODES)
def test_turning_and_keeping_equals_its_definition(device, data, dtype, seed, kv_heads, group, code):
    page_tokens, head_dim, rotary_dim = data.draw(st.sampled_from([(16, 32, 24), (4, 24, 20), (1, 8, 8)]))
    rows = rows_of(data.draw, page_tokens)
    packing = pack(rows, device, page_tokens)
    tokens = len(packing.positions)
    wide = normal(tokens, (group + 2) * kv_heads * head_dim, dtype=dtype, device=device, seed=seed)
    half = (normal(tokens, 1, rotary_dim // 2, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))
    table = [part.repeat(1, 1, 2) for part in half]
    pages = 1 + max(max(row.pages) for row in rows)
    shape = (pages, 2, 2, page_tokens, kv_heads, head_dim)
    pools = [unwritten(*shape, dtype=dtype, device=device) for _ in range(2)]
    kept = [coded(pool, code) if code else (pool, None) for pool in pools]
    turned = [strided(wide), strided(wide)]
    token_pages = packing.paging.token_pages.clone()
    if data.draw(st.booleans()):
        token_pages[-rows[-1].tokens :] = -1  # The last row only fills up the batch.
    for run, qkv, (pool, scales) in zip((plain_rotate_and_keep, rotate_and_keep), turned, kept, strict=True):
        places = (token_pages, packing.paging.token_offsets, None if scales is None else scales[:, 1])
        run(qkv, *table, pool[:, 1, 0], pool[:, 1, 1], *places)
    if code:
        assert_coded_alike(kept[1], kept[0], dtype)
        query = group * kv_heads * head_dim
        assert_coded_alike((turned[1][:, query:],), (turned[0][:, query:],), dtype)
        turned, pools = [qkv[:, :query] for qkv in turned], pools[:1] * 2
    # Rounded after every product, as the definition is; a GPU may fuse products of fp32 and fp16 with their sum.
    fused = {torch.float32: 2, torch.float16: 1, torch.bfloat16: 0}
    for expected, made in (turned, pools):
        assert torch.equal(made.isnan(), expected.isnan())
        assert_near(made.nan_to_num(), expected.nan_to_num(), steps=fused[dtype], scale=4.0)


def test_what_is_kept_is_what_paging_writes(device):
    rows = [Row(5, 30, pages=(3, 1, 4)), Row(20, 0, pages=(2, 5))]
    packing = pack(rows, device, 16)
    qkv = normal(25, 4 * 8, dtype=torch.float32, device=device, seed=0)
    before, table = qkv.clone(), rotary_table_of_nothing(25, device)
    expected, pool = (torch.ones(6, 16, 1, 8, device=device) for _ in range(2))
    packing.paging.write(Kept(expected), qkv[:, 24:].unflatten(1, (1, 8)))
    rotate_and_keep(qkv, *table, torch.ones_like(pool), pool, packing.paging.token_pages, packing.paging.token_offsets)
    assert torch.equal(pool, expected)
    assert torch.equal(qkv, before)


def rotary_table_of_nothing(tokens, device):
    return torch.ones(tokens, 1, 4, device=device), torch.zeros(tokens, 1, 4, device=device)
