"""A label file: boxes or polygons, one a line, and perhaps a one-hot row for the image's class.

The one-hot row. It is the last line that is not empty, and holds 0s and a single 1, one number per image
class. Rows of 5 numbers, and of 7, 9, 11, ..., could also be a box or a polygon (`0 0 0 1 0` reads as a box
of class 0 with width 1 and height 0), so the last line is taken for the image's class where

- it is made of 0s and 1s only, and has as many numbers as there are image classes (`image_names`; where
  that is not given, any number from 2), and
- a blank line or nothing at all stands before it, or its length is none that a box or a polygon can have.

Nothing is lost by that: a box or polygon written as a single 1 among 0s never has an area. Where the image
class comes from `image_labels`, no line is taken for a one-hot row.

Landmarks. A box may have landmarks or keypoints behind it, which are left out.
A row of a class and 4 + 2k numbers may be a polygon of k + 2 points, or a box with k landmarks (YOLOv5-face: 15
numbers); with a third number for each point (YOLO-pose: how visible it is) a row has 5 + 3k. `kpt_shape: [k, 2]` or
`[k, 3]` in data.yaml settles it, and `[0, 2]` says that there are none. Without it, numbers decide, over all rows of a
length together, since the number of landmarks is the same in a whole data set, while polygons have as many points as
they need:

- a row *fits* where the box lies in the image and holds its landmarks, and third numbers are 0, 1 or 2;
- a row *tells* where it would also be no sane polygon: two landmarks are missing (negative, or 0 0), a third number is
  2, the point (width, height) lies further from all others than they from each other, or, where most long rows of the
  data set have this length, its outline crosses itself;
- rows of a length are boxes where nearly all fit and enough of them tell. Where not, only those are that tell by
  themselves. All others are polygons, or wrong where their number is even.

Whatever is decided for rows that fit is reported, with the count, unless they are plainly polygons: of many lengths, or
convex in the order of their points, as rotated boxes are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_OUTSIDE = 0.01
"""How far a box may reach beyond the image: rounding, and tools that do not clip."""

_BEYOND = 0.2
"""How far a landmark may lie outside its box, in parts of the box: a nose seen from the side."""

_FIT, _TELL = 0.8, 0.2
"""Shares of the rows of a length that have to fit, and to tell, before all of them are boxes with landmarks."""

_SAMPLE = 500
"""Rows of a length that are looked at closely: comparing all sides of all polygons would take long."""

_Row = tuple[float, ...]
_Point = tuple[float, float]


@dataclass(frozen=True)
class Landmarks:
    """Which rows hold landmarks.

    Attributes:
        lengths: Numbers of a row; all rows of these do.
        mixed: Of these, only rows that tell so by themselves.
        declared: Whether data.yaml said so; rows of other lengths are then wrong.
    """

    lengths: frozenset[int] = frozenset()
    mixed: frozenset[int] = frozenset()
    declared: bool = False

    def holds(self, row: Sequence[float]) -> bool:
        """Whether the first five numbers of a row are a box."""
        size = len(row)
        if size in self.mixed:
            return could_hold_landmarks(row) and _is_no_polygon(row, alone=True)
        return size in self.lengths and (self.declared or size % 2 == 1 or _has_visibility(row))


_NO_LANDMARKS = Landmarks()


@dataclass(frozen=True)
class LandmarkDecision:
    """What was decided for the rows of one length.

    Attributes:
        length: Numbers of a row.
        rows, boxes: How many there are, and how many of them are read as a box with landmarks.
        fitting: How many could be.
        numbers: Of each landmark, 2 or 3.
    """

    length: int
    rows: int
    boxes: int
    fitting: int
    numbers: int

    @property
    def message(self) -> str:
        """For a finding."""
        points = (self.length - 5) // self.numbers
        shape = f"kpt_shape: [{points}, {self.numbers}]"
        a_box = f"a box with {points} landmarks behind it"
        if self.boxes:
            polygons = self.rows - self.boxes
            rest = f", {polygons} as polygons" if polygons else ""
            return (
                f"rows of {self.length} numbers: {self.boxes} of {self.rows} are read as {a_box}{rest} (in "
                f"{self.fitting} the box holds them); the landmarks are left out. {shape} in data.yaml confirms it; "
                "kpt_shape: [0, 2] says that all are polygons"
            )
        return (
            f"rows of {self.length} numbers: all {self.rows} are read as polygons, though {self.fitting} of them could "
            f"be {a_box}. If they are, write {shape} in data.yaml; kpt_shape: [0, 2] confirms polygons"
        )


def declared_landmarks(shape: tuple[int, int]) -> Landmarks:
    """What `kpt_shape` says."""
    points, numbers = shape
    return Landmarks(frozenset({5 + points * numbers} if points else ()), declared=bool(points))


@dataclass
class _Tally:
    """Counts of the rows of one length: all, those that fit, of these those that tell alone, and with visibilities."""

    rows: int = 0
    fitting: int = 0
    alone: int = 0
    visible: int = 0
    sample: list[_Row] = field(default_factory=list)  # of those that fit

    def add(self, row: _Row) -> None:
        self.rows += 1
        self.visible += _has_visibility(row)
        if could_hold_landmarks(row):
            self.fitting += 1
            self.alone += _is_no_polygon(row, alone=True)
            if len(self.sample) < _SAMPLE:
                self.sample.append(row)

    @property
    def agreed(self) -> bool:
        return self.fitting >= _FIT * self.rows


def decide_landmarks(rows: Iterable[_Row]) -> tuple[Landmarks, list[LandmarkDecision]]:
    """Decide for all rows of a data set that are longer than a box.

    Returns:
        The decision, and what is worth reporting of it.
    """
    tallies: dict[int, _Tally] = defaultdict(_Tally)
    for row in rows:
        tallies[len(row)].add(row)
    total = sum(tally.rows for tally in tallies.values())
    lengths, mixed, report = set(), set(), []
    for length, tally in sorted(tallies.items()):
        most = 2 * tally.rows > total
        if length % 2 == 0:  # no polygon has an even number
            boxes = tally.visible if tally.fitting else 0
            lengths |= {length} if boxes else set()
        elif tally.agreed and _share_that_tells(tally, most) >= _TELL:
            boxes = tally.rows
            lengths.add(length)
        else:
            boxes = tally.alone
            mixed |= {length} if boxes else set()
        unsure = length % 2 == 1 and most and tally.agreed and not all(map(_is_plain_polygon, tally.sample))
        if boxes or unsure:
            numbers = 3 if tally.visible == tally.rows else 2
            report.append(LandmarkDecision(length, tally.rows, boxes, tally.fitting, numbers))
    return Landmarks(frozenset(lengths), frozenset(mixed)), report


def _share_that_tells(tally: _Tally, most: bool) -> float:
    """Of the rows that fit."""
    if not most:
        return tally.alone / tally.fitting
    return sum(_is_no_polygon(row, alone=False) for row in tally.sample) / len(tally.sample)


def could_hold_landmarks(row: Sequence[float]) -> bool:
    """Whether a row can be a box with landmarks: the box lies in the image and holds those that are not missing."""
    if len(row) < 7 or (len(row) % 2 == 0 and not _has_visibility(row)):
        return False
    x, y, width, height = row[1:5]
    if width <= 0 or height <= 0 or any(abs(c - 0.5) + s / 2 > 0.5 + _OUTSIDE for c, s in ((x, width), (y, height))):
        return False
    reach = 0.5 + _BEYOND
    return all(abs(px - x) <= reach * width and abs(py - y) <= reach * height for px, py in _present(row))


def _is_no_polygon(row: Sequence[float], alone: bool) -> bool:
    """Whether a row that fits would be no sane polygon.

    Args:
        row: Numbers.
        alone: Whether it has to tell by itself, where nothing is known of others: then an outline that crosses itself
            does not count, and a far point only from six points on (of polygons of random points 1 in 2,000 has one).
    """
    missing = len(_landmarks(row)) - len(_present(row))
    if missing >= 2 or (_has_visibility(row) and 2.0 in row[7::3]):
        return True
    points = len(row) // 2
    if points >= (6 if alone else 4) and _is_far(row):
        return True
    return not alone and points >= 5 and _crosses(_outline(row))


def _is_plain_polygon(row: Sequence[float]) -> bool:
    """Whether the points are convex in their order, five or more of them; or a parallelogram, as rotated boxes are."""
    points = _outline(row)
    if len(points) == 4:
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = points
        size = max(abs(ax - cx), abs(ay - cy), abs(bx - dx), abs(by - dy))
        return max(abs(ax + cx - bx - dx), abs(ay + cy - by - dy)) <= 0.05 * size
    count = len(points)
    turns = [_turn(points[i], points[(i + 1) % count], points[(i + 2) % count]) for i in range(count)]
    return count > 4 and (all(t >= 0 for t in turns) or all(t <= 0 for t in turns)) and not _crosses(points)


def _has_visibility(row: Sequence[float]) -> bool:
    tail = row[5:]
    return len(tail) > 0 and len(tail) % 3 == 0 and set(tail[2::3]) <= {0.0, 1.0, 2.0}


def _landmarks(row: Sequence[float]) -> list[_Point]:
    tail, step = row[5:], 3 if _has_visibility(row) else 2
    return list(zip(tail[0::step], tail[1::step], strict=True))


def _present(row: Sequence[float]) -> list[_Point]:
    return [point for point in _landmarks(row) if point != (0.0, 0.0) and max(point) >= 0]


def _outline(row: Sequence[float]) -> list[_Point]:
    return list(zip(row[1::2], row[2::2], strict=False))


def _is_far(row: Sequence[float]) -> bool:
    """Whether the second point is further from the box around all others than that box is long."""
    first, second, *others = _outline(row)
    away = extent = 0.0
    for axis in (0, 1):
        values = [first[axis], *(point[axis] for point in others)]
        away = max(away, min(values) - second[axis], second[axis] - max(values))
        extent = max(extent, max(values) - min(values))
    return away > extent


def _crosses(points: Sequence[_Point]) -> bool:
    count = len(points)
    sides = [(points[i], points[(i + 1) % count]) for i in range(count)]
    return any(_cross(sides[i], sides[j]) for i in range(count) for j in range(i + 2, count) if (j + 1) % count != i)


def _cross(one: tuple[_Point, _Point], other: tuple[_Point, _Point]) -> bool:
    (a, b), (c, d) = one, other
    return _turn(a, b, c) * _turn(a, b, d) < 0 and _turn(c, d, a) * _turn(c, d, b) < 0


def _turn(a: _Point, b: _Point, c: _Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


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
    text: str, box_names: tuple[str, ...], n_image_classes: int | None, landmarks: Landmarks = _NO_LANDMARKS
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


def _parse_object(tokens: list[str], box_names: tuple[str, ...], landmarks: Landmarks = _NO_LANDMARKS) -> Box | str:
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
