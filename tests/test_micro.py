"""Measuring in micro-batches: exact against a brute force over their gradients, harmless, clear when called wrongly."""

from __future__ import annotations

import contextlib
import math
import weakref

import numpy as np
import pytest
import torch
from test_probes import TOLERANCE, WEIGHTS, make
from test_probes_harmless import assert_same
from zoo import ZOO, Collector

from gradprobe.errors import ProbeError
from gradprobe.probes import GradientProbe
from gradprobe.probes.calls import mean_losses, shares_of
from gradprobe.rows import MEASURED, NONFINITE_GRADIENT, NONFINITE_LOSS

TASKS = ("t0", "t1")
SIZES = {"equal": [4, 4, 4], "unequal": [5, 3, 4, 1]}


def forwards(case, step, count):
    """The losses of each micro-batch, a forward and data of its own each."""
    return [case.losses(100 * step + a) for a in range(count)]


def vectors(model, names, losses):
    """(T, numbers) gradients on the parameters of these names; None, where a task has no path to any, as NaN."""
    parameters = [p for n, p in model.named_parameters() if n in names]
    found = []
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            found.append(np.full(sum(p.numel() for p in parameters), np.nan))
            continue
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        found.append(torch.cat([g.detach().double().flatten() for g in flat]).numpy())
    return np.array(found)


def brute_force(case, header, owners, micro, shares):
    """F, and U from products of different micro-batches alone, which are free of noise: no formula of the probe's."""
    gram, clean = [], []
    for layer in header.layers:
        g = np.array([vectors(case.model, owners[layer], losses) for losses in micro])
        mean = np.einsum("a,aid->id", shares, g)
        gram.append(mean @ mean.T)
        count = len(micro)
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        weight = sum(shares[a] * shares[b] for a, b in pairs)
        clean.append(sum(shares[a] * shares[b] * g[a] @ g[b].T for a, b in pairs) / weight)
    return np.array(gram), np.array(clean)


def owners(probe, model):
    """Layer -> names of its parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {layer.name: {names[id(p)] for p in layer.parameters} for layer in probe.shared.layers}


def close(found, expected, scale, tolerance):
    assert (np.isnan(found) == np.isnan(expected)).all()
    known = ~np.isnan(expected)
    assert (np.abs(found - expected)[known] <= tolerance * scale[known]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("name", list(ZOO))
def test_gramian_and_noise_are_those_of_a_brute_force(name, sizes, dtype):
    case, twin, sink = make(name, dtype), make(name, dtype), Collector()
    shares = np.array(sizes) / sum(sizes)
    with GradientProbe(case.model, TASKS, [sink], every=1) as probe:
        for step in range(2):
            torch.manual_seed(step)
            probe.record(micro=forwards(case, step, len(sizes)), batch_size=sizes)
            torch.manual_seed(step)
            expected = forwards(twin, step, len(sizes))
            gram, clean = brute_force(twin, probe.header, owners(probe, case.model), expected, shares)
            row = sink.rows[-1]
            # The noise decides how large products of single micro-batches are, which the formula subtracts.
            length = np.sqrt(np.einsum("lii->li", gram) + np.einsum("lii->li", gram - clean))
            scale = length[:, :, None] * length[:, None, :]
            close(row.gram, gram, scale, TOLERANCE[dtype])
            close(row.gram_noise, gram - clean, scale, TOLERANCE[dtype])
            assert (row.status, row.micro_batches, row.batch_size) == (MEASURED, len(sizes), sum(sizes))
            means = [math.fsum(s * float(m[t].detach()) for s, m in zip(shares, expected, strict=True)) for t in TASKS]
            np.testing.assert_allclose(row.loss, means, rtol=1e-6)


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("how", ["backward", "record"])
def test_the_gramian_is_that_of_the_mean_loss_measured_as_a_whole(how, tasks):
    """Micro-batches only add the noise: what they say of the batch is what one pass over the mean loss says."""
    names = [f"t{i}" for i in range(tasks)]
    rows = []
    for micro in (True, False):
        case, sink = make("convolutional", tasks=tasks), Collector()
        with GradientProbe(case.model, names, [sink], every=1) as probe:
            parts = forwards(case, 0, 3)
            mean = mean_losses(parts, shares_of([2, 2, 1]))
            options = {"micro": parts, "batch_size": [2, 2, 1]} if micro else {"batch_size": 5}
            getattr(probe, how)(mean, dict.fromkeys(names, 0.5), **options)
        rows += sink.rows
    np.testing.assert_allclose(rows[0].gram, rows[1].gram, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows[0].loss, rows[1].loss, rtol=1e-12)
    assert rows[1].gram_noise is None
    assert (rows[0].batch_size, rows[1].batch_size) == (5, 5)


def train(name, use, *, sizes=(4, 4, 4), recipe="plain", steps=4, every=2):
    """Everything that a training in micro-batches leaves behind; ``use`` is the only difference."""
    case = make(name, torch.float32)
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-2)
    half = "float16" in recipe
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if half else None
    autocast = torch.autocast("cpu", dtype=torch.float16) if half else contextlib.nullcontext()
    sink, grads, weights = Collector(), [], {t: WEIGHTS[t] for t in TASKS}
    probe = None
    if use is not None:
        probe = GradientProbe(case.model, TASKS, [sink], optimizer=optimizer, scaler=scaler, every=every)
    for step in range(steps):
        with autocast:
            micro = forwards(case, step, len(sizes))
        losses = mean_losses(micro, shares_of(sizes))
        if use == "backward":
            probe.backward(losses, weights, micro=micro, batch_size=sizes)
        else:
            if use == "record":
                probe.record(micro=micro, weights=weights, batch_size=sizes)
            total = sum(weights[t] * losses[t] for t in losses)
            (total if scaler is None else scaler.scale(total)).backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in case.model.parameters()])
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    if probe is not None:
        probe.close()
        assert [row.status for row in sink.rows] == [MEASURED] * (steps // every)
    return {
        "model": case.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "grads": grads,
    }


@pytest.mark.parametrize("use", ["backward", "record"])
@pytest.mark.parametrize("recipe", ["plain", "float16"])
@pytest.mark.parametrize("name", ["convolutional", "dropout", "checkpointed", "nested"])
def test_a_training_ends_as_the_same_loop_without_a_probe(name, recipe, use):
    assert_same(train(name, use, recipe=recipe), train(name, None, recipe=recipe))


def test_a_loss_scale_does_not_show_in_the_row():
    rows = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        case, sink = make("mlp"), Collector()
        with GradientProbe(case.model, TASKS, [sink], every=1, scaler=scaler) as probe:
            probe.record(micro=forwards(case, 0, 4))
        rows += sink.rows
    np.testing.assert_allclose(rows[1].gram, rows[0].gram, rtol=1e-9)
    np.testing.assert_allclose(rows[1].gram_noise, rows[0].gram_noise, rtol=1e-9)


def test_losses_may_be_left_out_of_backward():
    grads = []
    for given in (True, False):
        case = make("mlp")
        with GradientProbe(case.model, TASKS, every=1) as probe:
            micro = forwards(case, 0, 3)
            losses = (mean_losses(micro, (1 / 3,) * 3),) if given else ()
            probe.backward(*losses, weights={"t0": 1.0, "t1": 0.2}, micro=micro)
        grads.append([p.grad for p in case.model.parameters()])
    assert_same(grads[0], grads[1])


def test_one_micro_batch_is_measured_as_a_whole_and_its_noise_is_not_known():
    rows = []
    for micro in (True, False):
        case, sink = make("mlp"), Collector()
        with GradientProbe(case.model, TASKS, [sink], every=1) as probe:
            for step in range(3):
                losses = case.losses(step)
                probe.backward(losses, micro=[losses], batch_size=[7]) if micro else probe.backward(losses)
        rows.append(sink.rows)
    for one, whole in zip(*rows, strict=True):
        np.testing.assert_array_equal(one.gram, whole.gram)
        assert np.isnan(one.gram_noise).all()
        assert one.gram_noise.shape == one.gram.shape
        assert (one.micro_batches, one.batch_size, one.status) == (1, 7, MEASURED)


@pytest.mark.parametrize("micro", [True, False])
def test_gradients_are_kept_where_they_are_asked_for(micro):
    case = make("mlp")
    with GradientProbe(case.model, TASKS, every=1) as probe:
        meter = probe._recorder.gradients
        meter.keep(micro=micro)
        parts = forwards(case, 0, 3)
        probe.record(micro=parts, batch_size=[2, 1, 1])
        assert meter.shares == [0.5, 0.25, 0.25]
        parameters = probe.shared.parameters
        for task, name in enumerate(TASKS):
            each = [torch.autograd.grad(p[name], parameters, retain_graph=True) for p in parts]
            mean = [sum(s * g for s, g in zip(meter.shares, gs, strict=True)) for gs in zip(*each, strict=True)]
            torch.testing.assert_close(meter.kept[task], mean)
            if micro:
                for a in range(3):
                    torch.testing.assert_close(meter.kept_micro[a][task], list(each[a]))
        if not micro:
            assert meter.kept_micro is None
        probe.record(case.losses(9))
        assert meter.shares == [1.0]
        assert meter.kept_micro == ([] if micro else None)


def test_no_more_than_the_means_and_one_micro_batch_are_alive(monkeypatch):
    """Gradients of the micro-batch before are gone when the next one's are made."""
    from gradprobe.probes import passes

    alive, most, real = weakref.WeakSet(), [], passes.pass_to

    def watched(*args):
        most.append(len(alive))
        found = real(*args)
        alive.update(g for g in found if g is not None)
        return found

    monkeypatch.setattr(passes, "pass_to", watched)
    case = make("mlp")
    with GradientProbe(case.model, TASKS, every=1) as probe:
        probe.record(micro=forwards(case, 0, 4))
        parameters = len(probe.shared.parameters)
    # The first row is looked at: the weighted sum of the losses has a pass, too.
    assert most[:12] == [0, parameters, 2 * parameters] * 4
    # The self-check: each task, its copy and its negative, on two micro-batches.
    assert most[12:] == [0, parameters, 2 * parameters] * 4


def test_a_micro_batch_that_does_not_reach_a_layer_counts_as_zero_there():
    torch.manual_seed(0)
    trunk = torch.nn.Linear(3, 4).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    sink = Collector()
    with GradientProbe(trunk, TASKS, [sink], every=1) as probe:
        outside = torch.zeros((), dtype=torch.float64, requires_grad=True)
        full = [{"t0": trunk(x[a]).sum(), "t1": trunk(x[a]).square().sum()} for a in range(3)]
        probe.record(micro=[*full, {"t0": trunk(x[3]).sum(), "t1": outside * 1}])
    g = np.array([vectors(trunk, {"weight", "bias"}, losses) for losses in full])
    last = np.array([np.concatenate([np.tile(x[3].numpy(), 4), np.ones(4)]), np.zeros(16)])
    g = np.concatenate([g, [last]])
    away = g - g.mean(0)
    (row,) = sink.rows
    np.testing.assert_allclose(row.gram.sum(0), g.mean(0) @ g.mean(0).T, rtol=1e-10)
    np.testing.assert_allclose(row.gram_noise.sum(0), np.einsum("aid,ajd->ij", away, away) / 12, rtol=1e-10)
    assert row.status == MEASURED


def test_what_a_task_never_reaches_is_missing_in_both():
    case, sink = make("nested"), Collector()
    with GradientProbe(case.model, TASKS, [sink], every=1, shared=["stages", "classifier"]) as probe:
        probe.record(micro=forwards(case, 0, 2))
    (row,) = sink.rows
    unreached = ~(probe.header.reach[:, :, None] & probe.header.reach[:, None, :])
    assert unreached.any()
    assert (np.isnan(row.gram) == unreached).all()
    assert (np.isnan(row.gram_noise) == unreached).all()


def test_a_gradient_that_is_not_finite_leaves_no_noise_and_says_so():
    trunk, sink = torch.nn.Linear(2, 1), Collector()
    x = torch.ones(2, 2)
    with GradientProbe(trunk, TASKS, [sink], every=1) as probe:
        good = {"t0": trunk(x).sum(), "t1": trunk(x).mean()}
        bad = {"t0": trunk(x).sum(), "t1": (trunk(x) - trunk(x)).sqrt().mean()}
        probe.record(micro=[good, bad])
        worse = {"t0": trunk(x).sum(), "t1": trunk(x).sum() * math.nan}
        probe.record(micro=[good, worse])
    assert [row.status for row in sink.rows] == [NONFINITE_GRADIENT, NONFINITE_LOSS]
    assert np.isnan(sink.rows[0].gram_noise[:, 1]).all()
    assert np.isfinite(sink.rows[0].gram_noise[:, 0, 0]).all()


def test_a_failure_is_a_row_without_a_measurement(monkeypatch):
    from gradprobe.probes import passes

    case, sink = make("mlp"), Collector()
    with GradientProbe(case.model, TASKS, [sink], every=1) as probe:
        probe.record(micro=forwards(case, 0, 2))
        monkeypatch.setattr(passes, "pass_to", lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="measuring failed: ZeroDivisionError"):
            probe.backward(micro=forwards(case, 1, 2))
    assert sink.rows[1].status.startswith("measuring failed")
    assert np.isnan(sink.rows[1].gram_noise).all()
    assert all(p.grad is not None for p in case.model.parameters())


def test_a_model_that_shares_nothing_can_be_measured():
    a, b, sink = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), Collector()
    model = torch.nn.ModuleList([a, b])
    x = torch.ones(1, 2)
    with (
        pytest.warns(RuntimeWarning, match="nothing to measure"),
        GradientProbe(model, TASKS, [sink], every=1) as probe,
    ):
        probe.backward(micro=[{"t0": a(x).sum(), "t1": b(x).sum()} for _ in range(2)])
    (row,) = sink.rows
    assert row.gram_noise.shape == (0, 2, 2)
    assert row.status == MEASURED


# ---- wrong calls


def wrong(case):
    good, strange = case.losses(0), {"t9": case.losses(0)["t0"]}
    sums = {t: 2 * loss for t, loss in good.items()}
    return {
        "no losses": ({}, "give losses= .* or micro="),
        "a dict": ({"micro": good}, "must be a list with the losses of each micro-batch"),
        "none": ({"micro": []}, "must be a list"),
        "another task": ({"micro": [good, strange]}, r"micro\[1\]: .*unknown \['t9'\]"),
        "a size too few": ({"micro": [good, good], "batch_size": [4]}, "1 sizes for 2 micro-batches"),
        "an empty one": ({"micro": [good, good], "batch_size": [4, 0]}, "at least 1"),
        "too few samples": ({"micro": [good, good, good], "batch_size": 2}, "less than one for each"),
        "sums": ({"losses": sums, "micro": [good, good]}, r"'t0' is .*mean over the 2 micro-batches.* is "),
        "sizes alone": ({"losses": good, "batch_size": [4, 4]}, "a list goes with micro="),
    }


@pytest.mark.parametrize("what", list(wrong(make("mlp"))))
@pytest.mark.parametrize("how", ["backward", "record"])
def test_a_wrong_call_says_what_to_do(how, what):
    case = make("mlp")
    with GradientProbe(case.model, TASKS, every=1) as probe:
        arguments, message = wrong(case)[what]
        with pytest.raises(ProbeError, match=message):
            getattr(probe, how)(**arguments)


@pytest.mark.parametrize("options", [{"memory": "low"}, {"level": "both"}, {"level": "features"}])
def test_what_does_not_go_with_micro_batches_is_refused(options):
    case = make("mlp")
    micro = [case.losses(0), case.losses(1)]
    with GradientProbe(case.model, TASKS, every=1, **options) as probe, pytest.raises(ProbeError, match=r" out\."):
        probe.record(micro=micro)
