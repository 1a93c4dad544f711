"""What the commands share: errors as one line, quiet libraries, the console, opening a recipe."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.errors import LoraLlavaError, RecipeError, RunInterruptedError
from lora_llava.system import quiet, text
from lora_llava.system.progress import hide, show_on

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.planning.preflight.setup import Start
    from lora_llava.recipe.settings import Recipe

INTERRUPTED = 130
"""Exit code of a command that was stopped from the keyboard, as shells have it."""
PROCESS_ENDS = "the process ends with the command"
"""Object of the context of a command that nothing follows in its process."""
_PLAIN_WIDTH = 160


class KitGroup(click.Group):
    """Commands in the order given; an error is one message on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order in which a user meets them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take --debug after a command's name too: that is where one adds it to a line that failed."""
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an exception becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = text.printable_lines(error.message)  # type: ignore[misc]  # final for other libraries
            raise
        except click.exceptions.Exit:
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nstopped", err=True)
            ctx.exit(INTERRUPTED)
        except RunInterruptedError as error:
            click.echo(text.printable_lines(str(error)), err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            # A closed pipe (`| head`) is click's to end quietly.
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            click.echo(text.printable_lines(f"Error: {describe(error, debug=ctx.params['debug'])}"), err=True)
            ctx.exit(error.exit_code if isinstance(error, LoraLlavaError) else 1)


def memory_size(value: str) -> int:
    """Read a size such as 12GiB or 11500 MiB as bytes; click names the option in its message."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size; write a number and GiB or MiB, such as 12GiB")
    # A card "of 12 GB" holds 12 GiB.
    return int(float(match[1]) * (2**30 if match[2][0] in "gG" else 2**20))


def file_size(value: str) -> int:
    """Read a size of files, such as 5GB, as bytes: of files, GB is 10^9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])(i?)B", value.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is not a size; write a number and MB or GB, such as 2GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMG".index(match[2].upper()) + 1))


def describe(error: Exception, *, debug: bool) -> str:
    """Write an error for the user: the kit's own in full, any other as one line that names it."""
    if isinstance(error, LoraLlavaError):
        return str(error)
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        line += " Lower tokens_per_micro_batch, or set gradient_checkpointing: true; --dry-run shows what to expect."
    return line if debug else f"{line} (run again with --debug for the traceback)"


def leave_torch_out(recipe: Recipe) -> None:
    """Let this process do without PyTorch, which reading a base's configuration and tokenizer does not need.

    transformers imports it wherever it finds it: 2.9 s of CPU time and 257 MB instead of 0.9 s and 68 MB (measured
    on two cores). It looks for it once; None in `sys.modules`, Python's way to have a module not found, stays for
    just as long, and transformers stays without it for the rest of the process. So PyTorch is kept in a process
    that goes on after the command, such as a script that calls `cli`; also where it is loaded already, where a GPU
    has to be asked what it can do, and for a GGUF base, which transformers reads with it alone.
    """
    from lora_llava.system.device import has_driver

    if click.get_current_context().find_root().obj != PROCESS_ENDS:
        return
    if "torch" in sys.modules or has_driver() or recipe.base.gguf_file is not None:
        return
    # transformers would say at its import that it found none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules["torch"] = None  # type: ignore[assignment]  # typeshed knows modules only
    from transformers.utils import is_torch_available

    is_torch_available()
    del sys.modules["torch"]


def quiet_libraries() -> None:
    """Keep the libraries' warnings and bars off the screen, unless --debug was given; imports transformers."""
    if not quiet_environment():
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def quiet_environment() -> bool:
    """Say what the libraries must find when they are imported to be quiet; False if --debug was given."""
    if click.get_current_context().find_root().params.get("debug"):
        quiet.show_advice()
        return False
    import logging
    import warnings

    # The tokenizers' own advice on forks, which this variable alone turns off.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Bars that transformers shows without asking its own settings; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    for library in ("bitsandbytes", "torch", "accelerate", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return True


def make_console(*, stderr: bool = False) -> Console:
    """Make the console of a command: as wide as the terminal, and wide enough for a line elsewhere.

    What the command does shows its progress there.
    """
    from lora_llava.cli.console import PlainConsole

    console = PlainConsole(stderr=stderr)
    if not console.is_terminal:
        console = PlainConsole(stderr=stderr, width=_PLAIN_WIDTH)
    context = click.get_current_context()
    context.call_on_close(partial(hide, show_on(console)))
    return console


def open_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Load the recipe file `name`; RecipeError tells apart a wrong path and the name of a bundled recipe."""
    from lora_llava.recipe.file import bundled_recipes, load_recipe

    path = Path(name)
    if not path.is_file():
        bundled = bundled_recipes()
        key = path.name.removesuffix(".yaml")
        if key in bundled:
            raise RecipeError(
                f"there is no file {name}; {key} is a recipe of the kit. Copy it first: lora-llava recipes copy {key}"
            )
        raise RecipeError(f"there is no recipe file {name}; the kit's own are {', '.join(sorted(bundled))}")
    return load_recipe(path, overrides)


def look_ahead(
    recipe: Recipe, file: str, console: Console, *, start: Start = "new", here: bool = True, data: bool = True
) -> None:
    """Run the preflight on the recipe of `file`; PreflightError lists all problems, notices are printed.

    `here`: it is to run on this machine, and is not only planned for another; `data`: all images are opened too.
    """
    from lora_llava.planning.preflight.run import check_setup
    from lora_llava.planning.preflight.setup import Setup

    quiet_environment()
    for notice in check_setup(Setup.of(recipe, start, Path(file), here=here), data=data):
        console.print(f"Note: {notice}", soft_wrap=True, markup=False)


def refuse_model(path: Path, base_model: str | None) -> None:
    """Raise PreflightError if an artifact's base, or a whole model, cannot be loaded by what its files tell."""
    from lora_llava.planning.preflight import shipping

    shipping.refuse_model(path, base_model)


def refuse_source(path: Path, base_model: str | None) -> None:
    """Raise PreflightError if what is to be imported, or the base it is for, cannot be read by what its files tell."""
    from lora_llava.planning.preflight import shipping

    shipping.refuse_source(path)
    if base_model is not None:
        shipping.refuse_base(base_model)
