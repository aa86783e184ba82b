"""Attention: XLA's in blocks, the kernels beside it, and which of them is taken."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.errors import QloraError
from qlora_jax.models import attention, attention_cudnn, attention_splash, attention_xla
from qlora_jax.models.attention import use_attention
from qlora_jax.models.masks import Mask
from qlora_jax.models.split import Split, split_over

B, H, HKV, DH = 2, 4, 2, 16


def inputs(time, dtype=jnp.float32, width=DH):
    """q, k, v, and what the output is multiplied by to make a loss."""
    keys = jax.random.split(jax.random.key(time), 4)
    heads = (H, HKV, HKV, H)
    return [
        jax.random.normal(key, (B, time, h, width), dtype)
        for key, h in zip(keys, heads, strict=True)
    ]


def plain(q, k, v, mask, scale=DH**-0.5, softcap=None):
    """Whole matrices, in fp32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, H // HKV, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    time = q.shape[1]
    t, s = jnp.arange(time)[:, None], jnp.arange(time)[None]
    seen = s <= t
    if mask.window is not None and (mask.slides is None or mask.slides):
        seen = seen & (t - s < mask.window)
    for ids in (mask.segment_ids, mask.valid):
        if ids is not None:
            seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def padding(time, left, right):
    slots = jnp.arange(time)[None]
    return (slots >= jnp.array([[0], [left]])) & (slots < jnp.array([[time], [time - right]]))


def documents(time, each):
    return jnp.broadcast_to(jnp.arange(time) // each, (B, time))


def masks(time):
    return {
        "causal": Mask(),
        "padded on the left": Mask(valid=padding(time, 9, 0)),
        "packed, the rest padding": Mask(
            valid=padding(time, 0, 7), segment_ids=documents(time, time // 3)
        ),
        "window": Mask(window=11),
        "window in other layers": Mask(
            window=11, slides=jnp.array(False), segment_ids=documents(time, time // 2)
        ),
        "window here": Mask(window=11, slides=jnp.array(True), valid=padding(time, 5, 3)),
    }


def check(attend, time, mask, softcap=None, dtype=jnp.float32, width=DH, bound=1e-5):
    """Values and gradients are those of `plain`, within `bound` of its largest (which is about 1);
    what padding sees is left out."""
    q, k, v, w = inputs(time, dtype, width)
    live = jnp.ones((B, time), bool) if mask.valid is None else mask.valid
    live = live[:, :, None, None]

    def results(attend):
        def loss(q, k, v):
            out = attend(q, k, v, mask, scale=0.3, softcap=softcap).astype(jnp.float32)
            out = jnp.where(live, out, 0)
            return jnp.sum(out * w.astype(jnp.float32)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    for ours, expected in zip(*(jax.tree.leaves(results(f)) for f in (attend, plain)), strict=True):
        ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
        np.testing.assert_allclose(ours, expected, atol=bound * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("kind", "softcap"), [*((kind, None) for kind in masks(45)), ("window here", 2.0)]
)
def test_blocks_of_queries_equal_whole_matrices(kind, softcap, monkeypatch):
    """45 tokens: spans of two blocks of 8 in a loop, one of a single block, and what is left."""
    monkeypatch.setattr(attention_xla, "BLOCK", 8)
    monkeypatch.setattr(attention_xla, "SPANS", 3)
    ends = [end for _, end, _ in attention_xla._spans(45, 45)]
    assert ends == [16, 32, 40, 45]
    check(attention_xla.attend, 45, masks(45)[kind], softcap)


@pytest.mark.parametrize(
    ("kind", "time", "softcap"),
    [("packed, the rest padding", 330, None), ("window here", 130, 2.0)],
)
def test_splash_equals_whole_matrices(kind, time, softcap):
    """In the interpreter: 330 tokens fill three tiles of keys but for a rest."""
    splash = functools.partial(attention_splash.attend, interpret=True)
    check(splash, time, masks(time)[kind], softcap)


@pytest.mark.skipif(
    attention_cudnn.unavailable() is not None,
    reason=f"cuDNN's attention: {attention_cudnn.unavailable()}",
)
@pytest.mark.parametrize(
    ("time", "width", "dtype"), [(34, 64, "bfloat16"), (510, 128, "bfloat16"), (256, 16, "float16")]
)
@pytest.mark.parametrize("kind", masks(45))
def test_cudnn_equals_whole_matrices(kind, time, width, dtype):
    mask = masks(time)[kind]
    check(attention_cudnn.attend, time, mask, dtype=jnp.dtype(dtype), width=width, bound=0.02)


def test_each_device_attends_to_its_own_sequences_and_heads():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    mask = Mask(valid=padding(130, 9, 0))
    live = np.asarray(mask.valid)[:, :, None, None]
    args = inputs(130)

    def gradients(attend, q, k, v, w):
        def loss(q, k, v):
            out = jnp.where(live, attend(q, k, v, mask), 0.0)
            return jnp.sum(out * w), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    splash = functools.partial(attention_splash.attend, interpret=True)
    with split_over(Split(mesh, ("data",), ("tensor",))):
        split = jax.jit(functools.partial(gradients, splash))
        compiled = split.lower(*(jax.device_put(x, place) for x in args)).compile()
    assert "all-gather" not in compiled.as_text()
    (_, out), found = compiled(*(jax.device_put(x, place) for x in args))
    assert all(x.sharding.is_equivalent_to(place, x.ndim) for x in (out, *found))
    expected = gradients(plain, *args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        (out, found),
        (expected[0][1], expected[1]),
    )


def test_what_does_not_divide_is_not_split():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    split = Split(mesh, ("data",), ("tensor",))
    assert attention_splash._fitting(split, 8, 4) == split
    assert attention_splash._fitting(split, 6, 3) == Split(mesh, (), ())


def lowered(platform, time=256, **options):
    """The program text of attention and its gradient, lowered for a platform."""
    q, k, v, _ = inputs(time)

    def loss(q, k, v):
        return jnp.sum(attention.attend(q, k, v, Mask(), **options))

    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(
        lowering_platforms=(platform,)
    ).as_text()  # fmt: skip


def test_the_platform_decides_when_lowering(monkeypatch):
    """As it would be with a TPU at hand."""
    assert "tpu_custom_call" not in lowered("tpu")
    here = attention.KERNELS["splash"]._replace(unavailable=lambda: None)
    monkeypatch.setitem(attention.KERNELS, "splash", here)
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("cpu")
    assert "tpu_custom_call" not in lowered("tpu", time=100)
    with use_attention("xla"):
        assert "tpu_custom_call" not in lowered("tpu")


@pytest.mark.parametrize(
    ("time", "packed", "taken"), [(256, False, True), (256, True, True), (24_000, True, False)]
)
def test_cudnn_is_chosen_unless_its_mask_is_large(time, packed, taken, monkeypatch):
    """As it would be with a GPU at hand."""
    chosen = []

    def attend(q, k, v, mask, **how):
        chosen.append(mask)
        return q

    here = attention.KERNELS["cudnn"]._replace(unavailable=lambda: None, attend=attend)
    monkeypatch.setitem(attention.KERNELS, "cudnn", here)
    q, k, _, _ = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(time))
    mask = Mask(segment_ids=documents(time, 9)) if packed else Mask()
    jax.eval_shape(lambda q, k: attention.attend(q, k, k, mask), q, k)
    assert len(chosen) == taken
    with use_attention("cudnn"):
        jax.eval_shape(lambda q, k: attention.attend(q, k, k, mask), q, k)
    assert len(chosen) == taken + 1


@pytest.mark.parametrize(
    ("name", "dtype", "time", "softcap", "mask", "why"),
    [
        ("splash", jnp.float16, 256, None, Mask(), "bfloat16 or float32, got float16"),
        ("splash", jnp.float32, 100, None, Mask(), "at least 128 tokens, got 100"),
        ("cudnn", jnp.float32, 256, None, Mask(), "bfloat16 or float16, got float32"),
        ("cudnn", jnp.bfloat16, 256, 30.0, Mask(), "no cap"),
        ("cudnn", jnp.bfloat16, 255, None, Mask(segment_ids=documents(255, 9)), "even, got 255"),
    ],
)
def test_a_name_that_does_not_take_it_raises(name, dtype, time, softcap, mask, why):
    q, k, v, _ = inputs(time, dtype)
    with use_attention(name), pytest.raises(QloraError, match=f"{name}.*{why}"):
        attention.attend(q, k, v, mask, softcap=softcap)


def test_an_unknown_name_raises():
    expected = pytest.raises(QloraError, match="'flash': expected one of xla, splash, cudnn")
    with expected, use_attention("flash"):
        pass


def test_a_cache_is_attended_to_by_xla():
    q, k, v, _ = inputs(256)
    with use_attention("splash"):
        attention.attend(q[:, :1], k, v, Mask(start=jnp.array(200)))


def test_splash_is_chosen_over_several_tpus_where_it_is_known_how_they_share(monkeypatch):
    """Their compiler could not split it."""
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="tpu")])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert attention_splash.unavailable() is None
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert "several devices" in attention_splash.unavailable()
    with split_over(Split(Mesh(np.array(jax.devices()[:1]), ("data",)), (), ())):
        assert attention_splash.unavailable() is None
