"""All published sets that can be read (layer 2)."""

from pathlib import Path
from typing import Any

from ipx2p.data.published.edit_sets import InstructPix2Pix, MagicBrush
from ipx2p.data.published.folders import SETS
from ipx2p.data.published.parquet import Parquet
from ipx2p.data.published.source import Source
from ipx2p.errors import InputError, suggestion

SOURCES: dict[str, type[Source]] = {
    kind.name: kind for kind in (*SETS, InstructPix2Pix, MagicBrush, Parquet)
}


def open_source(kind: str, folder: str | Path, **options: Any) -> Source:
    """The reader of a published set: a key of `SOURCES`, its root, and options of `Source`.

    Raises: InputError for an unknown kind, or an option that it does not take or lacks.
    """
    if kind not in SOURCES:
        raise InputError(f"no data set {kind!r}; {suggestion(kind, [*SOURCES])}")
    return SOURCES[kind](Path(folder), options)
