"""An event loop in a thread of its own, so that a fleet lives in a notebook, whose thread has a loop already, and in a
script, whose thread has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import uvloop

Result = TypeVar("Result")


class LoopThread:
    """Runs until `close`. A daemon: it holds nobody up at the interpreter's exit."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start `work` on the loop. Cancelling the future cancels it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for `work` from a thread without this loop. Interrupted (Ctrl-C), `work` is cancelled."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def run_to_the_end(
        self, work: Coroutine[Any, Any, Result], interrupted: Callable[[], None] = lambda: None
    ) -> Result:
        """Like `run`, but Ctrl-C does not cancel: `interrupted` is called, and it is raised when `work` has ended."""
        future = self.submit(work)
        interruption: KeyboardInterrupt | None = None
        while not future.done():
            try:
                wait([future])
            except KeyboardInterrupt as raised:
                interruption = raised
                interrupted()
        if interruption is not None:
            raise interruption
        return future.result()

    async def join(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for `work` from another event loop. Cancelled, `work` is cancelled too."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """End the loop and its thread; tasks that are left are cancelled. Not from the thread itself. Safe twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
