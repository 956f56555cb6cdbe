"""Every door is found and named where it is the only one open, and together with another."""

from __future__ import annotations

import copy
import importlib.util
import math
import random

import numpy as np
import pytest
import torch
from audit_zoo import Training, factory
from torch import nn

from gradprobe.audit import AuditOptions, Experiment, audit, differences
from gradprobe.audit.attribution import attribute
from gradprobe.audit.differences import FirstDifference
from gradprobe.audit.doors import DOORS as DOORS_TRIED
from gradprobe.audit.pair import PairOutcome
from gradprobe.audit.streams import OwnStreams
from gradprobe.errors import UsageError

DOORS = {
    "dropout": ("random stream", "material"),
    "loader": ("random stream", "material"),
    "python": ("random stream", "material"),
    "numpy": ("random stream", "material"),
    "zero": ("zero gradient", "material"),
    "scaler": ("scaler", "material"),
    "nonfinite": ("non-finite", "non-finite"),
    "buffers": ("running statistics", "buffers only"),
    "batch": ("batch statistics", "material"),
    "clip": ("clipping", "material"),
    "renormalised": ("renormalised weights", "material"),
    "mean": ("mean over tasks", "material"),
    "schedule": ("schedule", "material"),
    "best": ("decision", "material"),
    "stop": ("decision", "material"),
    "accumulation": ("accumulation", "material"),
    "data": ("data", "material"),
}


def slow(*cases):
    """Cases of a test that the soak alone tries."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def names(found):
    return {finding.name for finding in found.attribution.open}


@pytest.mark.parametrize("door", DOORS)
def test_the_only_open_door_is_found_and_named(door):
    name, kind = DOORS[door]
    steps = 8 if door == "schedule" else 5  # before that the plateau of the loss is none
    found = audit(factory(door), "cls", AuditOptions(steps=steps))
    assert found.same_twice.kind == "clean"
    assert found.outcome.kind == kind
    assert names(found) == {name}
    assert found.attribution.explained
    # Of a batch with other rows behind its own, sums over threads may be rounded otherwise.
    assert found.attribution.remainder in (("clean", "numeric") if door == "batch" else ("clean",))
    assert found.outcome.first_differences
    assert name in found.sentence


@pytest.mark.parametrize(
    "pair",
    [
        "mean batch",
        "zero schedule",
        "renormalised dropout",
        "nonfinite buffers",
        "accumulation data",
        "numpy stop",
        "clip dropout scaler schedule",
        *slow(
            "clip dropout",
            "data clip",
            "buffers clip",
            "loader mean",
            "scaler dropout",
            "batch schedule",
            "best mean",
            "python schedule",
            "scaler stop",
        ),
    ],
)
def test_open_doors_are_all_named(pair):
    doors = pair.split()
    found = audit(factory(*doors), "cls", AuditOptions(steps=5))
    assert names(found) == {DOORS[door][0] for door in doors}
    assert not any(finding.restores for finding in found.attribution.findings)
    for finding in found.attribution.open:  # alone, each is a difference of its own
        assert "step" in finding.evidence or "weight" in finding.evidence


@pytest.mark.parametrize(("stage", "named"), [("clip", "clipping"), ("forward", "batch statistics")])
def test_of_two_doors_that_explain_alone_the_stage_tells(stage, named):
    """As on YOLOv5: in BatchNorm's evaluation mode its gradients are too small to be clipped, so both explain."""

    def outcome(kind):
        seen = (
            [FirstDifference(0, stage, "x", differences.distance(torch.ones(2), torch.zeros(2)))]
            if kind == "material"
            else []
        )
        one = np.ones(1) if seen else np.zeros(1)
        return PairOutcome(kind, 1, one, one, first_differences=seen, acted=1)

    def run(shut):
        return outcome("clean" if {d.name for d in shut} & {"batch statistics", "clipping"} else "material")

    found = attribute(outcome("material"), DOORS_TRIED, run)
    assert [finding.door.name for finding in found.open] == [named]
    assert {f.door.name for f in found.findings if f.restores} == {"batch statistics", "clipping"}


def test_a_stream_of_its_own_is_named_only_where_nothing_else_explains():
    """Held shut, it draws other data, on which a schedule may happen to see no difference."""

    def run(shut):
        names = {d.name for d in shut}
        gone = "batch statistics" in names and names & {"schedule", "random stream"}
        size = np.zeros(1) if gone else np.ones(1)
        return PairOutcome("clean" if gone else "material", 1, size, size, acted=1)

    found = attribute(run([]), DOORS_TRIED, run)
    assert [finding.door.name for finding in found.open] == ["batch statistics", "schedule"]


def test_streams_do_not_depend_on_the_folder_that_the_code_is_in(tmp_path):
    drawn = []
    for folder in ("one", "two"):
        path = tmp_path / folder / "training.py"
        path.parent.mkdir()
        path.write_text("import torch\n\ndef draw():\n    return torch.rand(4)\n")
        spec = importlib.util.spec_from_file_location("training", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with OwnStreams(0, []):
            drawn.append(module.draw())
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("module", "same"), [("gradprobe.audit.arm", True), ("training", False)])
def test_streams_depend_on_the_lines_of_the_training_and_not_on_the_audit_s_own(module, same):
    drawn = []
    for above in ("", "\n\n"):
        within = {"__name__": module}
        exec(compile(f"{above}def through(draw):\n    return draw()", f"{module}.py", "exec"), within)
        with OwnStreams(0, []):
            drawn.append(within["through"](lambda: torch.rand(4)))
    assert torch.equal(*drawn) is same


def test_what_no_door_explains_is_said():
    one = np.ones(1)
    outcome = PairOutcome("material", 1, one, one, acted=1)
    found = attribute(outcome, DOORS_TRIED, lambda shut: outcome)
    assert not found.explained
    assert found.open == []


@pytest.mark.parametrize("seed", [*range(5), *slow(*range(5, 20))])
def test_nothing_is_found_in_a_clean_training(seed):
    """Random widths, layers, optimizers, batches; a step that does what it should."""
    draw = random.Random(seed)
    width, optimizer = draw.choice([3, 8, 17]), draw.choice(["sgd", "adam", "plain", "rmsprop"])
    activation, norm, depth = draw.choice([nn.ReLU, nn.SiLU]), draw.choice([None, nn.BatchNorm2d]), draw.randint(1, 3)
    clip, cosine, size = draw.random() < 0.5, draw.random() < 0.5, draw.choice([2, 5])

    def make():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for k in range(depth):
            layers += [nn.Conv2d(3 if k == 0 else width, width, 3, padding=1), norm(width) if norm else nn.Identity()]
            layers.append(activation())
        net = nn.ModuleDict(
            {"trunk": nn.Sequential(*layers), "det": nn.Conv2d(width, 2, 1), "cls": nn.Linear(width, 4)}
        )
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
            "plain": lambda p: torch.optim.SGD(p, lr=0.1),
            "adam": lambda p: torch.optim.AdamW(p, lr=1e-2),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
        }
        opt = kinds[optimizer](net.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50) if cosine else None
        stream = torch.Generator().manual_seed(1)
        batches = [torch.randn(size, 3, 6, 6, generator=stream) for _ in range(3)]

        def step(trace, x, weights):
            z = net["trunk"](x)
            losses = {"det": net["det"](z).square().mean()}
            if "cls" in weights:
                scores = net["cls"](z.mean((2, 3)))
                losses["cls"] = nn.functional.cross_entropy(scores, torch.arange(len(x)) % 4)
            losses = trace.losses(losses)
            opt.zero_grad()
            sum(weights[t] * losses[t] for t in losses).backward()
            if clip:  # each task's own parameters apart, as the remedy says
                nn.utils.clip_grad_norm_([*net["trunk"].parameters(), *net["det"].parameters()], 0.1)
            opt.step()
            if schedule is not None:
                schedule.step()

        return Experiment(net, opt, batches, step, {"det": 1.0, "cls": 0.5}, schedule=schedule)

    found = audit(make, "cls", AuditOptions(steps=12))
    assert found.clean
    assert found.outcome.steps == 12
    assert found.sentence.startswith("Clean: bitwise equal for 12 steps.")
    assert found.attribution.open == []
    for before, after in (*found.outcome.effect["training"].values(), *found.outcome.effect["evaluation"].values()):
        assert before == after


def test_objects_end_as_they_began():
    """The factory hands out the same objects for every arm."""
    training = Training({"clip", "dropout", "scaler", "schedule"}, norm=True)
    experiment = training.experiment()
    for parameter in training.net.parameters():
        parameter.grad = torch.randn_like(parameter)
    training.net.det.eval()
    before = {
        "model": copy.deepcopy(training.net.state_dict()),
        "grad": [p.grad.clone() for p in training.net.parameters()],
        "optimizer": copy.deepcopy(training.optimizer.state_dict()),
        "scaler": training.scaler.state_dict(),
        "plateau": copy.deepcopy(training.plateau.state_dict()),
        "modes": [m.training for m in training.net.modules()],
        "own": {o: sorted(vars(o)) for o in (training.optimizer, training.scaler, training.net)},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in training.net.modules()],
    }
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    backward, made = torch.autograd.backward, training.made
    found = audit(lambda: experiment, "cls", AuditOptions(steps=4, dose=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert found.outcome.kind == "material"
    assert training.made > made
    assert torch.autograd.backward is backward
    assert str(before["optimizer"]) == str(training.optimizer.state_dict())
    assert before["scaler"] == training.scaler.state_dict()
    assert before["plateau"] == training.plateau.state_dict()
    assert before["modes"] == [m.training for m in training.net.modules()]
    assert before["own"] == {o: sorted(vars(o)) for o in (training.optimizer, training.scaler, training.net)}
    assert before["hooks"] == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in training.net.modules()]
    for name, tensor in training.net.state_dict().items():
        assert torch.equal(tensor, before["model"][name])
    for parameter, gradient in zip(training.net.parameters(), before["grad"], strict=True):
        assert torch.equal(parameter.grad, gradient)


def apart(optimizer):
    """The trunk has features that the detector does not use. A schedule warns where its optimizer does not step."""

    def make():
        torch.manual_seed(0)
        net = nn.ModuleDict({"trunk": nn.Linear(6, 8), "det": nn.Linear(4, 1), "cls": nn.Linear(8, 1)})
        opt = optimizer(net.parameters())
        x = torch.randn(16, 6)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)

        def step(trace, batch, weights):
            z = net["trunk"](batch).tanh()
            losses = {"det": (net["det"](z[:, :4]) - 1).square().mean()}
            if "cls" in weights:
                losses["cls"] = (net["cls"](z) + 1).square().mean()
            losses = trace.losses(losses)
            opt.zero_grad()
            sum(weights[t] * losses[t] for t in losses).backward()
            opt.step()
            schedule.step()

        return Experiment(net, opt, [x], step, {"det": 1.0, "cls": 1.0}, schedule=schedule)

    return make


def test_a_tiny_weight_is_not_tiny_under_adam():
    found = audit(apart(lambda p: torch.optim.Adam(p, lr=1e-2)), "cls", AuditOptions(steps=8, weight=1e-5, dose=True))
    assert {"direct", "adam"} == names(found)
    assert found.outcome.largest > 0.1
    assert found.dose.kind == "scale-free"
    assert found.dose.kinds[0] == "clean"


def test_a_tiny_weight_is_tiny_under_gradient_descent():
    found = audit(apart(lambda p: torch.optim.SGD(p, lr=0.1)), "cls", AuditOptions(steps=8, weight=1e-3, dose=True))
    assert names(found) == {"direct"}
    assert found.dose.kind == "linear"
    assert found.dose.slope == pytest.approx(1, abs=0.1)


def test_a_door_besides_the_tasks_own_gradient_is_named_at_weights_above_0():
    found = audit(factory("dropout"), "cls", AuditOptions(steps=6, weight=0.1))
    assert names(found) == {"random stream", "direct"}


def test_a_structural_door_has_an_intercept():
    assert audit(factory("mean"), "cls", AuditOptions(steps=6, dose=True, attribute=False)).dose.kind == "structural"


def test_other_combinations_of_gradients_are_told_from_weights():
    def make():
        experiment = Training(set()).experiment()
        inner = experiment.step

        def step(trace, batch, weights):
            class Turned:
                def losses(self, losses):
                    return trace.losses(losses)

                def decide(self, name, value):
                    return value

            handles = [
                p.register_hook(lambda g: g.sign() if "cls" in weights else g) for p in experiment.model.parameters()
            ]
            inner(Turned(), batch, weights)
            for handle in handles:
                handle.remove()

        experiment.step = step
        return experiment

    found = audit(make, "cls", AuditOptions(steps=4))
    assert not found.clean


def test_parameters_of_the_task_alone_are_no_finding():
    """Decay moves the classifier's own head where the loss is there at weight 0; the detector does not mind."""
    found = audit(factory(optimizer="adam"), "cls", AuditOptions(steps=5))
    assert found.clean


def test_a_frozen_part_that_the_task_thaws_is_found():
    """The detector uses the trunk without training it; the classifier at weight 0 makes decay move it."""

    def make():
        torch.manual_seed(0)
        net = nn.ModuleDict({"trunk": nn.Linear(6, 8), "det": nn.Linear(8, 1), "cls": nn.Linear(8, 1)})
        opt = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        x = torch.randn(16, 6)

        def step(trace, batch, weights):
            z = net["trunk"](batch)
            losses = {"det": (net["det"](z.detach()) - 1).square().mean()}
            if "cls" in weights:
                losses["cls"] = (net["cls"](z) + 1).square().mean()
            losses = trace.losses(losses)
            opt.zero_grad()
            sum(weights[t] * losses[t] for t in losses).backward()
            opt.step()

        return Experiment(net, opt, [x], step, {"det": 1.0, "cls": 1.0})

    found = audit(make, "cls", AuditOptions(steps=5))
    assert names(found) == {"zero gradient"}


def test_a_training_that_differs_from_itself_says_so():
    count = iter(range(10_000))

    def make():
        experiment = Training(set()).experiment()
        inner = experiment.step

        def step(trace, batch, weights):
            with torch.no_grad():
                next(experiment.model.parameters()).mul_(1 + 2**-21 * (next(count) % 3))
            inner(trace, batch, weights)

        experiment.step = step
        return experiment

    found = audit(make, "cls", AuditOptions(steps=4, attribute=False))
    assert found.same_twice.kind != "clean"
    assert "not bitwise equal" in found.notes[0]


@pytest.mark.parametrize(
    ("make", "task", "options", "said"),
    [
        (factory(), "seg", {}, "no such task"),
        (factory(), "cls", {"steps": 0}, "at least 1 step"),
        (factory(), "cls", {"weight": math.nan}, "finite weight"),
        (lambda: 3, "cls", {}, "returned a int"),
    ],
)
def test_wrong_calls_say_what_to_do(make, task, options, said):
    with pytest.raises(UsageError, match=said):
        audit(make, task, AuditOptions(**options))


def test_a_step_that_hands_over_no_losses_is_refused():
    def make():
        experiment = Training(set()).experiment()
        experiment.step = lambda trace, batch, weights: None
        return experiment

    with pytest.raises(UsageError, match=r"trace\.losses"):
        audit(make, "cls", AuditOptions(steps=2))


def test_rounding_is_what_does_not_grow():
    steps = np.arange(1, 31)
    assert differences.only_rounding(2.0 * steps)
    assert not differences.only_rounding(2.0 * 1.5**steps)
    assert differences.only_rounding(np.full(30, 50.0), envelope=60.0)


@pytest.mark.parametrize(
    ("displacement", "kind"),
    [
        ([0.2, 0.2, 0.2, 0.2, 0.2, 0.3], "structural"),
        ([0, 0, 1e-6, 1e-4, 1e-2, 0.8], "linear"),
        ([0, 0.1, 0.1, 0.1, 0.1, 0.4], "scale-free"),
        ([0, 0, 0, 1e-2, 1e-1, 0.8], "mixed"),
        ([0] * 6, "clean"),
        ([math.nan] * 6, "structural"),
    ],
)
def test_the_kind_of_a_dose(displacement, kind):
    assert differences.dose_kind((0, 1e-8, 1e-6, 1e-4, 1e-2, 1), displacement)[0] == kind
