"""A kept memory that was damaged or forged: its owner is told in words, the engine lives, and others talk on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import save

from moshi_ttt.apps.talker import SHIPPED_MEMORY, load_talker
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.serving.memory_store import MemoryStore
from moshi_ttt.serving.server import ServerOptions

from .client import FRAME, site


def beyond_its_chunk(state):
    name = next(name for name in state.tensors if name.endswith("buffers.position"))
    return replace(state, tensors={**state.tensors, name: state.tensors[name] * 0 + 10**6}).to_bytes()


def without_a_tensor(state):
    return replace(state, tensors=dict(list(state.tensors.items())[1:])).to_bytes()


def of_a_number_as_model(state):
    header = {**json.loads(state.metadata()["header"]), "model": 5}
    return save(dict(state.tensors), {**state.metadata(), "header": json.dumps(header)})


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (beyond_its_chunk, "position is 1000000, and 0 to"),
        (without_a_tensor, "it lacks"),
        (of_a_number_as_model, "damaged"),
    ],
)
def test_a_forged_memory_is_refused_over_the_wire(tmp_path, forge, words):
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    with Slots(talker.model, talker.mimi, 2) as slots:

        async def work():
            async with site(slots, ServerOptions(store=MemoryStore(tmp_path))) as here:
                other = await (await here.extended()).started()
                client = await (await here.extended()).started()
                await client.say_slowly(np.zeros(3 * FRAME, np.float32))
                name = (await client.ask("save"))["memory"]["name"]
                (path,) = tmp_path.glob("*/*.safetensors")
                state = RowState.load(path)
                path.write_bytes(forge(state))
                answer = await client.ask("restore", name=name)
                assert (answer["type"], answer["of"]) == ("error", "restore")
                assert words in answer["message"]
                await client.say_slowly(np.zeros(3 * FRAME, np.float32))  # it talks on as before
                await other.say_slowly(np.zeros(3 * FRAME, np.float32))
                assert here.server.engine.alive
                assert other.ws.close_code is None
                assert client.ws.close_code is None

        asyncio.run(asyncio.wait_for(work(), 120))
