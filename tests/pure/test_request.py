"""Arguments that could be read as something else are taken as they are meant, or refused."""

from pathlib import Path

import numpy as np
import pytest

from memphi.errors import RequestError
from memphi.inputs.media import image_media
from memphi.request import Request, SamplingParams

IMAGE = image_media(np.zeros((4, 6, 3), np.uint8))


@pytest.mark.parametrize("attachments", [IMAGE, [IMAGE], iter([IMAGE])])
def test_a_lone_attachment_needs_no_list(attachments):
    assert Request.ask("What is it?", attachments).media == (IMAGE,)


@pytest.mark.parametrize("attachments", [["a.png"], "a.png", [IMAGE, Path("a.png")], [b"bytes"]])
def test_an_attachment_that_was_not_opened_is_refused(attachments):
    with pytest.raises(RequestError, match=r"an attachment is what open_media returns, not (str|PosixPath|bytes)"):
        Request.ask("What is it?", attachments)


def test_a_lone_stop_string_is_refused():
    with pytest.raises(RequestError, match=r"as in stop=\('me',\)"):
        SamplingParams(stop="me")
