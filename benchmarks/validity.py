"""How often the verdict is wrong, and how often it finds what is there: simulated studies through the real functions.

    python benchmarks/validity.py [--write]

prints the tables of docs/validity.md, or puts them there.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from scipy import special

from gradprobe.measures import Array
from gradprobe.statistics import (
    Contrast,
    difference_of_ratios,
    jackknife_variance,
    paired,
    sign_flip,
    skewed,
    widened,
)
from gradprobe.verdict import conditions, quantities
from gradprobe.verdict.answers import BY_RULE, EQUIVALENT, INCREASED, QUESTIONS, REDUCED, UNCERTAIN
from gradprobe.verdict.comparison import compare
from gradprobe.verdict.criteria import Criteria
from gradprobe.verdict.decision import MARGIN, Decision, decide
from gradprobe.verdict.evidence import Pair

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from verdict_factory import TASKS, Truth, study

DOCS = Path(__file__).parents[1] / "docs" / "validity.md"
BEGIN, END = "<!-- tables of benchmarks/validity.py -->", "<!-- end of tables -->"
STUDIES = 20_000
FELL = (REDUCED, UNCERTAIN)
CLAIMS = (*FELL, INCREASED)
SEEDS = (3, 5, 8)


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


def _alone(contrast: Contrast) -> Contrast:
    """As a family of one."""
    return Contrast(*(np.atleast_1d(getattr(contrast, one.name)) for one in fields(contrast)))


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
    for seeds in SEEDS:
        for arms, pairs in SHAPES:
            found = [share(simulate(studies, arms, pairs, seeds, sd, 0.0, 1), CLAIMS) for sd in SPREADS]
            rows.append([str(seeds), str(arms), str(pairs), *map(percent, found)])
    return table(["seeds", "arms", "pairs", *(f"sd {sd:g}" for sd in SPREADS)], rows)


def power(studies: int) -> str:
    """One pair that was fixed beforehand falls by a multiple of the standard deviation of the paired differences."""
    rows = []
    sd = MARGIN
    for seeds in SEEDS:
        found = [simulate(studies, 1, 1, seeds, sd, -size * sd, 2) for size in (1, 2, 3)]
        rows.append([str(seeds), *(percent(share(one, FELL)) for one in found), percent(share(found[2], (REDUCED,)))])
    return table(["seeds", "1 sd", "2 sd", "3 sd", "of which materially (3 sd)"], rows)


def on_the_margin(studies: int) -> str:
    """A fall of exactly the margin: how often it is called material. The rule's own rate is 2.5 %."""
    rows = [
        [str(seeds), percent(share(simulate(studies, 1, 1, seeds, MARGIN, -MARGIN, 3), (REDUCED,)))] for seeds in SEEDS
    ]
    return table(["seeds", "called material"], rows)


def alike(studies: int) -> str:
    """All differences of a study are a fall of exactly the margin: how often one is called equivalent, or not reduced.

    Differences are independent, and their sd is .02. Beside it is what the 90 % intervals alone would say, and in the
    last column what the correction costs: how many of as many differences that are 0, with an sd of .05, are called
    equivalent.
    """
    rows = []
    equivalent = (BY_RULE.index(EQUIVALENT),)
    for seeds in SEEDS:
        for count in (1, 6, 20):
            rng = np.random.default_rng(4)
            found = decide(paired(-MARGIN + 0.02 * rng.normal(size=(studies, count, seeds))))
            above = found.low90 > -MARGIN
            nothing = decide(paired(0.05 * rng.normal(size=(studies, count, seeds))))
            cells = [
                (above & (found.high90 < MARGIN)).any(axis=-1),
                np.isin(found.rule, equivalent).any(axis=-1),
                above.any(axis=-1),
                np.isin(found.rule, (*equivalent, BY_RULE.index("NOT REDUCED"))).any(axis=-1),
                np.isin(nothing.rule, equivalent),
            ]
            rows.append([str(seeds), str(count), *(percent(float(cell.mean())) for cell in cells)])
    columns = ["equivalent, by intervals", "equivalent", "or not reduced, by intervals", "or not reduced"]
    return table(["seeds", "comparisons", *columns, "equivalent at 0"], rows)


def _long_tail(width: float) -> Callable[[np.random.Generator, tuple[int, ...]], Array]:
    mean, sd = np.exp(width**2 / 2), np.sqrt(np.expm1(width**2)) * np.exp(width**2 / 2)
    return lambda rng, shape: (rng.lognormal(0, width, shape) - mean) / sd


def _rare(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (np.where(rng.random(shape) < 0.1, 9.0, -1.0) + 0.5 * rng.normal(size=shape)) / np.sqrt(9.25)


SHAPES_OF_DIFFERENCES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
    "lognormal, 1": _long_tail(1.0),
    "lognormal, 1.5": _long_tail(1.5),
    "one seed in ten far off": _rare,
}
"""Of mean 0 and sd 1, with the tail above."""


def skew(studies: int) -> str:
    """Differences of mean 0 that lean to one side (their tail is above 0): how often one alone is called reduced.

    The rules use Student's t, which claims 2.5 % where differences are normal. "Seen" is how often the command remarks
    on the lean, and "false unseen" how many of the false claims have no such remark. Then what other one-sided tests at
    2.5 % would claim, and how often each finds a fall of 2 sd in normal differences. (Flipped signs show nothing below
    six seeds.)
    """
    rows = []
    for name, draw in SHAPES_OF_DIFFERENCES.items():
        for seeds in SEEDS:
            d = 10 * MARGIN * draw(np.random.default_rng(5), (studies, seeds))
            false = np.isin(decide(paired(d[:, None])).rule[:, 0], [BY_RULE.index(one) for one in FELL])
            seen = skewed(d)
            unseen = float((false & ~seen).sum() / max(int(false.sum()), 1))
            others = [percent(float((test(d) <= 0.025).mean())) for test in OTHER_TESTS]
            rows.append([name, str(seeds), *map(percent, (false.mean(), seen.mean(), unseen)), *others])
    for seeds in SEEDS:
        d = MARGIN * (np.random.default_rng(6).normal(size=(studies, seeds)) - 2)
        found = share(decide(paired(d[:, None])), FELL)
        others = [percent(float((test(d) <= 0.025).mean())) for test in OTHER_TESTS]
        rows.append(["a fall of 2 sd", str(seeds), percent(found), percent(float(skewed(d).mean())), "-", *others])
    names = ["Johnson", "bootstrap-t", "flipped signs"]
    return table(["differences", "seeds", "called reduced", "seen", "false unseen", *names], rows)


def johnson(d: Array) -> Array:
    """One-sided p-value by Johnson's modified t, from the third moment; (n, seeds) -> (n,).

    Source: Johnson, "Modified t Tests and Confidence Intervals for Asymmetrical Populations", 1978.
    """
    count, mean, variance = d.shape[1], d.mean(axis=1), d.var(axis=1, ddof=1)
    third = (d - mean[:, None]) ** 3
    third = third.sum(axis=1) * count / ((count - 1) * (count - 2))
    moved = mean + third / (6 * variance * count) + third * np.square(mean / variance) / 3
    result: Array = special.stdtr(count - 1, moved / np.sqrt(variance / count))
    return result


def bootstrap_t(d: Array) -> Array:
    """One-sided p-value by 400 resampled t statistics, of one study in ten; (n, seeds) -> (n // 10,)."""
    rng = np.random.default_rng(7)
    d = d[: len(d) // 10]
    count, mean = d.shape[1], d.mean(axis=1)
    again = np.take_along_axis(d[:, None], rng.integers(0, count, (len(d), 400, count)), axis=2)
    apart, spread = again.mean(axis=2) - mean[:, None], again.std(axis=2, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = np.where(spread == 0, np.copysign(np.inf, apart), apart / spread)
    result: Array = (resampled <= (mean / d.std(axis=1, ddof=1))[:, None]).mean(axis=1)
    return result


def flipped(d: Array) -> Array:
    """One-sided p-value by flipping signs, of one study in ten; 1 with fewer than six seeds."""
    return np.array([sign_flip(one) / 2 if one.mean() < 0 and len(one) > 5 else 1.0 for one in d[: len(d) // 10]])


OTHER_TESTS = (johnson, bootstrap_t, flipped)


CLUSTERS = 12


def one_data_set(studies: int) -> str:
    """Nothing differs on data of this kind, but a study has one data set, whose own effect all its seeds share.

    How often one comparison is called reduced or increased, by the part of the variance that seeds share; at half of it
    data sets differ as much as seeds do. In the last column the shared part comes from the test images alone, in 12
    clusters, and the interval holds it, as that of an outcome does.
    """
    rows = []
    for seeds in SEEDS:
        cells = [share(decide(_shared(studies, seeds, part, known=False)), CLAIMS) for part in (0.0, 0.1, 0.25, 0.5)]
        cells.append(share(decide(_shared(studies, seeds, 0.5, known=True)), CLAIMS))
        rows.append([str(seeds), *map(percent, cells)])
    return table(["seeds", "none", "10 %", "25 %", "50 %", "50 %, of test clusters"], rows)


def _shared(studies: int, seeds: int, part: float, *, known: bool) -> Contrast:
    rng = np.random.default_rng(8)
    clusters = np.sqrt(part * CLUSTERS) * rng.normal(size=(studies, 1, CLUSTERS))
    of_seeds = np.sqrt(1 - part) * rng.normal(size=(studies, 1, seeds))
    d = 10 * MARGIN * (of_seeds + clusters.mean(axis=-1, keepdims=True))
    without = 10 * MARGIN * (clusters.sum(axis=-1, keepdims=True) - clusters) / (CLUSTERS - 1)
    return widened(paired(d), jackknife_variance(without), CLUSTERS - 1.0) if known else paired(d)


def ratios(studies: int) -> str:
    """C as a ratio of means over seeds: a run's own progress is few of its standard errors above 0.

    C is .5 in the baseline. How often one comparison is called reduced or increased where C is .5 in the arm, too; how
    often reduced where it is .2, and materially where it is .4, a fall of exactly the margin. Own progress differs by
    20 % from seed to seed, and what is cancelled is known to .05 of it.
    """
    rows = []
    for resolved in (1.5, 3.0, 6.0):
        for seeds in SEEDS:
            same, less, margin = (_ratio(studies, seeds, resolved, arm) for arm in (0.5, 0.2, 0.4))
            cells = share(same, CLAIMS), share(less, FELL), share(margin, (REDUCED,))
            rows.append([f"{resolved:g}", str(seeds), *map(percent, cells)])
    return table(["standard errors", "seeds", "false claims", "found", "called material at the margin"], rows)


def _ratio(studies: int, seeds: int, resolved: float, arm: float) -> Decision:
    rng = np.random.default_rng(9)
    parts = []
    for ratio in (arm, 0.5):
        own = np.exp(0.2 * rng.normal(size=(studies, 1, seeds)))
        parts.append(ratio * own + 0.05 * rng.normal(size=own.shape))
        parts.append(own + rng.normal(size=own.shape) / resolved)
    return decide(difference_of_ratios(*parts))


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


def gates_open(draws: int) -> str:
    """Ledgers in which each run's own progress is 3 of its standard errors above 0 on average.

    How many comparisons of C stay open: if every run has to pass, and with a ratio of means over seeds where one does
    not. Then how many are called reduced or increased where nothing differs, and reduced where C falls from .5 to .2.
    """
    rows = []
    for seeds in SEEDS:
        same, less = (np.array([_of_ledgers(arm, seeds, draw) for draw in range(draws)]) for arm in (0.5, 0.2))
        claims, fell = ([BY_RULE.index(name) for name in names] for names in (CLAIMS, FELL))
        cells = [*same[:, :2].mean(axis=0), np.isin(same[:, 2], claims).mean(), np.isin(less[:, 2], fell).mean()]
        rows.append([str(seeds), *map(percent, cells)])
    return table(["seeds", "open, run by run", "open", "false claims", "found"], rows)


def _of_ledgers(arm: float, seeds: int, draw: int) -> tuple[float, float, float]:
    """Whether every run passes, whether the comparison is open, and the rule."""
    base = Truth(cancelled={"cls>det": 0.5, "det>cls": 0.2}, resolved=3.0)
    truth = base.but(cancelled={"cls>det": arm, "det>cls": 0.2})
    said = {"probe.ledger.ends": "probe"}
    runs = study({"joint": base, "arm": truth}, range(seeds), draw=draw, rows=40, controls=False, **said)
    groups = conditions.runs_by_arm(runs)
    s = quantities.sides(groups["joint"], groups["arm"], None)
    c = next(one for one in quantities.of_gradients(TASKS, [Pair(*TASKS)], MARGIN, None) if one.subject == "cls>det")
    found = c.reading(s, s.layers(c.tasks))
    each = np.isfinite([c.values(side, s.layers(c.tasks)) for side in (s.baseline, s.treated)]).all()
    rule = 0 if found.contrast is None else int(decide(_alone(found.contrast)).rule[0])
    return float(each), float(found.contrast is not None), float(rule)


SECTIONS = (null, power, on_the_margin, alike, skew, one_data_set, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--draws", type=int, default=100, help="of whole studies, for each planted effect")
    parser.add_argument("--write", action="store_true", help="into docs/validity.md")
    chosen = parser.parse_args()
    found = [titled(section, section(chosen.studies)) for section in SECTIONS]
    if chosen.draws:
        found += [
            titled(section, section(count))
            for section, count in ((gates_open, 4 * chosen.draws), (attribution, chosen.draws))
        ]
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
