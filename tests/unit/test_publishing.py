"""What the world sees of the project before it installs anything: workflows, registries, the package's page."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from importlib.metadata import metadata, version
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from airflow_provider_dify import __version__
from airflow_provider_dify.get_provider_info import get_provider_info

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SOURCE = dict(url.split(", ", 1) for url in metadata("airflow-provider-dify").get_all("Project-URL") or [])["Source"]
AIRFLOW_2 = version("apache-airflow").startswith("2.")
NEED_AIRFLOW_3 = {"airflow_provider_dify.triggers.dify_events"}

pytestmark = pytest.mark.long
in_the_repository = pytest.mark.skipif(not WORKFLOWS, reason="the sdist has no workflows")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(path: Path) -> list[dict[str, str]]:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


# --- workflows


@in_the_repository
def test_the_workflow_runs_the_matrix_of_nox() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (matrix,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "MATRIX"
    )
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    included = ci["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [(entry["airflow"], entry["python"]) for entry in included] == [
        (airflow, python) for airflow, pythons in matrix.items() for python in pythons
    ]


@in_the_repository
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_make_targets_and_pinned_actions_only(path: Path) -> None:
    targets = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[0].split()
    for step in steps(path):
        if "run" in step:
            make, target, *arguments = step["run"].split()
            assert make == "make"
            assert target in targets
            assert all("=" in argument for argument in arguments)
        else:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])


# --- the repository's address


@in_the_repository
def test_no_file_names_another_repository_than_the_package() -> None:
    named = re.compile(r"https://github\.com/[\w-]+/airflow-provider-dify\b")
    names = ("pyproject.toml", ".astro-registry.yaml", "SECURITY.md", "CHANGELOG.md")
    for path in [ROOT / name for name in names]:
        assert set(named.findall(path.read_text(encoding="utf-8"))) == {SOURCE}


def test_a_vulnerability_is_reported_at_the_packages_repository() -> None:
    assert f"]({SOURCE}/security/advisories/new)" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_docs_need_no_repository() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert SOURCE not in path.read_text(encoding="utf-8"), path


# --- the license


def test_every_module_begins_with_the_identifier_of_the_license() -> None:
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    modules = sorted((ROOT / "airflow_provider_dify").rglob("*.py"))
    without = [path for path in modules if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")]
    assert without == [], "a module's first line is: # SPDX-License-Identifier: Apache-2.0"


# --- registries


@in_the_repository
def test_the_registry_names_classes_that_exist() -> None:
    registry = yaml.safe_load((ROOT / ".astro-registry.yaml").read_text(encoding="utf-8"))
    assert registry["package-name"] == "airflow-provider-dify"
    for kind in ("operators", "sensors", "triggers", "hooks"):
        for entry in registry[kind]:
            module, _, class_name = entry["module"].rpartition(".")
            if module in NEED_AIRFLOW_3 and AIRFLOW_2:
                continue
            assert isinstance(getattr(importlib.import_module(module), class_name), type)


@in_the_repository
def test_the_registry_names_every_operator_and_sensor_and_the_hooks_and_triggers_for_users() -> None:
    registry = yaml.safe_load((ROOT / ".astro-registry.yaml").read_text(encoding="utf-8"))
    info = get_provider_info()
    for kind in ("operators", "sensors", "triggers", "hooks"):
        modules = {module for entry in info[kind] for module in entry["python-modules"]}
        assert {entry["module"].rpartition(".")[0] for entry in registry[kind]} == modules


# --- the package's page


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib")
def test_every_link_of_the_packages_page_leads_to_a_file_of_its_tag() -> None:
    import tomllib

    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for substitution in hook["fancy-pypi-readme"]["substitutions"]:
        replacement = substitution["replacement"].replace("$HFPR_VERSION", __version__)
        page = re.sub(substitution["pattern"], replacement, page)
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    for link in links:
        assert link.startswith("https://")
        path, _, _ = link.removeprefix(f"{SOURCE}/blob/v{__version__}/").partition("#")
        assert not link.startswith(SOURCE) or (ROOT / path).exists(), link
    assert "![" not in page
    assert "<picture>" not in page


# --- a release

CHANGELOG = "## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n"


@pytest.mark.parametrize(
    ("tag", "repository_url", "changelog", "problem"),
    [
        ("v1.2.3", "https://example.com/a", CHANGELOG, None),
        ("v1.2.3", "", CHANGELOG, None),
        ("1.2.3", "", CHANGELOG, "the tag must be v1.2.3"),
        ("v1.2.4", "", CHANGELOG, "the tag must be v1.2.3"),
        ("v1.2.3", "https://example.com/b", CHANGELOG, "pyproject.toml says https://example.com/a"),
        ("v1.2.3", "", "## [Unreleased]\n", "CHANGELOG.md has no heading"),
    ],
)
def test_a_release_needs_one_version_and_one_repository_everywhere(
    tag: str, repository_url: str, changelog: str, problem: str | None
) -> None:
    find_problems = script("check_release").find_problems
    problems = find_problems(tag, repository_url, "1.2.3", "https://example.com/a", changelog, {"README.md": "Install"})
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(
    ("said", "is_refused"),
    [
        ("There is no release yet. Build the wheel.", True),
        ("There is no release on the package index\nyet.", True),
        ("Nothing is published yet.", True),
        ("For a version that is not released, build the wheel.", False),
    ],
)
def test_a_release_does_not_say_that_there_is_none(said: str, is_refused: bool) -> None:
    find_problems = script("check_release").find_problems
    problems = find_problems("v1.2.3", "", "1.2.3", "", CHANGELOG, {"README.md": "Fine.", "docs/install.md": said})
    assert [problem.partition(" says ")[0] for problem in problems] == ["docs/install.md"] * is_refused


# --- the site


def test_a_link_of_the_site_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<a href="a.html#here"></a><a href="a.html#gone"></a><img src="gone.png">')
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="/index.html"></a><a href="https://example.com/"></a>')
    find_broken_links = script("check_site").find_broken_links
    assert find_broken_links(tmp_path) == ["index.html: a.html#gone", "index.html: gone.png"]
    (tmp_path / "index.html").write_text('<a href="/en/latest/a.html#here"></a><a href="/en/latest/gone.html"></a>')
    (tmp_path / "a.html").write_text('<p id="here"></p>')
    assert find_broken_links(tmp_path, "/en/latest/") == ["index.html: /en/latest/gone.html"]


# --- dependencies


@pytest.mark.parametrize("client", ["aiohttp", "requests", "urllib3"])
def test_the_lowest_http_clients_of_the_metadata_are_tested_with(client: str) -> None:
    (lowest,) = re.findall(rf'^    "{client}>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    for path in (ROOT / "constraints").glob("airflow-*-lowest-direct.txt"):
        assert re.search(rf"^{client}=={re.escape(lowest)}(\.\d)?$", path.read_text(), re.M), path.name
