// Continue's adapters: what its autocomplete, its chat and its edits send.

import assert from "node:assert/strict";
import { test } from "node:test";
import { constructLlmApi } from "@continuedev/openai-adapters";
import { ADAPTER, BASE, GAP, INTENT, URL_OF_SERVER, joined, post } from "./server.mjs";

const signal = new AbortController().signal;
const api = (provider, extra = {}) =>
  constructLlmApi({ provider, apiKey: "none", apiBase: `${URL_OF_SERVER}/v1/`, ...extra });

test("the models are listed", async () => {
  const models = await api("openai").list();
  assert.ok(models.some((model) => model.id === ADAPTER));
});

test("a gap laid out by Continue is filled as one with a suffix", async () => {
  const prompt = `<|fim_prefix|>${GAP.prefix}<|fim_suffix|>${GAP.suffix}<|fim_middle|>`;
  const body = {
    model: BASE, prompt, max_tokens: 32, temperature: 0.01, stream: true,
    stop: ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "/src/", "#- coding: utf-8", "```"],
  };
  const text = await joined(api("vllm").completionStream(body, signal), (chunk) => chunk.choices[0]?.text);
  const expected = await post("/v1/completions", { model: BASE, prompt: GAP.prefix, suffix: GAP.suffix, max_tokens: 32, temperature: 0.01 });
  assert.equal(text, expected.choices[0].text);
  assert.match(text, /a \+ b/);
});

test("Mistral's fill-in-the-middle streams content in every chunk", async () => {
  const body = { model: BASE, prompt: GAP.prefix, suffix: GAP.suffix, max_tokens: 32, temperature: 0, stream: true };
  const text = await joined(api("mistral").fimStream(body, signal), (chunk) => {
    assert.equal(typeof chunk.choices[0].delta.content, "string");
    return chunk.choices[0].delta.content;
  });
  assert.match(text, /a \+ b/);
});

test("a chat streams, and its plain form says the same", async () => {
  const body = { model: ADAPTER, messages: [{ role: "user", content: INTENT }], max_tokens: 32, temperature: 0 };
  const plain = await api("openai").chatCompletionNonStream({ ...body, stream: false }, signal);
  const text = await joined(api("openai").chatCompletionStream({ ...body, stream: true }, signal),
    (chunk) => chunk.choices[0]?.delta.content);
  assert.equal(text, plain.choices[0].message.content);
});
