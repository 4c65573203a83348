"""Plans: written flat, read in both versions, edited by hand, refused in one sentence when they do not fit."""

import json
import re

import pytest

import families
from compressed import logits
from spectrim.errors import BudgetError
from spectrim.pipeline import compress
from spectrim.plan.plan import Plan, PlanRow, plan_row
from spectrim.storage import DENSE, form
from spectrim.storage.base import tensors_of
from spectrim.storage.layers import LowRankLinear

GRID = {"bits": 4, "group": None, "symmetric": True}
SPECS = [
    ("low-rank", {"rank": 5, "pivoted": False}),
    ("low-rank", {"rank": 7, "pivoted": True}),
    (DENSE, {}),
    ("integers", {"bits": 3, "group": 16, "symmetric": False}),
    ("integer-factors", {"rank": 6, "grids": {"A": GRID, "B": GRID}}),
    ("integers+factors", {"rank": 4, "grids": {"A": GRID, "B": GRID, "R": {**GRID, "bits": 2}}}),
    ("integers+factors", {"rank": 4, "grids": {"R": GRID}}),
]


@pytest.fixture
def plan(parts) -> Plan:
    """Linears in all forms by turns."""
    rows = {
        linear.name: plan_row(linear, *SPECS[number % len(SPECS)], error=0.1, metric="text")
        for number, linear in enumerate(parts.linears)
    }
    return Plan(recipe="svd", retain=0.5, linears=rows)


@pytest.fixture
def file(tmp_path, plan):
    path = tmp_path / "plan.json"
    path.write_text(plan.json())
    return path


@pytest.fixture
def q(parts) -> str:
    """The name of a linear [64, 64] of 4 heads."""
    return next(linear.name for linear in parts.linears if linear.role == "q")


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(path, name: str, **row) -> None:
    """Exchange a row, but for its notes."""
    notes = {"bytes": 1, "dense_bytes": 1, "error": None, "metric": None, "loss": None}
    edit(path, lambda content: content["linears"].update({name: row | notes}))


def specs(plan: Plan) -> dict[str, tuple]:
    return {name: (row.form, row.spec) for name, row in plan.linears.items()}


def test_bytes_are_those_of_the_stored_tensors(parts, plan):
    total = 0
    for linear in parts.linears:
        row = plan.linears[linear.name]
        out, size = linear.out_features, linear.in_features
        tensors = tensors_of(row.form, size, out, row.spec, linear.dtype)
        assert row.dense_bytes == 4 * out * size
        assert row.bytes == sum(tensor.nbytes for tensor in tensors.values())
        if row.form == "low-rank":
            k = row.rank
            assert row.bytes == 4 * k * (out + size - row.spec["pivoted"] * k) + row.spec["pivoted"] * 4 * k
        total += row.bytes
    assert plan.bytes == total
    assert plan.dense_bytes == sum(4 * linear.params for linear in parts.linears)
    assert plan.changed == tuple(name for name, row in plan.linears.items() if row.form != DENSE)


def test_rows_are_flat_and_read_back(parts, plan, file):
    content = json.loads(file.read_text())
    assert content["version"] == 2
    for (kind, spec), row in zip(SPECS, content["linears"].values(), strict=False):
        notes = {"bytes", "dense_bytes", "error", "metric", "loss", "reason"}
        assert list(row) == ["form", *spec, *(key for key in row if key in notes)]
        assert row["form"] == kind
        assert {key: row[key] for key in spec} == spec
        assert notes <= row.keys()
    assert Plan.read(file) == plan
    fitted = Plan.read(file, parts)
    assert specs(fitted) == specs(plan)
    assert fitted.bytes == plan.bytes
    assert {row.error for row in fitted.linears.values()} == {None}  # a note, which may be that of another spec
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan
    assert PlanRow(form="low-rank", spec={"rank": (2, 3)}, bytes=1, dense_bytes=1).rank == 5


def test_rows_of_version_1(parts, file):
    """Without a form: a rank is low-rank, none is dense; integers were null."""
    first, second, third, fourth = [linear.name for linear in parts.linears][:4]
    q, k = (next(linear.name for linear in parts.linears if linear.role == role) for role in "qk")
    old = {"bytes": 1, "dense_bytes": 1, "error": 0.5, "metric": "text", "loss": None}
    rows = {
        first: {"rank": 9, **old},
        second: {"rank": None, "pivoted": False, "integers": None, **old},
        third: {"rank": 3, "pivoted": True, "integers": None, **old},
        fourth: dict(old),
    }
    file.write_text(json.dumps({"version": 1, "recipe": "svd", "retain": 0.5, "linears": rows}))
    read = Plan.read(file)
    assert specs(read) == {
        first: ("low-rank", {"rank": 9}),
        second: (DENSE, {}),
        third: ("low-rank", {"rank": 3, "pivoted": True}),
        fourth: (DENSE, {}),
    }
    fitted = Plan.read(file, parts)
    assert {row.form for name, row in fitted.linears.items() if name not in rows} == {DENSE}
    assert (fitted.version, fitted.linears[first].bytes) == (
        2,
        form("low-rank").nbytes(parts.linear(first), {"rank": 9}),
    )
    rows = {q: {"rank": [3, 1, 16, 2], **old}, k: {"rank": [5, 4], "pivoted": False, **old}}
    file.write_text(json.dumps({"recipe": "svd", "linears": rows}))
    assert [Plan.read(file, parts).linears[name].rank for name in (q, k)] == [22, 9]
    rows[q] |= {"rank": 3, "integers": {"bits": 4}}
    file.write_text(json.dumps({"version": 1, "recipe": "svd", "linears": rows}))
    with pytest.raises(BudgetError, match=f"stores '{q}' .* has no 'integers'; take it out"):
        Plan.read(file, parts)


def test_edited_rows_are_obeyed(parts, plan, file, q):
    first, second, third = [linear.name for linear in parts.linears][:3]

    def change(content):
        content["linears"][first]["rank"] = 9
        content["linears"][second] = {"form": DENSE, "bytes": 0, "dense_bytes": 0}
        del content["linears"][third]  # what is not planned for stays dense

    edit(file, change)
    read = Plan.read(file, parts)
    assert specs(read) == {
        **specs(plan),
        first: ("low-rank", {"rank": 9, "pivoted": False}),
        second: (DENSE, {}),
        third: (DENSE, {}),
    }
    known = parts.linear(first)
    assert read.linears[first].bytes == 9 * 4 * (known.out_features + known.in_features)
    assert read.linears[second].bytes == parts.linear(second).nbytes
    assert list(read.linears) == [linear.name for linear in parts.linears]
    assert (read.recipe, read.retain) == ("svd", 0.5)
    # Grids may leave out what they have by default; a form may be exchanged for any other.
    for kind, spec in [("integers", {"bits": 5}), ("integers", {"bits": 8, "group": 1}), *SPECS]:
        put(file, q, form=kind, **spec)
        assert specs(Plan.read(file, parts))[q] == (kind, spec)


def test_an_edited_plan_is_what_is_stored(parts, file):
    """Bytes are counted anew, from what the model then has."""
    plan = Plan.read(file, parts)
    small = compress(families.FAMILIES["llama"](), recipe="svd", plan=file)
    for name, row in plan.linears.items():
        layer = small.get_submodule(name)
        tensors = {"": layer.weight} if row.form == DENSE else layer.tensors()
        assert sum(tensor.nbytes for tensor in tensors.values()) == row.bytes
    assert logits(small).isfinite().all()


def test_ranks_by_head_are_counted_written_and_read_back(parts, plan, file):
    q, k = (next(linear for linear in parts.linears if linear.role == role) for role in "qk")
    assert (q.out_features, q.in_features, q.heads, k.heads) == (64, 64, 4, 2)
    layer = LowRankLinear(q.in_features, q.out_features, (3, 1, 16, 2), bias=False)
    found = plan_row(q, "low-rank", {"rank": [3, 1, 16, 2]}).bytes
    assert found == 4 * (3 + 1 + 16 + 2) * (16 + 64) == sum(parameter.nbytes for parameter in layer.parameters())

    put(file, q.name, form="low-rank", rank=[3, 1, 16, 2])
    put(file, k.name, form="low-rank", rank=[5, 4])
    read = Plan.read(file, parts)
    assert [read.linears[one.name].rank for one in (q, k)] == [22, 9]
    assert read.linears[k.name].bytes == 4 * 9 * (16 + 64)
    assert '"rank": [3, 1, 16, 2],\n' in read.json()
    file.write_text(read.json())
    assert Plan.read(file, parts) == read


@pytest.mark.parametrize(
    ("role", "row", "message"),
    [
        ("q", {"form": "low-rank", "rank": 65}, "the rank 65 is too large: it can have 64 at most"),
        ("q", {"form": "low-rank", "rank": 10**30}, "too large: it can have 64 at most"),
        ("v", {"form": "low-rank", "rank": [17, 3]}, "the rank 17 is too large: a head of it can have 16 at most"),
        ("q", {"form": "low-rank", "rank": [3, 3]}, "there are ranks for 2 heads and it has 4; give each one"),
        ("k", {"form": "low-rank", "rank": [3] * 4}, "there are ranks for 4 heads and it has 2; give each one"),
        ("o", {"form": "low-rank", "rank": [3] * 4}, "ranks by head are for q, k and v .*; give it one rank"),
        ("up", {"form": "low-rank", "rank": [3, 3]}, "ranks by head are for q, k and v .*; give it one rank"),
        ("q", {"form": "low-rank", "rank": [3] * 4, "pivoted": True}, "factored head by head has none"),
        ("q", {"form": "low-rank", "rank": 64, "pivoted": True}, "64 pivots of 64 rows are the dense weight"),
        ("q", {"form": "low-rank", "rank": 3, "pivotd": True}, "has no 'pivotd'; take it out"),
        ("q", {"form": "low-rank", "rank": 3, "grids": {"A": GRID, "B": GRID}}, "make the form 'integer-factors'"),
        ("q", {"form": "integer-factors", "rank": 3}, "make the form 'low-rank'"),
        ("q", {"form": "integer-factors", "rank": 3, "grids": {"A": GRID, "C": GRID}}, "no part 'C'; its parts are"),
        (
            "q",
            {"form": "integer-factors", "rank": 3, "grids": {"A": {**GRID, "group": 2}, "B": GRID}},
            "groups of 2 do",
        ),
        ("q", {"form": "integer-factors", "rank": 3, "grids": {"A": GRID, "B": {"bits": 1}}}, "no grid of integers"),
        ("q", {"form": "integer-factors", "rank": 3, "pivoted": True, "grids": {"A": GRID, "B": GRID}}, "by pivots"),
        ("q", {"form": "integers", "bits": 4, "group": 48}, "groups of 48 do not divide 64 inputs; choose another"),
    ],
)
def test_rows_that_do_not_fit_the_linear_are_named(parts, file, role, row, message):
    name = next(linear.name for linear in parts.linears if linear.role == role)
    put(file, name, **row)
    said = (
        rf"^{file} stores '{name}' in the form '{re.escape(row['form'])}', but .*{message}.*; correct it, or make it "
    )
    with pytest.raises(BudgetError, match=said) as caught:
        Plan.read(file, parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"form": "low-rank", "rank": 0}, "the rank 0 is impossible: ranks are whole numbers of at least 1"),
        ({"form": "low-rank", "rank": None}, "the rank None is impossible"),
        ({"form": "low-rank"}, "the rank None is impossible"),
        ({"form": "low-rank", "rnk": 3}, "the rank None is impossible"),
        ({"form": "integer-factors", "grids": {"A": GRID, "B": GRID}}, "the rank None is impossible"),
        *(
            ({"form": "low-rank", "rank": rank}, "is impossible: ranks are whole numbers")
            for rank in (True, 3.0, 2.5, "3", -1, -(10**30), [True] * 4, [3.0, 3, 3, 3], {}, [[1]], [], [3, 3, 0, 3])
        ),
        ({"form": "integers"}, "{} is no grid of integers; give bits"),
        ({"form": "integers", "bits": 4, "rank": 3}, "is no grid of integers"),
        *(
            ({"form": "integers", "bits": bits}, "no grid of integers; give bits")
            for bits in (True, 4.5, 1, 9, "4", None)
        ),
        *(
            ({"form": "integers", "bits": 4, **more}, "is no grid of integers")
            for more in ({"group": True}, {"group": -1}, {"group": 32.0}, {"zero": 1}, {"symmetric": 1}, {"groups": 32})
        ),
        ({"form": "low_rank", "rank": 3}, "there is no form of storage 'low_rank', only dense, .*; import the package"),
        ({"form": "", "rank": 3}, "there is no form of storage ''"),
    ],
)
def test_rows_that_no_linear_can_have_are_named_before_a_model_is_there(file, q, row, message):
    put(file, q, **row)
    with pytest.raises(
        BudgetError, match=f"^{file} stores '{q}' in the form .*{message}.*; correct it, or make it dense$"
    ):
        Plan.read(file)


@pytest.mark.parametrize("more", [{"rank": 3}, {"bits": 4}, {"pivoted": True}, {"rnk": None}])
def test_dense_rows_have_nothing_else(file, q, more):
    put(file, q, form=DENSE, **more)
    with pytest.raises(BudgetError, match=f"'{q}' in the form 'dense', but a dense linear has no '.*'; take it out$"):
        Plan.read(file)


@pytest.mark.parametrize(("key", "value"), [("pivoted", value) for value in (1, 0, "true", None)])
def test_words_for_pivots_are_named(parts, file, q, key, value):
    put(file, q, form="low-rank", rank=3, **{key: value})
    with pytest.raises(BudgetError, match=f"stores '{q}' .*pivoted is true or false"):
        Plan.read(file, parts)
    put(file, q, form="low-rank", rank=3, grids=[])
    with pytest.raises(BudgetError, match=f"stores '{q}' .*grids are an object"):
        Plan.read(file, parts)


def test_the_loss_of_a_plan_is_the_sum_over_its_rows(parts, plan):
    first, second, third = parts.linears[:3]
    assert plan.loss is None
    rows = {
        **plan.linears,
        first.name: plan_row(first, "low-rank", {"rank": 2}, loss=0.5),
        second.name: plan_row(second, loss=0.0),
        third.name: plan_row(third, "low-rank", {"rank": 3}, loss=0.25),
    }
    predicted = plan.model_copy(update={"linears": rows})
    assert predicted.loss == 0.75
    assert json.loads(predicted.json())["linears"][third.name]["loss"] == 0.25
    assert predicted.fitted(parts).loss is None  # a note, which may be that of another rank


def test_places_are_summed_up(parts, plan):
    (place, found), *others = plan.by_place(parts).items()
    assert (place, others) == ("backbone", [])
    rows = plan.linears.values()
    ranks = sorted(row.rank for row in rows if row.rank is not None)
    assert found == {
        "linears": len(rows),
        "forms": {kind: sum(row.form == kind for row in rows) for kind in sorted({kind for kind, _ in SPECS})},
        "ranks": [ranks[0], ranks[len(ranks) // 2], ranks[-1]],
        "bytes": plan.bytes,
        "dense_bytes": plan.dense_bytes,
    }
    dense = Plan(recipe="svd", linears={}).fitted(parts).by_place(parts)["backbone"]
    assert (dense["forms"], dense["ranks"]) == ({DENSE: len(rows)}, [])


def test_a_plan_object_is_held_to_the_same(parts, plan):
    first = parts.linears[0]
    shuffled = plan.model_copy(update={"linears": dict(reversed(plan.linears.items()))})
    assert list(shuffled.fitted(parts).linears) == [linear.name for linear in parts.linears]
    row = PlanRow(form="low-rank", spec={"rank": 1000}, bytes=0, dense_bytes=0)
    wrong = plan.model_copy(update={"linears": {first.name: row}})
    with pytest.raises(BudgetError, match=f"the plan stores '{first.name}' in the form 'low-rank', but the rank 1000"):
        wrong.fitted(parts)


def test_strange_linears_are_named(parts, file):
    name = parts.linears[0].name
    edit(file, lambda content: content["linears"].update({"attic.proj": content["linears"].pop(name)}))
    with pytest.raises(BudgetError, match=r"plans for 'attic\.proj', which the model lacks; use a plan of this model"):
        Plan.read(file, parts)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "valid dictionary|Input should be an object"),
        ("null", "Input should be an object"),
        ("{}", "recipe: Field required"),
        ('{"recipe": "svd", "linears": {}, "version": 3}', "version: Input should be 1 or 2"),
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
        *(("bytes", value) for value in (-1, True, None, 1.5)),
        *((key, value) for key in ("error", "loss") for value in (float("nan"), float("inf"), "0", True)),
        *(("form", value) for value in (None, 3, ["dense"])),
        ("metric", 3),
        ("spec", 3),
    ],
)
def test_notes_of_another_kind_are_named_with_their_linear(parts, file, q, key, value):
    edit(file, lambda content: content["linears"][q].update({key: value}))
    with pytest.raises(BudgetError, match=rf"no plan that can be read \(linears: {q}: {key}: .*correct it"):
        Plan.read(file, parts)


def test_a_row_that_saves_nothing_is_obeyed_and_logged(parts, file, q, caplog):
    Plan.read(file, parts)
    assert not caplog.records
    put(file, q, form="low-rank", rank=33)  # of [64, 64]
    assert Plan.read(file, parts).linears[q].rank == 33
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} stores '{q}' in more bytes than its dense weight has"
    ]


def test_a_plan_from_an_editor_that_marks_its_files(parts, plan, file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert specs(Plan.read(file, parts)) == specs(plan)
