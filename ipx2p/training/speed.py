"""Fast training, and the peak rate of the hardware (layer 4).

Model FLOPs utilisation (MFU) is the share of the peak that forward and backward pass use, as in
PaLM (arXiv:2204.02311, app. B); recomputation to save memory does not count.
"""

import os
import re
import time
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ipx2p.devices import device_name
from ipx2p.distributed import World
from ipx2p.models.blocks import ResnetBlock, TokenConv
from ipx2p.models.unet import Transformer
from ipx2p.training.config import StepsConfig

# Dense bfloat16 and TF32 peaks in FLOP/s, from the vendor's data sheets, by the driver's name of
# the device. Names are matched whole: an H100 NVL is no H100, a laptop's RTX 4090 no RTX 4090.
PEAKS = {
    r"B200": (2250e12, 1125e12),
    r"GH200 .*|H200": (989e12, 495e12),
    r"H200 NVL|H100 NVL": (835e12, 418e12),
    r"H100 PCIe": (756e12, 378e12),
    r"H100|H100 (80|64)GB HBM[23]|H100 SXM5.*": (989e12, 495e12),
    r"A100(?!.*MIG).*": (312e12, 156e12),
    r"L40S": (362e12, 183e12),
    r"L40": (181e12, 90.5e12),
    r"L4": (121e12, 60e12),
    r"A10": (125e12, 62.5e12),
    r"A10G": (70e12, 35e12),
    r"RTX A6000": (155e12, 77.4e12),
    r"GeForce RTX 4090": (165e12, 82.6e12),
    r"GeForce RTX 3090": (71e12, 35.6e12),
}


def set_layout(module: nn.Module, config: StepsConfig) -> None:
    """Order the weights in memory for fast convolutions. Copy the network only afterwards: its
    average and moments must have the same memory layout."""
    for layer in module.modules() if config.channels_last else ():
        # Of 1 x 1 convolutions only the strides change; their gradients have these. Those that act
        # on tokens are matrix products.
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, TokenConv):
            ordered = torch.empty_like(layer.weight.data, memory_format=torch.channels_last)
            layer.weight.data = ordered.copy_(layer.weight.data)


def set_deterministic(config: StepsConfig) -> None:
    """Choose whether CUDA must add numbers in the same order every time; call it before using CUDA.

    An operation that has no deterministic version then raises RuntimeError.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic


def prepare(module: nn.Module, config: StepsConfig, world: World) -> nn.Module:
    """Make a network fast to train; in place, so that its state-dict keys stay.

    Returns: the network to call in the forward pass, spread over the processes.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, for what is not bfloat16
        torch.backends.cudnn.allow_tf32 = True
    if config.recompute_activations:  # blocks keep only their input for the backward pass
        for block in module.modules():
            if isinstance(block, (ResnetBlock, Transformer)):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        module.compile(fullgraph=True)
    if world.size == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=config.bucket_mb,
    )


def known_peaks(name: str) -> tuple[float, float] | None:
    """Bfloat16 and TF32 peaks of the device of this name, if its data sheet is known."""
    matches = (re.fullmatch(known, name.removeprefix("NVIDIA ")) for known in PEAKS)
    return next(
        (peaks for found, peaks in zip(matches, PEAKS.values(), strict=True) if found), None
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of the device: from its data sheet, or measured by a matrix product."""
    if peaks := known_peaks(device_name(device)):
        return peaks[0] if dtype == torch.bfloat16 else peaks[1]
    side = 8192 if device.type == "cuda" else 1024  # large enough to reach the peak
    a = torch.ones(side, side, device=device, dtype=dtype)
    durations_s = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        durations_s.append(time.perf_counter() - start)
    return 2 * side**3 / min(durations_s)
