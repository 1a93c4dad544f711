"""Lines that libraries print at import and in use, and that are about nothing a user of the kit can change.

Only these are held back, so that a script which imports the kit keeps its own logging and warnings.
"""

from __future__ import annotations

import logging
import warnings

ADVICE = {
    # bitsandbytes asks for the package `kernels`, without which it computes the same.
    "bitsandbytes.backends.cpu.ops": "kernels-community",
}
"""By the name of the logger: a part of the message."""
WARNINGS = (
    # Of transformers about a name that PEFT still asks for.
    "`is_gradient_checkpointing` is deprecated",
)
"""Beginnings of warnings."""


class _WithoutAdvice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown."""
        return ADVICE.get(record.name, "\0") not in str(record.msg)


_FILTER = _WithoutAdvice()


def hold_back_advice() -> None:
    """Hide the lines of `ADVICE` and `WARNINGS`; called again, it changes nothing."""
    for name in ADVICE:
        logging.getLogger(name).addFilter(_FILTER)
    for text in WARNINGS:
        warnings.filterwarnings("ignore", message=text)


def show_advice() -> None:
    """Show them again, for --debug."""
    for name in ADVICE:
        logging.getLogger(name).removeFilter(_FILTER)
    for text in WARNINGS:
        warnings.filterwarnings("default", message=text)
