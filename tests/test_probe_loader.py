"""The probe loader: what is drawn, what is measured on it, that the training does not notice, what the file keeps."""

from __future__ import annotations

import csv
import random

import h5py
import numpy as np
import pytest
import torch
from test_probes_harmless import assert_same
from torch import nn
from zoo import Checkpointed, Collector, Heads

import gradprobe
from gradprobe.cli.app import run as command
from gradprobe.errors import ProbeError
from gradprobe.probes import passes
from gradprobe.runfile.exports import export_run
from gradprobe.runfile.files import seal
from gradprobe.runfile.integrity import check_run
from gradprobe.runfile.repair import repair

TASKS = ("a", "b")
DRAWN = [[36, 20, 21, 14, 16, 12], [2, 21, 1, 17, 6, 11], [17, 3, 6, 24, 31, 24]]
"""At step 7 of seed 5, of 40 samples: the same on every machine and with every version of numpy."""


class Noisy(Collector):
    """Also takes rows of the probe loader, and notes."""

    tables = ("features", "probe_loader")

    def __init__(self):
        super().__init__()
        self.loader_rows, self.notes = [], {}

    def write(self, row):
        if row.table.name == "probe_loader":
            assert self.header is not None
            self.loader_rows.append(row)
        else:
            super().write(row)

    def annotate(self, values):
        self.notes.update(values)


class Rebinding(nn.Module):
    """Keeps its statistics by putting new tensors in the place of its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Net(Heads):
    """BatchNorm, dropout, recomputed activations, and a forward that draws from Python's and numpy's streams too."""

    def __init__(self):
        super().__init__(nn.Sequential(Checkpointed(), nn.Dropout(0.2), Rebinding()), 12)

    def forward(self, x):
        return super().forward(x * (1 + 0.01 * random.random() + 0.01 * np.random.rand()))


class Data(torch.utils.data.Dataset):
    def __init__(self, count=40, seed=0):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def losses_of(model, x):
    first, second = model(x)
    return {"a": first.square().mean(), "b": second.sin().sum(1).mean()}


def train(out=None, *, loader=True, how="backward", steps=7, sinks=(), every=3, probe=True, resume_at=None, **options):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, data = Net(), Data()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    options = {"batch_size": 4, "batches": 3, "every": 2, **options}
    given = gradprobe.ProbeLoader(data, lambda x: losses_of(model, x), **options) if loader else None
    found, grads = None, []
    if probe:
        found = gradprobe.attach(model, TASKS, out, every=every, optimizer=optimizer, sinks=sinks, probe_loader=given)
    for step in range(steps):
        if step == resume_at:
            state = found.state_dict()
        losses = losses_of(model, data.x[4 * step : 4 * step + 4])
        if how == "backward" and found is not None:
            found.backward(losses)
        else:
            if found is not None:
                found.record(losses)
            sum(losses.values()).backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    if resume_at is not None:
        found.load_state_dict(state)
        found.backward(losses_of(model, data.x[:4]))
    if found is not None:
        found.close()
    return {
        "model": model.state_dict(),
        "modes": [m.training for m in model.modules()],
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "grads": grads,
    }


# ---- harmless


@pytest.mark.parametrize("how", ["backward", "record"])
def test_a_training_ends_in_every_bit_as_one_without_a_probe(how):
    sink = Noisy()
    assert_same(train(how=how, sinks=[sink]), train(probe=False))
    assert [row.step for row in sink.loader_rows] == [0, 2, 4, 6]
    assert [row.status for row in sink.loader_rows] == ["measured"] * 4


def test_modes_that_the_losses_change_are_put_back():
    torch.manual_seed(0)
    model, sink = Net(), Noisy()
    model.heads[0].eval()
    before = [m.training for m in model.modules()]

    def losses(x):
        model.eval()
        return losses_of(model, x)

    loader = gradprobe.ProbeLoader(Data(), losses, batch_size=4)
    with gradprobe.attach(model, TASKS, sinks=[sink], probe_loader=loader) as probe:
        probe.record(losses_of(model, Data().x[:4]))
    assert [m.training for m in model.modules()] == before
    assert len(sink.loader_rows) == 1


def test_a_failure_leaves_everything_as_it_was():
    sink, calls = Noisy(), []

    def broken(x):
        calls.append(1)
        model.train(False)
        random.random()
        np.random.rand()
        torch.rand(1)
        if len(calls) > 5:  # three and two for the self-check
            raise ValueError("no batch today")
        return losses_of(model, x)

    torch.manual_seed(0)
    model = Net()
    loader = gradprobe.ProbeLoader(Data(), broken, batch_size=4, batches=3, every=1)
    states = []
    with gradprobe.attach(model, TASKS, sinks=[sink], every=100, probe_loader=loader) as probe:
        for _ in range(2):
            losses = losses_of(model, Data().x[:4])
            before = torch.get_rng_state(), random.getstate(), np.random.get_state(), model.state_dict()
            before = [*before[:3], {k: v.clone() for k, v in before[3].items()}]
            if len(states):
                with pytest.warns(RuntimeWarning, match="measuring failed: ValueError: no batch today"):
                    probe.record(losses)
            else:
                probe.record(losses)
            states.append(1)
            assert_same(
                before, [torch.get_rng_state(), random.getstate(), np.random.get_state(), dict(model.state_dict())]
            )
            assert model.training
    good, bad = sink.loader_rows
    assert good.status == "measured"
    assert bad.status == "measuring failed: ValueError: no batch today"
    assert all(np.isnan(values).all() for values in (bad.gram, bad.gram_noise, bad.loss))


# ---- what is measured


def test_rows_are_those_of_a_naive_twin():
    """Gradients by autograd at the parameters of the step, in float64, samples looked up by their places."""
    torch.manual_seed(1)
    model = Heads(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), 8).double()
    data, sink, twins = Data(), Noisy(), []
    data.x = data.x.double()
    loader = gradprobe.ProbeLoader(data, lambda x: losses_of(model, x), batch_size=5, batches=4, every=2, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradprobe.attach(model, TASKS, sinks=[sink], every=3, optimizer=optimizer, probe_loader=loader) as probe:
        for step in range(5):
            if step % 2 == 0:
                gradients, values = [], []
                state = {k: v.clone() for k, v in model.state_dict().items()}
                for places in loader.indices(step):
                    losses = losses_of(model, data.x[places])
                    parameters = list(model.trunk.parameters())
                    g = [torch.autograd.grad(losses[t], parameters, retain_graph=True) for t in TASKS]
                    gradients.append([torch.cat([p.flatten() for p in one]).numpy() for one in g])
                    values.append([losses[t].item() for t in TASKS])
                model.load_state_dict(state)
                twins.append((np.array(gradients), np.array(values)))
            probe.backward(losses_of(model, data.x[:8]))
            optimizer.step()
            optimizer.zero_grad()
    assert len(sink.loader_rows) == 3
    for row, (g, values) in zip(sink.loader_rows, twins, strict=True):
        mean, away = g.mean(0), g - g.mean(0)
        np.testing.assert_allclose(row.gram.sum(0), mean @ mean.T, rtol=1e-10)
        np.testing.assert_allclose(row.gram_noise.sum(0), np.einsum("aid,ajd->ij", away, away) / 12, rtol=1e-10)
        np.testing.assert_allclose(row.loss, values.mean(0), rtol=1e-12)
        assert (row.micro_batches, row.batch_size) == (4, 20)


def test_the_draw_depends_on_seed_and_step_alone():
    def places(step, *, rank=0, **options):
        options = {"batch_size": 6, "batches": 3, "seed": 5, **options}
        return gradprobe.ProbeLoader(Data(), lambda x: {}, **options).indices(step, rank)

    assert places(7) == places(7)
    torch.manual_seed(9)
    np.random.seed(9)
    assert places(7) == DRAWN
    assert places(7) != places(8)
    assert places(7) != places(7, seed=6)
    assert places(7) != places(7, rank=1)
    assert [len(one) for one in places(0)] == [6, 6, 6]


def test_samples_are_drawn_with_replacement_and_evenly():
    loader = gradprobe.ProbeLoader(Data(10), lambda x: {}, batch_size=50, batches=20)
    counts = np.bincount(np.ravel(loader.indices(0)), minlength=10)
    assert counts.sum() == 1000
    assert np.square(counts - 100).sum() / 100 < 27.9  # chi-squared with 9 degrees of freedom, p = .001


def test_dropout_of_the_probe_loader_depends_on_seed_and_step_alone():
    """Whatever the training has drawn meanwhile."""
    rows = []
    for used in (0, 3):
        torch.manual_seed(0)
        model, sink = Heads(nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5)), 12), Noisy()
        torch.rand(used)
        loader = gradprobe.ProbeLoader(Data(), lambda x, model=model: losses_of(model, x), batch_size=4)
        with gradprobe.attach(model, TASKS, sinks=[sink], every=9, probe_loader=loader) as probe:
            probe.record(losses_of(model, Data().x[:4]))
        rows.append(sink.loader_rows[0])
    np.testing.assert_array_equal(rows[0].gram, rows[1].gram)
    np.testing.assert_array_equal(rows[0].loss, rows[1].loss)


def test_rows_of_the_training_are_those_without_a_probe_loader():
    with_loader, without = Noisy(), Noisy()
    train(sinks=[with_loader], steps=6)
    train(sinks=[without], steps=6, loader=False)
    for one, other in zip(with_loader.rows, without.rows, strict=True):
        np.testing.assert_array_equal(one.gram, other.gram)
        assert one.step == other.step


def test_updates_see_the_training_and_not_the_probe_loader(tmp_path):
    found = []
    for with_loader in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loader = gradprobe.ProbeLoader(Data(), lambda x, m=model: losses_of(m, x), batch_size=4, every=1)
        path = tmp_path / f"{with_loader}.h5"
        with gradprobe.attach(
            model, TASKS, path, every=1, optimizer=optimizer, updates=True, probe_loader=loader if with_loader else None
        ) as probe:
            for step in range(4):
                probe.backward(losses_of(model, Data().x[4 * step : 4 * step + 4]))
                optimizer.step()
                optimizer.zero_grad()
        with gradprobe.open_run(path) as run:
            found.append(run["update/effect"])
            assert (run["update/status"] == 0).all()
    np.testing.assert_array_equal(*found)


def test_a_call_is_due_where_only_the_probe_loader_is():
    torch.manual_seed(0)
    model = Net()
    loader = gradprobe.ProbeLoader(Data(), lambda x: losses_of(model, x), batch_size=4, every=2)
    due = []
    with gradprobe.attach(model, TASKS, every=3, probe_loader=loader) as probe:
        for _ in range(7):
            due.append(probe.is_due)
            probe.record(losses_of(model, Data().x[:4]))
    assert due == [True, False, True, True, True, False, True]


# ---- the self-check


def test_a_probe_checks_itself_once():
    sink = Noisy()
    train(sinks=[sink])
    copy, negative = sink.notes["self_check"]
    assert abs(copy - 1) <= 1e-6
    assert abs(negative + 1) <= 1e-6


def test_it_does_so_too_where_a_training_is_measured_in_micro_batches():
    torch.manual_seed(0)
    model, sink = Net(), Noisy()
    with gradprobe.attach(model, TASKS, sinks=[sink], every=1) as probe:
        probe.record(losses_of(model, Data().x[:4]))
        assert sink.notes == {}
        probe.record(micro=[losses_of(model, Data().x[4 * a : 4 * a + 4]) for a in range(3)])
    assert np.allclose(sink.notes["self_check"], [1, -1], atol=1e-6, rtol=0)


def test_a_pass_that_gives_another_gradient_each_time_is_warned_about(monkeypatch):
    real = passes.MicroSum._passes

    own = torch.Generator().manual_seed(0)  # the probe puts the global one back before each pass

    def rough(total, losses):
        return [
            [None if g is None else g * (1 + 0.1 * torch.randn(g.shape, generator=own)) for g in task]
            for task in real(total, losses)
        ]

    sink = Noisy()
    monkeypatch.setattr(passes.MicroSum, "_passes", rough)
    with pytest.warns(RuntimeWarning, match="the self-check failed: a task's cosine with its own copy is 0.9"):
        train(sinks=[sink], steps=1)
    assert 0.9 < sink.notes["self_check"][0] < 1 - 1e-6


# ---- the file


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "run.h5"
    train(path, split="val", seed=11)
    return path


def test_the_file_holds_the_table(path):
    sink = Noisy()
    train(sinks=[sink], seed=11)
    with gradprobe.open_run(path) as run:
        table = run.probe_loader
        assert table["step"].tolist() == [0, 2, 4, 6]
        assert table["batch_size"].tolist() == [12] * 4
        assert table["micro_batches"].tolist() == [3] * 4
        noise = np.array([row.gram_noise for row in sink.loader_rows])
        np.testing.assert_array_equal(table["gram_noise"], noise.astype(np.float32))
        gram = np.array([row.gram for row in sink.loader_rows])
        np.testing.assert_allclose(table["grad_norm"], np.sqrt(np.einsum("nlii->nli", gram)), rtol=1e-6)
        np.testing.assert_allclose(table["loss"], [row.loss for row in sink.loader_rows], rtol=1e-6)
        assert np.isfinite(table["cosine"]).all()
        assert (table["overhead"] > 0).all()
        assert (table["status"] == 0).all()
        about = {k: v for k, v in run.provenance.items() if k.startswith("probe_loader")}
        assert about == {
            "probe_loader.split": "val",
            "probe_loader.every": 2,
            "probe_loader.batches": 3,
            "probe_loader.batch_size": 4,
            "probe_loader.samples": 40,
            "probe_loader.seed": 11,
        }
        assert np.allclose(run.provenance["self_check"], [1, -1], atol=1e-6, rtol=0)
        assert run.gram_noise() is None  # of the training's own batches, which were not measured in micro-batches
    assert command(["check", str(path)]) == 0
    with h5py.File(path) as file:
        scales = [[scale.name for scale in axis.values()] for axis in file["probe_loader/gram_noise"].dims]
        assert scales == [["/probe_loader/step"], ["/layer"], ["/task"], ["/other_task"]]


def test_a_run_without_one_has_no_table(tmp_path):
    train(tmp_path / "run.h5", loader=False, steps=2)
    with gradprobe.open_run(tmp_path / "run.h5") as run, h5py.File(tmp_path / "run.h5") as file:
        assert run.probe_loader == {}
        assert not {"probe_loader", "other_task"} & set(file)
        assert "self_check" not in run.provenance


def test_a_training_that_goes_back_takes_its_rows_along(tmp_path):
    train(tmp_path / "run.h5", resume_at=4)
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["probe_loader/step"].tolist() == [0, 2, 4]
    assert check_run(tmp_path / "run.h5").whole


def test_other_formats_have_it(path, tmp_path):
    pytest.importorskip("pyarrow")
    with gradprobe.open_run(path) as run:
        out = export_run(run, "csv", tmp_path / "csv")
        data = run.to_xarray()
        frame = run.to_pandas("probe_loader/gram_noise")
        assert data["probe_loader.cosine"].dims == ("probe_loader.step", "layer", "pair")
        assert data["probe_loader.gram_noise"].dims == ("probe_loader.step", "layer", "task", "other_task")
        assert len(frame) == run["probe_loader/gram_noise"].size
    with (out / "probe_loader.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["0", "2", "4", "6"]
    assert {"loss.a", "loss.b", "batch_size", "micro_batches", "status"} <= set(table[0])
    assert (out / "probe_loader_noise.csv").exists()
    assert (out / "probe_loader_cosines.csv").exists()


def test_repair_keeps_it(path, tmp_path):
    repair(path, tmp_path / "again.h5")
    with gradprobe.open_run(path) as run, gradprobe.open_run(tmp_path / "again.h5") as again:
        for name, values in run.probe_loader.items():
            np.testing.assert_array_equal(again.probe_loader[name], values)


@pytest.mark.parametrize("name", ["probe_loader/loss", "probe_loader/gram_noise", "other_task"])
def test_what_a_file_lacks_of_it_is_missing_and_told(path, tmp_path, name):
    copy = tmp_path / "copy.h5"
    copy.write_bytes(path.read_bytes())
    with h5py.File(copy, "r+") as file:
        del file[name]
    with copy.open("rb+") as raw:
        seal(raw)
    with gradprobe.open_run(copy) as run, gradprobe.open_run(path) as whole:
        for field, values in run.probe_loader.items():
            lost = name == f"probe_loader/{field}"
            np.testing.assert_array_equal(values, np.full_like(values, np.nan) if lost else whole.probe_loader[field])
    told = [finding.what for finding in check_run(copy).findings]
    assert told == ([] if name == "other_task" else [f"has no {name}: read as missing"])


# ---- wrong calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "there are 'train' and 'val'"),
        ({"batches": 1}, "batches=1: must be a whole number of at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"every": 0}, "every=0"),
        ({"dataset": []}, "data set is empty"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(options, message):
    with pytest.raises(ProbeError, match=message):
        gradprobe.ProbeLoader(options.pop("dataset", [1, 2]), lambda x: {}, **{"batch_size": 4, **options})


@pytest.mark.parametrize("options", [{"level": "features"}, {"memory": "low"}])
def test_what_does_not_go_with_it_is_refused(options):
    model = Net()
    loader = gradprobe.ProbeLoader(Data(), lambda x: losses_of(model, x), batch_size=4)
    with pytest.raises(ProbeError, match="out"):
        gradprobe.attach(model, TASKS, probe_loader=loader, **options)


def test_losses_of_other_tasks_raise_at_once():
    model = Net()
    loader = gradprobe.ProbeLoader(Data(), lambda x: {"a": losses_of(model, x)["a"]}, batch_size=4)
    with gradprobe.attach(model, TASKS, probe_loader=loader) as probe, pytest.raises(ProbeError, match=r"lack \['b'\]"):
        probe.record(losses_of(model, Data().x[:4]))
