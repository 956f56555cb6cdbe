"""A run in other tools, tested with those tools."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from run_factory import make_run, trunk_layers

from gradprobe.cli.app import run as command
from gradprobe.errors import MissingExtraError, RunFileError, UsageError
from gradprobe.runfile import open_run, schema
from gradprobe.runfile.exports import FORMATS, export_run

ROWS, LAYER = 40, "model.9.cv1.conv"
PROVENANCE = {"trainer": "joint", "argv": ["record", "--café"], "hyp": {"box": 0.05}, "resumed": True, "none": []}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    layers = trunk_layers()
    reach = np.ones((len(layers), 2), bool)
    reach[0, 1] = False  # cls does not reach the first layer
    return make_run(folder / "conflict.h5", rows=ROWS, layers=layers, reach=reach, provenance=PROVENANCE, bad_rows=[3])


@pytest.fixture
def run(path):
    with open_run(path) as run:
        yield run


def value(run, name, row, *at) -> float:
    return float(run[name][(row, *at)])


# ---- the file itself, in plain tools


def test_xarray_opens_the_file_itself_with_names(path, run):
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(path, engine="h5netcdf") as data:
        assert data["grad_norm"].dims == ("step", "layer", "task")
        assert data["cosine"].dims == ("step", "layer", "pair")
        series = data["grad_norm"].sel(layer=LAYER, task="det")
        np.testing.assert_array_equal(series, run["grad_norm"][:, run.layers.index(LAYER), 0])
        assert float(data["cosine"].sel(layer=LAYER, pair="det|cls", step=50)) == value(
            run, "cosine", 5, run.layers.index(LAYER), 0
        )
    with xarray.open_dataset(path, engine="h5netcdf", group="epochs") as epochs:
        assert epochs["mAP50"].sel(epoch=2).item() == run.epochs["mAP50"][2]


needs_h5dump = pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed (Debian: hdf5-tools)")


@needs_h5dump
def test_h5dump_shows_only_types_that_every_tool_has(path):
    text = subprocess.run(["h5dump", "-H", path], check=True, capture_output=True, text=True).stdout
    for name in [f.name for f in (*schema.ROWS.held(()), *schema.HEADER_FIELDS)]:
        assert f'DATASET "{name}"' in text
    bare = "\n".join(text.split("ATTRIBUTE"))  # what is inside attributes is looked at below
    assert "H5T_ENUM" not in bare
    assert "EXTERNAL" not in bare


@needs_h5dump
def test_h5dump_gives_numbers_and_attributes(path, run):
    dumped = subprocess.run(
        ["h5dump", "-d", "/loss", "-s", "2,0", "-c", "1,2", "-y", path], check=True, capture_output=True, text=True
    ).stdout
    numbers = dumped.split("DATA {")[1].split("}")[0].replace(",", " ").split()
    np.testing.assert_allclose([float(n) for n in numbers], run["loss"][2], rtol=1e-5)
    argv = subprocess.run(["h5dump", "-a", "/provenance/argv", path], check=True, capture_output=True, text=True).stdout
    assert '"record' in argv


def test_h5py_reads_it_with_types_that_matlab_has(path, run):
    """Floats and integers of 1, 4 and 8 bytes and UTF-8 text: no booleans, enumerations or compounds."""
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["cosine"][()], run["cosine"])
        kinds = []
        file.visititems(lambda _, item: kinds.append(item.dtype) if isinstance(item, h5py.Dataset) else None)
        for owner in (file, file["provenance"], file["status"]):
            ours = [name for name in owner.attrs if name not in ("REFERENCE_LIST", "DIMENSION_LIST")]
            kinds += [owner.attrs.get_id(name).dtype for name in ours]
    assert {(kind.kind, kind.itemsize) for kind in kinds if kind.kind in "iuf"} <= {
        ("i", 4), ("i", 8), ("u", 1), ("f", 4), ("f", 8)
    }  # fmt: skip
    assert {kind.kind for kind in kinds} <= set("iufOS")
    assert all(h5py.check_enum_dtype(kind) is None for kind in kinds)


def test_netcdf_reads_the_file_itself(path, run):
    netcdf = pytest.importorskip("netCDF4", reason="netCDF4 is not installed")
    with netcdf.Dataset(path) as data:
        assert data["cosine"].dimensions == ("step", "layer", "pair")
        assert list(data["task"][:]) == ["det", "cls"]
        assert data["provenance"].getncattr("resumed") == 1
        assert data["provenance"].getncattr("argv") == ["record", "--café"]


# ---- pandas and xarray


def test_pandas_has_a_row_per_value(run):
    pytest.importorskip("pandas")
    table = run.to_pandas("grad_norm")
    assert list(table.columns) == ["step", "layer", "task", "grad_norm"]
    assert len(table) == ROWS * len(run.layers) * 2
    one = table[(table.step == 70) & (table.layer == LAYER) & (table.task == "cls")]
    assert one.grad_norm.item() == run["grad_norm"][7, run.layers.index(LAYER), 1]
    assert table[(table.layer == run.layers[0]) & (table.task == "cls")].grad_norm.isna().all()
    medians = table.groupby(["layer", "task"], observed=True).grad_norm.median()
    assert medians[LAYER, "det"] == pytest.approx(
        np.nanmedian(run["grad_norm"][:, run.layers.index(LAYER), 0]), rel=1e-6
    )


def test_pandas_takes_a_stride_and_every_kind_of_table(run):
    pytest.importorskip("pandas")
    assert run.to_pandas("loss", stride=7).step.unique().tolist() == list(range(0, ROWS * 10, 70))
    assert run.to_pandas("lr").columns.tolist() == ["step", "lr"]
    assert run.to_pandas("reach").reach.sum() == len(run.layers) * 2 - 1
    assert run.to_pandas("layer_size").set_index("layer").layer_size[LAYER] == run.layer_size[run.layers.index(LAYER)]
    assert run.to_pandas("epochs").epoch.tolist() == [0, 1, 2]
    with pytest.raises(RunFileError, match=r"no table 'weigth'; there are: .*weight"):
        run.to_pandas("weigth")


def test_xarray_holds_all_of_it(run):
    pytest.importorskip("xarray")
    data = run.to_xarray()
    assert set(data.data_vars) >= {f.name for f in (*schema.ROWS.held(()), *schema.HEADER_FIELDS)} - {"step"}
    np.testing.assert_array_equal(
        data.cosine.sel(layer=LAYER, pair="det|cls"), run["cosine"][:, run.layers.index(LAYER), 0]
    )
    assert data["epochs.mAP50"].sel(epoch_number=1).item() == run.epochs["mAP50"][1]
    assert data.attrs["provenance.hyp.box"] == 0.05
    assert data.grad_norm.attrs["units"] == "loss per unit of parameter"
    assert run.to_xarray(stride=9).step.values.tolist() == list(range(0, ROWS * 10, 90))


# ---- export


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_gives_the_same_numbers_again(run, tmp_path):
    out = export_run(run, "csv", tmp_path / "tables")
    rows = read_csv(out / "rows.csv")
    assert [int(r["step"]) for r in rows] == run["step"].tolist()
    for name in ("loss", "weight"):
        given = np.array([[r[f"{name}.{t}"] for t in run.tasks] for r in rows], np.float32)
        np.testing.assert_array_equal(given, run[name])
    assert rows[3]["status"] == "a task's gradient is not finite"
    assert rows[3]["shared_cosine.det|cls"] == ""  # NaN: nothing, which every tool reads as missing
    layers = read_csv(out / "layers.csv")
    given = np.array([r["grad_norm"] or "nan" for r in layers], np.float32).reshape(run["grad_norm"].shape)
    np.testing.assert_array_equal(given, run["grad_norm"])
    (cosine,) = (r for r in read_csv(out / "cosines.csv") if r["step"] == "50" and r["layer"] == LAYER)
    assert np.float32(cosine["cosine"]) == run["cosine"][5, run.layers.index(LAYER), 0]
    assert read_csv(out / "layer_table.csv")[0]["reach.cls"] == "0"
    assert float(read_csv(out / "epochs.csv")[2]["mAP50"]) == run.epochs["mAP50"][2]
    said = {r["name"]: r["value"] for r in read_csv(out / "provenance.csv")}
    assert json.loads(said["argv"]) == ["record", "--café"]


def test_csv_of_several_blocks_has_one_head(tmp_path):
    path = make_run(tmp_path / "long.h5", rows=5000, layers=1)
    with open_run(path) as run:
        rows = read_csv(export_run(run, "csv", stride=3) / "rows.csv")
        layers = read_csv(tmp_path / "long-csv" / "layers.csv")
        assert [int(r["step"]) for r in rows] == run.read("step", stride=3).tolist()
        assert [int(r["step"]) for r in layers[::2]] == run.read("step", stride=3).tolist()


def test_parquet_is_what_pandas_reads(run, tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    out = export_run(run, "parquet", tmp_path / "tables")
    layers = pandas.read_parquet(out / "layers.parquet")
    np.testing.assert_array_equal(layers.grad_norm.to_numpy().reshape(run["grad_norm"].shape), run["grad_norm"])
    assert layers.grad_norm.dtype == np.float32
    assert sorted(p.stem for p in out.iterdir()) == [
        "cosines", "epochs", "layer_table", "layers", "provenance", "rows"
    ]  # fmt: skip


def test_netcdf_is_valid_and_opens_in_xarray(run, tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    out = export_run(run, "netcdf", tmp_path / "run.nc")
    with xarray.open_dataset(out) as data:
        xarray.testing.assert_equal(data.load(), run.to_xarray())
    if shutil.which("ncdump") is not None:
        header = subprocess.run(["ncdump", "-h", out], check=True, capture_output=True, text=True).stdout
        assert "float cosine(step, layer, pair) ;" in header


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_shows_the_series(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = export_run(run, "tensorboard", tmp_path / "events")
    events = EventAccumulator(str(out), size_guidance={"scalars": 0})
    events.Reload()
    loss = events.Scalars("loss/det")
    assert [e.step for e in loss] == run["step"].tolist()
    np.testing.assert_array_equal(np.float32([e.value for e in loss]), run["loss"][:, 0])
    assert loss[-1].wall_time - loss[0].wall_time == pytest.approx(float(run["time"][-1] - run["time"][0]))
    assert len(events.Scalars("shared_cosine/det|cls")) == ROWS - 1  # one row was not measured
    assert f"cosine/{LAYER}/det|cls" in events.Tags()["scalars"]
    assert [e.value for e in events.Scalars("epochs/mAP50")] == pytest.approx(run.epochs["mAP50"].tolist())


@pytest.mark.parametrize(
    ("to", "package"),
    [("parquet", "pyarrow"), ("netcdf", "xarray"), ("netcdf", "h5netcdf"), ("tensorboard", "tensorboard")],
)
def test_a_missing_package_gives_the_pip_line(run, tmp_path, monkeypatch, to, package):
    for module in list(sys.modules):
        if module.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package '{package}'.*pip install 'gradprobe\[export\]'"):
        export_run(run, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    for to in FORMATS:
        with pytest.raises(UsageError, match=r"out exists; choose another place with --out"):
            export_run(run, to, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(UsageError, match="there are: csv, parquet, netcdf, tensorboard"):
        export_run(run, "xlsx", tmp_path / "other")
    with pytest.raises(UsageError, match="a stride of 0"):
        export_run(run, "csv", tmp_path / "other", stride=0)


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("gradprobe.runfile.exports._written", lambda column: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(run, "csv", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(path, tmp_path, capsys):
    assert command(["export", str(path), "--to", "csv", "--out", str(tmp_path / "t"), "--stride", "10"]) == 0
    said = capsys.readouterr().out.split()
    assert said[0] == str(tmp_path / "t")
    assert str(tmp_path / "t" / "layers.csv") in said
    assert len(read_csv(tmp_path / "t" / "rows.csv")) == ROWS // 10
    assert command(["export", str(path), "--to", "csv", "--out", str(tmp_path / "t")]) == 2


C_PROGRAM = """
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
int main(void) {{
    {code}
    for (hsize_t i = 0; i < size[0] * size[1]; i++) printf("%.9g\\n", values[i]);
    return 0;
}}
"""


@pytest.mark.skipif(shutil.which("h5cc") is None, reason="h5cc is not installed (Debian: libhdf5-dev)")
def test_the_document_shows_how_to_read_it_from_c(path, run, tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "run-file.md").read_text(encoding="utf-8")
    code = text.split("```c\n")[1].split("```")[0]
    (tmp_path / "read.c").write_text(C_PROGRAM.format(code=code))
    subprocess.run(["h5cc", "-o", "read", "read.c"], cwd=tmp_path, check=True, capture_output=True)
    shutil.copy(path, tmp_path)
    said = subprocess.run([tmp_path / "read"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    np.testing.assert_array_equal(np.array(said.split(), np.float32).reshape(ROWS, 2), run["loss"])
