"""The documentation's screenshots: small, and the same from run to run."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import sysconfig
from pathlib import Path
from typing import Literal

from PIL import Image, ImageChops
from playwright.sync_api import Locator, Page

from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses
from tests.airflow.python_blocks import ROOT
from tests.dify_stand_in import DifyStandIn

# What stands in a picture for what differs from run to run.
PORT = "5001"
WORKFLOW_RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
DATE, TIME = "2026-11-21", "22:21:04"
# Where this machine has Airflow and this package, which a traceback shows.
FOLDERS = {f"{sysconfig.get_path('purelib')}/": "", f"{ROOT}/": ""}
REPLACE_TEXTS = """
([replacements, date, time]) => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const before = texts.currentNode.data;
        let after = before.replaceAll(
            /\\d{4}-\\d\\d-\\d\\d([T ])\\d\\d:\\d\\d:\\d\\d/g,
            (found, between) => found.startsWith(date) ? found : date + between + time);
        for (const [text, other] of Object.entries(replacements))
            after = after.replaceAll(text, other);
        if (after !== before)
            texts.currentNode.data = after;
    }
}
"""


class Screenshots:
    """
    Takes screenshots, if there is a folder for them.

    :param page: the browser's page.
    :param folder: where the pictures go; ``None`` to take none.
    :param dify: whose port and run ids are not to be seen.
    """

    def __init__(self, page: Page, folder: Path | None, dify: DifyStandIn) -> None:
        self.page = page
        self.folder = folder
        self.dify = dify

    def take(self, name: str, what: Locator | None = None, *, height: int = 800, note: Locator | None = None) -> None:
        """
        Take one in each theme: ``name.png`` and ``name-dark.png``.

        :param name: the file's name, without its ending.
        :param what: the part of the page; the whole window by default.
        :param height: the window's height meanwhile.
        :param note: a note that goes by itself, unless the mouse is over it.
        """
        if self.folder is None:
            return
        usual = self.page.viewport_size
        assert usual is not None
        self.page.set_viewport_size({**usual, "height": height})
        if note is not None:
            note.hover()
        self._save(name, what)
        self._set_theme("dark")
        self._save(f"{name}-dark", what)
        self._set_theme("light")
        self.page.set_viewport_size(usual)

    def _set_theme(self, theme: Literal["dark", "light"]) -> None:
        if AIRFLOW_2:
            self.page.evaluate("theme => document.documentElement.dataset.colorScheme = theme", theme)
        else:
            # By default the theme is the browser's.
            self.page.emulate_media(color_scheme=theme)

    def _save(self, name: str, what: Locator | None) -> None:
        assert self.folder is not None
        # What fades and slides has come to rest then.
        self.page.wait_for_timeout(1000)
        run_ids = dict.fromkeys((run.workflow_run_id for run in self.dify.started), WORKFLOW_RUN_ID)
        self.page.evaluate(REPLACE_TEXTS, [{str(self.dify.port): PORT, **run_ids, **FOLDERS}, DATE, TIME])
        picture = (what or self.page).screenshot(animations="disabled", caret="hide")
        self.folder.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(picture)) as image:
            few_colours = image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
            path = self.folder / f"{name}.png"
            if not path.exists() or not _look_the_same(Image.open(path), few_colours):
                few_colours.save(path, optimize=True)

    def set_times(self, airflow: AirflowProcesses, run_id: str, tasks: list[str]) -> None:
        """Let a run that is over have been when the stand-in's answers were recorded, each task for three seconds."""
        if self.folder is None:
            return

        def at(second: int) -> str:
            return f"2026-11-21 22:21:{second:02}.000000"

        with contextlib.closing(sqlite3.connect(airflow.home / "airflow.db", timeout=30)) as db, db:
            columns = {column for _, column, *_ in db.execute("PRAGMA table_info(dag_run)")}
            began = columns & {"logical_date", "execution_date", "run_after", "queued_at", "start_date"}
            settings = ", ".join(f"{column} = :began" for column in sorted(began))
            db.execute(
                f"UPDATE dag_run SET {settings}, end_date = :ended WHERE run_id = :run_id",
                {"began": at(0), "ended": at(4 * len(tasks)), "run_id": run_id},
            )
            for number, task_id in enumerate(tasks):
                task = {"task_id": task_id, "run_id": run_id}
                times = {"began": at(4 * number + 1), "ended": at(4 * number + 4)}
                db.execute(
                    "UPDATE task_instance SET start_date = :began, end_date = :ended, duration = 3 "
                    "WHERE task_id = :task_id AND run_id = :run_id",
                    {**task, **times},
                )
                db.execute(
                    "UPDATE xcom SET timestamp = :ended WHERE task_id = :task_id AND run_id = :run_id",
                    {**task, **times},
                )


def _look_the_same(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two pictures differ in a few pixels at most, as the corners of a frame do now and then."""
    if one.size != other.size:
        return False
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).convert("L")
    return sum(difference.histogram()[1:]) < 20
