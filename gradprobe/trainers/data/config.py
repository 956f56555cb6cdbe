"""data.yaml, as YOLOv5 users write it, with two keys more: image_names and image_labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe.errors import DataError, MissingExtraError
from gradprobe.trainers.data.class_names import Fail, class_names, repeated_keys
from gradprobe.trainers.data.places import candidates, find, looked_for

SPLITS = ("train", "val", "test")
NAMES = ("names", "image_names")
VALUES = ("path", *SPLITS, "nc", "image_labels", "kpt_shape")
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

    box_names = class_names(nodes.get("names"), "names", fail)
    if box_names is None:
        raise fail("names", "no key 'names'; list the box classes, for example names: [AR, MR]")
    count = values.get("nc")
    if count is not None and str(count) != str(len(box_names)):
        raise fail("nc", f"nc is {_shown(count)}, but names has {len(box_names)} classes; make them agree")
    root = _path(values, "path", fail) or "."
    sources = _all_sources(values, lines, fail)
    labels = _path(values, "image_labels", fail)
    image_names = class_names(nodes.get("image_names"), "image_names", fail)
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

        from gradprobe.trainers.yaml_file import compose, told
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
        values = {key: loader.construct_document(nodes[key]) for key in VALUES if key in nodes}
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; give a data.yaml, or 'phantom' for the embedded set") from None
    except (OSError, UnicodeError) as problem:
        raise DataError(f"{file}: cannot be read: {problem}") from None
    except yaml.YAMLError as problem:
        line, reason = told(problem)
        if "escape" in reason:  # C:\data in double quotes
            reason = f"{reason}; in double quotes a backslash begins one: write / between folders, or single quotes"
        raise DataError(f"{file}{f':{line}' if line else ''}: not valid YAML: {reason}") from None
    return values, {key: nodes[key] for key in NAMES if key in nodes}, lines


def _lines(file: Path, node: Any) -> dict[str, int]:
    for key, first, second in repeated_keys(node, (*NAMES, *VALUES)):
        raise DataError(f"{file}:{second}: the key {key!r} stands in line {first} already; keep one of them")
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _root(folder: Path, path: str, sources: Mapping[str, Sequence[str]], fail: Fail) -> Path:
    places = candidates(path, (folder,))
    found = find(places, Path.is_dir)
    if found is None and not all(Path(source).is_absolute() for split in sources.values() for source in split):
        raise fail(
            "path",
            f"path: {path} is no folder; {looked_for(path, places)}; a relative one starts at data.yaml's own folder, "
            "which is the default",
        )
    return (found or folder).resolve()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _keypoints(values: dict[str, Any], fail: Fail) -> tuple[int, int] | None:
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


def _path(values: dict[str, Any], key: str, fail: Fail) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise fail(key, f"{key} is {_shown(value)}; it has to be a path; put one that looks otherwise in quotes")
    return value


def _all_sources(values: dict[str, Any], lines: Mapping[str, int], fail: Fail) -> dict[str, tuple[str, ...]]:
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
