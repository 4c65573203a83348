"""Compressed models as standard Hugging Face directories. Importing this package registers the loader."""

from spectrim.checkpoint.card import add_results
from spectrim.checkpoint.names import checkpoint_names, runtime_names
from spectrim.checkpoint.push import push
from spectrim.checkpoint.quantizer import SpectrimConfig, SpectrimQuantizer, attach
from spectrim.checkpoint.read import load, load_processor, read_provenance
from spectrim.checkpoint.sources import read_config
from spectrim.checkpoint.write import check_target, save
from spectrim.dense import check_dense

__all__ = [
    "SpectrimConfig",
    "SpectrimQuantizer",
    "add_results",
    "attach",
    "check_dense",
    "check_target",
    "checkpoint_names",
    "load",
    "load_processor",
    "push",
    "read_config",
    "read_provenance",
    "runtime_names",
    "save",
]
