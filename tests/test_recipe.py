"""Recipes: the built-in ones, changes by dotted key, and what is said about a wrong one."""

from importlib.resources import files

import pytest
import yaml

from spectrim.errors import RecipeError
from spectrim.recipe import Recipe, builtin_names


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


GOOD = {"name": "mine", "summary": "s", "paper": "p", "metric": {"kind": "whitening", "modality": "joint"}}


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes_are_whole(name):
    recipe = Recipe.read(name)
    assert recipe.name == name
    assert recipe.summary.endswith(".")
    assert "\n" not in recipe.summary
    assert recipe.paper


def test_built_in_recipes_are_those_of_the_papers():
    assert builtin_names() == (
        *("adasvd", "asvd", "curvature", "curvature+gptq", "fwsvd", "jw-svd", "jw-svd+gptq", "laser", "laser+gptq"),
        *("spectrim", "svd", "svd-llm"),
    )
    kinds = {name: Recipe.read(name).metric.kind for name in builtin_names()}
    assert kinds == {
        "adasvd": "whitening",
        "svd": "identity",
        "fwsvd": "fisher-rows",
        "asvd": "activation-diagonal",
        "svd-llm": "whitening",
        "jw-svd": "whitening",
        "jw-svd+gptq": "whitening",
        "curvature": "curvature",
        "curvature+gptq": "curvature",
        "laser": "curvature",
        "laser+gptq": "curvature",
        "spectrim": "curvature",
    }
    assert {name for name in builtin_names() if Recipe.read(name).needs_curvature} == {
        *("curvature", "curvature+gptq", "laser", "laser+gptq", "spectrim"),
    }
    assert {name for name in builtin_names() if Recipe.read(name).metric.per_head} == {"laser", "laser+gptq"}
    assert {name for name in builtin_names() if Recipe.read(name).needs_gradients} == {"fwsvd"}
    assert {name for name in builtin_names() if not Recipe.read(name).needs_statistics} == {"svd"}
    for rule in ("sensitivity", "adacr"):
        assert Recipe.read("svd", {"allocation.rule": rule}).needs_statistics


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_round_trip_through_a_file(tmp_path, suffix):
    for name in builtin_names():
        recipe = Recipe.read(name)
        path = write(tmp_path / f"{name}.{suffix}", recipe.model_dump(mode="json"))
        assert Recipe.read(path) == recipe
    assert Recipe.read(recipe) == recipe


def test_changes_set_single_values_and_leave_the_recipe_alone():
    recipe = Recipe.read("jw-svd")
    changed = Recipe.read(
        recipe, {"metric.gamma": 0.5, "allocation.rule": "uniform", "allocation.places": ["backbone"], "name": "other"}
    )
    assert (changed.metric.gamma, changed.allocation.rule, changed.name) == (0.5, "uniform", "other")
    assert changed.allocation.places == ("backbone",)
    assert changed.metric.unreached == recipe.metric.unreached
    assert recipe == Recipe.read("jw-svd")


def test_changes_reach_parts_that_a_file_leaves_out(tmp_path):
    path = write(tmp_path / "r.yaml", GOOD)
    assert Recipe.read(path).allocation.rule == "uniform"
    assert Recipe.read(path, {"allocation.rule": "global-energy"}).allocation.rule == "global-energy"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metric.gama": 1}, "key 'metric.gama': Extra inputs"),
        ({"extra": 1}, "key 'extra'"),
        ({"metric.gamma": -1}, "key 'metric.gamma'"),
        ({"metric.gamma": float("nan")}, "key 'metric.gamma'"),
        ({"metric.kind": "magic"}, "key 'metric.kind'"),
        ({"metric.kind.x": 1}, "recipe key 'metric.kind.x' leads nowhere"),
        ({"metric": 1}, "key 'metric'"),
        ({"allocation.places": ["attic"]}, r"key 'allocation.places.0'"),
        ({"allocation.places": []}, "key 'allocation.places'"),
        ({"version": 2}, "key 'version'"),
        ({"metric.gamma": True}, "key 'metric.gamma'"),
        ({"metric.gamma": "0.5"}, "key 'metric.gamma'"),
        ({"metric.gamma": float("inf")}, "key 'metric.gamma'"),
        ({"metric.gamma": [1]}, "key 'metric.gamma'"),
        ({"metric.per_head": 1}, "key 'metric.per_head'"),
        ({"storage.multiple": True}, "key 'storage.multiple'"),
        ({"storage.multiple": 16.0}, "key 'storage.multiple'"),
        ({"storage.multiple": -16}, "key 'storage.multiple'"),
        ({"compensate.samples": "32"}, "key 'compensate.samples'"),
        ({"quantize.bits": True}, "key 'quantize.bits"),
        ({"quantize.damping": float("nan")}, "key 'quantize.damping'"),
        ({"quantize.damping": float("inf")}, "key 'quantize.damping'"),
        ({"quantize.damping": 0}, "key 'quantize.damping'.*above 0, or auto"),
        ({"quantize.damping": "little"}, "key 'quantize.damping'.*above 0, or auto"),
        ({"quantize.damping": True}, "key 'quantize.damping'"),
        ({"allocation.places": "backbone"}, "key 'allocation.places'"),
        ({"allocation.floor": float("nan")}, "key 'allocation.floor'"),
        ({"metric": {"kind": "whitening"}, "metric.gamma": 2}, "'metric' and 'metric.gamma' set one value twice"),
        ({"metric.gamma": 2, "metric": {"kind": "whitening"}}, "'metric' and 'metric.gamma' set one value twice"),
        ({"": 1}, "key ''"),
        ({"metric..gamma": 1}, "key 'metric."),
        ({"name": "No Name"}, "key 'name'"),
    ],
)
def test_wrong_keys_and_values_are_named(changes, named):
    with pytest.raises(RecipeError, match=named):
        Recipe.read("svd-llm", changes)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("metric: [", "cannot be read"),
        ("- a list", "is not a table"),
        ("", "is not a table"),
        ("3", "is not a table"),
        ("[" * 100_000, "nested too deeply"),
        ("name: a\nsummary: s\npaper: p\nname: b", "gives the key 'name' twice"),
        ("name: a\nmetric: {kind: whitening, gamma: 1, gamma: 2}", "gives the key 'gamma' twice"),
        ("{name: a, summary: s, paper: p, metric: &m {kind: *m}}", "key 'metric.kind'"),
        ("{name: a, summary: s, paper: p, metric: {kind: identity}, 1: 2}", "key '1': Keys should be strings"),
        ({**GOOD, "name": 3}, "key 'name'"),
        ({**GOOD, "metric": [1]}, "key 'metric'"),
        ({**GOOD, "metric": {"kind": "whitening", "gamma": True}}, "key 'metric.gamma'"),
        ({**GOOD, "metric": {"kind": "whitening", "gamma": float("nan")}}, "key 'metric.gamma'"),
        ({**GOOD, "storage": {"multiple": "16"}}, "key 'storage.multiple'"),
        ("name: a\npaper: !!python/name:os.getcwd", "is not YAML"),
        ({"name": "x", "summary": "s", "paper": "p"}, "key 'metric': Field required"),
    ],
)
def test_bad_files_are_named(tmp_path, content, named):
    path = write(tmp_path / "bad.yaml", content)
    with pytest.raises(RecipeError, match=rf"bad\.yaml'.*{named}"):
        Recipe.read(path)


def test_binary_and_missing_files_are_named(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfa")
    for name in ("b.yaml", "none.yaml"):
        with pytest.raises(RecipeError, match=rf"{name}' cannot be read"):
            Recipe.read(tmp_path / name)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"no recipe 'jwsvd'; choose from adasvd, asvd, curvature, curvature\+gptq, fwsvd, jw-svd"
    ):
        Recipe.read("jwsvd")


def test_a_table_that_a_file_uses_twice_changes_in_one_place(tmp_path):
    path = write(tmp_path / "r.yaml", f"{yaml.safe_dump(GOOD)}storage: &empty {{}}\nallocation: *empty\n")
    changed = Recipe.read(path, {"storage.multiple": 8})
    assert (changed.storage.multiple, changed.allocation.rule) == (8, "uniform")


def test_decimal_numbers_in_a_file_are_numbers(tmp_path):
    path = write(tmp_path / "r.yaml", "{name: a, summary: s, paper: p, metric: {kind: curvature, damping: 1e-3}}")
    assert Recipe.read(path).metric.damping == 0.001


def test_loss_aware_needs_curvature():
    with pytest.raises(RecipeError, match=r"': allocation 'loss-aware' needs predicted losses; set metric"):
        Recipe.read("svd-llm", {"allocation.rule": "loss-aware"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"allocation.rule": "loss-aware"}, "recipe 'svd': allocation 'loss-aware' needs predicted losses; set "),
        (
            {"quantize.bits": 4, "compensate.kind": "adacomp"},
            "recipe 'svd': adaComp fits factors that are no integers",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_one_sentence(changes, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.read("svd", changes)
    assert str(caught.value).startswith(said)


def test_a_recipe_file_may_end_in_capitals(tmp_path):
    (tmp_path / "OWN.YAML").write_bytes(files("spectrim").joinpath("recipes", "svd.yaml").read_bytes())
    assert Recipe.read(tmp_path / "OWN.YAML") == Recipe.read("svd")


def test_the_dampening_of_integers_follows_the_noise_of_what_the_samples_show():
    """A hundredth with many positions, a fifth of inputs by position more with fewer, never more than a tenth."""
    part = Recipe.read("curvature+gptq").quantize
    found = [part.dampening(512, positions) for positions in (1e9, 10240, 2048, 512, 0)]
    assert found == pytest.approx([0.01, 0.02, 0.06, 0.1, 0.1], rel=1e-4)
    assert part.dampening(128, 2560) == pytest.approx(0.02)
    assert part.model_copy(update={"damping": 0.3}).dampening(512, 10) == 0.3
    assert part.model_copy(update={"method": "rtn"}).dampening(512, 10) is None
