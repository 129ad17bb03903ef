"""Compare the transfers of full-size edits by PSNR, with edits that a model really made.

    python tests/compare_full_size.py assets/tiny PHOTO...

Photographs are reduced to a long side of `--size` pixels and degraded at that size; the model edits
a small copy. Noise of single pixels vanishes in a small copy, so `denoise, coarse` has grain as
large as the small copy's pixels. The classical methods see the full size.
"""

import argparse
from collections import defaultdict

import torch
from torch.nn.functional import interpolate

from ipx2p import seeds
from ipx2p.data.degradations.tasks import DegradeConfig, degrade
from ipx2p.editing.editor import Editor
from ipx2p.eval.classical import CLASSICAL
from ipx2p.images import fit, image_from_pixels01, load_image, pixels01_from_image
from ipx2p.metrics import psnr
from ipx2p.photos import read_photo
from ipx2p.transfer import TRANSFERS, carry_over

INSTRUCTIONS = {
    "enhance": "enhance the low-light image",
    "denoise": "denoise the noisy image",
    "denoise, coarse": "denoise the noisy image",
    "derain": "derain the image",
    "deblur": "deblur the blurry image",
}


def degraded(clean01: torch.Tensor, case: str, small: int, seed: int) -> torch.Tensor:
    """The picture to repair, (3, H, W) in [0, 1]."""
    task, _, coarse = case.partition(", ")
    draws = seeds.generator(seed, "compare full size", case)
    if not coarse:
        return degrade(clean01, task, draws, DegradeConfig())
    reduced = pixels01_from_image(fit(image_from_pixels01(clean01), small, 8))
    grain = degrade(reduced, task, draws, DegradeConfig()) - reduced
    return (clean01 + interpolate(grain[None], clean01.shape[-2:], mode="bicubic")[0]).clamp(0, 1)


def main() -> None:
    """Measure and print means over the photographs."""
    parser = argparse.ArgumentParser(description="Compare the transfers of full-size edits.")
    parser.add_argument("weights")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--size", type=int, default=1920, help="long side (default: 1920)")
    args = parser.parse_args()
    editor = Editor.load(args.weights)
    scores = defaultdict(list)
    for seed, path in enumerate(args.photos):
        clean = pixels01_from_image(fit(load_image(path), args.size, 8))
        for case, instruction in INSTRUCTIONS.items():
            source = image_from_pixels01(degraded(clean, case, editor.resolution, seed))
            result = editor.edit(source, instruction, seeds=seed)
            small01 = pixels01_from_image(
                fit(source, editor.resolution, editor.vae.config.downscale)
            )
            rows = {"source": pixels01_from_image(source)}
            if classical := CLASSICAL.get(case.partition(",")[0]):
                rows["classical"] = pixels01_from_image(classical(source))
            original = read_photo(source).pixels
            for name in TRANSFERS:
                carried = carry_over(original, small01, result.pixels01[0], name)
                rows[name] = carried.movedim(-1, 0).float() / 255
            for name, pixels01 in rows.items():
                scores[case, name].append(float(psnr(pixels01[None], clean[None])))
            print(path, case, {name: round(scores[case, name][-1], 2) for name in rows}, flush=True)
    names = ["source", "classical", *TRANSFERS]
    print(f"\nPSNR, dB; {len(args.photos)} photographs\n{'':16}", *(f"{n:>10}" for n in names))
    for case in INSTRUCTIONS:
        means = [torch.tensor(scores[case, n]).mean().item() for n in names]
        print(f"{case:16}", *(f"{'-' if m != m else f'{m:.2f}':>10}" for m in means))


if __name__ == "__main__":
    main()
