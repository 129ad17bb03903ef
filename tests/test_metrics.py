"""PSNR, SSIM, L1, L2: against numbers of scikit-image, identities, and refused inputs."""

import math

import pytest
import torch

from ipx2p.errors import InputError
from ipx2p.metrics import l1, l2, psnr, ssim

METRICS = [l1, l2, psnr, ssim]

# From scikit-image 0.26.0 on `pattern_pair()` as float64, one picture at a time:
#   structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
#                         data_range=1, channel_axis=0)
#   peak_signal_noise_ratio(a, b, data_range=1)
GOLDEN_SSIM = torch.tensor([0.9284118860, 0.9272024306], dtype=torch.float64)
GOLDEN_PSNR = torch.tensor([19.1388987580, 19.1462958265], dtype=torch.float64)


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
    assert torch.equal(psnr(a, a), torch.full((2,), math.inf).double())
    torch.testing.assert_close(ssim(a, a), torch.ones(2).double())


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


def test_ssim_counts_only_full_windows():
    a, b = pattern_pair()
    smallest = ssim(a[..., 5:16, 7:18], b[..., 5:16, 7:18])  # 11 x 11: one window, its own mean
    assert smallest.shape == (2,)
    with pytest.raises(InputError, match=r"at least 11 x 11, got 31 x 10"):
        ssim(a[..., :10, :], b[..., :10, :])


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
