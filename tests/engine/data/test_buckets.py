"""Batches of one size: boxes stay on their pixels, all ranks agree, each image of an epoch is seen once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.buckets import BucketSampler, Stretch
from engine.data.coco import BUCKETS, CocoLayoutDataset, DataConfig, ResumableSampler, SizedItem, collate
from engine.data.loader import load_batches
from tests.helpers.coco_fixture import COLORS, FixtureBox, FixtureImage, find_color, write_coco
from tests.helpers.processes import in_two_processes
from util.buckets import Size, bucket_sizes, nearest_size
from util.images import to_picture

SIZES = ((64, 64), (96, 64), (64, 96))


def shapes(count: int, seed: int = 0) -> list[Size]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(30, 120, 2).tolist()) for _ in range(count)]


def sampler(own: list[Size], rank: int = 0, world_size: int = 1, batch_size: int = 4, seed: int = 0) -> BucketSampler:
    return BucketSampler(own, SIZES, rank, world_size, seed, batch_size)


def batches_of(of: ResumableSampler) -> list[list[SizedItem]]:
    items = list(of)
    assert len(items) == len(of)
    return [items[k : k + of.batch_size] for k in range(0, len(items), of.batch_size)]


@pytest.mark.parametrize("hflip_prob", [0.0, 1.0])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_boxes_stay_on_their_pixels_in_every_size(tmp_path: Path, crop: str, hflip_prob: float) -> None:
    boxes = [FixtureBox(1, (30, 40, 40, 22)), FixtureBox(44, (80, 50, 18, 36))]
    images = [FixtureImage(1, 128, 120, boxes), FixtureImage(2, 120, 200, boxes), FixtureImage(3, 190, 110, boxes)]
    root = write_coco(tmp_path, images=images)
    config = DataConfig(str(root), "train2017", 64, crop, hflip_prob, min_visibility=0.05, sizes=SIZES)
    dataset = CocoLayoutDataset.from_config(config)
    natural = [dataset[item].pixels.shape[1:] for item in range(3)]
    assert natural == [(64, 64), (96, 64), (64, 96)]
    compared = 0
    for item in range(3):
        for size in (*SIZES, (48, 72), (72, 48)):
            sample = dataset[SizedItem(item, size)]
            picture = to_picture(sample.pixels)
            assert picture.shape == (*size, 3)
            assert sample.crop.size == size
            for box, category in zip(sample.layout.boxes_xyxy, sample.layout.categories, strict=True):
                found = find_color(picture, COLORS[dataset.index.categories[int(category)].id])
                scale = [size[1], size[0], size[1], size[0]]
                np.testing.assert_allclose(found, box.numpy() * scale, atol=1.0)
                compared += 1
    assert compared >= 24


def test_a_lying_picture_is_no_standing_one(tmp_path: Path) -> None:
    root = write_coco(tmp_path, images=[FixtureImage(1, 64, 64, [FixtureBox(1, (20, 26, 24, 12))])])
    dataset = CocoLayoutDataset.from_config(DataConfig(str(root), "train2017", 64, hflip_prob=0.0))
    lying, standing = dataset[SizedItem(0, (16, 24))], dataset[SizedItem(0, (24, 16))]
    assert lying.pixels.shape[1:] == (16, 24)
    assert standing.pixels.shape[1:] == (24, 16)
    # Lying, the whole width is there and two thirds of the height; standing, the other way round.
    np.testing.assert_allclose(lying.layout.boxes_xyxy[0], [20 / 64, (26 - 32 / 3) / 128 * 3, 44 / 64, 0.640625], atol=2e-2)
    np.testing.assert_allclose(standing.layout.boxes_xyxy[0], [(20 - 32 / 3) / 128 * 3, 26 / 64, 0.78125, 38 / 64], atol=2e-2)


def test_sizes_and_crop_are_told_as_the_model_sees_them(tmp_path: Path) -> None:
    root = write_coco(tmp_path, images=[FixtureImage(7, 200, 64), FixtureImage(8, 64, 64)])
    for flip, left in ((0.0, 52), (1.0, 52)):
        dataset = CocoLayoutDataset.from_config(DataConfig(str(root), "train2017", 64, hflip_prob=flip, sizes=SIZES))
        assert collate(2)([dataset[0]]).sizes.values.tolist() == [[64, 96, 64, 200, 0, left]]
    random = DataConfig(str(root), "train2017", 64, "random", 0.0, sizes=SIZES)
    straight = CocoLayoutDataset.from_config(random)[0]
    flipped = CocoLayoutDataset.from_config(DataConfig(str(root), "train2017", 64, "random", 1.0, sizes=SIZES))[0]
    assert straight.crop == flipped.crop
    left, right = (collate(2)([each]).sizes.values[0, 5].item() for each in (straight, flipped))
    assert left + right == straight.crop.resized[0] - 96


@pytest.mark.parametrize("count", [12, 50, 53])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_batch_has_one_size_on_all_ranks_and_no_image_comes_twice(count: int, world_size: int) -> None:
    own = shapes(count)
    shares = [batches_of(sampler(own, rank, world_size)) for rank in range(world_size)]
    global_batch = 4 * world_size
    seen: list[int] = []
    for parts in zip(*shares, strict=True):
        together = [each for part in parts for each in part]
        assert len({each.size for each in together}) == 1
        seen += [each.item for each in together]
    assert len(seen) == len(set(seen)) == count // global_batch * global_batch


def test_nearly_all_images_get_their_nearest_size() -> None:
    own = shapes(400)
    items = list(sampler(own, batch_size=8))
    odd = [each for each in items if each.size != nearest_size(*own[each.item], SIZES)]
    assert len(odd) < len(SIZES) * 8 / 2
    assert len({each.size for each in items}) == 3


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    own = shapes(50)
    one = batches_of(sampler(own, batch_size=8))
    two = [batches_of(sampler(own, rank, 2, 4)) for rank in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert set(whole) == {*first, *second}


def test_epochs_and_seeds_have_batches_of_their_own() -> None:
    own, orders = shapes(60), []
    for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        each = sampler(own, seed=seed)
        each.set_epoch(epoch)
        orders.append(list(each))
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(each.item for each in order)) for order in orders}) == 1  # 60 = 15 batches: all are seen


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_a_resumed_epoch_is_the_rest_of_the_uninterrupted_one(done: int) -> None:
    own = shapes(57)
    for rank in range(2):
        whole, rest = sampler(own, rank, 2), sampler(own, rank, 2)
        whole.set_epoch(3)
        expected = list(whole)
        rest.restore(whole.state(), 3, 8 * done)
        rest.set_epoch(3, 8 * done)
        assert list(rest) == expected[4 * done :]


def test_continued_twice_with_other_batches_each_image_is_seen_once() -> None:
    own, start, seen, state = shapes(101), 0, [], {}
    ways = [(2, 4, 3), (1, 5, 4), (3, 2, 5), (1, 1, None)]
    for world_size, batch_size, taken in ways:
        readers = [sampler(own, rank, world_size, batch_size) for rank in range(world_size)]
        for each in readers:
            each.restore(state, 2, start)
            each.set_epoch(2, start)
        parts = [batches_of(each)[:taken] for each in readers]
        seen += [each.item for part in parts for batch in part for each in batch]
        start += len(parts[0]) * world_size * batch_size
        state = readers[0].state()
    assert Counter(seen) == Counter(range(101))
    assert [each.first for each in readers[0].stretches] == [0, 24, 44, 74]


def test_a_run_that_continued_and_did_nothing_keeps_what_it_read() -> None:
    first = sampler(shapes(40))
    first.set_epoch(2)
    state = first.state()
    second = sampler(shapes(40), batch_size=3)
    second.restore(state, 2, 8)
    assert second.state() == state
    second.set_epoch(2, 8)
    assert second.stretches == (Stretch(0, 4), Stretch(8, 3))


def test_sizes_change_between_epochs_only() -> None:
    own = shapes(40)
    state = sampler(own).state()
    other = BucketSampler(own, SIZES[:2], 0, 1, 0, 4)
    other.restore(state, 1, 0)
    with pytest.raises(ValueError, match="image 8 of epoch 1 .* other sizes than 64x64, 96x64: .* between epochs"):
        other.restore(state, 1, 8)
    with pytest.raises(ValueError, match="between epochs"):
        sampler(own).restore({}, 1, 8)
    with pytest.raises(ValueError, match="between epochs"):
        ResumableSampler(40, 0, 1, 0, 4).restore(state, 1, 8)
    with pytest.raises(ValueError, match="image 9 of epoch 0 is not the end of a batch of 4 images"):
        sampler(own).set_epoch(0, 9)
    for wrong in ([], [[0]], [[0, "4"]], [[4, 4]], [[0, 4], [0, 4]], [[0, 0]], "x"):
        with pytest.raises(ValueError, match="stretches"):
            sampler(own).restore({BUCKETS: {**state[BUCKETS], "stretches": wrong}}, 0, 8)


def test_sizes_must_be_different_ones() -> None:
    for sizes in ((), ((64, 64), (64, 64))):
        with pytest.raises(ValueError, match="sizes must be different ones"):
            BucketSampler(shapes(9), sizes, 0, 1, 0, 2)


def test_two_processes_read_batches_of_one_size(tmp_path: Path) -> None:
    """Through the loader, as a run reads them, in processes of their own."""
    images = [FixtureImage(k + 1, *((40, 40), (60, 40), (40, 60))[k % 3]) for k in range(17)]
    config = DataConfig(str(write_coco(tmp_path, images=images)), "train2017", 32, sizes=((32, 32), (32, 48), (48, 32)))
    dataset = CocoLayoutDataset.from_config(config)

    def read(rank: int) -> list[tuple[list[int], tuple[int, ...]]]:
        own = BucketSampler(dataset.shapes(), config.sizes, rank, 2, 0, 2)
        loaded = load_batches(dataset, own, collate(4), num_workers=0, pin_memory=False)
        assert loaded.num_images == 17
        return [(batch.image_ids, tuple(batch.pixels.shape)) for batch in loaded.of_epoch(1, 4)]

    first, second = in_two_processes(read, join_group=False)
    assert len(first) == len(second) == 3
    for (ids, shape), (other_ids, other_shape) in zip(first, second, strict=True):
        assert shape == other_shape
        assert not {*ids} & {*other_ids}


def test_captions_are_items_of_their_own(tmp_path: Path) -> None:
    images = [FixtureImage(1, 40, 40, captions=("a", "b")), FixtureImage(2, 60, 40, captions=("c",))]
    config = DataConfig(str(write_coco(tmp_path, images=images)), "train2017", 32, caption_mode="all")
    assert CocoLayoutDataset.from_config(config).shapes() == [(40, 40), (40, 40), (40, 60)]


def test_boxes_are_counted_in_the_size_that_the_image_gets(tmp_path: Path) -> None:
    """A box at the edge of a wide image is cut off in a square and stays in a wide picture."""
    images = [FixtureImage(1, 192, 64, [FixtureBox(1, (0, 10, 40, 40))]), FixtureImage(2, 64, 64)]
    root = str(write_coco(tmp_path, images=images))
    wide = DataConfig(root, "train2017", 64, drop_empty=True, sizes=bucket_sizes(64, 8)).load_index()
    assert [image.id for image in wide.images] == [1]
    with pytest.raises(ValueError, match="no image"):
        DataConfig(root, "train2017", 64, drop_empty=True).load_index()
    assert torch.equal(
        CocoLayoutDataset(wide, DataConfig(root, "train2017", 64, drop_empty=True, sizes=bucket_sizes(64, 8)))[0].layout.categories,
        torch.tensor([0]),
    )
