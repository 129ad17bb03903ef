"""The folder of a run: its settings, whether it goes on or is finished, its results (layer 4)."""

import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from ipx2p.config import config_differences, load_config, save_config
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, check_writable, hold_lock, read_json, write_json
from ipx2p.images import save_image
from ipx2p.training.checkpoint import damages, find_checkpoints, mark_best, num_steps, sweep
from ipx2p.training.config import TrainConfig
from ipx2p.training.validation import Report, TaskScore

# Settings that may change between two starts: they do not touch what a step learns.
FREE = {
    "run.dir",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_bad_steps",
    "data.cache_dir",
    "data.on_error",  # a run that stopped at a broken picture has seen none before
    "data.workers",
}
# These may change too, but then other roundings make the weights differ in their last bits.
ROUNDING = {
    "train.device",
    "train.accumulate",
    "train.channels_last",
    "train.compile",
    "train.recompute_activations",
    "data.cache",
}


class Run:
    """runs/NAME: begun anew, or opened again with the settings that it learned with.

    Raises: InputError when something was learned there with other settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.run.folder
        self.num_steps = config.train.steps
        self.rounding: list[str] = []  # changed settings of `ROUNDING`
        checkpoints = find_checkpoints(self.folder)
        self.steps_done = num_steps(checkpoints[-1]) if checkpoints else 0
        if checkpoints:
            self._refuse_changes()

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, the validation after them too, and nothing is damaged."""
        if self.steps_done != self.num_steps or not self.has_report(self.num_steps):
            return False
        with suppress(InputError):
            return not damages(find_checkpoints(self.folder)[-1])
        return False

    def begin(self) -> None:
        """Take the folder for this process, and write down settings and command.

        Raises: InputError when it cannot be written, or another process has it.
        """
        check_writable(self.folder)
        self._lock = hold_lock(self.folder / ".lock")
        if self._lock is None:
            raise InputError(
                f"another process is training in {self.folder}: wait for it, or choose another "
                "run.name"
            )
        sweep(self.folder)
        command = shlex.join(["python", *sys.argv])
        print(f"{self.folder}: {command}")
        save_config(self.config, self.folder / "config.yaml")
        with atomic_write(self.folder / "command.txt") as path:
            path.write_text(f"{command}\n")

    def end(self) -> None:
        """Give the folder back."""
        self._lock.close()

    def sheet_path(self, step: int) -> Path:
        """Where the sheet of a validation lies."""
        return self.folder / "samples" / f"step_{step:06d}.png"

    def forget_reports(self, step: int) -> None:
        """Remove the reports of later steps, which will be done again."""
        for path in (self.folder / "samples").glob("step_*.json"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def has_report(self, step: int) -> bool:
        """Whether the validation of a step was done."""
        return self._scores_path(step).exists()

    def save_report(self, step: int, report: Report) -> None:
        """Write the sheet of a validation and, beside it, its scores; keep the best checkpoint.

        Raises: InputError if that of the last step cannot be written; others are only warned of.
        """
        try:
            save_image(report.sheet, self.sheet_path(step))
            write_json({"scores": [asdict(s) for s in report.scores]}, self._scores_path(step))
            mark_best(self.folder, step, report.quality())
        except (InputError, OSError) as error:
            if step == self.num_steps:
                raise
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def final_scores(self) -> list[TaskScore]:
        """The scores of the validation after the last step."""
        scores = read_json(self._scores_path(self.num_steps))["scores"]
        return [TaskScore(**score) for score in scores]

    def _scores_path(self, step: int) -> Path:
        return self.sheet_path(step).with_suffix(".json")

    def _refuse_changes(self) -> None:
        old = load_config(TrainConfig, self.folder / "config.yaml")
        data = self.config.data
        used = data.degrade.of(data.tasks) if data.photos else ()  # only these matter
        before = {group: getattr(old.data.degrade, group) for group in used}
        old.data.degrade = replace(data.degrade, **before)
        # Under another schedule than a constant one the last step shapes every learning rate.
        constant = self.config.optimizer.schedule == "constant"
        free = FREE | ({"train.steps"} if constant else set())
        texts = {
            key: f"{key} was {before!r} and is {after!r}"
            for key, before, after in config_differences(old, self.config)
            if key not in free and not key.startswith("validation.")
        }
        self.rounding = [text for key, text in texts.items() if key in ROUNDING]
        changes = [text for key, text in texts.items() if key not in ROUNDING]
        if changes:
            raise InputError(
                f"{self.folder} learned {self.steps_done} steps with other settings: "
                f"{'; '.join(changes)}. Choose another run.name, or remove the folder"
            )
        if self.steps_done > self.num_steps:
            raise InputError(
                f"{self.folder} has done {self.steps_done} steps, train.steps is "
                f"{self.num_steps}: ask for more, or choose another run.name"
            )
