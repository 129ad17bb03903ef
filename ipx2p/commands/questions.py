"""A question: its variants, their trainings, and the answer that they give together (layer 5).

OUTPUT/  VARIANT-SEED/  VARIANT-SEED.yaml  VARIANT-SEED.log    a run, its settings, what it printed
         others/                                               edits of models not trained here
         answer/                                               table, sheet, curve, and the report
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from ipx2p.commands.evaluation import check_evaluation, evaluate_models, is_evaluated
from ipx2p.commands.runner import Job, run_jobs
from ipx2p.commands.train import prepare_data
from ipx2p.config import load_config, save_config
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.eval.curves import has_matplotlib
from ipx2p.eval.grids import make_overview
from ipx2p.eval.records import Record, read_folders
from ipx2p.eval.reporting import write_report
from ipx2p.eval.summary import (
    answers,
    as_untrained,
    as_variant,
    csv_of_answers,
    curve_of_answers,
    tables_of_answers,
)
from ipx2p.eval.tables import escaped, markdown
from ipx2p.files import atomic_write
from ipx2p.images import save_image
from ipx2p.training.config import TUNED, EvaluationConfig, TrainConfig
from ipx2p.training.run import Run

PICTURES = 6  # rows of the sheet
GRIDS = 4  # pictures of the page


@dataclass
class Question:
    """A file of configs/questions.

    config: the training that all variants have in common, with `overrides`. variants: name ->
    overrides; the others are compared with the first. If all names start with numbers, a curve is
    drawn over them; axis: what they count. seeds: of training.
    """

    title: str = MISSING
    config: str = MISSING
    overrides: list[str] = field(default_factory=list)
    variants: dict[str, list[str]] = MISSING
    axis: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True)
class Training:
    """One run of a question."""

    variant: str
    seed: int
    config: TrainConfig

    @property
    def is_done(self) -> bool:
        """Whether it is trained and evaluated."""
        return Run(self.config).is_finished and is_evaluated(self.config)


def read_question(
    path: Path, overrides: Sequence[str], config: str | None, seeds: Sequence[int] | None
) -> Question:
    """Read a question, with what the command line changes.

    Args:
        overrides: of its trainings, and of its `evaluation`. config, seeds: instead of its own.
    Raises: InputError that names the file and the key.
    """
    own = [text for text in overrides if text.startswith("evaluation.")]
    question = load_config(Question, path, own)
    others = [text for text in overrides if text not in own]
    question = replace(
        question,
        config=config or question.config,
        seeds=[*(seeds or question.seeds)],
        overrides=[*question.overrides, *others],
    )
    if len(question.variants) < 1:
        raise InputError(f"{path}: variants is empty, expected NAME: [key=value, ...]")
    if len({*question.seeds}) < len(question.seeds) or min(question.seeds, default=-1) < 0:
        raise InputError(f"{path}: seeds is {question.seeds}, expected different ones, from 0 on")
    if taken := {*question.variants} & {*question.evaluation.models}:
        raise InputError(f"{path}: {min(taken)!r} is a variant and a model of the evaluation")
    folders = [_folder_name(name) for name in question.variants]
    if len({*folders}) < len(folders) or "" in folders:
        raise InputError(f"{path}: variants need names that differ in letters or digits")
    return question


def trainings_of(question: Question, output: Path) -> list[Training]:
    """All runs, seed by seed, so that an interrupted question has every variant.

    Raises: InputError for settings that cannot be, which names the variant.
    """
    found = []
    for seed in question.seeds:
        for variant, overrides in question.variants.items():
            try:
                config = TrainConfig.load(question.config, [*question.overrides, *overrides])
                name = f"{_folder_name(variant)}-{seed}"
                config.run = replace(config.run, name=name, dir=str(output), seed=seed)
                config.evaluation = replace(question.evaluation, models={})
                config.check()
            except InputError as error:
                raise InputError(f"variant {variant!r}: {error}") from error
            found.append(Training(variant, seed, config))
    return found


def answer(question: Question, output: Path, processes: int | None = None) -> None:
    """Train what is not trained yet, evaluate, write the answer and print it."""
    trainings = trainings_of(question, output)
    others = replace(trainings[0].config, evaluation=question.evaluation)
    for config in (others, *(one.config for one in trainings)):
        prepare_data(config, World())
        check_evaluation(config)
    jobs = []
    for one in trainings:
        path = one.config.run.folder.with_name(f"{one.config.run.name}.yaml")
        save_config(one.config, path)
        jobs.append(Job(one.config.run.folder, path, one.config.train.steps, one.is_done))
    run_jobs(jobs, processes)
    if stopped := [one.config.run.folder for one in trainings if not one.is_done]:
        raise InputError(f"{stopped[0]} was stopped: run the same command to resume")
    records = []
    if question.evaluation.models:
        evaluate_models(others, question.evaluation.models, output / "others", World())
        records += as_untrained(read_folders([output / "others"]))
    for one in trainings:
        made = read_folders([one.config.run.folder / "evaluation"])
        records += as_variant(made, one.variant, TUNED, one.seed)
    records = [*{record.place: record for record in records}.values()]  # inputs of all are the same
    print(_write(question, records, output / "answer"))


def _write(question: Question, records: Sequence[Record], output: Path) -> str:
    """Write the answer; returns what is to be printed."""
    variants = [*question.variants]
    found = answers(records, variants, len(question.evaluation.seeds))
    tables = tables_of_answers(found, variants)
    write_report(output, records, None, GRIDS)
    paths = [output / name for name in ("answer.md", "answer.csv", "sheet.png", "index.html")]
    head = f"# {escaped(question.title)}\n\n"
    texts = [head + "\n\n".join(map(markdown, tables)) + "\n", csv_of_answers(found)]
    for path, text in zip(paths[:2], texts, strict=True):
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    shown = [*question.evaluation.models, *variants]
    save_image(make_overview(records, shown, PICTURES), paths[2])
    curve = has_matplotlib() and curve_of_answers(found, variants, question.axis)
    if curve:
        paths.append(output / "curve.png")
        with atomic_write(paths[-1]) as temporary:
            temporary.write_bytes(curve)
    return "\n".join([markdown(tables[0]), "", *map(str, paths)])


def _folder_name(variant: str) -> str:
    """A name that any file system takes, and no setting of a model."""
    return re.sub(r"[^\w.+-]+", "_", variant).strip("_.")
