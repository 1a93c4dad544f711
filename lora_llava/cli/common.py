"""What the commands share: errors as one message, quiet libraries, the console, opening a recipe or a model."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.errors import LoraLlavaError, RecipeError, RunInterruptedError, is_panic
from lora_llava.system import quiet, ranks, text
from lora_llava.system.names import did_you_mean, nearest
from lora_llava.system.progress import phase, shown_on

if TYPE_CHECKING:
    from rich.console import Console

    from lora_llava.planning.preflight.setup import Start
    from lora_llava.recipe.settings import Recipe

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
ARGUMENTS = "arguments"
"""Key of a command's context: the arguments of the command line."""
PROCESS_ENDS = "the process ends with the command"
"""Context object of a command that is the last thing its process does."""


class KitGroup(click.Group):
    """Lists commands in the order they were added; reports an error as one message on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order they were added."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept --debug anywhere: users append it to a command that failed."""
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn an exception into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = text.printable_lines(error.message)  # type: ignore[misc]  # final for other libraries
            raise
        except click.exceptions.Exit:
            raise
        except (KeyboardInterrupt, click.Abort) as error:
            if ranks.reports(error):
                click.echo(f"\n{text.printable_lines(str(error)) or 'stopped'}", err=True)
            ctx.exit(INTERRUPTED)
        except RunInterruptedError as error:
            if ranks.reports(error):
                click.echo(text.printable_lines(str(error)), err=True)
            ctx.exit(error.exit_code)
        except BaseException as error:
            # click exits quietly when a pipe is closed (`| head`).
            if not (isinstance(error, Exception) or is_panic(error)) or getattr(error, "errno", None) == errno.EPIPE:
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            if ranks.reports(error):
                click.echo(text.printable_lines(f"Error: {_describe(error, debug=ctx.params['debug'])}"), err=True)
            ctx.exit(error.exit_code if isinstance(error, LoraLlavaError) else 1)


def memory_size(value: str) -> int:
    """Parse a memory size such as 12GiB or 11500 MiB into bytes. Raises click.BadParameter.

    GB is GiB here: a "12 GB" GPU has 12 GiB.
    """
    number, unit, _ = _parse_size(value, "MG", "GiB or MiB, such as 12GiB")
    return int(number * 1024 ** ("KMG".index(unit) + 1))


def file_size(value: str) -> int:
    """Parse a file size such as 5GB into bytes; GB is 10^9, GiB 2^30. Raises click.BadParameter."""
    number, unit, is_binary = _parse_size(value, "KMG", "MB or GB, such as 2GB")
    return int(number * (1024 if is_binary else 1000) ** ("KMG".index(unit) + 1))


def _parse_size(value: str, units: str, allowed: str) -> tuple[float, str, bool]:
    """Return number, unit (a letter of `units`), and whether it is binary (GiB, not GB), of a size above 0."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([{units}])(i?)B", value.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is not a size; write a number and {allowed}")
    return float(match[1]), match[2].upper(), bool(match[3])


def _describe(error: BaseException, *, debug: bool) -> str:
    """Return an error message for the user: a LoraLlavaError in full, any other as one line with its type."""
    if isinstance(error, LoraLlavaError):
        return str(error)
    message = " ".join(str(error).split())
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        line += " Lower tokens_per_micro_batch, or set gradient_checkpointing: true; --dry-run shows what to expect."
    return line if debug else f"{line} (run again with --debug for the traceback)"


def leave_torch_out(recipe: Recipe) -> None:
    """Keep transformers from importing PyTorch, which it does not need to read a configuration and a tokenizer.

    Importing it takes 2.9 s of CPU time and 257 MB instead of 0.9 s and 68 MB (measured on two cores). transformers
    looks for PyTorch once; None in `sys.modules`, which makes an import fail, is needed only until then, but
    transformers does without PyTorch for the rest of the process. PyTorch therefore stays in a process that continues
    after the command, such as a script that calls `cli`; if it is already loaded; if there is a GPU to query; and for a
    GGUF base, which transformers reads with PyTorch.
    """
    from lora_llava.system.device import has_driver

    if click.get_current_context().find_root().obj != PROCESS_ENDS:
        return
    if "torch" in sys.modules or has_driver() or recipe.base.gguf_file is not None:
        return
    # Otherwise transformers prints at import that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules["torch"] = None  # type: ignore[assignment]  # typeshed knows modules only
    from transformers.utils import is_torch_available

    is_torch_available()
    del sys.modules["torch"]


def quiet_libraries() -> None:
    """Silence warnings and progress bars of libraries, unless --debug was given. Imports transformers."""
    if not quiet_environment():
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def quiet_environment() -> bool:
    """Set what silences libraries before they are imported; return False if --debug was given."""
    if click.get_current_context().find_root().params.get("debug"):
        quiet.show_advice()
        return False
    import logging
    import warnings

    # The only way to turn off the warning of tokenizers about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Turns off bars that ignore transformers' own setting; tqdm reads it at import.
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    for library in ("bitsandbytes", "torch", "accelerate", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return True


def make_console(*, stderr: bool = False) -> Console:
    """Create the console of a command and show its progress there."""
    from lora_llava.system.console import open_console

    return click.get_current_context().with_resource(shown_on(open_console(stderr=stderr)))


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print the lines of a summary without breaking them."""
    for line in lines:
        console.print(line, soft_wrap=True)


def loading_console() -> Console:
    """Create the console of a command that imports PyTorch next, and announce that wait."""
    console = make_console()
    phase("Loading PyTorch and transformers")
    quiet_libraries()
    return console


def open_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Load the recipe file `name`. Raises RecipeError, with advice for the name of a bundled recipe."""
    from lora_llava.recipe.file import bundled_recipes, load_recipe

    path = Path(name)
    # Of a pipe or a device, load_recipe says what it is.
    if path.is_dir() or not path.exists():
        bundled = bundled_recipes()
        key = path.name.removesuffix(".yaml")
        if key in bundled:
            raise RecipeError(
                f"there is no file {name}; {key} is a bundled recipe. Copy it first: lora-llava recipes copy {key}"
            )
        near = nearest(path.name, [path.parent])
        if near is not None and near.endswith((".yaml", ".yml")):
            raise RecipeError(f"there is no recipe file {name}. {did_you_mean(path.with_name(near))}")
        raise RecipeError(f"there is no recipe file {name}; the bundled ones are {', '.join(sorted(bundled))}")
    return load_recipe(path, overrides)


def look_ahead(
    recipe: Recipe, file: str, console: Console, *, start: Start = "new", here: bool = True, data: bool = True
) -> None:
    """Run the preflight checks on the recipe in `file` and print notices. Raises PreflightError with all problems.

    `here`: the run will be on this machine, not only planned for another. `data`: open all images too.
    """
    from lora_llava.planning.preflight.run import check_setup
    from lora_llava.planning.preflight.setup import Setup

    quiet_environment()
    check_setup(Setup.of(recipe, start, Path(file), here=here), console, data=data)


def open_model(model: Path, base_model: str | None, copied_to: Path | None = None) -> Path:
    """Return the directory of a model, downloaded if it is one of the Hub. Raises HubError, or as `refuse_model`."""
    from lora_llava.planning.preflight import shipping
    from lora_llava.system.hub.artifact import located

    directory = located(model)
    shipping.refuse_model(directory, base_model, copied_to)
    return directory
