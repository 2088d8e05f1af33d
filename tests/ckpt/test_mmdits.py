"""Transformers' files of other programs: spelled names, exact ways there and back, refusals."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import samplers
from ckpt import convert, load_like, load_unet, read_tensors, save_unet
from ckpt.convert import inspect, verify
from ckpt.diffusers import diffusers_config, from_diffusers_config
from ckpt.layouts import foreign_names, foreign_shapes, native_shapes, to_foreign, to_native
from ckpt.mmdit_configs import usual_shift
from harness.cli import UserError
from harness.files import text_meta
from mmdit import PRESETS, MMDiT, MMDiTConfig
from mmdit_cases import SMALL, filled, peer_of, told
from model import PRESETS as ALL

# Small ones whose files say what they are: heads of the families' own sizes.
FILES = {
    "dit": SMALL["sit"],
    "sit": replace(SMALL["sit"], reversed_time=True),
    "sd3": replace(SMALL["sd3"], width=128),
    "sd3.5": SMALL["sd3.5"],
    "flux1": replace(SMALL["flux1"], width=256, rope=(16, 56, 56), joint=1, single=1),
    "flux2": replace(SMALL["klein"], width=256, rope=(32, 32, 32, 32), joint=1, single=1),
}
FLAGS = {"dit": dict(num_heads=2, objective="eps"), "sit": dict(num_heads=2, objective="fm")}
IN_DIFFUSERS = ("sd3", "sd3.5", "flux1", "flux2")


def authors(net: MMDiT, prefix: str = "") -> dict[str, torch.Tensor]:
    """A network's tensors as its authors' files have them."""
    return {
        prefix + name: tensor.contiguous()
        for key, value in net.state_dict().items()
        for name, tensor in to_foreign(net.cfg, "native", key, value)
    }


def written(folder, name: str, prefix: str = "", dtype=torch.float32):
    net, path = filled(FILES[name], dtype), folder / f"{name}.safetensors"
    save_file(authors(net, prefix), path)
    return net, path


def same(a: MMDiT, b: MMDiT) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def both(*modules: str) -> set[str]:
    return {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


# ---- names, spelled -----------------------------------------------------------------------------


def test_flux_1s_names_are_those_of_its_authors():
    wanted = both("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1")
    for told in ("time_in", "vector_in", "guidance_in"):
        wanted |= both(f"{told}.in_layer", f"{told}.out_layer")
    for kind in ("img", "txt"):
        place = f"double_blocks.0.{kind}"
        wanted |= both(f"{place}_attn.qkv", f"{place}_attn.proj", f"{place}_mod.lin")
        wanted |= both(f"{place}_mlp.0", f"{place}_mlp.2")
        wanted |= {f"{place}_attn.norm.{part}_norm.scale" for part in ("query", "key")}
    inner = ("linear1", "linear2", "modulation.lin")
    wanted |= both(*(f"single_blocks.0.{name}" for name in inner))
    wanted |= {f"single_blocks.0.norm.{part}_norm.scale" for part in ("query", "key")}
    assert set(foreign_names(FILES["flux1"], "native")) == wanted


def test_flux_2s_names_are_those_of_its_authors():
    wanted = {"img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    wanted |= {"time_in.in_layer", "time_in.out_layer", "single_stream_modulation.lin"}
    wanted |= {f"double_stream_modulation_{kind}.lin" for kind in ("img", "txt")}
    norms = set()
    for kind in ("img", "txt"):
        place = f"double_blocks.0.{kind}"
        wanted |= {f"{place}_attn.qkv", f"{place}_attn.proj", f"{place}_mlp.0", f"{place}_mlp.2"}
        norms |= {f"{place}_attn.norm.{part}_norm.scale" for part in ("query", "key")}
    wanted |= {"single_blocks.0.linear1", "single_blocks.0.linear2"}
    norms |= {f"single_blocks.0.norm.{part}_norm.scale" for part in ("query", "key")}
    names = {f"{name}.weight" for name in wanted} | norms
    assert set(foreign_names(FILES["flux2"], "native")) == names


def test_sd3s_and_dits_names_are_those_of_their_authors():
    cfg = replace(FILES["sd3.5"], joint=2, dual=1)
    wanted = {"pos_embed"} | both("x_embedder.proj", "context_embedder")
    wanted |= both("final_layer.linear", "final_layer.adaLN_modulation.1")
    wanted |= both(*(f"{kind}_embedder.mlp.{i}" for kind in "ty" for i in (0, 2)))
    for i in range(2):
        image = ("attn", "attn2") if i == 0 else ("attn",)
        streams = {"x_block": image, "context_block": ("attn",)}
        for stream, attentions in streams.items():
            place = f"joint_blocks.{i}.{stream}"
            wanted |= both(f"{place}.adaLN_modulation.1")
            for attn in attentions:
                wanted |= both(f"{place}.{attn}.qkv")
                wanted |= {f"{place}.{attn}.ln_{part}.weight" for part in "qk"}
            if (i, stream) != (1, "context_block"):
                wanted |= both(*(f"{place}.{attn}.proj" for attn in attentions))
                wanted |= both(f"{place}.mlp.fc1", f"{place}.mlp.fc2")
    assert set(foreign_names(cfg, "native")) == wanted == set(native_shapes(cfg))
    dit = {"pos_embed", "y_embedder.embedding_table.weight"} | both("x_embedder.proj")
    dit |= both("t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear")
    dit |= both("final_layer.adaLN_modulation.1")
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    dit |= both(*(f"blocks.{i}.{name}" for i in range(2) for name in inner))
    assert set(foreign_names(FILES["dit"], "native")) == dit


COUNTS = {
    "sd3-medium": (491, 683),
    "sd3.5-medium": (665, 909),
    "sd3.5-large": (923, 1227),
    "flux1-dev": (780, 1160),
    "flux1-schnell": (776, 1156),
    "flux2-dev": (299, 331),
    "flux2-klein-4b": (149, 169),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_released_network_has_as_many_tensors(name):
    found = [len(foreign_names(PRESETS[name], layout)) for layout in ("native", "diffusers")]
    assert tuple(found) == COUNTS[name]


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_the_maps_are_inverses(name, layout):
    """Of numbers that are all different, whatever is exchanged would show."""
    cfg, start = FILES[name], 0
    own = {}
    for key, shape in native_shapes(cfg).items():
        n = torch.Size(shape).numel()
        own[key] = torch.arange(start, start + n, dtype=torch.float64).view(shape)
        start += n
    foreign = {}
    for key, value in own.items():
        foreign |= dict(to_foreign(cfg, layout, key, value))
    assert {k: tuple(v.shape) for k, v in foreign.items()} == foreign_shapes(cfg, layout)
    assert all(torch.equal(to_native(cfg, layout, key, foreign), own[key]) for key in own)


@pytest.mark.parametrize("name", FILES)
def test_an_authors_file_is_read_and_written_again(name, tmp_path):
    net, path = written(tmp_path, name, prefix="model.diffusion_model.")
    again, meta = load_unet(path, **FLAGS.get(name, {}))
    assert again.cfg == net.cfg and same(again, net)
    assert meta["family"] == name
    convert(path, tmp_path / "again.safetensors", "native", **FLAGS.get(name, {}))
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    bare = {key.removeprefix("model.diffusion_model."): value for key, value in before.items()}
    assert bare.keys() == after.keys() and all(torch.equal(bare[key], after[key]) for key in bare)
    own, _ = load_unet(tmp_path / "again.safetensors")
    assert own.cfg == net.cfg and same(own, net)


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_diffusers_loads_what_is_converted(name, tmp_path):
    import diffusers

    net, path = written(tmp_path, name, dtype=torch.bfloat16)
    convert(path, tmp_path / "folder", "diffusers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    peer, found = getattr(diffusers, config["_class_name"]).from_pretrained(
        tmp_path / "folder", output_loading_info=True, torch_dtype=torch.bfloat16
    )
    assert not any(found.values())
    assert peer.state_dict().keys() == foreign_names(net.cfg, "diffusers").keys()
    again, _ = load_unet(tmp_path / "folder")
    assert again.cfg == net.cfg and same(again, net)
    # As diffusers itself writes it, without our metadata.
    peer.save_pretrained(tmp_path / "theirs")
    theirs, _ = load_unet(tmp_path / "theirs")
    # It keeps the table of places in fp32.
    assert theirs.cfg == net.cfg and same(theirs.bfloat16(), net)
    assert verify(str(path), str(tmp_path / "folder"))[0]


def test_a_pipeline_of_shards_is_one_network(tmp_path):
    """As diffusers keeps SD3 and Flux, its scheduler beside it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    net = filled(FILES["flux1"], torch.float32)
    peer = peer_of(net)
    peer.save_pretrained(tmp_path / "transformer", max_shard_size="5MB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    again, meta = load_unet(tmp_path)
    assert again.cfg == net.cfg and same(again, net)
    assert meta["objective"] == "fm" or meta["objective"]["target"] == "u"
    assert "scheduler_config.json" in str(meta["said"])
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    refused(lambda: load_unet(tmp_path, objective="eps"), "its objective is fm", "got eps")


def test_sits_file_points_from_noise_to_data(tmp_path):
    """By its authors' convention: t = 1 is data, unscaled, and the velocity dx/dt is against it."""
    sit = filled(FILES["dit"])  # what they would compute at their own time
    path = tmp_path / "sit.safetensors"
    save_file({key: value.contiguous() for key, value in sit.state_dict().items()}, path)
    net, meta = load_unet(path, num_heads=2, objective="fm")
    inputs = told(sit.cfg)
    theirs = {**inputs, "t": 1 - inputs["t"].float() / 1000}
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(**inputs), -sit(**theirs), rtol=0, atol=1e-12)
    dit, _ = load_unet(path, num_heads=2, objective="eps")
    assert same(dit, sit) and not dit.cfg.reversed_time


def test_a_sits_file_is_sampled(tmp_path, user):
    net = filled(replace(FILES["sit"], in_channels=12, out_channels=24), torch.float32)
    save_file(authors(net), tmp_path / "sit.safetensors")
    words = ["--ckpt", tmp_path / "sit.safetensors", "--num-heads", "2", "--vae", "pixel:2"]
    words += ["--resolution", "24", "--n", "2", "--steps", "2", "--labels", "1"]
    words += ["--out", tmp_path / "s", "--device", "cpu"]
    code, out, err = user(samplers.main, *words, "--objective", "fm")
    assert code == 0 and (tmp_path / "s-grid.png").is_file(), err
    code, _, err = user(samplers.main, *words)
    assert code == 2 and "Add --objective fm (SiT) or eps (DiT)" in err[-1]


def test_a_transformer_without_classes_is_led_away_from_nothing(tmp_path, user):
    cfg = replace(FILES["sit"], in_channels=12, out_channels=24, num_classes=0)
    save_file(authors(filled(cfg, torch.float32)), tmp_path / "sit.safetensors")
    words = ["--ckpt", tmp_path / "sit.safetensors", "--num-heads", "2", "--vae", "pixel:2"]
    words += ["--resolution", "24", "--objective", "fm", "--out", tmp_path / "s", "--cfg", "2"]
    code, _, err = user(samplers.main, *words)
    assert code == 2 and "this checkpoint was trained without classes.  Leave --cfg out" in err[-1]


@pytest.mark.parametrize("name", FILES)
def test_inspect_says_what_it_is(name, tmp_path):
    _, path = written(tmp_path, name)
    lines = "\n".join(inspect(str(path), **FLAGS.get(name, {})))
    assert f"family       {name}\n" in lines and "layout       native" in lines


def test_inspect_says_with_which_shift_the_authors_sample(tmp_path):
    _, path = written(tmp_path, "flux1")
    assert "sampled      --shift 3.158 for 1024 px in 28 steps" in "\n".join(inspect(str(path)))
    shifts = {name: usual_shift(PRESETS[name], 32, 32, 4) for name in PRESETS}
    assert shifts["sd3-medium"] == shifts["sd3.5-large"] == 3
    assert shifts["flux1-schnell"] == shifts["sit-xl"] == 1
    assert shifts["flux1-dev"] == pytest.approx(math.exp(0.5))
    assert shifts["flux2-dev"] == pytest.approx(7.14, abs=0.005)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("sit")])
def test_a_presets_config_survives_diffusers(name):
    assert from_diffusers_config(diffusers_config(PRESETS[name])) == PRESETS[name]


# ---- refusals -----------------------------------------------------------------------------------


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_a_file_cannot_say_is_asked_for(tmp_path):
    _, path = written(tmp_path, "dit")
    flags = dict(num_heads=2, objective="eps")
    refused(lambda: load_unet(path, num_heads=2), "same tensors", "--objective fm (SiT) or eps")
    refused(lambda: load_unet(path, objective="eps"), "attention heads", "--num-heads")
    refused(lambda: load_unet(path, attention_order="new", **flags), "one order")


def test_what_reads_text_is_flow_matching(tmp_path):
    _, path = written(tmp_path, "flux1")
    refused(lambda: load_unet(path, objective="eps"), "flow matching", "got eps")


@pytest.mark.parametrize("kind", ["fp8", "nf4", "int8"])
def test_quantised_files_are_refused_by_their_numbers(kind, tmp_path):
    net = filled(FILES["flux1"], torch.float32)
    tensors, name = authors(net), "single_blocks.0.linear1.weight"
    if kind == "fp8":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    elif kind == "int8":
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    else:
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(4)
    save_file(tensors, tmp_path / "net.safetensors")
    dtype = {"fp8": "float8_e4m3fn", "nf4": "uint8", "int8": "int8"}[kind]
    refused(lambda: load_unet(tmp_path / "net.safetensors"), f"quantised ({dtype})", "bf16")


def test_a_gguf_file_is_none_of_ours(tmp_path):
    (tmp_path / "flux1-dev-Q4_K.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(lambda: load_unet(tmp_path / "flux1-dev-Q4_K.gguf"), "quantised", "bf16")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_tensor_less_or_more_is_refused(name, tmp_path):
    net, path = written(tmp_path, name)
    tensors = load_file(path)
    last = "final_layer.adaLN_modulation.1.weight"
    save_file({k: v for k, v in tensors.items() if k != last}, tmp_path / "less.safetensors")
    save_file({**tensors, "final_layer.more": tensors[last].clone()}, tmp_path / "more.safetensors")
    flags = FLAGS.get(name, {})
    refused(lambda: load_unet(tmp_path / "less.safetensors", **flags), "missing", last)
    refused(lambda: load_unet(tmp_path / "more.safetensors", **flags), "final_layer.more")


# theta is of rotations, of which this one has none.
@pytest.mark.parametrize("name", [f.name for f in fields(MMDiTConfig) if f.name != "theta"])
def test_a_damaged_config_is_one_line(name, tmp_path):
    path = tmp_path / "net.safetensors"
    save_unet(path, filled(SMALL["sit"], torch.float32), {})
    tensors, meta = read_tensors(path)
    for value in ("x", -1, 0, 10**12, 1.5, None, [1], [64, 64, 64, 64], True):
        if meta["unet"][name] == value:
            continue
        altered = {**meta, "unet": {**meta["unet"], name: value}}
        save_file(tensors, path, metadata=text_meta(altered))
        refused(lambda: load_unet(path), "net.safetensors")


def test_another_presets_file_is_refused_by_name(tmp_path):
    save_unet(tmp_path / "net.safetensors", MMDiT(PRESETS["sit-nano"]), {})
    refused(
        lambda: load_like(tmp_path / "net.safetensors", PRESETS["sit-tiny"], "sit-tiny"),
        "width 64", "--model sit-tiny is", "width 192", "(--model sit-nano)",
    )  # fmt: skip
    refused(
        lambda: load_like(tmp_path / "net.safetensors", ALL["tiny"], "tiny"), "network MMDiT"
    )


def test_another_presets_file_is_refused_by_shape(tmp_path):
    """Files that say nothing of themselves; of a DiT's, once it is said that it is one."""
    _, flux = written(tmp_path, "flux1")
    refused(
        lambda: load_like(flux, PRESETS["sd3-medium"], "sd3-medium"),
        "it has width 256, heads 2, joint 1", "--model sd3-medium is width 1536, heads 24",
    )  # fmt: skip
    net, dit = written(tmp_path, "dit")
    refused(lambda: load_like(dit, net.cfg, "dit"), "for --init, convert the file with it first")
    convert(dit, tmp_path / "own.safetensors", "native", **FLAGS["dit"])
    deeper = replace(net.cfg, blocks=3)
    refused(lambda: load_like(tmp_path / "own.safetensors", deeper, "deeper"), "it has blocks 2")
    assert same(load_like(tmp_path / "own.safetensors", net.cfg, "dit")[0], net)


def test_diffusers_is_not_given_what_it_computes_otherwise(tmp_path):
    _, path = written(tmp_path, "dit")
    refused(
        lambda: convert(path, tmp_path / "out", "diffusers", **FLAGS["dit"]), "other frequencies"
    )
    for change in (dict(tokens="cpq"), dict(text_axis=0), dict(bias=False)):
        name = "flux2" if "text_axis" in change else "sd3"
        refused(
            lambda: diffusers_config(replace(FILES[name], **change)), "has no", next(iter(change))
        )


def test_a_config_of_diffusers_that_means_another_network_is_refused():
    sd3, flux = diffusers_config(FILES["sd3.5"]), diffusers_config(FILES["flux2"])
    for config, change, word in (
        (sd3, {"dual_attention_layers": [0, 2]}, "dual_attention_layers"),
        (sd3, {"qk_norm": "layer_norm"}, "qk_norm"),
        (flux, {"eps": 1e-5}, "eps = 1e-05"),
        (flux, {"mlp_ratio": 3.5}, "mlp_ratio"),
        (flux, {"num_layer": 3}, "num_layers"),
        (flux, {"num_layers": "8"}, "joint"),
        (flux, {"num_layers": 10**9}, "joint"),
        (flux, {"attention_head_dim": [1]}, "Restore"),
    ):
        refused(lambda: from_diffusers_config(config | change), word)
