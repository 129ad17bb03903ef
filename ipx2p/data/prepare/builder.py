"""Build a data set: recipes turn units of work into pairs, over workers and ranks (layer 2).

The same inputs, recipe and seed give the same bytes, whichever process made a unit and however
often the work was interrupted: a unit is made by one thread, and everything random depends on the
content of its pictures. OUTPUT/.work/ records what is done; it is removed at the end.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from ipx2p.data.manifest import Record
from ipx2p.data.prepare.dataset import DATASET, WORK, claim, is_finished, summary, write_dataset
from ipx2p.data.prepare.splits import check_shares
from ipx2p.data.workers import run_all
from ipx2p.distributed import World
from ipx2p.errors import InputError, WriteError
from ipx2p.files import digest_bytes, read_json

SKIP = " (or leave out what cannot be used: --on-error skip)"
MEET_EVERY = 16  # units after which the ranks wait for one another, so that no wait gets long


@dataclass(frozen=True)
class Unit:
    """What a recipe makes at a time.

    key: unique. stamp: changes when the input may have changed. faults: what is known to be wrong
    with it beforehand.
    """

    key: str
    item: Any
    stamp: str = ""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """What a unit gave: its pairs, and a fingerprint of each group's picture.

    skipped: the name of each input that cannot be used, and why. megapixels: of the pictures made.
    """

    entries: list[Record] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    megapixels: float = 0.0
    elapsed_s: float = 0.0


class SettingsError(InputError):
    """Wrong settings, which fail for every picture: never skipped."""


class Recipe(ABC):
    """What to make of which inputs. It is sent to worker processes."""

    name: str
    seed: int
    licence: str

    @abstractmethod
    def units(self) -> list[Unit]:
        """All the work, in an order that does not depend on the file system."""

    @abstractmethod
    def make(self, unit: Unit, output: Path) -> Made:
        """Make a unit's pictures under `output`; what cannot be used goes to `Made.skipped`.

        Raises: InputError if the whole unit cannot be used.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings that shape the result, as JSON: no paths of this machine, no workers."""


def build(
    recipe: Recipe,
    output: Path,
    *,
    world: World,
    workers: int,
    shares: Sequence[float] = (90, 5, 5),
    on_error: str = "stop",
    cuda: bool = False,
) -> None:
    """Make what is missing of a data set, and finish it.

    Args:
        shares: how much of what is not split goes to train, val and test.
        on_error: `stop` if an input cannot be used, or `skip` it and record which and why.
        cuda: whether the recipe computes on a GPU.
    Raises: InputError when `output` holds something else, or an input cannot be used.
    """
    check_shares(shares)
    units = recipe.units()
    plan = _plan(recipe, units, shares)
    world.check_same("what to make", digest_bytes(json.dumps(plan).encode()))
    if world.gather(is_finished(output, plan))[0]:
        world.print(f"{output} is finished: {summary(read_json(output / DATASET))}")
        return
    faults = [fault for unit in units for fault in unit.faults]
    if faults and on_error == "stop":
        more = f" (and {len(faults) - 1} more like this)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}{SKIP}")
    world.check_shared(output, "OUTPUT")
    lock = claim(output, plan) if world.is_main else None
    world.barrier()
    # What was skipped is tried again.
    made = {unit for unit, one in _read_records(output).items() if not one.skipped}
    made, attempt = world.gather((made, len([*_logs(output)])))[0]
    todo = [unit for unit in units if (unit.key, unit.stamp) not in made]
    if made:
        world.print(f"resuming: {len(units) - len(todo)} of {len(units)} are done")
    log = output / WORK / f"made_{attempt:04}_{world.rank}.jsonl"
    with _one_thread():
        maker = _Maker(recipe, output, on_error)
        _make_all(maker, todo, log, world=world, workers=workers, cuda=cuda)
    world.barrier()
    if world.is_main:
        done = _read_records(output)
        _finish(output, [done[unit.key, unit.stamp] for unit in units], plan, recipe, shares)
        lock.close()


@dataclass(frozen=True)
class _Maker:
    """Makes units, in worker processes."""

    recipe: Recipe
    output: Path
    on_error: str

    def __call__(self, unit: Unit) -> tuple[Unit, Made]:
        start = perf_counter()
        try:
            made = self.recipe.make(unit, self.output)
        except (SettingsError, WriteError):
            raise
        except InputError as error:
            made = Made(skipped={unit.key: str(error)})
        if made.skipped and self.on_error == "stop":
            raise InputError(f"{next(iter(made.skipped.values()))}{SKIP}")
        return unit, replace(made, elapsed_s=perf_counter() - start)


def _make_all(
    make: _Maker, todo: Sequence[Unit], log: Path, *, world: World, workers: int, cuda: bool
) -> None:
    """Make this rank's units and record what is done, one line each."""
    mine, context = world.share(todo), "spawn" if cuda else None
    with (
        closing(run_all(make, mine, workers=workers, chunk=1, context=context)) as results,
        open(log, "w", encoding="utf-8") as file,
        tqdm(total=len(todo), desc=make.recipe.name, disable=not (world.is_main and todo)) as bar,
    ):
        for turn in range(-(-len(todo) // world.size)):
            if turn < len(mine):
                unit, made = next(results)
                file.write(json.dumps([unit.key, unit.stamp, asdict(made)]) + "\n")
                file.flush()
            bar.update(min(world.size, len(todo) - turn * world.size))
            if turn % MEET_EVERY == 0:
                world.barrier()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as workers do: the number of threads changes convolutions' bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(recipe: Recipe, units: Sequence[Unit], shares: Sequence[float]) -> dict[str, Any]:
    keys = [unit.key for unit in units]
    assert len({*keys}) == len(keys)
    plan = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "settings": recipe.describe(),
        "shares": [*shares],
        "inputs": {"count": len(keys), "digest": digest_bytes(json.dumps(keys).encode())},
    }
    return json.loads(json.dumps(plan))  # as it is read back


def _logs(output: Path) -> Iterator[Path]:
    return (output / WORK).glob("made_*.jsonl")


def _read_records(output: Path) -> dict[tuple[str, str], Made]:
    """The units that are done and whose files exist, by key and stamp."""
    done = {}
    for path in sorted(_logs(output)):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line of a process that was killed
                key, stamp, values = json.loads(line)
                entries = [Record(*entry) for entry in values.pop("entries")]
                names = {name for entry in entries for name in (entry.source, entry.target)}
                if all((output / name).exists() for name in names):
                    done[key, stamp] = Made(entries=entries, **values)
    return done


def _finish(
    output: Path,
    made: Sequence[Made],
    plan: dict[str, Any],
    recipe: Recipe,
    shares: Sequence[float],
) -> None:
    entries = [entry for one in made for entry in one.entries]
    skipped = {name: why for one in made for name, why in one.skipped.items()}
    if not entries:
        reason = next(iter(skipped.values()), "there is no input")
        raise InputError(f"{output}: no pair could be made: {reason}")
    fingerprints = {group: f for one in made for group, f in one.fingerprints.items()}
    about = {**plan, "skipped": skipped, "licence": recipe.licence}
    write_dataset(
        output, entries, fingerprints=fingerprints, shares=shares, seed=recipe.seed, about=about
    )
    shutil.rmtree(output / WORK)
    print(f"{output}: {summary(read_json(output / DATASET))}")
    seconds, megapixels = sum(one.elapsed_s for one in made), sum(one.megapixels for one in made)
    if megapixels:
        print(f"{seconds / megapixels:.2f} s of one worker per megapixel made ({megapixels:.1f})")
