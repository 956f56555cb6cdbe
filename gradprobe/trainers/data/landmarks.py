"""Rows of a label file that hold a box and landmarks or keypoints behind it, told from polygons.

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

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_OUTSIDE = 0.01
"""How far a box may reach beyond the image: rounding, and tools that do not clip."""

_BEYOND = 0.2
"""How far a landmark may lie outside its box, in parts of the box: a nose seen from the side."""

FIT, TELL = 0.8, 0.2
"""Shares of the rows of a length that have to fit, and to tell, before all of them are boxes with landmarks."""

SAMPLE = 500
"""Rows of a length that are looked at closely: comparing all sides of all polygons would take long."""

Row = tuple[float, ...]
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
            return fits(row) and tells(row, alone=True)
        return size in self.lengths and (self.declared or size % 2 == 1 or _has_visibility(row))


NONE = Landmarks()


@dataclass(frozen=True)
class Judged:
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


def declared(shape: tuple[int, int]) -> Landmarks:
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
    sample: list[Row] = field(default_factory=list)  # of those that fit

    def add(self, row: Row) -> None:
        self.rows += 1
        self.visible += _has_visibility(row)
        if fits(row):
            self.fitting += 1
            self.alone += tells(row, alone=True)
            if len(self.sample) < SAMPLE:
                self.sample.append(row)

    @property
    def agreed(self) -> bool:
        return self.fitting >= FIT * self.rows


def judge(rows: Iterable[Row]) -> tuple[Landmarks, list[Judged]]:
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
        elif tally.agreed and _share_that_tells(tally, most) >= TELL:
            boxes = tally.rows
            lengths.add(length)
        else:
            boxes = tally.alone
            mixed |= {length} if boxes else set()
        unsure = length % 2 == 1 and most and tally.agreed and not all(map(_is_plain_polygon, tally.sample))
        if boxes or unsure:
            numbers = 3 if tally.visible == tally.rows else 2
            report.append(Judged(length, tally.rows, boxes, tally.fitting, numbers))
    return Landmarks(frozenset(lengths), frozenset(mixed)), report


def _share_that_tells(tally: _Tally, most: bool) -> float:
    """Of the rows that fit."""
    if not most:
        return tally.alone / tally.fitting
    return sum(tells(row, alone=False) for row in tally.sample) / len(tally.sample)


def fits(row: Sequence[float]) -> bool:
    """Whether a row can be a box with landmarks: the box lies in the image and holds those that are not missing."""
    if len(row) < 7 or (len(row) % 2 == 0 and not _has_visibility(row)):
        return False
    x, y, width, height = row[1:5]
    if width <= 0 or height <= 0 or any(abs(c - 0.5) + s / 2 > 0.5 + _OUTSIDE for c, s in ((x, width), (y, height))):
        return False
    reach = 0.5 + _BEYOND
    return all(abs(px - x) <= reach * width and abs(py - y) <= reach * height for px, py in _present(row))


def tells(row: Sequence[float], alone: bool) -> bool:
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
