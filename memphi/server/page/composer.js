// What is about to be asked: text, attachments with their prices, and the keys that send and stop.

import { ACCEPTED, Addresses, attachmentOf, filesOf } from "./attachments.js";
import { byId, counted, grouped, h, iconButton } from "./dom.js";
import { preview } from "./media.js";
import { Recording } from "./recording.js";

const PAUSE_MS = 350;

export class Composer {
  #text = byId("text");
  #chips = byId("chips");
  #price = byId("price");
  #problem = byId("problem");
  #attachments = [];
  #problems = new Map();
  #busy = false;
  /** How many times files are being read. */
  #reading = 0;
  #timer = null;
  #pricing = new AbortController();
  #addresses = new Addresses();
  #prices;
  #context;
  #send;

  /** context() tells the conversation's settings, messages and contextTokens; send({text, attachments}) and stop() act. */
  constructor({ prices, context, send, stop }) {
    this.#prices = prices;
    this.#context = context;
    this.#send = send;
    byId("composer").onsubmit = (event) => (event.preventDefault(), this.#submit());
    byId("stop").onclick = stop;
    this.#text.oninput = () => this.#changed();
    this.#text.onkeydown = (event) => this.#key(event);
    this.#takeFiles();
    new Recording({ add: (file) => this.add([file]), report: (problem) => this.report(problem) });
    this.#changed();
  }

  /** While an answer grows there is a stop button in the place of the other. */
  set busy(busy) {
    this.#busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    this.#changed();
  }

  focus() {
    this.#text.focus();
  }

  clear() {
    this.#text.value = "";
    this.#attachments = [];
    this.#problems.clear();
    this.#chips.replaceChildren();
    this.#addresses.release();
    this.report("");
    this.#changed();
  }

  /** Attach files, in their order. */
  async add(files) {
    this.report("");
    this.#reading++;
    this.#changed();
    for (const file of files) {
      try {
        const attachment = await attachmentOf(file);
        this.#attachments.push(attachment);
        this.#chips.append(this.#chip(attachment));
      } catch (error) {
        this.report(error.message);
      }
    }
    this.#reading--;
    this.#changed();
    this.focus();
  }

  /** Say what is wrong; nothing, if all is well again. */
  report(problem) {
    this.#problem.textContent = problem;
    this.#problem.hidden = !problem;
  }

  /** Prices have changed with the settings or the conversation. */
  refresh() {
    for (const attachment of this.#attachments) this.#showPrice(attachment);
    this.#changed();
  }

  #submit() {
    if (this.#busy || !this.#complete) return;
    const draft = { text: this.#text.value.trim(), attachments: this.#attachments };
    this.clear();
    this.#send(draft);
  }

  /** Whether there is something to send, and all of it is there and can be used. */
  get #complete() {
    const empty = !this.#text.value.trim() && !this.#attachments.length;
    return !empty && !this.#reading && !this.#problems.size;
  }

  #key(event) {
    // While a word is composed (Chinese, Japanese, …), Enter belongs to the input method; 229 is how Safari says it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.#submit();
  }

  #takeFiles() {
    const picker = byId("picker");
    picker.accept = ACCEPTED;
    byId("attach").onclick = () => picker.click();
    picker.onchange = () => this.add([...picker.files]).then(() => (picker.value = ""));
    document.addEventListener("paste", (event) => {
      const files = filesOf(event.clipboardData);
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    const hint = (shown) => document.body.classList.toggle("dropping", shown);
    document.addEventListener("dragover", (event) => carriesFiles(event) && (event.preventDefault(), hint(true)));
    document.addEventListener("dragleave", (event) => event.relatedTarget === null && hint(false));
    document.addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      hint(false);
      this.add(filesOf(event.dataTransfer));
    });
  }

  #chip(attachment) {
    const price = h("span", { class: "tokens" });
    const chip = h(
      "li",
      { class: `chip ${attachment.kind}` },
      preview(attachment, this.#addresses.of(attachment)),
      price,
    );
    chip.append(
      iconButton("close", `Remove ${attachment.name}`, () => this.#remove(attachment, chip), { class: "remove" }),
    );
    chip.dataset.id = attachment.id;
    this.#showPrice(attachment, price);
    return chip;
  }

  #remove(attachment, chip) {
    this.#attachments = this.#attachments.filter((one) => one !== attachment);
    this.#problems.delete(attachment.id);
    chip.remove();
    this.#tellProblems();
    this.#changed();
    this.focus();
  }

  async #showPrice(attachment, price = this.#chips.querySelector(`[data-id="${attachment.id}"] .tokens`)) {
    price.textContent = "…";
    price.classList.add("pending");
    try {
      const tokens = await this.#prices.attachment(attachment, this.#context().settings);
      price.textContent = counted(tokens, "token");
      price.classList.remove("pending");
      this.#problems.delete(attachment.id);
    } catch (error) {
      price.textContent = "?";
      const hopeless = error.status === 400 || error.status === 413;
      const problem = `${attachment.name} ${error.message.replace(/^(Image|Audio) 1: /, "")}`;
      if (hopeless && this.#attachments.includes(attachment)) this.#problems.set(attachment.id, problem);
    }
    price.closest(".chip")?.classList.toggle("wrong", this.#problems.has(attachment.id));
    this.#tellProblems();
    this.#changed();
  }

  #tellProblems() {
    const [first] = this.#problems.values();
    if (first) this.report(`${first} Remove it to go on.`);
    else if (this.#problem.textContent.endsWith("Remove it to go on.")) this.report("");
  }

  #changed() {
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
    byId("send").disabled = !this.#complete;
    this.#pricing.abort();
    clearTimeout(this.#timer);
    if (this.#busy || !this.#complete) this.#price.textContent = "";
    else this.#timer = setTimeout(() => this.#priceAll(), PAUSE_MS);
  }

  async #priceAll() {
    this.#pricing = new AbortController();
    const { settings, messages, contextTokens } = this.#context();
    const draft = { role: "user", text: this.#text.value.trim(), attachments: this.#attachments };
    try {
      const price = await this.#prices.conversation(settings, [...messages, draft], this.#pricing.signal);
      this.#price.textContent = counted(price.tokens, "token");
      const room = contextTokens ? `; there is room for ${grouped(contextTokens)}` : "";
      const parts = `${grouped(price.text)} written and ${grouped(price.media)} attached`;
      this.#price.title = `${parts}, earlier turns included${room}`;
      this.#price.classList.toggle("over", Boolean(contextTokens) && price.tokens >= contextTokens);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#price.textContent = error.status === 413 ? "too long" : "";
      this.#price.title = error.message;
      this.#price.classList.add("over");
    }
  }
}
