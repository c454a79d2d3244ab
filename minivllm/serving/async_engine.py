"""Requests from any cell or thread while the engine runs in the background.

The worker thread lives only while there is work: it starts with a request and ends when the engine is idle, so an
interrupted cell, a forgotten engine or a restarted kernel leaves no thread behind.
"""

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from queue import SimpleQueue
from weakref import WeakSet

from minivllm.collector import older_objects_frozen
from minivllm.errors import ConfigError, RequestError
from minivllm.interrupts import held_interrupts
from minivllm.llm import LLM
from minivllm.outputs import RequestOutput
from minivllm.request import SamplingParams
from minivllm.text_engine import Generation, Prompt


class Stream:
    """One request's growing results: iterate it, `await` over it, or ask for the `result()`."""

    def __init__(self, owner: "AsyncEngine") -> None:
        self._owner = owner
        self._outputs: SimpleQueue[RequestOutput | Exception] = SimpleQueue()
        self._latest: RequestOutput | None = None
        self.generation: Generation | None = None

    def __iter__(self) -> Iterator[RequestOutput]:
        """Yield each growing result; leaving the loop early, Ctrl-C too, aborts the request."""
        try:
            while self._latest is None or not self._latest.finished:
                yield self._next(timeout_s=None)
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """The same for asyncio; the event loop stays free."""
        try:
            while self._latest is None or not self._latest.finished:
                yield await asyncio.to_thread(self._next, None)
        finally:
            self.abort()

    @property
    def request_id(self) -> str:
        assert self.generation is not None
        return self.generation.request_id

    @property
    def is_finished(self) -> bool:
        assert self.generation is not None
        return self.generation.is_finished

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Wait for the final result. Raises queue.Empty when `timeout_s` pass without any news."""
        while self._latest is None or not self._latest.finished:
            self._next(timeout_s)
        return self._latest

    def fork(self, seed: int | None = None, index: int = 0, request_id: str | None = None) -> "Stream":
        """Split sample `index` off: a stream of its own that begins with what this one has now and shares its blocks.

        Without a `seed` it gets one of its own. Raises RequestError when the request has finished.
        """
        assert self.generation is not None
        split = self._owner.llm.text_engine.fork
        return self._owner._begin(partial(split, self.generation, index, seed, request_id))

    def abort(self) -> None:
        """Drop the request; does nothing when it is finished."""
        assert self.generation is not None
        if not self.generation.is_finished:
            self._owner.llm.text_engine.abort(self.generation)

    def _next(self, timeout_s: float | None) -> RequestOutput:
        output = self._outputs.get(timeout=timeout_s)
        if isinstance(output, Exception):
            raise output
        self._latest = output
        return output

    def _push(self, generation: Generation) -> None:
        self._outputs.put(generation.error or generation.output())


_OPEN: "WeakSet[AsyncEngine]" = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that still computes when the interpreter ends would take the process down with it."""
    for engine in list(_OPEN):
        engine.close()


class AsyncEngine:
    """Drives an LLM's engine in a background thread. Use it as a context manager, or call `close` when done."""

    def __init__(self, llm: LLM) -> None:
        if not isinstance(llm, LLM):
            raise ConfigError(f"AsyncEngine drives an LLM: AsyncEngine(LLM(...)), not {type(llm).__name__}")
        self.llm = llm
        _OPEN.add(self)
        self._guard = threading.Lock()
        self._worker: threading.Thread | None = None
        self._streams: dict[str, Stream] = {}
        self._is_closed = False

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._worker is not None and self._worker.is_alive()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Stream:
        """Queue a prompt and return at once. Raises RequestError when it cannot be served."""
        checked = self.llm.text_engine.check(prompt)
        params = SamplingParams() if params is None else params
        return self._begin(partial(self.llm.text_engine.add, checked, params, priority, request_id))

    def abort(self, request_id: str) -> bool:
        """Drop a request by its id; False when it is unknown or finished."""
        stream = self._streams.get(str(request_id))
        if stream is None or stream.is_finished:
            return False
        stream.abort()
        return True

    def close(self) -> None:
        """Abort what is left and wait for the thread to end; safe to call twice."""
        with self._guard:
            self._is_closed = True
            streams, worker = list(self._streams.values()), self._worker
        for stream in streams:
            stream.abort()
        if worker is not None:
            worker.join()

    def _begin(self, begin: Callable[..., Generation]) -> Stream:
        """A stream of the request that `begin` makes; the worker starts if it is not there."""
        stream = Stream(self)
        try:
            with held_interrupts(), self._guard:
                if self._is_closed:
                    raise RequestError("this AsyncEngine is closed: make a new one")
                stream.generation = begin(on_update=stream._push)
                self._streams = {id_: s for id_, s in self._streams.items() if not s.is_finished}
                self._streams[stream.request_id] = stream
                if self._worker is None:
                    self._worker = threading.Thread(target=self._run, name="minivllm-engine", daemon=True)
                    self._worker.start()
        except KeyboardInterrupt:
            if stream.generation is not None:
                stream.abort()  # nobody will hold the stream
            raise
        return stream

    def _run(self) -> None:
        with older_objects_frozen():
            self._step_while_there_is_work()

    def _step_while_there_is_work(self) -> None:
        text_engine = self.llm.text_engine
        while True:
            with self._guard:  # so that no request slips in between the last look and the end of the thread
                if not text_engine.has_work:
                    self._worker = None
                    return
            text_engine.step()  # a failing step ends the requests it ran; their streams raise the error
