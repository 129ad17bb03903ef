"""What can be shown about a GPU without one: its tensors only have a shape, a dtype and a device.
Mixed devices raise, and so does everything for which the host would wait (`.item()`)."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipx2p.data.cache import EncodedBatch
from ipx2p.diffusion.guidance.branches import Conditions
from ipx2p.diffusion.guidance.denoiser import GuidedDenoiser
from ipx2p.diffusion.guidance.registry import SCHEMES, parse_guidance
from ipx2p.diffusion.samplers import SAMPLERS, make_plan
from ipx2p.distributed import World
from ipx2p.training.config import OptimizerConfig
from ipx2p.training.ema import EMA
from ipx2p.training.learners import EditLearner
from ipx2p.training.optimizer import Stepper, make_optimizer
from ipx2p.training.samples import open_pairs
from ipx2p.training.validation import fixed_pairs
from tests.editing.test_editor_guidance import ACTING

CUDA = torch.device("cuda", 0)


class GPU(FakeTensorMode):
    """Tensors on CUDA are fake; those of the host are real, as the schedule's tables."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor) or getattr(leaf, "type", None) == "cuda":
                return super().__torch_dispatch__(function, types, args, kwargs)
        with unset_fake_temporarily():
            return function(*args, **(kwargs or {}))


def on_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=CUDA)


def moved(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network with parameters on the GPU; no values are copied."""
    copied = copy.copy(module)
    copied._modules = {name: moved(child, dtype) for name, child in module._modules.items()}
    copied._parameters = {
        name: p
        if p is None
        else nn.Parameter(on_gpu(*p.shape, dtype=dtype or p.dtype), p.requires_grad)
        for name, p in module._parameters.items()
    }
    return copied


class Matmuls(TorchDispatchMode):
    """The dtypes in which linear layers and convolutions run."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten.convolution,
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
        ):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return function(*args, **(kwargs or {}))


def test_what_must_not_happen_raises():
    with GPU():
        with pytest.raises(DataDependentOutputException):
            on_gpu(1).item()
        with pytest.raises(Exception, match="device"):
            on_gpu(2) + torch.zeros(2)
        assert (torch.ones(2) * 3).sum().item() == 6  # of the host


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_without_waiting(editor, sampler):
    assert_runs(editor, sampler, "ip2p", "karras")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_guidance_scheme_runs_without_waiting(editor, scheme):
    assert_runs(editor, "euler", ACTING.get(scheme, scheme), "trailing")


@torch.no_grad()
def assert_runs(editor, sampler, guidance, spacing):
    """Encode, sample and decode with the U-Net in bfloat16."""
    plan = make_plan(editor.schedule, sampler, spacing, 2)
    spec = parse_guidance(guidance, guidance_scale=7.0, image_guidance_scale=1.5)
    with GPU(), Matmuls() as matmuls:
        unet, vae = moved(editor.unet, torch.bfloat16), moved(editor.vae)
        source_latents = vae.encode(on_gpu(2, 3, 64, 48)).mode()
        matmuls.dtypes.clear()
        text = on_gpu(2, 77, 32, dtype=torch.bfloat16)
        conditions = Conditions(
            text, text, source_latents, text, source_latents, lambda _: on_gpu(*text.shape)
        )
        guided = GuidedDenoiser(
            unet,
            editor.schedule,
            spec,
            conditions,
            weak=unet,
            attention_layers=unet.attention_layers,
        )
        noise = on_gpu(*source_latents.shape)
        latents = SAMPLERS[sampler](guided, noise, plan, lambda _: on_gpu(*noise.shape))
        assert torch.bfloat16 in matmuls.dtypes
        pixels = vae.decode(latents * plan.end_factor)
        assert pixels.shape == (2, 3, 64, 48) and pixels.device.type == "cuda"
        assert latents.dtype == pixels.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by a copy
def test_a_training_step_runs_without_waiting(make_config, monkeypatch):
    """Loss, update and average; the gradients are made up, since a backward pass needs a GPU."""
    config = make_config("objective.min_snr_gamma=5", "train.precision=bfloat16")
    held_out = fixed_pairs(open_pairs(config.data)[1], per_task=1, resolution=32, seed=0)
    learner = EditLearner(config, torch.device("cpu"), held_out, World())
    # What needs a GPU, or asks whether there is one.
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with GPU():
        learner.device = CUDA
        learner.module = learner.network = moved(learner.module)
        learner.null_text = on_gpu(*learner.null_text.shape)
        latents, text = on_gpu(2, 4, 4, 4), on_gpu(2, 77, 32)
        batch = EncodedBatch(latents, latents, latents, text, ["x"] * 2, [0, 1])
        with Matmuls() as matmuls:
            losses = learner.losses(batch)
        assert losses.weighted.dtype == torch.float32 and losses.weighted.device == CUDA
        assert matmuls.dtypes == {torch.bfloat16}  # no layer that autocast leaves behind
        optimizer = make_optimizer(learner.module, OptimizerConfig())
        stepper = Stepper(learner, optimizer, OptimizerConfig(), World())
        monkeypatch.setattr(Tensor, "backward", lambda self: None)
        for parameter in stepper.parameters:
            parameter.grad = on_gpu(*parameter.shape)
        average = EMA(learner.module, 0.99)
        _, norm, bad = stepper([batch], 1e-3)
        average.update(learner.module, 1, bad)
        assert norm.device == bad.device == CUDA
