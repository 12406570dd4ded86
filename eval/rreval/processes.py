"""The processes of one run, as `accelerate launch` or torchrun start them: on one machine, or on several."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from rrvideo.errors import RRVideoError

__all__ = ["Processes", "launched_for_cpu"]

# Where torchrun and accelerate, and where MPI programs, say how many processes there are.
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PATIENCE = timedelta(days=30)  # the first to end waits for the last one, which may still have hours to go

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of the `count` processes of a run this one is, and which of those on its machine; alone it is the first."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Meet the processes that were launched together with this one."""
        if max(int(os.environ.get(name) or 1) for name in COUNTS) == 1:
            return cls()
        from accelerate import PartialState

        # They only tell each other who does what: that needs no GPU, on which a wait would be work.
        state = PartialState(cpu=True, timeout=PATIENCE)
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # by now it is there, whoever has started this
        return cls(state.process_index, state.num_processes, state.local_process_index, local_count)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str:
        """The device of this process, as `VideoQA.load` takes it."""
        import torch

        if self.count == 1 or not torch.cuda.is_available():
            return "auto"
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process. Where it raises `RRVideoError` there, the others end in silence."""
        outcome: list[T | None] = [None]
        failure: RRVideoError | None = None
        if self.is_first:
            try:
                outcome = [work()]
            except RRVideoError as error:
                failure = error
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            outcome, failed = broadcast_object_list([outcome, failure is not None])
            if failed and failure is None:
                raise SystemExit(1)
        if failure is not None:
            raise failure
        return outcome[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until all have come this far."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def leave(self) -> None:
        """Part: nothing can be told to the others any more."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


def launched_for_cpu() -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes: it then names a place for them to meet."""
    return os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
