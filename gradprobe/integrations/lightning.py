"""A callback for Lightning's Trainer, from the package `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradprobe.errors import MissingExtraError, UsageError
from gradprobe.integrations.trainer_recording import Recording, batch_size_of
from gradprobe.rows import Sink

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["GradprobeCallback"]


def _callback_class() -> type[Callback]:
    """Of the package in use; the two are separate copies of one code."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            found: type[Callback] = importlib.import_module(name).Callback
        except ModuleNotFoundError:
            continue
        return found
    raise MissingExtraError("lightning", "lightning", "gradprobe.integrations.lightning")


class GradprobeCallback(_callback_class()):  # type: ignore[misc]
    """Measures inside ``Trainer.fit`` just before Lightning's own backward.

    The module keeps the tasks' losses, with their graphs, where ``losses`` finds them:

    >>> class Module(LightningModule):  # doctest: +SKIP
    ...     def training_step(self, batch, batch_idx):
    ...         self.losses = {"det": ..., "cls": ...}
    ...         return self.losses["det"] + 0.5 * self.losses["cls"]
    >>> Trainer(callbacks=[GradprobeCallback(("det", "cls"), weights={"det": 1, "cls": 0.5})])  # doctest: +SKIP

    The file is closed when ``fit`` ends, by an exception or Ctrl-C too. Metrics that the module logs are kept per
    epoch. A training resumed from a checkpoint counts its steps on.

    Args:
        tasks: Names, two or more.
        out: The run file.
        losses: Attribute of the module that holds {task: unweighted loss}, or a function of the module that gives it.
        weights: {task: weight}, or an attribute or function as above; default 1 each.
        sinks, overwrite, options: See :func:`gradprobe.attach`.

    Raises:
        UsageError: On start, where the module has several optimizers, or ``updates=`` or ``ledger=`` meets accumulated
            gradients; or a source gives no mapping.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        out: str | Path | None = "conflict.h5",
        *,
        losses: str | Callable[[Any], Mapping[str, Tensor]] = "losses",
        weights: Mapping[str, float] | str | Callable[[Any], Mapping[str, float | Tensor]] | None = None,
        sinks: Sequence[Sink] = (),
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.recording = Recording("lightning", out, sinks=sinks, overwrite=overwrite, **options)
        self._tasks, self._losses, self._weights = tuple(tasks), losses, weights
        self._batch_size = 0
        self._saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        if len(trainer.optimizers) != 1:
            raise UsageError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers; the callback measures a "
                "training with one. Call gradprobe.attach in the module's own training_step instead."
            )
        _refuse_accumulated(trainer.accumulate_grad_batches, self.recording.options)
        self.recording.open(
            pl_module,
            self._tasks,
            trainer.optimizers[0],
            scaler=_scaler(trainer),
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            state=self._saved,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows carry the epoch."""
        self.recording.start_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Rows carry the batch size."""
        self._batch_size = batch_size_of(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Measure: the graph is whole, and no gradient of this batch is in ``.grad`` yet."""
        weights = self._weights
        # What arrives is divided for gradient accumulation, and multiplied by a scaler where there is one. In manual
        # optimization it may be one loss of several.
        whole = _scaler(trainer) is None and pl_module.automatic_optimization
        self.recording.record(
            _from_module(pl_module, self._losses, "losses"),
            weights if weights is None or isinstance(weights, Mapping) else _from_module(pl_module, weights, "weights"),
            batch_size=self._batch_size,
            total=loss * trainer.accumulate_grad_batches if whole else None,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the module logged, validation included."""
        self.recording.log_metrics(trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        self.recording.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file; the exception goes on."""
        self.recording.close(exception)

    def state_dict(self) -> dict[str, Any]:
        """Where the probe stands, for Lightning's checkpoint."""
        return self.recording.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._saved = state_dict or None


def _refuse_accumulated(batches: int, options: Mapping[str, Any]) -> None:
    """Raise where every update would be of several calls, which is not taken apart."""
    asked = [name for name in ("updates", "ledger") if options.get(name)]
    if batches > 1 and asked:
        raise UsageError(
            f"{asked[0]}= takes the updates of single batches apart, and here accumulate_grad_batches={batches} makes "
            f"each of {batches}: leave {asked[0]}= out (gradients are measured on all {batches}), or accumulate none."
        )


def _from_module(module: LightningModule, source: str | Callable[[Any], Any], what: str) -> Any:
    if callable(source):
        return source(module)
    found = getattr(module, source, None)
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{type(module).__name__}.{source} is {'missing' if found is None else type(found).__name__}; set it in "
            f"training_step to {{task: value}}, or give the callback {what}=, a function of the module that returns it."
        )
    return found


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
