"""The processes of one data-parallel training: this one alone, or several with a copy of the model each.

The engine is torch's own: ``torchrun`` starts the processes, ``torch.distributed`` joins them (gloo on CPUs, nccl on
GPUs), and DDP averages the gradients. Evaluating and writing is the first process's.

Task gradients are averaged before they are multiplied: the cosine of the averaged gradients is not the mean of the
processes' cosines, nor its norm that of their norms. Every process makes its own task gradients, those are averaged as
the training averages the joint one, and each multiplies the same averages: all of them know the same Gramians, and
decide alike what to measure next.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradprobe.errors import ProbeError, TrainingError
from gradprobe.measures import Array

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=2)
"""How long one process waits for another: the first evaluates alone, which may take its time."""


class OneProcess:
    """A single process: nothing to average, nobody to wait for."""

    size = 1
    rank = 0
    first = True
    """Whether this is the process that evaluates, writes, and hands rows to the sinks."""

    parts: Array | None = None
    """(L, T, T) what :func:`gradprobe.statistics.noise_part` needs of the processes' own gradients in the last
    measurement of a batch as a whole; None: there is one process."""

    share = 1.0
    """Of the step's samples: how much this process's losses count in the mean over all."""

    def together(self, part: Callable[[], _T]) -> _T:
        """Do this process's part; if it fails anywhere it fails everywhere, so that nobody waits for the others."""
        return part()

    def all(self, flag: bool) -> bool:
        """Whether it holds in every process."""
        return flag

    def any(self, flag: bool) -> bool:
        """Whether it holds in some process."""
        return not self.all(not flag)

    def gathered(self, own: _T) -> list[_T]:
        """What each process has, in the order of the processes."""
        return [own]

    def first_says(self, flag: bool) -> bool:
        """What the first process says."""
        return flag

    def average(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """One task's gradients on some parameters: the mean over the processes, number by number.

        None counts as zero, and stays None where all have None.
        """
        return list(gradients)

    def mean(self, values: Array) -> Array:
        """The mean over the processes of some numbers; NaN where one has NaN."""
        return values

    def mean_of_present(self, values: Array, there: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
        """The mean of each number over the processes that have it, NaN where none has; and whether one has."""
        part = self.mean(np.concatenate([np.where(there, values, 0.0), there]))
        total, present = part[: len(values)], part[len(values) :]
        return np.where(present > 0, total / np.maximum(present, 1 / self.size), np.nan), present > 0

    @contextmanager
    def equal_shares(self) -> Iterator[None]:
        """Within it, :attr:`share` is the same in all processes."""
        share, self.share = self.share, 1 / self.size
        try:
            yield
        finally:
            self.share = share

    def shares(self, own: Sequence[float]) -> list[float]:
        """The shares of all processes' micro-batches in the batch of all; of those that have samples.

        Args:
            own: Of this process's micro-batches in its own batch.
        """
        return list(own)

    def spread(self, own: Array) -> None:
        """Set :attr:`parts`.

        Args:
            own: (L, T, T) Gramians of this process's gradients before they are averaged.
        """

    # ---- of a bundled training

    def copies(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What the forward of a training step goes through."""
        return model

    def scaled(self, losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """This process's losses, so scaled that their mean over the processes is the mean over all samples."""
        return dict(losses)

    def agreed(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The first process's weights: one number that differs would let the copies of the model drift apart."""
        return dict(weights)

    def leave(self) -> None:
        """The training is over."""

    @contextmanager
    def losing_none(self) -> Iterator[None]:
        """Within it, the end of another process is an error that says so."""
        yield


class ManyProcesses(OneProcess):
    """Several processes with a copy of the model each.

    Args:
        group: Theirs.
        device: Where gradients are: that of the model's parameters.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.first = self.rank == 0
        self.share = 1 / self.size

    def together(self, part: Callable[[], _T]) -> _T:
        """See :class:`OneProcess`.

        Raises:
            RuntimeError: It failed in another process.
        """
        failure: Exception | None = None
        try:
            result = part()
        except Exception as error:
            failure = error
        if self.all(failure is None):
            return result
        raise failure or RuntimeError("failed in another process")

    def all(self, flag: bool) -> bool:
        return bool(self._reduced(torch.tensor([float(flag)]), dist.ReduceOp.MIN))

    def gathered(self, own: _T) -> list[_T]:
        """See :class:`OneProcess`; pickled, so for what is rarely asked."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self._group)
        return found

    def first_says(self, flag: bool) -> bool:
        return bool(self._reduced(torch.tensor([float(flag and self.first)]), dist.ReduceOp.MAX))

    def average(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """See :class:`OneProcess`; in one message for each type of number. What comes back is flat."""
        there = self._reduced(torch.tensor([float(g is not None) for g in gradients]), dist.ReduceOp.MAX).tolist()
        result: list[Tensor | None] = [None] * len(gradients)
        for kind in sorted({p.dtype for p in parameters}, key=str):
            places = [i for i, p in enumerate(parameters) if p.dtype == kind and there[i]]
            if not places:
                continue
            flat = torch.cat([_flat(gradients[i], parameters[i]) for i in places])
            dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=self._group)
            sizes = [parameters[i].numel() for i in places]
            for place, part in zip(places, flat.div_(self.size).split(sizes), strict=True):
                result[place] = part
        return result

    def mean(self, values: Array) -> Array:
        total = self._reduced(torch.from_numpy(np.array(values, dtype=np.float64)), dist.ReduceOp.SUM)
        return total.cpu().numpy() / self.size

    def shares(self, own: Sequence[float]) -> list[float]:
        found = self.gathered([self.share * part for part in own])
        return [share for process in found for share in process if share > 0]

    def spread(self, own: Array) -> None:
        """See :class:`OneProcess`. A task without a gradient in one process has a gradient of 0 there."""
        self.parts = self.mean(np.nan_to_num(own, posinf=0.0, neginf=0.0)) / self.size

    def copies(self, model: nn.Module, device: torch.device) -> nn.Module:
        """DDP. Every copy keeps BatchNorm statistics of its own: training does not use them, and evaluation uses the
        first process's. (Buffers that are broadcast before a forward would change under an earlier forward's graph.)
        """
        called = inspect.signature(DistributedDataParallel).parameters
        apart = "forward_sync_buffers" if "forward_sync_buffers" in called else "broadcast_buffers"  # before torch 2.14
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, **{apart: False})  # type: ignore[arg-type]

    def scaled(self, losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """See :class:`OneProcess`. DDP gives every process the weight 1 / size, however many samples it has."""
        factor = share * self.size
        return {task: loss * factor for task, loss in losses.items()} if factor != 1 else dict(losses)

    def agreed(self, weights: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(weights.values()), dtype=torch.float64, device=self._device)
        dist.broadcast(values, src=0)
        return dict(zip(weights, values.tolist(), strict=True))

    def leave(self) -> None:
        dist.destroy_process_group()

    @contextmanager
    def losing_none(self) -> Iterator[None]:
        """See :class:`OneProcess`.

        Raises:
            TrainingError: Another process ended, or did not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if not _of_communication(error):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.size} lost another one, which ended or did not answer "
                f"({' '.join(str(error).split())[:200]}). The file is complete up to here; go on with --resume."
            ) from error

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.to(self._device)
        dist.all_reduce(values, how, group=self._group)
        return values


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter).detach().reshape(-1)
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.detach().resolve_conj().reshape(-1)


# ---- how a training's processes begin


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started for this training; 1 where it has not."""
    return int(environment.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in environment else 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that evaluates and writes, before they are joined."""
    return started(environment) == 1 or int(environment.get("RANK", "0")) == 0


def join(device: torch.device) -> OneProcess:
    """This process alone, or as one of those that torchrun has started."""
    if started() == 1:
        return OneProcess()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return ManyProcesses(dist.group.WORLD, device)


def everybody() -> dist.ProcessGroup | None:
    """The group of all processes that were joined; None: this one is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes that were joined; itself where there is one. In place."""
    if everybody() is None:
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _of_communication(error: RuntimeError) -> bool:
    """Gloo's errors are plain RuntimeErrors, which name its source files or what the system said."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


# ---- DDP around a model that is measured


_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Model -> the DDP module through which its forward went."""


def remember_wrapper(model: nn.Module, nodes: Iterable[object]) -> None:
    """Find DDP in the graph of a forward: its sink is there with ``find_unused_parameters`` and ``static_graph``."""
    for node in nodes:
        if type(node).__name__ == "_DDPSinkBackward" and hasattr(node, "ddp_weakref"):
            _wrappers[model] = node.ddp_weakref


@contextmanager
def reduction_kept(model: nn.Module) -> Iterator[None]:
    """Leave it to the training's own backward to average gradients.

    With ``static_graph`` the first backward that comes through DDP's sink, and no later one, has all gradients averaged
    at its end. If a pass of a probe were that first one, the first step of each process would stay its own.
    """
    wrapper = _wrappers.get(model)
    ddp = wrapper() if wrapper is not None else None
    waiting = ddp is not None and getattr(ddp, _ENQUEUED, True) is False
    if waiting:
        setattr(ddp, _ENQUEUED, True)
    try:
        yield
    finally:
        if waiting:
            setattr(ddp, _ENQUEUED, False)


_ENQUEUED = "_static_graph_delay_allreduce_enqueued"


def replicas(model: nn.Module, group: dist.ProcessGroup | None) -> tuple[nn.Module, OneProcess]:
    """The model inside, whose layers have their own names, and the processes that train it.

    Args:
        model: DDP, or any module.
        group: Of a training that averages gradients by itself; None: that of DDP, or this process alone.

    Raises:
        ProbeError: ``model`` is none.
    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model is a {type(model).__name__}, not a torch.nn.Module.")
    if isinstance(model, DistributedDataParallel):
        group = group if group is not None else model.process_group
        model = model.module
    if group is None or dist.get_world_size(group) == 1:
        return model, OneProcess()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return model, ManyProcesses(group, device)
