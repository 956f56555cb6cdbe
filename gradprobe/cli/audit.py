"""`gradprobe audit`: how a task with weight 0 can still change another."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from gradprobe import whole_files
from gradprobe.cli import GATE_TRIPPED
from gradprobe.cli.command_options import Hyp, Preset, Source, flag_of, given, takes_settings
from gradprobe.cli.console import stderr, stdout
from gradprobe.cli.request import Plan, Request, make_plan
from gradprobe.errors import UsageError
from gradprobe.named_code import named_function
from gradprobe.plots import FORMATS
from gradprobe.trainers.problems import problem_of

if TYPE_CHECKING:
    from gradprobe.audit import Audit


@takes_settings(audit=True)
def audit(
    target: Annotated[
        str,
        typer.Argument(metavar="[MODULE:FACTORY]", help="A function that returns an experiment; none: the bundled."),
    ] = "",
    task: Annotated[str, Option(help="The task to remove.", rich_help_panel="Audit")] = "cls",
    weight: Annotated[float, Option(help="Its weight in the training that keeps it.", rich_help_panel="Audit")] = 0.0,
    steps: Annotated[int, Option(help="Steps in lockstep.", rich_help_panel="Audit")] = 30,
    dose: Annotated[bool, Option("--dose", help="Also run weights from 0 to 1.", rich_help_panel="Audit")] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print one JSON object, for programs.", rich_help_panel="Audit")
    ] = False,
    figure: Annotated[
        Path | None, Option(help="Draw the divergence over steps: png, svg or pdf.", rich_help_panel="Audit")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Write what was found into this new run file, under audit/.", rich_help_panel="Audit")
    ] = None,
    fail_on: Annotated[
        str,
        Option(metavar="CLASS", help="Exit with 10 if it is at least: numeric, material.", rich_help_panel="Audit"),
    ] = "",
    source: Source = None,
    preset: Preset = "",
    hyp: Hyp = None,
    **flags: Any,
) -> int:
    """Find how a task still changes the others when its weight is 0.

    Trains twice from one state, with the task and without it, compares bitwise, and shuts doors until both are equal.

    Example: gradprobe audit --data data.yaml --task cls --clip-norm 10
    """
    from gradprobe.audit import CLASSES, AuditOptions
    from gradprobe.audit import audit as examine
    from gradprobe.audit.whole_audit import audit_as_plain

    if fail_on and fail_on not in CLASSES[1:]:
        raise UsageError(f"--fail-on {fail_on!r}: one of {', '.join(CLASSES[1:])}.")
    request = Request(given(flags), preset=preset, hyp=hyp, source=source)
    if target:
        refuse_flags(target, request)
    if out is not None:
        if out.exists():
            raise UsageError(f"--out {out}: exists already; the audit writes a new file.")
        out = _place(out, "--out")
    if figure is not None:
        _check_format(figure)
        figure = _place(figure, "--figure")
    make = named_function(target) if target else _bundled(request)
    found = examine(make, task, AuditOptions(steps=steps, weight=weight, dose=dose), progress=_progress())
    written = _written(found, figure, out)
    if as_json:
        print(json.dumps(audit_as_plain(found), indent=2))
    else:
        _show(found, written)
    reached = CLASSES.index(found.outcome.kind) >= CLASSES.index(fail_on) if fail_on else False
    return GATE_TRIPPED if reached else 0


def refuse_flags(target: str, request: Request) -> None:
    """A factory makes its own training.

    Raises:
        UsageError: A flag is of the bundled one.
    """
    others = ("preset", "hyp", "source")
    found = sorted([k for k, v in request.flags.items() if v is not None] + [k for k in others if getattr(request, k)])
    if found:
        raise UsageError(f"{target} makes its own training; {flag_of(found[0])} is for the bundled one.")


def _place(path: Path, flag: str) -> Path:
    """Absolute, as the experiment may change its folder; a file can be there."""
    from gradprobe.runfile import audits

    with whole_files.telling(path, flag):
        (audits.place if flag == "--out" else whole_files.target)(path)
    return path.absolute()


def _check_format(figure: Path) -> None:
    """Before minutes of training, and not after.

    Raises:
        UsageError: Such a figure cannot be drawn.
    """
    if figure.suffix[1:].lower() not in FORMATS:
        raise UsageError(f"--figure {figure}: no figure format {figure.suffix!r}; take one of: {', '.join(FORMATS)}.")


def _bundled(request: Request) -> Any:
    from gradprobe.trainers import audited

    plan = bundled_plan(request)
    return audited.experiment_factory(plan.settings, problem_of(plan.settings).load(plan.settings), plan.hyp)


def bundled_plan(request: Request) -> Plan:
    """What the flags of a bundled training ask for, with the settings that an experiment takes; joint by default."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from gradprobe.trainers import audited

    trainer = request.flags["trainer"] or (None if request.preset else "joint")
    audited.check_auditable(trainer)
    plan = make_plan(dataclasses.replace(request, flags={**request.flags, "trainer": trainer}))
    for note in plan.notes:
        stderr().print(f"note: {note}")
    return dataclasses.replace(plan, settings=audited.audit_settings(plan.settings))


def _progress() -> Any:
    console = stderr()
    return lambda what: console.print(what, style="dim")


def _written(found: Audit, figure: Path | None, out: Path | None) -> list[Path]:
    written = []
    if figure is not None:
        from gradprobe.plots import divergence

        written += divergence.write(found.curves(), found.sentence, figure)
    if out is not None:
        from gradprobe.audit.whole_audit import audit_as_plain
        from gradprobe.environment import argv, environment
        from gradprobe.runfile import audits

        about = {"trainer": "audit", "argv": argv(), **environment()}
        written.append(audits.write(out, audit_as_plain(found), about))
    return written


def _show(found: Audit, written: list[Path]) -> None:
    from rich.table import Table

    from gradprobe.audit.whole_audit import AUDIT_COLUMNS, audit_lines, audit_rows

    console = stdout()
    table = Table()
    for column in AUDIT_COLUMNS:
        table.add_column(column, overflow="fold")  # in a narrow terminal, names of tensors are broken and not cut
    for row in audit_rows(found):
        table.add_row(*row, style="bold" if row[1] == "open" else None)
    if found.attribution is not None:
        console.print(table)
    for text in (*audit_lines(found), *map(str, written)):
        console.print(text, soft_wrap=True)
