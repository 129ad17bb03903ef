"""Questions: variants x seeds of tiny trainings, what they answer, and how they resume."""

import contextlib
import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

import ipx2p.commands.train
from ipx2p import experiments
from ipx2p.commands import runner
from ipx2p.commands.evaluation import OTHER_WORDS
from ipx2p.commands.questions import read_question, trainings_of
from ipx2p.data.instructions import bank, read_bank
from ipx2p.errors import InputError
from ipx2p.eval.records import read_folders
from ipx2p.eval.summary import NO_EFFECT
from tests.conftest import GOLDEN, ROOT
from tests.training.conftest import forget

# The weights of the tests were made for larger pictures.
pytestmark = pytest.mark.filterwarnings("ignore:resolution 16 is far")
TASKS, PHOTOS = ("cartoonize", "denoise"), 6
CONFIG = {
    "run": {"name": "tiny"},
    "model": {
        "weights": str(GOLDEN / "diffusers"),
        "unet": {
            "block_out_channels": [8, 16],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "num_attention_heads": [2, 2],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "norm_num_groups": 4,
        },
    },
    "data": {
        "manifest": "pairs.jsonl",
        "validation_manifest": "pairs.jsonl",
        "resolution": 16,
        "workers": 0,
    },
    "optimizer": {"learning_rate": 0.05},
    "train": {
        "steps": 2,
        "batch_size": 2,
        "checkpoint_every": 1,
        "ema_decay": 0.0,
        "device": "cpu",
    },
    "validation": {
        "every": 100,
        "pairs_per_task": 1,
        "edit": {"num_steps": 1, "guidance_scale": 1.0, "image_guidance_scale": 1.0},
    },
}
QUESTION = {
    "title": "Do steps help?",
    "config": "tiny.yaml",
    "variants": {"1 step": ["train.steps=1"], "2 steps": []},
    "axis": "steps",
    "seeds": [0, 1],
    "evaluation": {"models": {"base": str(GOLDEN / "diffusers")}},
}


def write(folder, question=QUESTION, config=CONFIG):
    """A question with its training config and pairs."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(PHOTOS):
        for side in ("source", "target"):
            pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}{number}.png")
        lines += [
            {
                "source": f"source{number}.png",
                "target": f"target{number}.png",
                "instruction": [bank(task)[0]],
                "task": task,
            }
            for task in TASKS
        ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (folder / "steps.yaml").write_text(yaml.safe_dump(question, sort_keys=False))


def ask(folder, *argv):
    """Run the question with trainings in this process; returns what was printed and started."""
    started = []

    def start(job, slot, threads):
        started.append(job.folder.name)
        with open(job.log, "a") as log, contextlib.redirect_stdout(log):
            ipx2p.commands.train.main([str(job.config)])
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(runner, "start", start)
        patch.setattr(runner, "POLL_S", 0.0)
        patch.setattr("ipx2p.eval.reporting.has_matplotlib", lambda: False)  # curves take long
        experiments.main(["steps.yaml", "--processes", "2", *argv])
    return out.getvalue(), started


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A question that was asked once; its folder, and what that printed and started."""
    folder = tmp_path_factory.mktemp("question")
    write(folder)
    return folder, *ask(folder)


def rows(folder):
    """The answer for programs, of PSNR."""
    with open(folder / "runs/steps/answer/answer.csv") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == "psnr"]
    return {(row["task"], row["model"]): row for row in found}


def test_every_variant_is_trained_with_every_seed_and_edits_the_same_pairs(asked):
    folder, printed, started = asked
    names = ["1_step-0", "2_steps-0", "1_step-1", "2_steps-1"]
    assert started == names
    for name in names:
        records = read_folders([folder / "runs/steps" / name / "evaluation"])
        assert sum(record.model == "tuned" for record in records) == PHOTOS * len(TASKS)
    models = {"identity", "classical", "base", "1 step", "2 steps", "vae"}
    assert {model for _, model in rows(folder)} == models
    assert "0 of 4 runs finished, 0 of 6 steps; 2 at a time" in printed
    for name in ("answer.md", "answer.csv", "sheet.png", "index.html", "curve.png"):
        assert f"runs/steps/answer/{name}" in printed
        assert (folder / "runs/steps/answer" / name).stat().st_size > 500


def test_the_numbers_are_those_of_the_records(asked):
    folder, *_ = asked
    scores = {}
    for variant in ("1_step", "2_steps"):
        for seed in (0, 1):
            records = read_folders([folder / f"runs/steps/{variant}-{seed}/evaluation"])
            scores[variant, seed] = {
                record.case["name"]: record.scores["psnr"]
                for record in records
                if record.model == "tuned" and record.case["task"] == "denoise"
            }
    found = rows(folder)
    for variant in ("1_step", "2_steps"):
        row = found["denoise", variant.replace("_", " ")]
        means = [fmean(scores[variant, seed].values()) for seed in (0, 1)]
        assert float(row["mean"]) == pytest.approx(fmean(means))
        assert float(row["spread"]) == pytest.approx(stdev(means))
        assert (row["photographs"], row["trainings"]) == (str(PHOTOS), "2")
    by_photo = [
        fmean(scores["2_steps", seed][name] - scores["1_step", seed][name] for seed in (0, 1))
        for name in scores["1_step", 0]
    ]
    row = found["denoise", "2 steps"]
    assert float(row["difference"]) == pytest.approx(fmean(by_photo))
    low, high = float(row["difference_low"]), float(row["difference_high"])
    assert low < fmean(by_photo) < high
    assert int(row["difference_wins"]) == sum(one >= 0.005 for one in by_photo)
    assert (row["in_words"] == NO_EFFECT) == (low <= 0 <= high)
    base = found["denoise", "base"]  # its one seed is compared with the mean over trainings
    expected = float(base["mean"]) - float(found["denoise", "1 step"]["mean"])
    assert float(base["difference"]) == pytest.approx(expected)
    assert base["trainings"] == "0" and base["spread"] == ""


def test_the_table_is_ready_for_docs(asked):
    folder, printed, _ = asked
    text = (folder / "runs/steps/answer/answer.md").read_text()
    heads = (
        "| task | model | photographs | trainings | PSNR, dB | spread | minus 1 step | in words |"
    )
    assert text.startswith("# Do steps help?\n") and heads in text and heads in printed
    assert re.search(r"\| denoise \| 2 steps \| 6 \| 2 \| [\d.]+ \[[\d., ]+\] \|", text)


def test_a_finished_question_is_answered_again_without_training(asked):
    folder, *_ = asked
    before = rows(folder)
    printed, started = ask(folder)
    assert started == [] and "all 4 runs are finished" in printed
    assert rows(folder) == before


def test_only_what_a_kill_left_undone_is_done_again(asked, tmp_path):
    folder = shutil.copytree(asked[0], tmp_path / "copy", symlinks=True)
    before = rows(folder)
    forget(folder / "runs/steps/2_steps-1", 1)  # killed after its first step
    (folder / "runs/steps/1_step-0/evaluation/sheet.png").unlink()  # killed while evaluating
    (folder / "runs/steps/1_step-0/evaluation/edits").rename(folder / "lost")
    shutil.rmtree(folder / "runs/steps/answer")
    printed, started = ask(folder)
    assert started == ["1_step-0", "2_steps-1"]
    assert "2 of 4 runs finished" in printed
    assert "resuming from" in (folder / "runs/steps/2_steps-1.log").read_text()
    assert rows(folder) == before


def test_scales_have_rows_of_their_own(tmp_path):
    settings = ["guidance_scale=1,image_guidance_scale=1", "guidance_scale=3"]
    evaluation = {"settings": settings, "pairs": 2}
    write(tmp_path, QUESTION | {"evaluation": evaluation, "seeds": [3]})
    ask(tmp_path)
    text = (tmp_path / "runs/steps/answer/answer.md").read_text()
    for variant in ("1 step", "2 steps"):
        assert f"| {variant} | scales 1 and 1 |" in text
        assert f"| {variant} | scales 3 and 1 |" in text
    assert "no interval: that needs 5 photographs" in text


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        ({"variant": {}}, [], "unknown key variant; did you mean variants"),
        ({"variants": {}}, [], "variants is empty, expected NAME"),
        ({"variants": {"a": ["train.step=1"]}}, [], "variant 'a': .*unknown key train.step"),
        ({"variants": {"a": "train.steps=1"}}, [], "variants"),
        ({"variants": {"a": [], "a?": []}}, [], "variants need names that differ"),
        ({"variants": {"base": []}}, [], "'base' is a variant and a model of the evaluation"),
        ({"config": "gone.yaml"}, [], "config file gone.yaml does not exist"),
        ({}, ["--seeds", "1", "1"], r"seeds is \[1, 1\], expected different ones"),
        ({}, ["evaluation.pairs=0"], "evaluation.pairs is 0, expected 1 or more"),
        ({}, ["evaluation.models.base=gone"], "gone"),
        ({}, ["evaluation.manifest=gone.jsonl"], "gone.jsonl"),
        ({}, ["evaluation.banks={derain: derain}"], "no pair of pairs.jsonl has task 'derain'"),
        ({}, ["evaluation.settings=[scale=1]"], "no setting 'scale'"),
        ({}, ["train.steps=0"], "variant '2 steps': train.steps is 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, change, argv, message):
    write(tmp_path, QUESTION | change)
    with pytest.raises(InputError, match=message) as caught:
        ask(tmp_path, *argv)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("runs/**/*.log")]


def test_a_question_that_is_not_there_gets_a_suggestion():
    with pytest.raises(InputError, match="no question 'data_scal'; did you mean data_scale"):
        experiments.main(["data_scal"])


FILES = sorted((ROOT / "configs" / "questions").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_question_has_settings_that_can_be(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    question = read_question(path, [], None, [0])
    trainings = trainings_of(question, ROOT / "runs" / path.stem)
    assert len(trainings) == len(question.variants) >= 2
    for task in question.evaluation.banks:
        assert not {*bank(task)} & {*read_bank(question.evaluation.banks[task])}


def test_the_help_lists_every_question():
    listed = re.findall(r"^  ([a-z_]+)  +whether|^  ([a-z_]+)  +how", experiments.EXAMPLES, re.M)
    names = sorted("".join(pair) for pair in listed)
    assert names == sorted(path.stem for path in FILES if path.parent.name == "questions")
    assert names == sorted(path.stem for path in FILES if path.parent.name == "sd15")


def test_a_training_ends_with_its_evaluation(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = tmp_path / "words.txt"
    words.write_text("toonify\nas a comic\n")
    base = f"evaluation.models.base={GOLDEN / 'diffusers'}"
    argv = ["tiny.yaml", base, f"evaluation.banks.cartoonize={words}"]
    ipx2p.commands.train.main(argv)
    first = capsys.readouterr().out
    table = first[first.index("PSNR, dB ") :]
    words = OTHER_WORDS.format("cartoonize")
    assert re.search(rf"\n{words} +6 ", table) and re.search(r"\ndenoise +6 ", table)
    assert table.split("\n")[0].split()[2:] == [
        *("pictures", "identity", "classical", "base", "tuned", "vae"),
    ]
    assert re.search(r"denoise: tuned minus base [+-][\d.]+ \[.*\] \d / \d / \d", table)
    assert "pictures: runs/tiny/evaluation/sheet.png" in table
    ipx2p.commands.train.main(argv)
    again = capsys.readouterr().out
    assert again.endswith(table) and "edits" not in again
    ipx2p.commands.train.main(["tiny.yaml", base, "evaluation.pairs=2"])  # another evaluation
    changed = capsys.readouterr().out
    assert "4 edits, 0 of them are there already" in changed and words not in changed


@pytest.mark.slow
def test_a_signal_stops_all_runs_at_a_checkpoint_and_the_same_command_resumes(tmp_path):
    write(tmp_path, config=CONFIG | {"train": CONFIG["train"] | {"steps": 20_000}})
    command = [sys.executable, "-m", "ipx2p", "experiments", "steps.yaml", "--processes", "2"]
    few = ["train.checkpoint_every=1000", "--seeds", "0"]
    process = subprocess.Popen([*command, *few], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    numbers = tmp_path / "runs/steps/2_steps-0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not numbers.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "stopped; run the same command to resume" in process.communicate(timeout=300)[0]
    assert process.returncode == 130
    log = tmp_path / "runs/steps/2_steps-0.log"
    assert "run the same command to resume" in log.read_text()
    assert [*tmp_path.glob("runs/steps/2_steps-0/checkpoints/step_*")]
