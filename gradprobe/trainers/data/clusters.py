"""Which images belong together (the clip and the patient that a file name or a folder tells), and what splits share.

One rule serves the check for leaks between splits and the clusters of the test split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gradprobe.errors import UsageError
from gradprobe.trainers.data.data_yaml import DataConfig
from gradprobe.trainers.data.splits import DataFinding, ImageFile

__all__ = ["Overlap"]


_PATIENT_LEVEL, _CLIP_LEVEL, _GROUP_LEVEL = "patient", "clip", "group"
_LEVELS = (_PATIENT_LEVEL, _CLIP_LEVEL, _GROUP_LEVEL)
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

_Levels = Mapping[str, str]
"""Level -> which; levels that a name does not tell are missing."""


@dataclass(frozen=True)
class Grouping:
    """A rule.

    Attributes:
        rule: As it is given: one of :data:`_CHOICES`, or a regular expression.
        of: Path of an image (with /) -> what it tells.
    """

    rule: str
    of: Callable[[str], _Levels]

    def cluster(self, path: str) -> str | None:
        """The largest thing that the image belongs to; None where its path tells none."""
        levels = self.of(path)
        return levels[_largest_level(levels)] if levels else None

    @property
    def meaning(self) -> str:
        """The rule in words."""
        return _CHOICES.get(self.rule, "a regular expression")

    @property
    def judged(self) -> str:
        """How it was judged, for a message."""
        return "judged from file names" if self.rule == AUTO else f"by --group-by {self.rule}"


def _largest_level(levels: _Levels) -> str:
    """The first of :data:`_LEVELS` that is known."""
    return next(level for level in _LEVELS if level in levels)


def parse_grouping(rule: str) -> Grouping:
    """The rule that ``--group-by`` gives.

    Args:
        rule: One of :data:`_CHOICES`, or a regular expression searched in the file name without its suffix, then
            with it, then in the path. Its groups ``(?P<patient>...)`` and ``(?P<clip>...)``, or the first group, tell
            what the image belongs to; a clip of one patient is another one than a clip of that name of another patient.

    Raises:
        UsageError: Neither; says which.
    """
    if rule == AUTO:
        return Grouping(rule, lambda path: _levels_of_name(PurePosixPath(path).stem))
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
    return Grouping(rule, lambda path: _levels_by_pattern(pattern, path))


def _levels_of_name(stem: str) -> dict[str, str]:
    """The clip and the patient that a file name (without suffix) tells.

    The rule, regardless of case:

    1. The tail that Roboflow's export adds (`_png.rf.0123abc`) is taken off.
    2. A name that begins with patient, pat, pt, subject, subj, sub or case and a number, and goes on after
       it, belongs to that patient: `patient0001_4CH_ED` to `patient0001`.
    3. The number at the end, after a separator or a word frame, frm, fr, f, slice, time or t, is
       taken for a frame number and stripped with them. What is left is the clip if it holds a digit
       (`0X1A2B_17` belongs to `0X1A2B`) or if such a word was there (`anna_frame3` belongs to `anna`).

    So `000000000009`, `image_0042` and `patient012` alone tell nothing.

    >>> _levels_of_name("patient012_a4c_frame03")
    {'patient': 'patient012', 'clip': 'patient012_a4c'}
    >>> _levels_of_name("000000000009")
    {}
    """
    stem = _EXPORT.sub("", stem).lower()
    levels = {}
    if (patient := _PATIENT.match(stem)) is not None:
        levels[_PATIENT_LEVEL] = patient.group(1)
    if (frame := _FRAME.search(stem)) is not None:
        clip = stem[: frame.start()]
        if clip and (frame.group(1) is not None or any(character.isdigit() for character in clip)):
            levels[_CLIP_LEVEL] = clip
    return levels


def clip_of(stem: str) -> str | None:
    """The patient that a file name (without suffix) tells, else the clip, else None; see :func:`_levels_of_name`.

    >>> clip_of("patient012_frame03"), clip_of("000000000009")
    ('patient012', None)
    """
    levels = _levels_of_name(stem)
    return levels.get(_PATIENT_LEVEL, levels.get(_CLIP_LEVEL))


def _folder(path: str) -> _Levels:
    name = PurePosixPath(path).parent.name
    return {} if name.lower() in _SPLIT_FOLDERS else {_GROUP_LEVEL: name}


def _first(match: re.Match[str] | None) -> _Levels:
    return {} if match is None or not match.group(1) else {_GROUP_LEVEL: match.group(1)}


def _levels_by_pattern(pattern: re.Pattern[str], path: str) -> _Levels:
    name = PurePosixPath(path)
    match = next((found for text in (name.stem, name.name, path) if (found := pattern.search(text))), None)
    if match is None:
        return {}
    levels = {level: match.group(level) for level in _LEVELS if pattern.groupindex.get(level) and match.group(level)}
    if not any(level in pattern.groupindex for level in _LEVELS):
        return _first(match)
    patient, clip = levels.get(_PATIENT_LEVEL), levels.get(_CLIP_LEVEL)
    if patient and clip and patient not in clip:
        levels[_CLIP_LEVEL] = f"{patient}/{clip}"
    return levels


def _how() -> str:
    return (
        f"Give one of {', '.join(_CHOICES)}, or a regular expression with a group, such as '^([^_]+)_' or "
        "'(?P<patient>P[0-9]+)_(?P<clip>C[0-9]+)'."
    )


@dataclass(frozen=True)
class _SharedCluster:
    """One clip or patient that two splits have."""

    name: str
    here: int  # its images in the split that should be unseen
    there: int  # and in the other one


@dataclass(frozen=True)
class Overlap:
    """What a split that should be unseen has in common with another one.

    Attributes:
        seen, unseen: The splits.
        images: Of the unseen one.
        pictures: How many of them are in the other split as well, by path or by pixels.
        totals: Level -> clips, patients or groups of the unseen split; levels that no name tells are missing.
        shared: Level -> those that both have, most images first.
    """

    seen: str
    unseen: str
    images: int
    pictures: int
    totals: Mapping[str, int]
    shared: Mapping[str, Sequence[_SharedCluster]]

    @property
    def message(self) -> str:
        """In one line, the smallest level first."""
        counts = [(len(self.shared[level]), total, f"{level}s") for level, total in self.totals.items()][::-1]
        if self.pictures or not counts:
            counts.append((self.pictures, self.images, "images"))
        (found, total, what), *others = counts
        first = f"{found} of {total} {self.unseen} {what} also in {self.seen}"
        return "; ".join([first, *(f"{found} of {total} {what}" for found, total, what in others)])

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found in common."""
        return not self.pictures and not any(self.shared.values())


def find_duplicates(images: Sequence[ImageFile], digests: Mapping[Path, str]) -> list[DataFinding]:
    """A warning for each image whose pixels an earlier image of the same split has."""
    findings = []
    first: dict[tuple[str, str], ImageFile] = {}
    for image in images:
        if (digest := digests.get(image.path)) is None:
            continue
        earlier = first.setdefault((image.split, digest), image)
        if earlier is not image:
            message = f"{image.split}: the same picture as {earlier.shown}"
            findings.append(DataFinding("warning", image.shown, None, message, "duplicate"))
    return findings


def find_leaks(
    config: DataConfig,
    splits: Mapping[str, Sequence[ImageFile]],
    digests: Mapping[Path, str],
    grouping: Grouping,
) -> tuple[list[Overlap], list[DataFinding]]:
    """What train shares with val or test, and val with test.

    Returns:
        One overlap for each pair of splits; and warnings, one for each image that is in both (one for all, where every
        image is), one for each clip or patient.
    """
    levels = {split: [grouping.of(image.shown) for image in images] for split, images in splits.items()}
    names = list(splits)
    overlaps, findings = [], []
    for position, seen in enumerate(names):
        for unseen in names[position + 1 :]:
            twins = _twins(splits[seen], splits[unseen], digests)
            pictures = sum(twin is not None for twin in twins)
            totals, shared = _shared_levels(levels[seen], levels[unseen])
            overlaps.append(Overlap(seen, unseen, len(twins), pictures, totals, shared))
            findings += _leak_warnings(config, seen, unseen, splits, twins, grouping)
    return overlaps, findings


def _twins(
    seen: Sequence[ImageFile], unseen: Sequence[ImageFile], digests: Mapping[Path, str]
) -> list[ImageFile | None]:
    """For each image of one split the same one of the other."""
    by_path = {image.path: image for image in seen}
    by_digest = {digests[image.path]: image for image in reversed(seen) if image.path in digests}
    return [by_path.get(image.path) or by_digest.get(digests.get(image.path, "")) for image in unseen]


def _shared_levels(
    there: Sequence[_Levels], here: Sequence[_Levels]
) -> tuple[dict[str, int], dict[str, list[_SharedCluster]]]:
    totals, shared = {}, {}
    for level in _LEVELS:
        ours, theirs = (Counter(levels[level] for levels in side if level in levels) for side in (here, there))
        if ours:
            both = [_SharedCluster(name, count, theirs[name]) for name, count in ours.items() if theirs[name]]
            totals[level], shared[level] = len(ours), sorted(both, key=lambda each: (-each.here, -each.there))
    return totals, shared


def _leak_warnings(
    config: DataConfig,
    seen: str,
    unseen: str,
    splits: Mapping[str, Sequence[ImageFile]],
    twins: Sequence[ImageFile | None],
    grouping: Grouping,
) -> list[DataFinding]:
    images = splits[unseen]
    if images and all(twin is not None for twin in twins):
        message = (
            f"{unseen}: every one of its {len(images)} images is also in {seen}; "
            f"what is measured on {unseen} is not measured on unseen images"
        )
        return [DataFinding("warning", config.shown_file, config.lines.get(unseen), message)]
    findings, others = [], []
    for image, twin in zip(images, twins, strict=True):
        if twin is None:
            others.append(image)
        else:
            same = "is also in" if twin.path == image.path else f"is the same picture as {twin.shown} in"
            findings.append(DataFinding("warning", image.shown, None, f"{unseen}: {same} {seen}", "picture"))
    return findings + _shared_clusters(seen, splits[seen], unseen, others, grouping)


def _shared_clusters(
    seen: str,
    seen_images: Sequence[ImageFile],
    unseen: str,
    unseen_images: Sequence[ImageFile],
    grouping: Grouping,
) -> list[DataFinding]:
    here, there = _by_cluster(unseen_images, grouping), _by_cluster(seen_images, grouping)

    def what(image: ImageFile) -> str:
        return "clip or patient" if grouping.rule == AUTO else _largest_level(grouping.of(image.shown))

    return [
        DataFinding(
            "warning",
            images[0].shown,
            None,
            f"{unseen}: {what(images[0])} {name!r} ({grouping.judged}) has {len(images)} images here and "
            f"{len(there[name])} in {seen}, such as {there[name][0].shown}",
            "cluster",
            len(images),
        )
        for name, images in here.items()
        if name in there
    ]


def _by_cluster(images: Sequence[ImageFile], grouping: Grouping) -> dict[str, list[ImageFile]]:
    clusters: dict[str, list[ImageFile]] = {}
    for image in images:
        if (name := grouping.cluster(image.shown)) is not None:
            clusters.setdefault(name, []).append(image)
    return clusters
