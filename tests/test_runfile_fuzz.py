"""Damaged files: an error or the right numbers, never a crash, a hang or a wrong number taken for right."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_factory import make_run

pytest.importorskip("resource", reason="limits of memory are set with POSIX's resource")
WORKER = Path(__file__).with_name("fuzz_runfile.py")


def outcomes(path: Path, cases: int, *options: str) -> collections.Counter[str]:
    """How many cases ended how; one that kills its process ends as "died", and the next process goes on behind it."""
    found: collections.Counter[str] = collections.Counter()
    first = 0
    while first < cases:
        done = subprocess.run(
            [sys.executable, WORKER, path, str(first), str(cases), *options],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])},
        )
        lines = done.stdout.splitlines()
        assert lines, done.stderr
        for line in lines:
            number, _, said = line.partition(" ")
            found[said if said.strip() else f"died in case {number} with {done.returncode}"] += 1
        first = int(lines[-1].split()[0]) + 1
    return found


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """Several blocks of sums, and every kind of attribute."""
    provenance = {"trainer": "joint", "argv": ["record", "--x"], "hyp": {"box": 0.1}, "flag": True, "none": [], "n": 3}
    path = tmp_path_factory.mktemp("fuzz") / "run.h5"
    return make_run(path, rows=500, layers=20, tasks=("det", "cls", "seg"), provenance=provenance, bad_rows=[3])


def check(found: collections.Counter[str], cases: int, allowed: set[str]) -> None:
    assert set(found) <= allowed, found
    assert found.total() == cases


def test_damage_is_refused_or_does_no_harm(run_file):
    """Short form; the long one is below."""
    found = outcomes(run_file, 500)
    check(found, 500, {"right", "refused", "partly"})
    assert found["partly"] > 25  # damage to one array leaves the others readable
    assert found["refused"] > 25


def test_damage_with_sums_made_right_crashes_nothing(tmp_path):
    """As a malicious writer would: what HDF5 makes of it is all that stands between."""
    small = make_run(tmp_path / "run.h5", rows=20, layers=8, provenance={"trainer": "joint", "argv": ["record"]})
    check(outcomes(small, 300, "--resealed"), 300, {"right", "refused", "partly", "other"})


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_much_more_damage(run_file, tmp_path):
    check(outcomes(run_file, 20_000), 20_000, {"right", "refused", "partly"})
    small = make_run(tmp_path / "run.h5", rows=20, layers=8, provenance={"trainer": "joint", "argv": ["record"]})
    check(outcomes(small, 40_000, "--resealed"), 40_000, {"right", "refused", "partly", "other"})
