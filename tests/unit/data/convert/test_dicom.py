"""DICOM series with a table of reports: gray values, joins, and nothing that identifies anyone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from lora_llava.data.convert import dicom as dicom_file
from lora_llava.data.convert.run import convert
from lora_llava.data.convert.writer import REPORT_QUESTION, ConvertOptions
from lora_llava.errors import DataError
from tests.helpers.published_sets import dicom

FIRST = "P-77/a/IMG0001.dcm"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return dicom(tmp_path / "in")


def run(source: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    output = source.parent / "out"
    return convert("dicom", source, output, ConvertOptions(table=source / "reports.csv", **options)), output


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def change(path: Path, **tags: Any) -> None:
    data = pydicom.dcmread(path)
    for tag, value in tags.items():
        if tag == "PixelPaddingValue":
            # Its type depends on that of the pixels, so pydicom does not choose one.
            data.add_new(tag, "US", value)
        else:
            setattr(data, tag, value)
    data.save_as(path)


def test_reports_are_joined_and_patients_are_numbers(source: Path) -> None:
    report, output = run(source)
    made = [json.loads(line) for line in (output / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["image"], row["conversations"][1]["value"], row["group"]) for row in made] == [
        ("images/000001.png", "No finding.", "patient-1"),
        ("images/000002.png", "A nodule in the left lung.", "patient-1"),
        ("images/000003.png", "Cardiomegaly.", "patient-2"),
    ]
    everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file()) + str(
        sorted(output.rglob("*"))
    ).encode().replace(str(output).encode(), b"")
    for secret in (b"Muster", b"Erika", b"P-77", b"19700101", b"1.2.1.1", b"Clinic", b"IMG0001"):
        assert secret not in everything
    [rule] = [rule for rule in report["rules"] if rule.startswith("Identifying")]
    assert "PatientName (5)" in rule
    assert "InstitutionName (5)" in rule


def test_gray_values_follow_the_window_of_the_file(source: Path) -> None:
    _, output = run(source)
    ramp = np.arange(48).reshape(6, 8) * 80
    # Center 2000 and width 2001: from 999.5 to 2999.5.
    expected = np.rint(np.clip((ramp - 999.5) / 2000, 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels(output / "images/000001.png"), expected)
    # The middle of three slices by InstanceNumber is the second; rescaled by -1024, with the first of two windows.
    slice_two = np.clip((np.arange(48).reshape(6, 8) + 2000 - 1024 - 949.5) / 100, 0, 1) * 255
    np.testing.assert_array_equal(pixels(output / "images/000002.png"), np.rint(slice_two).astype(np.uint8))
    # No window: the range of the values; MONOCHROME1 is inverted.
    np.testing.assert_array_equal(pixels(output / "images/000003.png"), 255 - np.rint(ramp / 3760 * 255))


def test_a_window_of_the_user_comes_first(source: Path) -> None:
    _, output = run(source, window=(0.0, 4095.0))
    ramp = np.arange(48).reshape(6, 8) * 80
    np.testing.assert_array_equal(pixels(output / "images/000001.png"), np.rint(ramp / 4095 * 255))


def test_padding_is_black_in_both_photometric_interpretations(source: Path) -> None:
    change(source / FIRST, PixelPaddingValue=3760)
    change(source / "P-78/IMG0001.dcm", PixelPaddingValue=3760)
    _, output = run(source)
    assert pixels(output / "images/000001.png")[-1, -1] == 0
    assert pixels(output / "images/000003.png")[-1, -1] == 0


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"BurnedInAnnotation": "YES"}, f"{FIRST}: BurnedInAnnotation: is YES"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, f"{FIRST}: PhotometricInterpretation: is 'PALETTE COLOR'"),
        ({"Rows": None}, f"{FIRST}: Rows: is missing"),
        ({"Rows": 65535, "Columns": 65535}, f"{FIRST}: has 4,294,836,225 pixels, at most 64,000,000 are read"),
        ({"PixelData": b"12"}, f"{FIRST}: its pixels are damaged"),
        ({"AccessionNumber": "A9"}, "reports.csv, line 2: accession: joins no file"),
    ],
)
def test_what_cannot_be_shown_is_left_out_and_named_on_the_terminal_alone(
    source: Path, tags: dict[str, Any], said: str
) -> None:
    change(source / FIRST, **tags)
    report, output = run(source)
    assert report["records"] == {"records.jsonl": 2}
    assert any(said in example for examples in report["examples"].values() for example in examples), report["examples"]
    assert "IMG0001" not in (output / "report.json").read_text(encoding="utf-8")


def test_a_compressed_file_names_its_transfer_syntax_and_what_decodes_it(source: Path) -> None:
    data = pydicom.dcmread(source / FIRST)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([b"1234"])
    data.save_as(source / FIRST)
    report, _ = run(source)
    [reason] = [dropped["reason"] for dropped in report["dropped"] if "compressed" in dropped["reason"]]
    assert reason.startswith("compressed as JPEG Lossless, Non-Hierarchical, First-Order")
    assert "pylibjpeg" in reason


def test_a_file_without_a_transfer_syntax_is_left_out(source: Path) -> None:
    path = source / FIRST
    # The tag becomes one that nobody knows.
    path.write_bytes(path.read_bytes().replace(b"\x02\x00\x10\x00UI", b"\x02\x00\x11\x00UI"))
    report, _ = run(source)
    assert report["records"] == {"records.jsonl": 2}
    [reason] = [one["reason"] for one in report["dropped"] if one["reason"] != "a row joins no file"]
    assert reason in ("an unknown transfer syntax", "a damaged DICOM file")


def test_a_deflated_file_is_not_inflated(source: Path) -> None:
    data = pydicom.dcmread(source / FIRST)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(source / FIRST)
    report, _ = run(source)
    assert any(dropped["reason"] == "a deflated DICOM file" for dropped in report["dropped"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("name;report\nA1;x\n", "none of its columns (name, report) joins the files; name one image, with their"),
        ("accession;remark\nA1;x\n", "none of its columns (accession, remark) holds reports; name it report or"),
        ("accession;report\n", "none of its columns (it has no rows) joins the files"),
        ("accession;report\nB1;x\n", "nothing could be converted"),
        ("accession;report\nA1;x;y\n", "line 2: has 3 fields, the first line has 2"),
    ],
)
def test_a_table_that_joins_nothing_is_refused(source: Path, table: str, said: str) -> None:
    (source / "reports.csv").write_text(table, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run(source)
    assert said in str(caught.value)
    assert not (source.parent / "out").exists()


def test_links_out_of_the_directory_and_cycles_are_not_followed(source: Path, tmp_path: Path) -> None:
    (source / FIRST).rename(tmp_path / "secret.dcm")
    (source / FIRST).symlink_to(tmp_path / "secret.dcm")
    (source / "cycle").symlink_to(source)
    report, _ = run(source)
    assert report["records"] == {"records.jsonl": 2}
    assert "a link out of the directory" in report["examples"]


def test_without_pydicom_the_command_to_install_it_is_given(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'lora-llava\[dicom\]'"):
        run(source)


def test_the_table_must_be_named(source: Path) -> None:
    with pytest.raises(DataError, match="name their table with --table"):
        convert("dicom", source, source.parent / "out", ConvertOptions())


def test_padding_of_signed_pixels_is_signed_where_the_file_does_not_name_types(source: Path) -> None:
    data = pydicom.dcmread(source / FIRST)
    data.PixelRepresentation = 1
    data.add_new("PixelPaddingValue", "SS", -2000)
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    ramp = data.pixel_array.astype(np.int16)
    ramp[0, 0] = -2000
    data.PixelData = ramp.tobytes()
    data.save_as(source / FIRST, implicit_vr=True, little_endian=True)
    assert dicom_file._read_header(source / FIRST, "", source).number("PixelPaddingValue") == -2000


def test_a_column_without_a_name_holds_no_questions(source: Path) -> None:
    # pandas writes the numbers of the rows in such a column.
    first, *rows = (source / "reports.csv").read_text(encoding="utf-8").splitlines()
    lines = [f";{first}", *(f"{number};{row}" for number, row in enumerate(rows))]
    (source / "reports.csv").write_text("\n".join(lines), encoding="utf-8")
    _, output = run(source)
    made = [json.loads(line) for line in (output / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["conversations"][0]["value"] for row in made} == {f"<image>\n{REPORT_QUESTION}"}


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_a_table_may_name_the_files(source: Path, form: str) -> None:
    # The patient would join too, and lead to another image.
    other = "P-78/IMG0001.dcm"
    names = [FIRST.replace("/", "\\"), FIRST, f"./{other}", "P-78/IMG0009.dcm"]
    rows = [
        {"file": name, "PatientID": "P-77", "prompt": f"Is it {number}?", "answer": f"yes {number}"}
        for number, name in enumerate(names)
    ]
    table = source / f"questions.{form}"
    lines = [json.dumps(row) for row in rows]
    if form == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    table.write_text(f"[{','.join(lines)}]" if form == "json" else "\n".join(lines), encoding="utf-8")
    report = convert("dicom", source, source.parent / "out", ConvertOptions(table=table, window=(0.0, 4095.0)))
    made = [json.loads(line) for line in (source.parent / "out/records.jsonl").read_text("utf-8").splitlines()]
    assert [(row["image"], row["conversations"][0]["value"], row["group"]) for row in made] == [
        ("images/000001.png", "<image>\nIs it 0?", "patient-1"),
        ("images/000001.png", "<image>\nIs it 1?", "patient-1"),
        ("images/000003.png", "<image>\nIs it 2?", "patient-2"),
    ]
    assert report["images"] == {"converted to PNG": 2}
    assert report["rules"][-1] == "Columns of the table that are not carried over: PatientID."
    ramp = np.arange(48).reshape(6, 8) * 80
    np.testing.assert_array_equal(pixels(source.parent / "out/images/000001.png"), np.rint(ramp / 4095 * 255))
    place = "record 4" if form == "json" else f"line {5 if form == 'csv' else 4}"
    assert report["examples"]["a row joins no file"] == [f"questions.{form}, {place}: file: joins no file"]


def test_a_table_of_no_form_that_is_read_is_refused(source: Path) -> None:
    with pytest.raises(DataError, match=r"must be \.json or \.jsonl or \.csv or \.tsv or \.xlsx; save it"):
        convert("dicom", source, source.parent / "out", ConvertOptions(table=source / "reports.ods"))
