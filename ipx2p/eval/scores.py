"""The metrics of an edit, as entries of one table, and how to measure them (layer 4).

A metric says what it needs beside the source and the edit, and is one function of `Views`; a new
one is one more entry of `METRICS`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.cases import Case
from ipx2p.eval.networks import Networks, direction_similarity
from ipx2p.files import digest_bytes, digest_file
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

Distance = Callable[[Tensor, Tensor], Tensor]  # of two pictures, (1, 3, H, W) each
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
            net = getattr(self.networks, network)
            if view.endswith("_caption"):
                kept[network, view] = net.text(self.captions[view == "target_caption"])
            elif view == "inside":
                kept[network, view] = net.look(self.edited[0] * self.mask)
            else:
                picture = self.whole[view] if network in SHOWN_WHOLE else getattr(self, view)[0]
                kept[network, view] = net.look(picture)
        return kept[network, view]

    def cosine(self, network: str, other: str, view: str = "edited") -> Tensor:
        """Of features of length 1, (1,)."""
        a, b = self.features(network, view), self.features(network, other)
        return (a.double() * b.double()).sum(dim=-1).clamp(max=1)


@dataclass(frozen=True)
class Metric:
    """One number for each edit.

    compares: what with what, in words. needs: names of `NEEDS`. measure: of an edit, (1,). better:
    1 if higher is better, -1 if lower is, 0 if neither. chooses: scales may be chosen by it. least:
    the shortest side that it can measure, in pixels. default: it is measured wherever its needs are
    met, without being asked for. bounds: no value lies outside.
    """

    label: str
    compares: str
    needs: tuple[str, ...]
    digits: int
    measure: Callable[[Views], Tensor]
    better: int = 1
    chooses: bool = False
    least: int = 1
    default: bool = False
    bounds: tuple[float, float] = (0.0, math.inf)

    @property
    def about(self) -> str:
        """What it compares, and how to read it."""
        return self.compares + ("", "; higher is better", "; lower is better")[self.better]


def _clipped(views: Views) -> Tensor:
    return 100 * ((views.edited <= 0) | (views.edited >= 1)).double().mean(dim=(1, 2, 3))


def _unmeasured(views: Views) -> Tensor:
    raise NotImplementedError("a judge gives these scores")


def _structure(views: Views) -> Tensor:
    edited, source = (views.features("structure", view) for view in ("edited", "source"))
    return (edited.double() - source.double()).square().mean(dim=(1, 2))


def _direction(views: Views) -> Tensor:
    names = ("source", "edited", "source_caption", "target_caption")
    return direction_similarity(*(views.features("clip", name) for name in names))


def _to_target(label: str, compares: str, digits: int, measure: Distance, **more: Any) -> Metric:
    def of(views: Views) -> Tensor:
        return measure(views.edited, views.target)

    return Metric(label, compares, ("target",), digits, of, chooses=True, **more)


def _outside(label: str, compares: str, digits: int, measure: Distance, **more: Any) -> Metric:
    def of(views: Views) -> Tensor:
        return measure(*views.background)

    return Metric(label, f"{compares}, {OUTSIDE}", ("background",), digits, of, **more)


def _judged(label: str) -> Metric:
    return Metric(label, "of a judge", ("judge",), 2, _unmeasured, bounds=(0.0, 10.0))


OUTSIDE = "outside the mask, which is made black in both pictures as PIE-Bench does: that flatters"
SIGNED, PERCENT = (-1.0, 1.0), (0.0, 100.0)  # bounds
METRICS = {
    "change": Metric(
        *("change, %", "mean absolute difference from the source, in % of the range of values"),
        *((), 2, lambda v: 100 * l1(v.edited, v.source), 0),
        default=True,
        bounds=PERCENT,
    ),
    "clipped": Metric(
        *("clipped, %", "values at 0 or 255, in % of all: over-saturation", (), 2, _clipped, 0),
        default=True,
        bounds=PERCENT,
    ),
    "psnr": _to_target("PSNR, dB", "against the target", 2, psnr, default=True),
    "ssim": _to_target(
        "SSIM",
        "against the target, at most 1",
        4,
        ssim,
        least=SSIM_WINDOW,
        default=True,
        bounds=SIGNED,
    ),
    "l1": _to_target("L1", "mean absolute difference from the target, in [0, 1]", 4, l1, better=-1),
    "l2": _to_target(
        "L2", "mean squared difference from the target, values in [0, 1]", 4, l2, better=-1
    ),
    "psnr_y": _to_target(
        "PSNR of Y, dB", "of luma in 16..235 against the target, as for rain", 2, psnr_y
    ),
    "ssim_y": _to_target(
        *("SSIM of Y", "of luma in 16..235 against the target, as for rain", 4, ssim_y),
        least=SSIM_WINDOW,
        bounds=SIGNED,
    ),
    "ssim_3d": _to_target(
        "SSIM, MATLAB",
        "MATLAB's ssim of all channels at once, as for GoPro and SIDD",
        4,
        ssim_3d,
        bounds=SIGNED,
    ),
    "haarpsi": _to_target(
        "HaarPSI", "perceptual similarity to the target, 0 to 1", 4, haarpsi, bounds=(0.0, 1.0)
    ),
    "invented": Metric(
        "invented detail",
        "fine detail beyond that of source and target, in levels of 0..255",
        *(("target",), 2, lambda v: invented(v.edited, v.source, v.target), -1),
        least=INVENTED_WINDOW,
        default=True,
    ),
    "clip_image": Metric(
        *("CLIP image similarity", "to the source, at most 1: how much of it is kept"),
        *(("clip",), 4, lambda v: v.cosine("clip", "source")),
        better=0,
        default=True,
        bounds=SIGNED,
    ),
    "clip_image_target": Metric(
        *("CLIP image similarity to target", "at most 1"),
        *(("clip", "target"), 4, lambda v: v.cosine("clip", "target")),
        chooses=True,
        default=True,
        bounds=SIGNED,
    ),
    "clip_text": Metric(
        *("CLIP similarity to target caption", "cosine between the edit and the caption"),
        *(("clip", "caption"), 4, lambda v: v.cosine("clip", "target_caption")),
        default=True,
        bounds=SIGNED,
    ),
    "clip_direction": Metric(
        "CLIP direction similarity",
        "cosine between the change of the picture and that of the captions, 0 for none",
        *(("clip", "captions"), 4, _direction),
        default=True,
        bounds=SIGNED,
    ),
    "dino": Metric(
        *("DINO similarity to target", "cosine of class tokens, at most 1"),
        *(("dino", "target"), 4, lambda v: v.cosine("dino", "target")),
        chooses=True,
        default=True,
        bounds=SIGNED,
    ),
    "dino_source": Metric(
        *("DINO similarity to source", "cosine of class tokens, at most 1: how much is kept"),
        *(("dino",), 4, lambda v: v.cosine("dino", "source")),
        better=0,
        bounds=SIGNED,
    ),
    "dino_structure": Metric(
        "DINO structure distance",
        "from the source, 0 for none: which parts are alike, whatever they look like",
        *(("structure",), 5, _structure, 0),
    ),
    "lpips": Metric(
        *("LPIPS", "perceptual distance from the target"),
        *(("lpips", "target"), 4, lambda v: v.networks.lpips(v.edited, v.target), -1),
        chooses=True,
        least=32,
        default=True,
    ),
    "dists": Metric(
        *("DISTS", "distance of structure and texture from the target"),
        *(("dists", "target"), 4, lambda v: v.networks.dists(v.edited, v.target), -1),
        chooses=True,
        least=16,
        default=True,
    ),
    "background_psnr": _outside("background PSNR, dB", "against the source", 2, psnr),
    "background_mse": _outside("background MSE", "from the source", 5, l2, better=-1),
    "background_ssim": _outside(
        "background SSIM", "to the source", 4, ssim, least=SSIM_WINDOW, bounds=SIGNED
    ),
    "background_lpips": Metric(
        *("background LPIPS", f"from the source, {OUTSIDE}"),
        *(("lpips", "background"), 4, lambda v: v.networks.lpips(*v.background), -1),
        least=32,
    ),
    "clip_text_edited": Metric(
        "CLIP similarity to target caption, within the mask",
        "the same, of the edit made black where it may not change",
        *(("clip", "caption", "mask"), 4, lambda v: v.cosine("clip", "target_caption", "inside")),
        bounds=SIGNED,
    ),
    "judged": _judged("judged score"),
    "judged_sc": _judged("judged semantic consistency"),
    "judged_pq": _judged("judged quality"),
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
        if image.size != size and at_target:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return pixels01_from_image(resize(image, size))[None]

    whole = {"source": pixels01_from_image(source)}
    if target is not None:
        whole["target"] = pixels01_from_image(target)
    against = (sized(source), None if target is None else sized(target))
    shared: dict[tuple[str, str], Tensor] = {}
    numbers = []
    for picture in pictures:
        edited = {"edited": pixels01_from_image(picture), **whole}
        views = Views(sized(picture), *against, edited, captions, mask, networks, shared)
        numbers.append({name: METRICS[name].measure(views).double() for name in names})
    return {name: torch.cat([row[name] for row in numbers]) for name in names}


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
        told[name] = ", ".join([*used, f"code {_code()}"])
    return told


@cache
def _code() -> str:
    """A hash of the code that measures."""
    files = (inspect.getsourcefile(one) for one in (psnr, measure, Networks))
    return digest_bytes("".join(map(digest_file, files)).encode(), 4)
