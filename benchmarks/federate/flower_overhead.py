"""The same rounds over Flower's deployment engine: arrays of this size down to two SuperNodes and back, no training, without TLS.

To be run with the Python of an environment that has flwr (its pins do not go together with ours); it needs nothing of ours.

    /path/to/flwr-env/bin/python benchmarks/federate/flower_overhead.py --megabytes 1 100 --rounds 4
"""

import argparse
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
result = ""
"""
CLIENT = """from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    content = RecordDict({"arrays": ArrayRecord(numpy_ndarrays=[array * 0.999]), "metrics": MetricRecord({"num-examples": 3})})
    return Message(content=content, reply_to=message)
"""
SERVER = """import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    row, taken = np.ones(int(context.run_config["numbers"]), np.float32), []
    for number in range(int(context.run_config["rounds"])):
        begin = time.perf_counter()
        arrays = RecordDict({"arrays": ArrayRecord(numpy_ndarrays=[row])})
        asked = [Message(content=arrays, message_type="train", dst_node_id=node, group_id=str(number)) for node in nodes]
        replies = list(grid.send_and_receive(asked))
        row = np.mean([reply.content["arrays"].to_numpy_ndarrays()[0] for reply in replies], axis=0)
        taken.append(time.perf_counter() - begin)
    Path(str(context.run_config["result"])).write_text(json.dumps(taken))
"""


def ports(count):
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    numbers = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return numbers


def measure(megabytes, rounds, patience):
    """Seconds of each round after the first."""
    folder = Path(tempfile.mkdtemp(prefix="flower-"))
    app = folder / "app"
    (app / "idle").mkdir(parents=True)
    for name, text in {"pyproject.toml": PYPROJECT, "idle/__init__.py": "", "idle/client.py": CLIENT, "idle/server.py": SERVER}.items():
        (app / name).write_text(text)
    runtime, *nodes = ports(3)
    home = folder / "home"
    home.mkdir()
    link = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{runtime}"\ninsecure = true\n'
    (home / "config.toml").write_text(link)
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    programs = Path(sys.executable).parent
    server = ["--insecure", "--port", str(runtime)]
    processes = []

    def start(program, *arguments):
        with (folder / f"{program}-{len(processes)}.log").open("w") as log:
            processes.append(subprocess.Popen([programs / program, *arguments], env=environment, stdout=log, stderr=log))

    try:
        start("flower-superlink", *server)
        time.sleep(8)
        for port in nodes:
            start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{runtime}", "--port", str(port))
        result = folder / "result.json"
        config = f"numbers={int(megabytes * 250_000)} rounds={rounds} result='{result}'"
        asked = subprocess.run(
            [programs / "flwr", "run", str(app), "here", "--run-config", config],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        end = time.monotonic() + patience
        while not result.exists():
            if asked.returncode or time.monotonic() > end:
                logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
                raise SystemExit(f"Flower did not finish:\n{asked.stdout}\n{asked.stderr}\n{logs}")
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
    parser.add_argument("--patience", type=float, default=300)
    asked = parser.parse_args()
    print("| arrays | rounds | seconds a round, median | longest |\n|---|---:|---:|---:|")
    for megabytes in asked.megabytes:
        taken = measure(megabytes, asked.rounds, asked.patience)
        print(f"| {megabytes:g} MB | {len(taken)} | {statistics.median(taken):.2f} | {max(taken):.2f} |", flush=True)


if __name__ == "__main__":
    main()
