"""Encoders in files: heads that are there, absent, or for other labels; names old and bare."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.names import parameters
from qlora_jax.checkpoints.peft.target_names import target_names, whole_modules
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.errors import QloraError
from tests import tiny
from tests.models.test_encoders import BERT, DEBERTA, ROBERTA, make_model

pytestmark = pytest.mark.standard_promotion


def write(folder: Path, hf: dict[str, Any], architecture: str, **settings: Any) -> Any:
    model = make_model(hf, architecture, **settings)
    save_pretrained(folder, model, dtype=jnp.float32)
    return model


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


def rename(folder: Path, change: Any, **more: np.ndarray) -> None:
    file = folder / "model.safetensors"
    save_file({change(name): x for name, x in load_file(file).items()} | more, file)


@pytest.mark.parametrize(
    ("hf", "architecture"),
    [
        (BERT, "BertForMaskedLM"),
        (ROBERTA, "RobertaForSequenceClassification"),
        (DEBERTA, "DebertaV2ForMaskedLM"),
    ],
)
def test_read_as_written(hf, architecture, tmp_path):
    model = write(tmp_path / "m", hf, architecture)
    loaded = qj.load(tmp_path / "m")
    assert loaded.config == model.config
    assert same(loaded.params, model.params)
    assert repr(loaded).startswith(f"EncoderModel({hf['model_type']}, 2 layers")


def test_old_names_and_what_is_left_out(tmp_path):
    """gamma and beta; numbers of positions; a table and a head that the model does not use."""
    folder = tmp_path / "m"
    model = write(folder, DEBERTA, "DebertaV2ForSequenceClassification")
    rename(
        folder,
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
        **{
            "deberta.embeddings.position_ids": np.arange(32)[None],
            "deberta.embeddings.position_embeddings.weight": np.ones((32, 32), np.float32),
            "mask_predictions.dense.weight": np.ones((32, 32), np.float32),
        },
    )
    assert same(qj.load(folder).params, model.params)
    rename(folder, lambda n: n, **{"deberta.encoder.extra.weight": np.ones(3, np.float32)})
    with pytest.raises(QloraError, match=r"deberta.encoder.extra.weight: surplus"):
        qj.load(folder)


def test_a_bare_encoder_gets_a_head(tmp_path, caplog):
    folder = tmp_path / "m"
    model = write(folder, BERT, "BertModel")
    rename(folder, lambda n: n.removeprefix("bert."))
    assert qj.load(folder).config.head is None
    with caplog.at_level(logging.WARNING):
        loaded = qj.load(folder, head="classification", num_labels=3, quantization=qj.NF4())
    for module in ("pooler", "classifier"):
        assert f"its {module} is not there: initialized at random (seed 0)" in caplog.text
    assert same(loaded.params["embeddings"], model.params["embeddings"])
    assert loaded.params["classifier"]["kernel"].shape == (32, 3)
    assert isinstance(loaded.params["pooler"]["dense"]["kernel"], jax.Array)
    layer = loaded.params["encoder"]["layer"]
    assert isinstance(layer["attention"]["self"]["query"]["kernel"], qj.QuantizedArray)
    again = qj.load(folder, head="classification", num_labels=3)
    other = qj.load(folder, head="classification", num_labels=3, seed=1)
    assert same(again.params["classifier"], loaded.params["classifier"])
    assert not same(again.params["classifier"], other.params["classifier"])


def test_another_head_and_other_labels(tmp_path, caplog):
    folder = tmp_path / "m"
    model = write(folder, ROBERTA, "RobertaForSequenceClassification")
    loaded = qj.load(folder, head="classification")
    assert same(loaded.params, model.params) and not caplog.text
    three = qj.load(folder, num_labels=3)
    assert "its classifier is not for 3 labels" in caplog.text
    assert three.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert three.params["classifier"]["out_proj"]["kernel"].shape == (32, 3)
    words = qj.load(folder, head="masked-lm")
    assert words.apply(words.params, jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 40)
    # What a checkpoint says of itself is not made up.
    file = folder / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if "out_proj" not in n}, file)
    with pytest.raises(QloraError, match=r"classifier.out_proj.weight: missing"):
        qj.load(folder)


def test_a_quantized_folder_and_a_new_head(tmp_path, caplog):
    write(tmp_path / "m", ROBERTA, "RobertaForMaskedLM")
    model = qj.load(tmp_path / "m", quantization=qj.NF4())
    save_quantized(tmp_path / "q", model)
    assert same(qj.load(tmp_path / "q").params, model.params)
    loaded = qj.load(tmp_path / "q", head="classification", num_labels=1)
    assert "its classifier is not there" in caplog.text
    assert same(loaded.params["encoder"], model.params["encoder"])
    assert set(loaded.params) == {"embeddings", "encoder", "classifier"}
    assert loaded.apply(loaded.params, jnp.ones((2, 4), jnp.int32)).shape == (2, 1)


def test_requests_that_cannot_be_met(tmp_path):
    tiny.write_checkpoint(tmp_path / "llama")
    with pytest.raises(QloraError, match="settings of an encoder, which a llama is not"):
        qj.load(tmp_path / "llama", head="classification")
    write(tmp_path / "bare", BERT, "BertModel")
    with pytest.raises(QloraError, match="say which by head="):
        qj.load(tmp_path / "bare", num_labels=3)
    with pytest.raises(QloraError, match="head 'tagging' is not supported"):
        qj.load(tmp_path / "bare", head="tagging")
    with pytest.raises(QloraError, match="needs at least one label"):
        qj.load(tmp_path / "bare", head="classification", num_labels=0)


def test_names_that_mean_no_other_module():
    """ "dense" would also name the pooler's; both outputs of a layer end in output.dense."""
    table = list(parameters(make_model(BERT, "BertForSequenceClassification").config))
    layer = "bert.encoder.layer.{}."

    def everywhere(*ends: str) -> list[str]:
        return [layer.format(i) + end for i in range(2) for end in ends]

    def names(*ends: str, full: tuple[str, ...] = ()) -> set[str]:
        return target_names(everywhere(*ends), full, table)

    assert names("attention.self.query") == {"query"}
    both = ("attention.output.dense", "output.dense")
    assert names(*both) == {"output.dense"}
    assert names("attention.output.dense") == {"attention.output.dense"}
    assert names("output.dense") == set(everywhere("output.dense"))
    assert names(*both, "intermediate.dense", full=("bert.pooler",)) == {"dense"}
    assert target_names([layer.format(1) + "attention.self.key"], (), table) == {
        layer.format(1) + "attention.self.key"
    }


def test_modules_that_are_whole():
    table = list(parameters(make_model(ROBERTA, "RobertaForSequenceClassification").config))
    both = ["classifier.dense", "classifier.out_proj"]
    assert whole_modules(both, table) == {"classifier"}
    assert whole_modules(both[:1], table) == {"classifier.dense"}
    norm = "roberta.encoder.layer.{}.output.LayerNorm"
    assert whole_modules([norm], table) == {"output.LayerNorm"}


def test_an_adapter_comes_back(tmp_path):
    write(tmp_path / "m", DEBERTA, "DebertaV2ForSequenceClassification")
    model = qj.load(tmp_path / "m", quantization=qj.NF4())
    config = qj.LoraConfig(rank=2, alpha=4, modules_to_save=("pooler", "classifier"))
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    qj.peft.save(tmp_path / "a", adapters, model, config)
    loaded, _ = qj.peft.load(tmp_path / "a", model)
    assert loaded.keys() == adapters.keys()
    assert same(loaded, adapters)


def test_an_adapter_of_tied_words_is_refused(tmp_path):
    model = make_model(BERT, "BertForMaskedLM")
    config = qj.LoraConfig(rank=2, targets=("query", "word_embeddings"))
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    with pytest.raises(QloraError, match="the masked-lm head is tied to it"):
        qj.peft.save(tmp_path / "a", adapters, model, config)
    assert not (tmp_path / "a").exists()
