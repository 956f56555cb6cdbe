"""Data sets as other people's tools leave them: paths, names, rows and images that we would write otherwise."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_set_factory import YAML, labels_of, make_set, write_image
from PIL import Image

from gradprobe.errors import DataError
from gradprobe.trainers.data.check import CheckResult, check_data
from gradprobe.trainers.data.data_yaml import read_config
from gradprobe.trainers.data.loading import load_data
from gradprobe.trainers.data.splits import errors, warnings

END = "names: [AR, MR]\nimage_names: [x, y]\nimage_labels: classes.csv\n"


def names(result: CheckResult, split: str) -> list[str]:
    return [image.file.name for image in result.splits[split]]


def messages(yaml: Path) -> list[str]:
    return [str(finding) for finding in check_data(yaml).findings]


def roboflow(folder: Path) -> Path:
    """A set as Roboflow exports it: data.yaml beside train/ and valid/, which it calls ../train and ../valid."""
    yaml = make_set(folder)
    for split, theirs in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (folder / theirs).mkdir(exist_ok=True)
            shutil.move(folder / kind / split, folder / theirs / kind)
    shutil.rmtree(folder / "images")
    shutil.rmtree(folder / "labels")
    yaml.write_text(f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n{END}")
    return yaml


# --- where things lie ------------------------------------------------------------------------------


def test_what_roboflow_exports_is_found(tmp_path: Path) -> None:
    result = check_data(roboflow(tmp_path / "set"))
    assert [len(result.splits[split]) for split in ("train", "val")] == [4, 2]
    assert all(image.boxes for image in result.splits["train"])
    assert errors(result.findings) == []
    [finding] = warnings(result.findings)  # it also names a test split that it has not
    assert "test: ../test/images does not exist" in finding.message
    assert str(tmp_path / "set" / "test" / "images") in finding.message
    assert "test" not in result.splits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path: .\ntrain", "../train/images"),
        ("path: ../set\ntrain", "../train/images"),
        ("train", "[../train/images, ../valid/images/val_e.png]"),
        ("train", "../train.txt"),
        ("train", "..\\train\\images"),
        ("train", "'../train/images '"),
    ],
)
def test_one_step_too_far_up_is_taken_back_in_every_place(tmp_path: Path, key: str, value: str) -> None:
    yaml = roboflow(tmp_path / "set")
    (yaml.parent / "train.txt").write_text("".join(f"../train/images/train_{name}.png\n" for name in "abcd"))
    yaml.write_text(f"{key}: {value}\nval: ../valid/images\n{END}")
    found = names(check_data(yaml), "train")
    assert found[:4] == ["train_a.png", "train_b.png", "train_c.png", "train_d.png"]
    assert len(found) == (5 if value.startswith("[") else 4)


def test_what_is_there_as_written_is_taken_as_yolov5_takes_it_and_the_other_one_is_told(tmp_path: Path) -> None:
    yaml = roboflow(tmp_path / "set")
    write_image(tmp_path / "train" / "images" / "other.png", 1)
    result = check_data(yaml)
    assert names(result, "train") == ["other.png"]
    assert any("without ../ as well" in finding.message for finding in warnings(result.findings))


def test_paths_resolve_as_in_yolov5(tmp_path: Path) -> None:
    """Its own lines, cut out of its file, as oracle; with data.yaml's folder where it has its own."""
    (tmp_path / "set").mkdir()
    yaml = roboflow(tmp_path / "set")
    for name in ("train", "elsewhere"):
        (tmp_path / name / "images").mkdir(parents=True)
    write_image(tmp_path / "train" / "images" / "a.png", 1)
    write_image(tmp_path / "elsewhere" / "images" / "b.png", 2)
    for path in (".", "..", "../set", str(tmp_path)):
        for source in ("../train/images", "train/images", "../elsewhere/images", "set/train/images"):
            theirs = _resolve_by_yolov5({"path": str((yaml.parent / path).resolve()), "train": source})
            yaml.write_text(f"path: {path}\ntrain: {source}\nval: {yaml.parent}/valid/images\n{END}")
            ours = check_data(yaml).splits["train"]
            assert {image.file.path.parent for image in ours} == ({theirs} if theirs.is_dir() else set()), (
                path,
                source,
            )


def _resolve_by_yolov5(data: dict[str, Any]) -> Path:
    spec = importlib.util.find_spec("yolov5")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("yolov5 is not installed")
    file = Path(spec.submodule_search_locations[0]) / "utils" / "general.py"
    function = next(
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "check_dataset"
    )
    [loop] = [n for n in function.body if isinstance(n, ast.For) and "x.exists" in ast.unparse(n)]
    scope = {"data": data, "path": Path(data["path"]), "Path": Path}
    exec(compile(ast.Module([loop], []), str(file), "exec"), scope)
    return Path(data["train"])


@pytest.mark.parametrize("source", ["../gone/images", "gone", "[images/train, ../gone]", "images\\gone"])
def test_what_is_not_found_says_everywhere_it_was_looked_for(tmp_path: Path, source: str) -> None:
    yaml = make_set(tmp_path / "set")
    yaml.write_text(YAML.replace("train: images/train", f"train: {source}"))
    [finding] = errors(check_data(yaml).findings)
    assert finding.line == 2
    root = tmp_path / "set"
    expected = {
        "../gone/images": [tmp_path / "gone" / "images", root / "gone" / "images"],
        "gone": [root / "gone"],
        "[images/train, ../gone]": [tmp_path / "gone", root / "gone"],
        "images\\gone": [root / "images\\gone", root / "images" / "gone"],
    }
    for place in expected[source]:
        assert str(place) in finding.message


def test_a_path_that_is_not_there_is_told_at_its_line(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    yaml.write_text(YAML.replace("path: .", "path: ../datasets/heart"))
    with pytest.raises(
        DataError, match=r"data.yaml:1: path: ../datasets/heart is no folder; looked for .*datasets/heart"
    ):
        read_config(yaml)


def test_a_key_valid_is_told_to_be_val(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    yaml.write_text(YAML.replace("val: images/val", "valid: images/val"))
    with pytest.raises(DataError, match="rename the key 'valid' to 'val'"):
        read_config(yaml)


def test_hidden_files_do_not_count_and_links_to_folders_do(tmp_path: Path) -> None:
    yaml = make_set(tmp_path / "set")
    train = yaml.parent / "images" / "train"
    (train / "._train_a.png").write_bytes(b"what macOS leaves in archives")
    write_image(tmp_path / "pool" / "more.png", 77)
    (train / "linked").symlink_to(tmp_path / "pool", target_is_directory=True)
    result = check_data(yaml)
    assert errors(result.findings) == []
    assert sorted(names(result, "train"))[0] == "more.png"
    assert len(names(result, "train")) == 5


# --- backslashes, drives, ends of lines ------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "line", [".\\images\\train\\train_{}.png", "images\\train/train_{}.png", "./images/train/train_{}.png  "]
)
def test_a_listing_made_on_windows_is_read(tmp_path: Path, line: str, encoding: str) -> None:
    yaml = make_set(tmp_path)
    text = "".join(line.format(name) + "\r\n" for name in "abcd") + "\r\n"
    (tmp_path / "train.txt").write_bytes(text.encode(encoding))
    yaml.write_text(YAML.replace("train: images/train", "train: .\\train.txt"))
    result = check_data(yaml)
    assert result.findings == []
    assert names(result, "train") == [f"train_{name}.png" for name in "abcd"]
    assert all(image.boxes for image in result.splits["train"])


def test_backslashes_in_the_yaml_and_the_csv_are_read(tmp_path: Path) -> None:
    yaml = make_set(tmp_path / "set")
    (tmp_path / "set" / "lists").mkdir()
    shutil.move(tmp_path / "set" / "classes.csv", tmp_path / "set" / "lists" / "classes.csv")
    csv = tmp_path / "set" / "lists" / "classes.csv"
    text = (
        csv.read_text()
        .replace("train_a.png", ".\\images\\train\\train_a.png")
        .replace("val_e", "..\\images\\val\\val_e")
    )
    csv.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    elsewhere = tmp_path / "yamls" / "data.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(
        YAML.replace("path: .", "path: ..\\set").replace("images/", "images\\").replace("classes", "lists\\classes")
    )
    assert yaml.exists()
    result = check_data(elsewhere)
    assert result.findings == []
    assert [image.image_class for image in result.splits["train"]] == [0, 1, 0, 1]


@pytest.mark.skipif(os.name == "nt", reason="a backslash is no part of a name there")
def test_a_backslash_that_is_part_of_a_name_is_left_alone(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    image, label = tmp_path / "images/train/train_a.png", tmp_path / "labels/train/train_a.txt"
    image.rename(image.with_name("a\\b.png"))
    label.rename(label.with_name("a\\b.txt"))
    (tmp_path / "train.txt").write_text("images/train/a\\b.png\n")
    yaml.write_text(YAML.replace("train: images/train", "train: [train.txt, images/train]"))
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace("train_a.png", "a\\b.png"))
    result = check_data(yaml)
    assert names(result, "train")[0] == "a\\b.png"
    assert result.splits["train"][0].boxes
    assert result.splits["train"][0].image_class == 0
    assert load_data(yaml, imgsz=32).train.names[0] == "a\\b.png"


@pytest.mark.skipif(os.name == "nt", reason="drives are there")
@pytest.mark.parametrize("where", ["path", "source", "listing", "csv", "labels"])
def test_a_drive_letter_is_told(tmp_path: Path, where: str) -> None:
    yaml = make_set(tmp_path)
    text = YAML
    if where == "path":
        yaml.write_text(text.replace("path: .", "path: D:\\data\\heart"))
        with pytest.raises(DataError, match="drive letter"):
            check_data(yaml)
        return
    if where == "source":
        text = text.replace("train: images/train", "train: D:\\data\\images")
    elif where == "listing":
        (tmp_path / "train.txt").write_text("C:\\data\\images\\train\\train_a.png\n")
        text = text.replace("train: images/train", "train: train.txt")
    elif where == "csv":
        csv = tmp_path / "classes.csv"
        csv.write_text(csv.read_text().replace("train_a", "C:/data/images/train/train_a"))
    else:
        text = text.replace("image_labels: classes.csv", "image_labels: 'C:\\classes.csv'")
    yaml.write_text(text)
    assert any("drive letter" in message for message in messages(yaml))


@pytest.mark.parametrize("value", ['"images\\train"', '"images\\val"', '"images\\data"'])
def test_a_backslash_in_double_quotes_is_told_to_be_an_escape(tmp_path: Path, value: str) -> None:
    yaml = make_set(tmp_path)
    yaml.write_text(YAML.replace("train: images/train", f"train: {value}"))
    try:
        said = " ".join(messages(yaml))
    except DataError as error:
        said = str(error)
    assert "double quotes" in said


# --- names of classes ------------------------------------------------------------------------------

ODD = [
    "no",
    "yes",
    "on",
    "OFF",
    "null",
    "~",
    "1",
    "1.0",
    "0x10",
    "1_000",
    "2024-01-01",
    "12:30",
    "1e3",
    "+5",
    "0o7",
    ".inf",
]


@pytest.mark.parametrize("style", ["flow", "block", "map", "flow map", "quoted"])
@pytest.mark.parametrize("key", ["names", "image_names"])
def test_names_are_the_text_that_stands_there(tmp_path: Path, key: str, style: str) -> None:
    written = {
        "flow": f"[{', '.join(ODD)}]",
        "block": "".join(f"\n  - {name}" for name in ODD),
        "map": "".join(f"\n  {index}: {name}" for index, name in enumerate(ODD)),
        "flow map": "{" + ", ".join(f"'{index}': {name}" for index, name in reversed(list(enumerate(ODD)))) + "}",
        "quoted": "".join(f"\n  - '{name}'" for name in ODD),
    }[style]
    others = "" if key == "names" else "names: [a]\n"
    (tmp_path / "data.yaml").write_text(f"train: a\nval: b\n{others}{key}: {written}\n")
    config = read_config(tmp_path / "data.yaml")
    assert (config.box_names if key == "names" else config.image_names) == tuple(ODD)


@pytest.mark.parametrize(
    "pair", [("no", "yes"), ("on", "off"), ("1", "2"), ("0x10", "16"), ("12:30", "750"), ("01", "1")]
)
def test_the_csv_means_the_same_text(tmp_path: Path, pair: tuple[str, str]) -> None:
    yaml = make_set(tmp_path)
    yaml.write_text(YAML.replace("[x, y]", f"[{pair[0]}, {pair[1]}]"))
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace(",x", f",{pair[0]}").replace(",y", f",{pair[1]}"))
    result = check_data(yaml)
    assert result.findings == []
    assert result.image_names == pair
    assert [image.image_class for image in result.splits["train"]] == [0, 1, 0, 1]


def test_an_index_is_no_class_where_names_are_numbers(tmp_path: Path) -> None:
    """Of classes 1 and 2, the index 0 and the name 1 would silently be the same one."""
    yaml = make_set(tmp_path)
    yaml.write_text(YAML.replace("[x, y]", "[1, 2]"))
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace(",x", ",0").replace(",y", ",1"))
    found = errors(check_data(yaml).findings)
    assert len(found) == 3
    assert "image class '0' is none of 1, 2; where names are numbers" in found[0].message


@pytest.mark.parametrize(
    "names",
    ["{'0': AR, '1': MR}", '{"1": MR, "0": AR}', "{0: AR, '1': MR}", "{01: MR, 00: AR}", "\n  '1': MR\n  0: AR"],
)
def test_keys_in_quotes_and_out_of_order_are_numbers(tmp_path: Path, names: str) -> None:
    (tmp_path / "data.yaml").write_text(f"train: a\nval: b\nnames: {names}\n")
    assert read_config(tmp_path / "data.yaml").box_names == ("AR", "MR")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("{'0': x, '2': y}", r"the keys of names are not 0, 1, ..., 1: 1 is missing"),
        ("{1: x, 2: y}", "0 is missing.*number the classes anew"),
        ("{0: x, 5: y, 6: z}", "1, 2 are missing"),
        ("{0: x, 0: y}", "names numbers two classes 0"),
        ("{0: x, '0': y}", "names numbers two classes 0"),
        ("{x: 0, y: 1}", "'x' is no whole number; write 0: x"),
        ("{1.0: x}", "'1.0' is no whole number"),
        ("{x, y}", r"'x' is no whole number; write 0: x, 1: ..., or a list \[x, ...\]"),
        ("[no, 'no']", "names has the class 'no' more than once"),
        ("[null, 'null']", "names has the class 'null' more than once"),
        ("[a, '']", "entry 1 of names is empty"),
        ("\n  - a\n  -", "entry 1 of names is empty"),
        ("[a, [b]]", "entry 1 of names is a list"),
        ("\n  - a: b\n  - c", "entry 0 of names is a map .* in quotes"),
        ("[]", "names is empty"),
        ("[x]\nnames: [y]", "data.yaml:4: the key 'names' stands in line 3 already"),
    ],
)
def test_names_that_cannot_be_meant_say_what_to_do(tmp_path: Path, names: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(f"train: a\nval: b\nnames: {names}\n")
    with pytest.raises(DataError, match=message):
        read_config(tmp_path / "data.yaml")


# --- a box with landmarks, or a polygon -------------------------------------------------------------

FACE = "0 0.5 0.5 0.2 0.4 0.45 0.4 0.55 0.4 0.5 0.5 0.46 0.6 0.54 0.6\n"


def boxes(yaml: Path) -> list[tuple[float, ...]]:
    return [box for image in check_data(yaml).splits["train"] for box in image.boxes]


def with_rows(folder: Path, *rows: str, more: str = "") -> Path:
    yaml = make_set(folder)
    yaml.write_text(YAML + more)
    for index, label in enumerate(labels_of(folder)):
        label.write_text(rows[index % len(rows)])
    return yaml


def face(generator: np.random.Generator, points: int = 5, numbers: int = 2, missing: float = 0.0) -> str:
    """A box somewhere in the image, with landmarks in it."""
    width, height = generator.uniform(0.03, 0.5, 2)
    x, y = generator.uniform(width / 2, 1 - width / 2), generator.uniform(height / 2, 1 - height / 2)
    row = [0, x, y, width, height]
    for _ in range(points):
        here = [x + generator.uniform(-0.45, 0.45) * width, y + generator.uniform(-0.45, 0.45) * height]
        there = generator.uniform() >= missing
        row += [*(here if there else (0.0, 0.0)), *([int(generator.integers(1, 3)) if there else 0] * (numbers == 3))]
    return " ".join(f"{value:.6g}" for value in row) + "\n"


def blob(generator: np.random.Generator, points: int) -> str:
    """A polygon around a centre."""
    size = generator.uniform(0.05, 0.5)
    x, y = generator.uniform(size, 1 - size, 2)
    angles = np.sort(generator.uniform(0, 2 * np.pi, points))
    reach = size * generator.uniform(0.4, 1.0, points)
    row = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1).ravel()
    return "0 " + " ".join(f"{value:.6f}" for value in row) + "\n"


def test_a_box_with_landmarks_is_that_box_and_said_once(tmp_path: Path) -> None:
    yaml = with_rows(tmp_path, FACE)
    assert boxes(yaml) == [(0, 0.5, 0.5, 0.2, 0.4)] * 4
    [finding] = check_data(yaml).findings
    assert (finding.severity, finding.file, finding.line) == ("warning", "labels/train/train_a.txt", 1)
    assert "rows of 15 numbers: 6 of 6 are read as a box with 5 landmarks" in finding.message
    assert "kpt_shape: [5, 2]" in finding.message
    assert "in 6 files" in finding.message


@pytest.mark.parametrize(("points", "numbers"), [(5, 2), (17, 3), (4, 3), (6, 2), (21, 2), (1, 3)])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_landmarks_of_any_number_are_told_from_polygons(
    tmp_path: Path, points: int, numbers: int, missing: float
) -> None:
    generator = np.random.default_rng(points + numbers)
    rows = ["".join(face(generator, points, numbers, missing) for _ in range(20)) for _ in range(6)]
    expected = [tuple(map(float, line.split()[:5])) for row in rows[:4] for line in row.splitlines()]
    assert boxes(with_rows(tmp_path, *rows)) == expected
    assert boxes(with_rows(tmp_path, *rows, more=f"kpt_shape: [{points}, {numbers}]\n")) == expected
    assert check_data(tmp_path / "data.yaml").findings == []


@pytest.mark.parametrize("absent", ["-1 -1", "-0.0016 -0.0021"])
def test_landmarks_that_are_missing_are_no_coordinates(tmp_path: Path, absent: str) -> None:
    row = f"0 0.5 0.5 0.6 0.7 {' '.join([absent] * 5)}\n"
    yaml = with_rows(tmp_path, row)
    assert errors(check_data(yaml).findings) == []
    assert boxes(yaml) == [(0, 0.5, 0.5, 0.6, 0.7)] * 4


@pytest.mark.parametrize("points", [[7], [4], [3, 4, 5, 6, 7, 8, 9, 12, 30], [5, 50]])
def test_polygons_stay_polygons_also_where_some_could_be_boxes(tmp_path: Path, points: list[int]) -> None:
    from gradprobe.trainers.data.labels import could_hold_landmarks

    generator = np.random.default_rng(0)
    rows = ["".join(blob(generator, int(generator.choice(points))) for _ in range(30)) for _ in range(6)]
    numbers = [np.array(line.split(), dtype=float) for row in rows[:4] for line in row.splitlines()]
    assert sum(could_hold_landmarks(row.tolist()) for row in numbers) >= 10
    yaml = with_rows(tmp_path, *rows)
    found = np.array(boxes(yaml))
    xs, ys = [row[1::2] for row in numbers], [row[2::2] for row in numbers]
    np.testing.assert_allclose(found[:, 3], [np.ptp(x) for x in xs])
    np.testing.assert_allclose(found[:, 4], [np.ptp(y) for y in ys])
    assert check_data(yaml).findings == []


def test_rotated_boxes_in_the_middle_stay_polygons_without_a_word(tmp_path: Path) -> None:
    yaml = with_rows(tmp_path, "0 0.4 0.45 0.5 0.4 0.6 0.5 0.5 0.55\n")
    assert boxes(yaml) == pytest.approx(np.array([(0, 0.5, 0.475, 0.2, 0.15)] * 4))
    assert check_data(yaml).findings == []


def test_what_may_be_either_is_said_and_settled_by_kpt_shape(tmp_path: Path) -> None:
    row = "0 0.5 0.5 0.6 0.6 0.4 0.62\n"  # a triangle, or a box with one landmark
    yaml = with_rows(tmp_path, row)
    [finding] = check_data(yaml).findings
    assert "all 6 are read as polygons, though 6 of them could be a box with 1 landmark" in finding.message
    assert boxes(yaml)[0][3:] == pytest.approx((0.2, 0.12))
    yaml = with_rows(tmp_path, row, more="kpt_shape: [1, 2]\n")
    assert check_data(yaml).findings == []
    assert boxes(yaml)[0] == (0, 0.5, 0.5, 0.6, 0.6)
    yaml = with_rows(tmp_path, row, more="kpt_shape: [0, 2]\n")
    assert check_data(yaml).findings == []
    assert boxes(yaml)[0][3:] == pytest.approx((0.2, 0.12))


def test_landmarks_among_polygons_are_found_and_counted(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    rows = [FACE + "".join(blob(generator, points) for points in (4, 6, 7, 7, 8, 9, 12)) for _ in range(6)]
    found = check_data(with_rows(tmp_path, *rows))
    assert sum(box == (0, 0.5, 0.5, 0.2, 0.4) for image in found.splits["train"] for box in image.boxes) == 4
    [finding] = found.findings
    assert "rows of 15 numbers: 6 of 18 are read as a box with 5 landmarks" in finding.message
    assert "12 as polygons" in finding.message


def test_a_row_that_kpt_shape_does_not_allow_is_an_error(tmp_path: Path) -> None:
    yaml = with_rows(tmp_path, FACE, "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n", more="kpt_shape: [5, 2]\n")
    found = errors(check_data(yaml).findings)
    assert len(found) == 3
    assert "9 numbers; by kpt_shape in data.yaml a box with its landmarks has 15" in found[0].message
    yaml.write_text(YAML + "kpt_shape: 5\n")
    with pytest.raises(DataError, match=r"data.yaml:7: kpt_shape is 5; write \[points, 2\]"):
        check_data(yaml)


# --- images ----------------------------------------------------------------------------------------


def jpeg(**options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


KINDS = {"baseline": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_only_lacks_its_end_mark_is_used_and_told_and_left_as_it_is(
    tmp_path: Path, kind: str, lost: int
) -> None:
    yaml = make_set(tmp_path)
    image = tmp_path / "images" / "train" / "train_e.jpg"
    whole = jpeg(**KINDS[kind])
    image.write_bytes(whole[:-lost])
    with (tmp_path / "classes.csv").open("a") as csv:
        csv.write("train_e.jpg,x\n")
    kept: dict[Path, Any] = {}
    result = check_data(yaml, keep=kept.__setitem__)
    [finding] = result.findings
    assert finding.severity == "warning"
    assert finding.file == "images/train/train_e.jpg"
    assert "without its end mark" in finding.message
    assert (kept[image] == np.asarray(Image.open(io.BytesIO(whole)))).all()
    assert image.read_bytes() == whole[:-lost]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "end"), [(0.5, b""), (0.97, b""), (0.5, b"\xff\xd9"), (0.8, b"\xff\xd9")])
def test_a_jpeg_whose_data_end_early_is_an_error_even_with_an_end_mark(
    tmp_path: Path, kind: str, part: float, end: bytes
) -> None:
    yaml = make_set(tmp_path)
    whole = jpeg(**KINDS[kind])
    (tmp_path / "images" / "train" / "train_a.jpg").write_bytes(whole[: int(len(whole) * part)] + end)
    [finding] = errors(check_data(yaml).findings)
    assert finding.file == "images/train/train_a.jpg"
    assert "cut short" in finding.message


def test_whole_jpegs_are_not_suspected(tmp_path: Path) -> None:
    from gradprobe.trainers.data.images import decode

    grey = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 128, dtype=np.uint8)).save(grey, "JPEG")
    for content in (*(jpeg(**options) for options in KINDS.values()), grey.getvalue(), jpeg() + b"of a camera"):
        (tmp_path / "a.jpg").write_bytes(content)
        found = decode(tmp_path / "a.jpg")
        assert found.notes == ()
        assert (found.pixels == np.asarray(Image.open(io.BytesIO(content)))).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS")],
)
def test_what_stands_in_an_images_place_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "images" / "train" / "train_a.png").write_bytes(content)
    assert message in errors(check_data(yaml).findings)[0].message


@pytest.mark.parametrize(("suffix", "options"), [("tif", {}), ("webp", {"lossless": True}), ("png", {}), ("gif", {})])
def test_of_an_animated_image_the_first_frame_is_used_and_told(tmp_path: Path, suffix: str, options: Any) -> None:
    yaml = make_set(tmp_path)
    frames = [Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)) for value in (50, 100, 200)]
    stream = io.BytesIO()
    frames[0].save(stream, suffix.replace("tif", "tiff"), save_all=True, append_images=frames[1:], **options)
    (tmp_path / "images" / "train" / "train_a.png").write_bytes(stream.getvalue())  # the suffix does not matter
    [finding] = check_data(yaml).findings
    assert "3 frames or pages; only the first is used" in finding.message
    assert load_data(yaml, imgsz=32).train[0].image[:, 16, 16].tolist() == [50, 50, 50]


def test_twelve_bits_in_sixteen_are_told_and_the_full_range_is_not(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    image = tmp_path / "images" / "train" / "train_a.png"
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(image)
    [finding] = check_data(yaml).findings
    assert "no value above 4095: read by the upper 8 bits, as OpenCV does, it keeps 16 grey levels" in finding.message
    Image.fromarray(ramp * 16).save(image)
    assert check_data(yaml).findings == []


def test_pixels_are_those_that_yolov5_reads(tmp_path: Path) -> None:
    """OpenCV, which it reads with, as oracle: turned, CMYK (rounded otherwise), bilevel, transparent, 16 bits."""
    cv2 = pytest.importorskip("cv2")
    from gradprobe.trainers.data.images import decode

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    cases: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture.convert("CMYK"), "jpg", {"quality": 95}),
        (picture.convert("1"), "png", {}),
        (picture.convert("LA"), "png", {}),
        (Image.merge("RGBA", [*picture.split(), picture.convert("L")]), "png", {}),
        (Image.fromarray(np.random.default_rng(1).integers(0, 65536, (40, 50), dtype=np.uint16)), "png", {}),
    ]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases.append((picture, "jpg", {"exif": exif}))
    for number, (image, suffix, options) in enumerate(cases):
        file = tmp_path / f"{number}.{suffix}"
        image.save(file, **options)
        theirs = cv2.imread(str(file))[..., ::-1].astype(int)
        assert np.abs(decode(file).pixels - theirs).max() <= (2 if image.mode == "CMYK" else 0), number
