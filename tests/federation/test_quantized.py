"""Federations on a decoder of 4 or 8 bits (QLoRA), on the CPU."""

import pytest
import torch

from equality import tolerance
from fedmerge_peft import BackboneError
from fedmerge_peft.serving.export import export_client
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


def test_eight_bits_run_too(tiny_models, tmp_path):
    run = run_of(tmp_path / "run", ROWS, TASK, **quantized(tiny_models, "8bit", steps=1))
    assert len(run.metrics) >= 2


def test_an_update_of_quantized_weights_is_refused(tiny_models, tmp_path):
    sections = {**quantized(tiny_models, "4bit"), "strategy": {"name": "flora"}, "baselines": []}
    with pytest.raises(BackboneError, match="quantized weights cannot be updated"):
        run_of(tmp_path / "run", ROWS, TASK, **sections)
