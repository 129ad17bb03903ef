"""Mix data sets into one, by task, and choose pairs by their fields (layer 2).

The new manifests refer to the pictures in place. A hash of each pair decides which ones are taken,
so a larger count includes a smaller one, wherever the sets are.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipx2p import __version__
from ipx2p.data.manifest import SPLITS, Line, Record, read_lines
from ipx2p.data.prepare.dataset import DATASET, WORK, claim, is_finished, summary, write_manifests
from ipx2p.data.prepare.splits import hash_share
from ipx2p.data.prepare.where import Where
from ipx2p.data.workers import run_all
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes, digest_file, hash_bytes, read_json, write_json

# Pairs of each task in "Instruction-tuning Stable Diffusion with InstructPix2Pix" (2023), table 2.
BLOG = {"deblur": 1200, "derain": 686, "denoise": 8, "enhance": 23}


class Candidate(NamedTuple):
    """A pair of an input: its line there, and its record with paths that hold from the output.

    group: its source picture or scene. identity: the same wherever the set lies.
    """

    line: Line
    record: Record
    group: str
    identity: str


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

    They apply to training pairs; all others are taken. A source picture (a group) or a file in
    several splits of the inputs stays in one: test before validation before training.

    Args:
        inputs: data sets (folders with train.jsonl and so on), or manifests to train on.
        preset: `blog` (the counts of `BLOG`) or `balanced` (as many as of the rarest task).
        weights: shares of the tasks; as many pairs are taken as they allow.
        where: a condition on the pairs of every split, see `Where`.
    Raises: InputError if there are too few pairs of a task, or none, and for a bad condition.
    """
    holds = None if where is None else Where(where)
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
    found = [*_read_inputs(inputs, output)]
    split_of = {pair.group: pair.record.split for pair in found}  # tests last, which win
    pairs = _apart([pair for pair in found if split_of[pair.group] == pair.record.split])
    results: dict[str, Any] = {"left_out": len(found) - len(pairs)}
    if holds:
        pairs, results["where"] = _choose(pairs, holds, workers)
    train = defaultdict(list)
    for pair in pairs:
        if pair.record.split == "train":
            train[pair.record.task].append(pair)
    if not train:
        raise InputError(f"{', '.join(map(str, inputs))}: there is nothing to train on")
    wanted = _wanted({task: len(of) for task, of in train.items()}, preset, counts, weights)
    chosen = [
        pair
        for task in sorted(wanted)
        for pair in sorted(train[task], key=lambda x: hash_share(seed, x.identity))[: wanted[task]]
    ]
    chosen.sort(key=lambda x: hash_share(seed, "order", x.identity))
    records = {"train": [pair.record for pair in chosen]}
    for split in SPLITS[1:]:
        of_split = [pair.record for pair in pairs if pair.record.split == split]
        records[split] = [record for record in of_split if record.task in wanted]
    with claim(output, plan):
        results = write_manifests(output, records) | results
        dataset = {**plan, **results, "versions": {"ipx2p": __version__}}
        write_json(dataset, output / DATASET)
        is_finished(output, plan)  # which removes what was there to begin with
    print(f"{output}: {summary(dataset)}")
    for task, n in dataset.get("where", {}).items():
        print(f"--where kept {n['kept']} and left out {n['left_out']} pairs of {task}")


def _read_inputs(inputs: Sequence[Path], output: Path) -> Iterator[Candidate]:
    """The pairs of all inputs, split by split, each once."""
    shared: dict[tuple, tuple] = {}  # sentences, which many pairs share
    for split in SPLITS:
        seen = set()
        files = [path / f"{split}.jsonl" if path.is_dir() else path for path in inputs]
        for file, path in zip(files, inputs, strict=True):
            if not (file.exists() if path.is_dir() else split == "train"):
                continue
            for line in read_lines(file):
                said = shared.setdefault(line.record.instructions, line.record.instructions)
                pair = line.record._replace(split=split, instructions=said)
                names = []
                for picture in line.pictures:
                    if not picture.exists():
                        raise InputError(
                            f"{line.where}: {picture} does not exist: run `prepare check` on it"
                        )
                    names.append(Path(os.path.relpath(picture, output)).as_posix())
                record = pair._replace(source=names[0], target=names[1])
                if (key := hash_bytes(record.line().encode(), 16)) not in seen:
                    seen.add(key)
                    identity = json.dumps([pair.task, pair.group, pair.source, pair.instruction])
                    group = record.group or record.source
                    if group.startswith(("folders ", "parquet ")):  # names of its input alone
                        group = f"{path} {group}"
                    yield Candidate(line._replace(record=pair), record, group, identity)


def _apart(pairs: Sequence[Candidate]) -> list[Candidate]:
    """Without training pairs that share a picture, to the byte, with another split, under any
    group; likewise validation and test. Files are read as far as they look alike.
    """
    splits = defaultdict(set)  # of a picture, by path
    for pair in pairs:
        for path in pair.line.pictures:
            splits[path].add(pair.record.split)
    content: dict[Path, Any] = dict.fromkeys(splits, "")
    for look in (lambda path: path.stat().st_size, _head, digest_file):
        alike = defaultdict(set)
        for path, seen in content.items():
            alike[seen] |= splits[path]
        content = {p: (x, look(p)) if len(alike[x]) > 1 else x for p, x in content.items()}
    kept, split_of = [], {}
    for pair in reversed(pairs):  # those of test come last
        pictures = [content[path] for path in pair.line.pictures]
        if all(split_of.get(x, pair.record.split) == pair.record.split for x in pictures):
            split_of |= dict.fromkeys(pictures, pair.record.split)
            kept.append(pair)
    return kept[::-1]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return hash_bytes(file.read(4096), 16)


def _choose(
    pairs: Sequence[Candidate], where: Where, workers: int
) -> tuple[list[Candidate], dict[str, dict[str, int]]]:
    """The pairs that fulfil a condition, and how many of each task do and do not."""
    answers = run_all(where, [pair.line for pair in pairs], workers=workers, about="--where")
    kept = [pair for pair, holds in zip(pairs, answers, strict=True) if holds]
    before, after = (Counter(pair.record.task for pair in of) for of in (pairs, kept))
    counts = {
        task: {"kept": after[task], "left_out": number - after[task]}
        for task, number in sorted(before.items())
    }
    if not any(pair.record.split == "train" for pair in kept):
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
        if not 1e-100 < number < 1e100:
            raise InputError(f"{task}={number}: expected a number above 0, within 1e-100 to 1e100")
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
