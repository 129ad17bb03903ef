"""Metrics: against other implementations written here, identities, and refused inputs."""

import itertools
import math

import numpy as np
import pytest
import torch

from ipx2p.errors import InputError
from ipx2p.metrics import (
    change_mask,
    haarpsi,
    invented,
    l1,
    l2,
    outside,
    psnr,
    psnr_y,
    share_outside,
    ssim,
    ssim_3d,
    ssim_y,
)

METRICS = [l1, l2, psnr, ssim, psnr_y, ssim_y, ssim_3d, haarpsi]
LOCAL = [psnr, ssim, haarpsi]  # those that can be measured outside a mask

# From scikit-image 0.26.0 on `pattern_pair()` as float64, one picture at a time:
#   structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
#                         data_range=1, channel_axis=0)
#   peak_signal_noise_ratio(a, b, data_range=1)
GOLDEN_SSIM = torch.tensor([0.9284118860, 0.9272024306], dtype=torch.float64)
GOLDEN_PSNR = torch.tensor([19.1388987580, 19.1462958265], dtype=torch.float64)
# From piq 0.8.0, haarpsi(a, b, reduction="none"), with the authors' YIQ matrix in place of its own,
# which has a fourth decimal and gives 0.0001 less here.
GOLDEN_HAARPSI = torch.tensor([0.794596466596, 0.788033253844], dtype=torch.float64)


def pattern_pair():
    """Two batches (2, 3, 23, 31) with values from integer arithmetic, the same everywhere."""
    index = torch.arange(2 * 3 * 23 * 31, dtype=torch.int64)
    a = (index * 7919 % 251).double() / 250
    b = (a + ((index * 104729 % 101).double() / 100 - 0.5) * 0.4).clamp(0, 1)
    return a.view(2, 3, 23, 31), b.view(2, 3, 23, 31)


def test_ssim_equals_scikit_image():
    torch.testing.assert_close(ssim(*pattern_pair()), GOLDEN_SSIM, atol=1e-8, rtol=0)


def test_psnr_equals_scikit_image():
    torch.testing.assert_close(psnr(*pattern_pair()), GOLDEN_PSNR, atol=1e-8, rtol=0)


def test_ssim_in_float32_equals_ssim_in_float64():
    a, b = pattern_pair()
    torch.testing.assert_close(ssim(a.float(), b.float()), ssim(a, b), atol=1e-6, rtol=0)


def dense_ssim(a, b, window, data_range=255):
    """Eq. 13 of Wang et al. 2004 in numpy, from every position where the dense window fits."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def mean(x):
        views = np.lib.stride_tricks.sliding_window_view(x, window.shape)
        return np.tensordot(views, window, axes=window.ndim)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def gaussian(ndim):
    """As MATLAB builds it: exp(-r^2 / (2 sigma^2)) on a grid of 11 values, then its sum made 1."""
    squares = sum(x**2 for x in np.mgrid[(slice(-5, 6),) * ndim].astype(float))
    window = np.exp(-squares / (2 * 1.5**2))
    return window / window.sum()


def test_luma_is_that_of_matlabs_rgb2ycbcr():
    # rgb2ycbcr(uint8([255 0 0])), ... , by its documented matrix and rounding
    known = {
        (255, 0, 0): 81, (0, 255, 0): 145, (0, 0, 255): 41, (255, 255, 255): 235, (0, 0, 0): 16,
        (1, 1, 1): 17, (128, 128, 128): 126, (200, 30, 77): 90,
    }  # fmt: skip
    black = torch.zeros(1, 3, 16, 16)
    for colour, level in known.items():
        pixels01 = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
        expected = 20 * math.log10(255 / (level - 16)) if level > 16 else math.inf
        assert psnr_y(pixels01, black).item() == pytest.approx(expected), colour


def test_metrics_of_luma_equal_those_of_its_levels():
    a, b = ((x * 255).round() for x in pattern_pair())
    matrix = np.array([65.481, 128.553, 24.966]) / 255
    lumas = [np.floor(np.einsum("c,nchw->nhw", matrix, x.numpy()) + 16.5) for x in (a, b)]
    for place, (x, y) in enumerate(zip(*lumas, strict=True)):
        expected = 20 * math.log10(255 / math.sqrt(((x - y) ** 2).mean()))
        assert psnr_y(a / 255, b / 255)[place].item() == pytest.approx(expected, abs=1e-9)
        expected = dense_ssim(x, y, gaussian(2))
        assert ssim_y(a / 255, b / 255)[place].item() == pytest.approx(expected, abs=1e-9)


def test_luma_is_of_whole_levels():
    a, b = ((x * 255).round() / 255 for x in pattern_pair())
    nudged = (a + 0.3 / 255).clamp(max=1)
    assert torch.equal(psnr_y(nudged, b), psnr_y(a, b))


def test_ssim_3d_equals_a_dense_window_over_a_volume():
    a, b = pattern_pair()
    for place in range(2):
        volumes = [np.pad(255 * x[place].movedim(0, -1).numpy(), 5, mode="edge") for x in (a, b)]
        expected = dense_ssim(*volumes, gaussian(3))
        assert ssim_3d(a, b)[place].item() == pytest.approx(expected, abs=1e-9)


def test_ssim_3d_measures_pictures_of_any_size():
    a, b = pattern_pair()
    assert ssim_3d(a[..., :2, :3], b[..., :2, :3]).isfinite().all()


def test_haarpsi_equals_piq():
    torch.testing.assert_close(haarpsi(*pattern_pair()), GOLDEN_HAARPSI, atol=1e-11, rtol=0)


def dense_haarpsi(reference, distorted, counted=1):
    """Reisenhofer et al. 2018 in numpy, one picture (3, H, W) in 0..255, position by position.

    counted: weights of positions at half the size.
    """

    def correlate(x, kernel):
        """With the window of k values from k / 2 - 1 before a position to k / 2 after it."""
        before, after = len(kernel) // 2 - 1, len(kernel) // 2
        views = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((before, after), (before, after))), kernel.shape
        )
        return np.abs((views * kernel).sum(axis=(2, 3)))

    def channels(x):
        yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        x = np.tensordot(yiq, x, axes=1)
        x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2)))
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    def wavelet(scale):
        return np.kron([[-1], [1]], np.ones((2 ** (scale - 1), 2**scale))) / 2**scale

    def similarity(x, y):
        return (2 * x * y + 30) / (x**2 + y**2 + 30)

    a, b = channels(reference), channels(distorted)
    above, below = 0, 0
    weights = []
    for turn in (lambda x: x, np.transpose):
        x, y = ([correlate(c[0], turn(wavelet(j))) for j in (1, 2, 3)] for c in (a, b))
        local = (similarity(x[0], y[0]) + similarity(x[1], y[1])) / 2
        weights.append(np.maximum(x[2], y[2]) * counted)
        above, below = above + weights[-1] / (1 + np.exp(-4.2 * local)), below + weights[-1]
    box = np.ones((2, 2)) / 4
    chroma = sum(similarity(correlate(a[c], box), correlate(b[c], box)) for c in (1, 2)) / 2
    weight = sum(weights) / 2
    above, below = above + weight / (1 + np.exp(-4.2 * chroma)), below + weight
    share = above.sum() / below.sum()
    return (math.log(share / (1 - share)) / 4.2) ** 2


def test_haarpsi_equals_the_formula_of_its_paper():
    for crop in (slice(None), slice(0, 22)):  # odd and even sides
        a, b = (x[..., crop, crop] for x in pattern_pair())
        expected = [
            dense_haarpsi(255 * x.numpy(), 255 * y.numpy()) for x, y in zip(a, b, strict=True)
        ]
        assert haarpsi(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_haarpsi_falls_with_noise_and_is_1_for_black_pictures(generator):
    a, _ = pattern_pair()
    flat = torch.full((1, 3, 64, 64), 0.5)
    picture = torch.linspace(0, 1, 64).expand(1, 3, 64, 64).contiguous()
    draw = torch.randn(flat.shape, generator=generator)
    noisy = [haarpsi((picture + s * draw).clamp(0, 1), picture).item() for s in (0, 0.02, 0.1)]
    assert noisy[0] == pytest.approx(1) and noisy[0] > noisy[1] > noisy[2] > 0
    assert haarpsi(0 * a, 0 * a).tolist() == [1, 1]


def test_invented_detail_is_that_of_neither_source_nor_target(generator):
    flat = torch.full((1, 3, 96, 96), 0.5)
    edge = flat.clone()
    edge[..., 48:] = 0.9

    def noisy(levels, picture=flat):
        return picture + levels / 255 * torch.randn(flat.shape, generator=generator)

    assert invented(noisy(10), flat, flat).item() == pytest.approx(10, rel=0.1)
    assert invented(noisy(20), flat, flat).item() == pytest.approx(20, rel=0.1)
    assert invented(edge, flat, flat).item() > 3
    # of the source alone, or of the target alone, it is not invented; nor is noise drawn again
    for source, target in ((edge, flat), (flat, edge)):
        assert invented(edge, source, target).item() == 0
        assert invented(edge.roll(3, dims=-1)[..., 10:], source[..., 10:], target[..., 10:]) == 0
    assert invented(noisy(10), noisy(10), flat).item() < 1
    # a slope is no fine detail, and less detail than before is none
    slope = torch.linspace(0, 1, 96).expand(1, 3, 96, 96).contiguous()
    assert invented(slope, flat, flat).item() == pytest.approx(0, abs=1e-4)
    assert invented(flat, noisy(10), noisy(10)).item() == 0


def test_invented_detail_rises_with_noise_up_to_half_the_range(generator):
    source, target = (x.repeat(1, 1, 2, 2) for x in pattern_pair())
    draw = torch.randn(source.shape, generator=generator)
    noisy = [(target + level * draw).clamp(0, 1) for level in (0, 0.2, 0.4, 0.8)]
    found = [invented(one, source, target) for one in noisy]
    assert found[0].tolist() == [0, 0]
    assert all((a < b).all() for a, b in itertools.pairwise(found))
    flat = torch.zeros(1, 3, 40, 41)
    board = (torch.arange(40 * 41) % 2).view(1, 1, 40, 41).expand(1, 3, 40, 41).float()
    assert invented(board, flat, flat).item() == pytest.approx(127.5, abs=0.1)


def test_invented_detail_needs_two_windows():
    a, b = pattern_pair()
    assert invented(a[..., :21, :21], b[..., :21, :21], b[..., :21, :21]).shape == (2,)
    with pytest.raises(InputError, match="at least 21 x 21, got 20 x 23"):
        invented(a[..., :20], b[..., :20], b[..., :20])
    with pytest.raises(InputError, match="differ in shape"):
        invented(a, b, b[..., :21])


def test_the_change_mask_reaches_as_far_as_windows_do():
    """The right of the picture changes: G * |difference| falls off as its weights add up.

    Masked are the columns where it is above 5 levels, and five more for the maximum around.
    """
    weights = gaussian(2).sum(axis=0)
    for level in (0.1, 0.5):
        source = torch.full((2, 3, 30, 60), 0.4)
        target = source.clone()
        target[:, 2, :, 40:] += level  # of one channel alone
        reach = max(k for k in range(6) if level * weights[5 + k :].sum() > 5 / 255)
        expected = torch.zeros(2, 1, 30, 60).double()
        expected[..., 40 - reach - 5 :] = 1
        assert torch.equal(change_mask(source, target), expected)
        assert torch.equal(change_mask(target, source), expected)
        share = (40 - reach - 5 - 5) / 50  # columns 5..54 have whole windows
        assert share_outside(expected).tolist() == pytest.approx([share, share])


def test_what_a_restoration_removes_has_changed_and_rounding_has_not(generator):
    source = torch.full((1, 3, 64, 64), 0.5)
    draw = torch.randn(source.shape, generator=generator)
    assert change_mask(source, source + 2 / 255 * draw).sum() == 0
    assert change_mask(source + 6 / 255 * draw, source).min() == 1  # noise: its mean is no change
    assert change_mask(source, source + 8 / 255).min() == 1
    assert change_mask(source, source + 4 / 255).sum() == 0


def halves(mask_of, size):
    mask = torch.zeros(2, 1, *size).double()
    mask[..., mask_of] = 1
    return mask


@pytest.mark.parametrize("metric", LOCAL)
def test_outside_a_mask_nothing_inside_counts(metric, generator):
    a, b = pattern_pair()
    mask = halves(slice(0, 12), a.shape[-2:])
    got = outside(metric, a, b, mask)
    edited = torch.where(mask > 0, torch.rand(a.shape, generator=generator).double(), a)
    assert torch.equal(outside(metric, edited, b, mask), got)
    assert torch.equal(outside(metric, a, b, 0 * mask), metric(a, b))
    perfect = metric(b, b)
    torch.testing.assert_close(outside(metric, torch.where(mask > 0, a, b), b, mask), perfect)
    # what differs outside is not thinned by the part that may change
    assert (got < metric(torch.where(mask > 0, b, a), b)).all()
    alone = [outside(metric, *(x[i : i + 1] for x in (a, b, mask))) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), got)


def test_outside_a_mask_psnr_is_of_the_pixels_there():
    a, b = pattern_pair()
    mask = halves(slice(0, 12), a.shape[-2:])
    assert torch.equal(outside(psnr, a, b, mask), outside(psnr, b, a, mask))
    torch.testing.assert_close(outside(psnr, a, b, mask), psnr(a[..., 12:], b[..., 12:]))


def test_outside_a_mask_ssim_is_of_the_windows_around_its_positions():
    a, b = pattern_pair()
    mask = halves(slice(0, 20), a.shape[-2:])
    held = torch.where(mask > 0, b, a)
    # windows around the columns 20..25, of 31, reach from 15 to 30
    expected = ssim(held[..., 15:], b[..., 15:])
    torch.testing.assert_close(outside(ssim, a, b, mask), expected)


def test_outside_a_mask_haarpsi_weighs_positions_of_the_reduced_picture():
    a, b = pattern_pair()
    mask = halves(slice(0, 13), a.shape[-2:])
    held = torch.where(mask > 0, b, a)
    counted = np.ones((12, 16))  # of 23 x 31
    counted[:, :6], counted[:, 6] = 0, 0.5
    for x, y, got in zip(held, b, outside(haarpsi, a, b, mask), strict=True):
        expected = dense_haarpsi(255 * y.numpy(), 255 * x.numpy(), counted)
        assert got.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [(23, 31), (8, 8)])
def test_a_mask_that_leaves_nothing_is_refused(size):
    a, b = (x[..., : size[0], : size[1]] for x in pattern_pair())
    mask = halves(slice(0, None), size)
    with pytest.raises(InputError, match="the mask covers a whole picture"):
        outside(psnr, a, b, mask)


def test_constant_offset_has_known_distances():
    a = torch.full((1, 3, 16, 20), 0.25)
    b = torch.full((1, 3, 16, 20), 0.75)
    assert l1(a, b).item() == pytest.approx(0.5)
    assert l2(a, b).item() == pytest.approx(0.25)
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(4))
    luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)  # the structure term is 1
    assert ssim(a, b).item() == pytest.approx(luminance)


def test_identical_pictures_are_perfect():
    a, _ = pattern_pair()
    assert torch.equal(l1(a, a), torch.zeros(2).double())
    assert torch.equal(l2(a, a), torch.zeros(2).double())
    for metric in (psnr, psnr_y):
        assert torch.equal(metric(a, a), torch.full((2,), math.inf).double())
    for metric in (ssim, ssim_y, ssim_3d, haarpsi):
        torch.testing.assert_close(metric(a, a), torch.ones(2).double())
    assert torch.equal(invented(a, a, 1 - a), torch.zeros(2).double())
    assert torch.equal(invented(a, 1 - a, a), torch.zeros(2).double())


@pytest.mark.parametrize("metric", METRICS)
def test_metric_is_symmetric(metric):
    a, b = pattern_pair()
    torch.testing.assert_close(metric(a, b), metric(b, a))


@pytest.mark.parametrize("metric", METRICS)
def test_sample_value_does_not_depend_on_its_batch(metric):
    a, b = pattern_pair()
    together = metric(a, b)
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(2)])
    assert together.shape == (2,) and together.dtype == torch.float64
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("metric", [ssim, ssim_y])
def test_ssim_counts_only_full_windows(metric):
    a, b = pattern_pair()
    smallest = metric(a[..., 5:16, 7:18], b[..., 5:16, 7:18])  # 11 x 11: one window, its own mean
    assert smallest.shape == (2,)
    with pytest.raises(InputError, match=r"at least 11 x 11, got 31 x 10"):
        metric(a[..., :10, :], b[..., :10, :])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 16, 17), "differ in shape"),
        (torch.zeros(1, 3, 16, 16), "differ in shape"),
        (torch.full((2, 3, 16, 16), -0.1), r"in \[0, 1\], got -0.1"),
        (torch.full((2, 3, 16, 16), 1.00001), r"in \[0, 1\], got 1.00001"),
        (torch.full((2, 3, 16, 16), float("nan")), "finite"),
        (torch.full((2, 3, 16, 16), float("inf")), "finite"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got uint8"),
    ],
)
def test_bad_batch_is_refused(metric, bad, message):
    good = torch.zeros(2, 3, 16, 16)
    with pytest.raises(InputError, match=message):
        metric(bad, good)
    with pytest.raises(InputError, match=message):
        metric(good, bad)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3), (0, 3, 16, 16)])
def test_other_layouts_are_refused(shape):
    with pytest.raises(InputError, match="expected"):
        ssim(torch.zeros(shape), torch.zeros(shape))


def test_rounding_beyond_the_range_is_accepted():
    a = torch.full((1, 3, 16, 16), 1.0000005)
    assert l1(a, a).item() == 0
