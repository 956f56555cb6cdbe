"""The loss ledger of the bundled trainers: it changes no training, and what it leaves unexplained is little."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import training
from test_micro_trainers import available, options

from gradprobe.errors import UsageError
from gradprobe.ledger.windows import window
from gradprobe.rows import LEDGER, MEASURED
from gradprobe.trainers.settings import TASKS, resolve
from gradprobe.updates import loss_ledger as module

SMALL = {"optimizer": "SGD", "lr": 0.01, "ledger": True, "ledger_images": 16}


class Kept:
    """A sink that keeps rows of a ledger."""

    tables = ("ledger",)

    def __init__(self):
        self.ledger = []

    def start(self, header):
        self.header = header

    def write(self, row):
        if row.table is LEDGER:
            self.ledger.append(row)

    def __getattr__(self, name):
        return lambda *_: None


def recorded(trainer, *, steps, **given):
    sink = Kept()
    made = training.run(training.make(trainer, sinks=[sink], **{**SMALL, **options(trainer), **given}), steps)
    return made, sink.ledger


def columns(rows):
    names = ("step", "burst", "term", "head", "loss_change", "drift")
    table = {name: np.array([getattr(row, name) for row in rows]) for name in names}
    return {**table, "status": np.array([int(row.status != MEASURED) for row in rows])}


@pytest.mark.parametrize("trainer", training.every_trainer())
def test_every_trainer_can_keep_one(trainer):
    if not available(trainer):
        pytest.skip("torchjd is not installed")
    made, rows = recorded(trainer, steps=2)
    assert [row.status for row in rows] == [MEASURED] * 2
    for row in rows:
        assert np.isfinite(row.head).all()
        assert np.isfinite(row.loss_change).all()
        assert np.isfinite(row.drift).all()
        if len(row.term):
            assert np.isfinite(row.left).all()
    assert (len(rows[0].term) == 0) == (trainer in ("dual", "detach"))
    if trainer == "single":
        assert not rows[1].term[:, :, 1].any()  # nothing comes from the absent task
    assert made is not None


@pytest.mark.parametrize("trainer", ["joint", "dual", "gradnorm"])
def test_the_training_is_the_one_without_a_ledger(trainer):
    plain = training.run(training.make(trainer, **options(trainer)), 3)
    seen = training.run(training.make(trainer, **options(trainer), ledger=True, ledger_images=16), 3)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, seen.model.state_dict()[name]), name


@pytest.mark.parametrize("trainer", ["joint", pytest.param("dual", marks=pytest.mark.slow)])
def test_terms_are_the_change_of_the_loss(trainer):
    """Of the classifier. A detector's loss weighs overlaps by a factor made under no_grad, which no term explains."""
    far, near = (window(columns(recorded(trainer, steps=12, lr=lr)[1]), TASKS) for lr in (3e-4, 3e-5))
    assert len(far.rows) == len(near.rows) == 12
    left = [np.abs(found.residual[1]) / found.size[1] for found in (far, near)]
    assert left[1] <= 0.05
    assert left[1] < 0.25 * left[0]  # what the mean of two ends leaves falls with the square of the rate
    assert near.drift[0] != 0  # objectness is trained towards the present boxes' overlaps
    assert near.drift[1] == 0


def test_the_batches_own_gradients_can_value_the_updates():
    _, rows = recorded("joint", steps=4, ledger_ends="batch", micro_batches=4)
    assert [row.status for row in rows] == [*[MEASURED] * 3, module._NO_RIGHT_END]
    assert np.isfinite(rows[0].correction).all()
    assert np.isnan(rows[-1].right).all()


def test_bursts():
    _, rows = recorded("joint", steps=7, ledger_burst=2, ledger_every=5)
    assert [(row.step, row.burst) for row in rows] == [(0, 0), (1, 0), (5, 1), (6, 1)]


def test_the_probe_batch_hangs_on_the_seed_alone():
    first, again, other = (recorded("joint", steps=1, seed=seed)[1][0].loss_change for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ledger_ends": "middle"}, "--ledger-ends"),
        ({"ledger_burst": 4}, "go together"),
        ({"ledger_burst": 9, "ledger_every": 4}, "longer than"),
        ({"ledger_images": 0}, "--ledger-images"),
        ({"ledger": True, "ledger_ends": "batch"}, "--micro-batches"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        resolve(given)
