"""pytorch-fid, torch-fidelity and clean-fid as oracles, each in a process of its own: torchvision beside a CPU build of torch breaks
what else looks for it.

    pip install --no-deps --target FOLDER torchvision==0.28.0 pytorch-fid==0.3.0 torch-fidelity==0.4.0 clean-fid==0.1.35
    FID_PEERS=FOLDER python tests/fid_peers.py golden          # the numbers in test_fid.py: pytorch-fid's network with formula_weights
    FID_PEERS=FOLDER python tests/fid_peers.py features WEIGHTS.pth IMAGES.npy OUT.npz
    FID_PEERS=FOLDER python tests/fid_peers.py fid WEIGHTS.pth DIR DIR
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

CACHE = Path(os.environ.get("TWINPATH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinpath")
PEERS = Path(os.environ.get("FID_PEERS") or CACHE / "fid-peers-{}.{}".format(*sys.version_info))   # torchvision is built for one Python
NOT_HERE = 77                                # exit code: the peers cannot be imported


def formula_weights(shapes: dict) -> dict:
    """Weights of any shape by integer arithmetic (splitmix64), the same everywhere: uniform, with fan-in variance; all of batch norm at work."""
    out = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = int(np.prod(shape))
        z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number << 32)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        u = torch.from_numpy((z >> np.uint64(40)).astype(np.float64) / 2 ** 24 - 0.5).reshape(tuple(shape))
        scale = {"conv.weight": (24 / np.prod(shape[1:])) ** 0.5, "running_var": 0.5, "bn.weight": 0.5}.get(
            next((k for k in ("conv.weight", "running_var", "bn.weight") if name.endswith(k)), ""), 0.2)
        out[name] = torch.tensor(0) if name.endswith("num_batches_tracked") else (u * scale + (name.endswith(("running_var", "bn.weight")))).float()
    return out


def formula_images() -> torch.Tensor:
    """uint8 (2, 3, 64, 64): waves and a grid."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(64), torch.arange(64), indexing="ij")
    return torch.stack([(x * (3 + c) + y * y // 7 + 31 * c) % 256, ((x // 8 + y // 8 + c) % 2) * 160 + x]).to(torch.uint8)


def ask(*args: object) -> str | None:
    """What this script prints for these arguments; None where the peers are not installed, or not for this torch."""
    if not (PEERS / "pytorch_fid").is_dir():
        return None
    done = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True, env={**os.environ, "FID_PEERS": str(PEERS)})
    assert done.returncode in (0, NOT_HERE), done.stderr[-2000:]
    return done.stdout if done.returncode == 0 else None


def peers():
    """pytorch_fid.inception, importable beside any build of torch."""
    register = torch.library.register_fake
    torch.library.register_fake = lambda name, *a, **k: (lambda f: f) if str(name).startswith("torchvision::") else register(name, *a, **k)
    sys.path.insert(0, str(PEERS))
    import pytorch_fid.inception
    return pytorch_fid.inception


def main(task: str, *args: str) -> None:
    try:
        inception = peers()
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_HERE)
    if task == "golden":
        inception.load_state_dict_from_url = lambda *a, **k: formula_weights({k: tuple(v.shape) for k, v in inception._inception_v3(
            num_classes=1008, aux_logits=False, weights=None).state_dict().items()})
        with torch.no_grad():
            f = inception.InceptionV3([3]).eval()(formula_images().float() / 255)[0][:, :, 0, 0].double()
        print([f[i, ::293].tolist() for i in range(2)], f.sum(1).tolist(), sep="\n")
        return
    inception.load_state_dict_from_url = lambda *a, **k: torch.load(args[0], weights_only=True)
    if task == "fid":
        import pytorch_fid.fid_score
        print(repr(float(pytorch_fid.fid_score.calculate_fid_given_paths(list(args[1:]), 8, "cpu", 2048, 0))))
        return
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    images = torch.from_numpy(np.load(args[1]))
    resize = build_resizer("clean")
    clean = torch.stack([torch.from_numpy(resize(image.permute(1, 2, 0).numpy())).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        np.savez(args[2], torch=inception.InceptionV3([3]).eval()(images.float() / 255)[0][:, :, 0, 0],
                 tf=FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=args[0])(images)[0],
                 clean=inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()((clean - 128) / 128)[0][:, :, 0, 0])


if __name__ == "__main__":
    main(*sys.argv[1:])
