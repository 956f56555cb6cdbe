"""Checks of what a backward runs that is not torch's own: operations, and hooks on what operations saved."""

from __future__ import annotations

from collections.abc import Iterator

from gradprobe.probes import custom
from gradprobe.probes.custom import some
from gradprobe.probes.doctor.finding import Finding, Patient
from gradprobe.probes.loss_weights import loss_weights


def custom_operations(patient: Patient) -> Iterator[Finding]:
    """An operation of the user's may do anything in its backward, and a probe runs it once per task."""
    names = custom.operations(patient.graph.nodes)
    if names:
        yield Finding(
            "note",
            "custom_operation",
            "",
            f"{len(names)} operations are not torch's own ({some(names)}), and run their own code in every pass: "
            "one that calls backward within its backward, or adds gradients, would make measurements wrong.",
            "A probe checks that by its effect and refuses, or marks the rows: see that the first rows are measured.",
        )


def saved_tensor_hooks(patient: Patient) -> Iterator[Finding]:
    """Hooks that hand out what operations saved may do so once only."""
    names = custom.unpack_hooks(patient.graph.nodes)
    if names:
        yield Finding(
            "warning",
            "saved_tensor_hooks",
            "",
            f"hooks that are not torch's own hand out what operations saved ({some(names)}): where each is handed "
            "out once, the forward allows one backward only, and a probe refuses it.",
            "Make them keep what they hand out until the forward's last backward, or take them off at measured steps.",
        )


def steps_within_the_backward(patient: Patient) -> Iterator[Finding]:
    """Parameters that move before the backward is over."""
    names = custom.stepping(patient.model)
    if names:
        yield Finding(
            "note",
            "post_accumulate_hooks",
            names[0].rpartition(".")[0],
            f"{len(names)} parameters have a hook that runs as soon as their gradient is there ({some(names)}), as "
            "of an optimizer that steps within the backward.",
            "Nothing to do: passes of the probe do not run it, and are made before the backward where parameters move.",
        )


def learned_weights(patient: Patient) -> Iterator[Finding]:
    """Parameters of the model that weigh its losses are no trunk."""
    named = dict(patient.model.named_parameters())
    used = [p for p in named.values() if id(p) in patient.graph.leaves]
    found = loss_weights(patient.graph, {id(p): p.numel() for p in used})
    names = [name for name, p in named.items() if id(p) in found]
    if names:
        yield Finding(
            "note",
            "loss_weights",
            names[0].rpartition(".")[0],
            f"{some(names)} only weigh losses, and no feature depends on them: every task has a gradient there, though "
            "none learns anything of the others.",
            "Nothing to do: a probe leaves them out of the shared layers.",
        )
