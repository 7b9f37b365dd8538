"""The peers. Each runs as its documentation says, and with its quicker settings where it offers some (threads, kept buffers).

Those that do not fsync get it from here, as part of the time until durable: torch.save, safetensors, torch_checkpointing and
torchsnapshot leave it to the kernel when the bytes reach the disk.
"""

# mypy: disable-error-code="import-not-found,import-untyped,attr-defined"
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from contestants import DONE, Contestant, Holdfast, Pending, RawFile
from states import State, named_tensors

__all__ = ["make"]


class _Background:
    """A save that somebody else finishes. `gate` returns when the optimizer may write."""

    def __init__(self, durable: Future[Any], gate: Callable[[], object] = lambda: None) -> None:
        self._durable, self._gate = durable, gate

    def gate(self) -> None:
        self._gate()

    def done(self) -> bool:
        return self._durable.done()

    def wait(self) -> None:
        self._durable.result()


def fsync_all(path: Path) -> None:
    """Every file at or below `path`."""
    for file in [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_after(written: Callable[[], object], path: Path) -> None:
    """The rest of a save whose library does not fsync."""
    written()
    fsync_all(path)


def load_tree(target: State, tree: Mapping[str, Any]) -> None:
    target.model.load_state_dict(tree["model"])
    target.optimizer.load_state_dict(tree["optimizer"])


class TorchSave(Contestant):
    name = "torch.save"

    def save(self, state: State) -> Pending:
        torch.save(state.tree(), self.next_path())
        fsync_all(self.path)
        return DONE

    def restore(self, target: State) -> None:
        load_tree(target, torch.load(self.path, weights_only=True))


class TorchMmap(TorchSave):
    """Restores lazily: pages of the optimizer's state are read when they are first used, and stay tied to the file."""

    name = "torch.load(mmap)"

    def restore(self, target: State) -> None:
        load_tree(target, torch.load(self.path, weights_only=True, mmap=True))


class Safetensors(Contestant):
    name = "safetensors"

    def save(self, state: State) -> Pending:
        from safetensors.torch import save_file

        tree = state.tree()
        groups = json.dumps(tree["optimizer"]["param_groups"])
        save_file(named_tensors(tree), self.next_path(), metadata={"param_groups": groups})
        fsync_all(self.path)
        return DONE

    def restore(self, target: State) -> None:
        from safetensors import safe_open

        tree: dict[str, Any] = {"model": {}, "optimizer": {"state": {}, "param_groups": []}}
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                kind, _, rest = name.partition(".")
                if kind == "model":
                    tree["model"][rest] = file.get_tensor(name)
                else:
                    _, number, key = rest.split(".")
                    tree["optimizer"]["state"].setdefault(int(number), {})[key] = file.get_tensor(name)
            tree["optimizer"]["param_groups"] = json.loads(file.metadata()["param_groups"])
        load_tree(target, tree)


class Dcp(Contestant):
    """`torch.distributed.checkpoint.save` with as many threads as CPUs."""

    name = "DCP save"
    restores_into_moments = True

    def _writer(self) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.FileSystemWriter(self.next_path(), thread_count=os.cpu_count() or 1)

    def save(self, state: State) -> Pending:
        import torch.distributed.checkpoint as dcp

        dcp.save(state.tree(), storage_writer=self._writer())
        return DONE

    def restore(self, target: State) -> None:
        import torch.distributed.checkpoint as dcp

        tree = target.tree()
        dcp.load(tree, checkpoint_id=self.path)
        load_tree(target, tree)


class DcpAsync(Dcp):
    """`async_save` as its documentation shows it: a default stager for each save, one writing thread."""

    name = "DCP async_save"

    def save(self, state: State) -> Pending:
        import torch.distributed.checkpoint as dcp

        durable: Any = dcp.async_save(state.tree(), checkpoint_id=self.next_path())
        return _Background(durable)


class DcpStaged(Dcp):
    """`async_save` at its best: a stager that is kept, staging beside the loop, and the wait that makes this safe."""

    name = "DCP async_save, async staging"

    def begin(self, state: State) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(StagingOptions(False, False, True, False))

    def save(self, state: State) -> Pending:
        import torch.distributed.checkpoint as dcp

        response: Any = dcp.async_save(state.tree(), storage_writer=self._writer(), async_stager=self._stager)
        return _Background(response.upload_completion, response.staging_completion.result)

    def close(self) -> None:
        self._stager.close()


class TorchCheckpointing(Contestant):
    """Asynchronous, its writer in a process of its own. Its direct I/O, on by default, fails on ext4 (unaligned writes): off."""

    name = "torch_checkpointing"
    restores_into_moments = True

    def begin(self, state: State) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._fsync = ThreadPoolExecutor(1)

    def save(self, state: State) -> Pending:
        path = self.next_path()
        written: Future[Any] = self._manager.save(str(path), state.tree())
        durable = self._fsync.submit(fsync_after, written.result, path)
        return _Background(durable, self._wait_until_staged)

    def _wait_until_staged(self) -> None:
        with self._manager.lock():
            pass

    def restore(self, target: State) -> None:
        load_tree(target, self._manager.load(str(self.path), into=target.tree()))

    def close(self) -> None:
        self._fsync.shutdown()
        self._manager.close()


class TorchSnapshot(Contestant):
    name = "torchsnapshot"
    restores_into_moments = True

    def begin(self, state: State) -> None:
        import torch.distributed as dist

        # It talks to itself through a store; the one of a process group of one spares it the network.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._fsync = ThreadPoolExecutor(1)

    def save(self, state: State) -> Pending:
        from torchsnapshot import Snapshot

        path = self.next_path()
        pending = Snapshot.async_take(str(path), {"model": state.model, "optimizer": state.optimizer})
        return _Background(self._fsync.submit(fsync_after, pending.wait, path))

    def restore(self, target: State) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(self.path)).restore({"model": target.model, "optimizer": target.optimizer})

    def close(self) -> None:
        import torch.distributed as dist

        self._fsync.shutdown()
        dist.destroy_process_group()


class Orbax(Contestant):
    """The tensors as a tree of numpy arrays without a copy. Restored arrays are copied into the model, as load_state_dict does."""

    name = "orbax"
    restores_into_moments = True

    def begin(self, state: State) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._fsync = ThreadPoolExecutor(1)

    def save(self, state: State) -> Pending:
        path = self.next_path()
        arrays = {name: tensor.detach().numpy() for name, tensor in named_tensors(state.tree()).items()}
        self._checkpointer.save(path, args=self._ocp.args.PyTreeSave(arrays))
        return _Background(self._fsync.submit(fsync_after, self._checkpointer.wait_until_finished, path))

    def restore(self, target: State) -> None:
        arrays = self._checkpointer.restore(self.path, args=self._ocp.args.PyTreeRestore())
        with torch.no_grad():
            for name, tensor in named_tensors(target.tree()).items():
                tensor.copy_(torch.as_tensor(arrays[name]))

    def close(self) -> None:
        self._fsync.shutdown()
        self._checkpointer.close()


_KINDS: tuple[type[Contestant], ...] = (
    RawFile, Holdfast, TorchSave, TorchMmap, Safetensors, Dcp, DcpAsync, DcpStaged, TorchCheckpointing, TorchSnapshot, Orbax,
)  # fmt: skip


def make(names: Sequence[str], folder: Path) -> list[Contestant]:
    """Contestants by name, each in its own folder."""
    kinds = {kind.name: kind for kind in _KINDS}
    return [kinds[name](folder / str(number)) for number, name in enumerate(names)]
