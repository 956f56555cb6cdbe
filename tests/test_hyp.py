from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradprobe.errors import UsageError
from gradprobe.trainers.hyp import DetectionHyp, read_hyp


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "hyp.yaml"
        path.write_text(text)
        return path

    return write


def test_gains_go_to_the_loss_and_the_rest_to_the_optimizer(write):
    read = read_hyp(write("lr0: 0.01\nlrf: 0.1\nmomentum: 0.9\nweight_decay: 5e-4\nbox: 0.07\nfl_gamma: 1.5\n"))
    assert read.loss == DetectionHyp(box=0.07, fl_gamma=1.5)
    assert read.optimizer == {"lr0": 0.01, "lrf": 0.1, "momentum": 0.9, "weight_decay": 0.0005}
    assert read.ignored == ()


def test_absent_keys_are_at_the_published_defaults(write):
    assert read_hyp(write("lr0: 0.02\n")).loss == DetectionHyp(0.05, 0.5, 1.0, 1.0, 1.0, 4.0, 0.0, 0.0)


def test_augmentation_and_warmup_that_would_act_are_reported(write):
    read = read_hyp(write("mosaic: 1.0\nmixup: 0.1\nfliplr: 0.5\ndegrees: 0\nwarmup_epochs: 3\nwarmup_bias_lr: 0.1\n"))
    assert read.ignored == ("mosaic", "mixup", "fliplr", "warmup_epochs", "warmup_bias_lr")


def test_values_without_effect_are_not_reported(write):
    read = read_hyp(write("iou_t: 0.2\nmosaic: 0\nmixup: 0.5\nwarmup_epochs: 0.0\nwarmup_momentum: 0.8\nanchors: 0\n"))
    assert read.ignored == ()


def test_unknown_keys_are_all_named_with_line_and_near_match(write):
    path = write("lr0: 0.01\nmozaic: 1.0\nbogus_setting: 2\n")
    with pytest.raises(UsageError) as caught:
        read_hyp(path)
    message = str(caught.value)
    assert str(path) in message
    assert "'mozaic' (line 2, did you mean 'mosaic'?)" in message
    assert "'bogus_setting' (line 3)" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr0: 0.01\nbox: wide\n", r"line 2: box is 'wide'.*a number"),
        ("box: -0.1\n", r"line 1: box is -0\.1.*0 or above"),
        ("\nbox: .nan\n", r"line 2: box is"),
        ("box: true\n", r"line 1: box is 'true'"),
        ("box: [1, 2]\n", r"line 1: box is a list or a map"),
        ("box: 0.1\nbox: 0.2\n", r"line 2: 'box' stands on line 1"),
        ("- box\n", r"line 1: expected"),
        ("", r"line 1: expected"),
        ("box: 1\ncls: [1\n", r"line \d.*not a yaml file"),
        ("anchor_t: 1.0\n", r"hyp\.yaml: .*anchor_t"),
        ("label_smoothing: 1.5\n", r"hyp\.yaml: .*label_smoothing"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(write, text, expected):
    with pytest.raises(UsageError, match=expected):
        read_hyp(write(text))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_hyp(path)


def test_a_negative_gain_is_refused():
    with pytest.raises(UsageError, match="obj is -1"):
        DetectionHyp(obj=-1.0)


def test_scaling_to_image_size_classes_and_output_layers():
    scaled = DetectionHyp().scaled(output_layers=4, box_classes=8, imgsz=160)
    assert scaled["box"] == pytest.approx(0.0375)
    assert scaled["cls"] == pytest.approx(0.0375)
    assert scaled["obj"] == pytest.approx(0.046875)
    assert scaled["anchor_t"] == 4.0


def test_at_yolov5s_own_setting_nothing_is_scaled():
    scaled = DetectionHyp().scaled(output_layers=3, box_classes=80, imgsz=640)
    assert DetectionHyp(**scaled) == DetectionHyp()


def test_reading_needs_no_torch():
    code = "import gradprobe.trainers.hyp, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hyp_files_of_the_package_are_read():
    pytest.importorskip("torch")
    from gradprobe.trainers.models._import_yolov5 import package_folder

    files = sorted((package_folder() / "data" / "hyps").glob("hyp.scratch*.yaml"))
    assert files
    for path in files:
        assert "mosaic" in read_hyp(path).ignored
