"""data.yaml, as YOLOv5 users write it, with two keys more: image_names and image_labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprobe.errors import DataError, MissingExtraError

SPLITS = ("train", "val", "test")

Fail = Callable[[str, str], DataError]
"""From a key of data.yaml and what is wrong with it to the error that names file and line."""


@dataclass(frozen=True)
class DataConfig:
    """A data.yaml that was read and is well-formed; nothing it names has been looked at yet."""

    file: Path
    root: Path  # what relative paths in it are relative to
    sources: dict[str, tuple[str, ...]]  # split -> folders, images and txt files, as written
    box_names: tuple[str, ...]
    image_names: tuple[str, ...] | None  # None: to be counted from the one-hot rows
    image_labels: Path | None  # the csv; None: one-hot rows in the label files
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
    test are relative to `path`. `names` and `image_names` are lists, or maps from 0, 1, 2, ... to names.

    Raises:
        DataError: the file is missing, empty or malformed; says file and line.
    """
    file = Path(file)
    values, lines = _read_yaml(file)

    def fail(key: str, problem: str) -> DataError:
        return DataError(f"{file}:{lines[key]}: {problem}" if key in lines else f"{file}: {problem}")

    box_names = _names(values, "names", fail)
    if box_names is None:
        raise fail("names", "no key 'names'; list the box classes, for example names: [AR, MR]")
    count = values.get("nc")
    if count is not None and count != len(box_names):
        raise fail("nc", f"nc is {count!r}, but names has {len(box_names)} classes; make them agree")
    root = _path(values, "path", fail) or "."
    labels = _path(values, "image_labels", fail)
    image_names = _names(values, "image_names", fail)
    if labels is not None and image_names is None:
        raise fail("image_labels", "image_labels needs image_names: the list of image classes")
    if image_names is not None and len(image_names) == 1:
        raise fail("image_names", "image_names has one class; a classifier needs at least two")
    folder = file.resolve().parent
    return DataConfig(
        file=file,
        root=(folder / root).resolve(),
        sources=_all_sources(values, fail),
        box_names=box_names,
        image_names=image_names,
        image_labels=None if labels is None else (folder / root / labels).resolve(),
        lines=lines,
    )


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values by key, and each key's line."""
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("pyyaml", "yolov5", "reading a data.yaml") from None
    if file.is_dir():
        raise DataError(f"{file}: a folder; name the data.yaml in it")
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; give a data.yaml, or 'phantom' for the embedded set") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file}: cannot be read: {problem}") from None
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        raise DataError(f"{file}{line}: not valid YAML: {problem.problem or problem.context}") from None
    except (yaml.YAMLError, ValueError) as problem:  # a ValueError: an impossible date, and the like
        raise DataError(f"{file}: not valid YAML: {problem}") from None
    if node is None or values is None:
        raise DataError(f"{file}: empty; it needs train, val and names")
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise DataError(f"{file}:1: a {type(values).__name__} instead of keys such as train, val and names")
    return values, {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _names(values: dict[str, Any], key: str, fail: Fail) -> tuple[str, ...] | None:
    names = values.get(key)
    if names is None:
        return None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise fail(key, f"the keys of {key} are not 0, 1, ..., {len(names) - 1}; number the classes so")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise fail(key, f"{key} is {names!r}; it has to be a list of classes or a map from 0, 1, ... to them")
    texts = tuple(str(name) for name in names)
    if len(set(texts)) < len(texts):
        twice = next(name for name in texts if texts.count(name) > 1)
        raise fail(key, f"{key} has the class {twice!r} more than once")
    return texts


def _path(values: dict[str, Any], key: str, fail: Fail) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise fail(key, f"{key} is {value!r}; it has to be a path")
    return value


def _all_sources(values: dict[str, Any], fail: Fail) -> dict[str, tuple[str, ...]]:
    sources = {}
    for split in SPLITS:
        value = values.get(split)
        if value is None and split == "test":
            continue
        if value is None:
            raise fail(split, f"no key {split!r}; give a folder of images, a txt file that lists them, or both")
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, str) for entry in entries):
            raise fail(split, f"{split} is {value!r}; it has to be a path or a list of paths")
        sources[split] = tuple(entries)
    return sources
