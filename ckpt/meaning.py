"""What a file of another program says of its objective and noise schedule, and where it says so.

    said = meaning_of(box)     # Meaning("v", "scaled_linear", True, where={…})
    o = objective_from(meta, path, "linear")   # by metadata and, where that is silent, the user

Read are: the empty tensors v_pred and ztsnr (NoobAI and its kin); the header's
modelspec.prediction_type and predict_key, a modelspec.architecture that ends in -v, and kohya's
ss_v_parameterization and ss_zero_terminal_snr; the buffers betas and alphas_cumprod of LDM;
edm_mean and edm_vpred (Playground, CosXL: EDM); and the scheduler_config.json of diffusers. A file
that contradicts itself is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from ckpt.layouts import target_of
from ckpt.parts import buffers
from diffusion.schedules import (
    SCHEDULES, TABLES, T, alphas_bar, betas_of, has_rows, shorter, table_from,
)
from harness.cli import UserError, dashed
from harness.files import Container, listed
from harness.reading import read_file
from objectives import Objective, make_objective

# diffusers' and ModelSpec's words, and ours. "edm" is known by name only.
TARGETS = {
    "epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v",
    "sample": "x0", "x0": "x0", "flow_prediction": "fm", "flow": "fm", "rf": "fm", "edm": "edm",
}  # fmt: skip
# Betas of diffusers' schedulers where a config is silent: start, end, schedule.
BETAS = (0.0001, 0.02, "linear")
LIKE_SD = (0.00085, 0.012, "scaled_linear")
LIKE_K = (0.00085, 0.012, "linear")
# Another scheduler has other noise (a consistency model's, unCLIP's): there silence says nothing.
PLAIN = (
    "DDPM DDPMParallel DDIM DDIMParallel DDIMInverse PNDM DEISMultistep UniPCMultistep SASolver "
    "DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep EulerDiscrete "
    "EulerAncestralDiscrete LMSDiscrete RePaint"
)
SILENT = {f"{name}Scheduler": BETAS for name in PLAIN.split()} | {
    "LCMScheduler": LIKE_SD,
    "TCDScheduler": LIKE_SD,
    "HeunDiscreteScheduler": LIKE_K,
    "KDPM2DiscreteScheduler": LIKE_K,
    "KDPM2AncestralDiscreteScheduler": LIKE_K,
    "DPMSolverSDEScheduler": LIKE_K,
}
SPOKEN = ("beta_start", "beta_end", "beta_schedule")
KNOWN = {"_class_name", "prediction_type", "num_train_timesteps", "trained_betas", *SPOKEN}
KNOWN |= {"rescale_betas_zero_snr", "timestep_spacing"}
NEEDS_TABLE = (
    "Add --table linear, cosine or scaled_linear (guided-diffusion: cosine for its 64×64 model, "
    "linear for the others; Stable Diffusion: scaled_linear), or --betas START,END,SCHEDULE."
)
UNKNOWN = "a noise schedule of its own"  # one that this code cannot draw
ANOTHER = "another"  # an objective that this code does not know by name
CONFIG = "scheduler_config.json"


@dataclass
class Meaning:
    """What a file says. None is silence; where: {field: the places that say it}."""

    target: str | None = None
    table: str | None = None
    zero_snr: bool | None = None
    where: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what changes nothing, but is good to know

    def add(self, place: str, what: str, **said: Any) -> None:
        """Take in what one place says, which must not contradict the others."""
        for key, value in said.items():
            if value is None:
                continue
            own = getattr(self, key)
            same = same_table(own, value) if key == "table" and own else own == value
            if own is not None and not same:
                others = ", ".join(self.where[key])
                raise UserError(
                    f"{what} contradicts itself: its {NAMES[key]} is {shown(own)} by {others}, and "
                    f"{shown(value)} by {place}",
                    do="Find out which is right, and have it saved again without the other.",
                )
            setattr(self, key, value if own is None else own)
            self.where.setdefault(key, []).append(place)

    def __bool__(self) -> bool:
        return bool(self.where)


NAMES = {"target": "objective", "table": "noise schedule", "zero_snr": "zero terminal SNR"}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return shorter(str(value))


def meaning_of(box: Container) -> Meaning:
    """All that a file, its header and the scheduler of its pipeline say."""
    said, what = Meaning(), str(box.path)
    places = [*tensors_say(box), *header_says(box.meta)]
    for place, words in places:
        # CosXL: v, but over EDM's range of noise. Who writes that says v beside it.
        if "edm_vpred.sigma_max" in box and words.get("target") == "v":
            words = words | {"target": "edm"}
        said.add(place, what, **words)
    if file := scheduler_beside(box.path):
        words, notes = scheduler_says(file)
        said.add(CONFIG, what, **words)
        said.notes += [f"{note} ({CONFIG})" for note in notes]
    if said.target == "eps" and said.zero_snr:
        raise UserError(
            f"{what}: zero terminal SNR (by {', '.join(said.where['zero_snr'])}) with a network "
            f"that predicts eps (by {', '.join(said.where['target'])}) cannot be sampled",
            do="Find out which is right, and have it saved again without the other.",
        )
    return said


# ---- in the file --------------------------------------------------------------------------------


def tensors_say(box: Container) -> list[tuple[str, dict[str, Any]]]:
    """Marker tensors, and the buffers of LDM's schedule."""
    names = buffers(box, "")
    found: list[tuple[str, dict[str, Any]]] = []
    if "v_pred" in names:
        found.append(("its marker v_pred", {"target": "v"}))
    if "ztsnr" in names:
        found.append(("its marker ztsnr", {"zero_snr": True}))
    for name in ("edm_mean", "edm_vpred.sigma_max"):
        if name in names:
            found.append((f"its buffer {name}", {"target": "edm"}))
    for name in ("alphas_cumprod", "betas"):
        steps = math.prod(box.shape(names[name])) if name in names else 0
        if steps > 1 and steps != T:
            found.append((f"its buffer {name} of {steps} steps", {"table": UNKNOWN}))
        elif steps == T:
            values = box[names[name]].flatten()
            bars = values.double()
            if name == "betas":
                bars = (1 - bars).cumprod(0)
            table, zero_snr = table_of(bars, coarse=values.dtype.itemsize < 4)
            found.append((f"its buffer {name}", {"table": table, "zero_snr": zero_snr}))
    return found


def header_says(meta: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The keys of a safetensors header that other programs write."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = str(meta.get(key, "")).strip().lower()
        if word in TARGETS:
            found.append((key, {"target": TARGETS[word]}))
        elif word:
            found.append((f"{key} {ascii(word[:40])}", {"target": ANOTHER}))
    # stable-diffusion-v2-768-v; a LoRA's name goes on after a slash.
    if str(meta.get("modelspec.architecture", "")).partition("/")[0].endswith("-v"):
        found.append(("modelspec.architecture", {"target": "v"}))
    flags = {"ss_v_parameterization": ("target", "v"), "ss_zero_terminal_snr": ("zero_snr", True)}
    for key, (name, value) in flags.items():
        if str(meta.get(key, "")).lower() == "true":
            found.append((key, {name: value}))
    return found


def table_of(bars: Tensor, coarse: bool = False) -> tuple[str, bool | None]:
    """(table, zero terminal SNR) of the products of alphas of 1000 steps: a known table, else a
    formula's, else these betas themselves. coarse: the file has them in 16 bits, which cannot
    become betas, and may not tell how a table ends (None)."""
    for table in TABLES:
        ends = [pure for pure in (False, True) if alike(bars, alphas_bar(table, pure), coarse)]
        if ends:
            return table, ends[0] if len(ends) == 1 else None
    betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
    text = ",".join(map(repr, betas.tolist()))
    zero_snr = bool(bars[-1] <= 0)
    if coarse or not draws(text, zero_snr):
        return UNKNOWN, None
    for kind in SCHEDULES:
        first, last = float(betas[0]), float(betas[-1])
        if kind == "sigmoid":
            # The ends are those of a sigmoid from -6 to 6.
            short = (last - first) * (1 / math.tanh(3) - 1) / 2
            first, last = first - short, last + short
        for digits in (4, 6):
            table = f"{first:.{digits}g},{last:.{digits}g},{kind}"
            if draws(table) and alike(bars, alphas_bar(table)):
                return table_from(table), False
    return text, zero_snr


def draws(table: str, zero_snr: bool = False) -> bool:
    """Is it a table that can be drawn?"""
    try:
        return bool(len(alphas_bar(table, zero_snr)))
    except ValueError:
        return False


def is_table(text: str) -> bool:
    """May metadata of ours name this as the noise schedule of a file?"""
    return text == UNKNOWN or draws(text) or draws(text, True)


def alike(bars: Tensor, wanted: Tensor, coarse: bool = False) -> bool:
    """The same products of alphas, up to a file's precision."""
    if coarse:
        # fp16 rounds by 5e-4. The tables' logarithms differ by far more, but in the last rows.
        return torch.allclose(bars, wanted, rtol=4e-3, atol=2e-5)
    # 0.2% of sigma; fp32 rounds the first by 0.15%. Pure noise is written as some tiny number.
    pure = wanted < 1e-7
    odds = bars.clamp(1e-9, 1 - 1e-9).logit() - wanted.clamp(1e-9, 1 - 1e-9).logit()
    return bool((odds.abs() < 4e-3)[~pure].all() and (bars[pure].abs() < 1e-6).all())


def same_table(own: str, other: str) -> bool:
    """Are two tables one, up to a file's precision?"""
    if own == other or not (has_rows(own) and has_rows(other)) or UNKNOWN in (own, other):
        return own == other
    zero_snr = not (draws(own) and draws(other))
    return alike(alphas_bar(own, zero_snr), alphas_bar(other, zero_snr))


# ---- beside it ----------------------------------------------------------------------------------


def scheduler_beside(path: Path) -> Path | None:
    """The config of the pipeline's scheduler: beside weights, or one folder up where they are in
    a pipeline's folder."""
    folder = path.absolute().parent
    places = [folder / "scheduler" / CONFIG, folder / CONFIG]
    own = folder.name.startswith(("unet", "transformer"))
    if own or (folder.parent / "model_index.json").is_file():
        places.append(folder.parent / "scheduler" / CONFIG)
    return next((file for file in places if file.is_file()), None)


def scheduler_says(file: Path) -> tuple[dict[str, Any], list[str]]:
    """(what a scheduler's config of diffusers means, what else it says), with diffusers' defaults
    where it is silent."""
    try:
        config = json.loads(read_file(file))
        if not isinstance(config, dict):
            raise TypeError("no dictionary")
        return read_scheduler(config)
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(
            f"{file} is no scheduler's config of diffusers ({text})", do="Restore it."
        ) from None


def read_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same of a dictionary. ValueError or TypeError says what cannot be."""
    if config and not config.keys() & KNOWN:
        raise ValueError(f"nothing of it is known: {listed(config)}")
    name = str(config.get("_class_name", "DDPMScheduler"))
    words = {"timestep_spacing": "timestep spacing", "shift": "shift", "flow_shift": "shift"}
    notes = [f"{word} {str(config[key])[:40]}" for key, word in words.items() if config.get(key)]
    if name.startswith("FlowMatch"):
        return {"target": "fm"}, notes
    # Continuous times are EDM's: the network is told ln(sigma) / 4, not the number of a step.
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        return {"target": "edm"}, notes
    if is_strange(name, config):
        word = config.get("prediction_type")
        target = TARGETS.get(word) if isinstance(word, str) else None
        return {"target": target, "table": UNKNOWN}, [*notes, f"scheduler {ascii(name[:40])}"]
    word = config.get("prediction_type", "epsilon")
    target = TARGETS.get(word) if isinstance(word, str) else None
    if target is None:
        raise ValueError(f"prediction_type is {brief(word)}")
    if target == "fm":
        return {"target": "fm"}, notes
    steps = config.get("num_train_timesteps", T)
    if steps != T:
        notes.append(f"{brief(steps)} steps")
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if type(zero_snr) is not bool:
        raise ValueError(f"rescale_betas_zero_snr is {brief(zero_snr)}")
    table = UNKNOWN
    if steps == T:
        table, pure = table_in(config, SILENT.get(name, BETAS))
        zero_snr = zero_snr or pure
    return {"target": target, "table": table, "zero_snr": zero_snr}, notes


def is_strange(name: str, config: Mapping[str, Any]) -> bool:
    """Does a scheduler's config leave its noise to a class that is not known here, or change it
    after the betas (CogVideoX), or not use them (flow's sigmas for a network of another target)?"""
    if config.get("use_flow_sigmas") and config.get("prediction_type") != "flow_prediction":
        return True
    silent = any(config.get(key) is None for key in SPOKEN) and not config.get("trained_betas")
    shifted = config.get("snr_shift_scale") not in (None, 1)
    return shifted or silent and name not in SILENT


def table_in(config: Mapping[str, Any], silent: tuple[float, float, str]) -> tuple[str, bool]:
    """(table, do its own betas end in pure noise) of a scheduler's config. ValueError: no table."""
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
        if betas.shape != (T,) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"trained_betas are not {T} numbers from 0 to 1")
        table, zero_snr = table_of((1 - betas).cumprod(0))
        return table, bool(zero_snr)
    low, high, kind = (config.get(key, value) for key, value in zip(SPOKEN, silent))
    numbers = all(type(v) in (int, float) and 0 < v < 1 for v in (low, high))
    if not numbers:
        raise ValueError(f"betas are from {brief(low)} to {brief(high)}")
    if kind not in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        raise ValueError(f"beta_schedule is {brief(kind)}")
    return table_from(f"{float(low)!r},{float(high)!r},{kind}"), False


# ---- as metadata --------------------------------------------------------------------------------


def record(box: Container, wanted: str | None) -> dict[str, Any]:
    """The metadata of what a file says: `objective` in full or one word, and where it is not whole
    `schedule`, which holds what is known of it; `said`: lines for `inspect`.

    wanted: the user's --objective, which must be the file's, if it says one.
    """
    said = meaning_of(box)
    if said.target is not None and wanted not in (None, said.target):
        places = ", ".join(said.where["target"])
        raise UserError(
            f"{box.path} says its objective is {said.target} ({places}), got {wanted}",
            do="Leave --objective out.",
        )
    target = said.target or wanted
    meta: dict[str, Any] = {"objective": target}
    told = [*lines(said), *said.notes]
    if wanted and said.target is None:
        told.append(f"objective {wanted} by --objective")
    if told:
        meta["said"] = told
    schedule = {"table": said.table, "zero_snr": said.zero_snr}
    schedule = {key: value for key, value in schedule.items() if value is not None}
    if target in ("eps", "v", "x0") and said.table not in (None, UNKNOWN):
        meta["objective"] = whole(target, said.table, bool(said.zero_snr), str(box.path))
    elif target != "fm" and (schedule or target not in (None, "eps", "v", "x0")):
        meta["schedule"] = schedule
    return meta


def lines(said: Meaning) -> list[str]:
    return [
        f"{NAMES[key]} {shown(getattr(said, key))} by {', '.join(places)}"
        for key, places in said.where.items()
    ]


def shown_betas(table: str) -> str:
    """From where to where a table's betas rise, and how."""
    if not has_rows(table) or table == UNKNOWN:
        return ""
    betas, words = betas_of(table), TABLES.get(table) or table.split(",")
    kind = words[2] if len(words) == 3 else f"all {T} given"
    return f"{float(betas[0]):.6g} to {float(betas[-1]):.6g}, {kind}"


# ---- with what the user says --------------------------------------------------------------------


def said_table(table: str, betas: str, zero_snr: bool = False, name: str = "betas") -> str:
    """The table that --table and --betas (or flags of another name) say, "" if neither does.

    betas: START,END,SCHEDULE, 1000 numbers, or a scheduler's config of diffusers, which may end in
    pure noise only if --zero-snr says it too.
    """
    if not betas:
        return table
    flag = dashed(name)
    if betas.endswith(".json"):
        words = scheduler_says(Path(betas))[0]
        found = words.get("table", UNKNOWN)
        if found == UNKNOWN:
            raise UserError(
                f"{flag} {betas} has no noise schedule of {T} steps", do="Name another file."
            )
        if words["zero_snr"] and not zero_snr:
            raise UserError(
                f"{flag} {betas} says that its noise schedule ends in pure noise",
                do=f"Add {dashed(name.replace('betas', 'zero_snr'))}.",
            )
    else:
        try:
            found = table_from(betas)
        except ValueError as error:
            do = f"Write, for example, {flag} 0.0015,0.0195,scaled_linear."
            raise UserError(f"{flag}: {error}", do=do) from None
    if table and not same_table(table, found):
        other = dashed(name.replace("betas", "table"))
        raise UserError(
            f"{flag} {shorter(found)} is not {other} {shorter(table)}", do="Give one of them."
        )
    return found


def with_table(
    meta: Mapping[str, Any], table: str, what: str, zero_snr: bool = False
) -> dict[str, Any]:
    """The objective in full, where a file or the user says only eps, v or x0. table, zero_snr: the
    user's, "" and False where the file's are to be taken; they may not contradict it."""
    target, objective = target_of(meta), meta.get("objective")
    schedule = meta.get("schedule", {})
    word = f"--table {shorter(table)}" if table or not zero_snr else "--zero-snr"
    noise = f"{word} is a noise schedule of eps, v and x0"
    if target is None:
        raise UserError(f"{noise}; {what} does not say its objective", do="Add --objective.")
    if target == "fm":
        do = f"Leave {word.split()[0]} out."
        raise UserError(f"{noise}; {what} is fm, which has none", do=do)
    if target not in ("eps", "v", "x0"):
        raise not_drawn(target, what)
    if isinstance(objective, dict):
        schedule = {"table": objective.get("table"), "zero_snr": bool(objective.get("zero_snr"))}
    own, pure = schedule.get("table"), schedule.get("zero_snr")
    if own == UNKNOWN:
        raise UserError(
            f"{what} says it has {UNKNOWN}",
            wanted=f"{T} steps of known betas",
            do="Sample it with the code that it was made for.",
        )
    if table and own and not same_table(own, table):
        raise UserError(
            f"{what} says its table is {shorter(own)!r}, got {shorter(table)!r}", do="Leave it out."
        )
    if zero_snr and pure is False:
        raise UserError(
            f"{what} says that its noise schedule does not end in pure noise, got --zero-snr",
            do="Leave it out.",
        )
    if isinstance(objective, dict):
        return objective
    if not table and not own:
        raise UserError(
            f"{what} was trained to output {target}, and {target} needs its noise schedule",
            do=NEEDS_TABLE,
        )
    return whole(target, own or table, zero_snr or bool(pure), what)


def not_drawn(target: str, what: str) -> UserError:
    """The error for an objective that is known by name only, such as edm (Playground v2.5), or not
    even that."""
    return UserError(
        f"{what} says its objective is {target}, which this code cannot draw",
        wanted="eps, v, x0 or fm",
        do="Sample it with the code that it was made for.",
    )


def objective_from(
    meta: Mapping[str, Any], what: str, table: str = "", zero_snr: bool = False
) -> Objective:
    """What a network was trained to output, by its file and, where that is silent, the user."""
    objective = meta.get("objective")
    if not table and not zero_snr:
        if isinstance(objective, dict):
            return Objective(**objective)
        if target_of(meta) == "fm":
            return make_objective("fm")
    return Objective(**with_table(meta, table, what, zero_snr))


def add_schedule(meta: dict[str, Any], table: str, zero_snr: bool, what: str) -> None:
    """Put into metadata what the user says of a noise schedule, which may not contradict it."""
    told = [f"noise schedule {shorter(table)} by --table or --betas"] if table else []
    told += ["zero terminal SNR on by --zero-snr"] if zero_snr else []
    if not told:
        return
    schedule = meta.get("schedule", {})
    if table or isinstance(meta.get("objective"), dict) or schedule.get("table"):
        meta["objective"] = with_table(meta, table, what, zero_snr)
    else:
        # Any table will do to see whether this target may end in pure noise.
        with_table(meta, "cosine", what, zero_snr)
        meta["schedule"] = {**schedule, "zero_snr": True}
    meta["said"] = [*meta.get("said", []), *told]


def whole(target: str, table: str, zero_snr: bool, what: str) -> dict[str, Any]:
    """An objective with its noise schedule, as metadata holds it."""
    name = "ddpm" if target == "eps" else target
    try:
        return asdict(make_objective(name, table=table, zero_snr=zero_snr))
    except ValueError as error:
        text = str(error).replace("  ", "; ")
        raise UserError(f"{what}: {text}", do="Find out how it was trained.") from None
