"""The policy: forward passes for log-probabilities, and the optimizer step.

This file alone divides a loss. Every token's loss is multiplied by a weight that is known before
the step starts, from the whole mini-batch over all data-parallel ranks; Megatron's schedule and
its data-parallel reduction then only ever add. The gradient cannot depend on micro-batches or on
the layout.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_conversion import hf_to_megatron
from megatron_nft.config import Config, ObjectiveConfig
from megatron_nft.objectives import OBJECTIVES
from megatron_nft.policy import host
from megatron_nft.policy.architecture import DTYPES, build_model, transformer_config
from megatron_nft.policy.logprobs import token_logprobs
from megatron_nft.policy.packing import MicroBatch, Sequence, deal, micro_batch


class Policy:
    """The trained model of this rank, with its optimizer."""

    def __init__(self, config: Config, hf_config: PretrainedConfig) -> None:
        self.config, self.hf_config = config, hf_config
        model_config = transformer_config(hf_config, config.model, config.parallel)
        self.chunks = build_model(hf_config, model_config)
        hf_to_megatron.load(self.model, Path(config.model.path), hf_config)
        self.ddp_chunks = [_data_parallel(chunk, config) for chunk in self.chunks]
        model_config.finalize_model_grads_func = _add_up_gradients
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.ddp_chunks)
        self.num_updates = 0

    @property
    def model(self) -> GPTModel:
        return self.chunks[0]

    @torch.no_grad()
    def logp(self, sequences: Seq[Sequence]) -> list[np.ndarray]:
        """Log-probabilities of the response tokens of every sequence.

        Collective. All ranks pass the same sequences and get the same float32 [T] arrays back, in
        the sequences' order.
        """
        mine = self._my_bins(sequences)
        weights = [0.0] * len(sequences)
        outputs = self._run_schedule(sequences, mine, weights, forward_only=True)
        found = {
            index: logp
            for indices, output in zip(mine, outputs, strict=True)
            for index, logp in zip(indices, _split(output, sequences, indices), strict=True)
        }
        whole = {k: v for part in _gather_over_data_parallel(found) for k, v in part.items()}
        return [whole[i] for i in range(len(sequences))]

    def update(self, sequences: Seq[Sequence], lr: float) -> dict[str, Any]:
        """One optimizer step on the mini-batch; collective, all ranks pass the same sequences.

        Returns:
            loss, grad_norm and, as float32 arrays over all response tokens, what the objective
            measures (ratio, clip_fraction, entropy …).

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights were not touched.
        """
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        mine = self._my_bins(sequences)
        weights = token_weights(sequences, self.config.objective)
        outputs = self._run_schedule(sequences, mine, weights, forward_only=False)
        measured = _merge(_gather_over_data_parallel(outputs))
        measured["grad_norm"] = self._step(measured["loss"], lr)
        self.num_updates += 1
        return measured

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

    def _my_bins(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """This data-parallel rank's micro-batches, as indices into the sequences."""
        bins = deal(
            [s.num_tokens for s in sequences],
            parallel_state.get_data_parallel_world_size(),
            self.config.optimizer.tokens_per_microbatch,
        )
        return bins[parallel_state.get_data_parallel_rank()]

    def _run_schedule(
        self,
        sequences: Seq[Sequence],
        bins: list[list[int]],
        weights: Seq[float],
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule over this rank's micro-batches; what the last stage returned."""
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        micro_batches = (
            micro_batch(
                [sequences[i] for i in indices],
                [weights[i] for i in indices],
                host.device(),
                multiple,
            )
            for indices in bins
        )
        for chunk in self.ddp_chunks:
            chunk.train(not forward_only)
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=micro_batches,
            model=self.ddp_chunks,
            num_microbatches=len(bins),
            seq_length=0,  # unused: shapes travel with variable_seq_lengths
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(
        self, data: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, partial[Any]]:
        """Megatron's forward-step contract: the output tensor and the function of its loss."""
        batch = next(data)
        output = model(
            batch.tokens,
            batch.row.positions[None],
            None,
            packed_seq_params=batch.row,
            output_processor=self._logprobs,
            output_processor_context=batch,
        )
        return output, partial(self._loss, batch, with_objective=torch.is_grad_enabled())

    def _logprobs(
        self,
        hidden_states: Tensor,
        output_layer: torch.nn.Module,
        output_weight: Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> Tensor:
        """GPTModel's output hook: hidden states [N, 1, H] -> (logp, entropy) float32 [2, R]."""
        if self.config.parallel.sequence:
            # every rank computes the whole gradient of the gathered states: none is to be added up
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        weight = output_layer.weight if output_weight is None else output_weight
        logp, entropy = token_logprobs(
            hidden_states.squeeze(1).index_select(0, context.predictors),
            weight,
            context.targets,
            temperature=self.config.rollout.temperature,
            vocab_size=self.hf_config.vocab_size,
        )
        return torch.stack((logp, entropy))

    def _loss(
        self, batch: MicroBatch, output: Tensor, with_objective: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """The micro-batch's share of the loss, a count that nobody divides by, and what to keep."""
        logp, entropy = output
        unused_count = torch.zeros((), dtype=torch.int, device=output.device)
        if not with_objective:
            return logp.sum(), unused_count, logp.detach().cpu().numpy()
        options = self.config.objective
        result = OBJECTIVES[options.name](batch.batch, logp, options)
        loss = (result.loss * batch.token_weights).sum()
        tokens = {"entropy": entropy, **result.metrics}
        kept = {"loss": loss} | tokens
        return loss, unused_count, {k: v.detach().float().cpu().numpy() for k, v in kept.items()}


def token_weights(sequences: Seq[Sequence], options: ObjectiveConfig) -> list[float]:
    """What each sequence's token losses are multiplied by: the one place with a denominator.

    token_mean: 1 / all response tokens of the mini-batch; sequence_mean: 1 / (sequences · own
    tokens); constant: 1 / options.constant (the official code's scale).
    """
    num_tokens = [len(s.response) for s in sequences]
    if options.denominator == "token_mean":
        return [1.0 / sum(num_tokens)] * len(sequences)
    if options.denominator == "sequence_mean":
        return [1.0 / (len(sequences) * n) for n in num_tokens]
    assert options.denominator == "constant"
    return [1.0 / options.constant] * len(sequences)


def _data_parallel(chunk: GPTModel, config: Config) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return DistributedDataParallel(chunk.config, ddp, chunk)


def _optimizer_config(config: Config) -> OptimizerConfig:
    """AdamW on every parameter, as the official code has it (norms and biases decay too)."""
    options = config.optimizer
    dtype = DTYPES[config.model.dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        clip_grad=options.clip_norm,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )


def _add_up_gradients(model: list[torch.nn.Module], _num_tokens: Tensor | None, **kw: Any) -> None:
    """Megatron's reduction without its division: the losses are scaled already."""
    finalize_model_grads(model, None, **kw)


def _split(logp: np.ndarray, sequences: Seq[Sequence], indices: list[int]) -> list[np.ndarray]:
    """A micro-batch's [R] back into its sequences; none of an empty one."""
    cuts = np.cumsum([len(sequences[i].response) for i in indices])[:-1]
    return np.split(logp, cuts)[: len(indices)]


def _merge(parts: list[list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """All ranks' micro-batches as one: losses added, token values concatenated."""
    flat = [outputs for part in parts for outputs in part]
    merged = {key: np.concatenate([f[key] for f in flat]) for key in flat[0] if key != "loss"}
    return {"loss": float(sum(f["loss"] for f in flat)), **merged}


def _gather_over_data_parallel(value: Any) -> list[Any]:
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return [value]
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, value, group=group)
    return parts
