"""Labels of gradient passes: which positions carry one, answers that are given or drawn, models that look ahead."""

from types import SimpleNamespace

import pytest
import torch

import families
from curvatures import by_autograd, gather, text
from helpers.samples import image_folder, llava_processor, word_tokenizer, write_jsonl
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.calibrate.labels import Labelled, labelled_samples
from spectrim.calibrate.passes import prepared
from spectrim.errors import ModelError
from spectrim.samples import Batch

CAUSAL = tuple(family for family in families.VLMS if family != "paligemma")
END = families.TEXT["eos_token_id"]


class Shown:
    """Data that are samples of one modality as they are; stands for ``calibrate.data.Data``."""

    def __init__(self, samples, answer=None):
        self.samples, self.answer = samples, answer
        self.processor = SimpleNamespace(tokenizer=word_tokenizer())

    def batches(self, modality, size):
        assert size == 1
        return (Batch(modality, one, 1, (self.answer,) if modality == "image" else ()) for one in self.samples)


def label(model, samples, modality="image", answer=None, **options) -> list[Labelled]:
    chosen = {"sampled": False, "answer_tokens": 5, "seed": 0, "numbers": range(len(samples)), **options}
    with prepared(model):
        return list(labelled_samples(model, Shown(samples, answer), modality, **chosen))


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0]


def test_text_is_labelled_at_every_token_but_the_first():
    model = families.FAMILIES["llama"]()
    (sample,) = label(model, [families.text_inputs(model, length=9)], "text")
    assert sample.labelled.tolist() == [True] * 8
    assert torch.equal(sample.targets(torch.zeros(8, families.VOCAB)), sample.inputs["input_ids"][0, 1:])
    sums = gather(model, [sample])
    assert sums.labels == 8
    assert {output.count for output in sums.outputs.values()} == {9}


@pytest.mark.parametrize("family", CAUSAL)
def test_a_given_answer_and_its_end_are_labelled(family):
    model = families.FAMILIES[family]()
    prompt = families.example_inputs(model)
    (sample,) = label(model, [prompt], answer="w7 w9")
    ids, size = sample.inputs["input_ids"][0], prompt["input_ids"].shape[1]
    assert ids.tolist() == [*prompt["input_ids"][0].tolist(), 7, 9, END]
    assert sample.labelled.nonzero()[:, 0].tolist() == [size - 1, size, size + 1]
    assert sample.targets(torch.zeros(3, families.VOCAB)).tolist() == [7, 9, END]
    # The prompt is seen as it was before, and nothing sees what comes after it.
    torch.testing.assert_close(logits(model, sample.inputs)[:size], logits(model, prompt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3", "mistral3"])
def test_what_follows_the_last_label_has_no_gradient(family):
    model = families.FAMILIES[family]()
    (sample,) = label(model, [families.example_inputs(model)], answer="w7 w9")
    found, backbone = by_autograd(model, sample), anatomy(model).in_place("backbone")
    for one in backbone:
        g = found[one.name][0]
        assert len(g) == sample.inputs["input_ids"].shape[1]
        assert not g[-1].any()
    last = [one.name for one in backbone if one.role == "down"][-1]
    labelled = sample.labelled.nonzero()[:, 0]
    assert (found[last][0].abs().sum(1) > 0).nonzero()[:, 0].tolist() == labelled.tolist()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_sample_without_an_answer_gets_one_of_the_model(family):
    model = families.FAMILIES[family]()
    prompts = [families.example_inputs(model, seed=seed) for seed in (0, 0)]
    state = torch.get_rng_state()
    first, second = label(model, prompts)
    (alone,) = label(model, prompts, numbers=range(1, 2))
    other = label(model, prompts, seed=1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone.inputs["input_ids"], second.inputs["input_ids"])
    size, answers = prompts[0]["input_ids"].shape[1], set()
    for sample in (first, second, other):
        ids = sample.inputs["input_ids"][0]
        assert torch.equal(ids[:size], prompts[0]["input_ids"][0])
        assert 1 <= len(ids) - size <= 5
        assert sample.labelled.nonzero()[:, 0].tolist() == list(range(size - 1, len(ids) - 1))
        answers.add(tuple(ids[size:].tolist()))
    assert len(answers) == 3  # the number of a sample and the seed both count
    assert len(label(model, prompts, seed=2**63 - 1, sampled=True)) == 2


def test_answers_are_drawn_from_the_plain_distribution():
    """Whatever the generation config of the model prefers."""
    model = families.FAMILIES["llava"]()
    prompt = families.example_inputs(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    length = prompt["input_ids"].shape[1]
    answers = [sample.inputs["input_ids"][0, length:] for sample in label(model, [prompt] * 60)]
    chances = logits(model, prompt)[-1].softmax(-1)
    hits, p = sum(int(answer[0] == chances.argmax()) for answer in answers), float(chances.max())
    assert 0.3 < p < 0.9
    assert abs(hits - 60 * p) < 4 * (60 * p * (1 - p)) ** 0.5
    config = model.generation_config
    for name, value in (("temperature", 0.1), ("top_k", 1), ("top_p", 0.1), ("min_p", 0.9), ("num_beams", 3)):
        setattr(config, name, value)
    config.repetition_penalty = 9.0
    again = [sample.inputs["input_ids"][0, length:] for sample in label(model, [prompt] * 10)]
    assert all(torch.equal(a, b) for a, b in zip(answers[:10], again, strict=True))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_no_answer_holds_a_piece_of_an_image(family):
    """The model would look for an image that is not there."""
    model = families.FAMILIES[family]()
    prompt = families.example_inputs(model)
    with torch.no_grad():
        model.lm_head.weight[families.IMAGE] = model.lm_head.weight.sum(0) + 100 * logits_direction(model, prompt)
        assert logits(model, prompt)[-1].argmax() == families.IMAGE
    samples = label(model, [prompt] * 3)
    assert gather(model, samples).samples == 3


def logits_direction(model, prompt) -> torch.Tensor:
    """What the output head reads after the prompt."""
    read = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0][0, -1]))
    logits(model, prompt)
    handle.remove()
    return read[0]


@pytest.mark.parametrize("image_first", [False, True])
def test_a_model_whose_prompt_sees_its_answer_is_refused(image_first):
    model = families.FAMILIES["paligemma"]()
    inputs = families.example_inputs(model)
    if image_first:
        inputs = {name: value[:, 3:] if value.ndim == 2 else value for name, value in inputs.items()}
        assert inputs["input_ids"][0, 0] == families.IMAGE
    for answer in ("w7", None):
        with pytest.raises(ModelError, match=r"attend to later ones.*; calibrate curvature on text alone"):
            label(model, [inputs], answer=answer)
    with pytest.raises(ModelError, match=r"attend to later ones.*; choose a recipe that needs no gradients"):
        label(model, [families.text_inputs(model)], "text")


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("answer", ["w7", f"w{families.IMAGE - 50}"])
def test_an_image_at_the_beginning_is_no_obstacle(family, answer):
    model = families.FAMILIES[family]()
    inputs = families.example_inputs(model)
    inputs = {name: value[:, 3:] if value.ndim == 2 else value for name, value in inputs.items()}
    assert inputs["input_ids"][0, 0] == families.IMAGE
    assert len(label(model, [inputs], answer=answer)) == 1


def test_sampled_labels_are_drawn_at_the_same_positions():
    model = families.FAMILIES["llava"]()
    prompts = [families.example_inputs(model)] * 2
    given, sampled, again = (label(model, prompts, answer="w7 w9", sampled=s) for s in (False, True, True))
    chances = torch.zeros(3, families.VOCAB)
    chances[:, :40] = 9.0
    for one, two, three in zip(given, sampled, again, strict=True):
        assert torch.equal(one.labelled, two.labelled)
        assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
        drawn = two.targets(chances)
        assert (drawn < 40).all()
        assert torch.equal(drawn, three.targets(chances))
    first, second = (one.targets(chances) for one in label(model, prompts, answer="w7 w9", sampled=True))
    assert not torch.equal(first, second)
    assert text(torch.arange(4)).targets(torch.zeros(3, 9)).tolist() == [1, 2, 3]


def outputs(statistics: Statistics, family: str, modality) -> dict:
    found = {one.name: statistics.output(one.name, modality) for one in anatomy(families.FAMILIES[family]()).linears}
    return {name: output for name, output in found.items() if output is not None}


def test_answers_of_image_samples_reach_the_statistics(words, tmp_path):
    """Given answers label three tokens of each sample; a drawn one is the same in every run with one seed."""
    image_folder(tmp_path / "pictures", 3)
    rows = [{"image": f"pictures/{i:03}.png", "instruction": "w7 w8"} for i in range(3)]
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    answered = write_jsonl(tmp_path / "answered.jsonl", [row | {"answer": "w3 w5"} for row in rows])
    options = {"processor": llava_processor(), "text": words, "samples": 3, "seqlen": 8}
    runs = {}
    for name, source, seed in [("given", answered, 0), ("a", plain, 0), ("b", plain, 0), ("c", plain, 1)]:
        model = families.FAMILIES["llava"]()
        more = {"images": source, "seed": seed, "curvature": True, "answer_tokens": 4}
        runs[name] = outputs(calibrate(model, tmp_path / name, **options, **more), "llava", "image")
    down = "model.language_model.layers.1.mlp.down_proj"
    assert (runs["given"][down].count, runs["given"][down].labels) == (3 * (1 + 16 + 2 + 1 + 3), 3 * 3)
    assert 3 <= runs["a"][down].labels <= 3 * 4
    assert any(name.startswith("model.vision_tower") for name in runs["a"])
    for name, output in runs["a"].items():
        assert torch.equal(output.sums["output"], runs["b"][name].sums["output"])
    assert not torch.equal(runs["a"][down].sums["output"], runs["c"][down].sums["output"])
    text_alone = Statistics.open(tmp_path / "a").output(down, "text")
    assert (text_alone.count, text_alone.labels) == (3 * 8, 3 * 7)
