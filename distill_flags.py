"""distill.py's flags, before anything is read or written: filled in from the teacher, and refused where they cannot run or change nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import train
from harness.cli import UserError
from model import PRESETS
from diffusion.schedules import TABLES
from distillation.teacher import describe_teacher, like_the_teacher, tap_channels

if TYPE_CHECKING:
    from distill import Config

BOUNDS = {"block_weight": (0, 1e6), "kd_weight": (0, 1e6), "alpha": (-1e6, 1e6), "beta": (-1e6, 1e6), "delta": (-1e6, 1e6), "lam_min": (0, 1e6),
          "lam_max": (0, 1e6), "base_jitter": (0, 499), "reliability": (0, 1), "difficulty_gain": (0, 1e6),
          "start_steps": (2, 1024), "end_steps": (1, 512)}
OWN = ("target", "stratified", "learn_sigma", "aligned", "coupling")   # train.py's, of losses that a teacher's targets replace
READS = ("david", "random", "shuffled")                                # arms that run an assessor
ASSESSED = ("alpha", "beta", "delta", "e_t", "coherence")              # read where an assessor weighs blocks
DRAWN = ("base_jitter", "adaptive_chaos", "reliability", "unreliable", "difficulty_gain", "importance")
BLOCKS = ("block_weight", "kd_weight", "local_heads", "block_weights", "lam_min", "lam_max")


def resolve(cfg: "Config") -> "Config":
    """Fill in what follows from the teacher, and refuse what cannot run, before anything is read or written."""
    unet, teacher, meta = describe_teacher(cfg.teacher, cfg.teacher_objective, cfg.teacher_table)
    check_idle(cfg)
    cfg = like_the_teacher(cfg, meta)
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted {low:g} to {high:g}.")
    if other := [name for name in OWN if getattr(cfg, name) != getattr(type(cfg), name)]:
        raise UserError(f"--{other[0].replace('_', '-')} is train.py's: here the targets come from the teacher.  Leave it out.")
    if cfg.shift == "auto":
        raise UserError("--shift auto is train.py's.  Give a number, and its --shift-dir.")
    if cfg.lam_min > cfg.lam_max:
        raise UserError(f"--lam-min {cfg.lam_min} is above --lam-max {cfg.lam_max}.  Exchange them.")
    n, names = len(tap_channels(unet)), ", ".join(tap_channels(unet))
    for flag, values in (("block-weights", cfg.block_weights), ("lambdas", cfg.lambdas)):
        if values and (len(values) != n or not all(0 <= v < math.inf for v in values)):                     # NaN fails too
            raise UserError(f"--{flag} {','.join(map(str, values))}: wanted {n} numbers from 0, for {names}.")
    if cfg.lambdas and cfg.assessor != "const":
        raise UserError(f"--lambdas are for --assessor const, not {cfg.assessor}.")
    if (cfg.assessor in ("david", "shuffled") or cfg.adaptive_t) and not cfg.assessor_file:
        raise UserError(f"--assessor {cfg.assessor}{' --adaptive-t' * cfg.adaptive_t} needs --assessor-file.  Make one: python distill.py "
                        f"pretrain-assessor --teacher {cfg.teacher}")
    if cfg.assessor_file and not Path(cfg.assessor_file).is_file():
        raise UserError(f"no assessor at {cfg.assessor_file}: wanted a file that pretrain-assessor wrote.")
    if cfg.objective == "v" and teacher.table:
        if cfg.table not in ("", teacher.table):
            raise UserError(f"--table {cfg.table}, but the teacher's schedule is {teacher.table}, and the student's v is on it.  Leave it out.")
        if cfg.zero_snr and not teacher.zero_snr:
            raise UserError("--zero-snr, but the teacher's schedule does not end in pure noise, and the student's v is on it.  Leave it out.")
        cfg = replace(cfg, table=teacher.table, zero_snr=teacher.zero_snr and teacher.table in TABLES)
    if cfg.mode == "progressive":
        if cfg.start_steps % cfg.end_steps or (cfg.start_steps // cfg.end_steps).bit_count() != 1 or cfg.start_steps == cfg.end_steps:
            raise UserError(f"--start-steps {cfg.start_steps} does not become --end-steps {cfg.end_steps} by halving.")
        if cfg.objective != ("v" if teacher.table else "fm"):
            raise UserError(f"--objective {cfg.objective}: a progressive student stays on its teacher's path, {teacher.table or 'the linear one'}.  "
                            f"Use --objective {'v' if teacher.table else 'fm'}.")
        cfg = replace(cfg, block_weight=0.0)
    if cfg.block_weight and not cfg.kd_weight and not cfg.local_heads:
        raise UserError("--kd-weight 0 leaves the blocks no loss without --local-heads.  If that is meant: --block-weight 0.")
    if cfg.model and cfg.init == "" and PRESETS.get(cfg.model):
        raise UserError(f"--model {cfg.model} with the teacher's weights: leave --model out for its architecture, or add --init scratch or FILE.")
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(cfg.data).name)
    arm = cfg.mode if cfg.mode == "progressive" else "vanilla" if not cfg.block_weight else cfg.assessor
    name = cfg.name or f"{stem}-distill-{cfg.objective}-{arm}"
    whole = train.resolve(replace(cfg, name=name, model=cfg.model or "nano", init=cfg.init or "teacher"))   # any preset: ours is the teacher's
    return replace(whole, model=cfg.model, init=cfg.init)


def check_idle(cfg: "Config") -> None:
    """Refuse flags that would change nothing."""
    reads, weighed = cfg.assessor in READS, "--assessor david, random or shuffled"
    idle = {} if reads else dict.fromkeys(ASSESSED, weighed)
    idle |= {"density": "times that --adaptive-t does not draw"} if cfg.adaptive_t else dict.fromkeys(DRAWN, "--adaptive-t")
    idle |= {} if reads or cfg.adaptive_t else {"assessor_file": f"{weighed}, and --adaptive-t"}
    idle |= {} if cfg.block_weight else dict.fromkeys((*BLOCKS[1:], *ASSESSED), "a --block-weight above 0")
    idle |= {} if cfg.density else dict.fromkeys(("t_loc", "t_scale"), "a --density other than uniform, the default here")
    idle |= {"shift_dir": "a --shift other than 1"} if cfg.shift == 1.0 else {}
    idle |= {"block_weights": "weights without --lambdas"} if cfg.lambdas else {}
    if cfg.mode == "progressive":                                               # it has its own times and learns from outputs alone
        idle |= dict.fromkeys((*BLOCKS, *ASSESSED, *DRAWN, "assessor", "assessor_file", "adaptive_t", "x_source", "shift", "density"), "--mode flow")
    else:
        idle |= dict.fromkeys(("start_steps", "end_steps"), "--mode progressive")
    for name, owner in idle.items():
        if getattr(cfg, name) != getattr(type(cfg), name):
            raise UserError(f"--{name.replace('_', '-')} changes nothing here: it is of {owner}.  Leave it out.")
