"""Plans: read, edited by hand, refused when they do not fit."""

import json

import pytest

from spectrim.errors import BudgetError
from spectrim.plan.plan import Plan, plan_row
from spectrim.storage.layers import LowRankLinear


@pytest.fixture
def plan(parts) -> Plan:
    rows = {
        linear.name: plan_row(linear, None if number % 3 == 0 else number, 0.1, "text")
        for number, linear in enumerate(parts.linears)
    }
    return Plan(recipe="svd", retain=0.5, linears=rows)


@pytest.fixture
def file(tmp_path, plan):
    path = tmp_path / "plan.json"
    path.write_text(plan.json())
    return path


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_bytes_are_those_of_the_shapes(parts, plan):
    total = 0
    for linear in parts.linears:
        row = plan.linears[linear.name]
        out, size = linear.out_features, linear.in_features
        assert row.dense_bytes == 4 * out * size
        assert row.bytes == (4 * out * size if row.rank is None else 4 * row.rank * (out + size))
        total += row.bytes
    assert plan.bytes == total
    assert plan.dense_bytes == sum(4 * linear.params for linear in parts.linears)
    assert plan.ranks == {name: row.rank for name, row in plan.linears.items() if row.rank is not None}


def test_an_edited_rank_is_read_back(parts, plan, file):
    assert Plan.read(file, parts).ranks == plan.ranks
    first, second, third = [linear.name for linear in parts.linears][:3]

    def change(content):
        content["linears"][first]["rank"] = 7
        content["linears"][second]["rank"] = None
        del content["linears"][third]  # what is not planned for stays dense

    edit(file, change)
    read = Plan.read(file, parts)
    dense = {name: rank for name, rank in plan.ranks.items() if name not in (second, third)}
    assert read.ranks == {**dense, first: 7}
    known = parts.linear(first)
    assert read.linears[first].bytes == 7 * 4 * (known.out_features + known.in_features)
    assert list(read.linears) == [linear.name for linear in parts.linears]
    assert (read.recipe, read.retain) == ("svd", 0.5)


def test_ranks_by_head_are_counted_written_and_read_back(parts, plan, file):
    q, k = (next(linear for linear in parts.linears if linear.role == role) for role in "qk")
    assert (q.out_features, q.in_features, q.heads, k.heads) == (64, 64, 4, 2)
    assert plan_row(q, (3, 1, 16, 2)).bytes == 4 * (3 + 1 + 16 + 2) * (16 + 64)
    layer = LowRankLinear(q.in_features, q.out_features, (3, 1, 16, 2), bias=False)
    assert plan_row(q, (3, 1, 16, 2)).bytes == sum(parameter.nbytes for parameter in layer.parameters())

    edit(file, lambda content: content["linears"][q.name].update(rank=[3, 1, 16, 2]))
    edit(file, lambda content: content["linears"][k.name].update(rank=[5, 4]))
    read = Plan.read(file, parts)
    assert read.ranks == {**plan.ranks, q.name: (3, 1, 16, 2), k.name: (5, 4)}
    assert read.linears[k.name].bytes == 4 * 9 * (16 + 64)
    assert '"rank": [3, 1, 16, 2],\n' in read.json()
    file.write_text(read.json())
    assert Plan.read(file, parts) == read


@pytest.mark.parametrize(
    ("role", "rank", "message"),
    [
        ("q", [3, 3], "ranks for 2 heads; it has 4"),
        ("k", [3, 3, 3, 3], "ranks for 4 heads; it has 2"),
        ("v", [17, 3], "rank 17; it can have 16 at most"),
        ("o", [3, 3, 3, 3], "ranks by head, which only a q, k or v"),
        ("up", [3, 3], "ranks by head, which only a q, k or v"),
        ("q", [3, 3, 0, 3], "rank: Input should be greater"),
        ("q", [], "rank: Input should be greater"),
        ("q", "three", "rank: .*valid integer"),
    ],
)
def test_misfits_by_head_are_named(parts, file, role, rank, message):
    name = next(linear.name for linear in parts.linears if linear.role == role)
    edit(file, lambda content: content["linears"][name].update(rank=rank))
    with pytest.raises(BudgetError, match=f"{name}.*{message}"):
        Plan.read(file, parts)


def test_the_loss_of_a_plan_is_the_sum_over_its_rows(parts, plan):
    first, second, third = parts.linears[:3]
    assert plan.loss is None
    rows = {
        **plan.linears,
        first.name: plan_row(first, 2, loss=0.5),
        second.name: plan_row(second, None, loss=0.0),
        third.name: plan_row(third, 3, loss=0.25),
    }
    predicted = plan.model_copy(update={"linears": rows})
    assert predicted.loss == 0.75
    assert json.loads(predicted.json())["linears"][third.name]["loss"] == 0.25
    assert predicted.fitted(parts).loss is None  # a note, which may be that of another rank


def test_a_plan_object_is_held_to_the_same(parts, plan):
    first = parts.linears[0]
    shuffled = plan.model_copy(update={"linears": dict(reversed(plan.linears.items()))})
    assert list(shuffled.fitted(parts).linears) == [linear.name for linear in parts.linears]
    wrong = plan.model_copy(update={"linears": {first.name: plan_row(first, 1000)}})
    with pytest.raises(BudgetError, match=f"the plan gives '{first.name}' rank 1000"):
        wrong.fitted(parts)


def test_misfits_are_named(parts, file):
    name = parts.linears[0].name
    most = min(parts.linears[0].out_features, parts.linears[0].in_features)
    edit(file, lambda content: content["linears"][name].update(rank=most))
    assert Plan.read(file, parts).ranks[name] == most
    edit(file, lambda content: content["linears"][name].update(rank=most + 1))
    with pytest.raises(BudgetError, match=f"'{name}' rank {most + 1}; it can have {most} at most"):
        Plan.read(file, parts)
    edit(file, lambda content: content["linears"][name].update(rank=0))
    with pytest.raises(BudgetError, match=f"{name}: rank: Input should be greater"):
        Plan.read(file, parts)
    edit(file, lambda content: content["linears"].update({"attic.proj": content["linears"].pop(name)}))
    edit(file, lambda content: content["linears"]["attic.proj"].update(rank=1))
    with pytest.raises(BudgetError, match=r"plans for 'attic\.proj', which the model lacks"):
        Plan.read(file, parts)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "valid dictionary|Input should be an object"),
        ("null", "Input should be an object"),
        ("{}", "recipe: Field required"),
        ('{"recipe": "svd", "linears": {}, "version": 2}', "version: Input should be 1"),
        ("\xff", "is not UTF-8"),
        ("", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"recipe": ' + "[" * 400 + "]" * 400 + "}", "recipe|recursion"),
        ('{"recipe": "svd", "recipe": "svd-llm", "linears": {}}', "gives the key 'recipe' twice"),
        ('{"recipe": "svd", "linears": {"a.b": {"rank": 1}, "a.b": {"rank": 2}}}', "gives the key 'a.b' twice"),
        ('{"recipe": "svd", "linears": {"a.b": {"rank": 1, "rank": 2}}}', "gives the key 'rank' twice"),
        ('{"recipe": "svd", "retain": NaN, "linears": {}}', "retain: "),
        ('{"recipe": "svd", "retain": 1e999, "linears": {}}', "retain: "),
        ('{"recipe": "svd", "retain": -0.5, "linears": {}}', "retain: "),
        ('{"recipe": "svd", "retain": "half", "linears": {}}', "retain: "),
        ('{"recipe": "svd", "linears": []}', "linears: "),
        ('{"recipe": "svd", "linears": {"a.b": 3}}', "linears: a.b: "),
        ('{"recipe": "svd", "linears": {}, "notes": 1}', "notes: Extra inputs"),
        ('{"recipe": "\\ud800", "linears": {}}', "surrogate"),
    ],
)
def test_what_is_no_plan_is_named(parts, tmp_path, content, named):
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BudgetError, match=rf"^\S*plan\.json is no plan that can be read \(.*({named})") as caught:
        Plan.read(path, parts)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named(parts, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BudgetError, match=rf"{path.name} is no plan that can be read"):
            Plan.read(path, parts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rank", value) for value in (True, 3.0, 2.5, "3", -1, -(10**30), [True] * 4, [3.0, 3, 3, 3], {}, [[1]])),
        *(("pivoted", value) for value in (1, 0, "true", None)),
        *(("bytes", value) for value in (-1, True, None, 1.5)),
        *((key, value) for key in ("error", "loss") for value in (float("nan"), float("inf"), "0", True)),
        *(("integers", value) for value in (4, True, [], {"bits": True}, {"bits": 4.5}, {"bits": 1}, {"bits": 9})),
        *(("integers", {"bits": 4, **value}) for value in ({"group": 48}, {"group": True}, {"group": 0}, {"zero": 1})),
        ("integers", {"bits": 4, "symmetric": 1}),
        ("ranks", 3),
    ],
)
def test_values_of_another_kind_are_named_with_their_linear(parts, file, key, value):
    name = next(linear.name for linear in parts.linears if linear.role == "q")
    edit(file, lambda content: content["linears"][name].update({key: value}))
    with pytest.raises(BudgetError, match=rf"no plan that can be read \(linears: {name}: {key}: .*correct it"):
        Plan.read(file, parts)


@pytest.mark.parametrize("rank", [10**9, 10**30, 65])
def test_ranks_above_the_shape_are_named_before_anything_is_made(parts, file, rank):
    name = next(linear.name for linear in parts.linears if linear.role == "q")  # [64, 64]
    edit(file, lambda content: content["linears"][name].update(rank=rank))
    with pytest.raises(BudgetError, match=f"gives '{name}' rank {rank}; it can have 64 at most, or null for dense"):
        Plan.read(file, parts)


def test_a_row_that_saves_nothing_is_obeyed_and_logged(parts, plan, file, caplog):
    assert Plan.read(file, parts).ranks == plan.ranks
    assert not caplog.records
    name = next(linear.name for linear in parts.linears if linear.role == "q")  # [64, 64]
    edit(file, lambda content: content["linears"][name].update(rank=33))
    assert Plan.read(file, parts).ranks[name] == 33
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} stores '{name}' in more bytes than its dense weight has"
    ]


def test_a_plan_from_an_editor_that_marks_its_files(parts, plan, file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Plan.read(file, parts).ranks == plan.ranks
