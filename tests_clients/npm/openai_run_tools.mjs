// openai's library for Node: its own loop of tools.
import OpenAI from "openai";

const client = new OpenAI();
const runner = client.chat.completions.runTools({
  model: "novice",
  messages: [{ role: "user", content: "What is on the shelf?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "look",
        parameters: { type: "object", properties: { at: { type: "string" } } },
        parse: JSON.parse,
        function: ({ at }) => `There is a globe on the ${at}.`,
      },
    },
  ],
});
console.log(await runner.finalContent());
