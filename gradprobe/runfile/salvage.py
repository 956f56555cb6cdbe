"""Numbers of a damaged file that are still right: read from the bytes, past HDF5, which gives a stretch or nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.runfile.pieces import Piece

Box = tuple[slice, ...]


class Salvage:
    """What can be read of one file.

    Args:
        piece: Could be opened, so that where its datasets lie is known; its numbers may be damaged.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._damage = piece.raw.damaged()

    def rows(self, name: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Rows ``start`` to ``stop`` of one dataset.

        Returns:
            Values, NaN (whole numbers: 0) where a byte of them is damaged; and which rows hold such a value.
        """
        dataset = self.piece[name]
        if not self._damage:
            with self.piece.reading():
                return dataset[start:stop], np.zeros(stop - start, dtype=bool)
        values = np.zeros((stop - start, *dataset.shape[1:]), dtype=dataset.dtype)
        bad = np.zeros(values.shape, dtype=bool)
        for offset, box in self._places(dataset, start, stop):
            given, damaged = self._read(offset, tuple(s.stop - s.start for s in box), dataset.dtype)
            inside = tuple(slice(0, min(s.stop, n) - s.start) for s, n in zip(box, dataset.shape, strict=True))
            first, last = max(box[0].start, start), min(box[0].stop, stop)
            inside = (slice(first - box[0].start, last - box[0].start), *inside[1:])
            clipped = tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, dataset.shape, strict=True))[1:]
            target = (slice(first - start, last - start), *clipped)
            values[target], bad[target] = given[inside], damaged[inside]
        values[bad] = np.nan if values.dtype.kind == "f" else 0
        return values, np.asarray(bad.any(axis=tuple(range(1, bad.ndim))))

    def _places(self, dataset: Any, start: int, stop: int) -> list[tuple[int, Box]]:
        """Where in the file what boxes of the dataset lie; the last chunks reach beyond its end."""
        if 0 in dataset.shape or start >= stop:
            return []
        if dataset.chunks is None:
            row = dataset.nbytes // dataset.shape[0]
            rest = tuple(slice(0, n) for n in dataset.shape[1:])
            return [(dataset.id.get_offset() + start * row, (slice(start, stop), *rest))]
        steps, *others = dataset.chunks
        first = range(start // steps * steps, stop, steps)
        corners = itertools.product(first, *(range(0, n, c) for n, c in zip(dataset.shape[1:], others, strict=True)))
        with self.piece.reading():
            return [
                (
                    dataset.id.get_chunk_info_by_coord(corner).byte_offset,
                    tuple(slice(at, at + c) for at, c in zip(corner, dataset.chunks, strict=True)),
                )
                for corner in corners
            ]

    def _read(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        size = int(np.prod(shape)) * dtype.itemsize
        raw = self.piece.raw.unverified(offset, size)
        wrong = np.zeros(size, dtype=bool)
        for start, stop in self._damage:
            wrong[max(start - offset, 0) : max(stop - offset, 0)] = True
        values = np.frombuffer(raw, dtype=dtype).reshape(shape)
        return values, np.asarray(wrong.reshape(*shape, dtype.itemsize).any(axis=-1))
