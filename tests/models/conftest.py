"""Real models need transformers, and a compiler."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "models":
            item.add_marker(pytest.mark.models)
            item.add_marker(pytest.mark.compiler)
