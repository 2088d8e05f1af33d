"""What a run needs of a device's memory, before it begins; --dry-run shows it.

Weights, gradients, moments, averages and the autoencoder follow from shapes, to the byte. Of
activations there is an estimate: a forward pass of one micro-batch is walked through with tensors
that have no memory, by the kernels that the device would run, and what autograd keeps of it is
added up, the bf16 copies of fp32 weights among it; with --checkpointing, what goes into blocks, and
all that the largest block keeps. What kernels need while they run, and what an
allocator cannot fill, is not in it: a run needs somewhat more than is said here, never less.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ckpt.vaes import FAMILIES
from data.cache import is_cache, vae_path
from harness.cli import UserError
from harness.memory import capacity
from harness.ranks import Ranks, autocast, pick_device, place_here, precision
from kernels import dispatch, proof
from model import build
from objectives import Objective
from training.optimizer import state_bytes
from training.precision import inputs_of
from training.sharding import gathered_bytes, is_wanted, shard_count, units
from training.start import largest_shape, network_config
from training.texts import encoder_bytes, preset_of
from vae import VAE, AnyVAE, LinearVAE, VAEConfig, load_vae, pixel, read_name

GB = 1e9


class Plan(NamedTuple):
    """Bytes on each device."""

    weights: int
    gradients: int
    moments: int
    averages: int
    autoencoder: int
    activations: int
    # Do gradients stay while a pass makes its activations?
    at_once: bool
    # Of averages that lie in host memory while a GPU trains: they take nothing of the device.
    host: int = 0
    # Of the text encoders of --text.
    encoders: int = 0

    @property
    def peak(self) -> int:
        """What a step needs at least. Gradients take the place of activations, one by one, unless
        they stay from one micro-batch to the next or in the buckets that ranks exchange."""
        passing = [self.gradients, self.activations]
        always = self.weights + self.moments + self.averages + self.autoencoder + self.encoders
        return always + (sum(passing) if self.at_once else max(passing))


def plan_of(
    net: nn.Module, vae: AnyVAE, latent_shape: tuple[int, int, int], cfg: Any, ranks: Ranks
) -> Plan:
    """The plan of a run that trains net (which may be on meta) on latents (C, h, w).

    cfg: train.Optim's flags.
    """
    shards = shard_count(cfg, ranks)
    weights, moments, averages = (-(-size // shards) for size in state_bytes(net, cfg))
    aside = ranks.device.type == "cuda" and in_host(cfg)
    whole = gathered_bytes(net, cfg, ranks) if shards > 1 else 0
    return Plan(
        weights=weights + whole + sum(b.nbytes for b in net.buffers()),
        gradients=weights,
        moments=moments,
        averages=0 if aside else averages,
        autoencoder=sum(t.nbytes for t in vae.state_dict().values()),
        activations=activations(net.cfg, latent_shape, cfg, ranks),
        at_once=cfg.accum > 1 or ranks.world > 1,
        host=averages if aside else 0,
        encoders=encoder_bytes(cfg, ranks.device),
    )


def in_host(cfg: Any) -> bool:
    """Do averages lie in host memory? Those of scripts without --ema-device never do."""
    return getattr(cfg, "ema_device", "same") == "cpu"


def activations(net_cfg: Any, latent_shape: tuple[int, int, int], cfg: Any, ranks: Ranks) -> int:
    """Bytes that autograd keeps of the forward pass of one of a rank's micro-batches."""
    dtype = precision(ranks.device, cfg.dtype)
    with torch.device("meta"):
        net = build(net_cfg)
    with FakeTensorMode(allow_non_fake_inputs=True), paths_of(ranks.device):
        own = materialise(net, torch.bfloat16 if cfg.weights == "bf16" else torch.float32)
        inputs = inputs_of(net_cfg, cfg.batch // (ranks.world * cfg.accum), latent_shape)
        if not inputs.get("y", inputs["x"]).is_floating_point():
            # Classes have values, which are looked at; what they add is a row an image.
            inputs.pop("y")
        kept = Kept(own)
        for block in units(net) if cfg.checkpointing else []:
            block.register_forward_pre_hook(kept.enter)
            block.register_forward_hook(kept.leave)
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x)
        # Such tensors are a CPU's, whose autocast casts what a GPU's does.
        with hooks, torch.enable_grad(), autocast(torch.device("cpu"), dtype):
            out = net(**inputs)
        del out
        return kept.nbytes


class Kept:
    """The memories that a pass leaves to its backward pass, each counted once; `own`: those that
    are there anyway. Blocks that call enter() and leave() keep what goes in, and the rest only
    while it is their turn."""

    def __init__(self, own: dict[int, Any]):
        self.own = own
        self.always: dict[int, Any] = {}
        self.blocks: list[dict[int, Any]] = []
        self.inside = False

    def keep(self, x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory._cdata not in self.own:
            (self.blocks[-1] if self.inside else self.always)[memory._cdata] = memory
        return x

    def enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for x in inputs:
            if isinstance(x, Tensor):
                self.keep(x)
        self.blocks.append({})
        self.inside = True

    def leave(self, *_: Any) -> None:
        self.inside = False

    @property
    def nbytes(self) -> int:
        turns = [
            sum(memory.nbytes() for key, memory in block.items() if key not in self.always)
            for block in self.blocks
        ]
        return sum(memory.nbytes() for memory in self.always.values()) + max(turns, default=0)


def materialise(net: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """Put tensors of the mode that is on into a network on meta; {where each lies: its memory}."""
    own = {}
    for module in net.modules():
        for names, to in ((module._parameters, dtype), (module._buffers, None)):
            for name, x in names.items():
                if x is None:
                    continue
                new = torch.empty_strided(x.shape, x.stride(), dtype=to or x.dtype)
                names[name] = nn.Parameter(new) if to else new
                own[new.untyped_storage()._cdata] = new.untyped_storage()
    return own


@contextlib.contextmanager
def paths_of(device: torch.device) -> Iterator[None]:
    """The kernels that this device would run, on tensors that are not there; nothing is printed."""
    kernels = device.type == "cuda" and dispatch.chosen() != "torch"
    with dispatch.assumed() if kernels else dispatch.reference(), proof.alone():
        yield


# ---- does it fit? --------------------------------------------------------------------------------


def check_plan(
    net: nn.Module, vae: AnyVAE, latent_shape: tuple[int, int, int], cfg: Any, ranks: Ranks
) -> None:
    """Refuse a run for which a GPU has no room. What a CPU has not, it may have on a disk."""
    if ranks.device.type != "cuda":
        return
    plan, there = plan_of(net, vae, latent_shape, cfg, ranks), capacity(ranks.device)
    if plan.peak <= there:
        return
    ways = []
    if cfg.batch > ranks.world * cfg.accum:
        ways.append("raise --accum")
    if plan.averages:
        ways += ["drop --ema widths"] + ["add --ema-device cpu"] * hasattr(cfg, "ema_device")
    if not cfg.checkpointing:
        ways.append("add --checkpointing")
    if cfg.optim != "adamw8bit":
        ways.append("add --optim adamw8bit")
    if ranks.world > 1 and not is_wanted(cfg):
        ways.append("add --shard full")
    elif cfg.weights != "bf16" and not is_wanted(cfg):
        ways.append("add --weights bf16")
    raise UserError(
        f"a step needs {plan.peak / GB:.1f} GB ({shares(plan)}), and this GPU has "
        f"{there / GB:.1f} GB",
        do=f"{', or '.join(ways or ['choose a smaller --model']).capitalize()}.",
    )


def shares(plan: Plan) -> str:
    """The rows of a plan on one line."""
    left_out = ["at_once", "host"] + ["encoders"] * (not plan.encoders)
    sizes = {name: size for name, size in plan._asdict().items() if name not in left_out}
    return ", ".join(f"{name} {size / GB:.1f}" for name, size in sizes.items())


def table(plan: Plan, cfg: Any, numbers: int, vae: str, ranks: Ranks) -> str:
    """A plan as --dry-run shows it; numbers: of the network's parameters."""
    passes = cfg.batch // (ranks.world * cfg.accum)
    there, where = capacity(ranks.device), "this machine"
    if ranks.device.type == "cuda":
        where = "this GPU"
    words = {
        "weights": f"{numbers:,} in {cfg.weights}",
        "gradients": f"in {cfg.weights}",
        "moments": cfg.optim,
        "averages": f"{len(cfg.ema)} in fp32",
        "autoencoder": vae,
        "activations": f"estimated, of {passes} images in {precision(ranks.device, cfg.dtype)}",
    }
    if plan.host:
        words["averages"] += f"; {plan.host / GB:.3f} in host memory"
    lines = [f"memory of a rank, of {ranks.world}, in GB:"]
    if plan.encoders:
        words["encoders"] = f"of --text {cfg.text}, frozen"
    for name, text in words.items():
        lines.append(f"  {name:<12} {getattr(plan, name) / GB:8.3f}  {text}")
    fits = "it fits" if plan.peak <= there else "it does not fit"
    text = f"at least; {where} has {there / GB:.1f}: {fits}"
    lines.append(f"  {'a step':<12} {plan.peak / GB:8.3f}  {text}")
    return "\n".join(lines)


# ---- before anything is opened -------------------------------------------------------------------


def show_plan(cfg: Any, objective: Objective) -> None:
    """--dry-run of train.py: the config as JSON on stdout; what it needs of memory on stderr."""
    text = memory_text(cfg, objective)
    print(json.dumps(asdict(cfg), indent=1), flush=True)
    print(text, file=sys.stderr)


def memory_text(cfg: Any, objective: Objective) -> str:
    """table() of a run, or why there is none yet."""
    vae = vae_by_name(cfg)
    if vae is None:
        return f"memory: known once the autoencoder of --vae {cfg.vae} was fetched"
    like = preset_of(cfg)
    classes = len(cfg.classes)  # "* hair" is counted as one: a class is a row, which is little
    sizes = cfg.bucket_sizes()
    unet = network_config(like, cfg.model, vae, objective, cfg.resolution, classes, sizes)
    with torch.device("meta"):
        net = build(unet)
    _, world = place_here() or (0, 1)
    ranks = Ranks(0, world, pick_device(cfg.device))
    plan = plan_of(net, vae, largest_shape(cfg, vae), cfg, ranks)
    numbers = sum(p.numel() for p in net.parameters())
    return table(plan, cfg, numbers, vae.name, ranks)


def vae_by_name(cfg: Any) -> AnyVAE | None:
    """An autoencoder of the shapes of --vae's, perhaps on meta: nothing is fetched or fitted for
    it. None where only its file knows them, and that is not here."""
    name, given = cfg.vae, {}
    if name in ("", "pca") and is_cache(cfg.data):
        name = str(vae_path(cfg.data))
    if name in ("", "pca"):
        same = pixel(8)  # pca keeps the first 32 of its numbers
        return LinearVAE("pca", 8, same.basis[:32], same.mean, same.std[:32])
    file, given = read_name(name, None, None)
    if name.startswith("pixel") or Path(file).exists():
        return load_vae(name)
    if "family" not in given or file != FAMILIES[given["family"]].hub:
        return None
    kind = FAMILIES[given["family"]]
    shape = VAEConfig(z=kind.z, quant=kind.quant, stats=kind.stats)
    with torch.device("meta"):
        return VAE(shape, given["family"], given.get("latents", ""))
