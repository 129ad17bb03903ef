"""Readers of published editing benchmarks, on tiny copies of their layouts as they lie on disk."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import PUBLISHED, read_mask
from ipx2p.eval.benchmarks.registry import PROTOCOLS, read_benchmark
from ipx2p.images import load_image


def encoded(number, size=(12, 8), format="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def magicbrush(root):
    """Sessions of three, one and two turns, with masks, as test.zip unpacks."""
    sessions, local, whole = {}, {}, {}
    for session, turns in (("139", 3), ("30", 1), ("1490", 2)):
        names = [f"{session}-input.png"] + [f"{session}-output{k + 1}.png" for k in range(turns)]
        for number, name in enumerate(names):
            write(root / "test/images" / session / name, encoded(int(session) + number))
            if number:
                mask = name.replace("output", "mask")
                write(root / "test/images" / session / mask, encoded(1))
        sessions[session] = [
            {
                "input": names[k],
                "mask": f"{session}-mask{k + 1}.png",
                "output": names[k + 1],
                "instruction": f"edit {session} {k + 1}",
            }
            for k in range(turns)
        ]
        local[session] = {name: f"local {name}" for name in names[1:]}
        whole[session] = {name: f"global {name}" for name in names}
    write(root / "test/edit_sessions.json", sessions)
    write(root / "test/local_descriptions.json", local)
    write(root / "test/global_descriptions.json", whole)


def emu_row(number, output_caption=None, **more):
    return {
        "instruction": f"edit {number}",
        "image": {"bytes": encoded(number, format="JPEG"), "path": None},
        "task": ("add", "style")[number % 2],
        "split": "test",
        "idx": number,
        "hash": f"{number:032x}",
        "input_caption": f"a cat {number}",
        "output_caption": output_caption or f"a dog {number}",
        **more,
    }


def emu_edit(root):
    rows = [emu_row(n) for n in range(3)] + [emu_row(3, output_caption="a cat 3 ")]
    parquet(root / "data/test-00000-of-00002-64edd860175df28a.parquet", rows[:2])
    parquet(root / "data/test-00001-of-00002-14580e6bdcdb8218.parquet", rows[2:])
    parquet(root / "data/validation-00000-of-00001-640e25945b791daf.parquet", [emu_row(9)])


def generations(root):
    """The same rows with Emu Edit's own pictures; files of either split have the other's name."""
    more = {"edited_image": {"bytes": encoded(77), "path": None}, "model": "emu edit"}
    rows = [emu_row(n, **more) for n in range(3)] + [emu_row(3, "a cat 3 ", **more)]
    parquet(root / "data/validation-00000-of-00001-f1a76252a065f77d.parquet", rows)
    parquet(root / "data/test-00000-of-00001-aa76252a065f77d0.parquet", [emu_row(9, **more)])


def pie(root):
    entries = {}
    for key, folder in (("000000000000", "0_random_140"), ("112000000003", "1_change_object_80")):
        write(root / "annotation_images" / folder / f"{key}.jpg", encoded(1, format="JPEG"))
        entries[key] = {
            "image_path": f"{folder}/{key}.jpg",
            "original_prompt": "a [cat] on a mat",
            "editing_prompt": "a [dog] on a mat",
            "editing_instruction": "Turn the cat into a dog",
            "editing_type_id": folder[0],
            "blended_word": "cat dog",
            "mask": [0, 3, 600, 5, 262100, 900],
        }
    write(root / "mapping_file.json", entries)


def instructpix2pix(root):
    seeds = []
    for prompt in range(40):
        name = f"{prompt:07d}"
        seeds.append([name, [f"{seed}{prompt}" for seed in (1, 2, 3)]])
        text = {"input": f"cat {prompt}", "edit": f"edit {prompt}", "output": f"dog {prompt}"}
        write(root / name / "prompt.json", text)
        for seed in seeds[-1][1]:
            for side in "01":
                write(root / name / f"{seed}_{side}.jpg", encoded(prompt, format="JPEG"))
    write(root / "seeds.json", seeds)


LAYOUTS = {
    "magicbrush": magicbrush,
    "magicbrush-multi-turn": magicbrush,
    "emu-edit": emu_edit,
    "emu-edit-icedit": generations,
    "pie-bench": pie,
    "instructpix2pix": instructpix2pix,
}


@pytest.fixture
def unpacked(tmp_path):
    """Builds a layout the first time, in `root`; reads it as a protocol."""

    def read(name, layout=None):
        if not read.root.exists():
            (layout or LAYOUTS[name])(read.root)
        return read_benchmark(name, read.root, tmp_path / "extracted")

    read.root = tmp_path / "set"
    return read


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_case_can_be_edited_and_knows_its_benchmark(unpacked, name):
    cases = unpacked(name)
    for case in cases:
        case.check()
        assert load_image(case.source).size
        assert case.benchmark == name
        assert case.results
        assert case.after is None or case.after in {other.name for other in cases}


def test_single_turns_start_from_the_true_source(unpacked):
    cases = {case.name: case for case in unpacked("magicbrush")}
    assert len(cases) == 6
    turn = cases["139-2"]
    assert (turn.source.name, turn.target.name) == ("139-output1.png", "139-output2.png")
    assert turn.captions == ("", "local 139-output2.png")
    assert (turn.group, turn.after) == ("139", None)


def test_a_chain_is_measured_at_its_end_against_the_first_picture(unpacked):
    cases = {case.name: case for case in unpacked("magicbrush-multi-turn")}
    chain = [cases[f"139-{k}"] for k in (1, 2, 3)]
    assert [turn.after for turn in chain] == [None, "139-1", "139-2"]
    assert {turn.source.name for turn in chain} == {"139-input.png"}
    assert [turn.target and turn.target.name for turn in chain] == [None, None, "139-output3.png"]
    assert [bool(turn.captions) for turn in chain] == [False, False, True]
    assert cases["30-1"].target.name == "30-output1.png"


def test_global_captions_are_a_protocol_of_their_own(unpacked):
    cases = {case.name: case for case in unpacked("magicbrush-global", magicbrush)}
    assert cases["139-2"].captions == ("global 139-output1.png", "global 139-output2.png")
    assert "not that of the paper" in " ".join(PROTOCOLS["magicbrush-global"].notes)


def official_pairs(generated, images):
    """The pairs of the official script, by the README beside it: (final turn, all turns)."""
    final, every = [], []
    for session in sorted(os.listdir(images)):
        outputs = sorted(name for name in os.listdir(images / session) if "output" in name)
        turns = [f"{session}_1", *(f"{session}_inde_{k}" for k in range(2, len(outputs) + 1))]
        every += zip([f"{session}/{turn}.png" for turn in turns], outputs, strict=True)
        last = f"{session}_iter_{len(outputs)}" if len(outputs) > 1 else f"{session}_1"
        final.append((f"{session}/{last}.png", outputs[-1]))
    assert all((generated / name).is_file() for name, _ in final + every)
    return final, every


def test_results_have_the_names_that_the_official_script_looks_for(unpacked, tmp_path):
    out, expected = tmp_path / "official", {}
    for number, name in enumerate(("magicbrush-multi-turn", "magicbrush")):
        cases = unpacked(name)
        for place, case in enumerate(cases):
            is_first = case.name.endswith("-1")  # which both protocols share
            content = encoded(place if is_first else 1000 * number + place)
            write(out / case.results[0], content)
            if case.target:
                expected.setdefault(name, {})[case.target.name] = content
    final, every = official_pairs(out, unpacked.root / "test/images")
    for name, pairs in (("magicbrush-multi-turn", final), ("magicbrush", every)):
        assert {target: (out / edit).read_bytes() for edit, target in pairs} == expected[name]
    listed = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert listed == {edit for edit, _ in final + every} | {"139/139_iter_2.png"}


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("magicbrush", {"139/139_1.png", "139/139_inde_3.png", "139/139-output3.png"}),
        ("magicbrush-multi-turn", {"139/139_1.png", "139/139_iter_3.png", "139/139-output3.png"}),
    ],
)
def test_all_forms_of_magicbrush_results_are_known(unpacked, name, forms):
    assert forms <= {form for case in unpacked(name) for form in case.results}


def test_the_test_folder_of_magicbrush_will_do(unpacked, tmp_path):
    whole = unpacked("magicbrush")
    assert read_benchmark("magicbrush", unpacked.root / "test", tmp_path) == whole


def test_emu_edit_compares_with_inputs_and_names_results_by_idx(unpacked):
    cases = unpacked("emu-edit")
    assert [case.name for case in cases] == ["0", "1", "2", "3"]
    assert cases[1].captions == ("a cat 1", "a dog 1")
    assert (cases[1].task, cases[1].target) == ("style", None)
    assert cases[1].results[0] == "1.png"
    assert {"change", "clip_image", "dino_source"} <= {*PROTOCOLS["emu-edit"].metrics}


def test_swapped_splits_of_the_generations_are_put_right(tmp_path):
    for layout in (emu_edit, generations):
        layout(tmp_path / layout.__name__)
    read = {
        (layout, name): [
            (case.name, case.instruction, case.source.read_bytes())
            for case in read_benchmark(name, tmp_path / layout, tmp_path / "extracted")
        ]
        for layout in ("emu_edit", "generations")
        for name in ("emu-edit", "emu-edit-validation")
    }
    assert read["emu_edit", "emu-edit"] == read["generations", "emu-edit"]
    assert read["emu_edit", "emu-edit-validation"] == read["generations", "emu-edit-validation"]
    assert len(read["generations", "emu-edit"]) == 4


def test_icedit_drops_rows_whose_captions_are_equal(unpacked):
    assert [case.name for case in unpacked("emu-edit-icedit")] == ["0", "1", "2"]


def test_pictures_of_tables_are_written_once_with_their_own_bytes(unpacked, tmp_path):
    sources = [case.source for case in unpacked("emu-edit")]
    assert sources[0].read_bytes() == encoded(0, format="JPEG")
    times = [path.stat().st_mtime_ns for path in sources]
    assert [case.source for case in unpacked("emu-edit")] == sources
    assert [path.stat().st_mtime_ns for path in sources] == times
    assert len([*(tmp_path / "extracted").iterdir()]) == 4


def test_pie_reads_prompts_without_brackets_and_masks(unpacked):
    first, second = unpacked("pie-bench")
    assert first.captions == ("a cat on a mat", "a dog on a mat")
    assert first.instruction == "Turn the cat into a dog"
    assert (first.task, second.task) == ("random", "change object")
    assert second.results[0] == "annotation_images/1_change_object_80/112000000003.jpg"
    assert first.mask == (0, 3, 600, 5, 262100, 900)


def test_masks_are_runs_over_the_rows_with_a_closed_border():
    inside = np.random.default_rng(0).random(512 * 512) < 0.5
    starts = np.flatnonzero(np.diff(inside.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(inside.astype(int), append=0) == -1) + 1
    pairs = np.stack([starts, ends - starts], axis=1)
    assert starts[-1] > 511 * 512  # in the last row, which is border
    pairs[-1, 1] += 10_000  # beyond the end
    expected = np.pad(inside.reshape(512, 512)[1:-1, 1:-1], 1, constant_values=True)
    assert np.array_equal(read_mask(pairs.ravel().tolist()).numpy() == 1, expected)
    assert read_mask([]).sum() == 4 * 511
    assert torch.equal(read_mask([0, 512 * 512]), torch.ones(512, 512))


def test_a_mask_may_be_a_picture_light_where_it_may_change(tmp_path):
    levels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0, 0, 1, 1]]


def test_instructpix2pix_takes_one_pair_of_each_test_prompt_always_the_same(unpacked):
    cases = unpacked("instructpix2pix")
    assert [case.group for case in cases] == ["0000038", "0000039"]
    assert cases[0].captions == ("cat 38", "dog 38")
    assert (cases[0].source.parent.name, cases[0].target.parent.name) == ("0000038", "0000038")
    assert unpacked("instructpix2pix") == cases
    scales = PROTOCOLS["instructpix2pix"].preset["image_guidance_scale"]
    assert scales == tuple(round(1 + 0.2 * step, 1) for step in range(7))


def test_the_published_value_of_the_oracle_is_known_for_magicbrush():
    for name, value in (("magicbrush", 0.2826), ("magicbrush-multi-turn", 0.2855)):
        [row] = [row for row in PROTOCOLS[name].published if row.model == "oracle"]
        assert row.scores == {"clip_text": value}
        assert "local captions" in row.source


def test_published_rows_have_metrics_of_their_protocol_and_a_source():
    rows = [(row, protocol) for protocol in PROTOCOLS.values() for row in protocol.published]
    assert len(rows) == len(PUBLISHED.read_text().splitlines()) - 1  # none of an unknown benchmark
    for row, protocol in rows:
        assert {*row.scores} <= {*protocol.metrics} and row.source


def remove(path):
    return lambda root: (root / path).unlink()


def rename(path, to):
    return lambda root: (root / path).rename(root / to)


def truncate(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-30])


def change(path, key, **values):
    def damage(root):
        entries = json.loads((root / path).read_text())
        entry = entries[key][0] if isinstance(entries[key], list) else entries[key]
        entry.update(values)
        write(root / path, entries)

    return damage


def without_column(root):
    parquet(root / SHARD, [{"image": b"x"}])


def broken_picture(root):
    shutil.rmtree(root / "data")
    cell = {"bytes": encoded(0)[:50], "path": None}
    parquet(root / "data/test-00000-of-00001.parquet", [emu_row(0) | {"image": cell}])


FIRST = "000000000000"
SHARD = "data/test-00000-of-00002-64edd860175df28a.parquet"
SESSIONS, LOCAL = "test/edit_sessions.json", "test/local_descriptions.json"
MAPPING = "mapping_file.json"
DAMAGE = {
    "a target": ("magicbrush", remove("test/images/139/139-output2.png"), "output2.png is missing"),
    "sessions": ("magicbrush", remove(SESSIONS), "not the root of magicbrush"),
    "half of the sessions": ("magicbrush", truncate(SESSIONS), "not JSON"),
    "captions": ("magicbrush", remove(LOCAL), "comes in test.zip"),
    "captions by another name": ("magicbrush", rename(LOCAL, "test/local.json"), "is missing"),
    "a caption": (
        "magicbrush-multi-turn",
        change(LOCAL, "139", **{"139-output3.png": None}),
        "no caption of 139-output3.png",
    ),
    "a sentence": ("magicbrush", change(SESSIONS, "139", instruction=" "), "expected a sentence"),
    "a shard": ("emu-edit", remove(SHARD), "00000-of-00002.* is missing"),
    "half of a shard": ("emu-edit", truncate(SHARD), "not parquet, or damaged"),
    "the test split": (
        "emu-edit",
        lambda root: [path.unlink() for path in root.glob("data/test*")],
        r"holds no test-\*.parquet",
    ),
    "a column": ("emu-edit", without_column, "no column 'instruction' among image"),
    "half of a picture": ("emu-edit", broken_picture, "row 0"),
    "the mapping": ("pie-bench", remove(MAPPING), "mapping_file.json does not exist"),
    "the pictures": ("pie-bench", rename("annotation_images", "images"), "as in data.zip"),
    "one picture": (
        "pie-bench",
        remove(f"annotation_images/0_random_140/{FIRST}.jpg"),
        f"{FIRST}.jpg is missing",
    ),
    "half of a mask": ("pie-bench", change(MAPPING, FIRST, mask=[1, 2, 3]), "pairs of start"),
    "a type": ("pie-bench", change(MAPPING, FIRST, editing_type_id="10"), "expected 0..9"),
    "an edit": ("pie-bench", change(MAPPING, FIRST, editing_instruction=None), "is None"),
    "a prompt": ("instructpix2pix", lambda root: shutil.rmtree(root / "0000039"), "0000039"),
    "the seeds": ("instructpix2pix", remove("seeds.json"), "not the root of instructpix2pix"),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_missing_or_damaged_part_is_one_clear_line(unpacked, part):
    name, damage, message = DAMAGE[part]
    unpacked(name)
    damage(unpacked.root)
    with pytest.raises(InputError, match=message) as error:
        unpacked(name)
    assert "\n" not in str(error.value)
    assert str(unpacked.root) in str(error.value)
