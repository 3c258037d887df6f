// Takes the pictures of docs/: `node tests/page/screenshots.mjs`, from the server at LORRY_URL or else from the mock.

import { REAL, ask, ended, launch, open } from "./browser.mjs";
import { startMock } from "./mock_server.mjs";

const docs = new URL("../../docs/", import.meta.url).pathname;
const mock = REAL ? null : await startMock();
const browser = await launch();

for (const [name, colorScheme] of [
  ["compare", "light"],
  ["compare-dark", "dark"],
]) {
  const page = await browser.newPage({ viewport: { width: 1440, height: 1080 }, colorScheme });
  await open(page, REAL ?? mock.url);
  await ask(page);
  await ended(page);
  await page.keyboard.press("3");
  await page.locator("#status", { hasText: /^Your vote: [^,]*\.$/ }).waitFor();
  // The bars grow to their length.
  await page.waitForFunction(() => document.getAnimations().every((animation) => animation.playState !== "running"));
  await page.screenshot({ path: `${docs}${name}.png` });
}

await browser.close();
await mock?.stop();
