"""`convert_weights.py`, `ipx2p convert`: convert weights between layouts (layer 5)."""

import argparse
from pathlib import Path

from ipx2p.cli import Parser
from ipx2p.weights.readers import find_source

DESCRIPTION = "Convert weights: original single file <-> weights folder, 4 -> 8 input channels."
EXAMPLES = """\
SOURCE is an original checkpoint (.ckpt, .safetensors; Stable Diffusion 1.x), a weights folder, or a
hub id. The number of input channels is read from the weights. Tensors keep their dtype unless
--dtype says otherwise. A single file holds no head counts, norm groups, prediction type or
tokenizer: --config takes them from a weights folder of the same model.

examples:
  # InstructPix2Pix's original checkpoint to a folder that sample.py and diffusers open
  python convert_weights.py instruct-pix2pix-00-22000.ckpt weights/ip2p \\
      --tokenizer openai/clip-vit-large-patch14

  # a starting point for training: Stable Diffusion, widened to 8 input channels
  python convert_weights.py stable-diffusion-v1-5/stable-diffusion-v1-5 weights/sd15-edit --edit

  # a trained model as one half-precision file for ComfyUI or AUTOMATIC1111
  python convert_weights.py runs/mine/weights mine.safetensors --to ldm --dtype float16

  # give another Stable Diffusion 1.x model the edits of InstructPix2Pix
  python convert_weights.py other.safetensors weights/other-edit --config weights/ip2p \\
      --add-difference weights/ip2p stable-diffusion-v1-5/stable-diffusion-v1-5
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="convert_weights.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="checkpoint file, weights folder, or hub id")
    add("output", metavar="OUTPUT", type=Path, help="a new folder, or a new .safetensors file")
    add("--to", choices=["folder", "ldm"], default="folder", help="(default: folder)")
    which = "averaged or raw weights of a single file (default: ema where the file has them)"
    add("--weights", dest="which", choices=["ema", "raw"], help=which)
    add("--edit", action="store_true", help="widen a 4-channel U-Net to 8, for training on edits")
    difference = "add EDIT - BASE to the U-Net, both SOURCEs"
    add("--add-difference", metavar=("EDIT", "BASE"), nargs=2, help=difference)
    add("--config", metavar="FOLDER", help="folder or hub id with what a single file lacks")
    add("--vae", metavar="PATH", help="another autoencoder: folder, hub id or single file")
    add("--tokenizer", metavar="PATH", help="folder or hub id with tokenizer files")
    add("--prediction", choices=["epsilon", "v"], help="what the U-Net predicts")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: as in SOURCE)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert."""
    args = parse(argv)
    find_source(args.source)  # report slips at once
    from ipx2p.weights.convert import convert

    convert(**vars(args))
