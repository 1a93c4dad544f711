"""Hide messages of libraries that a user of this package cannot act on.

Only these are hidden, so that a script that imports the package keeps its logging and warnings.
"""

from __future__ import annotations

import logging
import warnings

ADVICE = {
    # bitsandbytes recommends the package `kernels`; results are the same without it.
    "bitsandbytes.backends.cpu.ops": "kernels-community",
}
"""Logger name to a part of the message."""
_WARNINGS = (
    # transformers, about an attribute that PEFT still reads.
    "`is_gradient_checkpointing` is deprecated",
)
"""Prefixes of warnings."""


class _WithoutAdvice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is logged."""
        return ADVICE.get(record.name, "\0") not in str(record.msg)


_FILTER = _WithoutAdvice()


def hold_back_advice() -> None:
    """Hide the messages in `ADVICE` and `_WARNINGS`; calling it again has no effect."""
    for name in ADVICE:
        logging.getLogger(name).addFilter(_FILTER)
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", message=text)


def show_advice() -> None:
    """Show the messages again, for --debug."""
    for name in ADVICE:
        logging.getLogger(name).removeFilter(_FILTER)
    for text in _WARNINGS:
        warnings.filterwarnings("default", message=text)
