"""The U-Net that reads bytes: its hashes against words cut in Python, its ids against UTF-8, its
file against itself."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import randomize

from ckpt import load_unet, save_unet
from ckpt.byteunet import MODULUS, PAD, ByteEncoder, byte_config, byte_ids, word_hashes
from ckpt.configs import config_from
from ckpt.convert import convert, inspect
from harness.cli import UserError
from model import PRESETS, UNet, build

TEXTS = ["Red hair, glasses", "", "Zoë 🙂, 赤い", "a  b c;d e", "x" * 300]
TEXTS += [" (red) hair  ", "2 cats"]
NANO = byte_config(replace(PRESETS["nano"], in_channels=4, out_channels=4), 32)


def test_ids_are_the_bytes_of_utf8_then_padding():
    for row, text in zip(byte_ids(TEXTS).tolist(), TEXTS, strict=True):
        size = min(len(text.encode()), 256)
        assert bytes(row[:size]) == text.encode()[:size]
        assert set(row[size:]) <= {PAD}
    assert byte_ids(["é" * 40], 8).tolist() == [list("éééé".encode())]


def number(data):
    """The hash of bytes, one after the other."""
    return sum((byte + 1) * pow(1_000_003, k, MODULUS) for k, byte in enumerate(data)) % MODULUS


def test_hashes_are_those_of_words_and_of_two_with_one_space_between():
    words, pairs = word_hashes(byte_ids(TEXTS))
    for row, both, text in zip(words.tolist(), pairs.tolist(), TEXTS, strict=True):
        data = text.encode()[:256].lower()
        wanted, wanted_pairs = [-1] * 256, [-1] * 256
        found = list(re.finditer(rb"[a-z0-9\x80-\xff]+", data))
        for match in found:
            wanted[match.end() - 1] = number(match[0])
        for before, match in zip(found, found[1:]):
            if data[before.end() : match.start()] == b" ":
                wanted_pairs[match.end() - 1] = number(data[before.start() : match.end()])
        assert row == wanted
        assert both == wanted_pairs
    assert (pairs >= 0).sum() == 5  # red hair, Zoë 🙂, b c, d e, 2 cats


def test_a_text_is_the_sum_of_its_words_and_pairs():
    net = randomize(ByteEncoder(NANO)).double()
    said = net(byte_ids(TEXTS))
    words = [net.words.weight[number(word) % 2048] for word in (b"red", b"hair", b"glasses")]
    wanted = sum(words) + net.pairs.weight[number(b"red hair") % 2048]
    torch.testing.assert_close(said[0], wanted, rtol=0, atol=1e-12)
    assert not said[1].any()
    longer = net(byte_ids(["glasses, red hair", "glasses, RED HAIR", "hair red, glasses"], 64))
    torch.testing.assert_close(longer[:2], said[:1].expand(2, -1), rtol=0, atol=1e-12)
    assert (longer[2] - said[0]).abs().max() > 1e-3


def inputs(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, 4, 4, generator=g).double(), torch.full((n,), 300.0).double()


def test_it_is_a_unet_that_is_told_what_its_encoder_says():
    net = randomize(build(NANO)).double().eval()
    plain = UNet(replace(PRESETS["nano"], in_channels=4, out_channels=4, vector_dim=32)).double()
    weights = net.state_dict()
    own = {name: weights.pop(name) for name in list(weights) if name.startswith("text.")}
    plain.load_state_dict(weights)
    assert sorted(own) == ["text.pairs.weight", "text.words.weight"]
    texts = TEXTS[:3]
    (x, t), ids = inputs(3), byte_ids(texts)
    out = net(x, t, context=ids)
    torch.testing.assert_close(out, plain(x, t, net.text(ids)), rtol=0, atol=0)
    assert (out - net(x, t, context=ids.roll(1, 0))).abs().max() > 1e-3
    for i, text in enumerate(texts):
        alone = net(x[i : i + 1], t[:1], context=byte_ids([text]))[0]
        torch.testing.assert_close(out[i], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("context", [None, byte_ids(TEXTS[:3], 64), torch.zeros(3, 256)])
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
    assert "text_places=256" in shown and "told by      the bytes of a text" in shown
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
        ({"text_rows": 0}, "text_rows"),
        ({"text_places": 0}, "text_places"),
        ({"context_dim": 64}, "context_dim"),
        ({"vector_dim": 0}, "vector_dim"),
        ({"num_res_blocks": 10**4}, "num_res_blocks"),
    ],
)
def test_a_damaged_config_ends_in_a_message(value, wrong):
    values = {name: getattr(NANO, name) for name in NANO.__dataclass_fields__}
    with pytest.raises(ValueError, match=wrong):
        config_from(type(NANO), values | value)
