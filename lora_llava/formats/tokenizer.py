"""Load a stranger's tokenizer: what the library in Rust prints or panics about does not reach the user raw."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_llava.errors import ModelError, is_panic
from lora_llava.system.files import read_json
from lora_llava.system.text import first_line

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of which transformers takes content that could not be written again."""


def read_tokenizer(source: Path | str, **options: Any) -> Any:
    """Load the tokenizer of a model, a directory or a Hub id; `options` are those of `AutoTokenizer.from_pretrained`.

    Raises ModelError for damaged settings and where the library panics, and what transformers raises for the rest.
    """
    for name in _SETTINGS:
        read_json(Path(source) / name)
    try:
        # What is said while files are downloaded is for the user.
        with _silent() if Path(source).is_dir() else nullcontext():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ModelError(
            f"{source}: its tokenizer cannot be read ({first_line(error)}). One of its files is damaged; download it "
            "again."
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what is written to the terminal past Python: names of unknown options, unescaped, and panics."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {}
    # A process may have closed them.
    with suppress(OSError):
        saved = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in saved:
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
