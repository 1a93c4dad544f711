"""List the image files below a directory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lora_llava.data.images.read import FORMATS
from lora_llava.data.images.root import IMAGE_SUFFIXES
from lora_llava.errors import DataError

_READ = (*IMAGE_SUFFIXES, ".jfif")
"""Extensions by which `datasets` takes a file for an image, as far as the kit reads them."""


class Listing(NamedTuple):
    """The files below a directory, as sorted paths relative to it."""

    images: list[str]
    others: list[str]
    """Files that are not images, neither by name nor by content."""


def list_images(directory: Path) -> Listing:
    """List the files below a directory, without hidden ones; links to directories are not followed.

    Raises DataError if it is not a directory, cannot be read, or holds no image.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: {'is not a directory' if directory.exists() else 'does not exist'}; correct it")
    listing = Listing([], [])
    for folder, folders, names in os.walk(directory, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                # A file with the name of an image is meant to be one: if it is damaged, that is reported.
                is_image = name.lower().endswith(IMAGE_SUFFIXES) or _has_image_header(path)
                (listing.images if is_image else listing.others).append(path.relative_to(directory).as_posix())
    if not listing.images:
        raise DataError(f"{directory}: holds no images (known formats: {', '.join(FORMATS)}); correct it")
    return Listing(sorted(listing.images), sorted(listing.others))


def passed_over(directory: Path) -> list[str]:
    """List the files in folders of images that a reader of a directory leaves out: by their names they are no images.

    Tables and cards are not among them. Raises DataError as `list_images` does.
    """
    names = (name for names in list_images(directory) for name in names if "/" in name)
    return sorted(name for name in names if not name.lower().endswith(_READ) and Path(name).stem != "metadata")


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}; correct its permissions")


def _has_image_header(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path, formats=FORMATS).close()
    except Exception:  # noqa: BLE001 - a decoder raises anything for bytes that it does not know
        return False
    return True
