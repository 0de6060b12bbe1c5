"""Machines with a network, processes, homes and ssh of their own: what `ray up` needs, on one machine.

Each is a namespace of networks, mounts and processes. A bridge joins them, in a namespace of its own, where no rule of
this machine's firewall stands between two of them. Root is needed. With this process all of it ends, but for names.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START = """
set -e
mount --make-rprivate /
mount --bind {home}/passwd /etc/passwd
mount --bind {home}/shadow /etc/shadow
mount --bind {home}/ray /tmp/ray
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec "$(command -v sshd)" -D -e -f {home}/sshd.conf
"""
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One that root reaches by ssh at its address."""

    name: str
    address: str
    home: Path

    def pids(self) -> list[int]:
        """Its processes, by the numbers of this machine."""
        told = run("ip", "netns", "pids", self.name)
        return [int(word) for word in told.split()]

    def programs(self) -> list[str]:
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/exe").resolve().name)
        return found


@contextlib.contextmanager
def machines(folder: Path, settings: list[dict[str, str]]) -> Iterator[list[Machine]]:
    """One for each of these environments; the private key that opens them is `key` in the folder."""
    for name in ("key", "host"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    Path("/tmp/ray").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        switch = f"er{secrets.token_hex(3)}"
        net = stack.enter_context(_switch(switch))
        yield [
            stack.enter_context(_machine(folder, f"{switch}-{number}", switch, f"{net}.{number}", setting))
            for number, setting in enumerate(settings, start=1)
        ]


@contextlib.contextmanager
def _switch(name: str) -> Iterator[str]:
    """A namespace with a bridge, to which this machine is joined; the first three numbers of the net."""
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", name, "link", "set", "bridge", "up")
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "host", "netns", name)
        run("ip", "-n", name, "link", "set", "host", "master", "bridge", "up")
        with (Path(tempfile.gettempdir()) / "elasticrec-nets.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            net = free_net()
            run("ip", "addr", "add", f"{net}.254/24", "dev", name)
        run("ip", "link", "set", name, "up")
        yield net
    finally:
        run("ip", "netns", "del", name)


def free_net() -> str:
    """The first three numbers of a net that this machine has no address in."""
    taken = set(re.findall(r"inet (\d+\.\d+\.\d+)\.", run("ip", "-4", "addr")))
    return next(net for third in range(256) if (net := f"10.213.{third}") not in taken)


@contextlib.contextmanager
def _machine(folder: Path, name: str, switch: str, address: str, setting: dict[str, str]) -> Iterator[Machine]:
    home = folder / name
    (home / "ray").mkdir(parents=True)
    (home / ".bashrc").touch()
    passwd = re.sub(r"(?m)^root:.*$", f"root:x:0:0:root:{home}:/bin/bash", Path("/etc/passwd").read_text())
    (home / "passwd").write_text(passwd)
    (home / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # no password, and not locked
    words = " ".join(f'"{key}={value}"' for key, value in setting.items())
    (home / "sshd.conf").write_text(SSHD.format(address=address, folder=folder) + f"SetEnv {words}\n")
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "-n", switch, "link", "set", name, "master", "bridge", "up")
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", name, "route", "add", "default", "dev", "eth0")  # Ray takes the address that leads outside
        with _alive(name, home, address):
            yield Machine(name=name, address=address, home=home)
    finally:
        run("ip", "netns", "del", name)


@contextlib.contextmanager
def _alive(name: str, home: Path, address: str) -> Iterator[None]:
    apart = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name]
    apart += ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with (home / "sshd.log").open("wb") as log:
        command = [*apart, "bash", "-c", START.format(home=home)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 20
        while "sshd" not in Machine(name=name, address=address, home=home).programs():
            assert process.poll() is None, (home / "sshd.log").read_text()
            assert time.monotonic() < deadline_s, (home / "sshd.log").read_text()
            time.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and with its first process the whole namespace
        process.wait(timeout=30)
        deadline_s = time.monotonic() + 30
        while Machine(name=name, address=address, home=home).pids() and time.monotonic() < deadline_s:
            time.sleep(0.05)


def can_be_made() -> bool:
    """Whether this process may have namespaces with a bridge, and the programs are there."""
    programs = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "setpriv", "unshare")
    probe = "ip link add name er0 type bridge && ip link add name er1 type veth peer name er2"
    tried = ["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", probe]
    return all(map(shutil.which, programs)) and not subprocess.run(tried, capture_output=True, check=False).returncode


def run(*words: str) -> str:
    """What a command prints; an error tells what it said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
