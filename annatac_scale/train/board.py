"""Where the workers of a run on Ray and the process that started them tell each other things: one small actor.

It lives on the machine of that process and ends with it. Apart from Ray's own state, nothing but the run's folder
outlives a run.
"""

from dataclasses import dataclass, field

MOST_FUTILE = 5
"""Attempts in a row that may begin at the same step: what ended them will end the next one too."""


@dataclass
class Board:
    """What was said. An actor: each call is one message."""

    lines: list[str] = field(default_factory=list)
    error: tuple[str, str] | None = None
    signal: int = 0
    heeds: bool = False
    attempts: int = 0
    _last_step: int = -1
    _futile: int = 0
    _reason: str = "a worker's process or machine was lost"

    def say(self, line: str) -> None:
        """Take a line for whoever watches."""
        self.lines.append(line)

    def said(self, n_known: int) -> tuple[list[str], int]:
        """Lines after the first ``n_known``, and how many attempts there were."""
        return self.lines[n_known:], self.attempts

    def fail(self, kind: str, message: str) -> None:
        """Take an error of our own, which another attempt would meet again. kind: the name of its class"""
        if self.error is None:
            self.error = kind, message

    def met(self, reason: str) -> None:
        """Take the reason why an attempt ended that another one need not meet."""
        self._reason = reason

    def begin(self, step: int) -> None:
        """Note that an attempt begins after ``step``, and fail where too many got no further."""
        self.attempts += 1
        self.heeds = False
        self._futile = self._futile + 1 if step == self._last_step else 0
        self._last_step = step
        if self._futile >= MOST_FUTILE:
            self.fail(
                "AnnatacError",
                f"the workers ended {self._futile} times after step {step:,} without a checkpoint in between: "
                f"{self._reason}; mend that, and run the command again to resume",
            )

    def ask(self, number: int) -> bool:
        """Ask the run to end as if it had got this signal; returns whether it heeds that, its state to be kept."""
        self.signal = number
        return self.heeds

    def heed(self) -> None:
        """Note that the attempt looks at the signal from now on."""
        self.heeds = True

    def state(self) -> tuple[tuple[str, str] | None, int]:
        """The error and the signal."""
        return self.error, self.signal
