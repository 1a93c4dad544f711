"""The rules of the code's shape: one import direction, small files and functions, full annotations."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import create_model

import lora_llava
from lora_llava.recipe.docs import settings_page
from lora_llava.recipe.fields import Names, OnResume, Settings, settings_of
from lora_llava.recipe.settings import Recipe

PACKAGE = Path(lora_llava.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_MODULES, MAX_ENTRIES = 400, 50, 7, 12, 17

# From the bottom up: a module imports its own package and the packages below it, nothing above.
# `data` and `modeling` do not know each other. The package's own `__init__` offers names of all, lazily.
LAYERS = [
    {"errors"},
    {"system"},
    {"recipe"},
    {"conversation"},
    {"formats"},
    {"data", "modeling"},
    {"run_directory"},
    {"artifact"},
    {"planning"},
    {"generation"},
    {"evaluation"},
    {"training"},
    {"shipping"},
    {"doctor"},
    {"quickstart"},
    {"cli"},
    {"lora_llava", "__main__"},
]
LIGHT = """
lora_llava
lora_llava.cli
lora_llava.conversation.encode
lora_llava.data.images.read
lora_llava.data.load
lora_llava.data.packing
lora_llava.doctor.compare
lora_llava.doctor.survey
lora_llava.evaluation.scoring.metrics
lora_llava.planning.preflight.run
lora_llava.recipe.file
lora_llava.run_directory.lock
lora_llava.run_directory.output
lora_llava.shipping.export
lora_llava.system.files
lora_llava.system.text
""".split()
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


KNOWN = {name_of(path) for path in MODULES}


@dataclass
class Function:
    """What the rules look at in a function, of its parameters all but `self` and `cls`."""

    name: str
    lines: int
    has_return_type: bool
    parameters: list[str]
    bare: list[str]


@dataclass
class Source:
    """What the rules look at in a file; relative imports by their lines."""

    functions: list[Function] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    relative_imports: list[int] = field(default_factory=list)


@cache
def source_of(path: Path) -> Source:
    """Parse a file, once for all rules."""
    source = Source()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            source.imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module is None):
            source.relative_imports.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source.imports |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [one for one in arguments if one.arg not in ("self", "cls")]
            bare = [one.arg for one in named if one.annotation is None]
            lines = node.end_lineno - node.lineno + 1
            names = [one.arg for one in named]
            source.functions.append(Function(node.name, lines, node.returns is not None, names, bare))
    return source


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    source = source_of(path)
    assert not source.relative_imports, (
        f"{path.name}, lines {source.relative_imports}: relative imports, which these rules do not see"
    )
    return source.imports & KNOWN


def layer_of(unit: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit in layer)


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) > 20
    assert {unit_of(name_of(path)) for path in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    unit = unit_of(name_of(path))
    for target in imports(path) - {"lora_llava"}:
        other = unit_of(target)
        assert other == unit or layer_of(other) < layer_of(unit), f"{name_of(path)} imports {target}"


def test_no_cycles() -> None:
    graph = {name_of(path): imports(path) - {name_of(path)} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name] - {"lora_llava"}:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(graph)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    for function in source_of(path).functions:
        assert function.lines <= MAX_FUNCTION_LINES, function.name
    if path != Path(__file__):
        assert not UNFINISHED.search(text)


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_folders_are_narrow(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= MAX_MODULES
    if folder == PACKAGE:
        packages = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
        assert len(modules) + len(packages) <= MAX_ENTRIES


def test_unit_tests_mirror_the_packages() -> None:
    folders = {path.parent.name for path in (ROOT / "tests/unit").glob("*/__init__.py")}
    assert folders <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(folders) > 10


def test_contributing_lists_every_entry() -> None:
    [tree] = re.findall(
        r"```\nlora_llava/\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
    lines = tree.splitlines()
    inner = [line.split()[0].rstrip("/") for line in lines if re.match(r"  \S", line)]
    outer = [line.split()[0].rstrip("/") for line in lines if re.match(r"\S", line)]
    assert sorted(inner) == sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert [name for name in outer if not (ROOT / name).exists()] == []
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md", "docs", "recipes", "tests"} <= set(outer)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_have_few_parameters(path: Path) -> None:
    for function in source_of(path).functions:
        assert len(function.parameters) <= MAX_PARAMETERS, f"{function.name}: {function.parameters}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_annotated(path: Path) -> None:
    for function in source_of(path).functions:
        assert function.has_return_type, function.name
        assert not function.bare, f"{function.name}: {function.bare}"


def test_the_ignore_index_is_defined_once() -> None:
    defined = [path for path in MODULES if re.search(r"^IGNORE_INDEX\b.*=", path.read_text(encoding="utf-8"), re.M)]
    assert [name_of(path) for path in defined] == ["lora_llava.conversation.encode"]


def test_every_setting_has_an_on_resume_class() -> None:
    keys = [setting.key for setting in settings_of(Recipe)]
    assert len(keys) == len(set(keys)) > 100


def test_every_text_setting_says_what_it_names() -> None:
    texts = {setting.key: setting.names for setting in settings_of(Recipe) if setting.names is not None}
    assert {texts["output_dir"], texts["base.vision_tower"], texts["base.revision"]} == set(Names)


@pytest.mark.parametrize(
    ("annotation", "missing"),
    [(int, "OnResume"), (Annotated[str | None, OnResume.FREE], "Names"), (Annotated[str, Names.TEXT], "OnResume")],
)
def test_a_setting_without_its_classes_is_refused(annotation: Any, missing: str) -> None:
    section = create_model("Section", __base__=Settings, key=(annotation, ...))
    with pytest.raises(TypeError, match=rf"Section\.key .*add an? {missing}$"):
        list(settings_of(section))


def test_the_page_of_all_settings_is_up_to_date() -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: python -m lora_llava.recipe.docs > docs/settings.md"
    assert "|  |" not in page, "a setting without a meaning: write a docstring below it"


@pytest.fixture(scope="module")
def heavy_after() -> dict[str, list[str]]:
    """The heavy packages in a process that imports the light modules, one after the other, after each of them."""
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(json.dumps(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True)
    return dict(zip(LIGHT, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(heavy_after: dict[str, list[str]], module: str) -> None:
    assert heavy_after[module] == []
