"""Reads a run: finished, still being written, or left by a killed process, all through one class."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.rows import sources
from gradprobe.rows.table import names_along
from gradprobe.runfile import audits, content, frames, reached_layers, schema, untrusted
from gradprobe.runfile.pieces import Piece, open_pieces

if TYPE_CHECKING:
    import pandas
    import xarray

    from gradprobe.statistics import Estimate

_log = logging.getLogger("gradprobe")

_Names = tuple[str, ...]


class Run:
    """One recorded run, from its file alone.

    Arrays by name, as docs/run-file.md lists them: ``run["cosine"]`` is (n, L, P). A dataset that is read is read
    whole; ``run.read`` takes a stride, or the last rows only, for long runs. The file may come from anyone: it is
    checked before a number is read from it, and every byte that is read against its sum.

    Args:
        path: ``conflict.h5``. Parts that are not merged yet are found beside it and read along.

    Raises:
        RunFileError: No such file, not a run file, of a later major version, damaged, or something in it is not as
            docs/run-file.md says. Reading from it later raises the same.

    Example:
        >>> with Run("conflict.h5") as run:             # doctest: +SKIP
        ...     run.cosine(group="model.9").mean()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: list[Piece] = open_pieces(self.path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise
        if not self.sealed:
            _log.warning(
                "%s: carries no sums: another program changed it after it was recorded, so that damage to its numbers "
                "would not be noticed",
                self.path,
            )

    def _read_header(self) -> None:
        first, last = self._files[0], self._files[-1]
        self.tasks: _Names = first.tasks
        self.layers: _Names = last.layers
        self.pairs: _Names = first.pairs
        self.feature_names: _Names = next((piece.feature_names for piece in self._files if piece.feature_names), ())
        with last.reading():
            self.layer_size: NDArray[np.int64] = last["layer_size"][()]
            self._stored_reach: NDArray[np.bool_] = last["reach"][()].astype(bool)
        self.by_effect = all(piece.by_effect for piece in self._files)
        self._seen: reached_layers.ReachByEffect | None = None
        self._gaps: reached_layers.LayerGaps | None = None
        self.provenance: dict[str, Any] = last.provenance
        self.status_names: _Names = last.status_names
        self.end: str = last.end
        self.file_time: str = last.file_time
        self.rows_dropped = last.rows_dropped
        self.last_part = max(first.merged_through, *(piece.span[1] for piece in self._files))
        self._lengths = [piece.rows for piece in self._files]

    def refresh(self) -> bool:
        """Look again at a run that is being written; only files that are new are opened.

        Returns:
            Whether anything changed. Arrays that were read before are as they were.

        Raises:
            RunFileError: As on opening.
        """
        before = self._files
        self._files = open_pieces(self.path, before)
        for piece in before:
            if piece not in self._files:
                piece.close()
        self._read_header()
        return self._files != before

    # ---- who reaches what

    @property
    def seen(self) -> reached_layers.ReachByEffect:
        """Who reaches what, and from which row on: the first rows are read for it."""
        if self._seen is None:
            self._seen = reached_layers.first_seen(self._norms(), self._stored_reach)
        return self._seen

    @property
    def gaps(self) -> reached_layers.LayerGaps:
        """What rows lack: all norms are read for it."""
        if self._gaps is None:
            self._gaps = reached_layers.find_gaps(self._norms(), self.seen.first, self["status"])
        return self._gaps

    def _norms(self) -> reached_layers.NormBlocks:
        return reached_layers.norms_of(self.pieces(schema.ROWS), len(self.layers))

    @property
    def reach(self) -> NDArray[np.bool_]:
        """(L, T): which task has had a gradient other than 0 on which layer; of a task without any: its graph.

        A layer with fewer than two is shared by the graph alone: it is in no sum over shared layers.
        """
        return self._stored_reach if self.by_effect else self.seen.reach

    @property
    def shared_reach(self) -> NDArray[np.bool_]:
        """(L, T): the same without layers that only one task reaches, or none."""
        return measures.by_several(self.reach)

    @property
    def graph_only(self) -> _Names:
        """Names of layers that the graph alone calls shared: fewer than two tasks have had a gradient there."""
        alone: NDArray[np.bool_] = ~np.any(self.shared_reach, axis=1)
        return tuple(name for name, left_out in zip(self.layers, alone, strict=True) if left_out)

    @property
    def joined(self) -> dict[str, int]:
        """Layers that were found after the start, and the step of the first row that has them."""
        step = self["step"]
        return {name: int(step[row]) for name, row in zip(self.layers, self.gaps.joined, strict=True) if row}

    def lacking(self) -> dict[str, int]:
        """By layer, in how many measured rows a task had no gradient there, though it has had some; 0 is left out.

        Such a row is measured on what is there. Rows before a layer joined do not count.
        """
        return {name: int(n) for name, n in zip(self.layers, self.gaps.lacking, strict=True) if n}

    def counts(self, *, stride: int = 1, table: schema.Table = schema.ROWS) -> NDArray[np.bool_]:
        """Whose gradient counts on which layer in sums over shared layers: (n, L, T), row by row.

        Args:
            stride: Every so many rows.
            table: The rows at the root, or those of the probe loader.
        """
        norms, status = (self.read(table.path(name), stride=stride) for name in ("grad_norm", "status"))
        if table is not schema.ROWS:
            seen = np.broadcast_to(self.reach, norms.shape)
            return reached_layers.counts_of(seen, self.status_names, norms, status)
        place = self.places(np.arange(len(norms)) * stride)
        return reached_layers.counts_at(self.seen, self.status_names, place, norms, status)

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows are in the file."""
        return rows

    def pieces(self, table: schema.Table) -> list[Piece]:
        """The files that have a table, in order."""
        return [piece for piece in self._files if table.path(schema.STEP) in piece]

    @property
    def unknown(self) -> _Names:
        """What the files hold that this version knows nothing of."""
        return tuple(dict.fromkeys(name for piece in self._files for name in piece.unknown))

    @property
    def sealed(self) -> bool:
        """Whether every file of the run still carries the sums that the writer gave it."""
        return all(piece.raw.sealed for piece in self._files)

    @property
    def changed(self) -> float:
        """When its files were last written, in seconds of the wall clock."""
        return max(piece.identity[2] for piece in self._files) * 1e-9

    @property
    def sessions(self) -> list[content.Session]:
        """How often the run was gone on with: see :mod:`gradprobe.runfile.content`.

        Raises:
            RunFileError: The file says it otherwise than docs/run-file.md.
        """
        try:
            return content.load_sessions(self.provenance.get("sessions", []))
        except ValueError as error:
            raise RunFileError(f"{self.path}: {error}.") from error

    @property
    def complete(self) -> bool:
        """Whether the recording ended and closed its file: finished, stopped or failed, but not killed."""
        return bool(self.end)

    # ---- arrays

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self._lengths)

    def __contains__(self, name: str) -> bool:
        return any(name in piece for piece in self._files)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.read(name)

    def read(self, name: str, *, stride: int = 1, start: int = 0, layers: slice | int = slice(None)) -> NDArray[Any]:
        """One dataset, or every ``stride``-th row of it from ``start`` on, or some layers of it.

        Args:
            name: As in docs/run-file.md.
            stride: Every so many rows.
            start: First row; negative: so many rows before the end. Only what lies behind it is read.
            layers: Which layers, or one.

        Raises:
            RunFileError: This run holds no such dataset (lists those it holds), or it is damaged there.
        """
        if name == schema.REACH:
            return self.reach.astype(np.uint8)
        held = [piece for piece in self._files if name in piece]
        found = schema.row_field(name)
        lacks = found is None or found[1].optional or found[0].path(found[0].axis) not in self
        if not held and lacks:  # what a table of an earlier version lacks is missing in all its rows
            raise RunFileError(f"{self.path}: no dataset {name!r} in this run (it holds: {', '.join(self.names())}).")
        if found is None:
            with held[-1].reading():
                value = held[-1][name]
                return np.asarray(value.asstr()[()] if h5py.check_string_dtype(value.dtype) else value[()])
        table, field = found
        total = self.count(table)
        ahead = max(total + start, 0) if start < 0 else start  # rows until the next one that is wanted
        pieces = []
        for place, piece, rows in self._stretches(table, ahead, stride):
            with piece.reading():
                size = piece[name].nbytes if name in piece else 0
                untrusted.check_memory(
                    size * len(range(*rows.indices(piece.count(table)))) // max(piece.count(table), 1)
                )
                pieces.append(self._column(piece, table, field, place, rows, layers))
        values = np.concatenate(pieces)
        if field.name == "status" and values.size and values.max() >= len(self.status_names):
            raise RunFileError(f"{self.path}: is damaged: {name} {values.max()} has no name in status_names.")
        return values

    def _stretches(self, table: schema.Table, ahead: int, stride: int) -> Iterator[tuple[int, Piece, slice]]:
        """Every ``stride``-th row from ``ahead`` on: by file, with the place of its first row. The first one has none
        where nothing is wanted of it: an empty result gets its shape from it.
        """
        done = 0
        for number, piece in enumerate(self.pieces(table)):
            rows = piece.count(table)
            if ahead < rows or number == 0:
                yield done, piece, slice(ahead, rows, stride)
            ahead += len(range(ahead, rows, stride)) * stride - rows
            done += rows

    def _column(
        self, piece: Piece, table: schema.Table, field: schema.Field, place: int, rows: slice, layers: slice | int
    ) -> NDArray[Any]:
        """Some rows of a file, whose first row is at ``place`` of the table."""
        found: NDArray[Any] = piece.column(table, field, rows, layers, among=len(self.layers))
        if not self.by_effect and field.name == "status":
            return reached_layers.mended_status(self.status_names, table, found)
        if (
            self.by_effect
            or table not in reached_layers.SHARED_SUMS
            or field.name not in reached_layers.SHARED_SUMS[table][2:]
        ):
            return found
        needed = [table[name] for name in (*reached_layers.SHARED_SUMS[table], "status")]
        wanted = np.arange(piece.count(table))[rows]
        changed = wanted[
            : np.searchsorted(place + wanted, reached_layers.first_settled(self.seen, self.status_names, table))
        ]
        for begin in range(0, len(changed), schema.CHUNK_ROWS):
            some = changed[begin : begin + schema.CHUNK_ROWS]
            here = slice(int(some[0]), int(some[-1]) + 1, rows.step)
            block = {f.name: piece.column(table, f, here, among=len(self.layers)) for f in needed}
            better = reached_layers.mended_rows(self.seen, self.status_names, table, block, place + some)
            found[begin : begin + schema.CHUNK_ROWS] = better[field.name]
        return found

    def names(self) -> list[str]:
        """Every dataset that can be read by name."""
        places = [table.path("") for table in schema.TABLES]
        found = {
            f"{place}{name}"
            for piece in self._files
            for place in places
            if (place or "/") in piece.file
            for name in piece.file[place or "/"]
        }
        return sorted(name for name in found if name in self)

    def count(self, table: schema.Table) -> int:
        """Number of rows of a table; 0 where the run has no such table."""
        return sum(piece.count(table) for piece in self._files)

    def blocks(
        self, rows: int, size: int = 4096, *, stride: int = 1, table: schema.Table = schema.ROWS
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """All datasets of a table, piece by piece, from its first ``rows`` rows; for exporting large runs."""
        done, fields = 0, table.held(self)
        for piece in self._files:
            length = min(piece.count(table), rows - done)
            for start in range(-done % stride, length, size - size % stride or stride):
                stop = min(start + (size - size % stride or stride), length)
                with piece.reading():
                    here = slice(start, stop, stride)
                    block = {f.name: piece.column(table, f, here, among=len(self.layers)) for f in fields}
                if not self.by_effect:
                    place = done + np.arange(start, stop, stride)
                    block = reached_layers.mended_rows(self.seen, self.status_names, table, block, place)
                yield block
            done += max(length, 0)

    # ---- quantities

    def norm(self, group: str | Sequence[str] | None = None) -> measures.Array:
        """Gradient norms (n, T) over a group of layers together.

        Args:
            group: None: all shared layers. A module path: the layers at or below it. Or a list of layer names. Of these
                what the task shares with another at that row; NaN where it shares none, or a task is absent.
        """
        return self._over(group)[0]

    def cosine(self, group: str | Sequence[str] | None = None) -> measures.Array:
        """Cosines (n, P) between tasks over a group of layers together; ``group`` as for :meth:`norm`."""
        return self._over(group)[1]

    def gram(self, *, stride: int = 1) -> measures.Array:
        """The Gramians (n, L, T, T), from norms and cosines; NaN where a task is absent, or has no gradient.

        Sums over layers go over what :meth:`counts`: ``measures.over_counted(run.gram(), run.counts())``.
        """
        return measures.from_norms(self.read("grad_norm", stride=stride), self.read("cosine", stride=stride))

    def gram_noise(self, *, stride: int = 1) -> measures.Array | None:
        """The noise parts (n, L, T, T) of :meth:`gram`, in (loss per unit of parameter)^2.

        ``run.gram() - run.gram_noise()`` is unbiased for the products of the true gradients. NaN where a row was not
        measured in micro-batches, or a gradient is missing. None: the run was not measured in micro-batches.
        """
        name = schema.GRAM_NOISE.name
        return self.read(name, stride=stride).astype(np.float64) if name in self else None

    def estimate(
        self,
        group: str | Sequence[str] | None = None,
        window: tuple[int, int] | None = None,
        source: str = "probe_loader",
    ) -> Estimate:
        """What a window of rows says of the true gradients on a group of layers, less the noise of their samples.

        Args:
            group: As for :meth:`norm`. A pair's cosine is over the layers that both tasks reach.
            window: Steps from the first to before the second; None: all.
            source: "probe_loader", which claims rest on; or "training": the training's own batches, which are drawn
                without replacement and were trained on: for watching.

        Returns:
            Cosines, noise scales and noise correlations, with intervals of 95 % that say how well this run determines
            them, and nothing of another seed. NaN where a gradient cannot be told from noise.

        Raises:
            RunFileError: Nothing was measured so in this run, or no layer is called so.

        Source: docs/run-file.md, and :func:`gradprobe.statistics.pooled`.
        """
        return reached_layers.pooled_estimate(self, group, window, source)

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
        return measures.over_layers(gram, self.counts()[:, chosen])

    def table(self, name: str) -> dict[str, NDArray[Any]]:
        """All of a table by name, as docs/run-file.md describes it; empty where the run has none.

        Args:
            name: ``rows``, ``features``, ``updates``, ``ledger``, ``probe_loader``, ``test`` or ``audit``.

        Returns:
            Arrays by the name of the field, and the names along its own axes. Each by itself: ``run["update/cosine"]``.

        Raises:
            RunFileError: There is no such table, or it is damaged.
        """
        for whole in schema.WHOLE:
            if whole.name == name:
                return next((found for piece in reversed(self._files) if (found := piece.whole(whole))), {})
        table = next((table for table in schema.TABLES if table.name == name), None)
        if table is None:
            known = ", ".join(table.name for table in (*schema.TABLES, *schema.WHOLE))
            raise RunFileError(f"{self.path}: there is no table {name!r} (there are: {known}).")
        if table.path(table.axis) not in self:
            return {}
        found = {field.name: self.read(table.path(field.name)) for field in table.held(self)}
        found |= {axis: np.array(names_along(axis, self), dtype=object) for axis in table.names}
        if table is schema.FEATURES:
            found[schema.FEATURE_SIZE.name] = self.read(table.path(schema.FEATURE_SIZE.name))
        return found

    @property
    def features(self) -> dict[str, NDArray[Any]]:
        """Task gradients at the features where tasks part, by name; empty where they were not measured.

        They bound what the parameters' gradients can be, and do not measure them.
        """
        return self.table("features")

    @property
    def updates(self) -> dict[str, NDArray[Any]]:
        """What the optimizer made of the gradients, by name; empty where it was not recorded."""
        return self.table("updates")

    @property
    def ledger(self) -> dict[str, NDArray[Any]]:
        """The loss ledger, by name; empty where none was kept.

        What it says of a window of steps, and whether to believe it: :func:`gradprobe.ledger.windows.window`.
        """
        return self.table("ledger")

    @property
    def probe_loader(self) -> dict[str, NDArray[Any]]:
        """Task gradients on independent samples, by name; empty where they were not measured.

        Pooled over steps and layers, with an interval: :meth:`estimate`.
        """
        return self.table("probe_loader")

    @property
    def sources(self) -> _Names:
        """What an update comes from: the tasks, weight decay, and momentum from steps that were not taken apart."""
        return tuple(sources(self.tasks))

    @property
    def audit(self) -> dict[str, Any] | None:
        """What ``gradprobe audit --out`` wrote, see :func:`gradprobe.runfile.audits.read`; None: no audit.

        ``about`` (task, weight, class, sentence, same_twice); ``step``, ``displacement``, ``ulp`` (s,); ``door``,
        ``state``, ``evidence``, ``how_to_shut``, ``contribution``, ``left_when_shut`` (D,).
        """
        return audits.read(self._files[0])

    @property
    def test_clusters(self) -> dict[str, NDArray[Any]]:
        """Metrics of the test split with one cluster of images left out, by name; empty where there are none.

        ``cluster`` (K,) names (a clip or patient, or an image alone), ``size`` (K,) images, ``metric`` (M,) names,
        ``without`` (K, M). The values on the whole split are provenance ``test.*``.
        """
        return self.table("test")

    @property
    def epochs(self) -> dict[str, NDArray[Any]]:
        """Metrics per epoch, and ``epoch`` itself, each (E,); NaN where an epoch lacks a metric."""
        with self._files[-1].reading():
            group = self._files[-1]["epochs"]
            return {name: group[name][()] for name in group}

    def epochs_by_number(self) -> dict[int, dict[str, float]]:
        """The same by epoch: {0: {"mAP50": 0.1, ...}, ...}."""
        table = self.epochs
        numbers = table.pop("epoch")
        return {int(e): {name: float(v[i]) for name, v in table.items()} for i, e in enumerate(numbers)}

    # ---- for other tools

    def to_pandas(self, name: str, *, stride: int = 1) -> pandas.DataFrame:
        """One dataset as a tidy table: a row per value, with a column per axis and one named ``name``.

        Args:
            name: As in docs/run-file.md; ``"epochs"`` gives the metrics per epoch, a column each.
            stride: Every so many steps.

        Raises:
            MissingExtraError: pandas is not installed.
            RunFileError: As for :meth:`read`.
        """
        return frames.to_pandas(self, name, stride)

    def to_xarray(self, *, stride: int = 1) -> xarray.Dataset:
        """All of it in memory: axes step, layer, task, pair by name, and epoch_number for metrics per epoch.

        Args:
            stride: Every so many steps.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        return frames.to_xarray(self, stride)

    # ---- closing

    def close(self) -> None:
        """Let go of the files. A second call does nothing."""
        for piece in self._files:
            piece.close()
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


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(name + ".")
