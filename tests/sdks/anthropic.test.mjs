// Anthropic's own library.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { ADAPTER, BASE, INTENT, URL_OF_SERVER } from "./server.mjs";

const client = new Anthropic({ baseURL: URL_OF_SERVER, apiKey: "none", maxRetries: 0 });
const request = { model: ADAPTER, max_tokens: 32, temperature: 0, messages: [{ role: "user", content: INTENT }] };

test("a streamed message is the plain one", async () => {
  const plain = await client.messages.create(request);
  const streamed = await client.messages.stream(request).finalMessage();
  assert.deepEqual(streamed.content, plain.content);
  assert.equal(streamed.stop_reason, plain.stop_reason);
  assert.equal(streamed.usage.output_tokens, plain.usage.output_tokens);
});

test("tokens are counted as a message counts them", async () => {
  const { max_tokens, temperature, ...counted } = request;
  const { input_tokens } = await client.messages.countTokens(counted);
  const { usage } = await client.messages.create(request);
  assert.equal(usage.input_tokens + (usage.cache_read_input_tokens ?? 0), input_tokens);
});

test("the models are listed in Anthropic's form", async () => {
  const models = await client.models.list();
  assert.ok(models.data.some((model) => model.id === BASE && model.type === "model"));
});
