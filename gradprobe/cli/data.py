"""`gradprobe data`: write the embedded data set, or check one of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from gradprobe.cli.console import stderr, stdout

if TYPE_CHECKING:
    from gradprobe.trainers.data.check import CheckResult
    from gradprobe.trainers.data.clusters import Overlap

MOST = 10
"""Findings of a kind that are listed unless all are asked for."""

app = typer.Typer(help="Write the embedded data set, or check one of your own.", no_args_is_help=True)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.")],
    n: Annotated[int, typer.Option("--n", help="Number of images, over train, val and test.")] = 1042,
    seed: Annotated[int, typer.Option("--seed", help="Which phantoms; the same on every machine.")] = 0,
) -> None:
    """Write colour-Doppler phantoms as a data set in YOLO format."""
    from gradprobe.trainers.data.phantom import split_sizes, write_phantoms

    with stderr().status(f"drawing {n} phantoms"):
        yaml = write_phantoms(folder, n, seed)
    sizes = ", ".join(f"{count} {split}" for split, count in split_sizes(n).items())
    typer.echo(yaml)
    typer.echo(f"{n} images ({sizes}). Next: gradprobe record --data {yaml}", err=True)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="DATA.YAML", help="A data set in YOLO format.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with everything.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help=f"List every finding, not the worst {MOST} of a kind alone.")
    ] = False,
    group_by: Annotated[
        str,
        typer.Option(
            help="Which images are of one clip or patient: auto (by file names such as patient012_frame03), folder, "
            "prefix (up to the first _), none, or a regular expression with groups (?P<patient>...) and (?P<clip>...), "
            "or with one group."
        ),
    ] = "auto",
) -> None:
    """List what is wrong with a data set; exit 1 if anything keeps it from being trained on."""
    from gradprobe.trainers.data.check import check_data
    from gradprobe.trainers.data.splits import errors

    with stderr().status(Text(f"checking {file.name}")):
        result = check_data(file, group_by=group_by)
    if as_json:
        typer.echo(json.dumps(_as_dict(result), indent=2))
    else:
        _print(result, None if everything else MOST)
    if errors(result.findings):
        raise typer.Exit(1)


def _as_dict(result: CheckResult) -> dict[str, object]:
    from gradprobe.trainers.data.splits import errors, warnings

    example, groups, count = _example(result)
    return {
        "file": result.config.file.name,
        "errors": len(errors(result.findings)),
        "warnings": len(warnings(result.findings)),
        "findings": [
            {"severity": each.severity, "file": each.file, "line": each.line, "message": each.message}
            for each in result.findings
        ],
        "splits": {split: counts.as_dict() for split, counts in result.counts.items()},
        "grouping": {
            "rule": result.grouping.rule,
            "meaning": result.grouping.meaning,
            "images_told": count,
            "example": example,
            "tells": groups,
        },
        "leakage": [_overlap(each) for each in result.overlaps],
    }


def _overlap(overlap: Overlap) -> dict[str, object]:
    levels = {
        f"{level}s": {
            "of": total,
            "shared": len(overlap.shared[level]),
            "names": [{"name": s.name, overlap.unseen: s.here, overlap.seen: s.there} for s in overlap.shared[level]],
        }
        for level, total in overlap.totals.items()
    }
    images = {"of": overlap.images, "shared": overlap.pictures}
    return {"split": overlap.unseen, "also_in": overlap.seen, "images": images, **levels}


def _print(result: CheckResult, most: int | None) -> None:
    from gradprobe.trainers.data.splits import condensed, errors, warnings

    console = stdout(soft_wrap=True)
    console.print(_table(result))
    console.print(_how_grouped(result))
    for overlap in result.overlaps:
        if overlap.totals or not overlap.is_clean:
            console.print(overlap.message, style="" if overlap.is_clean else "yellow")
    wrong, doubtful = errors(result.findings), warnings(result.findings)
    shown = 0
    for style, severity, findings in (("red", "error", wrong), ("yellow", "warning", doubtful)):
        for finding in condensed(findings, most):
            console.print(Text.assemble((severity, style), " ", str(finding)))
            shown += not isinstance(finding, str)
    left = len(wrong) + len(doubtful) - shown
    more = f"; {left} of them not listed here: --all lists them" if left else ""
    console.print(f"{_plural(len(wrong), 'error')}, {_plural(len(doubtful), 'warning')}{more}")


def _how_grouped(result: CheckResult) -> str:
    """Which rule makes clips and patients of names, with an example."""
    example, groups, count = _example(result)
    rule = f"--group-by {result.grouping.rule} ({result.grouping.meaning})"
    if not groups:
        return f"{rule}: no clip or patient is known{f' from {example}' * bool(example)}; each image counts by itself"
    parts = ", ".join(f"{level} {name!r}" for level, name in groups.items())
    total = sum(len(images) for images in result.splits.values())
    return f"{rule}: {example} is of {parts}; known for {count} of {total} images"


def _example(result: CheckResult) -> tuple[str, dict[str, str], int]:
    """The image that the rule groups best, its groups, and for how many images the rule finds any."""
    shown = [image.file.shown for images in result.splits.values() for image in images]
    groups = {path: dict(result.grouping.of(path)) for path in shown}
    best = max(shown, key=lambda path: len(groups[path]), default="")
    return Path(best).name if best else "", groups.get(best, {}), sum(bool(groups[path]) for path in shown)


def _table(result: CheckResult) -> Table:
    """Counts: a row per class, a column per split; classes that no split has are counted, not listed."""
    table = Table(title=result.config.file.name, title_justify="left")
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
        table.add_row(f"images: {name}", *(str(each.image_classes[name]) for each in counts))
    table.add_section()
    present = [name for name in result.config.box_names if any(each.boxes[name] for each in counts)]
    for name in present:
        table.add_row(f"boxes: {name}", *(str(each.boxes[name]) for each in counts))
    if absent := len(result.config.box_names) - len(present):
        table.add_row(f"boxes: {_plural(absent, 'other class', 'other classes')}", *("0" for _ in counts))
    return table


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
