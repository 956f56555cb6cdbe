"""The callback inside Lightning's real Trainer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_probes_harmless import assert_same
from trainings import WEIGHTS, Fails, TwoHeads, left_behind, samples
from zoo import Collector, naive_gramian

import gradprobe
from gradprobe.errors import UsageError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
    # Lightning's own, on the machines and loaders that tests have
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
]


@pytest.fixture(scope="module")
def lightning():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as package
    return package


@pytest.fixture
def train(lightning, tmp_path):
    class Module(lightning.LightningModule):
        weights = WEIGHTS

        def __init__(self):
            super().__init__()
            self.net = TwoHeads()

        def training_step(self, batch, batch_idx):
            self.losses = self.net.losses(**batch)
            self.log("seen", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="max")
            return sum(self.weights[t] * loss for t, loss in self.losses.items())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Raise(lightning.Callback):
        def __init__(self, fails):
            self.fails = fails

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.fails(trainer.global_step)

    def run(*callbacks, fails=None, ckpt_path=None, module=Module, **options):
        lightning.seed_everything(3, verbose=False)
        model = module()
        options = {"max_epochs": 2, "enable_checkpointing": False, **options}
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, *([Raise(fails)] if fails else [])],
            **options,
        )
        loader = torch.utils.data.DataLoader(samples(), batch_size=8, shuffle=True)
        trainer.fit(model, loader, ckpt_path=ckpt_path)
        return trainer, left_behind(model, trainer.optimizers[0])

    run.module = Module
    return run


def callback(out=None, **options):
    from gradprobe.integrations.lightning import GradprobeCallback

    return GradprobeCallback(("a", "b"), out, **{"weights": WEIGHTS, "every": 2, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_the_training_ends_in_every_bit_as_without(train, options):
    _, bare = train(**options)
    sink = Collector()
    _, probed = train(callback(sinks=[sink]), **options)
    assert_same(bare, probed)
    assert sink.end == "finished"
    steps = 8 // options.get("accumulate_grad_batches", 1)
    assert [row.step for row in sink.rows] == list(range(0, steps, 2))


def test_the_file_holds_what_was_trained(train, tmp_path):
    out = tmp_path / "run.h5"
    train(callback(out, weights="weights"))
    with gradprobe.open_run(out) as run:
        assert run.end == "finished"
        assert run.tasks == ("a", "b")
        assert list(run.layers) == ["net.trunk.0", "net.trunk.1"]
        assert run["epoch"].tolist() == [0, 0, 1, 1]
        assert run["batch_size"].tolist() == [8] * 4
        np.testing.assert_allclose(run["weight"], [[1.0, 0.3]] * 4, rtol=1e-6)
        np.testing.assert_allclose(run["lr"], 1e-2)
        assert run.epochs_by_number()[1]["seen"] == 3
        assert run.provenance["trainer"] == "lightning"


def test_what_is_measured_is_what_autograd_gives(train):
    sink, naive = Collector(), []

    class Twin(train.module):
        def on_before_backward(self, loss):
            if self.trainer.global_step % 2 == 0:
                layers = probe.recording.probe.shared.layers
                naive.append(naive_gramian(layers, self.losses))

    probe = callback(sinks=[sink])
    train(probe, module=Twin)
    assert len(naive) == 4
    for row, gram in zip(sink.rows, naive, strict=True):
        np.testing.assert_allclose(row.gram, gram, rtol=1e-10, atol=1e-12)


def test_under_a_scaler_gradients_are_stored_unscaled(lightning, train):
    def halves():
        plugin = lightning.plugins.precision.MixedPrecision
        return {"plugins": [plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))]}

    exact, scaled = Collector(), Collector()
    train(callback(sinks=[exact]))
    _, bare = train(**halves())
    _, probed = train(callback(sinks=[scaled]), **halves())
    assert_same(bare, probed)
    np.testing.assert_allclose(scaled.rows[0].gram, exact.rows[0].gram, rtol=0.05)  # float16 beside float32


@pytest.mark.parametrize(
    ("error", "raised", "end"),
    [(ValueError("no"), ValueError, "failed: ValueError"), (KeyboardInterrupt(), SystemExit, "interrupted")],
    ids=["exception", "Ctrl-C"],
)
def test_the_file_is_complete_however_it_ends(train, tmp_path, error, raised, end):
    out = tmp_path / "run.h5"
    with pytest.raises(raised):
        train(callback(out), fails=Fails(error))
    with gradprobe.open_run(out) as run:
        assert run.end == end
        assert run["step"].tolist() == [0, 2]
    assert not out.with_name("run.h5.parts").exists()


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_training_goes_on_with_the_file(lightning, train, tmp_path):
    def keep(folder):
        return lightning.callbacks.ModelCheckpoint(tmp_path / folder, "at-{step}", every_n_train_steps=5, save_top_k=-1)

    options = {"enable_checkpointing": True, "max_epochs": 3}
    train(keep("whole"), callback(tmp_path / "whole.h5", every=3), **options)
    with pytest.raises(ValueError, match="power cut"):
        train(
            keep("cut"), callback(tmp_path / "run.h5", every=3), fails=Fails(ValueError("power cut"), at=8), **options
        )
    train(keep("cut"), callback(tmp_path / "run.h5", every=3), ckpt_path=tmp_path / "cut/at-step=5.ckpt", **options)
    with gradprobe.open_run(tmp_path / "whole.h5") as whole, gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run["step"].tolist() == whole["step"].tolist() == [0, 3, 6, 9]
        assert run["epoch"].tolist() == [0, 0, 1, 2]
        assert run.end == "finished"
        assert sorted(run.epochs_by_number()) == [0, 1, 2]
        np.testing.assert_array_equal(run["loss"][:2], whole["loss"][:2])


def test_a_checkpoint_of_a_training_without_the_callback_is_gone_on_with(train, tmp_path):
    trainer, _ = train(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    sink = Collector()
    train(callback(sinks=[sink], every=3), ckpt_path=tmp_path / "at.ckpt")
    assert [(row.step, row.epoch) for row in sink.rows] == [(6, 1)]


def test_weights_that_do_not_add_up_to_the_loss_are_told(train):
    with pytest.warns(RuntimeWarning, match=r"weighted losses of \['a', 'b'\] add up to .* weights="):
        train(callback(weights=None))


def test_a_module_without_losses_is_told_where_to_put_them(train):
    with pytest.raises(UsageError, match=r"Module.parts is missing; set it in training_step"):
        train(callback(losses="parts"))


def test_several_optimizers_are_refused(train):
    class Several(train.module):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.trunk.parameters()), torch.optim.SGD(self.net.a.parameters())]

    with pytest.raises(UsageError, match="has 2 optimizers"):
        train(callback(), module=Several)


@pytest.mark.slow  # two trainings on two processes each
def test_on_two_processes_one_file_is_written_and_nothing_is_changed(tmp_path):
    script = Path(__file__).with_name("lightning_ddp.py")
    for mode in ("bare", "probed"):
        done = subprocess.run([sys.executable, str(script), str(tmp_path), mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        bare, probed = (torch.load(tmp_path / f"{mode}-{rank}.pt", weights_only=True) for mode in ("bare", "probed"))
        assert_same(bare, probed)
    assert [path.name for path in tmp_path.glob("*.h5*")] == ["run.h5"]
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.end == "finished"
        assert run["step"].tolist() == [0, 2, 4, 6]
        assert run["batch_size"].tolist() == [8] * 4  # of both processes together, as are the gradients


@pytest.mark.slow
def test_the_older_package_takes_the_callback_too():
    """pytorch_lightning is a second copy of lightning.pytorch, and each has a class Callback of its own."""
    code = (
        "import torch, pytorch_lightning as pl\n"
        "from gradprobe.integrations.lightning import GradprobeCallback\n"
        "assert issubclass(GradprobeCallback, pl.Callback)\n"
        "from trainings import TwoHeads, samples\n"
        "from zoo import Collector\n"
        "class Module(pl.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = TwoHeads()\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        self.losses = self.net.losses(**batch)\n"
        "        return self.losses['a'] + self.losses['b']\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.Adam(self.parameters())\n"
        "sink = Collector()\n"
        "callback = GradprobeCallback(('a', 'b'), None, every=2, sinks=[sink])\n"
        "trainer = pl.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,\n"
        "                     callbacks=[callback])\n"
        "trainer.fit(Module(), torch.utils.data.DataLoader(samples(), batch_size=8))\n"
        "assert [row.step for row in sink.rows] == [0, 2], sink.rows\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
