"""Read an adapter_config.json with PEFT alone, of any version: ARTIFACT QUESTIONS OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft


def main(artifact: str, questions: str, output: str) -> None:
    """Compare what PEFT makes of the settings with the settings; the questions are not asked."""
    del questions
    written = json.loads((Path(artifact) / "adapter_config.json").read_text(encoding="utf-8"))
    config = peft.LoraConfig.from_pretrained(artifact)
    # PEFT holds some lists as sets.
    read = {name: getattr(config, name) for name in written}
    read = {name: sorted(value) if isinstance(value, set) else value for name, value in read.items()}
    wrong = [
        f"{name} is {read[name]!r:.80}, written {value!r:.80}" for name, value in written.items() if read[name] != value
    ]
    if wrong:
        raise SystemExit("; ".join(wrong))
    Path(output).write_text(json.dumps({"answers": [], "read": len(written)}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
