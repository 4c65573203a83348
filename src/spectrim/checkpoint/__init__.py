"""Compressed models as standard Hugging Face directories.

Names are imported when they are asked for: transformers may import its models, after which `saving` registers the
format (see ``spectrim.registration``), in the middle of an import of something that another module here needs.
"""

from typing import TYPE_CHECKING

from spectrim.public import import_when_asked as _import_when_asked

if TYPE_CHECKING:
    from spectrim.checkpoint.card import add_results
    from spectrim.checkpoint.config import SpectrimConfig
    from spectrim.checkpoint.names import checkpoint_names, runtime_names
    from spectrim.checkpoint.push import push
    from spectrim.checkpoint.quantizer import SpectrimQuantizer, attach
    from spectrim.checkpoint.read import load, load_processor, read_provenance
    from spectrim.checkpoint.sources import read_config
    from spectrim.checkpoint.write import check_target, save

_HOMES = {
    "add_results": "card",
    "checkpoint_names": "names",
    "runtime_names": "names",
    "push": "push",
    "SpectrimConfig": "config",
    "SpectrimQuantizer": "quantizer",
    "attach": "quantizer",
    "load": "read",
    "load_processor": "read",
    "read_config": "sources",
    "read_provenance": "read",
    "check_target": "write",
    "save": "write",
}

__all__ = [
    "SpectrimConfig",
    "SpectrimQuantizer",
    "add_results",
    "attach",
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

_import_when_asked(__name__, _HOMES)
