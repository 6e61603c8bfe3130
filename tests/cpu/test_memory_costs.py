"""The prices against the real modules: the bytes of their weights, and of the tensors that a pass has alive at once.

The modules run on the meta device, so at the official sizes; what attention kernels allocate by themselves is not seen.
"""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memphi import official
from memphi.cache.pool import CODE_DTYPES, SCALE_DTYPE
from memphi.checkpoint.layout import read_config
from memphi.demo.shape import demo_config
from memphi.memory import costs
from memphi.model import adapters, audio, rows
from memphi.model.attention import SdpaAttention
from memphi.model.audio import cut_window
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.request import SamplingParams
from memphi.sampling.sampler import Draw, sample

OFFICIAL, DEMO = read_config(official.folder()), demo_config()
CONFIGS = pytest.mark.parametrize("config", [OFFICIAL, DEMO], ids=["official", "demo"])
FORMS = pytest.mark.parametrize("form", ["plain", "packed", "merged"])
KEPT = pytest.mark.parametrize("cache_format", ["plain", "int8", "fp8"])
PAGE_TOKENS = costs.PAGE_TOKENS
GROUPS = {
    "language": lambda name: name.startswith("language.") and "embedding" not in name and "adapters" not in name,
    "embedding": lambda name: name == "language.embedding.weight",
    "vision adapter": lambda name: ".adapters.vision." in name,
    "speech adapter": lambda name: ".adapters.speech." in name,
    "vision tower": lambda name: name.startswith("vision."),
    "audio encoder": lambda name: name.startswith("audio."),
    "projectors": lambda name: "projector" in name,
}


class Peak(TorchDispatchMode):
    """Bytes of the storages alive at once, of those that came into being inside."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive = {}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result

    def _add(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)


class CudaLikeAttention(SdpaAttention):
    """Allocates what the CUDA path does around its kernels."""

    def causal(self, query, key, value):
        return torch.empty_like(query)

    def packed(self, query, key, value, packing):
        group = query.shape[1] // key.shape[1]
        _repeated = [part.repeat_interleave(group, dim=1) for part in (key, value)]
        return torch.empty_like(query)


class MetaPool:
    def __init__(self, config, pages, cache_format="plain"):
        language, dtype = config.language, CODE_DTYPES.get(cache_format, torch.bfloat16)
        self.page_tokens = costs.page_tokens(cache_format)
        shape = (pages, language.layers, 2, self.page_tokens, language.kv_heads, language.head_dim)
        self.tensor = torch.empty(shape, dtype=dtype, device="meta")
        self.tensors = [self.tensor]
        if cache_format != "plain":
            self.tensors.append(torch.empty((*shape[:2], *shape[3:5], 2), dtype=SCALE_DTYPE, device="meta"))

    def scales(self, index, /):
        return self.tensors[1][:, index] if self.tensors[1:] else None

    def layer(self, index, /):
        return self.tensor[:, index, 0], self.tensor[:, index, 1]


@pytest.fixture
def meta(monkeypatch):
    """Build a model on the meta device; kernels give empty results, masks are never all true."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(Tensor, "__bool__", lambda _: False)

    def build(config, form="plain"):
        with torch.device("meta"):
            model = Phi4MM(config, CudaLikeAttention()).to(torch.bfloat16)
        model.keep_adapters(form == "packed", "vision" if form == "merged" else None)
        return model

    return build


def peak_of(model, run, *known):
    with torch.inference_mode(), Peak([*model.state_dict().values(), *known]) as peak:
        run()
    return peak.bytes


def close(cost, real, slack=0.12):
    """Never below the truth, and not far above it."""
    assert real <= cost.bytes <= real * (1 + slack) + 2 * costs.MIB, f"{cost.name}: {cost.bytes / real - 1:+.1%}"


def step(model, config, planned, cache_format="plain"):
    n = sum(row.tokens for row in planned)
    pool = MetaPool(config, max(page for row in planned for page in row.pages) + 1, cache_format)
    ids = torch.zeros(n, dtype=torch.int64, device="meta")

    def run():
        model.language(model.embed(ids, ()), rows.pack(planned, ids.device, pool.page_tokens), pool)

    return peak_of(model, run, *pool.tensors)


def test_the_prices_go_by_the_sizes_that_the_model_uses():
    assert costs.GATHER_TOKENS == rows.GATHER_TOKENS
    assert costs.CONVOLVED_VALUES == audio.CONVOLVED_VALUES
    assert costs.MERGED_NUMBERS == adapters.MERGED_NUMBERS


@CONFIGS
@FORMS
def test_weights_are_counted_to_the_byte(config, form, meta):
    state = meta(config, form).state_dict()
    for cost, (group, belongs) in zip(costs.weights(config, 2, form), GROUPS.items(), strict=True):
        assert cost.name == f"weights: {group}"
        assert cost.bytes == sum(2 * tensor.numel() for name, tensor in state.items() if belongs(name))
    assert sum(cost.bytes for cost in costs.weights(config, 2, form)) == sum(2 * t.numel() for t in state.values())


@CONFIGS
def test_packed_weights_take_the_same_bytes_in_other_tensors(config, meta):
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in meta(config, "packed").state_dict().values()}
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in storages.values())
    groups = costs.weight_tensors(config) | costs.packed_tensors(config)
    assert sizes == sorted(2 * size for tensors in groups.values() for size, count in tensors for _ in range(count))
    assert sum(sizes) == sum(cost.bytes for cost in costs.weights(config, 2))


def test_the_official_weights_are_as_large_as_its_files_say():
    assert sum(cost.bytes for cost in costs.weights(OFFICIAL, 2)) == pytest.approx(11.1e9, rel=0.005)


@CONFIGS
@KEPT
def test_a_page_is_as_large_as_in_the_pool(config, cache_format):
    pool = MetaPool(config, 3, cache_format)
    page = costs.page(config, 2, pool.page_tokens, cache_format)
    assert page.bytes * 3 == sum(tensor.nbytes for tensor in pool.tensors)


@KEPT
def test_an_official_page_is_what_cuda_maps_at_once(cache_format):
    """Its numbers are; the scales of 64 pages lie together."""
    tokens = costs.page_tokens(cache_format)
    scales = costs.scale_bytes(OFFICIAL.language, tokens, cache_format)
    assert costs.page(OFFICIAL, 2, tokens, cache_format).bytes - scales == 2 * costs.MIB
    assert scales in (0, 2 * costs.MIB // 64)


@CONFIGS
@pytest.mark.parametrize("tokens", [128, 2048])
@pytest.mark.parametrize(
    ("form", "adapters"),
    [
        ("plain", ("vision", "vision")),
        ("plain", ("vision", None)),
        ("packed", ("vision", "vision")),
        ("packed", ("vision", "speech")),
        ("packed", (None, "vision")),
        ("merged", (None, None)),
    ],
)
def test_a_chunk_of_rows_with_and_without_an_adapter(config, tokens, form, adapters, meta):
    first = tuple(range(tokens // PAGE_TOKENS - 1))
    planned = [
        Row(tokens - PAGE_TOKENS, adapter=adapters[0], pages=first),
        Row(PAGE_TOKENS, 0, adapters[1], pages=(len(first),)),
    ]
    close(costs.prefill_chunk(config, tokens, tokens, 2, form=form), step(meta(config, form), config, planned))


@CONFIGS
@pytest.mark.parametrize("heads", [{}, {"heads": 8, "kv_heads": 8}], ids=["shared keys", "keys of their own"])
@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
def test_a_chunk_kept_in_8_bits(config, heads, cache_format, meta):
    config = replace(config, language=replace(config.language, **heads))
    planned = [Row(2048, pages=tuple(range(2048 // costs.page_tokens(cache_format))))]
    cost = costs.prefill_chunk(config, 2048, 2048, 2, form="merged", cache_format=cache_format)
    close(cost, step(meta(config, "merged"), config, planned, cache_format))


@CONFIGS
@KEPT
@pytest.mark.parametrize("count", [1, 2])
def test_a_chunk_over_a_long_past(config, count, cache_format, meta):
    row = Row(64, past=65536, adapter="vision", pages=tuple(range(65600 // PAGE_TOKENS)))
    cost = costs.prefill_chunk(config, count * 64, 65600, 2, rows=count, cache_format=cache_format)
    close(cost, step(meta(config), config, [row] * count, cache_format))


@CONFIGS
@KEPT
@pytest.mark.parametrize(("count", "past"), [(64, 2000), (3, 50_000), (1, 100_000)])
def test_a_decode_step(config, count, past, cache_format, meta):
    each = past // PAGE_TOKENS + 1
    planned = [Row(1, past=past, pages=tuple(range(i * each, (i + 1) * each))) for i in range(count)]
    cost = costs.decode_step(config, count, past + 1, 2, cache_format=cache_format)
    close(cost, step(meta(config), config, planned, cache_format))


@CONFIGS
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_merging(config, stored, meta):
    """The largest adapter into each linear of a layer, in turn, from what is read piece by piece."""
    layer, rank = meta(config, "merged").language.layers[0], config.speech_adapter.rank

    def read(*shape):
        return torch.empty(shape, dtype=stored, device="meta")

    peaks = []
    for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
        n_in = linear.weight.shape[1]
        with Peak([linear.weight]) as peak, torch.inference_mode():
            adapters.merge_adapter(
                linear.weight, read(rank, n_in), 2.0, lambda i, j, n_in=n_in: (read(j - i, n_in), read(j - i, rank))
            )
        peaks.append(peak.bytes)
    cost = costs.merging(config, 2)
    assert max(peaks) <= cost.bytes
    if stored is torch.bfloat16:
        close(cost, max(peaks))


@CONFIGS
@pytest.mark.parametrize("crops", [1, 8])
def test_a_vision_pass(config, crops, meta):
    model, side = meta(config), config.vision.patches
    pixels = torch.empty(crops, 3, config.vision.crop_size, config.vision.crop_size)
    mask = torch.ones(crops, side, side, dtype=torch.bool)
    close(costs.vision_pass(config, crops, 2), peak_of(model, lambda: model.encode_crops(pixels, mask), pixels, mask))


@CONFIGS
@pytest.mark.parametrize("windows", [1, 8])
@pytest.mark.parametrize("shorter", [0, 50], ids=["alike", "different"])
def test_an_audio_pass(config, windows, shorter, meta):
    model, size = meta(config), 8 * config.audio.window_tokens
    clips = [torch.empty(size - shorter * i, config.audio.mel_bins) for i in range(windows)]
    cut = [cut_window(clip, 0, config.audio) for clip in clips]
    heads = ["speech"] * windows
    real = peak_of(model, lambda: model.encode_windows(cut, heads), *clips)
    close(
        costs.audio_pass(config, windows, 2), real, 0.12 if not shorter else 100
    )  # convolved one by one, they take less


@pytest.mark.parametrize("count", [1, 16])
def test_logits_and_a_draw(count):
    language = OFFICIAL.language
    logits = torch.zeros(count, language.vocab_size, dtype=torch.bfloat16)
    forbidden = torch.zeros(language.vocab_size, dtype=torch.bool)
    draws = [Draw(SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01), (1, 2, 3))] * count
    with torch.inference_mode(), Peak([forbidden]) as peak:
        sample(logits + 0, draws, forbidden)
    close(costs.logits(OFFICIAL, count, 1, 2), peak.bytes, 0.8)  # a sort's own copies are not seen
