"""Scripts for sbatch: a job for each lane, whose ranks srun starts as one group, and a job for the front.

    sbatch NAME-front.sh     serac launch FILE --front-only
    sbatch NAME-p0.sh        srun --kill-on-bad-exit=1 --distribution=arbitrary serac launch FILE --lane=p0
    a rank ends              srun ends the others, and the script starts all of them again on the same nodes
    too often                the script ends with 75: queued again where slurm.conf has RequeueExit=75

The hosts of a lane are named, so a job that is queued again gets the same nodes, half a minute later at best: hence
the script starts again by itself, and --requeue is for nodes that fail. srun orders ranks by its own list of nodes;
the arbitrary distribution takes that of SLURM_HOSTFILE, which is lane.hosts. Its exit code is the highest of all
ranks, and those it ended have a high one: so all but the final codes mean another start.
"""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.cluster.rules import check_for_others
from engine.cluster.topology import Topology
from engine.errors import ConfigError, Unavailable
from engine.lanes import LaneSpec

MOST_STARTS, STEADY_S = 6, 60  # in a row, of lives shorter than that: a script does not see when a lane serves
AGAIN = 75
FINAL = (0, 2, 78)  # drained, configuration, versions
MINUTE_S = 60

HEAD = """\
#!/bin/bash
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks={ntasks}
{more}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={job}-%j.log
#SBATCH --export=ALL
"""
ORDER = """\
export SLURM_HOSTFILE="$(mktemp)"
trap 'rm -f "$SLURM_HOSTFILE"' EXIT
printf '%s\\n' {hosts} > "$SLURM_HOSTFILE"
"""
LIFE = """\
starts=0
while :; do
  began=$SECONDS
  {run}
  code=$?
  case $code in {final}) exit $code ;; esac
  if [ $((SECONDS - began)) -gt {steady} ]; then starts=0; fi
  starts=$((starts + 1))
  if [ $starts -ge {most} ]; then
    echo "{job}: exit code $code; given up" >&2
    exit {again}
  fi
  echo "{job}: exit code $code; started again" >&2
  sleep $((1 << (starts - 1)))
done
"""


def scripts(topology: Topology, file: Path, python: str) -> dict[str, str]:
    """The text of each script by the name of its file. `file` is where every node reads the topology."""
    check(topology)
    made = {f"{topology.name}-front.sh": _front(topology, file, python)}
    return made | {
        f"{topology.name}-{lane.name}.sh": _lane(topology, lane, file, python) for lane in topology.lanes
    }


def check(topology: Topology) -> None:
    """Raise ConfigError for what jobs need and the topology leaves out."""
    check_for_others(topology)
    if nameless := [host.name for host in topology.hosts if not host.address]:
        raise ConfigError(f"address: host {nameless[0]} has none; expected that of its node", field="address")


def _front(topology: Topology, file: Path, python: str) -> str:
    job = f"{topology.name}-front"
    more = f"#SBATCH --nodelist={topology.front.on}\n" if topology.front.on else ""
    run = ["srun", "--ntasks=1", python, "-m", "engine.cli", "launch", str(file), "--front-only"]
    return HEAD.format(job=job, nodes=1, ntasks=1, more=more) + _life(job, run)


def _lane(topology: Topology, lane: LaneSpec, file: Path, python: str) -> str:
    job, nodes = f"{topology.name}-{lane.name}", list(dict.fromkeys(lane.hosts))
    most = max(lane.hosts.count(node) for node in nodes)
    more = f"#SBATCH --nodelist={','.join(nodes)}\n"
    if topology.serve.get("device") != "cpu":
        more += f"#SBATCH --gres=gpu:{lane.tp // len(lane.hosts) * most}\n"
    command = [python, "-m", "engine.cli", "launch", str(file), f"--lane={lane.name}"]
    run = ["srun", "--kill-on-bad-exit=1", "--distribution=arbitrary", f"--ntasks={len(lane.hosts)}", *command]
    head = HEAD.format(job=job, nodes=len(nodes), ntasks=len(lane.hosts), more=more)
    return head + ORDER.format(hosts=shlex.join(lane.hosts)) + _life(job, run)


def _life(job: str, run: Sequence[str]) -> str:
    final = "|".join(map(str, FINAL))
    return LIFE.format(job=job, run=shlex.join(run), final=final, steady=STEADY_S, most=MOST_STARTS, again=AGAIN)


def submit(made: Mapping[str, str]) -> dict[str, str]:
    """Hand the scripts to sbatch: the number of each job by its script. Raises ConfigError, Unavailable."""
    jobs = {}
    for name, text in made.items():
        try:
            done = subprocess.run(
                ["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=MINUTE_S
            )
        except FileNotFoundError:
            raise ConfigError("over: got slurm, and there is no sbatch on this machine", field="over") from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{name}: sbatch gave no answer within {MINUTE_S} s; is slurmctld up?") from None
        if done.returncode:
            raise Unavailable(f"{name}: sbatch refused it: {done.stderr.strip()[-200:]}")
        jobs[name] = done.stdout.strip().split(";")[0]
    return jobs
