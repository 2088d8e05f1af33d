"""The autoencoders that need no download: pca and pixel."""

import numpy as np
import pytest
import torch

from data.dataset import open_dataset
from harness.cli import UserError
from vae import fit_pca, load_vae, pixel, psnr, save_vae, vae_from_meta


@pytest.fixture(scope="module")
def faces():
    return open_dataset("toyfaces:300", holdout=0).images(range(300)) / 127.5 - 1


def test_pca_latents_are_uncorrelated_of_unit_variance_and_invert(faces, tmp_path):
    vae = fit_pca(faces)
    z = vae.encode(faces)
    assert z.shape == (300, 32, 8, 8)
    flat = z.double().movedim(1, -1).reshape(-1, 32)
    covariance, variance = (
        flat.T @ flat / len(flat),
        (vae.std.double() ** 4),
    )  # std is the fourth root of the variance, scaled
    assert flat.mean(0).abs().max() < 1e-3 and float(covariance.diagonal().mean()) == pytest.approx(
        1.0, abs=1e-3
    )
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3  # uncorrelated
    assert torch.allclose(
        covariance.diagonal() ** 2 / variance,
        (covariance.diagonal() ** 2 / variance)[:1].expand(32),
        rtol=1e-2,
    )
    random = torch.randn(4, 32, 8, 8)
    assert (vae.encode(vae.decode(random)) - random).abs().max() < 1e-3
    assert psnr(vae.decode(z), faces) > 27
    save_vae(tmp_path / "vae.safetensors", vae)
    for twin in (load_vae(tmp_path / "vae.safetensors"), vae_from_meta(vae.meta())):
        assert torch.equal(twin.encode(faces[:2]), vae.encode(faces[:2])) and twin.name == "pca"


def test_pca_of_full_rank_is_exact_and_no_32_components_do_better(faces):
    full = fit_pca(faces, channels=192)
    assert psnr(full.decode(full.encode(faces)), faces) > 80
    vae = fit_pca(faces)
    patches = (
        torch.nn.functional.pixel_unshuffle(faces.double(), 8)
        .movedim(1, -1)
        .reshape(-1, 192)
        .numpy()
    )
    _, singular, _ = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    lost = (singular[32:] ** 2).sum() / patches.size  # Eckart-Young
    error = (vae.decode(vae.encode(faces)) - faces).double().square().mean()
    assert float(error) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("name, shape", [("pixel", (3, 64, 64)), ("pixel:4", (48, 16, 16))])
def test_pixel_is_the_identity(faces, name, shape):
    vae = load_vae(name)
    z = vae.encode(faces[:3])
    assert z.shape[1:] == shape == vae.latent_shape(64)
    assert torch.equal(z, torch.nn.functional.pixel_unshuffle(faces[:3], vae.factor))
    assert torch.equal(vae.decode(z), faces[:3])


def test_autoencoders_that_cannot_be():
    with pytest.raises(UserError, match="not divisible"):
        pixel(8).latent_shape(60)
    with pytest.raises(UserError, match="Name pixel, pixel:N"):
        load_vae("flux9")
