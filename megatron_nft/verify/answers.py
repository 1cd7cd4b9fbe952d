r"""Is this answer right? `extract` is cheap and runs in the caller, `equivalent` runs in a worker.

The rule is math-verify's (huggingface/Math-Verify 0.9.0): the last `\boxed{…}` of the answer, or
without a box what math-verify finds in the text, must be equivalent to the gold answer. Here:

- math-verify's own time limits are off. They are SIGALRMs, which work in a main thread only, and
  whoever calls `equivalent` on text it does not trust must own the deadline (`pool.Verifier`).
- math-verify turns its own failures into "different"; here a failure is UNVERIFIABLE. A gold
  answer that cannot be read is UNVERIFIABLE too, an answer that cannot be read is WRONG.
- a text without a box is cut to its last `MAX_TAIL_CHARS` characters, as math-verify's patterns
  take more than linear time, and nothing over `MAX_ANSWER_CHARS` is parsed at all.
- 4.5e33, which LaTeX reads as 4.5·e·33, may also be read as 4.5 × 10^33.
"""

import ast
import functools
import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from types import CodeType, ModuleType
from typing import Any

from megatron_nft.rollout.groups import Verdict

MAX_TAIL_CHARS = 2000
MAX_ANSWER_CHARS = 4000
MONITORING_TOOL_ID = 4  # one that CPython leaves to applications

BOX_START = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure
READABLE = re.compile(r"[\d$\\\[]")  # math-verify finds nothing in a text without any of these
SENTENCE_END = re.compile(r"(?<=[0-9})\]])\.$")  # not that of \right.
INTEGER = re.compile(r"-?[0-9]{1,100}")
BOXED_INTEGER = re.compile(r"\\boxed\{(-?[0-9]{1,100})\}")
SCIENTIFIC = re.compile(r"(?:\\boxed\{)?\s*(-?[0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)\s*\}?")


def judge(text: str, gold: str) -> Verdict:
    """The verdict on one answer, in this process and without a deadline."""
    return equivalent(extract(text), gold)


def extract(text: str) -> str | None:
    r"""What math-verify is to read of an answer: its last box, else its tail, or None.

    A last box that is empty or never closed is no answer, whatever stands around it. Linear time.
    """
    if BOX_START.search(text):
        content = last_boxed(text)
        return _box(content) if content and content.strip() else None
    tail = text[-MAX_TAIL_CHARS:]
    return tail if READABLE.search(tail) else None


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{…}` that opens last, braces balanced; None if there is none."""
    start = None
    for match in BOX_START.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def equivalent(extracted: str | None, gold: str) -> Verdict:
    """The verdict on what `extract` returned. May run for hours or exhaust the memory."""
    return decide_unparsed(extracted, gold) or _decide_parsed(extracted, gold)


def decide_unparsed(extracted: str | None, gold: str) -> Verdict | None:
    """The verdict where it takes no parsing, in about a microsecond; else None.

    Plain integers are most of the training data. math-verify parses both to sympy Integers and
    compares those, so comparing them here is the same and costs a thousandth.
    """
    if not gold.strip():
        return Verdict.UNVERIFIABLE
    if extracted is None:
        return Verdict.WRONG
    if max(len(extracted), len(gold)) > MAX_ANSWER_CHARS:
        return Verdict.UNVERIFIABLE
    answer_integer = BOXED_INTEGER.fullmatch(extracted)
    gold_integer = INTEGER.fullmatch(gold.strip())
    if answer_integer and gold_integer:
        same = int(answer_integer.group(1)) == int(gold_integer.group())
        return Verdict.CORRECT if same else Verdict.WRONG
    return None


def _decide_parsed(extracted: str, gold: str) -> Verdict:
    num_before = num_exhausted()
    golds = _tried(lambda: _readings(_gold_text(gold)))
    answers = _tried(lambda: _readings(extracted))
    if golds is None or answers is None:
        return Verdict.UNVERIFIABLE
    outcomes = set()
    for pair in product(golds, answers):
        outcomes.add(_tried(partial(_equal, *pair)))
        if True in outcomes:
            return Verdict.CORRECT
    if None in outcomes:  # a pair that could not be compared may have been equal
        return Verdict.UNVERIFIABLE
    gold_was_read = any(not isinstance(reading, str) for reading in golds)
    if gold_was_read and num_exhausted() == num_before:
        return Verdict.WRONG
    return Verdict.UNVERIFIABLE


def _tried(ask: Callable[[], Any]) -> Any:
    """What math-verify says, or None where it raised: it could not tell, and that is no "wrong".

    sympy and its LaTeX parser raise any type on text that they do not understand.
    """
    try:
        return ask()
    except Exception:  # noqa: BLE001 - see above
        return None


def _equal(gold: Any, answer: Any) -> bool:
    return _math_verify().verify(gold, answer, timeout_seconds=None, raise_on_error=True)


def _readings(text: str) -> list[Any]:
    """The sympy objects that a text may mean, and the string that math-verify would compare."""
    texts = [text]
    if scientific := SCIENTIFIC.fullmatch(text):
        mantissa, exponent = scientific.groups()
        texts.append(_box(rf"{mantissa} \times 10^{{{exponent}}}"))
    parse = _math_verify().parse
    return [x for t in texts for x in parse(t, parsing_timeout=None, raise_on_error=True)]


def _gold_text(gold: str) -> str:
    r"""A gold answer as text for math-verify: boxed, unless it says itself where its maths is.

    Read are `72`, `\frac{1}{2}`, `$69$, $84$`, `\boxed{5}`, and OlympiadBench's lists such as
    `['$2n-2$']`, whose elements are all asked for.
    """
    gold = gold.strip()
    if gold.startswith(("['", '["')):
        gold = ", ".join(ast.literal_eval(gold))
    if BOX_START.search(gold):
        return _box(last_boxed(gold) or "")
    if len(re.findall(r"(?<!\\)\$", gold)) >= 2:
        return gold
    return _box(gold)


def _box(content: str) -> str:
    return rf"\boxed{{{SENTENCE_END.sub('', content.strip())}}}"


@functools.cache
def _math_verify() -> ModuleType:
    """math-verify, imported on first use: about 2 s that a training process never pays."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no deadline
    return math_verify


_exhausted: list[str] = []


def num_exhausted() -> int:
    """How often this process ran out of memory or stack so far, caught or not.

    math-verify and sympy swallow both and go on to "different"; the interpreter still sees them.
    """
    _watch_for_exhaustion()
    return len(_exhausted)


@functools.cache
def _watch_for_exhaustion() -> None:
    def note(_code: CodeType, _offset: int, error: BaseException) -> None:
        if isinstance(error, MemoryError | RecursionError):
            _exhausted.append(type(error).__name__)

    events = sys.monitoring.events
    sys.monitoring.use_tool_id(MONITORING_TOOL_ID, "megatron_nft.verify")
    sys.monitoring.register_callback(MONITORING_TOOL_ID, events.RAISE, note)
    sys.monitoring.set_events(MONITORING_TOOL_ID, events.RAISE)
