"""What training gets to see: letterboxed images, boxes that fit them, batches in a known order."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_set_factory import COCO128, make_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gradprobe.errors import DataError, UsageError
from gradprobe.trainers.data.dataset import Batch, ImageStore, Loader
from gradprobe.trainers.data.images import letterbox, place, place_boxes
from gradprobe.trainers.data.loading import LoadedData, load_data
from gradprobe.trainers.data.phantom import write_phantoms

# --- letterbox -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (480, 640, 320, (0, 40, 320, 240)),  # left, top, width, height
        (640, 480, 320, (40, 0, 240, 320)),
        (100, 100, 160, (0, 0, 160, 160)),
        (80, 160, 160, (0, 40, 160, 80)),
        (427, 640, 160, (0, 26, 160, 107)),  # 106.75 rounded up; 53 over: 26 above, 27 below
        (1, 1000, 64, (0, 31, 64, 1)),
    ],
)
def test_where_an_image_lies(height: int, width: int, size: int, expected: tuple[int, ...]) -> None:
    placed = place(height, width, size)
    assert (placed.left, placed.top, placed.width, placed.height) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([32, 160, 640]))
@settings(deadline=None)
def test_an_image_fills_its_square_one_way_and_is_centred(height: int, width: int, size: int) -> None:
    placed = place(height, width, size)
    assert max(placed.width, placed.height) == size
    assert min(placed.width, placed.height) >= 1
    assert 0 <= size - placed.width - 2 * placed.left <= 1
    assert 0 <= size - placed.height - 2 * placed.top <= 1


def test_the_padding_is_grey_and_the_image_untouched_where_it_need_not_be_scaled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 96, 3), dtype=np.uint8)
    square, placed = letterbox(image, 96)
    assert square.shape == (96, 96, 3)
    assert (square[18:78] == image).all()
    assert (square[:18] == 114).all()
    assert (square[78:] == 114).all()
    assert placed.top == 18


def test_shrinking_averages_areas_and_enlarging_interpolates() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small, _ = letterbox(np.repeat(board[..., None], 3, axis=2), 32)
    assert np.abs(small.astype(int) - 127.5).max() <= 1  # every pixel the mean of two black, two white
    step = np.zeros((2, 2, 3), dtype=np.uint8)
    step[:, 1] = 200
    large, _ = letterbox(step, 32)
    assert len(np.unique(large)) > 10


def test_yolov5_makes_the_same_square() -> None:
    """The other package's own two steps (load_image, letterbox), as oracle."""
    cv2 = pytest.importorskip("cv2")
    theirs = _yolov5_letterbox()
    for height, width in ((480, 640), (427, 640), (375, 500), (50, 33), (161, 97), (160, 160)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ratio = 160 / max(height, width)
        scaled = image
        if ratio != 1:
            method = cv2.INTER_LINEAR if ratio > 1 else cv2.INTER_AREA
            shape = (math.ceil(width * ratio), math.ceil(height * ratio))
            scaled = cv2.resize(image, shape, interpolation=method)
        expected, _, padding = theirs(scaled, 160, auto=False, scaleup=False)
        square, placed = letterbox(image, 160)
        assert (square == expected).all()
        assert abs(placed.left - padding[0]) <= 0.5
        assert abs(placed.top - padding[1]) <= 0.5


def _yolov5_letterbox() -> Any:
    """yolov5's function, cut out of its file: importing the package changes the whole process."""
    import ast
    import importlib.util

    cv2 = pytest.importorskip("cv2")
    spec = importlib.util.find_spec("yolov5")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("yolov5 is not installed")
    file = Path(spec.submodule_search_locations[0]) / "utils" / "augmentations.py"
    wanted: list[ast.stmt] = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "letterbox"
    ]
    scope = {"cv2": cv2, "np": np}
    exec(compile(ast.Module(wanted, []), str(file), "exec"), scope)
    return scope["letterbox"]


def test_boxes_move_with_the_image() -> None:
    rows = place_boxes([(3, 0.5, 0.5, 1.0, 1.0), (1, 0.25, 0.25, 0.5, 0.5)], place(480, 640, 320))
    assert rows.tolist() == [[3, 0.5, 0.5, 1.0, 0.75], [1, 0.25, 0.3125, 0.5, 0.375]]
    assert place_boxes([], place(480, 640, 320)).shape == (0, 5)


def test_a_box_beyond_the_image_is_cut_off() -> None:
    [row] = place_boxes([(0, 0.9, 0.5, 0.4, 0.5)], place(100, 100, 100))
    assert row.tolist() == pytest.approx([0, 0.85, 0.5, 0.3, 0.5])


def test_a_painted_rectangle_is_found_where_its_box_says(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    pixels = np.zeros((90, 210, 3), dtype=np.uint8)
    pixels[30:60, 70:175] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "train" / "train_a.png")
    box = f"0 {122.5 / 210} {45 / 90} {105 / 210} {30 / 90}\n"
    (tmp_path / "labels" / "train" / "train_a.txt").write_text(box)
    sample = load_data(yaml, imgsz=160).train[0]
    white = sample.image[0] > 200
    rows, columns = torch.nonzero(white.any(dim=1)).ravel(), torch.nonzero(white.any(dim=0)).ravel()
    _, x, y, width, height = (sample.boxes[0] * 160).tolist()
    found = [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1]
    expected = [x - width / 2, x + width / 2, y - height / 2, y + height / 2]
    assert [float(value) for value in found] == pytest.approx(expected, abs=1.0)


# --- load_data -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms() -> LoadedData:
    return load_data("phantom", imgsz=64, seed=1, n_train=10, n_val=4, n_test=3)


def test_phantoms_come_from_memory(phantoms: LoadedData) -> None:
    assert phantoms.name == "phantom"
    assert phantoms.box_names == ("AR", "MR", "PR", "TR")
    assert phantoms.image_names == ("PSAX", "PLAX", "A4C")
    assert phantoms.test is not None
    assert (len(phantoms.train), len(phantoms.val), len(phantoms.test)) == (10, 4, 3)
    assert phantoms.skipped == phantoms.warnings == ()
    names = [*phantoms.train.names, *phantoms.val.names, *phantoms.test.names]
    assert len(set(names)) == len(names)
    sample = phantoms.train[0]
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.uint8


def test_phantoms_in_memory_are_those_written_to_disk(tmp_path: Path) -> None:
    disk = load_data(write_phantoms(tmp_path / "set", 8, seed=1), imgsz=160)
    memory = load_data("phantom", imgsz=160, seed=1, n_train=6, n_val=1)
    assert (disk.box_names, disk.image_names) == (memory.box_names, memory.image_names)
    assert disk.train.names == memory.train.names
    assert len(disk.test or ()) == 1
    for here, there in zip((disk.train[i] for i in range(6)), (memory.train[i] for i in range(6)), strict=True):
        assert torch.equal(here.image, there.image)
        assert torch.allclose(here.boxes, there.boxes, atol=1e-5)
        assert here.label == there.label


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path, phantoms: LoadedData) -> None:
    again = load_data("phantom", imgsz=32, seed=1, n_train=10, n_val=4, n_test=3)
    other = load_data("phantom", imgsz=32, seed=2, n_train=10, n_val=4, n_test=3)
    assert again.fingerprint == phantoms.fingerprint
    assert other.fingerprint != phantoms.fingerprint
    assert len(phantoms.fingerprint) == 64

    yaml = make_set(tmp_path / "one")
    first = load_data(yaml, imgsz=32).fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "deeper" / "two")
    moved = tmp_path / "deeper" / "two" / "data.yaml"
    moved.write_text(moved.read_text().replace("images/train", "[images/train]"))
    assert load_data(moved, imgsz=64).fingerprint == first
    label = moved.parent / "labels" / "val" / "val_e.txt"
    label.write_text("0 0.5 0.25 0.5 0.25\n")
    changed = load_data(moved, imgsz=32).fingerprint
    assert changed != first
    classes = moved.parent / "classes.csv"
    classes.write_text(classes.read_text().replace("val_e.png,x", "val_e.png,y"))
    assert load_data(moved, imgsz=32).fingerprint not in (first, changed)


def test_a_data_set_with_errors_is_refused_and_told_how_to_go_on(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    lines = "".join(f"{number} 0.5 0.5 0.1 0.1\n" for number in range(2, 10))
    (tmp_path / "labels" / "train" / "train_b.txt").write_text(lines)
    with pytest.raises(DataError) as caught:
        load_data(yaml, imgsz=32)
    message = str(caught.value)
    assert "8 errors" in message
    assert "labels/train/train_b.txt:1: class 2" in message
    assert "and 3 more" in message
    assert "--skip-bad" in message
    assert f"gradprobe data check {yaml}" in message


def test_skip_bad_leaves_out_the_images_concerned_and_says_so(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "labels" / "train" / "train_b.txt").write_text("0 0.5 0.5 0.1 0.1\n9 9 9 9 9\n1 2 3\n")
    (tmp_path / "images" / "train" / "train_c.png").write_bytes(b"no image")
    csv = tmp_path / "classes.csv"
    csv.write_text(csv.read_text().replace("train_d.png,y\n", ""))
    data = load_data(yaml, imgsz=32, skip_bad=True)
    assert data.train.names == ("train_a.png",)
    assert len(data.val) == 2
    assert len(data.skipped) == 3
    assert data.skipped[0].startswith("train: train_b.png: line 2: class 9")
    assert data.skipped[0].endswith("(and 1 more)")
    assert data.skipped[1].startswith("train: train_c.png: unreadable image")
    assert data.skipped[2] == "train: train_d.png: no image class"


def test_skip_bad_cannot_make_up_for_a_missing_split(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    shutil.rmtree(tmp_path / "images" / "val")
    with pytest.raises(DataError, match=r"val: images/val does not exist(.|\n)*--skip-bad cannot help"):
        load_data(yaml, imgsz=32, skip_bad=True)


def test_a_split_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    for label in (tmp_path / "labels" / "val").iterdir():
        label.write_text("9 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match="val: no image is left; all 2"):
        load_data(yaml, imgsz=32, skip_bad=True)


def test_what_is_stored_with_a_run_holds_no_absolute_path(tmp_path: Path) -> None:
    yaml = make_set(tmp_path / "set")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "set" / "images" / "train", elsewhere / "images" / "train")
    text = yaml.read_text().replace("train: images/train", f"train: {elsewhere / 'images' / 'train'}")
    csv = yaml.with_name("classes.csv")
    csv.write_text(csv.read_text().replace("train_a.png,x\n", ""))
    yaml.write_text(text)
    data = load_data(yaml, imgsz=32)
    assert data.name == "data.yaml"
    assert data.warnings
    assert str(tmp_path) not in " ".join([*data.skipped, *data.warnings, *data.train.names])


@pytest.mark.parametrize(("imgsz", "following"), [(150, 160), (31, 32), (0, 32), (-5, 32), (161, 192)])
def test_an_image_size_that_does_not_suit_says_the_next_that_does(imgsz: int, following: int) -> None:
    with pytest.raises(UsageError, match=rf"imgsz {imgsz} is not a multiple of 32; .* --imgsz {following}$"):
        load_data("phantom", imgsz=imgsz)


def test_an_image_behind_a_link_goes_by_the_name_of_the_link(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    (tmp_path / "pool").mkdir()
    for image in sorted((tmp_path / "images").rglob("*.png")):
        stored = image.rename(tmp_path / "pool" / f"{ord(image.stem[-1]):032x}")
        image.symlink_to(stored)
    twin = tmp_path / "images" / "val" / "val_g.png"
    twin.symlink_to((tmp_path / "images" / "train" / "train_a.png").resolve())
    data = load_data(yaml, imgsz=32)
    assert data.train.names == ("train_a.png", "train_b.png", "train_c.png", "train_d.png")
    assert data.warnings == ("images/val/val_g.png: val: is also in train",)
    assert [len(data.train[index].boxes) for index in range(4)] == [1, 1, 1, 1]


def test_counts_are_for_phantoms_and_positive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="n_val is 0"):
        load_data("phantom", imgsz=32, n_val=0)
    with pytest.raises(UsageError, match="n_train counts phantoms"):
        load_data(make_set(tmp_path), imgsz=32, n_train=2)


def test_images_beyond_the_bound_are_read_anew_and_are_the_same(tmp_path: Path) -> None:
    from gradprobe.trainers.data.check import check_data

    yaml = make_set(tmp_path)
    plenty, none = ImageStore(64), ImageStore(64, limit=64 * 64 * 3 * 2)
    result = check_data(yaml, keep=plenty.add)
    check_data(yaml, keep=none.add)
    paths = [image.file.path for image in result.splits["train"]]
    for path in paths:
        assert (plenty.get(path) == none.get(path)).all()
    for path in paths:
        path.unlink()
    assert plenty.get(paths[3]).shape == (64, 64, 3)
    assert none.get(paths[1]).shape == (64, 64, 3)
    with pytest.raises(DataError, match="became unreadable"):
        none.get(paths[3])


@pytest.mark.skipif(not COCO128.exists(), reason="coco128 is not beside the repository")
def test_coco128_loads_without_its_two_images_that_have_no_class() -> None:
    data = load_data(COCO128, imgsz=64)
    assert (len(data.train), len(data.val), data.test) == (126, 126, None)
    assert len(data.box_names) == 80
    assert {message.split(": ")[1] for message in data.skipped} == {"000000000250.jpg", "000000000508.jpg"}
    batch = next(iter(Loader(data.train, 126, shuffle=False)))
    assert batch.boxes[:, 2:].min() >= 0
    assert batch.boxes[:, 2:].max() <= 1
    assert sorted(batch.labels.unique().tolist()) == [0, 1, 2, 3, 4]


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_has_its_shapes_types_and_ranges(phantoms: LoadedData) -> None:
    loader = Loader(phantoms.train, 4, shuffle=False)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 64, 64), torch.float32)
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert (batch.labels.tolist(), batch.labels.dtype) == ([0, 1, 2, 0], torch.int64)
    assert batch.boxes.dtype == torch.float32
    assert batch.names == phantoms.train.names[:4]
    for index in range(4):
        rows = batch.boxes[batch.boxes[:, 0] == index][:, 1:]
        assert torch.equal(rows, phantoms.train[index].boxes)
    assert torch.equal(batch.images[2], phantoms.train[2].image.float() / 255)
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.boxes.device.type, moved.labels.device.type} == {"meta"}
    assert isinstance(moved, Batch)


def test_a_batch_of_background_has_no_boxes(tmp_path: Path) -> None:
    yaml = make_set(tmp_path)
    for label in (tmp_path / "labels" / "train").iterdir():
        label.write_text("")
    batch = next(iter(Loader(load_data(yaml, imgsz=32).train, 4)))
    assert batch.boxes.shape == (0, 6)


def order(data: LoadedData, seed: int, epoch: int) -> list[str]:
    loader = Loader(data.train, 3, seed=seed)
    loader.set_epoch(epoch)
    return [name for batch in loader for name in batch.names]


def test_the_order_is_a_function_of_seed_and_epoch(phantoms: LoadedData) -> None:
    orders = {key: order(phantoms, *key) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len({tuple(names) for names in orders.values()}) == 4
    for key, names in orders.items():
        assert sorted(names) == sorted(phantoms.train.names)
        torch.manual_seed(5)
        assert order(phantoms, *key) == names


def global_states() -> tuple[object, ...]:
    numpys: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2], random.getstate()


def test_the_global_random_generators_are_left_alone(phantoms: LoadedData) -> None:
    before = global_states()
    order(phantoms, 3, 2)
    load_data("phantom", imgsz=32, n_train=1, n_val=1, n_test=1)
    after = global_states()
    assert before == after


def test_a_batch_size_below_one_is_refused(phantoms: LoadedData) -> None:
    with pytest.raises(UsageError, match="batch size is 0"):
        Loader(phantoms.train, 0)
