"""The sweep: what it computes, what it finds again, and how processes share it."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError, NotFiniteError
from ipx2p.eval import sweep
from ipx2p.eval.cases import cases_of_images, cases_of_manifest, draw
from ipx2p.eval.rows import Rows
from ipx2p.eval.sweep import (
    SweepConfig,
    code_files,
    make_trials,
    missing,
    part_of,
    run_trials,
    weights_digest,
)
from tests.conftest import GOLDEN, ROOT
from tests.eval.conftest import INSTRUCTIONS, SPECS, WEIGHTS, run

pytestmark = pytest.mark.usefixtures("no_curves")
PICTURE = GOLDEN / "coffee_64.png"


@pytest.fixture
def edited(monkeypatch):
    """How many edits the editor was asked for, in all."""
    counts = []
    edit = Editor.edit

    def counted(self, images, *args, **settings):
        counts.append(len(images))
        return edit(self, images, *args, **settings)

    monkeypatch.setattr(Editor, "edit", counted)
    return counts


def rows_of(folder):
    return [
        json.loads(line)
        for path in sorted(folder.glob("edits_*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def trials_of(config, made_with=None):
    cases = cases_of_images([PICTURE], ["make it snow"])
    return make_trials(cases, config, config.settings(has_weak=False), made_with or {})


def test_every_combination_is_edited_once_and_recorded(finished):
    rows = rows_of(finished)
    assert len(rows) == 20 == len({row["key"] for row in rows})
    combined = {
        (r["guidance"], r["guidance_scale"], r["image_guidance_scale"], r["task"]) for r in rows
    }
    assert len(combined) == 20
    assert all((finished / row["file"]).exists() for row in rows)
    evaluations = {
        (row["guidance"], row["guidance_scale"], row["image_guidance_scale"]): row["evaluations"]
        for row in rows
    }
    # 2 steps of 1, 2 or 3 branches
    assert evaluations["ip2p", 1.0, 1.0] == 2 and evaluations["ip2p", 3.0, 1.0] == 4
    assert evaluations["tcfg", 3.0, 2.0] == 6
    assert {n for (name, *_), n in evaluations.items() if name.startswith("interval")} == {2}


def test_a_second_run_edits_nothing(copied, arguments, capsys, edited):
    code, out, _ = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and "20 edits, 20 of them are there already" in out
    assert edited == []


def test_after_a_kill_only_what_is_missing_is_edited(copied, arguments, capsys, edited):
    rows = copied / "edits_000.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:18]) + lines[18][:50])  # torn in the middle of a line
    (copied / json.loads(lines[0])["file"]).unlink()  # and a picture is lost
    code, out, _ = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and "20 edits, 17 of them are there already" in out
    assert sum(edited) == 3
    again = {row["key"]: row["evaluations"] for row in rows_of(copied)}
    before = {json.loads(line)["key"]: json.loads(line)["evaluations"] for line in lines}
    assert again == before


def test_an_interrupted_sweep_keeps_every_finished_batch(arguments, tmp_path, capsys, monkeypatch):
    add, count = Rows.add, []

    def stopped(self, row):
        if self.stem == "edits" and len(count) == 3:
            raise KeyboardInterrupt
        count.append(row)
        add(self, row)

    monkeypatch.setattr(Rows, "add", stopped)
    code, _, _ = run(capsys, *arguments, "--output", tmp_path / "out")
    assert code == 130 and len(rows_of(tmp_path / "out")) == 3
    assert not (tmp_path / "out" / "index.html").exists()


def test_more_scales_in_the_same_folder_compute_only_the_new_ones(
    copied, arguments, capsys, edited
):
    more = ["--guidance-scale", 1, 3, 5]
    code, out, _ = run(capsys, *arguments, *more, "--output", copied, "--grids", 0)
    assert code == 0 and "32 edits, 20 of them are there already" in out
    assert sum(edited) == 12


def test_edits_are_those_of_the_editor_and_all_schemes_share_their_noise(finished, editor):
    rows = {(r["guidance"], r["guidance_scale"], r["image_guidance_scale"]): r for r in
            rows_of(finished) if r["task"] == "snow"}  # fmt: skip
    case = cases_of_images([PICTURE], [INSTRUCTIONS[0]])[0]
    result = editor.edit(
        [case.load(16, 2)],
        [INSTRUCTIONS[0]],
        sampler="euler",
        num_steps=2,
        guidance_scale=3.0,
        image_guidance_scale=2.0,
    )
    row = rows["ip2p", 3.0, 2.0]
    from ipx2p.images import load_image, pixels01_from_image

    saved = pixels01_from_image(load_image(finished / row["file"]))
    torch.testing.assert_close(saved, result.pixels01[0], atol=1.5 / 255, rtol=0)
    # At (1, 1) all of them are the full branch, which is computed once.
    assert [spec for spec, *scales in rows if scales == [1, 1]] == ["ip2p"]


def test_what_is_the_same_computation_is_edited_once_and_named_in_the_table(finished):
    table = [*csv.DictReader(io.StringIO((finished / "table.csv").read_text()))]
    lines = [line for line in table if line["task"] == "all" and line["guidance"] != "identity"]
    shared = {line["guidance"]: line for line in lines if line["shared"]}
    assert len(lines) == 12 and [*shared] == [*SPECS[1:]]
    assert {line["shared"] for line in shared.values()} == {"ip2p at 1, 1"}
    for line in shared.values():
        assert (line["guidance_scale"], line["image_guidance_scale"]) == ("1.0", "1.0")
        assert line["psnr"] == lines[0]["psnr"]
    edits = csv.DictReader(io.StringIO((finished / "edits.csv").read_text()))
    files = [e["file"] for e in edits if e["guidance_scale"] == e["image_guidance_scale"] == "1.0"]
    assert len(files) == 6 and len({*files}) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ip2p", 1.0, 1.0), ("tcfg", 1.0, 1.0)),
        (("ip2p", 1.0, 1.0), ("interval", 1.0, 1.0)),
        (("ip2p", 7.5, 1.5), ("nested", 5.0, 1.5)),
        (("ip2p", 3.0, 1.0), ("text_only", 3.0, 2.0)),
    ],
)
def test_equal_guidance_has_one_key_and_gives_one_picture(editor, coffee, one, other):
    settings = [EditSettings("euler", "linspace", 2, *asked) for asked in (one, other)]
    cases = cases_of_images([PICTURE], ["make it snow"])
    keys = {trial.key for trial in make_trials(cases, SweepConfig(), settings, {})}
    assert len(keys) == 1
    first, second = (
        editor.edit([coffee], ["make it snow"], **asdict(asked), resolution=16).latents[0]
        for asked in settings
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_near_misses_have_keys_of_their_own():
    specs = ("ip2p", "cads", "cfgpp", "symmetric", "composable", "pag")
    config = SweepConfig(guidance=[*specs], guidance_scale=[1.0], image_guidance_scale=[1.0])
    assert len({trial.key for trial in trials_of(config)}) == len(specs)


def test_a_stack_typed_in_two_ways_is_one_trial():
    config = SweepConfig(guidance=["apg", "ip2p+apg:eta=0", "apg:eta=0.5"])
    assert len(trials_of(config)) == 2


def test_a_scale_that_a_scheme_does_not_use_makes_no_further_edits():
    scales = {"guidance_scale": [3.0, 7.0], "image_guidance_scale": [1.0, 1.5, 2.0]}
    counts = {
        spec: len({trial.key for trial in trials_of(SweepConfig(guidance=[spec], **scales))})
        for spec in ("ip2p", "joint+apg", "text_only", "image_only", "free:null=-1")
    }
    assert [*counts.values()] == [6, 2, 2, 3, 1]
    # Which value was asked for does not matter either.
    keys = [
        trials_of(SweepConfig(guidance=["joint"], image_guidance_scale=[s]))[0].key for s in (1, 2)
    ]
    assert keys[0] == keys[1]


def test_pairs_that_differ_in_their_target_share_edits_and_are_both_measured(
    tmp_path, coffee, capsys, edited
):
    coffee.save(tmp_path / "a.png")
    lines = []
    for name, value in (("black", 0), ("white", 255)):
        coffee.point(lambda _, value=value: value).save(tmp_path / f"{name}.png")
        pair = {"source": "a.png", "target": f"{name}.png", "instruction": "snow", "task": "t"}
        lines.append(json.dumps(pair))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    code, said, err = run(
        *(capsys, WEIGHTS, "--manifest", tmp_path / "pairs.jsonl", "--output", out),
        *("--device", "cpu", "--resolution", 16, "--steps", 1, "--sampler", "euler"),
    )
    assert code == 0, err
    assert "1 edits, 0 of them" in said and edited == [1]
    measured = [*csv.DictReader(io.StringIO((out / "edits.csv").read_text()))]
    assert [one["picture"] for one in measured] == ["a-t", "a-t-2"]
    assert measured[0]["file"] == measured[1]["file"] and measured[0]["psnr"] != measured[1]["psnr"]
    [_, line] = csv.DictReader(io.StringIO((out / "table.csv").read_text()))
    assert float(line["psnr"]) == pytest.approx(sum(float(one["psnr"]) for one in measured) / 2)
    assert line["edits"] == "2"


def test_an_edit_that_is_not_finite_is_recorded_and_the_sweep_goes_on(
    arguments, tmp_path, capsys, edited
):
    out = tmp_path / "out"
    extreme = ["--guidance", "ip2p", "--guidance-scale", 3, 1e38, "--image-guidance-scale", 1]
    code, _, err = run(capsys, *arguments, *extreme, "--output", out)
    assert code == 0, err
    rows = {(row["guidance_scale"], row["task"]): row for row in rows_of(out)}
    assert len(rows) == 4 and sum("failed" in row for row in rows.values()) == 2
    assert "latents are not finite from step" in rows[1e38, "snow"]["failed"]
    assert (out / rows[3.0, "snow"]["file"]).exists()
    table = [*csv.DictReader(io.StringIO((out / "table.csv").read_text()))]
    [line] = [one for one in table if one["guidance_scale"] == "1e+38" and one["task"] == "all"]
    assert (line["edits"], line["failed"], line["evaluations"], line["psnr"]) == ("2", "2", "", "")
    assert "no finite edit" in (out / "table.md").read_text()
    assert "not finite, edits" in (out / "index.html").read_text()
    # It is not tried again.
    edited.clear()
    code, said, _ = run(capsys, *arguments, *extreme, "--output", out)
    assert code == 0 and "4 edits, 4 of them are there already" in said and edited == []


def test_in_a_batch_only_what_is_not_finite_fails(editor, tmp_path, monkeypatch):
    edit = Editor.edit

    def failing(self, images, *args, seeds, **settings):
        if 1 in seeds:
            raise NotFiniteError("latents are not finite")
        return edit(self, images, *args, seeds=seeds, **settings)

    monkeypatch.setattr(Editor, "edit", failing)
    config = SweepConfig(seeds=[0, 1, 2, 3], num_steps=[1], resolution=16)
    rows = Rows(tmp_path, "edits")
    trials = trials_of(config)
    run_trials(trials, rows, config, editor, None, World())
    assert {row["seed"] for row in rows.by_key.values() if "failed" in row} == {1}
    assert len(rows.by_key) == 4 and missing(trials, rows) == []


def test_a_second_network_named_later_leaves_the_other_edits(copied, arguments, capsys, edited):
    more = ["--guidance", *SPECS, "autoguidance", "--weak-weights", WEIGHTS, "--grids", 0]
    code, said, err = run(capsys, *arguments, *more, "--output", copied)
    assert code == 0, err
    assert "28 edits, 20 of them are there already" in said and sum(edited) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": ["text_first"]},
        {"guidance": ["full:joint_scale=2"]},
        {"guidance_scale": [7.5]},
        {"image_guidance_scale": [1.2]},
        {"sampler": ["euler"]},
        {"spacing": "trailing"},
        {"num_steps": [21]},
        {"seeds": [1]},
    ],
)
def test_the_key_changes_with_everything_that_shapes_an_edit(change):
    assert trials_of(SweepConfig())[0].key != trials_of(SweepConfig(**change))[0].key


def test_the_key_changes_with_the_second_network_where_it_is_used():
    config = SweepConfig(guidance=["ip2p", "autoguidance"])
    cases, settings = cases_of_images([PICTURE], ["x"]), config.settings(has_weak=True)
    keys = [[t.key for t in make_trials(cases, config, settings, {}, weak)] for weak in "ab"]
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


def test_the_key_changes_with_the_code_of_the_schemes_that_are_used(monkeypatch):
    config = SweepConfig(guidance=["ip2p", "apg", "ip2p+apg+rescale"])
    before = [trial.key for trial in trials_of(config)]
    digest = sweep.digest_file
    monkeypatch.setattr(
        sweep, "digest_file", lambda path: "new" if path.name == "pushes.py" else digest(path)
    )
    same = [old == trial.key for old, trial in zip(before, trials_of(config), strict=True)]
    assert same == [True, False, False]


def test_the_code_that_a_sweep_depends_on_is_not_that_of_its_report():
    package = ROOT / "ipx2p"
    names = {str(path.relative_to(package)) for path in code_files()}
    assert {"models/unet.py", "diffusion/samplers.py", "diffusion/guidance/spec.py"} <= names
    assert {"editing/editor.py", "editing/settings.py"} <= names
    # Schemes are in the keys of the edits that use them, the report is in none.
    assert "diffusion/guidance/pushes.py" not in names
    assert not any(name.startswith(("eval/", "sheets", "cli")) for name in names)


def test_rows_of_an_earlier_form_are_done_again(copied, arguments, capsys, edited):
    rows = copied / "edits_000.jsonl"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    kept[0].pop("digest")
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    code, _, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and sum(edited) == 1, err


def test_the_key_changes_with_picture_instruction_and_weights(tmp_path):
    config = SweepConfig()
    settings = config.settings(has_weak=False)
    other = tmp_path / "coffee_64.png"
    other.write_bytes(PICTURE.read_bytes() + b"\0")
    keys = {
        make_trials(cases_of_images([path], [text]), config, settings, {"weights": w})[0].key
        for path, text, w in (
            (PICTURE, "a", 1),
            (other, "a", 1),
            (PICTURE, "b", 1),
            (PICTURE, "a", 2),
        )
    }
    assert len(keys) == 4


def test_the_digest_of_weights_is_of_their_content():
    assert weights_digest(WEIGHTS) == weights_digest(WEIGHTS)
    assert weights_digest(WEIGHTS) != weights_digest(GOLDEN / "diffusers_v2")


def test_two_processes_share_the_edits_and_see_each_others(editor, tmp_path):
    config = SweepConfig(guidance_scale=[1.0, 2.0, 3.0], num_steps=[1], resolution=16, batch_size=2)
    trials = trials_of(config)
    for rank in (0, 1):
        world = World(rank, 2)
        rows = Rows(tmp_path, "edits", rank)
        mine = world.share(trials)
        run_trials(mine, rows, config, editor, None, world)
    counts = [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("edits_*"))]
    assert counts == [2, 1]
    assert missing(trials, Rows(tmp_path, "edits")) == []


def test_processes_share_costs_and_whole_batches(tmp_path):
    """Scales of 1 cost a third of the others, and stand at every second place."""
    scales = {"guidance_scale": [1.0, 7.0], "image_guidance_scale": [1.0]}
    config = SweepConfig(
        guidance=[f"dynamic_threshold:bound={n}" for n in range(1, 33)], seeds=[0, 1, 2], **scales
    )
    trials = trials_of(config)
    parts = [part_of(trials, World(rank, 2), 2) for rank in (0, 1)]
    keys = [{trial.key for trial in part} for part in parts]
    assert keys[0] | keys[1] == {trial.key for trial in trials} and not keys[0] & keys[1]
    costs = [sum(t.settings.guidance_scale for t in part) for part in parts]
    assert 0.7 < costs[0] / costs[1] < 1.4
    assert part_of(trials, World(), 2) == trials
    runs = [len([*group]) for _, group in itertools.groupby(parts[0], key=lambda t: t.settings)]
    assert max(runs) == 3 and min(runs) == 1


def test_a_damaged_picture_is_edited_again(copied, arguments, capsys, edited):
    files = sorted((copied / "edits").glob("*.png"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-20])
    contents = [path.read_bytes() for path in files]
    files[2].write_bytes(next(content for content in contents[3:] if content != contents[2]))
    (copied / "edits" / ".0123456789abcdef.png").write_bytes(b"half")  # a killed process left it
    code, said, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and "20 edits, 17 of them are there already" in said, err
    assert sum(edited) == 3 and not [*(copied / "edits").glob(".*")]


def test_a_lost_record_of_a_sweep_is_written_again(copied, arguments, capsys, edited):
    record = (copied / "sweep.json").read_bytes()
    (copied / "sweep.json").write_bytes(b"")
    code, _, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 2 and "is not JSON" in err and "remove it, the edits beside it will" in err
    (copied / "sweep.json").unlink()
    code, _, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and edited == [], err
    assert (copied / "sweep.json").read_bytes() == record


def test_results_inside_the_folder_are_no_photographs(tmp_path, coffee, capsys):
    coffee.save(tmp_path / "a.png")
    argv = [
        *(WEIGHTS, "--folder", tmp_path, "--instruction", "x", "--output", tmp_path / "compare"),
        *("--device", "cpu", "--resolution", 16, "--steps", 1, "--sampler", "euler"),
    ]
    for there in (0, 1):
        code, said, err = run(capsys, *argv)
        assert code == 0 and f"1 edits, {there} of them" in said, err


@pytest.mark.parametrize("captions", [("a", None), ("a", " "), (5, "b")])
def test_half_a_pair_of_captions_is_refused(tmp_path, captions):
    line = {"source": "a.png", "target": "a.png", "instruction": "x", "task": "t"}
    line |= dict(zip(("source_caption", "target_caption"), captions, strict=True))
    (tmp_path / "pairs.jsonl").write_text("\n" + json.dumps(line))
    with pytest.raises(InputError, match=r"pairs\.jsonl.*line 2: .*source_caption"):
        cases_of_manifest(tmp_path / "pairs.jsonl")


def test_a_name_that_is_no_text_is_reported(tmp_path, coffee, capsys):
    name = os.fsdecode(b"bad\xff.png")
    coffee.save(tmp_path / name)
    code, _, err = run(
        *(capsys, WEIGHTS, "--image", tmp_path / name, "--instruction", "x", "--device", "cpu"),
        *("--output", tmp_path / "out", "--resolution", 16, "--steps", 1, "--sampler", "euler"),
    )
    assert code == 0, err
    assert "bad" in (tmp_path / "out" / "edits.csv").read_text()


def test_a_damaged_row_in_the_middle_is_refused(tmp_path):
    (tmp_path / "edits_000.jsonl").write_text('{"key": "a"}\n\n{"key": "b"}\n')
    assert len(Rows(tmp_path, "edits").by_key) == 2  # an empty line holds nothing
    (tmp_path / "edits_000.jsonl").write_text('{"key": "a"}\n{"key"\n{"key": "b"}\n')
    with pytest.raises(InputError, match=r"edits_000\.jsonl line 2 is damaged"):
        Rows(tmp_path, "edits")


def test_a_row_after_a_torn_line_stands_on_its_own(tmp_path):
    path = tmp_path / "edits_000.jsonl"
    path.write_text('{"key": "a"}\n{"key": "torn')
    rows = Rows(tmp_path, "edits")
    rows.add({"key": "b"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n'
    assert Rows(tmp_path, "edits").by_key.keys() == {"a", "b"}


def test_a_manifest_gives_first_instructions_captions_and_names(manifest):
    one, two = cases_of_manifest(manifest)
    assert (one.instruction, two.instruction) == INSTRUCTIONS
    assert one.captions == ("a cup", "a cup in the snow")
    assert (one.name, two.name) == ("a-snow", "b-night")


def test_names_of_cases_differ_and_a_limit_is_draw(tmp_path):
    paths = [tmp_path / name for name in ("x/a.png", "a-2.png", "y/a.png", "z/a-2.png")]
    cases = cases_of_images(paths, ["snow"])
    assert [case.name for case in cases] == ["a", "a-2", "a-3", "a-2-2"]
    drawn = draw(range(100), 9)
    assert drawn == sorted({*drawn}) == draw(range(100), 9) and len(drawn) == 9
    assert draw(range(3), 5) == [0, 1, 2]


@pytest.mark.slow
def test_killed_under_torchrun_it_goes_on_with_one_process(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    line = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("-m", "ipx2p.eval.compare", *map(str, arguments), "--output", str(out)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True)
    limit = time.monotonic() + 120
    while len([*out.glob("edits/*.png")]) < 4 and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(rows_of(out))
    assert 2 <= done < 20
    code, said, _ = run(capsys, *arguments, "--output", out)
    assert code == 0 and re_count(said) >= done
    assert len({row["key"] for row in rows_of(out)}) == 20
    assert (out / "index.html").exists()


def re_count(said):
    return int(said.partition("edits, ")[2].split()[0])
