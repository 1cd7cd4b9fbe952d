"""`megatron-nft launch --dry-run` prints what would be submitted, for every recipe."""

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = REPOSITORY / ".venv-launch" / "bin" / "megatron-nft"
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
CLUSTER = REPOSITORY / "launch" / "clusters" / "example.yaml"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not LAUNCHER.exists(), reason="there is no .venv-launch"),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_prints_sound_scripts_and_leaves_nothing(path: Path, tmp_path: Path) -> None:
    command = [str(LAUNCHER), "launch", str(path), "--cluster", str(CLUSTER), "--dry-run"]
    done = subprocess.run(
        [*command, "--nodes", "4", "seed=7"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    jobs = done.stdout.split("# on each node:\n")
    batch = jobs[0][jobs[0].index("#!/bin/bash") :]
    for line in (
        "--nodes=4",
        "--account=my_account",
        "--signal=USR1@300",
        "--mem=0",
        "--requeue",
        "--exclusive",
    ):
        assert f"#SBATCH {line}\n" in batch
    for script in (batch, jobs[1].split("\n# evaluate\n")[0]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "trap queue_again EXIT" in batch
    assert "seed: 7" in jobs[1]
    assert ("# evaluate" in done.stdout) == (len(jobs) == 3)
    assert "#SBATCH --dependency" not in batch
