"""Checkpoints that do not match their configuration, or hold something else."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.conftest import ImageTask, LabelTask, TextTask

from fedmerge_peft import BackboneError
from fedmerge_peft.models.pretrained import load_model, model_folder
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.tasks.sentence_embedding import SentenceEmbeddingTask

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 50}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}


class EmbeddingTask(TextTask):
    auto_model = SentenceEmbeddingTask.auto_model
    heads = SentenceEmbeddingTask.heads
    unused = SentenceEmbeddingTask.unused


def make(kind, head="Model", **changes):
    sizes = {"gpt2": GPT2, "t5": T5, "vit": IMAGES, "xlnet": XLNET}.get(kind, SIZES)
    config = hf.CONFIG_MAPPING[kind](**{**sizes, **changes})
    return getattr(hf, type(config).__name__.removesuffix("Config") + head)(config)


def load(model, folder, task=None, **config):
    """Save a model, change its configuration, and load it for a task."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return load_saved(folder, task)


def load_saved(folder, task=None):
    recipe = BackboneRecipe(model=str(folder))
    return load_model(
        recipe, task or LabelTask(), model_folder(recipe, folder), torch.device("cpu")
    )


def modules(names):
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (("bert",), {"classifier"}),
        (("bert", "ForMaskedLM"), {"classifier", "bert.pooler.dense"}),
        (("bert", "ForSequenceClassification"), set()),
        (("roberta", "ForMaskedLM"), {"classifier.dense", "classifier.out_proj"}),
        (("deberta-v2",), {"classifier", "pooler.dense"}),
        (("distilbert",), {"classifier", "pre_classifier"}),
        (("gpt2", "LMHeadModel"), {"score"}),
        (("gpt2",), {"score"}),
        (("llama", "ForCausalLM"), {"score"}),
        (("modernbert", "ForMaskedLM"), {"classifier"}),
        (
            ("t5", "ForConditionalGeneration"),
            {"classification_head.dense", "classification_head.out_proj"},
        ),
        (("xlnet", "LMHeadModel"), {"logits_proj", "sequence_summary.summary"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_heads_and_poolers_may_be_missing(model, heads, tmp_path):
    kind, *head = model
    changes = {"num_labels": 3}
    if kind == "distilbert":
        changes = {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32}
    if kind == "modernbert":
        changes = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    _, missing = load(make(kind, *head, **changes), tmp_path)
    assert modules(missing) == heads


@pytest.mark.parametrize("lacking", ["pooler.", "encoder.layer.1."])
def test_an_embedding_may_lack_the_pooler_alone(lacking, tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(
        {name: value for name, value in weights.items() if not name.startswith(lacking)},
        path,
        metadata={"format": "pt"},
    )
    if lacking == "pooler.":
        assert load_saved(tmp_path, EmbeddingTask())[1] == set()
    else:
        with pytest.raises(BackboneError, match=r"lack 16 of .*; none of them may be missing"):
            load_saved(tmp_path, EmbeddingTask())


def test_a_head_for_other_labels_is_replaced(tmp_path):
    model = make("bert", "ForSequenceClassification", num_labels=7)
    loaded, missing = load(model, tmp_path)
    assert missing == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.shape == (3, 16)


def test_the_head_of_a_model_without_a_prefix_is_its_last_module(tmp_path):
    config = hf.SiglipConfig(vision_config=IMAGES, text_config=SIZES)
    _, missing = load(hf.SiglipModel(config), tmp_path, ImageTask())
    assert missing == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("model", "task", "config", "message"),
    [
        (
            ("bert",),
            LabelTask,
            {"num_hidden_layers": 4},
            r"lack 32 of the tensors .*: bert\.encoder\.layer\.2\.attention.*, … and 29 more; "
            "only heads and poolers may be missing",
        ),
        (
            ("bert",),
            LabelTask,
            {"max_position_embeddings": 20},
            r"position_embeddings\.weight is \(32, 16\), not \(20, 16\)",
        ),
        (
            ("llama", "ForCausalLM"),
            TextTask,
            {"vocab_size": 60},
            r"lack 2 of .*lm_head.weight is \(50, 16\), not \(60, 16\)\); none of them may",
        ),
        (
            ("llama", "ForCausalLM"),
            TextTask,
            {"attention_bias": True},
            r"lack 8 of .*self_attn.k_proj.bias",
        ),
        (("llama",), TextTask, {}, r"lack 1 of .*: lm_head.weight;"),
        (("bert",), TextTask, {"is_decoder": True}, r"cls\.predictions\.bias"),
        (("bert",), LabelTask, {"num_hidden_layers": 1}, "leaves out 16 of its tensors: "),
        (
            ("bert", "ForMaskedLM"),
            LabelTask,
            {"num_hidden_layers": 1},
            r"leaves out .*: bert\.encoder\.layer\.1\.",
        ),
        (("gpt2", "LMHeadModel"), TextTask, {"n_layer": 1}, r"leaves out .*: transformer\.h\.1\."),
        (("t5", "EncoderModel"), LabelTask, {}, r"transformer\.decoder\.block\.0"),
        (("vit",), ImageTask, {"num_hidden_layers": 3}, r"vit\.(encoder\.)?layers?\.2"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple | dict) else "",
)
def test_other_differences_are_one_error_with_the_tensors(model, task, config, message, tmp_path):
    with pytest.raises(BackboneError, match=message) as error:
        load(make(*model), tmp_path, task(), **config)
    assert str(error.value).startswith("backbone.model: ")
    assert "\n" not in str(error.value)


def test_biases_without_a_place_are_refused(tmp_path):
    model = make("llama", "ForCausalLM", attention_bias=True)
    with pytest.raises(
        BackboneError, match=r"leaves out 8 of its tensors: .*self_attn\.k_proj\.bias"
    ):
        load(model, tmp_path, TextTask(), attention_bias=False)


def test_a_checkpoint_of_other_names_holds_no_weights(tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"0.auto.{name}": value for name, value in load_file(path).items()}, path)
    message = r"holds no weights of BertForSequenceClassification \(its tensors: 0\.auto\.embedding"
    with pytest.raises(BackboneError, match=message):
        load_saved(tmp_path)


def test_tensors_of_an_adapter_are_refused(tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "encoder.layer.0.attention.self.query.lora_A.weight"
    save_file({**load_file(path), name: torch.zeros(2, 16)}, path)
    with pytest.raises(
        BackboneError, match=r"include the weights of an adapter: .*lora_A.*merge the"
    ):
        load_saved(tmp_path)


def test_tied_matrices_are_not_missing(tmp_path):
    model, missing = load(
        make("llama", "ForCausalLM", tie_word_embeddings=True), tmp_path, TextTask()
    )
    assert not missing
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parts_of_a_checkpoint_are_all_read_or_refused(tmp_path):
    make("bert").save_pretrained(tmp_path, max_shard_size="5KB")
    first, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    _, missing = load_saved(tmp_path)
    assert modules(missing) == {"classifier"}
    first.unlink()
    with pytest.raises(BackboneError, match=r"lacks model-00001-.*names this file"):
        load_saved(tmp_path)


def test_a_damaged_file_is_one_error(tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r"model.safetensors is damaged or incomplete: "):
        load_saved(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BackboneError, match=r"model.safetensors is a pointer of Git LFS; git lfs"):
        load_saved(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_file_that_may_not_be_read_is_one_error(name, tmp_path, monkeypatch):
    make("bert").save_pretrained(tmp_path, max_shard_size="5KB" if "index" in name else "1GB")

    def refuse(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **options)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BackboneError, match=f"{name} cannot be opened: Permission denied; check"):
        load_saved(tmp_path)


def test_a_header_whose_length_begins_like_gzip_is_no_other_kind(tmp_path):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = path.read_bytes()
    end = 8 + int.from_bytes(saved[:8], "little")
    length = int.from_bytes(b"\x1f\x8b", "little")
    header = saved[8:end].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + saved[end:])
    load_saved(tmp_path)


def test_weights_under_another_name_are_named(tmp_path):
    make("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(BackboneError, match=r"neither .* \(but weights.safetensors\); download"):
        load_saved(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_their_description_are_refused(tmp_path, dtype):
    make("bert").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({**weights, name: weights[name].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=f"has {name} as (I8|F8_E4M3), so .* is quantized"):
        load_saved(tmp_path)


def test_an_unknown_quantization_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="quantized in a way that transformers does not know"):
        load(make("bert"), tmp_path, quantization_config={"quant_method": "unheard of"})


def test_folders_of_models_below_are_listed(tmp_path):
    make("bert").save_pretrained(tmp_path / "checkpoint-20")
    with pytest.raises(BackboneError, match="name one of the folders in it: checkpoint-20"):
        load_saved(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://hub.test/owner/name", "is a URL; write the hub id alone, such as owner/name"),
        ("models/bert/final", "is not a model folder"),
        (r"C:\models\bert", "is not a model folder"),
    ],
)
def test_places_that_are_no_hub_id_are_not_looked_for_there(tmp_path, name, message):
    with pytest.raises(BackboneError, match=message):
        model_folder(BackboneRecipe(model=name), tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    make("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"no safetensors file in .*Save the model again"):
        load_saved(tmp_path)


def test_a_folder_without_a_model_is_one_error(tmp_path):
    with pytest.raises(BackboneError, match=r"not a model folder \(no config.json in"):
        model_folder(BackboneRecipe(model=str(tmp_path)), tmp_path)


def adapter(model, folder):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_model_folder_with_an_adapter_is_refused(with_model, tmp_path):
    model = make("bert", "ForSequenceClassification", num_labels=3)
    if with_model:
        model.save_pretrained(tmp_path)
    adapter(model, tmp_path)
    with pytest.raises(BackboneError, match=r"holds a PEFT adapter .*merge_and_unload"):
        model_folder(BackboneRecipe(model=str(tmp_path)), tmp_path)


def test_an_adapter_that_transformers_loads_with_the_model_is_refused(tmp_path):
    """A model on the hub: its files are checked only after they are loaded."""
    model = make("bert", "ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    adapter(model, tmp_path)
    recipe = BackboneRecipe(model="hub/name")
    with pytest.raises(BackboneError, match="hub/name holds a PEFT adapter"):
        load_model(recipe, LabelTask(), str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "output"),
    [("bert", "classifier"), ("roberta", "classifier.out_proj"), ("gpt2", "score")],
)
def test_a_head_follows_the_order_of_the_labels(kind, output, tmp_path, caplog):
    labels = dict(enumerate(["Negative", "Neutral", "Positive"]))
    model = make(kind, "ForSequenceClassification", id2label=labels)
    held = model.get_submodule(output).weight.detach().clone()
    task = LabelTask()
    for names, order in [
        (("positive", "negative", "neutral"), [2, 0, 1]),
        (("negative", "neutral", "positive"), [0, 1, 2]),
        (("negative", "neutral", "mixed"), [0, 1, 2]),
    ]:
        caplog.clear()
        task.labels = names
        with caplog.at_level("INFO"):
            loaded, missing = load(model, tmp_path / "-".join(names), task)
        assert not missing
        assert torch.equal(loaded.get_submodule(output).weight, held[order])
        assert ("positive, negative, neutral" in caplog.text) == (order == [2, 0, 1])
