"""What counts as shared: by the gradients' effect, whatever the graph says, and from the step on at which it is so."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch
from torch import nn
from zoo import Collector

import gradprobe
from gradprobe import measures
from gradprobe.probes import GradientProbe
from gradprobe.rows import MEASURED, NONFINITE_LOSS, absent

TASKS = ("a", "b")
USES = ("record", "backward")


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)
        self.double()

    def two(self, x):
        z = self.trunk(x).tanh()
        return self.a(z).square().mean(), self.b(z).logsumexp(1).mean()


def batch(step):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def right(model, losses, layers):
    """Norms (T,) and cosine over some layers, by autograd."""
    parameters = [p for layer in layers for p in layer.parameters()]
    found = [
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(
                    torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), parameters, strict=True
                )
            ]
        )
        for loss in losses
    ]
    norms = [float(g.norm()) for g in found]
    return norms, float(found[0] @ found[1] / found[0].norm() / found[1].norm())


def rows_of(model, losses, use="record", steps=6, after=None, tasks=TASKS, **options):
    """Rows and header of a few steps of training; warnings apart."""
    sink, expected = Collector(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        warnings.catch_warnings(record=True) as told,
        GradientProbe(model, tasks, [sink], every=1, optimizer=optimizer, **options) as probe,
    ):
        warnings.simplefilter("always")
        for step in range(steps):
            found = losses(step)
            expected.append(right(model, list(found.values()), [model.trunk]))
            getattr(probe, use)(found)
            if use == "record":
                sum(found.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if after is not None:
                after(step)
    return sink, expected, [str(w.message) for w in told]


def check(sink, expected, tolerance=1e-9):
    assert [row.status for row in sink.rows] == [MEASURED] * len(expected)
    for row, (norms, cosine) in zip(sink.rows, expected, strict=True):
        found = row.shared(sink.header.reach)
        assert found[0] == pytest.approx(norms, rel=tolerance)
        assert found[1] == pytest.approx([cosine], abs=tolerance)


# ---- what only the graph calls shared


def in_a_vector(model):
    def losses(step):
        v = torch.zeros(2, dtype=torch.float64)
        v[0], v[1] = model.two(batch(step))
        return {"a": v[0], "b": v[1]}

    return losses


def stacked(model):
    return lambda step: dict(zip(TASKS, torch.stack(model.two(batch(step))), strict=True))


def concatenated(model):
    def losses(step):
        z = model.trunk(batch(step)).tanh()
        a, b = torch.cat([model.a(z), model.b(z)], dim=1).split([2, 3], dim=1)
        return {"a": a.square().mean(), "b": b.logsumexp(1).mean()}

    return losses


def with_zeros(model):
    def losses(step):
        a, b = model.two(batch(step))
        return {"a": a + 0 * sum(p.sum() for p in model.parameters()), "b": b}

    return losses


def scripted(model):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = model.trunk, model.a, model.b

        def forward(self, x):
            z = torch.tanh(self.trunk(x))
            return self.a(z), self.b(z)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = torch.jit.script(Both())

    def losses(step):
        a, b = both(batch(step))
        return {"a": a.square().mean(), "b": b.logsumexp(1).mean()}

    return losses


def compiled(model):
    both = torch.compile(model.two, backend="aot_eager")
    return lambda step: dict(zip(TASKS, both(batch(step)), strict=True))


class Through(torch.autograd.Function):
    """Tensors as they are; a gradient that is not there stays undefined, as behind DDP with unused parameters."""

    @staticmethod
    def forward(context, *tensors):
        context.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(context, *gradients):
        return gradients


def undefined(model):
    def losses(step):
        z = model.trunk(batch(step)).tanh()
        a, b = Through.apply(model.a(z), model.b(z))
        return {"a": a.square().mean(), "b": b.logsumexp(1).mean()}

    return losses


KINDS = (in_a_vector, stacked, concatenated, with_zeros, scripted, compiled, undefined)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_two_tasks_have_a_gradient_on_is_summed_over(kind, use):
    model = Net()
    with functorch.patch(donated_buffer=False):
        sink, expected, told = rows_of(model, kind(model), use)
    check(sink, expected)
    reach = dict(zip(sink.header.layers, sink.header.reach.tolist(), strict=True))
    assert reach.pop("trunk") == [True, True]
    assert all(sum(row) < 2 for row in reach.values())
    if kind is not scripted or reach:
        assert len([text for text in told if "shared by the graph alone" in text]) == 1
        assert all(repr(layer) in " ".join(told) for layer in reach)


@pytest.mark.parametrize("how", [{"memory": "low"}, {"sketch": 4096}])
def test_so_it_is_however_it_is_measured(how):
    model = Net()
    sink, expected, _ = rows_of(model, in_a_vector(model), "backward", **how)
    check(sink, expected, 1e-6)


def test_what_is_derived_is_no_rounding_where_the_gradient_is_zero():
    model = Net().float()
    sink, _, _ = rows_of(
        model, lambda step: dict(zip(TASKS, torch.stack(model.two(batch(step).float())), strict=True)), "backward"
    )
    zeros = [(row.gram[1, 1, 1], row.gram[2, 0, 0]) for row in sink.rows]
    assert zeros == [(0.0, 0.0)] * 6


def test_it_is_told_at_the_end_where_there_is_one_row():
    model = Net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with GradientProbe(model, TASKS, every=1) as probe:
            probe.record(stacked(model)(0))
            assert not told
    assert "'a', 'b': shared by the graph alone" in str(told[0].message)


def test_a_layer_that_begins_at_zero_is_shared_from_its_first_gradient_on():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8, bias=False).double()
            nn.init.zeros_(self.up.weight)
            self.down = nn.Linear(8, 8, bias=False).double()

        def losses(self, step):
            z = self.trunk(batch(step)).tanh()
            z = z + self.up(self.down(z))  # the gradient of `down` is 0 until `up` has moved
            return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean()}

    model = Late()
    sink, _, told = rows_of(model, model.losses)
    assert not told
    down = sink.header.layers.index("down")
    assert [row.reach[down].all() for row in sink.rows] == [False, *[True] * 5]


def test_a_task_without_any_gradient_has_the_norm_zero():
    model = Net()
    sink, _, _ = rows_of(model, lambda step: {"a": model.two(batch(step))[0], "b": 0 * model.two(batch(step))[1]})
    norms, cosine = sink.rows[-1].shared(sink.header.reach)
    assert norms[1] == 0
    assert norms[0] > 0
    assert np.isnan(cosine[0])


# ---- learned loss weights


class Weighing(Net):
    def __init__(self, numbers=2):
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64)[:numbers])


def log_variances(m, a, b):
    return {"a": torch.exp(-m.s[0]) * a + m.s[0], "b": torch.exp(-m.s[1]) * b + m.s[1]}


def softmax(m, a, b):
    weights = torch.softmax(m.s, 0)
    return {"a": weights[0] * a, "b": weights[1] * b}


def times_a_vector(m, a, b):
    return dict(zip(TASKS, torch.softmax(m.s, 0) * torch.stack([a, b]), strict=True))


def variances(m, a, b):
    return {
        t: x / (2 * m.s[i] ** 2) + torch.log(1 + m.s[i] ** 2)
        for i, (t, x) in enumerate(zip(TASKS, (a, b), strict=True))
    }


@pytest.mark.parametrize("way", [log_variances, softmax, times_a_vector, variances])
def test_learned_weights_of_losses_are_named_and_no_layer(way):
    model = Weighing()
    sink, expected, told = rows_of(model, lambda step: way(model, *model.two(batch(step))))
    check(sink, expected)
    assert "s" not in sink.header.layers
    assert len([text for text in told if text.count("'s' only weigh losses")]) == 1


def test_a_weight_for_each_sample_is_one_too():
    model = Weighing()

    def losses(step):
        z = model.trunk(batch(step)).tanh()
        a, b = model.a(z).square().mean(1), model.b(z).logsumexp(1)
        return {
            "a": (torch.exp(-model.s[0]) * a + model.s[0]).mean(),
            "b": (torch.exp(-model.s[1]) * b + model.s[1]).mean(),
        }

    sink, expected, _ = rows_of(model, losses)
    check(sink, expected)
    assert "s" not in sink.header.layers


@pytest.mark.parametrize("samples", [1, 16])
def test_what_scales_a_feature_is_a_layer(samples):
    model = Weighing(1)

    def losses(step):
        z = model.trunk(batch(step)[:samples]).tanh() * model.s
        return {"a": model.a(z).square().mean(), "b": model.b(z).logsumexp(1).mean()}

    sink, _, told = rows_of(model, losses)
    assert "s" in sink.header.layers
    assert not told


@pytest.mark.parametrize("shared", [None, ["trunk"]])
def test_weights_of_losses_within_a_compiled_region_are_said(shared):
    model = Weighing()
    both = torch.compile(lambda x: tuple(softmax(model, *model.two(x)).values()), backend="aot_eager")
    _, _, told = rows_of(model, lambda step: dict(zip(TASKS, both(batch(step)), strict=True)), shared=shared)
    assert len([text for text in told if "'s' may only weigh losses" in text]) == (1 if shared is None else 0)


def test_a_small_layer_within_a_compiled_region_is_passed_over():
    model = Weighing(1)
    model.s = nn.Parameter(torch.full((1,), 0.25, dtype=torch.float64))

    def two(x):
        z = nn.functional.prelu(model.trunk(x), model.s)
        return model.a(z).square().mean(), model.b(z).logsumexp(1).mean()

    both = torch.compile(two, backend="aot_eager")
    _, _, told = rows_of(model, lambda step: dict(zip(TASKS, both(batch(step)), strict=True)))
    assert not any("weigh" in text for text in told)


def test_what_was_asked_for_by_name_is_measured_all_the_same():
    model = Weighing()
    sink, _, _ = rows_of(model, lambda step: softmax(model, *model.two(batch(step))), shared=["s", "trunk"])
    assert set(sink.header.layers) == {"s", "trunk"}


# ---- layers that join


@pytest.mark.parametrize("use", USES)
def test_a_layer_that_is_unfrozen_is_measured_from_there_on(use):
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(6, 6).double().requires_grad_(False)

        def losses(self, step):
            return dict(zip(TASKS, self.two(self.stem(batch(step)).tanh()), strict=True))

    model = Deep()
    sink, expected, told = rows_of(
        model, model.losses, use, steps=12, after=lambda step: step == 6 and model.stem.requires_grad_(True)
    )
    assert not told
    assert sink.header.layers == ("trunk", "stem")
    assert [len(row.gram) for row in sink.rows] == [1] * 7 + [2] * 5
    assert sink.header.reach.all()
    twin, stems = Deep(), []
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for step in range(12):
        losses = twin.losses(step)
        stems.append(right(twin, list(losses.values()), [twin.trunk, twin.stem]) if step > 6 else expected[step])
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 6:
            twin.stem.requires_grad_(True)
    check(sink, stems)


class Dropping(Net):
    """LayerDrop: each of three blocks is left out with probability a half."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).double()
        self.taken = []

    def losses(self, step):
        stream = torch.Generator().manual_seed(100 + step)
        z = self.trunk(batch(step)).tanh()
        taken = [block for block in self.blocks if torch.rand((), generator=stream) < 0.5]
        for block in taken:
            z = z + block(z).tanh()
        self.taken.append(taken)
        return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean()}


class Experts(Net):
    """The best of eight experts for the batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(8)).double()
        self.taken = []

    def losses(self, step):
        z = self.trunk(batch(step)).tanh()
        expert = self.experts[step * 5 % 8]
        self.taken.append([expert])
        z = z + expert(z).tanh()
        return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Dropping, Experts])
def test_each_row_is_over_what_both_tasks_reach_at_that_row(kind, use):
    model, expected = kind(), []
    original = model.losses

    def losses(step):
        found = original(step)
        expected.append(right(model, list(found.values()), [model.trunk, *model.taken[-1]]))
        return found

    sink, _, told = rows_of(model, losses, use, steps=24)
    assert not told
    check(sink, expected)
    lacking = [np.isnan(measures.norm(row.gram)).any() for row in sink.rows[1:]]
    assert any(lacking)


@pytest.mark.parametrize("how", ["NaN", "absent"])
def test_a_first_step_without_one_of_the_tasks_hides_no_layer(how):
    model, sink, expected = Net(), Collector(), []
    with GradientProbe(model, TASKS, [sink], every=1) as probe:
        for step in range(4):
            a, b = model.two(batch(step))
            expected.append(right(model, (a, b), [model.trunk]))
            probe.record(
                {"a": a, "b": b * float("nan")}
                if step == 0 and how == "NaN"
                else {"a": a}
                if step == 0
                else {"a": a, "b": b}
            )
    assert sink.rows[0].status == (NONFINITE_LOSS if how == "NaN" else absent(["b"]))
    del sink.rows[0]
    check(sink, expected[1:])


def test_a_sink_that_cannot_grow_gets_the_layers_that_it_began_with():
    class Fixed:
        def __init__(self):
            self.rows = []

        def start(self, header):
            self.layers = header.layers

        def write(self, row):
            self.rows.append(row)

        def write_epoch(self, epoch, values): ...
        def annotate(self, values): ...
        def flush(self):
            return True

        def close(self, end): ...

    model, fixed = Experts(), Fixed()
    with GradientProbe(model, TASKS, [fixed], every=1) as probe:
        for step in range(5):
            probe.record(model.losses(step))
    assert len(fixed.layers) == 2
    assert {row.gram.shape for row in fixed.rows} == {(2, 2, 2)}


def test_a_probe_goes_on_with_layers_that_joined():
    whole, first, second = Collector(), Collector(), Collector()
    model = Experts()
    with GradientProbe(model, TASKS, [whole], every=1) as probe:
        for step in range(8):
            probe.record(model.losses(step))
    model = Experts()
    with GradientProbe(model, TASKS, [first], every=1) as probe:
        for step in range(4):
            probe.record(model.losses(step))
        state = probe.state_dict()
    with GradientProbe(model, TASKS, [second], every=1) as probe:
        probe.load_state_dict(state)
        for step in range(4, 8):
            probe.record(model.losses(step))
    assert second.header.layers == whole.header.layers
    assert np.array_equal(second.header.reach, whole.header.reach)
    for one, other in zip([*first.rows, *second.rows], whole.rows, strict=True):
        assert np.array_equal(np.concatenate(one.shared(None)), np.concatenate(other.shared(None)))


# ---- absent tasks


def gone(task, how):
    def make(losses):
        if how == "left out":
            return {t: loss for t, loss in losses.items() if t != task}
        return {**losses, task: None if how == "None" else 0.0 if how == "a number" else losses[task].detach()}

    return make


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["left out", "None", "a number", "detached"])
def test_a_task_may_be_absent_from_a_step(use, how):
    def train(probed):
        model = Net()
        optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), Collector()
        probe = GradientProbe(model, TASKS, [sink], every=1) if probed else None
        for step in range(6):
            losses = dict(zip(TASKS, model.two(batch(step)), strict=True))
            there = gone("b", how)(losses) if step % 2 else losses
            if probe is not None and use == "backward":
                probe.backward(there, {"a": 1.0, "b": 0.5})
            else:
                if probe is not None:
                    probe.record(there, {"a": 1.0, "b": 0.5})
                terms = [{"a": 1.0, "b": 0.5}[t] * x for t, x in there.items() if isinstance(x, torch.Tensor)]
                sum(terms).backward()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.close()
        return model, sink

    (bare, _), (model, sink) = train(False), train(True)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))
    assert [row.status for row in sink.rows] == [MEASURED, "absent at this step: b"] * 3
    for row in sink.rows[1::2]:
        norms, cosine = row.shared(sink.header.reach)
        assert np.isfinite(row.loss[0])
        assert np.isfinite(norms[0])
        assert np.isnan([row.loss[1], norms[1], cosine[0]]).all()
    for row in sink.rows[::2]:
        assert np.isfinite(np.concatenate(row.shared(sink.header.reach))).all()


def test_steps_that_are_not_due_may_lack_a_task_too():
    model = Net()
    with GradientProbe(model, TASKS, every=100) as probe:
        probe.backward(dict(zip(TASKS, model.two(batch(0)), strict=True)))
        probe.backward({"a": model.two(batch(1))[0]})
        probe.record({"b": model.two(batch(1))[1], "a": None})


def test_a_wrong_name_raises_all_the_same():
    model = Net()
    with GradientProbe(model, TASKS, every=1) as probe, pytest.raises(Exception, match=r"unknown \['cls'\]"):
        probe.record({"a": model.two(batch(0))[0], "cls": None})


def test_a_task_that_never_takes_part_is_asked_after():
    model = Net()
    probe = GradientProbe(model, TASKS, every=1)
    for step in range(3):
        probe.record({"a": model.two(batch(step))[0], "b": model.two(batch(step))[1].detach()})
    with pytest.warns(RuntimeWarning, match="task 'b' has been absent from every measured step"):
        probe.close()


@pytest.mark.parametrize("use", USES)
def test_one_task_of_three_may_be_absent_and_the_others_are_measured(use):
    class Three(Net):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(8, 1).double()

        def three(self, x):
            z = self.trunk(x).tanh()
            return {"a": self.a(z).square().mean(), "b": self.b(z).logsumexp(1).mean(), "c": self.c(z).cosh().mean()}

    model, sink = Three(), Collector()
    with GradientProbe(model, ("a", "b", "c"), [sink], every=1) as probe:
        for step in range(6):
            losses = model.three(batch(step))
            losses.pop("abc"[step % 3])
            kept = list(losses.values())
            norms, cosine = right(model, kept, [model.trunk])
            getattr(probe, use)(losses)
            if step:
                found = sink.rows[-1].shared(sink.header.reach)
                assert np.sort(found[0])[:2] == pytest.approx(np.sort(norms), rel=1e-9)
                assert np.isnan(found[0][step % 3])
                assert found[1][~np.isnan(found[1])] == pytest.approx([cosine], abs=1e-9)


@pytest.mark.parametrize("use", USES)
def test_alternating_tasks_are_measured_at_the_same_parameters(use):
    """A task that a step does not train is given as a function, and is measured at due steps."""

    def train(probed):
        torch.manual_seed(3)
        model, sink, asked = Net(), Collector(), []
        model.trunk = nn.Sequential(model.trunk, nn.BatchNorm1d(8).double(), nn.Dropout(0.2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        latest = {"a": batch(90), "b": batch(91)}

        def loss(task):
            asked.append(task)
            return model.two(latest[task])[TASKS.index(task)]

        probe = GradientProbe(model, TASKS, [sink], every=4) if probed else None
        for step in range(12):
            now, other = TASKS[step % 2], TASKS[1 - step % 2]
            latest[now] = batch(step)
            own = model.two(latest[now])[TASKS.index(now)]
            if probe is None:
                own.backward()
            elif use == "backward":
                probe.backward({now: own, other: lambda other=other: loss(other)})
            else:
                probe.record({now: own, other: lambda other=other: loss(other)})
                own.backward()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.close()
        return model, sink, asked

    (bare, _, _), (model, sink, asked) = train(False), train(True)
    state, other = bare.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert [(row.step, row.status) for row in sink.rows] == [(0, MEASURED), (4, MEASURED), (8, MEASURED)]
    assert len(asked) == 3
    assert all(np.isfinite(np.concatenate([row.loss, *row.shared(sink.header.reach)])).all() for row in sink.rows)


def test_a_micro_batch_may_lack_a_task():
    model, sink = Net(), Collector()
    with GradientProbe(model, TASKS, [sink], every=1) as probe:
        a, b = model.two(batch(0))
        probe.backward(micro=[dict(zip(TASKS, model.two(batch(1)), strict=True)), {"a": a}], batch_size=[16, 16])
        del b
    one, two = model.two(batch(1)), model.two(batch(0))
    norms, cosine = right(model, [(one[0] + two[0]) / 2, one[1] / 2], [model.trunk])
    found = sink.rows[0].shared(sink.header.reach)
    assert found[0] == pytest.approx(norms, rel=1e-9)
    assert found[1] == pytest.approx([cosine], abs=1e-9)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("flag", ["find_unused_parameters", "static_graph"])
def test_ddp_in_one_process_changes_nothing(flag, use, one_process):
    class Both(Net):
        def forward(self, x):
            return self.two(x)

    def train(probed):
        model, sink = nn.parallel.DistributedDataParallel(Both(), **{flag: True}), Collector()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = GradientProbe(model, TASKS, [sink], every=1) if probed else None
        expected = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(4):
                expected.append(right(model.module, model.module(batch(step)), [model.module.trunk]))
                losses = dict(zip(TASKS, model(batch(step)), strict=True))
                if probe is not None and use == "backward":
                    probe.backward(losses)
                else:
                    if probe is not None:
                        probe.record(losses)
                    sum(losses.values()).backward()
                optimizer.step()
                optimizer.zero_grad()
            if probe is not None:
                probe.close()
        return model, sink, expected

    (bare, _, _), (model, sink, expected) = train(False), train(True)
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), model.parameters(), strict=True))
    check(sink, expected)


def test_what_the_optimizer_does_is_taken_apart_over_layers_that_join(tmp_path):
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(6, 6).double()
            self.stem.weight.requires_grad_(False)

        def losses(self, step):
            return dict(zip(TASKS, self.two(self.stem(batch(step)).tanh()), strict=True))

    model = Deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"every": 1, "optimizer": optimizer, "updates": True, "ledger": gradprobe.Ledger()}
    path = tmp_path / "run.h5"
    with gradprobe.attach(model, TASKS, path, **options) as probe:
        for step in range(10):
            if step == 5:  # the layer gets its weight, before the bias that it has already
                model.stem.weight.requires_grad_(True)
            x = model.losses(step), model.losses(100 + step)
            micro = [dict(one) for one in x]
            probe.backward(micro=micro)
            optimizer.step()
            optimizer.zero_grad()
    with gradprobe.open_run(path) as run:
        assert run.layers == ("stem", "trunk")
        assert run.layer_size.tolist() == [42, 56]
        updates = run.updates
        assert updates["status"].tolist() == [0] * 10
        share = updates["shared_share"]
        assert share.sum(axis=1) == pytest.approx(np.ones(10), abs=1e-5)
        earlier = list(run.sources).index("earlier momentum")
        assert (np.abs(share[[1, 2, 3, 4], earlier]) < 1e-5).all()  # its momentum is known by task ...
        assert abs(share[5, earlier]) > 1e-3  # ... and no longer where the places have changed
