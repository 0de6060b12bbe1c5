"""Forward passes in, their seconds out: on the host's clock, and on one whose moments come later, as a GPU's do."""

import time
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from elasticrec.training import stopwatch
from elasticrec.training.stopwatch import ForwardStopwatch, mark_of


class Clock:
    """The host's, which moves when a pass says so."""

    now_s = 0.0


class Busy(nn.Module):
    def forward(self, seconds: float) -> Tensor:
        Clock.now_s += seconds
        if seconds < 0:
            raise ValueError
        return torch.zeros(())


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: Clock.now_s)


class Late:
    """A mark of a device that is behind: recorded in order, 10 ms apart, and read only once it was waited for."""

    order = count()
    waits = 0
    done = -1  # the last moment that is known to have come

    def __init__(self) -> None:
        self.place = -1

    def record(self) -> None:
        self.place = next(Late.order)

    def synchronize(self) -> None:
        Late.waits += 1
        Late.done = max(Late.done, self.place)

    def elapsed_time(self, end_event: "Late") -> float:
        assert 0 <= self.place < end_event.place <= Late.done, "read before it has come"
        return 10.0 * (end_event.place - self.place)


def test_the_host_counts_what_a_pass_takes_and_not_what_lies_between() -> None:
    module = Busy()
    watch = ForwardStopwatch(module, mark_of(torch.device("cpu")))
    module(0.02)
    Clock.now_s += 5
    module(0.03)
    assert watch.take().seconds() == pytest.approx(0.05)
    assert watch.take().seconds() == 0


def test_a_device_is_waited_for_when_a_step_is_read_and_not_before() -> None:
    Late.waits, Late.done, Late.order = 0, -1, count()
    module = Busy()
    watch = ForwardStopwatch(module, Late)
    steps = []
    for passes in (2, 1, 0, 3):
        for _ in range(passes):
            module(0.0)
        steps.append(watch.take())
    assert Late.waits == 0
    assert [laps.seconds() for laps in steps] == pytest.approx([0.02, 0.01, 0.0, 0.03])
    assert Late.waits == 3  # one for each step that had a pass


def test_a_pass_that_failed_is_not_counted() -> None:
    module = Busy()
    watch = ForwardStopwatch(module)
    with pytest.raises(ValueError):  # noqa: PT011 - what it says is of no interest
        module(-0.5)
    module(0.25)
    assert watch.take().seconds() == pytest.approx(0.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_what_it_computes_and_not_the_launch() -> None:
    device = torch.device("cuda")
    module = nn.Linear(4096, 4096, device=device)
    watch = ForwardStopwatch(module, mark_of(device))
    x_MD = torch.randn(1 << 16, 4096, device=device)
    for _ in range(2):  # the first one loads kernels
        watch.take().seconds()
        start_s = time.monotonic()
        module(x_MD)
        launched_s = time.monotonic() - start_s
    assert watch.take().seconds() > 3 * launched_s
