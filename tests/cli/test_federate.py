"""The commands of ``fedmerge federate``: help, bad input, and light imports."""

import hashlib
import subprocess
import sys

import pytest

from fedmerge_peft.cli import main

PREPARE = (
    "federate prepare smoke --sites north,south --client south=a --client south=b "
    "--server 10.1.2.3:8102 --wire-dtype bfloat16"
)
COMMANDS = ("prepare", "server", "site", "run", "status", "stop", "rehearse")


@pytest.fixture
def fedmerge(capsys):
    """Run the program in this process; return exit code, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return (caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """The kits of two sites, the second with two clients."""
    out = tmp_path_factory.mktemp("federation") / "out"
    with pytest.raises(SystemExit) as caught:
        main([*PREPARE.split(), "--out", str(out)])
    assert not caught.value.code
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, fedmerge):
    code, out, _ = fedmerge("federate", command, "--help")
    assert code == 0
    assert f"Example: fedmerge federate {command}" in out


def test_the_list_of_commands_is_complete():
    from fedmerge_peft.cli.federate import federate

    assert {command.callback.__name__ for command in federate.registered_commands} == set(COMMANDS)


def test_help_imports_neither_torch_nor_nvflare():
    script = (
        "import sys\nfrom fedmerge_peft.cli import main\n"
        "try:\n    main(['federate', 'prepare', '--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "nvflare", "transformers", "grpc"} & set(done.stderr.split())


def test_importing_the_package_imports_no_nvflare():
    script = (
        "import sys, fedmerge_peft, fedmerge_peft.federation.loop, fedmerge_peft.sites.server.job; "
        "assert 'nvflare' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "smoke"], "--sites: no site is named; give names"),
        (["prepare", "smoke", "--sites", "a,a"], "expected unique names"),
        (["prepare", "smoke", "--sites", "a,../b"], "'../b' is not a valid site name"),
        (["prepare", "smoke", "--sites", "a", "--server", "nohost"], "expected HOST:PORT"),
        (["prepare", "smoke", "--sites", "a", "--server", "x:99999"], "expected HOST:PORT"),
        (["prepare", "smoke", "--sites", "a", "--client", "b=x"], "expected SITE=NAME"),
        (["prepare", "smoke", "--sites", "a,b", "--client", "a=b"], "named more than once"),
        (["prepare", "smoke", "--sites", "a", "--wire-dtype", "int8"], "--wire-dtype"),
        (["prepare", "nosuchrecipe", "--sites", "a"], "nosuchrecipe"),
        (["rehearse", "smoke", "--sites", "99"], "--sites 99: the recipe has 12 clients"),
        (["rehearse", "smoke", "--wire-dtype", "int8"], "--wire-dtype"),
        (["server", "nowhere"], "not a federation kit"),
        (["site", "nowhere"], "not a federation kit"),
        (["run", "nowhere"], "not a federation kit"),
        (["status", "nowhere"], "not a federation kit"),
        (["stop", "nowhere"], "not a federation kit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_with_2_and_a_message(arguments, message, fedmerge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = fedmerge("federate", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_prepare_writes_a_kit_for_each_and_a_readme_for_each_site(kits):
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.config import FederationFile

    federation = FederationFile.read(kits / "sites" / "south")
    assert federation.sites == {"north": ["north"], "south": ["a", "b"]}
    assert (federation.host, federation.port, federation.wire_dtype) == (
        "10.1.2.3",
        8102,
        "bfloat16",
    )
    for kit in ("server", "operator", "sites/north", "sites/south"):
        recipe = Recipe.load(kits / kit / "recipe.yaml")
        assert (recipe.clients.failures, recipe.training.clients_per_batch) == ("skip", 1)
        assert (kits / kit / "startup" / "rootCA.pem").is_file()
        (wheel,) = (kits / kit).glob("fedmerge_peft-*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert (kits / kit / "SHA256SUMS").read_text() == f"{digest}  {wheel.name}\n"
    readme = (kits / "sites" / "south" / "README.md").read_text()
    assert "fedmerge federate site . --data" in readme
    assert "examples of: a, b" in readme
    assert "10.1.2.3:8102" in readme
    assert digest in readme


def test_only_the_authority_can_sign_and_keys_are_private(kits):
    keys = [path for path in kits.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert sorted(str(path.relative_to(kits)) for path in keys) == [
        "authority/rootCA.key",
        "operator/startup/client.key",
        "server/startup/server.key",
        "sites/north/startup/client.key",
        "sites/south/startup/client.key",
    ]
    assert all(path.read_bytes().count(b"BEGIN") == 1 for path in keys)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*keys, kits / "authority"))


def test_prepare_overwrites_nothing(kits, fedmerge):
    code, _, err = fedmerge("federate", "prepare", "smoke", "--sites", "a", "--out", kits)
    assert code == 2
    assert "existing files are never overwritten" in err


def test_a_recipe_that_sets_failures_keeps_its_value():
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.prepare import federated_recipe

    assert (
        federated_recipe(Recipe.load("smoke", ["clients.failures=raise"])).clients.failures
        == "raise"
    )
    assert federated_recipe(Recipe.load("smoke")).clients.failures == "skip"


def test_a_site_reports_errors_before_it_connects(kits, fedmerge, tmp_path):
    site = kits / "sites" / "north"
    code, _, err = fedmerge("federate", "site", site)
    assert (code, "no data: use" in err) == (2, True)
    own = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text("rounds: 3\n")
    code, _, err = fedmerge("federate", "site", site, "--data", tmp_path / "x.csv")
    assert (code, "unknown key" in err) == (2, True)
    (site / "site.yaml").write_text(own.replace("remote_code: false", "remote_code: true"))
    code, _, err = fedmerge("federate", "site", site, "--data", tmp_path / "x.csv")
    (site / "site.yaml").write_text(own)
    assert (code, "confirm this with --trust-remote-code" in err) == (2, True)


def test_an_unreachable_server_is_one_message(kits, fedmerge, monkeypatch):
    from fedmerge_peft.sites.flare import session

    def unreachable(*arguments, **options):
        raise ConnectionRefusedError("connection refused")

    monkeypatch.setattr(session, "new_secure_session", unreachable)
    code, _, err = fedmerge("federate", "status", kits)
    assert code == 2
    assert "no server of this federation responds" in err


def test_a_kit_gets_its_policy_on_first_use(kits):
    import json

    from fedmerge_peft.sites.flare.provision import ALLOWED_CLASSES, write_server_policy
    from fedmerge_peft.sites.flare.site_kit import secure_site_kit

    site = kits / "sites" / "north"
    connection = json.loads((site / "startup" / "fed_client.json").read_text())
    assert secure_site_kit(site) == "north"
    assert json.loads((site / "startup" / "fed_client.json").read_text()) == connection
    resources = json.loads((site / "local" / "resources.json").read_text())
    roles = json.loads((site / "local" / "authorization.json").read_text())["permissions"]
    assert resources["class_allow_list"] == [ALLOWED_CLASSES]
    assert resources["allow_log_streaming"] is False
    assert all(rights["shell_commands"] == rights["byoc"] == "none" for rights in roles.values())
    write_server_policy(kits / "server")
    text = (kits / "server" / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text


def test_a_federation_that_fails_exits_with_2_and_the_sites_reason(kits, fedmerge, monkeypatch):
    from fedmerge_peft.sites.flare import operator

    failed = {
        "state": "failed",
        "rounds": 3,
        "total": 9,
        "error": "no site can take part:\n  north: its data are \x1b[31mempty",
    }
    monkeypatch.setattr(operator, "run", lambda *arguments, **options: failed)
    code, _, err = fedmerge("federate", "run", kits)
    assert code == 2
    assert "north: its data are \\x1b[31mempty" in err
    assert "3 of 9 rounds are done; to continue: fedmerge federate run" in err


def test_a_stopped_federation_prints_the_command_that_continues_it(kits, fedmerge, monkeypatch):
    from fedmerge_peft.sites.flare import operator

    monkeypatch.setattr(
        operator, "run", lambda *arguments, **options: {"state": "stopped", "rounds": 3, "total": 9}
    )
    code, out, _ = fedmerge("federate", "run", kits)
    assert code == 0
    assert "stopped: 3 of 9 rounds are done" in out
    assert "to continue: fedmerge federate run" in out


def test_the_function_federate_is_not_hidden_by_a_module():
    script = (
        "import fedmerge_peft.sites.server.job, fedmerge_peft.cli.federate; "
        "from fedmerge_peft import federate; assert callable(federate)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
