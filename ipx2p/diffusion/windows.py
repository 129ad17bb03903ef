"""A network on pictures larger than its own size: overlapping windows, averaged (layer 1).

MultiDiffusion (arXiv:2302.08113) with the Gaussian weights of mixture of diffusers
(arXiv:2302.02412) as StableSR has them (arXiv:2305.07015). At one noise level a prediction and its
estimate of x0 are linear in each other, so that an average of predictions is the average of
denoised latents; guidance acts on the overlapped estimate of every branch.
Shapes: B samples, h x w latents of the picture, windows of h' x w', at most `size` each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

VARIANCE = 0.01  # of the weights, where a window has the side 1


@dataclass(frozen=True, eq=False)
class Windows:
    """Called as the network is; windows overlap by half, and the last is flush with the border.

    A picture that is not larger than a window in a direction has one there. If one covers it all,
    the prediction is that of the network, bit for bit. Windows run one after another, each with the
    whole batch, so that memory does not grow with the picture.

    Args:
        network: predicts for latents of any size, `UNet` or the like; called as `UNet.forward`.
        size: side of a window, in latent pixels.
    """

    network: Any
    size: int

    def project_text(self, text: Tensor) -> Any:
        """See `UNet.project_text`."""
        return self.network.project_text(text)

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Any,
        source_latents: Tensor,
        attention_overrides: Mapping[str, Any] | None = None,
        deep: list[Tensor] | None = None,
    ) -> Tensor:
        """See `UNet.forward`.

        Args:
            deep: features of all windows in one tensor, (B, windows, C, h', w').
        Returns: (B, 4, h, w); float32 if there are several windows.
        """
        rows, columns = (cut(side, self.size) for side in latents.shape[-2:])
        if len(rows) == len(columns) == 1:
            return self.network(latents, timesteps, text, source_latents, attention_overrides, deep)
        kept = deep[0].unbind(1) if deep else ()
        features: list[Tensor] = []
        total = torch.zeros_like(latents, dtype=torch.float32)
        for number, ((top, down), (left, right)) in enumerate(product(rows, columns)):
            there = (..., slice(top, top + len(down)), slice(left, left + len(right)))
            own = None if deep is None else [*kept[number : number + 1]]
            shown = (latents[there], timesteps, text, source_latents[there])
            prediction = self.network(*shown, attention_overrides, own)
            weights = (down[:, None] * right).to(total)
            total[there] += weights * prediction.float()
            features += own or ()
        if deep is not None:
            deep[:] = [torch.stack(features, dim=1)]
        return total


def cut(length: int, size: int) -> list[tuple[int, Tensor]]:
    """Windows of one direction: where each starts, and its weights there, (h',), float64.

    The weights of all windows add up to one at every pixel. In two directions they are multiplied,
    and still do.
    """
    size = min(length, size)
    starts = [*range(0, length - size, max(size // 2, 1)), length - size]
    x = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / size
    bell = (-x.square() / (2 * VARIANCE)).exp()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += bell
    return [(start, bell / total[start : start + size]) for start in starts]
