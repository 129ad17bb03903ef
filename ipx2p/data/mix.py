"""Mix data sets into one, by task (layer 2).

The new manifests name the pictures where they are. Which pairs are taken is decided by a hash of
each, so more of a task always includes the fewer, and the order of the inputs does not matter.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipx2p import __version__
from ipx2p.data.dataset import (
    DATASET,
    SPLITS,
    digest_bytes,
    read_lines,
    summary,
    write_manifests,
)
from ipx2p.data.manifest import parse
from ipx2p.data.splits import hash_share
from ipx2p.errors import InputError, suggestion
from ipx2p.files import check_writable, write_json

# Pairs of each task in "Instruction-tuning Stable Diffusion with InstructPix2Pix" (2023), table 2.
BLOG = {"deblur": 1200, "derain": 686, "denoise": 8, "enhance": 23}


@dataclass(frozen=True)
class Line:
    """A pair of an input, as it is to be written: paths relative to the new manifest."""

    text: str
    task: str
    group: str


def mix(
    inputs: Sequence[Path],
    output: Path,
    *,
    seed: int,
    preset: str | None = None,
    counts: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    licence: str = "",
) -> None:
    """Write manifests of some pairs of each task; one of preset, counts and weights says how many.

    Only training pairs are counted out; those for validation and tests are all taken. A training
    pair whose source picture (its group) is in another split of any input is left out.

    Args:
        inputs: data sets (folders with train.jsonl and so on), or manifests to train on.
        preset: `blog` (the counts of `BLOG`) or `balanced` (of each task as many as of the
            smallest).
        weights: shares of the tasks; as many pairs are taken as they allow.
    Raises: InputError when there are fewer pairs of a task than asked for, or an unknown task.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there and holds something: choose a new folder")
    lines = {split: _read_split(inputs, split, output) for split in SPLITS}
    if not lines["train"]:
        raise InputError(f"{', '.join(map(str, inputs))}: there is nothing to train on")
    seen = {line.group for split in SPLITS[1:] for line in lines[split]}
    train = defaultdict(list)
    for line in lines["train"]:
        train[line.task] += [] if line.group in seen else [line]
    wanted = _wanted({task: len(of) for task, of in train.items()}, preset, counts, weights)
    chosen = [
        line
        for task in sorted(wanted)
        for line in sorted(train[task], key=lambda x: hash_share(seed, x.text))[: wanted[task]]
    ]
    written = {"train": sorted(chosen, key=lambda x: hash_share(seed, "order", x.text))}
    written |= {split: [x for x in lines[split] if x.task in wanted] for split in SPLITS[1:]}
    check_writable(output)
    manifests = {split: [(x.task, x.text) for x in of_split] for split, of_split in written.items()}
    dataset = {
        "recipe": "mix",
        "seed": seed,
        "settings": {"preset": preset, "counts": counts, "weights": weights},
        "inputs": [_describe(path, output) for path in inputs],
        **write_manifests(output, manifests),
        "left_out": sum(line.group in seen for line in lines["train"]),
        "licence": licence or "as the inputs",
        "versions": {"ipx2p": __version__},
    }
    write_json(dataset, output / DATASET)
    print(f"{output}: {summary(dataset)}")
    if dataset["left_out"]:
        print(f"{dataset['left_out']} training pairs left out: their pictures are validated on")


def _read_split(inputs: Sequence[Path], split: str, output: Path) -> list[Line]:
    lines = []
    for path in inputs:
        if path.is_dir():
            manifest = path / f"{split}.jsonl"
            if not any((path / f"{name}.jsonl").exists() for name in SPLITS):
                raise InputError(f"{path} holds no train.jsonl, val.jsonl or test.jsonl")
            if (path / ".work").exists():
                raise InputError(f"{path} is not finished: run its recipe again")
        elif split == "train":
            manifest = path
        else:
            continue
        if manifest.exists() or path == manifest:
            lines += [_line(manifest, *line, output) for line in read_lines(manifest)]
    return lines


def _line(manifest: Path, number: int, text: str, output: Path) -> Line:
    """A pair of another manifest with paths that hold from `output` on."""
    try:
        record = parse(text)
    except InputError as error:
        raise InputError(f"{manifest} line {number}{error}") from None
    values = json.loads(text) | {
        role: Path(os.path.relpath(manifest.parent / name, output)).as_posix()
        for role, name in (("source", record.source), ("target", record.target))
    }
    group = values.get("group") or values["source"]
    return Line(json.dumps(values, ensure_ascii=False), record.task, group)


def _wanted(
    there: Mapping[str, int],
    preset: str | None,
    counts: Mapping[str, int] | None,
    weights: Mapping[str, float] | None,
) -> dict[str, int]:
    """How many pairs to take of each task."""
    if preset == "balanced":
        return dict.fromkeys(there, min(there.values()))
    asked: Mapping[str, float] = BLOG if preset == "blog" else counts or weights or {}
    for task, number in asked.items():
        if task not in there:
            raise InputError(
                f"there are no pairs to train on of {task!r}; {suggestion(task, [*there])}"
            )
        if not 0 < number < float("inf"):
            raise InputError(f"{task}={number}: expected a number above 0")
    if weights:
        scale = min(there[task] / weight for task, weight in weights.items())
        return {task: max(1, int(scale * weight + 1e-9)) for task, weight in weights.items()}
    if short := {task: n for task, n in asked.items() if n > there[task]}:
        wants = ", ".join(f"{n} of {task} (there are {there[task]})" for task, n in short.items())
        raise InputError(f"too few pairs for {wants}: prepare more, or give --counts")
    return {task: int(number) for task, number in asked.items()}


def _describe(path: Path, output: Path) -> dict[str, Any]:
    """An input: where it is, and what its manifests hold."""
    files = [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]
    digests = {file.name: digest_bytes(file.read_bytes()) for file in files if file.exists()}
    return {"path": Path(os.path.relpath(path, output)).as_posix(), "manifests": digests}
