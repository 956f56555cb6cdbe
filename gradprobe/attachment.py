"""The everyday verb: attach a probe that records into a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.environment import environment
from gradprobe.probes.probe import GradientProbe
from gradprobe.probes.probe_options import refuse_unknown, shows_options
from gradprobe.runfile import RunWriter
from gradprobe.updates import Ledger, Updates

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from gradprobe.probes.probe_options import CommonKeywords
    from gradprobe.rows import Sink


@shows_options
def attach(
    model: nn.Module,
    tasks: Sequence[str],
    out: str | Path | None = None,
    *,
    updates: bool = False,
    ledger: bool | Ledger = False,
    sinks: Sequence[Sink] = (),
    overwrite: bool = False,
    resume: bool = False,
    **options: Unpack[CommonKeywords],
) -> GradientProbe:
    """Attach a probe to any multitask model.

    Args:
        model, tasks: See :class:`gradprobe.GradientProbe`.
        updates: Also record what the optimizer makes of the gradients, see :class:`gradprobe.Updates`; it needs
            ``optimizer``.
        ledger: Also keep a loss ledger, see :class:`gradprobe.Ledger`: make one with the probe batch, on which the
            residual hangs. True: one without, of all steps. It needs ``optimizer``.
        out: The run file; None: rows go to ``sinks`` only. Of several processes the first one writes it.
        sinks: Who gets the rows besides the file.
        overwrite: Replace a run that is there.
        resume: Go on with the run that is there: ``probe.load_state_dict(state)`` before the first step says from
            where, with a state that ``probe.state_dict()`` gave when the checkpoint was saved. Rows from that
            step on are cut. Where there is no run yet, a new one begins.
        options: See :class:`gradprobe.probes.ProbeOptions`. ``provenance`` is stored beside versions and
            machine.

    Returns:
        The probe, a context manager; leaving it closes the file. A notebook's cell that assigns it may be run again:
        the variable's old probe is closed first.

    Raises:
        ProbeError: See :class:`gradprobe.GradientProbe`.
        TypeError: There is no such option.
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
    refuse_unknown(attach, options)
    options["provenance"] = {"trainer": "attach", **environment(), **(options.get("provenance") or {})}
    return GradientProbe(
        model,
        tasks,
        sinks,
        **options,
        updates=Updates() if updates else None,
        ledger=Ledger() if ledger is True else ledger or None,
        _caller=sys._getframe(1),
        _open=None if out is None else partial(RunWriter, out, overwrite=overwrite, resume=resume),
    )
