"""Models side by side, as a person runs it: from the command to the report, and again."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from PIL import Image

import ipx2p.eval.evaluate
import ipx2p.eval.report
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.eval.records import Records, read_folders
from tests.conftest import GOLDEN, ROOT, golden_folder
from tests.eval.benchmarks.test_edit_sets import magicbrush
from tests.eval.benchmarks.test_judged import imgedit
from tests.eval.conftest import WEIGHTS
from tests.eval.tiny_networks import save_clip, save_dino

FAST = ["--resolution", "16", "--steps", "1", "--sampler", "euler", "--device", "cpu"]
ALWAYS = ["identity", "oracle", "vae", "classical"]


def evaluate(*argv):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resolution|.*of the published")
        ipx2p.eval.evaluate.main([str(arg) for arg in (*argv, *FAST)])


def refused(*argv):
    """The message of a run that must not edit anything."""
    with pytest.raises(InputError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Editor, "load", None)
        evaluate(*argv)
    return str(error.value)


def table(folder, task="all"):
    rows = csv.DictReader(io.StringIO((folder / "table.csv").read_text()))
    return {row["label"]: row for row in rows if row["task"] == task}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Six photographs with two tasks each."""
    folder = tmp_path_factory.mktemp("two_tasks")
    image = Image.open(GOLDEN / "coffee_64.png").convert("RGB")
    lines = []
    for number in range(6):
        turned = image.rotate(31 * number)
        turned.save(folder / f"{number}.png")
        for task, factor in (("enhance", 0.3), ("denoise", 0.9)):
            turned.point(lambda value, f=factor: int(value * f)).save(
                folder / f"{number}{task}.png"
            )
            pair = {"source": f"{number}{task}.png", "target": f"{number}.png", "task": task}
            lines.append(pair | {"instruction": f"{task} it", "group": str(number)})
    path = folder / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The golden model, a copy of it, and one whose last layer is another."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "copy", "other"):
        shutil.copytree(WEIGHTS, folder / name)
    path = folder / "other/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] += 0.1 * torch.ones(4)
    save_file(tensors, path)
    return [folder / name for name in ("one", "copy", "other")]


@pytest.fixture(scope="session")
def finished(pairs, models, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "out"
    evaluate(pairs, "--models", *models, "--baseline", "one", "--output", output, "--grids", "1")
    return output


@pytest.mark.parametrize("task", ["all", "enhance", "denoise"])
def test_every_task_has_its_built_in_rows_and_every_model(finished, task):
    assert [*table(finished, task)] == [*ALWAYS, "copy", "one", "other"]
    rows = table(finished, task)
    assert {row["pictures"] for row in rows.values()} == {"6"}
    assert rows["oracle"]["psnr"] == "inf" and float(rows["oracle"]["ssim"]) == 1
    assert float(rows["classical"]["psnr"]) > float(rows["identity"]["psnr"]) or task != "enhance"


def test_two_copies_of_one_model_differ_by_exactly_0(finished):
    for task in ("all", "enhance", "denoise"):
        row = table(finished, task)["copy"]
        for name in ("psnr", "ssim", "change"):
            ends = [float(row[f"{name}_minus_one{end}"]) for end in ("", "_low", "_high")]
            assert ends == [0, 0, 0], (task, name)
        assert row["psnr_minus_one_ties"] == row["edits"]


def test_what_a_model_does_not_beat_is_said_in_words(finished):
    for path in (finished / "table.md", finished / "index.html"):
        assert re.search(r"does not beat classical by PSNR \(-\d", path.read_text())


def test_a_killed_run_makes_only_what_is_missing(finished, pairs, models, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "records_000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:60]) + lines[60][:20])
    kept = {record.edit for record in Records(out).by_key.values() if record.settings}
    counts, edit = [], Editor.edit

    def counted(self, images, *args, **settings):
        counts.append(len(images))
        return edit(self, images, *args, **settings)

    monkeypatch.setattr(Editor, "edit", counted)
    again = [pairs, "--models", *models, "--baseline", "one", "--output", out, "--grids", "1"]
    evaluate(*again)
    assert sum(counts) == 24 - len(kept) < 24  # the copy shares the edits of the first
    ours, theirs = ((folder / "table.md").read_text() for folder in (out, finished))
    seconds = re.compile(r"\| \d+\.\d{3} \|")
    assert seconds.sub("", ours.replace(str(out), "")) == seconds.sub(
        "", theirs.replace(str(finished), "")
    )


def test_the_report_is_made_again_from_the_folder_alone(pairs, models, tmp_path):
    """The weights, the pairs and the place of the folder are gone."""
    weights, data = tmp_path / "mine", tmp_path / "data"
    shutil.copytree(models[2], weights)
    shutil.copytree(pairs.parent, data)
    evaluate(data / pairs.name, "--models", weights, "--output", tmp_path / "out", "--grids", "1")
    before = {name: (tmp_path / "out" / name).read_text() for name in ("table.md", "table.csv")}
    shutil.rmtree(weights)
    shutil.rmtree(data)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    ipx2p.eval.report.main([str(moved), "--output", str(tmp_path / "again"), "--grids", "1"])
    for name, text in before.items():
        after = (tmp_path / "again" / name).read_text()
        text, after = (re.sub(r"- (records:|.*Other metrics need).*", "", x) for x in (text, after))
        kept = [line for line in text.splitlines() if not line.startswith("Other metrics need")]
        assert [*filter(None, after.splitlines())] == [*filter(None, kept)], name
    page = (tmp_path / "again" / "index.html").read_text()
    assert page.count("data:image/") >= 5 and str(data) not in page.replace(str(moved), "")


def test_folders_are_reported_together(finished, pairs, models, tmp_path):
    weights = f"third={models[2]}"
    evaluate(pairs, "--models", weights, "--output", tmp_path / "there", "--grids", "0")
    both = [str(finished), str(tmp_path / "there"), "--output", str(tmp_path / "both")]
    ipx2p.eval.report.main([*both, "--baseline", "third", "--grids", "0"])
    rows = table(tmp_path / "both")
    assert [*rows] == [*ALWAYS, "copy", "one", "other", "third"]
    assert rows["third"]["psnr"] == rows["other"]["psnr"]


def test_settings_of_a_model_and_results_made_elsewhere(pairs, models, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for line in map(json.loads, pairs.read_text().splitlines()):
        name = f"{line['source'].removesuffix('.png')}-{line['task']}"
        Image.open(pairs.parent / line["target"]).resize((20, 20)).save(theirs / f"{name}.jpg")
    argv = [f"{models[0]}@guidance_scale=1,image_guidance_scale=1", models[0], theirs]
    evaluate(pairs, "--models", *argv, "--output", tmp_path / "out", "--grids", "0")
    rows = table(tmp_path / "out")
    assert len(rows) == 7 and float(rows["theirs"]["evaluations"]) == 0
    assert float(rows["theirs"]["psnr"]) > float(rows["identity"]["psnr"])
    (theirs / f"{name}.jpg").unlink()
    message = refused(pairs, "--models", *argv, "--output", tmp_path / "other")
    assert "theirs has no result for" in message and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no.jsonl", "--models", "{one}"], "no.jsonl does not exist: expected a manifest"),
        (["{folder}", "--models", "{one}"], "is a folder: give --instruction TEXT"),
        (["{pairs}", "--models", "{one}", "--metrics", "clip_direction"], "needs a CLIP model"),
        (["{pairs}", "--models", "{one}", "--clip", "{clip}", "--metrics", "clip_direction"],
         "clip_direction needs captions"),
        (["{folder}", "--instruction", "x", "--models", "{one}", "--metrics", "psnr"],
         "psnr needs targets"),
        (["{pairs}", "--models", "{one}", "--lpips", "no.pth"], "no.pth"),
        (["{pairs}", "--models", "{one}", "--dino", "nowhere"], "is not a folder with a DINO"),
        (["{folder}", "--models", "{one}", "--benchmark", "magicbrsh"], "did you mean magicbrush"),
        (["{folder}", "--models", "{one}", "--benchmark", "magicbrush"], "not the root of magic"),
        (["{pairs}", "--models", "{one}", "--select-on", "{pairs}"], "also reported on"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_anything_is_edited(
    pairs, models, clip_folder, tmp_path, argv, message
):
    places = {"pairs": pairs, "folder": pairs.parent, "one": models[0], "clip": clip_folder}
    said = refused(*(text.format(**places) for text in argv), "--output", tmp_path / "out")
    assert message in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_each_model_is_edited_as_its_folder_says(pairs, tmp_path):
    how = {"sampler": "euler", "spacing": "trailing", "num_steps": 1, "resolution": 16}
    quick = golden_folder(tmp_path / "quick", **how, guidance_scale=1.0, image_guidance_scale=1.0)
    slow = golden_folder(tmp_path / "slow", **how | {"num_steps": 2, "sampler": "ddim"})
    argv = [pairs, "--limit", 1, "--grids", 0, "--device", "cpu", "--models", quick, slow]

    def run(name, *more):
        output = tmp_path / name
        ipx2p.eval.evaluate.main([str(arg) for arg in (*argv, *more, "--output", output)])
        edits = [record for record in read_folders([output]) if record.settings]
        assert {edit.size for edit in edits} == {"16 x 16"}
        assert {edit.made_with["resolution"] for edit in edits} == {16}
        names = ("sampler", "num_steps", "guidance_scale", "spacing")
        return {(edit.model, *map(edit.settings.get, names)) for edit in edits}

    own = {("quick", "euler", 1, 1.0, "trailing"), ("slow", "ddim", 2, 7.0, "trailing")}
    assert run("own") == own
    rows = table(tmp_path / "own")
    steps = {row["model"]: row["num_steps"] for row in rows.values() if row["num_steps"]}
    assert steps == {"quick": "1", "slow": "2"}
    alike = {("quick", "euler", 1, 3.0, "trailing"), ("slow", "ddim", 2, 3.0, "trailing")}
    assert run("alike", "--guidance-scale", 3) == alike
    mixed = {("quick", "euler", 1, 1.0, "trailing"), ("slow", "euler", 2, 7.0, "trailing")}
    assert run("mixed", f"{slow}@sampler=euler") - own == mixed - own

    (slow / "edit_settings.json").write_text('{"resolution": 32}')
    with pytest.raises(InputError, match="quick edits at 16 pixels, slow at 32: choose one --reso"):
        run("unlike")


def test_models_whose_edits_would_differ_in_size_are_refused(pairs, models, tmp_path):
    config = tmp_path / "large/unet/config.json"
    shutil.copytree(models[0], tmp_path / "large")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32}))
    argv = [
        str(pairs),
        "--models",
        str(models[0]),
        f"large={tmp_path / 'large'}",
        "--device",
        "cpu",
    ]
    with pytest.raises(InputError, match="one edits at 128 pixels, large at 256: choose"):
        ipx2p.eval.evaluate.main([*argv, "--output", str(tmp_path / "out")])
    config = tmp_path / "large/vae/config.json"
    values = json.loads(config.read_text())
    values |= {
        name: values[name][:-1]
        for name in ("block_out_channels", "down_block_types", "up_block_types")
    }
    config.write_text(json.dumps(values))
    with pytest.raises(InputError, match="rounds sides to .* would differ in size"):
        ipx2p.eval.evaluate.main([*argv, "--output", str(tmp_path / "out"), "--resolution", "64"])


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    clip, dino = save_clip(folder / "clip"), save_dino(folder / "dino")
    return ["--clip", clip, "--dino", dino or folder / "dino"]


def test_magicbrush_runs_turn_by_turn_and_gives_results_to_its_own_script(tmp_path, networks):
    magicbrush(tmp_path)
    out = tmp_path / "out"
    argv = ["--benchmark", "magicbrush-multi-turn", *networks, "--grids", "1"]
    evaluate(tmp_path, *argv, "--models", WEIGHTS, "--output", out)
    rows = table(out)
    assert {row["edits"] for row in rows.values()} == {"3"}  # last turns; others are steps
    assert rows["oracle"]["l1"] == "0.0" and "clip_text" in rows["diffusers"]
    [results] = (out / "results").iterdir()
    names = {path.relative_to(results).as_posix() for path in results.rglob("*.png")}
    assert {"139/139_1.png", "139/139_iter_2.png", "139/139_iter_3.png", "30/30_1.png"} <= names
    records = {record.case["name"]: record for record in Records(out).by_key.values()}
    assert records["139-2"].case["is_step"] and not records["139-2"].scores
    assert all(not record.case["is_step"] for record in read_folders([out]))
    assert "0.2855" in (out / "index.html").read_text()  # the published oracle, beside ours
    evaluate(tmp_path, *argv, "--models", f"theirs={results}", "--output", tmp_path / "elsewhere")
    theirs = table(tmp_path / "elsewhere")["theirs"]
    for name in ("l1", "clip_image_target", "dino", "clip_text"):
        assert theirs[name] == rows["diffusers"][name], name


def test_a_judged_benchmark_asks_and_reads_its_answers(tmp_path):
    imgedit(tmp_path)
    out = tmp_path / "out"
    argv = ["--benchmark", "imgedit", "--models", WEIGHTS, "--output", out, "--grids", "0"]
    evaluate(tmp_path, *argv)
    requests = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert all((out / picture).is_file() for one in requests for picture in one["pictures"])
    answers = tmp_path / "answers.jsonl"
    given = '{"score": [4, 5, 3], "reasoning": ""}'
    answers.write_text("\n".join(json.dumps({"id": r["id"], "answer": given}) for r in requests))
    ipx2p.eval.report.main([str(out), "--answers", str(answers), "--grids", "0"])
    assert float(table(out)["diffusers"]["judged"]) == 4
    ipx2p.eval.report.main([str(out), "--grids", "0"])  # they are kept
    assert float(table(out)["diffusers"]["judged"]) == 4


@pytest.mark.slow
def test_kills_and_ranks_change_nothing_in_the_table(finished, pairs, models, tmp_path):
    out = tmp_path / "out"
    line = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("-m", "ipx2p.eval.evaluate", str(pairs), "--models", *map(str, models)),
        *("--baseline", "one", "--output", str(out), "--grids", "1", *FAST),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for pictures in (10, 30):
        process = subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True)
        limit = time.monotonic() + 120
        while len([*out.glob("edits/*.png")]) < pictures and time.monotonic() < limit:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
    ours, theirs = table(out), table(finished)
    assert [*ours] == [*theirs]
    for label, row in theirs.items():
        for name in ("psnr", "ssim", "change", "psnr_low", "psnr_high"):
            if row[name]:
                assert float(ours[label][name]) == pytest.approx(float(row[name]), rel=1e-3), name
