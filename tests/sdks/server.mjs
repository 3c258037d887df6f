// The server under test, which `tests/clients/test_sdks.py` runs.

export const URL_OF_SERVER = process.env.LORRY_URL ?? "http://127.0.0.1:8080";
export const BASE = "qwen2.5-coder:0.5b";
export const ADAPTER = `${BASE}-conala`;
export const GAP = { prefix: "def add(a, b):\n    return ", suffix: "\n\nprint(add(1, 2))\n" };
export const INTENT = "check if all elements in list `mylist` are the same";

/** Text of the parts that an asynchronous iterable gives. */
export async function joined(parts, text) {
  let all = "";
  for await (const part of parts) all += text(part) ?? "";
  return all;
}

/** What plain HTTP answers to the same question. */
export async function post(path, body) {
  const response = await fetch(URL_OF_SERVER + path, { method: "POST", body: JSON.stringify(body) });
  return response.json();
}
