"""What every callback does: open one run when a trainer starts, and close it however the training ends."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.attachment import attach
from gradprobe.errors import UsageError, tell
from gradprobe.probes import GradientProbe
from gradprobe.probes.probe import ending
from gradprobe.probes.probe_options import refuse_unknown
from gradprobe.processes import everybody
from gradprobe.rows import Sink

_SAME = 1e-2
"""How far the weighted losses may add up to something else than the loss that is trained on, as a share of it:
half-precision rounding is below, a forgotten weight is above."""


class Recording:
    """One probe and its run file, between the start and the end of a training that somebody else runs.

    Under ``torch.distributed`` every process has a probe, gradients are averaged over all of them as the trainer
    averages them, and the first one alone has a file and sinks.

    Args:
        trainer: Name of the trainer, for the file.
        out, sinks, overwrite: See :func:`gradprobe.attach`. A training that is resumed never overwrites.
        options: Further arguments of :func:`gradprobe.attach`.

    Raises:
        TypeError: There is no such argument.

    Attributes:
        trouble: What of the last file could not be written when it was closed, and what to do; empty: nothing.
    """

    def __init__(
        self,
        trainer: str,
        out: str | Path | None,
        *,
        sinks: Sequence[Sink] = (),
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        refuse_unknown(attach, options, "GradprobeCallback")
        # Absolute: a trainer may change its folder before it begins, or between two beginnings.
        self._trainer, self._out, self._sinks = trainer, None if out is None else Path(out).absolute(), sinks
        self.trouble = ""
        self._overwrite, self.options = overwrite, options
        self._checked = False
        self._warned_of: set[str] = set()
        self._probe: GradientProbe | None = None
        self._epoch = 0

    @property
    def probe(self) -> GradientProbe:
        """The probe.

        Raises:
            UsageError: Training has not begun, or has ended.
        """
        if self._probe is None:
            raise UsageError("the callback has no probe now: there is one from the start of a training to its end.")
        return self._probe

    @property
    def is_open(self) -> bool:
        """Whether a training is being recorded."""
        return self._probe is not None

    def open(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        optimizer: Optimizer | None,
        *,
        scaler: Any = None,
        step: int = 0,
        epoch: int = 0,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Attach the probe.

        Args:
            model, tasks, optimizer: See :func:`gradprobe.attach`.
            scaler: The trainer's, where it has one; one that is switched off counts as none.
            step, epoch: Where the training begins: 0 unless it was resumed from a checkpoint. Then the run that is
                there goes on, without its rows from ``step`` on.
            state: What :meth:`state` gave when that checkpoint was saved, where it was.
            options: Further arguments of :func:`gradprobe.attach`.

        Raises:
            ProbeError, RunFileError: See :func:`gradprobe.attach`.
        """
        restarted = self._probe is not None  # a trainer that began again, say with a smaller batch: the same run
        self.close("failed: started again")
        self._epoch, self._checked = epoch, False
        self._probe = attach(
            model,
            tasks,
            self._out,
            optimizer=optimizer,
            scaler=scaler if scaler is not None and scaler.is_enabled() else None,
            sinks=self._sinks if not restarted else (),
            overwrite=(self._overwrite or restarted) and not step,
            resume=bool(step),
            process_group=everybody(),
            provenance={"trainer": self._trainer},
            **{**self.options, **options},
        )
        self._probe.epoch = epoch
        if step:
            self._probe.load_state_dict(state or _probe_state_at(self._probe.state_dict(), step, epoch))

    def record(
        self,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor] | None = None,
        *,
        batch_size: int = 0,
        total: Tensor | None = None,
    ) -> None:
        """Measure, where the step is due.

        Args:
            losses, weights, batch_size: See :meth:`gradprobe.GradientProbe.record`.
            total: The loss that is trained on. Where the weighted losses add up to something else, a warning says
                so, once.
        """
        self.probe.record(losses, weights, batch_size=batch_size)
        if total is not None and not self._checked:
            self._checked = True
            _compare(losses, weights, float(total.detach()))

    def note(
        self,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor],
        error: Exception,
        *,
        batch_size: int = 0,
    ) -> None:
        """A row without a measurement, where preparing one failed; says so once. Training goes on."""
        reason = f"measuring failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        self.probe.note(losses, weights, reason, batch_size=batch_size)
        if reason not in self._warned_of:
            self._warned_of.add(reason)
            warnings.warn(
                f"gradprobe: step {self.probe.step}: {reason}. Training goes on.", RuntimeWarning, stacklevel=3
            )

    def start_epoch(self, epoch: int) -> None:
        """What rows belong to from here on; from 0."""
        self._epoch = epoch
        if self._probe is not None:
            self._probe.epoch = epoch

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Metrics of the present epoch; what is no single number, and the epoch itself, is left out."""
        numbers = {name: _number(value) for name, value in values.items() if name != "epoch"}
        found = {name: value for name, value in numbers.items() if value is not None}
        if self._probe is not None and found:
            self._probe.log_metrics(self._epoch, **found)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for :meth:`open`; empty where nothing is open."""
        return self._probe.state_dict() if self._probe is not None else {}

    def close(self, end: str | BaseException = "finished") -> None:
        """Close the file and let go of the model. Does nothing where nothing is open.

        A failure is a warning, and :attr:`trouble` says it: the trainer has still to save the model, or to say why it
        failed.
        """
        probe, self._probe = self._probe, None
        if probe is None:
            return
        try:
            probe.close(end if isinstance(end, str) else ending(end))
        except Exception as error:
            tell(str(error))
        self.trouble = probe.trouble


def batch_size_of(batch: Any) -> int:
    """Length of the first tensor in a batch of tensors, lists and mappings; 0 where there is none."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else 0
    members = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for size in map(batch_size_of, members) if size), 0)


def _probe_state_at(state: Mapping[str, Any], step: int, epoch: int) -> dict[str, Any]:
    """The state of a probe that stands at ``step`` and has seen the metrics of all epochs before ``epoch``."""
    clock = {**state["clock"], "step": step}
    return {**state, "clock": clock, "epoch": epoch, "last_metrics": epoch - 1}


def _compare(losses: Mapping[str, Tensor], weights: Mapping[str, float | Tensor] | None, total: float) -> None:
    summed = sum(float(loss.detach()) * (1.0 if weights is None else float(weights[t])) for t, loss in losses.items())
    if abs(summed - total) > _SAME * abs(total):
        warnings.warn(
            f"gradprobe: the weighted losses of {list(losses)} add up to {summed:.6g}, but the loss that is trained "
            f"on is {total:.6g}. Weights that are missing, or a term that is no task, would explain it; pass "
            "weights= so that the file holds what was in force.",
            RuntimeWarning,
            stacklevel=3,
        )


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    try:
        return None if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        return None
