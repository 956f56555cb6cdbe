"""`gradprobe replay`: what other methods would have done at the recorded steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradprobe.cli.command_options import AsJson, RunFile
from gradprobe.cli.console import stdout, titled_table
from gradprobe.errors import RunFileError, UsageError
from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message
from gradprobe.trainers.settings import Settings

if TYPE_CHECKING:
    from gradprobe.measures import Array
    from gradprobe.runfile import Run
    from gradprobe.verdict.replayed import Method, Replayed


def replay(
    file: RunFile,
    method: Annotated[
        str, typer.Option(help="pcgrad, cagrad, mgda, upgrad, imtl, aligned, fairgrad, gradnorm; with commas between.")
    ] = "pcgrad,cagrad,mgda,gradnorm",
    out: Annotated[
        Path | None, typer.Option(help="Where the figure goes.", show_default="FILE-replay.png in the run's folder")
    ] = None,
    figure: Annotated[bool, typer.Option("--figure/--no-figure", help="Draw, with the numbers as CSV.")] = True,
    as_json: AsJson = False,
) -> None:
    """Ask methods for their weights at every recorded step, from the recorded Gramians alone.

    Example: gradprobe replay conflict.h5 --method pcgrad,cagrad,mgda,gradnorm
    """
    from gradprobe.runfile import Run, thin
    from gradprobe.verdict.replayed import medians_by_task

    names = list(dict.fromkeys(part.strip() for part in method.split(",") if part.strip()))
    with Run(file) as whole:
        run = thin.thin(whole)
        replayed = replay_run(run, names)
        rows, notes = medians_by_task(replayed, run.tasks), _notes(run, names)
        written = []
        if figure:
            from gradprobe.plots.figure import write_drawn
            from gradprobe.plots.method_effects import draw

            written = write_drawn(
                *draw(run, replayed), out or file.with_name(f"{file.name.removesuffix('.h5')}-replay.png")
            )
    if as_json:
        print(
            json.dumps({"file": file.name, "methods": rows, "notes": list(map(str, notes))}, indent=2, allow_nan=False)
        )
        return
    _show(rows, notes, written)


def _notes(run: Any, names: list[str]) -> list[Message]:
    notes = [Message("replay.reading")]
    steps = run["step"]
    if "gradnorm" in names and len(steps) > 1 and int(steps[-1] - steps[0]) != len(steps) - 1:
        notes.append(Message("replay.gradnorm", n=len(steps), steps=int(steps[-1]) + 1))
    return notes


def _show(rows: list[dict[str, Any]], notes: list[Message], written: list[Path]) -> None:
    keys = ("weight", "progress", "change", "harmed", "length")
    columns = [SAY("replay.method"), SAY("column.task"), *(SAY(f"replay.{name}") for name in keys)]
    cells = []
    for row in rows:
        medians = [SAY.number(value) for value in (row["weight"], row["progress"], row["change"]["median"])]
        cells.append([row["method"], row["task"], *medians, SAY.percent(row["harmed"]), SAY.number(row["length"])])
    console = stdout()
    console.print(titled_table(SAY("replay.title"), columns, cells, names=2))
    for text in (*notes, *written):
        console.print(str(text), soft_wrap=True)


def replay_run(run: Run, names: list[str]) -> list[Replayed]:
    """The recorded weights, the joint step's, and those of every method.

    Args:
        run: Of a long one give a thin one.
        names: Stateless methods of gradient surgery, and ``gradnorm``.

    Raises:
        UsageError: A method is unknown, or keeps state that rows do not tell.
        MissingExtraError: TorchJD is not installed.
        RunFileError: No row was measured, or the tasks share no layer.
    """
    import numpy as np

    from gradprobe import measures
    from gradprobe.verdict import replayed

    _check_methods(names)
    if not len(run) or not run.layers:
        what = "has no rows" if not len(run) else "its tasks share no layer: there is no interference to treat"
        raise RunFileError(f"{run.path}: {what}, so there is nothing to replay.")
    gram = measures.over_rows(run.gram(), run.counts())
    static = np.array(_setting(run, "task_weights", [1.0] * len(run.tasks)), dtype=np.float64)
    fixed = [("recorded", run["weight"].astype(np.float64)), ("joint", np.tile(static, (len(gram), 1)))]
    done = [replayed.effect(name, gram, static, weight) for name, weight in fixed]
    try:
        return done + [replayed.replay(name, gram, static, _method(run, name, gram, static)) for name in names]
    except ValueError as error:  # a learning rate below 0, and the like
        raise RunFileError(f"{run.path}: its settings cannot be replayed ({error}).") from None


def _check_methods(names: list[str]) -> None:
    """Whether all can be asked.

    Raises:
        UsageError: One cannot.
    """
    from gradprobe.trainers.weightings import METHODS, STATEFUL_METHODS

    known = [name for name in METHODS if name not in STATEFUL_METHODS] + ["gradnorm"]
    if not names:
        raise UsageError(f"--method names none (there are: {', '.join(known)}).")
    for name in names:
        if name in STATEFUL_METHODS:
            raise UsageError(
                f"--method {name}: its weights depend on all steps before, not only on the recorded ones; "
                f"record it live: --trainer {name}"
            )
        if name not in known:
            raise UsageError(f"--method {name}: unknown (there are: {', '.join(known)}).")


def _setting(run: Run, name: str, default: Any) -> Any:
    """A setting of the recording; ``default`` where it has none, as runs of `gradprobe.attach`.

    Raises:
        RunFileError: It is of another kind than the default; the file may be a stranger's.
    """
    value = run.provenance.get(f"settings.{name}", default)
    numbers = value if isinstance(default, list) and isinstance(value, list) else [value]
    kinds = (str,) if isinstance(default, str) else (int, float)
    alike = isinstance(value, list) == isinstance(default, list) and all(isinstance(each, kinds) for each in numbers)
    if isinstance(default, list) and len(numbers) != len(default):
        alike = False
    if isinstance(default, int) and not (alike and math.isfinite(value) and value == int(value) and 0 <= value < 2**63):
        alike = False
    if not alike or any(isinstance(each, float) and math.isnan(each) for each in numbers):
        raise RunFileError(f"{run.path}: settings.{name} is {repr(value)[:80]}, which it cannot be.")
    return value


def _method(run: Run, name: str, gram: Array, static: Array) -> Method:
    if name == "gradnorm":
        answers = list(_gradnorm(run, static))
        return answers.__getitem__
    from gradprobe.trainers.surgery import choose
    from gradprobe.trainers.weightings import Weighting

    defaults = Settings()
    weighting = Weighting(
        name,
        len(run.tasks),
        seed=_setting(run, "seed", 0),
        cagrad_c=_setting(run, "cagrad_c", defaults.cagrad_c),
    )
    match, steps = bool(_setting(run, "match_norm", True)), run["step"]
    return lambda row: choose(weighting, gram[row], int(steps[row]), static, match=match)


def _last_shared(run: Run) -> str:
    """The last layer on which every task, or else two, have had a gradient."""
    import numpy as np

    several = run.reach.sum(axis=1)
    for found in (run.reach.all(axis=1), several >= 2, several >= 0):
        if found.any():
            return run.layers[int(np.flatnonzero(found)[-1])]
    return run.layers[-1]


def _gradnorm(run: Run, static: Array) -> Iterator[Array | None]:
    """The weights at each row of a GradNorm that sees the recorded rows alone, one after the other."""
    import numpy as np
    import torch

    from gradprobe.trainers.gradnorm import GradNorm

    d = Settings()
    layer = _setting(run, "gradnorm_layer", "") or str(run.provenance.get("model.last_shared_layer", _last_shared(run)))
    chosen = run.layer_indices(layer)
    counts, square = run.counts()[:, chosen], np.square(run["grad_norm"].astype(np.float64)[:, chosen])
    norms = np.sqrt(np.where(counts.any(axis=1), np.where(counts, square, 0.0).sum(axis=1), np.nan))
    balancer = GradNorm(
        dict(zip(run.tasks, static.tolist(), strict=True)),
        [],
        alpha=_setting(run, "gradnorm_alpha", d.gradnorm_alpha),
        lr=_setting(run, "gradnorm_lr", d.gradnorm_lr),
        momentum=_setting(run, "gradnorm_momentum", d.gradnorm_momentum),
        total=_setting(run, "weight_sum", float(len(run.tasks))),
        lowest=_setting(run, "min_weight", d.min_weight),
        highest=_setting(run, "max_weight", d.max_weight),
    )
    for loss, norm in zip(run["loss"].astype(np.float64), norms, strict=True):
        yield np.array(list(balancer.weights().values()))
        balancer.advance(torch.from_numpy(loss), torch.from_numpy(norm))
