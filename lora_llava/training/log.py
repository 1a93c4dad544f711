"""Write `train_log.jsonl`, and show the progress of a stage on the console."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from lora_llava.data.stage import StepCounts
from lora_llava.run_directory.output import append_to_log, log_path
from lora_llava.system.files import fsync
from lora_llava.system.progress import Bar, duration
from lora_llava.system.text import printable, printable_lines

MAX_SHOWN = 200
"""Characters of a question or an answer that the log shows on the screen."""
_MAX_NAME = 24
"""Characters of the name of a source on a line of figures."""


class TrainingLog(TrainerCallback):  # type: ignore[misc]
    """Writes one JSON line for each log of the trainer and prints it, with a progress bar on a terminal."""

    def __init__(self, stage: str, path: Path, counts: Sequence[StepCounts], console: Console) -> None:
        self.stage = stage
        self.path = path
        self.console = console
        self.questions = [0, *accumulate(step.questions for step in counts)]
        self.supervised = [0, *accumulate(step.supervised_tokens for step in counts)]
        self.started = self.last_time = 0.0
        self.seconds_before = 0.0
        """Seconds that earlier sessions spent on the steps of the stage."""
        self.last_step = 0
        self.interlude = 0.0
        """Seconds of validation and saving since the last line with a loss; no step was trained in them."""
        self.mark = 0.0
        """Time of the last step's end or of what followed it."""
        self.computed = [0, *accumulate(step.computed_tokens for step in counts)]
        self.bar = Bar(stage, len(counts), console, quiet_seconds=math.inf)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock and the display."""
        self.last_time = time.monotonic()
        self.started = self.last_time - self.seconds_before
        self.interlude = 0.0
        self.last_step = state.global_step
        self.bar.start(state.global_step, self.computed[state.global_step])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.mark = time.monotonic()
        self.bar.update(state.global_step, self.computed[state.global_step], self.computed[-1])

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the time of a validation out of the rates."""
        self._leave_out()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the time of a checkpoint out of the rates."""
        self._leave_out()

    def _leave_out(self) -> None:
        now = time.monotonic()
        self.interlude += now - self.mark
        self.mark = now

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove the display."""
        self.bar.stop()

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Redraw the bar between steps, so that its remaining time counts down."""
        self.bar.redraw()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Write and print one log of the trainer, except its closing summary; `step` in `kwargs` is its step."""
        if "train_runtime" in logs:
            return
        step = kwargs.get("step", state.global_step)
        row: dict[str, Any] = {"stage": self.stage, "step": step, **logs}
        row.pop("epoch", None)
        if "loss" in logs:
            row |= self._rates(step)
        append_to_log(self.path.parent, row)
        self._show(row)

    @property
    def seconds(self) -> float:
        """Seconds since the first step, over all sessions."""
        return time.monotonic() - self.started

    def flushed(self) -> int:
        """Flush the log to the disk, and return its size in bytes."""
        path = log_path(self.path.parent)
        if not path.exists():
            return 0
        fsync(path)
        return path.stat().st_size

    def _rates(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self.last_time - self.interlude, 1e-9)
        questions = self.questions[step] - self.questions[self.last_step]
        tokens = self.supervised[step] - self.supervised[self.last_step]
        self.last_time, self.last_step = now, step
        self.mark, self.interlude = now, 0.0
        return {
            "questions_per_second": round(questions / seconds, 3),
            "supervised_tokens_per_second": round(tokens / seconds, 3),
            "seconds": round(now - self.started, 3),
        }

    def _show(self, row: dict[str, Any]) -> None:
        step, total = row["step"], len(self.questions) - 1
        if "warning" in row:
            line = f"{self.stage} {step}/{total}: {row['warning']}"
            self.console.print(Text(printable_lines(line), "yellow"), soft_wrap=True)
        if "eval_loss" in row:
            blind = f", without the images {row['eval_loss_blind']:.4f}" if "eval_loss_blind" in row else ""
            self.console.print(f"{self.stage} {step}/{total}: validation loss {row['eval_loss']:.4f}{blind}")
            for name, loss in by_source(row, "eval_loss").items():
                line = f"{self.stage} {step}/{total}: of {name} {loss:.4f}"
                self.console.print(Text(printable_lines(line)), soft_wrap=True)
            for sample in without_shared_line(row.get("samples", [])):
                self.console.print(sample_line(sample))
        if "loss" not in row:
            return
        figures = log_figures(row)
        self.bar.figures = figures
        # Above the bar, drop what does not fit on one line; without a terminal, print everything.
        head, left = f"{self.stage} {step}/{total}:", self.bar.seconds_left
        ending = f"{duration(left)} left" if left is not None else ""
        if self.console.is_terminal:
            figures = fitting(figures, self.console.width - 2 - len(head))
            self.console.print(f"{head} {'  '.join(figures)}", markup=False, soft_wrap=True)
        else:
            self.console.print(f"{head} {'  '.join([*figures, ending])}", markup=False, soft_wrap=True)


def log_figures(row: dict[str, Any]) -> list[str]:
    """Format the figures of a log line, the most important first."""
    norms = [f"{key.removeprefix('grad_norm_')} {one:.2g}" for key, one in row.items() if key.startswith("grad_norm_")]
    sources = [f"{printable(name, _MAX_NAME)} {loss:.4f}" for name, loss in by_source(row, "loss").items()]
    figures = [
        f"loss {row['loss']:.4f}",
        *([f"of {', '.join(sources)}"] if sources else []),
        f"lr {row['learning_rate']:.2e}",
        f"{row['questions_per_second']:.1f} questions/s",
        f"{row['supervised_tokens_per_second']:.0f} supervised tokens/s",
    ]
    figures += [f"gradients: {', '.join(norms)}"] if norms else []
    return figures + ([f"projector moved {row['projector_change']:.1%}"] if "projector_change" in row else [])


def by_source(row: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the losses of the sources in a log line, by their names; `key`: that of the loss of all."""
    start = f"{key}/"
    return {name.removeprefix(start): loss for name, loss in row.items() if name.startswith(start)}


def fitting(figures: Sequence[str], width: int) -> list[str]:
    """Return the first figures that fit in `width` columns, at least one."""
    shown = list(figures[:1])
    for figure in figures[1:]:
        if sum(len(one) + 2 for one in shown) + len(figure) > width:
            break
        shown.append(figure)
    return shown


def without_shared_line(samples: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Leave out the last line of the questions if all share it: it is `answer_prompt`, the same for each."""
    parts = [sample["question"].rpartition("\n") for sample in samples]
    if len(samples) < 2 or not all(text for text, _, _ in parts) or len({line for _, _, line in parts}) > 1:
        return list(samples)
    return [{**sample, "question": text} for sample, (text, _, _) in zip(samples, parts, strict=True)]


def sample_line(sample: Mapping[str, str]) -> Text:
    """Format a sample answer as one printable line."""
    texts = {key: printable(text.strip(), MAX_SHOWN) for key, text in sample.items()}
    answer = texts["prediction"] or "(nothing)"
    return Text.assemble("  ", texts["question"], (" -> ", "dim"), answer, (f" (true: {texts['answer']})", "dim"))
