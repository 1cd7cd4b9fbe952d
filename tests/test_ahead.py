"""Batches made ahead: in order, one at a time, and never lost."""

import threading
import time

import pytest

from megatron_nft.notice import Interrupted
from megatron_nft.rollout.ahead import Ahead
from megatron_nft.rollout.collect import Batch


class Maker:
    """Makes batches once it may, and writes down which and in which thread."""

    def __init__(self) -> None:
        self.may, self.made, self.threads = threading.Event(), [], set()

    def __call__(self, rollout: int) -> Batch:
        assert self.may.wait(10)
        self.threads.add(threading.get_ident())
        self.made.append(rollout)
        if rollout == 13:
            raise RuntimeError("unlucky")
        return Batch([rollout], None)


def test_batches_are_made_in_the_order_they_were_started_while_the_caller_goes_on() -> None:
    maker = Maker()
    ahead = Ahead(maker)
    for rollout in (4, 5, 4, 6):
        ahead.start(rollout)
    assert 5 in ahead
    assert maker.made == []
    maker.may.set()
    assert [ahead.take(rollout).groups for rollout in (4, 5)] == [[4], [5]]
    assert ahead.settle().keys() == {6}
    assert ahead.take(6).groups == [6]
    assert 6 not in ahead
    assert maker.made == [4, 5, 6]
    assert len(maker.threads) == 1
    assert threading.get_ident() not in maker.threads
    ahead.close()


def test_what_was_not_started_is_made_when_it_is_taken() -> None:
    maker = Maker()
    maker.may.set()
    assert Ahead(maker).take(2).groups == [2]


def test_a_batch_of_before_is_not_made_again() -> None:
    maker = Maker()
    ahead = Ahead(maker)
    ahead.put(7, Batch([70], None))
    ahead.start(7)
    assert 7 in ahead
    assert ahead.settle()[7].groups == [70]
    assert ahead.take(7).groups == [70]
    assert maker.made == []


def test_settling_leaves_what_failed_to_whom_it_concerns() -> None:
    maker = Maker()
    maker.may.set()
    ahead = Ahead(maker)
    for rollout in (12, 13, 14):
        ahead.start(rollout)
    assert ahead.settle().keys() == {12, 14}
    with pytest.raises(RuntimeError, match="unlucky"):
        ahead.take(13)


def test_closing_makes_nothing_more_and_waits_for_what_is_being_made() -> None:
    maker = Maker()
    ahead = Ahead(maker)
    for rollout in (1, 2, 3):
        ahead.start(rollout)
    ahead.cancel()
    maker.may.set()
    ahead.close()
    assert maker.made in ([], [1])


def test_what_is_given_up_leaves_what_was_made() -> None:
    begun, stopped = threading.Event(), threading.Event()

    def make(rollout: int) -> Batch:
        if rollout > 1:
            begun.set()
            assert stopped.wait(10)
            raise Interrupted
        return Batch([rollout], None)

    ahead = Ahead(make)
    for rollout in (1, 2, 3):
        ahead.start(rollout)
    assert begun.wait(10)
    assert ahead.take(2, is_over=lambda: True) is None  # it stays
    ahead.abandon(stopped.set)
    assert ahead.settle().keys() == {1}
    assert (2 in ahead, 3 in ahead) == (False, False)
    ahead.abandon(lambda: None)
    assert ahead.take(1).groups == [1]
    ahead.close()


def test_what_making_raised_is_raised_where_it_is_taken() -> None:
    maker = Maker()
    maker.may.set()
    ahead = Ahead(maker)
    ahead.start(13)
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="unlucky"):
        ahead.take(13)
