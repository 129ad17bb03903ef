"""The evaluation at the end of a training: its weights beside others, on held-out pairs (layer 5).

runs/NAME/evaluation/ is that of `evaluate`, with a sheet of pictures and what was asked for. It is
made again when something else is asked for, or the weights have changed.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ipx2p.data.instructions import bank, has_bank, read_bank
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.protocol import OWN_PAIRS
from ipx2p.eval.cases import Case, cases_of_manifest, draw
from ipx2p.eval.engine import evaluate, pick_sizes
from ipx2p.eval.grids import make_overview
from ipx2p.eval.models import EvalConfig, code_digest, parse_models, weights_digest
from ipx2p.eval.records import key_of, read_folders
from ipx2p.eval.summary import summary
from ipx2p.files import read_json, write_json
from ipx2p.images import save_image
from ipx2p.training.config import TUNED, TrainConfig
from ipx2p.training.run import Run

OTHER_WORDS = "{}, other words"  # the task of pairs with sentences of `evaluation.banks`
ASKED, SHEET = ".asked.json", "sheet.png"
PICTURES = 10  # rows of the sheet
WHERE = ("output", "device", "batch_size")  # settings that do not shape it


def check_evaluation(config: TrainConfig) -> None:
    """Raise InputError for what would stop the evaluation after the training."""
    if config.evaluation is not None:
        models = parse_models(_eval_config(config, config.evaluation.models, Path()))
        pick_sizes(models, config.edit_resolution, OWN_PAIRS)  # reads what they are
        cases_of(config)


def evaluate_run(config: TrainConfig, world: World) -> None:
    """Evaluate a run if it is finished, and print the result; it is computed once."""
    if config.evaluation is None or not world.gather(Run(config).is_finished)[0]:
        return
    output = config.run.folder / "evaluation"
    evaluate_models(config, weights_of(config), output, world)
    if world.is_main:
        print(summary(read_folders([output]), next(iter(config.evaluation.models), None)))
        print(f"pictures: {output / SHEET}\neverything: {output / 'index.html'}")


def is_evaluated(config: TrainConfig) -> bool:
    """Whether the evaluation of a finished run is done, as it is asked for."""
    output = config.run.folder / "evaluation"
    return _is_done(output, _asked(config, weights_of(config), cases_of(config)))


def weights_of(config: TrainConfig) -> dict[str, str]:
    """Name -> weights of all that are evaluated; the trained ones come last."""
    return {**config.evaluation.models, TUNED: str(config.run.folder / "weights")}


def cases_of(config: TrainConfig) -> list[Case]:
    """The pairs of the evaluation, and those with other wordings."""
    evaluation = config.evaluation
    path = Path(evaluation.manifest or config.data.validation_manifest)
    cases = draw(cases_of_manifest(path), evaluation.pairs)
    tasks = {case.task for case in cases}
    for task, source in evaluation.banks.items():
        if task not in tasks:
            raise InputError(
                f"evaluation.banks: no pair of {path} has task {task!r}, expected one of "
                f"{', '.join(sorted(tasks))}"
            )
        sentences = bank(source) if has_bank(source) else read_bank(source)
        cases += [
            replace(
                case,
                name=f"{case.name}-words-{number}",
                task=OTHER_WORDS.format(task),
                instruction=sentence,
                group=case.group or case.digest,
            )
            for case in [case for case in cases if case.task == task]
            for number, sentence in enumerate(sentences, 1)
        ]
    return cases


def evaluate_models(
    config: TrainConfig, models: Mapping[str, str], output: Path, world: World
) -> None:
    """Edit the pairs of `config.evaluation` with models and write OUTPUT; nothing if it is there.

    Args:
        models: name -> weights; the differences from the first are reported, if there are others.
    """
    cases = cases_of(config)
    asked = _asked(config, models, cases)
    if world.gather(_is_done(output, asked))[0]:
        return
    if world.is_main:
        if (output / ASKED).is_file() and read_json(output / ASKED) != asked:
            shutil.rmtree(output)
        write_json(asked, output / ASKED)
    world.barrier()
    evaluate(_eval_config(config, models, output), cases)
    if world.is_main:
        sheet = make_overview(read_folders([output]), [*models], PICTURES)
        save_image(sheet, output / SHEET)  # last: it says that all is done
    world.barrier()


def _eval_config(config: TrainConfig, models: Mapping[str, str], output: Path) -> EvalConfig:
    evaluation, edit = config.evaluation, config.validation.edit
    given = [f"{name}={weights}" for name, weights in models.items()]
    settings = [f"@{text}" for text in evaluation.settings] or [""]
    return EvalConfig(
        models=[f"{model}{text}" for model in given for text in settings],
        guidance=[edit.guidance],
        guidance_scale=[edit.guidance_scale],
        image_guidance_scale=[edit.image_guidance_scale],
        fidelity=[edit.fidelity],
        window=[edit.window],
        sampler=[edit.sampler],
        spacing=edit.spacing,
        num_steps=[edit.num_steps],
        seeds=evaluation.seeds,
        resolution=config.edit_resolution,
        baseline=next(iter(models)) if len(models) > 1 and len(settings) == 1 else None,
        output=output,
        device=config.train.device,
        batch_size=config.validation.batch_size,
    )


def _asked(config: TrainConfig, models: Mapping[str, str], cases: list[Case]) -> dict[str, str]:
    """What shapes the evaluation, and the code, which must not change before it is done."""
    settings = asdict(_eval_config(config, models, Path()))
    settings = {name: value for name, value in settings.items() if name not in WHERE}
    weights = [weights_digest(model.folder) for model in parse_models(EvalConfig(**settings))]
    pairs = [(c.name, c.task, c.instruction, c.digest, c.target_digest) for c in cases]
    return {"what": key_of([settings, weights, pairs]), "code": code_digest()}


def _is_done(output: Path, asked: Mapping[str, str]) -> bool:
    """Whether the same was asked for, and done; the code may be older."""
    if not (output / SHEET).is_file() or not (output / ASKED).is_file():
        return False
    return read_json(output / ASKED)["what"] == asked["what"]
