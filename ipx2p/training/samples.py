"""The pairs a run trains on, whether they are unchanged, and their stream (layer 4)."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ipx2p.data.cache import Cache
from ipx2p.data.listing import find_photos
from ipx2p.data.loader import Framing, SampleStream
from ipx2p.data.order import tempered
from ipx2p.data.pairs import DegradedPhotos, ManifestPairs, Pairs
from ipx2p.data.selection import Worded, leave_out, open_banks, take_fraction
from ipx2p.distributed import World
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes, read_json, write_json
from ipx2p.training.config import DataConfig, TrainConfig
from ipx2p.training.learner import Learner

PAIRS = "pairs.json"


def open_pairs(config: DataConfig) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those used only for validation."""
    if config.manifest:
        trained, held_out = map(ManifestPairs, (config.manifest, config.validation_manifest))
    else:
        trained, held_out = _open_photos(config)
    banks = open_banks(config.banks, {*trained.by_task(), *held_out.by_task()})
    trained = take_fraction(leave_out(trained, config.holdout_tasks), config.fraction)
    if config.instructions == "per_step" and not banks:
        return trained, held_out
    return tuple(Worded(pairs, config.instructions, banks) for pairs in (trained, held_out))


def _open_photos(config: DataConfig) -> tuple[Pairs, Pairs]:
    photos = find_photos(Path(config.photos))
    names = {photo.name for photo in photos}
    if missing := [name for name in config.held_out if name not in names]:
        raise InputError(
            f"data.held_out names {', '.join(missing)}, not in {config.photos}: {sorted(names)}"
        )
    held_out = [photo for photo in photos if photo.name in config.held_out]
    trained = [photo for photo in photos if photo.name not in config.held_out]
    if not trained:
        raise InputError(f"data.held_out names all photos of {config.photos}: none is left")
    return tuple(DegradedPhotos(part, config.tasks, config.degrade) for part in (trained, held_out))


def task_weights(config: DataConfig, pairs: Pairs) -> dict[str, float] | None:
    """The weight of each task among the samples; None: its number of pairs.

    Raises: InputError for a mixture that does not name exactly the tasks of the pairs.
    """
    if config.mixture is None and config.temperature is None:
        return None
    counts = {task: len(items) for task, items in pairs.by_task().items()}
    if config.temperature is not None:
        return tempered(counts, config.temperature)
    for task in config.mixture:
        if task not in counts:
            near = suggestion(task, [*counts])
            raise InputError(f"data.mixture: no training pair has task {task!r}; {near}")
    if missing := [task for task in counts if task not in config.mixture]:
        raise InputError(
            f"data.mixture has no weight for {', '.join(missing)}: name every task, with 0 to "
            "leave it out"
        )
    return config.mixture


def task_table(pairs: Pairs, weights: dict[str, float] | None) -> str:
    """The number of pairs of each task and its share of the samples, as text."""
    counts = {task: len(items) for task, items in pairs.by_task().items()}
    weights = weights or counts
    total = sum(weights.values())
    lines = [f"{'task':<20}{'pairs':>9}{'of samples':>12}"]
    lines += [f"{task:<20}{n:>9}{weights[task] / total:>12.1%}" for task, n in counts.items()]
    return "\n".join(lines)


def open_stream(
    config: TrainConfig, pairs: Pairs, learner: Learner, world: World, check: Callable[[], None]
) -> Dataset:
    """The samples of the run: pictures, or their encodings from the cache, which is filled first.

    Args:
        check: called now and then while the cache is filled; it may raise to abandon that.
    """
    data, seed = config.data, config.run.seed
    framing = Framing(data.resolution, data.max_zoom, data.flip, data.draws)
    weights = task_weights(data, pairs)
    if not data.cache:
        skip = data.on_error == "skip"
        return SampleStream(pairs, framing, seed=seed, weights=weights, skip=skip)
    cache = Cache(
        Path(data.cache_dir), pairs, framing, seed=seed, world=world, check=check, weights=weights
    )
    cache.fill(*learner.frozen.get(), workers=data.workers)
    learner.frozen.release()
    world.print(f"{data.cache_dir} holds everything: training without the encoders")
    return cache.stream()


def check_unchanged(pairs: Pairs, run: Path, world: World) -> None:
    """Raise InputError if a run is resumed with different pairs from those it began with."""
    digests = _digests(pairs)
    world.check_same("the list of pairs", digest_bytes(digests.tobytes()))
    path = run / PAIRS
    before = _read_digests(path) if path.exists() else digests
    if np.array_equal(before, digests):
        return
    known, other = np.unique(before), np.flatnonzero(~np.isin(digests, before))
    changes = []
    if len(known) != len(np.unique(digests)):
        changes.append(f"there were {len(before)} pairs and are {len(digests)}")
    if len(other):
        first = int(other[0])
        line = f"{pairs.describe(first)} {json.dumps([*pairs.instructions(first)])}"
        changes.append(
            f"{len(other)} have other pictures, sentences or degradations, such as {line[:100]}"
        )
    raise InputError(
        f"the pairs are not those that {run} learned from: "
        f"{'; '.join(changes) or 'their order differs'}. Restore them, or choose another run.name"
    )


def note_pairs(pairs: Pairs, run: Path) -> None:
    """Record, once, which pairs a run learns from: 64 bits of each, in base 64."""
    if not (run / PAIRS).exists():
        text = base64.b64encode(_digests(pairs).tobytes()).decode()
        write_json({"count": len(pairs), "digests": text}, run / PAIRS)


def _digests(pairs: Pairs) -> np.ndarray:
    return pairs.digests() ^ pairs.sentence_digests()


def _read_digests(path: Path) -> np.ndarray:
    content = read_json(path)
    try:
        return np.frombuffer(base64.b64decode(content["digests"], validate=True), np.uint64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): choose another run.name") from error
