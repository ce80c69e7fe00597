"""torchrun as on a cluster: two nodes, here on one machine, and workers that it starts again after one has died."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import Started, check_same_update, parameters, read_log, run_script, wait_for

pytestmark = pytest.mark.slow
UPDATE = ["--tokens-per-micro-batch", 60]  # several micro-batches on each of four ranks


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """`ranks.py update` on two nodes of two ranks: a torchrun each, which meet at a port. What its rank 0 wrote."""
    folder, port = tmp_path_factory.mktemp("nodes"), free_port()
    launch = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "nodes",
              "--local-addr", "localhost"]
    outs = [folder / f"node-{i}.pt" for i in range(2)]
    nodes = [Started("tests/ranks.py", "update", out, *UPDATE, ranks=2, launch=launch, mark=out) for out in outs]
    try:
        codes = [node.process.wait(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()  # if one of them failed, the other waits for it
    assert codes == [0, 0], "\n".join(node.output.read_text() for node in nodes)
    written = [out for out in outs if out.exists()]
    assert len(written) == 1  # by rank 0 of all, not of each node
    return torch.load(written[0], weights_only=True)


def test_each_rank_knows_its_place(two_nodes):
    assert two_nodes["places"] == [
        {"WORLD_SIZE": 4, "GROUP_RANK": node, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": local}
        for node in (0, 1) for local in (0, 1)
    ]


@pytest.mark.parametrize("ranks", [1, 4])
def test_an_update_on_two_nodes_is_that_of_one(two_nodes, tmp_path, ranks):
    run_script("tests/ranks.py", "update", tmp_path / "one.pt", *UPDATE, ranks=ranks)
    one_node = torch.load(tmp_path / "one.pt", weights_only=True)
    for case in ("raft", "grpo", "single"):  # "single": one sample, three ranks have none
        check_same_update(one_node[case], two_nodes[case])


# --- workers that are started again ----------------------------------------------------------------------------------

WORDS = ["--steps", 6, "--prompts-per-step", 6, "--samples-per-prompt", 4, "--max-response-tokens", 32,
         "--eval-samples", 1, "--eval-every", 6, "--save-every", 2, "--keep", 9]


def worker_of_rank(run: Started, rank: int) -> int:
    """The process of a run that has this rank."""
    for worker in set(run.workers()) - {run.process.pid}:  # torchrun may have a RANK from where it was started
        if f"RANK={rank}".encode() in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0"):
            return worker
    raise LookupError(f"no worker of rank {rank}")


def test_torchrun_starts_the_workers_again_when_one_dies(tmp_path, monkeypatch):
    """The same command line serves all times: --resume starts afresh where there is no checkpoint."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    run_script("raft.py", *WORDS, "--out", straight, ranks=2)
    # Without it torch 2.13 keeps its store, in which the new workers may find the ports of those that have died.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    run = Started("raft.py", *WORDS, "--out", out, "--resume", ranks=2, mark=out,
                  launch=["--standalone", "--max-restarts", "2"])
    try:
        for rank, step in [(0, 2), (1, 4)]:  # rank 0 has the lock of --out, and writes; the other has not
            wait_for((out / "checkpoints" / f"step-{step:06d}").is_dir)
            os.kill(worker_of_rank(run, rank), signal.SIGKILL)
            assert not (out / "checkpoints" / "step-000006").exists()
        code = run.process.wait(timeout=120)
    finally:
        run.kill()
    output = run.output.read_text()
    assert code == 0, output
    assert output.count("step 1  samples") == 1  # it went on, and did not begin again
    assert read_log(out) == read_log(straight)
    restarted, expected = parameters(out, 6), parameters(straight, 6)
    assert all(torch.equal(restarted[name], expected[name]) for name in expected)
