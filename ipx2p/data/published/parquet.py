"""Parquet exports of Hugging Face sets: pictures as encoded bytes in columns (layer 2).

A few rows are read at a time, and only the columns needed. pyarrow is an extra, imported on use.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ipx2p.data.listing import file_names, scan
from ipx2p.data.published.source import (
    SPLITS,
    Chunk,
    Example,
    Fault,
    Source,
    attempt,
    caption,
    chunk_key,
    sentence,
    stem,
    subfolders,
)
from ipx2p.errors import InputError
from ipx2p.files import digest_bytes

# The sentences of "Instruction-tuning Stable Diffusion with InstructPix2Pix", by which its rows go.
TASKS = {
    "deblur the blurry image": "deblur",
    "derain the image": "derain",
    "denoise the noisy image": "denoise",
    "enhance the low-light image": "enhance",
}
SUFFIX = ".parquet"
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(?:-\w+)?\.parquet")
_ROWS = 16  # read at once
_BUFFER = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class Columns:
    """The columns of a known set; `task` None: each row's sentence says which."""

    source: str
    instruction: str
    target: str
    task: str | None
    group: str | None = None  # None: rows with the same source are a group
    captions: tuple[str, ...] = ()  # of source and target

    @property
    def pair(self) -> list[str]:
        """The columns without which there is no pair."""
        return [self.source, self.instruction, self.target]


KNOWN = (
    Columns("original_image", "edit_prompt", "cartoonized_image", "cartoonize"),
    Columns("input_image", "instruction", "ground_truth_image", None),
    Columns("input_image", "edit_prompt", "edited_image", "edit"),
    Columns(
        *("original_image", "edit_prompt", "edited_image", "edit"),
        captions=("original_prompt", "edited_prompt"),  # InstructPix2Pix
    ),
    Columns("source_img", "instruction", "target_img", "edit", group="img_id"),  # MagicBrush
    Columns(
        *("source_image", "edit_prompt", "edited_image", "edit"),
        captions=("source_caption", "target_caption"),  # UltraEdit
    ),
)


@dataclass(frozen=True)
class RowGroup:
    """Where a chunk of rows lies."""

    path: Path
    name: str  # of the file, in the set
    number: int
    first_row: int  # in the file
    num_rows: int
    columns: Columns


class Parquet(Source):
    """*.parquet files in the folder and its subfolders, or one such file, with the columns
    original_image, edit_prompt, cartoonized_image, or input_image, instruction,
    ground_truth_image, or input_image (or original_image, source_image), edit_prompt, edited_image,
    or source_img, instruction, target_img, or those named by --columns SOURCE INSTRUCTION TARGET
    together with --task NAME; splits by file names such as train-00000-of-00002.parquet.
    """

    name = "parquet"
    options = ("columns", "task")

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        super().__init__(folder, options)
        columns, self.task = self.asked.get("columns"), self.asked.get("task")
        if columns and (len(columns) != 3 or not self.task):
            raise InputError(
                f"--columns {' '.join(columns)} --task {self.task}: expected three columns, "
                "--columns SOURCE INSTRUCTION TARGET, together with --task NAME"
            )

    def fits(self, folder: Path) -> bool:
        places = (
            [folder, *(folder / name for name in subfolders(folder))] if folder.is_dir() else []
        )
        return any(name.endswith(SUFFIX) for place in places for name in scan(place))

    def chunks(self) -> list[Chunk]:
        """A chunk is a row group."""
        chunks = []
        for path in self._paths():
            name = path.name if path == self.folder else path.relative_to(self.folder).as_posix()
            with _opened(path) as file:
                columns = self._columns(path, file.schema_arrow)
                first_row = 0
                for number in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(number).num_rows
                    group = RowGroup(path, name, number, first_row, num_rows, columns)
                    key = chunk_key([*path.relative_to(self.folder).parts, f"{number} {num_rows}"])
                    chunks.append(Chunk((group,), key))
                    first_row += num_rows
        if not any(group.num_rows for chunk in chunks for group in chunk.items):
            raise InputError(f"{self.folder} holds no rows")
        return chunks

    def read(self, chunk: Chunk) -> Iterator[Example | Fault]:
        """The rows of a row group. Where the file is damaged, the rest of it are faults."""
        [group] = chunk.items
        first, file_name, columns = group.first_row, stem(group.name), group.columns
        rows = ((row, f"{file_name}/{first + row:07d}") for row in range(group.num_rows))
        needed = [*columns.pair, *columns.captions, *filter(None, [columns.group])]
        options = {"row_groups": [group.number], "columns": needed, "use_threads": False}
        try:
            with _opened(group.path) as file:
                for batch in file.iter_batches(_ROWS, **options):
                    for place in range(batch.num_rows):
                        row, name = next(rows)
                        cells = batch.slice(place, 1)
                        yield attempt(name, partial(self._example, group, name, row, cells))
        except InputError as error:
            yield from (Fault(name, str(error)) for _, name in rows)

    def rows(
        self, split: str, kinds: Mapping[str, str]
    ) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        """The rows of all files of a split, whatever their columns are.

        Args:
            split: what the names of its files begin with.
            kinds: what columns hold that must be there: "picture" or "sentence"; or "cell", which
                may be anything, or missing.
        Yields: where it is, for errors; the columns of its file; the cells by column.
        Raises: InputError for a missing file or column, or a cell of another kind.
        """
        paths = [path for path in self._paths() if re.split(r"[-_.]", path.name)[0] == split]
        if not paths:
            raise InputError(f"{self.folder} holds no {split}-*{SUFFIX}, expected {self.layout}")
        for path in paths:
            with _opened(path) as file:
                columns = file.schema_arrow.names
                for column, kind in kinds.items():
                    if kind != "cell" and column not in columns:
                        raise InputError(
                            f"{path} has no column {column!r} among {', '.join(columns)}: expected "
                            f"{self.layout}"
                        )
                there = [column for column in kinds if column in columns]
                number = 0
                for batch in file.iter_batches(_ROWS, columns=there, use_threads=False):
                    for cells in batch.to_pylist():
                        where = f"{path} row {number}"
                        yield where, columns, _checked(cells, kinds, where)
                        number += 1

    def _paths(self) -> list[Path]:
        if self.folder.is_file():
            return [self.folder]
        names = file_names(self.folder, {SUFFIX}) if self.folder.is_dir() else []
        if not names:
            self.check_root()
        shards: dict[tuple[str, int], dict[int, str]] = {}
        for name in names:
            if match := _SHARD.fullmatch(name):
                known = shards.setdefault((match[1], int(match[3])), {})
                if name != (other := known.setdefault(int(match[2]), name)):
                    raise InputError(f"{self.folder / name} and {other} are one shard: remove one")
        for (prefix, total), known in shards.items():
            if missing := [i for i in range(total) if i not in known]:
                shard = f"{self.folder / prefix}-{missing[0]:05d}-of-{total:05d}*{SUFFIX}"
                raise InputError(
                    f"{shard} is missing (and so {len(missing)} of {total}): fetch it, or name one "
                    "file instead of the folder"
                )
        return [self.folder / name for name in names]

    def _columns(self, path: Path, schema: Any) -> Columns:
        found = schema.names
        asked = self.asked.get("columns")
        known = [Columns(*asked, self.task)] if asked else KNOWN
        fitting = [columns for columns in known if {*columns.pair} <= {*found}]
        if len(fitting) != 1:
            expected = " or ".join(", ".join(columns.pair) for columns in known)
            raise InputError(
                f"{path} has the columns {', '.join(found)}: expected {expected}"
                + ("" if asked else ", or --columns SOURCE INSTRUCTION TARGET --task NAME")
            )
        [columns] = fitting
        for column, kind in zip(columns.pair, ("picture", "sentence", "picture"), strict=True):
            if not _is_of(kind, schema.field(column).type):
                stored = {"picture": "struct<bytes, path> or binary", "sentence": "string"}[kind]
                raise InputError(
                    f"{path}: column {column!r} is {schema.field(column).type}, expected {stored}"
                )
        extras = tuple(column for column in columns.captions if column in found)
        return replace(
            columns,
            task=self.task or columns.task,
            group=columns.group if columns.group in found else None,
            captions=extras if len(extras) == 2 else (),
        )

    def _example(self, group: RowGroup, name: str, row: int, batch: Any) -> Example:
        columns, where = group.columns, f"{group.path} row group {group.number}, row {row}"
        try:
            [cells] = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} holds text that is not UTF-8: {error}") from error
        source, target = (
            _picture(cells[column], f"{where}: {column!r}")
            for column in (columns.source, columns.target)
        )
        said = sentence(cells[columns.instruction], f"{where}: {columns.instruction!r}")
        task = columns.task or TASKS.get(said.strip().lower().rstrip("."))
        if not task:
            raise InputError(f"{where}: no task is known for {said!r}: name it with --task NAME")
        together = cells[columns.group] if columns.group else None
        if together is None:
            together = digest_bytes(source, 8)
        captions = [cells[column] for column in columns.captions] or [None, None]
        return Example(
            *(name, source, target, (said,), task, _split(group.name), str(together)),
            *(caption(text, f"{where}: caption") for text in captions),
            origin=where,
        )


def _checked(cells: dict[str, Any], kinds: Mapping[str, str], where: str) -> dict[str, Any]:
    """The cells of a row, pictures as bytes; a missing column is None."""
    check = {"picture": _picture, "sentence": sentence, "cell": lambda cell, _: cell}
    return {
        column: check[kind](cells.get(column), f"{where}: {column!r}")
        for column, kind in kinds.items()
    }


def _split(name: str) -> str | None:
    """The split that a file's name begins with, or else that one of its folders is called."""
    *folders, file = name.split("/")
    words = [re.split(r"[-_.]", file)[0], *(f.removeprefix("partial-") for f in folders[::-1])]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _picture(cell: Any, where: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data:
        return data
    if isinstance(cell, dict) and cell.get("path"):
        raise InputError(f"{where} holds a path only, expected bytes: export it with its pictures")
    raise InputError(f"{where} is {'null' if data is None else 'empty'}, expected a picture")


def _is_of(kind: str, dtype: Any) -> bool:
    types = _pyarrow().types
    if types.is_dictionary(dtype):
        dtype = dtype.value_type
    if kind == "sentence":
        return types.is_string(dtype) or types.is_large_string(dtype)
    if types.is_struct(dtype):
        index = dtype.get_field_index("bytes")
        return index >= 0 and _is_of(kind, dtype.field(index).type)
    return types.is_binary(dtype) or types.is_large_binary(dtype)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file; what goes wrong while it is read becomes an InputError that names it."""
    pyarrow = _pyarrow()
    try:
        # So a row group is read page by page; by default it would be read whole, ahead of time.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not parquet, or damaged ({reason}): fetch it again") from error


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("reading parquet needs pyarrow: pip install 'ipx2p[parquet]'") from error
    return pyarrow
