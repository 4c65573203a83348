"""Limits of a compression: sizes as users write them, what files take before they are written, and never above it."""

import pytest
import torch

import families
from helpers.command import run
from helpers.samples import processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.checkpoint import save
from spectrim.checkpoint.size import file_bytes, saved_tensors
from spectrim.errors import BudgetError
from spectrim.evaluate.footprint import stored_bytes
from spectrim.pipeline import compress, compression
from spectrim.pipeline.budget import Budget, Sizes, written
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe, builtin_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.5GB", 3_500_000_000),
        ("3.5 GiB", 3_758_096_384),
        ("900mb", 900_000_000),
        ("1.5MiB", 1_572_864),
        ("20kB", 20_000),
        ("2TB", 2 * 10**12),
        (".5KiB", 512),
        ("12345", 12_345),
        ("12345 B", 12_345),
        (12_345, 12_345),
    ],
)
def test_a_size_is_read_as_it_is_written(text, expected):
    assert Budget(size=text).size_bytes == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "3,5GB", "-1GB", "3.5XB", "0", "0.1B", "1e9", "3.5 G B", "nan", "٣GB", "3G", -4]
)
def test_what_is_no_size_is_named(text):
    with pytest.raises(BudgetError, match=r"3\.5GB, 900MB or 2GiB"):
        Budget(size=text)


@pytest.mark.parametrize("bits", [0.0, -1.0, 65.0, float("nan"), float("inf")])
def test_bits_have_limits(bits):
    with pytest.raises(BudgetError, match="bits per weight are impossible"):
        Budget(bits=bits)


@pytest.mark.parametrize("given", [{}, {"retain": 0.5, "bits": 3.0}, {"size": "1GB", "retain": 0.4}])
def test_there_is_one_limit(given):
    with pytest.raises(BudgetError, match="give one limit"):
        Budget(**given)


@pytest.mark.parametrize(
    ("size", "unit", "expected"), [(1_234_567, "MB", "1.235MB"), (2**20 + 1, "MiB", "1.001MiB"), (7, "", "7 bytes")]
)
def test_a_size_is_written_rounded_up(size, unit, expected):
    assert written(size, unit) == expected


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_bytes_of_a_file_are_known_before_it_is_written(family, tmp_path):
    """Of every family: tied and fused tensors, tensors that are stored in parts, and other names in files."""
    model = families.FAMILIES[family]()
    tensors = saved_tensors(model)
    known = file_bytes(tensors.values())
    found = stored_bytes(save(model, tmp_path / "m"))
    assert found <= known <= found + 70 * len(tensors) + 300


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "mixtral"])
@pytest.mark.parametrize(
    "change", [{}, {"metric.per_head": True}, {"storage.pivoted": True}, {"quantize.bits": "auto"}]
)
def test_the_bytes_of_every_form_are_known(family, change, tmp_path):
    model = families.FAMILIES[family]()
    with compression(model, "svd", changes=change) as prepared:
        plan = prepared.plan(0.4)
        known = prepared.sizes.of(plan)
        found = stored_bytes(prepared.save(plan, tmp_path / "m"))
    tensors = len(saved_tensors(model)) + 8 * len(plan.linears)
    assert found <= known <= found + 70 * tensors + 300


@pytest.fixture(scope="module")
def statistics(words, tmp_path_factory):
    """Of the few-layer Llama, for every recipe."""
    given = {"processor": processor("llama"), "text": words, "samples": 2, "seqlen": 16, "gradients": True}
    return calibrate(families.FAMILIES["llama"](), tmp_path_factory.mktemp("statistics") / "s", **given)


@pytest.mark.parametrize(("number", "recipe"), [*enumerate(builtin_names())])
def test_no_file_is_larger_than_its_size_and_little_smaller(number, recipe, statistics, tmp_path):
    """Within one step of a linear, which on a model this small is more than the one in a hundred of real ones."""
    model = families.FAMILIES["llama"]()
    changes = {"compensate.kind": "none", "quantize.bits": "auto"}
    given = {"stats": statistics, "processor": processor("llama")} if Recipe.read(recipe).needs_statistics else {}
    with compression(model, recipe, changes=changes, **given) as prepared:
        smallest = prepared.sizes.of(prepared.plan(bits=2.5))
        for share in ((0.99, 0.4), (0.7, 0.2))[number % 2]:
            size = int(smallest + share * (prepared.sizes.dense - smallest))
            plan = prepared.plan(size=size)
            found = stored_bytes(prepared.save(plan, tmp_path / f"{size}"))
            assert 0.9 * size < found <= prepared.sizes.of(plan) <= size
            assert plan.limit == f"size-{size}"


def test_bits_per_weight_are_bytes_of_linears():
    model = families.FAMILIES["llama"]().bfloat16()
    with compression(model, "svd", changes={"quantize.bits": "auto"}) as prepared:
        params = sum(linear.params for linear in prepared.parts.linears)
        for bits in (2.5, 4.25, 8.0, 16.0, 20.0):
            plan = prepared.plan(bits=bits)
            assert plan.bytes <= min(bits, 16) * params / 8
            assert plan.bytes > min(bits, 16) * params / 8 * 0.95
        assert prepared.plan(bits=8.0).linears == prepared.plan(0.5).linears


def test_a_size_allows_integers_unless_they_are_ruled_out(tmp_path):
    given = {"recipe": "svd", "size": "140kB"}
    small = compress(families.FAMILIES["llama"](), tmp_path / "a", **given)
    assert any("integers" in type(x).__name__.lower() or hasattr(x, "grid") for x in small.modules())
    ranks = compress(families.FAMILIES["llama"](), tmp_path / "b", **given, changes={"quantize.bits": None})
    assert not any(hasattr(x, "grid") for x in ranks.modules())
    assert max(stored_bytes(tmp_path / name) for name in "ab") <= 140_000


def test_a_size_that_cannot_be_names_the_smallest_that_can():
    model = families.FAMILIES["llama"]()
    sizes = Sizes(model, anatomy(model))
    for changes, more in (({}, False), ({"quantize.bits": None}, True)):
        with compression(model, "svd", changes={"quantize.bits": "auto", **changes}) as prepared:
            with pytest.raises(
                BudgetError, match="all but the linears that can be compressed takes more than 51kB; give at least"
            ) as error:
                prepared.plan(size="51kB")
            assert ("quantize.bits=auto" in str(error.value)) is more
            least = str(error.value).partition("at least ")[2].partition(",")[0]
            with pytest.raises(BudgetError, match="bytes to linears, less than"):
                prepared.plan(size=Budget(size=least).size_bytes - 1000)
            assert prepared.sizes.of(prepared.plan(size=least)) <= Budget(size=least).size_bytes
            with pytest.raises(BudgetError, match="no more than"):
                prepared.plan(size=sizes.dense)
            with pytest.raises(BudgetError, match="raise --retain to") as error:
                prepared.plan(0.001)
            prepared.plan(float(str(error.value).partition("--retain to ")[2].split(",")[0]))
            with pytest.raises(BudgetError, match="raise --bits to") as error:
                prepared.plan(bits=0.02)
            prepared.plan(bits=float(str(error.value).partition("--bits to ")[2].split(",")[0]))


def test_the_command_line_takes_several_limits_and_refuses_early(capsys, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    families.FAMILIES["llama"]().save_pretrained(dense)
    processor("llama").save_pretrained(dense)
    limits = ("--size", "150kB", "--bits", "6", "--retain", "0.5")
    code, said, err = run(capsys, "compress", dense, "-o", out, "--recipe", "svd", *limits)
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["bits-6.0", "retain-0.5", "size-150kB"]
    size = stored_bytes(out / "size-150kB")
    assert size <= 150_000
    assert f"{size:,} bytes" in said
    for wrong, words_ in (
        (("--size", "3,5GB"), "is no size"),
        (("--size", "9GB"), "the dense model takes"),
        (("--size", "1kB"), "takes more than 1kB; give at least"),
        (("--bits", "0"), "impossible"),
        (("--size", "150kB", "--size", "150kB"), "given twice"),
    ):
        code, _, err = run(capsys, "compress", dense, "-o", tmp_path / "no", "--recipe", "svd", *wrong)
        assert code == 2
        assert words_ in err
        assert not (tmp_path / "no").exists()


def test_tied_tensors_count_once():
    model = families.FAMILIES["llama"]()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    names = saved_tensors(model)
    assert ("lm_head.weight" in names) + ("model.embed_tokens.weight" in names) == 1
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_patterns_keep_linears_dense_and_say_so(capsys, tmp_path):
    """In the plan, with the reason; in the card; from the command line as from Python."""
    dense = tmp_path / "dense"
    families.FAMILIES["llama"]().save_pretrained(dense)
    processor("llama").save_pretrained(dense)
    patterns = {"keep": ["model.layers.0.*", "*.down_proj"], "only": ["*.mlp.*"]}
    compress(str(dense), tmp_path / "a", recipe="svd", retain=0.9, **patterns)
    flags = [flag for name, values in patterns.items() for value in values for flag in (f"--{name}", value)]
    code, _, err = run(capsys, "compress", dense, "-o", tmp_path / "b", "--recipe", "svd", "--retain", "0.9", *flags)
    assert code == 0, err
    plan = Plan.read(tmp_path / "a" / "plan.json")
    assert plan == Plan.read(tmp_path / "b" / "plan.json")
    assert set(plan.changed) == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert plan.linears["model.layers.0.mlp.up_proj"].reason == "kept by the pattern model.layers.0.*"
    assert plan.linears["model.layers.1.mlp.down_proj"].reason == "kept by the pattern *.down_proj"
    assert plan.linears["model.layers.1.self_attn.q_proj"].reason == "matches none of *.mlp.*"
    assert all(plan.linears[name].reason is None for name in plan.changed)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "7 kept by the pattern model" in card
    assert "4 matches none of" in card


def test_patterns_that_match_nothing_or_all_are_refused(tmp_path):
    model = families.FAMILIES["llama"]()
    for given, message in (
        ({"keep": ["*.layers.7.*"]}, r"matches the pattern '\*\.layers\.7\.\*'"),
        ({"only": ["lm_head"]}, "matches the pattern 'lm_head'"),
        ({"keep": ["*"]}, r"every linear of the model stays dense \(kept by the pattern \*\)"),
        ({"keep": ["*.mlp.*"]}, r"linears stay dense \(kept by the pattern \*\.mlp\.\*\) and take"),
    ):
        with pytest.raises(BudgetError, match=message):
            compress(model, tmp_path / "out", recipe="svd", retain=0.3, **given)
        assert not (tmp_path / "out").exists()
