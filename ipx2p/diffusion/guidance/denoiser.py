"""Guidance as a denoiser: the state of one edit, and the network's evaluations (layer 1)."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ipx2p.diffusion.denoiser import denoise
from ipx2p.diffusion.guidance.branches import FULL, IMAGE, Branch, Conditions
from ipx2p.diffusion.guidance.space import Moment
from ipx2p.diffusion.guidance.spec import GuidanceSpec, layers_of
from ipx2p.diffusion.schedule import Schedule, Step


@dataclass(eq=False)
class GuidedDenoiser:
    """D(x, sigma, step) of one edit: it holds what is remembered from step to step."""

    network: Callable[..., Tensor]  # `UNet.forward` or the like
    schedule: Schedule
    spec: GuidanceSpec  # plans which branches run in a step, and how they are blended
    conditions: Conditions  # what the branches are shown
    _: KW_ONLY
    batch_branches: bool = True  # of a network; one after another they take less memory
    weak: Callable[..., Tensor] | None = None  # a second network, for schemes that need one
    attention_layers: Sequence[str] = ()  # names of the network's layers that take overrides
    shallow_share: Callable[[int, int], float] = lambda h, w: 1.0  # of the work, at h x w latents
    mask: Tensor | None = field(default=None, init=False)  # (B, 1, h, w) in 0..1, once found
    memory: dict = field(default_factory=dict, init=False)
    _whole: int = field(default=0, init=False)  # evaluations so far, and those of the shallow part
    _shallow: int = field(default=0, init=False)
    _deep: dict = field(default_factory=dict, init=False)  # features since the last whole step
    _kept: dict = field(default_factory=dict, init=False)  # what each group of branches is shown

    @property
    def evaluations(self) -> float:
        """Of both networks so far, per edit; one of the shallow part counts as its share."""
        if not self._shallow:
            return self._whole
        h, w = self.conditions.source_latents.shape[-2:]
        return round(self._whole + self._shallow * self.shallow_share(h, w), 2)

    def __call__(self, x: Tensor, sigma: float, step: Step) -> Tensor:
        """x at noise level sigma, (B, 4, h, w), float32 -> guided denoised latents."""
        if self.spec.mask is not None and self.mask is None:
            self.mask = self._find_mask(x, sigma)
        plan = self.spec.plan(step)
        shown = self.conditions
        text = self.spec.change_text(shown.text, shown.text_noise, step)
        if text is not shown.text:
            shown = replace(shown, text=text)
        depth = self.spec.depth
        if depth is not None and depth.is_whole(step):
            self._deep.clear()
        deep = None if depth is None else self._deep
        denoised = self._run(plan.branches, x, sigma, shown, deep)
        guided = plan.blend(denoised, Moment(x, sigma, step, self.memory))
        if self.mask is None:
            return guided
        return torch.lerp(self.conditions.latents, guided, self.mask)

    def _find_mask(self, x: Tensor, sigma: float) -> Tensor:
        """Compare the branches on the source with the noise of x, at the mask's level."""
        source = self.conditions.latents
        level = self.schedule.sigma(self.spec.mask.level * self.schedule.last_timestep)
        noised = source + level * (x - source) / sigma
        denoised = self._run([FULL, IMAGE], noised, level, self.conditions)
        return self.spec.mask.mask(denoised[FULL] - denoised[IMAGE])

    def _run(
        self,
        branches: list[Branch],
        x: Tensor,
        sigma: float,
        conditions: Conditions,
        deep: dict[Branch, Tensor] | None = None,
    ) -> dict[Branch, Tensor]:
        """Denoised latents of each branch.

        deep: the deep features kept of branches, which run around them; the others run whole, and
            add theirs.
        """
        groups: dict[tuple, list[Branch]] = {}
        for branch in branches:
            has_deep = deep is not None and branch in deep
            apart = None if self.batch_branches else branch
            groups.setdefault((branch.network, has_deep, apart), []).append(branch)
        denoised = {}
        for (_, has_deep, _), group in groups.items():
            text, source_latents = self._inputs(group, conditions)
            more: dict[str, Any] = {}
            if overrides := self._attention_overrides(group, len(x), x.device):
                more["attention_overrides"] = overrides
            if deep is not None:
                more["deep"] = [torch.cat([deep[branch] for branch in group])] if has_deep else []
            together = denoise(
                self._network(group),
                self.schedule,
                x.repeat(len(group), 1, 1, 1),
                sigma,
                text=text,
                source_latents=source_latents,
                **more,
            )
            if has_deep:
                self._shallow += len(group)
            else:
                self._whole += len(group)
            if deep is not None:
                deep |= zip(group, more["deep"][0].chunk(len(group)), strict=True)
            denoised |= zip(group, together.chunk(len(group)), strict=True)
        return denoised

    def _network(self, group: list[Branch]) -> Callable[..., Tensor]:
        return self.weak if group[0].network == "weak" else self.network

    def _inputs(self, group: list[Branch], conditions: Conditions) -> tuple[Any, Tensor]:
        """What a group of branches is shown: the instruction, projected once if the network can do
        that, and the source. Kept from step to step, unless the scheme changes the text."""
        key = tuple(group)
        if conditions is self.conditions and key in self._kept:
            return self._kept[key]
        texts, sources = zip(*map(conditions.of, group), strict=True)
        text = torch.cat(texts)
        source_latents = torch.cat(sources).to(text.dtype)
        project = getattr(self._network(group), "project_text", None)
        inputs = (text if project is None else project(text), source_latents)
        if conditions is self.conditions:
            self._kept[key] = inputs
        return inputs

    def _attention_overrides(
        self, group: list[Branch], size: int, device: torch.device
    ) -> dict[str, list[tuple[str, float, Tensor]]]:
        """By layer: the kind of change, the blur's sigma, and the rows of the batch it is for."""
        overrides: dict[str, list[tuple[str, float, Tensor]]] = {}
        for place, branch in enumerate(group):
            if branch.attention is not None:
                rows = torch.arange(len(group) * size, device=device) // size == place
                change = branch.attention
                for layer in layers_of(change.layers, self.attention_layers):
                    overrides.setdefault(layer, []).append((change.kind, change.sigma, rows))
        return overrides
