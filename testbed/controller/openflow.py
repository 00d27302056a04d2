"""A change of a flow as OpenFlow 1.3 messages. To be imported once the framework is loaded, as `application` is."""

from __future__ import annotations

from typing import Any, Final

from testbed.controller import framework
from testbed.controller.routes import Change

fw = framework.loaded()
ofp, parser = fw.ofproto, fw.parser

COOKIE: Final = 0x6D6967726F73
"""Cookie ("migros") that marks our flow entries."""


def flow_mod(datapath: Any, command: int, match: Any, priority: int, actions: list[Any]) -> Any:
    """The message that adds or deletes one flow entry; `command` is one of OpenFlow's OFPFC_* values."""
    deletes = command in (ofp.OFPFC_DELETE, ofp.OFPFC_DELETE_STRICT)
    apply = [] if deletes else [parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, actions)]
    return parser.OFPFlowMod(
        datapath=datapath,
        cookie=0 if deletes else COOKIE,
        command=command,
        priority=priority,
        match=match,
        instructions=apply,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
    )


def messages(datapath: Any, change: Change) -> list[Any]:
    """The flow-mods of one change. A companion entry is added after its flow and deleted before it."""
    flow = change.flow
    rewrite = [parser.OFPActionSetField(eth_dst=flow.eth_dst)] if flow.eth_dst else []
    field, address = flow.match
    match = {"eth_type": 0x0800 if field == "ipv4_dst" else 0x86DD, field: address}
    onward = [*rewrite, parser.OFPActionOutput(flow.out_port)]
    back = [*rewrite, parser.OFPActionOutput(ofp.OFPP_IN_PORT)]
    entries = [
        (parser.OFPMatch(**match), flow.priority, onward),
        (parser.OFPMatch(in_port=flow.out_port, **match), flow.priority + 1, back),
    ]
    if change.action == "added":
        return [flow_mod(datapath, ofp.OFPFC_ADD, *entry) for entry in entries]
    return [flow_mod(datapath, ofp.OFPFC_DELETE_STRICT, *entry) for entry in reversed(entries)]
