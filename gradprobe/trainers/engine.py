"""How a step is computed: on which device, in which precision, and by how many processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprobe.errors import UsageError
from gradprobe.processes import OneProcess, started
from gradprobe.trainers.settings import Settings

__all__ = ["check_device", "check_gpus", "own_device", "with_processes"]


_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Engine:
    """One process's part in the computing.

    Attributes:
        device: Where the model is.
        forward: The model, or what passes its forward on and averages its gradients.
        half: The type in which operations compute that bear it; None: float32 throughout.
        scaler: Of float16's losses; None: they are not scaled.
        processes: Those that train together.
    """

    device: torch.device
    forward: nn.Module
    half: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    processes: OneProcess = field(default_factory=OneProcess)

    def losses(self, model: Any, batch: Any, share: float) -> dict[str, Tensor]:
        """This process's unweighted losses; their mean over the processes is that of the whole batch.

        Args:
            model: Knows the losses.
            batch: What this process has of the batch.
            share: How much that is.
        """
        # Where nothing wraps the model, its own forward: the audit puts a stand-in before it.
        forward = model if self.processes.size == 1 else self.forward
        return self.processes.scaled(self.own_losses(model, batch, forward), share)

    def own_losses(self, model: Any, batch: Any, forward: Any = None) -> Mapping[str, Tensor]:
        """The unweighted losses of a batch that is this process's alone.

        The forward computes in the type asked for, the losses in float32: they sum over many positions.
        """
        with self._autocast():
            outputs = (forward or model)(batch.images)
        losses: Mapping[str, Tensor] = model.losses(_in_float32(outputs) if self.half is not None else outputs, batch)
        return losses

    def micro_batches(self, count: int) -> int:
        """Of ``count`` micro-batches of a whole batch, how many this process makes of its part."""
        return max(1, count // self.processes.size)

    def values(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """The losses of the whole batch."""
        own = np.array([float(loss.detach()) for loss in losses.values()])
        return dict(zip(losses, self.processes.mean(own).tolist(), strict=True))

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with for the backward."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    def update(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], clip_norm: float) -> bool:
        """The optimizer's step, on gradients that are clipped where ``clip_norm`` is above 0.

        Returns:
            Whether it was taken: the scaler leaves a step out in which a gradient overflowed.
        """
        if self.scaler is None:
            if clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            return True
        if clip_norm > 0:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        before = self.loss_scale
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.loss_scale >= before

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.half is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)


def make_engine(model: nn.Module, precision: str, device: torch.device, processes: OneProcess | None = None) -> Engine:
    """The engine of a training."""
    processes = processes or OneProcess()
    half = _HALF.get(precision)
    scaler = torch.amp.GradScaler(device.type) if half is torch.float16 else None
    return Engine(device, processes.copies(model, device), half, scaler, processes)


def _in_float32(outputs: Any) -> Any:
    """The same structure of tensors, those of half types in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in _HALF.values() else outputs
    if isinstance(outputs, tuple):
        parts = [_in_float32(part) for part in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else tuple(parts)
    return outputs


# ---- which devices, and how many processes


def with_processes(settings: Settings, environment: Mapping[str, str] = os.environ) -> Settings:
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


def check_gpus(device: str) -> None:
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


def check_device(name: str) -> torch.device:
    """A device as YOLOv5 writes it (``cpu``, ``0``, ``mps``) or as torch does (``cuda:0``).

    Raises:
        UsageError: Unknown, or not on this machine.
    """
    text = f"cuda:{name}" if name.isdecimal() else name
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # by effect: torch knows devices that hold no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"--device {name}: cannot be used here ({reason}). On any machine: --device cpu") from None
    return device


def own_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Which of the devices that ``--device 0,1`` names is this process's."""
    if started(environment) == 1:
        return device
    devices = device.split(",")
    return devices[int(environment.get("LOCAL_RANK", "0")) % len(devices)].strip()
