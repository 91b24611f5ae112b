"""The offline door: `LLM(model, mesh=...).generate(prompts)`, the serving engine without its network.

    from engine.llm import LLM
    llm = LLM("embedded", mesh="tp=1")
    for completion in llm.generate(["def main("], max_tokens=32):
        print(completion.text)

Requests go through the same admission, scheduler, device programs and text assembly as a server's; all lanes are
turned by the calling thread.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.config import Settings
from engine.core.request import Request, Sampling, Stopping
from engine.errors import InvalidArgument, SeracError, wrong
from engine.replica.build import replica
from engine.replica.delta import TokenLogprob, Usage
from engine.replica.output import Output

IDLE_S = 0.0005
SAMPLING, STOPPING = Sampling.__dataclass_fields__, Stopping.__dataclass_fields__


@dataclass(slots=True)
class Completion:
    """One choice of one prompt, whole."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop: str | int | None = None
    usage: Usage | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    error: SeracError | None = None


class LLM:
    """A model on a mesh, used from one thread. `settings` are those of `serac serve`, by name."""

    def __init__(
        self, model: str = "embedded", *, progress: Callable[[str, int, int], None] = lambda *_: None, **settings
    ):
        given = {"max_wait": math.inf} | settings  # the caller waits for all of it
        self.replica = replica(Settings(model=model, **given), progress)
        self._ids = itertools.count()

    def generate(self, prompts: str | Sequence[str | Sequence[int]], **options) -> list[Completion]:
        """Complete each prompt (text or token ids); options are the fields of Sampling and Stopping.

        What is not given comes from the model's generation config. Returns `n` completions a prompt, in order.
        Raises InvalidArgument for the first prompt or option that cannot be served.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        text = self.replica.text
        ids = [text.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        return self._run([self._request(tokens, options) for tokens in ids])

    def chat(self, messages: Sequence[Mapping[str, str]], **options) -> list[Completion]:
        """Answer a conversation of {role, content} by the model's chat template."""
        tokens = self.replica.text.encode_chat([dict(message) for message in messages])
        return self._run([self._request(tokens, options)])

    def _request(self, tokens: Sequence[int], options: Mapping[str, object]) -> Request:
        given = dict(self.replica.info.defaults) | dict(options)
        sampling = {name: given.pop(name) for name in list(given) if name in SAMPLING}
        stopping = {name: given.pop(name) for name in list(given) if name in STOPPING}
        rest = {name: given.pop(name) for name in list(given) if name in ("salt", "adapter", "skip_special_tokens")}
        if given:
            raise InvalidArgument(wrong("option", sorted(given)[0], "a field of Sampling or Stopping"))
        for name in ("stop", "stop_token_ids"):
            if name in stopping:
                value = stopping[name]
                stopping[name] = (value,) if isinstance(value, str) else tuple(value)
        return Request(
            f"offline-{next(self._ids)}", tuple(tokens), Sampling(**sampling), Stopping(**stopping), **rest
        )

    def _run(self, requests: list[Request]) -> list[Completion]:
        outputs: list[Output] = []
        completions: dict[str, list[Completion]] = {}

        def take(output: Output) -> None:
            for delta in output.take():
                _add(completions[output.request.request_id][delta.index], delta)
            self.replica.taken(output)

        try:
            for request in requests:
                completions[request.request_id] = [Completion(k) for k in range(request.sampling.n)]
                outputs.append(self.replica.submit(request, take))
            while not all(output.done for output in outputs):
                if not any([lane.turn() for lane in self.replica.lanes]):
                    time.sleep(IDLE_S)  # blocks are on their way between lanes
        except BaseException:
            for output in outputs:
                self.replica.abort(output.request.request_id)
            for lane in self.replica.lanes:
                while lane.turn():
                    pass
            raise
        return [completion for request in requests for completion in completions[request.request_id]]


def _add(completion: Completion, delta) -> None:
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    completion.logprobs += delta.logprobs or []
    completion.prompt_logprobs += delta.prompt_logprobs or []
    if delta.finish is not None:
        completion.finish_reason, completion.stop = delta.finish.reason, delta.finish.stop
        completion.usage, completion.error = delta.finish.usage, delta.finish.error
