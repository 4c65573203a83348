"""The kernels of attention over latents, in Triton's interpreter, against the plain reference in float64."""

import numpy as np
import pytest
import torch

from spectrim.kernels import latent_decode as reference

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.runtime import interpreter

from spectrim.kernels import latent_decode_triton as kernels
from spectrim.kernels.latent_decode_triton import Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(split=32, tile=16, chunk=16, heads=1, warps=4)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 as if they were integers; here it multiplies the numbers."""
    bfloat16, builder = triton.language.bfloat16, interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def cast_impl(self, source, kind):
        if kind.scalar == bfloat16 and source.dtype.scalar != triton.language.float32:
            source = interpreter.TensorHandle(source.data.astype(np.float32), triton.language.float32)
        return cast(self, source, kind)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))


def check(
    *,
    batch=2,
    tokens=100,
    heads=2,
    group=2,
    width=64,
    ranks=((16, 32), (32, 16)),
    dtype=torch.float32,
    rotary=None,
    shared=False,
    bias=False,
    norm=False,
    integers=False,
    softcap=None,
    window=None,
    start=None,
    length=None,
    mask=None,
    folded=False,
    tiles=SMALL,
    within=1e-6,
):
    """Run both on one random problem."""
    generator = torch.Generator().manual_seed(tokens + width + group)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def latents(ranks):
        z = random(batch, tokens, sum(ranks))
        return (z * 30).round().clamp(-127, 127).to(torch.int8) if integers else z.to(dtype)

    q, z_k, z_v = random(batch, heads * group, width).to(dtype), latents(ranks[0]), latents(ranks[1])
    A_k, A_v = ([(random(width, r) / r**0.5).to(dtype) for r in side] for side in ranks)
    options = {"scaling": width**-0.5, "softcap": softcap, "window": window, "folded": folded}
    if rotary:
        angles = (random(1 if shared else batch, tokens, rotary // 2) * 3).repeat(1, 1, 2)
        options |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    if bias:
        options |= {"b_k": random(heads * width).to(dtype), "b_v": random(heads * width).to(dtype)}
    if norm:
        options |= {"inverse_rms": random(batch, tokens, heads).abs() + 0.5, "norm": random(width).to(dtype)}
    if integers:
        options |= {name: (random(batch, tokens, heads).abs() / 20) for name in ("scale_k", "scale_v")}
    options |= {name: torch.tensor(value) for name, value in (("start", start), ("length", length)) if value}

    if mask is not None:
        options["mask"] = random(mask, tokens) < 0.3
        options["mask"][:, :40] = False  # whole tiles, and a split

    def moved(x, kind=None):
        if isinstance(x, list):
            return [moved(part, kind) for part in x]
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(DEVICE) if kind is None else x.to(kind) if x.is_floating_point() else x

    found = kernels.latent_decode(
        *map(moved, (q, z_k, z_v, A_k, A_v)), **{name: moved(value) for name, value in options.items()}, tiles=tiles
    )
    wide = {name: moved(value, torch.float64) for name, value in options.items()}
    inputs = [moved(x, torch.float64) for x in (q, z_k, z_v, A_k, A_v)]
    if mask is None:
        truth = reference.latent_decode(*inputs, **wide)
    else:
        wide |= {"mask": wide["mask"][:, None]}
        del wide["window"]
        truth = reference.latent_attention(inputs[0][:, :, None], *inputs[1:], **wide)[:, :, 0]
    assert found.dtype == dtype
    assert found.shape == truth.shape
    assert float((found.cpu().double() - truth).norm() / truth.norm()) < within


@pytest.mark.parametrize("group", [1, 4, 7])
def test_queries_share_the_keys_of_their_head(group):
    check(group=group, rotary=64)


@pytest.mark.parametrize("width", [80, 128, 256])
def test_every_width_of_heads(width):
    check(width=width, rotary=width, tokens=40)


@pytest.mark.parametrize("rank", [16, 48, 80, 128])
def test_every_rank_up_to_the_width(rank):
    check(width=128, ranks=((rank, 16), (16, rank)), rotary=128, tokens=20)


def test_ranks_that_are_no_multiples_of_16():
    check(ranks=((5, 23), (17, 1)))


@pytest.mark.parametrize(
    "tiles", [SMALL, Tiles(48, 16, 32, 2, 4), Tiles(16, 16, 16, 1, 4), Tiles(128, 64, 16, 2, 4), None]
)
def test_however_the_work_is_cut(tiles):
    check(tiles=tiles, rotary=64, bias=True, tokens=101)


@pytest.mark.parametrize("rotary", [None, 48, 64])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"norm": True}, {"integers": True, "bias": True, "norm": True}], ids=str
)
def test_what_a_key_meets(rotary, options):
    check(rotary=rotary, **options, tokens=50)


def test_sequences_share_a_table():
    check(rotary=64, shared=True)


@pytest.mark.parametrize("window", [None, 1, 16, 37, 500])
def test_a_step_sees_from_its_start_to_its_length_within_the_window(window):
    check(start=[0, 41], length=[70, 100], window=window, rotary=64)
    check(window=window)


@pytest.mark.parametrize("length", [[1, 33], [32, 31], [100, 17]])
def test_ragged_lengths_end_inside_splits_and_tiles(length):
    check(length=length)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_hides_any_tokens(rows):
    check(mask=rows, rotary=64)


def test_scores_are_capped():
    check(softcap=1.5, rotary=64)


@pytest.mark.parametrize("ranks", [((16, 16), (32, 32)), ((5, 23), (17, 1))])
def test_folded_latents_are_left_as_they_are(ranks):
    check(ranks=ranks, folded=True, bias=True, group=3, start=[0, 100])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float16, 2e-3), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("integers", [False, True])
def test_16_bits_are_as_near_as_their_rounding(dtype, within, integers):
    """bfloat16 is cut off in the interpreter, and so twice as far off as on a GPU."""
    check(dtype=dtype, integers=integers, rotary=64, bias=True, within=within)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_heads_whose_latents_are_their_keys_or_values(side):
    torch.manual_seed(0)
    A, z = [torch.randn(32, 16) for _ in range(2)], torch.randn(1, 40, 32)
    whole = [None, None], torch.randn(1, 40, 64)
    (A_k, z_k), (A_v, z_v) = (whole, (A, z)) if side == "keys" else ((A, z), whole)
    q, options = torch.randn(1, 4, 32), {"scaling": 0.2, "b_k": torch.randn(64), "norm": torch.randn(32)}
    options[f"scale_{side[0]}"] = torch.rand(1, 40, 2)  # of one side alone

    def there(x):
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else [there(y) for y in x] if isinstance(x, list) else x

    moved = {name: there(x) for name, x in options.items()}
    found = kernels.latent_decode(*map(there, (q, z_k, z_v, A_k, A_v)), **moved, tiles=SMALL)
    torch.testing.assert_close(found.cpu(), reference.latent_decode(q, z_k, z_v, A_k, A_v, **options))


def test_a_query_that_sees_nothing_gets_the_bias():
    A = [torch.randn(32, 16)] * 2
    b_v = torch.randn(64)
    options = {"b_v": b_v, "start": torch.tensor([5]), "length": torch.tensor([5]), "scaling": 1.0, "tiles": SMALL}
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    z = torch.randn(1, 40, 32, device=DEVICE)
    A = [part.to(DEVICE) for part in A]
    found = kernels.latent_decode(torch.randn(1, 4, 32, device=DEVICE), z, z, A, A, **moved)
    torch.testing.assert_close(found[0].cpu(), b_v.view(2, 1, 32).expand(2, 2, 32).reshape(4, 32))


def test_a_cache_with_room_is_read_in_place():
    """Latents may be a view of a larger buffer."""
    room = torch.randn(2, 100, 96, device=DEVICE)
    A = [torch.randn(64, 16, device=DEVICE) for _ in range(2)]
    q, view = torch.randn(2, 4, 64, device=DEVICE), room[:, :50, 32:64]
    found = kernels.latent_decode(q, view, view, A, A, scaling=0.1, tiles=SMALL)
    again = kernels.latent_decode(q, view.contiguous(), view.contiguous(), A, A, scaling=0.1, tiles=SMALL)
    assert torch.equal(found, again)


def test_what_the_kernels_cannot_read_is_refused():
    A, z = [torch.randn(32, 16)] * 3, torch.randn(1, 20, 48)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        kernels.latent_decode(torch.randn(1, 4, 32), z, z, A, A, scaling=1.0)
    with pytest.raises(ValueError, match="side by side"):
        kernels.latent_decode(torch.randn(1, 3, 32), z, torch.randn(1, 48, 20).transpose(1, 2), A, A, scaling=1.0)

    tables = {"cos": torch.randn(1, 20, 32), "sin": torch.randn(1, 32, 20).transpose(1, 2)}
    with pytest.raises(ValueError, match="alike"):
        kernels.latent_decode(torch.randn(1, 3, 32), z, z, A, A, scaling=1.0, **tables)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("tokens", [1, 1000, 8192, 131072])
def test_the_default_cut_covers_the_tokens_with_few_splits(batch, tokens):
    for rank in (16, 64, 128, 256):
        tiles = Tiles.fitting(batch, tokens, 4, rank, 64, rank == 16, 132)
        assert tiles.split % tiles.tile == 0
        assert -(-tokens // tiles.split) <= 1024
        assert tiles.heads in (1, 4)
