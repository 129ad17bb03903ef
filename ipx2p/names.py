"""Names that --help lists, known before torch is imported (layer 0).

A test compares them with the code.
"""

from collections.abc import Iterable
from itertools import chain

from ipx2p.errors import InputError, suggestion
from ipx2p.stack import names_in

Names = str | Iterable[str] | None
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
FIDELITY = ("none", "start", "wrap", "transfer", "mask", "adain", "wavelet")
PUBLISHED = (
    *("folders", "gopro", "instructpix2pix", "lol", "magicbrush", "parquet", "rain100"),
    *("rain13k", "rain1400", "reds", "sidd"),
)
METRICS = (
    *("change", "clipped", "psnr", "ssim", "l1", "l2", "psnr_y", "ssim_y", "ssim_3d", "haarpsi"),
    *("invented", "psnr_source", "ssim_source", "haarpsi_source", "lpips_source"),
    *("outside_psnr", "outside_ssim", "outside_haarpsi", "outside_lpips"),
    *("clip_image", "clip_image_target", "clip_text", "clip_direction", "dino", "dino_source"),
    *("dino_structure", "lpips", "dists", "background_psnr", "background_mse", "background_ssim"),
    *("background_lpips", "clip_text_edited"),
)
BENCHMARKS = (
    *("magicbrush", "magicbrush-multi-turn", "magicbrush-global", "magicbrush-multi-turn-global"),
    *("emu-edit", "emu-edit-validation", "emu-edit-icedit", "pie-bench", "instructpix2pix"),
    *("rain100h", "rain100l", "test100", "test1200", "test2800", "gopro", "sidd", "lol"),
    *("imgedit", "gedit"),
)


def check_names(
    *,
    sampler: Names = None,
    spacing: Names = None,
    guidance: Names = None,
    fidelity: Names = None,
    transfer: Names = None,
) -> None:
    """Raise InputError for an unknown name; None, and parameters of stacks, are not checked."""
    for kind, given, known in (
        ("sampler", _listed(sampler), SAMPLERS),
        ("spacing", _listed(spacing), SPACINGS),
        ("guidance scheme", chain(*map(names_in, _listed(guidance))), (*GUIDANCE, *MODIFIERS)),
        ("fidelity knob", chain(*map(names_in, _listed(fidelity))), FIDELITY),
        ("transfer", _listed(transfer), TRANSFERS),
    ):
        for name in given:
            if name not in known:
                raise InputError(f"unknown {kind} {name[:60]!r}; {suggestion(name, known)}")


def _listed(given: Names) -> list[str]:
    return [given] if isinstance(given, str) else [*(given or ())]
