"""Making the pictures and records of trials, shared among the processes of a run (layer 4)."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ipx2p.devices import advice_out_of_memory
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.editing.files import surroundings
from ipx2p.editing.settings import Edited
from ipx2p.errors import InputError, NotFiniteError
from ipx2p.eval.cases import Sizes
from ipx2p.eval.models import EvalConfig, Trial, described
from ipx2p.eval.records import Records
from ipx2p.files import digest_file
from ipx2p.images import load_image, resize, save_image
from ipx2p.models.unet import UNet
from ipx2p.seeds import generator

MAX_LOADED = 64  # pictures held in memory
AFTER_FAILED = "the edit before it is not finite"
ADVICE = "are written and kept; try a smaller --batch-size, or --one-branch-at-a-time"


@dataclass
class Maker:
    """Makes trials whose pictures are missing.

    trials: all of the run, so that those that share a picture get their records together.
    """

    trials: Sequence[Trial]
    records: Records
    world: World
    sizes: Sizes

    def __post_init__(self) -> None:
        self.by_edit: dict[str, list[Trial]] = {}
        for trial in self.trials:
            self.by_edit.setdefault(trial.edit, []).append(trial)

    def missing(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials whose picture is not there, the first of each picture."""
        first: dict[str, Trial] = {}
        for trial in trials:
            first.setdefault(trial.edit, trial)
        return [trial for edit, trial in first.items() if edit not in self.records.by_edit]

    def finish(self) -> None:
        """Wait for all processes, and give each trial the record of its picture.

        Raises: InputError if pictures are still missing.
        """
        self.world.barrier()
        self.records.read()
        if lost := self.missing(self.trials):
            raise InputError(
                f"{len(lost)} of {len(self.by_edit)} edits are not in {self.records.folder}: run "
                "it again"
            )
        bare = [trial for trial in self.trials if trial.key not in self.records.by_key]
        self.world.barrier()  # all have counted before anyone adds one
        for trial in self.world.share(bare):
            made = self.records.by_edit[trial.edit]
            names = ("picture", "failed", "made_at", "evaluations", "seconds", "computed_on")
            self.records.add(trial.record(**{name: getattr(made, name) for name in names}))
        self.world.barrier()
        self.records.read()

    def keep(self, trial: Trial, image: Image.Image | None, **made: Any) -> None:
        """Write a picture, then the records of all that share it: a record has its picture."""
        made |= {"picture": None, "made_at": round(time.time(), 3)}
        if image is not None:
            file = f"edits/{trial.edit}.png"
            path = self.records.folder / file
            save_image(image, path)
            size = {"width": image.width, "height": image.height}
            made["picture"] = {"file": file, "digest": digest_file(path), **size}
        for other in {t.key: t for t in self.by_edit[trial.edit]}.values():
            self.records.add(other.record(**made))

    def copy(self, trials: Sequence[Trial], make: Callable[[Trial], Image.Image]) -> None:
        """Make pictures that need no editor, one by one; each process its share."""
        todo = self.missing(trials)
        self.world.barrier()  # all have counted before anyone adds one
        mine, is_main = self.world.share(todo), self.world.is_main
        for trial in tqdm(mine, unit="picture", desc="other rows", disable=not is_main):
            self.keep(trial, make(trial))
        self.world.barrier()
        self.records.read()

    def edit(
        self,
        trials: Sequence[Trial],
        load: Callable[[], tuple[Editor, UNet | None]],
        config: EvalConfig,
    ) -> None:
        """Edit what is missing of one model's trials; those that follow others come after them.

        Args:
            load: gives the editor and the weak network, called if there is anything to do.
        """
        editor = None
        for depth in range(max((trial.depth for trial in trials), default=-1) + 1):
            todo = self.missing([trial for trial in trials if trial.depth == depth])
            if not todo:  # for none of the processes
                continue
            self.world.barrier()  # all have counted before anyone adds one
            if mine := self._part_of(todo, config.batch_size):
                editor = editor or _EditRun(self, *load(), config)
                editor.run(mine)
            self.world.barrier()
            self.records.read()

    def _part_of(self, trials: Sequence[Trial], batch_size: int) -> list[Trial]:
        """This process's share: whole batches, drawn at random since some settings cost more."""
        batches = [*_batches(trials, batch_size)]
        drawn = torch.randperm(len(batches), generator=generator(0, "compare shares")).tolist()
        return [trial for number in sorted(self.world.share(drawn)) for trial in batches[number]]

    def source(self, trial: Trial) -> Image.Image | None:
        """The picture that is edited: that of the case, or the result of the edit before it."""
        if trial.after is None:
            return resize(load_image(trial.case.source), self.sizes.of_edit(trial.case))
        before = self.records.by_edit[trial.after.edit]
        return None if before.picture is None else load_image(before.path)


@dataclass
class _EditRun:
    """Edits of one model."""

    maker: Maker
    editor: Editor
    weak: UNet | None
    config: EvalConfig

    def run(self, trials: Sequence[Trial]) -> None:
        """Edit, and write picture and records of each trial as soon as its batch is done."""
        records, is_main = self.maker.records, self.maker.world.is_main
        with (
            advice_out_of_memory(lambda: f"{len(records.by_edit)} edits {ADVICE}"),
            tqdm(total=len(trials), unit="edit", disable=not is_main) as bar,
        ):
            for batch in _batches(trials, MAX_LOADED):
                sources = {trial.source_key: trial for trial in batch}
                images = {key: self.maker.source(trial) for key, trial in sources.items()}
                for trial in batch:
                    if images[trial.source_key] is None:
                        self.maker.keep(trial, None, failed=AFTER_FAILED)
                        bar.update()
                self._edit([t for t in batch if images[t.source_key] is not None], images, bar)

    def _edit(self, batch: list[Trial], images: dict[str, Image.Image], bar: tqdm) -> None:
        """Edit trials of the same settings.

        An edit that is not finite, as at extreme scales, is recorded as such; if one fails, those
        left of its batch are edited one by one.
        """
        if not batch:
            return
        settings, how = batch[0].settings, self._how()
        done = set()

        def on_edit(index: int, edited: Edited) -> None:
            done.add(index)
            cost = {"evaluations": edited.evaluations, "seconds": round(edited.seconds, 4)}
            self.maker.keep(batch[index], edited.image, **cost, computed_on=how)
            bar.update()

        try:
            self.editor.edit(
                [images[trial.source_key] for trial in batch],
                [trial.case.instruction for trial in batch],
                **asdict(settings),
                resolution=None,  # they have their size
                seeds=[trial.seed for trial in batch],
                negative_instructions=self.config.negative_instruction,
                weak=self.weak if settings.spec.needs("weak") else None,
                batch_size=self.config.batch_size,
                batch_branches=self.config.batch_branches,
                on_edit=on_edit,
            )
        except NotFiniteError as error:
            if len(batch) == 1:
                self.maker.keep(batch[0], None, failed=str(error), computed_on=how)
                bar.update()
            else:
                for index in sorted({*range(len(batch))} - done):
                    self._edit([batch[index]], images, bar)

    def _how(self) -> dict[str, Any]:
        config = self.config
        batching = {"batch_size": config.batch_size, "batch_branches": config.batch_branches}
        return surroundings(self.editor) | batching | {"compiled": config.compile}


def _batches(trials: Sequence[Trial], size: int) -> Iterator[list[Trial]]:
    """Runs of at most `size` trials with the same settings."""
    for _, group in itertools.groupby(trials, key=lambda trial: described(trial.settings)):
        same = [*group]
        for start in range(0, len(same), size):
            yield same[start : start + size]
