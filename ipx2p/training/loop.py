"""The training loop: one linear function from settings to a trained model (layer 4)."""

import copy
import itertools
from collections import ChainMap
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

from ipx2p.data.loader import StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.devices import advice_out_of_memory, pick_device
from ipx2p.distributed import World, count_cores, open_world
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes
from ipx2p.training.checkpoint import (
    CheckpointSaver,
    damages,
    find_checkpoints,
    is_trained,
    load_checkpoint,
    num_steps,
    point_at,
    set_aside,
)
from ipx2p.training.config import StepsConfig, TrainConfig
from ipx2p.training.ema import EMA
from ipx2p.training.interrupts import Interrupts, Stopped
from ipx2p.training.learner import Learner
from ipx2p.training.learners import LEARNERS
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
from ipx2p.training.speed import prepare, set_deterministic
from ipx2p.training.validation import fixed_pairs, score_table

MEMORY_ADVICE = (
    "raise train.accumulate (smaller micro-batches, the same step), set "
    "train.recompute_activations=true or data.cache=true, or lower train.batch_size, "
    "data.resolution or validation.batch_size"
)


def train(config: TrainConfig, *, dry_run: bool = False) -> None:
    """Train or resume the run that the settings describe, and print its final scores.

    Args:
        dry_run: build everything, take no step and write nothing.
    Raises: InputError for bad settings, weights or pictures, on every process.
    """
    with open_world(cuda=config.train.uses_cuda) as world:
        interrupts = Interrupts(world)
        with interrupts.listen(), advice_out_of_memory(lambda: MEMORY_ADVICE):
            _train(config, world, interrupts, dry_run)
            interrupts.settle()


def _train(config: TrainConfig, world: World, interrupts: Interrupts, dry_run: bool) -> None:
    set_deterministic(config.train)
    device = pick_device(config.train.device, world.local_rank)
    check_batch(config.train, world)
    run = Run(config)
    if world.gather(run.is_finished)[0]:
        world.print(f"{run.folder} is finished, all {run.num_steps} steps were done before")
        print_results(run, world)
        return
    for warning in warnings(config, world):
        world.print(f"warning: {warning}")

    train_pairs, held_out = open_pairs(config.data)
    fixed = fixed_pairs(
        held_out,
        per_task=config.validation.pairs_per_task,
        resolution=config.edit_resolution,
        seed=config.run.seed,
    )
    learner: Learner = LEARNERS[config.objective.kind](config, device, fixed, world)
    check_agreement(config, learner, world)
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
    step, is_whole, bad_steps = resume(run, learner, average, optimizer, world)
    start, saved = step, step if is_whole and not run.rescored else -1  # -1: to be written again
    is_due = bad = stopped = False
    is_reported, on_cuda = world.gather(run.has_report(step))[0], device.type == "cuda"
    monitor = Monitor(
        run.folder,
        config.train,
        world,
        device,
        steps_done=step,
        bad_steps=bad_steps,
        # On a CPU the peak depends on the other load; the benchmark measures both in turns.
        flops_per_sample=learner.flops_per_sample() if on_cuda else None,
    )
    # On the CPU, writing in the background would only compete with the steps.
    saver = CheckpointSaver(run.folder, learner.part, config.train, background=on_cuda)
    stepper = Stepper(learner, optimizer, config.optimizer, world)

    def checkpoint() -> None:
        monitor.log()  # a resumed run keeps only rows up to here, so none may reach beyond
        check_updates(run, monitor, step)  # before an earlier checkpoint is pruned
        check_finite(run, learner.module, step)
        world.check_same(f"step {step}: the trained network", weights_hash(learner.module))
        world.check_same(f"step {step}: its average", weights_hash(average.module))
        if world.is_main:
            averaged = learner.weights(average.module, whole=saver.newest is None)
            notes = surroundings(world, device) | {"bad_steps": monitor.count_bad()}
            saver.save(step, averaged, learner.weights(plain, whole=False), optimizer, notes)

    def validate() -> None:
        report = learner.validate(average.module, plain, interrupts.check)
        monitor.report(step, report)
        if world.is_main:
            saver.wait()
            run.save_report(step, report)

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
                validate()  # a kill came between the checkpoint and its validation
            monitor.resume()
            while step < config.train.steps and not interrupts.agreed():
                with monitor.waiting():
                    parts = [*itertools.islice(batches, config.train.accumulate)]
                monitor.note_skipped(parts)
                rate = learning_rate(config.optimizer, step, config.train.steps)
                losses, grad_norm, bad = stepper(parts, rate)
                step += 1
                average.update(learner.module, step, bad)
                monitor.step(step, losses, rate, grad_norm, bad)
                check_updates(run, monitor, step)
                is_last = step == config.train.steps
                is_due |= is_last or step % config.train.checkpoint_every == 0
                if is_due and not bad:  # else after the next good update
                    checkpoint()
                    saved, is_due = step, False
                if is_last or step % config.validation.every == 0:
                    validate()
                monitor.resume()
    except Stopped:  # while encoding or validating, which the next start repeats
        stopped = True
        monitor.resume()  # the time of what was abandoned is no part of a step
    monitor.log()
    if step > saved and not bad:
        checkpoint()
        saved = step
    saver.close()
    monitor.close()
    if world.is_main:
        run.end()
    if step == config.train.steps and not stopped:
        print_results(run, world)
        return
    world.print(f"stopped after step {step}; run the same command to resume")
    if step > saved:
        world.print(f"its update was left out: it resumes from step {max(saved, start)}")


def warnings(config: TrainConfig, world: World) -> list[str]:
    """Settings that are probably mistakes."""
    found = []
    shares = asdict(config.objective.dropout)
    never = [name for name, share in shares.items() if not share]
    if config.objective.kind == "edit" and never:
        found.append(
            f"objective.dropout.{', objective.dropout.'.join(never)} is 0: guidance will use "
            "predictions that were never trained, which spoils the edits; 0.05 is usual"
        )
    cores = count_cores()
    workers = world.local_size * config.data.workers
    if world.local_size > 1 and workers > cores:
        found.append(
            f"{world.local_size} processes with {config.data.workers} data workers each share "
            f"{cores} cores: lower data.workers"
        )
    return found


def check_batch(config: StepsConfig, world: World) -> None:
    """Raise InputError unless the samples of a step can be divided evenly."""
    parts = config.accumulate * world.size
    if config.batch_size % parts:
        raise InputError(
            f"train.batch_size is {config.batch_size}, expected a multiple of {parts}: "
            f"{world.size} processes with {config.accumulate} micro-batches each"
        )


def check_agreement(config: TrainConfig, learner: Learner, world: World) -> None:
    """Raise InputError unless all processes start from the same settings, code and weights."""
    world.check_same("the settings", digest_bytes(repr(config).encode()))
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = digest_bytes(b"".join(path.read_bytes() for path in files))
    world.check_same("the code of ipx2p", code)
    for network in learner.networks():
        name = type(network).__name__
        world.check_same(f"the {name} at the start", weights_hash(network))


def weights_hash(module: nn.Module) -> str:
    """A short fingerprint of weights: sums of their bits, taken on their device."""
    sums = [
        (p.detach().contiguous().view(torch.int32).long() * (1 + i)).sum()
        for i, p in enumerate(module.parameters())
    ]
    return digest_bytes(str(torch.stack(sums).tolist()).encode())


def check_finite(run: Run, module: nn.Module, step: int) -> None:
    """Raise InputError for weights that must not replace a good checkpoint."""
    finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()])
    if not finite.all():
        raise InputError(divergence(run, f"the weights are no longer finite at step {step}", step))


def check_updates(run: Run, monitor: Monitor, step: int) -> None:
    """Raise InputError if too many updates in a row were left out, or the last ones of the run."""
    length, first = monitor.worst_row
    if length >= run.config.train.max_bad_steps:
        raise InputError(divergence(run, f"{length} updates in a row were left out", first))
    if step == run.num_steps and monitor.bad_in_row:
        what = f"the last updates of the run ({monitor.bad_in_row}) were left out"
        raise InputError(divergence(run, what, step + 1 - monitor.bad_in_row))


def divergence(run: Run, what: str, first: int) -> str:
    """The message for a run that diverged at the step `first`."""
    good = [folder for folder in find_checkpoints(run.folder) if num_steps(folder) < first]
    last = f"the last checkpoint before is {good[-1]}" if good else "no checkpoint was saved before"
    advice = "start another run (run.name=NEW) with a lower optimizer.learning_rate"
    return f"{what}; {last}: {advice}, or check the pictures"


def surroundings(world: World, device: torch.device) -> dict[str, int]:
    """The numbers that must be unchanged for a run to resume bit for bit."""
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"world_size": world.size, **threads}


def resume(
    run: Run, learner: Learner, average: EMA, optimizer: AdamW, world: World
) -> tuple[int, bool, int]:
    """Load the newest usable checkpoint, if there is one; set damaged ones aside.

    Returns: the steps done; whether the checkpoint is whole (frozen parts may be damaged, which
        the next checkpoint rewrites); and how many updates of those steps were left out.
    Raises: InputError if there are checkpoints and all of them are damaged.
    """
    found = find_checkpoints(run.folder)
    world.check_same("what checkpoints there are (run.dir must be shared)", str(found))
    errors: list[str] = []
    for folder in reversed(found):
        damaged = dict(ChainMap(*world.gather(damages(folder))))  # if not all could read it
        trained = [line for name, line in damaged.items() if is_trained(name, learner.part)]
        if not trained:
            break
        errors.append(trained[0])
        world.print(f"warning: {trained[0]}: going back to the checkpoint before it")
    else:
        if errors:
            raise InputError(f"no checkpoint is whole: {errors[0]}")
        return 0, True, 0
    networks = {"average": average.module, "module": learner.module}
    state = load_checkpoint(folder, part=learner.part, **networks, optimizer=optimizer)
    world.barrier()
    if world.is_main:
        for later in found[found.index(folder) + 1 :]:
            print(f"the damaged checkpoint is kept as {set_aside(later)}")
        run.forget_reports(state["step"])
        point_at(run.folder, folder)  # a kill may have come just before this
    world.barrier()
    world.print(f"resuming from {folder}")
    for line in damaged.values():
        world.print(f"warning: {line}: it will be rewritten at the next checkpoint")
    changes = [
        f"there were {state[name]} {name.replace('world_size', 'processes')} and are {now}"
        for name, now in surroundings(world, learner.device).items()
        if state.get(name, now) != now  # older checkpoints do not record all of them
    ]
    if changes := [*run.rounding, *changes]:
        world.print(f"the weights will differ in their last bits: {'; '.join(changes)}")
    return state["step"], not damaged, state.get("bad_steps", 0)


def print_results(run: Run, world: World) -> None:
    """Print the scores and where the results are."""
    if not world.is_main:
        return  # the files of the first process may not be visible here yet
    world.print(score_table(run.final_scores()))
    world.print(f"before / after / target: {run.sheet_path(run.num_steps)}")
    world.print(f"weights (averaged): {run.folder / 'weights'}")
