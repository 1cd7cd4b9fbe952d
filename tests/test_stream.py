"""A live model's stream: in buckets of bounded size, layer by layer."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from processes import run
from toys import save_model

from checkpoints_conversion.buckets import buckets
from checkpoints_conversion.families import mappings_for, sizes_of
from checkpoints_conversion.hf_files import read_hf_config
from checkpoints_conversion.stream import in_layers
from megatron_nft.config import Config, ModelConfig, ParallelConfig

LAYOUTS = {
    "TP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "EP2": {"expert": 2},
}
BUCKETS_BYTES = (1, 20_000, 1 << 30)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([], 5, []),
        ([1, 1, 1], 3, [[1, 1, 1]]),
        ([1, 1, 1], 2, [[1, 1], [1]]),
        ([1, 9, 1, 1], 4, [[1], [9], [1, 1]]),  # a larger one alone
        ([9, 9], 4, [[9], [9]]),
        ([0, 4, 0, 4], 4, [[0, 4, 0], [4]]),
    ],
)
def test_buckets_are_as_full_as_they_may_be(
    sizes: Sequence[int], limit: int, expected: list[list[int]]
) -> None:
    assert [list(sizes[bucket]) for bucket in buckets(sizes, limit) if sizes] == expected


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_layers_come_one_after_the_other(tmp_path: Path, model_type: str) -> None:
    """Each of the table's parameters once, and none of a layer after the next has begun."""
    hf_config = read_hf_config(save_model(tmp_path, model_type, num_hidden_layers=3))
    sizes, mappings = sizes_of(hf_config), mappings_for(hf_config)
    found = [(name, hf_names) for _, name, hf_names in in_layers(mappings, sizes)]
    assert sorted(found) == sorted(names for m in mappings for names in m.names(sizes))
    places = [name.split(".layers.")[-1].split(".")[0] for name, _ in found]
    assert [place for place, _ in groupby(places)] == [
        "embedding",
        *"012",
        "decoder",
        "output_layer",
    ]


# collectives


def _count(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By layout and bucket size: the collectives of one stream and the bytes of the largest."""
    from checkpoints_conversion import hf_to_megatron
    from megatron_nft.policy import parallel
    from megatron_nft.policy.architecture import build_model, transformer_config

    hf_config, found = read_hf_config(path), {}
    parallel.initialize(ParallelConfig(), seed=0)
    for layout, options in LAYOUTS.items():
        parallel_config = ParallelConfig(**options)
        parallel.lay_groups(parallel_config, seed=0)
        config = Config(model=ModelConfig(dtype="float32"), parallel=parallel_config)
        chunks = build_model(hf_config, transformer_config(hf_config, config))
        hf_to_megatron.load(chunks, path, hf_config)
        for size in BUCKETS_BYTES:
            found[layout, size] = _counted(chunks, hf_config, size)
    parallel.finalize()
    return found


def _counted(chunks: Any, hf_config: Any, bucket_bytes: int) -> dict[str, Any]:
    import torch.distributed as dist

    from checkpoints_conversion.stream import stream

    moved: list[int] = []

    def noting(function: Any) -> Any:
        def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(tensor.nbytes)
            return function(tensor, *args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_gather_into_tensor"):
            patch.setattr(dist, name, noting(getattr(dist, name)))
        largest = max(tensor.nbytes for _, tensor in stream(chunks, hf_config, bucket_bytes))
    return {"num": len(moved), "most_bytes": max(moved), "largest": largest}


@pytest.mark.processes
def test_collectives_are_few_and_bounded(tmp_path: Path) -> None:
    """Experts, dense parameters and pipeline stages travel apart, whatever their number."""
    path = save_model(tmp_path, "qwen3_moe", num_hidden_layers=4, num_experts=16)
    ranks = run(_count, 2, path)
    assert ranks[0] == ranks[1]
    for (_, size), found in ranks[0].items():
        # gate and up are one parameter of Megatron's, and queries, keys and values
        assert found["most_bytes"] <= max(size, 2 * found["largest"])
    num = {layout: [ranks[0][layout, size]["num"] for size in BUCKETS_BYTES] for layout in LAYOUTS}
    # 4 layers of 16 experts of 2 parameters and 7 others each, and 3 more
    assert {layout: (most, fewest) for layout, (most, _, fewest) in num.items()} == {
        "TP2": (31, 1),  # all but experts, which are whole on each rank
        "PP2": (159, 4),  # two stages' experts, and their other parameters
        "EP2": (128, 2),  # two ranks' experts
    }
    assert all(fewest < some <= most / 2 for most, some, fewest in num.values())
