"""All published benchmarks (layer 4)."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ipx2p.errors import InputError
from ipx2p.eval.benchmarks.edit_sets import EDIT_SETS
from ipx2p.eval.benchmarks.judged import JUDGED
from ipx2p.eval.benchmarks.restoration import RESTORATION
from ipx2p.eval.cases import Case

PROTOCOLS = {protocol.name: protocol for protocol in (*EDIT_SETS, *RESTORATION, *JUDGED)}


def read_benchmark(name: str, folder: Path, extracted: Path) -> list[Case]:
    """The cases of a published benchmark.

    Args:
        name: a key of `PROTOCOLS`. folder: the root of the unpacked download.
        extracted: where pictures that lie in tables are written, each once.
    Raises: InputError for a part that is missing or damaged.
    """
    protocol = PROTOCOLS[name]
    cases = protocol.read(folder, extracted)
    if twice := [case for case, count in Counter(c.name for c in cases).items() if count > 1]:
        raise InputError(f"{folder} lists {twice[0]} more than once: unpack {name} again, alone")
    if protocol.pictures and len(cases) != protocol.pictures:
        warnings.warn(
            f"{folder} has {len(cases)} pairs, the published rows are means over "
            f"{protocol.pictures}",
            stacklevel=2,
        )
    return [replace(case, benchmark=name) for case in cases]
