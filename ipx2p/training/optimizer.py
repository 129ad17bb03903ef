"""One optimizer step: accumulation, clipping, AdamW, and skipping bad updates (layer 4)."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from ipx2p.data.loader import Batch
from ipx2p.distributed import World
from ipx2p.training.config import OptimizerConfig
from ipx2p.training.learner import Learner, Losses


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """Fused AdamW: one kernel over all weights, whose update a tensor can switch off."""
    return AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=tuple(config.betas),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, then constant or falling.

    A falling rate would be 0 at step `num_steps`, just after the last: no step is without effect.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = max(0, step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return config.learning_rate * warmup * decay[config.schedule]


class Stepper:
    """Updates the trained network from micro-batches.

    A step whose loss or gradient is not finite in any process changes nothing. A tensor on the
    device switches the optimizer off, so the host does not wait for the decision.
    """

    def __init__(
        self, learner: Learner, optimizer: AdamW, config: OptimizerConfig, world: World
    ) -> None:
        self.learner = learner
        self.optimizer = optimizer
        self.config = config
        self.world = world
        self.parameters = [*learner.module.parameters()]

    def __call__(
        self, micro_batches: Sequence[Batch], rate: float
    ) -> tuple[list[Losses], Tensor, Tensor]:
        """One update at a learning rate.

        Returns: the losses of each micro-batch, the norm of the gradient before clipping, and
            whether the update was left out (0 or 1); tensors on the device, ().
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        all_losses = []
        finite = torch.ones((), device=self.parameters[0].device)
        network = self.learner.network
        is_spread = isinstance(network, DistributedDataParallel)
        for index, batch in enumerate(micro_batches, 1):
            # Processes exchange gradients only in the last micro-batch of a step.
            with network.no_sync() if is_spread and index < len(micro_batches) else nullcontext():
                losses = self.learner.losses(batch)
                (losses.weighted.mean() / len(micro_batches)).backward()
            finite = finite * losses.weighted.detach().isfinite().all()
            all_losses.append(losses)
        grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        finite = finite * grad_norm.isfinite()
        bad = (self.world.mean(1 - finite) > 0).float()  # 0 only if every rank was finite
        # The fused optimizer divides gradients by `grad_scale` anyway: clipping costs nothing.
        self.optimizer.grad_scale = (grad_norm / self.config.max_grad_norm).clamp(min=1)
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return all_losses, grad_norm, bad
