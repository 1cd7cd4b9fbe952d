import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from megatron_nft.metrics import Record
from megatron_nft.panels import panels
from megatron_nft.report import _apart, _by_rollout, _smooth, draw, headline

ROLLOUT: Record = {
    "accuracy_all": 0.4,
    "accuracy_kept": 0.5,
    "groups_kept_fraction": 0.6,
    "unverifiable_rate": 0.01,
    "response_length_mean": 900,
    "truncated_fraction": 0.1,
    "tokens_per_second": 2e4,
    "seconds/rollout": 30.0,
    "seconds/old_logp": 5.0,
    "peak_memory_gib": 61.0,
}
STEP: Record = {
    "loss": 0.0,
    "grad_norm": 0.3,
    "entropy": 0.4,
    "ratio_q01": 0.9,
    "ratio_q50": 1.0,
    "ratio_q99": 1.2,
    "clip_fraction": 0.02,
    "logp_delta_mean": 0.004,
    "logp_delta_max": 0.3,
}


def run(num_rollouts: int, steps: int = 2) -> list[Record]:
    records: list[Record] = [{"step": 0, "eval/a/accuracy": 0.2, "eval/b/accuracy": 0.4}]
    for step in range(1, num_rollouts * steps + 1):
        last = ROLLOUT if step % steps == 0 else {}
        records.append({"step": step, "rollout": (step - 1) // steps} | STEP | last)
    return records


def saved(run_dir: Path, records: Sequence[Record]) -> Path:
    run_dir.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines)
    return run_dir


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert len(set(image.convert("L").resize((160, 100)).tobytes())) > 10  # something is drawn
        return image.size


def test_a_full_run_has_every_panel() -> None:
    assert [panel.title for panel in panels(run(3))] == [
        "Accuracy",
        "Groups trained on",
        "Response length",
        "Entropy",
        "Probability ratio, new / old policy",
        "Clipped tokens",
        "Gradient norm",
        "Lost answers",
        "Trainer against rollout engine",
        "Time",
        "Throughput",
    ]


def test_panels_hold_the_series_that_exist() -> None:
    records: list[Record] = [
        {"step": 0, "eval/aime24/accuracy": 0.1},
        {"step": 1, "truncated_fraction": 0.1, "entropy": None, "seconds/sync_weights": 2.0},
    ]
    shown = {panel.title: [series.label for series in panel.series] for panel in panels(records)}
    assert shown == {
        "Accuracy": ["aime24"],
        "Lost answers": ["truncated"],
        "Time": ["sync weights"],
    }


@pytest.mark.parametrize("num_rollouts", [1, 3, 100])
def test_the_picture_has_its_size(tmp_path: Path, num_rollouts: int) -> None:
    run_dir = saved(tmp_path / "run", run(num_rollouts))
    assert draw(run_dir) == run_dir / "report.png"
    assert size_of(run_dir / "report.png") == (1600, 1000)


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 0, "eval/a/accuracy": 0.2}],
        [{"step": 1, "entropy": 0.4, "loss": None, "non_finite": 1}],
        [{"step": 1, "ratio_q50": 1.0}, {"step": 2, "ratio_q99": 1.2}],
        [{"step": 1, "logp_delta_max": 0.0}, {"step": 2, "logp_delta_max": 0.0}],
        [{"step": 0, "seconds/evaluate": 3.0}],
        [{"step": 5, "clip_fraction": 0.0, "grad_norm": 1e-12}, {"step": 6, "grad_norm": 1e12}],
    ],
)
def test_missing_keys_leave_panels_out(tmp_path: Path, records: list[Record]) -> None:
    out = draw(saved(tmp_path, records), tmp_path / "pictures" / "curves.png", title="a title")
    assert out == tmp_path / "pictures" / "curves.png"
    assert size_of(out) == (1600, 1000)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is it a run directory"):
        draw(tmp_path)
    with pytest.raises(ValueError, match="no values to draw yet"):
        draw(saved(tmp_path, [{"step": 1, "lr": 1e-6}]))


def test_headline_says_before_and_after() -> None:
    before = {"step": 0, "eval/a/accuracy": 0.1, "eval/b/accuracy": 0.3}
    after = {"step": 9, "eval/a/accuracy": 0.5, "eval/b/accuracy": 0.6, "accuracy_all": 0.9}
    assert headline([before, after]) == "held-out accuracy 20.0 % → 55.0 %, mean of 2 sets"
    assert headline([before]) == "held-out accuracy 20.0 %, mean of 2 sets"
    trained = [{"step": 1, "accuracy_all": 0.25}, {"step": 2, "accuracy_all": 0.5}]
    assert headline(trained) == "training accuracy 25.0 % → 50.0 %"
    assert headline([{"step": 1, "entropy": 0.1}]) == ""


def test_seconds_add_up_over_a_rollout() -> None:
    records: list[Record] = [
        {"step": 1, "rollout": 0, "seconds/a": 1.0},
        {"step": 2, "rollout": 0, "seconds/a": 2.0, "seconds/b": 4.0},
        {"step": 3, "rollout": 1},
        {"step": 4, "rollout": 1, "seconds/b": 8.0},
    ]
    assert _by_rollout(records, ["seconds/a", "seconds/b"]) == [
        (2, {"seconds/a": 3.0, "seconds/b": 4.0}),
        (4, {"seconds/b": 8.0}),
    ]


def test_smoothing_removes_what_repeats_in_every_rollout() -> None:
    assert _smooth([i % 16 for i in range(1024)], num_rollouts=64) == pytest.approx([7.5] * 1024)
    line = [float(i) for i in range(800)]
    middle = slice(20, -20)
    assert _smooth(line, num_rollouts=800)[middle] == pytest.approx(line[middle], abs=0.5)
    assert _smooth([1.0, 9.0], num_rollouts=2) == [1.0, 9.0]


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    assert _apart([50.0, 10.0], gap=5) == [50.0, 10.0]
    low, high, middle, alone = _apart([30.0, 31.0, 30.5, 90.0], gap=5)
    assert (low, middle, high) == pytest.approx((25.5, 30.5, 35.5), abs=0.01)
    assert alone == 90.0
