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
    parser.add_argument("--dialect", choices=DIALECTS, default="1.12")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--statuses", nargs="+", default=["running", "running", "running", "succeeded"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with DifyStandIn(arguments.dialect, port=arguments.port) as dify:
        run_id = dify.add_run(*arguments.statuses)
        told = {"base_url": dify.base_url, "api_key": API_KEY, "workflow_run_id": run_id}
        print(json.dumps(told), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
