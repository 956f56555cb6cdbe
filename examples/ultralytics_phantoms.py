"""Ultralytics' YOLO trained on drawn echocardiograms, with box, cls and dfl as three tasks.

python examples/ultralytics_phantoms.py --out ultralytics.h5
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml
from ultralytics import YOLO

from gradprobe.integrations.ultralytics import GradprobeCallback
from gradprobe.trainers.data.phantom import BOX_NAMES, write_phantoms


def write_data(folder: Path, n: int) -> Path:
    """Phantoms, and a data.yaml that names their folder in full, as Ultralytics needs it."""
    write_phantoms(folder / "phantoms", n, seed=0)
    described = {"path": str(folder / "phantoms"), "train": "images/train", "val": "images/val"}
    path = folder / "phantoms.yaml"
    path.write_text(yaml.safe_dump(described | {"names": dict(enumerate(BOX_NAMES))}), encoding="utf-8")
    return path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("ultralytics.h5"))
    options.add_argument("--cfg", default="yolo11n.yaml", help="a model that Ultralytics builds, without weights")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--phantoms", type=int, default=200)
    options.add_argument("--imgsz", type=int, default=160)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--every", type=int, default=5)
    options.add_argument("--device", default="cpu")
    args = options.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = YOLO(args.cfg)
        GradprobeCallback(args.out, every=args.every, overwrite=True).add_to(model)
        model.train(
            data=str(write_data(Path(folder).resolve(), args.phantoms)),
            epochs=args.epochs,
            imgsz=args.imgsz,
            batch=args.batch_size,
            nbs=args.batch_size,  # no accumulation: every batch is a step
            device=args.device,
            project=str(Path(folder).resolve() / "runs"),
            workers=0,
            plots=False,
            amp=False,  # with it, Ultralytics downloads weights to check the device
        )
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
