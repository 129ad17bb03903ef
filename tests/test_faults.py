"""Plant a fault, and a test must fail: the mistakes that this kind of code is known for.

Each fault is a change of one line in a copy of the package, and names the tests that must see it.
CONTRIBUTING.md lists them for people.
"""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

EDIT = "tests/editing/test_editor.py::test_edit_matches_the_reference"
FAULTS = {
    "a rounded fractional timestep": (
        "ipx2p/diffusion/denoiser.py",
        "schedule.timestep(sigma)",
        "round(schedule.timestep(sigma))",
        f"{EDIT}[euler-linspace-True]",
    ),
    "sigma_0 where sqrt(1 + sigma_0^2) belongs": (
        "ipx2p/diffusion/samplers.py",
        "start_factor=math.sqrt(1 + sigmas[0] ** 2) if full_variance else sigmas[0]",
        "start_factor=sigmas[0]",
        f"{EDIT}[ddim-leading-True]",
    ),
    "scaled source latents": (
        "ipx2p/editing/editor.py",
        "source_latents = self.vae.encode(pixels, tile).mode()",
        "source_latents = self.vae.scale(self.vae.encode(pixels, tile).mode())",
        f"{EDIT}[euler-leading-True]",
    ),
    "a sampled source posterior instead of its mode": (
        "ipx2p/editing/editor.py",
        "source_latents = self.vae.encode(pixels, tile).mode()",
        "source_latents = self.vae.encode(pixels, tile).sample(torch.Generator())",
        f"{EDIT}[euler-leading-True]",
    ),
    "a start from the unscaled source": (
        "ipx2p/editing/editor.py",
        "x = conditions.latents + noise * plan.sigmas[0]",
        "x = conditions.source_latents + noise * plan.sigmas[0]",
        "tests/editing/test_editor_fidelity.py",
    ),
    "a source scaled with the noise level": (
        "ipx2p/diffusion/denoiser.py",
        "network(scaled, timesteps, text, source_latents, **more)",
        "network(scaled, timesteps, text, source_latents / math.sqrt(1 + sigma**2), **more)",
        f"{EDIT}[euler-leading-True]",
    ),
    "weights of a window off its centre": (
        "ipx2p/diffusion/windows.py",
        "(size - 1) / 2",
        "size / 2",
        "tests/diffusion/test_windows.py",
    ),
    "a lost conv_in bias": (
        "ipx2p/weights/convert.py",
        "    with torch.device(\"meta\"):\n        wide",
        "    tensors['conv_in.bias'] = torch.zeros_like(tensors['conv_in.bias'])\n"
        "    with torch.device(\"meta\"):\n        wide",
        "tests/weights/test_convert.py",
    ),
    "swapped scales": (
        "ipx2p/diffusion/guidance/linear.py",
        "def ip2p(guidance_scale: float, image_guidance_scale: float)",
        "def ip2p(image_guidance_scale: float, guidance_scale: float)",
        "tests/diffusion/test_guidance.py",
    ),
    "a momentum that advances twice in a step of Heun's": (
        "ipx2p/diffusion/guidance/pushes.py",
        "(index, before, difference if seen != index else after)",
        "(index, before, difference)",
        "tests/diffusion/test_guidance_formulas.py",
    ),
    "a norm over the batch": (
        "ipx2p/diffusion/guidance/space.py",
        "(a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)",
        "(a * b).sum(dim=tuple(range(a.ndim)), keepdim=True)",
        "tests/diffusion/test_guidance_schemes.py",
    ),
    "an interval decided by the sigma of the evaluation": (
        "ipx2p/diffusion/guidance/denoiser.py",
        "self.spec.plan(step)",
        "self.spec.plan(replace(step, sigma=sigma))",
        "tests/diffusion/test_guidance_schemes.py",
    ),
    "a deep feature that is never renewed": (
        "ipx2p/diffusion/guidance/denoiser.py",
        "self._deep.clear()",
        "pass",
        "tests/diffusion/test_guidance_schemes.py",
    ),
    "a branch that runs outside an interval": (
        "ipx2p/diffusion/guidance/spec.py",
        "if not any(other.acts_on(modifier.condition) for other in off)",
        "if True",
        "tests/diffusion/test_guidance_schemes.py",
    ),
    "a sweep key without the seed": (
        "ipx2p/eval/models.py",
        '"seed": seed}',
        '"seed": 0}',
        "tests/eval/test_engine.py",
    ),
    "scores of another target": (
        "ipx2p/eval/scores.py",
        "None if target is None else sized(target)",
        "None if target is None else sized(source)",
        "tests/eval/test_scores.py",
    ),
    "what may change counted as kept": (
        "ipx2p/metrics.py",
        "counted = 1 - mask",
        "counted = mask",
        "tests/test_metrics.py",
    ),
    "a trade-off plot with swapped axes": (
        "ipx2p/eval/curves.py",
        'TRADE_OFF = ("clip_direction", "clip_image")',
        'TRADE_OFF = ("clip_image", "clip_direction")',
        "tests/eval/test_curves.py",
    ),
    "an interval that takes seeds for samples": (
        "ipx2p/eval/lines.py",
        "self.pictures = _numbered(place[0] for place in columns)",
        "self.pictures = _numbered(columns)",
        "tests/eval/test_tables.py",
    ),
    "an attention override of the whole batch": (
        "ipx2p/models/blocks.py",
        "attended = torch.where(rows[:, None, None], values, attended)",
        "attended = values",
        "tests/models/test_attention_overrides.py",
    ),
    "a negative instruction in the null text as well": (
        "ipx2p/editing/editor.py",
        'empty if guidance.needs("negative") else negative_text',
        "negative_text",
        "tests/editing/test_editor_guidance.py",
    ),
    "eps 1e-5 in the VAE's norms": (
        "ipx2p/models/vae.py",
        "NORM_EPS = 1e-6",
        "NORM_EPS = 1e-5",
        "tests/models/test_vae.py",
    ),
    "a timestep embedding in bfloat16": (
        "ipx2p/models/blocks.py",
        "angles = timesteps.float()[:, None]",
        "angles = timesteps.bfloat16()[:, None]",
        "tests/models/test_blocks.py",
    ),
    "the U-Net's padding in the VAE": (
        "ipx2p/models/vae.py",
        "Downsample(widths[-1], pad_all=False)",
        "Downsample(widths[-1], pad_all=True)",
        "tests/models/test_vae.py",
    ),
    "a tile read without its rim": (
        "ipx2p/models/tiling.py",
        "(start * down - (down == 1)) // up",
        "start * down // up",
        "tests/models/test_tiling.py",
    ),
    "group norms by the statistics of a tile": (
        "ipx2p/models/tiling.py",
        "return self.read(window).mul_(factor).add_(shift)",
        "return norm(self.read(window))",
        "tests/models/test_tiling.py",
    ),
    "features of the target where those of the source belong": (
        "ipx2p/training/learners.py",
        "features = self.vae.features(source_pixels)",
        "features = self.vae.features(target_pixels)",
        "tests/training/test_wrapping.py",
    ),
    "a pair cropped in two ways": (
        "ipx2p/data/pairs.py",
        "return geometry.apply(source), geometry.apply(target)",
        "return geometry.apply(source), cut(source.size).apply(target)",
        "tests/data/test_pairs.py",
    ),
    "copies of a photograph in two splits": (
        "ipx2p/data/prepare/splits.py",
        "leader[second] = first",
        "pass",
        "tests/data/prepare/test_splits.py",
    ),
    "all photographs degraded with the same draws": (
        "ipx2p/data/prepare/recipes.py",
        'f"degrade {task} {photo.digest}"',
        'f"degrade {task}"',
        "tests/data/prepare/test_prepare.py::test_photographs_are_degraded_each_in_its_own_way",
    ),
    "a scene of SIDD in two splits": (
        "ipx2p/data/published/folders.py",
        "replace(part, group=scene[1])",
        "replace(part, group=scene[0])",
        "tests/data/published/test_registry.py",
    ),
    "a test source in the training split": (
        "ipx2p/data/prepare/dataset.py",
        "seen.isdisjoint(e.digests)",
        "True",
        "tests/data/prepare/test_import.py",
    ),
    "a shuffle that loses its place on resume": (
        "ipx2p/data/loader.py",
        "first = step * self.batch_size",
        "first = (step - self.steps.start) * self.batch_size",
        "tests/data/test_loader.py",
    ),
    "optimizer moments restored in another memory order than their weights": (
        "ipx2p/training/checkpoint.py",
        "moment = torch.empty_like(parameter, requires_grad=False)",
        "moment = torch.empty(parameter.shape)",
        "tests/training/test_parts.py",
    ),
    "noise that depends on the place in the batch": (
        "ipx2p/diffusion/objective.py",
        'generator(seed, "objective", index)',
        'generator(seed, "objective", len(rows))',
        "tests/diffusion/test_objective.py",
    ),
    "a cache that misses a changed picture": (
        "ipx2p/data/cache.py",
        "self._chance(item, draw), *content)",
        "self._chance(item, draw), item)",
        "tests/data/test_cache.py",
    ),
    "a mirrored source beside an upright target in the cache": (
        "ipx2p/data/cache.py",
        '"source_latents": mean[0::2].contiguous()',
        '"source_latents": mean[0::2].flip(0).contiguous()',
        "tests/data/test_cache.py",
    ),
    "a mixture whose tasks lose their place on resume": (
        "ipx2p/data/order.py",
        "self.shuffles[task](self.count(task, index))",
        "self.shuffles[task](index)",
        "tests/data/test_order.py",
    ),
    "a broken pair replaced by a pair of another task": (
        "ipx2p/data/loader.py",
        "items = self.others[self.pairs.task(item)]",
        "items = next(iter(self.others.values()))",
        "tests/training/test_samples.py",
    ),
    "a stale index of a changed manifest": (
        "ipx2p/data/manifest.py",
        "return index if is_current else None",
        "return index",
        "tests/data/test_manifest.py",
    ),
    "a non-finite update that is applied": (
        "ipx2p/training/optimizer.py",
        "self.optimizer.found_inf = bad",
        "self.optimizer.found_inf = 0 * bad",
        "tests/training/test_mishaps.py",
    ),
    "a checkpoint named before it is complete": (
        "ipx2p/training/checkpoint.py",
        'temporary = folder.with_name(f".{folder.name}")',
        "temporary = folder",
        "tests/training/test_mishaps.py",
    ),
    "a small copy half a pixel off its original": (
        "ipx2p/transfer.py",
        "(torch.arange(full_size).double() + 0.5) * size / full_size - 0.5",
        "torch.arange(full_size).double() * size / full_size",
        "tests/test_transfer.py",
    ),
    "colours that stay grey when light grows": (
        "ipx2p/transfer.py",
        "both.mT + ridge * gain * one",
        "both.mT",
        "tests/test_transfer.py",
    ),
    "a fidelity mask the wrong way round": (
        "ipx2p/fidelity.py",
        "torch.lerp(source, edit, self.mask(source, edit))",
        "torch.lerp(edit, source, self.mask(source, edit))",
        "tests/test_fidelity.py",
    ),
    "a picture that is turned twice": (
        "ipx2p/photos.py",
        "exif[ORIENTATION] = 1",
        "exif[ORIENTATION] = exif[ORIENTATION]",
        "tests/test_photos.py",
    ),
    "padding on the other side than TensorFlow's": (
        "ipx2p/data/cartoons/whitebox.py",
        "return F.pad(x, (0, 1, 0, 1))",
        "return F.pad(x, (1, 0, 1, 0))",
        "tests/data/cartoons/test_whitebox.py",
    ),
    "half-pixel centres where TensorFlow has none": (
        "ipx2p/data/cartoons/whitebox.py",
        'x = F.interpolate(x, size, mode="bilinear", align_corners=True)',
        'x = F.interpolate(x, size, mode="bilinear", align_corners=False)',
        "tests/data/cartoons/test_whitebox.py",
    ),
    "RGB input to a BGR network": (
        "ipx2p/data/cartoons/whitebox.py",
        "bgr = pixels_from_pixels01(_reflect(pixels01)).flip(1)",
        "bgr = pixels_from_pixels01(_reflect(pixels01))",
        "tests/data/cartoons/test_whitebox.py",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_makes_a_test_fail(tmp_path, fault):
    file, right, wrong, tests = FAULTS[fault]
    for name in ("ipx2p", "tests", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]

    source = (tmp_path / file).read_text()
    assert source.count(right) == 1, f"{file} no longer has the line to change"
    (tmp_path / file).write_text(source.replace(right, wrong))
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout[-2000:]  # a test failed; 2 would be a broken file


def test_contributing_lists_every_fault():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [fault for fault in FAULTS if fault not in text]
    assert missing == []
