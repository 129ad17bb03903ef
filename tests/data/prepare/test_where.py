"""Conditions on pairs: what they measure, when, and what is refused."""

import json
import pickle

import pytest
from PIL import Image

from ipx2p.data.manifest import read_lines
from ipx2p.data.prepare import __main__ as prepare
from ipx2p.data.prepare.where import FIELDS, Where
from ipx2p.errors import InputError
from tests.conftest import ROOT


@pytest.fixture
def manifest(tmp_path):
    """Pairs of grey pictures, 12 x 8: one 26/255 too dark, one as it should be, one damaged."""
    for name, grey in (("dark", 74), ("clean", 100)):
        Image.new("RGB", (12, 8), (grey, grey, grey)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    captions = {"source_caption": "a cat at night", "target_caption": "a cat"}
    records = [
        {"source": "dark.png", "task": "enhance", "group": "cat", **captions},
        {"source": "clean.png", "task": "derain", "instruction": ["go", "remove the rain"]},
        {"source": "broken.png", "task": "denoise"},
    ]
    pair = {"target": "clean.png", "instruction": "go"}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(pair | x) for x in records))
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize(
    ("condition", "tasks"),
    [
        ('task == "enhance"', ["enhance"]),
        ('task in ["enhance", "denoise"]', ["enhance", "denoise"]),
        ('task not in ("enhance", "denoise")', ["derain"]),
        ('"ken" in source', ["denoise"]),
        ('source > target and group != "cat"', []),
        ('group == "cat" or words == 3', ["enhance", "derain"]),
        ("sentences >= 2 and not captions", ["derain"]),
        ("captions", ["enhance"]),
        ("width == 12 and height == 8", ["enhance", "derain", "denoise"]),
        ('task != "denoise" and 19.8 < psnr < 19.9', ["enhance"]),  # 20 log10(255 / 26) = 19.83
        ('not (task == "denoise" or psnr <= 100)', ["derain"]),  # inf
        ("-1 < words < 1.5", ["enhance", "denoise"]),
    ],
)
def test_conditions_choose_pairs_and_open_only_pictures_that_matter(manifest, condition, tasks):
    where = pickle.loads(pickle.dumps(Where(condition)))  # as workers get it
    assert [line.record.task for line in read_lines(manifest) if where(line)] == tasks


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("tsk == 'derain'", "there is no field 'tsk'; did you mean task"),
        ("task = 'derain'", "invalid syntax"),
        ("", "invalid syntax"),
        ("task == 'a\0'", "null bytes"),
        ("psnr", "psnr is a number, expected a comparison"),
        ("captions and task", "task is a text, expected a comparison"),
        ("psnr < '30'", "does not compare two texts or two numbers"),
        ("psnr in 30", "does not compare"),
        ("psnr is 30", "does not compare"),
        ("task in ['derain', 3]", "does not compare"),
        ("width * 2 < 3", "is not allowed, expected comparisons of fields"),
        ("__import__('os').system('true') == 0", "is not allowed"),
        ("[x for x in task] == task", "is not allowed"),
        ("task.upper() == 'DERAIN'", "is not allowed"),
        ("not " * 5000 + "captions", "--where 'not not"),
        ("(" * 500 + "captions" + ")" * 500, "--where"),
    ],
)
def test_bad_conditions_are_one_line(condition, message):
    with pytest.raises(InputError, match=message) as error:
        Where(condition)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def run(*argv):
    prepare.main([str(arg) for arg in argv])


def test_a_mix_holds_what_its_condition_keeps_and_counts_the_rest(manifest, tmp_path, capsys):
    condition = 'split == "train" and task != "denoise" and psnr < 30'
    run("mix", tmp_path / "all", manifest, "--where", condition, "--workers", "1")
    dataset = json.loads((tmp_path / "all" / "dataset.json").read_text())
    assert dataset["counts"] == {"train": {"enhance": 1}}
    assert dataset["settings"]["where"] == condition
    assert dataset["where"] == {
        "denoise": {"kept": 0, "left_out": 1},
        "derain": {"kept": 0, "left_out": 1},
        "enhance": {"kept": 1, "left_out": 0},
    }
    assert "--where kept 1 and left out 0 pairs of enhance" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a data set of other settings"):
        run("mix", tmp_path / "all", manifest)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("psnr > 1", r"train\.jsonl line 3: .*broken\.png"),
        ("words > 9", "leaves none of 3 pairs to train on"),
        ("", "invalid syntax"),
    ],
)
def test_a_condition_that_cannot_be_met_writes_nothing(manifest, tmp_path, condition, message):
    with pytest.raises(InputError, match=message):
        run("mix", tmp_path / "all", manifest, "--where", condition, "--workers", "0")
    assert not (tmp_path / "all").exists()


def test_every_field_is_in_the_docs():
    text = (ROOT / "docs" / "data.md").read_text()
    assert [name for name in FIELDS if f"| `{name}` |" not in text] == []
