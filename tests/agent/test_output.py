"""What the command writes, seen from its terminal, from its pipe and from the store, while things around it are killed."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from agents import GIVE_UP_S, eventually, kept_output, lives, python, read_until, started

AGENTS_LINES = re.compile(rb"holdfast: [^\n]*\n")


def test_bytes_come_out_as_they_went_in_and_are_kept_and_the_exit_code_stays(tmp_path: Path) -> None:
    code = """
out = bytes(range(256)) * 8000 + b"no newline at the end"
err = b"".join(b"line %d\\r\\n" % n for n in range(20000))
done = 0
while done < len(out): done += os.write(1, out[done:])
# Two pipes have no common order: wait until the agent has taken all of the first.
import fcntl, termios
while fcntl.ioctl(1, termios.FIONREAD, bytes(4)) != bytes(4): pass
done = 0
while done < len(err): done += os.write(2, err[done:])
sys.exit(41)
"""
    out = bytes(range(256)) * 8000 + b"no newline at the end"
    err = b"".join(b"line %d\r\n" % number for number in range(20000))
    with started("--run", str(tmp_path), "--max-errors", "0", "--", *python(code)) as agent:
        stdout, stderr = agent.communicate(timeout=GIVE_UP_S)
    assert agent.returncode == 41
    assert stdout == out
    assert AGENTS_LINES.sub(b"", stderr) == err
    kept = kept_output(tmp_path)
    assert AGENTS_LINES.sub(b"", kept) == out + err
    assert b"attempt 1 ended: exit code 41" in kept, "the agent's own words are part of the story"

    shown = subprocess.run([sys.executable, "-m", "holdfast", "logs", str(tmp_path)], capture_output=True, check=True)
    assert shown.stdout == kept


def test_without_logs_nothing_is_kept_and_without_a_url_nothing_is_opened(tmp_path: Path) -> None:
    with started("--run", str(tmp_path), "--no-logs", "--", *python("print('hello')")) as agent:
        assert agent.communicate(timeout=GIVE_UP_S)[0] == b"hello\n"
    assert not (tmp_path / "logs").exists()
    assert (tmp_path / "events").exists()
    missing = subprocess.run(
        [sys.executable, "-m", "holdfast", "logs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert "no output is kept there" in missing.stderr


def test_a_command_at_a_terminal_sees_a_terminal_of_the_same_size_also_when_it_changes(tmp_path: Path) -> None:
    code = """
def told(*_):
    print(*os.get_terminal_size(1), flush=True)
    sys.exit(0)
signal.signal(signal.SIGWINCH, told)
print(*(os.isatty(fd) for fd in (1, 2)), *os.get_terminal_size(1), flush=True)
sys.stderr.write("\\x1b[1mbold\\x1b[0m\\r\\n"); sys.stderr.flush()
while True: signal.pause()
"""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    with started("--run", str(tmp_path), "--", *python(code), stdout=terminal, stderr=terminal) as agent:
        read_until(controller, b"True True 101 33\r\n")
        read_until(controller, b"\x1b[1mbold\x1b[0m\r\r\n")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        agent.send_signal(signal.SIGWINCH)
        read_until(controller, b"120 40\r\n")
        assert agent.wait() == 0
    os.close(terminal)
    os.close(controller)
    assert AGENTS_LINES.sub(b"", kept_output(tmp_path)) == (b"True True 101 33\n\x1b[1mbold\x1b[0m\r\n120 40\n"), (
        "what is kept is what the command wrote, not what the terminal made of it"
    )


SAVING = """
def save(*_):
    for n in range(40000): print("saving", n)
    sys.stdout.flush()
    open(sys.argv[1], "w").write("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", os.getpid(), flush=True)
while True: signal.pause()
"""
"""Writes much more than a pipe holds while it saves."""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a command of its parent's death on Linux only")
def test_a_trainer_whose_agent_is_killed_can_still_write_and_save(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with started("--run", str(tmp_path / "run"), "--", *python(SAVING), str(saved)) as agent:
        assert agent.stdout is not None
        read_until(agent.stdout.fileno(), b"ready")
        agent.kill()
        # The watchdog passes on what the command still says; the output ends with the last of them.
        rest = agent.stdout.read()
    assert saved.read_text() == "saved"
    assert rest.endswith(b"saving 39999\n")


def test_a_reader_that_goes_away_ends_neither_the_command_nor_the_logs(tmp_path: Path) -> None:
    code = """
print("ready", flush=True)
sys.stdin.readline()
for n in range(30000): print("line", n)
"""
    with started("--run", str(tmp_path), "--", *python(code), stdin=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        assert agent.stdin is not None
        read_until(agent.stdout.fileno(), b"ready\n")
        agent.stdout.close()
        agent.stdin.write(b"go on\n")
        agent.stdin.close()
        assert agent.wait() == 0
    assert b"line 29999\n" in kept_output(tmp_path)


def test_a_terminal_that_stands_still_does_not_keep_the_agent_from_stopping(tmp_path: Path) -> None:
    code = """
print("ready", os.getpid(), flush=True)
while True: print("x" * 1000)
"""
    options = ["--run", str(tmp_path), "--grace", "0", "--"]
    with started(*options, *python(code), stderr=subprocess.DEVNULL) as agent:
        assert agent.stdout is not None
        pid = int(read_until(agent.stdout.fileno(), b"\n").split()[1])
        # Nobody reads any more: the pipe is full soon, and the command waits as it would without the agent.
        agent.send_signal(signal.SIGTERM)
        assert agent.wait() in (143, 137)
    eventually(lambda: not lives(pid))


def test_output_on_a_signal_to_stop_is_kept_whole(tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *_: (print("last words", flush=True), sys.exit(75)))
print("ready", flush=True)
while True: signal.pause()
"""
    with started("--run", str(tmp_path), "--", *python(code)) as agent:
        assert agent.stdout is not None
        read_until(agent.stdout.fileno(), b"ready\n")
        agent.send_signal(signal.SIGTERM)
        agent.communicate(timeout=GIVE_UP_S)
        assert agent.returncode == 75
    assert b"ready\nlast words\n" in kept_output(tmp_path)
