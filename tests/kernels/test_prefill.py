"""A step of any rows through the kernels equals the decoder's definition, pages included."""

import pytest
import torch

from memphi.cache.pool import make_pool
from memphi.memory.costs import graphed
from memphi.model.attention import EagerAttention
from memphi.model.kept import kept_layer
from memphi.model.phi4mm import Phi4MM
from memphi.model.prefill_steps import PieceStep, PrefillInputs, PrefillStep
from memphi.model.rows import Row
from tests.checkpoints import tiny_config, tiny_model
from tests.kernels.test_decode import FORMS, SETS

PAGES, PAGE_TOKENS = 120, 16
SHAPES = {
    "prompts": ((17, 0), (1, 0), (5, 0)),
    "chunks": ((17, 16), (20, 31), (18, 1)),
    "answers": ((1, 37), (1, 15), (1, 16), (1, 64)),
    "drafts": ((4, 30), (1, 9), (16, 3), (4, 1), (1, 100)),
    "all at once": ((1, 37), (5, 0), (18, 21), (3, 70), (1, 0), (1, 15)),
    "few": ((1, 37), (3, 0), (2, 20)),
}


def make_model(device, form="packed", config=None, attention=None, scheme="bf16"):
    source = tiny_model(config)
    model = Phi4MM(source.config, attention)
    model.load_state_dict(source.state_dict())
    model.quantise(scheme)
    model.keep_adapters(*FORMS[form])
    return model.to(device).eval()


def filled_pool(model, cache_format="plain"):
    """Pages that hold a past, and garbage where there is none."""
    pool = make_pool(model.config.language, PAGES, model.dtype, model.device, PAGE_TOKENS, cache_format)
    pool.ensure(range(PAGES))
    generator = torch.Generator().manual_seed(5)
    places = torch.arange(PAGES * PAGE_TOKENS, device=model.device)
    for kept in layers_of(model, pool):
        new = torch.randn(kept.numbers.shape, generator=generator).flatten(0, 1).to(model.device, model.dtype)
        kept.write(places // PAGE_TOKENS, places % PAGE_TOKENS, new)
    return pool


def layers_of(model, pool):
    """Keys and values of every layer."""
    layers = (kept_layer(*pool.layer(i), pool.scales(i)) for i in range(model.config.language.layers))
    return [kept for layer in layers for kept in layer]


def make_rows(shape, adapters=(None,)):
    """Rows of (new tokens, past) on pages in no order, with more pages than they need."""
    numbers = (1 + torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(len(shape)))).tolist()
    return [
        Row(
            new,
            past,
            adapters[i % len(adapters)],
            past >= 64,
            tuple(numbers.pop() for _ in range((past + new - 1) // PAGE_TOKENS + 1 + i % 2)),
        )
        for i, (new, past) in enumerate(shape)
    ]


@torch.inference_mode()
def run(model, rows, kernels, cache_format="plain"):
    """Logits at every place, and the pages."""
    model.use_kernels(kernels)
    pool, tokens = filled_pool(model, cache_format), sum(row.tokens for row in rows)
    ids = torch.arange(tokens, device=model.device) * 7 % model.config.language.vocab_size
    logits = model(ids, rows, cache=pool, logits_at=range(tokens))
    pages = torch.arange(PAGES, device=model.device)
    return logits.float(), torch.stack([kept.read(pages, torch.float32) for kept in layers_of(model, pool)])


def assert_equal_steps(model, rows, tolerance=1e-5):
    both = (run(model, rows, kernels) for kernels in (True, False))
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert expected.abs().max() > 0.01


@pytest.mark.parametrize("shape", list(SHAPES)[:-1])
def test_rows_of_every_kind_equal_the_definition(device, shape):
    assert_equal_steps(make_model(device), make_rows(SHAPES[shape], SETS["both and none"]))


@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
def test_pages_in_8_bits(device, cache_format):
    """A number that lies between two codes may fall to either: of a thousand hardly one."""
    model, rows = make_model(device), make_rows(SHAPES["all at once"], SETS["both and none"])
    (logits, pages), (expected_logits, expected_pages) = (run(model, rows, on, cache_format) for on in (True, False))
    assert (pages - expected_pages).abs().gt(1e-5).float().mean() < 1e-3
    assert (logits - expected_logits).norm() < 1e-2 * expected_logits.norm()


@pytest.mark.parametrize("name", SETS)
def test_adapters_of_every_set(device, name):
    assert_equal_steps(make_model(device), make_rows(SHAPES["few"], SETS[name]))


@pytest.mark.parametrize(("form", "adapter"), [("plain", None), ("plain", "speech"), ("merged", "vision")])
def test_models_without_packed_adapters(device, form, adapter):
    assert_equal_steps(make_model(device, form), make_rows(SHAPES["few"], (adapter,)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.usefixtures("few_programs")
def test_weights_in_few_bits(device, scheme):
    assert_equal_steps(make_model(device, scheme=scheme), make_rows(SHAPES["few"], SETS["both and none"]))


@pytest.mark.parametrize("adapter", [None, "speech"])
@pytest.mark.usefixtures("few_programs")
def test_weights_in_few_bits_beside_adapters_that_are_not_packed(device, adapter):
    """These see x itself, and not what of it is there in bytes."""
    assert_equal_steps(make_model(device, "plain", scheme="fp8"), make_rows(SHAPES["few"], (adapter,)))


def test_beside_eager_attention(device):
    assert_equal_steps(make_model(device, attention=EagerAttention()), make_rows(SHAPES["all at once"]))


@pytest.mark.parametrize("shape", [{"heads": 4, "kv_heads": 4, "hidden_size": 32}, {"kv_heads": 1, "layers": 3}])
def test_other_shapes(device, shape):
    model = make_model(device, config=tiny_config(**shape))
    assert_equal_steps(model, make_rows(SHAPES["few"], SETS["both and none"]))


def test_sixteen_bits(device):
    """As far from fp32 as the definition is: sums in another order are rounded otherwise."""
    rows, exact = make_rows(SHAPES["all at once"], SETS["both and none"]), make_model(device)
    model = make_model(device).to(torch.bfloat16)
    runs = run(model, rows, True), run(model, rows, False), run(exact, rows, False)
    for found, defined, expected in zip(*runs, strict=True):
        error, usual = ((part - expected).norm() / expected.norm() for part in (found, defined))
        assert 0 < error <= 1.5 * usual + 1e-3


def test_gradients_have_the_definition_alone(device):
    model, rows = make_model(device, "plain"), make_rows(SHAPES["prompts"])
    model.use_kernels(True)
    ids = torch.arange(sum(row.tokens for row in rows), device=device)
    assert model(ids, rows, cache=filled_pool(model)).requires_grad


# --- over tensors that stay where they are ---------------------------------------------------------------------------

TOKENS = 64


@pytest.fixture(params=[PrefillStep, PieceStep])
def step_type(request, monkeypatch):
    """Steps in one, or in pieces as of more tokens than these."""
    if request.param is PieceStep:
        monkeypatch.setattr(graphed, "MOST_PREFILL_TOKENS", TOKENS - 1)
    return request.param


@torch.inference_mode()
def run_held(step_type, model, rows, adapters=(), by_all=False):
    """As `run`, by a step whose tensors held another, and garbage."""
    model.use_kernels(True)
    pool, inputs = filled_pool(model), PrefillInputs(model.language, 2 * TOKENS, PAGE_TOKENS)
    step = step_type(model.language, pool, inputs, TOKENS, adapters, by_all)
    inputs.x.fill_(float("nan"))
    step.fill(make_rows(((60, 0), (1, 100))), inputs.x[:0])
    tokens = sum(row.tokens for row in rows)
    ids = torch.arange(tokens, device=model.device) * 7 % model.config.language.vocab_size
    step.fill(rows, model.embed(ids, []))
    logits = model.language.logits(step.run()[:tokens])
    pages = torch.arange(PAGES, device=model.device)
    return logits.float(), torch.stack([kept.read(pages, torch.float32) for kept in layers_of(model, pool)])


def assert_equal_held(step_type, model, rows, **options):
    both = run_held(step_type, model, rows, **options), run(model, rows, False)
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)  # Processors sum in other orders.


@pytest.mark.parametrize("shape", ["chunks", "drafts", "all at once", "whole", "longer"])
def test_a_held_step_equals_the_definition(device, step_type, shape):
    shapes = SHAPES | {"whole": ((64, 0),), "longer": ((33, 0), (16, 100), (10, 25))}
    adapters = SETS["both and none"]
    assert_equal_held(step_type, make_model(device), make_rows(shapes[shape], adapters), adapters=("vision", "speech"))


@pytest.mark.parametrize("name", ["vision", "vision and none", "both"])
def test_a_held_step_with_adapters(device, step_type, name):
    used = tuple(sorted({adapter for adapter in SETS[name] if adapter}))
    for by_all in {False, len(SETS[name]) == len(used) == 1}:
        rows = make_rows(SHAPES["few"], SETS[name])
        assert_equal_held(step_type, make_model(device), rows, adapters=used, by_all=by_all)


def test_a_held_step_of_a_merged_model(device, step_type):
    assert_equal_held(step_type, make_model(device, "merged"), make_rows(SHAPES["few"], ("vision",)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.usefixtures("few_programs")
def test_a_held_step_with_weights_in_few_bits(device, step_type, scheme):
    rows = make_rows(SHAPES["few"], SETS["both and none"])
    assert_equal_held(step_type, make_model(device, scheme=scheme), rows, adapters=("vision", "speech"))


def test_a_step_that_is_cleared_writes_nothing(device, step_type):
    model = make_model(device)
    model.use_kernels(True)
    pool, inputs = filled_pool(model), PrefillInputs(model.language, TOKENS, PAGE_TOKENS)
    before = [kept.numbers.clone() for kept in layers_of(model, pool)]
    step = step_type(model.language, pool, inputs, TOKENS)
    step.fill(make_rows(SHAPES["few"]), torch.ones(6, model.config.language.hidden_size, device=device))
    step.clear()
    step.run()
    for kept, expected in zip(layers_of(model, pool), before, strict=True):
        assert torch.equal(kept.numbers, expected)
