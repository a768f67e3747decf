"""Tells Ray that this spot machine will be taken back, as soon as its cloud says so: Ray asks no cloud by itself.

    python clusters/spot_notice.py aws 10.0.0.1:6379        # or gcp; the address of Ray's head

Runs until there is a notice and Ray has taken it; then training writes a checkpoint, and goes on without the machine
when it is gone. Amazon gives two minutes, Google half of one. The standard library only.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
GCP_S = 30  # what Google leaves from the notice on
ANSWER_S = 2.0  # how long the metadata service, which is on the machine's host, may take


def aws_notice(base: str) -> float | None:
    """Seconds that are left of this machine, by IMDSv2's spot/instance-action; None: nothing is announced. OSError."""
    asks = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _read(urllib.request.Request(f"{base}/latest/api/token", headers=asks, method="PUT"))
    asks = {"X-aws-ec2-metadata-token": token}
    try:
        said = _read(urllib.request.Request(f"{base}/latest/meta-data/spot/instance-action", headers=asks))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.datetime.fromisoformat(json.loads(said)["time"]).timestamp() - time.time()


def gcp_notice(base: str) -> float | None:
    """The same of Google's machines (instance/preempted)."""
    url = f"{base}/computeMetadata/v1/instance/preempted"
    said = _read(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}))
    return GCP_S if said.strip() == "TRUE" else None


def _read(request: urllib.request.Request) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before the metadata service
    with opener.open(request, timeout=ANSWER_S) as answer:
        return str(answer.read().decode())


CLOUDS: dict[str, tuple[str, Callable[[str], float | None]]] = {"aws": (AWS, aws_notice), "gcp": (GCP, gcp_notice)}


def drain(address: str, left_s: float) -> bool:
    """Announces the end of this node to Ray; whether it took it."""
    words = ["ray", "drain-node", "--address", address, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "the cloud takes this spot machine back"]
    words += ["--deadline-remaining-seconds", str(max(0, int(left_s)))]
    # Without RAY_ADDRESS the command starts a Ray of its own and announces that one's node, to nobody.
    return subprocess.run(words, env={**os.environ, "RAY_ADDRESS": address}, check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spot_notice", description=str(__doc__).splitlines()[0])
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("address", help="host:port of Ray's head")
    parser.add_argument("--metadata", help="URL of the metadata service (none: the cloud's)")
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds between questions")
    given = parser.parse_args(argv)
    base, notice = CLOUDS[given.cloud]
    last = ""
    while True:
        try:
            left_s, fault = notice(given.metadata or base), ""
        except (OSError, ValueError, KeyError) as error:
            left_s, fault = None, f"spot_notice: the metadata service does not answer ({error})"
        if fault and fault != last:
            print(fault, file=sys.stderr, flush=True)
        last = fault
        if left_s is not None:
            print(f"spot_notice: this machine goes in {left_s:.0f} s", file=sys.stderr, flush=True)
            if drain(given.address, left_s):
                return 0
        time.sleep(given.every_s)


if __name__ == "__main__":
    sys.exit(main())
