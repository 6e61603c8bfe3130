"""Weights: as they are stored, where they lie, and what it takes to load them."""

from collections.abc import Sequence

from memphi.config import (
    ROOMS,
    AdapterConfig,
    AdapterForm,
    AudioConfig,
    LanguageConfig,
    ModelConfig,
    Placement,
    Scheme,
    VisionConfig,
    group_size,
)
from memphi.memory.costs.cost import MIB, Cost, size_text
from memphi.memory.costs.sizes import all_ranks, decoder_linears

MERGED_NUMBERS = 4 * MIB
"""Numbers of a weight that are merged with an adapter at once, in fp32."""
ROOM_STEP = 256
"""Bytes at whose multiples tensors begin in a room."""
QUANTISED_NUMBERS = 2 * MIB
"""Numbers of a weight that are quantised at once."""
LOADING_TOKENS = 256
"""Of example texts, at most, that a decoder is shown while it is quantised, all at once: which of a linear's inputs are
large is no clearer by more."""
EXAMPLE_BATCH_TOKENS = 1024
"""Of example texts that go through a layer at once, where it is calibrated; a longer text goes alone."""
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
        for n_in, n_out in decoder_linears(config.language)
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
    """What PyTorch's CUDA allocator adds to the weights: those that stay lie in one piece, and each room is one."""
    groups, rooms = weight_bytes(config, dtype_bytes, form), ROOMS[placement]
    if form == "packed":
        groups |= packed_bytes(config, dtype_bytes)
    if placement == "streamed":
        groups["language"] = ((config.language.hidden_size * dtype_bytes, 1),)
    staying = [tensors for name, tensors in groups.items() if not any(name in names for names in rooms)]
    steps = sum((-size % ROOM_STEP) * count for tensors in staying for size, count in tensors)
    pieces = [steps + sum(map(_total, staying)), *(room(config, dtype_bytes, form, names).bytes for names in rooms)]
    pieces += 2 * [layer_room_bytes(config, dtype_bytes)] if placement == "streamed" else []
    return Cost(
        "weights: allocator",
        steps + sum(map(_segment_rounding, pieces)),
        f"those that stay lie in one piece, each tensor at a multiple of {ROOM_STEP} bytes; that and each room is "
        "rounded up to 2 MiB, or below 10 MiB to 20",
    )


def _segment_rounding(n_bytes: int) -> int:
    """What is left of the segment that the allocator asks the device for, for one tensor of so many bytes."""
    if n_bytes <= MIB:
        return 2 * MIB - n_bytes
    return 20 * MIB - n_bytes if n_bytes < 10 * MIB else -n_bytes % (2 * MIB)


def packed_bytes(config: ModelConfig, dtype_bytes: int) -> dict[str, Tensors]:
    """The decoder and its adapters as they lie in memory, where adapters stand beside the weights they adapt.

    Beside weights in few bits, adapters have matrices of their own, and scales for each output of either.
    """
    language, ranks = config.language, all_ranks(config)
    linears, (matrices, others) = decoder_linears(language), _language_group(language)
    lying: Tensors
    if config.scheme == "bf16":
        sizes = [size for n_in, n_out in linears for size in ((n_in + ranks) * n_out, ranks * n_in)]
        lying = _in_bytes(tuple((size, language.layers) for size in sizes), dtype_bytes)
    else:
        sizes = [size for n_in, n_out in linears for size in (ranks * n_out, 2 * 2 * n_out, ranks * n_in, 2 * ranks)]
        base = _stored(matrices, config.scheme, dtype_bytes)
        lying = (*base, *((size, language.layers) for size in sizes))
    return {"language": (*lying, *_in_bytes(others, dtype_bytes)), "vision adapter": (), "speech adapter": ()}


def _scheme_of(group: str, config: ModelConfig) -> Scheme:
    """How a group's matrices are stored."""
    return config.scheme if group == "language" else config.other_scheme


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
        "vision adapter": none if form == "merged" else _adapter_group(language, config.vision_adapter),
        "speech adapter": none if form == "merged" else _adapter_group(language, config.speech_adapter),
        "vision tower": _vision_group(config.vision),
        "audio encoder": _audio_group(config.audio),
        "projectors": _projector_group(config),
    }


def _language_group(language: LanguageConfig) -> Group:
    linears = tuple((n_in, n_out, language.layers) for n_in, n_out in decoder_linears(language))
    return linears, ((language.hidden_size, 2 * language.layers + 1),)


def _adapter_group(language: LanguageConfig, adapter: AdapterConfig) -> Group:
    """A and B of each linear."""
    linears = decoder_linears(language)
    a = tuple((n_in, adapter.rank, language.layers) for n_in, _ in linears)
    return (*a, *((adapter.rank, n_out, language.layers) for _, n_out in linears)), ()


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
        (size, 2 * size, layers),  # the convolution's value and gate
        (size, size, 2 * layers),  # its pointwise and out
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
        (2 * size, layers),
        (audio.kernel_size * size, layers),
        (size, (4 + 2 + 4 + 2 + 2 + 1 + 2 + 2 + 2) * layers),  # biases and norms
    )
    return matrices, subsampling + layer


def _projector_group(config: ModelConfig) -> Group:
    hidden, vision, audio = config.language.hidden_size, config.vision.hidden_size, config.audio.hidden_size
    return ((vision, hidden, 1), (audio, hidden, 2), (hidden, hidden, 3)), ((hidden, 6), (vision, 2))


def merging(config: ModelConfig, dtype_bytes: int) -> Cost:
    """Merge an adapter while loading: a piece of W as stored, in fp32 and with B A added, and a layer's A and B."""
    rank = max(config.vision_adapter.rank, config.speech_adapter.rank)
    sizes = [
        (size_in, min(MERGED_NUMBERS // size_in + 1, size_out))
        for size_in, size_out in decoder_linears(config.language)
    ]
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
    numbers = min(QUANTISED_NUMBERS, largest_matrix(config))
    formula = f"while loading: {numbers} numbers of a weight x {each} bytes"
    if config.scheme != "int4":
        return Cost("quantising", numbers * each, formula)
    values = 4 * config.language.hidden_size + 3 * config.language.intermediate_size
    shown = LOADING_TOKENS * values * 4
    return Cost("quantising", numbers * each + shown, f"{formula}; {LOADING_TOKENS} tokens x {values} values x 4 bytes")


def calibrating(config: ModelConfig, dtype_bytes: int, tokens: int) -> Cost:
    """`memphi quantize` with calibration, on its device: a layer, its linears' Hessians, and the example texts' states.

    Beside them the most of three: a batch of examples in the layer, a Hessian's factor, a linear as it is rounded.
    """
    language, linears = config.language, decoder_linears(config.language)
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


def largest_matrix(config: ModelConfig) -> int:
    return max(n_in * n_out for matrices, _ in _groups(config, "plain").values() for n_in, n_out, _ in matrices)
