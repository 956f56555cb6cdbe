"""What a file proves of its training: which batches, how many, and what was fixed before."""

from __future__ import annotations

import hashlib
import json
import time

import pytest
from warm import Process

from gradprobe import open_run
from gradprobe.cli.app import run as command
from gradprobe.trainers.loop import UNKNOWN_ORDER, BatchOrder
from gradprobe.trainers.problems import problem_of
from gradprobe.trainers.settings import resolve

DIAL = "dial:size=40"


def record(out, *arguments, trainer="joint", data=DIAL):
    words = ["record", "--data", data, "--trainer", trainer, "--out", out, "--epochs", 3, *arguments]
    return command([str(word) for word in words])


def provenance(path):
    with open_run(path) as run:
        return run.provenance


def test_the_chain_tells_order_and_borders_apart():
    def digest(*batches):
        order = BatchOrder()
        for names in batches:
            order.add(names)
        return order.hash

    different = [
        digest(),
        digest("ab"),
        digest("ba"),
        digest("a", "b"),
        digest(["ab"]),
        digest("ab", "c"),
        digest("abc"),
    ]
    assert len(set(different)) == len(different)


def test_the_chain_goes_on_from_a_state():
    whole, first, second = BatchOrder(), BatchOrder(), BatchOrder()
    for names in ("ab", "cd"):
        whole.add(names)
    first.add("ab")
    second.load_state_dict(first.state_dict())
    second.add("cd")
    assert second.state_dict() == whole.state_dict()
    second.load_state_dict(UNKNOWN_ORDER)
    second.add("cd")
    assert second.hash != whole.hash


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    out = tmp_path_factory.mktemp("order") / "joint.h5"
    assert record(out) == 0
    return out


def test_hash_and_count_are_those_of_the_loader(joint):
    problem = problem_of(resolve({"data": DIAL}))
    settings = resolve({"data": DIAL})
    loader = problem.loader(problem.load(settings).train, settings.batch_size, seed=settings.seed)
    expected = hashlib.sha256(b"gradprobe batches").hexdigest()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            expected = hashlib.sha256("\0".join([expected, *batch.names]).encode()).hexdigest()
    stored = provenance(joint)
    assert (stored["batches.hash"], stored["batches.count"]) == (expected, 9)


def test_arms_of_a_seed_see_the_same_and_other_seeds_do_not(joint, tmp_path):
    for trainer in ("gradnorm", "dual"):
        assert record(tmp_path / f"{trainer}.h5", trainer=trainer) == 0
        for name in ("batches.hash", "model.reference", "data.fingerprint"):
            assert provenance(tmp_path / f"{trainer}.h5")[name] == provenance(joint)[name]
    assert record(tmp_path / "other.h5", "--seed", 1) == 0
    assert provenance(tmp_path / "other.h5")["batches.hash"] != provenance(joint)["batches.hash"]


PLAN = {"measure": "C", "window": [20, 192], "pairs": ["b>a"], "seeds": [0, 1], "settings": {"data": "dial"}}


def test_a_killed_and_resumed_run_has_the_hash_of_a_whole_one_and_its_plan(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    long = "dial:size=4096"
    arguments = ["--data", long, "--trainer", "joint", "--every", "64", "--out", str(tmp_path / "run.h5")]
    child = Process(["record", *arguments, "--epochs", "3", "--plan", str(plan)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.last.pt").exists() and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert command(["record", "--resume", str(tmp_path / "run.h5")]) == 0
    assert record(tmp_path / "whole.h5", "--every", 64, data=long) == 0
    resumed, whole = provenance(tmp_path / "run.h5"), provenance(tmp_path / "whole.h5")
    assert resumed["batches.count"] == whole["batches.count"] == 3 * 256
    assert resumed["batches.hash"] == whole["batches.hash"]
    with open_run(tmp_path / "run.h5") as run:
        assert len(run.sessions) == 2
    assert resumed["plan.measure"] == "C"
    assert resumed["plan.window"] == [20, 192]
    assert resumed["plan.settings.data"] == "dial"
    assert not any(name.startswith("plan") for name in whole)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "no JSON object, but a list")]
)
def test_a_plan_that_is_none_is_refused(text, message, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    assert record(tmp_path / "run.h5", "--plan", plan) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run.h5").exists()
