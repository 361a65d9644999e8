"""An agent whose tools the server runs: `python examples/server_tools.py [URL]`, beside `make serve`.

Each step arrives as it is taken, under the extra key `stepagent` of a chunk; the text is the agent's answer.
"""

import sys

from openai import OpenAI

TASK = "Order 7000 has come in: the miniature barometer for Bruno Wilde, with no hurry at all."


def main(base_url: str) -> tuple[list[dict], str]:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": TASK}]
    steps, text = [], ""
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        if step := (chunk.model_extra or {}).get("stepagent", {}).get("step"):
            steps.append(step)
            print(f"step {step['index']}: {step['action']}")
        for choice in chunk.choices:
            text += choice.delta.content or ""
    return steps, text


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")[1])
