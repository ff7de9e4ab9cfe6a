"""Paged attention over one read-only shared prefix and per-request suffix pages: one document, one KV copy, thousands of agents."""

import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING

# `kvkern --help` answers before torch and transformers could be imported: a command takes what it needs from the modules.
# Everywhere else `import kvkern` also makes "kvkern" known to transformers, so it cannot be put off to the first use.
_IS_COMMAND = os.path.basename(sys.argv[0]) == "kvkern"

if TYPE_CHECKING or not _IS_COMMAND:
    from kvkern.attention import attend, merge_state, shared_prefix_attention
    from kvkern.engine import Answer, Delta, Engine
    from kvkern.errors import KvkernError
    from kvkern.generate import generate
    from kvkern.geometry import Geometry
    from kvkern.pages import PagePool
    from kvkern.plan import AgentRows, Plan
    from kvkern.prefix import SharedPrefix
    from kvkern.publish import Document, load, publish

__version__ = importlib.metadata.version("kvkern")

__all__ = [
    "AgentRows",
    "Answer",
    "Delta",
    "Document",
    "Engine",
    "Geometry",
    "KvkernError",
    "PagePool",
    "Plan",
    "SharedPrefix",
    "attend",
    "generate",
    "load",
    "merge_state",
    "publish",
    "shared_prefix_attention",
]
