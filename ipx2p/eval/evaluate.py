"""Compare models. `python -m ipx2p.eval.evaluate --help` shows examples."""

import argparse
import textwrap
from pathlib import Path

from ipx2p.cli import Parser, add_how, add_report, add_where, run_command
from ipx2p.errors import InputError, suggestion
from ipx2p.names import BENCHMARKS, check_names

DESCRIPTION = "Edit pairs with several models, measure with intervals, and report."

# Plain text so that --help need not import torch; a test compares it with the code.
EXAMPLES = """\
CASES:      a manifest; a folder of photographs, with --instruction; or the root of a published
            benchmark, with --benchmark
--models:   [NAME=]WEIGHTS[@SETTING=VALUE,...]: a weights folder or hub id, and settings for it
            alone; or [NAME=]FOLDER with pictures that were made elsewhere. A model has the settings
            of its folder, but for options, which are for all, and @SETTING=VALUE
benchmarks: {benchmarks}

Rows that need no edit model: identity (the source); with targets, oracle (the target) and vae (the
target through the autoencoder: a ceiling for edits); classical (a method without learning, where
there is one). Run again, or with more models, the command computes only what is
missing; OUTPUT/index.html has tables, curves and pictures, and `python -m ipx2p.eval.report OUTPUT`
makes it again.

examples:
  # three models on the test pairs, without guidance; differences from the third as well
  python -m ipx2p.eval.evaluate pairs/test.jsonl --models runs/a/weights runs/b/weights \\
      old=runs/c/weights --guidance-scale 1 --image-guidance-scale 1 --baseline old

  # scales are chosen for each model on other pairs
  torchrun --nproc-per-node 8 -m ipx2p.eval.evaluate pairs/test.jsonl --models a b \\
      --select-on pairs/val.jsonl --guidance-scale 1 1.5 2 --image-guidance-scale 1 1.5

  # models with settings of their own
  python -m ipx2p.eval.evaluate pairs/test.jsonl \\
      --models "a@guidance_scale=1,image_guidance_scale=1" "a@guidance=ip2p+apg,num_steps=50"

  # a published benchmark, from its official download
  python -m ipx2p.eval.evaluate magicbrush/test --benchmark magicbrush --models \\
      timbrooks/instruct-pix2pix --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16
"""


def parse(argv: list[str] | None, **defaults: object) -> argparse.Namespace:
    """Parse the arguments, with the standard library alone. defaults: other ones, by name."""
    names = textwrap.fill(", ".join(BENCHMARKS), 88, subsequent_indent=" " * 12)
    examples = EXAMPLES.replace("{benchmarks}", names)
    parser = Parser(prog="python -m ipx2p.eval.evaluate", description=DESCRIPTION, epilog=examples)
    add = parser.add_argument
    add("cases", metavar="CASES", type=Path, help="manifest, folder, or root of a benchmark")
    several = {"nargs": "+", "required": True}
    add("--models", metavar="MODEL", **several, help="what is compared, see below")
    output = Path("evaluation")
    add("--output", metavar="DIR", type=Path, default=output, help="(default: evaluation)")
    add = parser.add_argument_group("what to edit").add_argument
    add("--benchmark", metavar="NAME", help="the published set that lies in CASES")
    add("--instruction", metavar="TEXT", help="for all pictures of a folder")
    add("--limit", metavar="N", type=int, help="take N of the pictures, always the same")
    choosing = "a manifest: the best scales are chosen on its pairs"
    add("--select-on", metavar="FILE", type=Path, help=choosing)
    add = parser.add_argument_group("how to edit").add_argument
    add_how(add, several=True)
    add("--seed", metavar="N", nargs="+", type=int, default=[0], dest="seeds", help="(default: 0)")
    add_report(parser.add_argument_group("what to report").add_argument)
    add_where(parser.add_argument_group("where to compute").add_argument)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.benchmark and args.instruction:
        parser.error("a benchmark brings its own instructions")
    return args


def main(argv: list[str] | None = None) -> None:
    """Evaluate, and print where the report is."""
    args = parse(argv)
    stacks = {"guidance": args.guidance, "fidelity": args.fidelity}
    check_names(sampler=args.sampler, spacing=args.spacing, **stacks)  # report slips at once
    if args.benchmark and args.benchmark not in BENCHMARKS:
        known = suggestion(args.benchmark, BENCHMARKS)
        raise InputError(f"no benchmark {args.benchmark!r}; {known}")
    if not args.cases.exists():
        raise InputError(
            f"{args.cases} does not exist: expected a manifest, a folder or a benchmark"
        )
    if args.cases.is_dir() and not (args.benchmark or args.instruction):
        raise InputError(
            f"{args.cases} is a folder: give --instruction TEXT for its photographs, or "
            "--benchmark NAME for a published set"
        )
    from ipx2p.eval.benchmarks.registry import PROTOCOLS, read_benchmark
    from ipx2p.eval.cases import cases_of_folder, cases_of_manifest, draw
    from ipx2p.eval.engine import EXTRACTED, config_of, evaluate

    if args.benchmark:
        args = parse(argv, **PROTOCOLS[args.benchmark].preset)
        cases = read_benchmark(args.benchmark, args.cases, args.output / EXTRACTED)
    elif args.instruction:
        cases = cases_of_folder(args.cases, [args.instruction], args.output)
    else:
        cases = cases_of_manifest(args.cases)
    choosing = cases_of_manifest(args.select_on) if args.select_on else []
    evaluate(config_of(vars(args)), draw(cases, args.limit), draw(choosing, args.limit))


if __name__ == "__main__":
    run_command(main)
