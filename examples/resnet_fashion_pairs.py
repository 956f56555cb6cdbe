"""torchvision's ResNet-18 with two heads on pairs of Fashion-MNIST: which garment is behind, which is in front?

Two garments overlap in one image, one at the upper left and one at the lower right. The data come from Debian's
package dataset-fashion-mnist where it is installed, else torchvision downloads them (30 MB) to --data.

    python examples/resnet_fashion_pairs.py --out fashion.h5
"""

from __future__ import annotations

import argparse
import gzip
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST
from torchvision.models import resnet18

import gradprobe

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHIFT = 8  # pixels between the two garments, down and to the right


def load(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) in [0, 1] and classes (n,) of ``train`` or ``t10k``."""
    files = [DEBIAN / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if all(path.exists() for path in files):
        images, labels = (torch.from_numpy(idx(path)) for path in files)
    else:
        socket.setdefaulttimeout(30)
        try:
            data = FashionMNIST(str(folder), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            sys.exit(
                f"Fashion-MNIST is not here and cannot be downloaded ({error}). Install Debian's package "
                "dataset-fashion-mnist, or name a folder with torchvision's copy: --data FOLDER"
            )
        images, labels = data.data, data.targets
    return images.float() / 255, labels.long()


def idx(path: Path) -> NDArray[np.uint8]:
    """The array in a file of the format in which MNIST came: two zeros, type, dimensions, sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy()


def pairs(images: Tensor, labels: Tensor, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (batch, 1, 36, 36) of two garments, the brighter pixel in front, and the class of each."""
    behind, front = torch.randint(len(images), (2, batch), generator=draw)
    canvas = torch.zeros(batch, 1, 28 + SHIFT, 28 + SHIFT)
    canvas[:, 0, :28, :28] = images[behind]
    canvas[:, 0, SHIFT:, SHIFT:] = torch.maximum(canvas[:, 0, SHIFT:, SHIFT:], images[front])
    return canvas, labels[behind], labels[front]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = resnet18(weights=None)
        self.trunk.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.trunk.fc = nn.Identity()
        self.behind, self.front = nn.Linear(512, 10), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.behind(features), self.front(features)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int, batches: int) -> dict[str, float]:
    draw, right = torch.Generator().manual_seed(1), torch.zeros(2)
    model.eval()
    with torch.no_grad():
        for _ in range(batches):
            x, *classes = pairs(images, labels, batch, draw)
            right += torch.tensor([(o.argmax(1) == c).float().mean() for o, c in zip(model(x), classes, strict=True)])
    model.train()
    return dict(zip(("accuracy_behind", "accuracy_front"), (right / batches).tolist(), strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("fashion.h5"))
    options.add_argument("--data", type=Path, default=Path("data"), help="torchvision's folder; Debian's needs none")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--steps", type=int, default=200, help="per epoch")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--every", type=int, default=10)
    args = options.parse_args()

    train, test = load("train", args.data), load("t10k", args.data)
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradprobe.attach(
        model, ("behind", "front"), args.out, every=args.every, optimizer=optimizer, overwrite=True
    ) as probe:
        for epoch in range(args.epochs):
            probe.epoch = epoch
            for _ in range(args.steps):
                x, behind, front = pairs(*train, args.batch_size, draw)
                outputs = model(x)
                losses = {
                    "behind": nn.functional.cross_entropy(outputs[0], behind),
                    "front": nn.functional.cross_entropy(outputs[1], front),
                }
                probe.backward(losses, batch_size=len(x))
                optimizer.step()
                optimizer.zero_grad()
            probe.log_metrics(epoch, **accuracy(model, *test, args.batch_size, max(1, args.steps // 10)))
    print(f"Recorded. Look at it: gradprobe summary {args.out}; gradprobe plot {args.out}")


if __name__ == "__main__":
    main()
