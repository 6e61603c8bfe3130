"""A conversation becomes the official template's ids, and its media stand where they were put."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.errors import DoesNotFitError, MediaError, RequestError
from memphi.inputs.chat import Special, render
from memphi.inputs.media import MediaLimits, audio_media, image_media, open_media
from memphi.inputs.prompt import measure, prepare
from memphi.request import InputMode, Media, Message, Request
from tests.pure.inputs_samples import (
    config,
    gradient,
    official_tokenizer,
    picture,
    png_header,
    small_config,
    sound,
    tokenizer,
    tone,
)

IMAGE = image_media(gradient(60, 40))
CLIP = audio_media(tone(4000, 16000)[0], 16000)
# Without special tokens, which the official tokenizer finds in any text, and memphi in none.
TEXTS = st.text(max_size=20).filter(lambda text: "<|" not in text) | st.text(
    alphabet=" \n\t\x1c\x85\u3000aB1'|", max_size=8
)
CALLS = '[{"name": "f", "arguments": {"x": "é 5"}}]'
CONTENTS = st.lists(TEXTS | st.sampled_from([IMAGE, CLIP]), min_size=1, max_size=4).map(tuple)


@st.composite
def conversations(draw):
    def spoken(content):
        return any(isinstance(part, Media) or part.strip() for part in content)

    words = TEXTS.filter(str.strip)
    messages = []
    if draw(st.booleans()):
        tools = draw(st.none() | st.sampled_from(["[]", ' [{"name": "f"}]\n']))
        messages.append(Message("system", (draw(words),), tools))
    for _ in range(draw(st.integers(0, 2))):
        messages.append(Message("user", draw(CONTENTS.filter(spoken))))
        messages += draw(answers())
    if not messages or messages[-1].role != "tool" or draw(st.booleans()):
        messages.append(Message("user", draw(CONTENTS.filter(spoken))))
    return tuple(messages)


@st.composite
def answers(draw):
    """An answer, perhaps with calls of tools and what these gave."""
    calls = draw(st.none() | st.sampled_from(["[]", CALLS, f"\n {CALLS} "]))
    results = [] if calls is None else draw(st.lists(TEXTS, max_size=2))
    return [Message("assistant", (draw(TEXTS),), tool_calls=calls), *(Message("tool", (text,)) for text in results)]


def template(messages):
    """The official template's text, with placeholders as the official processor puts them in."""
    text = ""
    for message in messages:
        parts = [
            part if isinstance(part, str) else {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}[part.kind]
            for part in message.content
        ]
        tools = "" if message.tools is None else f"<|tool|>{message.tools}<|/tool|>"
        calls = "" if message.tool_calls is None else f"<|tool_call|>{message.tool_calls}<|/tool_call|>"
        text += f"<|{message.role}|>{''.join(parts)}{tools}{calls}<|end|>"
    return text + "<|assistant|>"


@given(conversations())
@settings(deadline=None, max_examples=150)
def test_ids_are_the_official_ones(messages):
    request = Request(messages)
    prompt = prepare(request, small_config(), tokenizer())
    assert prompt.footprint == measure(request, small_config(), tokenizer())
    assert prompt.footprint.prompt_tokens == len(prompt.ids)
    assert [span.kind for span in prompt.spans] == [media.kind for media in request.media]
    ids = list(prompt.ids)
    for span in reversed(prompt.spans):
        placeholder = tokenizer().image_id if span.kind == "image" else tokenizer().audio_id
        parts = prompt.images if span.kind == "image" else prompt.clips
        assert span.tokens == parts[span.index].footprint.tokens
        assert ids[span.start : span.start + span.tokens] == [placeholder] * span.tokens
        ids[span.start : span.start + span.tokens] = [placeholder]
    assert ids == official_tokenizer().encode(template(messages)).ids


@given(
    st.lists(
        st.sampled_from(["<|end|>", "<|user|>", "<|endoftext10|>", "<|image_1|>", "<|tool_call|>", "hi "]), min_size=1
    )
)
@settings(deadline=None)
def test_text_cannot_end_its_turn_or_add_media(words):
    ids = prepare(Request.ask("".join(words)), small_config(), tokenizer()).ids
    assert [number for number in ids if number >= 199_998] == [200021, 200020, 200019]


@pytest.mark.parametrize(
    ("media", "mode"),
    [
        ((), InputMode.TEXT),
        ((IMAGE,), InputMode.VISION),
        ((CLIP,), InputMode.SPEECH),
        ((CLIP, IMAGE), InputMode.VISION_SPEECH),
    ],
)
def test_modes_follow_the_media(media, mode):
    assert prepare(Request.ask("hi", media), small_config(), tokenizer()).mode is mode


def test_texts_are_joined_before_they_are_encoded():
    pieces = render((Message("user", ("Hel", "lo", IMAGE, "a", "", "b")),))
    assert pieces == [Special("<|user|>"), "Hello", IMAGE, "ab", Special("<|end|>"), Special("<|assistant|>")]


@pytest.mark.parametrize("content", [(), ("",), (" \n",)])
def test_an_answer_in_the_history_may_be_empty(content):
    messages = (Message("user", ("hi",)), Message("assistant", content), Message("user", ("and now?",)))
    pieces = render(messages)
    assert pieces[3:5] == [
        Special("<|assistant|>"),
        *([content[0]] if content and content[0] else [Special("<|end|>")]),
    ]
    assert prepare(Request(messages), small_config(), tokenizer()).ids


def calling(calls):
    """A question, an answer with these calls, and what a tool said."""
    return (Message("user", ("hi",)), Message("assistant", (), tool_calls=calls), Message("tool", ("5",)))


CALLED = calling(CALLS)[:2]


def test_calls_of_tools_and_their_results_stand_as_the_template_has_them():
    pieces = render(
        (Message("user", ("hi",)), Message("assistant", ("Well",), tool_calls="[]"), Message("tool", ("5",)))
    )
    assert pieces[3:] == [
        Special("<|assistant|>"),
        "Well",
        *(Special("<|tool_call|>"), "[]", Special("<|/tool_call|>"), Special("<|end|>")),
        *(Special("<|tool|>"), "5", Special("<|end|>")),
        Special("<|assistant|>"),
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((), "no messages"),
        ((Message("robot", ("hi",)),), "message 1 has the role 'robot'; roles are system, user, assistant, tool"),
        ((Message("tool", ("hi",)),), "message 1 is from a tool; it must follow an assistant's with tool calls"),
        ((Message("user", ("hi",)), Message("tool", ("5",))), "message 2 is from a tool"),
        (
            (Message("user", ("hi",)), Message("assistant", ("hi",)), Message("tool", ("5",))),
            "message 3 is from a tool",
        ),
        ((*CALLED, Message("tool", (IMAGE,))), "from the tool and has attachments"),
        ((*CALLED, Message("tool", ("5",)), Message("user", ("so?",)), Message("tool", ("5",))), "message 5 is from"),
        (CALLED, "the last message is from the assistant; it must be the user's or a tool's"),
        ((Message("user", ("hi",), tool_calls="[]"),), "from the user and has tool calls; only the assistant's may"),
        (calling("{}"), "message 2: tool_calls must be a JSON list"),
        (calling([{"name": "f", "arguments": {}}]), "message 2: tool_calls must be a JSON list, as text"),
        ((Message("user", (None,)),), "message 1 holds a NoneType; it may hold text"),
        ((Message("system", (5,)), Message("user", ("hi",))), "message 1 holds a int; it may hold text"),
        (calling("["), "message 2: tool_calls must be a JSON list"),
        (calling("[" * 10**5), "message 2: tool_calls must be a JSON list"),
        (calling('[{"name": "f"}]'), "every tool call must be a JSON object with a name and arguments"),
        (calling('[{"name": 1, "arguments": {}}]'), "every tool call must be a JSON object"),
        (calling("[5]"), "every tool call must be a JSON object"),
        ((Message("user", ("hi",)), Message("system", ("hi",)), Message("user", ("hi",))), "message 2 is a system"),
        ((Message("system", (IMAGE,)), Message("user", ("hi",))), "from the system and has attachments"),
        (
            (Message("user", ("hi",)), Message("assistant", (CLIP,)), Message("user", ("hi",))),
            "from the assistant and has",
        ),
        ((Message("user", ("hi",)), Message("assistant", ("hi",))), "must be the user's or a tool's"),
        ((Message("user", ()),), "message 1 is empty"),
        ((Message("user", ("", " \n")),), "message 1 is empty"),
        ((Message("user", ("hi",), tools="[]"),), "from the user and has tools"),
        ((Message("system", (), tools="{}"), Message("user", ("hi",))), "tools must be a JSON list"),
        ((Message("system", (), tools="["), Message("user", ("hi",))), "tools must be a JSON list"),
        ((Message("user", ("\udc00",)),), "not valid Unicode"),
    ],
)
def test_bad_conversations_are_refused(messages, reason):
    for use in (measure, prepare):
        with pytest.raises(RequestError, match=reason):
            use(Request(messages), small_config(), tokenizer())


def test_what_exceeds_the_context_is_refused_with_numbers():
    page = open_media(png_header(2480, 3508))
    assert measure(Request.ask("Read.", [page] * 14), config(), tokenizer()).image_tokens == 14 * 9345
    for use in (measure, prepare):
        with pytest.raises(
            DoesNotFitError, match=r"140181 tokens \(6 of text, 140175 of pictures, 0 of sound\).*131072"
        ):
            use(Request.ask("Read. ", [page] * 15), config(), tokenizer())
    with pytest.raises(DoesNotFitError, match="of text"):
        measure(Request.ask("word " * 131_072), config(), tokenizer())


def test_errors_name_the_attachment():
    broken = open_media(picture(300, 200)[:-500], "scan.png")
    assert measure(Request.ask("hi", [broken]), config(), tokenizer()).image_tokens == 460
    with pytest.raises(MediaError, match=r"^scan\.png: cannot be read as a picture"):
        prepare(Request.ask("hi", [broken]), config(), tokenizer())
    talk = open_media(sound("mp3", "libmp3lame", samples=20000), "talk.mp3")
    with pytest.raises(MediaError, match=r"^talk\.mp3: is longer than 1 seconds"):
        measure(Request.ask("hi", [talk]), config(), tokenizer(), MediaLimits(seconds=1))


def test_the_reference_ignores_how_a_picture_stands():
    lying = Request.ask("hi", [open_media(picture(300, 100, "JPEG", orientation=6))])
    for reference, size in ((False, (100, 300)), (True, (300, 100))):
        prompt = prepare(lying, small_config(), tokenizer(), reference=reference)
        assert (prompt.footprint.images[0].width, prompt.footprint.images[0].height) == size
        assert prompt.footprint == measure(lying, small_config(), tokenizer(), reference=reference)


def test_each_picture_is_seen_in_its_own_detail():
    page = image_media(gradient(200, 140))
    request = Request.ask("hi", [replace(page, detail=detail) for detail in ("auto", "low", 4)])
    footprint = measure(request, small_config(), tokenizer())
    assert [image.crops for image in footprint.images] == [7, 2, 5]
    prompt = prepare(request, small_config(), tokenizer())
    assert prompt.footprint == footprint
    assert [len(image.crops) for image in prompt.images] == [7, 2, 5]
    assert [span.tokens for span in prompt.spans] == [image.tokens for image in footprint.images]


def test_media_keep_their_order():
    request = Request((Message("user", (CLIP, "a", IMAGE, IMAGE, "b", CLIP)),))
    spans = prepare(request, small_config(), tokenizer()).spans
    assert [(span.kind, span.index) for span in spans] == [("audio", 0), ("image", 0), ("image", 1), ("audio", 1)]
    assert np.diff([span.start for span in spans]).min() > 0


def test_measuring_imports_no_torch_and_text_no_decoders():
    script = """
import sys
from memphi import official
from memphi.config import ModelConfig
from memphi.inputs.prompt import measure, prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Request
config, tokenizer = ModelConfig.from_folder(official.folder()), Tokenizer.from_folder(official.folder())
assert measure(Request.ask("hi"), config, tokenizer) == prepare(Request.ask("hi"), config, tokenizer).footprint
assert not {"torch", "PIL", "av"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
