// Tests with a page of their own, which may not misbehave.

import assert from "node:assert/strict";
import { after, test } from "node:test";

import { REAL, TIMEOUT, launch, open } from "./browser.mjs";
import { startMock } from "./mock_server.mjs";

/** One for all tests of a file, with a new profile. */
let browser;

after(() => browser?.close());

/**
 * A test with a page of its own: `run({page, mock, url})`. `settings`: `mock` (options of the mock; such a test is
 * skipped against a real server), `context` (of the browser), `expectsErrors` (the browser itself reports failed
 * requests on the console).
 */
export function pageTest(name, settings, run) {
  const skip = REAL && settings.mock ? "needs the mock" : false;
  test(name, { skip, timeout: TIMEOUT * 2 }, async () => {
    const mock = REAL ? null : await startMock(settings.mock);
    const url = REAL ?? mock.url;
    browser ??= await launch();
    const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...settings.context });
    context.setDefaultTimeout(TIMEOUT);
    const page = await context.newPage();
    const complaints = watchConduct(page, new URL(url).origin, settings);
    try {
      await open(page, url);
      await run({ page, mock, url });
      assert.deepEqual(complaints, []);
    } finally {
      await context.close();
      await mock?.stop();
    }
  });
}

/** Everything that no page may do: errors, exceptions, requests to another host. */
function watchConduct(page, origin, { expectsErrors }) {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(`exception: ${error.message}`));
  page.on("console", (message) => {
    if (message.type() === "error" && !expectsErrors) complaints.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== origin) complaints.push(`another host: ${request.url()}`);
  });
  return complaints;
}
