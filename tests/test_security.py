"""Hostile files of every kind, opened by every reader: no socket, no process, nothing written.

This file is also the process that opens them: python tests/test_security.py FOLDER
"""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from ckpt import save_unet
from data.cache import sealed
from model import PRESETS, UNet

# What a reader must not do. An open() is judged by its mode.
FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
FORBIDDEN += ("os.system", "os.startfile", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
FORBIDDEN += ("os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.")
FORBIDDEN += ("urllib.", "http.", "ftplib.", "pty.", "webbrowser.", "sqlite3.connect", "tempfile.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SPARE = {os.devnull}


# ---- the files ----------------------------------------------------------------------------------


class Runs:
    """What a pickle of this object does when it is loaded without care."""

    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def safetensors(meta, header=None, tensors=b"", length=None):
    """Bytes of a safetensors file with metadata of ours."""
    text = json.dumps(meta)
    notes = {"twinpath": text, "twinpath_sha256": hashlib.sha256(text.encode()).hexdigest()}
    head = json.dumps({"__metadata__": notes, **(header or {})}).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + tensors


def zipped(names, level=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", level) as box:
        for name, data in names.items():
            box.writestr(name, data)
    return file.getvalue()


def npy(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def bomb_of(call):
    return pickle.dumps(Runs(*call), protocol=2)


def weights(folder):
    """Hostile weight files: name -> bytes."""
    mark = str(folder / "OWNED")
    calls = {
        "system": (os.system, f"touch {mark}"),
        "popen": (subprocess.Popen, ["touch", mark]),
        "open": (open, mark, "w"),
        "eval": (eval, f"open({mark!r}, 'w')"),
        "torch-save": (torch.save, [1], mark),
        "load": (torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
    }
    files = {}
    for name, call in calls.items():
        files[f"{name}.pkl"] = bomb_of(call)
        parts = {"x/data.pkl": bomb_of(call), "x/version": b"3\n", "x/byteorder": b"little"}
        files[f"{name}.pt"] = zipped(parts)
        script = {**parts, "x/code/__torch__.py": b"class Evil(Module):\n  pass\n"}
        files[f"{name}-script.safetensors"] = zipped({**script, "x/constants.pkl": bomb_of(call)})
        files[f"{name}.npy"] = bomb_of(call)
        files[f"{name}.npz"] = zipped({"arr_0.npy": npy(np.array([Runs(*call)], object))})
        files[f"{name}-mu.npz"] = zipped(
            {f"{key}.npy": npy(np.array([Runs(*call)], object)) for key in ("mu", "sigma")}
        )
    one = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    linear = {"kind": "vae", "name": "pca", "factor": 8}
    hub = {"family": "sdxl", "name": "sdxl", "latents": "", "fingerprint": "x"}
    for name, source in {
        "hub": "hf:evil-org/tracker/file.safetensors",
        "family": "sdxl",
        "family-hub": "sdxl:hf:evil-org/tracker/f.safetensors",
        "up": "../../../../etc/passwd",
        "null": "/dev/null",
    }.items():
        note = {**hub, "source": source, "normalisation": {}}
        files[f"note-{name}.safetensors"] = safetensors({"kind": "vae", **note}, one, b"1234")
        run = {"vae": note, "run": f"../../{name}", "config": {"data": source}}
        file = folder / "net.safetensors"
        save_unet(file, UNet(PRESETS["nano"]), run)
        files[f"net-{name}.safetensors"] = file.read_bytes()
        file.unlink()
    files |= {
        "long.safetensors": safetensors(linear, one, b"1234", 2**62),
        "short.safetensors": safetensors(linear, one),
        "code.yaml": b'!!python/object/apply:os.system ["touch OWNED"]\n',
        "page.safetensors": b"<html><script>1</script>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "card.json": json.dumps({"kind": "metric card", "metrics": {"FID": "__import__"}}).encode(),
        "empty.pt": b"",
        "bomb.npz": zipped({"arr_0.npy": npy(np.zeros((64, 512, 512, 3), np.uint8))[:200]}),
    }
    for name, shard in {"up": "../OWNED", "root": "/etc/passwd", "dots": ".."}.items():
        index = {"weight_map": {"a": shard}}
        files[f"{name}.safetensors.index.json"] = json.dumps(index).encode()
    return files


def folders(folder):
    """Hostile folders: runs, data and caches; name/file -> bytes."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    png = file.getvalue()
    huge = png[:16] + struct.pack(">II", 2**30, 2**30) + png[24:]
    rows = [{"file_name": name, "tags": "t"} for name in ("../x.png", "/etc/passwd", "a.png")]
    plan = {"version": 2, "data": "hf:evil-org/tracker", "resolution": 8, "vae": "x", "shard": 1}
    manifest = {"plan": plan, "shards": [{"file": "../../OWNED", "images": 1, "bytes": 1}]}
    return {
        "table/a.png": png,
        "table/metadata.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "huge/a.png": huge,
        "script/a.png": b"<svg xmlns='http://x/2000/svg'><image href='http://127.0.0.1:9/'/>",
        "postscript/a.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(OWNED) (w) file\n",
        "parquet/a.parquet": b"PAR1" + b"\0" * 64 + b"PAR1",
        "cache/plan.json": sealed(plan).encode(),
        "cache/manifest.json": sealed(manifest).encode(),
        "run/config.json": json.dumps({"data": "hf:evil-org/tracker", "name": "../x"}).encode(),
        "run/log.jsonl": b'{"event": "train", "images": "__import__(1)"}\n',
        "run/vae.safetensors": weights(folder)["note-hub.safetensors"],
        "run/ckpt/000000000008/model.safetensors": weights(folder)["net-hub.safetensors"],
        "repository/.git/config": b"[core]\n\tfsmonitor = touch OWNED\n",
        "repository/.git/HEAD": b"ref: ../../../etc/passwd\n",
        "pipe/model_index.json": b'{"unet": ["os", "system"], "_class_name": "x"}',
        "pipe/unet/config.json": b'{"_class_name": "os.system", "_name_or_path": "hf:evil/x"}',
        "pipe/unet/diffusion_pytorch_model.bin": weights(folder)["system.pkl"],
        "pipe/vae/config.json": b'{"_class_name": "AutoencoderKL"}',
        "pipe/vae/diffusion_pytorch_model.safetensors": weights(folder)["popen.pt"],
    }


# ---- the process that opens them ----------------------------------------------------------------


def readers():
    """Everything that opens something of a stranger's."""
    from ckpt import load_unet
    from ckpt.convert import inspect
    from ckpt.hub import data_from_file
    from data.cache import open_cache
    from data.dataset import open_dataset
    from distillation.assessor import load_assessor
    from distillation.teacher import describe_teacher
    from eval_fid import default_ref
    from harness.plot import read_runs
    from harness.run import commit_of, read_config
    from metrics.cards import read_card
    from metrics.distances import load_statistics
    from metrics.features import open_images
    from metrics.inception import FIDInception, read_weights
    from vae import choose, load_vae

    def net(path):
        meta = load_unet(path)[1]
        choose(meta=meta)

    def data_of_run(path):
        config = read_config(path)
        open_images(data_from_file(default_ref(config, str(path)), "--ref"), 8)

    def network(path):
        return read_weights(path, path.read_bytes(), inception)

    def images(path):
        return open_images(str(path), 8)[0]

    inception = FIDInception()
    strings = [inspect, describe_teacher, lambda p: open_dataset(p, resolution=8)[0]]
    strings += [lambda p: open_cache(p, 8), lambda p: read_runs([p])]
    paths = [net, load_vae, load_assessor, load_statistics, read_card, network, data_of_run]
    paths += [commit_of, images]
    return [lambda p, f=f: f(str(p)) for f in strings] + paths


def open_all(folder):
    """Let every reader open everything, and print what it did that it must not."""
    from harness.cli import is_for_user

    calls, watching, seen, strange = readers(), [], [], []

    def hook(event, words):
        if not watching:
            return
        bad = event.startswith(FORBIDDEN)
        if event == "open" and str(words[0]) not in SPARE:
            mode, flags = words[1] or "", words[2] or 0
            bad = any(letter in mode for letter in "wax+") or bool(flags & WRITES)
        if bad:
            seen.append(f"{watching[-1]}: {event} {words!r}"[:200])

    sys.addaudithook(hook)
    places = [p for p in sorted(folder.rglob("*")) if p.is_file() or p.parent == folder]
    for place in places:
        for number, call in enumerate(calls):
            watching.append(f"{place.relative_to(folder)} by reader {number}")
            try:
                call(place)
            except Exception as error:
                if not is_for_user(error):
                    strange.append(f"{watching[-1]}: {error!r}")
            watching.clear()
    print(json.dumps({"opened": len(places), "seen": seen, "strange": strange}))


def contents(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_opening_hostile_files_reaches_nothing_runs_nothing_and_writes_nothing(tmp_path):
    folder, home = tmp_path / "hostile", tmp_path / "home"
    home.mkdir()  # for what other packages keep when they are imported
    for name, data in {**weights(tmp_path), **folders(tmp_path)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    before = contents(folder)
    command = [sys.executable, "-B", __file__, str(folder)]
    env = {**os.environ, "HF_HOME": str(home / "hub"), "HOME": str(home)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == [] and found["strange"] == [] and found["opened"] >= 50
    assert contents(folder) == before and {p.name for p in tmp_path.iterdir()} == {
        "home",
        "hostile",
    }


@pytest.mark.parametrize("name", ["system.pkl", "open.pkl", "eval.npy"])
def test_the_hostile_files_are_hostile(tmp_path, name):
    """Read without care, they do what they are made for."""
    (tmp_path / name).write_bytes(weights(tmp_path)[name])
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True)
    assert (tmp_path / "OWNED").exists()


if __name__ == "__main__":
    open_all(Path(sys.argv[1]))
