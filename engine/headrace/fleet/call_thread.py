"""Blocking calls, one after the other, in a thread of their own.

Not `asyncio.to_thread`: its pool is closed before Python calls what is registered with `atexit`, from where a fleet
that is still open is ended. And one thread for all: Ray's processes die with the thread that started them
(PR_SET_PDEATHSIG), so that one has to stay for as long as they are wanted.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


class CallThread:
    """Lives until `close`."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def call(self, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """What `function` returns or raises. Cancelled, it stops waiting; the call goes on to its end."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if outcome.done():
                return
            if error is None:
                outcome.set_result(result)
            else:
                outcome.set_exception(error)

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = function(*args, **kwargs)
            except BaseException as raised:  # it belongs to whoever waits
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        self._work.put(work)
        answer: Result = await outcome
        return answer

    def close(self) -> None:
        """End the thread after the calls that wait."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
