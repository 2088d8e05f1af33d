"""diffusers' network with the weights of one of ours: the peer of train_cpu.py and kernels.bench, the oracle of tests/test_model.py."""

import torch

from ckpt.layouts import diffusers_config, to_foreign
from model import UNet


def peer_unet(net: UNet) -> torch.nn.Module:
    """The UNet2DModel or UNet2DConditionModel that computes the same function as `net`."""
    import diffusers
    config = diffusers_config(net.cfg)
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    peer.load_state_dict({foreign: part for name, value in net.state_dict().items() for foreign, part in to_foreign(net.cfg, "diffusers", name, value)})
    return peer
