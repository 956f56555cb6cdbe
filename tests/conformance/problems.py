"""Small problems with shared layers, and the paper's algorithm as it is written."""

from __future__ import annotations

import torch
from torch import nn


class Regressions(nn.Module):
    """T regressions on shared ReLU layers, in float64."""

    def __init__(self, tasks=2, width=16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width))
        self.heads = nn.ModuleDict({f"t{i}": nn.Linear(width, 3) for i in range(tasks)})
        self.double()

    @property
    def shared(self):
        return self.trunk[-1].weight

    def losses(self, step, scales):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        z, common = self.trunk(x).relu(), torch.sin(x[:, :3])
        return {
            name: (head(z) - scale * torch.tanh(common + i)).pow(2).mean()
            for i, ((name, head), scale) in enumerate(zip(self.heads.items(), scales, strict=True))
        }


class PaperToy(nn.Module):
    """Section 4 of the paper: regressions of scales 1 and 100, four shared ReLU layers of 100 units.

    ``y_i = scale_i tanh((B + E_i) x)``, x of 250 and y of 100 numbers, entries of B of standard deviation 10 and of E
    of 3.5; both are divided by the number of inputs, which keeps tanh from being a mere sign.
    """

    scales = (1.0, 100.0)

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        base = 10 * torch.randn(100, 250, generator=generator) / 250
        self.targets = [base + 3.5 * torch.randn(100, 250, generator=generator) / 250 for _ in self.scales]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            layers = [m for i in range(4) for m in (nn.Linear(100 if i else 250, 100), nn.ReLU())]
            self.trunk = nn.Sequential(*layers)
            self.heads = nn.ModuleDict({f"t{i}": nn.Linear(100, 100) for i in range(2)})

    @property
    def shared(self):
        return self.trunk[-2].weight

    def losses(self, step):
        x = torch.randn(100, 250, generator=torch.Generator().manual_seed(step))
        z = self.trunk(x)
        return {
            name: (head(z) - scale * torch.tanh(x @ target.T)).pow(2).mean()
            for (name, head), scale, target in zip(self.heads.items(), self.scales, self.targets, strict=True)
        }


def algorithm_1(model, scales, steps, *, alpha, lr, initial):
    """The weights of each step by the paper's algorithm 1: Adam, L_grad differentiated through the norms."""
    w = torch.tensor(list(initial.values()), dtype=torch.float64)
    w = (w * len(w) / w.sum()).requires_grad_()
    adam, sgd = torch.optim.Adam([w], lr=lr), torch.optim.SGD(model.parameters(), lr=0.01)
    first, history = None, []
    for step in range(steps):
        losses = torch.stack(list(model.losses(step, scales).values()))
        first = losses.detach() if first is None else first
        history.append(w.tolist())
        norms = torch.stack(
            [
                torch.autograd.grad(w[i] * loss, model.shared, create_graph=True)[0].norm()
                for i, loss in enumerate(losses)
            ]
        )
        ratio = losses.detach() / first
        target = (norms.mean() * (ratio / ratio.mean()) ** alpha).detach()
        (gradient,) = torch.autograd.grad((norms - target).abs().sum(), w, retain_graph=True)
        sgd.zero_grad()
        (w.detach() * losses).sum().backward()
        sgd.step()
        w.grad = gradient
        adam.step()
        with torch.no_grad():
            w.mul_(len(w) / w.sum())
    return history
