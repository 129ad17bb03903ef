"""White-box Cartoonization: the generator, its guided filter, import of weights (layer 2).

Wang and Yu, "Learning to Cartoonize Using White-Box Cartoon Representations", CVPR 2020: a small
U-Net redraws the picture, then a guided filter restores the edges of the photograph. The published
weights are a TensorFlow 1 checkpoint, which `import_whitebox` converts. TensorFlow's behaviour is
kept: "SAME" padding, which at stride 2 is at the right and the bottom only, and bilinear upsampling
without half-pixel centres. Internally the network sees blue, green, red in [-1, 1].

Its strokes have a size in pixels: the authors resize pictures to a short side of at most 720, and
crop them to multiples of 8. `cartoonize` takes any size and never resizes.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.images import pixels01_from_pixels, pixels_from_pixels01
from ipx2p.tensor_files.tensors import (
    check_fit,
    load_strict,
    read_metadata,
    read_tensors,
    save_tensors,
)

CONTENT = "white-box cartoonization generator"  # metadata "content" of the file
MULTIPLE = 4  # the network halves the picture twice
FILTER_RADIUS, FILTER_EPS = 1, 5e-3  # of the published inference code, in [-1, 1] units

SCOPE = "generator/"
OPTIMIZER_SLOTS = ("/Adam", "/Adam_1", "/Momentum", "/RMSProp", "/RMSProp_1")
# Native and published names of the layers.
CONVOLUTIONS = {
    "enter": "Conv",
    "halve1": "Conv_1",
    "widen1": "Conv_2",
    "halve2": "Conv_3",
    "widen2": "Conv_4",
    **{f"blocks.{i}.conv{j}": f"block_{i}/conv{j}" for i in range(4) for j in (1, 2)},
    "narrow2": "Conv_5",
    "join1": "Conv_6",
    "narrow1": "Conv_7",
    "join0": "Conv_8",
    "leave": "Conv_9",
}


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(_leaky(self.conv1(x)))


class Generator(nn.Module):
    """The published network: (N, 3, H, W) -> (N, 3, H, W), blue-green-red, about [-1, 1].

    Args:
        width: channels at full size (32 in the published weights); doubled at each level below.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 7, padding=3)
        self.halve1 = nn.Conv2d(width, width, 3, stride=2)
        self.widen1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.halve2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2)
        self.widen2 = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(4)))
        self.narrow2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.join1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.narrow1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.join0 = nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 3, 7, padding=3)

    def forward(self, bgr: Tensor) -> Tensor:
        """H and W must be multiples of `MULTIPLE`."""
        full = _leaky(self.enter(bgr))
        half = _leaky(self.widen1(_leaky(self.halve1(_pad_corner(full)))))
        quarter = _leaky(self.widen2(_leaky(self.halve2(_pad_corner(half)))))
        quarter = _leaky(self.narrow2(self.blocks(quarter)))
        half = _leaky(self.narrow1(_leaky(self.join1(_double(quarter) + half))))
        return self.leave(_leaky(self.join0(_double(half) + full)))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _pad_corner(x: Tensor) -> Tensor:
    """TensorFlow's "SAME" for a 3 x 3 kernel at stride 2 over even sides."""
    return F.pad(x, (0, 1, 0, 1))


def _double(x: Tensor) -> Tensor:
    """Bilinear upsampling where output pixel i samples at i / 2 (resize_bilinear of TF 1)."""
    height, width = x.shape[-2:]
    # With one more repeated row and column, aligned corners give exactly that step.
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    size = (2 * height + 1, 2 * width + 1)
    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    return x[..., : 2 * height, : 2 * width]


def guided_filter(guide: Tensor, picture: Tensor, radius: int, eps: float) -> Tensor:
    """Smooth a picture while keeping the edges of the guide, channel by channel.

    He et al., "Guided Image Filtering", eq. 5, 6, 8: in each window the result is a * guide + b.

    Args:
        guide, picture: (N, C, H, W). radius: windows are 2 radius + 1 wide, clipped at borders.
        eps: the guide counts as flat where its variance is below this.
    """

    def mean(x: Tensor) -> Tensor:
        size = 2 * radius + 1
        return F.avg_pool2d(x, size, stride=1, padding=radius, count_include_pad=False)

    guide_mean, picture_mean = mean(guide), mean(picture)
    covariance = mean(guide * picture) - guide_mean * picture_mean
    variance = mean(guide * guide) - guide_mean**2
    a = covariance / (variance + eps)
    b = picture_mean - a * guide_mean
    return mean(a) * guide + mean(b)


def cartoonize(generator: Generator, pixels01: Tensor) -> Tensor:
    """The cartoon of photographs, (N, 3, H, W) in [0, 1], same size.

    Sides are padded to multiples of 4 by reflection at the right and the bottom, and the result is
    cropped: part of the method, since the network halves the picture twice.
    """
    height, width = pixels01.shape[-2:]
    bgr = pixels_from_pixels01(_reflect(pixels01)).flip(1)
    cartoon = guided_filter(bgr, generator(bgr), FILTER_RADIUS, FILTER_EPS)
    return pixels01_from_pixels(cartoon.flip(1)[..., :height, :width])


def _reflect(x: Tensor) -> Tensor:
    """Pad both sides to a multiple, mirrored about the last pixel, repeatedly for tiny pictures."""
    for dim in (-2, -1):
        side = x.shape[dim]
        places = torch.arange(-(-side // MULTIPLE) * MULTIPLE, device=x.device)
        last = side - 1
        mirrored = last - (last - places % max(1, 2 * last)).abs()
        x = x.index_select(dim, mirrored)
    return x


def load_whitebox(path: Path) -> Generator:
    """Load a file written by `import_whitebox`.

    Raises: InputError if the file is damaged, is something else, or lacks tensors.
    """
    tensors = read_tensors(path)
    if (content := read_metadata(path).get("content")) != CONTENT:
        found = f"is labelled {content!r}" if content else "has no label"
        names = ", ".join(sorted(tensors)[:2])
        raise InputError(
            f"{path} is not a White-box teacher: it {found}, expected {CONTENT!r}; it holds "
            f"{len(tensors)} tensors ({names} ...): make one with `prepare teacher`"
        )
    enter = tensors.get("enter.bias")
    with torch.device("meta"):
        generator = Generator(enter.numel() if enter is not None else 32)
    load_strict(generator, tensors, str(path))
    return generator.float().eval().requires_grad_(False)


def import_whitebox(checkpoint: Path, output: Path) -> None:
    """Convert the published weights to a safetensors file for `load_whitebox`.

    Only the generator's variables are taken, without the optimizer's state (`OPTIMIZER_SLOTS`).

    Args:
        checkpoint: a TensorFlow checkpoint, as a folder or a prefix such as
            `saved_models/model-33999`; or a .safetensors file with the same arrays and names.
        output: a .safetensors file, written whole or not at all.
    Raises: InputError if TensorFlow is missing, or for a checkpoint of something else.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: expected a name that ends in .safetensors")
    is_safetensors = checkpoint.suffix == ".safetensors"
    arrays = read_tensors(checkpoint) if is_safetensors else _read_tensorflow(checkpoint)
    arrays = {
        name: array
        for name, array in arrays.items()
        if name.startswith(SCOPE) and not name.endswith(OPTIMIZER_SLOTS)
    }
    first = arrays.get("generator/Conv/biases")
    if first is None:
        raise InputError(
            f"{checkpoint} has no variable generator/Conv/biases: expected a checkpoint of the "
            "White-box generator, such as the folder saved_models of its repository"
        )
    with torch.device("meta"):
        expected = _published(Generator(first.numel()).state_dict())
    check_fit(expected, arrays, str(checkpoint))
    save_tensors(_native(arrays), output, metadata={"content": CONTENT})


def _published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native tensors under the published names, kernels as (H, W, in, out)."""
    renamed = {}
    for native, published in CONVOLUTIONS.items():
        weight, bias = tensors[f"{native}.weight"], tensors[f"{native}.bias"]
        renamed[f"{SCOPE}{published}/weights"] = weight.permute(2, 3, 1, 0)
        renamed[f"{SCOPE}{published}/biases"] = bias
    return renamed


def _native(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_published`, in float32."""
    tensors = {}
    for native, published in CONVOLUTIONS.items():
        weight = arrays[f"{SCOPE}{published}/weights"]
        tensors[f"{native}.weight"] = weight.permute(3, 2, 0, 1).float().contiguous()
        tensors[f"{native}.bias"] = arrays[f"{SCOPE}{published}/biases"].float()
    return tensors


def _read_tensorflow(checkpoint: Path) -> dict[str, Tensor]:
    """The variables of the generator's scope."""
    if not checkpoint.is_dir() and not Path(f"{checkpoint}.index").is_file():
        raise InputError(
            f"no TensorFlow checkpoint at {checkpoint}: expected a folder that holds a file "
            "'checkpoint', or a prefix such as saved_models/model-33999, next to its .index file"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no messages about its build
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError(
            f"reading {checkpoint} needs TensorFlow, which is not installed: "
            "pip install tensorflow-cpu"
        ) from error
    try:
        reader = tf.train.load_checkpoint(str(checkpoint))
        names = [name for name in reader.get_variable_to_shape_map() if name.startswith(SCOPE)]
        return {name: torch.from_numpy(reader.get_tensor(name)) for name in names}
    except Exception as error:  # ValueError, OpError, or IndexError for a truncated file
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read the checkpoint {checkpoint}: {reason}") from error
