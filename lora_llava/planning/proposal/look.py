"""Look at a file, a directory or a data set of the Hub, and propose the settings that read it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_llava.data.bad_records import BadRecords
from lora_llava.data.images.directory import list_images
from lora_llava.data.load import read_source
from lora_llava.data.record import Record
from lora_llava.data.sources.columns import Peeked, peek, splits_of
from lora_llava.data.sources.forms import (
    CONVERSATIONS,
    QUESTION,
    class_question,
    describe_record,
    known_form,
    propose_columns,
)
from lora_llava.data.sources.missing import refuse_missing
from lora_llava.errors import DataError
from lora_llava.planning.proposal.conversions import Conversion, conversion_of, is_readable_dicom
from lora_llava.planning.proposal.images import find_images
from lora_llava.planning.proposal.values import columns_option, image_columns
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.text import counted, listed, printable

Columns = Mapping[str, Any]
"""Settings of `columns`."""
_FILES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".parquet")
_TEXTS = (".txt", ".tab", ".dat")
"""Other suffixes of tables, such as that of Excel's "Unicode Text"."""
_CARDS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "report.json")
"""Files that describe data next to them."""
_GROUPS = (
    "patient patienten subject person participant case study exam visit specimen slide animal device gerat geraet "
    "machine maschine serial batch lot site"
).split()
"""Columns by which records belong together, most telling first; each also with `id`, `nr`, `number` or the like."""
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
}
READ_FORMS = (
    "LLaVA JSON, messages with images, a table (CSV, TSV, XLSX, JSON, JSONL or parquet) with columns for image, "
    "question and answer, a folder for each class of images, tar shards, a saved data set, or the id of a data set on "
    "the Hub"
)


class _Given(NamedTuple):
    """What the user says of the data."""

    columns: Columns | None
    encoding: str | None

    def data(self, path: str | Path) -> dict[str, Any]:
        """Return the settings of data at a path."""
        return {"path": str(path)} | ({} if self.encoding is None else {"encoding": self.encoding})


@dataclass
class Look:
    """What data are, and how they are read."""

    form: str
    data: dict[str, Any]
    """Settings of `data`; paths are absolute."""
    test: dict[str, Any] | None = None
    """Settings of test data, if the data come with them."""
    records: list[Record] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    """Problems of records that cannot be read."""
    notes: list[str] = field(default_factory=list)
    name: str = "data"
    """Name of the recipe."""


def look_at(name: str, columns: Columns | None = None, encoding: str | None = None) -> Look:
    """Propose the settings for the data `name` and read the records.

    `columns` and `encoding` are used as given; without them, they are inferred. An answer without a question gets a
    constant one.
    Raises DataError with what was seen, and what would work, if the form is not known or must be converted first.
    """
    # Unlike that of Path, this leaves the name of an unknown user.
    name = os.path.expanduser(name)  # noqa: PTH111
    refuse_missing(DataSettings(path=name))
    path = Path(name)
    asks_its_own = columns is not None and "question" in columns
    if columns and "answer" in columns and not {"question", "messages"} & columns.keys():
        columns = {**columns, "question": {"text": QUESTION}}
    given = _Given(columns, encoding)
    if path.exists():
        path = path.resolve()
        if columns is None and (conversion := conversion_of(path)) is not None:
            raise DataError(conversion.advice(), "form")
        look = _directory(path, given) if path.is_dir() else _file(path, path.parent, given)
    else:
        look = _table(name, f"data set {name} of the Hub", name, given)
    bad = BadRecords(DataSettings(**look.data), None)
    look.records = read_source(DataSettings(**look.data), bad)
    look.unusable = [record.problem for record in bad.records]
    if not look.records:
        first = f": the first is {look.unusable[0]}" if look.unusable else ""
        raise DataError(f"{name}: {look.form}, but none of its records can be read{first}")
    look.name = Path(name).stem
    if not asks_its_own:
        _name_classes(look)
    return look


def _name_classes(look: Look) -> None:
    """Let a question that is the same for all records name the answers, if they are classes."""
    columns = look.data.get("columns", {})
    classes = sorted({record.turns[-1].text for record in look.records})
    if isinstance(columns.get("question"), dict) and (question := class_question(classes, len(look.records))):
        columns["question"] = {"text": question}


def _directory(directory: Path, given: _Given) -> Look:
    """Look at a directory: a saved data set, data files, tar shards, or folders of images."""
    files = [path for path in sorted(directory.iterdir()) if path.suffix in _FILES and path.name not in _CARDS]
    if any((directory / card).is_file() for card in ("dataset_dict.json", "state.json")):
        return _table(directory.name, "a saved data set", directory, given)
    if files and all(path.suffix == ".parquet" for path in files):
        return _table(directory.name, "a directory of parquet files", directory, given)
    if files:
        return _files(files, directory, given)
    if shards := sorted(directory.glob("*.tar")):
        return _shards(directory, len(shards), given)
    return _images(directory, given)


def _files(files: list[Path], directory: Path, given: _Given) -> Look:
    """Take the only file of a directory, or those that are named like splits."""
    splits = {split: path for split, words in _SPLITS.items() for path in files if _is_named(path, words)}
    main = files[0] if len(files) == 1 else splits.get("train")
    if main is None:
        names = [printable(path.name) for path in files]
        raise DataError(f"{directory}: holds {len(files)} data files: {listed(names)}; name one of them", "form")
    look = _file(main, directory, given)
    if len(files) > 1:
        look.notes.append("Files of the directory: " + listed([printable(path.name) for path in files]))
    for split, path in splits.items():
        if path != main and path.suffix == main.suffix:
            if split == "test":
                look.test = look.data | {"path": str(path)}
            elif split == "validation":
                look.data["validation"] = {"path": str(path)}
    return look


def _is_named(path: Path, words: Sequence[str]) -> bool:
    return any(word in re.split(r"[^a-z]+", path.stem.lower()) for word in words)


def _file(path: Path, directory: Path, given: _Given) -> Look:
    """Look at a data file; its images are searched for in `directory`."""
    if path.suffix not in _FILES and path.suffix.lower() in _FILES:
        raise DataError(
            f"{path.name}: rename it to {path.stem}{path.suffix.lower()}: suffixes are in lower case", "form"
        )
    if path.suffix not in _FILES:
        hint = "; a table with tabs is one named .tsv, one with commas .csv" if path.suffix.lower() in _TEXTS else ""
        raise DataError(
            f"{path.name}: a {path.suffix or 'nameless'} file is not read{hint}; what is: {READ_FORMS}", "form"
        )
    form = f"{path.suffix[1:].upper()} file"
    if given.columns is None and path.suffix in (".json", ".jsonl"):
        peeked = peek(DataSettings(**given.data(path)))
        if peeked.rows and any(peeked.rows[0].get(key) is not None for key in CONVERSATIONS):
            look = Look(f"{form} of conversations", given.data(path))
            image = next((key for key in ("image", "images") if key in peeked.names), None)
            _set_root(look, peeked.rows, image, directory)
            _set_group(look, peeked)
            return look
    return _table(path.name, form, path, given, directory)


def _table(name: str, form: str, path: str | Path, given: _Given, directory: Path | None = None) -> Look:
    """Use the given columns, or infer them from the names of a table; images are searched for in `directory`."""
    data = given.data(path)
    if (split := _training_split(Path(data["path"]))) != "train":
        data["split"] = split
    peeked = peek(DataSettings(**{"split": "train", **data}))
    look = Look(f"{form} with the columns {listed([printable(column) for column in peeked.names], 12)}", data)
    if not peeked.names and peeked.error is not None:
        raise peeked.error
    if not peeked.names:
        raise DataError(f"{name}: {form}: holds no records: objects with keys, or rows below a line of column names")
    if given.columns is not None:
        data["columns"] = dict(given.columns)
    else:
        _set_columns(name, look, peeked)
    image = data["columns"].get("image")
    if directory is not None:
        _set_root(look, peeked.rows, image, directory)
    _set_group(look, peeked)
    if "test" in peeked.splits:
        look.test = data | {"split": "test"}
    return look


def _training_split(path: Path) -> str:
    """Return the split of a directory to train on: the one that is named like it, or the only one."""
    names = splits_of(path) if path.is_dir() else []
    named = [name for name in _SPLITS["train"] if name in names]
    return (named or (names if len(names) == 1 else ["train"]))[0]


def _set_columns(name: str, look: Look, peeked: Peeked) -> None:
    """Infer `columns`. Raises DataError with the option that names them, if they cannot be inferred."""
    data = look.data
    known, proposed = known_form(peeked.names), propose_columns(peeked.names)
    if known is not None:
        data["columns"] = known.columns.model_dump(exclude_none=True)
        if known.each is not None:
            data["each"] = known.each
    elif proposed:
        data |= yaml.safe_load("{" + proposed + "}")
        _set_image(look, peeked)
    else:
        form = look.form.partition(" with the columns")[0]
        raise DataError(f"{name}: {form}: {_advice(peeked)}", "form")
    _set_choices(data["columns"], peeked)


def _set_image(look: Look, peeked: Peeked) -> None:
    """Let a column whose name does not say it be that of the image, if its values are names of images."""
    columns = look.data["columns"]
    if "image" in columns:
        return
    images = image_columns(peeked.rows, [name for name in peeked.names if name not in columns.values()])
    if images:
        look.data["columns"] = {"image": images[0], **columns}
    if len(images) > 1:
        others = listed([printable(name) for name in images[1:]])
        look.notes.append(f"A record has one image, that of {printable(images[0])}; not used: {others}.")


def _advice(peeked: Peeked) -> str:
    """Return what to do with a table whose column names do not say what they hold."""
    group = _group_column(peeked)
    option = columns_option(peeked.rows, peeked.names, [] if group is None else [group])
    if not option:
        return describe_record(peeked.names)
    names = listed([printable(name) for name in peeked.names], 12)
    return (
        f"it has {names}, and these names do not tell the image, question and answer. "
        f"By their values, add: {printable(option)}"
    )


def _set_choices(columns: dict[str, Any], peeked: Peeked) -> None:
    """Let an answer that is a number or a letter point into a column of options."""
    options = next((name for name in ("choices", "options") if name in peeked.names), None)
    answer = columns.get("answer")
    if options is None or not isinstance(answer, str) or not peeked.rows:
        return
    answers = [row.get(answer) for row in peeked.rows]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in answers):
        columns |= {"choices": options, "answer": {"index": answer}}
    elif all(isinstance(value, str) and re.fullmatch("[A-Z]", value) for value in answers):
        columns |= {"choices": options, "answer": {"letter": answer}}


def _set_root(look: Look, rows: Sequence[Mapping[str, Any]], image: str | None, directory: Path) -> None:
    """Set `image_root`, and the template of the image, so that the images of the first rows exist."""
    if image is None or not any(isinstance(row.get(image), str) for row in rows):
        return
    columns = look.data.get("columns", {})
    answer = [columns["answer"]] if isinstance(columns.get("answer"), str) else []
    # The answer comes last: questions without answers could not use its template.
    others = [name for name in rows[0] if columns and name not in (image, *answer)]
    paths = find_images(rows, image, others + answer, directory)
    if paths.share == 0.0:
        return
    if paths.equal:
        look.notes.append(
            f"The first images are in {counted(1 + len(paths.equal), 'directory', 'directories')} under the same "
            f"names: {listed([printable(str(root)) for root in (paths.root, *paths.equal)], 4)}. image_root is the "
            "first; correct it, or add the folder to the names in the data."
        )
    if columns and paths.setting == image:
        files = (paths.root / row[image] for row in rows if isinstance(row.get(image), str))
        if any(is_readable_dicom(path) for path in files):
            data = look.data
            conversion = Conversion("dicom", paths.root, table=Path(data["path"]), encoding=data.get("encoding"))
            raise DataError(conversion.advice(), "form")
    if columns:
        columns["image"] = paths.setting
    if paths.root != Path(look.data["path"]).parent:
        look.data["image_root"] = str(paths.root)


def _set_group(look: Look, peeked: Peeked) -> None:
    """Set `group` to the column by which records belong together, if there is one."""
    if (column := _group_column(peeked)) is not None:
        look.data["group"] = column


def _group_column(peeked: Peeked) -> str | None:
    """Return the first column that names a patient, a device or the like, and differs between records."""
    normalized = {_normalized(name): name for name in reversed(peeked.names)}
    for word in _GROUPS:
        column = normalized.get(word)
        values = [row.get(column) for row in peeked.rows] if column is not None else []
        if (
            column is not None
            and len(set(map(str, values))) > 1
            and all(isinstance(value, str | int) for value in values)
        ):
            return column
    return None


def _normalized(column: str) -> str:
    """Return the letters of a column's name without accents, and without a word for a number at its end."""
    letters = re.sub(r"[^a-z]", "", unicodedata.normalize("NFKD", column).lower())
    return re.sub(r"(id|nr|no|number|nummer|uid)$", "", letters)


def _shards(directory: Path, number: int, given: _Given) -> Look:
    """Propose the columns of tar shards in WebDataset's form: an image, and a text or JSON with one."""
    data = given.data(directory)
    form = f"{counted(number, 'tar shard')}"
    names = peek(DataSettings(**data)).names
    if given.columns is not None:
        return Look(f"{form} with the members {listed(names)}", data | {"columns": dict(given.columns)})
    image = next((name for name in ("jpg", "jpeg", "png", "webp") if name in names), None)
    answer = next((name for name in ("txt", "caption", "cls", "json.answer", "json.caption") if name in names), None)
    if image is None or answer is None:
        raise DataError(
            f"{directory.name}: {form} with the members {listed(names)}: columns must name an image, "
            "question and answer, such as columns: {image: jpg, question: json.question, answer: json.answer}",
            "form",
        )
    data["columns"] = {"image": image, "question": {"text": "Describe the image."}, "answer": answer}
    return Look(f"{form} with the members {listed(names)}", data)


def _images(directory: Path, given: _Given) -> Look:
    """Propose the classes of a directory with a folder of images for each."""
    try:
        listing = list_images(directory)
    except DataError as error:
        names = [printable(path.name) for path in sorted(directory.iterdir()) if path.is_file()]
        if not names:
            raise
        raise DataError(f"{error}. Its files: {listed(names, 4)}. What is read: {READ_FORMS}", "form") from None
    folders = sorted({Path(name).parts[0] for name in listing.images if len(Path(name).parts) > 1})
    flat = sum(len(Path(name).parts) == 1 for name in listing.images)
    if flat or len(folders) < 2:
        tables = [path for path in sorted(directory.glob("*/*")) if path.suffix in _FILES and path.name not in _CARDS]
        hint = f", or name the data file {tables[0]}" if tables else ""
        raise DataError(
            f"{directory}: holds {counted(len(listing.images), 'image')} ({flat:,} not in a folder, "
            f"{counted(len(folders), 'folder')}), but no questions and answers. Put the images of each class into a "
            "folder named like it, or add a table such as answers.csv with the columns image, question and answer"
            f"{hint}",
            "form",
        )
    splits = {split: name for split, words in _SPLITS.items() for name in folders if name.lower() in words}
    classes = folders
    if splits.get("train"):
        deeper = {Path(name).parts[1] for name in listing.images if len(Path(name).parts) > 2}
        classes = sorted(deeper)
    columns = {"image": "image", "question": {"text": QUESTION}, "answer": "label"}
    data = given.data(directory) | {"columns": columns if given.columns is None else dict(given.columns)}
    look = Look(f"a folder for each of {counted(len(classes), 'class', 'classes')} of images", data)
    if splits.get("train") and splits.get("test"):
        look.test = data | {"split": "test"}
    return look
