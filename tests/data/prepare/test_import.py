"""`prepare import` on sets as they really are: incomplete, damaged, with splits that overlap."""

import io
import json
import shutil
from collections import Counter
from itertools import count

import numpy as np
import pytest
from PIL import Image

from ipx2p.data.prepare import __main__ as prepare
from ipx2p.errors import InputError
from tests.data.prepare.test_builder import contents

numbers = count()


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("ipx2p.files.flush_to_disk", lambda path: None)


def run(*argv):
    return prepare.main([str(arg) for arg in argv] + ["--workers", "0"])


def picture(number=None, size=(8, 8)):
    """An encoded picture of its own, or that of a number."""
    seed = 1000 + next(numbers) if number is None else number
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save(path, *, number=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return path


def dataset(folder):
    return json.loads((folder / "dataset.json").read_text())


def of_split(folder, split):
    """The pictures of a split."""
    lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [folder / line[role] for line in lines for role in ("source", "target")]


def counts(folder):
    return {split: sum(tasks.values()) for split, tasks in dataset(folder)["counts"].items()}


@pytest.fixture
def pairs(tmp_path):
    """200 pairs in two parallel folders, three of them damaged."""
    for number in range(200):
        for side in ("old", "new"):
            save(tmp_path / "set" / side / f"{number:03}.png")
    for number in (5, 70, 199):
        path = tmp_path / "set" / "old" / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:-40])
    return tmp_path / "set"


FOLDERS = ("--source", "old", "--target", "new", "--task", "derain")
SKIP = ("--on-error", "skip")


@pytest.fixture
def parquet(tmp_path):
    """Writes a file of rows (source, target) of one row group."""
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(rows, name="train-00000-of-00001.parquet", row_group_size=1000, **more):
        cells = [
            [{"bytes": data, "path": ""} for data in column] for column in zip(*rows, strict=True)
        ]
        said = {
            "source_image": cells[0],
            "edited_image": cells[1],
            "edit_prompt": ["do"] * len(rows),
        }
        (tmp_path / "set").mkdir(exist_ok=True)
        path = tmp_path / "set" / name
        table = pyarrow.table(said | more)
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write


# One example is skipped, and not its chunk


def test_three_truncated_files_cost_three_pairs_of_two_hundred(pairs, tmp_path, capsys):
    run("import", "folders", pairs, tmp_path / "out", *FOLDERS, *SKIP)
    assert sum(counts(tmp_path / "out").values()) == 197
    skipped = dataset(tmp_path / "out")["skipped"]
    assert [*skipped] == ["005", "070", "199"]
    assert "old/070.png: damaged picture" in skipped["070"]
    assert "3 inputs skipped, see dataset.json" in capsys.readouterr().out


def test_one_bad_cell_costs_one_row_of_three_hundred(parquet, tmp_path):
    rows = [(picture(), picture()) for _ in range(300)]
    rows[150] = (b"no picture", rows[150][1])
    parquet(rows, row_group_size=100, mask_image=[b"x"] * 300)
    run("import", "parquet", tmp_path / "set", tmp_path / "out", *SKIP)
    assert sum(counts(tmp_path / "out").values()) == 299
    assert [*dataset(tmp_path / "out")["skipped"]] == ["train-00000-of-00001/0000150"]


def test_rows_after_a_damaged_page_are_named_each(parquet, tmp_path, monkeypatch):
    parquet([(picture(), picture()) for _ in range(40)])
    pyarrow = pytest.importorskip("pyarrow")
    read = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, *args, **kwargs):
        yield next(read(self, *args, **kwargs))
        raise OSError("page 2 is damaged")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    run("import", "parquet", tmp_path / "set", tmp_path / "out", *SKIP)
    assert sum(counts(tmp_path / "out").values()) == 16
    assert len(dataset(tmp_path / "out")["skipped"]) == 24


def test_text_that_is_not_utf8_costs_its_row(parquet, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    said = pyarrow.array([b"do", b"d\xff", b"do"]).view(pyarrow.string())
    parquet([(picture(), picture()) for _ in range(3)], edit_prompt=said)
    run("import", "parquet", tmp_path / "set", tmp_path / "out", *SKIP)
    [(name, reason)] = dataset(tmp_path / "out")["skipped"].items()
    assert name.endswith("/0000001") and "text that is not UTF-8" in reason


def test_skipping_resumes_to_the_same_bytes_and_takes_what_was_mended(pairs, tmp_path, monkeypatch):
    for path in pairs.glob("*/[01][1-689]?.png"):
        path.unlink()
    run("import", "folders", pairs, tmp_path / "whole", *FOLDERS, *SKIP)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ipx2p.data.prepare.builder._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run("import", "folders", pairs, tmp_path / "out", *FOLDERS, *SKIP)
    shutil.copytree(tmp_path / "out", tmp_path / "mended")
    run("import", "folders", pairs, tmp_path / "out", *FOLDERS, *SKIP)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    shutil.copy(save(tmp_path / "good.png"), pairs / "old" / "070.png")
    run("import", "folders", pairs, tmp_path / "mended", *FOLDERS, *SKIP)
    assert [*dataset(tmp_path / "mended")["skipped"]] == ["005"]


def test_a_full_disk_is_never_skipped(pairs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ipx2p.files.flush_to_disk", full)
    with pytest.raises(InputError, match="No space left") as error:
        run("import", "folders", pairs, tmp_path / "out", *FOLDERS, *SKIP)
    assert "--on-error" not in str(error.value)


# Published splits


def test_published_test_pairs_stay_and_training_pairs_of_their_sources_go(
    parquet, tmp_path, capsys
):
    parquet([(picture(n), picture()) for n in range(20)])
    parquet(
        [(picture(n), picture()) for n in (100, 101, 2, 3)], "validation-00000-of-00001.parquet"
    )
    parquet(
        [(picture(n), picture()) for n in (*range(200, 204), 0, 1)], "test-00000-of-00001.parquet"
    )
    run("import", "parquet", tmp_path / "set", tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 16, "val": 4, "test": 6}
    assert dataset(tmp_path / "out")["left_out"] == 4
    assert "4 pairs left out whose pictures are in another split" in capsys.readouterr().out
    trained, *held_out = ({path.read_bytes() for path in of_split(tmp_path / "out", split)}
                          for split in ("train", "val", "test"))  # fmt: skip
    assert trained.isdisjoint(set.union(*held_out))


def test_a_pair_that_is_in_train_and_test_is_a_test_pair(parquet, tmp_path):
    rows = [(picture(), picture()) for _ in range(6)]
    parquet(rows)
    parquet(rows[:3], "test-00000-of-00001.parquet")
    run("import", "parquet", tmp_path / "set", tmp_path / "out")
    found = counts(tmp_path / "out")
    assert found.pop("test") == 3 and sum(found.values()) == 3
    assert dataset(tmp_path / "out")["left_out"] == 3 and not dataset(tmp_path / "out")["repeated"]


def test_clean_pictures_of_rain13k_that_are_tested_are_not_trained_on(tmp_path):
    for place, clean in (("train/Rain13K", (1, 2, 3, 4)), ("test/Test100", (*range(11, 20), 1))):
        for number in clean:
            save(tmp_path / "set" / place / "input" / f"{number}.png")
            save(tmp_path / "set" / place / "target" / f"{number}.png", number=number)
    run("import", "rain13k", tmp_path / "set", tmp_path / "out")
    found = counts(tmp_path / "out")
    assert found.pop("test") == 10 and sum(found.values()) == 3


def test_equal_sources_in_splits_of_magicbrush_cost_training_pairs_alone(tmp_path):
    for split, images in (("train", "abc"), ("dev", "acd"), ("test", "bcd")):
        sessions = {}
        for image in images:
            sessions[image] = [{"input": "i.png", "output": "o.png", "instruction": "go"}]
            folder = tmp_path / "set" / split / "images" / image
            # c and d: equal ids of different photographs
            save(folder / "i.png", number=900 + "ab".index(image) if image in "ab" else None)
            save(folder / "o.png")
        (tmp_path / "set" / split / "edit_sessions.json").write_text(json.dumps(sessions))
    run("import", "magicbrush", tmp_path / "set", tmp_path / "out")
    assert counts(tmp_path / "out") == {"train": 1, "val": 3, "test": 3}
    assert dataset(tmp_path / "out")["left_out"] == 2


# What lists name and the disk lacks


@pytest.fixture
def incomplete(tmp_path):
    """InstructPix2Pix without two of its forty folders."""
    seeds = [[f"{prompt:07}", ["1"]] for prompt in range(40)]
    for name, _ in seeds[2:]:
        for side in "01":
            save(tmp_path / "set" / name / f"1_{side}.jpg")
        text = {"edit": f"do {name}", "input": "a", "output": "b"}
        (tmp_path / "set" / name / "prompt.json").write_text(json.dumps(text))
    (tmp_path / "set" / "seeds.json").write_text(json.dumps(seeds))
    return tmp_path / "set"


def test_absent_folders_stop_at_once_or_are_skipped(incomplete, tmp_path):
    with pytest.raises(InputError) as error:
        run("import", "instructpix2pix", incomplete, tmp_path / "out")
    assert str(error.value) == (
        f"{incomplete / '0000000'} is missing, {incomplete / 'seeds.json'} lists it (and 1 more "
        "like this) (or leave out what cannot be used: --on-error skip)"
    )
    assert not (tmp_path / "out").exists()
    run("import", "instructpix2pix", incomplete, tmp_path / "out", *SKIP)
    assert sum(counts(tmp_path / "out").values()) == 38
    assert [*dataset(tmp_path / "out")["skipped"]] == ["0000000/1", "0000001/1"]


def test_a_stray_file_of_rain13k_can_be_skipped(tmp_path):
    for side in ("input", "target"):
        for number in range(5):
            save(tmp_path / "set" / "train" / "Rain13K" / side / f"{number}.png")
    stray = save(tmp_path / "set" / "train" / "Rain13K" / "input" / "stray.png")
    with pytest.raises(InputError, match="stray.png has no target in .*target: fetch what is"):
        run("import", "rain13k", tmp_path / "set", tmp_path / "out")
    run("import", "rain13k", tmp_path / "set", tmp_path / "out", *SKIP)
    assert sum(counts(tmp_path / "out").values()) == 5
    [(name, reason)] = dataset(tmp_path / "out")["skipped"].items()
    assert name == "train/Rain13K/stray" and reason.startswith(f"{stray} has no target")


# Names, patterns and sizes


def test_a_task_that_leads_elsewhere_writes_nothing(pairs, tmp_path):
    before = Counter(path for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"--task is '\.\./\.\./\.\./esc', expected a name"):
        run("import", "folders", pairs, tmp_path / "out", *FOLDERS[:-1], "../../../esc")
    assert Counter(path for path in tmp_path.rglob("*")) == before


def test_a_pattern_pairs_names_on_the_command_line(tmp_path):
    for number in range(4):
        save(tmp_path / "set" / f"norain-{number}.png")
        for rain in range(3):
            save(tmp_path / "set" / "rainy" / f"rain-{number}_{rain}.png")
    sides = ("--source", "rainy", "--target", ".", "--task", "derain")
    pattern = ("--pairs", "rain-{id}_{}.png=norain-{id}.png")
    run("import", "folders", tmp_path / "set", tmp_path / "out", *sides, *pattern)
    assert sum(counts(tmp_path / "out").values()) == 12


@pytest.mark.parametrize("option", ["--short-side", "--size"])
def test_a_short_side_that_is_rounded_is_announced(pairs, tmp_path, capsys, option):
    few = ("--tasks", "enhance", "--count", "3")
    run("restore", pairs / "new", tmp_path / "out", option, "13", *few)
    assert "--short-side 13 becomes 16: sides are multiples of 8" in capsys.readouterr().out
