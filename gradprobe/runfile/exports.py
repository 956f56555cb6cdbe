"""A run in the formats of other tools: CSV, Parquet, netCDF, TensorBoard.

Long runs go through in blocks of rows. What is written appears whole or not at all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import UsageError, optional
from gradprobe.foreign import cell
from gradprobe.rows.table import names_along
from gradprobe.runfile import frames, schema
from gradprobe.runfile.reader import Run
from gradprobe.whole_files import staged, target, telling, there

__all__ = ["export_run"]


_Columns = dict[str, NDArray[Any]]
"""Columns of one length, by name."""

FORMATS = ("csv", "parquet", "netcdf", "tensorboard")

_NO_CURVES = ("step", "epoch", "time", "status", "batch_size", "micro_batches", "calls", "burst")
"""Of what has one number per step, what TensorBoard is not to show."""


def export_run(run: Run, to: str, out: Path | None = None, *, stride: int = 1) -> Path:
    """Write a run in another format.

    Args:
        run: Finished or not; what is there now is written.
        to: ``csv`` and ``parquet``: a folder of tables: rows, layers and cosines (tidy), noise, layer_table, epochs,
            provenance. ``netcdf``: one netCDF-4 file. ``tensorboard``: a folder of events.
        out: Must not exist. Default: beside the run, named after it and the format.
        stride: Every so many rows.

    Returns:
        What was written.

    Raises:
        UsageError: An unknown format, or ``out`` exists.
        MissingExtraError: The package that writes the format is not installed.
        RunFileError: The run cannot be read, or ``out`` not written.
    """
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; there are: {', '.join(FORMATS)}.")
    if stride < 1:
        raise UsageError(f"a stride of {stride}: it must be 1 (every row) or more.")
    if out is None:
        out = run.path.with_name(run.path.name.removesuffix(".h5") + (".nc" if to == "netcdf" else f"-{to}"))
    write: dict[str, Callable[[Run, Path, int], None]] = {
        "csv": _csv,
        "parquet": _parquet,
        "netcdf": _netcdf,
        "tensorboard": _tensorboard,
    }
    if there(out):
        raise UsageError(f"{out} exists; choose another place with --out, or remove it.")
    with telling(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged(target(out)) as place:
            write[to](run, place, stride)
    return out


# ---- tables


def _tables(run: Run, stride: int) -> Iterator[tuple[str, Iterator[_Columns]]]:
    """Every table by name, in pieces with the same columns."""
    for table in schema.TABLES:
        if table.path(table.axis) in run:
            yield _rows_name(table), _rows(run, table, stride)
            for field in table.held(run):
                if _is_tidy(field):
                    yield field.export or f"{table.name}_{field.name}", _tidy(run, table, field, stride)
    if audit := run.table(schema.AUDIT.name):
        for name, axis in (("audit_steps", schema.STEP), ("audit_doors", "door")):
            yield name, iter([{f.name: audit[f.name] for f in schema.AUDIT.fields if f.axes == (axis,)}])
    if found := run.test_clusters:
        columns = {str(name): found["without"][:, i] for i, name in enumerate(found["metric"])}
        yield "test_clusters", iter([{"cluster": found["cluster"], "size": found["size"], **columns}])
    reach = {f"reach.{task}": run.reach[:, i].astype(np.int8) for i, task in enumerate(run.tasks)}
    yield "layer_table", iter([{"layer": _text(run.layers), "parameters": run.layer_size, **reach}])
    yield "epochs", iter([run.epochs])
    values = [value if isinstance(value, str) else json.dumps(value) for value in run.provenance.values()]
    yield "provenance", iter([{"name": _text(tuple(run.provenance)), "value": _text(tuple(values))}])


def _rows_name(table: schema.Table) -> str:
    return "feature_rows" if table is schema.FEATURES else table.name  # "features" are their norms


def _is_tidy(field: schema.Field) -> bool:
    """Whether a field is a table of its own: it has layers, features or sources by row."""
    return len(field.axes) > 2 or schema.LAYER in field.axes


def _rows(run: Run, table: schema.Table, stride: int) -> Iterator[_Columns]:
    """What has a value per step: a column for every task, pair or source, named ``loss.det``."""
    for block in run.blocks(run.count(table), stride=stride, table=table):
        found: _Columns = {}
        for field in table.held(run):
            values = block[field.name]
            if field.name == "status":
                found["status"] = _text(run.status_names)[values]
            elif len(field.axes) == 1:
                found[field.name] = values
            elif not _is_tidy(field):
                heads = names_along(field.axes[1], run)
                found |= {f"{field.name}.{head}": values[:, i] for i, head in enumerate(heads)}
        yield found


def _tidy(run: Run, table: schema.Table, field: schema.Field, stride: int) -> Iterator[_Columns]:
    axes = field.axes
    for block in run.blocks(run.count(table), size=1024, stride=stride, table=table):
        values = block[field.name]
        yield {
            axes[0]: frames.along(block[schema.STEP], 0, values.shape),
            **{a: frames.along(_text(names_along(a, run)), i + 1, values.shape) for i, a in enumerate(axes[1:])},
            field.name: values.ravel(),
        }


def _text(values: tuple[str, ...]) -> NDArray[Any]:
    return np.array(values, dtype=object)


def _csv(run: Run, out: Path, stride: int) -> None:
    out.mkdir()
    for name, pieces in _tables(run, stride):
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for number, table in enumerate(pieces):
                if number == 0:
                    writer.writerow(map(cell, table))
                writer.writerows(zip(*map(_written, table.values()), strict=True))


def _written(column: NDArray[Any]) -> list[str]:
    """The shortest text that gives the same number again; nothing for NaN. Text that is no formula."""
    text: list[str] = column.astype(str).tolist()
    if column.dtype.kind == "f":
        return ["" if value == "nan" else value for value in text]
    return list(map(cell, text)) if column.dtype == object else text


def _parquet(run: Run, out: Path, stride: int) -> None:
    arrow = optional("pyarrow", "export --to parquet")
    parquet = optional("pyarrow.parquet", "export --to parquet")
    out.mkdir()
    for name, pieces in _tables(run, stride):
        writer = None
        try:
            for piece in pieces:
                table = arrow.table({key: _column(arrow, values) for key, values in piece.items()})
                writer = writer or parquet.ParquetWriter(out / f"{name}.parquet", table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _column(arrow: Any, values: NDArray[Any]) -> Any:
    return arrow.array(values, type=arrow.string()) if values.dtype == object else arrow.array(values)


def _netcdf(run: Run, out: Path, stride: int) -> None:
    optional("h5netcdf", "export --to netcdf")
    frames.to_xarray(run, stride).to_netcdf(out, engine="h5netcdf")


# ---- TensorBoard


def _tensorboard(run: Run, out: Path, stride: int) -> None:
    why = "export --to tensorboard"
    event = optional("tensorboard.compat.proto.event_pb2", why)
    summary = optional("tensorboard.compat.proto.summary_pb2", why)
    files = optional("tensorboard.summary.writer.event_file_writer", why)
    writer = files.EventFileWriter(str(out))

    def add(step: int, wall: float, values: dict[str, float]) -> None:
        known = [summary.Summary.Value(tag=k, simple_value=v) for k, v in values.items() if np.isfinite(v)]
        writer.add_event(event.Event(step=step, wall_time=wall, summary=summary.Summary(value=known)))

    try:
        began = _began(run)
        last: dict[int, tuple[int, float]] = {}
        for table, block in _all_blocks(run, stride):
            scalars = _scalars(run, table, block)
            for row, (step, time, epoch) in enumerate(zip(block["step"], block["time"], block["epoch"], strict=True)):
                last[int(epoch)] = int(step), began + float(time)
                add(int(step), began + float(time), {tag: float(values[row]) for tag, values in scalars.items()})
        for epoch, values in run.epochs_by_number().items():
            step, wall = last.get(epoch, (epoch, began))
            add(step, wall, {f"epochs/{name}": value for name, value in values.items()})
    finally:
        writer.close()


def _all_blocks(run: Run, stride: int) -> Iterator[tuple[schema.Table, _Columns]]:
    for table in schema.TABLES:
        yield from ((table, block) for block in run.blocks(run.count(table), stride=stride, table=table))


def _scalars(run: Run, table: schema.Table, block: _Columns) -> _Columns:
    """What TensorBoard is to show, by tag."""
    found: _Columns = {}
    for field in table.held(run):
        values, tag = block[field.name], table.path(field.name)
        if field.axes == (schema.STEP,):
            if field.name not in _NO_CURVES:
                found[tag] = values
            continue
        if len(field.axes) > 3:  # T x P curves a layer that nobody would look at one by one
            continue
        heads = names_along(field.axes[-1], run)
        if len(field.axes) == 2:
            found |= {f"{tag}/{head}": values[:, i] for i, head in enumerate(heads)}
        else:
            for place, name in enumerate(names_along(field.axes[1], run)):
                found |= {f"{tag}/{name}/{head}": values[:, place, i] for i, head in enumerate(heads)}
    return found


def _began(run: Run) -> float:
    """When recording started, in seconds of the wall clock: about the time of the file less that of its last row."""
    last = run.read("time", start=-1)
    return _wall(run) - float(last[0] if last.size else 0.0)


def _wall(run: Run) -> float:
    try:
        return datetime.fromisoformat(run.file_time).timestamp()
    except ValueError:
        return 0.0
