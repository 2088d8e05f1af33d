"""Whatever stands in JSON of our own is refused in one line, or changes nothing.

Every field of every kind of file gets every wrong value; a checksum over it is made right again, as
who alters a file on purpose would.
"""

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch

import samplers
from ckpt import open_unet
from ckpt.containers import open_weights
from data import cache
from distillation.assessor import AssessorConfig, fresh_assessor, load_assessor
from eval_fid import default_ref
from harness.cli import UserError
from harness.files import META, read_meta, write_tensors
from harness.run import read_config
from metrics.cards import compare
from objectives import make_objective
from training.checkpoints import read_state
from vae import choose, load_vae

OLD = Path(__file__).parent / "fixtures" / "834bb60"
WRONG = [
    None, True, False, "x", "", "\n\x1b", [], {}, [1], {"a": 1}, ["a", "a"], 0, -1, 1.5, 10**30,
    1e30, float("nan"), float("inf"), [[]], "../x", "\ud800",
]  # fmt: skip
LOST = object()


# ---- mutation -----------------------------------------------------------------------------------


def places(value, above=()):
    """Where something stands in a value: of lists, the first and the last entry."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = sorted({0, len(value) - 1}) if value else []
    for key in keys:
        yield (*above, key)
        yield from places(value[key], (*above, key))


def changed(value, place, new):
    """A deep copy with something else at a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if new is LOST:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return copy


def alike(a, b):
    """Of one type, so that the other one may be what somebody meant."""
    numbers = (int, float)
    if type(a) in numbers and type(b) in numbers:
        return abs(b) < 1e30
    return type(a) is type(b) and a is not None


def at(value, place):
    for key in place:
        value = value[key]
    return value


# ---- the files ----------------------------------------------------------------------------------


class Json:
    """A file of JSON alone."""

    tries = 250  # at most, of all places and values
    optional = False  # may those be null or missing?
    free = ()  # fields in which another value of the right type means something else, rightly

    def __init__(self, folder):
        self.folder = folder
        self.path = self.make()

    def value(self):
        return json.loads(self.path.read_text())

    def write(self, value):
        self.path.write_text(json.dumps(value))


class Card(Json):
    optional = True
    free = ("metrics", "value", "error", "floor", "floor n", "flagged", "n", "nfe")

    def make(self):
        return Path(shutil.copy(OLD / "card.json", self.folder / "a.json"))

    def read(self):
        return compare([str(OLD / "card.json"), str(self.path)], ())


class Config(Json):
    free = ("data", "stage", "exclude_tags")

    def make(self):
        return Path(shutil.copy(OLD / "run" / "config.json", self.folder / "config.json"))

    def read(self):
        return default_ref(read_config(self.folder), "x")


class Index(Json):
    def make(self):
        for name in ("a", "b"):
            write_tensors(self.folder / f"{name}.safetensors", {name: torch.ones(2)}, {})
        table = {"weight_map": {name: f"{name}.safetensors" for name in "ab"}, "metadata": {}}
        path = self.folder / "m.safetensors.index.json"
        path.write_text(json.dumps(table))
        return path

    def read(self):
        box = open_weights(self.path)
        if len(box) < 2:
            raise UserError("a network lacks a tensor", do="Copy it again.")
        return box.header()


class Manifest(Json):
    """Of a latent cache, with the plan in it, which plan.json must repeat."""

    free = ("mean", "std", "data", "threads", "torch", "device", "batch", "source", "vae", "sha256")
    name = "manifest.json"

    def make(self):
        shutil.copytree(OLD / "cache", self.folder / "cache")
        return self.folder / "cache" / self.name

    def value(self):
        value = json.loads(self.path.read_text())
        del value["sha256"]
        return value

    def write(self, value):
        if isinstance(value, dict):
            value = {**value, "sha256": cache.digest(value)}
        text = json.dumps(value, indent=1, sort_keys=True)
        self.path.write_text(text + "\n")

    def read(self):
        source = cache.open_cache(str(self.path.parent), 32)
        latents = torch.stack([source.raw(i) for i in range(len(source.names))])
        return latents.numpy().tobytes(), list(source.names), list(source.tags)


class Plan(Manifest):
    name = "plan.json"

    def read(self):
        return cache.read_plan(self.path.parent)["resolution"]


class Metadata(Json):
    """JSON in the header of a file of tensors."""

    def value(self):
        return read_meta(open_weights(self.path))

    def write(self, value):
        data = self.path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + size])
        text = json.dumps(value)
        digest = hashlib.sha256(text.encode()).hexdigest()
        head["__metadata__"] |= {META: text, f"{META}_sha256": digest}
        head = json.dumps(head).encode()
        self.path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + size :])


class Names(Metadata):
    """The names and tags of a latent cache."""

    free = ("vocabulary", "notes", "unreadable")

    def make(self):
        shutil.copytree(OLD / "cache", self.folder / "cache")
        return self.folder / "cache" / "index.safetensors"

    def write(self, value):
        super().write(value)
        other = Manifest.__new__(Manifest)
        other.path = self.path.parent / "manifest.json"
        other.write({**other.value(), "index": cache.file_digest(self.path)})

    read = Manifest.read


class Shard(Metadata):
    free = ("sums",)

    def make(self):
        shutil.copytree(OLD / "cache", self.folder / "cache")
        return cache.shard_path(self.folder / "cache", 0)

    def read(self):
        plan = cache.read_plan(self.path.parent)
        if not cache.verify_shard(self.path.parent, plan, 0):
            raise UserError("another shard", do="Write it again.")
        return cache.shard_meta(open_weights(self.path))["sha256"]


class Network(Metadata):
    tries = 40
    free = (
        "unet", "objective", "resolution", "fingerprint", "data", "stage", "exclude_tags",
        "holdout", "classes", "vae",
    )  # fmt: skip

    def make(self):
        file = OLD / "run" / "ckpt" / "000000000080" / "model.safetensors"
        return Path(shutil.copy(file, self.folder / "model.safetensors"))

    def read(self):
        source = open_unet(self.path)
        cfg = samplers.Sampling(str(self.path))
        objective, vae, shape = samplers.describe(cfg, source.cfg, source.meta, "x")
        return source.cfg, objective, vae.fingerprint, shape, source.meta.get("classes")


class State(Metadata):
    tries = 50
    free = ("skipped", "parts", "data_hash")

    def make(self):
        file = OLD / "run" / "ckpt" / "000000000080" / "state.safetensors"
        folder = self.folder / "000000000080"
        folder.mkdir()
        return Path(shutil.copy(file, folder))

    def read(self):
        return read_state(self.path.parent)[1]["images"]


class Vae(Metadata):
    free = ("name",)

    def make(self):
        return Path(shutil.copy(OLD / "run" / "vae.safetensors", self.folder / "vae.safetensors"))

    def read(self):
        vae = load_vae(self.path)
        return vae.factor, vae.fingerprint, choose(kept=self.path).fingerprint


class Assessor(Metadata):
    tries = 120
    free = ("objective", "teacher", "held_out", "pretraining", "x_source", "pattern_target")

    def make(self):
        net = fresh_assessor(AssessorConfig({"down_0": 8, "mid": 16}, 4, 2, 8), 0)
        path = self.folder / "assessor.safetensors"
        card = {"teacher": "0" * 64, "objective": vars(make_objective("ddpm")), "held_out": {}}
        net.save(path, {**card, "pretraining": {"shuffle_time": False}})
        return path

    def read(self):
        net = load_assessor(self.path)
        features = {"down_0": torch.ones(1, 8), "mid": torch.ones(1, 16)}
        found = net.assess(features, torch.zeros(1, dtype=torch.long))
        return {name: x.tolist() for name, x in found.items()}


@pytest.mark.parametrize(
    "kind",
    [Card, Config, Index, Manifest, Plan, Names, Shard, Network, State, Vae, Assessor],
    ids=lambda kind: kind.__name__,
)
def test_a_wrong_value_anywhere_is_refused_in_one_line_or_changes_nothing(kind, tmp_path, capsys):
    file = kind(tmp_path)
    valid, result = file.value(), file.read()
    tried, accepted = 0, []
    every = [((), new) for new in ("x", [], {}, None, 1)]
    every += [(place, new) for place in places(valid) for new in (*WRONG, LOST)]
    every += [((*place, "unknown"), 1) for place in [(), *places(valid)]]
    for place, new in random.Random(0).sample(every, min(kind.tries, len(every))):
        if place and place[-1] == "unknown" and not isinstance(at(valid, place[:-1]), dict):
            continue
        tried += 1
        try:
            file.write(changed(valid, place, new) if place else new)
            same = file.read() == result
        except UserError as error:
            assert len(str(error)) < 1000, error
            continue
        known = place[-1:] != ("unknown",)
        likely = known and (alike(at(valid, place), new) or kind.optional and new in (None, LOST))
        meant = likely and any(key in kind.free for key in place)
        if not (same or meant):
            accepted.append((place, new))
    assert tried >= 30 and accepted == []
    file.write(valid)
    assert file.read() == result
