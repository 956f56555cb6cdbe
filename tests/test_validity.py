"""The tables of docs/validity.md: printed by the command that stands beside them, and as good as is claimed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    null, power, margin, *rest = tables(text)
    assert all(rate(cell) <= 0.055 + slack for row in null for cell in row[3:])
    found = {int(row[0]): [rate(cell) for cell in row[1:]] for row in power}
    assert found[5][1] >= 0.87 - slack
    assert found[3][1] < found[5][1] < found[8][1]
    assert all(rate(row[1]) <= 0.03 + slack for row in margin)
    return rest


def test_a_short_form():
    assert look(run("--studies", "2000", "--draws", "0"), slack=0.015) == []


def test_the_documented_tables_say_what_is_asked_for():
    attribution, *rest = look((ROOT / "docs" / "validity.md").read_text(encoding="utf-8"), slack=0.0)
    questions = ("direction", "interference", "dominance", "outcome")
    for planted, *cells in attribution:
        for question, cell in zip(questions, cells, strict=True):
            assert rate(cell) >= 0.87 if planted == question else rate(cell) <= 0.07
    look_at_estimates(*rest)


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
