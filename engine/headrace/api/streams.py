"""An answer piece by piece: iterate for its text, ask `answer` for the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from headrace.api.answer import Answer, StreamedAnswer
from headrace.api.loop_thread import LoopThread

_END = object()


class _Chunks:
    """The chunks of one stream, each read on the fleet's own loop."""

    def __init__(self, thread: LoopThread, chunks: AsyncIterator[Any]) -> None:
        self._thread = thread
        self._chunks = chunks
        self._read = StreamedAnswer()

    @property
    def answer(self) -> Answer:
        """What has come until now; complete once the iteration has ended."""
        return self._read.answer

    async def _next(self) -> str | object:
        async for chunk in self._chunks:
            if text := self._read.take(chunk):
                return text
        return _END

    async def _end(self) -> None:
        await self._chunks.aclose()  # type: ignore[attr-defined]  # it is a generator


class TextStream(_Chunks):
    """`for text in stream: ...`, then `stream.answer`. Closed early, or left by an exception inside `with stream:`, the
    replica stops working on it; so it does when the stream is collected."""

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        text = self._thread.run(self._next())
        if not isinstance(text, str):
            raise StopIteration
        return text

    def close(self) -> None:
        """Stop. Safe twice, and after the end."""
        self._thread.run(self._end())

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTextStream(_Chunks):
    """`async for text in stream: ...`, then `stream.answer`. `TextStream` has the rest."""

    def __aiter__(self) -> AsyncTextStream:
        return self

    async def __anext__(self) -> str:
        text = await self._thread.join(self._next())
        if not isinstance(text, str):
            raise StopAsyncIteration
        return text

    async def aclose(self) -> None:
        """Stop. Safe twice, and after the end."""
        await self._thread.join(self._end())

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
