"""Estimates of a run against the gradient of all data, which small models allow to compute. Through the real probe."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from run_factory import make_header, make_run
from torch import nn
from zoo import Heads

import gradprobe
from gradprobe import measures
from gradprobe.errors import RunFileError
from gradprobe.rows import ProbeLoaderRow
from gradprobe.runfile import RunWriter
from gradprobe.runfile.thin import ThinRun
from gradprobe.statistics import pooled

TASKS = ("a", "b")


class Data(torch.utils.data.Dataset):
    """Samples with two targets each, whose noise is shared: a sample that is hard for one task is for the other."""

    def __init__(self, count, truth, spread, shared, seed=0):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(count, truth.shape[1]))
        noise = rng.normal(size=(count, 3))
        targets = x @ truth.T + spread * (np.sqrt(shared) * noise[:, :1] + np.sqrt(1 - shared) * noise[:, 1:])
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(targets)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def squares(predicted, y):
    return {t: (predicted[i] - y[:, i]).square().mean() / 2 for i, t in enumerate(TASKS)}


class Regression(nn.Module):
    """One weight vector, 0, for both targets: the gradient of a task on all data is all but minus its true weights."""

    def __init__(self, size):
        super().__init__()
        self.trunk = nn.Linear(size, 1, bias=False).double()
        nn.init.zeros_(self.trunk.weight)

    def losses(self, batch):
        out = self.trunk(batch[0])[:, 0]
        return squares((out, out), batch[1])


class Network(Heads):
    def __init__(self, size):
        torch.manual_seed(4)
        super().__init__(nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()), 6)
        with torch.no_grad():  # heads alike: what makes a sample's gradient large in one task does so in the other
            self.heads[1].weight[0] = self.heads[0].weight[0] + 0.2 * self.heads[1].weight[0]
        self.double()

    def losses(self, batch):
        first, second = self(batch[0])
        return squares((first[:, 0], second[:, 0]), batch[1])


def record(path, model, data, rows, *, batch_size=4, batches=4, micro=0):
    """``rows`` measurements at parameters that stay: on the probe loader, or in micro-batches of samples drawn here."""
    loader = None
    if not micro:
        loader = gradprobe.ProbeLoader(data, model.losses, batch_size=batch_size, batches=batches, every=1)
    rng, some = np.random.default_rng(1), (data.x[:2], data.y[:2])
    every = 1 if micro else rows + 1
    with gradprobe.attach(model, TASKS, path, every=every, probe_loader=loader, overwrite=True) as probe:
        for _ in range(rows):
            if micro:
                places = rng.integers(len(data), size=(micro, batch_size))
                parts = [model.losses((data.x[one], data.y[one])) for one in places]
                probe.record(micro=parts, batch_size=micro * batch_size)
            else:
                probe.record(model.losses(some))
    return path


class Losses(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return torch.stack(list(self.model.losses(batch).values()))


def exact(model, data, layers, batch):
    """By layer: the Gramian of the gradients on all data, and the covariance of the noise of ``batch`` samples."""
    named = {name: p.detach() for name, p in Losses(model).named_parameters()}

    def of_one(values, x, y):
        return torch.func.functional_call(Losses(model), values, (x[None], y[None]))

    each = torch.func.vmap(torch.func.jacrev(of_one), in_dims=(None, 0, 0))(named, data.x, data.y)
    gram, noise = [], []
    for layer in layers:
        own = [g.flatten(2) for name, g in each.items() if name.rpartition(".")[0] == f"model.{layer}"]
        g = torch.cat(own, 2).numpy()  # (N, T, numbers)
        mean = g.mean(0)
        away = g - mean
        gram.append(mean @ mean.T)
        noise.append(np.einsum("nid,njd->ij", away, away) / len(g) / batch)
    return np.array(gram), np.array(noise)


@pytest.fixture(scope="module")
def network():
    truth = np.array([[1, 1, 0, 0, 0, 0], [-0.5, 1, 0.5, 0, 0, 0]])
    return Network(6), Data(3000, truth, 1.5, 0.95)


def coverage(path, model, data, batch, rows, size):
    """How often the intervals of windows of so many rows hold the cosine of all data; per layer and over both."""
    hits, told = [], 0
    with gradprobe.open_run(path) as whole:
        run = ThinRun(whole, 1)  # which keeps what it has read
        gram, _ = exact(model, data, run.layers, batch)
        groups = [(name, gram[i]) for i, name in enumerate(run.layers)] + [(None, gram.sum(0))]
        for group, true in groups:
            cosine = measures.pair_cosine(true)[0]
            for start in range(0, rows, size):
                found = run.estimate(group, (start, start + size))
                if np.isfinite(found.cosine[0]):
                    told += 1
                    hits.append(found.low[0] < cosine < found.high[0])
    return np.mean(hits), told / (len(groups) * (rows // size))


def sums(run, table="probe_loader"):
    """(n, L, T, T): measured, and less the noise part."""
    path = f"{table}/" if table else ""
    gram = measures.from_norms(run[f"{path}grad_norm"], run[f"{path}cosine"])
    return gram, gram - run[f"{path}gram_noise"]


def lengths(noise):
    """What a product is held against: (L, T, T) products of the lengths of the noise."""
    length = np.sqrt(np.einsum("lii->li", noise))
    return length[:, :, None] * length[:, None, :]


def test_intervals_cover_the_cosine_of_all_data(network, tmp_path):
    """Short form; the long one is below. And no mean is off by more than chance allows."""
    model, data = network
    rows = 500
    path = record(tmp_path / "run.h5", model, data, rows, batch_size=12)
    with gradprobe.open_run(path) as run:
        gram, noise = exact(model, data, run.layers, 48)
        naive, found = sums(run)
        error = found.std(axis=0) / np.sqrt(rows)
        assert (np.abs(found.mean(axis=0) - gram) < 3.5 * error).all()
        assert (np.abs(naive.mean(axis=0) - gram) > 5 * error)[:, [0, 1, 0], [0, 1, 1]].all()  # what is corrected
        assert (np.abs(run["probe_loader/gram_noise"].mean(axis=0) - noise) < 0.05 * lengths(noise)).all()
    covered, told = coverage(path, model, data, 48, rows, 10)
    assert told > 0.9
    assert 0.92 <= covered <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("size", "least"), [(6, 0.6), (12, 0.95), (40, 0.99)])
def test_intervals_cover_in_the_long_form(network, tmp_path, size, least):
    model, data = network
    rows = 500 * size
    path = record(tmp_path / "run.h5", model, data, rows, batch_size=12)
    covered, told = coverage(path, model, data, 48, rows, size)
    print(f"windows of {size} rows: {covered:.1%} of the intervals cover, {told:.1%} have one")
    assert told > least
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("source", ["probe_loader", "training"])
def test_shared_samples_flip_the_sign_of_a_naive_cosine_and_not_of_an_estimate(tmp_path, source):
    """True -.30; a cosine that knows nothing of its noise reads about +.45."""
    size, batch = 50, 200
    truth = np.zeros((2, size))
    truth[0, 0], truth[1, :2] = 1.0, (-0.3, np.sqrt(1 - 0.3**2))
    data = Data(20_000, truth, np.sqrt(8.0), 0.95)
    model = Regression(size)
    micro = 4 if source == "training" else 0
    path = record(tmp_path / "run.h5", model, data, 250, batch_size=batch // 4, micro=micro)
    with gradprobe.open_run(path) as run:
        gram, noise_part = exact(model, data, run.layers, batch)
        true = measures.pair_cosine(gram)[0, 0]
        table = source if source == "probe_loader" else ""
        naive = run[f"{table}/cosine".strip("/")][:, 0, 0]
        found = run.estimate(source=source)
        measured, corrected = (gramians.mean(axis=0) for gramians in sums(run, table))
    assert (np.abs(corrected - gram) < 0.1 * lengths(noise_part)).all()  # unbiased to a tenth of the noise
    assert (np.abs(measured - gram) > 0.7 * lengths(noise_part)).all()  # and what it corrects
    assert true == pytest.approx(-0.3, abs=0.02)
    assert 0.35 < np.median(naive) < 0.6
    assert (naive > 0).mean() > 0.95
    assert found.low[0] < true < found.high[0] < 0
    assert found.cosine[0] == pytest.approx(true, abs=0.05)
    squares_of_noise = np.diagonal(noise_part[0])
    scale = batch * squares_of_noise / np.diagonal(gram[0])
    assert ((found.noise_scale_low < scale) & (scale < found.noise_scale_high)).all()
    correlation = noise_part[0, 0, 1] / np.sqrt(squares_of_noise.prod())
    assert found.noise_correlation[0] == pytest.approx(correlation, abs=0.02)


# ---- groups, windows, and what is not there


def make_table(path, reach, rows=30, bad=()):
    """A run with a table of the probe loader of three tasks on three layers, and what was put into it."""
    header = make_header(3, ("a", "b", "c"), reach=reach)
    rng, put = np.random.default_rng(0), []
    writer = RunWriter(path)
    writer.start(header)
    for step in range(rows):
        g = rng.normal(size=(3, 3, 5)) + np.arange(1, 4)[:, None, None]
        e = rng.normal(size=(3, 3, 5)) / 4
        there = reach[:, :, None] & reach[:, None, :] & (step not in bad)
        gram, noise = (np.where(there, v @ np.swapaxes(v, -1, -2), np.nan) for v in (g, e))
        put.append((gram, noise))
        status = "measuring failed" if step in bad else "measured"
        writer.write(ProbeLoaderRow(5 * step, 0, 0.1 * step, np.ones(3), gram, noise, 4, 32, status=status))
    writer.close()
    return np.array([g for g, _ in put]), np.array([e for _, e in put])


def assert_equal(found, expected):
    for field in fields(found):
        np.testing.assert_allclose(getattr(found, field.name), getattr(expected, field.name), rtol=2e-5, atol=1e-6)


ALL = np.ones((3, 3), dtype=bool)


def test_a_group_is_the_sum_over_its_layers_and_a_window_its_rows(tmp_path):
    gram, noise = make_table(tmp_path / "run.h5", ALL, bad=(4,))
    kept = [i for i in range(30) if i != 4]
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert_equal(run.estimate(), pooled(gram.sum(1)[kept], noise.sum(1)[kept], 32))
        two = run.estimate(["model.0.conv", "model.2.conv"])
        assert_equal(two, pooled((gram[:, 0] + gram[:, 2])[kept], (noise[:, 0] + noise[:, 2])[kept], 32))
        assert_equal(run.estimate("model.1"), pooled(gram[kept, 1], noise[kept, 1], 32))
        window = run.estimate(window=(50, 100))  # steps 50, 55, ..., 95
        assert_equal(window, pooled(gram.sum(1)[10:20], noise.sum(1)[10:20], 32))
        assert window.rows.tolist() == [10] * 3


def test_a_pair_is_compared_on_the_layers_that_both_reach(tmp_path):
    reach = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=bool)
    gram, noise = make_table(tmp_path / "run.h5", reach)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        found = run.estimate()
    for pair, (tasks, layers) in enumerate({(0, 1): [0, 1], (0, 2): [0, 2], (1, 2): [0]}.items()):
        own = np.ix_(range(30), layers, tasks, tasks)
        expected = pooled(gram[own].sum(1), noise[own].sum(1), 32)
        for name in ("cosine", "low", "high", "magnitude_similarity", "noise_correlation"):
            assert getattr(found, name)[pair] == pytest.approx(getattr(expected, name)[0], rel=1e-4)
        assert found.rows[pair] == 30
    square = [np.nansum(np.diagonal(gram - noise, axis1=-2, axis2=-1)[..., t], axis=1).mean() for t in range(3)]
    np.testing.assert_allclose(found.square, square, rtol=1e-5)


def test_a_pair_that_shares_no_layer_of_the_group_has_no_cosine(tmp_path):
    reach = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=bool)
    make_table(tmp_path / "run.h5", reach)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        found = run.estimate("model.1.conv")
    assert np.isnan(found.cosine).tolist() == [False, True, True]
    assert np.isnan(found.square).tolist() == [False, False, True]


def test_a_window_without_rows_tells_nothing(tmp_path):
    make_table(tmp_path / "run.h5", ALL)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        found = run.estimate(window=(1000, 2000))
    assert np.isnan(found.cosine).all()
    assert found.rows.tolist() == [0, 0, 0]
    assert not found.square_resolved.any()


def test_what_was_not_measured_is_refused_with_what_to_do(tmp_path):
    make_run(tmp_path / "run.h5")
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        with pytest.raises(RunFileError, match="record with --probe-loader val"):
            run.estimate()
        with pytest.raises(RunFileError, match="record with --micro-batches 4"):
            run.estimate(source="training")
        with pytest.raises(RunFileError, match="there are: probe_loader, training"):
            run.estimate(source="rows")
    make_table(tmp_path / "other.h5", ALL)
    with gradprobe.open_run(tmp_path / "other.h5") as run, pytest.raises(RunFileError, match="no shared layer at 'x'"):
        run.estimate("x")
