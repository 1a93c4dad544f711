"""`python -m lora_llava`: the command line, where its script is not on the PATH."""

from __future__ import annotations

from lora_llava.cli import main

if __name__ == "__main__":
    main()
