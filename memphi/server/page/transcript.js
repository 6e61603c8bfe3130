// Shows a conversation: what was said and attached, answers as they grow, and what is to be known about each.

import { counted, grouped, h, icon, iconButton, lasted } from "./dom.js";
import { copyButton, rendered } from "./markdown.js";
import { preview } from "./media.js";
import { sentence } from "./server.js";

const NEAR_PIXELS = 80;

export class Transcript {
  #root;
  #scroller;
  #jump;
  #addresses;
  #regenerate;
  #conversation = null;
  #articles = new Map();
  #due = new Set();
  #atEnd = true;

  /** regenerate() is called when the last answer is to be given anew. */
  constructor({ root, scroller, jump, addresses, regenerate }) {
    this.#root = root;
    this.#scroller = scroller;
    this.#jump = jump;
    this.#addresses = addresses;
    this.#regenerate = regenerate;
    scroller.addEventListener("scroll", () => this.#notePlace());
    // Whoever reads the end goes on to see it when the composer grows.
    new ResizeObserver(() => (this.#atEnd ? this.toEnd() : this.#notePlace())).observe(scroller);
    jump.onclick = () => this.toEnd("smooth");
  }

  /** Show a conversation from its beginning. */
  show(conversation) {
    this.#conversation = conversation;
    this.#articles.clear();
    this.#root.replaceChildren();
    for (const message of conversation.messages) this.add(message);
    this.toEnd();
  }

  add(message) {
    const article = message.role === "user" ? this.#asked(message) : h("article", { class: "message answer" });
    this.#articles.set(message, article);
    this.#root.append(article);
    if (message.role !== "user") this.#draw(message);
    this.#refreshLast();
  }

  remove(message) {
    this.#articles.get(message)?.remove();
    this.#articles.delete(message);
  }

  /** An answer has changed: it is drawn once before the next picture of the screen, however often this is called. */
  update(message) {
    if (this.#due.has(message)) return;
    this.#due.add(message);
    requestAnimationFrame(() => {
      this.#due.delete(message);
      if (!this.#articles.has(message)) return;
      this.#draw(message);
      if (this.#atEnd) this.toEnd();
      else this.#notePlace();
    });
  }

  toEnd(behavior = "instant") {
    this.#scroller.scrollTo({ top: this.#scroller.scrollHeight, behavior });
    this.#notePlace();
  }

  /** Remember whether the end is seen, and offer to go there where it is not. */
  #notePlace() {
    const below = this.#scroller.scrollHeight - this.#scroller.scrollTop - this.#scroller.clientHeight;
    this.#atEnd = below < NEAR_PIXELS;
    this.#jump.hidden = this.#atEnd;
  }

  #asked({ text, attachments = [] }) {
    const shown = attachments.map((one) => preview(one, this.#addresses.of(one)));
    return h(
      "article",
      { class: "message asked" },
      h("h2", { class: "hidden-visually" }, "You"),
      shown.length > 0 && h("div", { class: "attached" }, shown),
      text && h("div", { class: "bubble" }, text),
    );
  }

  #draw(message) {
    const article = this.#articles.get(message);
    const open = message.state === "waiting" || message.state === "streaming";
    if (!article.firstChild) {
      article.append(
        h("h2", { class: "hidden-visually" }, "Answer"),
        h("div", { class: "prose" }),
        h("div", { class: "notes" }),
      );
    }
    const [, prose, notes] = article.children;
    article.setAttribute("aria-busy", open);
    prose.classList.toggle("growing", message.state === "streaming");
    renew(prose, rendered(message.text));
    notes.replaceChildren(...this.#notes(message, open));
  }

  #notes(message, open) {
    if (message.state === "waiting")
      return [h("p", { class: "waiting" }, h("span", { class: "dots" }), message.notice)];
    if (open) return [];
    return [
      message.state === "failed" && note("alert", "failed", message.error),
      message.state === "stopped" && note("stop", "quiet", "Stopped."),
      message.finish === "length" &&
        note("alert", "quiet", "The answer was cut here: its longest length, or the end of the context, was reached."),
      message.degraded?.length > 0 && note("scissors", "degraded", "Changed to fit the memory", message.degraded),
      this.#foot(message),
    ].filter(Boolean);
  }

  #foot(message) {
    const copy = message.text && copyButton("Copy answer", () => message.text);
    const again = message.state === "failed" ? this.#tryAgainButton() : this.#againButton();
    again.classList.add("again");
    again.hidden = message !== this.#conversation.messages.at(-1);
    return h("div", { class: "foot" }, copy, again, facts(message));
  }

  #againButton() {
    return iconButton("again", "Answer again", () => this.#regenerate(), { class: "icon-button small" });
  }

  #tryAgainButton() {
    const look = { type: "button", class: "text-button", onclick: () => this.#regenerate() };
    return h("button", look, icon("again"), "Try again");
  }

  /** Only the last answer can be given anew. */
  #refreshLast() {
    const last = this.#conversation.messages.at(-1);
    for (const [message, article] of this.#articles) {
      const again = article.querySelector(".again");
      if (again) again.hidden = message !== last;
    }
  }
}

function note(symbol, kind, text, list = []) {
  const items = list.map((item) => h("li", {}, sentence(item)));
  const body = h("div", {}, text, items.length > 0 && h("ul", {}, items));
  return h("div", { class: `note ${kind}`, role: kind === "failed" ? "alert" : undefined }, icon(symbol), body);
}

function facts({ usage, timings }) {
  if (!usage) return null;
  const told = [`${grouped(usage.prompt_tokens)} → ${counted(usage.completion_tokens, "token")}`];
  if (timings?.seconds !== undefined) told.push(lasted(timings.seconds));
  const first = timings?.first_token_seconds;
  const title = first === undefined ? undefined : `The first token came after ${lasted(first)}`;
  return h("span", { class: "facts", title }, told.join(" · "));
}

/** Put new blocks in the place of old ones, but leave equal ones alone: what is selected or scrolled stays so. */
function renew(prose, fragment) {
  const blocks = [...fragment.childNodes];
  let same = 0;
  while (same < blocks.length && prose.childNodes[same]?.isEqualNode(blocks[same])) same++;
  while (prose.childNodes.length > same) prose.lastChild.remove();
  prose.append(...blocks.slice(same));
}
