"""`gradprobe data`: write the embedded data set, or check one of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from gradprobe.trainers.data.check import CheckResult

app = typer.Typer(help="Write the embedded data set, or check one of your own.", no_args_is_help=True)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.")],
    n: Annotated[int, typer.Option("--n", help="Number of images, over train, val and test.")] = 1042,
    seed: Annotated[int, typer.Option("--seed", help="Which phantoms; the same on every machine.")] = 0,
) -> None:
    """Write colour-Doppler phantoms as a data set in YOLO format."""
    from gradprobe.trainers.data.phantom.writing import split_sizes, write_phantoms

    with Console(stderr=True).status(f"drawing {n} phantoms"):
        yaml = write_phantoms(folder, n, seed)
    sizes = ", ".join(f"{count} {split}" for split, count in split_sizes(n).items())
    typer.echo(yaml)
    typer.echo(f"{n} images ({sizes}). Next: gradprobe record --data {yaml}", err=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="DATA.YAML", help="A data set in YOLO format.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List everything wrong with a data set; exit 1 if anything keeps it from being trained on."""
    from gradprobe.trainers.data.check import check_data
    from gradprobe.trainers.data.findings import errors

    with Console(stderr=True).status(f"checking {file.name}"):
        result = check_data(file)
    if as_json:
        typer.echo(json.dumps(_as_dict(result), indent=2))
    else:
        _print(result)
    if errors(result.findings):
        raise typer.Exit(1)


def _as_dict(result: CheckResult) -> dict[str, object]:
    from gradprobe.trainers.data.findings import errors, warnings

    return {
        "file": result.config.file.name,
        "errors": len(errors(result.findings)),
        "warnings": len(warnings(result.findings)),
        "findings": [
            {"severity": each.severity, "file": each.file, "line": each.line, "message": each.message}
            for each in result.findings
        ],
        "splits": {split: counts.as_dict() for split, counts in result.counts.items()},
    }


def _print(result: CheckResult) -> None:
    from gradprobe.trainers.data.findings import errors, warnings

    console = Console(soft_wrap=True)
    console.print(_table(result))
    wrong, doubtful = errors(result.findings), warnings(result.findings)
    for finding in wrong + doubtful:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(f"[{style}]{finding.severity}[/{style}] {escape(str(finding))}", highlight=False)
    console.print(f"{_plural(len(wrong), 'error')}, {_plural(len(doubtful), 'warning')}", highlight=False)


def _table(result: CheckResult) -> Table:
    """Counts: a row per class, a column per split; classes that no split has are counted, not listed."""
    table = Table(title=escape(result.config.file.name), title_justify="left")
    table.add_column("")
    for split in result.counts:
        table.add_column(split, justify="right")
    counts = list(result.counts.values())
    table.add_row("images", *(str(each.images) for each in counts))
    table.add_row("  with errors", *(str(each.bad) for each in counts))
    table.add_row("  without an image class", *(str(each.no_image_class) for each in counts))
    table.add_row("  background (no box)", *(str(each.background) for each in counts))
    table.add_section()
    for name in result.image_names:
        table.add_row(f"images: {escape(name)}", *(str(each.image_classes[name]) for each in counts))
    table.add_section()
    present = [name for name in result.config.box_names if any(each.boxes[name] for each in counts)]
    for name in present:
        table.add_row(f"boxes: {escape(name)}", *(str(each.boxes[name]) for each in counts))
    if absent := len(result.config.box_names) - len(present):
        table.add_row(f"boxes: {_plural(absent, 'other class', 'other classes')}", *("0" for _ in counts))
    return table


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
