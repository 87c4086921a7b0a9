"""`fuzz.py` finds every kind of fault, and goes on after it."""

import os
import signal
import time

import fuzz
import pytest

import tpn


def refuse(path, text=""):
    raise tpn.CheckpointError(f"{path}: damaged {text}")


FAULTS = {
    "undocumented": (lambda path: {}["x"], "KeyError"),
    "nameless": (lambda path: int("x"), "no file name"),
    "long": (lambda path: refuse(path, "x" * 3000), "too long"),
    "crash": (lambda path: os.kill(os.getpid(), signal.SIGKILL), "ended with -9"),
    "hang": (lambda path: time.sleep(100), "time limit"),
    "memory": (lambda path: bytes(2 * fuzz.MEMORY), "MemoryError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_file(tmp_path, monkeypatch, fault):
    read, message = FAULTS[fault]
    files = iter([refuse, read, refuse])
    monkeypatch.setattr(fuzz, "read", lambda kind, path: next(files)(path))
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.setitimer(signal.ITIMER_REAL, 1))
    count, findings = fuzz.read_batch({"checkpoints": [("pth", b"abc")]}, tmp_path, "checkpoints", range(7, 10))
    assert list(findings) == [8]
    assert message in findings[8]
    assert count == (2 if fault in ("crash", "hang") else 3)
