"""Read recipe files (YAML, overrides, paths; all problems reported at once) and write them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from lora_llava.errors import ArtifactError, HubError, RecipeError
from lora_llava.recipe.errors import problems_in
from lora_llava.recipe.fields import Names, Settings, is_local, packaged, section_in, settings_of
from lora_llava.recipe.names import meant_by
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.start import continued
from lora_llava.recipe.unused import unused_settings
from lora_llava.system.hub.artifact import hub_source, is_hub_name, located
from lora_llava.system.text import printable

MAX_BYTES = 1 << 20
"""Maximum size of a recipe file, in bytes."""

_TAG = "tag:yaml.org,2002:"
_NUMBERS_AND_BOOLS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        "-+0123456789.",
    ),
}
"""Numbers and booleans as in YAML 1.2, not 1.1 (where `yes`, `1:30` and `010` would be a bool, 90 and 8)."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `1e-4` is a number, `yes` is text; duplicate keys and aliases are errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # the stubs leave it out
            raise RecipeError(f"line {mark.line + 1}: aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise RecipeError(f"line {key.start_mark.line + 1}: a key must be a simple word")
            if key.value in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: key {key.value!r} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that a YAML 1.1 or 1.2 reader would not read as a string."""


_REPLACED = {_TAG + name for name in (*_NUMBERS_AND_BOOLS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_form, _first) in _NUMBERS_AND_BOOLS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _form, list(_first))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, and fill in unset values from the artifact in `start_from`.

    Relative paths in the file are resolved against its directory, those in overrides against the current directory.
    Raises RecipeError with all problems, one per line, including settings that have no effect.
    """
    path = Path(path)
    recipe = read_recipe(path, overrides)
    no_effect = [f"{path}: {unused}" for unused in unused_settings(recipe) if unused.refused]
    if no_effect:
        raise RecipeError("\n".join(no_effect))
    return continued(_with_start(recipe))


def _with_start(recipe: Recipe) -> Recipe:
    """Return the recipe with the directory of `start_from`, downloaded if it is on the Hub."""
    if recipe.start_from is None:
        return recipe
    try:
        return recipe.model_copy(update={"start_from": located(recipe.start_from)})
    except (ArtifactError, HubError) as error:
        raise type(error)(f"start_from: {error}") from error


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, but allow unused settings and ignore `start_from`: for recipes that a run wrote."""
    data = _read(path)
    _resolve_paths(data, path.resolve().parent, str(path))
    problems = []
    for override in overrides:
        try:
            _apply(data, override)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems_in(error))) from error


def dump_resolved(recipe: Recipe, directory: Path) -> str:
    """Return the whole recipe as YAML, with paths relative to `directory`."""
    data = recipe.plain()
    if recipe.base.model_name_or_path is not None:
        # The defaults for a new model need not hold for the existing one, so leave them out.
        absent = recipe.base.of_new_model().keys() - recipe.base.model_fields_set
        data["base"] = {key: value for key, value in data["base"].items() if key not in absent}
    # load_recipe resolves against the real directory: through a link, `..` would lead elsewhere.
    start = directory.resolve()
    if recipe.start_from is not None and (source := hub_source(recipe.start_from)):
        data["start_from"] = str(source)
    data["output_dir"] = _dotted(os.path.relpath(recipe.resolved_output_dir, start))
    for holder, key, value, _ in _paths_in(data):
        if Path(value).is_absolute():
            holder[key] = _dotted(os.path.relpath(value, start))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def one_line(value: Any) -> str:
    """Return a value as a recipe has it in one line, quoted where any reader of YAML would not see text."""
    options: dict[str, Any] = {"default_flow_style": True, "width": math.inf, "allow_unicode": True, "sort_keys": False}
    text: str = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("\n").removesuffix("\n...")


def dump_portable(path: Path) -> str:
    """Return the recipe file at `path` with each local path reduced to its last part, for publishing.

    Everything else is unchanged; the file need not be a complete recipe.
    """
    data = _read(path)
    data.pop("output_dir", None)
    for holder, key, value, _ in _paths_in(data):
        if is_local(value):
            name = Path(value).name
            holder[key] = _dotted("." if name == ".." else name)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(packaged("recipes").glob("*.yaml"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"recipe {path} is not a regular file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RecipeError(f"recipe {path} has {size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        content = "nothing" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values; the file contains {content}")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML. Raises a one-line RecipeError that begins with `where`, however broken the text is."""
    try:
        # A copy: overrides and paths change what was read.
        return deepcopy(_load_yaml(text))
    except RecipeError as error:
        raise RecipeError(f"{where}, {error}") from error
    # ValueError: an integer with thousands of digits; RecursionError: thousands of brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from error


@lru_cache(maxsize=16)
def _load_yaml(text: str) -> Any:
    """Load YAML. A run reads its own recipes several times, and PyYAML takes tens of milliseconds for each."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise RecipeError(f"override {override!r:.80}: write it as key.sub=value")
    _check_key(key)
    # Build a separate tree: the value may be a mapping that contains paths.
    tree: dict[str, Any] = {names[-1]: _value(text, key)}
    for name in reversed(names[:-1]):
        tree = {name: tree}
    _resolve_paths(tree, Path.cwd(), f"override {key}")
    for name in names[:-1]:
        if isinstance(data.get(name), list):
            raise RecipeError(f"override {key}: {name} is a list of sources; write the whole list, as {name}=[...]")
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data, tree = data[name], tree[name]
    data[names[-1]] = tree[names[-1]]


def _value(text: str, key: str) -> Any:
    """Parse the value of an override. Unlike in a file, " #" begins no comment: paths and texts may hold it."""
    value, text = parse_yaml(text, f"override {key}"), text.strip()
    is_cut = isinstance(value, str | None) and text.removeprefix(value or "").lstrip().startswith("#")
    return text if is_cut else value


def _check_key(key: str) -> None:
    """Raise RecipeError for a key that recipes do not have."""
    section: type[Settings] | None = Recipe
    names = key.split(".")
    for depth, name in enumerate(names):
        if section is None:
            above = ".".join(names[:depth])
            raise RecipeError(f"override {printable(key)}: unknown key {printable(key)}: {above} has no keys below it")
        if name not in section.model_fields:
            unknown = printable(".".join(names[: depth + 1]))
            meant = meant_by(names[:depth], name, section)
            raise RecipeError(f"override {printable(key)}: unknown key {unknown}{meant}")
        section = section_in(section.model_fields[name].annotation)


def _paths_in(data: dict[str, Any]) -> list[tuple[Any, Any, str, bool]]:
    """List every text that may be a path: its mapping or list, its key or index, and whether it can only be a path."""
    paths: list[tuple[Any, Any, str, bool]] = []
    for setting in settings_of(Recipe):
        if not setting.may_be_path:
            continue
        *above, key = setting.key.split(".")
        holders: list[Any] = [data]
        for name in above:
            values = [holder.get(name) for holder in holders if isinstance(holder, dict)]
            # Several sources are a list.
            holders = [item for value in values for item in (value if isinstance(value, list) else [value])]
        for holder in holders:
            value = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(value, str):
                # `start_from` is a path, unless it has the form of an artifact on the Hub.
                only_path = setting.names is Names.PATH and not (setting.key == "start_from" and is_hub_name(value))
                paths.append((holder, key, value, only_path))
            elif isinstance(value, list) and get_origin(setting.field.annotation) is list:
                paths += [(value, index, text, True) for index, text in enumerate(value) if isinstance(text, str)]
    return paths


def _resolve_paths(data: dict[str, Any], directory: Path, where: str) -> None:
    for holder, key, value, is_path in _paths_in(data):
        try:
            holder[key] = _resolve(key, value, directory, is_path=is_path)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error


def _resolve(key: str, value: str, directory: Path, *, is_path: bool) -> str:
    """Make a path absolute; keep a possible Hub id unless a path of that name exists."""
    if not value:
        raise RecipeError(f"{key}: is empty; give a path, or remove the key")
    if "\0" in value:
        raise RecipeError(f"{key}: {printable(value, 60)} contains a NUL character, which no path has; remove it")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{key}: {value!r} names a user who has no home directory; write the path out") from error
    try:
        exists = (directory / path).exists()
    except OSError as error:  # such as a name of more than 255 bytes
        raise RecipeError(f"{key}: {value[:60]!r}... is not a valid path: {error.strerror}; give another") from error
    if is_path or is_local(value) or (":" not in value and exists):
        return os.path.normpath(directory / path)
    return value


def _dotted(path: str) -> str:
    """Prefix a relative path with `./`, so that it is not read as a Hub id."""
    return path if path.startswith(".") else f"./{path}"
