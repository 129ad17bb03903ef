"""The autoencoder tile by tile: the same result, in memory that does not grow with the picture.

Only one tile of one feature map is in memory (layer 1). The maps are files: a convolution reads a
tile of one, with the rim that its kernel reaches, and writes a tile of the next, so nothing is
computed twice and there is no seam. What looks at the whole picture does so by sums: group norms by
those of every channel, taken in float64 while a map is written; attention by a softmax that goes on
over tiles of keys (arXiv:2112.05682, sec. 2). Shapes: maps of H x W pixels and C channels.
"""

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.errors import InputError
from ipx2p.models.blocks import Attention, Downsample, ResnetBlock, Upsample
from ipx2p.models.wrapping import WrapLayer


class Window(NamedTuple):
    """A part of a map, in its pixels; ends are exclusive."""

    top: int
    bottom: int
    left: int
    right: int


class FeatureMap:
    """A feature map of one picture, in an unnamed file of the temporary folder (TMPDIR).

    The file is (H, W, C), so that a tile is one piece in each row. Between writing and reading it
    is usually in the system's cache, which gives way when programs need the memory.

    Args:
        size: H and W.
        tile: side of the tiles, in pixels of this map.
        compute: the values of a window, (1, C, h, w), which fill the map.
    Attributes:
        channels: C.
        sums, squares: of the values and of their squares in each channel, (C,), float64.
    """

    def __init__(
        self, size: tuple[int, int], tile: int, compute: Callable[[Window], Tensor]
    ) -> None:
        self.size, self.tile = size, tile
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        self.sums = self.squares = torch.zeros((), dtype=torch.float64)
        for window in self.windows():
            self._write(window, compute(window))

    def windows(self) -> Iterator[Window]:
        """The tiles: they cover the map and do not overlap."""
        height, width = self.size
        for top in range(0, height, self.tile):
            for left in range(0, width, self.tile):
                bottom, right = min(top + self.tile, height), min(left + self.tile, width)
                yield Window(top, bottom, left, right)

    def read(self, window: Window) -> Tensor:
        """(1, C, h, w), on the device of what was written."""
        top, bottom, left, right = window
        values = torch.empty(bottom - top, right - left, self.channels, dtype=self.dtype)
        for row, memory in enumerate(values.view(torch.uint8).flatten(1).numpy(), top):
            self._seek(row, left)
            self.file.readinto(memory)
        return values.to(self.device).permute(2, 0, 1)[None]

    def normalised(self, window: Window, norm: nn.GroupNorm) -> Tensor:
        """The same, normalised by the statistics of the whole map."""
        count = self.size[0] * self.size[1] * self.channels // norm.num_groups
        mean, square = (
            sums.unflatten(0, (norm.num_groups, -1)).sum(1) / count
            for sums in (self.sums, self.squares)
        )
        rstd = (square - mean.square() + norm.eps).rsqrt()
        each = self.channels // norm.num_groups
        mean, rstd = (x.repeat_interleave(each).to(self.device) for x in (mean, rstd))
        factor = rstd * norm.weight
        shift = norm.bias - mean * factor
        factor, shift = (x.to(self.dtype)[:, None, None] for x in (factor, shift))
        return self.read(window).mul_(factor).add_(shift)

    def close(self) -> None:
        """Give the file's room back."""
        self.file.close()

    def _write(self, window: Window, values: Tensor) -> None:
        self.channels, self.dtype, self.device = values.shape[1], values.dtype, values.device
        rows = values[0].permute(1, 2, 0).cpu()  # (1, C, h, w) -> (h, w, C)
        for row, pixels in enumerate(rows, window.top):
            exact = pixels.double()
            self.sums = self.sums + exact.sum(0)
            self.squares = self.squares + exact.square().sum(0)
            self._seek(row, window.left)
            self.file.write(pixels.contiguous().view(torch.uint8).numpy())

    def _seek(self, row: int, column: int) -> None:
        self.file.seek((row * self.size[1] + column) * self.channels * self.dtype.itemsize)


@torch.no_grad()
def in_tiles(network: nn.Module, x: Tensor, tile: int, *wraps: WrapLayer) -> Tensor:
    """What an encoder or decoder gives for x, without gradients.

    Args:
        network: has `layers()` in their order, then `conv_norm_out` and `conv_out`.
        x: (B, C, H, W), taken one after another.
        tile: side of the tiles in pixels of x.
        wraps: passed to `layers`; with B = 1.
    Returns: (B, C', H', W').
    Raises: InputError where the temporary folder has no room.
    """
    result = None
    with _room(x):
        for index, sample in enumerate(x.split(1)):
            seen = FeatureMap(sample.shape[-2:], tile, partial(_part, sample))
            for layer in network.layers(*wraps):
                seen = _next(layer, seen)
            last = _convolved(network.conv_out, seen, network.conv_norm_out)
            if result is None:
                result = x.new_empty(len(x), last.channels, *last.size)
            for window in last.windows():
                _part(result[index], window).copy_(last.read(window)[0])
            seen.close()
            last.close()
    return result


@torch.no_grad()
def features_in_tiles(encoder: nn.Module, pixels: Tensor, tile: int) -> list[FeatureMap]:
    """`encoder.features` of one picture, (1, 3, H, W), as maps; arguments as of `in_tiles`."""
    found: list[FeatureMap] = []
    with _room(pixels):
        seen = FeatureMap(pixels.shape[-2:], tile, partial(_part, pixels))
        seen = _next(encoder.conv_in, seen)
        for level in encoder.down_blocks[:-1]:
            *resnets, halve = level.layers()
            for resnet in resnets:
                seen = _next(resnet, seen)
            found.append(seen)
            seen = _convolved(halve, seen)
        seen.close()
    return found


@contextmanager
def _room(x: Tensor) -> Iterator[None]:
    """Report a temporary folder without room for the maps of x as an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"no room in {tempfile.gettempdir()} for the feature maps of {x.shape[-1]} x "
            f"{x.shape[-2]}: set TMPDIR to a folder of a larger disk"
        ) from error


def reach(window: Window, size: tuple[int, int], down: int, up: int) -> tuple[Window, Window]:
    """What a 3x3 convolution needs for a window of its output.

    Args:
        window: of the output. size: of the input map.
        down, up: input pixels for `up` output pixels: 1, 1; or 2, 1 (padded only right and below);
            or 1, 2 (enlarged, then convolved).
    Returns: the window of the input, and where the asked one lies in its output.
    """
    seen, inner = [], []
    for start, stop, side in zip(window[::2], window[1::2], size, strict=True):
        first = max((start * down - (down == 1)) // up, 0)
        seen += [first, min((stop * down + up) // up, side)]
        offset = start - first * up // down
        inner += [offset, offset + stop - start]
    return Window(*seen), Window(*inner)


def _part(x: Tensor, window: Window) -> Tensor:
    top, bottom, left, right = window
    return x[..., top:bottom, left:right]


def _next(layer: nn.Module | WrapLayer, x: FeatureMap) -> FeatureMap:
    """The map after a layer; the one before it is closed."""
    if isinstance(layer, ResnetBlock):
        between = _convolved(layer.conv1, x, layer.norm1)
        result = _convolved(
            layer.conv2, between, layer.norm2, lambda window: layer.conv_shortcut(x.read(window))
        )
        between.close()
    elif isinstance(layer, Attention):
        result = _attended(layer, x)
    elif isinstance(layer, WrapLayer):
        result = _wrapped(layer, x)
    else:
        result = _convolved(layer, x)
    x.close()
    return result


def _convolved(
    layer: nn.Module,
    x: FeatureMap,
    norm: nn.GroupNorm | None = None,
    skip: Callable[[Window], Tensor] | None = None,
) -> FeatureMap:
    """A 3x3 convolution, after norm and SiLU if there is a norm, plus what `skip` gives."""
    down, up = 1 + isinstance(layer, Downsample), 1 + isinstance(layer, Upsample)

    def compute(window: Window) -> Tensor:
        seen, inner = reach(window, x.size, down, up)
        values = F.silu(x.normalised(seen, norm), inplace=True) if norm else x.read(seen)
        values = _part(layer(values), inner)
        return values + skip(window) if skip else values

    height, width = x.size
    return FeatureMap((height * up // down, width * up // down), x.tile * up // down, compute)


def _wrapped(layer: WrapLayer, x: FeatureMap) -> FeatureMap:
    """The map with the features of the source worked in; those are closed."""
    maps = (layer.encoded, x)
    both = FeatureMap(x.size, x.tile, lambda w: torch.cat([m.read(w) for m in maps], dim=1))
    for resnet in layer.block.resnets:
        both = _next(resnet, both)
    change = _convolved(layer.block.conv_out, both)
    result = FeatureMap(x.size, x.tile, lambda w: x.read(w) + layer.weight * change.read(w))
    for used in (layer.encoded, both, change):
        used.close()
    return result


def _attended(layer: Attention, x: FeatureMap) -> FeatureMap:
    """The attention of every pixel to all pixels, added to the map."""

    def tokens(window: Window) -> Tensor:
        return x.normalised(window, layer.group_norm).flatten(2).transpose(1, 2)

    def on_map(tokens: Tensor, window: Window) -> Tensor:  # (1, N, C) -> (1, C, h, w)
        return tokens.transpose(1, 2).unflatten(2, (window.bottom - window.top, -1))

    keys_values = FeatureMap(
        x.size, x.tile, lambda w: on_map(torch.cat(layer.keys_values(tokens(w)), dim=-1), w)
    )

    def compute(window: Window) -> Tensor:
        pairs = (keys_values.read(w).flatten(2).chunk(2, dim=1) for w in keys_values.windows())
        mixed = attention_over(layer.to_q(tokens(window)), pairs)
        return x.read(window) + on_map(layer.to_out(mixed), window)

    result = FeatureMap(x.size, x.tile, compute)
    keys_values.close()
    return result


def attention_over(queries: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of queries (1, N, C) to keys and values that come in parts, (1, C, M) each.

    The softmax is kept as numerator and denominator, both divided by exp(the largest score yet).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scaled = queries.to(dtype) / queries.shape[-1] ** 0.5
    largest, numerator, denominator = scaled.new_full((1,), -torch.inf), 0.0, 0.0
    for keys, values in pairs:
        scores = scaled @ keys.to(dtype)
        before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        del scores  # (N, M), the largest tensor here: one at a time
        fade = (before - largest).exp()
        numerator = numerator * fade + weights @ values.to(dtype).transpose(1, 2)
        denominator = denominator * fade + weights.sum(-1, keepdim=True)
        del weights
    return (numerator / denominator).to(queries.dtype)
