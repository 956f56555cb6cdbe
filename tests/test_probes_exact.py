"""Gramians against independent computations: a naive twin, torchjd's Jacobians, and a real detector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_probes import TOLERANCE, WEIGHTS, assert_close, make
from torch import nn
from zoo import ZOO, Collector, naive_gramian

from gradprobe import measures
from gradprobe.probes import GradientProbe, passes
from gradprobe.probes.gramian import products
from gradprobe.rows import MEASURED

NAMES = [f"t{i}" for i in range(8)]


def jacobian_gramian(layers, losses):
    """Another library's Jacobian of the losses, multiplied here."""
    from torchjd.autojac import jac

    parameters = [p for layer in layers for p in layer.parameters]
    rows = jac(list(losses.values()), parameters, retain_graph=True, parallel_chunk_size=1)
    gram, start = [], 0
    for layer in layers:
        stop = start + len(layer.parameters)
        matrix = torch.cat([j.flatten(1).double() for j in rows[start:stop]], 1)
        gram.append((matrix @ matrix.T).numpy())
        start = stop
    return np.array(gram)


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("tasks", range(2, 9))
@pytest.mark.parametrize("name", ["mlp", "convolutional", "used_twice"])
def test_the_gramian_is_that_of_torchjds_jacobian(name, tasks, memory):
    case, sink = make(name, tasks=tasks), Collector()
    weights = {t: 0.5 + i for i, t in enumerate(NAMES[:tasks])}
    with GradientProbe(case.model, NAMES[:tasks], [sink], every=1, memory=memory) as probe:
        for step in range(3):
            losses = case.losses(step)
            expected = None if probe.shared is None else jacobian_gramian(probe.shared.layers, losses)
            probe.backward(losses, weights)
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-10)
    assert [row.status for row in sink.rows] == [MEASURED] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in ZOO if n != "checkpointed"])
def test_block_by_block_gives_the_same(name, dtype):
    case, sink = make(name, dtype), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, memory="low") as probe:
        for step in range(2):
            losses = case.losses(step)
            probe.record(losses)
            assert_close(sink.rows[-1].gram, naive_gramian(probe.shared.layers, losses), TOLERANCE[dtype])


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_recomputed_activations_give_the_same(memory):
    """A model of its own for the twin, whose passes would move the statistics of the one that is measured."""
    case, twin, sink = make("checkpointed"), make("checkpointed"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1, memory=memory) as probe:
        for step in range(3):
            torch.manual_seed(step)
            probe.backward(case.losses(step), {"t0": 1.0, "t1": 0.3})
            torch.manual_seed(step)
            losses = twin.losses(step)
            named = dict(twin.model.named_parameters())
            layers = [
                type(la)(
                    la.name,
                    tuple(named[n] for n, p in case.model.named_parameters() if any(p is q for q in la.parameters)),
                )
                for la in probe.shared.layers
            ]
            assert_close(sink.rows[-1].gram, naive_gramian(layers, losses), 1e-10)


@pytest.fixture(scope="module")
def detector():
    from gradprobe.trainers.hyp import DetectionHyp
    from gradprobe.trainers.models.yolov5 import build_model

    return build_model(box_classes=3, image_classes=4, imgsz=64, hyp=DetectionHyp()).train()


def detection_losses(model, seed=5):
    from test_model_yolov5 import Batch

    stream = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[0, 1, 0.51, 0.48, 0.3, 0.2], [0, 0, 0.2, 0.3, 0.2, 0.3], [1, 2, 0.42, 0.43, 0.25, 0.6]])
    batch = Batch(torch.rand(2, 3, 64, 64, generator=stream), boxes, torch.tensor([0, 3]))
    return model.losses(model(batch.images), batch)


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_detector_whose_task_takes_features_at_three_depths(detector, memory):
    """YOLOv5n in float32: detection takes P3, P4 and P5, classification P5 alone."""
    sink = Collector()
    with GradientProbe(detector, ("det", "cls"), [sink], every=1, memory=memory) as probe:
        for step in range(3):
            losses = detection_losses(detector, step)
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {"det": 1.0, "cls": 0.3})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-5)
    assert {"model.4.cv3.conv", "model.6.cv3.conv", "model.9.cv2.conv"} <= set(sink.header.layers)
    assert not any(layer.startswith(("model.10", "model.24", "classifier")) for layer in sink.header.layers)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 6, sparse=True), nn.Linear(6, 6)

    def losses(self, words):
        z = self.mix(self.table(words)).tanh()
        return {"t0": z.mean(), "t1": z.pow(2).sum(1).mean()}


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_sparse_gradients_count_with_their_zeros(memory):
    torch.manual_seed(0)
    model, sink = Embedded().double(), Collector()
    with GradientProbe(model, ("t0", "t1"), [sink], every=1, memory=memory) as probe:
        for step in range(3):
            words = torch.randint(0, 20, (5,), generator=torch.Generator().manual_seed(step))
            probe.backward(model.losses(words))
            model.table.sparse = False  # the twin's gradients are dense
            assert_close(sink.rows[-1].gram, naive_gramian(probe.shared.layers, model.losses(words)), 1e-10)
            model.table.sparse = True
    assert sink.header.layers == ("table", "mix")


def test_complex_parameters_are_twice_as_many_real_ones():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.complex128)
    real = nn.Parameter(torch.view_as_real(weight).clone())
    module, sink = nn.Module(), Collector()
    module.weight = nn.Parameter(weight.clone())
    x = torch.randn(3, dtype=torch.complex128)

    def losses(w):
        z = w @ x
        return {"t0": z.abs().sum(), "t1": (z * z).real.sum()}

    with GradientProbe(module, ("t0", "t1"), [sink], every=1) as probe:
        for _ in range(3):
            probe.backward(losses(module.weight))
    expected = [
        torch.autograd.grad(v, real, retain_graph=True)[0] for v in losses(torch.view_as_complex(real)).values()
    ]
    gram = [[float((a * b).sum()) for b in expected] for a in expected]
    for row in sink.rows:
        np.testing.assert_allclose(row.gram[0], gram, rtol=1e-10)


class Clipped(torch.autograd.Function):
    """Its backward is not linear: the sum's gradient is not the sum of the gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


def clipping_losses(layer, x):
    z = Clipped.apply(layer(x))
    return {"t0": z.mean(), "t1": z.pow(2).mean()}


def test_where_the_backward_is_not_linear_nothing_is_derived():
    torch.manual_seed(0)
    layer, sink, x = nn.Linear(3, 3).double(), Collector(), torch.randn(4, 3, dtype=torch.float64)
    with GradientProbe(layer, ("t0", "t1"), [sink], every=1) as probe:
        with pytest.warns(RuntimeWarning, match=r"do not add up.*most in .*Clipped"):
            probe.backward(clipping_losses(layer, x))
        for _ in range(3):
            probe.backward(clipping_losses(layer, x))
        expected = naive_gramian(probe.shared.layers, clipping_losses(layer, x))
    for row in sink.rows:
        assert_close(row.gram, expected, 1e-10)
        assert row.status == "the tasks' gradients do not add up to the joint one"


def test_rows_are_right_where_rounding_within_a_layer_is_large():
    """Ten convolutions without a norm between: one float32 pass is off by more than the sizes let expect."""
    for seed in range(4):
        torch.manual_seed(seed)
        layers = [layer for i in range(10) for layer in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.SiLU())]
        model, sink = (
            nn.ModuleDict({"trunk": nn.Sequential(*layers), "a": nn.Linear(8, 2), "b": nn.Linear(8, 3)}),
            Collector(),
        )
        with GradientProbe(model, ("t0", "t1"), [sink], every=1) as probe:
            for _ in range(6):
                z = model["trunk"](torch.randn(16, 3, 32, 32)).mean((2, 3))
                losses = {"t0": model["a"](z).square().mean(), "t1": model["b"](z).logsumexp(1).mean()}
                expected = naive_gramian(probe.shared.layers, losses) if probe.shared is not None else None
                probe.backward(losses)
                if expected is not None:
                    assert_close(sink.rows[-1].gram, expected, 1e-5)


def clamp(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def autocast_losses(case, step):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return case.losses(step)


@pytest.mark.filterwarnings("ignore:gradprobe. step 0. (backward hooks of your own|the tasks' gradients do not add up)")
@pytest.mark.parametrize("obstacle", ["autocast", "parameter hook", "module hook", "products in bfloat16"])
def test_what_is_rounded_or_changed_on_the_way_is_never_derived(obstacle, monkeypatch):
    case, sink = make("mlp", torch.float32), Collector()
    losses = case.losses
    if obstacle == "autocast":
        losses = lambda step: autocast_losses(case, step)  # noqa: E731
    elif obstacle == "parameter hook":
        case.model.trunk[0].weight.register_hook(clamp)
    elif obstacle == "module hook":
        case.model.trunk[2].register_full_backward_hook(lambda module, down, up: tuple(map(clamp, down)))
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(passes.DerivedMeasurement, "__init__", lambda *_: pytest.fail("derived all the same"))
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        for step in range(3):
            probe.backward(losses(step), {"t0": 1.0, "t1": 0.3})
            assert_close(sink.rows[-1].gram, naive_gramian(probe.shared.layers, losses(step)), 1e-5)


def test_a_parameter_frozen_in_mid_run_is_left_out_from_there_on():
    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, ("t0", "t1"), [sink], every=1) as probe:
        for step in range(4):
            if step == 2:
                for p in case.model.trunk[0].parameters():
                    p.requires_grad_(False)
            probe.backward(case.losses(step))
    assert all(row.status != "measuring failed" for row in sink.rows)
    assert np.isfinite(sink.rows[1].gram).all()
    assert np.isnan(sink.rows[3].gram[0]).all()
    assert [row.status for row in sink.rows] == [MEASURED] * 4
    over_the_rest = measures.over_layers(sink.rows[3].gram[1:], sink.header.reach[1:])
    assert np.allclose(sink.rows[3].shared(sink.header.reach)[1], over_the_rest[1], rtol=1e-12)
    assert np.isfinite(sink.rows[3].gram[1]).all()


@pytest.mark.parametrize("count", [2, 4, 5, 12])
@pytest.mark.parametrize("size", [1, 1000, (1 << 15) - 1])
def test_products_of_few_and_of_many_are_exact(count, size):
    assert error_of_products(gradients(count, size) + 1) <= 1e-14


def gradients(count, size):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size + count))


def error_of_products(rows):
    """The largest, relative to the norms."""
    wide = rows.double()
    exact = torch.tensor([[math.fsum((a * b).tolist()) for b in wide] for a in wide], dtype=torch.float64)
    scale = wide.norm(dim=1)
    return float(((products(list(rows)) - exact).abs() / (scale[:, None] * scale)).max())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("size", [1 << 15, (1 << 17) + 77])
def test_products_of_long_gradients_are_right_to_rounding(count, shift, size):
    assert error_of_products(gradients(count, size) + shift) <= 3e-8


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e-14, 1e19, 1e30])
def test_long_gradients_that_are_tiny_or_huge_lose_nothing(scale):
    assert error_of_products(gradients(2, 1 << 15) * scale) <= 1e-7


def test_long_gradients_of_very_different_size_lose_nothing():
    rows = gradients(3, 1 << 15)
    rows[1] *= 1e-12
    rows[2, 1000:] = 0
    assert error_of_products(rows) <= 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_spoils_its_own_long_gradient_alone(bad):
    rows = gradients(3, 1 << 15)
    rows[1, 77] = bad
    found = products(list(rows))
    assert not found[1].isfinite().any()
    assert found[[0, 2]][:, [0, 2]].isfinite().all()


def test_a_gradient_that_is_not_finite_spoils_only_its_own_products():
    rows = list(torch.randn(6, 10))
    rows[2] = rows[2] * float("nan")
    found = products(rows)
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]].isfinite().all()


def test_many_tasks_with_weights_far_apart_are_derived_in_turn():
    """Over many steps the task that is derived changes with the weights, and every row stays exact."""
    case, sink, chosen = make("mlp", torch.float32, 4), Collector(), set()
    names = NAMES[:4]
    real = passes.task_to_derive

    def choose(*arguments):
        chosen.add(real(*arguments))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, GradientProbe(case.model, names, [sink], every=1) as probe:
        patch.setattr("gradprobe.probes.task_gradients.task_to_derive", choose)
        for step in range(8):
            losses = case.losses(step)
            expected = None if probe.shared is None else naive_gramian(probe.shared.layers, losses)
            probe.backward(losses, {t: WEIGHTS[t] * (50.0 if i == step // 2 else 1.0) for i, t in enumerate(names)})
            if expected is not None:
                assert_close(sink.rows[-1].gram, expected, 1e-5)
    assert len(chosen - {None}) >= 2


def test_passes_are_as_few_as_tasks(monkeypatch):
    made = []
    real = passes.pass_to
    monkeypatch.setattr(passes, "pass_to", lambda *a: made.append(1) or real(*a))
    case = make("mlp", tasks=5)
    with GradientProbe(case.model, NAMES[:5], every=1) as probe:
        counts = []
        for step in range(4):
            probe.record(case.losses(step))
            counts.append(len(made))
    assert counts == [6, 12, 17, 23]  # at the 1st, 2nd, 4th, ... the joint one, too
