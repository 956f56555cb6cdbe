"""`gradprobe fork`: how much of a task's own progress another takes, from branches of one training."""

from __future__ import annotations

import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from gradprobe import whole_files
from gradprobe.cli.audit import bundled_plan, refuse_flags
from gradprobe.cli.command_options import Hyp, Preset, Source, given, takes_settings
from gradprobe.cli.console import number, stderr, stdout, titled_table
from gradprobe.cli.request import Request
from gradprobe.errors import UsageError
from gradprobe.named_code import named_function
from gradprobe.trainers.problems import problem_of

if TYPE_CHECKING:
    from gradprobe.audit.experiment import Factory
    from gradprobe.forks import ForkedTraining, LostProgress

_PANEL = "Fork"


@takes_settings(audit=True)
def fork(
    target: Annotated[
        str,
        typer.Argument(metavar="[MODULE:FACTORY]", help="A function that returns an experiment; none: the bundled."),
    ] = "",
    steps: Annotated[int, Option(help="Of the training.", rich_help_panel=_PANEL)] = 200,
    checkpoints: Annotated[int, Option(help="Of it, from which branches are taken.", rich_help_panel=_PANEL)] = 4,
    horizon: Annotated[int, Option(help="Steps of a branch.", rich_help_panel=_PANEL)] = 20,
    seeds: Annotated[int, Option(help="Trainings, of --seed and those after it.", rich_help_panel=_PANEL)] = 3,
    task: Annotated[
        list[str] | None,
        Option(help="A task that branches do without; several times. [default: each]", rich_help_panel=_PANEL),
    ] = None,
    arm: Annotated[
        list[str] | None,
        Option(metavar="NAME=WEIGHTS", help="A branch with others, such as low=det=1,cls=0.1.", rich_help_panel=_PANEL),
    ] = None,
    controls: Annotated[
        bool,
        Option("--controls", help="Also part direction from length of step, under Adam.", rich_help_panel=_PANEL),
    ] = False,
    out: Annotated[Path | None, Option(help="Write all numbers into this JSON file.", rich_help_panel=_PANEL)] = None,
    source: Source = None,
    preset: Preset = "",
    hyp: Hyp = None,
    **flags: Any,
) -> int:
    """Measure how much of a task's own progress another task takes, and what other weights give back.

    Takes short branches from checkpoints of one training, on the same batches, each with the optimizer history of its
    own weights.

    Example: gradprobe fork --data dial:angle=120,noise=1 --arm low=a=1,b=0.1 --seeds 5 --out forks.json
    """
    from gradprobe.forks import ForkOptions, over_seeds
    from gradprobe.forks import fork as take_branches

    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1.")
    request = Request(given(flags), preset=preset, hyp=hyp, source=source)
    if out is not None:
        with whole_files.telling(out):
            whole_files.target(out)
        out = out.absolute()  # the experiment may change its folder
    options = ForkOptions(steps, checkpoints, horizon, tuple(task or ()), _arms(arm or ()), controls)
    began, found = time.perf_counter(), []
    makers = _of_named(target, request, seeds) if target else _of_bundled(request, seeds)
    for seed, make in makers:
        found.append(take_branches(make(), options, progress=partial(_say, seed)))
    lost = over_seeds(found)
    _show(found, lost, time.perf_counter() - began)
    if out is not None:
        with whole_files.telling(out):
            whole_files.write(out, json.dumps(_as_plain([seed for seed, _ in makers], found, lost), indent=1) + "\n")
        stdout().print(str(out), soft_wrap=True)
    return 0


def _say(seed: int, what: str) -> None:
    stderr().print(f"seed {seed}: {what}", style="dim")


def _arms(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, weights in map(_arm, texts):
        if name in found:
            raise UsageError(f"--arm: {name!r} is given twice.")
        found[name] = weights
    return found


def _arm(text: str) -> tuple[str, dict[str, float]]:
    """``low=det=1,cls=0.1`` as a name and weights.

    >>> _arm("low=det=1,cls=0.1")
    ('low', {'det': 1.0, 'cls': 0.1})
    """
    name, _, weights = text.partition("=")
    pairs = [item.partition("=") for item in weights.split(",")]
    try:
        if not name.strip() or len({task for task, _, _ in pairs}) != len(pairs):
            raise ValueError
        return name.strip(), {task.strip(): float(value) for task, _, value in pairs}
    except ValueError:
        raise UsageError(f"--arm {text!r}: write a name and a weight for every task, low=det=1,cls=0.1.") from None


_Makers = Sequence[tuple[int, Callable[[], "Factory"]]]


def _of_named(target: str, request: Request, seeds: int) -> _Makers:
    """Seed -> a factory, of the user's function, which may take ``seed``.

    Raises:
        UsageError: It takes none, and several were asked for.
    """
    first = request.flags.get("seed")
    refuse_flags(target, dataclasses.replace(request, flags={**request.flags, "seed": None}))
    make = named_function(target)
    if "seed" in inspect.signature(make).parameters:
        return [(seed, partial(partial, make, seed=seed)) for seed in range(first or 0, (first or 0) + seeds)]
    if seeds > 1 or first is not None:
        raise UsageError(
            f"{target} takes no seed, so all trainings would be one; let it take a keyword `seed` that decides weights "
            "and data order, or say --seeds 1 without --seed."
        )
    return [(0, lambda: make)]


def _of_bundled(request: Request, seeds: int) -> _Makers:
    from gradprobe.trainers import audited

    plan = bundled_plan(request)

    def make(seed: int) -> Factory:
        settings = dataclasses.replace(plan.settings, seed=seed)
        return audited.experiment_factory(settings, problem_of(settings).load(settings), plan.hyp, evaluated=None)

    return [(seed, partial(make, seed)) for seed in range(plan.settings.seed, plan.settings.seed + seeds)]


# ---- what is printed and written


def _interval(values: Any) -> str:
    """A mean over seeds and its 95 % interval."""
    from gradprobe.statistics import t_interval

    mean, low, high = (float(v) for v in t_interval(values))
    if mean != mean:
        return "-"
    return number(mean) if low != low else f"{number(mean)} ({number(low)} to {number(high)})"


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"


def _show(found: Sequence[ForkedTraining], lost: Sequence[LostProgress], seconds: float) -> None:
    first, console = found[0], stdout()
    controls = lost[0].by_direction is not None
    columns = ["task", "loses to", "own progress", "of which lost", "in units of loss"]
    columns += ["by direction", "the same, step of its own"] if controls else []
    rows = [
        [each.task, each.by, _interval(each.own), _interval(each.lost), _interval(each.cost)]
        + ([_interval(each.by_direction), _interval(each.by_direction_alone)] if controls else [])
        + [_interval(each.given_back[name]) for name in first.arms]
        for each in lost
    ]
    title = (
        f"{_count(len(found), 'training')}, {_count(len(first.places), 'checkpoint')}, "
        f"branches of {first.horizon} steps: means over seeds, 95 %"
    )
    console.print(titled_table(title, [*columns, *(f"{name} gives back" for name in first.arms)], rows, names=2))
    for each in lost:
        if each.undefined:
            console.print(f"{each.task} to {each.by}: undefined, {each.undefined}.", soft_wrap=True)
    cost = max(training.shadow_cost for training in found)
    error = max(training.state_error for training in found)
    if twice := max(training.same_twice for training in found):
        console.print(
            f"A branch that changes nothing ended up to {twice:.2g} of a loss's movement beside the training: so much "
            "of every difference is chance.",
            soft_wrap=True,
        )
    console.print(
        f"A step with shadow moments took {cost:.2g} times a plain one. Their state was {error:.1g} of the optimizer's "
        f"away from it. {seconds:.0f} s in all.",
        soft_wrap=True,
    )


def _as_plain(seeds: Sequence[int], found: Sequence[ForkedTraining], lost: Sequence[LostProgress]) -> dict[str, Any]:
    """All of it as what JSON can hold; numbers that are not finite are null."""
    first = found[0]
    return {
        "format": "gradprobe forks 1",
        "tasks": list(first.tasks),
        "weights": first.weights,
        "steps_before_checkpoints": first.places,
        "horizon": first.horizon,
        "arms": list(first.arms),
        "trainings": [
            {
                "seed": seed,
                "start": _plain(each.start),
                "joint": _plain(each.joint),
                "branches": {name: _plain(losses) for name, losses in each.branches.items()},
                "shadow_cost": _plain(each.shadow_cost),
                "state_error": each.state_error,
                "same_twice": each.same_twice,
            }
            for seed, each in zip(seeds, found, strict=True)
        ],
        "pairs": [{key: _plain(value) for key, value in dataclasses.asdict(each).items()} for each in lost],
    }


def _plain(value: Any) -> Any:
    """Lists for arrays, and null for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
