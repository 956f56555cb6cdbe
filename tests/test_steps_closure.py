"""Forward and backward inside the optimizer's step: the gradient is whole after the closure's first evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steps import BATCH, TASKS, Net, both, check, total

import gradprobe

MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


class Wrapper:
    """As accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def calls_in_a_closure(make, each, use, given):
    """All but the last of a step's calls come before its closure, which makes the last one."""

    def loop(model, attach, expect):
        optimizer = make(model.parameters())
        stepping = Wrapper(optimizer) if given == "wrapped" else optimizer
        if given == "scheduled":  # a scheduler puts a step of its own in the optimizer's place
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        probe = attach(stepping)
        for step in range(4):
            batches = range(each * step, each * (step + 1))
            evaluations = 0

            def call(batch, probe=probe):
                losses = {task: loss / each for task, loss in model.losses(batch).items()}
                if use == "backward":
                    probe.backward(losses, batch_size=BATCH)
                else:
                    probe.record(losses, batch_size=BATCH)
                    total(losses).backward()
                return total(losses)

            def closure(batches=batches, call=call):
                nonlocal evaluations
                evaluations += 1
                if each == 1 or evaluations > 1:
                    optimizer.zero_grad()
                return call(batches[-1]) * 1.0

            expect(step, batches)
            for batch in batches[:-1]:
                call(batch)
            result = stepping.step(closure) if given == "first" else stepping.step(closure=closure)
            assert isinstance(result, torch.Tensor)
            optimizer.zero_grad()

    return loop


@pytest.mark.parametrize("use", ["record", "backward"])
@pytest.mark.parametrize("given", ["first", "by name", "wrapped", "scheduled"])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_call_in_the_closure_is_in_the_row(make, each, use, given):
    rows, expected = both(calls_in_a_closure(make, each, use, given))
    expected = {step: (g / each**2, n / each**2, k) for step, (g, n, k) in expected.items()}
    check(rows, expected, batch_size=BATCH * each)


def test_an_exception_in_the_closure_is_the_loops_own_and_the_next_steps_are_measured():
    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        for batch in range(4):

            def closure(batch=batch):
                optimizer.zero_grad()
                if batch == 1:
                    raise MemoryError("no")
                losses = model.losses(batch)
                probe.record(losses)
                total(losses).backward()

            if batch != 1:
                expect(batch - (batch > 1), [batch])
            try:
                optimizer.step(closure)
            except MemoryError:
                assert batch == 1

    check(*both(loop))


def test_updates_and_ledger_of_a_closure_are_those_of_the_plain_loop(tmp_path):
    found = []
    for name in ("plain", "closure"):
        torch.manual_seed(0)
        model = Net().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        options = {"updates": True, "ledger": gradprobe.Ledger(), "every": 1, "optimizer": optimizer}
        with gradprobe.attach(model, TASKS, tmp_path / f"{name}.h5", **options) as probe:
            for step in range(5):

                def closure(step=step, probe=probe, optimizer=optimizer, model=model):
                    optimizer.zero_grad()
                    losses = model.losses(step)
                    probe.backward(micro=[losses, model.losses(step + 100)])
                    return total(losses)

                if name == "plain":
                    closure()
                    optimizer.step()
                else:
                    optimizer.step(closure)
        with gradprobe.open_run(tmp_path / f"{name}.h5") as run:
            found.append(
                {"norms": run["grad_norm"], **run.updates, **{f"ledger {k}": v for k, v in run.ledger.items()}}
            )
            assert [run.status_names[code] for code in run.updates["status"]] == ["measured"] * 5
    plain, closure = found
    assert np.isfinite(plain["effect"]).all()
    assert len(plain["ledger term"]) == 5
    for name in plain.keys() - {"time", "overhead", "ledger time", "ledger overhead"}:
        np.testing.assert_array_equal(plain[name], closure[name], err_msg=name)
