"""A decode step through the kernels equals the decoder's definition, pages included, whatever rows share it."""

import copy
from dataclasses import replace

import pytest
import torch

from memphi.cache.pool import make_pool
from memphi.engine.graphs import Graphs
from memphi.memory import costs
from memphi.model.decode import Buffers, Chosen, DecodeStep
from memphi.model.kept import kept_layer
from memphi.model.kernels.choice import BLOCK, plain_choose
from memphi.model.quant.weights import QuantisedWeight
from memphi.model.rows import Row, pack
from tests.checkpoints import tiny_config, tiny_model
from tests.scenes import GREEDY, Stage, lively_model, mixed_requests, tiny_tokenizer

PAGES, MOST_PAGES, PAGE_TOKENS = 100, 12, 16
PASTS = (37, 0, 16, 63, 1, 31, 15, 100)
"""In the middle of a page, at its beginning and at its end; a first token; beyond the short factors' 64 tokens."""
FORMS = {"plain": (False, None), "packed": (True, None), "merged": (False, "vision")}
SETS = {
    "none": (None,),
    "vision": ("vision",),
    "speech": ("speech",),
    "vision and none": ("vision", None),
    "both": ("speech", "vision"),
    "both and none": (None, "vision", "speech"),
}


SCHEMES = ("int8", "int4", "fp8")


def make_model(device, form="packed", config=None, scheme="bf16", dtype=torch.float32):
    model = tiny_model(config).to(dtype)
    model.quantise(scheme)
    model.keep_adapters(*FORMS[form])
    model.use_kernels(True)
    return model.to(device)


def model_in_fp32(model):
    """The same weights, in fp32 all that is computed."""
    wide = copy.deepcopy(model).float()
    for module in wide.modules():
        if getattr(module, "dtype", None) is torch.bfloat16:
            module.dtype = torch.float32
    return wide


def filled_pool(model, device, cache_format="plain"):
    """Pages of which each token holds other numbers, and those of no row too."""
    pool = make_pool(model.config.language, PAGES, model.dtype, device, PAGE_TOKENS, cache_format)
    pool.ensure(range(PAGES))
    generator = torch.Generator().manual_seed(5)
    places = torch.arange(PAGES * PAGE_TOKENS, device=device)
    for number in range(model.config.language.layers):
        for kept in kept_layer(*pool.layer(number), pool.scales(number)):
            new = torch.randn(kept.numbers.shape, generator=generator).to(device, model.dtype)
            kept.write(places // PAGE_TOKENS, places % PAGE_TOKENS, new.flatten(0, 1))
    return pool


def make_rows(count, adapters=(None,)):
    """Rows of all lengths on pages in no order, with more pages than they need."""
    numbers = (1 + torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(count))).tolist()
    rows = []
    for i in range(count):
        past = PASTS[i % len(PASTS)]
        pages = tuple(numbers.pop() for _ in range(past // PAGE_TOKENS + 1 + i % 2))
        rows.append(Row(1, past, adapters[i % len(adapters)], past >= 64, pages))
    return rows


def whole(model, pool):
    """What all pages hold: [layers, 2, pages, page_tokens, kv_heads, head_dim]."""
    pages = torch.arange(PAGES, device=model.device)
    layers = [kept_layer(*pool.layer(i), pool.scales(i)) for i in range(model.config.language.layers)]
    return torch.stack([torch.stack([kept.read(pages, torch.float32) for kept in layer]) for layer in layers])


def defined(model, pool, rows, ids):
    """What the definition says, and the pages after it."""
    model.use_kernels(False)
    packing = pack(rows, model.device, pool.page_tokens)
    embeddings = model.language.embedding(torch.tensor(ids, device=model.device))
    logits = model.language.logits(model.language(embeddings, packing, pool))
    model.use_kernels(True)
    return logits, whole(model, pool)


def used(rows):
    return {row.adapter for row in rows if row.adapter}


def assert_equal_steps(device, model, rows, fillers=0, buffers=None, cache_format="plain"):
    ids = [(7 * i + 3) % model.config.language.vocab_size for i in range(len(rows))]
    expected, expected_pages = defined(model, filled_pool(model, device, cache_format), rows, ids)
    pool = filled_pool(model, device, cache_format)
    buffers = buffers or Buffers(model.language, pool, len(rows) + fillers, MOST_PAGES)
    step = DecodeStep(model.language, pool, buffers, len(rows) + fillers, used(rows))
    step.fill(rows, ids)
    found = step.run()
    assert found.shape == (len(rows) + fillers, model.config.language.vocab_size)
    torch.testing.assert_close(found[: len(rows)], expected, rtol=1e-5, atol=1e-5)
    assert step.chosen[: len(rows)].tolist() == found[: len(rows)].argmax(-1).tolist()
    torch.testing.assert_close(whole(model, pool), expected_pages, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.01
    assert not (expected_pages == whole(model, filled_pool(model, device, cache_format))).all()


@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
@torch.inference_mode()
def test_a_step_over_pages_in_8_bits(device, cache_format):
    assert_equal_steps(device, make_model(device), make_rows(8, SETS["both"]), cache_format=cache_format)


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "none"), (1, "vision"), (1, "speech"), (3, "none"), (3, "both and none"), (8, "both"), (8, "vision and none")],
)
@torch.inference_mode()
def test_it_equals_the_definition(device, count, name):
    assert_equal_steps(device, make_model(device), make_rows(count, SETS[name]))


@pytest.mark.parametrize(("count", "name"), [(1, "none"), (3, "both and none"), (8, "both and none")])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("few_programs")
@torch.inference_mode()
def test_weights_in_few_bits(device, scheme, count, name):
    """The definition computes with the same numbers, a block of weights after another."""
    assert_equal_steps(device, make_model(device, scheme=scheme), make_rows(count, SETS[name]))


@pytest.mark.parametrize("name", ["none", "both and none"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("few_programs")
@torch.inference_mode()
def test_rows_in_bytes(device, scheme, name):
    """In 16 bits, as what comes before a product leaves them; as near to fp32 as the definition in 16 bits."""
    rows, model = make_rows(8, SETS[name]), make_model(device, scheme=scheme, dtype=torch.bfloat16)
    exact, _ = defined(wide := model_in_fp32(model), filled_pool(wide, device), rows, ids := list(range(8)))
    plain, _ = defined(model, pool := filled_pool(model, device), rows, ids)
    step = DecodeStep(model.language, pool, Buffers(model.language, pool, 8, MOST_PAGES), 8, used(rows))
    step.fill(rows, ids)
    errors = [((each.float() - exact).norm() / exact.norm()).item() for each in (step.run(), plain)]
    assert errors[0] < 1.2 * errors[1] < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("few_programs")
@torch.inference_mode()
def test_weights_in_few_bits_without_packed_adapters(device, scheme):
    assert_equal_steps(device, make_model(device, "plain", scheme=scheme), make_rows(2))


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
@torch.inference_mode()
def test_weights_in_few_bits_beyond_the_rows_of_their_kernels(device, monkeypatch, scheme):
    """Beside a product in e4m3 the adapters' share is made by itself, and is a part of what comes of it."""
    monkeypatch.setattr(QuantisedWeight, "most_rows", lambda *_: 2)
    model = make_model(device, config=tiny_config(layers=1), scheme=scheme)
    assert_equal_steps(device, model, make_rows(3, SETS["both and none"]))


@pytest.mark.parametrize("form", ["plain", "merged"])
@torch.inference_mode()
def test_models_without_packed_adapters(device, form):
    assert_equal_steps(device, make_model(device, form), make_rows(3))


@torch.inference_mode()
def test_beyond_the_rows_of_the_skinny_products(device):
    assert_equal_steps(device, make_model(device), make_rows(18, SETS["both and none"]))


@pytest.mark.parametrize("name", ["none", "both and none"])
@torch.inference_mode()
def test_rows_that_fill_up_a_step_change_nothing(device, name):
    model = make_model(device)
    buffers = Buffers(model.language, filled_pool(model, device), 8, MOST_PAGES)
    assert_equal_steps(device, model, make_rows(5, SETS[name]), 3, buffers)  # Leaves its numbers in the buffers.
    assert_equal_steps(device, model, make_rows(3, SETS[name]), 1, buffers)
    assert_equal_steps(device, model, make_rows(1, SETS[name]), 0, buffers)


@torch.inference_mode()
def test_a_step_of_nothing_but_fillers_writes_nothing(device):
    model = make_model(device)
    pool = filled_pool(model, device)
    before = whole(model, pool)
    step = DecodeStep(model.language, pool, Buffers(model.language, pool, 4, MOST_PAGES), 4, ["speech"])
    step.chosen.fill_(7)
    step.fill([], [])
    assert step.run().isfinite().all()
    assert torch.equal(whole(model, pool), before)
    assert step.chosen.tolist() == [7] * 4  # A graph may be captured between a step and the one that goes on from it.


@pytest.mark.parametrize("shape", [{"heads": 4, "kv_heads": 4, "hidden_size": 32}, {"kv_heads": 1, "layers": 3}])
@torch.inference_mode()
def test_other_shapes(device, shape):
    assert_equal_steps(device, make_model(device, config=tiny_config(**shape)), make_rows(3, SETS["both and none"]))


@torch.inference_mode()
def test_an_answer_grows_token_by_token(device):
    """What one step writes the next one reads, across the border of a page."""
    model = make_model(device)
    language, pages = model.language, (7, 3, 9)
    pools = [filled_pool(model, device) for _ in range(2)]
    step = DecodeStep(language, pools[0], Buffers(language, pools[0], 1, MOST_PAGES), 1, ["vision"])
    chosen = [[5], [5]]
    for past in range(14, 18):
        row = Row(1, past, "vision", False, pages)
        step.fill([row], chosen[0][-1:])
        chosen[0].append(int(step.run().argmax()))
        chosen[1].append(int(defined(model, pools[1], [row], chosen[1][-1:])[0].argmax()))
    assert chosen[0] == chosen[1]


@torch.inference_mode()
def test_ids_go_from_step_to_step_without_the_host(device):
    """Rows go, move to other places and come, and each goes on from what was chosen for it; some ids never are."""
    model, size = make_model(device), tiny_config().language.vocab_size
    forbidden = torch.arange(size, device=device) % 3 == 0
    rows, pool = make_rows(3), filled_pool(model, device)
    buffers = Buffers(model.language, pool, 2, MOST_PAGES)
    expected, answers = filled_pool(model, device), {0: [5], 1: [6], 2: [7]}
    before: list[int] = []
    for served in ([0, 1], [1], [2, 1]):
        now = [replace(rows[i], past=rows[i].past + len(answers[i]) - 1) for i in served]
        step = DecodeStep(model.language, pool, buffers, 2, (), forbidden)
        step.fill(now, [Chosen(before.index(i)) if i in before else answers[i][-1] for i in served])
        step.run()
        logits, _ = defined(model, expected, now, [answers[i][-1] for i in served])
        chosen = torch.zeros(len(served), dtype=torch.int64, device=device)
        plain_choose(logits, forbidden, torch.ones(len(served), device=device), chosen)
        for i, number in zip(served, chosen.tolist(), strict=True):
            answers[i] = [*answers[i], number]
        assert step.chosen[: len(served)].tolist() == chosen.tolist()
        before = served
    assert all(number % 3 for numbers in answers.values() for number in numbers[1:])
    torch.testing.assert_close(whole(model, pool), whole(model, expected), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_ids_that_others_chose_stand_behind_a_steps_own(device):
    """There the next step finds them, of answers or of prompts; they go with graphs that are dropped."""
    model = make_model(device)
    graphs = Graphs(model, filled_pool(model, device), 4, MOST_PAGES * PAGE_TOKENS, capture=False)
    rows, more = make_rows(2), make_rows(3)
    assert not graphs.has_chosen
    own = graphs.decode(rows, [5, 6]).chosen.tolist()
    assert (graphs.is_ready(rows), graphs.is_ready(more)) == (True, False)
    assert graphs.note_chosen(torch.tensor([7, 9], device=device), behind=2).tolist() == [*own, 7, 9]
    assert graphs.chosen(torch.tensor([3, 0], device=device)).tolist() == [9, own[0]]
    found = graphs.decode(rows, [Chosen(3), Chosen(2)]).logits.clone()
    assert torch.equal(found, graphs.decode(rows, [9, 7]).logits)
    assert not torch.equal(found, graphs.decode(rows, [7, 9]).logits)
    assert graphs.drop()
    assert (graphs.has_chosen, graphs.is_ready(rows)) == (False, False)


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lively(device):
    model = lively_model()
    model.keep_adapters(packed=True, merge=None)
    return model.to(device)


def test_the_engine_answers_the_same_through_the_kernels(lively, monkeypatch):
    """Prompts in chunks, answers beside them and answers alone, of no adapter and of each."""
    tokenizer, steps = tiny_tokenizer(), []
    sampling = replace(GREEDY, max_tokens=6)
    requests = mixed_requests(sampling)[:3]
    plain = Stage(lively, tokenizer, speculation=False, kernels="plain")
    expected = plain.ids(requests)
    assert plain.loop.runner.graphs is None
    decode = Graphs.decode
    monkeypatch.setattr(Graphs, "decode", lambda self, rows, ids: steps.append(ids) or decode(self, rows, ids))
    fast = Stage(lively, tokenizer, speculation=False, kernels="auto", step_tokens=50)
    assert fast.ids(requests) == expected
    assert max(map(len, steps)) == len(requests)
    assert any(isinstance(number, Chosen) for ids in steps for number in ids)
    fast.check_empty()


def test_what_graphs_take_is_priced(lively):
    assert costs.PIECE_SCORES == BLOCK
    language, pool = lively.config.language, filled_pool(lively, lively.device)
    for rows, tokens in ((1, 8192), (8, 8192), (64, 1000)):
        buffers = Buffers(lively.language, pool, rows, -(-tokens // PAGE_TOKENS))
        storages = [tensor.untyped_storage() for tensor in _tensors(buffers) + _tensors(buffers.inputs)]
        # What is staged on the host for a GPU is none of its memory.
        found = {s.data_ptr(): s.nbytes() for s in storages if s.device == lively.device}
        units = len(buffers.division.units)
        each = sum(
            t.nbytes // len(t) for t in (buffers.division.units, buffers.division.sums, buffers.division.weights)
        )
        most = (rows + costs.GRAPH_PROGRAMS // language.kv_heads) * each
        assert units * each <= most
        priced = costs.graphs(lively.config, rows, tokens, 4, "packed").bytes - costs.GRAPHS_BYTES
        assert 0.95 * priced <= sum(found.values()) + most <= priced + 256


def _tensors(holder):
    return [value for value in vars(holder).values() if isinstance(value, torch.Tensor)]


@pytest.fixture
def staged(lively, monkeypatch):
    """An engine that climbs back soon, and the rows of each of its steps that went to graphs."""
    monkeypatch.setattr("memphi.engine.recovery.QUIET_STEPS", 3)
    engine, decoded = Stage(lively, tiny_tokenizer(), speculation=False, kernels="auto"), []
    decode = engine.loop.runner.graphs.decode
    engine.loop.runner.graphs.decode = lambda rows, ids: decoded.append(len(rows)) or decode(rows, ids)
    return engine, decoded


def answer(engine, max_tokens=4):
    return engine.ids([mixed_requests(replace(GREEDY, max_tokens=max_tokens))[0]])[0]


def test_graphs_are_dropped_and_made_again(lively, staged):
    engine, decoded = staged
    expected = answer(Stage(lively, tiny_tokenizer(), speculation=False))
    graphs = engine.loop.runner.graphs
    assert not graphs.drop()
    assert answer(engine) == expected
    assert graphs.drop()
    assert not graphs.are_held
    assert answer(engine) == expected
    assert decoded == [1] * 6
    engine.loop._elastic.rest()
    assert not graphs.are_held


def test_a_capture_without_memory_costs_no_answer(lively, staged, monkeypatch):
    engine, decoded = staged
    expected = answer(Stage(lively, tiny_tokenizer(), speculation=False), 8)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "_step", fail)
        assert answer(engine, 4) == expected[:4]
    assert engine.loop.stats.rungs["eager instead of graphs"] == 1
    assert not engine.loop.runner.graphs.are_held
    failed = len(decoded)
    assert answer(engine, 8) == expected
    assert len(decoded) > failed  # Climbed back.
    engine.check_empty()
