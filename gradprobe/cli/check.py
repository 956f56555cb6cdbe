"""`gradprobe check`: whether a run file is whole; and a new file of what can be saved of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradprobe.foreign import quoted

if TYPE_CHECKING:
    from gradprobe.runfile.integrity import CheckReport


def check(
    file: Annotated[Path, typer.Argument(help="The run file; its parts are found beside it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
    repair: Annotated[
        Path | None, typer.Option(help="Write what can be read of it into this new file.", metavar="OUT")
    ] = None,
) -> None:
    """Verify a run: every sum, every shape, steps that increase, numbers that can be.

    Exits with 0 where it is whole, 3 where something is damaged, missing or not ended (with --repair: where something
    was lost).

    Example: gradprobe check conflict.h5 --repair saved.h5
    """
    import json

    from gradprobe.runfile.integrity import check_run as verify

    checked = verify(file)
    report = checked if repair is None else _repaired(file, repair)
    lost = not checked.whole if repair is None else any(f.kind == "damaged" for f in report.findings)
    if as_json:
        found: dict[str, Any] = {"file": file.name, "whole": checked.whole, **asdict(checked)}
        print(json.dumps(found | {"repaired": None if repair is None else {"file": str(repair), **asdict(report)}}))
    else:
        _tell(file, checked)
        if repair is not None:
            print()
            _tell(
                repair,
                report,
                f"has {report.rows} rows from {len(report.files)} files; " + ("lost:" if lost else "nothing was lost"),
            )
    if lost:
        raise typer.Exit(3)


def _repaired(file: Path, out: Path) -> CheckReport:
    from gradprobe.runfile.repair import repair

    return repair(file, out)


def _tell(file: Path, report: CheckReport, verdict: str | None = None) -> None:
    if verdict is None:
        files = f"{len(report.files)} file" + "s" * (len(report.files) != 1)
        verdict = "is whole" if report.whole else "is not whole"
        verdict += f": {report.rows} rows in {files}" + (
            "" if report.whole else f". Try: gradprobe check {quoted(file)} --repair OUT"
        )
    print(f"{file} {verdict}")
    for finding in report.findings:
        print(f"  {finding.kind}: {finding.file}: {finding.what}")
