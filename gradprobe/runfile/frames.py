"""A run (:class:`gradprobe.runfile.Run`) as pandas and xarray hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradprobe.errors import RunFileError, optional
from gradprobe.rows.table import names_along
from gradprobe.runfile import schema

if TYPE_CHECKING:
    import pandas
    import xarray

_EPOCHS = "epochs"
_NAMED = (schema.LAYER, schema.TASK, schema.PAIR)
_EPOCH_NUMBER = "epoch_number"  # the axis of metrics per epoch; "epoch" is the epoch of each row


def to_pandas(run: Any, name: str, stride: int = 1) -> pandas.DataFrame:
    """One dataset as a tidy table; documented at :meth:`gradprobe.runfile.Run.to_pandas`."""
    pandas = optional("pandas", "Run.to_pandas")
    if name == _EPOCHS:
        return pandas.DataFrame(run.epochs)
    fields = {path: (table, field) for table, path, field in _fields(run)}
    if name not in fields or fields[name][1].name == schema.STEP:
        raise RunFileError(f"{run.path}: no table {name!r}; there are: {', '.join([*fields, _EPOCHS])}.")
    table, field = fields[name]
    values = run.read(name, stride=stride) if field.axes[0] == schema.STEP else run[name]
    columns: dict[str, Any] = {}
    for place, axis in enumerate(field.axes):
        codes = along(np.arange(values.shape[place]), place, values.shape)
        if axis == schema.STEP:
            columns[axis] = run.read(table.path(schema.STEP), stride=stride)[codes]
        else:
            columns[axis] = pandas.Categorical.from_codes(codes, list(names_along(axis, run)))
    return pandas.DataFrame({**columns, field.name: values.ravel()})


def _fields(run: Any) -> Iterator[tuple[schema.Table, str, schema.Field]]:
    """Every field of the tables that the run has, with its table and its name in the file."""
    for table in schema.TABLES:
        if table.path(schema.STEP) in run:
            yield from ((table, table.path(field.name), field) for field in table.held(run))
    yield from ((schema.ROWS, field.name, field) for field in schema.HEADER_FIELDS)
    if run.feature_names:
        yield schema.FEATURES, schema.FEATURES.path(schema.FEATURE_SIZE.name), schema.FEATURE_SIZE


def to_xarray(run: Any, stride: int = 1) -> xarray.Dataset:
    """A whole run; documented at :meth:`gradprobe.runfile.Run.to_xarray`."""
    xarray = optional("xarray", "Run.to_xarray")
    variables: dict[str, Any] = {}
    for table, path, field in _fields(run):
        if field.name == schema.STEP:
            continue
        values = run.read(path, stride=stride) if field.axes[0] == schema.STEP else run[path]
        about: dict[str, Any] = {"long_name": field.meaning} | ({"units": field.units} if field.units else {})
        if field.name == "status":
            about["status_names"] = list(run.status_names)
        axes = [_axis(table, axis) for axis in field.axes]
        variables[path.replace("/", ".")] = (axes, values, about)
    epochs = run.epochs
    number = epochs.pop(schema.EPOCH)
    variables |= {f"{_EPOCHS}.{name}": ((_EPOCH_NUMBER,), values) for name, values in epochs.items()}
    coordinates: dict[str, Any] = {axis: np.array(names_along(axis, run), dtype=object) for axis in _NAMED}
    coordinates |= {_EPOCH_NUMBER: number}
    if schema.OTHER_TASK in run:
        coordinates[schema.OTHER_TASK] = np.array(run.tasks, dtype=object)
    for table in schema.TABLES:
        if (steps := table.path(table.axis)) in run:
            coordinates[_axis(table, table.axis)] = run.read(steps, stride=stride)
            coordinates |= {axis: np.array(names_along(axis, run), dtype=object) for axis in table.names}
    for table in schema.WHOLE:
        for name, values in run.table(table.name).items():
            place = tuple(f"{table.group}.{axis}" for axis in table[name].axes)
            if name in table.own:
                coordinates[f"{table.group}.{name}"] = values
            else:
                variables[f"{table.group}.{name}"] = (place, values, {"long_name": table[name].meaning})
    return xarray.Dataset(variables, coordinates, _about_run(run))


def _axis(table: schema.Table, axis: str) -> str:
    """Steps of a group are an axis of their own: ``features.step``."""
    return f"{table.group}.{axis}" if table.group and axis == schema.STEP else axis


def _about_run(run: Any) -> dict[str, Any]:
    """Provenance and end as attributes that netCDF can hold: no bool, no empty list."""
    about: dict[str, Any] = {"end": run.end, "rows_dropped": run.rows_dropped}
    for name, value in run.provenance.items():
        if isinstance(value, bool):
            value = int(value)
        about[f"provenance.{name}"] = "" if isinstance(value, list) and not value else value
    return about


def along(values: NDArray[Any], place: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """The values of one axis, repeated to go with an array of ``shape`` that is laid out flat.

    >>> along(np.array([7, 8]), 0, (2, 3)).tolist()
    [7, 7, 7, 8, 8, 8]
    """
    view = values.reshape([-1 if axis == place else 1 for axis in range(len(shape))])
    return np.broadcast_to(view, shape).ravel()
