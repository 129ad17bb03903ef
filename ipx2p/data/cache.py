"""Latents and text states on disk: training runs without the networks that make them (layer 2).

    CACHE/latents/    of each fixed draw of a pair: mean and log-variance of the target (it is still
                      sampled at each visit), the mode of the source; as it is and mirrored
    CACHE/text/       states of each different sentence
    CACHE/files.json  what each picture file held when it was last looked at

A row's key hangs on everything that shapes it: the content of the pictures, the encoder's weights,
the geometry. So whatever changes is encoded anew, and runs can share a cache. A pair is encoded by
itself: what it gets does not depend on what else was missing, or on who encoded it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ipx2p.data.loader import Framing, Visits
from ipx2p.data.pairs import Pairs
from ipx2p.data.shards import Shards, check_finite, make_key, missing
from ipx2p.data.workers import micro_batches
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes, read_json, remove_stale_temporaries, write_json
from ipx2p.images import pixels_from_pixels01
from ipx2p.models.text import TextEncoder
from ipx2p.models.vae import VAE
from ipx2p.tensor_files.tensors import digest

DTYPE = torch.float16  # finer than bfloat16, and latents and text states fit its range
SHARD_ROWS = 128
CHECK_FILES = 64  # how many a process reads before it looks whether it has to stop
SHARD_S = 60.0  # a shard is closed after this time: so much work is lost by a kill at most


@dataclass(frozen=True)
class EncodedBatch:
    """B samples: what the encoders make of a `Batch`.

    target_mean, target_logvar: the target's posterior; source_latents: the source's mode,
    (B, 4, h, w), unscaled. text: states of the sentences, (B, 77, D).
    """

    target_mean: Tensor
    target_logvar: Tensor
    source_latents: Tensor
    text: Tensor
    tasks: list[str]
    indices: list[int]

    def pin_memory(self) -> "EncodedBatch":
        """The same batch where a copy to the GPU need not wait; called by the loader."""
        tensors = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class Cache:
    """Encoded pairs in a folder, for one set of pairs and one way to cut them.

    Args:
        folder: shared by all processes, also those of other machines.
        check: called after each pair by all processes; it may raise to stop the encoding, which
            goes on from there the next time.
        weights: of the tasks in `stream`, see `Visits`.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Pairs,
        framing: Framing,
        *,
        seed: int,
        world: World,
        check: Callable[[], None] = lambda: None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.folder = folder
        self.pairs = pairs
        self.framing = framing
        self.seed = seed
        self.world = world
        self.check = check
        self.weights = weights
        self.latents, self.text = Shards(folder / "latents"), Shards(folder / "text")
        self.latent_keys: list[str] = []  # item * number of draws + draw -> key
        self.text_keys: dict[str, str] = {}  # sentence -> key

    @property
    def num_draws(self) -> int:
        """How many fixed draws each pair has."""
        return self.framing.draws or 1

    def fill(self, vae: VAE, text: TextEncoder, *, workers: int) -> None:
        """Encode what is not there yet, spread over the processes.

        Raises: InputError for a picture that cannot be used, or one whose cut is not fixed.
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
            for draw in range(self.num_draws)
        ]
        self.latents.open(self.world, {*self.latent_keys})
        todo = missing(self.latent_keys, self.latents)
        pictures = FixedPictures(self.pairs, framing, seed=self.seed)
        mine = [[place] for place in self.world.share(todo)]
        with closing(micro_batches(pictures, mine, workers=workers)) as batches:
            rows = (_encode(vae, *pair, flip=framing.flip) for pair in batches)
            self._write(self.latents, self.latent_keys, todo, rows, "pairs")

    def _chance(self, item: int, draw: int) -> list | None:
        """What decides about the random part of a fixed draw; without draws nothing is random."""
        return [self.seed, self.pairs.describe(item), draw] if self.framing.draws else None

    def _fill_text(self, text: TextEncoder) -> None:
        sentences = {""}.union(*map(self.pairs.instructions, range(len(self.pairs))))
        sentences = sorted(sentences)
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
        since = time.monotonic()

        def close_shard() -> None:
            nonlocal since
            if shard:
                shards.write(shard)
            shard.clear()
            since = time.monotonic()

        bar = tqdm(total=len(todo), desc=f"encoding {unit}", unit=f" {unit}",
                   disable=not (self.world.is_main and todo))  # fmt: skip
        try:
            for turn in range(-(-len(todo) // self.world.size)):
                if turn < len(mine):
                    row = next(rows)
                    check_finite(row, f"{unit} number {mine[turn] + 1}")
                    shard[keys[mine[turn]]] = row
                if len(shard) == SHARD_ROWS or time.monotonic() - since > SHARD_S:
                    close_shard()
                bar.update(min(self.world.size, len(todo) - turn * self.world.size))
                self.check()
        finally:
            close_shard()  # what is done is not lost, whatever ended this
            bar.close()
        if todo:
            shards.exchange(self.world)


class FixedPictures(Dataset):
    """The fixed draws of all pairs, to be encoded: number item * draws + draw."""

    def __init__(self, pairs: Pairs, framing: Framing, *, seed: int) -> None:
        self.pairs = pairs
        self.framing = framing
        self.seed = seed

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor] | InputError:
        """Source and target, (3, H, W) in [-1, 1], or the error that a picture gave."""
        item, draw = divmod(place, self.framing.draws or 1)
        framing = self.framing if self.framing.draws else _OnlyWhole(self.framing.resolution)
        try:
            pictures = framing.fixed_pictures(self.pairs, item, draw, self.seed)
        except InputError as error:
            return error
        source, target = map(pixels_from_pixels01, pictures)
        return source, target

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A batch is one pair."""
        [pair] = samples
        return pair


class _OnlyWhole(Framing):
    """Without fixed draws there is one cut only if nothing is left to chance: the whole square."""

    def cut(self, draws: torch.Generator, *, flip: bool):
        whole = super().cut(draws, flip=flip)

        def cut(size: tuple[int, int]):
            if size[0] != size[1]:
                raise InputError(
                    f"data.cache: a picture of {size[0]} x {size[1]} is cut anew at each visit, "
                    "which cannot be cached: set data.draws, how many fixed cuts each pair gets"
                )
            return whole(size)

        return cut


class EncodedStream(Dataset):
    """Training sample i for any i >= 0, encoded: the same pairs, draws and sentences as
    `SampleStream` shows."""

    def __init__(self, cache: Cache) -> None:
        self.visits = Visits(cache.pairs, cache.framing, seed=cache.seed, weights=cache.weights)
        self.num_draws = cache.num_draws
        self.latents, self.latent_keys = cache.latents, cache.latent_keys
        self.text, self.text_keys = cache.text, cache.text_keys

    def __getitem__(self, index: int) -> tuple[int, str, dict[str, Tensor]] | InputError:
        """The sample; a file that is gone is returned as the error it is, see `SampleStream`."""
        visit = self.visits[index]
        try:
            row = self.latents.read(self.latent_keys[visit.item * self.num_draws + visit.draw])
            sample = {name: tensor[int(visit.mirrored)] for name, tensor in row.items()}
            sample["text"] = self.states(visit.instruction)
        except InputError as error:
            return error
        return index, self.visits.pairs.task(visit.item), sample

    def states(self, sentence: str) -> Tensor:
        """Text states of one of the pairs' sentences, or of the empty one, (77, D)."""
        return self.text.read(self.text_keys[sentence])["states"]

    @staticmethod
    def collate(samples: Sequence[tuple[int, str, dict[str, Tensor]]]) -> EncodedBatch:
        """Samples -> a batch."""
        indices, tasks, rows = zip(*samples, strict=True)
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return EncodedBatch(**tensors, tasks=[*tasks], indices=[*indices])


@torch.no_grad()
def _encode(vae: VAE, source: Tensor, target: Tensor, *, flip: bool) -> dict[str, Tensor]:
    """A pair of pictures (3, H, W) in [-1, 1] -> its row; tensors are (1 or 2, 4, h, w), mirrored
    in the second place."""
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
    """The content of every picture file as a hash, by path; spread over the processes.

    Args:
        known_path: JSON of earlier answers, believed as long as a file's size and times stay.
    Returns: None instead of a hash for a file that cannot be read; whoever needs it will say so.
    """
    known: dict[str, Any] = {}
    with suppress(InputError):  # not there yet, or damaged: then every file is read
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
    """Size, times and hash of a file; only None if it cannot be read."""
    try:
        stat = path.stat()
        marks = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = known.get(str(path.absolute()))
        if isinstance(entry, list) and entry[:-1] == marks:
            return entry
        return [*marks, digest_bytes(path.read_bytes())]
    except OSError:
        return [None]
