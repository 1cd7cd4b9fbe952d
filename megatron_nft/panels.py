"""What a run's picture shows: its panels, and the metrics in each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_nft.metrics import Record

BLUE, ORANGE, GREEN, PURPLE = "#2B6CB0", "#DD7A2E", "#2F9673", "#7F5AB6"
RED, CYAN, GOLD, SLATE = "#C2415A", "#3FA3BF", "#C59B1F", "#94A0AD"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, CYAN, GOLD)


@dataclass(frozen=True)
class Series:
    key: str
    label: str
    color: str = BLUE


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    series: tuple[Series, ...]
    kind: str = "lines"  # a name in DRAWINGS
    scale: float = 1.0  # from the logged unit to the shown one
    log: bool = False
    span: int = 1  # columns


PANELS = (
    Panel(
        "Groups trained on",
        "%",
        (
            Series("groups_kept_fraction", "groups kept", BLUE),
            Series("accuracy_kept", "their accuracy", ORANGE),
        ),
        scale=100,
    ),
    Panel("Response length", "tokens", (Series("response_length_mean", "mean"),)),
    Panel("Entropy", "nats per token", (Series("entropy", "entropy"),)),
    Panel(
        "Probability ratio, new / old policy",
        "ratio",
        (
            Series("ratio_q01", "1 %", CYAN),
            Series("ratio_q50", "median", BLUE),
            Series("ratio_q99", "99 %", PURPLE),
        ),
        kind="band",
    ),
    Panel("Clipped tokens", "% of tokens", (Series("clip_fraction", "clipped"),), scale=100),
    Panel("Gradient norm", "norm before clipping", (Series("grad_norm", "norm"),)),
    Panel(
        "Lost answers",
        "% of answers",
        (
            Series("truncated_fraction", "truncated", BLUE),
            Series("unverifiable_rate", "unverifiable", ORANGE),
        ),
        scale=100,
    ),
    Panel(
        "Trainer against rollout engine",
        "|Δ log p|, nats",
        (Series("logp_delta_max", "max", ORANGE), Series("logp_delta_mean", "mean", BLUE)),
        log=True,
    ),
)
THROUGHPUT = Panel("Throughput", "tokens / s", (Series("tokens_per_second", "throughput"),))


def panels(records: Sequence[Record]) -> list[Panel]:
    """The panels for which a run has values, each with the series that it has."""
    present = list(
        dict.fromkeys(key for r in records for key, value in r.items() if value is not None)
    )
    everything = (_accuracy_panel(present), *PANELS, _seconds_panel(present), THROUGHPUT)
    kept = []
    for panel in everything:
        series = tuple(s for s in panel.series if s.key in present)
        if series:
            kept.append(replace(panel, series=series))
    return kept


def _accuracy_panel(present: Sequence[str]) -> Panel:
    training = Series("accuracy_all", "training", SLATE)
    held_out = (
        Series(key, key.removeprefix("eval/").removesuffix("/accuracy"), color)
        for key, color in _colored(held_out_sets(present))
    )
    return Panel("Accuracy", "%", (training, *held_out), kind="accuracy", scale=100, span=2)


def _seconds_panel(present: Sequence[str]) -> Panel:
    colored = _colored(phases(present))
    series = (Series(key, key.split("/")[1].replace("_", " "), color) for key, color in colored)
    return Panel("Time", "seconds per rollout", tuple(series), kind="stack")


def held_out_sets(keys: Iterable[str]) -> list[str]:
    """The keys of accuracies on evaluation sets."""
    return [key for key in keys if key.startswith("eval/") and key.endswith("/accuracy")]


def phases(keys: Iterable[str]) -> list[str]:
    """The keys of times."""
    return [key for key in keys if key.startswith("seconds/")]


def _colored(keys: Sequence[str]) -> list[tuple[str, str]]:
    return [(key, CYCLE[i % len(CYCLE)]) for i, key in enumerate(keys)]
