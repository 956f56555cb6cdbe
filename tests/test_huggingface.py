"""The callback inside the real Trainer of Hugging Face's transformers."""

from __future__ import annotations

import gc
import importlib.util
import warnings

import numpy as np
import pytest
import torch
from test_probes_harmless import assert_same
from trainings import WEIGHTS, Fails, TwoHeads, left_behind, samples
from zoo import Collector, naive_gramian

import gradprobe
from gradprobe.errors import UsageError

MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    # transformers' own, under a newer torch
    pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate|torch).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|accelerate|torch).*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import accelerate
        import transformers

        transformers.Trainer  # noqa: B018 - imported when first used
    transformers.utils.logging.set_verbosity_error()
    assert accelerate
    return transformers


class Model(TwoHeads):
    """Returns what a model of transformers returns, and its tasks' losses."""

    def forward(self, x, a, b):
        self.last = self.losses(x, a, b)
        total = sum(WEIGHTS[t] * loss for t, loss in self.last.items())
        return {"loss": total, "losses": self.last, "weights": WEIGHTS}


@pytest.fixture
def train(transformers, tmp_path):
    class Raise(transformers.TrainerCallback):
        def __init__(self, fails):
            self.fails = fails

        def on_step_end(self, args, state, control, **kwargs):
            self.fails(state.global_step)

    def run(callback=None, fails=None, model=Model, trainer=transformers.Trainer, resume=None, **options):
        torch.manual_seed(3)
        net = model()
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            **{
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "report_to": [],
                "use_cpu": True,
                "save_strategy": "no",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "seed": 3,
                "learning_rate": 1e-2,
                **options,
            },
        )
        made = trainer(model=net, args=settings, train_dataset=samples(), eval_dataset=samples(8))
        if fails:
            made.add_callback(Raise(fails))
        if callback is not None:
            callback.add_to(made)
        made.train(resume_from_checkpoint=resume)
        return net, left_behind(net, made.optimizer.optimizer)

    return run


def callback(out=None, **options):
    from gradprobe.integrations.huggingface import GradprobeCallback

    return GradprobeCallback(("a", "b"), out, **{"weights": WEIGHTS, "every": 2, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}, {"bf16": True}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_the_training_ends_in_every_bit_as_without(train, options):
    _, bare = train(**options)
    sink = Collector()
    net, probed = train(callback(sinks=[sink]), **options)
    assert_same(bare, probed)
    assert sink.end == "finished"
    assert not net._forward_hooks
    steps = 8 // options.get("gradient_accumulation_steps", 1)
    assert [row.step for row in sink.rows] == list(range(0, steps, 2))


def test_the_file_holds_what_was_trained(train, tmp_path):
    out = tmp_path / "run.h5"
    train(callback(out, weights="weights"), eval_strategy="epoch", label_names=["a", "b"], prediction_loss_only=True)
    with gradprobe.open_run(out) as run:
        assert run.end == "finished"
        assert list(run.layers) == ["trunk.0", "trunk.1"]
        assert run["epoch"].tolist() == [0, 0, 1, 1]
        assert run["batch_size"].tolist() == [8] * 4
        np.testing.assert_allclose(run["weight"], [[1.0, 0.3]] * 4, rtol=1e-6)
        np.testing.assert_allclose(run["lr"], [1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
        assert list(run.epochs_by_number()) == [0, 1]
        assert set(run.epochs_by_number()[1]) == {"eval_loss"}
        assert run.epochs_by_number()[1]["eval_loss"] > 0
        assert run.provenance["trainer"] == "transformers"


def test_what_is_measured_is_what_autograd_gives(train):
    sink, naive = Collector(), []

    class Twin(Model):
        def forward(self, x, a, b):
            outputs = super().forward(x, a, b)
            layers = layers_of(self)
            naive.append(naive_gramian(layers, outputs["losses"]))
            return outputs

    train(callback(sinks=[sink]), model=Twin)
    for row in sink.rows:
        np.testing.assert_allclose(row.gram, naive[row.step], rtol=1e-10, atol=1e-12)
    assert len(sink.rows) == 4


def layers_of(net):
    from gradprobe.probes.shared_layers import Layer

    return [Layer("0", tuple(net.trunk[0].parameters())), Layer("1", tuple(net.trunk[1].parameters()))]


@pytest.mark.parametrize(
    ("error", "end"),
    [(ValueError("no"), "failed: ValueError"), (KeyboardInterrupt(), "interrupted")],
    ids=["exception", "Ctrl-C"],
)
def test_the_file_is_complete_however_it_ends(train, tmp_path, error, end):
    out = tmp_path / "run.h5"
    with pytest.raises(type(error)):
        train(callback(out), fails=Fails(error))
    with gradprobe.open_run(out) as run:
        assert run.end == end
        assert run["step"].tolist() == [0, 2]
    assert not out.with_name("run.h5.parts").exists()


def test_a_trainer_that_makes_the_losses_itself_records_them(transformers, train):
    sink = Collector()
    probe = callback(sinks=[sink], losses=None)

    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            losses = model.losses(**inputs)
            total = sum(WEIGHTS[t] * loss for t, loss in losses.items())
            probe.record(losses, WEIGHTS, batch_size=len(inputs["x"]), total=total)
            return (total, losses) if return_outputs else total

    train(probe, trainer=Own, eval_strategy="epoch", prediction_loss_only=True)
    assert [row.step for row in sink.rows] == [0, 2, 4, 6]
    assert {row.batch_size for row in sink.rows} == {8}


def test_a_resumed_training_goes_on_with_the_file(train, tmp_path):
    out = tmp_path / "run.h5"
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "epoch", "label_names": ["a", "b"]}
    options |= {"prediction_loss_only": True}
    with pytest.raises(ValueError, match="power cut"):
        train(callback(out, every=2), fails=Fails(ValueError("power cut"), at=7), **options)
    train(callback(out, every=2), resume=str(tmp_path / "out" / "checkpoint-5"), **options)
    with gradprobe.open_run(out) as run:
        assert run["step"].tolist() == [0, 2, 4, 6]
        assert run["epoch"].tolist() == [0, 0, 1, 1]
        assert run.end == "finished"
        assert sorted(run.epochs_by_number()) == [0, 1]


def test_a_smaller_batch_after_a_lack_of_memory_begins_the_file_anew(train, tmp_path):
    class Large(Model):
        def forward(self, x, a, b):
            if len(x) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(x, a, b)

    out = tmp_path / "run.h5"
    gc.freeze()  # the Trainer collects garbage many times then: without all that tests have imported
    try:
        train(callback(out, every=4), model=Large, auto_find_batch_size=True)
    finally:
        gc.unfreeze()
    with gradprobe.open_run(out) as run:
        assert run["batch_size"].tolist() == [4] * 4
        assert run.end == "finished"


def test_weights_that_do_not_add_up_to_the_loss_are_told(train):
    with pytest.warns(RuntimeWarning, match=r"weighted losses of \['a', 'b'\] add up to .* weights="):
        train(callback(weights=None))


def test_a_model_without_losses_is_told_what_to_return(train):
    with pytest.raises(UsageError, match=r"hold no 'parts' that is \{task: value\}; return it from forward"):
        train(callback(losses="parts"))


def test_data_parallel_is_refused(transformers):
    class TwoGPUs:
        n_gpu = 2

    with pytest.raises(UsageError, match=r"over 2 GPUs with nn\.DataParallel"):
        callback().on_train_begin(TwoGPUs(), transformers.TrainerState(), None)
