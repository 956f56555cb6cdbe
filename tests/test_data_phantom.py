"""The embedded data set: the same bits everywhere, and images that are what their labels say."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gradprobe.errors import UsageError
from gradprobe.trainers.data.phantom import BOX_NAMES, IMAGE_NAMES, SIZE, Phantom, draw_phantom
from gradprobe.trainers.data.phantom_scene import Draws, draw_heart, draw_sector

VISIBLE = {"PSAX": {"AR", "PR", "TR"}, "PLAX": {"AR", "MR"}, "A4C": {"MR", "TR"}}

# Made with numpy 2.4 on x86-64, and the same with numpy 1.26 and with its vector instructions turned off.
DIGESTS = {
    (0, "train", 0): "373dae31576c2835e0ea5f1fb7c2d9e12efede30206ad76d12ff1d008347262a",
    (0, "val", 1): "4b7a2963612679354c19084c48b7f46bcee596125d33cc8b7909ec89e610b7eb",
    (7, "test", 32): "a30896006c3262f4e3570fc6a935c8d8b9123d36196b8db2f5ab0a1fa7261eef",
}


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [draw_phantom(11, "train", index) for index in range(150)]


@pytest.mark.parametrize("key", DIGESTS, ids=str)
def test_an_image_is_the_same_on_every_machine(key: tuple[int, str, int]) -> None:
    image = draw_phantom(*key).image
    assert hashlib.sha256(image.tobytes()).hexdigest() == DIGESTS[key]


def test_the_random_stream_is_the_same_on_every_machine() -> None:
    draws = Draws(5, 0, 3)
    numbers = [draws.integer(1000) for _ in range(4)]
    assert numbers == [int(raw) % 1000 for raw in np.random.PCG64(np.random.SeedSequence((5, 0, 3))).random_raw(4)]
    plane = Draws(1).plane(3, 5)
    assert plane.shape == (3, 5)
    assert plane.dtype == np.float32
    assert ((plane * 65536) % 1 == 0).all()


def test_planes_are_single_precision_throughout() -> None:
    sector = draw_sector(Draws(0), 32)
    heart = draw_heart(Draws(1), sector)
    planes = [sector.row, sector.column, sector.depth, sector.line, sector.beam_x, heart.p, heart.q]
    assert {plane.dtype for plane in planes} == {np.dtype(np.float32)}


def test_an_image_has_its_shape_and_uses_the_whole_range(phantoms: list[Phantom]) -> None:
    for drawn in phantoms[:20]:
        assert drawn.image.shape == (SIZE, SIZE, 3)
        assert drawn.image.dtype == np.uint8
        assert drawn.image.min() == 0
        assert drawn.image.max() > 150


def test_no_image_of_one_split_or_seed_is_in_another() -> None:
    keys = [(seed, split, i) for seed in (0, 1) for split in ("train", "val", "test") for i in range(8)]
    assert len({draw_phantom(*key).image.tobytes() for key in keys}) == len(keys)


def test_every_view_comes_up_and_shows_only_valves_seen_in_it(phantoms: list[Phantom]) -> None:
    seen: dict[str, set[str]] = {name: set() for name in IMAGE_NAMES}
    for drawn in phantoms:
        assert drawn.boxes
        classes = [BOX_NAMES[box[0]] for box in drawn.boxes]
        assert len(set(classes)) == len(classes)
        seen[IMAGE_NAMES[drawn.image_class]].update(classes)
    assert seen == VISIBLE


def test_boxes_are_inside_the_image_and_neither_tiny_nor_huge(phantoms: list[Phantom]) -> None:
    for _, x, y, width, height in (box for drawn in phantoms for box in drawn.boxes):
        assert 0 <= x - width / 2 < x + width / 2 <= 1
        assert 0 <= y - height / 2 < y + height / 2 <= 1
        assert 0.08 < width < 0.5
        assert 0.08 < height < 0.5


def coloured(image: np.ndarray) -> np.ndarray:
    """Where a pixel is not grey; the colour bar in the corner left out."""
    colour: np.ndarray = image.max(axis=2).astype(int) - image.min(axis=2) > 8
    colour[: SIZE * 3 // 10, int(SIZE * 0.9) :] = False
    return colour


def test_boxes_are_tight_around_the_colour_of_single_jets(phantoms: list[Phantom]) -> None:
    checked = 0
    for drawn in phantoms:
        _, x, y, width, height = drawn.boxes[0]
        left, right = round((x - width / 2) * SIZE), round((x + width / 2) * SIZE)
        top, bottom = round((y - height / 2) * SIZE), round((y + height / 2) * SIZE)
        colour = coloured(drawn.image)
        outside = colour.copy()
        outside[top:bottom, left:right] = False
        if len(drawn.boxes) > 1 or outside.any():  # another jet, or normal flow
            continue
        checked += 1
        rows, columns = np.flatnonzero(colour.any(axis=1)), np.flatnonzero(colour.any(axis=0))
        found = np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])
        assert np.abs(found - [top, bottom, left, right]).max() <= 2
        assert colour[top:bottom, left:right].mean() > 0.3
    assert checked > 20


def test_jets_are_a_mosaic_of_red_and_blue(phantoms: list[Phantom]) -> None:
    for drawn in phantoms[:40]:
        for _, x, y, width, height in drawn.boxes:
            rows = slice(round((y - height / 2) * SIZE), round((y + height / 2) * SIZE))
            columns = slice(round((x - width / 2) * SIZE), round((x + width / 2) * SIZE))
            red, _, blue = np.moveaxis(drawn.image[rows, columns].astype(int), 2, 0)
            assert min((red > blue + 20).mean(), (blue > red + 20).mean()) > 0.03


def test_direction_goes_with_the_valve(phantoms: list[Phantom]) -> None:
    """In the four-chamber view both valves leak away from the probe: more blue than red."""
    balance = []
    for drawn in phantoms:
        if IMAGE_NAMES[drawn.image_class] == "A4C":
            image = drawn.image.astype(int) * coloured(drawn.image)[..., None]
            half = image[SIZE * 6 // 10 :]
            balance.append((half[..., 2] > half[..., 0]).sum() - (half[..., 0] > half[..., 2]).sum())
    assert np.mean(np.array(balance) > 0) > 0.9


def test_no_single_pixel_and_no_mean_colour_tells_the_view() -> None:
    train = [draw_phantom(2, "train", index) for index in range(180)]
    held_out = [draw_phantom(2, "val", index) for index in range(60)]

    def features(drawn: Phantom) -> np.ndarray:
        grey = drawn.image.mean(axis=2)
        return np.concatenate([grey[::8, ::8].ravel(), drawn.image.mean(axis=(0, 1))])

    x = np.array([features(drawn) for drawn in train])
    y = np.array([drawn.image_class for drawn in train])
    means = np.array([x[y == view].mean(axis=0) for view in range(3)])
    probe = np.array([features(drawn) for drawn in held_out])
    truth = np.array([drawn.image_class for drawn in held_out])
    accuracy = (np.abs(probe[:, None] - means[None]).argmin(axis=1) == truth[:, None]).mean(axis=0)
    assert accuracy.max() < 0.85


def test_another_size_is_the_same_scene() -> None:
    small, large = draw_phantom(0, "train", 4, size=96), draw_phantom(0, "train", 4)
    assert small.image.shape == (96, 96, 3)
    assert np.allclose([box[1:] for box in small.boxes], [box[1:] for box in large.boxes], atol=0.03)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="seed of the phantoms is -1"):
        draw_phantom(-1, "train", 0)
