"""An ordinary training loop of two tasks, with a ledger made from the pure functions alone: no probe, no file."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from gradprobe.ledger import terms
from gradprobe.ledger.update_parts import begin, first_moment, own_factor, rules, take_apart
from gradprobe.measures import FIRST_STEPS_OF_ADAM

TASKS = ("a", "b")
SOURCES = ("a", "b", "weight decay", "earlier momentum")

OPTIMIZERS = {
    "sgd": lambda p, lr=0.05: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr=5e-3: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p, lr=5e-3: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr=2e-3: torch.optim.Adam(p, lr, weight_decay=1e-2),
    "adamw": lambda p, lr=2e-3: torch.optim.AdamW(p, lr, weight_decay=0.1),
}


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 3)

    def losses(self, x, ya, yb):
        h = self.trunk(x)
        return [nn.functional.mse_loss(self.a(h), ya), nn.functional.cross_entropy(self.b(h), yb)]


def population(count=1024, noise=0.3, seed=11):
    """Samples of both tasks; what a wants of the trunk is in part what b does not."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=stream)
    ya = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + noise * torch.randn(count, 1, generator=stream)
    scores = torch.stack([x[:, 0] * x[:, 3], x[:, 1] - x[:, 4], x[:, 5].abs() - 1], dim=1)
    yb = (2 * scores + noise * torch.randn(count, 3, generator=stream)).argmax(dim=1)
    return x, ya, yb


@dataclass
class Options:
    optimizer: str = "sgd"
    lr: float | None = None
    steps: int = 100
    batch: int = 64
    micro: int = 4
    shares: tuple[int, ...] | None = None  # samples of each micro-batch, in place of equal ones
    weights: tuple[float, float] = (1.0, 1.0)
    shapley: bool = False
    begin_at: int = 0  # steps before the ledger begins
    clip: float = 0.0
    noise: float = 0.3
    seed: int = 0
    dtype: torch.dtype = torch.float64
    ends: str = "batch"  # whose gradients value the parts: the training's batches, or the "probe" batch
    probe: int = 1024  # samples of the fixed probe batch


@dataclass
class Made:
    """Columns as in a run file, with one layer, and what only a simulation knows."""

    ledger: dict = field(default_factory=dict)
    left: np.ndarray = None
    correction: np.ndarray = None
    right: np.ndarray = None
    shapley: np.ndarray = None  # (n, T, S), the heads left as they are
    # How far the parts were from the update, over its length, beyond the rounding of the parameters it was added to.
    apart: list = field(default_factory=list)
    samples: int = 0


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradients(losses, parameters):
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[torch.zeros_like(p) if g is None else g for g, p in zip(task, parameters, strict=True)] for task in found]


def train(options: Options) -> Made:
    o = options
    model = Net(o.seed).to(o.dtype)
    data = [v.to(o.dtype) if v.is_floating_point() else v for v in population(noise=o.noise)]
    probe = [v[: o.probe] for v in data]
    optimizer = OPTIMIZERS[o.optimizer](model.parameters(), *(() if o.lr is None else (o.lr,)))
    shared = list(model.trunk.parameters())
    heads = [list(model.a.parameters()), list(model.b.parameters())]
    everything = [*shared, *heads[0], *heads[1]]
    stream = torch.Generator().manual_seed(100 + o.seed)
    sizes = list(o.shares or [o.batch // o.micro] * o.micro)
    shares = [size / sum(sizes) for size in sizes]
    moments, rows, waiting, made, losses_before = None, [], None, Made(), values(model, probe)
    for step in range(o.steps + 1):
        places = torch.randint(len(data[0]), (sum(sizes),), generator=stream)
        pieces = places.split(sizes)
        micro = [gradients(model.losses(*(v[piece] for v in data)), everything) for piece in pieces]
        mean = [
            [sum(s * m[t][i] for s, m in zip(shares, micro, strict=True)) for i in range(len(everything))]
            for t in (0, 1)
        ]
        own = torch.stack([flat(mean[t][: len(shared)]) for t in (0, 1)])
        apart = [torch.stack([flat(m[t][: len(shared)]) for t in (0, 1)]) for m in micro]
        own_head = [
            flat(g for g, p in zip(mean[t], everything, strict=True) if any(p is q for q in heads[t])) for t in (0, 1)
        ]
        apart_head = [
            [flat(g for g, p in zip(m[t], everything, strict=True) if any(p is q for q in heads[t])) for t in (0, 1)]
            for m in micro
        ]
        if o.ends == "probe":
            ends = gradients(model.losses(*probe), everything)
            own_end = torch.stack([flat(ends[t][: len(shared)]) for t in (0, 1)])
            end_head = [
                flat(g for g, p in zip(ends[t], everything, strict=True) if any(p is q for q in heads[t]))
                for t in (0, 1)
            ]
        else:
            own_end, end_head = own, own_head
        if waiting is not None:
            parts, moved, row = waiting
            row["right"] = terms.effects(own_end, parts, [parts.shape[1]])[0]
            row["right_head"] = [float(end_head[t] @ moved[t]) for t in (0, 1)]
            rows.append(row)
        if step == o.steps:
            break
        for i, p in enumerate(everything):
            p.grad = sum(w * mean[t][i] for t, w in enumerate(o.weights))
        scale = 1.0
        if o.clip:
            norm = float(nn.utils.clip_grad_norm_(everything, o.clip))
            scale = min(1.0, o.clip / (norm + 1e-6))
        known = rules(optimizer, everything)
        if step == o.begin_at:
            moments = [begin(first_moment(optimizer, p), 2) for p in shared]
        before = [p.detach().clone() for p in everything]
        optimizer.step()
        if moments is None:
            losses_before = values(model, probe)
            continue
        seconds = [optimizer.state[p].get("exp_avg_sq") for p in everything]
        pieces = [
            take_apart(rule, kept, [scale * w * mean[t][i] for t, w in enumerate(o.weights)], before[i], seconds[i])
            for i, (rule, kept) in enumerate(zip(known[: len(shared)], moments, strict=True))
        ]
        parts = torch.stack([flat(piece[s] for piece in pieces) for s in range(4)])
        update = flat(p - b for p, b in zip(shared, before[: len(shared)], strict=True))
        rounding = torch.finfo(o.dtype).eps * float(flat(before[: len(shared)]).norm())
        left_over = max(float((parts.sum(dim=0) - update).norm()) - rounding, 0.0)
        made.apart.append(left_over / float(update.norm()) if left_over else 0.0)  # a network that died does not move
        moved = [
            flat(p - b for p, b in zip(everything, before, strict=True) if any(p is q for q in heads[t]))
            for t in (0, 1)
        ]
        factor = factors(known[: len(shared)], seconds[: len(shared)], shared)
        noise = terms.noise_products(own, apart, shares, [own.shape[1]], factor)
        head_correction = []
        for t in (0, 1):
            places = [i for i, p in enumerate(everything) if any(p is q for q in heads[t])]
            weight = factors([known[i] for i in places], [seconds[i] for i in places], [everything[i] for i in places])
            found = terms.noise_products(
                own_head[t][None], [m[t][None] for m in apart_head], shares, [len(own_head[t])], weight
            )
            head_correction.append(scale * o.weights[t] * float(found[0, 0, 0]))
        if o.ends == "probe":  # shares no sample with the update
            noise, head_correction = noise * 0, [0.0, 0.0]
        row = {
            "step": step,
            "left": terms.effects(own_end, parts, [parts.shape[1]])[0],
            "correction": terms.correction(noise, np.array(o.weights), scale, 4)[0],
            "left_head": [float(end_head[t] @ moved[t]) for t in (0, 1)],
            "head_correction": head_correction,
            "change": (after := values(model, probe)) - losses_before,
            "status": int(o.optimizer.startswith("adam") and step < FIRST_STEPS_OF_ADAM),
        }
        if o.shapley:
            row["shapley"] = shapley(model, probe, everything, before, parts, len(shared))
        waiting, losses_before = (parts, moved, row), after
    return columns(rows, made)


def factors(known, seconds, parameters):
    found = [own_factor(rule, second) for rule, second in zip(known, seconds, strict=True)]
    return torch.cat(
        [torch.as_tensor(f, dtype=p.dtype).expand_as(p).reshape(-1) for f, p in zip(found, parameters, strict=True)]
    )


def values(model, data):
    with torch.no_grad():
        return np.array([float(loss) for loss in model.losses(*data)])


def shapley(model, data, parameters, before, parts, shared):
    """(T, S): each part's mean contribution over all orders in which the parts, and the heads' update, can be applied.

    Args:
        parameters, before: All of the model, which the update has changed, and what they were.
        parts: (S, n) of the update of the first ``shared`` of them.
    """
    after, count = [p.detach().clone() for p in parameters], len(parts) + 1
    heads = flat(a - b for a, b in zip(after[shared:], before[shared:], strict=True))
    nothing = torch.zeros_like(parts[0])
    value = {}
    for chosen in itertools.product((0, 1), repeat=count):
        moved = sum((parts[s] for s in range(count - 1) if chosen[s]), nothing)
        put(parameters, before, torch.cat([moved, heads * chosen[-1]]))
        value[chosen] = values(model, data)
    with torch.no_grad():
        for p, v in zip(parameters, after, strict=True):
            p.copy_(v)
    found = np.zeros((2, count - 1))
    for s in range(count - 1):
        for rest in itertools.product((0, 1), repeat=count - 1):
            size = sum(rest)
            share = math.factorial(size) * math.factorial(count - 1 - size) / math.factorial(count)
            found[:, s] += share * (value[(*rest[:s], 1, *rest[s:])] - value[(*rest[:s], 0, *rest[s:])])
    return found


def put(parameters, before, change):
    start = 0
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b + change[start : start + p.numel()].view_as(p))
            start += p.numel()


def columns(rows, made):
    side = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    made.left, made.correction, made.right = side["left"], side["correction"], side["right"]
    made.shapley = side.get("shapley")
    head = 0.5 * (side["left_head"] + side["head_correction"] + side["right_head"])
    made.ledger = {
        "step": side["step"],
        "burst": np.zeros(len(rows), dtype=int),
        "term": terms.term(made.left, made.correction, made.right)[:, None],
        "head": head,
        "loss_change": side["change"],
        "drift": np.zeros_like(side["change"]),
        "status": side["status"],
    }
    return made
