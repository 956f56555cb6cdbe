"""Steps by whichever optimizer: made anew, one of several, in two stages, within the backward, or none at all."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from steps import BATCH, TASKS, Net, both, check, total
from torch.optim import optimizer as hooks_of
from zoo import Collector

import gradprobe
from gradprobe.probes import GradientProbe
from gradprobe.probes.clock import BY_HAND


def one_step(model, probe, optimizer, batch, use="record"):
    losses = model.losses(batch)
    if use == "backward":
        probe.backward(losses, batch_size=BATCH)
    else:
        probe.record(losses, batch_size=BATCH)
        total(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


OTHER = pytest.mark.filterwarnings("ignore:.*updated by .*, which is not the optimizer that the probe was given")


@OTHER
@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("every", [1, 4])
def test_an_optimizer_that_is_made_anew_is_followed(use, every):
    def loop(model, attach, expect):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        for step in range(12):
            if step == 3:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.025)
            if step % every == 0:
                expect(step, [step])
            one_step(model, probe, optimizer, step, use)

    rows, expected = both(loop, every=every)
    check(rows, expected)
    assert [row.lr for row in rows] == [0.1 if row.step < 3 else 0.025 for row in rows]


@OTHER
def test_updates_and_ledger_go_on_with_an_optimizer_that_is_made_anew(tmp_path):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"updates": True, "ledger": gradprobe.Ledger(), "every": 1, "optimizer": optimizer}
    with gradprobe.attach(model, TASKS, tmp_path / "run.h5", **options) as probe:
        for step in range(8):
            if step == 3:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            probe.backward(micro=[model.losses(step), model.losses(step + 100)])
            optimizer.step()
            optimizer.zero_grad()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert run.updates["step"].tolist() == list(range(8))
        assert [run.status_names[code] for code in run.updates["status"]] == ["measured"] * 8
        # An update is the sum of its parts, whichever optimizer made it.
        assert np.isfinite(run.updates["share"]).all()
        assert run.ledger["step"].tolist() == list(range(8))


def test_that_another_optimizer_steps_is_said_once():
    torch.manual_seed(0)
    model = Net().double()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with GradientProbe(model, TASKS, [Collector()], every=1, optimizer=first) as probe:
        one_step(model, probe, first, 0)
        with pytest.warns(RuntimeWarning, match="updated by SGD, which is not the optimizer"):
            one_step(model, probe, second, 1)
        one_step(model, probe, first, 2)
        one_step(model, probe, second, 3)


@OTHER
def test_an_optimizer_that_is_made_anew_in_a_loop_that_calls_only_when_due():
    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        called = []
        for step in range(20):
            if step == 7:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if probe.is_due if isinstance(probe, GradientProbe) else step % 5 == 0:
                called.append(step)
                expect(step, [step])
                probe.record(model.losses(step))
            total(model.losses(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert called == [0, 5, 10, 15]

    check(*both(loop, every=5))


@OTHER
def test_two_optimizers_that_step_on_the_shared_layers_in_turn():
    def loop(model, attach, expect):
        optimizers = [
            torch.optim.SGD([*model.trunk.parameters(), *head.parameters()], lr=lr)
            for head, lr in ((model.a, 0.1), (model.b, 0.05))
        ]
        probe = attach(optimizers[0])
        for step in range(8):
            expect(step, [step])
            one_step(model, probe, optimizers[step % 2], step)

    rows, expected = both(loop)
    check(rows, expected)
    assert [row.lr for row in rows] == [0.1, 0.05] * 4


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("sparse", [False, True])
def test_two_optimizers_that_share_the_parameters_between_them_make_one_step(order, sparse):
    """Matrices by one and biases by the other, say; the learning rate is that of the one that was given."""

    def loop(model, attach, expect):
        matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)
        biases = torch.optim.Adam([p for p in model.parameters() if p.ndim == 1], lr=0.01)
        probe = attach(matrices)
        for step in range(9):
            if step % 3 == 0:
                expect(step, [step])
            losses = model.losses(step)
            if not sparse or step % 3 == 0:
                probe.record(losses)
            total(losses).backward()
            for optimizer in (matrices, biases)[::order]:
                optimizer.step()
                optimizer.zero_grad()

    rows, expected = both(loop, every=3)
    check(rows, expected)
    assert {row.lr for row in rows} == {0.1}


class SAM(torch.optim.Optimizer):
    """As it is found in many repositories."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack(grads).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


@pytest.mark.parametrize("given", ["outer", "base"])
@pytest.mark.parametrize("probed", ["both", "first"])
@pytest.mark.parametrize("by", ["stages", "closure"])
@pytest.mark.parametrize("each", [1, 2])
def test_of_two_stages_the_row_is_of_the_first(given, probed, by, each):
    def loop(model, attach, expect):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        probe = attach(optimizer if given == "outer" else optimizer.base_optimizer)
        for step in range(6):
            batches = range(each * step, each * (step + 1))

            def evaluate(probe, batches=batches):
                for batch in batches:
                    losses = model.losses(batch)
                    if probe is not None:
                        probe.record(losses, batch_size=BATCH)
                    total(losses).backward()

            second = probe if probed == "both" else None
            expect(step, batches)
            evaluate(probe)
            if by == "closure":
                optimizer.step(lambda evaluate=evaluate, second=second: evaluate(second))
                optimizer.zero_grad()
            else:
                optimizer.first_step(zero_grad=True)
                evaluate(second)
                optimizer.second_step(zero_grad=True)

    check(*both(loop), batch_size=BATCH * each)


class Lookahead(torch.optim.Optimizer):
    """Without hooks of its own: it is made without its base class."""

    def __init__(self, inner):
        self.optimizer, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}
        self.slow, self.steps = [[p.detach().clone() for p in g["params"]] for g in inner.param_groups], 0

    def step(self, closure=None):
        result, self.steps = self.optimizer.step(closure), self.steps + 1
        if self.steps % 3 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, q in zip(group["params"], slow, strict=True):
                    p.data.copy_(q.add_(p.data - q, alpha=0.5))
        return result


@pytest.mark.parametrize("kind", ["wrapped", "compiled", "clamped"])
def test_steps_with_something_around_them(kind):
    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = Lookahead(optimizer) if kind == "wrapped" else optimizer
        probe = attach(outer)
        update = torch.compile(outer.step, backend="eager") if kind == "compiled" else outer.step
        for step in range(6):
            expect(step, [2 * step, 2 * step + 1])
            for batch in (2 * step, 2 * step + 1):
                losses = model.losses(batch)
                probe.record(losses)
                total(losses).backward()
            update()
            optimizer.zero_grad()
            for p in model.parameters() if kind == "clamped" else ():
                p.data.clamp_(-0.4, 0.4)

    check(*both(loop))


def test_a_loop_that_leaves_steps_out_by_itself():
    """The row of a step is of the call whose gradient was taken, not of one before it that was dropped."""

    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        step = 0
        for batch in range(9):
            taken = batch % 3 != 1
            if taken:
                expect(step, [batch])
            losses = model.losses(batch)
            probe.record(losses)
            total(losses).backward()
            if taken:
                optimizer.step()
                step += 1
            optimizer.zero_grad()

    check(*both(loop))


@pytest.mark.parametrize("how", ["data", "in place", "replaced"])
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.filterwarnings("ignore:.*the shared parameters change from call to call")
def test_parameters_that_are_updated_by_hand(how, optimized):
    """No optimizer is asked, so the first update goes unnoticed; no row is of two points, and rows go on."""
    at = {}

    def loop(model, attach, expect):
        probe = attach(torch.optim.SGD(model.parameters(), lr=0.1) if optimized else None)
        for step in range(12):
            at[step] = probe.step
            expect(step, [step])
            losses = model.losses(step)
            probe.record(losses)
            total(losses).backward()
            for p in model.parameters():
                if how == "data":
                    p.data -= 0.1 * p.grad
                elif how == "replaced":
                    p.data = p.data - 0.1 * p.grad
                else:
                    with torch.no_grad():
                        p -= 0.1 * p.grad
                p.grad = None

    rows, expected = both(loop)
    missing = {1} if optimized else set()
    check(rows, {step: row for step, row in expected.items() if step not in missing})


def test_that_parameters_are_updated_by_hand_is_said_once():
    def by_hand(batch):
        losses = model.losses(batch)
        probe.record(losses)
        total(losses).backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None

    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientProbe(model, TASKS, [Collector()], every=1, optimizer=optimizer) as probe:
        by_hand(0)
        by_hand(1)
        with pytest.warns(RuntimeWarning, match=BY_HAND[:60]):
            by_hand(2)
        by_hand(3)


@pytest.mark.filterwarnings("ignore:.*the shared parameters change from call to call")
def test_updates_by_hand_that_begin_where_nothing_is_measured_are_found_in_the_end():
    """Through ``.data``, after an optimizer's steps, in a loop whose steps are seldom due."""
    model, sink = Net().double(), Collector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientProbe(model, TASKS, [sink], every=10, optimizer=optimizer) as probe:
        for step in range(100):
            losses = model.losses(step)
            probe.record(losses)
            total(losses).backward()
            if step < 13:
                optimizer.step()
            else:
                for p in model.parameters():
                    p.data -= 0.1 * p.grad
            optimizer.zero_grad()
    assert len(sink.rows) > 5


def test_a_wait_without_end_is_said():
    model = Net().double()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    losses = model.losses(0)
    with GradientProbe(model, TASKS, [Collector()], every=1, optimizer=other) as probe:
        for _ in range(1023):
            probe.record(losses)
        with pytest.warns(RuntimeWarning, match="no optimizer has stepped"):
            probe.record(losses)
        probe.record(losses)


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("optimized", [True, False])
def test_steps_within_the_backward_are_of_the_call_that_made_them(use, optimized):
    """Each parameter has an optimizer, which steps as soon as its gradient is there."""

    def loop(model, attach, expect):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def update(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        probe = attach(optimizers[model.trunk[0].weight] if optimized else None)
        for step in range(6):
            expect(step, [step])
            losses = model.losses(step)
            if use == "backward" and step == 0:  # derived rows of such a training are another matter
                probe.backward(losses)
            else:
                probe.record(losses)
                total(losses).backward()

    check(*both(loop))


def test_optimizers_of_others_are_left_alone():
    model, other = Net().double(), torch.nn.Linear(3, 1)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    with GradientProbe(model, TASKS, [Collector()], every=1, optimizer=mine) as probe:
        probe.record(model.losses(0))
        theirs.step()
        assert probe.step == 0
        assert not theirs._optimizer_step_pre_hooks
        mine.step()
        assert probe.step == 1


def test_no_hook_is_left_behind():
    def hooks(*optimizers):
        own = [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers]
        everywhere = len(hooks_of._global_optimizer_pre_hooks) + len(hooks_of._global_optimizer_post_hooks)
        return [everywhere, *own]

    model = Net().double()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    before = hooks(first, second)
    probe = GradientProbe(model, TASKS, [Collector()], every=1, optimizer=first)
    with pytest.warns(RuntimeWarning, match="updated by SGD"):
        one_step(model, probe, second, 0)
    assert hooks(first, second) != before
    probe.close()
    assert hooks(first, second) == before
    probe = GradientProbe(model, TASKS, [Collector()], every=1, optimizer=first)
    del probe  # lost without being closed
    gc.collect()
    assert hooks(first, second) == before


def test_a_step_in_a_step_counts_once():
    class Inner(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)  # whose step has hooks from here on
    model = Net().double()
    optimizer = Inner(model.parameters(), 0.1)
    with GradientProbe(model, TASKS, [Collector()], every=1, optimizer=optimizer) as probe:
        for step in range(3):
            assert probe.step == step
            one_step(model, probe, optimizer, step)


def test_a_call_that_is_not_due_costs_next_to_nothing():
    """What is done besides asking the clock: some twenty version counters. No more than a thousand take to read."""
    import time

    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(100)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientProbe(model, TASKS, [Collector()], every=10_000, optimizer=optimizer) as probe:
        z = model(torch.randn(2, 4))
        losses = {"a": z.mean(), "b": z.square().mean()}
        probe.record(losses)
        optimizer.step()
        parameters = list(model.parameters())

        def seconds(act):
            begun = time.perf_counter()
            for _ in itertools.repeat(None, 50):
                act()
            return time.perf_counter() - begun

        calls, reads = [], []
        for _ in range(20):  # in turns, so that what else the machine does slows both down
            calls.append(seconds(lambda: probe.record(losses)))
            reads.append(seconds(lambda: [parameter._version for parameter in parameters]))
    assert min(calls) < 5 * min(reads)


def test_learning_rates_that_are_not_there_are_nan():
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    model, sink = Net().double(), Collector()
    optimizer = Rateless(model.parameters())
    with GradientProbe(model, TASKS, [sink], every=1, optimizer=optimizer) as probe:
        one_step(model, probe, optimizer, 0)
    assert np.isnan(sink.rows[0].lr)
