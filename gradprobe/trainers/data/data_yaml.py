"""A data.yaml, as YOLOv5 users write it, with two keys more: image_names and image_labels; and the paths in it."""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe.errors import DataError, MissingExtraError
from gradprobe.whole_files import read

__all__ = ["read_config"]


SPLITS = ("train", "val", "test")
_NAMES = ("names", "image_names")
_VALUES = ("path", *SPLITS, "nc", "image_labels", "kpt_shape")
"""Keys that are read, beside those of names."""

_VAL = ("valid", "validation", "dev")
"""Keys that others write for val."""


@dataclass(frozen=True)
class DataConfig:
    """A data.yaml that was read and is well-formed; of what it names only the folder `path` has been looked for."""

    file: Path
    root: Path  # what relative paths in it are relative to
    sources: dict[str, tuple[str, ...]]  # split -> folders, images and txt files, as written
    box_names: tuple[str, ...]
    image_names: tuple[str, ...] | None  # None: to be counted from the one-hot rows
    image_labels: str | None  # the csv, as written; None: one-hot rows in the label files
    keypoints: tuple[int, int] | None  # kpt_shape: points and numbers of each in a row behind a box; None: not given
    lines: dict[str, int]  # line of each key, from 1

    @property
    def shown_file(self) -> str:
        """The data.yaml as messages show it."""
        return self.shown(self.file.resolve())

    def shown(self, path: Path) -> str:
        """A path as messages show it: relative to the root where it lies inside."""
        try:
            return path.relative_to(self.root).as_posix()
        except ValueError:
            return str(path)


def read_config(file: str | Path) -> DataConfig:
    """Read a data.yaml.

    `path` is relative to the yaml's own folder (or absolute) and by default that folder; train, val and
    test are relative to `path`. `names` and `image_names` are lists, or maps from 0, 1, 2, ... to names;
    a name is the text that stands in the file, also where YAML 1.1 makes something else of it (no, 1.0, 12:30).

    Raises:
        DataError: the file is missing, empty or malformed; says file and line.
    """
    file = Path(file)
    values, nodes, lines = _read_yaml(file)

    def fail(key: str, problem: str) -> DataError:
        return DataError(f"{file}:{lines[key]}: {problem}" if key in lines else f"{file}: {problem}")

    box_names = _class_names(nodes.get("names"), "names", fail)
    if box_names is None:
        raise fail("names", "no key 'names'; list the box classes, for example names: [AR, MR]")
    count = values.get("nc")
    if count is not None and str(count) != str(len(box_names)):
        raise fail("nc", f"nc is {_shown(count)}, but names has {len(box_names)} classes; make them agree")
    root = _path(values, "path", fail) or "."
    sources = _all_sources(values, lines, fail)
    labels = _path(values, "image_labels", fail)
    image_names = _class_names(nodes.get("image_names"), "image_names", fail)
    if labels is not None and image_names is None:
        raise fail("image_labels", "image_labels needs image_names: the list of image classes")
    if image_names is not None and len(image_names) == 1:
        raise fail("image_names", "image_names has one class; a classifier needs at least two")
    return DataConfig(
        file=file,
        root=_root(file.resolve().parent, root, sources, fail),
        sources=sources,
        box_names=box_names,
        image_names=image_names,
        image_labels=labels,
        keypoints=_keypoints(values, fail),
        lines=lines,
    )


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The values by key, but for those of names; the nodes of names; and each key's line."""
    try:
        import yaml

        from gradprobe.trainers.yaml_file import compose, yaml_problem
    except ImportError:
        raise MissingExtraError("pyyaml", "yolov5", "reading a data.yaml") from None
    try:
        if file.is_dir():
            raise DataError(f"{file}: a folder; name the data.yaml in it")
        loader, node = compose(file)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise DataError(f"{file}: empty; it needs train, val and names")
        if not isinstance(node, yaml.MappingNode):
            kind = "list" if isinstance(node, yaml.SequenceNode) else "text"
            raise DataError(f"{file}:1: a {kind} instead of keys such as train, val and names")
        lines = _lines(file, node)
        loader.flatten_mapping(node)
        nodes = {str(key.value): value for key, value in node.value}
        values = {key: loader.construct_document(nodes[key]) for key in _VALUES if key in nodes}
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; give a data.yaml, or 'phantom' for the embedded set") from None
    except (OSError, UnicodeError) as problem:
        raise DataError(f"{file}: cannot be read: {problem}") from None
    except yaml.YAMLError as problem:
        line, reason = yaml_problem(problem)
        if "escape" in reason:  # C:\data in double quotes
            reason = f"{reason}; in double quotes a backslash begins one: write / between folders, or single quotes"
        raise DataError(f"{file}{f':{line}' if line else ''}: not valid YAML: {reason}") from None
    return values, {key: nodes[key] for key in _NAMES if key in nodes}, lines


def _lines(file: Path, node: Any) -> dict[str, int]:
    for key, first, second in _repeated_keys(node, (*_NAMES, *_VALUES)):
        raise DataError(f"{file}:{second}: the key {key!r} stands in line {first} already; keep one of them")
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _root(folder: Path, path: str, sources: Mapping[str, Sequence[str]], fail: _Fail) -> Path:
    places = candidate_paths(path, (folder,))
    found = first_existing(places, Path.is_dir)
    if found is None and not all(Path(source).is_absolute() for split in sources.values() for source in split):
        raise fail(
            "path",
            f"path: {path} is no folder; {searched(path, places)}; a relative one starts at data.yaml's own folder, "
            "which is the default",
        )
    return (found or folder).resolve()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _keypoints(values: dict[str, Any], fail: _Fail) -> tuple[int, int] | None:
    value = values.get("kpt_shape")
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value):
        points, numbers = value
        if points >= 0 and numbers in (2, 3):
            return points, numbers
    raise fail(
        "kpt_shape", f"kpt_shape is {_shown(value)}; write [points, 2] or [points, 3], and [0, 2] for rows without any"
    )


def _path(values: dict[str, Any], key: str, fail: _Fail) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise fail(key, f"{key} is {_shown(value)}; it has to be a path; put one that looks otherwise in quotes")
    return value


def _all_sources(values: dict[str, Any], lines: Mapping[str, int], fail: _Fail) -> dict[str, tuple[str, ...]]:
    sources = {}
    for split in SPLITS:
        value = values.get(split)
        if value is None and split == "test":
            continue
        if value is None:
            other = next((key for key in _VAL if split == "val" and key in lines), None)
            hint = f"; rename the key {other!r} to {split!r}" if other else ""
            raise fail(split, f"no key {split!r}; give a folder of images, a txt file that lists them, or both{hint}")
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, str) for entry in entries):
            raise fail(
                split,
                f"{split} is {_shown(value)}; it has to be a path or a list of paths; put one that looks otherwise in "
                "quotes",
            )
        sources[split] = tuple(entries)
    return sources


_Fail = Callable[[str, str], DataError]
"""From a key of data.yaml and what is wrong with it to the error that names file and line."""


def _class_names(node: Any, key: str, fail: _Fail) -> tuple[str, ...] | None:
    """The names that a node of a composed YAML document lists; None where it is null.

    They are taken as the text that stands in the file, which is what a csv file, or a person, means: YAML 1.1 reads
    ``no`` as a truth value, ``12:30`` as a number of seconds, ``1_000`` and ``0x10`` as numbers, ``2024-01-01`` as a
    date.

    Args:
        node: A list of names, or a map from 0, 1, 2, ... (in quotes or not, in any order) to names.
        key: Of data.yaml, for messages.
        fail: Makes the error.
    """
    if node is None or _is_null(node):
        return None
    if node.id == "sequence":
        names = [_text(each, f"entry {place} of {key}", key, fail) for place, each in enumerate(node.value)]
    elif node.id == "mapping":
        names = _numbered(node, key, fail)
    else:
        names = []
    if not names:
        shown = repr(node.value) if node.id == "scalar" else "empty"
        raise fail(key, f"{key} is {shown}; it has to be a list of classes or a map from 0, 1, ... to them")
    if (twice := _twice(names)) is not None:
        raise fail(key, f"{key} has the class {twice!r} more than once")
    return tuple(names)


def _is_null(node: Any) -> bool:
    """Whether nothing, or ~, or null stands there."""
    return bool(node.tag == "tag:yaml.org,2002:null")


def _numbered(node: Any, key: str, fail: _Fail) -> list[str]:
    texts = [_text(number, f"a key of {key}", key, fail).strip() for number, _ in node.value]
    if wrong := [text for text in texts if not (text.isascii() and text.isdigit())]:
        how = f"write 0: {wrong[0]}, 1: ..., or a list [{wrong[0]}, ...] in the order of the classes"
        raise fail(
            key, f"the keys of {key} are not 0, 1, ..., {len(texts) - 1}: {wrong[0]!r} is no whole number; {how}"
        )
    numbers = [int(text) for text in texts]
    if (twice := _twice(numbers)) is not None:
        raise fail(key, f"{key} numbers two classes {twice}; each class needs a number of its own")
    if missing := sorted(set(range(len(numbers))) - set(numbers)):
        raise fail(
            key,
            f"the keys of {key} are not 0, 1, ..., {len(numbers) - 1}: {_listed(missing)} missing, though there are "
            f"{len(numbers)} classes up to number {max(numbers)}; name the classes that lack, or number the classes "
            "anew here and in the label files alike",
        )
    by_number = {number: value for number, (_, value) in zip(numbers, node.value, strict=True)}
    return [_text(by_number[number], f"class {number} of {key}", key, fail) for number in sorted(by_number)]


def _text(node: Any, what: str, key: str, fail: _Fail) -> str:
    if node.id != "scalar":
        kind = "list" if node.id == "sequence" else "map (is there a colon in it?)"
        raise fail(key, f"{what} is a {kind}, not a name; put a name with such signs in quotes")
    if not node.value.strip():
        raise fail(key, f"{what} is empty; give the class a name")
    return str(node.value)


def _twice(values: list[Any]) -> Any | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return f"{shown} {'is' if len(numbers) == 1 else 'are'}"


def _repeated_keys(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Keys of a map that stand in it twice, with both lines, from 1; YAML would silently take the last."""
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in keys and first.setdefault(key.value, line) != line:
            yield key.value, first[key.value], line


# ---- paths as other people write them: with backslashes, one ``../`` too many, blanks at the end

_DRIVE = re.compile(r"[A-Za-z]:|\\\\")
_CONTROL = re.compile(r"[\x00-\x1f]")


def candidate_paths(written: str, bases: Sequence[Path]) -> list[Path]:
    """Where a path may be meant to lie, in the order in which it is looked for.

    As written, relative to each of the bases; then with slashes for backslashes; then without a ``../`` in front, as
    YOLOv5 7.0 does for the data.yaml that Roboflow exports.

    >>> [place.as_posix() for place in candidate_paths("..\\\\train", [Path("set")])]
    ['set/..\\\\train', 'set/../train', 'set/train']
    """
    spellings = list(_spellings(written))
    inner = [text[3:] for text in spellings if text.startswith("../")]
    return list(dict.fromkeys(base / text for text in (*spellings, *inner) for base in bases))


def first_existing(places: Sequence[Path], is_there: Callable[[Path], bool] = Path.exists) -> Path | None:
    """The first of some places that is there; None where none is."""
    return next((place for place in places if _holds(is_there, place)), None)


def searched(written: str, places: Sequence[Path]) -> str:
    """For an error: everywhere that was looked, and what is odd about the path itself."""
    seen = list(dict.fromkeys(os.path.normpath(place) for place in places))
    return (f"looked for {', '.join(seen)}" if seen else "the path is empty") + path_hint(written)


def path_hint(written: str) -> str:
    """What is odd about a path that was not found, to be put behind a message; often empty."""
    if _DRIVE.match(written.strip()):
        return (
            "; it begins with a drive letter or a share of a Windows machine: write it relative to the data set's own "
            "folder, with / between folders"
        )
    if (control := _CONTROL.search(written)) is not None:
        return (
            f"; it holds the control character {control.group()!r}: YAML reads a backslash in double quotes as the "
            "beginning of one, so write / between folders, or single quotes"
        )
    return "; it has backslashes, which were tried as they are and as /" if "\\" in written else ""


MAX_TEXT, MAX_IMAGE = 64 << 20, 1 << 30
"""Bytes of the largest text and of the largest image file that are read: what is larger is none by mistake."""


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 where it begins so (PowerShell writes it).

    Raises:
        OSError, UnicodeDecodeError: It cannot be read, or is larger than any label or listing.
    """
    content = read(path, MAX_TEXT)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _spellings(written: str) -> Iterator[str]:
    if written.strip():
        yield written
        yield written.strip()
        yield written.strip().replace("\\", "/")


def _holds(is_there: Callable[[Path], bool], place: Path) -> bool:
    try:
        return is_there(place)
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False
