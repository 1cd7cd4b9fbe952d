"""Process groups and random states of one training process."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_nft.config import ParallelConfig
from megatron_nft.policy import host

# Tensor ranks that share an expert's matrices: whole ones make for wider products and no gathering
# of tokens. parallel.expert spreads the experts, over the tensor ranks as well.
EXPERT_TENSOR = 1


def initialize(parallel: ParallelConfig, seed: int, timeout_s: float = 1800.0) -> None:
    """Join the job's processes and lay Megatron's groups over them; call under torchrun."""
    host.prepare()
    if host.has_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    host.limit_threads(host.num_local_processes())
    dist.init_process_group(host.backend(), timeout=timedelta(seconds=timeout_s))
    lay_groups(parallel, seed)


def lay_groups(parallel: ParallelConfig, seed: int) -> None:
    """Lay Megatron's groups over the processes, in place of any earlier layout."""
    parallel_state.destroy_model_parallel()
    make_groups(parallel)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def make_groups(parallel: ParallelConfig, *, has_gloo: bool = True) -> None:
    """Megatron's groups alone; `has_gloo`: those of its own for CPU tensors too."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=EXPERT_TENSOR,
        create_gloo_process_groups=has_gloo,
    )


def finalize() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
