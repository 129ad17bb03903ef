"""What a run trains on: its pairs, whether they are still the same, and their stream (layer 4)."""

import json
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from torch.utils.data import Dataset

from ipx2p.data.cache import Cache
from ipx2p.data.loader import Framing, SampleStream
from ipx2p.data.pairs import DegradedPhotos, ManifestPairs, Pairs, find_photos
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import read_json, write_json
from ipx2p.training.config import DataConfig, TrainConfig
from ipx2p.training.learners import Learner

PAIRS = "pairs.json"


def open_pairs(config: DataConfig) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those that only validation sees."""
    if config.manifest is not None:
        return ManifestPairs(config.manifest), ManifestPairs(config.validation_manifest)
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
    return (
        DegradedPhotos(trained, config.tasks, config.degrade),
        DegradedPhotos(held_out, config.tasks, config.degrade),
    )


def open_stream(
    config: TrainConfig, pairs: Pairs, learner: Learner, world: World, check: Callable[[], None]
) -> Dataset:
    """The samples of the run: pictures, or what the cache holds of them, which is filled first.

    Args:
        check: called now and then while the cache is filled; it may raise to leave that.
    """
    data, seed = config.data, config.run.seed
    framing = Framing(data.resolution, data.max_zoom, data.flip, data.draws)
    if not data.cache:
        return SampleStream(pairs, framing, seed=seed)
    cache = Cache(Path(data.cache_dir), pairs, framing, seed=seed, world=world, check=check)
    cache.fill(*learner.frozen.get(), workers=data.workers)
    learner.frozen.release()
    world.print(f"{data.cache_dir} holds everything: training without the encoders")
    return cache.stream()


def check_unchanged(pairs: Pairs, run: Path, world: World) -> None:
    """Raise InputError if a run goes on with other pairs than it began with."""
    lines, hashes = _list_pairs(pairs)
    world.check_same("the list of pairs", blake2b("".join(hashes).encode()).hexdigest()[:16])
    path = run / PAIRS
    before = read_json(path).get("pairs") if path.exists() else hashes
    if before == hashes:
        return
    known = set(before) if isinstance(before, list) else set()
    other = [line for line, value in zip(lines, hashes, strict=True) if value not in known]
    changes = []
    if len(known) != len(set(hashes)):
        changes.append(f"there were {len(before or ())} pairs and are {len(hashes)}")
    if other:
        changes.append(f"{len(other)} are new, such as {other[0][:100]}")
    raise InputError(
        f"the pairs are not those that {run} learned from: "
        f"{'; '.join(changes) or 'they stand in another order'}. Bring them back, or choose "
        "another run.name"
    )


def note_pairs(pairs: Pairs, run: Path) -> None:
    """Write down, once, which pairs a run learns from: a short hash of each."""
    if not (run / PAIRS).exists():
        write_json({"pairs": _list_pairs(pairs)[1]}, run / PAIRS)


def _list_pairs(pairs: Pairs) -> tuple[list[str], list[str]]:
    lines = [
        f"{pairs.describe(item)} {json.dumps(pairs.instructions(item))}"
        for item in range(len(pairs))
    ]
    return lines, [blake2b(line.encode(), digest_size=4).hexdigest() for line in lines]
