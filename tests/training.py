"""Bundled trainings so small that a test can afford one for every trainer."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
from zoo import Collector

from gradprobe.trainers import loop
from gradprobe.trainers.build import build
from gradprobe.trainers.data.loading import load_data
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import resolve

BATCHES = 4  # of one epoch
KINDS = ("joint", "single", "detach", "gradnorm", "uncertainty", "pcgrad", "dual", "split")
"""Trainers that stand for the others where each trains on the phantom; the soak tries all, and so do the quicker tests
of test_registries.py."""


def every_trainer():
    """Of every one, as a parameter of a test."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in TRAINERS]


@functools.cache
def phantoms(n_train=8 * BATCHES):
    return load_data("phantom", imgsz=64, seed=3, n_train=n_train, n_val=8, n_test=8)


class Watcher(SimpleNamespace):
    """Keeps every step's losses."""

    def stepped(self, epoch, step, losses):
        self.losses.append(losses)


def make(trainer, *, seed=0, sinks=(), processes=None, n_train=8 * BATCHES, **options):
    """A training on the phantom, its rows in ``.rows``, its losses in ``.watcher.losses``."""
    settings = resolve({"trainer": trainer, "imgsz": 64, "batch_size": 8, "every": 1, "seed": seed, **options})
    collector, watcher = Collector(), Watcher(losses=[])
    training = build(
        settings, phantoms(n_train), [collector, *sinks], watcher, out=Path("unused.h5"), processes=processes
    )
    training.rows, training.collector = collector.rows, collector
    return training


def provenance(trainer, **options):
    """What a run of this trainer says of its model."""
    made = make(trainer, **options)
    made.probe.close()
    return made.collector.header.provenance["model"]


def batches(training, steps):
    """The first ``steps`` batches, from epoch to epoch."""
    done = 0
    for epoch in range(steps):
        training.train_loader.set_epoch(epoch)
        for batch in training.train_loader:
            if done == steps:
                return
            done += 1
            yield batch


def run(training, steps=20):
    """Its batches by their images' names are then in ``.order``."""
    training.model.train()
    training.order = []
    for batch in batches(training, steps):
        training.order.append(batch.names)
        loop.train_step(training, batch)
    training.probe.close()
    return training
