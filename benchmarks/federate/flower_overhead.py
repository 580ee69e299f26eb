"""Round times of Flower's deployment engine, for comparison with ``overhead.py``.

Flower's FedAvg sends arrays of a given size to two SuperNodes, which return them without training.
With ``--evaluate`` a round has a second exchange, which evaluates the new arrays; this is FedAvg's
default. With ``--tls`` the server has a certificate that the SuperNodes check; the SuperNodes have
none, because Flower identifies them by their keys.

Run it with the Python of an environment that has flwr, whose pins conflict with those of this
package. The program imports nothing from this package.

    /path/to/flwr-env/bin/python benchmarks/federate/flower_overhead.py --megabytes 1 100 \\
        --rounds 4 [--tls] [--evaluate]
"""

import argparse
import datetime
import ipaddress
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PYPROJECT = """[project]
name = "idle"
version = "1.0.0"
description = "No training"
license = "Apache-2.0"
dependencies = ["flwr"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "idle.server:app"
clientapp = "idle.client:app"

[tool.flwr.app.config]
numbers = 1
rounds = 1
evaluate = false
result = ""
"""
CLIENT = """from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord(numpy_ndarrays=[array * 0.999])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 3, "test_accuracy": 0.5, "test_loss": 1.0})
    content = RecordDict({"metrics": metrics})
    return Message(content=content, reply_to=message)
"""
SERVER = """import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
round_starts = []


class TimedFedAvg(FedAvg):
    def configure_train(self, *arguments):
        round_starts.append(time.perf_counter())
        return super().configure_train(*arguments)


@app.main()
def main(grid: Grid, context: Context) -> None:
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    config = context.run_config
    arrays = ArrayRecord(numpy_ndarrays=[np.ones(int(config["numbers"]), np.float32)])
    strategy = TimedFedAvg(fraction_evaluate=1.0 if config["evaluate"] else 0.0)
    strategy.start(grid, arrays, num_rounds=int(config["rounds"]))
    ends = [*round_starts[1:], time.perf_counter()]
    seconds = [end - start for start, end in zip(round_starts, ends)]
    Path(str(config["result"])).write_text(json.dumps(seconds))
"""


def free_ports(count):
    """Return free TCP ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    numbers = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return numbers


def write_certificate(folder):
    """Write a self-signed certificate for this machine and its key; return their paths."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
    )
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    certificate = (
        builder.add_extension(address, False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def measure(megabytes, rounds, timeout, tls, evaluate):
    """Return the seconds of each round after the first."""
    folder = Path(tempfile.mkdtemp(prefix="flower-"))
    app = folder / "app"
    (app / "idle").mkdir(parents=True)
    for name, text in {
        "pyproject.toml": PYPROJECT,
        "idle/__init__.py": "",
        "idle/client.py": CLIENT,
        "idle/server.py": SERVER,
    }.items():
        (app / name).write_text(text)
    runtime, *nodes = free_ports(3)
    home = folder / "home"
    home.mkdir()
    certificate, key = write_certificate(folder)
    link = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{runtime}"\n'
    (home / "config.toml").write_text(
        link + (f'root-certificates = "{certificate}"\n' if tls else "insecure = true\n")
    )
    server = (
        ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", certificate]
        if tls
        else ["--insecure"]
    )
    node = [
        "--root-certificates",
        certificate,
        "--ssl-certfile",
        certificate,
        "--ssl-keyfile",
        key,
        "--ssl-ca-certfile",
        certificate,
    ]
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    programs = Path(sys.executable).parent
    processes = []

    def start(program, *arguments):
        with (folder / f"{program}-{len(processes)}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [programs / program, *arguments], env=environment, stdout=log, stderr=log
                )
            )

    try:
        start("flower-superlink", *server, "--port", str(runtime))
        time.sleep(8)
        for port in nodes:
            start(
                "flower-supernode",
                *(node if tls else ["--insecure"]),
                "--superlink",
                f"127.0.0.1:{runtime}",
                "--port",
                str(port),
            )
        result = folder / "result.json"
        config = (
            f"numbers={int(megabytes * 250_000)} rounds={rounds} "
            f"evaluate={str(evaluate).lower()} result='{result}'"
        )
        submission = subprocess.run(
            [programs / "flwr", "run", str(app), "here", "--run-config", config],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        end = time.monotonic() + timeout
        while not result.exists():
            if submission.returncode or time.monotonic() > end:
                logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
                raise SystemExit(
                    f"Flower did not finish:\n{submission.stdout}\n{submission.stderr}\n{logs}"
                )
            time.sleep(0.5)
        time.sleep(0.5)
        return json.loads(result.read_text())[1:]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    print(
        "| arrays | TLS | exchanges per round | rounds | seconds per round, median | longest |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for megabytes in options.megabytes:
        seconds = measure(megabytes, options.rounds, options.timeout, options.tls, options.evaluate)
        tls = "the server" if options.tls else "none"
        row = f"{megabytes:g} MB | {tls} | {1 + options.evaluate} | {len(seconds)}"
        print(f"| {row} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
