"""Studies of the dial problem whose runs go through the command line, but in this process: torch is imported once."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from gradprobe.cli.app import run as command
from gradprobe.cli.study import Asked, prepare, run
from gradprobe.study import folder


class Ended:
    """A process that is over."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("it is over")

    def wait(self, timeout=None) -> int:
        return self.code


class InProcess:
    """Starts runs; keeps the words of each, and fails those that it is told to."""

    def __init__(self, fails=()) -> None:
        self.words, self.fails = [], fails

    def __call__(self, words, log: os.PathLike[str]) -> Ended:
        self.words.append(list(words))
        if any(name in " ".join(words) for name in self.fails):
            Path(log).write_text("gradprobe: the machine is on fire\n", encoding="utf-8")
            return Ended(1)
        with (
            Path(log).open("a", encoding="utf-8") as output,
            contextlib.redirect_stderr(output),
            contextlib.redirect_stdout(output),
        ):
            return Ended(command(list(words)))


def study(out: Path, *, launch=None, record=(), **asked) -> bool:
    """Run one; the trainings are short unless ``record`` says otherwise."""
    flags = ["--data", "dial:size=32", "--epochs", "1", "--every", "1", *record]
    return run(prepare(Asked(out=out, record=flags, **asked), check_extras=False), launch or InProcess())


def wait_for_an_epoch(child, log: Path) -> None:
    """Until the run that says so in ``log`` has a whole epoch; ``child`` is the study, which must go on."""
    deadline = time.monotonic() + 200
    while folder.progress(log) == 0 and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    assert time.monotonic() < deadline, log.read_text()
