import math

import pytest

from gradprobe.errors import UsageError
from gradprobe.trainers.settings import Settings, as_provenance, parse_task_weights, resolve


def test_flags_beat_preset_beats_hyp_beats_defaults():
    assert resolve({}).epochs == Settings().epochs
    assert resolve({}, hyp={"lr0": 0.5, "momentum": 0.8}).lr == 0.5
    report = resolve({}, preset="report", hyp={"lr0": 0.5})
    assert (report.epochs, report.batch_size, report.lr) == (50, 8, 0.5)
    assert resolve({"epochs": 3, "lr": None}, preset="report").epochs == 3


def test_the_preset_is_the_report():
    s = resolve({}, preset="report")
    assert (s.trainer, s.task_weights, s.gradnorm_alpha, s.gradnorm_momentum) == ("gradnorm", (1.0, 0.01), 1.5, 0.9)
    assert (s.min_weight, s.max_weight, s.epochs, s.batch_size, s.device) == (0.001, 10.0, 50, 8, "cpu")
    assert s.weight_sum == 2  # and not the square of it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"trainer": "gradnrom"},
            r"unknown trainer 'gradnrom' \(there are: single, joint, .*\. Did you mean 'gradnorm'",
        ),
        ({"optimizer": "adam"}, "--optimizer adam: must be one of AdamW, SGD\\. Did you mean 'AdamW'\\?"),
        ({"imgsz": 100}, "--imgsz 100: must be a multiple of 32; the next one is 128"),
        ({"imgsz": 0}, "--imgsz 0: must be at least 32 and at most 16384"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"seed": -1}, "--seed -1"),
        ({"gradnorm_alpha": math.inf}, "--gradnorm-alpha inf"),
        ({"lr": math.nan}, "--lr nan: must be a positive number"),
        ({"clip_norm": -1.0}, "--clip-norm -1.0: must be at least 0"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"task_weights": (0.0, 0.0)}, "not all 0"),
        ({"task_weights": (math.inf, 1.0)}, "must be finite"),
        ({"task_weights": (math.nan, 1.0)}, "must be finite"),
        ({"task_weights": (-0.1, 1.0)}, "not negative"),
        ({"top_k": 0}, "--top-k 0: must be at least 1"),
        ({"dwa_temperature": 0.0}, "--dwa-temperature 0.0: must be a positive number"),
        ({"trainer": ":"}, "unknown trainer ':'"),
    ],
)
def test_what_is_wrong_is_named(flags, message):
    with pytest.raises(UsageError, match=message):
        resolve(flags)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(UsageError, match=r"unknown preset 'reprot' \(there are: report\)"):
        resolve({}, preset="reprot")


def test_task_weights_are_read_by_name():
    assert parse_task_weights("cls=0.01, det=1") == (1.0, 0.01)
    assert parse_task_weights("equal") == (1.0, 1.0)
    for text, message in (
        ("det=1", r"no weight for \['cls'\]"),
        ("det=1,seg=2", "'seg' is unknown"),
        ("det=x,cls=1", "'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_task_weights(text)


def test_provenance_holds_no_folder():
    stored = as_provenance(Settings(data="/home/someone/secret/data.yaml", weights="C:\\Users\\someone\\last.pt"))
    assert (stored["data"], stored["weights"]) == ("data.yaml", "last.pt")
