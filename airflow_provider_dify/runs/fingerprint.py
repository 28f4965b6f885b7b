"""
A fingerprint of a run's inputs, by which a run of ours is recognised among those of a user.

It travels in a serialized trigger, so it holds hashes instead of values. It can't tell apart everything that
differs, and short values can be guessed from it: it is made against mistakes, not against an attacker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

# What Dify reads as true and false for a checkbox: 1.12.1 to 1.16.1, base_app_generator, _validate_inputs.
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
# Seen on Dify 1.12.1, 1.13.0, 1.14.2 and 1.16.1: whole numbers out of this range become floats.
_WHOLE = range(-(2**63), 2**64)


def fingerprint(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return 8 hexadecimal digits for the name of each input whose value is plain: text, number, true or false."""
    return {
        name: _digest(name, text)
        for name, value in inputs.items()
        # Dify drops these and puts its own entries of the same name into a run's inputs.
        if isinstance(name, str) and not name.startswith("sys.") and (text := _normalize(value)) is not None
    }


def fits(sent: Mapping[str, str], run_inputs: Mapping[str, Any]) -> bool | None:
    """
    Return whether a run may have been started with the inputs of a fingerprint; ``None`` if nothing can be compared.
    Only what both sides have is compared: Dify drops what the form doesn't know, adds defaults and ``sys.*`` entries,
    and turns blank numbers into ``null``.
    """
    found = fingerprint(run_inputs)
    common = sent.keys() & found.keys()
    return all(sent[name] == found[name] for name in common) if common else None


def _digest(name: str, text: str) -> str:
    # With the name in it, equal values of two inputs don't show as equal.
    return hashlib.sha256(f"{name}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _normalize(value: Any) -> str | None:
    """
    Return one text for all that Dify may make of a value, whatever the kind of its field; ``None`` if it isn't
    compared. Dify 1.12.1 to 1.16.1, ``base_app_generator``: a number field makes numbers of texts, a checkbox true and
    false of texts and numbers, and every field removes NUL characters.
    """
    if isinstance(value, str):
        value = value.replace("\0", "")
        word = value.strip().lower()
        if word in _TRUE | _FALSE:
            return "true" if word in _TRUE else "false"
        number = parse_number(value)
        if number is None:
            return f"text {value}"
        value = number
    if not isinstance(value, (int, float)):
        return None
    if value in (0, 1):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value in _WHOLE:
        return f"number {value}"
    try:
        return f"number {float(value)!r}" if math.isfinite(value) else None
    except OverflowError:
        return None


def parse_number(text: str) -> int | float | None:
    """Return what a text is for Dify's number fields, a ``float`` only with a point; ``None`` for no number."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return None
