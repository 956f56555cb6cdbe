"""How right the estimates and the loss ledger are, held against what small models allow to compute.

    python benchmarks/estimates.py [--write] [--rows 500]

prints the tables of docs/validity.md, or puts them there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

import gradprobe
from gradprobe import measures
from gradprobe.ledger.windows import window

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ledger_loop import OPTIMIZERS, TASKS, Options, train
from test_estimates import Data, Network, Regression, coverage, exact, lengths, record, sums
from validity import percent, table

DOCS = Path(__file__).parents[1] / "docs" / "validity.md"
BEGIN, END = "<!-- tables of benchmarks/estimates.py -->", "<!-- end of tables of benchmarks/estimates.py -->"
WINDOWS = (6, 12, 40)


def network():
    """The tests' network of two tasks, and its 3,000 samples."""
    truth = np.array([[1, 1, 0, 0, 0, 0], [-0.5, 1, 0.5, 0, 0, 0]])
    return Network(6), Data(3000, truth, 1.5, 0.95)


def covered(windows, folder):
    model, data = network()
    rows = []
    for size in WINDOWS:
        path = record(folder / "run.h5", model, data, windows * size, batch_size=12)
        hits, told = coverage(path, model, data, 48, windows * size, size)
        with gradprobe.open_run(path) as run:
            gram, noise = exact(model, data, run.layers, 48)
            naive, found = (np.abs(each.mean(axis=0) - gram) / lengths(noise) for each in sums(run))
        rows.append([str(size), percent(hits), percent(told), f"{naive.max():.2f}", f"{found.max():.3f}"])
    return table(["rows", "intervals that cover", "windows that have one", "F - true", "U - true"], rows)


def flipped(folder):
    size, batch = 50, 200
    truth = np.zeros((2, size))
    truth[0, 0], truth[1, :2] = 1.0, (-0.3, np.sqrt(1 - 0.3**2))
    data, model, rows = Data(20_000, truth, np.sqrt(8.0), 0.95), Regression(size), []
    for name, micro in (("probe loader", 0), ("micro-batches", 4)):
        path = record(folder / "run.h5", model, data, 250, batch_size=batch // 4, micro=micro)
        with gradprobe.open_run(path) as run:
            true = measures.pair_cosine(exact(model, data, run.layers, batch)[0])[0, 0]
            naive = np.median(run["cosine" if micro else "probe_loader/cosine"][:, 0, 0])
            found = run.estimate(source="training" if micro else "probe_loader")
        interval = f"{found.low[0]:.3f} to {found.high[0]:.3f}"
        rows.append([name, f"{true:.3f}", f"{naive:.3f}", f"{found.cosine[0]:.3f}", interval])
    return table(["measured", "true cosine", "naive, median", "estimate", "95 %"], rows)


def ledger():
    rows = []
    for optimizer in OPTIMIZERS:
        found = train(Options(optimizer=optimizer, steps=60, ends="probe", shapley=True))
        true, terms = found.shapley.ravel(), found.ledger["term"][:, 0].ravel()
        correlation, slope = np.corrcoef(true, terms)[0, 1], true @ terms / (true @ true)
        first = true @ found.left.ravel() / (true @ true)
        at_ends = window(found.ledger, TASKS)
        noisy = window(train(Options(optimizer=optimizer, steps=100, batch=1024, seed=1)).ledger, TASKS)
        residuals = [percent(float(np.abs(each.residual / each.size).max())) for each in (at_ends, noisy)]
        apart = f"{max(found.apart):.0g}"
        rows.append([optimizer, apart, *residuals, f"{correlation:.4f}", f"{slope:.3f}", f"{first:.2f}"])
    columns = ["optimizer", "parts - update", "residual, ends=probe", "residual, batches' own"]
    return table([*columns, "r with Shapley", "slope", "slope of the left end alone"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="windows of each size")
    parser.add_argument("--write", action="store_true", help="into docs/validity.md")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n\n".join([covered(chosen.rows, Path(folder)), flipped(Path(folder)), ledger()])
    print(text)
    if chosen.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
