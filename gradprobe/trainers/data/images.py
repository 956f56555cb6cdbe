"""Images: files decoded once, whatever is asked of them, and made square with their boxes as YOLOv5 does it."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import MissingExtraError
from gradprobe.trainers.data.data_yaml import MAX_IMAGE
from gradprobe.trainers.data.labels import Box
from gradprobe.whole_files import read

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
"""An image, shape (height, width, 3), RGB, 0 to 255."""


class UnreadableImage(Exception):  # noqa: N818  (never leaves this package)
    """An image that Pillow cannot decode; the message is the reason."""


_END_MARK = b"\xff\xd9"
"""How a JPEG ends."""

_FILLERS = (b"\x55" * 64, b"\xaa\x1c" * 32)
"""Bytes that change the picture if, and only if, its data has ended before it."""

_DARK = 2**14
"""A 16-bit image in which no value reaches this may be one of 12 bits: of its grey levels few are left."""


@dataclass(frozen=True)
class Decoded:
    """An image, and what identifies it."""

    pixels: Pixels
    file_digest: str  # sha256 of the file: does not depend on the version of a decoder
    pixel_digest: str  # of the decoded pixels: finds the same picture saved twice
    notes: tuple[str, ...] = ()  # what is odd about it, though it can be used


def decode(path: Path) -> Decoded:
    """Read and decode an image, turned as its EXIF orientation says. The file is never written to.

    A JPEG without its end mark is used where all of its data are there.

    Raises:
        UnreadableImage: it cannot be read, is cut short, or has pixels of a kind without a grey scale.
    """
    notes: list[str] = []
    try:
        content = read(path, MAX_IMAGE)
        pixels = _whole(content, notes)
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
        notes=tuple(notes),
    )


def _whole(content: bytes, notes: list[str]) -> Pixels:
    """The pixels, if all of them are in the file."""
    if not content:
        raise UnreadableImage("an empty file (0 bytes)")
    if content.startswith(b"version https://git-lfs"):
        raise UnreadableImage("a pointer of Git LFS instead of the image; get it with: git lfs pull")
    is_jpeg = content.startswith(b"\xff\xd8")
    try:
        pixels = _pixels(content, notes)
    except OSError as problem:
        if not is_jpeg or "truncated" not in str(problem):
            raise
        notes.clear()
        body = content.removesuffix(_END_MARK[:1])
        pixels = _pixels(body + _END_MARK, notes)
        _check_complete(body, pixels, f"cut short: {problem}")
        notes.append("a JPEG without its end mark, but with all of its data; it is used as it is")
        return pixels
    if is_jpeg and _looks_cut(content, pixels):
        _check_complete(content[: content.rfind(_END_MARK)], pixels, "cut short: its data end before the picture does")
    return pixels


def _looks_cut(content: bytes, pixels: Pixels) -> bool:
    """Whether a JPEG that decodes may lack data: what is missing is grey, or in a progressive one, unsharp."""
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]  # the last one decoded is any of them, once the image is turned
    return content.rfind(_END_MARK) > 0 and (bool((corners == 128).all(axis=1).any()) or b"\xff\xc2" in content)


def _check_complete(body: bytes, pixels: Pixels, reason: str) -> None:
    """Raise if a JPEG's data, without the end mark, are not all: then bytes added to them change the picture."""
    try:
        same = all(np.array_equal(_pixels(body + filler + _END_MARK, []), pixels) for filler in _FILLERS)
    except OSError:
        same = False
    if not same:
        raise UnreadableImage(f"{reason}; get the file anew")


def _pixels(content: bytes, notes: list[str]) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > (
                most := Image.MAX_IMAGE_PIXELS or 1 << 27
            ):  # it only warns up to twice that
                raise UnreadableImage(f"{opened.width} x {opened.height} pixels; at most {most:,} are decoded")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # a camera's second picture of the same
                notes.append(f"{frames} frames or pages; only the first is used")
            image = _turned(opened, notes)
            if image.mode.startswith("I;16"):  # Pillow would clip at 255; keep the upper byte, as OpenCV does
                deep = np.asarray(image).astype(np.uint16)
                if 0 < (largest := int(deep.max(initial=0))) < _DARK:
                    notes.append(
                        f"16 bits, but no value above {largest}: read by the upper 8 bits, as OpenCV does, it keeps "
                        f"{(largest >> 8) + 1} grey levels of 256; stretch it to 0..65535, or save it with 8 bits"
                    )
                return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise UnreadableImage(f"pixels of mode {image.mode}; convert it to 8 or 16 bits")
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError:
        raise UnreadableImage("not an image, or of an unknown format") from None


def _turned(image: Image, notes: list[str]) -> Image:
    from PIL import ImageOps

    image.load()  # what is wrong with the pixels is not to be taken for a fault of the tags
    try:
        return ImageOps.exif_transpose(image)
    except Exception as problem:  # as above
        notes.append(f"its EXIF tags cannot be read ({type(problem).__name__}), so it is not turned")
        return image


_PADDING = 114
"""Grey level around the image, as in YOLOv5."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the square, in pixels."""

    size: int
    left: int
    top: int
    width: int
    height: int


def place(height: int, width: int, size: int) -> Placement:
    """The longer side becomes `size`, the shorter one follows (rounded up); centred, a spare pixel last."""
    ratio = size / max(height, width)
    # Never above `size`: 160 * (size / 160) may be a hair too much, and rounding up would make it a pixel.
    new_width, new_height = min(math.ceil(width * ratio), size), min(math.ceil(height * ratio), size)
    return Placement(size, (size - new_width) // 2, (size - new_height) // 2, new_width, new_height)


def letterbox(image: Pixels, size: int) -> tuple[Pixels, Placement]:
    """Scale an image into a square and pad it with grey.

    Args:
        image: Shape (height, width, 3), uint8.
        size: Side of the square in pixels.

    Returns:
        Shape (size, size, 3), uint8, bilinear where enlarged and area-averaged where shrunk; and where the
        image lies in it. An image of that size already comes back as it is.
    """
    height, width = image.shape[:2]
    placed = place(height, width, size)
    if (height, width) == (size, size):
        return image, placed
    if (placed.height, placed.width) != (height, width):
        cv2 = _cv2()
        method = cv2.INTER_LINEAR if size > max(height, width) else cv2.INTER_AREA
        image = cv2.resize(image, (placed.width, placed.height), interpolation=method)
    square = np.full((size, size, 3), _PADDING, dtype=np.uint8)
    rows = slice(placed.top, placed.top + placed.height)
    square[rows, placed.left : placed.left + placed.width] = image
    return square, placed


def place_boxes(boxes: Sequence[Box], placed: Placement) -> NDArray[np.float64]:
    """Boxes in the square.

    Args:
        boxes: Class, centre and size over the image's size.
        placed: Where the image lies.

    Returns:
        Shape (boxes, 5): class, centre x, centre y, width, height over the square's side. What reaches
        beyond the image is cut off, as what reaches beyond the square is in YOLOv5.
    """
    rows = np.array(boxes, dtype=np.float64).reshape(-1, 5)
    scale = np.array([placed.width, placed.height]) / placed.size
    offset = np.array([placed.left, placed.top]) / placed.size
    low = np.clip(rows[:, 1:3] - rows[:, 3:5] / 2, 0.0, 1.0)
    high = np.clip(rows[:, 1:3] + rows[:, 3:5] / 2, 0.0, 1.0)
    centre, extent = (low + high) / 2 * scale + offset, (high - low) * scale
    return np.concatenate([rows[:, :1], centre, extent], axis=1)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise MissingExtraError("opencv-python", "yolov5", "scaling images") from None
    return cv2
