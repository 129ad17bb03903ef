"""Shared by all commands: one-line errors and warnings, exit codes, environment (layer 0)."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import ClassVar, NoReturn

from ipx2p.errors import BAD_INPUT, ERROR, InputError
from ipx2p.names import METRICS

INTERRUPTED = 130  # 128 + SIGINT, the shell's convention
BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise
# Read when torch starts, here and in child processes; docs/performance.md has the numbers.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "3000",  # waiting threads soon sleep; spinning, they stall a shared machine
    "THP_MEM_ALLOC_ENABLE": "1",  # large pages: a training step takes and returns gigabytes
}


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the layout of its help and reports errors in one line."""

    names: ClassVar[dict[str, str]] = {}  # of scripts that were called as `ipx2p COMMAND`

    def __init__(self, prog: str, epilog: str = "", **kwargs) -> None:
        name = self.names.get(prog, prog)
        super().__init__(
            prog=name,
            epilog=re.sub(f"(python )?{re.escape(prog)}", name, epilog) if name != prog else epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        # Python before 3.14 takes -1e9 for an option.
        self._negative_number_matcher = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_how(add: Callable[..., object], *, several: bool = False) -> None:
    """Arguments of the commands that edit: how. several: most of them take several values.

    None, the default, is what the weights folder says; help shows what is usual without its file.
    """

    def option(name: str, usual: object, text: str, **more: object) -> None:
        add(name, help=f"{text} (default: the model's, or {usual})".strip(), **more)

    many = {"nargs": "+"} if several else {}
    option("--sampler", "euler_ancestral", "", metavar="NAME", **many)
    option("--spacing", "linspace", "", metavar="NAME")
    option("--steps", 20, "1 to 1000", metavar="N", dest="num_steps", type=int, **many)
    stack = 'a scheme and modifiers, as "ip2p+apg:eta=0,norm=7.5+rescale"'
    option("--guidance", "ip2p", stack, metavar="STACK", **many)
    scale = {"metavar": "S", "type": float, **many}
    option("--guidance-scale", 7.0, "how strongly to follow the instruction", **scale)
    option("--image-guidance-scale", 1.5, "how closely to keep to the picture", **scale)
    knobs = 'what holds invented content down, as "start:strength=0.8+mask"'
    option("--fidelity", "none", knobs, metavar="STACK", **many)
    parts = "edit in overlapping parts of N x N pixels; 0: as a whole"
    option("--window", 0, parts, metavar="N", type=int, **many)
    add("--negative-instruction", metavar="TEXT", default="", help="what to steer away from")
    add("--weak-weights", metavar="WEIGHTS", help="a weaker model, for --guidance autoguidance")
    size = "the long side becomes N pixels (default: the model's)"
    add("--resolution", metavar="N", type=int, help=size)


def add_where(add: Callable[..., object]) -> None:
    """Arguments of the commands that edit: where and how to compute."""
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", metavar="NAME", default="auto", help="auto, float32, bfloat16, float16")
    add("--batch-size", metavar="N", type=int, default=4, help="edits at once (default: 4)")
    one = "run the branches of guidance one after another: slower, less memory"
    add("--one-branch-at-a-time", dest="batch_branches", action="store_false", help=one)
    add("--compile", action="store_true", help="compile the U-Net: pays off over many edits")


def add_report(add: Callable[..., object]) -> None:
    """Arguments of the commands that compare: what to measure, and what to show."""
    metrics = f"of {', '.join(METRICS)} (default: the usual ones that can be measured)"
    add("--metrics", metavar="NAME", nargs="+", help=metrics)
    add("--clip", metavar="MODEL", help="folder or hub id of a CLIP model, for CLIP similarities")
    add("--dino", metavar="MODEL", help="likewise of a ViT trained with DINO")
    add("--lpips", metavar="FILE", help="weights of the backbone, for LPIPS")
    add("--dists", metavar="FILE", help="likewise for DISTS")
    add("--paper-compat", action="store_true", help="as published scripts measure, bugs included")
    add_shown(add)


def add_shown(add: Callable[..., object]) -> None:
    """Arguments of all commands that report."""
    also = "also give differences from this row (always: from identity and classical)"
    add("--baseline", metavar="NAME", help=also)
    add("--grids", metavar="N", type=int, default=4, help="pictures that are shown (default: 4)")


def prepare_environment() -> None:
    """Set what torch reads when it starts; the user's own settings win."""
    own_policy = "OMP_WAIT_POLICY" in os.environ  # a spin count would override it
    for name, value in ENVIRONMENT.items():
        if not (own_policy and name == "GOMP_SPINCOUNT"):
            os.environ.setdefault(name, value)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its own code, 2 with one line for bad input.

    Errors of the operating system (names too long, missing permissions) count as bad input wherever
    they occur; bugs keep their traceback.
    """
    prepare_environment()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = main()
            sys.stdout.flush()
            sys.exit(code)
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        _drop_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        name = f"{str(error.filename)[:200]}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}: name another file or folder, or free some space")
    except MemoryError:
        _fail("out of memory: use smaller pictures, a smaller resolution or smaller batches")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    print(f"{ERROR}{_one_line(message)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    sys.exit(BAD_INPUT)


def _drop_output() -> None:
    """Discard output that cannot be written, so that the process does not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
