"""Who takes rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from gradprobe.rows.header import Header, Provenance
from gradprobe.rows.table import Table


class Sink(Protocol):
    """Takes what a probe measures. Called from the training thread: it must return at once.

    An attribute ``tables`` names the tables of which a sink takes rows beside :data:`gradprobe.rows.ROWS`, such as
    ``("features", "ledger")``; a sink without it is not asked to.
    """

    def start(self, header: Header) -> None:
        """Called once, before the first row."""

    def write(self, row: Any) -> None:
        """Called once per row, steps of each table increasing; ``row.table`` says of which table it is."""

    def write_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Metrics of one epoch."""

    def annotate(self, values: Provenance) -> None:
        """Adds to the provenance what became known only after the start."""

    def flush(self) -> bool:
        """Makes all rows so far safe, and says whether they are; called before a state to resume from is saved."""

    def close(self, end: str) -> None:
        """Called once, last. ``end`` says how the run ended: "finished", "interrupted", "failed: ..."."""


def takes(sink: Any, table: Table) -> bool:
    """Whether a sink takes the rows of a table."""
    named = getattr(sink, "tables", ())  # of a stand-in that answers to any name, it may be anything
    return not table.group or (isinstance(named, (tuple, list, set, frozenset)) and table.name in named)


@runtime_checkable
class GrowingSink(Protocol):
    """What a :class:`Sink` has besides, where it takes layers that are found to be shared after the start.

    Others get rows of the layers that they were started with.
    """

    def grow(self, header: Header) -> None:
        """Called before the first row that needs it: layers were added at the end, a layer has got more parameters,
        ``reach`` is known better, or features were found.
        """


@runtime_checkable
class ResumableSink(Sink, Protocol):
    """A sink that keeps rows beyond the process, and can go on with them in another."""

    def rewind(self, step: int, epoch: int) -> None:
        """The training goes on from ``step``: forgets rows from there on, and metrics of epochs after ``epoch``.

        Called before ``start`` where a run is gone on with, and later where the training goes back.
        """
