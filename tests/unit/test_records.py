"""What is saved says what it is."""

from __future__ import annotations

import pkgutil
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import pytest

from care_mla import records

MODULES = [import_module(f"care_mla.records.{module.name}") for module in pkgutil.iter_modules(records.__path__)]
RECORDS = [
    value
    for module in MODULES
    for value in vars(module).values()
    if is_dataclass(value) and value.__module__ == module.__name__
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_frozen_and_described(record: Any) -> None:
    assert record.__dataclass_params__.frozen
    _, found, attributes = record.__doc__.partition("Attributes:\n")
    named = {
        name.strip() for line in attributes.splitlines() if ": " in line for name in line.partition(": ")[0].split(",")
    }
    assert found and not {field.name for field in fields(record)} - named
