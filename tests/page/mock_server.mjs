// A server that answers as lorry does, with made-up models: the page's tests need no model and no build.

import { createReadStream, existsSync } from "node:fs";
import { createServer } from "node:http";
import { once } from "node:events";
import { extname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const WEB = new URL("../../web/", import.meta.url).pathname;
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml" };
/** As src/http/page.rs sends it. */
const POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'";

export const BASE = "qwen2.5-coder:0.5b";

const ADAPTERS = [
  ["conala", "A sentence to one line of Python", "ready", "host", 8_794_112, 3, null],
  ["bash", "A sentence to one shell command", "ready", "host", 8_794_112, 0, null],
  ["docstring", "A docstring for a Python function", "registered", "disk", 0, 0, null],
  [
    "sql",
    "A question to one SQL query",
    "failed",
    "disk",
    0,
    0,
    "`lora_A` of `model.layers.3.mlp.up_proj` has rank 4, the configuration says 8",
  ],
];

/** What each arm writes. */
export const TEXTS = {
  base: "def all_same(mylist):\n    first = mylist[0]\n    for item in mylist:\n        if item != first:\n            return False\n    return True\n",
  icl: "def all_same(mylist):\n    for item in mylist:\n        if item != mylist[0]:\n            return False\n    return True\n",
  conala: "all(x == mylist[0] for x in mylist)\n",
  bash: "sort -u mylist | wc -l\n",
  docstring: "<img src=x onerror=\"document.title='broken'\"> & <b>text</b>\n",
};

const EXPERIMENTS = [
  {
    name: "coder",
    arms: [
      arm("base", BASE, 50, { rate: 0.31, low: 0.27, high: 0.35 }, { rate: 0.38, low: 0.26, high: 0.52 }, 94, 15.2),
      arm(
        "conala",
        `${BASE}-conala`,
        40,
        { rate: 0.44, low: 0.4, high: 0.48 },
        { rate: 0.62, low: 0.48, high: 0.74 },
        96,
        15.9,
      ),
      {
        ...arm(
          "next",
          `${BASE}-bash`,
          10,
          { rate: null, low: null, high: null },
          { rate: null, low: null, high: null },
          101,
          16.1,
        ),
        shadow: true,
      },
    ],
    pairs: [{ a: "base", b: "conala", a_wins: 19, b_wins: 31, ties: 6, p_value: 0.119 }],
    canary: { arm: "next", state: "rolled_back", cause: "`max_error_rate` is 0.05, and 0.2 of 50 requests failed" },
    promotion: {
      id: "promo-1",
      stage: "back",
      adapter: "ft-mine-1",
      generation: "4215963a77c0",
      arm: "next",
      incumbent: "base",
      trained: { job: "ftjob-1", training_file: "file-1", validation_file: null, valid_loss: 1.5, is_verified: true },
      check: { pairs: 30, left_out: 0, wins: 22, losses: 7, p_value: 0.0081 },
      steps: [
        { stage: "checking", at: 1_790_000_000, cause: null },
        { stage: "canary", at: 1_790_000_060, cause: "22 of 30 held-out completions are likelier to it" },
        { stage: "back", at: 1_790_003_600, cause: "3 of 30 were accepted, against 30 of 40" },
      ],
    },
  },
];

/** The latest first. */
const LOSSES = [
  { step: 2, total_steps: 2, valid_loss: 1.5 },
  { step: 2, total_steps: 2, train_loss: 2 },
  null,
  { step: 1, total_steps: 2, train_loss: 2.5 },
  { step: 0, total_steps: 2, valid_loss: 3 },
];

function arm(name, model, weight, acceptance, win_rate, ttft, tpot) {
  return {
    name,
    model,
    weight,
    shadow: false,
    requests: weight * 31,
    shown: weight * 30,
    accepted: weight * 4,
    rejected: weight * 6,
    edited: weight,
    acceptance,
    wins: 19,
    comparisons: 50,
    win_rate,
    ttft_ms: { p50: ttft, p95: ttft * 2.4 },
    tpot_ms: { p50: tpot, p95: tpot * 1.5 },
    prompt_tokens: weight * 4_120,
    completion_tokens: weight * 1_204,
    errors: 0,
    generation: "4215963a77c0",
  };
}

/**
 * Starts a server on a free port. `options`, which may change while it runs: `key` (asks for it), `experiments`,
 * `adapters`, `failFeedback`, `milliseconds` between tokens, `cutAfter` (events, then the connection breaks),
 * `refusal` (an error instead of a comparison), `hold` (a promise that streams wait for after their first token), `breaks`
 * (the index of an arm that fails after it).
 */
export async function startMock(options = {}) {
  const requests = [];
  const server = createServer(async (request, response) => {
    const body = await read(request);
    requests.push({ method: request.method, path: request.url, headers: request.headers, body });
    try {
      await answer(request, response, body, options);
    } catch (error) {
      if (!response.destroyed) response.destroy(error);
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    options,
    /** What was asked, oldest first. */
    requests,
    last: (path) => requests.findLast((request) => request.path === path)?.body,
    async stop() {
      server.closeAllConnections();
      server.close();
      await once(server, "close");
    },
  };
}

async function read(request) {
  let text = "";
  for await (const piece of request.setEncoding("utf8")) text += piece;
  return text === "" ? undefined : JSON.parse(text);
}

async function answer(request, response, body, options) {
  const { method, url: path } = request;
  if (path === "/") return file(response, "index.html");
  if (path.startsWith("/assets/")) return file(response, path.slice("/assets/".length));
  if (path === "/metrics") {
    return response.end(
      'lorry_requests_total{adapter="conala",finish_reason="stop"} 1284\nlorry_requests_total{adapter="bash",finish_reason="length"} 311\n',
    );
  }
  if (options.key && request.headers.authorization !== `Bearer ${options.key}`) {
    return refuse(response, 401, "this server needs an API key", null);
  }
  switch (`${method} ${path}`) {
    case "GET /v1/models":
      return json(response, { object: "list", data: [card(null), ...adapters(options).map(([name]) => card(name))] });
    case "GET /v1/icl":
      return json(response, { object: "list", data: [store("python", 24), store("bash", 16)] });
    case "GET /v1/adapters":
      return json(response, { object: "list", data: adapters(options).map(status) });
    case "GET /v1/experiments":
      return json(response, { object: "list", data: options.experiments ?? EXPERIMENTS });
    case "GET /v1/fine_tuning/jobs/ftjob-1/events?limit=10000":
      return json(response, { object: "list", data: LOSSES.map((data) => ({ data })) });
    case "POST /v1/feedback":
      if (options.failFeedback) return refuse(response, 503, "the vote could not be written: the disk is full", null);
      return json(response, { id: body.id, recorded: true });
    case "POST /v1/compare":
      if (options.refusal) return refuse(response, 400, options.refusal.message, options.refusal.param);
      return compare(response, body, options);
    default:
      return refuse(response, 404, `\`${path}\` is not a path of this server`, null);
  }
}

const adapters = (options) => options.adapters ?? ADAPTERS;

function card(adapter) {
  const id = adapter ? `${BASE}-${adapter}` : BASE;
  return {
    id,
    object: "model",
    parent: adapter ? BASE : null,
    adapter: adapter ? { name: adapter, generation: "4215963a77c0" } : null,
  };
}

const store = (name, num_examples) => ({ name, version: "9f1c", num_examples });

function status([name, description, phase, tier, bytes, in_flight, error], id) {
  const generation = tier === "disk" ? null : "4215963a77c0";
  return {
    id,
    name,
    model: `${BASE}-${name}`,
    phase,
    tier,
    bytes,
    in_flight,
    generation,
    error,
    manifest: { description },
  };
}

async function compare(response, body, options) {
  const id = "cmp-0001";
  let sent = 0;
  response.writeHead(200, { "content-type": "text/event-stream" });
  const send = async (event) => {
    if (options.cutAfter !== undefined && sent++ >= options.cutAfter) throw new Error("cut off, as asked");
    response.write(`data: ${JSON.stringify({ id, ...event })}\n\n`);
    await sleep(options.milliseconds ?? 1);
  };
  await Promise.all(body.arms.map((arm, index) => streamArm(send, arm, index, body, options)));
  response.write(`data: ${JSON.stringify({ id, event: "done" })}\n\n`);
  response.end("data: [DONE]\n\n");
}

async function streamArm(send, arm, index, body, options) {
  const about = { arm: index, name: arm.name };
  const model =
    adapters(options).find(([name]) => arm.model === `${BASE}-${name}`)?.[0] ?? arm.adapters?.[0].name ?? null;
  if (arm.model !== BASE && !model) {
    const error = {
      message: `\`${arm.model}\` is not a model of this server`,
      type: "invalid_request_error",
      param: `arms[${index}].model`,
      code: "model_not_found",
    };
    return send({ ...about, event: "error", error });
  }
  const adapter = model && { name: model, generation: "4215963a77c0" };
  const icl = arm.icl ? { ...arm.icl, version: "9f1c", examples: ["a", "b", "c"], cached_tokens: 96 } : null;
  await send({ ...about, event: "start", model: arm.model, adapter, icl });
  const text = model ? (TEXTS[model] ?? TEXTS.base) : icl ? TEXTS.icl : TEXTS.base;
  const pieces = text.match(/\s*\S+|\s+$/g);
  for (const [n, piece] of pieces.entries()) {
    await send({ ...about, event: "delta", text: piece });
    if (n === 0) await options.hold;
    if (n === 0 && options.breaks === index) {
      const error = { message: "the server is out of memory", type: "server_error", param: null, code: null };
      return send({ ...about, event: "error", error });
    }
  }
  const cached_tokens = icl ? 96 : 0;
  const prompt_tokens = 14 + (icl ? 118 : 0);
  const usage = {
    prompt_tokens,
    completion_tokens: pieces.length,
    total_tokens: prompt_tokens + pieces.length,
    prompt_tokens_details: { cached_tokens },
  };
  const tpot_ms = 14.2 + index * 0.9;
  const ttft_ms = 71.5 + index * 22;
  await send({
    ...about,
    event: "finish",
    model: arm.model,
    adapter,
    icl,
    text,
    finish_reason: pieces.length < body.max_tokens ? "stop" : "length",
    usage,
    ttft_ms,
    tpot_ms,
    total_ms: ttft_ms + tpot_ms * pieces.length,
    logprob: -3.2 - index * 1.4,
    agreement: text === TEXTS.base ? 1 : 0.42,
  });
}

function file(response, name) {
  const path = join(WEB, name);
  if (!path.startsWith(WEB) || !existsSync(path)) return refuse(response, 404, "no such file", null);
  response.writeHead(200, {
    "content-type": `${TYPES[extname(name)]}; charset=utf-8`,
    "content-security-policy": POLICY,
  });
  createReadStream(path).pipe(response);
}

function json(response, value) {
  response.writeHead(200, { "content-type": "application/json" });
  response.end(JSON.stringify(value));
}

function refuse(response, code, message, param) {
  response.writeHead(code, { "content-type": "application/json" });
  response.end(JSON.stringify({ error: { message, type: "invalid_request_error", param, code: null } }));
}
