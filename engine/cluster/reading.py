"""From a TOML file, or the `--lanes` of serve, to a cluster; every mistake with its place in the file.

    [cluster] name, autotune          [[lane]] name, role, mesh, hosts, devices_per_host
    [[host]] name, address, devices   [front]  [security]  [serve] settings of engine/config.py

The keys of a table are the fields of its dataclass in topology.py. tomllib keeps no places, so the text is searched
for the table and the key; what is written in another style than [[tables]] is placed at its first mention.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from engine.cluster.rules import Where, mistakes
from engine.cluster.topology import FRONT_SETTINGS, LOCAL, LOOPBACK, FrontPlace, Host, Security, Topology
from engine.config import PATH, ROWS, TEXT, Kind, Value, one_of, suggestion, toml_place, whole
from engine.core.roles import ROLES
from engine.errors import ConfigError, wrong
from engine.lanes import LaneSpec, parse_lanes

TABLES = ("cluster", "host", "lane", "front", "security", "serve")
MOST_DEVICES = 1024
PLACED_ELSEWHERE = {"lanes": "[[lane]]", "mesh": "[[lane]]", "workers": "[[lane]]"} | dict.fromkeys(
    FRONT_SETTINGS, "[front]"
)
MESH = Kind(lambda text: _mesh(text), "tp=N, or N, a number of devices", "tp=N")
COUNT = whole(1, MOST_DEVICES)
CLUSTER: Mapping[str, Kind] = {"name": TEXT, "autotune": PATH}
LANE: Mapping[str, Kind] = {"name": TEXT, "role": one_of(*ROLES), "mesh": MESH, "devices_per_host": COUNT}
NEEDED = {"host": ("name", "devices"), "lane": ("name", "role", "mesh", "hosts")}

Made = TypeVar("Made", Host, FrontPlace, Security)


def read(path: Path) -> Topology:
    """The cluster of a file. Raises ConfigError with file:line:column."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(wrong("file", str(path), f"a readable file ({error.strerror})"), field="file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: got bytes that are not UTF-8; expected UTF-8 text", field="file") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Topology:
    """The cluster that the text of a file `name` describes. Raises ConfigError with name:line:column."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}:{toml_place(str(error), text)}") from None
    return _File(name, text).topology(tables)


def of_lanes(text: str, serve: Mapping[str, Value] | None = None, devices: tuple[int, ...] = ()) -> Topology:
    """The cluster that `--lanes` of serve means: all of it on this machine. Raises ConfigError.

    devices  numbers of those to take, where there are enough; else from 0 on
    """
    lanes = parse_lanes(text)
    wanted = sum(lane.tp for lane in lanes)
    here = Host(LOCAL, LOOPBACK, devices if len(devices) >= wanted else tuple(range(wanted)))
    made = Topology((here,), lanes, serve=dict(serve or {}))
    for _, mistake in mistakes(made):
        raise ConfigError(f"lanes: {mistake}", field="lanes")
    return made


class _File(NamedTuple):
    """A text and what it is called, to say where in it a mistake stands."""

    name: str
    text: str

    def topology(self, tables: Mapping[str, object]) -> Topology:
        """All tables, read and held against the rules."""
        for table in tables:
            if table not in TABLES:
                self.refuse((table, 0, ""), f"{table}: unknown table{suggestion(table, TABLES)}", table)
        cluster = self.values(("cluster", 0, ""), self.table(tables, "cluster"), CLUSTER)
        hosts = [self.host(index, table) for index, table in enumerate(self.array(tables, "host"))]
        lanes = [self.lane(index, table) for index, table in enumerate(self.array(tables, "lane"))]
        made = Topology(
            tuple(hosts),
            tuple(lanes),
            name=str(cluster.get("name", "serac")),
            front=FrontPlace(**self.values(("front", 0, ""), self.table(tables, "front"), _kinds(FrontPlace))),
            security=Security(**self.values(("security", 0, ""), self.table(tables, "security"), _kinds(Security))),
            serve=self.serve(self.table(tables, "serve")),
            autotune=cluster.get("autotune"),
        )
        for where, mistake in mistakes(made):
            self.refuse(where, mistake, where[2] or where[0])
        return made

    def table(self, tables: Mapping[str, object], name: str) -> Mapping[str, object]:
        """`[name]`, empty where it is left out."""
        found = tables.get(name, {})
        if not isinstance(found, dict):
            self.refuse((name, 0, ""), wrong(name, found, f"one table [{name}]"), name)
        return found

    def array(self, tables: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
        """Every `[[name]]`."""
        found = tables.get(name, [])
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            self.refuse((name, 0, ""), f"{name}: got a single table or value; expected tables [[{name}]]", name)
        for index, table in enumerate(found):
            for key in NEEDED[name]:
                if key not in table:
                    self.refuse((name, index, ""), f"{key}: got none; expected it in each [[{name}]]", key)
        return found

    def values(self, where: Where, table: Mapping[str, object], kinds: Mapping[str, Kind]) -> dict:
        """The keys of a table, read by their kinds."""
        return {key: self.value((*where[:2], key), value, kinds) for key, value in table.items()}

    def value(self, where: Where, value: object, kinds: Mapping[str, Kind]) -> Value:
        """One key, read by its kind."""
        key = where[2]
        if key not in kinds:
            self.refuse(where, f"{key}: unknown key of {where[0]}{suggestion(key, kinds)}", key)
        if isinstance(value, (dict, list)):
            self.refuse(where, f"{key}: got a {type(value).__name__}; expected {kinds[key].expected}", key)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return kinds[key].given(f"{self.place(where)}: {key}", text)

    def host(self, index: int, table: Mapping[str, object]) -> Host:
        """One [[host]]; its devices are a count or a list of numbers."""
        where, found = ("host", index, "devices"), table["devices"]
        rest = {key: value for key, value in table.items() if key != "devices"}
        if isinstance(found, int) and not isinstance(found, bool) and 0 < found <= MOST_DEVICES:
            devices = tuple(range(found))
        elif isinstance(found, list) and found and all(type(each) is int for each in found):
            devices = tuple(found)
        else:
            self.refuse(
                where, wrong("devices", found, f"a count in 1..{MOST_DEVICES} or a list of numbers"), "devices"
            )
        return Host(devices=devices, **self.values(("host", index, ""), rest, _kinds(Host, "devices")))

    def lane(self, index: int, table: Mapping[str, object]) -> LaneSpec:
        """One [[lane]]; devices_per_host may be left out, and must fit the mesh where it is given."""
        hosts = table["hosts"]
        if not isinstance(hosts, list) or not all(isinstance(each, str) for each in hosts):
            self.refuse(("lane", index, "hosts"), wrong("hosts", hosts, "a list of names of hosts"), "hosts")
        rest = {key: value for key, value in table.items() if key != "hosts"}
        found = self.values(("lane", index, ""), rest, LANE | {"hosts": TEXT})
        each, tp = found.get("devices_per_host"), found["mesh"]
        if each is not None and each * len(hosts) != tp:
            words = f"devices_per_host: got {each} on {len(hosts)} hosts; expected {tp} together, as mesh says"
            self.refuse(("lane", index, "devices_per_host"), words, "devices_per_host")
        return LaneSpec(found["name"], found["role"], tp, tuple(hosts))

    def serve(self, table: Mapping[str, object]) -> dict[str, Value]:
        """Settings of serve, without those that other tables hold."""
        for key in table:
            if key in PLACED_ELSEWHERE:
                self.refuse(("serve", 0, key), f"{key}: got it in [serve]; expected {PLACED_ELSEWHERE[key]}", key)
        return self.values(("serve", 0, ""), table, {name: each.kind for name, each in ROWS.items()})

    def refuse(self, where: Where, words: str, field: str) -> NoReturn:
        """Raise ConfigError with the place."""
        raise ConfigError(f"{self.place(where)}: {words}", field=field)

    def place(self, where: Where) -> str:
        """`name:line:column` of a key, else of its table, else of the first mention, else of the start."""
        table, index, key = where
        start = end = 0
        heads = list(re.finditer(rf"^[ \t]*\[+[ \t]*({re.escape(table)})[ \t]*\]", self.text, re.MULTILINE))
        if index < len(heads):
            start = heads[index].start(1)
            after = re.compile(r"^[ \t]*\[+[^\]\n]+\]+[ \t]*(#.*)?$", re.MULTILINE).search(
                self.text, heads[index].end()
            )
            end = after.start() if after else len(self.text)
        key_at = re.compile(rf"^[ \t]*[\"']?({re.escape(key or table)})\b[\"']?[ \t]*[.=]", re.MULTILINE)
        if found := key_at.search(self.text, start, end or len(self.text)):
            start = found.start(1)
        line, column = self.text.count("\n", 0, start) + 1, start - self.text.rfind("\n", 0, start)
        return f"{self.name}:{line}:{column}"


def _mesh(text: str) -> int:
    match = re.fullmatch(r"(?:tp\s*=\s*)?(\d{1,4})", text, re.ASCII)
    if match is None or int(match[1]) < 1:
        raise ValueError(text)
    return int(match[1])


def _kinds(kind: type[Made], *without: str) -> dict[str, Kind]:
    return {each.name: each.metadata["kind"] for each in fields(kind) if each.name not in without}
