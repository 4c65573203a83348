"""Forms of output moments: the choice by role, and each form against the whole moment."""

from pathlib import Path

import pytest
import torch

import families
from curvatures import CPU, output_moment
from helpers.matrices import normal
from helpers.samples import word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.calibrate.forms import CurvatureForm, choose_forms
from spectrim.calibrate.moments import OutputSum
from spectrim.errors import RecipeError
from spectrim.linear import Linear
from spectrim.maths.roots import nystrom


def one(number: int, out: int, heads: int | None = None, role: str | None = None) -> Linear:
    return Linear(f"l{number}", "backbone", None, role or ("q" if heads else "up"), out, 8, heads, torch.float32)


def test_wanted_forms_are_obeyed():
    linears = [one(0, 64, 4), one(1, 96, role="gate"), one(2, 96)]
    forms = choose_forms(linears, {"gate": "sketch:7", "q": "blocks:32"})
    assert forms == {"l0": CurvatureForm("blocks", 32), "l1": CurvatureForm("sketch", 7), "l2": CurvatureForm("full")}


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
        choose_forms([one(0, 96)], wanted)


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
