"""What a model costs, so that trainers with different models can be compared fairly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def size_of(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Parameters, each counted once, and floating-point operations of one image's forward.

    A multiplication and an addition are two operations; convolutions and matrix products are counted. The model is left
    as it was.

    Args:
        model: Any.
        image: One, as the model takes it, of batch size 1.
    """
    modes = {module: module.training for module in model.modules()}
    image = image.to(next(model.parameters()).device)
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_image": counter.get_total_flops()}
