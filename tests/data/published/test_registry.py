"""Readers of published data sets, each on a small tree of its published layout."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib

import pytest
from PIL import Image

from ipx2p.data.published.registry import SOURCES, open_source
from ipx2p.data.published.source import Fault, load_example
from ipx2p.errors import InputError
from tests.conftest import ROOT


def encoded(format="PNG", size=(6, 4), green=0):
    file = io.BytesIO()
    image = Image.new("RGB", size)
    image.putdata([(x * 37 % 256, x * 91 % 256, green) for x in range(size[0] * size[1])])
    image.save(file, format)
    return file.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")


def write(path, content=None):
    """A file with its folders; by default the picture that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = PNG if path.suffix.lower() == ".png" else JPEG
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


# Trees: what each set looks like when it is unpacked


def reds(root):
    for split, sequences in (("train", ("000", "001")), ("val", ("000",))):
        for side in ("blur", "sharp"):
            for sequence in sequences:
                for frame in range(2):
                    write(root / f"{split}_{side}" / sequence / f"{frame:08d}.png")


def gopro(root):
    for sequence in ("train/GOPR0372_07_00", "train/GOPR0374_11_00", "test/GOPR0384_11_00"):
        for side in ("blur", "blur_gamma", "sharp"):
            for frame in ("000047", "000048"):
                write(root / sequence / side / f"{frame}.png")


def rain13k(root):
    for place in ("train/Rain13K", "test/Rain100H", "test/Test2800"):
        for number in (1, 2):
            write(root / place / "input" / f"{number}.jpg", encoded("JPEG", green=9))
            suffix = "jpg" if place == "train/Rain13K" else "png"
            clean = encoded("JPEG" if suffix == "jpg" else "PNG", green=number)
            write(root / place / "target" / f"{number}.{suffix}", clean)


def sidd(root):
    for instance in ("0001_001_S6_00100_00060_3200_L", "0006_001_S6_00100_00060_4400_N"):
        for side in ("GT", "NOISY"):
            write(root / "Data" / instance / f"{side}_SRGB_010.PNG")
    write(root / "Scene_Instances.txt", b"0001_001_S6_00100_00060_3200_L\n")


def sidd_medium(root):
    for instance in ("0001_001_S6_00100_00060_3200_L", "0200_010_GP_01600_03200_5500_N"):
        for side in ("GT", "NOISY"):
            for number in ("010", "011"):
                write(root / "Data" / instance / f"{instance[:4]}_{side}_SRGB_{number}.PNG")


def lol(root):
    for place, numbers in (("our485", (2, 5, 10)), ("eval15", (1, 22))):
        for number in numbers:
            write(root / place / "low" / f"{number}.png")
            write(root / place / "high" / f"{number}.png")


def folders(root):
    for name in ("a.one", "deep/a.one", "deep/b"):
        write(root / "wet" / f"{name}.jpg")
        write(root / "dry" / f"{name}.png")


def instructpix2pix(root):
    seeds = []
    for prompt in range(20):
        name = f"{prompt:07d}"
        seeds.append([name, ["11", "12"] if prompt == 3 else ["11"]])
        text = {
            "input": f"a cat {prompt}",
            "edit": f"make it {prompt}",
            "output": f"a dog {prompt}",
        }
        write(root / name / "prompt.json", text)
        write(root / name / "metadata.jsonl", b"{}")
        for seed in seeds[-1][1]:
            write(root / name / f"{seed}_0.jpg")
            write(root / name / f"{seed}_1.jpg")
    write(root / "seeds.json", seeds)


def magicbrush(root):
    for split in ("train", "dev", "test"):
        turns = []
        write(root / split / "images" / "139" / "139-input.png")
        for turn in (1, 2):
            turns.append(
                {
                    "input": f"139-output{turn - 1}.png" if turn > 1 else "139-input.png",
                    "mask": f"139-mask{turn}.png",
                    "output": f"139-output{turn}.png",
                    "instruction": f"edit {turn}",
                }
            )
            write(root / split / "images" / "139" / f"139-output{turn}.png")
            write(root / split / "images" / "139" / f"139-mask{turn}.png")
        write(root / split / "edit_sessions.json", {"139": turns})
    captions = {"139-input.png": "a field", "139-output1.png": "a lake"}
    write(root / "test" / "global_descriptions.json", {"139": captions})


TURN = {"input": "139-input.png", "output": "139-output1.png", "instruction": "edit"}


def rain100(root):
    for number in ("001", "002"):
        write(root / "Rain100H" / "rainy" / f"rain-{number}.png")
        write(root / "Rain100H" / f"norain-{number}.png")


def rain1400(root):
    for place, numbers in (("training", (1, 2)), ("testing", (3, 4))):
        for number in numbers:
            write(root / place / "ground_truth" / f"{number}.jpg")
            write(root / place / "rainy_image" / f"{number}_1.jpg")


OPTIONS = {"folders": {"source": "wet", "target": "dry", "task": "derain"}}
TREES = {
    tree.__name__: tree
    for tree in (
        reds,
        gopro,
        rain13k,
        rain100,
        rain1400,
        sidd,
        lol,
        folders,
        instructpix2pix,
        magicbrush,
    )
}


WHOLE_PARTS = (
    "gopro",
    "rain13k",
    "rain100",
    "rain1400",
    "sidd",
    "lol",
)  # in the folders below the root


def opened(kind, root):
    return open_source(kind, root, **OPTIONS.get(kind, {}))


def examples(kind, root):
    return usable(opened(kind, root))


def usable(source):
    """The examples of a source; the first fault is raised."""
    found = [example for chunk in source.chunks() for example in source.read(chunk)]
    for example in found:
        if isinstance(example, Fault):
            raise InputError(example.reason)
    return found


@pytest.fixture(params=TREES)
def kind(request):
    return request.param


@pytest.fixture
def root(kind, tmp_path):
    TREES[kind](tmp_path / "set")
    return tmp_path / "set"


def test_every_kind_has_a_tree_here_and_a_row_in_the_guide():
    guide = (ROOT / "docs" / "data.md").read_text()
    assert {*SOURCES} - {"parquet"} == {*TREES}  # parquet has a file of its own
    assert [kind for kind in SOURCES if f"| `{kind}` |" not in guide] == []


# What every reader does


def test_chunks_are_counted_and_pickled_and_read_to_pairs_that_load(kind, root):
    source = opened(kind, root)
    chunks = source.chunks()
    copied, sent = pickle.loads(pickle.dumps((source, chunks)))
    found = [[*copied.read(chunk)] for chunk in sent]
    flat = [example for some in found for example in some]
    assert len({example.name for example in flat}) == len(flat) > 1
    for example in flat:
        assert [image.size for image in load_example(example)] == [(6, 4), (6, 4)]
        assert example.task and example.source != example.target


def test_order_does_not_hang_on_the_file_system(kind, root, monkeypatch):
    expected = examples(kind, root)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return reversed([*self.entries])

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert examples(kind, root) == expected


def test_what_systems_leave_behind_is_passed_over(kind, root):
    expected = examples(kind, root)
    for folder in [path for path in root.rglob("*") if path.is_dir()] + [root]:
        for name in (".DS_Store", "Thumbs.db", "README.txt", "._1.png", "._1.jpg"):
            write(folder / name, b"x")
        write(folder / "__MACOSX" / "x.png")
    assert examples(kind, root) == expected


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_a_picture_that_is_missing_or_renamed_is_named(kind, root, change):
    for side in ("source", "target"):
        for example in examples(kind, root)[:: len(examples(kind, root)) - 1]:
            path = getattr(example, side)
            away = path.with_name(f"x{path.name}") if change == "renamed" else root.parent / "away"
            path.rename(away)
            with pytest.raises(InputError) as error:
                examples(kind, root)
            names = [str(file) for file in (example.source, example.target, away)]
            assert any(name in str(error.value) for name in names)
            assert "\n" not in str(error.value)
            away.rename(path)


def test_a_truncated_picture_is_named(kind, root):
    example = examples(kind, root)[-1]
    example.target.write_bytes(example.target.read_bytes()[:-40])
    with pytest.raises(InputError, match="damaged picture") as error:
        load_example(examples(kind, root)[-1])
    assert str(error.value).startswith(f"{example.target}: ")


def test_pictures_of_two_sizes_are_refused(kind, root):
    example = examples(kind, root)[0]
    format = "JPEG" if example.target.suffix == ".jpg" else "PNG"
    example.target.write_bytes(encoded(format, size=(6, 5)))
    with pytest.raises(InputError, match=r"is 6 x 4, .* is 6 x 5: a pair must have one size"):
        load_example(examples(kind, root)[0])


def test_wrong_roots_are_refused_with_what_they_hold(kind, root):
    layout = SOURCES[kind].layout
    with pytest.raises(InputError) as error:
        examples(kind, root.parent)
    assert f"{root.parent} is not the root of {kind}, expected {layout}; found set; " in str(
        error.value
    )
    assert f"did you mean {root}?" in str(error.value)
    child = min(path for path in root.iterdir() if path.is_dir())
    if kind not in WHOLE_PARTS:
        with pytest.raises(InputError) as error:
            examples(kind, child)
        assert layout in str(error.value) and str(error.value).endswith(f"did you mean {root}?")
    (root / "empty").mkdir()
    with pytest.raises(InputError, match="; found nothing; did you mean"):
        examples(kind, root / "empty")
    with pytest.raises(InputError, match="nowhere is nothing, expected a folder: "):
        examples(kind, root / "nowhere")


@pytest.mark.parametrize("kind", WHOLE_PARTS)
def test_a_folder_of_whole_parts_is_read_as_in_its_set(kind, root):
    found = {x.name: (x.split, x.group) for x in examples(kind, root)}
    for child in (path for path in root.iterdir() if path.is_dir()):
        part = {x.name: (x.split, x.group) for x in examples(kind, child)}
        assert part and part.items() <= found.items()


def test_docstrings_are_the_layouts_of_errors():
    for kind, reader in SOURCES.items():
        assert reader.layout == " ".join(reader.__doc__.split()).rstrip(".")
        assert reader.name == kind and reader.licence


# Each set


def described(kind, root):
    return {x.name: (x.split, x.group) for x in examples(kind, root)}


@pytest.mark.parametrize("place", [False, True])
def test_reds_is_split_as_published_and_grouped_by_sequence(tmp_path, place):
    reds(tmp_path)
    for folder in [*tmp_path.iterdir()] if place else []:
        split = tmp_path / folder.name.partition("_")[0]
        split.mkdir(exist_ok=True)
        folder.rename(split / folder.name)
    found = described("reds", tmp_path)
    assert [*found][:3] == ["train/000/00000000", "train/000/00000001", "train/001/00000000"]
    assert len(found) == 6
    assert found["train/001/00000000"] == ("train", "train/001")
    assert found["val/000/00000001"] == ("val", "val/000")
    first = examples("reds", tmp_path)[0]
    assert (first.source.parts[-3], first.target.parts[-3]) == ("train_blur", "train_sharp")
    assert first.task == "deblur" and first.instructions == ()


def test_reds_without_one_side_or_sequences_is_refused(tmp_path):
    reds(tmp_path)
    write(tmp_path / "val_blur" / "00000000.png")
    with pytest.raises(
        InputError, match=r"val_blur/00000000\.png does not fit \{group\}/\{\}, expected"
    ):
        examples("reds", tmp_path)
    shutil.rmtree(tmp_path / "val_blur")
    with pytest.raises(InputError, match=r"folder .*val_blur is missing, expected"):
        examples("reds", tmp_path)
    (tmp_path / "val_blur").mkdir()
    with pytest.raises(InputError, match=r"val_blur holds no pictures, expected"):
        examples("reds", tmp_path)


def test_gopro_reads_blur_and_sharp_by_sequence(tmp_path):
    gopro(tmp_path)
    found = described("gopro", tmp_path)
    assert found["train/GOPR0374_11_00/000048"] == ("train", "train/GOPR0374_11_00")
    assert found["test/GOPR0384_11_00/000047"] == ("test", "test/GOPR0384_11_00")
    assert {x.source.parent.name for x in examples("gopro", tmp_path)} == {"blur"}
    shutil.rmtree(tmp_path / "train" / "GOPR0374_11_00" / "sharp")
    with pytest.raises(InputError, match=r"folder .*GOPR0374_11_00/sharp is missing"):
        examples("gopro", tmp_path)


def test_rain13k_groups_by_the_clean_picture(tmp_path):
    rain13k(tmp_path)
    clean = tmp_path / "train/Rain13K/target"
    write(tmp_path / "train/Rain13K/input/3.jpg")
    shutil.copy(clean / "1.jpg", clean / "3.jpg")
    found = described("rain13k", tmp_path)
    groups = [found[f"train/Rain13K/{number}"][1] for number in (1, 2, 3)]
    assert groups[0] == groups[2] != groups[1]
    assert found["test/Test2800/2"][0] == "test" and found["train/Rain13K/2"][0] == "train"
    (tmp_path / "test" / "Rain100H").rename(tmp_path / "test" / "Rain_100H")
    with pytest.raises(InputError, match=r"Rain_100H is no part of it: did you mean Rain100H\?"):
        examples("rain13k", tmp_path)


def test_sidd_groups_by_scene_whatever_the_instance(tmp_path):
    sidd(tmp_path / "small")
    found = described("sidd", tmp_path / "small")
    assert found == {
        "0001_001_S6_00100_00060_3200_L/010": (None, "001"),
        "0006_001_S6_00100_00060_4400_N/010": (None, "001"),
    }
    sidd_medium(tmp_path / "medium")
    found = described("sidd", tmp_path / "medium")
    assert [*found][:2] == [f"0001_001_S6_00100_00060_3200_L/{n}" for n in ("010", "011")]
    assert found["0200_010_GP_01600_03200_5500_N/011"] == (None, "010")
    first = examples("sidd", tmp_path / "medium")[0]
    assert (first.source.name, first.target.name) == ("0001_NOISY_SRGB_010.PNG",) + (
        "0001_GT_SRGB_010.PNG",
    )


def test_sidd_refuses_what_is_not_of_it(tmp_path):
    sidd(tmp_path)
    data = tmp_path / "Data"
    instance = data / "0001_001_S6_00100_00060_3200_L"
    (instance / "GT_SRGB_010.PNG").rename(instance / "GT_010.PNG")
    with pytest.raises(InputError, match=r"NOISY_SRGB_010\.PNG has no target in "):
        examples("sidd", tmp_path)
    shutil.rmtree(instance)
    instance.mkdir()
    with pytest.raises(InputError, match="3200_L holds no pictures"):
        examples("sidd", tmp_path)
    instance.rename(data / "scene one")
    with pytest.raises(InputError, match="scene one is no scene instance"):
        examples("sidd", tmp_path)


def test_lol_is_split_as_published(tmp_path):
    lol(tmp_path)
    found = examples("lol", tmp_path)
    assert [(x.name, x.split) for x in found] == [
        *(("our485/10", "train"), ("our485/2", "train"), ("our485/5", "train")),
        *(("eval15/1", "test"), ("eval15/22", "test")),
    ]
    assert {x.task for x in found} == {"enhance"}
    assert found[0].source.parent.name == "low" and found[0].target.parent.name == "high"


def pictures(root, *names):
    for name in names:
        write(root / name)


def paired(kind, root, **options):
    """Split, source and target of every pair, relative to the root."""
    return [
        (x.split, *(path.relative_to(root).as_posix() for path in (x.source, x.target)))
        for x in usable(open_source(kind, root, **options))
    ]


@pytest.mark.parametrize(
    ("kind", "split", "source", "target"),
    [
        ("rain100", None, "rainy/rain-001.png", "norain-001.png"),
        ("rain100", None, "rain/rain-001.png", "norain/norain-001.png"),
        ("rain100", "test", "Rain100L/rainy/rain-001.png", "Rain100L/norain-001.png"),
        ("rain100", "test", "Rain100H/rainy/rain-001.png", "Rain100H/rainy/norain-001.png"),
        ("rain100", "train", "RainTrainH/rain-1.png", "RainTrainH/norain-1.png"),
        ("lol", "train", "Train/Low/low00001.png", "Train/Normal/normal00001.png"),
        *(
            ("lol", split, f"{kind}/{part}/Low/{low}1.png", f"{kind}/{part}/Normal/{normal}1.png")
            for kind, low, normal in (("Real_captured", "low", "normal"), ("Synthetic", "r", "r"))
            for part, split in (("Train", "train"), ("Test", "test"))
        ),
        ("rain1400", None, "rainy_image/1_14.jpg", "ground_truth/1.jpg"),
        ("rain1400", "test", "Rain1400/rainy_image/1_1.jpg", "Rain1400/ground_truth/1.jpg"),
        ("rain13k", "train", "train/input/1.jpg", "train/target/1.png"),
        ("rain13k", "train", "Rain13K/input/1.jpg", "Rain13K/target/1.jpg"),
        ("reds", "train", "train_blur_jpeg/000/1.jpg", "train_sharp/000/1.png"),
        ("reds", "train", "train/train_blur_jpeg/000/1.jpg", "train/train_sharp/000/1.png"),
        ("gopro", "test", "test/input/GOPR0384_11_00-1.png", "test/target/GOPR0384_11_00-1.png"),
        ("gopro", "train", "train/input/1.png", "train/target/1.png"),
    ],
)
def test_layouts_as_they_are_published(tmp_path, kind, split, source, target):
    pictures(tmp_path, source, target)
    assert paired(kind, tmp_path) == [(split, source, target)]


@pytest.mark.parametrize("place", ["", "Rain13K"])
def test_the_train_folder_of_rain13k_alone_is_read(tmp_path, place):
    pictures(tmp_path, "train/Rain13K/input/1.jpg", "train/Rain13K/target/1.jpg")
    [example] = examples("rain13k", tmp_path / "train" / place)
    assert (example.name, example.split) == ("train/Rain13K/1", "train")


def test_gopro_without_folders_of_sequences_is_grouped_by_them(tmp_path):
    for side in ("input", "target"):
        pictures(
            tmp_path, *(f"train/{side}/{name}.png" for name in ("GOPR1-1", "GOPR1-2", "GO2-1"))
        )
    groups = [example.group for example in examples("gopro", tmp_path)]
    assert groups == ["train/GO2", "train/GOPR1", "train/GOPR1"]


def test_rain1400_gives_one_clean_picture_to_several_rainy_ones(tmp_path):
    rain1400(tmp_path)
    for number, place in ((1, "training"), (2, "training"), (3, "testing"), (4, "testing")):
        pictures(tmp_path, *(f"{place}/rainy_image/{number}_{rain}.jpg" for rain in (2, 14)))
    found = paired("rain1400", tmp_path)
    assert len(found) == 12 and len({target for *_, target in found}) == 4


@pytest.mark.parametrize(
    ("pairs", "source", "target"),
    [
        ("rain-{}.png=norain-{}.png", "wet/rain-1.png", "dry/norain-1.png"),
        ("rain-{}=norain-{}", "wet/deep/RAIN-a.b.jpg", "dry/deep/norain-a.b.PNG"),
        ("{id}_{}.jpg={id}.jpg", "wet/a_b_3.jpg", "dry/a_b.jpg"),
        ("{scene}/blur/{}={scene}/sharp/{}", "wet/s1/blur/7.png", "dry/s1/sharp/7.png"),
        ("{}-{}={}/{}", "wet/s1-7.png", "dry/s1/7.png"),
        ("{x}_{x}={x}", "wet/2_2.png", "dry/2.png"),
        ("{}", "wet/deep/1.png", "dry/deep/1.jpg"),
    ],
)
def test_a_pattern_says_how_names_correspond(tmp_path, pairs, source, target):
    pictures(tmp_path, source, target)
    options = {"source": "wet", "target": "dry", "task": "derain", "pairs": pairs}
    assert paired("folders", tmp_path, **options) == [(None, source, target)]


@pytest.mark.parametrize("clean", [".", "clean"])
def test_a_pattern_separates_pictures_of_one_folder(tmp_path, clean):
    names = [f"{role}-{n}.png" for n in (1, 2) for role in ("rain", f"{clean}/norain")]
    pictures(tmp_path, *names)
    options = {"source": ".", "target": clean, "task": "derain", "pairs": "rain-{}=norain-{}"}
    assert len(paired("folders", tmp_path, **options)) == 2
    pictures(tmp_path, "snow-1.png")
    with pytest.raises(InputError, match=r"snow-1\.png does not fit rain-\{\}=norain-\{\}, expect"):
        paired("folders", tmp_path, **options)
    with pytest.raises(InputError, match=r"1\.png would be its own target: see --pairs"):
        paired("folders", tmp_path, source=".", target=".", task="derain")


def test_a_pattern_can_say_what_stays_together(tmp_path):
    pictures(
        tmp_path, *(f"{side}/{n}.png" for side in ("wet", "dry") for n in ("a-1", "a-2", "b-1"))
    )
    options = {"source": "wet", "target": "dry", "task": "derain", "pairs": "{group}-{}"}
    groups = [x.group for x in usable(open_source("folders", tmp_path, **options))]
    assert groups == ["a", "a", "b"]


@pytest.mark.parametrize("pairs", ["", "a=b", "{}=b", "{}={}={}", "{a=b}", "{a b}={a b}", "}{}"])
def test_patterns_that_pair_nothing_are_refused(tmp_path, pairs):
    folders(tmp_path)
    with pytest.raises(InputError, match="--pairs .*: expected SOURCE=TARGET"):
        open_source("folders", tmp_path, **OPTIONS["folders"], pairs=pairs)


def test_a_pattern_whose_target_knows_more_than_its_source_is_refused(tmp_path):
    folders(tmp_path)
    with pytest.raises(InputError, match="all fields of the target in the source too"):
        open_source("folders", tmp_path, **OPTIONS["folders"], pairs="{id}={id}_{}")


def test_pictures_that_a_list_names_and_the_disk_lacks_are_faults(tmp_path):
    instructpix2pix(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "0000003")
    (tmp_path / "a" / "0000005" / "11_1.jpg").unlink()
    (tmp_path / "a" / "0000006" / "prompt.json").write_text("{")
    magicbrush(tmp_path / "b")
    (tmp_path / "b" / "test" / "images" / "139" / "139-output2.png").unlink()
    shutil.rmtree(tmp_path / "b" / "dev" / "images" / "139")
    for kind, lost in (
        (("instructpix2pix", "a"), ["0000003/11", "0000003/12", "0000005/11", "0000006/11"]),
        (("magicbrush", "b"), ["dev/139-1", "dev/139-2", "test/139-2"]),
    ):
        source = opened(kind[0], tmp_path / kind[1])
        found = [x for chunk in source.chunks() for x in source.read(chunk)]
        assert [x.name for x in found if isinstance(x, Fault)] == lost
        assert len(found) == {"instructpix2pix": 21, "magicbrush": 6}[kind[0]]


@pytest.mark.parametrize("task", ["../../../esc", "a/b", ".hidden", "", "..", "a\nb", "a\0", "-x"])
def test_tasks_that_could_leave_the_folder_are_refused(tmp_path, task):
    with pytest.raises(InputError, match="--task is '.*', expected a name such as derain"):
        open_source("parquet", tmp_path, task=task)


def test_own_folders_pair_by_relative_name_and_ask_for_all_they_need(tmp_path):
    folders(tmp_path)
    found = examples("folders", tmp_path)
    assert [x.name for x in found] == ["a.one", "deep/a.one", "deep/b"]
    assert {(x.task, x.split) for x in found} == {("derain", None)}
    assert found[1].source == tmp_path / "wet/deep/a.one.jpg"
    with pytest.raises(
        InputError, match="folders needs --task NAME: --source NAME and --target NAME, two"
    ):
        open_source("folders", tmp_path, source="wet", target="dry")


def test_a_caption_that_is_no_text_is_a_fault_of_its_pairs(tmp_path):
    magicbrush(tmp_path)
    captions = {"139": {"139-output2.png": 5, "139-unused.png": 5}}
    write(tmp_path / "dev" / "global_descriptions.json", captions)
    found = [x for chunk in opened("magicbrush", tmp_path).chunks() for x in chunk.items]
    [fault] = [x for x in found if isinstance(x, Fault)]
    assert fault.name == "dev/139-2" and "caption of 139-output2.png is 5" in fault.reason


def test_every_lonely_picture_is_a_fault(tmp_path):
    lol(tmp_path)
    for number in (5, 10):
        (tmp_path / "our485" / "high" / f"{number}.png").unlink()
    write(tmp_path / "our485" / "high" / "11.png")
    source = opened("lol", tmp_path)
    [chunk] = source.chunks()
    assert [x.name for x in chunk.items if isinstance(x, Fault)] == [
        "our485/10",
        "our485/5",
        "our485/11.png",
    ]
    low, _, high = (x.reason for x in chunk.items if isinstance(x, Fault))
    assert re.search(r"low/10\.png has no target in .*our485/high: fetch", low)
    assert re.search(r"high/11\.png has no source in .*our485/low: fetch", high)
    found = [x.name for x in source.read(chunk) if not isinstance(x, Fault)]
    assert found == ["our485/2", "eval15/1", "eval15/22"]


def test_two_files_of_one_name_are_refused(tmp_path):
    lol(tmp_path)
    write(tmp_path / "our485" / "low" / "2.jpg")
    with pytest.raises(InputError, match=r"2\.jpg and .*2\.png would be one picture"):
        examples("lol", tmp_path)


def test_upper_case_suffixes_and_any_writing_are_read(tmp_path):
    for name in ("été", "雨", "a b"):
        write(tmp_path / "wet" / f"{name}.PNG")
        write(tmp_path / "dry" / f"{name}.JPeG")
    found = examples("folders", tmp_path)
    assert [x.name for x in found] == ["a b", "été", "雨"]
    assert load_example(found[1])[0].size == (6, 4)


def test_names_that_cannot_be_written_down_are_refused(tmp_path):
    folders(tmp_path)
    for side in ("wet", "dry"):
        write(tmp_path / side / os.fsdecode(b"\xff.png"))
    with pytest.raises(InputError, match="is not valid Unicode text"):
        examples("folders", tmp_path)


def test_instructpix2pix_is_split_by_the_order_of_its_seeds(tmp_path):
    instructpix2pix(tmp_path)
    found = examples("instructpix2pix", tmp_path)
    assert len(found) == 21 and [x.split for x in found].count("train") == 19
    assert {x.split: x.group for x in found[-2:]} == {"val": "0000018", "test": "0000019"}
    pair = found[4]
    assert (pair.name, pair.group, pair.task) == ("0000003/12", "0000003", "edit")
    assert pair.instructions == ("make it 3",)
    assert (pair.source_caption, pair.target_caption) == ("a cat 3", "a dog 3")
    assert (pair.source.name, pair.target.name) == ("12_0.jpg", "12_1.jpg")


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ({}, r"seeds\.json holds a JSON dict, expected a list"),
        ([], r"seeds\.json lists nothing"),
        (
            [["0000000"]],
            r"seeds\.json entry 0 is \['0000000'\], expected \[folder, \[seed, \.\.\.\]\]",
        ),
        ([["0000000", []]], "entry 0 is"),
        ([["0000000", ["11", 11]]], "each seed once"),
        ([["0000000", ["11"]]] * 2, r"seeds\.json lists 0000000 more than once"),
        (
            [["0000000", ["11"]], ["../x", ["11"]]],
            r"\.\./x is missing, .*seeds\.json lists it",
        ),
        ([["0000000", ["../0000001/11"]]], r"11_0\.jpg is missing, seeds\.json lists it"),
    ],
)
def test_bad_seeds_are_refused(tmp_path, seeds, message):
    instructpix2pix(tmp_path)
    write(tmp_path / "seeds.json", seeds)
    with pytest.raises(InputError, match=message):
        examples("instructpix2pix", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"input": "a"}, r"prompt\.json: 'edit' is None, expected a sentence"),
        ({"edit": " "}, "'edit' is ' ', expected a sentence"),
        ({"edit": "half \ud83d"}, "'edit' is not valid Unicode text"),
        ({"edit": "x", "input": 3}, "'input' is 3, expected a sentence"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, text, message):
    instructpix2pix(tmp_path)
    write(tmp_path / "0000002" / "prompt.json", text)
    with pytest.raises(InputError, match=message) as error:
        examples("instructpix2pix", tmp_path)
    assert "0000002/prompt.json" in str(error.value)


def test_magicbrush_keeps_turns_sessions_and_captions(tmp_path):
    magicbrush(tmp_path)
    found = {x.name: x for x in examples("magicbrush", tmp_path)}
    assert [*found] == [
        f"{split}/139-{turn}" for split in ("dev", "test", "train") for turn in (1, 2)
    ]
    assert {x.split for x in found.values()} == {"train", "val", "test"}
    second = found["test/139-2"]
    assert (second.source.name, second.target.name) == ("139-output1.png", "139-output2.png")
    assert (second.instructions, second.group) == (("edit 2",), "139")
    assert (second.source_caption, second.target_caption) == ("a lake", None)
    assert second.origin.endswith("edit_sessions.json: '139' turn 2")


@pytest.mark.parametrize(
    ("sessions", "message"),
    [
        ([], r"edit_sessions\.json holds a JSON list, expected an object"),
        ({}, r"edit_sessions\.json lists nothing"),
        ({"139": []}, r"'139' is \[\], expected a list of turns"),
        ({"139": ["x"]}, r"'139' turn 1 is 'x', expected an object"),
        ({"139": [{"input": "139-input.png"}]}, r"'139' turn 1 'output' is None"),
        ({"../139": [TURN]}, r"images/\.\./139/139-input\.png is missing, .*json: .* lists it"),
    ],
)
def test_bad_sessions_are_refused(tmp_path, sessions, message):
    magicbrush(tmp_path)
    write(tmp_path / "dev" / "edit_sessions.json", sessions)
    with pytest.raises(InputError, match=message):
        examples("magicbrush", tmp_path)


# Options and decoding


def test_unknown_kinds_and_options_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no data set 'goprp'; did you mean gopro\? known here:"):
        open_source("goprp", tmp_path)
    with pytest.raises(InputError, match="reds does not take --task derain: it takes no options"):
        open_source("reds", tmp_path, task="derain")
    with pytest.raises(InputError, match="does not take --source a: it takes --columns, --task"):
        open_source("parquet", tmp_path, source="a")


def test_decompression_bombs_are_refused(tmp_path):
    lol(tmp_path)
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    bomb = tmp_path / "eval15" / "low" / "22.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + PNG[33:])
    with pytest.raises(InputError, match="400000000 pixels") as error:
        load_example(examples("lol", tmp_path)[-1])
    assert str(bomb) in str(error.value)


def test_links_to_sets_elsewhere_are_followed_and_loops_end(tmp_path):
    lol(tmp_path / "disk")
    (tmp_path / "set").mkdir()
    for name in ("our485", "eval15"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "disk" / name)
    assert len(examples("lol", tmp_path / "set")) == 5
    (tmp_path / "disk" / "eval15" / "low" / "loop").symlink_to(tmp_path / "disk" / "eval15" / "low")
    assert len(examples("lol", tmp_path / "set")) == 5
