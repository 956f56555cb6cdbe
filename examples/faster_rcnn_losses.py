"""torchvision's Faster R-CNN, its four losses as tasks: do finding, telling and outlining get in each other's way?

All four share the backbone; the heads of the proposals and those of the boxes are shared by two each. The model is
not pretrained, and its images are drawn echocardiograms: nothing is downloaded.

    python examples/faster_rcnn_losses.py --out faster_rcnn.h5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import gradprobe
from gradprobe.trainers.data.phantom import BOX_NAMES, draw_phantom

LOSSES = {
    "objectness": "loss_objectness",
    "proposal": "loss_rpn_box_reg",
    "class": "loss_classifier",
    "box": "loss_box_reg",
}
"""Task: torchvision's name of its loss."""


def sample(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, H, W) in [0, 1], and its boxes in pixels with their classes; 0 is background."""
    drawn = draw_phantom(0, "train", index)
    image = torch.from_numpy(drawn.image.copy()).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    rows = torch.tensor([list(box) for box in drawn.boxes], dtype=torch.float32).reshape(-1, 5)
    centre, size = rows[:, 1:3], rows[:, 3:5]
    corners = torch.cat([centre - size / 2, centre + size / 2], 1) * torch.tensor([width, height, width, height])
    return image, {"boxes": corners, "labels": rows[:, 0].long() + 1}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("faster_rcnn.h5"))
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--size", type=int, default=160, help="pixels of the shorter side")
    options.add_argument("--every", type=int, default=10)
    args = options.parse_args()

    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=1 + len(BOX_NAMES),
        min_size=args.size,
        max_size=2 * args.size,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    with gradprobe.attach(
        model, tuple(LOSSES), args.out, every=args.every, optimizer=optimizer, overwrite=True
    ) as probe:
        for step in range(args.steps):
            samples = [sample(step * args.batch_size + i) for i in range(args.batch_size)]
            images, targets = zip(*samples, strict=True)
            found = model(list(images), list(targets))
            probe.backward({task: found[name] for task, name in LOSSES.items()}, batch_size=len(images))
            optimizer.step()
            optimizer.zero_grad()
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
