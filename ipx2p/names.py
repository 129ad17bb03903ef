"""Names that --help lists, known before torch is imported (layer 0).

A test compares them with the code.
"""

import re
from collections.abc import Iterable

from ipx2p.errors import InputError, suggestion

SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
SPACINGS = ("linspace", "leading", "trailing", "karras")
GUIDANCE = (
    *("ip2p", "text_first", "joint", "text_only", "image_only", "symmetric", "composable", "full"),
    *("nested", "free"),
)
MODIFIERS = (
    *("interval", "schedule", "cfgpp", "apg", "zero_star", "tcfg", "fdg", "mambo_g", "power_law"),
    *("adg", "autoguidance", "pag", "seg", "skip_layer", "perp_neg", "rescale"),
    *("dynamic_threshold", "mimic", "cads", "mask", "deepcache"),
)
TRANSFERS = ("auto", "affine", "residual", "ratio", "upscale")
PUBLISHED = (
    *("folders", "gopro", "instructpix2pix", "lol", "magicbrush", "parquet", "rain100"),
    *("rain13k", "rain1400", "reds", "sidd"),
)
METRICS = (
    *("change", "clipped", "psnr", "ssim", "l1", "l2", "psnr_y", "ssim_y", "ssim_3d", "haarpsi"),
    *("invented", "clip_image", "clip_image_target", "clip_text", "clip_direction", "dino"),
    *("dino_source", "dino_structure", "lpips", "dists", "background_psnr", "background_mse"),
    *("background_ssim", "background_lpips", "clip_text_edited"),
)
BENCHMARKS = (
    *("magicbrush", "magicbrush-multi-turn", "magicbrush-global", "magicbrush-multi-turn-global"),
    *("emu-edit", "emu-edit-validation", "emu-edit-icedit", "pie-bench", "instructpix2pix"),
    *("rain100h", "rain100l", "test100", "test1200", "test2800", "gopro", "sidd", "lol"),
    *("imgedit", "gedit"),
)


def check_names(
    samplers: Iterable[str | None],
    spacing: str | None,
    stacks: Iterable[str | None],
    transfer: str | None = None,
) -> None:
    """Raise InputError for an unknown name; None, and parameters of guidance, are not checked."""
    parts = [
        part for stack in filter(None, stacks) for part in re.split(r"(?<!=)\+(?=\s*[a-z_])", stack)
    ]
    schemes = [part.partition(":")[0].strip() for part in parts]
    for kind, names, known in (
        ("sampler", samplers, SAMPLERS),
        ("spacing", [spacing], SPACINGS),
        ("guidance scheme", schemes, (*GUIDANCE, *MODIFIERS)),
        ("transfer", [transfer], TRANSFERS),
    ):
        for name in names:
            if name is not None and name not in known:
                raise InputError(f"unknown {kind} {name[:60]!r}; {suggestion(name, known)}")
