"""Text becomes the official ids, never special ones, and ids become exactly their text, however they arrive."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi import official
from memphi.errors import CheckpointError, RequestError
from memphi.inputs.chat import Special
from memphi.inputs.prompt import encode
from memphi.inputs.tokenizer import WHITE_SPACE, TextStream, Tokenizer
from tests.pure.inputs_samples import DATA, official_tokenizer, tokenizer

GOLDEN = json.loads((DATA / "tokenizer_golden.json").read_text())
DOCUMENT = json.loads(gzip.decompress((official.folder() / "tokenizer.json.gz").read_bytes()))
ADDED = [token["content"] for token in DOCUMENT["added_tokens"]]
ANY_ID = st.integers(0, 200_063) | st.integers(199_990, 200_063) | st.integers(0, 300)


def pieces(text):
    """Text with special tokens in it, as the pieces that `chat` makes of a conversation."""
    parts = re.split("(" + "|".join(map(re.escape, ADDED)) + ")", text)
    return [Special(part) if part in ADDED else part for part in parts if part]


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_ids_and_texts(case):
    assert encode(pieces(case["text"]), tokenizer()) == case["ids"]
    assert tokenizer().decode(case["ids"]) == case["decode_skip_special"]


@pytest.mark.parametrize("token", ADDED)
def test_text_never_makes_a_special_id(token):
    known = {tokenizer().special(added) for added in ADDED}
    for text in (token, f"a{token}b", f" {token} \n", token * 3):
        ids = tokenizer().encode_text(text)
        assert not known & set(ids)
        assert tokenizer().decode(ids) == text


@given(st.text() | st.text(alphabet="aA1 \n\t'é日😀\u0301|<>", max_size=40))
@settings(deadline=None)
def test_plain_text_is_encoded_as_the_official_tokenizer_does(text):
    ids = tokenizer().encode_text(text)
    assert tokenizer().decode(ids) == text
    if not any(token in text for token in ADDED):
        assert ids == official_tokenizer().encode(text).ids


@given(st.lists(ANY_ID, max_size=40))
@settings(deadline=None)
def test_streamed_text_is_the_whole_text(ids):
    stream = TextStream(tokenizer())
    parts = [stream.feed(number) for number in ids]
    assert "".join([*parts, stream.flush()]) == tokenizer().decode(ids)
    assert tokenizer().decode(ids) == official_tokenizer().decode(ids, skip_special_tokens=True)


def test_characters_arrive_whole():
    ids = tokenizer().encode_text("\U0001fae8")
    assert len(ids) > 1
    stream = TextStream(tokenizer())
    assert [stream.feed(number) for number in ids] == [""] * (len(ids) - 1) + ["\U0001fae8"]
    assert stream.flush() == ""
    stream.feed(ids[0])
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_hidden_and_tool_tokens_shown():
    ids = [tokenizer().special(token) for token in ("<|end|>", "<|tool_call|>", "<|/tool_call|>", "<|endoftext|>")]
    assert tokenizer().decode(ids) == "<|tool_call|><|/tool_call|>"


def test_named_ids():
    assert (tokenizer().image_id, tokenizer().audio_id, tokenizer().end_id) == (200010, 200011, 200020)
    assert tokenizer().swallows_space(tokenizer().special("<|user|>"))
    assert not tokenizer().swallows_space(tokenizer().image_id)


def test_ids_without_a_token_are_known():
    known = tokenizer().known_ids(200064)
    assert [number for number, is_known in enumerate(known) if not is_known] == list(range(200029, 200064))
    assert tokenizer().known_ids(100).all()
    assert tokenizer().decode([200063, 200000]) == "<|endoftext00|>"


def test_white_space_is_what_the_library_strips():
    token = tokenizer().special("<|user|>")
    for number in range(0x11000):
        if 0xD800 <= number < 0xE000 or not (chr(number).isspace() or chr(number) in WHITE_SPACE):
            continue
        swallowed = official_tokenizer().encode(f"<|user|>{chr(number)}").ids == [token]
        assert swallowed == (chr(number) in WHITE_SPACE), hex(number)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer().encode_text("a\ud800b")


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    for name, content in (
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": []}'),
        ("tokenizer.json.gz", b"no gzip"),
        ("tokenizer.json.gz", gzip.compress(b"{}" * 100)[:-9]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
        path.unlink()


def test_a_missing_special_token_is_named():
    document = dict(DOCUMENT, added_tokens=[], model=dict(DOCUMENT["model"], vocab={"a": 0}, merges=[]))
    with pytest.raises(CheckpointError, match=r"no special token <\|endoftext10\|>"):
        _ = Tokenizer(document).image_id
