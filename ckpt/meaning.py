"""What a file of another program says of its objective and noise schedule, and where it says so.

    said = meaning_of(box)     # Meaning("v", "scaled_linear", True, where={…})

Read are: the empty tensors v_pred and ztsnr (NoobAI and its kin); the header's
modelspec.prediction_type and predict_key, and kohya's ss_v_parameterization and
ss_zero_terminal_snr; the buffers betas and alphas_cumprod of LDM; edm_mean (Playground: EDM); and
the scheduler_config.json of diffusers. A file that contradicts itself is refused.
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

from ckpt.layouts import parts, target_of
from diffusion.schedules import TABLES, T, alphas_bar
from harness.cli import UserError
from harness.files import Container
from harness.reading import read_file
from objectives import make_objective

# diffusers' and ModelSpec's words, and ours. "edm" is known by name only.
TARGETS = {
    "epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v",
    "sample": "x0", "x0": "x0", "flow_prediction": "fm", "flow": "fm", "rf": "fm", "edm": "edm",
}  # fmt: skip
# Betas of diffusers' schedulers where a config is silent: start, end, schedule.
BETAS = (0.0001, 0.02, "linear")
LIKE_SD = (0.00085, 0.012, "scaled_linear")
SILENT = {
    "LCMScheduler": LIKE_SD,
    "TCDScheduler": LIKE_SD,
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2DiscreteScheduler": (0.00085, 0.012, "linear"),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
}
NEEDS_TABLE = (
    "Add --table linear, cosine or scaled_linear (guided-diffusion: cosine for its 64×64 model, "
    "linear for the others; Stable Diffusion: scaled_linear)."
)
UNKNOWN = "a noise schedule of its own"  # a table that this code has not
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
            if own is not None and own != value:
                others = ", ".join(self.where[key])
                raise UserError(
                    f"{what} contradicts itself: its {NAMES[key]} is {shown(own)} by {others}, and "
                    f"{shown(value)} by {place}",
                    do="Find out which is right, and have it saved again without the other.",
                )
            setattr(self, key, value)
            self.where.setdefault(key, []).append(place)

    def __bool__(self) -> bool:
        return bool(self.where)


NAMES = {"target": "objective", "table": "noise schedule", "zero_snr": "zero terminal SNR"}


def shown(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else str(value)


def meaning_of(box: Container) -> Meaning:
    """All that a file, its header and the scheduler of its pipeline say."""
    said, what = Meaning(), str(box.path)
    for place, words in (*tensors_say(box), *header_says(box.meta)):
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
    names = {name: full for full, name in parts(box).get("schedule", {}).items()}
    found: list[tuple[str, dict[str, Any]]] = []
    if "v_pred" in names:
        found.append(("its marker v_pred", {"target": "v"}))
    if "ztsnr" in names:
        found.append(("its marker ztsnr", {"zero_snr": True}))
    if "edm_mean" in names:
        found.append(("its buffer edm_mean", {"target": "edm"}))
    for name in ("alphas_cumprod", "betas"):
        if name in names and math.prod(box.shape(names[name])) == T:
            values = box[names[name]].double().flatten()
            bars = values if name == "alphas_cumprod" else (1 - values).cumprod(0)
            table, zero_snr = table_of(bars)
            found.append((f"its buffer {name}", {"table": table, "zero_snr": zero_snr}))
    return found


def header_says(meta: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The keys of a safetensors header that other programs write."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = str(meta.get(key, "")).strip().lower()
        if word:
            found.append((key, {"target": TARGETS.get(word, word[:40])}))
    flags = {"ss_v_parameterization": ("target", "v"), "ss_zero_terminal_snr": ("zero_snr", True)}
    for key, (name, value) in flags.items():
        if str(meta.get(key, "")).lower() == "true":
            found.append((key, {name: value}))
    return found


def table_of(bars: Tensor) -> tuple[str, bool | None]:
    """(table, zero terminal SNR) of the products of alphas of 1000 steps, from a file of whatever
    precision."""
    for table in TABLES:
        for zero_snr in (False, True):
            wanted = alphas_bar(table, zero_snr)
            # fp16 rounds by 5e-4. The tables' logarithms differ by far more, but in the last rows.
            if torch.allclose(bars, wanted, rtol=4e-3, atol=2e-5):
                return table, zero_snr
    return UNKNOWN, None


# ---- beside it ----------------------------------------------------------------------------------


def scheduler_beside(path: Path) -> Path | None:
    """The config of the pipeline's scheduler: beside weights, or one folder up where they are in
    a pipeline's folder."""
    folder = path.absolute().parent
    places = [folder / "scheduler" / CONFIG, folder / CONFIG]
    if folder.name.startswith("unet") or (folder.parent / "model_index.json").is_file():
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
    name = str(config.get("_class_name", "DDPMScheduler"))
    spacing = config.get("timestep_spacing")
    notes = [f"timestep spacing {str(spacing)[:40]}"] if spacing else []
    if name.startswith("FlowMatch"):
        return {"target": "fm"}, notes
    if name.startswith("EDM"):
        return {"target": "edm"}, notes
    word = config.get("prediction_type", "epsilon")
    target = TARGETS.get(word) if isinstance(word, str) else None
    if target is None:
        raise ValueError(f"prediction_type is {brief(word)}")
    if target == "fm":
        return {"target": "fm"}, notes
    steps = config.get("num_train_timesteps", T)
    if steps != T:
        notes.append(f"{brief(steps)} steps")
    table = UNKNOWN
    if steps == T:
        table = table_of((1 - betas_of(config, SILENT.get(name, BETAS))).cumprod(0))[0]
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if type(zero_snr) is not bool:
        raise ValueError(f"rescale_betas_zero_snr is {brief(zero_snr)}")
    return {"target": target, "table": table, "zero_snr": zero_snr}, notes


def betas_of(config: Mapping[str, Any], silent: tuple[float, float, str]) -> Tensor:
    """The betas of a scheduler's config, (1000,) float64."""
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
        if betas.shape != (T,) or not ((betas >= 0) & (betas <= 1)).all():
            raise ValueError(f"trained_betas are not {T} numbers from 0 to 1")
        return betas
    keys = ("beta_start", "beta_end", "beta_schedule")
    low, high, kind = (config.get(key, value) for key, value in zip(keys, silent))
    numbers = all(type(v) in (int, float) and 0 < v < 1 for v in (low, high))
    if not numbers:
        raise ValueError(f"betas are from {brief(low)} to {brief(high)}")
    if kind == "linear":
        return torch.linspace(low, high, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        bars = alphas_bar("cosine")
        return 1 - bars / torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    if kind == "sigmoid":
        steps = torch.linspace(-6, 6, T, dtype=torch.float64)
        return torch.sigmoid(steps) * (high - low) + low
    raise ValueError(f"beta_schedule is {brief(kind)}")


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
    if said:
        meta["said"] = [*lines(said), *said.notes]
    schedule = {"table": said.table, "zero_snr": said.zero_snr}
    schedule = {key: value for key, value in schedule.items() if value is not None}
    if target in ("eps", "v", "x0") and said.table in TABLES:
        meta["objective"] = whole(target, said.table, bool(said.zero_snr), str(box.path))
    elif target != "fm" and (schedule or target not in (None, "eps", "v", "x0")):
        meta["schedule"] = schedule
    return meta


def with_table(meta: Mapping[str, Any], table: str, what: str) -> dict[str, Any]:
    """The objective in full, where a file or the user says only eps, v or x0. table: the user's,
    "" where the file's is to be taken."""
    target, objective = target_of(meta), meta.get("objective")
    schedule = meta.get("schedule", {})
    noise = f"--table {table} is a noise schedule of eps, v and x0"
    if target is None:
        raise UserError(f"{noise}; {what} does not say its objective", do="Add --objective.")
    if target == "fm":
        raise UserError(f"{noise}; {what} is fm, which has none", do="Leave --table out.")
    if target not in ("eps", "v", "x0"):
        raise UserError(
            f"{what} says its objective is {target}",
            wanted="eps, v, x0 or fm",
            do="Sample it with the code that it was made for.",
        )
    if isinstance(objective, dict):
        if table and objective.get("table") != table:
            own = objective.get("table")
            raise UserError(f"{what} says its table is {own!r}, got {table!r}", do="Leave it out.")
        return objective
    own = schedule.get("table")
    if own == UNKNOWN:
        raise UserError(
            f"{what} says it has {UNKNOWN}",
            wanted=f"one of {', '.join(TABLES)}",
            do="Sample it with the code that it was made for.",
        )
    if table and own and own != table:
        raise UserError(f"{what} says its table is {own!r}, got {table!r}", do="Leave it out.")
    if not table and not own:
        raise UserError(
            f"{what} was trained to output {target}, and {target} needs its noise schedule",
            do=NEEDS_TABLE,
        )
    return whole(target, table or own, bool(schedule.get("zero_snr")), what)


def lines(said: Meaning) -> list[str]:
    return [
        f"{NAMES[key]} {shown(getattr(said, key))} by {', '.join(places)}"
        for key, places in said.where.items()
    ]


def whole(target: str, table: str, zero_snr: bool, what: str) -> dict[str, Any]:
    """An objective with its noise schedule, as metadata holds it."""
    name = "ddpm" if target == "eps" else target
    try:
        return asdict(make_objective(name, table=table, zero_snr=zero_snr))
    except ValueError as error:
        text = str(error).replace("  ", "; ")
        raise UserError(f"{what}: {text}", do="Find out how it was trained.") from None
