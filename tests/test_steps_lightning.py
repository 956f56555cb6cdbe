"""Lightning's loops: the last micro-batch of a step is computed inside the optimizer's ``step()``."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import numpy as np
import pytest
import torch
from steps import BATCH, TASKS, Net, naive, total
from zoo import Collector

import gradprobe
from gradprobe.errors import UsageError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
]
BATCHES, EPOCHS = 6, 2  # with k = 4 the last step of each epoch is of two


@pytest.fixture(scope="module")
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as package
    return package


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def windows(each):
    """The batches of each step."""
    return [range(i, min(i + each, BATCHES)) for i in range(0, BATCHES, each)] * EPOCHS


@pytest.fixture
def fit(lightning, tmp_path):
    def run(callbacks, manual=None, optimizer=adam, **options):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(3)
                self.net = Net().double()
                self.automatic_optimization = manual is None

            def training_step(self, batch, batch_idx):
                self.losses = self.net.losses(int(batch[0]))
                return total(self.losses) if manual is None else manual(self, self.optimizers(), batch_idx)

            def configure_optimizers(self):
                return optimizer(self.parameters())

        module = Module()
        lightning.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=callbacks,
            **options,
        ).fit(module, torch.utils.data.DataLoader(torch.arange(BATCHES).repeat_interleave(BATCH), batch_size=BATCH))
        return copy.deepcopy(module.net.state_dict())

    return run


def callback(out=None, **options):
    from gradprobe.integrations.lightning import GradprobeCallback

    return GradprobeCallback(TASKS, out, every=1, **options)


def same(bare, probed):
    assert bare.keys() == probed.keys()
    assert all(torch.equal(bare[name], probed[name]) for name in bare)


def by_hand(each, optimizer, probe=None, expect=None):
    """The same training without Lightning; each call's losses are divided for accumulation in the backward alone."""
    torch.manual_seed(3)
    model = Net().double()
    made = optimizer(model.parameters())
    handed_in = probe(model, made) if probe is not None else None
    for step, window in enumerate(windows(each)):
        if expect is not None:
            expect(model, step, window)
        made.zero_grad()
        for batch in window:
            losses = model.losses(batch)
            if handed_in is not None:
                handed_in.record(losses, batch_size=BATCH)
            (total(losses) / each).backward()
        made.step()
    if handed_in is not None:
        handed_in.close()
    return model.state_dict()


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("each", [1, 2, 4])
def test_a_row_is_of_all_micro_batches_of_its_step(fit, each, optimizer):
    sink, expected = Collector(), []
    bare = fit([], accumulate_grad_batches=each, optimizer=optimizer)
    same(bare, fit([callback(sinks=[sink])], accumulate_grad_batches=each, optimizer=optimizer))
    same(bare, by_hand(each, optimizer, expect=lambda model, _, window: expected.append(naive(model, window))))
    assert [row.step for row in sink.rows] == list(range(len(windows(each))))
    for row, (gram, noise, batches) in zip(sink.rows, expected, strict=True):
        assert (row.micro_batches, row.batch_size, row.status) == (batches, batches * BATCH, "measured")
        np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-14)
        if batches > 1:
            np.testing.assert_allclose(row.gram_noise, noise, rtol=1e-7, atol=1e-12 * np.nanmax(gram))


@pytest.mark.parametrize(("option", "given"), [("updates", True), ("ledger", gradprobe.Ledger())])
@pytest.mark.parametrize("each", [2, 4])
def test_updates_of_several_batches_are_refused(fit, option, given, each):
    with pytest.raises(UsageError, match=f"accumulate_grad_batches={each} makes each of {each}: leave {option}= out"):
        fit([callback(**{option: given})], accumulate_grad_batches=each)


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_updates_and_ledger_are_those_of_the_loop_by_hand(fit, tmp_path, optimizer, clip):
    def probe(model, made):
        ledger = gradprobe.Ledger(lambda: model.losses(77), ends="probe")
        return gradprobe.attach(
            model, TASKS, tmp_path / "hand.h5", optimizer=made, every=1, updates=True, ledger=ledger
        )

    class Late:
        """The module is made when the callback is."""

        def __call__(self):
            return module[0].net.losses(77)

    module = []
    called = callback(tmp_path / "fit.h5", updates=True, ledger=gradprobe.Ledger(Late(), ends="probe"))
    start = called.on_train_start
    called.on_train_start = lambda trainer, pl_module: (module.append(pl_module), start(trainer, pl_module))
    options = {"gradient_clip_val": clip} if clip else {}
    probed = fit([called], optimizer=optimizer, **options)
    same(fit([], optimizer=optimizer, **options), probed)
    with gradprobe.open_run(tmp_path / "fit.h5") as run:
        assert [run.status_names[code] for code in run.updates["status"]] == ["measured"] * len(windows(1))
        assert np.isfinite(run.updates["effect"]).all()
        assert np.isfinite(run.ledger["term"][5:]).all()
        assert (run.updates["clip_scale"] < 0.99).all() == bool(clip)
        if clip:
            return
        same(probed, by_hand(1, optimizer, probe=probe))
        with gradprobe.open_run(tmp_path / "hand.h5") as hand:
            assert [hand.status_names[code] for code in hand.updates["status"]] == ["measured"] * len(windows(1))
            for found, by in ((run.updates, hand.updates), (run.ledger, hand.ledger)):
                assert found.keys() == by.keys()
                for name in found.keys() - {"time", "overhead", "epoch", "status", "source"}:
                    np.testing.assert_allclose(found[name], by[name], rtol=1e-6, atol=1e-12, err_msg=name)


def test_one_backward_per_loss_in_manual_optimization(fit):
    """The callback hears each backward, with the same losses: one batch, whose noise is not known."""

    def manual(module, optimizer, batch_idx):
        optimizer.zero_grad()
        module.manual_backward(module.losses["a"], retain_graph=True)
        module.manual_backward(module.losses["b"])
        optimizer.step()

    sink, expected = Collector(), []
    bare = fit([], manual)
    same(bare, fit([callback(sinks=[sink])], manual))
    by_hand(1, adam, expect=lambda model, _, window: expected.append(naive(model, window)))
    assert len(sink.rows) == len(expected)
    for row, (gram, _, _) in zip(sink.rows, expected, strict=True):
        assert (row.micro_batches, row.batch_size, row.gram_noise) == (1, BATCH, None)
        np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-14)


def test_accumulation_in_manual_optimization(fit):
    """Two micro-batches a step, one backward per loss on each."""

    def manual(module, optimizer, batch_idx):
        module.manual_backward(module.losses["a"] / 2, retain_graph=True)
        module.manual_backward(module.losses["b"] / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    sink, expected = Collector(), []
    same(fit([], manual, sgd), fit([callback(sinks=[sink])], manual, sgd))
    by_hand(2, sgd, expect=lambda model, _, window: expected.append(naive(model, window)))
    assert len(sink.rows) == len(expected)
    for row, (gram, noise, _) in zip(sink.rows, expected, strict=True):
        assert (row.micro_batches, row.batch_size) == (2, 2 * BATCH)
        np.testing.assert_allclose(row.gram, gram, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(row.gram_noise, noise, rtol=1e-7, atol=1e-12 * np.nanmax(gram))
