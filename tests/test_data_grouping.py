"""Which images belong together, and how a check of hundreds of clips is summed up."""

from __future__ import annotations

import json
import warnings as python_warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradprobe.errors import UsageError
from gradprobe.trainers.data.check import check_data
from gradprobe.trainers.data.clusters import parse_grouping
from gradprobe.trainers.data.loading import load_data
from gradprobe.trainers.problems import problem_of
from gradprobe.trainers.settings import resolve

with python_warnings.catch_warnings():
    # typer up to 0.25 imports names that click 8.5 deprecates.
    python_warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from gradprobe.cli.data import app


def made(folder: Path, splits: Mapping[str, Sequence[str]]) -> Path:
    """Small images by path below each split's folder."""
    rows = ["image,class"]
    for seed, (split, names) in enumerate(splits.items()):
        generator = np.random.default_rng(seed)
        for index, name in enumerate(names):
            image = folder / "images" / split / name
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(image)
            rows.append(f"images/{split}/{name},{'xy'[index % 2]}")
    label = (folder / "labels" / "train" / splits["train"][0]).with_suffix(".txt")
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "classes.csv").write_text("\n".join(rows) + "\n")
    keys = "".join(f"{split}: images/{split}\n" for split in splits)
    yaml = folder / "data.yaml"
    yaml.write_text(f"{keys}names: [a]\nimage_names: [x, y]\nimage_labels: classes.csv\n")
    return yaml


def clinical(folder: Path) -> Path:
    """38 patients with 94 clips in test; train has all of them but 2 clips, and frames of its own."""
    clips = [f"patient{number % 38:03d}_clip{number // 38}" for number in range(94)]
    return made(
        folder,
        {
            "train": [f"{clip}_frame{frame:02d}.png" for clip in clips[:92] for frame in (0, 1)],
            "val": ["alone1.png", "alone2.png"],
            "test": [f"{clip}_frame{frame:02d}.png" for clip in clips for frame in range(7, 8 + (clip == clips[50]))],
        },
    )


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


# --- the command -----------------------------------------------------------------------------------


def test_hundreds_of_clips_are_summed_up_first_and_the_worst_ten_are_listed(tmp_path: Path) -> None:
    yaml = str(clinical(tmp_path))
    code, text = run(yaml)
    assert code == 0
    lines = text.splitlines()
    total = lines.index("92 of 94 test clips also in train; 38 of 38 patients")
    listed = [place for place, line in enumerate(lines) if "clip or patient" in line and line.startswith("warning")]
    assert len(listed) == 10
    assert total < listed[0]
    assert "'patient012'" in lines[listed[0]]  # it has most images: clip 50 is its second
    assert "has 4 images here and 6 in train" in lines[listed[0]]
    assert any("and 28 more" in line for line in lines)
    assert "--all" in lines[-1]
    assert len(lines) < 45


def test_all_lists_the_rest_and_json_everything(tmp_path: Path) -> None:
    yaml = str(clinical(tmp_path))
    _, text = run(yaml, "--all")
    assert sum("clip or patient" in line and line.startswith("warning") for line in text.splitlines()) == 38
    found = json.loads(run(yaml, "--json")[1])
    assert found["warnings"] == len(found["findings"]) == 38
    [leak] = [each for each in found["leakage"] if (each["split"], each["also_in"]) == ("test", "train")]
    assert (leak["clips"]["shared"], leak["clips"]["of"]) == (92, 94)
    assert (leak["patients"]["shared"], leak["patients"]["of"]) == (38, 38)
    assert len(leak["clips"]["names"]) == 92
    assert leak["patients"]["names"][0] == {"name": "patient012", "test": 4, "train": 6}
    assert leak["images"] == {"of": 95, "shared": 0}
    assert found["grouping"]["rule"] == "auto"
    assert set(found["grouping"]["tells"]) == {"patient", "clip"}
    assert found["grouping"]["images_told"] == 92 * 2 + 95


def test_errors_of_a_kind_are_condensed_too_and_counted_in_full(tmp_path: Path) -> None:
    yaml = clinical(tmp_path)
    (tmp_path / "labels" / "test").mkdir(parents=True)
    for image in (tmp_path / "images" / "test").iterdir():
        (tmp_path / "labels" / "test" / f"{image.stem}.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    code, text = run(str(yaml))
    assert code == 1
    assert sum("class 7 is none" in line for line in text.splitlines()) == 10
    assert "95 errors" in text.splitlines()[-1]
    assert sum("class 7 is none" in line for line in run(str(yaml), "--all")[1].splitlines()) == 95


def test_how_names_are_read_is_shown_by_an_example(tmp_path: Path) -> None:
    text = run(str(clinical(tmp_path)))[1]
    [line] = [line for line in text.splitlines() if line.startswith("--group-by auto")]
    assert "patient000_clip0_frame00.png is of patient 'patient000', clip 'patient000_clip0'" in line
    assert "279 of 281 images" in line
    plain = made(tmp_path / "plain", {"train": ["a.png"], "val": ["b.png"]})
    assert "no clip or patient is known from a.png" in run(str(plain))[1]


def test_pictures_in_both_splits_are_in_the_totals(tmp_path: Path) -> None:
    yaml = made(tmp_path, {"train": ["a.png", "b.png"], "val": ["c.png", "d.png", "e.png"]})
    yaml.write_text(yaml.read_text().replace("val: images/val", "val: [images/val, images/train/a.png]"))
    assert "1 of 4 val images also in train" in run(str(yaml))[1].splitlines()


# --- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "told"),
    [
        ("auto", "images/val/Patient12_A4C_frame03.png", {"patient": "patient12", "clip": "patient12_a4c"}),
        ("auto", "images/val/patient0001_4CH_ED.png", {"patient": "patient0001"}),
        ("auto", "images/val/0X1A_17.png", {"clip": "0x1a"}),
        ("auto", "images/val/P012/frame_0003.png", {}),
        ("none", "images/val/patient12_frame03.png", {}),
        ("folder", "images/val/P012/frame_0003.png", {"group": "P012"}),
        ("folder", "images/val/frame_0003.png", {}),
        ("folder", "valid/images/frame_0003.png", {}),
        ("prefix", "images/val/anna-b_0003.png", {"group": "anna"}),
        ("prefix", "images/val/anna.png", {}),
        (r"^([A-Z]\d+)", "images/val/P12_C3_0007.png", {"group": "P12"}),
        (r"(?P<patient>P\d+)", "images/val/P12_C3_0007.png", {"patient": "P12"}),
        (r"(?P<clip>P\d+_C\d+)", "images/val/P12_C3_0007.png", {"clip": "P12_C3"}),
        (r"(?P<patient>P\d+)_(?P<clip>C\d+)", "images/val/P12_C3_0007.png", {"patient": "P12", "clip": "P12/C3"}),
        (r"(?P<clip>(?P<patient>P\d+)_C\d+)", "images/val/P12_C3_7.png", {"patient": "P12", "clip": "P12_C3"}),
        (r"(?P<id>\d+)_", "images/val/77_0007.png", {"group": "77"}),
        (r"(.+)_\d+$", "images/val/anna_7.png", {"group": "anna"}),
        (r"(.+)_\d+\.png$", "images/val/anna_7.png", {"group": "anna"}),
        (r"val/(\w+)/", "images/val/P012/frame_0003.png", {"group": "P012"}),
        (r"(Q\d+)", "images/val/P12_0007.png", {}),
    ],
)
def test_what_a_path_tells(rule: str, path: str, told: dict[str, str]) -> None:
    assert dict(parse_grouping(rule).of(path)) == told


@pytest.mark.parametrize(
    ("rule", "message"),
    [("patients", "needs a group"), ("(a", "is no regular expression"), ("", "needs a group"), ("^P", "needs a group")],
)
def test_what_is_no_rule_is_refused_at_once(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"--group-by {rule!r}.*{message}".replace("(a", r"\(a").replace("^", r"\^")):
        parse_grouping(rule)
    with pytest.raises(UsageError, match=message):
        resolve({"group_by": rule})


def test_a_rule_that_tells_nothing_is_refused_and_one_that_misses_some_says_which(tmp_path: Path) -> None:
    yaml = made(tmp_path, {"train": ["P1_1.png", "P2_1.png"], "val": ["P1_2.png", "x.png"]})
    with pytest.raises(UsageError, match=r"tells nothing of any of the 4 images, such as images/train/P1_1.png"):
        check_data(yaml, group_by=r"(Q\d+)")
    found = [str(each) for each in check_data(yaml, group_by=r"(?P<patient>P\d+)").findings]
    assert len(found) == 2
    assert "tells nothing of 1 of 4 images, such as images/val/x.png" in found[0]
    assert r"val: patient 'P1' (by --group-by (?P<patient>P\d+)) has 1 images here and 1 in train" in found[1]


# --- one rule for all ------------------------------------------------------------------------------


def test_the_test_split_has_clusters_by_the_same_rule(tmp_path: Path) -> None:
    yaml = made(
        tmp_path,
        {
            "train": ["P1/frame_1.png", "P2/frame_1.png"],
            "val": ["P3/frame_1.png", "P4/frame_1.png"],
            "test": ["P5/frame_1.png", "P5/frame_2.png", "P6/frame_1.png"],
        },
    )
    settings = resolve({"data": str(yaml), "imgsz": 32, "group_by": "folder"})
    problem = problem_of(settings)
    data = problem.load(settings)
    assert problem.clusters(data.test) == ("P5", "P5", "P6")
    # Two images of one name in two folders are two, where nothing tells what they belong to.
    test = load_data(yaml, imgsz=32).test
    assert test is not None
    assert test.clusters == ("frame_1.png", "frame_2.png", "frame_1.png (2)")
    assert test.names == ("frame_1.png", "frame_2.png", "frame_1.png")


def test_what_is_stored_with_a_run_sums_clips_up(tmp_path: Path) -> None:
    data = load_data(clinical(tmp_path), imgsz=32)
    assert data.warnings == ("92 of 94 test clips also in train; 38 of 38 patients",)
    assert load_data(tmp_path / "data.yaml", imgsz=32, group_by="none").warnings == ()


def test_the_dial_problem_refuses_a_rule() -> None:
    with pytest.raises(UsageError, match="goes with images"):
        resolve({"data": "dial", "group_by": "folder"})
