"""Local heads: 1×1 convolutions that predict the student's target from each of its blocks."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from harness.ranks import Ranks
from harness.seeds import torch_seed


class LocalHeads:
    """Heads by block name, with an optimizer of their own. Ranks share the gradient."""

    def __init__(
        self,
        channels: dict[str, int],
        out: int,
        ranks: Ranks,
        *,
        seed: int,
        lr: float,
        weight_decay: float,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed))
            convolutions = {name: nn.Conv2d(C, out, 1) for name, C in channels.items()}
        self.ranks = ranks
        self.net = nn.ModuleDict(convolutions).to(ranks.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=weight_decay)

    def losses(self, features: dict[str, Tensor], goal: Tensor) -> Tensor:
        """Features {block: (B, C, h, w)}, goal (B, out, H, W) -> each head's mean squared error
        (n,), fp32."""
        found = []
        with torch.autocast(goal.device.type, enabled=False):
            for name, head in self.net.items():
                h = features[name]
                small = F.interpolate(goal, h.shape[2:], mode="bilinear")
                found.append(F.mse_loss(head(h.float()), small))
        return torch.stack(found)

    def step(self, lr: float) -> None:
        """After the network's own step. A gradient that is not finite is dropped, as there."""
        gradients = [p.grad for p in self.net.parameters()]
        for gradient in gradients:
            gradient.copy_(self.ranks.all_reduce(gradient) / self.ranks.world)
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """{"heads/NAME": weights, "head_exp_avg/NAME": of the optimizer, …}."""
        state = {}
        for name, p in self.net.named_parameters():
            state[f"heads/{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"head_{key}/{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        params = dict(self.net.named_parameters())
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind == "heads":
                params[name].data.copy_(value)
            else:  # AdamW counts its steps on the CPU
                device = "cpu" if kind == "head_step" else self.ranks.device
                entry = self.optimizer.state[params[name]]
                entry[kind.removeprefix("head_")] = value.to(device, copy=True)
