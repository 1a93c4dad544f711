"""docs/faults.md from the `fault` markers of the tests: `python -m tests.faults > docs/faults.md`."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
SECTIONS = ("recipe", "images", "records", "checkpoints", "training")
"""What a fault is in: the first word of its marker."""
HEAD = """# Faults, and the tests that hold them

What can be wrong with a recipe, data or a run, and the tests that show how the kit reacts. Made from the tests'
`@pytest.mark.fault` markers by `python -m tests.faults > docs/faults.md`; a test holds the two together.
"""
TAIL = """
One fault cannot occur, padding that changes the loss: training rows have no padding. The quickstart reads only named
members of files whose hash it knows.

`make fuzz` runs the recipe loader, the record reader, the image decoder, the encoder and every loader of models on ten
thousand broken inputs each, `make torture` kills runs at twenty moments and resumes them. Short forms of both are part
of the tests.
"""


def marked_tests(path: Path) -> list[tuple[str, str]]:
    """Return (fault, test) for each `fault` marker of a file."""
    return [
        (ast.literal_eval(decorator.args[0]), node.name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault"
    ]


def faults() -> dict[str, list[str]]:
    """Map each fault to the tests that hold it, in the order of SECTIONS and of the alphabet."""
    held: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for fault, name in marked_tests(path):
            held[fault].append(f"`{path.relative_to(TESTS.parent).as_posix()}`: {name}")
    return {fault: held[fault] for fault in sorted(held, key=lambda text: (SECTIONS.index(text.split(":")[0]), text))}


def page() -> str:
    """Write docs/faults.md."""
    lines = [HEAD]
    section = ""
    for fault, tests in faults().items():
        name, _, text = fault.partition(": ")
        if name != section:
            section = name
            lines.append(f"\n## {name.capitalize()}\n")
        lines.append(f"- {text}")
        lines += [f"  - {test}" for test in tests]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n" + TAIL


if __name__ == "__main__":
    sys.stdout.write(page())
