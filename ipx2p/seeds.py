"""Randomness that belongs to samples and steps, never to processes (layer 0).

Every random draw of a run comes from a generator keyed by (seed, purpose, index). The index is the
global number of a training sample, or the step of an edit; the rank never enters. So any
number of processes draws the same samples, and a resumed run continues them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ipx2p.files import hash_bytes


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose and index of a seed; equal keys give equal streams.

    All bits of the seed enter the hash. PyTorch's generator then uses the lower 32 bits of that, so
    two of n keys share a stream with a chance of about n^2 / 2^33.
    """
    key = hash_bytes(f"{seed}/{purpose}/{index}".encode(), 8)
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def unit_noise(shape: Sequence[int], seed: int, purpose: str, index: int = 0) -> Tensor:
    """Standard normal noise of one key, float32, on the CPU (so that no device changes it)."""
    return torch.randn(tuple(shape), generator=generator(seed, purpose, index))
