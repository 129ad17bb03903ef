"""A data set on disk: manifests, pictures, sheets, and the file that says what made them (layer 2).

SET/train.jsonl  val.jsonl  test.jsonl     manifests, split by source picture
SET/pictures/                              what they name
SET/sheets/TASK.jpg                        a few pairs of each task, to look at
SET/dataset.json                           what made it; written last, so it means "whole"
"""

import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from ipx2p import __version__
from ipx2p.data.manifest import SPLITS, Record
from ipx2p.data.prepare.splits import assign_splits
from ipx2p.errors import InputError
from ipx2p.files import (
    atomic_write,
    check_writable,
    digest_bytes,
    hold_lock,
    read_json,
    remove_stale_temporaries,
    write_json,
)
from ipx2p.images import load_image, save_image
from ipx2p.sheets import contact_sheet

DATASET = "dataset.json"
WORK = ".work"  # what is done so far
SHEET_ROWS = 6


def write_manifests(folder: Path, splits: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Write the manifests of the splits that have any pairs, the one to train on last.

    Returns: for dataset.json, counts by split and task, and the digest of each file.
    """
    found = {split: pairs for split, pairs in splits.items() if pairs}
    texts = {split: "".join(f"{x.line()}\n" for x in pairs) for split, pairs in found.items()}
    for split in reversed(texts):
        with atomic_write(folder / f"{split}.jsonl") as temporary:
            temporary.write_text(texts[split], encoding="utf-8")
    return {
        "counts": {
            split: dict(sorted(Counter(x.task for x in pairs).items()))
            for split, pairs in found.items()
        },
        "manifests": {f"{split}.jsonl": digest_bytes(t.encode()) for split, t in texts.items()},
    }


def write_dataset(
    folder: Path,
    entries: Sequence[Record],
    *,
    fingerprints: Mapping[str, str],
    shares: Sequence[float],
    seed: int,
    about: dict[str, Any],
) -> None:
    """Split the pairs whose pictures lie in `folder`, and write all but these.

    Args:
        fingerprints: of the pictures of groups, see `assign_splits`.
        about: what else dataset.json says.
    """
    entries, repeated = _drop_repeated(entries)
    num_found, entries = len(entries), _split(entries, fingerprints, shares=shares, seed=seed)
    left_out = num_found - len(entries)
    digests = {
        name: digest
        for entry in entries
        for name, digest in zip(entry[:2], entry.digests, strict=True)
    }
    _remove_others(folder / "pictures", {folder / name for name in digests})
    for task in sorted({entry.task for entry in entries}):
        _save_sheet(folder, task, [entry for entry in entries if entry.task == task])
    written = write_manifests(folder, {
        split: [e for e in entries if e.split == split] for split in SPLITS
    })  # fmt: skip
    pictures = json.dumps(sorted(digests.items())).encode()
    packages = {name: version(name) for name in ("torch", "Pillow", "numpy")}
    found = {
        "pictures": {"count": len(digests), "digest": digest_bytes(pictures)},
        "repeated": repeated,
        **({"left_out": left_out} if left_out else {}),
        "versions": {"ipx2p": __version__, "python": platform.python_version(), **packages},
    }
    write_json({**about, **written, **found}, folder / DATASET)


def stored_plan(folder: Path) -> dict[str, Any]:
    """The plan of the data set in a folder, finished or not; empty where there is none."""
    paths = (folder / DATASET, folder / WORK / "plan.json")
    return next((read_json(path) for path in paths if path.exists()), {})


def is_finished(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder holds what the plan makes. InputError if it holds something else."""
    if not (folder / DATASET).exists():
        return False
    _check_plan(read_json(folder / DATASET), plan, folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return True


def claim(folder: Path, plan: dict[str, Any]) -> BinaryIO:
    """Make the folder ours: it must be new, empty, or begun with the same plan.

    Returns: a file to keep open, during which no other process can claim the folder.
    """
    begun = folder / WORK / "plan.json"
    is_ours = begun.exists()
    if not is_ours:
        _check_empty(folder)
    check_writable(folder / WORK)
    lock = hold_lock(folder / WORK / "lock")
    if lock is None:
        raise InputError(f"another process is making {folder}: wait until it ends")
    for place in (folder, folder / "sheets"):
        remove_stale_temporaries(place)
    if is_ours and any(path.stat().st_size for path in (folder / WORK).glob("made_*")):
        _check_plan(read_json(begun), plan, folder)
    else:
        write_json(plan, begun)
    return lock


def _check_empty(folder: Path) -> None:
    ours = (WORK, ".shared_")  # what a process that was killed at its very start has left
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a new folder")
    if folder.exists() and any(not path.name.startswith(ours) for path in folder.iterdir()):
        raise InputError(f"{folder} holds something else: choose a new folder")


def _check_plan(found: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    changed = [*_changes({key: found.get(key) for key in plan}, plan)]
    if changed:
        raise InputError(
            f"{folder} holds a data set of other settings: {', '.join(changed)}; choose another "
            "folder, or remove it"
        )


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """The dotted keys in which two JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            where = f"{key}.{name}" if key else name
            yield from _changes(before.get(name), now.get(name), where)
    elif before != now:
        was, is_now = (f"{json.dumps(value):.60}" for value in (before, now))
        yield f"{key} was {was}, is {is_now}"


def summary(dataset: dict[str, Any]) -> str:
    """What a dataset.json says, in a line."""
    parts = [
        f"{sum(tasks.values())} {split} ({', '.join(f'{n} {task}' for task, n in tasks.items())})"
        for split, tasks in dataset["counts"].items()
    ]
    if dataset.get("skipped"):
        parts.append(f"{len(dataset['skipped'])} inputs skipped, see {DATASET}")
    if dataset.get("repeated"):
        parts.append(f"{dataset['repeated']} repeated pairs left out")
    if dataset.get("left_out"):
        parts.append(f"{dataset['left_out']} pairs left out whose pictures are in another split")
    return ", ".join(parts)


def _split(
    entries: Sequence[Record],
    fingerprints: Mapping[str, str],
    *,
    shares: Sequence[float],
    seed: int,
) -> list[Record]:
    """The pairs with their splits. Published val and test stay as they are; other pairs that share
    a picture with them are left out.
    """
    held_out = SPLITS[1:]
    seen = {digest for e in entries if e.split in held_out for digest in e.digests}
    kept = [e for e in entries if e.split in held_out or seen.isdisjoint(e.digests)]
    # Of a group whose pairs are partly published, the others go where these are.
    groups = {e.group: e.split for e in sorted(kept, key=lambda e: e.split or "")}
    first: dict[str, str] = {}  # picture -> the first group that has it
    together = [(first.setdefault(digest, e.group), e.group) for e in kept for digest in e.digests]
    split_of = assign_splits(groups, fingerprints, together=together, shares=shares, seed=seed)
    fixed = {e.group for e in kept if e.split in held_out}
    return [
        e if e.split and (e.split in held_out or e.group in fixed)
        else e._replace(split=split_of[e.group])
        for e in kept
    ]  # fmt: skip


def _drop_repeated(entries: Sequence[Record]) -> tuple[list[Record], int]:
    """Each pair of a split once: the same photograph may lie in a folder under two names."""
    kept: dict[tuple, Record] = {}
    for entry in entries:
        kept.setdefault((*entry.digests, entry.task, *entry.instructions, entry.split), entry)
    return [*kept.values()], len(entries) - len(kept)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """Remove what repeated pairs, changed inputs and killed processes left behind."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path not in wanted and not path.is_dir():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _save_sheet(output: Path, task: str, entries: Sequence[Record]) -> None:
    stride = max(1, len(entries) // SHEET_ROWS)
    chosen = entries[: stride * SHEET_ROWS : stride]
    sheet = contact_sheet(
        [[load_image(output / name) for name in (e.source, e.target)] for e in chosen],
        column_labels=["source", "target"],
        row_labels=[e.instructions[0] for e in chosen],
        title=f"{task}: {len(chosen)} of {len(entries)} pairs",
    )
    save_image(sheet, output / "sheets" / f"{task.replace('/', '_')}.jpg")
