// Tabby's agent, the whole of an IDE's completion side, as a language server: a completion must arrive.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { URL_OF_SERVER } from "./server.mjs";

const home = mkdtempSync(join(tmpdir(), "tabby-agent-"));
const settings = join(home, ".tabby-client", "agent");
mkdirSync(settings, { recursive: true });
writeFileSync(join(settings, "config.toml"), `[server]\nendpoint = "${URL_OF_SERVER}"\n[anonymousUsageTracking]\ndisable = true\n`);
const agent = spawn(process.execPath, ["node_modules/tabby-agent/dist/cli.js", "--lsp", "--stdio"], {
  cwd: import.meta.dirname, env: { ...process.env, HOME: home }, stdio: ["pipe", "pipe", "inherit"],
});
after(() => agent.kill());

const answers = new Map();
let buffered = Buffer.alloc(0);
agent.stdout.on("data", (data) => {
  buffered = Buffer.concat([buffered, data]);
  for (;;) {
    const end = buffered.indexOf("\r\n\r\n");
    if (end < 0) return;
    const length = Number(/Content-Length: (\d+)/i.exec(buffered.subarray(0, end))[1]);
    if (buffered.length < end + 4 + length) return;
    received(JSON.parse(buffered.subarray(end + 4, end + 4 + length)));
    buffered = buffered.subarray(end + 4 + length);
  }
});

function received(message) {
  if (message.method && message.id !== undefined) return send({ id: message.id, result: null });
  const answer = answers.get(message.id);
  answers.delete(message.id);
  answer?.(message);
}

function send(message) {
  const json = JSON.stringify({ jsonrpc: "2.0", ...message });
  agent.stdin.write(`Content-Length: ${Buffer.byteLength(json)}\r\n\r\n${json}`);
}

let lastId = 0;
async function ask(method, params) {
  const id = ++lastId;
  const message = await new Promise((resolve) => {
    answers.set(id, resolve);
    send({ id, method, params });
  });
  assert.equal(message.error, undefined, JSON.stringify(message.error));
  return message.result;
}

test("a completion arrives over LSP", { timeout: 120_000 }, async () => {
  const uri = "file:///tmp/add.py";
  const text = "def add(a, b):\n    return \n\nprint(add(1, 2))\n";
  await ask("initialize", {
    processId: process.pid, clientInfo: { name: "test" }, rootUri: null,
    capabilities: { textDocument: { completion: {} } },
  });
  send({ method: "initialized", params: {} });
  send({ method: "textDocument/didOpen", params: { textDocument: { uri, languageId: "python", version: 1, text } } });
  const askOnce = () => ask("textDocument/completion", {
    textDocument: { uri }, position: { line: 1, character: 11 }, context: { triggerKind: 1 },
  });
  // The agent connects in the background and answers with nothing until it has.
  let items = [];
  for (let attempt = 0; attempt < 40 && items.length === 0; attempt += 1) {
    items = (await askOnce())?.items ?? [];
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  assert.match(items[0]?.textEdit?.newText ?? items[0]?.insertText ?? "", /a \+ b/);
});
