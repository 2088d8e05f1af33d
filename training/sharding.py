"""A network shared out over the ranks of a run (--shard), by torch's fully_shard.

Each rank keeps some rows of every tensor: of weights, gradients, moments and averages. A block's
weights are gathered when it computes. Over several hosts, each host holds all shards, and only
gradients travel between hosts. So whatever runs the network, every rank has to run it equally
often, and what reads a whole tensor is entered by all.

    model = parallel(net, cfg, ranks)      # net itself is changed; make the optimizer afterwards
    put(p, whole)                          # a whole tensor into a parameter, or into this shard
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.cli import UserError, flag
from harness.files import Container, check_fits
from harness.ranks import Ranks, precision, variable
from kernels.adamw8bit import distributed, local
from training.casts import cast_together


@dataclass(frozen=True)
class Sharding:
    """Who keeps what."""

    shard: Literal["none", "grad", "full"] = flag(
        "none", "over ranks: full = all state of the network; grad = all but a step's weights"
    )


def parallel(net: nn.Module, cfg: Any, ranks: Ranks) -> Callable[..., Any]:
    """What a step calls: net on its device, shared by the ranks as cfg (--shard, --compile) says.

    Sharded, net's parameters are other objects afterwards. It goes to a GPU shard by shard.
    """
    if ranks.world > 1 and is_wanted(cfg):
        shard(net, cfg.shard, cfg.dtype, ranks)
        return net
    net.to(ranks.device)
    if cfg.compile:
        net = torch.compile(net)
    if ranks.world > 1:
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    return net if cfg.compile else cast_together(net)


def is_wanted(cfg: Any) -> bool:
    """Do the flags ask for shards? Those of scripts without --shard never do."""
    return getattr(cfg, "shard", "none") != "none"


def check_sharding(cfg: Any, ranks: Ranks) -> None:
    """Refuse flags that do not go with --shard."""
    if is_wanted(cfg) and getattr(cfg, "weights", "fp32") != "fp32":
        raise UserError(
            f"--shard {cfg.shard} --weights {cfg.weights}",
            wanted="one of them",
            do="Leave --weights out: shards are fp32.",
        )
    if is_wanted(cfg) and cfg.compile:
        raise UserError(
            f"--shard {cfg.shard} --compile", wanted="one of them", do="Leave --compile out."
        )
    shard_count(cfg, ranks)


def shard(net: nn.Module, how: str, dtype: str, ranks: Ranks) -> None:
    """Share net out, block by block. Every rank calls, with the same weights."""
    # Imported here: it takes half a second, and few runs need it.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It shards rows, and takes no other order in memory. Activations may be channels_last.
    net.to(memory_format=torch.contiguous_format)
    low = torch.bfloat16 if precision(ranks.device, dtype) == "bf16" else None
    # Inputs stay as they are: in bf16 the times 999 and 1000 would be one.
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options = {"mesh": mesh_of(ranks), "reshard_after_forward": how == "full", "mp_policy": policy}
    for unit in units(net):
        fully_shard(unit, **options)
    fully_shard(net, **options)


def units(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network, whose weights are gathered together. The rest is one unit more."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    middle = [net.middle_block] if hasattr(net, "middle_block") else []
    return [block for blocks in lists for block in blocks] + middle


def mesh_of(ranks: Ranks) -> Any:
    """The ranks as torch's DeviceMesh: (hosts, ranks of a host), shards along the second; (ranks,)
    on one host, or with one rank a host."""
    kind, each = ranks.device.type, ranks_of_mesh(ranks)
    if each == ranks.world:
        return dist.init_device_mesh(kind, (ranks.world,))
    return dist.init_device_mesh(
        kind, (ranks.world // each, each), mesh_dim_names=("hosts", "shards")
    )


def ranks_of_mesh(ranks: Ranks) -> int:
    """How many ranks share a network out: those of a host; all, where each host has one."""
    each = variable("LOCAL_WORLD_SIZE", 1, ranks.world)
    if ranks.world % each:
        raise UserError(
            f"--shard: {ranks.world} ranks, of which {each} are on this host",
            wanted="as many on each host",
            do="Give every torchrun the same --nproc_per_node.",
        )
    return ranks.world if each == 1 else each


def shard_count(cfg: Any, ranks: Ranks) -> int:
    """In how many shards a run of these flags keeps its network; 1 = whole."""
    return ranks_of_mesh(ranks) if ranks.world > 1 and is_wanted(cfg) else 1


def gathered_bytes(net: nn.Module, cfg: Any, ranks: Ranks) -> int:
    """What a step of a sharded run holds at least of whole weights: its largest block, or all."""
    each = 2 if precision(ranks.device, cfg.dtype) == "bf16" else 4
    parts = [net] if cfg.shard == "grad" else units(net) or [net]
    return each * max(sum(p.numel() for p in part.parameters()) for part in parts)


# ---- tensors of which a rank has a part ---------------------------------------------------------


def is_sharded(net: nn.Module) -> bool:
    # Its parameters may be whole at the moment: see reshard().
    return hasattr(net, "reshard")


def place_of(tensor: Tensor) -> tuple[int, int]:
    """(which shard this rank has, of how many); (0, 1) of a whole tensor."""
    for dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard():
            return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
    return 0, 1


def writes(net: nn.Module, ranks: Ranks) -> bool:
    """Does this rank write what only its shard holds? Of hosts with the same shards, the first."""
    return ranks.rank < place_of(next(net.parameters()))[1]


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that belong into `like`, as torch.chunk cuts them."""
    index, shards = place_of(like)
    if shards == 1:
        return whole
    rows = -(-len(whole) // shards)
    return whole[index * rows : (index + 1) * rows]


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or of it what belongs there, into a tensor of this rank."""
    local(target).copy_(part(whole, target))


def fill(net: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """load_strict() of whole tensors, one after the other: of those that are read on access no
    second copy of a network is ever in memory. Of a sharded net each rank takes its rows."""
    header = tensors.header() if isinstance(tensors, Container) else {}
    check_fits(net, header or {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, what)
    for name, own in net.state_dict(keep_vars=True).items():
        put(own, tensors[name])


def as_shard(x: Tensor, p: Tensor, flat: bool = False) -> Tensor:
    """x, this rank's part of a tensor like p, as what the optimizer of a sharded p keeps.

    flat: x (k,) is AdamW8bit's, of one size on every rank.
    """
    if flat:
        return distributed(x, p)
    form = {"shape": p.shape, "stride": p.stride()}
    return type(p.data).from_local(x, p.device_mesh, p.placements, run_check=False, **form)


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors, in rank 0's memory; {} on other ranks. Every rank calls."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if hasattr(whole, "full_tensor"):
            # Averages may lie in host memory, and NCCL sends what is on the GPU.
            whole = whole.to(ranks.device).full_tensor()
        if ranks.rank == 0:
            found[name] = whole.cpu()
    return found


def whole_norms(norms: Tensor, net: nn.Module, ranks: Ranks) -> Tensor:
    """2-norms (n,) of whole tensors, the same on every rank, from those of each rank's shards."""
    if not is_sharded(net):
        return norms
    # Hosts hold the same shards.
    copies = ranks.world // place_of(next(net.parameters()))[1]
    squares = ranks.all_reduce(norms.double().square()) / copies
    return squares.sqrt().to(norms.dtype)


# ---- looking at a sharded network ---------------------------------------------------------------


def showing(net: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A sharded net with other weights (shards of an average), for calls without gradients.

    They change places with its own during a call: it gathers what its parameters hold.
    """
    reshard(net)
    pairs = [(local(p.detach()), local(weights[name])) for name, p in net.named_parameters()]

    @torch.no_grad()
    def call(x: Tensor, t: Tensor, **cond: Any) -> Any:
        swap(pairs)
        reshard(net)
        try:
            return net(x, t, **cond)
        finally:
            swap(pairs)
            reshard(net)

    return call


def swap(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Exchange the contents of tensors."""
    for a, b in pairs:
        held = a.clone()
        a.copy_(b)
        b.copy_(held)


def reshard(net: nn.Module) -> None:
    """Forget gathered weights, so that net's parameters are shards again: with --shard grad a call
    without gradients leaves them gathered, and they would grow stale."""
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def evenly(jobs: list[Any], ranks: int) -> list[Any]:
    """Jobs that are dealt out to ranks, the first of them repeated until each gets as many."""
    return list(islice(cycle(jobs), -(-len(jobs) // ranks) * ranks))
