"""A task's name can be read on its colour, as Airflow 2 and Airflow 3 draw it, in the light and in the dark mode."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import BaseOperator

from airflow_provider_dify.get_provider_info import get_provider_info

# WCAG 2.1, level AA, for text of a usual size.
LEAST_CONTRAST = 4.5
Colour = tuple[float, float, float]
Matrix = tuple[Colour, Colour, Colour]

# What CSS's hue-rotate(180deg) and saturate(90%) do to red, green and blue.
TURNED_HUE: Matrix = ((-0.574, 1.43, 0.144), (0.426, 0.43, 0.144), (0.426, 1.43, -0.856))
LESS_SATURATED: Matrix = ((0.9213, 0.0715, 0.0072), (0.0213, 0.9715, 0.0072), (0.0213, 0.0715, 0.9072))

pytestmark = pytest.mark.long


def classes() -> list[type[Any]]:
    info = get_provider_info()
    modules = [name for kind in ("operators", "sensors") for entry in info[kind] for name in entry["python-modules"]]
    return [
        value
        for name in modules
        for _, value in inspect.getmembers(importlib.import_module(name), inspect.isclass)
        if value.__module__ == name and issubclass(value, BaseOperator)
    ]


def parse(colour: str) -> Colour:
    assert len(colour) == len("#rrggbb"), colour
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def times(matrix: Matrix, colour: Colour) -> Colour:
    red, green, blue = (sum(a * b for a, b in zip(row, colour, strict=True)) for row in matrix)
    return clamp((red, green, blue))


def clamp(colour: Colour) -> Colour:
    red, green, blue = (min(1.0, max(0.0, value)) for value in colour)
    return red, green, blue


def faded(colour: Colour) -> Colour:
    """Return a colour as the background of a task in Airflow 2's graph: ``color-mix(in srgb, colour 80%, white)``."""
    red, green, blue = colour
    return 0.8 * red + 0.2, 0.8 * green + 0.2, 0.8 * blue + 0.2


def in_dark_mode(colour: Colour) -> Colour:
    """Return a colour as Airflow 2's filter shows it: invert(100%) hue-rotate(180deg) saturate(90%) contrast(85%)."""
    red, green, blue = colour
    turned = times(LESS_SATURATED, times(TURNED_HUE, (1 - red, 1 - green, 1 - blue)))
    red, green, blue = turned
    return clamp((0.85 * red + 0.075, 0.85 * green + 0.075, 0.85 * blue + 0.075))


def luminance(colour: Colour) -> float:
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_contrast_is_that_of_wcag() -> None:
    assert contrast(parse("#000000"), parse("#ffffff")) == pytest.approx(21)
    # The lightest grey that is readable on white.
    assert contrast(parse("#767676"), parse("#ffffff")) == pytest.approx(4.54, abs=0.01)


def test_every_operator_and_sensor_is_looked_at() -> None:
    assert {found.__name__ for found in classes()} == {
        "DifyRunWorkflowOperator",
        "DifyRunWorkflowBatchOperator",
        "DifyWorkflowRunSensor",
        "DifyLatestWorkflowRunSensor",
    }


@pytest.mark.parametrize("task", classes(), ids=lambda task: task.__name__)
def test_a_tasks_text_can_be_read_on_its_colour(task: type[Any]) -> None:
    # Airflow 2 takes black for "not chosen" and writes in a grey that is hard to read on any colour.
    assert task.ui_fgcolor not in {"#000", "#000000"}
    text, background = parse(task.ui_fgcolor), parse(task.ui_color)
    # Airflow 2's graph, in the light and in the dark mode. Airflow 3's graph has colours of its own.
    assert contrast(text, faded(background)) >= LEAST_CONTRAST
    assert contrast(in_dark_mode(text), in_dark_mode(faded(background))) >= LEAST_CONTRAST
    # The pictures of `airflow dags show`: black on the background, with a border in the text's colour.
    assert contrast((0, 0, 0), background) >= LEAST_CONTRAST
    assert contrast(text, background) >= LEAST_CONTRAST
