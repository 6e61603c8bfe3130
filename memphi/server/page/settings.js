// The sheet with what a conversation is asked with, and with what this browser keeps for all.

import { byId, tried } from "./dom.js";
import { key } from "./server.js";

const THEME = "memphi.theme";

/** How each field of the form reads and is written; the names are those of a conversation's settings. */
const FIELDS = {
  system: { read: String, write: String },
  temperature: { read: Number, write: String },
  topP: { read: Number, write: String },
  maxTokens: { read: whole, write: (value) => value ?? "" },
  seed: { read: whole, write: (value) => value ?? "" },
  detail: { read: (text) => (/^\d+$/.test(text) ? Number(text) : text), write: String },
  onPressure: { read: (text) => text || null, write: (value) => value ?? "" },
};

function whole(text) {
  return /^\d+$/.test(text.trim()) ? Number(text) : null;
}

export class Settings {
  #form = byId("settings-form");
  #changed;

  /** changed(settings) is called whenever one of the conversation's settings is another. */
  constructor({ changed, forgetKey }) {
    this.#changed = changed;
    byId("settings-open").onclick = () => this.#open();
    byId("settings").addEventListener("click", (event) => event.target === event.currentTarget && event.target.close());
    this.#form.oninput = () => {
      this.#tellNumbers();
      if (this.#form.checkValidity()) this.#changed(this.#read());
    };
    byId("key-forget").onclick = () => {
      key.forget();
      forgetKey();
      byId("settings").close();
    };
    this.#offerThemes();
  }

  /** Fill the form with a conversation's settings. */
  show(settings) {
    for (const [name, { write }] of Object.entries(FIELDS)) this.#form.elements[name].value = write(settings[name]);
    this.#tellNumbers();
  }

  #open() {
    byId("key-kept").hidden = !key.get();
    byId("settings").showModal();
  }

  #read() {
    return Object.fromEntries(
      Object.entries(FIELDS).map(([name, { read }]) => [name, read(this.#form.elements[name].value)]),
    );
  }

  #tellNumbers() {
    for (const output of this.#form.querySelectorAll("output")) {
      output.value = Number(this.#form.elements[output.htmlFor.value].value).toFixed(2);
    }
  }

  #offerThemes() {
    const choices = document.querySelectorAll("input[name=theme]");
    const now = tried(() => localStorage.getItem(THEME)) ?? "";
    for (const choice of choices) {
      choice.checked = choice.value === now;
      choice.onchange = () => {
        tried(() => (choice.value ? localStorage.setItem(THEME, choice.value) : localStorage.removeItem(THEME)));
        if (choice.value) document.documentElement.dataset.theme = choice.value;
        else delete document.documentElement.dataset.theme;
      };
    }
  }
}
