"""Parquet exports: known and named columns, splits, groups, and cells that cannot be used."""

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from ipx2p.data.published.parquet import KNOWN
from ipx2p.data.published.registry import open_source
from ipx2p.data.published.source import load_example
from ipx2p.errors import InputError
from tests.data.published.test_registry import usable

CARTOON = ("original_image", "edit_prompt", "cartoonized_image")
LOW_LEVEL = ("input_image", "instruction", "ground_truth_image")


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow")


@pytest.fixture
def save(pyarrow, tmp_path):
    """Writes rows of (source, sentence, target), two in a row group; returns the file."""
    import pyarrow.parquet

    def write(rows, columns=CARTOON, name="train-00000-of-00001.parquet", **others):
        table = {c: [row[i] for row in rows] for i, c in enumerate(columns)} | others
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
        return path

    return write


def cell(number, size=(8, 6)):
    """A picture as Hugging Face stores it."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def rows(count, sentence="Cartoonize it"):
    return [(cell(i), sentence, cell(100 + i)) for i in range(count)]


def examples(folder, **options):
    return usable(open_source("parquet", folder, **options))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'ipx2p\[parquet\]'"):
        examples(tmp_path)


def test_rows_are_read_by_row_groups_that_can_be_sent(save):
    path = save(rows(5))
    source = open_source("parquet", path.parent)
    chunks = source.chunks()
    assert [chunk.items[0].num_rows for chunk in chunks] == [2, 2, 1]
    source, chunks = pickle.loads(pickle.dumps((source, chunks)))
    found = [example for chunk in reversed(chunks) for example in source.read(chunk)]
    names = [f"train-00000-of-00001/{row:07d}" for row in (4, 2, 3, 0, 1)]
    assert [example.name for example in found] == names
    assert found[0].source == cell(4)["bytes"] and found[0].target == cell(104)["bytes"]
    assert found[0].origin == f"{path} row group 2, row 0"
    assert [image.size for image in load_example(found[0])] == [(8, 6), (8, 6)]


def test_only_the_columns_of_the_pairs_are_read(save, pyarrow, monkeypatch):
    path = save(rows(3), junk=["x" * 1000] * 3)
    asked = []
    read = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, *args, **kwargs):
        asked.append(kwargs["columns"])
        return read(self, *args, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert len(examples(path)) == 3
    assert asked == [[*CARTOON]] * 2


@pytest.mark.parametrize("columns", KNOWN, ids=lambda columns: columns.target)
def test_known_sets_are_told_by_their_columns(save, columns):
    path = save(rows(2, "Derain the image."), columns.pair)
    [first, _] = examples(path)
    assert first.task == (columns.task or "derain")
    assert first.instructions == ("Derain the image.",)


def test_tasks_of_the_low_level_set_are_told_by_its_sentences(save):
    told = {
        "deblur the blurry image": "deblur",
        "derain the image": "derain",
        "denoise the noisy image": "denoise",
        "enhance the low-light image": "enhance",
    }
    path = save([(cell(i), text, cell(9)) for i, text in enumerate(told)], LOW_LEVEL)
    assert [example.task for example in examples(path)] == [*told.values()]
    path = save(rows(1, "sharpen it"), LOW_LEVEL)
    with pytest.raises(InputError, match="row 0: no task is known for 'sharpen it': name it with"):
        examples(path)
    assert examples(path, task="sharpen")[0].task == "sharpen"


def test_columns_can_be_named(save):
    path = save(rows(1), ("before", "say", "after"))
    with pytest.raises(
        InputError, match="has the columns before, say, after: expected original_im"
    ):
        examples(path)
    named = ("before", "say", "after")
    with pytest.raises(InputError, match=r"--columns before say after --task None: expected three"):
        examples(path, columns=named)
    with pytest.raises(InputError, match="expected three columns"):
        examples(path, columns=("before", "after"), task="edit")
    with pytest.raises(InputError, match="before, say, after: expected before, say, then$"):
        examples(path, columns=("before", "say", "then"), task="edit")
    assert [x.task for x in examples(path, columns=named, task="edit")] == ["edit"]


def test_columns_of_two_known_sets_at_once_are_refused(save):
    path = save(rows(1), cartoonized_image=[cell(1)], edited_image=[cell(2)])
    with pytest.raises(InputError, match="or --columns SOURCE INSTRUCTION TARGET --task NAME"):
        examples(path)


def test_plain_bytes_are_pictures_too(save, pyarrow):
    path = save([(s["bytes"], text, t["bytes"]) for s, text, t in rows(1)])
    assert load_example(examples(path)[0])[0].size == (8, 6)


def test_rows_of_one_source_are_a_group(save):
    path = save([(cell(i), "x", cell(9)) for i in (1, 2, 1)])
    groups = [example.group for example in examples(path)]
    assert groups[0] == groups[2] != groups[1]
    columns = ("source_img", "instruction", "target_img")
    path = save(rows(2), columns, img_id=["7", "7"])
    assert [example.group for example in examples(path)] == ["7", "7"]


@pytest.mark.parametrize(
    ("source", "captions"),
    [
        ("original_image", ("original_prompt", "edited_prompt")),
        ("source_image", ("source_caption", "target_caption")),
    ],
)
def test_captions_of_instructpix2pix_and_ultraedit_are_kept(save, source, captions):
    columns = (source, "edit_prompt", "edited_image")
    said = {captions[0]: ["a cat", ""], captions[1]: ["a dog", None]}
    first, second = examples(save(rows(2), columns, **said))
    assert (first.source_caption, first.target_caption) == ("a cat", "a dog")
    assert (second.source_caption, second.target_caption) == (None, None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00001-0a1b.parquet", "val"),
        ("dev-00000-of-00001.parquet", "val"),
        ("test.parquet", "test"),
        ("default/partial-train/0000.parquet", "train"),
        ("trained.parquet", None),
        ("0000.parquet", None),
    ],
)
def test_splits_are_told_by_names_of_files_and_folders(save, name, split):
    root = save(rows(1), name="x.parquet")
    root.unlink()
    save(rows(1), name=name)
    [example] = examples(root.parent)
    assert example.split == split and example.name == name.removesuffix(".parquet") + "/0000000"


def test_shards_that_are_missing_or_twice_are_named(save):
    for number in (0, 2):
        folder = save(rows(1), name=f"data/train-0000{number}-of-00003-ab.parquet").parent
    with pytest.raises(
        InputError, match=r"data/train-00001-of-00003\*\.parquet is missing \(and so 1 of 3\)"
    ):
        examples(folder.parent)
    assert len(examples(folder / "train-00000-of-00003-ab.parquet")) == 1
    save(rows(1), name="data/train-00001-of-00003-ab.parquet")
    assert len(examples(folder.parent)) == 3
    save(rows(1), name="data/train-00001-of-00003-cd.parquet")
    with pytest.raises(InputError, match=r"-cd\.parquet and .*-ab\.parquet are one shard"):
        examples(folder.parent)


GOOD = cell(1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((None, "x", GOOD), r"'original_image' is null, expected a picture"),
        (({"bytes": None, "path": None}, "x", GOOD), r"'original_image' is null"),
        (({"bytes": b"", "path": None}, "x", GOOD), r"'original_image' is empty"),
        ((GOOD, "x", {"bytes": None, "path": "a.png"}), r"'cartoonized_image' holds a path only"),
        ((GOOD, None, GOOD), r"'edit_prompt' is None, expected a sentence"),
        ((GOOD, "  ", GOOD), r"'edit_prompt' is '  ', expected a sentence"),
    ],
)
def test_bad_cells_are_named_by_row(save, bad, message):
    path = save([*rows(3), bad])
    with pytest.raises(InputError, match=message) as error:
        examples(path)
    assert f"{path} row group 1, row 1: " in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", r"row group 1, row 0 target: not a picture that Pillow knows"),
        (GOOD["bytes"][:100], r"row group 1, row 0 target: damaged picture"),
        (cell(1, (8, 7))["bytes"], r"row 0 source is 8 x 6, .* row 0 target is 8 x 7: a pair must"),
    ],
)
def test_pictures_that_cannot_be_used_are_named_by_row(save, data, message):
    path = save([*rows(2), (GOOD, "x", {"bytes": data, "path": ""})])
    with pytest.raises(InputError, match=message) as error:
        load_example(examples(path)[2])
    assert str(path) in str(error.value)


def test_columns_of_other_types_are_refused(save, pyarrow):
    with pytest.raises(InputError, match=r"column 'edit_prompt' is list<.*>, expected string"):
        examples(save(rows(1, ["a", "b"])))
    with pytest.raises(
        InputError, match=r"'original_image' is int64, expected struct<bytes, path>"
    ):
        examples(save([(3, "x", GOOD)]))
    dictionary = pyarrow.array(["x"]).dictionary_encode()
    path = save([(GOOD,)], ("original_image",), edit_prompt=dictionary, cartoonized_image=[GOOD])
    assert examples(path)[0].instructions == ("x",)


def test_files_that_are_no_parquet_are_named(save):
    path = save(rows(3))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], whole[:200] + b"\0" * 300 + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not parquet, or damaged") as error:
            for example in examples(path):
                load_example(example)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_folders_without_parquet_are_refused(save, tmp_path):
    path = save(rows(1))
    with pytest.raises(
        InputError, match=r"nowhere is nothing, expected a folder: \*\.parquet files"
    ):
        examples(tmp_path / "nowhere")
    (path.parent / "deep").mkdir()
    with pytest.raises(InputError, match=r"found nothing; did you mean .*/set\?"):
        examples(path.parent / "deep")
    (path.parent / "._train-00000-of-00001.parquet").write_bytes(b"x")
    assert len(examples(path.parent)) == 1


def test_sets_without_rows_are_refused(save, pyarrow):
    none = {column: pyarrow.array([], pyarrow.binary()) for column in (CARTOON[0], CARTOON[2])}
    path = save([], (), edit_prompt=pyarrow.array([], pyarrow.string()), **none)
    with pytest.raises(InputError, match="holds no rows"):
        examples(path.parent)
