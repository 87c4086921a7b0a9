"""Reading ahead: threads prepare what comes next while the model is at work."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tpn.video import decode

S = TypeVar("S")
R = TypeVar("R")


def read_ahead(read: Callable[[S], R], sources: Iterable[S], *, workers: int) -> Generator[R]:
    """Yield `read(source)` for each source, in order, up to `workers` of them ahead of the consumer.

    At most `workers + 1` results exist at a time. What `read` raises is raised in its place. Whoever stops early and closes the
    iterator, or drops it, waits for the reads under way, and leaves no thread behind.

    Args:
        read: called in threads.
        sources: consumed as reading goes on, in the thread of the consumer.
        workers: threads, at least 1.
    """
    under_way: deque[Future[R]] = deque()
    initializer = decode.decode_in_one_thread if workers > 1 else None
    with ThreadPoolExecutor(workers, thread_name_prefix="tpn-read", initializer=initializer) as pool:
        try:
            for source in sources:
                under_way.append(pool.submit(read, source))
                if len(under_way) > workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
