"""The commands as a person meets them: help, results, and one line for every kind of bad input."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import convert_weights
import ipx2p.__main__
import ipx2p.bench.__main__
import ipx2p.commands.convert
import ipx2p.commands.edit
import ipx2p.commands.train
import ipx2p.data.prepare.__main__
import ipx2p.eval.blind
import ipx2p.eval.compare
import ipx2p.eval.evaluate
import ipx2p.eval.report
import ipx2p.experiments
import sample
import train
from ipx2p import names
from ipx2p.cli import ENVIRONMENT, run_command
from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.samplers import SAMPLERS
from ipx2p.fidelity import KNOBS
from ipx2p.names import SPACINGS
from ipx2p.transfer import TRANSFERS
from tests.conftest import GOLDEN, ROOT, golden_folder

FOLDER, LDM = GOLDEN / "diffusers", GOLDEN / "ldm.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
PHOTO = ROOT / "assets" / "photos" / "coffee.jpg"
QUICK = ["--steps", "1", "--resolution", "88", "--device", "cpu"]
COMMANDS = {
    "sample": ipx2p.commands.edit,
    "train": ipx2p.commands.train,
    "convert_weights": ipx2p.commands.convert,
    "ipx2p.bench": ipx2p.bench.__main__,
    "ipx2p.experiments": ipx2p.experiments,
    "ipx2p.data.prepare": ipx2p.data.prepare.__main__,
    "ipx2p.eval.compare": ipx2p.eval.compare,
    "ipx2p.eval.evaluate": ipx2p.eval.evaluate,
    "ipx2p.eval.report": ipx2p.eval.report,
    "ipx2p.eval.blind": ipx2p.eval.blind,
}
MODULES = COMMANDS | {"ipx2p": ipx2p.__main__}


@pytest.fixture
def command(capsys):
    """Run a command in this process; returns exit code, standard output, standard error."""

    def run(name, *argv):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: MODULES[name].main([str(arg) for arg in argv]))
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 20), "teal").save(path)
    return path


def bomb(path):
    """A PNG of a few bytes that says it is 40000 x 40000."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def assert_one_line(result, message):
    """Exit code 2, nothing but one line, and it says what is wrong."""
    code, _, err = result
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert re.search(message, err), err


# Help


def invocation(name):
    """How a command is typed."""
    return f"python -m {name}" if "." in name else f"python {name}.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_imports_nothing_heavy(name):
    module = COMMANDS[name].__name__
    probe = (
        f"import sys, {module}\n"
        f"try: {module}.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'omegaconf'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert invocation(name) in run.stdout and "examples:" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 100


def test_ipx2p_runs_every_command_under_its_own_name():
    probe = (
        "import sys, ipx2p.__main__\n"
        "from ipx2p import __version__\n"
        "for argv in [['--help'], *([name, '--help'] for name in ipx2p.__main__.COMMANDS)]:\n"
        "    try: ipx2p.__main__.main(argv)\n"
        "    except SystemExit as exit_: assert not exit_.code\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name, (module, script) in ipx2p.__main__.COMMANDS.items():
        assert f"usage: ipx2p {name} " in run.stdout and f"  ipx2p {name} " in run.stdout
        assert f"{name:13}{module.DESCRIPTION}" in run.stdout
        assert f"  python {script}" not in run.stdout and f"  {script}" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 100


def test_scripts_and_ipx2p_run_the_same_commands(command, monkeypatch):
    monkeypatch.setattr("ipx2p.cli.Parser.names", {})
    assert sample.main is COMMANDS["sample"].main and train.main is COMMANDS["train"].main
    assert convert_weights.main is COMMANDS["convert_weights"].main
    assert_one_line(command("ipx2p", "edt"), "ipx2p: error: .*invalid choice: 'edt'")
    assert_one_line(command("ipx2p", "edit"), "ipx2p edit: error: .*see ipx2p edit --help")
    code, _, err = command("ipx2p", "edit", "nowhere", "--image", "setup.cfg", "--instruction", "x")
    assert code == 2 and "nowhere does not exist" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", FOLDER, "--image", "no.png"], r"no\.png: cannot be read"),
        (["sample", FOLDER, "--image", PHOTO, "--sampler", "eular"], "did you mean euler"),
        (["sample", FOLDER, "--image", PHOTO, "--guidance", "ip2p+apq"], "scheme 'apq'; did you"),
        (["sample", FOLDER, "--image", PHOTO, "--full-size", "afine"], "did you mean affine"),
        (["sample", "nowhere", "--image", PHOTO], "nowhere does not exist"),
        (["ipx2p.eval.compare", FOLDER, "--image", "no.png"], r"no\.png: cannot be read"),
        (["ipx2p.eval.compare", FOLDER, "--image", PHOTO, "--spacing", "x"], "unknown spacing 'x'"),
        (["ipx2p.eval.compare", "nowhere", "--image", PHOTO], "nowhere does not exist"),
    ],
)
def test_slips_are_answered_before_torch_is_imported(argv, message):
    module = COMMANDS[argv[0]].__name__
    probe = (
        f"import sys, {module}\n"
        "from ipx2p.cli import run_command\n"
        f"try: run_command(lambda: {module}.main(sys.argv[1:]))\n"
        "finally: assert 'torch' not in sys.modules"
    )
    line = [sys.executable, "-c", probe, *map(str, argv[1:]), "--instruction", "x"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert_one_line((run.returncode, run.stdout, run.stderr), message)


def test_commands_let_waiting_threads_sleep_but_for_what_the_user_set(command, monkeypatch):
    def run(**own):
        names = (*ENVIRONMENT, "OMP_WAIT_POLICY")
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        command("ipx2p", "--version")
        return {name: os.environ[name] for name in names if name in os.environ}

    assert run() == ENVIRONMENT and int(ENVIRONMENT["GOMP_SPINCOUNT"]) <= 3000
    assert run(GOMP_SPINCOUNT="7") == ENVIRONMENT | {"GOMP_SPINCOUNT": "7"}
    policy = {"OMP_WAIT_POLICY": "ACTIVE"}  # which a spin count would override
    assert run(**policy) == {k: v for k, v in ENVIRONMENT.items() if "GOMP" not in k} | policy


def test_lists_in_help_are_those_of_the_code(command):
    code, out, _ = command("sample", "--help")
    assert code == 0
    linear = [name for name, scheme in SCHEMES.items() if scheme.is_linear]
    modifiers = [name for name in SCHEMES if name not in linear]
    lists = {"samplers": SAMPLERS, "spacings": SPACINGS, "transfers": TRANSFERS}
    lists |= {"guidance": linear, "modifiers": modifiers, "fidelity": ["none", *KNOBS]}
    for label, known in lists.items():
        assert getattr(names, label.upper()) == (*known,)
        listed = re.search(rf"^{label}:((?: .*,\n)* .*)", out, re.MULTILINE)[1]
        assert re.sub(r"\s", "", listed).split(",") == [*known]


def test_examples_in_help_parse():
    for name, module in COMMANDS.items():
        text = module.EXAMPLES.replace("\\\n", " ")
        lines = re.findall(rf"  {re.escape(invocation(name))} (.*)", text)
        assert len(lines) >= 3
        for line in lines:
            module.parse(shlex.split(line))


@pytest.mark.parametrize("name", ["sample", "ipx2p.eval.compare", "ipx2p.eval.evaluate"])
def test_defaults_in_help_are_those_of_the_code(command, name):
    from ipx2p.editing.settings import EditSettings

    _, out, _ = command(name, "--help")
    for option, value in vars(EditSettings()).items():
        flag = "--" + option.removeprefix("num_").replace("_", "-")
        text = re.search(rf"^  {flag} .*?(?=^  --)", out, re.DOTALL | re.MULTILINE)[0]
        assert f"(default: the model's, or {value})" in " ".join(text.split())


# train.py


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["configs/nope.yaml"], "config file configs/nope.yaml does not exist"),
        (["configs/quickstart.yaml", "steps", "4"], "'steps' is not an override, expected key=val"),
    ],
)
def test_a_slip_is_answered_before_torch_is_imported(argv, message):
    probe = f"import sys, train\ntry: train.main({argv})\nexcept ValueError as e: print(e)\n"
    run = subprocess.run(
        [sys.executable, "-c", f"{probe}assert 'torch' not in sys.modules"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert message in run.stdout


# sample.py


def test_a_stack_with_a_weak_network_is_run_and_recorded(command, picture, tmp_path):
    argv = [FOLDER, "--image", picture, "--instruction", "snow", "--output", tmp_path / "out"]
    stack = ("--guidance", "autoguidance:scale=2+rescale", "--weak-weights", FOLDER)
    code, _, err = command("sample", *argv, *QUICK, *stack)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "photo-000.json").read_text())
    assert record["guidance"] == stack[1] and record["weak_weights"] == str(FOLDER)
    assert record["evaluations"] == 4
    full = "ip2p+autoguidance:scale=2.0,low=0.0,high=inf+rescale:phi=0.7"
    assert record["guidance_in_full"] == full
    code, _, err = command("sample", *argv, *QUICK, *stack[:2])
    assert code == 2 and "autoguidance needs a second, weaker network: --weak-weights" in err


def test_an_edit_is_saved_beside_everything_that_made_it(command, picture, tmp_path):
    out = tmp_path / "out"
    argv = [FOLDER, "--image", picture, "--instruction", "make it snow", "--output", out]
    code, stdout, _ = command("sample", *argv, *QUICK, "--seed", 7)
    assert code == 0 and stdout.split() == [str(out / "photo-000.png")]
    with Image.open(out / "photo-000.png") as image:
        assert image.size == (88, 88)
    record = json.loads((out / "photo-000.json").read_text())
    assert record["instruction"] == "make it snow" and record["source"] == str(picture)
    assert (record["seed"], record["num_steps"], record["guidance_scale"]) == (7, 1, 7.0)
    assert record["weights"] == str(FOLDER) and record["dtype"] == "float32"
    assert record["torch"] == torch.__version__ and record["device"] == "cpu"
    assert record["weights_folder"] == str(FOLDER)
    assert record["evaluations"] == 3 and record["seconds"] > 0
    command("sample", *argv, *QUICK)
    assert sorted(p.name for p in out.glob("*.png")) == ["photo-000.png", "photo-001.png"]


def test_several_edits_get_a_sheet_and_their_own_seeds(command, picture, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = command(
        *("sample", FOLDER, "--image", picture, picture, "--instruction", "a", "b"),
        *("--output", out, "--num-images", 2, *QUICK),
    )
    assert code == 0
    assert [p.rpartition("/")[2] for p in stdout.split()] == [
        *(f"photo-00{i}.png" for i in range(4)),
        "sheet-000.png",
    ]
    records = [json.loads((out / f"photo-00{i}.json").read_text()) for i in range(4)]
    assert [(r["instruction"], r["seed"]) for r in records] == [
        *(("a", 0), ("a", 1), ("b", 0), ("b", 1))
    ]
    with Image.open(out / "sheet-000.png") as sheet:
        assert sheet.width > 3 * 256 and sheet.height > 2 * 256


def test_without_flags_a_picture_is_edited_as_the_weights_folder_says(command, tmp_path):
    settings = {"sampler": "euler", "spacing": "trailing", "num_steps": 2, "guidance_scale": 3.0}
    settings |= {"guidance": "ip2p+rescale", "image_guidance_scale": 1.2, "resolution": 64}
    own = golden_folder(tmp_path / "own", **settings)
    flags = [
        f"--{name.removeprefix('num_').replace('_', '-')}={settings[name]}" for name in settings
    ]
    out = tmp_path / "out"

    def edit(folder, *more):
        argv = ("--image", PHOTO, "--instruction", "make it snow", "--device", "cpu")
        code, stdout, err = command("sample", folder, *argv, "--output", out, *more)
        path = Path(stdout.strip())
        assert code == 0, err
        return path.read_bytes(), json.loads(path.with_suffix(".json").read_text())

    (says, record), (told, _) = edit(own), edit(FOLDER, *flags)
    assert says == told and settings.items() <= record.items()
    for flag in flags:  # one for which the picture is another, and it alone
        name, _, value = flag.partition("=")
        other = {"--sampler": "ddim", "--spacing": "linspace", "--guidance": "ip2p"}
        picture, now = edit(own, name, other.get(name) or round(float(value)) + 8)
        key = name[2:].replace("-", "_").replace("steps", "num_steps")
        changed = {one for one in settings if now[one] != settings[one]}
        assert changed == {key} and picture != says


def test_a_folder_that_cannot_be_used_as_it_says_gets_one_line(command, picture, tmp_path):
    own = golden_folder(tmp_path / "own", num_step=2)
    argv = ("sample", own, "--image", picture, "--instruction", "x", "--output", tmp_path / "out")
    assert_one_line(
        command(*argv), r"own/edit_settings\.json: unknown key 'num_step'; did you mean"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [["--one-branch-at-a-time"], ["--batch-size", "1"]])
def test_memory_savers_give_the_same_pictures(command, picture, tmp_path, extra):
    argv = [FOLDER, "--image", picture, "--instruction", "x", *QUICK, "--num-images", 2]
    command("sample", *argv, "--output", tmp_path / "one")
    command("sample", *argv, *extra, "--output", tmp_path / "two")
    for name in ("photo-000.png", "photo-001.png"):
        one, two = (Image.open(tmp_path / place / name) for place in ("one", "two"))
        difference = max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True))
        assert difference <= 1


def test_cut_instruction_and_animation_are_said_in_one_line(command, tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    long = "rain " * 80
    code, _, err = command(
        *("sample", FOLDER, "--image", tmp_path / "a.gif", "--instruction", long, *QUICK),
        *("--output", tmp_path / "out"),
    )
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert code == 0 and len(said) == 2
    assert "a.gif" in said[0] and "first" in said[0] and "this end of it is cut" in said[1]


def without_picture(write):
    """Arguments with a bad picture made by `write`."""

    def arguments(tmp_path, picture):
        write(tmp_path / "bad.png", picture)
        return ["--image", tmp_path / "bad.png"]

    return arguments


def option(*argv):
    return lambda tmp_path, picture: [*argv]


def truncated(path, picture):
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (option("--image", "nowhere.png"), r"nowhere\.png: .*check the path"),
        (without_picture(lambda path, _: path.touch()), r"bad\.png: .*empty|0 bytes"),
        (without_picture(truncated), r"bad\.png: damaged picture \(.*truncated"),
        (without_picture(lambda path, _: path.write_text("hi")), r"bad\.png: not a picture"),
        (without_picture(lambda path, _: path.mkdir()), r"bad\.png: is a folder"),
        (without_picture(lambda path, _: bomb(path)), r"bad\.png: .*1600000000 pixels.*178956970"),
        (option("--instruction", ""), "the instruction is empty"),
        (
            lambda tmp_path, picture: ["--image", *[picture] * 3, "--instruction", "a", "b"],
            "3 pictures but 2 instructions: give one for each, or one for all",
        ),
        (option("--steps", "0"), "0 steps asked for, expected 1"),
        (option("--steps", "-3"), "-3 steps asked for, expected 1"),
        (option("--steps", "5000"), "5000 steps asked for, expected 1 to 1000"),
        (option("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (option("--guidance-scale", "nan"), "guidance_scale is nan, expected a finite number"),
        (option("--image-guidance-scale", "inf"), "image_guidance_scale is inf"),
        (option("--device", "cuda:7"), "device 'cuda:7' is not available"),
        (option("--device", "gpu"), "device 'gpu' is not available"),
        (option("--dtype", "float8"), r"unknown dtype 'float8'; .*float32, bfloat16, float16"),
        (option("--sampler", "ddmp"), r"unknown sampler 'ddmp'; did you mean ddpm\? .*dpmpp_2m"),
        (option("--spacing", "x"), "unknown spacing 'x'; known here: linspace, leading"),
        (option("--guidance", "ip"), r"unknown guidance scheme 'ip'; .*text_first, joint"),
        (option("--resolution", "0"), "resolution is 0"),
        (option("--num-images", "0"), "num_images is 0"),
        (option("--batch-size", "0"), "batch_size is 0"),
        (option("--output", "/proc/edits"), "cannot write into /proc/edits: .*another place"),
        (lambda tmp_path, picture: ["--output", picture], "cannot write into .*photo.png"),
        (option("--what"), "unrecognized arguments: --what"),
        (option("--device", "meta"), "device 'meta' is not available"),
        (option("--negative-instruction", "\udcff"), "is not valid Unicode text"),
        (option("--image", "x" * 300), "File name too long|cannot read"),
    ],
)
def test_bad_arguments_of_sample_get_one_line(command, picture, tmp_path, arguments, message):
    argv = ["--image", picture, "--instruction", "x", "--output", tmp_path / "out", *QUICK]
    result = command("sample", FOLDER, *argv, *arguments(tmp_path, picture))
    assert_one_line(result, message)


def out_of_memory(*_):
    torch.empty(1 << 62, dtype=torch.uint8)


def test_running_out_of_memory_gets_advice(command, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("ipx2p.models.unet.UNet.forward", out_of_memory)
    argv = [FOLDER, "--image", picture, "--instruction", "x", "--output", tmp_path, *QUICK]
    code, _, err = command("sample", *argv)
    last = "error: out of memory on the CPU: 0 of 1 edits are written; try a smaller --resolution"
    assert code == 2 and err.strip().splitlines()[-1].startswith(last) and "Traceback" not in err


@pytest.mark.parametrize(
    ("resolution", "said"),
    [
        ([], []),
        (["--resolution", 128], []),
        (["--resolution", 99], ["resolution 99 is rounded to 96: .* a multiple of 8"]),
        (["--resolution", 16], ["resolution 16 is far from the 128 pixels"]),
        (["--resolution", 8], ["resolution 8 is far from the 128 pixels"]),
        (["--resolution", 63], ["63 is rounded to 64", "64 is far from the 128 pixels"]),
        (["--resolution", 200], ["resolution 200 is far from the 128 pixels"]),
        (["--resolution", 99999999999], ["pixels was asked for, the limit is"]),
    ],
)
def test_the_resolution_of_the_training_is_the_default(
    command, picture, tmp_path, resolution, said
):
    argv = [FOLDER, "--image", picture, "--instruction", "x", "--output", tmp_path / "out"]
    code, out, err = command("sample", *argv, "--steps", 1, "--device", "cpu", *resolution)
    lines = [line for line in err.splitlines() if re.match("warning:|error:", line)]
    assert len(lines) == len(said)
    assert all(re.search(message, line) for message, line in zip(said, lines, strict=True))
    if code == 0:
        sizes = {16: 16, 8: 8, 99: 96, 63: 64, 200: 200}
        with Image.open(out.strip()) as image:
            assert image.width == sizes.get(resolution[-1] if resolution else None, 128)


def copied(spoil):
    """A copy of the golden folder, spoiled."""

    def make(tmp_path):
        shutil.copytree(FOLDER, tmp_path / "weights")
        spoil(tmp_path / "weights")
        return tmp_path / "weights"

    return make


def channels(number):
    def spoil(folder):
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": number}))
        tensors = load_file(folder / UNET)
        shape = (16, number, 3, 3)
        save_file(tensors | {"conv_in.weight": torch.zeros(shape).half()}, folder / UNET)

    return copied(spoil)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda tmp_path: tmp_path / "nowhere", "nowhere does not exist: expected a checkpoint"),
        (lambda tmp_path: LDM, r"is a single file.*run convert_weights\.py"),
        (channels(4), r"4 input channels, an edit model needs 8: run convert_weights\.py"),
        (channels(9), r"config\.json: in_channels is 9, expected 4 .* or 8"),
        (copied(lambda f: cut(f / UNET)), r"diffusion_pytorch_model\.safetensors: .*cut short"),
        (copied(lambda f: (f / UNET).unlink()), "no weights in .*unet"),
        (copied(lambda f: (f / UNET).write_bytes(b"")), "is empty: download it again"),
        (copied(lambda f: shutil.rmtree(f / "vae")), r"vae/config\.json does not exist"),
        (copied(lambda f: (f / "unet/config.json").write_text("{}")), "does not fit the model"),
        (
            copied(lambda f: save_file({"a": torch.zeros(1)}, f / UNET)),
            r"does not fit the model: 6[0-9]+ missing \(conv_in\.weight.*; 1 extra \(a\)",
        ),
    ],
)
def test_bad_weights_in_sample_get_one_line(command, picture, tmp_path, weights, message):
    argv = ["--image", picture, "--instruction", "x", "--output", tmp_path / "out", *QUICK]
    assert_one_line(command("sample", weights(tmp_path), *argv), message)


def test_nothing_is_overwritten_and_long_names_are_cut(command, tmp_path):
    picture = tmp_path / f"{'x' * 240}.png"
    Image.new("RGB", (20, 20), "teal").save(picture)
    out = tmp_path / "out"
    out.mkdir()
    taken = [out / f"{'x' * 200}-000.json", out / f"{'x' * 200}-001.png"]
    taken[0].write_text("kept")
    taken[1].symlink_to("nowhere")
    argv = ["--image", picture, "--instruction", "x", "--output", out, *QUICK]
    code, stdout, _ = command("sample", FOLDER, *argv)
    assert code == 0 and stdout.strip().endswith("x-002.png")
    assert taken[0].read_text() == "kept" and taken[1].is_symlink()


def test_latents_that_are_not_finite_get_one_line(command, picture, tmp_path):
    argv = ["--image", picture, "--instruction", "x", "--output", tmp_path / "out", *QUICK]
    code, _, err = command("sample", FOLDER, *argv, "--guidance-scale", "1e39")
    assert code == 2
    assert "not finite from step 1 of 1 on, U-Net in float32" in err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.png"))


# convert_weights.py and train.py


def test_convert_goes_both_ways(command, tmp_path):
    argv = ["--config", FOLDER, "--dtype", "float32"]
    code, out, _ = command("convert_weights", LDM, tmp_path / "folder", *argv)
    assert code == 0 and "8 input channels, epsilon, float32" in out
    single = tmp_path / "one.safetensors"
    code, _, _ = command("convert_weights", tmp_path / "folder", single, "--to", "ldm")
    assert code == 0 and load_file(single).keys() == load_file(LDM).keys()


def half_a_file(path):
    path.write_bytes(LDM.read_bytes()[:1_000_000])


def half_a_pickle(path):
    torch.save({"state_dict": load_file(LDM)}, path)
    cut(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("no.ckpt", lambda path: None, r"no\.ckpt does not exist"),
        ("text.ckpt", lambda p: p.write_text("not weights " * 99), r"text\.ckpt is text, not weig"),
        ("page.ckpt", lambda p: p.write_text("<html></html>"), "an HTML page, not weights"),
        ("empty.ckpt", lambda path: path.touch(), "is empty: download it again"),
        ("half.safetensors", half_a_file, r"half\.safetensors: .*cut short"),
        ("half.ckpt", half_a_pickle, r"half\.ckpt: .*damaged or cut short"),
        ("old.bin", lambda path: torch.save([1, 2], path), "holds no named tensors"),
    ],
)  # fmt: skip
def test_bad_files_for_convert_get_one_line(command, tmp_path, name, write, message):
    write(tmp_path / name)
    result = command("convert_weights", tmp_path / name, tmp_path / "out", "--config", FOLDER)
    assert_one_line(result, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda tmp_path: "/dev/null", "/dev/null exists already"),
        (lambda tmp_path: tmp_path / ("x" * 300), "File name too long"),
        (lambda tmp_path: tmp_path, "exists already"),
    ],
)
def test_places_that_cannot_be_converted_to_get_one_line(command, tmp_path, output, message):
    (tmp_path / "something").touch()
    assert_one_line(command("convert_weights", LDM, output(tmp_path), "--config", FOLDER), message)


def test_convert_writes_where_links_lead_and_into_empty_folders(command, monkeypatch, tmp_path):
    for name in ("linked", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    (tmp_path / "dangling").symlink_to("later")
    monkeypatch.chdir(tmp_path / "empty")
    for output, folder in (("../link", "linked"), ("../dangling", "later"), (".", "empty")):
        code, _, err = command("convert_weights", LDM, output, "--config", FOLDER)
        assert (code, err) == (0, "")
        assert (tmp_path / folder / "model_index.json").exists()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("options", [("--weights", "raw"), ("--config", FOLDER)])
def test_options_for_single_files_are_refused_for_folders(command, tmp_path, options):
    result = command("convert_weights", FOLDER, tmp_path / "out", *options)
    assert_one_line(result, f"{options[0]} .* is for single files, .* leave it out")


def test_a_named_tokenizer_makes_up_for_a_missing_one(command, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "tokenizer")
    argv = [tmp_path / "weights", tmp_path / "out"]
    assert_one_line(command("convert_weights", *argv), "holds no tokenizer")
    code, _, err = command("convert_weights", *argv, "--tokenizer", FOLDER)
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize(
    "key", ["input_blocks.0.0", "input_blocks.1.1.transformer_blocks.0.attn2.to_k"]
)
def test_tensors_of_another_rank_get_one_line(command, tmp_path, key, shape):
    key = f"model.diffusion_model.{key}.weight"
    tensors = load_file(LDM) | {key: torch.zeros(shape)}
    save_file(tensors, tmp_path / "bad.safetensors")
    result = command("convert_weights", tmp_path / "bad.safetensors", tmp_path / "out")
    assert_one_line(result, rf"{key} has shape .*, expected \d dimensions|does not fit")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["configs/no.yaml"], r"config file configs/no\.yaml does not exist"),
        (["setup.cfg"], "setup.cfg"),
        ([], r"name the settings .*configs/quickstart\.yaml, configs/restore_"),
        (["configs/quickstart.yaml", "train.stepz=3"], r"unknown key train\.stepz; did you mean"),
        (["configs/quickstart.yaml", "train.steps=x"], r"train\.steps: Value 'x' .* Integer"),
        (["configs/quickstart.yaml", "run.dir=/proc/x"], "cannot write into /proc"),
        (
            ["configs/tiny_vae.yaml", f"model.weights={FOLDER}", "data.photos=nil"],
            "nil is not a folder of photographs",
        ),
    ],
)
def test_bad_arguments_of_train_get_one_line(command, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(ROOT)
    dry = [] if any("run.dir" in arg for arg in argv) else [f"run.dir={tmp_path}", "--dry-run"]
    assert_one_line(command("train", *argv, *(dry if argv else [])), message)


def test_bugs_keep_their_traceback():
    def main():
        raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="a bug of ours"):
        run_command(main)


def test_interrupted_commands_end_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_what_the_system_refuses_gets_one_line(capsys):
    for error, message in (
        (OSError(36, "File name too long", "x" * 999), "x: File name too long"),
        (MemoryError(), "out of memory"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as exit_:
            run_command(main)
        assert_one_line((exit_.value.code, "", capsys.readouterr().err), message)


@pytest.mark.parametrize(
    ("output", "code", "said"), [("| true", 141, ""), ("> /dev/full", 2, "No space left")]
)
def test_output_that_goes_nowhere_ends_without_a_traceback(output, code, said):
    probe = (
        "import time; from ipx2p.cli import run_command\n"
        "def main():\n"
        "    time.sleep(0.5)\n"
        "    for _ in range(20000): print('a line of output')\n"
        "run_command(main)"
    )
    line = f"set -o pipefail; {sys.executable} -c {shlex.quote(probe)} {output}"
    run = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code
    assert said in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == bool(said)
