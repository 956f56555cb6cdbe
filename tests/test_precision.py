"""Mixed precision: norms unscaled, products wide, overflowed steps marked, and the same in ``gradprobe record``."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import training
from test_probes import make
from zoo import Collector, naive_gramian

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.errors import UsageError
from gradprobe.probes import GradientProbe
from gradprobe.probes.shared_layers import by_module, find_shared
from gradprobe.rows import MEASURED, OVERFLOWED
from gradprobe.trainers import loop
from gradprobe.trainers.engine import make_engine
from gradprobe.trainers.gradnorm import GradNorm
from gradprobe.trainers.settings import resolve

MIXED = ["bf16-mixed", "16-mixed"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init_scale", [None, 2.0**10])
def test_what_autocast_computes_is_measured_unscaled_in_float64(kind, init_scale):
    """Against the products, in float64, of the very gradients that autocast makes."""
    case, sink = make("mlp", torch.float32), Collector()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if init_scale else None
    with torch.autocast("cpu", dtype=kind):
        losses = {task: loss.float() for task, loss in case.losses(0).items()}
    with GradientProbe(case.model, losses, [sink], every=1, scaler=scaler) as probe:
        probe.record(losses)
        layers = probe.shared.layers
    factor = init_scale or 1.0
    for layer, found in zip(layers, sink.rows[0].gram, strict=True):
        flat = [
            torch.cat(
                [
                    g.double().reshape(-1)
                    for g in torch.autograd.grad(loss * factor, layer.parameters, retain_graph=True)
                ]
            )
            / factor
            for loss in losses.values()
        ]
        expected = [[float(a @ b) for b in flat] for a in flat]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_products_of_half_gradients_do_not_round(kind):
    """65,536 ones: a sum in the half type would stop at 256 or 2048."""
    layer, sink = torch.nn.Linear(256, 256, bias=False, dtype=kind), Collector()
    with GradientProbe(layer, ("t0", "t1"), [sink], every=1) as probe:
        z = layer(torch.ones(1, 256, dtype=kind)).float().sum()
        probe.backward({"t0": z * 1.0, "t1": z * -1.0})
    np.testing.assert_array_equal(sink.rows[0].gram, [[[65536, -65536], [-65536, 65536]]])


@pytest.mark.parametrize(("precision", "half"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_a_bundled_training_computes_its_forward_in_the_half_type_and_its_losses_in_float32(precision, half):
    made = training.make("gradnorm", precision=precision)
    if made.engine.scaler is not None:  # begins so high that it overflows
        made.engine.scaler = made.probe._recorder.scale._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    batch = next(iter(training.batches(made, 1)))
    twin = copy.deepcopy(made.model).train()
    with torch.autocast("cpu", dtype=half):
        outputs = twin(batch.images)
    losses = twin.losses(
        outputs._replace(maps=tuple(m.float() for m in outputs.maps), logits=outputs.logits.float()), batch
    )
    expected = naive_gramian(find_shared(by_module(twin), losses).layers, losses)
    made.model.train()
    loop.train_step(made, batch)
    made.probe.close()
    (row,) = made.rows
    assert row.status == MEASURED
    np.testing.assert_allclose(row.loss, [float(v.detach()) for v in losses.values()], rtol=1e-6)
    bound = np.sqrt(np.einsum("lii,ljj->lij", expected, expected))
    # Scaled by a power of two the half types round alike, but where float16 is subnormal.
    assert np.max(np.abs(row.gram - expected) / bound) < (1e-5 if half is torch.bfloat16 else 1e-2)
    assert all(p.dtype == torch.float32 for p in made.model.parameters())


def test_a_training_whose_gradients_overflow_leaves_steps_out_and_says_so():
    made = training.make("gradnorm", precision="16-mixed")
    made.engine.scaler = made.probe._recorder.scale._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    made.model.train()
    before = [p.clone() for p in made.model.parameters()]
    weights = made.balancer.weights()
    for batch in training.batches(made, 2):
        loop.train_step(made, batch)
    assert made.probe.step == 0
    assert made.schedule.last_epoch == 0
    assert all(map(torch.equal, before, made.model.parameters()))
    assert made.balancer.weights() == weights  # norms that are not finite teach nothing
    made.probe.close()
    (row,) = made.rows
    assert row.status == OVERFLOWED
    assert np.isfinite(row.loss).all()


def test_the_scale_is_resumed():
    made, other = (training.make("gradnorm", precision="16-mixed") for _ in range(2))
    made.engine.scaler.load_state_dict({**made.engine.scaler.state_dict(), "scale": 8.0})
    state = loop.training_state(made)
    loop.load_training_state(other, state)
    assert other.engine.loss_scale == 8.0
    for one in (made, other):
        one.probe.close()


def test_gradnorm_takes_norms_of_scaled_losses_where_small_ones_would_vanish():
    """2^-30 is zero in float16."""
    layer = torch.nn.Linear(4, 4).half()
    found = {}
    for scale in (1.0, 2.0**16):
        balancer = GradNorm({"a": 1.0, "b": 1.0}, list(layer.parameters()))
        balancer.loss_scale = scale
        z = layer(torch.full((1, 4), 2.0**-6).half()).float()
        found[scale] = float(balancer._norm("a", z.sum() * 2.0**-30))
    assert found[1.0] == 0
    assert found[2.0**16] == pytest.approx(2.0**-30 * np.sqrt(4 + 16 * 2.0**-12), rel=1e-3)


def test_surgery_gives_private_parameters_gradients_that_the_scaler_can_unscale():
    pytest.importorskip("torchjd")
    plain = training.run(training.make("pcgrad", optimizer="SGD", lr=0.1), 2)
    scaled = training.make("pcgrad", optimizer="SGD", lr=0.1)
    scaled.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled.probe._recorder.scale._scaler = scaled.engine.scaler
    training.run(scaled, 2)
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", *MIXED])
def test_the_command_takes_a_precision_and_the_file_says_it(precision, tmp_path):
    out = tmp_path / "run.h5"
    words = ["--data", "dial", "--trainer", "joint", "--epochs", "1", "--every", "4", "--precision", precision]
    assert command(["record", *words, "--out", str(out)]) == 0
    with open_run(out) as run:
        assert run.provenance["settings.precision"] == precision
        assert set(run["status"]) == {0}
        assert np.isfinite(run["grad_norm"]).any()


def test_another_precision_is_refused():
    with pytest.raises(UsageError, match="--precision fp16: must be one of 32-true, bf16-mixed, 16-mixed"):
        resolve({"precision": "fp16"})
    assert make_engine(torch.nn.Linear(1, 1), "32-true", torch.device("cpu")).loss_scale == 1.0
