"""Writes `docs/performance.md` and its chart from `benchmarks/results/`: `python -m benchmarks.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
OURS = "lora-llava"
SETS = {
    "S1": "captions, stage 1",
    "V1": "1 question per image",
    "V4": "4 questions per image",
    "V8": "8 questions per image",
    "V11": "11 questions per image",
    "MX": "mixed lengths, several turns, text only",
}
FIGURES = " supervised tokens/s | computed tokens/s | peak memory, MiB | useful FLOPs | computed FLOPs | first loss |"
HEAD = """# Speed and memory, compared with other trainers

Written by `python -m benchmarks.report` from `benchmarks/results/`. Every trainer trains the same model with the same
LoRA on the same token ids, labels and images, in its own process; their steps alternate, and the median counts. A set
is ranked only if first losses, gradient norms of LoRA and projector, and numbers of supervised tokens agree.

*FLOPs* are a fraction of what a large matrix product reaches on the same machine, counted as four per weight of the
language model's linear layers and token: *computed*, for the tokens that passed through the model; *useful*, for those
that would have passed with every question in its own sequence. So a trainer that shares images can exceed 1.

![questions per second, relative to the fastest other trainer](performance.png)
"""


def section(report: dict[str, Any]) -> str:
    """Write one file's measurements as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"## {report['machine']}, model {report['model']}, {report['date']}",
        "",
        f"Commit {report['commit']}; {versions}.",
        "",
        f"| set | kit | questions/s | speedup of lora-llava |{FIGURES}",
        f"|---|---|---:|---:|{'---:|' * FIGURES.count('|')}",
    ]
    for result in report["results"]:
        ours = result["peers"][OURS]["questions_per_second"]
        card = f", {result['cap']:g} GiB" if result.get("cap") else ""
        for name, row in result["peers"].items():
            ratio = f"{ours / row['questions_per_second']:.2f}" if result["ranked"] else "not ranked"
            lines.append(f"| {result['set']}: {SETS[result['set']]}{card} | {name} | {_figures(row, ratio)} |")
    return "\n".join([*lines, "", *(ladder(report["ladder"]) if report["ladder"] else [])])


def ladder(result: dict[str, Any]) -> list[str]:
    """Write what each part contributes."""
    # Measured with an earlier version, if it says so.
    version = f", at commit {result['commit']}" if "commit" in result else ""
    lines = [
        f"What each part contributes, on {result['set']}{version}:",
        "",
        f"| with | questions/s | relative to the first |{FIGURES}",
        f"|---|---:|---:|{'---:|' * FIGURES.count('|')}",
    ]
    first = next(iter(result["peers"].values()))["questions_per_second"]
    for name, row in result["peers"].items():
        ratio = f"{row['questions_per_second'] / first:.2f}"
        lines.append(f"| {name} | {_figures(row, ratio)} |")
    return [*lines, ""]


def _figures(row: dict[str, Any], ratio: str) -> str:
    return (
        f"{row['questions_per_second']:.2f} | {ratio} | {row['supervised_tokens_per_second']:.1f} | "
        f"{row['computed_tokens_per_second']:.0f} | {row['peak_bytes'] / 2**20:,.0f} | "
        f"{row['useful_utilization']:.2f} | {row['computed_utilization']:.2f} | {row['first_loss']:.4f}"
    )


def chart(report: dict[str, Any], path: Path) -> None:
    """Draw questions a second, each set's fastest peer as 1."""
    results = [result for result in report["results"] if result["ranked"]]
    names = list(results[0]["peers"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, name in enumerate(names):
        heights = []
        for result in results:
            best = max(row["questions_per_second"] for peer, row in result["peers"].items() if peer != OURS)
            heights.append(result["peers"][name]["questions_per_second"] / best)
        centers = [index + (number - (len(names) - 1) / 2) * 0.27 for index in range(len(results))]
        bars = axes.bar(centers, heights, width=0.25, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(results)), [result["set"] for result in results])
    axes.set_ylabel("questions a second,\nfastest other kit = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Write the page and its chart; the first file's measurements are drawn."""
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))
    ]
    (ROOT / "docs/performance.md").write_text("\n".join([HEAD, *map(section, reports)]), encoding="utf-8")
    chart(reports[0], ROOT / "docs/performance.png")


if __name__ == "__main__":
    main()
