"""The examples and the snippets of docs/integrations.md run, in processes of their own, with tiny settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from warm import Process

import gradprobe
from gradprobe.trainers.data.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")

NEEDS = {
    "plain_loop": (),
    "alternating_tasks": (),
    "resnet_fashion_pairs": ("torchvision",),
    "transformer_two_heads": ("transformers", "accelerate"),
    "ultralytics_phantoms": ("ultralytics",),
    "faster_rcnn_losses": ("torchvision",),
}
TASKS = {
    "plain_loop": ("height", "quarter"),
    "alternating_tasks": ("height", "quarter"),
    "resnet_fashion_pairs": ("behind", "front"),
    "transformer_two_heads": ("topic", "marked"),
    "ultralytics_phantoms": ("box", "cls", "dfl"),
    "faster_rcnn_losses": ("objectness", "proposal", "class", "box"),
}


def first_looks():
    """What examples/README.md says to begin with: script -> arguments."""
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    return {name: shlex.split(args) for name, args in re.findall(r"^\| \[(\w+)\.py\].*\| `([^`]*)` \|$", text, re.M)}


def missing(packages):
    return [package for package in packages if importlib.util.find_spec(package) is None]


def run(folder, script, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "YOLO_CONFIG_DIR": str(folder),
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    # A warning of ours is an error; those of others are theirs.
    process = Process(arguments, cwd=folder, env=environment, program=script, strict=True)
    out, err = process.communicate()
    return CompletedProcess(script, process.returncode, out, err)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Every example that can run here, started two at a time: {name: (file, finished process)}."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {}
        for name, arguments in first_looks().items():
            if not missing(NEEDS[name]):
                folder = tmp_path_factory.mktemp(name)
                script = str(ROOT / "examples" / f"{name}.py")
                jobs[name] = folder / "run.h5", pool.submit(run, folder, script, *arguments, "--out", "run.h5")
        return {name: (path, job.result()) for name, (path, job) in jobs.items()}


def test_every_example_is_in_the_table_and_is_tested():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == set(first_looks()) == set(NEEDS) == set(TASKS)


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_records(examples, name):
    if missing(NEEDS[name]):
        pytest.skip(f"not installed: {', '.join(missing(NEEDS[name]))}")
    path, done = examples[name]
    if "Fashion-MNIST is not here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "gradprobe summary run.h5" in done.stdout
    with gradprobe.open_run(path) as recorded:
        assert recorded.end == "finished"
        assert recorded.tasks == TASKS[name]
        assert len(recorded["step"]) >= 2
        assert set(recorded["status"]) == {0}
        assert np.isfinite(recorded["loss"]).all()
        assert np.isfinite(recorded["shared_cosine"]).all()


def test_the_layers_of_faster_rcnn_are_shared_as_its_parts_are(examples):
    if "faster_rcnn_losses" not in examples:
        pytest.skip("torchvision is not installed")
    path, _ = examples["faster_rcnn_losses"]
    with gradprobe.open_run(path) as recorded:
        shared_by = {
            layer.split(".")[0] + "." + layer.split(".")[1]: [
                t for t, r in zip(recorded.tasks, reach, strict=True) if r
            ]
            for layer, reach in zip(recorded.layers, recorded["reach"], strict=True)
        }
    assert shared_by["backbone.body"] == shared_by["backbone.fpn"] == list(recorded.tasks)
    assert shared_by["rpn.head"] == ["objectness", "proposal"]
    assert shared_by["roi_heads.box_head"] == ["class", "box"]


def blocks():
    """Section of the guide -> its Python."""
    sections = dict(section.split("\n", 1) for section in GUIDE.split("\n## ")[1:])
    found = {
        name: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for name, text in sections.items()
    }
    return {name: "".join(code) for name, code in found.items() if code}


GUIDE_NEEDS = {
    "Lightning": ("lightning",),
    "Hugging Face": ("transformers", "accelerate"),
    "Ultralytics": ("ultralytics",),
    "TensorBoard and Weights & Biases": ("tensorboard", "wandb"),
}


def test_every_snippet_of_the_guide_is_tested():
    assert set(blocks()) == set(GUIDE_NEEDS)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """All snippets that can run here, in one process, in a folder with a data set."""
    folder = tmp_path_factory.mktemp("guide")
    write_phantoms(folder / "data", 12, 0)
    able = [code for name, code in blocks().items() if not missing(GUIDE_NEEDS[name])]
    for index, code in enumerate(able):
        (folder / "data" / f"snippet{index}.py").write_text(code, encoding="utf-8")
    (folder / "data" / "all.py").write_text("".join(f"import snippet{i}\n" for i in range(len(able))), encoding="utf-8")
    done = run(folder / "data", folder / "data" / "all.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "data"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Lightning", "lightning.h5"),
        ("Hugging Face", "huggingface.h5"),
        ("Ultralytics", "ultralytics.h5"),
        ("TensorBoard and Weights & Biases", "sinks.h5"),
    ],
)
def test_the_snippet_records(guide, name, file):
    if missing(GUIDE_NEEDS[name]):
        pytest.skip(f"not installed: {', '.join(missing(GUIDE_NEEDS[name]))}")
    with gradprobe.open_run(guide / file) as recorded:
        assert recorded.end == "finished"
        assert len(recorded["step"]) >= 2
        assert set(recorded["status"]) == {0}


def test_the_links_of_the_guide_lead_somewhere():
    for page in (ROOT / "docs/integrations.md", ROOT / "examples/README.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
