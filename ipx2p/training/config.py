"""The settings of a training run, as `train.py` reads them (layer 4).

The defaults of each group are here or beside the code they belong to. YAML files use the same
names; `group.key=value` on the command line overrides them.
"""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import torch
from omegaconf import MISSING

from ipx2p.config import load_config
from ipx2p.data.degradations.tasks import DegradeConfig, check_task
from ipx2p.data.instructions import POLICIES
from ipx2p.diffusion.objective import DropoutConfig
from ipx2p.diffusion.schedule import PREDICTION_TYPES
from ipx2p.editing.settings import EditSettings, check_needs
from ipx2p.errors import InputError, suggestion
from ipx2p.fidelity import Wrap
from ipx2p.models.unet import UNetConfig
from ipx2p.models.vae import VAEConfig

TUNED = "tuned"  # the trained model in the evaluation after it
MAX_COUNT = 2**31 - 1  # of steps, samples and pixels: larger ones are typos
CHOICES = {
    "objective.kind": ("edit", "autoencoder", "wrapping"),
    "objective.prediction_type": PREDICTION_TYPES,
    "data.instructions": POLICIES,
    "data.on_error": ("stop", "skip"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "train.precision": ("auto", "float32", "bfloat16"),
}
RANGES = {
    f"1 or more, at most {MAX_COUNT}": (
        lambda value: 1 <= value <= MAX_COUNT,
        "data.resolution data.draws train.steps train.batch_size train.accumulate "
        "train.processes train.max_bad_steps train.keep_every train.log_every "
        "train.checkpoint_every train.keep_checkpoints validation.every validation.pairs_per_task "
        "validation.resolution validation.batch_size",
    ),
    "0 or more, at most 256": (lambda value: 0 <= value <= 256, "data.workers"),
    "a number that is 0 or more": (
        lambda value: 0 <= value < math.inf,
        "optimizer.warmup_steps optimizer.weight_decay objective.kl_weight",
    ),
    "a number that is 1 or more": (lambda value: 1 <= value < math.inf, "data.max_zoom"),
    "a number above 0": (
        lambda value: 0 < value < math.inf,
        "objective.timestep_shift objective.min_snr_gamma train.bucket_mb",
    ),
    "a number above 0, or .inf": (
        lambda value: value > 0,
        "data.temperature optimizer.max_grad_norm",
    ),
    "a number above 0, at most 1": (lambda value: 0 < value <= 1, "data.fraction"),
    "a number above 0, at most 1000": (lambda value: 0 < value <= 1000, "optimizer.learning_rate"),
    "0 to below 1": (lambda value: 0 <= value < 1, "train.ema_decay"),
}


@dataclass
class RunConfig:
    """Where a run is written, and the seed of all its random draws."""

    name: str = MISSING
    dir: str = "runs"
    seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class ModelConfig:
    """The weights to start from."""

    weights: str = MISSING  # a weights folder or hub id
    vae_weights: str | None = None  # another autoencoder: a folder, hub id or single file
    unet: UNetConfig | None = None  # sizes of a fresh U-Net, instead of the folder's
    vae: VAEConfig | None = None  # sizes of a fresh autoencoder, instead of the folder's


@dataclass
class DataConfig:
    """The training data: a manifest of pairs, or photographs to degrade on the fly.

    prepare: command lines of `python -m ipx2p.data.prepare` that make the manifests. `train.py`
    runs them, in order, if one of the two does not exist.
    """

    prepare: list[str] = field(default_factory=list)
    manifest: str | None = None
    validation_manifest: str | None = None
    photos: str | None = None
    held_out: list[str] = field(default_factory=list)  # names of photos used only for validation
    tasks: list[str] = field(default_factory=lambda: ["denoise", "enhance"])
    degrade: DegradeConfig = field(default_factory=DegradeConfig)
    fraction: float = 1.0  # of each task's pairs; smaller ones are subsets of larger ones
    holdout_tasks: list[str] = field(default_factory=list)  # tasks used only for validation
    mixture: dict[str, float] | None = None  # weight of each task; None: its number of pairs
    temperature: float | None = None  # weights n^(1 / temperature); .inf: equal tasks
    instructions: str = "per_step"  # or "per_pair" or "fixed": when a sentence is drawn
    banks: dict[str, str] = field(default_factory=dict)  # task -> text file of sentences, or a bank
    on_error: str = "stop"  # or "skip": another pair of the task replaces a broken one
    resolution: int = 256
    max_zoom: float = 1.125  # crops are up to this much smaller than the picture's short side
    flip: bool = True
    draws: int | None = None  # fixed crops and degradations of each pair; None: new at each visit
    cache: bool = False  # encode everything once, then train without the encoders
    cache_dir: str = "cache"
    workers: int = 4  # of each process


@dataclass
class ObjectiveConfig:
    """The training objective."""

    kind: str = "edit"  # or "autoencoder", which trains the VAE, or "wrapping", for its decoder
    prediction_type: str | None = None  # None: that of the weights' scheduler
    zero_terminal_snr: bool | None = None  # the last timestep is pure noise; None: likewise
    timestep_shift: float = 1.0  # above 1: more of the noisy timesteps; those of SD3's eq. 23
    min_snr_gamma: float | None = None  # weights of the loss by timestep, 5 is usual; None: 1
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    kl_weight: float = 1e-6  # of the autoencoder's posterior, relative to its pixel loss


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # or "linear" or "cosine": 0 just after the last step
    warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass
class StepsConfig:
    """Length and speed of training, logs and checkpoints. A step is one of all processes."""

    steps: int = MISSING
    batch_size: int = 32  # samples of a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of each process in a step
    ema_decay: float = 0.9999
    processes: int = 1  # of this machine, at most one for each GPU; torchrun's own number wins
    device: str = "auto"
    precision: str = "auto"  # of the trained network: bfloat16 is autocast over float32 weights
    channels_last: bool = True
    compile: bool = False  # minutes at the start, faster steps afterwards
    recompute_activations: bool = False  # in the backward pass: less memory, about a third slower
    deterministic: bool = False  # only deterministic algorithms on CUDA: slower
    bucket_mb: float | None = None  # gradients that processes exchange at once; None: 25
    max_bad_steps: int = 20  # in a row, with a loss or gradient that is not finite; seen at a log
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2  # the newest
    keep_every: int | None = None  # also keep checkpoints at multiples of this step, for good

    @property
    def uses_cuda(self) -> bool:
        """Whether each process trains on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def num_processes(self) -> int:
        """How many there are to start."""
        return min(self.processes, torch.cuda.device_count()) if self.uses_cuda else self.processes


@dataclass
class ValidationConfig:
    """Edits of held-out pairs during training.

    Where `edit` has guidance, the same edits are also scored without it, which costs a third as
    much: restoration needs none.
    """

    every: int = 500  # only validated checkpoints can become the best one
    pairs_per_task: int = 8
    resolution: int | None = None  # of whole pictures, where training sees crops; None: of the data
    batch_size: int = 8
    edit: EditSettings = field(default_factory=EditSettings)


@dataclass
class EvaluationConfig:
    """What follows a training: its weights, called `tuned`, and others edit held-out pairs.

    Edits are made as in validation. settings: what differs from that, such as
    `guidance_scale=7,image_guidance_scale=1.5`; each is a row of every model. banks: sentences with
    which each pair of a task is edited as well, as a task of its own: wordings never trained on.
    """

    models: dict[str, str] = field(default_factory=dict)  # name -> weights; the first is compared
    manifest: str | None = None  # None: data.validation_manifest
    pairs: int | None = None  # how many are drawn, always the same ones; None: all
    seeds: list[int] = field(default_factory=lambda: [0])  # of the edits
    settings: list[str] = field(default_factory=list)
    banks: dict[str, str] = field(default_factory=dict)  # task -> text file of sentences, or a bank


@dataclass
class TrainConfig:
    """All settings of a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: StepsConfig = field(default_factory=StepsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig | None = None

    @classmethod
    def load(cls, path: str | Path, overrides: list[str]) -> "TrainConfig":
        """Read a YAML file and overrides, and check them; InputError names file and key."""
        config = load_config(cls, path, overrides)
        config.check()
        return config

    @property
    def edit_resolution(self) -> int:
        """Of edits in validation, in the evaluation, and with the weights."""
        return self.validation.resolution or self.data.resolution

    def check(self) -> None:
        """Raise InputError for settings that cannot be or do not go together."""
        _check_data(self.data)
        _check_shares(self.data)
        _check_values(self)
        if self.run.name != Path(self.run.name).name or self.run.name in ("", ".."):
            raise InputError(f"run.name is {self.run.name!r}, expected the name of one folder")
        if self.data.cache and self.data.on_error == "skip":
            raise InputError(
                "data.cache needs every pair: set data.on_error=stop or data.cache=false"
            )
        if self.objective.kind != "edit":
            _check_other_kind(self)
        self.objective.dropout.check("objective.dropout")
        self.validation.edit.check()
        wrapped = self.validation.edit.knobs.find(Wrap) is not None
        if wrapped != (self.objective.kind == "wrapping"):
            raise InputError(
                f"validation.edit.fidelity is {self.validation.edit.fidelity!r}: objective.kind "
                "wrapping needs a stack with wrap, and only that one has a wrapping to validate"
            )
        check_needs(self.validation.edit, negatives=None, has_weak=False)
        if self.evaluation is not None:
            _check_evaluation(self)


def _check_values(config: TrainConfig) -> None:
    for key, known in CHOICES.items():
        value = attrgetter(key)(config)
        if value is not None and value not in known:
            raise InputError(f"{key} is {value!r}; {suggestion(value, known)}")
    for expected, (is_right, keys) in RANGES.items():
        for key in keys.split():
            value = attrgetter(key)(config)
            if value is not None and not is_right(value):
                raise InputError(f"{key} is {value}, expected {expected}")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"optimizer.betas is {betas}, expected two in [0, 1)")


def _check_other_kind(config: TrainConfig) -> None:
    """Refuse settings that have no meaning for an autoencoder, or for wrapping its decoder."""
    for name in ("prediction_type", "zero_terminal_snr", "min_snr_gamma"):
        if getattr(config.objective, name) is not None:
            raise InputError(f"objective.{name} is for objective.kind edit: leave it out")
    if config.data.cache:
        raise InputError("data.cache holds the output of an autoencoder: it cannot train one")
    if config.objective.kind == "autoencoder" and config.train.precision == "bfloat16":
        raise InputError("train.precision: an autoencoder is trained in float32")
    for name in ("unet", "vae"):
        if config.objective.kind == "wrapping" and getattr(config.model, name) is not None:
            raise InputError(
                f"model.{name}: feature wrapping is trained with the networks of model.weights: "
                "leave it out"
            )


def _check_evaluation(config: TrainConfig) -> None:
    evaluation = config.evaluation
    if config.objective.kind == "autoencoder":
        raise InputError("evaluation is for objective.kind edit: leave it out")
    if evaluation.manifest is None and config.data.validation_manifest is None:
        raise InputError("evaluation.manifest must be set: there is no data.validation_manifest")
    if evaluation.pairs is not None and evaluation.pairs < 1:
        raise InputError(f"evaluation.pairs is {evaluation.pairs}, expected 1 or more")
    if not evaluation.seeds:
        raise InputError("evaluation.seeds is empty, expected at least one")
    if TUNED in evaluation.models:
        raise InputError(
            f"evaluation.models.{TUNED}: the trained model has this name: take another"
        )


def _check_data(data: DataConfig) -> None:
    if (data.manifest is None) == (data.photos is None):
        raise InputError("set data.manifest (pairs) or data.photos (degraded on the fly), not both")
    if data.manifest is not None and data.validation_manifest is None:
        raise InputError("data.manifest needs data.validation_manifest, pairs not trained on")
    if data.prepare and data.manifest is None:
        raise InputError("data.prepare makes manifests: set data.manifest, or leave it out")
    if data.photos is not None:
        if not data.tasks:
            raise InputError("data.tasks is empty, expected at least one")
        for task in data.tasks:
            check_task(task, "data.tasks")
        if not data.held_out:
            raise InputError("data.held_out is empty: name photos to use only for validation")
    data.degrade.check("data.degrade")
    if data.cache and data.draws is None and (data.photos is not None or data.max_zoom > 1):
        what = "data.photos" if data.photos is not None else f"data.max_zoom={data.max_zoom}"
        raise InputError(
            f"data.cache cannot hold what {what} draws again at each visit: set data.draws, the "
            "number of fixed crops and degradations of each pair to encode"
        )


def _check_shares(data: DataConfig) -> None:
    """Check the shares of the tasks."""
    if data.mixture is None:
        return
    if data.temperature is not None:
        raise InputError("data.mixture and data.temperature both set the tasks' shares: choose one")
    for task, weight in data.mixture.items():
        if not 0 <= weight < math.inf:
            raise InputError(f"data.mixture.{task} is {weight}, expected a number of 0 or more")
    if not any(data.mixture.values()):
        raise InputError(f"data.mixture is {data.mixture}, expected a weight above 0")
