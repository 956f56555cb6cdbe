"""A model that FSDP2 shards is refused, with what to do, in every process and whatever part of it a probe knows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from warm import Process

pytest.importorskip("torch.distributed.fsdp")
if not torch.distributed.is_available() or not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)

WAYS = [f"{by}{how}" for by in ("backward", "record") for how in ("", " sketched", " in part", " within")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, here = tmp_path_factory.mktemp("sharded"), Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    processes = [Process([folder, rank], env=environment, program=here / "sharded_ranks.py") for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_at_every_step_in_both_processes(ranks, way):
    for found in ranks:
        said, rows, _ = found[way]
        assert len(said) == 4
        for text in said:
            assert "sharded over processes" in text
            assert "DDP" in text
            assert "sketch=4096" in text
        assert rows == 0


@pytest.mark.parametrize("way", [way for way in WAYS if "part" not in way])
def test_a_training_that_catches_it_goes_on_as_without_a_probe(ranks, way):
    for found in ranks:
        assert found[way][2] == found["alone"][2]


def test_a_model_that_is_sharded_after_the_first_row_is_refused_then(ranks):
    for found in ranks:
        assert len(found["later"]) == 1
        assert "sharded over processes" in found["later"][0]


def test_the_doctor_finds_it(ranks):
    assert all("sharded" in found["doctor"] for found in ranks)
