"""Rows as scalars, in the real TensorBoard and the real Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from run_factory import make_header, make_rows
from zoo import mlp

import gradprobe
from gradprobe.errors import MissingExtraError
from gradprobe.rows import Row
from gradprobe.sinks.scalars import scalars
from gradprobe.sinks.tensorboard import TensorBoardSink
from gradprobe.sinks.wandb import WandbSink


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def test_a_row_as_scalars():
    header = make_header(2)
    gram = np.array([[[9.0, -3.0], [-3.0, 4.0]], [[16.0, 3.0], [3.0, 12.0]]])
    row = Row(7, 0, 0.5, np.array([0.25, 2.0]), np.array([1.0, 0.5]), gram)
    assert scalars(header, row) == {
        "loss/det": 0.25,
        "loss/cls": 2.0,
        "weight/det": 1.0,
        "weight/cls": 0.5,
        "shared_grad_norm/det": 5.0,
        "shared_grad_norm/cls": 4.0,
        "shared_cosine/det|cls": 0.0,
    }


def test_what_was_not_measured_is_left_out_and_a_loss_that_is_nan_is_not():
    gram = np.array([[[9.0, np.nan], [np.nan, np.nan]]])
    row = Row(7, 0, 0.5, np.array([0.25, np.nan]), np.array([1.0, 0.5]), gram)
    found = scalars(make_header(1), row)
    assert set(found) == {"loss/det", "loss/cls", "weight/det", "weight/cls", "shared_grad_norm/det"}
    assert math.isnan(found["loss/cls"])


def record(*sinks, out=None, steps=3):
    """A real recording into sinks, and the scalars that they have to hold."""
    case = mlp(torch.float32)
    kept = Kept()
    with gradprobe.attach(case.model, ("t0", "t1"), out, every=2, sinks=[*sinks, kept]) as probe:
        for step in range(steps):
            probe.backward(case.losses(step))
        probe.log_metrics(0, **{"val/accuracy": 0.75})
        assert probe.flush()
    return kept.scalars


def record_features(sink, out):
    case = mlp(torch.float32)
    with gradprobe.attach(case.model, ("t0", "t1"), out, every=2, level="both", sinks=[sink]) as probe:
        for step in range(3):
            probe.backward(case.losses(step))


class Kept:
    """Notes what scalars every row has."""

    def __init__(self):
        self.scalars = {}

    def start(self, header):
        self.header = header

    def write(self, row):
        self.scalars[row.step] = scalars(self.header, row)

    def write_epoch(self, epoch, values):
        pass

    def annotate(self, values):
        pass

    def flush(self):
        return True

    def close(self, end):
        pass


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own, under a newer numpy
class TestTensorBoard:
    def test_it_shows_the_rows_that_the_file_holds(self, tmp_path):
        expected = record(TensorBoardSink(tmp_path / "tb"), out=tmp_path / "run.h5")
        found = events(tmp_path / "tb")
        assert found.pop("gradprobe/epoch/val/accuracy") == [(0, 0.75)]
        assert set(found) == {f"gradprobe/{name}" for name in expected[0]}
        for name in expected[0]:
            assert [step for step, _ in found[f"gradprobe/{name}"]] == [0, 2]
            values = [value for _, value in found[f"gradprobe/{name}"]]
            np.testing.assert_allclose(values, [expected[0][name], expected[2][name]], rtol=1e-6)
        with gradprobe.open_run(tmp_path / "run.h5") as run:
            cosines = [value for _, value in found["gradprobe/shared_cosine/t0|t1"]]
            np.testing.assert_allclose(cosines, run["shared_cosine"][:, 0], rtol=1e-6)

    def test_it_shows_features_at_their_steps(self, tmp_path):
        record_features(TensorBoardSink(tmp_path / "tb"), out=tmp_path / "run.h5")
        found = events(tmp_path / "tb")
        with gradprobe.open_run(tmp_path / "run.h5") as run:
            (feature,) = run.feature_names
            for tag, values in (
                (f"gradprobe/feature_cosine/{feature}/t0|t1", run["features/cosine"][:, 0, 0]),
                (f"gradprobe/feature_grad_norm/{feature}/t1", run["features/grad_norm"][:, 0, 1]),
            ):
                assert [step for step, _ in found[tag]] == [0, 1, 2]
                np.testing.assert_allclose([value for _, value in found[tag]], values, rtol=1e-6)

    def test_a_writer_of_the_users_stays_open(self, tmp_path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(tmp_path)) as writer:
            record(TensorBoardSink(writer))
            writer.add_scalar("own", 1.0, 9)
        assert events(tmp_path)["own"] == [(9, 1.0)]


WANDB = """
import json, sys
from test_sinks import record
from gradprobe.sinks.wandb import WandbSink
import wandb

own = wandb.init(mode="offline", dir=sys.argv[1], project="p")
own.log({"own": 1})
kept = record(WandbSink(own))
own.log({"own": 2})
own.finish()
begun = record(WandbSink(mode="offline", dir=sys.argv[1], project="q"))
assert wandb.run is None, "a run that the sink began is finished by it"
print("KEPT", json.dumps([kept, begun]))
"""


@needs("wandb")
def test_wandb_gets_the_rows_beside_what_the_user_logs(tmp_path):
    """Offline, in a process of its own: wandb starts a service and looks into the home folder."""
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=_quiet_environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kept, begun = json.loads(done.stdout.partition("KEPT")[2])
    logs = [history(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(logs) == 2
    of_user = next(log for log in logs if any("own" in entry for entry in log))
    of_sink = next(log for log in logs if log is not of_user)
    assert [entry["own"] for entry in of_user if "own" in entry] == [1, 2]
    for log, expected in ((of_user, kept), (of_sink, begun)):
        rows = {entry["gradprobe/step"]: entry for entry in log if "gradprobe/step" in entry}
        assert sorted(rows) == [0, 2]
        for step, values in expected.items():
            got = {k.removeprefix("gradprobe/"): v for k, v in rows[int(step)].items() if not k.startswith("_")}
            assert got.pop("step") == int(step)
            assert got == pytest.approx(values)
        (metrics,) = [entry for entry in log if "gradprobe/epoch" in entry]
        assert metrics["gradprobe/epoch/val/accuracy"] == 0.75


def _quiet_environment(folder):
    root = str(Path(__file__).parents[1])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)]),
        "HOME": str(folder),
        "WANDB_SILENT": "true",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_X_DISABLE_STATS": "true",
        "WANDB_ERROR_REPORTING": "false",
    }


def history(path):
    """The rows in a file that wandb keeps offline."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    return rows


def log_records(data, block=32768):
    """Records of a log in LevelDB's format: (checksum 4, length 2, kind 1, piece) in blocks, behind 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a head: filled up
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (lambda: TensorBoardSink("nowhere"), "torch.utils.tensorboard", "tensorboard"),
        (lambda: WandbSink(project="p"), "wandb", "wandb"),
    ],
    ids=["tensorboard", "wandb"],
)
def test_without_the_package_the_pip_line_is_said(monkeypatch, make, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'gradprobe\[{extra}\]'"):
        make()


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("interrupted", 1), ("failed: ValueError", 1)])
def test_wandb_is_told_how_the_run_ended(monkeypatch, end, code):
    ended = []
    run = types.SimpleNamespace(
        define_metric=lambda *_, **__: None, log=lambda _: None, finish=lambda exit_code: ended.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    sink = WandbSink()
    header = make_header(2)
    sink.start(header)
    sink.write(next(make_rows(header, 1)))
    sink.close(end)
    assert ended == [code]


def test_weights_and_biases_gets_features_over_the_same_axis(tmp_path):
    logged, axes = [], {}
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric=None, **_: axes.setdefault(name, step_metric), log=logged.append
    )
    record_features(WandbSink(run), out=tmp_path / "run.h5")
    with gradprobe.open_run(tmp_path / "run.h5") as recorded:
        name = f"gradprobe/feature_cosine/{recorded.feature_names[0]}/t0|t1"
        cosines = recorded["features/cosine"][:, 0, 0]
    found = [(entry["gradprobe/step"], entry[name]) for entry in logged if name in entry]
    assert [step for step, _ in found] == [0, 1, 2]
    np.testing.assert_allclose([value for _, value in found], cosines, rtol=1e-6)
    assert axes["gradprobe/feature_cosine/*"] == "gradprobe/step"
