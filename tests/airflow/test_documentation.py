"""What README and docs say is so: each Python block runs, each link leads somewhere, each message is the package's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_runs import dag_bag, dag_file, run_parsed
from tests.airflow.python_blocks import BLOCKS, EXAMPLE, PAGES, ROOT, Block
from tests.dify_stand_in import DifyStandIn, Start
from tests.failures_page import (
    FAILURES,
    OURS,
    TEXTS,
    begins_as,
    messages_of_the_table,
    raised_errors,
    sections,
    sources,
    template,
)

REPOSITORY = "https://github.com/airflow-provider-dify/airflow-provider-dify/"
OUTPUTS = {"text": "hello", "summary": "short"}
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def test_no_python_block_has_another_form() -> None:
    assert BLOCKS
    fences = sum(len(re.findall(r"^\s*[`~]{3,} *\{?(?:py|python)", page.read_text(), re.M)) for page in PAGES)
    assert fences == len(BLOCKS) + sum(len(EXAMPLE.findall(page.read_text())) for page in PAGES)


@pytest.fixture
def dify_of_the_pages(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, dify_connection: str) -> DifyStandIn:
    """A stand-in with the outputs that the blocks ask for, and no need to wait for a poll."""
    dify.starts.extend([Start(fields={"outputs": OUTPUTS, "total_tokens": 42})] * 10)
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.random.uniform", lambda low, high: low)
    return dify


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.dag_id], ids=lambda block: block.name)
@pytest.mark.usefixtures("airflow_db")
def test_a_dag_of_the_pages_runs_with_what_its_form_asks_for(block: Block, dify_of_the_pages: DifyStandIn) -> None:
    run_id = dify_of_the_pages.add_run("succeeded", outputs=OUTPUTS, total_tokens=42)
    with dag_file(block.name, block.code) as path:
        bag = dag_bag(path)
        if "start_from_trigger=True" in block.code and not CAN_START_FROM_TRIGGER:
            # As the block says, it is for later Airflows; this is what its reader sees on an earlier one.
            assert "needs Airflow 3.3 or later" in block.code
            assert re.search(r"_from_trigger=True needs Airflow 3\.\d or later", bag.import_errors[str(path)])
            return
        assert not bag.import_errors
        (dag,) = bag.dags.values()
        for name in dag.params:
            schema = dag.params.get_param(name).schema
            assert schema["title"]
            assert schema["minLength"]
        # Pressing Trigger sends the defaults; only a param without one has to be filled in.
        ran = run_parsed(dag, {"workflow_run_id": run_id} if "workflow_run_id" in dag.params else {})
    assert ran.state == "success"
    assert dify_of_the_pages.requests


@pytest.mark.parametrize("block", [b for b in BLOCKS if not b.dag_id], ids=lambda block: block.name)
def test_any_other_block_of_the_pages_runs(
    block: Block, dify_of_the_pages: DifyStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id in UUID.findall(block.code):
        dify_of_the_pages.add_run("succeeded", run_id=run_id, outputs=OUTPUTS)
    exec(compile(block.code, block.page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
    assert "DifyStandIn" in block.code or dify_of_the_pages.requests


# --- links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and Sphinx make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_and_image_leads_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        targets = [*re.findall(r"\]\(\s*<?([^)\s>]+)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)]
        for target in targets:
            in_repository = target.startswith(REPOSITORY)
            if target.startswith(("http://", "https://")) and not in_repository:
                continue
            path, _, anchor = re.sub(f"{REPOSITORY}(tree|blob)/main/", "", target).partition("#")
            leads_to = (ROOT if in_repository else page.parent) / path if path else page
            assert leads_to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(leads_to), f"{page.name}: {target}"


def test_no_row_of_a_table_stands_on_two_pages() -> None:
    rows = [
        row
        for page in PAGES
        for row in set(re.findall(r"^\| .*[^-:| ].* \|$", page.read_text(encoding="utf-8"), re.M))
        # What begins as its heading does may be the same on two pages.
        if len(row) > len("| environment variable | meaning |") + 20
    ]
    assert [row for row in rows if rows.count(row) > 1] == []


# --- messages

# Airflow's own exceptions are raised with our words, too.
RAISING = OURS | {"AirflowSensorTimeout"}
# What a wait goes on or succeeds with is no failure to look up.
FINE = {"Dify workflow run … is …….", "Dify workflow run … ……."}


def failures_and_warnings() -> set[str]:
    """Return the messages that the package raises or warns with, as far as they are written where that is done."""
    found = set()
    for node in sources():
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in RAISING or called in {"warning", "exception"}:
            found |= {template(argument) for argument in node.args[:1]}
        if called == "Verdict":
            found |= {template(argument) for argument in node.args[1:2]}
    # "%s" alone is a message that is written elsewhere.
    return {text for text in found - FINE if text and text != "…"}


@pytest.mark.parametrize(("text", "section"), sorted(set(raised_errors())))
def test_the_address_of_an_error_leads_to_the_section_of_its_row(text: str, section: str) -> None:
    rows = [found for message, found in sections().items() if begins_as(message, text)]
    assert section in set().union(*rows)


def test_each_message_of_the_table_is_one_of_the_package() -> None:
    messages = messages_of_the_table()
    assert len(messages) > 100
    assert [message for message in messages if not any(begins_as(message, text) for text in TEXTS)] == []


def test_each_message_of_the_package_is_in_the_table() -> None:
    messages, texts = messages_of_the_table(), failures_and_warnings()
    assert len(texts) > 100
    assert [text for text in sorted(texts) if not any(begins_as(message, text) for message in messages)] == []


def test_every_exception_is_in_the_table() -> None:
    documented = set(re.findall(r"^\| `(Dify\w+)` \|", FAILURES, re.M))
    assert documented == RAISING - {"DifyError", "AirflowSensorTimeout"}


# --- contributing

CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")


def test_every_module_and_every_make_target_has_its_line() -> None:
    package = ROOT / "airflow_provider_dify"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.stem != "__init__"}
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", CONTRIBUTING, re.M)) == modules
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(targets.split()) <= set(re.findall(r"^\| `make ([\w-]+)` \|", CONTRIBUTING, re.M))
