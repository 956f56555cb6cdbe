"""`gradprobe audit`: how a task with weight 0 can still change another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from gradprobe.trainers.settings import TRAINERS, Settings

if TYPE_CHECKING:
    from gradprobe.audit import Audit

D = Settings()
GATE_TRIPPED = 10


def audit(
    target: Annotated[
        str,
        typer.Argument(metavar="[MODULE:FACTORY]", help="A function that returns an experiment; none: the bundled."),
    ] = "",
    task: Annotated[str, Option(help="The task that is taken away.")] = "cls",
    weight: Annotated[float, Option(help="Its weight in the training that has it.")] = 0.0,
    steps: Annotated[int, Option(help="Steps in lockstep.")] = 30,
    dose: Annotated[bool, Option("--dose", help="Also run weights from 0 to 1.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object, for programs.")] = False,
    figure: Annotated[Path | None, Option(help="Draw the divergence over steps: png, svg or pdf.")] = None,
    out: Annotated[Path | None, Option(help="Write the rows into this new HDF5 file, under audit/.")] = None,
    fail_on: Annotated[str, Option(metavar="CLASS", help="Leave with 10 if it is at least: numeric, material.")] = "",
    trainer: Annotated[str, Option(help=f"{', '.join(TRAINERS)}.")] = "joint",
    data: Annotated[str | None, Option(help=f"data.yaml, or phantom. [default: {D.data}]")] = None,
    cfg: Annotated[str | None, Option(help=f"YOLOv5 model. [default: {D.cfg}]")] = None,
    weights: Annotated[str | None, Option(help="Start from this state_dict (a .pt file).")] = None,
    hyp: Annotated[Path | None, Option(help="A YOLOv5 hyp yaml: loss gains and optimizer.")] = None,
    imgsz: Annotated[int | None, Option(help=f"Image size, a multiple of 32. [default: {D.imgsz}]")] = None,
    batch_size: Annotated[int | None, Option(help=f"[default: {D.batch_size}]")] = None,
    device: Annotated[str | None, Option(help=f"cpu, 0, mps. [default: {D.device}]")] = None,
    seed: Annotated[int | None, Option(help=f"Weights, data order, phantoms. [default: {D.seed}]")] = None,
    optimizer: Annotated[str | None, Option(help=f"AdamW or SGD. [default: {D.optimizer}]")] = None,
    lr: Annotated[float | None, Option(help=f"First learning rate. [default: {D.lr}]")] = None,
    momentum: Annotated[float | None, Option(help=f"SGD's, or AdamW's beta1. [default: {D.momentum}]")] = None,
    weight_decay: Annotated[float | None, Option(help=f"[default: {D.weight_decay}]")] = None,
    clip_norm: Annotated[float | None, Option(help="Clip the global gradient norm. [default: off]")] = None,
    gradnorm_alpha: Annotated[float | None, Option(help=f"Pull to equal rates. [default: {D.gradnorm_alpha}]")] = None,
    gradnorm_lr: Annotated[float | None, Option(help=f"Of the weights' own Adam. [default: {D.gradnorm_lr}]")] = None,
    min_weight: Annotated[float | None, Option(help=f"GradNorm's lower bound. [default: {D.min_weight}]")] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave bad images out instead of refusing the data.")] = False,
) -> int:
    """Find how a task still changes the others when its weight is 0.

    Trains twice from one state, with the task and without it, compares bitwise, and shuts doors until both are equal.

    Example: gradprobe audit --data data.yaml --task cls --clip-norm 10
    """
    import json

    from gradprobe.audit import CLASSES, Options
    from gradprobe.audit import audit as examine
    from gradprobe.audit.report import plain
    from gradprobe.errors import UsageError

    if fail_on and fail_on not in CLASSES[1:]:
        raise UsageError(f"--fail-on {fail_on!r}: one of {', '.join(CLASSES[1:])}.")
    flags = {key: value for key, value in locals().items() if key in Settings.__dataclass_fields__}
    if target:
        given = sorted(k for k, v in flags.items() if v and k != "trainer")
        if given:
            raise UsageError(f"{target} makes its own training; --{given[0].replace('_', '-')} is for the bundled one.")
    if out is not None and out.exists():
        raise UsageError(f"--out {out}: exists already; the audit writes a new file.")
    make = _users(target) if target else _bundled(flags, hyp)
    found = examine(make, task, Options(steps=steps, weight=weight, dose=dose), progress=_progress())
    written = _written(found, figure, out)
    if as_json:
        print(json.dumps(plain(found), indent=2))
    else:
        _show(found, written)
    reached = CLASSES.index(found.outcome.kind) >= CLASSES.index(fail_on) if fail_on else False
    return GATE_TRIPPED if reached else 0


def _users(target: str) -> Any:
    from gradprobe.cli.factory import named_function

    return named_function(target)


def _bundled(flags: dict[str, Any], hyp: Path | None) -> Any:
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gradprobe.trainers import audited
    from gradprobe.trainers.data import load_data
    from gradprobe.trainers.hyp import read_hyp
    from gradprobe.trainers.settings import resolve

    file = read_hyp(hyp) if hyp is not None else None
    flags = {**flags, "skip_bad": flags["skip_bad"] or None}
    settings = audited.forced(resolve(flags, hyp=file.optimizer if file else None))
    loaded = load_data(settings.data, imgsz=settings.imgsz, seed=settings.seed, skip_bad=settings.skip_bad)
    return audited.factory(settings, loaded, file.loss if file else None)


def _progress() -> Any:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return lambda what: console.print(what, style="dim", markup=False, soft_wrap=True)


def _written(found: Audit, figure: Path | None, out: Path | None) -> list[Path]:
    written = []
    if figure is not None:
        from gradprobe.plots import divergence

        written += divergence.write(found.curves(), found.sentence, figure)
    if out is not None:
        from gradprobe.audit.report import plain
        from gradprobe.runfile import audits

        written.append(audits.write(out, plain(found)))
    return written


def _show(found: Audit, written: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gradprobe.audit.report import COLUMNS, lines, rows

    console = Console(highlight=False)
    table = Table(*COLUMNS)
    for row in rows(found):
        table.add_row(*row, style="bold" if row[1] == "open" else None)
    if found.attribution is not None:
        console.print(table)
    for text in (*lines(found), *map(str, written)):
        console.print(text, markup=False, soft_wrap=True)
