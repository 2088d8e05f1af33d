"""Features that need no download tell damaged images from whole ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data.sources import open_source
from eval_fid import frechet_from_features, kernel_distance


def worse(image, how, amount):
    picture = Image.fromarray(image)
    if how == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(amount)))
    if how == "jpeg":
        from io import BytesIO

        picture.save(box := BytesIO(), "JPEG", quality=amount)
        return np.asarray(Image.open(box))
    noise = np.random.default_rng(image.sum()).normal(0, amount, image.shape)
    return (image + noise).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "how, amounts", [("blur", (0.7, 1.5, 3)), ("jpeg", (70, 30, 8)), ("noise", (10, 30, 70))]
)
def test_both_distances_grow_with_the_damage(how, amounts):
    from metrics.features import Pca
    from vae import fit_pca

    source = open_source("toyfaces:120", 64)
    pixels = [source.pixel(i) for i in range(120)]

    def stack(images):
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    extractor = Pca(fit_pca(stack(pixels).float() / 127.5 - 1, channels=192), {})
    real = extractor(stack(pixels))
    rows = [real, *(extractor(stack([worse(p, how, a) for p in pixels])) for a in amounts)]
    fid, kid = (
        [metric(real, f) for f in rows]
        for metric in (frechet_from_features, lambda a, b: kernel_distance(a, b).value)
    )
    assert all(a < b for a, b in zip(fid, fid[1:])) and all(a < b for a, b in zip(kid, kid[1:])), (
        fid,
        kid,
    )
