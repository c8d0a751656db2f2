"""Samples: boxes move with the pixels, draws depend on their key alone, an interrupted epoch continues exactly."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from engine.data.coco import Batch, CocoLayoutDataset, DataConfig, ResumableSampler, collate
from engine.data.phrases import names_a_side
from tests.helpers.coco_fixture import COLORS, DEFAULT_IMAGES, FixtureBox, FixtureImage, find_color, write_coco
from util.coco import CocoIndex
from util.images import to_picture
from util.types import LayoutBatch, SizeBatch, TextContext


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path)


@pytest.fixture
def config(root):
    return DataConfig(str(root), "train2017", img_size=64)


def same(first, second):
    assert (first.image_id, first.caption, first.is_flipped) == (second.image_id, second.caption, second.is_flipped)
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.layout.boxes_xyxy, second.layout.boxes_xyxy)


def check_boxes_on_pixels(dataset) -> int:
    """Every box of every sample against the rectangle of its colour; -> how many boxes were compared."""
    compared = 0
    for item in range(len(dataset)):
        sample = dataset[item]
        picture = to_picture(sample.pixels)
        size = picture.shape[0]
        for box, category in zip(sample.layout.boxes_xyxy, sample.layout.categories, strict=True):
            found = find_color_of(dataset, picture, int(category))
            np.testing.assert_allclose(found, box.numpy() * size, atol=1.0)
            compared += 1
    return compared


def find_color_of(dataset, picture, category):
    return find_color(picture, COLORS[dataset.index.categories[category].id])


@pytest.mark.parametrize("split", ["train2014", "val2017"])
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("hflip_prob", [0.0, 1.0])
@pytest.mark.parametrize("img_size", [48, 64])
def test_boxes_and_pixels_move_together(tmp_path, split, crop, hflip_prob, img_size):
    config = DataConfig(str(write_coco(tmp_path, split)), split, img_size, crop, hflip_prob, min_visibility=0.05)
    dataset = CocoLayoutDataset.from_config(config)
    compared, flips, boxes = 0, set(), set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        compared += check_boxes_on_pixels(dataset)
        flips |= {dataset[item].is_flipped for item in range(4)}
        boxes |= {tuple(dataset[2].layout.boxes_xyxy.flatten().tolist())}
    assert compared >= 15
    assert flips == {bool(hflip_prob)}
    assert len(boxes) == (3 if crop == "random" else 1)


def test_the_pixel_check_notices_boxes_left_behind(root, config):
    flipped = CocoLayoutDataset.from_config(dataclasses.replace(config, hflip_prob=1.0))
    straight = CocoLayoutDataset.from_config(dataclasses.replace(config, hflip_prob=0.0))
    sample = flipped[0]
    box = straight[0].layout.boxes_xyxy[0].numpy() * 64
    found = find_color_of(flipped, to_picture(sample.pixels), int(sample.layout.categories[0]))
    assert np.abs(np.array(found) - box).max() > 3


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog to the left of a cat", True),
        ("RIGHT side up", True),
        ("his left-hand pocket", True),
        ("the leftmost cup", True),
        ("facing rightwards.", True),
        ("a right-handed pitcher", True),
        ("a leftover pizza", False),
        ("an upright piano in bright light", False),
        ("copyrighted work", False),
        ("a dog", False),
    ],
)
def test_names_a_side(caption, expected):
    assert names_a_side(caption) is expected


def test_captions_with_sides_are_never_flipped(root, config):
    dataset = CocoLayoutDataset.from_config(dataclasses.replace(config, hflip_prob=1.0, caption_mode="all"))
    for epoch in range(3):
        dataset.set_epoch(epoch)
        flipped = {dataset[item].caption: dataset[item].is_flipped for item in range(len(dataset))}
        assert not flipped["a leaf on the left"] and not flipped["the RIGHT-hand leaf"]
        assert flipped["nothing at all"] and flipped["one plum"]


def test_flips_happen_half_the_time(tmp_path):
    images = [FixtureImage(number, 8, 8, captions=("thing",)) for number in range(1, 41)]
    dataset = CocoLayoutDataset.from_config(DataConfig(str(write_coco(tmp_path, images=images)), "train2017", 8))
    flips = []
    for epoch in range(10):
        dataset.set_epoch(epoch)
        flips.append([dataset[item].is_flipped for item in range(40)])
    assert 0.4 < np.mean(flips) < 0.6
    assert all(0 < np.mean(epoch) < 1 for epoch in flips)  # each image draws for itself
    assert len({tuple(epoch) for epoch in flips}) == 10  # and again in each epoch


def test_one_caption_per_image_and_epoch(config):
    dataset = CocoLayoutDataset.from_config(config)
    assert len(dataset) == len(DEFAULT_IMAGES)
    seen = Counter()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        seen[dataset[0].caption] += 1
    assert set(seen) == set(DEFAULT_IMAGES[0].captions) and min(seen.values()) >= 5


def test_caption_mode_all_visits_every_caption_once(config):
    dataset = CocoLayoutDataset.from_config(dataclasses.replace(config, caption_mode="all"))
    samples = [dataset[item] for item in range(len(dataset))]
    assert [sample.caption_id for sample in samples] == [100, 101, 102, 200, 201, 500, 501, 502, 900, 1200, 1201]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_draws_depend_on_seed_and_epoch_only(config):
    config = dataclasses.replace(config, crop="random")
    first, second = CocoLayoutDataset.from_config(config), CocoLayoutDataset.from_config(config)
    for dataset in (first, second):
        dataset.set_epoch(5)
    second[4], second[0]  # earlier reads leave no trace
    same(first[2], second[2])
    second.set_epoch(6)
    assert not torch.equal(first[2].pixels, second[2].pixels)
    other_seed = CocoLayoutDataset.from_config(dataclasses.replace(config, seed=1))
    other_seed.set_epoch(5)
    assert not torch.equal(first[2].pixels, other_seed[2].pixels)


def test_image_draws_do_not_depend_on_the_other_images(tmp_path):
    settings = {"split": "train2017", "img_size": 48, "crop": "random"}
    whole = CocoLayoutDataset.from_config(DataConfig(str(write_coco(tmp_path / "a")), **settings))
    alone = write_coco(tmp_path / "b", images=[image for image in DEFAULT_IMAGES if image.id == 5])
    same(whole[2], CocoLayoutDataset.from_config(DataConfig(str(alone), **settings))[0])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(config, persistent):
    """Two epochs: with persistent workers, the second shows that the epoch reaches them."""
    dataset = CocoLayoutDataset.from_config(dataclasses.replace(config, crop="random"))
    settings = {"batch_size": 2, "collate_fn": collate(4), "shuffle": False}
    plain = DataLoader(dataset, **settings)
    workers = DataLoader(dataset, **settings, num_workers=2, persistent_workers=persistent)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected, got = list(plain), list(workers)
        assert len(expected) == len(got) == 3
        for first, second in zip(expected, got, strict=True):
            assert first.captions == second.captions
            assert torch.equal(first.pixels, second.pixels)
            assert torch.equal(first.layout.boxes_xyxy, second.layout.boxes_xyxy)
        epochs.append(torch.cat([batch.pixels for batch in got]))
    assert not torch.equal(*epochs)


def test_collate(config):
    dataset = CocoLayoutDataset.from_config(dataclasses.replace(config, hflip_prob=0.0))
    batch = collate(3)([dataset[0], dataset[3], dataset[1]])
    assert batch.image_ids == [1, 9, 2] and len(batch) == 3
    assert batch.pixels.shape == (3, 3, 64, 64)
    assert batch.layout.valid.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    assert batch.layout.categories[0, :2].tolist() == [0, 1]  # largest first
    assert batch.moments is None and batch.text is None
    with pytest.raises(ValueError, match="2 boxes, more than max_objects=1"):
        collate(1)([dataset[0]])


def test_batch_moves_every_tensor():
    batch = Batch(
        [1],
        ["a"],
        LayoutBatch(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)),
        SizeBatch.whole(1, 4, 4, "cpu"),
        pixels=torch.zeros(1, 3, 4, 4),
        moments=torch.zeros(1, 2, 1, 1),
        text=TextContext.collate([torch.zeros(3, 4)]),
    ).to("meta")
    for tensor in (batch.pixels, batch.moments, batch.sizes.values, batch.layout.boxes_xyxy, batch.layout.valid, batch.text.tokens):
        assert tensor.device.type == "meta"


def test_unreadable_or_mismatching_images_are_named(root, config):
    dataset = CocoLayoutDataset.from_config(config)
    Image.new("RGB", (10, 20)).save(dataset.index.image_path(1))
    with pytest.raises(ValueError, match=r"000000000002\.jpg is 10x20, but instances_train2017\.json says 50x77"):
        dataset[1]
    dataset.index.image_path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000005\.jpg"):
        dataset[2]
    dataset.index.image_path(0).unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000001\.jpg"):
        CocoLayoutDataset.from_config(config)


def test_index_of_another_split_or_filter_is_refused(root, config):
    index = CocoIndex.load(root, "train2017")
    with pytest.raises(ValueError, match=r"train2017.*val2017"):
        CocoLayoutDataset(index, dataclasses.replace(config, split="val2017"))
    with pytest.raises(ValueError, match=r"min_area=0\.0.*min_area=0\.5"):
        CocoLayoutDataset(index, dataclasses.replace(config, min_area=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "middle"}, "crop must be one of .*'middle'"),
        ({"caption_mode": "first"}, "caption_mode must be one of .*'first'"),
        ({"hflip_prob": 1.1}, r"hflip_prob .* 1\.1"),
        ({"img_size": 0}, "img_size must be positive, got 0"),
    ],
)
def test_config_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("root", "train2017", **changes)


def test_max_objects_of_the_config_are_the_largest(tmp_path):
    boxes = [FixtureBox(1, (0, 0, 8, 8)), FixtureBox(3, (10, 10, 20, 20)), FixtureBox(44, (40, 40, 12, 12))]
    root = write_coco(tmp_path, images=[FixtureImage(1, 64, 64, boxes)])
    dataset = CocoLayoutDataset.from_config(DataConfig(str(root), "train2017", 64, max_objects=2))
    assert dataset[0].layout.categories.tolist() == [1, 2]


def epoch_of(length, rank, world_size, batch_size, epoch=0, start=0, seed=0):
    sampler = ResumableSampler(length, rank, world_size, seed, batch_size)
    sampler.set_epoch(epoch, start)
    items = list(sampler)
    assert len(items) == len(sampler)
    return items


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_are_disjoint_and_cover(world_size):
    shares = [epoch_of(25, rank, world_size, 4) for rank in range(world_size)]
    items = [item for share in shares for item in share]
    global_batch = 4 * world_size
    assert len(items) == len(set(items)) == 25 // global_batch * global_batch
    assert set(items) <= set(range(25))


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    one = epoch_of(50, 0, 1, 8)
    two = [epoch_of(50, rank, 2, 4) for rank in range(2)]
    for batch in range(6):
        assert set(one[8 * batch : 8 * batch + 8]) == {i for share in two for i in share[4 * batch : 4 * batch + 4]}


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(40, 0, 1, 4, epoch, seed=seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_of(40, 0, 1, 4, 1) == orders[1]


@pytest.mark.parametrize("start_batch", [0, 1, 3, 6])
def test_resumed_epoch_is_the_rest_of_the_uninterrupted_one(start_batch):
    for rank in range(2):
        whole = epoch_of(50, rank, 2, 4, epoch=3)
        assert epoch_of(50, rank, 2, 4, epoch=3, start=8 * start_batch) == whole[4 * start_batch :]


def test_resumed_batches_are_equal_through_the_loader(config):
    dataset = CocoLayoutDataset.from_config(dataclasses.replace(config, crop="random"))
    dataset.set_epoch(2)
    sampler = ResumableSampler(len(dataset), 0, 1, 7, 2)

    def batches(start):
        sampler.set_epoch(2, start)
        return list(DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate(4)))

    whole, rest = batches(0), batches(2)
    assert (len(whole), len(rest)) == (2, 1)
    assert torch.equal(whole[1].pixels, rest[0].pixels) and whole[1].captions == rest[0].captions


def test_sampler_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"7 items, fewer than one global batch of 8 \(2 ranks x batch_size 4\)"):
        ResumableSampler(7, 0, 2, 0, 4)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        ResumableSampler(100, 2, 2, 0, 4)
    with pytest.raises(ValueError, match=r"start must lie in \[0, 13\], got 14"):
        ResumableSampler(13, 0, 1, 0, 4).set_epoch(0, 14)


@pytest.mark.parametrize(("folder", "split"), [("coco_mini", "train2017"), ("coco_fixture_ccby", "val2017")])
def test_real_photos(shared, folder, split):
    config = DataConfig(str(shared / "data" / folder), split, 64, crop="random", max_objects=8)
    dataset = CocoLayoutDataset.from_config(config)
    batch = collate(8)([dataset[item] for item in range(16)])
    assert batch.pixels.shape == (16, 3, 64, 64) and batch.pixels.abs().max() <= 1
    assert batch.layout.valid.sum() >= 16
