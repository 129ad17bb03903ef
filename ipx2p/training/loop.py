"""The training loop: one linear function from settings to a trained model (layer 4)."""

import copy
import itertools
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

from ipx2p.data.loader import StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.devices import pick_device
from ipx2p.distributed import World, open_world
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes
from ipx2p.training.checkpoint import (
    CheckpointSaver,
    damages,
    find_checkpoints,
    is_trained,
    load_checkpoint,
    point_at,
    set_aside,
    world_size,
)
from ipx2p.training.config import StepsConfig, TrainConfig
from ipx2p.training.ema import EMA
from ipx2p.training.interrupts import Interrupts, Stopped
from ipx2p.training.learners import LEARNERS, Learner
from ipx2p.training.monitor import Monitor
from ipx2p.training.optimizer import Stepper, learning_rate, make_optimizer
from ipx2p.training.run import Run
from ipx2p.training.samples import (
    check_unchanged,
    note_pairs,
    open_pairs,
    open_stream,
    task_table,
    task_weights,
)
from ipx2p.training.speed import prepare, set_layout
from ipx2p.training.validation import fixed_pairs, score_table


def train(config: TrainConfig, *, dry_run: bool = False) -> None:
    """Train, or go on with, the run that the settings describe; the end prints its scores.

    Args:
        dry_run: build everything, take no step and write nothing.
    Raises: InputError for bad settings, weights or pictures, on every process.
    """
    cuda = config.train.device != "cpu" and torch.cuda.is_available()
    with open_world(cuda=cuda) as world:
        interrupts = Interrupts(world)
        with interrupts.listen():
            _train(config, world, interrupts, dry_run)
            interrupts.settle()


def _train(config: TrainConfig, world: World, interrupts: Interrupts, dry_run: bool) -> None:
    device = pick_device(config.train.device, world.local_rank)
    check_batch(config.train, world)
    run = Run(config)
    if world.gather(run.is_finished)[0]:
        world.print(f"{run.folder} is finished, {run.num_steps} steps were done before")
        print_results(run, world)
        return
    for warning in warnings(config, world):
        world.print(f"warning: {warning}")

    train_pairs, held_out = open_pairs(config.data)
    fixed = fixed_pairs(
        held_out,
        per_task=config.validation.pairs_per_task,
        resolution=config.data.resolution,
        seed=config.run.seed,
    )
    learner: Learner = LEARNERS[config.objective.kind](config, device, fixed, world)
    check_agreement(config, learner, world)
    set_layout(learner.module, config.train)
    average = EMA(learner.module, config.train.ema_decay)
    learner.network = prepare(learner.module, config.train, world)
    plain = copy.copy(learner.module)  # the same weights, not compiled
    optimizer = make_optimizer(learner.module, config.optimizer)
    where = f"{world.size} x {device.type}" if world.size > 1 else str(device)
    world.print(f"{len(train_pairs)} pairs to train on, {len(fixed)} held out, on {where}")
    world.print(task_table(train_pairs, task_weights(config.data, train_pairs)))
    if dry_run:
        world.print("dry run: everything is in order, nothing was written")
        return

    check_unchanged(train_pairs, run.folder, world)
    if world.is_main:
        run.begin()
        note_pairs(train_pairs, run.folder)
    world.barrier()
    step, is_whole = resume(run, learner, average, optimizer, world)
    saved = step if is_whole else -1
    is_reported = world.gather(run.has_report(step))[0]
    flops_per_sample = learner.flops_per_sample()
    monitor = Monitor(
        run.folder, config.train, world, device, steps_done=step, flops_per_sample=flops_per_sample
    )
    on_cuda = device.type == "cuda"  # on the CPU the writing would only compete with the steps
    saver = CheckpointSaver(
        run.folder, learner.part, config.train, world_size=world.size, background=on_cuda
    )
    stepper = Stepper(learner, optimizer, config.optimizer, world)

    def checkpoint() -> None:
        check_finite(run, learner.module, step)
        world.check_same(f"step {step}: the trained network", weights_hash(learner.module))
        world.check_same(f"step {step}: its average", weights_hash(average.module))
        if world.is_main:
            averaged = learner.weights(average.module, whole=saver.newest is None)
            saver.save(step, averaged, learner.weights(plain, whole=False), optimizer)

    def validate() -> None:
        report = learner.validate(average.module, plain, interrupts.check)
        monitor.report(step, report)
        if world.is_main:
            saver.wait()
            run.save_report(step, report)

    stopped = False
    try:
        stream = open_stream(config, train_pairs, learner, world, interrupts.check)
        sampler = StepSampler(
            range(step, config.train.steps),
            config.train.batch_size,
            accumulate=config.train.accumulate,
            world=world,
        )
        with closing(micro_batches(stream, sampler, workers=config.data.workers)) as batches:
            is_last = step == config.train.steps
            if step and (is_last or step % config.validation.every == 0) and not is_reported:
                validate()  # the process was killed between a checkpoint and its validation
            monitor.resume()
            while step < config.train.steps and not interrupts.agreed():
                with monitor.waiting():
                    parts = [*itertools.islice(batches, config.train.accumulate)]
                monitor.note_skipped(parts)
                rate = learning_rate(config.optimizer, step, config.train.steps)
                losses, grad_norm, bad = stepper(parts, rate)
                step += 1
                average.update(learner.module, step)
                monitor.step(step, losses, rate, grad_norm, bad)
                if monitor.most_bad_in_row >= config.train.max_bad_steps:
                    what = f"{monitor.most_bad_in_row} updates in a row were left out"
                    raise InputError(divergence(run, what))
                is_last = step == config.train.steps
                if is_last or step % config.train.checkpoint_every == 0:
                    checkpoint()
                    saved = step
                if is_last or step % config.validation.every == 0:
                    validate()
                monitor.resume()
    except Stopped:  # while encoding or validating, which the next start makes up for
        stopped = True
    if step > saved:
        checkpoint()
    saver.close()
    monitor.close()
    if world.is_main:
        run.end()
    if step == config.train.steps and not stopped:
        print_results(run, world)
    else:
        world.print(f"stopped after step {step}; the same command goes on from there")


def warnings(config: TrainConfig, world: World) -> list[str]:
    """What is likely to be a mistake, though it can be done."""
    found = []
    shares = asdict(config.objective.dropout)
    never = [name for name, share in shares.items() if not share]
    if config.objective.kind == "edit" and never:
        found.append(
            f"objective.dropout.{', objective.dropout.'.join(never)} is 0: guidance will ask for "
            "predictions that were never trained, and spoil the edits; 0.05 is usual"
        )
    cores = os.cpu_count() or 1
    workers = world.local_size * config.data.workers
    if world.local_size > 1 and workers > cores:
        found.append(
            f"{world.local_size} processes with {config.data.workers} data workers each share "
            f"{cores} cores: lower data.workers"
        )
    return found


def check_batch(config: StepsConfig, world: World) -> None:
    """Raise InputError unless a step's samples can be dealt evenly."""
    parts = config.accumulate * world.size
    if config.batch_size % parts:
        raise InputError(
            f"train.batch_size is {config.batch_size}, expected a multiple of {parts}: "
            f"{world.size} processes with {config.accumulate} micro-batches each"
        )


def check_agreement(config: TrainConfig, learner: Learner, world: World) -> None:
    """Raise InputError unless all processes start from the same settings, code and weights."""
    world.check_same("the settings", digest_bytes(repr(config).encode(), 8))
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = b"".join(path.read_bytes() for path in files)
    world.check_same("the code of ipx2p", digest_bytes(code, 8))
    for network in learner.networks():
        name = type(network).__name__
        world.check_same(f"the {name} at the start", weights_hash(network))


def weights_hash(module: nn.Module) -> str:
    """A short text that tells weights apart by the sums of their bits, taken on their device."""
    sums = [
        (p.detach().contiguous().view(torch.int32).long() * (1 + i)).sum()
        for i, p in enumerate(module.parameters())
    ]
    return digest_bytes(str(torch.stack(sums).tolist()).encode(), 8)


def check_finite(run: Run, module: nn.Module, step: int) -> None:
    """Raise InputError for weights that a good checkpoint must not be replaced by."""
    finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()])
    if not finite.all():
        raise InputError(divergence(run, f"the weights are not finite any more at step {step}"))


def divergence(run: Run, what: str) -> str:
    """What to say when the training came apart."""
    checkpoints = find_checkpoints(run.folder)
    last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "none was saved"
    return f"{what}, {last}: lower optimizer.learning_rate, or look at the pictures"


def resume(
    run: Run, learner: Learner, average: EMA, optimizer: AdamW, world: World
) -> tuple[int, bool]:
    """Load the newest checkpoint that can be gone on from, if there is one; set damaged ones aside.

    Returns: the steps done, and whether that checkpoint is whole: of what is not trained some may
        be damaged, which the next checkpoint brings anew.
    Raises: InputError when there are checkpoints, and all of them are damaged.
    """
    found = find_checkpoints(run.folder)
    world.check_same("what checkpoints there are (run.dir must be shared)", str(found))
    errors: list[str] = []
    for folder in reversed(found):
        error, frozen = check_checkpoint(folder, learner.part)
        error, frozen = max(world.gather((error or "", frozen)))  # if not all could read it
        if not error:
            break
        errors.append(error)
        world.print(f"warning: {error}: going back to the checkpoint before it")
    else:
        if errors:
            raise InputError(f"no checkpoint is whole: {errors[0]}")
        return 0, True
    step = load_checkpoint(
        folder,
        part=learner.part,
        average=average.module,
        module=learner.module,
        optimizer=optimizer,
    )
    world.barrier()
    if world.is_main:
        for damaged in found[found.index(folder) + 1 :]:
            print(f"the damaged checkpoint is kept as {set_aside(damaged)}")
        run.forget_reports(step)
        point_at(run.folder, folder)  # the process may have been killed just before it
    world.barrier()
    world.print(f"going on from {folder}")
    for line in frozen:
        world.print(f"warning: {line}: it is written anew with the next checkpoint")
    rounding = [*run.rounding]
    if world_size(folder) != world.size:
        rounding.append(f"there were {world_size(folder)} processes and are {world.size}")
    if rounding:
        world.print(f"not bit for bit as without the stop: {'; '.join(rounding)}")
    return step, not frozen


def check_checkpoint(folder: Path, part: str) -> tuple[str | None, list[str]]:
    """Why a checkpoint cannot be gone on from, and what else of it is damaged."""
    try:
        found = damages(folder)
    except InputError as error:
        return str(error), []
    trained = [line for name, line in found.items() if is_trained(name, part)]
    frozen = [line for name, line in found.items() if not is_trained(name, part)]
    return (trained[0] if trained else None), frozen


def print_results(run: Run, world: World) -> None:
    """Say what came out and where it lies."""
    if not world.is_main:
        return  # it may not see yet what the first process wrote
    world.print(score_table(run.final_scores()))
    world.print(f"before / after / target: {run.sheet_path(run.num_steps)}")
    world.print(f"weights (averaged): {run.folder / 'weights'}")
