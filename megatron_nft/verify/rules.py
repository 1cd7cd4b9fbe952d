r"""The rules by which answers are compared with known ones; a data source chooses one.

math_verify   see answers.py; the default
boxed_exact   DAPO's (arXiv 2503.14476): the last box, within the last `last_chars` characters, must
              be the known answer, letter by letter after normalisation
numeric       the last box, or without one the last number, within `tolerance` of the known answer
module:name   a function of your own, `(text, known answer) -> True, False or None`; None is
              UNVERIFIABLE, and so is an exception

`extract` and `decide_at_once` are cheap and run in the caller; `decide` and `read` may take for
ever and run in a worker.
"""

import functools
import importlib
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Protocol

from megatron_nft.config import RuleConfig
from megatron_nft.rollout.groups import Judgement, Verdict
from megatron_nft.verify import answers
from megatron_nft.verify.answers import last_boxed

MAX_TEXT_CHARS = 2**18  # of what a function of the user's is given: the end
MAX_NUMBER_CHARS = 200

NUMBER = r"[-+]?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
LAST_NUMBER = re.compile(rf"{NUMBER}(?:\s*/\s*\d+)?(?:\s*\\?%)?")
FRACTION = re.compile(rf"([-+]?)\\frac\{{({NUMBER})\}}\{{({NUMBER})\}}|({NUMBER})/({NUMBER})")
TIMES_POWER = re.compile(rf"({NUMBER})(?:\\times|\\cdot|\*)10\^\{{?([-+]?\d{{1,3}})\}}?")
SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
WHOLE_NUMBER = re.compile(r"-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
SAYS_NOTHING = re.compile(r"\\left|\\right|\\[!,;:]|\\?\$|~|\^\{?\\circ\}?|\\displaystyle")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
UNIT = re.compile(WRAPPED.pattern + r"(?:\^\{?-?\d\}?)?")
MINUS = str.maketrans("\u2212\u2013", "--")


class RuleError(ValueError):
    """A rule of the user's that cannot be used."""


class Rule(Protocol):
    def extract(self, text: str) -> str | None:
        """What of an answer its verdict depends on; None: it has no answer. Linear time."""

    def decide_at_once(self, extracted: str | None, gold: str) -> Judgement | None:
        """The verdict where it takes about a microsecond to reach; else None."""

    def decide(self, extracted: str | None, gold: str) -> Judgement:
        """The verdict. May run for hours or exhaust the memory."""

    def read(self, gold: str) -> Judgement:
        """CORRECT if answers can be compared with it, else UNVERIFIABLE and why; as `decide`."""


@functools.cache
def rule_of(config: RuleConfig) -> Rule:
    """The rule that a data source chose."""
    if config.name == "math_verify":
        return answers.MathVerify()
    if config.name == "boxed_exact":
        return BoxedExact(config.last_chars)
    if config.name == "numeric":
        return Numeric(config.tolerance)
    return Custom(config.name)


class _Simple:
    """A rule that needs no worker."""

    def decide_at_once(self, extracted: str | None, gold: str) -> Judgement:
        readable = self.read(gold)
        if readable.verdict is not Verdict.CORRECT:
            return readable
        same = extracted is not None and self.is_same(extracted, gold)
        return Judgement(Verdict.CORRECT if same else Verdict.WRONG)

    def decide(self, extracted: str | None, gold: str) -> Judgement:
        return self.decide_at_once(extracted, gold)

    def is_same(self, extracted: str, gold: str) -> bool:
        raise NotImplementedError

    def read(self, gold: str) -> Judgement:
        raise NotImplementedError


class BoxedExact(_Simple):
    def __init__(self, last_chars: int) -> None:
        self._last_chars = last_chars

    def extract(self, text: str) -> str | None:
        return last_boxed(text[-self._last_chars :])

    def is_same(self, extracted: str, gold: str) -> bool:
        return normalised(extracted) == normalised(gold)

    def read(self, gold: str) -> Judgement:
        if normalised(gold):
            return Judgement(Verdict.CORRECT)
        return Judgement(Verdict.UNVERIFIABLE, "nothing is left of the known answer")


class Numeric(_Simple):
    def __init__(self, tolerance: float) -> None:
        self._tolerance = Fraction(tolerance)

    def extract(self, text: str) -> str | None:
        if answers.BOX_START.search(text):
            return last_boxed(text)
        found = LAST_NUMBER.findall(text[-answers.MAX_TAIL_CHARS :])
        return found[-1] if found else None

    def decide_at_once(self, extracted: str | None, gold: str) -> Judgement:
        has_digits = extracted is not None and re.search(r"\d", extracted)
        if has_digits and not numbers(extracted) and numbers(gold):
            return Judgement(Verdict.UNVERIFIABLE, "the answer's number could not be read")
        return super().decide_at_once(extracted, gold)

    def is_same(self, extracted: str, gold: str) -> bool:
        for ours, known in product(numbers(extracted), numbers(gold)):
            if abs(ours - known) <= self._tolerance * (abs(known) or 1):
                return True
        return False

    def read(self, gold: str) -> Judgement:
        if numbers(gold):
            return Judgement(Verdict.CORRECT)
        return Judgement(Verdict.UNVERIFIABLE, "the known answer is no number")


class Custom:
    """A function of the user's, by its import path.

    Raises:
        RuleError: when it is first needed, in a worker, and cannot be imported; when it returns
            what is no verdict.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @functools.cached_property
    def _function(self) -> Callable[[str, str], object]:
        module, _, name = self._path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RuleError(
                f"rule.name was {self._path!r}, which cannot be imported ({error}); install the "
                "module or put its folder on PYTHONPATH"
            ) from error

    def extract(self, text: str) -> str:
        return text[-MAX_TEXT_CHARS:]

    def decide_at_once(self, extracted: str | None, gold: str) -> Judgement | None:
        return None if gold.strip() else answers.NO_GOLD

    def decide(self, extracted: str | None, gold: str) -> Judgement:
        function = self._function
        try:
            found = function(extracted, gold)
        except Exception as error:  # noqa: BLE001 - what a stranger's code raises is no "wrong"
            return Judgement(Verdict.UNVERIFIABLE, f"{self._path} raised {error!r}"[:200])
        if not isinstance(found, bool | None):
            raise RuleError(f"{self._path} returned {found!r}; it may be True, False or None")
        if found is None:
            return Judgement(Verdict.UNVERIFIABLE, f"{self._path} could not tell")
        return Judgement(Verdict.CORRECT if found else Verdict.WRONG)

    def read(self, gold: str) -> Judgement:
        """Any answer can be compared with it, as far as anybody but the function knows."""
        _ = self._function
        return Judgement(Verdict.CORRECT)


def normalised(answer: str) -> str:
    r"""An answer without what says nothing: `$`, degrees, `\left`, most spaces."""
    found = SAYS_NOTHING.sub("", answer.translate(MINUS).replace("\\ ", " ")).replace(r"\%", "%")
    while (unwrapped := WRAPPED.sub(r"\1", found)) != found:
        found = unwrapped
    found = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", " ".join(found.split())).rstrip(".")
    found = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", re.sub(r"\\[dt]frac", r"\\frac", found))
    return THOUSANDS.sub("", found) if WHOLE_NUMBER.fullmatch(found) else found


def numbers(text: str) -> list[Fraction]:
    r"""What number a text is, exactly; none where it is no number, two where it has a percent sign.

    Such as `1,000`, `-3/4`, `\frac{1}{2}`, `50\%`, `4.5e33`, `x = 2 \times 10^3`, `\$18`,
    `9.8\,\text{m/s}^2`.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return []
    bare = UNIT.sub("", text.translate(MINUS).rpartition("=")[2])
    bare = re.sub(r"\s|\\ ", "", SAYS_NOTHING.sub("", bare)).rstrip(".")
    has_percent = bare.endswith("%")
    bare = re.sub(r"\\[dt]frac", r"\\frac", bare.removesuffix("%").removesuffix("\\"))
    value = _value(THOUSANDS.sub("", SHORT_FRACTION.sub(r"\\frac{\1}{\2}", bare)))
    if value is None:
        return []
    return [value, value / 100] if has_percent else [value]


def _value(bare: str) -> Fraction | None:
    if match := FRACTION.fullmatch(bare):
        sign, above, below, plain_above, plain_below = match.groups()
        above, below = Fraction(above or plain_above), Fraction(below or plain_below)
        return above / below * (-1 if sign == "-" else 1) if below else None
    if match := TIMES_POWER.fullmatch(bare):
        return Fraction(match.group(1)) * Fraction(10) ** int(match.group(2))
    return Fraction(bare) if re.fullmatch(NUMBER, bare) and "," not in bare else None
