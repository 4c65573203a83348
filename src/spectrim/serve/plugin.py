"""How vLLM sees a compressed checkpoint: its quantization config, which says what loads and runs which layer."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from spectrim.checkpoint.config import METHOD, SpectrimConfig
from spectrim.errors import CheckpointError
from spectrim.serve.embeddings import embedding_method
from spectrim.serve.experts import ExpertsMethod
from spectrim.serve.linears import FactoredLinearMethod
from spectrim.serve.served import Served
from spectrim.serve.shards import members


class FactoredConfig(QuantizationConfig):
    """vLLM's view of ``quantization_config`` of a checkpoint, keyed by vLLM's names of linears.

    Raises CheckpointError where `Served` does.
    """

    def __init__(self, config: SpectrimConfig) -> None:
        super().__init__()
        self.served = Served(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FactoredConfig":
        """From the dict in config.json; CheckpointError for one that this spectrim cannot read."""
        return cls(SpectrimConfig(**config))

    def get_name(self) -> str:
        """``quant_method`` of the checkpoints."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What is not integers is ordinary floats, and so are inputs."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU will do: integers for which vLLM has no kernel on it are unpacked."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the linears as the model's loader renames their tensors; models call this while they are built."""

        def renamed(name: str) -> str:
            return str(hf_to_vllm_mapper.map_name(f"{name}.weight")).removesuffix(".weight")

        self.served.rename(renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A method of ours for linears and experts of which a part is compressed, vLLM's own method for all others.

        Raises CheckpointError for what is compressed and is neither.
        """
        served, known = self.served, self.served.layers
        names = members(prefix, self.packed_modules_mapping, known)
        if isinstance(layer, VocabParallelEmbedding) and prefix in known and not served.runs(prefix):
            raise CheckpointError(
                f"vLLM does not run the form '{known[prefix][0]}', which {prefix!r} is stored in; serve the "
                "dequantized model (model.dequantize() and save_pretrained)"
            )
        if isinstance(layer, LinearBase):
            if any(name in known for name in names):
                return FactoredLinearMethod(names, served, prefix)
            return UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return embedding_method(layer, prefix, served.embeddings, served.grids, served.unpacked)
        if not any(name == prefix or name.startswith(f"{prefix}.") for name in known):
            return None
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer, prefix, served)
        raise CheckpointError(f"vLLM has no linear {prefix!r} but a {type(layer).__name__}; keep it dense")
