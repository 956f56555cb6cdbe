"""Image files decoded: each is read and decoded once, whatever is asked of it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An image, shape (height, width, 3), RGB, 0 to 255."""


class UnreadableImage(Exception):  # noqa: N818  (never leaves this package)
    """An image that Pillow cannot decode; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    """An image, and what identifies it."""

    pixels: Pixels
    file_digest: str  # sha256 of the file: does not depend on the version of a decoder
    pixel_digest: str  # of the decoded pixels: finds the same picture saved twice


def decode(path: Path) -> Decoded:
    """Read and decode an image, turned as its EXIF orientation says.

    Raises:
        UnreadableImage: it cannot be read, is cut short, or has pixels of a kind without a grey scale.
    """
    try:
        content = path.read_bytes()
        pixels = _pixels(content)
    except UnreadableImage:
        raise
    except Exception as problem:  # decoders of damaged files raise anything: struct.error, SyntaxError, ...
        reason = str(problem).replace(str(path), path.name) or type(problem).__name__
        raise UnreadableImage(reason) from None
    shape = np.array(pixels.shape, dtype="<i8").tobytes()
    return Decoded(
        pixels=pixels,
        file_digest=hashlib.sha256(content).hexdigest(),
        pixel_digest=hashlib.blake2b(shape + pixels.tobytes(), digest_size=16).hexdigest(),
    )


def _pixels(content: bytes) -> Pixels:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow would clip at 255; keep the upper byte, as OpenCV does
                grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise UnreadableImage(f"pixels of mode {image.mode}; convert it to 8 or 16 bits")
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image, or of an unknown format") from None
