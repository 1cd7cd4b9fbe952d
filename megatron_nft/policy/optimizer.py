"""Gradients over the data-parallel ranks, and AdamW: what Megatron-Core is told of both."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_nft.config import Config
from megatron_nft.policy.architecture import DTYPES


def data_parallel(chunk: GPTModel, config: Config) -> DistributedDataParallel:
    """The chunk with float32 gradients that are added up over data- and context-parallel ranks.

    Without overlap: policy/logprobs.py adds the head's gradient to the buffer itself, and Megatron
    would wait for it to come by way of autograd.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    return DistributedDataParallel(chunk.config, ddp, chunk)


def gradient_buffers(chunk: DistributedDataParallel) -> list[Any]:
    """Megatron's buffers of the chunk's gradients; experts have their own."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def adamw(chunks: Sequence[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """AdamW on every parameter, as the official code has it (norms and biases decay too)."""
    options = config.optimizer
    dtype = DTYPES[config.model.dtype]
    optimizer_config = OptimizerConfig(
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
    return get_megatron_optimizer(optimizer_config, list(chunks))


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The torch AdamWs inside; Transformer Engine's Adam keeps its steps elsewhere."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [one.optimizer for one in chained]
    return [one for one in inner if isinstance(one, torch.optim.AdamW)]


def restore(optimizer: MegatronOptimizer) -> None:
    """Bring the optimizer's state back to the device, from `offload_to_cpu`.

    Megatron brings torch Adam's counts of steps too, which torch keeps on the host: it would wait
    for the device at every parameter to read them.
    """
    optimizer.restore_from_cpu()
    for inner in torch_optimizers(optimizer):
        for state in inner.state.values():
            state["step"] = state["step"].cpu()


def add_up_gradients(model: list[torch.nn.Module], _num_tokens: Tensor | None, **kw: Any) -> None:
    """Megatron's reduction without its division: the losses are scaled already."""
    finalize_model_grads(model, None, **kw)
