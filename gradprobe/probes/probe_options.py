"""What a probe can be told: every option once, with its default, what it means, and what goes with what.

An option more is a field here, in the class and in the types for checkers above it, and whoever uses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from gradprobe.errors import ProbeError
from gradprobe.probes.feature_gradients import GradientLevel, level_called
from gradprobe.probes.sketch import SketchSize, sketch_size

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from gradprobe.probes.probe_samples import ProbeLoader
    from gradprobe.probes.recorder import ObserverOption
    from gradprobe.probes.shared_layers import Groups, Shared
    from gradprobe.rows import Provenance

__all__ = ["CommonKeywords", "refuse_unknown", "shows_options"]


_MEMORY = ("normal", "low")
_GONE = {
    "products": "products= is gone: products are always made of the gradients, as products='direct' did. Leave it out"
}
"""Options of earlier versions: what has become of each."""
Call = TypeVar("Call", bound=Callable[..., Any])


class CommonKeywords(TypedDict, total=False):
    """The types of what :class:`gradprobe.GradientProbe` and :func:`gradprobe.attach` both take."""

    every: int | None
    budget: float | None
    optimizer: Optimizer | None
    scaler: torch.amp.GradScaler | None
    accumulate: int
    shared: Shared | None
    layers: Groups | None
    level: str
    features: Iterable[str] | None
    memory: str
    sketch: int | tuple[int, int] | None
    process_group: ProcessGroup | None
    probe_loader: ProbeLoader | None
    provenance: Provenance | None


class ProbeKeywords(CommonKeywords, total=False):
    """The types of the options of a :class:`gradprobe.GradientProbe`."""

    updates: ObserverOption | None
    ledger: ObserverOption | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeOptions:
    """The options of a probe.

    Attributes:
        every: Measure at steps 0, every, 2 every, ...; default 10, and 1 at ``level="features"``.
        budget: Instead of ``every``: the share of the time that measuring may take, above 0 and below 1.
        optimizer: Where given, a training step is what its ``step()`` completes, or that of whichever optimizer updates
            the shared parameters (:mod:`gradprobe.probes.optimizer_steps`), and rows carry its learning rate. The calls
            between two steps, of gradient accumulation, make one row: see :mod:`gradprobe.probes.accumulation`.
        scaler: Of mixed precision. ``backward`` scales the loss by it; ``record`` takes unscaled losses. Gradients are
            measured scaled, so that they do not vanish in float16, and stored unscaled.
        accumulate: Without an optimizer: how many calls make one step; fewer do where the parameters have changed.
        shared: Overrides the search in the graph: module names, parameters, or a predicate of name and parameter.
        layers: How parameters are grouped: layer name -> parameters. Default: by the module that owns them.
        level: "parameters"; "features": where the tasks part, nearly free (:mod:`gradprobe.probes.feature_gradients`);
            or "both": parameters at the due steps and features at every one.
        features: At which modules' outputs, by name; default: at all where tasks part.
        memory: "normal": at most T - 1 copies of the shared parameters, one pass saved; or "low": block by block.
        sketch: For large models: of each task's gradient on a layer only so many numbers are kept (4096, say), or so
            many and a seed, ``(4096, 1)``: a random linear sketch, drawn anew for each row. Gradients are sketched one
            by one as they arrive, so that never a whole one is alive. Cosines are right to about (1 - c^2)/sqrt(k) a
            row, without bias, and exact on layers that are no larger; see :mod:`gradprobe.probes.sketch`.
        process_group: Of a data-parallel training that averages gradients over it; found by itself where ``model`` is
            DDP. The gradients that are measured are averaged likewise, losses too; ``batch_size`` is summed up. Every
            process calls its probe at every step, and the sinks of the first one get the rows.
        updates: A :class:`gradprobe.Updates`, which looks at what the optimizer makes of the gradients.
        ledger: A :class:`gradprobe.Ledger`, which finds out what that did to the losses, at steps that it chooses.
        probe_loader: A :class:`gradprobe.ProbeLoader`: what is also measured, on samples of its own, at steps of its
            own, in the first call of a step. ``budget`` does not count it.
        provenance: Stored in the header.

    Raises:
        ProbeError: One is no choice, or two of them exclude each other.
    """

    every: int | None = None
    budget: float | None = None
    optimizer: Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    accumulate: int = 1
    shared: Shared | None = None
    layers: Groups | None = None
    level: str = "parameters"
    features: Iterable[str] | None = None
    memory: str = "normal"
    sketch: int | tuple[int, int] | None = None
    process_group: ProcessGroup | None = None
    updates: ObserverOption | None = None
    ledger: ObserverOption | None = None
    probe_loader: ProbeLoader | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.memory not in _MEMORY:
            raise ProbeError(f"memory={self.memory!r}: there are {' and '.join(map(repr, _MEMORY))}.")
        if self.every is not None and self.budget is not None:
            raise ProbeError(f"every={self.every} and budget={self.budget} exclude each other: give one of them.")
        if self.size is not None and not self.measured.parameters:
            raise ProbeError("sketch= is of gradients on parameters: leave it out, or level='features'.")
        if self.probe_loader is not None and not self.measured.parameters:
            raise ProbeError("probe_loader= measures gradients on parameters: leave level='features' out.")

    @property
    def measured(self) -> GradientLevel:
        """What :attr:`level` names."""
        return level_called(self.level)

    @property
    def size(self) -> SketchSize | None:
        """What :attr:`sketch` asks for; None: whole gradients."""
        return sketch_size(self.sketch)

    def about(self) -> dict[str, Any]:
        """How is measured, as the file keeps it."""
        every = self.every if self.every is not None else self.measured.every
        often = {"every": every} if self.budget is None else {"budget": self.budget}
        drawn = {"sketch": self.size.numbers, "sketch_seed": self.size.seed} if self.size is not None else {}
        return {"level": self.level, "memory": self.memory, "products": "direct", **often, **drawn}


def shows_options(call: Call) -> Call:
    """Show every option in the signature of what takes them as ``**options``; what it names itself stays its own."""
    there = inspect.signature(call).parameters.values()
    own = [each for each in there if each.kind is not each.VAR_KEYWORD and not each.name.startswith("_")]
    names = {each.name for each in own}
    more = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(ProbeOptions)
        if each.name not in names
    ]
    call.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return call


def refuse_unknown(call: Callable[..., Any], given: Mapping[str, object], name: str = "") -> None:
    """Whether all keywords are options of what is called.

    Args:
        call: A function or class that :func:`shows_options`.
        given: The keywords.
        name: What the user called; default: ``call``.

    Raises:
        TypeError: One is not; says what may have been meant.
    """
    known = inspect.signature(call).parameters
    for each in given:
        if each not in known:
            if each in _GONE:
                raise TypeError(f"{name or call.__name__}(): {_GONE[each]}.")
            near = get_close_matches(each, known, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name or call.__name__}() got an unexpected keyword argument {each!r}{hint}")
