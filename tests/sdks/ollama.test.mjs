// Ollama's own library.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";
import { ADAPTER, BASE, GAP, INTENT, URL_OF_SERVER, joined } from "./server.mjs";

const client = new Ollama({ host: URL_OF_SERVER });
const options = { temperature: 0, num_predict: 24 };

test("the base and its adapters are tags, and show says what they can", async () => {
  const { models } = await client.list();
  assert.ok(models.some((model) => model.name === BASE) && models.some((model) => model.name === ADAPTER));
  const { capabilities, template } = await client.show({ model: BASE });
  assert.ok(capabilities.includes("completion") && capabilities.includes("insert"));
  assert.match(template, /\.Suffix/);
});

test("a gap is filled", async () => {
  const { response } = await client.generate({ model: BASE, prompt: GAP.prefix, suffix: GAP.suffix, options });
  assert.match(response, /a \+ b/);
});

test("a streamed chat is the plain one", async () => {
  const chat = { model: ADAPTER, messages: [{ role: "user", content: INTENT }], options };
  const plain = await client.chat(chat);
  const text = await joined(await client.chat({ ...chat, stream: true }), (part) => part.message.content);
  assert.equal(text, plain.message.content);
  assert.equal(plain.done, true);
});
