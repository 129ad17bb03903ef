"""`python -m ipx2p.data.prepare`, as a person uses it: recipes, mixes, checks, bad input."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from ipx2p.data.degradations import tasks
from ipx2p.data.degradations.sensor import LowLightConfig, low_light
from ipx2p.data.degradations.tasks import DEGRADATIONS
from ipx2p.data.instructions import bank
from ipx2p.data.pairs import ManifestPairs
from ipx2p.data.prepare import __main__ as prepare
from ipx2p.data.published.registry import SOURCES
from ipx2p.errors import InputError
from ipx2p.images import image_from_pixels01, pixels01_from_image
from ipx2p.names import PUBLISHED
from tests.conftest import ROOT
from tests.data.prepare.test_builder import contents

PHOTOS = ROOT / "assets" / "photos"
SMALL = ("--size", "32", "--workers", "0")


def run(*argv):
    return prepare.main([str(arg) for arg in argv])


def lines(folder, split="train"):
    path = folder / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def all_lines(folder):
    return [line for split in ("train", "val", "test") for line in lines(folder, split)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six photographs, small."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(PHOTOS.glob("*.jpg"))[:6]:
        image = Image.open(path)
        image.reduce(6).save(folder / path.name)
    return folder


@pytest.fixture(scope="module")
def restored(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("restored") / "set"
    run("restore", photos, folder, *SMALL, "--seed", "1")
    return folder


@pytest.fixture
def copy(restored, tmp_path):
    """A set that a test may damage."""
    return Path(shutil.copytree(restored, tmp_path / "copy"))


# Lists on the command line


def test_help_lists_what_there_is():
    assert set(PUBLISHED) == set(SOURCES)


# Recipes


def test_restore_makes_every_task_of_every_photo(restored):
    found = all_lines(restored)
    assert len(found) == 6 * len(DEGRADATIONS) and {line["task"] for line in found} == {
        *DEGRADATIONS
    }
    for line in found:
        source, target = (Image.open(restored / line[role]) for role in ("source", "target"))
        assert source.size == target.size and min(source.size) == 32
        # At 32 pixels a mild blur is less than a pixel wide.
        assert line["task"] == "deblur" or source.tobytes() != target.tobytes()
    of_split = [{line["group"] for line in lines(restored, s)} for s in ("train", "val", "test")]
    assert [len(groups) for groups in of_split] == [4, 1, 1]
    assert len(set.union(*of_split)) == 6
    assert {path.stem for path in (restored / "sheets").iterdir()} == {*DEGRADATIONS}


def test_photographs_are_degraded_each_in_its_own_way(tmp_path):
    """The noise of two flat pictures, which differ in one value, is not the same."""
    for place, grey in enumerate((120, 121)):
        folder = tmp_path / "flat"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"{place}.png")
    run("restore", folder, tmp_path / "set", *SMALL, "--tasks", "denoise")
    noise = [
        pixels01_from_image(Image.open(tmp_path / "set" / line["source"])).flatten()
        for line in all_lines(tmp_path / "set")
    ]
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1]) < 0.2


def test_the_trainer_opens_what_is_made(restored):
    pairs = ManifestPairs(restored / "train.jsonl")
    assert len(pairs) == 4 * len(DEGRADATIONS)


def test_photographs_held_out_by_name_are_the_validation_set(photos, tmp_path):
    names = [path.name for path in sorted(photos.iterdir())][:2]
    for recipe in ("restore", "cartoonize"):
        run(recipe, photos, tmp_path / recipe, *SMALL, "--held-out", *names)
    run("mix", tmp_path / "all", tmp_path / "restore", tmp_path / "cartoonize")
    stems = {Path(name).stem for name in names}
    for split, is_held_out in (("train", False), ("val", True)):
        pairs = lines(tmp_path / "all", split)
        assert {pair["task"] for pair in pairs} == {*DEGRADATIONS, "cartoonize"}
        shown = {Path(pair["target"]).stem.rpartition("-")[0] for pair in pairs}
        assert (shown == stems) if is_held_out else shown.isdisjoint(stems)
    with pytest.raises(InputError, match="--held-out names none.jpg, not in"):
        run("restore", photos, tmp_path / "none", *SMALL, "--held-out", "none.jpg")


def test_cartoonize_keeps_the_photo_as_source(photos, tmp_path):
    run("cartoonize", photos, tmp_path / "set", *SMALL, "--count", "3")
    found = all_lines(tmp_path / "set")
    assert len(found) == 3 and {line["task"] for line in found} == {"cartoonize"}
    dataset = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert dataset["settings"]["teacher"] == "classical"


def test_combine_applies_several_degradations_in_physical_order(photos, tmp_path):
    tasks = ("--tasks", "denoise+enhance", "enhance+denoise", "denoise+derain")
    run("combine", photos, tmp_path / "set", *SMALL, "--count", "3", *tasks)
    found = all_lines(tmp_path / "set")
    assert {line["task"] for line in found} == {"enhance+denoise", "derain+denoise"}
    assert len(found) == 6


def test_lines_hold_all_sentences_of_the_bank(restored):
    found = all_lines(restored)
    assert all(line["instruction"] == [*bank(line["task"])] for line in found)


def test_a_policy_is_sent_on_to_training(photos, tmp_path):
    with pytest.raises(InputError, match="train with data.instructions=per_pair"):
        run("restore", photos, tmp_path / "set", *SMALL, "--instructions", "per_pair")
    assert not (tmp_path / "set").exists()


def test_your_own_sentences_take_the_place_of_the_bank(photos, tmp_path):
    (tmp_path / "mine.txt").write_text("stop the rain\nlet the sun in\n")
    mine = ("--bank", f"derain={tmp_path / 'mine.txt'}")
    run("restore", photos, tmp_path / "set", *SMALL, "--tasks", "derain", *mine)
    said = [line["instruction"] for line in all_lines(tmp_path / "set")]
    assert said == [["stop the rain", "let the sun in"]] * 6


def test_severities_can_be_set(photos, restored, tmp_path):
    few = (*SMALL, "--tasks", "enhance")
    run("restore", photos, tmp_path / "set", *few, "--degrade", "low_light.stops=[6,7]")

    def light(folder):
        dark = [line for line in all_lines(folder) if line["task"] == "enhance"]
        return sum(Image.open(folder / x["source"]).convert("L").resize((1, 1)).getpixel((0, 0))
                   for x in dark)  # fmt: skip

    assert light(tmp_path / "set") < light(restored) / 2


def test_the_same_photo_under_two_names_is_used_once(photos, tmp_path):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copy(next(folder.iterdir()), folder / "again.jpg")
    run("restore", folder, tmp_path / "set", *SMALL, "--tasks", "derain")
    assert len(all_lines(tmp_path / "set")) == 6


def test_a_sheet_of_all_degradations_is_drawn_from_a_folder(photos, tmp_path):
    run("sheet", photos, tmp_path / "x.jpg")
    run("sheet", photos, tmp_path / "y.jpg", "--seed", "1")
    assert min(Image.open(tmp_path / "x.jpg").size) > 4 * 256
    assert (tmp_path / "x.jpg").read_bytes() != (tmp_path / "y.jpg").read_bytes()


@pytest.fixture
def one_more_task(monkeypatch):
    """As if the package declared `unscratch` too."""
    scratch = tasks._task("unscratch", low_light, LowLightConfig)
    more = make_dataclass(
        "More", [("scratch", LowLightConfig, scratch)], bases=(tasks.DegradeConfig,)
    )

    def declare():
        monkeypatch.setattr(tasks, "DegradeConfig", more)
        monkeypatch.setitem(DEGRADATIONS, "unscratch", fields(more)[-1])

    return declare


def test_a_set_is_judged_by_its_own_tasks(copy, photos, tmp_path, one_more_task, capsys):
    few = ("restore", photos, tmp_path / "few", *SMALL, "--tasks", "denoise", "derain")
    run(*few)
    before = contents(copy), contents(tmp_path / "few")
    one_more_task()
    run("restore", photos, copy, *SMALL, "--seed", "1")
    run(*few[:-3])
    assert capsys.readouterr().out.count("is finished") == 2
    assert before == (contents(copy), contents(tmp_path / "few"))
    with pytest.raises(InputError, match="no sentences for the task 'unscratch'"):
        run("restore", photos, tmp_path / "new", *SMALL)
    with pytest.raises(InputError, match="holds a data set of other settings"):
        run(*few[:-1])


def test_an_interrupted_set_resumes_with_its_own_tasks(photos, tmp_path, one_more_task):
    plan = {"recipe": "restore", "settings": {"tasks": ["denoise"]}}
    (tmp_path / "set" / ".work").mkdir(parents=True)
    (tmp_path / "set" / ".work" / "plan.json").write_text(json.dumps(plan))
    one_more_task()
    run("restore", photos, tmp_path / "set", *SMALL)
    assert {line["task"] for line in all_lines(tmp_path / "set")} == {"denoise"}


# Published sets


@pytest.fixture
def scans(photos, tmp_path):
    """Two parallel folders."""
    for path in photos.iterdir():
        for name in ("old", "new"):
            target = tmp_path / "scans" / name / f"{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(path)
            (image if name == "new" else image.convert("L")).save(target)
    return tmp_path / "scans"


IMPORT = ("--source", "old", "--target", "new", "--workers", "0")


def test_import_copies_files_as_they_are(scans, tmp_path):
    run("import", "folders", scans, tmp_path / "set", *IMPORT, "--task", "derain")
    found = all_lines(tmp_path / "set")
    assert len(found) == 6
    published = {path.read_bytes() for path in (scans / "new").iterdir()}
    assert {(tmp_path / "set" / line["target"]).read_bytes() for line in found} == published


def test_import_can_reduce_and_link(scans, tmp_path):
    run("import", "folders", scans, tmp_path / "a", *IMPORT, "--task", "derain", "--size", "24")
    sizes = [Image.open(tmp_path / "a" / line["target"]).size for line in all_lines(tmp_path / "a")]
    assert {min(size) for size in sizes} == {24}
    run("import", "folders", scans, tmp_path / "b", *IMPORT, "--task", "derain", "--link")
    linked = [tmp_path / "b" / line["target"] for line in all_lines(tmp_path / "b")]
    assert {path.stat().st_nlink for path in linked} == {2}


def test_a_task_without_sentences_asks_for_some(scans, tmp_path):
    with pytest.raises(InputError, match=r"no sentences for the task 'scan': .* --bank scan=FILE"):
        run("import", "folders", scans, tmp_path / "set", *IMPORT, "--task", "scan")
    assert not (tmp_path / "set" / "train.jsonl").exists()


def test_a_truncated_picture_is_named_and_nothing_looks_whole(scans, tmp_path):
    bad = next((scans / "old").iterdir())
    bad.write_bytes(bad.read_bytes()[:-50])
    with pytest.raises(InputError, match=f"{bad}: damaged picture"):
        run("import", "folders", scans, tmp_path / "set", *IMPORT, "--task", "derain")
    assert not [*(tmp_path / "set").glob("*.json*")]


# Mixes


def test_mix_balances_the_tasks(restored, tmp_path):
    run("mix", tmp_path / "all", restored, "--preset", "balanced")
    tasks = [line["task"] for line in lines(tmp_path / "all")]
    assert {task: tasks.count(task) for task in tasks} == dict.fromkeys(DEGRADATIONS, 4)
    assert len(ManifestPairs(tmp_path / "all" / "train.jsonl")) == 4 * len(DEGRADATIONS)
    assert run("check", tmp_path / "all", "--workers", "0") == 0


def test_mix_takes_counts_and_weights_and_nests(restored, tmp_path):
    run("mix", tmp_path / "a", restored, "--counts", "derain=3", "denoise=1")
    run("mix", tmp_path / "b", restored, "--weights", "derain=2", "denoise=1", "enhance=0.5")
    few, more = (
        {(line["task"], line["source"]) for line in lines(tmp_path / name)} for name in ("a", "b")
    )
    tasks = [task for task, _ in more]
    assert [tasks.count(task) for task in ("derain", "denoise", "enhance")] == [4, 2, 1]
    assert few < more


def write_lines(path, lines):
    """A manifest whose pairs all show the pictures s.png and t.png beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("s.png", "t.png"):
        Image.new("RGB", (8, 8)).save(path.parent / name)
    pair = {"source": "s.png", "target": "t.png", "instruction": "go", "task": "derain"}
    path.write_text("".join(json.dumps(pair | line) + "\n" for line in lines))
    return path


def test_mix_keeps_captions_groups_and_keys_of_others(tmp_path):
    own = {"group": "a", "source_caption": "rain", "target_caption": "sun", "rating": 5}
    run("mix", tmp_path / "all", write_lines(tmp_path / "m.jsonl", [own]), "--counts", "derain=1")
    pair = {"source": "../s.png", "target": "../t.png", "instruction": "go", "task": "derain"}
    assert lines(tmp_path / "all") == [pair | own]


def test_mix_knows_the_preset_of_the_experiment(tmp_path):
    many = write_lines(
        tmp_path / "many.jsonl",
        [{"task": task, "group": f"{n}"} for task in DEGRADATIONS for n in range(1300)],
    )
    run("mix", tmp_path / "all", many, "--preset", "blog")
    tasks = [line["task"] for line in lines(tmp_path / "all")]
    wanted = {"deblur": 1200, "derain": 686, "denoise": 8, "enhance": 23}
    assert {task: tasks.count(task) for task in tasks} == wanted


def test_what_mix_takes_does_not_hang_on_where_things_lie(tmp_path):
    many = write_lines(tmp_path / "many.jsonl", [{"group": f"{n}"} for n in range(40)])
    elsewhere = write_lines(
        tmp_path / "a" / "b" / "m.jsonl", [{"group": f"{n}"} for n in range(40)]
    )
    chosen = []
    for name, manifest in (("one", many), ("two/deep/set", many), ("three", elsewhere)):
        run("mix", tmp_path / name, manifest, "--counts", "derain=7")
        chosen.append([line["group"] for line in lines(tmp_path / name)])
    assert chosen[0] == chosen[1] == chosen[2]


def test_mix_writes_paths_that_hold_behind_links(restored, tmp_path):
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "other" / "deep")
    run("mix", tmp_path / "link" / "all", restored, "--preset", "balanced")
    assert run("check", tmp_path / "link" / "all", "--workers", "0") == 0


def test_a_finished_mix_is_left_alone_and_a_torn_one_goes_on(restored, tmp_path, capsys):
    argv = ("mix", tmp_path / "all", restored, "--preset", "balanced")
    run(*argv)
    whole = contents(tmp_path / "all")
    run(*argv)
    assert "is finished" in capsys.readouterr().out
    (tmp_path / "all" / "dataset.json").unlink()
    (tmp_path / "all" / ".work").mkdir()
    plan = json.loads(whole["dataset.json"])
    (tmp_path / "all" / ".work" / "plan.json").write_text(json.dumps(plan))
    run(*argv)
    assert contents(tmp_path / "all") == whole
    with pytest.raises(InputError, match="holds a data set of other settings"):
        run(*argv[:3], "--counts", "derain=1")


def test_sets_that_name_their_pictures_alike_are_not_taken_for_one(photos, tmp_path):
    files = sorted(photos.iterdir())
    for name, of_set in (("a", files[:3]), ("b", files[3:])):
        for number, path in enumerate(of_set):
            for folder in ("old", "new"):
                copy = tmp_path / name / folder / f"{number}.png"
                copy.parent.mkdir(parents=True, exist_ok=True)
                Image.open(path).save(copy)
        run("import", "folders", tmp_path / name, tmp_path / f"set_{name}", *IMPORT, "--task",
            "derain", "--split", "1", "1", "1")  # fmt: skip
    inputs = (tmp_path / "set_a", tmp_path / "set_b")
    run("mix", tmp_path / "all", *inputs, "--counts", "derain=2")
    assert len(all_lines(tmp_path / "all")) == 6


def test_mix_takes_a_pair_once_and_keeps_a_picture_in_one_split(copy, restored, tmp_path):
    for here, there in (("val", "test"), ("test", "val")):
        text = (restored / f"{here}.jsonl").read_text()
        (copy / f"{there}.jsonl").write_text(text)
    run("mix", tmp_path / "all", restored, copy, restored, "--preset", "balanced")
    groups = {s: {x["group"] for x in lines(tmp_path / "all", s)} for s in ("train", "val", "test")}
    assert len(groups["test"]) == 2 and not groups["val"] and len(groups["train"]) == 4
    texts = (tmp_path / "all" / "train.jsonl").read_text().splitlines()
    assert len({(json.loads(t)["source"].split("/")[-3:].__str__()) for t in texts}) == 4 * len(
        DEGRADATIONS
    )


def test_mix_does_not_train_on_a_tested_file_of_another_group(tmp_path):
    def write(name, numbers, **of_split):
        (tmp_path / name).mkdir()
        for split, groups in of_split.items():
            pairs = [{"source": f"{n}.png", "group": g} for n, g in groups]
            for pair in pairs:
                pair |= {"task": "deblur", "instruction": "go", "target": f"clean {pair['source']}"}
                for key in ("source", "target"):
                    (tmp_path / name / pair[key]).write_text(numbers[pair["source"]] + key)
            text = "".join(json.dumps(pair) + "\n" for pair in pairs)
            (tmp_path / name / f"{split}.jsonl").write_text(text)

    write("gopro", {"1.png": "a", "2.png": "b"}, train=[(1, "s1")], test=[(2, "s2")])
    write("flat", {"7.png": "b", "8.png": "c"}, train=[(7, None)], val=[(8, None)])
    write("other", {"4.png": "c"}, test=[(4, None)])
    run("mix", tmp_path / "all", *(tmp_path / name for name in ("gopro", "flat", "other")))
    found = {
        split: [x["source"] for x in lines(tmp_path / "all", split)] for split in ("train", "test")
    }
    assert found == {"train": ["../gopro/1.png"], "test": ["../gopro/2.png", "../other/4.png"]}
    assert json.loads((tmp_path / "all" / "dataset.json").read_text())["left_out"] == 2
    assert not (tmp_path / "all" / "val.jsonl").exists()


def test_mix_does_not_train_on_what_is_validated(restored, copy, tmp_path):
    text = (copy / "val.jsonl").read_text()
    (copy / "val.jsonl").unlink()
    (copy / "train.jsonl").write_text((copy / "train.jsonl").read_text() + text)
    run("mix", tmp_path / "all", restored, copy, "--counts", "derain=8")
    held_out = {line["group"] for line in lines(tmp_path / "all", "val")}
    assert held_out and not held_out & {line["group"] for line in lines(tmp_path / "all")}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("--preset", "blog"), r"too few pairs for 1200 of deblur \(there are 4\)"),
        (("--counts", "derian=3"), "no pairs to train on of 'derian'; did you mean derain"),
        (("--counts", "derain=x"), "--counts: invalid literal"),
        (("--weights", "derain=-1"), "derain=-1.0: expected a number above 0"),
        (("--weights", "derain=1e-320"), "derain=1e-320: expected a number above 0"),
        (("--counts", "derain"), "'derain' is not TASK=VALUE"),
    ],
)
def test_mixes_that_cannot_be_are_refused(restored, tmp_path, how, message):
    with pytest.raises(InputError, match=message):
        run("mix", tmp_path / "all", restored, *how)
    assert not (tmp_path / "all").exists()


def test_an_unfinished_set_is_not_mixed(copy, tmp_path):
    (copy / ".work").mkdir()
    with pytest.raises(InputError, match="is not finished"):
        run("mix", tmp_path / "all", copy, "--preset", "balanced")


# Check and stats


def rewrite(folder, change, split="train"):
    """Change the first line of a manifest."""
    first, *rest = lines(folder, split)
    text = [change] if isinstance(change, str) else [json.dumps(first | change)]
    text += [json.dumps(line) for line in rest]
    (folder / f"{split}.jsonl").write_text("\n".join(text) + "\n")


def test_check_is_content_with_what_prepare_makes(restored, capsys):
    assert run("check", restored / "train.jsonl", "--workers", "0") == 0
    assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "bad lines"),
        ({"task": None}, "bad lines"),
        ({"instruction": "  "}, "bad lines"),
        ({"source": "/etc/passwd"}, "bad lines"),
        ({"source": "gone.png"}, "missing pictures"),
        ({"source": "sheets"}, "unreadable pictures"),
        ({"source": "dataset.json"}, "unreadable pictures"),
    ],
)
def test_check_names_file_and_line(copy, capsys, change, message):
    rewrite(copy, change)
    assert run("check", copy / "train.jsonl", "--workers", "0") == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{copy / 'train.jsonl'} line 1: ") and message in last


def test_check_finds_pairs_of_two_sizes_and_repeated_ones(copy, capsys):
    sizes = lines(copy)
    other = next(x for x in sizes if Image.open(copy / x["target"]).size
                 != Image.open(copy / sizes[0]["target"]).size)  # fmt: skip
    rewrite(copy, {"target": other["target"]})
    (copy / "train.jsonl").write_text(
        (copy / "train.jsonl").read_text() + json.dumps(sizes[1]) + "\n"
    )
    assert run("check", copy, "--workers", "0") == 1
    out = capsys.readouterr().out
    assert "1 pairs of two sizes" in out and "1 repeated pairs" in out
    assert f"line {len(sizes) + 1}: the same pair as {copy / 'train.jsonl'} line 2" in out


def test_check_finds_the_same_picture_in_two_splits(copy, capsys):
    leaked = lines(copy, "val")[0]
    rewrite(copy, leaked)
    assert run("check", copy / "train.jsonl", "--workers", "0") == 1
    out = capsys.readouterr().out
    assert "val.jsonl line 1: uses a picture of " in out and "pictures in two splits" in out


def test_check_finds_a_picture_that_was_saved_anew(copy, capsys):
    leaked = lines(copy, "val")[0]
    image = Image.open(copy / leaked["target"])
    image.save(copy / "copy.jpg", quality=60)
    rewrite(copy, {"source": "copy.jpg", "target": "copy.jpg"})
    assert run("check", copy, "--workers", "0") == 1
    assert "uses a picture that shows the same as one of" in capsys.readouterr().out


def test_stats_measure_how_sources_differ_from_targets(tmp_path, capsys):
    grey = torch.full((3, 150, 200), 128 / 255)
    noise = torch.randn(3, 150, 200, generator=torch.Generator().manual_seed(0))
    smooth = (noise + noise.roll(1, -1)) / 2**0.5  # neighbours correlate by 0.5
    for name, change in (("t", 0 * noise), ("s", 0.04 * smooth - 0.02)):
        image_from_pixels01((grey + change).clamp(0, 1)).save(tmp_path / f"{name}.png")
    pair = {"source": "s.png", "target": "t.png", "instruction": "go", "task": "x"}
    (tmp_path / "m.jsonl").write_text(json.dumps(pair))
    run("stats", tmp_path / "m.jsonl")
    [line] = [x for x in capsys.readouterr().out.splitlines() if "source against target" in x]
    decibel, share, shift, level, together = map(float, re.findall(
        r"([\d.]+) dB, (\d+)% .* change (\S+), mean level (\d+) of 255, .* (\S+)$", line)[0]
    )  # fmt: skip
    assert decibel == pytest.approx(-10 * math.log10(0.04**2 + 0.02**2), abs=0.2)
    assert 0 < share < 40 and shift == pytest.approx(-0.02, abs=0.003)
    assert level == pytest.approx(123, abs=1) and together == pytest.approx(0.5, abs=0.02)


def test_stats_measure_a_part_of_pictures_that_would_fill_the_memory(tmp_path, capsys, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "ipx2p.data.prepare.check.pixels01_from_image",
        lambda image: measured.append(image.size) or pixels01_from_image(image),
    )
    Image.new("RGB", (5000, 8)).save(tmp_path / "s.png")
    pair = {"source": "s.png", "target": "s.png", "instruction": "go", "task": "x"}
    (tmp_path / "m.jsonl").write_text(json.dumps(pair))
    run("stats", tmp_path / "m.jsonl")
    assert measured == [(4096, 8)] * 2 and "100.0 dB" in capsys.readouterr().out


def test_stats_count_pairs_sizes_sentences_and_tokens(restored, capsys):
    run("stats", restored, "--tokenizer", ROOT / "assets" / "tiny")
    out = capsys.readouterr().out
    num_tasks = len(DEGRADATIONS)
    assert f"{restored / 'train.jsonl'}: {4 * num_tasks} pairs, {num_tasks} tasks" in out
    assert f"different sentences: {len(bank('derain'))}" in out
    assert "short side, pixels: 32" in out and "tokens, of 77:" in out


# Bad input


def test_check_names_the_line_that_is_no_text_and_goes_on(copy, capsys):
    first, *rest = (copy / "train.jsonl").read_bytes().splitlines(keepends=True)
    broken = json.dumps({"source": "a\nb.png", "target": "t.png", "instruction": "go", "task": "x"})
    text = [first, b'{"source": "\xfc"}\n', broken.encode() + b"\n", *rest]
    (copy / "train.jsonl").write_bytes(b"".join(text))
    assert run("check", copy, "--workers", "0") == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and "line 2: is not UTF-8 text" in out[0]
    assert all("line 3: " in line and "missing" not in line for line in out[1:3])
    assert out[3].endswith("1 bad lines, 2 missing pictures")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tasks", "derian"), "--tasks: .*'derian'; did you mean derain"),
        (("--tasks", "derain+denoise"), "'derain\\+denoise' is for the recipe combine"),
        (("--degrade", "noise.shoot=[1,2]"), "unknown key noise.shoot; did you mean noise.shot"),
        (("--degrade", "noise.shot=[2,1]"), "--degrade.noise.shot is"),
        (("--size", "0"), "--short-side is 0, expected 8 or more"),
        (("--workers", "-1"), "--workers is -1, expected 0 or more"),
        (("--count", "7"), "holds 6 pictures, fewer than --count 7"),
        (("--split", "0", "50", "50"), "the shares of train, val and test are"),
        (("--bank", "derain"), "'derain' is not TASK=VALUE"),
        (("--bank", "derain=gone.txt"), "gone.txt"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(photos, tmp_path, argv, message):
    with pytest.raises(InputError, match=message):
        run("restore", photos, tmp_path / "set", "--workers", "0", *argv)
    assert not (tmp_path / "set").exists()


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        run("restore", tmp_path / "empty", tmp_path / "set", "--workers", "0")


def test_weights_of_another_teacher_are_refused(photos, tmp_path):
    vae = ROOT / "assets" / "tiny" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match=str(vae)):
        run("cartoonize", photos, tmp_path / "set", "--workers", "0", "--teacher", vae)
    assert not (tmp_path / "set").exists()


def test_a_set_is_not_made_among_its_own_photographs(photos, scans):
    with pytest.raises(InputError, match="lies inside"):
        run("restore", photos, photos / "set", *SMALL)
    with pytest.raises(InputError, match="lies inside"):
        run("import", "folders", scans, scans, *IMPORT, "--task", "derain")


def test_check_refuses_workers_that_cannot_be(restored):
    with pytest.raises(InputError, match="--workers is -1, expected 0 or more"):
        run("check", restored, "--workers", "-1")


def test_a_wrong_start_does_not_spoil_the_folder(scans, tmp_path):
    with pytest.raises(InputError, match="no sentences for the task 'scan'") as error:
        run("import", "folders", scans, tmp_path / "set", *IMPORT, "--task", "scan")
    assert "--on-error" not in str(error.value)
    with pytest.raises(InputError, match="no sentences"):
        skip = ("--task", "scan", "--on-error", "skip")
        run("import", "folders", scans, tmp_path / "set", *IMPORT, *skip)
    run("import", "folders", scans, tmp_path / "set", *IMPORT, "--task", "derain", "--seed", "5")
    assert len(all_lines(tmp_path / "set")) == 6


def test_photographs_that_are_none_can_be_skipped(photos, tmp_path):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    Image.new("RGB", (3, 500)).save(folder / "line.png")
    with pytest.raises(InputError, match="gone.jpg: cannot be read"):
        run("restore", folder, tmp_path / "set", *SMALL, "--tasks", "derain")
    run("restore", folder, tmp_path / "set", *SMALL, "--tasks", "derain", "--on-error", "skip")
    skipped = json.loads((tmp_path / "set" / "dataset.json").read_text())["skipped"]
    assert len(all_lines(tmp_path / "set")) == 6 and len(skipped) == 2
    assert "3 x 500 pixels, expected at least 8 x 8" in " ".join(skipped.values())


def test_only_one_process_makes_a_set(photos, tmp_path):
    script = (
        "import sys, pathlib\n"
        "from ipx2p.data.prepare.dataset import claim\n"
        f"lock = claim(pathlib.Path({str(tmp_path / 'set')!r}), {{'recipe': 'x'}})\n"
        "print('ours', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"ours\n"
    with pytest.raises(InputError, match="another process is making"):
        run("restore", photos, tmp_path / "set", *SMALL)
    other.communicate()
    run("restore", photos, tmp_path / "set", *SMALL, "--tasks", "derain")


# The same bytes, however it came about


def start(*argv, ranks=1, folder=None):
    command = [sys.executable, "-m", "ipx2p.data.prepare", *map(str, argv)]
    if ranks > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_workers_kills_and_ranks_do_not_change_a_byte(tmp_path):
    def argv(name, workers):
        return "restore", PHOTOS, tmp_path / name, "--size", "96", "--workers", workers

    run(*argv("one", 0))
    whole = contents(tmp_path / "one")
    for name, workers, ranks in (("two", 2, 1), ("ranks", 1, 2)):
        process = start(*argv(name, workers), ranks=ranks)
        assert process.wait(timeout=300) == 0, process.stdout.read()
        assert contents(tmp_path / name) == whole
    chance, folder = random.Random(0), tmp_path / "killed"
    for kills in range(3):
        process = start(*argv("killed", 1))
        while process.poll() is None and len([*folder.glob(".work/made_*")]) <= kills:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))  # all of it takes a second
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "dataset.json").exists()
    run(*argv("killed", 0))
    assert contents(folder) == whole


@pytest.mark.slow
def test_ranks_cartoonize_to_the_same_bytes(tmp_path):
    def argv(name, workers):
        small = ("--size", "64", "--count", "5", "--workers", workers)
        return "cartoonize", PHOTOS, tmp_path / name, *small

    run(*argv("one", 0))
    process = start(*argv("ranks", 1), ranks=2)
    assert process.wait(timeout=300) == 0, process.stdout.read()
    assert contents(tmp_path / "ranks") == contents(tmp_path / "one")
