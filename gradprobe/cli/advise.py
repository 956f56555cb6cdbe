"""`gradprobe advise`: what one run suggests to try next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gradprobe.foreign import quoted
from gradprobe.messages import ENGLISH as SAY
from gradprobe.messages import Message

SHOWN = 10


def advise(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Say which layers to double, whether direction or size is the trouble, and which weights would be even.

    Example: gradprobe advise conflict.h5
    """
    import json

    import numpy as np

    from gradprobe.cli.interventions import LONG, gramians
    from gradprobe.errors import RunFileError
    from gradprobe.runfile import Run
    from gradprobe.verdict import advice

    with Run(file) as run:
        if not run.shared_reach.any():
            raise RunFileError(
                f"{file}: the tasks share no layer: interference is not applicable, and nothing to advise."
            )
        stride = max(1, len(run) // LONG)
        loss, weight = (run.read(name, stride=stride).astype(float) for name in ("loss", "weight"))
        shared = np.flatnonzero(run.shared_reach.any(axis=1))
        layers, size = [run.layers[i] for i in shared], run.layer_size[shared]
        found = advice.advise(gramians(run)[:, shared], size, run.counts(stride=stride)[:, shared], loss, weight)
        if not found.layers.ranked():
            raise RunFileError(f"{file}: has fewer than three measured rows, so there is nothing to go by.")
        said = advice.as_json(found, layers, size, run.tasks, run.pairs)
        said = {
            "file": file.name,
            "rows": len(loss),
            "model_parameters": run.provenance.get("model.parameters"),
            "doubled": len(run.provenance.get("model.doubled", ())),
            **said,
        }
    if as_json:
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    _show(said, file)


def _show(said: dict[str, Any], file: Path) -> None:
    from rich import box
    from rich.table import Table

    from gradprobe.cli.console import stdout

    console = stdout()
    several, pair = len(said["pairs"]) > 1, said["pairs"][0]["pair"]
    title = SAY("advice.title") if several else SAY("advice.title_of", pair=pair)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(SAY("column.layer"), overflow="fold", min_width=12)
    if several:
        table.add_column(SAY("column.pair"), overflow="fold")
    for name in ("parameters", "cosine", "ci95", "score", "conflict"):
        table.add_column(SAY(f"column.{name}"), justify="right", no_wrap=True)
    for row in said["layers"][:SHOWN]:
        names = [row["layer"], row["pair"]] if several else [row["layer"]]
        interval = SAY("join.span", low=f"{row['low']:+.2f}", high=f"{row['high']:+.2f}")
        numbers = (f"{row['parameters']:,}", f"{row['cosine']:+.2f}", interval, f"{row['score']:+.1f}")
        table.add_row(*names, *numbers, SAY("layers.yes") if row["conflicting"] else "")
    console.print(table)
    caution = Message("advice.caution")
    for message in (*_trouble(said), *_layers(said, file), _weights(said), _dual(said), caution):
        console.print(str(message), soft_wrap=True)


def _trouble(said: dict[str, Any]) -> Iterator[Message]:
    if said["nothing_to_do"]:
        yield Message("advice.nothing")
    for pair in said["direction"]:
        tasks, cosine = pair["pair"].split("|"), pair["cosine"]
        yield Message("advice.direction", tasks=tasks, cosine=cosine, low=pair["low"], high=pair["high"])
    for task in said["dominant"]:
        yield Message("advice.dominance", task=task, share=said["dominance"][task])


def _layers(said: dict[str, Any], file: Path) -> Iterator[Message]:
    chosen = len({row["layer"] for row in said["layers"] if row["conflicting"]})
    known = len({row["layer"] for row in said["layers"]})
    if chosen and said["doubled"]:
        yield Message("advice.layers_doubled", n=chosen, of=known, doubled=said["doubled"])
    elif chosen:
        yield Message("advice.layers", n=chosen, of=known, file=quoted(file))


def _weights(said: dict[str, Any]) -> Message:
    weights = said["equal_progress_weights"]
    if weights is None:
        return Message("advice.no_weights")
    spread = [Message("advice.spread", task=task, low=v["q25"], high=v["q75"]) for task, v in weights.items()]
    given = ",".join(f"{task}={value['median']:.3g}" for task, value in weights.items())
    return Message("advice.weights", given=given, spread=spread)


def _dual(said: dict[str, Any]) -> Message:
    count, whole = said["dual_parameters"], said["model_parameters"]
    share = Message("advice.share", part=count / whole, whole=int(whole)) if whole else ""
    return Message("advice.rest" if said["doubled"] else "advice.dual", n=count, share=share)
