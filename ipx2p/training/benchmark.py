"""How fast training is: steps that encode their pictures beside steps with `data.cache` (layer 4).

It times the trainer's own learner, stepper, average, stream of samples and cache, on the same
samples for both kinds. A turn holds only the networks that its kind needs. Its first step, in which
data workers start and a compiler may run, is not measured.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from omegaconf import MISSING
from torch import Tensor

from ipx2p.data.benchmark import check_counts, versions, write_pairs
from ipx2p.data.loader import StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.devices import device_name, dtype_name, memory_bytes, pick_device, pick_dtype
from ipx2p.diffusion.schedule import ScheduleConfig
from ipx2p.distributed import World, open_world
from ipx2p.errors import InputError
from ipx2p.models.clip import ClipText
from ipx2p.models.text import TextEncoder, load_tokenizer
from ipx2p.models.unet import UNetConfig
from ipx2p.models.vae import VAE, VAEConfig
from ipx2p.published_fields import CLIP_L
from ipx2p.training.config import ModelConfig, TrainConfig
from ipx2p.training.ema import EMA
from ipx2p.training.learners import EditLearner, FrozenParts, fresh_network, num_parameters
from ipx2p.training.loop import check_batch
from ipx2p.training.optimizer import Stepper, learning_rate, make_optimizer
from ipx2p.training.samples import open_pairs, open_stream
from ipx2p.training.speed import peak_flops, prepare
from ipx2p.training.validation import fixed_pairs
from ipx2p.weights.folder import Weights

PICTURES, CACHE = "pictures (encoding each step)", "data.cache"
NETWORKS = ("U-Net", "autoencoder", "text encoder")
MIN_PAIRS = 4  # and at least one for each sample of a step, so that no sentence repeats in it
PICTURE_SCALE = 2  # made-up pictures are this much larger than the training resolution
TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny" / "tokenizer"


class Turn(NamedTuple):
    """Means over the steps of one turn: wall time, CPU time of this process over all its cores, and
    the share spent waiting for data. Also the peak memory, and the FLOP/s a device could reach."""

    step_s: float
    cpu_s: float
    waiting_share: float
    memory_gib: float
    peak_flops: float


def benchmark_training(config: TrainConfig, *, turns: int, steps: int, command: str) -> None:
    """Time training steps, and print a row for each kind and how they compare.

    Args:
        config: settings to measure; pictures, and where they are missing weights, are made up.
        turns: of each kind. steps: measured in each turn.
        command: as it was typed.
    Raises: InputError for bad settings or weights, and for steps without an update.
    """
    check_counts(turns=turns, steps=steps)
    with (
        open_world(cuda=pick_device(config.train.device).type == "cuda") as world,
        tempfile.TemporaryDirectory(prefix="ipx2p-bench-", ignore_cleanup_errors=True) as own,
    ):
        train = replace(config.train, steps=2 * turns * (1 + steps))
        folder = Path(world.gather(own)[0])  # for all processes of this machine
        bench = Bench(complete(replace(config, train=train), folder, world), world)
        world.print(bench.header(command))
        done: dict[str, list[Turn]] = {PICTURES: [], CACHE: []}
        for index, kind in itertools.product(range(turns), done):
            turn = bench.turn(kind, index, steps)
            times = f"{turn.step_s:.4g} s a step, cpu {turn.cpu_s:.4g} s"
            world.print(f"turn {1 + index} of {turns}: {kind}: {times}")
            done[kind].append(turn)
        world.print(bench.table(done))
        world.barrier()  # no process needs the folder any more


def complete(config: TrainConfig, folder: Path, world: World) -> TrainConfig:
    """The settings with made-up pictures and, where they name none, made-up weights."""
    manifest = str(folder / "pairs.jsonl")
    paths = {"validation_manifest": manifest, "cache_dir": str(folder / "cache")}
    config = replace(config, data=replace(config.data, manifest=manifest, draws=1, **paths))
    config.check()
    check_batch(config.train, world)
    if world.is_main:
        count = max(MIN_PAIRS, config.train.batch_size)
        write_pairs(folder, count, PICTURE_SCALE * config.data.resolution)
    if config.model.weights == MISSING:
        weights = folder / "weights"
        if world.is_main:
            write_weights(weights, config.run.seed, world)
        config = replace(config, model=ModelConfig(weights=str(weights), unet=UNetConfig()))
    world.barrier()
    return config


def write_weights(folder: Path, seed: int, world: World) -> None:
    """The frozen parts of Stable Diffusion 1.5 in their real sizes, with random weights, 0.8 GB."""
    vae = fresh_network(lambda: VAE(VAEConfig()), seed, world)
    model = fresh_network(lambda: ClipText(), seed, world)
    text = TextEncoder(model, CLIP_L, *load_tokenizer(TOKENIZER))
    Weights(None, vae, text, ScheduleConfig()).save(folder)


class Bench:
    """A temporary run: the parts of the training loop, and turns of its steps."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.device = pick_device(config.train.device, world.local_rank)
        data, seed = config.data, config.run.seed
        pairs, held_out = open_pairs(data)
        fixed = fixed_pairs(held_out, per_task=1, resolution=data.resolution, seed=seed)
        learner = self.learner = EditLearner(config, self.device, fixed, world)
        self.average = EMA(learner.module, config.train.ema_decay)
        learner.network = prepare(learner.module, config.train, world)
        optimizer = make_optimizer(learner.module, config.optimizer)
        self.stepper = Stepper(learner, optimizer, config.optimizer, world)
        self.dtype = pick_dtype(config.train.precision, self.device)
        self.steps_done = 0
        networks = zip(NETWORKS, (learner.module, *learner.frozen.get()), strict=True)
        self.sizes = [f"{name} {num_parameters(network) / 1e6:.1f} M" for name, network in networks]
        self.streams = {}
        for kind in (PICTURES, CACHE):
            config = replace(self.config, data=replace(data, cache=kind == CACHE))
            self.streams[kind] = open_stream(config, pairs, learner, world, lambda: None)

    def turn(self, kind: str, index: int, num_steps: int) -> Turn:
        """One step that is not measured, then `num_steps` that are; equal index, equal samples."""
        if kind == CACHE:
            self.learner.frozen.release()
        else:
            self.learner.frozen = FrozenParts(self.learner.frozen.folder, self.device)
        train, first = self.config.train, index * (1 + num_steps)
        sampler = StepSampler(
            range(first, first + 1 + num_steps),
            train.batch_size,
            accumulate=train.accumulate,
            world=self.world,
        )
        batches = micro_batches(self.streams[kind], sampler, workers=self.config.data.workers)
        _reset_peak_memory(self.device)
        self._step(batches)
        since, cpu_since = _clocks(self.device)
        steps = [self._step(batches) for _ in range(num_steps)]
        until, cpu_until = _clocks(self.device)
        if any(bad.item() for _, bad in steps):
            raise InputError(f"{kind}: a loss or gradient was not finite, which shortens the step")
        return Turn(
            step_s=(until - since) / num_steps,
            cpu_s=(cpu_until - cpu_since) / num_steps,
            waiting_share=sum(waiting_s for waiting_s, _ in steps) / (until - since),
            memory_gib=memory_bytes(self.device) / 2**30,
            peak_flops=self.world.size * peak_flops(self.device, self.dtype),
        )

    def _step(self, batches: Iterator) -> tuple[float, Tensor]:
        """One step of the training loop: seconds spent waiting for data, and whether its update was
        left out."""
        since = time.perf_counter()
        parts = [*itertools.islice(batches, self.config.train.accumulate)]
        waiting_s = time.perf_counter() - since
        rate = learning_rate(self.config.optimizer, self.steps_done, self.config.train.steps)
        _, _, bad = self.stepper(parts, rate)
        self.steps_done += 1
        self.average.update(self.learner.module, self.steps_done, bad)
        return waiting_s, bad

    def header(self, command: str) -> str:
        """What is measured, on what, and how to repeat it."""
        data, train = self.config.data, self.config.train
        ways = [
            f", {name}" for name in ("compile", "recompute_activations") if getattr(train, name)
        ]
        return (
            f"{versions()}\ndevice: {self.world.size} x {device_name(self.device)}, "
            f"{torch.get_num_threads()} threads, {dtype_name(self.dtype)}\n"
            f"parameters: {', '.join(self.sizes)}\n"
            f"step: {data.resolution} px, batch size {train.batch_size}, accumulate "
            f"{train.accumulate}, {data.workers} workers{''.join(ways)}\ncommand: {command}"
        )

    def table(self, done: dict[str, list[Turn]]) -> str:
        """Medians over the turns of each kind, and the ratio of their rates."""
        columns = f"{'step s':>9}{'fastest':>9}{'samples/s':>11}{'MFU':>8}{'GiB':>8}{'waiting':>9}"
        lines = [f"{'':<{len(PICTURES)}}{columns}"]
        middle = {
            kind: Turn(*map(median, zip(*turns, strict=True))) for kind, turns in done.items()
        }
        fastest = {kind: min(turns).step_s for kind, turns in done.items()}
        peak = median(turn.peak_flops for turns in done.values() for turn in turns)
        flops = self.learner.flops_per_sample()
        for kind, turn in middle.items():
            rate = self.config.train.batch_size / turn.step_s
            lines.append(
                f"{kind:<{len(PICTURES)}}{turn.step_s:>9.4g}{fastest[kind]:>9.4g}{rate:>11.4g}"
                f"{rate * flops / peak:>8.1%}{turn.memory_gib:>8.2f}{turn.waiting_share:>9.1%}"
            )
        lines.append(
            "samples/s with / without data.cache: "
            f"{middle[PICTURES].step_s / middle[CACHE].step_s:.2f} "
            f"(fastest turns: {fastest[PICTURES] / fastest[CACHE]:.2f})\n"
            f"MFU: {flops / 1e12:.3g} TFLOP a sample (U-Net, forward and backward) against "
            f"{peak / 1e12:.3g} TFLOP/s"
        )
        return "\n".join(lines)


def _clocks(device: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of this process, once the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # Linux; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
