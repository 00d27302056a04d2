"""The events of a run: one table of names and fields, for `events.jsonl` and the live view.

An event is a flat JSON object {"t": seconds since the start of the run, "event": name, …fields}, reported through
`RunFolder.event(name, field=value, …)`. A misspelt name or field is rejected at once, because the live view and every
later reader of events.jsonl rely on this table.
"""

from __future__ import annotations

EVENTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(required.split()), frozenset(optional.split()))
    for name, required, optional in [
        # name, required fields, optional fields
        ("run_started", "topology seed", ""),
        ("stage", "name", "detail"),  # see STAGES
        ("host_ready", "host", "ip node_ip"),
        ("nic_ready", "host", "device ip"),
        ("app_started", "app host", "pid command"),
        ("app_exited", "app host", "code signal"),
        ("app_moved", "app from_host to_host", ""),
        ("migration_started", "index app from_host to_host", ""),
        ("phase_started", "index phase", ""),
        ("phase_finished", "index phase ms", ""),
        ("migration_finished", "index ok", "rolled_back error blackout_ms partner_gap_ms"),
        ("flow_change", "switch action match", "out migration"),
        ("counters", "host counters", ""),  # counters: the NIC's flat dict of integers
        ("limit", "wanted got", "why"),
        ("problem", "where error", "blame hint"),
        ("note", "text", ""),
        ("run_finished", "ok", ""),
    ]
}

STAGES: dict[str, str] = {
    "prepare": "checking the machine",
    "network": "building hosts, switches and links",
    "controller": "learning the topology, installing paths",
    "nics": "starting a NIC on each host",
    "apps": "starting the applications",
    "running": "applications running",
    "collect": "fetching logs, counters and captures",
    "teardown": "removing everything that was created",
}
"""The stages of a run in order: name → description for the live view."""


def check(name: str, fields: dict[str, object]) -> None:
    """Raise ValueError unless `name` is an event, and `fields` has all that it requires and no unknown ones."""
    if name not in EVENTS:
        raise ValueError(f"unknown event {name!r}; allowed: {', '.join(EVENTS)}")
    required, optional = EVENTS[name]
    missing = required - fields.keys()
    unknown = fields.keys() - required - optional
    if missing or unknown:
        raise ValueError(f"event {name!r}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}")
