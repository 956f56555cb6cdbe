"""One value that cannot be stored costs that value, and every file that is written can be read again."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import errno
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import growing
import numpy as np
import pytest
import torch
from writing import FailingDisk

from gradprobe import attach
from gradprobe.errors import ProbeError, RunFileError
from gradprobe.rows import FeatureHeader, FeatureRow, Header, TestClusters, limits
from gradprobe.runfile import RunWriter, open_run
from gradprobe.runfile.integrity import check_run
from gradprobe.whole_files import Disk

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))


class Rude:
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


class NoNumber:
    """Fails otherwise than a number should."""

    def __float__(self):
        raise ZeroDivisionError

    def __index__(self):
        raise AttributeError


class Asks:
    """Has every attribute, and fails at it."""

    def __getattr__(self, name):
        raise KeyError(name)


class Unfilled(Mapping):
    """A configuration of which one value, or the names too, have to be filled in."""

    def __init__(self, names=("a", "b")):
        self.names = names

    def __iter__(self):
        if self.names is None:
            raise RuntimeError("nothing is filled in")
        return iter(self.names)

    def __len__(self):
        return 2

    def __getitem__(self, key):
        if key != "a":
            raise RuntimeError(f"{key} has to be filled in")
        return 1

    def __repr__(self):
        return "Unfilled"


LONG = "x" * (2 << 20)
BAD = [
    ("batch_size", 2**31, 0),
    ("batch_size", -(2**40), 0),
    ("batch_size", -1, 0),
    ("batch_size", None, 0),
    ("batch_size", float("nan"), 0),
    ("batch_size", "many", 0),
    ("batch_size", torch.ones(2), 0),
    ("epoch", 2**31, -1),
    ("epoch", -5, -1),
    ("epoch", None, -1),
    ("epoch", 1.5, -1),
    ("micro_batches", 2**31, 1),
    ("time", "now", np.nan),
    ("time", Rude(), np.nan),
    ("lr", "fast", np.nan),
    ("lr", object(), np.nan),
    ("lr", NoNumber(), np.nan),
    ("lr", np.complex64(1 + 2j), np.nan),
    ("epoch", NoNumber(), -1),
    ("overhead", -1.0, np.nan),
    ("overhead", np.inf, np.nan),
    ("loss", np.ones(5), np.nan),
    ("loss", "low", np.nan),
    ("loss", [1.0, "x"], np.nan),
    ("weight", np.ones((2, 2)), np.nan),
    ("grad_norm", ("gram", np.ones((3, 4, 4))), np.nan),
    ("grad_norm", ("gram", np.full((3, 2, 2), 1e300)), np.nan),
    ("grad_norm", ("gram", np.ones((3, 2, 2)) * 1j), np.nan),
    ("gram_noise", np.ones((3, 7)), np.nan),
]


@pytest.mark.parametrize(("name", "value", "missing"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_a_value_that_cannot_be_stored_costs_that_value(tmp_path, caplog, name, value, missing):
    path, good = tmp_path / "run.h5", [growing.row(step, 3) for step in range(7)]
    attribute, value = value if isinstance(value, tuple) else (name, value)
    writer = RunWriter(path, flush_seconds=0.01)
    writer.start(growing.header(3))
    with caplog.at_level(logging.WARNING):
        for step, row in enumerate(good):
            writer.write(dataclasses.replace(row, **{attribute: value}) if step == 3 else row)
        assert writer.flush()
        writer.close()
    told = [record.getMessage() for record in caplog.records]
    assert sum(f": {name}: a value that cannot be stored" in text for text in told) == 1
    assert all("at step 3" in text for text in told)
    with open_run(path) as run:
        assert run["step"].tolist() == list(range(7))
        found, others = run[name][3], [0, 1, 2, 4, 5, 6]
        assert np.isnan(found).all() if np.isnan(missing) else (found == missing).all()
        for field in ("loss", "batch_size", "epoch", "lr", "time"):
            expected = np.array([getattr(row, field) for row in good])
            np.testing.assert_allclose(run[field][others], expected[others], rtol=1e-6)
            if field != name:
                np.testing.assert_allclose(run[field][3], expected[3], rtol=1e-6)
        assert run.status_names == ("measured",)
        assert run.provenance[f"unstored.{name}"].startswith("1 rows, first: ")
    report = check_run(path)
    assert report.whole
    assert any(f"{name}: could not be stored in 1 rows" in finding.what for finding in report.findings)


def test_values_that_cannot_be_stored_are_counted_over_sessions_and_refused_writes(tmp_path, caplog):
    path, disk = tmp_path / "run.h5", FailingDisk()
    writer = RunWriter(path, disk=disk, flush_seconds=1000)
    writer.start(growing.header(3))
    for step in range(5):
        writer.write(growing.row(step, 3) if step % 2 else dataclasses.replace(growing.row(step, 3), batch_size=2**31))
    disk.full = True
    assert not writer.flush()
    assert not writer.flush()
    disk.full = False
    writer.close()
    assert sum("cannot be stored" in record.getMessage() for record in caplog.records) == 1
    writer = RunWriter(path, resume=True)
    writer.rewind(5, -1)
    writer.start(growing.header(3))
    writer.write(dataclasses.replace(growing.row(5, 3), batch_size=-3))
    writer.close()
    with open_run(path) as run:
        assert run.provenance["unstored.batch_size"] == "4 rows, first: 2147483648 at step 0"
        assert run["batch_size"].tolist() == [0, 8, 0, 8, 0, 0]


@pytest.mark.parametrize(
    ("status", "stored"),
    [
        (None, "unknown: None"),
        (7, "unknown: 7"),
        ("a\0b", "a\ufffdb"),
        ("half \ud800", "half \ufffd"),
        (LONG, "xxx"),
        ("", ""),
    ],
)
def test_a_status_is_stored_as_it_can_be(tmp_path, status, stored):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(growing.header(3))
    for step in range(3):
        writer.write(dataclasses.replace(growing.row(step, 3), status=status) if step == 1 else growing.row(step, 3))
    writer.close(f"failed: {status}")
    with open_run(path) as run:
        names = [run.status_names[code] for code in run["status"]]
        assert names[0] == names[2] == "measured"
        assert names[1].startswith(stored)
        assert len(names[1].encode()) <= limits.MAX_STATUS
        assert run.end.startswith("failed: ")
    assert check_run(path).whole


def test_one_odd_row_among_many_leaves_the_sums_of_the_others_as_they_are(tmp_path):
    """Who counts at a row follows from the rows before: row by row or together, the same."""
    found = []
    for odd in (False, True):
        path = tmp_path / f"{odd}.h5"
        writer = RunWriter(path, flush_seconds=1000)
        writer.start(growing.header(5))
        for step in range(8):
            row = dataclasses.replace(growing.row(step, 3 if step < 4 else 5), reach=None)
            bad = {"lr": object(), "loss": "x"} if odd and step == 6 else {}
            writer.write(dataclasses.replace(row, **bad))
        writer.close()
        with open_run(path) as run:
            found.append({name: run[name] for name in ("shared_grad_norm", "shared_cosine", "grad_norm", "reach")})
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name])


@pytest.mark.parametrize("step", [2**63, -1, None, "x", 1.5, NoNumber()])
def test_a_row_without_a_step_is_dropped_and_counted(tmp_path, caplog, step):
    with open_writer(tmp_path) as writer:
        writer.write(dataclasses.replace(growing.row(1, 3), step=step))
        writer.write(dataclasses.replace(growing.row(2, 3), step=step))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "its step is" in told  # and nothing of a disk that is too slow
    with open_run(tmp_path / "run.h5") as run:
        assert run.rows_dropped == 2
    assert any("they had no step" in finding.what for finding in check_run(tmp_path / "run.h5").findings)


def test_a_failure_of_our_own_is_not_blamed_on_the_disk(tmp_path, caplog, monkeypatch):
    with open_writer(tmp_path) as writer, monkeypatch.context() as broken:
        broken.setattr("gradprobe.runfile.content.columns", lambda *_: 1 / 0)
        assert not writer.flush()
    (told,) = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert "ZeroDivisionError" in told
    assert "the disk is not to blame" in told


def test_clusters_of_another_shape_are_refused_at_the_call(tmp_path):
    with open_writer(tmp_path) as writer, pytest.raises(RunFileError, match="2 clusters and 1 metrics"):
        writer.write_test(TestClusters(["a", "b"], np.ones(3, int), ["m"], np.ones((2, 1))))


@pytest.mark.parametrize(
    ("size", "values"),
    [(["x"], [[1.0]]), ([0], [[1.0]]), ([1.5], [[1.0]]), ([1], [["x"]]), ([1], [[1j]]), ([1], [[NoNumber()]])],
)
def test_numbers_of_clusters_that_are_none_are_refused_at_the_call(tmp_path, size, values):
    with open_writer(tmp_path) as writer:
        with pytest.raises(RunFileError, match="a cluster without images, or sizes or values that are no numbers"):
            writer.write_test(TestClusters(["a"], np.array(size), ["m"], np.array(values)))
        writer.write_test(TestClusters(["a"], np.array([1]), ["m"], np.array([[np.inf]])))
    with open_run(tmp_path / "run.h5") as run:
        assert np.isnan(run.test_clusters["without"]).all()


def test_more_clusters_than_a_file_holds_are_refused_at_the_call(tmp_path):
    many = limits.MAX_NAMES + 1
    test = TestClusters([f"c{i}" for i in range(many)], np.ones(many, int), ["m"], np.ones((many, 1)))
    with open_writer(tmp_path) as writer, pytest.raises(RunFileError, match="100,001 clusters"):
        writer.write_test(test)


# ---- metrics


def test_metrics_lose_a_value_and_not_an_epoch(tmp_path, caplog):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(growing.header(3))
    writer.write(growing.row(0, 3))
    odd = {"half \ud800": 1.0, "nul\0": 2.0, "a/b": 3.0, 5: 4.0, "long" * 1000: 5.0, "\x1b[2J": 6.0}
    writer.write_epoch(0, {"mAP": 0.5, "none": None, "text": "x", "huge": 10**400, "odd": NoNumber(), **odd})
    writer.write_epoch(1, {"mAP": torch.tensor(0.75)})
    writer.close()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "epoch 0: no number, stored as NaN: none, text, huge, odd" in told
    with open_run(path) as run:
        assert run.epochs["mAP"].tolist() == [0.5, 0.75]
        assert np.isnan(run.epochs["none"]).all()
        by_value = {float(values[0]): name for name, values in run.epochs.items()}
        assert [by_value[float(n)] for n in (1, 2, 3, 4)] == ["half \ufffd", "nul\ufffd", "a.b", "5"]
        assert by_value[5.0].startswith("longlong")
    assert check_run(path).whole


def test_metrics_whose_names_become_one_are_both_kept(tmp_path):
    with open_writer(tmp_path) as writer:
        for epoch in range(2):
            writer.write_epoch(epoch, {"a/b": epoch, "a.b": 10 + epoch, "a\0": 20 + epoch, "a\x01": 30 + epoch})
    with open_run(tmp_path / "run.h5") as run:
        found = {name: values.tolist() for name, values in run.epochs.items() if name != "epoch"}
        assert found == {"a.b": [0, 1], "a.b (2)": [10, 11], "a\ufffd": [20, 21], "a\ufffd (2)": [30, 31]}


@pytest.mark.parametrize("epoch", [2**31, -1, "x", None, 1.5])
def test_an_epoch_that_no_file_holds_is_refused_at_the_call(tmp_path, epoch):
    with open_writer(tmp_path) as writer, pytest.raises(RunFileError, match="epoch"):
        writer.write_epoch(epoch, {"mAP": 0.5})


@contextlib.contextmanager
def open_writer(folder, **more):
    writer = RunWriter(folder / "run.h5")
    writer.start(growing.header(3, **more))
    writer.write(growing.row(0, 3))
    yield writer
    writer.close()
    with open_run(folder / "run.h5") as run:
        assert len(run) == 1
    assert check_run(folder / "run.h5").whole


# ---- what the reader refuses, the writer does not write


@pytest.mark.parametrize("most", [50, pytest.param(limits.MAX_METRICS, marks=pytest.mark.slow)])
def test_too_many_metrics_are_refused_at_the_call(most, tmp_path, monkeypatch):
    monkeypatch.setattr("gradprobe.runfile.writer.MAX_METRICS", most)
    with open_writer(tmp_path) as writer:
        with pytest.raises(RunFileError, match=f"20,000 metrics per epoch; a run file holds {most:,}"):
            writer.write_epoch(0, {f"m{i}": 1.0 for i in range(20_000)})
        writer.write_epoch(0, {f"m{i}": 1.0 for i in range(most)})


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int = 3


CYCLE: dict = {}
CYCLE["again"] = CYCLE

VALUES = {
    "path": (Path("a") / "b", str(Path("a") / "b")),
    "date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "enum": (Colour.RED, "Colour.RED"),
    "dataclass": (Config(), "Config(width=3)"),
    "dtype": (torch.float16, "torch.float16"),
    "device": (torch.device("cpu"), "cpu"),
    "tensor": (torch.arange(3), [0, 1, 2]),
    "scalar": (torch.tensor(2.5), 2.5),
    "parameter": (torch.nn.Parameter(torch.ones(2)), [1.0, 1.0]),
    "numpy": (np.float32(0.5), 0.5),
    "numpy int": (np.int64(3), 3),
    "numpy text": (np.str_("a"), "a"),
    "matrix": (np.eye(2), ["[1.0, 0.0]", "[0.0, 1.0]"]),
    "objects": (np.array([None, "a"], dtype=object), ["None", "a"]),
    "set": ({"b", "a"}, ["a", "b"]),
    "bytes": (b"a\xff", "a\ufffd"),
    "complex": (1 + 2j, "(1+2j)"),
    "huge": (2**70, str(2**70)),
    "long list": (list(range(200_000)), None),
    "list of huge": ([1, 2**70], ["1", str(2**70)]),
    "mixed": ([1, "a", None], ["1", "a", "None"]),
    "nested": ([[1, 2], [3]], ["[1, 2]", "[3]"]),
    "paths": ((Path("a"), Path("b")), ["a", "b"]),
    "nul": ("a\0b", "a\ufffdb"),
    "half": ("\ud800", "\ufffd"),
    "long": (LONG, None),
    "texts": ([LONG, "a"], None),
    "many texts": (["y" * 1000] * 5000, None),
    "rude": (Rude(), "Rude without text (ValueError)"),
    "rudes": ([Rude()], ["Rude without text (ValueError)"]),
    "function": (len, "<built-in function len>"),
    "none": (None, ""),
    "empty": ([], []),
    "nan": (float("nan"), None),
    "bool": (True, 1),
    "bools": ([True, False], [1, 0]),
    "cycle": (CYCLE, None),
    "asks": (Asks(), None),
    "no number": (NoNumber(), None),
    "unfilled": ({"in": Unfilled(None), "after": 1}, None),
    "big tensor": (torch.zeros(10**6), "Tensor torch.Size([1000000])"),
}


def test_every_value_of_a_provenance_is_stored(tmp_path):
    with open_writer(tmp_path, provenance={name: value for name, (value, _) in VALUES.items()}) as writer:
        writer.annotate({"late": Path("c"), "sub": {1: Path("d"), (2, 3): "e", "": "f", "n\0": "g"}})
    with open_run(tmp_path / "run.h5") as run:
        for name, (_, expected) in VALUES.items():
            if expected is not None:
                assert run.provenance[name] == expected, name
        assert run.provenance["late"] == "c"
        assert run.provenance["sub.1"] == "d"
        assert run.provenance["sub.(2, 3)"] == "e"
        assert run.provenance["long"].endswith("(cut: it had 2,097,152 bytes)")
        assert any(name.startswith("cycle.again") for name in run.provenance)


@pytest.mark.parametrize("name", VALUES)
def test_each_value_of_a_provenance_alone(tmp_path, name):
    with open_writer(tmp_path, provenance={"value": VALUES[name][0]}):
        pass


def test_a_probe_takes_any_provenance(tmp_path):
    """No warning (they are errors here), and a whole file."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    provenance = {"data": Path("images"), "args": Config(), "device": torch.device("cpu")}
    with attach(model, ["a", "b"], tmp_path / "run.h5", every=1, optimizer=optimizer, provenance=provenance) as probe:
        for _ in range(3):
            a, b = model(torch.ones(1, 3))[0]
            probe.backward({"a": a, "b": b})
            optimizer.step()
    with open_run(tmp_path / "run.h5") as run:
        assert run.provenance["data"] == "images"
        assert len(run) == 3


def test_more_entries_than_a_file_holds_are_counted(tmp_path):
    with open_writer(tmp_path, provenance={f"p{i}": i for i in range(20_000)}):
        pass
    with open_run(tmp_path / "run.h5") as run:
        assert run.provenance["p0"] == 0
        assert run.provenance["entries_left_out"] >= 10_000


@pytest.mark.slow
def test_what_a_run_says_of_itself_has_room_among_any_number_of_entries(tmp_path):
    """Its sessions, on which a resume rests, and what of it could not be stored."""
    with open_writer(tmp_path, provenance={f"p{i}": i for i in range(20_000)}):
        pass
    with open_run(tmp_path / "run.h5") as run:
        assert [session["first_step"] for session in run.sessions] == [0]
    writer = RunWriter(tmp_path / "run.h5", resume=True)
    writer.rewind(1, -1)
    writer.start(growing.header(3, provenance={f"p{i}": -i for i in range(20_000)}))
    writer.write(dataclasses.replace(growing.row(1, 3), batch_size=-1))
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert [session["first_step"] for session in run.sessions] == [0, 1]
        assert "unstored.batch_size" in run.provenance
    assert check_run(tmp_path / "run.h5").whole


@pytest.mark.slow
def test_a_mapping_that_holds_itself_or_gives_not_all_is_stored_as_far_as_it_goes(tmp_path):
    knot: dict = {"k": 1}
    knot |= {"left": knot, "right": knot}
    many: dict = {"leaf": 1}
    for _ in range(40):
        many = {"left": many, "right": many}
    with open_writer(tmp_path, provenance={"knot": knot, "part": Unfilled(), "none": {"in": Unfilled(None)}}) as writer:
        writer.annotate({"many": many})
    with open_run(tmp_path / "run.h5") as run:
        assert {name: run.provenance[name] for name in ("knot.k", "knot.left", "knot.right")} == {
            "knot.k": 1,
            "knot.left": "{...}",
            "knot.right": "{...}",
        }
        assert run.provenance["part.a"] == 1
        assert run.provenance["part.b"] == "(cannot be read: RuntimeError)"
        assert run.provenance["none.in"] == "Unfilled"
        assert run.provenance["entries_left_out"] > 10_000


def test_a_run_that_is_resumed_often_with_long_texts_can_be_read(tmp_path):
    path = tmp_path / "run.h5"
    with open_writer(tmp_path, provenance={"note": "a" * 500_000}):
        pass
    for session in range(4):
        writer = RunWriter(path, resume=True)
        writer.rewind(1, -1)
        writer.start(growing.header(3, provenance={"note": "b" * 500_000 + str(session)}))
        writer.close()
        with open_run(path) as run:
            assert len(run.sessions) == session + 2
            assert run.provenance["note"].endswith(str(session))


@pytest.mark.parametrize(
    "layers",
    [
        ("a\x1b[2J", "a\x1b[3J", "b"),
        ("", "x", "y"),
        ("l" * 70_000, "l" * 70_001, "b"),
        ("a\0", "a\ufffd", "b"),
        ("half \ud800", "x", "y"),
        (1, 2, 3),
    ],
)
def test_names_of_layers_are_stored_as_they_can_be_read(tmp_path, layers):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(Header(growing.TASKS, layers, growing.SIZE[:3], np.ones((3, 2), bool)))
    writer.write(growing.row(0, 3))
    writer.grow(Header(growing.TASKS, (*layers, "late"), growing.SIZE[:4], np.ones((4, 2), bool)))
    writer.write(growing.row(1, 4))
    writer.close()
    with open_run(path) as run:
        assert len(run.layers) == 4
        assert run.layers[-1] == "late"
    assert check_run(path).whole


def test_names_of_features_and_clusters_are_stored_as_they_can_be_read(tmp_path):
    features = FeatureHeader(growing.TASKS, ("p\x1b", "q" * 70_000), np.array([1, 2]))
    with open_writer(tmp_path) as writer:
        writer.grow(growing.header(3, features=features))
        writer.write(FeatureRow(0, 0, 0.0, growing.gram(0, 2)))
        test = TestClusters(["c\x1b", "c\ufffd", LONG], np.ones(3, int), ["m\0"], np.ones((3, 1)))
        writer.write_test(test)
    with open_run(tmp_path / "run.h5") as run:
        assert len(run.feature_names) == 2
        assert len(run.test_clusters["cluster"]) == 3


def test_more_layers_than_a_file_holds_are_refused(tmp_path):
    many = limits.MAX_NAMES + 1
    writer = RunWriter(tmp_path / "run.h5")
    with pytest.raises(RunFileError, match=r"100,001 names .*layers="):
        writer.start(
            Header(growing.TASKS, [f"l{i}" for i in range(many)], np.ones(many, int), np.ones((many, 2), bool))
        )


@pytest.mark.parametrize("tasks", [["t" * 65_000, "u" * 65_000], [f"t{i}" * 200 for i in range(200)]], ids=len)
def test_pairs_of_long_task_names_can_be_read(tmp_path, tasks):
    writer = RunWriter(tmp_path / "run.h5")
    writer.start(Header(tasks, ("l",), np.ones(1, int), np.ones((1, len(tasks)), bool)))
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert len(run.pairs) == len(tasks) * (len(tasks) - 1) // 2
        assert all(name.startswith(task[:50]) for name, task in zip(run.tasks, tasks, strict=True))


@pytest.mark.parametrize(
    ("tasks", "why"),
    [([f"t{i}" for i in range(460)], "460 tasks have 105,570 pairs"), (["a", "b|c", "a|b", "c"], "have one name")],
    ids=["many", "alike"],
)
def test_tasks_whose_pairs_no_file_holds_are_refused(tmp_path, tasks, why):
    writer = RunWriter(tmp_path / "run.h5")
    with pytest.raises(RunFileError, match=why):
        writer.start(Header(tasks, ("l",), np.ones(1, int), np.ones((1, len(tasks)), bool)))


@pytest.mark.parametrize("task", ["t" * 70_000, "", "a\x1b", "\ud800", 5])
def test_a_task_that_no_file_holds_is_refused_when_the_probe_is_attached(tmp_path, task):
    with pytest.raises(ProbeError, match="tasks"):
        attach(torch.nn.Linear(2, 2), ["a", task], tmp_path / "run.h5")
    assert not (tmp_path / "run.h5").exists()


def test_many_statuses_and_a_long_end_can_be_read(tmp_path):
    path = tmp_path / "run.h5"
    writer = RunWriter(path)
    writer.start(growing.header(3))
    for step in range(300):
        writer.write(dataclasses.replace(growing.row(step, 3), status=f"{step} {LONG[:3000]}"))
    writer.close("failed: " + LONG)
    with open_run(path) as run:
        assert len(run) == 300
        assert len(run.status_names) == limits.MAX_STATUSES + 1
        assert run.end.startswith("failed: xxx")
    assert check_run(path).whole


# ---- dropped rows


def test_rows_that_are_dropped_are_told(tmp_path, caplog, monkeypatch):
    disk, path = FailingDisk(), tmp_path / "run.h5"
    monkeypatch.setattr(RunWriter, "keep_bytes", 12_000)
    writer = RunWriter(path, disk=disk, flush_seconds=1000)
    writer.start(growing.header(3))
    disk.full = True
    for step in range(40):
        writer.write(growing.row(step, 3))
    disk.full = False
    writer.close()
    told = [record.getMessage() for record in caplog.records]
    assert sum("rows were dropped so far" in text for text in told) == 1
    with open_run(path) as run:
        assert len(run) + run.rows_dropped == 40
        assert run.rows_dropped > 20
    report = check_run(path)
    assert report.whole
    assert any("rows were dropped" in finding.what for finding in report.findings)


class SmallDisk(Disk):
    """Takes no file of more than so many bytes, as a limit on the size of files does."""

    most = 40_000

    def write(self, descriptor, data, offset):
        if offset + len(data) > self.most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return super().write(descriptor, data, offset)


def test_rows_that_fit_no_file_together_go_into_several(tmp_path):
    """Whatever came together: 300 rows at the end of a recording, of which a file takes 100."""
    path = tmp_path / "run.h5"
    writer = RunWriter(path, disk=SmallDisk(), flush_seconds=1000, flush_rows=10**6)
    writer.start(growing.header(3))
    for step in range(300):
        writer.write(growing.row(step, 3))
    writer.close()
    with open_run(path) as run:
        assert run["step"].tolist() == list(range(300))
        assert run.end == "finished"
    assert check_run(path).whole


def test_large_rows_are_written_before_the_memory_for_them_is_full(tmp_path, monkeypatch):
    """1,000 layers of 20 tasks: 80 rows fill the memory long before five seconds or 256 rows."""
    monkeypatch.setattr(RunWriter, "keep_bytes", 64 << 20)
    layers, tasks = 1000, tuple(f"t{i}" for i in range(20))
    header = Header(tasks, tuple(f"l{i}" for i in range(layers)), np.ones(layers, int), np.ones((layers, 20), bool))
    row = dataclasses.replace(
        growing.row(0, 3),
        loss=np.ones(20),
        weight=np.ones(20),
        gram=np.ones((layers, 20, 20)),
        gram_noise=None,
        reach=None,
    )
    writer = RunWriter(tmp_path / "run.h5", flush_seconds=1000, flush_rows=10**6)
    writer.start(header)
    seen = 0
    for step in range(60):
        writer.write(dataclasses.replace(row, step=step))
        while len(writer._flusher.backlog) > 15:  # a training that waits for nothing would drop; this one sees it drain
            seen += 1
            time.sleep(0.01)
            assert seen < 6000
    writer.close()
    with open_run(tmp_path / "run.h5") as run:
        assert len(run) == 60
        assert run.rows_dropped == 0
