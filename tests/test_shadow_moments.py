"""Shadow moments against real optimizers that are fed with the same gradients at other weights."""

from __future__ import annotations

import pytest
import torch

from gradprobe.errors import UsageError
from gradprobe.forks.shadow_moments import ShadowMoments

SHAPES = ((4, 3), (5,), (2, 2, 3))
JOINT, OTHERS = (1.0, 0.5, 2.0), ((1.0, 0.0, 2.0), (0.0, 1.0, 0.0), (0.3, 4.0, 0.1))

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "dampening, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3),
    "adam, betas": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), weight_decay=0.1),
    "adam, decoupled": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "groups": lambda p: torch.optim.Adam(
        [
            {"params": p[:1], "weight_decay": 0.2, "betas": (0.8, 0.99)},
            {"params": p[1:], "lr": 0.1},
        ]
    ),
}


def tensors(dtype, draw):
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in SHAPES]


def same_gradients(make, dtype, steps=40, absent=lambda step, task, place: False, each=lambda step, p: None):
    """A training at the joint weights with its shadows; and, per other weights, an optimizer that had their gradients.

    Every optimizer finds the parameters of the training before its step: weight decay is of those.
    """
    draw = torch.Generator().manual_seed(5)
    began = tensors(dtype, draw)

    def parameters():
        return [torch.nn.Parameter(p.clone()) for p in began]

    main = parameters()
    optimizer = make(main)
    shadow = ShadowMoments(optimizer, len(JOINT))
    others = {weights: parameters() for weights in OTHERS}
    replayed = {weights: make(p) for weights, p in others.items()}
    for step in range(steps):
        each(step, [optimizer, *replayed.values()])
        tasks = [tensors(dtype, draw) for _ in JOINT]
        there = [[not absent(step, t, place) for place in range(len(SHAPES))] for t in range(len(JOINT))]
        for weights, own in ((JOINT, main), *others.items()):
            for place, p in enumerate(own):
                p.data.copy_(main[place].data) if own is not main else None
                parts = [w * g[place] for w, g, here in zip(weights, tasks, there, strict=True) if here[place]]
                p.grad = sum(parts) if parts else None
        shadow.add(
            [{p: g for p, g, here in zip(main, gs, h, strict=True) if here} for gs, h in zip(tasks, there, strict=True)]
        )
        for one in replayed.values():
            one.step()
        optimizer.step()
    return optimizer, shadow, replayed


def states(optimizer):
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def assert_states_equal(found, expected, tolerance):
    for mine, theirs in zip(states(found), states(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                size = float(value.abs().max()) or 1.0
                assert float((mine[name] - value).abs().max()) <= tolerance * size, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_other_weights_is_that_of_an_optimizer_that_had_them(name, dtype, tolerance):
    optimizer, shadow, replayed = same_gradients(OPTIMIZERS[name], dtype)
    assert shadow.error(JOINT) <= tolerance
    for weights, other in replayed.items():
        shadow.put(weights)
        assert_states_equal(optimizer, other, tolerance)


@pytest.mark.parametrize("name", ["momentum, decay", "dampening, decay", "adam, decay", "adamw"])
def test_a_parameter_without_a_gradient_waits(name):
    """The second is reached by nobody for ten steps; the third by task 0 alone, and later by all."""

    def absent(step, task, place):
        return (place == 1 and step < 10) or (place == 2 and task > 0 and step < 20) or (place == 0 and task == 1)

    optimizer, shadow, replayed = same_gradients(OPTIMIZERS[name], torch.float64, absent=absent)
    assert shadow.error(JOINT) <= 1e-12
    for weights, other in replayed.items():
        shadow.put(weights)
        assert_states_equal(optimizer, other, 1e-12)


def test_hyperparameters_may_move():
    def each(step, optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.01 / (1 + step), 0.01 * step

    optimizer, shadow, replayed = same_gradients(OPTIMIZERS["adam, decay"], torch.float64, each=each)
    for weights, other in replayed.items():
        shadow.put(weights)
        assert_states_equal(optimizer, other, 1e-12)


def test_the_second_moment_may_be_of_other_weights():
    optimizer, shadow, replayed = same_gradients(OPTIMIZERS["adam"], torch.float64)
    shadow.put(OTHERS[0], OTHERS[1])
    for mine, first, second in zip(*map(states, (optimizer, *list(replayed.values())[:2])), strict=True):
        torch.testing.assert_close(mine["exp_avg"], first["exp_avg"], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine["exp_avg_sq"], second["exp_avg_sq"], rtol=1e-12, atol=1e-14)


def test_a_second_moment_of_0_is_not_put_where_it_would_divide():
    """Task 1, alone in the second moment, never acts on the first parameter."""
    absent = lambda step, task, place: place == 0 and task == 1  # noqa: E731
    optimizer, shadow, _ = same_gradients(OPTIMIZERS["adam"], torch.float64, absent=absent)
    shadow.put(JOINT, OTHERS[1])
    assert (states(optimizer)[0]["exp_avg_sq"] > 0).all()


def test_tasks_that_cancel_leave_no_negative_second_moment():
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.Adam([p])
    shadow = ShadowMoments(optimizer, 2)
    for _ in range(30):
        gradient = torch.randn(100)
        p.grad = torch.zeros(100)
        shadow.add([{p: gradient}, {p: -gradient * (1 + 1e-7)}])
        optimizer.step()
    assert (shadow.second([1.0, 1.0])[p] >= 0).all()
    torch.testing.assert_close(shadow.second([1.0, 0.0])[p], shadow.second([0.0, 1.0])[p])


def test_an_error_shows_where_something_else_changes_the_state():
    optimizer, shadow, _ = same_gradients(OPTIMIZERS["adam"], torch.float64)
    states(optimizer)[0]["exp_avg_sq"].mul_(1.1)
    assert shadow.error(JOINT) > 0.01


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
    ],
)
def test_an_optimizer_without_such_a_history_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        ShadowMoments(make([torch.nn.Parameter(torch.ones(2))]), 2)


def test_a_state_of_unknown_history_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.Adam([p])
    optimizer.step()
    with pytest.raises(UsageError, match="has a state already"):
        ShadowMoments(optimizer, 2)
