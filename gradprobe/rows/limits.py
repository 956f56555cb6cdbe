"""What a run file may hold, the same for the writer, which cuts or refuses, and for the reader, which refuses."""

from __future__ import annotations

__all__ = [
    "MAX_ALL_NAMES",
    "MAX_ATTRIBUTES",
    "MAX_BLIND",
    "MAX_CHUNK",
    "MAX_DEPTH",
    "MAX_FILE",
    "MAX_METRICS",
    "MAX_NAME",
    "MAX_NAMES",
    "MAX_OBJECTS",
    "MAX_STATUS",
    "MAX_STATUSES",
    "MAX_STRINGS",
    "MAX_TEXT",
]


MAX_TEXT = 1 << 20
"""Bytes of one attribute: a text, or a list."""

MAX_NAME = 1 << 16
"""Bytes of one name along an axis."""

MAX_NAMES = 100_000
"""Names along one axis."""

MAX_ALL_NAMES = 1 << 24
"""Bytes of all names along one axis together."""

MAX_STRINGS = 1 << 28
"""Bytes that copies of variable-length strings of one attribute may take."""

MAX_STATUS = 1000
"""Bytes of the words of one status."""

MAX_STATUSES = 200
"""Different statuses; one more stands for all others."""

MAX_OBJECTS = 10_000
"""Groups and datasets."""

MAX_METRICS = 5_000
"""Metrics per epoch."""

MAX_ATTRIBUTES = 10_000
"""Attributes of one object, such as entries of the provenance."""

MAX_DEPTH = 8
MAX_CHUNK = 1 << 28
MAX_FILE = 1 << 37  # 10 tasks on 100 layers in six million rows
MAX_BLIND = 1 << 28  # a read of more is held against the memory that is there
