"""Runs that are cut short at once, folders that are reported together, and late complaints."""

import shutil
import warnings
from dataclasses import replace

import pytest

import ipx2p.eval.compare
import ipx2p.eval.evaluate
from ipx2p.cli import run_command
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.eval.cases import Case, draw
from ipx2p.eval.records import Records, read_folders
from tests.conftest import GOLDEN
from tests.eval.conftest import WEIGHTS

pytestmark = pytest.mark.usefixtures("no_curves")
FAST = ("--device", "cpu", "--steps", "1", "--sampler", "euler", "--grids", "0")


def evaluate(manifest, output, *more, size=16):
    """Run the command in this process; returns its exit code."""
    argv = [manifest, "--models", f"a={WEIGHTS}", "--output", output, "--resolution", size]
    with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resolution")
        run_command(lambda: ipx2p.eval.evaluate.main([*map(str, (*argv, *FAST, *more))]))
    return exit_.value.code or 0


@pytest.mark.parametrize("left", ["a folder", "a picture", "a torn line"])
def test_a_run_killed_before_its_first_record_continues(manifest, tmp_path, left):
    (tmp_path / "out/edits").mkdir(parents=True)
    if left != "a folder":
        shutil.copy(GOLDEN / "coffee_64.png", tmp_path / "out/edits/0123456789abcdef01234567.png")
    if left == "a torn line":
        (tmp_path / "out/records_000.jsonl").write_text('{"key": "01')
    assert evaluate(manifest, tmp_path / "out") == 0


def test_no_folder_that_is_reported_is_dropped_silently(manifest, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "large")]
    assert evaluate(manifest, folders[0]) == 0
    assert evaluate(manifest, folders[1], "--negative-instruction", "fog") == 0
    assert evaluate(manifest, folders[2], size=32) == 0
    records = read_folders(folders[:2])
    assert {record.folder for record in records if record.settings} == {*folders[:2]}
    with pytest.raises(InputError, match="compared at 16 x 16 pixels in .* and at 32 x 32 in"):
        read_folders(folders)


def test_an_unknown_baseline_is_reported_before_any_edit(manifest, tmp_path, monkeypatch):
    calls = []
    edit = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda *a, **k: calls.append(a) or edit(*a, **k))
    assert evaluate(manifest, tmp_path / "out", "--baseline", "nobody") == 2
    assert not calls


def test_a_damaged_result_is_reported_before_any_edit(manifest, tmp_path, monkeypatch):
    calls = []
    edit = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda *a, **k: calls.append(a) or edit(*a, **k))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("a-snow", "b-night"):
        (theirs / f"{name}.png").write_bytes((GOLDEN / "coffee_64.png").read_bytes()[:2000])
    argv = [manifest, "--models", f"a={WEIGHTS}", theirs, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resolution")
        run_command(
            lambda: ipx2p.eval.evaluate.main([*map(str, (*argv, "--resolution", 16, *FAST))])
        )
    assert exit_.value.code == 2 and not calls


def test_weights_may_lie_in_a_folder_called_as_a_row(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "identity")
    monkeypatch.chdir(tmp_path)
    argv = ["identity", "--image", GOLDEN / "coffee_64.png", "--instruction", "make it snow"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resolution")
        ipx2p.eval.compare.main([*map(str, (*argv, "--resolution", 16, *FAST))])
    assert (tmp_path / "compare/index.html").exists()


def test_results_made_elsewhere_are_scored_again_at_another_size(manifest, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("a-snow", "b-night"):
        shutil.copy(GOLDEN / "coffee_64.png", theirs / f"{name}.png")
    argv = ["--models", theirs, "--output", tmp_path / "out"]
    assert evaluate(manifest, tmp_path / "out", *argv[:2]) == 0
    with pytest.raises(SystemExit) as exit_:
        run_command(
            lambda: ipx2p.eval.evaluate.main(
                [*map(str, (manifest, *argv, "--resolution", 32, "--grids", 0))]
            )
        )
    assert exit_.value.code == 2  # the folder holds the cases at 16 x 16


def test_later_scores_count_whatever_process_wrote_them(manifest, tmp_path):
    out = tmp_path / "out"
    assert evaluate(manifest, out) == 0
    (out / "records_000.jsonl").rename(out / "records_001.jsonl")  # as a second process had
    records = Records(out)
    one = next(iter(records.by_key.values()))
    records.add(replace(one, scores={"psnr": -1.0}, scored_at=one.scored_at + 1))
    records.read()
    assert records.by_key[one.key].scores["psnr"] == -1.0
    assert Records(out).by_key[one.key].scores["psnr"] == -1.0
    assert {r.key: r for r in read_folders([out])}[one.key].scores["psnr"] == -1.0


def test_a_limit_counts_what_is_reported_of_a_chain():
    chain = [
        Case(f"{n}{turn}", GOLDEN, "x", after=f"{n}{turn - 1}" if turn else None, is_step=turn < 2)
        for n in "ab"
        for turn in range(3)
    ]
    drawn = draw(chain, 1)
    assert [case.is_step for case in drawn] == [True, True, False]
    assert draw(chain, 2) == chain
