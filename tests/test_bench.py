"""The benchmark: what it prints, what it leaves behind, and what it refuses."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from ipx2p import bench
from ipx2p.cli import run_command
from ipx2p.data.benchmark import QUALITY, SIDE, random_picture
from ipx2p.data.listing import find_photos
from ipx2p.seeds import generator
from tests.conftest import GOLDEN, ROOT

TINY = ["train", "--weights", str(GOLDEN / "diffusers"), "--resolution", "32", "--device", "cpu"]
NUMBERS = r"\s+([\d.e+-]+)\s+([\d.e+-]+)\s+([\d.e+-]+)\s+([\d.]+)%\s+([\d.]+)\s+([\d.]+)%"


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


def test_both_kinds_get_a_row_and_their_rates_a_ratio(run):
    argv = [*TINY, "--batch-size", "4", "--accumulate", "2", "--turns", "2", "--steps", "2"]
    code, out, _ = run(*argv)
    assert code == 0
    assert f"command: python -m ipx2p.bench {' '.join(argv)}" in out
    rates = []
    for kind in (r"pictures \(encoding each step\)", r"data\.cache"):
        [row] = re.findall(kind + NUMBERS, out)
        step_s, fastest_s, rate, _mfu, memory_gib, waiting = map(float, row)
        assert step_s >= fastest_s > 0 and memory_gib > 0 and 0 < waiting < 100
        assert rate == pytest.approx(4 / step_s, rel=1e-2)
        rates.append(rate)
    [ratio] = re.findall(r"samples/s with / without data\.cache: ([\d.]+)", out)
    assert float(ratio) == pytest.approx(rates[1] / rates[0], abs=0.02)


QUICK = ["--resolution", "16", "--batch-size", "2", "--batches", "2"]


def test_every_number_of_workers_gets_a_row(run):
    argv = ["data", "--workers", "0", "1", "--turns", "2", *QUICK]
    code, out, _ = run(*argv)
    assert code == 0
    assert f"command: python -m ipx2p.bench {' '.join(argv)}" in out
    assert "32 pairs of made-up JPEG pictures, 512 px" in out and out.count(" workers: ") == 4
    rows = [[*map(float, row.split())] for row in out.splitlines()[-2:]]
    assert [row[0] for row in rows] == [0, 1]
    for workers, rate, fastest, per_worker, per_core in rows:
        assert fastest >= rate > 0 and per_core > 0
        assert per_worker == pytest.approx(rate / max(1, workers), rel=1e-2)


def test_pairs_of_a_manifest_are_read(run, tmp_path):
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "a.png")
    line = {"source": "a.png", "target": "a.png", "instruction": "x", "task": "derain"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    manifest = str(tmp_path / "pairs.jsonl")
    code, out, _ = run("data", "--manifest", manifest, "--workers", "0", "--turns", "1", *QUICK)
    assert code == 0 and f"pairs: 1 pairs of {manifest}" in out
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
        (["edit"], "invalid choice: 'edit'"),
        (["data", "--batches", "0"], "--batches is 0, expected 1 or more"),
        (["data", "--turns", "0"], "--turns is 0, expected 1 or more"),
        (["data", "--workers", "2", "-1"], "--workers is -1, expected 0 or more"),
        (["data", "--manifest", "nowhere.jsonl"], r"manifest nowhere\.jsonl does not exist"),
        ([*TINY, "--steps", "0"], "--steps is 0, expected 1 or more"),
        ([*TINY, "--turns", "-1"], "--turns is -1, expected 1 or more"),
        ([*TINY, "--batch-size", "0"], r"train\.batch_size is 0, expected 1 or more"),
        ([*TINY, "--accumulate", "2"], r"train\.batch_size is 1, expected a multiple of 2"),
        ([*TINY, "--resolution", "33"], r"data\.resolution is 33, expected a multiple"),
        ([*TINY, "--workers", "-1"], r"data\.workers is -1, expected 0 or more, at most 256"),
        ([*TINY, "--precision", "float8"], r"train\.precision is 'float8'; .*known here: auto"),
        ([*TINY, "--device", "abacus"], "device 'abacus' is not available"),
        (["train", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_get_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and re.search(message, err), err
