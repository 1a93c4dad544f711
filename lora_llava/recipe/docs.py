"""Generate docs/settings.md from the recipe types: `python -m lora_llava.recipe.docs > docs/settings.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_llava.recipe.errors import allowed, shown
from lora_llava.recipe.fields import OnResume, Settings, section_in, settings_of
from lora_llava.recipe.settings import Recipe
from lora_llava.system.table import markdown_table

_HEAD = """\
# All settings

Generated from the recipe types by `python -m lora_llava.recipe.docs`; a test checks that it is up to date. Set a value
in a recipe (YAML) under its sections, or on the command line by its dotted key:
`lora-llava finetune recipe.yaml stages.instruct.learning_rate=1e-4`. Names follow Hugging Face, PEFT and LLaVA.

A setting that has no effect in a recipe is an error; if it affects only speed or logging, it is a notice.

**On resume** says what a changed setting means for `--resume` (see [resume.md](resume.md)):
"""
_STAGES = ("stages.align", "stages.instruct", "stages.prefer")
_SHARED = ("stages.align.data", "stages.prefer.data", "evaluation.data")
"""Sections that are the same as `stages.instruct.data`."""


def settings_page() -> str:
    """Return the page: a table per section, a row per setting."""
    lines = [_HEAD, markdown_table(["on resume", "meaning"], [(_word(note), note.value) for note in OnResume])]
    for key, section in _sections(Recipe, ""):
        lines += ["", f"## {f'`{key}`' if key else 'The recipe'}", "", *_intro(key, section), "", *_table(key, section)]
    return "\n".join(lines) + "\n"


def _sections(section: type[Settings], key: str) -> Iterator[tuple[str, type[Settings]]]:
    """Yield the sections; those of the data, which all stages and the evaluation share, once."""
    yield key, section
    for name, field in section.model_fields.items():
        below = section_in(field.annotation)
        path = f"{key}.{name}" if key else name
        if below is not None and not path.startswith(_SHARED):
            yield from _sections(below, path)


def _intro(key: str, section: type[Settings]) -> list[str]:
    lines = [(section.__doc__ or "").strip().split("\n\n")[0]]
    if key == "stages.instruct.data":
        same = "`stages.align.data`, `stages.prefer.data` and `evaluation.data`"
        lines.append(f"The same for {same}; an evaluation has no `validation`, `merge_turns`, `weight` or `share`.")
    if key in _STAGES:
        lines.append("`data` is below.")
    return lines


def _table(key: str, section: type[Settings]) -> list[str]:
    prefix = f"{key}." if key else ""
    notes = {setting.key: _word(setting.on_resume) for setting in settings_of(Recipe)}
    rows = [
        (f"`{name}`", allowed(field), _default(field), field.description or "", notes[prefix + name])
        for name, field in section.model_fields.items()
        if section_in(field.annotation) is None
    ]
    below = [f"`{name}`" for name, field in section.model_fields.items() if section_in(field.annotation) is not None]
    table = [markdown_table(["setting", "takes", "default", "meaning", "on resume"], rows)] if rows else []
    return [*table, *([f"\nSections below: {', '.join(below)}."] if below else [])]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    return "" if value is PydanticUndefined else f"`{value if isinstance(value, str) else shown(value)}`"


def _word(note: OnResume) -> str:
    """Return the name of a class as the tables write it."""
    return note.name.lower().replace("_", " ")


if __name__ == "__main__":
    print(settings_page(), end="")  # noqa: T201 - the output of this command
