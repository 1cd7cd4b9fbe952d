"""Launchers of several nodes that meet, or say who did not come."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megatron_nft.nodes import Nodes, check, roll_call

NAMES = ("a1", "a2", "a3")


def three() -> list[Nodes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Nodes(3, rank, f"127.0.0.1:{port}", NAMES, deadline_s=2.0) for rank in range(3)]


def meet(nodes: list[Nodes], troubles: dict[int, str] | None = None) -> list[str]:
    """What each of them hears."""

    def one(node: Nodes) -> str:
        try:
            roll_call(node, (troubles or {}).get(node.rank, ""))
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(nodes)) as threads:
        return list(threads.map(one, nodes))


def test_all_that_come_go_on() -> None:
    first, *others = three()
    with ThreadPoolExecutor(1) as thread:
        early = thread.submit(meet, others)
        time.sleep(0.3)  # node 0 is the last
        assert meet([first]) == [""]
        assert early.result() == ["", ""]


def test_who_does_not_come_is_named_by_all() -> None:
    begun = time.monotonic()
    heard = meet(three()[:2])
    assert time.monotonic() - begun < 10
    assert len(heard) == 2
    assert all("node 2 (a3) of 3 did not come within 2 s" in text for text in heard)


def test_a_node_that_finds_no_node_0_says_where_it_looked() -> None:
    node = three()[1]
    [heard] = meet([node])
    assert f"node 0 (a1) at 127.0.0.1:{node.port} could not be met within 2 s" in heard


def test_the_trouble_of_one_node_is_everyone_s() -> None:
    heard = meet(three(), {1: "model.path: there is no models/x"})
    assert heard == ["node 1 (a2): model.path: there is no models/x"] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 3}, "--node-rank was 3; it may be 0 to 2"),
        ({"meeting": ""}, "--meeting is missing"),
        ({"meeting": "a1:b"}, "HOST or HOST:PORT"),
        ({"names": ("a1",)}, "1 names for 3 nodes"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(replace(three()[0], **changes))
    check(Nodes())
    check(three()[2])
    assert (Nodes(meeting="a1").host, Nodes(meeting="a1").port) == ("a1", 29400)
