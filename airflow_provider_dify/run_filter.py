"""Which of an app's runs somebody wants to know of. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.models import ENDED_STATUSES

# How a prefix of a user is written: `nightly-*`.
_PREFIX_MARK = "*"


@dataclass(frozen=True)
class RunFilter:
    """
    Which runs are wanted.

    :param statuses: how they ended; any end if empty.
    :param triggered_from: what started them: ``app-run``, ``webhook``, ``schedule``, ...; anything if empty.
    :param user: the ``user`` of the start; one that ends with ``*`` is a prefix. ``None`` for any.
    """

    statuses: tuple[str, ...] = ()
    triggered_from: tuple[str, ...] = ()
    user: str | None = None

    @classmethod
    def parse(cls, *, statuses: Any, triggered_from: Any, user: Any) -> RunFilter:
        """
        Parse the arguments of a sensor or trigger.

        :param statuses: texts, or one text; ``None`` for any.
        :param triggered_from: texts, or one text; ``None`` for any.
        :param user: a text, or ``None``.
        :raises DifyConfigurationError: if an argument is anything else, or a status is not one that a run ends with.
        """
        wanted = _texts("statuses", statuses)
        known = sorted(str(status) for status in ENDED_STATUSES)
        for status in wanted:
            if status not in known:
                raise DifyConfigurationError(f"statuses must be some of {', '.join(known)}, but one is {status!r:.100}")
        if user is not None and not (isinstance(user, str) and user):
            raise DifyConfigurationError(f"user must be a text that is not empty, or None: {user!r:.100}")
        return cls(wanted, _texts("triggered_from", triggered_from), user)

    @property
    def exact_user(self) -> str | None:
        """The user, if it is one that Dify can filter by."""
        return None if self.user is None or self.user.endswith(_PREFIX_MARK) else self.user

    def fits(self, status: str, user: str | None, triggered_from: str | None) -> bool:
        """Return whether a run that ended is wanted."""
        return (not self.statuses or str(status) in self.statuses) and self.fits_start(user, triggered_from)

    def fits_start(self, user: str | None, triggered_from: str | None) -> bool:
        """Return whether a run is wanted, however it ends."""
        if self.triggered_from and triggered_from not in self.triggered_from:
            return False
        if self.user is None:
            return True
        if self.exact_user is not None:
            return user == self.user
        return user is not None and user.startswith(self.user[: -len(_PREFIX_MARK)])

    def serialize(self) -> dict[str, Any]:
        """Return the arguments of :meth:`parse`: JSON-ready, and the same for the same filter."""
        return {
            "statuses": sorted(self.statuses) or None,
            "triggered_from": sorted(self.triggered_from) or None,
            "user": self.user,
        }


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or isinstance(texts, (dict, bytes)):
        raise DifyConfigurationError(f"{name} must be a list of texts, or None: {value!r:.100}")
    found = list(texts)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise DifyConfigurationError(f"{name} must be a list of texts, or None: {value!r:.100}")
    # str() for the members of an enum.
    return tuple(dict.fromkeys(str(text) for text in found))
