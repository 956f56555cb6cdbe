"""Callbacks for the Trainer of Ultralytics YOLO: box, cls and dfl as three tasks. Imports nothing of Ultralytics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import UsageError
from gradprobe.integrations.trainer_recording import Recording
from gradprobe.rows import Sink

__all__ = ["GradprobeCallback"]


_READS = {"box": "boxes", "cls": "scores", "dfl": "boxes", "l1": "boxes"}
"""Which of the detection head's predictions each loss has its gradient from."""

_GAINS = {"box": "box", "cls": "cls", "dfl": "dfl", "l1": "dfl"}
"""The setting that weights each loss."""

_Predictions = Any
"""{"boxes": (B, ., A), "scores": (B, classes, A), ...}, or such mappings in a mapping, or (..., such a mapping)."""


class GradprobeCallback:
    """Measures inside ``YOLO(...).train(...)``, between Ultralytics' loss and its backward.

    >>> model = YOLO("yolo11n.yaml")  # doctest: +SKIP
    >>> GradprobeCallback("conflict.h5", every=10).add_to(model)  # doctest: +SKIP
    >>> model.train(data="coco128.yaml", epochs=3)  # doctest: +SKIP

    In detection the losses are recorded without Ultralytics' gains; the weight is the gain times the batch size, by
    which Ultralytics multiplies: weights times losses add up to what is trained on. A loss whose gain is 0 is no task.
    Other heads (segmentation, pose)
    are measured outside the head, with the losses as Ultralytics prints them and the batch size as weight.

    The file is closed when ``train`` ends, by an exception or Ctrl-C too. Several GPUs are not measured: Ultralytics
    starts processes of its own for them, which know no callbacks.

    Args:
        out: The run file.
        sinks, overwrite, options: See :func:`gradprobe.attach`.

    Raises:
        UsageError: At the first step, where the criterion does not return its losses one by one.
    """

    def __init__(
        self,
        out: str | Path | None = "conflict.h5",
        *,
        sinks: Sequence[Sink] = (),
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        self.recording = Recording("ultralytics", out, sinks=sinks, overwrite=overwrite, **options)
        self._trainer: Any = None
        self._validated = self._finished = False

    def add_to(self, model: Any) -> GradprobeCallback:
        """Add the callbacks to a ``YOLO`` or to a trainer of its."""
        for event in (
            "on_train_start",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_fit_epoch_end",
            "on_train_end",
            "teardown",
        ):
            model.add_callback(event, getattr(self, event))
        return self

    # ---- Ultralytics' events

    def on_train_start(self, trainer: Any) -> None:
        """Listen to the criterion, which has the predictions and the losses."""
        self._trainer, self._finished = trainer, False
        model = _bare(trainer.model)
        if getattr(model, "criterion", None) is None:
            model.criterion = model.init_criterion()
        model.criterion = _WatchedCriterion(model.criterion, self._on_loss)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Rows carry the epoch."""
        self.recording.start_epoch(int(trainer.epoch))

    def on_train_epoch_end(self, trainer: Any) -> None:
        """The validation that follows is this epoch's; a later one, of the best model, is not."""
        self._validated = False

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Keep the metrics."""
        if not self._validated:
            self._validated = True
            self.recording.log_metrics({**trainer.label_loss_items(trainer.tloss), **trainer.metrics})

    def on_train_end(self, trainer: Any) -> None:
        """Reached by a training that came to its end."""
        self._finished = True

    def teardown(self, trainer: Any) -> None:
        """Close the file; called while an exception passes through, too."""
        model = _bare(trainer.model)
        if isinstance(getattr(model, "criterion", None), _WatchedCriterion):
            model.criterion = model.criterion.criterion
        self._trainer = None
        error = sys.exc_info()[1]
        if self._finished:
            self.recording.close()
        else:
            self.recording.close("failed: ended early" if error is None else error)

    # ---- measuring

    def _on_loss(self, criterion: Any, predictions: _Predictions, batch: Mapping[str, Any], loss: Tensor) -> None:
        names = [name.removesuffix("_loss") for name in _names(self._trainer, criterion, loss)]
        apart = set(names) <= set(_READS) and _holds(predictions, set(_READS.values()))
        gains = _gains(self._trainer.args, names) if apart else dict.fromkeys(names, 1.0)
        if not self.recording.is_open:
            self._open(list(gains), {} if apart else {"shared": _outside_head(_bare(self._trainer.model))})
        size = int(batch["img"].shape[0])
        weights = {name: gain * size for name, gain in gains.items()}

        def unweighted(parts: Iterable[Tensor]) -> dict[str, Tensor]:
            return {name: part / weights[name] for name, part in zip(names, parts, strict=True) if name in weights}

        losses = unweighted(loss)
        if apart and self.recording.probe.is_due:  # only such a step is worth the criterion's second run
            try:
                losses = unweighted(_apart(criterion, predictions, batch, names))
            except Exception as error:  # a lack of memory, say: no reason to end a training
                self.recording.note(losses, weights, error, batch_size=size)
                return
        self.recording.record(losses, weights, batch_size=size, total=loss.sum())

    def _open(self, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
        trainer = self._trainer
        self.recording.open(
            _bare(trainer.model),
            tasks,
            trainer.optimizer,
            scaler=getattr(trainer, "scaler", None),
            epoch=int(trainer.epoch),
            **options,
        )


class _WatchedCriterion:
    """The model's criterion, which tells of every call that training makes."""

    def __init__(self, criterion: Any, on_loss: Callable[[Any, _Predictions, Mapping[str, Any], Tensor], None]) -> None:
        self.criterion, self._on_loss = criterion, on_loss

    def __call__(self, predictions: _Predictions, batch: Mapping[str, Any]) -> Any:
        result = self.criterion(predictions, batch)
        if torch.is_grad_enabled():
            self._on_loss(self.criterion, predictions, batch, result[0])
        return result

    def __getattr__(self, name: str) -> Any:
        if name == "criterion":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.criterion, name)


def _apart(criterion: Any, predictions: _Predictions, batch: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """Each loss with a graph of its own.

    Ultralytics writes its losses into one vector, through whose graph each of them seems to reach the whole head:
    the classification branch would count as shared with the boxes, with gradients of exactly 0. So the criterion is
    asked again, with the predictions detached that a loss has no gradient from. The assignment of boxes, which joins
    the two, is made without gradients anyway.
    """
    vectors = {
        key: criterion(_detached(predictions, key), batch)[0] for key in sorted({_READS[name] for name in names})
    }
    return [vectors[_READS[name]][index] for index, name in enumerate(names)]


def _detached(predictions: _Predictions, keep: str) -> _Predictions:
    if isinstance(predictions, tuple):
        return (*predictions[:-1], _detached(predictions[-1], keep))
    return {
        key: _detached(value, keep)
        if isinstance(value, Mapping)
        else value.detach()
        if key in _READS.values() and key != keep
        else value
        for key, value in predictions.items()
    }


def _holds(predictions: _Predictions, keys: set[str]) -> bool:
    if isinstance(predictions, tuple):
        return bool(predictions) and _holds(predictions[-1], keys)
    if not isinstance(predictions, Mapping):
        return False
    inner = [value for value in predictions.values() if isinstance(value, Mapping)]
    return all(_holds(value, keys) for value in inner) if inner else keys <= set(predictions)


def _names(trainer: Any, criterion: Any, loss: Tensor) -> Sequence[str]:
    names = getattr(criterion, "loss_names", None) or getattr(getattr(criterion, "one2one", None), "loss_names", None)
    names = names or trainer.loss_names
    if loss.ndim != 1 or not names or len(names) != loss.numel():
        raise UsageError(
            f"this criterion of Ultralytics ({type(criterion).__name__}) returns a loss of shape {tuple(loss.shape)} "
            f"for the names {list(names)}; one number per name is needed, as detection, segmentation and pose return."
        )
    return list(names)


def _gains(settings: Any, names: Sequence[str]) -> dict[str, float]:
    gains = {name: float(getattr(settings, _GAINS[name])) for name in names}
    return {name: gain for name, gain in gains.items() if gain}


def _outside_head(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    layers: Any = model.model
    head = f"model.{len(layers) - 1}."
    return lambda name, _: not name.startswith(head)


def _bare(model: nn.Module) -> Any:
    return getattr(model, "module", model)  # out of DistributedDataParallel
