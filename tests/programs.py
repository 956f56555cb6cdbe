"""Programs that share what takes longest, to import torch: a process imports it, and each program is a fork of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FORK = """
import json, os, sys
programs, ends = json.loads(sys.argv[1]), []
exec(sys.argv[2])
for number, program in enumerate(programs):
    if (child := os.fork()) == 0:
        out = os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        break
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(ends))
    sys.exit()
exec(compile(program, "<string>", "exec"))
"""


def forked(programs: Sequence[str], folder: Path, first: str) -> list[tuple[int, str]]:
    """Run each to the end of its interpreter; the code that it ended with, and what it printed and said.

    Args:
        first: What all do before, once.
    """
    words = [sys.executable, "-c", FORK, json.dumps(programs), first]
    done = subprocess.run(words, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    said = [(folder / f"{number}.txt").read_text() for number in range(len(programs))]
    return list(zip(json.loads(done.stdout), said, strict=True))
