"""Answers are judged while others are being sampled; too many that cannot be stop the run."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_nft.config import Config, ModelConfig, VerifyConfig
from megatron_nft.evaluate import evaluate
from megatron_nft.rollout.collect import Asked, ask
from megatron_nft.rollout.engine import Answers, Hear, Sampling, ignore, seed_of
from megatron_nft.rollout.groups import Problem, Response, Verdict
from megatron_nft.verify.share import check_rate
from megatron_nft.verify.verifier import Verifier

SAMPLING = Sampling(answers=2, temperature=1.0, top_p=1.0, max_tokens=8, seed=0)
PROBLEMS = [
    Problem(str(n), np.array([n], np.int32), str(10**6 + n) + " + x", "toy") for n in range(2)
]
HOSTILE = r"\boxed{9^{9^{9^9}}}"


def response(text: str) -> Response:
    tokens = np.zeros(3, np.int32)
    return Response(tokens, tokens.astype(np.float32), "stop", text, 0, 0, None)


class Waiting:
    """An engine that samples its second problem's answers once the first one's are judged."""

    is_collective = False

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self.texts, self.judged = texts, threading.Event()

    def generate(
        self,
        problems: Sequence[Problem],
        expected: Sequence[float],
        sampling: Sampling,
        hear: Hear = ignore,
    ) -> Answers:
        answers = [(n, tuple(map(response, texts))) for n, texts in enumerate(self.texts)]
        hear(*answers[0])
        assert self.judged.wait(60), "nothing was judged while this engine sampled"
        hear(*answers[1])
        return answers


def ask_waiting(texts: Sequence[tuple[str, str]]) -> Asked:
    engine = Waiting(texts)
    # told of every judgement of a worker's
    with Verifier(VerifyConfig(workers=1), on_progress=engine.judged.set) as verifier:
        return ask(engine, verifier, PROBLEMS, [1.0, 1.0], SAMPLING)


@pytest.mark.processes
def test_answers_are_judged_while_others_are_being_sampled() -> None:
    right = [rf"\boxed{{x + {10**6 + n}}}" for n in range(2)]  # no string comparison decides it
    asked = ask_waiting([(right[0], r"\boxed{x}"), (right[1], right[1])])
    assert [g.problem.id for g in asked.mixed] == ["0"]
    assert [r.verdict for r in asked.mixed[0].responses] == [Verdict.CORRECT, Verdict.WRONG]
    assert asked.tally.accuracies == {0.5: 1, 1.0: 1}


@pytest.mark.processes
def test_answers_that_nobody_can_judge_are_shown() -> None:
    asked = ask_waiting([(r"\boxed{x + 1000000}", HOSTILE), (HOSTILE, HOSTILE)])
    assert asked.tally.metrics()["unverifiable_rate"] == 3 / 4
    with pytest.raises(RuntimeError) as raised:
        check_rate("rollout", 3 / 4, Config(), asked.tally.unverifiable)
    text = str(raised.value)
    assert text.startswith(
        "rollout: 75.0% of the answers could not be judged; verify.max_unverifiable_rate is 10.0%\n"
    )
    assert "9^{9^{9^9}}}' against '1000000 + x': a power too large" in text
    check_rate("rollout", 0.1, Config())


@pytest.mark.processes
def test_sets_are_evaluated_at_once_each_with_its_own_number_of_answers() -> None:
    """An engine that answers a question by its own number, right but for the last of several."""

    class Asked:
        is_collective = False

        def generate(
            self,
            problems: Sequence[Problem],
            expected: Sequence[float],
            sampling: Sampling,
            hear: Hear = ignore,
        ) -> Answers:
            places = range(len(problems))
            answers_to = [sampling.answers_to(n) for n in places]
            calls.append((list(expected), answers_to, [sampling.seed_for(n) for n in places]))
            answers = []
            for n, problem in enumerate(problems):
                texts = [rf"\boxed{{{problem.answer}}}"] * sampling.answers_to(n)
                texts[1:] = [*texts[2:], r"\boxed{-1}"] if len(texts) > 1 else []
                answers.append((n, tuple(map(response, texts))))
                hear(*answers[-1])
            return answers

    calls: list[tuple[list[float], list[int], list[int]]] = []
    many = [Problem(f"m{n}", np.array([n], np.int32), str(n), "m") for n in range(2)]
    few = [Problem(f"f{n}", np.array([n], np.int32), str(n), "f") for n in range(3)]
    sets = [("many", many, 4), ("few", few, 1)]
    with Verifier(VerifyConfig(workers=1)) as verifier:
        found = evaluate(Asked(), verifier, sets, Config(model=ModelConfig(path="m")))
    numbers = [0, 1, 0, 1, 2]  # of each in its own set: what it is asked beside changes nothing
    assert calls == [([4.0, 4.0, 1.0, 1.0, 1.0], [4, 4, 1, 1, 1], [seed_of(0, n) for n in numbers])]
    assert found["eval/many/accuracy"] == 3 / 4
    assert (found["eval/few/accuracy"], found["eval/few/num_questions"]) == (1.0, 3)
    assert found["eval/verifier_timeouts"] == 0
    assert "eval/many/verifier_timeouts" not in found


@pytest.mark.processes
def test_a_set_that_nobody_can_judge_shows_its_own_answers() -> None:
    class Hostile:
        is_collective = False

        def generate(
            self, problems: Sequence[Problem], _: object, __: object, hear: Hear
        ) -> Answers:
            texts = [p.answer if p.id == "fine" else HOSTILE for p in problems]
            answers = [(n, (response(text),)) for n, text in enumerate(texts)]
            for answer in answers:
                hear(*answer)
            return answers

    one, other, fine = (
        Problem(name, np.array([0], np.int32), f"{gold} + x", "toy")
        for name, gold in (("one", 111), ("other", 222), ("fine", 333))
    )
    sets = [("some", [one, fine], 1), ("all", [other], 1)]
    verify = VerifyConfig(workers=1, max_unverifiable_rate=0.5)
    with (
        Verifier(verify) as verifier,
        pytest.raises(RuntimeError, match=r"eval/all: 100.0% (.|\n)*222 \+ x") as raised,
    ):
        evaluate(Hostile(), verifier, sets, Config(verify=verify))
    assert "111 + x" not in str(raised.value)
