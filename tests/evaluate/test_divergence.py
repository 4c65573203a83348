"""Divergence from the dense model: against sums by hand, its intervals, and as a task of `spectrim evaluate`."""

import json
from io import StringIO
from math import sqrt

import pytest
import torch
from rich.console import Console
from scipy.stats import norm

from helpers.command import run
from helpers.evaluated import TEXT, TOKENIZER, make_llama, make_llava, make_processor, make_questions
from spectrim.checkpoint import save
from spectrim.errors import NumericalError, SampleError
from spectrim.evaluate import divergences, evaluate, remarks
from spectrim.evaluate.divergence import Divergence, Predictions, _interval, samples_of
from spectrim.evaluate.footprint import Memory
from spectrim.evaluate.results import DirectoryResult, EvaluationReport
from spectrim.pipeline import compress
from spectrim.settings import EvaluationOptions


def text_data(tokens: int = 90, seqlen: int = 31):
    given = {"questions": (), "prompts": None, "seqlen": seqlen, "tokens": tokens, "seed": 3}
    return samples_of(TOKENIZER, text=TEXT, **given)


def gathered(folder, model, data, tokens=90) -> Predictions:
    found = Predictions(folder)
    found.gather(model, data, tokens=tokens, seed=0, progress=None)
    return found


def by_hand(dense, small, windows) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergences and agreements of all positions, in float64, one position at a time."""
    divergence, same = [], []
    with torch.no_grad():
        for ids in windows:
            p, q = (model(input_ids=ids[None]).logits[0, :-1].double().softmax(-1) for model in (dense, small))
            for a, b in zip(p, q, strict=True):
                divergence.append(sum(x * torch.log(x / y) for x, y in zip(a, b, strict=True)))
                same.append(float(a.argmax() == b.argmax()))
    return torch.stack(divergence), torch.tensor(same)


def test_text_is_the_sum_by_hand(tmp_path):
    dense, small, data = make_llama(0), make_llama(0), text_data()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    (found,) = gathered(tmp_path, dense, data).compare(small)
    divergence, same = by_hand(dense, small, data.windows)
    assert (found.modality, found.samples, found.tokens) == ("text", 3, 90)
    assert found.mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert found.mean > 0.01
    assert found.p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-4)
    assert found.agreement == pytest.approx(same.mean().item())
    assert 0 < found.agreement < 1
    assert found.low < found.mean < found.high
    assert found.agreement_low < found.agreement < found.agreement_high


def test_a_model_does_not_differ_from_itself(tmp_path):
    (found,) = gathered(tmp_path, make_llama(), text_data()).compare(make_llama())
    assert found.mean == pytest.approx(0, abs=1e-7)
    assert (found.agreement, found.agreement_low, found.agreement_high) == (1, 1, 1)


@pytest.mark.parametrize("tokens", [1, 29, 30, 31, 75])
def test_tokens_are_counted_exactly(tokens, tmp_path):
    (found,) = gathered(tmp_path, make_llama(), text_data(tokens), tokens).compare(make_llama(1))
    assert found.tokens == tokens
    assert found.samples == -(-tokens // 30)
    assert (found.low is None) == (found.samples == 1)


def test_images_are_compared_on_answers_that_the_dense_model_draws(tmp_path):
    """The same inputs for both, so that the same model agrees in all; another image changes what is predicted."""
    questions = make_questions()
    given = {"questions": questions, "prompts": None, "seqlen": 31, "tokens": 40, "seed": 0}
    data = samples_of(make_processor(), text=None, **given)
    found = gathered(tmp_path, make_llava(), data, 40)
    (same,) = found.compare(make_llava())
    assert (same.modality, same.tokens, same.agreement) == ("image", 40, 1)
    assert same.mean == pytest.approx(0, abs=1e-6)
    blind = make_llava()
    for parameter in blind.model.vision_tower.parameters():
        parameter.data.zero_()
    (other,) = found.compare(blind)
    assert other.mean > 0.05
    assert other.agreement < 1


def test_the_interval_is_that_of_independent_samples_of_unequal_length():
    """Twice as many equal samples halve its square; one sample has none; it stays within its bounds."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(5, generator=generator).double() for _ in range(50)]
    low, high = _interval(parts, 1.0)
    means = torch.stack([part.mean() for part in parts])
    half = norm.ppf(0.975) * (means.std() / sqrt(50)).item()
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    low_, high_ = _interval(parts * 4, 1.0)
    assert (high_ - low_) * 2 == pytest.approx(high - low, rel=0.02)
    assert _interval(parts[:1], 1.0) == (None, None)
    low, high = _interval([torch.tensor([1.0, 1.0, 0.0]).double(), torch.ones(9).double()], 1.0)
    assert high == 1.0
    covered = 0
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        shifts = torch.randn(30, generator=draw)
        lengths = torch.randint(1, 9, (30,), generator=draw).tolist()
        low, high = _interval([torch.full((n,), 5 + s).double() for n, s in zip(lengths, shifts, strict=True)], 99.0)
        covered += low < 5 < high
    assert 175 <= covered <= 198


def test_another_vocabulary_and_nan_are_named(tmp_path):
    found = gathered(tmp_path, make_llama(), text_data())
    other = make_llama()
    other.resize_token_embeddings(310)
    with pytest.raises(SampleError, match="knows 310 tokens and the dense model 300"):
        found.compare(other)
    broken = make_llama()
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite"):
        found.compare(broken)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    home = tmp_path_factory.mktemp("divergence")
    dense = save(make_llava(), home / "dense", processor=make_processor())
    small = home / "small"
    compress(str(dense), small, recipe="svd", retain=0.5)
    text = home / "text.txt"
    text.write_text(TEXT * 3)
    return dense, small, text


def test_the_task_kl(directories, tmp_path, capsys):
    """The dense model may stand last; the table, the JSON and the card have the figures."""
    dense, small, text = directories
    options = ("--tasks", "kl", "--text", text, "--seqlen", "32", "--kl-tokens", "60", "--json", tmp_path / "r.json")
    code, said, err = run(capsys, "evaluate", small, dense, *options, "--samples", "2", "--card")
    assert code == 0, err
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results[1]["divergence"] == []
    assert [row["modality"] for row in results[0]["divergence"]] == ["text", "image"]
    assert all(row["tokens"] == 60 and row["mean"] > 0 for row in results[0]["divergence"])
    assert "Divergence from the dense model" in said
    card = (small / "README.md").read_text()
    assert "KL divergence from the dense model, image" in card
    report = evaluate([dense, small], tasks=["kl"], text=str(text), seqlen=32, kl_tokens=60, samples=2)
    assert report.results[1].divergence[0].mean == results[0]["divergence"][0]["mean"]


def test_your_own_prompts(directories, tmp_path):
    """Images with prompts take the place of the questions."""
    dense, small, text = directories
    rows = []
    for number, question in enumerate(make_questions()[:4]):
        question.image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "What is it?", "answer": "A shape there"})
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"tasks": ["kl"], "text": str(text), "seqlen": 32, "prompts": str(tmp_path / "my.jsonl")}
    report = evaluate([dense, small], **given)
    image = report.results[1].divergence[1]
    answer = len(make_processor().tokenizer("A shape there", add_special_tokens=False)["input_ids"]) + 1
    assert (image.samples, image.tokens) == (4, 4 * answer)
    assert report.questions is None


def test_what_cannot_be_compared_is_refused(directories, capsys, tmp_path):
    dense, small, _ = directories
    llama = save(make_llama(), tmp_path / "llama", processor=TOKENIZER)
    other = save(make_llama(1), tmp_path / "other", processor=TOKENIZER)
    for arguments, message in (
        ((dense, "--tasks", "kl"), "name the dense model, and another"),
        ((small, "--tasks", "kl"), "name the dense model, and another"),
        ((llama, other, "--tasks", "kl", "--prompts", tmp_path), "read text alone"),
        ((dense, small, "--prompts", tmp_path), "--prompts has no effect without the task kl"),
        ((dense, small, "--tasks", "kl", "--blind"), "--blind has no effect without the task vqa"),
    ):
        code, _, err = run(capsys, "evaluate", *arguments)
        assert code == 2
        assert message in err


def result(predicted, price=1.0, **means):
    rows = tuple(Divergence(modality, 9, 100, mean, mean, mean, 3.0, 0.9, 0.8, 1.0) for modality, mean in means.items())
    given = {"predicted_loss": predicted, "divergence": rows, "image_price": price}
    return DirectoryResult("m", True, "cpu", "float32", 10, Memory(1, 2, None), **given)


def test_what_is_predicted_of_both_modalities_stands_beside_what_is_measured_of_both():
    both = result({"joint": 0.5}, 5.0, text=0.1, image=0.06)
    assert both.forecasts == [("text + 5 × image", 0.5, pytest.approx(0.4))]
    apart = result({"text": 0.5, "image": 0.05}, text=0.1, image=0.06)
    assert apart.forecasts == [("text", 0.5, 0.1), ("image", 0.05, 0.06)]
    assert result({"joint": 0.5}, 5.0, text=0.1).forecasts == []  # images were not measured
    report = EvaluationReport("", {}, EvaluationOptions.checked().scored, None, None, "d", None, (both, apart))
    (remark,) = remarks(report)
    assert "text, 0.100 nats, is less than half of the predicted 0.500" in remark
    shown = StringIO()
    Console(file=shown, width=200).print(divergences(report))
    assert "text + 5 × image" in shown.getvalue()
    assert "0.4000" in shown.getvalue()
