"""The rows that are run by mapped tasks and by a batch. Dags and tests read the same list."""

from __future__ import annotations

from typing import Any

ROWS: list[dict[str, Any]] = [{"number": number} for number in range(200)]
# As many as the cluster has places for tasks, so that both have the same number of runs at once.
ACTIVE = 32
MAPPED = "rows_mapped"
BATCH = "rows_in_a_batch"
