"""A label file: boxes or polygons, one a line, and perhaps a one-hot row for the image's class.

A box may have landmarks behind it, which are left out; `landmarks` tells such a row from a polygon.

The one-hot row. It is the last line that is not empty, and holds 0s and a single 1, one number per image
class. Rows of 5 numbers, and of 7, 9, 11, ..., could also be a box or a polygon (`0 0 0 1 0` reads as a box
of class 0 with width 1 and height 0), so the last line is taken for the image's class where

- it is made of 0s and 1s only, and has as many numbers as there are image classes (`image_names`; where
  that is not given, any number from 2), and
- a blank line or nothing at all stands before it, or its length is none that a box or a polygon can have.

Nothing is lost by that: a box or polygon written as a single 1 among 0s never has an area. Where the image
class comes from `image_labels`, no line is taken for a one-hot row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradprobe.trainers.data.landmarks import NONE, Landmarks

Box = tuple[int, float, float, float, float]
"""Class, then centre x, centre y, width, height over the image's size, each in [0, 1]."""

_SLACK = 1e-6
"""How far a coordinate may lie outside [0, 1]: rounding in the tool that wrote it."""


@dataclass
class LabelFile:
    """What a label file says, and what is wrong with it."""

    boxes: list[Box] = field(default_factory=list)
    one_hot: list[float] | None = None  # the row as it stands, not yet known to be valid
    one_hot_line: int | None = None
    problems: list[tuple[int, str]] = field(default_factory=list)  # line, message: errors
    repeated: list[int] = field(default_factory=list)  # lines that repeat a box; left out


def parse_labels(
    text: str, box_names: tuple[str, ...], n_image_classes: int | None, landmarks: Landmarks = NONE
) -> LabelFile:
    """Parse a label file.

    Args:
        text: The whole file; empty means background.
        box_names: Names of the box classes.
        n_image_classes: Length of a one-hot row; None where it is not known; 0 where none is expected.
        landmarks: Which rows hold landmarks behind a box.
    """
    result = LabelFile()
    rows, one_hot = _split(text, n_image_classes)
    if one_hot is not None:
        result.one_hot_line, tokens = one_hot
        result.one_hot = [float(token) for token in tokens]
    seen = set()
    for number, tokens in rows:
        box = _parse_object(tokens, box_names, landmarks)
        if isinstance(box, str):
            result.problems.append((number, box))
        elif box in seen:
            result.repeated.append(number)
        else:
            seen.add(box)
            result.boxes.append(box)
    return result


def long_rows(text: str, n_image_classes: int | None) -> list[tuple[int, tuple[float, ...]]]:
    """Line and numbers of the rows that are longer than a box; those that are no numbers are left out."""
    rows = ((line, _numbers(tokens)) for line, tokens in _split(text, n_image_classes)[0] if len(tokens) > 6)
    return [(line, tuple(numbers)) for line, numbers in rows if not isinstance(numbers, str)]


_Tokens = tuple[int, list[str]]
"""A line's number, from 1, and its words."""


def _split(text: str, n_image_classes: int | None) -> tuple[list[_Tokens], _Tokens | None]:
    """The lines for objects, and that for the image's class."""
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    rows = [(number, tokens) for number, tokens in lines if tokens]
    if rows:
        number, tokens = rows[-1]
        alone = number == 1 or not lines[number - 2][1]
        if _is_one_hot_row(tokens, alone, n_image_classes):
            return rows[:-1], rows[-1]
    return rows, None


def _is_one_hot_row(tokens: list[str], alone: bool, n_image_classes: int | None) -> bool:
    """Whether the last line of a label file stands for the image's class; see the top of this file."""
    if n_image_classes == 0 or len(tokens) < 2 or not set(tokens) <= {"0", "1", "0.0", "1.0"}:
        return False
    if n_image_classes is not None and len(tokens) != n_image_classes:
        return False
    return alone or not _could_be_object(len(tokens))


def _could_be_object(length: int) -> bool:
    """Whether a box (5 numbers) or a polygon (a class and at least 3 points) has so many numbers."""
    return length == 5 or (length >= 7 and length % 2 == 1)


def _parse_object(tokens: list[str], box_names: tuple[str, ...], landmarks: Landmarks = NONE) -> Box | str:
    """The box of one line, or what is wrong with the line."""
    numbers = _numbers(tokens)
    if isinstance(numbers, str):
        return numbers
    if landmarks.holds(numbers):
        numbers = numbers[:5]
    elif landmarks.declared and len(numbers) != 5:
        wanted = " or ".join(map(str, sorted(landmarks.lengths)))
        return f"{len(numbers)} numbers; by kpt_shape in data.yaml a box with its landmarks has {wanted}, a box alone 5"
    if not _could_be_object(len(numbers)):
        return (
            f"{len(numbers)} numbers; a box has 5 (class cx cy w h), a polygon a class and 3 or more points, "
            "a one-hot row (last in the file) one number per image class"
        )
    box_class, coordinates = int(numbers[0]), numbers[1:]
    if box_class != numbers[0] or not 0 <= box_class < len(box_names):
        return f"class {tokens[0]} is none of the {len(box_names)} classes 0 to {len(box_names) - 1}"
    outside = [value for value in coordinates if not -_SLACK <= value <= 1.0 + _SLACK]
    if outside:
        return f"coordinate {outside[0]:g} is outside [0, 1]; coordinates are parts of the image's size"
    coordinates = [min(max(value, 0.0), 1.0) for value in coordinates]
    x, y, width, height = coordinates if len(coordinates) == 4 else _polygon_box(coordinates)
    if width <= 0.0 or height <= 0.0:
        return f"a box without area: width {width:g}, height {height:g}"
    return box_class, x, y, width, height


def _numbers(tokens: list[str]) -> list[float] | str:
    try:
        numbers = [float(token) for token in tokens]
    except ValueError:
        return f"not a row of numbers: {' '.join(tokens)[:60]!r}"
    if not all(math.isfinite(number) for number in numbers):
        return f"a number that is not finite: {' '.join(tokens)[:60]!r}"
    return numbers


def _polygon_box(coordinates: list[float]) -> tuple[float, float, float, float]:
    """Centre and size of the tightest box around the points x1 y1 x2 y2 ..."""
    xs, ys = coordinates[0::2], coordinates[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def one_hot_class(row: list[float]) -> int | str:
    """The index of the single 1, or what is wrong with the row."""
    if row.count(1.0) != 1:
        return f"a row for the image's class with {row.count(1.0)} ones; it needs exactly one"
    return row.index(1.0)
