"""What takes memory, and how much: one function per thing that allocates, each with its formula in words.

Knows the model's sizes and in which order its modules hold their tensors; touches none. The planner sizes everything
by these functions, admission prices a request by them, and tests hold each against what is really allocated. They price
the sdpa attention; eager's scores are not among them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from memphi.config import (
    ROOMS,
    AdapterConfig,
    AdapterForm,
    AudioConfig,
    CacheFormat,
    LanguageConfig,
    ModelConfig,
    Place,
    Placement,
    Scheme,
    VisionConfig,
    group_size,
)
from memphi.request import Footprint

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_TOKENS = 16
"""Of 16 bits or more; of 8 bits a page has twice as many, and so the same bytes: 2 MiB at full size."""
SCALE_BYTES = 2
"""A code's scale, of which each token has one for every head of keys and of values."""
PADDED_SHARE = 20
"""The part of a vision pass that is added where some crops have padding, and are copied apart: at most 4 %."""
GATHER_TOKENS = 32768
"""Tokens whose keys and values are copied out of the pool at once; a longer row goes alone."""
MOST_LINED_TOKENS, LINE_TOKENS = 16, 8
"""New tokens at most of a row that a kernel takes over its pages, and how many at once where it has more than one."""
PLACE_BYTES = 16
"""Page and place of a token that is copied out of its page."""
CONVOLVED_VALUES = 256 * 1024
"""Tokens of sound times channels that are subsampled at once."""
BAND_VALUES = 4 * MIB
"""Numbers of a picture that the device resizes at once."""
BIAS_STEP = 16
"""Numbers of which a conformer bias' rows begin at multiples."""
BAND_FRAMES = 1000
"""Log-mel frames that the device makes at once."""
SAMPLES_A_FRAME, WINDOW_SAMPLES, SPECTRUM = 160, 400, 257
"""Of sound at 16 kHz: a frame's step, its length, and the bins of its spectrum (spec 5.1)."""
FIRST_ANSWER_TOKENS = 256
"""The first stretch of an answer, reserved together with its prompt; further output is reserved as it is needed."""
METADATA_BYTES = 64
"""Positions, pages, offsets and adapters' indices of one packed token."""
DRAW_BYTES = 64
"""Sorting and filtering one row's scores, per id: scaled, sorted, their ids, the sort's own copies, sums in fp64."""
MERGED_NUMBERS = 4 * MIB
"""Numbers of a weight that are merged with an adapter at once."""
ROOM_STEP = 256
"""Bytes at whose multiples tensors begin in a room."""
QUANTISED_NUMBERS = 2 * MIB
"""Numbers of a weight that are quantised at once."""
EXAMPLE_BATCH_TOKENS = 1024
"""Of example texts that go through a layer at once, where it is calibrated."""
DEQUANTISED_NUMBERS = 8 * MIB
"""Numbers of a quantised weight that are there in 16 bits at once."""
GRAPHS_BYTES = 128 * MIB
"""What CUDA keeps of all graphs, some hundred launches each, and cuBLAS' work space for them."""
GRAPH_PROGRAMS = 1024
"""Programs among which a step's attention is divided, on the largest card: four for each of its multiprocessors."""
PIECE_SCORES = 2048
"""Scores of a row in a graph that the likeliest id is first looked for among."""
CONTEXT_BYTES = {"cuda": 768 * MIB, "mps": 600 * MIB, "cpu": 400 * MIB}
MEASURED_CONTEXTS = {"H100": 800 * MIB, "H200": 800 * MIB}
"""The CUDA context with kernels and libraries, by a word of the device's name: up to 779 MiB after mixed requests."""


@dataclass(frozen=True)
class Cost:
    """One thing that takes memory."""

    name: str
    bytes: int
    formula: str
    """How the bytes come about, in words."""


def size_text(n_bytes: int) -> str:
    """Bytes for a person: 10.3 GiB, 480 MiB, 20 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n_bytes) >= unit:
            return (
                f"{n_bytes / unit:.1f} {name}"
                if unit == GIB or abs(n_bytes) < 10 * unit
                else f"{n_bytes // unit} {name}"
            )
    return f"{n_bytes} bytes"


# --- weights -------------------------------------------------------------------------------------------------------

Tensors = tuple[tuple[int, int], ...]
"""Sizes of tensors: (numbers or bytes in one, how many there are)."""
Matrices = tuple[tuple[int, int, int], ...]
"""The matrices of linears and of the embedding, to which schemes apply: (inputs, outputs, how many there are)."""


def weight_tensors(config: ModelConfig, form: AdapterForm = "plain") -> dict[str, Tensors]:
    """The numbers of all weights, by group; a merged adapter has none of its own, and the other is left out."""
    return {
        name: (*((n_in * n_out, count) for n_in, n_out, count in matrices), *others)
        for name, (matrices, others) in _groups(config, form).items()
    }


def weight_bytes(config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain") -> dict[str, Tensors]:
    """The same in bytes, as the config's scheme stores them."""
    return {
        name: (*_stored(matrices, _scheme_of(name, config), dtype_bytes), *_in_bytes(others, dtype_bytes))
        for name, (matrices, others) in _groups(config, form).items()
    }


def weights(config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain") -> tuple[Cost, ...]:
    """The weights, group by group."""
    numbers, stored = weight_tensors(config, form), weight_bytes(config, dtype_bytes, form)
    return tuple(
        Cost(
            f"weights: {group}",
            _total(stored[group]),
            _weights_formula(_total(numbers[group]), _scheme_of(group, config), dtype_bytes),
        )
        for group in numbers
    )


def placed_weights(
    config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain", placement: Placement = "resident"
) -> tuple[Cost, ...]:
    """What weights take of the device: the groups that stay there, and the rooms for those that lie on the host."""
    rooms = ROOMS[placement]
    on_host = {f"weights: {group}" for groups in rooms for group in groups}
    stay = (cost for cost in weights(config, dtype_bytes, form) if cost.name not in on_host)
    taken = (*stay, *(room(config, dtype_bytes, form, groups) for groups in rooms))
    if placement != "streamed":
        return taken
    return (*streamed_language(config, dtype_bytes), *(cost for cost in taken if cost.name != "weights: language"))


def streamed_language(config: ModelConfig, dtype_bytes: int) -> tuple[Cost, ...]:
    """What the decoder takes of the device where its layers lie on the host: two rooms for a layer; and its norm."""
    norm_bytes = config.language.hidden_size * dtype_bytes
    layer_bytes = layer_room_bytes(config, dtype_bytes)
    return (
        Cost("weights: last norm", norm_bytes, f"{config.language.hidden_size} numbers of {dtype_bytes} bytes"),
        Cost(
            "weights: two layers of the decoder",
            2 * layer_bytes,
            f"twice {layer_bytes} bytes: one computes while the next one comes",
        ),
    )


def layer_room_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """The room for one of the decoder's layers, without its adapters: what it brings each time, too."""
    sizes = [
        size
        for n_in, n_out in _linears(config.language)
        for size in _stored_as(n_in, n_out, config.scheme, dtype_bytes)
    ]
    sizes += 2 * [config.language.hidden_size * dtype_bytes]
    return sum(-(-size // ROOM_STEP) * ROOM_STEP for size in sizes)


def room(config: ModelConfig, dtype_bytes: int, form: AdapterForm, groups: Sequence[str]) -> Cost:
    """The place on the device of groups on the host, one of which is there at a time."""
    stored = weight_bytes(config, dtype_bytes, form)
    sizes = {name: sum(-(-size // ROOM_STEP) * ROOM_STEP * count for size, count in stored[name]) for name in groups}
    largest = max(sizes, key=lambda name: sizes[name])
    return Cost(
        f"weights: room for one of {len(groups)}",
        sizes[largest],
        f"the {largest}, each tensor at a multiple of {ROOM_STEP} bytes; of {', '.join(groups)} the others lie on the "
        "host meanwhile",
    )


def _weights_formula(numbers: int, scheme: Scheme, dtype_bytes: int) -> str:
    if not numbers:
        return "none: one adapter is merged into the weights"
    words = {
        "bf16": f"{numbers:,} numbers of {dtype_bytes} bytes",
        "int8": f"{numbers:,} numbers, matrices in 1 byte and a scale for each output",
        "int4": f"{numbers:,} numbers, matrices in half a byte, scale and shift for each group of 128 or 64 inputs",
        "fp8": f"{numbers:,} numbers, matrices in 1 byte (e4m3) and a scale for each output",
    }
    return words[scheme]


def weights_rounding(
    config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain", placement: Placement = "resident"
) -> Cost:
    """What PyTorch's CUDA allocator adds to the weights (an assumption about its segments, see the formula)."""
    groups = weight_bytes(config, dtype_bytes, form)
    if form == "packed":
        groups |= packed_bytes(config, dtype_bytes)
    rooms = ROOMS[placement]
    for name in (name for names in rooms for name in names):
        del groups[name]
    if placement == "streamed":
        groups["language"] = ((layer_room_bytes(config, dtype_bytes), 2),)
    sizes = [size_and_count for tensors in groups.values() for size_and_count in tensors]
    sizes += [(room(config, dtype_bytes, form, names).bytes, 1) for names in rooms]
    large = sum((-size % (2 * MIB)) * count for size, count in sizes if size >= 10 * MIB)
    middle = sum(size * count for size, count in sizes if MIB < size < 10 * MIB)
    small = sum((-size % 512) * count for size, count in sizes if size <= MIB)
    return Cost(
        "weights: allocator",
        large + middle // 16 + small + 22 * MIB,
        "tensors from 10 MiB on rounded up to 2 MiB; a sixteenth of those above 1 MiB, which share segments of 20 MiB; "
        "smaller ones rounded to 512 bytes; one segment of either kind half used",
    )


def packed_bytes(config: ModelConfig, dtype_bytes: int) -> dict[str, Tensors]:
    """The decoder and its adapters as they lie in memory, where adapters stand beside the weights they adapt.

    Beside weights in few bits, adapters have matrices of their own.
    """
    language, ranks = config.language, _ranks(config)
    linears = _linears(language)
    is_quantised = config.scheme != "bf16"
    wide = tuple((((0 if is_quantised else n_in) + ranks) * n_out, language.layers) for n_in, n_out in linears)
    narrow = tuple((ranks * n_in, language.layers) for n_in, _ in linears)
    base = _stored(_language_group(language)[0], config.scheme, dtype_bytes) if is_quantised else ()
    lying = (*base, *_in_bytes((*wide, *narrow, *_language_group(language)[1]), dtype_bytes))
    return {"language": lying, "vision adapter": (), "speech adapter": ()}


def _scheme_of(group: str, config: ModelConfig) -> Scheme:
    """How a group's matrices are stored: adapters always in 16 bits."""
    if group == "language":
        return config.scheme
    return "bf16" if group.endswith(" adapter") else config.other_scheme


def _stored(matrices: Matrices, scheme: Scheme, dtype_bytes: int) -> Tensors:
    """The tensors that a scheme stores matrices as, in bytes."""
    return tuple(
        (size, count) for n_in, n_out, count in matrices for size in _stored_as(n_in, n_out, scheme, dtype_bytes)
    )


def _stored_as(n_in: int, n_out: int, scheme: Scheme, dtype_bytes: int) -> tuple[int, ...]:
    """One matrix: codes, scales and shifts."""
    group = group_size(n_in)
    groups = -(-n_in // group)
    return {
        "bf16": (n_in * n_out * dtype_bytes,),
        "int8": (n_in * n_out, 2 * n_out),
        "int4": (groups * group // 2 * n_out, 4 * groups * n_out),
        "fp8": (n_in * n_out, 4 * n_out),
    }[scheme]


def _in_bytes(tensors: Tensors, dtype_bytes: int) -> Tensors:
    return tuple((size * dtype_bytes, count) for size, count in tensors)


def _total(tensors: Tensors) -> int:
    return sum(size * count for size, count in tensors)


Group = tuple[Matrices, Tensors]
"""A group's matrices, and its other tensors in numbers."""


def _groups(config: ModelConfig, form: AdapterForm) -> dict[str, Group]:
    language, none = config.language, ((), ())
    return {
        "language": _language_group(language),
        "embedding": (((language.hidden_size, language.vocab_size, 1),), ()),
        "vision adapter": none if form == "merged" else ((), _adapter_tensors(language, config.vision_adapter)),
        "speech adapter": none if form == "merged" else ((), _adapter_tensors(language, config.speech_adapter)),
        "vision tower": _vision_group(config.vision),
        "audio encoder": _audio_group(config.audio),
        "projectors": _projector_group(config),
    }


def _linears(language: LanguageConfig) -> tuple[tuple[int, int], ...]:
    """The four linears of a decoder layer: (in, out)."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return ((hidden, _qkv_size(language)), (_query_size(language), hidden), (hidden, 2 * inner), (inner, hidden))


def _language_group(language: LanguageConfig) -> Group:
    linears = tuple((n_in, n_out, language.layers) for n_in, n_out in _linears(language))
    return linears, ((language.hidden_size, 2 * language.layers + 1),)


def _adapter_tensors(language: LanguageConfig, adapter: AdapterConfig) -> Tensors:
    return tuple((size * adapter.rank, language.layers) for linear in _linears(language) for size in linear)


def _ranks(config: ModelConfig) -> int:
    return config.vision_adapter.rank + config.speech_adapter.rank


def _vision_group(vision: VisionConfig) -> Group:
    size, inner, layers = vision.hidden_size, vision.intermediate_size, vision.layers
    matrices = ((size, size, 4 * layers), (size, inner, layers), (inner, size, layers))
    others = (
        (3 * vision.patch_size**2 * size, 1),
        (vision.patches**2 * size, 1),
        (size, 1 + (4 + 4 + 1) * layers),  # biases and norms
        (inner, layers),
    )
    return matrices, others


def _audio_group(audio: AudioConfig) -> Group:
    size, inner, channels, layers = audio.hidden_size, audio.intermediate_size, audio.conv_channels, audio.layers
    matrices = (
        (channels * -(-audio.mel_bins // 8), size, 1),
        (size, 2 * inner, 2 * layers),  # the feed-forwards' up, whose output is value and gate
        (inner, size, 2 * layers),
        (size, size, 4 * layers),
    )
    subsampling = (
        (audio.mel_bins, 2),
        (9 * channels, 3),
        (channels * channels, 2),
        (channels, 5),
        (size, 1),
        (2 * audio.bias_distance * audio.heads, 1),
    )
    layer = (
        (2 * inner, 2 * layers),
        (size * size, 2 * layers),  # the convolution's pointwise and out
        (2 * size * size, layers),
        (2 * size, layers),
        (audio.kernel_size * size, layers),
        (size, (4 + 2 + 4 + 2 + 2 + 1 + 2 + 2 + 2) * layers),  # biases and norms
    )
    return matrices, subsampling + layer


def _projector_group(config: ModelConfig) -> Group:
    hidden, vision, audio = config.language.hidden_size, config.vision.hidden_size, config.audio.hidden_size
    return ((vision, hidden, 1), (audio, hidden, 2), (hidden, hidden, 3)), ((hidden, 6), (vision, 2))


# --- what stays ----------------------------------------------------------------------------------------------------


def page_tokens(cache_format: CacheFormat) -> int:
    """How many tokens a page has."""
    return PAGE_TOKENS if cache_format == "plain" else 2 * PAGE_TOKENS


def page(config: ModelConfig, dtype_bytes: int, tokens: int = PAGE_TOKENS, cache_format: CacheFormat = "plain") -> Cost:
    """Keys and values of all layers for one page of tokens."""
    language = config.language
    each = f"{language.head_dim} x {dtype_bytes} bytes"
    if cache_format != "plain":
        each = f"({language.head_dim} bytes and a scale of {SCALE_BYTES})"
    return Cost(
        "page",
        kept_bytes(language, tokens, dtype_bytes, cache_format),
        f"{tokens} tokens x {language.layers} layers x (key, value) x {language.kv_heads} heads x {each}",
    )


def kept_bytes(language: LanguageConfig, tokens: int, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """Keys and values of all layers, with the scales of those in 8 bits."""
    number_bytes = dtype_bytes if cache_format == "plain" else 1
    numbers = tokens * language.layers * 2 * _key_size(language)
    return numbers * number_bytes + scale_bytes(language, tokens, cache_format)


def scale_bytes(language: LanguageConfig, tokens: int, cache_format: CacheFormat) -> int:
    """The scales of all layers' keys and values."""
    return 0 if cache_format == "plain" else tokens * language.layers * 2 * language.kv_heads * SCALE_BYTES


def media_embeddings(config: ModelConfig, tokens: int, dtype_bytes: int) -> Cost:
    """What the encoders made of pictures and sound, kept until its sequence ends and as long as there is room."""
    hidden = config.language.hidden_size
    return Cost("media embeddings", tokens * hidden * dtype_bytes, f"{tokens} tokens x {hidden} x {dtype_bytes} bytes")


def context(kind: str, name: str) -> Cost:
    """What a device holds before any tensor: the CUDA context and libraries; on a CPU, Python and torch."""
    measured = next((n_bytes for word, n_bytes in MEASURED_CONTEXTS.items() if word in name), None)
    if kind == "cpu":
        return Cost("context", CONTEXT_BYTES["cpu"], "Python, torch and their libraries (measured on Linux)")
    if measured is not None:
        return Cost("context", measured, "the CUDA context, kernels and libraries (measured on this card)")
    return Cost(
        "context", CONTEXT_BYTES[kind], "the device's context, kernels and libraries (an estimate: not measured)"
    )


def graphs(config: ModelConfig, rows: int, tokens: int, dtype_bytes: int, form: AdapterForm = "plain") -> Cost:
    """Decode steps in CUDA graphs: the tensors of the largest, and what CUDA keeps of each; tokens a row at most."""
    language = config.language
    ranks = _ranks(config) if form == "packed" else 0
    hidden, inner = language.hidden_size, language.intermediate_size
    activations = 4 * hidden + 3 * inner + _qkv_size(language) + 2 * ranks + 2 * language.rotary_dim
    pages = -(-tokens // PAGE_TOKENS)
    units = rows + GRAPH_PROGRAMS // language.kv_heads
    attention = units * (language.heads * (language.head_dim + 2) * 4 + 32) + rows * language.kv_heads * 4
    choice = -(-language.vocab_size // PIECE_SCORES) * (4 + 4)
    each = (activations + language.vocab_size) * dtype_bytes + choice + 2 * pages * 4 + METADATA_BYTES
    products = _kernel_product_bytes(config, rows, dtype_bytes)
    return Cost(
        "graphs",
        rows * each + attention + products + GRAPHS_BYTES,
        f"{rows} rows x ({activations} activations and {language.vocab_size} scores of {dtype_bytes} bytes, "
        f"{choice} bytes to choose an id, twice {pages} pages of 4), {units} pieces of attention, "
        + (f"{size_text(products)} for a block of weights in {config.scheme}, dequantised, " if products else "")
        + f"and {size_text(GRAPHS_BYTES)} for CUDA and cuBLAS (an estimate: not measured)",
    )


# --- what comes and goes -------------------------------------------------------------------------------------------


def merging(config: ModelConfig, dtype_bytes: int) -> Cost:
    """Merge an adapter while loading: a piece of W as stored, in fp32 and with B A added, and a layer's A and B."""
    rank = max(config.vision_adapter.rank, config.speech_adapter.rank)
    sizes = [(size_in, min(MERGED_NUMBERS // size_in + 1, size_out)) for size_in, size_out in _linears(config.language)]
    numbers = max(
        rows * size_in * (dtype_bytes + 8) + (rows + size_in) * rank * (dtype_bytes + 4) for size_in, rows in sizes
    )
    return Cost(
        "merging",
        numbers,
        f"while loading: {MERGED_NUMBERS} numbers of a weight x ({dtype_bytes} bytes and twice 4 in fp32), and the "
        "adapter's of one layer",
    )


def quantising(config: ModelConfig, dtype_bytes: int) -> Cost:
    """Quantise while loading: a piece of W as stored and in fp32, and what choosing codes or fitting them takes."""
    each = dtype_bytes + {"bf16": 0, "int8": 5, "int4": 17, "fp8": 6}[config.scheme]
    numbers = min(QUANTISED_NUMBERS, _largest_matrix(config))
    return Cost("quantising", numbers * each, f"while loading: {numbers} numbers of a weight x {each} bytes")


def calibrating(config: ModelConfig, dtype_bytes: int, tokens: int) -> Cost:
    """`memphi quantize` with calibration, on its device: a layer, its linears' Hessians, and the example texts' states.

    Beside them the most of three: a batch of examples in the layer, a Hessian's factor, a linear as it is rounded.
    """
    language, linears = config.language, _linears(config.language)
    layer = sum(n_in * n_out for n_in, n_out in linears) * dtype_bytes
    hessians = 4 * sum(n_in**2 for n_in, _ in linears)
    states = tokens * (language.hidden_size + 2 * language.rotary_dim) * dtype_bytes
    batch = EXAMPLE_BATCH_TOKENS * (4 * language.hidden_size + 4 * language.intermediate_size) * max(dtype_bytes, 4)
    factor = max(21 * n_in**2 for n_in, _ in linears)
    rounding = max(4 * n_in**2 + n_in * n_out * 14 for n_in, n_out in linears)
    return Cost(
        "calibrating",
        layer + hessians + states + max(batch, factor, rounding),
        f"while quantising: a layer, {size_text(layer)}; its linears' Hessians, {size_text(hessians)}; {tokens} "
        f"tokens of examples, {size_text(states)}; and the largest Hessian's factor, {size_text(factor)}, or a linear "
        f"in fp32, {size_text(rounding)}, or a batch of examples, {size_text(batch)}",
    )


def _with_block(cost: Cost, beside_bytes: int, config: ModelConfig, scheme: Scheme, dtype_bytes: int) -> Cost:
    """A step's cost, where products need a block of a quantised weight in 16 bits beside so much of what they compute.

    In e4m3 inputs stand there too, in beside_bytes; in int4 as codes and in fp32 before.
    """
    if scheme == "bf16":
        return cost
    each = dtype_bytes + {"int8": 0, "int4": 5, "fp8": 4}[scheme]
    numbers = min(DEQUANTISED_NUMBERS, _largest_matrix(config))
    formula = f"{cost.formula}; or products beside {numbers} numbers of a weight, dequantised, x {each} bytes"
    return Cost(cost.name, max(cost.bytes, beside_bytes + numbers * each), formula)


def _input_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> int:
    """The widest input of the decoder's linears in e4m3, with a scale for each token, and a block of it in fp32."""
    if config.scheme != "fp8":
        return 0
    numbers = tokens * max(n_in for n_in, _ in _linears(config.language))
    return numbers + 4 * tokens + min(numbers, DEQUANTISED_NUMBERS) * (5 + dtype_bytes)


def _kernel_product_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> int:
    """What a product with a quantised weight needs beside its output through memphi's own kernels, which make a block
    16 bits again in one pass; in e4m3 as without them, where a card has no units for it.
    """
    if config.scheme == "bf16":
        return 0
    numbers = min(DEQUANTISED_NUMBERS, _largest_matrix(config))
    return numbers * (dtype_bytes + (4 if config.scheme == "fp8" else 0)) + _input_bytes(config, tokens, dtype_bytes)


def _largest_matrix(config: ModelConfig) -> int:
    return max(n_in * n_out for matrices, _ in _groups(config, "plain").values() for n_in, n_out, _ in matrices)


def vision_pass(config: ModelConfig, crops: int, dtype_bytes: int) -> Cost:
    """Encode crops: the tower's MLP holds the most, two residuals, a norm and both sides of the GELU."""
    vision, hidden = config.vision, config.language.hidden_size
    size, patches = vision.hidden_size, vision.patches**2
    layer = max(3 * size + 2 * vision.intermediate_size, 8 * size)
    projector = 2 * size + (3 * hidden + 2 * size) // 4 + 1
    pixels = 3 * vision.crop_size**2
    first = pixels * dtype_bytes + 3 * patches * size * dtype_bytes
    each = max(patches * max(layer, projector) * dtype_bytes, first) + pixels * 4 + patches * 10
    cost = Cost(
        "vision pass",
        crops * each + crops * each // PADDED_SHARE,
        f"{crops} crops x ({patches} patches x (3 x {size} + 2 x {vision.intermediate_size}) x {dtype_bytes} bytes, "
        f"and the crop itself in fp32), and 1/{PADDED_SHARE} for crops with padding",
    )
    return _with_block(cost, cost.bytes, config, config.other_scheme, dtype_bytes)


def cropping(config: ModelConfig, crops: int, dtype_bytes: int) -> Cost:
    """Make crops of decoded pixels on the device, before they are encoded: one picture at a time, and in bands."""
    vision = config.vision
    crop = 3 * vision.crop_size**2
    # A band: its pixels, those of one tap, that times its weight and the sum so far in int32, and the last band's.
    # The global view: of four samples each, bytes, int32 and fp32; and what four such gave before.
    at_once = max(11 * BAND_VALUES, 52 * crop) + MIB  # and the weights of a line
    return Cost(
        "cropping",
        crops * crop * dtype_bytes + vision.max_crops * crop + at_once,
        f"where crops are made on the device: {crops} crops x {crop} x {dtype_bytes} bytes, a picture of at most "
        f"{vision.max_crops} crops in bytes, and {size_text(at_once)} to resize it in bands",
    )


@dataclass(frozen=True)
class WindowSize:
    """What a window of sound is encoded as."""

    convolved: int
    """Its tokens, with those at its borders."""
    length: int
    """What it has in the conformer."""


def audio_pass(
    config: ModelConfig,
    windows: int,
    dtype_bytes: int,
    decoded: bool = False,
    sizes: Sequence[WindowSize] = (),
) -> Cost:
    """Encode windows of sound: either the first convolution's output twice, or a conformer layer.

    decoded: their log-mel frames are made on the device first, and are there as long as it takes. sizes are the
    windows' in their order; each is as large as it may be where they are not given.
    """
    audio, hidden = config.audio, config.language.hidden_size
    sizes = sizes or [WindowSize(audio.window_tokens + 2, audio.window_tokens)] * windows
    length, tokens = max(size.length for size in sizes), _convolved_at_once(audio, sizes)
    height, width = 4 * (tokens + 2), -(-audio.mel_bins // 2)
    output = audio.conv_channels * height * width * dtype_bytes
    sound = 2 * height * audio.mel_bins * 3 * dtype_bytes
    features = windows * length * audio.hidden_size * dtype_bytes
    projected = (windows + 2) * length * hidden * dtype_bytes
    conformer = _conformer_bytes(audio, windows, length, dtype_bytes)
    linears = features + max(conformer + features, projected)
    encoding = max(features + 2 * output + sound, linears)
    frames, making = _frames_bytes(audio, [size.convolved for size in sizes]) if decoded else (0, 0)
    cost = Cost(
        "audio pass",
        frames + max(encoding, making),
        f"the larger of the first convolution for {tokens} tokens, twice {audio.conv_channels} channels x {height} x "
        f"{width} x {dtype_bytes} bytes, and a conformer layer over {windows} windows of "
        f"{length} tokens with its biases" + (f"; and {size_text(frames)} of log-mel frames" if decoded else ""),
    )
    return _with_block(cost, frames + linears, config, config.other_scheme, dtype_bytes)


def _convolved_at_once(audio: AudioConfig, sizes: Sequence[WindowSize]) -> int:
    """The most tokens that are subsampled at once: of neighbouring windows of one size, or a part of one window."""
    most = max(CONVOLVED_VALUES // audio.conv_channels, 1)
    alike = ((size.convolved, sum(1 for _ in group)) for size, group in groupby(sizes))
    return max(min(tokens * min(count, max(most // tokens, 1)), most) for tokens, count in alike)


def _frames_bytes(audio: AudioConfig, convolved: Sequence[int]) -> tuple[int, int]:
    """Windows' log-mel frames, and what takes the longest of them to be made: samples and spectra, in fp64 and fp32."""
    frames = 8 * max(convolved)
    each = frames * audio.mel_bins * 4
    band = min(frames, BAND_FRAMES) * (16 * WINDOW_SAMPLES + 16 * SPECTRUM)
    tables = (48 * WINDOW_SAMPLES + 16 * audio.mel_bins) * SPECTRUM
    return 8 * sum(convolved) * audio.mel_bins * 4, each + band + tables + frames * SAMPLES_A_FRAME * 4


def _conformer_bytes(audio: AudioConfig, windows: int, tokens: int, dtype_bytes: int) -> int:
    """One layer: residuals with the feed-forward's value and gate, or with query, key and value, and the biases."""
    size = audio.hidden_size
    layer = windows * tokens * max(2 * size + 4 * audio.intermediate_size, 8 * size) * dtype_bytes
    bias = audio.heads * tokens * (tokens + BIAS_STEP) * dtype_bytes
    # The bias by distance, and for windows of different lengths one for each, with its padding masked.
    return layer + bias * (1 + windows) + 16 * tokens**2


@dataclass(frozen=True)
class Pasts:
    """What the rows of a step have behind them, by how it is read."""

    tokens: int = 0
    """The longest row of all, new tokens included, as in what follows."""
    rows: int = 0
    """All rows."""
    longest_copied: int = 0
    """Tokens of the longest row whose keys and values are copied out of their pages."""
    all_copied: int = 0
    """Tokens of all such rows."""
    longest_lined: int = 0
    """Tokens of the longest row that a kernel takes over its pages."""
    single_lines: int = 0
    """Such rows of one new token."""
    lines: int = 0
    """In how many lines of LINE_TOKENS the others go."""
    copied_at_once: int | None = None
    """Tokens of rows whose keys and values are copied together; None: as many as may be."""


def pasts_of(rows: Sequence[tuple[int, int]], in_lines: bool) -> Pasts:
    """The pasts of rows of (new tokens, past); in_lines where kernels take rows of few tokens."""
    lined = [(new, past) for new, past in rows if in_lines and past and new <= MOST_LINED_TOKENS]
    sizes = [new + past if past and not (in_lines and new <= MOST_LINED_TOKENS) else 0 for new, past in rows]
    copied = [size for size in sizes if size]
    return Pasts(
        tokens=_largest(new + past for new, past in rows),
        rows=len(rows),
        longest_copied=_largest(copied),
        all_copied=sum(copied),
        longest_lined=_largest(new + past for new, past in lined),
        single_lines=sum(new == 1 for new, _ in lined),
        lines=sum(-(-new // LINE_TOKENS) for new, _ in lined if new > 1),
        copied_at_once=_most_together(sizes),
    )


def _most_together(sizes: Sequence[int]) -> int:
    """The most of neighbouring rows that are copied at once: up to GATHER_TOKENS, or one that is longer; 0 parts."""
    most = group = 0
    for size in sizes:
        group = group + size if size and group + size <= GATHER_TOKENS else size
        most = max(most, group)
    return most


def prefill_chunk(
    config: ModelConfig,
    tokens: int,
    keys: int,
    dtype_bytes: int,
    rows: int = 1,
    masked: bool = False,
    form: AdapterForm = "plain",
    all_keys: int | None = None,
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute packed tokens of rows through the decoder, a row of which sees up to `keys` tokens, its own included.

    masked: whether the attention kernel takes a mask of tokens x keys where there is a past (a CPU's does); all_keys is
    what all rows see, at most.
    """
    language = config.language
    numbers = max(_layer_numbers(config, form))
    shared = _rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    widest, attention = numbers * dtype_bytes + shared, _attention_bytes(language, dtype_bytes, cache_format) + shared
    has_past = keys > tokens
    gathered = _gather_bytes(language, rows, keys, dtype_bytes, cache_format) if has_past else 0
    places = _place_bytes(rows, keys, all_keys) if has_past else 0
    mask = 2 * tokens * keys if masked and has_past else 0
    norm = 8 * language.hidden_size + 4 * language.hidden_size * dtype_bytes
    cost = Cost(
        "prefill chunk",
        max(tokens * max(widest, norm), tokens * attention + gathered + mask) + places,
        f"{tokens} tokens x {numbers} numbers of {dtype_bytes} bytes alive at once in the MLP, or attention with "
        f"{keys} tokens of a layer copied out of their pages",
    )
    beside = tokens * _product_bytes(config, dtype_bytes, form) + _input_bytes(config, tokens, dtype_bytes) + places
    return _with_block(cost, beside, config, config.scheme, dtype_bytes)


def decode_step(
    config: ModelConfig,
    rows: int,
    keys: int,
    dtype_bytes: int,
    form: AdapterForm = "plain",
    all_keys: int | None = None,
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute one token of each row; keys is the longest row's number of tokens, all_keys that of all rows at most."""
    language = config.language
    widest = max(_layer_numbers(config, form)) * dtype_bytes
    shared = _rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    each = max(widest, _attention_bytes(language, dtype_bytes, cache_format)) + shared
    tokens, places = _gathered_tokens(rows, keys, cache_format), _place_bytes(rows, keys, all_keys)
    masks = tokens * (1 + dtype_bytes) + places
    cost = Cost(
        "decode step",
        rows * each + _gather_bytes(language, rows, keys, dtype_bytes, cache_format) + masks,
        f"{rows} rows' activations, and one layer's keys and values copied out of their pages, "
        f"2 x {_key_size(language)} x {dtype_bytes} bytes a token: {tokens} tokens at once",
    )
    beside = rows * _product_bytes(config, dtype_bytes, form) + _input_bytes(config, rows, dtype_bytes) + places
    return _with_block(cost, beside, config, config.scheme, dtype_bytes)


def kernel_step(
    config: ModelConfig,
    tokens: int,
    pasts: Pasts,
    dtype_bytes: int,
    form: AdapterForm = "plain",
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute packed tokens of rows, new or not, through memphi's own kernels."""
    language = config.language
    numbers, query = max(_kernel_numbers(config, form)), _query_size(language)
    shared = _rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    # The running sum, the product that is turned in place, the next one's operand, and what attention gives.
    mixing = language.hidden_size + _qkv_size(language) + 2 * query + (_ranks(config) if form == "packed" else 0)
    longest = pasts.copied_at_once
    if longest is None:
        longest = max(pasts.longest_copied, min(pasts.all_copied, GATHER_TOKENS))
    copied = (2 * _key_size(language) * dtype_bytes + _code_bytes(language, cache_format)) * longest
    asked = (pasts.single_lines + LINE_TOKENS * pasts.lines) * 3 * query * dtype_bytes
    attention = tokens * (mixing * dtype_bytes + shared) + max(copied, asked)
    products = _kernel_product_bytes(config, tokens, dtype_bytes)
    staying = _lines_bytes(language, pasts, page_tokens(cache_format)) + PLACE_BYTES * pasts.all_copied
    return Cost(
        "kernel step",
        max(tokens * (numbers * dtype_bytes + shared) + products, attention) + staying,
        f"{tokens} tokens x {numbers} numbers of {dtype_bytes} bytes alive at once in the MLP, or attention with "
        f"{longest} tokens of a layer copied out of their pages; and what pieces of attention found, for "
        f"{pasts.single_lines} rows of one token and {pasts.lines} lines of {LINE_TOKENS}"
        + (f"; and {size_text(products)} for a block of weights in {config.scheme}, dequantised" if products else ""),
    )


def _lines_bytes(language: LanguageConfig, pasts: Pasts, page_size: int) -> int:
    """What stays all the step: tables of pages, and for rows in lines their places, and what pieces of them found."""
    n_bytes = 4 * pasts.rows * -(-pasts.tokens // page_size)
    for count, new_tokens in ((pasts.single_lines, 1), (pasts.lines, LINE_TOKENS)):
        if count:
            units = count + GRAPH_PROGRAMS // language.kv_heads
            n_bytes += units * (new_tokens * language.heads * (language.head_dim + 2) * 4 + 32)
            n_bytes += count * (new_tokens * 24 + 4 + 4 * language.kv_heads)
            n_bytes += count * 4 * -(-pasts.longest_lined // page_size)
    return n_bytes


def logits(config: ModelConfig, rows: int, step_tokens: int, dtype_bytes: int) -> Cost:
    """Score rows over the vocabulary and draw from them."""
    vocabulary, hidden = config.language.vocab_size, config.language.hidden_size
    states = (2 * step_tokens + rows) * hidden * dtype_bytes
    cost = Cost(
        "logits",
        rows * vocabulary * (dtype_bytes + 4 + 4) + vocabulary * (1 + DRAW_BYTES) + states,
        f"{rows} rows x {vocabulary} ids x ({dtype_bytes} bytes, 4 in fp32, and 4 masked), "
        f"{DRAW_BYTES} bytes an id to draw from one row at a time, and the states of {step_tokens} tokens",
    )
    beside = rows * vocabulary * dtype_bytes + states
    return _with_block(cost, beside, config, config.other_scheme, dtype_bytes)


def allocator_rounding(kind: str, peak_bytes: int) -> Cost:
    """What an allocator needs beyond the tensors' own bytes (an assumption, held against what is measured)."""
    if kind == "cuda":
        return Cost(
            "allocator",
            peak_bytes // 8 + 32 * MIB,
            "an eighth of the largest step and 32 MiB: PyTorch's blocks come from segments of 2 MiB, of 20 MiB up to "
            "10 MiB, and above that rounded up to 2 MiB, and pieces too small to serve lie between them (assumed)",
        )
    return Cost("allocator", peak_bytes // 16 + 16 * MIB, "a sixteenth of the largest step and 16 MiB (assumed)")


def _layer_numbers(config: ModelConfig, form: AdapterForm) -> tuple[int, ...]:
    """Numbers a token that each linear of a layer has alive at its widest, an adapter applied to some of the tokens.

    Three of a plain linear's outputs stand at once: its own, the adapter's, and that scaled or the sum. A packed one
    has its output alone, and beside its input what the adapters make of it. Merged, a linear has its output alone.
    """
    language = config.language
    hidden, inner, query = language.hidden_size, language.intermediate_size, _query_size(language)
    qkv = _qkv_size(language)
    rotated = query + _key_size(language)
    # Beside its input, with the embeddings, the layer's input and the residual after attention alive all the while.
    linears = (
        (3 * hidden, hidden, qkv),
        (3 * hidden + qkv + rotated + query, query, hidden),
        (4 * hidden, hidden, 2 * inner),
        (4 * hidden + 2 * inner, inner, hidden),
    )
    gated = 4 * hidden + 2 * inner + 2 * inner
    if form == "packed":
        ranks = _ranks(config)
        packed = [others + n_in + ranks + n_out for others, n_in, n_out in linears]
        packed[1] += query  # What attention gives is copied into its operand; the others' inputs arise in theirs.
        return (gated + ranks, *packed)
    outputs = 3 if form == "plain" else 1
    return (gated, *(others + n_in + outputs * n_out for others, n_in, n_out in linears))


def _kernel_numbers(config: ModelConfig, form: AdapterForm) -> tuple[int, ...]:
    """The same through memphi's own kernels, where the running sum is one tensor and nothing is kept for its parts."""
    language = config.language
    hidden, inner, query, qkv = (
        language.hidden_size,
        language.intermediate_size,
        _query_size(language),
        _qkv_size(language),
    )
    ranks = _ranks(config) if form == "packed" else 0
    outputs = 3 if form == "plain" else 1
    # Beside its input and output: the running sum, and the product before it.
    linears = (
        (hidden, hidden, qkv),
        (hidden + qkv, query, hidden),
        (hidden, hidden, 2 * inner),
        (hidden + 2 * inner, inner, hidden),
    )
    return tuple(others + n_in + ranks + outputs * n_out for others, n_in, n_out in linears)


def _product_bytes(config: ModelConfig, dtype_bytes: int, form: AdapterForm) -> int:
    """Bytes a token while a linear's base is multiplied, before what its adapters add to it."""
    numbers = max(_layer_numbers(config, "packed" if form == "packed" else "merged"))
    return numbers * dtype_bytes + _rotary_bytes(config.language, dtype_bytes) + METADATA_BYTES


def _attention_bytes(language: LanguageConfig, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """A token while attention runs: what a linear beside it has, and the output twice.

    In 8 bits there are also keys and values as they are kept, and before all this they are made, one after the other:
    in fp32, as codes and as what these stand for.
    """
    query, key = _query_size(language), _key_size(language)
    before = (3 * language.hidden_size + _qkv_size(language) + query + key) * dtype_bytes
    attending = 2 * query * dtype_bytes
    if cache_format == "plain":
        return before + attending
    writing = key * (4 + 4 + dtype_bytes) + language.kv_heads * 16
    return before + max(attending + 2 * key * dtype_bytes, key * dtype_bytes + writing)


def _rotary_bytes(language: LanguageConfig, dtype_bytes: int) -> int:
    return 2 * language.rotary_dim * dtype_bytes


def _gathered_tokens(rows: int, keys: int, cache_format: CacheFormat) -> int:
    """Tokens copied out of their pages at once: the longest row alone, or short rows together."""
    return max(keys, min(rows * keys, GATHER_TOKENS)) + page_tokens(cache_format)


def _gather_bytes(language: LanguageConfig, rows: int, keys: int, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """One layer's keys and values copied out of their pages, in the blocks that the allocator gives."""
    tokens = _gathered_tokens(rows, keys, cache_format)
    numbers_bytes = 2 * _block_bytes(tokens * _key_size(language) * dtype_bytes)
    return numbers_bytes + _block_bytes(tokens * _code_bytes(language, cache_format))


def _code_bytes(language: LanguageConfig, cache_format: CacheFormat) -> int:
    """A token that is copied out as codes and scales, of which there is one of either, keys or values, at a time."""
    return 0 if cache_format == "plain" else _key_size(language) + language.kv_heads * SCALE_BYTES


def _block_bytes(n_bytes: int) -> int:
    """Of PyTorch's allocator on CUDA, for large tensors: what is left of a multiple of 2 MiB goes along."""
    return -(-n_bytes // (2 * MIB)) * 2 * MIB if n_bytes >= 10 * MIB else n_bytes


def _place_bytes(rows: int, keys: int, all_keys: int | None) -> int:
    """Where the tokens lie that rows see; of each row, if nothing else is known, as many as of the longest."""
    return PLACE_BYTES * min(rows * keys, rows * keys if all_keys is None else all_keys)


def _query_size(language: LanguageConfig) -> int:
    return language.heads * language.head_dim


def _key_size(language: LanguageConfig) -> int:
    return language.kv_heads * language.head_dim


def _qkv_size(language: LanguageConfig) -> int:
    return _query_size(language) + 2 * _key_size(language)


# --- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestPrice:
    """What one request takes while it runs, besides its share of a step."""

    tokens: int
    """The prompt and as much of an answer as was asked to be priced."""
    pages: int
    media_tokens: int
    crops: int
    windows: int
    vision_passes: int
    """If it is alone."""
    audio_passes: int
    costs: tuple[Cost, ...]
    """Its pages, its media embeddings, and the host's memory for its attachments."""

    @property
    def device_bytes(self) -> int:
        """Pages and media embeddings."""
        return sum(cost.bytes for cost in self.costs[:2])

    @property
    def host_bytes(self) -> int:
        return self.costs[2].bytes


def price_request(
    footprint: Footprint,
    config: ModelConfig,
    answer_tokens: int = FIRST_ANSWER_TOKENS,
    crops_per_pass: int = 1,
    windows_per_pass: int = 1,
    dtype_bytes: int = 2,
    preprocessing: Place = "host",
    cache_format: CacheFormat = "plain",
) -> RequestPrice:
    """Price one request with so much of an answer; together they hold no more than the model's context."""
    tokens = min(footprint.prompt_tokens + answer_tokens, config.language.max_tokens)
    size = page_tokens(cache_format)
    pages = -(-tokens // size)
    media_tokens = footprint.image_tokens + footprint.audio_tokens
    windows = sum(-(-clip.tokens // config.audio.window_tokens) for clip in footprint.clips)
    page_bytes = page(config, dtype_bytes, size, cache_format).bytes
    return RequestPrice(
        tokens=tokens,
        pages=pages,
        media_tokens=media_tokens,
        crops=footprint.crops,
        windows=windows,
        vision_passes=-(-footprint.crops // crops_per_pass),
        audio_passes=-(-windows // windows_per_pass),
        costs=(
            Cost("keys and values", pages * page_bytes, f"{tokens} tokens on {pages} pages of {page_bytes} bytes"),
            media_embeddings(config, media_tokens, dtype_bytes),
            host_media(footprint, config, preprocessing),
        ),
    )


def host_media(footprint: Footprint, config: ModelConfig, preprocessing: Place) -> Cost:
    """The host's memory for decoded attachments: what is kept of all, and what one takes while it is decoded."""
    return _decoded_media(footprint) if preprocessing == "device" else _prepared_media(footprint, config)


def _decoded_media(footprint: Footprint) -> Cost:
    """Pixels and samples, of which the device makes the rest."""
    pixels = [3 * image.width * image.height for image in footprint.images]
    samples = [(clip.frames * SAMPLES_A_FRAME + WINDOW_SAMPLES) * 4 for clip in footprint.clips]
    return Cost(
        "host memory",
        sum(pixels) + sum(samples) + _largest((*(2 * n for n in pixels), *samples)),
        "pixels x 3 bytes, samples at 16 kHz x 4 bytes, and while one attachment is decoded twice its pixels, or its "
        "samples again",
    )


def _prepared_media(footprint: Footprint, config: ModelConfig) -> Cost:
    """Crops and mel frames."""
    crop_numbers = 3 * config.vision.crop_size**2
    kept = footprint.crops * crop_numbers * 4 + sum(clip.frames for clip in footprint.clips) * config.audio.mel_bins * 4
    pictures = (2 * 3 * image.width * image.height + 2 * image.crops * crop_numbers for image in footprint.images)
    clips = (clip.frames * config.audio.mel_bins * 4 for clip in footprint.clips)
    return Cost(
        "host memory",
        kept + _largest((*pictures, *clips)),
        f"{footprint.crops} crops x {crop_numbers} x 4 bytes, mel frames x {config.audio.mel_bins} x 4 bytes, and "
        "while one attachment is decoded twice its pixels and its crops in bytes, or its frames again",
    )


def _largest(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)
