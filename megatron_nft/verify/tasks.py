"""What the verifier and its workers say to each other, a line of JSON each, in ASCII."""

import json
from dataclasses import astuple
from typing import NamedTuple

from megatron_nft.config import RuleConfig
from megatron_nft.rollout.groups import Judgement, Verdict

READY, TIMEOUT = b'["ready"]\n', b'["timeout"]\n'
MAX_REPLY = 4096  # bytes: a pipe takes as many at once
MAX_REASON_CHARS = 300


class Task(NamedTuple):
    """All that a verdict depends on; equal tasks have equal verdicts."""

    extracted: str | None  # what the rule takes of the answer
    gold: str
    rule: RuleConfig
    is_reading: bool = False  # can answers be compared with the known one at all?


def encode_task(task: Task) -> bytes:
    return json.dumps([*task[:2], astuple(task.rule), task.is_reading]).encode() + b"\n"


def decode_task(line: bytes) -> Task:
    extracted, gold, rule, is_reading = json.loads(line)
    return Task(extracted, gold, RuleConfig(*rule), is_reading)


def encode_judgement(judgement: Judgement) -> bytes:
    reason = judgement.reason[:MAX_REASON_CHARS]
    return json.dumps([judgement.verdict.value, reason]).encode() + b"\n"


def encode_trouble(message: str) -> bytes:
    return json.dumps(["trouble", message[:MAX_REASON_CHARS]]).encode() + b"\n"


def decode_reply(line: bytes) -> Judgement | str:
    """A judgement, or what is wrong with the rule. Raises ValueError for anything else."""
    kind, text = json.loads(line)
    return text if kind == "trouble" else Judgement(Verdict(kind), text)
