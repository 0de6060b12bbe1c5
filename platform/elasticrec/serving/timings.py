"""Times of stages in, what an answer shows of them out."""

import time


def timings(started_s: float, stages_ms: dict[str, float]) -> dict[str, float]:
    """Stages, `total`, and `queue`: what is in no stage, which is waiting for the batch before and the hops."""
    total_ms = 1e3 * (time.perf_counter() - started_s)
    queue = {"queue": max(0.0, total_ms - sum(stages_ms.values()))} if stages_ms else {}
    return {name: round(value, 3) for name, value in (stages_ms | queue | {"total": total_ms}).items()}
