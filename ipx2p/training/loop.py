"""The training loop: one linear function from settings to a trained model (layer 4)."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

from ipx2p.data.loader import SampleStream, batches
from ipx2p.data.pairs import DegradedPhotos, ManifestPairs, Pairs, find_photos
from ipx2p.devices import pick_device
from ipx2p.errors import InputError
from ipx2p.training.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    point_at,
    save_checkpoint,
)
from ipx2p.training.config import DataConfig, OptimizerConfig, TrainConfig
from ipx2p.training.ema import EMA
from ipx2p.training.learners import LEARNERS, Learner
from ipx2p.training.monitor import Monitor
from ipx2p.training.run import Run
from ipx2p.training.validation import fixed_pairs, score_table


def train(config: TrainConfig, *, dry_run: bool = False) -> None:
    """Train, or go on with, the run that the settings describe; the end prints its scores.

    Args:
        dry_run: build everything, take no step and write nothing.
    Raises: InputError for bad settings, weights or pictures.
    """
    device = pick_device(config.train.device)
    run = Run(config)
    if run.is_finished:
        print(f"{run.folder} is finished, {run.num_steps} steps were done before")
        print_results(run)
        return

    train_pairs, held_out = open_pairs(config.data)
    fixed = fixed_pairs(
        held_out,
        per_task=config.validation.pairs_per_task,
        resolution=config.data.resolution,
        seed=config.run.seed,
    )
    learner: Learner = LEARNERS[config.objective.kind](config, device, fixed)
    average = EMA(learner.module, config.train.ema_decay)
    optimizer = AdamW(
        learner.module.parameters(),
        lr=config.optimizer.learning_rate,
        betas=tuple(config.optimizer.betas),
        weight_decay=config.optimizer.weight_decay,
    )
    print(f"{len(train_pairs)} pairs to train on, {len(fixed)} held out, on {device}")
    if dry_run:
        print("dry run: everything is in order, nothing was written")
        return
    run.begin()
    step = resume(run, learner, average, optimizer)
    monitor = Monitor(run.folder, config.train, steps_done=step)

    def validate() -> None:
        report = learner.validate(average.module)
        run.save_report(step, report)
        monitor.report(step, report)

    if step and step % config.validation.every == 0 and not run.has_report(step):
        validate()  # the process was killed between a checkpoint and its validation
    stream = SampleStream(
        train_pairs,
        seed=config.run.seed,
        resolution=config.data.resolution,
        max_zoom=config.data.max_zoom,
        flip=config.data.flip,
    )
    monitor.resume()
    for batch in batches(
        stream,
        first_step=step,
        num_steps=config.train.steps,
        batch_size=config.train.batch_size,
        workers=config.data.workers,
    ):
        rate = learning_rate(config.optimizer, step, config.train.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = learner.losses(batch)
        losses.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            learner.module.parameters(), config.optimizer.max_grad_norm
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(learner.module, step)
        monitor.step(step, losses, rate, grad_norm)
        if step % config.train.checkpoint_every == 0 or step == config.train.steps:
            check_finite(run, learner.module, step)
            save_checkpoint(
                run.folder,
                step,
                part=learner.part,
                averaged=learner.weights(average.module),
                raw=learner.weights(learner.module),
                optimizer=optimizer,
                keep=config.train.keep_checkpoints,
            )
        if step % config.validation.every == 0 and step < config.train.steps:
            validate()
        monitor.resume()
    validate()
    monitor.close()
    print_results(run)


def open_pairs(config: DataConfig) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those that only validation sees."""
    if config.manifest is not None:
        return ManifestPairs(config.manifest), ManifestPairs(config.validation_manifest)
    photos = find_photos(Path(config.photos))
    names = {photo.name for photo in photos}
    if missing := [name for name in config.held_out if name not in names]:
        raise InputError(
            f"data.held_out names {', '.join(missing)}, not in {config.photos}: {sorted(names)}"
        )
    held_out = [photo for photo in photos if photo.name in config.held_out]
    trained = [photo for photo in photos if photo.name not in config.held_out]
    if not trained:
        raise InputError(f"data.held_out names all photos of {config.photos}: none is left")
    return (
        DegradedPhotos(trained, config.tasks, config.degrade),
        DegradedPhotos(held_out, config.tasks, config.degrade),
    )


def resume(run: Run, learner: Learner, average: EMA, optimizer: AdamW) -> int:
    """Load the newest checkpoint, if there is one; returns the number of steps done."""
    checkpoints = find_checkpoints(run.folder)
    if not checkpoints:
        return 0
    step = load_checkpoint(
        checkpoints[-1],
        part=learner.part,
        average=average.module,
        module=learner.module,
        optimizer=optimizer,
    )
    point_at(run.folder, checkpoints[-1])  # the process may have been killed just before it
    print(f"going on from {checkpoints[-1]}")
    return step


def check_finite(run: Run, module: nn.Module, step: int) -> None:
    """Raise InputError for weights that a good checkpoint must not be replaced by."""
    finite = torch.stack([parameter.isfinite().all() for parameter in module.parameters()])
    if not finite.all():
        checkpoints = find_checkpoints(run.folder)
        last = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "none was saved"
        raise InputError(
            f"the weights are not finite any more at step {step}, {last}: lower "
            "optimizer.learning_rate, or look at the pictures"
        )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then constant, or cosine down to 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmup
    progress = max(0, step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.learning_rate * warmup * (1 + math.cos(math.pi * progress)) / 2


def print_results(run: Run) -> None:
    """Say what came out and where it lies."""
    print(score_table(run.final_scores()))
    print(f"before / after / target: {run.sheet_path(run.num_steps)}")
    print(f"weights (averaged): {run.folder / 'weights'}")
