"""Building a data set: the same bytes however the work was done, and nothing half-done that looks
whole."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipx2p.data.manifest import Record
from ipx2p.data.pairs import ManifestPairs
from ipx2p.data.prepare.builder import Made, Recipe, Unit, build
from ipx2p.data.prepare.fingerprints import fingerprint
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes
from ipx2p.images import save_image


@dataclass
class Numbers(Recipe):
    """Pictures of random colours, one pair for each number."""

    numbers: list[int]
    bad: tuple[int, ...] = ()
    kill_at: int | None = None
    made: list[int] = field(default_factory=list)
    name = "numbers"
    seed = 3
    licence = "none"

    def units(self):
        return [Unit(f"number {n}", n) for n in self.numbers]

    def make(self, unit, output):
        if unit.item == self.kill_at:
            raise KeyboardInterrupt
        if unit.item in self.bad:
            raise InputError(f"{unit.item}.png: damaged picture: replace the file")
        self.made.append(unit.item)
        files = []
        for role in ("source", "target"):
            seed = [unit.item % 100, role == "target"]  # 100 and more repeat 0 and more
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
            image = Image.fromarray(pixels)
            name = f"pictures/{role}/{unit.item}.png"
            save_image(image, output / name)
            files.append((name, digest_bytes((output / name).read_bytes())))
        names, digests = zip(*files, strict=True)
        group = f"group {unit.item}"
        entry = Record(*names, "count", [f"do {unit.item % 100}"], group, digests=digests)
        return Made([entry], {group: fingerprint(image)}, megapixels=1e-4)

    def describe(self):
        return {"bad": [*self.bad]}


def make(recipe, output, *, workers=0, **settings):
    build(recipe, output, world=World(), workers=workers, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    make(Numbers([*range(12)]), folder)
    return contents(folder)


def test_a_set_holds_what_the_trainer_takes(whole, tmp_path):
    make(Numbers([*range(12)]), tmp_path / "set")
    dataset = json.loads(whole["dataset.json"])
    assert sum(n for tasks in dataset["counts"].values() for n in tasks.values()) == 12
    assert dataset["pictures"]["count"] == 24 and dataset["inputs"]["count"] == 12
    assert set(whole) >= {"train.jsonl", "val.jsonl", "test.jsonl", "sheets/count.jpg"}
    for split, digest in dataset["manifests"].items():
        assert digest_bytes(whole[split]) == digest
        assert (
            len(ManifestPairs(tmp_path / "set" / split)) == dataset["counts"][split[:-6]]["count"]
        )
    assert not any(name.startswith(".work") for name in whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_byte(whole, tmp_path, workers):
    make(Numbers([*range(12)]), tmp_path / "set", workers=workers)
    assert contents(tmp_path / "set") == whole


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_stopped_build_goes_on_to_the_same_bytes(whole, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        make(Numbers([*range(12)], kill_at=at), tmp_path / "set")
    assert not [*(tmp_path / "set").glob("*.json*")]
    again = Numbers([*range(12)])
    make(again, tmp_path / "set")
    assert again.made == [*range(at, 12)]
    assert contents(tmp_path / "set") == whole


def test_what_killed_writes_left_is_removed(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(Numbers([*range(12)], kill_at=6), tmp_path / "set")
    for name in (".0123456789abcdef.jsonl", "sheets/.0123456789abcdef.jpg"):
        left = tmp_path / "set" / name
        left.parent.mkdir(exist_ok=True)
        left.touch()
        os.utime(left, (0, 0))
    make(Numbers([*range(12)]), tmp_path / "set")
    assert contents(tmp_path / "set") == whole


def test_a_torn_record_and_a_lost_picture_are_made_again(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(Numbers([*range(12)], kill_at=6), tmp_path / "set")
    [log] = (tmp_path / "set" / ".work").glob("made_*.jsonl")
    log.write_bytes(log.read_bytes()[:-40])
    (tmp_path / "set" / "pictures" / "target" / "2.png").unlink()
    (tmp_path / "set" / "pictures" / "source" / ".123.png").write_bytes(b"left by a kill")
    again = Numbers([*range(12)])
    make(again, tmp_path / "set")
    assert again.made == [2, *range(5, 12)]
    assert contents(tmp_path / "set") == whole


def test_a_finished_set_is_left_alone(tmp_path, capsys):
    make(Numbers([*range(4)]), tmp_path / "set")
    again = Numbers([*range(4)])
    make(again, tmp_path / "set")
    assert again.made == [] and "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("begun", ["finished", "stopped"])
@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Numbers([*range(5)]), r"inputs\.count was 4, is 5, inputs\.digest was"),
        (Numbers([*range(4)], bad=(9,)), r"settings\.bad was \[\], is \[9\]; choose"),
    ],
)
def test_another_recipe_does_not_go_into_the_same_folder(tmp_path, begun, other, key):
    if begun == "finished":
        make(Numbers([*range(4)]), tmp_path / "set")
    else:
        with pytest.raises(KeyboardInterrupt):
            make(Numbers([*range(4)], kill_at=2), tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(InputError, match=f"holds a data set of other settings: {key}"):
        make(other, tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        make(Numbers([1]), tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_stops_the_work_and_nothing_looks_whole(tmp_path, workers):
    with pytest.raises(InputError, match=r"^7.png: damaged .* --on-error skip"):
        make(Numbers([*range(12)], bad=(7,)), tmp_path / "set", workers=workers)
    assert not [*(tmp_path / "set").glob("*.json*")]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_can_be_skipped_and_are_named(tmp_path, workers):
    recipe = Numbers([*range(12)], bad=(2, 7))
    make(recipe, tmp_path / "set", workers=workers, on_error="skip")
    dataset = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert [*dataset["skipped"]] == ["number 2", "number 7"]
    assert sum(n for tasks in dataset["counts"].values() for n in tasks.values()) == 10


def test_a_stop_at_a_bad_picture_can_be_answered_by_skipping_or_mending(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(InputError, match="damaged"):
        make(Numbers([*range(4)], bad=(2,)), folder)
    with pytest.raises(KeyboardInterrupt):
        make(Numbers([*range(4)], bad=(2,), kill_at=3), folder, on_error="skip")
    mended = Numbers([*range(4)], bad=(2,))
    make(mended, folder, on_error="skip")
    assert mended.made == [3]
    assert [*json.loads((folder / "dataset.json").read_text())["skipped"]] == ["number 2"]


def test_a_set_of_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no pair could be made: 1.png: damaged"):
        make(Numbers([1], bad=(1,)), tmp_path / "set", on_error="skip")
    assert not [*(tmp_path / "set").glob("*.json*")]


def test_repeated_pairs_are_there_once(tmp_path):
    make(Numbers([0, 1, 2, 100, 102]), tmp_path / "set")
    dataset = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert dataset["repeated"] == 2 and dataset["pictures"]["count"] == 6
    assert {path.name for path in (tmp_path / "set" / "pictures" / "source").iterdir()} == {
        "0.png", "1.png", "2.png"
    }  # fmt: skip
