"""Branches of guidance: evaluations of the network with different conditions (layer 1).

An edit has two conditions, the source picture and the instruction, so there are four branches:
`full` (both), `image` (source only), `text` (instruction only) and `null` (neither). Schemes can
add branches with a negative instruction, a weaker network, or changed attention.
Shapes: B edits, 4 x h x w latents, text states 77 x D.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionChange:
    """A change of named attention layers.

    kind: of `AttentionOverride`: "identity", "blur" or "skip". layers: names or beginnings of
        names ("mid", "up.1"). sigma: of the blur, in tokens; infinity is the mean.
    """

    kind: str
    layers: tuple[str, ...]
    sigma: float = 0.0


@dataclass(frozen=True)
class Branch:
    """One evaluation of a network: its conditions, and how it differs from the edit model."""

    name: str
    text: str = "instruction"  # or "null", "negative"
    source: bool = True
    network: str = "main"  # or "weak"
    attention: AttentionChange | None = None


FULL = Branch("full")
IMAGE = Branch("image", text="null")
TEXT = Branch("text", source=False)
NULL = Branch("null", text="null", source=False)
BRANCHES = {branch.name: branch for branch in (FULL, IMAGE, TEXT, NULL)}


def in_order(branches: Iterable[Branch]) -> list[Branch]:
    """The four branches first, so that equal sums are added up in the same order."""
    order = [*BRANCHES.values()]
    return sorted(branches, key=lambda b: order.index(b) if b in order else len(order))


@dataclass(frozen=True)
class Conditions:
    """The conditions of all branches.

    text, null_text, negative_text: states (B, 77, D), in the network's dtype.
    source_latents: unscaled, (B, 4, h, w). latents: the same scaled, kept outside a mask.
    text_noise: index of a step -> unit noise of the text's shape, for schemes that need it.
    """

    text: Tensor
    null_text: Tensor
    source_latents: Tensor
    negative_text: Tensor | None = None
    latents: Tensor | None = None
    text_noise: Callable[[int], Tensor] | None = None

    def of(self, branch: Branch) -> tuple[Tensor, Tensor]:
        """Text states and source latents of one branch."""
        states = {
            "instruction": self.text,
            "null": self.null_text,
            "negative": self.negative_text,
        }
        source = self.source_latents if branch.source else torch.zeros_like(self.source_latents)
        return states[branch.text], source
