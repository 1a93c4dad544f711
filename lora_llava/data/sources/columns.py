"""Load tables as records by column names: CSV, JSON, Parquet, directories and Hugging Face datasets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_llava.data.bad_records import BadRecords
from lora_llava.data.images.root import ImageRoot
from lora_llava.data.record import (
    Record,
    check_group,
    check_placeholder,
    own_values,
    with_answer_prompt,
)
from lora_llava.data.sources.cells import ImageCells, place_image
from lora_llava.data.sources.dataset_directory import check_directory, check_files
from lora_llava.data.sources.files.shards import damaged_shard
from lora_llava.data.sources.files.sheets import read_sheet
from lora_llava.data.sources.forms import class_question, describe_record, known_form, propose_columns
from lora_llava.data.sources.mapping import RowReader, column_of, make_reader
from lora_llava.data.sources.missing import refuse_missing, unreadable
from lora_llava.data.sources.saved import is_saved, no_split, open_saved, saved_splits
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.stored.arrow import image_cells
from lora_llava.data.sources.stored.cells import CACHE, from_row, is_location, location_root
from lora_llava.data.sources.tables import JSON_SUFFIXES, TABLE_SUFFIXES, read_entries, read_records, read_rows
from lora_llava.errors import DataError
from lora_llava.recipe.columns import ColumnSettings, fields_in, is_template
from lora_llava.recipe.fields import data_name
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.hub.network import bounded
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.text import listed, printable, python_literal

_FILES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
_MAX_PEEKED = 200
"""Maximum number of rows that are looked at to recognize data."""


def load_columns(data: DataSettings, image_root: Path | None, bad: BadRecords, *, extra: bool = False) -> list[Record]:
    """Load one record per row of a table; embedded images stay encoded.

    Without `columns`, they are those of the form that the names of the columns identify. `extra`: also keep unused
    columns with flat values.

    Image paths are relative to `image_root`, by default the directory of the data. Raises DataError naming dataset,
    record and column, unless `bad` collects it.
    """
    refuse_missing(data)
    path = Path(data.path)
    data, columns, rows, cache = _open(data, extra)
    directory = path if path.is_dir() else path.parent
    root = image_root or (directory if path.exists() else cache)
    field = "image" if columns.image is None or is_template(columns.image) else columns.image
    images = ImageCells(ImageRoot(root, field, data, at_once=bad.collects))
    location = data_name(data.path) if path.suffix in _FILES else f"{data_name(data.path)} ({data.split})"
    read_row = _row_reader(data, columns, images)
    texts = (columns.image, columns.question, columns.answer, columns.messages)
    used = {text for text in texts if isinstance(text, str) and text != data.group} if extra else None

    def read(row: Entry, number: int) -> Record:
        spot = f" ({row.spot})" if row.spot else ""
        record = read_row(row.value, number, f"{location}, record {number}{spot}")
        return record if used is None else replace(record, extra=own_values(row.value, used))

    records = read_records(rows, read, data, bad)
    images.root.check()
    images.digests.remember()
    return records


def _row_reader(data: DataSettings, columns: ColumnSettings, images: ImageCells) -> Callable[[Any, int, str], Record]:
    """Return the function that makes a record of a row, given its number and where it is."""
    reader, group_of = RowReader(columns), make_reader(data.group, "group")
    group_name = "group" if data.group is None or is_template(data.group) else data.group

    def read(row: Any, number: int, where: str) -> Record:
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object with the keys that columns names")
        content = reader.read(row, where)
        image = images.source(content.image, where)
        turns = content.turns if image is None else place_image(content.turns)
        check_placeholder(turns, image, where)
        prompted = with_answer_prompt(turns, data.answer_prompt)
        group = None if data.group is None else check_group(group_of(row, where), f"{where}: {group_name}")
        return Record(
            str(number),
            image,
            prompted,
            where,
            number,
            group,
            content.references,
            content.system,
            rejected=content.rejected,
        )

    return read


def _named(data: DataSettings, columns: ColumnSettings) -> list[str]:
    """Return the columns, and dotted paths into columns, that the settings name."""
    choices = [columns.choices] if isinstance(columns.choices, str) else columns.choices or []
    each = [data.each] if isinstance(data.each, str) else data.each or []
    answers = (columns.answer, columns.chosen, columns.rejected)
    texts = (columns.image, columns.question, *answers, columns.system, columns.messages, data.group)
    named = [path for text in texts for path in fields_in(text)]
    others = (columns.references, columns.type, *choices, *each, *(data.where or ()))
    return list(dict.fromkeys([*named, *(path for path in others if path is not None)]))


def _flat_columns(table: Any) -> list[str]:
    """Return the columns with one flat value per row."""
    return [name for name, feature in table.features.items() if type(feature).__name__ in ("Value", "ClassLabel")]


class _Opened(NamedTuple):
    """Opened data, and how they are read."""

    data: DataSettings
    columns: ColumnSettings
    rows: Iterable[Entry]
    cache: Path
    """Directory of cached files."""


def _open(data: DataSettings, extra: bool) -> _Opened:
    """Open the data with the columns that it names; `extra`: also with those of flat values."""
    path = Path(data.path)
    if path.suffix in _FILES and not path.is_dir():
        entries = file_entries(path, data)
        first = next((entry for entry in entries if isinstance(entry.value, dict)), None) if not data.columns else None
        data, columns = _with_form(data, [] if first is None else list(first.value), {})
        return _Opened(data, columns, _file_rows(path, data, columns), path.parent)
    table, cache = _open_table(path, data)
    data, columns = _with_form(data, table.column_names, _class_questions(table))
    present = list(table.column_names)
    named = _named(data, columns)
    # The keys of a list's elements are seen only when they are read.
    outer = [path for path in named if data.each is None or column_of(path, present) is not None]
    _check_columns(outer, present, data.path, data)
    if data.max_records is not None and data.where is None and data.each is None:
        table = table.select(range(min(data.max_records, len(table))))
    taken = [str(column_of(path, present)) for path in outer]
    table = table.select_columns(list(dict.fromkeys([*taken, *(_flat_columns(table) if extra else [])])))
    image = None if columns.image is None or is_template(columns.image) else column_of(columns.image, present)
    root = location_root(path)
    if image is None or is_location(table.features[image]):
        rows = _rows(table, root)
    else:
        rows = _with_images(_with_images_undecoded(table, image, data.path), image, root)
    return _Opened(data, columns, rows, cache)


def _class_questions(table: Any) -> dict[str, str]:
    """Return the question about each column of classes, such as `label` of a folder for each class of images."""
    classes = {name: feature.names for name, feature in table.features.items() if _is_class(feature)}
    questions = {name: class_question(names, len(table)) for name, names in classes.items()}
    return {name: question for name, question in questions.items() if question}


def _is_class(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _with_form(
    data: DataSettings, names: list[str], question_of: Mapping[str, str]
) -> tuple[DataSettings, ColumnSettings]:
    """Return the settings with columns; without own ones, those of a known form. Raises DataError for any other."""
    if data.columns is not None:
        return data, data.columns
    form = known_form(names)
    if form is None:
        raise DataError(f"{data_name(data.path)}: columns: is missing; {describe_record(names, question_of)}", "form")
    each = data.each if form.each is None else form.each
    return data.model_copy(update={"columns": form.columns, "each": each}), form.columns


def _rows(table: Any, root: Path) -> Iterator[Entry]:
    """Yield rows with the names of class labels instead of their numbers, and images that stay below `root`."""
    located = [name for name, feature in table.features.items() if is_location(feature)]
    labels = {name: feature.names for name, feature in table.features.items() if _is_class(feature)}
    for row in table:
        for name, names in labels.items():
            label = row[name]
            # -1 stands for a row without a label.
            row[name] = names[label] if label is not None and label >= 0 else None
        for name in located:
            row[name] = from_row(row[name], root)
        yield Entry(row, None)


def _with_images(table: Any, column: str, root: Path) -> Iterator[Entry]:
    """Yield rows whose images stay on disk."""
    rest = table.remove_columns(column)
    rows = _rows(rest, root) if rest.column_names else (Entry({}, None) for _ in range(len(table)))
    for row, cell in zip(rows, image_cells(table, column), strict=True):
        row.value[column] = cell
        yield row


def _open_table(path: Path, data: DataSettings) -> tuple[Any, Path]:
    """Open a Parquet file, a directory or a dataset of the Hub."""
    if path.is_file() and path.suffix != ".parquet":
        names = [python_literal(name) for name in (path.name, f"{path.stem}.csv")]
        line = f"import pandas; pandas.read_{_reader(path)}({names[0]}).to_csv({names[1]}, index=False)"
        raise DataError(
            f"{path.name}: a {path.suffix or 'nameless'} file is not read. Save it as CSV (UTF-8), for instance: "
            f"python -c {shlex.quote(line)}"
        )
    if path.is_dir() and is_saved(path):
        return open_saved(path, data.split), path
    if path.is_dir():
        check_directory(path)
    elif path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file; give a file or a directory")
    # Imported here: slow, and not needed for JSON and CSV.
    import datasets

    try:
        with nullcontext() if path.exists() else bounded():
            table = _prepared(_builder(path, data), data)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers and network raise anything
        from lora_llava.data.sources.stored.parquet import problem_of

        damage = damaged_shard(path) if path.is_dir() else problem_of(path)
        raise damage or unreadable(data.path, error) from None
    return table, Path(datasets.config.HF_CACHE_HOME)


def _builder(path: Path, data: DataSettings) -> Any:
    """Return what reads a Parquet file, a directory or a dataset of the Hub. Raises anything."""
    import datasets

    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / CACHE)
    if path.is_file():
        files = {data.split.partition("[")[0]: str(path)}
        return datasets.load_dataset_builder("parquet", data_files=files, cache_dir=cache)
    revision = None if path.is_dir() else data.revision
    builder = datasets.load_dataset_builder(data.path, data.name, revision=revision, cache_dir=cache)
    if path.is_dir():
        check_files(builder.config.data_files, path)
    return builder


def splits_of(directory: Path) -> list[str]:
    """Return the splits of a local directory of data; none if it is saved without, or cannot be read."""
    if is_saved(directory):
        return saved_splits(directory)
    try:
        return [str(name) for name in _builder(directory, DataSettings(path=str(directory))).config.data_files or {}]
    except Exception:  # noqa: BLE001 - who reads the data has the message
        return []


def _prepared(builder: Any, data: DataSettings) -> Any:
    """Convert a dataset into the cache, as `datasets.load_dataset` does, and open it.

    The images of Parquet files stay in them.
    """
    # Of a directory or a dataset of the Hub, the builder is of a subclass that the library made.
    if any(kind.__name__ == "Parquet" for kind in type(builder).__mro__):
        from lora_llava.data.sources.stored.parquet import LocatingParquet

        # The same builder; only the way to read files differs.
        builder.__class__ = LocatingParquet
        builder.root = location_root(Path(data.path))
    builder.download_and_prepare()
    if (split := re.split(r"[\[+]", data.split)[0]) not in (splits := builder.info.splits or {split: None}):
        raise no_split(data_name(data.path), split, splits)
    table = builder.as_dataset(split=data.split)
    # A cache that was cut or damaged ends early, and `datasets` takes what is left without an error.
    known = (builder.info.splits or {}).get(data.split)
    if known is not None and len(table) != known.num_examples:
        raise DataError(
            f"{data_name(data.path)}: its cache is damaged: {len(table):,} of {known.num_examples:,} rows; remove "
            f"{builder.cache_dir}, to have it written again"
        )
    return table


def _reader(path: Path) -> str:
    """Return the suffix of the pandas reader for a file, by its extension."""
    readers = {".xls": "excel", ".ods": "excel", ".feather": "feather", ".orc": "orc"}
    return readers.get(path.suffix.lower(), "table")


def _with_images_undecoded(table: Any, column: str, name: str) -> Any:
    """Cast a column to undecoded images, or lists of them."""
    import datasets

    feature = table.features[column]
    in_list = isinstance(feature, list | datasets.List | datasets.LargeList)
    image = datasets.Image(decode=False)
    try:
        return table.cast_column(column, datasets.List(image) if in_list else image)
    except Exception:  # noqa: BLE001 - arrow raises several kinds
        raise DataError(f"{name}: column {column!r} holds no images; correct columns.image") from None


def _file_rows(path: Path, data: DataSettings, columns: ColumnSettings) -> Iterator[Entry]:
    """Yield the rows of a file; DataError if it lacks a named column."""
    is_table = path.suffix in TABLE_SUFFIXES
    image_fields = list(fields_in(columns.image))
    needed = [name for name in _named(data, columns) if is_table or name not in image_fields]
    is_first, has_image = True, columns.image is None
    for entry in file_entries(path, data):
        if isinstance(entry.value, dict):
            if is_first:
                present = list(entry.value)
                known = [name for name in needed if data.each is None or column_of(name, present) is not None]
                _check_columns(known, present, path.name, data)
                is_first = False
            has_image = has_image or data.each is not None or _has(entry.value, image_fields)
        yield entry
    if not is_first and not has_image:
        raise DataError(
            f"{path.name}: columns: no record has {columns.image!r}; correct columns.image, or leave it out"
        )


def file_entries(path: Path, data: DataSettings) -> Iterator[Entry]:
    """Yield the entries of a file in any of its forms."""
    if path.suffix == ".xlsx":
        return read_sheet(path, data.name)
    if path.suffix in TABLE_SUFFIXES:
        return read_rows(path, data.encoding)
    return read_entries(path, data.records, data.encoding)


def _has(row: dict[str, Any], fields: list[str]) -> bool:
    """Tell whether a row has all the columns that the paths lead into."""
    return all(name in row or name.partition(".")[0] in row for name in fields)


def _check_columns(needed: list[str], present: list[str], name: str, data: DataSettings) -> None:
    """Raise DataError for the first missing column, with the setting that names it: `group`, `where` or `columns`."""
    for column in needed:
        if column_of(column, present) is not None:
            continue
        key = "group" if column == data.group else "where" if column in (data.where or ()) else "columns"
        hint = f"; correct {key}"
        if near := similar(column, map(str, present)):
            hint = f". {did_you_mean(near)}"
        elif key == "columns" and (proposed := propose_columns(present)):
            hint = f". To have it read: {proposed}"
        shown = listed([printable(str(label)) for label in present], 20)
        raise DataError(f"{name}: {key}: there is no {printable(column)!r}; it has {shown}{hint}")


class Peeked(NamedTuple):
    """The columns of data, and their first rows."""

    names: list[str]
    rows: list[dict[str, Any]]
    """Flat values alone, if the data are no file of text."""
    splits: list[str]
    error: DataError | None = None
    """Why the first entry of a file of text cannot be read; None if it can."""


def peek(data: DataSettings) -> Peeked:
    """Return what data of any form begin with; `data.columns` is not needed. Raises DataError."""
    refuse_missing(data)
    path = Path(data.path)
    if path.suffix in _FILES and not path.is_dir():
        entries = list(islice(file_entries(path, data), _MAX_PEEKED))
        rows = [entry.value for entry in entries if isinstance(entry.value, dict)]
        error = entries[0].error if entries else None
        return Peeked(list(dict.fromkeys(name for row in rows for name in row)), rows, [], error)
    table, _ = _open_table(path, data)
    flat = table.select_columns(_flat_columns(table)).select(range(min(_MAX_PEEKED, len(table))))
    rows = [entry.value for entry in _rows(flat, location_root(path))]
    return Peeked(list(table.column_names), rows, list(table.info.splits or {}))
