"""pytorch-fid, torch-fidelity and clean-fid as oracles, each in a process of its own: torchvision
beside a CPU build of torch breaks what else looks for it.

    pip install --no-deps --target FOLDER torchvision==0.28.0 pytorch-fid==0.3.0 \\
        torch-fidelity==0.4.0 clean-fid==0.1.35
    FID_PEERS=FOLDER python tests/fid_peers.py golden
        the numbers in metrics/test_inception.py: pytorch-fid's network with formula_weights
    FID_PEERS=FOLDER python tests/fid_peers.py measure WEIGHTS.pth IMAGES.npy DIR DIR OUT.npz
        features of the images by each of the three, and pytorch-fid's FID of the two folders
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

if folder := os.environ.get("TWINPATH_CACHE"):
    CACHE = Path(folder)
else:
    CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinpath"
# torchvision is built for one Python.
PEERS = Path(os.environ.get("FID_PEERS") or CACHE / "fid-peers-{}.{}".format(*sys.version_info))
NOT_HERE = 77  # exit code: the peers cannot be imported


def formula_weights(shapes: dict) -> dict:
    """Weights of any shape by integer arithmetic (splitmix64), the same everywhere: uniform, with
    fan-in variance; all of batch norm at work."""
    out = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = int(np.prod(shape))
        z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(number << 32)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        u = (z >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
        u = torch.from_numpy(u).reshape(tuple(shape))
        if name.endswith("num_batches_tracked"):
            out[name] = torch.tensor(0)
        elif name.endswith("conv.weight"):
            out[name] = (u * (24 / np.prod(shape[1:])) ** 0.5).float()
        elif name.endswith(("running_var", "bn.weight")):
            out[name] = (u * 0.5 + 1).float()
        else:
            out[name] = (u * 0.2).float()
    return out


def formula_images() -> torch.Tensor:
    """uint8 (2, 3, 64, 64): waves and a grid."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(64), torch.arange(64), indexing="ij")
    waves = (x * (3 + c) + y * y // 7 + 31 * c) % 256
    grid = ((x // 8 + y // 8 + c) % 2) * 160 + x
    return torch.stack([waves, grid]).to(torch.uint8)


def ask(*args: object) -> str | None:
    """What this script prints for these arguments; None where the peers are not installed, or not
    for this torch."""
    if not (PEERS / "pytorch_fid").is_dir():
        return None
    command = [sys.executable, __file__, *map(str, args)]
    environment = {**os.environ, "FID_PEERS": str(PEERS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, NOT_HERE), done.stderr[-2000:]
    return done.stdout if done.returncode == 0 else None


def peers():
    """pytorch_fid.inception, importable beside any build of torch."""
    register = torch.library.register_fake

    def skip_torchvision(name, *args, **how):
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **how)

    torch.library.register_fake = skip_torchvision
    sys.path.insert(0, str(PEERS))
    import pytorch_fid.inception

    return pytorch_fid.inception


def golden(inception) -> None:
    net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    weights = formula_weights({name: tuple(v.shape) for name, v in net.state_dict().items()})
    inception.load_state_dict_from_url = lambda *args, **how: weights
    net = inception.InceptionV3([3]).eval()
    with torch.no_grad():
        f = net(formula_images().float() / 255)[0][:, :, 0, 0].double()
    print([f[i, ::293].tolist() for i in range(2)], f.sum(1).tolist(), sep="\n")


def measure(inception, weights: str, images: str, first: str, second: str, out: str) -> None:
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = torch.load(weights, weights_only=True)
    inception.load_state_dict_from_url = lambda *args, **how: state
    uint8 = torch.from_numpy(np.load(images))
    resize = build_resizer("clean")
    resized = [resize(image.permute(1, 2, 0).numpy()) for image in uint8]
    clean = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in resized])
    net = inception.InceptionV3([3]).eval()
    bare = inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    fidelity = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=weights)
    with torch.no_grad():
        np.savez(
            out,
            torch=net(uint8.float() / 255)[0][:, :, 0, 0],
            tf=fidelity(uint8)[0],
            clean=bare((clean - 128) / 128)[0][:, :, 0, 0],
            fid=distance(net, first, second),
        )


def distance(net, first: str, second: str) -> float:
    """pytorch-fid's distance of two folders of a few images, in a basis of all their features: a
    distance is the same in any, and the root of a 2048 × 2048 matrix takes a minute."""
    from pytorch_fid.fid_score import calculate_frechet_distance, get_activations

    a = get_activations(sorted(Path(first).iterdir()), net, 8, 2048, "cpu", 0)
    b = get_activations(sorted(Path(second).iterdir()), net, 8, 2048, "cpu", 0)
    basis, _ = np.linalg.qr(np.concatenate([a, b]).astype(np.float64).T)  # (2048, all images)
    a, b = a @ basis, b @ basis
    moments = a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
    return float(calculate_frechet_distance(*moments))


def main(task: str, *args: str) -> None:
    try:
        inception = peers()
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_HERE)
    {"golden": golden, "measure": measure}[task](inception, *args)


if __name__ == "__main__":
    main(*sys.argv[1:])
