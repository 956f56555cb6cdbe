"""Damages a run file in many ways and looks at what the reader makes of it; run by tests/test_runfile_fuzz.py.

`python tests/fuzz_runfile.py RUN FIRST LAST [--resealed]` goes through cases FIRST to LAST - 1, each made from its
number alone, and prints a line per case: its number, and "right", "refused", "partly" (some arrays refused, the rest
right) or what else came. With --resealed the sums are made right after the damage, as a malicious writer would: then
the numbers may differ ("other"), but nothing may crash.
"""

from __future__ import annotations

import functools
import io
import resource
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

from gradprobe.errors import RunFileError
from gradprobe.runfile import open_run, schema
from gradprobe.runfile.files import seal

MEMORY = 3 << 30
SECONDS = 20


def content(path: Path) -> dict[str, bytes | None]:
    """Everything that the reader gives of a run, by name; None where it refuses a part of it."""
    with open_run(path) as run:
        words = (run.tasks, run.layers, run.pairs, run.status_names, run.end, run.rows_dropped, run.provenance)
        found: dict[str, bytes | None] = {"words": repr(words).encode()}
        takes = {f.name: functools.partial(run.read, f.name) for f in (*schema.ROWS.held(()), *schema.HEADER_FIELDS)}
        for name, take in {**takes, "epochs": lambda: np.array(list(run.epochs.values()))}.items():
            try:
                array = take()
                found[name] = repr((array.dtype.str, array.shape)).encode() + array.tobytes()
            except RunFileError:
                found[name] = None
        return found


def damaged(good: bytes, case: int) -> bytes:
    """One way in which a file can come back from a disk or over a wire."""
    rng = np.random.default_rng(case)
    data, size = bytearray(good), len(good)
    kind = case % 8
    if kind <= 2:  # one flipped bit
        data[rng.integers(size)] ^= 1 << int(rng.integers(8))
    elif kind == 3:  # a few, anywhere
        for place in rng.integers(size, size=int(rng.integers(2, 20))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 4:  # cut off
        del data[int(rng.integers(size)) :]
    elif kind == 5:  # a block that never reached the disk
        start = int(rng.integers(size)) // 512 * 512
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == 6:  # a piece of it somewhere else
        source, target, length = rng.integers(size, size=2), int(rng.integers(size)), int(rng.integers(1, 64))
        piece = good[int(source[0]) : int(source[0]) + length]
        data[target : target + len(piece)] = piece
        del data[size:]
    else:  # bytes lost or won in the middle
        place = int(rng.integers(size))
        if rng.integers(2):
            del data[place : place + int(rng.integers(1, 64))]
        else:
            data[place:place] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


def resealed(data: bytes) -> bytes:
    file = io.BytesIO(data)
    seal(file)
    return file.getvalue()


def outcome(path: Path, right: dict[str, bytes | None], may_differ: bool) -> str:
    try:
        found = content(path)
    except RunFileError:
        return "refused"
    except BaseException as error:
        return f"WRONG {type(error).__name__}: {error}"[:300]
    wrong = [name for name, value in found.items() if value not in (None, right[name])]
    if wrong and not may_differ:
        return f"WRONG numbers in {wrong}"
    return "other" if wrong else "partly" if None in found.values() else "right"


def main() -> None:
    run, first, last, may_differ = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "--resealed" in sys.argv
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    good, right = run.read_bytes(), content(run)
    bare = good[: int.from_bytes(good[28:36], "little")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        for case in range(first, last):
            print(case, end=" ", flush=True)
            signal.alarm(SECONDS)  # kills: no Python runs while HDF5 loops
            data = resealed(damaged(bare, case)) if may_differ else damaged(good, case)
            path.write_bytes(data)
            print("right" if data == good else outcome(path, right, may_differ), flush=True)


if __name__ == "__main__":
    main()
