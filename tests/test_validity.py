"""The tables of docs/validity.md: printed by the command that stands beside them, and as good as is claimed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from gradprobe.messages.language import LANGUAGES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "validity.py"


def run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], check=True, capture_output=True, text=True, timeout=3600
    ).stdout


def tables(text):
    """Each table as rows of cells, without its head; those of forked trainings have a test of their own."""
    text = text.partition("<!-- tables of benchmarks/forks.py -->")[0]
    found = re.findall(r"((?:^\|.*\|\n?)+)", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in row.strip("| \n").split(" | ")] for row in one.strip().splitlines()][2:]
        for one in found
    ]


def rate(cell):
    return float(cell.removesuffix(" %")) / 100


def look(text, slack):
    null, power, margin, equal, leaning, shared, ratios, *rest = tables(text)
    assert all(rate(cell) <= 0.055 + slack for row in null for cell in row[3:])
    found = {int(row[0]): [rate(cell) for cell in row[1:]] for row in power}
    assert found[5][1] >= 0.87 - slack
    assert found[3][1] < found[5][1] < found[8][1]
    assert all(rate(row[1]) <= 0.03 + slack for row in margin)
    look_at_equivalence(equal, slack)
    look_at_lean(leaning, slack)
    look_at_shared_data(shared, slack)
    for _, _, false, _, material in ratios:
        assert rate(false) <= 0.055 + slack
        assert rate(material) <= 0.03 + slack
    return rest


def look_at_equivalence(rows, slack):
    for _, count, by_intervals, equivalent, apart, not_reduced, _ in rows:
        assert rate(by_intervals) == pytest.approx(1 - 0.95 ** int(count), abs=0.01 + slack)
        assert rate(apart) >= rate(by_intervals)
        assert rate(equivalent) <= rate(not_reduced) <= 0.055 + slack


def look_at_lean(rows, slack):
    """Nothing holds its rate for three to eight seeds, and finds what there is: that is what is said."""
    of = {(row[0], row[1]): [rate(cell) for cell in row[2:] if cell != "-"] for row in rows}
    assert all(of["normal", seeds][0] <= 0.03 + slack for seeds in "358")
    assert all(of["lognormal, 1.5", seeds][0] > 0.25 for seeds in "358")
    assert of["lognormal, 1.5", "3"][1] == 0  # of three differences no lean can be seen
    for name in ("exponential", "lognormal, 1.5", "one seed in ten far off"):
        assert all(of[name, seeds][2] > 0.5 for seeds in "358")  # most false claims come without a remark
    assert of["a fall of 2 sd", "5"][0] > of["a fall of 2 sd", "5"][2] + 0.2  # what Johnson's t costs


def look_at_shared_data(rows, slack):
    """A t statistic is too large by sqrt(1 + n r / (1 - r)), with r the part of the variance that n seeds share."""
    for seeds, *cells, with_clusters in rows:
        n = int(seeds)
        for part, cell in zip((0.0, 0.1, 0.25, 0.5), cells, strict=True):
            limit = scipy.stats.t.ppf(0.975, n - 1) / np.sqrt(1 + n * part / (1 - part))
            assert rate(cell) == pytest.approx(2 * scipy.stats.t.sf(limit, n - 1), abs=0.01 + slack)
        assert rate(with_clusters) <= 0.06 + slack


def test_a_short_form():
    assert look(run("--studies", "2000", "--draws", "0"), slack=0.015) == []


def test_the_documented_tables_say_what_is_asked_for():
    ledgers, attribution, *rest = look((ROOT / "docs" / "validity.md").read_text(encoding="utf-8"), slack=0.0)
    questions = ("direction", "interference", "dominance", "outcome")
    for _, each, open_, false, _ in ledgers:
        assert rate(open_) > 0.85 > 0.3 > rate(each)
        assert rate(false) <= 0.06
    for planted, *cells in attribution:
        for question, cell in zip(questions, cells, strict=True):
            assert rate(cell) >= 0.87 if planted == question else rate(cell) <= 0.07
    look_at_estimates(*rest)


def test_what_is_said_of_a_lean_is_the_worst_that_was_measured():
    leaning = tables((ROOT / "docs" / "validity.md").read_text(encoding="utf-8"))[4]
    worst = max(rate(row[2]) for row in leaning if row[0] != "a fall of 2 sd")
    for language in LANGUAGES.values():
        for key in ("remark.skew", "scope.seeds"):
            assert f" {100 * worst:.0f} %" in language[key]


def look_at_estimates(covered, flipped, ledger):
    for _, hits, _, naive, corrected in covered:
        assert 0.92 <= rate(hits) <= 0.98
        assert float(naive) > 10 * float(corrected)
        assert float(corrected) < 0.1
    for _, true, naive, found, _ in flipped:
        assert float(naive) > 0.35
        assert float(found) == pytest.approx(float(true), abs=0.05)
    for _, apart, *residuals, correlation, slope, _ in ledger:
        assert float(apart) <= 1e-6
        assert all(rate(cell) <= 0.1 for cell in residuals)
        assert float(correlation) >= 0.995
        assert float(slope) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_command_prints_the_documented_tables():
    printed, documented = tables(run()), tables((ROOT / "docs" / "validity.md").read_text(encoding="utf-8"))
    assert printed == documented[: len(printed)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_estimates_are_as_documented():
    printed = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "estimates.py")], check=True, capture_output=True, text=True
    ).stdout
    look_at_estimates(*tables(printed))
