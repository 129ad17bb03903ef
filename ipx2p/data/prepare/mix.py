"""Mix data sets into one, by task, and choose pairs by their fields (layer 2).

The new manifests name the pictures where they are. A hash of each pair decides which ones are
taken, so a larger count includes the smaller one, wherever the sets lie.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipx2p import __version__
from ipx2p.data.manifest import SPLITS, Line, Record, read_lines
from ipx2p.data.prepare.dataset import (
    DATASET,
    WORK,
    claim,
    is_finished,
    summary,
    write_manifests,
)
from ipx2p.data.prepare.splits import hash_share
from ipx2p.data.prepare.where import Where
from ipx2p.data.workers import run_all
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes, read_json, write_json

# Pairs of each task in "Instruction-tuning Stable Diffusion with InstructPix2Pix" (2023), table 2.
BLOG = {"deblur": 1200, "derain": 686, "denoise": 8, "enhance": 23}


class Candidate(NamedTuple):
    """A pair of an input: its line there, and its record with paths that hold from the output."""

    line: Line
    record: Record

    @property
    def task(self) -> str:
        return self.record.task

    @property
    def group(self) -> str:
        """Its source picture or scene."""
        return self.record.group or self.record.source

    @property
    def identity(self) -> str:
        """What it is, wherever the set lies."""
        pair = self.line.record
        return json.dumps([pair.task, pair.group, pair.source, pair.instruction])


def mix(
    inputs: Sequence[Path],
    output: Path,
    *,
    seed: int,
    preset: str | None = None,
    counts: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    where: str | None = None,
    workers: int = 0,
    licence: str = "",
) -> None:
    """Write manifests of some pairs of each task; preset, counts or weights say how many, else all.

    They apply to training pairs; those for validation and tests are all taken. A source picture (a
    group) that is in several splits of the inputs stays in one: in the tests rather than in
    validation, in validation rather than in training.

    Args:
        inputs: data sets (folders with train.jsonl and so on), or manifests to train on.
        preset: `blog` (the counts of `BLOG`) or `balanced` (as many of each task as the smallest
            has).
        weights: shares of the tasks; as many pairs are taken as they allow.
        where: a condition on the pairs of every split, see `Where`.
    Raises: InputError if there are too few pairs of a task, or none, and for a bad condition.
    """
    holds = Where(where) if where else None
    output, inputs = output.resolve(), [path.resolve() for path in inputs]
    plan = {
        "recipe": "mix",
        "seed": seed,
        "settings": {"preset": preset, "counts": counts, "weights": weights}
        | ({"where": where} if where else {}),
        "inputs": [_describe(path, output) for path in inputs],
        "licence": licence or "as the inputs",
    }
    if is_finished(output, plan):
        print(f"{output} is finished: {summary(read_json(output / DATASET))}")
        return
    found = {split: _read_split(inputs, split, output) for split in SPLITS}
    if not found["train"]:
        raise InputError(f"{', '.join(map(str, inputs))}: there is nothing to train on")
    pairs, left_out = _keep_apart(found)
    results = {"left_out": left_out}
    if holds:
        pairs, results["where"] = _choose(pairs, holds, workers)
    train = defaultdict(list)
    for pair in pairs["train"]:
        train[pair.task].append(pair)
    wanted = _wanted({task: len(of) for task, of in train.items()}, preset, counts, weights)
    chosen = [
        pair
        for task in sorted(wanted)
        for pair in sorted(train[task], key=lambda x: hash_share(seed, x.identity))[: wanted[task]]
    ]
    written = {"train": sorted(chosen, key=lambda x: hash_share(seed, "order", x.identity))}
    written |= {split: [x for x in pairs[split] if x.task in wanted] for split in SPLITS[1:]}
    with claim(output, plan):
        records = {split: [x.record for x in of_split] for split, of_split in written.items()}
        results = write_manifests(output, records) | results
        dataset = {**plan, **results, "versions": {"ipx2p": __version__}}
        write_json(dataset, output / DATASET)
        is_finished(output, plan)  # which removes what was there to begin with
    print(f"{output}: {summary(dataset)}")
    if left_out:
        print(f"{left_out} pairs left out, whose pictures are in another split")
    for task, n in dataset.get("where", {}).items():
        print(f"--where kept {n['kept']} and left out {n['left_out']} pairs of {task}")


def _read_split(inputs: Sequence[Path], split: str, output: Path) -> list[Candidate]:
    """The pairs of a split of all inputs, each once."""
    found: dict[str, Candidate] = {}
    for path in inputs:
        manifest = path / f"{split}.jsonl" if path.is_dir() else path
        if manifest.exists() if path.is_dir() else split == "train":
            for line in read_lines(manifest):
                names = []
                for picture in line.pictures:
                    if not picture.exists():
                        raise InputError(
                            f"{line.where}: {picture} does not exist: run `prepare check` on it"
                        )
                    names.append(Path(os.path.relpath(picture, output)).as_posix())
                line = line._replace(record=line.record._replace(split=split))
                record = line.record._replace(source=names[0], target=names[1])
                found.setdefault(record.line(), Candidate(line, record))
    return [*found.values()]


def _keep_apart(
    found: Mapping[str, Sequence[Candidate]],
) -> tuple[dict[str, list[Candidate]], int]:
    """The pairs with every group in one split, and how many are lost by that."""
    owner: dict[str, str] = {}
    for split in ("test", "val", "train"):
        for pair in found[split]:
            owner.setdefault(pair.group, split)
    kept = {split: [x for x in pairs if owner[x.group] == split] for split, pairs in found.items()}
    return kept, sum(map(len, found.values())) - sum(map(len, kept.values()))


def _choose(
    found: Mapping[str, Sequence[Candidate]], where: Where, workers: int
) -> tuple[dict[str, list[Candidate]], dict[str, dict[str, int]]]:
    """The pairs that fulfil a condition, and how many of each task do and do not."""
    pairs = [pair for split in SPLITS for pair in found[split]]
    lines = [pair.line for pair in pairs]
    answers = [*run_all(where, lines, workers=workers, about="--where")]
    counts = {task: {"kept": 0, "left_out": 0} for task in sorted({pair.task for pair in pairs})}
    kept: dict[str, list[Candidate]] = {split: [] for split in SPLITS}
    for pair, is_kept in zip(pairs, answers, strict=True):
        counts[pair.task]["kept" if is_kept else "left_out"] += 1
        if is_kept:
            kept[pair.record.split].append(pair)
    if not kept["train"]:
        raise InputError(f"--where {where.text!r} leaves none of {len(pairs)} pairs to train on")
    return kept, counts


def _wanted(
    there: Mapping[str, int],
    preset: str | None,
    counts: Mapping[str, int] | None,
    weights: Mapping[str, float] | None,
) -> dict[str, int]:
    """How many pairs to take of each task."""
    if not (preset or counts or weights):
        return dict(there)
    if preset == "balanced":
        return dict.fromkeys(there, min(there.values(), default=0))
    asked: Mapping[str, float] = BLOG if preset == "blog" else counts or weights or {}
    for task, number in asked.items():
        if task not in there:
            near = suggestion(task, [*there])
            raise InputError(f"there are no pairs to train on of {task!r}; {near}")
        if not 0 < number < float("inf"):
            raise InputError(f"{task}={number}: expected a number above 0")
    if weights:
        scale = min(there[task] / weight for task, weight in weights.items())
        return {task: max(1, int(scale * weight + 1e-9)) for task, weight in weights.items()}
    if short := {task: n for task, n in asked.items() if n > there[task]}:
        wants = ", ".join(f"{n} of {task} (there are {there[task]})" for task, n in short.items())
        raise InputError(f"too few pairs for {wants}: prepare more, or take fewer with --counts")
    return {task: int(number) for task, number in asked.items()}


def _describe(path: Path, output: Path) -> dict[str, Any]:
    """An input's path and the digests of its manifests. InputError if it is not a data set."""
    if not path.exists():
        raise InputError(f"{path} does not exist, expected a data set or a manifest")
    files = [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]
    digests = {file.name: digest_bytes(file.read_bytes()) for file in files if file.exists()}
    if not digests:
        raise InputError(f"{path} holds no {', '.join(file.name for file in files)}")
    if (path / WORK).exists():
        raise InputError(f"{path} is not finished: run its recipe again")
    return {"path": Path(os.path.relpath(path, output)).as_posix(), "manifests": digests}
