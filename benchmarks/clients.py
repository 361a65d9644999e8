"""python -m benchmarks.clients: which clients work unmodified, as a table; `--write` puts it into docs and README.

Runs tests_clients/ in the clients' environments (`make test-clients` makes them): each row is the tests of one client.
docs/CLIENTS.md also has what becomes of each field of a request, from runtime/http/fields.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from runtime.http.fields import BESIDE_OPENAIS, CHAT_FIELDS, MESSAGE_FIELDS, RESPONSE_FIELDS, Rule

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "CLIENTS.md"
ENVIRONMENTS = {
    ".venv-clients": ("test_openai.py", "test_frameworks.py", "test_command_lines.py"),
    ".venv-clients-litellm": ("test_litellm.py",),
    ".venv": ("test_mcp_servers.py",),
}

CLIENTS = {
    "`openai` for Python: chat, responses, streams": ("test_a_", "test_responses_"),
    "`openai` for Node, `runTools`": ("test_openai_for_node",),
    "`openai-agents`: chat and responses models, handoffs, clocks, output types": ("test_openai_agents",),
    "`langchain-openai`: `create_agent`, structured output, `ProviderStrategy`": ("test_langchain",),
    "LangGraph with memory": ("test_langgraph",),
    "`pydantic-ai`: chat and responses, tool and native output, streams": ("test_pydantic_ai",),
    "`smolagents`: `ToolCallingAgent`, `CodeAgent`": ("test_smolagents",),
    "`litellm`, and its proxy in front: chat, responses, `/v1/messages`": ("test_litellm",),
    "`llm`: tools, schemas": ("test_llm",),
    "`instructor`: TOOLS, JSON, JSON_SCHEMA, RESPONSES_TOOLS": ("test_instructor",),
    "`dspy`: `Predict`, `ReAct`": ("test_dspy",),
    "Vercel AI SDK: `@ai-sdk/openai` (responses, chat), `@ai-sdk/openai-compatible`": ("test_the_ai_sdk",),
    "`anthropic`: tools, streams, `count_tokens`, `models`": ("test_anthropic",),
    "Codex CLI": ("test_codex",),
    "`curl`": ("test_curl",),
    "MCP servers behind the agent: `mcp-server-time`, tau2-bench's retail shop": ("test_mcp",),
}  # fmt: skip
"""Each client, and how the names of its tests begin."""


def run_tests() -> dict[str, str]:
    """Each test that ran, and what became of it: `passes`, or the first line of its failure."""
    results: dict[str, str] = {}
    for environment, files in ENVIRONMENTS.items():
        with tempfile.NamedTemporaryFile(suffix=".xml") as report:
            paths = [f"tests_clients/{name}" for name in files]
            command = [ROOT / environment / "bin" / "python", "-m", "pytest", "-q", *paths, f"--junitxml={report.name}"]
            subprocess.run([str(part) for part in command], cwd=ROOT, stdout=sys.stderr, check=False)
            for case in ElementTree.parse(report.name).iter("testcase"):
                results[case.get("name", "")] = _result(case)
    return results


def _result(case: ElementTree.Element) -> str:
    problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
    return (problems[0].get("message") or problems[0].tag).splitlines()[0][:100] if problems else "passes"


def client_table(results: Mapping[str, str]) -> str:
    lines = ["| client, unmodified but for its base URL | tests | |", "|---|---|---|"]
    for client, beginnings in CLIENTS.items():
        found = {name: result for name, result in results.items() if name.startswith(beginnings)}
        failed = [f"{name}: {result}" for name, result in found.items() if result != "passes"]
        lines.append(f"| {client} | {len(found)} | {'; '.join(failed) or ('passes' if found else 'was not run')} |")
    return "\n".join(lines)


def field_tables() -> str:
    tables = {
        "/v1/chat/completions": CHAT_FIELDS,
        "/v1/chat/completions, not in OpenAI's form": BESIDE_OPENAIS,
        "/v1/responses": RESPONSE_FIELDS,
        "/v1/messages": MESSAGE_FIELDS,
    }
    return "\n\n".join(f"### {title}\n\n{_field_table(rules)}" for title, rules in tables.items())


def _field_table(rules: Mapping[str, Rule]) -> str:
    rows = [f"| `{name}` | {rule.treatment} | {rule.note} |" for name, rule in sorted(rules.items())]
    return "\n".join(["| field | what becomes of it | how, or why |", "|---|---|---|", *rows])


def replaced(text: str, name: str, part: str) -> str:
    """The text with what stands between a part's two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/CLIENTS.md and README.md")
    parser.add_argument("--fields-only", action="store_true", help="run no client: only the fields' tables")
    options = parser.parse_args()
    parts = {"fields": field_tables()}
    if not options.fields_only:
        parts["clients"] = client_table(run_tests())
    print("\n\n".join(parts.values()))
    for file in (PAGE, ROOT / "README.md") if options.write else ():
        text = file.read_text(encoding="utf-8")
        for name, part in parts.items():
            text = replaced(text, name, part)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
