"""Requests that a gateway gives to two replicas, one after the other: one computes the prompt, one decodes.

    to the first    {"do_remote_decode": true}     <-- complete without tokens, and what the second must show
    to the second   that, as it came

What is shown, and whether it is believed, is engine/replica/pairing.py.
"""

from __future__ import annotations

from engine.core.request import Request
from engine.replica.pairing import FIELD, parse
from engine.serve.vllm_engine.stubs import vllm_engine_pb2 as pb

__all__ = ("FIELD", "held", "holds")


def holds(text: str) -> bool:
    """Whether the prompt is wanted for another replica. Raises InvalidArgument for what is no JSON object."""
    return bool(text) and parse(text).get("do_remote_decode") is True


def held(request: Request, shown: str) -> pb.GenerateResponse:
    """The answer for a prompt that is held: no token is drawn where the prompt is computed."""
    tokens = len(request.prompt_ids)
    complete = pb.GenerateComplete(finish_reason="length", prompt_tokens=tokens, kv_transfer_params_json=shown)
    return pb.GenerateResponse(complete=complete)
