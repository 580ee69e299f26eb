"""Uploads to the hub, without a network, and the command ``fedmerge export``."""

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from fedmerge_peft import RunError
from fedmerge_peft.cli import main
from fedmerge_peft.serving.export import export_client, push_to_hub


@pytest.fixture
def run(finished):
    return finished("causal-lm").run


@pytest.fixture
def hub(monkeypatch):
    """Calls of the hub's client; the methods keep the signatures of the real ones."""
    asked = []

    def record(self, *positional, **named):
        asked.append((positional, named))
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/me/mine/commit/abc",
            commit_message="",
            commit_description="",
            oid="abc",
        )

    for method in ("create_repo", "upload_folder"):
        real = getattr(huggingface_hub.HfApi, method)

        def checked(self, *positional, real=real, **named):
            import inspect

            inspect.signature(real).bind(self, *positional, **named)
            return record(self, *positional, real.__name__, **named)

        monkeypatch.setattr(huggingface_hub.HfApi, method, checked)
    return asked


@pytest.fixture
def fedmerge(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *map(str, arguments)])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


def test_a_new_repository_is_private_and_gets_the_whole_folder(run, hub, tmp_path):
    folder = export_client(run, "client 1", tmp_path / "mine", base_model_id="acme/base")
    assert push_to_hub(folder, "me/mine") == "https://huggingface.co/me/mine/commit/abc"
    (made, how), (_, uploaded) = hub
    assert made == ("me/mine", "create_repo")
    assert how == {"repo_type": "model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/mine", folder)


def test_without_the_hub_the_folder_stays_and_the_next_command_is_printed(run, tmp_path):
    """The tests run offline, so the real client raises the error."""
    folder = export_client(run, "client 1", tmp_path / "mine", base_model_id="acme/base")
    with pytest.raises(
        RunError, match=r"was written but not uploaded: .*later: hf upload me/mine .*mine --private"
    ):
        push_to_hub(folder, "me/mine")
    assert (folder / "README.md").is_file()


def test_errors_of_the_hub_are_one_message(run, hub, tmp_path, monkeypatch):
    import httpx2

    def refuse(*_, **__):
        response = httpx2.Response(
            403, request=httpx2.Request("POST", "https://huggingface.co/api/repos/create")
        )
        raise huggingface_hub.errors.HfHubHTTPError(
            "403 Forbidden: you have no write token\nmore", response=response
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    folder = export_client(run, "client 1", tmp_path / "mine", base_model_id="acme/base")
    with pytest.raises(
        RunError, match=r"403 Forbidden: you have no write token\. To upload it later"
    ):
        push_to_hub(folder, "me/mine")


def test_the_command_writes_and_prints_vllms_option_and_the_next_step(run, fedmerge, tmp_path):
    code, out, err = fedmerge(
        run.path, "--client", "client 1", "--to", tmp_path / "mine", "--base-model-id", "acme/base"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"wrote {tmp_path / 'mine'}, the state after round 2"
    assert (
        "vLLM, if it supports LoRA for this model: --enable-lora --max-lora-rank 8 (rank 2;" in out
    )
    assert f"\n\nnext:\n  cat {tmp_path / 'mine' / 'README.md'} " in out


def test_the_command_names_the_folder_and_warns_of_a_local_base(run, fedmerge):
    code, _, err = fedmerge(run.path, "--soup")
    assert code == 0
    assert (run.path / "exported" / "soup" / "adapter-2").is_dir()
    assert "is not on the hub; if it has a public name, give it with --base-model-id" in err
    code, _, err = fedmerge(run.path, "--soup")
    assert code == 2
    assert "existing files are never overwritten" in err


def test_the_command_pushes_to_the_repository_in_the_card(run, hub, fedmerge, tmp_path):
    options = [
        "--all",
        "--to",
        tmp_path / "all",
        "--base-model-id",
        "acme/base",
        "--push",
        "me/mine",
        "--public",
    ]
    code, out, _ = fedmerge(run.path, *options)
    assert code == 0
    assert "pushed: https://huggingface.co/me/mine/commit/abc" in out
    assert hub[0][1]["private"] is False
    card = ModelCard.load(tmp_path / "all" / "client 2" / "README.md")
    assert "'me/mine', subfolder='client 2'" in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of --client NAME, --all and --soup"),
        (["--all", "--soup"], "give exactly one of"),
        (["--client", "nobody"], "has no client 'nobody'"),
        (
            ["--client", "client 1", "--push", "me/mine"],
            "is not on the hub, so a pushed adapter could not be loaded",
        ),
        (
            ["--client", "client 1", "--push", "a b", "--base-model-id", "acme/base"],
            "'a b' is not a valid repository id",
        ),
        (["--client", "client 1", "--to", "/dev/null"], "/dev/null is not a folder"),
    ],
)
def test_bad_input_is_one_message(arguments, message, run, fedmerge):
    code, out, err = fedmerge(run.path, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_is_no_run_is_named(fedmerge, tmp_path):
    code, _, err = fedmerge(tmp_path, "--all")
    assert code == 2
    assert "holds no run" in err


def test_a_mixture_of_experts_has_no_single_adapter_but_has_a_soup(
    fedmerge, tmp_path, smoke, smoke_engine
):
    from fedmerge_peft import federate

    run = federate(smoke("strategy=fedem", "rounds=1"), tmp_path / "run", engine=smoke_engine)
    code, _, err = fedmerge(run.path, "--client", run.clients.index[0])
    assert code == 2
    assert "fedem mixes the predictions of its adapters" in err
    assert fedmerge(run.path, "--soup")[0] == 0
