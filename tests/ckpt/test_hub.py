"""What a file names is not what the user named: the Hub is asked for the second only."""

import json
import re
import shlex
import types

import pytest

import distill
import eval_fid
import samplers
import train
from autoencoders import saved, small
from ckpt import hub
from ckpt.containers import open_weights
from data.dataset import open_dataset
from harness.cli import UserError
from harness.files import read_meta
from training.start import vae_name
from vae import load_vae, vae_from_meta

COMMIT = "0" * 39 + "1"
SPEC = "hf:org/name/f.safetensors"
TINY = ["--resolution", 32, "--batch", 8, "--preview-every", 0, "--eval-every", 0]
TINY += ["--device", "cpu", "--name", "a"]


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A Hub with one autoencoder and one data set. `cached`: what is in the local cache; `asked`:
    every request."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    state = types.SimpleNamespace(asked=[], cached=False)
    file = tmp_path / f"models--org--name/snapshots/{COMMIT}/f.safetensors"
    file.parent.mkdir(parents=True)
    saved(file, small("flux2"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for item in open_dataset("toyfaces:16", resolution=32, holdout=0):
        picture(item.image, pictures / f"{item.name}.png")

    def download(repo, name, revision=None):
        state.asked.append(repo)
        return str(file)

    def snapshot(repo, local_files_only=False, **_):
        if local_files_only and not state.cached:
            raise LocalEntryNotFoundError("not here")
        if not local_files_only:
            state.asked.append(repo)
        return str(pictures)

    def look(repo, name, revision=None):
        here = state.cached and (repo, name, revision) == ("org/name", "f.safetensors", COMMIT)
        return str(file) if here else None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    forget()
    return state


def picture(image, path):
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def forget():
    """As in a new process."""
    hub.ASKED.clear()
    hub.ONLY_CACHED.clear()


def test_an_autoencoder_that_only_a_file_names_is_never_fetched(remote):
    meta = load_vae(SPEC).meta()
    assert meta["source"] == f"{SPEC}@{COMMIT}" and remote.asked == ["org/name"]
    forget()
    with pytest.raises(UserError, match=f"not by you.*add: --vae {SPEC}@{COMMIT}"):
        vae_from_meta(meta)
    assert remote.asked == ["org/name"]
    remote.cached = True  # then it is taken from there, without a request
    assert vae_from_meta(meta).meta() == meta and remote.asked == ["org/name"]
    remote.cached = False
    hub.ask("hf:org/name")  # the user named it in this process
    assert vae_from_meta(meta).meta() == meta and len(remote.asked) == 2


@pytest.mark.parametrize(
    "source",
    ["flux2", "sdxl:hf:evil/x/f.safetensors", "hf:evil/x", "hf:x", "hf:evil/x/a b\x1b[2J;$(id)"],
)
def test_no_spelling_in_a_file_reaches_the_hub(remote, source):
    meta = {**load_vae(SPEC).meta(), "source": source}
    with pytest.raises(UserError) as caught:
        vae_from_meta(meta)
    assert remote.asked == ["org/name"] and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("shard", ["../up.safetensors", "/etc/passwd", "a/b.bin", "..", "a\nb", 7])
def test_an_index_on_the_hub_names_files_beside_it_only(remote, monkeypatch, tmp_path, shard):
    import huggingface_hub

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    asked = []

    def download(repo, name, revision=None):
        asked.append(name)
        return str(index)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="wanted a file beside it"):
        hub.resolve(f"hf:org/name/{index.name}")
    assert asked == [index.name]


def test_a_run_goes_on_where_its_autoencoder_is_typed_again(remote, tmp_path, user):
    typed = ["--data", "toyfaces:16", "--vae", f"flux2:{SPEC}", "--out", tmp_path, *TINY]
    code, _, err = user(train.main, *typed, "--images", 8)
    assert code == 0, err
    remote.asked.clear()
    (tmp_path / "a" / train.FINAL).unlink()
    code, _, err = user(train.main, *typed, "--images", 8)  # as on a host that never had it
    assert code == 0 and set(remote.asked) == {"org/name"}, err
    # A rank beside rank 0, which is sent the metadata.
    forget()
    run = tmp_path / "a"
    vae_name(types.SimpleNamespace(vae=f"flux2:{SPEC}"), run)
    assert vae_from_meta(read_meta(open_weights(run / "vae.safetensors"))).name == "flux2"
    # Whoever gets the run and types nothing is told what to type.
    remote.asked.clear()
    sampling = ["--ckpt", run, "--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "s"]
    code, _, err = user(samplers.main, *sampling)
    assert code == 2 and len(err) == 1 and not remote.asked
    flag, name = re.search(r"add: (\S+ \S+)", err[0])[1].split()
    code, _, err = user(samplers.main, *sampling, flag, name)
    assert code == 0 and set(remote.asked) == {"org/name"}, err


def test_data_that_only_a_file_names_is_never_fetched(remote, tmp_path, user):
    code, _, err = user(
        train.main, "--data", "hf:org/faces", "--out", tmp_path, *TINY, "--images", 8
    )
    assert code == 0 and remote.asked == ["org/faces"], err
    remote.asked.clear()
    run = tmp_path / "a"
    measure = ["--ckpt", run, "--features", "pca", "--n", 8, "--steps", 1, "--device", "cpu"]
    measure += ["--cache", tmp_path / "features", "--out", tmp_path / "card.json"]
    student = ["--teacher", run, "--vae", "pca", "--images", 8, "--out", tmp_path, "--name", "s"]
    for main, words, flag in ((eval_fid.main, measure, "--ref"), (distill.main, student, "--data")):
        code, _, err = user(main, *words)
        assert code == 2 and len(err) == 1 and not remote.asked
        assert "hf download --repo-type dataset org/faces" in err[0]
        added = shlex.split(re.search(r"add: (.*)$", err[0])[1])
        assert added == [flag, "hf:org/faces"]
    code, _, err = user(eval_fid.main, *measure, "--ref", "hf:org/faces")
    assert code == 0 and set(remote.asked) == {"org/faces"}, err
    remote.asked.clear()
    remote.cached = True
    code, _, err = user(eval_fid.main, *measure)
    assert code == 0 and not remote.asked, err
