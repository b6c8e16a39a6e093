"""readers: which replies are being read -> an end to those that nobody reads.

A program may ask and be gone before it reads. Gradio would work on, and keep every message for the reader who does not
come; and of those who came and went, it would keep the names.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

UNREAD_S = 30.0  # from a question, or the end of a stream, to the next stream: to copy a name by hand takes a while


class Readers:
    """Watches the sessions of Gradio's queue; called from the server's event loop alone."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._reading: Counter[str] = Counter()
        self._unread: dict[str, float] = {}  # since when
        self._waits = False

    def is_open(self, session: str) -> bool:
        """Whether there is, or will be, something to read: Gradio stumbles where there is not."""
        return session in self._queue.pending_messages_per_session

    @contextmanager
    def reading(self, session: str) -> Iterator[None]:
        """While this lasts, a stream of `session` is open."""
        self._reading[session] += 1
        try:
            yield
        finally:
            self._reading -= Counter([session])
            self.look_later()

    def look_later(self) -> None:
        """After something was asked, or read to its end."""
        if not self._waits:
            self._waits = True
            asyncio.get_running_loop().call_later(UNREAD_S / 3, lambda: asyncio.ensure_future(self._look()))

    async def _look(self) -> None:
        """Forget the sessions that have had no reader for long enough, and end what runs for them."""
        self._waits, now, sessions = False, time.monotonic(), self._queue.pending_messages_per_session
        unread = [session for session in sessions if session not in self._reading]
        self._unread = {session: self._unread.get(session, now) for session in unread}
        for session, since in self._unread.items():
            if now - since >= UNREAD_S:
                await self._queue.clean_events(session_hash=session)
                sessions.pop(session, None)
        names = self._queue.pending_event_ids_session
        for session in [name for name in names if name not in sessions and name not in self._reading]:
            del names[session]  # of those who left in mid-stream, too
        if sessions:
            self.look_later()
