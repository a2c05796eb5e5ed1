"""torch's logs and traces, as fuse.torch_private and torch_fuse_logs name them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from torch._logging import _internal

import torch_fuse_logs
from fuse import torch_private as private


@pytest.fixture
def trace() -> Iterator[list[tuple[dict[str, object], str]]]:
    """What is written: its description and its text."""
    records: list[tuple[dict[str, object], str]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append((record.metadata, record.payload))  # type: ignore[attr-defined]

    handler, before = Handler(), list(_internal.trace_log.handlers)
    _internal.trace_log.handlers[:] = [handler]
    yield records
    _internal.trace_log.handlers[:] = before


def test_register_log_and_artifacts() -> None:
    torch_fuse_logs.register()
    assert _internal.log_registry.log_alias_to_log_qnames["fuse"] == ["fuse"]
    state = _internal._parse_log_settings("+fuse,fuse_sites,fuse_kernels")
    assert state.log_qname_to_level == {"fuse": logging.DEBUG} and state.artifact_names == set(torch_fuse_logs.ARTIFACTS)
    assert all(about in _internal.help_message() for about in torch_fuse_logs.ARTIFACTS.values())


def test_register_raises_nothing_where_torch_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_internal, "log_registry", None)
    torch_fuse_logs.register()


def test_artifact_logger() -> None:
    torch_fuse_logs.register()
    log = private.artifact_logger("fuse.tests", "fuse_sites")
    assert log.name == "fuse.tests.__fuse_sites" and not log.isEnabledFor(logging.DEBUG) and not log.propagate
    with pytest.raises(ValueError, match="not registered"):
        private.artifact_logger("fuse.tests", "no_such_artifact")


def test_is_traced(trace: list[tuple[dict[str, object], str]]) -> None:
    assert private.is_traced()
    _internal.trace_log.handlers.clear()
    assert not private.is_traced()


def test_trace_artifact(trace: list[tuple[dict[str, object], str]]) -> None:
    private.trace_artifact("fuse_sites", "json", lambda: json.dumps([1]))
    described, text = trace[-1]  # behind the strings of the stack, since nothing is being compiled
    assert described["artifact"] == {"name": "fuse_sites", "encoding": "json"} and described["has_payload"] and text == "[1]"
