"""The one way to read a yaml file: it may be a stranger's, so what it can make of itself is bounded as it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradprobe.whole_files import read

_LARGEST = 1 << 20
"""Bytes of a file; 22,000 names of classes take 700,000."""

_MOST_NODES = 60_000
"""Values, lists and maps, with those that an alias stands for counted wherever it stands."""

_DEEPEST = 32
"""Lists and maps within each other."""

_LONGEST = 10_000
"""Characters of one value."""


class _YAMLLoader(yaml.SafeLoader):
    """PyYAML's own, which stops at what is too much before it builds it.

    Aliases cost it nothing, but whoever prints, copies or merges what they stand for.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes = [0]  # of what is open, outermost first
        self._depths = [0]
        self._anchors: list[str | None] = [None]
        self._known: dict[str, tuple[int, int]] = {}  # anchor -> its size and depth

    def get_event(self) -> Any:
        """The next event, if the document may still have it."""
        event = super().get_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            if anchor in self._anchors:
                raise self._too_much(event, f"the alias *{anchor[:40]} stands within what it stands for")
            self._add(event, *self._known.get(anchor, (1, 0)))
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _LONGEST:
                raise self._too_much(event, f"a value of {len(event.value):,} characters; {_LONGEST:,} are read")
            self._name(event.anchor, 1, 0)
            self._add(event, 1, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._sizes.append(1)
            self._depths.append(0)
            self._anchors.append(event.anchor)
            self._add(event, 0, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, depth = self._sizes.pop(), self._depths.pop() + 1
            self._name(self._anchors.pop(), size, depth)
            self._add(event, size, depth)
        return event

    def construct_document(self, node: Any) -> Any:
        """The plain values of a node, which need not be the root."""
        try:
            return super().construct_document(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of PyYAML's own functions for !!timestamp x, !!bool x, !!int "", 2024-13-45
            problem = f"a value is not of the type that it is said to be ({type(error).__name__}: {error})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def _name(self, anchor: str | None, size: int, depth: int) -> None:
        if anchor is not None:
            self._known[anchor] = (size, depth)

    def _add(self, event: Any, size: int, depth: int) -> None:
        self._sizes[-1] += size
        self._depths[-1] = max(self._depths[-1], depth)
        if sum(self._sizes) > _MOST_NODES:
            raise self._too_much(event, f"more than {_MOST_NODES:,} values, those behind aliases counted each time")
        if len(self._sizes) - 1 + self._depths[-1] > _DEEPEST:
            raise self._too_much(event, f"more than {_DEEPEST} lists and maps within each other")

    def _too_much(self, event: Any, problem: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _read_text(path: Path) -> str:
    """The text of a regular file, without a byte order mark.

    Raises:
        OSError, UnicodeDecodeError: It cannot be read, or is too large, or a device, a pipe or the like.
    """
    return read(path, _LARGEST).decode("utf-8-sig")


def yaml_problem(error: Exception) -> tuple[int | None, str]:
    """The line that an error is about, from 1, and what is wrong there, in one line that is not too long."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
    return None if mark is None else mark.line + 1, " ".join(str(problem).split()).rstrip(".")[:300]


def compose(path: Path) -> tuple[_YAMLLoader, Any]:
    """The one document of a file, as nodes, and the loader that can make values of them.

    Returns:
        The loader, and the root; None where the file is empty.

    Raises:
        OSError, UnicodeDecodeError: It cannot be read.
        yaml.YAMLError: It is no yaml, or more than is read.
    """
    loader = _YAMLLoader(_read_text(path))
    return loader, loader.get_single_node()
