"""Small runs for the tests of the writer: every row follows from its step, so that any row can be checked."""

from __future__ import annotations

import errno
import os

import numpy as np

from gradprobe import measures
from gradprobe.rows import Header, Row
from gradprobe.runfile import RunWriter, files

TASKS, LAYERS = ("det", "cls", "seg"), ("model.0.conv", "model.0.bn", "model.1.conv")


def header(**provenance):
    reach = np.ones((3, 3), bool)
    reach[0, 2] = False  # seg does not reach the first layer
    return Header(TASKS, LAYERS, np.array([100, 8, 300]), reach, provenance)


def row(step, rng=None):
    rng = rng or np.random.default_rng(step)
    g = rng.normal(size=(3, 3, 7))
    gram = g @ g.transpose(0, 2, 1)
    gram[0, 2, :] = gram[0, :, 2] = np.nan
    return Row(step, step // 10, step * 0.5, rng.random(3), rng.random(3), gram, 1e-3, 0.01, 16)


class FailingDisk(files.Disk):
    """Takes nothing while it is full."""

    full = False
    number = errno.ENOSPC

    def _check(self):
        if self.full:
            raise OSError(self.number, os.strerror(self.number))

    def create(self, path):
        self._check()
        return super().create(path)

    def write(self, descriptor, data, offset):
        self._check()
        return super().write(descriptor, data, offset)


def write(path, steps, *, rewind=None, **options):
    writer = RunWriter(path, resume=rewind is not None, **options)
    if rewind is not None:
        writer.rewind(*rewind)
    writer.start(header(trainer="joint", argv=["record", "--epochs"], hyp={"box": 0.05, "none": None}))
    for step in steps:
        writer.write(row(step))
    return writer


def assert_rows(run, steps):
    """Every dataset of a run holds what the rows of ``steps`` hold: nothing is missing, nothing is torn."""
    expected = [row(step) for step in steps]
    np.testing.assert_array_equal(run["step"], np.array(steps, dtype=np.int64))
    gram = np.array([r.gram for r in expected]).reshape(-1, len(LAYERS), len(TASKS), len(TASKS))
    np.testing.assert_allclose(run["grad_norm"], measures.norm(gram), rtol=1e-6)
    np.testing.assert_allclose(run["cosine"], measures.pair_cosine(gram), atol=1e-6)
    for name in ("loss", "weight", "epoch", "time", "lr", "batch_size"):
        values = np.array([getattr(r, name) for r in expected]).reshape(run[name].shape)
        np.testing.assert_allclose(run[name], values, rtol=1e-6)
