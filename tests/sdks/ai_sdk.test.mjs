// Vercel's AI SDK with a server that speaks OpenAI's interface.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { ADAPTER, BASE, INTENT, URL_OF_SERVER, joined } from "./server.mjs";

const lorry = createOpenAICompatible({ name: "lorry", baseURL: `${URL_OF_SERVER}/v1`, includeUsage: true });
const options = { prompt: INTENT, temperature: 0, maxOutputTokens: 32, maxRetries: 0 };

test("a streamed text is the generated one, with its usage", async () => {
  const model = lorry(ADAPTER);
  const generated = await generateText({ model, ...options });
  const streamed = streamText({ model, ...options });
  assert.equal(await joined(streamed.textStream, (part) => part), generated.text);
  assert.equal((await streamed.usage).outputTokens, generated.usage.outputTokens);
});

test("a completion model goes on from a prompt", async () => {
  const { text, finishReason } = await generateText({
    model: lorry.completionModel(BASE), prompt: "def fibonacci(n):\n", temperature: 0, maxOutputTokens: 8, maxRetries: 0,
  });
  assert.ok(text);
  assert.equal(finishReason, "length");
});
