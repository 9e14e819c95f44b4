"""Messages as they are sent: images become data URLs, in place."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from perl_megatron.chat.messages import ChatRequest, Message
from perl_megatron.errors import UserError
from perl_megatron.runtime.image_errors import image_fault
from perl_megatron.runtime.regular_file import open_regular

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_FORMATS = ("BMP", "PPM", "TIFF")
"""What is sent as PNG, because endpoints do not take it."""


def wire_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """The messages in the form of `/v1/chat/completions`. UserError for an image that cannot be read."""
    return [{"role": message.role, "content": _wire_content(message)} for message in messages]


def request_digest(request: ChatRequest, model: str, schema: Any) -> str:
    """64 hexadecimal digits of everything that decides the reply: the model's name, texts, image bytes, sampling and
    schema; not where the endpoint is. UserError for an image that cannot be read."""
    messages = [[message.role, [_digest_part(part) for part in message.parts]] for message in request.messages]
    sampling = [request.max_tokens, request.temperature, request.top_p, request.seed, request.num_samples]
    whole = json.dumps([model, messages, sampling, schema, request.schema_name], sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=32).hexdigest()


def _wire_content(message: Message) -> str | list[dict[str, Any]]:
    texts = [part for part in message.parts if isinstance(part, str)]
    if len(texts) == len(message.parts):
        return "".join(texts)  # a plain text, because some endpoints take nothing else where there is no image
    return [_wire_part(part) for part in message.parts]


def _wire_part(part: str | Path | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    content = _read(part)
    media_type = _media_type(content)
    if media_type is None:
        content, media_type = _as_png(content, part), "image/png"
    url = f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _digest_part(part: str | Path | bytes) -> list[str]:
    if isinstance(part, str):
        return ["text", part]
    return ["image", hashlib.blake2b(_read(part), digest_size=32).hexdigest()]


def _read(part: Path | bytes) -> bytes:
    if isinstance(part, bytes):
        return part
    try:
        with open_regular(part) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the image: {error.strerror}", where=str(part)) from error


def _media_type(content: bytes) -> str | None:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SIGNATURES.items() if content.startswith(start)), None)


def _as_png(content: bytes, part: Path | bytes) -> bytes:
    """Raises UserError for what is no image."""
    where = str(part) if isinstance(part, Path) else "an image given as bytes"
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            target = io.BytesIO()
            image.save(target, "PNG")
            return target.getvalue()
    except Exception as error:  # Pillow's readers raise nearly anything on corrupt bytes
        raise UserError(
            f"cannot read the image: {image_fault(error)}", where=where, fix="replace it by a whole image"
        ) from error
