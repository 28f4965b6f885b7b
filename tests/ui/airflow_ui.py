"""What a user does in Airflow's UI, whatever its version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from playwright.sync_api import Locator, Page


@dataclass(frozen=True)
class ConnectionTest:
    """
    What came of pressing Test.

    :param works: whether Airflow's server says that the connection works.
    :param message: what the server says.
    :param shown: what the page shows of that.
    """

    works: bool
    message: str
    shown: str


class AirflowUI(ABC):
    """
    Airflow's UI in a browser.

    :param page: the browser's page.
    :param address: where Airflow's UI is.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address

    @abstractmethod
    def log_in(self) -> None: ...

    # --- connections

    @property
    @abstractmethod
    def form(self) -> Locator:
        """The connection form."""

    @abstractmethod
    def add_connection(self, conn_id: str) -> None:
        """Open the form for a new connection of type Dify."""

    @abstractmethod
    def edit_connection(self, conn_id: str) -> None:
        """Open the form of a saved connection."""

    @abstractmethod
    def fields(self) -> dict[str, str]:
        """Return the labels and placeholders of all fields that the form shows."""

    @abstractmethod
    def field(self, label: str) -> Locator:
        """Bring a field of the form into view."""

    def fill(self, values: dict[str, str]) -> None:
        """Fill in fields by their labels."""
        for label, value in values.items():
            self.field(label).fill(value)
            # Airflow 3 takes a number when its field is left.
            self.field(label).blur()

    @abstractmethod
    def save(self) -> None:
        """Save the form."""

    @abstractmethod
    def test_and_save(self, conn_id: str) -> ConnectionTest:
        """Save the form and press Test, in the order that this version asks for."""

    # --- Dags

    def trigger(self, dag_id: str, run_id: str, params: dict[str, str] | None = None) -> None:
        """Trigger a Dag with the defaults of its form, except for these params."""
        self.open_trigger_form(dag_id)
        self.fill_params(params or {})
        self.submit_trigger_form(run_id)

    @property
    @abstractmethod
    def trigger_form(self) -> Locator:
        """The form of the params that *Trigger* asks for."""

    @abstractmethod
    def open_trigger_form(self, dag_id: str) -> None:
        """Press *Trigger* on a Dag's page."""

    def fill_param(self, name: str, value: str) -> None:
        """Fill in a param by its name; a moment as ``2026-01-31 23:59``."""
        field = self.trigger_form.locator(f"[name=element_{name}]")
        field.fill(value)
        # Airflow 3 takes a text when its field is left.
        field.blur()

    def fill_params(self, params: dict[str, str]) -> None:
        """Fill in params by their names."""
        for name, value in params.items():
            self.fill_param(name, value)

    @abstractmethod
    def submit_trigger_form(self, run_id: str) -> None:
        """Press *Trigger* in the open form."""

    @abstractmethod
    def open_run(self, dag_id: str, run_id: str) -> None:
        """Open the page of a Dag run."""

    @abstractmethod
    def task_states(self) -> dict[str, str]:
        """Return the states of the open run's tasks."""

    @abstractmethod
    def open_task(self, task_id: str) -> None:
        """Open a task of the open run."""

    @abstractmethod
    def open_xcoms(self) -> dict[str, str]:
        """Open the XComs of the open task, and give their values as they are shown."""

    @abstractmethod
    def link(self, name: str) -> Locator:
        """Bring a link of the open task into view."""
