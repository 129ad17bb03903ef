"""Benchmarks of restoration on tiny copies of their published layouts."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

from ipx2p.data.instructions import bank
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.registry import read_benchmark
from ipx2p.eval.benchmarks.restoration import RESTORATION

TEST2800 = ["Test2800-901_1", "Test2800-901_2", "Test2800-902_1", "Test2800-902_2"]


def write(path, shade=0, size=(13, 11)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 99, 30)).save(path)


def rain13k(root):
    for place in ("Rain100H", "Rain100L", "Test100", "Test1200"):
        for number in (1, 2, 10):
            write(root / "test" / place / "input" / f"{number}.png", number)
            write(root / "test" / place / "target" / f"{number}.png", number + 50)
    for clean in (901, 902):
        for number in (1, 2):
            write(root / "test/Test2800/input" / f"{clean}_{number}.jpg", number)
            write(root / "test/Test2800/target" / f"{clean}_{number}.jpg", 60 * (clean - 900))
    write(root / "train/Rain13K/input/1.jpg")
    write(root / "train/Rain13K/target/1.jpg")


def rain100(root):
    for place in ("Rain100H", "Rain100L"):
        for number in (1, 2):
            write(root / place / "rainy" / f"rain-{number:03d}.png", number)
            write(root / place / f"norain-{number:03d}.png", number + 50)


def gopro(root):
    for split, sequence in (("train", "GOPR0372_07_00"), ("test", "GOPR0384_11_00")):
        for side in ("blur", "blur_gamma", "sharp"):
            for frame in ("000001", "000002"):
                write(root / split / sequence / side / f"{frame}.png")


def gopro_flat(root):
    for side in ("input", "target"):
        for frame in ("000001", "000002"):
            write(root / "test" / side / f"GOPR0384_11_00-{frame}.png")


def lol(root):
    for place, numbers in (("our485", (2, 5)), ("eval15", (1, 22))):
        for number in numbers:
            write(root / place / "low" / f"{number}.png")
            write(root / place / "high" / f"{number}.png")


def blocks(shape=(2, 3, 12, 16, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sidd_mat(root, noisy=None, clean=None):
    scipy = pytest.importorskip("scipy.io")
    sides = {"ValidationNoisyBlocksSrgb": noisy, "ValidationGtBlocksSrgb": clean}
    for seed, (name, array) in enumerate(sides.items()):
        array = blocks(seed=seed) if array is None else array
        scipy.savemat(root / f"{name}.mat", {name: array}, do_compression=True)


def sidd_png(root):
    for name in ("0001_01", "0001_02", "0002_01"):
        write(root / "noisy" / f"{name}.png")
        write(root / "gt" / f"{name}.png")


def cases(name, root, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* pairs, the published rows are means over")
        return read_benchmark(name, root, tmp_path / "extracted")


@pytest.mark.parametrize(
    ("name", "tree", "names", "task", "groups"),
    [
        ("rain100h", rain13k, ["Rain100H-1", "Rain100H-2", "Rain100H-10"], "derain", 3),
        ("rain100l", rain13k, ["Rain100L-1", "Rain100L-2", "Rain100L-10"], "derain", 3),
        ("test100", rain13k, ["Test100-1", "Test100-2", "Test100-10"], "derain", 3),
        ("test1200", rain13k, ["Test1200-1", "Test1200-2", "Test1200-10"], "derain", 3),
        ("test2800", rain13k, TEST2800, "derain", 2),
        ("rain100h", rain100, ["Rain100H-rain-001", "Rain100H-rain-002"], "derain", 1),
        ("rain100l", rain100, ["Rain100L-rain-001", "Rain100L-rain-002"], "derain", 1),
        ("gopro", gopro, [f"GOPR0384_11_00-00000{n}" for n in (1, 2)], "deblur", 1),
        ("gopro", gopro_flat, [f"GOPR0384_11_00-00000{n}" for n in (1, 2)], "deblur", 1),
        ("lol", lol, ["eval15-1", "eval15-22"], "enhance", 1),
        ("sidd", sidd_mat, [f"000{p}_0{b}" for p in (1, 2) for b in (1, 2, 3)], "denoise", 2),
        ("sidd", sidd_png, ["0001_01", "0001_02", "0002_01"], "denoise", 2),
    ],
)  # fmt: skip
def test_layouts_give_the_test_pairs_alone(tmp_path, name, tree, names, task, groups):
    root = tmp_path / "set"
    root.mkdir()
    tree(root)
    found = cases(name, root, tmp_path)
    assert sorted(case.name for case in found) == sorted(names)
    assert {(case.task, case.instruction) for case in found} == {(task, bank(task)[0])}
    assert len({case.group for case in found}) == groups
    for case in found:
        case.check()
        assert case.source != case.target and "train" not in case.source.parts
        stems = {result.rpartition("/")[2].rpartition(".")[0] for result in case.results}
        assert case.source.stem in stems or tree is sidd_mat


def test_blocks_of_a_mat_file_become_pictures_with_their_own_targets(tmp_path):
    noisy, clean = blocks(seed=3), blocks(seed=4)
    sidd_mat(tmp_path, noisy, clean)
    for case in cases("sidd", tmp_path, tmp_path):
        picture, block = (int(part) - 1 for part in case.name.split("_"))
        for path, array in ((case.source, noisy), (case.target, clean)):
            with Image.open(path) as image:
                np.testing.assert_array_equal(np.asarray(image), array[picture, block])


def test_names_pair_pictures_where_listings_would_not(tmp_path):
    for number in (1, 2, 10):
        write(tmp_path / "test/Rain100H/input" / f"{number}.png")
        write(tmp_path / "test/Rain100H/target" / f"{number}.{'jpg' if number == 1 else 'png'}")
    for case in cases("rain100h", tmp_path, tmp_path):
        assert case.source.stem == case.target.stem


def without(tree, *names):
    def make(root):
        tree(root)
        for name in names:
            (root / name).unlink()

    return make


def cut_mat(root):
    sidd_mat(root)
    path = root / "ValidationGtBlocksSrgb.mat"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("name", "tree", "message"),
    [
        ("rain100h", lambda root: None, "not the root of rain13k, expected .*test/Rain100H"),
        ("test100", rain100, "not the root of rain13k"),
        ("rain100h", without(rain13k, "test/Rain100H/target/2.png"), r"2\.png has no target"),
        ("gopro", without(gopro, "test/GOPR0384_11_00/blur/000001.png"), "has no source"),
        ("gopro", lambda root: gopro_train(root), "holds no test"),
        ("lol", without(lol, "eval15/high/1.png", "eval15/high/22.png"), "holds no pictures"),
        ("sidd", lambda root: None, r"holds no validation blocks .*Srgb\.mat, or folders noisy"),
        ("sidd", without(sidd_png, "gt/0002_01.png"), "0002_01.png has no target"),
        ("sidd", without(sidd_mat, "ValidationGtBlocksSrgb.mat"), r"BlocksSrgb\.mat is missing"),
        ("sidd", cut_mat, "damaged or holds no ValidationGtBlocksSrgb"),
        ("sidd", lambda root: sidd_mat(root, blocks((2, 12, 16, 3))), "expected uint8 .40, 32"),
        ("sidd", lambda root: sidd_mat(root, blocks((1, 3, 12, 16, 3))), "noisy blocks are .1, 3"),
    ],
)
def test_missing_parts_get_one_line(tmp_path, name, tree, message):
    root = tmp_path / "set"
    root.mkdir()
    tree(root)
    with pytest.raises(InputError, match=message) as error:
        cases(name, root, tmp_path)
    assert "\n" not in str(error.value)


def gopro_train(root):
    gopro(root)
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "test").rmdir()


def test_fewer_pictures_than_published_are_said(tmp_path):
    lol(tmp_path)
    with pytest.warns(UserWarning, match="has 2 pairs, the published rows are means over 15"):
        read_benchmark("lol", tmp_path, tmp_path)


@pytest.mark.parametrize("protocol", RESTORATION, ids=lambda protocol: protocol.name)
def test_published_rows_are_measured_by_the_protocol(protocol):
    assert protocol.native and protocol.score_at_target and protocol.published
    luma = protocol.name.startswith(("rain", "test"))
    assert ("psnr_y" in protocol.metrics) == luma
    for row in protocol.published:
        assert all(10 < row.scores[name] < 45 for name in row.scores if name.startswith("psnr"))
        assert re.search("unverified|paper|published", row.source)
    assert any("centre crops" in note for note in protocol.notes)
