"""`gradprobe export`: one run in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    file: Annotated[Path, typer.Argument(help="The run file, finished or still being written.")],
    to: Annotated[str, typer.Option("--to", help="csv, parquet, netcdf or tensorboard.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where it goes; must not exist.", show_default="FILE.nc, or FILE-csv/ beside the run"),
    ] = None,
    stride: Annotated[int, typer.Option(help="Every so many rows, for long runs.")] = 1,
) -> None:
    """Write a run as CSV or Parquet tables, as a netCDF file, or for TensorBoard.

    Example: gradprobe export conflict.h5 --to csv
    """
    from gradprobe.runfile import Run
    from gradprobe.runfile.exports import export_run as write

    with Run(file) as run:
        written = write(run, to, out, stride=stride)
    print(written)
    if written.is_dir():
        for path in sorted(written.iterdir()):
            print(path)
