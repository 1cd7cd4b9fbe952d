"""A run's questions: loaded from its files, and only those whose known answers are of use."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_nft.config import Config, SourceConfig
from megatron_nft.evaluate import EvaluationSet
from megatron_nft.problems import load_problems
from megatron_nft.rollout.groups import Problem
from megatron_nft.verify.golds import readable
from megatron_nft.verify.verifier import Verifier

logger = logging.getLogger("megatron_nft")

OnMain = Callable[[Callable[[], Any]], Any]  # what rank 0 gets from a function, on every rank


class Sources:
    """Every process has the same.

    Args:
        on_main: collective.
    """

    def __init__(
        self, config: Config, tokenizer: Any, verifier: Verifier | None, on_main: OnMain
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._verifier, self._on_main = verifier, on_main

    def training(self) -> list[Problem]:
        """The questions to train on; worked solutions are taken as they are."""
        loaded = [p for source in self._config.data.train for p in self._load(source)]
        return loaded if self._config.objective.name == "sft" else self._readable(loaded)

    def evaluation(self) -> list[EvaluationSet]:
        return [
            (s.name or Path(s.path).stem, self._readable(self._load(s)), s.samples)
            for s in self._config.evaluate.sets
        ]

    def _load(self, source: SourceConfig) -> list[Problem]:
        loaded = load_problems(source, self._config.data, self._tokenizer)
        if loaded.num_skipped or loaded.num_duplicates:
            self._on_main(
                lambda: logger.warning(
                    "%s: %d problems; left out: %d repetitions, %s",
                    source.path,
                    len(loaded.problems),
                    loaded.num_duplicates,
                    loaded.skipped_reasons or "nothing else",
                )
            )
        return loaded.problems

    def _readable(self, problems: Sequence[Problem]) -> list[Problem]:
        """Those whose known answers others can be compared with; rank 0 looks."""
        option = self._config.verify.on_bad_gold
        kept = self._on_main(lambda: readable(problems, self._verifier, option))
        return [problems[i] for i in kept]
