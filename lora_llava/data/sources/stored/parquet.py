"""Read Parquet files into the cache of `datasets`, with the locations of images instead of their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

from lora_llava.data.sources.stored.cells import LOCATION, is_location, to_row
from lora_llava.data.sources.stored.pages import CODECS, ENCODINGS, Cell, Column, locate_cells
from lora_llava.errors import DataError
from lora_llava.system.text import printable

_MAX_ROWS, _BATCH_BYTES = 32, 2**25
"""Rows of a batch, and their bytes on average: fewer rows if they hold large values."""
_BUFFER_BYTES = 2**20


class LocatingParquet(Parquet):  # type: ignore[misc]  # datasets has no types
    """Stores where images are, with their hashes, unless a codec or an encoding does not allow it.

    Small batches are read: the library's builder decodes a whole row group at once, in many files all rows.
    """

    root: Path
    """Directory that locations are relative to; a file elsewhere is copied whole."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        splits: list[Any] = super()._split_generators(dl_manager)
        files = [Path(file) for split in splits for file in split.gen_kwargs["files"]]
        features = self.info.features
        for name in _located(files, self.root, list(features)):
            is_list = isinstance(features[name], list | datasets.List | datasets.LargeList)
            location = {key: datasets.Value(kind) for key, kind in LOCATION.items()}
            features[name] = datasets.List(location) if is_list else location
        return splits

    def _generate_tables(
        self, files: Sequence[str], row_groups_list: Sequence[Sequence[int] | None]
    ) -> Iterator[tuple[Key, pa.Table]]:
        """Yield the rows of the files in small tables, in their order."""
        names = [name for name, feature in self.info.features.items() if is_location(feature)]
        for number, (file, row_groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
                groups = range(parquet.num_row_groups) if row_groups is None else row_groups
                tables = (table for group in groups for table in self._of_group(Path(file), parquet, group, names))
                for index, table in enumerate(tables):
                    yield Key(number, index), self._cast_table(table)
        # A page of values that are copied may have been half a gigabyte, which the pool would keep.
        pa.default_memory_pool().release_unused()

    def _of_group(self, path: Path, parquet: Any, group: int, names: list[str]) -> Iterator[pa.Table]:
        """Yield the rows of a row group in small tables; columns of `names` have locations."""
        columns = {name: column for name in names if (column := _column(parquet, name)) is not None}
        located = {column.leaf for column in columns.values()}
        rest = [leaf for index, leaf in enumerate(_leaves(parquet)) if index not in located and self._has(leaf)]
        metadata, file = parquet.metadata.row_group(group), _relative(path, self.root)
        cells = {name: locate_cells(path, metadata, column) for name, column in columns.items()}
        rows = _rows_of_a_batch(metadata, located)
        for batch in parquet.iter_batches(rows, row_groups=[group], columns=rest, use_threads=False):
            table = pa.Table.from_batches([batch])
            for name, of_column in cells.items():
                at = list(islice(of_column, batch.num_rows))
                if len(at) != batch.num_rows:
                    raise ValueError(f"column {name!r} has fewer values than rows")
                # Only the paths next to the bytes were read.
                others = table.column(name).to_pylist() if name in table.column_names else [None] * len(at)
                values = [_to_row(cell, other, str(file)) for cell, other in zip(at, others, strict=True)]
                kind = self.info.features.arrow_schema.field(name).type
                table = table.drop_columns([name] if name in table.column_names else [])
                table = table.append_column(name, pa.array(values, kind))
            yield table

    def _has(self, leaf: str) -> bool:
        """Tell whether a leaf column is read."""
        columns: list[str] | None = self.config.columns
        return columns is None or any(leaf == name or leaf.startswith(f"{name}.") for name in columns)


def problem_of(path: Path) -> DataError | None:
    """Return what makes a Parquet file unusable, by its columns and its number of rows; None if it is another thing."""
    try:
        metadata = pq.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
    except Exception:  # noqa: BLE001 - who reads the data has the message
        return None
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        return DataError(f"{path.name}: column {printable(duplicate)!r} occurs twice; rename one")
    return None if metadata.num_rows else DataError(f"{path.name}: holds no records; correct path")


def _to_row(cell: Cell, other: Any, file: str) -> Any:
    """Return a cell of the cache; `other` has the other fields of the cell in the file."""
    if isinstance(cell, list):
        others = other if isinstance(other, list) else [None] * len(cell)
        return [_to_row(stored, own, file) for stored, own in zip(cell, others, strict=True)]
    return to_row(cell, file, other.get("path") if isinstance(other, dict) else None)


def _located(files: Sequence[Path], root: Path, names: list[str]) -> list[str]:
    """Return the columns of bytes that can be located in all files."""
    for file in files:
        if not names or _relative(file, root) is None:
            return []
        with pq.ParquetFile(file) as parquet:
            names = [name for name in names if _can_be_located(parquet, name)]
    return names


def _can_be_located(parquet: Any, name: str) -> bool:
    column = _column(parquet, name)
    if column is None:
        return False
    groups = (parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups))
    chunks = (group.column(column.leaf) for group in groups)
    return all(chunk.compression in CODECS and ENCODINGS.issuperset(chunk.encodings) for chunk in chunks)


def _column(parquet: Any, name: str) -> Column | None:
    """Return the leaf column with the bytes of a column: of binary values, of images, or of lists of either."""
    if name not in parquet.schema_arrow.names or "." in name:
        return None
    field = parquet.schema_arrow.field(name)
    is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
    value = field.type.value_type if is_list else field.type
    is_image = pa.types.is_struct(value)
    if is_image:
        if {part.name for part in value} - {"path"} != {"bytes"}:
            return None
        value = value.field("bytes").type
    if not (pa.types.is_binary(value) or pa.types.is_large_binary(value)):
        return None
    for index, leaf in enumerate(_leaves(parquet)):
        parts = leaf.split(".")
        if parts[0] == name and (not is_image or parts[-1] == "bytes"):
            column = parquet.schema.column(index)
            levels = column.max_repetition_level, column.max_definition_level
            return Column(index, *levels, field.nullable) if levels[0] == is_list else None
    return None


def _leaves(parquet: Any) -> list[str]:
    return [parquet.schema.column(index).path for index in range(parquet.metadata.num_columns)]


def _relative(file: Path, root: Path) -> str | None:
    """Return the path of a file below `root`; None if it is elsewhere."""
    normal = Path(os.path.normpath(file))
    bases = (base for base in (root.absolute(), root.resolve()) if normal.is_relative_to(base))
    return next((normal.relative_to(base).as_posix() for base in bases), None)


def _rows_of_a_batch(group: Any, located: Set[int]) -> int:
    """Return how many rows of a row group fit into a batch, by the mean size of what is read of them."""
    rest = (index for index in range(group.num_columns) if index not in located)
    size = sum(group.column(index).total_uncompressed_size for index in rest) // max(1, group.num_rows)
    return max(1, min(_MAX_ROWS, _BATCH_BYTES // max(1, int(size))))
