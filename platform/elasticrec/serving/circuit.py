"""Successes and failures of something in; whether to ask it again, out. Pure: the time is given.

closed     everything is asked; so many failures in a row open it
open       nothing is asked for a while
half-open  one question tries; its success closes the circuit, its failure opens it again
"""

from dataclasses import dataclass
from typing import Literal

from elasticrec.errors import ConfigError

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitConfig:
    """When to give up, and for how long."""

    failures: int = 5  # in a row
    open_s: float = 2.0

    def __post_init__(self) -> None:
        if self.failures < 1 or self.open_s <= 0:
            raise ConfigError(f"a circuit needs failures >= 1 and open_s > 0, got {self.failures} and {self.open_s}")


class Circuit:
    """Whoever was allowed says how it went: `succeeded`, `failed`, or `abandoned` when it came to nothing."""

    def __init__(self, config: CircuitConfig) -> None:
        self._config = config
        self._failures = 0
        self._open_until_s: float | None = None
        self._trying = False

    def state(self, now_s: float) -> State:
        if self._open_until_s is None:
            return "closed"
        return "open" if now_s < self._open_until_s else "half-open"

    def allows(self, now_s: float) -> bool:
        """Whether to ask. While half-open, one caller at a time is told yes."""
        state = self.state(now_s)
        if state == "half-open" and not self._trying:
            self._trying = True
            return True
        return state == "closed"

    def succeeded(self) -> None:
        self._failures, self._open_until_s, self._trying = 0, None, False

    def failed(self, now_s: float) -> None:
        self._failures += 1
        if self._failures >= self._config.failures:  # still so after a try that failed
            self._open_until_s = now_s + self._config.open_s
            self._trying = False

    def abandoned(self) -> None:
        """It neither worked nor failed: another may try."""
        self._trying = False
