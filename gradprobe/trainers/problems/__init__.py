"""What a bundled training is about: its data, its model, its tasks and how they are judged.

A problem is one file beside this one, and one entry here; or, of the user's, a class with a ``kind``, or a function
that returns a data set, which ``--data module:name`` names. Imports nothing heavy: the command line reads the table.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from gradprobe.errors import UsageError
from gradprobe.named_code import import_named

if TYPE_CHECKING:
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.settings import Settings

__all__ = ["Data", "Problem", "allow", "is_own", "kind_of", "problem_of"]


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        name: As in the run file.
        task: Whose it is.
        higher_is_better: Else lower is.
        main: Whether it is one of the few that sum the task up.
    """

    name: str
    task: str
    higher_is_better: bool = True
    main: bool = False


@dataclass(frozen=True)
class Kind:
    """One entry.

    Attributes:
        name: Of the problem.
        tasks: In order.
        metrics: All that an evaluation gives, in order.
        factory: ``module:Class`` of the :class:`Problem`, imported when it is used.
    """

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[Metric, ...]
    factory: str

    def main(self) -> dict[str, tuple[str, ...]]:
        """Task -> names of the metrics that sum it up."""
        return {task: tuple(m.name for m in self.metrics if m.main and m.task == task) for task in self.tasks}


_HERE = "gradprobe.trainers.problems."

_NEEDED = ("load", "describe", "build_model", "loader", "example", "score", "fitness", "clusters")
"""What a :class:`Problem` does."""

YOLOV5 = Kind(
    "yolov5",
    ("det", "cls"),
    (
        Metric("mAP50", "det", main=True),
        Metric("mAP50-95", "det", main=True),
        Metric("precision", "det"),
        Metric("recall", "det"),
        Metric("f1", "det"),
        Metric("accuracy", "cls", main=True),
        Metric("macro_f1", "cls"),
        Metric("auroc", "cls"),
        Metric("loss_det", "det", higher_is_better=False),
        Metric("loss_cls", "cls", higher_is_better=False),
    ),
    _HERE + "labelled_images:YOLOv5",
)

DIAL = Kind(
    "dial",
    ("a", "b"),
    (
        Metric("solved_a", "a", main=True),
        Metric("solved_b", "b", main=True),
        Metric("loss_a", "a", higher_is_better=False),
        Metric("loss_b", "b", higher_is_better=False),
    ),
    _HERE + "dial:Dial",
)


def kind_of(data: str) -> Kind:
    """The problem that ``--data`` names: ``dial`` and ``dial:...`` a synthetic one, ``module:name`` one of the user's.

    All else are images for YOLOv5.

    Raises:
        UsageError: It is one of the user's that :func:`allow` does not know, cannot be imported, or is none.
    """
    if is_own(data):
        return getattr(_own(data), "kind", YOLOV5)
    return DIAL if data == "dial" or data.startswith("dial:") else YOLOV5


def is_own(data: str) -> bool:
    """Whether ``--data`` is written as ``module:name``, and is no path of a file."""
    return re.fullmatch(r"(?!dial:)[A-Za-z_][\w.]*:[A-Za-z_]\w*", data) is not None and not os.path.lexists(data)


def allow(data: str) -> None:
    """Let ``--data`` import a module of the user's, because this command line names it, and not a file."""
    _allowed.add(data)


_allowed: set[str] = set()


@lru_cache
def _own(data: str) -> Any:
    """The user's class of a :class:`Problem`, or function that returns data for YOLOv5."""
    if data not in _allowed:
        raise UsageError(f"--data {data}: is code that would be run. If it is yours, name it on the command line.")
    module, _, name = data.partition(":")
    try:
        found = getattr(import_named(module), name)
    except Exception as error:
        raise UsageError(f"--data {data}: {type(error).__name__}: {error}") from error
    kind = getattr(found, "kind", None)
    if kind is None and callable(found) and not isinstance(found, type):
        return found
    missing = [each for each in _NEEDED if not callable(getattr(found, each, None))]
    if not isinstance(kind, Kind) or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else "has no kind, a gradprobe.trainers.problems.Kind"
        raise UsageError(f"--data {data}: is neither a function that returns a data set nor a problem: it {lacks}.")
    return found


class Data(Protocol):
    """What a problem loads; its splits are for the problem's own loader."""

    @property
    def name(self) -> str:
        """Its own name, without a folder."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal content, sha256 in hex."""

    @property
    def train(self) -> Any:
        """What is trained on; has a length."""

    @property
    def val(self) -> Any:
        """What is evaluated after every epoch."""

    @property
    def test(self) -> Any | None:
        """What is evaluated once, in the end."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """One message for each sample that was left out."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known of the data."""


class SampleScores(Protocol):
    """An evaluation, sample by sample, so that it can be summed up over some of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """(N,) of the samples, in order."""

    def metrics(self, keep: Sequence[int] | None = None) -> dict[str, float]:
        """Every metric of the kind, over the samples ``keep`` or all; NaN where it is undefined there."""


class Problem(Protocol):
    """All that a training needs to know of what it trains.

    Models are :class:`torch.nn.Module` with ``losses(outputs, batch)`` (task -> unweighted loss), ``trunk`` (names of
    what all tasks use), ``last_shared_layer``, ``scaled_hyp``, ``trunk_layers(imgsz)`` and ``divide(names)``. Batches
    have ``images``, ``names``, ``to`` and ``part``.
    """

    kind: Kind

    def load(self, settings: Settings) -> Any:
        """The data (:class:`Data`)."""

    def describe(self, data: Any) -> dict[str, Any]:
        """The data as they are stored in a run file: own name and content, no folder."""

    def build_model(self, settings: Settings, data: Any, hyp: DetectionHyp) -> Any:
        """The reference model, that all trainers of a seed start from, on the CPU."""

    def loader(self, split: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True) -> Any:
        """Batches in an order that the seed and ``set_epoch`` alone decide; with its ``dataset`` and ``collate``."""

    def example(self, settings: Settings, data: Any) -> Any:
        """One sample's ``images``, of batch size 1, all zeros."""

    def score(self, model: Any, loader: Iterable[Any], *, device: Any) -> SampleScores:
        """Evaluate; parameters, buffers, gradients, modes and random streams are left as they were."""

    def fitness(self, metrics: Mapping[str, float]) -> float:
        """What chooses the best epoch; larger is better, NaN counts as 0."""

    def clusters(self, split: Any) -> Sequence[str]:
        """What each sample of a split belongs to (a clip, a patient), in order; a sample alone is one of its own."""


def problem_of(settings: Settings) -> Problem:
    """The problem that ``--data`` names, ready to be loaded."""
    if is_own(settings.data):
        own = _own(settings.data)
        if hasattr(own, "kind"):
            return cast(Problem, own())
        from gradprobe.trainers.problems.labelled_images import YOLOv5

        return YOLOv5(own)
    module, _, name = kind_of(settings.data).factory.partition(":")
    make = cast(Callable[[], Problem], getattr(importlib.import_module(module), name))
    return make()
