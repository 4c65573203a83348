"""Forms of output moments: the choice within a memory limit, and each form against the whole moment."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from curvatures import CPU, output_moment
from helpers.matrices import normal
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.calibrate.forms import SKETCH, CurvatureForm, choose_forms
from spectrim.calibrate.moments import OutputSum
from spectrim.errors import ModelError, RecipeError
from spectrim.linear import Linear
from spectrim.maths.roots import nystrom


def one(number: int, out: int, heads: int | None = None, role: str | None = None) -> Linear:
    return Linear(f"l{number}", "backbone", None, role or ("q" if heads else "up"), out, 8, heads, torch.float32)


def exact(linear: Linear) -> int:
    return 8 * linear.out_features**2


def diagonal(linear: Linear) -> int:
    return 8 * linear.out_features


@st.composite
def models(draw: st.DrawFn) -> list[Linear]:
    found = []
    for number in range(draw(st.integers(1, 8))):
        heads = draw(st.sampled_from([None, None, 2, 4]))
        found.append(one(number, draw(st.sampled_from([8, 32, 512, 516, 1024])), heads))
    return found


@settings(max_examples=200, deadline=None)
@given(models(), st.integers(1, 3), st.floats(0, 1.2))
def test_forms_fit_the_limit(linears, passes, share):
    least, most = max(map(diagonal, linears)), sum(map(exact, linears))
    limit = int(least + share * (most - least))
    try:
        forms, groups = choose_forms(linears, limit, passes)
    except ModelError:
        assert sum(map(diagonal, linears)) > limit
        return
    assert [x.name for group in groups for x in group] == [x.name for x in linears]
    assert len(groups) <= passes
    for group in groups:
        assert sum(forms[x.name].nbytes(x.out_features) for x in group) <= limit
    if most <= limit:
        assert set(forms.values()) == {CurvatureForm("full")}
        assert len(groups) == 1
    for x in linears:
        middle = [CurvatureForm("blocks", x.out_features // x.heads)] if x.heads else []
        middle += [CurvatureForm("sketch", SKETCH)] if not x.heads and x.out_features > 2 * SKETCH else []
        assert forms[x.name] in [CurvatureForm("full"), *middle, CurvatureForm("diagonal")]
    # The largest go down first, and equals go together.
    reduced = [exact(x) for x in linears if forms[x.name].kind != "full"]
    whole = [exact(x) for x in linears if forms[x.name].kind == "full"]
    assert not reduced or not whole or min(reduced) > max(whole)


def test_the_ladder_goes_down_one_rung_at_a_time():
    linears = [one(0, 64, 4), one(1, 1024), one(2, 64, 4)]
    sizes = {
        CurvatureForm("full"): (8 * 64 * 64, 8 * 1024 * 1024),
        "middle": (8 * 64 * 16, 8 * 1024 * (SKETCH + 1)),
        CurvatureForm("diagonal"): (8 * 64, 8 * 1024),
    }
    (q, up), (q_blocks, up_sketch), (q_least, up_least) = sizes.values()
    blocks, sketch = CurvatureForm("blocks", 16), CurvatureForm("sketch", SKETCH)
    for limit, expected in [
        (2 * q + up, (CurvatureForm("full"), CurvatureForm("full"))),
        (2 * q + up - 1, (CurvatureForm("full"), sketch)),
        (2 * q + up_sketch - 1, (CurvatureForm("full"), CurvatureForm("diagonal"))),
        (2 * q + up_least - 1, (blocks, CurvatureForm("diagonal"))),
        (2 * q_blocks + up_least - 1, (CurvatureForm("diagonal"), CurvatureForm("diagonal"))),
        (2 * q_least + up_least, (CurvatureForm("diagonal"), CurvatureForm("diagonal"))),
    ]:
        forms, _ = choose_forms(linears, limit)
        assert (forms["l0"], forms["l1"], forms["l2"]) == (expected[0], expected[1], expected[0])
    with pytest.raises(ModelError, match="more memory or more passes"):
        choose_forms(linears, 2 * q_least + up_least - 1)


def test_passes_instead_of_smaller_forms():
    linears = [one(number, 64) for number in range(6)]
    forms, groups = choose_forms(linears, 2 * exact(linears[0]), passes=3)
    assert set(forms.values()) == {CurvatureForm("full")}
    assert [len(group) for group in groups] == [2, 2, 2]
    forms, groups = choose_forms(linears, 2 * exact(linears[0]), passes=2)
    assert set(forms.values()) == {CurvatureForm("diagonal")}
    assert len(groups) == 1


def test_wanted_forms_are_obeyed():
    linears = [one(0, 64, 4), one(1, 96, role="gate"), one(2, 96)]
    forms, _ = choose_forms(linears, 10**9, wanted={"gate": "sketch:7", "q": "blocks:32"})
    assert forms == {"l0": CurvatureForm("blocks", 32), "l1": CurvatureForm("sketch", 7), "l2": CurvatureForm("full")}
    forms, _ = choose_forms(linears, exact(linears[1]) + 8 * 64 + 8 * 96, wanted={"gate": "full"})
    assert forms == {"l0": CurvatureForm("diagonal"), "l1": CurvatureForm("full"), "l2": CurvatureForm("diagonal")}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"gate": "full"}, "no linear of role 'gate'"),
        ({"up": "blocks:7"}, "blocks of 7 do not divide the 96 outputs of l0"),
        ({"up": "blocks"}, "'blocks' is no form"),
        ({"up": "blocks:0"}, "'blocks:0' is no form"),
        ({"up": "sketch:-1"}, "'sketch:-1' is no form"),
        ({"up": "full:3"}, "'full:3' is no form"),
        ({"up": "exact"}, "'exact' is no form"),
    ],
)
def test_strange_forms_are_refused(wanted, message):
    with pytest.raises(RecipeError, match=message):
        choose_forms([one(0, 96)], 10**9, wanted=wanted)


@pytest.mark.parametrize("text", ["full", "diagonal", "blocks:64", "sketch:256"])
def test_forms_are_written_as_they_are_read(text):
    form = CurvatureForm.read(text)
    assert str(form) == text
    total = OutputSum.zero(form, 256, 1, CPU)
    assert {name: tuple(value.shape) for name, value in total.sums.items()} == form.shapes(256)
    assert tuple(total.sums) == form.parts
    assert sum(8 * value.numel() for value in total.sums.values()) == form.nbytes(256)


def gathered(form: str, rank: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    g = (normal(40, rank) @ normal(rank, 12, seed=1)).to(dtype)
    return output_moment([(g[:15], normal(15, 3).to(dtype)), (g[15:], normal(25, 3).to(dtype))], 5, form).sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_form_is_its_part_of_the_whole(dtype):
    G = gathered("full", 9, dtype)["output"]
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for number, block in enumerate(gathered("blocks:4", 9, dtype)["output"]):
        rows = slice(4 * number, 4 * number + 4)
        torch.testing.assert_close(block, G[rows, rows], **close)
    torch.testing.assert_close(gathered("diagonal", 9, dtype)["output_diagonal"], G.diagonal(), **close)
    sketch = gathered("sketch:5", 9, dtype)
    test = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(sketch["output"], G @ test, **close)
    torch.testing.assert_close(sketch["output_diagonal"], G.diagonal(), **close)


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
def test_a_sketch_is_exact_up_to_its_rank_and_never_too_much(rank):
    G, Y = gathered("full", rank)["output"], gathered("sketch:6", rank)["output"]
    V = nystrom(Y, torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double())
    scale = float(torch.linalg.matrix_norm(G, 2))
    if rank <= 6:
        torch.testing.assert_close(V @ V.T, G, rtol=0, atol=1e-6 * scale)
    assert torch.linalg.eigvalsh(G - V @ V.T).min() > -1e-9 * scale
    assert V.shape == (12, min(rank, 6))


def run(directory: Path, words: str, **options) -> Statistics:
    model = families.FAMILIES["llama"]().double()
    common = {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 10, "curvature": True}
    return calibrate(model, directory, **common, **options)


def test_several_passes_give_the_sums_of_one(words, tmp_path):
    """With labels drawn anew in each pass, and with what is read back from disk."""
    linears = anatomy(families.FAMILIES["llama"]()).linears
    whole = run(tmp_path / "whole", words, labels="sampled", gradients=True)
    half = 0.6 * sum(map(exact, linears)) / 2**30
    options = {"labels": "sampled", "gradients": True, "curvature_gib": half, "curvature_passes": 2}
    passes = run(tmp_path / "passes", words, **options)
    assert [len(group) for group in whole.manifest.groups] == [len(linears)]
    assert len(passes.manifest.groups) == 2
    for x in linears:
        a, b = whole.output(x.name, "text"), passes.output(x.name, "text")
        assert (a.form, a.count, a.labels) == (b.form, b.count, b.labels) == (CurvatureForm("full"), 40, 36)
        assert torch.equal(a.sums["output"], b.sums["output"])
        assert torch.equal(a.traces, b.traces)
        assert torch.equal(whole.gradient(x.name, "text").fisher_cols, passes.gradient(x.name, "text").fisher_cols)


def test_forms_by_role_through_calibration(words, tmp_path):
    wanted = {"q": "blocks:16", "o": "sketch:64", "up": "diagonal", "down": "sketch:5"}
    whole = run(tmp_path / "whole", words)
    small = run(tmp_path / "small", words, curvature_forms=wanted)
    for x in anatomy(families.FAMILIES["llama"]()).linears:
        output, G = small.output(x.name, "text"), whole.output(x.name, "text").sums["output"]
        assert str(output.form) == wanted.get(x.role, "full")
        torch.testing.assert_close(output.traces, whole.output(x.name, "text").traces)
        expected = {
            "full": lambda G=G: {"output": G},
            "diagonal": lambda G=G: {"output_diagonal": G.diagonal()},
            "blocks": lambda G=G: {"output": torch.stack([G[i : i + 16, i : i + 16] for i in range(0, len(G), 16)])},
            "sketch": lambda G=G, n=output.form.size: {
                "output": G @ torch.randn(len(G), n, generator=torch.Generator().manual_seed(0)).double(),
                "output_diagonal": G.diagonal(),
            },
        }[output.form.kind]()
        assert output.sums.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(output.sums[name], value, rtol=1e-9, atol=1e-12)
