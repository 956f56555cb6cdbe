"""``python -m gradprobe`` and the command ``gradprobe``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    # A second wall behind the reader, which refuses every filter: in our own process HDF5 loads no plugin at all. Not
    # in the library, where a training program may need its own.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    from gradprobe.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
