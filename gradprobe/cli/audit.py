"""`gradprobe audit`: how a task with weight 0 can still change another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import PRECISIONS, PRESETS, Settings

if TYPE_CHECKING:
    from gradprobe.audit import Audit
    from gradprobe.cli.recording import Request

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
    out: Annotated[Path | None, Option(help="Write what was found into this new run file, under audit/.")] = None,
    fail_on: Annotated[str, Option(metavar="CLASS", help="Leave with 10 if it is at least: numeric, material.")] = "",
    trainer: Annotated[
        str | None, Option(help=f"{', '.join(TRAINERS)}, or your own my_module:MyBalancer. [default: joint]")
    ] = None,
    source: Annotated[
        Path | None, Option("--from", help="An earlier run, for the trainers that are made from one.")
    ] = None,
    preset: Annotated[str, Option(help=f"A named configuration: {', '.join(PRESETS)}.")] = "",
    data: Annotated[str | None, Option(help=f"data.yaml, or phantom. [default: {D.data}]")] = None,
    cfg: Annotated[str | None, Option(help=f"YOLOv5 model. [default: {D.cfg}]")] = None,
    weights: Annotated[str | None, Option(help="Start from this state_dict (a .pt file).")] = None,
    hyp: Annotated[Path | None, Option(help="A YOLOv5 hyp yaml: loss gains and optimizer.")] = None,
    imgsz: Annotated[int | None, Option(help=f"Image size, a multiple of 32. [default: {D.imgsz}]")] = None,
    epochs: Annotated[int | None, Option(help=f"Of the learning rate's schedule. [default: {D.epochs}]")] = None,
    batch_size: Annotated[int | None, Option(help=f"[default: {D.batch_size}]")] = None,
    precision: Annotated[str | None, Option(help=f"{', '.join(PRECISIONS)}. [default: {D.precision}]")] = None,
    device: Annotated[str | None, Option(help=f"cpu, 0, mps. [default: {D.device}]")] = None,
    seed: Annotated[int | None, Option(help=f"Weights, data order, phantoms. [default: {D.seed}]")] = None,
    optimizer: Annotated[str | None, Option(help=f"AdamW or SGD. [default: {D.optimizer}]")] = None,
    lr: Annotated[float | None, Option(help=f"First learning rate. [default: {D.lr}]")] = None,
    lrf: Annotated[float | None, Option(help=f"Last one, as a fraction of it. [default: {D.lrf}]")] = None,
    momentum: Annotated[float | None, Option(help=f"SGD's, or AdamW's beta1. [default: {D.momentum}]")] = None,
    weight_decay: Annotated[float | None, Option(help=f"[default: {D.weight_decay}]")] = None,
    clip_norm: Annotated[float | None, Option(help="Clip the global gradient norm. [default: off]")] = None,
    task_weights: Annotated[
        str | None, Option(help="Such as det=1,cls=0.01; --weight is the audited task's. [default: 1 each]")
    ] = None,
    gradnorm_alpha: Annotated[float | None, Option(help=f"Pull to equal rates. [default: {D.gradnorm_alpha}]")] = None,
    gradnorm_lr: Annotated[float | None, Option(help=f"Of the weights' own Adam. [default: {D.gradnorm_lr}]")] = None,
    gradnorm_momentum: Annotated[float | None, Option(help=f"Its beta1. [default: {D.gradnorm_momentum}]")] = None,
    gradnorm_layer: Annotated[str | None, Option(help="W. [default: the last convolution of SPPF]")] = None,
    min_weight: Annotated[float | None, Option(help=f"GradNorm's lower bound. [default: {D.min_weight}]")] = None,
    max_weight: Annotated[float | None, Option(help="GradNorm's upper bound. [default: none]")] = None,
    weight_sum: Annotated[
        float | None, Option(help="What GradNorm's weights sum to. [default: number of tasks]")
    ] = None,
    dwa_temperature: Annotated[
        float | None, Option(help=f"Of dwa; larger is more even. [default: {D.dwa_temperature}]")
    ] = None,
    share_until: Annotated[
        str | None, Option(help="dual: the last layer of the trunk that stays shared. [default: none]")
    ] = None,
    top_k: Annotated[int | None, Option(help=f"split: how many layers to double. [default: {D.top_k}]")] = None,
    match_norm: Annotated[
        bool | None,
        Option(
            "--match-norm/--no-match-norm",
            help="Gradient surgery: a combined gradient as long as the joint one. [default: on]",
        ),
    ] = None,
    cagrad_c: Annotated[float | None, Option(help=f"Of cagrad. [default: {D.cagrad_c}]")] = None,
    micro_batches: Annotated[
        int | None, Option(help=f"Forwards per step, of equal parts of the batch. [default: {D.micro_batches}]")
    ] = None,
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
    from gradprobe.cli.factory import named_function
    from gradprobe.cli.recording import Request
    from gradprobe.errors import UsageError

    if fail_on and fail_on not in CLASSES[1:]:
        raise UsageError(f"--fail-on {fail_on!r}: one of {', '.join(CLASSES[1:])}.")
    flags = {
        k: v for k, v in locals().items() if k in Settings.__dataclass_fields__ and k not in ("task", "task_weights")
    }
    flags["skip_bad"] = skip_bad or None
    request = Request(flags, task_weights, preset, hyp, source=source)
    if target:
        _refuse_flags(target, request)
    if out is not None:
        if out.exists():
            raise UsageError(f"--out {out}: exists already; the audit writes a new file.")
        out = _place(out, "--out")
    if figure is not None:
        _check_format(figure)
        figure = _place(figure, "--figure")
    make = named_function(target) if target else _bundled(request)
    found = examine(make, task, Options(steps=steps, weight=weight, dose=dose), progress=_progress())
    written = _written(found, figure, out)
    if as_json:
        print(json.dumps(plain(found), indent=2))
    else:
        _show(found, written)
    reached = CLASSES.index(found.outcome.kind) >= CLASSES.index(fail_on) if fail_on else False
    return GATE_TRIPPED if reached else 0


def _refuse_flags(target: str, request: Request) -> None:
    """A factory makes its own training.

    Raises:
        UsageError: A flag is of the bundled one.
    """
    from gradprobe.errors import UsageError

    others = ("task_weights", "preset", "hyp", "source")
    given = sorted([k for k, v in request.flags.items() if v is not None] + [k for k in others if getattr(request, k)])
    if given:
        flag = "from" if given[0] == "source" else given[0].replace("_", "-")
        raise UsageError(f"{target} makes its own training; --{flag} is for the bundled one.")


def _place(path: Path, flag: str) -> Path:
    """Absolute, as the experiment may change its folder; a file can be there."""
    from gradprobe.runfile import audits
    from gradprobe.whole_files import target, telling

    with telling(path, flag):
        (audits.place if flag == "--out" else target)(path)
    return path.absolute()


def _check_format(figure: Path) -> None:
    """Before minutes of training, and not after.

    Raises:
        UsageError: Such a figure cannot be drawn.
    """
    from gradprobe.errors import UsageError
    from gradprobe.plots import FORMATS

    if figure.suffix[1:].lower() not in FORMATS:
        raise UsageError(f"--figure {figure}: no figure format {figure.suffix!r}; take one of: {', '.join(FORMATS)}.")


def _bundled(request: Request) -> Any:
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gradprobe.cli.recording import make_plan
    from gradprobe.trainers import audited
    from gradprobe.trainers.problems import problem_of

    trainer = request.flags["trainer"] or (None if request.preset else "joint")
    audited.check(trainer)
    plan = make_plan(dataclasses.replace(request, flags={**request.flags, "trainer": trainer}))
    settings = audited.forced(plan.settings)
    return audited.factory(settings, problem_of(settings).load(settings), plan.hyp)


def _progress() -> Any:
    from gradprobe.cli.console import stderr

    console = stderr()
    return lambda what: console.print(what, style="dim")


def _written(found: Audit, figure: Path | None, out: Path | None) -> list[Path]:
    written = []
    if figure is not None:
        from gradprobe.plots import divergence

        written += divergence.write(found.curves(), found.sentence, figure)
    if out is not None:
        from gradprobe.audit.report import plain
        from gradprobe.provenance import argv, environment
        from gradprobe.runfile import audits

        about = {"trainer": "audit", "argv": argv(), **environment()}
        written.append(audits.write(out, plain(found), about))
    return written


def _show(found: Audit, written: list[Path]) -> None:
    from rich.table import Table

    from gradprobe.audit.report import COLUMNS, lines, rows
    from gradprobe.cli.console import stdout

    console = stdout()
    table = Table()
    for column in COLUMNS:
        table.add_column(column, overflow="fold")  # in a narrow terminal, names of tensors are broken and not cut
    for row in rows(found):
        table.add_row(*row, style="bold" if row[1] == "open" else None)
    if found.attribution is not None:
        console.print(table)
    for text in (*lines(found), *map(str, written)):
        console.print(text, soft_wrap=True)
