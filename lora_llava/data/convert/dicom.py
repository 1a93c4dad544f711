"""Convert DICOM files with a table of reports or questions: gray values by their window, patients as numbered groups.

Nothing of a file but its pixels is carried over.
"""

from __future__ import annotations

import os
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_llava.data.convert.fields import DropError, mapping
from lora_llava.data.convert.writer import REPORT_QUESTION, ConvertOptions, Writer
from lora_llava.data.images.grayscale import Window, to_eight_bits
from lora_llava.data.images.read import MAX_PIXELS
from lora_llava.data.sources.cells import as_text
from lora_llava.data.sources.columns import file_entries
from lora_llava.data.sources.forms import likely_key
from lora_llava.data.sources.selection import Entry
from lora_llava.errors import DataError
from lora_llava.recipe.fields import RECORD_FILES
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.text import listed, printable

_KEYS = {
    "SOPInstanceUID": "sopinstanceuid instanceuid",
    "SeriesInstanceUID": "seriesinstanceuid seriesuid series",
    "AccessionNumber": "accessionnumber accession",
    "StudyInstanceUID": "studyinstanceuid studyuid study",
    "PatientID": "patientid patient",
}
"""Tags that may join a file with a row, most exact first, and the names of their columns in lower case."""
_ANSWERS = "report findings impression answer text caption diagnosis label".split()
_IDENTIFYING = (
    "PatientName PatientID PatientBirthDate PatientAddress PatientTelephoneNumbers OtherPatientIDs "
    "OtherPatientNames PatientMotherBirthName MilitaryRank EthnicGroup PatientComments AccessionNumber StudyID "
    "StudyDate SeriesDate AcquisitionDate ContentDate StudyTime InstitutionName InstitutionAddress StationName "
    "ReferringPhysicianName PerformingPhysicianName OperatorsName RequestingPhysician DeviceSerialNumber "
    "StudyInstanceUID SeriesInstanceUID SOPInstanceUID"
).split()
"""Tags that identify a person, a visit or a device (after the basic profile of DICOM PS3.15, annex E)."""
_NEEDED = (
    "SOPInstanceUID SeriesInstanceUID StudyInstanceUID AccessionNumber PatientID SeriesNumber InstanceNumber Rows "
    "Columns NumberOfFrames PhotometricInterpretation PixelRepresentation RescaleSlope RescaleIntercept WindowCenter "
    "WindowWidth VOILUTFunction PixelPaddingValue BurnedInAnnotation"
).split()
"""Tags that are read. PixelRepresentation tells whether PixelPaddingValue is signed."""
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NO_IMAGE = "a DICOM file without an image that can be shown"


@dataclass(frozen=True, slots=True)
class _Instance:
    """One file: where it is, and the header that the conversion needs."""

    path: Path
    where: str
    header: Any

    def value(self, tag: str) -> str:
        """Return a tag as text; empty if it is missing."""
        value = self.header.get(tag)
        return "" if value is None else str(value).strip()

    def number(self, tag: str) -> float | None:
        """Return the first number of a tag; None if there is none."""
        value = self.header.get(tag)
        if value is None or isinstance(value, str | bytes):
            return None
        try:
            number = float(value if isinstance(value, int | float) else value[0])
        except (TypeError, ValueError, IndexError, OverflowError):
            return None
        return number if np.isfinite(number) else None


class _Columns(NamedTuple):
    """The columns of the table that are read."""

    key: str
    tag: str | None
    """Tag whose values the key has; None: the key is the path of a file below the directory."""
    answer: str
    question: str | None
    others: list[str]


def convert_dicom(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each row of `options.table` that joins a file below the directory `source`.

    Raises DataError if pydicom is missing, there is no table, or no column of it names files or a tag.
    """
    if not source.is_dir():
        raise DataError(f"{source}: is no directory; name the one with the DICOM files as SRC")
    if options.table is None:
        raise DataError("the reports are missing: name their table with --table")
    _check_pydicom()
    rows = _read_table(options.table, options.encoding)
    columns = _columns(rows, source, options.table)
    with Writer(output, source, options) as writer:
        # Paths often hold names of patients.
        writer.report.names_files = False
        instances: dict[str, list[_Instance]] = {}
        for instance in _scan(writer, source):
            tag = columns.tag
            key = instance.path.relative_to(source).as_posix() if tag is None else instance.value(tag)
            instances.setdefault(key, []).append(instance)
        if columns.others:
            shown = listed([printable(name, 80) for name in columns.others])
            writer.report.rules.append(f"Columns of the table that are not carried over: {shown}.")
        converter = _Rows(writer, instances, columns)
        for number, row in enumerate(rows, start=1):
            with writer.report.dropping():
                if row.error is not None:
                    raise row.error
                where = f"{options.table.name}, {f'record {number}' if row.line is None else f'line {row.line}'}"
                converter.convert(mapping(row.value, where), where)
        converter.count_unused()
    return writer


def _read_table(table: Path, encoding: str | None) -> list[Entry]:
    """Return the rows of a table; DataError if it is of no form that is read."""
    if table.suffix not in RECORD_FILES:
        raise DataError(f"--table {table}: must be {' or '.join(RECORD_FILES)}; save it in one of these forms")
    return list(file_entries(table, DataSettings(path=str(table), encoding=encoding)))


def _check_pydicom() -> None:
    try:
        from pydicom import config
    except ImportError:
        raise DataError("DICOM files need pydicom; install it: pip install 'lora-llava[dicom]'") from None
    # Real files break rules of the standard that do not matter here.
    config.settings.reading_validation_mode = config.IGNORE


def _columns(rows: list[Entry], source: Path, table: Path) -> _Columns:
    """Return the columns to read; DataError if none joins the rows with files, or none holds answers."""
    values = [row.value for row in rows if isinstance(row.value, dict)]
    if not values and rows and rows[0].error is not None:
        raise rows[0].error
    names = [str(name) for name in values[0]] if values else []
    tag, key = _join_column(names, values, source, table)
    answer = next((name for name in names if name.lower() in _ANSWERS), None)
    if answer is None:
        raise DataError(
            f"{table.name}: none of its columns ({listed(names)}) holds reports; name it {' or '.join(_ANSWERS)}"
        )
    question = likely_key(names, "question")
    return _Columns(key, tag, answer, question, [name for name in names if name not in (key, answer, question)])


def _join_column(names: list[str], rows: list[dict[str, Any]], source: Path, table: Path) -> tuple[str | None, str]:
    """Return the tag that joins files with rows, None for their paths, and the column that holds it.

    Paths are the most exact. Raises DataError if there is no such column.
    """
    image = likely_key(names, "image")
    if image is not None and any((source / _path(row.get(image))).is_file() for row in rows):
        return None, image
    letters = {re.sub(r"[^a-z]", "", name.lower()): name for name in names}
    for tag, spellings in _KEYS.items():
        for spelling in spellings.split():
            if spelling in letters:
                return tag, letters[spelling]
    paths = f"; the paths in {image!r} are not below {source}" if image else ""
    raise DataError(
        f"{table.name}: none of its columns ({listed(names) or 'it has no rows'}) joins the files{paths}; name one "
        f"image, with their paths below SRC, or {' or '.join(_KEYS)}"
    )


def _path(value: object) -> str:
    """Return the path of a file below the directory, as tables of Windows write it too."""
    return posixpath.normpath(str(value or "").strip().replace("\\", "/"))


def _scan(writer: Writer, source: Path) -> Iterator[_Instance]:
    """Yield all DICOM files with an image, in the order of their paths; note which identifying tags they hold."""
    held: Counter[str] = Counter()
    root = source.resolve()
    for path in sorted(_files(source)):
        instance: _Instance | None = None
        with writer.report.dropping():
            instance = _read_header(path, printable(path.relative_to(source).as_posix(), 200), root)
        if instance is not None:
            held.update(tag for tag in _IDENTIFYING if instance.value(tag))
            yield instance
    writer.report.rules += [
        "Identifying tags in the files, none of which is carried over: "
        + (", ".join(f"{tag} ({held[tag]})" for tag in _IDENTIFYING if held[tag]) or "none"),
        "Names in the pixels or in the texts of the table are not detected, but files whose BurnedInAnnotation is YES "
        "are left out. Images are numbered, and this file names no source file.",
        "Group: patients, numbered in the order of the table; without PatientID, each record is its own group.",
        "Image: of several series the one with the lowest number, of a series the middle instance, of several frames "
        "the middle one.",
        "Gray values: rescaled, and shown by --window, or the first window of the file, or the range of the values; "
        "MONOCHROME1 is inverted. VOI lookup tables are not applied.",
    ]


def _files(source: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(source, followlinks=False):
        yield from (Path(directory, name) for name in names)


def _read_header(path: Path, where: str, root: Path) -> _Instance | None:
    """Read the header of a file; None if it is no DICOM file."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    try:
        if not path.resolve().is_relative_to(root):
            raise DropError(f"{where}: is a link out of SRC; copy the file", "a link out of the directory")
        if not path.is_file() or not is_dicom(path):
            if path.suffix.lower() in (".dcm", ".dicom"):
                raise DropError(f"{where}: is no DICOM file", "not a DICOM file")
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Reading one inflates all of it, whatever size it has then.
            if str(read_file_meta_info(path).get("TransferSyntaxUID")) == _DEFLATED:
                raise DropError(f"{where}: is deflated; store it uncompressed", "a deflated DICOM file")
            header = dcmread(path, stop_before_pixels=True, specific_tags=[*_NEEDED, *_IDENTIFYING])
            instance = _Instance(path, where, header)
            # Values are converted when they are asked for, and then fail.
            for tag in (*_NEEDED, *_IDENTIFYING):
                instance.value(tag)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the reader raises anything for broken bytes
        raise DropError(f"{where}: is damaged ({type(error).__name__})", "a damaged DICOM file") from None
    if instance.value("BurnedInAnnotation").upper() == "YES":
        raise DropError(f"{where}: BurnedInAnnotation: is YES: the pixels may show a name", "annotation in the pixels")
    if instance.number("Rows") is None or instance.number("Columns") is None:
        raise DropError(f"{where}: Rows: is missing: the file holds no image", _NO_IMAGE)
    return instance


def is_dicom(path: Path) -> bool:
    """Tell whether a file has DICOM's preamble. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


class _Rows:
    """Converts the rows of a table, and numbers images and patients."""

    def __init__(self, writer: Writer, instances: dict[str, list[_Instance]], columns: _Columns) -> None:
        self.writer, self.instances, self.columns = writer, instances, columns
        self.patients: dict[str, str] = {}
        self.used: set[str] = set()
        self.pictures: dict[Path, str] = {}
        """Images that were written, by their source."""
        self.number = 0

    def convert(self, row: dict[str, Any], where: str) -> None:
        """Write the record of a row; DataError if it joins nothing or its image cannot be shown."""
        key = self._text(row, self.columns.key, where)
        key = _path(key) if self.columns.tag is None else key
        # Files without the tag are those of no row.
        instances = self.instances.get(key) if key else None
        if instances is None:
            raise DropError(f"{where}: {self.columns.key}: joins no file", "a row joins no file")
        self.used.add(key)
        answer = self._text(row, self.columns.answer, where)
        asked = self.columns.question
        own = None if asked is None or row.get(asked) is None else self._text(row, asked, where)
        question = own or self.writer.options.question or REPORT_QUESTION
        instance = _middle(instances)
        if instance.path not in self.pictures:
            image = _render(instance, self.writer.options.window)
            self.pictures[instance.path] = self.writer.add_picture(f"{self.number + 1:06d}.png", image).path
        self.number += 1
        patient = instance.value("PatientID")
        group = self.patients.setdefault(patient, f"patient-{len(self.patients) + 1}") if patient else None
        record = {"id": f"{self.number:06d}", "image": self.pictures[instance.path], "question": question}
        record |= {"answer": answer, "group": group or f"record-{self.number}"}
        self.writer.write(record, kind="report")

    @staticmethod
    def _text(row: dict[str, Any], column: str, where: str) -> str:
        """Return a text, or a number of a workbook as text, without white space around it; DataError otherwise."""
        return as_text(row.get(column), f"{where}: {column}").strip()

    def count_unused(self) -> None:
        """Count the files that no row joins."""
        for key, instances in self.instances.items():
            if key not in self.used:
                for instance in instances:
                    self.writer.report.drop(DropError(f"{instance.where}: no row joins it", "a file joins no row"))


def _middle(instances: list[_Instance]) -> _Instance:
    """Return the middle image of the series with the lowest number."""
    series: dict[tuple[float, str], list[_Instance]] = {}
    for instance in instances:
        number = instance.number("SeriesNumber")
        key = (float("inf") if number is None else number, instance.value("SeriesInstanceUID"))
        series.setdefault(key, []).append(instance)
    images = sorted(
        series[min(series)],
        key=lambda instance: (instance.number("InstanceNumber") or 0.0, instance.value("SOPInstanceUID")),
    )
    return images[len(images) // 2]


def _render(instance: _Instance, window: Window | None) -> Image.Image:
    """Return the middle frame of a file as an image of 8 bits; DropError if it cannot be shown."""
    photometric = instance.value("PhotometricInterpretation").upper()
    size = (instance.number("Rows") or 0) * (instance.number("Columns") or 0)
    if not 0 < size <= MAX_PIXELS:
        raise DropError(f"{instance.where}: has {size:,.0f} pixels, at most {MAX_PIXELS:,} are read", _NO_IMAGE)
    pixels = _decode(instance)
    if photometric in ("MONOCHROME1", "MONOCHROME2") and pixels.ndim == 2:
        return _shades(instance, pixels, window, inverted=photometric == "MONOCHROME1")
    if (
        photometric.startswith(("RGB", "YBR"))
        and pixels.ndim == 3
        and pixels.dtype == np.uint8
        and pixels.shape[2] == 3
    ):
        return Image.fromarray(pixels)
    raise DropError(
        f"{instance.where}: PhotometricInterpretation: is {printable(photometric, 40)!r} with pixels of "
        f"{pixels.dtype}; MONOCHROME1, MONOCHROME2, and RGB or YBR of 8 bits are read",
        _NO_IMAGE,
    )


def _decode(instance: _Instance) -> npt.NDArray[Any]:
    """Return the pixels (H, W) or (H, W, 3) of the middle frame."""
    from pydicom.pixels import get_decoder, pixel_array

    try:
        syntax = instance.header.file_meta.TransferSyntaxUID
        name = printable(str(syntax.name), 80)
        decoder = get_decoder(syntax)
        missing = "" if decoder.is_available else "; or ".join(decoder.missing_dependencies)
    except Exception:  # noqa: BLE001 - a syntax that is missing, or that pydicom does not know
        raise DropError(f"{instance.where}: TransferSyntaxUID: is not known", "an unknown transfer syntax") from None
    if missing:
        raise DropError(
            f"{instance.where}: its transfer syntax, {name}, needs a decoder: {missing}",
            f"compressed as {name}, which needs another package: {missing}",
        )
    frames = instance.number("NumberOfFrames") or 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(pixel_array(instance.path, index=int(frames) // 2 if frames > 1 else 0))
    except Exception as error:  # noqa: BLE001 - as above
        raise DropError(
            f"{instance.where}: its pixels are damaged ({type(error).__name__})", "damaged pixels"
        ) from None


def _shades(instance: _Instance, pixels: npt.NDArray[Any], window: Window | None, *, inverted: bool) -> Image.Image:
    """Return gray pixels (H, W) as an image of 8 bits: rescaled, windowed, with padding in black."""
    slope, intercept = instance.number("RescaleSlope"), instance.number("RescaleIntercept")
    values = pixels.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)
    padding = instance.number("PixelPaddingValue")
    is_padding = np.zeros(pixels.shape, bool) if padding is None else pixels == padding
    if not is_padding.all():
        # The darkest shade, which is the highest value of an inverted image.
        shown = values[~is_padding]
        values = np.where(is_padding, shown.max() if inverted else shown.min(), values)
    gray = to_eight_bits(values, window or _window(instance))
    return Image.fromarray(255 - gray if inverted else gray)


def _window(instance: _Instance) -> Window | None:
    """Return the bounds of the first window of a file (DICOM PS3.3, C.11.2.1.2); None if it has none."""
    center, width = instance.number("WindowCenter"), instance.number("WindowWidth")
    if center is None or width is None or width <= 1:
        return None
    if instance.value("VOILUTFunction").upper() == "LINEAR_EXACT":
        return center - width / 2, center + width / 2
    return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
