"""What ``gradprobe record`` needs for its trainers beyond settings: their list, and what ``--from`` reads for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradprobe.errors import RunFileError, UsageError
from gradprobe.trainers.problems import kind_of
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import Settings

if TYPE_CHECKING:
    from gradprobe.measures import Array
    from gradprobe.runfile import Run

LONG = 5000
"""Rows that are looked at in a run."""


def trainer_list() -> str:
    """What each trainer does, its cost per step beside joint's, and its source, as aligned text."""
    from rich.table import Table

    from gradprobe.cli.console import stdout

    table = Table(box=None, pad_edge=False)
    for column in ("trainer", "what it does", "cost of a step, beside joint's", "source"):
        table.add_column(column, overflow="fold")
    for name, trainer in TRAINERS.items():
        table.add_row(name, trainer.what, trainer.cost, trainer.source)
    console = stdout()
    console.width = 160
    with console.capture() as captured:
        console.print(table)
    lines = (line.rstrip() for line in captured.get().splitlines())
    return (
        "\n".join(lines)
        + "\n\nYour own: --trainer my_module:MyBalancer, a subclass of gradprobe.trainers.balancer.Balancer"
    )


def read_source(source: Path | None, settings: Settings) -> dict[str, Any]:
    """What ``--from`` gives to a trainer, as plain settings: a trainer itself reads no run files.

    Raises:
        UsageError: The trainer needs ``--from`` and has none, or the other way round; or the run is not of the kind
            it needs.
        RunFileError: It cannot be read.
    """
    reader = _READERS.get(settings.trainer)
    if reader is None:
        if source is not None:
            raise UsageError(
                f"--from {source}: {settings.trainer} reads no earlier run; those that do: {', '.join(_READERS)}."
            )
        return {}
    if source is None:
        raise UsageError(f"--trainer {settings.trainer} needs an earlier run: --from conflict.h5")
    return {"from_run": source.name, **reader(source, settings)}


def _average_weights(source: Path, settings: Settings) -> Mapping[str, Any]:
    """The time average of every task's weight in a gradnorm run.

    Raises:
        UsageError: It is no gradnorm run, or its tasks are others.
    """
    from gradprobe.runfile import Run

    with Run(source) as run:
        trainer = run.provenance.get("trainer")
        if trainer != "gradnorm":
            raise UsageError(f"--from {source}: was recorded with --trainer {trainer}; gradnorm-static needs gradnorm.")
        tasks = kind_of(settings.data).tasks
        if run.tasks != tasks:
            raise UsageError(f"--from {source}: its tasks are {', '.join(run.tasks)}, not {', '.join(tasks)}.")
        weight = run["weight"].astype(float)
    if not len(weight):
        raise RunFileError(f"{source}: has no rows, so there are no weights to average.")
    return {"task_weights": tuple(weight.mean(axis=0).tolist())}


def _layers_in_conflict(source: Path, settings: Settings) -> Mapping[str, Any]:
    """The ``--top-k`` layers with the highest score of :mod:`gradprobe.verdict.advice`.

    Raises:
        UsageError: The run is of another architecture, or has fewer such layers.
    """
    from gradprobe.runfile import Run
    from gradprobe.verdict.advice import layer_scores

    with Run(source) as run:
        cfg, wanted = run.provenance.get("settings.cfg"), Path(settings.cfg).name
        if cfg != wanted:
            raise UsageError(
                f"--from {source}: was recorded from another architecture ({cfg or 'no YOLOv5 cfg'}, not {wanted}), so "
                "its layers are not this model's. Record a joint run of this one first."
            )
        if doubled := run.provenance.get("model.doubled"):
            raise UsageError(
                f"--from {source}: its model has {len(doubled)} doubled layers already, so it does not say which "
                "of the undivided model's are in conflict. Take a run of an undivided model: --trainer joint."
            )
        scores = layer_scores(gramians(run), run.layer_size)
        size = dict(zip(run.layers, run.layer_size.tolist(), strict=True))
        names = list(dict.fromkeys(run.layers[layer] for layer, _ in scores.ranked()))
    if len(names) < settings.top_k:
        raise UsageError(
            f"--top-k {settings.top_k}: {source} has {len(names)} layers with a cosine from three or more rows."
        )
    chosen = tuple(names[: settings.top_k])
    return {"double": chosen, "double_sizes": tuple(size[name] for name in chosen)}


def gramians(run: Run) -> Array:
    """The Gramians (n, L, T, T) of a run; of a long one every k-th row."""
    return run.gram(stride=max(1, len(run) // LONG))


_READERS: dict[str, Callable[[Path, Settings], Mapping[str, Any]]] = {
    "gradnorm-static": _average_weights,
    "split": _layers_in_conflict,
}
