r"""The default rule: is this answer equivalent to the known one, by mathematics?

It is math-verify's (huggingface/Math-Verify 0.9.0): the last `\boxed{…}` of the answer, or
without a box what math-verify finds in the text, must be equivalent to the gold answer. Here:

- math-verify's own time limits are off. They are SIGALRMs, which work in a main thread only, and
  whoever calls `decide` on text it does not trust must own the deadline (`pool.Pool`).
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

from megatron_nft.rollout.groups import Judgement, Verdict
from megatron_nft.verify.explosive import explosive

MAX_TAIL_CHARS = 2000
MAX_ANSWER_CHARS = 4000
NOT_READ = "the known answer could not be read"
MONITORING_TOOL_ID = 4  # one that CPython leaves to applications

BOX_START = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure
READABLE = re.compile(r"[\d$\\\[]")  # math-verify finds nothing in a text without any of these
SENTENCE_END = re.compile(r"(?<=[0-9})\]])\.$")  # not that of \right.
INTEGER = re.compile(r"-?[0-9]{1,100}")
BOXED_INTEGER = re.compile(r"\\boxed\{(-?[0-9]{1,100})\}")
SCIENTIFIC = re.compile(r"(?:\\boxed\{)?\s*(-?[0-9]*\.?[0-9]+)[eE]([+-]?[0-9]+)\s*\}?")


RIGHT, WRONG = Judgement(Verdict.CORRECT), Judgement(Verdict.WRONG)
NO_GOLD = Judgement(Verdict.UNVERIFIABLE, "there is no known answer")
MAX_GOLDS = 1024  # that a process keeps as it has read them


class MathVerify:
    """See rules.Rule."""

    def extract(self, text: str) -> str | None:
        return extract(text)

    def decide_at_once(self, extracted: str | None, gold: str) -> Judgement | None:
        """Plain integers are most of the training data.

        math-verify parses both to sympy Integers and compares those, so comparing them here is the
        same and costs a thousandth.
        """
        if not gold.strip():
            return NO_GOLD
        if extracted is None:
            return WRONG
        if trouble := _untried(extracted) or _untried_gold(gold):
            return Judgement(Verdict.UNVERIFIABLE, trouble)
        answer_integer = BOXED_INTEGER.fullmatch(extracted)
        gold_integer = INTEGER.fullmatch(gold.strip())
        if answer_integer and gold_integer:
            return RIGHT if int(answer_integer.group(1)) == int(gold_integer.group()) else WRONG
        return None

    def decide(self, extracted: str | None, gold: str) -> Judgement:
        return self.decide_at_once(extracted, gold) or _decide_parsed(extracted, gold)

    def read(self, gold: str) -> Judgement:
        """A mere string equals itself and nothing differs from it: no question to train on."""
        if not gold.strip():
            return NO_GOLD
        if trouble := _untried_gold(gold):
            return Judgement(Verdict.UNVERIFIABLE, trouble)
        if INTEGER.fullmatch(gold.strip()):
            return RIGHT
        golds = _golds(gold)
        if not isinstance(golds, str) and _is_read(golds):
            return RIGHT
        return Judgement(Verdict.UNVERIFIABLE, golds if isinstance(golds, str) else NOT_READ)


def judge(text: str, gold: str) -> Verdict:
    """The verdict on one answer, in this process and without a deadline."""
    return MathVerify().decide(extract(text), gold).verdict


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


def _untried(text: str) -> str:
    """Why nobody should try to parse it; empty where one may."""
    if len(text) > MAX_ANSWER_CHARS:
        return f"{len(text)} characters"
    return explosive(text)


def _untried_gold(gold: str) -> str:
    """The same of a known answer, which is maths and no prose."""
    return _untried(gold) or explosive(_box(gold))


def _decide_parsed(extracted: str, gold: str) -> Judgement:
    golds, answers = _golds(gold), _tried(lambda: _readings(extracted))
    if trouble := next((found for found in (golds, answers) if isinstance(found, str)), ""):
        return Judgement(Verdict.UNVERIFIABLE, trouble)
    failure = ""
    for pair in product(golds, answers):
        found = _tried(partial(_equal, *pair))
        if found is True:
            return RIGHT
        failure = failure or (found if isinstance(found, str) else "")
    if failure:  # a pair that could not be compared may have been equal
        return Judgement(Verdict.UNVERIFIABLE, failure)
    return WRONG if _is_read(golds) else Judgement(Verdict.UNVERIFIABLE, NOT_READ)


def _golds(gold: str) -> list[Any] | str:
    return _tried(lambda: _read_gold(gold))


@functools.lru_cache(MAX_GOLDS)  # of those that could be read
def _read_gold(gold: str) -> list[Any]:
    return _readings(_gold_text(gold))


def _is_read(golds: list[Any]) -> bool:
    return any(not isinstance(reading, str) for reading in golds)


def _tried(ask: Callable[[], Any]) -> Any:
    """What math-verify says; a str, what went wrong: it could not tell then, which is no "wrong".

    sympy and its LaTeX parser raise any type on text that they do not understand, and what ran out
    of memory or stack may have been swallowed on the way to a "different".
    """
    num_before = num_exhausted()
    try:
        found = ask()
    except Exception as error:  # noqa: BLE001 - see above
        return f"math-verify raised {type(error).__name__}"
    if found is not True and num_exhausted() > num_before:
        return f"{_exhausted[-1]} in math-verify"
    return found


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
