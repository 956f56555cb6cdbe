"""What would make a measurement wrong on a model, found before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradprobe.probes.doctor import batchnorm, code, loss, model
from gradprobe.probes.doctor.finding import SEVERITIES, Finding, Patient

__all__ = ["Finding", "SEVERITIES", "doctor"]

CHECKS = (
    loss.faulty,
    model.compiled,
    model.reentrant_checkpoints,
    model.sharded,
    model.data_parallel,
    loss.sharing_nothing,
    loss.shared_by_the_graph_alone,
    loss.counted_twice,
    loss.scaled,
    loss.summed_over_the_batch,
    batchnorm.over_a_divided_batch,
    batchnorm.in_two_forwards,
    model.own_hooks,
    code.saved_tensor_hooks,
    code.custom_operations,
    code.steps_within_the_backward,
    code.learned_weights,
    model.sparse_gradients,
    model.complex_parameters,
    model.tied_weights,
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
    found = [finding for check in CHECKS for finding in check(patient)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
