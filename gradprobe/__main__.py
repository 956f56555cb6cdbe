"""``python -m gradprobe`` and the command ``gradprobe``."""

from __future__ import annotations

import os
import sys

# Not pathlib: nothing is to be imported before the present folder is out of the way.
HERE = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120


def main() -> None:
    """Run the command line and leave with its exit code."""
    # A second wall behind the reader, which refuses every filter: in our own process HDF5 loads no plugin at all. Not
    # in the library, where a training program may need its own.
    os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
    _look_only_where_packages_are()
    from gradprobe.cli.app import run

    sys.exit(run(sys.argv[1:]))


def _look_only_where_packages_are() -> None:
    """Let no import look into the present folder, which may be a stranger's: `python -m` puts it before all others.

    Nor into the package's own, which is there where this file is run by its path. What a command line names is looked
    for by :func:`gradprobe.named_code.import_named`.
    """
    places = [HERE]
    try:  # noqa: SIM105  # contextlib is imported no earlier either
        places.append(os.path.realpath(os.getcwd()))  # noqa: PTH109
    except OSError:  # it is gone
        pass
    if not getattr(sys.flags, "safe_path", False) and os.path.realpath(sys.path[0] or HERE) in places:
        del sys.path[0]
    if os.path.dirname(HERE) not in sys.path:  # noqa: PTH120
        sys.path.append(os.path.dirname(HERE))  # noqa: PTH120  # last: nothing else has said where this package lies


if __name__ == "__main__":
    main()
