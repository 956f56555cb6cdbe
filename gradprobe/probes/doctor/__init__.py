"""What would make a measurement wrong on a model, found before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradprobe.probes.doctor.finding import SEVERITIES, Finding, Patient
from gradprobe.probes.doctor.loss_checks import (
    counted_twice,
    faulty,
    scaled,
    shared_by_the_graph_alone,
    sharing_nothing,
    summed_over_the_batch,
)
from gradprobe.probes.doctor.model_checks import (
    behind_reentrant_checkpoints,
    compiled,
    complex_parameters,
    data_parallel,
    in_two_forwards,
    learned_weights,
    over_a_divided_batch,
    own_hooks,
    saved_tensor_hooks,
    sharded,
    sparse_gradients,
    steps_within_the_backward,
    tied_weights,
    with_custom_operations,
)

__all__ = ["Finding", "SEVERITIES", "doctor"]
_CHECKS = (
    faulty,
    compiled,
    behind_reentrant_checkpoints,
    sharded,
    data_parallel,
    sharing_nothing,
    shared_by_the_graph_alone,
    counted_twice,
    scaled,
    summed_over_the_batch,
    over_a_divided_batch,
    in_two_forwards,
    own_hooks,
    saved_tensor_hooks,
    with_custom_operations,
    steps_within_the_backward,
    learned_weights,
    sparse_gradients,
    complex_parameters,
    tied_weights,
)


def doctor(model: nn.Module, losses: Mapping[str, Tensor]) -> list[Finding]:
    """Everything found that would make a measurement on this model wrong, impossible, or easily misread.

    Args:
        model: As it is trained, in training mode.
        losses: Task -> loss, with the graph of one forward. The graph is kept and nothing is changed; at most one pass
            of each task, and one more through each head, is made.

    Returns:
        Findings, the most severe first; empty where nothing was found. What cannot be seen from outside is not found:
        hooks on activations, and what a custom operation does in its backward.

    Example:
        >>> for finding in gradprobe.doctor(model, losses):            # doctest: +SKIP
        ...     print(finding)
    """
    patient = Patient.of(model, losses)
    found = [finding for check in _CHECKS for finding in check(patient)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
