"""Join the processes that torchrun starts into one job.

    torchrun --standalone --nproc-per-node 2 examples/unet_coco/train.py ...
    rank r of W: NCCL on the GPU of its LOCAL_RANK, gloo on a CPU;   rank 0 prepares, prints and writes

Only rank 0 writes to stdout. An error ends every rank: the rank that raises prints "error: ...", torchrun stops the
other ranks, and a rank inside a collective waits no longer than --timeout. Ctrl-C gives one line and exit status 130,
SIGTERM 143 (stopping.py), to which torchrun adds its report. Settings that need ranks are refused if there are none.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from te_nvfp4_cv.errors import value_error

from .options import Settings, choose_device
from .stopping import Stopped

T = TypeVar("T")
REFUSALS = (ValueError, RuntimeError, OSError)  # these carry an explanation, and need no traceback
IN_A_WORKER = re.compile(r"Caught (\w+) in .*?\.\nOriginal Traceback .*\n\1: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Ranks:
    """Describe this process among those that train together; Ranks() is a single process.

    Args:
        parallel: "ddp" or "fsdp", or "" for a single process.
    """

    rank: int = 0
    world: int = 1
    parallel: str = ""

    @property
    def group(self) -> Any:
        """Return the process group of all ranks, or None for a single process."""
        return dist.group.WORLD if self.parallel else None

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only, while the others wait, and return its result or raise its error on all."""
        if not self.parallel:
            return function()
        told: list[Any] = [None, "", ""]
        if self.rank == 0:
            try:
                told[0] = function()
            except REFUSALS as error:
                # Tell the other ranks before raising, or they would wait for this one until the timeout.
                told[1], told[2] = type(error).__name__, str(error)
                dist.broadcast_object_list(told)
                raise
        dist.broadcast_object_list(told)
        if told[1]:
            raise ValueError(told[2]) if told[1] == "ValueError" else RuntimeError(told[2])
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, with tensors on the CPU, and an empty list elsewhere."""
        if not self.parallel:
            return [value]
        gathered: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(pytree.tree_map_only(Tensor, Tensor.cpu, value), gathered or None)
        return gathered


def whole_batch(loss: Tensor, group: Any) -> Tensor:
    """Return the mean of the ranks' losses with the gradient of this rank's loss; gradients are averaged later."""
    if group is None:
        return loss
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    # The first two terms cancel in value and leave this rank's gradient.
    return loss - loss.detach() + mean / dist.get_world_size(group)


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun's environment describes, and yield this process's place and device.

    Without that environment, the process is alone.

    Raises:
        ValueError: If --parallel fsdp or --share-amax is used without torchrun, or --device cuda:N with it.
        RuntimeError: If there is no separate GPU for this rank.
    """
    if "RANK" not in os.environ:
        for asked, option in ((settings.parallel == "fsdp", "--parallel fsdp"), (settings.share_amax, "--share-amax")):
            if asked:
                raise value_error(
                    f"{option} needs ranks.",
                    got="one process, not started by torchrun",
                    needs="RANK, WORLD_SIZE and LOCAL_RANK in the environment",
                    fix="torchrun --standalone --nproc-per-node 2 examples/unet_coco/train.py ...",
                )
        yield Ranks(), choose_device(settings.device)
        return
    if ":" in settings.device:
        raise value_error(
            "--device names one GPU for all ranks.",
            got=settings.device,
            needs="auto, cpu or cuda: each rank takes the GPU of its LOCAL_RANK",
            fix="--device cuda, and CUDA_VISIBLE_DEVICES to choose among the GPUs",
        )
    device = choose_device(settings.device)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=settings.timeout)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store over restarts, and ranks would try to reach those that were killed.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=world,
        device_id=device if device.type == "cuda" else None,
    )
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), settings.parallel)
    with contextlib.ExitStack() as stack:
        if ranks.rank:
            # Only rank 0 writes to stdout.
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield ranks, device
        except Stopped:  # all ranks have agreed to, and none may leave while another is in its last collective
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            raise
    dist.barrier()  # a gloo rank that leaves early can abort ranks that are still in the last collective
    dist.destroy_process_group()


def message(error: Exception) -> str:
    """Return an error's message, without the traceback that a DataLoader's worker adds."""
    raised = IN_A_WORKER.fullmatch(str(error))
    return raised[2].rstrip() if raised else str(error)


def run(main: Callable[[], Any]) -> None:
    """Call `main` as a script, and turn errors into "error: ..." and exit status 1.

    Under torchrun, its report names the error.
    """
    if "RANK" not in os.environ:
        try:
            main()
        except REFUSALS as refusal:
            sys.exit(f"error: {message(refusal)}")
        except KeyboardInterrupt as stop:
            print(_stopped(stop), file=sys.stderr, flush=True)
            sys.exit(_status(stop))
        return
    rank = os.environ["RANK"]
    try:
        record(main)()
    except KeyboardInterrupt as stop:
        if rank == "0":
            print(_stopped(stop), file=sys.stderr, flush=True)
        os._exit(_status(stop))
    except Exception as error:
        if isinstance(error, REFUSALS):
            text = message(error)
            print(f"error: {text}" if rank == "0" else f"error on rank {rank}: {text}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # other ranks may be waiting for this one, so this one must not wait for them at exit


def _stopped(stop: KeyboardInterrupt) -> str:
    return "stopped: " + (str(stop) or "before the first checkpoint")


def _status(stop: KeyboardInterrupt) -> int:
    return stop.status if isinstance(stop, Stopped) else 130
