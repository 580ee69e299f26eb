"""A kit and the server's recipe are data: a site runs none of their code and discloses no file."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fedmerge_peft.cli import main
from fedmerge_peft.errors import FederateError, RecipeError
from fedmerge_peft.sites.config import FederationFile, SiteSettings
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.sites.supervisor import child_environment
from fedmerge_peft.sites.wire import Message

CERTIFICATES = ("rootCA.pem", "client.crt", "client.key")


def test_the_servers_recipe_names_no_file_of_the_site(smoke, federation_of, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "{{ 1 }}"}')
    _kit, trainers = federation_of(smoke(), 2)
    trainer = trainers["site-1"]
    text = trainer.agreed.to_yaml()
    before, _, rest = text.partition("task:\n")
    after = rest[rest.index("\nbackbone:") :]
    text = f"{before}task:\n  name: causal-lm\n  chat_template: {secret}{after}"
    fields = {"recipe": text, "dtype": trainer.federation.wire_dtype}
    reply = Message.from_bytes(trainer.handle(Message("enroll", fields).to_bytes()))
    assert reply.kind == "error"
    assert "names no file" in reply.fields["error"]
    assert "password" not in reply.fields["error"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda value: value.half(), "which is a float16 tensor"),
        (lambda value: value * torch.nan, "not finite"),
        (lambda value: torch.full_like(value, 1e10), "too large"),
        (lambda value: value[None], "name or shape"),
    ],
)
def test_a_site_stores_no_adapter_that_is_out_of_range(
    smoke, federation_of, connect, change, fault
):
    kit, trainers = federation_of(smoke("strategy=fedavg", "rounds=1", "baselines=[]"), 2)
    transport, received = connect(trainers), {}

    def listen(site, payload, reply):
        message = Message.from_bytes(payload)
        received[site, message.kind] = message
        return reply

    transport.alter = listen
    assert run_job(kit, transport, lambda: None, lambda line: None).state == "ended"
    trainer, message = trainers["site-1"], received["site-1", "adapter"]
    assert Message.from_bytes(trainer.handle(message.to_bytes())).kind == "adapter_stored"
    tensors = {name: change(value) for name, value in message.tensors.items()}
    reply = Message.from_bytes(trainer.handle(replace(message, tensors=tensors).to_bytes()))
    assert reply.kind == "error"
    assert fault in reply.fields["error"]


# ---- plugins of a kit's recipe -------------------------------------------------------------------
@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A module that is installed at the site; importing it leaves a file."""
    mark, modules = tmp_path / "imported", tmp_path / "modules"
    modules.mkdir()
    (modules / "installed_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(modules)
    yield mark
    sys.modules.pop("installed_module", None)


@pytest.fixture
def kit_with_plugin(smoke, federation_of, tmp_path):
    """The kit of a site with data, whose recipe lists the installed module."""
    federation_of(smoke(), 1)
    folder = tmp_path / "federation" / "site-1"
    (folder / "startup").mkdir()
    text = (folder / "recipe.yaml").read_text()
    assert "plugins: []" in text
    (folder / "recipe.yaml").write_text(
        text.replace("plugins: []", "plugins: [json, installed_module]")
    )
    return folder


def allow_plugins(kit, *names):
    settings = SiteSettings.read(kit / "site.yaml").model_dump()
    settings["allow"]["plugins"] = list(names)
    (kit / "site.yaml").write_text(json.dumps(settings))
    return SiteSettings.read(kit / "site.yaml")


@pytest.mark.parametrize(
    ("allowed", "options", "message"),
    [
        ([], [], "plugins[1]: the import of 'installed_module' would run its code"),
        ([], ["--trust-remote-code"], "add it to allow.plugins in site.yaml"),
        (["other"], ["--trust-remote-code"], "add it to allow.plugins in site.yaml"),
        (["installed_module"], [], "allows the plugin installed_module"),
    ],
)
def test_a_kits_recipe_imports_no_module_without_the_sites_consent(
    kit_with_plugin, installed, capsys, allowed, options, message
):
    """Consent is a name in site.yaml and an option, because site.yaml comes with the kit, too."""
    pytest.importorskip("nvflare")
    settings = allow_plugins(kit_with_plugin, *allowed)
    with pytest.raises(SystemExit) as stopped:
        main(["federate", "site", str(kit_with_plugin), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    if allowed != ["installed_module"]:
        with pytest.raises(RecipeError, match=r"allow\.plugins"):
            Trainer(kit_with_plugin, "site-1", settings)
    assert not installed.exists()


def test_a_kits_recipe_imports_a_module_with_the_sites_consent(kit_with_plugin, installed):
    settings = allow_plugins(kit_with_plugin, "installed_module")
    trainer = Trainer(kit_with_plugin, "site-1", settings)
    assert trainer.agreed.plugins == ["json", "installed_module"]
    assert installed.exists()


# ---- kits ----------------------------------------------------------------------------------------
@pytest.fixture
def kit(tmp_path):
    """A site's kit with files that prepare writes; certificates without content."""
    folder = tmp_path / "kit"
    for place in ("startup", "local", "adapters"):
        (folder / place).mkdir(parents=True)
    for name in CERTIFICATES:
        (folder / "startup" / name).touch()
    (folder / "startup" / "fed_client.json").write_text('{"client": {"fqsn": "north"}}')
    for name in ("recipe.yaml", "site.yaml", "site.log"):
        (folder / name).touch()
    FederationFile(project="p", host="h", port=1, sites={"north": ["north"]}).write(folder)
    return folder


def secure(kit, **options):
    pytest.importorskip("nvflare")
    from fedmerge_peft.sites.flare.site_kit import secure_site_kit

    return secure_site_kit(kit, **options)


def test_nothing_of_a_kits_configuration_remains(kit):
    """FLARE would import local/custom and its decomposers, and make objects of these names."""
    custom = kit / "local" / "custom" / "decomposers"
    custom.mkdir(parents=True)
    (custom / "hostile.py").touch()
    named = {"path": "hostile.Class", "()": "hostile.function", "id": "resource_manager"}
    for name in ("resources.json", "log_config.json", "privacy.json", "comm_config.json"):
        for ending in ("", ".default"):
            (kit / "local" / f"{name}{ending}").write_text(json.dumps({"components": [named]}))
    client = {"fqsn": "north", "overseer_agent": named, "connection_security": "clear"}
    (kit / "startup" / "fed_client.json").write_text(json.dumps({"client": client, **named}))
    assert secure(kit) == "north"
    assert sorted(path.name for path in (kit / "local").rglob("*")) == [
        "authorization.json",
        "log_config.json",
        "resources.json",
    ]
    for folder in ("startup", "local"):
        text = "".join(path.read_text() for path in (kit / folder).iterdir())
        assert "hostile" not in text
        assert "clear" not in text
    assert secure(kit) == "north"  # also at the next start


@pytest.mark.parametrize("name", ["custom/evil.py", "comm_config.json", "signature.json"])
def test_a_kit_with_other_files_to_start_from_is_refused(kit, name):
    (kit / "startup" / name).parent.mkdir(exist_ok=True)
    (kit / "startup" / name).touch()
    with pytest.raises(FederateError, match="does not belong to a site's kit"):
        secure(kit)


@pytest.mark.parametrize(
    "name", ["site.log", "audit.jsonl", "adapters", "local", "startup/client.key", "data/more.csv"]
)
def test_links_in_a_kit_are_refused(kit, tmp_path, name):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("mine")
    link = kit / name
    link.parent.mkdir(exist_ok=True)
    link.rmdir() if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(target)
    with pytest.raises(FederateError, match="is a link to"):
        secure(kit)
    assert (target / "file").read_text() == "mine"
    if name == "data/more.csv":  # the site's own
        assert secure(kit, data=kit / "data") == "north"
        assert secure(kit, data=link) == "north"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"client": {"fqsn": "south"}}', "which is not a site of"),
        ('{"client": {"fqsn": "../north"}}', "which is not a site of"),
        ('{"client": []}', "not a site's kit"),
        ("[" * 100_000, "not a site's kit"),
    ],
)
def test_a_kit_of_another_site_is_refused(kit, content, message):
    (kit / "startup" / "fed_client.json").write_text(content)
    with pytest.raises(FederateError, match=message):
        secure(kit)


def test_a_file_in_the_place_of_a_folder_is_one_error(kit):
    shutil.rmtree(kit / "local")
    (kit / "local").write_text("")
    with pytest.raises(FederateError, match="local cannot be written again"):
        secure(kit)


def test_names_of_sites_in_a_kit_are_names(kit):
    FederationFile(project="p", host="h", port=1, sites={"../north": ["a"]}).write(kit)
    (kit / "startup" / "fed_client.json").write_text('{"client": {"fqsn": "../north"}}')
    with pytest.raises(FederateError, match="is not a valid site name"):
        secure(kit)


def test_processes_of_a_site_import_no_module_of_the_kit(kit):
    """FLARE starts a job with ``python -m`` in the kit."""
    (kit / "colorsys.py").write_text("raise SystemExit('hostile')")
    command = [sys.executable, "-c", "import colorsys; print(colorsys.__file__)"]
    found = subprocess.run(
        command, cwd=kit, env=child_environment(), capture_output=True, text=True, check=True
    )
    assert str(kit) not in found.stdout
