"""`megatron-nft logs`: what a launched run's jobs say, also in files that come later."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import jobs


def launched(run_dir: Path) -> Path:
    """The folder of a job's logs, with one of them."""
    folder = run_dir / "job"
    folder.mkdir()
    (run_dir / "launch").mkdir()
    handles = {"train": {"id": "1", "folder": str(folder)}}
    (run_dir / "launch" / "jobs.json").write_text(json.dumps(handles))
    (folder / "log_1_0.out").write_text("".join(f"line {i}\n" for i in range(100)))
    return folder


def test_the_end_of_a_log_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = launched(tmp_path)
    assert jobs.logs(tmp_path, "train", num_lines=2) == 0
    assert capsys.readouterr().out == f"==> {folder}/log_1_0.out\nline 98\nline 99\n"
    with pytest.raises(ValueError, match="there is no job 'evaluate'; it may be train"):
        jobs.logs(tmp_path, "evaluate")
    (folder / "log_1_0.out").unlink()
    with pytest.raises(ValueError, match="train has not begun: no log in"):
        jobs.logs(tmp_path, "train")


def test_what_a_job_says_once_it_is_queued_again_is_followed(tmp_path: Path) -> None:
    folder = launched(tmp_path)
    follow = (
        "import sys; from pathlib import Path; from launch import jobs; jobs.LOOK_EVERY_S = 0.05; "
    )
    follow += f"jobs.logs(Path({str(tmp_path)!r}), 'train', num_lines=1, follow=True)"
    with subprocess.Popen(
        [sys.executable, "-c", follow], stdout=subprocess.PIPE, text=True
    ) as process:
        said = process.stdout
        assert said is not None
        limit = threading.Timer(60, process.kill)
        limit.start()
        try:
            assert said.readline() == f"==> {folder}/log_1_0.out\n"
            assert said.readline() == "line 99\n"
            with (folder / "log_1_0.out").open("a") as log:
                log.write("told to stop\nnot whole")
            assert said.readline() == f"==> {folder}/log_1_0.out\n"
            assert said.readline() == "told to stop\n"
            (folder / "log_1_1.out").write_text("again\n")
            assert said.readline() == f"==> {folder}/log_1_1.out\n"
            assert said.readline() == "again\n"
        finally:
            limit.cancel()
            process.kill()
