"""What takes memory, and how much: one function per thing that allocates, each with its formula in words.

Knows the model's sizes and in which order its modules hold their tensors; touches none. The planner sizes everything
by these functions, admission prices a request by them, and tests hold each against what is really allocated. They price
the sdpa attention; eager's scores are not among them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from memphi.config import (
    AdapterConfig,
    AdapterForm,
    AudioConfig,
    CacheFormat,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from memphi.request import Footprint

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_TOKENS = 16
"""Of 16 bits or more; of 8 bits a page has twice as many, and so the same bytes: 2 MiB at full size."""
SCALE_BYTES = 2
"""A code's scale, of which each token has one for every head of keys and of values."""
GATHER_TOKENS = 32768
"""Tokens whose keys and values are copied out of the pool at once for rows of one token; a longer row goes alone."""
CONVOLVED_VALUES = 512 * 1024
"""Tokens of sound times channels that are subsampled at once."""
FIRST_ANSWER_TOKENS = 256
"""The first stretch of an answer, reserved together with its prompt; further output is reserved as it is needed."""
METADATA_BYTES = 64
"""Positions, pages, offsets and adapters' indices of one packed token."""
DRAW_BYTES = 64
"""Sorting and filtering one row's scores, per id: scaled, sorted, their ids, the sort's own copies, sums in fp64."""
MERGED_NUMBERS = 4 * MIB
"""Numbers of a weight that are merged with an adapter at once."""
GRAPHS_BYTES = 128 * MIB
"""What CUDA keeps of all graphs, some hundred launches each, and cuBLAS' work space for them."""
GRAPH_PROGRAMS = 1024
"""Programs among which a step's attention is divided, on the largest card: four for each of its multiprocessors."""
CONTEXT_BYTES = {"cuda": 600 * MIB, "mps": 600 * MIB, "cpu": 400 * MIB}
MEASURED_CONTEXTS = {"H100": 600 * MIB}
"""The CUDA context with kernels and cuBLAS' work space, by a word of the device's name."""


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
"""Sizes of tensors: (numbers in one, how many there are)."""


def weight_tensors(config: ModelConfig, form: AdapterForm = "plain") -> dict[str, Tensors]:
    """The sizes of all weights, by group; a merged adapter has none of its own, and the other is left out."""
    language = config.language
    return {
        "language": _language_tensors(language),
        "embedding": ((language.vocab_size * language.hidden_size, 1),),
        "vision adapter": () if form == "merged" else _adapter_tensors(language, config.vision_adapter),
        "speech adapter": () if form == "merged" else _adapter_tensors(language, config.speech_adapter),
        "vision tower": _vision_tensors(config.vision),
        "audio encoder": _audio_tensors(config.audio),
        "projectors": _projector_tensors(config),
    }


def weights(config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain") -> tuple[Cost, ...]:
    """The weights, group by group."""
    return tuple(_weights_of(group, tensors, dtype_bytes) for group, tensors in weight_tensors(config, form).items())


def _weights_of(group: str, tensors: Tensors, dtype_bytes: int) -> Cost:
    numbers = sum(size * count for size, count in tensors)
    formula = (
        f"{numbers:,} numbers of {dtype_bytes} bytes" if tensors else "none: one adapter is merged into the weights"
    )
    return Cost(f"weights: {group}", numbers * dtype_bytes, formula)


def weights_rounding(config: ModelConfig, dtype_bytes: int, form: AdapterForm = "plain") -> Cost:
    """What PyTorch's CUDA allocator adds to the weights (an assumption about its segments, see the formula)."""
    groups = weight_tensors(config, form)
    if form == "packed":
        groups |= packed_tensors(config)
    sizes = [(size * dtype_bytes, count) for tensors in groups.values() for size, count in tensors]
    large = sum((-size % (2 * MIB)) * count for size, count in sizes if size >= 10 * MIB)
    middle = sum(size * count for size, count in sizes if MIB < size < 10 * MIB)
    small = sum((-size % 512) * count for size, count in sizes if size <= MIB)
    return Cost(
        "weights: allocator",
        large + middle // 16 + small + 22 * MIB,
        "tensors from 10 MiB on rounded up to 2 MiB; a sixteenth of those above 1 MiB, which share segments of 20 MiB; "
        "smaller ones rounded to 512 bytes; one segment of either kind half used",
    )


def _linears(language: LanguageConfig) -> tuple[tuple[int, int], ...]:
    """The four linears of a decoder layer: (in, out)."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return ((hidden, _qkv_size(language)), (_query_size(language), hidden), (hidden, 2 * inner), (inner, hidden))


def _language_tensors(language: LanguageConfig) -> Tensors:
    linears = tuple((size_in * size_out, language.layers) for size_in, size_out in _linears(language))
    return (*linears, (language.hidden_size, 2 * language.layers + 1))


def _adapter_tensors(language: LanguageConfig, adapter: AdapterConfig) -> Tensors:
    return tuple((size * adapter.rank, language.layers) for linear in _linears(language) for size in linear)


def packed_tensors(config: ModelConfig) -> dict[str, Tensors]:
    """The decoder and its adapters as they lie in memory, where adapters stand beside the weights they adapt."""
    language, ranks = config.language, _ranks(config)
    linears = _linears(language)
    wide = tuple(((size_in + ranks) * size_out, language.layers) for size_in, size_out in linears)
    narrow = tuple((ranks * size_in, language.layers) for size_in, _ in linears)
    norms = (language.hidden_size, 2 * language.layers + 1)
    return {"language": (*wide, *narrow, norms), "vision adapter": (), "speech adapter": ()}


def _ranks(config: ModelConfig) -> int:
    return config.vision_adapter.rank + config.speech_adapter.rank


def _vision_tensors(vision: VisionConfig) -> Tensors:
    size, inner, layers = vision.hidden_size, vision.intermediate_size, vision.layers
    return (
        (3 * vision.patch_size**2 * size, 1),
        (vision.patches**2 * size, 1),
        (size * size, 4 * layers),
        (size * inner, 2 * layers),
        (size, 1 + (4 + 4 + 1) * layers),  # biases and norms
        (inner, layers),
    )


def _audio_tensors(audio: AudioConfig) -> Tensors:
    size, inner, channels, layers = audio.hidden_size, audio.intermediate_size, audio.conv_channels, audio.layers
    subsampling = (
        (audio.mel_bins, 2),
        (9 * channels, 3),
        (channels * channels, 2),
        (channels, 5),
        (channels * -(-audio.mel_bins // 8) * size, 1),
        (size, 1),
        (2 * audio.bias_distance * audio.heads, 1),
    )
    layer = (
        (2 * size * inner, 2 * layers),  # the feed-forwards' up, whose output is value and gate
        (size * inner, 2 * layers),
        (2 * inner, 2 * layers),
        (size * size, (4 + 2) * layers),  # attention's four, the convolution's pointwise and out
        (2 * size * size, layers),
        (2 * size, layers),
        (audio.kernel_size * size, layers),
        (size, (4 + 2 + 4 + 2 + 2 + 1 + 2 + 2 + 2) * layers),  # biases and norms
    )
    return subsampling + layer


def _projector_tensors(config: ModelConfig) -> Tensors:
    hidden, vision, audio = config.language.hidden_size, config.vision.hidden_size, config.audio.hidden_size
    return ((vision * hidden, 1), (audio * hidden, 2), (hidden * hidden, 3), (hidden, 6), (vision, 2))


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
        return Cost("context", measured, "the CUDA context, kernels and cuBLAS' work space (measured on this card)")
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
    each = (activations + language.vocab_size) * dtype_bytes + 2 * pages * 4 + METADATA_BYTES
    return Cost(
        "graphs",
        rows * each + attention + GRAPHS_BYTES,
        f"{rows} rows x ({activations} activations and {language.vocab_size} scores of {dtype_bytes} bytes, twice "
        f"{pages} pages of 4), {units} pieces of attention, and {size_text(GRAPHS_BYTES)} for CUDA and cuBLAS "
        "(an estimate: not measured)",
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


def vision_pass(config: ModelConfig, crops: int, dtype_bytes: int) -> Cost:
    """Encode crops: the tower's MLP holds the most, two residuals, a norm and both sides of the GELU."""
    vision, hidden = config.vision, config.language.hidden_size
    size, patches = vision.hidden_size, vision.patches**2
    layer = max(3 * size + 2 * vision.intermediate_size, 8 * size)
    projector = 2 * size + (3 * hidden + 2 * size) // 4 + 1
    pixels = 3 * vision.crop_size**2
    first = pixels * dtype_bytes + 3 * patches * size * dtype_bytes
    each = max(patches * max(layer, projector) * dtype_bytes, first) + pixels * 4 + patches * 10
    return Cost(
        "vision pass",
        crops * each,
        f"{crops} crops x ({patches} patches x (3 x {size} + 2 x {vision.intermediate_size}) x {dtype_bytes} bytes, "
        f"and the crop itself in fp32)",
    )


def audio_pass(config: ModelConfig, windows: int, dtype_bytes: int) -> Cost:
    """Encode windows of sound: either the first convolution's output twice, or a conformer layer."""
    audio, hidden = config.audio, config.language.hidden_size
    tokens = min(max(CONVOLVED_VALUES // audio.conv_channels, 1), windows * (audio.window_tokens + 2))
    height, width = 4 * (tokens + 2), -(-audio.mel_bins // 2)
    convolved = 2 * audio.conv_channels * height * width * dtype_bytes
    sound = 2 * height * audio.mel_bins * 3 * dtype_bytes
    features = windows * audio.window_tokens * audio.hidden_size * dtype_bytes
    projected = (windows + 2) * audio.window_tokens * hidden * dtype_bytes
    conformer = _conformer_bytes(audio, windows, dtype_bytes)
    return Cost(
        "audio pass",
        features + max(convolved + sound, conformer + features, projected),
        f"the larger of the first convolution for {tokens} tokens, twice {audio.conv_channels} channels x {height} x "
        f"{width} x {dtype_bytes} bytes, and a conformer layer over {windows} windows of {audio.window_tokens} tokens "
        "with its biases",
    )


def _conformer_bytes(audio: AudioConfig, windows: int, dtype_bytes: int) -> int:
    """One layer: residuals with the feed-forward's value and gate, or with query, key and value, and the biases."""
    tokens, size = audio.window_tokens, audio.hidden_size
    layer = windows * tokens * max(2 * size + 4 * audio.intermediate_size, 8 * size) * dtype_bytes
    bias = audio.heads * tokens * (tokens + 8) * dtype_bytes
    # The bias by distance, and for each window a copy with its padding masked and one aligned for the kernel.
    return layer + bias * (1 + 2 * windows) + 16 * tokens**2


def prefill_chunk(
    config: ModelConfig,
    tokens: int,
    keys: int,
    dtype_bytes: int,
    rows: int = 1,
    masked: bool = False,
    form: AdapterForm = "plain",
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute packed tokens of rows through the decoder, a row of which sees up to `keys` tokens, its own included.

    masked: whether the attention kernel takes a mask of tokens x keys where there is a past (a CPU's does).
    """
    language = config.language
    numbers = max(_layer_numbers(config, form))
    widest = numbers * dtype_bytes + _rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    attention = _attention_bytes(language, dtype_bytes, cache_format) + METADATA_BYTES
    gathered = _gather_bytes(language, rows, keys, dtype_bytes, cache_format) if keys > tokens else 0
    mask = 2 * tokens * keys if masked and keys > tokens else 0
    norm = 8 * language.hidden_size + 4 * language.hidden_size * dtype_bytes
    return Cost(
        "prefill chunk",
        max(tokens * max(widest, norm), tokens * attention + gathered + mask),
        f"{tokens} tokens x {numbers} numbers of {dtype_bytes} bytes alive at once in the MLP, or attention with "
        f"{keys} tokens of a layer copied out of their pages",
    )


def decode_step(
    config: ModelConfig,
    rows: int,
    keys: int,
    dtype_bytes: int,
    form: AdapterForm = "plain",
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute one token of each row; keys is the longest row's number of tokens."""
    language = config.language
    widest = max(_layer_numbers(config, form)) * dtype_bytes + _rotary_bytes(language, dtype_bytes)
    each = max(widest, _attention_bytes(language, dtype_bytes, cache_format)) + METADATA_BYTES
    tokens = _gathered_tokens(rows, keys, cache_format)
    masks = tokens * (1 + dtype_bytes)
    return Cost(
        "decode step",
        rows * each + _gather_bytes(language, rows, keys, dtype_bytes, cache_format) + masks,
        f"{rows} rows' activations, and one layer's keys and values copied out of their pages, "
        f"2 x {_key_size(language)} x {dtype_bytes} bytes a token: {tokens} tokens at once",
    )


def logits(config: ModelConfig, rows: int, step_tokens: int, dtype_bytes: int) -> Cost:
    """Score rows over the vocabulary and draw from them."""
    vocabulary, hidden = config.language.vocab_size, config.language.hidden_size
    states = (2 * step_tokens + rows) * hidden * dtype_bytes
    return Cost(
        "logits",
        rows * vocabulary * (dtype_bytes + 4 + 4) + vocabulary * (1 + DRAW_BYTES) + states,
        f"{rows} rows x {vocabulary} ids x ({dtype_bytes} bytes, 4 in fp32, and 4 masked), "
        f"{DRAW_BYTES} bytes an id to draw from one row at a time, and the states of {step_tokens} tokens",
    )


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


def _attention_bytes(language: LanguageConfig, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """A token while attention runs: keys and values repeated for their query heads, the output twice.

    In 8 bits there are also keys and values as they are kept, and before all this they are made, one after the other:
    in fp32, as codes and as what these stand for.
    """
    query, key = _query_size(language), _key_size(language)
    before = 3 * language.hidden_size + _qkv_size(language) + query + key
    attending = 2 * query + 2 * query
    rotary = _rotary_bytes(language, dtype_bytes)
    if cache_format == "plain":
        return (before + attending) * dtype_bytes + rotary
    writing = key * (4 + 4 + dtype_bytes) + language.kv_heads * 16
    return before * dtype_bytes + max((attending + 2 * key) * dtype_bytes, key * dtype_bytes + writing) + rotary


def _rotary_bytes(language: LanguageConfig, dtype_bytes: int) -> int:
    return 2 * language.rotary_dim * dtype_bytes


def _gathered_tokens(rows: int, keys: int, cache_format: CacheFormat) -> int:
    """Tokens copied out of their pages at once: the longest row alone, or short rows together."""
    return max(keys, min(rows * keys, GATHER_TOKENS)) + page_tokens(cache_format)


def _gather_bytes(language: LanguageConfig, rows: int, keys: int, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """One layer's keys and values copied out of their pages; of codes and scales there is one of either at a time."""
    codes = 0 if cache_format == "plain" else _key_size(language) + language.kv_heads * SCALE_BYTES
    return _gathered_tokens(rows, keys, cache_format) * (2 * _key_size(language) * dtype_bytes + codes)


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
            host_media(footprint, config),
        ),
    )


def host_media(footprint: Footprint, config: ModelConfig) -> Cost:
    """The host's memory for decoded attachments: crops and mel frames of all, and one of them being decoded."""
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
