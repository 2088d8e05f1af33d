"""What the log of a distillation says of the steps since its last line."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from harness.ranks import Ranks

# Of each block; the last three come from an assessor.
METRICS = ("lambda", "clipped", "kd", "e_t", "e_p", "coh")
# When is a third of the timesteps too important? MOST: its share of the gradient, if that is so
# much MORE than it would be unweighted. TARGET: its share, whatever the reason.
MOST, MORE, TARGET = 0.5, 0.15, 0.7
WHERE = ("next to data", "in the middle", "next to noise")
WHY = {
    "weighting": "The way times are drawn and weighed does it.",
    "target": "The target itself is largest there; --weight min_snr weighs noise down.",
}


class Tally:
    """Sums over samples and steps; every rank has its own until they are reported or saved.

    blocks: names; assessed: is there an assessor, whose metrics are worth a word; bins: of the
    times drawn; alarms: is a third of the timesteps with most of the gradient worth a warning.
    """

    def __init__(
        self, blocks: list[str], ranks: Ranks, *, assessed: bool, bins: int, alarms: bool = True
    ):
        self.names, self.ranks, self.alarms = blocks, ranks, alarms
        self.known = METRICS if assessed else METRICS[:3]
        self.alarmed = False
        shapes = {
            "blocks": (len(blocks), len(METRICS)),
            "batches": (1,),
            "share": (1,),  # of the blocks' losses in the loss
            "times": (bins,),
            "thirds": (3, 3),  # norms of the gradient, of the error, counts; by third
        }
        zeros = dict(dtype=torch.float64, device=ranks.device)
        self.sums = {name: torch.zeros(shape, **zeros) for name, shape in shapes.items()}

    def add_blocks(self, metrics: Tensor, flow: Tensor, total: Tensor) -> None:
        """METRICS of each block (n, 6), and what of the loss `total` is not the blocks'.

        A step that is not finite is skipped, so the log does not count it either.
        """
        good = torch.isfinite(total)
        self.sums["blocks"] += finite(metrics) * good
        self.sums["batches"] += finite(torch.ones_like(flow)) * good
        self.sums["share"] += finite(1 - flow / total) * good

    def add_times(self, t: Tensor, thirds: Tensor, gradient: Tensor, error: Tensor) -> None:
        """Times t (B,) and which third of the schedule each is in, the norms (B,) of the loss's
        gradient at the output, and of the error itself."""
        bins = len(self.sums["times"])
        ones = torch.ones_like(t, dtype=torch.float64)
        self.sums["times"].index_add_(0, (t * bins).long().clamp(max=bins - 1), ones)
        good = torch.isfinite(gradient) & torch.isfinite(error)
        values = torch.stack([gradient, error, torch.ones_like(error)])
        self.sums["thirds"].index_add_(1, thirds, finite(values * good))

    def report(self) -> dict[str, Any]:
        """For the training line: times drawn, the blocks' metrics, shares of the gradient by third.

        Starts again from zero. Every rank calls it.
        """
        sums = self.totals()
        for value in self.sums.values():
            value.zero_()
        row: dict[str, Any] = {"t_drawn": [int(n) for n in sums["times"].tolist()]}
        if batches := float(sums["batches"]):
            row["block_share"] = float(sums["share"]) / batches
            row["blocks"] = {
                name: dict(zip(self.known, (values / batches).tolist()))
                for name, values in zip(self.names, sums["blocks"])
            }
        used, plain, counts = sums["thirds"]
        if float(used.sum()) > 0 and bool(torch.isfinite(used).all()):
            # As if all thirds were drawn alike and nothing weighed.
            even = plain / counts.clamp(min=1)
            row |= self.thirds(used / used.sum(), even / even.sum())
        return row

    def thirds(self, share: Tensor, even: Tensor) -> dict[str, Any]:
        """Each third's share of the gradient (3,), what it would be unweighted, and the alarm."""
        worst = int(share.argmax())
        alarm = ""
        if share[worst] > MOST and share[worst] > even[worst] + MORE:
            alarm = "weighting"
        elif share[worst] > TARGET:
            alarm = "target"
        if not self.alarms:
            alarm = ""
        if alarm and not self.alarmed and self.ranks.rank == 0:
            tqdm.write(
                f"warning: {share[worst]:.0%} of the gradient comes from the third of the "
                f"timesteps {WHERE[worst]}, {even[worst]:.0%} if all were drawn and weighed alike."
                f"  {WHY[alarm]}"
            )
        self.alarmed = self.alarmed or bool(alarm)
        return {
            "gradient_by_third": share.tolist(),
            "gradient_by_third_unweighted": even.tolist(),
            "alarm": alarm,
        }

    def totals(self) -> dict[str, Tensor]:
        """The sums of all ranks, on the CPU."""
        return {name: self.ranks.all_reduce(v.clone()).cpu() for name, v in self.sums.items()}

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"tally/{name}": value for name, value in self.totals().items()}
        state["alarmed/"] = torch.tensor(self.alarmed)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The sums were all ranks': rank 0 takes them."""
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind == "alarmed":
                self.alarmed = bool(value)
            else:
                own = value if self.ranks.rank == 0 else torch.zeros_like(value)
                self.sums[name].copy_(own)


def finite(x: Tensor) -> Tensor:
    """x as float64, with 0 for what is not finite."""
    return x.double().nan_to_num(0.0, 0.0, 0.0)
