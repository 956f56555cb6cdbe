"""How many steps a training will have, before its data are loaded."""

from __future__ import annotations

from pathlib import Path

from gradprobe.errors import GradprobeError
from gradprobe.trainers.problems import is_own, kind_of
from gradprobe.trainers.problems.dial_spec import parse
from gradprobe.trainers.settings import Settings


def steps_of(settings: Settings) -> int | None:
    """Steps of the whole training; of a data.yaml an upper bound, since some images may be left out.

    None: the data cannot be counted, and every run will say why.
    """
    images = _images(settings)
    return None if images is None else settings.epochs * -(-images // settings.batch_size)


def _images(settings: Settings) -> int | None:
    if is_own(settings.data):
        return None
    if kind_of(settings.data).name == "dial":
        return parse(settings.data).size
    if settings.data == "phantom":
        from gradprobe.trainers.data.phantom import N_TRAIN

        return N_TRAIN
    from gradprobe.trainers.data.config import read_config
    from gradprobe.trainers.data.splits import list_split

    try:
        return len(list_split(read_config(Path(settings.data)), "train")[0]) or None
    except (GradprobeError, OSError):
        return None
