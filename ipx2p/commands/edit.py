"""`sample.py`, `ipx2p edit`: edit pictures by an instruction (layer 5)."""

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from ipx2p.cli import Parser, add_where
from ipx2p.files import check_picture_file
from ipx2p.names import GUIDANCE, MODIFIERS, SAMPLERS, SPACINGS, check_names
from ipx2p.weights.readers import find_folder

DESCRIPTION = "Edit pictures by an instruction, with a trained model."


# The names are known without torch, so that --help is quick.
LISTS = {
    "samplers:": SAMPLERS,
    "spacings:": SPACINGS,
    "guidance:": GUIDANCE,
    "modifiers:": MODIFIERS,
}
NAMES = "\n".join(
    textwrap.fill(", ".join(names), 100, initial_indent=f"{label:12}", subsequent_indent=" " * 12)
    for label, names in LISTS.items()
)
EXAMPLES = f"""\
{NAMES}
            stack them on guidance with +, parameters after a colon

examples:
  # one picture
  python sample.py weights/ip2p --image photo.jpg --instruction "cartoonize it"

  # published weights, straight from the hub
  python sample.py timbrooks/instruct-pix2pix --image photo.jpg --instruction "make it night"

  # the model that configs/quickstart.yaml trains, which works on small pictures
  python sample.py runs/quickstart/weights --image assets/photos/*.jpg \\
      --instruction "enhance the low-light image" --sampler euler --spacing trailing --steps 5 \\
      --guidance-scale 1 --image-guidance-scale 1

  # one instruction for several pictures, four variants of each, and a contact sheet of them all
  python sample.py weights/ip2p --image a.jpg b.jpg --instruction "make it snow" --num-images 4

  # the picture changes too much: raise --image-guidance-scale; too little: raise --guidance-scale
  python sample.py weights/ip2p --image a.jpg --instruction "make it snow" \\
      --guidance-scale 9 --image-guidance-scale 1.2

  # a stack of guidance: high scales without over-saturation, in the middle of the run alone
  python sample.py weights/ip2p --image a.jpg --instruction "make it snow" --guidance-scale 10 \\
      --guidance "ip2p+apg:norm=7.5+interval:low=0.28,high=5.4"
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; needs nothing but the standard library."""
    parser = Parser(prog="sample.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights folder or hub id")
    several = {"nargs": "+", "required": True}
    add("--image", metavar="PATH", dest="paths", **several, help="pictures to edit")
    what = "what to do: one for all pictures, or one for each"
    add("--instruction", metavar="TEXT", dest="instructions", **several, help=what)
    add("--negative-instruction", metavar="TEXT", default="", help="what to steer away from")
    add("--output", metavar="DIR", type=Path, default=Path("edits"), help="(default: edits)")
    _add_how(parser.add_argument_group("how to edit").add_argument)
    add_where(parser.add_argument_group("where to compute").add_argument)
    return parser.parse_args(argv)


def _add_how(add: Callable[..., object]) -> None:
    add("--sampler", metavar="NAME", default="euler_ancestral", help="(default: %(default)s)")
    add("--spacing", metavar="NAME", default="linspace", help="(default: %(default)s)")
    steps = "1 to 1000 (default: %(default)s)"
    add("--steps", metavar="N", dest="num_steps", type=int, default=20, help=steps)
    stack = 'a scheme and modifiers, as "ip2p+apg:eta=0,norm=7.5+rescale" (default: %(default)s)'
    add("--guidance", metavar="STACK", default="ip2p", help=stack)
    text = "how strongly to follow the instruction (default: %(default)s)"
    add("--guidance-scale", metavar="S", type=float, default=7.0, help=text)
    image = "how closely to keep to the picture (default: %(default)s)"
    add("--image-guidance-scale", metavar="S", type=float, default=1.5, help=image)
    add("--weak-weights", metavar="WEIGHTS", help="a weaker model, for --guidance autoguidance")
    add("--seed", metavar="N", type=int, default=0, help="of the first variant (default: 0)")
    add("--num-images", metavar="N", type=int, default=1, help="variants of each (default: 1)")
    size = "the long side becomes N pixels (default: what the model was trained at)"
    add("--resolution", metavar="N", type=int, help=size)


def main(argv: list[str] | None = None) -> None:
    """Read the pictures, edit them, write the results."""
    args = vars(parse(argv))
    check_names([args["sampler"]], args["spacing"], [args["guidance"]])  # answer slips at once
    for path in args["paths"]:
        check_picture_file(Path(path))
    find_folder(args["weights"])
    from ipx2p.editing.files import edit_files
    from ipx2p.editing.settings import EditSettings

    settings = EditSettings(**{field.name: args.pop(field.name) for field in fields(EditSettings)})
    print(*edit_files(settings=settings, **args), sep="\n")
