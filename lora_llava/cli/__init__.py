"""The command line: a thin layer over functions, imported inside the commands so that help is quick."""

from __future__ import annotations

import click

from lora_llava import __version__
from lora_llava.cli.check import check
from lora_llava.cli.common import PROCESS_ENDS, KitGroup
from lora_llava.cli.convert import export, import_, merge
from lora_llava.cli.evaluate import chat, evaluate
from lora_llava.cli.inspect import env, inspect
from lora_llava.cli.push import push
from lora_llava.cli.train import finetune, quickstart, recipes


@click.group(cls=KitGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and what libraries warn of.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(debug: bool) -> None:
    """Fine-tune LLaVA-1.5-style models on your own images, on one GPU."""


for command in (quickstart, check, finetune, evaluate, chat, merge, export, import_, push, inspect, recipes, env):
    cli.add_command(command)


def main() -> None:
    """Run the command line; exits with the error's code."""
    cli(prog_name="lora-llava", obj=PROCESS_ENDS)
