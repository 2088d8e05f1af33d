"""The teacher of a distillation: a frozen network under its own noise schedule, asked what it sees
at a point of the linear path.

    teacher = open_teacher("runs/toyfaces-ddpm-standard")
    x0, eps, features = teacher.ask(x, t)    # its opinion at x on the linear path at t (B,)

The features are those of the last block of each level and of the middle one, from down_0 over mid
to the last up: nine in Stable Diffusion's U-Net. Of a transformer they are those after each quarter
of its depth, depth_0 to depth_3.
A network that is told what to draw by text needs --context FILE: safetensors with "context"
(n, tokens, dim), the encoder's output for n captions, and for SDXL "y" (n, dim). Sample p of a run
gets a caption that depends on (seed, p) alone. With distill.py --text it is told its image's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ckpt.byteunet import ByteUNetConfig
from ckpt.configs import check_resolution
from ckpt.containers import open_weights
from ckpt.hub import data_from_file
from ckpt.layouts import Config, target_of
from ckpt import find_checkpoint, load_unet, open_unet
from ckpt.meaning import objective_from, said_table, same_table
from ckpt.native import ToldBy
from data.dataset import Dataset, first_of, rng, vae_for
from data.prompts import context_form, read_context
from data.tags import one_form
from diffusion.schedules import T, has_rows, norm, shorter, table_time
from harness.cli import UserError, flag
from harness.files import is_ours, read_meta
from harness.typed import check
from mmdit import MMDiTConfig
from model import UNetConfig
from objectives import Net, Objective
from vae import AnyVAE

# v* divides by the signal's share a of the mix; where that is smaller, by this.
A_MIN = 1e-3
LEAVE_IT = "Leave it out."


# ---- its blocks ----------------------------------------------------------------------------------


DEPTHS = 4  # of a transformer that are looked at: after each quarter of its blocks


def taps(cfg: Config) -> dict[str, str]:
    """{"down_0": a name of UNet.block_names, …} in the order of the forward pass; of a
    transformer {"depth_0": …}.

    A level's last block includes its resampling.
    """
    if isinstance(cfg, MMDiTConfig):
        counts = {"blocks": cfg.blocks, "joint_blocks": cfg.joint, "single_blocks": cfg.single}
        names = [f"{kind}.{i}" for kind, n in counts.items() for i in range(n)]
        parts = min(DEPTHS, len(names))
        return {f"depth_{i}": names[(i + 1) * len(names) // parts - 1] for i in range(parts)}
    levels = len(cfg.channel_mult)
    each = cfg.num_res_blocks + 1
    blocks = {}
    for i in range(levels):
        blocks[f"down_{i}"] = f"input_blocks.{min((i + 1) * each, levels * each - 1)}"
    blocks["mid"] = "middle_block"
    for i in range(levels):
        blocks[f"up_{i}"] = f"output_blocks.{(i + 1) * each - 1}"
    return blocks


def tap_channels(cfg: Config) -> dict[str, int]:
    """{"down_0": C, …}: the channels of each tapped block's output."""
    if isinstance(cfg, MMDiTConfig):
        return dict.fromkeys(taps(cfg), cfg.width)
    return dict(zip(taps(cfg), (*cfg.channels, cfg.channels[-1], *reversed(cfg.channels))))


def tapped(net: Callable, blocks: dict[str, str], found: dict[str, Tensor]) -> Net:
    """The net, leaving what its blocks returned in `found` under the taps' names; a learned
    variance is cut off."""

    def run(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        out, features = net(x, t, features=tuple(blocks.values()), **cond)
        found.update({name: features[block] for name, block in blocks.items()})
        return out[:, : x.shape[1]]

    return run


def v_target(x_t: Tensor, eps_hat: Tensor, a: Tensor | float, s: Tensor | float) -> Tensor:
    """v* = a eps - s x0 of a network that says eps_hat at x_t = a x0 + s eps, a² + s² = 1
    (Salimans & Ho 2022).

    With x0 = (x_t - s eps) / a it is (eps - s x_t) / a; where a < 1e-3 the division is by 1e-3.
    a, s broadcast against x_t (B, C, H, W).
    """
    a = a.clamp(min=A_MIN) if isinstance(a, Tensor) else max(a, A_MIN)
    return (eps_hat - s * x_t) / a


# ---- the network ---------------------------------------------------------------------------------


@dataclass
class Teacher:
    """A frozen network and how to ask it."""

    net: nn.Module
    objective: Objective
    meta: dict[str, Any]  # of its file
    path: Path
    texts: dict[str, Tensor]  # "context" (n, M, D), "y" (n, D); {} of one that takes no text
    told_by: dict[str, Any] | None = None  # the encoders of these, as ckpt.native.ToldBy

    @property
    def blocks(self) -> dict[str, str]:
        """taps() of its network."""
        return taps(self.net.cfg)

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        return self.meta["fingerprint"]

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest t of its schedule, as fp32 has them."""
        o = self.objective
        if not has_rows(o.table):
            return o.t_min, o.t_max
        low, high = table_time(o.table, torch.tensor([0, T - 1]), o.zero_snr).float().tolist()
        return low, high

    def within(self, t: Tensor) -> Tensor:
        """Times (B,), and beyond its schedule the end of that."""
        return t.clamp(*self.limits)

    def row(self, t: Tensor) -> Tensor:
        """Linear-path times (B,) -> the number in [0, 1000] its network is fed, float64: bins are
        counted on this scale."""
        return self.objective.row(t)

    def time(self, rows: Tensor) -> Tensor:
        """The inverse, for whole rows (B,); fp32.

        Without a table a row stands for the middle of its thousandth.
        """
        o = self.objective
        if has_rows(o.table):
            return table_time(o.table, rows, o.zero_snr).float()
        if o.table:
            return table_time(o.table, rows + 0.5).float()
        return ((rows.double() + 0.5) / T).float()

    def check_latents(self, vae: AnyVAE, resolution: int) -> None:
        """The student sees what the teacher knows: same latents, same size."""
        channels = self.net.cfg.in_channels
        if vae.channels != channels:
            raise UserError(
                f"--vae {vae.name} makes {vae.channels} channels, but the teacher {self.path} "
                f"takes {channels}",
                do="Name the autoencoder it was trained with.",
            )
        side = vae.latent_shape(resolution)[1]
        factor = self.net.cfg.multiple
        if side % factor:
            raise UserError(
                f"--resolution {resolution} gives {side}×{side} latents, which the teacher cannot "
                f"divide by {factor}",
                do=f"Use a multiple of {vae.factor * factor}.",
            )
        check_resolution(self.net.cfg, vae.factor, resolution)

    def check_classes(self, classes: list[str]) -> None:
        """Its labels are the student's: as many, and where its file names them, in their order."""
        count, names = self.net.cfg.num_classes, self.meta.get("classes", classes)
        if len(classes) != count:
            raise UserError(
                f"--classes has {len(classes)}, but the teacher knows {count}",
                do="Leave it out, if the teacher's file names them.",
            )
        if [one_form(name) for name in classes] != [one_form(str(name)) for name in names]:
            raise UserError(
                f"--classes are {first_of(classes, 20)}, but the teacher's are "
                f"{first_of([str(name) for name in names], 20)}",
                do="Leave it out, or give them in the teacher's order.",
            )

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor, source: str = "data") -> Tensor:
        """The linear path's point at t (B,).

        source "noise" is the published system's: unit noise, in the network's own units, at
        every t.
        """
        w = t.view(-1, 1, 1, 1)
        if source == "noise":
            return eps * norm(w) if self.objective.table else eps
        return (1 - w) * x0 + w * eps

    def text(self, seed: int, positions: Tensor | None, n: int) -> dict[str, Tensor]:
        """Captions for the samples at `positions` of a run, or n times the first."""
        if not self.texts:
            return {}
        count = len(self.texts["context"])
        rows = [0] * n
        if positions is not None:
            rows = [int(rng(seed, "text", int(p)).integers(count)) for p in positions]
        return {key: bank[rows] for key, bank in self.texts.items()}

    @torch.no_grad()
    def ask(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(x0, eps, features) at x (B, C, H, W) on the linear path at t (B,), by one pass through
        the network."""
        features: dict[str, Tensor] = {}
        net = tapped(self.net, self.blocks, features)
        if self.objective.target != "eps":
            x0, eps, _ = self.objective.predict(net, x, t, **cond)
            return x0, eps, features
        # In VP's coordinates, where v_target guards the division.
        w = t.view(-1, 1, 1, 1)
        a, s, x_vp = (1 - w) / norm(w), w / norm(w), x / norm(w)
        v = v_target(x_vp, self.objective.call(net, x, t, **cond), a, s)
        return a * x_vp - s * v, s * x_vp + a * v, features


# ---- what a teacher's file says, and what it does not --------------------------------------------


@dataclass(frozen=True)
class TeacherFlags:
    """Which network is the teacher, and what its file does not say."""

    teacher: str = flag(
        "", "a run, a file, a diffusers folder, hf:org/name[/file]", head="the teacher"
    )
    teacher_objective: Literal["", "eps", "v", "x0", "fm"] = flag("", "of a file that does not say")
    teacher_table: Literal["", "linear", "cosine", "scaled_linear"] = flag(
        "", "of a file that does not say; LDM's yaml calls scaled_linear linear"
    )
    teacher_betas: str = flag("", "… or START,END,SCHEDULE: any betas")
    teacher_zero_snr: bool = flag(False, "of a file that does not say: its schedule ends in noise")
    context: str = flag("", "text embeddings, for a teacher that takes text (teacher.py)")

    @property
    def says(self) -> dict[str, Any]:
        """What the flags say of the teacher, as arguments of open_teacher()."""
        pure = self.teacher_zero_snr
        table = said_table(self.teacher_table, self.teacher_betas, pure, "teacher_betas")
        return {"objective": self.teacher_objective, "table": table, "zero_snr": pure}


def describe_teacher(
    name: str, objective: str = "", table: str = "", zero_snr: bool = False, text: str = ""
) -> tuple[Config, Objective, dict[str, Any]]:
    """A teacher's config, objective and metadata, without reading its weights. text: distill.py's
    --text, of which a network that reads bytes can be taught."""
    if not name:
        raise UserError(
            "--teacher is required",
            do="Name a run, a file, a diffusers folder or hf:org/name[/file].",
        )
    source = open_unet(name)
    cfg, meta = source.cfg, source.meta
    if not isinstance(cfg, Config):
        raise UserError(
            f"{name} holds no U-Net or transformer of ckpt/, and a teacher is one",
            do="Choose another.",
        )
    if isinstance(cfg, ByteUNetConfig) and text != "bytes":
        raise UserError(
            f"{name} reads texts by an encoder of its own",
            do="Distil it with distill.py --text bytes, on pictures that have captions or tags.",
        )
    if getattr(cfg, "guidance", False):
        raise UserError(
            f"{name} is told how strongly to guide, which no student here is", do="Choose another."
        )
    recorded = meta.get("objective")
    if isinstance(recorded, dict) and recorded.get("coupling") == "lowres":
        raise UserError(
            f"{name} was trained to enlarge pictures (cfm): its path does not begin in noise, "
            "so it is no teacher here",
            do="Choose another.",
        )
    if cfg.out_channels not in (cfg.in_channels, 2 * cfg.in_channels):
        raise UserError(
            f"{name} takes {cfg.in_channels} channels and gives {cfg.out_channels}",
            wanted="as many, or twice (a learned variance)",
            do="Choose another.",
        )
    return cfg, teacher_objective(meta, name, objective, table, zero_snr), meta


def teacher_objective(
    meta: dict[str, Any], path: str, objective: str = "", table: str = "", zero_snr: bool = False
) -> Objective:
    """What a file's network says and on which schedule: from the file, or from the flags where the
    file is silent."""
    if isinstance(meta.get("objective"), dict):
        own = Objective(**meta["objective"])
        target = "fm" if own.target == "u" else own.target
        other = table and not same_table(own.table, table)
        if objective not in ("", target) or other or (zero_snr and not own.zero_snr):
            pure = "with zero SNR" if own.zero_snr else "without zero SNR"
            raise UserError(
                f"--teacher-objective {objective or 'not given'}, "
                f"--teacher-table {shorter(table) or 'not given'}, --teacher-zero-snr "
                f"{'on' if zero_snr else 'not given'}, but {path} says it is {own.target} on "
                f"{shorter(own.table) or 'the linear path'} {pure}",
                do="Leave them out.",
            )
        return own
    target = target_of(meta) or objective
    if not target:
        raise UserError(
            f"{path} does not say what its network was trained to output",
            do="Add --teacher-objective eps, v, x0 or fm (Stable Diffusion 1: eps).",
        )
    if objective not in ("", target):
        raise UserError(f"--teacher-objective {objective}, but {path} says {target}", do=LEAVE_IT)
    silent = not table and "table" not in meta.get("schedule", {})
    if silent and target in ("eps", "v", "x0"):
        raise UserError(
            f"{path} was trained to output {target}, and that needs its noise schedule",
            do="Add --teacher-table linear, cosine or scaled_linear (Stable Diffusion), or "
            "--teacher-betas START,END,SCHEDULE.",
        )
    return objective_from({**meta, "objective": target}, path, table, zero_snr)


def like_the_teacher(cfg: Any, meta: dict[str, Any]) -> Any:
    """A config with data, resolution and classes filled in from the teacher's file, where they are
    not given.

    With the data come its stage, the tags that excludes, and the share of held-out images.
    """
    trained = meta.get("config", {})
    resolution = meta.get("resolution", 0)
    if cfg.resolution and resolution and cfg.resolution != resolution:
        raise UserError(
            f"--resolution {cfg.resolution}, but the teacher was trained at {resolution}",
            do=LEAVE_IT,
        )
    cfg = replace(
        stage_like(cfg, {} if cfg.data else trained),
        data=cfg.data or data_from_file(trained.get("data", ""), "--data"),
        resolution=cfg.resolution or resolution,
        classes=cfg.classes or tuple(meta.get("classes", ())),
    )
    if not cfg.data:
        raise UserError(
            "--data is required: the teacher's file does not say on what it was trained",
            do="Name what it was trained on.",
        )
    if not cfg.resolution:
        raise UserError(
            "--resolution is required: the teacher's file does not say on what it was trained",
            do="Give the size of its images in pixels.",
        )
    # pca is fitted anew to every data set, so it does not count.
    if "vae" not in meta and cfg.vae in ("", "pca"):
        raise UserError(
            "--vae is required: the teacher's file does not say which latents it knows",
            do="Name the autoencoder: pixel, pixel:N, sd … or FILE.",
        )
    return cfg


def stage_like(cfg: Any, trained: dict[str, Any]) -> Any:
    """A config with the stage, its excluded tags and the held-out share that a network was trained
    with; {} = of other data, where they say nothing."""
    stage = trained.get("stage", "standard")
    if not cfg.stage and stage != "standard":
        cfg = replace(cfg, exclude_tags=cfg.exclude_tags or tuple(trained.get("exclude_tags", ())))
    holdout = trained.get("holdout", 0.02) if cfg.holdout is None else cfg.holdout
    return replace(cfg, stage=cfg.stage or stage, holdout=holdout)


# ---- opening -------------------------------------------------------------------------------------


def open_teacher(
    name: str,
    context: str = "",
    device: torch.device = torch.device("cpu"),
    text: str = "",
    **says: Any,
) -> Teacher:
    """A frozen teacher on a device. text: distill.py's --text, which tells each image's own
    caption instead of --context. says: as TeacherFlags.says."""
    cfg, described, _ = describe_teacher(name, text=text, **says)
    path = find_checkpoint(name)
    net, meta = load_unet(path, dtype=torch.float32)
    texts = {k: v.to(device) for k, v in read_texts(cfg, context, text).items()}
    net = net.to(device).eval().requires_grad_(False)
    encoders = (meta.get("init") or {}).get("text") if text else told_by(context)
    return Teacher(net, described, meta, path, texts, encoders)


def teacher_vae(cfg: Any, meta: dict[str, Any], ds: Dataset) -> AnyVAE:
    """The autoencoder whose latents the teacher knows. --vae names it where the teacher's file does
    not, or says where it lies now."""
    return vae_for(ds, cfg.vae, meta=meta, network="the teacher")


def read_texts(cfg: Config, file: str, text: str = "") -> dict[str, Tensor]:
    """The text embeddings a network of this config is fed: {"context": (n, M, D)} and, if it takes
    vectors, "y" (n, D). None where --text (text) tells it what each picture shows."""
    if text and file:
        raise UserError(
            f"--context {file} and --text {text} both say what to draw", do="Leave one out."
        )
    if text:
        return {}
    if not cfg.context_dim:
        if file:
            raise UserError(f"--context {file}, but the teacher takes no text", do=LEAVE_IT)
        return {}
    if not file:
        raise UserError(
            "the teacher is told what to draw by text",
            do=f"Add --context FILE: safetensors with {context_form(cfg)}, the text encoder's "
            "output for n captions.  "
            "(distill.py --text clip-l:FILE tells what each picture shows.)",
        )
    return read_context(file, cfg)


def told_by(file: str) -> dict[str, Any] | None:
    """The text encoders whose embeddings a file holds, if text.py encode wrote it and says so."""
    box = open_weights(file) if file else None
    if box is None or not is_ours(box):
        return None
    meta = read_meta(box)
    names = {"encoders": "encoders", "source": "source", "chunks": "chunks", "skip": "clip skip"}
    found = {name: meta[key] for name, key in names.items() if key in meta}
    return check(found, ToldBy, file) if "encoders" in found else None


def add_caption(net: nn.Module, teacher: Teacher) -> None:
    """Where nobody says a caption, as in previews, the network gets the first one."""

    def first(net: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, teacher.text(0, None, len(args[0])) | kwargs

    net.register_forward_pre_hook(first, with_kwargs=True)


# ---- its student ---------------------------------------------------------------------------------


def student_config(teacher: Config, preset: Config | None) -> Config:
    """The student's network: the teacher's without a learned variance, or a preset with its inputs
    and classes."""
    if preset is None:
        return replace(teacher, out_channels=teacher.in_channels)
    same = {"in_channels": teacher.in_channels, "num_classes": teacher.num_classes}
    if isinstance(teacher, MMDiTConfig):
        same["pos_max"] = teacher.pos_max
    return replace(preset, out_channels=teacher.in_channels, **same)


def without_variance(net: nn.Module, channels: int) -> dict[str, Tensor]:
    """A network's weights, with the first `channels` of its outputs: a learned variance comes
    after them."""
    weights, cfg = net.state_dict(), net.cfg
    for name, rows in weights.items():
        if name.startswith("out.2."):
            weights[name] = rows[:channels]
        if not name.startswith("final_layer.linear."):
            continue
        order = (cfg.patch**2, cfg.out_channels)  # of a token's rows
        if cfg.tokens == "pqc":
            weights[name] = rows.unflatten(0, order)[:, :channels].flatten(0, 1)
        else:
            weights[name] = rows.unflatten(0, order[::-1])[:channels].flatten(0, 1)
    return weights
