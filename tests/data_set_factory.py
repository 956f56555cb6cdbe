"""Small data sets in YOLO format for the tests of gradprobe.trainers.data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COCO128 = Path(__file__).parents[1].parent / "shared/data/coco128/data.yaml"

YAML = """path: .
train: images/train
val: images/val
names: [AR, MR]
image_names: [x, y]
image_labels: classes.csv
"""


def write_image(path: Path, seed: int, height: int = 40, width: int = 64) -> None:
    """Noise that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_set(folder: Path, csv: bool = True) -> Path:
    """Four images to train on and two held out, each with one box, and no fault."""
    rows = ["image,class"]
    for split, names in (("train", "abcd"), ("val", "ef")):
        for index, name in enumerate(names):
            image = folder / "images" / split / f"{split}_{name}.png"
            write_image(image, ord(name))
            label = folder / "labels" / split / f"{split}_{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{index % 2} 0.5 0.25 0.5 0.5\n")
            rows.append(f"{image.name},{'xy'[index % 2]}")
    if csv:
        (folder / "classes.csv").write_text("\n".join(rows) + "\n")
    yaml = folder / "data.yaml"
    yaml.write_text(YAML)
    return yaml


def labels_of(folder: Path) -> list[Path]:
    return sorted((folder / "labels").rglob("*.txt"))
