"""`sample.py`, `ipx2p edit`: edit pictures by an instruction (layer 5)."""

import argparse
import textwrap
from dataclasses import fields
from pathlib import Path

from ipx2p.cli import Parser, add_how, add_where
from ipx2p.files import check_picture_file
from ipx2p.names import (
    FIDELITY,
    GUIDANCE,
    MODIFIERS,
    SAMPLERS,
    SPACINGS,
    TRANSFERS,
    check_names,
)
from ipx2p.weights.readers import find_folder

DESCRIPTION = "Edit pictures by an instruction, with a trained model."
LISTS = {
    "samplers": SAMPLERS,
    "spacings": SPACINGS,
    "transfers": TRANSFERS,
    "guidance": GUIDANCE,
    "modifiers": MODIFIERS,
    "fidelity": FIDELITY,
}
NAMES = "\n".join(
    textwrap.fill(f"{f'{label}:':12}{', '.join(names)}", 100, subsequent_indent=" " * 12)
    for label, names in LISTS.items()
)
EXAMPLES = f"""\
{NAMES}
            modifiers are stacked on guidance with +, knobs of fidelity on one another; parameters
            come after a colon

examples:
  # one picture, with the settings and the size that the weights folder names
  python sample.py weights/ip2p --image photo.jpg --instruction "cartoonize it"

  # published weights, straight from the hub
  python sample.py timbrooks/instruct-pix2pix --image photo.jpg --instruction "make it night"

  # the model that configs/quickstart.yaml trains
  python sample.py runs/quickstart/weights --image assets/photos/*.jpg \\
      --instruction "enhance the low-light image"

  # one instruction for several pictures, four variants of each, and a contact sheet of them all
  python sample.py weights/ip2p --image a.jpg b.jpg --instruction "make it snow" --num-images 4

  # a photograph of any size: its small copy is edited, and the original gets the edit
  python sample.py weights/ip2p --image photo.jpg --instruction "make it night" --full-size

  # larger than the model's size: in overlapping parts of that size, which see every pixel
  python sample.py weights/ip2p --image photo.jpg --instruction "denoise the photo" \\
      --resolution 1024 --window 512

  # the picture changes too much: raise --image-guidance-scale; too little: raise --guidance-scale
  python sample.py weights/ip2p --image a.jpg --instruction "make it snow" \\
      --guidance-scale 9 --image-guidance-scale 1.2

  # the model invents texture, and changes what it should not: take both back in part
  python sample.py weights/ip2p --image a.jpg --instruction "remove the rain" \\
      --fidelity transfer:weight=0.5+mask:threshold=0.05

  # a stack of guidance: high scales without over-saturation, in the middle of the run alone
  python sample.py weights/ip2p --image a.jpg --instruction "make it snow" --guidance-scale 10 \\
      --guidance "ip2p+apg:norm=7.5+interval:low=0.28,high=5.4"
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="sample.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights folder or hub id")
    several = {"nargs": "+", "required": True}
    add("--image", metavar="PATH", dest="paths", **several, help="pictures to edit")
    what = "what to do: one for all pictures, or one for each"
    add("--instruction", metavar="TEXT", dest="instructions", **several, help=what)
    add("--output", metavar="DIR", type=Path, default=Path("edits"), help="(default: edits)")
    says = "The model's defaults are in the edit_settings.json of its folder."
    add = parser.add_argument_group("how to edit", says).add_argument
    add_how(add)
    full = "carry the edit over to the full-size original; by which transfer (default: auto)"
    size = {"metavar": "NAME", "nargs": "?", "const": "auto", "default": False}
    add("--full-size", **size, help=full)
    add("--seed", metavar="N", type=int, default=0, help="of the first variant (default: 0)")
    add("--num-images", metavar="N", type=int, default=1, help="variants of each (default: 1)")
    add_where(parser.add_argument_group("where to compute").add_argument)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the pictures, edit them, write the results."""
    args = vars(parse(argv))
    named = ("sampler", "spacing", "guidance", "fidelity")
    # report slips at once
    check_names(transfer=args["full_size"] or None, **{name: args[name] for name in named})
    for path in args["paths"]:
        check_picture_file(Path(path))
    find_folder(args["weights"])
    from ipx2p.editing.files import edit_files
    from ipx2p.editing.settings import EditSettings

    given = {field.name: args.pop(field.name) for field in fields(EditSettings)}
    print(*edit_files(given=given, **args), sep="\n")
