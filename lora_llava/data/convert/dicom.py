"""Convert DICOM series with a table of reports: gray values by their window, patients as numbered groups.

Nothing of a file but its pixels is carried over.
"""

from __future__ import annotations

import os
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

from lora_llava.data.convert.fields import DropError, text
from lora_llava.data.convert.writer import REPORT_QUESTION, ConvertOptions, Writer
from lora_llava.data.images.grayscale import Window, to_eight_bits
from lora_llava.data.images.read import MAX_PIXELS
from lora_llava.data.sources.tables import read_rows
from lora_llava.errors import DataError
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
    answer: str
    question: str | None


def convert_dicom(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each row of `options.table` that joins a file below the directory `source`.

    Raises DataError if pydicom is missing, there is no table, or no column of it names a tag.
    """
    if not source.is_dir():
        raise DataError(f"{source}: is no directory; name the one with the DICOM files as SRC")
    if options.table is None:
        raise DataError("the reports are missing: name their CSV file with --table")
    _check_pydicom()
    rows = list(read_rows(options.table))
    first = next((row for row in rows if row.error is None), None)
    if first is None and rows and rows[0].error is not None:
        raise rows[0].error
    columns = [] if first is None else list(first.value)
    tag, key = _join_column(columns, options.table)
    answer = next((name for name in columns if name.lower() in _ANSWERS), None)
    if answer is None:
        raise DataError(
            f"{options.table.name}: none of its columns ({listed(columns)}) holds reports; "
            f"name it {' or '.join(_ANSWERS)}"
        )
    question = next((name for name in columns if name.lower() == "question"), None)
    with Writer(output, source, options) as writer:
        # Paths often hold names of patients.
        writer.report.names_files = False
        instances: dict[str, list[_Instance]] = {}
        for instance in _scan(writer, source):
            instances.setdefault(instance.value(tag), []).append(instance)
        converter = _Rows(writer, instances, _Columns(key, answer, question))
        for row in rows:
            with writer.report.dropping():
                if row.error is not None:
                    raise row.error
                converter.convert(row.value, f"{options.table.name}, line {row.line}")
        converter.count_unused()
    return writer


def _check_pydicom() -> None:
    try:
        from pydicom import config
    except ImportError:
        raise DataError("DICOM files need pydicom; install it: pip install 'lora-llava[dicom]'") from None
    # Real files break rules of the standard that do not matter here.
    config.settings.reading_validation_mode = config.IGNORE


def _join_column(columns: list[str], table: Path) -> tuple[str, str]:
    """Return the tag that joins files with rows, and the column that holds it; DataError if there is none."""
    names = {re.sub(r"[^a-z]", "", name.lower()): name for name in columns}
    for tag, spellings in _KEYS.items():
        for spelling in spellings.split():
            if spelling in names:
                return tag, names[spelling]
    raise DataError(
        f"{table.name}: none of its columns ({listed(columns) or 'it has no rows'}) joins the files; name one "
        f"{' or '.join(_KEYS)}"
    )


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
        self.number = 0

    def convert(self, row: dict[str, Any], where: str) -> None:
        """Write the record of a row; DataError if it joins nothing or its image cannot be shown."""
        key = text(row, self.columns.key, where)
        instances = self.instances.get(key)
        if instances is None:
            raise DropError(f"{where}: {self.columns.key}: joins no file", "a row joins no file")
        self.used.add(key)
        answer = text(row, self.columns.answer, where)
        own = None if self.columns.question is None else row[self.columns.question]
        question = own or self.writer.options.question or REPORT_QUESTION
        instance = _middle(instances)
        image = _render(instance, self.writer.options.window)
        self.number += 1
        picture = self.writer.add_picture(f"{self.number:06d}.png", image)
        patient = instance.value("PatientID")
        group = self.patients.setdefault(patient, f"patient-{len(self.patients) + 1}") if patient else None
        record = {"id": f"{self.number:06d}", "image": picture.path, "question": question, "answer": answer}
        self.writer.write({**record, "group": group or f"record-{self.number}"}, kind="report")

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
