// The server, as this page uses it.

const KEY = "lorry.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused: its message, and the field of the request at fault. */
class ServerError extends Error {
  constructor(status, { message, param } = {}) {
    super(message ?? `the server answered ${status}`);
    this.status = status;
    this.param = param ?? null;
  }
}

/** The JSON of a reply. */
export async function get(path) {
  return (await send(path)).json();
}

export async function post(path, body, signal) {
  return (await send(path, { method: "POST", body: JSON.stringify(body), signal })).json();
}

/** The text of a reply. */
export async function getText(path) {
  return (await send(path)).text();
}

/** The events of a stream, up to `[DONE]`. */
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of events(pieces(response.body))) {
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
}

/** Not every browser can iterate over a stream itself. */
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) yield piece.value;
}

/** The data of each server-sent event in pieces of text, however they are cut. */
export async function* events(pieces) {
  let rest = "";
  let data = [];
  for await (const piece of pieces) {
    rest += piece;
    // A line end may be cut in two: the `\r` of a piece that ends with one waits for the next.
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line === "" && data.length > 0) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { method, body, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "the server cannot be reached" });
  }
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new ServerError(response.status, error);
  }
  return response;
}
