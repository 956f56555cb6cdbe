"""Reading data sets as YOLOv5 users write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from data_set_factory import labels_of, make_set, write_image

from gradprobe.errors import DataError
from gradprobe.trainers.data.check import CheckResult, check_data
from gradprobe.trainers.data.data_yaml import read_config
from gradprobe.trainers.data.labels import parse_labels
from gradprobe.trainers.data.splits import errors, label_path

NAMES = ("a", "b", "c", "d")


def files(result: CheckResult, split: str) -> list[str]:
    return [image.file.path.name for image in result.splits[split]]


def rewrite(yaml: Path, old: str, new: str) -> None:
    text = yaml.read_text()
    assert old in text
    yaml.write_text(text.replace(old, new))


# --- data.yaml ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ["names: [AR, MR]", "names: {0: AR, 1: MR}", "names: {1: MR, 0: AR}", "names:\n  - AR\n  - MR"]
)
def test_names_are_a_list_or_a_map(tmp_path: Path, names: str) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(f"train: a\nval: b\nnc: 2\n{names}\n")
    assert read_config(file).box_names == ("AR", "MR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.yaml: empty"),
        ("# only a comment\n", "data.yaml: empty"),
        ("train: a\nval: [b\nnames: [x]\n", r"data.yaml:3: not valid YAML"),
        ("train: a\n\tval: b\n", r"data.yaml:2: not valid YAML"),
        ("- a\n- b\n", "data.yaml:1: a list instead of keys"),
        ("train: a\nnames: [x]\n", "no key 'val'"),
        ("val: a\nnames: [x]\n", "no key 'train'"),
        ("train: a\nval: b\n", "no key 'names'"),
        ("train: a\nval: b\nnames: [x, y]\nnc: 3\n", r"data.yaml:4: nc is 3, but names has 2"),
        ("train: a\nval: b\nnames: {0: x, 2: y}\n", r"data.yaml:3: the keys of names are not 0, 1"),
        ("train: a\nval: b\nnames: [x, x]\n", r"data.yaml:3: names has the class 'x' more than once"),
        ("train: a\nval: b\nnames: x\n", "data.yaml:3: names is 'x'"),
        ("train: 5\nval: b\nnames: [x]\n", "data.yaml:1: train is 5"),
        ("train: a\nval: []\nnames: [x]\n", "data.yaml:2: val is"),
        ("path: 3\ntrain: a\nval: b\nnames: [x]\n", "data.yaml:1: path is 3"),
        ("train: a\nval: b\nnames: [x]\nimage_labels: c.csv\n", "data.yaml:4: image_labels needs image_names"),
        ("train: a\nval: b\nnames: [x]\nimage_names: [y]\n", "data.yaml:4: image_names has one class"),
    ],
)
def test_a_malformed_yaml_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_config(file)


def test_a_missing_yaml_and_a_folder_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.yaml: no such file; give a data.yaml, or 'phantom'"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(DataError, match=r"a folder; name the data.yaml in it"):
        read_config(tmp_path)


def test_a_yaml_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_bytes(b"\xff\xfe\x00names")
    with pytest.raises(DataError, match="cannot be read"):
        read_config(tmp_path / "data.yaml")


# --- path, and splits as folder, list or txt file --------------------------------------------------


def test_path_is_relative_to_the_yaml_or_absolute_and_may_be_missing(tmp_path: Path) -> None:
    yaml = make_set(tmp_path / "set")
    elsewhere = tmp_path / "other" / "data.yaml"
    elsewhere.parent.mkdir()
    for path in ("path: ../set", f"path: {tmp_path / 'set'}"):
        elsewhere.write_text(yaml.read_text().replace("path: .", path))
        assert len(check_data(elsewhere).splits["train"]) == 4
    rewrite(yaml, "path: .\n", "")
    assert len(check_data(yaml).splits["train"]) == 4


def test_a_split_is_a_folder_a_txt_file_or_a_list_of_those(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    write_image(tmp_path / "images" / "extra" / "deep" / "e.png", 50)
    (tmp_path / "lists").mkdir()
    # One relative to the txt file, one relative to the root, one absolute; a blank line between.
    one, two, three = (tmp_path / "images" / "train" / f"train_{name}.png" for name in "abc")
    lines = f"../images/train/{one.name}\n\nimages/train/{two.name}\n{three}\n"
    (tmp_path / "lists" / "some.txt").write_text(lines)
    rewrite(yaml, "train: images/train", "train: [lists/some.txt, images/extra]")
    result = check_data(yaml)
    assert files(result, "train") == [one.name, two.name, three.name, "e.png"]
    assert [len(image.boxes) for image in result.splits["train"]] == [1, 1, 1, 0]


def test_a_txt_file_that_lists_a_missing_image_is_named_with_its_line(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "some.txt").write_text("./images/train/train_a.png\n./images/train/gone.png\n")
    rewrite(yaml, "train: images/train", "train: some.txt")
    found = errors(check_data(yaml).findings)
    gone = tmp_path / "images" / "train" / "gone.png"
    message = f"some.txt:2: lists ./images/train/gone.png, which does not exist; looked for {gone}"
    assert [str(each) for each in found] == [message]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("set/images/train/a.png", "set/labels/train/a.txt"),
        ("images/set/images/a.b.jpg", "images/set/labels/a.b.txt"),
        ("set/a.png", "set/a.txt"),
        ("set/images.png", "set/images.txt"),
    ],
)
def test_labels_lie_beside_images(image: str, label: str) -> None:
    assert label_path(Path("/data") / image) == Path("/data") / label


# --- lines of a label file -------------------------------------------------------------------------


def test_boxes_and_polygons_may_be_mixed() -> None:
    label = parse_labels("1 0.5 0.5 0.2 0.4\n\n2 0.1 0.2 0.5 0.2 0.3 0.8\n", NAMES, 0)
    assert label.problems == []
    assert label.boxes[0] == (1, 0.5, 0.5, 0.2, 0.4)
    assert label.boxes[1] == pytest.approx((2, 0.3, 0.5, 0.4, 0.6))


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_an_empty_label_file_is_background(text: str) -> None:
    label = parse_labels(text, NAMES, 3)
    assert (label.boxes, label.problems, label.one_hot) == ([], [], None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("4 0.5 0.5 0.1 0.1", "class 4 is none of the 4 classes 0 to 3"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("0 0.5 0.5 0.1", "4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 numbers"),
        ("AR 0.5 0.5 0.1 0.1", "not a row of numbers"),
        ("0 0,5 0,5 0,1 0,1", "not a row of numbers"),
        ("0 nan 0.5 0.1 0.1", "not finite"),
        ("0 inf 0.5 0.1 0.1", "not finite"),
        ("0 1.2 0.5 0.1 0.1", r"coordinate 1.2 is outside \[0, 1\]"),
        ("0 0.5 0.5 -0.1 0.1", r"coordinate -0.1 is outside"),
        ("0 0.1 0.1 0.5 1.1 0.3 0.3", "coordinate 1.1 is outside"),
        ("0 0.5 0.5 0 0.1", "without area"),
        ("0 0.1 0.5 0.2 0.5 0.3 0.5", "without area"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str) -> None:
    label = parse_labels(f"0 0.5 0.5 0.1 0.1\n{line}\n3 0.4 0.4 0.1 0.1\n", NAMES, 0)
    assert len(label.boxes) == 2
    [(number, problem)] = label.problems
    assert number == 2
    assert re.search(message, problem)


def test_rounding_beyond_the_edge_is_forgiven_and_cut_off() -> None:
    label = parse_labels("0 1.0000005 0.5 1 0.5\n", NAMES, 0)
    assert label.problems == []
    assert label.boxes == [(0, 1.0, 0.5, 1.0, 0.5)]


def test_a_repeated_line_is_one_box() -> None:
    label = parse_labels("0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n0 0.50 0.5 0.1 0.1\n", NAMES, 0)
    assert len(label.boxes) == 2
    assert label.repeated == [3]


# --- the one-hot row ------------------------------------------------------------------------------

POLYGON = "3 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5"


@pytest.mark.parametrize(
    ("text", "classes", "one_hot", "boxes"),
    [
        (f"{POLYGON}\n\n0 1 0\n", 3, [0, 1, 0], 1),
        (f"{POLYGON}\n\n0 1 0\n", None, [0, 1, 0], 1),
        (f"{POLYGON}\n0 1 0\n", 3, [0, 1, 0], 1),  # no blank line, but 3 numbers are no object
        (f"{POLYGON}\r\n\r\n0 1 0\r\n\r\n", 3, [0, 1, 0], 1),
        ("\n0 1 0\n", 3, [0, 1, 0], 0),  # background with a class
        ("0 1 0", 3, [0, 1, 0], 0),
        ("0.0 1.0 0.0", 3, [0, 1, 0], 0),
        (f"{POLYGON}\n\n0 0 0 1 0\n", 5, [0, 0, 0, 1, 0], 1),  # reads as a box, too
        (f"{POLYGON}\n\n0 0 0 1 0\n", None, [0, 0, 0, 1, 0], 1),
        ("0 0 0 1 0", 5, [0, 0, 0, 1, 0], 0),
        (f"{POLYGON}\n\n0 0 0 0 0 1 0\n", 7, [0, 0, 0, 0, 0, 1, 0], 1),  # reads as a polygon, too
        (f"{POLYGON}\n\n1 0.5 0.5 0.2 0.2\n", 5, None, 2),  # a box after a blank line stays a box
        (f"{POLYGON}\n\n1 0 0 1 0 1 1\n", 3, None, 2),  # a triangle over half the image
        (f"{POLYGON}\n\n0 1 1 1 1\n", 3, None, 2),  # a box in the corner
    ],
)
def test_what_is_taken_for_a_one_hot_row(
    text: str, classes: int | None, one_hot: list[float] | None, boxes: int
) -> None:
    label = parse_labels(text, NAMES, classes)
    assert label.problems == []
    assert label.one_hot == one_hot
    assert len(label.boxes) == boxes


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        (f"{POLYGON}\n0 0 0 1 0\n", 5),  # no blank line before what could be a box
        (f"{POLYGON}\n\n0 0 0 1 0\n", 3),  # a box by its length, not a row of three
        (f"{POLYGON}\n\n0 1 0\n", 4),  # neither
        (f"{POLYGON}\n\n0 1 0\n", 0),  # the classes come from a csv
    ],
)
def test_what_is_not_taken_for_a_one_hot_row_is_an_error(text: str, classes: int) -> None:
    label = parse_labels(text, NAMES, classes)
    assert label.one_hot is None
    assert len(label.problems) == 1


def test_one_hot_rows_give_classes_and_default_names(tmp_path: Path) -> None:
    yaml = make_set(tmp_path, csv=False)
    for index, label in enumerate(labels_of(tmp_path)):
        row = ["0", "0", "0"]
        row[index % 3] = "1"
        label.write_text(f"{POLYGON.replace('3', '1', 1)}\n\n{' '.join(row)}\n")
    rewrite(yaml, "image_names: [x, y]\nimage_labels: classes.csv\n", "")
    result = check_data(yaml)
    assert errors(result.findings) == []
    assert result.image_names == ("class0", "class1", "class2")
    assert result.counts["train"].boxes == {"AR": 0, "MR": 4}
    assert [image.image_class for image in result.splits["train"]] == [0, 1, 2, 0]


@pytest.mark.parametrize(("row", "message"), [("1 1 0", "with 2 ones"), ("0 0 0", "with 0 ones")])
def test_a_row_that_is_not_one_hot_is_an_error(tmp_path: Path, row: str, message: str) -> None:
    yaml = make_set(tmp_path, csv=False)
    rewrite(yaml, "image_names: [x, y]\nimage_labels: classes.csv\n", "image_names: [x, y, z]\n")
    for label in labels_of(tmp_path):
        label.write_text("\n0 0 1\n")
    first = labels_of(tmp_path)[0]
    first.write_text(f"1 0.5 0.5 0.1 0.1\n\n{row}\n")
    [finding] = errors(check_data(yaml).findings)
    assert finding.line == 3
    assert finding.file == first.relative_to(tmp_path).as_posix()
    assert message in finding.message


def test_rows_of_different_lengths_are_an_error_for_the_odd_one_out(tmp_path: Path) -> None:
    yaml = make_set(tmp_path, csv=False)
    rewrite(yaml, "image_names: [x, y]\nimage_labels: classes.csv\n", "")
    for label in labels_of(tmp_path):
        label.write_text("\n0 0 1\n")
    labels_of(tmp_path)[-1].write_text("\n0 1\n")
    result = check_data(yaml)
    [finding] = errors(result.findings)
    assert "with 2 numbers; others have 3" in finding.message
    assert len(result.image_names) == 3
