"""A small valid file of every kind that a command opens, made by the commands themselves where they
make such files."""

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import data.encode
import distill
import eval_fid
import train
from autoencoders import saved, small
from checkpoints import SD, single_file
from ckpt import convert, save_unet
from conftest import randomize
from folders import pictures
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from vae import pixel

QUIET = "--preview-every 0 --eval-every 0 --ema 0.1"
TRAIN = f"--model nano --resolution 32 --batch 8 --save-every 8 --images 24 {QUIET}"
DISTILL = f"--batch 8 --images 8 {QUIET}"
PRETRAIN = "--samples 64 --profile-samples 10 --bins 4 --dim 8 --steps 2 --batch 8"
EVAL = "--features pca --cache features --pairs 10"
DRAW = "--n 4 --steps 1 --method euler"
ENCODE = "--data toyfaces:24 --resolution 32 --out latents"


def call(main, line: str) -> None:
    """A script's main() with a command line."""
    before, sys.argv = sys.argv, ["script.py", *line.split()]
    try:
        main()
    finally:
        sys.argv = before


def make_networks() -> None:
    """Ours, of pixels; guided-diffusion's and Stable Diffusion's, in every container."""
    adm = UNetConfig(
        3, 3, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(0, 1)
    )
    adm = replace(adm, num_heads=2, num_classes=3)
    net = randomize(UNet(adm), 1)
    meta = {"objective": asdict(make_objective("ddpm")), "vae": pixel(1).meta(), "resolution": 16}
    config = {"data": "toyfaces:24", "holdout": 0.1}
    save_unet(Path("ours.safetensors"), net, {**meta, "classes": ["a", "b", "c"], "config": config})
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, "adm.safetensors")
    torch.save(weights, "adm.pt")
    torch.save({"model": weights, "step": 3}, "legacy.pt", _use_new_zipfile_serialization=False)
    sd = randomize(UNet(SD), 2)
    parts = single_file(sd, randomize(UNet(SD), 3))
    save_file(parts, "sd.safetensors")
    torch.save({"state_dict": parts, "global_step": 7, "epoch": 1}, "sd.ckpt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), "script.pt")


def make_pipeline() -> None:
    """A folder as diffusers' pipelines are."""
    pipe = Path("pipe")
    for name in ("unet", "vae", "scheduler"):
        (pipe / name).mkdir(parents=True)
    save_unet(
        Path("plain.safetensors"), UNet(replace(PRESETS["nano"], in_channels=4, out_channels=4)), {}
    )
    (pipe / "unet").rmdir()
    convert(Path("plain.safetensors"), pipe / "unet", "diffusers")
    vae = small("sd")
    saved(pipe / "vae" / "diffusion_pytorch_model.safetensors", vae, "diffusers")
    widths = list(vae.cfg.encoder)
    about = {"_class_name": "AutoencoderKL", "block_out_channels": widths, "scaling_factor": 0.2}
    (pipe / "vae" / "config.json").write_text(json.dumps(about))
    saved(Path("vae.safetensors"), vae)
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 0.001, "beta_end": 0.012}
    schedule |= {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    schedule |= {"num_train_timesteps": 1000, "timestep_spacing": "leading"}
    (pipe / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (pipe / "model_index.json").write_text(
        json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]})
    )


def make_pictures() -> None:
    """Folders of pictures of all formats, with every kind of table of tags, and arrays of them."""
    for name in ("jsonl", "csv", "captions"):
        folder = pictures(Path("pics") / name, 6)
        for number, ending in enumerate(("jpg", "webp", "gif", "bmp", "tiff")):
            image = Image.open(folder / f"{number:04d}.png").convert("RGB")
            image.save(folder / f"{number:04d}x.{ending}")
    names = sorted(path.name for path in Path("pics/csv").iterdir())
    rows = [{"file_name": name, "tags": f"hat, t{i % 3}"} for i, name in enumerate(names)]
    Path("pics/jsonl/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open("pics/csv/metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "tags"])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        (Path("pics/captions") / row["file_name"]).with_suffix(".txt").write_text(row["tags"])
    images = [(Path("pics/csv") / name).read_bytes() for name in names]
    table = pa.table({"image": images, "tags": [row["tags"] for row in rows]})
    pq.write_table(table, "set.parquet", row_group_size=4)
    batch = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez("batch.npz", arr_0=batch)
    np.save("batch.npy", batch)
    Image.fromarray(batch[0]).resize((16, 16)).save("start.png")


def make_runs() -> None:
    """A finished run, one that stopped at 16 of 24 images, their cache, features and cards."""
    call(train.main, f"--data toyfaces:24 --name done {TRAIN}")
    call(train.main, f"--data toyfaces:24 --name half --seed 1 --keep 9 {TRAIN}")
    for path in sorted(Path("runs/half/ckpt/000000000024").iterdir()):
        path.unlink()
    Path("runs/half/ckpt/000000000024").rmdir()
    call(data.encode.main, ENCODE)
    call(
        distill.main, f"pretrain-assessor --teacher runs/done --out assessor.safetensors {PRETRAIN}"
    )
    for name in ("card", "other"):
        call(eval_fid.main, f"--ckpt runs/done {EVAL} {DRAW} --out {name}.json")
    call(
        eval_fid.main,
        f"--fake pics/csv --ref pics/jsonl {EVAL} --out pics.json --save-stats stats.npz",
    )


def make_all() -> None:
    """Everything, in the folder that is current."""
    torch.manual_seed(0)
    make_networks()
    make_pipeline()
    make_pictures()
    make_runs()
