# SPDX-License-Identifier: Apache-2.0
"""What a batch is named: the users of its runs, and the folder of its parts. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.airflow_versions import region_of
from airflow_provider_dify.api.calls import MAX_USER_LENGTH, check_user
from airflow_provider_dify.api.models import digest_of
from airflow_provider_dify.tasks.start import installation_id, shorten_user, task_name

# Room for the row and the attempt: "/999999999.999".
_ROW_LENGTH = 20
_FOLDER = re.compile(r"([0-9a-f]{16})\.(-1|\d{1,9})\.(\d{1,9})")


@dataclass(frozen=True)
class RowUsers:
    """The users of a batch's runs."""

    prefix: str  # what they have in common, without a slash at its end

    @classmethod
    def of_task(cls, ti: Any, user: str | None = None) -> RowUsers:
        """
        Return the users of a task's batch, the same in each of its tries, and others when the task was cleared. A
        ``user`` of one's own takes the place of Airflow's name in front; the rest becomes a digest.
        """
        name = f"{task_name(ti)}/{generation_of(ti)}"
        if user is not None:
            check_user(user[:MAX_USER_LENGTH] if isinstance(user, str) else user)
            name = f"{user}/{digest_of(name)}" if len(user) + 17 <= MAX_USER_LENGTH - _ROW_LENGTH else f"{user}/{name}"
        return cls(shorten_user(name, MAX_USER_LENGTH - _ROW_LENGTH))

    def user_of(self, row: int, attempt: int) -> str:
        """Return the ``user`` of one start; both count from 0."""
        return f"{self.prefix}/{row}.{attempt}"


@dataclass(frozen=True)
class BatchName:
    """The name of a task's batch, the same in each of its tries."""

    task: str  # a digest of the task in its Dag run
    map_index: int = -1  # or the iteration of a loop; -1 for a task that is in neither
    generation: int = 0  # grows when the task is cleared

    @classmethod
    def of_task(cls, ti: Any) -> BatchName:
        """Return the name of a task instance's batch."""
        map_index, region = region_of(ti)
        # Where there is no region, the name is that of older versions.
        task = digest_of("/".join([installation_id(), ti.dag_id, ti.task_id, ti.run_id, *([region] if region else [])]))
        return cls(task, map_index, generation_of(ti))

    @classmethod
    def parse(cls, folder: str) -> BatchName | None:
        """Return the batch whose parts are in a folder of this name; ``None`` for any other folder."""
        found = _FOLDER.fullmatch(folder)
        return cls(found[1], int(found[2]), int(found[3])) if found else None

    @property
    def folder(self) -> str:
        """The name of the folder with its parts."""
        return f"{self.task}.{self.map_index}.{self.generation}"

    def is_before(self, other: BatchName) -> bool:
        """Return whether this is the batch of the same task before it was cleared."""
        is_same_task = (self.task, self.map_index) == (other.task, other.map_index)
        return is_same_task and self.generation < other.generation

    def is_beside(self, other: BatchName) -> bool:
        """Return whether this is the batch of another of the mapped tasks."""
        return self.task == other.task and self.map_index != other.map_index


def generation_of(ti: Any) -> int:
    """Return a number of a task instance that Airflow changes when the task is cleared, and at no other time."""
    return int(ti.max_tries or 0)
