// OpenCode, a whole agent: it must run the tool that lorry calls, give the output back and come to an end.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { buffer, text } from "node:stream/consumers";
import { after, test } from "node:test";
import { BASE, URL_OF_SERVER } from "./server.mjs";

// What `opencode-ai` starts on x86-64, without the second build that it installs to choose from.
const OPENCODE = join(import.meta.dirname, "node_modules", "opencode-linux-x64", "bin", "opencode");
const NOTE = "The lorry is green.";

/** What the agent asked and how lorry answered, in order. */
const exchanges = [];

// Every byte goes through as it is but for the first question, which forces the call that so small a model may not make.
const proxy = createServer(async (asked, answer) => {
  let body = await buffer(asked);
  const exchange = { asked: JSON.parse(body) };
  if (exchanges.push(exchange) === 1) {
    body = Buffer.from(JSON.stringify({ ...exchange.asked, tool_choice: { type: "function", function: { name: "read" } } }));
  }
  const headers = { ...asked.headers, "content-length": body.length };
  request(URL_OF_SERVER + asked.url, { method: asked.method, headers }, (answered) => {
    exchange.status = answered.statusCode;
    answer.writeHead(answered.statusCode, answered.headers);
    answered.pipe(answer);
  }).end(body);
});
await new Promise((listening) => proxy.listen(0, "127.0.0.1", listening));
after(() => proxy.close());

/** A project with a note in it, and an agent that may read, greedily and in two steps. */
function project() {
  const folder = mkdtempSync(join(tmpdir(), "opencode-"));
  after(() => rmSync(folder, { recursive: true, force: true }));
  writeFileSync(join(folder, "notes.txt"), `${NOTE}\n`);
  const options = { baseURL: `http://127.0.0.1:${proxy.address().port}/v1`, apiKey: "none" };
  const model = { temperature: true, limit: { context: 8192, output: 64 } };
  writeFileSync(join(folder, "opencode.json"), JSON.stringify({
    provider: { lorry: { npm: "@ai-sdk/openai-compatible", options, models: { [BASE]: model } } },
    agent: {
      reader: { mode: "primary", prompt: "Read files.", temperature: 0, steps: 2, permission: { "*": "deny", read: "allow" } },
      title: { disable: true },
    },
    autoupdate: false,
  }));
  return folder;
}

const skip = process.arch !== "x64" && "the build in package.json is for x86-64";
test("a call is run, its output comes back, and the agent ends", { skip, timeout: 120_000 }, async () => {
  const folder = project();
  const agent = spawn(
    OPENCODE,
    ["run", "--agent", "reader", "--model", `lorry/${BASE}`, "--format", "json", `Read the file ${join(folder, "notes.txt")}`],
    {
      cwd: folder,
      // Whatever it would fetch from elsewhere fails.
      env: { PATH: process.env.PATH, HOME: folder, HTTPS_PROXY: "http://127.0.0.1:9" },
      stdio: ["ignore", "pipe", "inherit"],
    },
  );
  after(() => agent.kill());
  const status = new Promise((ended, failed) => agent.on("error", failed).on("close", ended));
  const said = await text(agent.stdout);
  assert.equal(await status, 0, said);
  assert.deepEqual(exchanges.map(({ status }) => status), [200, 200], said);

  const { part } = said.trim().split("\n").map((line) => JSON.parse(line)).find(({ type }) => type === "tool_use");
  assert.deepEqual([part.tool, part.state.status], ["read", "completed"], said);
  const [call, result] = exchanges[1].asked.messages.filter(({ role, tool_calls }) => tool_calls || role === "tool");
  assert.equal(call.tool_calls[0].id, part.callID);
  assert.equal(result.tool_call_id, part.callID);
  assert.match(result.content, new RegExp(NOTE));
});
