"""The spatial transformer of the U-Net: self-attention, attention to the instruction, feed-forward.

From latent diffusion (arXiv:2112.10752, sec. 3.3), layer 1. Attribute names are the published
state-dict keys. Shapes: B samples, C channels, h x w of a feature map, N = h * w tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.models.blocks import Attention, AttentionOverride, FeedForward, zeroed


class TokenConv(nn.Conv2d):
    """A linear map of tokens, stored as the 1x1 convolution that Stable Diffusion 1.x has."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, out_dim)."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)


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
        text: Tensor,
        overrides: Sequence[AttentionOverride] = (),
        size: tuple[int, int] | None = None,
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


class Transformer(nn.Module):
    """Spatial transformer: the feature map as tokens, through attention layers, added back.

    Attention overrides call it by its `name`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        context_dim: int,
        depth: int,
        groups: int,
        linear: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.name = name
        projection = nn.Linear if linear else TokenConv
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = projection(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = zeroed(projection(dim, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        attention_overrides: Mapping[str, Sequence[AttentionOverride]],
    ) -> Tensor:
        """(B, C, h, w) and text (B, 77, D) -> (B, C, h, w)."""
        overrides, size = attention_overrides.get(self.name, ()), x.shape[-2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C), N = h * w
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, text, overrides, size)
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, size)  # (B, N, C) -> (B, C, h, w)
