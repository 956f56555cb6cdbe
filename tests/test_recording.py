"""What all callbacks share, and what the probe tells them."""

from __future__ import annotations

import pytest
import torch
from zoo import Collector, mlp

import gradprobe
from gradprobe.errors import UsageError
from gradprobe.integrations.trainer_recording import Recording, batch_size_of
from gradprobe.probes import GradientProbe


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3},
        {"budget": 0.3},
        {"level": "features", "every": 2},
        {"level": "both", "every": 3},
        {"every": 2, "accumulate": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("use", ["backward", "record"])
def test_a_probe_that_is_due_measures_and_another_does_not(options, use):
    case, sink = mlp(torch.float32), Collector()
    said, done = [], []
    with GradientProbe(case.model, ("t0", "t1"), [sink], **options) as probe:
        for step in range(12):
            before = len(sink.rows) + len(sink.feature_rows)
            said.append(probe.is_due)
            assert probe.is_due is said[-1], "asking changes nothing"
            getattr(probe, use)(case.losses(step))
            done.append(len(sink.rows) + len(sink.feature_rows) > before)
    calls = options.get("accumulate", 1)  # a row of several calls is handed on with the last of them
    assert said[calls - 1 :: calls] == done[calls - 1 :: calls]
    assert not any(now for call, now in enumerate(done) if (call + 1) % calls)
    assert any(done)
    assert options.get("level") == "both" or not all(done)


def test_provenance_of_the_users_is_stored_beside_ours(tmp_path):
    case = mlp(torch.float32)
    given = {"trainer": "mine", "note": {"seed": 7}}
    with gradprobe.attach(case.model, ("t0", "t1"), tmp_path / "run.h5", provenance=given) as probe:
        probe.backward(case.losses(0))
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.provenance["trainer"] == "mine"
        assert run.provenance["note.seed"] == 7
        assert "versions.torch" in run.provenance


def test_a_scaler_that_is_switched_off_counts_as_none(tmp_path):
    case, sink = mlp(torch.float32), Collector()
    recording = Recording("test", None, sinks=[sink])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    recording.open(case.model, ("t0", "t1"), None, scaler=scaler)
    recording.record(case.losses(0))
    recording.close()
    assert sink.rows[0].status == "measured"


def test_metrics_that_are_no_numbers_are_left_out():
    case, sink = mlp(torch.float32), Collector()
    recording = Recording("test", None, sinks=[sink])
    recording.open(case.model, ("t0", "t1"), None)
    recording.start_epoch(4)
    recording.log_metrics(
        {"a": torch.tensor(1.5), "b": "x", "c": None, "d": torch.ones(2), "epoch": 4.0, "e": True, "f": 2}
    )
    recording.log_metrics({"b": "x"})
    recording.close()
    assert sink.epochs == {4: {"a": 1.5, "f": 2.0}}


def test_there_is_a_probe_from_start_to_end_alone():
    case = mlp(torch.float32)
    recording = Recording("test", None)
    with pytest.raises(UsageError, match="no probe now"):
        _ = recording.probe
    recording.open(case.model, ("t0", "t1"), None)
    assert recording.probe.tasks == ("t0", "t1")
    recording.close()
    assert not recording.is_open
    recording.close()


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ({"name": "x", "image": torch.zeros(3, 1)}, 3),
        ([None, (torch.tensor(1.0), torch.zeros(7))], 7),
        ("text", 0),
        (None, 0),
    ],
)
def test_the_size_of_a_batch(batch, size):
    assert batch_size_of(batch) == size
