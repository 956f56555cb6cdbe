"""`gradprobe advise`: what one run suggests to try next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprobe.cli.command_options import AsJson, RunFile
from gradprobe.cli.console import stdout
from gradprobe.errors import RunFileError
from gradprobe.foreign import quoted
from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message

if TYPE_CHECKING:
    from gradprobe.measures import Array
    from gradprobe.runfile import Run

_SHOWN = 10


def advise(
    file: RunFile,
    as_json: AsJson = False,
) -> None:
    """Say which layers to double, whether direction or size is the problem, and which weights would be even.

    Example: gradprobe advise conflict.h5
    """
    import numpy as np

    from gradprobe.runfile import Run
    from gradprobe.verdict import advice

    with Run(file) as run:
        if not run.shared_reach.any():
            raise RunFileError(
                f"{file}: the tasks share no layer: interference is not applicable, and nothing to advise."
            )
        stride = max(1, len(run) // _LONG)
        loss, weight = (run.read(name, stride=stride).astype(float) for name in ("loss", "weight"))
        shared = np.flatnonzero(run.shared_reach.any(axis=1))
        layers, size = [run.layers[i] for i in shared], run.layer_size[shared]
        found = advice.advise(gramians(run)[:, shared], size, run.counts(stride=stride)[:, shared], loss, weight)
        if not found.layers.ranked():
            raise RunFileError(f"{file}: has fewer than three measured rows, so there is nothing to go by.")
        advice_found = advice.as_json(found, layers, size, run.tasks, run.pairs)
        advice_found = {
            "file": file.name,
            "rows": len(loss),
            "model_parameters": run.provenance.get("model.parameters"),
            "doubled": len(run.provenance.get("model.doubled", ())),
            **advice_found,
        }
    if as_json:
        print(json.dumps(advice_found, indent=2, allow_nan=False))
        return
    _show(advice_found, file)


def _show(advice_found: dict[str, Any], file: Path) -> None:
    from rich import box
    from rich.table import Table

    console = stdout()
    several, pair = len(advice_found["pairs"]) > 1, advice_found["pairs"][0]["pair"]
    title = SAY("advice.title") if several else SAY("advice.title_of", pair=pair)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(SAY("column.layer"), overflow="fold", min_width=12)
    if several:
        table.add_column(SAY("column.pair"), overflow="fold")
    for name in ("parameters", "cosine", "ci95", "score", "conflict"):
        table.add_column(SAY(f"column.{name}"), justify="right", no_wrap=True)
    for row in advice_found["layers"][:_SHOWN]:
        names = [row["layer"], row["pair"]] if several else [row["layer"]]
        interval = SAY("join.span", low=f"{row['low']:+.2f}", high=f"{row['high']:+.2f}")
        numbers = (f"{row['parameters']:,}", f"{row['cosine']:+.2f}", interval, f"{row['score']:+.1f}")
        table.add_row(*names, *numbers, SAY("layers.yes") if row["conflicting"] else "")
    console.print(table)
    caution = Message("advice.caution")
    for message in (
        *_trouble(advice_found),
        *_layers(advice_found, file),
        _weights(advice_found),
        _dual(advice_found),
        caution,
    ):
        console.print(str(message), soft_wrap=True)


def _trouble(advice_found: dict[str, Any]) -> Iterator[Message]:
    if advice_found["nothing_to_do"]:
        yield Message("advice.nothing")
    for pair in advice_found["direction"]:
        tasks, cosine = pair["pair"].split("|"), pair["cosine"]
        yield Message("advice.direction", tasks=tasks, cosine=cosine, low=pair["low"], high=pair["high"])
    for task in advice_found["dominant"]:
        yield Message("advice.dominance", task=task, share=advice_found["dominance"][task])


def _layers(advice_found: dict[str, Any], file: Path) -> Iterator[Message]:
    chosen = len({row["layer"] for row in advice_found["layers"] if row["conflicting"]})
    known = len({row["layer"] for row in advice_found["layers"]})
    if chosen and advice_found["doubled"]:
        yield Message("advice.layers_doubled", n=chosen, of=known, doubled=advice_found["doubled"])
    elif chosen:
        yield Message("advice.layers", n=chosen, of=known, file=quoted(file))


def _weights(advice_found: dict[str, Any]) -> Message:
    weights = advice_found["equal_progress_weights"]
    if weights is None:
        return Message("advice.no_weights")
    spread = [Message("advice.spread", task=task, low=v["q25"], high=v["q75"]) for task, v in weights.items()]
    given = ",".join(f"{task}={value['median']:.3g}" for task, value in weights.items())
    return Message("advice.weights", given=given, spread=spread)


def _dual(advice_found: dict[str, Any]) -> Message:
    count, whole = advice_found["dual_parameters"], advice_found["model_parameters"]
    share = Message("advice.share", part=count / whole, whole=int(whole)) if whole else ""
    return Message("advice.rest" if advice_found["doubled"] else "advice.dual", n=count, share=share)


_LONG = 5000
"""Rows that are looked at in a run."""


def gramians(run: Run) -> Array:
    """The Gramians (n, L, T, T) of a run; of a long one every k-th row."""
    return run.gram(stride=max(1, len(run) // _LONG))
