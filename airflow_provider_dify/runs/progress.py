"""What the events of one run have said so far: lines for a task's log, the node that failed, the price."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from typing import Any

from airflow_provider_dify.api.events import FINISHED, WorkflowEvent
from airflow_provider_dify.api.text import as_text, one_line

_TITLE_LENGTH = 80
_ITERATION_ENDS = {"iteration_completed": "Iteration", "loop_completed": "Loop"}


class RunProgress:
    """The progress of one run, out of its events in turn."""

    def __init__(self) -> None:
        # The one that failed last, with its error.
        self.failed_node: str | None = None
        # What the stream ended the run with.
        self.final_status: str | None = None
        self.final_error: str | None = None
        # By Dify, which keeps no record of such a run.
        self.was_rejected = False
        self._prices: dict[str, Decimal] = {}

    @property
    def price(self) -> dict[str, str]:
        """``total_price`` as decimal text, and ``currency``; empty before the run's end, and for two currencies."""
        if self.final_status is None or len(self._prices) != 1:
            return {}
        ((currency, total),) = self._prices.items()
        return {"total_price": format(total, "f"), "currency": currency}

    def on_event(self, event: WorkflowEvent) -> str | None:
        """Note what the run's next event says; return a line for the task's log, or ``None``."""
        data = event.data
        if event.names_a_rejected_run:
            self.was_rejected = True
        if event.name == FINISHED:
            self.final_status = _text(data, "status")
            self.final_error = _text(data, "error")
            self.was_rejected = self.was_rejected and self.final_status == "failed"
            return None
        if event.name == "node_finished":
            self._add_price(data.get("execution_metadata"))
            if data.get("status") == "failed":
                self.failed_node = f"{_node(data)} failed: {_error(data)}."
        # One line for an iteration or a loop, not one for each node of each of its items.
        if data.get("iteration_id") or data.get("loop_id"):
            return None
        return _line(event.name, data)

    def _add_price(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not isinstance(metadata.get("currency"), str):
            return
        try:
            price = Decimal(as_text(metadata.get("total_price")))
        except InvalidOperation:
            return
        # Bounded both ways: as decimal text, 1e-999999 would be a megabyte.
        if price.is_finite() and -30 < (price or Decimal()).adjusted() < 9:
            currency = one_line(metadata["currency"], 10)
            self._prices[currency] = self._prices.get(currency, Decimal()) + (price or Decimal())


def _line(name: str, data: dict[str, Any]) -> str | None:
    error = f": {_error(data)}" if data.get("error") else ""
    if name == "node_started":
        return f"{_node(data)} started."
    if name == "node_finished":
        metadata = data.get("execution_metadata")
        tokens = metadata.get("total_tokens") if isinstance(metadata, dict) else None
        used = f", {tokens} tokens" if isinstance(tokens, int) and tokens else ""
        return f"{_node(data)} {one_line(data.get('status'), 30)}{_took(data)}{used}{error}."
    if name == "node_retry":
        return f"{_node(data)} failed and runs again, retry {one_line(data.get('retry_index'), 10)}: {_error(data)}."
    if name in _ITERATION_ENDS:
        steps = data.get("steps")
        items = f", {steps} items" if isinstance(steps, int) else ""
        title = one_line(data.get("title"), _TITLE_LENGTH)
        return f"{_ITERATION_ENDS[name]} {title!r} {one_line(data.get('status'), 30)}{_took(data)}{items}{error}."
    if name == "human_input_required":
        return _waits_for_a_person(data)
    return None


def _waits_for_a_person(data: dict[str, Any]) -> str:
    # Never the form's token: whoever has it can answer the form.
    content = one_line(data.get("form_content") or "", _TITLE_LENGTH)
    form = f", form {content!r}" if content else ""
    return (
        f"The run is paused: it waits for a person at the node {one_line(data.get('node_title'), _TITLE_LENGTH)!r}"
        f"{form}{_expires(data.get('expiration_time'))}."
    )


def _expires(epoch: Any) -> str:
    try:
        moment = datetime.fromtimestamp(epoch, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
    return f", which expires at {moment.isoformat(timespec='seconds')}"


def _node(data: dict[str, Any]) -> str:
    title, node_type = (one_line(data.get(name), _TITLE_LENGTH) for name in ("title", "node_type"))
    return f"Node {title!r} ({node_type})"


def _error(data: dict[str, Any]) -> str:
    return one_line(data.get("error") or "Dify gave no error text", 300).rstrip(".")


def _took(data: dict[str, Any]) -> str:
    elapsed = data.get("elapsed_time")
    try:
        return f" after {float(elapsed):.2f} seconds" if isinstance(elapsed, (int, float)) else ""
    except OverflowError:
        return ""


def _text(data: dict[str, Any], name: str) -> str | None:
    value = data.get(name)
    return value if isinstance(value, str) else None
