"""`gradprobe watch`: a run while it is recorded, from any other process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradprobe.cli.console import number, sparkline, stdout
from gradprobe.errors import RunFileError
from gradprobe.foreign import quoted

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from gradprobe.runfile import Run

_Show = Callable[[dict[str, Any]], None]

_SHOWN_METRICS = ("mAP50", "mAP50-95", "accuracy", "macro_f1")
_NOISE = "over all shared layers; each step is a single minibatch: mostly noise"
_LOOK = 0.5  # seconds between two looks for a file that is not there yet


def watch(
    file: Annotated[Path, typer.Argument(help="The run file.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a file that is not there yet.")] = 60.0,
) -> None:
    """Follow a run until its recording ends: losses, weights, cosines, stochastic conflict rate, age of the last row.

    The recording process does not notice, however many watch. Exits with 3 where it was killed before its end.

    Example: gradprobe watch conflict.h5
    """
    from gradprobe.runfile import lock

    with _opened(file, 0.0 if once else wait) as run:
        last = _follow(run, once, as_json, interval)
    if not once and last["state"] == lock.STOPPED:
        print(
            f"gradprobe: {file}: the recording process is gone and did not end its run; {last['rows']} rows are there. "
            f"Go on with it: gradprobe record --resume {quoted(file)}, or attach(..., resume=True)",
            file=sys.stderr,
        )
        raise typer.Exit(3)


def _opened(file: Path, wait: float) -> Run:
    """The run; waited for while it is not there, and as long as a process prepares to record it."""
    from gradprobe.runfile import Run, lock

    until, announced = time.monotonic() + wait, False
    while True:
        try:
            return Run(file)
        except RunFileError:
            preparing = wait > 0 and lock.being_recorded(file) is True
            if file.exists() or (not preparing and time.monotonic() >= until):
                raise
        if not announced:
            print(f"gradprobe: {file}: is not there yet; waiting for it", file=sys.stderr)
            announced = True
        time.sleep(_LOOK)


def _follow(run: Run, once: bool, as_json: bool, interval: float) -> dict[str, Any]:
    from rich.live import Live

    console = stdout()
    if as_json:
        return _until_end(run, once, interval, _json)
    if once and console.is_terminal:
        return _until_end(run, once, interval, lambda seen: console.print(render(seen)))
    if once or not console.is_terminal or console.is_dumb_terminal:
        return _until_end(run, once, interval, lambda seen: print(line(seen), flush=True))
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as display:
        # Every time: the age of the last row goes on when no row comes.
        return _until_end(run, once, interval, lambda seen: display.update(render(seen), refresh=True), always=True)


def _until_end(run: Run, once: bool, interval: float, show: _Show, always: bool = False) -> dict[str, Any]:
    """Show what changed, or ``always``, until the recording ends.

    Returns:
        What was seen last.
    """
    from gradprobe.runfile import lock
    from gradprobe.summary.latest import latest

    shown: tuple[Any, ...] | None = None
    while True:
        seen = latest(run)
        if seen["state"] == lock.STOPPED:  # or it ended since the file was opened: its lock goes last, so look again
            _refresh(run, interval)
            seen = latest(run)
        mark = (seen["rows"], seen["step"], seen["state"], seen["metrics"])
        if mark != shown or always:
            show(seen)
            shown = mark
        if once or seen["state"] in (lock.ENDED, lock.STOPPED):
            return seen
        time.sleep(interval)
        _refresh(run, interval)


def _refresh(run: Run, interval: float) -> None:
    """Look again; a run that is being replaced by a new one is away for a moment."""
    for _ in range(5):
        try:
            run.refresh()
            return
        except RunFileError:
            if run.path.exists():
                raise
            time.sleep(interval)
    run.refresh()


def _json(seen: dict[str, Any]) -> None:
    print(json.dumps(seen, allow_nan=False), flush=True)


# ---- in words and pictures


def line(seen: dict[str, Any]) -> str:
    """One plain line."""
    from gradprobe.summary import many_tasks

    if seen["step"] is None:
        return f"{_state(seen)}: no row yet"
    if many_tasks.many(seen["tasks"]):
        return "; ".join([f"{_state(seen)}: {_where(seen)}", *_in_few_words(seen)])
    tasks = [
        f"{name}: loss {number(t['loss'])}, weight {number(t['weight'])}, gradient norm {number(t['grad_norm'])}"
        for name, t in seen["tasks"].items()
    ]
    pairs = [f"{name}: cosine {number(p['cosine'])}, below 0 in {_rate(p)}" for name, p in seen["pairs"].items()]
    return "; ".join([f"{_state(seen)}: {_where(seen)}", *tasks, *pairs])


def render(seen: dict[str, Any]) -> RenderableType:
    """For a terminal."""
    from rich.console import Group
    from rich.text import Text

    from gradprobe.summary import many_tasks

    parts: list[RenderableType] = [Text(f"{seen['file']}  {_state(seen)}  {_where(seen)}")]
    if seen["step"] is not None:
        parts += _many(seen) if many_tasks.many(seen["tasks"]) else [_tasks(seen), _pairs(seen)]
    if seen["step"] is not None and seen["pairs"]:
        parts.append(Text(_NOISE, style="dim"))
    if seen["metrics"]:
        values = [f"{n} {number(seen['metrics'][n])}" for n in _SHOWN_METRICS if n in seen["metrics"]]
        parts.append(Text(f"epoch {seen['metrics']['epoch']}: {', '.join(values)}"))
    return Group(*parts)


def _tasks(seen: dict[str, Any]) -> RenderableType:
    table = _table("task", "loss", "", "weight", "", "gradient norm", "")
    for name, task in seen["tasks"].items():
        cells = [name]
        for what in ("loss", "weight", "grad_norm"):
            cells += [number(task[what]), sparkline(task["recent"][what][-11:], None, None)]
        table.add_row(*map(_plain, cells))
    return table


def _many(seen: dict[str, Any]) -> list[RenderableType]:
    """Many tasks: a line each, which has its row of the task x task matrix, and the lowest pairs."""
    from rich.text import Text

    from gradprobe.cli import console

    medians = {name: pair["median"] for name, pair in seen["pairs"].items()}
    table = _table("task", "loss", "gradient norm", "median cosine with each task")
    names, lines = console.cosine_lines(list(seen["tasks"]), medians)
    for name, line in zip(names, lines, strict=True):
        task = seen["tasks"][name]
        drawn = line if len(names) <= console.WIDEST_MATRIX else Text()
        table.add_row(_plain(name), number(task["loss"]), number(task["grad_norm"]), drawn)
    return [table, Text(console.MATRIX_LEGEND, style="dim"), _pairs(seen, _lowest(seen))]


def _in_few_words(seen: dict[str, Any]) -> list[str]:
    from gradprobe.summary import many_tasks

    parts = []
    for what, called in (("loss", "loss"), ("weight", "weight"), ("grad_norm", "gradient norm")):
        values = {name: task[what] for name, task in seen["tasks"].items()}
        parts += [f"{called} of {len(values)} tasks: {text}"] if (text := many_tasks.spread(values)) else []
    pairs = [f"{name} {number(seen['pairs'][name]['median'])}" for name in _lowest(seen)]
    return [*parts, f"lowest median cosines of {len(seen['pairs'])} pairs: {', '.join(pairs)}"] if pairs else parts


def _lowest(seen: dict[str, Any]) -> list[str]:
    """The pairs that are shown of many tasks."""
    from gradprobe.summary import many_tasks

    return many_tasks.lowest({name: pair["median"] for name, pair in seen["pairs"].items()}, many_tasks.NAMED)


def _pairs(seen: dict[str, Any], shown: Iterable[str] | None = None) -> RenderableType:
    table = _table("pair", "cosine", "-1 to 1", "median", "stochastic conflict rate")
    for name in seen["pairs"] if shown is None else shown:
        pair = seen["pairs"][name]
        cells = [name, number(pair["cosine"]), sparkline(pair["recent"][-24:]), number(pair["median"]), _rate(pair)]
        table.add_row(*map(_plain, cells))
    return table


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head)
    return table


def _plain(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text)  # a name in brackets is no markup


def _state(seen: dict[str, Any]) -> str:
    return seen["end"] if seen["state"] == "ended" else str(seen["state"])


def _where(seen: dict[str, Any]) -> str:
    if seen["step"] is None:
        return "no row yet"
    dropped = f", {seen['rows_dropped']} dropped" if seen["rows_dropped"] else ""
    return (
        f"epoch {seen['epoch']}, step {seen['step']}, {seen['rows']} rows{dropped}, "
        f"the last {seen['age_seconds']:.0f} s ago"
    )


def _rate(pair: dict[str, Any]) -> str:
    rate = pair["stochastic_conflict_rate"]
    return f"{'-' if rate is None else f'{rate:.0%}'} of {pair['measured_rows']} steps"
