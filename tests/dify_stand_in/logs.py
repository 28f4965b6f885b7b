"""The log of a workflow's runs: its filters and its pages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from tests.dify_stand_in.recordings import json_response
from tests.dify_stand_in.runs import Run

if TYPE_CHECKING:
    from aiohttp import web

    from tests.dify_stand_in.server import DifyStandIn

# Fields of a run that the log does not show.
HIDDEN: tuple[str, ...] = ()
STATUSES = ("succeeded", "failed", "stopped")


class BadQuery(ValueError):
    """A parameter that Dify rejects; says why."""


def logs(stand_in: DifyStandIn, query: Mapping[str, str]) -> web.Response:
    """
    Return the response to ``GET /workflows/logs``.

    :param stand_in: what has the runs and the settings.
    :param query: the request's parameters; unknown ones are ignored.
    :return: a page, newest runs first, or a 400.
    """
    try:
        page = _number(query, "page", 1, 99_999)
        limit = _number(query, "limit", 20, 100)
        wanted = _Filter(query, ignores_user=stand_in.logs_ignore_user)
    except BadQuery as error:
        return json_response({"code": "invalid_param", "message": str(error), "status": 400}, status=400)
    finished_only = stand_in.log_row_at_end
    found = [run for run in stand_in.log if wanted(run) and not (finished_only and not run.finished)]
    # By whole seconds. Runs of one second come in an order that differs from page to page (seen on 1.12.1, 1.13.0 and
    # 1.16.1), so that a page by its number repeats some and leaves others out.
    if page % 2:
        found.reverse()
    found.sort(key=_second_of, reverse=True)
    shown = found[(page - 1) * limit : page * limit]
    recorded = stand_in.dialect_rules.recording("logs").fields()["data"][0]
    rows = [_row(recorded, run) for run in shown]
    has_more = page * limit < len(found)
    return json_response({"page": page, "limit": limit, "total": len(found), "has_more": has_more, "data": rows})


class _Filter:
    def __init__(self, query: Mapping[str, str], *, ignores_user: bool) -> None:
        self.status = query.get("status")
        if self.status is not None and self.status not in STATUSES:
            raise BadQuery(_invalid("status", "Input should be 'succeeded', 'failed' or 'stopped'", self.status))
        self.after = _time(query.get("created_at__after"))
        self.before = _time(query.get("created_at__before"))
        self.user = None if ignores_user else query.get("created_by_end_user_session_id") or None
        self.keyword = query.get("keyword", "")
        # Runs that were started over the API are no account's.
        self.none = bool(query.get("created_by_account"))

    def __call__(self, run: Run) -> bool:
        now = run.now
        if now is None or self.none or (self.user is not None and run.user != self.user):
            return False
        if self.status is not None and now["status"] != self.status:
            return False
        if self.keyword and self.keyword not in (run.user + run.id + str(now["inputs"]) + str(now["outputs"])):
            return False
        created_at = now["created_at"]
        return (self.after is None or created_at >= self.after) and (self.before is None or created_at <= self.before)


def _second_of(run: Run) -> float:
    assert run.now is not None
    return float(run.now["created_at"])


def _row(recorded: dict[str, Any], run: Run) -> dict[str, Any]:
    now = run.now
    assert now is not None
    workflow_run = recorded["workflow_run"]
    known = {key: now[key] for key in workflow_run.keys() & now.keys()}
    if "triggered_from" in workflow_run:
        known["triggered_from"] = run.triggered_from
    for name in HIDDEN:
        workflow_run = {key: value for key, value in workflow_run.items() if key != name}
        known.pop(name, None)
    user = {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, run.user)), "session_id": run.user}
    return {
        **recorded,
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, run.id)),
        "workflow_run": None
        if run.has_no_record
        else {**workflow_run, **known, "exceptions_count": run.exceptions_count},
        "created_at": now["created_at"],
        "created_by_end_user": {**recorded["created_by_end_user"], **user},
    }


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        problem = "Input should be a valid integer, unable to parse string as an integer"
        raise BadQuery(_invalid(name, problem, text)) from None
    if value < 1:
        raise BadQuery(_invalid(name, "Input should be greater than or equal to 1", text))
    if value > most:
        raise BadQuery(_invalid(name, f"Input should be less than or equal to {most}", text))
    return value


def _invalid(name: str, problem: str, value: str) -> str:
    return f"1 validation error for WorkflowLogQuery\n{name}\n  {problem} [input_value='{value}', input_type=str]"


def _time(text: str | None) -> float | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise BadQuery(f"invalid literal for int() with base 10: b{text[:4]!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
