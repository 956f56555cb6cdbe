"""What measuring costs in `gradprobe record`: the same training loop with and without the probe, step by step in turn.

    OMP_WAIT_POLICY=passive python benchmarks/record_overhead.py [--steps 30] [--default] [--ledger]

Prints ratios of means within one run: absolute times change with the machine and its load. With --default it also
times the whole of `gradprobe record` with its default settings, evaluation included. With --ledger it is the table of
docs/ledger.md instead: medians of ratios of the same round.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import in_turn, machine, show

from gradprobe.cli.progress import Display
from gradprobe.runfile import RunWriter
from gradprobe.trainers import loop
from gradprobe.trainers.build import build
from gradprobe.trainers.data.loading import load_data
from gradprobe.trainers.settings import Settings


class NoProbe:
    """The joint backward and nothing else."""

    def __init__(self) -> None:
        self.step, self.epoch = 0, 0

    def backward(self, losses, weights, *, batch_size, micro=None):
        sum(weights[task] * losses[task] for task in losses).backward()
        self.step += 1


class Silent(Display):
    def say(self, text):
        pass


def make_training(settings, data, out):
    display = Silent(settings)
    return build(settings, data, [RunWriter(out), display], display, out=out)


def timed(training, batch):
    started = time.perf_counter()
    loop.train_step(training, batch)
    return time.perf_counter() - started


def compare(settings, data, steps, folder):
    """Times of a bare and of a probed step, taken in turn."""
    probed = make_training(settings, data, folder / f"{settings.trainer}{settings.every}.h5")
    bare = make_training(settings, data, folder / f"{settings.trainer}{settings.every}-bare.h5")
    bare.probe.close()
    bare = dataclasses.replace(bare, probe=NoProbe())
    times = {"bare": [], "probed": []}
    batches = [batch for _, batch in zip(range(steps + 4), _endless(probed.train_loader), strict=False)]
    for index, batch in enumerate(batches):
        for name, training in (
            (("bare", bare), ("probed", probed)) if index % 2 else (("probed", probed), ("bare", bare))
        ):
            seconds = timed(training, batch)
            if index >= 4:
                times[name].append(seconds)
    probed.probe.close()
    same = all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), probed.model.parameters(), strict=True))
    return times, same


def with_ledgers(rounds, folder):
    """Steps without a probe, measured, and with ledgers of several sizes, taken in turn past the first rows."""
    settings = dataclasses.replace(Settings(), every=1, imgsz=64, trainer="joint")
    data = load_data("phantom", imgsz=64, seed=0, n_train=64, n_val=16)
    probes = []

    def step(name, probe=None, **changes):
        made = make_training(dataclasses.replace(settings, **changes), data, folder / f"{name}.h5")
        probes.append(made.probe)
        if probe is not None:
            made.probe.close()
            made = dataclasses.replace(made, probe=probe)
        batches = _endless(made.train_loader)
        return lambda: loop.train_step(made, next(batches))

    sizes = {f"ledger of {n}": step(f"ledger{n}", ledger=True, ledger_images=n) for n in (16, 64)}
    steps = {"bare": step("bare", NoProbe()), "measured": step("measured"), **sizes}
    show("YOLOv5n, 64 px, batch 16, AdamW", in_turn(steps, rounds, warm=9))
    for one in probes:
        one.close()


def _endless(loader):
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--ledger", action="store_true")
    arguments = parser.parse_args()
    if arguments.ledger:
        with tempfile.TemporaryDirectory() as folder:
            print(machine())
            with_ledgers(arguments.steps, Path(folder))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )
    defaults = Settings()
    data = load_data("phantom", imgsz=defaults.imgsz, seed=0, n_train=64, n_val=16)
    print(f"YOLOv5n, {defaults.imgsz} px, batch {defaults.batch_size}, {arguments.steps} steps, means, in turn")
    print(f"{'trainer':10} {'every':>5} {'bare step':>10} {'with probe':>11} {'ratio':>6}  same weights at the end")
    with tempfile.TemporaryDirectory() as folder:
        for trainer in ("joint", "gradnorm"):
            for every in (1, defaults.every):
                settings = dataclasses.replace(defaults, trainer=trainer, every=every)
                times, same = compare(settings, data, arguments.steps, Path(folder))
                # Means: with every > 1 a median would see only the unmeasured steps.
                bare, probed = statistics.mean(times["bare"]), statistics.mean(times["probed"])
                print(
                    f"{trainer:10} {every:5} {bare * 1e3:7.0f} ms {probed * 1e3:8.0f} ms {probed / bare:6.2f}  {same}"
                )
        if arguments.default:
            started = time.perf_counter()
            out = Path(folder) / "default.h5"
            subprocess.run([sys.executable, "-m", "gradprobe", "record", "--out", out], check=True)
            print(f"gradprobe record, default settings: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
