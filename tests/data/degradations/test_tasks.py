"""Degradations on [0, 1] pixels."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional

from ipx2p.data.degradations.blur import (
    BlurConfig,
    blur,
    camera_path,
    disc_kernel,
    gaussian_kernel,
    path_kernel,
)
from ipx2p.data.degradations.rain import RainConfig, rain
from ipx2p.data.degradations.sensor import (
    LowLightConfig,
    NoiseConfig,
    demosaic,
    expose,
    jpeg,
    low_light,
    sensor_noise,
)
from ipx2p.data.degradations.sheet import SHEET_TASKS, degradation_sheet
from ipx2p.data.degradations.tasks import (
    DEGRADATIONS,
    DegradeConfig,
    canonical_task,
    check_task,
    degrade,
)
from ipx2p.data.light import convolve, linear_from_srgb, splat, srgb_from_linear
from ipx2p.errors import InputError
from ipx2p.images import load_image, pixels01_from_image
from tests.conftest import ROOT

TASKS = [*DEGRADATIONS, "denoise+enhance", "denoise+enhance+deblur+derain"]
GREY = torch.full((3, 64, 64), 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photo():
    """(3, 319, 480)"""
    return pixels01_from_image(load_image(ROOT / "assets/photos/aqueduct.jpg"))


def test_linear_light_and_back_is_the_identity():
    values = torch.linspace(0, 1, 1001)
    torch.testing.assert_close(srgb_from_linear(linear_from_srgb(values)), values)


def test_linear_light_has_the_values_of_the_standard():
    values = torch.tensor([0.0, 0.04045, 0.5, 1.0])
    expected = torch.tensor([0.0, 0.0031308, 0.2140411, 1.0])
    torch.testing.assert_close(linear_from_srgb(values), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (8, 70), (61, 20), (96, 128)])
@pytest.mark.parametrize("task", TASKS)
def test_result_is_a_picture_and_the_argument_is_left_alone(task, size):
    picture = torch.rand(3, *size, generator=seeded(1))
    before = picture.clone()
    for severity in (0, 1):
        result = degrade(picture, task, seeded(), DegradeConfig().at(severity))
        assert result.shape == picture.shape and result.dtype == torch.float32
        assert result.min() >= 0 and result.max() <= 1 and result.isfinite().all()
        assert torch.equal(picture, before) and not torch.equal(result, picture)


@pytest.mark.parametrize("task", TASKS)
def test_the_generator_decides_everything(task):
    one, same = (degrade(GREY, task, seeded(3), DegradeConfig()) for _ in range(2))
    other = degrade(GREY, task, seeded(4), DegradeConfig())
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_its_pictures_one_by_one(task):
    batch = torch.rand(3, 3, 24, 40, generator=seeded(1))
    config = DegradeConfig()
    single = [degrade(batch[index], task, seeded(index), config) for index in range(3)]
    assert torch.equal(
        degrade(batch, task, [seeded(index) for index in range(3)], config), torch.stack(single)
    )
    draws = seeded(7)
    in_turn = torch.stack([degrade(picture, task, draws, config) for picture in batch])
    assert torch.equal(degrade(batch, task, seeded(7), config), in_turn)


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_the_severe_end_is_farther_from_the_picture(task, photo):
    far = []
    for severity in (0, 0.5, 1):
        result = degrade(photo, task, seeded(2), DegradeConfig().at(severity))
        far.append((result - photo).square().mean().item())
    assert 1.5 * far[0] < far[1] and 1.2 * far[1] < far[2]


@pytest.mark.parametrize("task", ["derain", "deblur"])
def test_what_has_a_size_looks_alike_at_any_resolution(task):
    picture = torch.rand(1, 3, 8, 12, generator=seeded(1))
    small, large = (
        functional.interpolate(picture, scale_factor=factor, mode="bilinear")[0]
        for factor in (32, 96)
    )
    config = replace(DegradeConfig(), rain=RainConfig(misty=0.0)).at(1)
    at_small, at_large = (degrade(p, task, seeded(3), config) for p in (small, large))
    reduced = functional.interpolate(at_large[None], small.shape[-2:], mode="area")[0]
    # Streaks are about a pixel wide here, so that single pixels differ.
    difference, change = (
        functional.avg_pool2d(x, 4).abs().mean() for x in (at_small - reduced, at_small - small)
    )
    assert difference < 0.15 * change


def test_several_degradations_come_in_the_order_of_nature():
    picture, config = torch.rand(3, 32, 32, generator=seeded(1)), DegradeConfig()
    draws = seeded(5)
    wet = rain(picture, draws, config.rain)
    expected = low_light(blur(wet, draws, config.blur), draws, config.low_light)
    for task in ("enhance+deblur+derain", "derain+enhance+deblur"):
        assert torch.equal(degrade(picture, task, seeded(5), config), expected)


def test_noise_of_a_dark_picture_is_as_strong_beside_it_as_alone():
    config = DegradeConfig(
        low_light=LowLightConfig(stops=[3.0, 3.0], shot=[0.0, 0.0], read=[0.0, 0.0], cast=0.0),
        noise=NoiseConfig(shot=[0.01, 0.01], read=[0.01, 0.01], quality=[100, 100]),
    )
    white = torch.full((3, 64, 64), 0.9)
    alone, dark = (
        linear_from_srgb(degrade(white, task, seeded(1), config))
        for task in ("denoise", "denoise+enhance")
    )
    assert dark.std() / dark.mean() == pytest.approx((alone.std() / alone.mean()).item(), rel=0.1)


def test_enhance_darkens_as_it_always_has():
    result = degrade(GREY[:, :8, :8], "enhance", seeded(5), DegradeConfig())
    expected = torch.tensor(
        [[0.0563807, 0.0443635], [0.0548756, 0.0471414], [0.0745081, 0.0745081]]
    )
    torch.testing.assert_close(result[:, 0, :2], expected)


def test_noise_has_the_variance_of_its_model_at_each_site_of_the_mosaic():
    for mean in (0.0, 0.2, 0.8):
        light = expose(torch.full((3, 128, 128), mean), 0.01, 0.02, seeded())
        red, blue = light[0, ::2, ::2], light[2, 1::2, 1::2]
        sites = torch.cat([red, light[1, ::2, 1::2], light[1, 1::2, ::2], blue])
        assert sites.mean().item() == pytest.approx(mean, abs=0.003)
        assert sites.std().item() == pytest.approx((0.01 * mean + 0.02**2) ** 0.5, rel=0.03)


def test_noise_of_neighbours_is_correlated_and_the_picture_keeps_its_detail():
    light = torch.rand(3, 33, 47, generator=seeded(1))
    assert torch.equal(expose(light, 0.0, 0.0, seeded()), light)
    noise = expose(torch.zeros(3, 129, 127), 0.0, 0.1, seeded())
    for one, other in ((noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        for channel in range(3):
            pair = torch.stack([one[channel].flatten(), other[channel].flatten()])
            assert 0.3 < torch.corrcoef(pair)[0, 1] < 0.8


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (15, 11)])
def test_demosaicing_keeps_sites_and_flat_channels_at_any_size(size):
    noise = torch.randn(3, *size, generator=seeded(1))
    green = demosaic(noise)[1]
    assert torch.equal(green[::2, 1::2], noise[1, ::2, 1::2])
    middle = (noise[1, 2, 1] + noise[1, 2, 3] + noise[1, 1, 2] + noise[1, 3, 2]) / 4
    torch.testing.assert_close(green[2, 2], middle)
    flat = torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1).expand(3, *size)
    torch.testing.assert_close(demosaic(flat), flat)


def test_noise_is_there_before_the_file():
    config = NoiseConfig(shot=[0.01, 0.01], read=[0.02, 0.02], quality=[100, 100])
    noisy = linear_from_srgb(sensor_noise(GREY, seeded(), config)).mean(0)
    mean = linear_from_srgb(GREY).mean().item()
    # the mean of three channels, which a file with coarser colours keeps
    expected = ((0.01 * mean + 0.02**2) / 3) ** 0.5
    assert noisy.std().item() == pytest.approx(expected, rel=0.25)


def test_low_light_halves_the_light_per_stop():
    clean = {"shot": [0.0, 0.0], "read": [0.0, 0.0], "cast": 0.0}
    result = low_light(GREY, seeded(), LowLightConfig(stops=[3.0, 3.0], **clean))
    torch.testing.assert_close(linear_from_srgb(result), linear_from_srgb(GREY) / 8)


def test_low_light_casts_a_colour_around_green():
    clean = {"shot": [0.0, 0.0], "read": [0.0, 0.0]}
    config = LowLightConfig(stops=[2.0, 2.0], cast=0.1, **clean)
    gains = torch.stack([
        linear_from_srgb(low_light(GREY, seeded(seed), config))[:, 0, 0] for seed in range(50)
    ]) / (linear_from_srgb(GREY)[0, 0, 0] / 4)  # fmt: skip
    assert (gains[:, 1] - 1).abs().max() < 1e-3
    assert gains[:, 0].std() > 0.03 and gains[:, 2].std() > 0.03
    assert gains.min() > 0.89 and gains.max() < 1.11


def test_severities_come_from_their_range():
    config = LowLightConfig(stops=[1.0, 3.0], shot=[0.0, 0.0], read=[0.0, 0.0], cast=0.0)
    light = [linear_from_srgb(low_light(GREY, seeded(seed), config)).mean() for seed in range(40)]
    stops = (linear_from_srgb(GREY).mean() / torch.stack(light)).log2()
    assert 1 <= stops.min() < 1.2 and 2.8 < stops.max() <= 3.001


def test_jpeg_of_lower_quality_is_farther_from_the_picture(photo):
    far = [(jpeg(photo, quality) - photo).square().mean() for quality in (10, 60, 95)]
    assert far[0] > 2 * far[1] > 4 * far[2]


def test_without_noise_the_file_remains(photo):
    config = NoiseConfig(shot=[0.0, 0.0], read=[0.0, 0.0], quality=[10, 10])
    assert torch.equal(sensor_noise(photo, seeded(), config), jpeg(photo, 10))


@pytest.mark.parametrize("kind", ["motion", "defocus", "gaussian"])
def test_blur_leaves_a_flat_picture_and_spreads_a_point(kind):
    only = {name: float(name == kind) for name in ("motion", "defocus", "gaussian")}
    config = BlurConfig(**only, length=[0.5, 0.5], radius=[0.2, 0.2], sigma=[0.1, 0.1])
    for size in ((8, 8), (8, 40), (50, 30)):
        flat = torch.full((3, *size), 0.3)
        torch.testing.assert_close(blur(flat, seeded(), config), flat, atol=1e-5, rtol=1e-5)
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    light = linear_from_srgb(blur(point, seeded(), config))
    torch.testing.assert_close(light.sum((1, 2)), torch.ones(3), atol=1e-3, rtol=0)
    assert light.max() < 0.2


def test_convolution_is_the_sum_over_mirrored_neighbours():
    light = torch.rand(3, 9, 7, generator=seeded(1))
    kernel = torch.rand(5, 5, generator=seeded(2))
    extended = functional.pad(light[None], (2, 2, 2, 2), mode="reflect")
    expected = functional.conv2d(extended, kernel.flip(0, 1).expand(3, 1, 5, 5), groups=3)[0]
    torch.testing.assert_close(convolve(light, kernel), expected)
    wide = gaussian_kernel(30.0)  # wider than the picture
    mean = convolve(light, wide).mean()
    torch.testing.assert_close(mean, light.mean(), atol=0.05, rtol=0)


def test_kernels_sum_to_one_and_are_centred():
    path = camera_path(seeded(1)) * 9
    for kernel in (path_kernel(path), disc_kernel(3.3), disc_kernel(0.2), gaussian_kernel(2.0)):
        offset = torch.arange(len(kernel)) - len(kernel) // 2.0
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
        assert abs((kernel.sum(0) * offset).sum()) < 1e-3
        assert abs((kernel.sum(1) * offset).sum()) < 1e-3


def test_a_camera_path_has_length_one_and_no_two_are_alike():
    paths = torch.stack([camera_path(seeded(seed)) for seed in range(20)])
    lengths = paths.diff(dim=1).norm(dim=-1).sum(1)
    torch.testing.assert_close(lengths, torch.ones(20), atol=0.01, rtol=0)
    extents = (paths.amax(1) - paths.amin(1)).norm(dim=-1)
    assert extents.min() < 0.6 and extents.max() > 0.8


def test_splat_keeps_weights_within_the_picture_and_their_place():
    points = torch.tensor([[2.25, 3.5], [0.0, 0.0], [-0.5, 1.0], [90.0, -70.0], [4.0, 4.0]])
    drawn = splat(points, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), 5, 5)
    expected = torch.zeros(5, 5)
    expected[2, 3:5], expected[3, 3:5] = 0.375, 0.125
    expected[0, 0], expected[0, 1], expected[4, 4] = 2, 2, 16
    torch.testing.assert_close(drawn, expected)


def test_rain_brightens_the_dark_most_and_runs_along_its_lean():
    still = {"veil": [0.0, 0.0], "lean": 0.0, "gust": 0.0}
    dark, light = torch.full((3, 128, 128), 0.1), torch.full((3, 128, 128), 0.8)
    on_dark, on_light = (
        rain(grey, seeded(2), RainConfig(**still)) - grey for grey in (dark, light)
    )
    assert on_dark.min() > -1e-6 and on_dark.mean() > 3 * on_light.mean().abs()
    white = torch.ones(3, 128, 128)  # brighter than the sky, whose light is all that drops have
    assert rain(white, seeded(2), RainConfig(**still)).mean() < 0.9995
    along, across = on_dark.diff(dim=1).abs().mean(), on_dark.diff(dim=2).abs().mean()
    assert across > 2 * along


def test_rain_without_drops_is_mist_which_takes_contrast(photo):
    none = RainConfig(drops=[0.0, 0.0], veil=[0.0, 0.0])
    torch.testing.assert_close(rain(photo, seeded(), none), photo, atol=1e-5, rtol=0)
    misty = rain(photo, seeded(), RainConfig(drops=[0.0, 0.0], veil=[0.5, 0.5], misty=1.0))
    assert misty.std() < 0.8 * photo.std()


def test_a_drawn_share_of_the_rain_comes_with_mist():
    for share, least, most in ((0.0, 0, 0), (0.2, 6, 18), (1.0, 60, 60)):
        config = RainConfig(drops=[0.0, 0.0], misty=share)
        changed = [(rain(GREY, seeded(n), config) - GREY).abs().max() > 1e-3 for n in range(60)]
        assert least <= sum(changed) <= most


def test_middle_severities_lie_beside_published_sets():
    """LOL: 7.8 dB, a mean of 14/255, which lies towards the severe end. SIDD: 23.7 dB."""

    def means(task, severity):
        rows = []
        for name in ("aqueduct", "cat", "drums", "temple", "tulips"):
            clean = pixels01_from_image(load_image(ROOT / f"assets/photos/{name}.jpg"))
            result = degrade(clean, task, seeded(3), DegradeConfig().at(severity))
            change = result - clean
            decibel = -10 * change.square().mean().log10()
            share = (change.abs().mean(0) > 0.05).float().mean()
            rows.append(torch.stack([decibel, share, 255 * result.mean()]))
        return torch.stack(rows).mean(0).tolist()

    decibel, share, _ = means("derain", 0.5)
    assert 21 < decibel < 26 and 0.15 < share < 0.35
    assert means("denoise", 0.5)[0] == pytest.approx(23.7, abs=1)
    assert means("enhance", 0.5)[0] == pytest.approx(7.8, abs=1)
    assert means("enhance", 0)[2] > 50 and means("enhance", 1)[2] < 14 < means("enhance", 0.5)[2]


def test_severity_is_a_point_of_every_range():
    config = DegradeConfig()
    mild, middle, severe = (config.at(severity) for severity in (0, 0.5, 1))
    assert mild.rain.drops == [config.rain.drops[0]] * 2
    assert severe.blur.length == [config.blur.length[1]] * 2
    assert middle.low_light.stops == [4.0, 4.0] and middle.rain.lean == config.rain.lean
    assert mild.noise.quality == [95.0, 95.0] and severe.noise.quality == [60.0, 60.0]
    with pytest.raises(InputError, match=r"severity is 1\.5, expected 0 \(mild\) to 1"):
        config.at(1.5)


def test_settings_load_from_yaml():
    settings = OmegaConf.merge(
        OmegaConf.structured(DegradeConfig), {"rain": {"veil": [0, 0.1]}, "blur": {"motion": 1}}
    )
    config = OmegaConf.to_object(settings)
    config.check("data.degrade")
    assert config == DegradeConfig(rain=RainConfig(veil=[0, 0.1]), blur=BlurConfig(motion=1))


def test_a_task_is_described_by_its_own_settings():
    config, other = DegradeConfig(), DegradeConfig(rain=RainConfig(drops=[0.0, 1.0]))
    assert [*config.of(["denoise+enhance", "denoise"])] == ["low_light", "noise"]
    assert config.of(["deblur"]) == other.of(["deblur"])
    assert config.of(["derain+deblur"]) != other.of(["derain+deblur"])


@pytest.mark.parametrize("bad", [[0.3], [0.2, 0.1], [-1.0, 1.0]])
def test_a_range_that_is_none_is_refused_by_key(bad):
    with pytest.raises(InputError, match=r"data\.degrade\.noise\.shot is .*expected a range"):
        DegradeConfig(noise=NoiseConfig(shot=bad)).check("data.degrade")
    DegradeConfig().check("data.degrade")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DegradeConfig(rain=RainConfig(lean=95.0)),
            r"x\.rain\.lean is 95\.0, expected a number within 0 to 90",
        ),
        (
            DegradeConfig(rain=RainConfig(drops=[0, 1e9])),
            r"x\.rain\.drops is .*range .low, high. within 0 to 20000",
        ),
        (DegradeConfig(blur=BlurConfig(length=[0, 3])), r"x\.blur\.length is .*within 0 to 1"),
        (DegradeConfig(blur=BlurConfig(0, 0, 0)), r"x\.blur: motion, defocus and gaussian are all"),
        (
            DegradeConfig(noise=NoiseConfig(quality=[0, 50])),
            r"x\.noise\.quality is .*within 1 to 100",
        ),
    ],
)
def test_settings_beyond_their_bounds_are_refused_by_key(config, message):
    with pytest.raises(InputError, match=message):
        config.check("x")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("denoize", r"data\.tasks: no degradation for 'denoize'; did you mean denoise"),
        ("derain+denoize", r"no degradation for 'denoize' in 'derain\+denoize'; did you mean"),
        ("derain+denoise+derain", r"data\.tasks: 'derain' appears twice"),
        ("", r"data\.tasks: no degradation for ''"),
    ],
)
def test_unknown_and_repeated_tasks_are_refused(task, message):
    with pytest.raises(InputError, match=message):
        check_task(task, "data.tasks")


def test_a_task_has_one_canonical_name():
    assert canonical_task("denoise+enhance+derain") == "derain+enhance+denoise"
    assert canonical_task("denoise") == "denoise"


@pytest.mark.parametrize(
    ("pixels01", "message"),
    [
        (torch.zeros(3, 16, 16, dtype=torch.uint8), r"expected float32 pixels01 .*got uint8"),
        (torch.zeros(1, 16, 16), r"got float32 \(1, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), r"got float32 \(0, 3, 16, 16\)"),
        (torch.full((3, 16, 16), -1.0), r"expected pixels01 in \[0, 1\], got -1\.\.-1"),
        (torch.full((3, 16, 16), torch.nan), r"got nan"),
        (torch.zeros(3, 16, 7), "a picture of 7 x 16, expected at least 8 x 8"),
    ],
)
def test_what_is_no_picture_is_refused(pixels01, message):
    with pytest.raises(InputError, match=message):
        degrade(pixels01, "denoise", seeded(), DegradeConfig())


def test_generators_must_be_as_many_as_pictures():
    with pytest.raises(InputError, match="degrade: 2 generators for 3 pictures"):
        degrade(torch.zeros(3, 3, 8, 8), "denoise", [seeded(), seeded()], DegradeConfig())


def test_a_sheet_has_a_row_for_each_task(photo):
    photos = [load_image(ROOT / "assets/photos/cat.jpg")]
    sheet = degradation_sheet(photos, DegradeConfig(), cell=64)
    assert sheet.height > len(SHEET_TASKS) * 43 and sheet.width > 4 * 64
