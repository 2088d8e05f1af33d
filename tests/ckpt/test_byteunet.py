"""The U-Net that reads bytes: its encoder against torch's own layers, its ids against UTF-8, its
file against itself."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize
from torch import nn

from ckpt import load_unet, save_unet
from ckpt.byteunet import GRAMS, PAD, ByteEncoder, byte_config, byte_ids, gram_rows
from ckpt.configs import config_from
from ckpt.convert import convert, inspect
from harness.cli import UserError
from model import PRESETS, UNet, build

TEXTS = ["red hair, glasses", "", "Zoë 🙂, 赤い"]
NANO = byte_config(replace(PRESETS["nano"], in_channels=4, out_channels=4), 32)


def test_ids_are_the_bytes_of_utf8_then_padding():
    for row, text in zip(byte_ids(TEXTS).tolist(), TEXTS, strict=True):
        size = len(text.encode())
        assert bytes(row[:size]).decode() == text
        assert set(row[size:]) == {PAD}
    assert byte_ids(["é" * 40], 8).tolist() == [list("éééé".encode())]


@pytest.mark.parametrize("length", GRAMS)
def test_a_place_has_the_row_of_the_bytes_that_end_there(length):
    rows, whole = gram_rows(byte_ids(TEXTS), length, 2048)
    for row, known, text in zip(rows.tolist(), whole.tolist(), TEXTS, strict=True):
        data = text.encode()
        for place in range(128):
            inside = length - 1 <= place < len(data)
            assert known[place] == inside
            if inside:
                number = 0
                for byte in data[place - length + 1 : place + 1]:
                    number = number * 1_000_003 + byte + 1
                assert row[place] == number % (2**31 - 1) % 2048


def test_an_embedding_is_the_sum_of_its_rows():
    net = ByteEncoder(NANO)
    ids = byte_ids(["ab" * 4])
    x = net.token(ids)[0] + net.position
    for length, table in zip(GRAMS, net.grams, strict=True):
        rows, _ = gram_rows(ids, length, 2048)
        for place in range(length - 1, 8):
            x[place] = x[place] + table(rows[0, place])
    torch.testing.assert_close(net.embed(ids)[0], x, rtol=0, atol=1e-5)


def test_encoder_is_torchs_transformer():
    torch.manual_seed(0)
    net = ByteEncoder(replace(NANO, text_heads=4)).double()
    ids = byte_ids(TEXTS)
    x = net.embed(ids)
    for layer in net.layers:
        peer = nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        ).double()
        names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear": "fc"}
        state = {}
        for name in peer.state_dict():
            ours = name
            for theirs, own in names.items():
                ours = ours.replace(theirs, own)
            state[name] = layer.state_dict()[ours]
        peer.load_state_dict(state)
        x = peer(x)
    torch.testing.assert_close(net(ids)[0], net.norm(x), rtol=0, atol=1e-12)


def inputs(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, 4, 4, generator=g).double(), torch.full((n,), 300.0).double()


def test_it_is_a_unet_that_is_told_what_its_encoder_says():
    net = randomize(build(NANO)).double().eval()
    told = {"context_dim": 32, "vector_dim": 32}
    plain = UNet(replace(PRESETS["nano"], in_channels=4, out_channels=4, **told)).double()
    weights = net.state_dict()
    own = {name: weights.pop(name) for name in list(weights) if name.startswith("text.")}
    plain.load_state_dict(weights)
    # Two layers; bytes, four tables of n-grams, places, and the last norm's two.
    assert len(own) == 2 * 12 + 8
    (x, t), ids = inputs(3), byte_ids(TEXTS)
    out = net(x, t, context=ids)
    context, mean = net.text(ids)
    torch.testing.assert_close(out, plain(x, t, mean, context), rtol=0, atol=0)
    for row, text, vectors in zip(mean, TEXTS, context, strict=True):
        wanted = vectors[: len(text.encode())].mean(0) if text else torch.zeros(32).double()
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-12)
    assert (out - net(x, t, context=ids.roll(1, 0))).abs().max() > 1e-3
    for i, text in enumerate(TEXTS):
        alone = net(x[i : i + 1], t[:1], context=byte_ids([text]))[0]
        torch.testing.assert_close(out[i], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("context", [None, byte_ids(TEXTS, 64), torch.zeros(3, 128)])
def test_other_things_than_ids_are_refused(context):
    with pytest.raises(ValueError, match="wanted byte ids"):
        build(NANO)(*(x.float() for x in inputs(3)), context=context)


def test_its_file_says_what_it_is_and_loads_strictly(tmp_path):
    net = randomize(build(NANO))
    save_unet(tmp_path / "a.safetensors", net, {})
    other, meta = load_unet(tmp_path / "a.safetensors")
    assert (other.cfg, meta["network"]) == (NANO, "ByteUNet")
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    shown = "\n".join(inspect(tmp_path / "a.safetensors"))
    assert "text_places=128" in shown and "told by      the bytes of a text" in shown
    assert "(--text)" not in shown
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "native")
    again, _ = load_unet(tmp_path / "b.safetensors")
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


def test_diffusers_has_no_such_network(tmp_path):
    plain = replace(NANO, resblock_updown=False)
    save_unet(tmp_path / "a.safetensors", randomize(build(plain)), {})
    with pytest.raises(UserError, match="a text encoder inside it"):
        convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")


@pytest.mark.parametrize(
    "value, wrong",
    [
        ({"text_layers": 10**6}, "text_layers"),
        ({"text_places": 0}, "text_places"),
        ({"text_heads": 3}, "do not split into 3 heads"),
        ({"context_dim": 0}, "context_dim"),
        ({"vector_dim": 16}, "vector_dim"),
        ({"num_res_blocks": 10**4}, "num_res_blocks"),
    ],
)
def test_a_damaged_config_ends_in_a_message(value, wrong):
    values = {name: getattr(NANO, name) for name in NANO.__dataclass_fields__}
    with pytest.raises(ValueError, match=wrong):
        config_from(type(NANO), values | value)
