"""Checks and statistics of a manifest (layer 2)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from ipx2p.data.manifest import SPLITS, Line, Record, read_lines
from ipx2p.data.prepare.fingerprints import fingerprint, near_copies
from ipx2p.data.workers import run_all
from ipx2p.errors import InputError
from ipx2p.files import digest_file
from ipx2p.images import image_size, load_image, pixels01_from_image
from ipx2p.metrics import psnr
from ipx2p.models.text import load_tokenizer

COMPARED = 200  # pairs of a task at most, by `stats`
FOUND = 1  # exit code if there are problems
Report = Callable[[str, str, str], None]  # where, kind of problem, description


@dataclass(frozen=True)
class PictureInfo:
    """A picture file: its size, content and fingerprint, or what is wrong with it."""

    path: Path
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    fingerprint: str = ""
    error: str | None = None


def check(path: Path, *, workers: int) -> int:
    """Print every problem of a manifest and of the other splits beside it, one line each.

    Args:
        path: a manifest, or the folder of a data set.
    Returns: 0, or `FOUND`.
    """
    problems: Counter[str] = Counter()

    def report(where: str, kind: str, what: str) -> None:
        problems[kind] += 1
        print(" ".join(f"{where}: {what}".split()))  # names may hold line breaks

    manifests = find_manifests(path)
    lines = []
    for manifest in manifests:
        found = [*read_lines(manifest, keep_bad=True)]
        if not found:
            report(str(manifest), "manifests without pairs", "lists no pairs")
        for line in found:
            if line.error:
                report(line.where, "bad lines", line.error.lstrip(": "))
            else:
                lines.append(line)
    paths = sorted({path for line in lines for path in line.pictures})
    looked = {
        x.path: x for x in run_all(_look_at, paths, workers=workers, about="reading pictures")
    }
    _check_pictures(lines, looked, report)
    _check_repeated(lines, looked, report)
    _check_splits(lines, looked, report)
    names = ", ".join(manifest.name for manifest in manifests)
    found = ", ".join(f"{number} {kind}" for kind, number in problems.items())
    print(f"{len(lines)} pairs in {names}: {found or 'nothing is wrong'}")
    return FOUND if problems else 0


def stats(path: Path, *, tokenizer: Path | None = None) -> None:
    """Print counts, sizes and sentences of each manifest's pairs, by task.

    Args:
        path: a manifest, or the folder of a data set.
        tokenizer: a weights folder, or its tokenizer's, to count the tokens of sentences with.
    """
    if tokenizer and (tokenizer / "tokenizer").is_dir():
        tokenizer /= "tokenizer"
    tokens = load_tokenizer(tokenizer)[0] if tokenizer else None
    for manifest in find_manifests(path):
        tasks: dict[str, list[Record]] = defaultdict(list)
        for line in read_lines(manifest):
            tasks[line.record.task].append(line.record)
        print(f"{manifest}: {sum(map(len, tasks.values()))} pairs, {len(tasks)} tasks")
        for task, records in sorted(tasks.items()):
            print(f"  {task}: {len(records)} pairs")
            sides = [min(image_size(manifest.parent / record.target)) for record in records]
            print(f"    short side, pixels: {_spread(sides)}")
            print(f"    sentences of a pair: {_spread([len(r.instructions) for r in records])}")
            print(f"    source against target: {_change(manifest.parent, records)}")
            sentences = sorted({text for r in records for text in r.instructions})
            print(f"    different sentences: {len(sentences)}, such as {sentences[0]!r}")
            print(f"    words: {_spread([len(text.split()) for text in sentences])}")
            if tokens:
                counts = [len(tokens(text, verbose=False)["input_ids"]) for text in sentences]
                room = tokens.model_max_length
                cut = sum(count > room for count in counts)
                print(f"    tokens, of {room}: {_spread(counts)}, {cut} sentences are too long")


def find_manifests(path: Path) -> list[Path]:
    """A manifest with the other splits beside it, or those of a data set's folder.

    Raises: InputError when there is none.
    """
    folder = path if path.is_dir() else path.parent
    splits = [folder / f"{split}.jsonl" for split in SPLITS]
    found = [split for split in splits if split.exists()]
    if path.is_dir() and not found:
        raise InputError(f"{path} holds none of {', '.join(split.name for split in splits)}")
    if not path.exists():
        raise InputError(f"manifest {path} does not exist")
    return found if path.is_dir() or path in splits else [path]


def _look_at(path: Path) -> PictureInfo:
    try:
        image = load_image(path)
        return PictureInfo(path, image.size, digest_file(path), fingerprint(image))
    except InputError as error:
        return PictureInfo(path, error=str(error))


def _check_pictures(lines: Sequence[Line], looked: dict[Path, PictureInfo], report: Report) -> None:
    for line in lines:
        source, target = (looked[path] for path in line.pictures)
        for picture in (source, target):
            if picture.error:
                kind = "unreadable pictures" if picture.path.exists() else "missing pictures"
                report(line.where, kind, picture.error)
        if not source.error and not target.error and source.size != target.size:
            sizes = [f"{p.path} is {p.size[0]} x {p.size[1]}" for p in (source, target)]
            report(line.where, "pairs of two sizes", f"{sizes[0]}, {sizes[1]}")


def _check_repeated(lines: Sequence[Line], looked: dict[Path, PictureInfo], report: Report) -> None:
    first: dict[tuple, Line] = {}
    for line in lines:
        digests = [looked[path].digest for path in line.pictures]
        if all(digests):
            key = (*digests, line.record.instructions)
            earlier = first.setdefault(key, line)
            if earlier is not line:
                report(line.where, "repeated pairs", f"the same pair as {earlier.where}")


def _check_splits(lines: Sequence[Line], looked: dict[Path, PictureInfo], report: Report) -> None:
    """The same picture in two splits: by content, then by what it shows. One report a line."""
    lines_of: dict[str, list[Line]] = defaultdict(list)  # digest of a picture -> where it is used
    prints = {}
    for line in lines:
        for picture in {looked[path] for path in line.pictures if not looked[path].error}:
            lines_of[picture.digest].append(line)
            prints[picture.digest] = picture.fingerprint
    reported: set[str] = set()

    def compare(earlier: Sequence[Line], later: Sequence[Line], what: str) -> None:
        for line in later:
            others = [other for other in earlier if other.path != line.path]
            if others and line.where not in reported:
                reported.add(line.where)
                report(line.where, "pictures in two splits", f"{what} {others[0].where}")

    for same in lines_of.values():
        of_first = [line for line in same if line.path == same[0].path]
        compare(of_first, same, "uses a picture of")
    digests = [*prints]
    for a, b in near_copies([prints[digest] for digest in digests]):
        earlier, later = lines_of[digests[a]], lines_of[digests[b]]
        compare(earlier, later, "uses a picture that shows the same as one of")


def _change(folder: Path, records: Sequence[Record]) -> str:
    """How far the sources of a task are from their targets: means over some of its pairs."""
    rows = []
    for record in records[:: -(-len(records) // COMPARED)]:
        pictures = [load_image(folder / name) for name in (record.source, record.target)]
        if pictures[0].size != pictures[1].size:
            continue  # `check` names such pairs
        box = (0, 0, *(min(side, 4096) for side in pictures[0].size))  # bounds the memory
        source, target = (pixels01_from_image(picture.crop(box)) for picture in pictures)
        change = source - target
        noise = change - change.mean((1, 2), keepdim=True)
        covariance, variance = (noise[..., 1:] * noise[..., :-1]).mean(), noise.square().mean()
        decibel = psnr(source[None], target[None])[0].clamp(max=100)
        changed = (change.abs().mean(0) > 0.05).double().mean()
        correlation = covariance / variance.clamp(min=1e-12)
        rows.append([decibel, changed, change.mean(), 255 * source.mean(), correlation])
    if not rows:
        return "no pair of one size"
    decibel, changed, shift, level, correlation = torch.tensor(rows).mean(0).tolist()
    return (
        f"{decibel:.1f} dB, {changed:.0%} of the pixels changed by more than 5%, mean change "
        f"{shift:+.3f}, mean level {level:.0f} of 255, correlation of neighbours {correlation:.2f}"
    )


def _spread(numbers: Sequence[int]) -> str:
    low, middle, high = min(numbers), median(numbers), max(numbers)
    return (
        f"{low} to {high}, median {middle:g}, mean {mean(numbers):.1f}" if low < high else f"{low}"
    )
