"""The folder of a run: its settings, whether it is new or finished, its results (layer 4)."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipx2p.config import config_differences, load_config, save_config
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, check_writable, hold_lock, read_json, write_json
from ipx2p.images import save_image
from ipx2p.training.checkpoint import (
    damages,
    find_checkpoints,
    forget_best_score,
    mark_best,
    num_steps,
    sweep,
)
from ipx2p.training.config import TrainConfig
from ipx2p.training.learners import LEARNERS
from ipx2p.training.validation import Report

# Settings that may change between two starts: they do not affect what a step learns. A run that
# stopped at its first broken picture has not trained on any, so data.on_error is one of them. The
# pairs that data.prepare makes are compared themselves.
FREE = {
    *("run.dir", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.keep_every", "train.max_bad_steps", "data.cache_dir", "data.on_error"),
    *("data.prepare", "data.workers", "validation.every", "validation.batch_size"),
    "train.processes",  # `resume` compares their number itself
}
# These may change too, but then the weights differ in their last bits.
ROUNDING = {
    *("train.device", "train.accumulate", "train.channels_last", "train.compile", "data.cache"),
    *("train.deterministic", "train.bucket_mb", "train.recompute_activations"),
}


class Run:
    """runs/NAME: a new run, or an earlier one with the same settings.

    Raises: InputError if an earlier run has other settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.run.folder
        self.num_steps = config.train.steps
        self.rounding: list[str] = []  # changed settings of `ROUNDING`
        self.rescored: list[str] = []  # changed settings that change the scores of a validation
        checkpoints = find_checkpoints(self.folder)
        self.steps_done = num_steps(checkpoints[-1]) if checkpoints else 0
        if checkpoints:
            self._refuse_changes()

    @property
    def is_finished(self) -> bool:
        """Whether all steps and the validation after them are done, and nothing is damaged or
        to be scored otherwise."""
        is_done = self.steps_done == self.num_steps and self.has_report(self.num_steps)
        if self.rescored or not is_done:
            return False
        return not damages(find_checkpoints(self.folder)[-1])

    def begin(self) -> None:
        """Lock the folder for this process, and record settings and command.

        Raises: InputError if it cannot be written, or another process holds it.
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
        if self.rescored:
            print(f"{'; '.join(self.rescored)}: earlier scores do not compare, `best` starts again")
            forget_best_score(self.folder)
            self._scores_path(self.steps_done).unlink(missing_ok=True)  # to be validated again
        save_config(self.config, self.folder / "config.yaml")
        with atomic_write(self.folder / "command.txt") as path:
            path.write_text(f"{command}\n")

    def end(self) -> None:
        """Unlock the folder."""
        self._lock.close()

    def sheet_path(self, step: int) -> Path:
        """The path of the sheet of a validation."""
        return self.folder / "samples" / f"step_{step:06d}.png"

    def forget_reports(self, step: int) -> None:
        """Remove the reports of later steps, which will run again."""
        for path in (self.folder / "samples").glob("step_*.json"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def has_report(self, step: int) -> bool:
        """Whether the validation of a step was done."""
        return self._scores_path(step).exists()

    def save_report(self, step: int, report: Report) -> None:
        """Write the sheet of a validation and, beside it, its scores; mark the best checkpoint.

        Raises: InputError if that of the last step cannot be written; others only give a warning.
        """
        try:
            save_image(report.sheet, self.sheet_path(step))
            write_json({"scores": report.scores}, self._scores_path(step))
            mark_best(self.folder, step, report.quality())
        except (InputError, OSError) as error:
            if step == self.num_steps:
                raise
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def final_scores(self) -> list[dict[str, Any]]:
        """The scores of the validation after the last step."""
        return read_json(self._scores_path(self.num_steps))["scores"]

    def _scores_path(self, step: int) -> Path:
        return self.sheet_path(step).with_suffix(".json")

    def _refuse_changes(self) -> None:
        old = load_config(TrainConfig, self.folder / "config.yaml")
        data, schedule = self.config.data, self.config.optimizer.schedule
        used = data.degrade.of(data.tasks) if data.photos else ()  # only these matter
        before = {group: getattr(old.data.degrade, group) for group in used}
        old.data.degrade = replace(data.degrade, **before)
        texts = {
            key: f"{key} was {before!r} and is {after!r}"
            for key, before, after in config_differences(old, self.config)
            if not key.startswith("evaluation")
            and key not in FREE
            and not (key == "train.steps" and schedule == "constant")
        }
        self.rounding = [text for key, text in texts.items() if key in ROUNDING]
        validation = {key for key in texts if key.startswith("validation.")}
        self.rescored = [texts[key] for key in texts if key in validation]
        changes = [text for key, text in texts.items() if key not in ROUNDING | validation]
        if changes:
            hint = "Choose another run.name, or remove the folder"
            if "train.steps" in texts:
                part = LEARNERS[self.config.objective.kind].part
                fresh = getattr(self.config.model, part, None)
                hint = (
                    f"A {schedule} schedule sets every learning rate by the number of steps. To "
                    f"train further, start another run: run.name=NEW model.weights="
                    f"{self.folder / 'weights'}{f' model.{part}=null' if fresh else ''}"
                )
            raise InputError(
                f"{self.folder} learned {self.steps_done} steps with other settings: "
                f"{'; '.join(changes)}. {hint}"
            )
        if self.steps_done > self.num_steps:
            raise InputError(
                f"{self.folder} has done {self.steps_done} steps, train.steps is "
                f"{self.num_steps}: ask for more, or choose another run.name"
            )
