"""How tensors of unequal length travel between pipeline stages."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Shape = list[int]


def schedule_options(config: TransformerConfig, lengths: Seq[int]) -> dict[str, Any]:
    """What Megatron's schedule is given besides its defaults: something where there is a pipeline.

    Args:
        lengths: tokens of this rank's row in every micro-batch.
    """
    if config.pipeline_model_parallel_size == 1:
        return {}
    return {
        "p2p_communicator": KnownShapes(config, lengths),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }


class KnownShapes(P2PCommunicator):
    """Megatron's communicator, except that stages need not tell each other the shapes.

    Every stage packs the same micro-batches, and the schedule fixes their order. Megatron would
    send each shape before its tensor, and wait for it; in an interleaved schedule that pairs the
    shape of one tensor with another one between two ranks (both directions are one batch there),
    or waits for a shape that is sent only once the waiting rank has gone on.
    """

    def __init__(self, config: TransformerConfig, lengths: Seq[int]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        table = get_schedule_table(
            len(lengths), num_chunks, config.microbatch_group_size_per_vp_stage
        )

        def shapes(starts_here: bool) -> Iterator[Shape]:
            """Of what arrives, in order: everything but what a chunk at the pipeline's end makes.

            Backward runs through the chunks the other way, in rounds of the same micro-batches.
            """
            arrivals = (number for number, chunk in table if chunk or not starts_here)
            return ([lengths[number], 1, config.hidden_size] for number in arrivals)

        self._from_prev = shapes(self.is_pp_first_stage)
        self._from_next = shapes(self.is_pp_last_stage)

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """The shapes of what comes from the previous and from the next stage.

        Megatron calls this where `variable_seq_lengths` is set.
        """
        return (
            next(self._from_prev) if recv_prev else [0, 0, 0],
            next(self._from_next) if recv_next else [0, 0, 0],
        )
