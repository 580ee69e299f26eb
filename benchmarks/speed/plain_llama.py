"""Plain programs with PEFT on the examples of an engine: with Accelerate, and with a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.engines.local import LocalEngine


def examples(engine: LocalEngine) -> list[dict[str, Tensor]]:
    """Return the training examples of all clients."""
    columns = engine.runtime.examples.columns
    return [
        {name: columns[name][row] for name in ("input_ids", "labels")}
        for client in engine.clients
        for row in client.train
    ]


def new_model(engine: LocalEngine) -> Any:
    """Load the engine's model anew and add LoRA, as the guides of PEFT do; with 4 bits, QLoRA."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    recipe = engine.recipe
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.backbone.dtype)}
    if quantized := recipe.backbone.quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=recipe.backbone.double_quantization,
        )
        options["device_map"] = {"": engine.runtime.device}
    loaded = AutoModelForCausalLM.from_pretrained(recipe.backbone.model, **options)
    for module in loaded.modules():  # on a CPU, bitsandbytes fails to pack some shapes of weights
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if quantized:
        checkpointing = recipe.backbone.gradient_checkpointing
        loaded = prepare_model_for_kbit_training(
            loaded,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        target_modules=list(recipe.lora.target_modules or []),
    )
    return get_peft_model(loaded, config)


def loop(engine: LocalEngine, batch: int) -> Callable[[], object]:
    """Return a function that trains for an epoch in a loop with Accelerate."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, default_collate

    training = engine.recipe.training
    accelerator = Accelerator(
        cpu=training.device == "cpu", mixed_precision=training.mixed_precision
    )
    model = new_model(engine)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loader: Any = DataLoader(examples(engine), batch, shuffle=True, collate_fn=default_collate)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, 1e-3), loader)
    model.train()

    def epoch() -> None:
        for inputs in loader:
            accelerator.backward(model(**inputs).loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def trainer(engine: LocalEngine, batch: int) -> Callable[[], object]:
    """Return a function that trains for an epoch with one Trainer of transformers."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    training = engine.recipe.training
    on_cpu = training.device == "cpu"
    paged = training.optimizer == "paged_adamw_8bit"
    arguments = TrainingArguments(
        output_dir=gettempdir(),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        max_grad_norm=1.0,
        bf16=training.mixed_precision == "bf16",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    made = Trainer(new_model(engine), arguments, default_data_collator, examples(engine))  # type: ignore[arg-type]
    return made.train
