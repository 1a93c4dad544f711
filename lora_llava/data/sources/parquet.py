"""Convert Parquet files for the cache of `datasets` with only one page per column in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

_MAX_ROWS, _BATCH_BYTES = 32, 2**25
"""Rows of a batch, and their bytes on average: fewer rows if they hold large images."""
_BUFFER_BYTES = 2**20


class PagedParquet(Parquet):  # type: ignore[misc]  # datasets has no types
    """Reads small batches; the library's builder decodes a whole row group at once, in many files all rows."""

    def _generate_tables(
        self, files: Sequence[str], row_groups_list: Sequence[Sequence[int] | None]
    ) -> Iterator[tuple[Key, pa.Table]]:
        """Yield the rows of the files in small tables, in their order."""
        for number, (file, row_groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
                groups: Any = None if row_groups is None else list(row_groups)
                rows = _rows_of_a_batch(parquet.metadata)
                batches = parquet.iter_batches(rows, row_groups=groups, columns=self.config.columns, use_threads=False)
                for index, batch in enumerate(batches):
                    yield Key(number, index), self._cast_table(pa.Table.from_batches([batch]))
        # A page of images may have been half a gigabyte, which the pool would keep.
        pa.default_memory_pool().release_unused()


def _rows_of_a_batch(metadata: Any) -> int:
    """Return how many rows of a file fit into a batch, by their mean size."""
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(index).total_byte_size for index in groups) // max(1, metadata.num_rows)
    return max(1, min(_MAX_ROWS, _BATCH_BYTES // max(1, int(size))))
