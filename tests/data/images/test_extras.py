"""Crops of float images, and augmentations for images that are no photographs: each does what it says, alike in all three modes."""

import numpy as np
import pytest
import torch

from ssl_locat.config.schema import load
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.images.extras import PLACE, Extras, turned
from ssl_locat.errors import ConfigError

MODES = ("cpu", "device-photometric", "device")
PLAIN = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": (0, 0, 0), "solarize_prob": (0, 0, 0)}
ALL = {
    "vertical_flip_prob": 0.5, "turn_prob": 0.7, "band_jitter_prob": 0.8, "band_drop_prob": 0.2, "stretch_prob": 0.5, "noise_prob": 0.5,
}  # fmt: skip


def floats(bands: int, height: int = 40, width: int = 52) -> np.ndarray:
    """Smooth, and beyond 0..255 at both ends."""
    rng = np.random.default_rng(bands)
    rows, columns = np.mgrid[:height, :width, :1][:2]
    waves = np.sin(rows * rng.uniform(0.05, 0.4, bands) + rng.uniform(0, 6, bands)) * np.cos(
        columns * rng.uniform(0.05, 0.4, bands)
    )
    return (120 + 160 * waves).astype(np.float32)


def finished(mode: str, bands: int, images: list[np.ndarray], **options) -> list[torch.Tensor]:
    """Global and local crops of seeds 0, 1, ... on the scale of 0..255."""
    crops = MultiCrop(24, 12, 3, mode=mode, mean=(0.0,) * bands, std=(1 / 255,) * bands, **options)
    return list(crops.finish(crops.collate([crops.cut(image, seed) for seed, image in enumerate(images)]), "cpu")[:2])


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_float_crops_are_the_same_in_all_modes(bands):
    """Within a thousandth of a level: sums in another order; nothing is rounded to levels."""
    options = ALL | ({"hed_prob": 0.5} if bands == 3 else {"jitter": (0.4, 0.4, 0, 0), "gray_prob": 0.0})
    images = [floats(bands, 40 + i, 52 - i) for i in range(8)]
    expected = finished("cpu", bands, images, **options)
    for mode in MODES[1:]:
        for a, b in zip(expected, finished(mode, bands, images, **options), strict=True):
            difference = (a - b).abs()
            # values at the edge of solarisation or of a percentile fall on either side of it
            assert (difference > 0.05).float().mean() < 2e-3, mode
    assert not torch.equal(expected[0].round(), expected[0]) and expected[0].max() > 255


def test_float_crops_are_those_of_eight_bits_but_for_the_rounding():
    image = floats(3).clip(60, 190).astype(np.uint8)  # what no factor takes beyond 255
    for options in (PLAIN, {"solarize_prob": (0, 0, 0)}):
        whole, exact = (finished("cpu", 3, [kind] * 6, **options) for kind in (image, image.astype(np.float32)))
        for a, b in zip(whole, exact, strict=True):
            assert (a - b).abs().mean() < (0.4 if options is PLAIN else 2)


def test_options_that_are_off_change_nothing():
    image = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    plain, sized = MultiCrop(24, 12, 2), MultiCrop(24, 12, 2, band_jitter=(0.9, 0.9), stretch=0.4, noise_sigma=(1, 2))
    for a, b in zip(plain.cut(image, 3)[:2], sized.cut(image, 3)[:2], strict=True):
        assert np.array_equal(np.concatenate([x.ravel() for x in a]), np.concatenate([x.ravel() for x in b]))


def test_flips_and_turns_stay_whole_and_reach_all_eight_ways_round():
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    options = {**PLAIN, "global_scale": (1.0, 1.0), "flip_prob": 0.5, "vertical_flip_prob": 0.5, "turn_prob": 0.75}
    seen = {
        mode: [np.round(crop.permute(1, 2, 0).numpy()) for crop in finished(mode, 3, [image] * 40, **options)[0]]
        for mode in MODES
    }
    ways = [np.rot90(image[:, ::-1] if flip else image, turns).tobytes() for flip in (0, 1) for turns in range(4)]
    assert {crop.astype(np.uint8).tobytes() for crop in seen["cpu"]} == set(ways)
    for mode in MODES[1:]:
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(seen["cpu"], seen[mode], strict=True))


def rows(options: Extras, channels: int, count: int = 3000) -> np.ndarray:
    return np.concatenate([options.draw(seed, 1, channels) for seed in range(count)])


def test_draws_have_the_shares_and_sizes_of_their_options():
    options = Extras(0.3, 0.6, (0.2, 0.1), 0.5, 0.25, 0.02, 0.4, (0.1, 0.3), 0.5, 0.05, 0.5)
    table, first = rows(options, 4), PLACE["flipped"]
    column = {name: table[:, place - first] for name, place in PLACE.items()}
    assert abs(column["flipped"].mean() - 0.3) < 0.03 and abs((column["turns"] > 0).mean() - 0.6) < 0.03
    assert abs((column["noise"] > 0).mean() - 0.5) < 0.03 and column["noise"].max() <= 0.3
    assert abs((column["stretch_low"] >= 0).mean() - 0.4) < 0.03 and column["stretch_low"].max() <= 0.02
    gains, offsets, kept = (table[:, len(PLACE) + 4 * part : len(PLACE) + 4 * part + 4] for part in range(3))
    assert (
        abs((gains != 1).any(1).mean() - 0.5) < 0.03
        and 0.19 < np.abs(gains - 1).max() <= 0.2 + 1e-6
        and np.abs(offsets).max() <= 0.1
    )
    assert abs((kept == 0).mean() - 0.25) < 0.02 and kept.any(1).all()


def test_gain_and_offset_act_on_each_band_by_itself():
    image = floats(2)
    options = {**PLAIN, "band_jitter": (0.5, 0.2), "band_jitter_prob": 1.0}
    crops = MultiCrop(24, 12, 0, mode="cpu", mean=(0.0, 0.0), std=(1.0, 1.0), **options)
    plain = MultiCrop(24, 12, 0, mode="cpu", mean=(0.0, 0.0), std=(1.0, 1.0), **PLAIN)
    changed, same = crops.cut(image, 5), plain.cut(image, 5)
    gains, offsets = changed.draws[:, -6:-4], changed.draws[:, -4:-2]
    for crop, before, gain, offset in zip(changed.pixels, same.pixels, gains, offsets, strict=True):
        np.testing.assert_allclose(crop, before * gain + 255 * offset, rtol=1e-4, atol=1e-2)


def test_a_dropped_band_is_its_mean():
    crops = MultiCrop(24, 12, 0, mode="cpu", mean=(0.1, 0.2, 0.3, 0.4), std=(1.0,) * 4, **PLAIN | {"band_drop_prob": 0.5})
    batch = crops.finish(crops.collate([crops.cut(floats(4), seed) for seed in range(20)]), "cpu").global_crops
    empty = (batch.abs() < 1e-6).all(3).all(2)
    assert 0.3 < empty.float().mean() < 0.7 and not empty.all(1).any()


def test_a_stretched_crop_reaches_from_0_to_255():
    batch, _ = finished("cpu", 2, [floats(2) / 9], **PLAIN, stretch_prob=1.0)
    assert torch.allclose(batch.amin((2, 3)), torch.zeros(2, 2)) and torch.allclose(batch.amax((2, 3)), torch.full((2, 2), 255.0))


def test_noise_is_normal_and_of_its_sigma():
    flat = np.full((64, 64, 3), 100, np.float32)
    batch, _ = finished("cpu", 3, [flat] * 8, **PLAIN, noise_prob=1.0, noise_sigma=(0.04, 0.04))
    noise = (batch - 100).flatten() / (255 * 0.04)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and abs((noise**4).mean() - 3) < 0.2
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02


def test_stains_that_do_not_move_leave_the_picture_and_moved_ones_keep_white_nearly_white():
    image = np.random.default_rng(1).integers(1, 256, (40, 52, 3)).astype(np.float32)
    same, moved = (finished("cpu", 3, [image] * 4, **PLAIN, hed_prob=1.0, hed_jitter=size)[0] for size in (1e-7, 0.05))
    plain = finished("cpu", 3, [image] * 4, **PLAIN)[0]
    assert (same - plain.clamp(1, 255)).abs().max() < 0.1 and 1 < (moved - plain).abs().mean() < 40
    white = finished("cpu", 3, [np.full((40, 40, 3), 255, np.float32)] * 4, **PLAIN, hed_prob=1.0)[0]
    assert white.min() > 215


def test_turned_is_numpys():
    crop = np.arange(18).reshape(3, 3, 2)
    row = np.zeros(len(PLACE) + PLACE["flipped"], np.float32)
    row[PLACE["turns"]] = 1
    assert np.array_equal(turned(crop, row), np.rot90(crop))


def test_a_section_of_channels_that_contradicts_itself_is_refused():
    two = [
        "backbone.in_chans=2",
        "crops.gray_prob=0",
        "crops.jitter=[0.4,0.4,0,0]",
        "crops.mean=[0.5,0.5]",
        "crops.std=[0.5,0.5]",
    ]
    assert load("quickstart", [*two, "data.channels.high=4095"]).channels["high"] == 4095
    for override, says in {
        "data.channels.pick=[1,2,3]": "pick lists 3 channels, but backbone.in_chans is 2",
        "data.channels.low=[0,5]": "expected numbers with low < high",
        "data.channels.window=[40,400]|data.channels.high=9": "gives a window and low or high",
        "crops.hed_prob=0.5": "stains are taken apart in RGB, the images have 2 channels",
        "data.channels.show=[0,1,2]": "numbered 0 to 1",
        "data.channels.type=uint12": "should be 'uint8'",
    }.items():
        with pytest.raises(ConfigError, match=says):
            load("quickstart", [*two, *override.split("|")])
