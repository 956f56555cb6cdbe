"""The same picture, clip or patient where it should not be: twice in a split, or in two splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradprobe.trainers.data.config import DataConfig
from gradprobe.trainers.data.findings import Finding
from gradprobe.trainers.data.splits import ImageFile

_EXPORT = re.compile(r"_(?:jpe?g|png|bmp|tiff?|webp)\.rf\.[0-9a-z]+$", re.IGNORECASE)
_PATIENT = re.compile(r"^((?:patient|pat|pt|subject|subj|sub|case)[ _.-]?\d+)(?!\d)[ _.-]?(?=.)", re.IGNORECASE)
_FRAME = re.compile(r"(?:(?:[ _.-]+|(?<=\d))(frame|frm|fr|f|slice|time|t)[ _.-]*|[ _.-]+)\d+$", re.IGNORECASE)


def clip_of(stem: str) -> str | None:
    """The clip or patient that a file name (without suffix) belongs to, or None where it tells none.

    The rule, regardless of case:

    1. The tail that Roboflow's export adds (`_png.rf.0123abc`) is taken off.
    2. A name that begins with patient, pat, pt, subject, subj, sub or case and a number, and goes on after
       it, belongs to that patient: `patient0001_4CH_ED` to `patient0001`.
    3. Otherwise the number at the end, after a separator or a word frame, frm, fr, f, slice, time or t, is
       taken for a frame number and stripped with them. What is left is the clip if it holds a digit
       (`0X1A2B_17` belongs to `0X1A2B`) or if such a word was there (`anna_frame3` belongs to `anna`).

    So `000000000009`, `image_0042` and `patient012` alone tell no clip.

    >>> clip_of("patient012_frame03"), clip_of("000000000009")
    ('patient012', None)
    """
    stem = _EXPORT.sub("", stem).lower()
    if (patient := _PATIENT.match(stem)) is not None:
        return patient.group(1)
    frame = _FRAME.search(stem)
    if frame is None:
        return None
    clip = stem[: frame.start()]
    told = frame.group(1) is not None or any(character.isdigit() for character in clip)
    return clip if clip and told else None


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
            findings.append(Finding("warning", image.shown, None, message))
    return findings


def leaks(config: DataConfig, splits: Mapping[str, Sequence[ImageFile]], digests: Mapping[Path, str]) -> list[Finding]:
    """Warnings about what train shares with val or test, and val with test.

    One for each image that is in both (one for all, where every image is), one for each clip or patient.
    """
    names = list(splits)
    findings = []
    for position, seen in enumerate(names):
        for unseen in names[position + 1 :]:
            findings += _leaks_between(config, seen, splits[seen], unseen, splits[unseen], digests)
    return findings


def _leaks_between(
    config: DataConfig,
    seen: str,
    seen_images: Sequence[ImageFile],
    unseen: str,
    unseen_images: Sequence[ImageFile],
    digests: Mapping[Path, str],
) -> list[Finding]:
    by_path = {image.path: image for image in seen_images}
    by_digest = {digests[image.path]: image for image in reversed(seen_images) if image.path in digests}
    findings, others = [], []
    for image in unseen_images:
        twin = by_path.get(image.path) or by_digest.get(digests.get(image.path, ""))
        if twin is None:
            others.append(image)
        else:
            same = "is also in" if twin.path == image.path else f"is the same picture as {twin.shown} in"
            findings.append(Finding("warning", image.shown, None, f"{unseen}: {same} {seen}"))
    if unseen_images and not others:
        message = (
            f"{unseen}: every one of its {len(unseen_images)} images is also in {seen}; "
            f"what is measured on {unseen} is not measured on unseen images"
        )
        return [Finding("warning", config.shown_file, config.lines.get(unseen), message)]
    return findings + _shared_clips(seen, seen_images, unseen, others)


def _shared_clips(
    seen: str, seen_images: Sequence[ImageFile], unseen: str, unseen_images: Sequence[ImageFile]
) -> list[Finding]:
    clips: dict[str, tuple[list[ImageFile], list[ImageFile]]] = defaultdict(lambda: ([], []))
    for side, images in enumerate((seen_images, unseen_images)):
        for image in images:
            if (clip := clip_of(Path(image.name).stem)) is not None:
                clips[clip][side].append(image)
    return [
        Finding(
            "warning",
            there[0].shown,
            None,
            f"{unseen}: clip or patient {clip!r} (judged from file names) has {len(there)} images here and "
            f"{len(here)} in {seen}, such as {here[0].shown}",
        )
        for clip, (here, there) in clips.items()
        if here and there
    ]
