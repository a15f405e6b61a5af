"""A signal ends a run wherever it arrives."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from ptq161.tracking.interrupts import Interrupted, Interrupts


class Signalled:
    """Its destructor is where the signal arrives."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_arrives_in_a_destructor_is_not_lost(number: int) -> None:
    before = sys.unraisablehook
    reached = []
    with pytest.raises(Interrupted, match=signal.Signals(number).name), Interrupts().installed():
        Signalled(number)  # Python drops what its destructor raises
        reached.append(True)
        time.sleep(20)
        reached.append(True)
    assert len(reached) == 1 and sys.unraisablehook is before


def test_other_errors_of_destructors_are_reported_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(dropped.exc_value))
    with Interrupts().installed():
        Broken()
    (error,) = reported
    assert isinstance(error, ValueError)


def test_one_that_arrives_twice_within_a_deferral_is_raised_once_after_it() -> None:
    interrupts = Interrupts()
    done = []
    with pytest.raises(Interrupted), interrupts.installed(), interrupts.deferred():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(True)
    assert done
