# SPDX-License-Identifier: Apache-2.0
"""A pool of real gloo ranks that outlives a test: starting ranks costs seconds."""

import datetime
import multiprocessing
import os
import socket
import traceback

import torch
import torch.distributed as dist

TIMEOUT_S = 60


def _serve(rank, world, port, connection):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    while (message := connection.recv()) is not None:
        fn, args = message
        try:
            connection.send(("ok", fn(*args)))
        except Exception:  # whatever it was, the test that sent it will show it
            connection.send(("error", traceback.format_exc()))
    dist.destroy_process_group()


class RankError(AssertionError):
    """What a rank raised."""


class Pool:
    """``world`` processes joined in one gloo group."""

    def __init__(self, world):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "zfunc", "transformers"])
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        self.world, self.connections, self.processes = world, [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, fn, *args):
        """``fn(*args)`` on every rank; the list of results, in rank order."""
        for connection in self.connections:
            connection.send((fn, args))
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(2 * TIMEOUT_S):
                raise RankError(f"rank {rank} of {self.world} did not answer")
            answers.append(connection.recv())
        for rank, (kind, value) in enumerate(answers):
            if kind == "error":
                raise RankError(f"rank {rank} of {self.world}:\n{value}")
        return [value for _, value in answers]

    def close(self):
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(TIMEOUT_S)


def answer_after_a_death(scene, *args):
    """What rank 0 returns of a scene in which rank 1 of 2 dies (exit code 9)."""
    pool = Pool(2)
    for connection in pool.connections:
        connection.send((scene, args))
    kind, result = pool.connections[0].recv()
    pool.processes[1].join(10)
    pool.processes[0].terminate()
    pool.processes[0].join(10)
    if (kind, pool.processes[1].exitcode) != ("ok", 9):
        raise RankError(f"exit code {pool.processes[1].exitcode}, {kind}: {result}")
    return result
