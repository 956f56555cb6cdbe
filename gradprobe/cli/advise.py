"""`gradprobe advise`: what one run suggests to try next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

SHOWN = 10


def advise(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Say which layers to double, whether direction or size is the trouble, and which weights would be even.

    Example: gradprobe advise conflict.h5
    """
    import json

    from gradprobe.cli.interventions import LONG, gramians
    from gradprobe.errors import RunFileError
    from gradprobe.runfile import Run
    from gradprobe.verdict import advice

    with Run(file) as run:
        if not run.layers:
            raise RunFileError(
                f"{file}: the tasks share no layer: interference is not applicable, and nothing to advise."
            )
        stride = max(1, len(run) // LONG)
        loss, weight = (run.read(name, stride=stride).astype(float) for name in ("loss", "weight"))
        found = advice.advise(gramians(run), run.layer_size, run.reach, loss, weight)
        if not found.layers.ranked():
            raise RunFileError(f"{file}: has fewer than three measured rows, so there is nothing to go by.")
        said = advice.as_json(found, run.layers, run.layer_size, run.tasks, run.pairs)
        said = {
            "file": file.name,
            "rows": len(loss),
            "model_parameters": run.provenance.get("model.parameters"),
            **said,
        }
    if as_json:
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    _show(said, file)


def _show(said: dict[str, Any], file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="Layers, the worst first (interval within this run)", title_justify="left")
    for place, column in enumerate(("layer", "pair", "parameters", "cosine", "95 %", "score", "conflict")):
        table.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
    for row in said["layers"][:SHOWN]:
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        numbers = (f"{row['parameters']:,}", f"{row['cosine']:+.2f}", interval, f"{row['score']:+.1f}")
        table.add_row(row["layer"], row["pair"], *numbers, "yes" if row["conflicting"] else "")
    console.print(table)
    for text in (*_trouble(said), *_layers(said, file), *_weights(said), _dual(said), CAUTION):
        console.print(text, markup=False, soft_wrap=True)


CAUTION = (
    "Within one run, from single minibatches: samples that tasks share bias a cosine. Whether a remedy helps takes "
    "the same seeds with and without it."
)


def _trouble(said: dict[str, Any]) -> Iterator[str]:
    if said["nothing_to_do"]:
        yield (
            "Nothing to do: no pair of tasks and no layer is in conflict beyond noise and chance, and no task "
            "dominates."
        )
    for pair in said["direction"]:
        yield (
            f"Direction: {pair['pair'].replace('|', ' and ')} point against each other (cosine {pair['cosine']:+.2f}, "
            f"{pair['low']:+.2f} to {pair['high']:+.2f}). No weights change that; surgery or doubled layers may."
        )
    for task in said["dominant"]:
        yield (
            f"Dominance: {task} makes {100 * said['dominance'][task]:.0f} % of the squared weighted gradient. Weights "
            "(--task-weights, gradnorm) change that."
        )


def _layers(said: dict[str, Any], file: Path) -> Iterator[str]:
    chosen = list(dict.fromkeys(row["layer"] for row in said["layers"] if row["conflicting"]))
    if chosen:
        yield (
            f"{len(chosen)} of {len({row['layer'] for row in said['layers']})} layers are in conflict (false discovery "
            f"rate 10 %, exploratory). To double them: gradprobe record --trainer split --from "
            f"{shlex.quote(str(file))} --top-k {len(chosen)}"
        )


def _weights(said: dict[str, Any]) -> Iterator[str]:
    weights = said["equal_progress_weights"]
    if weights is None:
        yield "In most rows no positive weights give all tasks the same relative progress."
        return
    given = ",".join(f"{task}={value['median']:.3g}" for task, value in weights.items())
    spread = "; ".join(f"{task} {value['q25']:.3g} to {value['q75']:.3g}" for task, value in weights.items())
    yield (
        f"Weights with the same relative progress for all, to first order: --task-weights {given} "
        f"(middle half: {spread})."
    )


def _dual(said: dict[str, Any]) -> str:
    count, whole = said["dual_parameters"], said["model_parameters"]
    share = f", {100 * count / whole:.0f} % of the model's {whole:,}" if whole else ""
    return f"A dual backbone would take {count:,} parameters more{share}."
