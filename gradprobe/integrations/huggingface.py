"""A callback for the Trainer of Hugging Face's `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import MissingExtraError, UsageError
from gradprobe.integrations.trainer_recording import Recording, batch_size_of
from gradprobe.rows import Sink

__all__ = ["GradprobeCallback"]


try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise MissingExtraError("transformers", "huggingface", "gradprobe.integrations.huggingface") from error

_SPEED = ("_runtime", "_per_second", "_model_preparation_time", "_compilation_time")
"""How the names of metrics end that a Trainer adds to every evaluation."""

_FromOutputs = Callable[[Mapping[str, Any], Any], Mapping[str, "float | Tensor"]]
"""A function of a model's inputs, by name, and its outputs."""


class GradprobeCallback(TrainerCallback):  # type: ignore[misc]
    """Measures inside ``Trainer.train``, between the model's forward and the Trainer's own backward.

    No event of a ``TrainerCallback`` comes between the two, so the callback listens to the model's forward: its
    outputs hold the tasks' losses, with their graphs, beside the ``loss`` that is trained on.

    >>> class Model(nn.Module):  # doctest: +SKIP
    ...     def forward(self, inputs, labels, mood):
    ...         losses = {"topic": ..., "mood": ...}
    ...         return {"loss": losses["topic"] + 0.5 * losses["mood"], "losses": losses}
    >>> GradprobeCallback(("topic", "mood"), weights={"topic": 1, "mood": 0.5}).add_to(trainer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    A Trainer whose ``compute_loss`` makes the losses itself calls :meth:`record` there, and ``losses`` is None.

    Args:
        tasks: Names, two or more.
        out: The run file.
        losses: Key of the model's outputs that holds {task: unweighted loss}; or a function of inputs (by name) and
            outputs that gives it; or None: :meth:`record` is called.
        weights: {task: weight}, or a key or function as above; default 1 each.
        sinks, overwrite, options: See :func:`gradprobe.attach`.

    Raises:
        UsageError: On start, under ``nn.DataParallel``, whose replicas' parameters are copies; or a source gives no
            mapping.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        out: str | Path | None = "conflict.h5",
        *,
        losses: str | _FromOutputs | None = "losses",
        weights: Mapping[str, float] | str | _FromOutputs | None = None,
        sinks: Sequence[Sink] = (),
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        self.recording = Recording("transformers", out, sinks=sinks, overwrite=overwrite, **options)
        self._tasks, self._losses, self._weights = tuple(tasks), losses, weights
        self._handle: Any = None

    def add_to(self, trainer: Any) -> GradprobeCallback:
        """Put the callback into a Trainer.

        Beyond ``trainer.add_callback``, this closes the file when ``train`` ends by an exception or Ctrl-C, of which
        a Trainer tells its callbacks nothing.
        """
        trainer.add_callback(self)
        train = trainer.train

        def closing(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            except BaseException as error:
                self._end(error)
                raise

        trainer.train = closing
        return self

    def record(
        self,
        losses: Mapping[str, Tensor],
        weights: Mapping[str, float | Tensor] | None = None,
        *,
        batch_size: int = 0,
        total: Tensor | None = None,
    ) -> None:
        """Measure, from within ``compute_loss``. In evaluation, where there is no graph, this does nothing.

        Args:
            losses: {task: unweighted loss}.
            weights: {task: weight in force}; default 1 each.
            batch_size: Stored with the row.
            total: The loss that is trained on; checked once against the weighted losses.
        """
        if torch.is_grad_enabled() and self.recording.is_open:
            self.recording.record(losses, weights, batch_size=batch_size, total=total)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach."""
        if args.n_gpu > 1:
            raise UsageError(
                f"this Trainer splits each batch over {args.n_gpu} GPUs with nn.DataParallel, whose copies of the "
                "parameters cannot be measured. Start it with torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        wrapped = kwargs["optimizer"]  # by accelerate, without the hooks of an optimizer
        self.recording.open(
            kwargs["model"],
            self._tasks,
            getattr(wrapped, "optimizer", wrapped),
            scaler=getattr(wrapped, "scaler", None),
            step=state.global_step,
            epoch=int(state.epoch or 0),
        )
        self._listen(kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rows carry the epoch."""
        self.recording.start_epoch(int(state.epoch or 0))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the metrics, without what the Trainer says of its own speed."""
        metrics = kwargs.get("metrics") or {}
        self.recording.log_metrics({name: v for name, v in metrics.items() if not name.endswith(_SPEED)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the file."""
        self._end("finished")

    def _listen(self, model: nn.Module) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None if self._losses is None else model.register_forward_hook(self._on_forward, with_kwargs=True)

    def _on_forward(self, model: nn.Module, args: Any, inputs: Mapping[str, Any], outputs: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        assert self._losses is not None
        weights = self._weights
        self.record(
            _from_outputs(self._losses, inputs, outputs, "losses"),
            weights
            if weights is None or isinstance(weights, Mapping)
            else _from_outputs(weights, inputs, outputs, "weights"),
            batch_size=batch_size_of(inputs),
            total=outputs.get("loss") if isinstance(outputs, Mapping) else None,
        )

    def _end(self, end: str | BaseException) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.recording.close(end)


def _from_outputs(source: str | _FromOutputs, inputs: Mapping[str, Any], outputs: Any, what: str) -> Any:
    if callable(source):
        return source(inputs, outputs)
    found = outputs.get(source) if isinstance(outputs, Mapping) else getattr(outputs, source, None)
    if not isinstance(found, Mapping):
        holds = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise UsageError(
            f"the model's outputs ({holds}) hold no {source!r} that is {{task: value}}; return it from forward, or "
            f"give the callback {what}=, a function of inputs and outputs."
        )
    return found
