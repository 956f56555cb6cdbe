"""Whether the part of its lone progress that the ledger says a task loses is what full trainings show.

    OMP_NUM_THREADS=1 python benchmarks/alone.py [--seeds 5]

Task a of a dial problem is trained beside b and alone, on the same batches, for 96 steps: what it loses of the fall of
its loss, on all training data, against C, shrunk and lost of the ledger over the rows from the 20th. Prints the table
of docs/ledger.md: means over seeds, and the standard deviation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_ledger_alone import adam, dial, expected, shrunk_in
from validity import table

PROBLEMS = (
    ("dial:angle=90,ratio=.05,noise=4", adam),
    ("dial:angle=90,ratio=.2,noise=4", adam),
    ("dial:angle=90,noise=4", adam),
    ("dial:angle=120,ratio=.2,noise=1", adam),
    ("dial:angle=150,noise=1", adam),
    ("dial:angle=60,ratio=.2,noise=4", adam),
    ("dial:angle=0,correlation=1,noise=4", adam),
    ("dial:angle=90,ratio=.05,noise=4", lambda p: torch.optim.SGD(p, 0.02)),
)


def measured(path, spec, optimizer, seed):
    """The outcome, C, shrunk, lost, and what theory says of shrunk."""
    before, together, images = dial(path, spec, optimizer, seed=seed)
    _, alone, _ = dial(None, spec, optimizer, tasks=("a",), seed=seed)
    found, ratio = shrunk_in(path), float(spec.partition("ratio=")[2].partition(",")[0] or 1)
    theory = expected(images, ratio) if optimizer is adam else 0.0
    return 1 - (before - together) / (before - alone), found.interference[0, 1], found.shrunk[0], theory, found.lost[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds, rows = range(parser.parse_args().seeds), []
    with tempfile.TemporaryDirectory() as folder:
        for k, (spec, optimizer) in enumerate(PROBLEMS):
            runs = np.array([measured(Path(folder) / f"{k}-{seed}.h5", spec, optimizer, seed) for seed in seeds])
            spread = zip(runs.mean(axis=0), runs.std(axis=0, ddof=1), strict=True)
            numbers = [f"{mean:.2f} ({sd:.2f})" for mean, sd in spread]
            rows.append([spec.partition(":")[2], "AdamW" if optimizer is adam else "SGD", *numbers])
    print(table(["dials", "optimizer", "outcome", "C", "shrunk", "shrunk by theory", "lost"], rows))


if __name__ == "__main__":
    main()
