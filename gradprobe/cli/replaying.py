"""The methods that ``gradprobe replay`` can ask, and what it asks them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradprobe import measures
from gradprobe.errors import RunFileError, UsageError
from gradprobe.measures import Array
from gradprobe.runfile import Run
from gradprobe.trainers.settings import Settings
from gradprobe.trainers.weightings import METHODS, STATEFUL_METHODS, Weighting
from gradprobe.verdict.replay import Method, Replayed, effect, replay


def replay_run(run: Run, names: list[str]) -> list[Replayed]:
    """The recorded weights, the joint step's, and those of every method.

    Args:
        run: Of a long one give a thin one.
        names: Stateless methods of gradient surgery, and ``gradnorm``.

    Raises:
        UsageError: A method is unknown, or keeps state that rows do not tell.
        MissingExtraError: TorchJD is not installed.
        RunFileError: No row was measured, or the tasks share no layer.
    """
    check(names)
    if not len(run) or not run.layers:
        what = "has no rows" if not len(run) else "its tasks share no layer: there is no interference to treat"
        raise RunFileError(f"{run.path}: {what}, so there is nothing to replay.")
    gram = measures.over_rows(run.gram(), run.counts())
    static = np.array(setting(run, "task_weights", [1.0] * len(run.tasks)), dtype=np.float64)
    fixed = [("recorded", run["weight"].astype(np.float64)), ("joint", np.tile(static, (len(gram), 1)))]
    done = [effect(name, gram, static, weight) for name, weight in fixed]
    try:
        return done + [replay(name, gram, static, _method(run, name, gram, static)) for name in names]
    except ValueError as error:  # a learning rate below 0, and the like
        raise RunFileError(f"{run.path}: its settings cannot be replayed ({error}).") from None


def check(names: list[str]) -> None:
    """Whether all can be asked.

    Raises:
        UsageError: One cannot.
    """
    known = [name for name in METHODS if name not in STATEFUL_METHODS] + ["gradnorm"]
    if not names:
        raise UsageError(f"--method names none (there are: {', '.join(known)}).")
    for name in names:
        if name in STATEFUL_METHODS:
            raise UsageError(
                f"--method {name}: its weights depend on all steps before, not only on the recorded ones; "
                f"record it live: --trainer {name}"
            )
        if name not in known:
            raise UsageError(f"--method {name}: unknown (there are: {', '.join(known)}).")


def setting(run: Run, name: str, default: Any) -> Any:
    """A setting of the recording; ``default`` where it has none, as runs of `gradprobe.attach`.

    Raises:
        RunFileError: It is of another kind than the default; the file may be a stranger's.
    """
    value = run.provenance.get(f"settings.{name}", default)
    numbers = value if isinstance(default, list) and isinstance(value, list) else [value]
    kinds = (str,) if isinstance(default, str) else (int, float)
    alike = isinstance(value, list) == isinstance(default, list) and all(isinstance(each, kinds) for each in numbers)
    if isinstance(default, list) and len(numbers) != len(default):
        alike = False
    if isinstance(default, int) and not (alike and math.isfinite(value) and value == int(value) and 0 <= value < 2**63):
        alike = False
    if not alike or any(isinstance(each, float) and math.isnan(each) for each in numbers):
        raise RunFileError(f"{run.path}: settings.{name} is {repr(value)[:80]}, which it cannot be.")
    return value


def _method(run: Run, name: str, gram: Array, static: Array) -> Method:
    if name == "gradnorm":
        answers = list(_gradnorm(run, static))
        return answers.__getitem__
    from gradprobe.trainers.surgery import choose

    defaults = Settings()
    weighting = Weighting(
        name,
        len(run.tasks),
        seed=setting(run, "seed", 0),
        cagrad_c=setting(run, "cagrad_c", defaults.cagrad_c),
    )
    match, steps = bool(setting(run, "match_norm", True)), run["step"]
    return lambda row: choose(weighting, gram[row], int(steps[row]), static, match=match)


def _last_shared(run: Run) -> str:
    """The last layer on which every task, or else two, have had a gradient."""
    several = run.reach.sum(axis=1)
    for found in (run.reach.all(axis=1), several >= 2, several >= 0):
        if found.any():
            return run.layers[int(np.flatnonzero(found)[-1])]
    return run.layers[-1]


def _gradnorm(run: Run, static: Array) -> Iterator[Array | None]:
    """The weights at each row of a GradNorm that sees the recorded rows alone, one after the other."""
    import torch

    from gradprobe.trainers.gradnorm import GradNorm

    d = Settings()
    layer = setting(run, "gradnorm_layer", "") or str(run.provenance.get("model.last_shared_layer", _last_shared(run)))
    chosen = run.layer_indices(layer)
    counts, square = run.counts()[:, chosen], np.square(run["grad_norm"].astype(np.float64)[:, chosen])
    norms = np.sqrt(np.where(counts.any(axis=1), np.where(counts, square, 0.0).sum(axis=1), np.nan))
    balancer = GradNorm(
        dict(zip(run.tasks, static.tolist(), strict=True)),
        [],
        alpha=setting(run, "gradnorm_alpha", d.gradnorm_alpha),
        lr=setting(run, "gradnorm_lr", d.gradnorm_lr),
        momentum=setting(run, "gradnorm_momentum", d.gradnorm_momentum),
        total=setting(run, "weight_sum", float(len(run.tasks))),
        lowest=setting(run, "min_weight", d.min_weight),
        highest=setting(run, "max_weight", d.max_weight),
    )
    for loss, norm in zip(run["loss"].astype(np.float64), norms, strict=True):
        yield np.array(list(balancer.weights().values()))
        balancer.advance(torch.from_numpy(loss), torch.from_numpy(norm))
