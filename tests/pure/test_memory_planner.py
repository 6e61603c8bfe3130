"""Plans: the accounts add up to the dial, pins hold, and more memory never gives less."""

import re
from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.config import EngineConfig
from memphi.demo.shape import demo_config
from memphi.errors import DoesNotFitError, RequestError
from memphi.memory.choices import USEFUL_TOKENS, enough_tokens
from memphi.memory.costs import FIRST_ANSWER_TOKENS, GIB, MIB, price_request, size_text
from memphi.memory.devices import DeviceFacts
from memphi.memory.plan import MemoryPlan
from memphi.memory.planner import make_plan
from memphi.memory.sizing import STEP_TOKENS
from memphi.request import ClipFootprint, Footprint, ImageFootprint, InputMode

OFFICIAL, DEMO = read_config(official.folder()), demo_config()
ACCOUNTS = ("context_bytes", "weights_bytes", "graphs_bytes", "workspace_bytes", "pool_bytes", "media_bytes")
SMALL, QUICK = (replace(OFFICIAL, scheme=scheme) for scheme in ("int4", "fp8"))
DIALS = {
    OFFICIAL: (12 * GIB, 200 * GIB),
    SMALL: (7 * GIB, 200 * GIB),
    QUICK: (8 * GIB, 200 * GIB),
    DEMO: (GIB, 8 * GIB),
}

kinds = st.sampled_from(["cuda", "cpu"])
configs = st.sampled_from([OFFICIAL, SMALL, QUICK, DEMO])
shares = st.floats(0, 1)


def endless(kind="cuda"):
    return DeviceFacts(kind, "a device", 1 << 50, 1 << 50, (9, 0) if kind == "cuda" else None)


def dial(config, share):
    low, high = DIALS[config]
    return int(low + (high - low) * share**3)  # most of them small, where it is tight


def planned(config, n_bytes, kind="cuda", dtype_bytes=2, **pins):
    """Under the config's own scheme, all weights on the device; what auto chooses is tested by itself."""
    settings = EngineConfig(memory_bytes=n_bytes, **{"scheme": config.scheme, "placement": "resident", **pins})
    return make_plan(config, endless(kind), settings, dtype_bytes)


def held(plan):
    return sum(getattr(plan, account) for account in ACCOUNTS)


@given(configs, kinds, shares)
def test_the_accounts_add_up_and_stay_within_the_dial(config, kind, share):
    n_bytes = dial(config, share)
    plan = planned(config, n_bytes, kind)
    assert held(plan) == plan.budget_bytes <= n_bytes
    has_graphs = kind == "cuda"
    assert all(getattr(plan, name) > 0 for name in ACCOUNTS if name != "graphs_bytes" or has_graphs)
    assert plan.pool_bytes == plan.pages * plan.page_bytes
    if config is not DEMO and n_bytes < 100 * GIB:
        assert plan.budget_bytes == n_bytes


@given(configs, shares, shares)
def test_graphs_have_an_account_of_their_own(config, one, other):
    smaller, larger = sorted((dial(config, one), dial(config, other)))
    first, second = (planned(config, n_bytes) for n_bytes in (smaller, larger))
    plain = planned(config, smaller, kernels="plain")
    assert held(first) == first.budget_bytes <= smaller
    assert first.graphs_bytes > 0 == plain.graphs_bytes
    for plan in (first, second):
        assert plan.graph_rows >= plan.rows
    if first.cache_format == second.cache_format:  # Exact keys and values have room for fewer rows.
        assert second.graphs_bytes >= first.graphs_bytes
        assert second.graph_rows >= first.graph_rows
        assert second.graph_tokens >= first.graph_tokens
    assert first.pages <= second.pages
    assert first.pages <= plain.pages
    assert sum(cost.bytes for cost in first.costs if cost.name.startswith("graphs")) == first.graphs_bytes
    assert first.graph_tokens <= first.step_tokens
    for elsewhere in (planned(config, smaller, "cpu"), planned(config, smaller, kv_cache=False)):
        assert not elsewhere.graphs_bytes


@given(configs, kinds, shares)
def test_every_kind_of_step_fits_into_the_work_space(config, kind, share):
    plan = planned(config, dial(config, share), kind)
    costs = {cost.name: cost.bytes for cost in plan.costs}
    steps = ("cropping", "vision pass", "audio pass", "prefill chunk", "decode step", "kernel step", "logits")
    assert costs["largest step"] == max(costs[name] for name in steps if name in costs)
    assert costs["largest step"] + costs["allocator"] <= plan.workspace_bytes
    assert sum(bytes for name, bytes in costs.items() if name.startswith("weights")) == plan.weights_bytes


@given(configs, kinds, shares)
def test_media_embeddings_never_run_short_of_the_pages(config, kind, share):
    plan = planned(config, dial(config, share), kind)
    assert plan.media_bytes >= plan.pages * plan.page_tokens * config.language.hidden_size * 2


@given(configs, kinds, st.sampled_from(["plain", "int8", "fp8"]), shares, shares)
def test_a_larger_dial_never_gives_a_smaller_pool(config, kind, cache_format, one, other):
    smaller, larger = sorted((dial(config, one), dial(config, other)))
    first, second = (planned(config, size, kind, cache_format=cache_format) for size in (smaller, larger))
    assert first.pages <= second.pages
    assert first.context_tokens <= second.context_tokens


@given(configs, kinds, shares, shares)
def test_8_bits_are_taken_where_there_is_little_room_otherwise(config, kind, one, other):
    """A larger dial may have fewer tokens where it has enough of exact ones."""
    smaller, larger = sorted((dial(config, one), dial(config, other)))
    first, second = planned(config, smaller, kind), planned(config, larger, kind)
    assert (first.cache_format, second.cache_format) in [("int8", "int8"), ("int8", "plain"), ("plain", "plain")]
    assert min(first.context_tokens, enough_tokens(config)) <= second.context_tokens
    pinned = planned(config, smaller, kind, cache_format="int8")
    if first.cache_format == "int8":
        assert replace(pinned, reasons={}) == replace(first, reasons={})
        assert f"fewer than {enough_tokens(config)} tokens" in first.reasons["cache_format"]
    else:
        assert first.context_tokens >= enough_tokens(config)
        assert first.context_tokens <= pinned.context_tokens


def test_keys_and_values_give_way_before_weights():
    plan = planned(OFFICIAL, 13 * GIB, scheme="auto")
    assert (plan.scheme, plan.cache_format) == ("bf16", "int8")
    plain = planned(OFFICIAL, 13 * GIB, cache_format="plain")
    assert plain.context_tokens < USEFUL_TOKENS <= plan.context_tokens


@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
def test_8_bits_hold_almost_twice_as_many_tokens(cache_format):
    """Embeddings of media, of which there is room for as many, are not halved."""
    plain, small = (planned(OFFICIAL, 16 * GIB, cache_format=kept) for kept in ("plain", cache_format))
    assert (small.cache_format, small.page_tokens) == (cache_format, 2 * plain.page_tokens)
    assert 1.8 * plain.context_tokens < small.context_tokens < 2 * plain.context_tokens
    assert small.reasons["cache_format"] == "as pinned"


@given(configs, kinds, shares)
def test_numbers_are_sensible(config, kind, share):
    plan = planned(config, dial(config, share), kind)
    assert plan.step_tokens in STEP_TOKENS
    assert 1 <= plan.shared_step_tokens <= plan.step_tokens
    assert 1 <= plan.crops_per_pass <= config.vision.max_crops + 1
    assert 1 <= plan.windows_per_pass <= 8
    assert plan.rows * 1024 <= plan.pages * plan.page_tokens
    assert plan.context_tokens == min(plan.pages * plan.page_tokens, config.language.max_tokens)


@given(
    configs,
    kinds,
    shares,
    st.none() | st.integers(1, 300),
    st.none() | st.integers(1, 10_000),
    st.none() | st.integers(1, 37),
    st.none() | st.integers(1, 12),
)
@example(OFFICIAL, "cuda", 0.0, 1, 1, 1, 1)
def test_pins_hold_or_the_plan_is_refused(config, kind, share, rows, step_tokens, crops, windows):
    pins = {"rows": rows, "step_tokens": step_tokens, "crops_per_pass": crops, "windows_per_pass": windows}
    n_bytes = dial(config, share)
    try:
        plan = planned(config, n_bytes, kind, **pins)
    except DoesNotFitError:
        with pytest.raises(DoesNotFitError, match="smaller sizes than"):
            planned(config, n_bytes, kind, **pins)
        return
    assert held(plan) == plan.budget_bytes <= n_bytes
    for name, pin in pins.items():
        if pin is not None:
            assert getattr(plan, name) == pin
            assert plan.reasons[name].startswith("as pinned")


@given(configs, kinds, st.booleans(), st.sampled_from([2, 4]))
def test_the_dial_that_a_refusal_names_works(config, kind, kv_cache, dtype_bytes):
    with pytest.raises(DoesNotFitError) as error:
        planned(config, 100 * MIB, kind, dtype_bytes, kv_cache=kv_cache)
    number = str(error.value).partition("--memory ")[2].split()[0]
    scale = {"GiB": GIB, "MiB": MIB}[number[-3:]]
    enough = int(float(number[:-3]) * scale)
    plan = planned(config, enough, kind, dtype_bytes, kv_cache=kv_cache)
    assert plan.context_tokens >= 1024
    with pytest.raises(DoesNotFitError):
        planned(config, enough - (scale // 10 + 1 if scale == GIB else scale), kind, dtype_bytes, kv_cache=kv_cache)


@given(configs, kinds, shares, shares)
@settings(max_examples=50)
def test_without_a_cache_there_are_no_pages_and_whole_sequences(config, kind, one, other):
    smaller, larger = sorted((dial(config, one), dial(config, other)))
    plan, more = (planned(config, n_bytes, kind, kv_cache=False) for n_bytes in (smaller, larger))
    assert (plan.pages, plan.pool_bytes, plan.rows) == (0, 0, 1)
    assert plan.step_tokens == plan.context_tokens <= more.context_tokens
    assert held(plan) == plan.budget_bytes <= smaller


@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(kv_cache=False), EngineConfig(rows=3)])
def test_every_number_has_its_reason(engine):
    plan = make_plan(OFFICIAL, DeviceFacts("cuda", "x", 24 * GIB, 24 * GIB), engine)
    assert plan.reasons.keys() == {field.name for field in fields(MemoryPlan)} - {"reasons", "costs", "groups"}
    assert all(plan.reasons.values())


def test_eight_gib_cannot_hold_the_model_in_16_bits():
    with pytest.raises(
        DoesNotFitError,
        match=r"needs at least 11\.\d GiB .*may take 8\.0 GiB.*--memory 11.*, or --scheme int8.*--device cpu",
    ):
        planned(OFFICIAL, 8 * GIB)
    with pytest.raises(DoesNotFitError, match=r"needs at least 4\.9 GiB .*may take 4\.0 GiB"):
        planned(OFFICIAL, 4 * GIB, scheme="auto")


# --- schemes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "scheme", "reason"),
    [
        (24, "bf16", "bf16 leaves room for 10240 tokens of context"),
        (12, "int8", r"bf16 leaves only \d+ tokens of context; int8 leaves room for 10240 tokens of context"),
        (10, "int8", "bf16 does not fit; int8 leaves room for 10240 tokens of context"),
        (7, "int4", r"bf16 does not fit; int8 leaves only \d+ tokens of context; int4 leaves room for 10240 tokens.*"),
        (5, "int4", r"bf16 does not fit; int8 does not fit; int4 leaves \d+ tokens of context"),
    ],
)
def test_auto_is_as_exact_as_leaves_useful_room(gib, scheme, reason):
    plan = planned(OFFICIAL, int(gib * GIB), scheme="auto")
    assert plan.scheme == scheme
    assert re.fullmatch(reason, plan.reasons["scheme"]), plan.reasons["scheme"]


@given(kinds, shares)
def test_auto_plans_what_it_chose(kind, share):
    n_bytes = int(7 * GIB + 40 * GIB * share)
    chosen = planned(OFFICIAL, n_bytes, kind, scheme="auto")
    asked = planned(OFFICIAL, n_bytes, kind, scheme=chosen.scheme)
    assert asked.reasons.pop("scheme") == "as asked for"
    chosen.reasons.pop("scheme")
    assert asked == chosen


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "fp8"])
def test_a_scheme_that_is_asked_for_is_taken(scheme):
    plan = planned(OFFICIAL, 40 * GIB, scheme=scheme)
    assert (plan.scheme, plan.reasons["scheme"]) == (scheme, "as asked for")


def test_fewer_bits_leave_more_room():
    bits16, fp8, int8, int4 = (planned(OFFICIAL, 16 * GIB, scheme=name) for name in ("bf16", "fp8", "int8", "int4"))
    assert bits16.weights_bytes > fp8.weights_bytes > int8.weights_bytes > int4.weights_bytes
    assert bits16.pages < fp8.pages <= int8.pages < int4.pages


def test_graphs_take_prompts_of_more_tokens_in_fp8():
    """In pieces, of which a small dial has none."""
    small, large = (planned(QUICK, gib * GIB).graph_tokens for gib in (10, 120))
    assert small < 2048 < 8192 == large
    assert planned(OFFICIAL, 120 * GIB).graph_tokens == 2048


def test_a_quantised_folder_stays_as_it_is():
    plan = planned(SMALL, 40 * GIB, scheme="auto")
    assert (plan.scheme, plan.reasons["scheme"]) == ("int4", "as the weights are stored")
    with pytest.raises(RequestError, match="these weights are in int4 and cannot be made int8; leave --scheme out"):
        planned(SMALL, 40 * GIB, scheme="int8")
    with pytest.raises(RequestError, match="these weights are in int4, into which no adapter can be merged; leave"):
        planned(SMALL, 40 * GIB, merge="vision")


def test_a_dial_beyond_what_is_free_is_refused():
    card = DeviceFacts("cuda", "x", 24 * GIB, 20 * GIB)
    with pytest.raises(
        DoesNotFitError, match=r"--memory 22.0 GiB is more than x has: 20.0 GiB of its 24.0 GiB are free"
    ):
        make_plan(OFFICIAL, card, EngineConfig(memory_bytes=22 * GIB))


def test_by_default_a_card_is_taken_but_for_a_reserve():
    plan = make_plan(OFFICIAL, DeviceFacts("cuda", "x", 24 * GIB, 23 * GIB), EngineConfig())
    assert plan.budget_bytes == 23 * GIB - 24 * GIB // 20
    plan = make_plan(DEMO, DeviceFacts("cuda", "x", 4 * GIB, 4 * GIB), EngineConfig())
    assert plan.budget_bytes <= 4 * GIB - 512 * MIB


def test_by_default_a_cpu_gets_a_modest_pool():
    host = DeviceFacts("cpu", "x", 64 * GIB, 60 * GIB)
    for config in (OFFICIAL, DEMO):
        plan = make_plan(config, host, EngineConfig())
        assert plan.context_tokens == 32768
        assert held(plan) == plan.budget_bytes < 18 * GIB
    tight = make_plan(OFFICIAL, replace(host, free_bytes=15 * GIB), EngineConfig(scheme="bf16"))
    assert tight.budget_bytes <= 12 * GIB
    assert 1024 <= tight.context_tokens < 32768


def test_a_request_is_priced_part_by_part():
    picture, clip = ImageFootprint(1024, 768, 2, 3, 1681), ClipFootprint(100.0, 9998, 1250)
    footprint = Footprint(InputMode.VISION_SPEECH, 20, (picture, picture), (clip,))
    price = price_request(footprint, OFFICIAL, 100, crops_per_pass=8, windows_per_pass=2)
    assert price.tokens == 20 + 2 * 1681 + 1250 + 100
    assert price.pages == -(-price.tokens // 16)
    assert (price.crops, price.vision_passes, price.windows, price.audio_passes) == (14, 2, 3, 2)
    assert price.costs[0].bytes == price.pages * 2 * MIB
    assert price.costs[1].bytes == price.media_tokens * 3072 * 2
    assert price.device_bytes == price.costs[0].bytes + price.costs[1].bytes
    assert price.host_bytes >= 14 * 3 * 448**2 * 4 + 9998 * 80 * 4
    decoded = price_request(footprint, OFFICIAL, preprocessing="device")
    assert 4 * 1024 * 768 * 3 + 9998 * 160 * 4 <= decoded.host_bytes < price.host_bytes / 2


def test_crops_are_made_on_a_gpu_and_priced_there():
    names = {kind: [cost.name for cost in planned(OFFICIAL, 20 * GIB, kind).costs] for kind in ("cuda", "cpu")}
    assert "cropping" in names["cuda"]
    assert "cropping" not in names["cpu"]
    for kind, usual, other in (("cuda", "device", "host"), ("cpu", "host", "device")):
        assert planned(OFFICIAL, 20 * GIB, kind).preprocessing == usual
        assert planned(OFFICIAL, 20 * GIB, kind, preprocessing=other).preprocessing == other
    with pytest.raises(RequestError, match="auto, host, device"):
        EngineConfig(preprocessing="gpu")


def test_a_text_is_priced_without_media_and_within_the_context():
    footprint = Footprint(InputMode.TEXT, 131_000, (), ())
    price = price_request(footprint, OFFICIAL)
    assert price.tokens == min(131_000 + FIRST_ANSWER_TOKENS, 131_072)
    assert [cost.bytes for cost in price.costs[1:]] == [0, 0]
    assert (price.vision_passes, price.audio_passes) == (0, 0)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (20480, "20 KiB"), (3 * MIB // 2, "1.5 MiB"), (480 * MIB, "480 MiB")],
)
def test_sizes_are_told_in_their_unit(n_bytes, text):
    assert size_text(n_bytes) == text
    assert size_text(11 * GIB) == "11.0 GiB"
