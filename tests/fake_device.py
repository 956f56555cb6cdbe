"""A device made of Python: tensors that lie on it, computed on the CPU, and a count of what makes the host wait.

Run by itself, it trains a small model on it with a probe and prints what each step cost: see test_one_transfer.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

WAITS: Counter[str] = Counter()
DEVICE = "fakegpu:0"
aten = torch.ops.aten
READ = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default}


class OnDevice(torch.Tensor):
    """A tensor whose device is not the CPU; its numbers are."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __init__(self, inner):
        pass

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Seen(TorchDispatchMode):
    """Also sees what has no tensor of the device among its arguments: what is made there, or copied to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_device(value):
    return isinstance(value, torch.device) and value.type == torch.device(DEVICE).type


def run(func, args, kwargs):
    there = any(isinstance(a, OnDevice) for a in torch.utils._pytree.tree_leaves((args, kwargs)))
    target = kwargs.get("device")
    inner_args, inner_kwargs = tree_map(lambda a: a.inner if isinstance(a, OnDevice) else a, (args, kwargs))
    if target is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    result = func(*inner_args, **inner_kwargs)
    copied = func is aten._to_copy.default and target is not None
    lands = is_device(target) if target is not None else there
    if copied and there != is_device(target):  # one way or the other the host waits, unless it says otherwise
        WAITS["to the device" if is_device(target) else "to the host"] += not kwargs.get("non_blocking", False)
        if result is inner_args[0]:
            result = result.clone()
    if func in READ and there:
        WAITS[str(func)] += 1
        return result
    if func is aten.copy_.default and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        WAITS["copied between"] += 1
    if func._schema.name[-1] == "_" and there:
        return args[0]
    return tree_map(lambda r: OnDevice(r) if isinstance(r, torch.Tensor) and lands else r, result)


class Event:
    """What a stopwatch asks of a device: marks in its queue of work, that can be read once they were passed."""

    def __init__(self, device=None, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        import time

        self.at = time.perf_counter()

    def synchronize(self):
        WAITS["event"] += 1

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def losses_of(trunk, heads, step, tasks):
    x = OnDevice(torch.randn(8, 6, generator=torch.Generator().manual_seed(step)))
    z = torch.tanh(x @ trunk[0].t() + trunk[1])
    z = torch.tanh(z @ trunk[2].t())
    return {t: ((z @ head.t() - i) ** 2).mean() for i, (t, head) in enumerate(zip(tasks, heads, strict=True))}


class Model(torch.nn.Module):
    def __init__(self, tasks):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return torch.nn.Parameter(OnDevice(0.3 * torch.randn(*shape, generator=generator)))

        self.trunk = torch.nn.ParameterList([weight(12, 6), weight(12), weight(12, 12)])
        self.heads = torch.nn.ParameterList([weight(2, 12) for _ in range(tasks)])


class Rows:
    tables = ("features",)

    def __init__(self):
        self.rows, self.features = [], []

    def start(self, header):
        self.header = header

    def grow(self, header):
        self.header = header

    def write(self, row):
        (self.features if row.table.name == "features" else self.rows).append(row)

    def flush(self):
        return True

    def close(self, end):
        pass

    write_epoch = annotate = lambda *_: None


class Scaler:
    """As torch's: the scale lies on the device, and asking for it waits."""

    def __init__(self):
        self.at = OnDevice(torch.tensor(1024.0))

    def scale(self, loss):
        return loss * self.at

    def get_scale(self):
        return self.at.item()


def caught():
    """What makes a host wait, each by itself."""
    here, there = torch.arange(3.0), OnDevice(torch.arange(3.0))
    ways = {
        "item": lambda: there[0].item(),
        "float": lambda: float(there[0]),
        "bool": lambda: bool((there > 9).any()),
        "cpu": lambda: there.cpu(),
        "to_device": lambda: here.to(DEVICE),
        "copy": lambda: there.copy_(here),
        "nonzero": lambda: there.nonzero(),
    }
    counts = {}
    for name, way in ways.items():
        WAITS.clear()
        way()
        counts[name] = sum(WAITS.values())
    return counts


def train(options, steps=8):
    from gradprobe import GradientProbe

    how = options.pop("by", "backward")
    tensors = options.pop("tensor_weights", False)
    tasks = [f"t{i}" for i in range(options.pop("tasks", 3))]
    model, sink, per_step = Model(len(tasks)), Rows(), []
    scaler = Scaler() if options.pop("scaled", False) else None
    cut = options.pop("micro", 1)
    weights = {t: OnDevice(torch.tensor(1.0 + i)) if tensors else 1.0 + i for i, t in enumerate(tasks)}
    with GradientProbe(model, tasks, [sink], shared="trunk", scaler=scaler, **options) as probe:
        for step in range(steps):
            losses = losses_of(model.trunk, model.heads, step, tasks)
            micro = [losses_of(model.trunk, model.heads, 100 * step + i, tasks) for i in range(cut)]
            WAITS.clear()
            if cut > 1:
                probe.backward(weights=weights, micro=micro, batch_size=8 * cut)
            elif how == "record":
                probe.record(losses, weights)
                sum(weights[t] * losses[t] for t in tasks).backward()
            else:
                probe.backward(losses, weights)
            per_step.append(dict(+WAITS))
            for p in model.parameters():
                p.grad = None
    return {
        "per_step": per_step,
        "status": [row.status for row in sink.rows],
        "gram": [row.gram.tolist() for row in sink.rows],
        "loss": [row.loss.tolist() for row in sink.rows],
        "overhead": [row.overhead for row in sink.rows],
        "features": len(sink.features),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _setup_privateuseone_for_python_backend("fakegpu")
    torch.Event = Event
    threading.excepthook = lambda args: sys.__excepthook__(args.exc_type, args.exc_value, args.exc_traceback)
    found = {}
    with Seen():
        found["caught"] = caught()
        for name, options in json.loads(sys.argv[1]).items():
            found[name] = train(options)
    print(json.dumps(found), flush=True)
    os._exit(0)  # torch's thread for such a device is never joined, and at times ends the process with an abort
