"""Measures of pictures against those that they should be: scikit-image's, and by hand."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.coupling import resize
from metrics.paired import crops, patch_distance, psnr, roughness, sharpness, ssim


def pictures(n=5, side=32, seed=0):
    """Smooth colours with some grain, in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    base = F.interpolate(torch.rand(n, 3, 6, 6, generator=g), (side, side), mode="bicubic")
    return (base + 0.05 * torch.randn(n, 3, side, side, generator=g)).clamp(0, 1)


def blurred(x):
    return resize(resize(x, (16, 16)), (32, 32))


def test_psnr_and_ssim_are_scikit_image_s():
    metrics = pytest.importorskip("skimage.metrics", reason="a development oracle")
    truth, found = pictures(), blurred(pictures())
    for i in range(len(truth)):
        a, b = truth[i].double().numpy(), found[i].double().numpy()
        want = metrics.peak_signal_noise_ratio(a, b, data_range=1)
        assert float(psnr(found, truth)[i]) == pytest.approx(want, rel=1e-12)
        how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        want = metrics.structural_similarity(a, b, data_range=1, channel_axis=0, **how)
        assert float(ssim(found, truth)[i]) == pytest.approx(want, rel=1e-12)


def test_a_picture_is_like_itself_and_an_image_s_numbers_are_its_own():
    x = pictures()
    assert (psnr(x, x) == torch.inf).all()
    torch.testing.assert_close(ssim(x, x), torch.ones(5).double())
    assert sharpness(x, x) == 1 and patch_distance(x, x) == pytest.approx(0, abs=1e-9)
    found = blurred(x)
    assert torch.equal(ssim(found, x)[2:3], ssim(found[2:3], x[2:3]))
    assert float(psnr(x + 0.1, x)[0]) == pytest.approx(20, rel=1e-5)  # |error| = 0.1


def test_blur_is_less_than_one_and_grain_more():
    x = pictures()
    assert sharpness(blurred(x), x) < 0.8 < 1.2 < sharpness(x + 0.1 * torch.randn_like(x), x)
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert roughness(2 * ramp) == 4


def test_crops_are_the_same_at_every_call_and_lie_where_the_truth_s_do():
    x = pictures(40)
    assert torch.equal(crops(x), crops(x)) and not torch.equal(crops(x), crops(x, seed=1))
    torch.testing.assert_close(crops(x + 0.25), crops(x))  # less their mean
    assert patch_distance(blurred(x), x) > 10 * patch_distance(x + 1e-3, x)
    # A tenth of the noise is nearer.
    far, near = (patch_distance(x + sd * torch.randn(x.shape), x) for sd in (0.2, 0.02))
    assert near < far
