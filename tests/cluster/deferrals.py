"""Which runs are waited for by a deferrable operator. Dags and tests read the same list."""

from __future__ import annotations

# The seconds of a run, and the seconds after which its task defers.
DEFERRALS = [(run_seconds, defer_after) for run_seconds in (2, 10, 60) for defer_after in (0, 15)]


def dag_id_of(run_seconds: int, defer_after: int) -> str:
    """Name the Dag of such runs."""
    return f"runs_of_{run_seconds}_deferred_after_{defer_after}"
