"""The file of a last layer's posterior: what it holds, and for whom."""

import pytest
import torch

from ckpt.posteriors import load_posterior, save_posterior
from diffusion.laplace import Curvature
from harness.cli import UserError
from harness.files import write_tensors

OWN, OTHER = "ab" * 32, "cd" * 32


def posterior():
    curvature = Curvature(torch.nn.Conv2d(2, 3, 3, padding=1), torch.tensor([0.1, 0.3]))
    phi = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    curvature.add(phi, torch.tensor([0.2, 0.8]))
    return curvature.posterior(0.5), phi


def test_what_is_read_says_the_same_variance_bit_for_bit(tmp_path):
    said, phi = posterior()
    save_posterior(tmp_path / "p.safetensors", said, OWN)
    read = load_posterior(tmp_path / "p.safetensors", OWN)
    assert torch.equal(read.variance(phi), said.variance(phi))
    assert torch.equal(read.noise, said.noise)
    assert (read.prior, read.rows, read.kernel, read.padding) == (0.5, 32, (3, 3), (1, 1))


def test_another_network_s_and_what_is_none_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    save_posterior(path, posterior()[0], OWN)
    with pytest.raises(UserError, match="of the network abababababab: got .* cdcdcdcdcdcd"):
        load_posterior(path, OTHER)
    write_tensors(path, {"weight": torch.ones(2)}, {})
    with pytest.raises(UserError, match="holds no posterior"):
        load_posterior(path, OWN)
    said = posterior()[0]
    said.root[0, 0] = -1
    save_posterior(path, said, OWN)
    with pytest.raises(UserError, match="no posterior's"):
        load_posterior(path, OWN)
