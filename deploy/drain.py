"""Tells Ray that the machine it runs on is about to go, and waits until nothing of Ray runs on it any more.

    deploy/drain.py --deadline 60                                    now: a pod's preStop hook calls this
    deploy/drain.py --on-notice http://169.254.169.254/latest        when AWS announces the end of a spot machine

Training saves and goes on elsewhere, Serve starts replicas elsewhere and lets requests end. A head is never drained.
Exit status: 0 when Ray has left in time, 1 when it has not, 2 when there is no single node to drain.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

POLL_S = 2.0
MARGIN_S = 5.0  # before the machine goes, everything should be done


@dataclass(frozen=True, kw_only=True, slots=True)
class Raylet:
    """The process that is a node of Ray on this machine."""

    pid: int
    node_id: str
    address: str  # of the head
    is_head: bool


def raylets(address: str | None) -> list[Raylet]:
    """All workers that this process can see: in a container its own, on a machine those of every cluster."""
    found = [raylet for path in Path("/proc").glob("[0-9]*") if (raylet := read_raylet(int(path.name)))]
    return [raylet for raylet in found if not raylet.is_head and address in (None, raylet.address)]


def read_raylet(pid: int) -> Raylet | None:
    """What the command line of a process says, or none when it is no raylet."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if Path(words[0]).name != "raylet":
        return None
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    return Raylet(pid=pid, node_id=options["node_id"], address=options["gcs-address"], is_head="--head" in words)


def drain(raylet: Raylet, deadline_s: float) -> bool:
    """Returns whether the node has left before the deadline."""
    ends_s = time.monotonic() + deadline_s
    words = ["ray", "drain-node", "--address", raylet.address, "--node-id", raylet.node_id]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is about to go"]
    subprocess.run([*words, "--deadline-remaining-seconds", str(int(deadline_s))], check=True, timeout=deadline_s)
    while time.monotonic() < ends_s:
        if read_raylet(raylet.pid) is None:
            return True
        time.sleep(0.2)
    return False


def wait_for_notice(metadata: str) -> float:
    """Asks AWS' metadata service (version 2) until it names an end. Returns the seconds that are left."""
    while True:
        try:
            notice = json.loads(ask(f"{metadata}/meta-data/spot/instance-action", new_token(metadata)))
            return max(1.0, datetime.fromisoformat(notice["time"]).timestamp() - time.time() - MARGIN_S)
        except urllib.error.HTTPError as error:
            if error.code != 404:  # 404: no end is near
                print(f"{metadata}: {error}", flush=True)
        except OSError as error:
            print(f"{metadata}: {error}", flush=True)
        time.sleep(POLL_S)


def new_token(metadata: str) -> str:
    return ask(f"{metadata}/api/token", method="PUT", header=("X-aws-ec2-metadata-token-ttl-seconds", "60"))


def ask(url: str, token: str = "", method: str = "GET", header: tuple[str, str] | None = None) -> str:
    request = urllib.request.Request(url, method=method)
    request.add_header(*(header or ("X-aws-ec2-metadata-token", token)))
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds until the machine goes")
    parser.add_argument("--on-notice", metavar="URL", help="metadata service to wait for; it names the deadline")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the head, where machines hold several clusters")
    chosen = parser.parse_args()
    deadline_s = wait_for_notice(chosen.on_notice) if chosen.on_notice else chosen.deadline
    found = raylets(chosen.address)
    if len(found) != 1:
        named = ", ".join(f"{raylet.address} ({raylet.pid})" for raylet in found) or "none"
        print(f"one worker of Ray is needed on this machine, got {named}; name its head by --address", file=sys.stderr)
        return 2
    left = drain(found[0], deadline_s)
    print("drained" if left else f"still there after {deadline_s:.0f} s", flush=True)
    return 0 if left else 1


if __name__ == "__main__":
    sys.exit(main())
