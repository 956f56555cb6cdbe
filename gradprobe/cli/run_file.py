"""`gradprobe check`, `export`, `plot` and `summary`: one run file, verified, converted, drawn and described."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradprobe.cli.command_options import AsJson, RunFile
from gradprobe.cli.console import number, stdout, titled_table
from gradprobe.errors import UsageError
from gradprobe.foreign import quoted
from gradprobe.named_code import named_function
from gradprobe.plots import FORMATS, WHAT

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradprobe.runfile.integrity import CheckReport


def check(
    file: Annotated[Path, typer.Argument(help="The run file; its parts are found in its folder.")],
    as_json: AsJson = False,
    repair: Annotated[
        Path | None, typer.Option(help="Write what can be read of it into this new file.", metavar="OUT")
    ] = None,
) -> None:
    """Verify a run: checksums, shapes, increasing steps, possible numbers.

    Exits with 0 where it is whole, 3 where something is damaged, missing or not ended (with --repair: where something
    was lost).

    Example: gradprobe check conflict.h5 --repair saved.h5
    """
    from gradprobe.runfile.integrity import check_run as verify

    checked = verify(file)
    report = checked if repair is None else _repaired(file, repair)
    lost = not checked.whole if repair is None else any(f.kind == "damaged" for f in report.findings)
    if as_json:
        found: dict[str, Any] = {"file": file.name, "whole": checked.whole, **asdict(checked)}
        print(json.dumps(found | {"repaired": None if repair is None else {"file": str(repair), **asdict(report)}}))
    else:
        _print_check(file, checked)
        if repair is not None:
            print()
            _print_check(
                repair,
                report,
                f"has {report.rows} rows from {len(report.files)} files; " + ("lost:" if lost else "nothing was lost"),
            )
    if lost:
        raise typer.Exit(3)


def _repaired(file: Path, out: Path) -> CheckReport:
    from gradprobe.runfile.repair import repair

    return repair(file, out)


def _print_check(file: Path, report: CheckReport, verdict: str | None = None) -> None:
    if verdict is None:
        files = f"{len(report.files)} file" + "s" * (len(report.files) != 1)
        verdict = "is whole" if report.whole else "is not whole"
        verdict += f": {report.rows} rows in {files}" + (
            "" if report.whole else f". Try: gradprobe check {quoted(file)} --repair OUT"
        )
    print(f"{file} {verdict}")
    for finding in report.findings:
        print(f"  {finding.kind}: {finding.file}: {finding.what}")


def export(
    file: RunFile,
    to: Annotated[str, typer.Option("--to", help="csv, parquet, netcdf or tensorboard.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where it goes; must not exist.", show_default="FILE.nc, or FILE-csv/ in the run's folder"),
    ] = None,
    stride: Annotated[int, typer.Option(help="Every so many rows, for long runs.")] = 1,
) -> None:
    """Write a run as CSV or Parquet tables, as a netCDF file, or for TensorBoard.

    Example: gradprobe export conflict.h5 --to csv
    """
    from gradprobe.runfile import Run
    from gradprobe.runfile.exports import export_run as write

    with Run(file) as run:
        written = write(run, to, out, stride=stride)
    print(written)
    if written.is_dir():
        for path in sorted(written.iterdir()):
            print(path)


def plot(
    file: RunFile,
    what: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(WHAT)}; or your own my_module:function, which draws a run into a matplotlib figure."
        ),
    ] = "overview",
    format: Annotated[
        str | None, typer.Option(help=f"{', '.join(FORMATS)}.", show_default="png, or the suffix of --out")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the figure goes.", show_default="FILE.png or FILE-WHAT.png in the run's folder"),
    ] = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Also write the numbers as CSV.")] = True,
) -> None:
    """Draw a run, and say in words what it shows.

    Example: gradprobe plot conflict.h5 --what weights --format svg
    """
    from gradprobe import plots
    from gradprobe.runfile import Run
    from gradprobe.summary import sentences

    page = named_function(what, "mypackage:draw") if ":" in what else what
    target = _target(file, what.rpartition(":")[2], format, out)
    with Run(file) as run:
        written = plots.write(run, page, target, data=data)
        texts = sentences(run)
    console = stdout()
    for text in (*map(str, written), "", *texts):
        console.print(text, soft_wrap=True)


def _target(file: Path, what: str, format: str | None, out: Path | None) -> Path:
    """Where the figure goes: by default into the run's folder."""
    if out is None:
        stem = file.name.removesuffix(".h5")  # lr0.1 is no lr0
        name = stem if what == "overview" else f"{stem}-{what}"
        return file.with_name(f"{name}.{format or 'png'}")
    if not out.suffix and (out.is_file() or not out.exists()):
        return out.with_name(f"{out.name}.{format or 'png'}")
    if format is not None and out.suffix[1:].lower() != format:
        raise UsageError(f"--out {out} and --format {format} contradict each other; leave one of them out.")
    return out


def summary(
    file: RunFile,
    as_json: AsJson = False,
) -> None:
    """Show what a run holds: losses, weights, norms, cosines, metrics.

    Example: gradprobe summary conflict.h5 --json
    """
    from gradprobe.runfile import Run
    from gradprobe.summary import sentences, summarise

    with Run(file) as run:
        found = summarise(run)
        if as_json:
            print(json.dumps(found, indent=2, allow_nan=False))
            return
        texts = sentences(run, found)

    console = stdout()
    for table in _tables(found):
        console.print(table)
    for text in texts:
        console.print(text, soft_wrap=True)


def _tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    if found["tasks"]:
        yield titled_table(
            "Tasks (medians; losses over the first and the last tenth of the rows)",
            ["task", "loss first", "loss last", "weight first", "weight last", "gradient norm", "dominance"],
            [_task_row(name, task) for name, task in found["tasks"].items()],
        )
    if found["pairs"]:
        yield from _pairs(found)
    if found["updates"]:
        yield titled_table(
            "Updates (medians; after clipping, momentum and preconditioning)",
            ["source", "share of gradient", "share of update", "part in the squared norm"],
            [_update_row(name, found["updates"]) for name in found["updates"]["share"]],
        )
    if found["metrics"]:
        yield titled_table(
            "Metrics per epoch",
            ["metric", "first", "last", "best", "in epoch", "best is"],
            [_metric_row(name, metric) for name, metric in found["metrics"].items()],
        )


def _pairs(found: dict[str, Any]) -> Iterator[RenderableType]:
    """All pairs, or of many tasks the lowest ones after a matrix of all."""
    from rich.console import Group

    from gradprobe.cli import console
    from gradprobe.summary import many_tasks

    pairs, title = found["pairs"], "Pairs (cosine over all shared layers, single minibatches)"
    if many_tasks.many(found["tasks"]):
        medians = {name: pair["cosine"]["median"] for name, pair in pairs.items()}
        lowest = many_tasks.lowest(medians)
        title = f"The lowest {len(lowest)} of {len(pairs)} pairs (all: --json)"
        if len(found["tasks"]) <= console.WIDEST_MATRIX:
            names, lines = console.cosine_lines(list(found["tasks"]), medians)
            width = max(map(len, names))
            yield "Median cosine over all shared layers, task by task"
            yield Group(*(console.named_line(name, width, line) for name, line in zip(names, lines, strict=True)))
            yield console.MATRIX_LEGEND
        pairs = {name: pairs[name] for name in lowest}
    yield titled_table(
        title,
        ["pair", "steps", "median", "25 %", "75 %", "stochastic conflict rate", "lowest layers (median)"],
        [_pair_row(name, pair) for name, pair in pairs.items()],
    )


def _task_row(name: str, task: dict[str, Any]) -> list[str]:
    values = (
        task["loss"]["first"],
        task["loss"]["last"],
        task["weight"]["first"],
        task["weight"]["last"],
        task["grad_norm"]["median"],
        task["dominance"]["median"],
    )
    return [name, *map(number, values)]


def _update_row(name: str, updates: dict[str, Any]) -> list[str]:
    values = (updates["gradient_share"].get(name), updates["share"][name], updates["clipping"]["share"].get(name))
    return [name, *map(number, values)]


def _pair_row(name: str, pair: dict[str, Any]) -> list[str]:
    cosine = pair["cosine"]
    lowest = ", ".join(f"{layer['layer']} {layer['cosine_median']:+.2f}" for layer in pair["lowest_layers"])
    values = (cosine["median"], cosine["q25"], cosine["q75"], pair["stochastic_conflict_rate"])
    return [name, str(cosine["rows"]), *map(number, values), lowest or "-"]


def _metric_row(name: str, metric: dict[str, Any]) -> list[str]:
    first, last, best = (metric[k] or {} for k in ("first", "last", "best"))
    values = [number(at.get("value")) for at in (first, last, best)]
    return [name, *values, str(best.get("epoch", "-")), metric["best_is"]]
