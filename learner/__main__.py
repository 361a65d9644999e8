"""python -m learner COMMAND: learner cycles, demonstrations and exports, against a served agent or its state folder."""

from __future__ import annotations

import sys
from importlib import import_module

from learner.terminal import printing
from policies.command_line import parse, refuse
from tools.ending import ending_in_time

COMMANDS = {
    "once": ("learner.commands.once", "OnceOptions", "run one cycle"),
    "status": ("learner.commands.status", "StatusOptions", "show the newest cycles (the default)"),
    "steps": (
        "learner.commands.steps",
        "StepsOptions",
        "show an episode's steps, their rewards, and which lost it",
    ),
    "doubts": ("learner.commands.doubts", "DoubtsOptions", "list steps of demonstrations that something contradicts"),
    "rollback": ("learner.commands.rollback", "RollbackOptions", "let act again what acted before"),
    "approve": ("learner.commands.approve", "ApproveOptions", "let act what waits for somebody's yes"),
    "decline": ("learner.commands.approve", "DeclineOptions", "refuse what waits for somebody's yes"),
    "import": ("learner.importing.command", "ImportOptions", "import demonstration files, or show what they teach"),
    "export": ("learner.exporting.command", "ExportOptions", "write episodes in other people's formats"),
    "lineage": ("learner.commands.lineage", "LineageOptions", "show what taught what: of an adapter, or an episode"),
    "verify": ("learner.commands.verify", "VerifyOptions", "check a state folder"),
}
"""Where each command lives, the class of its options, and what it does."""


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    name = "status" if not arguments or arguments[0].startswith("-") else arguments[0]
    if name not in COMMANDS:
        refuse([f"no command is called {name!r}; there are: {', '.join(COMMANDS)}"])
    module_name, options_name, _ = COMMANDS[name]
    module = import_module(module_name)
    options = parse(
        getattr(module, options_name),
        arguments[1:] if arguments[:1] == [name] else arguments,
        f"python -m learner {name}",
    )
    return printing(lambda: module.run(options))


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items())
    return f"{(__doc__ or '').strip()}\n\n{commands}\n\npython -m learner COMMAND --help explains its options."


if __name__ == "__main__":
    with ending_in_time():
        raise SystemExit(main(sys.argv[1:]))
