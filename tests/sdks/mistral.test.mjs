// Mistral's own library, pointed here.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Mistral } from "@mistralai/mistralai";
import { BASE, GAP, URL_OF_SERVER, joined } from "./server.mjs";

const client = new Mistral({ apiKey: "none", serverURL: URL_OF_SERVER });
const request = { model: BASE, prompt: GAP.prefix, suffix: GAP.suffix, maxTokens: 16, temperature: 0 };

test("fill-in-the-middle, whole and streamed", async () => {
  const { choices: [{ message }] } = await client.fim.complete(request);
  assert.match(message.content, /a \+ b/);
  const text = await joined(await client.fim.stream(request), (event) => event.data.choices[0].delta.content);
  assert.equal(text, message.content);
});

test("a chat", async () => {
  const chat = { model: BASE, messages: [{ role: "user", content: "Say hi." }], maxTokens: 8, temperature: 0 };
  const { choices: [{ message }] } = await client.chat.complete(chat);
  const text = await joined(await client.chat.stream(chat), (event) => event.data.choices[0].delta.content);
  assert.equal(text, message.content);
});
