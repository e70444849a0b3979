import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.evaluation.distributed import ActorPool
from pipeline.evaluation.work import Partial, cut


@dataclass(frozen=True)
class Squares:
    """Squares its ids; the first process that meets id 5 is killed, and ids over 100 are refused."""

    killed: Path

    def start(self, device: torch.device) -> Callable[[np.ndarray], Partial]:
        def do(ids: np.ndarray) -> Partial:
            if 5 in ids and not self.killed.exists():
                self.killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if ids.max() > 100:
                raise InputError("an id over 100")
            return {"ids": ids, "squares": ids.astype(np.float64) ** 2}

        return do


def test_results_come_in_order_and_complete_when_an_actor_is_killed(cluster: None, tmp_path: Path) -> None:
    parts = list(ActorPool(2)(Squares(tmp_path / "killed"), cut(np.arange(23), 4)))
    assert (tmp_path / "killed").exists()
    assert [len(part["ids"]) for part in parts] == [4, 4, 4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([part["squares"] for part in parts]), np.arange(23) ** 2)


def test_bad_input_in_an_actor_is_bad_input_here(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^an id over 100$"):
        list(ActorPool(1)(Squares(tmp_path / "killed"), [np.array([200])]))
