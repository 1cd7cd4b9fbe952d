"""What a configuration's values may be: choices, ranges and the rules between keys."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_nft.config import OBJECTIVE_NAMES, Config, ParallelConfig, RolloutConfig
from megatron_nft.templates import TEMPLATES


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; an open end is not one of them."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, low_open=True)
AT_LEAST_ONE = Range(1)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, low_open=True)

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bfloat16", "float32"),
    "model.layers": ("auto", "transformer_engine", "torch"),
    "memory.recompute": ("none", "selective", "full"),
    "memory.recompute_modules[]": ("core_attn", "mlp"),
    "fp8.format": ("off", "e4m3", "hybrid"),
    "fp8.recipe": ("tensorwise", "blockwise", "delayed", "mxfp8"),
    "fp8.amax_compute_algo": ("max", "most_recent"),
    "data.template": tuple(TEMPLATES),
    "data.on_long_prompt": ("error", "skip"),
    "data.on_bad_row": ("error", "skip"),
    "objective.name": OBJECTIVE_NAMES,
    "objective.omega": ("uniform", "dr_grpo", "grpo"),
    "objective.ratio": ("token", "sequence"),
    "objective.denominator": ("token_mean", "sequence_mean", "constant"),
    "rollout.engine": ("colocated", "remote"),
    "rollout.on_short_batch": ("train", "stop"),
    "rollout.weight_transfer": ("files", "gloo", "nccl"),
    "rollout.quantization": ("none", "fp8"),
    "verify.on_bad_gold": ("error", "skip"),
    "old_logp": ("trainer", "rollout"),
}

RANGES: dict[str, Range] = {
    "seed": NOT_NEGATIVE,
    "rollouts": AT_LEAST_ONE,
    "parallel.tensor": AT_LEAST_ONE,
    "parallel.pipeline": AT_LEAST_ONE,
    "parallel.virtual_pipeline": AT_LEAST_ONE,
    "parallel.context": AT_LEAST_ONE,
    "parallel.expert": AT_LEAST_ONE,
    "parallel.num_processes": NOT_NEGATIVE,
    "fp8.margin": NOT_NEGATIVE,
    "fp8.amax_history_len": AT_LEAST_ONE,
    "fp8.num_layers_at_start_in_bf16": NOT_NEGATIVE,
    "fp8.num_layers_at_end_in_bf16": NOT_NEGATIVE,
    "data.train[].samples": AT_LEAST_ONE,
    "data.train[].rule.last_chars": AT_LEAST_ONE,
    "data.train[].rule.tolerance": NOT_NEGATIVE,
    "data.max_prompt_tokens": AT_LEAST_ONE,
    "objective.epsilon": POSITIVE_SHARE,
    "objective.negative_weight": NOT_NEGATIVE,
    "objective.clip_low": POSITIVE_SHARE,
    "objective.clip_high": POSITIVE,
    "objective.overlong_buffer": NOT_NEGATIVE,
    "objective.constant": POSITIVE,
    "rollout.questions": AT_LEAST_ONE,
    "rollout.num_servers": AT_LEAST_ONE,
    "rollout.questions_asked": NOT_NEGATIVE,
    "rollout.finish_fraction": POSITIVE_SHARE,
    "rollout.max_steps_off_policy": NOT_NEGATIVE,
    "rollout.start_timeout_s": POSITIVE,
    "rollout.stall_timeout_s": POSITIVE,
    "rollout.probe_tolerance": NOT_NEGATIVE,
    "drift.warn": POSITIVE,
    "drift.stop": POSITIVE,
    "drift.importance_cap": NOT_NEGATIVE,
    "rollout.max_asks": AT_LEAST_ONE,
    "rollout.answers": AT_LEAST_ONE,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": POSITIVE_SHARE,
    "rollout.max_response_tokens": AT_LEAST_ONE,
    "rollout.tensor": AT_LEAST_ONE,
    "rollout.memory_fraction": Range(0, 1, low_open=True, high_open=True),
    "rollout.cpu_kv_cache_gib": AT_LEAST_ONE,
    "rollout.max_sequences": AT_LEAST_ONE,
    "optimizer.lr": POSITIVE,
    "optimizer.betas[]": Range(0, 1, high_open=True),
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": POSITIVE,
    "optimizer.warmup_rollouts": NOT_NEGATIVE,
    "optimizer.questions_per_minibatch": AT_LEAST_ONE,
    "optimizer.epochs": AT_LEAST_ONE,
    "optimizer.tokens_per_microbatch": AT_LEAST_ONE,
    "optimizer.max_skipped_steps": NOT_NEGATIVE,
    "verify.workers": NOT_NEGATIVE,
    "verify.timeout_s": POSITIVE,
    "verify.memory_gib": Range(0.5),
    "verify.answers_per_worker": AT_LEAST_ONE,
    "verify.max_unverifiable_rate": SHARE,
    "evaluate.sets[].samples": AT_LEAST_ONE,
    "evaluate.sets[].rule.last_chars": AT_LEAST_ONE,
    "evaluate.sets[].rule.tolerance": NOT_NEGATIVE,
    "evaluate.every": NOT_NEGATIVE,
    "evaluate.temperature": NOT_NEGATIVE,
    "evaluate.top_p": POSITIVE_SHARE,
    "evaluate.stop_at_accuracy": SHARE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep": AT_LEAST_ONE,
    "logging.answers_every": NOT_NEGATIVE,
    "watchdog.timeout_s": NOT_NEGATIVE,
}

RULES = ("math_verify", "boxed_exact", "numeric")
FUNCTION = re.compile(r"[\w.]+:\w+")  # its import path

REQUIRED = {
    "run_dir": "the directory the run writes to",
    "model.path": "a Hugging Face model directory",
    "data.train[].path": "a .jsonl, .json or .parquet file",
    "evaluate.sets[].path": "a .jsonl, .json or .parquet file",
}


def validate(config: Config) -> None:
    """Raise one ValueError that lists every wrong key, what it was and what it may be.

    Files are not looked for: a recipe is checked on machines that do not have them.
    """
    complaints = [text for key, value in leaves(config) if (text := _complaint(key, value))]
    complaints = complaints or [*_rules_between_keys(config)]
    if complaints:
        raise ValueError("\n  ".join(complaints))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no section, under its dotted key; an empty list counts as a value."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, list | tuple) and value:
        for i, item in enumerate(value):
            yield from leaves(item, f"{key}[{i}]")
    else:
        yield key, value


def _complaint(key: str, value: Any) -> str | None:
    rule = re.sub(r"\[\d+\]", "[]", key)
    if rule in CHOICES and value not in CHOICES[rule]:
        return _was(key, value, ", ".join(CHOICES[rule]))
    if rule in RANGES and value not in RANGES[rule]:
        return _was(key, value, str(RANGES[rule]))
    if rule in REQUIRED and not value:
        return _was(key, value, REQUIRED[rule])
    if rule.endswith(".rule.name") and value not in RULES and not FUNCTION.fullmatch(value):
        return _was(key, value, f"{', '.join(RULES)}, or module:function of your own")
    return None


def _was(key: str, value: Any, may_be: str) -> str:
    return f"{key} was {value!r}; it may be {may_be}"


def _rules_between_keys(config: Config) -> Iterator[str]:
    yield from _parallel_rules(config)
    yield from _precision_rules(config)
    yield from _batch_rules(config)
    yield from _overlong_rules(config)
    yield from _evaluation_rules(config)
    yield from _best_rules(config)
    yield from _server_rules(config.rollout)
    yield from _watchdog_rules(config)
    if not config.data.train:
        yield _was("data.train", [], "a list of at least one file: [{path: …}]")
    if config.objective.name != "sft":
        yield from _engine_rules(config)


def _parallel_rules(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.num_processes % parallel.least_processes:
        may_be = f"0 or a multiple of {parallel.least_processes}: {_least_processes(parallel)}"
        yield _was("parallel.num_processes", parallel.num_processes, may_be)
    if parallel.sequence and parallel.tensor == 1:
        yield _was("parallel.sequence", True, "true only where parallel.tensor is above 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        may_be = "1 where parallel.pipeline is 1: there is no pipeline to interleave"
        yield _was("parallel.virtual_pipeline", parallel.virtual_pipeline, may_be)
    if config.memory.recompute == "selective" and not config.memory.recompute_modules:
        yield _was("memory.recompute_modules", [], "not empty where memory.recompute is selective")


def _least_processes(parallel: ParallelConfig) -> str:
    if parallel.expert == 1:
        return "tensor·pipeline·context"
    return "pipeline times what tensor·context and expert both divide"


def _precision_rules(config: Config) -> Iterator[str]:
    model, fp8 = config.model, config.fp8
    if config.memory.offload and model.dtype == "float32":
        may_be = "false with model.dtype=float32: weights and optimizer share one memory there"
        yield _was("memory.offload", True, may_be)
    if fp8.format == "off":
        return
    if model.dtype != "bfloat16":
        yield _was("model.dtype", model.dtype, f"bfloat16 where fp8.format is {fp8.format}")
    if model.layers == "torch":
        may_be = f"auto or transformer_engine where fp8.format is {fp8.format}"
        yield _was("model.layers", model.layers, may_be)
    if fp8.first_last_layers_bf16 and fp8.recipe == "delayed":
        may_be = "false with fp8.recipe=delayed (Megatron-Core refuses it)"
        yield _was("fp8.first_last_layers_bf16", True, may_be)


def _batch_rules(config: Config) -> Iterator[str]:
    given, questions = config.optimizer.questions_per_minibatch, config.rollout.questions
    if questions % given:
        may_be = f"a divisor of rollout.questions = {questions}"
        yield _was("optimizer.questions_per_minibatch", given, may_be)


def _overlong_rules(config: Config) -> Iterator[str]:
    buffer, longest = config.objective.overlong_buffer, config.rollout.max_response_tokens
    if buffer and config.objective.name not in ("grpo", "dapo"):
        may_be = f"0 where objective.name is {config.objective.name}; it is for dapo and grpo"
        yield _was("objective.overlong_buffer", buffer, may_be)
    elif buffer >= longest:
        may_be = f"below rollout.max_response_tokens = {longest}"
        yield _was("objective.overlong_buffer", buffer, may_be)


def _engine_rules(config: Config) -> Iterator[str]:
    """What holds where answers are sampled: every objective but sft."""
    rollout, optimizer = config.rollout, config.optimizer
    if rollout.answers < 2:
        may_be = "at least 2: a group trains only where it has right and wrong answers"
        yield _was("rollout.answers", rollout.answers, may_be)
    if rollout.top_p != 1:
        may_be = "1: the policy's log-probabilities are those of the whole vocabulary"
        yield _was("rollout.top_p", rollout.top_p, may_be)
    if 0 < rollout.questions_asked * rollout.max_asks < rollout.questions:
        may_be = f"0, or such that times max_asks = {rollout.max_asks} it reaches rollout.questions"
        may_be += f" = {rollout.questions}"
        yield _was("rollout.questions_asked", rollout.questions_asked, may_be)
    yield from _off_policy_rules(config)
    if rollout.engine == "colocated" and config.parallel.num_processes % rollout.tensor:
        may_be = f"a divisor of parallel.num_processes = {config.parallel.num_processes}"
        yield _was("rollout.tensor", rollout.tensor, may_be)
    if optimizer.tokens_per_microbatch < config.longest:
        may_be = f"at least max_prompt_tokens + max_response_tokens = {config.longest}"
        yield _was("optimizer.tokens_per_microbatch", optimizer.tokens_per_microbatch, may_be)


def _server_rules(rollout: RolloutConfig) -> Iterator[str]:
    for i, address in enumerate(rollout.servers):
        if not re.fullmatch(r"https?://[^/\s]+:\d+", address):
            yield _was(f"rollout.servers[{i}]", address, "http://HOST:PORT")
        if address in rollout.servers[:i]:
            yield _was(f"rollout.servers[{i}]", address, "an address that is not there already")
    if rollout.engine == "colocated":
        for key in ("servers", "in_flight_updates"):
            if value := getattr(rollout, key):
                yield _was(f"rollout.{key}", value, "given only where rollout.engine is remote")
        if rollout.weight_transfer != "files":
            may_be = "files where rollout.engine is colocated, which needs no way for weights"
            yield _was("rollout.weight_transfer", rollout.weight_transfer, may_be)


def _watchdog_rules(config: Config) -> Iterator[str]:
    given, rollout = config.watchdog.timeout_s, config.rollout
    # so long a run may wait for servers, and then says itself what is wrong
    patience_s = rollout.start_timeout_s + rollout.stall_timeout_s
    if rollout.engine == "remote" and 0 < given <= patience_s:
        may_be = f"0, or above rollout.start_timeout_s + rollout.stall_timeout_s = {patience_s:g}"
        yield _was("watchdog.timeout_s", given, may_be)


def _off_policy_rules(config: Config) -> Iterator[str]:
    rollout, steps = config.rollout, config.rollout.max_steps_off_policy
    if steps and config.old_logp != "rollout":
        may_be = "rollout where rollout.max_steps_off_policy is above 0: the weights that sampled "
        yield _was("old_logp", config.old_logp, may_be + "are gone by then")
    if steps > 1 and rollout.engine == "remote" and not rollout.in_flight_updates:
        may_be = "0 or 1, or needs rollout.in_flight_updates=true"
        yield _was("rollout.max_steps_off_policy", steps, may_be)
    if rollout.in_flight_updates and not steps:
        may_be = "false where rollout.max_steps_off_policy is 0: nothing is in flight then"
        yield _was("rollout.in_flight_updates", True, may_be)
    if config.drift.importance_cap and config.old_logp != "trainer":
        may_be = "0 where old_logp is rollout: the ratio is the engine's already"
        yield _was("drift.importance_cap", config.drift.importance_cap, may_be)
    if config.drift.stop < config.drift.warn:
        yield _was("drift.stop", config.drift.stop, f"at least drift.warn = {config.drift.warn}")


def _evaluation_rules(config: Config) -> Iterator[str]:
    evaluate = config.evaluate
    names = [source.name or Path(source.path).stem for source in evaluate.sets]
    for i, (name, source) in enumerate(zip(names, evaluate.sets, strict=True)):
        if name in names[:i]:
            yield _was(f"evaluate.sets[{i}].name", name, "a name that no other set has")
        if evaluate.temperature == 0 and source.samples > 1:
            may_be = "1 where evaluate.temperature is 0: greedy answers are all the same"
            yield _was(f"evaluate.sets[{i}].samples", source.samples, may_be)
    if evaluate.stop_at_accuracy and not (evaluate.sets and evaluate.every):
        may_be = "0, or needs evaluate.sets and evaluate.every above 0"
        yield _was("evaluate.stop_at_accuracy", evaluate.stop_at_accuracy, may_be)


def _best_rules(config: Config) -> Iterator[str]:
    best, evaluate = config.checkpoint.best, config.evaluate
    names = [f"eval/{source.name or Path(source.path).stem}/accuracy" for source in evaluate.sets]
    if best and not (names and evaluate.every):
        may_be = "empty, or needs evaluate.sets and evaluate.every above 0"
        yield _was("checkpoint.best", best, may_be)
    elif best and best not in ("accuracy", *names):
        yield _was("checkpoint.best", best, f"empty, accuracy, {', '.join(names)}")
