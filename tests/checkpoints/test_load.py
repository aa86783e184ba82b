"""Reading Hugging Face folders: what is read is what was written, and every fault is named."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax.checkpoints import export
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.lora.adapters import named_leaves
from tests import tiny

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def split(folder: Path) -> dict[str, str]:
    """The checkpoint's tensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def same(a: object, b: object) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_every_tensor_is_in_its_place(folder):
    stored = load_file(folder / "model.safetensors")
    params = qj.load(folder).params
    for layer in range(2):
        for ours, theirs in (("self_attn/k_proj", "self_attn.k_proj"), ("mlp/down_proj",) * 2):
            group, module = ours.split("/")
            kernel = params["layers"][group][module]["kernel"][layer]
            name = f"model.layers.{layer}.{theirs.replace('/', '.')}.weight"
            np.testing.assert_array_equal(kernel, stored[name].T)
    np.testing.assert_array_equal(
        params["embed_tokens"]["embedding"], stored["model.embed_tokens.weight"]
    )
    assert len(jax.tree.leaves(params)) == 11


def test_quantizing_while_loading_is_quantizing_afterwards(folder):
    at_once = qj.load(folder, quantization=qj.NF4()).params
    later = qj.quantize_tree(qj.load(folder).params, qj.NF4())
    assert same(at_once, later)
    kernels = [x for x in named_leaves(at_once).values() if isinstance(x, qj.QuantizedArray)]
    assert len(kernels) == 7


def test_shards_are_read_like_one_file(folder, copy):
    split(copy)
    assert same(qj.load(copy).params, qj.load(folder).params)


def test_bfloat16_files_keep_their_bits(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    halves = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    save_file(halves, copy / "model.safetensors")
    kernel = qj.load(copy, dtype=jnp.bfloat16).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert (kernel[1] == halves["model.layers.1.mlp.up_proj.weight"].T).all()


def test_everything_that_does_not_fit_is_listed(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.7.extra.weight"] = np.zeros(3, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(qj.QloraError) as error:
        qj.load(copy)
    text = str(error.value)
    assert "model.norm.weight: missing" in text
    assert "model.layers.1.mlp.up_proj.weight: has shape (3, 4), expected (128, 64)" in text
    assert "model.layers.7.extra.weight: surplus" in text
    assert text.count("\n") == 3


def test_a_weight_that_is_not_finite_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = np.nan
    tensors["model.embed_tokens.weight"][0, 0] = np.inf
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        qj.QloraError, match="embed_tokens.weight: holds numbers that are not finite"
    ):
        qj.load(copy, quantization=qj.NF4())
    tensors["model.embed_tokens.weight"][0, 0] = 0
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(qj.QloraError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 8192"):
        qj.load(copy, quantization=qj.NF4())


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "a\\b", "deep/x"])
def test_an_index_that_leaves_its_folder_is_refused(file, copy):
    split(copy)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(qj.QloraError, match="refusing"):
        qj.load(copy)


def test_an_index_and_its_files_must_agree(copy):
    weight_map = split(copy)
    (copy / weight_map["model.norm.weight"]).unlink()
    with pytest.raises(qj.QloraError, match="which is not there; incomplete download"):
        qj.load(copy)


def test_a_tensor_that_its_shard_lacks_is_named(copy):
    split(copy)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(qj.QloraError, match=r"not in the files it names: model\.ghost\.weight"):
        qj.load(copy)


def test_a_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(qj.QloraError, match="cannot be read as safetensors"):
        qj.load(copy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_a_configuration_that_is_not_supported(settings, message, copy):
    change(copy, **settings)
    with pytest.raises(qj.QloraError, match=message):
        qj.load(copy)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(qj.QloraError, match="no such file or folder"):
        qj.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(qj.QloraError, match="config.json is not there"):
        qj.load(tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(qj.QloraError, match="give the folder"):
        qj.load(tmp_path / "weights.bin")


def test_pickles_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(qj.QloraError, match="pickles"):
        qj.load(copy)


def test_an_untied_head_must_be_there(copy):
    change(copy, tie_word_embeddings=False)
    with pytest.raises(qj.QloraError, match=r"lm_head\.weight: missing"):
        qj.load(copy)


def test_a_quantized_model_comes_back_as_it_was(folder, tmp_path):
    model = qj.load(folder, quantization=qj.FP4(block_size=32))
    save_quantized(tmp_path / "q", model)
    again = qj.load(tmp_path / "q")
    assert same(again.params, model.params)
    assert repr(again.params["layers"]["mlp"]["up_proj"]["kernel"]) == repr(
        model.params["layers"]["mlp"]["up_proj"]["kernel"]
    )
    assert again.config == model.config
    assert again.tokenizer("abc")["input_ids"] == model.tokenizer("abc")["input_ids"]
    with pytest.raises(qj.QloraError, match="already quantized as"):
        qj.load(tmp_path / "q", quantization=qj.NF4())
    with pytest.raises(qj.QloraError, match="already there"):
        save_quantized(tmp_path / "q", model)
    with pytest.raises(qj.QloraError, match="0 4-bit formats"):
        save_quantized(tmp_path / "dense", qj.load(folder))
    assert not (tmp_path / "dense").exists()


def test_export_is_the_inverse_of_import(folder, tmp_path, monkeypatch):
    model = qj.load(folder)
    export.save_pretrained(tmp_path / "one", model, dtype=jnp.float32)
    stored, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "one"))
    assert stored.keys() == again.keys()
    assert all((stored[name] == again[name]).all() for name in stored)
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    export.save_pretrained(tmp_path / "many", model, dtype=jnp.float32)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert same(qj.load(tmp_path / "many").params, model.params)
    assert not list(tmp_path.glob(".*"))


def test_export_merges_adapters_on_the_way(folder, tmp_path):
    model = qj.load(folder, quantization=qj.NF4())
    adapters = qj.lora.init(jax.random.key(0), model.params, qj.LoraConfig(rank=4))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    tree = qj.lora.attach(model.params, adapters)
    export.save_pretrained(tmp_path / "merged", model, tree, dtype=jnp.float32)
    merged = qj.lora.merge(model.params, adapters)
    again = qj.load(tmp_path / "merged").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), again, merged)
