// The views of experiments and adapters, and what the page says when there is nothing to see.

import assert from "node:assert/strict";

import { pageTest } from "./page_test.mjs";

const view = (page, name) => page.getByRole("link", { name }).click();

pageTest("an experiment shows its rates with their intervals", { mock: {} }, async ({ page }) => {
  await view(page, "Experiments");
  await page.getByRole("heading", { name: "coder" }).waitFor();
  await page.getByRole("img", { name: "Accepted 44 %, interval 40 % to 48 %, of 1200" }).waitFor();
  const x = await page
    .locator("svg .interval")
    .nth(2)
    .evaluate((line) => [line.x1.baseVal.value, line.x2.baseVal.value]);
  const [low, high] = x.map((at) => (at - 6) / 148);
  assert.ok(Math.abs(low - 0.4) < 1e-6 && Math.abs(high - 0.48) < 1e-6, "the line is drawn to scale");
  await page.getByText("6 ties, p = 0.12").waitFor();
  await page.getByText("canary next: rolled back").waitFor();
  assert.equal(await page.getByText("nothing yet").count(), 2);
});

pageTest("a promotion shows its record, and the curve of its job to who may see that", { mock: {} }, async ({ page }) => {
  await view(page, "Experiments");
  await page.getByRole("heading", { name: "Promotion of ft-mine-1: back" }).waitFor();
  await page.getByText("4215963a in next, against base").waitFor();
  await page.getByText("trained by ftjob-1 on file-1").waitFor();
  await page.getByRole("img", { name: "base wins 7, ft-mine-1 wins 22, 1 ties" }).waitFor();
  await page.getByText("p = 0.0081 on 30 held-out pairs").waitFor();
  const steps = await page.locator(".steps li strong").allTextContents();
  assert.deepEqual(steps, ["checking", "canary", "back"]);
  await page.getByText("3 of 30 were accepted, against 30 of 40").waitFor();

  const curve = page.getByRole("img", { name: "Training loss to step 2, validation loss 1.50 at best" });
  assert.equal(await curve.count(), 0, "without a key no job is asked for");
  await page.evaluate(() => sessionStorage.setItem("lorry.key", "admin"));
  await page.getByRole("button", { name: "Refresh" }).click();
  await curve.waitFor();
  const points = await curve.locator("polyline").evaluateAll((lines) => lines.map((line) => line.points.numberOfItems));
  assert.deepEqual(points, [2, 2]);
});

pageTest("adapters show their tier, their traffic and why one is refused", { mock: {} }, async ({ page }) => {
  await view(page, "Adapters");
  await page.getByText("4 registered, 2 in memory (17.6 MB)").waitFor();
  const rows = await page
    .locator("#adapters-rows tr")
    .evaluateAll((rows) =>
      rows.map((row) => [
        row.querySelector("strong").textContent,
        ...[...row.querySelectorAll("td")].map((cell) => cell.textContent),
      ]),
    );
  assert.deepEqual(rows, [
    ["conala", "ready", "memory", "8.8 MB", "1,284", "3", "4215963a"],
    ["bash", "ready", "memory", "8.8 MB", "311", "0", "4215963a"],
    ["docstring", "not loaded", "disk", "–", "0", "0", "–"],
    ["sql", "refused", "disk", "–", "0", "0", "–"],
  ]);
  await page.getByText("has rank 4, the configuration says 8").waitFor();

  await page.getByRole("searchbox", { name: "Filter" }).fill("doc");
  assert.equal(await page.locator("#adapters-rows tr").count(), 1);
  await page.getByRole("searchbox", { name: "Filter" }).fill("nothing like it");
  await page.getByText("No adapter to show").waitFor();
});

const MANY = Array.from({ length: 1000 }, (_, n) => [`tuned-${n}`, "one of many", "registered", "disk", 0, 0, null]);

pageTest("a thousand adapters stay a page that one can read", { mock: { adapters: MANY } }, async ({ page }) => {
  await view(page, "Adapters");
  await page.getByText("900 more: filter by name to see them.").waitFor();
  assert.equal(await page.locator("#adapters-rows tr").count(), 100);
});

pageTest("a server without experiments says how to get one", { mock: { experiments: [] } }, async ({ page }) => {
  await view(page, "Experiments");
  await page.getByText("No experiment is running").waitFor();
  await page.getByText("0 experiments").waitFor();
});

pageTest(
  "views keep what they have when the server goes away",
  { mock: {}, expectsErrors: true },
  async ({ page, mock }) => {
    await view(page, "Experiments");
    await page.getByRole("heading", { name: "coder" }).waitFor();
    await mock.stop();
    await page.getByRole("button", { name: "Refresh" }).click();
    await page.getByText("Not up to date: the server cannot be reached.").waitFor();
    await page.getByRole("heading", { name: "coder" }).waitFor();
    mock.stop = async () => {};
  },
);

pageTest("the real server answers each view", {}, async ({ page }) => {
  for (const [name, title] of [
    ["Experiments", /^\d+ experiments?$/],
    ["Adapters", /^\d+ registered/],
  ]) {
    await view(page, name);
    await page.getByRole("status").getByText(title).waitFor();
  }
});
