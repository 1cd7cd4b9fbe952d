"""Optimizer steps that may go wrong: one whose loss or gradient is not finite is left out.

Its batch is written out, to be looked at; too many in a row end the run.
"""

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_nft.policy.packing import Sequence
from megatron_nft.policy.step import Policy
from megatron_nft.rollout.records import keep, write_sequences

logger = logging.getLogger("megatron_nft")


@dataclass(frozen=True)
class Skipped:
    """How many steps were left out."""

    total: int = 0
    in_a_row: int = 0  # up to now


class Updates:
    """Steps of a policy, on every rank alike.

    Args:
        directory: where batches of steps that were left out go; None on ranks that write nothing.
        most_in_a_row: so many steps may be left out one after the other.
        skipped: so far, where the run is resumed.
    """

    def __init__(
        self,
        policy: Policy,
        directory: Path | None,
        most_in_a_row: int,
        skipped: Skipped = Skipped(),
    ) -> None:
        self._policy, self._directory, self._most = policy, directory, most_in_a_row
        self.skipped = skipped

    def step(self, number: int, minibatch: Seq[Sequence], lr: float) -> dict[str, Any] | None:
        """What Policy.update measured; None where the step was left out, and nothing changed.

        Raises:
            FloatingPointError: one too many in a row; it names the files.
        """
        try:
            measured = self._policy.update(minibatch, lr)
        except FloatingPointError as error:
            self._skip(number, minibatch, error)
            return None
        self.skipped = replace(self.skipped, in_a_row=0)
        return measured

    def _skip(self, number: int, minibatch: Seq[Sequence], error: FloatingPointError) -> None:
        self.skipped = Skipped(self.skipped.total + 1, self.skipped.in_a_row + 1)
        where = "rank 0 has written its batch"
        if self._directory:
            path = self._directory / f"step_{number}.parquet"
            is_kept = keep(path, partial(write_sequences, sequences=minibatch))
            where = f"its batch is in {path}" if is_kept else "its batch could not be written"
            logger.error("step %d was left out: %s; %s", number, error, where)
        if self.skipped.in_a_row > self._most:
            raise FloatingPointError(
                f"{self.skipped.in_a_row} steps in a row were not finite, "
                f"optimizer.max_skipped_steps is {self._most}; the last, step {number}: {error}; "
                f"{where}"
            ) from error
