"""The training loss of each source of a stage, summed on the device and read once for each line of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_llava.system.ranks import rank
from lora_llava.training.parallel.gradients import summed


class LossBySource:
    """Sums losses and items of each source since the last line of the log.

    Items are what the objective counts: supervised tokens, or pairs. A mean is over all items of a source since then,
    whatever the steps, rows and processes that they were in.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        """`sources`: names of the sources, in the order of their numbers in `Batch`; (): nothing is summed."""
        self.sources = sources
        self._numbers = torch.arange(len(sources), device=device)[:, None]
        self._sums = torch.zeros(2, len(sources), dtype=torch.float64, device=device)
        """Losses and items (2, sources) of complete steps, of this process."""
        self._of_step = torch.zeros_like(self._sums)

    def add(self, sources: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the items of a row: the number of the source (N,) and the loss (N,) of each. Does not wait."""
        # Not `index_add_`, which adds in any order on CUDA.
        own = sources == self._numbers
        self._of_step += torch.stack([torch.where(own, losses.double(), 0.0).sum(1), own.sum(1)])

    def end_step(self, *, counts: bool) -> None:
        """Complete a step; unless it `counts`, as one that is skipped does not, its items are dropped."""
        if counts:
            self._sums += self._of_step
        self._of_step.zero_()

    def take(self) -> dict[str, float]:
        """Return the mean loss of each source since the last call, over all processes, as `loss/NAME`.

        Sources without an item are left out. Every process must call it.
        """
        means = {f"loss/{name}": loss / items for name, (loss, items) in self.state().items() if items}
        self._sums.zero_()
        return means

    def state(self) -> dict[str, tuple[float, float]]:
        """Return loss and items of each source since the last line, over all processes, for a checkpoint.

        Every process must call it; waits for the device.
        """
        if not self.sources:
            return {}
        losses, items = summed(self._sums).tolist()
        return dict(zip(self.sources, zip(losses, items, strict=True), strict=True))

    def restore(self, state: Mapping[str, Sequence[float]] | None) -> None:
        """Continue from a `state`, or from none; of several processes the first holds what all had summed."""
        self._sums.zero_()
        self._of_step.zero_()
        if state and not rank():
            known = [state.get(name, (0.0, 0.0)) for name in self.sources]
            self._sums += self._sums.new_tensor(known).T
