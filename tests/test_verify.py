"""The default rule's verdicts against values worked out by hand."""

import inspect
import random
import sys
import time

import pytest

from megatron_nft.rollout.groups import Judgement, Verdict
from megatron_nft.verify import answers
from megatron_nft.verify.answers import MathVerify, extract, judge, last_boxed
from megatron_nft.verify.explosive import explosive

CORRECT, WRONG, UNVERIFIABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNVERIFIABLE


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{72}", "72"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a_{1}}{b^{2}}}}}}", r"\sqrt{\frac{a_{1}}{b^{2}}}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{1\\{2}}", r"1\\{2}"),
        (r"\boxed{5} no: \boxed{7", None),
        (r"boxed{5}", None),
        ("", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "extracted"),
    [
        (r"so \boxed{ 5 }.", r"\boxed{5}"),
        (r"\boxed{5.}", r"\boxed{5}"),
        (r"\boxed{\left\{1\right.}", r"\boxed{\left\{1\right.}"),
        (r"\boxed{0.333...}", r"\boxed{0.333...}"),
        (r"12 \boxed{}", None),
        (r"12 \boxed{7", None),
        ("I do not know.", None),
        ("1" * 5000 + " is it", ("1" * 5000 + " is it")[-answers.MAX_TAIL_CHARS :]),
    ],
)
def test_extract(text: str, extracted: str | None) -> None:
    assert extract(text) == extracted


# (text, gold): expected by hand, independent of math-verify
TABLE = [
    (r"Thus \boxed{72}", "72", CORRECT),
    (r"Thus \boxed{73}", "72", WRONG),
    (r"\boxed{025}", "25", CORRECT),
    (r"\boxed{27}", "27.0", CORRECT),
    (r"\boxed{72.}", "72", CORRECT),
    (r"\boxed{-5}", "5", WRONG),
    (r"\boxed{1,000}", "1000", CORRECT),
    (r"\boxed{1{,}000}", "1,000", CORRECT),
    # fractions, decimals, percent
    (r"\boxed{0.5}", r"\frac{1}{2}", CORRECT),
    (r"\boxed{\dfrac{2}{4}}", r"\frac12", CORRECT),
    (r"\boxed{1/2}", "0.5", CORRECT),
    (r"\boxed{0.33}", r"\frac13", WRONG),
    (r"\boxed{50\%}", "0.5", CORRECT),
    (r"\boxed{50\%}", r"50\%", CORRECT),
    (r"\boxed{5\%}", "0.5", WRONG),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", CORRECT),
    (r"\boxed{4.5e33}", r"4.5 \times 10^{33}", CORRECT),
    (r"\boxed{4.6 \times 10^{33}}", "4.5e33", WRONG),
    (r"\boxed{2e-3}", r"2e - 3", CORRECT),
    # expressions, equations
    (r"\boxed{x^2+2x+1}", "(x+1)^2", CORRECT),
    (r"\boxed{x^2+2x}", "(x+1)^2", WRONG),
    (r"\boxed{x^2}", "x^2", CORRECT),
    (r"\boxed{x=5}", "5", CORRECT),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", CORRECT),
    (r"\boxed{\frac{1}{0}}", "72", WRONG),
    # tuples, sets, intervals
    (r"\boxed{(3, 4)}", "(3,4)", CORRECT),
    (r"\boxed{(4,3)}", "(3,4)", WRONG),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", CORRECT),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}", WRONG),
    (r"\boxed{84, 69}", "$69$,$84$", CORRECT),
    (r"\boxed{5 \text{ or } 3}", "3,5", CORRECT),
    (r"\boxed{\left[1,2\right)}", "[1,2)", CORRECT),
    (r"\boxed{[1,2]}", "[1,2)", WRONG),
    # units, words
    (r"\boxed{5 \text{ cm}}", "5", CORRECT),
    (r"\boxed{\$5}", r"\$5", CORRECT),
    (r"\boxed{90^\circ}", "90", CORRECT),
    (r"\boxed{\text{Evelyn}}", "Evelyn", CORRECT),
    (r"\boxed{\text{Bob}}", r"\text{Evelyn}", WRONG),
    # how gold answers are written
    (r"\boxed{5}", "$5$", CORRECT),
    (r"\boxed{5}", r"The answer is \boxed{5}.", CORRECT),
    (r"\boxed{2n-2}", r"['$2n-2$']", CORRECT),
    (r"\boxed{2}", '["2"]', CORRECT),
    (r"\boxed{3, 1}", "['1', '3']", CORRECT),
    (r"\boxed{1}", "['1', '3']", WRONG),
    # no box, several boxes, broken boxes
    ("The answer is 72.", "72", CORRECT),
    ("The answer is $\\frac{3}{4}$.", "0.75", CORRECT),
    ("The answer is 71.", "72", WRONG),
    (r"\boxed{72}, no, \boxed{71}", "72", WRONG),
    (r"\boxed{71}, no, \boxed{72}", "72", CORRECT),
    ("No idea.", "72", WRONG),
    ("", "72", WRONG),
    (r"72 \boxed{}", "72", WRONG),
    (r"72 \boxed{72", "72", WRONG),
    (r"\boxed{#%&}", "72", WRONG),
    # gold answers that cannot be read
    (r"\boxed{72}", "", UNVERIFIABLE),
    (r"\boxed{72}", " \n", UNVERIFIABLE),
    (r"\boxed{72}", "???", UNVERIFIABLE),
    (r"\boxed{72}", r"\boxed{", UNVERIFIABLE),
    (r"\boxed{72}", "['1', 2]", UNVERIFIABLE),
    (r"\boxed{\pi}", "1" * 5000, UNVERIFIABLE),
]


@pytest.mark.parametrize(("text", "gold", "verdict"), TABLE)
def test_judge(text: str, gold: str, verdict: Verdict) -> None:
    assert judge(text, gold) is verdict


def test_a_failure_that_math_verify_swallows_is_not_a_wrong_answer() -> None:
    """It overruns the stack on deep answers, catches that, and would say "different"."""
    import math_verify

    answer, gold = r"\boxed{" + "(" * 20 + "2" + ")" * 20 + "}", r"\frac{4}{2}"
    assert judge(answer, gold) is CORRECT
    math_verify.parser.parse_latex_cached.cache_clear()
    math_verify.parser.extract_latex.cache_clear()
    answers._read_gold.cache_clear()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert judge(answer, gold) is UNVERIFIABLE
    finally:
        sys.setrecursionlimit(limit)


def test_plain_integers_are_compared_as_math_verify_does() -> None:
    import math_verify

    rng = random.Random(0)
    numerals = ["0", "-0", "00", "7", "-7", "007", "-007", "70", "1000", "9" * 40]
    numerals += [str(rng.randint(-(10**n), 10**n)) for n in (1, 1, 2, 2, 3, 9, 18, 30)]
    for gold in numerals:
        for answer in numerals:
            parsed = [
                math_verify.parse(rf"\boxed{{{s}}}", parsing_timeout=None) for s in (gold, answer)
            ]
            expected = CORRECT if math_verify.verify(*parsed, timeout_seconds=None) else WRONG
            found = MathVerify().decide_at_once(rf"\boxed{{{answer}}}", gold)
            assert found == Judgement(expected)


@pytest.mark.parametrize(
    ("gold", "trouble"),
    [
        ("72", ""),
        (r"\frac{1}{2}", ""),
        ("$x^2$", ""),
        (r"['$2n-2$']", ""),
        ("", "there is no known answer"),
        ("???", "the known answer could not be read"),
        (r"\boxed{", "the known answer could not be read"),
        ("['1', 2]", "math-verify raised TypeError"),
        ("1" * 5000, "5000 characters"),
        ("9^{9^{9^9}}", "a power too large: 9^{9^{9^9"),
    ],
)
def test_what_a_known_answer_is_good_for(gold: str, trouble: str) -> None:
    verdict = UNVERIFIABLE if trouble else CORRECT
    assert MathVerify().read(gold) == Judgement(verdict, trouble)


@pytest.mark.parametrize(
    ("text", "is_explosive"),
    [
        (r"9^{9^{9^9}}", True),
        ("9**9**9**9", True),
        (r"2^{2^{36}} - 2^{2^{36}}", True),
        ("5^(10^8)", True),
        (r"\boxed{(10^7)!}", True),
        (r"\boxed{1000000!}", True),
        (r"\boxed{(100000000)!}", True),
        ("So it is 1000000!", False),
        (r"\boxed{10^5,10^6}", False),
        (r"\boxed{2^3,4^5,6^7}", False),
        ("(" * 25 + "1" + ")" * 25, True),
        ("1" * 400 + "^9", False),
        (r"\frac{1}{1+\frac{1}{1+\frac{1}{2^{10}}}}", False),
        ("2^{2^{10}} + 20!", False),
        ("1^{9^{9^9}}", False),
        ("9^{9^{1^9}}", False),
        ("10! = 3628800", False),
        ("x^{y^{z^2}}", False),
        ("1,000^2", False),
        ("4.5 \\times 10^{33}", False),
        ("6! != 10^7", False),
        ("", False),
    ],
)
def test_expressions_that_explode_are_known_by_their_looks(text: str, is_explosive: bool) -> None:
    assert bool(explosive(text)) is is_explosive


def test_looking_takes_linear_time() -> None:
    start = time.process_time()
    for character in ("1", "1,", "1.", "(", "^", "1^", "!"):
        explosive(r"\boxed{" + character * (4000 // len(character)))
    assert time.process_time() - start < 0.5
