"""Compare guidance schemes. `python -m ipx2p.eval.compare --help` shows examples."""

import argparse
from pathlib import Path

from ipx2p.cli import Parser, add_how, add_report, add_where, run_command
from ipx2p.errors import InputError
from ipx2p.files import check_picture_file
from ipx2p.names import check_names
from ipx2p.weights.readers import find_folder

DESCRIPTION = "Edit pictures with every combination of guidance and scales, measure, and report."

# Plain text so that --help need not import torch; a test compares it with the code.
EXAMPLES = """\
Options with several values are combined with one another; those left out are as the weights folder
says. Run again, or with more values, the command computes only what is missing; OUTPUT/index.html
has the tables, curves and pictures.

examples:
  # one picture: three schemes at 3 x 3 scales
  python -m ipx2p.eval.compare weights/ip2p --image photo.jpg --instruction "make it snow" \\
      --guidance ip2p apg "ip2p+interval:low=0.28,high=5.4" \\
      --guidance-scale 3 7 12 --image-guidance-scale 1 1.5 2

  # restoration: PSNR and SSIM against the targets of 40 pairs, on all GPUs; the best scales are
  # chosen on 40 others
  torchrun --nproc-per-node 8 -m ipx2p.eval.compare weights/mine --manifest pairs/test.jsonl \\
      --select-on pairs/val.jsonl --limit 40 --guidance ip2p tcfg --guidance-scale 1 1.5 2 \\
      --image-guidance-scale 1 1.5

  # the trade-off of the InstructPix2Pix paper; the manifest has captions
  python -m ipx2p.eval.compare weights/ip2p --manifest pairs/test.jsonl \\
      --clip openai/clip-vit-large-patch14 --guidance ip2p apg cfgpp --guidance-scale 7.5 \\
      --image-guidance-scale 1 1.2 1.4 1.6 1.8 2 2.2

  # what steps buy: equal network evaluations are listed together
  python -m ipx2p.eval.compare weights/ip2p --folder photos --instruction "make it night" \\
      --guidance ip2p interval pag --sampler euler dpmpp_2m --steps 10 20 40 --seed 0 1 2
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone."""
    parser = Parser(prog="python -m ipx2p.eval.compare", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights folder or hub id")
    add("--output", metavar="DIR", type=Path, default=Path("compare"), help="(default: compare)")
    _add_what(parser.add_argument_group("what to edit"))
    add = parser.add_argument_group("what to compare").add_argument
    add_how(add, several=True)
    add("--seed", metavar="N", nargs="+", type=int, default=[0], dest="seeds", help="(default: 0)")
    add_report(parser.add_argument_group("what to report").add_argument)
    add_where(parser.add_argument_group("where to compute").add_argument)
    args = parser.parse_args(argv)
    if args.manifest and (args.instruction or args.target or args.source_caption or args.mask):
        parser.error("a manifest brings its own instructions, targets and captions, and no masks")
    if not args.manifest and not args.instruction:
        parser.error("--instruction is required with --image and --folder")
    if args.folder and (args.target or args.source_caption or args.mask):
        parser.error("targets and captions of a folder belong in a --manifest, masks to --image")
    if args.select_on and not args.manifest:
        parser.error("--select-on chooses the scales that are reported for a --manifest")
    if (args.source_caption is None) != (args.target_caption is None):
        parser.error("captions come in pairs: --source-caption and --target-caption")
    return args


def _add_what(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--image", metavar="PATH", nargs="+", type=Path, help="pictures")
    which.add_argument("--folder", metavar="DIR", type=Path, help="every picture in a folder")
    which.add_argument("--manifest", metavar="FILE", type=Path, help="pairs, in JSON lines")
    add = group.add_argument
    add("--instruction", metavar="TEXT", nargs="+", help="one for all pictures, or one each")
    add("--target", metavar="PATH", nargs="+", type=Path, default=[], help="one for each --image")
    light = "one for each --image: light where it may change (default: where the target differs)"
    add("--mask", metavar="PATH", nargs="+", type=Path, default=[], help=light)
    add("--source-caption", metavar="TEXT", help="what the --image shows, for CLIP")
    add("--target-caption", metavar="TEXT", help="what its edit should show")
    add("--limit", metavar="N", type=int, help="take N of the pictures, always the same")
    choosing = "another manifest: the best scales are chosen on its pairs"
    add("--select-on", metavar="FILE", type=Path, help=choosing)


def main(argv: list[str] | None = None) -> None:
    """Compare, and print where the report is."""
    args = parse(argv)
    stacks = {"guidance": args.guidance, "fidelity": args.fidelity}
    check_names(sampler=args.sampler, spacing=args.spacing, **stacks)  # report slips at once
    for path in args.image or ():
        check_picture_file(path)
    if not (find_folder(args.weights) / "unet").is_dir():
        raise InputError(f"{args.weights} has no folder unet: expected weights of an edit model")
    from ipx2p.eval.cases import cases_of_folder, cases_of_images, cases_of_manifest, draw
    from ipx2p.eval.engine import config_of, evaluate

    if args.manifest:
        cases = cases_of_manifest(args.manifest)
    elif args.folder:
        cases = cases_of_folder(args.folder, args.instruction, args.output)
    else:
        captions = (args.source_caption, args.target_caption)
        captions = None if None in captions else captions
        cases = cases_of_images(args.image, args.instruction, args.target, captions, args.mask)
    choosing = cases_of_manifest(args.select_on) if args.select_on else []
    config = config_of(vars(args) | {"models": [args.weights]})
    evaluate(config, draw(cases, args.limit), draw(choosing, args.limit))


if __name__ == "__main__":
    run_command(main)
