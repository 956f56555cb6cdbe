"""The options of a probe: one table, the same for a probe, for `attach` and for the callbacks."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.errors import ProbeError
from gradprobe.integrations.trainer_recording import Recording
from gradprobe.integrations.ultralytics import GradprobeCallback
from gradprobe.probes.probe_options import CommonKeywords, ProbeKeywords, ProbeOptions

FIELDS = {field.name: field for field in dataclasses.fields(ProbeOptions)}
OF_ATTACH = {"updates": False, "ledger": False, "sinks": (), "overwrite": False, "resume": False}


def test_what_a_checker_is_told_is_the_table():
    told = {name: each.__forward_arg__ for name, each in ProbeKeywords.__annotations__.items()}
    assert told == {name: field.type for name, field in FIELDS.items()}
    assert set(ProbeKeywords.__annotations__) - set(CommonKeywords.__annotations__) == {"updates", "ledger"}


@pytest.mark.parametrize(("call", "own"), [(gradprobe.GradientProbe, {"sinks": ()}), (gradprobe.attach, OF_ATTACH)])
def test_a_signature_and_its_help_show_every_option_with_its_default(call, own):
    shown = {n: each.default for n, each in inspect.signature(call).parameters.items()}
    expected = {name: field.default for name, field in FIELDS.items()} | own
    assert {name: default for name, default in shown.items() if name in expected} == expected
    assert set(shown) - set(expected) <= {"model", "tasks", "out"}
    text = pydoc.render_doc(call, renderer=pydoc.plaintext)
    assert all(re.search(rf"\b{name}: ", text) for name in FIELDS)


def test_the_table_says_what_each_option_means():
    meanings = inspect.getdoc(ProbeOptions).partition("Attributes:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\w+): \S", meanings, re.MULTILINE) == list(FIELDS)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda **options: gradprobe.attach(nn.Linear(1, 1), ("a", "b"), **options), "attach"),
        (lambda **options: gradprobe.GradientProbe(nn.Linear(1, 1), ("a", "b"), **options), "GradientProbe"),
        (GradprobeCallback, "GradprobeCallback"),
    ],
)
def test_an_unknown_option_is_a_type_error_at_once_with_a_hint(call, name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .* 'evry'\. Did you mean 'every'\?"):
        call(evry=3)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'zzz'$"):
        call(zzz=3)
    with pytest.raises(TypeError, match=rf"^{name}\(\): products= is gone: .* Leave it out\.$"):
        call(products="ghost")


def test_what_excludes_each_other_is_said_by_the_table():
    with pytest.raises(ProbeError, match="exclude each other"):
        ProbeOptions(every=2, budget=0.1)
    assert ProbeOptions(level="features", sketch=None).about() == {
        "level": "features",
        "memory": "normal",
        "products": "direct",
        "every": 1,
    }


def test_an_option_of_a_callback_reaches_its_probe(tmp_path):
    model = nn.Linear(2, 2)
    recording = Recording("mine", tmp_path / "run.h5", every=3, memory="low")
    recording.open(model, ("a", "b"), torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        out = model(torch.ones(1, 2))
        recording.record({"a": out[0, 0], "b": out[0, 1]})
        out.sum().backward()
    recording.close()
    with gradprobe.open_run(tmp_path / "run.h5") as run:
        assert (run.provenance["probe.every"], run.provenance["probe.memory"]) == (3, "low")
