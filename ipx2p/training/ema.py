"""The exponential moving average of the weights (layer 4)."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A moving average of a float32 network, updated once per optimizer step.

    The decay warms up, min(decay, (1 + n) / (10 + n)) at update n, so that a young average is not
    dominated by the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        assert all(p.dtype == torch.float32 for p in module.parameters()), "master weights"
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, num_updates: int, bad: Tensor | float = 0.0) -> None:
        """Move towards `module` after its `num_updates`-th optimizer step, counted from 1.

        Args:
            bad: 1 leaves the average as it is; a tensor, (), that nothing waits for.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        share = (1 - bad) * (1 - decay)
        for average, weight in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(weight, share)
