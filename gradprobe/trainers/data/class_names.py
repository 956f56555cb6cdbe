"""Names of classes in a data.yaml, taken as the text that stands in the file.

YAML 1.1 reads ``no`` as a truth value, ``12:30`` as a number of seconds, ``1_000`` and ``0x10`` as numbers and
``2024-01-01`` as a date. A csv file, or a person, means the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from gradprobe.errors import DataError

Fail = Callable[[str, str], DataError]
"""From a key of data.yaml and what is wrong with it to the error that names file and line."""


def class_names(node: Any, key: str, fail: Fail) -> tuple[str, ...] | None:
    """The names that a node of a composed YAML document lists; None where it is null.

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


def _numbered(node: Any, key: str, fail: Fail) -> list[str]:
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


def _text(node: Any, what: str, key: str, fail: Fail) -> str:
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


def repeated_keys(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Keys of a map that stand in it twice, with both lines, from 1; YAML would silently take the last."""
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in keys and first.setdefault(key.value, line) != line:
            yield key.value, first[key.value], line
