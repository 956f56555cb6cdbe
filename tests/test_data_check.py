"""What a check of a data set finds, and what it leaves in peace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings as python_warnings
from pathlib import Path

import numpy as np
import pytest
from data_set_factory import COCO128, labels_of, make_set, write_image
from PIL import Image

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data.check import check_data
from gradprobe.trainers.data.clusters import clip_of
from gradprobe.trainers.data.images import UnreadableImage, decode
from gradprobe.trainers.data.splits import errors, warnings

with python_warnings.catch_warnings():
    # typer up to 0.25 imports names that click 8.5 deprecates.
    python_warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from gradprobe.cli.data import app


def messages(yaml: Path) -> list[str]:
    return [str(finding) for finding in check_data(yaml).findings]


def test_a_sound_data_set_has_no_finding_and_is_counted(tmp_path: Path) -> None:
    result = check_data(make_set(tmp_path))
    assert result.findings == []
    assert result.counts["train"].as_dict() == {
        "images": 4,
        "bad": 0,
        "background": 0,
        "no_image_class": 0,
        "boxes": {"AR": 2, "MR": 2},
        "image_classes": {"x": 2, "y": 2},
    }
    assert result.counts["val"].images == 2


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    whole = (images / "train_a.png").read_bytes()
    (images / "train_a.png").write_bytes(whole[: len(whole) // 2])
    (labels / "train_b.txt").write_text("0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n0 0.5 x 0.1 0.1\n")
    (labels / "train_c.txt").unlink()
    (labels / "train_d.txt").write_text("1 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n")
    result = check_data(yaml)
    found = [str(finding) for finding in errors(result.findings)]
    assert [each.split(": ")[0] for each in found] == [
        "images/train/train_a.png",
        "labels/train/train_b.txt:2",
        "labels/train/train_b.txt:3",
    ]
    assert "unreadable image" in found[0]
    assert [each.line for each in warnings(result.findings)] == [2]
    counts = result.counts["train"]
    assert (counts.images, counts.bad, counts.background) == (4, 2, 1)
    assert counts.boxes == {"AR": 0, "MR": 1}


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_unreadable(tmp_path: Path, content: bytes) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "images" / "val" / "val_e.png").write_bytes(content)
    [finding] = errors(check_data(yaml).findings)
    assert (finding.file, finding.line) == ("images/val/val_e.png", None)
    assert "0x" not in finding.message


def test_a_missing_folder_and_an_empty_one_are_errors_at_their_line(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    shutil.rmtree(tmp_path / "images" / "val")
    gone = tmp_path / "images" / "val"
    assert f"data.yaml:3: val: images/val does not exist; looked for {gone}" in messages(yaml)
    (tmp_path / "images" / "val").mkdir()
    assert "data.yaml:3: val: no image in images/val" in messages(yaml)


# --- image classes -------------------------------------------------------------------------------


def test_an_image_without_a_class_is_a_warning_and_counted(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace("train_b.png,y\n", ""))
    result = check_data(yaml)
    assert errors(result.findings) == []
    assert [finding.file for finding in warnings(result.findings)] == ["images/train/train_b.png"]
    assert result.counts["train"].no_image_class == 1


@pytest.mark.parametrize("source", ["csv", "rows", "empty csv"])
def test_no_image_class_at_all_is_an_error_that_says_how_to_give_one(tmp_path: Path, source: str) -> None:
    yaml = make_set(tmp_path)
    if source == "rows":
        yaml.write_text(yaml.read_text().replace("image_labels: classes.csv\n", ""))
    elif source == "csv":
        (tmp_path / "classes.csv").unlink()
    else:
        (tmp_path / "classes.csv").write_text("image,class\n")
    found = [finding.message for finding in errors(check_data(yaml).findings)]
    assert any("no image has an image class; give image_names" in message for message in found)
    assert len(found) == (2 if source == "csv" else 1)  # the missing csv is named, too


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("train_a.png,z", "classes.csv:8: train_a.png: image class 'z' is none of x, y"),
        ("train_a.png,2", "classes.csv:8: train_a.png: image class '2' is none of x, y"),
        ("train_a.png", "classes.csv:8: train_a.png: image class '' is none of x, y"),
        ("train_a.png,y", "classes.csv:8: train_a.png: class 'y', but 'x' in an earlier row"),
    ],
)
def test_a_wrong_row_of_the_csv_is_an_error_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    yaml = make_set(tmp_path)
    with (tmp_path / "classes.csv").open("a") as csv:
        csv.write(row + "\n")
    assert messages(yaml) == [message]


def test_a_csv_without_its_header_is_an_error(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace("image,class\n", ""))
    assert "classes.csv:1: the header is not image,class" in messages(yaml)


def test_rows_for_images_that_are_not_there_are_one_warning(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    with (tmp_path / "classes.csv").open("a") as csv:
        csv.write("gone1.png,x\ngone2.png,y\n")
    assert messages(yaml) == ["classes.csv:8: 2 rows name no image of the data set; the first: gone1.png"]


def test_classes_by_index_and_images_by_path(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    write_image(tmp_path / "images" / "val" / "train_a.png", 99)  # a name that is in train, too
    csv = tmp_path / "classes.csv"
    found = messages(yaml)
    assert "classes.csv:2: train_a.png: 2 images have this name; give the path relative to the root" in found
    rows = csv.read_text().replace("train_a.png,x", "images/train/train_a.png,1\n./images/val/train_a.png,0")
    csv.write_text(rows)
    result = check_data(yaml)
    assert errors(result.findings) == []
    classes = {i.file.shown: i.image_class for split in result.splits.values() for i in split}
    assert classes["images/train/train_a.png"] == 1
    assert classes["images/val/train_a.png"] == 0


def test_label_files_missing_altogether_are_a_warning_that_says_where_they_were_looked_for(
    tmp_path: Path,
) -> None:
    yaml = make_set(tmp_path)
    shutil.rmtree(tmp_path / "labels")
    [message] = messages(yaml)
    assert "no image has a label file" in message
    assert "labels/train/train_a.txt" in message


# --- duplicates and leakage -----------------------------------------------------------------------


def test_the_same_picture_twice_in_a_split_is_a_warning(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    pixels = Image.open(tmp_path / "images" / "train" / "train_a.png")
    pixels.save(tmp_path / "images" / "train" / "train_b.png", compress_level=0)  # other bytes, same pixels
    [finding] = check_data(yaml).findings
    assert finding.severity == "warning"
    assert str(finding) == "images/train/train_b.png: train: the same picture as images/train/train_a.png"


def test_the_same_picture_in_train_and_val_is_a_warning(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    shutil.copy(tmp_path / "images/train/train_a.png", tmp_path / "images/val/val_e.png")
    assert messages(yaml) == ["images/val/val_e.png: val: is the same picture as images/train/train_a.png in train"]


def test_the_same_file_listed_twice_and_in_two_splits_is_a_warning_each(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    text = yaml.read_text()
    yaml.write_text(text.replace("val: images/val", "val: [images/val, images/train/train_a.png]"))
    assert messages(yaml) == ["images/train/train_a.png: val: is also in train"]
    yaml.write_text(text.replace("val: images/val", "val: [images/val, images/val/val_e.png]"))
    assert messages(yaml) == ["data.yaml:3: val: lists images/val/val_e.png twice; it is used once"]


def test_a_clip_in_train_and_val_is_one_warning(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    for split, frame, seed in (("train", "03", 1), ("train", "04", 2), ("val", "17", 3)):
        write_image(tmp_path / "images" / split / f"patient012_frame{frame}.png", seed)
        with (tmp_path / "classes.csv").open("a") as csv:
            csv.write(f"patient012_frame{frame}.png,x\n")
    [message] = messages(yaml)
    assert "clip or patient 'patient012' (judged from file names) has 1 images here and 2 in train" in message
    assert message.startswith("images/val/patient012_frame17.png: val")


@pytest.mark.parametrize(
    ("stem", "clip"),
    [
        ("patient012_frame03", "patient012"),
        ("Patient012-Frame3", "patient012"),
        ("patient0001_4CH_ED", "patient0001"),
        ("sub-01_ses2_slice4", "sub-01"),
        ("0X1A2B3C_17", "0x1a2b3c"),
        ("anna_frame3", "anna"),
        ("clip7.0012", "clip7"),
        ("echo5frame12", "echo5"),
        ("patient012_frame03_png.rf.0123abcd", "patient012"),
        ("000000000009", None),
        ("12", None),
        ("image_0042", None),
        ("patient012", None),
        ("frame_0001", None),
        ("shot3", None),
        ("phantom_train_00012", None),
        ("a3f9c2e17", None),
        ("subway_7", None),
    ],
)
def test_the_clip_is_judged_from_the_file_name(stem: str, clip: str | None) -> None:
    assert clip_of(stem) == clip


def test_numbered_images_are_not_taken_for_a_clip(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    rows = ["image,class"]
    for image in sorted((tmp_path / "images").rglob("*.png")):
        number = f"{ord(image.stem[-1]):012d}"
        image.rename(image.with_name(f"{number}.png"))
        rows.append(f"{number}.png,x")
    for label in labels_of(tmp_path):
        label.rename(label.with_name(f"{ord(label.stem[-1]):012d}.txt"))
    (tmp_path / "classes.csv").write_text("\n".join(rows) + "\n")
    assert messages(yaml) == []


# --- decoding ------------------------------------------------------------------------------------


def test_each_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradprobe.trainers.data import check

    yaml = make_set(tmp_path)
    yaml.write_text(yaml.read_text().replace("val: images/val", "val: [images/train, images/val]"))
    read: list[Path] = []

    def counting(path: Path) -> object:
        read.append(path)
        return decode(path)

    monkeypatch.setattr(check, "decode", counting)
    kept: list[Path] = []
    check_data(yaml, keep=lambda path, pixels: kept.append(path))
    assert len(read) == len(set(read)) == 6
    assert sorted(kept) == sorted(read)


def test_grey_sixteen_bit_palette_and_turned_images_are_read(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    for name in ("grey", "deep"):
        pixels = decode(tmp_path / f"{name}.png").pixels
        assert pixels.dtype == np.uint8
        assert (pixels == ramp[..., None]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :15] = 255
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png").pixels
    assert turned.shape == (30, 10, 3)
    assert turned[:15].min() == 255
    assert turned[15:].max() == 0


def test_pixels_without_a_grey_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match="mode F"):
        decode(tmp_path / "float.tif")


@pytest.mark.skipif(not COCO128.exists(), reason="coco128 is not beside the repository")
def test_coco128_has_warnings_and_no_errors() -> None:
    result = check_data(COCO128)
    assert errors(result.findings) == []
    found = [str(finding) for finding in result.findings]
    assert sum("no image class" in message for message in found) == 2
    assert sum("every one of its 128 images is also in train" in message for message in found) == 1
    assert len(found) == 3
    assert sum(result.counts["train"].boxes.values()) == 929
    assert result.counts["train"].image_classes["people"] == 44


# --- the command line ------------------------------------------------------------------------------


def test_the_command_prints_counts_and_findings_and_exits_one_on_errors(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    sound = CliRunner().invoke(app, ["check", str(yaml)])
    assert sound.exit_code == 0
    assert "images: x" in sound.stdout
    assert "0 errors, 0 warnings" in sound.stdout
    (tmp_path / "labels" / "val" / "val_e.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    faulty = CliRunner().invoke(app, ["check", str(yaml)])
    assert faulty.exit_code == 1
    assert "error labels/val/val_e.txt:1: class 9" in faulty.stdout
    assert "1 error, 0 warnings" in faulty.stdout


def test_warnings_alone_exit_zero(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    shutil.copy(tmp_path / "images/train/train_a.png", tmp_path / "images/val/val_e.png")
    done = CliRunner().invoke(app, ["check", str(yaml)])
    assert done.exit_code == 0
    assert "0 errors, 1 warning" in done.stdout


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "labels" / "val" / "val_e.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    done = CliRunner().invoke(app, ["check", str(yaml), "--json"])
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["errors"], report["warnings"]) == (1, 0)
    assert report["findings"][0]["file"] == "labels/val/val_e.txt"
    assert report["findings"][0]["line"] == 1
    assert report["splits"]["train"]["boxes"] == {"AR": 2, "MR": 2}


def test_make_writes_a_data_set_without_a_finding(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    done = CliRunner().invoke(app, ["make", str(folder), "--n", "20", "--seed", "3"])
    assert done.exit_code == 0
    assert done.stdout.strip() == str(folder / "data.yaml")
    moved = folder.rename(tmp_path / "moved")
    result = check_data(moved / "data.yaml")
    assert result.findings == []
    assert {split: counts.images for split, counts in result.counts.items()} == {
        "train": 14,
        "val": 3,
        "test": 3,
    }
    assert str(tmp_path) not in (moved / "data.yaml").read_text()


def test_make_refuses_a_folder_that_is_not_empty_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for arguments, message in (
        (["make", str(tmp_path)], "is not empty"),
        (["make", str(tmp_path / "mine.txt")], "is a file"),
        (["make", str(tmp_path / "new"), "--n", "2"], "--n is 2"),
        (["make", str(tmp_path / "new"), "--seed", "-1"], "seed of the phantoms is -1"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_yaml_reaches_the_caller_as_our_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(tmp_path / "none.yaml")])
    assert isinstance(done.exception, DataError)


def test_the_command_imports_nothing_heavy_and_checking_needs_no_torch(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    code = (
        "import sys, gradprobe.cli.data\n"
        "assert not {'numpy', 'torch', 'PIL', 'yaml', 'cv2'} & set(sys.modules)\n"
        "from gradprobe.trainers.data.check import check_data\n"
        "check_data(sys.argv[1])\n"
        "assert not {'torch', 'cv2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(yaml)], check=True)
