"""How a run is carried out: what keeps it safe and seen. None of it changes what a run learns that goes well."""

import math
from dataclasses import dataclass

from annatac_scale.errors import ConfigError

ON_NAN = ("stop", "skip")


@dataclass(frozen=True)
class RunOptions:
    """May differ from one attempt at a run to the next. Raises ConfigError where a value is out of range."""

    checkpoint_minutes: float = 10.0
    """State is kept when so much time has gone by since it was last kept, besides each epoch's end."""
    checkpoint_steps: int = 0
    """State is kept after every so many steps, too; 0: by time alone."""
    keep: int = 3
    """Newest checkpoints that stay, besides the best."""
    on_nan: str = "stop"
    """A loss or gradient that is not finite: "stop" and name the cells, or "skip" the step and count it."""
    log_steps: int = 20
    """Steps between two lines of metrics.jsonl."""
    log_cells: bool = False
    """Whether each rank writes the ids of its cells, step by step."""
    deterministic: bool = False
    """Whether only GPU kernels run that repeat their bits; on a CPU they always do."""

    def __post_init__(self) -> None:
        if self.on_nan not in ON_NAN:
            raise ConfigError(f"--on-nan {self.on_nan}: expected {' or '.join(ON_NAN)}")
        if not 0 < self.checkpoint_minutes < math.inf:
            raise ConfigError(f"--checkpoint-minutes {self.checkpoint_minutes}: expected more than 0")
        if self.checkpoint_steps < 0:
            raise ConfigError(f"--checkpoint-steps {self.checkpoint_steps}: expected at least 0")
        for name in ("keep", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
