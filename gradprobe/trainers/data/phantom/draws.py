"""Random numbers that are the same, bit for bit, on every machine and with every version of numpy.

numpy guarantees the raw 64-bit stream of PCG64 (NEP 19), not what `Generator.integers` or `.random`
make of it. So everything here is integer arithmetic on the raw stream and one exact scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]
"""A picture plane, float32 (numpy's stubs cannot tell); elementwise work on it is exactly reproducible."""


class Draws:
    """A stream of random numbers named by a key of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def _raw(self) -> int:
        return int(self._bits.random_raw())

    def integer(self, stop: int) -> int:
        """An integer in [0, stop); its bias is below stop / 2^64."""
        return self._raw() % stop

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high), from 53 random bits."""
        return low + (high - low) * ((self._raw() >> 11) / 9007199254740992.0)  # 2^53

    def around(self, spread: float) -> float:
        """A number in [-spread, spread)."""
        return self.uniform(-spread, spread)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def plane(self, rows: int, columns: int) -> Plane:
        """White noise, shape (rows, columns), each value a multiple of 2^-16 in [0, 1)."""
        count = rows * columns
        words = np.asarray(self._bits.random_raw((count + 3) // 4), dtype=np.uint64)
        # Shifts, not a view: the order must not depend on the machine's byte order.
        shifts = np.array([0, 16, 32, 48], dtype=np.uint64)
        parts = (words[:, None] >> shifts) & np.uint64(0xFFFF)
        flat = parts.reshape(-1)[:count].astype(np.float32) / np.float32(65536.0)
        return flat.reshape(rows, columns)
