"""Tables are data: every field goes through writer, reader, check, repair and exports by the registry."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import growing
import h5py
import numpy as np
import pytest

from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.rows import ROWS, TABLES, Row, Table
from gradprobe.rows.table import common_fields, field, status_field
from gradprobe.runfile import RunWriter, open_run, schema
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.files import seal
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

import make_all_tables as made  # noqa: E402

STEPS = made.STEPS
SINCE = ("ledger/alone",)
"""Optional fields that the kept file is too old for."""


@pytest.fixture(params=["kept", "now"])
def path(request, tmp_path) -> Path:
    """The file that was kept from before tables were data, and one that the writer makes of the same rows."""
    if request.param == "kept":
        return Path(shutil.copy(FIXTURES / "all-tables-1.0.h5", tmp_path))
    made.main(tmp_path)
    return tmp_path / "all-tables-1.0.h5"


def rows_of(table: Table) -> list:
    """The rows that the file was made of."""
    if table.name == "features":
        return [None] * STEPS
    every = [(growing.row(step, 3), *growing.others(step, 3)) for step in range(STEPS)]
    return [next(row for row in rows if row.table is table) for rows in every]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_of_version_1_0_is_read(path, table):
    rows = rows_of(table)
    with open_run(path) as run:
        found = run.table(table.name)
        there = [f for f in table.fields if f.name in found]
        later = [table.path(f.name) for f in table.fields if f not in there]
        assert later == [name for name in SINCE if name.startswith(f"{table.name}/") and name not in run]
        assert found["step"].tolist() == list(range(STEPS))
        for f in there:
            assert found[f.name].dtype == f.dtype, f.name
            if hasattr(rows[0], f.name) and f.of is None:
                expected = np.array([getattr(row, f.name) for row in rows])
                np.testing.assert_allclose(found[f.name], expected, rtol=1e-6, err_msg=f.name)
        if "grad_norm" in found:
            gram = np.array(
                [made.feature_gram(s) for s in range(STEPS)] if table.name == "features" else [r.gram for r in rows]
            )
            np.testing.assert_allclose(found["grad_norm"], measures.norm(gram), rtol=1e-6)
            np.testing.assert_allclose(found["cosine"], measures.pair_cosine(gram), atol=1e-6)
        if "gram_noise" in found:
            noise = [np.full((3, 2, 2), np.nan) if r.gram_noise is None else r.gram_noise for r in rows]
            np.testing.assert_allclose(found["gram_noise"], noise, rtol=1e-6)
    assert check_run(path).whole


def test_tables_that_are_written_at_once_are_read(path):
    with open_run(path) as run:
        found = run.table("test")
        assert list(found["cluster"]) == list(made.TEST.clusters)
        assert list(found["metric"]) == list(made.TEST.metrics)
        np.testing.assert_array_equal(found["without"], made.TEST.without)
        assert run.table("audit") == {}
        with pytest.raises(RunFileError, match=r"no table 'nothing' \(there are: rows, features, updates, ledger"):
            run.table("nothing")
    for audit in (FIXTURES / "audit-1.0.h5", path.with_name("audit-1.0.h5")):
        if audit.exists():
            with open_run(audit) as run:
                assert run.audit["about"] == {name: made.AUDIT[name] for name in run.audit["about"]}
                assert run.audit["door"] == ("bn", "rng")
                np.testing.assert_array_equal(run.audit["displacement"], [0, 0.25, np.nan])
                np.testing.assert_array_equal(run.audit["contribution"], [0.25, np.nan])


def test_a_reader_of_version_1_0_finds_all_that_it_asks_for(tmp_path):
    """It refuses a file that lacks a dataset of its tables, or has one of another type or shape; others it skips."""
    made.main(tmp_path)
    for name in ("all-tables-1.0.h5", "audit-1.0.h5"):
        with h5py.File(FIXTURES / name) as kept, h5py.File(tmp_path / name) as now:
            kept.visititems(lambda where, item, now=now: same(where, item, now))


def same(where, item, now) -> None:
    assert where in now, where
    if isinstance(item, h5py.Dataset):
        assert (now[where].shape, now[where].dtype) == (item.shape, item.dtype), where
        assert set(item.attrs) <= set(now[where].attrs), where
        if item.dtype.kind in "fiu":
            np.testing.assert_allclose(now[where][()], item[()], rtol=1e-5, atol=1e-7, err_msg=where)


def lacking(table):
    """Fields that a file may lack: not the steps, nor the column whose attribute holds the names of all statuses."""
    kept = [f for f in table.fields if table.path(f.name) not in SINCE]
    return [f for f in kept if f.name != "step" and (table, f.name) != (ROWS, "status")]


def without(folder, table, fields):
    path = Path(shutil.copy(FIXTURES / "all-tables-1.0.h5", folder))
    with h5py.File(path, "r+", libver=("v108", "v110")) as file:
        for field_ in fields:
            del file[table.path(field_.name)]
    with path.open("rb+") as raw:
        seal(raw)
    return path


def assert_missing(run, table, fields):
    found = run.table(table.name)
    for field_ in fields:
        assert (field_.name in found) != field_.optional
        if not field_.optional:
            values = found[field_.name]
            assert len(values) == STEPS
            assert np.isnan(values).all() if np.isnan(field_.missing) else (values == field_.missing).all()
            assert field_.name in next(run.blocks(STEPS, table=table))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_file_that_lacks_a_field_is_read_and_the_field_is_missing(tmp_path, table):
    """A version that adds a field to a table still opens every file of before."""
    for field_ in lacking(table):
        with open_run(without(tmp_path, table, [field_])) as run:
            assert_missing(run, table, [field_])


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        *(pytest.param(table, lacking(table), id=table.name) for table in TABLES),
        *(
            pytest.param(table, [f], id=f"{table.name}-{f.name}", marks=pytest.mark.slow)
            for table in TABLES
            for f in lacking(table)
        ),
    ],
)
def test_a_file_that_lacks_fields_is_exported_checked_and_repaired(tmp_path, table, fields):
    path = without(tmp_path, table, fields)
    with open_run(path) as run:
        assert_missing(run, table, fields)
        assert len(run.to_xarray()["step"]) == STEPS
        export_run(run, "csv", tmp_path / "tables")
    report = check_run(path)
    assert report.whole
    lacks = ", ".join(table.path(f.name) for f in fields if not f.optional)
    assert [f.what for f in report.findings] == [f"has no {lacks}: read as missing"] * bool(lacks)
    repair(path, tmp_path / "repaired.h5")
    with open_run(tmp_path / "repaired.h5") as run:
        for other in TABLES:
            assert run.count(other) == STEPS


def test_a_run_without_norms_is_gone_on_with_and_what_nobody_knows_is_told(tmp_path, caplog):
    path = Path(shutil.copy(FIXTURES / "all-tables-1.0.h5", tmp_path))
    with h5py.File(path, "r+", libver=("v108", "v110")) as file:
        del file["grad_norm"]
        file["update/new"] = np.arange(STEPS, dtype="<i2")
        file["new"] = np.arange(STEPS)
    with path.open("rb+") as raw:
        seal(raw)
    found = [finding.what for finding in repair(path, tmp_path / "repaired.h5").findings]
    assert found == ["what this version does not know is left out: new, update/new"]
    writer = RunWriter(path, resume=True)
    writer.rewind(4, -1)
    writer.start(growing.header(3))
    writer.close()
    assert ["new, update/new" in record.getMessage() for record in caplog.records] == [True]
    with open_run(path) as run:
        assert np.isnan(run["grad_norm"]).all()
        assert run["update/step"].tolist() == [0, 1, 2, 3]
    for name in ("all-tables-1.0.h5", "audit-1.0.h5", "run-1.0.h5"):
        with open_run(FIXTURES / name) as run:
            assert run.unknown == ()


def test_repair_keeps_every_table_and_says_of_none_that_it_was_left_out(path, tmp_path):
    report = repair(path, tmp_path / "repaired.h5")
    assert report.findings == []
    with open_run(path) as run, open_run(tmp_path / "repaired.h5") as repaired:
        for table in TABLES:
            for name, values in run.table(table.name).items():
                np.testing.assert_array_equal(repaired.table(table.name)[name], values, err_msg=name)
        assert list(repaired.table("test")["cluster"]) == list(made.TEST.clusters)


def test_repair_keeps_an_audit(tmp_path):
    kept = FIXTURES / "audit-1.0.h5"
    assert repair(kept, tmp_path / "repaired.h5").findings == []
    with open_run(kept) as run, open_run(tmp_path / "repaired.h5") as repaired:
        assert repaired.audit["about"] == run.audit["about"]
        for name in set(run.audit) - {"about"}:
            np.testing.assert_array_equal(repaired.audit[name], run.audit[name])
        assert list(repaired["audit/json"]) == list(run["audit/json"])
    assert check_run(tmp_path / "repaired.h5").whole


def test_summary_counts_the_time_of_all_tables(path):
    from gradprobe.summary import summarise

    with open_run(path) as run:
        expected = sum(float(run.table(t.name)["overhead"].sum()) for t in TABLES)
        assert summarise(run)["overhead"]["seconds"] == pytest.approx(expected, rel=1e-6)
        assert expected >= 0.25 * STEPS


# ---- what it takes to add something


@contextmanager
def one_more_column():
    """As if a version had another field by row."""
    fields = ROWS.fields
    new = field("flatness", "step layer task", "<f4", "a new number", of=lambda batch: batch.stacked("flatness", 2))
    object.__setattr__(ROWS, "fields", (*fields, new))
    try:
        yield
    finally:
        object.__setattr__(ROWS, "fields", fields)


@dataclasses.dataclass(frozen=True)
class NewRow(Row):
    by_layer: ClassVar = (*Row.by_layer, "flatness")

    flatness: np.ndarray | None = None


def flat(step: int, layers: int = 3) -> np.ndarray:
    return np.arange(layers * 2.0).reshape(layers, 2) + step


def new_row(step: int) -> NewRow:
    plain = growing.row(step, 3)
    return NewRow(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}, flatness=flat(step))


def test_a_new_column_goes_through_everything_by_its_field_alone(tmp_path):
    path = tmp_path / "run.h5"
    with one_more_column():
        writer = RunWriter(path)
        writer.start(growing.header(3))
        for step in range(6):
            writer.write(new_row(step))
            if step == 2:
                writer.flush()  # a part of its own
        writer.close()
        resumed = RunWriter(path, resume=True)
        resumed.rewind(4, -1)
        resumed.start(growing.header(5))
        resumed.write(new_row(4))
        resumed.close()
        with open_run(path) as run:
            assert run["flatness"].shape == (5, 5, 2)
            np.testing.assert_array_equal(run["flatness"][:, :3], [flat(step) for step in range(5)])
            assert np.isnan(run["flatness"][:, 3:]).all()
            assert run.to_xarray()["flatness"].dims == ("step", "layer", "task")
            assert "flatness" in run.to_pandas("flatness")
            export_run(run, "csv", tmp_path / "tables")
        assert (tmp_path / "tables" / "rows_flatness.csv").exists()
        assert check_run(path).whole
        repair(path, tmp_path / "repaired.h5")
        with open_run(tmp_path / "repaired.h5") as run:
            np.testing.assert_array_equal(run["flatness"][:, :3], [flat(step) for step in range(5)])
        with open_run(FIXTURES / "run-1.0.h5") as run:  # a file of before
            assert np.isnan(run["flatness"]).all()
    with open_run(path) as run:  # the version of before reads a file of the new one
        assert len(run) == 5
        assert "flatness" in run
    assert check_run(path).whole


NEW = Table(
    "sharpness",
    "sharpness",
    (
        *common_fields("training step of the row"),
        field("largest", "step task", "<f8", "largest eigenvalue", least=0),
        field("overhead", "step", "<f4", "time spent"),
        status_field("measured"),
    ),
)


@dataclasses.dataclass(frozen=True)
class NewTableRow:
    table: ClassVar = NEW
    by_layer: ClassVar = ()
    brings: ClassVar = (NEW.name,)

    step: int
    largest: np.ndarray
    epoch: int = 0
    time: float = 0.0
    overhead: float = 0.5
    status: str = "measured"


def test_a_new_table_goes_through_everything_by_its_registration_alone(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    with monkeypatch.context() as later:
        later.setattr(schema, "TABLES", (*TABLES, NEW))
        writer = RunWriter(path)
        writer.start(growing.header(3))
        for step in range(6):
            writer.write(growing.row(step, 3))
            writer.write(NewTableRow(step, np.array([step, 2.0 * step])))
        writer.flush()
        writer.close()
        with open_run(path) as run:
            np.testing.assert_array_equal(run.table("sharpness")["largest"], [[s, 2 * s] for s in range(6)])
            assert "sharpness.largest" in run.to_xarray()
            export_run(run, "csv", tmp_path / "tables")
            from gradprobe.summary import summarise

            assert summarise(run)["overhead"]["seconds"] == pytest.approx(3.0)
        assert (tmp_path / "tables" / "sharpness.csv").exists()
        assert check_run(path).whole
        assert repair(path, tmp_path / "repaired.h5").findings == []
        resumed = RunWriter(path, resume=True)
        resumed.rewind(3, -1)
        resumed.start(growing.header(3))
        resumed.close()
        with open_run(path) as run:
            assert run["sharpness/step"].tolist() == [0, 1, 2]
    with open_run(path) as run:  # the version of before
        assert len(run) == 3


def test_a_table_has_its_own_name_group_and_axis():
    assert len({t.name for t in (*TABLES, *schema.WHOLE)}) == len(TABLES) + 2
    for table in TABLES:
        names = [f.name for f in table.fields]
        assert len(set(names)) == len(names)
        assert names[:3] == ["step", "epoch", "time"]
        assert "overhead" in names
        assert {axis for f in table.fields for axis in f.axes} <= {
            *table.own, "layer", "task", "pair", "other_task"
        }  # fmt: skip
