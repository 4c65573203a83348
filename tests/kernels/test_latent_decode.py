"""The reference of attention over latents, against attention over whole keys and values."""

import pytest
import torch

from spectrim.kernels import latent_decode as module
from spectrim.kernels.latent_decode import latent_attention, latent_decode

B, T, H, D = 2, 150, 2, 8
RANKS_K, RANKS_V = (3, 5), (4, 2)


def rotated(x, cos, sin):
    """As transformers' `apply_rotary_pos_emb` has it, on the first numbers of a head."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def whole(x, case):
    """Softmax attention with keys and values written out, float64 [B, Hq, S, D]."""
    heads = []
    for h in range(H):
        K = x["z_k"].split(RANKS_K, 2)[h].double() @ x["A_k"][h].T
        V = x["z_v"].split(RANKS_V, 2)[h].double() @ x["A_v"][h].T
        if "scale_k" in case:
            K, V = K * case["scale_k"][..., h, None], V * case["scale_v"][..., h, None]
        if "b_k" in case:
            K, V = K + case["b_k"].chunk(H)[h], V + case["b_v"].chunk(H)[h]
        if "norm" in case:
            K = K * case["inverse_rms"][..., h, None] * case["norm"]
        if "cos" in case:
            K = rotated(K, case["cos"], case["sin"])
        heads.append((K, V))
    group, found = x["q"].shape[1] // H, []
    for i in range(x["q"].shape[1]):
        K, V = heads[i // group]
        scores = x["q"][:, i] @ K.transpose(1, 2) * x["scaling"]
        if "softcap" in case:
            scores = case["softcap"] * torch.tanh(scores / case["softcap"])
        if (mask := case.get("mask")) is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        found.append(scores.softmax(-1) @ V)
    return torch.stack(found, 1)


def problem(group=3, steps=1, integers=False):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def latents(ranks):
        z = random(B, T, sum(ranks))
        return (z * 20).round().clamp(-127, 127).to(torch.int8) if integers else z

    return {
        "q": random(B, H * group, steps, D),
        "z_k": latents(RANKS_K),
        "z_v": latents(RANKS_V),
        "A_k": [random(D, r) for r in RANKS_K],
        "A_v": [random(D, r) for r in RANKS_V],
        "scaling": 0.3,
    }


def tables(rows, width):
    angles = torch.rand(rows, T, width // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
    return {"cos": angles.cos(), "sin": angles.sin()}


def options():
    torch.manual_seed(1)
    like = {"dtype": torch.float64}
    norms = {"inverse_rms": torch.rand(B, T, H, **like) + 0.5, "norm": torch.randn(D, **like)}
    biases = {"b_k": torch.randn(H * D, **like), "b_v": torch.randn(H * D, **like)}
    seen = torch.rand(B, 4, T) < 0.5
    seen[..., 5] = True
    return {
        "plain": {},
        "bias": biases,
        "rotary": tables(1, D),
        "rotary by row": tables(B, D),
        "partial rotary": tables(B, 4),
        "norm": norms,
        "all": {**biases, **norms, **tables(B, D), "softcap": 2.0, "mask": seen},
        "softcap": {"softcap": 1.5},
        "mask": {"mask": seen},
        "added mask": {"mask": torch.randn(1, 4, T, **like)},
    }


@pytest.mark.parametrize("tile", [64, 70, 1024])
@pytest.mark.parametrize("name", options())
def test_attention_over_latents_is_that_over_their_keys_and_values(name, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile * B * H)
    x, case = problem(steps=4), options()[name]
    torch.testing.assert_close(latent_attention(**x, **case), whole(x, case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 7])
def test_query_heads_share_the_keys_of_their_group(group):
    x = problem(group)
    torch.testing.assert_close(latent_attention(**x), whole(x, {}), rtol=1e-12, atol=1e-12)


def test_heads_without_factors_keep_their_keys_and_values():
    x = problem()
    like = {"dtype": torch.float64}
    x |= {"z_k": torch.randn(B, T, H * D, **like), "z_v": torch.randn(B, T, H * D, **like)}
    again = {**x, "A_k": [torch.eye(D, **like)] * H, "A_v": [torch.eye(D, **like)] * H}
    before, turns = x["z_k"].clone(), tables(1, D)
    found = latent_attention(**{**x, "A_k": [None] * H, "A_v": [None] * H}, **turns)
    torch.testing.assert_close(found, latent_attention(**again, **turns))
    assert torch.equal(x["z_k"], before)


@pytest.mark.parametrize("steps", [1, 4])
def test_folded_latents_times_the_factors_are_the_outputs(steps):
    x, case = problem(steps=steps), options()["bias"]
    latents = latent_attention(**x, **case, folded=True)  # [B, S, queries of a head · ranks], by query
    assert latents.shape == (B, steps, 3 * sum(RANKS_V))
    columns = [r for r in RANKS_V for _ in range(3)]
    ups = [A for A in x["A_v"] for _ in range(3)]
    outputs = [z @ A.T for z, A in zip(latents.split(columns, 2), ups, strict=True)]
    found = torch.stack(outputs, 1) + case["b_v"].view(H, 1, D).repeat_interleave(3, 0)
    torch.testing.assert_close(found, whole(x, case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "all", "added mask"])
def test_spans_of_the_softmax_are_added_up(name, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64 * B * H)
    monkeypatch.setattr(module, "SCORES", 1)
    x, case = problem(steps=4), options()[name]
    torch.testing.assert_close(latent_attention(**x, **case), whole(x, case), rtol=1e-12, atol=1e-12)
    hidden = torch.ones(1, 4, T, dtype=torch.bool)
    hidden[..., :70] = False  # a whole span
    torch.testing.assert_close(latent_attention(**x, mask=hidden), whole(x, {"mask": hidden}), rtol=1e-12, atol=1e-12)


def test_queries_may_lie_by_token_as_models_have_them():
    x = problem(steps=4)
    moved = {**x, "q": x["q"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(latent_attention(**moved), latent_attention(**x))


def test_integers_are_multiplied_by_the_scale_of_their_token_and_head():
    x = problem(integers=True)
    case = {name: torch.rand(B, T, H, dtype=torch.float64) / 20 for name in ("scale_k", "scale_v")}
    assert x["z_k"].dtype == torch.int8
    torch.testing.assert_close(latent_attention(**x, **case), whole(x, case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 70])
def test_a_step_sees_from_its_start_to_its_length_within_the_window(window, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64 * B * H)
    x = problem()
    start, length = torch.tensor([0, 90]), torch.tensor([100, 150])
    place, seen = torch.arange(T), torch.zeros(B, 1, T, dtype=torch.bool)
    for row in range(B):
        last = length[row] - (T if window is None else window)
        seen[row] = (place >= max(start[row], last)) & (place < length[row])
    one = {**x, "q": x["q"][:, :, 0]}
    found = latent_decode(**one, start=start, length=length, window=window)
    torch.testing.assert_close(found, whole(x, {"mask": seen})[:, :, 0], rtol=1e-12, atol=1e-12)
    plain = latent_decode(**one, window=window)
    mask = {} if window is None else {"mask": (place >= T - window)[None, None]}
    torch.testing.assert_close(plain, whole(x, mask)[:, :, 0], rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_float32_and_rounded_once():
    x = problem()
    narrow = {
        name: [A.bfloat16() for A in value] if isinstance(value, list) else value.bfloat16()
        for name, value in x.items()
        if name != "scaling"
    }
    again = {name: [A.double() for A in v] if isinstance(v, list) else v.double() for name, v in narrow.items()}
    found, exact = latent_attention(**narrow, scaling=0.3), whole({**again, "scaling": 0.3}, {})
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_query_that_sees_nothing_gets_the_bias():
    x, bias = problem(), torch.randn(H * D, dtype=torch.float64)
    found = latent_attention(**x, b_v=bias, mask=torch.zeros(1, 1, T, dtype=torch.bool))
    torch.testing.assert_close(found[0, :, 0], bias.view(H, D).repeat_interleave(3, 0))
