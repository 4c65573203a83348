"""Anatomy: one adapter test for every family, and the odd cases one by one."""

from collections import Counter, defaultdict

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from families import FAMILIES, MOE, TEXT, VISION, VLMS, example_inputs, text_inputs
from spectrim.anatomy import Anatomy, anatomy
from spectrim.errors import ModelError
from spectrim.linear import PLACES, Linear

LLAVA_LIKE = ("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
IDEFICS = ("model.vision_model", ("model.connector",), "model.text_model")
QWEN3_VL = ("model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.language_model")
QWEN2_VL = ("model.visual", ("model.visual.merger",), "model.language_model")
# Tower, connector and backbone as a reader of the model's source would name them; language models are all backbone.
PARTS = {
    **dict.fromkeys(
        ("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "internvl", "pixtral", "mistral3"), LLAVA_LIKE
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QWEN2_VL),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), QWEN3_VL),
    "mllama": ("model.vision_model", ("model.multi_modal_projector",), "model.language_model"),
}
BLOCK_ROLES = {"q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down", "fc1", "fc2"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _reached(model: PreTrainedModel, parts: Anatomy, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Names of the linears whose forward runs, with the check that the logits are finite."""
    seen: set[str] = set()
    hooks = [
        model.get_submodule(x.name).register_forward_hook(lambda *_, name=x.name: seen.add(name)) for x in parts.linears
    ]
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    for hook in hooks:
        hook.remove()
    return seen


def test_every_matrix_is_listed_once(family: str) -> None:
    model = FAMILIES[family]()
    parts = anatomy(model)
    linears, kept = [x.name for x in parts.linears], [x.name for x in parts.kept]
    assert len({*linears, *kept}) == len(linears) + len(kept)
    matrices = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    assert {n.rpartition(".")[0] for n, _ in matrices} == {*linears, *kept}
    unique = {id(p): p.numel() for _, p in matrices}
    assert sum(unique.values()) == sum(map(parts.params, PLACES)) + parts.kept_params
    assert all(x.reason for x in parts.kept)
    for x in parts.linears:
        linear = model.get_submodule(x.name)
        assert type(linear) is nn.Linear
        assert (x.out_features, x.in_features) == tuple(linear.weight.shape)


def test_places_and_blocks(family: str) -> None:
    model = FAMILIES[family]()
    parts = anatomy(model)
    tower, connector, backbone = PARTS.get(family, (None, (), ""))
    assert (parts.tower, parts.connector, parts.backbone) == (tower, connector, backbone)
    places = [x.place for x in parts.linears]
    assert places == sorted(places, key=PLACES.index)
    for x in parts.linears:
        if x.name.startswith(connector):
            expected = "connector"
        else:
            expected = "tower" if tower is not None and x.name.startswith(tower + ".") else "backbone"
        assert x.place == expected, x
        assert x.block is None if x.place == "connector" else x.block is None or x.name.startswith(x.block + ".")

    text = model.config.get_text_config()
    assert len(parts.blocks("backbone")) == text.num_hidden_layers
    depth = model.config.vision_config.num_hidden_layers if tower is not None else 0
    depth += getattr(getattr(model.config, "vision_config", None), "num_global_layers", 0)
    assert len(parts.blocks("tower")) == depth
    assert parts.blocks("connector") == ()
    assert parts.blocks() == parts.blocks("tower") + parts.blocks("backbone")
    blocks = [model.get_submodule(name) for name in parts.blocks()]
    assert all(isinstance(model.get_submodule(n.rpartition(".")[0]), nn.ModuleList) for n in parts.blocks())
    inside = {name for name, m in model.named_modules() if any(m in set(b.modules()) for b in blocks)}
    assert {x.name for x in parts.linears if x.block is not None} == inside & {x.name for x in parts.linears}


def test_roles_heads_and_shapes_fit_together(family: str) -> None:
    model = FAMILIES[family]()
    parts = anatomy(model)
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    by_block: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for x in parts.linears:
        if x.block is not None and x.expert in (None, 0):
            by_block[x.block][x.role].append(x)
    assert by_block.keys() == set(parts.blocks())
    for roles in by_block.values():
        assert roles.keys() <= BLOCK_ROLES
        assert all(len(found) == 1 for found in roles.values())
        one = {role: found[0] for role, found in roles.items()}
        config = text if one["o"].place == "backbone" else vision
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", queries)
        head_dim = getattr(config, "head_dim", None) or one["o"].out_features // queries
        width = one["o"].out_features
        assert (one["o"].in_features, one["o"].heads) == (queries * head_dim, queries)
        if "qkv" in one:
            assert (one["qkv"].out_features, one["qkv"].in_features) == ((queries + 2 * keys) * head_dim, width)
            assert one["qkv"].heads == queries
        else:
            assert (one["q"].out_features, one["q"].heads) == (queries * head_dim, queries)
            for role in "kv":
                assert (one[role].out_features, one[role].heads) == (keys * head_dim, keys)
            assert {one[role].in_features for role in "qkv"} == {width}
        if "gate" in one:
            size = "intermediate_size" if one["gate"].expert is None or family == "mixtral" else "moe_intermediate_size"
            inner = (getattr(config, size), width)
            assert [(one[r].out_features, one[r].in_features) for r in ("gate", "up")] == [inner, inner]
            assert (one["down"].out_features, one["down"].in_features) == inner[::-1]
        elif "gate_up" in one:
            inner = config.intermediate_size
            assert (one["gate_up"].out_features, one["gate_up"].in_features) == (2 * inner, width)
            assert (one["down"].out_features, one["down"].in_features) == (width, inner)
        elif "fc1" in one:
            assert (one["fc1"].out_features, one["fc2"].in_features) == (
                one["fc2"].in_features,
                one["fc1"].out_features,
            )
            assert one["fc1"].in_features == one["fc2"].out_features == width
    assert all(x.heads is None for x in parts.linears if x.role not in ("q", "k", "v", "o", "qkv"))


def test_sight_is_reached_by_images_alone(family: str) -> None:
    model = FAMILIES[family]()
    parts = anatomy(model)
    sight = {x.name for x in (*parts.in_place("tower"), *parts.in_place("connector"))}
    everything = {x.name for x in parts.linears}
    # Running every listed linear's own forward is also what makes it replaceable.
    assert _reached(model, parts, example_inputs(model, batch=2)) == everything
    text = _reached(model, parts, text_inputs(model))
    assert not text & sight
    crossing = {x.name for x in parts.linears if "cross" in type(model.get_submodule(x.block or "")).__name__.lower()}
    assert text == everything - sight - crossing
    assert bool(crossing) == (family == "mllama")


@pytest.mark.parametrize("family", VLMS)
def test_example_image_matters(family: str) -> None:
    model = FAMILIES[family]()
    inputs = example_inputs(model)
    with torch.no_grad():
        seen = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": example_inputs(model, seed=7)["pixel_values"]}).logits
    assert (seen[:, -1] - other[:, -1]).abs().max() > 1e-5


def test_meta_model_has_the_same_anatomy(family: str) -> None:
    with torch.device("meta"):
        ghost = FAMILIES[family]()
    assert all(p.is_meta for p in ghost.parameters())
    assert anatomy(ghost) == anatomy(FAMILIES[family]())


def test_describe_groups_and_totals() -> None:
    parts = anatomy(FAMILIES["llava"]().to(torch.bfloat16))
    groups = parts.describe()
    assert len({(g.place, g.role, g.out_features, g.in_features, g.heads) for g in groups}) == len(groups)
    for place in PLACES:
        assert sum(g.params for g in groups if g.place == place) == parts.params(place)
    assert sum(g.count for g in groups) == len(parts.linears)
    keys = next(g for g in groups if (g.place, g.role) == ("backbone", "k"))
    assert (keys.count, keys.heads, keys.params) == (2, 2, 2 * 32 * 64)
    assert sum(x.nbytes for x in parts.linears) == 2 * sum(x.params for x in parts.linears)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "mixtral"])
def test_fused_experts_are_linears_and_routers_are_named(family: str) -> None:
    model = FAMILIES[family]()
    fused = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    parts = anatomy(model)
    routers = [x for x in parts.kept if x.reason == "expert router (not compressed)"]
    experts = [x for x in parts.linears if ".experts." in x.name]
    assert len(routers) == len(parts.blocks("backbone"))
    assert len(experts) == 3 * MOE["num_experts"] * len(routers)
    assert sum(x.params for x in experts) == fused
    assert all(x.expert == int(x.name.split(".")[-2]) for x in experts)
    assert Counter(x.role for x in experts).keys() == {"gate", "up", "down"}
    assert not any(x.expert is not None for x in parts.linears if x not in experts)
    assert {x.params for x in routers} == {MOE["num_experts"] * TEXT["hidden_size"]}


def test_what_is_left_out_is_named_with_its_share() -> None:
    config = hf.JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    parts = anatomy(hf.JetMoeForCausalLM(config))
    fused = [kept for kept in parts.kept if "fused experts of a kind that is not known" in kept.reason]
    assert fused
    whole = sum(x.params for x in (*parts.linears, *parts.kept))
    assert sum(map(parts.share, fused)) == pytest.approx(sum(kept.params for kept in fused) / whole)
    (line,) = parts.left_out()
    assert "JetMoeParallelExperts" in line
    assert line.endswith(f"{sum(map(parts.share, fused)):.0%}")
    assert anatomy(FAMILIES["mixtral"]()).left_out() == []


class _ExpertBlock(nn.Module):
    """Three experts as separate linears, a linear router, and a gated shared expert that happens to be of width 3."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3, bias=False)
        self.shared_gate = nn.Linear(16, 1)
        self.shared = nn.ModuleDict({"up_proj": nn.Linear(16, 3), "down_proj": nn.Linear(3, 16)})
        self.position = nn.Parameter(torch.zeros(1, 5, 16))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(16, 8), "down_proj": nn.Linear(8, 16)}) for _ in range(3)
        )


def test_experts_that_are_linears_are_compressed_but_not_their_router() -> None:
    parts = anatomy(nn.ModuleDict({"layers": nn.ModuleList([_ExpertBlock(), _ExpertBlock()])}))
    assert parts.blocks() == ("layers.0", "layers.1")
    expected = {"": "parameter of _ExpertBlock, not an nn.Linear"}
    expected |= dict.fromkeys((".gate", ".shared_gate"), "expert router (not compressed)")
    assert {x.name: x.reason for x in parts.kept} == {f"layers.{i}{n}": r for i in (0, 1) for n, r in expected.items()}
    assert len(parts.linears) == 2 * (2 + 3 * 2)
    assert {x.role for x in parts.linears} == {"up", "down"}


@pytest.mark.parametrize("name", ["gate", "router"])
def test_a_router_of_several_linears_is_not_compressed(name: str) -> None:
    block = _ExpertBlock()
    del block.gate
    block.add_module(name, nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)))  # one output for no expert
    parts = anatomy(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    routers = {x.name for x in parts.kept if x.reason == "expert router (not compressed)"}
    assert routers == {f"layers.0.{name}.0", f"layers.0.{name}.2", "layers.0.shared_gate"}


@pytest.mark.parametrize(
    ("name", "number", "listed"),
    [
        ("mlp.experts.3.w1", 3, "mlp.experts"),
        ("mlp.text_moe.experts.12.gate_proj", 12, "mlp.text_moe.experts"),
        ("mlp.experts.expert_5.wi", 5, "mlp.experts.expert"),
        ("moe.local_experts.0.up", 0, "moe.local_experts"),
        ("ffn.expert_2.up", 2, "ffn.expert"),
        ("mlp.shared_experts.0.up", None, None),
        ("mlp.shared_experts.up", None, None),
        ("self_attn.0.q_a_proj", None, None),
        ("0.spatial_block.window_attn.qkv", None, None),
        ("mlps.1.gate_proj", None, None),
    ],
)
def test_experts_are_what_is_called_so(name: str, number: int | None, listed: str | None) -> None:
    linear = Linear(f"layers.7.{name}", "backbone", "layers.7", "up", 8, 8, None, torch.float32)
    assert linear.expert == number
    assert linear.experts == (None if listed is None else f"layers.7.{listed}")


def test_tied_head_is_named_and_counted_once() -> None:
    tied = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    kept = {x.name: x for x in anatomy(tied).kept}
    assert kept["lm_head"].reason == "tied to model.embed_tokens"
    assert (kept["lm_head"].params, kept["model.embed_tokens"].reason) == (0, "embedding")
    free = {x.name: x for x in anatomy(FAMILIES["llama"]()).kept}
    assert free["lm_head"].reason == "output head"
    assert free["lm_head"].params == free["model.embed_tokens"].params == TEXT["vocab_size"] * TEXT["hidden_size"]


def test_head_that_comes_before_its_embedding_is_the_tied_one() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 8, bias=False), "embed": nn.Embedding(8, 4), "mix": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    parts = anatomy(model)
    assert {x.name: (x.params, x.reason) for x in parts.kept} == {
        "head": (0, "tied to embed"),
        "embed": (32, "embedding"),
    }
    assert [x.name for x in parts.linears] == ["mix"]


def test_shared_linears_and_subclasses_are_kept() -> None:
    model = FAMILIES["llama"]()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight  # two modules, one parameter
    second.gate_proj = first.gate_proj  # one module, two names
    first.down_proj.__class__ = type("Scaled", (nn.Linear,), {})
    parts = anatomy(model)
    reasons = {x.name: x.reason for x in parts.kept if "mlp" in x.name}
    assert reasons == {
        "model.layers.0.mlp.gate_proj": "shared with model.layers.1.mlp.gate_proj",
        "model.layers.0.mlp.up_proj": "shared with model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.down_proj": "Scaled, a subclass of nn.Linear",
        "model.layers.1.mlp.gate_proj": "tied to model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.up_proj": "tied to model.layers.0.mlp.up_proj",
    }
    assert [x.role for x in parts.linears if "mlp" in x.name] == ["down"]
    unique = {id(p): p.numel() for p in model.parameters() if p.ndim >= 2}
    assert sum(unique.values()) == parts.params("backbone") + parts.kept_params


def test_mllama_cross_attention_and_both_encoders() -> None:
    model = FAMILIES["mllama"]()
    parts = anatomy(model)
    crossing = [x for x in parts.linears if ".cross_attn." in x.name]
    assert [x.role for x in crossing] == ["q", "k", "v", "o"]
    assert [x.heads for x in crossing] == [4, 2, 2, 4]
    assert {x.block for x in crossing} == {"model.language_model.layers.1"}
    assert {b.split(".")[2] for b in parts.blocks("tower")} == {"transformer", "global_transformer"}
    assert parts.linear("model.multi_modal_projector").place == "connector"


def test_merger_is_connector_and_pooling_head_is_tower_at_equal_widths() -> None:
    """The two widths of tower and backbone may agree by chance; then only the change of width inside a part tells."""
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    with torch.device("meta"):
        qwen = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision))
        gemma = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=hf.Gemma3TextConfig(**TEXT, head_dim=16),
                vision_config=hf.SiglipVisionConfig(**{**VISION, "hidden_size": 64}, vision_use_head=True),
                mm_tokens_per_image=4,
            )
        )
    assert anatomy(qwen).connector == ("model.visual.merger",)
    assert anatomy(qwen).blocks("tower") == ("model.visual.blocks.0",)
    assert {x.name for x in anatomy(gemma).in_place("tower") if x.block is None} == {
        "model.vision_tower.head.mlp.fc1",
        "model.vision_tower.head.mlp.fc2",
    }


def test_mergers_that_keep_their_width_are_not_blocks() -> None:
    """Four patches of width 16 merge to 64, which is also the backbone's width."""
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    with torch.device("meta"):
        model = hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision))
    assert anatomy(model).connector == QWEN3_VL[1]
    assert anatomy(model).blocks("tower") == ("model.visual.blocks.0", "model.visual.blocks.1")


def test_mergers_registered_before_the_blocks() -> None:
    model = FAMILIES["qwen3_vl"]()
    visual = model.model.visual
    blocks = visual.blocks
    del visual.blocks
    visual.blocks = blocks
    parts = anatomy(model)
    assert set(parts.connector) == set(QWEN3_VL[1])
    assert parts.blocks("tower") == ("model.visual.blocks.0", "model.visual.blocks.1")


def test_submodels_and_plain_modules() -> None:
    llava = FAMILIES["llava"]()
    whole, base = anatomy(llava), anatomy(llava.model)
    assert [x.name for x in whole.linears] == [f"model.{x.name}" for x in base.linears]
    assert (base.tower, base.connector, base.backbone) == ("vision_tower", ("multi_modal_projector",), "language_model")
    plain = anatomy(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert [(x.name, x.place, x.block, x.role) for x in plain.linears] == [
        ("0", "backbone", None, "proj"),
        ("2", "backbone", None, "proj"),
    ]
    lists = nn.ModuleDict({"taps": nn.ModuleList([nn.Linear(4, 4)]), "norms": nn.ModuleList([nn.LayerNorm(4)])})
    assert anatomy(lists).linear("taps.0").block is None


def test_nothing_to_compress_and_unknown_names_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Sequential has no plain nn\.Linear to compress"):
        anatomy(nn.Sequential(nn.Embedding(8, 4), nn.Conv1d(4, 4, 3)))
    with pytest.raises(ModelError, match="no compressible linear 'lm_head'"):
        anatomy(FAMILIES["llama"]()).linear("lm_head")
