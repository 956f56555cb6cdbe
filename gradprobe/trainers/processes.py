"""The processes of one training: this one alone, or several with a copy of the model and a part of each batch each.

The engine is torch's own: ``torchrun`` starts the processes, ``torch.distributed`` joins them (gloo on CPUs, nccl on
GPUs), and DDP averages the gradients. Evaluating and writing is the first process's.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradprobe.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from gradprobe.trainers.settings import Settings

PATIENCE = timedelta(hours=2)
"""How long one process waits for another: the first evaluates alone, which may take its time."""


class OneProcess:
    """Alone: nothing to share, nobody to wait for."""

    rank, size = 0, 1
    first = True
    """Whether this is the process that evaluates and writes."""

    def copies(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What the forward of a training step goes through."""
        return model

    def share(self, losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """This process's losses, so scaled that their mean over the processes is the mean over all samples."""
        return dict(losses)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over the processes of each number; not finite where one's is not."""
        return list(values)

    def agreed(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The first process's weights: one number that differs would let the copies of the model drift apart."""
        return dict(weights)

    def leave(self) -> None:
        """The training is over."""

    @contextmanager
    def losing_none(self) -> Iterator[None]:
        """Within it, the end of another process is an error that says so."""
        yield


class Several(OneProcess):
    """One of several processes, which torchrun has started.

    Args:
        device: This process's.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        self._device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0

    def copies(self, model: nn.Module, device: torch.device) -> nn.Module:
        """DDP. Every copy keeps BatchNorm statistics of its own: training does not use them, and evaluation uses the
        first process's. (Buffers that are broadcast before a forward would change under an earlier forward's graph.)
        """
        called = inspect.signature(DistributedDataParallel).parameters
        apart = "forward_sync_buffers" if "forward_sync_buffers" in called else "broadcast_buffers"  # before torch 2.14
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, **{apart: False})  # type: ignore[arg-type]

    def share(self, losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """See :class:`OneProcess`. DDP gives every process the weight 1 / size, however many samples it has."""
        factor = share * self.size
        return {task: loss * factor for task, loss in losses.items()} if factor != 1 else dict(losses)

    def mean(self, values: Sequence[float]) -> list[float]:
        """See :class:`OneProcess`."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        result: list[float] = (total / self.size).tolist()
        return result

    def agreed(self, weights: Mapping[str, float]) -> dict[str, float]:
        """See :class:`OneProcess`."""
        values = torch.tensor(list(weights.values()), dtype=torch.float64, device=self._device)
        dist.broadcast(values, src=0)
        return dict(zip(weights, values.tolist(), strict=True))

    def leave(self) -> None:
        """See :class:`OneProcess`."""
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


def _of_communication(error: RuntimeError) -> bool:
    """Gloo's errors are plain RuntimeErrors, which name its source files or what the system said."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started for this training; 1 where it has not."""
    return int(environment.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in environment else 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that evaluates and writes, before they are joined."""
    return started(environment) == 1 or int(environment.get("RANK", "0")) == 0


def counted(settings: Settings, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings with the number of processes that they, or torchrun, ask for.

    Raises:
        UsageError: They contradict each other, or a batch cannot be divided.
    """
    running, devices = started(environment), len(settings.device.split(","))
    here = int(environment.get("LOCAL_WORLD_SIZE", running))
    count = settings.processes or (running if running > 1 else devices)
    if running > 1 and count != running:
        raise UsageError(f"torchrun started {running} processes, but the run is of {count}: start as many.")
    if settings.device == "mps" and count > 1:
        raise UsageError(f"--device mps: {count} processes cannot share one; take --device cpu, or one process.")
    if devices > 1 and devices != (here if running > 1 else count):
        raise UsageError(f"--device {settings.device} names {devices} devices for {count} processes: one for each.")
    _check_devices(settings.device, here if running > 1 else count)
    if settings.batch_size % count:
        raise UsageError(
            f"--batch-size {settings.batch_size} is that of all {count} processes together, and no multiple of "
            f"{count}; the next one is {-(-settings.batch_size // count) * count}."
        )
    if settings.micro_batches > 1 and settings.micro_batches % count:
        raise UsageError(
            f"--micro-batches {settings.micro_batches} are those of all {count} processes together, and no multiple of "
            f"{count}; each process's part of a batch is one already."
        )
    return replace(settings, processes=count)


def _check_devices(device: str, here: int) -> None:
    """Whether so many processes of one machine can train together on what ``--device`` names."""
    names = [name.strip() for name in device.split(",")]
    accelerators = [name for name in names if name != "cpu"]
    if here > 1 and accelerators and len(set(accelerators)) < here:
        raise UsageError(
            f"--device {device}: {here} processes need a GPU each, such as --device "
            f"{','.join(map(str, range(here)))}; or all of them --device cpu."
        )


def check_there(device: str) -> None:
    """Find out before processes are started whether this machine has the GPUs; counting them takes no memory on any.

    Raises:
        UsageError: It has fewer than ``--device`` names.
    """
    count = torch.cuda.device_count()
    if any(name.strip().isdecimal() and int(name) >= count for name in device.split(",")):
        raise UsageError(
            f"--device {device}: torch finds {count} GPUs on this machine. On any machine: --device cpu, with "
            "--processes for several."
        )


def own_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Which of the devices that ``--device 0,1`` names is this process's."""
    if started(environment) == 1:
        return device
    devices = device.split(",")
    return devices[int(environment.get("LOCAL_RANK", "0")) % len(devices)].strip()


def join(device: torch.device) -> OneProcess:
    """This process alone, or as one of those that torchrun has started."""
    return Several(device) if started() > 1 else OneProcess()
