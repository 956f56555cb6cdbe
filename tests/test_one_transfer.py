"""What makes the host wait for a device: one transfer a measured row, nothing at other steps. On a device of Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

from gradprobe.probes import gramian
from gradprobe.probes.clock import Stopwatch
from gradprobe.probes.gramian import products, symmetric

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch knows no devices made of Python", allow_module_level=True)

HERE = Path(__file__).parent
CASES = {
    "backward": {"every": 2},
    "record": {"every": 2, "by": "record"},
    "blocks": {"every": 2, "memory": "low"},
    "many tasks": {"every": 2, "tasks": 10},
    "scaled": {"every": 2, "scaled": True},
    "tensor weights": {"every": 2, "tensor_weights": True},
    "sketched": {"every": 2, "sketch": 16},
    "features": {"level": "features"},
    "micro-batches": {"every": 2, "micro": 4},
}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_device.py"), json.dumps(CASES)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def transfers(waits):
    return sum(count for what, count in waits.items() if what != "event")


def test_the_device_sees_whatever_makes_a_host_wait(found):
    assert all(count >= 1 for count in found["caught"].values()), found["caught"]


@pytest.mark.parametrize("case", CASES)
def test_steps_that_are_not_measured_make_nobody_wait(found, case):
    if case != "features":  # measured at every step
        assert found[case]["per_step"][1::2] == [{}] * 4


@pytest.mark.parametrize("case", ["backward", "record", "blocks", "many tasks", "scaled", "sketched"])
def test_a_measured_row_is_one_transfer(found, case):
    """Rows 1 to 3 have a derived task, and are compared with passes of their own: there it is two."""
    checked = () if case in ("record", "blocks") else (1, 2, 3)
    counts = [transfers(waits) for waits in found[case]["per_step"][::2]]
    assert counts == [2 if row in checked else 1 for row in range(4)]
    assert all(waits.get("event", 0) <= 1 for waits in found[case]["per_step"])
    assert found[case]["status"] == ["measured"] * 4


def test_weights_on_the_device_are_one_more_transfer_at_measured_steps_alone(found):
    counts = [transfers(waits) for waits in found["tensor weights"]["per_step"]]
    assert counts == [2, 0, 3, 0, 3, 0, 3, 0]


def test_features_are_one_transfer(found):
    assert [transfers(waits) for waits in found["features"]["per_step"]] == [1] * 8
    assert found["features"]["features"] == 8


def test_micro_batches_are_one_transfer_and_one_to_compare_their_losses(found):
    counts = [transfers(waits) for waits in found["micro-batches"]["per_step"][::2]]
    assert counts[1:] == [2, 2, 2]  # at the first row the probe also measures a task with its own copy


@pytest.mark.parametrize("case", ["backward", "record", "blocks", "many tasks", "scaled"])
def test_what_came_over_is_right(found, case):
    sys.path.insert(0, str(HERE))
    generator, count = torch.Generator().manual_seed(0), CASES[case].get("tasks", 3)

    def weight(*shape):
        return (0.3 * torch.randn(*shape, generator=generator)).double().requires_grad_()

    trunk, heads = [weight(12, 6), weight(12), weight(12, 12)], [weight(2, 12) for _ in range(count)]
    for row, step in enumerate(range(0, 8, 2)):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double()
        z = torch.tanh(torch.tanh(x @ trunk[0].T + trunk[1]) @ trunk[2].T)
        losses = [((z @ head.T - i) ** 2).mean() for i, head in enumerate(heads)]
        vectors = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trunk, retain_graph=True)]) for loss in losses
        ]
        gram = torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors]).numpy()
        norm = np.sqrt(np.diagonal(gram))
        apart = np.abs(np.array(found[case]["gram"][row][0]) - gram) / np.outer(norm, norm)
        assert apart.max() < 2e-5
        np.testing.assert_allclose(found[case]["loss"][row], [v.item() for v in losses], rtol=1e-5)


def test_a_sketch_made_on_the_device_is_that_of_the_cpu(found):
    """The gradients' whole norms, to within the error of 16 numbers; the draws are the same wherever they are used."""
    whole, short = (np.array(found[case]["gram"])[:, 0] for case in ("record", "sketched"))
    ratio = np.diagonal(short, axis1=1, axis2=2) / np.diagonal(whole, axis1=1, axis2=2)
    assert ((ratio > 0.2) & (ratio < 3)).all()
    assert 0.5 < ratio.mean() < 1.6


def test_the_time_that_a_device_took_is_read_from_its_marks(found):
    assert all(0 < seconds < 60 for seconds in found["backward"]["overhead"])


# ---- the parts


def test_scalars_are_numbers_whichever_way_they_come():
    scalars = [torch.tensor(2.0), torch.tensor(-3.5, dtype=torch.float64, requires_grad=True)]
    gramian.take_along(scalars)
    assert gramian.scalars(scalars) == [2.0, -3.5]
    assert gramian.scalars([]) == []
    assert [a.tolist() for a in gramian.fetch([torch.eye(2), torch.ones(1)])] == [[1, 0, 0, 1], [1]]


def test_what_goes_along_is_not_kept_alive():
    scalar = torch.tensor(1.0, device="meta")
    gramian.take_along([scalar])
    (held,) = gramian._waiting.tensors
    del scalar
    assert held() is None


def test_a_triangle_becomes_a_matrix():
    full = symmetric([[torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(3.0)]])
    assert full.tolist() == [[1, 2], [2, 3]]
    assert products([torch.ones(3), torch.arange(3.0)]).tolist() == [[3, 3], [3, 5]]


def test_a_stopwatch_adds_up():
    watch = Stopwatch(torch.device("cpu"))
    with watch.running():
        pass
    before = watch.seconds
    watch.add(2.0)
    assert before >= 0
    assert watch.seconds == pytest.approx(before + 2)
