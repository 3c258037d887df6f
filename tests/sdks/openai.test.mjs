// OpenAI's own library for JavaScript.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { ADAPTER, BASE, GAP, INTENT, URL_OF_SERVER, joined } from "./server.mjs";

const client = new OpenAI({ baseURL: `${URL_OF_SERVER}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: INTENT }];

test("a streamed chat says what a plain one says, and ends with its usage", async () => {
  const options = { model: ADAPTER, messages, temperature: 0, max_tokens: 32 };
  const plain = await client.chat.completions.create(options);
  const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
  let usage;
  const text = await joined(stream, (chunk) => {
    usage = chunk.usage ?? usage;
    return chunk.choices[0]?.delta.content;
  });
  assert.equal(text, plain.choices[0].message.content);
  assert.equal(usage.completion_tokens, plain.usage.completion_tokens);
});

test("a suffix is filled up to", async () => {
  const completion = await client.completions.create({
    model: BASE, prompt: GAP.prefix, suffix: GAP.suffix, max_tokens: 16,
  });
  assert.match(completion.choices[0].text, /a \+ b/);
});

test("an aborted stream ends, and the server goes on", async () => {
  const stream = await client.completions.create({ model: BASE, prompt: "def f", max_tokens: 2000, stream: true });
  for await (const _ of stream) break;
  assert.ok((await client.models.list()).data.length > 1);
});

test("an unknown model is an error of its own class", async () => {
  await assert.rejects(client.completions.create({ model: "none", prompt: "a" }), OpenAI.NotFoundError);
});
