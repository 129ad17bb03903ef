"""Blocks of the U-Net and the VAE (layer 1, torch only).

Attribute names are the published state-dict keys (diffusers folder layout), so weights need no map.
Shapes: B samples, C channels, h x w (or H x W) pixels of a feature map, N tokens of width D.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# An override of attention for some samples of a batch: its kind, the blur's sigma in tokens (else
# 0), and the samples that it acts on, (B,) bool. Kinds: "identity" lets every token attend to
# itself alone (PAG, arXiv:2403.17377), "blur" smooths the queries over the picture (SEG,
# arXiv:2408.00760), "skip" passes the input of a transformer block through.
AttentionOverride = tuple[str, float, Tensor]
KeysValues = tuple[Tensor, Tensor]

# On a CPU (docs/performance.md has the measurements): a weight this many times as large as the
# feature map is multiplied as a matrix; from this many pixels up, enlarging in phases is faster.
PRODUCT_RATIO, PHASE_PIXELS = 60, 256
HAS_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timesteps, cosines first (DDPM, arXiv:2006.11239; order as in LDM).

    Args:
        timesteps: training indices 0..999, (B,); may be fractional.
        dim: width of the embedding, even.
    Returns: (B, dim), always float32: bfloat16 turns timestep 951 into 952.
    """
    half = dim // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with zero parameters: its branch contributes nothing at initialization."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution: (B, C, H, W) -> (B, C', H, W), with stride 2 half the size.

    On a CPU oneDNN brings the weight into an order of its own at every call. Where the weight is
    far larger than the feature map, as at the bottom of the U-Net, that takes longer than the
    convolution itself: there it is a matrix product (im2col), which takes the weight as it is.
    """

    def __init__(self, channels: int, out_channels: int, *, stride: int = 1, padding: int = 1):
        super().__init__(channels, out_channels, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.weight.numel() >= PRODUCT_RATIO * x.numel():
            return self.as_product(x)
        return super().forward(x)

    def as_product(self, x: Tensor) -> Tensor:
        """The same by a matrix product."""
        batch, channels, height, width = x.shape
        patches = F.unfold(x, 3, padding=self.padding, stride=self.stride)
        patches = patches.unflatten(1, (channels, 9)).transpose(0, 2)  # (9, C, B, N)
        weight = self.weight
        if weight.is_contiguous():  # rows of C x 9, else, in channels_last, of 9 x C
            weight, patches = weight.flatten(1), patches.transpose(0, 1)
        else:
            weight = weight.permute(0, 2, 3, 1).flatten(1)
        product = linear(weight, patches.flatten(0, 1).flatten(1).t(), None)
        product += self.bias[:, None]
        size = [(side + 2 * self.padding[0] - 3) // self.stride[0] + 1 for side in (height, width)]
        return product.view(-1, batch, *size).transpose(0, 1)


class Linear(nn.Linear):
    """A linear map, (..., C) -> (..., C'): what `nn.Linear` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C) times the transpose of (C', C), plus (C',) -> (..., C').

    On a CPU torch calls MKL, which AMD's cores run at 0.6 to 0.9 of the speed of oneDNN, above all
    where there are few tokens. Its operator for torch's compiler has no gradient.
    """
    by_mkl = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and HAS_MKL
    if by_mkl and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip; a time embedding is added between them."""

    def __init__(
        self, channels: int, out_channels: int, *, time_dim: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = Conv3x3(channels, out_channels)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and a time embedding (B, time_dim) -> (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Halve a feature map by a strided 3x3 convolution.

    The U-Net pads one pixel on every side; the VAE (`pad_all=False`) only right and bottom.
    """

    def __init__(self, channels: int, *, pad_all: bool) -> None:
        super().__init__()
        self.pad_all = pad_all
        self.conv = Conv3x3(channels, channels, stride=2, padding=1 if pad_all else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)); without `pad_all` rounded down."""
        return self.conv(x if self.pad_all else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarge a feature map by nearest neighbours, then smooth it by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), by default (B, C, 2H, 2W)."""
        batch, _, height, width = x.shape
        doubled = (2 * height, 2 * width)
        size = tuple(size or doubled)
        many = x.device.type == "cpu" and batch * height * width >= PHASE_PIXELS
        if many and size == doubled and not torch.is_grad_enabled():
            return self.in_phases(x)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

    def in_phases(self, x: Tensor) -> Tensor:
        """Twice the size with 4/9 of the work.

        Of three neighbouring rows in the enlarged map two are equal, so even and odd rows are each
        a convolution of the small map with two rows of weights, and so are columns.
        """
        batch, channels, height, width = x.shape
        woven = x.new_empty(batch, channels, height, 2, width, 2)
        x = F.pad(x, (1, 1, 1, 1))
        for row, of_row in enumerate(_phases(self.conv.weight, axis=2)):
            for column, weight in enumerate(_phases(of_row, axis=3)):
                seen = x[..., row : row + height + 1, column : column + width + 1]
                woven[:, :, :, row, :, column] = F.conv2d(seen, weight, self.conv.bias)
        return woven.flatten(4).flatten(2, 3)  # (B, C, H, 2, W, 2) -> (B, C, 2H, 2W)


def _phases(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """What three weights along an axis are for the even and the odd rows of an enlarged map."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context (arXiv:1706.03762)."""

    def __init__(
        self, dim: int, *, heads: int, context_dim: int | None = None, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        context_dim = dim if context_dim is None else context_dim
        self.to_q = Linear(dim, dim, bias=qkv_bias)
        self.to_k = Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = Linear(context_dim, dim, bias=qkv_bias)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | KeysValues | None = None,
        overrides: Sequence[AttentionOverride] = (),
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Tokens (B, N, D), context (B, M, context_dim) -> (B, N, D).

        Args:
            context: or what `keys_values` made of it; None for self-attention.
            overrides: of self-attention; all other samples are unchanged, bit for bit.
            size: height and width of the feature map, h * w = N, for the overrides.
        """
        context = tokens if context is None else context
        queries = self.to_q(tokens)
        keys, values = context if isinstance(context, tuple) else self.keys_values(context)
        for kind, sigma, rows in overrides:
            if kind == "blur":
                queries = torch.where(rows[:, None, None], blurred(queries, size, sigma), queries)
        q, k, v = map(self.split_heads, (queries, keys, values))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for kind, _, rows in overrides:
            if kind == "identity":
                attended = torch.where(rows[:, None, None], values, attended)
        return self.to_out(attended)

    def keys_values(self, context: Tensor) -> KeysValues:
        """(B, M, context_dim) -> keys and values, each (B, M, D)."""
        return self.to_k(context), self.to_v(context)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def blurred(tokens: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian blur of tokens over their picture, (B, N, D), N = h * w; above 9999 the mean.

    As in the code of arXiv:2408.00760: an odd kernel of 6 sigma, at most the picture; mirrored.
    """
    if sigma > 9999:
        return tokens.mean(dim=1, keepdim=True).expand_as(tokens)
    grid = tokens.transpose(1, 2).unflatten(2, size)  # (B, N, D) -> (B, D, h, w)
    for axis in (2, 3):
        side = grid.shape[axis]
        reach = min(math.ceil(6 * sigma) // 2, side // 2)
        offsets = torch.arange(-reach, reach + 1, device=tokens.device, dtype=torch.float32)
        kernel = (-0.5 * (offsets / sigma).square()).softmax(0).to(tokens.dtype)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        kernels = kernel.view(shape).repeat(grid.shape[1], 1, 1, 1)
        grid = F.conv2d(F.pad(grid, pad, mode="reflect"), kernels, groups=grid.shape[1])
    return grid.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)


class GEGLU(nn.Module):
    """Half of a projection, gated by the GELU of the other half (arXiv:2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, width)."""
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers on tokens, (B, N, D), four times as wide in between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is a dropout in the published layout; it has no weights.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class TokenConv(nn.Conv2d):
    """A linear map of tokens, stored as the 1x1 convolution that Stable Diffusion 1.x has."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, out_dim)."""
        return linear(tokens, self.weight.flatten(1), self.bias)


class TransformerBlock(nn.Module):
    """Attention of the picture to itself, to the instruction, and a feed-forward network."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads=heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self,
        tokens: Tensor,
        text: Tensor | KeysValues,
        overrides: Sequence[AttentionOverride],
        size: torch.Size,
    ) -> Tensor:
        """(B, N, C) -> the same shape; `size` is that of the feature map, for the overrides."""
        before = tokens
        tokens = tokens + self.attn1(self.norm1(tokens), overrides=overrides, size=size)
        tokens = tokens + self.attn2(self.norm2(tokens), text)
        tokens = tokens + self.ff(self.norm3(tokens))
        for kind, _, rows in overrides:
            if kind == "skip":
                tokens = torch.where(rows[:, None, None], before, tokens)
        return tokens
