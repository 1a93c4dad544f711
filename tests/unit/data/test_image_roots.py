"""Where images may lie: below the roots that are named, whatever their paths and links say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.load import fingerprint, load_records
from lora_llava.recipe.stages import DataSettings
from tests.unit.data.test_records import entry, load, refused


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A data directory `data`, an archive next to it, and links from one to the other."""
    for name in ("data/own.png", "archive/xray/one.png", "archive/two.png", "private/key.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "data/xray").symlink_to(tmp_path / "archive/xray")
    (tmp_path / "data/two.png").symlink_to(tmp_path / "archive/two.png")
    return tmp_path


def image_of(disk: Path, name: str, *roots: str, **settings: Any) -> Any:
    named = [str(disk / root) for root in roots]
    (record,) = load(disk / "data", [entry(image=name)], image_roots=named, **settings)
    assert record.image is not None
    return record.image


def refusal_of(disk: Path, name: str, *roots: str) -> str:
    return refused(disk / "data", [entry(image=name)], image_roots=[str(disk / root) for root in roots])


@pytest.mark.parametrize("name", ["xray/one.png", "two.png"])
def test_a_link_out_of_the_root_works_once_its_target_is_named(disk: Path, name: str) -> None:
    assert "in image_roots" in refusal_of(disk, name)
    image = image_of(disk, name, "archive")
    assert image.path == disk / "archive" / name
    assert image.key == f"archive/{name}"


def test_absolute_paths_below_a_root_are_taken(disk: Path) -> None:
    own, one = str(disk / "data/own.png"), str(disk / "archive/xray/one.png")
    assert image_of(disk, own).key == image_of(disk, "own.png").key == "own.png"
    assert "must be relative to image_root" in refusal_of(disk, one)
    assert image_of(disk, one, "archive").identity == image_of(disk, "xray/one.png", "archive").identity


def test_a_root_that_is_a_link_is_what_it_points_to(disk: Path) -> None:
    (disk / "mount").symlink_to(disk / "archive")
    assert image_of(disk, "two.png", "mount").path == disk / "archive/two.png"
    assert image_of(disk, str(disk / "mount/two.png"), "mount").path == disk / "archive/two.png"


@pytest.mark.fault("images: paths out of the root, by .., links or absolute paths")
@pytest.mark.parametrize(
    "name",
    ["../private/key.png", "xray/../../private/key.png", "{disk}/private/key.png", "{disk}/archive/../private/key.png",
     "{disk}/archive-2/key.png", "{disk}/archivekey.png", "to_private/key.png", "xray/to_private/key.png", "key.png",
     "loop/key.png", "loop.png", "{disk}/archive/xray/up/private/key.png", "/proc/self/root{disk}/private/key.png",
     "\\..\\private\\key.png", "file://{disk}/private/key.png"],
)  # fmt: skip
def test_nothing_leaves_the_named_roots(disk: Path, name: str) -> None:
    (disk / "archive-2").mkdir()
    for path in ("archive-2/key.png", "archivekey.png"):
        os.link(disk / "private/key.png", disk / path)
    (disk / "data/to_private").symlink_to(disk / "private")
    (disk / "archive/xray/to_private").symlink_to("../../private")
    (disk / "archive/xray/up").symlink_to(disk)
    (disk / "data/key.png").symlink_to(disk / "private/key.png")
    (disk / "data/loop").symlink_to(disk / "data/loop")
    (disk / "data/loop.png").symlink_to("loop.png")
    message = refusal_of(disk, name.replace("{disk}", str(disk)), "archive")
    assert message.startswith("train.json, record 1 (id 000): image: ")


def test_keys_do_not_depend_on_where_the_roots_are(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    image_of(disk, "two.png", "archive")
    moved = tmp_path_factory.mktemp("moved")
    for name in ("data", "archive"):
        (disk / name).rename(moved / name)
    (moved / "data/two.png").unlink()
    (moved / "data/two.png").symlink_to(moved / "archive/two.png")
    settings = DataSettings(path=str(moved / "data/train.json"), image_roots=[str(moved / "archive")])
    (record,) = load_records(settings)
    assert record.image is not None
    assert record.image.key == "archive/two.png"
    assert len(fingerprint([record])) == 64


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("a.jpg", "a.JPG"), ("a.JPEG", "a.jpg"), ("a.png", "a.jpg"), ("a.tif", "a.tiff"), ("a.png", "a"),
     ("scan.1.png", "scan.1"), ("scan.1.png", "scan.1.bmp")],
)  # fmt: skip
def test_another_extension_is_found_and_recorded(disk: Path, stored: str, asked: str) -> None:
    Image.new("RGB", (2, 2)).save(disk / "data/x.png")
    (disk / "data/x.png").rename(disk / "data" / stored)
    image = image_of(disk, asked)
    assert (image.path, image.key, image.asked) == (disk / "data" / stored, stored, asked)
    assert image_of(disk, stored).asked == ""


def test_of_several_extensions_none_is_guessed(disk: Path) -> None:
    for name in ("b.png", "b.webp"):
        Image.new("RGB", (2, 2)).save(disk / "data" / name)
    message = refusal_of(disk, "b.jpg")
    assert "b.jpg (train.json, record 1 (id 000); there is b.png, b.webp: name one of them)" in message
    # One that differs in case alone is the one that was meant.
    assert image_of(disk, "b.PNG").key == "b.png"


@pytest.mark.parametrize("name", ["A.png", "aa.jpg", "a.txt", "a.png.jpg"])
def test_another_name_is_missing(disk: Path, name: str) -> None:
    for stored in ("a.png", "a.json"):
        Image.new("RGB", (2, 2)).save(disk / "data" / stored, "PNG")
    assert "is missing in" in refusal_of(disk, name)


def test_another_extension_behind_a_link_stays_inside(disk: Path) -> None:
    (disk / "data/key.png").symlink_to(disk / "private/key.png")
    assert "is a link out of image_root" in refusal_of(disk, "key.jpg")
    (disk / "data/folder.png").mkdir()
    assert "is not a file" in refusal_of(disk, "folder.jpg")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("C:\\data\\own.png", "own.png"),
        ("file:///home/me/data/sub/in.png", "sub/in.png"),
        ("https://host/own.png", "own.png"),
        ("/mnt/data/sub/in.png", "sub/in.png"),
        ("data/own.png", "own.png"),
        ("in.png", "sub/in.png"),
        ("sub/IN.PNG", "sub/in.png"),
        ("sub\\IN.PNG", "sub/in.png"),
        ("other.png", ""),
        ("C:\\..\\own.png", ""),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_an_image_that_is_not_where_the_data_say_is_named_where_it_may_be(
    disk: Path, name: str, near: str, skip: bool
) -> None:
    (disk / "data/sub").mkdir()
    Image.new("RGB", (2, 2)).save(disk / "data/sub/in.png")
    settings = {"on_bad_record": "skip", "max_bad_records": 1} if skip else {}
    refusal = refused(disk / "data", [entry(image=name)] * (2 if skip else 1), **settings)
    assert ("there is" in refusal) is bool(near)
    assert not near or f"; there is '{near}' in image_root" in refusal


def test_paths_of_windows_are_read(disk: Path) -> None:
    (disk / "data/sub").mkdir()
    Image.new("RGB", (2, 2)).save(disk / "data/sub/in.png")
    assert image_of(disk, "sub\\in.png").identity == image_of(disk, "sub/in.png").identity
    # A name that has one is left as it is.
    Image.new("RGB", (3, 3)).save(disk / "data/sub\\in.png")
    assert image_of(disk, "sub\\in.png").key == "sub\\in.png"
