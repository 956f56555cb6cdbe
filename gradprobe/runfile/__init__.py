"""The HDF5 run file: written while training goes on, read at any moment."""

from gradprobe.runfile.reader import Run, open_run
from gradprobe.runfile.writer import RunWriter

__all__ = ["Run", "RunWriter", "open_run"]
