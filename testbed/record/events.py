"""The events of a run: one table of names and fields, written to `events.jsonl` and followed by the live view.

An event is a flat JSON object {"t": seconds since the start of the run, "event": name, …fields}. Whoever runs the
topology reports through `RunFolder.event(name, field=value, …)`; a misspelt name or field is refused at once, because
the live view and every later reader of events.jsonl rely on this table.
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
    "prepare": "check the machine",
    "network": "build hosts, switches and links",
    "controller": "learn the topology, install paths",
    "nics": "start a NIC on each host",
    "apps": "start the applications",
    "running": "applications run",
    "collect": "fetch logs, counters and captures",
    "teardown": "remove everything that was created",
}
"""The stages of a run in order: name → what happens, as the live view says it."""


def check(name: str, fields: dict[str, object]) -> None:
    """Raise ValueError unless `name` is an event and `fields` are exactly those it may have."""
    if name not in EVENTS:
        raise ValueError(f"unknown event {name!r}; known: {', '.join(EVENTS)}")
    required, optional = EVENTS[name]
    missing = required - fields.keys()
    unknown = fields.keys() - required - optional
    if missing or unknown:
        raise ValueError(f"event {name!r}: missing {sorted(missing)}, unknown {sorted(unknown)}")
