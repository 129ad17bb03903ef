"""Cartoon teachers: what can be opened, and what a call promises."""

import warnings
import zipfile

import pytest
import torch
from torch.export import Dim, export, save

from ipx2p.data.cartoons import classical
from ipx2p.data.cartoons.teacher import Teacher, open_teacher
from ipx2p.data.cartoons.whitebox import import_whitebox
from ipx2p.errors import InputError
from ipx2p.tensor_files.tensors import read_metadata, read_tensors, save_tensors
from tests.conftest import GOLDEN

ANY_SIZE = ({2: Dim.AUTO, 3: Dim.AUTO},)


class Program(torch.nn.Module):
    """Calls a function, with one weight so that there is a state."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


def write(path, function, *examples, shapes=None):
    examples = examples or (torch.rand(1, 3, 16, 24),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(Program(function).eval(), examples, dynamic_shapes=shapes and (shapes,))
        save(program, path)
    return str(path)


def darken(weight, picture):
    return weight * picture


def invert(weight, picture):
    return 1 - picture


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    import_whitebox(GOLDEN / "whitebox.safetensors", folder / "whitebox.safetensors")
    write(folder / "program.pt2", darken, shapes=ANY_SIZE)
    write(folder / "fixed.pt2", darken)
    return folder


@pytest.fixture(params=["classical", "whitebox.safetensors", "program.pt2"])
def teacher(request, files):
    is_word = request.param == "classical"
    return open_teacher(request.param if is_word else str(files / request.param))


def test_a_batch_is_its_pictures_one_by_one(teacher, generator):
    batch = torch.rand(3, 3, 21, 18, generator=generator)
    before = batch.clone()
    result = teacher(batch)
    assert torch.equal(result, torch.stack([teacher(picture) for picture in batch]))
    assert torch.equal(batch, before)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert result.min() >= 0 and result.max() <= 1
    assert not torch.equal(result, batch)


def test_each_kind_calls_what_it_says(files, generator):
    picture = torch.rand(3, 16, 24, generator=generator)
    drawn = classical.cartoonize(picture[None])[0]
    assert torch.equal(open_teacher("classical")(picture), drawn)
    for name in ("program.pt2", "fixed.pt2"):
        assert torch.equal(open_teacher(str(files / name))(picture), picture / 2)


def test_name_and_digest_say_which_teacher_it_was(teacher, files, monkeypatch, tmp_path):
    assert int(teacher.digest, 16)
    assert open_teacher(teacher.name).digest == teacher.digest
    if teacher.name == "classical":
        monkeypatch.setattr(classical, "VERSION", classical.VERSION + 1)
        assert open_teacher("classical").digest != teacher.digest
    elif teacher.name.endswith(".pt2"):
        other = open_teacher(write(tmp_path / "program.pt2", invert))
        assert other.digest != teacher.digest
    else:
        import_whitebox(GOLDEN / "whitebox.safetensors", tmp_path / "again.safetensors")
        assert open_teacher(str(tmp_path / "again.safetensors")).digest == teacher.digest
        tensors = read_tensors(tmp_path / "again.safetensors")
        tensors["leave.bias"] = tensors["leave.bias"] + 1e-6
        metadata = read_metadata(tmp_path / "again.safetensors")
        save_tensors(tensors, tmp_path / "other.safetensors", metadata=metadata)
        assert open_teacher(str(tmp_path / "other.safetensors")).digest != teacher.digest


def test_unknown_words_name_what_is_known():
    with pytest.raises(InputError, match="no teacher 'clasical'; did you mean classical.*pt2"):
        open_teacher("clasical")
    with pytest.raises(InputError, match="no teacher 'weights.ckpt'; .*known here: classical"):
        open_teacher("weights.ckpt")


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (
            torch.rand(1, 8, 8),
            r"expected float32 pixels01 \(\[N,\] 3, H, W\), got float32 \(1, 8, 8\)",
        ),
        (torch.rand(8, 8), r".*got float32 \(8, 8\)"),
        (torch.rand(0, 3, 8, 8), r".*got float32 \(0, 3, 8, 8\)"),
        (torch.rand(3, 8, 8).double(), "expected float32 .*got float64"),
        (torch.full((3, 8, 8), -1.0), r"expected pixels01 in \[0, 1\], got -1..-1"),
        (torch.full((3, 8, 8), float("nan")), "expected .*got nan"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, expected):
    with pytest.raises(InputError, match=f"teacher classical: {expected}"):
        open_teacher("classical")(pictures)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda weight, x: x[..., 1:], r"turned a picture \(1, 3, 16, 24\) into \(1, 3, 16, 23\)"),
        (lambda weight, x: (x, x), r"turned a picture \(1, 3, 16, 24\) into tuple"),
        (lambda weight, x: 2 * x + 0.5, r"its result: expected pixels01 in \[0, 1\], got .*\.\."),
        (lambda weight, x: x / 0, r"its result: expected pixels01 in \[0, 1\], got inf"),
        (lambda weight, x: x.half(), "its result: expected float32 .*got float16"),
    ],
)
def test_a_program_that_makes_no_picture_is_refused(tmp_path, function, expected):
    teacher = open_teacher(write(tmp_path / "bad.pt2", function))
    with pytest.raises(InputError, match=f"teacher .*bad.pt2.*{expected}"):
        teacher(torch.rand(3, 16, 24))


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ((torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)), "takes 2 inputs, expected 1"),
        ((torch.rand(2, 3, 8, 8),), r"takes \(2, 3, 8, 8\), expected \(1, 3, H, W\)"),
        ((torch.rand(1, 1, 8, 8),), r"takes \(1, 1, 8, 8\), expected"),
        ((torch.rand(3, 8, 8),), r"takes torch.float32 \(3, 8, 8\), expected"),
        ((torch.rand(1, 3, 8, 8).half(),), "takes torch.float16"),
    ],
)
def test_a_program_that_takes_no_picture_is_refused(tmp_path, examples, expected):
    path = write(tmp_path / "bad.pt2", lambda weight, x, *more: sum(more, weight * x), *examples)
    with pytest.raises(InputError, match=f"bad.pt2 {expected}"):
        open_teacher(path)


def test_a_size_that_a_program_cannot_take_says_which_it_takes(files, tmp_path):
    fixed = open_teacher(str(files / "fixed.pt2"))
    expected = r"height x width 16 x 24, and fails for 24 x 16 .*export it with dynamic_shapes="
    with pytest.raises(InputError, match=expected) as error:
        fixed(torch.rand(3, 24, 16))
    assert "\n" not in str(error.value)
    shapes = ({2: Dim("height", max=32), 3: Dim.AUTO},)
    path = write(tmp_path / "some.pt2", darken, shapes=shapes)
    with pytest.raises(InputError, match="height x width any x any, and fails for 40 x 16 .*32"):
        open_teacher(path)(torch.rand(3, 40, 16))


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "zip", "state_dict"])
def test_files_that_hold_no_program_are_refused(files, tmp_path, kind, capfd):
    path = tmp_path / "bad.pt2"
    if kind == "text":
        path.write_text("no")
    elif kind == "cut":
        path.write_bytes((files / "program.pt2").read_bytes()[:-200])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    elif kind == "state_dict":
        torch.save({"a": torch.zeros(1)}, path)
    expected = "No such file" if kind == "missing" else "was not written by torch.export.save"
    with pytest.raises(InputError, match=f"bad.pt2.*{expected}") as error:
        open_teacher(str(path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_teacher_can_be_any_function():
    teacher = Teacher("half", "0", lambda picture: picture / 2, "cpu")
    assert torch.equal(teacher(torch.ones(3, 2, 2)), torch.full((3, 2, 2), 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["classical", "whitebox.safetensors", "program.pt2"])
def test_a_gpu_draws_the_same(files, name, generator):
    name = name if name == "classical" else str(files / name)
    photo = torch.rand(2, 3, 41, 50, generator=generator)
    result = open_teacher(name, "cuda")(photo)
    assert result.device == photo.device
    assert (result - open_teacher(name)(photo)).abs().mean() < 1e-3
