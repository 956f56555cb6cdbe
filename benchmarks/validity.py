"""How often the verdict is wrong, and how often it finds what is there: simulated studies through the real functions.

    python benchmarks/validity.py [--write]

prints the tables of docs/validity.md, or puts them there.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradprobe.statistics import paired
from gradprobe.verdict.answers import BY_RULE, INCREASED, QUESTIONS, REDUCED, UNCERTAIN
from gradprobe.verdict.comparison import compare
from gradprobe.verdict.criteria import Criteria
from gradprobe.verdict.decision import MARGIN, Decision, decide

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from verdict_factory import Truth, study

DOCS = Path(__file__).parents[1] / "docs" / "validity.md"
BEGIN, END = "<!-- tables of benchmarks/validity.py -->", "<!-- end of tables -->"
STUDIES = 20_000
FELL = (REDUCED, UNCERTAIN)
CLAIMS = (*FELL, INCREASED)


def share(found: Decision, verdicts: tuple[str, ...]) -> float:
    """Part of the studies in which any comparison has one of these verdicts."""
    return float(np.isin(found.rule, [BY_RULE.index(name) for name in verdicts]).any(axis=-1).mean())


def simulate(studies: int, arms: int, pairs: int, seeds: int, sd: float, effect: float, draw: int) -> Decision:
    """Studies of some arms against one baseline; ``sd`` is that of paired differences, ``effect`` of the first arm."""
    rng = np.random.default_rng(draw)
    baseline = rng.normal(size=(studies, 1, pairs, seeds))
    treated = rng.normal(size=(studies, arms, pairs, seeds))
    d = sd / np.sqrt(2) * (treated - baseline)
    d[:, 0, 0] += effect
    return decide(paired(d.reshape(studies, arms * pairs, seeds)))


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


SHAPES = ((1, 1), (1, 2), (3, 2), (10, 2))
SPREADS = (0.02, 0.1, 1.0)


def null(studies: int) -> str:
    """Nothing differs: how often something is called reduced or increased, anywhere in a study."""
    rows = []
    for seeds in (3, 5, 8):
        for arms, pairs in SHAPES:
            found = [share(simulate(studies, arms, pairs, seeds, sd, 0.0, 1), CLAIMS) for sd in SPREADS]
            rows.append([str(seeds), str(arms), str(pairs), *map(percent, found)])
    return table(["seeds", "arms", "pairs", *(f"sd {sd:g}" for sd in SPREADS)], rows)


def power(studies: int) -> str:
    """One pair that was fixed beforehand falls by a multiple of the standard deviation of the paired differences."""
    rows = []
    sd = MARGIN
    for seeds in (3, 5, 8):
        found = [simulate(studies, 1, 1, seeds, sd, -size * sd, 2) for size in (1, 2, 3)]
        rows.append([str(seeds), *(percent(share(one, FELL)) for one in found), percent(share(found[2], (REDUCED,)))])
    return table(["seeds", "1 sd", "2 sd", "3 sd", "of which materially (3 sd)"], rows)


def on_the_margin(studies: int) -> str:
    """A fall of exactly the margin: how often it is called material. The rule's own rate is 2.5 %."""
    rows = [
        [str(seeds), percent(share(simulate(studies, 1, 1, seeds, MARGIN, -MARGIN, 3), (REDUCED,)))]
        for seeds in (3, 5, 8)
    ]
    return table(["seeds", "called material"], rows)


BASE = Truth(cosine=-0.3, cancelled={"cls>det": 0.5, "det>cls": 0.2}, weight=(2.0, 1.0), spread=0.15)
PLANTED = {
    "nothing": BASE,
    "direction": BASE.but(cosine=0.0),
    "interference": BASE.but(cancelled={"cls>det": 0.2, "det>cls": 0.2}),
    "dominance": BASE.but(weight=(1.1, 1.0)),
    "outcome": BASE.but(metrics={**BASE.metrics, "accuracy": 1.1}),
}


def attribution(draws: int) -> str:
    """Whole studies, from gradients and ledgers to answers: how often each question is answered by a difference.

    Five seeds, one pair and one metric fixed beforehand; what is planted falls by twice the standard deviation that
    seeds give the paired differences, .15. (That of dominance is smaller: it comes from weights.)
    """
    rows = []
    for name, truth in PLANTED.items():
        counts = dict.fromkeys(QUESTIONS, 0)
        for draw in range(draws):
            found = compare(
                study({"joint": BASE, "arm": truth}, range(5), draw=draw, rows=40),
                Criteria(pairs=["cls>det"], metrics=["accuracy"], outcome_margin=MARGIN),
            )
            for question in QUESTIONS:
                counts[question] += any(answer.verdict in CLAIMS for answer in found.of(question))
        rows.append([name, *(percent(counts[question] / draws) for question in QUESTIONS)])
    return table(["planted", *QUESTIONS], rows)


SECTIONS = (null, power, on_the_margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--draws", type=int, default=100, help="of whole studies, for each planted effect")
    parser.add_argument("--write", action="store_true", help="into docs/validity.md")
    chosen = parser.parse_args()
    found = [titled(section, section(chosen.studies)) for section in SECTIONS]
    if chosen.draws:
        found.append(titled(attribution, attribution(chosen.draws)))
    text = "\n\n".join(found)
    print(text)
    if chosen.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def titled(section: Callable[[int], str], found: str) -> str:
    return f"{inspect.getdoc(section)}\n\n{found}"


if __name__ == "__main__":
    main()
