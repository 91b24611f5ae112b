"""Every file that the pages show is one that can be launched over what it is shown for."""

import re
from pathlib import Path

import pytest

from engine.cluster import kubernetes, places, slurm
from engine.cluster.ray import groups
from engine.cluster.reading import parse
from engine.cluster.topology import placed

FOLDER = Path(places.__file__).parent
LINKED = re.findall(r"\]\((\w+\.md)\)", (FOLDER / "README.md").read_text())
FILES = {}
for name in LINKED:
    FILES |= re.findall(r"# ([^\n]+)\n.*?```toml\n(.*?)```", (FOLDER / name).read_text(), re.DOTALL)


def test_a_page_shows_a_file_for_everything_that_starts_processes():
    assert list(FILES) == ["One machine with 8 GPUs", "Two machines over ssh", "Slurm", "Kubernetes", "Ray"]
    assert sorted(LINKED) == sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("title", FILES)
def test_a_file_of_a_page_can_be_launched(title):
    text = FILES[title]
    made = parse(text, title)
    assert sum(len(each.devices) for each in placed(made)) == (8 if title.startswith("One") else 16)
    if title == "Slurm":
        assert len(slurm.scripts(made, Path("x.toml"), "python3")) == 2
    elif title == "Kubernetes":
        assert kubernetes.manifests(made, text, kubernetes.Place("x"))
    elif title == "Ray":
        assert [group.strategy for group in groups(made)] == ["STRICT_SPREAD"]
    else:
        assert places.chosen(made, "auto") == ("local" if title.startswith("One") else "ssh")
        assert places.commands(made, places.chosen(made, "auto"), places.assumed(made))
