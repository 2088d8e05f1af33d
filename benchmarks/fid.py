"""eval_fid.py against its peers:
    FID_PEERS=FOLDER python benchmarks/fid.py [parity|damage|speed|memory …] [--n 500]

parity: features and FID on real art (robohash), in each tradition of preprocessing, against
        pytorch-fid, torch-fidelity and clean-fid
damage: FID and KID of the same art under blur, JPEG and noise
speed:  features and Fréchet distances, alternating rounds
memory: what statistics of N images need beyond the process itself
Wants the Inception weights (python -m metrics.inception --fetch) and, for parity and speed, the
peers (tests/fid_peers.py says how to install them aside).
"""

import statistics
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image, ImageFilter

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fid_peers
from data.sources import open_source
from harness import record
from harness.cli import UserError, cli
from metrics.distances import Statistics, frechet, frechet_from_features, kernel_distance
from metrics.inception import FIDInception, load_inception

ROUNDS = 3
SOURCE = """
import sys, resource; sys.path.insert(0, sys.argv[1])
import torch
from metrics.distances import gather
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
chunk = torch.rand(256, 2048)
gather(iter([chunk] * 8)); before = peak()
gather(chunk for _ in range(int(sys.argv[2]) // 256))
print(peak() - before)
"""


def art(n: int) -> torch.Tensor:
    """uint8 (n, 3, 64, 64)."""
    source = open_source(f"robohash:{n}", 64)
    pixels = np.stack([source.pixel(i) for i in range(n)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def features(net: Any, images: torch.Tensor, batch: int = 25) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([net(part) for part in images.split(batch)]).double()


def theirs(weights: dict[str, torch.Tensor]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The peers as functions of uint8 images, with our weights, by the tradition they stand for."""
    if not (fid_peers.PEERS / "pytorch_fid").is_dir():
        raise UserError(
            f"the peers are not in {fid_peers.PEERS}.",
            do="tests/fid_peers.py says how to install them; name the folder in $FID_PEERS.",
        )
    inception = fid_peers.peers()
    inception.load_state_dict_from_url = lambda *a, **k: weights
    from cleanfid.resize import build_resizer
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    resize = build_resizer("clean")
    plain = inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    fidelity.load_state_dict_from_url = lambda *a, **k: weights
    extractor = fidelity.FeatureExtractorInceptionV3("x", ["2048"])
    pytorch_fid = inception.InceptionV3([3]).eval()

    def clean(images: torch.Tensor) -> torch.Tensor:
        pictures = [resize(image.permute(1, 2, 0).numpy()) for image in images]
        x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pictures])
        return plain((x - 128) / 128)[0][:, :, 0, 0]

    return {
        "torch": lambda images: pytorch_fid(images.float() / 255)[0][:, :, 0, 0],
        "tf": lambda images: extractor(images)[0],
        "clean": clean,
    }


def parity(n: int) -> dict[str, Any]:
    import pytorch_fid.fid_score as fid_score

    weights, images, out = load_inception().state_dict(), art(n), {}
    for preproc, peer in theirs(weights).items():
        net = FIDInception(preproc)
        net.load_state_dict(weights)
        f, g = features(net, images), features(peer, images)
        halves = [[v[: n // 2], v[n // 2 :]] for v in (f, g)]
        moments = [(v.numpy().mean(0), np.cov(v.numpy().T)) for v in halves[1]]
        ours = frechet_from_features(*halves[0])
        their = float(fid_score.calculate_frechet_distance(*moments[0], *moments[1]))
        out[preproc] = {
            "largest difference of features": float((f - g).abs().max()),
            "FID": ours,
            "FID of the peer": their,
            "difference": abs(ours - their),
        }
        print(preproc, out[preproc], flush=True)
    return out


def damaged(image: torch.Tensor, how: str, amount: float) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if how == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(amount))
    elif how == "jpeg":
        picture.save(box := BytesIO(), "JPEG", quality=int(amount))
        picture = Image.open(box)
    else:
        noise = np.random.default_rng(int(image.sum())).normal(0, amount, (*picture.size, 3))
        array = np.asarray(picture, np.float64) + noise
        picture = Image.fromarray(array.clip(0, 255).round().astype(np.uint8))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def damage(n: int) -> dict[str, Any]:
    """Half of the art against the other half, which is worse and worse."""
    images, net, out = art(n), load_inception(), {}
    real = features(net, images[: n // 2])
    ways = {"blur": (0, 0.5, 1, 2), "jpeg": (100, 80, 40, 10), "noise": (0, 5, 15, 40)}
    for how, amounts in ways.items():
        rows = []
        for amount in amounts:
            worse = torch.stack([damaged(image, how, amount) for image in images[n // 2 :]])
            f = features(net, worse)
            kid = kernel_distance(real, f)
            row = {"amount": amount, "FID": frechet_from_features(real, f)}
            rows.append({**row, "KID": kid.value, "KID error": kid.error})
        grows = {
            key: all(a[key] < b[key] for a, b in zip(rows, rows[1:])) for key in ("FID", "KID")
        }
        out[how] = {"rows": rows, "grows": grows}
        print(how, rows, grows, flush=True)
    return out


def seconds(sides: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, in alternating rounds after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def speed(n: int) -> dict[str, Any]:
    net, images = load_inception(), art(32)
    peers = theirs(net.state_dict())
    import pytorch_fid.fid_score as fid_score

    t = seconds(
        {
            "ours": lambda: features(net, images, 16),
            "pytorch-fid": lambda: features(peers["torch"], images, 16),
            "torch-fidelity": lambda: features(peers["tf"], images, 16),
        }
    )
    out: dict[str, Any] = {
        "features/s": {k: len(images) / v for k, v in t.items()},
        "times faster": {k: t[k] / t["ours"] for k in t if k != "ours"},
    }
    g = torch.Generator().manual_seed(0)
    # features of real networks fall off so, roughly
    spectrum = torch.exp(-torch.arange(2048) / 300)
    for N, what in ((5_000, "Fréchet, d = 2048, N = 5000"), (500, "Fréchet, d = 2048, N = 500")):
        x, y = (
            (torch.randn(N, 2048, generator=g, dtype=torch.float64) + shift) * spectrum
            for shift in (0, 0.05)
        )
        a, b = Statistics.of(x), Statistics.of(y)
        moments = [v.numpy() for s in (a, b) for v in (s.mean, s.sigma)]

        def ours() -> float:
            if N < 2048:
                return frechet(x, y)
            a._root = b._root = None  # kept for the next set otherwise
            return frechet(a, b)

        def scipys() -> float:
            return float(fid_score.calculate_frechet_distance(*moments))

        t = seconds({"ours": ours, "scipy's sqrtm": scipys}, 1)
        out[what] = {
            "seconds": t,
            "times faster": t["scipy's sqrtm"] / t["ours"],
            "difference": abs(ours() - scipys()),
        }
    print(out, flush=True)
    return out


def memory(n: int) -> dict[str, Any]:
    """Peak beyond what statistics of the first chunks needed."""
    out = {}
    for N in (5_120, 51_200):
        done = subprocess.run(
            [sys.executable, "-c", SOURCE, str(ROOT), str(N)],
            capture_output=True,
            text=True,
            check=True,
        )
        out[f"{N} images"] = {"extra bytes": int(done.stdout)}
    print(out, flush=True)
    return out


PARTS = {"parity": parity, "damage": damage, "speed": speed, "memory": memory}


def main() -> None:
    words = sys.argv[1:]
    n = int(words.pop(words.index("--n") + 1)) if "--n" in words[:-1] else 500
    chosen = [w for w in words if w != "--n"] or list(PARTS)
    if unknown := [w for w in chosen if w not in PARTS]:
        raise UserError(f"{unknown[0]!r} is not a part", wanted=", ".join(PARTS), do="Name these.")
    if "parity" in chosen:
        theirs(load_inception().state_dict())  # their absence is better known now
    for name in chosen:
        record.write(f"fid-{name}", {"n": n, name: PARTS[name](n)})


if __name__ == "__main__":
    cli(main)
