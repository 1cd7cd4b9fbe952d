r"""Expressions that no parser gets to the end of: known by their looks, in linear time.

`9^{9^{9^9}}`, `(10^7)!` or hundreds of parentheses would each cost a worker its whole deadline, and
math-verify's own five seconds. What is not recognised here still has the deadline.
"""

import math
import re

MAX_DEPTH = 24  # brackets within each other; math-verify takes seconds from about here on
MAX_DIGITS = 1_000_000  # of a power; sympy makes such a number in 0.1 s
MAX_FACTORIAL = 100_000  # has half a million digits

NUMBER = r"(?<![\d.])\d++(?:,\d{3}(?!\d))*+(?:\.\d++)?"
POWER = re.compile(rf"{NUMBER}(?:\s*(?:\^|\*\*)[\s({{\[]*{NUMBER})+")
PARTS = re.compile(NUMBER)
FACTORIAL = re.compile(rf"(?:({NUMBER})|[)}}\]])\s*!(?!=)")
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def explosive(text: str) -> str:
    r"""What would explode in a `\boxed{…}` or prose; empty for a text that is worth a try."""
    if (depth := _depth(text)) > MAX_DEPTH:
        return f"brackets {depth} deep"
    for match in POWER.finditer(text):
        if _num_digits(match.group()) > MAX_DIGITS:
            return f"a power too large: {match.group()[:50]}"
    is_prose = not text.startswith(r"\boxed")  # where "!" may end a sentence
    for match in () if is_prose else FACTORIAL.finditer(text):
        number = match.group(1) or _number_in_brackets(text[: match.start() + 1])
        if _num_digits(number) > math.log10(MAX_FACTORIAL):
            return f"a factorial too large: {number[:50]}!"
    return ""


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in BRACKETS:
            depth = max(0, depth + BRACKETS[character])
            deepest = max(deepest, depth)
    return deepest


def _num_digits(power: str) -> float:
    """log10 of a tower of numbers a^b^c, from the right; infinite where that overflows."""
    digits, exponent = 0.0, 1.0
    for part in reversed(PARTS.findall(power)):
        base = part.replace(",", "")
        size = math.log10(max(float(base), 1.0)) if len(base) < 300 else float(len(base))
        digits = exponent * size if size else 0.0
        exponent = 10.0**digits if digits < 300 else math.inf
    return digits


def _number_in_brackets(before: str) -> str:
    """What the closing bracket at the end encloses, where it is a number or a power."""
    match = re.search(r"[({\[]([^(){}\[\]]*)[)}\]]$", before[-100:])
    inner = match.group(1).strip() if match else ""
    return inner if POWER.fullmatch(inner) or PARTS.fullmatch(inner) else ""
