"""Two hosts: network namespaces joined by a cable, with `torchrun` on each. Skipped where they are refused."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from test_devices import DDP, start_ranks, wait_for, write_recipe
from test_training import assert_same_weights, metrics_of

pytestmark = pytest.mark.slow

HOSTS = {"condenser-0": "10.213.7.1", "condenser-1": "10.213.7.2"}


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian: iproute2)")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable", "netns", "condenser-0", "type", "veth", "peer", "cable", "netns", "condenser-1")
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are refused here: {error.stderr.strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def on_host(host, address, is_first, arguments, log):
    """`torchrun` there. All namespaces have this machine's name, so it and gloo are told what is whose."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS['condenser-0']}:29500", "--rdzv-id", "run"]
    torchrun += ["--rdzv-conf", f"is_host={int(is_first)}", "--local-addr", address, "-m", "condenser", "fit"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *torchrun, *arguments], env=environment, stdout=file, stderr=file
        )


@pytest.mark.parametrize("objective", ["condenser.Condenser", "cocondenser.CoCondenser"])
def test_two_hosts_train_to_the_weights_of_two_processes_of_one(objective, recipe, spans, hosts, tmp_path):
    def arguments(name, **where):
        where["model__objective"] = f"condenser.models.{objective}"
        if objective.endswith("CoCondenser"):
            where["data__store"] = str(spans)
        path = write_recipe(recipe, tmp_path / f"{name}.yaml", trainer__strategy=DDP, **where)
        return ["--config", str(path), "--runs_dir", str(tmp_path), "--name", name]

    two_hosts = arguments("two-hosts", trainer__devices=1, trainer__num_nodes=2)
    logs = {host: tmp_path / f"{host}.log" for host in hosts}
    running = [on_host(host, address, host == "condenser-0", two_hosts, logs[host]) for host, address in hosts.items()]
    try:
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.terminate()
    said = {host: log.read_text() for host, log in logs.items()}
    assert codes == [0, 0], said
    assert {re.search(r"GLOBAL_RANK: (\d), MEMBER: \d/2", log)[1] for log in said.values()} == {"0", "1"}
    wait_for(start_ranks(2, [arguments("one-host", trainer__devices=2)], tmp_path / "log"), tmp_path / "log")
    assert_same_weights(tmp_path / "two-hosts", tmp_path / "one-host")
    assert metrics_of(tmp_path / "two-hosts") == metrics_of(tmp_path / "one-host")
