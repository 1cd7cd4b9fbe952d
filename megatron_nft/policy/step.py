"""The policy: forward passes for log-probabilities, and the optimizer step.

This file alone divides a loss. Every token's loss is multiplied by a weight that is known before
the step starts, from the whole mini-batch over all data-parallel ranks; Megatron's schedule and
its data-parallel reduction then only ever add. The gradient cannot depend on micro-batches or on
the layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_nft.config import Config, ObjectiveConfig
from megatron_nft.objectives import OBJECTIVES, TokenBatch, TokenLoss, is_per_token
from megatron_nft.policy import fp8, host
from megatron_nft.policy.architecture import (
    build_model,
    transformer_config,
    uses_transformer_engine,
)
from megatron_nft.policy.balance import deal
from megatron_nft.policy.flops import attention_share
from megatron_nft.policy.logprobs import Gradient, token_logprobs
from megatron_nft.policy.optimizer import adamw, add_up_gradients, data_parallel, restore
from megatron_nft.policy.packing import MicroBatch, RowLayout, Sequence, micro_batch
from megatron_nft.policy.pipeline import schedule_options

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Policy:
    """The trained model of this rank, with its optimizer.

    Args:
        fill: gives the chunks, which come without weights, their first ones.
        on_progress: called at every forward step of a micro-batch.
    """

    def __init__(
        self,
        config: Config,
        hf_config: PretrainedConfig,
        fill: Callable[[Seq[GPTModel]], None],
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.hf_config = config, hf_config
        self._on_progress = on_progress
        model_config = transformer_config(hf_config, config)
        self.chunks = build_model(hf_config, model_config, uses_transformer_engine(config.model))
        fill(self.chunks)
        self.ddp_chunks = [data_parallel(chunk, config) for chunk in self.chunks]
        model_config.finalize_model_grads_func = add_up_gradients
        self.optimizer = adamw(self.ddp_chunks, config)
        self.num_updates = 0

    @torch.no_grad()
    def logp(self, sequences: Seq[Sequence], temperature: float | None = None) -> list[np.ndarray]:
        """Log-probabilities of the response tokens of every sequence.

        Collective. All ranks pass the same sequences and get the same float32 [T] arrays back, in
        the sequences' order. The temperature is the rollout's unless another one is given.
        """
        bins, weights = self._bins(sequences), [0.0] * len(sequences)
        kept = self._run_schedule(sequences, bins, weights, temperature, forward_only=True)
        parts = _on_every_rank(kept)
        return _by_sequence(parts, bins, sequences, "logp")

    def update(self, sequences: Seq[Sequence], lr: float) -> dict[str, Any]:
        """One optimizer step on the mini-batch; collective, all ranks pass the same sequences.

        Returns:
            loss, grad_norm and, as float32 arrays over all response tokens, what the objective
            measures (ratio, clip_fraction, entropy …); log_ratio, log π_θ − old_logp before the
            step, as a list of float32 [T], one a sequence.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights were not touched.
        """
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        bins = self._bins(sequences)
        weights = token_weights(sequences, self.config.objective)
        parts = _on_every_rank(self._run_schedule(sequences, bins, weights, forward_only=False))
        log_ratio = _by_sequence(parts, bins, sequences, "log_ratio")
        measured = _merge(parts) | {"log_ratio": log_ratio}
        measured["grad_norm"] = self._step(measured["loss"], lr)
        self.num_updates += 1
        return measured

    @contextmanager
    def memory_lent(self) -> Iterator[None]:
        """Keep gradients and optimizer off the device meanwhile, if the recipe says so.

        For the sampling engine. The weights stay; neither update nor a checkpoint may come between.
        """
        if not self.config.memory.offload:
            yield
            return
        for chunk in self.ddp_chunks:
            chunk.offload_grad_buffers()
        self.optimizer.offload_to_cpu()
        try:
            yield
        finally:
            restore(self.optimizer)
            for chunk in self.ddp_chunks:
                chunk.restore_grad_buffers()

    def _step(self, loss: float, lr: float) -> float:
        """Clip and apply the gradient, unless it or the loss is not finite.

        A clamp's backward makes zeros of a NaN, so that the gradient alone would not show it.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not np.isfinite([loss, grad_norm]).all():
            raise FloatingPointError(
                f"loss {loss}, gradient norm {grad_norm} at update {self.num_updates}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        succeeded, _, _ = self.optimizer.step()
        assert succeeded
        return grad_norm

    def _bins(self, sequences: Seq[Sequence]) -> list[list[list[int]]]:
        """Each data-parallel rank's micro-batches, as indices into the sequences."""
        parallel = self.config.parallel
        layout, budget = row_layout(self.config), self.config.optimizer.tokens_per_microbatch
        return deal(
            [layout.padded(s.num_tokens) for s in sequences],
            parallel_state.get_data_parallel_world_size(),
            max(1, budget // layout.multiple) * layout.multiple,
            quadratic=attention_share(self.hf_config),
            # an interleaved schedule takes micro-batches in rounds of one a pipeline rank
            multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )

    def _run_schedule(
        self,
        sequences: Seq[Sequence],
        bins: list[list[list[int]]],
        weights: Seq[float],
        temperature: float | None = None,
        *,
        forward_only: bool,
    ) -> list[dict[str, np.ndarray]]:
        """Megatron's schedule over this rank's micro-batches; what the last stage kept of each."""
        temperature = self.config.rollout.temperature if temperature is None else temperature
        mine = bins[parallel_state.get_data_parallel_rank()]
        layout = row_layout(self.config)
        micro_batches = (
            micro_batch(
                [sequences[i] for i in indices],
                [weights[i] for i in indices],
                host.device(),
                layout,
            )
            for indices in mine
        )
        for chunk in self.ddp_chunks:
            chunk.train(not forward_only)
        kept = get_forward_backward_func()(
            forward_step_func=partial(self._forward, temperature),
            data_iterator=list(itertools.tee(micro_batches, len(self.ddp_chunks))),
            model=self.ddp_chunks,
            num_microbatches=len(mine),
            seq_length=0,  # unused with variable_seq_lengths
            micro_batch_size=1,
            forward_only=forward_only,
            **schedule_options(self.chunks[0].config, self._row_lengths(sequences, mine)),
        )
        # only now: the schedule need not wait for the device
        return [{k: v.float().cpu().numpy() for k, v in tensors.items()} for tensors in kept]

    def _row_lengths(self, sequences: Seq[Sequence], bins: list[list[int]]) -> list[int]:
        """Tokens of this rank's row in each micro-batch, between two layers."""
        parallel, layout = self.config.parallel, row_layout(self.config)
        num_sharers = parallel.context * (parallel.tensor if parallel.sequence else 1)
        rows = (layout.spans([sequences[i].num_tokens for i in indices]) for indices in bins)
        return [sum(spans) // num_sharers for spans in rows]

    def _forward(
        self, temperature: float, data: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, partial[Any]]:
        """Megatron's forward-step contract: the output tensor and the function of its loss."""
        self._on_progress()
        batch = next(data)
        output = model(
            batch.tokens,
            batch.row.positions[None],
            None,
            packed_seq_params=batch.row,
            output_processor=partial(self._logprobs, temperature=temperature),
            output_processor_context=batch,
        )
        return output, partial(self._loss, batch, with_objective=torch.is_grad_enabled())

    def _logprobs(
        self,
        hidden_states: Tensor,
        output_layer: torch.nn.Module,
        output_weight: Tensor | None,
        context: MicroBatch,
        temperature: float,
        **_: Any,
    ) -> Tensor:
        """GPTModel's output hook: hidden states [N, 1, H] -> float32 [1, R] of log-probabilities.

        With a second row of entropies where gradients are wanted.
        """
        batch, is_training = context, torch.is_grad_enabled()
        logp, entropy = token_logprobs(
            self._predicting(hidden_states, batch),
            output_layer.weight if output_weight is None else output_weight,
            batch.targets,
            temperature=temperature,
            vocab_size=self.hf_config.vocab_size,
            with_entropy=is_training,
            gradient=self._gradient(batch) if is_training else None,
        )
        return _whole_sequences(torch.stack((logp, entropy)) if is_training else logp[None], batch)

    def _predicting(self, hidden_states: Tensor, batch: MicroBatch) -> Tensor:
        """The states that predict response tokens, [r, H], whole on every tensor-parallel rank.

        Each of these computes its vocabulary shard's part of their gradient; Megatron's own
        collectives add the parts up.
        """
        if self.config.parallel.sequence:
            whole = gather_from_sequence_parallel_region(hidden_states)
            return whole.squeeze(1).index_select(0, batch.predictors)
        return copy_to_tensor_model_parallel_region(
            hidden_states.squeeze(1).index_select(0, batch.predictors)
        )

    def _gradient(self, batch: MicroBatch) -> Gradient | None:
        """How the loss depends on log-probabilities, where a token's own decides it alone."""
        if not is_per_token(self.config.objective):
            return None

        @torch.enable_grad()
        def gradient(logp: Tensor, rows: slice) -> Tensor:
            logp = logp.detach().requires_grad_()
            tokens = batch.predicted[rows]
            result = self._objective(batch.batch.select(tokens), logp)
            loss = (result.loss * batch.token_weights[tokens]).sum()
            return torch.autograd.grad(loss, logp)[0]

        return gradient

    def _objective(self, batch: TokenBatch, logp: Tensor) -> TokenLoss:
        options = self.config.objective
        return OBJECTIVES[options.name](batch, logp, options)

    def _loss(
        self, batch: MicroBatch, output: Tensor, with_objective: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, a count that nobody divides by, and what to keep."""
        unused_count = torch.zeros((), dtype=torch.int, device=output.device)
        if not with_objective:
            return output.sum(), unused_count, {"logp": output[0]}
        logp, entropy = output
        result = self._objective(batch.batch, logp)
        loss = (result.loss * batch.token_weights).sum()
        kept = {"loss": loss, "entropy": entropy, **result.metrics}
        kept["log_ratio"] = logp - batch.batch.old_logp
        return loss, unused_count, {k: v.detach() for k, v in kept.items()}


def token_weights(sequences: Seq[Sequence], options: ObjectiveConfig) -> list[float]:
    """What each sequence's token losses are multiplied by: the one place with a denominator.

    token_mean: 1 / all response tokens of the mini-batch; sequence_mean: 1 / (sequences · own
    tokens); constant: 1 / options.constant (the official code's scale). Importance weights are in
    none of them: where they are small, so is the step.
    """
    num_tokens = [len(s.response) for s in sequences]
    if options.denominator == "token_mean":
        return [1.0 / sum(num_tokens)] * len(sequences)
    if options.denominator == "sequence_mean":
        return [1.0 / (len(sequences) * n) for n in num_tokens]
    assert options.denominator == "constant"
    return [1.0 / options.constant] * len(sequences)


def row_layout(config: Config) -> RowLayout:
    """How rows are laid over the ranks; sequence parallelism, FP8 and the zigzag divide them."""
    parallel = config.parallel
    multiple = fp8.token_multiple(config.fp8) * (parallel.tensor if parallel.sequence else 1)
    if parallel.context == 1:
        return RowLayout(multiple)
    rank = parallel_state.get_context_parallel_rank()
    return RowLayout(parallel.context * math.lcm(2, multiple), rank, parallel.context)


def _whole_sequences(values: Tensor, batch: MicroBatch) -> Tensor:
    """[k, r] of this context-parallel rank to [k, R]: an objective sees sequences whole.

    Every rank then has the same loss; in backward each takes the gradient of its own tokens.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values
    whole = values.new_zeros(len(values), len(batch.token_weights))
    whole = whole.index_copy(1, batch.predicted, values)
    return reduce_from_tensor_model_parallel_region(whole, group=group)


def _by_sequence(
    parts: list[list[dict[str, np.ndarray]]],
    bins: list[list[list[int]]],
    sequences: Seq[Sequence],
    key: str,
) -> list[np.ndarray]:
    """What the data-parallel ranks' micro-batches kept of tokens, as float32 [T] a sequence."""
    found = {}
    flat = (itertools.chain.from_iterable(lists) for lists in (parts, bins))
    for kept, indices in zip(*flat, strict=True):
        cuts = np.cumsum([len(sequences[i].response) for i in indices])[:-1]
        found |= zip(indices, np.split(kept[key], cuts), strict=False)  # one piece of none
    return [found[i] for i in range(len(sequences))]


def _merge(parts: list[list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """All ranks' micro-batches as one: losses added, token values concatenated."""
    flat = [outputs for part in parts for outputs in part]
    keys = flat[0].keys() - {"loss", "log_ratio"}
    merged = {key: np.concatenate([f[key] for f in flat]) for key in keys}
    return {"loss": float(sum(f["loss"] for f in flat)), **merged}


def _on_every_rank(value: Any) -> list[Any]:
    """What the last pipeline stage's data-parallel ranks hold, in their order; collective."""
    group = parallel_state.get_data_parallel_group()
    parts: list[Any] = [value] * group.size()
    if parallel_state.is_pipeline_last_stage() and group.size() > 1:
        dist.all_gather_object(parts, value, group=group)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(parts, src=last, group=stages)
    return parts
