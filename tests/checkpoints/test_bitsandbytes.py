"""bitsandbytes' 4-bit folders: codes and scales in, the same codes and scales out."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.checkpoints import bitsandbytes, shards
from qlora_jax.checkpoints.bitsandbytes_export import save_bitsandbytes
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import parameters
from qlora_jax.lora.adapters import named_leaves
from tests import bitsandbytes_files, tiny

pytestmark = pytest.mark.standard_promotion
Q_PROJ, UP_PROJ = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bitsandbytes_files.write(tmp_path_factory.mktemp("bnb") / "nf4", base)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replaces tensors, and takes away those that are None."""
    all_of_them = tensors_of(folder) | tensors
    kept = {name: x for name, x in all_of_them.items() if x is not None}
    save_file(kept, folder / "model.safetensors")


def assert_same_files(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert (x.dtype, x.shape) == (second[name].dtype, second[name].shape), name
        assert x.tobytes() == second[name].tobytes(), name


FORMATS = [
    ("nf4", 64, True, "uint8"),
    ("nf4", 32, False, "bfloat16"),
    ("fp4", 64, True, "float32"),
    ("fp4", 64, False, "float16"),
]


@pytest.mark.parametrize(("codebook", "block_size", "double_quant", "storage"), FORMATS)
def test_codes_and_scales_in_and_out(codebook, block_size, double_quant, storage, base, tmp_path):
    folder = bitsandbytes_files.write(
        tmp_path / "in",
        base,
        codebook=codebook,
        block_size=block_size,
        double_quant=double_quant,
        storage=storage,
    )
    model = qj.load(folder)
    stored = tensors_of(folder)
    for path, leaf in named_leaves(model.params).items():
        assert isinstance(leaf, qj.QuantizedArray) == ("_proj/" in path)
    weight = model.params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (weight.codebook, weight.block_size) == (codebook, block_size)
    ours = np.asarray(weight.dequantize()[1]).T
    np.testing.assert_array_equal(ours, bitsandbytes_files.dense(stored, Q_PROJ))
    save_bitsandbytes(tmp_path / "out", model, storage=storage)
    assert_same_files(folder, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    given = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert given.items() <= about.items()
    assert about["llm_int8_skip_modules"] is None
    again = qj.load(tmp_path / "out")
    assert again.config == model.config
    assert again.tokenizer("abc")["input_ids"] == model.tokenizer("abc")["input_ids"]


def test_a_model_does_not_change_with_its_file(folder, copy):
    params = qj.load(copy).params
    file = copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for x, y in zip(*map(jax.tree.leaves, (params, qj.load(folder).params)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_computes_what_the_dequantized_weights_compute(base, folder, tmp_path):
    stored = tensors_of(folder)
    dense = Path(shutil.copytree(base, tmp_path / "dense"))
    change(
        dense,
        **{
            name: bitsandbytes_files.dense(stored, name)
            for name in load_file(base / "model.safetensors")
            if "_proj." in name
        },
    )
    ids = jnp.arange(3, 15)[None]
    ours, theirs = (m.apply(m.params, ids)[0] for m in (qj.load(folder), qj.load(dense)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_format_that_contradicts_is_refused(folder):
    assert qj.load(folder, quantization=qj.NF4()).config
    for other in (qj.FP4(), qj.NF4(double_quant=False), qj.NF4(block_size=32)):
        with pytest.raises(qj.QloraError, match=r"already quantized as .*nf4.*, cannot become"):
            qj.load(folder, quantization=other)
    with pytest.raises(qj.QloraError, match="a policy cannot choose what is quantized already"):
        qj.load(folder, policy=qj.Policy())


def test_skipped_modules_stay_dense(base, tmp_path, caplog):
    folder = bitsandbytes_files.write(
        tmp_path / "in", base, packed=lambda name: "down_proj" not in name
    )
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        model = qj.load(folder, quantization=qj.NF4())
    assert not caplog.records
    kernel = model.params["layers"]["mlp"]["down_proj"]["kernel"]
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(kernel[1].T, tensors_of(base)[name])
    save_bitsandbytes(tmp_path / "out", model)
    assert_same_files(folder, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    skipped = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)} | {"lm_head"}
    assert set(about["llm_int8_skip_modules"]) == skipped


def test_a_leaf_that_is_4_bit_in_some_layers_becomes_dense(base, tmp_path, caplog):
    folder = bitsandbytes_files.write(tmp_path / "in", base, packed=lambda name: name != Q_PROJ)
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        kernel = qj.load(folder).params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert "self_attn.q_proj: becomes dense: 1 of its 2 tensors" in caplog.text
    stored = tensors_of(folder)
    np.testing.assert_array_equal(kernel[1].T, stored[Q_PROJ])
    first = bitsandbytes_files.dense(stored, Q_PROJ.replace("1", "0"))
    np.testing.assert_array_equal(kernel[0].T, first)


def test_blocks_across_rows_are_quantized_anew(base, tmp_path, caplog):
    """With blocks of 128, those of 64 inputs hold two rows each; of 128 inputs they fit."""
    folder = bitsandbytes_files.write(
        tmp_path / "in",
        base,
        block_size=128,
        double_quant=False,
        packed=lambda name: "up_proj" in name or "down_proj" in name,
    )
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        layers = qj.load(folder).params["layers"]
    assert "mlp.up_proj: quantized anew: its 64 inputs are no multiple of the block of 128" in (
        caplog.text
    )
    assert len(caplog.records) == 1  # nothing of down_proj
    stored = tensors_of(folder)
    anew = qj.quantize(
        bitsandbytes_files.dense(stored, UP_PROJ).T, qj.NF4(block_size=128, double_quant=False)
    )
    assert (layers["mlp"]["up_proj"]["kernel"].dequantize()[0] == anew.dequantize()).all()
    kept = layers["mlp"]["down_proj"]["kernel"].dequantize()[0]
    name = UP_PROJ.replace("up", "down")
    np.testing.assert_array_equal(kept.T, bitsandbytes_files.dense(stored, name))


STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"


def state(folder: Path, **changes: object) -> dict[str, np.ndarray]:
    about = json.loads(tensors_of(folder)[STATE].tobytes()) | changes
    return {STATE: np.frombuffer(json.dumps(about).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: {f"{Q_PROJ}.absmax": None}, r"absmax: 0 of type None, expected 64 of U8"),
        (lambda f: {f"{Q_PROJ}.absmax": np.ones(64, np.float32)}, "64 of type F32, expected 64 of"),
        (lambda f: {Q_PROJ: None}, rf"{Q_PROJ}: 0 of type None, expected 2048 bytes"),
        (lambda f: {Q_PROJ: np.zeros(7, np.uint8)}, "7 of type U8, expected 2048 bytes of codes"),
        (lambda f: {Q_PROJ: np.zeros(2048, np.float32)}, "2048 of type F32, expected 2048 bytes"),
        (lambda f: {STATE: np.frombuffer(b"[" * 99999, np.uint8)}, "bitsandbytes__nf4: not JSON"),
        (lambda f: {STATE: np.frombuffer(b"{", np.uint8)}, "bitsandbytes__nf4: not JSON"),
        (lambda f: {STATE: np.frombuffer(b"[]", np.uint8)}, "expected a JSON object"),
        (lambda f: state(f, quant_type="fp4"), "nf4: is of QuantConfig.*fp4"),
        (lambda f: state(f, quant_type="nf5"), "unknown code book 'nf5'"),
        (lambda f: state(f, blocksize=48), "power of two from 32 to 4096, got 48"),
        (lambda f: state(f, dtype="int8"), "dtype is 'int8', expected one of float32"),
        (lambda f: state(f, shape=[64]), r"shape is \[64\], expected two sizes"),
        (lambda f: state(f, shape=[128, 32]), r"shape \(128, 32\), expected \(64, 64\)"),
        (lambda f: state(f, nested_blocksize=64), "only blocks of 256 scales in float32"),
        (lambda f: state(f, nested_offset=None), "nested_offset is missing"),
        (lambda f: {f"{Q_PROJ}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)},
         r"quant_map: codes stand for other numbers"),
        (lambda f: {f"{Q_PROJ}.nested_absmax": np.full(1, np.nan, np.float32)}, "not finite"),
        (lambda f: {f"{Q_PROJ}.ghost": np.zeros(1, np.float32)}, "ghost: surplus"),
    ],
    ids=["no scales", "other scales", "no codes", "few codes", "many codes", "deep JSON", "no JSON",
         "a list", "another code",
         "unknown code", "block size", "type", "one axis", "another shape", "nested blocks",
         "no offset", "another table", "NaN", "surplus"],
)  # fmt: skip
def test_packed_weights_that_are_not_whole(damage, message, copy):
    change(copy, **damage(copy))
    with pytest.raises(qj.QloraError, match=message):
        qj.load(copy)


def test_kernels_that_dense_files_hold_the_other_way_round(folder, monkeypatch):
    """GPT-2's Conv1D: [in, out] in dense files, packed like all others."""

    def turned(config):
        for p in parameters(config):
            turn = p.path == "layers/self_attn/k_proj/kernel"
            yield dataclasses.replace(p, transposed=p.transposed and not turn)

    monkeypatch.setattr(bitsandbytes, "parameters", turned)
    monkeypatch.setattr("qlora_jax.checkpoints.load.parameters", turned)
    kernel = qj.load(folder).params["layers"]["self_attn"]["k_proj"]["kernel"]
    name = "model.layers.1.self_attn.k_proj.weight"
    ours = np.asarray(kernel.dequantize()[1]).T
    np.testing.assert_array_equal(ours, bitsandbytes_files.dense(tensors_of(folder), name))


def test_tables_may_differ_in_their_last_bits(copy, caplog):
    name = f"{Q_PROJ}.nested_quant_map"
    table = tensors_of(copy)[name]
    change(copy, **{name: np.nextafter(table, np.float32(2)).astype(np.float32)})
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        qj.load(copy)
    assert f"{name}: differs in the last bits" in caplog.text


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "8 bits are not supported"),
        ({"quant_method": "gptq"}, r"already quantized \(gptq\)"),
    ],
)
def test_other_quantizations_are_refused(about, message, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= about
    path.write_text(json.dumps(config))
    with pytest.raises(qj.QloraError, match=message):
        qj.load(copy)


def test_a_configuration_of_4_bits_beside_dense_weights(base, copy):
    shutil.copy(base / "model.safetensors", copy)
    with pytest.raises(qj.QloraError, match="speaks of 4 bits .* but no tensor is"):
        qj.load(copy)


def test_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    save_bitsandbytes(tmp_path / "out", qj.load(folder))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_files(folder, tmp_path / "out")
    qj.load(tmp_path / "out")


def test_what_cannot_be_written(base, folder, tmp_path):
    model = qj.load(folder)
    config = qj.LoraConfig(rank=4, targets=("down_proj",))
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    with pytest.raises(qj.QloraError, match=r"down_proj/kernel has an adapter.*save_pretrained"):
        save_bitsandbytes(tmp_path / "out", model, qj.lora.attach(model.params, adapters))
    with pytest.raises(qj.QloraError, match="0 4-bit formats"):
        save_bitsandbytes(tmp_path / "out", qj.load(base))
    with pytest.raises(qj.QloraError, match="storage is 'int8'; expected one of uint8"):
        save_bitsandbytes(tmp_path / "out", model, storage="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_has_no_4_bit_form_is_written_dense(base, tmp_path, caplog):
    """Blocks of 128 over 64 inputs are ours alone; what they stand for is kept."""
    only = qj.Policy(include=".*/(up|down)_proj/kernel")
    model = qj.load(base, quantization=qj.NF4(block_size=128), policy=only)
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        save_bitsandbytes(tmp_path / "out", model)
    (record,) = caplog.records
    assert "mlp.up_proj: written dense" in record.getMessage()
    again = qj.load(tmp_path / "out")
    for module in ("up_proj", "down_proj"):
        x, y = (m.params["layers"]["mlp"][module]["kernel"] for m in (model, again))
        assert isinstance(y, qj.QuantizedArray) == (module == "down_proj")
        y = y.dequantize() if isinstance(y, qj.QuantizedArray) else y
        np.testing.assert_array_equal(x.dequantize(), y)


def test_experts_in_4_bits_are_not_written(tmp_path):
    """transformers 5 stacks experts, and has no 4-bit form for that."""
    hf = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    hf |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    hf |= {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    config = models.read_config(hf)
    params = qj.quantize_tree(models.abstract_params(config), qj.NF4())
    model = Model(config, params, None, "shapes", jnp.float32)
    with pytest.raises(qj.QloraError, match="experts/down_proj/kernel is in 4 bits"):
        save_bitsandbytes(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
