"""Keys and values in 8 bits: read again within a code's step, and the same however a row is computed."""

from dataclasses import replace

import pytest
import torch

from memphi.cache.pool import make_pool
from memphi.config import EngineConfig
from memphi.errors import RequestError
from memphi.memory import costs
from memphi.model.kept import dequantise, kept_layer, quantise
from tests.checkpoints import tiny_model
from tests.cpu.test_model_paged import Run
from tests.oracle import make_prompt, parity_config
from tests.scenes import GREEDY, Stage, conversation, mixed_requests

CPU = torch.device("cpu")
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FORMATS = pytest.mark.parametrize("cache_format", CODES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
STEPS = {"int8": 0.5 / 127, "fp8": 1 / 16}
"""The largest error relative to the group's largest number; in fp8 relative to each."""


@FORMATS
@DTYPES
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_number_comes_back_within_a_step(cache_format, dtype, size):
    x = (size * torch.randn(500, 3, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = dequantise(*quantise(x, CODES[cache_format]), dtype)
    assert found.dtype == dtype
    # The scale's own rounding, and that of the result in 16 bits.
    allowed = x.abs().amax(-1, keepdim=True).float() * (STEPS[cache_format] + 2**-8)
    assert ((found.float() - x.float()).abs() <= allowed).all()


@FORMATS
def test_zeros_stay_and_what_is_no_number_stays_none(cache_format):
    x = torch.zeros(3, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    found = dequantise(*quantise(x, CODES[cache_format]), x.dtype)
    assert not found[0].any()
    assert not found[1].isfinite().any()
    assert not found[2].isfinite().all()


@FORMATS
def test_one_rounding_lies_between_code_and_number(cache_format):
    codes, scales = quantise(torch.randn(400, 16), CODES[cache_format])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantise(codes, scales, dtype), (codes.float() * scales.float()[:, None]).to(dtype))


@FORMATS
def test_what_is_written_is_what_is_read(cache_format):
    pool = make_pool(parity_config().language, 3, torch.float32, CPU, 32, cache_format)
    pool.ensure(range(3))
    kept = kept_layer(*pool.layer(1), pool.scales(1))[0]
    kept.clear(torch.tensor([2]))
    new = torch.randn(2, *kept.numbers.shape[2:])
    returned = kept.write(torch.tensor([2, 1]), torch.tensor([5, 31]), new)
    found = kept.read(torch.tensor([1, 2]), torch.float32)
    assert torch.equal(found[1, 5], returned[0])
    assert torch.equal(found[0, 31], returned[1])
    assert not found[1, 6:].any()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def computed(model, prompt, cache_format, sizes):
    """All logits of a prompt that is computed so many tokens at a time."""
    run = Run(model, [prompt])
    run.pool = make_pool(model.config.language, 8, torch.float32, CPU, 32, cache_format)
    run.pool.ensure(range(8))
    run.pages = [(5, 2, 7, 1, 4)]
    while run.left(0):
        run.advance([(0, sizes[len(run.logits[0]) % len(sizes)])])
    return torch.cat(run.logits[0])


@FORMATS
@pytest.mark.parametrize("sizes", [(1,), (7, 1), (33,), (40, 1, 1, 1)])
def test_chunks_equal_the_whole(cache_format, sizes):
    """But for the few numbers that a last bit in the sums before tips over to the next code."""
    model = tiny_model(parity_config(short_tokens=256))
    prompt = make_prompt(model.config, text_tokens=100, seed=1)
    whole = computed(model, prompt, cache_format, (1000,))
    lost = distance(whole, computed(model, prompt, "plain", (1000,)))
    assert 1e-5 < lost < 0.1
    assert distance(computed(model, prompt, cache_format, sizes), whole) < lost / 20


@FORMATS
def test_a_page_has_the_bytes_of_half_as_many_tokens_and_its_scales(cache_format):
    language = parity_config().language
    pool = make_pool(language, 3, torch.bfloat16, CPU, costs.page_tokens(cache_format), cache_format)
    plain = make_pool(language, 3, torch.bfloat16, CPU)
    scales = 2 * costs.PAGE_TOKENS * language.layers * 2 * language.kv_heads * 2
    assert pool.page_bytes == plain.page_bytes + scales
    assert costs.page(parity_config(), 2, pool.page_tokens, cache_format).bytes == pool.page_bytes
    assert pool.layer(0)[0].dtype == CODES[cache_format]
    assert pool.scales(0).shape == (3, 2 * costs.PAGE_TOKENS, language.kv_heads, 2)
    assert plain.scales(0) is None


@FORMATS
def test_answers_do_not_depend_on_chunks_company_or_pauses(model, tokenizer, stage, cache_format):
    requests = mixed_requests(replace(GREEDY, max_tokens=40))
    expected = [Stage(model, tokenizer, cache_format=cache_format).ids([request])[0] for request in requests]
    assert expected != [Stage(model, tokenizer).ids([request])[0] for request in requests]
    for pages, settings in ((128, {}), (128, {"step_tokens": 7}), (10, {})):
        some = stage(pages, cache_format=cache_format, **settings)
        assert some.pool.cache_format == cache_format
        assert some.ids(requests) == expected
        some.check_empty()


@FORMATS
def test_a_known_beginning_is_found_and_changes_nothing(model, tokenizer, stage, cache_format):
    first, second = conversation(1), conversation(2)
    wanted = [Stage(model, tokenizer, cache_format=cache_format).ids([request])[0] for request in (first, second)]
    shared = stage(cache_format=cache_format)
    assert shared.ids([first]) == wanted[:1]
    assert shared.ids([second]) == wanted[1:]
    assert shared.loop.stats.shared_tokens >= shared.plan.page_tokens == 32


def test_a_format_of_what_is_not_kept_is_refused():
    with pytest.raises(RequestError, match="nothing is kept"):
        EngineConfig(kv_cache=False, cache_format="int8")
    with pytest.raises(RequestError, match="must be one of auto, plain, int8, fp8"):
        EngineConfig(cache_format="int4")
