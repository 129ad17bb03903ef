"""Networks that compare pictures: CLIP, DINO, LPIPS and DISTS (layer 4).

Numbers of different networks, or of one network with pictures prepared differently, do not compare,
so each says its name, the digest of its weights, and how it prepares pictures.
Pictures are `pixels01`, float in [0, 1]; results are on the CPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from transformers import CLIPModel, CLIPTokenizerFast, ViTModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.utils import logging

from ipx2p.errors import InputError
from ipx2p.images import image_from_pixels01, pixels01_from_image
from ipx2p.metrics import check_range, mean_of
from ipx2p.tensor_files.tensors import digest, load_strict, read_tensors
from ipx2p.weights.readers import HUB_ID

NO_CHANGE = 1e-5  # of features of length 1; one level of one pixel is above it
_CENTRE = "shorter side bicubic to {}, centre {}"
LPIPS_NETS = {"alexnet": "alex", "squeezenet1_1": "squeeze", "vgg16": "vgg"}


class Network:
    """A network with its name, the digest of its weights, and how it prepares pictures.

    `features` of those that see one picture: (3, H, W) -> (1, ...), of any size.
    """

    def __init__(self, model: nn.Module, name: str, preprocessing: str) -> None:
        self.model = model.float().eval()
        self.name, self.preprocessing = name, preprocessing
        self.digest = digest(model.state_dict())

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:12]}), {self.preprocessing}"

    def look(self, pixels01: Tensor) -> Tensor:
        """The features of a picture, float32 on the CPU; InputError for another range."""
        check_range(pixels01, self.name)
        return self.features(pixels01.float().cpu()).cpu()


class Clip(Network):
    """CLIP's features, of length 1.

    preprocessing: "square", as InstructPix2Pix measures (arXiv:2211.09800, sec. 4): bicubic to the
    model's square regardless of aspect; or "crop", as CLIP, MagicBrush and PIE-Bench do.
    paper_compat: with "square", pixels in [-1, 1], as InstructPix2Pix's script feeds them to a
    network that expects [0, 1].
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizerFast,
        name: str,
        preprocessing: str = "square",
        paper_compat: bool = False,
    ) -> None:
        self.size = model.config.vision_config.image_size
        self.tokenizer, self.is_square = tokenizer, preprocessing == "square"
        self.shifts = self.is_square and paper_compat
        square = f"resized to {self.size} x {self.size}"
        how = square if self.is_square else _CENTRE.format(self.size, self.size)
        how += ", pixels in [-1, 1] as the published script" if self.shifts else ""
        super().__init__(model, name, how)

    @torch.no_grad()
    def features(self, pixels01: Tensor) -> Tensor:
        if self.is_square:
            pixels = 2 * pixels01 - 1 if self.shifts else pixels01
            size = (self.size, self.size)
            shown = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False)
        else:
            shown = _centre(pixels01, self.size, self.size)
        shown = TF.normalize(shown, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD).to(self.model.device)
        pooled = self.model.vision_model(pixel_values=shown).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def text(self, sentence: str) -> Tensor:
        """A sentence -> features, (1, D); one that is too long for the model is cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [sentence], truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()


class Dino(Network):
    """DINO's class token, of length 1, of the centre of a picture as MagicBrush measures."""

    def __init__(self, model: ViTModel, name: str) -> None:
        self.size = model.config.image_size
        self.short = self.size * 256 // 224
        super().__init__(model, name, _CENTRE.format(self.short, self.size))

    @torch.no_grad()
    def features(self, pixels01: Tensor) -> Tensor:
        shown = _centre(pixels01, self.short, self.size)
        shown = TF.normalize(shown, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        states = self.model(pixel_values=shown.to(self.model.device)).last_hidden_state
        return F.normalize(states[:, 0], dim=-1)


class Structure(Network):
    """Which parts of a picture are alike: cosines between all keys of DINO's last layer.

    From Splice (arXiv:2201.00424, sec. 3.1), as PIE-Bench measures: (1, T, T) for T patches and the
    class token.
    paper_compat: as PIE-Bench's script, which normalises values in 0..255 as if they were in
    [0, 1], and whose torchvision resized tensors without antialiasing.
    """

    def __init__(self, model: ViTModel, name: str, paper_compat: bool = False) -> None:
        self.size, self.is_published = model.config.image_size, paper_compat
        how = f"shorter side to {self.size}, keys of the last layer"
        published = ", values in 0..255 and no antialiasing as the published script"
        how += published if paper_compat else ""
        super().__init__(model, name, how)
        names = ("k_proj", "key")  # of transformers 5, 4
        layers = [x for name, x in model.named_modules() if name.rpartition(".")[2] in names]
        layers[-1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, keys: Tensor) -> None:
        self.keys = keys

    @torch.no_grad()
    def features(self, pixels01: Tensor) -> Tensor:
        values = 255 * pixels01[None] if self.is_published else pixels01[None]
        limit = {"max_size": self.size * 480 // 224, "antialias": not self.is_published}
        shown = TF.resize(values, [self.size], **limit)
        shown = TF.normalize(shown, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.model(pixel_values=shown.to(self.model.device), interpolate_pos_encoding=True)
        keys = F.normalize(self.keys, dim=-1)  # (1, T, D), all heads
        return keys @ keys.transpose(1, 2)


class Distance(Network):
    """A distance that a package computes from two pictures of one size: LPIPS, DISTS."""

    def __init__(self, model: nn.Module, name: str, **options: Any) -> None:
        super().__init__(model, name, "full size")
        self.options = options

    @torch.no_grad()
    def __call__(
        self, pixels01: Tensor, reference01: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """(N, 3, H, W) twice -> (N,).

        counted: weights of positions, (N, 1, H, W), over which LPIPS's map is averaged, at full
        size as its package makes it.
        """
        device = next(self.model.parameters()).device
        for pixels in (pixels01, reference01):
            check_range(pixels, self.name)
        both = (pixels.float().to(device) for pixels in (pixels01, reference01))
        if counted is None:
            return self.model(*both, **self.options).view(-1).cpu()
        with patch.object(self.model, "spatial", True):
            return mean_of(self.model(*both, **self.options).cpu().double(), counted)


@dataclass(frozen=True)
class Networks:
    """Those that are there; see `Networks.load`."""

    clip: Clip | None = None
    dino: Dino | None = None
    structure: Structure | None = None
    lpips: Distance | None = None
    dists: Distance | None = None

    @property
    def given(self) -> set[str]:
        """The names of those that are there."""
        return {name for name, network in vars(self).items() if network is not None}

    @classmethod
    def load(
        cls,
        device: torch.device,
        *,
        clip: str | None = None,
        dino: str | None = None,
        lpips: str | Path | None = None,
        dists: str | Path | None = None,
        preprocessing: str = "square",
        paper_compat: bool = False,
    ) -> "Networks":
        """Load what is named.

        clip, dino: a folder or hub id. lpips: weights of torchvision's AlexNet, SqueezeNet 1.1 or
        VGG-16; dists: of its VGG-16; what comes on top of these is in the packages.
        Raises: InputError for a network that is missing or not whole, or a missing package.
        """
        found: dict[str, Any] = {}
        if clip:
            model = _load(CLIPModel, clip, "CLIP", "openai/clip-vit-large-patch14").to(device)
            tokenizer = _load_tokenizer(clip, model.config.text_config.vocab_size)
            found["clip"] = Clip(model, tokenizer, clip, preprocessing, paper_compat)
        if dino:
            example = "facebook/dino-vits16"
            model = _load(ViTModel, dino, "DINO", example, add_pooling_layer=False).to(device)
            found["dino"] = Dino(model, dino)
            found["structure"] = Structure(model, dino, paper_compat)
        if lpips:
            found["lpips"] = _lpips(Path(lpips), device)
        if dists:
            found["dists"] = _dists(Path(dists), device)
        return cls(**found)


def direction_similarity(
    source: Tensor, edited: Tensor, source_text: Tensor, target_text: Tensor
) -> Tensor:
    """Cosine of the change in pictures and the change in captions, (N,); no change gives 0.

    Args: features of length 1, (N, D) or (D,).
    """
    change = edited - source
    similarity = F.cosine_similarity(change, target_text - source_text, dim=-1)
    return torch.where(change.norm(dim=-1) < NO_CHANGE, 0.0, similarity)


def _lpips(path: Path, device: torch.device) -> Distance:
    """LPIPS 0.1 (arXiv:1801.03924) on the backbone that the file holds."""
    package = _package("lpips", "lpips")
    backbone, features = _backbone(path, [*LPIPS_NETS])
    with _given(backbone, features):
        model = package.LPIPS(net=LPIPS_NETS[backbone], verbose=False)
    # normalize: from [0, 1] to its [-1, 1]
    return Distance(model.to(device), f"LPIPS 0.1, {backbone}", normalize=True)


def _dists(path: Path, device: torch.device) -> Distance:
    """DISTS (arXiv:2004.07728) on the VGG-16 that the file holds."""
    package = _package("DISTS_pytorch", "DISTS-pytorch")
    backbone, features = _backbone(path, ["vgg16"])
    with _given(backbone, features):
        model = package.DISTS(load_weights=False)
    own = Path(package.__file__).parent / "weights.pt"
    load_strict(model, {**model.state_dict(), **read_tensors(own)}, str(own))
    return Distance(model.to(device), f"DISTS, {backbone}")


def _centre(pixels01: Tensor, short: int, size: int) -> Tensor:
    """The shorter side bicubic to `short`, then the centre, as Pillow does it in 8 bits."""
    image = TF.resize(image_from_pixels01(pixels01), short, InterpolationMode.BICUBIC)
    return pixels01_from_image(TF.center_crop(image, [size, size]))[None]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and bars: what is missing is said in one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _load(kind: type, source: str, label: str, example: str, **options: Any) -> nn.Module:
    if not os.path.isdir(os.path.expanduser(source)) and not HUB_ID.fullmatch(source):
        raise InputError(
            f"{source} is not a folder with a {label} model: expected one, or a hub id such as "
            f"{example}"
        )
    options |= {"dtype": torch.float32, "output_loading_info": True}
    model, report = _read(kind, source, f"{label} model", **options)
    lacking = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if lacking:
        raise InputError(
            f"{source} is not a complete {label} model: {len(lacking)} tensors are missing or of "
            f"another shape ({lacking[0]}, ...): name the folder of the whole model"
        )
    return model


def _load_tokenizer(source: str, num_tokens: int) -> CLIPTokenizerFast:
    tokenizer = _read(CLIPTokenizerFast, source, "tokenizer of CLIP")
    if len(tokenizer) != num_tokens:  # without files, some versions make an empty one
        raise InputError(
            f"{source} holds no tokenizer of its CLIP model: expected {num_tokens} tokens, found "
            f"{len(tokenizer)}: add the files of its tokenizer"
        )
    return tokenizer


def _read(kind: type, source: str, what: str, **options: Any) -> Any:
    try:
        with _quiet():
            return kind.from_pretrained(os.path.expanduser(source), **options)
    except Exception as error:  # of any kind that its parsers and the hub raise
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise InputError(f"{source} holds no {what}: {reason}") from error


def _package(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f'the package {name} is not installed ({error}): pip install -e ".[metrics]"'
        ) from error


def _backbone(path: Path, names: Sequence[str]) -> tuple[str, nn.Module]:
    """Which of torchvision's networks a file holds, and its layers.

    Raises: InputError if it is none of these, or not whole.
    """
    tensors = read_tensors(path)
    held = {key.removeprefix("features."): x for key, x in tensors.items() if "features." in key}
    with torch.device("meta"):
        known = {name: getattr(torchvision.models, name)(weights=None).features for name in names}
    fitting = (name for name in names if known[name].state_dict().keys() == held.keys())
    name = next(fitting, names[-1])
    load_strict(known[name], held, f"{path}, read as {name},")
    return name, known[name]


@contextmanager
def _given(name: str, features: nn.Module) -> Iterator[None]:
    """Let packages that ask torchvision for a trained network get this one, and not download it."""
    given = SimpleNamespace(features=features)
    with patch.object(torchvision.models, name, lambda **_: given), torch.random.fork_rng([]):
        yield
