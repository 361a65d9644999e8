// The Vercel AI SDK: `node ai_sdk.mjs responses|chat|compatible`, two turns, the first with a tool.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, tool } from "ai";
import { z } from "zod";

const kind = process.argv[2];
const openai = createOpenAI();
const compatible = createOpenAICompatible({ name: "ours", baseURL: process.env.OPENAI_BASE_URL });
const model = { responses: () => openai("novice"), chat: () => openai.chat("novice"), compatible: () => compatible("novice") };
const look = tool({
  description: "Look at a place.",
  inputSchema: z.object({ at: z.string() }),
  execute: async ({ at }) => `There is a globe on the ${at}.`,
});

const messages = [];
for (const words of ["What is on the shelf?", "Thank you."]) {
  messages.push({ role: "user", content: words });
  const result = await generateText({ model: model[kind](), tools: { look }, messages, stopWhen: stepCountIs(5) });
  messages.push(...result.response.messages);
  console.log(result.text);
}
