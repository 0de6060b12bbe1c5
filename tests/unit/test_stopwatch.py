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
    """A mark of a device that is behind: recorded in order, 10 ms apart, and come when the test says so."""

    order = count()
    done = -1  # the last moment that has come

    def __init__(self) -> None:
        self.place = -1

    def record(self) -> None:
        self.place = next(Late.order)

    def query(self) -> bool:
        return self.place <= Late.done

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


def test_a_step_has_ended_when_its_last_pass_has() -> None:
    Late.done, Late.order = -1, count()
    module = Busy()
    watch = ForwardStopwatch(module, Late)
    steps = []
    for passes in (2, 1, 0, 3):  # moments 0 to 3, 4 and 5, none, 6 to 11
        for _ in range(passes):
            module(0.0)
        steps.append(watch.take())
    ended = []
    for Late.done in (-1, 2, 3, 4, 10, 11):
        ended.append([laps.have_ended() for laps in steps])
    assert ended == [
        [False, False, True, False],
        [False, False, True, False],
        [True, False, True, False],
        [True, False, True, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert [laps.seconds() for laps in steps] == pytest.approx([0.02, 0.01, 0.0, 0.03])


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
        watch.take()
        start_s = time.monotonic()
        module(x_MD)
        launched_s = time.monotonic() - start_s
    laps = watch.take()
    assert not laps.have_ended()
    torch.cuda.synchronize()
    assert laps.have_ended()
    assert laps.seconds() > 3 * launched_s
