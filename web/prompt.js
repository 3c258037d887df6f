// The prompt: text, the two sides of a cursor, or a chat, and the settings that all arms share.

import { byId, h } from "./dom.js";
import { saveSoon, state } from "./state.js";

const TEXTS = { "prompt-text": "text", "prompt-prefix": "prefix", "prompt-suffix": "suffix", stop: "stop" };
const NUMBERS = { "max-tokens": "max_tokens", temperature: "temperature", seed: "seed" };
const SWITCHES = { blind: "blind", "show-changes": "showChanges" };

const EXAMPLES = {
  sentence: { kind: "text", text: "check if all elements in list `mylist` are the same", max_tokens: 64 },
  fill: {
    kind: "fill",
    prefix: "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    ",
    suffix: "\n\nprint(median([3, 1, 2]))\n",
    max_tokens: 64,
  },
  chat: {
    kind: "chat",
    messages: [{ role: "user", content: "Write a Python function that merges two sorted lists." }],
    max_tokens: 256,
  },
};

/** Binds the controls to `state.setup`. */
export function setUpPrompt() {
  const { setup } = state;
  for (const [id, field] of Object.entries(TEXTS)) {
    bind(id, "input", (control) => (setup[field] = control.value));
  }
  for (const [id, field] of Object.entries(NUMBERS)) {
    // An empty field is left to the server.
    bind(id, "input", (control) => (setup[field] = control.value === "" ? undefined : control.valueAsNumber));
  }
  for (const [id, field] of Object.entries(SWITCHES)) {
    bind(id, "change", (control) => (setup[field] = control.checked));
  }
  for (const radio of document.getElementsByName("kind")) {
    radio.addEventListener("change", () => {
      setup.kind = radio.value;
      saveSoon();
      showKind();
    });
  }
  byId("add-message").addEventListener("click", () => {
    const previous = setup.messages.at(-1)?.role;
    setup.messages.push({ role: previous === "user" ? "assistant" : "user", content: "" });
    saveSoon();
    showMessages();
    byId("messages").lastElementChild.querySelector("textarea").focus();
  });
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => {
      Object.assign(setup, structuredClone(EXAMPLES[button.dataset.example]));
      saveSoon();
      showPrompt();
      byId("run").focus();
    });
  }
  showPrompt();
}

export function focusPrompt() {
  document.querySelector("[data-kind]:not([hidden]) textarea")?.focus();
}

function showPrompt() {
  const { setup } = state;
  for (const [id, field] of Object.entries({ ...TEXTS, ...NUMBERS })) byId(id).value = setup[field] ?? "";
  for (const [id, field] of Object.entries(SWITCHES)) byId(id).checked = setup[field];
  for (const radio of document.getElementsByName("kind")) radio.checked = radio.value === setup.kind;
  showMessages();
  showKind();
}

function showKind() {
  for (const part of document.querySelectorAll("[data-kind]")) part.hidden = part.dataset.kind !== state.setup.kind;
}

function showMessages() {
  const { messages } = state.setup;
  byId("messages").replaceChildren(
    ...messages.map((message, index) => {
      const role = h(
        "select",
        {
          "aria-label": `Role of message ${index + 1}`,
          change: (event) => {
            message.role = event.target.value;
            saveSoon();
          },
        },
        ...["system", "user", "assistant"].map((value) => h("option", { value }, value)),
      );
      role.value = message.role;
      const content = h("textarea", {
        rows: 3,
        spellcheck: "false",
        "aria-label": `Message ${index + 1}`,
        value: message.content,
        input: (event) => {
          message.content = event.target.value;
          saveSoon();
        },
      });
      const remove = h(
        "button",
        {
          type: "button",
          class: "icon",
          "aria-label": `Remove message ${index + 1}`,
          disabled: messages.length === 1,
          click: () => {
            messages.splice(index, 1);
            saveSoon();
            showMessages();
            byId("add-message").focus();
          },
        },
        "×",
      );
      return h("li", {}, h("div", { class: "message-head" }, role, remove), content);
    }),
  );
}

function bind(id, event, take) {
  byId(id).addEventListener(event, ({ target }) => {
    take(target);
    saveSoon();
  });
}
