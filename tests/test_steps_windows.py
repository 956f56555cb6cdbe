"""Which calls are one step: windows that end early, leftovers that are dropped, and one forward handed in by parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from steps import BATCH, Net, both, check, total
from zoo import Collector

from gradprobe.probes import GradientProbe, optimizer_steps
from gradprobe.rows import FIRST_CALL, MEASURED


def epochs_of_ten(by, update):
    """Two epochs of ten batches in windows of four; the last two are a step of their own, or dropped."""

    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer) if by == "optimizer" else attach(accumulate=4)
        step, window = 0, []
        for call in range(20):
            last = call % 10 == 9
            window.append(call)
            losses = model.losses(call)
            probe.record(losses, batch_size=BATCH)
            total(losses).backward()
            if (call % 10) % 4 == 3 or (last and update != "dropped"):
                expect(step, window)
                step, window = step + 1, []
                if update == "data":
                    for p in model.parameters():
                        p.data.add_(p.grad, alpha=-0.1)
                else:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=update != "zeros")
            elif last:
                window = []
                optimizer.zero_grad()

    return loop


@pytest.mark.parametrize("by", ["optimizer", "accumulate"])
@pytest.mark.parametrize("update", ["step", "dropped", "zeros"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_row_is_of_what_the_optimizer_took(by, update, every):
    rows, expected = both(epochs_of_ten(by, update), every=every)
    check(rows, {step: row for step, row in expected.items() if step % every == 0})


def test_a_window_that_an_update_through_data_ended():
    check(*both(epochs_of_ten("accumulate", "data")))


def test_calls_without_an_optimizer_are_steps_even_with_the_same_losses():
    def loop(model, attach, expect):
        probe = attach()
        losses = model.losses(0)
        for step in range(2):
            expect(step, [0])
            probe.record(losses)

    check(*both(loop))


@pytest.mark.parametrize(
    ("again", "each"), [("same", 1), ("same", 2), ("copied", 2), ("sums", 1), ("sums", 2), ("zeroed", 1)]
)
def test_losses_of_one_forward_that_are_handed_in_twice_are_one_micro_batch(again, each):
    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        for step in range(3):
            batches = range(each * step, each * (step + 1))
            expect(step, batches)
            kept = [torch.zeros_like(p) for p in model.parameters()]
            for batch in batches:
                losses = model.losses(batch)
                for task in losses:
                    given = {
                        "same": losses,
                        "copied": dict(losses),
                        "sums": {t: loss * 1.0 for t, loss in losses.items()},
                        "zeroed": losses,
                    }[again]
                    probe.record(given, batch_size=BATCH)
                    losses[task].backward(retain_graph=task == "a")
                    if again == "zeroed":  # a loop that puts its gradients together by itself
                        for own, p in zip(kept, model.parameters(), strict=True):
                            own += p.grad if p.grad is not None else 0
                        if (batch, task) != (batches[-1], "b"):
                            optimizer.zero_grad()
            if again == "zeroed":
                for own, p in zip(kept, model.parameters(), strict=True):
                    p.grad = own
            optimizer.step()
            optimizer.zero_grad()

    check(*both(loop), batch_size=BATCH * each)


def test_two_forwards_that_share_a_penalty_are_two_micro_batches():
    """It is one operation of both graphs, on the parameters that are shared."""

    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        for step in range(3):
            penalty = 0.1 * sum(p.square().sum() for p in model.trunk.parameters())
            plain, sums = model.losses, []
            model.losses = lambda batch, penalty=penalty, plain=plain: {
                t: loss + penalty for t, loss in plain(batch).items()
            }
            expect(step, [2 * step, 2 * step + 1])
            for batch in (2 * step, 2 * step + 1):
                losses = model.losses(batch)
                probe.record(losses, batch_size=BATCH)
                total(losses).backward(retain_graph=True)
                sums.append(float(total(losses).detach()))
            del model.losses
            assert np.isfinite(sums).all()
            optimizer.step()
            optimizer.zero_grad()

    check(*both(loop), batch_size=2 * BATCH)


@pytest.mark.parametrize("by", ["optimizer", "accumulate"])
@pytest.mark.parametrize("every", [1, 2])
def test_averaged_weights_that_are_swapped_in_within_a_window_end_no_step(by, every):
    """As an evaluation in the middle of it does: the parameters have been written to, and are what they were."""

    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer) if by == "optimizer" else attach(accumulate=2)
        averaged = [p.detach() * 0.5 for p in model.parameters()]
        for step in range(6):
            if step % every == 0:
                expect(step, [2 * step, 2 * step + 1])
            for batch in (2 * step, 2 * step + 1):
                losses = model.losses(batch)
                probe.record(losses, batch_size=BATCH)
                total(losses).backward()
                with torch.no_grad():
                    kept = [p.clone() for p in model.parameters()]
                    for values in (averaged, kept):
                        for p, value in zip(model.parameters(), values, strict=True):
                            p.copy_(value)
            optimizer.step()
            optimizer.zero_grad()

    check(*both(loop, every=every), batch_size=2 * BATCH)


def test_steps_that_come_to_have_more_calls_say_which_row_is_of_the_first_alone():
    """As in a warm-up of the number of micro-batches."""

    def loop(model, attach, expect):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(optimizer)
        for step, each in enumerate((1, 1, 2, 3, 1, 2)):
            window = [10 * step + call for call in range(each)]
            expect(step, window[:1] if step == 2 else window)
            for batch in window:
                losses = model.losses(batch)
                probe.record(losses, batch_size=BATCH)
                total(losses).backward()
            optimizer.step()
            optimizer.zero_grad()

    rows, expected = both(loop)
    assert [row.status for row in rows] == [MEASURED, MEASURED, FIRST_CALL, *[MEASURED] * 3]
    assert [row.batch_size for row in rows] == [BATCH * each for each in (1, 1, 1, 3, 1, 2)]
    check([replace(row, status=MEASURED) for row in rows], expected)


def test_a_step_that_the_loop_cannot_take_has_its_row_at_once():
    model, sink = Net().double(), Collector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientProbe(model, tuple(model.losses(0)), [sink], every=1, optimizer=optimizer) as probe:
        for step in range(3):
            losses = model.losses(step)
            if step == 2:
                probe.note(losses, None, "the loop stops here")
                assert sink.rows[-1].status == "the loop stops here"
                break
            probe.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
    assert [row.step for row in sink.rows] == [0, 1, 2]


def test_parameters_of_a_training_that_has_diverged_do_not_move_by_themselves():
    """NaN is not equal to itself: two looks at the same point must not tell a step."""
    nan = torch.tensor([1.0, float("nan")])
    assert optimizer_steps.same_numbers([nan], [nan.clone()])
    assert not optimizer_steps.same_numbers([nan], [torch.tensor([2.0, float("nan")])])
    assert not optimizer_steps.same_numbers([nan], [torch.tensor([1.0, 1.0])])
