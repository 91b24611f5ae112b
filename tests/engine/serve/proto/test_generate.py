"""The checked-in code of serac.v1 is what its .proto files say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from engine.serve.proto import generate
from engine.serve.proto.serac.v1 import control_pb2, inference_pb2

NARROW = {getattr(FieldDescriptor, f"TYPE_{name}") for name in ("FLOAT", "INT32", "UINT32", "UINT64", "SINT32")}


def test_generating_again_changes_nothing(tmp_path):
    """Costs 10 s: it installs the pinned generator in an environment of its own."""
    try:
        python = generate.install(tmp_path / "tool")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{generate.TOOL} cannot be installed here: {error.stderr.decode()[-200:]}")
    made = generate.generate(python, tmp_path)
    checked_in = sorted((generate.HERE / generate.PACKAGE).glob("*_pb2.py*"))
    assert [path.name for path in made] == [path.name for path in checked_in] and len(made) == 4
    for new, old in zip(made, checked_in, strict=True):
        assert new.read_text() == old.read_text(), f"{old.name}: run python -m engine.serve.proto.generate"


def test_the_protocol_keeps_the_rules_of_buf():
    buf = shutil.which("buf") or shutil.which("buf", path=str(Path(sys.executable).parent))
    if buf is None:
        pytest.skip("needs buf: pip install buf-bin")
    done = subprocess.run([buf, "lint"], cwd=generate.HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_generated_code_imports_nothing_but_protobuf_and_ours():
    for path in (generate.HERE / generate.PACKAGE).glob("*_pb2.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert all("google.protobuf" in line or line.startswith(generate.OURS) for line in lines), lines


def test_numbers_that_clients_send_are_wide_enough_to_be_refused():
    """int32 would turn 2^63-1 into -1 on the way; float would change 0.1."""
    for name in ("Sampling", "Stopping", "TokenIds", "LogitBias", "DetokenizeRequest"):
        for field in inference_pb2.DESCRIPTOR.message_types_by_name[name].fields:
            assert field.type not in NARROW, field.full_name


def test_every_number_of_sampling_says_whether_it_was_set():
    fields = inference_pb2.Sampling.DESCRIPTOR.fields
    assert [field.name for field in fields if not field.has_presence] == ["logit_bias"]
    for kind, name in (
        (inference_pb2.Stopping, "max_tokens"),
        (inference_pb2.GenerateRequest, "skip_special_tokens"),
        (inference_pb2.GenerateRequest, "add_special_tokens"),
        (inference_pb2.Chat, "add_generation_prompt"),
        (inference_pb2.DetokenizeRequest, "skip_special_tokens"),
        (control_pb2.DrainRequest, "timeout_s"),
    ):
        assert kind.DESCRIPTOR.fields_by_name[name].has_presence
