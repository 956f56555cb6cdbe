"""Trainings by Ultralytics, in a process of their own: its import and its trainer change settings for all of it.

``python ultralytics_runs.py FOLDER`` leaves run files and, per scenario, what the training left behind.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

FOLDER = Path(sys.argv[1])
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(FOLDER)}

import torch  # noqa: E402
import yaml  # noqa: E402
from trainings import Fails  # noqa: E402
from ultralytics import YOLO  # noqa: E402

from gradprobe.integrations.ultralytics import GradprobeCallback  # noqa: E402
from gradprobe.trainers.data.phantom import BOX_NAMES, write_phantoms  # noqa: E402


def write_data(name: str, polygons: bool = False) -> str:
    folder = FOLDER / name
    write_phantoms(folder, 12, 0)
    if polygons:
        for path in folder.glob("labels/*/*.txt"):
            path.write_text("".join(_polygon(line.split()) for line in path.read_text().splitlines()))
    path = FOLDER / f"{name}.yaml"
    described = {"path": str(folder), "train": "images/train", "val": "images/val", "names": list(BOX_NAMES)}
    path.write_text(yaml.safe_dump(described))
    return str(path)


def _polygon(box: list[str]) -> str:
    x, y, w, h = map(float, box[1:])
    corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return " ".join([box[0], *(f"{x + i * w / 2} {y + j * h / 2}" for i, j in corners)]) + "\n"


def train(name: str, callback=None, fails: Fails | None = None, cfg: str = "yolov8n.yaml", **options) -> None:
    model = YOLO(cfg)
    if callback is not None:
        callback.add_to(model)
    if fails is not None:
        steps = iter(range(1000))
        model.add_callback("on_train_batch_end", lambda trainer: fails(next(steps)))
    settings = {
        "epochs": 2,
        "imgsz": 64,
        "batch": 4,
        "nbs": 4,
        "workers": 0,
        "device": "cpu",
        "plots": False,
        "amp": False,
    }
    settings |= {"project": str(FOLDER / "runs"), "name": name, "verbose": False, "save": False, "val": False}
    try:
        model.train(**settings | {"data": DATA} | options)
    finally:
        trainer = model.trainer
        assert type(trainer.model.criterion).__module__.startswith("ultralytics")
        states = {
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.ema.state_dict() if trainer.ema else {},
            "optimizer": trainer.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
        }
        torch.save(states, FOLDER / f"{name}.pt")


class Twin(GradprobeCallback):
    """Keeps, beside each measurement, the gradients of Ultralytics' own losses."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, every=2)
        self.naive: dict[int, list[dict[str, torch.Tensor]]] = {}

    def _on_loss(self, criterion, predictions, batch, loss):
        named = {n: p for n, p in self._trainer.model.named_parameters() if p.requires_grad}
        gains = [7.5, 0.5, 1.5]
        step = self.recording.probe.step if self.recording.is_open else 0
        if step % 2 == 0 and step not in self.naive:
            self.naive[step] = [
                dict(
                    zip(
                        named,
                        torch.autograd.grad(
                            part / gain / len(batch["img"]), list(named.values()), retain_graph=True, allow_unused=True
                        ),
                        strict=True,
                    )
                )
                for part, gain in zip(loss, gains, strict=True)
            ]
        super()._on_loss(criterion, predictions, batch, loss)


def attempt(error: type[BaseException], name: str) -> None:
    try:
        train(name, GradprobeCallback(FOLDER / f"{name}.h5", every=1), Fails(error("no"), at=2))
    except error:
        return
    raise AssertionError(f"{name}: did not end by {error.__name__}")


class Fragile(GradprobeCallback):
    """Its criterion can be asked once per batch."""

    def on_train_start(self, trainer):
        super().on_train_start(trainer)
        heard = trainer.model.criterion
        whole, asked = heard.criterion, []

        def once(predictions, batch):
            if asked and asked[-1] is batch:
                raise RuntimeError("CUDA out of memory")
            asked.append(batch)
            return whole(predictions, batch)

        once.loss_names = whole.loss_names
        heard.criterion = once

    def teardown(self, trainer):
        super().teardown(trainer)
        trainer.model.criterion = trainer.model.init_criterion()


DATA = write_data("boxes")
train("bare", val=True)
train("probed", GradprobeCallback(FOLDER / "probed.h5", every=2), val=True)
twin = Twin(FOLDER / "twin.h5")
train("twin", twin, epochs=1)
torch.save(twin.naive, FOLDER / "naive.pt")
attempt(ValueError, "failed")
attempt(KeyboardInterrupt, "interrupted")
train("end2end bare", cfg="yolo26n.yaml")
train("end2end", GradprobeCallback(FOLDER / "end2end.h5", every=2), cfg="yolo26n.yaml")
train("no dfl", GradprobeCallback(FOLDER / "no dfl.h5", every=2), dfl=0.0, epochs=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train("fragile", Fragile(FOLDER / "fragile.h5", every=2), val=True)
(FOLDER / "warnings.txt").write_text("\n".join(str(w.message) for w in caught if w.category is RuntimeWarning))
segments = write_data("polygons", polygons=True)
train("segments", GradprobeCallback(FOLDER / "segments.h5", every=2), cfg="yolov8n-seg.yaml", data=segments, epochs=1)
