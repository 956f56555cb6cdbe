"""What the optimizer makes of the gradients, held against a naive twin that keeps everything apart itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.errors import ProbeError
from gradprobe.rows import EARLIER_SOURCES
from gradprobe.updates import optimizer_watch as module

TASKS = ("a", "b")
WEIGHTS = {"a": 1.0, "b": 0.5}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        # A bias before BatchNorm has a gradient of rounding noise, which Adam makes as large as any other.
        self.trunk = nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Tanh()
        )
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        h = self.trunk(x)
        return self.a(h), self.b(h)


def batch(step):
    stream = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=stream)
    return x, x[:, :1] * 2 + 0.3 * torch.randn(16, 1, generator=stream), (x[:, 1] > 0).long()


def losses_of(model, step):
    x, ya, yb = batch(step)
    a, b = model(x)
    return {"a": nn.functional.mse_loss(a, ya), "b": nn.functional.cross_entropy(b, yb)}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


def train(out, optimizer="sgd", steps=8, *, updates=True, every=1, clip=0.0, how="backward", meddle=None, **options):
    """A training; what it ends with."""
    model = Net()
    opt = OPTIMIZERS[optimizer](model.parameters()) if isinstance(optimizer, str) else optimizer(model.parameters())
    torch.manual_seed(5)
    with gradprobe.attach(model, TASKS, out, every=every, optimizer=opt, updates=updates, **options) as probe:
        for step in range(steps):
            losses = losses_of(model, step)
            if how == "backward":
                probe.backward(losses, WEIGHTS)
            else:
                probe.record(losses, WEIGHTS)
                sum(WEIGHTS[t] * losses[t] for t in losses).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if meddle is not None:
                meddle(model, step)
            opt.step()
            opt.zero_grad()
    return torch.cat([v.reshape(-1).double() for v in model.state_dict().values()])


def updates_of(path):
    with gradprobe.open_run(path) as run:
        return run.updates, run.status_names, run.layers


def statuses(path):
    found, names, _ = updates_of(path)
    return [names[code] for code in found["status"]]


# ---- harmless


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", ["backward", "record"])
def test_a_training_with_updates_is_bitwise_the_one_without(tmp_path, optimizer, how):
    clip = 0.5 if how == "record" else 0.0
    plain = train(None, optimizer, updates=False, how=how, clip=clip)
    seen = train(tmp_path / "run.h5", optimizer, how=how, clip=clip)
    assert torch.equal(plain, seen)
    assert statuses(tmp_path / "run.h5") == ["measured"] * 8


def test_rows_are_the_same_with_and_without_updates(tmp_path):
    train(tmp_path / "with.h5", "adamw")
    train(tmp_path / "without.h5", "adamw", updates=False)
    with gradprobe.open_run(tmp_path / "with.h5") as a, gradprobe.open_run(tmp_path / "without.h5") as b:
        for name in ("loss", "grad_norm", "cosine", "shared_cosine"):
            np.testing.assert_array_equal(a[name], b[name])
        assert b.updates == {}


# ---- the naive twin


class Twin:
    """One training with a first moment per source, made from explicit gradients of every task at every step."""

    def __init__(self, optimizer, steps, clip=0.0, known=lambda step: True):
        self.model = Net()
        self.opt = OPTIMIZERS[optimizer](self.model.parameters())
        self.group = self.opt.param_groups[0]
        self.shared = dict(self.model.trunk.named_parameters())
        self.moments = {n: [torch.zeros_like(p).double() for _ in range(4)] for n, p in self.shared.items()}
        self.rows = []
        torch.manual_seed(5)
        for step in range(steps):
            self.step(step, clip, known(step))

    def step(self, step, clip, known):
        losses, names = losses_of(self.model, step), list(self.shared)
        gradients = [
            dict(zip(names, torch.autograd.grad(losses[t], [*self.shared.values()], retain_graph=True), strict=True))
            for t in TASKS
        ]
        every = list(self.model.parameters())
        own = [
            [
                torch.zeros_like(p) if g is None else g * WEIGHTS[t]
                for g, p in zip(
                    torch.autograd.grad(losses[t], every, retain_graph=True, allow_unused=True), every, strict=True
                )
            ]
            for t in TASKS
        ]
        sum(WEIGHTS[t] * losses[t] for t in losses).backward()
        joint = torch.cat([p.grad.reshape(-1) for p in every]).double()
        flat = [torch.cat([g.reshape(-1) for g in task]).double() for task in own]
        scale = min(1.0, clip / float(joint.norm())) if clip else 1.0
        if clip:
            nn.utils.clip_grad_norm_(every, clip)
        before = {n: p.detach().clone() for n, p in self.shared.items()}
        self.opt.step()
        parts = {n: self.parts(n, [g[n] for g in gradients], before[n], scale, step, known) for n in names}
        update = {n: (p.detach() - before[n]).double() for n, p in self.shared.items()}
        self.opt.zero_grad()
        self.rows.append(
            {
                "parts": parts,
                "update": update,
                "gradients": [{n: g.double() for n, g in task.items()} for task in gradients],
                "scale": scale,
                "norm": float(joint.norm()),
                "share": [float(f @ joint / (joint @ joint)) for f in flat],
                "without": [min(1.0, clip / float((joint - f).norm())) if clip else 1.0 for f in flat],
            }
        )

    def parts(self, name, gradients, before, scale, step, known):
        """Straight from the definitions in torch's documentation."""
        g, adam = self.group, isinstance(self.opt, torch.optim.Adam)
        decoupled = isinstance(self.opt, torch.optim.AdamW)
        fresh = [scale * WEIGHTS[t] * own.double() for t, own in zip(TASKS, gradients, strict=True)]
        fresh += [torch.zeros_like(fresh[0]) if decoupled else g["weight_decay"] * before.double(), fresh[0] * 0]
        if not known:  # what no task is told apart in comes to the earlier momentum
            fresh = [fresh[0] * 0] * 3 + [sum(fresh)]
        keep = g["betas"][0] if adam else g["momentum"]
        take = 1 - keep if adam else 1.0
        moments = self.moments[name] = [keep * m + take * new for m, new in zip(self.moments[name], fresh, strict=True)]
        if adam:
            beta2, lr = g["betas"][1], g["lr"]
            second = self.opt.state[self.shared[name]]["exp_avg_sq"].double()
            size = (second / (1 - beta2 ** (step + 1))).sqrt() + g["eps"]
            made = [-lr / (1 - keep ** (step + 1)) * m / size for m in moments]
            if decoupled:
                made[2] = made[2] - lr * g["weight_decay"] * before.double()
            return made
        if g["nesterov"]:
            return [-g["lr"] * (new + keep * m) for m, new in zip(moments, fresh, strict=True)]
        return [-g["lr"] * m for m in moments]


def layer(parts, name):
    """One vector from the parameters of a layer of the trunk."""
    prefix = name.removeprefix("trunk.") + "."
    return torch.cat([v.reshape(-1) for n, v in parts.items() if n.startswith(prefix)])


def by_layer(row, name):
    """The four parts, the whole update and the two gradients, on one layer."""
    parts = [layer({n: made[s] for n, made in row["parts"].items()}, name) for s in range(4)]
    return parts, layer(row["update"], name), [layer(g, name) for g in row["gradients"]]


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parts_are_those_of_a_naive_twin_that_keeps_a_moment_per_task(tmp_path, optimizer, clip):
    train(tmp_path / "run.h5", optimizer, clip=clip)
    found, _, layers = updates_of(tmp_path / "run.h5")
    twin = Twin(optimizer, 8, clip)
    for step, row in enumerate(twin.rows):
        for place, name in enumerate(layers):
            parts, update, gradients = by_layer(row, name)
            norms = [float(p.norm()) for p in parts[:2]]
            np.testing.assert_allclose(found["update_norm"][step, place], norms, rtol=2e-4)
            cosine = float(parts[0] @ parts[1]) / norms[0] / norms[1]
            np.testing.assert_allclose(found["cosine"][step, place, 0], cosine, atol=2e-4)
            shares = [float(p @ update / (update @ update)) for p in parts]
            np.testing.assert_allclose(found["share"][step, place], shares, atol=1e-3)
            effect = np.array([[float(g @ p) for p in parts] for g in gradients])
            np.testing.assert_allclose(found["effect"][step, place], effect, atol=2e-4 * np.abs(effect).max())
    np.testing.assert_allclose(found["shared_share"].sum(axis=1), 1, atol=1e-5)


def test_momentum_of_steps_that_were_not_measured_is_a_part_of_its_own(tmp_path):
    train(tmp_path / "run.h5", "momentum", steps=13, every=4)
    found, _, layers = updates_of(tmp_path / "run.h5")
    assert found["step"].tolist() == [0, 4, 8, 12]
    twin = Twin("momentum", 13, known=lambda step: step % 4 == 0)
    for place, step in enumerate(found["step"]):
        total = [by_layer(twin.rows[step], name) for name in layers]
        parts = [torch.cat([t[0][s] for t in total]) for s in range(4)]
        update = torch.cat([t[1] for t in total])
        shares = [float(p @ update / (update @ update)) for p in parts]
        np.testing.assert_allclose(found["shared_share"][place], shares, atol=1e-3)
    assert found["shared_share"][-1, 3] > 0.3  # three of four gradients in the moment were not told apart
    assert tuple(found["source"]) == (*TASKS, *EARLIER_SOURCES)


def test_clipping_and_each_tasks_part_in_it(tmp_path):
    train(tmp_path / "run.h5", "sgd", clip=0.5)
    found, _, _ = updates_of(tmp_path / "run.h5")
    twin = Twin("sgd", 8, 0.5)
    for name, key in (("clip_scale", "scale"), ("joint_norm", "norm"), ("clip_share", "share")):
        np.testing.assert_allclose(found[name], [row[key] for row in twin.rows], rtol=1e-3, atol=1e-4)
    # Which norm is the limit is known from the third clipped step on.
    assert np.isnan(found["clip_scale_without"][:2]).all()
    np.testing.assert_allclose(found["clip_scale_without"][2:], [r["without"] for r in twin.rows[2:]], rtol=1e-3)
    assert (found["clip_scale_without"][2:, 0] > found["clip_scale"][2:]).all()  # a alone shrinks the step


def test_a_mean_over_tasks_is_a_scale_and_no_limit(tmp_path):
    def halve(model, _):
        for p in model.parameters():
            p.grad.mul_(0.5)

    train(tmp_path / "run.h5", "sgd", meddle=halve)
    found, _, _ = updates_of(tmp_path / "run.h5")
    np.testing.assert_allclose(found["clip_scale"], 0.5, rtol=1e-5)
    assert np.isnan(found["clip_scale_without"]).all()


# ---- what cannot be taken apart says so


def test_a_gradient_that_is_no_weighted_sum_is_not_taken_apart(tmp_path):
    def clip_values(model, _):
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    train(tmp_path / "run.h5", "sgd", meddle=clip_values)
    found, _, _ = updates_of(tmp_path / "run.h5")
    assert statuses(tmp_path / "run.h5") == [module.FOREIGN_GRADIENT] * 8
    for name in ("share", "effect", "update_norm", "clip_scale", "joint_norm"):
        assert np.isnan(found[name]).all()


def test_an_optimizer_of_another_kind_still_shows_its_clipping(tmp_path):
    train(tmp_path / "run.h5", lambda p: torch.optim.RMSprop(p, 1e-3), clip=0.5)
    found, _, _ = updates_of(tmp_path / "run.h5")
    assert all("RMSprop" in status for status in statuses(tmp_path / "run.h5"))
    assert (found["clip_scale"] < 1).all()
    assert np.isnan(found["share"]).all()


def test_an_update_that_something_else_made_too_is_not_taken_apart(tmp_path):
    class Nudged(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(0.1)

    Nudged.__name__ = "SGD"  # what is told apart by its exact type is the other test
    found = module.why_not(Nudged([nn.Parameter(torch.zeros(1))], 0.1))
    assert "cannot be taken apart" in found

    def nudge(optimizer, *_):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(0.1)

    def make(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1)
        optimizer.register_step_post_hook(nudge)
        return optimizer

    train(tmp_path / "run.h5", make)
    assert statuses(tmp_path / "run.h5") == [module.FOREIGN_UPDATE] * 8


def test_accumulated_gradients_are_counted_and_not_taken_apart(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(6):
            probe.backward(losses_of(model, step), WEIGHTS)
            if step % 2:
                opt.step()
                opt.zero_grad()
    found, _, _ = updates_of(tmp_path / "run.h5")
    assert found["calls"].tolist() == [2, 2, 2]
    assert statuses(tmp_path / "run.h5") == [module.SEVERAL_CALLS] * 3


def test_a_step_that_makes_its_own_gradient_is_taken_apart_as_any_other(tmp_path):
    found = []
    for name in ("plain", "closure"):
        model = Net()
        opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with gradprobe.attach(model, TASKS, tmp_path / f"{name}.h5", every=1, optimizer=opt, updates=True) as probe:

            def closure(opt=opt, model=model, probe=probe):
                opt.zero_grad()
                losses = losses_of(model, probe.step)
                probe.backward(losses, WEIGHTS)
                return losses["a"]

            for step in range(4):
                if name == "plain":
                    closure()
                    opt.step()
                else:
                    opt.step(closure) if step % 2 else opt.step(closure=closure)
        assert statuses(tmp_path / f"{name}.h5") == ["measured"] * 4
        found.append(updates_of(tmp_path / f"{name}.h5")[0])
    plain, closure = found
    assert closure["calls"].tolist() == [1] * 4
    assert closure["skipped"].tolist() == [0] * 4
    for name in ("share", "effect", "update_norm", "clip_scale", "joint_norm"):
        assert np.isfinite(plain[name]).all()
        np.testing.assert_array_equal(plain[name], closure[name])


@pytest.mark.parametrize("kind", ["never", "late", "within the backward"])
def test_a_step_whose_gradient_cannot_be_seen_says_so(tmp_path, kind):
    """A closure that is not evaluated, or after the update alone; or the step is a hook of the backward."""

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step()
            if kind == "late" and closure is not None:
                with torch.enable_grad():
                    closure()
            return loss

    torch.manual_seed(0)
    model = Net()
    opt = Odd(model.parameters(), 0.1)
    if kind == "within the backward":
        whole = next(model.parameters())  # the last to get its gradient
        whole.register_post_accumulate_grad_hook(lambda _: opt.step())
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        steps = 1 if kind == "within the backward" else 3  # the next would be derived from the joint backward
        for step in range(steps):
            opt.zero_grad()
            probe.backward(losses_of(model, step), WEIGHTS)
            if kind != "within the backward":
                opt.step(lambda: None)
    told = statuses(tmp_path / "run.h5")
    assert len(told) == steps
    assert module.MEASURED not in told
    if kind != "late":
        assert told == [module.UNSEEN] * steps


def test_steps_without_a_gradient_are_counted_as_skipped(tmp_path):
    def drop(model, step):
        if step in (2, 5):
            for p in model.parameters():
                p.grad = None

    train(tmp_path / "run.h5", "momentum", meddle=drop)
    found, _, _ = updates_of(tmp_path / "run.h5")
    assert found["skipped"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [i for i, s in enumerate(statuses(tmp_path / "run.h5")) if s == module.NO_GRADIENT] == [2, 5]


def test_steps_that_a_scaler_skips_are_counted_and_the_others_taken_apart(tmp_path):
    model = Net()
    opt, scaler = torch.optim.AdamW(model.parameters(), 1e-2), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradprobe.attach(
        model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, scaler=scaler, updates=True
    ) as probe:
        for call in range(8):
            losses = losses_of(model, call)
            probe.backward(losses, WEIGHTS)
            if call in (2, 3):
                model.a.weight.grad[0, 0] = float("inf")
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    found, _, _ = updates_of(tmp_path / "run.h5")
    assert found["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["skipped"].tolist() == [0, 0, 2, 2, 2, 2]
    assert found["calls"].tolist() == [1, 1, 3, 1, 1, 1]
    told = statuses(tmp_path / "run.h5")
    assert told[2] == module.SEVERAL_CALLS
    assert told[:2] + told[3:] == ["measured"] * 5
    np.testing.assert_allclose(found["clip_scale"][[0, 1, 3, 4, 5]], 1.0, rtol=1e-4)


# ---- BatchNorm


def test_drift_of_running_statistics_is_that_between_two_rows(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    norm, seen = model.trunk[1], []
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=2, optimizer=opt, updates=True) as probe:
        for step in range(6):
            losses = losses_of(model, step)
            if step % 2 == 0:
                seen.append((norm.running_mean.double().clone(), norm.running_var.double().clone()))
            probe.backward(losses, WEIGHTS)
            opt.step()
            opt.zero_grad()
            if step == 3:
                model(batch(99)[0])  # a forward more
    found, _, _ = updates_of(tmp_path / "run.h5")
    (m0, v0), (m1, v1), _ = seen
    mean = float(((m1 - m0) ** 2 / (v0 + norm.eps)).mean().sqrt())
    variance = float(((v1 + norm.eps).log() - (v0 + norm.eps).log()).square().mean().sqrt())
    assert np.isnan(found["bn_mean_drift"][0])
    np.testing.assert_allclose(found["bn_mean_drift"][1], mean, rtol=1e-5)
    np.testing.assert_allclose(found["bn_variance_drift"][1], variance, rtol=1e-5)
    np.testing.assert_allclose(found["bn_batches"][1:], [1.0, 1.5])


def test_a_model_without_running_statistics_has_no_drift(tmp_path):
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.trunk[1] = nn.LayerNorm(16)

    model = Plain()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(3):
            probe.backward(losses_of(model, step), WEIGHTS)
            opt.step()
            opt.zero_grad()
    found, _, _ = updates_of(tmp_path / "run.h5")
    for name in ("bn_mean_drift", "bn_variance_drift", "bn_batches"):
        assert np.isnan(found[name]).all()


# ---- odd models and wrong calls


def test_a_layer_that_one_task_does_not_reach(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"low": nn.Linear(4, 4), "high": nn.Linear(4, 4), "a": nn.Linear(4, 1)})
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    tasks = ("a", "b", "c")
    with gradprobe.attach(model, tasks, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for _ in range(3):
            low = model["low"](torch.randn(8, 4)).tanh()
            high = model["high"](low).tanh()
            probe.backward({"a": model["a"](high).square().mean(), "b": high.mean(), "c": low.square().mean()})
            opt.step()
            opt.zero_grad()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        found, place = run.updates, run.layers.index("high")
    assert np.isnan(found["update_norm"][:, place, 2]).all()  # c: no path, which is not 0
    assert np.isnan(found["effect"][:, place, 2]).all()
    assert np.isfinite(found["effect"][:, place, :2]).all()
    np.testing.assert_allclose(found["share"][:, place].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found["share"][:, place, 2], 0, atol=1e-7)  # but for rounding, which all share
    np.testing.assert_allclose(found["clip_share"].sum(axis=1), 1, atol=1e-4)


def test_tasks_that_share_nothing_have_no_update_in_common(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    opt = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(8, 4)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        with pytest.warns(RuntimeWarning, match="no two tasks reach a parameter in common"):
            probe.backward({t: model[t](x).square().mean() for t in TASKS})
        opt.step()
    assert statuses(tmp_path / "run.h5") == [module.NOTHING_SHARED]


def test_frozen_parameters_and_those_of_another_optimizer_do_not_move(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.trunk[0].parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(3):
            probe.backward(losses_of(model, step), WEIGHTS)
            opt.step()
            model.zero_grad()
    found, _, layers = updates_of(tmp_path / "run.h5")
    assert statuses(tmp_path / "run.h5") == ["measured"] * 3
    moving = layers.index("trunk.0")
    assert (found["update_norm"][:, moving] > 0).all()
    others = [i for i in range(len(layers)) if i != moving]
    np.testing.assert_array_equal(found["update_norm"][:, others], 0)
    assert np.isnan(found["cosine"][:, others]).all()


def test_weight_zero_has_no_part_in_the_update(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for step in range(4):
            probe.backward(losses_of(model, step), {"a": 1.0, "b": 0.0})
            opt.step()
            opt.zero_grad()
    found, _, _ = updates_of(tmp_path / "run.h5")
    np.testing.assert_array_equal(found["shared_update_norm"][:, 1], 0)
    np.testing.assert_allclose(found["shared_share"][:, 0], 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": False}, "pass optimizer= too"),
        ({"level": "features"}, "level='parameters' or 'both'"),
        ({"memory": "low"}, "leave memory='low'"),
        ({"tasks": ("a", "weight decay")}, "cannot be called 'weight decay'"),
    ],
)
def test_what_is_needed_is_said(tmp_path, options, words):
    model = Net()
    options = dict(options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if options.pop("optimizer", True) else None
    tasks = options.pop("tasks", TASKS)
    with pytest.raises(ProbeError, match=words):
        gradprobe.attach(model, tasks, tmp_path / "run.h5", optimizer=optimizer, updates=True, **options)
    assert not (tmp_path / "run.h5").exists()
    gradprobe.attach(model, TASKS, optimizer=torch.optim.SGD(model.parameters(), 0.1)).close()  # nothing stays attached


def test_updates_belong_to_one_probe():
    model, other = Net(), Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    beside = gradprobe.Updates()
    with (
        gradprobe.GradientProbe(model, TASKS, optimizer=opt, updates=beside),
        pytest.raises(ProbeError, match="belong to another probe"),
    ):
        gradprobe.GradientProbe(other, TASKS, optimizer=torch.optim.SGD(other.parameters(), 0.1), updates=beside)


def test_a_failure_of_ours_is_a_status_and_training_goes_on(tmp_path, monkeypatch):
    def spoilt(*_):
        raise RuntimeError("spoilt")

    plain = train(None, "adamw", updates=False)
    monkeypatch.setattr(module, "look_after", spoilt)
    with pytest.warns(RuntimeWarning, match="spoilt"):
        seen = train(tmp_path / "run.h5", "adamw")
    assert torch.equal(plain, seen)
    assert all("spoilt" in status for status in statuses(tmp_path / "run.h5"))


def test_hooks_are_taken_off_when_the_probe_is_closed(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt, updates=True).close()
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks


# ---- going on


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_run_that_is_gone_on_with_has_the_rows_of_one_that_was_not(tmp_path, optimizer):
    def go(path, first, last, state=None, stop=None):
        model = Net()
        opt = OPTIMIZERS[optimizer](model.parameters())
        torch.manual_seed(5)
        probe = gradprobe.attach(model, TASKS, path, every=2, optimizer=opt, updates=True, resume=state is not None)
        if state is not None:
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            probe.load_state_dict(state["probe"])
        for step in range(first, last):
            probe.backward(losses_of(model, step), WEIGHTS)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
            if step == stop:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": opt.state_dict(),
                        "rng": torch.get_rng_state(),
                        "probe": probe.state_dict(),
                    },
                    tmp_path / "state.pt",
                )
        probe.close()

    go(tmp_path / "whole.h5", 0, 12)
    go(tmp_path / "torn.h5", 0, 9, stop=5)  # three steps more than the checkpoint knows
    go(tmp_path / "torn.h5", 6, 12, state=torch.load(tmp_path / "state.pt", weights_only=True))
    whole, torn = updates_of(tmp_path / "whole.h5")[0], updates_of(tmp_path / "torn.h5")[0]
    for name, values in whole.items():
        if name not in ("time", "overhead", "source"):
            np.testing.assert_array_equal(torn[name], values, err_msg=name)


def test_old_states_without_updates_can_still_be_gone_on_from(tmp_path):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", optimizer=opt) as probe:
        state = probe.state_dict()
    with gradprobe.attach(model, TASKS, tmp_path / "new.h5", optimizer=opt, updates=True, every=1) as probe:
        probe.load_state_dict(state)
        for step in range(2):
            probe.backward(losses_of(model, step), WEIGHTS)
            opt.step()
            opt.zero_grad()
    assert statuses(tmp_path / "new.h5") == ["measured"] * 2


def test_taken_apart_in_many_pieces_or_in_one(tmp_path, monkeypatch):
    found = []
    for place, size in enumerate((1, 1 << 30)):
        monkeypatch.setattr("gradprobe.updates.taking_apart.IN_CACHE", size)
        train(tmp_path / f"{place}.h5", "adamw")
        found.append(updates_of(tmp_path / f"{place}.h5")[0])
    for name in ("share", "effect", "update_norm"):
        scale = np.abs(found[0][name]).max()
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5 * scale)


def test_very_small_updates_have_shares(tmp_path):
    train(tmp_path / "run.h5", lambda p: torch.optim.SGD(p, 0.1), meddle=lambda model, _: shrink(model))
    found, _, _ = updates_of(tmp_path / "run.h5")
    # Of an update that rounding swallows nothing is left; its parts are known all the same.
    assert np.isfinite(found["shared_share"]).all()
    assert (found["shared_update_norm"] > 0).all()


def shrink(model):
    for p in model.parameters():
        p.grad.mul_(1e-20)


def test_both_halves_of_every_pair_are_there(tmp_path):
    """Three tasks, all reaching all: the cosines of three pairs, in the order of the file."""
    torch.manual_seed(0)
    trunk = nn.Linear(4, 3)
    heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    opt = torch.optim.SGD(model.parameters(), 0.1)
    tasks = ("x", "y", "z")
    with gradprobe.attach(model, tasks, tmp_path / "run.h5", every=1, optimizer=opt, updates=True) as probe:
        for _ in range(2):
            h = trunk(torch.randn(8, 4)).tanh()
            probe.backward({t: head(h).square().mean() for t, head in zip(tasks, heads, strict=True)})
            opt.step()
            opt.zero_grad()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        # Plain descent scales every task's gradient alike, so the angles are those of the gradients.
        np.testing.assert_allclose(run["update/shared_cosine"], run["shared_cosine"], atol=1e-4)
        assert run.pairs == tuple(f"{a}|{b}" for a, b in itertools.combinations(tasks, 2))
