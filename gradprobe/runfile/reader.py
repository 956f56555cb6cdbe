"""Reads a run: finished, still being written, or left by a killed process, all through one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.runfile import features, schema

Names = tuple[str, ...]


def part_paths(path: Path) -> list[Path]:
    """The parts of the run at ``path`` that were not merged yet, in order; empty for a finished run."""
    folder = path.with_name(path.name + schema.PARTS_SUFFIX)
    return sorted(p for p in folder.glob("*.h5") if p.stem.isdecimal())


class Run:
    """One recorded run, from its file alone.

    Arrays by name, as docs/run-file.md lists them: ``run["cosine"]`` is (n, L, P). A dataset that is read is read
    whole; ``run.read`` takes a stride for long runs.

    Args:
        path: ``conflict.h5``. Parts that are not merged yet are found beside it and read along.

    Raises:
        RunFileError: No such file, not a run file, of a later major version, or damaged.

    Example:
        >>> with Run("conflict.h5") as run:             # doctest: +SKIP
        ...     run.cosine(group="model.9").mean()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: list[h5py.File] = []
        try:
            self._files = self._open()
            self._read_header()
        except OSError as error:
            self.close()
            raise RunFileError(f"{self.path}: cannot be read as a run file ({error}).") from error
        except (KeyError, ValueError, TypeError) as error:
            self.close()
            raise RunFileError(
                f"{self.path}: is not a complete run file ({error}). Was it written by gradprobe?"
            ) from error
        except BaseException:
            self.close()
            raise

    # ---- opening

    def _open(self) -> list[h5py.File]:
        for _ in range(20):
            opened: list[h5py.File] = []
            try:
                parts = part_paths(self.path)
                if not self.path.exists() and not parts:
                    raise RunFileError(f"{self.path}: no such file.")
                if self.path.exists():
                    opened.append(_open_checked(self.path))
                merged = int(opened[0].attrs["merged_through"]) if opened else 0
                for part in parts:
                    if int(part.stem) > merged:
                        opened.append(_open_checked(part))
                return opened
            except FileNotFoundError:  # merged away between the listing and the opening: look again
                _close_all(opened)
            except BaseException:
                _close_all(opened)
                raise
        raise RunFileError(f"{self.path}: its parts change faster than they can be opened. Try again.")

    def _read_header(self) -> None:
        first, last = self._files[0], self._files[-1]
        self.tasks: Names = _names(first, schema.TASK)
        self.layers: Names = _names(first, schema.LAYER)
        self.pairs: Names = _names(first, schema.PAIR)
        self.layer_size: NDArray[np.int64] = first["layer_size"][()]
        self.reach: NDArray[np.bool_] = first["reach"][()].astype(bool)
        self.provenance: dict[str, Any] = {k: _plain(v) for k, v in last["provenance"].attrs.items()}
        self.status_names: Names = tuple(str(v) for v in last["status"].attrs["status_names"])
        self.end: str = str(last.attrs["end"])
        self.rows_dropped = int(last.attrs["rows_dropped"])
        stems = [Path(f.filename).stem for f in self._files]
        self.last_part = max(int(first.attrs["merged_through"]), *(int(s) for s in stems if s.isdecimal()), 0)
        self._lengths = [f["step"].shape[0] for f in self._files]

    @property
    def complete(self) -> bool:
        """Whether the recording ended and closed its file: finished, stopped or failed, but not killed."""
        return bool(self.end)

    # ---- arrays

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self._lengths)

    def __contains__(self, name: str) -> bool:
        return name in self._files[0]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.read(name)

    def read(self, name: str, *, stride: int = 1, layers: slice | int = slice(None)) -> NDArray[Any]:
        """One dataset, or every ``stride``-th row of it, or some layers of it.

        Raises:
            RunFileError: This run holds no such dataset; lists those it holds.
        """
        if name not in self:
            held = ", ".join(sorted(n for n in self._files[0] if isinstance(self._files[0][n], h5py.Dataset)))
            raise RunFileError(f"{self.path}: no dataset {name!r} in this run (it holds: {held}).")
        axes = {f.name: f.axes for f in schema.ROW_FIELDS}.get(name)
        if axes is None:
            value = self._files[0][name]
            return np.asarray(value.asstr()[()] if h5py.check_string_dtype(value.dtype) else value[()])
        pieces, start = [], 0
        for file, length in zip(self._files, self._lengths, strict=True):
            first = -start % stride  # the stride goes on across files as if they were one
            index: tuple[Any, ...] = (slice(first, length, stride),)
            if schema.LAYER in axes:
                index += (layers,)
            pieces.append(file[name][index])
            start += length
        return np.concatenate(pieces)

    def blocks(self, rows: int, size: int = 4096) -> Iterator[dict[str, NDArray[Any]]]:
        """All row datasets, piece by piece, up to ``rows`` rows; for merging and exporting large runs."""
        left = rows
        for file, length in zip(self._files, self._lengths, strict=True):
            for start in range(0, min(length, left), size):
                stop = min(start + size, length, left)
                yield {f.name: file[f.name][start:stop] for f in schema.ROW_FIELDS}
            left -= min(length, left)

    # ---- quantities

    def norm(self, group: str | Sequence[str] | None = None) -> measures.Array:
        """Gradient norms (n, T) over a group of layers together.

        Args:
            group: None: all shared layers. A module path: the layers at or below it. Or a list of layer names.
        """
        return self._over(group)[0]

    def cosine(self, group: str | Sequence[str] | None = None) -> measures.Array:
        """Cosines (n, P) between tasks over a group of layers together; ``group`` as for :meth:`norm`."""
        return self._over(group)[1]

    def gram(self, *, stride: int = 1) -> measures.Array:
        """The Gramians (n, L, T, T), from norms and cosines."""
        return measures.from_norms(self.read("grad_norm", stride=stride), self.read("cosine", stride=stride))

    def layer_indices(self, group: str | Sequence[str] | None = None) -> NDArray[np.intp]:
        """Which layers belong to a group.

        Raises:
            RunFileError: No layer is called so; lists the first few that are there.
        """
        if group is None:
            return np.arange(len(self.layers))
        wanted = [group] if isinstance(group, str) else list(group)
        for name in wanted:
            if not any(_below(layer, name) for layer in self.layers):
                known = ", ".join(self.layers[:6])
                raise RunFileError(f"{self.path}: no shared layer at {name!r} (there are: {known}, ...).")
        found = [i for i, layer in enumerate(self.layers) if any(_below(layer, name) for name in wanted)]
        return np.array(found, dtype=np.intp)

    def _over(self, group: str | Sequence[str] | None) -> tuple[measures.Array, measures.Array]:
        if group is None:
            return self["shared_grad_norm"].astype(np.float64), self["shared_cosine"].astype(np.float64)
        chosen = self.layer_indices(group)
        gram = measures.from_norms(self["grad_norm"][:, chosen], self["cosine"][:, chosen])
        return measures.over_layers(gram, self.reach[chosen])

    @property
    def features(self) -> dict[str, NDArray[Any]]:
        """Task gradients at the features where tasks part, by name; empty where they were not measured.

        ``step``, ``epoch``, ``time``, ``overhead`` (m,); ``grad_norm`` (m, F, T) and ``cosine`` (m, F, P), as
        docs/run-file.md describes them; ``feature`` (F,) names and ``feature_size`` (F,). They bound what the
        parameters' gradients can be, and do not measure them.
        """
        return features.read(self._files)

    @property
    def epochs(self) -> dict[str, NDArray[Any]]:
        """Metrics per epoch, and ``epoch`` itself, each (E,); NaN where an epoch lacks a metric."""
        group = self._files[-1]["epochs"]
        return {name: group[name][()] for name in group}

    def epochs_by_number(self) -> dict[int, dict[str, float]]:
        """The same by epoch: {0: {"mAP50": 0.1, ...}, ...}."""
        table = self.epochs
        numbers = table.pop("epoch")
        return {int(e): {name: float(v[i]) for name, v in table.items()} for i, e in enumerate(numbers)}

    # ---- closing

    def close(self) -> None:
        """Let go of the files. A second call does nothing."""
        _close_all(self._files)
        self._files = []

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run(path: str | Path) -> Run:
    """Open a recorded run, finished or not; a context manager.

    Raises:
        RunFileError: No such file, or not a run.
    """
    return Run(path)


def _open_checked(path: Path) -> h5py.File:
    file = h5py.File(path, "r", locking=False)  # a reader must never keep a writer out
    kind = file.attrs.get("encoding-type")
    version = str(file.attrs.get("encoding-version", ""))
    if kind != schema.ENCODING_TYPE:
        file.close()
        raise RunFileError(f"{path}: is an HDF5 file but not a gradprobe run (encoding-type is {kind!r}).")
    if version.split(".")[0] != schema.ENCODING_VERSION.split(".")[0]:
        file.close()
        raise RunFileError(
            f"{path}: has format version {version}; this gradprobe reads version "
            f"{schema.ENCODING_VERSION.split('.')[0]}. Update it: pip install -U gradprobe"
        )
    return file


def _close_all(files: list[h5py.File]) -> None:
    for file in files:
        file.close()


def _names(file: h5py.File, axis: str) -> Names:
    return tuple(str(name) for name in file[axis].asstr()[()])


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(name + ".")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
