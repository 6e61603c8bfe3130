"""What was heard is joined without loss, and told in every form that OpenAI has."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.request import ClipFootprint, Delta, FinishReason, Footprint, InputMode, TokenLogprob
from memphi.server.transcripts import Passage, Transcript, plain, spell, srt, verbose, vtt


def passage(start, end, text_tokens=8, audio_tokens=25):
    clip = ClipFootprint(end - start, audio_tokens * 8, audio_tokens)
    return Passage(start, end, Footprint(InputMode.SPEECH, text_tokens, (), (clip,)))


def heard(*answers, seconds=10.0):
    """A transcript of segments of two seconds each, and what each delta added; an answer is a list of texts."""
    transcript, added = Transcript(seconds), []
    for number, texts in enumerate(answers):
        transcript.passages.append(passage(2.0 * number, 2.0 * number + 2))
        for place, text in enumerate(texts):
            reason = FinishReason.STOP if place == len(texts) - 1 else None
            added.append(transcript.add(Delta(text, (100 + place,), reason)))
    return transcript, added


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([], ""),
        ([["One", " two"]], "One two"),
        ([["One", " two."], ["Three."]], "One two. Three."),
        ([[" One ", " two\n"], ["\t", " Three "]], "One  two Three"),
        ([["One"], ["", " "], [""], ["two"]], "One two"),
        ([[""], ["One"]], "One"),
        ([["你好"], ["世界。"], ["再见"]], "你好世界。再见"),
        ([["東京"], ["Tokyo"], ["Kyoto"]], "東京Tokyo Kyoto"),
    ],
)
def test_segments_are_joined(answers, text):
    transcript, added = heard(*answers)
    assert transcript.text == "".join(added) == text


@given(st.lists(st.lists(st.text("ab \n世", max_size=4), min_size=1, max_size=4), max_size=5))
def test_nothing_is_lost_or_repeated_and_what_is_streamed_is_the_whole(answers):
    transcript, added = heard(*answers)
    assert transcript.text == "".join(added)
    assert "".join(transcript.text.split()) == "".join("".join(map("".join, answers)).split())
    assert [each.text for each in transcript.passages] == ["".join(texts).strip() for texts in answers]
    assert transcript.text == transcript.text.strip()


def test_the_text_alone():
    assert plain(heard(["One"], ["two"])[0]) == "One two\n"


def test_subtitles_for_subrip():
    transcript, _ = heard(["One -->", "\n\ntwo"], [" "], ["three"])
    transcript.passages[2].start_seconds, transcript.passages[2].end_seconds = 3599.9996, 36_123.4564
    assert srt(transcript) == (
        "1\n00:00:00,000 --> 00:00:02,000\nOne -> two\n\n2\n01:00:00,000 --> 10:02:03,456\nthree\n\n"
    )
    assert srt(Transcript(1.0)) == ""


def test_subtitles_for_the_web():
    transcript, _ = heard(["R&B", " <i> -->\n\nx"], ["two"])
    header, note, *cues = vtt(transcript).rstrip("\n").split("\n\n")
    assert header == "WEBVTT"
    assert note.startswith("NOTE times of segments are those of the cuts")
    assert cues == [
        "00:00:00.000 --> 00:00:02.000\nR&amp;B &lt;i&gt; --&gt; x",
        "00:00:02.000 --> 00:00:04.000\ntwo",
    ]


@given(st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=3), max_size=4))
def test_no_text_breaks_a_subtitle(answers):
    """Whatever is said, there are as many subtitles as segments with something in them, each of one line."""
    transcript, _ = heard(*answers)
    spoken = sum(bool("".join(texts).split()) for texts in answers)
    for told in (srt(transcript), vtt(transcript)):
        assert len(re.findall(r"^[\d:,.]+ --> [\d:,.]+\n[^\n]+\n\n", told, re.MULTILINE)) == spoken
        assert told.count("-->") == spoken


def test_the_verbose_form():
    transcript, _ = heard(["ab", "ab"], ["c"])
    first = transcript.passages[0]
    first.logprobs = [TokenLogprob(100, -0.5), TokenLogprob(101, -1.5)]
    told = verbose(transcript, "transcribe", "german", 0.25)
    assert told["text"] == "abab c"
    assert (told["task"], told["language"], told["duration"]) == ("transcribe", "german", 10.0)
    assert told["usage"] == {"type": "duration", "seconds": 10.0}
    assert told["segments"][0] == {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": 2.0,
        "text": "abab",
        "tokens": [100, 101],
        "temperature": 0.25,
        "avg_logprob": -1.0,
        "compression_ratio": pytest.approx(4 / 12),
        "no_speech_prob": 0.0,
    }
    assert [(each["id"], each["seek"], each["start"]) for each in told["segments"]] == [(0, 0, 0.0), (1, 200, 2.0)]
    assert all(math.isfinite(each["avg_logprob"]) for each in told["segments"])


def test_what_is_counted():
    transcript, _ = heard(["a", "b"], ["c"])
    assert transcript.usage == {
        "type": "tokens",
        "input_tokens": 66,
        "input_token_details": {"text_tokens": 16, "audio_tokens": 50},
        "output_tokens": 3,
        "total_tokens": 69,
    }
    assert transcript.cut_short == []
    transcript.passages[1].finish_reason = FinishReason.LENGTH
    assert transcript.cut_short == [1]


def test_logprobs_are_told_with_the_bytes_of_tokens(fake):
    ids = fake.tokenizer.encode_text("Grüße")
    told = spell([TokenLogprob(number, -0.25) for number in ids], fake.tokenizer)
    assert bytes(byte for each in told for byte in each["bytes"]).decode() == "Grüße"
    assert {each["logprob"] for each in told} == {-0.25}
    assert all(each["token"] == bytes(each["bytes"]).decode(errors="replace") for each in told)
