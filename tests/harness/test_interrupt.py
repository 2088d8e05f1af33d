"""Ctrl-C ends every command in one line, also while it is still importing torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.commands import COMMANDS

ROOT = Path(__file__).parents[2]
TICK = 1 / os.sysconf("SC_CLK_TCK")


def start(command: str) -> subprocess.Popen:
    """As from a terminal: tests that run in the background may be deaf to Ctrl-C, and what they
    start would be, too."""
    words = [sys.executable, *command.split(), "--help"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGINT, before)


def seconds(process: subprocess.Popen) -> float:
    """Of CPU time: on a busy machine a process has hardly begun after 0.15 seconds."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def imports(process: subprocess.Popen) -> bool:
    """Does it load packages? Python itself and its own modules take a time of their own, longer on
    a busy machine, and until then Ctrl-C is Python's."""
    return "site-packages" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU times from /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line_from_the_first_moments_on(command):
    for moment in (0, 0.4, 0.9):
        process = start(command)
        while process.poll() is None:
            if imports(process) and seconds(process) >= moment:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if out and not err:
            # It was quicker than that: the help was printed.
            assert process.returncode == 0 and moment
            continue
        assert (process.returncode, err) == (130, "interrupted\n"), (moment, err)


def test_a_command_that_was_told_to_ignore_ctrl_c_goes_on(tmp_path):
    """As a shell tells its background jobs."""
    script = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    script += "sys.exit(subprocess.run([sys.executable, 'probe.py']).returncode)"
    (tmp_path / "probe.py").write_text(
        "import os, signal, harness.interrupt\n"
        "from harness.cli import cli\n"
        "cli(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "print('went on')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
