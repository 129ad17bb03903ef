"""The White-box Cartoonization network against what TensorFlow computes from the same weights."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipx2p.data.cartoons.whitebox import cartoonize, guided_filter, import_whitebox, load_whitebox
from ipx2p.errors import InputError
from ipx2p.tensor_files.tensors import digest, read_metadata, read_tensors, save_tensors
from tests.conftest import GOLDEN

ARRAYS = GOLDEN / "whitebox.safetensors"
CLOSE = {"atol": 3e-5, "rtol": 0}  # on values in -7..7


@pytest.fixture(scope="module")
def arrays():
    return load_file(ARRAYS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("whitebox") / "whitebox.safetensors"
    import_whitebox(ARRAYS, path)
    return path


@pytest.fixture(scope="module")
def generator_net(weights):
    return load_whitebox(weights)


def nchw(array):
    return array.permute(0, 3, 1, 2)


def test_generator_and_filter_match_the_reference(generator_net, arrays):
    photo = nchw(arrays["input_bgr_nhwc"])
    raw = generator_net(photo)
    torch.testing.assert_close(raw, nchw(arrays["generator_out"]), **CLOSE)
    torch.testing.assert_close(
        guided_filter(photo, raw, 1, 5e-3), nchw(arrays["final_out"]), **CLOSE
    )


def test_pictures_are_red_green_blue_outside(generator_net, arrays):
    photo, final = (nchw(arrays[name]).flip(1) for name in ("input_bgr_nhwc", "final_out"))
    expected = ((final + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(cartoonize(generator_net, (photo + 1) / 2), expected, **CLOSE)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (13, 8), (30, 33)])
def test_any_size_keeps_its_size(generator_net, size, generator):
    after = cartoonize(generator_net, torch.rand(2, 3, *size, generator=generator))
    assert after.shape == (2, 3, *size) and after.isfinite().all()
    assert after.min() >= 0 and after.max() <= 1


def test_odd_sides_are_continued_by_reflection(generator_net, generator):
    photo = torch.rand(1, 3, 22, 27, generator=generator)
    whole = torch.nn.functional.pad(photo, (0, 1, 0, 2), mode="reflect")
    expected = cartoonize(generator_net, whole)[..., :22, :27]
    assert torch.equal(cartoonize(generator_net, photo), expected)


def test_a_plain_guide_blurs_and_a_strong_edge_stays():
    edge = torch.zeros(1, 1, 8, 16)
    edge[..., 8:] = 1.0
    kept = guided_filter(edge, edge, 1, 1e-6)
    torch.testing.assert_close(kept, edge, atol=1e-4, rtol=0)
    blurred = guided_filter(torch.ones_like(edge), edge, 1, 1e-6)
    torch.testing.assert_close(blurred[0, 0, 4, 6:10], torch.tensor([1, 3, 6, 8]) / 9)


def test_an_imported_file_says_what_it_is_and_has_plain_names(weights, arrays):
    assert read_metadata(weights) == {
        "format": "pt",
        "content": "white-box cartoonization generator",
    }
    tensors = read_tensors(weights)
    assert len(tensors) == 36 and tensors["blocks.3.conv2.weight"].shape == (32, 32, 3, 3)
    kernel = arrays["generator/Conv/weights"]
    assert torch.equal(tensors["enter.weight"], kernel.permute(3, 2, 0, 1))


def test_only_the_generator_is_taken_without_what_the_optimizer_kept(weights, arrays, tmp_path):
    more = {
        "beta1_power": torch.zeros(1),
        "discriminator_s/conv1/weights": torch.zeros(1),
        "generator/Conv/weights/Adam": torch.zeros(1),
        "generator/Conv/weights/Adam_1": torch.zeros(1),
    }
    save_file(arrays | more, tmp_path / "arrays.safetensors")
    import_whitebox(tmp_path / "arrays.safetensors", tmp_path / "again.safetensors")
    assert digest(read_tensors(tmp_path / "again.safetensors")) == digest(read_tensors(weights))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"generator/Conv_3/biases": None}, r"1 missing \(generator/Conv_3/biases\)"),
        ({"generator/Conv_10/biases": torch.zeros(3)}, r"1 extra \(generator/Conv_10/biases\)"),
        ({"generator/Conv_9/biases": torch.zeros(4)}, r"1 of wrong shape .*Conv_9/biases \(4,\)"),
        ({"generator/Conv/biases": None}, "has no variable generator/Conv/biases"),
    ],
)
def test_other_arrays_are_refused_by_their_published_names(arrays, tmp_path, change, expected):
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    save_file(changed, tmp_path / "arrays.safetensors")
    with pytest.raises(InputError, match=expected):
        import_whitebox(tmp_path / "arrays.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_that_is_not_there_and_a_wrong_output_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="no TensorFlow checkpoint at .*nowhere: expected"):
        import_whitebox(tmp_path / "nowhere", tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="expected a name that ends in .safetensors"):
        import_whitebox(ARRAYS, tmp_path / "out.pt")


def test_without_tensorflow_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match="not installed: pip install tensorflow-cpu"):
        import_whitebox(GOLDEN / "whitebox_tf", tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whitebox_tf", "whitebox_tf/model-1"])
def test_a_tensorflow_checkpoint_gives_the_same_file_without_a_word(weights, tmp_path, name):
    pytest.importorskip("tensorflow")
    code = "import sys; from ipx2p.data.cartoons.whitebox import *; import_whitebox(*sys.argv[1:])"
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", code, GOLDEN / name, output]
    result = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert digest(read_tensors(output)) == digest(read_tensors(weights))


@pytest.mark.slow
def test_a_damaged_tensorflow_checkpoint_is_refused(tmp_path):
    pytest.importorskip("tensorflow")
    shutil.copytree(GOLDEN / "whitebox_tf", tmp_path / "cut")
    [data] = (tmp_path / "cut").glob("*.data*")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot read the checkpoint .*cut"):
        import_whitebox(tmp_path / "cut", tmp_path / "out.safetensors")
    (tmp_path / "cut" / "checkpoint").unlink()
    with pytest.raises(InputError, match="cannot read the checkpoint .*cut"):
        import_whitebox(tmp_path / "cut", tmp_path / "out.safetensors")


def test_another_model_is_not_taken_for_the_teacher(weights, tmp_path):
    vae = GOLDEN / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match="not a White-box teacher.*has no label"):
        load_whitebox(vae)
    with pytest.raises(InputError, match="not a White-box teacher"):
        load_whitebox(ARRAYS)
    save_tensors(read_tensors(weights), tmp_path / "a.safetensors", metadata={"content": "x"})
    with pytest.raises(InputError, match="is labelled 'x'"):
        load_whitebox(tmp_path / "a.safetensors")


def test_missing_and_damaged_files_are_refused(weights, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="No such file"):
        load_whitebox(path)
    tensors = read_tensors(weights)
    tensors.pop("enter.bias")
    save_tensors(tensors, path, metadata=read_metadata(weights))
    with pytest.raises(InputError, match=r"missing \(enter.bias\)"):
        load_whitebox(path)
    path.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged or cut short"):
        load_whitebox(path)
