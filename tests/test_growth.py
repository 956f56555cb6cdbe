"""Layers that join a run after its start, in every table, through every way a file is written, cut off and read."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import growing
import h5py
import numpy as np
import pytest
from growing import LAYERS, TASKS, expected, put, row, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradprobe import open_run
from gradprobe.errors import RunFileError
from gradprobe.rows import GrowingSink, Header
from gradprobe.runfile import RunWriter, schema, store
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair
from gradprobe.runfile.thin import ThinRun
from gradprobe.summary import sentences, summarise

STEADY = {"flush_rows": 10**9, "flush_seconds": 1e9}
COUNTS = [2] * 6 + [3] * 5 + [5] * 9
"""Layers of rows 0, 1, ..."""


def record(path, counts=COUNTS, *, flushed=True, stop=None, tables=True, **options):
    """Rows of so many layers each, a part for each two rows; the writer is left open."""
    writer = RunWriter(path, **STEADY, **options)
    start(writer, counts[0])
    held = counts[0]
    for step, layers in enumerate(counts[:stop]):
        if layers > held:
            writer.grow(growing.header(layers))
            held = layers
        put(writer, step, layers, tables=tables)
        if flushed and step % 2:
            assert writer.flush()
    return writer


def assert_read(run, counts=COUNTS, layers=5):
    norms, cosines, shared_norm, shared_cosine = expected(counts)
    assert run.layers == LAYERS[:layers]
    assert run.layer_size.tolist() == growing.SIZE[:layers].tolist()
    np.testing.assert_allclose(run["grad_norm"], norms[:, :layers], rtol=1e-6)
    np.testing.assert_allclose(run["cosine"], cosines[:, :layers], atol=1e-6)
    for over in (None, list(run.layers)):
        np.testing.assert_allclose(run.norm(over), shared_norm, rtol=1e-6)
        np.testing.assert_allclose(run.cosine(over), shared_cosine, atol=1e-6)


def test_the_writer_takes_layers_that_join():
    assert issubclass(RunWriter, GrowingSink)


@pytest.mark.parametrize("flushed", [True, False])
def test_rows_before_lack_the_layers_that_join(tmp_path, flushed):
    writer = record(tmp_path / "run.h5", flushed=flushed)
    assert writer.flush()
    with open_run(tmp_path / "run.h5") as run:
        assert_read(run)
        assert run["update/effect"].shape == (len(COUNTS), len(LAYERS), 2, 4)
        missing = np.isnan(run["ledger/term"]).all(axis=(2, 3))
        assert (~missing).sum(axis=1).tolist() == COUNTS
        assert np.isnan(run["probe_loader/cosine"][0, 2:]).all()
        assert run["gram_noise"].shape == (len(COUNTS), len(LAYERS), 2, 2)
    assert [finding.kind for finding in check_run(tmp_path / "run.h5").findings] == ["incomplete"]  # is being recorded
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert_read(run)
        assert run.joined == {"late.0": 6, "late.1": 11, "late.2": 11}
        assert run.lacking() == {}
    assert check_run(tmp_path / "run.h5").whole


def test_one_layer_or_some_are_read_alike_from_parts_and_from_one_file(tmp_path):
    writer = record(tmp_path / "run.h5")
    selections = [0, 3, -1, slice(1, 4), slice(0, 5, 2), slice(3, None), slice(None, 2)]

    def read():
        with open_run(tmp_path / "run.h5") as run:
            return [run.read("cosine", layers=s, start=-17, stride=3) for s in selections]

    apart = read()
    writer.close()
    for before, after in zip(apart, read(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_run_that_is_followed_gets_the_new_layers(tmp_path):
    writer = record(tmp_path / "run.h5", stop=6)
    with open_run(tmp_path / "run.h5") as run:
        assert run.layers == LAYERS[:2]
        assert run.seen.first.shape == (2, 2)
        writer.grow(growing.header(3))
        put(writer, 6, 3)
        assert writer.flush()
        assert run.refresh()
        assert run.layers == LAYERS[:3]
        assert run.joined == {"late.0": 6}
        assert run.norm().shape == (7, 2)
    writer.close()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_growth_at_any_row_reads_as_if_all_layers_had_been_there(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("grown")
    steps = data.draw(st.integers(1, 12))
    counts = sorted(data.draw(st.lists(st.integers(1, len(LAYERS)), min_size=steps, max_size=steps)))
    flushes = data.draw(st.sets(st.integers(0, steps - 1)))
    back = data.draw(st.one_of(st.none(), st.integers(0, steps - 1)))
    fan = data.draw(st.integers(2, 4))
    files = []
    for name, whole in (("grown", False), ("whole", True)):
        path = folder / f"{name}.h5"
        writer = RunWriter(path, **STEADY)
        writer._store._fan = fan
        held = len(LAYERS) if whole else counts[0]
        start(writer, held)
        among = len(LAYERS) if whole else None
        for step in [*range(steps), *(range(back, steps) if back is not None else ())]:
            if step == back and not writer._flusher.rewound:
                writer.rewind(step, step // 10)
                back_layers = held
                held = max(held, back_layers)
            if counts[step] > held:
                held = counts[step]
                writer.grow(growing.header(held))
            put(writer, step, counts[step], among)
            if step in flushes:
                assert writer.flush()
        if not whole and held < len(LAYERS):
            writer.grow(growing.header(len(LAYERS)))
        writer.close()
        assert check_run(path).whole
        files.append(path)
    with h5py.File(files[0]) as grown, h5py.File(files[1]) as whole:
        names: list[str] = []
        whole.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            if grown[name].dtype.kind == "O":
                assert grown[name].asstr()[()].tolist() == whole[name].asstr()[()].tolist()
            elif name != "reach":  # layers that nobody was seen on keep what the header says
                np.testing.assert_array_equal(grown[name][()], whole[name][()], err_msg=name)


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}]
import test_growth
test_growth.record({path!r}, stop={stop})
os.kill(os.getpid(), {signal})
"""


@pytest.mark.parametrize("stop", [8, 14])
def test_what_a_kill_leaves_is_read_gone_on_with_and_repaired(tmp_path, stop):
    path = tmp_path / "run.h5"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path), stop=stop, signal=int(signal.SIGKILL))
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -signal.SIGKILL
    with open_run(path) as run:
        assert_read(run, COUNTS[:stop], layers=COUNTS[stop - 1])
    repaired = tmp_path / "repaired.h5"
    assert not [f for f in repair(path, repaired).findings if f.kind == "damaged"]
    with open_run(repaired) as run:
        assert_read(run, COUNTS[:stop], layers=COUNTS[stop - 1])
    writer = RunWriter(path, resume=True, **STEADY)
    writer.rewind(stop - 1, (stop - 1) // 10)
    start(writer, 2)  # the session begins with what it finds at its first step
    for step in range(stop - 1, len(COUNTS)):
        writer.grow(growing.header(COUNTS[step]))
        put(writer, step, COUNTS[step])
    writer.close()
    with open_run(path) as run:
        assert_read(run)
    assert check_run(path).whole


def test_a_part_that_is_damaged_costs_its_own_rows_alone(tmp_path):
    writer = record(tmp_path / "run.h5")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "run.h5", copy)
    shutil.copytree(tmp_path / "run.h5.parts", copy / "run.h5.parts", ignore=shutil.ignore_patterns("lock"))
    writer.close()
    part = sorted((copy / "run.h5.parts").glob("*.h5"))[3]
    with h5py.File(part) as file:
        offset = file["grad_norm"].id.get_offset()
    with part.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 8)
    report = repair(copy / "run.h5", tmp_path / "out.h5")
    assert any(f.kind == "damaged" for f in report.findings)
    with open_run(tmp_path / "out.h5") as run:
        assert run.layers == LAYERS
        norms, good = expected(COUNTS)[0], run["status"] == 0
        assert good.sum() >= len(COUNTS) - 2
        np.testing.assert_allclose(run["grad_norm"][good], norms[run["step"][good]], rtol=1e-6)


def test_a_rewind_keeps_the_layers_and_forgets_who_was_seen(tmp_path):
    writer = record(tmp_path / "run.h5", stop=13)
    writer.rewind(8, 0)
    for step in range(8, 11):
        put(writer, step, 3)
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        norms, *_ = expected(COUNTS[:11])
        np.testing.assert_allclose(run["grad_norm"], norms, rtol=1e-6)
        assert run.layers == LAYERS
        assert (run.seen.first[3:] > 20).all()


def resume(path, layers, step=6, names=LAYERS):
    writer = RunWriter(path, resume=True, **STEADY)
    writer.rewind(step, 0)
    writer.start(Header(TASKS, names[:layers], growing.SIZE[:layers], np.ones((layers, 2), bool)))
    return writer


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_session_may_begin_with_fewer_layers_or_more(tmp_path, layers):
    record(tmp_path / "run.h5", COUNTS[:8], tables=False).close()  # three layers
    writer = resume(tmp_path / "run.h5", layers)
    put(writer, 6, layers, tables=False)
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        counts = [*COUNTS[:6], layers]
        assert run.layers == LAYERS[: max(3, layers)]
        np.testing.assert_allclose(run["grad_norm"], expected(counts)[0][:, : len(run.layers)], rtol=1e-6)


def test_a_session_of_other_layers_is_refused(tmp_path):
    record(tmp_path / "run.h5", COUNTS[:8], tables=False).close()
    with pytest.raises(RunFileError, match=r"holds tasks .* on 3 layers, but the run to go on has .* on 2 layers"):
        resume(tmp_path / "run.h5", 2, names=("trunk.0", "other"))


def test_a_session_that_finds_layers_in_another_order_keeps_them_apart_by_name(tmp_path):
    record(tmp_path / "run.h5", [2, 2, 4, 4], tables=False).close()  # late.0 and late.1
    writer = resume(tmp_path / "run.h5", 2, step=4)
    names = ("trunk.0", "trunk.1", "late.2", "late.1")
    writer.grow(Header(TASKS, names, np.array([30, 12, 9, 8]), np.ones((4, 2), bool)))
    found = row(4, 5)
    order = [0, 1, 4, 3]
    pick = {"gram": found.gram[order], "gram_noise": None, "reach": found.reach[order]}
    writer.write(type(found)(**{**found.__dict__, **pick}))
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert run.layers == LAYERS
        assert run.layer_size.tolist() == [30, 12, 50, 8, 9]
        norms = expected([5] * 5)[0][4]
        norms[2] = np.nan  # not found in this session
        np.testing.assert_allclose(run["grad_norm"][4], norms, rtol=1e-6)


def test_layers_of_other_tasks_cannot_join(tmp_path):
    writer = record(tmp_path / "run.h5", stop=2)
    with pytest.raises(RunFileError, match="cannot join"):
        writer.grow(Header(("a", "c"), LAYERS, growing.SIZE, np.ones((5, 2), bool)))
    writer.close()


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A closed run with growth, and two rows that lack a layer they had."""
    path = tmp_path_factory.mktemp("grown") / "run.h5"
    writer = record(path)
    for step in range(20, 22):
        put(writer, step, 5, lacking=(1,))
    writer.close()
    return path


def test_rows_that_lack_a_layer_are_measured_over_the_others(grown):
    with open_run(grown) as run:
        assert not run["status"].any()
        assert run.lacking() == {"trunk.1": 2}
        assert run.gaps.rows == 2
        *_, shared_norm, shared_cosine = expected([*COUNTS, 5, 5], {20: (1,), 21: (1,)})
        for over in (None, list(LAYERS)):
            np.testing.assert_allclose(run.norm(over), shared_norm, rtol=1e-6)
            np.testing.assert_allclose(run.cosine(over), shared_cosine, atol=1e-6)
        thin = ThinRun(run, 3)
        np.testing.assert_allclose(thin.cosine(list(LAYERS)), shared_cosine[::3], atol=1e-6)


def test_the_summary_says_what_joined_and_what_lacks(grown):
    with open_run(grown) as run:
        found = summarise(run)
        said = "\n".join(sentences(run, found))
    assert found["layers_joined"] == {"late.0": 6, "late.1": 11, "late.2": 11}
    assert found["lacking"] == {"rows": 2, "layers": {"trunk.1": 2}}
    assert "3 layers joined the shared ones after the start (late.0 from step 6, late.1 from step 11, late.2" in said
    assert (
        "2 rows of 22 lack layers, and are measured over those that they have; lacking most often: trunk.1 in 2" in said
    )
    assert not found["rows_not_measured"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("kind", ["csv", "parquet", "netcdf", "tensorboard"])
def test_every_export_takes_them(grown, tmp_path, kind):
    package = {"parquet": "pyarrow", "netcdf": "h5netcdf", "tensorboard": "tensorboard", "csv": "csv"}[kind]
    pytest.importorskip(package)
    with open_run(grown) as run:
        out = export_run(run, kind, tmp_path / "out")
        *_, shared_cosine = expected([*COUNTS, 5, 5], {20: (1,), 21: (1,)})
    if kind == "csv":
        lines = (out / "layers.csv").read_text().splitlines()
        assert lines[0] == "step,layer,task,grad_norm"
        assert len(lines) == 1 + 22 * 5 * 2
        assert "0,late.2,a," in lines
    elif kind == "netcdf":
        xarray = pytest.importorskip("xarray")
        with xarray.open_dataset(out, engine="h5netcdf") as data:
            np.testing.assert_allclose(data["shared_cosine"], shared_cosine, atol=1e-6)
            assert np.isnan(data["grad_norm"].sel(layer="late.0", task="a").values[:6]).all()


def test_plain_tools_select_a_layer_that_joined(grown):
    xarray = pytest.importorskip("xarray")
    pandas = pytest.importorskip("pandas")
    with xarray.open_dataset(grown, engine="h5netcdf") as data:
        assert np.isnan(data["grad_norm"].sel(layer="late.1", task="b").values).sum() == 11
    with open_run(grown) as run:
        table = run.to_pandas("cosine")
        assert isinstance(table, pandas.DataFrame)
        assert table[table.layer == "late.1"]["cosine"].isna().sum() == 11
        assert run.to_xarray().sizes["layer"] == 5


def test_parts_of_fewer_layers_are_put_together_under_more(tmp_path):
    """What the store copies from its own files has the layers of the header it is written under."""
    writer = record(tmp_path / "run.h5", tables=False)
    files = [tmp_path / "run.h5", *sorted((tmp_path / "run.h5.parts").glob("*.h5"))]
    blocks = list(store.blocks(files, schema.ROWS, growing.header(5, held=frozenset({"gram_noise", "micro_batches"}))))
    assert {block["grad_norm"].shape[1:] for block in blocks} == {(5, 2)}
    np.testing.assert_allclose(np.concatenate([b["grad_norm"] for b in blocks]), expected(COUNTS)[0], rtol=1e-6)
    writer.close()
