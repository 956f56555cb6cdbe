"""What holds of every trainer and every figure that there is: a new entry of a registry is tested at once."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
import torch
from run_factory import make_run
from torch import nn

from gradprobe import open_run, plots
from gradprobe.errors import RunFileError
from gradprobe.trainers.balancer import Setup, find_balancer
from gradprobe.trainers.registry import TRAINERS
from gradprobe.trainers.settings import resolve

TASKS = ("a", "b", "c")
NEEDED = {
    "single": {"task": "b"},
    "gradnorm-static": {"from_run": "x.h5"},
    "split": {"from_run": "x.h5", "double": ("trunk",)},
}
"""What some trainers must be told."""

DRAWN = {
    "rlw": "draws one number after the other, for the tasks in their order",
    "pcgrad": "draws in which order the others' gradients are removed",
    "gradvac": "draws in which order the others' gradients are turned",
}
"""Whose weights hang on the order of the tasks, and why."""

trainers = pytest.mark.parametrize("name", TRAINERS)
no_answer = pytest.mark.filterwarnings("ignore:.* had no answer at step:RuntimeWarning")


class Toy(nn.Module):
    """A linear trunk that three tasks pull in different directions, with heads of their own."""

    last_shared_layer = "trunk"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.trunk = nn.Linear(5, 4).double()
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1).double() for task in TASKS})
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def losses(self, step, flat=()):
        """Those of ``flat`` have gradients that are exactly zero."""
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        z = self.trunk(x)
        wanted = {"a": x[:, :1], "b": x[:, 1:2] - 2 * x[:, :1], "c": 3 * x[:, 1:2]}
        losses = {task: (self.heads[task](z) - wanted[task]).square().mean() for task in TASKS}
        return {task: 0 * loss + 1 if task in flat else loss for task, loss in losses.items()}


class Training:
    """The loop of one trainer, two steps to an epoch."""

    def __init__(self, name, tasks=TASKS) -> None:
        self.model, self.tasks, self.kind = Toy(), tasks, find_balancer(name)
        asked = resolve({"trainer": name, "data": "dial", **NEEDED.get(name, {})})
        weights = {"a": 1.0, "b": 0.5, "c": 2.0}
        settings = dataclasses.replace(asked, task_weights=tuple(weights[task] for task in tasks))
        self.kind.require(settings)
        self.balancer = self.kind.create(self.model, Setup(settings, tasks, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def run(self, steps, flat=()):
        """The weights of each step."""
        found = []
        for step in steps:
            losses = self.model.losses(step, flat)
            weights = self.balancer.step(losses)
            self.optimizer.zero_grad()
            sum(weights[task] * losses[task] for task in self.tasks).backward()
            self.balancer.after_backward()
            self.optimizer.step()
            found.append(weights)
        return found

    def saved(self):
        """Its state, as a checkpoint gives it back."""
        file = io.BytesIO()
        torch.save((self.model.state_dict(), self.balancer.state_dict()), file)
        file.seek(0)
        return torch.load(file, weights_only=True)


@trainers
def test_weights_are_finite_and_not_negative_unless_the_trainer_says_that_they_may_be(name):
    training = Training(name)
    for weights in training.run(range(6)):
        assert set(weights) == set(TASKS)
        assert all(map(math.isfinite, weights.values())), weights
        assert training.kind.signed or (min(weights.values()) >= 0 < max(weights.values())), weights


@trainers
def test_the_order_of_the_tasks_does_not_matter(name):
    if name in DRAWN:
        pytest.skip(DRAWN[name])
    ordered, turned = (Training(name, tasks).run(range(6)) for tasks in (TASKS, ("c", "a", "b")))
    tolerance = 1e-7 if name == "nash" else 1e-10  # that is how far its solver goes
    for one, other in zip(ordered, turned, strict=True):
        assert other == pytest.approx(one, rel=tolerance)


@no_answer
@trainers
@pytest.mark.parametrize("flat", [("a",), ("b", "c"), TASKS])
def test_a_gradient_that_is_exactly_zero_makes_no_step_nan(name, flat):
    training = Training(name)
    assert all(math.isfinite(value) for weights in training.run(range(4), flat) for value in weights.values())
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


@trainers
@pytest.mark.parametrize("stop", [1, 4])
def test_a_trainer_goes_on_from_its_state_to_the_bit(name, stop):
    whole, first, second = (Training(name) for _ in range(3))
    expected = whole.run(range(7))
    assert first.run(range(stop)) == expected[:stop]
    model, state = first.saved()
    second.model.load_state_dict(model)
    second.balancer.load_state_dict(state)
    assert second.run(range(stop, 7)) == expected[stop:]


figures = pytest.mark.parametrize("what", plots.WHAT)


@figures
def test_a_figure_is_drawn_where_every_table_is_there_or_says_what_is_not(what):
    path = Path(__file__).parent / "fixtures" / "all-tables-1.0.h5"
    with open_run(path) as run:
        try:
            _, tables = plots.make(run, what)
        except RunFileError as error:
            tables, said = {}, str(error)
        assert all(len(table) for table in tables.values())
        assert tables or re.match(rf"{re.escape(str(path))}: .{{10,}}\.$", said, re.DOTALL), said


@figures
def test_a_figure_of_a_run_without_rows_says_that_it_holds_none(what, tmp_path):
    with open_run(make_run(tmp_path / "run.h5", rows=0, epochs=0)) as run:
        if what == "overview":  # is always drawn, and its panels say it
            figure, _ = plots.make(run)
            assert all(any(text.get_gid() == "unavailable" for text in ax.texts) for ax in figure.get_axes())
            return
        with pytest.raises(RunFileError, match=r"run\.h5: .*it holds 0 rows"):
            plots.make(run, what)
