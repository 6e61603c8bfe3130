"""What was heard in a recording, segment by segment, and the forms in which it is told.

Knows how texts are joined and OpenAI's formats (json, verbose_json, text, srt, vtt); runs nothing. Called by
`transcriptions`.
"""

import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Delta, FinishReason, Footprint, TokenLogprob

NOTES = (
    "times of segments are those of the cuts, which were made at silence; the model tells no times of words",
    "no_speech_prob is not estimated",
)


@dataclass
class Passage:
    """What was heard in one segment, as it grows; `words` with the white space around them."""

    start_seconds: float
    end_seconds: float
    footprint: Footprint
    words: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.words += delta.text
        self.ids += delta.ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason

    @property
    def text(self) -> str:
        return self.words.strip()


@dataclass
class Transcript:
    """A recording's passages in order, and the silences between that were not transcribed."""

    seconds: float
    passages: list[Passage] = field(default_factory=list)
    silences: list[tuple[float, float]] = field(default_factory=list)
    text: str = ""

    def add(self, delta: Delta) -> str:
        """Take more of the last passage; returns what it adds to the text as a whole.

        Passages are put together with one space, or none where the script has none. White space at their ends goes, so
        white space inside is held back until more follows.
        """
        passage = self.passages[-1]
        before = passage.text
        passage.add(delta)
        added = passage.text[len(before) :]
        if added and not before:
            added = _seam(self.text, added) + added
        self.text += added
        return added

    @property
    def usage(self) -> dict[str, Any]:
        """What the passages took, as OpenAI counts it."""
        text_tokens = sum(passage.footprint.text_tokens for passage in self.passages)
        audio_tokens = sum(passage.footprint.audio_tokens for passage in self.passages)
        output_tokens = sum(len(passage.ids) for passage in self.passages)
        return {
            "type": "tokens",
            "input_tokens": text_tokens + audio_tokens,
            "input_token_details": {"text_tokens": text_tokens, "audio_tokens": audio_tokens},
            "output_tokens": output_tokens,
            "total_tokens": text_tokens + audio_tokens + output_tokens,
        }

    @property
    def cut_short(self) -> list[int]:
        """Numbers of the passages whose text reached the most that it may have."""
        return [number for number, each in enumerate(self.passages) if each.finish_reason is FinishReason.LENGTH]


def _seam(before: str, after: str) -> str:
    """What stands between two passages: nothing at the beginning and beside Chinese and Japanese, else a space."""
    if not before or any(unicodedata.east_asian_width(side) in "WF" for side in (before[-1], after[0])):
        return ""
    return " "


def verbose(transcript: Transcript, task: str, language: str, temperature: float) -> dict[str, Any]:
    """OpenAI's verbose_json, with times in seconds."""
    return {
        "task": task,
        "language": language,
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "segments": [_segment(each, number, temperature) for number, each in enumerate(transcript.passages)],
        "usage": {"type": "duration", "seconds": round(transcript.seconds, 3)},
    }


def _segment(passage: Passage, number: int, temperature: float) -> dict[str, Any]:
    content = passage.text.encode(errors="replace")
    logprobs = [each.logprob for each in passage.logprobs]
    return {
        "id": number,
        "seek": round(passage.start_seconds * 100),
        "start": round(passage.start_seconds, 3),
        "end": round(passage.end_seconds, 3),
        "text": passage.text,
        "tokens": passage.ids,
        "temperature": temperature,
        "avg_logprob": sum(logprobs) / max(len(logprobs), 1),
        "compression_ratio": len(content) / len(zlib.compress(content)),
        "no_speech_prob": 0.0,
    }


def spell(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens with their bytes and log-probabilities; those that show no text (the end of a turn) are left out."""
    spelled = ((each.logprob, tokenizer.token_bytes(each.id)) for each in logprobs)
    return [
        {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}
        for logprob, raw in spelled
        if raw
    ]


def plain(transcript: Transcript) -> str:
    """The text alone, on one line as OpenAI sends it."""
    return f"{transcript.text}\n"


def srt(transcript: Transcript) -> str:
    """SubRip subtitles, one for each segment."""
    return "".join(
        f"{number}\n{_times(passage, ',')}\n{line.replace('-->', '->')}\n\n"
        for number, (passage, line) in enumerate(_lines(transcript), 1)
    )


def vtt(transcript: Transcript) -> str:
    """WebVTT subtitles, one for each segment."""
    cues = "".join(f"{_times(passage, '.')}\n{_escape(line)}\n\n" for passage, line in _lines(transcript))
    return f"WEBVTT\n\nNOTE {NOTES[0]}\n\n{cues}"


def _lines(transcript: Transcript) -> Iterator[tuple[Passage, str]]:
    """Passages with something in them, and their text on one line: an empty one would end the subtitle."""
    for passage in transcript.passages:
        if line := " ".join(passage.words.split()):
            yield passage, line


def _times(passage: Passage, point: str) -> str:
    return f"{_time(passage.start_seconds, point)} --> {_time(passage.end_seconds, point)}"


def _time(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds: 00:00:29.970."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def _escape(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
