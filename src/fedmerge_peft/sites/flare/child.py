"""Processes of NVIDIA FLARE, which exit with the command that started them.

python -m fedmerge_peft.sites.flare.child server KIT
python -m fedmerge_peft.sites.flare.child client KIT SITE
"""

from __future__ import annotations

import runpy
import sys

from fedmerge_peft.sites.exit_with_parent import exit_with_parent


def main() -> None:
    """Run the module that FLARE's start script would run."""
    exit_with_parent()
    kind, kit, *site = sys.argv[1:]
    module = f"nvflare.private.fed.app.{kind}.{kind}_train"
    names = [f"uid={site[0]}"] if site else []
    options = ["--set", "secure_train=true", *names, "org=federation", "config_folder=config"]
    sys.argv = [module, "-m", kit, "-s", f"fed_{kind}.json", *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
