"""The metrics of an edit, as entries of one table, and how to measure them (layer 4).

A metric says what it needs beside the source and the edit, and is one function of `Views`; a new
one is one more entry of `METRICS`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.cases import Case
from ipx2p.eval.networks import Networks, direction_similarity
from ipx2p.images import pixels01_from_image, resize
from ipx2p.metrics import (
    INVENTED_WINDOW,
    SSIM_WINDOW,
    haarpsi,
    invented,
    l1,
    l2,
    psnr,
    psnr_y,
    ssim,
    ssim_3d,
    ssim_y,
)

BICUBIC = Image.Resampling.BICUBIC
NO_NETWORKS = Networks()
SHOWN_WHOLE = {"clip", "dino"}  # these resize pictures themselves, of any size

NEEDS = {
    "target": "targets (target in the manifest, or --target)",
    "caption": "captions of targets (target_caption in the manifest, or on the command line)",
    "captions": "captions (source_caption and target_caption in the manifest, or on the command "
    "line)",
    "mask": "masks of what may change, which only some benchmarks have",
    "background": "masks that leave something out, which only some benchmarks have",
    "clip": "a CLIP model (--clip)",
    "dino": "a DINO model (--dino)",
    "structure": "a DINO model (--dino)",
    "lpips": "the backbone of LPIPS (--lpips)",
    "dists": "the backbone of DISTS (--dists)",
    "judge": "answers of a judge, which are read by the report (--answers)",
}


@dataclass(frozen=True)
class Views:
    """One edit beside what it is compared with.

    edited, source, target: pixels01 at the size of the source, or of the target, (1, 3, H, W).
    whole: "edited", "source" and "target" as they were given, (3, h, w) each, for networks.
    captions: of source and target. mask: 1 where the picture may change, (H, W).
    shared: features of the case, for its other edits.
    """

    edited: Tensor
    source: Tensor
    target: Tensor | None
    whole: dict[str, Tensor]
    captions: tuple[str, str] | None
    mask: Tensor | None
    networks: Networks
    shared: dict[tuple[str, str], Tensor]
    own: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def background(self) -> tuple[Tensor, Tensor]:
        """Edit and source, black where the picture may change."""
        return self.edited * (1 - self.mask), self.source * (1 - self.mask)

    def features(self, network: str, view: str) -> Tensor:
        """Of "edited", "source", "target", "inside" (the edit within the mask) or a caption."""
        kept = self.own if view in ("edited", "inside") else self.shared
        if (network, view) not in kept:
            kept[network, view] = self._compute(network, view)
        return kept[network, view]

    def _compute(self, network: str, view: str) -> Tensor:
        net = getattr(self.networks, network)
        if view.endswith("_caption"):
            return net.texts([self.captions[view == "target_caption"]])
        if view == "inside":
            return net.images([self.edited[0] * self.mask])
        return net.images([self.whole[view] if network in SHOWN_WHOLE else getattr(self, view)[0]])

    def cosine(self, network: str, other: str, view: str = "edited") -> Tensor:
        """Of features of length 1, (1,)."""
        a, b = self.features(network, view), self.features(network, other)
        return (a.double() * b.double()).sum(dim=-1).clamp(max=1)


@dataclass(frozen=True)
class Metric:
    """One number for each edit.

    needs: names of `NEEDS`. measure: of N edits, (N,). better: 1 if higher is better, -1 if lower
    is, 0 if neither. chooses: scales may be chosen by it. least: the shortest side that it can
    measure, in pixels. default: it is measured wherever its needs are met, without being asked for.
    """

    label: str
    about: str
    needs: tuple[str, ...]
    digits: int
    measure: Callable[[Views], Tensor]
    better: int = 1
    chooses: bool = False
    least: int = 1
    default: bool = False


def _clipped(edited: Tensor) -> Tensor:
    return 100 * ((edited <= 0) | (edited >= 1)).double().mean(dim=(1, 2, 3))


def _unmeasured(views: Views) -> Tensor:
    raise NotImplementedError("a judge gives these scores")


def _structure(views: Views) -> Tensor:
    edited, source = (views.features("structure", view) for view in ("edited", "source"))
    return (edited.double() - source.double()).square().mean(dim=(1, 2))


def _direction(views: Views) -> Tensor:
    names = ("source", "edited", "source_caption", "target_caption")
    return direction_similarity(*(views.features("clip", name) for name in names))


HIGH, LOW = "higher is better", "lower is better"
OUTSIDE = "outside the mask, which is made black in both pictures as PIE-Bench does: that flatters"
METRICS = {
    "change": Metric(
        *("change, %", "mean absolute difference from the source, in % of the range of values"),
        *((), 2, lambda v: 100 * l1(v.edited, v.source)),
        better=0,
        default=True,
    ),
    "clipped": Metric(
        *("clipped, %", "values at 0 or 255, in % of all: over-saturation"),
        *((), 2, lambda v: _clipped(v.edited)),
        better=0,
        default=True,
    ),
    "psnr": Metric(
        *("PSNR, dB", f"against the target; {HIGH}"),
        *(("target",), 2, lambda v: psnr(v.edited, v.target)),
        chooses=True,
        default=True,
    ),
    "ssim": Metric(
        *("SSIM", f"against the target, at most 1; {HIGH}"),
        *(("target",), 4, lambda v: ssim(v.edited, v.target)),
        chooses=True,
        least=SSIM_WINDOW,
        default=True,
    ),
    "l1": Metric(
        *("L1", f"mean absolute difference from the target, in [0, 1]; {LOW}"),
        *(("target",), 4, lambda v: l1(v.edited, v.target), -1),
        chooses=True,
    ),
    "l2": Metric(
        *("L2", f"mean squared difference from the target, in [0, 1], no root; {LOW}"),
        *(("target",), 4, lambda v: l2(v.edited, v.target), -1),
        chooses=True,
    ),
    "psnr_y": Metric(
        *("PSNR of Y, dB", f"of luma in 16..235 against the target, as for rain; {HIGH}"),
        *(("target",), 2, lambda v: psnr_y(v.edited, v.target)),
        chooses=True,
    ),
    "ssim_y": Metric(
        *("SSIM of Y", f"of luma in 16..235 against the target, as for rain; {HIGH}"),
        *(("target",), 4, lambda v: ssim_y(v.edited, v.target)),
        chooses=True,
        least=SSIM_WINDOW,
    ),
    "ssim_3d": Metric(
        *("SSIM, MATLAB", f"MATLAB's ssim of all channels at once, as for GoPro and SIDD; {HIGH}"),
        *(("target",), 4, lambda v: ssim_3d(v.edited, v.target)),
        chooses=True,
    ),
    "haarpsi": Metric(
        *("HaarPSI", f"perceptual similarity to the target, 0 to 1; {HIGH}"),
        *(("target",), 4, lambda v: haarpsi(v.edited, v.target)),
        chooses=True,
    ),
    "invented": Metric(
        "invented detail",
        f"fine detail beyond that of source and target, in levels of 0..255; {LOW}",
        *(("target",), 2, lambda v: invented(v.edited, v.source, v.target), -1),
        least=INVENTED_WINDOW,
        default=True,
    ),
    "clip_image": Metric(
        *("CLIP image similarity", "to the source, at most 1: how much of it is kept"),
        *(("clip",), 4, lambda v: v.cosine("clip", "source")),
        better=0,
        default=True,
    ),
    "clip_image_target": Metric(
        *("CLIP image similarity to target", f"at most 1; {HIGH}"),
        *(("clip", "target"), 4, lambda v: v.cosine("clip", "target")),
        chooses=True,
        default=True,
    ),
    "clip_text": Metric(
        *("CLIP similarity to target caption", f"of the edit; {HIGH}"),
        *(("clip", "caption"), 4, lambda v: v.cosine("clip", "target_caption")),
        default=True,
    ),
    "clip_direction": Metric(
        "CLIP direction similarity",
        f"cosine between the change of the picture and that of the captions, 0 for none; {HIGH}",
        *(("clip", "captions"), 4, _direction),
        default=True,
    ),
    "dino": Metric(
        *("DINO similarity to target", f"cosine of class tokens, at most 1; {HIGH}"),
        *(("dino", "target"), 4, lambda v: v.cosine("dino", "target")),
        chooses=True,
        default=True,
    ),
    "dino_source": Metric(
        *("DINO similarity to source", "cosine of class tokens, at most 1: how much is kept"),
        *(("dino",), 4, lambda v: v.cosine("dino", "source")),
        better=0,
    ),
    "dino_structure": Metric(
        "DINO structure distance",
        "from the source, 0 for none: which parts are alike, whatever they look like",
        *(("structure",), 5, _structure, 0),
    ),
    "lpips": Metric(
        *("LPIPS", f"perceptual distance from the target; {LOW}"),
        *(("lpips", "target"), 4, lambda v: v.networks.lpips(v.edited, v.target), -1),
        chooses=True,
        least=32,
        default=True,
    ),
    "dists": Metric(
        *("DISTS", f"distance of structure and texture from the target; {LOW}"),
        *(("dists", "target"), 4, lambda v: v.networks.dists(v.edited, v.target), -1),
        chooses=True,
        least=16,
        default=True,
    ),
    "background_psnr": Metric(
        *("background PSNR, dB", f"against the source, {OUTSIDE}; {HIGH}"),
        *(("background",), 2, lambda v: psnr(*v.background)),
    ),
    "background_mse": Metric(
        *("background MSE", f"from the source, {OUTSIDE}; {LOW}"),
        *(("background",), 5, lambda v: l2(*v.background), -1),
    ),
    "background_ssim": Metric(
        *("background SSIM", f"to the source, {OUTSIDE}; {HIGH}"),
        *(("background",), 4, lambda v: ssim(*v.background)),
        least=SSIM_WINDOW,
    ),
    "background_lpips": Metric(
        *("background LPIPS", f"from the source, {OUTSIDE}; {LOW}"),
        *(("lpips", "background"), 4, lambda v: v.networks.lpips(*v.background), -1),
        least=32,
    ),
    "clip_text_edited": Metric(
        "CLIP similarity to target caption, within the mask",
        f"of the edit, black where it may not change; {HIGH}",
        *(("clip", "caption", "mask"), 4, lambda v: v.cosine("clip", "target_caption", "inside")),
    ),
    **{
        name: Metric(label, f"of a judge; {HIGH}", ("judge",), 2, _unmeasured)
        for name, label in (
            ("judged", "judged score"),
            ("judged_sc", "judged semantic consistency"),
            ("judged_pq", "judged quality"),
        )
    },
}


def lacking(cases: Iterable[Case], networks: Networks) -> dict[str, str]:
    """What none of these cases has, and the networks that are not there; with how to give it."""
    given = networks.given
    for case in cases:
        given |= _given(case.target, case.captions)
        given |= {"mask", "background"} if case.mask is not None else set()
    return {need: how for need, how in NEEDS.items() if need not in given}


def _given(target: object, captions: tuple[str, str] | None) -> set[str]:
    """What of a case can be measured against; that of the source may be "", which says nothing."""
    given = set() if target is None else {"target"}
    given |= set() if captions is None else {"caption"}
    return given | ({"captions"} if captions and all(captions) else set())


def pick_metrics(
    asked: Sequence[str] | None, cases: Sequence[Case], networks: Networks
) -> list[str]:
    """Metrics that can be measured for at least one case: the usual ones, or those asked for.

    Raises: InputError for an unknown one, or one that lacks what it needs.
    """
    missing = lacking(cases, networks)
    for name in asked or ():
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; {suggestion(name, [*METRICS])}")
        if reasons := [missing[need] for need in METRICS[name].needs if need in missing]:
            raise InputError(f"metric {name} needs {' and '.join(reasons)}")
    known = [name for name in METRICS if METRICS[name].default] if asked is None else asked
    return [name for name in METRICS if name in known and not missing.keys() & METRICS[name].needs]


def measure(
    pictures: Iterable[Image.Image],
    source: Image.Image,
    target: Image.Image | None = None,
    captions: tuple[str, str] | None = None,
    mask: Tensor | None = None,
    networks: Networks = NO_NETWORKS,
    names: Iterable[str] = METRICS,
    *,
    at_target: bool = False,
) -> dict[str, Tensor]:
    """Numbers of the edits of one case, (N,) each, float64; none for what a metric lacks.

    Pixels are compared at the size of the source. at_target: at that of the target, edits bicubic
    in 8 bits, as MagicBrush measures. CLIP and DINO are shown the pictures that are given here.
    mask: 1 where the picture may change, (H, W); if it has another size, its nearest values count.
    """
    size = target.size if at_target and target is not None else source.size
    given = networks.given | _given(target, captions)
    if mask is not None:
        mask = F.interpolate(mask[None, None].float(), size[::-1])[0, 0]
        given |= {"mask"} if mask.any() else set()
        given |= {"background"} if not mask.all() else set()
    names = [
        name
        for name in names
        if given.issuperset(METRICS[name].needs) and min(size) >= METRICS[name].least
    ]

    def sized(image: Image.Image) -> Tensor:
        if image.size != size:
            image = image.resize(size, BICUBIC) if at_target else resize(image, size)
        return pixels01_from_image(image)[None]

    whole = {"source": pixels01_from_image(source)}
    if target is not None:
        whole["target"] = pixels01_from_image(target)
    against = (sized(source), None if target is None else sized(target))
    shared: dict[tuple[str, str], Tensor] = {}
    numbers = []
    for picture in pictures:
        edited = {"edited": pixels01_from_image(picture), **whole}
        views = Views(sized(picture), *against, edited, captions, mask, networks, shared)
        numbers.append([METRICS[name].measure(views).double() for name in names])
    columns = zip(*numbers, strict=True)
    return {name: torch.cat(column) for name, column in zip(names, columns, strict=False)}


def scored_by(
    names: Iterable[str], networks: Networks, *, at_target: bool = False
) -> dict[str, str]:
    """How metrics are measured: with what network, of which weights, on pictures made ready how."""
    told = {}
    for name in names:
        needs = METRICS[name].needs
        used = [str(getattr(networks, need)) for need in needs if need in networks.given]
        if SHOWN_WHOLE.isdisjoint(needs):
            used.append("at the size of the target, bicubic" if at_target else "at the edit's size")
        told[name] = ", ".join(used)
    return told
