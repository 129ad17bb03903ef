"""Published benchmarks of edits that are measured: readers and protocols (layer 4).

Layouts and protocols are those of the sets' own scripts (OSU-NLP-Group/MagicBrush
evaluation/image_eval.py, cure-lab/PnPInversion evaluation/evaluate.py, timothybrooks/
instruct-pix2pix metrics/compute_metrics.py).
"""

from functools import partial
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch

from ipx2p.data.published.edit_sets import InstructPix2Pix, MagicBrush
from ipx2p.data.published.parquet import Parquet
from ipx2p.data.published.source import Chunk, Fault, caption, sentence
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import SIDE, Protocol, entries, extract, usable
from ipx2p.eval.cases import Case
from ipx2p.files import read_json
from ipx2p.seeds import generator

PIE_TYPES = (
    *("random", "change object", "add object", "delete object", "change content"),
    *("change pose", "change color", "change material", "change background", "change style"),
)


def read_magicbrush(
    folder: Path, extracted: Path, *, captions: str, iterative: bool = False
) -> list[Case]:
    """The test turns of MagicBrush.

    captions: "local" or "global". Local ones describe what was edited and not the picture, so that
    there is none of the source. iterative: each turn edits the result of the turn before, and the
    last one is measured; the source of all is the picture that the session began with, and only
    the last has a target. Otherwise each turn edits its true source.
    """
    if folder.name == "test" and (folder / "edit_sessions.json").is_file():
        folder = folder.parent
    source = MagicBrush(folder, {})
    source.check_root()
    file = f"{captions}_descriptions.json"
    if not (folder / "test" / file).is_file():
        raise InputError(
            f"{folder / 'test' / file} is missing: it comes in test.zip with the pictures, and not "
            "with the set on the Hugging Face hub"
        )
    cases = []
    turns = usable(source.examples("test", file))
    for session, group in groupby(turns, key=attrgetter("group")):
        chain = [*group]
        for number, turn in enumerate(chain, 1):
            begin = chain[0] if iterative else turn
            if turn.target_caption is None:
                raise InputError(f"{folder / 'test' / file} has no caption of {turn.target.name}")
            said = ("" if captions == "local" else begin.source_caption or "", turn.target_caption)
            measured = not iterative or turn is chain[-1]
            place = "1" if number == 1 else f"{'iter' if iterative else 'inde'}_{number}"
            results = (f"{session}_{place}", f"{session}-output{number}")  # also the set's targets
            cases.append(
                Case(
                    f"{session}-{number}",
                    begin.source,
                    turn.instructions[0],
                    target=turn.target if measured else None,
                    captions=said if measured else None,
                    group=session,
                    after=f"{session}-{number - 1}" if iterative and number > 1 else None,
                    is_step=not measured,
                    results=tuple(f"{session}/{result}.png" for result in results),
                )
            )
    return cases


class EmuEdit(Parquet):
    """data/test-00000-of-00003-*.parquet and data/validation-*.parquet with the columns image,
    instruction, input_caption, output_caption, task, hash (facebook/emu_edit_test_set), or with
    edited_image and idx too (facebook/emu_edit_test_set_generations).
    """

    name = "emu-edit"


def read_emu_edit(
    folder: Path, extracted: Path, *, split: str, drop_equal: bool = False
) -> list[Case]:
    """A split of Emu Edit's test set, called as in the test set itself; it has no targets.

    In the set with the generations the two splits have each other's names.
    drop_equal: leave out rows whose two captions are equal.
    """
    source = EmuEdit(folder, {})
    kinds = dict.fromkeys(("instruction", "input_caption", "output_caption"), "sentence")
    kinds |= {"image": "picture", "task": "sentence", "hash": "cell", "idx": "cell"}
    other = {"test": "validation", "validation": "test"}[split]
    first = next(source.rows(split, {"image": "picture"}), None)
    found = source.rows(other if first and "edited_image" in first[1] else split, kinds)
    cases = []
    for where, _, row in found:
        said = (row["input_caption"], row["output_caption"])
        if drop_equal and said[0].strip() == said[1].strip():
            continue
        names = [str(row[name]) for name in ("idx", "hash") if row[name] is not None]
        if not names:
            raise InputError(f"{where} has neither idx nor hash, by which results are named")
        path = extract(row["image"], extracted, where)
        results = tuple(f"{name}.png" for name in names)
        cases.append(
            Case(names[0], path, row["instruction"], row["task"], captions=said, results=results)
        )
    return cases


def read_pie(folder: Path, extracted: Path) -> list[Case]:
    """PIE-Bench: mapping_file.json beside annotation_images; it has no targets."""
    path, pictures = folder / "mapping_file.json", folder / "annotation_images"
    if not pictures.is_dir():
        raise InputError(f"{pictures} is missing: expected it beside {path.name}, as in data.zip")
    return [_pie_case(*entry, pictures) for entry in entries(path)]


def _pie_case(key: str, item: dict[str, Any], where: str, pictures: Path) -> Case:
    file = sentence(item.get("image_path"), f"{where} 'image_path'")
    if not (pictures / file).is_file():
        raise InputError(f"{pictures / file} is missing, {where} lists it")
    mask, kind = item.get("mask"), str(item.get("editing_type_id"))
    is_mask = isinstance(mask, list) and len(mask) % 2 == 0
    if not is_mask or not all(type(n) is int and 0 <= n <= SIDE**2 for n in mask):
        raise InputError(
            f"{where} 'mask' is {mask!a:.60}, expected pairs of start and length in 0..{SIDE**2}"
        )
    if kind not in map(str, range(len(PIE_TYPES))):
        raise InputError(f"{where} 'editing_type_id' is {kind!a:.80}, expected 0..9")
    prompts = [
        (caption(item.get(name), f"{where} {name!r}") or "").replace("[", "").replace("]", "")
        for name in ("original_prompt", "editing_prompt")
    ]
    return Case(
        key,
        pictures / file,
        sentence(item.get("editing_instruction"), f"{where} 'editing_instruction'"),
        PIE_TYPES[int(kind)],
        captions=(prompts[0], prompts[1]),
        mask=tuple(mask),
        results=(f"annotation_images/{file}", file),
    )


def read_instructpix2pix(folder: Path, extracted: Path) -> list[Case]:
    """The test prompts of InstructPix2Pix, of each one pair, always the same."""
    source = InstructPix2Pix(folder, {})
    items = [item for chunk in source.chunks() for item in chunk.items]
    prompts = [entry[0] for entry in read_json(folder / "seeds.json", list)]
    test = {*prompts[len(prompts) * 95 // 100 :]}
    faults = (item for item in items if isinstance(item, Fault))
    usable(fault for fault in faults if fault.name.partition("/")[0] in test)
    items = [item for item in items if not isinstance(item, Fault) and item[2] == "test"]
    drawn = []
    for prompt, some in groupby(items, key=itemgetter(0)):
        pairs = [*some]
        place = torch.randint(len(pairs), (), generator=generator(0, f"pair of {prompt}"))
        drawn.append(pairs[place])
    return [
        Case(
            pair.name.replace("/", "-"),
            pair.source,
            pair.instructions[0],
            target=pair.target,
            captions=(pair.source_caption or "", pair.target_caption or ""),
            group=pair.group,
            results=(f"{pair.name}_1.jpg",),
        )
        for pair in usable(source.read(Chunk(tuple(drawn), "test")))
    ]


_B32_S16 = "Networks of the protocol: openai/clip-vit-base-patch32 and facebook/dino-vits16."
_MAGICBRUSH = (
    _B32_S16,
    "Returning the picture unchanged scores well on L1, CLIP-I and DINO: read every row against "
    "the identity row.",
    "Pixels are compared after Pillow's bicubic resize to the target; CLIP and DINO see each "
    "picture at its own size.",
)
_GLOBAL = (
    "CLIP-T with global captions is not that of the paper, which took local ones (MagicBrush#17); "
    "the other four numbers are those of the protocol without -global, whose rows hold for them."
)
_EMU = (
    "There are no targets: CLIP-im, L1 and DINO compare with the input, L1 here in % (0.121 is "
    "12.1), and all of them are best for a picture that is returned unchanged.",
    "In facebook/emu_edit_test_set_generations the files called validation are the test split "
    "(3589 rows) and those called test the validation split (2022); both sets are read by content.",
)


def _magicbrush(name: str, *notes: str, iterative: bool = False, captions: str) -> Protocol:
    how = "the last turn, edited from its own earlier results" if iterative else "every turn alone"
    return Protocol(
        name,
        f"MagicBrush test, {how}; CLIP-T with {captions} captions",
        partial(read_magicbrush, captions=captions, iterative=iterative),
        ("l1", "l2", "clip_image_target", "dino", "clip_text"),
        notes=(*_MAGICBRUSH, *notes),
    )


def _emu(name: str, split: str) -> Protocol:
    return Protocol(
        name,
        f"Emu Edit, the {split} split, all rows",
        partial(read_emu_edit, split=split),
        ("clip_direction", "clip_image", "clip_text", "change", "dino_source"),
        notes=(
            _B32_S16,
            *_EMU,
            "Which CLIP and which split gave these rows is not said; ViT-L/14 gives 0.22 where "
            "ViT-B/32 gives 0.28 for the same pictures (ICEdit#69).",
        ),
    )


EDIT_SETS = (
    _magicbrush("magicbrush", captions="local"),
    _magicbrush("magicbrush-multi-turn", iterative=True, captions="local"),
    _magicbrush("magicbrush-global", _GLOBAL, captions="global"),
    _magicbrush("magicbrush-multi-turn-global", _GLOBAL, iterative=True, captions="global"),
    _emu("emu-edit", "test"),
    _emu("emu-edit-validation", "validation"),
    Protocol(
        "emu-edit-icedit",
        "Emu Edit, the test split without rows whose captions are equal, with ViT-L/14, as ICEdit",
        partial(read_emu_edit, split="test", drop_equal=True),
        ("clip_image", "clip_text", "dino_source"),
        notes=(
            "Networks of the protocol: openai/clip-vit-large-patch14 and facebook/dino-vits16.",
            *_EMU,
            "Its authors name the CLIP model and the filter (ICEdit#69), but not the split.",
        ),
    ),
    Protocol(
        "pie-bench",
        "PIE-Bench: structure, what is kept outside the mask, and CLIP-T",
        read_pie,
        (
            *("dino_structure", "background_psnr", "background_lpips", "background_mse"),
            *("background_ssim", "clip_text", "clip_text_edited"),
        ),
        notes=(
            "Networks of the protocol: openai/clip-vit-large-patch14 and facebook/dino-vitb8.",
            "Published x 1e3 for structure and LPIPS, x 1e4 for MSE, x 100 for SSIM and CLIP.",
            "Both pictures are multiplied by the mask and then compared whole: what is masked "
            "counts as equal, which flatters, the more so the larger the mask. Where the mask is "
            "the whole picture there is no background, and no number.",
            "The border of one pixel always counts as edited. LPIPS is that of SqueezeNet. The "
            "published structure distance feeds 0..255 to a normalisation made for 0..1: see "
            "--paper-compat.",
        ),
    ),
    Protocol(
        "instructpix2pix",
        "InstructPix2Pix, CLIP curves: one pair of each test prompt, image guidance 1.0 to 2.2",
        read_instructpix2pix,
        ("clip_image", "clip_direction"),
        preprocessing="square",
        notes=(
            "Network of the protocol: openai/clip-vit-large-patch14.",
            "Published as curves only (arXiv:2211.09800, fig. 8), of 5000 drawn pairs. The "
            "script behind them feeds [-1, 1] where CLIP's wrapper expects [0, 1]: curves "
            "without --paper-compat lie elsewhere.",
        ),
        preset={
            "guidance_scale": (7.5,),
            "image_guidance_scale": (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2),
            "num_steps": (100,),
            "resolution": 512,
            "limit": 5000,
        },
    ),
)
