"""Keys and values in pages change no logit: chunks, decoding, mixed steps, shared and scattered pages, garbage."""

import numpy as np
import pytest
import torch

from memphi.model import rows as rows_module
from memphi.model.attention import EagerAttention, SdpaAttention
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row, pack
from tests.checkpoints import tiny_model
from tests.oracle import (
    TOLERANCE,
    PlainPool,
    all_logits,
    cut_media,
    largest_difference,
    make_prompt,
    make_row,
    mode_prompts,
    parity_config,
)

CPU = torch.device("cpu")
BACKENDS = {"eager": EagerAttention(), "sdpa": SdpaAttention()}


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    """With a border of the rope regimes that some of the prompts below cross."""
    source = tiny_model(parity_config(short_tokens=64))
    chosen = Phi4MM(source.config, BACKENDS[request.param])
    chosen.load_state_dict(source.state_dict())
    return chosen.eval()


@pytest.fixture(scope="module")
def prompts(model):
    """All modes and both regimes."""
    texts = [make_prompt(model.config, text_tokens=tokens, seed=tokens) for tokens in (64, 65, 3)]
    return mode_prompts(model.config) + texts


@pytest.fixture(scope="module")
def whole(model, prompts):
    return [all_logits(model, prompt) for prompt in prompts]


class Run:
    """Prompts computed step by step over a pool."""

    def __init__(self, model, prompts, page_tokens=4):
        self.model, self.prompts = model, prompts
        self.pool = PlainPool(model, page_tokens=page_tokens)
        self.pages = [self.pool.take(len(prompt.ids)) for prompt in prompts]
        self.past = [0] * len(prompts)
        self.logits = [[] for _ in prompts]
        with torch.inference_mode():
            self.media = [model.encode_media(prompt) for prompt in prompts]

    @torch.inference_mode()
    def advance(self, sizes):
        """One step of (prompt, tokens), which ends where the prompt does."""
        ids, rows, media = [], [], []
        for i, tokens in sizes:
            past, prompt = self.past[i], self.prompts[i]
            end = min(past + tokens, len(prompt.ids))
            media += cut_media(self.media[i], past, end, len(ids))
            rows.append(make_row(self.model, prompt, end - past, past, self.pages[i]))
            ids += prompt.ids[past:end]
            self.past[i] = end
        logits = self.model(torch.tensor(ids), rows, media, self.pool, range(len(ids)))
        for (i, _), part in zip(sizes, logits.split([row.tokens for row in rows]), strict=True):
            self.logits[i].append(part)

    def left(self, i):
        return len(self.prompts[i].ids) - self.past[i]

    def check(self, whole):
        for i, expected in enumerate(whole):
            assert self.left(i) == 0
            assert largest_difference(torch.cat(self.logits[i]), expected) <= TOLERANCE


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
@pytest.mark.parametrize("sizes", [(1,), (7,), (16, 1, 3), (1000,)])
@pytest.mark.parametrize("mode", range(4))
def test_chunks_equal_the_whole(model, prompts, whole, mode, sizes, page_tokens):
    run = Run(model, [prompts[mode]], page_tokens)
    while run.left(0):
        run.advance([(0, sizes[len(run.logits[0]) % len(sizes)])])
    run.check([whole[mode]])


@pytest.mark.parametrize("gathered", [1, 100, 300, 32768])
def test_rows_of_different_lengths_decode_in_one_step(model, prompts, whole, monkeypatch, gathered):
    """However many of them are gathered at once."""
    monkeypatch.setattr(rows_module, "GATHER_TOKENS", gathered)
    run = Run(model, prompts)
    run.advance([(i, len(prompt.ids) - 2 - i % 3 * (len(prompt.ids) > 8)) for i, prompt in enumerate(prompts)])
    while waiting := [i for i in range(len(prompts)) if run.left(i)]:
        run.advance([(i, 1) for i in waiting])
    run.check(whole)


@pytest.mark.parametrize("seed", range(8))
def test_starting_continuing_and_decoding_rows_share_steps(model, prompts, whole, seed):
    random = np.random.default_rng(seed)
    run = Run(model, prompts, int(random.choice([2, 4, 5, 16])))
    steps = kinds = 0
    while waiting := [i for i in random.permutation(len(prompts)).tolist() if run.left(i)]:
        steps += 1
        sizes = [(i, int(random.choice([1, 1, 2, 7, 30]))) for i in waiting if i <= steps]
        kinds = max(kinds, len({(run.past[i] > 0, tokens > 1) for i, tokens in sizes}))
        if sizes:
            run.advance(sizes)
    run.check(whole)
    assert kinds > 2


@torch.inference_mode()
def test_rows_share_the_pages_of_their_common_beginning(model):
    first, second = (make_prompt(model.config, text_tokens=tokens, seed=1) for tokens in (21, 30))
    common = first.ids[:12]
    assert second.ids[:12] == common
    pool = PlainPool(model)
    pages = pool.take(21)
    model(torch.tensor(first.ids), [make_row(model, first, pages=pages)], cache=pool)
    rows = [
        make_row(model, first, 1, 20, pages),
        make_row(model, second, 18, 12, pages[:3] + pool.take(18)),
    ]
    logits = model(torch.tensor(first.ids[20:] + second.ids[12:]), rows, cache=pool)
    for prompt, row in zip((first, second), logits, strict=True):
        assert largest_difference(row, all_logits(model, prompt)[-1]) <= TOLERANCE


@pytest.mark.parametrize("garbage", [1e4, torch.nan, torch.inf])
def test_what_other_pages_hold_changes_nothing(model, prompts, garbage):
    runs = [Run(model, prompts) for _ in range(2)]
    for run in runs:
        run.advance([(i, len(prompt.ids) - 2) for i, prompt in enumerate(prompts)])
    runs[1].pool.memory[runs[1].pool.left] = garbage
    for run in runs:
        run.advance([(i, 1) for i in range(len(prompts))])
    for one, other in zip(*(run.logits for run in runs), strict=True):
        assert torch.equal(one[-1], other[-1])


@torch.inference_mode()
def test_a_page_used_before_changes_nothing(model, prompts):
    """Its former tokens lie behind the row's end, where a mask alone would let NaN through."""
    run = Run(model, [prompts[0], prompts[4]])
    run.pool.memory.fill_(torch.nan)
    for _ in range(3):
        run.past, run.logits = [0, 0], [[], []]
        run.advance([(0, 9), (1, 17)])
        run.advance([(0, 1), (1, 1)])
        run.advance([(0, 1), (1, 1)])
        for i, prompt in enumerate(run.prompts):
            got = torch.cat(run.logits[i])
            assert largest_difference(got, all_logits(model, prompt)[: len(got)]) <= TOLERANCE
        run.pages = [tuple(reversed(pages)) for pages in run.pages]


def test_gradients_do_not_flow_into_the_pool(model):
    pool = PlainPool(model)
    logits = model(torch.arange(7), [Row(7, pages=pool.take(7))], cache=pool)
    assert logits.requires_grad
    assert not pool.memory.requires_grad


def test_packing_places_every_token():
    rows = [Row(3, past=2, pages=(5, 1, 9)), Row(1, past=3, pages=(7,)), Row(4, pages=(2,)), Row(1, 4, pages=(7, 3))]
    packing = pack(rows, CPU, page_tokens=4)
    paging = packing.paging
    assert paging.token_pages.tolist() == [5, 5, 1, 7, 2, 2, 2, 2, 3]
    assert paging.token_offsets.tolist() == [2, 3, 0, 3, 0, 1, 2, 3, 0]
    assert paging.begun_pages.tolist() == [1, 3]
    assert [(rows.tokens, rows.lengths) for rows in packing.whole] == [(slice(4, 8), (4,))]
    (continued,) = paging.continued
    assert (continued.tokens, continued.key_lengths) == (slice(0, 3), (5,))
    assert (continued.pages.tolist(), continued.offsets.tolist()) == ([5, 5, 5, 5, 1], [0, 1, 2, 3, 0])
    (pair,) = paging.together
    assert (pair.tokens.tolist(), pair.pages.tolist()) == ([3, 8], [[7, 7], [7, 3]])
    assert pair.seen.tolist() == [[True] * 4 + [False] * 4, [True] * 5 + [False] * 3]
    assert pack(rows, CPU).paging is None
    assert pack(rows[2:3], CPU, page_tokens=4).paging.begun_pages is None


def test_rows_side_by_side_go_together_as_far_as_is_good_for_them(monkeypatch):
    """Whole ones but for those whose length recurs; chunks of others as far as their keys are not too many."""
    monkeypatch.setattr(rows_module, "GATHER_TOKENS", 100)
    lengths = [(5, 0), (5, 0), (4096, 0), (8192, 0), (7, 0), (4095, 0), (6, 30), (2, 60), (9, 1), (3, 0), (2, 200)]
    packing = pack([Row(new, past, pages=tuple(range(600))) for new, past in lengths], CPU, 16)
    assert [rows.lengths for rows in packing.whole] == [(5, 5), (4096,), (8192,), (7, 4095), (3,)]
    assert [rows.key_lengths for rows in packing.paging.continued] == [(36, 62), (10,), (202,)]
    for rows in (*packing.whole, *packing.paging.continued):
        assert rows.bounds.tolist() == [0, *np.cumsum(rows.lengths)]
        assert rows.tokens.stop - rows.tokens.start == sum(rows.lengths)
    for rows in packing.paging.continued:
        assert rows.key_bounds.tolist() == [0, *np.cumsum(rows.key_lengths)]
        assert rows.pages.tolist() == [i // 16 for keys in rows.key_lengths for i in range(keys)]


def test_a_long_row_is_what_recurs_of_it_and_the_rest():
    lengths = [(3, 9), (5300, 0), (4, 0), (4096, 100), (4500, 50), (8, 20)]
    rows = [Row(new, past, "vision" if new > 9 else None, pages=tuple(range(600))) for new, past in lengths]
    packing = pack(rows, CPU, 16)
    assert packing.lengths == [3, 5120, 180, 4, 4096, 4096, 404, 8]
    assert [rows.lengths for rows in packing.whole] == [(5120,), (4,)]
    assert [rows.key_lengths for rows in packing.paging.continued] == [(12,), (5300,), (4196,), (4146,), (4550, 28)]
    assert packing.positions.tolist() == [i for new, past in lengths for i in range(past, past + new)]
    assert packing.adapter_tokens["vision"].tolist() == [*range(3, 5303), *range(5307, 13903)]
    assert pack(rows[1:2], CPU).lengths == [5300]  # Without pages the rest would not see it.


def test_rows_of_few_tokens_go_in_lines_that_end_where_they_do():
    shape = [(1, 5), (17, 4), (9, 7), (3, 0), (2, 1), (1, 9), (16, 2)]
    packing = pack([Row(new, past, pages=tuple(range(20))) for new, past in shape], CPU, 4, in_lines=True)
    single, several = packing.paging.lines
    assert (single.tokens.tolist(), single.kept, single.lengths.tolist()) == ([0, 32], None, [6, 10])
    assert several.lengths.tolist() == [8, 16, 3, 10, 18]
    assert several.tokens.tolist()[:16] == [18] * 8 + list(range(19, 27))
    assert several.tokens[several.kept].tolist() == several.targets.tolist() == [*range(18, 27), 30, 31, *range(33, 49)]
    assert [rows.key_lengths for rows in packing.paging.continued] == [(21,)]
    assert packing.paging.together == ()
    assert [rows.lengths for rows in packing.whole] == [(3,)]


def test_lines_side_by_side_are_a_slice():
    rows = [Row(new, past, pages=tuple(range(20))) for new, past in [(3, 0), (1, 5), (1, 9), (1, 2), (2, 0)]]
    (lines,) = pack(rows, CPU, 4, in_lines=True).paging.lines
    assert (lines.tokens, lines.kept, lines.targets.tolist()) == (slice(3, 6), None, [3, 4, 5])


def test_too_few_pages_are_refused():
    with pytest.raises(AssertionError, match="2 pages cannot hold 9 tokens"):
        pack([Row(1, past=8, pages=(1, 2))], CPU, page_tokens=4)


@pytest.mark.parametrize("gathered", [16, 100, 1000])
def test_each_decoding_row_is_gathered_once_and_not_too_many_at_once(monkeypatch, gathered):
    monkeypatch.setattr(rows_module, "GATHER_TOKENS", gathered)
    lengths = np.random.default_rng(0).integers(1, 200, 30).tolist()
    rows = [Row(1, past, pages=tuple(range(100))) for past in lengths]
    paging = pack(rows, CPU, page_tokens=2).paging
    assert all(group.seen.numel() <= gathered for group in paging.together)
    places = [row.tokens.start for row in paging.continued] + [
        i for group in paging.together for i in group.tokens.tolist()
    ]
    assert sorted(places) == list(range(30))
    for group in paging.together:
        assert group.seen.sum(1).tolist() == [lengths[i] + 1 for i in group.tokens.tolist()]
