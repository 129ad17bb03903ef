"""All published sets that can be read (layer 2)."""

from pathlib import Path
from typing import Any

from ipx2p.data.published.edit_sets import InstructPix2Pix, MagicBrush
from ipx2p.data.published.folders import SETS
from ipx2p.data.published.parquet import Parquet
from ipx2p.data.published.source import Options, Source
from ipx2p.errors import InputError, suggestion

SOURCES: dict[str, type[Source]] = {
    kind.name: kind for kind in (*SETS, InstructPix2Pix, MagicBrush, Parquet)
}


def open_source(kind: str, folder: str | Path, **options: Any) -> Source:
    """The reader of a published set.

    Args:
        kind: a key of `SOURCES`.
        folder: the root of the set; for `parquet` also one file.
        options: see `Options`; each kind takes only its own `options`.
    Raises: InputError for an unknown kind, or an option that it does not take or lacks.
    """
    if kind not in SOURCES:
        raise InputError(f"no data set {kind!r}; {suggestion(kind, [*SOURCES])}")
    return SOURCES[kind](Path(folder), Options(**options))
