"""The command's output on its way through the agent: unchanged to where it would have gone, and a copy to whoever keeps it.

    command → pty or pipe → this thread → the agent's own stdout or stderr
                                        → keep(bytes)   (the logs; never blocks)

Where the agent's own output is a terminal the command gets a pseudo-terminal of the same size, so that progress bars work; else a
pipe. The channels live as long as the agent, over all attempts. Their reading ends are shared with the watchdog, which reads
on when the agent dies: the command's next write then still has a reader, and a trainer that is saving is not ended by SIGPIPE.

A terminal that stops (Ctrl-S) stops the command at its next write, as it would without the agent, but not the agent. A terminal
or pipe that has gone away stops neither.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import suppress

from holdfast.core.clock import Clock

__all__ = ["Output"]

_READ_BYTES = 1 << 16
_SETTLE_POLL_S = 0.05
_MOST_SETTLE_S = 30.0


class _Channel:
    """One way out. `write_end` is what the command gets."""

    def __init__(self, target: int) -> None:
        self.target: int | None = target
        self.is_terminal = os.isatty(target)
        self.read_end, self.write_end = _open_terminal(target) if self.is_terminal else os.pipe()
        os.set_blocking(self.read_end, False)

    def follow_window(self) -> None:
        if self.is_terminal and self.target is not None:
            _copy_window(self.target, self.write_end)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


def _open_terminal(like: int) -> tuple[int, int]:
    read_end, write_end = os.openpty()
    attributes = termios.tcgetattr(write_end)
    # Output processing happens in the real terminal; here every byte goes through as it is. Nothing is ever typed into this one.
    attributes[1] &= ~termios.OPOST
    attributes[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    termios.tcsetattr(write_end, termios.TCSANOW, attributes)
    _copy_window(like, write_end)
    return read_end, write_end


def _copy_window(source: int, target: int) -> None:
    empty = struct.pack("HHHH", 0, 0, 0, 0)
    with suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, empty))


class Output:
    """Owned by the agent's main thread; `keep` is called from a thread of its own and must neither block nor raise."""

    def __init__(self, keep: Callable[[bytes], None], clock: Clock, *, stdout: int = 1, stderr: int = 2) -> None:
        self._keep = keep
        self._clock = clock
        self._channels = [_Channel(stdout)]
        # One terminal for both keeps the order of what is written to them.
        together = self._channels[0].is_terminal and os.isatty(stderr)
        if not together:
            self._channels.append(_Channel(stderr))
        self._by_descriptor = {channel.read_end: channel for channel in self._channels}
        self._wake_read, self._wake_write = os.pipe()
        self._closing = self._is_stuck = False
        self._idle = threading.Condition()
        self._quiet_rounds = 0
        self.passed_bytes = 0
        """How much has come through; a sign of life of commands that report nothing else."""
        self._thread = threading.Thread(target=self._work, name="holdfast-output", daemon=True)
        self._thread.start()

    @property
    def stdout(self) -> int:
        """The descriptor that the command gets as its standard output."""
        return self._channels[0].write_end

    @property
    def stderr(self) -> int:
        return self._channels[-1].write_end

    @property
    def reading_ends(self) -> list[tuple[int, int]]:
        """(where the command's output can be read, where it goes): what an heir needs."""
        return [(channel.read_end, channel.target) for channel in self._channels if channel.target is not None]

    def follow_window(self) -> None:
        """The window of the terminal has changed."""
        for channel in self._channels:
            channel.follow_window()

    def settle(self, patience_s: float = 2.0) -> bool:
        """Wait until all that has been written so far is through; False when nothing has moved for `patience_s` (a terminal that
        has stopped), or when it does not end."""
        now_s = self._clock.monotonic_s()
        give_up_s, most_s, passed_bytes = now_s + patience_s, now_s + _MOST_SETTLE_S, self.passed_bytes
        with self._idle:
            # Two rounds that began after this call and found nothing: the first may have looked before the last byte came.
            wanted = self._quiet_rounds + 2
            while self._quiet_rounds < wanted:
                now_s = self._clock.monotonic_s()
                if self.passed_bytes != passed_bytes:
                    give_up_s, passed_bytes = now_s + patience_s, self.passed_bytes
                self._is_stuck = now_s >= min(give_up_s, most_s) or not self._thread.is_alive()
                if self._is_stuck:
                    return False
                os.write(self._wake_write, b".")
                self._idle.wait(_SETTLE_POLL_S)
        return True

    def close(self) -> None:
        """Take along what is there, and stop. A terminal that has stopped is given up."""
        if not self._is_stuck:
            self.settle()
        self._closing = True
        os.write(self._wake_write, b".")
        self._thread.join(0.0 if self._is_stuck else _MOST_SETTLE_S)
        if self._thread.is_alive():
            # It sits in a write that nobody takes. Its descriptors must not be closed under it; the end of the process does that.
            return
        for channel in self._channels:
            channel.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for channel in self._channels:
            poll.register(channel.read_end, select.POLLIN)
        while not self._closing:
            woken = False
            moved = False
            for descriptor, _ in poll.poll():
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                    woken = True
            for channel in self._channels:
                moved |= self._move(channel)
            if woken and not moved:
                with self._idle:
                    self._quiet_rounds += 1
                    self._idle.notify_all()

    def _move(self, channel: _Channel) -> bool:
        try:
            data = os.read(channel.read_end, _READ_BYTES)
        except OSError:
            # Nothing there. The agent holds a writing end itself, so the end of the file never comes.
            return False
        self.passed_bytes += len(data)
        self._keep(data)
        if channel.target is not None and not _write_all(channel.target, data):
            channel.target = None
        return True


def _write_all(target: int, data: bytes) -> bool:
    """False when nobody is there to read it any more. Waits as long as the reader waits, whatever mode the descriptor is in."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(target, view) :]
        except BlockingIOError:
            select.select([], [target], [])
        except OSError:
            return False
    return True
