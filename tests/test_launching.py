"""How many processes a run has on this machine, and which GPUs are its servers'."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_nft import processes, recipe
from megatron_nft.config import Config, ParallelConfig, RolloutConfig

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "demo.yaml"
REMOTE = RolloutConfig(engine="remote", num_servers=1, tensor=2)


@pytest.mark.parametrize(
    ("num_gpus", "parallel", "rollout", "expected"),
    [
        (0, ParallelConfig(), RolloutConfig(), 1),
        (0, ParallelConfig(tensor=2, pipeline=2), REMOTE, 4),
        (8, ParallelConfig(tensor=2), RolloutConfig(), 8),
        (8, ParallelConfig(tensor=2), REMOTE, 6),
        (8, ParallelConfig(tensor=4), REMOTE, 4),
        (8, ParallelConfig(tensor=4), replace(REMOTE, servers=["http://other:8000"]), 8),
        (8, ParallelConfig(num_processes=3), REMOTE, 3),
    ],
)
def test_one_process_a_gpu_that_no_server_has(
    num_gpus: int,
    parallel: ParallelConfig,
    rollout: RolloutConfig,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "num_gpus", lambda: num_gpus)
    assert processes.num_processes_of(Config(parallel=parallel, rollout=rollout)) == expected


def test_too_few_gpus_for_trainer_and_servers_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "num_gpus", lambda: 3)
    overrides = [f"run_dir={tmp_path}", "rollout.engine=remote", "rollout.num_servers=2"]
    assert recipe.load(RECIPE, overrides).parallel.tensor == 2
    with pytest.raises(ValueError, match=r"2 processes and 2 GPUs for servers.*has 3 GPUs"):
        processes.run(RECIPE, overrides)


RECIPES = sorted(RECIPE.parent.glob("[!d]*.yaml"))
REMOTELY = ("rollout.engine=remote", "rollout.weight_transfer=nccl", "old_logp=rollout")
REMOTELY += ("rollout.max_steps_off_policy=1", "rollout.in_flight_updates=true")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [(), REMOTELY], ids=["colocated", "remote"])
def test_every_recipe_can_be_evaluated_with_its_own_engines(
    path: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def note(path: Path, overrides: list[str], *, verb: str) -> int:
        loaded.append((recipe.load(path, overrides), verb))
        return 0

    monkeypatch.setattr(processes, "run", note)
    assert processes.evaluate(path, overrides, None) == 0
    assert processes.evaluate(path, overrides, Path("models/base")) == 0
    [(config, verb), (other, _)] = loaded
    run_dir = Path(recipe.load(path).run_dir)
    assert verb == "evaluate"
    assert config.rollout.engine == "colocated"
    assert Path(config.run_dir).parent == run_dir / "evaluation"
    assert (config.model.path, other.model.path) == (str(run_dir / "hf"), "models/base")
