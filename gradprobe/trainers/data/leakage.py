"""The same picture, clip or patient where it should not be: twice in a split, or in two splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradprobe.trainers.data.config import DataConfig
from gradprobe.trainers.data.findings import Finding
from gradprobe.trainers.data.grouping import AUTO, LEVELS, Grouping, Told, largest
from gradprobe.trainers.data.splits import ImageFile


@dataclass(frozen=True)
class Shared:
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
    shared: Mapping[str, Sequence[Shared]]

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


def duplicates(images: Sequence[ImageFile], digests: Mapping[Path, str]) -> list[Finding]:
    """A warning for each image whose pixels an earlier image of the same split has."""
    findings = []
    first: dict[tuple[str, str], ImageFile] = {}
    for image in images:
        if (digest := digests.get(image.path)) is None:
            continue
        earlier = first.setdefault((image.split, digest), image)
        if earlier is not image:
            message = f"{image.split}: the same picture as {earlier.shown}"
            findings.append(Finding("warning", image.shown, None, message, "duplicate"))
    return findings


def leaks(
    config: DataConfig,
    splits: Mapping[str, Sequence[ImageFile]],
    digests: Mapping[Path, str],
    grouping: Grouping,
) -> tuple[list[Overlap], list[Finding]]:
    """What train shares with val or test, and val with test.

    Returns:
        One overlap for each pair of splits; and warnings, one for each image that is in both (one for all, where every
        image is), one for each clip or patient.
    """
    told = {split: [grouping.of(image.shown) for image in images] for split, images in splits.items()}
    names = list(splits)
    overlaps, findings = [], []
    for position, seen in enumerate(names):
        for unseen in names[position + 1 :]:
            twins = _twins(splits[seen], splits[unseen], digests)
            pictures = sum(twin is not None for twin in twins)
            totals, shared = _shared(told[seen], told[unseen])
            overlaps.append(Overlap(seen, unseen, len(twins), pictures, totals, shared))
            findings += _warnings(config, seen, unseen, splits, twins, grouping)
    return overlaps, findings


def _twins(
    seen: Sequence[ImageFile], unseen: Sequence[ImageFile], digests: Mapping[Path, str]
) -> list[ImageFile | None]:
    """For each image of one split the same one of the other."""
    by_path = {image.path: image for image in seen}
    by_digest = {digests[image.path]: image for image in reversed(seen) if image.path in digests}
    return [by_path.get(image.path) or by_digest.get(digests.get(image.path, "")) for image in unseen]


def _shared(there: Sequence[Told], here: Sequence[Told]) -> tuple[dict[str, int], dict[str, list[Shared]]]:
    totals, shared = {}, {}
    for level in LEVELS:
        ours, theirs = (Counter(told[level] for told in side if level in told) for side in (here, there))
        if ours:
            both = [Shared(name, count, theirs[name]) for name, count in ours.items() if theirs[name]]
            totals[level], shared[level] = len(ours), sorted(both, key=lambda each: (-each.here, -each.there))
    return totals, shared


def _warnings(
    config: DataConfig,
    seen: str,
    unseen: str,
    splits: Mapping[str, Sequence[ImageFile]],
    twins: Sequence[ImageFile | None],
    grouping: Grouping,
) -> list[Finding]:
    images = splits[unseen]
    if images and all(twin is not None for twin in twins):
        message = (
            f"{unseen}: every one of its {len(images)} images is also in {seen}; "
            f"what is measured on {unseen} is not measured on unseen images"
        )
        return [Finding("warning", config.shown_file, config.lines.get(unseen), message)]
    findings, others = [], []
    for image, twin in zip(images, twins, strict=True):
        if twin is None:
            others.append(image)
        else:
            same = "is also in" if twin.path == image.path else f"is the same picture as {twin.shown} in"
            findings.append(Finding("warning", image.shown, None, f"{unseen}: {same} {seen}", "picture"))
    return findings + _shared_clusters(seen, splits[seen], unseen, others, grouping)


def _shared_clusters(
    seen: str,
    seen_images: Sequence[ImageFile],
    unseen: str,
    unseen_images: Sequence[ImageFile],
    grouping: Grouping,
) -> list[Finding]:
    here, there = _by_cluster(unseen_images, grouping), _by_cluster(seen_images, grouping)

    def what(image: ImageFile) -> str:
        return "clip or patient" if grouping.rule == AUTO else largest(grouping.of(image.shown))

    return [
        Finding(
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
