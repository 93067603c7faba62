"""Checkpoints of several processes, by ``torch.distributed.checkpoint`` (DCP) and without a pickle in a file.

DCP's planners decide which process writes what: each shard once, also where several processes hold the same, and of
tensors that all have one each. They also find, when shards are to be read by other processes than wrote them, the
slices of the files that make them up. Writer and reader are our own, for safetensors files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from flowdistill.plumbing.errors import CheckpointError
from flowdistill.plumbing.files import opened_tensors
from flowdistill.runs.tensor_files import Part, Stored, write_files

Networks = Mapping[str, Mapping[str, Part]]


def save_parts(
    ready: Callable[[], Networks],
    place: Callable[[], AbstractContextManager[Path]],
    commit: Callable[[Path, dict[str, str]], None],
    group: dist.ProcessGroup,
) -> None:
    """Write what the processes of a group hold; all call it, and all have the error of any one.

    Args:
        ready: gives what this process holds of each network, or raises why it has nothing to write.
        place: enters the folder to write into, which has its name when it is left; called by the first process.
        commit: completes the folder, given the hashes of all files; called by the first process.
        group: of Gloo; its time-out is how much longer one process may write than another.

    Raises:
        CheckpointError: a process could not write; says which and why.
        RuntimeError: a process has ended, or has not answered in time.
    """
    with contextlib.ExitStack() as stack:
        writer = _Writer(place, commit, stack, dist.get_rank(group), dist.get_world_size(group))
        planner = _Planner(ready, writer)
        try:
            with _first_failure(dist.get_world_size(group)):
                save({}, storage_writer=writer, planner=planner, process_group=group)
        finally:  # what DCP keeps of the planner must not keep the tensors
            planner.state_dict = {}


def load_parts(stored: Mapping[str, Stored], targets: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, of DTensors what this process holds: it reads no more, and asks no other process.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    with warnings.catch_warnings(), _first_failure(1):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        load(dict(targets), storage_reader=_Reader(stored), planner=planner, no_dist=True)


@contextlib.contextmanager
def _first_failure(world: int) -> Iterator[None]:
    """Inside, DCP's exception, which is no Exception, is a CheckpointError with the failure of the first process."""
    try:
        yield
    except CheckpointException as error:
        rank = min(error.failures)
        failure = error.failures[rank][0]
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else failure
        where = f" (process {rank} of {world})" if world > 1 else ""
        raise CheckpointError(f"{reason}{where}") from failure


class _Planner(DefaultSavePlanner):
    """DCP's planner of a save, for parts in the memory of the host instead of DTensors."""

    def __init__(self, ready: Callable[[], Networks], writer: _Writer) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._ready, self._writer = ready, writer

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Take the parts, under the names NETWORK/TENSOR."""
        networks = self._ready()
        self._writer.networks = list(networks)
        parts = {f"{network}/{name}": part for network, own in networks.items() for name, part in own.items()}
        super().set_up_planner(parts, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """Plan to write each part that is not empty, and what is empty as a whole."""
        items = []
        for name, part in self.state_dict.items():
            if part.tensor.numel() or not math.prod(part.shape):
                chunk = ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)
                data = TensorWriteData(chunk, TensorProperties(dtype=part.tensor.dtype), torch.Size(part.shape))
                items.append(WriteItem(MetadataIndex(name, part.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The values of a part."""
        return self.state_dict[index.fqn].tensor


class _Writer(StorageWriter):
    """Writes a file of each network from each process."""

    def __init__(
        self,
        place: Callable[[], AbstractContextManager[Path]],
        commit: Callable[[Path, dict[str, str]], None],
        stack: contextlib.ExitStack,
        rank: int,
        world: int,
    ) -> None:
        self._place, self._commit, self._stack, self._rank, self._world = place, commit, stack, rank, world
        self.networks: list[str] = []
        self._folder = Path()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder, in the first process."""
        if is_coordinator:
            self._folder = self._stack.enter_context(self._place())

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell all processes the folder."""
        return [dataclasses.replace(plan, storage_data=str(self._folder)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts of a plan, each from its memory, and give the hashes of the files."""
        networks: dict[str, dict[str, Part]] = {network: {} for network in self.networks}
        for item in plan.items:
            network, _, name = item.index.fqn.partition("/")
            tensor: Any = planner.resolve_data(item)
            if item.tensor_data is not None and item.index.offset is not None:
                networks[network][name] = Part(tensor, tuple(item.index.offset), tuple(item.tensor_data.size))
        hashes = write_files(Path(plan.storage_data), networks, self._rank, self._world)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(MetadataIndex(file), 0, digest) for file, digest in hashes.items()])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the folder and give it its name, in the first process, after all have written."""
        self._commit(self._folder, {written.index.fqn: written.storage_data for own in results for written in own})
        self._stack.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No: DCP is given writers, and never chooses this one."""
        return False


class _Reader(StorageReader):
    """Reads slices of the tensors in safetensors files, which are mapped to memory."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe the parts in DCP's terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                        for offsets, (_, sizes) in tensor.parts.items()
                    ],
                )
                for name, tensor in self._stored.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the slices of a plan into their places, file by file."""
        in_files: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            path, _ = self._stored[item.storage_index.fqn].parts[tuple(item.storage_index.offset or ())]
            in_files.setdefault(path, []).append(item)
        for path, items in in_files.items():
            with opened_tensors(path) as file:
                for item in items:
                    begins = zip(item.storage_offsets, item.lengths, strict=True)
                    part = file.get_tensor(item.storage_index.fqn)[tuple(slice(i, i + n) for i, n in begins)]
                    target = planner.resolve_tensor(item).detach().copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No: DCP is given readers, and never chooses this one."""
        return False
