"""Airflow 2's UI."""

from __future__ import annotations

import json

from playwright.sync_api import Locator, Page, expect

from tests.ui.airflow_ui import AirflowUI, ConnectionTest


class Airflow2UI(AirflowUI):
    """
    Airflow 2's UI.

    :param page: the browser's page.
    :param address: where Airflow's UI is.
    :param user: an admin, whose password is the user's name.
    """

    def __init__(self, page: Page, address: str, user: str) -> None:
        super().__init__(page, address)
        self.user = user

    def log_in(self) -> None:
        self.page.goto(f"{self.address}/login/")
        self.page.locator("#username").fill(self.user)
        self.page.locator("#password").fill(self.user)
        self.page.locator("input[type=submit]").click()
        self.page.wait_for_url("**/home")

    @property
    def form(self) -> Locator:
        return self.page.locator("#model_form")

    def add_connection(self, conn_id: str) -> None:
        self.page.goto(f"{self.address}/connection/add")
        # The list itself is hidden behind a nicer one.
        self.page.locator("#conn_type").select_option("dify", force=True)
        self.page.locator("#conn_id").fill(conn_id)

    def edit_connection(self, conn_id: str) -> None:
        self.page.goto(f"{self.address}/connection/list/")
        row = self.page.get_by_role("row").filter(has_text=conn_id)
        row.locator("a[href*='/connection/edit/']").first.click()
        expect(self.form).to_be_visible()

    def fields(self) -> dict[str, str]:
        found = {}
        for row in self.form.locator("tr:visible").all():
            label = row.locator("label").inner_text().removesuffix("*").strip()
            found[label] = row.locator("input, textarea, select").first.get_attribute("placeholder") or ""
        return found

    def field(self, label: str) -> Locator:
        row = self.form.get_by_role("row").filter(has=self.page.locator("label", has_text=label))
        return row.locator("input, textarea").first

    def save(self) -> None:
        self.form.get_by_role("button", name="Save").click()
        expect(self.page.get_by_text("Added Row").or_(self.page.get_by_text("Changed Row"))).to_be_visible()

    def test_and_save(self, conn_id: str) -> ConnectionTest:
        with self.page.expect_response("**/connections/test") as tested:
            self.form.get_by_role("button", name="Test").click()
        answer = json.loads(tested.value.text())
        assert tested.value.ok, answer
        shown = self.page.locator(".alert:visible").filter(has_text=answer["message"])
        expect(shown).to_be_visible()
        test = ConnectionTest(answer["status"], answer["message"], shown=shown.inner_text())
        self.save()
        return test

    @property
    def trigger_form(self) -> Locator:
        return self.page.locator("#trigger_form")

    def open_trigger_form(self, dag_id: str) -> None:
        self.page.goto(f"{self.address}/dags/{dag_id}/trigger")

    def submit_trigger_form(self, run_id: str) -> None:
        self.trigger_form.get_by_text("Generated Configuration JSON and Dagrun Options").click()
        self.trigger_form.locator("[name=run_id]").fill(run_id)
        self.trigger_form.get_by_role("button", name="Trigger", exact=True).click()
        expect(self.page.get_by_text(f"with new Run ID {run_id}")).to_be_visible()

    def open_run(self, dag_id: str, run_id: str) -> None:
        self.page.goto(f"{self.address}/dags/{dag_id}/grid?dag_run_id={run_id}&tab=graph")

    def task_states(self) -> dict[str, str]:
        nodes = self.page.locator(".react-flow__node")
        expect(nodes).not_to_have_count(0)
        texts = []
        for node in nodes.all():
            # A task's name, state and operator; the state comes a moment later.
            expect(node.locator("p")).to_have_count(3)
            texts.append(node.locator("p").all_text_contents())
        return {task_id: state for task_id, state, _ in texts}

    def open_task(self, task_id: str) -> None:
        self.page.goto(self.page.url.replace("tab=graph", f"task_id={task_id}"))
        expect(self.page.get_by_role("tab", name="XCom")).to_be_visible()

    def open_xcoms(self) -> dict[str, str]:
        self.page.get_by_role("tab", name="XCom").click()
        rows = self.page.get_by_role("tabpanel").get_by_role("row")
        expect(rows.filter(has_text="return_value")).to_be_visible()
        expect(rows.filter(has_text="Loading...")).to_have_count(0)
        texts = [[cell.inner_text() for cell in row.get_by_role("cell").all()] for row in rows.all()]
        return dict(cells for cells in texts if len(cells) == 2)

    def link(self, name: str) -> Locator:
        self.page.get_by_role("tab", name="Details").click()
        return self.page.get_by_role("link", name=name)
