"""PEFT's files, both ways; that PEFT itself agrees is shown in tests/parity."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from tests import tiny

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> qj.Model:
    return qj.load(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny")), quantization=qj.NF4())


def trained(model: qj.Model, config: qj.LoraConfig | qj.VeraConfig) -> dict:
    """Adapters in which nothing that is trained is zero."""
    adapters = qj.lora.init(jax.random.key(1), model.params, config)
    leaves, tree = jax.tree.flatten(adapters)
    moved = jax.tree.leaves(qj.lora.trained_mask(adapters))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(k, x.shape) if m else x
        for x, k, m in zip(leaves, keys, moved, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize(
    "config",
    [
        qj.LoraConfig(rank=4, alpha=8),
        qj.LoraConfig(rank=4, alpha=12, rslora=True, dropout=0.1),
        qj.LoraConfig(
            rank=4, alpha=8, targets=("q_proj", "embed_tokens"), rank_pattern={"q_proj": 2}
        ),
        qj.LoraConfig(rank=4, alpha=8, alpha_pattern={"mlp.*": 3}, modules_to_save=("norm",)),
        qj.LoraConfig(rank=4, alpha=8, dora=True, targets=("v_proj", "up_proj")),
        qj.VeraConfig(rank=4, dropout=0.1, d_initial=0.3, modules_to_save=("norm",)),
        qj.VeraConfig(rank=4, targets=("k_proj",), projection_prng_key=5, save_projection=False),
    ],
    ids=["plain", "rslora", "ranks", "alphas and a norm in full", "dora", "vera", "vera, drawn"],
)
def test_what_is_saved_is_loaded(config, model, tmp_path):
    adapters = trained(model, config)
    qj.peft.save(tmp_path / "a", adapters, model, config)
    again, found = qj.peft.load(tmp_path / "a", model)
    assert jax.tree.structure(adapters) == jax.tree.structure(again)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), adapters, again))
    kept = ("dropout", "rslora", "dora", "d_initial", "projection_prng_key", "save_projection")
    for name in kept:
        assert getattr(found, name, None) == getattr(config, name, None)
    fresh = qj.lora.init(jax.random.key(0), model.params, found)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapters)


def test_folders_in_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = qj.LoraConfig(rank=4, targets=("k_proj",))
    qj.peft.save("~/a", trained(model, config), model, config)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    qj.peft.load("~/a", model)


def test_names_and_shapes_are_pefts(model, tmp_path):
    config = qj.LoraConfig(rank=4, alpha=8, targets=("k_proj",))
    qj.peft.save(tmp_path, trained(model, config), model, config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {
        f"base_model.model.model.layers.{i}.self_attn.k_proj.lora_{f}.weight": shape
        for i in (0, 1)
        for f, shape in (("A", (4, 64)), ("B", (32, 4)))
    }
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["k_proj"]}
    assert about.items() >= expected.items()


@pytest.fixture
def saved(model: qj.Model, tmp_path: Path) -> Path:
    config = qj.LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    qj.peft.save(tmp_path / "a", trained(model, config), model, config)
    return tmp_path / "a"


def change(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_layers_may_differ(model, saved):
    """A layer of lower rank is padded, one that layers_to_transform leaves out does nothing."""
    file = saved / "adapter_model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if ".layers.1." in name}
    prefix = "base_model.model.model.layers."
    a, b = (f"{prefix}1.self_attn.q_proj.lora_{f}.weight" for f in "AB")
    tensors[a], tensors[b] = tensors[a][:2].copy(), tensors[b][:, :2].copy()
    save_file(tensors, file)
    change(saved, rank_pattern={"layers.1.self_attn.q_proj": 2}, layers_to_transform=[1])
    adapters, _ = qj.peft.load(saved, model)
    assert adapters["layers/self_attn/q_proj/kernel"].scaling == (0.0, 4.0)
    assert adapters["layers/self_attn/v_proj/kernel"].scaling == (0.0, 2.0)
    dense = qj.lora.merge(model.params, adapters)["layers"]["self_attn"]
    base = model.params["layers"]["self_attn"]
    change_q = dense["q_proj"]["kernel"][1] - base["q_proj"]["kernel"].dequantize()[1]
    np.testing.assert_allclose(change_q, 4.0 * (tensors[b] @ tensors[a]).T, atol=1e-6)
    assert (dense["v_proj"]["kernel"][0] == base["v_proj"]["kernel"].dequantize()[0]).all()
    # Written anew, the layers that have one are named.
    qj.peft.save(saved, adapters, model)
    about = json.loads((saved / "adapter_config.json").read_text())
    assert about["target_modules"] == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert load_file(file).keys() == tensors.keys()
    again, _ = qj.peft.load(saved, model)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), adapters, again))
    assert jax.tree.structure(adapters) == jax.tree.structure(again)


def drop(folder: Path, *parts: str) -> None:
    """The adapter without the tensors whose names hold one of `parts`."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: x for n, x in tensors.items() if not any(p in n for p in parts)}, file)


@pytest.mark.parametrize(
    ("settings", "parts", "missing"),
    [
        ({}, ["0.self_attn.q_proj"], ["0.self_attn.q_proj"]),
        ({}, ["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"layers_to_transform": [0]}, ["q_proj", "1."], ["0.self_attn.q_proj"]),
        ({"layers_to_transform": 1}, ["layers.0"], []),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, ["layers.0"], []),
        ({"exclude_modules": ["q_proj"]}, ["q_proj"], []),
        ({"exclude_modules": r".*\.0\..*"}, ["layers.0"], []),
        ({"target_modules": r".*\.1\..*\.(q|v)_proj"}, ["layers.0"], []),
        ({"target_modules": r".*\.(q|v)_proj"}, ["1.self_attn.v"], ["1.self_attn.v_proj"]),
        (
            {"target_modules": ["v_proj", "model.layers.1.self_attn.q_proj"]},
            ["0.self_attn.q_proj"],
            [],
        ),
    ],
)
def test_what_is_missing_is_what_the_description_names(settings, parts, missing, model, saved):
    change(saved, **settings)
    drop(saved, *parts)
    if not missing:
        qj.peft.load(saved, model)
        return
    with pytest.raises(qj.QloraError) as error:
        qj.peft.load(saved, model)
    lines = str(error.value).split("\n")[1:]
    assert lines == [
        f"  model.layers.{name}: missing, an adapter that target_modules names" for name in missing
    ]


def test_what_the_description_does_not_name_is_refused(model, saved):
    change(saved, target_modules=["q_proj"])
    with pytest.raises(qj.QloraError, match=r"0\.self_attn\.v_proj: has an adapter, which target_"):
        qj.peft.load(saved, model)


def test_modules_trained_in_full_may_not_be_missing(model, tmp_path):
    config = qj.LoraConfig(rank=2, targets=("q_proj",), modules_to_save=("norm",))
    qj.peft.save(tmp_path, trained(model, config), model, config)
    drop(tmp_path, "model.norm.weight")
    with pytest.raises(qj.QloraError, match=r"model\.norm\.weight: missing, of a module that mod"):
        qj.peft.load(tmp_path, model)


def test_an_adapter_does_not_change_with_its_file(model, saved):
    before, _ = qj.peft.load(saved, model)
    adapters, _ = qj.peft.load(saved, model)
    file = saved / "adapter_model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for x, y in zip(*map(jax.tree.leaves, (adapters, before)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.any(x)


def test_factors_must_be_finite_floating_point_numbers(model, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers."
    tensors[f"{prefix}0.self_attn.q_proj.lora_A.weight"][:, 3] = np.nan
    tensors[f"{prefix}1.self_attn.q_proj.lora_B.weight"][2, 1] = np.inf
    name = f"{prefix}1.self_attn.v_proj.lora_A.weight"
    tensors[name] = tensors[name].astype(np.int32)
    save_file(tensors, file)
    with pytest.raises(qj.QloraError) as error:
        qj.peft.load(saved, model)
    text = str(error.value)
    assert "0.self_attn.q_proj.lora_A.weight: 4 of 256 elements are not finite as float32" in text
    assert "1.self_attn.q_proj.lora_B.weight: 1 of 256 elements" in text
    assert "1.self_attn.v_proj.lora_A.weight: has the type int32, expected floating-point" in text
    assert text.count("\n") == 3


def test_factors_without_numbers_are_misshapen(model, saved):
    """As DeepSpeed's third stage leaves them where they were not gathered."""
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = np.zeros((0, 64), np.float32)
    save_file(tensors, file)
    with pytest.raises(qj.QloraError, match=r"0.self_attn.q_proj: A \(0, 64\) and B"):
        qj.peft.load(saved, model)


def test_adapters_that_are_not_finite_are_not_saved(model, tmp_path):
    adapters = trained(model, qj.LoraConfig(rank=4, targets=("q_proj", "v_proj")))
    path = "layers/self_attn/v_proj/kernel"
    broken = dataclasses.replace(adapters[path], b=adapters[path].b.at[1, 0].set(jnp.inf))
    with pytest.raises(qj.QloraError, match=rf"{path}/b: 32 of 256 elements are not finite"):
        qj.peft.save(tmp_path / "a", adapters | {path: broken}, model)
    assert not (tmp_path / "a").exists()


def test_everything_that_does_not_fit_is_listed(model, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers."
    del tensors[f"{prefix}0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{prefix}1.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 65), np.float32)
    tensors[f"{prefix}9.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 64), np.float32)
    save_file(tensors, file)
    with pytest.raises(qj.QloraError) as error:
        qj.peft.load(saved, model)
    text = str(error.value)
    assert "layers.0.self_attn.q_proj: has A, needs both A and B" in text
    assert "layers.1.self_attn.q_proj: A (4, 65)" in text
    assert "layers.9.self_attn.q_proj.lora_A.weight: the model has no such module" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "has A/B, needs A, B, magnitude"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a base that was changed"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": None}, "adapter_config.json: r is missing; expected a whole number"),
        ({"r": "x"}, "r is 'x', expected a whole number"),
        ({"r": 0}, "the rank r is 0, expected at least 1"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha is missing; expected a finite number"),
        ({"lora_dropout": "a"}, "lora_dropout is 'a', expected a finite number"),
        ({"use_rslora": "x"}, "use_rslora is 'x', expected true or false"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
        ({"rank_pattern": {"q_proj": 0}}, "the rank q_proj is 0, expected at least 1"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\] is 'x'"),
        ({"rank_pattern": {"([": 3}}, "adapter_config.json: unterminated character set"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [1]}, "target_modules is 1, expected text"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is '0', expected a whole number"),
        ({"r": 8}, r"A \(4, 64\) and B \(64, 4\), expected \(8, 64\)"),
    ],
)
def test_variants_that_are_not_supported(settings, message, model, saved):
    change(saved, **settings)
    with pytest.raises(qj.QloraError, match=message):
        qj.peft.load(saved, model)


def test_a_tied_embedding_needs_weight_tying(model, tmp_path):
    config = qj.LoraConfig(rank=2, targets=("embed_tokens",))
    qj.peft.save(tmp_path, trained(model, config), model, config)
    qj.peft.load(tmp_path, model)
    change(tmp_path, ensure_weight_tying=False)
    with pytest.raises(qj.QloraError, match="tied to its embedding"):
        qj.peft.load(tmp_path, model)


def test_the_table_that_peft_writes_beside_the_adapter_of_an_embedding(model, tmp_path):
    """Its `save_embedding_layers="auto"`."""
    config = qj.LoraConfig(rank=2, targets=("q_proj", "embed_tokens"))
    qj.peft.save(tmp_path, trained(model, config), model, config)
    path = tmp_path / "adapter_model.safetensors"
    tensors, table = load_file(path), np.asarray(model.params["embed_tokens"]["embedding"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    expected, _ = qj.peft.load(tmp_path, model)
    save_file(tensors | {name: table}, path)
    adapters, _ = qj.peft.load(tmp_path, model)
    assert adapters.keys() == expected.keys()
    for other, message in ((table[:-1], "resized"), (table + 1, "not the model's own")):
        save_file(tensors | {name: other}, path)
        with pytest.raises(qj.QloraError, match=message):
            qj.peft.load(tmp_path, model)


def test_dora_and_vera_are_of_all_layers(model, tmp_path):
    """Where a layer has no adapter, its magnitudes and vectors would be trained all the same."""
    for config in (
        qj.LoraConfig(rank=2, targets=("q_proj",), dora=True),
        qj.VeraConfig(rank=2, targets=("q_proj",)),
    ):
        folder = tmp_path / type(config).__name__
        qj.peft.save(folder, trained(model, config), model, config)
        drop(folder, "layers.0")
        change(folder, layers_to_transform=[1])
        with pytest.raises(qj.QloraError, match=r"there is none of model\.layers\.0\.self_attn"):
            qj.peft.load(folder, model)


def test_a_tied_embedding_under_dora_is_refused(model, tmp_path):
    """PEFT would norm the head's rows, not the embedding's columns."""
    adapters = trained(model, qj.LoraConfig(rank=2, targets=("embed_tokens",), dora=True))
    with pytest.raises(qj.QloraError, match="norms of their own under DoRA"):
        qj.peft.save(tmp_path, adapters, model)


def test_projections_that_are_missing_or_do_not_fit(model, tmp_path):
    config = qj.VeraConfig(rank=4, targets=("up_proj",))
    adapters = trained(model, config)
    qj.peft.save(tmp_path, adapters, model, config)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert tensors["base_model.vera_A"].shape == (4, 64)
    assert tensors["base_model.vera_B"].shape == (128, 4)
    save_file(tensors | {"base_model.vera_B": np.ones((127, 4), np.float32)}, file)
    with pytest.raises(qj.QloraError, match=r"vera_B \(127, 4\), expected at least \(4, 64\) and"):
        qj.peft.load(tmp_path, model)
    drop(tmp_path, "vera_A")
    with pytest.raises(qj.QloraError, match="base_model.vera_A and base_model.vera_B: needed"):
        qj.peft.load(tmp_path, model)
    other = dataclasses.replace(config, projection_prng_key=1, save_projection=False)
    with pytest.raises(qj.QloraError, match="they must be stored"):
        qj.peft.save(tmp_path, adapters, model, other)


def test_faults(model, saved, tmp_path, monkeypatch):
    with pytest.raises(qj.QloraError, match="adapter_config.json is not there"):
        qj.peft.load(tmp_path / "nowhere", model)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # which import then does not find
    with pytest.raises(qj.QloraError, match=r"adapter_model\.bin needs the package torch"):
        qj.peft.load(saved, model)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(qj.QloraError, match=r"neither adapter_model\.safetensors nor adapter_mod"):
        qj.peft.load(saved, model)
    with pytest.raises(qj.QloraError, match="no parameters"):
        qj.peft.save(tmp_path / "b", {"nothing/kernel": jnp.zeros(3)}, model)
    with pytest.raises(qj.QloraError, match="quantized here"):
        dense = dataclasses.replace(model, params=qj.quant.dequantize_tree(model.params))
        full = qj.lora.init(
            jax.random.key(0), dense.params, qj.LoraConfig(targets=(), modules_to_save=("q_proj",))
        )
        qj.peft.save(tmp_path / "c", full, dense)
        qj.peft.load(tmp_path / "c", model)
