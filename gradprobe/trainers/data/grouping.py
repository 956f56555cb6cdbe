"""Which images belong together: the clip and the patient that a file name, or a folder, tells.

One rule serves the check for leaks between splits and the clusters of the test split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from gradprobe.errors import UsageError

PATIENT, CLIP, GROUP = "patient", "clip", "group"
LEVELS = (PATIENT, CLIP, GROUP)
"""What belongs together, the largest first; images of one patient are of one cluster, whatever their clips."""

AUTO = "auto"
_CHOICES = {
    AUTO: "names that begin with patient, pat, pt, subject, subj, sub or case and a number; frame numbers at the end",
    "folder": "the folder that holds the image, below that of its split",
    "prefix": "the file name up to its first _, -, blank or full stop",
    "none": "every image by itself",
}

_EXPORT = re.compile(r"_(?:jpe?g|png|bmp|tiff?|webp)\.rf\.[0-9a-z]+$", re.IGNORECASE)
_PATIENT = re.compile(r"^((?:patient|pat|pt|subject|subj|sub|case)[ _.-]?\d+)(?!\d)[ _.-]?(?=.)", re.IGNORECASE)
_FRAME = re.compile(r"(?:(?:[ _.-]+|(?<=\d))(frame|frm|fr|f|slice|time|t)[ _.-]*|[ _.-]+)\d+$", re.IGNORECASE)
_PREFIX = re.compile(r"^([^_\-. ]+)[_\-. ]")
_SPLIT_FOLDERS = frozenset({"", "images", "train", "val", "valid", "validation", "test", "."})

Told = Mapping[str, str]
"""Level -> which; levels that a name does not tell are missing."""


@dataclass(frozen=True)
class Grouping:
    """A rule.

    Attributes:
        rule: As it is given: one of :data:`_CHOICES`, or a regular expression.
        of: Path of an image (with /) -> what it tells.
    """

    rule: str
    of: Callable[[str], Told]

    def cluster(self, path: str) -> str | None:
        """The largest thing that the image belongs to; None where its path tells none."""
        told = self.of(path)
        return told[largest(told)] if told else None

    @property
    def meaning(self) -> str:
        """The rule in words."""
        return _CHOICES.get(self.rule, "a regular expression")

    @property
    def judged(self) -> str:
        """How it was judged, for a message."""
        return "judged from file names" if self.rule == AUTO else f"by --group-by {self.rule}"


def largest(told: Told) -> str:
    """The first of :data:`LEVELS` that is told."""
    return next(level for level in LEVELS if level in told)


def parse(rule: str) -> Grouping:
    """The rule that ``--group-by`` gives.

    Args:
        rule: One of :data:`_CHOICES`, or a regular expression searched in the file name without its suffix, then
            with it, then in the path. Its groups ``(?P<patient>...)`` and ``(?P<clip>...)``, or the first group, tell
            what the image belongs to; a clip of one patient is another one than a clip of that name of another patient.

    Raises:
        UsageError: Neither; says which.
    """
    if rule == AUTO:
        return Grouping(rule, lambda path: _told_by_name(PurePosixPath(path).stem))
    if rule == "none":
        return Grouping(rule, lambda path: {})
    if rule == "folder":
        return Grouping(rule, _folder)
    if rule == "prefix":
        return Grouping(rule, lambda path: _first(_PREFIX.search(PurePosixPath(path).stem)))
    try:
        pattern = re.compile(rule)
    except re.error as problem:
        raise UsageError(f"--group-by {rule!r}: is no regular expression: {problem}. {_how()}") from None
    if not pattern.groups:
        raise UsageError(f"--group-by {rule!r}: a regular expression needs a group in ( ). {_how()}")
    return Grouping(rule, lambda path: _told_by(pattern, path))


def _told_by_name(stem: str) -> dict[str, str]:
    """The clip and the patient that a file name (without suffix) tells.

    The rule, regardless of case:

    1. The tail that Roboflow's export adds (`_png.rf.0123abc`) is taken off.
    2. A name that begins with patient, pat, pt, subject, subj, sub or case and a number, and goes on after
       it, belongs to that patient: `patient0001_4CH_ED` to `patient0001`.
    3. The number at the end, after a separator or a word frame, frm, fr, f, slice, time or t, is
       taken for a frame number and stripped with them. What is left is the clip if it holds a digit
       (`0X1A2B_17` belongs to `0X1A2B`) or if such a word was there (`anna_frame3` belongs to `anna`).

    So `000000000009`, `image_0042` and `patient012` alone tell nothing.

    >>> _told_by_name("patient012_a4c_frame03")
    {'patient': 'patient012', 'clip': 'patient012_a4c'}
    >>> _told_by_name("000000000009")
    {}
    """
    stem = _EXPORT.sub("", stem).lower()
    told = {}
    if (patient := _PATIENT.match(stem)) is not None:
        told[PATIENT] = patient.group(1)
    if (frame := _FRAME.search(stem)) is not None:
        clip = stem[: frame.start()]
        if clip and (frame.group(1) is not None or any(character.isdigit() for character in clip)):
            told[CLIP] = clip
    return told


def clip_of(stem: str) -> str | None:
    """The patient that a file name (without suffix) tells, else the clip, else None; see :func:`_told_by_name`.

    >>> clip_of("patient012_frame03"), clip_of("000000000009")
    ('patient012', None)
    """
    told = _told_by_name(stem)
    return told.get(PATIENT, told.get(CLIP))


def _folder(path: str) -> Told:
    name = PurePosixPath(path).parent.name
    return {} if name.lower() in _SPLIT_FOLDERS else {GROUP: name}


def _first(match: re.Match[str] | None) -> Told:
    return {} if match is None or not match.group(1) else {GROUP: match.group(1)}


def _told_by(pattern: re.Pattern[str], path: str) -> Told:
    name = PurePosixPath(path)
    match = next((found for text in (name.stem, name.name, path) if (found := pattern.search(text))), None)
    if match is None:
        return {}
    told = {level: match.group(level) for level in LEVELS if pattern.groupindex.get(level) and match.group(level)}
    if not any(level in pattern.groupindex for level in LEVELS):
        return _first(match)
    patient, clip = told.get(PATIENT), told.get(CLIP)
    if patient and clip and patient not in clip:
        told[CLIP] = f"{patient}/{clip}"
    return told


def _how() -> str:
    return (
        f"Give one of {', '.join(_CHOICES)}, or a regular expression with a group, such as '^([^_]+)_' or "
        "'(?P<patient>P[0-9]+)_(?P<clip>C[0-9]+)'."
    )
