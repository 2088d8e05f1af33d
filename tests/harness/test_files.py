"""Bytes on disk: any container is known by its content; damage is named; what is written is
safetensors, byte for byte."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
import types
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt.containers as containers
import harness.files as files
from ckpt import fingerprint, load_unet, save_unet
from harness.cli import UserError, explain
from conftest import randomize
from ckpt.convert import inspect
from harness.files import META, read_meta, stream_tensors, write_tensors
from ckpt.containers import open_weights
from ckpt.vaes import USUAL_VAE
from ckpt.hub import origin, resolve
from model import UNet, UNetConfig

CFG = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention=(1,),
    num_heads=2,
)


def some_tensors():
    g = torch.Generator().manual_seed(0)
    floats = {
        f"a.{d}".replace("torch.", ""): torch.randn(3, 5, generator=g).to(d)
        for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    return {
        **floats,
        "n": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        'ü " \\': torch.arange(4),
        "channels_last": torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last),
        "half": torch.ones(8)[::2],
    }


def equal(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in ((a[k], b[k]) for k in a)
    )


# ---- writing ------------------------------------------------------------------------------------


def test_an_empty_tensor_is_written_whatever_its_strides(tmp_path):
    import numpy as np

    for empty in (
        torch.from_numpy(np.array([], dtype=np.int32)),
        torch.empty(0, 3),
        torch.empty(2, 0).t(),
    ):
        write_tensors(tmp_path / "e", {"a": empty, "b": torch.ones(2)}, {})
        assert open_weights(tmp_path / "e")["a"].shape == empty.shape and torch.equal(
            open_weights(tmp_path / "e")["b"], torch.ones(2)
        )


def test_streamed_files_are_what_safetensors_itself_writes(tmp_path):
    tensors = {k: v.contiguous() for k, v in some_tensors().items()}
    for n, (chosen, meta) in enumerate(
        [(tensors, {}), (tensors, {"format": "pt"}), ({"x": torch.ones(3)}, {"k": 'ä\n"'})]
    ):
        save_file(chosen, tmp_path / f"{n}.theirs", metadata=meta or None)
        stream_tensors(
            tmp_path / f"{n}.ours",
            {k: (v.dtype, tuple(v.shape)) for k, v in chosen.items()},
            meta,
            chosen.__getitem__,
        )
        assert (tmp_path / f"{n}.ours").read_bytes() == (tmp_path / f"{n}.theirs").read_bytes()
    write_tensors(tmp_path / "all", some_tensors(), {"a": 1})
    assert equal(load_file(tmp_path / "all"), tensors) and equal(
        dict(open_weights(tmp_path / "all")), tensors
    )
    assert read_meta(open_weights(tmp_path / "all")) == {"a": 1}


def test_one_tensor_is_alive_at_a_time(tmp_path):
    """Between two that are neighbours in the file too: a loop variable would keep the first."""
    alive = []

    def make(name):
        assert not any(ref() is not None for ref in alive)
        tensor = torch.ones(5)
        alive.append(weakref.ref(tensor))
        return tensor

    class Lazy(dict):
        __getitem__ = staticmethod(make)

    stream_tensors(tmp_path / "x", dict.fromkeys("abc", (torch.float32, (5,))), {}, make)
    fingerprint(Lazy.fromkeys("abc"))
    assert len(alive) == 6


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(2)}, {})
    before = (tmp_path / "x").read_bytes()

    def get(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_tensors(tmp_path / "x", {"a": (torch.float32, (2,))}, {}, get)
    with pytest.raises(AssertionError, match="a: torch.float64"):
        stream_tensors(
            tmp_path / "x",
            {"a": (torch.float32, (2,))},
            {},
            lambda name: torch.ones(2, dtype=torch.float64),
        )
    assert (tmp_path / "x").read_bytes() == before and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", [None, "the temporary file"])
def test_no_space_left_says_for_which_file(tmp_path, name):
    """A write() that fails has no name; an open() that fails, that of a file nobody knows."""
    path = tmp_path / "card.json"
    with pytest.raises(OSError) as error, files.atomic(path) as temporary:
        raise OSError(28, "No space left on device", temporary if name else None)
    assert explain(error.value) == f"{path}: No space left on device."
    with pytest.raises(OSError) as error, files.atomic(path):
        raise OSError(2, "No such file or directory", "other.png")
    assert error.value.filename == "other.png"


def test_a_writer_never_touches_another_file_and_may_be_refused(tmp_path, monkeypatch):
    for name in ("x.tmp", "x.json.tmp", "x.part"):
        (tmp_path / name).write_text("the user's")
    write_tensors(tmp_path / "x", {"a": torch.ones(2)}, {})
    files.write_text(tmp_path / "x.json", "{}")
    before, listed = (tmp_path / "x").read_bytes(), sorted(os.listdir(tmp_path))
    assert (
        listed == ["x", "x.json", "x.json.tmp", "x.part", "x.tmp"]
        and (tmp_path / "x.tmp").read_text() == "the user's"
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*/x: No space left on device"):
        stream_tensors(tmp_path / "x", {"a": (torch.float32, (2,))}, {}, full)
    with pytest.raises(UserError, match="cannot write .*/x"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {}, check=full)
    assert (tmp_path / "x").read_bytes() == before and sorted(os.listdir(tmp_path)) == listed
    # 240 bytes: the temporary name is no longer.
    write_tensors(tmp_path / ("ü" * 120), {"a": torch.ones(2)}, {})
    with pytest.raises(UserError, match="Give a writable folder.$"):
        files.make_dir(tmp_path / "x" / "y")


# ---- sniffing -----------------------------------------------------------------------------------


def shard(folder, tensors, files_of):
    index = {"metadata": {"total_size": 1}, "weight_map": files_of}
    for file in set(files_of.values()):
        save_file(
            {k: v.contiguous() for k, v in tensors.items() if files_of[k] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def as_container(kind, tensors, folder):
    """The same tensors in every container we know, under a name that says something else."""
    plain = {k: v.contiguous() for k, v in tensors.items()}
    if kind == "safetensors named .ckpt":
        save_file(plain, folder / "x.ckpt")
        return folder / "x.ckpt"
    if kind == "sharded":
        return shard(
            folder,
            tensors,
            {k: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, k in enumerate(tensors)},
        )
    path = folder / "x.safetensors"
    boxed = (
        {"state_dict": tensors, "epoch": 3, "name": "x"}
        if "state_dict" in kind
        else {
            "student": tensors,
            "opt": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
            "gstep": 4,
        }
        if "student" in kind
        else tensors
    )
    torch.save(boxed, path, _use_new_zipfile_serialization="legacy" not in kind)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors named .ckpt",
        "zip pickle named .safetensors",
        "legacy pickle named .safetensors",
        "sharded",
        "zip pickle of a state_dict",
        "legacy pickle of a student beside its optimizer",
    ],
)
def test_the_content_decides_not_the_name(kind, tmp_path):
    box = open_weights(as_container(kind, some_tensors(), tmp_path))
    if "student" in kind:
        assert equal({"m": box["opt/state/0/m"]}, {"m": torch.ones(2)})
        box = box.over({k: v for k, v in box.table.items() if k.startswith("student/")})
    box = containers.unboxed(box)
    assert equal(dict(box), some_tensors())
    assert {k: (box.dtype(k), box.shape(k)) for k in box} == {
        k: (v.dtype, tuple(v.shape)) for k, v in some_tensors().items()
    }
    assert (
        box.kind
        == {
            "sha": "3 safetensors shards",
            "saf": "safetensors",
            "zip": "torch zip pickle",
            "leg": "torch legacy pickle",
        }[kind[:3]]
    )


def test_a_header_length_that_begins_like_a_pickle_is_still_a_header(tmp_path):
    for pad in range(300):  # the length is a multiple of 8: one of them is 0x…80
        save_file({"x": torch.ones(1)}, tmp_path / "x", metadata={"k": "." * pad})
        if (tmp_path / "x").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "x").read_bytes()[0] == 0x80 and equal(
        dict(open_weights(tmp_path / "x")), {"x": torch.ones(1)}
    )


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", some_tensors(), {})
    reads = []
    monkeypatch.setattr(files, "read_range", lambda *args: reads.append(args))
    box = open_weights(tmp_path / "x")
    box.header(), len(box), list(box)
    assert not reads


# ---- damage -------------------------------------------------------------------------------------


class Payload:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_payload_is_refused_and_not_run(tmp_path, zipped):
    witness, path = tmp_path / "it-ran", tmp_path / "model.safetensors"
    torch.save(
        {"a": torch.ones(1), "b": Payload(witness)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        UserError,
        match="refuses to read as weights alone: it wants to build or call (posix|os).system.  "
        "Nothing in it was run",
    ):
        open_weights(path)
    assert not witness.exists()
    with open(path, "wb") as file:
        pickle.dump({"b": Payload(witness)}, file)
    with pytest.raises(UserError, match="is a Python pickle"):
        open_weights(path)
    assert not witness.exists()
    pickle.loads(path.read_bytes())
    assert witness.exists()  # the payload was a real one


def test_a_refused_class_is_named(tmp_path, monkeypatch):
    """Stable Diffusion's first checkpoints hold a callback of pytorch_lightning."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "callbacks": module.ModelCheckpoint},
        tmp_path / "sd.ckpt",
    )
    with pytest.raises(
        UserError,
        match="call pytorch_lightning.callbacks.ModelCheckpoint .an original Stable Diffusion.*as "
        ".safetensors",
    ):
        open_weights(tmp_path / "sd.ckpt")


def spoil(path, how):
    """Damage a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(
        {
            "empty": b"",
            "one byte": b"\x80",
            "truncated in the header": data[:100],
            "truncated": data[: len(data) // 2],
            "one byte short": data[:-1],
            "one byte long": data + b"\0",
            "a length beyond the file": struct.pack("<Q", len(data) * 2) + data[8:],
            "an absurd length": struct.pack("<Q", 2**63) + data[8:],
            "a length of 2^64-1": b"\xff" * 8 + data[8:],
            "a length too short": struct.pack("<Q", length - 8) + data[8:],
            "a length of 0": struct.pack("<Q", 0) + data[8:],
            "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n"
            b"oid sha256:00\nsize 1\n",
            "a web page": b"<!DOCTYPE html><html>not found</html>",
            "zeros": bytes(1000),
            "a picture": b"\x89PNG\r\n" + bytes(99),
            "JSON": b'{"a": 1, "b": 2}',
            "overlapping tensors": data.replace(b"[0,", b"[8,", 1),
            "a wrong shape": data.replace(b'"shape":[3,5]', b'"shape":[4,5]', 1),
            "an unknown dtype": data.replace(b'"F64"', b'"Q64"', 1),
            "a dtype that is too new": data.replace(b'"I64"', b'"C64"', 1),
        }[how]
    )


@pytest.mark.parametrize(
    "how, message",
    [
        ("empty", r"is empty \(0 bytes\)"),
        ("one byte", "is a Python pickle that is truncated"),
        ("truncated in the header", "truncated or not"),
        ("truncated", "truncated or not"),
        ("one byte short", "truncated or not"),
        ("one byte long", "truncated or not"),
        ("a length beyond the file", "truncated or not"),
        ("an absurd length", "its header says it is 9,223,372,036,854,775,808 bytes long"),
        ("a length of 2^64-1", "18,446,744,073,709,551,615"),
        ("a length too short", "truncated or not"),
        ("a length of 0", "truncated or not"),
        ("a Git LFS pointer", "git lfs pull"),
        ("a web page", "looks like a web page"),
        ("zeros", "is not a weight file .it begins with b'.x00"),
        ("a picture", "not a weight file .it begins with b'.x89PNG"),
        ("JSON", "not a weight file .it begins with"),
        ("overlapping tensors", "truncated or not"),
        ("a wrong shape", "truncated or not"),
        ("an unknown dtype", "truncated or not"),
        ("a dtype that is too new", "tensors of type 'C64'"),
    ],
)
def test_damage_is_named(tmp_path, how, message):
    write_tensors(tmp_path / "x", some_tensors(), {})
    spoil(tmp_path / "x", how)
    with pytest.raises(UserError, match=message):
        dict(open_weights(tmp_path / "x"))


def test_folders_and_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match="no weight file at.*It is a folder"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="no weight file at .*/none"):
        open_weights(tmp_path / "none")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(1000)}, {})
    box = open_weights(tmp_path / "x")
    os.truncate(tmp_path / "x", 2000)
    with pytest.raises(UserError, match="became shorter"):
        box["a"]


@pytest.mark.parametrize(
    "how, message",
    [
        ("a missing shard", "names the shard b.safetensors, which is not there"),
        ("a key in the wrong shard", "x is in it, but the index says b"),
        ("a key in no shard", "y is not in it"),
        ("a stray key", "z is in it, but not in the index"),
        ("a path outside", "wanted a file beside it"),
        ("no map", "wanted an object"),
        ("itself", "wanted a file beside it"),
        ("a deep one", "is not JSON"),
        ("numbers", "wanted "),
        ("not JSON", "is not JSON"),
    ],
)
def test_shards_that_do_not_fit_their_index(tmp_path, how, message):
    index = shard(
        tmp_path,
        {"x": torch.ones(1), "y": torch.zeros(1)},
        {"x": "a.safetensors", "y": "b.safetensors"},
    )
    table = json.loads(index.read_text())
    if how == "a missing shard":
        (tmp_path / "b.safetensors").unlink()
    elif how == "a key in the wrong shard":
        table["weight_map"] = {"x": "b.safetensors", "y": "b.safetensors", "w": "a.safetensors"}
        save_file({"x": torch.ones(1), "w": torch.ones(1)}, tmp_path / "a.safetensors")
    elif how == "a key in no shard":
        save_file({"q": torch.zeros(1)}, tmp_path / "b.safetensors")
        table["weight_map"] = {"x": "a.safetensors", "y": "b.safetensors", "q": "b.safetensors"}
    elif how == "a stray key":
        save_file({"x": torch.ones(1), "z": torch.zeros(1)}, tmp_path / "a.safetensors")
    elif how == "a path outside":
        table["weight_map"]["x"] = "../a.safetensors"
    elif how == "itself":
        table["weight_map"]["x"] = index.name
    elif how == "numbers":
        table["weight_map"] = {"x": 3}
    elif how == "no map":
        del table["weight_map"]
    index.write_text({"not JSON": "no", "a deep one": "[" * 100_000}.get(how, json.dumps(table)))
    with pytest.raises(UserError, match=message):
        open_weights(index)


@pytest.mark.parametrize(
    "value, message",
    [
        ({}, "without a single set of weights"),
        ([3], "without a single set"),
        ({"a": 1}, "it holds a"),
        ({"x": {"y": torch.ones(1)}, "x/y": torch.ones(1)}, "holds two tensors under 'x/y'"),
        ({"x": torch.ones(2, 2).to_sparse()}, "x is not a plain dense"),
        ([[[[[[[torch.ones(1)] * 9] * 9] * 9] * 9] * 9] * 9] * 9, "holds over 1,000 tensors"),
        ([[[[[[[[1] * 99] * 99] * 9] * 9] * 9] * 9] * 9] * 99, "more than 50,000 values"),
    ],
)
def test_pickles_without_one_clear_state_dict(tmp_path, monkeypatch, value, message):
    # Of 100,000 and 10,000,000, which take seconds to count.
    monkeypatch.setattr(containers, "TENSORS", 1_000)
    monkeypatch.setattr(containers, "VALUES", 50_000)
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        dict(open_weights(tmp_path / "x.pt"))


T, OPT = torch.ones(2, 2), {"state": {0: {"m": torch.ones(2)}, 1: [torch.ones(1)]}}


@pytest.mark.parametrize(
    "value, names",
    [
        (
            {"model": {"x": T, "step": 3}, "model_ema": {"y.z": T}, "schema": "v1"},
            "model/x model_ema/y.z",
        ),
        ({"ema_0.99": {"y": T}, "opt": OPT}, "ema_0.99/y opt/state/0/m opt/state/1/0"),
        ({"x": T, "more": [T, ({"a": T},)], 3: T}, "x more/0 more/1/0/a 3"),
        ({"model": {"x": T}, "rng": {"cpu": T}, "step": T}, "model/x rng/cpu step"),
        ([{"x": T}, 3, None], "0/x"),
        (T, "tensor"),
    ],
)
def test_every_tensor_of_a_pickle_is_under_the_keys_that_lead_to_it(tmp_path, value, names):
    torch.save(value, tmp_path / "x.pt")
    assert list(open_weights(tmp_path / "x.pt")) == names.split()


def test_a_pickles_values_are_never_metadata(tmp_path):
    save_unet(tmp_path / "own", net := randomize(UNet(CFG)), {})
    for value in (open_weights(tmp_path / "own").meta[META], 7):
        torch.save({META: value, "state_dict": net.state_dict()}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="number of attention heads"):
            load_unet(tmp_path / "x.pt")


def test_containers_may_be_deep_or_hold_themselves(tmp_path):
    loop, deep = [torch.ones(1)], {"x": torch.ones(1)}
    loop.append(loop)
    for _ in range(50_000):
        deep = [deep]
    found = [len(keys) for keys, _ in containers.named_tensors([loop, deep], tmp_path)]
    assert found == list(range(2, containers.DEPTH + 1))  # not for ever, and nothing deeper


@pytest.mark.parametrize("text", ["[]", '"x"', "3", "null", "[" * 100_000])
def test_metadata_that_is_no_object_is_damaged(tmp_path, text):
    save_file({"a": torch.ones(1)}, tmp_path / "x", metadata={META: text})
    with pytest.raises(UserError, match="the metadata is damaged"):
        load_unet(tmp_path / "x")


@pytest.mark.parametrize("key", [META, f"{META}_sha256"])
def test_a_damaged_name_of_our_metadata_does_not_end_its_protection(tmp_path, key):
    save_unet(tmp_path / "x", randomize(UNet(CFG)), {})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(f'"{key}"'.encode(), f'"T{key[1:]}"'.encode(), 1))
    for heads in ({}, {"num_heads": 2, "attention_order": "legacy"}):
        with pytest.raises(UserError, match="does not match its own checksum"):
            load_unet(tmp_path / "x", **heads)


def test_a_cast_keeps_what_was_never_finite_and_refuses_what_would_not_be(tmp_path):
    write_tensors(
        tmp_path / "x",
        {
            "a": torch.tensor([1.0, float("nan"), float("-inf")]),
            "b": torch.tensor([float("nan"), 7e4]),
        },
        {},
    )
    box = containers.rounded(open_weights(tmp_path / "x"), "fp16")
    assert torch.equal(
        box["a"].nan_to_num(9.0, neginf=5.0), torch.tensor([1.0, 9.0, 5.0], dtype=torch.float16)
    )
    with pytest.raises(
        UserError, match=r"b does not fit fp16: its values go from 7e\+04 to 7e\+04"
    ):
        box["b"]


def test_folders_of_diffusers_variants_and_torch_shards_are_found(tmp_path):
    T = {"x": torch.ones(2)}
    for n, name in enumerate(
        (
            "diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
            "model.bin.index.json",
        )
    ):
        path = tmp_path / str(n) / name
        path.parent.mkdir(parents=True)
        if name.endswith(".json"):
            save_file(T, path.parent / "a") if "bin" not in name else torch.save(
                T, path.parent / "a"
            )
            path.write_text(json.dumps({"weight_map": {"x": "a"}}))
        else:
            save_file(T, path)
        assert containers.weights_in(tmp_path / str(n)) == path and equal(
            dict(open_weights(path)), T
        )


@pytest.mark.parametrize("kind, n", [("ours", 1000), ("zip", 250), ("legacy", 100)])
def test_single_byte_corruptions_never_crash_and_never_load_damage(tmp_path, kind, n):
    """1,000 of our own file, and some of pickles. Only an undamaged network, or one line for the
    user, may come out."""
    net, path = randomize(UNet(CFG)), tmp_path / "x.safetensors"
    save_unet(path, net, {"images": 7})
    whole = load_unet(path)[1]
    if kind != "ours":
        torch.save(
            {k: v.contiguous() for k, v in net.state_dict().items()},
            path,
            _use_new_zipfile_serialization=kind == "zip",
        )
    data, rng, mark, refused = path.read_bytes(), random.Random(0), fingerprint(net.state_dict()), 0
    head = 8 + struct.unpack("<Q", data[:8])[0] if kind == "ours" else 4000
    for i in range(n):
        # The header is small, our metadata begins it.
        at = rng.randrange((head, 1500, len(data))[i % 3])
        if kind == "legacy" and at > 4000:
            continue  # it has no checksum of its own; our files have
        bad = bytearray(data)
        bad[at] ^= rng.randrange(1, 256)
        path.write_bytes(bad)
        try:
            again, meta = load_unet(path, num_heads=2, attention_order="legacy")
        except UserError:
            refused += 1
            continue
        tensors = again.state_dict()
        if kind != "legacy":
            assert fingerprint(tensors) == mark, at
        if kind == "ours":  # a damaged key does not make it a foreign file
            assert meta == whole, at
    assert refused > 0.8 * n or kind == "legacy"


# ---- the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub on a fake remote: hub.remote maps names to bytes; hub.asked lists what was
    fetched."""
    import huggingface_hub

    state = types.SimpleNamespace(
        remote={},
        asked=[],
        error=None,
        cache=tmp_path / "models--org--name/snapshots/0123abc",
        listing_error=None,
    )

    def download(repo, name, revision=None):
        state.asked.append((repo, name, revision))
        if state.error:
            raise state.error
        if name not in state.remote:
            raise huggingface_hub.errors.EntryNotFoundError("404")
        (state.cache / name).parent.mkdir(parents=True, exist_ok=True)
        (state.cache / name).write_bytes(state.remote[name])
        return str(state.cache / name)

    def listing(self, repo, revision=None):
        if state.listing_error:
            raise state.listing_error
        return list(state.remote)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name, revision=None: (
            str(state.cache / name) if (state.cache / name).exists() else None
        ),
    )
    return state


def test_hub_names_resolve_to_files_with_what_belongs_to_them(hub, tmp_path):
    hub.remote = {
        "unet/diffusion_pytorch_model.safetensors": b"w",
        "unet/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"v",
        "v1.safetensors": b"s",
    }
    path = resolve("hf:org/name@main")
    assert path.read_bytes() == b"w" and (path.parent / "config.json").exists()
    assert {r for _, _, r in hub.asked} == {"main"} and {r for r, _, _ in hub.asked} == {"org/name"}
    assert resolve("hf:org/name/v1.safetensors").read_bytes() == b"s"
    hub.remote = {
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
        ).encode(),
        "m-1.safetensors": b"1",
        "m-2.safetensors": b"2",
    }
    assert (resolve("hf:org/name").parent / "m-2.safetensors").read_bytes() == b"2"
    found = origin(hub.cache / "m-1.safetensors")
    assert found["source"] == "hf:org/name/m-1.safetensors@0123abc"
    assert found["sha256"] == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert resolve(tmp_path) == tmp_path and origin(tmp_path / "x") == {
        "source": str(tmp_path / "x")
    }


def test_a_network_from_the_hub_records_its_commit_and_sha256(hub, tmp_path):
    save_unet(tmp_path / "x", net := randomize(UNet(CFG)), {"objective": "fm"})
    torch.save(net.state_dict(), tmp_path / "y")
    hub.remote = {
        "unet/diffusion_pytorch_model.safetensors": (tmp_path / "x").read_bytes(),
        "foreign.pt": (tmp_path / "y").read_bytes(),
    }
    for spec, file, known in (
        ("hf:org/name@v1", "x", {}),
        ("hf:org/name/foreign.pt@v1", "y", {"num_heads": 2, "attention_order": "legacy"}),
    ):
        again, meta = load_unet(spec, **known)
        assert fingerprint(again.state_dict()) == fingerprint(net.state_dict()) and meta[
            "source"
        ].endswith("@0123abc")
        assert meta["sha256"] == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()


def test_a_damaged_download_is_noticed(hub):
    blob = hub.cache.parent.parent / "blobs" / ("0" * 64)
    for folder in (blob.parent, hub.cache):
        folder.mkdir(parents=True)
    blob.write_bytes(b"damaged")
    (hub.cache / "x.safetensors").symlink_to(blob)
    with pytest.raises(UserError, match="is damaged: its sha256 is .*, wanted 000"):
        origin(hub.cache / "x.safetensors")


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "which file.*no weights"),
        (["a.ckpt", "b.ckpt"], "which file.*one of a.ckpt, b.ckpt"),
        (
            ["diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"],
            "which file",
        ),
    ],
)
def test_a_repository_with_no_clear_file_asks(hub, names, message):
    hub.remote = dict.fromkeys(names, b"")
    with pytest.raises(UserError, match=message):
        resolve("hf:org/name")
    assert not hub.asked


def test_what_fails_on_the_way_to_the_hub_is_one_line(hub, monkeypatch):
    from huggingface_hub import errors

    with pytest.raises(UserError, match="is not a name on the Hub.  Wanted hf:org/name"):
        resolve("hf:name")
    hub.remote = {"model.safetensors": b"w"}

    def http(kind):
        return kind.__new__(kind, "no")  # its __init__ wants a response of the HTTP library

    for error, message in (
        (
            http(errors.GatedRepoError),
            "is gated.  Accept its terms at https://huggingface.co/org/name.*hf auth login",
        ),
        (http(errors.RevisionNotFoundError), "no such revision"),
        (http(errors.RepositoryNotFoundError), "no such repository, or it is private"),
        (
            errors.LocalEntryNotFoundError("no"),
            "not in the local cache.*HF_HUB_OFFLINE.*: hf download org/name model.safetensors "
            "--revision v9$",
        ),
        (RuntimeError("some\nHTTP thing"), "RuntimeError: some HTTP thing.  Check the network"),
    ):
        hub.error = error
        with pytest.raises(UserError, match=message) as info:
            resolve("hf:org/name/model.safetensors@v9")
        assert "\n" not in str(info.value)
    hub.error, hub.remote = None, {}
    with pytest.raises(UserError, match="has no such file"):
        resolve("hf:org/name/none.safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve("hf:org/name")


def test_offline_the_cache_is_enough_and_a_miss_is_explained(hub):
    from huggingface_hub import errors

    hub.remote = {"unet/diffusion_pytorch_model.safetensors": b"w"}
    resolve("hf:org/name")
    hub.listing_error = errors.OfflineModeIsEnabled("offline")
    assert resolve("hf:org/name").read_bytes() == b"w"
    shutil.rmtree(hub.cache)
    with pytest.raises(UserError, match="which file"):
        resolve("hf:org/name")
    hub.error = errors.LocalEntryNotFoundError("miss")
    with pytest.raises(UserError, match="not in the local cache"):
        resolve("hf:org/name/v1.safetensors")


@pytest.mark.parametrize("offline", [False, True])
def test_an_autoencoder_of_a_pipeline_is_taken_where_one_is_asked_for(hub, offline):
    from huggingface_hub import errors

    hub.remote = {
        "unet/diffusion_pytorch_model.safetensors": b"w",
        "unet/config.json": b"{}",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"v",
        "vae/config.json": b"{}",
        "scheduler/scheduler_config.json": b"{}",
    }
    if offline:
        for name, data in hub.remote.items():
            (hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
            (hub.cache / name).write_bytes(data)
        hub.listing_error = errors.OfflineModeIsEnabled("offline")
    for spec in ("hf:org/name", "hf:org/name/vae", "hf:org/name/vae/"):
        assert resolve(spec, USUAL_VAE).read_bytes() == b"v"
        assert (hub.cache / "vae/config.json").exists()
    for spec in ("hf:org/name", "hf:org/name/unet"):
        assert resolve(spec).read_bytes() == b"w"
        assert (hub.cache / "scheduler/scheduler_config.json").exists()
    with pytest.raises(UserError, match="which file"):
        resolve("hf:org/name/text_encoder", USUAL_VAE)


@pytest.mark.parametrize(
    "name, spelling",
    [
        ("org/pipe", "hf:org/pipe"),
        ("https://huggingface.co/org/pipe", "hf:org/pipe"),
        ("https://huggingface.co/org/pipe/blob/main/unet/f.bin", "hf:org/pipe/unet/f.bin"),
        ("https://hf.co/org/pipe/resolve/v2/f.ckpt?download=true", "hf:org/pipe/f.ckpt@v2"),
        ("runs/x/model.safetensors", ""),
        ("x/model.safetensors", ""),
        ("runs/x", ""),
        ("/a/b", ""),
        ("../b", ""),
    ],
)
def test_a_name_of_the_hub_in_another_spelling_is_answered_with_ours(
    tmp_path, monkeypatch, name, spelling
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside nothing that is called so
    with pytest.raises(UserError, match="no checkpoint at") as error:
        load_unet(name)
    assert ("on the Hub" in str(error.value)) == bool(spelling)
    assert f"{spelling}." in str(error.value)


def test_a_named_file_needs_no_listing_and_no_connection_means_the_cache(hub):
    from huggingface_hub import errors, utils

    hub.remote = {
        "unet/diffusion_pytorch_model.safetensors": b"w",
        "unet/config.json": b"{}",
        "m.safetensors": b"m",
    }
    hub.listing_error = ConnectionError("no route")
    assert resolve("hf:org/name/m.safetensors@" + "0" * 40).read_bytes() == b"m" and [
        n for _, n, _ in hub.asked
    ] == ["m.safetensors"]
    assert (
        resolve("hf:org/name/unet/diffusion_pytorch_model.safetensors").parent / "config.json"
    ).exists()
    # Both are in the cache by now.
    assert resolve("hf:org/name").name == "diffusion_pytorch_model.safetensors"
    shutil.rmtree(hub.cache)
    level = utils.logging.get_verbosity()
    with pytest.raises(UserError, match="ConnectionError: no route.  Check the network"):
        resolve("hf:org/name")
    assert utils.logging.get_verbosity() == level
    asked, hub.error = len(hub.asked), errors.LocalEntryNotFoundError("miss")
    with pytest.raises(UserError):
        inspect("hf:org/name/m.safetensors")
    assert len(hub.asked) == asked + 1  # not once more with other guesses


def test_local_names_never_reach_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve("runs/x") == resolve(files.Path("runs/x"))
    save_unet(tmp_path / "x", UNet(CFG), {})
    assert META in open_weights(tmp_path / "x").meta and load_unet(tmp_path / "x")[0].cfg == CFG


def test_what_a_kill_left_half_written_goes_with_the_next_write_of_that_file(tmp_path):
    """An hour later, for it may still be written to; what another file's name has stays."""
    left, new = tmp_path / ".a [1].json.17.tmp", tmp_path / ".a [1].json.18.tmp"
    other, mine = tmp_path / ".b.json.17.tmp", tmp_path / ".a [1].json.tmp"
    for path in (left, new, other, mine):
        path.write_text("half")
    for path in (left, other, mine):
        os.utime(path, (1, 1))
    files.write_text(tmp_path / "c.json", "another file of that folder, earlier")
    files.write_text(tmp_path / "a [1].json", "whole")
    assert not left.exists()
    assert new.exists() and other.exists() and mine.exists()
    assert (tmp_path / "a [1].json").read_text() == "whole"
