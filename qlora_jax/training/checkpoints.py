"""Checkpoints of a run, from which it goes on as if it had never stopped.

output/step-N/
    adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    state/              Orbax: adapters, optimizer state, step, random key
    checkpoint.json     the run that it is of, and every file's size

A folder has this name when it is whole; until then it is .step-N.part.
"""

import concurrent.futures
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.folder import new_file
from qlora_jax.errors import QloraError, reason
from qlora_jax.parallel import is_first
from qlora_jax.training.step import TrainState

DESCRIPTION = "checkpoint.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole one, on disk.

    step      steps that had been taken
    counts    what the log had counted until then
    run       what `describe_run` said of the run
    finished  whether it was the run's last, and all that comes after it was done
    """

    folder: Path
    step: int
    counts: dict[str, int]
    run: dict[str, Any]
    finished: bool


def check_output(output: Path, resume: bool) -> None:
    """Raises QloraError if `output` has an adapter or a checkpoint, which a new run would mix with
    its own; to resume, if it has an adapter and nothing to go on from; and if it is a file."""
    if output.exists() and not output.is_dir():
        raise QloraError(f"{output}: a file; the output of a run is a folder, choose another name")
    adapter = (output / peft.WEIGHTS).exists()
    saved = _newest(output)
    if resume and adapter and saved is None:
        raise QloraError(
            f"{output}: has an adapter, but no whole checkpoint to go on from; to train it further "
            "begin another run from it (--adapter, or adapters=) in another folder"
        )
    if not resume and (adapter or saved):
        raise QloraError(
            f"{output}: has an adapter already, or a checkpoint; go on with its run (--resume, or "
            "resume=True), or choose another folder"
        )


def is_finished(output: Path) -> bool:
    """Whether the run in `output` has come to its end, and nothing is left to do."""
    newest = _newest(output)
    return newest is not None and newest.finished


def is_begun(output: Path) -> bool:
    """Whether the run in `output` has a checkpoint to go on from."""
    return _newest(output) is not None


def day_of(output: Path) -> str | None:
    """The day that the chat template of the run in `output` was told, if there is one to go on."""
    newest = _newest(output)
    return None if newest is None else newest.run["data"].get("today")


def _newest(output: Path) -> Checkpoint | None:
    return RunCheckpoints(output).newest(say=lambda _: None)


class RunCheckpoints:
    """Those of a run in the folder `output`, of which the `keep` newest are kept (None: all).

    They are written beside the training; what goes wrong there is raised by the next call. Of
    several processes all call alike, and have the folder in common.
    """

    def __init__(self, output: Path, keep: int | None = None) -> None:
        self._output, self._keep = output.absolute(), keep
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def newest(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest whole one; None if there is none. Those that are damaged are passed over, and
        said."""
        for step, folder in self._found():
            try:
                return _open(folder, step)
            except QloraError as error:
                say(f"passed over, since it is damaged: {error}")
        return None

    def restore(self, checkpoint: Checkpoint, like: TrainState) -> TrainState:
        """The state as it was, laid out as `like`: arrays, or their shapes and shardings.

        `like` may lie on another mesh than what was saved, and in other kinds of memory. Raises
        QloraError if the state has other arrays than `like`.
        """
        import orbax.checkpoint as ocp

        where = checkpoint.folder / "state"
        flat, treedef = jax.tree_util.tree_flatten_with_path(like)
        target = {_name(path): _abstract(leaf) for path, leaf in flat if leaf.size}
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(where, target)
        # Orbax and TensorStore raise whatever is nearest.
        except Exception as error:
            raise QloraError(
                f"{where}: cannot be read as the state of this run ({reason(error)}); it was "
                "perhaps written by another version: begin the run anew"
            ) from error
        empty = (jnp.zeros(leaf.shape, leaf.dtype) for _, leaf in flat if not leaf.size)
        return treedef.unflatten(
            jax.device_put(found[_name(path)], leaf.sharding) if leaf.size else next(empty)
            for path, leaf in flat
        )

    def save(
        self,
        step: int,
        state: TrainState,
        run: dict[str, Any],
        counts: dict[str, int],
        write_adapter: Callable[[Path], None],
    ) -> None:
        """Begins to write the checkpoint of `step`; returns when nothing of `state` is needed any
        more. write_adapter(folder): writes the adapter, from a copy of its own.

        Raises QloraError if this or the one before it could not be written.
        """
        self.wait()
        import orbax.checkpoint as ocp

        part, quiet = self._output / f".step-{step}.part", _OrbaxQuiet()
        about = {"version": VERSION, "finished": False, "counts": counts, "run": run}
        try:
            if is_first():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            _together(part.name)
            quiet.begin()
            checkpointer = ocp.StandardCheckpointer()
            flat, _ = jax.tree_util.tree_flatten_with_path(state)
            # Orbax refuses arrays without elements, which hold nothing.
            checkpointer.save(part / "state", {_name(path): x for path, x in flat if x.size})
        # As above, and from the disk.
        except Exception as error:
            quiet.end()
            raise self._failure(step, error) from error

        def commit() -> None:
            try:
                checkpointer.close()  # which waits for it, in the first process for all
            finally:
                quiet.end()
            if not is_first():
                return
            write_adapter(part)
            about["files"] = _sizes(part)
            _write_json(part / DESCRIPTION, about)
            self._replace(step, part)

        self._pending = step, self._pool.submit(commit)

    def check(self) -> None:
        """Raises QloraError if the last `save` went wrong meanwhile; does not wait for it."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until what `save` began is whole. Raises QloraError if it cannot be."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def finish(self, step: int) -> None:
        """Notes in the checkpoint of `step` that nothing of the run is left to do."""
        about = _read(self._output / f"step-{step}")
        with new_file(self._output / f"step-{step}" / DESCRIPTION) as part:
            _write_json(part, about | {"finished": True})

    def __enter__(self) -> "RunCheckpoints":
        """Clears away what a killed run was writing."""
        for part in self._output.glob(".step-*.part") if is_first() else ():
            shutil.rmtree(part)
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def _replace(self, step: int, part: Path) -> None:
        """`part` becomes the checkpoint of `step`, and those that are too many go."""
        folder = self._output / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one: whole ones are not written again
        os.replace(part, folder)
        _sync(self._output)
        whole = (older for older, path in self._found() if older <= step and _is_whole(path, older))
        for older in list(whole)[self._keep :] if self._keep else ():
            # Renamed first, so that one half deleted is never found.
            gone = self._output / f".step-{older}.part"
            os.replace(self._output / f"step-{older}", gone)
            shutil.rmtree(gone)

    def _found(self) -> Iterator[tuple[int, Path]]:
        """Step and folder of what is called a checkpoint, the newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self._output.glob("step-*"))
        for step in sorted((int(name[1]) for name in names if name), reverse=True):
            yield step, self._output / f"step-{step}"

    def _failure(self, step: int, error: Exception) -> QloraError:
        shutil.rmtree(self._output / f".step-{step}.part", ignore_errors=True)
        before = self.newest(say=lambda _: None)
        left = "no checkpoint was saved before"
        if before is not None:
            left = f"{before.folder} is whole. With the cause mended, --resume goes on from there"
        return QloraError(
            f"{self._output}: the checkpoint of step {step} could not be written "
            f"({reason(error)}); {left}"
        )


class _OrbaxQuiet(logging.Filter):
    """From `begin` to `end` Orbax logs no errors: several tracebacks for a full disk, around which
    our message would not be found. It raises the same error."""

    _logger = logging.getLogger("absl")

    def begin(self) -> None:
        """From now on."""
        self._logger.addFilter(self)

    def end(self) -> None:
        """Until now."""
        self._logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be shown."""
        return "orbax" not in record.pathname


def _open(folder: Path, step: int) -> Checkpoint:
    """Raises QloraError if it is not whole.

    Orbax would find that out in the middle of reading, and leave other reads behind with errors.
    """
    about = _read(folder)
    have = _sizes(folder)
    for name, size in about["files"].items():
        if have.get(name) != size:
            raise QloraError(f"{folder / name}: {have.get(name, 'no')} bytes, expected {size}")
    return Checkpoint(folder, step, about["counts"], about["run"], about["finished"])


def _is_whole(folder: Path, step: int) -> bool:
    try:
        _open(folder, step)
    except QloraError:
        return False
    return True


def _read(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QloraError(f"{path}: no such file") from error
    except ValueError as error:
        raise QloraError(f"{path}: not JSON ({error})") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise QloraError(f"{path}: not of version {VERSION}")
    return about


def _name(path: Any) -> str:
    """The same whether the optimizer is paged or not: its state is that of the one it wraps."""
    keys = [key for key in path if getattr(key, "name", None) != "inner"]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator=".")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore. To one device by way of a mesh: with its SingleDeviceSharding in
    host memory, Orbax makes an array that a traced function takes for one in the device's."""
    sharding = leaf.sharding
    if isinstance(sharding, SingleDeviceSharding):
        mesh = Mesh(np.array(list(sharding.device_set)), ("one",))
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file below `folder` but the description, by its path from there."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name != DESCRIPTION}


def _write_json(path: Path, about: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _together(name: str) -> None:
    """Waits until all processes of the run are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _sync(folder: Path) -> None:
    """The folder's entries reach the disk before anything later does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
