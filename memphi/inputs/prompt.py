"""Requests to prompts: `measure` counts from headers what a request costs, `prepare` makes what the model eats.

The two always agree: what `measure` says is what `prepare` then makes. Knows how text and media are put together; the
parts know the rest. Called by the engine: measure before admission, prepare after it.
"""

from collections.abc import Iterable, Sequence

from memphi.config import ModelConfig, Place
from memphi.errors import DoesNotFitError
from memphi.inputs.audio import decode_clip, measure_clip, prepare_clip
from memphi.inputs.chat import Piece, Special, lay_out
from memphi.inputs.image import decode_image, measure_image, prepare_image
from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits
from memphi.inputs.tokenizer import WHITE_SPACE, Tokenizer
from memphi.request import ClipFootprint, Footprint, ImageFootprint, Media, MediaKind, MediaSpan, Prompt, Request

PREPROCESSING_VERSION = 2
"""Part of every key under which something made from media is kept, in memory or in a file.

Raise it when the same content in the same detail comes to give other crops, masks, log-mel frames or numbers of tokens
(`image`, `audio`), even in the last bit; what was kept under the old number is then never found again.
"""


def measure(
    request: Request,
    config: ModelConfig,
    tokenizer: Tokenizer,
    limits: MediaLimits = DEFAULT_LIMITS,
    reference: bool = False,
) -> Footprint:
    """Count a request's tokens, crops and frames: pictures from their headers, sound as `audio` can count it.

    Raises RequestError for a wrong conversation, MediaError for an attachment, DoesNotFitError beyond the context.
    """
    return measure_encoded(request, encode(lay_out(request), tokenizer), config, limits, reference)


def measure_encoded(
    request: Request,
    ids: Sequence[int],
    config: ModelConfig,
    limits: MediaLimits = DEFAULT_LIMITS,
    reference: bool = False,
) -> Footprint:
    """As `measure`, of a request whose ids `encode` has given."""
    images = [measure_image(media, config.vision, limits, reference) for media in _of_kind(request, "image")]
    clips = [measure_clip(media, config.audio, limits) for media in _of_kind(request, "audio")]
    return _footprint(request, config, len(ids), images, clips)


def prepare(
    request: Request,
    config: ModelConfig,
    tokenizer: Tokenizer,
    limits: MediaLimits = DEFAULT_LIMITS,
    reference: bool = False,
    preprocessing: Place = "host",
    ids: Sequence[int] = (),
) -> Prompt:
    """Encode, decode and lay out a request; `reference` prepares pictures as the official processor does.

    preprocessing says where crops and log-mel frames are made: for the device, media are only decoded here. ids are
    the request's, where `encode` has given them already.
    Raises what `measure` raises, and MediaError for content that is damaged behind a good header.
    """
    ids = ids or encode(lay_out(request), tokenizer)
    hear = prepare_clip if preprocessing == "host" else decode_clip
    clips = [hear(media, config.audio, limits) for media in _of_kind(request, "audio")]
    pictures = _of_kind(request, "image")
    measured = [measure_image(media, config.vision, limits, reference) for media in pictures]
    footprint = _footprint(request, config, len(ids), measured, [clip.footprint for clip in clips])
    # Only now, that all is known to fit: pictures are what takes memory.
    see = prepare_image if preprocessing == "host" else decode_image
    images = [see(media, config.vision, limits, reference) for media in pictures]
    spans = place(ids, request.media, footprint, tokenizer)
    return Prompt(tuple(repeat(ids, spans)), spans, tuple(images), tuple(clips), footprint)


def encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    """Ids of a laid-out conversation, one placeholder for each attachment (spec 6.2).

    Equal to the official tokenizer's ids of the whole as one string, as long as no text looks like a special token.
    """
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, Media):
            ids.append(tokenizer.image_id if piece.kind == "image" else tokenizer.audio_id)
        elif isinstance(piece, Special):
            ids.append(tokenizer.special(piece.token))
        else:
            swallowed = bool(ids) and tokenizer.swallows_space(ids[-1])
            ids += tokenizer.encode_text(piece.lstrip(WHITE_SPACE) if swallowed else piece)
    return ids


def place(
    ids: Sequence[int], media: Sequence[Media], footprint: Footprint, tokenizer: Tokenizer
) -> tuple[MediaSpan, ...]:
    """Where each attachment's rows will stand, in order, once its placeholder in `ids` is repeated."""
    counts = {"image": [image.tokens for image in footprint.images], "audio": [clip.tokens for clip in footprint.clips]}
    kinds = {tokenizer.image_id, tokenizer.audio_id} if media else set()
    placeholders = [at for at, token in enumerate(ids) if token in kinds]
    seen = {"image": 0, "audio": 0}
    spans: list[MediaSpan] = []
    added = 0
    for at, item in zip(placeholders, media, strict=True):
        index = seen[item.kind]
        tokens = counts[item.kind][index]
        spans.append(MediaSpan(item.kind, index, at + added, tokens))
        seen[item.kind] += 1
        added += tokens - 1
    return tuple(spans)


def repeat(ids: Sequence[int], spans: Iterable[MediaSpan]) -> list[int]:
    """Repeat each placeholder as often as its attachment has tokens."""
    result = list(ids)
    for span in spans:  # in order: everything before a span has already grown
        result[span.start : span.start + 1] = [result[span.start]] * span.tokens
    return result


def _of_kind(request: Request, kind: MediaKind) -> list[Media]:
    return [media for media in request.media if media.kind == kind]


def _footprint(
    request: Request,
    config: ModelConfig,
    ids: int,
    images: Sequence[ImageFootprint],
    clips: Sequence[ClipFootprint],
) -> Footprint:
    """Put the parts together; `ids` counts one placeholder for each attachment. Raises DoesNotFitError."""
    footprint = Footprint(request.mode, ids - len(request.media), tuple(images), tuple(clips))
    if footprint.prompt_tokens >= config.language.max_tokens:
        parts = (
            f"{footprint.text_tokens} of text",
            f"{footprint.image_tokens} of pictures",
            f"{footprint.audio_tokens} of sound",
        )
        raise DoesNotFitError(
            f"the prompt has {footprint.prompt_tokens} tokens ({', '.join(parts)}) and the model's context holds "
            f"{config.language.max_tokens}, the answer included; shorten the text, send fewer or smaller attachments"
        )
    return footprint
