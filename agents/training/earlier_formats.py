"""Readers of files that earlier versions wrote: settings and tables, as this version would have written them.

This is the only place that knows their formats, and the decoders of that time by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS_FORMAT = "specgym-settings-2"
TABLE_FORMAT = "specgym-table-1"
_DECODERS = {
    "specgym-settings-1": "threshold",
    "specgym-lookahead-settings-1": "lookahead",
    "specgym-medusa-settings-1": "medusa",
    "specgym-draft-tree-settings-1": "draft-tree",
}
_STOPPING, _TUNER = "specgym-stopping-settings-1", "specgym-tuner-settings-1"
_STOPPING_TABLE, _STOPPING_LIVE = "specgym-stopping-table-1", "specgym-stopping-live-1"


def current_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``settings.json``, whose `experiment` and `settings` are those of this version.

    Raises:
        ValueError: the content is of an unknown format.
    """
    known = content.get("format")
    if known == SETTINGS_FORMAT:
        return dict(content)
    settings = content.get("settings")
    if known not in (*_DECODERS, _STOPPING, _TUNER):
        raise ValueError(f"its format is {known!r}, not {SETTINGS_FORMAT!r}")
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be an object, got {settings!r}")
    settings = dict(settings)
    if known in _DECODERS:
        experiment, settings = "tune-knobs", _knob_settings(_DECODERS[known], settings)
    elif known == _TUNER:
        experiment = "tune-unseen"
        settings["decoder"] = "threshold"
        _rename(settings, tokens_per_prompt="max_new_tokens", traces="recordings")
        if "draft_length" in settings:
            settings["decoder_options"] = {"max_draft_length": settings.pop("draft_length")}
    else:
        experiment = "stop-drafts"
        _rename(settings, tokens="max_new_tokens", traces="recordings")
    return {**content, "format": SETTINGS_FORMAT, "experiment": experiment, "settings": settings}


def _knob_settings(decoder: str, settings: dict[str, Any]) -> dict[str, Any]:
    environment = dict(settings.get("environment", {}))
    _rename(environment, tokens_per_step="max_new_tokens")
    if "draft_length" in environment:
        environment["decoder_options"] = {"max_draft_length": environment.pop("draft_length")}
    if decoder == "threshold" and environment.get("backend") == "replay" and not settings.get("environments"):
        settings["environments"] = len(settings.get("workloads", ()))  # replays were one a workload
    evaluation = dict(settings.get("evaluation", {}))
    _rename(evaluation, tokens="max_new_tokens")
    if settings.pop("acceptance", "exact") == "typical":
        decoder = "medusa-typical"
    elif decoder == "medusa":
        settings.pop("max_divergence", None)
    return {**settings, "decoder": decoder, "environment": environment, "evaluation": evaluation}


def current_table(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a ``table.json`` or ``live.json`` with rows of this version.

    Raises:
        ValueError: the content is of an unknown format.
    """
    known, rows = content.get("format"), content.get("rows")
    if known not in (TABLE_FORMAT, _STOPPING_TABLE, _STOPPING_LIVE) or not isinstance(rows, list):
        raise ValueError(f"its format is {known!r}, not {TABLE_FORMAT!r}")
    if known == TABLE_FORMAT:
        return content
    try:
        several = len({row["batch_size"] for row in rows if row.get("batch_size")}) > 1
        current = [_stopping_row(dict(row), several) for row in rows]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from error
    return {"hardware": {}, "protocol": {}, "command": "", **content, "format": TABLE_FORMAT, "rows": current}


def _stopping_row(row: dict[str, Any], several: bool) -> dict[str, Any]:
    batch_size = row.pop("batch_size", 0)
    if row["workload"] == "all":
        row["workload"] = "all workloads"
    elif several:
        row["workload"] = f"{row['workload']} x {batch_size}"
    return {"knobs": {}, "intervals": {}, **row}


def _rename(settings: dict[str, Any], **names: str) -> None:
    for before, now in names.items():
        if before in settings:
            settings[now] = settings.pop(before)
