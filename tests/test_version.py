"""Files of version 1.0 are read for ever; later 1.x too; 2.x is refused with what to do."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from gradprobe.errors import RunFileError
from gradprobe.runfile import open_run, schema
from gradprobe.runfile.files import BLOCK, seal
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair

FIXTURE = Path(__file__).parent / "fixtures" / "run-1.0.h5"

spec = importlib.util.spec_from_file_location("make_run_1_0", FIXTURE.with_name("make_run_1_0.py"))
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copy(FIXTURE, tmp_path / "run.h5"))


@pytest.fixture(params=["kept", "now"])
def path(request, tmp_path) -> Path:
    """The file that was kept, and one that the current writer makes of the same rows."""
    if request.param == "kept":
        return FIXTURE
    made.main(tmp_path / "now.h5")
    return tmp_path / "now.h5"


def test_a_file_of_version_1_0_is_read(path):
    with open_run(path) as run:
        assert (run.tasks, run.layers) == (made.TASKS, made.LAYERS)
        assert run.pairs == ("det|cls", "det|größe", "cls|größe")
        assert run.layer_size.tolist() == [432, 32, 4608, 1 << 33]
        np.testing.assert_array_equal(run.reach, made.REACH)
        assert run["step"].tolist() == list(range(0, 120, 10))
        assert run["epoch"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert run["time"].tolist() == [row / 4 for row in range(12)]
        np.testing.assert_array_equal(run["loss"], np.array([4.0, 2.0, 1.0]) / 2.0 ** np.arange(12)[:, None])
        np.testing.assert_array_equal(run["weight"], np.tile([1.5, 1.0, 0.5], (12, 1)))
        np.testing.assert_array_equal(run["lr"], [np.nan] + [0.25] * 11)
        assert (run["overhead"] == 0.125).all()
        assert (run["batch_size"] == 8).all()
        names = [run.status_names[code] for code in run["status"]]
        assert names == ["measured"] * 5 + ["a task's gradient is not finite"] + ["measured"] * 6
        assert (run.complete, run.end, run.rows_dropped, run.sealed) == (True, "finished", 0, True)


def test_gradients_of_version_1_0_are_read(path):
    norm = np.array([np.where(made.REACH, made.norms(row), np.nan) for row in range(12)])
    norm[5] = np.nan
    with open_run(path) as run:
        np.testing.assert_array_equal(run["grad_norm"], norm.astype(np.float32))
        cosine = run["cosine"]
        np.testing.assert_allclose(cosine[:, 0, 0], [np.nan if r == 5 else (r - 6) / 16 for r in range(12)], atol=1e-7)
        np.testing.assert_allclose(cosine[0, :, 1], [0.5, np.nan, 0.5, 0.5], atol=1e-7)
        np.testing.assert_allclose(cosine[0, :, 2], [-0.25, np.nan, -0.25, np.nan], atol=1e-7)
        np.testing.assert_allclose(run.gram()[[0, 7]], [made.gram(0), made.gram(7)], rtol=1e-6, atol=1e-7)
        shared = np.sqrt(np.nansum(norm[0] ** 2, axis=0))
        np.testing.assert_allclose(run["shared_grad_norm"][0], shared, rtol=1e-6)
        assert np.isnan(run["shared_cosine"][5]).all()


def test_words_of_version_1_0_are_read(path):
    with open_run(path) as run:
        assert run.epochs["mAP50"].tolist() == [0.25, 0.5, 0.625]
        np.testing.assert_array_equal(run.epochs["accuracy"], [np.nan, 0.75, 1.0])
        (session,) = run.sessions
        assert (session["first_step"], session["end"], session["replaced"]) == (0, "finished", {})
        provenance = {name: value for name, value in run.provenance.items() if name != "sessions"}
        assert provenance == {
            "trainer": "gradnorm",
            "argv": ["record", "--data", "straße.yaml"],
            "hyp.box": 0.05,
            "hyp.anchors": [1.5, 2.0],
            "hyp.none": "",
            "seed": 7,
            "resumed": 0,
            "sources": [],
        }
    assert check_run(path).whole


def test_the_current_writer_makes_what_the_kept_file_holds(tmp_path):
    """A change of the format shows here, and asks for a new minor version."""
    made.main(tmp_path / "now.h5")
    with h5py.File(FIXTURE) as kept, h5py.File(tmp_path / "now.h5") as now:
        assert now.attrs["encoding-version"] == kept.attrs["encoding-version"] == "1.0" == schema.ENCODING_VERSION
        assert sorted(now.attrs) == sorted(kept.attrs)
        found: list[dict[str, tuple]] = [{}, {}]
        for file, seen in zip((kept, now), found, strict=True):
            file.visititems(
                lambda name, item, seen=seen: seen.__setitem__(
                    name, (item.shape, item.dtype, sorted(item.attrs)) if isinstance(item, h5py.Dataset) else ()
                )
            )
        reach = found[1].pop("reach")
        assert found[0].pop("reach") == (*reach[:2], sorted({*reach[2]} - {schema.BASIS}))  # what it goes by, since
        assert found[0] == found[1]


def change(path: Path, version: str) -> None:
    with h5py.File(path, "r+", libver=("v108", "v110")) as file:
        file.attrs["encoding-version"] = version
        file.attrs["new"] = [1.0, 2.0]
        file["later_noise"] = np.ones((12, 4, 3, 3), "<f4")
        file.create_group("later").create_dataset("clip/scale", data=np.zeros((12, 5)))
        file["later"].attrs["names"] = "of a later version"
    with path.open("rb+") as raw:
        seal(raw)


def test_a_later_minor_version_is_read_with_what_it_adds(copy, tmp_path):
    change(copy, "1.7")
    with open_run(copy) as run:
        np.testing.assert_array_equal(run["loss"], np.array([4.0, 2.0, 1.0]) / 2.0 ** np.arange(12)[:, None])
        assert run["later_noise"].shape == (12, 4, 3, 3)
        assert run["later/clip/scale"].shape == (12, 5)
    assert check_run(copy).whole
    report = repair(copy, tmp_path / "saved.h5")
    assert [(f.kind, f.what) for f in report.findings] == [
        ("note", "what this version does not know is left out: later, later_noise")
    ]


@pytest.mark.parametrize("version", ["2.0", "10.1", "0.9", "", "one"])
def test_another_major_version_is_refused_with_what_to_do(copy, version):
    change(copy, version)
    with pytest.raises(RunFileError, match=rf"has format version {version}; .*pip install -U gradprobe"):
        open_run(copy)


def test_sums_by_the_document_alone():
    """docs/run-file.md, "Sums", gone through with nothing of ours."""
    import struct
    import zlib

    data = FIXTURE.read_bytes()
    magic, length, block, count, own = struct.unpack("<16sQIII", data[-36:])
    assert (magic, block) == (b"gradprobe-crc32\n", 4096)
    assert block == BLOCK
    assert length == int.from_bytes(data[28:36], "little")  # the end of file address in HDF5's superblock
    table = data[length:-36]
    assert zlib.crc32(table + data[-36:-4]) == own
    sums = struct.unpack(f"<{count}I", table)
    assert [zlib.crc32(data[at : min(at + block, length)]) for at in range(0, length, block)] == list(sums)
