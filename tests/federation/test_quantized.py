"""Federations on a decoder of 4 or 8 bits (QLoRA), on the CPU."""

import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from equality import tolerance
from fedmerge_peft import BackboneError, RecipeError
from fedmerge_peft.serving.export import export_client, export_soup
from task_bench import run_of

pytest.importorskip("bitsandbytes")

ROWS = [
    {"prompt": f"say {word}", "completion": f" {word} {client}", "client": client, "split": split}
    for client in ("clinic", "bank")
    for word in ("parcel", "refund", "password", "laptop")
    for split in ("train", "validation", "test")
]
TASK = {"name": "causal-lm", "metrics": ["perplexity"], "max_new_tokens": 4}


def quantized(tiny_models, bits, **training):
    return {
        "backbone": {
            "model": str(tiny_models / "llama"),
            "quantization": bits,
            "gradient_checkpointing": True,
        },
        "lora": {"r": 32, "target_modules": "all-linear"},
        "training": {"optimizer": "adamw_8bit", "steps": 4, **training},
        "evaluation": {"finetuned": False},
    }


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "run"
    return run_of(folder, ROWS, TASK, **quantized(tiny_models, "4bit"))


def test_a_federation_on_4_bits_learns(finished):
    losses = finished.metrics["train_loss"]
    assert float(losses.iloc[-1]) < 0.9 * float(losses.iloc[0])


def test_predictions_and_plain_peft_read_the_adapter_on_4_bits(finished, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    assert set(finished.predict({"bank": ["say parcel"]})) == {"bank"}
    folder = export_client(finished, "bank", tmp_path / "bank")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(
        finished.recipe.backbone.model, quantization_config=config, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, folder).eval()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        found = model(tokens).logits
        own = finished.client("bank").model()(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
    moved = (found - plain).norm()
    assert (own - found).norm() <= tolerance(torch.bfloat16) * moved


def test_a_pipeline_generates_on_4_bits(finished):
    pipeline = finished.client("bank").pipeline("cpu", max_new_tokens=2, do_sample=False)
    assert pipeline("say parcel")[0]["generated_text"].startswith("say parcel")


def test_eight_bits_run_too(tiny_models, tmp_path):
    run = run_of(tmp_path / "run", ROWS, TASK, **quantized(tiny_models, "8bit", steps=1))
    assert len(run.metrics) >= 2


def code_of(folder):
    """Run the code of a folder's card, and return its variables."""
    card = (folder / "README.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(lines, names)
    return names


def logits_and_effect(model):
    """Logits of some tokens, and the norm of the adapter's part in them."""
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        found = model(tokens).logits
        with model.disable_adapter():
            return found, (found - model(tokens).logits).norm()


@pytest.mark.parametrize("export", [export_client, export_soup])
def test_the_card_says_that_the_weights_were_quantized_and_loads_them_so(
    finished, tmp_path, export, monkeypatch
):
    name = () if export is export_soup else ("bank",)
    card = (export(finished, *name, tmp_path / "exported") / "README.md").read_text("utf-8")
    assert "| base weights in training | quantized to 4 bits (NF4) with bitsandbytes" in card
    # bitsandbytes 0.50 fails to pack weights of these shapes
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    names = code_of(tmp_path / "exported")
    assert names["base"].is_quantized
    config = names["base"].config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    client = name[0] if name else finished.client_names[0]
    own, moved = logits_and_effect(finished.client(client).model())
    found, _ = logits_and_effect(names["model"])
    assert (own - found).norm() <= tolerance(torch.bfloat16) * moved


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_new_head_and_pooler_are_not_quantized(tiny_models, tmp_path, bits, monkeypatch):
    labeled = [{"text": row["prompt"], "label": row["client"], **row} for row in ROWS]
    model = tmp_path / "bert"
    shutil.copytree(tiny_models / "bert", model)
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    sections = quantized(tiny_models, bits, steps=1)
    sections["backbone"] |= {"model": str(model), "gradient_checkpointing": False}
    run = run_of(tmp_path / "run", labeled, {"name": "sequence-classification"}, **sections)
    base = run.client("bank").model().get_base_model()
    kinds = {name: type(module).__name__ for name, module in base.named_modules()}
    assert kinds["classifier.modules_to_save.default"] == "Linear"
    assert kinds["bert.pooler.dense.modules_to_save.default"] == "Linear"
    assert any(kind.startswith(("Linear4", "Linear8")) for kind in kinds.values())
    folder = export_client(run, "bank", tmp_path / "exported")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    loaded = code_of(folder)["model"]
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        found = loaded(tokens).logits
        own = run.client("bank").model()(tokens).logits
    torch.testing.assert_close(found, own, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_whole_training_of_quantized_modules_is_refused(tiny_models, tmp_path, bits):
    sections = quantized(tiny_models, bits)
    sections["lora"] = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    with pytest.raises(BackboneError, match=r"down_proj has quantized weights, which cannot be tr"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)


@pytest.fixture(scope="module")
def model_of_4_bits(tiny_models, tmp_path_factory):
    """A decoder whose weights are stored in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("stored") / "llama"
    shutil.copytree(tiny_models / "llama", folder)
    (folder / "model.safetensors").unlink()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_models / "llama", quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def test_stored_weights_of_4_bits_are_trained_on_as_they_are(
    tiny_models, model_of_4_bits, tmp_path, monkeypatch
):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    runs = []
    for name, model, bits in (
        ("stored", model_of_4_bits, None),
        ("now", tiny_models / "llama", "4bit"),
    ):
        sections = quantized(tiny_models, bits, steps=1)
        sections["backbone"] |= {"model": str(model), "double_quantization": False}
        runs.append(run_of(tmp_path / name, ROWS, TASK, **sections))
    losses = [torch.tensor(run.metrics["train_loss"].to_list()) for run in runs]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_second_quantization_is_refused(model_of_4_bits, tiny_models, tmp_path, bits):
    sections = quantized(tiny_models, bits)
    sections["backbone"] |= {"model": str(model_of_4_bits)}
    with pytest.raises(BackboneError, match="is quantized already"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)


def test_an_update_of_stored_weights_of_4_bits_is_refused(model_of_4_bits, tiny_models, tmp_path):
    sections = {**quantized(tiny_models, None), "strategy": {"name": "flora"}, "baselines": []}
    sections["backbone"] |= {"model": str(model_of_4_bits)}
    with pytest.raises(BackboneError, match="are quantized, and cannot be updated"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before the first round


def test_a_baseline_that_updates_stored_weights_of_4_bits_is_refused_before_the_first_round(
    model_of_4_bits, tiny_models, tmp_path
):
    sections = {**quantized(tiny_models, None), "baselines": [{"name": "flora"}]}
    sections["backbone"] |= {"model": str(model_of_4_bits)}
    with pytest.raises(BackboneError, match="are quantized, and cannot be updated"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_products_in_8_bits_do_not_fill_the_log(tiny_models, tmp_path):
    run_of(tmp_path / "run", ROWS, TASK, **quantized(tiny_models, "8bit", steps=1))
    assert logging.getLogger("bitsandbytes.autograd._functions").getEffectiveLevel() >= 40


def test_an_update_of_quantized_weights_is_refused(tiny_models, tmp_path):
    sections = {**quantized(tiny_models, "4bit"), "strategy": {"name": "flora"}, "baselines": []}
    with pytest.raises(RecipeError, match="flora adds its updates to the backbone's weights, but"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)
    assert not (tmp_path / "run").exists()
