"""Every error that gradprobe raises on purpose.

    GradprobeError
    ├── UsageError              a wrong argument: unknown trainer, bad image size, an output file that exists
    │   └── MissingExtraError   an optional package is not installed; says the pip line
    ├── DataError               a data set that cannot be trained on; says file and line
    ├── ProbeError              a wrong call of a probe: unknown task, a loss without a graph
    ├── RunFileError            a run file that cannot be read or written
    └── TrainingError           training cannot go on
        └── NonFiniteLossError  a task's loss became NaN or infinite; says step and task

A message says what is wrong (which task, layer, file or line, how much) and what to do.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any


class GradprobeError(Exception):
    """The root of the tree; catch this to catch everything of ours."""

    exit_code = 1
    """What the command line returns: 1 failed, 2 wrong usage, 3 a file unreadable or incomplete."""


class UsageError(GradprobeError):
    """A wrong argument, found before anything was trained or written."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(
            f"{why} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'gradprobe[{extra}]'"
        )


def optional(module: str, why: str, extra: str = "export") -> Any:
    """Import a module of an extra.

    Raises:
        MissingExtraError: Its package is not installed; says the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        raise MissingExtraError(package, extra, why) from error


class DataError(GradprobeError):
    """A data set that cannot be trained on as it is."""


class ProbeError(GradprobeError):
    """A probe was called wrongly; the training loop is to be changed."""


class RunFileError(GradprobeError):
    """A run file that cannot be read, or cannot be written where it was asked for."""

    exit_code = 3


class TrainingError(GradprobeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """A task's loss became NaN or infinite."""

    def __init__(self, task: str, step: int, value: float) -> None:
        self.task, self.step, self.value = task, step, value
        super().__init__(
            f"the loss of task {task!r} is {value} at step {step}; training stopped and the file is complete "
            "up to this step. Lower the learning rate (--lr), look at the data of this step, "
            "or go on regardless with --keep-going."
        )


def tell(trouble: str) -> None:
    """Warn where an exception would hide another one, or keep a program from saving what it has made.

    Where warnings are errors, the log gets it.
    """
    try:
        warnings.warn(f"gradprobe: {trouble}", RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        logging.getLogger("gradprobe").warning("%s", trouble)
