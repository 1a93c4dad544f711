"""The forms of a command, such as the formats of an export: each in its own module, with options of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lora_llava.errors import RecipeError
from lora_llava.system.text import listed


@dataclass(frozen=True, slots=True)
class Form:
    """The function that reads or writes a form; its module, with what it needs, is imported when it is called."""

    module: str
    function: str
    takes: tuple[str, ...]
    """Names of the options that it takes, of those that not every form takes."""

    def __call__(self, *args: Any) -> Any:
        """Import the function and call it."""
        return getattr(import_module(self.module), self.function)(*args)


def refuse_unused(forms: Mapping[str, Form], name: str, given: Iterable[str], prefix: str = "") -> None:
    """Raise RecipeError for a given option that the form `name` does not take; `prefix`: what precedes that name."""
    for option in given:
        if option not in forms[name].takes:
            takers = listed([other for other, form in forms.items() if option in form.takes])
            option = f"--{option.replace('_', '-')}"
            raise RecipeError(f"{option} has no effect on {prefix}{name}, only on {takers}; leave it out")
