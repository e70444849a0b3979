"""A command to one worker reaches all workers at the same step."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.training.agreement import Agreement
from pipeline.training.run_channel import Command
from tests.training.common import free_port, start_ranks

TOLD = {1: (3, Command.SAVE), 0: (6, Command.STOP)}  # by rank: the step and the command


def _one_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    agreement, heard = Agreement(2), list[int]()
    step, what = TOLD[rank]
    while not heard or heard[-1] != Command.STOP:
        heard.append(agreement(what if len(heard) == step else Command.NOTHING))
    Path(folder, f"{rank}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_worker_hears_at_the_same_step_what_any_was_told(tmp_path: Path) -> None:
    start_ranks(_one_rank, (free_port(), str(tmp_path)), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == [0, 0, 0, 0, Command.SAVE, 0, 0, Command.STOP]


def test_a_worker_alone_hears_at_once() -> None:
    agreement = Agreement(1)
    assert [agreement(command) for command in (Command.NOTHING, Command.SAVE, Command.STOP)] == [
        Command.NOTHING,
        Command.SAVE,
        Command.STOP,
    ]
