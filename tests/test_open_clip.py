"""Text encoders of OpenCLIP's files (ViT-H, ViT-bigG) against OpenCLIP itself, in fp64."""

import importlib
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckpt.containers import open_weights
from ckpt.texts import encoders
from text import BOS, EOS, TextConfig, load_encoder
from fid_peers import PEERS
import text as text_py

# Beside FID's peers, where .ci/run puts it without what it depends on.
FOLDER = PEERS / "open_clip"
if not FOLDER.is_dir():
    pytest.skip(f"open_clip_torch is not in {PEERS.name}", allow_module_level=True)


@pytest.fixture
def towers(monkeypatch):
    """open_clip.transformer, without the rest of its package, which wants torchvision; of that the
    text tower uses nothing."""
    package = ModuleType("open_clip")
    package.__path__ = [str(FOLDER)]
    vision = ModuleType("torchvision.ops.misc")
    vision.FrozenBatchNorm2d = nn.Module
    stubs = {"torchvision": ModuleType("torchvision"), "torchvision.ops": ModuleType("ops")}
    for name, module in {"open_clip": package, "torchvision.ops.misc": vision, **stubs}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("open_clip.transformer")
    for name in [name for name in sys.modules if name.startswith("open_clip.")]:
        del sys.modules[name]


@pytest.mark.parametrize("width, heads, projection", [(32, 2, 32), (64, 4, 64)])
def test_every_state_and_the_pooled_output_are_open_clips(
    towers, tmp_path, monkeypatch, width, heads, projection
):
    torch.manual_seed(0)
    cfg = TextConfig(width, 3, heads, "gelu", projection, pad=0)
    peer = towers.TextTransformer(
        width=width, heads=heads, layers=3, output_dim=projection, pool_type="argmax",
        norm_layer=partial(nn.LayerNorm),
    )  # fmt: skip
    for p in peer.parameters():
        p.data.normal_(std=0.2)
    tensors = {f"cond_stage_model.model.{k}": v for k, v in peer.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    monkeypatch.setitem(text_py.TEXT_PRESETS, "tiny", cfg)
    box = open_weights(tmp_path / "a.safetensors")
    (part,) = encoders(box)
    net = load_encoder(box, part, torch.float32).double().eval()
    peer = peer.double().eval()
    ids = torch.randint(1, 40_000, (4, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    for row, end in enumerate((1, 5, 40, 76)):
        ids[row, end] = EOS
        ids[row, end + 1 :] = 0
    after = []
    for block in peer.transformer.resblocks:
        block.register_forward_hook(lambda module, args, out: after.append(out))
    with torch.no_grad():
        pooled = peer(ids)
        ours, states = net(ids), net.states(ids)
    for mine, theirs in zip(states[1:], after, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.last, peer.ln_final(after[-1]), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-9)
