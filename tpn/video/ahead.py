"""Read data in threads while the model runs."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tpn.video import containers

S = TypeVar("S")
R = TypeVar("R")


def read_ahead(read: Callable[[S], R], sources: Iterable[S], *, workers: int) -> Generator[R]:
    """Yield `read(source)` for each source in order; threads read the next sources in the meantime.

    At most `workers + 1` results exist at a time. An exception raised by `read` is raised when its result is due. Closing the
    generator cancels pending reads and waits for running ones; no thread is left behind.

    Args:
        read: function to call in the threads.
        sources: arguments of `read`, iterated lazily in the consumer's thread.
        workers: number of threads, at least 1.
    """
    pending: deque[Future[R]] = deque()
    initializer = containers.decode_in_one_thread if workers > 1 else None
    with ThreadPoolExecutor(workers, thread_name_prefix="tpn-read", initializer=initializer) as pool:
        try:
            for source in sources:
                pending.append(pool.submit(read, source))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
