"""The command line: ``python -m tests.dify_stand_in``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import threading

from tests.dify_stand_in import API_KEY, DIALECTS, DifyStandIn


def main() -> None:
    """Serve one run that is running for a few polls and then succeeds, until ended; print where, as JSON."""
    parser = argparse.ArgumentParser(description="A stand-in for Dify's Service API. A test double, not Dify.")
    parser.add_argument("--dialect", choices=(*DIALECTS, "current"), default="current")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--statuses", nargs="+", default=["running", "running", "running", "succeeded"])
    parser.add_argument("--slots", type=int, help="how many started runs run at once; all by default")
    parser.add_argument("--run-duration", type=float, default=0.0, help="seconds that a started run runs")
    parser.add_argument("--silence-limit", type=float, default=300.0, help="seconds until a queued start's stream ends")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with DifyStandIn(arguments.dialect, port=arguments.port) as dify:
        dify.slots = arguments.slots
        dify.run_duration = arguments.run_duration
        dify.silence_limit = arguments.silence_limit
        run_id = dify.add_run(*arguments.statuses)
        print(json.dumps({"base_url": dify.base_url, "api_key": API_KEY, "workflow_run_id": run_id}), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
