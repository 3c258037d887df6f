// Codex, a whole agent over /v1/responses: it must run the tool that lorry calls, give the output back and come to an end.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { buffer, text } from "node:stream/consumers";
import { after, test } from "node:test";
import { BASE, URL_OF_SERVER } from "./server.mjs";

// What `@openai/codex` starts on x86-64.
const CODEX = join(
  import.meta.dirname, "node_modules", "codex-linux-x64", "vendor", "x86_64-unknown-linux-musl", "bin", "codex",
);
const NOTE = "The lorry is green.";
const COMMAND = "cat notes.txt";

/** What the agent asked and how lorry answered, in order. */
const exchanges = [];

/** So small a model is not left to choose what is run, and ends where it may. */
const changes = [
  (asked) => ({
    tool_choice: { type: "function", name: "exec_command" },
    tools: asked.tools.map((tool) => tool.name !== "exec_command" ? tool : {
      ...tool,
      parameters: { type: "object", properties: { cmd: { const: COMMAND } }, required: ["cmd"], additionalProperties: false },
    }),
  }),
  () => ({ tool_choice: "none", temperature: 0, stop: [".", "\n"] }),
];

const proxy = createServer(async (asked, answer) => {
  const exchange = { path: asked.url, asked: JSON.parse(await buffer(asked)) };
  const change = changes[exchanges.push(exchange) - 1] ?? (() => ({}));
  const body = Buffer.from(JSON.stringify({ ...exchange.asked, ...change(exchange.asked) }));
  const headers = { ...asked.headers, "content-length": body.length };
  request(URL_OF_SERVER + asked.url, { method: asked.method, headers }, (answered) => {
    exchange.status = answered.statusCode;
    answer.writeHead(answered.statusCode, answered.headers);
    answered.pipe(answer);
  }).end(body);
});
await new Promise((listening) => proxy.listen(0, "127.0.0.1", listening));
after(() => proxy.close());

/** A project with a note in it. */
function project() {
  const folder = mkdtempSync(join(tmpdir(), "codex-"));
  after(() => rmSync(folder, { recursive: true, force: true }));
  writeFileSync(join(folder, "notes.txt"), `${NOTE}\n`);
  writeFileSync(join(folder, "instructions.md"), "Run commands.\n");
  return folder;
}

const skip = process.arch !== "x64" && "the build in package.json is for x86-64";
test("a call is run, its output comes back, and the agent ends", { skip, timeout: 300_000 }, async () => {
  const folder = project();
  const url = `http://127.0.0.1:${proxy.address().port}/v1`;
  const settings = [
    'model_provider="lorry"',
    `model_providers.lorry={name="lorry",base_url="${url}",wire_api="responses"}`,
    // Its own are 5,000 tokens long.
    `model_instructions_file="${join(folder, "instructions.md")}"`,
  ];
  const agent = spawn(
    CODEX,
    ["exec", "--json", "--skip-git-repo-check", "--model", BASE,
      ...settings.flatMap((setting) => ["--config", setting]), `Run ${COMMAND}`],
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
  assert.deepEqual(exchanges.map(({ path, status }) => [path, status]), Array(2).fill(["/v1/responses", 200]), said);

  const kinds = new Set(exchanges[0].asked.tools.map(({ type }) => type));
  assert.deepEqual(kinds, new Set(["function", "namespace", "web_search"]), "what it offers unasked");
  const [call, result] = exchanges[1].asked.input.filter(({ type }) => type.startsWith("function_call"));
  assert.deepEqual([call.name, JSON.parse(call.arguments)], ["exec_command", { cmd: COMMAND }]);
  assert.equal(result.call_id, call.call_id);
  assert.match(JSON.stringify(result.output), new RegExp(NOTE));
});
