"""Readers of published sets of edits: InstructPix2Pix and MagicBrush (layer 2).

One class for each set; its docstring is the layout, and errors print it. Splits and groups are
those of the publication: what one scene, sequence or source picture gave stays together.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ipx2p.data.listing import scan
from ipx2p.data.published.source import (
    PAIRS,
    SPLITS,
    Chunk,
    Example,
    Fault,
    Source,
    attempt,
    caption,
    chunk_key,
    chunked,
    few,
    sentence,
    subfolders,
)
from ipx2p.errors import InputError
from ipx2p.files import read_json


class InstructPix2Pix(Source):
    """seeds.json with [["0000000", ["123", ...]], ...] (90 % of the prompts for training, then 5 %
    for validation and 5 % for testing), 0000000/prompt.json with input, edit and output, and the
    pictures 0000000/123_0.jpg and 0000000/123_1.jpg.
    """

    name = "instructpix2pix"

    def fits(self, folder: Path) -> bool:
        return (folder / "seeds.json").is_file()

    def chunks(self) -> list[Chunk]:
        """Missing prompts become faults here, missing files of a prompt in `read`: looking into
        some 300,000 folders takes long on a network.
        """
        self.check_root()
        path = self.folder / "seeds.json"
        entries = [
            _seeds(entry, f"{path} entry {i}") for i, entry in enumerate(read_json(path, list))
        ]
        self.check_any(path, entries)
        prompts = [prompt for prompt, _ in entries]
        if twice := [prompt for prompt, count in Counter(prompts).items() if count > 1]:
            raise InputError(f"{path} lists {few(twice)} more than once")
        train, val = (len(entries) * share // 100 for share in (90, 95))
        splits = ["train"] * train + ["val"] * (val - train) + ["test"] * (len(entries) - val)
        lines = [(*entry, split) for entry, split in zip(entries, splits, strict=True)]
        there = {*subfolders(self.folder)}

        def item(prompt: str, seed: str, split: str) -> tuple[str, ...] | Fault:
            if prompt in there:
                return prompt, seed, split
            return Fault(f"{prompt}/{seed}", f"{self.folder}/{prompt} is missing, {path} lists it")

        return [
            Chunk(
                tuple(item(prompt, seed, split) for prompt, seeds, split in some for seed in seeds),
                chunk_key([f"{split} {prompt} {seeds}" for prompt, seeds, split in some]),
            )
            for some in (lines[i : i + PAIRS // 2] for i in range(0, len(lines), PAIRS // 2))
        ]

    def read(self, chunk: Chunk) -> Iterator[Example | Fault]:
        for item in chunk.items:
            if isinstance(item, Fault):
                yield item
            else:
                yield attempt("/".join(item[:2]), partial(self._example, *item))

    def _example(self, prompt: str, seed: str, split: str) -> Example:
        folder = self.folder / prompt
        path = folder / "prompt.json"
        text = read_json(path)
        edit = sentence(text.get("edit"), f"{path}: 'edit'")
        captions = [caption(text.get(key), f"{path}: {key!r}") for key in ("input", "output")]
        pictures = _pictures(folder, [f"{seed}_0.jpg", f"{seed}_1.jpg"], scan(folder), "seeds.json")
        name = f"{prompt}/{seed}"
        return Example(name, *pictures, (edit,), "edit", split, prompt, *captions, str(path))


def _seeds(entry: Any, where: str) -> tuple[str, tuple[str, ...]]:
    match entry:
        case [str(prompt), [_, *_] as seeds] if all(isinstance(s, str | int) for s in seeds):
            if len({*map(str, seeds)}) == len(seeds):
                return prompt, tuple(map(str, seeds))
    raise InputError(f"{where} is {entry!a:.80}, expected [folder, [seed, ...]], each seed once")


class MagicBrush(Source):
    """train/edit_sessions.json with {"139": [{"input": "139-input.png", "output":
    "139-output1.png", "instruction": ...}, ...], ...} and train/images/139/139-input.png, and dev
    (or val) and test likewise; global_descriptions.json beside it gives captions where it exists.
    """

    name = "magicbrush"
    licence = "CC BY 4.0; its authors ask that the test split is never trained on or spread"

    def fits(self, folder: Path) -> bool:
        return any((folder / split / "edit_sessions.json").is_file() for split in SPLITS)

    def chunks(self) -> list[Chunk]:
        self.check_root()
        found = [split for split in subfolders(self.folder) if split in SPLITS]
        return chunked([x for split in found for x in self.examples(split)])

    def examples(
        self, split: str, captions_file: str = "global_descriptions.json"
    ) -> Iterator[Example | Fault]:
        """The turns of a split in order, named SPLIT/SESSION-TURN; the session is their group."""
        root = self.folder / split
        path = root / "edit_sessions.json"
        sessions = read_json(path)
        self.check_any(path, sessions)
        captions = _captions(root / captions_file)
        there = {*subfolders(root / "images")}
        for image, turns in sorted(sessions.items()):
            if not isinstance(turns, list) or not turns:
                raise InputError(f"{path}: {image!r} is {turns!a:.80}, expected a list of turns")
            folder = root / "images" / image
            present = scan(folder) if image in there else ()
            for number, turn in enumerate(turns, 1):
                name, where = f"{split}/{image}-{number}", f"{path}: {image!r} turn {number}"
                read = partial(self._turn, name, where, turn, folder, present, captions)
                yield attempt(name, read)

    def _turn(
        self,
        name: str,
        where: str,
        turn: Any,
        folder: Path,
        present: Collection[str],
        captions: dict[tuple[str, str], Any],
    ) -> Example:
        if not isinstance(turn, dict):
            raise InputError(f"{where} is {turn!a:.80}, expected an object")
        files = [sentence(turn.get(key), f"{where} {key!r}") for key in ("input", "output")]
        instruction = sentence(turn.get("instruction"), f"{where} 'instruction'")
        pictures = _pictures(folder, files, present, where)
        split, image = SPLITS[name.partition("/")[0]], folder.name
        said = [caption(captions.get((image, x)), f"{where}, caption of {x}") for x in files]
        return Example(name, *pictures, (instruction,), "edit", split, image, *said, where)


def _captions(path: Path) -> dict[tuple[str, str], Any]:
    """What the pictures of MagicBrush show, by image and file name."""
    captions = {}
    for image, texts in (read_json(path) if path.exists() else {}).items():
        if not isinstance(texts, dict):
            raise InputError(f"{path}: {image!r} is {texts!a:.80}, expected an object")
        for file, text in texts.items():
            captions[image, file] = text
    return captions


def _pictures(
    folder: Path, files: list[str], present: Collection[str], lister: object
) -> list[Path]:
    """The paths of some files of a folder. InputError names one that is not among those present."""
    for file in files:
        if file not in present:
            raise InputError(f"{folder / file} is missing, {lister} lists it")
    return [folder / file for file in files]
