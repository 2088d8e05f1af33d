"""A latent consistency model's U-Net: it is told the strength of guidance that it was distilled
with, and so draws in one call a step what guidance draws in two (Luo et al. 2023, section 4.2).

    net = LCMUNet(cfg)
    net(x, t, context=tokens, guidance=torch.tensor([7.5, 3.0]))    # of each image

Who imports this file finds the network in model.NETWORKS.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model import NETWORKS, UNet, UNetConfig, check_shape, timestep_embedding

WAVES = 256  # of the strength


@dataclass(frozen=True)
class LCMUNetConfig(UNetConfig):
    """A U-Net that is told a strength of guidance beside the time."""

    guidance: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.guidance:
            raise ValueError("guidance is False: such a network is a UNet.")


class LCMUNet(UNet):
    def __init__(self, cfg: LCMUNetConfig):
        super().__init__(cfg)
        self.guidance_proj = nn.Linear(WAVES, cfg.model_channels, bias=False)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
        guidance: Tensor | None = None, features: tuple[str, ...] | None = None,
    ) -> Any:  # fmt: skip
        """As UNet's. guidance (B,): the strength, 1 = none; its waves join the time's."""
        check_shape("guidance", guidance, len(x))
        waves = timestep_embedding(1000 * (guidance.float() - 1), WAVES, like_ho=True)
        added = self.guidance_proj(waves.to(x.dtype))
        return super().forward(x, t, y, context, features, added)


NETWORKS["LCMUNet"] = (LCMUNet, LCMUNetConfig)
