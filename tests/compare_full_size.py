"""What full-size edits keep and win: transfers and knobs of fidelity on large photographs, by PSNR.

    python tests/compare_full_size.py assets/tiny PHOTO...
    python tests/compare_full_size.py runs/quickstart/weights PHOTO... --tasks cartoonize

Photographs are reduced to a long side of `--size` pixels and degraded at that size; the model edits
a small copy. Noise of single pixels vanishes in a small copy, so `denoise, coarse` has grain as
large as the small copy's pixels. The classical methods see the full size. Knobs change the small
edit, which `auto` then carries over. The ceiling is the small target through the autoencoder,
carried over by `auto`: what a model without errors would give.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ipx2p import seeds
from ipx2p.data.cartoons.classical import cartoonize
from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.editing.editor import Editor
from ipx2p.eval.classical import CLASSICAL
from ipx2p.eval.intervals import estimates
from ipx2p.fidelity import Start, parse_fidelity
from ipx2p.images import (
    fit,
    image_from_pixels01,
    load_image,
    pixels01_from_image,
    pixels01_from_pixels,
    pixels_from_pixels01,
)
from ipx2p.metrics import psnr
from ipx2p.photos import read_photo
from ipx2p.transfer import TRANSFERS, carry_over

INSTRUCTIONS = {
    "enhance": "enhance the low-light image",
    "denoise": "denoise the noisy image",
    "denoise, coarse": "denoise the noisy image",
    "derain": "derain the image",
    "deblur": "deblur the blurry image",
    "cartoonize": "cartoonize the image",
}
KNOBS = ("start:strength=0.8", "start:strength=0.5", "transfer", "mask", "adain", "wavelet")
CEILING = "ceiling"


def pair(clean01: Tensor, case: str, small: int, seed: int) -> tuple[Tensor, Tensor]:
    """Source and target, (3, H, W) in [0, 1]."""
    task, _, coarse = case.partition(", ")
    if task == "cartoonize":
        return clean01, cartoonize(clean01[None])[0]
    draws = seeds.generator(seed, "compare full size", case)
    if not coarse:
        return degrade(clean01, task, draws, DegradeConfig()), clean01
    reduced = pixels01_from_image(fit(image_from_pixels01(clean01), small, 8))
    grain = degrade(reduced, task, draws, DegradeConfig()) - reduced
    grain = interpolate(grain[None], clean01.shape[-2:], mode="bicubic")[0]
    return (clean01 + grain).clamp(0, 1), clean01


@torch.no_grad()
def results(editor: Editor, clean01: Tensor, case: str, seed: int) -> dict[str, float]:
    """PSNR of every row, against the target at full size."""
    source01, target01 = pair(clean01, case, editor.resolution, seed)
    image = image_from_pixels01(source01)
    size = (editor.resolution, editor.vae.config.downscale)
    small01 = pixels01_from_image(fit(image, *size))
    original = read_photo(image).pixels

    def score(pixels01: Tensor) -> float:
        return float(psnr(pixels01[None], target01[None]))

    def carried(small_edit01: Tensor, name: str = "auto") -> float:
        pixels = carry_over(original, small01, small_edit01, name)
        return score(pixels.movedim(-1, 0).float() / 255)

    def edit(fidelity: str) -> Tensor:
        edited = editor.edit(image, INSTRUCTIONS[case], seeds=seed, fidelity=fidelity)
        return edited.pixels01[0]

    plain = edit("none")
    scores = {"source": score(source01)}
    if classical := CLASSICAL.get(case.partition(",")[0]):
        scores["classical"] = score(pixels01_from_image(classical(image)))
    scores |= {name: carried(plain, name) for name in TRANSFERS}
    for stack in KNOBS:
        knobs = parse_fidelity(stack)
        edited = edit(stack) if knobs.find(Start) else knobs.apply(small01, plain)
        scores[f"auto, {stack}"] = carried(edited)
    small_target01 = pixels01_from_image(fit(image_from_pixels01(target01), *size))
    encoded = editor.vae.encode(pixels_from_pixels01(small_target01)[None]).mode()
    [decoded] = editor.vae.decode(editor.vae.scale(encoded))
    scores[CEILING] = carried(pixels01_from_pixels(decoded))
    return scores


def table(scores: Mapping[str, Sequence[dict[str, float]]]) -> list[str]:
    """Markdown: rows by case; a cell is the mean PSNR and its paired difference from the source,
    with the 95 % interval over photographs."""
    names = list(
        dict.fromkeys(name for cases in scores.values() for each in cases for name in each)
    )
    lines = [f"| | {' | '.join(scores)} |", "|---" * (1 + len(scores)) + "|"]
    for name in names:
        cells = [_cell(name, cases) for cases in scores.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(name: str, cases: Sequence[dict[str, float]]) -> str:
    if name not in cases[0]:
        return ""
    values = np.array([case[name] for case in cases])
    if name == "source":
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ({difference(values - [case['source'] for case in cases])})"


def difference(values: np.ndarray) -> str:
    """A mean with its interval, signed."""
    [found] = estimates(values[None], np.arange(len(values)))
    interval = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{interval}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Compare full-size edits, transfers and knobs.")
    parser.add_argument("weights")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--size", type=int, default=1920, help="long side (default: 1920)")
    parser.add_argument("--tasks", nargs="+", choices=INSTRUCTIONS, default=[*INSTRUCTIONS][:-1])
    args = parser.parse_args()
    editor = Editor.load(args.weights)
    scores = defaultdict(list)
    for seed, path in enumerate(args.photos):
        clean01 = pixels01_from_image(fit(load_image(path), args.size, 8))
        for case in args.tasks:
            scores[case].append(results(editor, clean01, case, seed))
            shown = {name: round(value, 2) for name, value in scores[case][-1].items()}
            print(path, case, shown, flush=True)
    print(f"\nPSNR in dB (difference from the source), {len(args.photos)} photographs\n")
    print("\n".join(table(scores)))
    print("\nauto above upscale, dB:")
    for case, cases in scores.items():
        values = np.array([one["auto"] - one["upscale"] for one in cases])
        print(f"{case}: {difference(values)}")


if __name__ == "__main__":
    main()
