"""How a measurement grows: with tasks, with layers, and with the size of the model, whole and sketched.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python benchmarks/scale.py [--only tasks|layers|sketch|size] [--rounds 8]

Times are medians of CPU time in turn in one process, so that other work on the machine matters little; memory is the
most that a process of its own ever held (``ru_maxrss``), beyond one that trains alike without a probe.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import in_turn, machine
from torch import nn

import gradprobe
from gradprobe import measures, plots
from gradprobe.summary import summarise

TASKS = (2, 8, 40)
LAYERS = (10, 100, 400)
KEPT = (256, 1024, 4096, 16384)
SIZES = (8, 32, 64)
"""Millions of parameters."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc return what is freed: what it keeps for later says nothing of what a measurement needs."""


class Trunk(nn.Module):
    """Square layers, one after the other, and one head per task."""

    def __init__(self, layers, width, tasks):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.heads = nn.Linear(width, tasks)

    def losses(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers)
        return self.heads(x).sub(1).square().mean(0).unbind()


class Loop:
    """One training step at a time, with or without a probe."""

    def __init__(self, layers, width, tasks, batch, by=None, out=None, **options):
        torch.manual_seed(0)
        self.model, self.names = Trunk(layers, width, tasks), [f"t{i}" for i in range(tasks)]
        self.data, self.by = torch.randn(batch, width), by
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.probe = None
        if by is not None:
            self.probe = gradprobe.attach(
                self.model, self.names, out, every=1, shared="layers", overwrite=True, **options
            )

    def __call__(self):
        losses = dict(zip(self.names, self.model.losses(self.data), strict=True))
        if self.by == "backward":
            self.probe.backward(losses)
        else:
            if self.probe is not None:
                self.probe.record(losses)
            sum(losses.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self):
        if self.probe is not None:
            self.probe.close()


def cpu(times):
    """Median CPU milliseconds of each."""
    return {name: 1e3 * statistics.median(values[1]) for name, values in times.items()}


def by_tasks(rounds):
    print("\ntasks: 6 layers of 128 x 128, batch 64; CPU ms a step")
    print(f"{'T':>4} {'bare':>8} {'backward':>9} {'record':>8} {'low':>8} {'bytes a row':>12} {'overview s':>11}")
    for tasks in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run.h5"
            size = (6, 128, tasks, 64)
            steps = {
                "bare": Loop(*size),
                "backward": Loop(*size, "backward", out),
                "record": Loop(*size, "record"),
                "low": Loop(*size, "record", memory="low"),
            }
            found = cpu(in_turn(steps, rounds))
            for step in steps.values():
                step.close()
            with gradprobe.open_run(out) as run:
                arrays = ("grad_norm", "cosine", "shared_grad_norm", "shared_cosine", "loss", "weight")
                stored = sum(run[name].nbytes for name in arrays) / len(run)
                started = time.process_time()
                summarise(run)
                plots.write(run, "overview", Path(folder) / "run.png")
                drawn = time.process_time() - started
        values = " ".join(f"{found[name]:8.1f}" for name in ("bare", "backward", "record", "low"))
        print(f"{tasks:4} {values} {stored:13,.0f} {drawn:11.1f}")


def by_layers(rounds):
    print("\nlayers of 32 x 32, T = 4, batch 16; CPU ms a step")
    print(f"{'L':>5} {'bare':>8} {'backward':>9} {'record':>8} {'sketched':>9} {'beside 4 passes, us a layer':>28}")
    for layers in LAYERS:
        size = (layers, 32, 4, 16)
        steps = {
            "bare": Loop(*size),
            "backward": Loop(*size, "backward"),
            "record": Loop(*size, "record"),
            "sketched": Loop(*size, "record", sketch=256),
        }
        found = cpu(in_turn(steps, rounds))
        passes = cpu(in_turn({"passes": Passes(*size)}, rounds))["passes"]
        for step in steps.values():
            step.close()
        rest = 1e3 * (found["record"] - found["bare"] - passes) / layers
        print(
            f"{layers:5} {found['bare']:8.1f} {found['backward']:9.1f} {found['record']:8.1f} "
            f"{found['sketched']:9.1f} {rest:28.0f}"
        )


class Passes(Loop):
    """What no measurement can do without: a backward pass per task over a graph that is there."""

    def __init__(self, *size):
        super().__init__(*size)
        self.graph = self.model.losses(self.data)
        self.parameters = list(self.model.layers.parameters())

    def __call__(self):
        for loss in self.graph:
            torch.autograd.grad(loss, self.parameters, retain_graph=True)


def by_sketch(rounds):
    layers, width, tasks = 8, 1024, 4
    print(f"\nsketches: {layers} layers of {width} x {width} (8.4 million parameters), T = 4, batch 32")
    print(f"{'k':>7} {'step, CPU ms':>13} {'cosine error':>13} {'1/sqrt(k)':>10} {'norm error':>11} {'kept, MB':>9}")
    exact = rows_of(layers, width, tasks, None)
    bare = cpu(in_turn({"bare": Loop(layers, width, tasks, 32)}, rounds))["bare"]
    whole = cpu(in_turn({"r": Loop(layers, width, tasks, 32, "record")}, rounds))["r"]
    print(f"{'bare':>7} {bare:13.0f}")
    print(f"{'all':>7} {whole:13.0f} {0:13} {'':>10} {0:11} {tasks * layers * width**2 * 4 / 1e6:9.1f}")
    for kept in KEPT:
        found = rows_of(layers, width, tasks, kept)
        first, second = measures.pair_index(tasks)
        cosines = [measures.cosine(gram)[..., first, second] for gram in (found, exact)]
        error = np.sqrt(np.mean((cosines[0] - cosines[1]) ** 2))
        norm = np.sqrt(np.mean((measures.norm(found) / measures.norm(exact) - 1) ** 2))
        step = Loop(layers, width, tasks, 32, "record", sketch=kept)
        took = cpu(in_turn({"r": step}, rounds))["r"]
        step.close()
        held = tasks * layers * kept * 8 / 1e6
        print(f"{kept:7} {took:13.0f} {error:13.4f} {kept**-0.5:10.4f} {norm:11.4f} {held:9.2f}")


class Kept:
    """A sink that keeps the Gramians."""

    def __init__(self):
        self.rows = []

    def write(self, row):
        self.rows.append(row.gram)

    def flush(self):
        return True

    start = write_epoch = annotate = close = lambda *_: None


def rows_of(layers, width, tasks, sketch, rows=6):
    """(rows, L, T, T) at the same parameters."""
    loop, kept = Loop(layers, width, tasks, 32), Kept()
    with gradprobe.GradientProbe(loop.model, loop.names, [kept], every=1, shared="layers", sketch=sketch) as probe:
        for _ in range(rows):
            probe.record(dict(zip(loop.names, loop.model.losses(loop.data), strict=True)))
    return np.stack(kept.rows)


WAYS = {
    "bare": {},
    "backward": {"by": "backward"},
    "low": {"by": "backward", "memory": "low"},
    "sketched": {"by": "backward", "sketch": 4096},
    "sketched, low": {"by": "backward", "sketch": 4096, "memory": "low"},
}


def by_size(_):
    print("\nsize: square layers of 1024, T = 4, batch 8, k = 4096; MB at most beyond training without a probe")
    print(f"{'million':>8} {'one gradient':>13} " + " ".join(f"{way:>14}" for way in WAYS if way != "bare"))
    for million in SIZES:
        peaks = {way: in_a_process(way, million) for way in WAYS}
        beyond = " ".join(f"{(peaks[way][0] - peaks['bare'][0]) / 1e6:14.0f}" for way in WAYS if way != "bare")
        print(f"{million:8} {million * 1.05 * 4:13.0f} {beyond}")
        took = " ".join(f"{peaks[way][1]:14.2f}" for way in WAYS if way != "bare")
        print(f"{'':8} {'CPU s a step':>13} {took}   (bare {peaks['bare'][1]:.2f})", flush=True)


def in_a_process(way, million):
    """Most bytes that a process held, and CPU seconds of its last step."""
    command = [sys.executable, __file__, "--child", way, "--million", str(million)]
    environment = {**os.environ, **GIVE_BACK}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def child(way, million):
    loop = Loop(million, 1024, 4, 8, **WAYS[way])
    for _ in range(4):  # rows 1 and 2 check the derived task; the last one does not
        started = time.process_time()
        loop()
        took = time.process_time() - started
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, took]))


PARTS = {"tasks": by_tasks, "layers": by_layers, "sketch": by_sketch, "size": by_size}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--million", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.million)
        return
    print(machine())
    for name, part in PARTS.items():
        if given.only in (None, name):
            part(given.rounds)


if __name__ == "__main__":
    main()
