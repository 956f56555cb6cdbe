"""The everyday verb: attach a probe that records into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.probes.probe import GradientProbe
from gradprobe.provenance import environment
from gradprobe.runfile import RunWriter
from gradprobe.updates import Ledger, Updates

if TYPE_CHECKING:
    from torch import nn
    from torch.amp import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from gradprobe.probes.binding import Groups, Shared
    from gradprobe.probes.loader import ProbeLoader
    from gradprobe.rows import Provenance, Sink


def attach(
    model: nn.Module,
    tasks: Sequence[str],
    out: str | Path | None = None,
    *,
    every: int | None = None,
    budget: float | None = None,
    optimizer: Optimizer | None = None,
    scaler: GradScaler | None = None,
    accumulate: int = 1,
    shared: Shared | None = None,
    layers: Groups | None = None,
    level: str = "parameters",
    features: Iterable[str] | None = None,
    memory: str = "normal",
    products: str = "direct",
    sketch: int | tuple[int, int] | None = None,
    process_group: ProcessGroup | None = None,
    updates: bool = False,
    ledger: bool | Ledger = False,
    probe_loader: ProbeLoader | None = None,
    sinks: Sequence[Sink] = (),
    provenance: Provenance | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> GradientProbe:
    """Attach a probe to any multitask model.

    Args:
        model, tasks, every, budget, optimizer, scaler, accumulate, shared, layers, level, features, memory, products,
            sketch, process_group: See :class:`gradprobe.GradientProbe`.
        updates: Also record what the optimizer makes of the gradients, see :class:`gradprobe.Updates`; it needs
            ``optimizer``.
        ledger: Also keep a loss ledger, see :class:`gradprobe.Ledger`: make one with the probe batch, on which the
            residual hangs. True: one without, of all steps. It needs ``optimizer``.
        probe_loader: Also measure on samples drawn for that, see :class:`gradprobe.ProbeLoader`.
        out: The run file; None: rows go to ``sinks`` only. Of several processes the first one writes it.
        sinks: Who gets the rows besides the file.
        provenance: Stored in the file, beside versions and machine.
        overwrite: Replace a run that is there.
        resume: Go on with the run that is there: ``probe.load_state_dict(state)`` before the first step says from
            where, with a state that ``probe.state_dict()`` gave when the checkpoint was saved. Rows from that
            step on are cut. Where there is no run yet, a new one begins.

    Returns:
        The probe, a context manager; leaving it closes the file. A notebook's cell that assigns it may be run again:
        the variable's old probe is closed first.

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
    return GradientProbe(
        model,
        tasks,
        sinks,
        every=every,
        budget=budget,
        optimizer=optimizer,
        scaler=scaler,
        accumulate=accumulate,
        shared=shared,
        layers=layers,
        level=level,
        features=features,
        memory=memory,
        products=products,
        sketch=sketch,
        process_group=process_group,
        updates=Updates() if updates else None,
        ledger=Ledger() if ledger is True else ledger or None,
        probe_loader=probe_loader,
        provenance={"trainer": "attach", **environment(), **(provenance or {})},
        _caller=sys._getframe(1),
        _open=None if out is None else partial(RunWriter, out, overwrite=overwrite, resume=resume),
    )
