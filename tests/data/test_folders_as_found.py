"""Folders as people have them: hidden copies, names and tags in two forms of Unicode, captions that
are missing, tables that are damaged, splits that leave nothing."""

import hashlib
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data.dataset import classes_of, open_dataset
from data.sources import content_hash, open_source
from data.tags import TagTable, normalize_tag
from harness.cli import UserError

NFC, NFD = (unicodedata.normalize(form, "pokémon") for form in ("NFC", "NFD"))


def fill(folder, n, name="{}.png"):
    """n pictures of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / name.format(i))
    return folder


def opened(folder, **how):
    return open_dataset(str(folder), resolution=32, **{"holdout": 0, **how})


# ---- hidden and generated -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints", ".thumbnails", ".Trash-1000", "@eaDir", "__MACOSX", "#recycle"),
        *("$RECYCLE.BIN", "lost+found", "System Volume Information"),
    ],
)
def test_hidden_and_generated_folders_are_no_data(tmp_path, name):
    plain = opened(fill(tmp_path / "set", 4)).source
    for copies in (tmp_path / "set" / name, tmp_path / "set/deep" / name / "deeper"):
        fill(copies, 4, "{}-checkpoint.png")
        (copies / "tags.jsonl").write_text("no JSON")
    ds = opened(tmp_path / "set")
    assert ds.source.names == plain.names and ds.source.hash == plain.hash
    line = f"2 hidden files and folders, or generated ones, not read (first: {name})"
    found = min(name, f"deep/{name}")
    assert line.replace(f": {name}", f": {found}") in ds.report


def test_hidden_files_are_no_data_and_a_hidden_root_or_target_is(tmp_path):
    root = fill(tmp_path / ".set", 3)
    for name in (".trash.png", "._0.png", ".DS_Store", ".png"):
        (root / name).write_bytes((root / "0.png").read_bytes())
    fill(root / ".store", 2, "kept{}.png")
    (root / "link").symlink_to(".store")
    ds = opened(root)
    assert ds.source.names == ["0.png", "1.png", "2.png", "link/kept0.png", "link/kept1.png"]
    assert "5 hidden files and folders, or generated ones, not read (first: .DS_Store)" in ds.report
    with pytest.raises(UserError, match="has no images .*It has: 1 hidden files and folders"):
        (tmp_path / "only").mkdir()
        fill(tmp_path / "only/.hidden", 1)
        opened(tmp_path / "only")


# ---- two forms of one word ----------------------------------------------------------------------


def test_tags_are_compared_in_one_form_of_unicode(tmp_path):
    fill(tmp_path, 6)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{NFC if i % 2 else NFD}, tag{i}")
    (tmp_path / "5.txt").write_text("other")
    ds = opened(tmp_path)
    assert ds.counts()[NFC] == 5 and NFD not in ds.counts()
    for form in (NFC, NFD):
        fine = opened(tmp_path, stage="fine", exclude_tags=(form,))
        stage2 = opened(tmp_path, stage="stage2", exclude_tags=(f"{form[:-1]}?",))
        assert len(fine) == 1 and len(stage2) == 5
        assert classes_of(ds, [form])[0] == [NFC]


def test_an_image_tagged_in_both_forms_has_the_tag_once(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "0.txt").write_text(f"{NFD}, {NFC}, b")
    assert opened(tmp_path)[0].tags == (NFC, "b")
    assert normalize_tag(NFD.upper()) == NFC


@pytest.mark.parametrize("disk, written", [(NFD, NFC), (NFC, NFD)])
@pytest.mark.parametrize("kind", ["tags.jsonl", "metadata.csv", "sidecar"])
def test_file_names_are_compared_in_one_form_of_unicode(tmp_path, capsys, disk, written, kind):
    fill(tmp_path / disk, 1, f"{disk}.png")
    if kind == "sidecar":
        (tmp_path / disk / f"{written}.txt").write_text("a")
    elif kind == "metadata.csv":
        (tmp_path / kind).write_text(f"file_name,text\n{written}/{written}.png,a\n")
    else:
        row = {"file_name": f"{written}/{written}.png", "tags": ["a"]}
        (tmp_path / kind).write_text(json.dumps(row))
    ds = opened(tmp_path)
    assert ds[0].tags == ("a",) and ds[0].name == f"{disk}/{disk}.png"
    assert "text files of no image's name" not in ds.report
    assert "not there" not in capsys.readouterr().err


def test_two_files_whose_names_differ_in_form_only_have_their_own_tags(tmp_path):
    fill(tmp_path, 1, f"{NFC}.png")
    fill(tmp_path, 1, f"{NFD}.png")
    for name in (NFC, NFD):
        (tmp_path / f"{name}.txt").write_text(f"length {len(name)}")
    tags = {item.name: item.tags for item in opened(tmp_path)}
    assert tags == {f"{name}.png": (f"length {len(name)}",) for name in (NFC, NFD)}


def test_the_table_of_an_older_cache_is_of_one_form():
    lists = [(NFD, "a"), (NFC,), (NFC, NFD, "a"), ()]
    table = TagTable.of(lists).of_one_form()
    assert list(table) == [(NFC, "a"), (NFC,), (NFC, "a"), ()]
    assert table.counts() == {NFC: 3, "a": 2} and table.any_of([NFC]).sum() == 3
    assert table.of_one_form() is table


def test_the_hash_of_a_set_is_of_its_tags_as_written(tmp_path):
    """Else a run that an older commit began on such a set could not go on."""
    fill(tmp_path, 1)
    (tmp_path / "0.txt").write_text(NFD)
    source = open_source(str(tmp_path), 32)
    pixels = source.pixel(0)
    content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    assert source.hash == content_hash(["0.png"], [(NFD,)], [content])
    assert source.hash != content_hash(["0.png"], [(NFC,)], [content])


# ---- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["tags", "text", "caption"])
def test_a_missing_caption_is_no_tags(tmp_path, column):
    fill(tmp_path, 4)
    rows = [{"file_name": f"{i}.png", column: "cat, red"} for i in range(4)]
    rows[1][column] = None
    del rows[2][column]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ds = opened(tmp_path)
    assert [item.tags for item in ds] == [("cat", "red"), (), (), ("cat", "red")]
    assert "without tags: 2 of the used" in ds.report
    (tmp_path / "metadata.jsonl").unlink()
    text = f"file_name,{column}\n0.png,cat\n1.png\n2.png,\n"
    (tmp_path / "metadata.csv").write_text(text)
    assert [item.tags for item in opened(tmp_path)] == [("cat",), (), (), ()]


def test_a_table_without_captions_is_no_tags_and_the_next_column_stands_in_for_null(tmp_path):
    fill(tmp_path, 2)
    rows = [{"file_name": "0.png", "label": 3}, {"file_name": "1.png", "tags": None, "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.tags for item in opened(tmp_path)] == [(), ("b",)]


@pytest.mark.parametrize("value", [3, True, {"a": 1}, ["a", None], [["a"]]])
def test_a_caption_that_is_no_text_is_still_named(tmp_path, value):
    fill(tmp_path, 1)
    (tmp_path / "tags.jsonl").write_text(json.dumps({"file_name": "0.png", "tags": value}))
    with pytest.raises(UserError, match="tags.jsonl:1: .*tags are text or a list of texts"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "table, text, message",
    [
        ("tags.jsonl", "[" * 10**5 + "]" * 10**5, "tags.jsonl:1: wanted"),
        ("tags.jsonl", '{"file_name": "0.png", "tags": ' + "[" * 10**5, "tags.jsonl:1: wanted"),
        ("tags.jsonl", r'{"file_name": "0.png", "tags": "a\ud800"}', "half of a character"),
        ("tags.jsonl", r'{"file_name": "0.png", "tags": ["\udc00"]}', "half of a character"),
        ("tags.jsonl", '["0.png"]', "tags.jsonl:1: wanted"),
        ("tags.jsonl", '{"file_name": {"a": 1}, "tags": "a"}', "tags.jsonl:1: wanted"),
        ("metadata.csv", 'file_name,text\n0.png,"' + "a" * 2**18, "metadata.csv:.*not a row"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, table, text, message):
    fill(tmp_path, 1)
    (tmp_path / table).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path)
    assert len(str(caught.value)) < 500 and str(caught.value).encode()


# ---- parquet ------------------------------------------------------------------------------------


def test_a_row_that_holds_no_bytes_is_unreadable_with_a_reason(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture = (fill(tmp_path / "one", 1) / "0.png").read_bytes()
    for bad in ("text", {"x": 1}, [1]):
        rows = pa.array([{"bytes": bad}])
        file = tmp_path / "bad.parquet"
        pq.write_table(pa.table({"image": rows}), file)
        with pytest.raises(UserError, match="which column holds|no bytes in this row"):
            opened(file)
    file = tmp_path / "good.parquet"
    pq.write_table(pa.table({"image": pa.array([picture, None], pa.binary())}), file)
    assert opened(file).source.unreadable == {"good.parquet:1": "no bytes in this row"}


def test_two_parquet_columns_of_one_name_are_asked_about(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture = (fill(tmp_path / "one", 1) / "0.png").read_bytes()
    image, text = pa.array([picture]), pa.array(["a"])
    file = tmp_path / "x.parquet"
    for names in (["image", "image", "text"], ["image", "text", "text"]):
        arrays = [image if name == "image" else text for name in names]
        pq.write_table(pa.table(arrays, names=names), file)
        with pytest.raises(UserError, match=r"x\.parquet: two columns are named (image|text)"):
            opened(file)


# ---- splits -------------------------------------------------------------------------------------


def test_all_held_out_is_said(tmp_path):
    fill(tmp_path, 1, "photo53.png")
    with pytest.raises(UserError, match="all 1 images are held out.*--holdout 0"):
        opened(tmp_path, holdout=0.02)
    assert len(opened(tmp_path, holdout=0)) == 1
