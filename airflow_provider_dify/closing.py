"""A context manager that closes itself at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T", bound="Closing")


class Closing:
    """Mixed into what has a ``close()``: ``with ... as it: ...`` closes it at the end."""

    def close(self) -> None:
        """Close it; the class that this is mixed into says how."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
