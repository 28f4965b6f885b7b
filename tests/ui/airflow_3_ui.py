"""Airflow 3's UI."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, expect

from tests.ui.airflow_ui import AirflowUI, ConnectionTest

MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d"
FIELD = "[data-scope=field][data-part=root]"


class Airflow3UI(AirflowUI):
    """Airflow 3's UI, where everybody is an admin."""

    def log_in(self) -> None:
        self.page.goto(self.address)
        expect(self.page.get_by_role("link", name="Dags")).to_be_visible()

    @property
    def form(self) -> Locator:
        return self.page.get_by_role("dialog")

    def add_connection(self, conn_id: str) -> None:
        self.page.goto(f"{self.address}/connections")
        self.page.get_by_role("button", name="Add Connection").click()
        self.form.locator("[name=connection_id]").fill(conn_id)
        self.form.get_by_role("combobox").fill("Dify")
        self.page.keyboard.press("Enter")

    def edit_connection(self, conn_id: str) -> None:
        self.page.goto(f"{self.address}/connections")
        self._row(conn_id).get_by_role("button", name="Edit Connection").click()

    def _row(self, conn_id: str) -> Locator:
        return self.page.get_by_role("row").filter(has=self.page.get_by_text(conn_id, exact=True))

    def fields(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for section in ("Standard Fields", "Extra Fields"):
            self._open_section(section)
            for root in self.form.locator(f"{FIELD}:visible").all():
                label = root.locator("label").inner_text().removesuffix("*").strip()
                found[label] = root.locator("input, textarea").first.get_attribute("placeholder") or ""
        self._open_section("Standard Fields")
        return found

    def field(self, label: str) -> Locator:
        root = self.form.locator(FIELD).filter(has=self.page.locator("label", has_text=label))
        field = root.locator("input, textarea").first
        if field.is_hidden():
            in_extra = (field.get_attribute("name") or "").startswith("element_")
            self._open_section("Extra Fields" if in_extra else "Standard Fields")
        return field

    def _open_section(self, name: str) -> None:
        section = self.form.get_by_role("button", name=name, exact=True)
        if section.get_attribute("aria-expanded") != "true":
            section.click()
        expect(section).to_have_attribute("aria-expanded", "true")
        # It unfolds over a moment.
        self.page.wait_for_timeout(500)

    def save(self) -> None:
        with self.page.expect_response(lambda answer: answer.request.method in ("POST", "PATCH")) as saved:
            self.form.get_by_role("button", name="Save").click()
        assert saved.value.ok, saved.value.text()
        expect(self.form).to_be_hidden()

    def test_and_save(self, conn_id: str) -> ConnectionTest:
        self.save()
        # The note that it is saved goes by itself, once the mouse is not over it.
        self.page.mouse.move(0, 0)
        expect(self.page.get_by_role("status")).to_have_count(0)
        button = self._row(conn_id).get_by_role("button", name="Test Connection")
        with self.page.expect_response("**/connections/test") as tested:
            button.click()
        answer = tested.value.json()
        assert tested.value.ok, answer
        note = self.page.get_by_role("status").filter(has_text="Test Connection")
        expect(note).to_be_visible()
        return ConnectionTest(answer["status"], answer["message"], shown=note.inner_text())

    @property
    def trigger_form(self) -> Locator:
        return self.form

    def open_trigger_form(self, dag_id: str) -> None:
        self.page.goto(f"{self.address}/dags/{dag_id}")
        self.page.get_by_role("button", name="Trigger").first.click()

    def fill_param(self, name: str, value: str) -> None:
        if not re.fullmatch(MOMENT, value):
            super().fill_param(name, value)
            return
        # Two fields, below one that shows what is chosen, and has no name.
        date, time = value.split()
        chosen = self.form.get_by_test_id("datetime-input")
        chosen.click()
        self.page.get_by_placeholder("YYYY/MM/DD").fill(date.replace("-", "/"))
        self.page.get_by_placeholder("HH:mm").fill(time)
        chosen.click()

    def submit_trigger_form(self, run_id: str) -> None:
        self.form.get_by_role("button", name="Advanced Options").click()
        self.form.locator("[name=dagRunId]").fill(run_id)
        self.form.get_by_role("button", name="Trigger").click()
        expect(self.form).to_be_hidden()

    def open_run(self, dag_id: str, run_id: str) -> None:
        self.page.goto(f"{self.address}/dags/{dag_id}/runs/{run_id}")

    def task_states(self) -> dict[str, str]:
        rows = self.page.get_by_role("table").get_by_role("row").filter(has=self.page.get_by_role("link"))
        expect(rows.first).to_be_visible()
        return {
            row.get_by_role("link").first.inner_text(): row.get_by_role("cell").nth(3).inner_text().strip().lower()
            for row in rows.all()
        }

    def open_task(self, task_id: str) -> None:
        self.page.get_by_role("table").get_by_role("link", name=task_id, exact=True).click()
        expect(self.page.get_by_role("heading", name=task_id, exact=True)).to_be_visible()

    def open_xcoms(self) -> dict[str, str]:
        self.page.get_by_role("link", name="Storage").click()
        self.page.get_by_role("link", name="XCom", exact=True).click()
        self.page.get_by_role("button", name="Expand all extra JSON").click()
        rows = self.page.get_by_role("table").locator("tbody").get_by_role("row")
        expect(rows).not_to_have_count(0)
        # The editors that show objects take a moment.
        self.page.wait_for_timeout(2000)
        texts = [[cell.inner_text() for cell in row.get_by_role("cell").all()] for row in rows.all()]
        return {key: value.removesuffix("Copy").replace("\xa0", " ").strip() for key, _, value, *_ in texts}

    def link(self, name: str) -> Locator:
        self.page.get_by_role("link", name="Details").click()
        return self.page.get_by_role("link", name=name)
