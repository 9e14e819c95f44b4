"""Images on the wire: in place, as they are where endpoints take them, else as PNG."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perl_megatron.chat.content import wire_messages
from perl_megatron.chat.messages import Message
from perl_megatron.errors import UserError


def picture() -> Image.Image:
    return Image.fromarray(np.arange(3 * 5 * 7, dtype=np.uint8).reshape(5, 7, 3))


def encoded(form: str) -> bytes:
    target = io.BytesIO()
    picture().save(target, form)
    return target.getvalue()


def sent_image(part: dict) -> tuple[str, bytes]:
    kind, _, data = part["image_url"]["url"].removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data)


def test_parts_keep_their_order(tmp_path: Path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded("PNG"))
    (message,) = wire_messages((Message("user", ("first ", path, " second ", encoded("JPEG"), " end")),))
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url", "text"]
    assert sent_image(message["content"][1]) == ("image/png", encoded("PNG"))
    assert sent_image(message["content"][3]) == ("image/jpeg", encoded("JPEG"))
    assert "".join(part.get("text", "") for part in message["content"]) == "first  second  end"


@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_forms_that_endpoints_take_are_sent_as_they_are(form):
    (message,) = wire_messages((Message("user", (encoded(form),)),))
    assert sent_image(message["content"][0]) == (f"image/{form.lower()}", encoded(form))


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM"])
def test_other_forms_become_png_with_the_same_pixels(form):
    (message,) = wire_messages((Message("user", (encoded(form),)),))
    kind, content = sent_image(message["content"][0])
    assert kind == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(picture()))


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe", encoded("BMP")[:40]])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        wire_messages((Message("user", (path,)),))
    assert caught.value.where == str(path)


def test_an_image_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read the image"):
        wire_messages((Message("user", (tmp_path / "none.png",)),))
