"""The prices against the real modules: the bytes of their weights, and of the tensors that a pass has alive at once.

The modules run on the meta device, so at the official sizes; what attention kernels allocate by themselves is not seen.
"""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memphi import official
from memphi.cache.pool import CODE_DTYPES, SCALE_DTYPE
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.quantisation import CALIBRATED
from memphi.demo.shape import demo_config
from memphi.inputs.audio import RATE, decode_clip, fft_size, window_and_hop
from memphi.inputs.image import decode_image
from memphi.inputs.media import audio_media, image_media
from memphi.memory import costs
from memphi.model import adapters, prefill, preprocess, rows
from memphi.model.attention import SdpaAttention, sdpa
from memphi.model.audio import cut_window, make_window
from memphi.model.kernels import division
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant import examples, swap
from memphi.model.quant.examples import adapted_linears
from memphi.model.rows import Row, recurs
from memphi.request import SamplingParams
from memphi.sampling.sampler import Draw, sample
from tests.checkpoints import tiny_config, tiny_model

OFFICIAL, DEMO = read_config(official.folder()), demo_config()
CONFIGS = pytest.mark.parametrize("config", [OFFICIAL, DEMO], ids=["official", "demo"])
SCHEMES = pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "fp8"])
QUANTISED = pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
FORMS = pytest.mark.parametrize("form", ["plain", "packed", "merged"])
KEPT = pytest.mark.parametrize("cache_format", ["plain", "int8", "fp8"])
PAGE_TOKENS = costs.PAGE_TOKENS
GROUPS = {
    "language": lambda name: name.startswith("language.") and "embedding" not in name and "adapters" not in name,
    "embedding": lambda name: name.startswith("language.embedding."),
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
    """Build a model on the meta device, taken for a card; kernels compute nothing, masks are never all true."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query))
    monkeypatch.setattr(Tensor, "__bool__", lambda _: False)
    monkeypatch.setattr(sdpa, "_has_flash", lambda _: True)
    monkeypatch.setattr(sdpa, "_takes_cudnn", lambda *_: False)
    monkeypatch.setattr(sdpa, "varlen", lambda query, *_: torch.empty(query.shape, dtype=query.dtype, device="meta"))
    for name in ("add_norm", "attend", "divide", "gate", "rotate_and_keep", "tabulate"):
        monkeypatch.setattr(prefill, name, lambda *_: None)
    tiling = division.Tiling(4, 64, 32, 5, 4, None, early=False)
    monkeypatch.setattr(prefill, "choose_tiling", lambda *_, **__: tiling)
    monkeypatch.setattr(division, "multiprocessors", lambda _: costs.GRAPH_PROGRAMS // tiling.programs)

    def build(config, form="plain"):
        with torch.device("meta"):
            model = Phi4MM(config, SdpaAttention()).to(torch.bfloat16)
            model.quantise(config.scheme)
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


def step(model, config, planned, kernels=False, cache_format="plain"):
    n = sum(row.tokens for row in planned)
    pool = MetaPool(config, max(page for row in planned for page in row.pages) + 1, cache_format)
    ids = torch.zeros(n, dtype=torch.int64, device="meta")

    def run():
        packing = rows.pack(planned, ids.device, pool.page_tokens, in_lines=kernels)
        if kernels:
            prefill.compute(model.language, model.embed(ids, ()), packing, pool)
        else:
            model.language(model.embed(ids, ()), packing, pool)

    return peak_of(model, run, *pool.tensors)


def test_frames_are_priced_by_their_own_sizes():
    assert window_and_hop(RATE) == (costs.WINDOW_SAMPLES, costs.SAMPLES_A_FRAME)
    assert fft_size(RATE)[1] == costs.SPECTRUM


@CONFIGS
@FORMS
@SCHEMES
def test_weights_are_counted_to_the_byte(config, form, scheme, meta):
    config = replace(config, scheme=scheme)
    state = meta(config, form).state_dict()
    for cost, (group, belongs) in zip(costs.weights(config, 2, form), GROUPS.items(), strict=True):
        assert cost.name == f"weights: {group}"
        assert cost.bytes == sum(tensor.nbytes for name, tensor in state.items() if belongs(name))
    assert sum(cost.bytes for cost in costs.weights(config, 2, form)) == sum(t.nbytes for t in state.values())


@CONFIGS
@SCHEMES
def test_packed_weights_take_the_same_bytes_in_other_tensors(config, scheme, meta):
    config = replace(config, scheme=scheme)
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in meta(config, "packed").state_dict().values()}
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in storages.values())
    groups = costs.weight_bytes(config, 2) | costs.packed_bytes(config, 2)
    assert sizes == sorted(size for tensors in groups.values() for size, count in tensors for _ in range(count))
    assert sum(sizes) == sum(cost.bytes for cost in costs.weights(config, 2))


@pytest.mark.parametrize(("scheme", "most"), [("int8", 5.65e9), ("fp8", 5.65e9), ("int4", 4.12e9)])
def test_official_weights_in_fewer_bits(scheme, most):
    """Of which 0.8 GB are adapters in 8 bits."""
    total = sum(cost.bytes for cost in costs.weights(replace(OFFICIAL, scheme=scheme), 2))
    assert 0.97 * most < total < most


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


MODES = pytest.mark.parametrize(
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


@CONFIGS
@pytest.mark.parametrize("tokens", [128, 2048])
@MODES
def test_a_chunk_of_rows_with_and_without_an_adapter(config, tokens, form, adapters, meta):
    first = tuple(range(tokens // PAGE_TOKENS - 1))
    planned = [
        Row(tokens - PAGE_TOKENS, adapter=adapters[0], pages=first),
        Row(PAGE_TOKENS, 0, adapters[1], pages=(len(first),)),
    ]
    close(costs.prefill_chunk(config, tokens, 0, 2, form=form), step(meta(config, form), config, planned))


@CONFIGS
@pytest.mark.parametrize("heads", [{}, {"heads": 8, "kv_heads": 8}], ids=["shared keys", "keys of their own"])
@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
def test_a_chunk_kept_in_8_bits(config, heads, cache_format, meta):
    config = replace(config, language=replace(config.language, **heads))
    planned = [Row(2048, pages=tuple(range(2048 // costs.page_tokens(cache_format))))]
    cost = costs.prefill_chunk(config, 2048, 0, 2, form="merged", cache_format=cache_format)
    close(cost, step(meta(config, "merged"), config, planned, cache_format=cache_format))


@CONFIGS
@KEPT
@pytest.mark.parametrize("count", [1, 2])
def test_a_chunk_over_a_long_past(config, count, cache_format, meta):
    row = Row(64, past=65536, adapter="vision", pages=tuple(range(65600 // PAGE_TOKENS)))
    cost = costs.prefill_chunk(config, count * 64, 65600, 2, rows=count, cache_format=cache_format)
    close(cost, step(meta(config), config, [row] * count, cache_format=cache_format))


@CONFIGS
@KEPT
@pytest.mark.parametrize(("count", "past"), [(64, 2000), (3, 50_000), (1, 100_000)])
def test_a_decode_step(config, count, past, cache_format, meta):
    each = past // PAGE_TOKENS + 1
    planned = [Row(1, past=past, pages=tuple(range(i * each, (i + 1) * each))) for i in range(count)]
    cost = costs.decode_step(config, count, past + 1, 2, cache_format=cache_format)
    close(cost, step(meta(config), config, planned, cache_format=cache_format))


@CONFIGS
@pytest.mark.parametrize("tokens", [128, 2048])
@MODES
def test_a_chunk_through_the_kernels(config, tokens, form, adapters, meta):
    first = tuple(range(tokens // PAGE_TOKENS - 1))
    planned = [
        Row(tokens - PAGE_TOKENS, adapter=adapters[0], pages=first),
        Row(PAGE_TOKENS, 0, adapters[1], pages=(len(first),)),
    ]
    cost = costs.kernel_step(config, tokens, costs.Pasts(), 2, form)
    close(cost, step(meta(config, form), config, planned, kernels=True))
    assert form == "plain" or cost.bytes < 0.75 * costs.prefill_chunk(config, tokens, 0, 2, form=form).bytes


@CONFIGS
@pytest.mark.parametrize(
    "shape",
    [
        ((64, 65536), (64, 65536)),
        ((1, 2000),) * 64,
        ((1, 100_000),),
        ((8, 3000), (2, 70), (16, 9000)) * 4,
        ((2048, 8192), *((1, 2000),) * 64),
        ((40, 500), (30, 700), (512, 0), (1, 300), (5, 300)),
        ((600, 3400),) * 8,
    ],
    ids=["long pasts", "answers", "a long answer", "drafts", "a chunk beside answers", "all", "chunks"],
)
@KEPT
def test_pasts_through_the_kernels(config, shape, cache_format, meta):
    each = max(sum(row) for row in shape) // costs.page_tokens(cache_format) + 1
    planned = [
        Row(new, past, "vision", pages=tuple(range(i * each, (i + 1) * each))) for i, (new, past) in enumerate(shape)
    ]
    pasts = costs.pasts_of([(new, past) for new, past in shape], in_lines=True)
    cost = costs.kernel_step(config, sum(new for new, _ in shape), pasts, 2, "packed", cache_format)
    close(cost, step(meta(config, "packed"), config, planned, True, cache_format))


@CONFIGS
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("row", [(8192, 8192), (4096, 57344), (8192, 20_000), (5000, 0), (6000, 30_000)])
def test_long_rows_by_cudnn(config, row, kernels, meta, monkeypatch):
    """Over blocks of their past, and over none."""

    def block(query, key, value, is_causal):
        weight = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device="meta")
        return torch.empty(query.shape, dtype=query.dtype, device="meta"), weight

    monkeypatch.setattr(sdpa, "_takes_cudnn", lambda query, lengths: len(lengths) == 1 and recurs(lengths[0]))
    monkeypatch.setattr(sdpa, "_attend_block", block)
    (new, past), parts = row, costs.divided([row])
    planned = [Row(new, past, "vision", pages=tuple(range((new + past) // PAGE_TOKENS + 1)))]
    pasts, seen = costs.pasts_of(parts, in_lines=kernels), [sum(part) for part in parts if part[1]]
    if kernels:
        cost = costs.kernel_step(config, new, pasts, 2, "packed")
    else:
        cost = costs.prefill_chunk(config, new, max(seen, default=0), 2, len(seen), form="packed")
    close(cost, step(meta(config, "packed"), config, planned, kernels), 0.3)


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
@QUANTISED
@pytest.mark.parametrize("tokens", [128, 256, 2048])
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_chunk_over_quantised_weights(config, scheme, tokens, form, meta):
    config = replace(config, scheme=scheme)
    planned = [Row(tokens, adapter="speech", pages=tuple(range(tokens // PAGE_TOKENS)))]
    cost = costs.prefill_chunk(config, tokens, 0, 2, form=form)
    close(cost, step(meta(config, form), config, planned), 0.4 if tokens > 1000 else 1)
    if scheme != "int4":  # Whose blocks a kernel makes, which is not here.
        by_kernels = costs.kernel_step(config, tokens, costs.Pasts(), 2, form)
        assert step(meta(config, form), config, planned, kernels=True) <= by_kernels.bytes


@CONFIGS
@QUANTISED
def test_a_decode_step_over_quantised_weights(config, scheme, meta):
    config = replace(config, scheme=scheme)
    planned = [Row(1, past=15, pages=(i,)) for i in range(64)]
    model, states = meta(config), torch.empty(64, config.language.hidden_size, dtype=torch.bfloat16, device="meta")
    close(costs.decode_step(config, 64, 16, 2), step(model, config, planned), 1)
    assert peak_of(model, lambda: model.language.logits(states), states) <= costs.logits(config, 64, 64, 2).bytes


@QUANTISED
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(3072, 8192), (16384, 3072), (200, 72)])
def test_quantising(scheme, stored, shape):
    """What is read included."""
    _, rows = next(swap.pieces(*shape))
    weight, stored_rows = swap.WEIGHTS[scheme](rows, shape[1]), torch.randn(rows, shape[1]).to(stored)
    with Peak(weight.buffers()) as peak, torch.inference_mode():
        weight.store(0, swap.checked(stored_rows.clone(), "w"))
    cost = costs.quantising(replace(OFFICIAL, scheme=scheme), stored.itemsize)
    assert peak.bytes <= cost.bytes
    if shape != (200, 72) and scheme != "int4":  # Which is shown texts beside.
        close(cost, peak.bytes, 0.3)


@pytest.mark.parametrize("sizes", [(512, 8192), (3072, 512)], ids=["wide", "narrow"])
def test_quantising_a_layer_that_is_shown_texts(sizes):
    config = tiny_config(hidden_size=sizes[0], intermediate_size=sizes[1], heads=8)
    layer = tiny_model(config, torch.bfloat16).language.layers[0]
    adapters.remove_adapters(layer)
    weights = list[Tensor]()
    for name, linear in adapted_linears(layer).items():
        weight, matrix = swap.WEIGHTS["int4"](linear.out_features, linear.in_features), linear.weight
        weights += [*weight.buffers(), matrix]

        def compute(x, weight=weight, matrix=matrix):
            return swap.fill_by_inputs(weight, "w", lambda first, last: matrix[first:last].clone(), x)

        layer.set_submodule(name, examples.StandIn(compute))
    layer.float()
    hidden = torch.randn(costs.LOADING_TOKENS, sizes[0])
    with torch.inference_mode(), Peak([*weights, *layer.parameters()]) as peak:
        examples.Examples(config.language, [costs.LOADING_TOKENS], hidden.clone()).advance(layer)
    close(costs.quantising(replace(config, scheme="int4"), 2), peak.bytes, 0.3)


@pytest.mark.parametrize("scheme", CALIBRATED)
@pytest.mark.parametrize("sizes", [(512, 1024), (256, 1536), (128, 2048)], ids=["batch", "linear", "factor"])
def test_calibrating(scheme, sizes):
    """A layer by itself, in fp32, with what is made of it."""
    config = tiny_config(hidden_size=sizes[0], intermediate_size=sizes[1], heads=8)
    layer = tiny_model(config).language.layers[0]
    adapters.remove_adapters(layer)
    tokens = 3 * costs.EXAMPLE_BATCH_TOKENS
    with torch.inference_mode(), Peak([]) as peak:
        hidden = torch.randn(tokens, sizes[0])
        for linear in adapted_linears(layer).values():
            linear.weight = torch.nn.Parameter(linear.weight.clone())
        rows = examples.Examples(config.language, [256] * 12, hidden)
        for linear in rows.quantise(layer, swap.WEIGHTS[scheme]):
            linear.weight.dequantise(0, 1, torch.float32)
    close(costs.calibrating(config, 4, tokens), peak.bytes, 0.4)


@QUANTISED
def test_a_pass_of_the_towers_over_quantised_weights(scheme, meta):
    config = replace(OFFICIAL, scheme=scheme)
    model, side = meta(config), config.vision.patches
    pixels, mask = torch.empty(8, 3, 448, 448), torch.ones(8, side, side, dtype=torch.bool)
    real = peak_of(model, lambda: model.encode_crops(pixels, mask), pixels, mask)
    close(costs.vision_pass(config, 8, 2), real, 1)
    clips = [torch.empty(4000, config.audio.mel_bins)]
    windows = [cut_window(clip, 0, config.audio) for clip in clips]
    real = peak_of(model, lambda: model.encode_windows(windows, ["speech"]), *clips)
    close(costs.audio_pass(config, 1, 2), real, 1)


@CONFIGS
@pytest.mark.parametrize(("crops", "padded"), [(1, 0), (1, 1), (8, 0), (8, 3), (8, 8)])
def test_a_vision_pass(config, crops, padded, meta):
    model, side = meta(config), config.vision.patches
    pixels = torch.empty(crops, 3, config.vision.crop_size, config.vision.crop_size)
    mask = torch.ones(crops, side, side, dtype=torch.bool)
    mask[:padded, -1] = False
    close(costs.vision_pass(config, crops, 2), peak_of(model, lambda: model.encode_crops(pixels, mask), pixels, mask))


@pytest.mark.parametrize("size", [(2688, 2688), (8000, 8000), (448, 16128), (300, 200), (20_000, 300), (1000, 60_000)])
@pytest.mark.parametrize("crops", [1, 37])
def test_cropping(size, crops):
    """A picture as large as its grid takes the whole price; whatever the size, none takes more."""
    vision = OFFICIAL.vision
    image = decode_image(image_media(np.broadcast_to(np.uint8(7), (*size, 3))), vision)
    with Peak([]) as peak:
        side = vision.crop_size
        out = torch.empty(min(crops, image.footprint.crops), 3, side, side, dtype=torch.bfloat16, device="meta")
        preprocess.make_crops(image, 0, out)
    cost = costs.cropping(OFFICIAL, len(out), 2)
    assert peak.bytes <= cost.bytes
    if size == (2688, 2688):
        close(cost, peak.bytes)


@CONFIGS
@pytest.mark.parametrize("windows", [1, 8])
@pytest.mark.parametrize("shorter", [0, 50], ids=["alike", "different"])
def test_an_audio_pass(config, windows, shorter, meta):
    model, size = meta(config), 8 * config.audio.window_tokens
    clips = [torch.empty(size - shorter * i, config.audio.mel_bins) for i in range(windows)]
    cut = [cut_window(clip, 0, config.audio) for clip in clips]
    heads = ["speech"] * windows
    real = peak_of(model, lambda: model.encode_windows(cut, heads), *clips)
    tokens = [-(-len(clip) // 8) for clip in clips]
    close(costs.audio_pass(config, windows, 2, sizes=[costs.WindowSize(n, n) for n in tokens]), real, 0.12)


@CONFIGS
@pytest.mark.parametrize("seconds", [0.5, 2, 10, 30])
def test_a_short_clip_is_not_priced_as_a_long_one(config, seconds, meta):
    model, tokens = meta(config), min(int(seconds * 12.5), config.audio.window_tokens)
    clip = torch.empty(8 * tokens, config.audio.mel_bins)
    real = peak_of(model, lambda: model.encode_windows([cut_window(clip, 0, config.audio)], ["speech"]), clip)
    close(costs.audio_pass(config, 1, 2, sizes=[costs.WindowSize(tokens, tokens)]), real, 0.15)


@CONFIGS
@pytest.mark.parametrize("tokens", [(25, 300, 300), (40, 12, 30), (375, 5, 5)], ids=str)
def test_windows_of_many_lengths_are_priced_by_each(config, tokens, meta):
    tokens = [min(n, config.audio.window_tokens) for n in tokens]
    model, clips = meta(config), [torch.empty(8 * n, config.audio.mel_bins) for n in tokens]
    cut = [cut_window(clip, 0, config.audio) for clip in clips]
    real = peak_of(model, lambda: model.encode_windows(cut, ["speech"] * len(cut)), *clips)
    close(costs.audio_pass(config, 3, 2, sizes=[costs.WindowSize(n, n) for n in tokens]), real, 0.15)


@CONFIGS
@pytest.mark.parametrize("windows", [1, 8])
def test_an_audio_pass_that_begins_with_samples(config, windows, meta):
    """The middle windows of a long clip, which are the longest."""
    model, size, rate = meta(config), 8 * config.audio.window_tokens, 160
    samples = np.zeros((windows + 2) * size * rate, np.float32)
    clip = decode_clip(audio_media(samples, RATE), config.audio)
    bins, device = config.audio.mel_bins, torch.device("meta")

    def run():
        cut = [
            make_window(
                clip.footprint.frames,
                i + 1,
                config.audio,
                lambda *part: preprocess.make_frames(clip, *part, bins, device),
            )
            for i in range(windows)
        ]
        model.encode_windows(cut, ["speech"] * windows)

    # As if no sound followed: what cuDNN takes where some does, the meta device does not show.
    sizes = [costs.WindowSize(config.audio.window_tokens + 1, config.audio.window_tokens)] * windows
    price = costs.audio_pass(config, windows, 2, True, sizes)
    close(price, peak_of(model, run))


@pytest.mark.parametrize("count", [1, 16])
def test_logits_and_a_draw(count):
    language = OFFICIAL.language
    logits = torch.zeros(count, language.vocab_size, dtype=torch.bfloat16)
    forbidden = torch.zeros(language.vocab_size, dtype=torch.bool)
    draws = [Draw(SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01), (1, 2, 3))] * count
    with torch.inference_mode(), Peak([forbidden]) as peak:
        sample(logits + 0, draws, forbidden)
    close(costs.logits(OFFICIAL, count, 1, 2), peak.bytes, 0.8)  # a sort's own copies are not seen
