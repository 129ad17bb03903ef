"""What makes training fast changes what it computes by roundings only."""

import copy
import os

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import ipx2p.training.speed
from ipx2p.distributed import World
from ipx2p.models.unet import UNet
from ipx2p.training.config import OptimizerConfig, StepsConfig
from ipx2p.training.learner import Losses
from ipx2p.training.loop import train
from ipx2p.training.optimizer import Stepper, make_optimizer
from ipx2p.training.speed import (
    known_peaks,
    peak_flops,
    prepare,
    set_deterministic,
    set_layout,
)
from tests.conftest import GOLDEN
from tests.training.conftest import all_tensors, assert_same_run


@pytest.fixture
def inputs(generator):
    """Noisy latents, timesteps, text and source latents for the golden U-Net."""
    latents, source = torch.randn(2, 2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([951.0, 3.0]), torch.randn(2, 77, 32, generator=generator), source


def run(inputs, **settings):
    """Prediction and gradients of the golden U-Net after `prepare`, and the bytes it kept for the
    backward pass."""
    module = UNet.load(GOLDEN / "diffusers" / "unet").train()
    config = StepsConfig(steps=1, **settings)
    set_layout(module, config)
    network = prepare(module, config, World())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        prediction = network(*inputs)
    prediction.square().mean().backward()
    return prediction, [parameter.grad for parameter in module.parameters()], sum(kept)


def test_channels_last_and_recomputed_equal_plain(inputs):
    plain, grads, kept = run(inputs, channels_last=False)
    last, last_grads, _ = run(inputs, channels_last=True)
    recomputed, recomputed_grads, less = run(
        inputs, channels_last=False, recompute_activations=True
    )
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last_grads, grads, atol=1e-5, rtol=1e-3)
    assert torch.equal(recomputed, plain)
    assert all(torch.equal(a, b) for a, b in zip(recomputed_grads, grads, strict=True))
    assert less < kept / 2


def test_channels_last_gives_weights_the_strides_of_their_gradients():
    module = UNet.load(GOLDEN / "diffusers" / "unet").train()
    set_layout(module, StepsConfig(steps=1))
    assert not module.conv_in.weight.is_contiguous()
    latents = torch.zeros(2, 4, 8, 8)
    module(latents, torch.zeros(2), torch.zeros(2, 77, 32), latents).sum().backward()
    other = [n for n, p in module.named_parameters() if p.grad.stride() != p.stride()]
    assert other == []


def test_deterministic_algorithms_are_chosen_and_not_kept_for_the_next_run(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for wanted in (True, False):
        set_deterministic(StepsConfig(steps=1, deterministic=wanted))
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.backends.cudnn.deterministic == wanted
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.slow
def test_a_deterministic_run_is_the_same_on_a_cpu(make_config, run_folder, trained_once):
    train(make_config("train.deterministic=true"))
    set_deterministic(StepsConfig(steps=1))
    assert_same_run(run_folder, trained_once)


def test_the_size_of_exchanged_buckets_is_that_of_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ipx2p.training.speed, "DistributedDataParallel", lambda *_, **options: seen.append(options)
    )
    for size in (None, 100.0):
        prepare(nn.Linear(1, 1), StepsConfig(steps=1, bucket_mb=size), World(0, 2))
    assert [options["bucket_cap_mb"] for options in seen] == [None, 100.0]


def compiled_run(make_config, run_folder, monkeypatch, backend):
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    counters.clear()
    train(make_config("train.compile=true"))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # training; validation runs as it is written
    return all_tensors(run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_has_one_graph_and_the_weights_of_an_eager_one(
    make_config, run_folder, trained_once, monkeypatch, backend
):
    compiled = compiled_run(make_config, run_folder, monkeypatch, backend)
    eager = all_tensors(trained_once)
    assert compiled.keys() == eager.keys()  # clean names, too
    for name, tensor in eager.items():
        # Adam's first steps move each weight by about the learning rate, whatever its gradient.
        torch.testing.assert_close(compiled[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("AMD EPYC", None),
    ],
)
def test_names_of_devices_are_matched_whole(name, teraflops):
    peaks = known_peaks(name)
    assert (peaks and peaks[0]) == (teraflops and teraflops * 1e12)


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **kwargs or {})


class Squares:
    """A learner of one layer; its batches are tensors."""

    def __init__(self):
        self.module = self.network = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.module.weight)

    def losses(self, batch):
        losses = self.network(batch).square().flatten()
        return Losses(losses, losses.detach())


def stepper(**settings):
    learner = Squares()
    config = OptimizerConfig(learning_rate=0.1, **settings)
    optimizer = make_optimizer(learner.module, config)
    return Stepper(learner, optimizer, config, World()), learner.module


def test_an_update_waits_for_nothing(generator):
    step, _ = stepper()
    with NoWaiting():
        step([torch.randn(4, 3, generator=generator)], 0.1)


def test_micro_batches_add_up_to_their_batch(generator):
    batch = torch.randn(6, 3, generator=generator)
    (one, module), (other, accumulated) = stepper(), stepper()
    for _ in range(3):
        _, norm, bad = one([batch], 0.1)
        losses, other_norm, _ = other([*batch.chunk(3)], 0.1)
        assert len(losses) == 3 and bad == 0
        torch.testing.assert_close(other_norm, norm)
    torch.testing.assert_close(accumulated.weight, module.weight)


def test_gradients_are_clipped(generator):
    batch = 100 * torch.randn(6, 3, generator=generator)
    step, module = stepper(max_grad_norm=1e-9)
    before = copy.deepcopy(module.weight)
    _, norm, _ = step([batch], 1e-3)
    assert norm > 1000
    # Adam divides by the gradient's size, but next to its epsilon of 1e-8 a tiny one counts less.
    assert 0 < (module.weight - before).abs().max() < 3e-4


def test_clipping_is_that_of_torch(generator):
    batch = 10 * torch.randn(6, 3, generator=generator)
    step, module = stepper(max_grad_norm=0.5)
    other = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.01)
    for scale in (1.0, 1e-3, 2.0):
        step([scale * batch], 0.1)
        optimizer.zero_grad()
        other(scale * batch).square().mean().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        torch.testing.assert_close(module.weight, other.weight)
