"""The matrix: every supported Airflow, on the lowest and the highest Python that both it and this package run on."""

import nox

# Airflow, as the files in constraints/ are named, and the Pythons to run it on. scripts/pin.sh makes those
# files.
MATRIX = {
    "2.11": ("3.10", "3.12"),
    "3.0": ("3.10", "3.12"),
    "3.1": ("3.10", "3.13"),
    "3.2": ("3.10", "3.13"),
    "3.3": ("3.10", "3.13"),
    # With the lowest direct dependencies that pyproject.toml declares: all of them; all but Airflow.
    "2.11-lowest-direct": ("3.10",),
    "3.3-lowest-direct": ("3.13",),
}
ENVIRONMENTS = [
    nox.param(airflow, python, id=f"airflow-{airflow}-python{python}", tags=[airflow, f"python{python}"])
    for airflow, pythons in MATRIX.items()
    for python in pythons
]

# The environments themselves are made by the Makefile.
nox.options.default_venv_backend = "none"


@nox.session
@nox.parametrize(("airflow", "python_version"), ENVIRONMENTS)
def tests(session: nox.Session, airflow: str, python_version: str) -> None:
    """Run the README's test command on one Airflow and one Python."""
    session.run("make", "test", "test-long", f"AIRFLOW={airflow}", f"PYTHON=python{python_version}", external=True)


@nox.session(tags=["3.4"])
def beta(session: nox.Session) -> None:
    """Run the same on the next Airflow's beta, which may fail without failing the rest, until it is released."""
    make = ("make", "test", "test-long", "AIRFLOW=3.4-beta", "PYTHON=python3.13")
    session.run(*make, external=True, success_codes=[0, 1, 2])
