"""What R of forked trainings is worth: its nulls, its controls, and whether it tells the outcome of full trainings.

    python benchmarks/forks.py [--write] [--only nulls,outcome,horizon,phantom]

prints the tables of docs/validity.md about forked trainings, or puts them there.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gradprobe.audit import Experiment
from gradprobe.forks import ForkOptions, fork, over_seeds
from gradprobe.statistics import t_interval
from gradprobe.trainers import audited
from gradprobe.trainers.problems import problem_of
from gradprobe.trainers.settings import resolve

DOCS = Path(__file__).parents[1] / "docs" / "validity.md"
BEGIN, END = "<!-- tables of benchmarks/forks.py -->", "<!-- end of tables of benchmarks/forks.py -->"


# ---- problems


def dial(data: str, **flags) -> Callable[[int], Experiment]:
    """The bundled joint training; its schedule ends after 192 steps."""

    def make(seed: int) -> Experiment:
        settings = audited.audit_settings(resolve({"trainer": "joint", "data": data, "seed": seed, **flags}))
        return audited.experiment_factory(settings, problem_of(settings).load(settings), evaluated=None)()

    return make


class Heads(nn.Module):
    """A trunk and one linear head per task."""

    def __init__(self, trunk: nn.Module, width: int, outputs: dict[str, int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: nn.Linear(width, size) for task, size in outputs.items()})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


def experiment(model, lr, sample, losses, seed, batch=128, held_out=512) -> Experiment:
    """A training on fresh samples, evaluated on a fixed set."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    fixed = sample(held_out, draw)
    made = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(trace, x, weights):
        found = trace.losses(losses(model(x[0]), x))
        made.zero_grad()
        sum(weights[t] * found[t] for t in found).backward()
        made.step()

    return Experiment(
        model,
        made,
        lambda tasks: (sample(batch, draw) for _ in range(1000)),
        step,
        weights=dict.fromkeys(model.heads, 1.0),
        evaluate=lambda tasks: losses(model(fixed[0]), fixed),
        state={"draw": draw},
    )


def mlp(
    scale: float = 1.0, *, easy: bool = False, random_labels: bool = False, twice: bool = False
) -> Callable[[int], Experiment]:
    """Two functions of ten numbers through a narrow trunk with BatchNorm; b's loss is multiplied by ``scale``.

    Of task a's, the one that is not easy has a plateau of some hundred steps.
    """

    def make(seed: int) -> Experiment:
        torch.manual_seed(seed)
        trunk = nn.Sequential(
            *(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
        )
        model = Heads(trunk, 8, {"a": 1, "b": 1})
        a, b = torch.randn(2, 10, 3)

        def sample(count, draw):
            x = torch.randn(count, 10, generator=draw)
            noise = torch.randn(count, generator=draw)
            other = noise if random_labels else torch.tanh(2 * x @ b).sum(1)
            return x, (torch.tanh(2 * x @ a) if easy else torch.sin(x @ a)).sum(1), other

        def losses(found, x):
            first = F.mse_loss(found["a"][:, 0], x[1])
            return {"a": first, "b": scale * (first if twice else F.mse_loss(found["b"][:, 0], x[2]))}

        return experiment(model, 3e-3, sample, losses, seed)

    return make


def conv() -> Callable[[int], Experiment]:
    """A blob on 12 x 12 noisy pixels through a small convolutional trunk: which of four shapes it is, and where."""

    def make(seed: int) -> Experiment:
        torch.manual_seed(seed)
        trunk = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(72, 16), nn.ReLU()),
        )
        model = Heads(trunk, 16, {"shape": 4, "place": 2})
        shapes = (torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(seed)) > 0.5).float()

        def sample(count, draw):
            images = 0.5 * torch.randn(count, 1, 12, 12, generator=draw)
            kind = torch.randint(4, (count,), generator=draw)
            place = torch.randint(8, (count, 2), generator=draw)
            for k in range(count):
                y, x = place[k].tolist()
                images[k, 0, y : y + 4, x : x + 4] += shapes[kind[k]]
            return images, kind, (place.float() - 3.5) / 2

        def losses(found, x):
            return {"shape": F.cross_entropy(found["shape"], x[1]), "place": F.mse_loss(found["place"], x[2])}

        return experiment(model, 3e-3, sample, losses, seed)

    return make


@dataclass(frozen=True)
class Problem:
    name: str
    make: Callable[[int], Experiment]
    options: ForkOptions


def options(steps: int, checkpoints: int = 4, tasks=("a", "b")) -> ForkOptions:
    """With an arm in which the second task weighs .2."""
    arms = {"low": {tasks[0]: 1.0, tasks[1]: 0.2}}
    return ForkOptions(steps=steps, checkpoints=checkpoints, horizon=20, arms=arms, controls=True)


PROBLEMS = [
    Problem("dial, angle 120", dial("dial:angle=120,noise=1"), options(192)),
    Problem("dial, angle 60", dial("dial:angle=60,noise=1"), options(192)),
    Problem("dial, angle 90, ratio .05, noise 4", dial("dial:angle=90,ratio=0.05,noise=4"), options(192)),
    Problem("dial, angle 150, ratio .5, noise 4", dial("dial:angle=150,ratio=0.5,noise=4"), options(192)),
    Problem("MLP, a has a plateau", mlp(), options(300, 6)),
    Problem("MLP", mlp(easy=True), options(300, 6)),
    Problem("MLP, b times 10", mlp(easy=True, scale=10), options(300, 6)),
    Problem("MLP, b has random labels", mlp(easy=True, random_labels=True), options(300, 6)),
    Problem("convolutions", conv(), options(300, 6, ("shape", "place"))),
]
PHANTOM = Problem(
    "phantom, YOLOv5n, 64 px",
    dial("phantom", imgsz=64, epochs=6),
    replace(options(144, 4, ("det", "cls")), without=("cls",), controls=False),
)


# ---- full trainings


class Unseen:
    """The trace of a step at which nobody looks."""

    def losses(self, losses):
        return losses

    def decide(self, name, value):
        return value


POINTS = 24
"""Of the course of a whole training."""


def trained(make, seed: int, weights: dict[str, float], steps: int) -> np.ndarray:
    """Held-out losses (T, POINTS + 1) along a whole training with static weights, from before its first step."""
    one, made = make(seed), 0
    names = tuple(one.weights)

    def losses():
        kept = {name: tensor.clone() for name, tensor in one.model.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            found = [float(v) for v in map(one.evaluate(names).get, names)]
            for name, tensor in one.model.named_buffers():
                tensor.copy_(kept[name])
        return found

    course = [losses()]
    while made < steps:
        for batch in one.batches(names) if callable(one.batches) else one.batches:
            one.step(Unseen(), batch, weights)
            made += 1
            if made * POINTS // steps == len(course):
                course.append(losses())
            if made == steps:
                break
    return np.array(course).T


def part_of_steps(slower: np.ndarray, faster: np.ndarray) -> float:
    """The part of its steps that a training loses: 1 - n, where the faster one needs n of them to come as far.

    Below 0 where the slower one is the faster one. On the lowest loss so far, with straight lines between the points.
    """
    low, other = (np.minimum.accumulate(course) for course in (slower, faster))
    if low[-1] < other[-1]:
        return -part_of_steps(faster, slower)
    at = int(np.argmax(other <= low[-1]))
    before = 0.0 if at == 0 else (other[at - 1] - low[-1]) / (other[at - 1] - other[at])
    return 1 - (max(at - 1, 0) + before) / (len(other) - 1)


@dataclass
class Outcome:
    """Of a pair i <- j, over seeds: R, what a whole training loses, and what the arm gives back of each."""

    lost: np.ndarray
    whole: np.ndarray
    steps: np.ndarray
    given_back: np.ndarray
    whole_given_back: np.ndarray
    undefined: str
    by_direction: np.ndarray | None
    by_direction_alone: np.ndarray | None


def outcomes(problem: Problem, seeds: int) -> tuple[dict[tuple[str, str], Outcome], float]:
    """(i, j) -> what was found; and what shadows cost."""
    found, whole = [], []
    for seed in range(seeds):
        joint = {task: float(w) for task, w in problem.make(seed).weights.items()}
        found.append(fork(lambda seed=seed: problem.make(seed), problem.options))
        removed = problem.options.without or joint
        arms = {"joint": joint, **{j: {**joint, j: 0.0} for j in removed}, **problem.options.arms}
        whole.append({name: trained(problem.make, seed, w, problem.options.steps) for name, w in arms.items()})
        print(f"  {problem.name}: seed {seed}", file=sys.stderr, flush=True)
    pairs = {}
    for lost in over_seeds(found):
        place = found[0].tasks.index(lost.task)
        joint, alone, arm = (np.array([w[name][place] for w in whole]) for name in ("joint", lost.by, "low"))
        own = alone[:, 0] - alone[:, -1]
        pairs[lost.task, lost.by] = Outcome(
            lost.lost,
            (joint - alone)[:, -1] / own,
            np.array([part_of_steps(*courses) for courses in zip(joint, alone, strict=True)]),
            lost.given_back["low"],
            (joint - arm)[:, -1] / own,
            lost.undefined,
            lost.by_direction,
            lost.by_direction_alone,
        )
    return pairs, float(np.median([f.shadow_cost for f in found]))


# ---- tables


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values) -> str:
    mean, low_end, high = (float(v) for v in t_interval(values))
    return "undefined" if mean != mean else f"{mean:.3f} ({low_end:.3f} to {high:.3f})"


def correlation(a, b) -> str:
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3 or min(np.std(a[known]), np.std(b[known])) < 1e-6:
        return "-"
    return f"{np.corrcoef(a[known], b[known])[0, 1]:.2f}"


def agreement(a, b) -> str:
    """In how many seeds both have one sign."""
    known = np.isfinite(a) & np.isfinite(b)
    return f"{int((np.sign(a[known]) == np.sign(b[known])).sum())} of {int(known.sum())}"


def outcome(found: dict) -> str:
    """R against whole trainings of the same seeds, joint and with weight 0 for j from their beginning.

    Part of the loss: ``(L_joint - L_without j) / (L_before - L_without j)`` of the held-out losses after the last step.
    Part of the steps: 1 - n, where the training without j needs n of its steps to come as far as the joint one. Means
    over seeds and their 95 % intervals; r is the correlation of R with the part of the loss over a problem's seeds.
    """
    rows = [
        [
            *(problem, f"{i} to {j}", interval(o.lost), interval(o.whole), interval(o.steps)),
            *(agreement(o.lost, o.whole), correlation(o.lost, o.whole)),
        ]
        for problem, (pairs, _) in found.items()
        for (i, j), o in pairs.items()
    ]
    return table(["problem", "task loses to", "R", "part of the loss", "part of the steps", "same sign", "r"], rows)


def arms(found: dict) -> str:
    """What an arm gives back, in which the second task weighs .2: by R, and by whole trainings with those weights."""
    rows = [
        [
            *(problem, f"{i} to {j}", interval(o.given_back), interval(o.whole_given_back)),
            *(agreement(o.given_back, o.whole_given_back), correlation(o.given_back, o.whole_given_back)),
        ]
        for problem, (pairs, _) in found.items()
        for (i, j), o in pairs.items()
    ]
    return table(["problem", "task loses to", "R given back", "outcome given back", "same sign", "r"], rows)


def across(found: dict) -> str:
    """Over all pairs of all problems, means over their seeds: how R goes with the outcome.

    The dial has straight lines for losses, and there R and the outcome are nearly one number; so the others stand alone
    as well. The distance is that of the means, without its sign.
    """
    rows = []
    for which in ("all", "without the dial"):
        every = [
            o
            for problem, (pairs, _) in found.items()
            for o in pairs.values()
            if not o.undefined and (which == "all" or not problem.startswith("dial"))
        ]
        for name, mine, whole in (
            ("lost, part of the loss", "lost", "whole"),
            ("lost, part of the steps", "lost", "steps"),
            ("given back, part of the loss", "given_back", "whole_given_back"),
        ):
            a, b = (np.array([getattr(o, each).mean() for o in every]) for each in (mine, whole))
            slope = np.polyfit(a, b, 1)[0] if len(a) > 2 else np.nan
            rows.append(
                [
                    *(which, name, str(len(every)), correlation(a, b), f"{slope:.2f}"),
                    *(agreement(a, b), f"{np.abs(a - b).mean():.2f}"),
                ]
            )
    return table(["problems", "outcome", "pairs", "r", "slope", "same sign", "mean distance"], rows)


def controls(found: dict) -> str:
    """What of R is direction, under Adam. With b: steps as long as j's second moment makes them, before and after.

    Without it: j has no part in the second moment, before and after. The rest of R in each column is the step's length.
    """
    rows = [
        [problem, f"{i} to {j}", interval(o.lost), interval(o.by_direction), interval(o.by_direction_alone)]
        for problem, (pairs, _) in found.items()
        for (i, j), o in pairs.items()
        if o.by_direction is not None
    ]
    columns = ["problem", "task loses to", "R", "by direction, with j's second moment", "by direction, without it"]
    return table(columns, rows)


def cost(found: dict) -> str:
    """Time of a step that keeps shadow moments, over that of a plain step in the same run."""
    return table(["problem", "ratio"], [[name, f"{ratio:.2f}"] for name, (_, ratio) in found.items()])


NULLS = {
    "orthogonal straight lines, SGD with momentum": dial(
        "dial:angle=90,noise=1", optimizer="SGD", lr=2e-3, weight_decay=0.0
    ),
    "the same, noise 4": dial("dial:angle=90,noise=4", optimizer="SGD", lr=2e-3, weight_decay=0.0),
}
EXACT = {
    "no gradient, AdamW": mlp(easy=True, scale=0.0),
    "the same task twice, AdamW": mlp(easy=True, twice=True),
}


def nulls(trainings: int) -> str:
    """A task takes nothing: how often the 95 % interval of R over the seeds of a study excludes 0. The rate is 5 %.

    Orthogonal straight lines share their parameters and their batches, and neither changes the other's loss but by
    noise. R is over all trainings; the outcome is that of forty whole trainings of as many steps, part of the loss.
    """
    rows = []
    for name, make in NULLS.items():
        steps = 60
        found = [fork(lambda seed=seed, make=make: make(seed), ForkOptions(steps, 4, 10)) for seed in range(trainings)]
        whole = {}
        for which, weights in (("joint", (1.0, 1.0)), ("b", (1.0, 0.0)), ("a", (0.0, 1.0))):
            static = dict(zip("ab", weights, strict=True))
            whole[which] = np.array(
                [trained(make, seed, static, steps)[:, [0, -1]] for seed in range(min(40, trainings))]
            )
        for place, lost in enumerate(over_seeds(found)):
            cells = []
            for size in (3, 5, 8):
                studies = [found[k : k + size] for k in range(0, len(found) - size + 1, size)]
                _, low_end, high = t_interval([over_seeds(study)[place].lost for study in studies])
                cells.append(f"{100 * float(((low_end > 0) | (high < 0)).mean()):.1f} % of {len(studies)}")
            joint, alone = (whole[which][:, "ab".index(lost.task)] for which in ("joint", lost.by))
            outcome_of = (joint - alone)[:, 1] / (alone[:, 0] - alone[:, 1])
            rows.append([name, f"{lost.task} to {lost.by}", interval(lost.lost), *cells, interval(outcome_of)])
    return table(["null", "task loses to", "R", "3 seeds", "5 seeds", "8 seeds", "outcome"], rows)


def exact() -> str:
    """A task that has no gradient, and one that is the other's copy: R is 0 to rounding. The largest of eight seeds."""
    rows = []
    for name, make in EXACT.items():
        found = [fork(lambda seed=seed, make=make: make(seed), ForkOptions(200, 4, 20)) for seed in range(8)]
        lost = next(each for each in over_seeds(found) if each.by == "b")
        rows.append([name, f"{lost.task} to {lost.by}", f"{np.abs(lost.lost).max():.1g}"])
    return table(["null", "task loses to", "largest R"], rows)


def horizon(seeds: int) -> str:
    """R of branches of other lengths."""
    rows = []
    for problem in (PROBLEMS[0], PROBLEMS[2], PROBLEMS[5], PROBLEMS[8]):
        cells = {}
        for steps in (5, 20, 40):
            chosen = ForkOptions(max(problem.options.steps, 200), 4, steps)
            found = [fork(lambda seed=seed, problem=problem: problem.make(seed), chosen) for seed in range(seeds)]
            for lost in over_seeds(found):
                cells.setdefault((lost.task, lost.by), []).append(interval(lost.lost))
        rows += [[problem.name, f"{i} to {j}", *found] for (i, j), found in cells.items()]
    return table(["problem", "task loses to", "5 steps", "20 steps", "40 steps"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="nulls,outcome", help="some of nulls,outcome,horizon,phantom")
    parser.add_argument("--trainings", type=int, default=300, help="of each null")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="into docs/validity.md")
    chosen = parser.parse_args()
    began, parts, wanted = time.perf_counter(), [], chosen.only.split(",")
    if "nulls" in wanted:
        parts += [titled(exact, exact()), titled(nulls, nulls(chosen.trainings))]
    if "outcome" in wanted:
        found = {problem.name: outcomes(problem, chosen.seeds) for problem in PROBLEMS}
        parts += [titled(section, section(found)) for section in (outcome, arms, across, controls, cost)]
    if "phantom" in wanted:  # some minutes per seed
        found = {PHANTOM.name: outcomes(PHANTOM, chosen.seeds)}
        parts += [section(found) for section in (outcome, arms, cost)]
    if "horizon" in wanted:
        parts.append(titled(horizon, horizon(chosen.seeds)))
    text = "\n\n".join(parts)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if chosen.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def titled(section: Callable, found: str) -> str:
    return f"{inspect.getdoc(section)}\n\n{found}"


if __name__ == "__main__":
    main()
