"""Streams on a real event loop, over a replica whose lanes run on threads."""

import asyncio

from engine.replica.streams import Streams


def run(life, main):
    async def whole():
        streams = Streams(life.replica)
        life.replica.start()
        try:
            return await asyncio.wait_for(main(streams), 60)
        finally:
            await asyncio.to_thread(life.replica.stop)

    return asyncio.run(whole())


def test_a_hundred_streams_at_once_each_end_once_with_their_own_tokens(life):
    async def one(streams, k):
        ids, ends = [], 0
        async for deltas in await streams.open(life.request(f"{k}", max_tokens=20, seed=k)):
            ids += [token for delta in deltas for token in delta.token_ids]
            ends += sum(delta.finish is not None for delta in deltas)
        return tuple(ids), ends

    async def main(streams):
        return await asyncio.gather(*(one(streams, k) for k in range(100)))

    results = run(life, main)
    assert all(len(ids) == 20 and ends == 1 for ids, ends in results) and len({ids for ids, _ in results}) == 100
    assert life.restored


def test_what_waits_is_taken_at_once(life):
    async def main(streams):
        stream = await streams.open(life.request(max_tokens=50))
        while not stream.output.ended:
            await asyncio.sleep(0.01)
        return [deltas async for deltas in stream]

    [deltas] = run(life, main)
    assert len(deltas) == 1 and len(deltas[0].token_ids) == 50 and deltas[0].finish.reason == "length"


def test_a_stream_that_is_left_frees_its_blocks(life):
    async def main(streams):
        stream = await streams.open(life.request(max_tokens=480))
        async for _ in stream:
            break
        stream.close()
        stream.close()
        while life.replica.load()["open_requests"] or not life.restored:
            await asyncio.sleep(0.01)

    run(life, main)
    assert life.restored
