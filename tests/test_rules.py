"""Rules other than the default, against verdicts worked out by hand; known answers at the start."""

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_nft.config import RuleConfig, VerifyConfig
from megatron_nft.rollout.groups import Judgement, Problem, Verdict
from megatron_nft.verify.golds import readable
from megatron_nft.verify.rules import normalised, numbers, rule_of
from megatron_nft.verify.verifier import Question, Verifier

CORRECT, WRONG, UNVERIFIABLE = Verdict.CORRECT, Verdict.WRONG, Verdict.UNVERIFIABLE
EXACT, NUMERIC = RuleConfig("boxed_exact", last_chars=40), RuleConfig("numeric", tolerance=0.01)
FUNCTION = """
def is_right(text, gold):
    if gold == "who knows":
        return None
    return text.count("a") == int(gold)

def yes(text, gold):
    return "yes"
"""


def verdict(rule: RuleConfig, text: str, gold: str) -> Verdict:
    chosen = rule_of(rule)
    return chosen.decide_at_once(chosen.extract(text), gold).verdict


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"so \boxed{ 5 }.", "5", CORRECT),
        (r"so \boxed{5.0}", "5", WRONG),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", CORRECT),
        (r"\boxed{\text{(A)}}", "(A)", CORRECT),
        (r"\boxed{1,234{,}567}", "1234567", CORRECT),
        (r"\boxed{\left( 3, 4 \right)}", "(3,4)", CORRECT),
        (r"\boxed{90^\circ}", "90", CORRECT),
        (r"\boxed{\$18}", "18", CORRECT),
        ("\\boxed{\u22125}", "-5", CORRECT),
        (r"\boxed{2 3/4}", "23/4", WRONG),
        (r"\boxed{2\ 3/4}", "2 3/4", CORRECT),
        (r"\boxed{(1,200)}", "(1200)", WRONG),
        (r"\boxed{50\%}", "50%", CORRECT),
        (r"\boxed{50\%}", "50", WRONG),
        (r"\boxed{1} \boxed{2}", "1", WRONG),
        (r"\boxed{5}" + "x" * 40, "5", WRONG),
        (r"\boxed{" + "5" * 40 + "}", "5" * 40, WRONG),  # begins before the last 40 characters
        ("5", "5", WRONG),
        (r"\boxed{}", "5", WRONG),
        (r"\boxed{5}", " $ $ ", UNVERIFIABLE),
    ],
)
def test_boxed_exact(text: str, gold: str, expected: Verdict) -> None:
    assert verdict(EXACT, text, gold) is expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        (r"\boxed{3.14}", "3.1416", CORRECT),
        (r"\boxed{3.0}", "3.1416", WRONG),
        ("The answer is 42, as shown.", "42", CORRECT),
        ("It is 12, or rather 13.", "13", CORRECT),
        ("It is 12, or rather 1/2", "0.5", CORRECT),
        (r"\boxed{-\frac{1}{3}}", "-0.333", CORRECT),
        (r"\boxed{\frac12}", "0.5", CORRECT),
        (r"\boxed{50\%}", "0.5", CORRECT),
        (r"\boxed{50\%}", "50", CORRECT),
        (r"\boxed{50\%}", "5", WRONG),
        (r"\boxed{\$18}", "18", CORRECT),
        (r"\boxed{18\text{ dollars}}", "18", CORRECT),
        (r"\boxed{9.8\,\text{m/s}^2}", "9.8", CORRECT),
        (r"\boxed{x=5}", "5", CORRECT),
        (r"\boxed{90^\circ}", "90", CORRECT),
        ("\\boxed{\u22125}", "-5", CORRECT),
        (r"\boxed{6.02 \times 10^{23}}", "6.022e23", CORRECT),
        (r"\boxed{0.005}", "0", CORRECT),
        (r"\boxed{0.05}", "0", WRONG),
        (r"12 \boxed{twelve}", "12", WRONG),
        (r"\boxed{3 or so 4}", "3", UNVERIFIABLE),
        (r"\boxed{1}", "1e999", WRONG),
        ("nothing", "12", WRONG),
        (r"\boxed{12}", "twelve", UNVERIFIABLE),
        (r"\boxed{12}", "1/0", UNVERIFIABLE),
    ],
)
def test_numeric(text: str, gold: str, expected: Verdict) -> None:
    assert verdict(NUMERIC, text, gold) is expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", Fraction(1000)),
        (" -.5 ", Fraction(-1, 2)),
        ("+3/4", Fraction(3, 4)),
        (r"$\frac{1}{2}$.", Fraction(1, 2)),
        (r"12\%", Fraction(12)),
        ("4.5e3", Fraction(4500)),
        (r"2 \cdot 10^{-3}", Fraction(2, 1000)),
        ("1,00", None),
        ("1 2 3 4 a", None),
        ("nan", None),
        ("inf", None),
        ("1e9999", None),
        ("9" * 300, None),
        ("", None),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction | None) -> None:
    assert numbers(text)[:1] == ([] if value is None else [value])


def test_whole_numbers_that_differ_by_one_differ() -> None:
    assert verdict(RuleConfig("numeric"), r"\boxed{2000001}", "2000000") is WRONG
    assert verdict(RuleConfig("numeric"), r"\boxed{2,000,000}", "2000000") is CORRECT


def test_normalising_twice_changes_nothing() -> None:
    for answer in (r"\text{a \textbf{b}} ", r"\dfrac12 \% ", r"1{,}000.", r"\left[ 1,\! 2 \right)"):
        once = normalised(answer)
        assert normalised(once) == once
        assert " " not in once


@pytest.mark.processes
def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grading.py").write_text(FUNCTION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rule = RuleConfig("grading:is_right")
    asked = [("a banana", "4"), ("a banana", "3"), ("a", "who knows"), ("a", "one"), ("a", "")]
    with Verifier(VerifyConfig(workers=1)) as verifier:
        judgements = verifier.submit([Question(*pair, rule) for pair in asked]).result()
        verdicts = [judgement.verdict for judgement in judgements]
        assert verdicts == [CORRECT, WRONG, UNVERIFIABLE, UNVERIFIABLE, UNVERIFIABLE]
        assert any("grading:is_right raised ValueError" in each.reason for each in judgements)
        for name, trouble in {
            "grading:yes": "grading:yes returned 'yes'; it may be True, False or None",
            "grading:no": "cannot be imported",
            "nowhere:is_right": "put its folder on PYTHONPATH",
        }.items():
            with pytest.raises(ValueError, match=trouble):
                verifier.judge([Question("a", "1", RuleConfig(name))])
        assert verifier.judge([Question("banana", "3", rule)]) == [CORRECT]


def problem(number: int, gold: str, rule: RuleConfig) -> Problem:
    return Problem(f"q{number}", np.zeros(1, np.int32), gold, "data", rule=rule)


@pytest.mark.processes
def test_known_answers_are_read_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Row 2 of field_failures: a known answer that nothing equals would make all answers wrong."""
    plain = RuleConfig()
    golds = [("72", plain), (r"\frac{1}{2}", plain), ("???", plain), ("", plain)]
    golds += [("twelve", RuleConfig("numeric")), ("twelve", RuleConfig("boxed_exact"))]
    problems = [problem(i, *gold) for i, gold in enumerate(golds)]
    with Verifier(VerifyConfig(workers=1)) as verifier:
        with caplog.at_level(logging.WARNING):
            assert readable(problems, verifier, "skip") == [0, 1, 5]
        assert "data, question q2: '???': the known answer could not be read" in caplog.text
        with pytest.raises(ValueError, match=r"3 of 6 known answers(.|\n)*verify.on_bad_gold=skip"):
            readable(problems, verifier, "error")
        with pytest.raises(ValueError, match="1 of 1 known answers"):
            readable(problems[2:3], verifier, "skip")  # nothing is left
        assert readable(problems[:2], verifier, "error") == [0, 1]
        assert verifier.read([("72", plain)]) == [Judgement(CORRECT)]
