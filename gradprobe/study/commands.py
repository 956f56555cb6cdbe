"""The command that records one run of a study."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.study.arms import Planned
from gradprobe.study.folder import ABSENT, RESUMABLE, Folder
from gradprobe.trainers.registry import TRAINERS


def record(folder: Folder, run: Planned, common: Sequence[str], state: str = ABSENT) -> list[str]:
    """The words behind ``gradprobe``.

    Args:
        folder: Where everything lies.
        run: Which.
        common: Flags of every run.
        state: Of its file, see :func:`gradprobe.study.folder.state`.
    """
    if state == RESUMABLE:
        own = [] if run.arm.trainer in TRAINERS else ["--trainer", run.arm.trainer]  # imported only where it is named
        return ["record", "--resume", str(folder.run(run)), *own]
    source = ["--from", str(folder.source(run))] if run.source else []
    return [
        *("record", "--trainer", run.arm.trainer, *source, *common, *run.arm.flags),
        *("--seed", str(run.seed), "--arm", run.arm.name),
        *("--plan", str(folder.plan), "--out", str(folder.run(run))),
        *(["--overwrite"] if state != ABSENT else []),
    ]
