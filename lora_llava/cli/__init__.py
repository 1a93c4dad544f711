"""The command line: a thin layer over functions, which the commands import late so that help is fast."""

from __future__ import annotations

import os

import click

from lora_llava import __version__
from lora_llava.cli.chat import chat
from lora_llava.cli.check import check
from lora_llava.cli.common import PROCESS_ENDS, KitGroup
from lora_llava.cli.data import convert_, init
from lora_llava.cli.evaluate import evaluate
from lora_llava.cli.inspect import env, inspect
from lora_llava.cli.predict import pairs, predict
from lora_llava.cli.push import push
from lora_llava.cli.shipping import export, import_, merge
from lora_llava.cli.train import finetune, quickstart, recipes


@click.group(cls=KitGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(debug: bool) -> None:
    """Fine-tune LLaVA-1.5-style models on your own images, on one GPU."""
    if not debug:
        # Here, since commands read data at different moments; `datasets` looks at it when it is imported.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    _share_cores()


def _share_cores() -> None:
    """Let PyTorch's threads sleep sooner while they wait for each other, unless the environment says how they wait.

    They wait for each other many times in a pass. By default (libgomp: 300,000 rounds, about 3 ms) they do so in a
    loop, on cores that another process, or even the thread that they wait for, could use. PyTorch must not be imported
    yet; docs/memory.md has the effect.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


for command in (
    quickstart,
    init,
    convert_,
    check,
    finetune,
    evaluate,
    predict,
    pairs,
    chat,
    merge,
    export,
    import_,
    push,
    inspect,
    recipes,
    env,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; exit with the code of the error, if any."""
    cli(prog_name="lora-llava", obj=PROCESS_ENDS)
