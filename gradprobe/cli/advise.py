"""`gradprobe advise`: what one run suggests to try next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gradprobe.foreign import quoted

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
    several = len(said["pairs"]) > 1
    pair = "" if several else f" of {said['pairs'][0]['pair']}"
    title = f"Cosines{pair}, the worst layers first (interval within this run)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("layer", overflow="fold", min_width=12)
    if several:
        table.add_column("pair", overflow="fold")
    for column in ("parameters", "cosine", "95 %", "score", "conflict"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in said["layers"][:SHOWN]:
        names = [row["layer"], row["pair"]] if several else [row["layer"]]
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        numbers = (f"{row['parameters']:,}", f"{row['cosine']:+.2f}", interval, f"{row['score']:+.1f}")
        table.add_row(*names, *numbers, "yes" if row["conflicting"] else "")
    console.print(table)
    for text in (*_trouble(said), *_layers(said, file), *_weights(said), _dual(said), CAUTION):
        console.print(text, soft_wrap=True)


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
    if not chosen:
        return
    known = len({row["layer"] for row in said["layers"]})
    found = f"{len(chosen)} of {known} layers are in conflict (false discovery rate 10 %, exploratory)."
    if said["doubled"]:
        yield f"{found} {said['doubled']} others are doubled already; `split` needs a run of an undivided model."
    else:
        command = f"gradprobe record --trainer split --from {quoted(file)} --top-k {len(chosen)}"
        yield f"{found} To double them: {command}"


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
    what = "To double what is still shared" if said["doubled"] else "A dual backbone"
    return f"{what} would take {count:,} parameters more{share}."
