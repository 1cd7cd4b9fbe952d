"""Batches that are sampled while the policy trains on earlier ones."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from megatron_nft.rollout.collect import Batch

LOOK_EVERY_S = 0.5


class Ahead:
    """One thread that makes batches, one after the other, in the order they were asked for.

    Args:
        make: the batch of a rollout, by its number.
    """

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, "rollout")
        self._batches: dict[int, Future[Batch]] = {}

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._batches

    def start(self, rollout: int) -> None:
        """Have a batch made, unless it is being made or there already."""
        if rollout not in self._batches:
            self._batches[rollout] = self._thread.submit(self._make, rollout)

    def put(self, rollout: int, batch: Batch) -> None:
        """Hold a batch that was made before."""
        self._batches[rollout] = Future()
        self._batches[rollout].set_result(batch)

    def take(self, rollout: int, is_over: Callable[[], bool] = lambda: False) -> Batch | None:
        """Wait for a batch; raises what making it raised. None once `is_over`: it stays."""
        self.start(rollout)
        future = self._batches[rollout]
        while not wait([future], LOOK_EVERY_S).done:
            if is_over():
                return None
        return self._batches.pop(rollout).result()

    def settle(self) -> dict[int, Batch]:
        """Wait until nothing is being made; what was made and not yet taken, by rollout.

        What failed is not among them: `take` raises it.
        """
        wait(self._batches.values())
        return {r: future.result() for r, future in self._batches.items() if not future.exception()}

    def is_settled(self, is_over: Callable[[], bool]) -> bool:
        """True once nothing is being made; False once `is_over`."""
        while wait(self._batches.values(), LOOK_EVERY_S).not_done:
            if is_over():
                return False
        return True

    def abandon(self, stop: Callable[[], object]) -> None:
        """Have nothing more made; `stop` lets what is being made fail. What was made stays."""
        begun = {r: future for r, future in self._batches.items() if not future.cancel()}
        stop()
        wait(begun.values())
        self._batches = {r: future for r, future in begun.items() if not future.exception()}

    def cancel(self) -> None:
        """Make nothing more; what is being made goes on until its engine ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for what is being made, which may have failed."""
        self._thread.shutdown(wait=True, cancel_futures=True)
