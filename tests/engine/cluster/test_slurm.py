"""The scripts for sbatch: what they ask for, in whose order ranks run, and which ends are queued again."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cluster.reading import parse
from engine.cluster.slurm import scripts, submit
from engine.errors import ConfigError, Unavailable
from tests.hosts import slurm as harness

ROOT = Path(__file__).parents[3]
FILE = """\
[cluster]
name = "pair"
[[host]]
name = "n2"
address = "10.0.0.2"
devices = 8
[[host]]
name = "n1"
address = "10.0.0.1"
devices = 8
[[lane]]
name = "p0"
role = "prefill"
mesh = 8
hosts = ["n2", "n1"]
[[lane]]
name = "d1"
role = "decode"
mesh = 4
hosts = ["n1", "n1"]
[front]
address = "10.0.0.1:50053"
on = "n1"
[security]
certs = "/c"
secret_file = "/shared/secret"
trusted_network = true
"""


def made(text=FILE, python="/opt/py thon"):
    return scripts(parse(text, "x.toml"), Path("/shared/x.toml"), python)


def asked(text):
    return dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )


def test_a_job_asks_for_the_nodes_and_devices_of_its_lane():
    texts = made()
    assert list(texts) == ["pair-front.sh", "pair-p0.sh", "pair-d1.sh"]
    front, p0, d1 = map(asked, texts.values())
    assert (p0["nodes"], p0["ntasks"], p0["nodelist"], p0["gres"]) == ("2", "2", "n2,n1", "gpu:4")
    assert (d1["nodes"], d1["ntasks"], d1["nodelist"], d1["gres"]) == ("1", "2", "n1", "gpu:4")
    assert front["nodelist"] == "n1" and "gres" not in front and all("requeue" in each for each in (front, p0, d1))
    assert "gres" not in asked(made(FILE + '[serve]\ndevice = "cpu"\n')["pair-p0.sh"])


def test_every_script_is_one_that_bash_reads():
    for text in made().values():
        assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=10).stderr == ""


SRUN = """\
#!/bin/sh
for word in "$@"; do echo "$word" >> {folder}/called; done
echo again >> {folder}/starts
cat "$SLURM_HOSTFILE"
exit $(sed -n "$(grep -c . {folder}/starts)p" {folder}/codes)
"""


def run(folder, text, codes):
    """Run a script with an srun that ends by these codes, one a start: (exit code, words of the call, output)."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "srun").write_text(SRUN.format(folder=folder))
    (folder / "sleep").write_text(f'#!/bin/sh\necho "$1" >> {folder}/waits\n')
    for name in ("srun", "sleep"):
        (folder / name).chmod(stat.S_IRWXU)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, timeout=10, env=environment)
    return done.returncode, (folder / "called").read_text().splitlines(), done.stdout.split()


def test_ranks_run_in_the_order_of_the_hosts_as_one_group(tmp_path):
    code, called, order = run(tmp_path, made()["pair-p0.sh"], [0])
    assert (code, order) == (0, ["n2", "n1"])
    assert called == [
        *("--kill-on-bad-exit=1", "--distribution=arbitrary", "--ntasks=2", "/opt/py thon", "-m", "engine.cli"),
        *("launch", "/shared/x.toml", "--lane=p0"),
    ]


@pytest.mark.parametrize(
    ("codes", "end", "waits"),
    [
        ([0], 0, []),
        ([2], 2, []),
        ([78], 78, []),
        ([75, 0], 0, [1]),
        ([137, 143, 2], 2, [1, 2]),
        ([75, 75, 75, 75, 75, 75], 75, [1, 2, 4, 8, 16]),
    ],
)
def test_an_end_that_another_start_may_mend_is_followed_by_one_a_few_times(tmp_path, codes, end, waits):
    code, _, order = run(tmp_path, made()["pair-d1.sh"], codes)
    assert code == end and order == ["n1", "n1"] * len(codes)
    found = tmp_path / "waits"
    assert [int(line) for line in found.read_text().split()] == waits if waits else not found.exists()


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (
            'secret_file = "/shared/secret"',
            "",
            "secret_file: got none in \\[security\\]; expected a file that every",
        ),
        ("10.0.0.1:50053", "10.0.0.1:0", "address: got no port in \\[front\\]; expected one, where lanes find"),
        ('address = "10.0.0.2"', "", "address: host n2 has none; expected that of its node"),
    ],
)
def test_what_jobs_cannot_do_without_is_named(was, now, words):
    with pytest.raises(ConfigError, match=words):
        made(FILE.replace(was, now, 1))


def test_without_slurm_a_start_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        submit({"a.sh": ""})
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(stat.S_IRWXU)
    with pytest.raises(Unavailable, match="a.sh: sbatch refused it: sbatch: error: invalid partition"):
        submit({"a.sh": ""})


TOY = """\
#!{python}
# In the place of a worker: runs `serac launch --lane` for real, and says what it would become.
import json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from engine.cluster.become import become
from engine.cluster.reading import read
made = become(read(Path(sys.argv[4])), sys.argv[5].partition("=")[2], os.environ)
life = os.environ["SLURM_STEP_ID"]
with open({lives!r}, "a") as out:
    print(json.dumps([life, list(made.arguments)]), file=out)
if life == "0":
    if os.environ["SLURM_PROCID"] == "1":
        time.sleep(1)
        sys.exit(75)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_real_slurm_starts_a_group_ends_it_as_one_and_starts_it_again(tmp_path):
    """Costs 10 s: two ranks on one node; one asks for a new start, the other hangs, and both live again."""
    if reason := harness.why_not():
        pytest.skip(reason)
    toy, lives = tmp_path / "toy", tmp_path / "lives"
    toy.write_text(TOY.format(python=sys.executable, root=str(ROOT), lives=str(lives)))
    toy.chmod(stat.S_IRWXU)
    text = (
        FILE.replace("devices = 8", "devices = 12")
        .replace('"n2", "n1"', '"n0", "n0"')
        .replace('"n1"', '"n0"')
        .replace('"n2"', '"n9"')
    )
    file = tmp_path / "x.toml"
    file.write_text(text + '[serve]\ndevice = "cpu"\n')
    script = scripts(parse(file.read_text(), "x.toml"), file, str(toy))["pair-p0.sh"]
    with harness.Slurm(tmp_path) as slurm:
        job = shutil.which("sbatch", path=slurm.environment["PATH"])
        assert slurm.run([job, "--parsable"], input=script).stdout.strip().isdecimal()
        until = time.monotonic() + 90
        while not lives.exists() or len(lives.read_text().splitlines()) < 4:
            assert time.monotonic() < until, [path.read_text() for path in tmp_path.glob("pair-*.log")]
            time.sleep(0.2)
    found = [line.split('"')[1] for line in lives.read_text().splitlines()]
    assert found == ["0", "0", "1", "1"], "both ranks lived twice: the one that asked, and the one that hung"
    assert [f"--rank={rank}" in lives.read_text() for rank in (0, 1, 2)] == [True, True, False]
