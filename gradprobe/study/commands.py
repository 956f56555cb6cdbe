"""The command that records one run of a study."""

from __future__ import annotations

from collections.abc import Sequence

from gradprobe.study.arms import Planned
from gradprobe.study.folder import ABSENT, RESUMABLE, Folder


def record(folder: Folder, run: Planned, common: Sequence[str], state: str = ABSENT) -> list[str]:
    """The words behind ``gradprobe``.

    Args:
        folder: Where everything lies.
        run: Which.
        common: Flags of every run.
        state: Of its file, see :func:`gradprobe.study.folder.state`.
    """
    if state == RESUMABLE:
        # A module of the user's is named again: none is imported because a file that is found there names it.
        own = ["--trainer", run.arm.trainer] if ":" in run.arm.trainer else []
        return ["record", "--resume", str(folder.run(run)), *own]
    source = ["--from", str(folder.source(run))] if run.source else []
    return [
        *("record", "--trainer", run.arm.trainer, *source, *common, *run.arm.flags),
        *("--seed", str(run.seed), "--arm", run.arm.name),
        *("--plan", str(folder.plan), "--out", str(folder.run(run))),
        *(["--overwrite"] if state != ABSENT else []),
    ]
