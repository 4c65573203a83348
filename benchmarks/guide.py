"""The computed figures of docs/guide.md, from shapes alone: nothing is downloaded and nothing runs.

    python benchmarks/guide.py

Second moments are float64 [in, in] while they grow, one for each tensor that linears read (q, k and v share one, as do
gate and up); output moments are full, float64 [out, out]. On disk they are the halves of symmetric float32 matrices.
Spectra hold two float32 matrices [out, min(out, in)] for each linear.
"""

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig

from spectrim.anatomy import anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.groups import Sizes, input_shares, output_shares, total

_TOWER = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
MODELS = {
    "Qwen2.5-VL-7B": Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        vision_config={**_TOWER, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    ),
    "Qwen2-VL-2B": Qwen2VLConfig(
        text_config={
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        vision_config={**_TOWER, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SIZES = {"Qwen2.5-VL-7B": (9.0, 6.5, 5.0), "Qwen2-VL-2B": (2.6, 1.9, 1.5)}  # GB


def main() -> None:
    """Print the figures of each model."""
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.tie_weights()
        linears = anatomy(model).linears
        dense = 2 * sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        weights = sum(linear.nbytes for linear in linears)
        moments = total(input_shares(linears))
        widest = sum(8 * x.in_features**2 for x in linears if x.role == "down" and x.place == "backbone")
        forms = choose_forms(linears, {})
        outputs = sum(forms[x.name].nbytes(x.out_features) for x in linears)
        sizes = Sizes(on_disk=True)
        statistics = 2 * total(
            [*input_shares(linears, sizes), *output_shares(linears, forms, fisher=False, sizes=sizes)]
        )
        spectra = sum(2 * 4 * x.out_features * min(x.out_features, x.in_features) for x in linears)
        text = config.text_config
        cached = (
            2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 2
        )
        gib = 2**30
        print(f"{name}: {dense / 1e9:.2f} GB dense, of which linears {weights / 1e9:.2f} GB in {len(linears)}")
        print(f"  second moments of a modality {moments / gib:.1f} GiB (down alone {widest / gib:.1f} GiB)")
        print(f"  output moments of a modality {outputs / gib:.1f} GiB; statistics {statistics / gib:.0f} GiB")
        print(
            f"  spectra {spectra / gib:.1f} GiB; cache {cached} bytes a token, {cached * 32768 / 1e9:.2f} GB for 32768"
        )
        for size in SIZES[name]:
            print(f"  --size {size:g}GB: {(size * 1e9 - dense + weights) * 8 / (weights / 2):.2f} bits per weight")


if __name__ == "__main__":
    main()
