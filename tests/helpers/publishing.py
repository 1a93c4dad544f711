"""A user's home with a run to publish, and the command that publishes it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from lora_llava.cli import cli
from tests.helpers.artifacts import FILES
from tests.helpers.loopback_hub import NAMESPACE

USER = "canary-user-77c1"
REPO = f"{NAMESPACE}/tiny"
ARTIFACT_FILES = FILES | {".gitattributes", "README.md"}
RECIPE = """\
version: 1
name: tiny
output_dir: ./..
base: {{model_name_or_path: ../../../../{user}/models/base}}
stages:
  instruct: {{data: {{path: ../../../../home/{user}/data/train.json, image_root: ../../../../home/{user}/data/images}}}}
"""


def push(source: Path, *options: str, repo: str = REPO) -> Result:
    return CliRunner().invoke(cli, ["push", str(source), repo, *options])
