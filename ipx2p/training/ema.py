"""The exponential moving average of the weights (layer 4)."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of a float32 network that follows it slowly; one update per optimizer step.

    The decay warms up, min(decay, (1 + n) / (10 + n)) at update n, so that a young average does not
    hang on the first random weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        assert all(p.dtype == torch.float32 for p in module.parameters()), "master weights"
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, num_updates: int) -> None:
        """Move towards `module` after its `num_updates`-th optimizer step, counted from 1."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        averages, weights = [*self.module.parameters()], [*module.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
