"""Edit what is missing, score it, report: the act of `compare` and of `evaluate` (layer 4).

OUTPUT/  edits/KEY.png  records_RANK.jsonl                  what was made: the report needs no more
         index.html  table.*  edits.csv  grids/  curves/    the report
"""

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from ipx2p.devices import dtype_name, pick_device, pick_dtype
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.distributed import World, open_world
from ipx2p.editing.files import load_editor
from ipx2p.editing.settings import pick_resolution
from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.judged import export_requests
from ipx2p.eval.benchmarks.protocol import OWN_PAIRS, Protocol, read_mask
from ipx2p.eval.benchmarks.registry import PROTOCOLS
from ipx2p.eval.built_in import (
    autoencoders,
    built_in_trials,
    find_result,
    found_trials,
    make_built_in,
)
from ipx2p.eval.cases import Case, Sizes
from ipx2p.eval.edits import Maker
from ipx2p.eval.lines import check_baseline
from ipx2p.eval.models import (
    EvalConfig,
    Model,
    Trial,
    code_digest,
    make_trials,
    parse_models,
    weights_digest,
)
from ipx2p.eval.networks import Networks
from ipx2p.eval.records import IDENTITY, Record, Records, file_stem, key_of, read_records
from ipx2p.eval.reporting import write_report
from ipx2p.eval.scores import lacking, measure, pick_metrics, scored_by
from ipx2p.files import (
    atomic_write,
    check_writable,
    digest_file,
    hold_lock,
    remove_stale_temporaries,
)
from ipx2p.images import load_image, resize
from ipx2p.models.unet import UNet
from ipx2p.models.vae import VAE
from ipx2p.weights.readers import find_folder

TIMEOUT = timedelta(days=7)  # finished processes wait for the others
NETWORKS = ("clip", "dino", "lpips", "dists")  # options that name what measures
# What all edits of a folder have in common; the code last, since it says the least.
SHAPES_ALL = ("negative_instruction", "resolution", "dtype", "code")
CODE_CHANGED = (
    "by other code (networks, samplers, guidance or editing have changed since), so that they "
    "would not compare with new ones"
)
REQUESTS = "requests.jsonl"  # to a judge
MEASURED = 16  # edits of a case between writes: its features are computed once for them
RECORDS = re.compile(r"records_\d+\.jsonl")
EXTRACTED = "extracted"  # pictures that a benchmark keeps in tables


def config_of(options: dict[str, Any]) -> EvalConfig:
    """The settings among the options of a command line."""
    known = {item.name for item in fields(EvalConfig)}
    given = {name: value for name, value in options.items() if name in known}
    networks = {name: options[name] for name in NETWORKS if options[name] is not None}
    return EvalConfig(**given, networks=networks)


def evaluate(config: EvalConfig, cases: Sequence[Case], choosing: Sequence[Case] = ()) -> None:
    """Edit the cases with every model, score and report; only what is missing is computed.

    Several processes of `torchrun` share the work.

    Args:
        choosing: other cases to choose the best scales on; none: the cases themselves.
    Raises: InputError for bad arguments or files, before any weights are loaded where possible.
    """
    models = parse_models(config)
    reported = [case for case in cases if not case.is_step]
    protocol = PROTOCOLS.get(cases[0].benchmark, OWN_PAIRS)
    sizes, warned = pick_sizes(models, config.resolution, protocol)
    if choosing:
        choosing = _check_choosing(cases, choosing, config.select_on)
    _check(config, models, [*cases, *choosing], sizes)
    cuda = pick_device(config.device).type == "cuda"
    with open_world(cuda=cuda, timeout=TIMEOUT) as world:
        # Each process has its own GPU, even if the device is named without a number.
        device = pick_device("auto" if config.device == "cuda" else config.device, world.local_rank)
        networks = Networks.load(
            device,
            **config.networks,
            preprocessing=protocol.preprocessing,
            paper_compat=config.paper_compat,
        )
        asked = config.metrics or [*protocol.measured] or None
        metrics = pick_metrics(asked, reported, networks)
        weak = config.weak_weights and weights_digest(find_folder(config.weak_weights))
        edits = [_trials(model, cases, choosing, sizes, config, device, weak) for model in models]
        vaes = autoencoders(models)
        built_in = built_in_trials(reported, vaes, sizes)
        trials = [*built_in, *chain.from_iterable(edits)]
        check_baseline([trial.record(picture=None) for trial in trials], config.baseline)
        world.check_same("what is compared", key_of([trial.key for trial in trials]))
        lock = _take(config.output, trials, sizes, world)
        for warning in warned if world.is_main else ():
            warnings.warn(warning, stacklevel=2)
        maker = Maker(trials, Records(config.output, world.rank), world, sizes)
        _count(maker, [*chain.from_iterable(edits)])
        maker.copy(built_in, make_built_in(vaes, sizes, device))
        for model, mine in zip(models, edits, strict=True):
            _make(maker, model, mine, config, device)
        maker.finish()
        shown = [trial for trial in trials if not trial.case.is_step]
        score(shown, maker.records, metrics, networks, sizes, world)
        if world.is_main:
            needs = {} if asked else lacking(reported, networks)
            told = [how for need, how in needs.items() if need in ("target", "captions", *NETWORKS)]
            notes = [f"Other metrics need {'; '.join(told)}."] if told else []
            export_results(trials, maker.records)
            print(*_report(config, protocol, shown, maker.records, notes), sep="\n")
            lock.close()


def _count(maker: Maker, edits: Sequence[Trial]) -> None:
    """Say what is to be done."""
    edits = [trial for trial in edits if trial.settings is not None]
    count, todo = len({trial.edit for trial in edits}), len(maker.missing(edits))
    maker.world.print(f"{count} edits, {count - todo} of them are there already")


def _make(
    maker: Maker, model: Model, trials: Sequence[Trial], config: EvalConfig, device: torch.device
) -> None:
    """Edit what is missing of a model, or fetch it from the folder that it is."""
    if model.has_weights:
        where = (model.folder, config.weak_weights, device, config.dtype, config.compile)
        maker.edit(trials, partial(load_editor, *where), config)
    else:
        maker.copy(trials, lambda trial: load_image(find_result(trial.case, model)))


def _report(
    config: EvalConfig,
    protocol: Protocol,
    trials: Sequence[Trial],
    records: Records,
    notes: Sequence[str],
) -> list[Path]:
    """Write the report, and what a judge is asked."""
    shown = [records.by_key[key] for key in dict.fromkeys(trial.key for trial in trials)]
    paths = write_report(config.output, shown, config.baseline, config.grids, notes=notes)
    if protocol.judge:
        paths.append(config.output / REQUESTS)
        asked = [record for record in shown if not record.selects]
        export_requests(asked, paths[-1], protocol.judge)
    return paths


def export_results(trials: Sequence[Trial], records: Records) -> None:
    """Copy edits to results/MODEL/, named as the benchmark's own script wants them."""
    for trial in trials:
        record = records.by_key[trial.key]
        if trial.settings is not None and trial.case.results and record.picture is not None:
            folder = file_stem(record.model, key_of([asdict(trial.settings), record.seed]))
            path = records.folder / "results" / folder / trial.case.results[0]
            if path.is_file() and digest_file(path) == record.picture["digest"]:
                continue
            with atomic_write(path) as temporary:
                temporary.write_bytes(record.path.read_bytes())


def pick_sizes(
    models: Sequence[Model], resolution: int | None, protocol: Protocol
) -> tuple[Sizes, list[str]]:
    """The sizes of edits and scores, and warnings about them.

    Raises: InputError for models whose edits would have different sizes.
    """
    picked, notes = {}, {}
    for model in models:
        for window in dict.fromkeys(one.window for one in model.settings):
            picked[model.name] = pick_resolution(model.folder, resolution, window)
            notes |= dict.fromkeys(picked[model.name][2])
    at_target = protocol.score_at_target
    if not picked:  # pictures that were made elsewhere
        return Sizes(resolution, 1, at_target), []
    first, *others = picked
    size, multiple, _ = picked[first]
    native = protocol.native and resolution is None
    for other in others:
        if picked[other][1] != multiple:
            raise InputError(
                f"the autoencoder of {first} rounds sides to {multiple} pixels, that of {other} to "
                f"{picked[other][1]}: their edits would differ in size: evaluate them apart"
            )
        if picked[other][0] != size and not native:
            raise InputError(
                f"{first} edits at {size} pixels, {other} at {picked[other][0]}: choose one "
                "--resolution for both"
            )
    return Sizes(None if native else size, multiple, at_target), [*notes]


def _trials(
    model: Model,
    cases: Sequence[Case],
    choosing: Sequence[Case],
    sizes: Sizes,
    config: EvalConfig,
    device: torch.device,
    weak: str | None,
) -> list[Trial]:
    """All edits of a model: of the cases, and of those that choose its scales."""
    if not model.has_weights:
        return found_trials([case for case in cases if not case.is_step], model, sizes)
    made_with = {
        "weights": model.source,
        "weights_digest": weights_digest(model.folder),
        "code": code_digest(),
        "negative_instruction": config.negative_instruction,
        "resolution": sizes.resolution,
        "dtype": dtype_name(pick_dtype(config.dtype, device)),
    }
    make = partial(make_trials, model=model, seeds=config.seeds, made_with=made_with, weak=weak)
    return [*make(cases), *make(choosing, selects=True)]


def score(
    trials: Sequence[Trial],
    records: Records,
    metrics: Sequence[str],
    networks: Networks,
    sizes: Sizes,
    world: World,
) -> None:
    """Measure what has no scores yet; cases are shared among the processes."""
    how = scored_by(metrics, networks, at_target=sizes.at_target)
    todo: dict[Case, list[Record]] = {}
    for trial in {trial.key: trial for trial in trials}.values():
        record = records.by_key[trial.key]
        if record.picture is not None and not how.items() <= record.scored_by.items():
            todo.setdefault(trial.case, []).append(record)
    world.barrier()  # all have looked before anyone adds one
    shared = world.share([*todo.items()])
    for case, mine in tqdm(shared, unit="case", desc="scores", disable=not world.is_main):
        size = sizes.of_scores(case)
        source = resize(load_image(case.source), size)
        target = None if case.target is None else resize(load_image(case.target), size)
        mask = None if case.mask is None else read_mask(case.mask)
        for some in (mine[i : i + MEASURED] for i in range(0, len(mine), MEASURED)):
            pictures = (load_image(record.path) for record in some)
            compared = (source, target, case.captions, mask, networks, metrics)
            numbers = measure(pictures, *compared, at_target=sizes.at_target)
            for place, record in enumerate(some):
                scores = {name: values[place].item() for name, values in numbers.items()}
                all_scores, all_how = record.scores | scores, record.scored_by | how
                now = round(time.time(), 3)
                records.add(replace(record, scores=all_scores, scored_by=all_how, scored_at=now))
    world.barrier()
    records.read()


def _check_choosing(
    cases: Sequence[Case], choosing: Sequence[Case], path: Path | None
) -> list[Case]:
    """Those of the reported tasks; InputError for a task without any, or a reported pair."""
    tasks = {case.task for case in cases}
    if lacking := tasks - {case.task for case in choosing}:
        raise InputError(f"--select-on {path} has no pairs of the task {min(lacking)!r}: add some")
    sources = {(case.digest, case.task) for case in cases}
    if shared := [case for case in choosing if (case.digest, case.task) in sources]:
        raise InputError(
            f"--select-on {path}: {len(shared)} of its pictures are also reported on, "
            f"{shared[0].source} is one: choose the scales on other pictures"
        )
    return [case for case in choosing if case.task in tasks]


def _check(
    config: EvalConfig, models: Sequence[Model], cases: Sequence[Case], sizes: Sizes
) -> None:
    """Raise InputError for what would stop the run later, before any weights are loaded."""
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}, expected 1 or more")
    if config.grids < 0:
        raise InputError(f"grids is {config.grids}, expected 0 or more pictures")
    if config.weak_weights is not None:
        find_folder(config.weak_weights)
    for model in models:
        if model.has_weights:
            _check_model(model)
    output = config.output.resolve()
    for case in cases:
        folders = case.source.resolve().parents
        if output in folders and output / EXTRACTED not in folders:
            raise InputError(
                f"{case.source} lies in the output folder {config.output}: choose another --output"
            )
        case.check(of_one_size=not sizes.at_target)


def _check_model(model: Model) -> None:
    """Raise InputError for settings that its networks do not allow, or damaged weights."""
    VAE.load(model.folder / "vae", None)
    layers = UNet.load(model.folder / "unet", None).attention_layers  # weights stay on disk
    schedule = Schedule(ScheduleConfig.load(model.folder))
    for one in model.settings:
        one.plan(schedule)
        one.spec.check_layers(layers)


def _take(output: Path, trials: Sequence[Trial], sizes: Sizes, world: World) -> BinaryIO | None:
    """Lock the output folder until the main process closes the returned lock.

    Raises: InputError for a folder with other files, edits that would not compare with these, or
        another run at work.
    """
    check_writable(output)
    world.check_shared(output, "--output")
    _check_earlier(output, trials, sizes)
    world.barrier()  # all have checked before anything is written
    lock = hold_lock(output / ".lock") if world.is_main else None
    if world.any(world.is_main and lock is None):
        raise InputError(
            f"another process is computing in {output}: wait for it, or choose another --output"
        )
    if world.is_main:
        _check_earlier(output, trials, sizes)  # another run may have just finished in it
        remove_stale_temporaries(output / "edits")
    world.barrier()
    return lock


def _check_earlier(output: Path, trials: Sequence[Trial], sizes: Sizes) -> None:
    """Raise InputError unless what a folder holds compares with the edits to be made."""
    earlier = read_records(output)
    names = {child.name for child in output.iterdir() if not child.name.startswith(".")}
    others = {name for name in names - {EXTRACTED, "edits"} if not RECORDS.fullmatch(name)}
    if not earlier and others:
        raise InputError(f"{output} holds other files, and no records: choose another --output")
    made = {trial.model.name: trial.made_with for trial in trials if trial.settings}
    for record in earlier if made else ():
        now = made.get(record.model)
        shaping = ("weights_digest", *SHAPES_ALL) if now else SHAPES_ALL
        now = now or next(iter(made.values()))
        for name in shaping if record.settings else ():
            found = record.made_with.get(name)
            if found != now[name]:
                said = {
                    "code": CODE_CHANGED,
                    "weights_digest": f"by other weights that were called {record.model!r}",
                }
                why = said.get(name, f"with {name} {found!r}, now {now[name]!r}")
                raise InputError(
                    f"{output} holds edits that were made {why}: choose another --output"
                )
    rows = {t.key: t for t in trials if t.model == IDENTITY}
    sizes_now = {
        t.record(picture=None).place: "{} x {}".format(*sizes.of_scores(t.case))
        for t in rows.values()
    }
    for record in earlier:
        if record.case.get("benchmark") != trials[0].case.benchmark:
            raise InputError(
                f"{output} holds edits of another benchmark ({record.case.get('benchmark')!r}): "
                "choose another --output"
            )
        if record.model == IDENTITY and sizes_now.get(record.place, record.size) != record.size:
            raise InputError(
                f"{output} holds {record.case['name']} at {record.size}, now it is "
                f"{sizes_now[record.place]}: choose another --output"
            )
