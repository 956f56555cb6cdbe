"""`gradprobe doctor`: what would make a measurement wrong on a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradprobe.cli import GATE_TRIPPED
from gradprobe.cli.command_options import AsJson
from gradprobe.cli.console import stdout
from gradprobe.errors import GradprobeError, UsageError
from gradprobe.named_code import named_function

if TYPE_CHECKING:
    from gradprobe.probes.doctor import Finding


def doctor(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="A function that returns model and losses.")],
    as_json: AsJson = False,
    fail_on: Annotated[
        str, typer.Option(metavar="SEVERITY", help="Exit with 10 if there is one: error, warning or note.")
    ] = "",
) -> int:
    """Find what would make a measurement wrong on a model.

    FACTORY takes no arguments and returns (model, losses): the model in training mode, and task -> loss of one forward.

    Example: gradprobe doctor mytraining:make_case --json
    """
    from gradprobe.probes.doctor import SEVERITIES
    from gradprobe.probes.doctor import doctor as examine

    if fail_on and fail_on not in SEVERITIES:
        raise UsageError(f"--fail-on {fail_on!r}: one of {', '.join(SEVERITIES)}.")
    findings = examine(*_made(target))
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _show(findings)
    bad = SEVERITIES[: SEVERITIES.index(fail_on) + 1] if fail_on else ()
    return GATE_TRIPPED if any(finding.severity in bad for finding in findings) else 0


def _made(target: str) -> tuple[Any, Any]:
    from collections.abc import Mapping

    from torch import nn

    try:
        made = named_function(target)()
    except GradprobeError:
        raise
    except Exception as error:
        raise UsageError(f"{target}: {type(error).__name__}: {error}") from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and isinstance(made[1], Mapping):
        return made
    raise UsageError(f"{target} returned a {type(made).__name__}, not a model and a mapping of task to loss.")


def _show(findings: list[Finding]) -> None:
    console = stdout(soft_wrap=True)
    for finding in findings:
        console.print(str(finding))
    if not findings:
        console.print("nothing found")
