"""Reading Hugging Face folders: what is read is what was written, and every fault is named."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlora_jax as qj
from qlora_jax.checkpoints import export, hub, shards
from qlora_jax.checkpoints.folder import new_folder
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.load import load_lazily
from qlora_jax.checkpoints.names import parameters
from qlora_jax.checkpoints.quantized import save_quantized
from qlora_jax.checkpoints.safetensors_files import read_header
from qlora_jax.checkpoints.tensors import SafetensorsFolder, list_files
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models import read_config
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


def move_data(file: Path, begin: int) -> None:
    """Pads the header of a safetensors file so that its data begin at 64 n + `begin`."""
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:end] + b" " * ((begin - end) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])


def overwrite(file: Path) -> None:
    """Zeros in the place of all bytes of a file, which stays the same file."""
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))


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


@pytest.mark.parametrize("begin", [0, 8, 1])
@pytest.mark.parametrize("quantization", [None, qj.NF4()])
def test_a_model_does_not_change_with_its_file(begin, quantization, copy):
    """Tensors are mapped where they lie, also where no type would be aligned."""
    before = qj.load(copy, quantization=quantization).params
    file = copy / "model.safetensors"
    move_data(file, begin)
    params = qj.load(copy, quantization=quantization).params
    overwrite(file)
    assert same(params, before)
    with pytest.raises(qj.QloraError, match="cannot be read as safetensors"):
        qj.load(copy)


def test_a_model_does_not_change_with_a_file_that_it_is_quantized_from(tmp_path):
    """GPT-2's weights lie as ours do, so that a CPU may work on the mapped file itself."""
    sizes = {"vocab_size": 16, "n_positions": 8, "n_layer": 1, "n_head": 4, "n_embd": 1024}
    about = {"model_type": "gpt2"} | sizes
    rng = np.random.default_rng(0)
    save_file(
        {
            parameter.hf_name(0): rng.standard_normal(parameter.file_shape, np.float32)
            for parameter in parameters(read_config(about))
        },
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(about))
    before = qj.load(tmp_path, quantization=qj.NF4()).params
    file = tmp_path / "model.safetensors"
    move_data(file, 0)
    last = read_header(file)["transformer.h.0.mlp.c_proj.weight"]
    with file.open("r+b") as opened:
        params = qj.load(tmp_path, quantization=qj.NF4()).params
        opened.seek(last.offset)
        opened.write(bytes(4 * 4096 * 1024))
    assert same(params, before)


def test_no_copy_is_made_of_what_is_read(folder):
    tensors = SafetensorsFolder(folder)
    for parameter in parameters(read_config(read_json(folder / "config.json"))):
        x = tensors.read(parameter, 0)
        assert isinstance(x.base, np.memmap) and not x.flags.writeable


def test_a_file_that_shrinks_after_it_was_opened(copy):
    lazily = load_lazily(copy)
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(qj.QloraError, match=r"embed_tokens\.weight cannot be read"):
        lazily.params["embed_tokens"]["embedding"].read()


def test_shards_are_read_like_one_file(folder, copy):
    split(copy)
    assert same(qj.load(copy).params, qj.load(folder).params)


def test_a_link_to_an_empty_folder_is_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as part:
        (part / "x").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_a_single_file_comes_before_an_index(names, tmp_path):
    """As in transformers: the index is of shards that were there before."""
    for name in names:
        (tmp_path / name).write_text("{}")
    files = list_files(tmp_path, *names)
    assert files.present == [tmp_path / names[0]] and not files.listed


def test_bfloat16_files_keep_their_bits(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    halves = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    save_file(halves, copy / "model.safetensors")
    kernel = qj.load(copy, dtype=jnp.bfloat16).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert (kernel[1] == halves["model.layers.1.mlp.up_proj.weight"].T).all()


def test_tensors_that_hold_no_floating_point_numbers_are_listed(copy):
    tensors = load_file(copy / "model.safetensors")
    for name, kind in (
        ("model.norm.weight", np.int64),
        ("model.embed_tokens.weight", np.uint8),
        ("model.layers.1.mlp.up_proj.weight", np.int8),
    ):
        tensors[name] = tensors[name].astype(kind)
    save_file(tensors, copy / "model.safetensors")
    for quantization in (None, qj.NF4()):
        with pytest.raises(qj.QloraError) as error:
            qj.load(copy, quantization=quantization)
        text = str(error.value)
        assert "model.norm.weight: has the type I64, expected floating-point numbers" in text
        assert "model.embed_tokens.weight: has the type U8" in text
        assert "model.layers.1.mlp.up_proj.weight: has the type I8" in text
        assert text.count("\n") == 3


def test_arguments_of_the_wrong_kind(folder):
    with pytest.raises(qj.QloraError, match=r"quantization is 'nf4'; expected NF4\(\), FP4\(\)"):
        qj.load(folder, quantization="nf4")  # type: ignore[arg-type]
    with pytest.raises(qj.QloraError, match="dtype is 'float99'"):
        qj.load(folder, dtype="float99")
    with pytest.raises(qj.QloraError, match="dtype is int32"):
        qj.load(folder, dtype=jnp.int32)


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
        qj.QloraError, match=r"embed_tokens\.weight: 1 of 16576 elements are not finite as float32"
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
        ({"hidden_size": "64"}, "copy: hidden_size is '64', expected a whole number"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_a_configuration_that_is_not_supported(settings, message, copy):
    change(copy, **settings)
    with pytest.raises(qj.QloraError, match=message):
        qj.load(copy)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "not JSON"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(file, content, copy):
    path = copy / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(qj.QloraError, match=r"copy: the tokenizer cannot be read \(\w+: ") as error:
        qj.load(copy)
    assert "\n" not in str(error.value)


def test_what_is_not_downloaded(monkeypatch, tmp_path):
    """Repositories that hold the weights twice are fetched once."""
    import fnmatch

    import huggingface_hub

    given = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: given.update(more) or tmp_path
    )
    (tmp_path / "model.safetensors").touch()
    assert hub.download("owner/model") == tmp_path

    def fetched(file: str) -> bool:
        """huggingface_hub.utils.filter_repo_objects' rule."""
        wanted, unwanted = given["allow_patterns"], given["ignore_patterns"]
        matches = (any(fnmatch.fnmatch(file, p) for p in some) for some in (wanted, unwanted))
        return next(matches) and not next(matches)

    assert fetched("model-00001-of-00002.safetensors") and fetched("tokenizer.json")
    for file in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):
        assert not fetched(file)
    assert not fetched("original/params.json") and not fetched("original/tokenizer.model")
    assert not fetched("pytorch_model.bin")


def test_what_torch_wrote_is_downloaded_where_nothing_better_is_there(monkeypatch, tmp_path):
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **more: asked.append(more["allow_patterns"]) or tmp_path,
    )
    assert hub.download("owner/model") == tmp_path
    assert len(asked) == 2 and asked[1] == ["pytorch_model*.bin"]


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(qj.QloraError, match="no such file or folder"):
        qj.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(qj.QloraError, match="config.json is not there"):
        qj.load(tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(qj.QloraError, match="give the folder"):
        qj.load(tmp_path / "weights.bin")


def test_the_folder_of_an_adapter_is_no_model(tmp_path):
    about = {"base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(qj.QloraError, match="an adapter, not a model; load its base owner/base,"):
        qj.load(tmp_path)


def test_json_files_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(qj.QloraError, match="file is no folder"):
        read_json(tmp_path / "file" / "config.json")
    with pytest.raises(qj.QloraError, match="is a folder; expected a JSON file"):
        read_json(tmp_path)


def test_what_torch_wrote_needs_torch(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # which import then does not find
    (copy / "pytorch_model.bin").write_bytes(b"never opened, since safetensors are there")
    assert qj.load(copy).params
    (copy / "model.safetensors").unlink()
    with pytest.raises(qj.QloraError, match=r"model\.bin needs .* torch: pip .*qlora-jax\[torch\]"):
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


@pytest.fixture(scope="module")
def four_bits(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q"
    save_quantized(path, qj.load(folder, quantization=qj.NF4()))
    return path


def describe(folder: Path, **settings: object) -> None:
    path = folder / "quantization.json"
    about = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: x for key, x in about.items() if x is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda q: describe(q, codebook=None), "quantization.json: codebook is missing"),
        (lambda q: describe(q, codebook="nf5"), "quantization.json: unknown code book 'nf5'"),
        (lambda q: describe(q, block_size="64"), "block_size is '64', expected a whole number"),
        (lambda q: describe(q, parameters={"a": "float99"}), "quantization.json: .*float99"),
        (lambda q: describe(q, parameters=None), "parameters is missing"),
        (lambda q: describe(q, block_size=32), r"/scales: .* \(2, 2, 64\), expected \(2, 4, 64\)"),
        (lambda q: change(q, intermediate_size=256), r"params: .*6 arrays do not fit"),
        (lambda q: shutil.rmtree(q / "params"), r"params/.*: no bytes, .*for (\d+) of \1 files"),
        (lambda q: (describe(q, files={}), shutil.rmtree(q / "params")), "params: cannot be read"),
        (lambda q: describe(q, files=None), "quantization.json: files is missing"),
    ],
    ids=["no code book", "strange code book", "block size of text", "strange type", "no list",
         "another block size", "another shape", "no weights", "weights not listed", "no sizes"],
)  # fmt: skip
def test_a_damaged_quantized_folder(damage, message, four_bits, tmp_path):
    copy = Path(shutil.copytree(four_bits, tmp_path / "q"))
    damage(copy)
    with pytest.raises(qj.QloraError, match=message) as error:
        qj.load(copy)
    assert "\n" not in str(error.value)


def test_a_quantized_folder_cut_short(four_bits, tmp_path):
    copy = Path(shutil.copytree(four_bits, tmp_path / "q"))
    files = [path for path in (copy / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(qj.QloraError, match=rf"{largest.name}: 100 bytes, expected {size} "):
        qj.load(copy)


def test_what_is_not_finite_is_not_exported(folder, tmp_path):
    """Neither an adapter's NaN nor what the type of the file cannot hold."""
    model = qj.load(folder, quantization=qj.NF4())
    adapters = qj.lora.init(
        jax.random.key(0), model.params, qj.LoraConfig(rank=4, targets=("up_proj",))
    )
    ((path, fresh),) = adapters.items()
    broken = dataclasses.replace(fresh, b=fresh.b.at[1, 0, 5].set(jnp.nan))
    tree = qj.lora.attach(model.params, {path: broken})
    with pytest.raises(
        qj.QloraError,
        match=r"layers\.1\.mlp\.up_proj\.weight: 64 of 8192 elements are not finite as bfloat16",
    ):
        export.save_pretrained(tmp_path / "nan", model, tree)
    large = dataclasses.replace(fresh, b=fresh.b + 1e6)
    tree = qj.lora.attach(model.params, {path: large})
    with pytest.raises(qj.QloraError, match=r"up_proj\.weight: \d+ of 8192 .* as float16; noth"):
        export.save_pretrained(tmp_path / "half", model, tree, dtype=jnp.float16)
    export.save_pretrained(tmp_path / "bf16", model, tree)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_export_is_the_inverse_of_import(folder, tmp_path, monkeypatch):
    model = qj.load(folder)
    export.save_pretrained(tmp_path / "one", model, dtype=jnp.float32)
    stored, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "one"))
    assert stored.keys() == again.keys()
    assert all((stored[name] == again[name]).all() for name in stored)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
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


def test_an_answer_ends_where_generation_config_says_too(folder, copy, tmp_path):
    """Phi-3's turns end with a token that config.json does not name."""
    (copy / "generation_config.json").write_text('{"eos_token_id": [9, 1, 7]}')
    model = qj.load(copy)
    assert qj.load(folder).config.eos_token_id == (1,)
    assert model.config.eos_token_id == (1, 9, 7)
    export.save_pretrained(tmp_path / "again", model)
    assert qj.load(tmp_path / "again").config.eos_token_id == (1, 9, 7)
    (copy / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(qj.QloraError, match="copy: .*eos_token_id"):
        qj.load(copy)
