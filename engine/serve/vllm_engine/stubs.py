"""The published messages of the contract, of the extra `smg`: `pip install 'serac[smg]'`.

Everything else works without them; a server that shall speak the contract asks `check` first.
"""

try:
    from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2
except ImportError:
    common_pb2 = vllm_engine_pb2 = None

from engine.errors import ConfigError


def check() -> None:
    """Raises ConfigError where the messages are not installed."""
    if vllm_engine_pb2 is None:
        expected = "the extra 'smg': pip install 'serac[smg]'"
        raise ConfigError(f"worker_api: smg-grpc-proto is not installed; expected {expected}", field="worker_api")
