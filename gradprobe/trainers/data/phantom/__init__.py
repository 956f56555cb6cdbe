"""The embedded data set: colour-Doppler echocardiograms drawn with numpy alone.

The image class is the view (`IMAGE_NAMES`), the boxes are regurgitation jets (`BOX_NAMES`). Drawn with
nothing but + - * /, square roots, comparisons and integers, all of which IEEE 754 fixes to the last bit,
from a random stream that numpy guarantees: the same images on every machine.
"""

from __future__ import annotations

from gradprobe.trainers.data.phantom.anatomy import BOX_NAMES, IMAGE_NAMES
from gradprobe.trainers.data.phantom.drawing import SIZE, SPLITS, Phantom, draw_phantom

__all__ = ["BOX_NAMES", "IMAGE_NAMES", "N_TEST", "N_TRAIN", "N_VAL", "SIZE", "SPLITS", "Phantom", "draw_phantom"]

N_TRAIN = 384
"""Phantoms to train on, where nothing else is asked for."""

N_VAL = 96
"""Phantoms held out, where nothing else is asked for."""

N_TEST = 96
"""Phantoms of the test split, where nothing else is asked for."""
