"""`gradprobe summary`: one run in numbers and words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def summary(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Show what a run holds: losses, weights, norms, cosines, metrics.

    Example: gradprobe summary conflict.h5 --json
    """
    import json

    from gradprobe.runfile import Run
    from gradprobe.summary import sentences, summarise

    with Run(file) as run:
        found = summarise(run)
        if as_json:
            print(json.dumps(found, indent=2, allow_nan=False))
            return
        said = sentences(run, found)
    from gradprobe.cli.console import stdout

    console = stdout()
    for table in _tables(found):
        console.print(table)
    for text in said:
        console.print(text, soft_wrap=True)


def _tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    if found["tasks"]:
        yield _table(
            "Tasks (medians; losses over the first and the last tenth of the rows)",
            ["task", "loss first", "loss last", "weight first", "weight last", "gradient norm", "dominance"],
            [_task_row(name, task) for name, task in found["tasks"].items()],
        )
    if found["pairs"]:
        yield from _pairs(found)
    if found["updates"]:
        yield _table(
            "Updates (medians; after clipping, momentum and preconditioning)",
            ["source", "share of gradient", "share of update", "part in the squared norm"],
            [_update_row(name, found["updates"]) for name in found["updates"]["share"]],
        )
    if found["metrics"]:
        yield _table(
            "Metrics per epoch",
            ["metric", "first", "last", "best", "in epoch", "best is"],
            [_metric_row(name, metric) for name, metric in found["metrics"].items()],
        )


def _pairs(found: dict[str, Any]) -> Iterator[RenderableType]:
    """All pairs, or of many tasks the lowest ones after a matrix of all."""
    from rich.console import Group

    from gradprobe.cli import matrix
    from gradprobe.summary import crowd

    pairs, title = found["pairs"], "Pairs (cosine over all shared layers, single minibatches)"
    if crowd.many(found["tasks"]):
        medians = {name: pair["cosine"]["median"] for name, pair in pairs.items()}
        lowest = crowd.lowest(medians)
        title = f"The lowest {len(lowest)} of {len(pairs)} pairs (all: --json)"
        if len(found["tasks"]) <= matrix.WIDEST:
            names, lines = matrix.ordered(list(found["tasks"]), medians)
            width = max(map(len, names))
            yield "Median cosine over all shared layers, task by task"
            yield Group(*(matrix.named(name, width, line) for name, line in zip(names, lines, strict=True)))
            yield matrix.LEGEND
        pairs = {name: pairs[name] for name in lowest}
    yield _table(
        title,
        ["pair", "steps", "median", "25 %", "75 %", "stochastic conflict rate", "lowest layers (median)"],
        [_pair_row(name, pair) for name, pair in pairs.items()],
    )


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _task_row(name: str, task: dict[str, Any]) -> list[str]:
    values = (
        task["loss"]["first"],
        task["loss"]["last"],
        task["weight"]["first"],
        task["weight"]["last"],
        task["grad_norm"]["median"],
        task["dominance"]["median"],
    )
    return [name, *map(_text, values)]


def _update_row(name: str, updates: dict[str, Any]) -> list[str]:
    values = (updates["gradient_share"].get(name), updates["share"][name], updates["clipping"]["share"].get(name))
    return [name, *map(_text, values)]


def _pair_row(name: str, pair: dict[str, Any]) -> list[str]:
    cosine = pair["cosine"]
    lowest = ", ".join(f"{layer['layer']} {layer['cosine_median']:+.2f}" for layer in pair["lowest_layers"])
    values = (cosine["median"], cosine["q25"], cosine["q75"], pair["stochastic_conflict_rate"])
    return [name, str(cosine["rows"]), *map(_text, values), lowest or "-"]


def _metric_row(name: str, metric: dict[str, Any]) -> list[str]:
    first, last, best = (metric[k] or {} for k in ("first", "last", "best"))
    values = [_text(at.get("value")) for at in (first, last, best)]
    return [name, *values, str(best.get("epoch", "-")), metric["best_is"]]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
