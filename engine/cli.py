"""The command `serac`: one function a verb, each calling into a module that is imported only then.

    serac serve | launch | generate | chat | top | status | restart | drain | plan | doctor | convert | replay
          certs | bench | demo | version

A mistake is answered in one line, `serac: error: FIELD: got X; expected Y`, with the exit code of its error. The
command line is the one place that sets XLA_FLAGS and JAX_PLATFORMS: it starts itself anew with them, and says so.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from engine import config, environment
from engine.config import suggestion
from engine.core.roles import ROLES
from engine.errors import ConfigError, SeracError
from engine.options import (
    Parser,
    add_client,
    add_drain,
    add_restart,
    add_settings,
    add_status,
    add_top,
    read_client,
    read_settings,
)

DISTRIBUTION = "serac"
VERSIONS = ("serac", "jax", "jaxlib", "flax", "orbax-checkpoint", "grpcio", "protobuf", "numpy")
PLANNED = (
    *("mesh", "lanes", "dtype", "kv_dtype", "max_model_len", "kv_memory", "block_size"),
    *("max_num_seqs", "max_num_batched_tokens", "numerics"),
)
EXAMINED = ("device", "compile_cache", "host", "port", "admin_host", "admin_port", "metrics_port")
INTERRUPTED = 130


class Verb(NamedTuple):
    """A subcommand. `run` gets its options and all arguments of the command; returns the exit code."""

    name: str
    help: str
    add: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def start_anew(settings: config.Settings, mesh: str = "") -> None:
    """Replace this process by one whose environment JAX will understand; returns when nothing is missing.

    mesh  of this process's own devices, where a lane has more
    """
    wanted = environment.needed(settings.device, mesh or settings.lanes or settings.mesh, os.environ)
    if wanted:
        words = " ".join(f"{name}={value}" for name, value in wanted.items())
        print(f"serac: set {words}", file=sys.stderr, flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def serve(options: argparse.Namespace) -> int:
    """Serve a model until it is drained."""
    settings = read_settings(options)
    if not settings.workers:
        start_anew(settings)
    if settings.download:
        fetch(settings.model)
    from engine import launch

    if settings.workers:
        from engine import front

        return launch.serve(settings, front.replica, version(), sys.stdout)
    from engine.replica import build

    return launch.serve(settings, build.replica, version(), sys.stdout)


def add_worker(parser: Parser) -> None:
    """The settings of a server, and which process of which lane this is."""
    add_settings(parser)
    parser.add_argument("--lane", required=True, metavar="NAME", help="name of the lane among the others")
    parser.add_argument("--role", choices=ROLES, default="both", help="what the lane is for (default %(default)s)")
    parser.add_argument("--rank", metavar="K", help="which process of the lane (default 0, which leads)")
    parser.add_argument("--processes", metavar="N", help="how many processes the lane has (default 1)")
    parser.add_argument("--devices", metavar="0,1,..", help="numbers of its devices on this host (default: all)")
    parser.add_argument("--lane-interface", default="127.0.0.1", metavar="ADDRESS",
                        help="of this host, where others of the lane reach it (default %(default)s)")  # fmt: skip
    parser.add_argument("--trusted-network", action="store_true", help="nobody else reaches that interface")
    parser.add_argument("--front", metavar="HOST:PORT", help="the front, where an engine started this process and "
                        "SERAC_CLUSTER_SECRET or SERAC_CLUSTER_SECRET_FILE holds the secret")  # fmt: skip
    parser.add_argument("--certs", type=Path, metavar="DIR", help="folder of this process's certificates")


def worker(options: argparse.Namespace) -> int:
    """Be one process of a lane for the front that started it."""
    settings = read_settings(options)
    from engine import hello

    words = {name: getattr(options, name) for name in ("lane", "rank", "processes", "devices", "lane_interface")}
    tp = environment.devices_of(settings.mesh)
    place = hello.place_of(words, options.role, tp, options.trusted_network)
    start_anew(settings, f"tp={tp // place.processes}")
    doors = hello.open_doors(place)
    from engine import starter
    from engine.movers import greeting
    from engine.movers.tls import Tls

    tls = None if options.certs is None else Tls(options.certs)
    if options.front is None:
        lines: starter.Lines = starter.Pipes(sys.stdin, sys.stdout)
    else:
        lines = starter.Visit(f"{place.lane}/{place.rank}", options.front, greeting.read_secret(os.environ), tls)
    kept = starter.Starter(lines)
    kept.say(**hello.hello(place, settings, doors))
    from engine import worker

    return worker.run(settings, place, doors, kept, tls)


def add_generate(parser: Parser) -> None:
    """A prompt and the client's options."""
    parser.add_argument("prompt", metavar="PROMPT", help="text, or - to read standard input")
    parser.add_argument("--json", action="store_true", help="write the whole answer as JSON")
    add_client(parser)


def generate(options: argparse.Namespace) -> int:
    """Ask a server to go on with a text."""
    from engine import talk

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with talk.connect(options.server, options.token_file, options.tls_ca) as client:
        return talk.generate(client, prompt, read_client(options), as_json=options.json, out=sys.stdout)


def add_chat(parser: Parser) -> None:
    """A system message and the client's options."""
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_client(parser)


def chat(options: argparse.Namespace) -> int:
    """Talk with a server, a line a turn."""
    from engine import talk

    with talk.connect(options.server, options.token_file, options.tls_ca) as client:
        return talk.chat(client, options.system, read_client(options), sys.stdin, sys.stdout)


def top(options: argparse.Namespace) -> int:
    """Watch what a running server does: a screen on a terminal, else a JSON line each second."""
    from engine import top
    from engine.clock import SystemClock

    with top.connect(options.server, options.token_file, options.tls_ca) as client:
        return top.run(client, SystemClock(), sys.stdout, options.once)


def status(options: argparse.Namespace) -> int:
    """Say what runs where: hosts, lanes, their processes; 0 where every lane is ready, else 1."""
    from engine import status, top

    with top.connect(options.server, options.token_file, options.tls_ca) as client:
        return status.run(client, options.json, sys.stdout)


def restart(options: argparse.Namespace) -> int:
    """Restart lanes one after another without dropping a stream: 0 when all are back."""
    from engine import restart, top

    with top.connect(options.server, options.token_file, options.tls_ca) as client:
        return restart.run(client, options.lanes, config.TIME.given("--drain", options.drain), sys.stdout)


def drain(options: argparse.Namespace) -> int:
    """End a server once its open streams have ended: 0 when none was cut off, else 1."""
    from engine import restart, top

    with top.connect(options.server, options.token_file, options.tls_ca) as client:
        return restart.drain(client, config.TIME.given("--timeout", options.timeout), sys.stdout)


def fetch(model: str) -> None:
    """Bring ORG/NAME from the hub into the local cache."""
    from engine.weights.hub import download
    from engine.weights.source import resolve

    resolve(model, download=download)


def add_plan(parser: Parser) -> None:
    """The settings that a plan depends on, and the device there would be."""
    add_settings(parser, PLANNED)
    parser.add_argument("--device", dest="there", default="cpu", metavar="NAME", help="h200, h100 (default cpu)")
    parser.add_argument("--memory-bytes", metavar="SIZE", help="memory of a device, instead of the named one's")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def plan(options: argparse.Namespace) -> int:
    """Say what a model takes on a mesh or on lanes, without a device."""
    settings = read_settings(options)
    memory_bytes = config.BYTES.given("--memory-bytes", options.memory_bytes)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts: no device takes part
    from engine import plan_lanes, plan_report

    report = plan_report.run if settings.lanes is None else plan_lanes.run
    return report(settings, options.there, memory_bytes, options.json, sys.stdout)


def add_doctor(parser: Parser) -> None:
    """Which hosts, and what they are meant to serve."""
    add_settings(parser, EXAMINED)
    parser.add_argument("--hosts", type=Path, metavar="FILE.toml", help="a cluster, as serac launch reads it")
    parser.add_argument("--processes", metavar="N", help="this machine as N processes of one lane (default 1)")
    parser.add_argument("--quick", action="store_true", help="leave out the model and the all-reduce")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def doctor(options: argparse.Namespace) -> int:
    """Check hosts before weights are loaded: 0 when lanes could start, 69 for a missing host, 2 for the rest."""
    from engine import doctor_report
    from engine.cluster import asked, reading

    settings = read_settings(options)
    if options.hosts is None:
        processes = config.whole(1, 64).given("--processes", options.processes or "1")
        hosts = asked.here(settings, processes, not options.quick)
    elif given := [name for name in ("model", "processes", *EXAMINED) if getattr(options, name, None) is not None]:
        raise ConfigError(f"{given[0]}: got it beside --hosts; expected it in that file", field=given[0])
    else:
        hosts = asked.over(reading.read(options.hosts), not options.quick)
    return doctor_report.run(hosts, options.json, sys.stdout)


def add_convert(parser: Parser) -> None:
    """The model and the artifact."""
    parser.add_argument("model", metavar="MODEL", help=config.ROWS["model"].help)
    parser.add_argument("out", metavar="OUT", type=Path, help="the artifact's folder, where nothing is yet")
    parser.add_argument("--allow-non-finite", action="store_true", help=config.ROWS["allow_non_finite"].help)
    parser.add_argument("--download", action="store_true", help=config.ROWS["download"].help)


def convert(options: argparse.Namespace) -> int:
    """Write a model as an Orbax artifact with digests, restored straight onto any mesh."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts: no device takes part
    from engine.progress import progress
    from engine.weights.convert import convert as write
    from engine.weights.source import resolve

    if options.download:
        fetch(options.model)
    source = resolve(options.model)
    with progress(sys.stderr) as bar:
        manifest = write(source, options.out, allow_non_finite=options.allow_non_finite,
                         progress=lambda done, of: bar.show("checking what was written", done, of))  # fmt: skip
    print(f"{options.out}: {len(manifest.tensors)} tensors, revision {manifest.revision}")
    return 0


def add_replay(parser: Parser) -> None:
    """The log, and what shall be other than it was."""
    parser.add_argument("log", metavar="FILE", type=Path, help="a lane's file in the folder of --plan-log")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="where the model is now; default: as logged")
    for name in ("mesh", "numerics", "device"):
        row = config.ROWS[name]
        default = "auto" if name == "device" else "as logged"
        parser.add_argument(row.flag, metavar=row.kind.metavar, help=f"{row.help} (default {default})")


def replay(options: argparse.Namespace) -> int:
    """Run the steps of a plan log again and compare their results; 0 where all are equal, else 1."""
    from engine.observe.plan_log import PlanLog

    log = PlanLog(options.log)
    given = {name: getattr(options, name) for name in ("model", "mesh", "numerics", "device")}
    logged = {name: getattr(log.header, name) for name in ("model", "mesh", "numerics", "dtype")}
    settings = config.settle(logged | {name: text for name, text in given.items() if text is not None}, {})
    start_anew(settings)
    from engine import replay_report

    return replay_report.run(log, settings, sys.stdout)


def add_certs(parser: Parser) -> None:
    """What to do in which folder, and for which hosts."""
    parser.add_argument("action", choices=("init", "show", "renew"), help="make all, say what is there, make anew")
    parser.add_argument("folder", metavar="DIR", type=Path, help="of the cluster's certificates")
    parser.add_argument("--cluster", default="serac", metavar="NAME", help="for init (default %(default)s)")
    parser.add_argument("--host", action="append", default=[], metavar="NAME=ADDRESS", help="for init: each host")


def certs(options: argparse.Namespace) -> int:
    """Make, show and renew the keys and certificates with which a cluster's processes know each other."""
    from engine.cluster import certs

    now = datetime.now(UTC)
    if options.action == "init":
        lines = certs.init(options.folder, options.cluster, options.host, now)
    else:
        lines = (certs.renew if options.action == "renew" else certs.show)(options.folder, now)
    print(*lines, sep="\n")
    return 0


def add_launch(parser: Parser) -> None:
    """The file, over what, and what is wanted of it."""
    from engine.cluster.places import OVER

    parser.add_argument(
        "file", metavar="FILE.toml", type=Path, help="hosts, lanes over them, front, security, serve"
    )
    parser.add_argument("--over", choices=OVER, default="auto", help="what starts processes (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run where, and start nothing")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write scripts or manifests there")
    parser.add_argument("--lane", metavar="NAME", help="become the rank of this lane that the environment says")
    parser.add_argument("--rank", metavar="N", help="with --lane: that rank")
    parser.add_argument("--front", metavar="HOST:PORT", help="with --lane: the front; default: as in the file")
    parser.add_argument("--front-only", action="store_true", help="the front, for lanes that others start")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="where lanes reach the front; default: as in the file"
    )
    parser.add_argument(
        "--log-dir", metavar="DIR", type=Path, help="logs of all processes; default: as in the file"
    )
    parser.add_argument("--python", default="python3", metavar="PATH", help="slurm: the interpreter on all nodes")
    parser.add_argument("--image", default="serac:latest", metavar="NAME", help="kubernetes: (default %(default)s)")
    parser.add_argument("--namespace", default="default", metavar="NAME", help="kubernetes: (default %(default)s)")
    parser.add_argument("--models", default="", metavar="CLAIM", help="kubernetes: a volume claim, seen at /models")
    parser.add_argument(
        "--ray-address", default="", metavar="ADDRESS", help="ray: default: RAY_ADDRESS, or a new one"
    )


def launch(options: argparse.Namespace) -> int:
    """Start a cluster from one file: over this machine, ssh, Slurm, Kubernetes or Ray."""
    from engine import launch_cluster

    return launch_cluster.run(options, version(), sys.stdout)


def bench(options: argparse.Namespace) -> int:
    """Run a measurement of the suite; the same as `python -m bench`."""
    return subprocess.call([sys.executable, "-m", "bench", *options.arguments])


def add_nothing(parser: Parser) -> None:
    """No options."""


def demo(options: argparse.Namespace) -> int:
    """Serve the embedded model and ask it."""
    from engine import demo

    return demo.run(sys.stdout)


def version(name: str = DISTRIBUTION) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def show_version(options: argparse.Namespace) -> int:
    """Versions of what matters, read without importing any of it."""
    for name in VERSIONS:
        print(f"{name} {version(name)}")
    print(f"python {sys.version.split()[0]}")
    return 0


VERBS = (
    Verb("serve", "serve a model over gRPC", add_settings, serve),
    Verb("launch", "start a cluster of hosts from one file", add_launch, launch),
    Verb("worker", "serve one lane for a front; started by serve --workers", add_worker, worker),
    Verb("generate", "ask a running server to go on with a text", add_generate, generate),
    Verb("chat", "talk with a running server", add_chat, chat),
    Verb("top", "watch what a running server does, lane by lane", add_top, top),
    Verb("status", "say what runs where, process by process", add_status, status),
    Verb("restart", "restart lanes one after another, without dropping a stream", add_restart, restart),
    Verb("drain", "end a server once its open streams have ended", add_drain, drain),
    Verb("plan", "say what a model takes on a mesh, without a device", add_plan, plan),
    Verb("doctor", "check hosts before weights are loaded", add_doctor, doctor),
    Verb("convert", "write a model as an Orbax artifact with digests", add_convert, convert),
    Verb("replay", "run a plan log again and compare its results", add_replay, replay),
    Verb("certs", "make and show the certificates of a cluster", add_certs, certs),
    Verb("bench", "measure: the same as python -m bench", add_nothing, bench),
    Verb("demo", "serve the embedded model on this machine and ask it", add_nothing, demo),
    Verb("version", "print versions", add_nothing, show_version),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return run(arguments)
    except SeracError as error:
        print(f"serac: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: Sequence[str]) -> int:
    """Find the verb, read its options, run it. Raises ConfigError."""
    verbs = {verb.name: verb for verb in VERBS}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        return show_version(argparse.Namespace())
    name = arguments[0]
    if name not in verbs:
        raise ConfigError(
            f"{name}: unknown command{suggestion(name, verbs) or '; see serac --help'}", field="command"
        )
    verb = verbs[name]
    if verb.run is bench:  # its options are those of the measurement
        return bench(argparse.Namespace(arguments=list(arguments[1:])))
    parser = Parser(prog=f"serac {name}", description=verb.run.__doc__)
    verb.add(parser)
    return verb.run(parser.read(arguments[1:]))


def usage() -> str:
    """The list of verbs."""
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS]
    return "\n".join(["usage: serac COMMAND [options]", "", *lines, "", "serac COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
