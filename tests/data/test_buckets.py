"""Aspect-ratio buckets: their sizes, who goes where, what is told of a crop, and the order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data.buckets import Buckets, bucket_sizes, nearest, size_numbers
from data.images import cut, read_fitted, read_strip, upright_size
from data.order import BucketOrder
from harness.cli import UserError
from model import timestep_embedding
from text import size_vector

# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, low, high, count",
    [(1024, 256, 2048, 41), (1024, 256, 1024, 25), (512, 256, 1024, 17), (1024, 512, 2048, 33)],
)
def test_there_are_as_many_sizes_as_sd_scripts_makes(side, low, high, count):
    sizes = bucket_sizes(side * side, 64, low, high)
    assert len(sizes) == len(set(sizes)) == count and (side, side) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(s % 64 == 0 and low <= s <= high for size in sizes for s in size)
    assert all(w * h <= side * side for w, h in sizes)


def test_sizes_within_half_and_twice_the_square_keep_nine_tenths_of_the_area():
    sizes = Buckets.of("1024x1024", 64).sizes
    assert len(sizes) == 33 and min(w * h for w, h in sizes) > 0.89 * 1024**2
    # Of the area only the product counts.
    assert Buckets.of("2048x512", 64).sizes == sizes
    assert Buckets.of("512x512", 64).sizes == tuple(bucket_sizes(512**2, 64, 256, 1024))


@pytest.mark.parametrize(
    "original, size",
    [
        ((1920, 1080), (1344, 768)),
        ((1000, 1414), (832, 1216)),
        ((3000, 1000), (1728, 576)),
        ((64, 64), (1024, 1024)),
        ((1, 5000), (512, 2048)),
    ],
)
def test_an_image_goes_where_its_shape_differs_least(original, size):
    frames = Buckets.of("1024x1024", 64).assign([original])
    assert frames.size(0) == size


def test_nearest_is_what_a_search_finds():
    sizes = bucket_sizes(1024**2, 64, 256, 2048)
    table = np.random.default_rng(0).integers(1, 4000, (500, 2))
    found = nearest(sizes, table)
    for (width, height), k in zip(table, found):
        apart = [abs(width / height - w / h) for w, h in sizes]
        assert apart[k] == min(apart)
    # Of one shape the largest; as far on either side, the first of equal area.
    assert nearest([(64, 64), (128, 128), (96, 96)], np.array([[5, 5]])).tolist() == [1]
    assert nearest([(32, 64), (64, 32)], np.array([[5, 4]])).tolist() == [0]


@pytest.mark.parametrize(
    "area, step, message",
    [
        ("512", 64, "--area 512: wanted WIDTHxHEIGHT.  Try --area 1024x1024."),
        ("512x0", 64, "--area 512x0: wanted WIDTHxHEIGHT"),
        ("64x64", 128, "--step 128 is larger than a picture of --area 64x64.  Lower"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(area, step, message):
    with pytest.raises(UserError) as error:
        Buckets.of(area, step)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ---- crops --------------------------------------------------------------------------------------


def ramp(width, height):
    """Red tells the column, green the row."""
    x = np.arange(width)[None, :].repeat(height, 0)
    y = np.arange(height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


def test_of_1000_by_1200_the_bucket_of_896_by_1152_loses_32_columns_on_the_left():
    numbers = size_numbers((1000, 1200), (896, 1152))
    assert numbers.tolist() == [1200, 1000, 0, 32, 1152, 896] and numbers.dtype == torch.float32
    wide = size_numbers((1200, 1000), (1152, 896))
    assert wide.tolist() == [1000, 1200, 32, 0, 896, 1152]


def test_the_numbers_are_in_the_order_of_sdxls_vector():
    """timestep_embedding() of the six, and text.size_vector(), whose golden test_text.py has."""
    numbers = size_numbers((1500, 1000), (1216, 832), where=0.9, wide=4)
    h, w, top, left, target_h, target_w = map(int, numbers)
    told = size_vector((h, w), (top, left), (target_h, target_w))
    assert torch.equal(timestep_embedding(numbers, 256).flatten(), told)
    assert (h, w, target_h, target_w) == (1000, 1500, 832, 1216) and left > top == 0


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("where", [None, 0.0, 0.3, 0.99])
@pytest.mark.parametrize("size", [(64, 96), (160, 48), (96, 64)])
def test_the_crop_is_where_the_numbers_say(tmp_path, size, where, mirrored):
    """Pillow resizes the whole of a ramp, and cuts at the numbers."""
    image = ramp(151, 123)
    image.save(tmp_path / "a.png")
    wide = 1 if where is None else 4
    strip = read_fitted(tmp_path / "a.png", size, wide)
    ours = cut(strip, where, size)
    ours = ours[:, ::-1] if mirrored else ours
    numbers = size_numbers((151, 123), size, mirrored, where, wide)
    _, _, top, left, height, width = map(int, numbers)
    scale = max(size[0] / 151, size[1] / 123)
    whole = np.asarray(image.resize((round(151 * scale), round(123 * scale)), 1), np.int64)
    whole = whole[:, ::-1] if mirrored else whole
    wanted = whole[top : top + height, left : left + width]
    assert ours.shape == wanted.shape == (size[1], size[0], 3)
    # Of Lanczos at the borders of the kept part.
    assert np.abs(ours - wanted).max() <= 1
    # One pixel beside, a ramp differs by its slope in the middle of a side that is cut.
    if top or left:
        beside = whole[max(top - 1, 0) :, max(left - 1, 0) :][:height, :width]
        assert np.abs(ours - beside).mean() > 5 * np.abs(ours - wanted).mean() + 0.1


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("size", [(64, 96), (97, 48)])
def test_a_turned_file_is_cut_as_its_upright_twin(tmp_path, turn, size):
    image = ramp(151, 123)
    # The inverses, as Pillow numbers them.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    image.transpose(Image.Transpose(back)).save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "upright.png")
    assert upright_size(tmp_path / "turned.png") == (151, 123)
    twins = [read_fitted(tmp_path / f"{name}.png", size) for name in ("turned", "upright")]
    assert np.array_equal(*twins) and twins[0].shape == (size[1], size[0], 3)


def test_a_square_bucket_reads_what_a_resolution_reads(tmp_path):
    ramp(151, 123).save(tmp_path / "a.png")
    fitted = read_fitted(tmp_path / "a.png", (64, 64), 4)
    assert np.array_equal(fitted, read_strip(tmp_path / "a.png", 64, 4))
    for where in (None, 0.7):
        assert np.array_equal(cut(fitted, where), cut(fitted, where, (64, 64)))


def test_a_jpeg_that_is_decoded_smaller_still_covers_its_bucket(tmp_path):
    """1600 × 1100 is decoded at half, whose shape is another by rounding."""
    ramp(1601, 1101).save(tmp_path / "a.jpg", quality=95)
    assert read_fitted(tmp_path / "a.jpg", (160, 96)).shape == (96, 160, 3)
    numbers = size_numbers((1601, 1101), (160, 96))
    assert numbers.tolist() == [1101, 1601, 7, 0, 96, 160]


def test_smaller_than_the_bucket_is_what_has_to_be_enlarged():
    frames = Buckets.of("64x64", 16).assign([(64, 64), (63, 64), (200, 60), (20, 20), (96, 48)])
    assert [frames.size(i) for i in range(5)] == [(64, 64)] * 2 + [(112, 32), (64, 64), (80, 48)]
    assert frames.small.tolist() == [False, True, False, True, False]
    kept = frames.take([4, 2])
    assert kept.size(0) == (80, 48) and kept.originals.tolist() == [[96, 48], [200, 60]]


# ---- the order ----------------------------------------------------------------------------------

COUNTS = [
    ([40, 24, 0, 3, 1], 8),
    ([5], 8),
    ([17, 16, 15], 16),
    ([2, 3, 1], 8),  # an epoch has less than a batch
    ([100, 1], 4),
]


def members_of(counts):
    """Images of each bucket, mixed as they are in a folder."""
    bucket = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return [np.flatnonzero(bucket == k) for k in range(len(counts))], bucket


@pytest.mark.parametrize("counts, batch", COUNTS)
def test_a_batch_has_one_bucket(counts, batch):
    members, bucket = members_of(counts)
    order = BucketOrder(0, members, batch)
    for start in range(0, 60 * batch, batch):
        found = {int(bucket[order.image(p)]) for p in range(start, start + batch)}
        assert found == {order.bucket(start)}


@pytest.mark.parametrize("counts, batch", COUNTS)
def test_every_image_is_seen_once_an_epoch_but_for_less_than_a_batch_of_each_bucket(counts, batch):
    members, bucket = members_of(counts)
    order = BucketOrder(3, members, batch)
    n, seen, position = sum(counts), np.zeros(sum(counts), int), 0
    for epoch in range(1, 25):
        # What is documented: as many whole batches of each bucket as e times its images fill.
        end = sum(epoch * count // batch for count in counts) * batch
        for position in range(position, end):
            seen[order.image(position)] += 1
        position = end
        for k, count in enumerate(counts):
            own = seen[members[k]]
            waiting = epoch * count - own.sum()
            assert 0 <= waiting < batch
            assert own.size == 0 or own.max() - own.min() <= 1
            if count >= batch:
                assert set(own) <= {epoch - 1, epoch} and (own == epoch - 1).sum() == waiting
    # Nothing is lost in the long run: each image's share is that of any other.
    assert abs(position - 24 * n) < batch * len(counts)


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_split_the_same_batches(world, accum):
    members, bucket = members_of([40, 24, 0, 3, 1])
    cfg = SimpleNamespace(batch=8, accum=accum, images=400)
    ranks = [SimpleNamespace(world=world, rank=r) for r in range(world)]
    one = BucketOrder(7, members, 8)
    whole = [one.image(p) for p in range(400)]
    share = [list(train.positions(cfg, rank, 0)) for rank in ranks]
    orders = [BucketOrder(7, members, 8) for _ in ranks]
    for step in range(50):
        seen = []
        for i in range(accum):
            for rank, order in enumerate(orders):
                micro = [order.image(p) for p in share[rank][step * accum + i]]
                assert len({bucket[image] for image in micro}) == 1
                seen += micro
        assert sorted(seen) == sorted(whole[8 * step : 8 * step + 8])


def test_it_can_be_asked_anywhere():
    """Forwards, backwards, far away, by whoever comes new: the same answers."""
    members, _ = members_of([40, 24, 0, 3, 1])
    order = BucketOrder(5, members, 8)
    whole = [order.image(p) for p in range(3000)]
    jumps = np.random.default_rng(0).permutation(3000)
    assert [order.image(p) for p in jumps] == [whole[p] for p in jumps]
    for start in (1, 8, 777, 2992):
        fresh = BucketOrder(5, members, 8)
        assert [fresh.image(p) for p in range(start, start + 8)] == whole[start : start + 8]
    far = 10**12 + 5
    assert BucketOrder(5, members, 8).image(far) == BucketOrder(5, members, 8).image(far)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    members, _ = members_of([800, 480])
    order = BucketOrder(0, members, 8)
    batches = [[order.bucket(p) for p in range(e * 1280, (e + 1) * 1280, 8)] for e in range(3)]
    images = [[order.image(p) for p in range(e * 1280, (e + 1) * 1280)] for e in range(3)]
    other = [BucketOrder(1, members, 8).image(p) for p in range(1280)]
    assert batches[0] != batches[1] != batches[2] and images[0] != images[1] != images[2] != other
    assert [sorted(epoch) for epoch in images] == [list(range(1280))] * 3
    # Mixed, not one bucket after the other: 60 of 160 batches are of the second.
    assert [sum(epoch) for epoch in batches] == [60] * 3
    assert all(20 <= sum(epoch[:80]) <= 40 for epoch in batches)


def test_buckets_without_images_are_never_drawn_and_none_at_all_is_an_error():
    members, _ = members_of([0, 8, 0])
    order = BucketOrder(0, members, 4)
    assert {order.bucket(p) for p in range(200)} == {1}
    with pytest.raises(ValueError, match="no bucket"):
        BucketOrder(0, [np.zeros(0, int)], 4)
