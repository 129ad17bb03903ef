"""What is measured: the U-Net, an edit, training steps, reading pairs, loading a model (layer 5).

Each function prepares a piece of work with its ways: ours and, with `against`, the same by
diffusers on the same weights, or the same in other settings.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ipx2p.bench.made_up import random_picture, write_pairs, write_weights
from ipx2p.bench.turns import Way, Work
from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.pairs import ManifestPairs
from ipx2p.data.workers import micro_batches
from ipx2p.devices import pick_device, pick_dtype
from ipx2p.distributed import World
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.models.flops import counted_flops
from ipx2p.models.unet import LATENT_CHANNELS
from ipx2p.seeds import generator
from ipx2p.training.config import DataConfig, ModelConfig, RunConfig, StepsConfig, TrainConfig
from ipx2p.training.ema import EMA
from ipx2p.training.learner import FrozenParts
from ipx2p.training.learners import EditLearner
from ipx2p.training.loop import check_batch
from ipx2p.training.optimizer import Stepper, learning_rate, make_optimizer
from ipx2p.training.samples import open_pairs, open_stream
from ipx2p.training.speed import prepare
from ipx2p.training.validation import fixed_pairs
from ipx2p.weights.readers import find_folder

NUM_PAIRS, SIDE = 32, 512  # made-up pairs to read
MIN_PAIRS = 4  # to train on, and at least one for each sample of a step
PICTURE_SCALE = 2  # pictures to train on are this much larger than the training resolution
MAX_ZOOM = 1.125  # as `data.max_zoom`
BRANCHES = 3  # of guidance with two scales
INSTRUCTION = "make it snow"
EDIT = "-m ipx2p edit {weights} --image {picture} --instruction x --output {output}"
THEIR_EDIT = """
import torch, PIL.Image
from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline
pipeline = Pipeline.from_pretrained("{weights}", safety_checker=None, torch_dtype={dtype})
pipeline.to("{device}")
picture = PIL.Image.open("{picture}").convert("RGB")
pipeline("x", image=picture, num_inference_steps=1).images[0].save("{output}.png")
"""


def unet(*, batch_size: int, **options) -> Work:
    """Forward passes of the U-Net without gradients, on `batch_size` rows."""
    editor, folder, side = _editor(**options)
    config, device = editor.unet.config, editor.device
    latents, source = torch.randn(2, batch_size, LATENT_CHANNELS, side, side, device=device)
    text = torch.randn(batch_size, 77, config.cross_attention_dim, device=device)
    shown = (latents.to(editor.dtype), torch.full((batch_size,), 500.0, device=device))
    shown += (text.to(editor.dtype), source.to(editor.dtype))

    def forward(network: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def call() -> None:
            network(*shown)

        return call

    ways = {"ipx2p": Way(forward(editor.unet))}
    if options["against"]:
        from ipx2p.bench.reference import UNetTwin

        theirs = UNetTwin(editor.unet, folder / "unet")
        if options["compile"]:
            theirs.unet.compile(fullgraph=True)
        ways["diffusers"] = Way(forward(theirs))
    compiled = ", compiled" if options["compile"] else ""
    return Work(
        "unet",
        f"forward, {batch_size} rows of {side} x {side} latents{compiled}",
        1,
        "calls",
        _warm(ways),
        device,
        editor.dtype,
        batch_size * counted_flops(config, side, side),
    )


def edit(*, steps: int, **options) -> Work:
    """A whole edit: encode, sample with three branches, decode."""
    editor, folder, side = _editor(**options)
    pixels = side * editor.vae.config.downscale
    picture = random_picture(pixels, generator(0, "benchmark picture"))
    scales = {"guidance_scale": 7.0, "image_guidance_scale": 1.5}

    def ours() -> None:
        editor.edit(
            picture, INSTRUCTION, sampler="euler", num_steps=steps, resolution=None, **scales
        )

    ways = {"ipx2p": Way(ours)}
    if options["against"]:
        from ipx2p.bench.reference import pipeline

        theirs = pipeline(editor, folder)
        if options["compile"]:
            theirs.unet.compile(fullgraph=True)
        draws = torch.Generator().manual_seed(0)

        def edited() -> None:
            theirs(
                INSTRUCTION,
                image=picture,
                num_inference_steps=steps,
                generator=draws,
                **scales,
            )

        ways["diffusers"] = Way(edited)
    compiled = ", compiled" if options["compile"] else ""
    return Work(
        "edit",
        f"{pixels} x {pixels} px, {steps} steps, {BRANCHES} branches{compiled}",
        1,
        "edits",
        _warm(ways),
        editor.device,
        editor.dtype,
        steps * BRANCHES * counted_flops(editor.unet.config, side, side),
    )


def load(*, folder: Path, weights: str | None, device: str, against: str | None) -> Work:
    """From nothing to the end of the first step: a process that imports, loads and edits."""
    path = _weights(folder, weights, World())
    picture = folder / "small.png"
    random_picture(64, generator(0, "benchmark picture")).save(picture)
    device = pick_device(device)
    names = {"weights": path, "picture": picture, "output": folder / "edited", "device": device}
    names["dtype"] = pick_dtype("auto", device)
    ours = [sys.executable, *EDIT.format(**names).split(), "--steps", "1"]
    ways = {"ipx2p": Way(lambda: _peak_of([*ours, "--resolution", "64", "--device", str(device)]))}
    if against:
        code = [sys.executable, "-c", THEIR_EDIT.format(**names)]
        ways["diffusers"] = Way(lambda: _peak_of(code))
    return Work("load", "import, load, one step at 64 px, save", 1, "starts", ways, device)


def data(
    *,
    folder: Path,
    manifest: str | None,
    workers: Sequence[int],
    resolution: int,
    batch_size: int,
    batches: int,
    against: str | None,
) -> Work:
    """Read batches of pairs with each number of workers; starting them counts, since they read
    ahead meanwhile."""
    if min(workers) < 0:
        raise InputError(f"--workers is {min(workers)}, expected 0 or more")
    path = Path(manifest) if manifest else write_pairs(folder, NUM_PAIRS, SIDE)
    pairs = ManifestPairs(path)
    stream = SampleStream(pairs, Framing(resolution, max_zoom=MAX_ZOOM), seed=0)

    def read(count: int) -> Callable[[], None]:
        def call() -> None:
            sampler = StepSampler(range(batches), batch_size)
            with closing(micro_batches(stream, sampler, workers=count)) as found:
                for _ in found:
                    pass

        return call

    if against:
        from ipx2p.bench.reference_data import reader

        if len(workers) > 1:
            raise InputError("--against datasets measures one number of --workers")
        sizes = {"batch_size": batch_size, "batches": batches, "workers": workers[0]}
        theirs = reader(path, folder, resolution=resolution, max_zoom=MAX_ZOOM, **sizes)
        ways = {"ipx2p": Way(read(workers[0])), "datasets": Way(theirs)}
    else:
        ways = {f"{count} workers": Way(read(count)) for count in workers}
    what = manifest or f"made-up JPEG pictures, {SIDE} px"
    return Work(
        "data",
        f"{batches} batches of {batch_size} at {resolution} px from {len(pairs)} pairs of {what}"
        + (f", {workers[0]} workers" if against else ""),
        batches * batch_size,
        "pairs",
        _warm(ways),
        torch.device("cpu"),
    )


def train(
    *,
    folder: Path,
    weights: str | None,
    resolution: int,
    workers: int,
    steps: int,
    against: str | None,
    world: World,
    **how,
) -> Work:
    """Optimizer steps of the trainer's own parts; with `data.cache`, and either encoding each step
    or, with `against`, the U-Net of diffusers in the same loop."""
    if against and world.size > 1:
        raise InputError("--against diffusers measures one process: leave torchrun out")
    manifest = str(folder / "pairs.jsonl")
    cached = DataConfig(
        manifest=manifest,
        validation_manifest=manifest,
        resolution=resolution,
        workers=workers,
        draws=1,
        cache=True,
        cache_dir=str(folder / "cache"),
    )
    path = str(_weights(folder, weights, world))
    # More than are taken: the learning rate needs the number.
    config = TrainConfig(
        run=RunConfig("bench"),
        model=ModelConfig(path),
        data=cached,
        train=StepsConfig(10**6, **how),
    )
    config.check()
    check_batch(config.train, world)
    if world.is_main:
        write_pairs(folder, max(MIN_PAIRS, config.train.batch_size), PICTURE_SCALE * resolution)
    world.barrier()
    trainer = Trainer(config, world)
    ours = trainer.way(cached, steps, trainer.learner.network)
    if against:
        from ipx2p.bench.reference import UNetTwin

        theirs = UNetTwin(trainer.learner.module, find_folder(path) / "unet")
        if config.train.recompute_activations:
            theirs.unet.enable_gradient_checkpointing()
        if config.train.compile:
            theirs.unet.compile(fullgraph=True)
        ways = {"ipx2p": ours, "diffusers": trainer.way(cached, steps, theirs)}
    else:
        encoding = trainer.way(replace(cached, cache=False), steps, trainer.learner.network)
        ways = {"data.cache": ours, "encoding each step": encoding}
    train = config.train
    how = [f"{train.accumulate} micro-batches" if train.accumulate > 1 else ""]
    how += [f"{workers} workers" if workers else "", f"{world.size} processes" * (world.size > 1)]
    how += [name for name in ("compile", "recompute_activations") if getattr(train, name)]
    about = [f"{steps} steps of {train.batch_size}", f"{resolution} px", *filter(None, how)]
    samples = steps * train.batch_size
    return Work(
        "train",
        ", ".join(about),
        samples,
        "samples",
        ways,
        trainer.device,
        pick_dtype(train.precision, trainer.device),
        samples * trainer.learner.flops_per_sample(),
    )


class Trainer:
    """A temporary run: the parts of the training loop, and steps of them."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.device = pick_device(config.train.device, world.local_rank)
        self.pairs, held_out = open_pairs(config.data)
        fixed = fixed_pairs(held_out, per_task=1, resolution=config.data.resolution, seed=0)
        learner = self.learner = EditLearner(config, self.device, fixed, world)
        self.average = EMA(learner.module, config.train.ema_decay)
        learner.network = prepare(learner.module, config.train, world)
        optimizer = make_optimizer(learner.module, config.optimizer)
        self.stepper = Stepper(learner, optimizer, config.optimizer, world)
        self.steps_done = 0

    def way(self, data: DataConfig, steps: int, network: nn.Module) -> Way:
        """Steps on this data through this network. Its first step in a turn, in which workers start
        and a compiler may run, is not measured; memory holds only what this way needs."""
        config = replace(self.config, data=data)
        stream = open_stream(config, self.pairs, self.learner, self.world, lambda: None)
        train, turns = config.train, itertools.count()
        batches = iter(())

        def start() -> None:
            nonlocal batches
            self.learner.network = network
            if data.cache:
                self.learner.frozen.release()
            else:
                self.learner.frozen = FrozenParts(self.learner.frozen.folder, self.device)
            first = next(turns) * (1 + steps)
            sampler = StepSampler(
                range(first, first + 1 + steps),
                train.batch_size,
                accumulate=train.accumulate,
                world=self.world,
            )
            batches = micro_batches(stream, sampler, workers=data.workers)
            take(1)

        def take(count: int) -> None:
            bad = [self.step([*itertools.islice(batches, train.accumulate)]) for _ in range(count)]
            if any(one.item() for one in bad):
                raise InputError("a loss or gradient was not finite, which shortens the step")

        return Way(lambda: take(steps), start)

    def step(self, parts: list) -> torch.Tensor:
        """One step of the training loop: whether its update was left out."""
        config = self.config
        rate = learning_rate(config.optimizer, self.steps_done, config.train.steps)
        _, _, bad = self.stepper(parts, rate)
        self.steps_done += 1
        self.average.update(self.learner.module, self.steps_done, bad)
        return bad


def _editor(
    *,
    folder: Path,
    weights: str | None,
    resolution: int,
    device: str,
    dtype: str,
    compile: bool,
    against: str | None,
) -> tuple[Editor, Path, int]:
    """The editor, its folder, and the side of its latents."""
    path = _weights(folder, weights, World())
    editor = Editor.load(path, device=device, dtype=dtype)
    if compile:
        editor.unet.compile(fullgraph=True)
    multiple = editor.vae.config.downscale
    if resolution % multiple:
        raise InputError(f"--resolution is {resolution}, expected a multiple of {multiple}")
    return editor, find_folder(path), resolution // multiple


def _weights(folder: Path, weights: str | None, world: World) -> str | Path:
    """The weights asked for, else made-up ones."""
    if weights is not None:
        return weights
    if world.is_main:
        write_weights(folder / "weights", world)
    world.barrier()
    return folder / "weights"


def _warm(ways: dict[str, Way]) -> dict[str, Way]:
    """The ways after a call of each: files are in memory, and compilers have run."""
    for way in ways.values():
        way.run()
    return ways


def _peak_of(command: Sequence[str]) -> int:
    """Run a program; its peak memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError(f"{' '.join(command[:3])} failed: {complaint.decode()[-300:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
