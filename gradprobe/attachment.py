"""The everyday verb: attach a probe that records into a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.probes.probe import GradientProbe
from gradprobe.provenance import environment
from gradprobe.runfile import RunWriter

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradprobe.rows import Sink


def attach(
    model: nn.Module,
    tasks: Sequence[str],
    out: str | Path | None = None,
    *,
    every: int = 10,
    optimizer: Optimizer | None = None,
    accumulate: int = 1,
    shared: Iterable[str | nn.Parameter] | Callable[[str, nn.Parameter], bool] | None = None,
    layers: Mapping[str, Iterable[nn.Parameter]] | None = None,
    sinks: Sequence[Sink] = (),
    overwrite: bool = False,
    resume: bool = False,
) -> GradientProbe:
    """Attach a probe to any multitask model.

    Args:
        model, tasks, every, optimizer, accumulate, shared, layers: See :class:`gradprobe.GradientProbe`.
        out: The run file; None: rows go to ``sinks`` only.
        sinks: Who gets the rows besides the file.
        overwrite: Replace a run that is there.
        resume: Go on with the run that is there: ``probe.load_state_dict(state)`` before the first step says from
            where, with a state that ``probe.state_dict()`` gave when the checkpoint was saved. Rows from that
            step on are cut. Where there is no run yet, a new one begins.

    Returns:
        The probe, a context manager; leaving it closes the file.

    Raises:
        ProbeError: See :class:`gradprobe.GradientProbe`.
        RunFileError: The file exists, or cannot be written.

    Example:
        >>> with attach(model, ("det", "cls"), "conflict.h5", optimizer=optimizer) as probe:  # doctest: +SKIP
        ...     for images, targets in loader:
        ...         losses = {"det": ..., "cls": ...}
        ...         probe.backward(losses, {"det": 1.0, "cls": 0.01})
        ...         optimizer.step()
        ...         optimizer.zero_grad()

        To go on after a crash, keep the probe's state with the model's:

        >>> torch.save({"model": model.state_dict(), ..., "probe": probe.state_dict()}, path)  # doctest: +SKIP
        >>> probe = attach(model, ("det", "cls"), "conflict.h5", resume=True)  # doctest: +SKIP
        >>> probe.load_state_dict(torch.load(path)["probe"])  # doctest: +SKIP
    """
    writer = RunWriter(out, overwrite=overwrite, resume=resume) if out is not None else None
    try:
        return GradientProbe(
            model,
            tasks,
            [*([writer] if writer is not None else []), *sinks],
            every=every,
            optimizer=optimizer,
            accumulate=accumulate,
            shared=shared,
            layers=layers,
            provenance={"trainer": "attach", **environment()},
        )
    except BaseException:
        if writer is not None:
            writer.close("failed: not attached")
        raise
