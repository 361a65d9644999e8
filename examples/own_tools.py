"""An agent whose tools your own program runs: `python examples/own_tools.py [URL]`, beside `make serve`.

The server makes one step a request and logs it; nothing but `base_url` differs from any other OpenAI program.
"""

import json
import sys

from openai import OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_customer",
            "description": "Look a customer up by name.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    }
]


def main(base_url: str) -> str:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Where does Bruno Wilde live?"}]
    for _ in range(8):
        answer = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0)
        message = answer.choices[0].message
        messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        for call in message.tool_calls or []:
            found = {"city": "Cairo", "asked": json.loads(call.function.arguments)}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(found)})
        if not message.tool_calls:
            return message.content
    return "it went on calling tools"


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"))
