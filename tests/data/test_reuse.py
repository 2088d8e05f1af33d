"""A cache after its images or tags changed: what is encoded already is not encoded again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.encode as encode
import data.reuse as reuse
from data.cache import contents_path, identity, open_cache, read_sealed, sealed, shard_path, verify
from data.encode import Encode
from harness.ranks import Ranks
from test_cache import files
from test_encode import torchrun

ONE = Ranks(0, 1, torch.device("cpu"))
SHARD = 3 * 2 * 192 * 16  # bytes: three images of 32 px through pixel:8


def picture(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(folder of 10 tagged images, its cache, what was encoded since)."""
    monkeypatch.setattr(encode, "SHARD", SHARD)
    folder, out = tmp_path / "d", tmp_path / "c"
    folder.mkdir()
    for i in range(10):
        picture(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text("cat")
    encoded, decode = [], encode.decoded

    def counted(source, groups):
        for batch in decode(source, (encoded.extend(group) or group for group in groups)):
            yield batch

    again(folder, out)
    monkeypatch.setattr(encode, "decoded", counted)
    return folder, out, encoded


def again(folder, out, **how):
    cfg = Encode(str(out), str(folder), "pixel:8", resolution=32, batch=2, device="cpu", **how)
    encode.encode(cfg, ONE)
    assert verify(Path(out)) == []
    return open_cache(str(out), 32)


def same_latents(out, folder, tmp_path) -> bool:
    """As in a cache that is made anew, names and tags too."""
    fresh, found = again(folder, tmp_path / "fresh"), open_cache(str(out), 32)
    n = len(fresh.names)
    assert list(found.names) == list(fresh.names) and list(found.tags) == list(fresh.tags)
    assert found.held.tolist() == fresh.held.tolist()
    return all(torch.equal(found.raw(i), fresh.raw(i)) for i in range(n))


def test_other_tags_cost_no_latents(made, capsys, tmp_path):
    folder, out, encoded = made
    before, old = files(out), open_cache(str(out), 32).hash
    (folder / "1.txt").write_text("dog")
    source = again(folder, out)
    assert "tags changed; 10 of 10 images are encoded already, 0 are not" in capsys.readouterr().out
    assert encoded == [] and source.tags[1] == ("dog",) and source.hash != old
    changed = {name for name, digest in files(out).items() if digest != before[name]}
    assert changed == {"index.safetensors", "manifest.json", "plan.json"}
    after = files(out)
    again(folder, out)  # nothing changed: nothing is said or done
    assert encoded == [] and files(out) == after and "changed" not in capsys.readouterr().out
    assert same_latents(out, folder, tmp_path)
    (folder / "1.txt").write_text("cat")  # and back
    assert again(folder, out).hash == old and files(out) == before


@pytest.mark.parametrize("flip", [False, True])
def test_more_fewer_and_renamed_images_cost_the_new_ones_only(made, tmp_path, flip):
    folder, out, encoded = made
    if flip:
        shutil.rmtree(out)
        again(folder, out, flip=True)
        encoded.clear()
    shutil.copy(folder / "0.png", folder / "copy.png")  # the same latents under another name
    picture(folder / "35.png", 35)  # in the middle
    picture(folder / "6.png", 66)  # another image under its name
    (folder / "8.png").rename(folder / "z.png")
    (folder / "2.png").unlink()
    source = again(folder, out, flip=flip)
    assert list(source.names)[encoded[0]] == "35.png" and len(encoded) == 2
    assert list(source.names)[encoded[1]] == "6.png" and not (out / ".update").exists()
    if not flip:
        assert same_latents(out, folder, tmp_path)
    for path in sorted(folder.glob("*.png"))[2:]:
        path.unlink()
    encoded.clear()
    again(folder, out, flip=flip)
    assert encoded == [] and len(list(out.glob("shard-*"))) == 1 + flip


def test_a_damaged_shard_lends_no_latents(made, tmp_path):
    folder, out, encoded = made
    path = shard_path(out, 1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    picture(folder / "new.png", 99)
    again(folder, out)
    assert sorted(encoded) == [3, 4, 5, 10] and same_latents(out, folder, tmp_path)


@pytest.mark.parametrize("at", range(6))
def test_a_kill_at_any_moment_of_an_update_is_mended_by_the_next(made, tmp_path, monkeypatch, at):
    folder, out, encoded = made
    picture(folder / "35.png", 35)
    done = []

    def killed_at(module, name):
        whole = getattr(module, name)

        def part(*args, **kwargs):
            done.append(name)
            if len(done) > at:
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, name, part)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        killed_at(encode, "write_shard")
        killed_at(reuse, "write_text")
        killed_at(reuse.os, "replace")
        killed_at(encode, "write_index")
        with pytest.raises(KeyboardInterrupt):
            again(folder, out)
    again(folder, out)
    assert set(encoded) <= {4} and same_latents(out, folder, tmp_path)
    assert not (out / ".update").exists()


def test_what_was_written_for_a_change_that_was_taken_back_is_dropped(made, monkeypatch):
    folder, out, encoded = made
    before = files(out)
    picture(folder / "35.png", 35)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "take_over", killed)
        again(folder, out)
    assert (out / ".update").is_dir()
    (folder / "35.png").unlink()
    encoded.clear()
    again(folder, out)
    assert encoded == [] and files(out) == before and not (out / ".update").exists()
    assert read_sealed(out / "plan.json")["images"] == 10


def test_a_cache_that_is_older_than_the_hashes_lends_its_latents_too(made, tmp_path):
    folder, out, encoded = made
    manifest = read_sealed(out / "manifest.json")
    older = {key: value for key, value in manifest.items() if key not in ("contents", "source")}
    (out / "manifest.json").write_text(sealed(older))
    contents_path(out).unlink()
    (folder / "1.txt").write_text("dog")
    picture(folder / "35.png", 35)
    again(folder, out)
    assert encoded == [4] and same_latents(out, folder, tmp_path) and contents_path(out).exists()


@pytest.mark.parametrize("lost", ["manifest.json", "shard-00001.safetensors"])
def test_what_is_lost_after_a_change_of_tags_is_mended_as_before(made, tmp_path, lost):
    """The plan says what the tags are now, and its shards are still its own."""
    folder, out, encoded = made
    first = read_sealed(out / "plan.json")
    (folder / "1.txt").write_text("dog")
    again(folder, out)
    plan = read_sealed(out / "plan.json")
    assert plan["source"] == read_sealed(out / "manifest.json")["source"] != first["source"]
    assert identity(plan) == identity(first)
    after = files(out)
    (out / lost).unlink()
    again(folder, out)
    assert encoded == ([] if "manifest" in lost else [3, 4, 5]) and files(out) == after
    (folder / "1.txt").write_text("cat")
    again(folder, out)
    assert read_sealed(out / "plan.json") == first


def test_a_plan_that_an_older_version_left_behind_its_tags_is_brought_up(made):
    folder, out, encoded = made
    old = files(out)["plan.json"]
    (folder / "1.txt").write_text("dog")
    again(folder, out)
    after = files(out)
    plan = read_sealed(out / "plan.json")
    manifest = read_sealed(out / "manifest.json")
    before = {k: v for k, v in plan.items() if k != "written_for"}
    before["source"] = plan["written_for"]
    (out / "plan.json").write_text(sealed(before))
    (out / "manifest.json").write_text(sealed({**manifest, "plan": before}))
    assert files(out)["plan.json"] == old
    again(folder, out)
    assert encoded == [] and files(out) == after


def test_two_ranks_update_a_cache_as_one_does(made, tmp_path):
    folder, out, encoded = made
    two = shutil.copytree(out, tmp_path / "two")
    picture(folder / "35.png", 35)
    (folder / "1.txt").write_text("dog")
    again(folder, out)
    args = ["--data", folder, "--vae", "pixel:8", "--batch", 2, "--out", two]
    code, text = torchrun(f"encode.SHARD = {SHARD}", *args)
    assert code == 0 and "10 of 11 images are encoded already, 1 are not" in text, text
    assert files(two) == files(out)


def test_a_folder_that_moved_is_found_where_it_is_now(made, tmp_path):
    folder, out, encoded = made
    folder.rename(tmp_path / "moved")
    again(tmp_path / "moved", out)
    assert encoded == [] and read_sealed(out / "plan.json")["data"] == str(tmp_path / "moved")


def test_what_kills_left_half_written_is_swept_when_a_cache_is_gone_on_with(made):
    folder, out, encoded = made
    before = files(out)
    for name in (".shard-00001.safetensors.12.tmp", ".manifest.json.77.tmp"):
        (out / name).write_text("half")
    again(folder, out)
    hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".source.safetensors"} and files(out) == before
