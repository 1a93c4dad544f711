"""The templates: how a conversation is written for the model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from lora_llava.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Template:
    """How turns are written for the model; the strings are trusted, special tokens in them are parsed."""

    name: str
    system: str = ""
    """Text before the first turn; without any, `system_prefix` and `system_suffix` fall away too."""
    system_prefix: str = ""
    system_suffix: str = ""
    user_prefix: str = ""
    assistant_prefix: str = ""
    """Stands between a question and its answer."""
    end: str | None = None
    """Supervised end of an answer; None is the tokenizer's own end token."""
    separator: str = ""
    """Stands between the end of an answer and the next turn."""
    markers: tuple[str, ...] = ()
    """Special tokens of the strings above; the tokenizer must have them."""
    caption_only: bool = False
    """The user's words are dropped: image and caption, nothing else (stage 1 of LLaVA)."""

    @property
    def opening(self) -> str:
        """What stands before the first user text."""
        system = f"{self.system_prefix}{self.system}{self.system_suffix}" if self.system else ""
        return system + self.user_prefix


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", end="\n", caption_only=True),
    "vicuna_v1": Template(
        "vicuna_v1",
        system=_VICUNA_SYSTEM,
        system_suffix=" ",
        user_prefix="USER: ",
        assistant_prefix=" ASSISTANT: ",
    ),
    "chatml": Template(
        "chatml",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        assistant_prefix="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        # Only between turns: after the last answer it would be computed and never looked at.
        separator="\n",
        markers=("<|im_start|>", "<|im_end|>"),
    ),
}


def get_template(name: str, system: str | None = None) -> Template:
    """Look up a template; `system` replaces its system text (empty: none). Raises RecipeError."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TEMPLATES)}."
        raise RecipeError(f"template: no template is called {name!r}; {hint}")
    template = TEMPLATES[name]
    if system is None:
        return template
    if template.caption_only and system:
        raise RecipeError(f"system: template {name} has no system text; remove it or choose another template")
    return replace(template, system=system)
