"""The engine: what it computes, what it finds again, and how processes share it."""

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
from ipx2p.eval import models
from ipx2p.eval.cases import Case, Sizes, cases_of_images, cases_of_manifest, draw
from ipx2p.eval.edits import Maker
from ipx2p.eval.models import EvalConfig, Model, code_files, make_trials, weights_digest
from ipx2p.eval.records import Records, read_records
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


def records_of(folder):
    """The edits of models: by picture, one record of each."""
    by_key = Records(folder).by_key.values()
    return [*{r.edit: r for r in reversed(by_key) if r.settings}.values()]


def trials_of(config, made_with=None, cases=None, weak=None):
    cases = cases or cases_of_images([PICTURE], ["make it snow"])
    model = Model("a", "a", WEIGHTS, tuple(config.settings(EditSettings(), {})))
    return make_trials(cases, model, config.seeds, made_with or {}, weak=weak)


def maker_of(trials, folder, world=World()):  # noqa: B008, it does not change
    return Maker(trials, Records(folder, world.rank), world, Sizes(16, 2))


def test_every_combination_is_edited_once_and_recorded(finished):
    records = [record for record in read_records(finished) if record.settings and record.scores]
    assert len(records) == 24 == len({record.key for record in records})
    combined = {
        (r.settings["guidance"], r.settings["guidance_scale"], r.settings["image_guidance_scale"])
        for r in records
    }
    assert len(combined) == 12 and len({record.edit for record in records}) == 20
    assert all(record.has_picture for record in records)
    evaluations = {
        (r.settings["guidance"], r.settings["guidance_scale"], r.settings["image_guidance_scale"]):
        r.evaluations for r in records
    }  # fmt: skip
    # 2 steps of 1, 2 or 3 branches
    assert evaluations["ip2p", 1.0, 1.0] == 2 and evaluations["ip2p", 3.0, 1.0] == 4
    assert evaluations["tcfg", 3.0, 2.0] == 6
    assert {n for (name, *_), n in evaluations.items() if name.startswith("interval")} == {2}


def test_a_record_tells_all_about_its_edit(finished):
    record = next(r for r in read_records(finished) if r.settings and r.scores)
    assert record.case["instruction"] == INSTRUCTIONS[0] and record.case["task"] == "snow"
    assert record.case["source_caption"] == "a cup" and record.case["source_digest"]
    assert record.made_with["weights"] == str(WEIGHTS)
    assert record.made_with["weights_digest"] == weights_digest(WEIGHTS)
    assert record.settings["guidance_in_full"] == "ip2p" and record.settings["num_steps"] == 2
    assert record.settings["effective_guidance_scale"] == record.settings["guidance_scale"]
    assert record.seconds > 0 and record.computed_on["torch"] == torch.__version__
    assert record.scored_by.keys() >= record.scores.keys() >= {"psnr", "ssim", "change"}


def test_the_rows_that_are_always_there(finished):
    rows = {(r.model, r.case["name"]) for r in read_records(finished) if r.settings is None}
    assert rows == {
        (name, case) for name in ("identity", "oracle", "vae") for case in ("a-snow", "b-night")
    }


def test_a_second_run_edits_nothing(copied, arguments, capsys, edited):
    code, out, _ = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and "20 edits, 20 of them are there already" in out
    assert edited == []


def test_after_a_kill_only_what_is_missing_is_edited(copied, arguments, capsys, edited):
    before = {r.key: (r.evaluations, r.scores) for r in Records(copied).by_key.values()}
    path = copied / "records_000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    edits = [i for i, line in enumerate(lines) if json.loads(line)["settings"]]
    lost = json.loads(lines[edits[0]])["picture"]["file"]
    kept = [*lines[: edits[18]], lines[edits[18]][:50]]  # torn in the middle of a line
    path.write_bytes(b"".join(kept))
    left = {json.loads(line)["edit"] for line in kept[:-1] if json.loads(line)["settings"]}
    (copied / lost).unlink()  # and a picture is lost
    code, out, _ = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0 and f"20 edits, {len(left) - 1} of them are there already" in out
    assert sum(edited) == 20 - len(left) + 1
    after = {r.key: (r.evaluations, r.scores) for r in Records(copied).by_key.values()}
    assert after == before


def test_an_interrupted_run_keeps_every_finished_batch(arguments, tmp_path, capsys, monkeypatch):
    add, count = Records.add, []

    def stopped(self, record):
        if record.settings and len(count) == 3:
            raise KeyboardInterrupt
        count.extend([record] if record.settings else [])
        add(self, record)

    monkeypatch.setattr(Records, "add", stopped)
    code, _, _ = run(capsys, *arguments, "--output", tmp_path / "out")
    records = read_records(tmp_path / "out")
    assert code == 130 and sum(record.settings is not None for record in records) == 3
    assert not (tmp_path / "out" / "index.html").exists()


def test_more_scales_in_the_same_folder_compute_only_the_new_ones(
    copied, arguments, capsys, edited
):
    more = ["--guidance-scale", 1, 3, 5]
    code, out, _ = run(capsys, *arguments, *more, "--output", copied, "--grids", 0)
    assert code == 0 and "32 edits, 20 of them are there already" in out
    assert sum(edited) == 12


def test_edits_are_those_of_the_editor_and_all_schemes_share_their_noise(finished, editor):
    records = {(s["guidance"], s["guidance_scale"], s["image_guidance_scale"]): r
               for r in read_records(finished) if (s := r.settings) and r.case["task"] == "snow"
               and r.seed == 0}  # fmt: skip
    case = cases_of_images([PICTURE], [INSTRUCTIONS[0]])[0]
    result = editor.edit(
        [case.source],
        [INSTRUCTIONS[0]],
        sampler="euler",
        num_steps=2,
        guidance_scale=3.0,
        image_guidance_scale=2.0,
        resolution=16,
    )
    from ipx2p.images import load_image, pixels01_from_image

    saved = pixels01_from_image(load_image(records["ip2p", 3.0, 2.0].path))
    torch.testing.assert_close(saved, result.pixels01[0], atol=1.5 / 255, rtol=0)
    # At (1, 1) all of them are the full branch, which is computed once.
    assert len({r.edit for (_, *scales), r in records.items() if scales == [1, 1]}) == 1


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
    trials = make_trials(cases, Model("a", "a", WEIGHTS, tuple(settings)), [0], {})
    assert len({trial.edit for trial in trials}) == 1 and len({trial.key for trial in trials}) == 2
    first, second = (
        editor.edit([coffee], ["make it snow"], **asdict(asked), resolution=16).latents[0]
        for asked in settings
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_near_misses_have_keys_of_their_own():
    specs = ("ip2p", "cads", "cfgpp", "symmetric", "composable", "pag")
    config = EvalConfig(guidance=[*specs], guidance_scale=[1.0], image_guidance_scale=[1.0])
    assert len({trial.edit for trial in trials_of(config)}) == len(specs)


def test_a_stack_typed_in_two_ways_is_one_trial():
    config = EvalConfig(guidance=["apg", "ip2p+apg:eta=0", "apg:eta=0.5"])
    assert len(trials_of(config)) == 2


def test_a_scale_that_a_scheme_does_not_use_makes_no_further_edits():
    scales = {"guidance_scale": [3.0, 7.0], "image_guidance_scale": [1.0, 1.5, 2.0]}
    counts = {
        spec: len({trial.edit for trial in trials_of(EvalConfig(guidance=[spec], **scales))})
        for spec in ("ip2p", "joint+apg", "text_only", "image_only", "free:null=-1")
    }
    assert [*counts.values()] == [6, 2, 2, 3, 1]
    # Which value was asked for does not matter either.
    keys = [
        trials_of(EvalConfig(guidance=["joint"], image_guidance_scale=[s]))[0].edit for s in (1, 2)
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
    first, second = (r for r in Records(out).by_key.values() if r.settings)
    assert (first.case["name"], second.case["name"]) == ("a-t", "a-t-2")
    assert first.path == second.path and first.scores["psnr"] != second.scores["psnr"]


def test_an_edit_that_is_not_finite_is_recorded_and_the_sweep_goes_on(
    arguments, tmp_path, capsys, edited
):
    out = tmp_path / "out"
    extreme = ["--guidance", "ip2p", "--guidance-scale", 3, 1e38, "--image-guidance-scale", 1]
    code, _, err = run(capsys, *arguments, *extreme, "--output", out)
    assert code == 0, err
    records = {(r.settings["guidance_scale"], r.case["task"]): r for r in records_of(out)}
    assert len(records) == 4 and sum(r.picture is None for r in records.values()) == 2
    assert "latents are not finite from step" in records[1e38, "snow"].failed
    assert records[3.0, "snow"].path.exists() and not records[1e38, "snow"].scores
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
    trials = trials_of(EvalConfig(seeds=[0, 1, 2, 3], num_steps=[1]))
    maker = maker_of(trials, tmp_path)
    maker.edit(trials, lambda: (editor, None), EvalConfig())
    maker.finish()
    assert {r.seed for r in maker.records.by_key.values() if r.failed} == {1}
    assert len(maker.records.by_key) == 4 and maker.missing(trials) == []


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
    assert trials_of(EvalConfig())[0].edit != trials_of(EvalConfig(**change))[0].edit


def test_the_key_changes_with_the_second_network_where_it_is_used():
    config = EvalConfig(guidance=["ip2p", "autoguidance"], weak_weights="b")
    keys = [[trial.edit for trial in trials_of(config, weak=weak)] for weak in "ab"]
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


def test_the_key_changes_with_the_code_of_the_schemes_that_are_used(monkeypatch):
    config = EvalConfig(guidance=["ip2p", "apg", "ip2p+apg+rescale"])
    before = [trial.edit for trial in trials_of(config)]
    digest = models.digest_file
    monkeypatch.setattr(
        models, "digest_file", lambda path: "new" if path.name == "pushes.py" else digest(path)
    )
    same = [old == trial.edit for old, trial in zip(before, trials_of(config), strict=True)]
    assert same == [True, False, False]


def test_the_code_that_a_sweep_depends_on_is_not_that_of_its_report():
    package = ROOT / "ipx2p"
    names = {str(path.relative_to(package)) for path in code_files()}
    assert {"models/unet.py", "diffusion/samplers.py", "diffusion/guidance/spec.py"} <= names
    assert {"editing/editor.py", "editing/settings.py"} <= names
    # Schemes are in the keys of the edits that use them, the report is in none.
    assert "diffusion/guidance/pushes.py" not in names
    assert not any(name.startswith(("eval/", "sheets", "cli")) for name in names)


def test_the_key_changes_with_picture_instruction_and_weights(tmp_path):
    other = tmp_path / "coffee_64.png"
    other.write_bytes(PICTURE.read_bytes() + b"\0")
    keys = {
        trials_of(EvalConfig(), {"weights_digest": w}, cases_of_images([path], [text]))[0].edit
        for path, text, w in (
            (PICTURE, "a", 1),
            (other, "a", 1),
            (PICTURE, "b", 1),
            (PICTURE, "a", 2),
        )
    }
    assert len(keys) == 4


def test_records_do_not_depend_on_where_pictures_and_weights_lie(tmp_path):
    moved = tmp_path / "coffee_64.png"
    moved.write_bytes(PICTURE.read_bytes())
    one, other = (
        trials_of(EvalConfig(), {"weights": where}, cases_of_images([path], ["a"]))[0].key
        for path, where in ((PICTURE, "here"), (moved, "there"))
    )
    assert one == other


def test_the_digest_of_weights_is_of_their_content():
    assert weights_digest(WEIGHTS) == weights_digest(WEIGHTS)
    assert weights_digest(WEIGHTS) != weights_digest(GOLDEN / "diffusers_v2")


def test_two_processes_share_the_edits_and_see_each_others(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "barrier", lambda self: None)  # one runs after the other
    trials = trials_of(EvalConfig(guidance_scale=[1.0, 2.0, 3.0], num_steps=[1]))
    for maker in [maker_of(trials, tmp_path, World(rank, 2)) for rank in (0, 1)]:
        maker.edit(trials, lambda: (editor, None), EvalConfig(batch_size=2))
    counts = [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("records_*"))]
    assert counts == [2, 1]
    assert maker_of(trials, tmp_path).missing(trials) == []


def test_a_damaged_picture_is_edited_again(copied, arguments, capsys, edited):
    before = {r.key: r.scores for r in Records(copied).by_key.values()}
    files = sorted((copied / "edits").glob("*.png"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-20])
    contents = [path.read_bytes() for path in files]
    files[2].write_bytes(next(content for content in contents[3:] if content != contents[2]))
    lost = {f"edits/{path.name}" for path in files[:3]}
    code, said, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    count = sum(record.picture["file"] in lost for record in records_of(copied))  # not built-in
    assert code == 0 and f"20 edits, {20 - count} of them are there already" in said, err
    assert sum(edited) == count and not [*(copied / "edits").glob(".[0-9]*")]
    assert {r.key: r.scores for r in Records(copied).by_key.values()} == before


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


def test_a_damaged_record_in_the_middle_is_refused(copied):
    path = copied / "records_000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")  # an empty line holds nothing
    assert len(read_records(copied)) == len(lines)
    path.write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=r"records_000\.jsonl line 2 is damaged"):
        Records(copied)


def test_a_record_after_a_torn_line_stands_on_its_own(copied):
    path = copied / "records_000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:40]}")
    records = Records(copied)
    records.add(read_records(copied)[0])
    assert path.read_text() == f"{lines[0]}\n{lines[0]}\n"


def test_a_manifest_gives_first_instructions_captions_and_names(manifest):
    one, two = cases_of_manifest(manifest)
    assert (one.instruction, two.instruction) == INSTRUCTIONS
    assert one.captions == ("a cup", "a cup in the snow")
    assert (one.name, two.name) == ("a-snow", "b-night")


def test_names_of_cases_differ_and_a_limit_is_draw(tmp_path):
    paths = [tmp_path / name for name in ("x/a.png", "a-2.png", "y/a.png", "z/a-2.png")]
    cases = cases_of_images(paths, ["snow"])
    assert [case.name for case in cases] == ["a", "a-2", "a-3", "a-2-2"]
    many = [Case(f"{number:02d}", PICTURE, "snow") for number in range(100)]
    drawn = draw(many, 9)
    assert drawn == sorted(drawn, key=lambda case: case.name) == draw(many, 9) and len(drawn) == 9
    assert draw(many[:3], 5) == many[:3]


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
    while len([*out.glob("edits/*.png")]) < 8 and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len({r.edit for r in read_records(out) if r.settings})
    assert done < 20
    code, said, _ = run(capsys, *arguments, "--output", out)
    assert code == 0 and re_count(said) >= done
    assert len({r.edit for r in read_records(out) if r.settings}) == 20
    assert (out / "index.html").exists()


def re_count(said):
    return int(said.partition("edits, ")[2].split()[0])
