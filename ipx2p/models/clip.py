"""The text transformer of CLIP, whose states the U-Net attends to (layer 1, torch only).

CLIP, arXiv:2103.00020, sec. 2.4: tokens see those before them, norms come before each branch.
Attribute names are the published state-dict keys without their prefix `text_model.`.
Shapes: B sentences of N tokens, width D.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipx2p.errors import InputError, suggestion
from ipx2p.published_fields import CLIP_L, TEXT_BOUNDS, check_bounds


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU with which OpenAI trained CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
# What a published config leaves out is that of CLIP ViT-B/32.
BASE = CLIP_L | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


class CausalAttention(nn.Module):
    """Multi-head attention of tokens to themselves and to those before them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Attention, then a network for each token, each added to its input."""

    def __init__(self, dim: int, hidden_dim: int, heads: int, activation: str, eps: float) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps)
        self.self_attn = CausalAttention(dim, heads)
        self.layer_norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, hidden_dim), "fc2": nn.Linear(hidden_dim, dim)}
        )
        self.activation = ACTIVATIONS[activation]

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        hidden = self.activation(self.mlp["fc1"](self.layer_norm2(tokens)))
        return tokens + self.mlp["fc2"](hidden)


class ClipText(nn.Module):
    """Token ids (B, N) -> states after the last norm (B, N, D).

    Args:
        config: a published config.json; see `BASE` for what it leaves out.
        where: its place, for errors.
    Raises: InputError for sizes out of bounds, or another activation.
    """

    def __init__(self, config: Mapping[str, Any] = CLIP_L, where: str = "config") -> None:
        super().__init__()
        for name, value in config.items():
            if name in TEXT_BOUNDS and isinstance(value, list):
                raise InputError(f"{where}: {name} is {value!r:.200}, expected a number")
        check_bounds(config, TEXT_BOUNDS, where)
        config = {**BASE, **config}
        activation, heads = config["hidden_act"], config["num_attention_heads"]
        if activation not in ACTIVATIONS:
            known = suggestion(str(activation), [*ACTIVATIONS])
            raise InputError(f"{where}: hidden_act is {activation!r}; {known}")
        self.width, self.length = config["hidden_size"], config["max_position_embeddings"]
        if self.width % heads:
            raise InputError(f"{where}: hidden_size {self.width} is no multiple of {heads} heads")
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": _embedding(config["vocab_size"], self.width),
                "position_embedding": _embedding(self.length, self.width),
            }
        )
        sizes = (config["intermediate_size"], heads, activation, config["layer_norm_eps"])
        blocks = [TextBlock(self.width, *sizes) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.final_layer_norm = nn.LayerNorm(self.width, config["layer_norm_eps"])

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, at most `length` for each sentence."""
        positions = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        tokens = self.embeddings["token_embedding"](ids) + positions
        for block in self.encoder["layers"]:
            tokens = block(tokens)
        return self.final_layer_norm(tokens)


def _embedding(count: int, width: int) -> nn.Embedding:
    """A table of vectors from a normal distribution. On the meta device there is nothing to draw,
    and torch would import its compiler to do it, which takes two seconds."""
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(
        weight if weight.is_meta else weight.normal_(), freeze=False
    )
