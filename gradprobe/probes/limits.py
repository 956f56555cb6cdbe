"""What hides gradients from a probe: refused with an error, since what would come out is an empty or partial result."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gradprobe.errors import ProbeError
from gradprobe.probes.trace import Trace, trace


def reentrant_checkpoints(graph: Trace) -> int:
    """How many reentrant activation checkpoints there are: what is in one is in no graph before the backward runs."""
    return sum(type(node).__name__ == "CheckpointFunctionBackward" for node in graph.nodes)


def sharded_module(model: nn.Module) -> str | None:
    """Name of the first module whose parameters are sharded over processes; None where there is none."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        direct = {type(p).__name__ for p in module.parameters(recurse=False)}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"} or direct & {"DTensor", "FlatParameter"}:
            return str(name)
    return None


def refuse(model: nn.Module, losses: Sequence[Tensor]) -> None:
    """Raise where a measurement could not see all gradients.

    Raises:
        ProbeError: Reentrant checkpoints, or sharded parameters; says where and what to do.
    """
    count = reentrant_checkpoints(trace(losses))
    if count:
        raise ProbeError(
            f"{count} reentrant activation checkpoints hide their parameters from autograd.grad, so that shared layers "
            "would be missing. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    sharded = sharded_module(model)
    if sharded is not None:
        raise ProbeError(
            f"the parameters of {sharded or 'the model'} are sharded over processes (FSDP or DTensor), and "
            "autograd.grad gives None for them. Measure on a replicated model: DDP, or the same model on one device. "
            "Where that lacks memory for gradients, sketch=4096 with memory='low' measures one parameter at a time."
        )
