"""Processes of engines: their last words, and that nothing is left running, whatever ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specgym.decoding.engines.engine import EngineError
from specgym.decoding.engines.http_client import HttpClient
from specgym.decoding.engines.process import EngineProcess, free_port
from specgym.decoding.errors import ArgumentError

_FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
there = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-ISc", there, sys.argv[1] + "/child"])
subprocess.Popen([sys.executable, "-ISc", there, sys.argv[1] + "/away"], start_new_session=True)
print(os.getpid(), file=open(sys.argv[1] + "/engine", "w"), flush=True)
time.sleep(600)
"""
"""An engine that ignores SIGTERM, with a child in its group and another in a session apart."""

_OWNER = """
import pathlib, sys, time
from specgym.decoding.engines.process import EngineProcess
process = EngineProcess("toy", [sys.executable, "-ISc", sys.argv[1], sys.argv[2]], patience=0.2)
process.wait_until(lambda: all(pathlib.Path(sys.argv[2], name).exists() for name in ("engine", "child", "away")), 60)
print(process.guard_pid, flush=True)
exec(sys.argv[3])
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-ISc", code, *arguments]


def eventually(condition: Callable[[], bool]) -> bool:
    """True once a condition holds; False if it has not come to hold in a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """True if there is no such process, or nothing but its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_engine_that_dies_at_its_start_says_why() -> None:
    code = "import sys; print('loading'); sys.stdout.flush(); sys.exit('no such model: x.gguf')"
    process = EngineProcess("toy", python(code))
    with pytest.raises(EngineError, match=r"(?s)toy has ended with exit code 1.*loading\nno such model: x.gguf"):
        process.wait_until(lambda: False, 60)


def test_only_the_end_of_a_log_is_quoted_and_nothing_of_an_earlier_engine(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("of yesterday\n")
    process = EngineProcess("toy", python("[print('line', number) for number in range(20)]"), log)
    with pytest.raises(EngineError, match="line 19") as raised:
        process.wait_until(lambda: False, 60)
    assert "line 5\n" in str(raised.value)
    assert "line 4\n" not in str(raised.value)
    assert log.read_text().startswith("of yesterday\nline 0\n")
    quiet = EngineProcess("toy", python("raise SystemExit(3)"), log)
    with pytest.raises(EngineError, match=r"exit code 3\. It has printed nothing"):
        quiet.wait_until(lambda: False, 60)
    crashing = EngineProcess("toy", python("import os; os.kill(os.getpid(), 11)"), log)
    with pytest.raises(EngineError, match=r"toy crashed with SIGSEGV \(a damaged model file can do that\)"):
        crashing.wait_until(lambda: False, 60)


def test_what_cannot_be_run_or_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no-such-server cannot be run: No such file"):
        EngineProcess("toy", ["no-such-server"]).wait_until(lambda: False, 60)
    with pytest.raises(EngineError, match=r"log of toy cannot be written: .*nowhere"):
        EngineProcess("toy", python(""), tmp_path / "nowhere" / "x.log")


def test_an_engine_that_is_not_ready_in_time_is_stopped() -> None:
    process = EngineProcess("toy", python("import time; print('still loading', flush=True); time.sleep(600)"))
    assert eventually(lambda: bool(process.last_words()))
    with pytest.raises(EngineError, match=r"(?s)not ready within 0 seconds; give it longer.*still loading"):
        process.wait_until(lambda: False, 0)
    assert not process.running
    process.stop()


def test_an_engine_that_dies_while_it_answers_says_why() -> None:
    code = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    for answer in (b"HTTP/1.0 200 OK\\r\\n\\r\\n{}", b""):
        connection = server.accept()[0]
        connection.recv(9999)
        connection.sendall(answer)
        if answer:
            connection.close()
sys.exit("terminate called: ggml_abort")
"""
    port = free_port()
    with EngineProcess("toy", python(code, str(port))) as process:
        client = HttpClient("toy", f"http://127.0.0.1:{port}", process)
        process.wait_until(lambda: client.answers("/health"), 60)
        with pytest.raises(EngineError, match=r"(?s)toy has ended with exit code 1.*ggml_abort"):
            client.post("/completion", {"prompt": "x"})
    with pytest.raises(EngineError, match=r"at .* does not answer /props .* is it running there"):
        HttpClient("toy", f"http://127.0.0.1:{port}").get("/props")
    with pytest.raises(ArgumentError, match="must begin with http"):
        HttpClient("toy", "localhost:8000")


def test_an_engine_is_talked_to_through_a_pipe() -> None:
    echo = "import sys; [print(line.upper(), end='', flush=True) for line in sys.stdin]; print('end')"
    with EngineProcess("toy", python(echo), piped=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("grüße\n")
        process.stdin.flush()
        assert process.stdout.readline() == "GRÜSSE\n"
        process.stdin.close()
        assert process.stdout.read() == "end\n"  # the guard does not hold the pipe open


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize(
    ("end", "sent", "code"),
    [
        ("time.sleep(600)", signal.SIGKILL, -signal.SIGKILL),
        ("time.sleep(600)", signal.SIGTERM, -signal.SIGTERM),
        ("sys.exit(3)", None, 3),
        ("import os; os.fork() or sys.exit(); os.wait(); process.check(); process.stop(); sys.exit(4)", None, 4),
        ("import os, signal; os.kill(process.guard_pid, signal.SIGKILL); time.sleep(600)", signal.SIGKILL, -9),
    ],
    ids=["killed", "terminated", "exit", "fork", "guard-killed"],
)
def test_nothing_is_left_running(tmp_path: Path, end: str, sent: signal.Signals | None, code: int) -> None:
    command = [sys.executable, "-c", _OWNER, _FAMILY, str(tmp_path), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        family = [int(owner.stdout.readline())]
        family += [int((tmp_path / name).read_text()) for name in ("engine", "child", "away")]
        try:
            if "kill" in end:  # nobody is left to stop the engine's children, but the engine is gone
                assert eventually(lambda: gone(family[1]))
                return
            if sent is not None:
                assert not any(map(gone, family))
                owner.send_signal(sent)
            assert owner.wait(60) == code
            assert eventually(lambda: all(map(gone, family)))
        finally:
            owner.kill()
            for pid in family:
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)
