"""Small trainings of two tasks with doors that can be opened one by one."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from gradprobe.audit import Experiment

TASKS = ("det", "cls")


class Net(nn.Module):
    def __init__(self, *, norm: bool, dropout: bool, width: int = 12) -> None:
        super().__init__()
        layers = [nn.Linear(6, width)]
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.Tanh())
        if dropout:
            layers.append(nn.Dropout(0.3))
        self.trunk = nn.Sequential(*layers)
        self.det, self.cls = nn.Linear(width, 1), nn.Linear(width, 3)
        self.cls_dropout = nn.Dropout(0.4)


class Training:
    """One step after another, with the doors in ``doors`` open and no other.

    The doors: dropout, loader, python, numpy, zero, scaler, nonfinite, buffers, batch, clip, renormalised, mean,
    schedule, best, stop, accumulation, data.
    """

    def __init__(self, doors: set[str], *, optimizer: str = "sgd", seed: int = 0, norm: bool = False) -> None:
        torch.manual_seed(seed)
        self.doors = doors
        self.net = Net(norm=norm or bool(doors & {"buffers", "batch"}), dropout=bool(doors & {"dropout", "loader"}))
        groups = self.net.parameters()
        self.optimizer = (
            torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-2)
            if optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=1e-2)
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled="scaler" in doors)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0, factor=0.7, threshold=0.1)
        self.made = 0
        self.backwards = 0
        self.best = float("inf")

    def experiment(self) -> Experiment:
        return Experiment(
            model=self.net,
            optimizer=self.optimizer,
            batches=self.batches,
            step=self.step,
            weights={"det": 1.0, "cls": 1.0},
            scaler=self.scaler if "scaler" in self.doors else None,
            schedule=self.plateau if "schedule" in self.doors else None,
        )

    def batches(self, tasks):
        draw = torch.Generator().manual_seed(3)
        for k in range(4):
            x = torch.randn(8, 6, generator=draw)
            other = torch.randn(8, 6, generator=draw)
            if "loader" in self.doors and "cls" in tasks:
                torch.randint(100, (1,))
            if "data" in self.doors and "cls" in tasks:
                x = x[:6]
            if "zero" in self.doors:
                yield {"x": x, "other": other, "only": "det" if k % 2 == 0 else "cls"}
            else:
                yield {"x": x, "other": other}

    def step(self, trace, batch, weights):
        losses = trace.losses(self.forward(batch, weights))
        total = self.total(losses, weights, batch)
        accumulate = "accumulation" in self.doors
        if accumulate:
            for task in losses:
                (weights[task] * losses[task]).backward(retain_graph=True)
                self.backwards += 1
        elif isinstance(total, Tensor):
            self.scaler.scale(total).backward()
        if accumulate and self.backwards % 2:
            return
        if "clip" in self.doors:
            if "scaler" in self.doors:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)
        if any(p.grad is not None for p in self.net.parameters()):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        seen = sum(float(loss.detach()) for loss in losses.values())
        if "schedule" in self.doors:
            self.plateau.step(seen)
        self.decide(trace, seen)
        self.made += 1

    def decide(self, trace, seen):
        if "best" in self.doors and trace.decide("best", seen < self.best):
            self.best = seen
        if "stop" in self.doors:
            trace.decide("stop", seen > 1.3)

    def forward(self, batch, weights) -> dict[str, Tensor]:
        net, losses = self.net, {}
        x, only = batch["x"] * self.drawn(), batch.get("only")  # augmentation
        both = {"det", "cls"} <= set(weights) and "batch" in self.doors
        z = net.trunk(torch.cat([x, 3 * batch["other"] + 1]))[: len(x)] if both else net.trunk(x)
        if "cls" in weights and only != "det":
            features = net.trunk(3 * batch["other"] + 1) if "buffers" in self.doors else z
            features = net.cls_dropout(features) if "dropout" in self.doors else features
            features = features * self.drawn()
            labels = (batch["other"][: len(features)].sum(1) > 0).long()
            losses["cls"] = nn.functional.cross_entropy(net.cls(features), labels)
            if {"nonfinite", "scaler"} & self.doors and self.made == 3:
                losses["cls"] = losses["cls"] + torch.sqrt(features.sum() * 0)  # its slope is infinite
        if only != "cls":
            losses["det"] = nn.functional.mse_loss(net.det(z)[:, 0], x.sum(1) / 3)
        self.kept = z
        return losses

    def drawn(self) -> float:
        """From a global stream that is not torch's."""
        if "python" in self.doors:
            return 0.5 + random.random()
        return 0.5 + float(np.random.rand()) if "numpy" in self.doors else 1.0

    def total(self, losses, weights, batch):
        used = {task: weights[task] for task in losses}
        if "renormalised" in self.doors:
            used = {t: w * len(weights) / sum(weights.values()) for t, w in used.items()}
        total = sum(used[task] * losses[task] for task in losses)
        if "mean" in self.doors:
            total = total / len(weights)
        if "clip" in self.doors and "cls" in losses:  # the head learns, the trunk does not
            labels = (batch["other"][: len(self.kept)].sum(1) > 0).long()
            total = total + 5 * nn.functional.cross_entropy(self.net.cls(self.kept.detach()), labels)
        return total


def factory(*doors: str, **options):
    return lambda: Training(set(doors), **options).experiment()
