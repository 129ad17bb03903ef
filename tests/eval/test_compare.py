"""The command as a person meets it: one line for every kind of bad input, before anything runs."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image, ImageOps

import ipx2p.eval.compare
from ipx2p import names
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.editing.editor import Editor
from ipx2p.eval.benchmarks.registry import PROTOCOLS
from ipx2p.eval.models import EvalConfig
from ipx2p.eval.records import read_records
from ipx2p.eval.scores import METRICS
from tests.conftest import GOLDEN, ROOT
from tests.eval.conftest import WEIGHTS, assert_one_line, run

pytestmark = pytest.mark.usefixtures("no_curves")
IMAGE = ["--image", GOLDEN / "coffee_64.png", "--instruction", "make it snow"]
LDM = GOLDEN / "ldm.safetensors"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guidance", "ip2p", "apgg"], r"unknown guidance scheme 'apgg'; did you mean apg\?"),
        (["--guidance", "apg:nrm=3"], r"apg has no parameter 'nrm'; did you mean norm\?"),
        (["--guidance", "apg:eta=3"], "apg:eta is '3', out of range: expected 0 to 1"),
        (["--fidelity", "none", "mak"], r"unknown fidelity knob 'mak'; did you mean mask\?"),
        (["--fidelity", "mask:threshold=2"], "mask:threshold is '2', out of range: expected 0 to"),
        (["--sampler", "eulr"], r"unknown sampler 'eulr'; did you mean euler\?"),
        (["--sampler", "heun", "--guidance", "cfgpp"], "cfgpp does not work with the sampler heun"),
        (["--guidance", "ip2p", "autoguidance"], "autoguidance needs a second, weaker network"),
        (["--guidance", "perp_neg"], "perp_neg needs a negative instruction"),
        (["--weak-weights", WEIGHTS], "no --guidance uses one: add autoguidance"),
        (["--guidance-scale", "nan"], "guidance_scale is nan, expected a finite number"),
        (["--steps", "0"], "0 steps asked for, expected 1 or more"),
        (["--resolution", "0"], "resolution is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--limit", "0"], "limit is 0, expected 1 or more pictures"),
        (["--grids", "-1"], "grids is -1, expected 0 or more"),
        (
            ["--metrics", "psnr"],
            r"psnr needs targets \(target in the manifest, or --",
        ),
        (
            ["--metrics", "clip_direction"],
            r"clip_direction needs a CLIP model .* and captions",
        ),
        (["--clip", "nowhere"], "nowhere is not a folder with a CLIP model"),
        (["--clip", WEIGHTS], "holds no CLIP model"),
        (["--image", "no.png"], r"no\.png: cannot be read \(No such file"),
        (["--instruction", "a", "b"], "1 pictures but 2 instructions"),
        (["--instruction", ""], "the instruction is empty"),
        (["--target", "a.png", "b.png"], "1 pictures but 2 targets"),
        (["--source-caption", "a"], "captions come in pairs"),
        (["--source-caption", "", "--target-caption", "a"], "a caption is empty: say what the pic"),
        (
            ["--guidance", "autoguidance", "--weak-weights", "nowhere"],
            "nowhere does not exist: expected a checkpoint",
        ),
        (["--manifest", "x.jsonl"], "not allowed with argument --image"),
        (["--device", "gpu"], "device 'gpu' is not available"),
        (["--output", "/proc/x"], "cannot write into /proc/x"),
    ],
)
def test_bad_arguments_get_one_line(capsys, tmp_path, argv, message):
    common = ["--output", tmp_path / "out", "--device", "cpu", "--steps", "1"]
    assert_one_line(run(capsys, WEIGHTS, *IMAGE, *common, *argv), message)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["--folder", "nil", "--instruction", "x"], "nil is not a folder of photographs"),
        (["--folder", ".", "--instruction", "x", "y"], "2 instructions: a --folder takes one"),
        (["--folder", ".", "--instruction", "x"], "holds no pictures"),
        (["--folder", "."], "--instruction is required"),
        (["--manifest", "no.jsonl"], r"manifest no\.jsonl does not exist"),
        (["--manifest", "no.jsonl", "--instruction", "x"], "a manifest brings its own"),
        (["--manifest", "half.jsonl"], r"half\.jsonl line 1: 'target' is None"),
        ([], "one of the arguments --image --folder --manifest is required"),
    ],
)
def test_nothing_to_edit_gets_one_line(capsys, tmp_path, monkeypatch, what, message):
    monkeypatch.chdir(tmp_path)
    pair = {"source": "a.png", "instruction": "x", "task": "t"}
    (tmp_path / "half.jsonl").write_text(json.dumps(pair))
    assert_one_line(run(capsys, WEIGHTS, *what, "--device", "cpu"), message)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere", "nowhere does not exist: expected a checkpoint"),
        (LDM, r"is a single file.*run convert_weights\.py"),
    ],
)
def test_weights_that_are_no_edit_model_get_one_line(capsys, tmp_path, weights, message):
    argv = [*IMAGE, "--output", tmp_path / "out", "--device", "cpu"]
    assert_one_line(run(capsys, weights, *argv), message)


def test_fidelity_is_swept_like_guidance(capsys, tmp_path):
    swept = ["none", "mask:threshold=1", "wavelet:weight=0", "start:strength=0.5"]
    argv = [WEIGHTS, *IMAGE, "--output", tmp_path, "--device", "cpu", "--steps", 2, "--grids", 1]
    argv += ["--target", GOLDEN / "coffee_64.png", "--resolution", 64]
    code, out, err = run(capsys, *argv, "--fidelity", *swept, "--guidance-scale", 3, 7)
    assert code == 0 and "6 edits, 0 of them are there already" in out, err  # neutral ones are one
    rows = [*csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))]
    psnr = {
        (row["fidelity"], row["guidance_scale"]): float(row["psnr"])
        for row in rows
        if row["guidance"]
    }
    assert len(psnr) == 8 and {fidelity for fidelity, _ in psnr} == {*swept}
    for scale in ("3.0", "7.0"):
        assert psnr["wavelet:weight=0", scale] == psnr["none", scale] < 20
        assert psnr["mask:threshold=1", scale] > 50  # the source, which is the target here
    assert "guidance 3, mask:threshold=1" in [row["label"] for row in rows]
    code, out, err = run(capsys, *argv, "--fidelity", "adain", *swept, "--guidance-scale", 3)
    assert code == 0 and "4 edits, 3 of them are there already" in out, err


def test_an_output_folder_of_something_else_is_refused(capsys, copied, arguments, tmp_path):
    message = "holds edits that were made with resolution 16, now 32: choose another --output"
    assert_one_line(run(capsys, *arguments, "--resolution", 32, "--output", copied), message)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    message = "mine holds other files, and no records"
    assert_one_line(run(capsys, *arguments, "--output", tmp_path / "mine"), message)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_results_are_not_edited_again(capsys, copied, arguments):
    argv = ["--folder", copied, "--instruction", "x", "--device", "cpu", "--output", copied]
    assert_one_line(run(capsys, WEIGHTS, *argv), "lies in the output folder .* another --output")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--target", "t.png"],
            r"coffee_64\.png is 64 x 64, its target .*t\.png is 30 x 20: a pair",
        ),
        (["--steps", 5, 1001], "1001 steps asked for, expected 1 to 1000"),
        (["--guidance", "ip2p", "pag:layers=mid/typo"], "no attention layer 'typo'; it has down"),
        (["--image", "notes.txt"], r"notes\.txt: not a picture that Pillow knows"),
    ],
)
def test_what_would_stop_a_sweep_later_stops_it_at_once(
    capsys, tmp_path, coffee, monkeypatch, argv, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipx2p.editing.editor.Editor.load", None)  # no weights are loaded
    coffee.resize((30, 20)).save("t.png")
    (tmp_path / "notes.txt").write_text("kept")
    result = run(capsys, WEIGHTS, *IMAGE, "--output", "out", "--device", "cpu", *argv)
    assert_one_line(result, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dtype", "bfloat16"], "made with dtype 'float32', now 'bfloat16'"),
        (["--negative-instruction", "rain"], "made with negative_instruction '', now 'rain'"),
        (["--resolution", 24], "made with resolution 16, now 24"),
    ],
)
def test_what_shapes_every_edit_may_not_change_in_a_folder(
    capsys, finished, arguments, changes, message
):
    result = run(capsys, *arguments, *changes, "--output", finished)
    assert_one_line(result, f"holds edits that were {message}: choose another --output")


def test_other_weights_or_other_code_may_not_either(
    capsys, finished, arguments, monkeypatch, tmp_path
):
    shutil.copytree(GOLDEN / "diffusers_v2", tmp_path / "diffusers")
    others = [tmp_path / "diffusers", *arguments[1:]]
    message = "edits that were made by other weights that were called 'diffusers'"
    assert_one_line(run(capsys, *others, "--output", finished), message)
    monkeypatch.setattr("ipx2p.eval.engine.code_digest", lambda: "changed")
    result = run(capsys, *arguments, "--output", finished)
    message = (
        r"edits that were made by other code \(networks, .* not compare .*: choose another --out"
    )
    assert_one_line(result, message)


def select_on(folder, manifest):
    """A manifest of one pair like the first of the other, of another picture."""
    pair = json.loads(manifest.read_text().splitlines()[0])
    image = Image.open(manifest.parent / pair["source"])
    ImageOps.mirror(image).save(folder / "a.png")
    image.save(folder / "b.png")
    (folder / "val.jsonl").write_text(json.dumps(pair))
    return folder / "val.jsonl"


def test_best_scales_are_chosen_on_other_pairs_and_reported_on_these(
    capsys, arguments, manifest, tmp_path
):
    pairs, out = tmp_path / "pairs" / "one.jsonl", tmp_path / "out"
    shutil.copytree(manifest.parent, pairs.parent)
    pairs.write_text(manifest.read_text().splitlines()[0])
    argv = [*arguments, "--manifest", pairs, "--guidance", "ip2p", "--output", out, "--grids", 0]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert "chosen on the reported pictures themselves" in (out / "table.md").read_text()
    code, said, err = run(capsys, *argv, "--select-on", select_on(tmp_path, manifest))
    assert code == 0 and "8 edits, 4 of them are there already" in said, err
    assert "Best scales were chosen on" in (out / "index.html").read_text()
    reported, chosen_on = (
        {
            (row["guidance_scale"], row["image_guidance_scale"]): row
            for row in csv.DictReader(io.StringIO((out / name).read_text()))
            if row["guidance"]
        }
        for name in ("table.csv", "chosen_on.csv")
    )
    assert reported.keys() == chosen_on.keys() and len(reported) == 4
    assert all(reported[scales]["psnr"] != chosen_on[scales]["psnr"] for scales in reported)
    values = {scales: float(chosen_on[scales]["psnr"]) for scales in reported}
    best = [scales for scales in reported if "psnr" in reported[scales]["best"]]
    assert best == [max(values, key=values.get)]


def test_scales_are_not_chosen_on_reported_pictures_or_other_tasks(
    capsys, arguments, manifest, tmp_path
):
    argv = [*arguments, "--output", tmp_path / "out", "--select-on"]
    assert_one_line(run(capsys, *argv, manifest), "2 of its pictures are also reported on")
    other = select_on(tmp_path, manifest)
    assert_one_line(run(capsys, *argv, other), "val.jsonl has no pairs of the task 'night'")
    alone = [WEIGHTS, *IMAGE, "--select-on", other]
    assert_one_line(run(capsys, *alone), "--select-on chooses the scales .* for a --manifest")


def test_the_folder_is_held_while_it_computes(capsys, arguments, tmp_path, monkeypatch):
    out, tried = tmp_path / "out", []
    edit = Editor.edit

    def edit_beside_another(self, *args, **settings):
        line = (
            "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        other = subprocess.run([sys.executable, "-c", line, out / ".lock"], capture_output=True)
        tried.append(other.returncode)
        return edit(self, *args, **settings)

    monkeypatch.setattr(Editor, "edit", edit_beside_another)
    few = ["--guidance", "ip2p", "--guidance-scale", 1, "--image-guidance-scale", 1, "--grids", 0]
    code, _, err = run(capsys, *arguments, *few, "--output", out)
    assert code == 0 and tried == [1], err


def test_another_process_in_the_output_folder_is_refused(capsys, copied, arguments):
    line = (
        f"import fcntl, sys; f = open({str(copied / '.lock')!r}, 'w')\n"
        "fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    )
    before = (copied / "index.html").read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        message = "another process is computing in .*out: wait for it, or choose another --output"
        assert_one_line(run(capsys, *arguments, "--output", copied), message)
        other.stdin.close()
    assert (copied / "index.html").read_bytes() == before
    code, _, err = run(capsys, *arguments, "--output", copied, "--grids", 0)
    assert code == 0, err


def test_numbers_may_be_negative_and_have_an_exponent():
    scales = ["-1", "-.5", "-1e38", "-2.5E-3"]
    args = ipx2p.eval.compare.parse(["w", *map(str, IMAGE), "--guidance-scale", *scales])
    assert args.guidance_scale == [-1.0, -0.5, -1e38, -0.0025]


def test_the_resolution_of_the_training_is_the_default(capsys, tmp_path):
    argv = [WEIGHTS, *IMAGE, "--steps", 1, "--device", "cpu", "--output", tmp_path]
    code, _, err = run(capsys, *argv)
    assert code == 0 and "warning" not in err
    made = [r.made_with for r in read_records(tmp_path) if r.settings]
    assert made[0]["resolution"] == 128
    code, _, err = run(capsys, *argv[:-1], tmp_path / "small", "--resolution", 12)
    assert code == 0 and "resolution 12 is rounded to 16" in err and "far from the 128" in err


def test_defaults_and_lists_of_the_command_are_those_of_the_code():
    args = ipx2p.eval.compare.parse(["w", *map(str, IMAGE)])
    config = EvalConfig()
    for name in vars(config).keys() & vars(args).keys() - {"output"}:
        assert getattr(args, name) == getattr(config, name)
    assert [*names.METRICS] == [name for name in METRICS if "judge" not in METRICS[name].needs]
    assert [*names.BENCHMARKS] == [*PROTOCOLS]


def test_the_guide_tells_of_every_scheme_with_its_paper():
    guide = (ROOT / "docs" / "guidance.md").read_text()
    for name, scheme in SCHEMES.items():
        [row] = [line for line in guide.splitlines() if line.startswith(f"| `{name}`")]
        if paper := re.match(r"arXiv:([0-9.]+)", scheme.about.paper):
            assert paper[1] in row or (scheme.is_linear and paper[1] in guide), name
        if not scheme.is_linear and scheme.about.evaluations:
            assert f"+{scheme.about.evaluations} |" in row, name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", guide):
        assert (ROOT / "docs" / picture).exists()
