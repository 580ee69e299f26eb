"""Runs on chats: conversations, exports with the chat template, the command of vLLM's server."""

from __future__ import annotations

import io
import json
import re
import shlex
import stat
from itertools import pairwise

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from fedmerge_peft import BackboneError, Recipe, Run, RunError, federate
from fedmerge_peft.cli import main
from fedmerge_peft.models.pretrained import load_model
from fedmerge_peft.runs.cleanup import files_in
from fedmerge_peft.runs.verify import verify
from fedmerge_peft.serving import merged_adapter
from fedmerge_peft.serving.conversation import Conversation
from fedmerge_peft.serving.export import export_all, export_client, export_soup
from fedmerge_peft.serving.vllm import serve_script

CLIENT = "Fen Water"
SETTINGS = {"max_new_tokens": 9, "stop_strings": ["~"], "system_prompt": 'Be "kind".\n'}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A run of one round on chats of two clients, with a system prompt and a stop string."""
    rows = [
        {
            "client": [CLIENT, "museum"][number % 2],
            "messages": [
                {"role": "user", "content": f"Question {number}"},
                {"role": "assistant", "content": f"Answer {number}"},
            ],
        }
        for number in range(12)
    ]
    recipe = Recipe(
        name="chats",
        task={"name": "causal-lm", **SETTINGS},
        rounds=1,
        backbone={"model": "tiny:llama"},
        lora={"r": 2, "target_modules": "all-linear"},
        data={"path": ".", "partition": {"scheme": "natural", "by": "client"}},
        strategy={"name": "fedmerge", "adapters": 2, "start": "independent"},
        training={"learning_rate": 0.1, "epochs": 1, "device": "cpu"},
    )
    folder = tmp_path_factory.mktemp("chats") / "run"
    return federate(recipe, folder, data=Dataset.from_list(rows))


def test_a_conversation_is_a_chat_with_the_clients_adapter(chats):
    talk = Conversation(chats, CLIENT, device="cpu")
    first = talk.ask("Hello")
    parts: list[str] = []
    second = talk.ask("And now?", parts.append)
    asked = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    asked += [{"role": "user", "content": "And now?"}]
    assert talk.messages == [*asked, {"role": "assistant", "content": second}]
    assert second == "".join(parts) == chats.predict({CLIENT: [asked]}, device="cpu")[CLIENT][0]
    talk.restart()
    assert talk.messages == []
    other = Conversation(chats, "museum", system="Be rude.", device="cpu")
    assert other.messages == [{"role": "system", "content": "Be rude."}]
    assert [first, second] != [other.ask("Hello"), other.ask("And now?")]


def test_a_pipeline_answers_chats_with_the_recipes_settings(chats, monkeypatch):
    def load_with_settings(*arguments):
        base, facts = load_model(*arguments)
        base.generation_config.update(no_repeat_ngram_size=1, do_sample=True, max_length=3)
        return base, facts

    monkeypatch.setattr(merged_adapter, "load_model", load_with_settings)
    chat = [{"role": "user", "content": "Hello"}]
    pipeline = chats.client(CLIENT).pipeline("cpu")
    answer = pipeline(chat)[0]["generated_text"][-1]["content"].partition("~")[0].strip()
    assert answer == chats.predict({CLIENT: [chat]}, device="cpu")[CLIENT][0]


@pytest.fixture
def chat(monkeypatch, capsys):
    """``chat(lines, *arguments)``: exit code and output of the command."""

    def call(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as stopped:
            main(["chat", *map(str, arguments)])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


def test_the_command_answers_lines_of_a_pipe(chats, chat):
    lines = ["Hello", "", "And now?", "/restart", "Hello", "/exit", "Never"]
    code, out, _ = chat(lines, chats.path, "--client", CLIENT, "--device", "cpu")
    talk = Conversation(chats, CLIENT, device="cpu")
    answers = [talk.ask("Hello"), talk.ask("And now?")]
    assert code == 0
    assert out.replace("\n", "") == "".join([*answers, answers[0]]).replace("\n", "")


def test_only_chats_can_be_continued(finished, chats, chat):
    run = finished("sequence-classification").run
    code, out, err = chat(["Hello"], run.path, "--client", "client 1")
    assert (code, out) == (2, "")
    assert f"{run.path}: its examples are not chats (task sequence-classification)" in err
    code, _, err = chat(["Hello"], chats.path, "--client", "Fen")
    assert code == 2
    assert "has no client 'Fen'" in err


# --- exports --------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["client", "soup", "saved"])
def test_exports_carry_the_template_and_the_settings(chats, tmp_path, what, capsys):
    folder = tmp_path / "mine"
    if what == "client":
        export_client(chats, CLIENT, folder)
    elif what == "soup":
        export_soup(chats, folder)
    else:
        chats.client(CLIENT).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert SETTINGS["system_prompt"].strip() in rendered
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.max_new_tokens, settings.stop_strings, settings.do_sample) == (9, ["~"], False)
    for file in folder.glob("*.json"):
        assert "fedmerge-" not in file.read_text()  # a temporary folder
    if what == "client":  # the code of the card prints an answer
        (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        lines = lines.replace("'tiny:llama'", repr(_saved(chats, tmp_path)))
        exec(compile(lines, "card", "exec"), {})
        answer = capsys.readouterr().out.partition("~")[0].strip()
        assert answer == chats.predict({CLIENT: [chat]}, device="cpu")[CLIENT][0]


def _saved(run, folder):
    """Save the run's tiny model."""
    from fedmerge_peft.models.pretrained import model_folder

    (folder / "base").mkdir()
    return model_folder(run.recipe.backbone, folder / "base")


def test_vllm_serves_one_adapter_for_each_client(chats, tmp_path):
    folder = export_all(chats, tmp_path / "everyone", base_model_id="acme/base", vllm=True)
    script = folder / "serve.sh"
    command = script.read_text().split("exec ")[1].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:4] == ["vllm", "serve", "acme/base", "--enable-lora"]
    options = dict(pairwise(words))
    assert options["--max-lora-rank"] == "8"
    assert json.loads(options["--override-generation-config"])["temperature"] == 0
    assert (folder / options["--chat-template"]).is_file()
    files = files_in(folder)
    assert verify(folder) == len(files)
    for file in files:  # the script, settings of generation and the tokenizer too
        content = file.read_bytes()
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(RunError, match=re.escape(file.name)):
            verify(folder)
        file.write_bytes(content)
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1 :]]
    assert [module["name"] for module in modules] == list(chats.client_names)
    for module in modules:
        config = json.loads((folder / module["path"] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == module["base_model_name"] == "acme/base"
        weights = load_file(folder / module["path"] / "adapter_model.safetensors")
        # vLLM reads a module's name between these ends, and knows no other tensors.
        assert all(
            re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in weights
        )
    assert "serve.sh" in (folder / "SHA256SUMS").read_text()
    assert stat.S_ISREG(script.stat().st_mode)


def test_a_server_runs_no_code_of_the_model_without_consent(chats):
    """A run directory is data: its recipe alone does not put the flag into a script."""
    run = Run.open(chats.path)
    asking = chats.recipe.replace(["backbone.trust_remote_code=true"])
    run._load_recipe = lambda path: asking
    with pytest.raises(BackboneError, match="may run code that comes with it"):
        serve_script(run, {CLIENT: "clinic"}, "acme/base")
    run.trust_remote_code = True
    assert "--trust-remote-code" in serve_script(run, {CLIENT: "clinic"}, "acme/base")


@pytest.mark.parametrize(("bits", "flag"), [("4bit", True), ("8bit", False), (None, False)])
def test_a_server_quantizes_the_weights_to_4_bits_as_the_run_did(chats, bits, flag):
    run = Run.open(chats.path)
    quantized = chats.recipe.replace([f"backbone.quantization={bits or 'null'}"])
    run._load_recipe = lambda path: quantized
    script = serve_script(run, {CLIENT: "clinic"}, "acme/base")
    assert ("--quantization bitsandbytes" in script) is flag


@pytest.mark.parametrize(
    ("task", "base", "reason"),
    [
        ("sequence-classification", "acme/base", "modules_to_save.*does not generate text"),
        ("causal-lm", "tiny:llama", "tiny:llama has no name that vLLM can load; name it with"),
    ],
)
def test_runs_that_vllm_cannot_serve_are_refused(finished, task, base, reason):
    with pytest.raises(RunError, match=f"vLLM cannot serve .*{reason}"):
        serve_script(finished(task).run, {"client 0": "client 0"}, base)
