"""The valid part of a topology file, for the checks of what no schema can express.

A view is built from the raw data and leaves out what the models reject, so that problems between sections are reported
together with the models' errors.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from testbed.topology.models import App, Host, Link, Migration, Section

Model = TypeVar("Model", bound=Section)


def _salvage(model: type[Model], value: Any, **stand_ins: Any) -> Model | None:
    """`value` as a model without its invalid keys (`load` reports those); None if the rest is not a valid model.

    stand_ins: values for required keys, so that an invalid one does not hide problems with the other keys.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if not isinstance(value, dict):
            return None
        bad = {detail["loc"][0] for detail in error.errors() if detail["loc"]}
    try:
        return model.model_validate(stand_ins | {key: item for key, item in value.items() if key not in bad})
    except ValidationError:
        return None


@dataclass(slots=True)
class View:
    """The valid part of a topology. Entries of lists keep their indices in the file."""

    hosts: dict[str, Host] = field(default_factory=dict)
    switches: list[str] = field(default_factory=list)
    links: list[tuple[int, Link]] = field(default_factory=list)
    apps: dict[str, App] = field(default_factory=dict)
    migrations: list[tuple[int, Migration]] = field(default_factory=list)
    subnet: ipaddress.IPv4Network = field(default_factory=lambda: ipaddress.IPv4Network("10.0.0.0/16"))
    whole: bool = True
    """False if something was left out, in which case "h1 has no link" need not be true."""
    unreadable: set[str] = field(default_factory=set)
    """Names of apps that the file has but that could not be read; they must not be reported as unknown."""

    @classmethod
    def of(cls, data: dict[Any, Any]) -> View:
        """Build a view from raw YAML data of any shape."""
        view = cls()
        for name, value in _items(data.get("hosts")):
            view.hosts[name] = _salvage(Host, value) or Host()
        switches = data.get("switches")
        view.switches = [item for item in switches if isinstance(item, str)] if isinstance(switches, list) else []
        for index, value in _entries(data.get("links")):
            link = _salvage(Link, value)
            view.whole &= link is not None
            if link is not None:
                view.links.append((index, link))
        for name, value in _items(data.get("apps")):
            app = _salvage(App, value)
            if app is None:
                view.unreadable.add(name)
            else:
                view.apps[name] = app
        for index, value in _entries(data.get("migrations")):
            migration = _salvage(Migration, value, at="0s")
            if migration is not None:
                view.migrations.append((index, migration))
        try:
            view.subnet = ipaddress.IPv4Network(data.get("subnet", "10.0.0.0/16"))
        except ValueError:
            view.whole = False
        view.whole &= all(isinstance(data.get(key), kind) for key, kind in (("hosts", dict), ("switches", list)))
        return view


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    return ((key, item) for key, item in value.items() if isinstance(key, str)) if isinstance(value, dict) else iter(())


def _entries(value: Any) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(value)) if isinstance(value, list) else iter(())
