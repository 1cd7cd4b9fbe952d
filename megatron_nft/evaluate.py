"""Accuracy on held-out sets: the mean over every question's sampled answers (avg@k)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_nft.config import Config
from megatron_nft.rollout.collect import ask
from megatron_nft.rollout.engine import Engine, Sampling
from megatron_nft.rollout.groups import Problem
from megatron_nft.verify.share import check_rate
from megatron_nft.verify.verifier import Verifier

EvaluationSet = tuple[str, Sequence[Problem], int]  # name, problems, answers a problem


def evaluate(
    engine: Engine,
    verifier: Verifier | None,
    sets: Sequence[EvaluationSet],
    config: Config,
) -> dict[str, float]:
    """`eval/<set>/accuracy` (correct / judged) and the rest for every set; collective.

    All sets are asked at once, so that engines wait but once for the longest answers, and what the
    verifier failed at is counted for all of them. The same answers are drawn from the same weights
    at whatever step and beside whatever other sets: the seed is the run's.

    Raises:
        RuntimeError: see check_rate.
    """
    problems = [problem for _, problems, _ in sets for problem in problems]
    answers = tuple(samples for _, problems, samples in sets for _ in problems)
    kinds = [name for name, problems, _ in sets for _ in problems]
    numbers = tuple(number for _, problems, _ in sets for number in range(len(problems)))
    sampling = Sampling(
        answers=answers,
        temperature=config.evaluate.temperature,
        top_p=config.evaluate.top_p,
        max_tokens=config.rollout.max_response_tokens,
        seed=config.seed,
        numbers=numbers,
    )
    asked = ask(engine, verifier, problems, [float(n) for n in answers], sampling, kinds)
    troubles = asked.tally.troubles()
    metrics = {f"eval/{key}": troubles[key] for key in troubles if key.startswith("verifier_")}
    for name, tally in asked.tallies.items():
        seen = tally.of_answers()
        rate = seen.get("unverifiable_rate", 0.0)
        check_rate(f"eval/{name}", rate, config, tally.unverifiable)
        metrics[f"eval/{name}/accuracy"] = seen.pop("accuracy_all")
        metrics[f"eval/{name}/num_questions"] = tally.num_groups
        metrics |= {f"eval/{name}/{key}": value for key, value in seen.items()}
    return metrics


def table(record: Mapping[str, Any], config: Config) -> str:
    """An evaluation's numbers, for people: a line a set, and their mean."""
    options = config.evaluate
    lines = [f"{'set':<16} {'questions':>9} {'answers':>7} {'accuracy':>8} {'unverifiable':>12}"]
    accuracies = []
    for source in options.sets:
        name = source.name or Path(source.path).stem
        accuracy, number = record[f"eval/{name}/accuracy"], record[f"eval/{name}/num_questions"]
        unverifiable = record.get(f"eval/{name}/unverifiable_rate", 0.0)
        accuracies.append(accuracy)
        lines.append(
            f"{name:<16} {number:>9} {source.samples:>7} {accuracy:>8.1%} {unverifiable:>12.1%}"
        )
    mean = sum(accuracies) / len(accuracies)
    lines.append(f"{'mean of the sets':<34} {mean:>8.1%}")
    lines.append(f"temperature {options.temperature:g}, top_p {options.top_p:g}")
    return "\n".join(lines)
