// The comparison in a real browser, from the prompt to the vote.

import assert from "node:assert/strict";

import { ask, columns, ended, names, open, parts } from "./browser.mjs";
import { BASE, TEXTS } from "./mock_server.mjs";
import { pageTest } from "./page_test.mjs";

pageTest("all arms stream side by side and end with their figures", {}, async ({ page }) => {
  await ask(page);
  await ended(page);
  const arms = await page.locator("#arms > li").count();
  assert.ok(arms >= 2);
  assert.equal(await columns(page).count(), arms);
  for (const field of ["ttft_ms", "tpot_ms", "total_ms", "prompt_tokens", "completion_tokens"]) {
    for (const figure of await page.locator(`[data-figure=${field}] .value`).allTextContents()) {
      assert.match(figure, /^[\d.,]+( ms| \d+ cached)?$/, field);
    }
  }
  const tops = await columns(page).evaluateAll((items) =>
    items.slice(0, 2).map((item) => item.getBoundingClientRect().top),
  );
  assert.equal(tops[0], tops[1], "the first two stand side by side");
});

pageTest("text shows while it is still being written", { mock: {} }, async ({ page, mock }) => {
  let release;
  mock.options.hold = new Promise((resolve) => (release = resolve));
  await ask(page);
  await page.waitForFunction(() =>
    [...document.querySelectorAll("#columns [data-part=output]")].every((output) => output.textContent.trim() !== ""),
  );
  assert.deepEqual(await parts(page, "state"), ["writing", "writing", "writing", "writing"]);
  assert.equal(await page.getByRole("status").first().textContent(), "0 of 4 answers complete");
  release();
  await ended(page);
  assert.match(await page.getByRole("status").first().textContent(), /Which is best\?/);
});

pageTest("nothing moves while the answers stream", { mock: {} }, async ({ page, mock }) => {
  const places = () =>
    page
      .locator("#setup, .answers-head, #columns > li, #columns > li > *, .figures > div")
      .evaluateAll((elements) =>
        elements
          .map((element) => element.getBoundingClientRect())
          .map(({ top, left, width, height }) => [top, left, width, height]),
      );
  let release;
  mock.options.hold = new Promise((resolve) => (release = resolve));
  await ask(page);
  await page.waitForFunction(() => document.querySelectorAll("#columns > li[data-status=streaming]").length === 4);
  const before = await places();
  release();
  await ended(page);
  assert.deepEqual(await places(), before);
});

pageTest("the difference against the first arm is marked, and not by colour alone", { mock: {} }, async ({ page }) => {
  await ask(page);
  await ended(page);
  const [first, shots] = [columns(page).nth(0), columns(page).nth(1)];
  assert.equal(await first.locator("ins, del").count(), 0);
  assert.deepEqual(await shots.locator("del").allTextContents(), ["    first = mylist[0]\n", "first"]);
  assert.deepEqual(await shots.locator("ins").allTextContents(), ["mylist[0]"]);
  assert.match(await shots.locator("[data-part=changes]").textContent(), /^\+4 −7 words · 42 % agreement$/);
  const decoration = (selector) =>
    shots
      .locator(`${selector} .mark`)
      .first()
      .evaluate((e) => getComputedStyle(e).textDecorationLine);
  assert.deepEqual([await decoration("ins"), await decoration("del")], ["underline", "line-through"]);

  await page.getByRole("checkbox", { name: "Differences" }).uncheck();
  assert.equal(await page.locator("#columns :is(ins, del)").count(), 0);
  assert.equal((await parts(page, "output"))[1], TEXTS.icl);
});

pageTest(
  "a blind run hides names and figures and shuffles the columns until the vote",
  { mock: {} },
  async ({ page, mock, url }) => {
    // The shuffle then turns 0 1 2 3 into 1 2 3 0.
    await page.addInitScript(() => (Math.random = () => 0));
    await open(page, url);
    await page.getByRole("checkbox", { name: "Blind" }).check();
    await ask(page);
    await ended(page);
    assert.deepEqual(await names(page), ["Answer 1", "Answer 2", "Answer 3", "Answer 4"]);
    assert.equal((await parts(page, "output"))[0], TEXTS.icl);
    assert.deepEqual(new Set(await page.locator("#columns .value").allTextContents()), new Set(["–"]));
    const answers = await page.locator("#answers").evaluate((section) => section.outerHTML);
    assert.ok(!/conala|3-shot|base|agreement/.test(answers), "nothing gives an arm away");

    await page.keyboard.press("2");
    await page.getByText("Your vote: C conala.").waitFor();
    assert.deepEqual(await names(page), ["base 3-shot", "conala", "bash", "base"]);
    assert.deepEqual(mock.last("/v1/feedback"), { id: "cmp-0001", kind: "winner", arm: "conala" });
    assert.match((await parts(page, "state"))[1], /your vote/);
  },
);

pageTest("a blind vote and everything else outlive a reload", {}, async ({ page }) => {
  await page.getByRole("checkbox", { name: "Blind" }).check();
  await page.getByRole("textbox", { name: "Name of arm A" }).fill("the first");
  await ask(page, "reverse a string");
  await ended(page);
  const blind = await names(page);
  assert.ok(
    blind.every((name) => name.startsWith("Answer ")),
    String(blind),
  );
  await page.reload();
  assert.deepEqual(await names(page), blind, "still hidden");

  await page.getByRole("button", { name: "Vote for answer 1" }).click();
  await page.locator("#status", { hasText: /^Your vote: [^,]*\.$/ }).waitFor();
  const shown = async () => [
    await names(page),
    await parts(page, "output"),
    await parts(page, "state"),
    await page.locator("#status").textContent(),
    await page.locator("#columns .value").allTextContents(),
  ];
  const before = await shown();
  await page.reload();
  assert.deepEqual(await shown(), before);
  assert.equal(await page.getByRole("textbox", { name: "Prompt", exact: true }).inputValue(), "reverse a string");
  assert.equal(await page.getByRole("textbox", { name: "Name of arm A" }).inputValue(), "the first");
  assert.ok(await page.getByRole("button", { name: "Tie" }).isDisabled(), "one vote a comparison");
});

pageTest("a tie is a vote without an arm", { mock: {} }, async ({ page, mock }) => {
  await ask(page);
  await ended(page);
  await page.keyboard.press("0");
  await page.getByText("Your vote: a tie.").waitFor();
  assert.deepEqual(mock.last("/v1/feedback"), { id: "cmp-0001", kind: "winner", arm: null });
});

pageTest(
  "a vote that could not be recorded says so and can be sent again",
  { mock: { failFeedback: true }, expectsErrors: true },
  async ({ page, mock }) => {
    await ask(page);
    await ended(page);
    await page.keyboard.press("1");
    await page.getByRole("alert").getByText("the disk is full").waitFor();
    await page.reload();
    mock.options.failFeedback = false;
    await page.getByRole("button", { name: "Try again" }).click();
    await page.getByText("Your vote: A base.").waitFor();
    assert.equal(await page.locator("#run-error").isHidden(), true);
  },
);

pageTest("an arm that fails shows its error, and the others are unharmed", {}, async ({ page }) => {
  // Chosen once, and gone since.
  await page.evaluate(() => {
    const saved = JSON.parse(localStorage.getItem("lorry.compare")) ?? { setup: {} };
    const model = document.querySelector("#arms select").value;
    saved.setup.arms = ["", "no-such-model", ""].map((other) => ({ model: other || model }));
    addEventListener("pagehide", () => localStorage.setItem("lorry.compare", JSON.stringify(saved)));
  });
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("#arms li").length === 3);
  await ask(page);
  await ended(page);
  const statuses = await columns(page).evaluateAll((items) => items.map((item) => item.dataset.status));
  assert.deepEqual(statuses, ["finished", "failed", "finished"]);
  assert.match(await columns(page).nth(1).locator("[data-part=error]").textContent(), /no-such-model/);
  assert.ok(await columns(page).nth(1).getByRole("button", { name: /^Vote/ }).isDisabled());
  await page.keyboard.press("2");
  assert.match(await page.locator("#status").textContent(), /3 answers, 1 failed\. Which is best\?/);
});

pageTest("nothing is compared with what an arm wrote before it failed", { mock: { breaks: 0 } }, async ({ page }) => {
  await ask(page);
  await ended(page);
  const statuses = await columns(page).evaluateAll((items) => items.map((item) => item.dataset.status));
  assert.deepEqual(statuses, ["failed", "finished", "finished", "finished"]);
  assert.equal(await page.locator("#columns :is(ins, del)").count(), 0);
  assert.deepEqual(await parts(page, "changes"), ["", "", "", ""]);
  assert.equal((await parts(page, "output"))[1], TEXTS.icl);
});

pageTest("Stop ends a run, keeps what was written, and asks for no vote", { mock: {} }, async ({ page, mock }) => {
  mock.options.hold = new Promise(() => {});
  await ask(page);
  await page.waitForFunction(() => document.querySelectorAll("#columns > li[data-status=streaming]").length === 4);
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByText("Stopped.").waitFor();
  assert.deepEqual(await parts(page, "state"), ["stopped", "stopped", "stopped", "stopped"]);
  assert.equal((await parts(page, "output"))[0], "def");
  assert.ok(await page.getByRole("button", { name: "Tie" }).isDisabled());
  assert.ok(await page.getByRole("button", { name: /^Run/ }).isEnabled());
});

pageTest(
  "a connection that breaks is not mistaken for an end",
  { mock: { cutAfter: 20 }, expectsErrors: true },
  async ({ page }) => {
    await ask(page);
    await ended(page);
    assert.match(await page.locator("#run-error").textContent(), /did not run|ended before/);
    assert.ok((await parts(page, "state")).includes("stopped"));
    assert.ok(await page.getByRole("button", { name: "Tie" }).isDisabled());
  },
);

pageTest(
  "a refused comparison says why beside the arm at fault",
  {
    mock: { refusal: { message: "`k` is 99, and `python` has 24 examples", param: "arms[1].icl" } },
    expectsErrors: true,
  },
  async ({ page }) => {
    await ask(page);
    await page.locator("#run-error").getByText("`python` has 24 examples").waitFor();
    assert.match(await page.locator("#arms > li").nth(1).getByRole("alert").textContent(), /24 examples/);
    assert.equal(await page.locator("#arms [role=alert]:visible").count(), 1);
  },
);

pageTest("the request says what is set up", { mock: {} }, async ({ page, mock }) => {
  await page.getByRole("radio", { name: "Fill in" }).check();
  await page.getByRole("textbox", { name: "Before the cursor" }).fill("def f():");
  await page.getByRole("textbox", { name: "After the cursor" }).fill("f()");
  await page.getByRole("spinbutton", { name: "Seed" }).fill("7");
  await page.getByRole("spinbutton", { name: "Max tokens" }).fill("32");
  await page.getByRole("textbox", { name: "Stop at" }).fill("\\n\\n");
  for (const arm of ["B", "C"]) await page.getByLabel(`Options of arm ${arm}`).click();
  await page.getByRole("spinbutton", { name: "Number of examples, arm B" }).fill("5");
  await page.getByRole("combobox", { name: "Choice of examples, arm B" }).selectOption("bm25");
  await page.getByRole("spinbutton", { name: "Strength of the adapter, arm C" }).fill("0.5");
  await page.getByRole("combobox", { name: "Prompt format, arm C" }).fill("paper-v2");
  await page.getByRole("button", { name: "Remove arm D" }).click();
  await page.getByRole("button", { name: /^Run/ }).click();
  await ended(page);
  assert.deepEqual(mock.last("/v1/compare"), {
    prompt: "def f():",
    suffix: "f()",
    max_tokens: 32,
    temperature: 0,
    seed: 7,
    stop: ["\n\n"],
    on_error: "skip",
    stream: true,
    arms: [
      { name: "base", model: BASE },
      { name: "base 5-shot bm25", model: BASE, icl: { store: "python", k: 5, select: "bm25", seed: 7 } },
      {
        name: "conala ×0.5 paper-v2",
        model: BASE,
        adapters: [{ name: "conala", scale: 0.5 }],
        prompt_format: "paper-v2",
      },
    ],
  });

  await page.getByRole("radio", { name: "Chat" }).check();
  await page.getByRole("textbox", { name: "Message 1" }).fill("Hello");
  await page.getByRole("button", { name: "Add a message" }).click();
  await page.getByRole("button", { name: /^Run/ }).click();
  await ended(page);
  const { prompt, messages } = mock.last("/v1/compare");
  assert.deepEqual([prompt, messages], [undefined, [{ role: "user", content: "Hello" }]]);
});

pageTest("sixteen arms have sixteen names and are still usable", { mock: {} }, async ({ page, mock }) => {
  const add = page.getByRole("button", { name: "Add an arm" });
  for (let arms = 4; arms < 16; arms++) await add.click();
  assert.ok(await add.isDisabled());
  await ask(page);
  await ended(page);
  assert.equal(new Set(mock.last("/v1/compare").arms.map((arm) => arm.name)).size, 16);
  assert.equal(await columns(page).count(), 16);
  await page.getByRole("button", { name: /^Vote for P / }).click();
  await page.getByText(/^Your vote: P /).waitFor();
});

pageTest("what a model writes is text, never part of the page", { mock: {} }, async ({ page }) => {
  await page.getByRole("combobox", { name: "Model, arm B" }).selectOption(`${BASE}-docstring`);
  await ask(page);
  await ended(page);
  assert.equal(await page.locator("#columns :is(img, b)").count(), 0);
  assert.match((await parts(page, "output"))[1], /<img src=x onerror=/);
  assert.equal(await page.title(), "lorry: compare");
});

pageTest("an empty prompt is asked for, not sent", { mock: {} }, async ({ page, mock }) => {
  await page.getByRole("button", { name: /^Run/ }).click();
  assert.equal(await page.locator("#status").textContent(), "Write a prompt first.");
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt-text");
  assert.equal(mock.last("/v1/compare"), undefined);
});

pageTest(
  "the API key is asked for, sent as a bearer token and kept for the tab only",
  { mock: { key: "s3cret" }, expectsErrors: true },
  async ({ page, mock }) => {
    await page.locator("#catalogue-error").getByText("needs an API key").waitFor();
    await page.getByRole("textbox", { name: "API key" }).fill("s3cret");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelectorAll("#arms li").length === 4);
    assert.equal(await page.locator("#catalogue-error").isHidden(), true);
    assert.equal(mock.requests.at(-1).headers.authorization, "Bearer s3cret");
    assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes("s3cret"));
  },
);
