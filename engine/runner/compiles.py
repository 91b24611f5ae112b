"""Counts compilations: none may happen once a lane is ready.

JAX reports the duration of every backend compilation to listeners of `jax.monitoring`; programs found in the
persistent cache are not compiled and not counted.
"""

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Compilations seen in this process since it was made, and since `seal`."""

    def __init__(self) -> None:
        self.total = 0
        self._sealed_at: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_s: float, **_: object) -> None:
        if event == EVENT:
            self.total += 1

    def seal(self) -> None:
        """From here on compilations are late."""
        self._sealed_at = self.total

    @property
    def late(self) -> int:
        """Compilations after ready; 0 is the promise."""
        return 0 if self._sealed_at is None else self.total - self._sealed_at
