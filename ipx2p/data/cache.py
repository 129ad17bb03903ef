"""Latents and text states on disk: training runs without the networks that make them (layer 2).

    CACHE/latents/    for each fixed draw of a pair: mean and log-variance of the target (which is
                      still sampled at each visit) and the mode of the source; upright and mirrored
    CACHE/text/       states of each different sentence
    CACHE/files.json  a hash of each picture file, with its size and times

A row's key depends on everything that shapes it: the content of the pictures, the encoder's
weights, the crop. So any change is encoded again, and runs can share a cache. Pairs are encoded one
at a time, so a row depends neither on the other rows nor on the process.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipx2p.data.loader import Framing, Pinnable, Stream
from ipx2p.data.pairs import Pairs
from ipx2p.data.shards import Shards, check_finite, make_key, missing
from ipx2p.data.workers import run_all
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes, read_json, remove_stale_temporaries, write_json
from ipx2p.images import pixels_from_pixels01
from ipx2p.models.text import TextEncoder
from ipx2p.models.vae import VAE
from ipx2p.tensor_files.tensors import digest

DTYPE = torch.float16  # finer than bfloat16, and latents and text states fit its range
SHARD_BYTES = 2**27  # a million pairs at 256 px are 400 files, which are all mapped
CHECK_FILES = 64  # files that a process reads between checks for a stop
SHARD_S = 60.0  # a shard is written after this time, so that a kill loses no more work


@dataclass(frozen=True)
class EncodedBatch(Pinnable):
    """B encoded samples.

    target_mean, target_logvar: the target's posterior; source_latents: the source's mode,
    (B, 4, h, w), unscaled. text: states of the sentences, (B, 77, D).
    """

    target_mean: Tensor
    target_logvar: Tensor
    source_latents: Tensor
    text: Tensor
    tasks: list[str]
    indices: list[int]


@dataclass
class Cache:
    """Encoded pairs in a folder, for one set of pairs and one way to crop them.

    Args:
        folder: shared by all processes, also those of other machines.
        check: called after each pair by all processes; may raise to stop. The next run resumes.
        weights: of the tasks, see `Stream`.
    """

    folder: Path
    pairs: Pairs
    framing: Framing
    _: KW_ONLY
    seed: int
    world: World
    check: Callable[[], None] = lambda: None
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self.latents, self.text = Shards(self.folder / "latents"), Shards(self.folder / "text")
        self.latent_keys: list[str] = []  # item * number of draws + draw -> key
        self.text_keys: dict[str, str] = {}  # sentence -> key

    def fill(self, vae: VAE, text: TextEncoder, *, workers: int) -> None:
        """Encode what is missing, spread over the processes.

        Raises: InputError for a picture that cannot be used, or one whose crop is not fixed.
        """
        self.world.check_shared(self.folder, "data.cache_dir")
        if self.world.is_main:
            for folder in (self.folder, self.latents.folder, self.text.folder):
                remove_stale_temporaries(folder)
        self._fill_latents(vae, workers)
        self._fill_text(text)

    def stream(self) -> "EncodedStream":
        """The training samples, encoded."""
        return EncodedStream(self)

    def _fill_latents(self, vae: VAE, workers: int) -> None:
        digests = digest_files(self.folder / "files.json", self.pairs, self.world, self.check)
        framing = self.framing
        network = [asdict(vae.config), digest(vae.state_dict())]
        how = (network, framing.resolution, framing.max_zoom, framing.flip)
        self.latent_keys = [
            make_key("latents", *how, self._chance(item, draw), *content)
            for item in range(len(self.pairs))
            for content in [[digests[str(path)] for path in self.pairs.files(item)]]
            for draw in range(framing.num_draws)
        ]
        self.latents.open(self.world, {*self.latent_keys})
        todo = missing(self.latent_keys, self.latents)
        fixed = partial(_fixed_pixels, self.pairs, framing, self.seed)
        mine = self.world.share(todo)
        with closing(run_all(fixed, mine, workers=workers, chunk=1)) as pictures:
            rows = (_encode(vae, *pair, flip=framing.flip) for pair in pictures)
            self._write(self.latents, self.latent_keys, todo, rows, "pairs")

    def _chance(self, item: int, draw: int) -> list | None:
        """What determines the random part of a fixed draw; without draws nothing is random."""
        return [self.seed, self.pairs.describe(item), draw] if self.framing.draws else None

    def _fill_text(self, text: TextEncoder) -> None:
        sentences = sorted({""}.union(*map(self.pairs.instructions, range(len(self.pairs)))))
        network = [text.config, digest(text.state_dict())]
        keys = [
            make_key("text", network, text.tokenize([sentence])[0].tolist())
            for sentence in sentences
        ]
        self.text_keys = dict(zip(sentences, keys, strict=True))
        self.text.open(self.world, {*keys})
        todo = missing(keys, self.text)
        rows = (
            {"states": text.encode([sentences[place]])[0].to("cpu", DTYPE)}
            for place in self.world.share(todo)
        )
        self._write(self.text, keys, todo, rows, "sentences")

    def _write(
        self,
        shards: Shards,
        keys: Sequence[str],
        todo: Sequence[int],
        rows: Iterator[dict[str, Tensor]],
        unit: str,
    ) -> None:
        """Write this process's rows as they come, shard by shard, and wait for the others'."""
        mine = self.world.share(todo)
        shard: dict[str, dict[str, Tensor]] = {}
        size, since = 0, time.monotonic()
        bar = tqdm(total=len(todo), desc=f"encoding {unit}", unit=f" {unit}",
                   disable=not (self.world.is_main and todo))  # fmt: skip
        try:
            for turn in range(-(-len(todo) // self.world.size)):
                if turn < len(mine):
                    row = next(rows)
                    check_finite(row, f"{unit} number {mine[turn] + 1}")
                    shard[keys[mine[turn]]] = row
                    size += sum(tensor.nbytes for tensor in row.values())
                if size > SHARD_BYTES or time.monotonic() - since > SHARD_S:
                    shards.write(shard)
                    shard, size, since = {}, 0, time.monotonic()
                bar.update(min(self.world.size, len(todo) - turn * self.world.size))
                self.check()
        finally:
            shards.write(shard)  # finished rows are kept even after an error
            bar.close()
        if todo:
            shards.exchange(self.world)


def _fixed_pixels(pairs: Pairs, framing: Framing, seed: int, place: int) -> tuple[Tensor, ...]:
    """Source and target number item * draws + draw, (3, H, W) in [-1, 1]."""
    item, draw = divmod(place, framing.num_draws)
    return tuple(map(pixels_from_pixels01, framing.fixed_pictures(pairs, item, draw, seed)))


class EncodedStream(Stream):
    """Encoded samples: the same pairs, draws and sentences as those of `SampleStream`."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache.pairs, cache.framing, seed=cache.seed, weights=cache.weights)
        self.latents, self.latent_keys = cache.latents, cache.latent_keys
        self.text, self.text_keys = cache.text, cache.text_keys

    def __getitem__(self, index: int) -> tuple[int, str, dict[str, Tensor]] | InputError:
        item, epoch = self.order(index)
        draw, mirrored, instruction = self.visit(index, item, epoch)
        try:
            row = self.latents.read(self.latent_keys[item * self.framing.num_draws + draw])
            sample = {name: tensor[int(mirrored)] for name, tensor in row.items()}
            sample["text"] = self.states(instruction)
        except InputError as error:
            return error
        return index, self.pairs.task(item), sample

    def states(self, sentence: str) -> Tensor:
        """Text states of one of the pairs' sentences, or of the empty one, (77, D)."""
        return self.text.read(self.text_keys[sentence])["states"]

    @staticmethod
    def collate(samples: Sequence[tuple[int, str, dict[str, Tensor]]]) -> EncodedBatch:
        indices, tasks, rows = zip(*samples, strict=True)
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return EncodedBatch(**tensors, tasks=[*tasks], indices=[*indices])


@torch.no_grad()
def _encode(vae: VAE, source: Tensor, target: Tensor, *, flip: bool) -> dict[str, Tensor]:
    """The row of a pair (3, H, W) in [-1, 1]: tensors (1 or 2, 4, h, w), the second mirrored."""
    ways = [pixels.flip(-1) if way else pixels for way in range(1 + flip)
            for pixels in (source, target)]  # fmt: skip
    posterior = vae.encode(torch.stack(ways).to(vae.device))
    mean, logvar = (t.to("cpu", DTYPE) for t in (posterior.mean, posterior.logvar))
    return {
        "source_latents": mean[0::2].contiguous(),
        "target_mean": mean[1::2].contiguous(),
        "target_logvar": logvar[1::2].contiguous(),
    }


def digest_files(
    known_path: Path, pairs: Pairs, world: World, check: Callable[[], None]
) -> dict[str, str | None]:
    """A hash of every picture file, by path; None if it cannot be read, which raises later.

    The processes share the work. `known_path` is JSON of earlier results, valid while a file's size
    and times stay the same.
    """
    known: dict[str, Any] = {}
    with suppress(InputError):  # missing or damaged: every file is read
        known = read_json(known_path)
    paths = sorted({path for item in range(len(pairs)) for path in pairs.files(item)})
    mine = world.share(paths)
    is_new = any(str(path.absolute()) not in known for path in paths)
    entries = []
    with tqdm(total=len(paths), desc="reading pictures", unit=" files",
              disable=not (world.is_main and is_new)) as bar:  # fmt: skip
        for turn in range(-(-len(paths) // world.size)):
            entries += [_digest(path, known) for path in mine[turn : turn + 1]]
            bar.update(min(world.size, len(paths) - turn * world.size))
            if turn % CHECK_FILES == 0:
                check()
    found = dict(zip(map(str, paths), world.merge(entries), strict=True))
    if world.is_main:
        noted = known | {str(path.absolute()): found[str(path)] for path in paths}
        if noted != known:
            write_json(noted, known_path)
    return {path: entry[-1] for path, entry in found.items()}


def _digest(path: Path, known: dict[str, Any]) -> list:
    """Size, times and hash of a file; [None] if it cannot be read."""
    try:
        stat = path.stat()
        marks = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = known.get(str(path.absolute()))
        if isinstance(entry, list) and entry[:-1] == marks:
            return entry
        return [*marks, digest_bytes(path.read_bytes())]
    except OSError:
        return [None]
