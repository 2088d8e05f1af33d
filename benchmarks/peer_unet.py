"""diffusers' network with the weights of one of ours.

The peer of train_cpu.py and kernels.py, the oracle of the model's tests.
"""

import torch

from ckpt.diffusers import diffusers_config
from ckpt.layouts import to_foreign
from model import UNet


def peer_unet(net: UNet) -> torch.nn.Module:
    """The UNet2DModel or UNet2DConditionModel that computes the same function as `net`."""
    import diffusers

    config = diffusers_config(net.cfg)
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    state = {}
    for name, value in net.state_dict().items():
        state |= dict(to_foreign(net.cfg, "diffusers", name, value))
    peer.load_state_dict(state)
    return peer
