"""Box geometry against hand-computed numbers, round trips, and pictures: crop, drawing, PNG text."""

import numpy as np
import pytest
import torch
from PIL import Image

from util.boxes import (
    Crop,
    areas,
    clip_boxes,
    crop_boxes,
    flip_boxes,
    plan_center_crop,
    plan_random_crop,
    uncrop_boxes,
    visibility,
    xywh_to_xyxy,
    xyxy_to_xywh,
)
from util.images import (
    center_crop,
    crop_image,
    draw_boxes,
    load_image,
    make_grid,
    read_png_text,
    save_png,
    to_model_range,
    to_picture,
)
from util.rng import generator

SIZES = [(640, 480), (427, 640), (97, 64), (64, 64), (1023, 300), (31, 45), (500, 333)]


@pytest.fixture(params=[np.asarray, torch.tensor], ids=["numpy", "torch"])
def array(request):
    return lambda values: request.param(np.array(values, dtype=np.float64))


def random_boxes(count: int, width: float, height: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4)
    return corners * [width, height, width, height]


def test_formats_by_hand(array):
    boxes_xywh = array([[10, 20, 30, 5], [0, 0, 1, 1]])
    boxes_xyxy = xywh_to_xyxy(boxes_xywh)
    assert boxes_xyxy.tolist() == [[10, 20, 40, 25], [0, 0, 1, 1]]
    assert xyxy_to_xywh(boxes_xyxy).tolist() == boxes_xywh.tolist() == [[10, 20, 30, 5], [0, 0, 1, 1]]


def test_areas_clip_visibility_by_hand(array):
    boxes = array([[-0.5, 0, 0.5, 1], [0.2, 0.2, 0.4, 0.3], [1.5, 0, 2, 1], [0.5, 0.5, 0.5, 0.9], [0.6, 0, 0.4, 1]])
    assert areas(boxes).tolist() == pytest.approx([1, 0.02, 0.5, 0, 0])
    assert clip_boxes(boxes)[:3].tolist() == [[0, 0, 0.5, 1], [0.2, 0.2, 0.4, 0.3], [1, 0, 1, 1]]
    assert visibility(boxes).tolist() == pytest.approx([0.5, 1, 0, 0, 0])
    assert visibility(array([[-10, 90, 30, 130]]), 100, 100).tolist() == pytest.approx([30 * 10 / 1600])


def test_flip_by_hand_and_back(array):
    boxes = array([[0.1, 0.2, 0.4, 0.9]])
    assert flip_boxes(boxes).tolist()[0] == pytest.approx([0.6, 0.2, 0.9, 0.9])
    assert flip_boxes(array([[10, 0, 30, 5]]), width=100).tolist() == [[70, 0, 90, 5]]
    assert flip_boxes(flip_boxes(boxes)).tolist()[0] == pytest.approx(boxes.tolist()[0])


def test_inputs_are_not_changed(array):
    boxes = array([[-0.5, 0.25, 0.5, 2]])
    crop = Crop((10, 10), (10, 10), 1, 1, (8, 8))
    for change in (flip_boxes, clip_boxes, xywh_to_xyxy, xyxy_to_xywh, lambda each: crop_boxes(each, crop)):
        change(boxes)
        assert boxes.tolist() == [[-0.5, 0.25, 0.5, 2]]


def test_no_boxes(array):
    none = array(np.zeros((0, 4)))
    assert xywh_to_xyxy(flip_boxes(clip_boxes(none))).shape == (0, 4)
    assert visibility(none).shape == (0,)


def test_crop_by_hand(array):
    crop = plan_center_crop(400, 200, 100)  # halved once, to 200 x 100
    assert (crop.resized, crop.x0, crop.y0, crop.scale) == ((200, 100), 50, 0, (0.5, 0.5))
    assert crop_boxes(array([[100, 0, 300, 200], [200, 100, 220, 140]]), crop).tolist() == [
        [0, 0, 1, 1],
        [0.5, 0.5, 0.6, 0.7],
    ]


@pytest.mark.parametrize("size", [16, 64, (16, 24), (96, 32)])
@pytest.mark.parametrize("image_size", SIZES)
def test_crop_round_trip(image_size, size):
    for crop in (plan_center_crop(*image_size, size), plan_random_crop(*image_size, size, generator(0, *image_size))):
        boxes_px = random_boxes(20, *image_size)
        np.testing.assert_allclose(uncrop_boxes(crop_boxes(boxes_px, crop), crop), boxes_px, atol=1e-9)


@pytest.mark.parametrize("image_size", SIZES)
def test_random_crop_stays_inside_and_covers_every_offset(image_size):
    draw = generator(1)
    crops = [plan_random_crop(*image_size, 64, draw) for _ in range(300)]
    sides = {min(crop.resized) for crop in crops}
    assert sides == set(range(64, 81))  # 64 to 64 / 0.8
    for crop in crops:
        pixels = crop_image(Image.new("RGB", image_size), crop)
        assert pixels.shape == (64, 64, 3)
    square = [crop for crop in crops if min(crop.resized) == 80]
    assert len({(crop.x0, crop.y0) for crop in square}) > len(square) // 2


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (16, 64), (64, 64)])
@pytest.mark.parametrize("image_size", SIZES)
def test_crops_of_any_shape_cover_it_and_keep_proportions(image_size, size):
    random = [plan_random_crop(*image_size, size, generator(2, seed)) for seed in range(20)]
    for crop in (plan_center_crop(*image_size, size), *random):
        assert crop_image(Image.new("RGB", image_size), crop).shape == (*size, 3)
        horizontal, vertical = crop.scale
        assert abs(horizontal - vertical) < 0.06 * vertical  # halving drops odd pixels, sides are whole pixels
    center = plan_center_crop(*image_size, size)
    assert min(center.resized[0] - size[1], center.resized[1] - size[0]) <= 1  # one side fits: the most is kept


def test_crop_of_an_oblong_by_hand(array):
    crop = plan_center_crop(300, 400, (64, 96))  # halved once, then 96 wide and 128 high
    assert (crop.resized, crop.x0, crop.y0) == ((96, 128), 0, 32)
    assert crop_boxes(array([[0, 100, 300, 300], [150, 200, 300, 250]]), crop).tolist() == [
        [0, 0, 1, 1],
        [0.5, 0.5, 1, 0.75],
    ]


def test_crop_outside_the_image_is_refused():
    with pytest.raises(ValueError, match=r"a 8x8 crop at \(3, 0\) reaches out of an image of 10x10"):
        Crop((10, 10), (10, 10), 3, 0, (8, 8))


@pytest.mark.parametrize("image_size", SIZES)
def test_center_crop_is_adms(image_size):
    """The two loops of guided-diffusion's image_datasets.py, written down again."""
    pixels = np.random.default_rng(3).integers(0, 256, (image_size[1], image_size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = image
    while min(expected.size) >= 2 * 48:
        expected = expected.resize((expected.size[0] // 2, expected.size[1] // 2), resample=Image.Resampling.BOX)
    scale = 48 / min(expected.size)
    width, height = round(expected.size[0] * scale), round(expected.size[1] * scale)
    array = np.array(expected.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - 48) // 2, (width - 48) // 2
    np.testing.assert_array_equal(center_crop(image, 48), array[top : top + 48, left : left + 48])


def test_crop_of_another_image_is_refused():
    with pytest.raises(ValueError, match=r"\(20, 30\).*made for \(30, 20\)"):
        crop_image(Image.new("RGB", (20, 30)), plan_center_crop(30, 20, 8))


def test_model_range_round_trip_is_exact():
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels = to_model_range(picture)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    np.testing.assert_array_equal(to_picture(pixels), picture)
    assert to_picture(torch.tensor([-3.0, 3.0]).expand(3, 1, 2)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image not found: .*none\.jpg"):
        load_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read image .*text\.jpg"):
        load_image(tmp_path / "text.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "half.jpg")
    content = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read image .*half\.jpg"):
        load_image(tmp_path / "half.jpg")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (4, 4)).save(tmp_path / f"a.{suffix}")
    assert load_image(tmp_path / f"a.{suffix}").mode == "RGB"


def test_drawn_boxes_are_where_they_belong():
    picture = np.full((64, 64, 3), 200, dtype=np.uint8)
    drawn = draw_boxes(picture, torch.tensor([[0.25, 0.5, 0.75, 0.875]]), ["dog"], min_size=512)
    assert drawn.shape == (512, 512, 3) and drawn.dtype == np.uint8
    assert (picture == 200).all()
    for x, y in ((128, 350), (384, 350), (250, 448)):  # left, right, lower edge
        assert drawn[y, x].max() < 30
    assert (drawn[300:400, 160:350] == 200).all()
    plate = drawn[200:260, 120:220].reshape(-1, 3)
    assert (plate.max(axis=1) < 30).sum() > 200 and (plate.min(axis=1) > 230).sum() > 50  # white on black


def test_labels_of_boxes_in_one_place_do_not_cover_each_other():
    drawn = draw_boxes(np.full((64, 64, 3), 200, np.uint8), np.array([[0.2, 0.3, 0.9, 0.9]] * 2), ["cat", "cat"])
    alone = draw_boxes(np.full((64, 64, 3), 200, np.uint8), np.array([[0.2, 0.3, 0.9, 0.9]]), ["cat"])
    assert (drawn != alone).any(axis=-1).sum() > 200  # the second plate lies elsewhere


def test_drawing_needs_a_label_per_box():
    with pytest.raises(ValueError, match="1 boxes, but 2 labels"):
        draw_boxes(np.zeros((8, 8, 3), np.uint8), np.array([[0, 0, 1, 1]]), ["a", "b"])


def test_grid():
    pictures = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = make_grid(pictures, columns=2, pad=1)
    assert grid.shape == (2 * 5 + 1, 2 * 7 + 1, 3)
    assert [grid[1, 1, 0], grid[1, 8, 0], grid[6, 1, 0], grid[6, 8, 0]] == [10, 20, 30, 255]
    with pytest.raises(ValueError, match="pictures of one size"):
        make_grid([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], 2)
    with pytest.raises(ValueError, match="pictures of one size"):
        make_grid([], 2)


def test_png_text_round_trip(tmp_path):
    text = {"prompt": "een hond op het strand, 犬", "seed": "7", "settings": '{"cfg": 3.0}'}
    picture = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    save_png(picture, tmp_path / "new" / "a.png", text)
    assert read_png_text(tmp_path / "new" / "a.png") == text
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "new" / "a.png")), picture)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg is not a PNG"):
        read_png_text(tmp_path / "b.jpg")
