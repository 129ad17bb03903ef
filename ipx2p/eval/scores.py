"""The metrics of an edit, as entries of one table, and how to measure them (layer 4).

A metric says what it needs beside the source and the edit, and is one function of `Views`; a new
one is one more entry of `METRICS`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipx2p.errors import InputError, suggestion
from ipx2p.eval.cases import Case
from ipx2p.eval.networks import Networks, direction_similarity
from ipx2p.eval.views import SHOWN_WHOLE, Views
from ipx2p.files import digest_bytes, digest_file
from ipx2p.images import pixels01_from_image, resize
from ipx2p.metrics import (
    INVENTED_WINDOW,
    LEAST_OUTSIDE,
    SSIM_WINDOW,
    Distance,
    change_mask,
    haarpsi,
    invented,
    l1,
    l2,
    psnr,
    psnr_y,
    share_outside,
    ssim,
    ssim_3d,
    ssim_y,
)

NO_NETWORKS = Networks()

NEEDS = {
    "target": "targets (target in the manifest, or --target)",
    "caption": "captions of targets (target_caption in the manifest, or on the command line)",
    "captions": "captions (source_caption and target_caption in the manifest, or on the command "
    "line)",
    "mask": "masks of what may change (--mask, or a benchmark that has them)",
    "background": "masks that leave something out (--mask, or a benchmark that has them)",
    "outside": "targets, or masks of what may change (--target, --mask)",
    "clip": "a CLIP model (--clip)",
    "dino": "a DINO model (--dino)",
    "structure": "a DINO model (--dino)",
    "lpips": "the backbone of LPIPS (--lpips)",
    "dists": "the backbone of DISTS (--dists)",
    "judge": "answers of a judge, which are read by the report (--answers)",
}


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


def _compared(
    measure: Distance | str, to: str, label: str, compares: str, digits: int, default: bool = False
) -> Metric:
    """A distance, or the network of that name, of an edit and what it is compared with.

    to: see `Views.compare`.
    """
    is_network = isinstance(measure, str)
    needs = (measure,) * is_network + (to,) * (to != "source")

    def of(views: Views) -> Tensor:
        return views.compare(getattr(views.networks, measure) if is_network else measure, to)

    better = 0 if to == "source" else -1 if measure in LOWER else 1
    least = max(LEAST.get(measure, 1), SSIM_WINDOW if to == "outside" else 1)
    bounds = BOUNDS.get(measure, (0.0, math.inf))
    about = compares + WHERE[to]
    return Metric(label, about, needs, digits, of, better, to == "target", least, default, bounds)


def _judged(label: str) -> Metric:
    return Metric(label, "of a judge", ("judge",), 2, _unmeasured, bounds=(0.0, 10.0))


WHERE = {
    "target": "",
    "source": ": how much of it is kept",
    "outside": ", where it must not change, as the mask or the target of the case says; not "
    "defined (-) if that is nearly nowhere",
    "background": ", outside the mask, black in both pictures as PIE-Bench does: that flatters",
}
SIGNED, PERCENT, UNIT = (-1.0, 1.0), (0.0, 100.0), (0.0, 1.0)  # bounds
BOUNDS = {ssim: SIGNED, ssim_y: SIGNED, ssim_3d: SIGNED, haarpsi: UNIT}
LEAST = {ssim: SSIM_WINDOW, ssim_y: SSIM_WINDOW, "lpips": 32, "dists": 16}
LOWER = (l1, l2, "lpips", "dists")  # is better
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
    "psnr": _compared(psnr, "target", "PSNR, dB", "against the target", 2, default=True),
    "ssim": _compared(ssim, "target", "SSIM", "against the target, at most 1", 4, default=True),
    "l1": _compared(l1, "target", "L1", "mean absolute difference from the target, in [0, 1]", 4),
    "l2": _compared(
        l2, "target", "L2", "mean squared difference from the target, values in [0, 1]", 4
    ),
    "psnr_y": _compared(
        psnr_y, "target", "PSNR of Y, dB", "of luma in 16..235 against the target, as for rain", 2
    ),
    "ssim_y": _compared(
        ssim_y, "target", "SSIM of Y", "of luma in 16..235 against the target, as for rain", 4
    ),
    "ssim_3d": _compared(
        ssim_3d,
        "target",
        "SSIM, MATLAB",
        "MATLAB's ssim of all channels at once, as for GoPro and SIDD",
        4,
    ),
    "haarpsi": _compared(
        haarpsi, "target", "HaarPSI", "perceptual similarity to the target, 0 to 1", 4
    ),
    "invented": Metric(
        "invented detail",
        "fine detail beyond that of source and target, in levels of 0..255",
        *(("target",), 2, lambda v: invented(v.edited, v.source, v.target), -1),
        least=INVENTED_WINDOW,
        default=True,
    ),
    "psnr_source": _compared(psnr, "source", "PSNR to source, dB", "of the whole picture", 2),
    "ssim_source": _compared(
        ssim, "source", "SSIM to source", "of the whole picture, at most 1", 4
    ),
    "haarpsi_source": _compared(
        haarpsi, "source", "HaarPSI to source", "of the whole picture, 0 to 1", 4
    ),
    "lpips_source": _compared("lpips", "source", "LPIPS from source", "of the whole picture", 4),
    "outside_psnr": _compared(psnr, "outside", "PSNR outside, dB", "against the source", 2),
    "outside_ssim": _compared(ssim, "outside", "SSIM outside", "to the source", 4),
    "outside_haarpsi": _compared(
        haarpsi, "outside", "HaarPSI outside", "to the source", 4, default=True
    ),
    "outside_lpips": _compared("lpips", "outside", "LPIPS outside", "from the source", 4),
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
    "lpips": _compared(
        "lpips", "target", "LPIPS", "perceptual distance from the target", 4, default=True
    ),
    "dists": _compared(
        "dists",
        "target",
        "DISTS",
        "distance of structure and texture from the target",
        4,
        default=True,
    ),
    "background_psnr": _compared(
        psnr, "background", "background PSNR, dB", "against the source", 2
    ),
    "background_mse": _compared(l2, "background", "background MSE", "from the source", 5),
    "background_ssim": _compared(ssim, "background", "background SSIM", "to the source", 4),
    "background_lpips": _compared("lpips", "background", "background LPIPS", "from the source", 4),
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
        given |= {"mask", "background", "outside"} if case.mask is not None else set()
        given |= {"outside"} if case.target is not None else set()
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

    def sized(image: Image.Image) -> Tensor:
        if image.size != size and at_target:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return pixels01_from_image(resize(image, size))[None]

    against = (sized(source), None if target is None else sized(target))
    given, changing = networks.given | _given(target, captions), None
    if mask is not None:
        mask = F.interpolate(mask[None, None].float(), size[::-1])[0, 0]
        given |= {"mask"} if mask.any() else set()
        given |= {"background"} if not mask.all() else set()
        changing = mask[None, None]
    elif target is not None:
        changing = change_mask(*against)
    if changing is not None and share_outside(changing) >= LEAST_OUTSIDE:
        given |= {"outside"}
    names = [
        name
        for name in names
        if given.issuperset(METRICS[name].needs) and min(size) >= METRICS[name].least
    ]
    whole = {"source": pixels01_from_image(source)}
    if target is not None:
        whole["target"] = pixels01_from_image(target)
    shared: dict[tuple[str, str], Tensor] = {}
    numbers = []
    for picture in pictures:
        edited = {"edited": pixels01_from_image(picture), **whole}
        seen = (sized(picture), *against, edited, captions, mask, changing, networks, shared)
        views = Views(*seen)
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
    files = (inspect.getsourcefile(one) for one in (psnr, measure, Views, Networks))
    return digest_bytes("".join(map(digest_file, files)).encode(), 4)
