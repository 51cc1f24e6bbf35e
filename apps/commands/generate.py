"""``moshi-ttt generate``: play recordings to Moshi, and write what it answers."""

from __future__ import annotations

import typer

from moshi_ttt.apps.arguments import Threads
from moshi_ttt.apps.commands import generation_options as given
from moshi_ttt.apps.console import EXIT_FAILED, console, errors


def generate(
    recordings: given.Recordings,
    out: given.Out,
    config: given.Config = "quickstart",
    adapter: given.Adapter = None,
    seed: given.Seeds = None,
    temp: given.Temp = 0.8,
    temp_text: given.TempText = 0.7,
    top_k: given.TopK = 250,
    top_k_text: given.TopKText = 25,
    updates: given.Updates = True,
    volume: given.Volume = 1.0,
    memory_in: given.MemoryIn = None,
    memory_out: given.MemoryOut = None,
    stereo: given.Stereo = False,
    user_channel: given.UserChannelOption = "mean",
    inner_loss: given.InnerLoss = False,
    slots: given.SlotCount = None,
    overwrite: given.OverwriteAnswers = False,
    threads: Threads = None,
) -> None:
    """Play recordings to Moshi, and write its answers as sound and text.

    The sound has the recording's length, sample by sample. Each recording is a stream of its own. The same recording,
    options and number of slots give the same answer, whatever is answered at the same time.
    """
    from moshi_ttt.apps.generate.run import GenerateRequest, run
    from moshi_ttt.hosts.moshi.slots import SlotSettings

    seeds = tuple(seed or [0])
    settings = SlotSettings(
        seed=seeds[0], temperature=temp, text_temperature=temp_text, top_k=top_k, text_top_k=top_k_text,
        updates=updates, volume=volume,
    )  # fmt: skip
    request = GenerateRequest(
        recordings=tuple(recordings), out=out, config=config, adapter=adapter, seeds=seeds, settings=settings,
        memory_in=memory_in, memory_out=memory_out, stereo=stereo, user_channel=user_channel, inner_loss=inner_loss,
        slots=slots, overwrite=overwrite, threads=threads,
    )  # fmt: skip
    if problem := run(request, console()):
        errors().print(f"[bold red]Error:[/] {problem}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)
