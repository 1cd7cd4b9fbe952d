"""The known answers, looked at once before anything is trained: one must have something to say."""

import logging
from collections.abc import Sequence

from megatron_nft.rollout.groups import Problem, Verdict
from megatron_nft.verify.verifier import Verifier

SHOWN, EXCERPT_CHARS = 5, 80
MAX_RETRIES = 2

logger = logging.getLogger("megatron_nft")


def readable(problems: Sequence[Problem], verifier: Verifier, on_bad_gold: str) -> list[int]:
    """Which of the problems have known answers that others can be compared with.

    Args:
        on_bad_gold: skip leaves the others out, with a warning that lists some.

    Raises:
        ValueError: there are others and they are not to be skipped, or nothing is left; a rule
            cannot be used.
    """
    golds = [(problem.answer, problem.rule) for problem in problems]
    found = verifier.read(golds)
    for _ in range(MAX_RETRIES):  # on a busy host a deadline says nothing
        late = [i for i, judgement in enumerate(found) if judgement.is_failure]
        for i, judgement in zip(late, verifier.read([golds[i] for i in late]), strict=True):
            found[i] = judgement
    kept = [i for i, judgement in enumerate(found) if judgement.verdict is Verdict.CORRECT]
    bad = [(p, j.reason) for p, j in zip(problems, found, strict=True) if j.reason]
    if not bad:
        return kept
    listed = "".join(
        f"\n  {p.source}, question {p.id}: {p.answer[:EXCERPT_CHARS]!r}: {reason}"
        for p, reason in bad[:SHOWN]
    )
    what = f"{len(bad)} of {len(problems)} known answers cannot be compared with:{listed}"
    if on_bad_gold == "error" or not kept:
        remedy = "mend them, choose another rule for the file (rule.name)"
        raise ValueError(f"{what}\n{remedy}, or set verify.on_bad_gold=skip")
    logger.warning("left out: %s", what)
    return kept
