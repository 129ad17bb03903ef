"""The benchmark: what it prints, what it leaves behind, and what it refuses."""

import json
import re
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ipx2p.bench import __main__ as bench
from ipx2p.bench.made_up import QUALITY, random_picture
from ipx2p.bench.turns import TABLE_END, TABLE_START, Turn, Way, Work, measure, rows
from ipx2p.bench.works import SIDE
from ipx2p.cli import run_command
from ipx2p.data.listing import find_photos
from ipx2p.seeds import generator
from tests.conftest import GOLDEN, ROOT

TINY = ["--weights", str(GOLDEN / "diffusers"), "--device", "cpu", "--resolution", "32"]
TRAIN = ["train", *TINY]
QUICK = ["--resolution", "16", "--batch-size", "2", "--batches", "2"]


@pytest.fixture
def run(capsys):
    """Run the benchmark in this process; returns exit code, standard output, standard error."""

    def written():
        return {*Path(tempfile.gettempdir()).glob("ipx2p-bench-*")}

    def run(*argv):
        before = written()
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: bench.main([*argv]))
        assert written() <= before  # whatever was written is gone
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


WORKS = {
    "unet": (["unet", *TINY, "--batch-size", "2"], 1, {"ipx2p"}),
    "edit": (["edit", *TINY, "--steps", "1"], 1, {"ipx2p"}),
    "train": (
        [*TRAIN, "--batch-size", "4", "--accumulate", "2", "--steps", "2"],
        8,
        {"data.cache", "encoding each step"},
    ),
    "data": (["data", "--workers", "0", "1", *QUICK], 4, {"0 workers", "1 workers"}),
    "load": (["load", *TINY[:4]], 1, {"ipx2p"}),
}


@pytest.mark.parametrize("name", WORKS)
def test_every_way_gets_a_row(run, tmp_path, name):
    argv, amount, ways = WORKS[name]
    code, out, _ = run(*argv, "--turns", "2", "--record", str(tmp_path / "records.jsonl"))
    assert code == 0
    record = json.loads((tmp_path / "records.jsonl").read_text())
    assert record["command"].startswith(f"python -m ipx2p.bench {name}") and record["turns"] == 2
    assert {*record["rows"]} == ways
    first, *others = record["rows"].values()
    for row in record["rows"].values():
        middle, low, high = row["seconds"]
        assert 0 < low <= middle <= high and row["gib"] > 0.01 and row["cpu_seconds"] > 0
        assert row["per_second"] == pytest.approx(amount / middle)
        assert ("of_peak" in row) == (name in ("unet", "edit", "train"))
    assert "time_ratio" not in first
    for row in others:  # the median of ratios of two turns is their mean
        middle, low, high = row["time_ratio"]
        assert low <= middle <= high and middle == pytest.approx((low + high) / 2)
    assert out.count("turn 2 of 2: ") == len(ways)
    assert all(f"| {way} | " in out for way in ways)


def test_ratios_are_taken_within_turns():
    seconds = {"ours": [1.0, 8.0, 3.0], "theirs": [2.0, 10.0, 4.0]}  # the machine slows down
    ways = dict.fromkeys(seconds, Way(lambda: None))
    work = Work("x", "y", 6, "samples", ways, torch.device("cpu"), flops=30.0)
    turns = {name: [Turn(s, 3 * s, 1.0) for s in values] for name, values in seconds.items()}
    found = rows(work, turns, peaks=[20.0, 20.0, 20.0])
    assert found["ours"]["seconds"] == (3.0, 1.0, 8.0) and found["ours"]["per_second"] == 2.0
    assert found["ours"]["of_peak"] == 0.5
    assert found["theirs"]["time_ratio"] == (0.75, 0.5, 0.8)
    assert found["theirs"]["cpu_ratio"] == pytest.approx((0.75, 0.5, 0.8))


def test_ways_take_turns_and_every_second_turn_is_reversed(capsys):
    called = []
    ways = {
        name: Way(partial(called.append, name), partial(called.append, f"start {name}"))
        for name in "ab"
    }
    measure(Work("x", "y", 1, "z", ways, torch.device("cpu")), turns=2, command="c")
    assert called == ["start a", "a", "start b", "b", "start b", "b", "start a", "a"]


def test_records_become_the_table_of_a_page(run, tmp_path):
    record, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    for _ in range(2):  # only the latest of a work is shown
        run("data", "--workers", "0", *QUICK, "--turns", "1", "--record", str(record))
    page.write_text(f"before\n{TABLE_START}old\n{TABLE_END}\nafter\n")
    code, _, _ = run("table", str(record), "--into", str(page))
    text = page.read_text()
    assert code == 0 and text.startswith("before\n") and text.endswith("\nafter\n")
    assert text.count("| 0 workers | ") == 1 and "old" not in text
    assert run("table", str(record), "--into", str(page))[0] == 0 and page.read_text() == text
    page.write_text("no marks")
    for argv, message in [
        ((record, "--into", page), "has no lines"),
        ((page,), "no file of recor"),
    ]:
        code, _, err = run("table", *map(str, argv))
        assert code == 2 and message in err and len(err.splitlines()) == 1


def test_a_trace_is_written(run, tmp_path):
    code, out, _ = run("unet", *TINY, "--turns", "1", "--profile", str(tmp_path / "traces"))
    assert code == 0 and "aten::" in out
    assert json.loads((tmp_path / "traces" / "unet-ipx2p.json").read_text())["traceEvents"]


def test_pairs_of_a_manifest_are_read(run, tmp_path):
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "a.png")
    line = {"source": "a.png", "target": "a.png", "instruction": "x", "task": "derain"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    manifest = str(tmp_path / "pairs.jsonl")
    code, out, _ = run("data", "--manifest", manifest, "--workers", "0", "--turns", "1", *QUICK)
    assert code == 0 and f"from 1 pairs of {manifest}" in out
    (tmp_path / "a.png").write_bytes(b"no picture")
    code, _, err = run("data", "--manifest", manifest, "--workers", "0", *QUICK)
    assert code == 2 and "pairs.jsonl line 1" in err and len(err.splitlines()) == 1


def test_made_up_pictures_cost_a_decoder_as_much_as_photographs(tmp_path):
    def bytes_per_pixel(picture):
        picture.save(tmp_path / "x.jpg", quality=QUALITY)
        return (tmp_path / "x.jpg").stat().st_size / (picture.width * picture.height)

    photos = [Image.open(path) for path in find_photos(ROOT / "assets" / "photos")]
    sizes = sorted(map(bytes_per_pixel, photos))
    assert sizes[0] < bytes_per_pixel(random_picture(SIDE, generator(0, "test"))) < sizes[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["edits"], "invalid choice: 'edits'"),
        (["data", "--batches", "0"], "--batches is 0, expected 1 or more"),
        (["data", "--turns", "0"], "--turns is 0, expected 1 or more"),
        (["data", "--workers", "2", "-1"], "--workers is -1, expected 0 or more"),
        (["data", "--manifest", "nowhere.jsonl"], r"manifest nowhere\.jsonl does not exist"),
        ([*TRAIN, "--steps", "0"], "--steps is 0, expected 1 or more"),
        ([*TRAIN, "--turns", "-1"], "--turns is -1, expected 1 or more"),
        ([*TRAIN, "--batch-size", "0"], "--batch-size is 0, expected 1 or more"),
        ([*TRAIN, "--accumulate", "2"], r"train\.batch_size is 1, expected a multiple of 2"),
        ([*TRAIN, "--resolution", "33"], r"data\.resolution is 33, expected a multiple"),
        (["unet", *TINY[:4], "--resolution", "33"], "--resolution is 33, expected a multiple of 8"),
        ([*TRAIN, "--workers", "-1"], r"data\.workers is -1, expected 0 or more, at most 256"),
        ([*TRAIN, "--precision", "float8"], r"train\.precision is 'float8'; .*known here: auto"),
        ([*TRAIN, "--device", "abacus"], "device 'abacus' is not available"),
        (["train", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_get_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and re.search(message, err), err
